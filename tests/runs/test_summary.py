"""The intervals are Student's and Welch's, also where all values are equal."""

import math

import pytest
from scipy import stats

from cnn_jax.pytorch.compare import difference_interval
from cnn_jax.runs.summary import mean_interval

LEFT, RIGHT = [0.989, 0.9902, 0.9911], [0.9895, 0.9907, 0.99, 0.9889]


def test_a_means_interval_is_students():
    interval = mean_interval([1.0, 2.0, 4.0])
    deviation = math.sqrt(7 / 3)
    half = 4.302653 * deviation / math.sqrt(3)  # Student's t for two degrees of freedom
    assert interval == pytest.approx((7 / 3, deviation, deviation / math.sqrt(3), 7 / 3 - half, 7 / 3 + half))


def test_a_differences_interval_is_welchs():
    # Biometrika 34, 1947: s^2 = s1^2 / n1 + s2^2 / n2, and the degrees of freedom that follow from it.
    parts = [stats.tvar(values) / len(values) for values in (LEFT, RIGHT)]
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (LEFT, RIGHT), strict=True))
    half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    mean = sum(LEFT) / 3 - sum(RIGHT) / 4
    assert difference_interval(LEFT, RIGHT) == pytest.approx({"mean": mean, "low": mean - half, "high": mean + half})


def test_equal_values_have_an_interval_of_no_width():
    assert mean_interval([0.5, 0.5]) == (0.5, 0, 0, 0.5, 0.5)
    assert difference_interval([1.0, 1.0], [0.5, 0.5]) == {"mean": 0.5, "low": 0.5, "high": 0.5}
