"""A run's data by its settings, and a run as its newest checkpoint left it."""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from cnn_jax.core.evaluation import Evaluation
from cnn_jax.core.sharding import SEEDS, make_mesh, shard, to_host
from cnn_jax.core.training import TrainState
from cnn_jax.data.dataset import Dataset, check_sizes
from cnn_jax.data.loading import load_dataset
from cnn_jax.runs.checkpoint import Checkpoints, Restored, open_checkpoints
from cnn_jax.runs.folder import EpochMetrics, EpochRecord, RunFolder, deciding_settings, differences
from cnn_jax.runs.program import (
    Program,
    Sizes,
    check_resources,
    evaluate_seeds,
    make_program,
    shard_test_set,
    start_states,
)
from cnn_jax.runs.settings import RECIPE_DEFAULTS, Platform, TrainSettings, require
from cnn_jax.runtime.devices import compiler_flags, device_bytes, start_devices, versions
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import InputFileError, NoCheckpointError, UsageError
from cnn_jax.runtime.records import convert, unreadable

# The share of a device's memory for training images that stay there; more of them are streamed.
RESIDENT_SHARE = 0.4
# What to do about a config.json that its checkpoint contradicts.
REMEDY = "put it back, or start the run's training command again, which writes it anew"


class TrainedRun(NamedTuple):
    """A run and what it has learned.

    Attributes:
      settings: Those that the run was last started with.
      program: Its functions.
      states: Its states on the host; every array has one more axis in front, for the seeds.
      dataset: The data set that it was trained on.
      metrics: Those of the epochs behind it, in order.
      meta: What its results depend on, as `describe_run` returns it; earlier programs recorded less.
    """

    settings: TrainSettings
    program: Program
    states: TrainState
    dataset: Dataset
    metrics: list[EpochMetrics]
    meta: dict

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.program.model

    @property
    def step(self) -> int:
        """How many steps the states have behind them."""
        return int(self.states.step[0])


def evaluate_run(
    run: Path, *, unscaled: bool = False, data_dir: Path | None = None, platform: Platform | None = None
) -> None:
    """Test a run's newest checkpoint on all test images and print the accuracy: of several seeds, their mean.

    Args:
      run: The run's folder.
      unscaled: Feed pixels in 0..255, as the PyTorch tutorial does when it tests, in place of [0, 1].
      data_dir: Where tfds keeps its data sets; None for where the run found them.
      platform: Where to compute; None for the fastest there is.

    Raises:
      NoCheckpointError: there is no such run, or no checkpoint in it that can be used.
    """
    display = Display()
    start_devices(platform)
    trained = restore_run(RunFolder(run), data_dir, display.say)
    results = evaluate_trained(trained, unscaled=unscaled)
    pixels = "unscaled pixels, 0..255, as the PyTorch tutorial tests" if unscaled else "pixels in [0, 1]"
    for seed, result in enumerate(results, start=trained.settings.seed):
        of_seed = f", seed {seed}" if len(results) > 1 else ""
        display.say(
            f"{run}{of_seed} after {trained.step:,} steps: {result.correct:,} of {result.count:,} "
            f"test images of {trained.dataset.name} right, loss {result.loss:.4f}; on {pixels}"
        )
    display.accuracy(statistics.fmean(result.accuracy for result in results))


def evaluate_trained(trained: TrainedRun, *, unscaled: bool = False) -> list[Evaluation]:
    """Test every seed of a run on all test images of its data set."""
    mesh, dataset = trained.program.mesh, trained.dataset
    test_set = shard_test_set(dataset.test_images, dataset.test_labels, mesh)
    return evaluate_seeds(trained.program, shard(trained.states, mesh, P(SEEDS)), test_set, unscaled=unscaled)


def evaluate_as_tutorial(trained: TrainedRun) -> list[float] | None:
    """Return every seed's accuracy on unscaled pixels; None for data other than MNIST, which have no tutorial."""
    if trained.settings.dataset_dir is not None or trained.dataset.name != "mnist":
        return None
    return [test.accuracy for test in evaluate_trained(trained, unscaled=True)]


def restore_run(folder: RunFolder, data_dir: Path | None, warn: Callable[[str], None]) -> TrainedRun:
    """Restore a run from its newest sound checkpoint.

    Args:
      folder: The run's folder.
      data_dir: Where tfds keeps its data sets; None for where the run found them.
      warn: Called with a line about whatever is damaged.

    Raises:
      NoCheckpointError: there is no such run, or no checkpoint in it that can be used.
      InputFileError: config.json is not what the checkpoint was trained with, or the data have changed or moved since.
    """
    settings = folder.read_settings(data_dir)
    if settings.dataset_dir is not None and not settings.dataset_dir.is_dir():
        raise InputFileError(
            f"the data that the run {folder.path} was trained on are no longer in {settings.dataset_dir}; bring them "
            "back, or start its training command again with the --dataset-dir in which they are"
        )
    with open_checkpoints(folder.checkpoints, writing=False, warn=warn) as checkpoints:
        mesh = make_mesh(settings.seeds, jax.devices())
        try:
            dataset = load_run_data(settings)
            sizes = Sizes.of(dataset, settings)
            check_resources(settings, sizes, mesh, device_bytes())
            program = make_program(settings, sizes, mesh)
            restored = restore_latest(checkpoints, settings, sizes, program)
        except UsageError as error:  # the run was trained, so it fitted
            if isinstance(error.__cause__, ModuleNotFoundError):  # what its code imports is missing here
                raise
            raise unreadable(folder.path / "config.json", error, REMEDY) from error
    if restored is None:
        raise NoCheckpointError(f"{folder.checkpoints} holds no checkpoint; start its training command again")
    now = describe_run(settings, dataset)
    if differing := differing_settings(restored.meta, now):
        recorded = "; ".join(differing)
        raise unreadable(folder.path / "config.json", f"by its checkpoint, {recorded}", REMEDY)
    states = usable_states(folder, restored, settings, program, now)
    metrics = recorded_metrics(folder, restored.meta, warn)
    return TrainedRun(settings, program, states, dataset, metrics, restored.meta)


def restore_latest(
    checkpoints: Checkpoints, settings: TrainSettings, sizes: Sizes, program: Program
) -> Restored | None:
    """Return a run's newest sound checkpoint, whatever its settings.

    Raises:
      UsageError: it is of other code of the user's, without which it cannot be read.
    """
    now = deciding_settings(settings)

    def structure(meta: dict) -> TrainState:
        saved = meta["settings"]
        if saved["recipe"] == now["recipe"] and saved.get("model") == now.get("model"):
            return jax.eval_shape(program.start)
        if saved.get("model") != now.get("model") or saved["recipe"] not in RECIPE_DEFAULTS:
            raise UsageError("; ".join(differences(saved, now)))
        given = tuple(saved.get("hyperparameters", ()))
        its_own = dataclasses.replace(settings, recipe=saved["recipe"], hyperparameters=given)
        return jax.eval_shape(make_program(its_own, sizes, program.mesh).start)

    return checkpoints.restore_latest(structure)


def differing_settings(saved: dict, now: dict) -> list[str]:
    """Return how a run's settings differ from those that its checkpoint was saved with; before step 1 all may change.

    Args:
      saved: What the checkpoint records.
      now: What `describe_run` returns.
    """
    if saved["step"] == 0:
        return []
    before, after = saved["settings"], now["settings"]
    if saved["data"] == now["data"]:  # they may have been moved
        before = before | {"dataset_dir": after["dataset_dir"]}
    differing = differences(before, after)
    # The tutorial's steps are the same however many follow; a schedule's are not. Earlier programs record no epochs.
    epochs = saved.get("epochs", now["epochs"])
    if now["epochs"] < epochs or (now["epochs"] != epochs and after["recipe"] != "tutorial"):
        differing += differences({"epochs": epochs}, {"epochs": now["epochs"]})
    return differing


def usable_states(
    folder: RunFolder, restored: Restored, settings: TrainSettings, program: Program, now: dict
) -> TrainState:
    """Return the states that a checkpoint holds; weights that were imported go on with any settings of their shapes.

    Args:
      folder: The run's folder.
      restored: Its checkpoint.
      settings: Those to go on with.
      program: Their program.
      now: What `describe_run` returns.

    Raises:
      InputFileError: the data have changed since.
      UsageError: weights that were imported are of another shape.
    """
    saved = restored.meta
    # Weights that were imported have no step behind them: they go on with other settings, and so with other data.
    if saved["step"] > 0 or saved["settings"] == now["settings"]:
        if saved["data"] != now["data"]:
            raise InputFileError(
                f"the data in {settings.dataset_dir or settings.dataset} are not those that the run "
                f"{folder.path} was trained on; bring them back, or {folder.anew}"
            )
        return restored.state
    states = to_host(start_states(program))
    weights = jax.tree.map(lambda saved: saved[0], restored.state.params)
    shapes = [jax.tree.map(np.shape, tree) for tree in (weights, jax.tree.map(lambda now: now[0], states.params))]
    if shapes[0] != shapes[1]:
        features, classes = saved["settings"]["features"], np.size(weights["fc"]["bias"])
        has = f"--features {' '.join(map(str, features))} and {classes} classes"
        if (tuple(features), classes) == (settings.features, states.params["fc"]["bias"].shape[-1]):
            has = "images of another shape"
        raise UsageError(
            f"the run {folder.path} has the weights of a network with {has}; train it on with those, or {folder.anew}"
        )
    params = jax.tree.map(lambda now, saved: np.broadcast_to(saved, now.shape), states.params, weights)
    return states._replace(params=params, ema_params=None if states.ema_params is None else params)


def recorded_metrics(folder: RunFolder, meta: dict, warn: Callable[[str], None]) -> list[EpochMetrics]:
    """Return the metrics of the epochs before a checkpoint, and tell where metrics.jsonl has others.

    Raises:
      InputFileError: metrics.jsonl is damaged, and the checkpoint is from before they recorded metrics.
    """
    if "metrics" not in meta:
        return folder.read_metrics()
    source = f"the checkpoint of step {meta['step']} in {folder.path}"
    lines = [convert(line, EpochRecord, source=source, remedy=folder.anew) for line in meta["metrics"]]
    metrics = [EpochMetrics.of_record(line) for line in lines]
    if not folder.holds_metrics(metrics):
        warn(f"{folder.path / 'metrics.jsonl'} was edited or lost lines; the numbers are those of the checkpoint")
    return metrics


def describe_run(settings: TrainSettings, dataset: Dataset) -> dict:
    """Return what a run's results depend on, as JSON's types: what each of its checkpoints records."""
    return {
        "settings": deciding_settings(settings),
        "epochs": settings.epochs,
        "versions": versions("cnn-jax", "jax", "jaxlib", "flax", "optax"),
        "data": dataset.sha256,
        "class_names": list(dataset.class_names),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "XLA_FLAGS": compiler_flags(),
    }


def load_run_data(settings: TrainSettings) -> Dataset:
    """Load the data set that a run's settings name, and refuse one that does not fit them or the network."""
    dataset = load_dataset(
        settings.dataset,
        settings.dataset_dir,
        settings.data_dir,
        resident_bytes=resident_bytes(settings, device_bytes()),
        prepare=not settings.dry_run,
        transposed=settings.transposed,
    )
    if settings.class_names is not None:
        names = tuple(map(str.strip, settings.class_names.split(",")))
        count = f"{dataset.num_classes} names, one for each class"
        require(len(names) == dataset.num_classes, "--class-names", settings.class_names, count)
        dataset = dataclasses.replace(dataset, class_names=names)
    check_sizes(settings.batch_size, settings.validation, len(dataset.train_labels))
    check_image_size(settings, dataset.name, dataset.train_images.shape[1:])
    return dataset


def check_image_size(settings: TrainSettings, name: str, image_shape: tuple[int, int, int]) -> None:
    """Refuse a data set of images that are too small for the tutorial's network, where the settings name no other.

    Raises:
      UsageError: naming the set and their size.
    """
    height, width, _ = image_shape
    if settings.model is None and min(height, width) < 4:
        raise UsageError(f"{name} has images of {height}x{width}; two poolings need at least 4x4")


def streams(settings: TrainSettings, image_bytes: int, device_bytes: int) -> bool:
    """Whether a run's training images are too many bytes to stay on a device with so much memory."""
    limit = resident_bytes(settings, device_bytes)
    return limit is not None and image_bytes > limit


def resident_bytes(settings: TrainSettings, device_bytes: int) -> int | None:
    """Return how many bytes of training images may stay on a device; None for any number."""
    if settings.feed is None:
        return int(RESIDENT_SHARE * device_bytes)
    return 0 if settings.feed == "stream" else None
