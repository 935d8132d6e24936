"""Make a picture an image for a network: lay out a digit or a letter as MNIST does, and shrink anything else.

The layout is the one that MNIST's authors describe (LeCun et al., Proc. IEEE 86, 1998, section III.A): the digit is
scaled to fit 20x20 pixels with its aspect ratio kept, which smooths it, and placed into 28x28 by its centre of mass.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from cnn_jax.runtime.errors import UsageError

SIZE, FITTED_SIZE = 28, 20  # sides of MNIST's images, and of the box that a digit fills in them
Box = tuple[int, int, int, int]  # left, top, right and bottom, in a picture's pixels
# Digits are searched for in pictures of at most this many pixels per side, and their shape is traced with DETAIL pixels
# for each of the network's.
WORKING_SIZE = 512
DETAIL = 8
SMALLEST_SIDE = 8  # pixels; smaller pictures are refused
# Ink differs from the paper by at least FAINTEST of 255, by GRAIN standard deviations of the paper's noise, and by this
# share of the darkest ink's difference.
FAINTEST, GRAIN, SHARE_OF_DARKEST = 24, 6, 0.45
# The smallest of a digit's disconnected parts has at least this share of the largest one's pixels.
SMALLEST_PART = 0.05
# Holes and gaps that the paper's texture leaves in strokes are up to this wide, in pixels of the traced shape.
HOLE = 5
# The stroke widths of 95 % of MNIST's digits lie between these two, in the network's pixels.
STROKE_WIDTHS = (1.9, 4.0)
# What is wider is a blot: the widest stroke of 1,500 of MNIST's digits has 5.7, and small digits by a thick pen have a
# little more.
BLOT = 8


class Character(NamedTuple):
    """A digit or a letter in a picture.

    Attributes:
      box: The left, top, right and bottom of its ink, in the picture's pixels.
      image: How MNIST would have it: (28, 28, 1), uint8, 0 for paper and 255 for ink.
    """

    box: Box
    image: np.ndarray


def find_character(colours: np.ndarray) -> Character | None:
    """Find the one digit or letter in a picture and lay it out as MNIST does.

    Args:
      colours: (H, W, 3), float32, in 0..255: ink of any colour on paper of another, dark on light or light on dark,
        evenly lit or not.

    Returns:
      The largest mark with the parts that belong to it; None if nothing differs enough from the paper.
    """
    return find_in_ink(*measure_ink(colours))


def find_in_ink(whole: np.ndarray, faintest: float) -> Character | None:
    """Find what `find_character` does in ink, (H, W), that `measure_ink` has measured."""
    ink, threshold = whole, ink_threshold(whole, faintest)
    for candidate, level in _without_surroundings(whole, faintest):
        if _longer_side(_digit_mask(candidate > level)) > np.sqrt(ink.size) / 10:
            ink, threshold = candidate, level
            break
    mask = _digit_mask(ink > threshold)
    image = lay_out(trace(ink, mask, threshold)) if _longer_side(mask) >= SMALLEST_SIDE / 2 else None
    if image is None:
        return None
    rows, columns = ndimage.find_objects(mask.astype(int))[0]
    return Character((columns.start, rows.start, columns.stop, rows.stop), image)


def measure_ink(colours: np.ndarray) -> tuple[np.ndarray, float]:
    """Return how much each pixel of a picture, (H, W, 3), float32, in 0..255, differs from the paper around it.

    Returns:
      (H, W), float32, about 0 on the paper and where lines or frames are printed; and the value of the faintest ink.
    """
    ink = _ink(colours)
    # The standard deviation of normal noise, estimated from the median difference of pixels a small distance apart.
    distance = 1 + max(ink.shape) // 128
    noise = 1.4826 * np.median(np.abs(ink[:, distance:] - ink[:, :-distance])) / np.sqrt(2)
    return ink, max(FAINTEST, GRAIN * noise)


def _without_surroundings(ink: np.ndarray, faintest: float) -> Iterator[tuple[np.ndarray, float]]:
    """Yield the ink, (H, W), that is not connected to the picture's edge, and the value above which a pixel is ink.

    Anything connected to the edge is a shadow, a ruled line, a frame or the table, as long as a digit remains without
    it. A fainter digit appears once everything connected to the edge is gone.
    """
    threshold = ink_threshold(ink, faintest)
    yield np.where(connected_to_edge(ink > threshold), 0, ink), threshold
    isolated = np.where(connected_to_edge(ink > faintest), 0, ink)
    yield isolated, ink_threshold(isolated, faintest)


def ink_threshold(ink: np.ndarray, faintest: float) -> float:
    """Return the value above which a pixel is ink."""
    visible = ink[ink > faintest]
    return max(faintest, SHARE_OF_DARKEST * np.percentile(visible, 97)) if len(visible) else faintest


def _longer_side(mask: np.ndarray) -> int:
    """Return the longer side of the box around the pixels of a mask."""
    return max(int(np.ptp(indices)) + 1 if len(indices) else 0 for indices in np.nonzero(mask))


def _ink(colours: np.ndarray) -> np.ndarray:
    """Return how much each pixel differs from the paper around it, (H, W), float32: about 0 on the paper."""
    # Project the colours onto the axis along which they vary most; in a grey picture that is brightness.
    _, axes = np.linalg.eigh(np.cov(colours.reshape(-1, 3), rowvar=False))
    axis = axes[:, -1].astype(np.float32)
    grey = colours @ (axis / np.abs(axis).sum())
    window = round(np.sqrt(grey.size) / 2)  # wider than any stroke
    plane = _fit_plane(grey, margin=window)
    difference = grey - plane[window:-window, window:-window]
    # Ink differs from the paper by more than the paper varies, so it decides the sign of the skewness.
    if (difference**3).mean() < 0:
        difference, plane = -difference, -plane
    smooth = ndimage.gaussian_filter(difference, max(grey.shape) / WORKING_SIZE)
    # A grey opening removes everything narrower than its window and leaves the paper with its light and shadows. The
    # paper is extended beyond the picture's edges under the same light.
    extended = np.pad(smooth, window, mode="symmetric") + plane
    ink = (extended - ndimage.grey_opening(extended, size=(window, window)))[window:-window, window:-window]
    return ink - np.median(ink)


def _fit_plane(grey: np.ndarray, *, margin: int) -> np.ndarray:
    """Fit a plane to a picture by least absolute differences: the light on plain paper.

    It is found by iteratively reweighted least squares (Schlossmacher, J. Am. Stat. Assoc. 68, 1973). SciPy's
    `least_squares` finds the same digits, but takes 1.6 times as long and 0.1 s to import.

    Args:
      grey: (H, W), float32.
      margin: Pixels by which the plane extends beyond each of the picture's edges.

    Returns:
      (H + 2 * margin, W + 2 * margin), float32.
    """
    # Fit the means of blocks of pixels, because a sample of single pixels could miss a pattern on the paper.
    side = min(64, *grey.shape)
    values = np.asarray(Image.fromarray(grey).resize((side, side), Image.Resampling.BOX), np.float64).ravel()
    middles = (np.arange(side) + 0.5) / side
    inputs = np.stack([np.ones(side**2), np.repeat(middles, side), np.tile(middles, side)], axis=1)
    plane, weights = np.zeros(3), np.ones_like(values)
    for _ in range(10):
        plane = np.linalg.solve((inputs.T * weights) @ inputs, (inputs.T * weights) @ values)
        weights = 1 / np.maximum(np.abs(values - inputs @ plane), 1)
    rows, columns = ((np.arange(-margin, length + margin) + 0.5) / length for length in grey.shape)
    return (plane[0] + plane[1] * rows[:, np.newaxis] + plane[2] * columns[np.newaxis, :]).astype(np.float32)


def connected_to_edge(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask, (H, W) bool, that are connected to the picture's edge."""
    labels = number_parts(mask)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.isin(labels, edge[edge > 0])


def _digit_mask(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask, (H, W) bool, in its largest connected part and in the parts that belong to it."""
    if not mask.any():
        return mask
    labels = number_parts(mask)
    boxes = np.array([[[side.start, side.stop] for side in sides] for sides in ndimage.find_objects(labels)])
    sizes = np.bincount(labels.ravel())[1:]
    largest = int(sizes.argmax())
    candidates = np.nonzero(sizes >= SMALLEST_PART * sizes[largest])[0].tolist()
    parts: list[int] = []
    box = boxes[largest]
    while len(found := [part for part in candidates if _is_close(boxes[part], box)]) > len(parts):
        parts = found
        box = np.stack([boxes[parts, :, 0].min(axis=0), boxes[parts, :, 1].max(axis=0)], axis=1)
    return np.isin(labels, np.array(parts) + 1)


def number_parts(mask: np.ndarray) -> np.ndarray:
    """Number the connected parts of a mask, (H, W) bool, from 1; pixels that touch at a corner are connected."""
    labels = np.zeros(mask.shape, np.int32)  # 0 outside the mask
    ndimage.label(mask, structure=np.ones((3, 3)), output=labels)
    return labels


def _is_close(box: np.ndarray, other: np.ndarray) -> bool:
    """Whether the gap between two boxes, [[top, bottom], [left, right]], is at most a quarter of the other's size."""
    gap = np.ptp(other, axis=1).max() / 4
    return bool(((box[:, 0] <= other[:, 1] + gap) & (box[:, 1] >= other[:, 0] - gap)).all())


def trace(ink: np.ndarray, mask: np.ndarray, threshold: float) -> np.ndarray:
    """Return the shape of the ink in and beside a mask, (H, W) bool, DETAIL times its final size: (h, w), bool."""
    rows, columns = ndimage.find_objects(mask.astype(int))[0]
    longer = max(rows.stop - rows.start, columns.stop - columns.start)
    margin = 2
    around = slice(rows.start, rows.stop + 2 * margin), slice(columns.start, columns.stop + 2 * margin)
    inked = ndimage.binary_dilation(np.pad(mask, margin)[around], iterations=margin)
    padded = np.where(inked, np.pad(ink, margin)[around], 0)
    scale = FITTED_SIZE * DETAIL / longer
    size = [max(1, round(scale * side)) for side in padded.shape]
    resized = Image.fromarray(padded.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(resized) > threshold


def lay_out(shape: np.ndarray) -> np.ndarray | None:
    """Give a shape, (h, w) bool, DETAIL times its final size, strokes as wide as MNIST's, shrink it and centre it.

    Returns:
      (28, 28, 1), uint8; None if the shape is empty or a blot.
    """
    narrowest, widest = (DETAIL * width for width in STROKE_WIDTHS)
    closed = ndimage.grey_closing(np.pad(shape, round(narrowest)).astype(np.uint8), size=(HOLE, HOLE))
    shape = np.asarray(closed, bool)
    if not shape.any():
        return None
    inside = np.asarray(ndimage.distance_transform_edt(shape))
    # A stroke's pixels are on average a quarter of its width away from its edge.
    width = 4 * inside[shape].mean()
    if width > BLOT * DETAIL:
        return None
    growth = (np.clip(width, narrowest, widest) - width) / 2
    grown = np.asarray(ndimage.distance_transform_edt(~shape)) < growth if growth > 0 else inside > -growth
    return _centre(_fit(grown)) if grown.any() else None


def _fit(shape: np.ndarray) -> np.ndarray:
    """Shrink a digit until its longer side has 20 pixels: (h, w), uint8."""
    rows, columns = ndimage.find_objects(shape.astype(int))[0]
    cropped = Image.fromarray(shape[rows, columns].astype(np.uint8) * 255)
    scale = FITTED_SIZE / max(cropped.size)
    size = [max(1, round(scale * side)) for side in cropped.size]
    return np.asarray(cropped.resize(size, Image.Resampling.BOX))


def _centre(fitted: np.ndarray) -> np.ndarray:
    """Place a digit into 28x28 pixels with its centre of mass in the middle: (28, 28, 1), uint8."""
    image = np.zeros((SIZE, SIZE, 1), np.uint8)
    height, width = fitted.shape
    corner = np.round(SIZE / 2 - np.asarray(ndimage.center_of_mass(fitted)))
    top, left = np.clip(corner, 0, [SIZE - height, SIZE - width]).astype(int)
    image[top : top + height, left : left + width, 0] = fitted
    return image


def prepare_picture(colours: np.ndarray, image_shape: tuple[int, int, int], background: int) -> np.ndarray | None:
    """Shrink a picture of anything to the shape of a network's images.

    Args:
      colours: (H, W, 3), float32, in 0..255.
      image_shape: (height, width, channels); of one channel the image is grey.
      background: The brightness at the edges of the network's images; a grey picture is inverted if it is then nearer.

    Returns:
      An image of that shape, uint8; None if the picture is of one colour.
    """
    if np.ptp(colours, axis=(0, 1)).max() < FAINTEST:
        return None
    height, width, channels = image_shape
    picture = Image.fromarray(colours.round().astype(np.uint8))
    if channels == 1:
        picture = picture.convert("L")
    image = np.asarray(picture.resize((width, height), Image.Resampling.BOX)).reshape(image_shape)
    edge = background_of(image[np.newaxis])
    if channels == 1 and abs(255 - edge - background) < abs(edge - background):
        image = 255 - image
    return image


def background_of(images: np.ndarray) -> int:
    """Return the median of the pixels at the edges of images, (N, H, W, C), uint8."""
    edges = (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1])
    return int(np.median(np.concatenate([edge.ravel() for edge in edges])))


def check_takes_pictures(image_shape: tuple[int, int, int], run: str, *, drawn: bool = False) -> None:
    """Refuse a network for whose images no picture can be prepared.

    Args:
      image_shape: The height, width and channels of the network's images.
      run: The name of the network in the message.
      drawn: Whether they are drawn on a board for images of MNIST's size.

    Raises:
      UsageError: naming the size of its images.
    """
    size = "x".join(map(str, image_shape))
    if drawn and image_shape != (SIZE, SIZE, 1):
        raise UsageError(f"{run}: its network takes images of {size}, not of {SIZE}x{SIZE}x1; name another run")
    if image_shape[2] not in (1, 3):
        raise UsageError(f"{run}: its network takes images of {size}; pictures have 1 or 3 channels; name another run")
