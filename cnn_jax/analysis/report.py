"""A page about a run: one HTML file that needs no other file, no network and no script."""

import base64
from pathlib import Path

import jax
import jinja2
import numpy as np
from flax import linen as nn

from cnn_jax.analysis.layers import Inspection, Picture, draw_pictures, inspect_network
from cnn_jax.core.evaluation import logits
from cnn_jax.core.sharding import of_seed
from cnn_jax.core.statistics import mean_interval
from cnn_jax.data.dataset import Dataset
from cnn_jax.runs.folder import EpochMetrics, RunFolder, write_atomically
from cnn_jax.runs.restore import count_steps, restore_run
from cnn_jax.runs.settings import Platform, TrainSettings
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display, describe_seconds, describe_values

# The names and values of a table.
Rows = list[tuple[str, str]]


def report_run(
    run: Path, output: Path | None = None, *, data_dir: Path | None = None, platform: Platform | None = None
) -> None:
    """Test every seed of a run's newest checkpoint, and write the page about the run.

    Raises:
      NoCheckpointError: there is no such run, or no checkpoint in it that can be used.
      OSError: the page or a picture could not be written.
    """
    display, folder = Display(), RunFolder(run)
    start_devices(platform)
    settings, model, states, dataset = restore_run(folder, data_dir, display.say)
    seeds = [of_seed(states.eval_params, i) for i in range(settings.seeds)]
    predictions = [logits(model, params, dataset.test_images).argmax(axis=1) for params in seeds]
    accuracies = [float((predicted == dataset.test_labels).mean()) for predicted in predictions]
    file = output or folder.path / "report.html"
    write_report(file, folder, settings, model, seeds[0], dataset, step=int(states.step[0]), accuracies=accuracies)
    display.say(f"the report is {file}")


def write_report(
    file: Path,
    folder: RunFolder,
    settings: TrainSettings,
    model: nn.Module,
    params: dict,
    dataset: Dataset,
    *,
    step: int,
    accuracies: list[float],
) -> None:
    """Write the page about a run, and its pictures to the run's folder.

    Args:
      file: The page.
      folder: The run's, with its metrics, and its result where it has ended.
      settings: The run's.
      model: Its network.
      params: The weights of its first seed, on the host: those that it is tested with.
      dataset: The data set that it was trained on.
      step: The steps that were taken.
      accuracies: Each seed's on the test images, in [0, 1].
    """
    inspection, metrics = inspect_network(model, params, dataset), folder.read_metrics()
    pictures = draw_pictures(inspection, metrics, folder.path / "pictures")
    result = folder.read_result()
    if result.get("step") != step:  # it is of an earlier end, after which the run was continued
        result = {}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    page = environment.get_template("report.html").render(
        title=folder.path.resolve().name,
        subtitle=_subtitle(dataset, params),
        of_seed=f" of seed {settings.seed}" if settings.seeds > 1 else "",
        numbers=_numbers(settings, dataset, result, accuracies, step),
        results=_results(settings, dataset, metrics, result, accuracies),
        times=[(name, describe_seconds(seconds)) for name, seconds in result.get("seconds", {}).items()],
        pictures=pictures,
        drawn=dataset.test_images.shape[-1] != 3,
        layers=_layers(inspection),
        settings=_settings(settings),
        versions=list((result["versions"] | {"device": result["device"]}).items()) if result else [],
    )
    write_atomically(file, page)


def _subtitle(dataset: Dataset, params: dict) -> str:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return (
        f"{dataset.name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images, "
        f"{_size(dataset.test_images[0])}, {dataset.num_classes} classes; network of {parameters:,} parameters"
    )


def _numbers(settings: TrainSettings, dataset: Dataset, result: dict, accuracies: list[float], step: int) -> Rows:
    """Return what is to be seen first."""
    train_examples = len(dataset.train_labels) - (settings.validation or 0)
    steps_per_epoch = train_examples // settings.batch_size
    last_step = count_steps(settings.epochs, steps_per_epoch)
    epochs = f"{settings.epochs:g}" if step == last_step else f"{step / steps_per_epoch:.3g} of {settings.epochs:g}"
    rows = [("test accuracy", describe_values(accuracies)), ("epochs", epochs), ("steps", f"{step:,}")]
    # A run that was killed before its report is reported by a process that trained nothing.
    if "training" in result.get("seconds", {}):
        rows.append(("training", describe_seconds(result["seconds"]["training"])))
    return rows


def _results(
    settings: TrainSettings, dataset: Dataset, metrics: list[EpochMetrics], result: dict, accuracies: list[float]
) -> Rows:
    rows = [
        ("test accuracy", f"{describe_values(accuracies)} on pixels in [0, 1], of {len(dataset.test_labels):,} images")
    ]
    if "unscaled_test_accuracy" in result:
        rows.append(("as the tutorial tests", f"{result['unscaled_test_accuracy']:.4f} on pixels in 0..255"))
    if settings.seeds > 1:
        spread_of_seeds = mean_interval(accuracies)
        rows += [
            ("standard error", f"{spread_of_seeds.standard_error:.5f}"),
            ("95 % interval", f"{spread_of_seeds.low:.4f} to {spread_of_seeds.high:.4f}"),
        ]
        rows += [(f"seed {seed}", f"{accuracy:.4f}") for seed, accuracy in enumerate(accuracies, start=settings.seed)]
    if metrics:
        last = metrics[-1]
        rows += [
            (f"cost of epoch {last.epoch}", describe_values(last.cost)),
            (f"{last.tested_on} loss after it", describe_values(last.loss)),
        ]
        if last.tested_on == "validation":
            rows.append(("validation accuracy", f"{describe_values(last.accuracy)} of {settings.validation:,} images"))
        rows.append(
            ("speed, last epoch", f"{last.examples_per_second:,.0f} images/s, {last.step_milliseconds:.3g} ms a step")
        )
    return rows


def _layers(inspection: Inspection) -> list[tuple[str, str, str]]:
    """Return the rows of the table of layers: name, output size, number of parameters."""
    if not inspection.layers:
        return []
    rows = [("input", _size(inspection.image), "")]
    for layer in inspection.layers:
        rows.append((layer.name, _size(layer.output), f"{layer.parameters:,}" if layer.parameters else ""))
    return rows


def _size(array: np.ndarray) -> str:
    return "x".join(map(str, array.shape))


def _settings(settings: TrainSettings) -> Rows:
    """Return the settings that have a value, by their names on the command line."""
    rows = []
    for name, value in vars(settings).items():
        if value is not None and value is not False:
            values = value if isinstance(value, tuple) else (value,)
            text = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
            rows.append((f"--{name.replace('_', '-')}", text))
    return rows


def _data_uri(picture: Picture) -> str:
    """Return a URI that contains the picture itself."""
    return "data:image/png;base64," + base64.b64encode(picture.file.read_bytes()).decode()
