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
from scipy.spatial import cKDTree


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
    return _on_paper(rng, covered, pen, _paper(rng, paper, width, height))


def _on_paper(rng, covered, pen, colours):
    """Mix ink, which covers (H, W) in [0, 1] of a sheet, with the sheet's colours, (H, W, 3) in 0..255."""
    holes = ndimage.gaussian_filter(rng.random(covered.shape), 0.7)
    covered = covered * np.where(holes < np.quantile(holes, pen.grain), 0.3, 1)
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


def draw_strokes(rng, strokes, pen, height, size):
    """Return what the strokes of digits of a height in pixels cover, (H, W) in [0, 1], of a sheet of (W, H)."""
    return np.max([_trail(rng, stroke, pen, height, size) for stroke in strokes], axis=0)


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
    elif kind == "ruled":
        sheet[int(rng.integers(20)) :: int(rng.integers(30, 60))] = (150, 175, 215)
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


# How the digits of a number are written, and how many such pictures `draw_numbers` draws.
MANNERS = ("apart", "touching", "broken", "ruled", "squared", "shadow", "cells", "form")
NUMBERS_PER_MANNER = 8


def draw_number(rng: np.random.Generator, manner: str) -> tuple[Image.Image, list[list[int]]]:
    """Draw digits in one to three lines, and return the picture and the digits of each line."""
    height = rng.uniform(45, 90)  # of a digit, in pixels
    lines = [
        rng.integers(10, size=rng.integers(2, 6)).tolist() for _ in range(rng.integers(1, 3 if height > 60 else 4))
    ]
    pen = DARK_PENS[rng.integers(len(DARK_PENS) - 1)]
    paper = manner if manner in ("ruled", "squared", "shadow") else LIGHT_PAPERS[rng.integers(2)]
    if manner == "cells":  # one digit in a square of a larger frame, whose lines run out of the picture
        return _cell(rng, int(rng.integers(10)), pen)
    pitch = 1.3 * height if manner == "form" else 0.0
    strokes, boxes, bottom = [], [], 0.5 * height
    for line_digits in lines:
        right, last = rng.uniform(0.4, 1) * height, []
        for digit in line_digits:
            drawn = _scaled(rng, digit, height * rng.uniform(0.85, 1.1))
            width = np.max([stroke[:, 0].max() for stroke in drawn])
            if pitch:
                boxes.append((right, bottom, right + pitch, bottom + 1.4 * height))
                left, top = right + (pitch - width) / 2, bottom + 0.15 * height
                right += pitch
            else:
                left, top = right, bottom + rng.uniform(0, 0.12) * height
                right = left + width + (rng.uniform(0.18, 0.5) + pen.width) * height
                if manner == "touching" and last:
                    left += _way_to_touch(last, drawn, (left, top), 0.8 * pen.width * height)
                    right = left + width + height
            last = [stroke + np.array([left, top]) for stroke in drawn]
            strokes += last
        bottom += rng.uniform(1.45, 1.8) * height
    size = (
        int(max(stroke[:, 0].max() for stroke in strokes) + rng.uniform(0.5, 1.5) * height),
        int(bottom + 0.2 * height),
    )
    if manner == "broken":
        strokes = [part for stroke in strokes for part in _broken(rng, stroke, pen.width * height)]
    covered = draw_strokes(rng, strokes, pen, height, size)
    sheet = _paper(rng, paper, *size)
    for left, top, right, below in boxes:
        _draw_frame(sheet, left, top, right, below)
    return _on_paper(rng, covered, pen, sheet), lines


def _way_to_touch(before, drawn, corner, distance):
    """Return how far right strokes move, mostly to the left, until they are at this distance of those before them."""
    tree, points = cKDTree(np.concatenate(before)), np.concatenate(drawn) + np.array(corner)
    ways = np.arange(0.0, -2 * np.ptp(points[:, 0]) - 200, -0.5)
    return next((way for way in ways if tree.query(points + np.array([way, 0]))[0].min() <= distance), 0.0)


def _scaled(rng, digit, height):
    """Return the strokes of a digit by hand, of this height in pixels, from (0, 0) on."""
    shapes = SHAPES[digit]
    strokes = _by_hand(rng, shapes[rng.integers(len(shapes))])
    low, high = (function([function(stroke, axis=0) for stroke in strokes], axis=0) for function in (np.min, np.max))
    return [(stroke - low) * height / (high - low).max() for stroke in strokes]


def _broken(rng, stroke, width):
    """Lift the pen once in the middle of a stroke, for about its width."""
    length = np.concatenate([[0], np.linalg.norm(np.diff(stroke, axis=0), axis=1).cumsum()])
    middle = rng.uniform(0.3, 0.7) * length[-1]
    before, after = length < middle - width, length > middle + width
    return [part for part in (stroke[before], stroke[after]) if len(part) > 10]


def _cell(rng, digit, pen):
    side = int(rng.integers(60, 160))
    sheet = _paper(rng, "lamp", side, side)
    margin = rng.uniform(-0.02, 0.05) * side  # the frame's lines, of which some run along the picture's edges
    _draw_frame(sheet, margin, margin, side - margin, side - margin, width=max(1, side // 40))
    height = rng.uniform(0.45, 0.7) * side
    strokes = _scaled(rng, digit, height)
    room = side - np.max([stroke.max(axis=0) for stroke in strokes], axis=0)
    strokes = [stroke + room * rng.uniform(0.4, 0.6, 2) for stroke in strokes]
    covered = draw_strokes(rng, strokes, pen, height, (side, side))
    return _on_paper(rng, covered, pen, sheet), [[digit]]


def _draw_frame(sheet, left, top, right, bottom, *, width=2):
    """Print the four lines of a box on a sheet of paper."""
    height, breadth = sheet.shape[:2]
    rows = np.arange(height)[:, np.newaxis] + 0.5
    columns = np.arange(breadth)[np.newaxis, :] + 0.5
    inside = (rows > top - width) & (rows < bottom + width) & (columns > left - width) & (columns < right + width)
    hollow = (rows > top) & (rows < bottom) & (columns > left) & (columns < right)
    sheet[inside & ~hollow] = (60, 60, 65)


def draw_numbers(folder: Path, seed: int = 1) -> list[tuple[Path, list[list[int]]]]:
    """Draw pictures of several digits in every manner, and return the files and the lines of digits in each."""
    rng = np.random.default_rng(seed)
    drawn = []
    for manner in MANNERS:
        for copy in range(NUMBERS_PER_MANNER):
            picture, lines = draw_number(rng, manner)
            picture.save(folder / f"{manner}-{copy}.png")
            drawn.append((folder / f"{manner}-{copy}.png", lines))
    return drawn


NO_DIGITS = ("speck", "noise", "blank", "scribble", "fragment", "photograph")


def draw_no_digit(rng: np.random.Generator, kind: str) -> Image.Image:
    """Draw a picture in which there is no digit."""
    width, height = (int(side) for side in rng.integers(64, 400, size=2))
    width, height = max(width, height // 2), max(height, width // 2)
    side = min(width, height)
    pen = DARK_PENS[rng.integers(len(DARK_PENS) - 1)]
    paper = _paper(rng, LIGHT_PAPERS[rng.integers(4)], width, height)
    corner = np.array([width, height]) * rng.uniform(0.25, 0.4)
    if kind == "photograph":
        return _photograph(rng, width, height)
    covered = np.zeros((height, width))
    if kind == "noise":
        paper = paper + rng.normal(0, rng.uniform(10, 60), paper.shape)
    elif kind == "speck":
        for _ in range(rng.integers(1, 4)):
            rows, columns = np.indices((height, width))
            radius = side * rng.uniform(0.005, 0.03, 2)
            middle = rng.uniform(0.1, 0.9, 2) * (height, width)
            covered[((rows - middle[0]) / radius[0]) ** 2 + ((columns - middle[1]) / radius[1]) ** 2 < 1] = 1
    elif kind == "scribble":
        points = rng.uniform(0, 0.5, (rng.integers(8, 25), 2)) * side
        covered = _trail(rng, curve(*points) + corner, pen, side / 2, (width, height))
    elif kind == "fragment":  # of letters: some of a few straight and bent strokes, as none of the digits has
        shapes = [
            [line((0, 0), (0.25, 1)), line((0.25, 1), (0.5, 0)), line((0.5, 0), (0.75, 1)), line((0.75, 1), (1, 0))],
            [line((0, 0), (0, 1)), line((0.6, 0), (0.6, 1)), line((0, 0.5), (0.6, 0.5))],
            [line((0, 0), (0.7, 1)), line((0.7, 0), (0, 1))],
            [line((0, 0), (0, 1)), line((0, 0), (0.6, 0)), line((0, 0.5), (0.5, 0.5)), line((0, 1), (0.6, 1))],
            [line((0, 1), (0, 0)), line((0, 0), (0.4, 0.6)), line((0.4, 0.6), (0.8, 0)), line((0.8, 0), (0.8, 1))],
            [line((0, 0), (0.8, 0)), line((0.4, 0), (0.4, 1))],
            [line((0, 0), (0, 1)), line((0.6, 0), (0, 0.5)), line((0, 0.5), (0.6, 1))],
            [arc(0.4, 0.5, 0.8, 1, -60, -300), line((0.4, 0.55), (0.8, 0.55)), line((0.8, 0.55), (0.8, 1))],
        ]
        strokes = [stroke * side * 0.5 + corner for stroke in _by_hand(rng, shapes[rng.integers(len(shapes))])]
        covered = draw_strokes(rng, strokes, pen, side / 2, (width, height))
    return _on_paper(rng, covered, pen, paper.clip(0, 255))


def _photograph(rng, width, height):
    """Draw a scene: soft light, some things of any colour and shape before it, and the grain of all of them."""
    light = ndimage.gaussian_filter(rng.random((height, width, 3)), (height / 6, width / 6, 0), mode="wrap")
    light = 40 + 180 * (light - light.min()) / np.ptp(light)
    picture = Image.fromarray(light.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(4, 12)):
        middle, extent = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0.1, 0.5, 2) * (width, height)
        colour = tuple(int(value) for value in rng.integers(20, 235, 3))
        corners = [tuple(middle - extent / 2), tuple(middle + extent / 2)]
        angles = np.sort(rng.uniform(0, 2 * np.pi, 5))
        polygon = [tuple(middle + extent / 2 * (np.cos(angle), np.sin(angle))) for angle in angles]
        (draw.ellipse(corners, colour) if rng.random() < 0.5 else draw.polygon(polygon, colour))
    grain = ndimage.gaussian_filter(rng.normal(0, 25, (height, width, 1)), (1, 1, 0))
    blurred = ndimage.gaussian_filter(np.asarray(picture, np.float32), (1.5, 1.5, 0)) + grain
    return Image.fromarray(blurred.clip(0, 255).astype(np.uint8))


def draw_no_digits(folder: Path, count: int = 200, seed: int = 2) -> list[Path]:
    """Draw as many pictures without a digit, of all kinds in turn, and return the files."""
    rng = np.random.default_rng(seed)
    files = [folder / f"{NO_DIGITS[i % len(NO_DIGITS)]}-{i}.png" for i in range(count)]
    for i, file in enumerate(files):
        draw_no_digit(rng, NO_DIGITS[i % len(NO_DIGITS)]).save(file)
    return files


def pixel_difference(digit: np.ndarray, other: np.ndarray) -> float:
    """Return the mean difference of two digits' pixels, at the best shift by up to one pixel."""
    moved = [np.roll(digit, (down, right), axis=(0, 1)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return min(np.abs(digit - other).mean() for digit in moved)


if __name__ == "__main__":
    for file, digit in draw_digits(Path(sys.argv[1])):
        print(file, digit)
