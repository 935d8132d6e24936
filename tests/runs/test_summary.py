"""The intervals are Student's and Welch's, also where all values are equal."""

import math

import pytest
from scipy import stats

from cnn_jax.runs.summary import difference_interval, equivalence_p, mean_interval

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
    p_value = 2 * stats.t.sf(abs(mean) / math.sqrt(sum(parts)), freedom)
    assert difference_interval(LEFT, RIGHT) == pytest.approx((mean, mean - half, mean + half, p_value))


def test_the_difference_of_pairs_has_students_interval():
    # Differences 1, 2 and 3: mean 2, standard error 1 / sqrt(3), t = 2 sqrt(3); with two degrees of freedom the
    # distribution has a closed form, 1 - t / sqrt(2 + t^2) on both sides.
    interval = difference_interval([11, 7, 33], [10, 5, 30], paired=True)
    half, t = 4.302653 / math.sqrt(3), 2 * math.sqrt(3)
    assert interval == pytest.approx((2, 2 - half, 2 + half, 1 - t / math.sqrt(2 + t**2)))


def test_equal_values_have_an_interval_of_no_width_and_no_test():
    assert mean_interval([0.5, 0.5]) == (0.5, 0, 0, 0.5, 0.5)
    assert mean_interval([0.1] * 3)[1:3] == (0, 0)  # of which rounding makes some more
    assert difference_interval([1.0, 1.0], [0.5, 0.5]) == (0.5, 0.5, 0.5, None)
    assert difference_interval([7, 3], [7, 3], paired=True) == (0, 0, 0, None)
    assert difference_interval([7, 3], [6, 2], paired=True) == (1, 1, 1, None)


def test_a_sample_may_be_the_only_one_that_varies():
    interval = difference_interval([2.0, 2.0, 2.0], [0.0, 1.0, 2.0])  # one sample against a number
    half, t = 4.302653 / math.sqrt(3), math.sqrt(3)
    assert interval == pytest.approx((1, 1 - half, 1 + half, 1 - t / math.sqrt(2 + t**2)))


def test_equivalence_is_two_one_sided_tests_of_which_the_worse_counts():
    parts = [stats.tvar(values) / len(values) for values in (LEFT, RIGHT)]
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (LEFT, RIGHT), strict=True))
    error, mean = math.sqrt(sum(parts)), sum(LEFT) / 3 - sum(RIGHT) / 4
    for margin in (0.0005, 0.0015, 0.01):
        expected = stats.t.sf((margin - abs(mean)) / error, freedom)
        assert equivalence_p(LEFT, RIGHT, margin) == pytest.approx(expected)
        assert equivalence_p(RIGHT, LEFT, margin) == pytest.approx(expected)
    assert equivalence_p([0.5, 0.5], [0.5, 0.5], 0.1) == 0
    assert equivalence_p([0.5, 0.5], [0.7, 0.7], 0.1) == 1
