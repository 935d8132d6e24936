"""A run's data by its settings, and a run as its newest checkpoint left it."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from cnn_jax.core.evaluation import Evaluation
from cnn_jax.core.model import CNN
from cnn_jax.core.sharding import SEEDS, make_mesh, shard, shard_test_set
from cnn_jax.core.training import TrainState
from cnn_jax.data.dataset import Dataset, check_sizes, fingerprint
from cnn_jax.data.loading import load_dataset
from cnn_jax.runs.checkpoint import open_checkpoints
from cnn_jax.runs.folder import RunFolder, deciding_settings
from cnn_jax.runs.program import Program, Sizes, evaluate_seeds, make_program
from cnn_jax.runs.settings import Platform, TrainSettings
from cnn_jax.runtime.devices import device_bytes, start_devices, versions
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import NoCheckpointError, UsageError

# The share of a device's memory for training images that stay there; more of them are streamed.
RESIDENT_SHARE = 0.4


class TrainedRun(NamedTuple):
    """A run and what it has learned.

    Attributes:
      settings: Those that the run was last started with.
      program: Its functions.
      states: Its states on the host; every array has one more axis in front, for the seeds.
      dataset: The data set that it was trained on.
    """

    settings: TrainSettings
    program: Program
    states: TrainState
    dataset: Dataset

    @property
    def model(self) -> CNN:
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


def restore_run(folder: RunFolder, data_dir: Path | None, warn: Callable[[str], None]) -> TrainedRun:
    """Restore a run from its newest sound checkpoint.

    Args:
      folder: The run's folder.
      data_dir: Where tfds keeps its data sets; None for where the run found them.
      warn: Called with a line for each checkpoint that is damaged.

    Raises:
      NoCheckpointError: there is no such run, or no checkpoint in it that can be used.
    """
    settings = folder.read_settings(data_dir)
    with open_checkpoints(folder.checkpoints, writing=False, warn=warn) as checkpoints:
        dataset = load_run_data(settings)
        program = make_program(settings, Sizes.of(dataset, settings), make_mesh(settings.seeds, jax.devices()))
        restored = checkpoints.restore_latest(*checkpoint_shapes(program, settings.seeds))
    if restored is None:
        raise NoCheckpointError(f"{folder.checkpoints} holds no sound checkpoint; train the run first")
    return TrainedRun(settings, program, restored.state, dataset)


def checkpoint_shapes(program: Program, seeds: int) -> tuple[TrainState, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of what a run's checkpoints hold: its states and an epoch's losses."""
    losses = jax.ShapeDtypeStruct((seeds, program.steps_per_epoch), jnp.float32)
    return jax.eval_shape(program.start), losses


def describe_run(settings: TrainSettings, dataset: Dataset) -> dict:
    """Return what a run's results depend on, as JSON's types: what each of its checkpoints records."""
    return {
        "settings": deciding_settings(settings),
        "versions": versions("cnn-jax", "jax", "jaxlib", "flax", "optax"),
        "data": fingerprint(dataset),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    }


def load_run_data(settings: TrainSettings) -> Dataset:
    """Load the data set that a run's settings name, and refuse one that does not fit them or the network."""
    dataset = load_dataset(
        settings.dataset, settings.dataset_dir, settings.data_dir, resident_bytes=resident_bytes(settings)
    )
    check_sizes(settings.batch_size, settings.validation, len(dataset.train_labels))
    height, width, _ = dataset.train_images.shape[1:]
    if min(height, width) < 4:
        raise UsageError(f"{dataset.name} has images of {height}x{width}; two poolings need at least 4x4")
    return dataset


def streams(settings: TrainSettings, dataset: Dataset) -> bool:
    """Whether a run's training images are too many to stay on the device."""
    limit = resident_bytes(settings)
    return limit is not None and dataset.train_images.nbytes > limit


def resident_bytes(settings: TrainSettings) -> int | None:
    """Return how many bytes of training images may stay on the device; None for any number."""
    if settings.feed is None:
        return int(RESIDENT_SHARE * device_bytes())
    return 0 if settings.feed == "stream" else None
