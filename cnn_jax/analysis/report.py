"""A page about a run: one HTML file that needs no other file, no network and no script."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnn_jax.analysis.layers import Inspection, draw_pictures, inspect_network
from cnn_jax.core.sharding import of_seed
from cnn_jax.inference.page import data_uri, templates_in
from cnn_jax.runs.folder import EpochMetrics, RunFolder
from cnn_jax.runs.restore import TrainedRun, evaluate_as_tutorial, evaluate_trained, restore_run
from cnn_jax.runs.settings import Platform, TrainSettings, option_name
from cnn_jax.runs.summary import Result, describe_task, result_rows
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display, describe_seconds, describe_values
from cnn_jax.runtime.files import write_atomically

# The names and values of a table.
Rows = list[tuple[str, str]]


def report_run(
    run: Path, output: Path | None = None, *, data_dir: Path | None = None, platform: Platform | None = None
) -> None:
    """Test every seed of a run's newest checkpoint, and write the page about the run.

    Raises:
      NoCheckpointError: there is no such run, or none of its checkpoints can be used.
      OSError: the page or a picture could not be written.
    """
    display, folder = Display(), RunFolder(run)
    start_devices(platform)
    trained = restore_run(folder, data_dir, display.say)
    accuracies = [test.accuracy for test in evaluate_trained(trained)]
    file = output or folder.report
    write_report(file, folder, Result(trained, accuracies, evaluate_as_tutorial(trained), trained_here=False))
    display.say(f"the report is {file}")


def write_report(file: Path, folder: RunFolder, result: Result) -> None:
    """Write the page about a run; the one in the run's folder has its pictures beside it, too.

    Args:
      file: The page.
      folder: The run's folder, with what is written of its result if it has ended.
      result: The run, and what it came to.
    """
    trained = result.run
    settings, dataset, step = trained.settings, trained.dataset, trained.step
    variables = of_seed(trained.states.eval_variables, 0)
    inspection = inspect_network(trained.model, variables, dataset, settings.validation)
    metrics = trained.metrics
    written = folder.read_result()
    if written is not None and written.step != step:  # before the run was continued
        written = None
    seconds = {} if written is None else written.seconds
    # The run itself may be one that cannot be written.
    beside = contextlib.nullcontext(folder.pictures) if file == folder.report else tempfile.TemporaryDirectory()
    with beside as place:
        page = render(
            "report.html",
            title=folder.path.resolve().name,
            subtitle=describe_task(dataset, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))),
            which_seed=f" of seed {settings.seed}" if settings.seeds > 1 else "",
            numbers=_numbers(trained, seconds, result.accuracies),
            results=result_rows(result) + _last_epoch(metrics),
            times=[(name, describe_seconds(seconds)) for name, seconds in seconds.items()],
            pictures=draw_pictures(inspection, metrics, Path(place)),
            drawn=dataset.test_images.shape[-1] != 3,
            layers=_layers(inspection),
            settings=_settings(settings),
            versions=[] if written is None else [*written.versions.items(), ("device", written.device)],
        )
    write_atomically(file, page)


def render(template: str, **values: Any) -> str:
    """Return a page made from a template beside this file, in which every value is text."""
    environment = templates_in(Path(__file__).parent)
    environment.filters["data_uri"] = lambda picture: data_uri(picture.file.read_bytes())
    return environment.get_template(template).render(values)


def _numbers(trained: TrainedRun, seconds: dict[str, float], accuracies: list[float]) -> Rows:
    """Return the numbers at the top of the page."""
    epochs, step, program = trained.settings.epochs, trained.step, trained.program
    done = f"{epochs:g}" if step == program.last_step else f"{step / program.steps_per_epoch:.3g} of {epochs:g}"
    rows = [("test accuracy", describe_values(accuracies)), ("epochs", done), ("steps", f"{step:,}")]
    # A run that was killed before its report is reported by a process that trained nothing.
    if "training" in seconds:
        rows.append(("training", describe_seconds(seconds["training"])))
    return rows


def _last_epoch(metrics: list[EpochMetrics]) -> Rows:
    if not metrics:
        return []
    last = metrics[-1]
    return [
        (f"cost of epoch {last.epoch}", describe_values(last.cost)),
        (f"{last.tested_on} loss after it", describe_values(last.loss)),
        ("speed, last epoch", f"{last.examples_per_second:,.0f} images/s, {last.step_milliseconds:.3g} ms per step"),
    ]


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
        is_used = name != "dataset" or settings.dataset_dir is None
        if value is not None and value is not False and is_used:
            values = value if isinstance(value, tuple) else (value,)
            text = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
            rows.append((option_name(name), text))
    return rows
