"""The same training in both frameworks from several seeds, each run in a process of its own, and the report of it."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from cnn_jax.analysis.plots import plot_comparison
from cnn_jax.core.statistics import difference_interval, mean_interval
from cnn_jax.data.dataset import load_dataset
from cnn_jax.pytorch.variants import ENVIRONMENT
from cnn_jax.runtime.devices import describe_machine
from cnn_jax.runtime.display import Display, describe_seconds
from cnn_jax.runtime.errors import StorageError
from cnn_jax.runtime.files import write_atomically

FRAMEWORKS = ("cnn-jax", "PyTorch")
FASTEST = "PyTorch, channels_last, memory kept"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")


@dataclasses.dataclass(frozen=True)
class SeedResult:
    """One training.

    Attributes:
      seed: Where its weights and its order came from.
      costs: Mean of the batch losses of each epoch.
      accuracy: Of the test images on pixels in [0, 1], a fraction.
      unscaled_accuracy: The same on pixels in 0..255.
      seconds: Of the process: in `starting` (imports and data), `compiling`, `training` and `testing`.
    """

    seed: int
    costs: list[float]
    accuracy: float
    unscaled_accuracy: float
    seconds: dict[str, float]


def compare(*, seeds: int, seed: int, epochs: int, output: Path, data_dir: Path | None = None) -> None:
    """Train every seed in both frameworks, skipping what is done, and write report.json, report.md and report.png."""
    display = Display()
    output.mkdir(parents=True, exist_ok=True)
    results = {framework: [] for framework in FRAMEWORKS}
    for each in range(seed, seed + seeds):
        # Side by side in time, so that what slows the machine down for a while slows both.
        for framework in FRAMEWORKS:
            results[framework].append(_result_of(framework, each, epochs, output, data_dir, display))
    report = summarize(results, _agreement(seed, output, data_dir, display), epochs=epochs)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "report.md").write_text(to_markdown(report))
    plot_comparison(report, output / "report.png")
    display.say(to_markdown(report))
    display.say(f"written to {output / 'report.md'}")


def train_in_pytorch(*, seed: int, epochs: int, data_dir: Path | None, output: Path) -> None:
    """Train one seed in PyTorch and write its result: what `compare` starts as a process of its own."""
    begin = time.perf_counter()
    from cnn_jax.pytorch.tutorial import train_torch

    dataset = load_dataset("mnist", None, data_dir)
    loading = time.perf_counter() - begin
    run = train_torch(
        dataset,
        seed=seed,
        epochs=epochs,
        batch_size=100,
        learning_rate=0.001,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    seconds = {"starting": loading, "compiling": run.seconds.pop("starting"), **run.seconds}
    result = SeedResult(seed, run.costs, run.accuracy, run.unscaled_accuracy, seconds)
    _write(output, dataclasses.asdict(result))


def _agreement(seed, output, data_dir, display):
    """Measure part A over an epoch, in this process, unless that has been done."""
    file = output / "runs" / "agreement.json"
    if not file.exists():
        from cnn_jax.pytorch.equivalence import measure_agreement

        display.say("from equal weights: an epoch in both frameworks, step by step")
        dataset = load_dataset("mnist", None, data_dir)
        agreement = measure_agreement(dataset, seed=seed, steps=600, float64_steps=100)
        _write(
            file,
            {
                "logits": agreement.logits,
                "gradients": max(agreement.gradients.values()),
                "costs": agreement.costs,
                "pytorch_costs": agreement.pytorch_costs,
                "float64_costs": agreement.float64_costs,
                "distances": agreement.distances,
            },
        )
    return json.loads(file.read_text())


def _result_of(framework, seed, epochs, output, data_dir, display):
    name = f"{framework.lower()}-seed{seed}-epochs{epochs}"
    file = output / "runs" / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        display.say(f"{framework}, seed {seed}: training")
        if framework == "PyTorch":
            call = (
                "from pathlib import Path; from cnn_jax.pytorch.compare import train_in_pytorch as train; "
                f"train(seed={seed}, epochs={epochs}, output=Path({str(file)!r}), "
                f"data_dir={data_dir and str(data_dir)!r})"
            )
            _run([sys.executable, "-c", call], name, ENVIRONMENT[FASTEST])
        else:
            _train_in_jax(seed, epochs, data_dir, name, file)
    return SeedResult(**json.loads(file.read_text()))


def _train_in_jax(seed, epochs, data_dir, name, file):
    arguments = ["--seed", seed, "--epochs", epochs, "--checkpoint-dir", file.parent, "--run-name", name]
    if data_dir is not None:
        arguments += ["--data-dir", data_dir]
    _run([sys.executable, "-m", "cnn_jax", "train", *map(str, arguments)], name)
    run = file.parent / name
    result = json.loads((run / "result.json").read_text())
    costs = [json.loads(line)["cost"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = result["seconds"]
    seconds = {
        "starting": seconds["loading"],
        "compiling": seconds["compiling"],
        "training": seconds["training"],
        "testing": seconds["testing"],
    }
    trained = SeedResult(seed, costs, result["test_accuracy"], result["unscaled_test_accuracy"], seconds)
    _write(file, dataclasses.asdict(trained))


def _run(command, name, environment=None):
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ | (environment or {}), check=False)
    if ended.returncode != 0:
        raise StorageError(f"the training {name} ended with exit code {ended.returncode}; its own message is above")


def _write(file, result):
    write_atomically(file, json.dumps(result, indent=2) + "\n")


def summarize(results: dict[str, list[SeedResult]], agreement: dict, *, epochs: int) -> dict:
    """Return the report: every result, each framework's mean and spread, their difference, and how they agree."""
    frameworks = {}
    for framework, runs in results.items():
        frameworks[framework] = {
            "accuracy": _mean_and_deviation([run.accuracy for run in runs]),
            "unscaled_accuracy": _mean_and_deviation([run.unscaled_accuracy for run in runs]),
            "last_cost": _mean_and_deviation([run.costs[-1] for run in runs]),
            "seconds": {part: float(np.median([run.seconds[part] for run in runs])) for part in runs[0].seconds},
            "runs": [dataclasses.asdict(run) for run in runs],
        }
    ours, theirs = ([run.accuracy for run in results[framework]] for framework in FRAMEWORKS)
    return {
        "epochs": epochs,
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "accuracy_difference": difference_interval(ours, theirs),
        "agreement": agreement,
        "frameworks": frameworks,
    }


def to_markdown(report: dict) -> str:
    """Return the report as Markdown, with what was found in its first sentence."""
    interval, agreement = report["accuracy_difference"], report["agreement"]
    apart = "differ" if interval["low"] > 0 or interval["high"] < 0 else "do not differ measurably"
    count = len(report["frameworks"]["PyTorch"]["runs"])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join(
        [
            "# cnn-jax and PyTorch on the tutorial",
            "",
            f"Over {count} seeds of {report['epochs']} epochs the test accuracies {apart}: cnn-jax minus PyTorch is "
            f"{interval['mean']:+.4f}, with a 95 % interval from {interval['low']:+.4f} to {interval['high']:+.4f}.",
            "",
            accuracy_table(report),
            "",
            "The interval is Welch's for two independent samples: from one seed the two frameworks draw different "
            "numbers, so the runs do not pair. The spread after a mean is the standard deviation over the seeds.",
            "",
            f"From equal weights and an equal order of the images the logits agree within {agreement['logits']:.0e} "
            f"and every gradient within {agreement['gradients']:.0e} of its largest entry. The costs of 100 Adam steps "
            f"in float64 agree within {max(agreement['float64_costs']):.0e}; in float32 within "
            f"{max(agreement['costs'][:100]):.0e}, which is rounding: PyTorch in another memory format differs from "
            f"itself by up to {max(agreement['pytorch_costs'][:100]):.0e} over the same steps.",
            "",
            "![cost of each epoch, test accuracy of each seed, and distance from equal weights](report.png)",
            "",
            f"{report['machine']}; {versions}; {report['date']}. Each run was a process of its own, the two frameworks "
            "in turn. PyTorch ran in its fastest form, channels_last with the allocator told to keep memory, and "
            "with the data in memory; its `compiling` is its first step. cnn-jax tests after every epoch, PyTorch "
            "twice in all. Times are medians over the seeds.",
            "",
        ]
    )


def accuracy_table(report: dict) -> str:
    """Return the table of accuracies, costs and times, as Markdown."""
    sides = [report["frameworks"][framework] for framework in FRAMEWORKS]
    seeds = " / ".join(str(run["seed"]) for run in sides[0]["runs"])
    rows = [
        ("", *FRAMEWORKS),
        ("---", "---", "---"),
        ("test accuracy, mean", *(_mean(side["accuracy"]) for side in sides)),
        (f"of seeds {seeds}", *(" / ".join(f"{run['accuracy']:.4f}" for run in side["runs"]) for side in sides)),
        ("tested on unscaled pixels", *(_mean(side["unscaled_accuracy"]) for side in sides)),
    ]
    if report["epochs"] > 1:
        first_costs = [np.mean([run["costs"][0] for run in side["runs"]]) for side in sides]
        rows.append(("cost after epoch 1", *(f"{cost:.4f}" for cost in first_costs)))
    rows.append((f"cost after epoch {report['epochs']}", *(_mean(side["last_cost"]) for side in sides)))
    for part in ("starting", "compiling", "training", "testing"):
        rows.append((part, *(describe_seconds(side["seconds"][part]) for side in sides)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean(spread):
    return f"{spread['mean']:.4f} ± {spread['standard_deviation']:.4f}"


def _mean_and_deviation(values):
    interval = mean_interval(values)
    return {"mean": interval.mean, "standard_deviation": interval.standard_deviation}
