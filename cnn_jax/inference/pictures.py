"""Read pictures from files as arrays, refuse every bad file with its reason, and draw boxes in a picture."""

import contextlib
import io
import os
import stat
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from cnn_jax.inference.preprocess import SMALLEST_SIDE, WORKING_SIZE, Box
from cnn_jax.runtime.errors import InputFileError
from cnn_jax.runtime.streams import stderr_of_libraries_closed

ORIENTATION = 0x0112  # EXIF's tag; from 5 on, width and height are exchanged
STANDARD_INPUT = "-"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif")
# As Pillow names them; of several pictures in a file, the first is read.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such a file begins
BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8", *TIFF)
BOX_COLOUR = (30, 120, 220)
MAXIMUM_BYTES = 2**26
MAXIMUM_PIXELS = 50_000_000  # as many as the largest phone sensors have


def find_images(path: str) -> list[str]:
    """Return a path, or, of a folder, its images, sorted by name.

    Raises:
      InputFileError: the folder cannot be read, or contains no image file.
    """
    if path == STANDARD_INPUT or not os.path.isdir(path):
        return [path]
    try:
        found = sorted(str(file) for file in Path(path).iterdir() if file.suffix.lower() in ENDINGS)
    except OSError as error:
        raise InputFileError(f"{path} cannot be opened ({error.strerror}); give a picture file") from error
    if not found:
        raise InputFileError(f"{path} is a folder without an image; put pictures there, such as .png or .jpg files")
    return found


class Picture(NamedTuple):
    """A picture, upright and opaque.

    Attributes:
      colours: (H, W, 3), float32, in 0..255, of at most WORKING_SIZE pixels per side.
      size: The width and height that it has in its file, upright.
    """

    colours: np.ndarray
    size: tuple[int, int]


def read_picture(file: str) -> Picture:
    """Read a picture from a file, or from standard input if the file is `-`.

    Raises:
      InputFileError: the file is missing, empty, too large, damaged, not a regular file, or of another format.
    """
    return _decode(file, _read_bytes(file))


def picture_of(pixels: np.ndarray) -> Picture:
    """Return an array, (H, W) or (H, W, 3), uint8, as a picture, made smaller if it is large."""
    height, width = pixels.shape[:2]
    return Picture(_to_colours(Image.fromarray(pixels)), (width, height))


def _read_bytes(file: str) -> bytes:
    if file == STANDARD_INPUT:
        if sys.stdin.isatty():
            raise InputFileError("- is standard input, which is a terminal; send an image there: cat digit.png | ... -")
        content = _read(file, sys.stdin.buffer)
    else:
        try:
            # Not blocking, because opening a FIFO would wait for somebody to write to it.
            descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputFileError(f"{file} cannot be opened ({reason}); give a picture file") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputFileError(f"{file} is not a regular file; give a picture file, or - for standard input")
        with open(descriptor, "rb") as stream:
            content = _read(file, stream)
    if not content:
        raise InputFileError(f"{file} is empty; give a picture file")
    if len(content) > MAXIMUM_BYTES:
        raise InputFileError(f"{file} has more than {MAXIMUM_BYTES >> 20} MiB; give a smaller picture")
    return content


def _read(file: str, stream: BinaryIO) -> bytes:
    try:
        return stream.read(MAXIMUM_BYTES + 1)
    except OSError as error:
        raise InputFileError(f"{file} cannot be read ({error.strerror}); give a picture file") from error


def _decode(file: str, content: bytes) -> Picture:
    try:
        # Pillow warns about large images, odd palettes and senseless EXIF; all of these are refused or repaired here.
        with warnings.catch_warnings(action="ignore"), _quiet_libtiff(content):
            # Pillow checks the checksums of a PNG's pixels only in `verify`.
            _open_image(file, content).verify()
            with _open_image(file, content) as image:
                width, height = image.size
                image.draft(image.mode, (2 * WORKING_SIZE, 2 * WORKING_SIZE))
                image.load()
                on_its_side = image.getexif().get(ORIENTATION, 1) >= 5
                ImageOps.exif_transpose(image, in_place=True)
                return Picture(_to_colours(image), (height, width) if on_its_side else (width, height))
    except InputFileError:
        raise
    except Image.UnidentifiedImageError as error:
        if content.startswith(BEGINNINGS):
            raise InputFileError(f"{file} is damaged (its header cannot be read); save or copy it again") from error
        raise InputFileError(f"{file} is not a picture of a known format; save it as PNG or JPEG") from error
    except Exception as error:  # Pillow raises a dozen types for damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputFileError(f"{file} is damaged ({reason}); save or copy it again") from error


def _quiet_libtiff(content: bytes) -> contextlib.AbstractContextManager[None]:
    """Keep libtiff from telling of each strip of a damaged TIFF."""
    return stderr_of_libraries_closed() if content.startswith(TIFF) else contextlib.nullcontext()


def _open_image(file: str, content: bytes) -> Image.Image:
    """Read an image's header, and refuse images that are too large to decode, or too small."""
    formats = FORMATS
    if content.startswith(b"%PDF"):
        raise InputFileError(f"{file} is a PDF; save its page as a PNG or JPEG picture")
    if content[4:8] == b"ftyp":  # HEIC, as phones write it
        try:
            import pillow_heif
        except ImportError as error:
            raise InputFileError(
                f"{file} may be HEIC, which needs pip install 'cnn-jax[heic]'; or save it as JPEG"
            ) from error
        pillow_heif.register_heif_opener()
        formats = ("HEIF",)
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
    except Image.DecompressionBombError:
        image = None
    if image is None or image.width * image.height > MAXIMUM_PIXELS:
        raise InputFileError(f"{file} has more than {MAXIMUM_PIXELS:,} pixels; give a smaller picture")
    if min(image.size) < SMALLEST_SIDE * max(1, max(image.size) / WORKING_SIZE):
        raise InputFileError(
            f"{file} is {image.width}x{image.height} pixels, too small or too narrow; give a picture of a whole digit"
        )
    return image


def _to_colours(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits of grey
        grey = np.asarray(image, np.float32) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    with_alpha = image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info
    image = image.convert("RGBA" if with_alpha else "RGB")
    image.thumbnail((WORKING_SIZE, WORKING_SIZE), Image.Resampling.BOX)
    colours = np.asarray(image, np.float32)
    return _composite(colours) if with_alpha else colours


def _composite(colours: np.ndarray) -> np.ndarray:
    """Lay an image with transparency on paper: (H, W, 4) -> (H, W, 3)."""
    colours, alpha = colours[..., :3], colours[..., 3:] / 255
    visible = colours[alpha[..., 0] > 0.5]
    if len(visible) == 0:
        return np.zeros_like(colours)
    if len(visible) > alpha.size / 2:
        paper = np.median(visible, axis=0)  # most of the picture is visible: paper with a digit on it
    else:
        paper = np.float32(255 if visible.mean() < 127.5 else 0)  # only the digit is visible
    return colours * alpha + paper * (1 - alpha)


def draw_boxes(picture: Picture, labelled: Sequence[tuple[Box, str]]) -> bytes:
    """Return the picture, of at most WORKING_SIZE pixels per side, with boxes and a text above each, as a PNG file."""
    image = Image.fromarray(picture.colours.round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for (left, top, right, bottom), text in labelled:
        draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=BOX_COLOUR)
        draw.text((left, top - 3), text, fill=BOX_COLOUR, anchor="lb", font_size=14)
    return encode_png(np.asarray(image))


def encode_png(pixels: np.ndarray) -> bytes:
    """Return a picture, (H, W) or (H, W, 3), uint8, as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
