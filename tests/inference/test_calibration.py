"""Stated probabilities are what they say where images were held out to find out."""

import numpy as np
import pytest

from cnn_jax.inference.logits import fit_temperature, probabilities, reliability
from cnn_jax.inference.predict import describe_probability


def labelled(rng, count, temperature):
    """Logits that state too much, and labels drawn from what they are divided by the temperature."""
    logits = rng.normal(0, 4, (count, 10)).astype(np.float32)
    chances = probabilities(logits, temperature)
    return logits, (chances.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1).clip(max=9)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_the_temperature_that_labels_were_drawn_with_is_found(temperature):
    rng = np.random.default_rng(0)
    logits, labels = labelled(rng, 20_000, temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    others, classes = labelled(rng, 20_000, temperature)
    assert reliability(probabilities(others, found), classes).error < 0.01


def test_the_error_is_the_mean_gap_between_what_is_stated_and_what_is_right():
    stated = np.array([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    labels = np.array([0] * 5 + [1] * 5 + [1] * 6 + [0] * 4)
    found = reliability(stated, labels)
    np.testing.assert_allclose(found.stated, [0.6, 0.9])
    np.testing.assert_allclose(found.right, [0.6, 0.5])
    assert found.images.tolist() == [10, 10]
    assert found.error == pytest.approx(0.2)


def test_no_probability_is_shown_as_certain():
    shown = [describe_probability(each) for each in (1.0, 0.99951, 0.9989, 0.5, 0.001, 0.0004, 0.0)]
    assert shown == [">99.9%", ">99.9%", "99.9%", "50.0%", "0.1%", "<0.1%", "<0.1%"]
