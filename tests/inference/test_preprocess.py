"""A digit is laid out alike whatever its paper, its light and its pen."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.digits import SHAPES, pixel_difference


def test_coloured_ink_as_bright_as_its_paper_is_seen(plain, read):
    ink = np.asarray(plain)[..., np.newaxis] < 128
    red_on_green = np.where(ink, (255, 0, 0), (0, 130, 0)).astype(np.uint8)
    assert np.ptp(np.asarray(Image.fromarray(red_on_green).convert("L"))) <= 1
    assert pixel_difference(read(Image.fromarray(red_on_green)), read(plain)) < 3


def drawn_with(width):
    """A large picture of a digit, written with a pen of this width in pixels."""
    picture = Image.new("L", (2000, 2000), 255)
    for stroke in SHAPES[2][0]:
        points = [tuple(point) for point in (stroke * 1400 + 300).tolist()]
        ImageDraw.Draw(picture).line(points, fill=0, width=width, joint="curve")
    return picture


@pytest.mark.parametrize("width", [2, 20, 60, 200])
def test_a_digit_written_with_another_pen_is_much_the_same(width, read):
    assert pixel_difference(read(drawn_with(width)), read(drawn_with(140))) < 12


def test_light_from_one_side_changes_little(plain, read):
    slope = np.linspace(0.4, 1, plain.width)[np.newaxis, :]
    lit = Image.fromarray((np.asarray(plain) * slope).astype(np.uint8))
    assert pixel_difference(read(lit), read(plain)) < 3


def framed(page):
    return np.pad(page, 12, constant_values=20)


def on_a_table(page):
    sheet = Image.fromarray(np.pad(page, ((0, 0), (40, 0)), constant_values=90))
    return np.asarray(sheet.rotate(4, fillcolor=90).rotate(-4, fillcolor=90))


def half_of_the_digit_in_shadow(page):
    rows, columns = np.indices(page.shape)
    middle = [indices.mean() for indices in np.nonzero(page < 128)]
    return np.maximum(page, 110) * np.where((rows > middle[0]) & (columns > middle[1]), 0.6, 1)


def ruled(page):
    rules = np.where(np.arange(len(page)) % 23 == 0, 190, 255)
    return np.minimum(page, rules[:, np.newaxis])


def dusty(page):
    return np.where(np.random.default_rng(4).random(page.shape) < 0.002, 60, page)


def grainy(page):
    return page * 0.8 + np.random.default_rng(5).normal(0, 8, page.shape)


def torn(page):
    """The digit, cut in two by a bar of paper."""
    return np.where(np.abs(np.arange(len(page)) - 0.45 * len(page))[:, np.newaxis] < 3, 250, page)


def in_pencil(page):
    """Ink with the holes that the paper's grain leaves."""
    return np.where(np.random.default_rng(6).random(page.shape) < 0.35, 250, page)


CHANGES = [framed, on_a_table, half_of_the_digit_in_shadow, ruled, dusty, grainy, torn, in_pencil]


@pytest.mark.parametrize("change", CHANGES)
def test_paper_light_and_surroundings_change_little(change, plain, read):
    page = np.pad(np.asarray(plain), 25, constant_values=250)
    changed = Image.fromarray(change(page).clip(0, 255).astype(np.uint8))
    assert pixel_difference(read(changed), read(Image.fromarray(page))) < 6


def test_a_digit_lies_in_the_middle_by_its_mass_and_is_20_pixels_long(plain, read):
    digit = read(plain)
    rows, columns = np.nonzero(digit.any(axis=1))[0], np.nonzero(digit.any(axis=0))[0]
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    weights = digit / digit.sum()
    # MNIST's centres are at 14, counted from 0 in the first pixel's middle.
    assert (weights.sum(axis=1) @ np.arange(28), weights.sum(axis=0) @ np.arange(28)) == pytest.approx(
        (14, 14), abs=0.51
    )
