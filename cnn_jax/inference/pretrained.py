"""A trained network with what it is for: of a run, or the one that the package brings."""

import dataclasses
import functools
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cnn_jax import __version__
from cnn_jax.core.model import CNN
from cnn_jax.data.dataset import Dataset, scale_pixels
from cnn_jax.inference.torch_layout import params_from_torch, params_to_torch
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runtime.errors import InputFileError, UsageError

PACKAGED = Path(__file__).parent / "trained" / "mnist.safetensors"
# Images at a time; a batch is filled up to a power of two, so that few sizes are ever compiled.
BATCH_SIZE = 256


@dataclasses.dataclass(frozen=True)
class Network:
    """The weights of one seed, and what they were trained on and how.

    Attributes:
      name: The run's, or the packaged file's.
      params: Of `CNN`, float32.
      features: Channels after the first and the second block.
      num_classes: Classes it tells apart.
      image_shape: (height, width, channels) of the images it takes.
      dataset: The data set it was trained on.
      test_accuracy: On that set's test images, in [0, 1]; None where it was not tested on them.
      training: How: `recipe`, `epochs`, `seed`, and the `steps` that were taken.
    """

    name: str
    params: dict
    features: tuple[int, int]
    num_classes: int
    image_shape: tuple[int, int, int]
    dataset: str
    test_accuracy: float | None
    training: dict

    @property
    def model(self) -> CNN:
        """The network's architecture."""
        return CNN(features=self.features, num_classes=self.num_classes)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Return the logits, (N, num_classes) float32, of images (N, height, width, channels) uint8."""
        batches = [self._logits(images[start : start + BATCH_SIZE]) for start in range(0, len(images), BATCH_SIZE)]
        return np.concatenate([np.zeros((0, self.num_classes), np.float32), *batches])

    def _logits(self, images):
        size = 1 << (len(images) - 1).bit_length()
        filled = np.zeros((size, *self.image_shape), np.uint8)
        filled[: len(images)] = images
        return np.asarray(_apply(self.params, filled, model=self.model))[: len(images)]


@functools.partial(jax.jit, static_argnames="model")
def _apply(params, images, *, model):
    return model.apply({"params": params}, scale_pixels(images))


def load_network(run: Path | None, data_dir: Path | None, warn: Callable[[str], None]) -> Network:
    """Load a network: of a run, of its first seed, or where `run` is None, the one in the package.

    The arguments and failures are those of `load_run_network`.
    """
    return read_network(PACKAGED) if run is None else load_run_network(run, data_dir, warn)[0]


def load_run_network(
    run: Path, data_dir: Path | None, warn: Callable[[str], None], seed: int | None = None
) -> tuple[Network, Dataset]:
    """Load a run's network and the data set that it was trained on.

    Args:
      run: The run's folder.
      data_dir: Where tfds keeps its data sets; None for where the run found them.
      warn: Told, in a line, of each checkpoint that is damaged.
      seed: Of a run of several seeds, which; by default the first.

    Raises:
      UsageError: the run has no such seed.
      NoCheckpointError: there is no such run, or no checkpoint in it that can be used.
    """
    # Orbax takes a second to import, and the packaged network does not need it.
    from cnn_jax.runs.restore import restore_run

    folder = RunFolder(run)
    settings, states, dataset = restore_run(folder, data_dir, warn)
    seed = settings.seed if seed is None else seed
    place = seed - settings.seed
    if not 0 <= place < settings.seeds:
        last_seed = settings.seed + settings.seeds - 1
        raise UsageError(f"--seed {seed}: the run {folder.path} has the seeds {settings.seed} to {last_seed}")
    steps = int(states.step[place])
    accuracies = [
        epoch.accuracy[place] for epoch in folder.read_metrics() if epoch.step == steps and epoch.tested_on == "test"
    ]
    network = Network(
        name=folder.path.name,
        params=jax.tree.map(lambda leaf: np.asarray(leaf[place]), states.eval_params),
        features=settings.features,
        num_classes=dataset.num_classes,
        image_shape=tuple(dataset.train_images.shape[1:]),
        dataset=dataset.name,
        test_accuracy=accuracies[-1] if accuracies else None,
        training={"recipe": settings.recipe, "epochs": settings.epochs, "seed": seed, "steps": steps},
    )
    return network, dataset


def write_network(network: Network, file: Path) -> None:
    """Write a safetensors file: the weights as PyTorch names and lays them out, the rest as JSON in its header.

    Raises:
      OSError: it could not be written.
    """
    about = {name: value for name, value in vars(network).items() if name not in ("name", "params")}
    about["versions"] = {"cnn-jax": __version__} | {name: version(name) for name in ("jax", "jaxlib", "flax")}
    # Under one key: safetensors writes several in an order that changes from one time to the next.
    file.write_bytes(
        save(params_to_torch(network.params, network.image_shape), metadata={"network": json.dumps(about)})
    )


def read_network(file: Path) -> Network:
    """Read what `write_network` wrote; nothing in the file is ever executed.

    Raises:
      InputFileError: the file is missing or damaged, or holds something else.
    """
    try:
        with safe_open(file, framework="numpy") as content:
            about = json.loads(content.metadata()["network"])
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - it is no dict
        about.pop("versions")
        network = Network(
            name=file.stem,
            params={},
            **about | {"features": tuple(about["features"]), "image_shape": tuple(about["image_shape"])},
        )
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputFileError(f"{file} is not a network of this program ({error}); export one to safetensors") from error
    images = np.zeros((1, *network.image_shape), np.float32)
    shapes = jax.eval_shape(lambda: network.model.init(jax.random.key(0), images))["params"]
    template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    params = params_from_torch(tensors, template, network.image_shape, source=file)
    return dataclasses.replace(network, params=params)
