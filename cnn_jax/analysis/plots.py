"""Draw all of the program's pictures in one style; only this file uses matplotlib."""

import contextlib
import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage, imsave
from matplotlib.ticker import MaxNLocator

from cnn_jax.inference.logits import Reliability
from cnn_jax.inference.pictures import draw_saliency
from cnn_jax.inference.predict import describe_probability
from cnn_jax.runs.folder import EpochMetrics
from cnn_jax.runtime.files import write_atomically

COLOURS = {"cnn-jax": "#d1495b", "PyTorch": "#30638e"}
# Blue below 0, white at 0, red above; the gaps between tiles are NaN.
SIGNED = LinearSegmentedColormap.from_list("signed", [COLOURS["PyTorch"], "#ffffff", COLOURS["cnn-jax"]], bad="#b4bcc6")
COUNTS = LinearSegmentedColormap.from_list("counts", ["#ffffff", COLOURS["cnn-jax"]], bad="#e6e9ee")
# A user's own settings, which may need LaTeX or fonts that are not there, decide nothing here, nor do ours elsewhere.
DEFAULTS: dict[Any, Any] = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
# Width of a report's pictures, in inches: their text stays legible when a phone scales them to its screen.
NARROW = 5
# A confusion matrix of more classes has no room for numbers.
COUNTED_CLASSES = 20


def plot_comparison(
    costs: Mapping[str, Sequence[Sequence[float]]],
    accuracies: Mapping[str, Sequence[float]],
    file: Path,
    *,
    distances: Sequence[float],
    cost_differences: Sequence[float],
    pytorch_cost_differences: Sequence[float],
) -> None:
    """Draw a comparison: each seed's costs and accuracy, and how far both frameworks drift from equal weights.

    Args:
      costs: By framework, for each seed, the cost of each epoch.
      accuracies: By framework, each seed's test accuracy.
      file: Where the picture goes.
      distances: After each step from equal weights, the distance between the weights relative to how far they moved.
      cost_differences: At each step, the difference of the costs.
      pytorch_cost_differences: The same between two PyTorch runs that differ only in their memory format.
    """
    with _drawn(file, 1, 3, figsize=(13, 4)) as (cost_axes, accuracy_axes, drift_axes):
        for i, (framework, of_seeds) in enumerate(accuracies.items()):
            colour = COLOURS[framework]
            lines = np.transpose(costs[framework])
            epochs = range(1, len(lines) + 1)
            labels = [framework] + [None] * (lines.shape[1] - 1)
            cost_axes.semilogy(epochs, lines, color=colour, alpha=0.7, label=labels)
            accuracy_axes.plot([i] * len(of_seeds), of_seeds, "o", color=colour, alpha=0.7)
            mean, deviation = np.mean(of_seeds), np.std(of_seeds, ddof=1)
            accuracy_axes.errorbar(i + 0.15, mean, deviation, fmt="s", color=colour, capsize=4)
        cost_axes.set(xlabel="epoch", ylabel="cost (mean loss of its batches)", title="Training")
        cost_axes.legend()
        accuracy_axes.set(
            ylabel="test accuracy", title="Test: each seed, mean and standard deviation", xlim=(-0.5, 1.5)
        )
        accuracy_axes.set_xticks(range(len(accuracies)), list(accuracies))
        steps = range(1, len(distances) + 1)
        points = {"marker": ".", "linestyle": "none", "markersize": 2}
        drift_axes.semilogy(steps, distances, color="#555555", label="weights, relative to how far they moved")
        drift_axes.semilogy(steps, cost_differences, color=COLOURS["cnn-jax"], label="cost", **points)
        drift_axes.semilogy(
            steps, pytorch_cost_differences, color=COLOURS["PyTorch"], label="cost, PyTorch against itself", **points
        )
        drift_axes.set(xlabel="step", ylabel="difference", title="From equal weights and order")
        drift_axes.legend()


def save_drawn(drawn: Iterable[tuple[str, Axes]], folder: Path) -> None:
    """Write the figures of axes that another library draws with pyplot, each to the file that it names."""
    matplotlib.use("agg")  # files only: no window, no display needed
    from matplotlib import pyplot as plt

    with matplotlib.rc_context(DEFAULTS):
        for name, axes in drawn:
            figure = axes.figure
            assert isinstance(figure, Figure)
            figure.set_size_inches(9, 5)
            png = io.BytesIO()
            figure.savefig(png, dpi=150, bbox_inches="tight", format="png")
            write_atomically(folder / name, png.getvalue())
            plt.close(figure)


def plot_benchmark(
    timings: Sequence[tuple[str, str, float, float, float]], file: Path, *, floor: float, title: str
) -> None:
    """Draw the milliseconds per step of each variant as a bar with its quartiles, and the machine's floor.

    Args:
      timings: For each variant its name, its framework, and the first quartile, median and third quartile.
      file: Where the picture goes.
      floor: The shortest time that a step can take, in milliseconds.
      title: What the steps ran on.
    """
    with _drawn(file, figsize=(8, 0.45 * len(timings) + 1.5)) as axes:
        for i, (_, framework, low, median, high) in enumerate(timings):
            colour = COLOURS.get(framework, "#8d99ae")
            bar = axes.barh(i, median, xerr=[[median - low], [high - median]], color=colour, capsize=3)
            axes.bar_label(bar, fmt="%.3g", padding=6)
        # On a linear scale, one slow variant would make all the others look alike.
        axes.set_xscale("log")
        axes.margins(x=0.1)
        axes.axvline(floor, color="#555555", linestyle="--", label="floor, float32")
        axes.set_yticks(range(len(timings)), [name for name, *_ in timings])
        axes.invert_yaxis()
        axes.set(xlabel="milliseconds per step of 100 images, logarithmic", title=title)
        axes.legend()


def plot_costs(metrics: list[EpochMetrics], file: Path) -> None:
    """Draw each seed's cost per epoch, and the mean over the seeds."""
    with _drawn(file, figsize=(NARROW, 3.2)) as axes:
        _draw_epochs(axes, metrics, [epoch.cost for epoch in metrics])
        axes.set(xlabel="epoch", ylabel="cost (mean loss of its batches)", title="Training", yscale="log")


def plot_accuracies(metrics: list[EpochMetrics], file: Path) -> None:
    """Draw each seed's accuracy after every epoch, and the mean over the seeds."""
    with _drawn(file, figsize=(NARROW, 3.2)) as axes:
        _draw_epochs(axes, metrics, [epoch.accuracy for epoch in metrics])
        axes.set(xlabel="epoch", ylabel=f"{metrics[-1].tested_on} accuracy", title="Test after each epoch")


def plot_runs(runs: Mapping[str, list[EpochMetrics]], field: str, label: str, file: Path) -> None:
    """Draw the mean over the seeds of several runs' costs or accuracies, and of several seeds a thin line each.

    Args:
      runs: The epochs of each run by its name; at least one.
      field: `cost` or `accuracy`.
      label: What that is.
      file: The picture.
    """
    with _drawn(file, figsize=(NARROW, 3.6)) as axes:
        means = []
        for i, metrics in enumerate(runs.values()):
            epochs, values = [epoch.epoch for epoch in metrics], [getattr(epoch, field) for epoch in metrics]
            axes.plot(epochs, values, color=f"C{i}", alpha=0.35, linewidth=1)
            means += axes.plot(epochs, np.mean(values, axis=1), "o-", color=f"C{i}", markersize=3)
        axes.set(xlabel="epoch", ylabel=label, yscale="log" if field == "cost" else "linear")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend = axes.legend(means, map(str, range(len(means))), fontsize=8)
        for text, name in zip(legend.get_texts(), runs, strict=True):  # a label given at once must not begin with _
            text.set(text=name if len(name) <= 40 else f"...{name[-37:]}", parse_math=False)


def _draw_epochs(axes: Axes, metrics: list[EpochMetrics], values: list[list[float]]) -> None:
    """Draw a line for each seed, and their mean.

    Args:
      axes: To draw on.
      metrics: Of the epochs.
      values: For each epoch, each seed's.
    """
    epochs = [epoch.epoch for epoch in metrics]
    several = len(values[0]) > 1
    if several:
        axes.plot(epochs, values, color=COLOURS["cnn-jax"], alpha=0.35, linewidth=1)
    colour = "#333333" if several else COLOURS["cnn-jax"]
    axes.plot(epochs, np.mean(values, axis=1), "o-", color=colour, markersize=3, label="mean")
    if several:
        axes.legend()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_confusion(confusion: np.ndarray, class_names: Sequence[str], file: Path) -> None:
    """Draw a confusion matrix, (K, K), int: the number of images by class (row) and predicted class (column)."""
    classes = len(confusion)
    is_correct = np.eye(classes, dtype=bool)
    with _drawn(file, figsize=(NARROW, NARROW)) as axes:
        # Only the mistakes are coloured: on a scale up to the hundreds on the diagonal they would all be white.
        largest = np.where(is_correct, 1, confusion).max()
        axes.imshow(np.where(is_correct, np.nan, confusion), cmap=COUNTS, vmin=0, vmax=largest)
        if classes <= COUNTED_CLASSES:
            for (row, column), count in np.ndenumerate(confusion):
                if count:
                    weight = "bold" if row == column else None
                    axes.text(column, row, str(count), ha="center", va="center", fontsize=8, weight=weight)
            names = [textwrap.shorten(name, 12, placeholder="...") for name in class_names]
            axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 2 else 0, parse_math=False)
            axes.set_yticks(range(classes), names, parse_math=False)
        axes.set(xlabel="predicted class", ylabel="class", title="Confusion matrix")


def plot_mistakes(mistakes: Sequence[tuple[np.ndarray, str, str, float, np.ndarray]], file: Path) -> None:
    """Draw misclassified images, and beside each where the network looked.

    Args:
      mistakes: Image (height, width, channels), uint8; label; prediction; the prediction's probability, in [0, 1]; what
        each pixel contributes to the prediction, (height, width). The words stand above the image.
      file: The picture.
    """
    columns = 3
    rows = max(1, math.ceil(len(mistakes) / columns))
    size = (NARROW, 1.3 * rows + 0.3)
    with _drawn(file, rows, columns, figsize=size, squeeze=False) as panels:
        panels[0, 0].figure.suptitle("Most confident mistakes" if mistakes else "No mistakes")
        for axes in panels.flat:
            axes.axis("off")
        for axes, (image, label, prediction, probability, saliency) in zip(panels.flat, mistakes, strict=False):
            height, width = saliency.shape
            _draw_image(axes, image, (0, width, height, 0))
            axes.imshow(draw_saliency(image, saliency), extent=(1.1 * width, 2.1 * width, height, 0))
            axes.set_xlim(0, 2.1 * width)
            short = len(label + prediction) < 14
            title = f"{label} →{' ' if short else chr(10)}{prediction}\n{describe_probability(probability)}"
            axes.set_title(title, fontsize=10 if short else 7, parse_math=False)


def plot_reliability(each: Sequence[Reliability], file: Path) -> None:
    """Draw the accuracy over the stated probability, before a network is calibrated and after that."""
    with _drawn(file, figsize=(NARROW, 3.6)) as axes:
        axes.plot([0, 1], [0, 1], color="#8d99ae", linewidth=1, linestyle="--")
        for bins, label in zip(each, ("as trained", "calibrated"), strict=False):
            axes.plot(bins.stated, bins.right, marker="o", markersize=4, label=label)
        axes.set(xlabel="stated probability", ylabel="fraction right", title="Reliability", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend()


def plot_kernels(kernels: np.ndarray, name: str, file: Path) -> None:
    """Draw a convolution's kernels, (height, width, channels in, channels out), on one scale around 0."""
    height, width, ins, outs = kernels.shape
    # Enlarged, so that the gaps are narrow beside the nine weights.
    tiles = kernels.transpose(2, 3, 0, 1).reshape(-1, height, width).repeat(4, axis=1).repeat(4, axis=2)
    sheet = _mosaic(tiles, outs if ins > 1 else _columns(outs))
    size = (NARROW, NARROW * sheet.shape[0] / sheet.shape[1] + 1.2)
    with _drawn(file, figsize=size) as axes:
        # A few weights far from 0 would make all others pale.
        image = _draw_sheet(axes, sheet, np.percentile(np.abs(kernels), 99.5))
        axes.set_title(f"{name}: {height}x{width} kernels", fontsize=10)
        if ins > 1:
            axes.set(xlabel=f"to each of {outs} channels", ylabel=f"from each of {ins}")
        axes.figure.colorbar(image, orientation="horizontal", shrink=0.6, aspect=40, extend="both")


def plot_feature_maps(image: np.ndarray, maps: dict[str, np.ndarray], file: Path) -> None:
    """Draw an image, and below it each step's feature maps, (height, width, channels), on one scale around 0."""
    sheets = {title: _mosaic(map_.transpose(2, 0, 1), _columns(map_.shape[2])) for title, map_ in maps.items()}
    ratios = [0.2, *(sheet.shape[0] / sheet.shape[1] for sheet in sheets.values())]
    size = (NARROW, NARROW * sum(ratios) + 1.5)
    with _drawn(file, len(ratios), figsize=size, height_ratios=ratios) as (first, *others):
        _draw_image(first, image)
        first.set_title("image", fontsize=10)
        largest = max(np.abs(map_).max() for map_ in maps.values())
        drawn = []
        for axes, (title, sheet) in zip(others, sheets.items(), strict=True):
            drawn.append(_draw_sheet(axes, sheet, largest))
            axes.set_title(f"{title}, {'x'.join(map(str, maps[title].shape))}", fontsize=10)
        first.figure.colorbar(drawn[-1], ax=others, orientation="horizontal", shrink=0.6, aspect=40, pad=0.02)


def _draw_image(axes: Axes, image: np.ndarray, extent: tuple[float, float, float, float] | None = None) -> None:
    """Draw an image (height, width, channels), uint8: in colour if it has three channels, else only the first.

    Args:
      axes: To draw on.
      image: To draw.
      extent: Its left, right, bottom and top; None for a pixel a unit.
    """
    if image.shape[-1] == 3:
        axes.imshow(image, extent=extent)
    else:
        axes.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=255, extent=extent)
    axes.set(xticks=[], yticks=[])


def _draw_sheet(axes: Axes, sheet: np.ndarray, largest: float) -> AxesImage:
    axes.set(xticks=[], yticks=[])
    return axes.imshow(sheet, cmap=SIGNED, vmin=-largest, vmax=largest, aspect="auto")


def _columns(tiles: int) -> int:
    """Return the number of tiles per row: few enough that each can be seen, many enough that the sheet stays low."""
    return 8 if tiles <= 32 else 16


def _mosaic(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Lay out tiles, (n, height, width), row by row with gaps of NaN between them."""
    rows = math.ceil(len(tiles) / columns)
    spaced = np.pad(tiles, ((0, rows * columns - len(tiles)), (0, 1), (0, 1)), constant_values=np.nan)
    height, width = spaced.shape[1:]
    sheet = spaced.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)
    return sheet[:-1, :-1]


@contextlib.contextmanager
def _drawn(
    file: Path, rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any
) -> Iterator[Any]:
    """Give a figure's panels to draw in, and write the picture when the block ends.

    It is made without pyplot: a notebook's own figures stay where it shows them.
    """
    with matplotlib.rc_context(DEFAULTS):
        figure = Figure(figsize=figsize, layout="constrained")
        yield figure.subplots(rows, columns, **options)
        _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    # `savefig` would lay it out twice.
    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a class's name that the font cannot write
        canvas.draw()
    png = io.BytesIO()
    imsave(png, np.asarray(canvas.buffer_rgba()), format="png")
    write_atomically(file, png.getvalue())
