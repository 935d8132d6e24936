"""Draw digits as people write them, to test reading; `python -m tests.digits DIR` writes them to a folder.

A seeded generator draws each digit stroke by stroke, with a trembling pen on one of several kinds of paper, and uses
neither a font nor MNIST.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.interpolate import CubicSpline


def line(*points):
    """Return the path of a pen that goes straight from point to point, (N, 2); y runs downwards."""
    return np.concatenate([np.linspace(a, b, 60) for a, b in itertools.pairwise(points)])


def curve(*points):
    """Return the path of a pen that goes through the points without a corner, (N, 2)."""
    points = np.asarray(points, float)
    distance = np.concatenate([[0], np.linalg.norm(np.diff(points, axis=0), axis=1).cumsum()])
    return CubicSpline(distance, points)(np.linspace(0, distance[-1], 240))


def arc(x, y, width, height, start, stop):
    """Return a part of an ellipse, from one angle to another in degrees: 0 is right, 90 is down."""
    angle = np.radians(np.linspace(start, stop, 240))
    return np.stack([x + width / 2 * np.cos(angle), y + height / 2 * np.sin(angle)], axis=1)


# The ways in which people write each digit: strokes in a box whose height is 1.
SHAPES = {
    0: [
        [arc(0.3, 0.5, 0.6, 1, -90, -455)],  # closed, the end beyond the beginning
        [arc(0.22, 0.5, 0.44, 1, -75, -420)],  # narrow, not quite closed
        [arc(0.4, 0.5, 0.8, 0.95, -100, -460)],  # round
    ],
    1: [
        [line((0, 0), (0, 1))],
        [line((-0.22, 0.25), (0, 0), (0, 1))],
        [line((-0.22, 0.22), (0, 0), (0, 1)), line((-0.25, 1), (0.25, 1))],  # with a foot
    ],
    2: [
        [curve((0.02, 0.25), (0.28, 0), (0.55, 0.25), (0.35, 0.6), (0, 1)), line((0, 1), (0.62, 1))],
        [curve((0.03, 0.22), (0.3, 0), (0.55, 0.25), (0.3, 0.7), (0.1, 0.98), (0.02, 0.9), (0.15, 0.82), (0.35, 0.95),
               (0.65, 0.97))],  # with a loop
        [curve((0.05, 0.15), (0.3, 0.02), (0.5, 0.2), (0.42, 0.5), (0.05, 0.97)),
         curve((0.05, 0.97), (0.3, 0.93), (0.6, 1))],
    ],
    3: [
        [curve((0.03, 0.12), (0.28, 0), (0.5, 0.2), (0.2, 0.46)),
         curve((0.2, 0.46), (0.55, 0.7), (0.28, 1), (0, 0.88))],
        [line((0.02, 0.02), (0.52, 0.02), (0.22, 0.42)),
         curve((0.22, 0.42), (0.56, 0.68), (0.28, 1), (0, 0.9))],  # with a flat top
        [curve((0.05, 0.1), (0.3, 0), (0.48, 0.22), (0.3, 0.45), (0.25, 0.48), (0.32, 0.5), (0.54, 0.75), (0.25, 1),
               (0, 0.9))],
    ],
    4: [
        [line((0.12, 0), (0, 0.6), (0.6, 0.6)), line((0.42, 0.25), (0.4, 1))],  # open
        [line((0.42, 0), (0, 0.66), (0.62, 0.66)), line((0.42, 0), (0.42, 1))],  # closed
        [curve((0.08, 0.02), (0.03, 0.35), (0.12, 0.5), (0.45, 0.45)), line((0.48, 0.02), (0.42, 1))],  # like a y
    ],
    5: [
        [line((0.1, 0.02), (0.06, 0.42)), curve((0.06, 0.42), (0.3, 0.36), (0.52, 0.65), (0.3, 0.98), (0, 0.9)),
         line((0.1, 0.02), (0.52, 0))],
        [line((0.55, 0.02), (0.12, 0), (0.08, 0.45)),
         curve((0.08, 0.45), (0.35, 0.4), (0.55, 0.7), (0.25, 1), (0, 0.92))],
        [curve((0.1, 0.08), (0.06, 0.42), (0.3, 0.4), (0.5, 0.68), (0.28, 0.98), (0, 0.9)),
         line((0.16, 0.0), (0.58, -0.04))],  # the bar does not touch the rest
    ],
    6: [
        [curve((0.45, 0), (0.12, 0.35), (0.02, 0.75), (0.28, 1), (0.52, 0.76), (0.3, 0.55), (0.05, 0.75))],
        [curve((0.3, 0), (0.08, 0.45), (0.06, 0.85), (0.3, 1), (0.5, 0.8), (0.32, 0.6), (0.08, 0.82))],
        [curve((0.5, 0.06), (0.25, 0.08), (0.03, 0.6), (0.25, 1), (0.5, 0.75), (0.28, 0.52), (0.04, 0.68))],
    ],
    7: [
        [line((0, 0.02), (0.58, 0), (0.2, 1))],
        [line((0, 0.02), (0.58, 0), (0.2, 1)), line((0.15, 0.5), (0.58, 0.48))],  # with a bar
        [line((0, 0.14), (0.02, 0), (0.58, 0.02)), curve((0.58, 0.02), (0.35, 0.45), (0.25, 1))],  # with a hook
    ],
    8: [
        [curve((0.46, 0.12), (0.25, 0), (0.06, 0.2), (0.28, 0.46), (0.54, 0.76), (0.28, 1), (0.02, 0.77), (0.27, 0.46),
               (0.48, 0.22), (0.42, 0.08))],
        [arc(0.29, 0.23, 0.44, 0.46, -90, -460), arc(0.29, 0.73, 0.56, 0.54, -90, -460)],  # two rings
    ],
    9: [
        [arc(0.26, 0.27, 0.5, 0.52, -30, -400), line((0.5, 0.15), (0.46, 1))],  # with a straight stem
        [curve((0.48, 0.15), (0.25, 0), (0.03, 0.26), (0.24, 0.5), (0.48, 0.2)),
         curve((0.48, 0.2), (0.46, 0.7), (0.22, 1), (0.03, 0.92))],
        [curve((0.5, 0.1), (0.22, 0.02), (0.04, 0.3), (0.25, 0.5), (0.5, 0.12), (0.42, 0.6), (0.3, 1))],
    ],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pen:
    """A pen.

    Attributes:
      width: The width of its strokes, as a fraction of the digit's height.
      colour: Red, green and blue, in 0..255.
      pressure: The fraction of the width by which the width varies.
      grain: The fraction of the paper that shows through.
    """

    width: float
    colour: tuple[int, int, int]
    pressure: float = 0.1
    grain: float = 0.0


DARK_PENS = [
    Pen(0.035, (25, 35, 120)),  # a ballpoint
    Pen(0.05, (90, 90, 95), grain=0.35),  # a pencil
    Pen(0.08, (10, 10, 10)),  # a felt-tip
    Pen(0.07, (190, 20, 30)),
    Pen(0.06, (10, 120, 50), pressure=0.3),
    Pen(0.1, (20, 20, 30), pressure=0.45),  # a brush
    Pen(0.15, (0, 0, 0)),  # a marker
]
LIGHT_PENS = [
    Pen(0.08, (235, 235, 230), grain=0.3),  # chalk
    Pen(0.06, (255, 255, 255)),
    Pen(0.09, (250, 220, 60)),
]
LIGHT_PAPERS = ["white", "lamp", "shadow", "squared", "grey", "kraft", "grainy"]
DARK_PAPERS = ["board", "slate"]


def draw_digit(rng: np.random.Generator, strokes: list[np.ndarray], pen: Pen, paper: str) -> Image.Image:
    """Draw a digit at a random position, size and angle."""
    width, height = (int(side) for side in np.exp(rng.uniform(np.log(64), np.log(1000), size=2)))
    width, height = max(width, height // 3), max(height, width // 3)
    size = rng.uniform(0.35, 0.8) * min(width, height)
    strokes = _by_hand(rng, strokes)
    low, high = (function([function(stroke, axis=0) for stroke in strokes], axis=0) for function in (np.min, np.max))
    scale = size / (high - low).max()
    room = np.array([width, height]) - scale * (high - low)
    margin = np.minimum(scale * pen.width, room / 2)
    corner = rng.uniform(margin, room - margin)
    covered = np.zeros((height, width), np.float32)
    for stroke in strokes:
        trail = _trail(rng, (stroke - low) * scale + corner, pen, scale, (width, height))
        covered = np.maximum(covered, trail)
    holes = ndimage.gaussian_filter(rng.random((height, width)), 0.7)
    covered = covered * np.where(holes < np.quantile(holes, pen.grain), 0.3, 1)
    colours = _paper(rng, paper, width, height)
    light = colours.mean(axis=-1, keepdims=True).clip(1) / colours.mean()
    ink = np.array(pen.colour) * (light if colours.mean() > 127 else 1)
    mixed = colours * (1 - covered[..., np.newaxis]) + ink * covered[..., np.newaxis]
    noisy = mixed + rng.normal(0, rng.uniform(0, 4), mixed.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _by_hand(rng, strokes):
    """Turn, slant and stretch all strokes alike, and let each tremble and shift a little."""
    angle, slant, stretch = np.radians(rng.uniform(-8, 8)), rng.uniform(-0.15, 0.25), rng.uniform(0.8, 1.3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shape = turn @ np.array([[1, -slant], [0, 1]]) @ np.diag([stretch, 1])
    drawn = []
    for stroke in strokes:
        tremble = ndimage.gaussian_filter1d(rng.normal(size=stroke.shape), 25, axis=0, mode="nearest")
        drawn.append((stroke + 0.15 * tremble + rng.normal(0, 0.012, 2)) @ shape.T)
    return drawn


def _trail(rng, path, pen, scale, size):
    """Return what a stroke covers, (H, W) in [0, 1]: round dots side by side, drawn at twice the size."""
    mask = Image.new("L", (2 * size[0], 2 * size[1]))
    draw = ImageDraw.Draw(mask)
    pressure = ndimage.gaussian_filter1d(rng.normal(size=len(path)), len(path) / 12, mode="nearest")
    pressure = 1 + pen.pressure * pressure / max(np.abs(pressure).max(), 1e-6)
    steps = np.arange(0, len(path) - 1, 0.1)
    points = np.stack([np.interp(steps, np.arange(len(path)), axis) for axis in path.T], axis=1)
    radii = np.maximum(np.interp(steps, np.arange(len(path)), pressure) * pen.width * scale, 1.5)
    for (x, y), radius in zip(2 * points, radii, strict=True):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(mask.resize(size, Image.Resampling.BOX), np.float32) / 255


def _paper(rng, kind, width, height):
    """Return a sheet of paper, (H, W, 3), in 0..255."""
    rows, columns = np.linspace(0, 1, height)[:, np.newaxis], np.linspace(0, 1, width)[np.newaxis, :]
    sheet = np.full((height, width, 3), 250.0)
    if kind == "lamp":  # light from one side
        angle = rng.uniform(0, 2 * np.pi)
        sheet *= (0.72 + 0.28 * (np.cos(angle) * (columns - 0.5) + np.sin(angle) * (rows - 0.5) + 0.5))[..., np.newaxis]
    elif kind == "shadow":  # of a hand, its border soft
        border = rng.uniform(0.3, 0.7) + rng.uniform(-0.3, 0.3) * rows
        sheet *= (0.62 + 0.36 / (1 + np.exp(-(columns - border) * 18)))[..., np.newaxis]
    elif kind == "squared":
        pitch = int(rng.integers(18, 40))
        sheet[::pitch] = sheet[:, ::pitch] = (190, 205, 230)
    elif kind == "grey":
        sheet[:] = 176
    elif kind == "kraft":
        sheet[:] = (196, 164, 120)
        sheet += 14 * ndimage.gaussian_filter(rng.normal(size=(height, width)), 1.2)[..., np.newaxis] * 2
    elif kind == "grainy":
        sheet += rng.normal(0, 14, sheet.shape) - 18
    elif kind == "board":
        sheet[:] = (32, 62, 50)
        sheet += 60 * ndimage.gaussian_filter(rng.random((height, width)) - 0.5, 8)[..., np.newaxis]
    elif kind == "slate":
        sheet[:] = (24, 26, 48)
    return sheet.clip(0, 255)


def draw_digits(folder: Path, seed: int = 0) -> list[tuple[Path, int]]:
    """Draw every shape with three pens on papers of all kinds, and return the files and what each shows."""
    rng = np.random.default_rng(seed)
    drawn = []
    for digit, shapes in SHAPES.items():
        for variant, strokes in enumerate(shapes):
            for copy, (pens, papers) in enumerate([(DARK_PENS, LIGHT_PAPERS)] * 2 + [(LIGHT_PENS, DARK_PAPERS)]):
                pen, paper = pens[rng.integers(len(pens))], papers[rng.integers(len(papers))]
                file = folder / f"{digit}-{variant}-{copy}.{'png' if len(drawn) % 2 else 'jpg'}"
                draw_digit(rng, strokes, pen, paper).save(file)
                drawn.append((file, digit))
    return drawn


def pixel_difference(digit: np.ndarray, other: np.ndarray) -> float:
    """Return the mean difference of two digits' pixels, at the best shift by up to one pixel."""
    moved = [np.roll(digit, (down, right), axis=(0, 1)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return min(np.abs(digit - other).mean() for digit in moved)


if __name__ == "__main__":
    for file, digit in draw_digits(Path(sys.argv[1])):
        print(file, digit)
