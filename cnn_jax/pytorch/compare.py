"""Train in both frameworks from several seeds, each in its own process, and report the differences."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from cnn_jax.analysis.plots import plot_comparison
from cnn_jax.data.loading import load_dataset
from cnn_jax.pytorch.processes import PARTS, ComparedRun, ended_early, start_worker, train_in_pytorch
from cnn_jax.pytorch.variants import KEEP_MEMORY
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.summary import difference_interval, equivalence_p, mean_interval
from cnn_jax.runtime.devices import device_name, leave_out_absent_accelerators, start_devices, versions
from cnn_jax.runtime.display import Display, describe_seconds, escape_markdown, markdown_table
from cnn_jax.runtime.errors import RunLockedError
from cnn_jax.runtime.files import AlreadyLockedError, locked, read_file, write_atomically
from cnn_jax.runtime.records import NonEmpty, NotNegative, decode, encode, unreadable
from cnn_jax.runtime.signals import ending_together

FRAMEWORKS = ("cnn-jax", "PyTorch")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy", "python")
MARGIN = 0.0015  # accuracies that differ by less are equivalent: 15 of 10,000 images
STEPS, FLOAT64_STEPS = 600, 100  # over which the agreement from equal weights is measured: an epoch, and its beginning
# `python -m cnn_jax`, which ends with the process whose number is the first argument.
COMMAND = """
import signal, sys
for number in signal.SIGINT, signal.SIGQUIT, signal.SIGHUP:  # a terminal's reach the parent, too, which answers them
    signal.signal(number, signal.SIG_IGN)
from cnn_jax.__main__ import program
from cnn_jax.runtime.signals import end_with_parent
end_with_parent(int(sys.argv.pop(1)))
program()
"""
REMEDY = "delete it and run the same command again, which measures it anew"


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of the seeds' values, and their standard deviation."""

    mean: float
    standard_deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.standard_deviation:.4f}"


@dataclasses.dataclass(frozen=True)
class FrameworkResult:
    """All seeds of one framework.

    Attributes:
      accuracy: On test images with pixels in [0, 1].
      unscaled_accuracy: The same with pixels in 0..255.
      last_cost: The cost of the last epoch.
      seconds: The median of each part of the time, over the seeds that both frameworks timed; empty if there is none.
      runs: Each seed's result.
    """

    accuracy: Mean
    unscaled_accuracy: Mean
    last_cost: Mean
    seconds: dict[str, float]
    runs: list[ComparedRun]


class AgreementSummary(TypedDict):
    """The fields of `equivalence.Agreement`; `gradients` is the largest difference over all weights."""

    logits: NotNegative
    gradients: NotNegative
    costs: NonEmpty[NotNegative]
    distances: NonEmpty[NotNegative]
    pytorch_costs: NonEmpty[NotNegative]
    float64_costs: NonEmpty[NotNegative]


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole comparison, as report.json holds it.

    Attributes:
      epochs: Passes over the training set.
      date: The day, such as 2026-11-25.
      machine: Where the report was written: the first device; of a CPU, the processor and its cores.
      versions: The version of each package there.
      accuracy_difference: `mean` of cnn-jax minus PyTorch, `low` and `high` of its 95 % interval.
      agreement: How closely both frameworks compute the same function.
      frameworks: Each framework's results by its name.
    """

    epochs: int
    date: str
    machine: str
    versions: dict[str, str]
    accuracy_difference: dict[str, float]
    agreement: AgreementSummary
    frameworks: dict[str, FrameworkResult]


def compare(
    *, seeds: int, seed: int, epochs: int, output: Path, untimed: bool = False, data_dir: Path | None = None
) -> None:
    """Train every seed in both frameworks, unless its result exists; write report.json, report.md and report.png.

    Args:
      seeds: Runs per framework.
      seed: The first.
      epochs: Passes over the training set.
      output: Where the results and the report are.
      untimed: Leave out how long these trainings take.
      data_dir: Where tfds keeps its data sets.

    Raises:
      InputFileError: a result that exists is damaged.
      RunLockedError: another process is writing the same comparison.
      SystemExit: with the exit code of a training that failed, which has said why.
    """
    display = Display()
    leave_out_absent_accelerators()
    (output / "runs").mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(output / "runs" / "lock"))
        except AlreadyLockedError as error:
            raise RunLockedError(
                f"{error.holder} is writing the comparison {output}; wait for it, stop it, or give another --output"
            ) from error
        results = {framework: [] for framework in FRAMEWORKS}
        for each in range(seed, seed + seeds):
            # The frameworks take turns, so that anything that slows the machine down for a while slows both.
            for framework in FRAMEWORKS:
                results[framework].append(_result_of(framework, each, epochs, output, untimed, data_dir, display))
        report = summarize(results, _agreement(seed, output, data_dir, display), epochs=epochs)
        _write(output / "report.json", report)
        display.say(*write_report(report, output / "report.md").splitlines())
        display.say(f"written to {output / 'report.md'}")


def read_report(file: Path) -> Report:
    """Read a report.json."""
    return decode(read_file(file), Report, source=file, remedy=REMEDY)


def _agreement(seed: int, output: Path, data_dir: Path | None, display: Display) -> AgreementSummary:
    """Measure over an epoch how closely both frameworks agree, in this process, unless that has been done."""
    file = output / "runs" / f"agreement-seed{seed}.json"
    if not file.exists():
        from cnn_jax.pytorch.equivalence import measure_agreement

        what = f"from equal weights: {STEPS} steps in float32 and {FLOAT64_STEPS} in float64, in both frameworks"
        display.say(what)
        with display.waiting(what):
            start_devices(None)  # not before: the trainings need an accelerator's memory
            dataset = load_dataset("mnist", None, data_dir)
            agreement = measure_agreement(dataset, seed=seed, steps=STEPS, float64_steps=FLOAT64_STEPS)
        _write(file, dataclasses.asdict(agreement) | {"gradients": max(agreement.gradients.values())})
    summary = decode(read_file(file), AgreementSummary, source=file, remedy=REMEDY)
    steps = {name: len(values) for name, values in summary.items() if isinstance(values, list)}
    if steps != dict.fromkeys(steps, STEPS) | {"float64_costs": FLOAT64_STEPS}:
        raise unreadable(file, f"it does not have {STEPS} and {FLOAT64_STEPS} steps", REMEDY)
    return summary


def _result_of(
    framework: str, seed: int, epochs: int, output: Path, untimed: bool, data_dir: Path | None, display: Display
) -> ComparedRun:
    """Train a seed in a framework, unless that has been done, and return its result."""
    name = f"{framework.lower()}-seed{seed}-epochs{epochs}"
    file = output / "runs" / f"{name}.json"
    if not file.exists():
        display.say(f"{framework}, seed {seed}: training")
        if framework == "PyTorch":
            arguments = (seed, epochs, data_dir)
            # PyTorch's fastest variant in float32.
            with start_worker(
                train_in_pytorch, *arguments, name=f"the training {name}", environment=KEEP_MEMORY
            ) as worker:
                result = worker.receive()
        else:
            result = _train_in_jax(seed, epochs, data_dir, file.parent / name)
        _write(file, json.loads(encode(result)) | ({"seconds": {}} if untimed else {}))
    result = decode(read_file(file), ComparedRun, source=file, remedy=REMEDY)
    if (result.seed, len(result.costs)) != (seed, epochs) or {*result.seconds} not in ({*PARTS}, set()):
        found = f"seed {result.seed}, {len(result.costs)} epochs, seconds of {', '.join(result.seconds)}"
        raise unreadable(file, f"it is of another training: {found}", REMEDY)
    return result


def _train_in_jax(seed: int, epochs: int, data_dir: Path | None, run: Path) -> ComparedRun:
    """Train a seed with the command `train`, as a user does, in a process that does not outlive this one."""
    arguments = ["--seed", seed, "--epochs", epochs, "--checkpoint-dir", run.parent, "--run-name", run.name]
    if data_dir is not None:
        arguments += ["--data-dir", data_dir]
    if run.exists():
        arguments.append("--fresh")  # what was killed and goes on would report the seconds since then
    command = [sys.executable, "-c", COMMAND, str(os.getpid()), "train", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as training, ending_together(training.pid):
        code = training.wait()
    if code != 0:
        raise ended_early(f"the training {run.name}", code)
    folder, names = RunFolder(run), ("loading", *PARTS[1:])
    result, metrics = folder.read_result(), folder.read_metrics()
    if result is None or result.unscaled_test_accuracy is None or not {*names} <= result.seconds.keys():
        raise unreadable(run / "result.json", "numbers are missing", f"delete {run} and run the same command again")
    return ComparedRun(
        seed=seed,
        costs=[cost for epoch in metrics for cost in epoch.cost],
        accuracy=result.test_accuracy,
        unscaled_accuracy=result.unscaled_test_accuracy,
        seconds={part: result.seconds[name] for part, name in zip(PARTS, names, strict=True)},
    )


def _write(file: Path, result: ComparedRun | Report | dict) -> None:
    write_atomically(file, json.dumps(json.loads(encode(result)), indent=2) + "\n")


def summarize(results: Mapping[str, Sequence[ComparedRun]], agreement: AgreementSummary, *, epochs: int) -> Report:
    """Return the report of every seed's results, by framework, and of the agreement from equal weights."""
    ours, theirs = ([run.accuracy for run in results[framework]] for framework in FRAMEWORKS)
    interval = difference_interval(ours, theirs)
    timed = _timed_seeds(results)
    return Report(
        epochs=epochs,
        date=time.strftime("%Y-%m-%d"),
        machine=device_name(),
        versions=versions(*PACKAGES),
        accuracy_difference={"mean": interval.mean, "low": interval.low, "high": interval.high},
        agreement=agreement,
        frameworks={
            framework: FrameworkResult(
                accuracy=_mean([run.accuracy for run in runs]),
                unscaled_accuracy=_mean([run.unscaled_accuracy for run in runs]),
                last_cost=_mean([run.costs[-1] for run in runs]),
                seconds={
                    part: float(np.median([run.seconds[part] for run in runs if run.seed in timed]))
                    for part in PARTS
                    if timed
                },
                runs=list(runs),
            )
            for framework, runs in results.items()
        },
    )


def _mean(values: Sequence[float]) -> Mean:
    interval = mean_interval(values)
    return Mean(interval.mean, interval.standard_deviation)


def _timed_seeds(results: Mapping[str, Sequence[ComparedRun]]) -> set[int]:
    return set.intersection(*({run.seed for run in runs if run.seconds} for runs in results.values()))


def write_report(report: Report, file: Path) -> str:
    """Write the report as Markdown, and its picture under the same name; return the Markdown."""
    text = to_markdown(report)
    write_atomically(file, text)
    plot_comparison(
        {name: [run.costs for run in side.runs] for name, side in report.frameworks.items()},
        {name: [run.accuracy for run in side.runs] for name, side in report.frameworks.items()},
        file.with_suffix(".png"),
        distances=report.agreement["distances"],
        cost_differences=report.agreement["costs"],
        pytorch_cost_differences=report.agreement["pytorch_costs"],
    )
    return text


def to_markdown(report: Report) -> str:
    """Return the report as Markdown, with its finding in the first sentence."""
    interval, agreement, machine = report.accuracy_difference, report.agreement, escape_markdown(report.machine)
    finding = "differ" if interval["low"] > 0 or interval["high"] < 0 else "do not differ measurably"
    ours, theirs = ([run.accuracy for run in report.frameworks[framework].runs] for framework in FRAMEWORKS)
    count, p = len(ours), equivalence_p(ours, theirs, MARGIN)
    equivalence = "that is shown" if p < 0.05 else "more seeds would be needed to show that"
    timed = len(_timed_seeds({name: side.runs for name, side in report.frameworks.items()}))
    times = f" Its `compiling` is its first step. Times are medians over {'the' if timed == count else timed} seeds."
    package_versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    costs, pytorch_costs = (agreement[name][:FLOAT64_STEPS] for name in ("costs", "pytorch_costs"))
    return "\n".join(
        [
            "# cnn-jax and PyTorch on the tutorial",
            "",
            f"Over {count} seeds of {report.epochs} epochs the test accuracies {finding}: cnn-jax minus PyTorch is "
            f"{interval['mean']:+.4f}, with a 95 % interval from {interval['low']:+.4f} to {interval['high']:+.4f}. "
            f"The two one-sided tests that they differ by less than {MARGIN} give p = {p:.2g}: {equivalence}.",
            "",
            accuracy_table(report),
            "",
            "The interval is Welch's for two independent samples: the two frameworks draw different numbers from the "
            "same seed, so their runs are not paired. The number after ± is the standard deviation over the seeds.",
            "",
            "Given equal weights and the same order of the images, the logits agree within "
            f"{agreement['logits']:.0e} and every gradient within {agreement['gradients']:.0e} of its largest entry. "
            f"Over {FLOAT64_STEPS} Adam steps, the costs agree within {max(agreement['float64_costs']):.0e} in float64 "
            f"and within {max(costs):.0e} in float32. The latter is rounding: over the same steps, PyTorch's costs "
            f"change by up to {max(pytorch_costs):.0e} if only its memory format is changed.",
            "",
            "![cost of each epoch, test accuracy of each seed, and distance from equal weights](report.png)",
            "",
            f"{machine}; {package_versions}; {report.date}. Each run had its own process, and the two "
            "frameworks took turns. PyTorch ran with channels_last and the data in memory, and on a CPU with an "
            "allocator that keeps its memory, which is its fastest float32 variant there."
            f"{times * bool(timed)} cnn-jax tests after every epoch, PyTorch only twice, at the end.",
            "",
        ]
    )


def accuracy_table(report: Report) -> str:
    """Return the table of accuracies, costs and times, as Markdown."""
    sides = [report.frameworks[framework] for framework in FRAMEWORKS]
    seeds = " / ".join(str(run.seed) for run in sides[0].runs)
    rows = [
        ("test accuracy, mean", *(side.accuracy for side in sides)),
        (f"of seeds {seeds}", *(" / ".join(f"{run.accuracy:.4f}" for run in side.runs) for side in sides)),
        ("tested on unscaled pixels", *(side.unscaled_accuracy for side in sides)),
    ]
    if report.epochs > 1:
        first_costs = [np.mean([run.costs[0] for run in side.runs]) for side in sides]
        rows.append(("cost after epoch 1", *(f"{cost:.4f}" for cost in first_costs)))
    rows.append((f"cost after epoch {report.epochs}", *(side.last_cost for side in sides)))
    for part in sides[0].seconds:
        rows.append((part, *(describe_seconds(side.seconds[part]) for side in sides)))
    return markdown_table(("", *FRAMEWORKS), rows)
