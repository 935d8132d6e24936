"""IDX, the file format in which MNIST and its successors are published, and a folder of four such files."""

import gzip
import hashlib
import io
import lzma
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cnn_jax.data.dataset import DatasetSizes, Images, RecordedImages
from cnn_jax.runtime.errors import InputFileError, UsageError

UNSIGNED_BYTE = 0x08
MAXIMUM_BYTES = 2**32  # of values that were compressed; EMNIST, the largest set of the kind, has 0.6 GiB
FourArrays = tuple[
    Images | RecordedImages, UInt8[np.ndarray, " n"], UInt8[np.ndarray, "m h w c"], UInt8[np.ndarray, " m"]
]
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def read_idx_folder(folder: Path, resident_bytes: int | None = None) -> FourArrays:
    """Read a folder of four IDX files; return the training images and labels, then the test images and labels.

    The test labels are not above the highest training label.

    Args:
      folder: Where they are.
      resident_bytes: The training images of a plain file stay there where they are more; None reads any number.

    Raises:
      UsageError: there is no such folder.
      InputFileError: a file is missing, there twice, damaged, or disagrees with another.
    """
    files = find_idx_files(folder)
    images = {
        split: _read_images(files[split, "images"], limit)
        for split, limit in (("train", resident_bytes), ("test", None))
    }
    labels = {split: read_idx(files[split, "labels"], ndim=1) for split in images}
    for split in images:
        if len(images[split]) != len(labels[split]):
            raise InputFileError(
                f"{files[split, 'images']} has {len(images[split]):,} images but {files[split, 'labels']} has "
                f"{len(labels[split]):,} labels; give two files that belong together"
            )
    train_size, test_size = images["train"].shape[1:], images["test"].shape[1:]
    if train_size != test_size:
        raise InputFileError(
            f"{folder}: the training images are {train_size}, the test images {test_size}; "
            "give four files of one data set"
        )
    highest, highest_test = labels["train"].max(), labels["test"].max()
    if highest_test > highest:
        raise InputFileError(
            f"{files['test', 'labels']} has the label {highest_test}, but the training labels end at "
            f"{highest}; give four files of one data set"
        )
    assert isinstance(images["test"], np.ndarray)  # however many they are
    return images["train"], labels["train"], images["test"], labels["test"]


def count_idx_examples(folder: Path) -> int:
    """Return the number of training images in a folder of IDX files, from the header alone; raises as above."""
    return _read_images_shape(find_idx_files(folder)["train", "images"])[0]


def read_idx_sizes(folder: Path, num_classes: int) -> DatasetSizes:
    """Return the sizes of a folder's data set, from the images' headers; raises as above."""
    files = find_idx_files(folder)
    train_shape, test_shape = (_read_images_shape(files[split, "images"]) for split in ("train", "test"))
    return DatasetSizes(train_shape[0], test_shape[0], train_shape[1:], num_classes)


def read_idx(path: Path, *, ndim: int, sha256: str | None = None) -> UInt8[np.ndarray, "..."]:
    """Read one IDX file of unsigned bytes; a name ending in .gz or .xz is decompressed.

    The format is described on the MNIST page: two zero bytes, the type code, the number of dimensions, each
    dimension as a big-endian uint32, then the values in C order.

    Args:
      path: The file.
      ndim: How many dimensions it must have: 3 for gray images, 4 for those with channels, 1 for labels.
      sha256: What the SHA-256 of the uncompressed file must be, in hexadecimal, where that is known.

    Returns:
      A read-only array of the shape in the file's header.

    Raises:
      InputFileError: the file is missing, truncated, too long, damaged, or not such an IDX file.
    """
    with _open(path) as file:
        try:
            shape, header = _read_header(file, path, ndim=ndim)
            size = math.prod(shape)
            if size > MAXIMUM_BYTES and path.suffix in _OPENERS:
                announced = "x".join(map(str, shape))
                raise InputFileError(f"{path} announces {announced} = {size:,} values, more than 4 GiB; fetch it again")
            values = _read_up_to(file, size + 1)
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise InputFileError(f"{path} is damaged ({error}); fetch or copy it again") from error
    _require_size(path, shape, len(values))
    if sha256 is not None and hashlib.sha256(header + values).hexdigest() != sha256:
        raise InputFileError(f"{path} is damaged: its SHA-256 is not {sha256}; reinstall the package")
    return np.frombuffer(values, np.uint8).reshape(shape)


def has_idx_name(file: Path) -> bool:
    """Whether a file is called as one of the four files of a folder is."""
    return any(re.fullmatch(name, file.name) for _, _, name in _idx_names())


def idx_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of an IDX file of unsigned bytes with this shape."""
    return bytes([0, 0, UNSIGNED_BYTE, len(shape)]) + np.array(shape, ">u4").tobytes()


def _read_images(path: Path, resident_bytes: int | None) -> Images | RecordedImages:
    """Read a file's images, or leave them in it where it is plain and they are more than may be resident."""
    shape = _read_images_shape(path)
    if path.suffix in _OPENERS or resident_bytes is None or math.prod(shape) <= resident_bytes:
        return read_idx(path, ndim=_dimensions(path)).reshape(shape)
    return _record(path, shape)


def _record(path: Path, shape: tuple[int, int, int, int]) -> RecordedImages:
    """Leave images in their plain file, each to be read by its position; raises as `read_idx`."""
    image_bytes, header_bytes = math.prod(shape[1:]), 4 + 4 * _dimensions(path)
    opened = path.stat()
    _require_size(path, shape, opened.st_size - header_bytes)

    def read(indices: Sequence[int]) -> Images:
        # The file is not mapped: its pages would count as this process's memory, and a file that has become shorter
        # would end it by SIGBUS.
        try:
            with path.open("rb") as file:
                positions = [header_bytes + image_bytes * index for index in indices]
                # A disk that knows all requests answers in a third of the time. macOS has no such call.
                for position in positions if hasattr(os, "posix_fadvise") else ():
                    os.posix_fadvise(file.fileno(), position, image_bytes, os.POSIX_FADV_WILLNEED)
                values = b"".join(os.pread(file.fileno(), image_bytes, position) for position in positions)
                now = os.fstat(file.fileno())
        except OSError as error:
            raise InputFileError(f"{path} cannot be read ({error}); put it back, and run the same command") from error
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (opened.st_size, opened.st_mtime_ns, opened.st_ino):
            raise InputFileError(f"{path} was changed while it was used; put it back, and run the same command")
        return np.frombuffer(values, np.uint8).reshape(len(indices), *shape[1:])

    return RecordedImages(read, shape)


def _read_images_shape(path: Path) -> tuple[int, int, int, int]:
    """Return (N, height, width, channels) by a file's header, without reading its values; raises as `read_idx`."""
    with _open(path) as file:
        try:
            count, height, width, *rest = _read_header(file, path, ndim=_dimensions(path))[0]
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise InputFileError(f"{path} is damaged ({error}); fetch or copy it again") from error
    return count, height, width, rest[0] if rest else 1


def _dimensions(path: Path) -> int:
    """Return how many dimensions a file of images has by its name: 3, or 4 where they have channels."""
    return 4 if re.search(r"images[-.]idx4-ubyte", path.name) else 3


def _require_size(path: Path, shape: tuple[int, ...], found: int) -> None:
    if found != (size := math.prod(shape)):
        holds = "more bytes" if found > size else f"only {found:,} bytes"
        announced = "x".join(map(str, shape))
        raise InputFileError(f"{path} announces {announced} = {size:,} values but holds {holds}; fetch it again")


def find_idx_files(folder: Path) -> dict[tuple[str, str], Path]:
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
        for kind, ndim in (("images", "[34]"), ("labels", "1")):
            yield split, kind, rf"(.*[-_])?{prefix}-{kind}[-.]idx{ndim}-ubyte(\.gz|\.xz)?"


def _open(path: Path) -> io.BufferedIOBase:
    if not path.is_file():
        raise InputFileError(f"{path} is not a file; give an IDX file, plain, .gz or .xz")
    return _OPENERS.get(path.suffix, open)(path, "rb")


def _read_header(file: io.BufferedIOBase, path: Path, *, ndim: int) -> tuple[tuple[int, ...], bytes]:
    header = file.read(4 + 4 * ndim)
    if len(header) < 4 + 4 * ndim or header[:2] != b"\0\0":
        raise InputFileError(f"{path} is not an IDX file (plain, .gz or .xz); give one")
    if header[2:4] != bytes([UNSIGNED_BYTE, ndim]):
        kind = {1: "labels", 3: "images", 4: "images with channels"}[ndim]
        raise InputFileError(
            f"{path} has magic number {header[2]:#04x} {header[3]:#04x}, but {kind} have "
            f"{UNSIGNED_BYTE:#04x} {ndim:#04x}; give a file of {kind}"
        )
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
    if 0 in shape[:1] * (ndim > 1) + shape[3:]:
        raise InputFileError(f"{path} has no images; give a file that has some")
    return shape, header


def _read_up_to(file: io.BufferedIOBase, size: int) -> bytes:
    """Read so many bytes, or all if there are fewer; one more than announced reveals a file that is too long."""
    # Piece by piece: asked for all at once, Python reserves what a header announces before it looks for it.
    pieces, left = [], size
    while left > 0 and (piece := file.read(min(left, 2**24))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
