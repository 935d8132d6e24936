"""A data set by its name or its folder, from wherever it is."""

from pathlib import Path

import numpy as np

from cnn_jax.data.dataset import Dataset, DatasetSizes
from cnn_jax.data.idx import count_idx_examples, has_idx_name, read_idx_folder, read_idx_sizes
from cnn_jax.data.published import of_idx_folder, upright

MNIST_SIZES = DatasetSizes(60_000, 10_000, (28, 28, 1), 10)


def load_dataset(
    dataset: str,
    dataset_dir: Path | None,
    data_dir: Path | None,
    *,
    resident_bytes: int | None = None,
    prepare: bool = True,
    transposed: bool = False,
) -> Dataset:
    """Load a data set; tfds prepares it first where that has not been done.

    Args:
      dataset: A tfds name, `mnist` for the embedded files; unused when `dataset_dir` is given.
      dataset_dir: A folder of four IDX files, plain, .gz or .xz.
      data_dir: Where tfds keeps its data sets; None for `TFDS_DATA_DIR`, else tfds's default.
      resident_bytes: Training images of tfds or in a plain IDX file stay on the disk where they are more; None loads
        however many they are.
      prepare: Let tfds prepare the set, which writes and may download; else it has been prepared, or is `mnist`.
      transposed: Whether rows and columns of a folder's images are exchanged; those of EMNIST are known to be.

    Raises:
      UsageError: the set is unknown or is not an image classification set.
      InputFileError: a file is missing, damaged, or disagrees with another.
      StorageError: the set could not be prepared or read.
    """
    if dataset_dir is not None:
        train_images, train_labels, test_images, test_labels = read_idx_folder(dataset_dir, resident_bytes)
        published = of_idx_folder(dataset_dir)
        stored = Dataset(
            name=dataset_dir.resolve().name,
            train_images=train_images,
            train_labels=train_labels.astype(np.int32),
            test_images=test_images,
            test_labels=test_labels.astype(np.int32),
            class_names=published.class_names,
        )
        return upright(stored, published._replace(transposed=published.transposed or transposed))
    from cnn_jax.data import tfds  # it takes longer to import than everything else here

    if dataset == "mnist":
        return tfds.load_mnist(data_dir, resident_bytes, prepare=prepare)
    return tfds.load_tfds(dataset, data_dir, resident_bytes, prepare=prepare)


def count_train_examples(
    dataset: str, dataset_dir: Path | None, data_dir: Path | None, *, prepare: bool = False
) -> int | None:
    """Check, without loading anything, that a data set is known, and return the size of its training set.

    Args:
      dataset: A tfds name; unused when `dataset_dir` is given.
      dataset_dir: A folder of four IDX files.
      data_dir: Where tfds keeps its data sets; None for tfds's own choice.
      prepare: Check, too, that a set that is not prepared can be: that there are a place and a network.

    Returns:
      The number of training examples, or None where it is known only after tfds has prepared the set.

    Raises:
      UsageError: there is no such data set or folder, or it is not an image classification set.
      InputFileError: one of the four files is missing or is not an IDX file.
      StorageError: the set cannot be prepared here.
    """
    if dataset_dir is not None:
        return count_idx_examples(dataset_dir)
    if dataset == "mnist":
        return MNIST_SIZES.train_examples
    from cnn_jax.data import tfds

    return tfds.count_tfds_examples(dataset, data_dir, prepare=prepare)


def read_sizes(dataset: str, dataset_dir: Path | None, data_dir: Path | None) -> DatasetSizes:
    """Return a data set's sizes without loading its images; arguments as above.

    Raises:
      UsageError: there is no such data set or folder, it is not an image classification set, or tfds has not yet
        prepared it.
      InputFileError: one of the files is missing or is not an IDX file.
    """
    if dataset_dir is not None:
        return read_idx_sizes(dataset_dir, len(of_idx_folder(dataset_dir).class_names))
    if dataset == "mnist":
        return MNIST_SIZES
    from cnn_jax.data import tfds

    return tfds.read_tfds_sizes(dataset, data_dir)


def is_of_dataset(file: Path) -> bool:
    """Whether a file is there and is one of a folder's four IDX files, or one that tfds has prepared."""
    return file.is_file() and (has_idx_name(file) or (file.parent / "dataset_info.json").is_file())
