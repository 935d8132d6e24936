"""Read pictures from files as arrays, refuse every bad file with its reason, and draw boxes or saliency in them."""

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
from cnn_jax.runtime.errors import InputFileError, lacks_memory
from cnn_jax.runtime.streams import stderr_of_libraries_closed

ORIENTATION = 0x0112  # EXIF's tag; from 5 on, width and height are exchanged
STANDARD_INPUT = "-"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif")
# As Pillow names them; of several pictures in a file, the first is read.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such a file begins
BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8", *TIFF)
BOX_COLOUR = (30, 120, 220)
LABEL_SIZE = 16  # pixels
# Of the pixels that speak for a class and of those that speak against it: red and blue, which few confuse.
FOR, AGAINST = (209, 73, 91), (48, 99, 142)
INK_GREY = 0.3  # how dark ink is that speaks neither for nor against, of 1 for black
MAXIMUM_BYTES = 2**26
BAND = 64  # rows of a large picture, made smaller, that are converted at once
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
      first_of_several: Whether its file has more, as an animation or a document of pages has.
    """

    colours: np.ndarray
    size: tuple[int, int]
    first_of_several: bool = False

    def notes(self, file: str) -> list[str]:
        """Return what to say of a picture that was read from a file."""
        return [f"{file} has several pictures; only the first is read"] if self.first_of_several else []


def read_picture(file: str) -> Picture:
    """Read a picture from a file, or from standard input if the file is `-`.

    Raises:
      InputFileError: the file is missing, empty, too large, damaged, not a regular file, or of another format.
    """
    return _decode(file, _read_bytes(file))


def too_narrow(size: Sequence[int]) -> bool:
    """Whether a picture of this width and height, or height and width, is too small to show a whole digit."""
    return min(size) < SMALLEST_SIDE * max(1, max(size) / WORKING_SIZE)


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
            raise InputFileError(f"{file or repr(file)} cannot be opened ({reason}); give a picture file") from error
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
                several = getattr(image, "is_animated", False)
                image.draft(image.mode, (2 * WORKING_SIZE, 2 * WORKING_SIZE))
                image.load()
                orientation = image.getexif().get(ORIENTATION, 1)
                size = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
                return Picture(_to_colours(_in_8_bits(file, image), orientation), size, several)
    except InputFileError:
        raise
    except Image.UnidentifiedImageError as error:
        if content.startswith(BEGINNINGS):
            raise InputFileError(f"{file} is damaged (its header cannot be read); save or copy it again") from error
        raise InputFileError(f"{file} is not a picture of a known format; save it as PNG or JPEG") from error
    except Exception as error:  # Pillow raises a dozen types for damaged files
        if lacks_memory(error):
            raise
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
    if too_narrow(image.size):
        raise InputFileError(
            f"{file} is {image.width}x{image.height} pixels, too small or too narrow; give a picture of a whole digit"
        )
    return image


def _to_colours(image: Image.Image, orientation: int = 1) -> np.ndarray:
    """Return a decoded image, turned upright from EXIF's orientation, as the colours of a `Picture`."""
    shrunk = _shrunk(image)
    shrunk.getexif()[ORIENTATION] = orientation
    ImageOps.exif_transpose(shrunk, in_place=True)
    shrunk.thumbnail((WORKING_SIZE, WORKING_SIZE), Image.Resampling.BOX)
    colours = np.asarray(shrunk, np.float32)
    return _composite(colours) if shrunk.mode == "RGBA" else colours


def _shrunk(image: Image.Image) -> Image.Image:
    """Return an image as RGB or RGBA, of at most about 4 * WORKING_SIZE pixels per side, converted band by band.

    A whole one of 50 million pixels would take 200 MB more for each conversion.
    """
    with_alpha = image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info
    factor = max(1, max(image.size) // (2 * WORKING_SIZE))
    width, height = (-(-side // factor) for side in image.size)
    shrunk = Image.new("RGBA" if with_alpha else "RGB", (width, height))
    for top in range(0, height, BAND):
        bottom = min(top + BAND, height)
        band = image.crop((0, top * factor, image.width, min(bottom * factor, image.height)))
        shrunk.paste(band.convert(shrunk.mode).reduce(factor), (0, top))
    return shrunk


def _in_8_bits(file: str, image: Image.Image) -> Image.Image:
    """Return an image whose pixels have more than 8 bits with 8, of what its brightest pixel shows white to be.

    Formats do not tell: of 16 bits a camera may use 12, and floats may end at 1, at 255 or elsewhere.
    """
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    bands = [(0, top, image.width, min(top + BAND, image.height)) for top in range(0, image.height, BAND)]
    ends = np.array([(pixels.min(), pixels.max()) for pixels in (np.asarray(image.crop(band)) for band in bands)])
    darkest, brightest = ends[:, 0].min(), ends[:, 1].max()
    if not 0 <= darkest <= brightest < np.inf:
        raise InputFileError(f"{file} has pixels below 0 or that are no numbers; save it with 8 bits per channel")
    white = 1 if brightest <= 1 else 2 ** max(8, int(np.ceil(np.log2(float(brightest) + 1)))) - 1
    grey = Image.new("L", image.size)
    for band in bands:
        pixels = np.asarray(image.crop(band), np.float32) * np.float32(255 / white)
        grey.paste(Image.fromarray(pixels.round().astype(np.uint8)), band)
    return grey


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
        draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), outline=BOX_COLOUR, width=2)
        # Above the box, or, at the picture's upper edge, over it.
        corner = max(left, 3), max(top - 5, LABEL_SIZE + 3)
        across, above, beyond, below = draw.textbbox(corner, text, anchor="lb", font_size=LABEL_SIZE)
        draw.rectangle((across - 3, above - 3, beyond + 2, below + 2), fill=BOX_COLOUR)
        draw.text(corner, text, fill="white", anchor="lb", font_size=LABEL_SIZE)
    return encode_png(np.asarray(image))


def draw_saliency(image: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """Colour each pixel of an image by what it contributes to a class: red for it, blue against it, else grey.

    Args:
      image: (H, W, C), uint8: in colour if it has three channels, else the ink in its first, 0 for none.
      saliency: (H, W), float32; half the strongest contribution and more has full colour.

    Returns:
      (H, W, 3), uint8, ink dark on white.
    """
    darkness = 255 - image.mean(axis=-1) if image.shape[-1] == 3 else image[..., 0]
    grey = 255 - INK_GREY * darkness[..., np.newaxis]
    strength = np.minimum(2 * np.abs(saliency)[..., np.newaxis] / max(float(np.abs(saliency).max()), 1e-12), 1)
    colour = np.where(saliency[..., np.newaxis] > 0, FOR, AGAINST)
    return (grey + strength * (colour - grey)).round().astype(np.uint8)


def encode_png(pixels: np.ndarray) -> bytes:
    """Return a picture, (H, W) or (H, W, 3), uint8, as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
