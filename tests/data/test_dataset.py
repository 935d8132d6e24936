"""What is loaded is the published data, or a failure that names the file and the remedy."""

import functools
import gzip
import hashlib
import io
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cnn_jax.data import tfds as tfds_module
from cnn_jax.data.dataset import RecordedImages
from cnn_jax.data.idx import idx_header, read_idx
from cnn_jax.data.loading import count_train_examples, load_dataset, read_sizes
from cnn_jax.data.mnist.builder import SHA256, EmbeddedMnist
from cnn_jax.runtime.errors import InputFileError, StorageError, UsageError
from tests.helpers import EMBEDDED, flip_a_bit, write_idx


@pytest.mark.parametrize("name", SHA256)
def test_the_embedded_files_are_the_published_ones(name):
    values = read_idx(EMBEDDED / f"{name}.xz", ndim=3 if "idx3" in name else 1, sha256=SHA256[name])
    assert hashlib.sha256(idx_header(values.shape) + values.tobytes()).hexdigest() == SHA256[name]


def test_a_damaged_embedded_file_is_refused():
    with pytest.raises(
        InputFileError, match=r"t10k-labels-idx1-ubyte\.xz is damaged: its SHA-256 is not 00; reinstall"
    ):
        read_idx(EMBEDDED / "t10k-labels-idx1-ubyte.xz", ndim=1, sha256="00")


def test_mnist_comes_from_tfds_as_it_was_published(tfds_folder):
    dataset = load_dataset("mnist", None, tfds_folder)
    assert (dataset.train_images.shape, dataset.train_images.dtype) == ((60_000, 28, 28, 1), np.uint8)
    assert (dataset.test_images.shape, dataset.test_labels.shape) == ((10_000, 28, 28, 1), (10_000,))
    assert (dataset.train_labels.dtype, dataset.num_classes) == (np.int32, 10)
    np.testing.assert_array_equal(
        dataset.train_images[..., 0], read_idx(EMBEDDED / "train-images-idx3-ubyte.xz", ndim=3)
    )
    assert (
        tfds.builder_from_directory(tfds_folder / "embedded_mnist" / "1.0.0").info.splits["test"].num_examples == 10_000
    )


@pytest.mark.slow
def test_two_processes_that_prepare_mnist_at_once_both_get_it(tmp_path, program):
    code = f"""
from pathlib import Path
from cnn_jax.data.loading import count_train_examples, load_dataset
import sys
print(len(load_dataset("mnist", None, Path({str(tmp_path)!r})).train_labels), "tensorflow" in sys.modules)
"""
    processes = [program("-c", code) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "60000 False\n"), err
        assert err == ""


def test_a_place_that_cannot_be_written_is_named_with_the_option_to_change_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot prepare mnist in .*file.*--data-dir"):
        load_dataset("mnist", None, tmp_path / "file" / "below")


def test_damaged_prepared_files_are_refused(tfds_folder, tmp_path):
    load_dataset("mnist", None, tfds_folder)
    shutil.copytree(tfds_folder / "embedded_mnist", tmp_path / "embedded_mnist")
    (file,) = (tmp_path / "embedded_mnist" / "1.0.0").glob("*test.array_record*")
    flip_a_bit(file)
    with pytest.raises(InputFileError, match=r"embedded_mnist/1\.0\.0 is damaged .*prepare it anew"):
        load_dataset("mnist", None, tmp_path)


def test_prepared_files_that_are_sound_but_hold_other_images_are_refused(tmp_path, monkeypatch):
    def generate_swapped(self, prefix):
        examples = list(published(self, prefix))
        examples[0][1]["label"], examples[1][1]["label"] = examples[1][1]["label"], examples[0][1]["label"]
        return examples

    published = EmbeddedMnist._generate_examples
    monkeypatch.setattr(EmbeddedMnist, "_generate_examples", generate_swapped)
    with pytest.raises(InputFileError, match="train-labels-idx1-ubyte does not have its published SHA-256"):
        load_dataset("mnist", None, tmp_path)


class _SmallColours(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Six PNG images of 9x8 in colour, of three classes: a set that this package does not know."""

    name = "small_colours"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(9, 8, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "validation": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            png = io.BytesIO()
            Image.fromarray(np.full((9, 8, 3), 10 * i, np.uint8)).save(png, "PNG")
            yield i, {"image": io.BytesIO(png.getvalue()), "label": i % 3}


def test_any_prepared_tfds_set_of_labelled_images_can_be_used(tmp_path):
    _SmallColours(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    assert count_train_examples("small_colours", None, tmp_path) == 6
    dataset = load_dataset("small_colours", None, tmp_path)
    assert (dataset.train_images.shape, dataset.num_classes) == ((6, 9, 8, 3), 3)
    assert len(dataset.test_labels) == 3
    # tfds shuffles when it prepares: each image must still have its own label.
    np.testing.assert_array_equal(dataset.train_images[:, 0, 0, 0] // 10 % 3, dataset.train_labels)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("no_such_set", "tfds does not know it"),
        ("mnist/../..", "this is not a tfds name"),
        ("ag_news_subset", "not an image classification set"),
        ("cats_vs_dogs", r"its images are \?x\?x3"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused_without_loading_anything(name, complaint, tmp_path):
    with pytest.raises(UsageError, match=rf"--dataset {name}: .*{complaint}"):
        count_train_examples(name, None, tmp_path)


def hang(*arguments, **options):
    time.sleep(0.5)
    raise OSError("too late")


def find_no_address(*arguments, **options):
    raise urllib.error.URLError("no address")


@pytest.mark.parametrize(("urlopen", "reason"), [(hang, "no answer in 0.1 s"), (find_no_address, "no address")])
def test_a_set_that_must_be_downloaded_is_refused_at_once_without_a_network(
    urlopen, reason, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(tfds_module.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(tfds_module, "NETWORK_SECONDS", 0.1)
    tfds_module._ask.cache_clear()
    for load in (load_dataset, functools.partial(count_train_examples, prepare=True)):
        begin = time.monotonic()
        with pytest.raises(StorageError, match=rf"cannot prepare fashion_mnist .* cannot be reached: {reason}\)") as no:
            load("fashion_mnist", None, tmp_path)
        assert "a network, or give --dataset-dir" in str(no.value)
        assert time.monotonic() - begin < 60
    assert (list(tmp_path.iterdir()), *capfd.readouterr()) == ([], "", "")


def test_a_bucket_is_refused_and_the_variable_named(program):
    # tfds reads the variable when it is imported.
    process = program("train.py", "--dataset", "cifar10", "--dry-run", env=os.environ | {"TFDS_DATA_DIR": "gs://a/b"})
    _, err = process.communicate()
    assert (process.returncode, err.count("\n")) == (2, 1)
    assert "error: TFDS_DATA_DIR gs://a/b: it must be a folder of this machine" in err


def test_a_proxy_that_never_answers_is_no_network(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tfds_module, "NETWORK_SECONDS", 0.5)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it knows the proxies of before
    tfds_module._ask.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot be reached: (no answer in 0.5 s|.*timed out)\); prepare it"):
            load_dataset("fashion_mnist", None, tmp_path)
        assert time.monotonic() - begin < 60
        proxy.settimeout(0)
        proxy.accept()[0].close()  # it was asked
    assert (list(tmp_path.iterdir()), *capfd.readouterr()) == ([], "", "")


def test_a_set_is_downloaded_where_the_network_answers_with_whatever(tmp_path, monkeypatch):
    def refuse(url, timeout):
        asked.append(url)
        raise urllib.error.HTTPError(url, 405, "ask otherwise", None, None)

    asked, downloaded = [], []
    monkeypatch.setattr(tfds_module.urllib.request, "urlopen", refuse)
    tfds_module._ask.cache_clear()
    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", lambda builder, **options: downloaded.append(builder.name)
    )
    assert count_train_examples("fashion_mnist", None, tmp_path, prepare=True) is None
    with pytest.raises(InputFileError):  # nothing is there afterwards
        load_dataset("fashion_mnist", None, tmp_path)
    assert (downloaded, len(asked)) == (["fashion_mnist"], 1)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_idx_files_are_read_plain_or_compressed_under_their_published_names(suffix, tmp_path, small_mnist):
    expected = load_dataset("mnist", small_mnist, None)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        source = next(small_mnist.glob(f"{name}*"))
        values = read_idx(source, ndim=3 if "images" in name else 1)
        # EMNIST's names, and those of sets like it, say test where MNIST's say t10k.
        target = tmp_path / f"some-digits-{name.replace('t10k', 'test')}-ubyte{suffix}"
        if suffix == ".gz":
            target.write_bytes(gzip.compress(idx_header(values.shape) + values.tobytes()))
        else:
            write_idx(target, values)
    dataset = load_dataset("mnist", tmp_path, None)
    assert count_train_examples("mnist", tmp_path, None) == 1030
    np.testing.assert_array_equal(dataset.train_images, expected.train_images)
    np.testing.assert_array_equal(dataset.test_labels, expected.test_labels)


def _tiny_idx_folder(folder):
    for prefix, count in (("train", 6), ("t10k", 3)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", np.zeros((count, 5, 4), np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 3)


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("train-images-idx3-ubyte", None, "has no train-images-idx3-ubyte"),
        ("t10k-labels-idx1-ubyte", b"", "is not an IDX file"),
        ("t10k-labels-idx1-ubyte", b"\x89PNG\r\n\x1a\n", "is not an IDX file"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\x03" + b"\0\0\0\3" * 3 + bytes(27), "labels have 0x08 0x01"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\3\0\1", "holds only 2 bytes"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\3\0\1\2\0", "holds more bytes"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\2\0\1", "3 images but .* has 2 labels"),
        (
            "t10k-labels-idx1-ubyte",
            b"\0\0\x08\x01\0\0\0\3\0\1\x09",
            "has the label 9, but the training labels end at 2",
        ),
        ("t10k-images-idx3-ubyte", idx_header((3, 4, 4)) + bytes(48), r"\(5, 4, 1\), the test images \(4, 4, 1\)"),
        ("t10k-images-idx3-ubyte.gz", b"", "has both"),
        ("t10k-images-idx3-ubyte", idx_header((0, 5, 4)), "t10k-images-idx3-ubyte has no images"),
        ("train-images-idx3-ubyte", idx_header((0, 5, 4)), "train-images-idx3-ubyte has no images"),
    ],
)
def test_idx_files_that_are_wrong_are_refused(file, content, complaint, tmp_path):
    _tiny_idx_folder(tmp_path)
    assert load_dataset("mnist", tmp_path, None).num_classes == 3
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputFileError, match=complaint):
        load_dataset("mnist", tmp_path, None)
    if complaint == "train-images-idx3-ubyte has no images":
        with pytest.raises(InputFileError, match=complaint):
            count_train_examples("mnist", tmp_path, None)


@pytest.fixture
def colour_folder(tmp_path):
    """A folder of IDX files of 40 training and 3 test images, 6x5x3."""
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 3)):
        write_idx(tmp_path / f"{prefix}-images-idx4-ubyte", generator.integers(0, 256, (count, 6, 5, 3), np.uint8))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 3)
    return tmp_path


def test_colour_images_are_the_same_whether_they_are_read_or_stay_in_their_plain_file(colour_folder):
    stored = read_idx(colour_folder / "train-images-idx4-ubyte", ndim=4)
    whole = load_dataset("mnist", colour_folder, None, resident_bytes=stored.nbytes)
    recorded = load_dataset("mnist", colour_folder, None, resident_bytes=stored.nbytes - 1)
    assert isinstance(whole.train_images, np.ndarray)
    assert isinstance(recorded.train_images, RecordedImages)
    np.testing.assert_array_equal(whole.train_images, stored)
    np.testing.assert_array_equal(recorded.train_images[:], stored)
    wanted = np.array([39, 0, 7, 7])
    np.testing.assert_array_equal(recorded.train_images[wanted], stored[wanted])
    assert recorded.train_images[wanted[:0]].shape == (0, 6, 5, 3)
    assert recorded.sha256 == whole.sha256
    assert read_sizes("mnist", colour_folder, None) == (40, 3, (6, 5, 3), 3)
    (colour_folder / "train-images-idx4-ubyte").unlink()
    assert recorded.sha256 == whole.sha256  # without reading all images again


@pytest.mark.parametrize("change", [Path.unlink, lambda file: os.truncate(file, 100), Path.touch, flip_a_bit])
def test_a_file_that_changes_while_its_images_are_in_use_is_refused(change, colour_folder):
    images = load_dataset("mnist", colour_folder, None, resident_bytes=0).train_images
    change(colour_folder / "train-images-idx4-ubyte")
    with pytest.raises(InputFileError, match=r"train-images-idx4-ubyte (was changed|cannot be read)"):
        images[:10]


def test_a_file_that_lacks_a_byte_is_refused_before_its_images_are_in_use(colour_folder):
    os.truncate(colour_folder / "train-images-idx4-ubyte", 20 + 40 * 90 - 1)
    with pytest.raises(InputFileError, match="announces 40x6x5x3 = 3,600 values but holds only 3,599 bytes"):
        load_dataset("mnist", colour_folder, None, resident_bytes=0)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_truncated_compressed_file_is_refused(suffix, tmp_path, small_mnist):
    _tiny_idx_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    content = idx_header((3,)) + bytes(3)
    file = tmp_path / f"t10k-labels-idx1-ubyte{suffix}"
    if suffix == ".gz":
        file.write_bytes(gzip.compress(content)[:-9])
    else:
        write_idx(file, np.zeros(3, np.uint8))
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputFileError, match=rf"t10k-labels-idx1-ubyte\{suffix} is damaged"):
        load_dataset("mnist", tmp_path, None)
