"""Fixtures that the tests of trained networks share."""

import numpy as np
import pytest

from cnn_jax.inference.pretrained import load_trained
from tests.digits import DARK_PENS, SHAPES, draw_digit
from tests.helpers import read_digit


@pytest.fixture(scope="session")
def packaged():
    """The network in the package."""
    return load_trained(None, None, pytest.fail)


@pytest.fixture(scope="session")
def plain():
    """A grey picture of a digit, dark on light."""
    return draw_digit(np.random.default_rng(3), SHAPES[2][0], DARK_PENS[2], "white").convert("L")


@pytest.fixture
def read(tmp_path):
    """Save a picture, with options, and return the digit that is read in the file: (28, 28), int."""

    def save_and_read(picture, name="digit.png", **options):
        picture.save(tmp_path / name, **options)
        return read_digit(str(tmp_path / name))[..., 0].astype(int)

    return save_and_read
