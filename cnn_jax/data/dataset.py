"""Image classification sets, from tfds or from IDX files, as arrays on the host. Nothing here needs JAX."""

import contextlib
import dataclasses
import hashlib
import io
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnn_jax.data.idx import idx_header, read_idx, read_idx_shape
from cnn_jax.runtime.errors import InputFileError, StorageError, UsageError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

MNIST_TRAIN_EXAMPLES = 60_000
RECORDS_A_READ = 10_000
PIXEL_MAXIMUM = np.float32(255)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training set and a test set of images of one size.

    Attributes:
      name: What the user calls it.
      train_images: (N, height, width, channels), uint8; `RecordedImages` where they are read as they are needed.
      train_labels: (N,), int32, in 0..num_classes-1.
      test_images: (M, height, width, channels), uint8.
      test_labels: (M,), int32, in 0..num_classes-1.
      num_classes: How many classes there are.
    """

    name: str
    train_images: "np.ndarray | RecordedImages"
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int


def scale_pixels(images, maximum=PIXEL_MAXIMUM):
    """Turn stored pixels into what the network computes with: the only place where pixels are scaled.

    Args:
      images: Of any shape, uint8 in 0..255; NumPy's or JAX's.
      maximum: The pixel value that becomes 1, float32. 255 gives [0, 1], as in training; 1 leaves the pixels
        unscaled, as the PyTorch tutorial does when it tests.

    Returns:
      The same shape, float32.
    """
    return images.astype(np.float32) / maximum


def fingerprint(dataset: Dataset) -> str:
    """Return the SHA-256, in hexadecimal, of a data set's images and labels with their shapes."""
    sha256 = hashlib.sha256()
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        array = getattr(dataset, name)
        sha256.update(f"{name} {array.dtype} {array.shape}\n".encode())
        _hash_rows(sha256, array)
    return sha256.hexdigest()


def _hash_rows(sha256, array):
    for start in range(0, len(array), RECORDS_A_READ):
        sha256.update(np.ascontiguousarray(array[start : start + RECORDS_A_READ]))


def hold_out(dataset: Dataset, count: int) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """Split the last training examples off, for validation.

    Returns:
      The data set without them, their images, (count, height, width, channels) uint8, and labels, (count,) int32.

    Raises:
      UsageError: nothing would be left to train on.
    """
    kept = len(dataset.train_labels) - count
    if kept < 1:
        raise UsageError(f"--validation {count}: it must be less than {count + kept}, the size of the training set")
    images, labels = dataset.train_images[kept:], dataset.train_labels[kept:]
    train_images = dataset.train_images
    if isinstance(train_images, np.ndarray):
        train_images = train_images[:kept]
    # Recorded images are only ever read at indices below the number of labels.
    return (
        dataclasses.replace(dataset, train_images=train_images, train_labels=dataset.train_labels[:kept]),
        images,
        labels,
    )


def count_train_examples(dataset: str, dataset_dir: Path | None, data_dir: Path | None) -> int | None:
    """Check, without loading anything, that a data set is known, and return the size of its training set.

    Args:
      dataset: A tfds name; unused when `dataset_dir` is given.
      dataset_dir: A folder of four IDX files.
      data_dir: Where tfds keeps its data sets; None for tfds's own choice.

    Returns:
      The number of training examples, or None where it is known only after tfds has prepared the set.

    Raises:
      UsageError: there is no such data set or folder, or it is not an image classification set.
      InputFileError: one of the four files is missing or is not an IDX file.
    """
    if dataset_dir is not None:
        return read_idx_shape(_find_idx_files(dataset_dir)["train", "images"], ndim=3)[0]
    if dataset == "mnist":
        return MNIST_TRAIN_EXAMPLES
    builder = _tfds_builder(dataset, data_dir)
    return builder.info.splits["train"].num_examples if "train" in builder.info.splits else None


def check_sizes(batch_size: int, validation: int | None, train_examples: int) -> None:
    """Refuse a batch, or a validation set, larger than the training set.

    Raises:
      UsageError: not one batch could be made of the images that are not held out.
    """
    if validation is not None and validation >= train_examples:
        raise UsageError(f"--validation {validation}: it must be less than {train_examples}, all training images")
    trained_on = train_examples - (validation or 0)
    if batch_size > trained_on:
        raise UsageError(f"--batch-size {batch_size}: it must be at most {trained_on}, the size of the training set")


def load_dataset(
    dataset: str, dataset_dir: Path | None, data_dir: Path | None, *, resident_bytes: int | None = None
) -> Dataset:
    """Load a data set into memory; tfds prepares it first where that has not been done.

    Args:
      dataset: A tfds name, `mnist` for the embedded files; unused when `dataset_dir` is given.
      dataset_dir: A folder of four IDX files, plain, .gz or .xz.
      data_dir: Where tfds keeps its data sets; None for `TFDS_DATA_DIR`, else tfds's default.
      resident_bytes: tfds's training images stay on the disk where they are more; None loads however many they are.

    Raises:
      UsageError: the set is unknown or is not an image classification set.
      InputFileError: a file is missing, damaged, or disagrees with another.
      StorageError: the set could not be prepared or read.
    """
    if dataset_dir is not None:
        return _load_idx_folder(dataset_dir)
    if dataset == "mnist":
        return _load_mnist(data_dir, resident_bytes)
    builder = _tfds_builder(dataset, data_dir)
    _prepare(builder, dataset)
    return _load_tfds(builder, dataset, resident_bytes)


def _load_mnist(data_dir: Path | None, resident_bytes: int | None) -> Dataset:
    from cnn_jax.data.mnist.builder import SHA256, EmbeddedMnist

    try:
        with _reading_tfds("mnist", data_dir):
            builder = EmbeddedMnist(data_dir=data_dir, file_format="array_record")
    except OSError as error:
        raise _cannot_prepare("mnist", data_dir, error) from error
    _prepare(builder, "mnist")
    try:
        dataset = _load_tfds(builder, "mnist", resident_bytes)
    except UsageError as error:  # this set is never one that cannot be used
        raise _damaged(builder.data_dir, str(error)) from error
    # The published files can be rebuilt from what was read, so damage to the prepared ones cannot pass.
    for name, array in {
        "train-images-idx3-ubyte": dataset.train_images,
        "train-labels-idx1-ubyte": dataset.train_labels.astype(np.uint8),
        "t10k-images-idx3-ubyte": dataset.test_images,
        "t10k-labels-idx1-ubyte": dataset.test_labels.astype(np.uint8),
    }.items():
        digest = hashlib.sha256(idx_header(array.shape[:3]))
        _hash_rows(digest, array)
        if digest.hexdigest() != SHA256[name]:
            raise _damaged(builder.data_dir, f"{name} does not have its published SHA-256")
    return dataset


def _tfds_builder(name: str, data_dir: Path | None) -> "tfds.core.DatasetBuilder":
    """Find a tfds set: one that is prepared on this machine, or one that tfds has the code for."""
    # tfds reads lists of community sets with TensorFlow when it meets a name with a colon before its slash;
    # everything else it finds on the disk or in its own code.
    if not re.fullmatch(r"[A-Za-z]\w*(/[\w.+-]+)?(:[\d.*]+)?", name):
        raise UsageError(f"--dataset {name}: this is not a tfds name; {_KNOWN_SETS}")
    import tensorflow_datasets as tfds

    try:
        with _reading_tfds(name, data_dir):
            builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        raise UsageError(f"--dataset {name}: tfds does not know it; {_KNOWN_SETS}") from error
    _image_and_label_keys(builder, name)
    return builder


_KNOWN_SETS = "mnist needs no network, tensorflow.org/datasets lists the others, --dataset-dir takes IDX files"


def _image_and_label_keys(builder: "tfds.core.DatasetBuilder", name: str) -> tuple[str, str]:
    """Return the names of the image and the label, for images of one size and one class label each."""
    import tensorflow_datasets as tfds

    features, keys = builder.info.features, builder.info.supervised_keys
    if keys and len(keys) == 2 and set(keys) <= set(features):
        image, label = (features[key] for key in keys)
        is_image = isinstance(image, tfds.features.Image | tfds.features.Tensor) and len(image.shape) == 3
        if is_image and isinstance(label, tfds.features.ClassLabel):
            if None not in image.shape and image.np_dtype == np.uint8:
                return keys
            size = "x".join(str(length or "?") for length in image.shape)
            raise UsageError(f"--dataset {name}: its images are {size} of {image.np_dtype}; {_NEEDED}")
    raise UsageError(f"--dataset {name}: this is not an image classification set; {_NEEDED}")


_NEEDED = "choose a set of uint8 images of one size with one class label each"


def _prepare(builder: "tfds.core.DatasetBuilder", name: str) -> None:
    """Let tfds write the set, unless it has been written; tfds does so beside it and then renames."""
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(try_download_gcs=False)
    tfds.disable_progress_bar()
    try:
        with _quiet_tfds():
            if builder.is_prepared():
                return
            builder.download_and_prepare(download_config=config, file_format="array_record")
    except InputFileError:
        raise
    except Exception as error:  # tfds lets through whatever its builders, the network and the disk raise
        # Of two processes that prepare at once, the second finds its place taken when it renames.
        if not builder.is_prepared():
            raise _cannot_prepare(name, builder.data_dir, error) from error


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keep tfds from reporting to stdout, which belongs to the results, and from warning of sets not yet prepared."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _reading_tfds(name: str, data_dir: Path | None) -> Iterator[None]:
    """Say which set is damaged where tfds cannot read how it was prepared."""
    from google.protobuf.json_format import ParseError

    try:
        with _quiet_tfds():
            yield
    except (ParseError, UnicodeDecodeError) as error:
        folder = "embedded_mnist" if name == "mnist" else name
        raise _damaged(f"{_place(data_dir)}/{folder}", str(error)) from error


def _load_tfds(builder: "tfds.core.DatasetBuilder", name: str, resident_bytes: int | None) -> Dataset:
    splits = builder.info.splits
    test_split = next((split for split in ("test", "validation") if split in splits), None)
    if not splits:
        raise _damaged(builder.data_dir, "it has no dataset_info.json")
    if "train" not in splits or test_split is None:
        raise UsageError(f"--dataset {name}: it has the splits {', '.join(splits)}, but train and test are needed")
    image_key, label_key = _image_and_label_keys(builder, name)
    try:
        train_images, train_labels = _open_split(builder, "train", image_key, label_key, resident_bytes)
        test_images, test_labels = _open_split(builder, test_split, image_key, label_key, None)
    except NotImplementedError as error:
        raise UsageError(
            f"--dataset {name}: it is prepared in {builder.data_dir} in a format that only TensorFlow reads; "
            "prepare it with file_format='array_record', or give another --data-dir"
        ) from error
    except InputFileError:
        raise
    except Exception as error:  # opening it raises whatever it stumbles on
        raise _damaged(builder.data_dir, str(error)) from error
    num_classes = builder.info.features[label_key].num_classes
    dataset = Dataset(name, train_images, train_labels, test_images, test_labels, num_classes)
    for labels in (train_labels, test_labels):
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UsageError(f"--dataset {name}: it has labels outside 0..{num_classes - 1}; choose a labelled set")
    return dataset


class RecordedImages:
    """The images of a prepared tfds split, read from the disk when they are asked for.

    Attributes:
      shape: (N, height, width, channels).
      dtype: uint8.
      nbytes: What they would take in memory.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, source: Sequence, image_feature: "tfds.features.Tensor", image_key: str, place: object):
        self._source = source
        self._feature = image_feature
        self._key = image_key
        self._place = place
        self.shape = (len(source), *image_feature.shape)
        self.nbytes = math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, wanted: slice | np.ndarray) -> np.ndarray:
        """Return images by a slice or by an array of indices, (n, height, width, channels).

        Raises:
          InputFileError: the prepared files cannot be read.
        """
        indices = range(*wanted.indices(len(self))) if isinstance(wanted, slice) else wanted.tolist()
        return self.read(indices)[0]

    def read(self, indices: Sequence[int], label_key: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return images, and their labels, (n,) int32, where they have a key."""
        from tensorflow_datasets.proto import tf_example_pb2

        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        try:
            # tfds's general deserialiser takes 2.3 s for MNIST's 70,000 examples; reading the two features that are
            # needed straight from each record takes 1.0 s.
            records = self._source.__getitems__(indices)
            for place, record in enumerate(records):
                example = tf_example_pb2.Example.FromString(record).features.feature
                images[place] = _decode_image(example[self._key], self._feature)
                if label_key is not None:
                    labels[place] = example[label_key].int64_list.value[0]
        except Exception as error:  # the reader raises whatever it stumbles on
            raise _damaged(self._place, str(error)) from error
        return images, labels


def _open_split(
    builder: "tfds.core.DatasetBuilder", split: str, image_key: str, label_key: str, resident_bytes: int | None
) -> tuple[np.ndarray | RecordedImages, np.ndarray]:
    """Read a split's labels, and its images too where they are not more than may be resident."""
    import tensorflow_datasets as tfds

    source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    recorded = RecordedImages(source, builder.info.features[image_key], image_key, builder.data_dir)
    resident = resident_bytes is None or recorded.nbytes <= resident_bytes
    images = np.empty(recorded.shape, np.uint8) if resident else recorded
    labels = np.empty(len(recorded), np.int32)
    for start in range(0, len(recorded), RECORDS_A_READ):
        part = slice(start, min(start + RECORDS_A_READ, len(recorded)))
        read, labels[part] = recorded.read(range(part.start, part.stop), label_key)
        if resident:
            images[part] = read
    return images, labels


def _decode_image(stored, image_feature: "tfds.features.Tensor") -> np.ndarray:
    if stored.bytes_list.value:
        return image_feature.decode_example_np(stored.bytes_list.value[0])
    return np.array(stored.int64_list.value, np.uint8).reshape(image_feature.shape)


def _cannot_prepare(name: str, data_dir: object, error: Exception) -> StorageError:
    if isinstance(error, ModuleNotFoundError):
        remedy = f"it needs {error.name} for that: prepare it where that is installed, in the format array_record"
    elif isinstance(error, OSError) and error.errno is not None:
        remedy = "give --data-dir a folder that can be written"
    else:
        remedy = "prepare it where there is a network, or give --dataset-dir a folder of IDX files"
    return StorageError(f"tfds cannot prepare {name} in {_place(data_dir)} ({type(error).__name__}: {error}); {remedy}")


def _place(data_dir: object) -> object:
    return data_dir or os.environ.get("TFDS_DATA_DIR") or "tfds's default place"


def _damaged(place: object, reason: str) -> InputFileError:
    return InputFileError(
        f"the prepared data set in {place} is damaged ({reason}); "
        "move that folder away and run the same command again to prepare it anew"
    )


def _load_idx_folder(folder: Path) -> Dataset:
    files = _find_idx_files(folder)
    arrays = {
        split: (read_idx(files[split, "images"], ndim=3), read_idx(files[split, "labels"], ndim=1))
        for split in ("train", "test")
    }
    for split, (images, labels) in arrays.items():
        if len(images) != len(labels) or len(images) == 0:
            raise InputFileError(
                f"{files[split, 'images']} has {len(images):,} images but {files[split, 'labels']} has "
                f"{len(labels):,} labels; give two files that belong together"
            )
    (train_images, train_labels), (test_images, test_labels) = arrays["train"], arrays["test"]
    if train_images.shape[1:] != test_images.shape[1:]:
        raise InputFileError(
            f"{folder}: the training images are {train_images.shape[1:]}, the test images {test_images.shape[1:]}; "
            "give four files of one data set"
        )
    num_classes = int(train_labels.max()) + 1
    if int(test_labels.max()) >= num_classes:
        raise InputFileError(
            f"{files['test', 'labels']} has the label {test_labels.max()}, but the training labels end at "
            f"{num_classes - 1}; give four files of one data set"
        )
    return Dataset(
        name=folder.resolve().name,
        train_images=train_images[..., np.newaxis],
        train_labels=train_labels.astype(np.int32),
        test_images=test_images[..., np.newaxis],
        test_labels=test_labels.astype(np.int32),
        num_classes=num_classes,
    )


def _find_idx_files(folder: Path) -> dict[tuple[str, str], Path]:
    """Find the four files by their published names, such as t10k-labels-idx1-ubyte.gz or emnist-...-test-images-..."""
    if not folder.is_dir():
        raise UsageError(f"--dataset-dir {folder}: there is no such folder")
    found = {}
    for split, kind, name in _idx_names():
        matches = sorted(path for path in folder.iterdir() if re.fullmatch(name, path.name))
        if not matches:
            wanted = f"{'train' if split == 'train' else 't10k'}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
            raise InputFileError(f"{folder} has no {wanted} (plain, .gz or .xz); put the four IDX files there")
        if len(matches) > 1:
            raise InputFileError(
                f"{folder} has both {matches[0].name} and {matches[1].name}; keep one data set's four files in a folder"
            )
        found[split, kind] = matches[0]
    return found


def _idx_names() -> Iterator[tuple[str, str, str]]:
    for split, prefix in (("train", "train"), ("test", "(t10k|test)")):
        for kind, ndim in (("images", 3), ("labels", 1)):
            yield split, kind, rf"(.*[-_])?{prefix}-{kind}[-.]idx{ndim}-ubyte(\.gz|\.xz)?"
