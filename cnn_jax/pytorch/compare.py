"""Train in both frameworks from several seeds, each in its own process, and report the differences."""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import scipy

from cnn_jax.analysis.plots import plot_comparison
from cnn_jax.data.loading import load_dataset
from cnn_jax.pytorch.processes import SeedResult, ended_early, start_worker, train_in_pytorch
from cnn_jax.pytorch.variants import KEEP_MEMORY
from cnn_jax.runs.summary import mean_interval
from cnn_jax.runtime.devices import describe_machine, leave_out_absent_accelerators, versions
from cnn_jax.runtime.display import Display, describe_seconds, escape_markdown, markdown_table
from cnn_jax.runtime.files import write_atomically
from cnn_jax.runtime.signals import ending_together

FRAMEWORKS = ("cnn-jax", "PyTorch")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy", "python")


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
      seconds: The median over the seeds of each part of the time.
      runs: Each seed's result.
    """

    accuracy: Mean
    unscaled_accuracy: Mean
    last_cost: Mean
    seconds: dict[str, float]
    runs: list[SeedResult]


class AgreementSummary(TypedDict):
    """The fields of `equivalence.Agreement`; `gradients` is the largest difference over all weights."""

    logits: float
    gradients: float
    costs: list[float]
    distances: list[float]
    pytorch_costs: list[float]
    float64_costs: list[float]


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole comparison, as report.json holds it.

    Attributes:
      epochs: Passes over the training set.
      date: The day, such as 2026-11-25.
      machine: The processor and its cores.
      versions: The version of each package.
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


def compare(*, seeds: int, seed: int, epochs: int, output: Path, data_dir: Path | None = None) -> None:
    """Train every seed in both frameworks, unless its result exists; write report.json, report.md and report.png."""
    display = Display()
    leave_out_absent_accelerators()
    output.mkdir(parents=True, exist_ok=True)
    results = {framework: [] for framework in FRAMEWORKS}
    for each in range(seed, seed + seeds):
        # The frameworks take turns, so that anything that slows the machine down for a while slows both.
        for framework in FRAMEWORKS:
            results[framework].append(_result_of(framework, each, epochs, output, data_dir, display))
    report = summarize(results, _agreement(seed, output, data_dir, display), epochs=epochs)
    _write(output / "report.json", dataclasses.asdict(report))
    display.say(*write_report(report, output / "report.md").splitlines())
    display.say(f"written to {output / 'report.md'}")


def read_report(file: Path) -> Report:
    """Read a report.json."""
    content = json.loads(file.read_text())
    for name, side in content["frameworks"].items():
        means = {key: Mean(**side[key]) for key in ("accuracy", "unscaled_accuracy", "last_cost")}
        runs = [SeedResult(**run) for run in side["runs"]]
        content["frameworks"][name] = FrameworkResult(**means, seconds=side["seconds"], runs=runs)
    return Report(**content)


def _agreement(seed: int, output: Path, data_dir: Path | None, display: Display) -> AgreementSummary:
    """Measure over an epoch how closely both frameworks agree, in this process, unless that has been done."""
    file = output / "runs" / "agreement.json"
    if not file.exists():
        from cnn_jax.pytorch.equivalence import measure_agreement

        display.say("from equal weights: an epoch in both frameworks, step by step")
        dataset = load_dataset("mnist", None, data_dir)
        agreement = measure_agreement(dataset, seed=seed, steps=600, float64_steps=100)
        _write(file, dataclasses.asdict(agreement) | {"gradients": max(agreement.gradients.values())})
    return json.loads(file.read_text())


def _result_of(
    framework: str, seed: int, epochs: int, output: Path, data_dir: Path | None, display: Display
) -> SeedResult:
    """Train a seed in a framework, unless that has been done, and return its result."""
    name = f"{framework.lower()}-seed{seed}-epochs{epochs}"
    file = output / "runs" / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
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
        _write(file, dataclasses.asdict(result))
    return SeedResult(**json.loads(file.read_text()))


def _train_in_jax(seed: int, epochs: int, data_dir: Path | None, run: Path) -> SeedResult:
    """Train a seed with the command `train`, as a user does."""
    arguments = ["--seed", seed, "--epochs", epochs, "--checkpoint-dir", run.parent, "--run-name", run.name]
    if data_dir is not None:
        arguments += ["--data-dir", data_dir]
    command = [sys.executable, "-m", "cnn_jax", "train", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as training, ending_together(training.pid):
        code = training.wait()
    if code != 0:
        raise ended_early(f"the training {run.name}", code)
    result = json.loads((run / "result.json").read_text())
    costs = [json.loads(line)["cost"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts = {"starting": "loading", "compiling": "compiling", "training": "training", "testing": "testing"}
    seconds = {part: result["seconds"][name] for part, name in parts.items()}
    return SeedResult(seed, costs, result["test_accuracy"], result["unscaled_test_accuracy"], seconds)


def _write(file: Path, result: dict) -> None:
    write_atomically(file, json.dumps(result, indent=2) + "\n")


def summarize(results: Mapping[str, Sequence[SeedResult]], agreement: AgreementSummary, *, epochs: int) -> Report:
    """Return the report of every seed's results, by framework, and of the agreement from equal weights."""
    ours, theirs = ([run.accuracy for run in results[framework]] for framework in FRAMEWORKS)
    return Report(
        epochs=epochs,
        date=time.strftime("%Y-%m-%d"),
        machine=describe_machine(),
        versions=versions(*PACKAGES),
        accuracy_difference=difference_interval(ours, theirs),
        agreement=agreement,
        frameworks={
            framework: FrameworkResult(
                accuracy=_mean([run.accuracy for run in runs]),
                unscaled_accuracy=_mean([run.unscaled_accuracy for run in runs]),
                last_cost=_mean([run.costs[-1] for run in runs]),
                seconds={part: float(np.median([run.seconds[part] for run in runs])) for part in runs[0].seconds},
                runs=list(runs),
            )
            for framework, runs in results.items()
        },
    )


def _mean(values: Sequence[float]) -> Mean:
    interval = mean_interval(values)
    return Mean(interval.mean, interval.standard_deviation)


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
    count = len(report.frameworks["PyTorch"].runs)
    package_versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n".join(
        [
            "# cnn-jax and PyTorch on the tutorial",
            "",
            f"Over {count} seeds of {report.epochs} epochs the test accuracies {finding}: cnn-jax minus PyTorch is "
            f"{interval['mean']:+.4f}, with a 95 % interval from {interval['low']:+.4f} to {interval['high']:+.4f}.",
            "",
            accuracy_table(report),
            "",
            "The interval is Welch's for two independent samples: the two frameworks draw different numbers from the "
            "same seed, so their runs are not paired. The number after ± is the standard deviation over the seeds.",
            "",
            "Given equal weights and the same order of the images, the logits agree within "
            f"{agreement['logits']:.0e} and every gradient within {agreement['gradients']:.0e} of its largest entry. "
            f"Over 100 Adam steps, the costs agree within {max(agreement['float64_costs']):.0e} in float64 and within "
            f"{max(agreement['costs'][:100]):.0e} in float32. The latter is rounding: over the same steps, PyTorch's "
            f"costs change by up to {max(agreement['pytorch_costs'][:100]):.0e} if only its memory format is changed.",
            "",
            "![cost of each epoch, test accuracy of each seed, and distance from equal weights](report.png)",
            "",
            f"{machine}; {package_versions}; {report.date}. Each run had its own process, and the two "
            "frameworks took turns. PyTorch ran in its fastest float32 variant: channels_last, an allocator that keeps "
            "its memory, and the data in memory. Its `compiling` is its first step. cnn-jax tests after every "
            "epoch, PyTorch only twice, at the end. Times are medians over the seeds.",
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
    for part in ("starting", "compiling", "training", "testing"):
        rows.append((part, *(describe_seconds(side.seconds[part]) for side in sides)))
    return markdown_table(("", *FRAMEWORKS), rows)


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
