"""IDX, the file format in which MNIST and its successors are published, plain or compressed."""

import gzip
import hashlib
import lzma
import math
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from cnn_jax.runtime.errors import InputFileError

UNSIGNED_BYTE = 0x08
MAXIMUM_BYTES = 2**32  # of the values; EMNIST, the largest set of the kind, has 0.6 GiB
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def read_idx(path: Path, *, ndim: int, sha256: str | None = None) -> np.ndarray:
    """Read one IDX file of unsigned bytes; a name ending in .gz or .xz is decompressed.

    The format is described on the MNIST page: two zero bytes, the type code, the number of dimensions, each
    dimension as a big-endian uint32, then the values in C order.

    Args:
      path: The file.
      ndim: How many dimensions it must have: 3 for images, 1 for labels.
      sha256: What the SHA-256 of the uncompressed file must be, in hexadecimal, where that is known.

    Returns:
      A read-only array, uint8, of the shape in the file's header.

    Raises:
      InputFileError: the file is missing, truncated, too long, damaged, or not such an IDX file.
    """
    with _open(path) as file:
        try:
            shape, header = _read_header(file, path, ndim=ndim)
            size = math.prod(shape)
            if size > MAXIMUM_BYTES:
                announced = "x".join(map(str, shape))
                raise InputFileError(f"{path} announces {announced} = {size:,} values, more than 4 GiB; fetch it again")
            values = _read_up_to(file, size + 1)
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise InputFileError(f"{path} is damaged ({error}); fetch or copy it again") from error
    if len(values) != size:
        found = "more bytes" if len(values) > size else f"only {len(values):,} bytes"
        announced = "x".join(map(str, shape))
        raise InputFileError(f"{path} announces {announced} = {size:,} values but holds {found}; fetch it again")
    if sha256 is not None and hashlib.sha256(header + values).hexdigest() != sha256:
        raise InputFileError(f"{path} is damaged: its SHA-256 is not {sha256}; reinstall the package")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_up_to(file: IO[bytes], size: int) -> bytes:
    """Read so many bytes, or all where there are fewer: one more than announced shows a file that is too long."""
    # Piece by piece: asked for all at once, Python reserves what a header announces before it looks for it.
    pieces, left = [], size
    while left > 0 and (piece := file.read(min(left, 2**24))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def read_idx_shape(path: Path, *, ndim: int) -> tuple[int, ...]:
    """Return the shape that an IDX file's header announces, without reading its values; raises as `read_idx`."""
    with _open(path) as file:
        try:
            return _read_header(file, path, ndim=ndim)[0]
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise InputFileError(f"{path} is damaged ({error}); fetch or copy it again") from error


def idx_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of an IDX file of unsigned bytes with this shape."""
    return bytes([0, 0, UNSIGNED_BYTE, len(shape)]) + np.array(shape, ">u4").tobytes()


def _open(path: Path) -> IO[bytes]:
    if not path.is_file():
        raise InputFileError(f"{path} is not a file; give an IDX file, plain, .gz or .xz")
    return _OPENERS.get(path.suffix, open)(path, "rb")


def _read_header(file: IO[bytes], path: Path, *, ndim: int) -> tuple[tuple[int, ...], bytes]:
    header = file.read(4 + 4 * ndim)
    if len(header) < 4 + 4 * ndim or header[:2] != b"\0\0":
        raise InputFileError(f"{path} is not an IDX file (plain, .gz or .xz); give one")
    if header[2:4] != bytes([UNSIGNED_BYTE, ndim]):
        kind = {1: "labels", 3: "images"}.get(ndim, "values")
        raise InputFileError(
            f"{path} has magic number {header[2]:#04x} {header[3]:#04x}, but {kind} have "
            f"{UNSIGNED_BYTE:#04x} {ndim:#04x}; give a file of {kind}"
        )
    return tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4)), header
