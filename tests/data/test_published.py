"""A data set knows what its classes are called, and EMNIST's images are read upright."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cnn_jax.data import published
from cnn_jax.data.dataset import RecordedImages
from cnn_jax.data.idx import read_idx
from cnn_jax.data.loading import load_dataset, read_sizes
from cnn_jax.data.published import EMNIST, emnist, numbers, upright
from cnn_jax.data.tfds import _find_builder, _published
from cnn_jax.runtime.errors import InputFileError
from tests.helpers import write_idx


def write_set(folder, prefix, images, labels):
    """Write four files of the same images, to train and to test on."""
    for split in ("train", "test"):
        write_idx(folder / f"{prefix}{split}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}{split}-labels-idx1-ubyte", labels)


@pytest.fixture
def digits(small_mnist):
    """Some of MNIST's images, (30, 28, 28), and their labels, all ten of them among them."""
    images = read_idx(small_mnist / "train-images-idx3-ubyte", ndim=3)[:30]
    return images, read_idx(small_mnist / "train-labels-idx1-ubyte.xz", ndim=1)[:30]


def test_emnists_letters_are_26_classes_and_upright(digits, tmp_path):
    images, labels = digits
    write_set(tmp_path, "emnist-letters-", images.swapaxes(1, 2), labels + 1)
    dataset = load_dataset("mnist", tmp_path, None)
    assert "".join(dataset.class_names) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert dataset.num_classes == read_sizes("mnist", tmp_path, None).num_classes == 26
    np.testing.assert_array_equal(dataset.train_images[..., 0], images)
    np.testing.assert_array_equal(dataset.test_labels, labels)
    assert dataset.reading == (
        "its images are stored with rows and columns exchanged, and are read upright; "
        "its labels are stored as 1 to 26, and are read from 0"
    )


@pytest.mark.parametrize(
    ("split", "classes"),
    {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10}.items(),
)
def test_each_of_emnists_splits_has_its_published_number_of_classes(split, classes, tmp_path):
    names = emnist(split).class_names
    assert len(names) == len(set(names)) == classes
    label = SimpleNamespace(names=numbers(99), num_classes=99)
    for name in (f"emnist/{split}", f"emnist/{split}:3.1.0"):
        assert _published(_find_builder(name, tmp_path), label) == emnist(split)


@pytest.mark.parametrize(
    ("name", "split"),
    {"emnist": "byclass", "emnist/letters": "letters", "EMNIST/letters:3.*.*": "letters", "Emnist": "byclass"}.items(),
)
def test_tfdss_emnist_is_known_however_its_name_is_written(name, split, tmp_path):
    label = SimpleNamespace(names=numbers(99), num_classes=99)
    assert _published(_find_builder(name, tmp_path), label) == emnist(split)


def test_tfds_names_the_classes_of_its_other_sets(tmp_path):
    builder = _find_builder("kmnist", tmp_path)
    assert _published(builder, SimpleNamespace(names=["cat", "dog"], num_classes=2)).class_names == ("cat", "dog")
    assert _published(builder, SimpleNamespace(names=None, num_classes=3)).class_names == ("0", "1", "2")


def test_recorded_images_are_read_upright_too(digits, tmp_path):
    images, labels = digits
    write_set(tmp_path, "", images, labels)
    stored = load_dataset("mnist", tmp_path, None)
    turned = stored.train_images.swapaxes(1, 2)
    recorded = RecordedImages(lambda indices: turned[np.array(indices)], turned.shape)
    object.__setattr__(stored, "train_images", recorded)
    read = upright(stored, emnist("digits")).train_images
    assert isinstance(read, RecordedImages)
    np.testing.assert_array_equal(read[3:7], images[3:7, ..., np.newaxis])
    np.testing.assert_array_equal(read[np.array([5, 2])], images[[5, 2], ..., np.newaxis])


def test_any_folder_can_be_told_to_be_transposed_and_its_classes_to_have_names(digits, tmp_path, command):
    images, labels = digits
    write_set(tmp_path, "", images.swapaxes(1, 2), labels)
    upright_images = load_dataset("mnist", tmp_path, None, transposed=True).train_images
    np.testing.assert_array_equal(upright_images[..., 0], images)
    names = ",".join("abcdefghij")
    options = ("--dry-run", "--dataset-dir", tmp_path, "--batch-size", 10, "--checkpoint-dir", tmp_path)
    code, _, err = command("train", *options, "--transposed", "--class-names", names)
    assert code == 0, err
    assert "rows and columns exchanged" in err
    code, _, err = command("train", *options, "--class-names", "a,b")
    assert (code, err) == (2, "error: --class-names a,b: it must be 10 names, one for each class\n")
    code, _, err = command("train", "--transposed")
    assert code == 2
    assert err == "error: --transposed: it must be given with --dataset-dir\n"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("mapping.txt", "0 48\n1 97 65\n2 98\n"),
        ("emnist-mapping.txt", "0 48\n1 97\n2 98"),
        ("labels.txt", "0\na\n\nb\n"),
    ],
)
def test_names_stand_in_a_file_beside_the_images(file, text, digits, tmp_path):
    images, labels = digits
    write_set(tmp_path, "", images, labels % 3)
    (tmp_path / file).write_text(text)
    assert load_dataset("mnist", tmp_path, None).class_names == ("0", "a", "b")


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("mapping.txt", b"0 48\n1 49\n", "has the labels 0 to 2, but by .*/mapping.txt they are 0 to 1"),
        ("mapping.txt", b"0 48\n2 49\n3 50", r"mapping.txt is no list of class names \(the label 1 is missing\)"),
        (
            "mapping.txt",
            b"0 48\n0 50\n1 49\n2 51\n",
            "mapping.txt is no list of class names .a label stands in it twice",
        ),
        ("mapping.txt", b"zero 48", "mapping.txt is no list of class names"),
        ("mapping.txt", b"0 48\n1 -1\n2 1", "mapping.txt is no list of class names"),
        ("labels.txt", b"a\nb\na\n", "has no names, one that cannot be shown, or one twice"),
        ("labels.txt", b"", "has no names, one that cannot be shown, or one twice"),
        ("labels.txt", b"a\n\x1b[2J\nb", "has no names, one that cannot be shown, or one twice"),
        ("labels.txt", b"\xff\xfe", "labels.txt is no list of class names"),
    ],
)
def test_a_list_of_names_that_cannot_be_used_is_refused(file, content, complaint, digits, tmp_path):
    images, labels = digits
    write_set(tmp_path, "", images, labels % 3)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputFileError, match=complaint):
        load_dataset("mnist", tmp_path, None)


def test_labels_that_emnist_does_not_have_are_refused(digits, tmp_path):
    images, labels = digits
    write_set(tmp_path, "emnist-letters-", images, labels)  # from 0
    with pytest.raises(InputFileError, match=r"has the labels 0 to 9, but by the name .* they are 1 to 26; "):
        load_dataset("mnist", tmp_path, None)


def test_a_test_label_that_emnist_does_not_have_is_refused_and_not_left_out(digits, tmp_path):
    images, labels = digits
    write_set(tmp_path, "emnist-letters-", images, labels + 1)
    write_idx(tmp_path / "emnist-letters-test-labels-idx1-ubyte", labels)
    with pytest.raises(InputFileError, match=r"emnist-letters-test-labels.* has the labels 0 to 9, but by the name"):
        load_dataset("mnist", tmp_path, None)


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink("nothing", path)]
)
def test_a_list_of_names_that_is_no_file_is_refused_and_not_waited_for(make, digits, tmp_path):
    write_set(tmp_path, "", *digits)
    make(tmp_path / "labels.txt")
    with pytest.raises(InputFileError, match=r"labels\.txt is not a regular file; give class names, one per line, or"):
        load_dataset("mnist", tmp_path, None)


def test_fashion_mnist_is_known_by_its_labels(digits, tmp_path, monkeypatch):
    images, labels = digits
    write_set(tmp_path, "", images, labels)
    assert load_dataset("mnist", tmp_path, None).class_names == numbers(10)
    monkeypatch.setattr(published.hashlib, "sha256", lambda content: SimpleNamespace(hexdigest=lambda: known))
    known = published.FASHION_MNIST_LABELS
    assert load_dataset("mnist", tmp_path, None).class_names[9] == "Ankle boot"


@pytest.mark.optax_promotes
@pytest.mark.usefixtures("without_report")
def test_names_travel_from_the_data_to_the_answers(digits, tmp_path, command):
    images, labels = digits
    folder, runs = tmp_path / "data", ("--checkpoint-dir", tmp_path)
    folder.mkdir()
    write_set(folder, "emnist-letters-", images.swapaxes(1, 2), labels + 1)
    options = ("--dataset-dir", folder, "--run-name", "run", "--epochs", 9, "--batch-size", 3)
    code, _, err = command("train", *options, *runs)
    assert code == 0, err
    assert "read upright" in err
    assert "warning: no training image has the class K, L, M," in err
    picture = tmp_path / "letter.png"
    Image.fromarray(255 - np.pad(images[0], 20)).resize((272, 272)).save(picture)
    letter = "ABCDEFGHIJ"[labels[0]]
    code, out, err = command("predict", picture, "--run", "run", *runs)
    assert (code, out) == (0, f"{picture}: {letter}\n"), err
    (answer,) = json.loads(command("predict", picture, "--run", "run", *runs, "--json")[1])
    assert (answer["class"], answer["index"]) == (letter, labels[0])
    assert ("digit" in answer, len(answer["probabilities"])) == (False, 26)
    weights = tmp_path / "letters.safetensors"
    assert command("export", "run", "--to", "safetensors", "--output", weights, *runs)[0] == 0
    from cnn_jax.inference.pretrained import read_trained

    assert read_trained(weights).class_names == tuple(EMNIST["letters"])
