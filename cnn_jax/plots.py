"""Every picture that the program draws, in one style; the only file that knows matplotlib."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")  # files only: no window, no display needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cnn_jax.run_folder import EpochMetrics

COLOURS = {"cnn-jax": "#d1495b", "PyTorch": "#30638e"}


def plot_comparison(report: dict, file: Path) -> None:
    """Draw a comparison's costs and accuracies, a line or a point a seed, and its distance from equal weights."""
    figure, (costs, accuracies, apart) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for place, (framework, side) in enumerate(report["frameworks"].items()):
        for run in side["runs"]:
            epochs = range(1, len(run["costs"]) + 1)
            label = framework if run is side["runs"][0] else None
            costs.semilogy(epochs, run["costs"], color=COLOURS[framework], alpha=0.7, label=label)
        values = [run["accuracy"] for run in side["runs"]]
        accuracies.plot([place] * len(values), values, "o", color=COLOURS[framework], alpha=0.7)
        mean, deviation = side["accuracy"]["mean"], side["accuracy"]["standard_deviation"]
        accuracies.errorbar(place + 0.15, mean, deviation, fmt="s", color=COLOURS[framework], capsize=4)
    costs.set(xlabel="epoch", ylabel="cost (mean loss of its batches)", title="Training")
    costs.legend()
    accuracies.set(ylabel="test accuracy", title="Test: each seed, mean and standard deviation", xlim=(-0.5, 1.5))
    accuracies.set_xticks(range(len(report["frameworks"])), list(report["frameworks"]))
    steps = range(1, len(report["agreement"]["costs"]) + 1)
    apart.semilogy(steps, report["agreement"]["distances"], color="#555555", label="weights, relative to their way")
    apart.semilogy(steps, report["agreement"]["costs"], ".", color="#d1495b", markersize=2, label="cost")
    apart.semilogy(
        steps,
        report["agreement"]["pytorch_costs"],
        ".",
        color="#30638e",
        markersize=2,
        label="cost, PyTorch and itself",
    )
    apart.set(xlabel="step", ylabel="difference", title="From equal weights and order")
    apart.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def plot_seeds(metrics: list[EpochMetrics], file: Path) -> None:
    """Draw each seed's cost and accuracy over the epochs, and their means."""
    figure, (costs, accuracies) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    epochs = [epoch.epoch for epoch in metrics]
    panels = ((costs, [epoch.cost for epoch in metrics]), (accuracies, [epoch.accuracy for epoch in metrics]))
    for axes, values in panels:
        axes.plot(epochs, values, color=COLOURS["cnn-jax"], alpha=0.35, linewidth=1)
        axes.plot(epochs, np.mean(values, axis=1), "o-", color="#333333", markersize=3, label="mean")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    costs.set(xlabel="epoch", ylabel="cost (mean loss of its batches)", title="Training", yscale="log")
    tested_on = metrics[-1].tested_on
    accuracies.set(xlabel="epoch", ylabel=f"{tested_on} accuracy", title=f"{len(metrics[-1].cost)} seeds")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def save_axes(axes: Axes, file: Path) -> None:
    """Write down what a library has drawn, and forget it."""
    figure = axes.figure
    figure.set_size_inches(9, 5)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_benchmark(result: dict, file: Path) -> None:
    """Draw a benchmark's milliseconds a step, a bar a form with its quartiles, and the machine's floor."""
    measured = {name: form for name, form in result["forms"].items() if "error" not in form}
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(measured) + 1.5), layout="constrained")
    for place, (name, form) in enumerate(measured.items()):
        spread = [[form["milliseconds"] - form["low"]], [form["high"] - form["milliseconds"]]]
        colour = next((COLOURS[side] for side in COLOURS if name.startswith(side)), "#8d99ae")
        bar = axes.barh(place, form["milliseconds"], xerr=spread, color=colour, capsize=3)
        axes.bar_label(bar, fmt="%.3g", padding=6)
    # One form takes thirty times as long as the others: on a linear scale it alone would be seen.
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.axvline(result["floor"]["milliseconds"], color="#555555", linestyle="--", label="floor, float32")
    axes.set_yticks(range(len(measured)), list(measured))
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds a step of 100 images, logarithmic", title=result["device"])
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)
