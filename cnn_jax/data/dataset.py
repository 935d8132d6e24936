"""Image classification sets as arrays on the host. Nothing here needs JAX."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Integer, UInt8

from cnn_jax.runtime.errors import UsageError

Images = UInt8[np.ndarray, "n h w c"]
Labels = Int32[np.ndarray, " n"]  # in 0..num_classes-1

EXAMPLES_PER_READ = 10_000
PIXEL_MAXIMUM = np.float32(255)


class RecordedImages:
    """Images that stay on the disk and are read when they are asked for.

    Attributes:
      shape: (N, height, width, channels).
      dtype: uint8.
      nbytes: What they would take in memory.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, read: Callable[[Sequence[int]], Images], shape: tuple[int, int, int, int]):
        """Make images of a function that reads those with the given indices, or raises InputFileError."""
        self._read = read
        self.shape = shape
        self.nbytes = math.prod(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | Integer[np.ndarray, " n"]) -> Images:
        """Read the images of a slice, or of an array of indices.

        Raises:
          InputFileError: the files cannot be read.
        """
        return self._read(range(*index.indices(len(self))) if isinstance(index, slice) else index.tolist())


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training set and a test set of images of one size.

    Attributes:
      name: What the user calls it.
      train_images: Those to train on.
      train_labels: Their classes.
      test_images: Those to test on.
      test_labels: Their classes.
      class_names: The name of each class.
      reading: How it was read, in a sentence, where that is not as it is stored.
    """

    name: str
    train_images: Images | RecordedImages
    train_labels: Labels
    test_images: UInt8[np.ndarray, "m h w c"]
    test_labels: Int32[np.ndarray, " m"]
    class_names: tuple[str, ...]
    reading: str = ""

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @functools.cached_property
    def sha256(self) -> str:
        """The fingerprint of all of it, for which recorded images are read once."""
        return fingerprint(self, ("train", "test"))


class DatasetSizes(NamedTuple):
    """What is known of a data set before it is loaded.

    Attributes:
      train_examples: How many images it has to train on.
      test_examples: How many it has to test on.
      image_shape: (height, width, channels).
      num_classes: How many classes there are.
    """

    train_examples: int
    test_examples: int
    image_shape: tuple[int, int, int]
    num_classes: int


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


def hold_out(dataset: Dataset, count: int) -> tuple[Dataset, Images, Labels]:
    """Split the last `count` training examples off, for validation; return the data set without them, and them.

    Raises:
      UsageError: nothing would be left to train on.
    """
    check_sizes(1, count, len(dataset.train_labels))
    kept = len(dataset.train_labels) - count
    train_images = dataset.train_images
    if isinstance(train_images, np.ndarray):
        train_images = train_images[:kept]
    # Recorded images are only ever read at indices below the number of labels.
    training = dataclasses.replace(dataset, train_images=train_images, train_labels=dataset.train_labels[:kept])
    return training, dataset.train_images[kept:], dataset.train_labels[kept:]


def fingerprint(dataset: Dataset, splits: Sequence[str]) -> str:
    """Return the SHA-256, in hexadecimal, of the images and labels of a data set's splits, with their shapes."""
    sha256 = hashlib.sha256()
    for name in (f"{split}_{kind}" for split in splits for kind in ("images", "labels")):
        array = getattr(dataset, name)
        sha256.update(f"{name} {array.dtype} {array.shape}\n".encode())
        for part in contiguous_parts(array):
            sha256.update(part.data)
    return sha256.hexdigest()


def contiguous_parts(array: np.ndarray | RecordedImages) -> Iterator[np.ndarray]:
    """Return an array some rows at a time, in C order, for a hash function."""
    for start in range(0, len(array), EXAMPLES_PER_READ):
        yield np.ascontiguousarray(array[start : start + EXAMPLES_PER_READ])


def scale_pixels(images: UInt8[Any, "*shape"], maximum: Any = PIXEL_MAXIMUM) -> Float32[Any, "*shape"]:
    """Turn stored pixels into what the network computes with: the only place where pixels are scaled.

    Args:
      images: NumPy's or JAX's.
      maximum: The pixel value that becomes 1, float32. 255 gives [0, 1], as in training; 1 leaves the pixels
        unscaled, as the PyTorch tutorial does when it tests.
    """
    return images.astype(np.float32) / maximum
