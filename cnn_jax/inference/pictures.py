"""Pictures of digits as the network wants them, and every way in which such a file can be bad; knows Pillow.

The preparation is the one that MNIST's authors describe (LeCun et al., Proc. IEEE 86, 1998, section III.A): the digit
is fitted into 20x20 pixels with its aspect ratio kept, smoothed by that, and put into 28x28 by its centre of mass.
"""

import io
import os
import stat
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from cnn_jax.runtime.errors import InputFileError, UsageError

STANDARD_INPUT = "-"
ENDINGS = (".png", ".jpg", ".jpeg")
MAXIMUM_BYTES = 2**26
MAXIMUM_PIXELS = 50_000_000  # what the largest sensors of phones give
SMALLEST_SIDE = 8

SIZE, FITTED_SIZE = 28, 20  # of MNIST's images, and of the digits in them
# A digit is looked for in a picture of at most this many pixels a side, and its shape is taken at DETAIL pixels for
# each of the network's.
WORKING_SIZE = 512
DETAIL = 8
# Ink differs from the paper by at least so much of 255, by so many standard deviations of the paper's grain, and by
# this share of what the darkest ink differs by.
FAINTEST, GRAIN, SHARE_OF_DARKEST = 24, 6, 0.45
# Parts of a digit that do not hang together: the smallest is so large a share of the largest.
SMALLEST_PART = 0.05
# Holes and gaps of strokes that paper leaves in them, in pixels of the shape.
HOLE = 5
# Strokes as wide as MNIST's, in the network's pixels: 95 % of its digits are between the two.
STROKE_WIDTHS = (1.9, 4.0)


def find_images(places: Sequence[str]) -> list[str]:
    """Return the files that are named, and in the place of a folder its images, sorted by name.

    Raises:
      InputFileError: a folder has no file with the name of an image.
    """
    files = []
    for place in places:
        if place == STANDARD_INPUT or not Path(place).is_dir():
            files.append(place)
            continue
        found = sorted(str(file) for file in Path(place).iterdir() if file.suffix.lower() in ENDINGS)
        if not found:
            raise InputFileError(f"{place} is a folder without an image; put {', '.join(ENDINGS)} files there")
        files += found
    return files


def read_digit(file: str) -> np.ndarray:
    """Return the digit in a PNG or JPEG file as the network wants it: (28, 28, 1), uint8, 0 where there is no ink.

    Args:
      file: Its path, or `-` for standard input.

    Raises:
      InputFileError: the file is missing, empty, too large, damaged, no regular file, no such image or shows no digit.
    """
    colours = _read_colours(file, _read_bytes(file))
    digit = prepare_digit(colours)
    if digit is None:
        raise InputFileError(
            f"{file} shows no digit: nothing differs from the paper; give a picture with more contrast"
        )
    return digit


def _read_bytes(file):
    if file == STANDARD_INPUT:
        if sys.stdin.isatty():
            raise InputFileError("- is standard input, which is a terminal; send an image there: cat digit.png | ... -")
        content = sys.stdin.buffer.read(MAXIMUM_BYTES + 1)
    else:
        try:
            # Without waiting: a FIFO that nobody writes to would otherwise never open.
            descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputFileError(f"{file} cannot be opened ({reason}); give a PNG or JPEG file") from error
        with open(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputFileError(f"{file} is not a regular file; give a PNG or JPEG file, or - for standard input")
            content = stream.read(MAXIMUM_BYTES + 1)
    if not content:
        raise InputFileError(f"{file} is empty; give a PNG or JPEG file")
    if len(content) > MAXIMUM_BYTES:
        raise InputFileError(f"{file} has more than {MAXIMUM_BYTES >> 20} MiB; give a smaller picture")
    return content


def _read_colours(file, content):
    """Decode an image: (H, W, 3), float32, in 0..255, at most WORKING_SIZE a side, upright and without transparency."""
    try:
        # What Pillow warns of is refused or repaired here: large images, odd palettes, EXIF that makes no sense.
        with warnings.catch_warnings(action="ignore"):
            # Of a PNG's pixels Pillow looks at the checksums only when asked to.
            _open_image(file, content).verify()
            with _open_image(file, content) as image:
                image.draft(image.mode, (2 * WORKING_SIZE, 2 * WORKING_SIZE))
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _to_colours(image)
    except InputFileError:
        raise
    except Image.UnidentifiedImageError as error:
        raise InputFileError(f"{file} is not a PNG or JPEG image; save it as one") from error
    except Exception as error:  # a damaged file comes as any of a dozen types
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputFileError(f"{file} is damaged ({reason}); save or copy it again") from error


def _open_image(file, content):
    """Read an image's header, and refuse what would be too large once it is decoded."""
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        pixels = image.width * image.height
    except Image.DecompressionBombError:
        image, pixels = None, float("inf")
    if pixels > MAXIMUM_PIXELS:
        raise InputFileError(f"{file} has more than {MAXIMUM_PIXELS:,} pixels; give a smaller picture")
    if min(image.size) < SMALLEST_SIDE * max(1, max(image.size) / WORKING_SIZE):
        raise InputFileError(
            f"{file} is {image.width}x{image.height} pixels, too small or too narrow; give a picture of a whole digit"
        )
    return image


def _to_colours(image):
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits of grey
        grey = np.asarray(image, np.float32) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    with_alpha = image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info
    image = image.convert("RGBA" if with_alpha else "RGB")
    image.thumbnail((WORKING_SIZE, WORKING_SIZE), Image.Resampling.BOX)
    colours = np.asarray(image, np.float32)
    return _composite(colours) if with_alpha else colours


def _composite(colours):
    """Put the paper under an image with transparency: (H, W, 4) -> (H, W, 3)."""
    colours, alpha = colours[..., :3], colours[..., 3:] / 255
    visible = colours[alpha[..., 0] > 0.5]
    if len(visible) == 0:
        return np.zeros_like(colours)
    if len(visible) > alpha.size / 2:
        paper = np.median(visible, axis=0)  # what is seen is paper with a digit on it
    else:
        paper = np.float32(255 if visible.mean() < 127.5 else 0)  # only the digit is seen
    return colours * alpha + paper * (1 - alpha)


def prepare_digit(colours: np.ndarray) -> np.ndarray | None:
    """Find the digit in a picture and lay it out as MNIST's are.

    Args:
      colours: (H, W, 3), float32, in 0..255: ink of any colour on paper of another, dark on light or light on dark,
        evenly lit or not.

    Returns:
      (28, 28, 1), uint8, 0 for paper and 255 for ink; None where nothing differs enough from the paper.
    """
    ink = _ink(colours)
    # The standard deviation of normal noise, from what pixels near each other differ by in the median.
    near = 1 + max(ink.shape) // 128
    grain = 1.4826 * np.median(np.abs(ink[:, near:] - ink[:, :-near])) / np.sqrt(2)
    faintest = max(FAINTEST, GRAIN * grain)
    threshold = _threshold(ink, faintest)
    # What hangs together with the picture's edge is a shadow, a rule, a frame or the table, if a digit is left without
    # it; one that is fainter is seen when all that hangs together with the edge is gone.
    inside, alone = (np.where(_reaching_edge(ink > level), 0, ink) for level in (threshold, faintest))
    for rest, above in (inside, threshold), (alone, _threshold(alone, faintest)):
        if _length(_parts_of_digit(rest > above)) > np.sqrt(ink.size) / 10:
            ink, threshold = rest, above
            break
    parts = _parts_of_digit(ink > threshold)
    if _length(parts) < SMALLEST_SIDE / 2:
        return None
    shape = _shape(np.where(ndimage.binary_dilation(parts, iterations=2), ink, 0), parts, threshold)
    return _centre(_fit(shape)) if shape.any() else None


def _threshold(ink, faintest):
    """Return above what a pixel is ink."""
    seen = ink[ink > faintest]
    return max(faintest, SHARE_OF_DARKEST * np.percentile(seen, 97)) if len(seen) else faintest


def _length(parts):
    """Return the longer side of what is set, in pixels."""
    return max(int(places.max() - places.min()) + 1 if len(places) else 0 for places in np.nonzero(parts))


def _ink(colours):
    """Return how much each pixel differs from the paper around it: (H, W), float32, about 0 on the paper."""
    # Along the axis on which the colours of the picture differ most. For all greys that is brightness.
    _, axes = np.linalg.eigh(np.cov(colours.reshape(-1, 3), rowvar=False))
    axis = axes[:, -1].astype(np.float32)
    grey = colours @ (axis / np.abs(axis).sum())
    window = round(np.sqrt(grey.size) / 2)  # wider than any stroke
    plane = _plane(grey, beyond=window)
    apart = grey - plane[window:-window, window:-window]
    # Ink departs further from the paper than the paper does from itself.
    if (apart**3).mean() < 0:
        apart, plane = -apart, -plane
    smooth = ndimage.gaussian_filter(apart, max(grey.shape) / WORKING_SIZE)
    # A grey opening removes what is narrower than its window and leaves the paper with its light and shadows. The paper
    # goes on beyond the picture's edges, lit as it is.
    extended = np.pad(smooth, window, mode="symmetric") + plane
    ink = (extended - ndimage.grey_opening(extended, size=(window, window)))[window:-window, window:-window]
    return ink - np.median(ink)


def _plane(grey, *, beyond):
    """Return the plane whose absolute differences from a picture have the least sum: even light on the paper.

    By least squares that are weighted again and again (Schlossmacher, J. Am. Stat. Assoc. 68, 1973).

    Args:
      grey: (H, W), float32.
      beyond: How many pixels it reaches beyond each of the picture's edges.

    Returns:
      (H + 2 * beyond, W + 2 * beyond), float32.
    """
    # Of means of many pixels, because a pattern on the paper could hide between single ones.
    side = min(64, *grey.shape)
    values = np.asarray(Image.fromarray(grey).resize((side, side), Image.Resampling.BOX), np.float64).ravel()
    middles = (np.arange(side) + 0.5) / side
    known = np.stack([np.ones(side**2), np.repeat(middles, side), np.tile(middles, side)], axis=1)
    weights = np.ones_like(values)
    for _ in range(10):
        plane = np.linalg.solve((known.T * weights) @ known, (known.T * weights) @ values)
        weights = 1 / np.maximum(np.abs(values - known @ plane), 1)
    rows, columns = ((np.arange(-beyond, length + beyond) + 0.5) / length for length in grey.shape)
    return (plane[0] + plane[1] * rows[:, np.newaxis] + plane[2] * columns[np.newaxis, :]).astype(np.float32)


def _reaching_edge(mask):
    """Return the pixels, (H, W) bool, of what hangs together with the picture's edge."""
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.isin(labels, edge[edge > 0])


def _parts_of_digit(mask):
    """Return the pixels, (H, W) bool, of the largest connected part and of what belongs to it."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count == 0:
        return mask
    boxes = np.array([[[side.start, side.stop] for side in sides] for sides in ndimage.find_objects(labels)])
    sizes = np.bincount(labels.ravel())[1:]
    main = int(sizes.argmax())
    candidates = np.nonzero(sizes >= SMALLEST_PART * sizes[main])[0]
    kept, box = [], boxes[main]
    while len(found := [part for part in candidates if _is_near(boxes[part], box)]) > len(kept):
        kept = found
        box = np.stack([boxes[kept, :, 0].min(axis=0), boxes[kept, :, 1].max(axis=0)], axis=1)
    return np.isin(labels, np.array(kept) + 1)


def _is_near(box, other):
    """Whether two boxes, [[top, bottom], [left, right]], are no further apart than a quarter of the other's size."""
    near = np.ptp(other, axis=1).max() / 4
    return ((box[:, 0] <= other[:, 1] + near) & (box[:, 1] >= other[:, 0] - near)).all()


def _shape(ink, parts, threshold):
    """Return the digit alone, DETAIL times as large as it will be, its strokes as wide as MNIST's: (h, w), bool."""
    rows, columns = ndimage.find_objects(parts.astype(int))[0]
    longer = max(rows.stop - rows.start, columns.stop - columns.start)
    margin = 2
    padded = np.pad(ink, margin)[rows.start : rows.stop + 2 * margin, columns.start : columns.stop + 2 * margin]
    scale = FITTED_SIZE * DETAIL / longer
    size = [max(1, round(scale * side)) for side in padded.shape]
    resized = Image.fromarray(padded.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC)
    widest = round(STROKE_WIDTHS[1] * DETAIL)
    shape = ndimage.binary_closing(np.pad(np.asarray(resized) > threshold, widest), np.ones((HOLE, HOLE)))
    if not shape.any():
        return shape
    inside, outside = ndimage.distance_transform_edt(shape), ndimage.distance_transform_edt(~shape)
    # The distance to a stroke's edge is a quarter of the stroke's width in the mean.
    width = 4 * inside[shape].mean()
    growth = (np.clip(width, *(DETAIL * limit for limit in STROKE_WIDTHS)) - width) / 2
    return inside - outside > -growth


def _fit(shape):
    """Shrink a digit until its longer side has 20 pixels: (h, w), uint8."""
    rows, columns = ndimage.find_objects(shape.astype(int))[0]
    cropped = Image.fromarray(shape[rows, columns].astype(np.uint8) * 255)
    scale = FITTED_SIZE / max(cropped.size)
    size = [max(1, round(scale * side)) for side in cropped.size]
    return np.asarray(cropped.resize(size, Image.Resampling.BOX))


def _centre(fitted):
    """Put a digit into 28x28 pixels so that its centre of mass is in their middle: (28, 28, 1), uint8."""
    image = np.zeros((SIZE, SIZE, 1), np.uint8)
    centre = ndimage.center_of_mass(fitted)
    top, left = (
        int(np.clip(round(SIZE / 2 - middle), 0, SIZE - side))
        for middle, side in zip(centre, fitted.shape, strict=True)
    )
    image[top : top + fitted.shape[0], left : left + fitted.shape[1], 0] = fitted
    return image


def check_takes_digits(image_shape: tuple[int, int, int], run: str) -> None:
    """Refuse a network of other images than `read_digit` returns.

    Args:
      image_shape: What the network takes: height, width, channels.
      run: What to call it.

    Raises:
      UsageError: it takes others.
    """
    if image_shape != (SIZE, SIZE, 1):
        size = "x".join(map(str, image_shape))
        raise UsageError(f"{run}: its network takes images of {size}, not of {SIZE}x{SIZE}x1; name another run")


def encode_png(pixels: np.ndarray) -> bytes:
    """Return a picture, (H, W) uint8, as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
