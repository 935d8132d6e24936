"""A tfds set as arrays; no other file knows tfds, but for MNIST's builder."""

import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import re
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from tensorflow_datasets.proto import tf_example_pb2

from cnn_jax.data.dataset import (
    EXAMPLES_PER_READ,
    Dataset,
    DatasetSizes,
    Images,
    Labels,
    RecordedImages,
    contiguous_parts,
)
from cnn_jax.data.idx import idx_header
from cnn_jax.data.mnist.builder import SHA256, EmbeddedMnist, read_embedded
from cnn_jax.data.published import Published, emnist, numbers, upright
from cnn_jax.runtime.errors import InputFileError, StorageError, UsageError, lacks_memory

_PROTO: Any = tf_example_pb2  # protobuf makes its classes when it is imported, unseen by a type checker
_KNOWN_SETS = "mnist needs no network, tensorflow.org/datasets lists the others, --dataset-dir takes IDX files"
NETWORK_SECONDS = 3  # a server that has not answered by then is taken for one that cannot be reached
_NEEDED = "choose a set of uint8 images of one size with one class label each"

# tfds would look for a set's sizes in a bucket, which it has switched off, and leave an empty temporary folder behind.
tfds.core.DatasetInfo.initialize_from_bucket = lambda self: None


def load_tfds(name: str, data_dir: Path | None, resident_bytes: int | None, *, prepare: bool) -> Dataset:
    """Load a tfds set, which is prepared first where that has not been done; arguments and errors of `load_dataset`."""
    builder = _find_builder(name, data_dir)
    if prepare:
        _prepare(builder, name)
    return _load(builder, name, resident_bytes)


def load_mnist(data_dir: Path | None, resident_bytes: int | None, *, prepare: bool) -> Dataset:
    """Load MNIST, prepared from the embedded files, as `load_tfds` loads others, and check its published SHA-256.

    Where it is not to be prepared, or there is no place for it, the embedded files are read.
    """
    if not prepare or not _has_a_place(data_dir):
        return read_embedded()
    try:
        with _reading_tfds("mnist", data_dir):
            builder = EmbeddedMnist(data_dir=data_dir, file_format="array_record")
    except OSError as error:
        raise _cannot_prepare("mnist", data_dir, error) from error
    _prepare(builder, "mnist")
    try:
        dataset = _load(builder, "mnist", resident_bytes)
    except UsageError as error:  # this set is never one that cannot be used
        raise _damaged(builder.data_dir, str(error)) from error
    # The published files can be rebuilt from what was read, so damage to the prepared ones cannot pass.
    for name, array in {
        "train-images-idx3-ubyte": dataset.train_images,
        "train-labels-idx1-ubyte": dataset.train_labels.astype(np.uint8),
        "t10k-images-idx3-ubyte": dataset.test_images,
        "t10k-labels-idx1-ubyte": dataset.test_labels.astype(np.uint8),
    }.items():
        sha256 = hashlib.sha256(idx_header(array.shape[:3]))
        for part in contiguous_parts(array):
            sha256.update(part.data)
        if sha256.hexdigest() != SHA256[name]:
            raise _damaged(builder.data_dir, f"{name} does not have its published SHA-256")
    return dataset


def count_tfds_examples(name: str, data_dir: Path | None, *, prepare: bool) -> int | None:
    """Return the size of a tfds set's training set, None where it is not yet known.

    Raises:
      UsageError: tfds does not know the set, or it is not an image classification set.
      StorageError: it is to be prepared, and there is no place or no network for that.
    """
    builder = _find_builder(name, data_dir)
    splits = builder.info.splits
    if "train" in splits:
        return splits["train"].num_examples
    if prepare:
        _require_place_and_network(builder, name)
    return None


def read_tfds_sizes(name: str, data_dir: Path | None) -> DatasetSizes:
    """Return the sizes of a tfds set that is prepared, from what tfds has written about it.

    Raises:
      UsageError: tfds does not know the set, it is not an image classification set, or it is not prepared.
    """
    builder = _find_builder(name, data_dir)
    splits, features = builder.info.splits, _find_features(builder, name)
    if "train" not in splits:
        raise UsageError(f"--dataset {name}: it is not prepared here, so its sizes are not known; train with it first")
    test_examples = splits[_test_split(splits, name)].num_examples
    return DatasetSizes(
        splits["train"].num_examples,
        test_examples,
        tuple(features.image.shape),
        len(_published(builder, features.label).class_names),
    )


def _test_split(splits: Any, name: str) -> str:
    """Return the split to test on.

    Raises:
      UsageError: it or the one to train on is missing.
    """
    test_split = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test_split is None:
        raise UsageError(f"--dataset {name}: it has the splits {', '.join(splits)}, but train and test are needed")
    return test_split


def _find_builder(name: str, data_dir: Path | None) -> tfds.core.DatasetBuilder:
    """Find a tfds set: one that is prepared on this machine, or one that tfds has the code for."""
    # tfds reads lists of community sets with TensorFlow when it meets a name with a colon before its slash;
    # everything else it finds on the disk or in its own code.
    if name.lower() == "mnist":
        raise UsageError(f"--dataset {name}: perhaps you meant mnist; {_KNOWN_SETS}")
    if not re.fullmatch(r"[A-Za-z]\w*(/[\w.+-]+)?(:[\d.*]+)?", name):
        raise UsageError(f"--dataset {name}: this is not a tfds name; {_KNOWN_SETS}")
    try:
        with _reading_tfds(name, data_dir):
            builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        raise UsageError(f"--dataset {name}: tfds does not know it; {_KNOWN_SETS}") from error
    with _quiet_tfds():
        _find_features(builder, name)
    return builder


class _Features(NamedTuple):
    """The image and the label of a set; tfds's own annotations of features do not tell what they can do."""

    image_key: str
    label_key: str
    image: Any
    label: Any


def _find_features(builder: tfds.core.DatasetBuilder, name: str) -> _Features:
    """Find the image and the label of a set that has images of one size and one class label each."""
    features: Any = builder.info.features
    keys: Any = builder.info.supervised_keys
    if keys and len(keys) == 2 and all(isinstance(key, str) and key in features for key in keys):
        image, label = (features[key] for key in keys)
        if isinstance(image, tfds.features.Image | tfds.features.Tensor) and isinstance(
            label, tfds.features.ClassLabel
        ):
            shape: Any = image.shape
            if len(shape) == 3:
                if None not in shape and image.np_dtype == np.uint8:
                    return _Features(keys[0], keys[1], image, label)
                size = "x".join(str(length or "?") for length in shape)
                raise UsageError(f"--dataset {name}: its images are {size} of {image.np_dtype}; {_NEEDED}")
    raise UsageError(f"--dataset {name}: this is not an image classification set; {_NEEDED}")


def _prepare(builder: tfds.core.DatasetBuilder, name: str) -> None:
    """Let tfds write the set, unless it has been written; tfds does so beside it and then renames."""
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    tfds.disable_progress_bar()
    with _quiet_tfds():
        try:
            if builder.is_prepared():
                return
            _require_place_and_network(builder, name)
            builder.download_and_prepare(download_config=config, file_format="array_record")
        except (InputFileError, StorageError):
            raise
        except Exception as error:  # tfds lets through whatever its builders, the network and the disk raise
            # Of two processes that prepare at once, the second finds the folder there when it renames its own.
            if lacks_memory(error):
                raise
            if not builder.is_prepared():
                raise _cannot_prepare(name, builder.data_dir, error) from error


def _has_a_place(data_dir: Path | None) -> bool:
    """Whether there is a folder for tfds's data sets: its default one needs a home, which a container may lack."""
    return data_dir is not None or "TFDS_DATA_DIR" in os.environ or os.path.expanduser("~") != "~"


def _require_place_and_network(builder: tfds.core.DatasetBuilder, name: str) -> None:
    """Raise at once what preparing a set would fail with much later: without a network, tfds tries for minutes."""
    if str(builder.data_dir).startswith("~"):
        no_home = FileNotFoundError(errno.ENOENT, "there is no home folder")
        raise _cannot_prepare(name, builder.data_dir, no_home)
    url = next((url for url in builder.url_infos or () if url.startswith("http")), None)
    if url is not None and (failure := _ask(url)) is not None:
        no_network = ConnectionError(f"{urllib.parse.urlsplit(url).hostname} cannot be reached: {failure}")
        raise _cannot_prepare(name, builder.data_dir, no_network)


@functools.cache
def _ask(url: str) -> object:
    """Return why a server does not answer, or None where it does; each is asked once."""
    failures: list[object] = [f"no answer in {NETWORK_SECONDS} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=NETWORK_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer
        except OSError as error:
            reason = getattr(error, "reason", error)
            if not isinstance(reason, ssl.SSLError):  # an answer, too, and tfds may know other certificates
                failures[0] = reason
                return
        failures.clear()

    # In a thread, because no timeout ends the search for a name's address.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(NETWORK_SECONDS)
    return failures[0] if failures else None


def _load(builder: tfds.core.DatasetBuilder, name: str, resident_bytes: int | None) -> Dataset:
    splits = builder.info.splits
    if not splits:
        raise _damaged(builder.data_dir, "it has no dataset_info.json")
    test_split = _test_split(splits, name)
    features = _find_features(builder, name)
    try:
        train_images, train_labels = _load_split(builder, "train", features, resident_bytes)
        test_images, test_labels = _load_split(builder, test_split, features, None)
    except NotImplementedError as error:
        raise UsageError(
            f"--dataset {name}: it is prepared in {builder.data_dir} in a format that only TensorFlow reads; "
            "prepare it with file_format='array_record', or give another --data-dir"
        ) from error
    except InputFileError:
        raise
    except Exception as error:  # opening it raises whatever it stumbles on
        if lacks_memory(error):
            raise
        raise _damaged(builder.data_dir, str(error)) from error
    assert isinstance(test_images, np.ndarray)  # however many they are
    published = _published(builder, features.label)
    last = published.first_label + len(published.class_names) - 1
    for labels in (train_labels, test_labels):
        if labels.min() < published.first_label or labels.max() > last:
            raise UsageError(
                f"--dataset {name}: it has labels outside {published.first_label}..{last}; choose a labelled set"
            )
    dataset = Dataset(name, train_images, train_labels, test_images, test_labels, published.class_names)
    return upright(dataset, published)


def _published(builder: tfds.core.DatasetBuilder, label: Any) -> Published:
    """Return what is known of a set: tfds's names of its classes, and that EMNIST is stored transposed."""
    if builder.name == "emnist":  # however the user has written it
        assert builder.builder_config is not None, "tfds's emnist is its six splits"
        return emnist(builder.builder_config.name)
    return Published(tuple(label.names or numbers(label.num_classes)))


def _load_split(
    builder: tfds.core.DatasetBuilder, split: str, features: _Features, resident_bytes: int | None
) -> tuple[Images | RecordedImages, Labels]:
    """Read a split's labels, and its images too where they are not more than may be resident."""
    as_data_source: Any = builder.as_data_source  # wrapped, and so annotated, as if it took no split
    source = as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    read = functools.partial(_read_examples, source, features, builder.data_dir)
    recorded = RecordedImages(lambda indices: read(indices)[0], (len(source), *features.image.shape))
    resident = resident_bytes is None or recorded.nbytes <= resident_bytes
    images = np.empty(recorded.shape if resident else 0, np.uint8)
    labels = np.empty(len(recorded), np.int32)
    for start in range(0, len(recorded), EXAMPLES_PER_READ):
        part = slice(start, min(start + EXAMPLES_PER_READ, len(recorded)))
        part_images, labels[part] = read(range(part.start, part.stop))
        if resident:
            images[part] = part_images
    return images if resident else recorded, labels


def _read_examples(
    source: Any, features: _Features, folder: os.PathLike[str] | str, indices: Sequence[int]
) -> tuple[Images, Labels]:
    image_key, label_key, image, _ = features
    images = np.empty((len(indices), *image.shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    try:
        # tfds's general deserialiser takes 2.3 s for MNIST's 70,000 examples; reading the two features that are
        # needed straight from each record takes 1.0 s.
        for i, record in enumerate(source.__getitems__(indices)):
            example = _PROTO.Example.FromString(record).features.feature
            encoded = example[image_key].bytes_list.value
            if encoded:
                images[i] = image.decode_example_np(encoded[0])
            else:
                images[i] = np.array(example[image_key].int64_list.value, np.uint8).reshape(image.shape)
            labels[i] = example[label_key].int64_list.value[0]
    except Exception as error:  # the reader raises whatever it stumbles on
        if lacks_memory(error):
            raise
        raise _damaged(folder, str(error)) from error
    return images, labels


@contextlib.contextmanager
def _reading_tfds(name: str, data_dir: Path | None) -> Generator[None]:
    """Say which set is damaged where tfds cannot read how it was prepared."""
    try:
        with _quiet_tfds():
            yield
    except ImportError as error:
        place = _folder_of(data_dir)
        if "://" not in place:
            raise
        raise UsageError(f"TFDS_DATA_DIR {place}: it must be a folder of this machine ({error})") from error
    except (ParseError, UnicodeDecodeError) as error:
        folder = "embedded_mnist" if name == "mnist" else name
        raise _damaged(f"{_folder_of(data_dir)}/{folder}", str(error)) from error


@contextlib.contextmanager
def _quiet_tfds() -> Generator[None]:
    """Keep tfds from reporting to stdout, which belongs to the results, and from warning of sets not yet prepared."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _cannot_prepare(name: str, data_dir: os.PathLike[str] | str | None, error: Exception) -> StorageError:
    if isinstance(error, ModuleNotFoundError):
        remedy = f"it needs {error.name} for that: prepare it where that is installed, in the format array_record"
    elif name == "mnist" or (isinstance(error, OSError) and error.errno is not None):
        remedy = "give --data-dir a folder that can be written"
    else:
        remedy = "prepare it where there is a network, or give --dataset-dir a folder of IDX files"
    return StorageError(
        f"tfds cannot prepare {name} in {_folder_of(data_dir)} ({type(error).__name__}: {error}); {remedy}"
    )


def _damaged(folder: os.PathLike[str] | str, reason: str) -> InputFileError:
    return InputFileError(
        f"the prepared data set in {folder} is damaged ({reason}); "
        "move that folder away and run the same command again to prepare it anew"
    )


def _folder_of(data_dir: os.PathLike[str] | str | None) -> str:
    return str(data_dir or os.environ.get("TFDS_DATA_DIR") or "tfds's default place")
