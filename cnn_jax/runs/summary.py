"""What a run shows and writes about itself: its task, its progress and its result."""

import statistics
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import scipy  # whose stats, which take half a second to import, come when they are first used

from cnn_jax.core.evaluation import Evaluation
from cnn_jax.data.dataset import Dataset
from cnn_jax.runs.folder import EpochMetrics, RunFolder
from cnn_jax.runs.program import Program, Progress
from cnn_jax.runs.restore import TrainedRun
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runtime.devices import describe_devices, describe_machine
from cnn_jax.runtime.display import Display, Stopwatch, describe_values
from cnn_jax.runtime.streams import write_failure


def introduce(settings: TrainSettings, dataset: Dataset, program: Program, display: Display) -> None:
    """Show what will be trained, and on which data."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(program.start).params)) // settings.seeds
    display.say(describe_task(dataset, parameters))
    if dataset.reading:
        display.say(f"{dataset.name}: {dataset.reading}")
    if missing := [
        dataset.class_names[i] for i in np.flatnonzero(~np.isin(range(dataset.num_classes), dataset.train_labels))
    ]:
        display.say(
            f"warning: no training image has the class {textwrap.shorten(', '.join(missing), 60, placeholder=' ...')}"
        )
    how = "Adam at" if settings.recipe == "tutorial" else f"recipe {settings.recipe}, learning rate"
    numbers = ", ".join([f"{settings.learning_rate:g}", *settings.hyperparameters])
    held_out = f"; {settings.validation:,} training images held out" if settings.validation else ""
    display.say(
        f"{settings.run_folder}: {settings.epochs:g} epochs of {program.steps_per_epoch:,} steps, "
        f"batch {settings.batch_size}, {how} {numbers}, {settings.precision}, "
        f"{settings.which_seeds}{held_out}"
    )


def describe_task(dataset: Dataset, parameters: int) -> str:
    """Return, in a sentence, what a network of so many parameters learns from."""
    size = "x".join(map(str, dataset.train_images.shape[1:]))
    return (
        f"{dataset.name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images, "
        f"{size}, {dataset.num_classes} classes; network of {parameters:,} parameters"
    )


def show_segment(
    display: Display, settings: TrainSettings, program: Program, progress: Progress, begin: int, seconds: float
) -> None:
    """Move the progress bar, after so many seconds since the step at which this epoch began or was continued."""
    epoch, taken = divmod(progress.step - 1, program.steps_per_epoch)
    display.advance(
        epoch=epoch + 1,
        epochs=program.epochs,
        step=progress.step,
        cost=float(progress.losses[:, : taken + 1].mean(dtype=np.float64)),
        examples_per_second=speed(settings, progress.step - begin, seconds),
    )


def epoch_metrics(
    settings: TrainSettings,
    program: Program,
    progress: Progress,
    tests: list[Evaluation],
    begin: int,
    seconds: float,
    compile_seconds: float,
) -> EpochMetrics:
    """Return the numbers of the epoch that a run has just ended, begun or continued at the step `begin`."""
    epoch, last = divmod(progress.step - 1, program.steps_per_epoch)
    return EpochMetrics(
        epoch=epoch + 1,
        step=progress.step,
        cost=progress.losses[:, : last + 1].mean(axis=1, dtype=np.float64).tolist(),
        accuracy=[test.accuracy for test in tests],
        loss=[test.loss for test in tests],
        tested_on="test" if settings.validation is None else "validation",
        seconds=seconds,
        examples_per_second=speed(settings, progress.step - begin, seconds),
        step_milliseconds=1e3 * seconds / (progress.step - begin),
        compile_seconds=compile_seconds,
    )


def speed(settings: TrainSettings, steps: int, seconds: float) -> float:
    """Return the images of all seeds trained per second."""
    return steps * settings.batch_size * settings.seeds / seconds


def show_epoch(display: Display, program: Program, metrics: EpochMetrics) -> None:
    """Show an epoch that is done."""
    display.epoch_cost(metrics.epoch, statistics.fmean(metrics.cost))
    display.epoch_line(
        epoch=metrics.epoch,
        epochs=program.epochs,
        tested_on=metrics.tested_on,
        accuracy=statistics.fmean(metrics.accuracy),
        examples_per_second=metrics.examples_per_second,
        left=(program.last_step - metrics.step) * metrics.step_milliseconds / 1e3,
    )


class Result(NamedTuple):
    """A run at its end.

    Attributes:
      run: Its settings, program, states and data, and what they depend on.
      accuracies: Each seed's accuracy on the test images, in [0, 1].
      unscaled_accuracies: The same on pixels in 0..255, as the tutorial tests; None for data without a tutorial.
      trained_here: Whether this process trained it, or found it finished.
    """

    run: TrainedRun
    accuracies: list[float]
    unscaled_accuracies: list[float] | None
    trained_here: bool


def write_result(result: Result, folder: RunFolder, clock: Stopwatch) -> None:
    """Write result.json: what the run came to, where this process spent its time, on what, and what it could not show.

    A process that found the run finished writes it only where it is missing or holds other numbers.
    """
    accuracies, settings = result.accuracies, result.run.settings
    content: dict = {}
    if settings.validation is not None:
        content["validation_accuracy"] = statistics.fmean(result.run.metrics[-1].accuracy)
    content["test_accuracy"] = statistics.fmean(accuracies)
    if result.unscaled_accuracies is not None:
        content["unscaled_test_accuracy"] = statistics.fmean(result.unscaled_accuracies)
    if len(accuracies) > 1:
        by_seed = enumerate(accuracies, start=settings.seed)
        content["seeds"] = [{"seed": seed, "test_accuracy": accuracy} for seed, accuracy in by_seed]
        content["spread"] = mean_interval(accuracies)._asdict()
    content["step"] = result.run.step
    if not result.trained_here and folder.holds_result(content):
        return
    content["seconds"] = clock.seconds
    content |= {"machine": describe_machine(), "device": describe_devices(), "versions": result.run.meta["versions"]}
    failure = write_failure(sys.stderr)
    lost = [f"standard error: {failure.strerror}" if failure else None, folder.unwritten]
    if any(lost):
        content["not_shown"] = "; ".join(filter(None, lost))
    folder.write_result(content)


def result_rows(result: Result) -> list[tuple[str, str]]:
    """Return a run's result as names and values."""
    trained, accuracies = result.run, result.accuracies
    count = len(trained.dataset.test_labels)
    rows = [("test accuracy", f"{describe_values(accuracies)} on pixels in [0, 1], of {count:,} images")]
    if result.unscaled_accuracies is not None:
        rows.append(("as the tutorial tests", f"{describe_values(result.unscaled_accuracies)} on pixels in 0..255"))
    if trained.metrics and trained.metrics[-1].tested_on == "validation":
        validated = describe_values(trained.metrics[-1].accuracy)
        rows.append(("validation accuracy", f"{validated} of {trained.settings.validation:,} images"))
    if len(accuracies) > 1:
        interval = mean_interval(accuracies)
        rows += [
            ("standard error", f"{interval.standard_error:.5f}"),
            ("95 % interval", f"{interval.low:.4f} to {interval.high:.4f}"),
            ("each seed", " ".join(f"{accuracy:.4f}" for accuracy in accuracies)),
        ]
    return rows


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
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    if deviation == 0:  # SciPy divides by it, or by what rounding makes of it
        return MeanInterval(mean, 0.0, 0.0, mean, mean)
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    return MeanInterval(mean, deviation, float(scipy.stats.sem(values)), float(low), float(high))


class Difference(NamedTuple):
    """The difference of two means, left minus right, and how sure it is.

    Attributes:
      mean: The difference.
      low: The lower end of its 95 % interval; the difference itself where nothing varies.
      high: The upper end.
      p_value: The test's that there is none; None where nothing varies, which no test can judge.
    """

    mean: float
    low: float
    high: float
    p_value: float | None


def difference_interval(left: Sequence[float], right: Sequence[float], *, paired: bool = False) -> Difference:
    """Return the difference of the means of at least two values each.

    Pairs are tested by Student's t of their differences (Biometrika 6, 1908). Else the samples are independent, and
    their variances may differ: the test is Welch's (Biometrika 34, 1947).
    """
    difference = statistics.fmean(left) - statistics.fmean(right)
    differences = [a - b for a, b in zip(left, right, strict=True)] if paired else []
    if not any(map(statistics.pvariance, [differences] if paired else [left, right])):  # SciPy divides by their sum
        return Difference(difference, difference, difference, None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss")  # where one of two samples does not vary
        test = scipy.stats.ttest_rel(left, right) if paired else scipy.stats.ttest_ind(left, right, equal_var=False)
        low, high = test.confidence_interval()
    return Difference(difference, float(low), float(high), float(test.pvalue))


def equivalence_p(left: Sequence[float], right: Sequence[float], margin: float) -> float:
    """Return the p-value of the two one-sided tests that the means differ by less than a margin.

    The samples are independent and each test is Welch's; the larger p-value counts (Schuirmann, Journal of
    Pharmacokinetics and Biopharmaceutics 15, 1987).
    """
    if not any(map(statistics.pvariance, [left, right])):
        return float(abs(statistics.fmean(left) - statistics.fmean(right)) >= margin)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss")  # where one of two samples does not vary
        above = scipy.stats.ttest_ind(np.add(left, margin), right, equal_var=False, alternative="greater")
        below = scipy.stats.ttest_ind(np.subtract(left, margin), right, equal_var=False, alternative="less")
    return float(max(above.pvalue, below.pvalue))
