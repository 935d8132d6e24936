"""Train the small network that tells digits from everything else; `python -m benchmarks.detector DIR`.

Its positives are MNIST's training images. Its negatives are made here and laid out as a picture's ink is: digits side
by side, parts of digits, digits on top of each other or turned, strokes and scribbles at random, blots and textures. It
is an ordinary network of this program, so that the package needs no other kind of model.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.font_manager import fontManager
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

import cnn_jax
from cnn_jax.data.idx import idx_header
from cnn_jax.data.loading import load_dataset
from cnn_jax.inference.preprocess import DETAIL, FITTED_SIZE, STROKE_WIDTHS, lay_out

# Not those that may be taken for 0, 1, 2, 4, 5, 6, 7, 8 or 9.
LETTERS = "ACEFHJKLMNPRTUVWXYacdefhkmnprtuvwxy"
FONTS = sorted(font.fname for font in fontManager.ttflist if "DejaVu" in font.name and "Display" not in font.name)
BOARD = FITTED_SIZE * DETAIL  # pixels per side of the drawings
TRAINED, HELD_OUT = 40_000, 5_000  # digits, and as many negatives
TURN = 15  # degrees by which digits are turned at most, either way
Digits = list[np.ndarray]  # for each class its images, (N, 28, 28), uint8


def draw_stroke(rng: np.random.Generator, points: np.ndarray, width: float) -> np.ndarray:
    """Draw a line through points, (N, 2) in [0, 1], with a pen of this width in pixels: (BOARD, BOARD), bool."""
    sheet = Image.new("1", (BOARD, BOARD))
    draw = ImageDraw.Draw(sheet)
    corners = [tuple(point) for point in (points * BOARD).tolist()]
    draw.line(corners, fill=1, width=round(width), joint="curve")
    for x, y in corners:
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=1)
    return np.asarray(sheet)


def straight_strokes(rng: np.random.Generator, digits: Digits) -> np.ndarray:
    """Draw three to six straight strokes, most of which begin where another ends, as letters have them."""
    width = DETAIL * rng.uniform(*STROKE_WIDTHS)
    grid = rng.uniform(0.1, 0.9, (5, 2))
    points = [grid[rng.permutation(5)[:2]] for _ in range(rng.integers(3, 7))]
    return np.any([draw_stroke(rng, pair, width) for pair in points], axis=0)


def letter(rng: np.random.Generator, digits: Digits) -> np.ndarray:
    """Print one or two letters that look like no digit, stretched, slanted and bent."""
    font = ImageFont.truetype(FONTS[rng.integers(len(FONTS))], BOARD)
    sheet = Image.new("1", (3 * BOARD, 2 * BOARD))
    text = "".join(rng.choice(list(LETTERS), size=1 + (rng.random() < 0.2)))
    ImageDraw.Draw(sheet).text((BOARD, BOARD // 3), text, fill=1, font=font)
    rows, columns = np.indices((2 * BOARD, 3 * BOARD)).astype(np.float32) / BOARD
    waves = [
        ndimage.zoom(rng.normal(0, 0.04, (5, 5)), (2 * BOARD / 5, 3 * BOARD / 5), order=3) for _ in range(2)
    ]  # fmt: skip
    slant, stretch = rng.uniform(-0.3, 0.3), rng.uniform(0.7, 1.4)
    places = (rows + waves[0], 1.5 + (columns - 1.5) * stretch + slant * (rows - 1) + waves[1])
    return (
        ndimage.map_coordinates(np.asarray(sheet).astype(np.float32), [BOARD * place for place in places], order=1)
        > 0.5
    )


def scribble(rng: np.random.Generator, digits: Digits) -> np.ndarray:
    """Draw a bent line that crosses itself."""
    count = rng.integers(5, 20)
    coarse = rng.uniform(0.1, 0.9, (count, 2))
    bent = ndimage.zoom(coarse, (8, 1), order=3).clip(0.02, 0.98)
    return draw_stroke(rng, bent, DETAIL * rng.uniform(*STROKE_WIDTHS))


def blots(rng: np.random.Generator, digits: Digits) -> np.ndarray:
    """Draw one to four filled ellipses and polygons."""
    sheet = Image.new("1", (BOARD, BOARD))
    draw = ImageDraw.Draw(sheet)
    for _ in range(rng.integers(1, 5)):
        middle, extent = rng.uniform(0.3, 0.7, 2) * BOARD, rng.uniform(0.03, 0.3, 2) * BOARD
        if rng.random() < 0.5:
            draw.ellipse((*(middle - extent), *(middle + extent)), fill=1)
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
            corners = middle + extent * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            draw.polygon([tuple(corner) for corner in corners.tolist()], fill=1)
    return np.asarray(sheet)


def texture(rng: np.random.Generator, digits: Digits) -> np.ndarray:
    """Return where smoothed noise is large, as on grainy paper or in a photograph."""
    smooth = ndimage.gaussian_filter(rng.normal(size=(BOARD // 4, BOARD // 4)), np.exp(rng.uniform(0, 2, 2)))
    return (smooth > np.quantile(smooth, rng.uniform(0.5, 0.97))).repeat(4, axis=0).repeat(4, axis=1)


def _enlarged(rng: np.random.Generator, digits: Digits, classes: Sequence[int] = range(10)) -> np.ndarray:
    """Return a digit of one of the classes, cropped to its ink and smoothly enlarged: (h, w), bool."""
    images = digits[rng.choice(classes)]
    digit = images[rng.integers(len(images))]
    rows, columns = ndimage.find_objects((digit > 0).astype(int))[0]
    cropped = Image.fromarray(np.pad(digit[rows, columns], 1))
    large = cropped.resize([DETAIL * side for side in cropped.size], Image.Resampling.BICUBIC)
    return np.asarray(large.rotate(rng.uniform(-TURN, TURN), expand=True)) > 127


def side_by_side(rng: np.random.Generator, digits: Digits) -> np.ndarray:
    """Return two or three digits in a row, close to each other or touching."""
    shapes = [_enlarged(rng, digits) for _ in range(2 if rng.random() < 0.8 else 3)]
    height, gaps = max(len(shape) for shape in shapes), rng.integers(-5 * DETAIL, 4 * DETAIL, len(shapes))
    row, right = np.zeros((height, 6 * BOARD), bool), 0
    for shape, gap in zip(shapes, gaps, strict=True):
        top, left = rng.integers(height - len(shape) + 1), max(0, right + gap)
        row[top : top + len(shape), left : left + shape.shape[1]] |= shape
        right = left + shape.shape[1]
    return row


def part_of_a_digit(rng: np.random.Generator, digits: Digits) -> np.ndarray:
    """Return a fifth to three fifths of a digit, from one side of a straight cut, which is mostly an upright one."""
    shape = _enlarged(rng, digits, (0, *range(2, 10)))  # a part of a one is a one
    rows, columns = np.indices(shape.shape)
    angle = rng.normal(0, 0.25) + (np.pi / 2 if rng.random() < 0.25 else 0)
    along = np.cos(angle) * columns + np.sin(angle) * rows
    share = rng.uniform(0.2, 0.6)
    if rng.random() < 0.5:
        return shape & (along < np.quantile(along[shape], share))
    return shape & (along > np.quantile(along[shape], 1 - share))


def overlaid(rng: np.random.Generator, digits: Digits) -> np.ndarray:
    """Return two different digits on top of each other."""
    shapes = [_enlarged(rng, digits, [digit]) for digit in rng.permutation(10)[:2]]
    size = np.max([shape.shape for shape in shapes], axis=0)
    return np.any([np.pad(shape, [(0, size[i] - shape.shape[i]) for i in range(2)]) for shape in shapes], axis=0)


def turned(rng: np.random.Generator, digits: Digits) -> np.ndarray:
    """Return a digit that lies on its side, leaning a little."""
    angle = rng.choice([-1, 1]) * rng.uniform(60, 120)
    return np.asarray(Image.fromarray(_enlarged(rng, digits, (2, 3, 4, 5, 6, 7, 9))).rotate(angle, expand=True))


# How to make a negative, and how many of 100 are made so.
KINDS: dict[Callable[[np.random.Generator, Digits], np.ndarray], int] = {
    straight_strokes: 10,
    letter: 22,
    scribble: 8,
    blots: 6,
    texture: 6,
    side_by_side: 36,
    part_of_a_digit: 16,
    overlaid: 6,
    turned: 6,
}


def draw_negatives(rng: np.random.Generator, digits: Digits, count: int) -> np.ndarray:
    """Return as many images without a digit, (count, 28, 28), uint8."""
    kinds = rng.choice(list(KINDS), size=2 * count, p=np.array(list(KINDS.values())) / sum(KINDS.values()))
    shapes = (kind(rng, digits) for kind in kinds)
    images = (_laid_out(rng, shape) for shape in shapes if shape.sum() > DETAIL**2)
    return np.stack([image for image, _ in zip(images, range(count), strict=False)])


def _laid_out(rng: np.random.Generator, shape: np.ndarray) -> np.ndarray:
    """Lay out a shape, (h, w) bool of any size, as a picture's ink is: (28, 28), uint8."""
    rows, columns = ndimage.find_objects(shape.astype(int))[0]
    cropped = Image.fromarray(shape[rows, columns])
    size = [max(1, round(BOARD / max(cropped.size) * side)) for side in cropped.size]
    scaled = np.pad(np.asarray(cropped.resize(size)), DETAIL)
    # Another pen; `lay_out` keeps its width among those of MNIST.
    inside, outside = (ndimage.distance_transform_edt(side) for side in (scaled, ~scaled))
    again = inside - outside > rng.uniform(-DETAIL, DETAIL / 2)
    return lay_out(again if again.any() else scaled)[..., 0]


def main(folder: Path) -> None:
    """Write the images as IDX files into a folder, and train on them into the folder beside them."""
    rng = np.random.default_rng(0)
    mnist = load_dataset("mnist", None, None)
    images, labels = mnist.train_images[..., 0], mnist.train_labels
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in ("train", slice(TRAINED)), ("t10k", slice(TRAINED, TRAINED + HELD_OUT)):
        ours = images[part]
        digits = [ours[labels[part] == digit] for digit in range(10)]
        # Half of them as MNIST has them, and half turned and laid out as a picture's ink is, like the negatives.
        again = np.stack([_laid_out(rng, _enlarged(rng, digits)) for _ in range(len(ours) // 2)])
        positives = np.concatenate([ours[: len(ours) - len(again)], again])
        negatives = draw_negatives(rng, digits, len(ours))
        both = np.concatenate([positives, negatives]), np.repeat(np.uint8([1, 0]), len(ours))
        for values, kind in zip(both, ("images-idx3-ubyte", "labels-idx1-ubyte"), strict=True):
            (folder / f"{name}-{kind}").write_bytes(idx_header(values.shape) + values.tobytes())
    cnn_jax.train(
        dataset_dir=folder,
        class_names="other,digit",
        features=(16, 32),
        recipe="fast",
        epochs=16,
        run_name="detector",
        checkpoint_dir=folder,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
