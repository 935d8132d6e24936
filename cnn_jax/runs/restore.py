"""What a run is made of, from its settings alone: its data, its seeds, its states, and those it was left in."""

import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cnn_jax import __version__
from cnn_jax.core.model import CNN
from cnn_jax.core.recipes import make_recipe
from cnn_jax.core.sharding import SEEDS, create_states, evaluate_seeds, make_mesh, place, place_test_set, seed_keys
from cnn_jax.core.training import TrainState
from cnn_jax.data.dataset import Dataset, check_sizes, fingerprint, load_dataset
from cnn_jax.runs.checkpoint import open_checkpoints
from cnn_jax.runs.folder import RunFolder, deciding_settings
from cnn_jax.runs.settings import Platform, TrainSettings
from cnn_jax.runtime.devices import device_bytes, start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import NoCheckpointError, UsageError

# Of a device's memory, for training images that stay there; more of them are streamed.
RESIDENT_SHARE = 0.4


class RestoredRun(NamedTuple):
    """A run as its newest checkpoint has it.

    Attributes:
      settings: The run's.
      model: Its network.
      states: On the host, of each array one for each seed.
      dataset: The data set that it was trained on.
    """

    settings: TrainSettings
    model: nn.Module
    states: TrainState
    dataset: Dataset


def evaluate_run(
    run: Path, *, unscaled: bool = False, data_dir: Path | None = None, platform: Platform | None = None
) -> None:
    """Test a run's newest checkpoint on all test images and print the accuracy: with several seeds, their mean.

    Raises:
      CnnJaxError: each failure as the class that names it.
    """
    display, folder = Display(), RunFolder(run)
    start_devices(platform)
    settings, model, states, dataset = restore_run(folder, data_dir, display.say)
    mesh = make_mesh(settings.seeds)
    test_set = place_test_set(dataset.test_images, dataset.test_labels, mesh)
    params = place(states.eval_params, mesh, P(SEEDS))
    results = evaluate_seeds(model.apply, params, *test_set, mesh=mesh, unscaled=unscaled)
    pixels = "unscaled pixels, 0..255, as the PyTorch tutorial tests" if unscaled else "pixels in [0, 1]"
    for seed, result in enumerate(results, start=settings.seed):
        of_seed = f", seed {seed}" if settings.seeds > 1 else ""
        display.say(
            f"{folder.path}{of_seed} after {int(states.step[0]):,} steps: {result.correct:,} of {result.count:,} "
            f"test images of {dataset.name} right, loss {result.loss:.4f}; on {pixels}"
        )
    display.accuracy(statistics.fmean(result.accuracy for result in results))


def restore_run(folder: RunFolder, data_dir: Path | None, warn: Callable[[str], None]) -> RestoredRun:
    """Restore a run's newest checkpoint, with the settings and the data set that it was trained with.

    Args:
      folder: The run's folder.
      data_dir: Where tfds keeps its data sets; None for where the run found them.
      warn: Told, in a line, of each checkpoint that is damaged.

    Raises:
      NoCheckpointError: there is no such run, or no checkpoint in it that can be used.
    """
    settings = folder.read_settings(data_dir)
    with open_checkpoints(folder.checkpoints, writing=False, warn=warn) as checkpoints:
        dataset = load_run_data(settings)
        train_examples = len(dataset.train_labels) - (settings.validation or 0)
        restored = checkpoints.restore_latest(*templates(settings, dataset, train_examples))
    if restored is None:
        raise NoCheckpointError(f"{folder.checkpoints} holds no sound checkpoint; train the run first")
    return RestoredRun(settings, make_model(settings, dataset), restored.state, dataset)


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


def resident_bytes(settings: TrainSettings) -> int | None:
    """Return how many bytes of training images may stay on the device; None for any number."""
    if settings.feed is None:
        return int(RESIDENT_SHARE * device_bytes())
    return 0 if settings.feed == "stream" else None


def make_model(settings: TrainSettings, dataset: Dataset) -> nn.Module:
    """Return a run's network."""
    return CNN(features=settings.features, num_classes=dataset.num_classes, dtype=jnp.dtype(settings.precision).type)


def initial_states(settings: TrainSettings, dataset: Dataset, train_examples: int, mesh: Mesh) -> TrainState:
    """Return the states before step 0, one for each seed.

    Args:
      settings: The run's.
      dataset: Whose images and classes shape the network.
      train_examples: How many of its images are trained on.
      mesh: Of `make_mesh`.
    """
    last_step = count_steps(settings.epochs, train_examples // settings.batch_size)
    recipe = make_recipe(settings.recipe, settings.learning_rate, last_step)
    init_keys, _, _ = seed_keys(seeds_of(settings), mesh)
    return create_states(init_keys, make_model(settings, dataset), dataset.train_images.shape[1:], recipe, mesh)


def count_steps(epochs: float, steps_per_epoch: int) -> int:
    """Return the steps of so many epochs: at least one."""
    return max(1, round(epochs * steps_per_epoch))


def seeds_of(settings: TrainSettings) -> np.ndarray:
    """Return the seeds of a run, (S,), uint32."""
    return np.arange(settings.seed, settings.seed + settings.seeds, dtype=np.uint32)


def templates(
    settings: TrainSettings, dataset: Dataset, train_examples: int
) -> tuple[TrainState, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a run's states and losses."""
    mesh = make_mesh(settings.seeds)
    states = jax.eval_shape(lambda: initial_states(settings, dataset, train_examples, mesh))
    losses = jax.ShapeDtypeStruct((settings.seeds, train_examples // settings.batch_size), jnp.float32)
    return states, losses


def describe_run(settings: TrainSettings, dataset: Dataset) -> dict:
    """Return what a run's results depend on, as JSON's types: what each of its checkpoints records."""
    return {
        "settings": deciding_settings(settings),
        "versions": {"cnn-jax": __version__} | {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "data": fingerprint(dataset),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    }
