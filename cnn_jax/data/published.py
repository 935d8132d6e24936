"""What the files of a data set leave unsaid: its classes' names, and how EMNIST stores its images and labels."""

import dataclasses
import hashlib
import re
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnn_jax.data.dataset import Dataset, Images, RecordedImages
from cnn_jax.data.idx import find_idx_files, idx_header, read_idx
from cnn_jax.runtime.errors import InputFileError

_MERGED = string.digits + string.ascii_uppercase + "abdefghnqrt"
# The classes of EMNIST's six splits (Cohen, Afshar, Tapson and van Schaik, "EMNIST: an extension of MNIST to
# handwritten letters", 2017). `bymerge` and `balanced` have one class for both cases of a letter where they look alike.
EMNIST = {
    "byclass": string.digits + string.ascii_uppercase + string.ascii_lowercase,
    "bymerge": _MERGED,
    "balanced": _MERGED,
    "letters": string.ascii_uppercase,
    "digits": string.digits,
    "mnist": string.digits,
}
FASHION_MNIST = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# The SHA-256 of its train-labels-idx1-ubyte, uncompressed.
FASHION_MNIST_LABELS = "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"


class Published(NamedTuple):
    """What is known of a data set beside its arrays.

    Attributes:
      class_names: One for each class.
      first_label: The label of the first class.
      transposed: Whether rows and columns of its images are exchanged.
    """

    class_names: tuple[str, ...]
    first_label: int = 0
    transposed: bool = False


def numbers(count: int) -> tuple[str, ...]:
    """Return the names of classes that have none: their numbers, from 0."""
    return tuple(map(str, range(count)))


def emnist(split: str) -> Published:
    """Return what is known of a split of EMNIST: `letters`, whose labels begin with 1, or another of the six."""
    return Published(tuple(EMNIST[split]), first_label=1 if split == "letters" else 0, transposed=True)


def of_idx_folder(folder: Path) -> Published:
    """Return what is known of a folder of IDX files.

    EMNIST's files are known by their names and Fashion-MNIST's by their content. Names in the folder come first:
    `labels.txt` has one per line, and EMNIST's `mapping.txt` has, in each line, a label and the code of its character.

    Raises:
      UsageError: there is no such folder.
      InputFileError: the labels or a file of names cannot be read, or a label has no name.
    """
    files = [find_idx_files(folder)[split, "labels"] for split in ("train", "test")]
    labels, test_labels = (read_idx(file, ndim=1) for file in files)
    split = re.match(rf"emnist-({'|'.join(EMNIST)})-train-", files[0].name)
    if split is not None:
        known = emnist(split[1])
    elif hashlib.sha256(idx_header(labels.shape) + labels.tobytes()).hexdigest() == FASHION_MNIST_LABELS:
        known = Published(FASHION_MNIST)
    else:
        known = Published(numbers(int(labels.max(initial=0)) + 1))
    lists = sorted(path for path in folder.iterdir() if re.fullmatch(r"(.*-)?mapping\.txt|labels\.txt", path.name))
    if len(lists) > 1:
        raise InputFileError(f"{folder} has both {lists[0].name} and {lists[1].name}; keep one list of class names")
    for file in lists:
        if not file.is_file():  # to open a pipe would wait for ever
            raise InputFileError(f"{file} is not a regular file; give class names, one per line, or remove it")
        known = known._replace(class_names=_read_names(file, known.first_label))
    first, last = known.first_label, known.first_label + len(known.class_names) - 1
    for file, in_file in zip(files, (labels, test_labels), strict=True):
        smallest, largest = int(in_file.min(initial=last)), int(in_file.max(initial=first))
        if smallest < first or largest > last:
            source = lists[0] if lists else f"the name {file.name}" if split else files[0]
            raise InputFileError(
                f"{file} has the labels {smallest} to {largest}, but by {source} they are {first} to {last}; "
                "give files that belong together"
            )
    return known


def upright(dataset: Dataset, published: Published) -> Dataset:
    """Return a data set with its images upright and its labels from 0, and tell in `reading` what was changed."""
    changes = []
    if published.transposed:
        images = [_transposed(images) for images in (dataset.train_images, dataset.test_images)]
        dataset = dataclasses.replace(dataset, train_images=images[0], test_images=images[1])
        changes.append("its images are stored with rows and columns exchanged, and are read upright")
    if first := published.first_label:
        labels = [labels - np.int32(first) for labels in (dataset.train_labels, dataset.test_labels)]
        dataset = dataclasses.replace(dataset, train_labels=labels[0], test_labels=labels[1])
        changes.append(f"its labels are stored as {first} to {dataset.num_classes + first - 1}, and are read from 0")
    return dataclasses.replace(dataset, class_names=published.class_names, reading="; ".join(changes))


def _transposed(images: Images | RecordedImages) -> Images | RecordedImages:
    if isinstance(images, np.ndarray):
        return np.ascontiguousarray(images.swapaxes(1, 2))
    count, height, width, channels = images.shape
    return RecordedImages(lambda indices: images[np.array(indices)].swapaxes(1, 2), (count, width, height, channels))


def _read_names(file: Path, first_label: int) -> tuple[str, ...]:
    """Read the names of classes from `labels.txt` or from a `mapping.txt`; raises as above."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if file.name == "labels.txt":
            names = lines
        else:
            codes = {int(label): int(code) for label, code, *_ in map(str.split, lines)}
            if len(codes) < len(lines):
                raise ValueError("a label stands in it twice")
            labels = range(first_label, first_label + len(codes))
            if missing := [label for label in labels if label not in codes]:
                raise ValueError(f"the label {missing[0]} is missing")
            names = [chr(codes[label]) for label in labels]
        names = [name if name.isprintable() else "" for name in names]
    except (OSError, ValueError, OverflowError) as error:
        raise InputFileError(f"{file} is no list of class names ({error}); correct or remove it") from error
    if not names or "" in names or len(set(names)) < len(names):
        raise InputFileError(f"{file} has no names, one that cannot be shown, or one twice; correct or remove it")
    return tuple(names)
