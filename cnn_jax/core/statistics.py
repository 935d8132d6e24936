"""Means with their 95 % intervals: of one sample, and of the difference of two."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import scipy  # whose stats, which take half a second to import, come when they are first used


class MeanInterval(NamedTuple):
    """The mean of the results of several seeds, and how sure it is.

    Attributes:
      mean: Their mean.
      standard_deviation: The sample's, with n - 1 in its denominator.
      standard_error: The mean's: the standard deviation divided by the square root of n.
      low: The lower end of the mean's 95 % interval, by Student's distribution with n - 1 degrees of freedom.
      high: The upper end.
    """

    mean: float
    standard_deviation: float
    standard_error: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Return the mean of at least two values and its interval (Student, Biometrika 6, 1908)."""
    mean, deviation, error = statistics.fmean(values), statistics.stdev(values), float(scipy.stats.sem(values))
    if error == 0:  # SciPy divides by it
        return MeanInterval(mean, deviation, error, mean, mean)
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    return MeanInterval(mean, deviation, error, float(low), float(high))


def difference_interval(left: Sequence[float], right: Sequence[float]) -> dict[str, float]:
    """Return the difference of two means, left minus right, and its 95 % interval: `mean`, `low` and `high`.

    The samples, of at least two values each, are independent, and their variances may differ: the interval is Welch's
    (Biometrika 34, 1947).
    """
    difference = statistics.fmean(left) - statistics.fmean(right)
    if statistics.variance(left) == statistics.variance(right) == 0:  # SciPy divides by their sum
        return {"mean": difference, "low": difference, "high": difference}
    low, high = scipy.stats.ttest_ind(left, right, equal_var=False).confidence_interval()
    return {"mean": difference, "low": float(low), "high": float(high)}
