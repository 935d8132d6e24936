"""Every picture that the program draws, in one style; the only file that knows matplotlib."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")  # files only: no window, no display needed
from matplotlib import pyplot as plt

COLOURS = {"cnn-jax": "#d1495b", "PyTorch": "#30638e"}


def plot_comparison(report: dict, file: Path) -> None:
    """Draw a comparison's cost curves and accuracies, a line or a point a seed, to a PNG file."""
    figure, (costs, accuracies) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
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
    figure.savefig(file, dpi=150)
    plt.close(figure)
