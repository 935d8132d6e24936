"""What a trained network does with its test images, layer by layer and mistake by mistake, and the pictures of it."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax import lax

from cnn_jax.analysis import plots
from cnn_jax.core.evaluation import BATCH_SIZE, Mistake
from cnn_jax.core.training import TrainState
from cnn_jax.data.dataset import Dataset, scale_pixels
from cnn_jax.runs.folder import EpochMetrics, RunFolder
from cnn_jax.runs.restore import restore_run
from cnn_jax.runs.settings import Platform
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import LAYER_TABLE, Display

SHOWN_MISTAKES = 12


class Layers(nn.Module):
    """The network of `CNN` one layer at a time, with the same weights: what its block op computes at once, in steps.

    Each step is a module, so that Flax can list it and keep what it returns. All of it is float32, whatever the
    precision of the run.
    """

    features: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits, (..., num_classes), of images (..., height, width, channels) with pixels in [0, 1]."""
        for number, features in enumerate(self.features, start=1):
            x = nn.Conv(features, (3, 3), precision="highest", name=f"layer{number}")(x)
            x = ReLU(name=f"relu{number}")(x)
            x = MaxPool(name=f"pool{number}")(x)
        x = Flatten(name="flatten")(x)
        return nn.Dense(self.num_classes, precision="highest", name="fc")(x)


class ReLU(nn.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(x)


class MaxPool(nn.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.max_pool(x, (2, 2), strides=(2, 2))


class Flatten(nn.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-3], -1)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer and what it made of one image.

    Attributes:
      name: As in `Layers`.
      output: (height, width, channels) or (channels,), float32.
      parameters: How many numbers it has learned.
    """

    name: str
    output: np.ndarray
    parameters: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A trained network, and what it does with the test images.

    Attributes:
      image: The first test image, (height, width, channels), uint8: what goes through the layers.
      label: Its class.
      layers: In their order.
      kernels: Of each convolution, (3, 3, channels in, channels out), by the layer's name.
      confusion: (K, K), int: how many images of each class, by row, were taken for each class, by column.
      mistakes: The most confident ones, the most confident first; at most `SHOWN_MISTAKES`.
    """

    image: np.ndarray
    label: int
    layers: list[Layer]
    kernels: dict[str, np.ndarray]
    confusion: np.ndarray
    mistakes: list[Mistake]


class Picture(NamedTuple):
    """A picture that was drawn.

    Attributes:
      file: A PNG.
      caption: What it shows, in a sentence.
    """

    file: Path
    caption: str


def inspect_run(run: Path, *, data_dir: Path | None = None, platform: Platform | None = None) -> None:
    """Print the shape and the parameters after every layer of a run's network, and draw what it has learned.

    Raises:
      CnnJaxError: each failure as the class that names it.
    """
    display, folder = Display(), RunFolder(run)
    start_devices(platform)
    settings, states, dataset = restore_run(folder, data_dir, display.say)
    params = jax.tree.map(lambda leaf: leaf[0], states.eval_params)
    display.result(tabulate(layers_of(params) or states.apply_fn.__self__, dataset))
    pictures = draw_pictures(inspect_network(states, dataset), folder.read_metrics(), folder.path / "pictures")
    of_seed = f", of seed {settings.seed}" if settings.seeds > 1 else ""
    display.say(
        f"{len(pictures)} pictures{of_seed} after {int(states.step[0]):,} steps are in {folder.path / 'pictures'}"
    )


def layers_of(params: dict) -> Layers | None:
    """Return the layers that weights are of, however many blocks there are; None for a network of another kind."""
    blocks = [f"layer{number}" for number in range(1, len(params))]
    if set(params) != {*blocks, "fc"}:
        return None
    features = tuple(params[name]["kernel"].shape[-1] for name in blocks)
    return Layers(features=features, num_classes=params["fc"]["kernel"].shape[-1])


def tabulate(layers: nn.Module, dataset: Dataset) -> str:
    """Return a table of the layers of a data set's network: what goes in and comes out, and what is learned.

    The shapes are those of one image. The tutorial's network takes 80 columns.
    """
    table = nn.tabulate(layers, jax.random.key(0), **LAYER_TABLE)(scale_pixels(dataset.test_images[0]))
    return "\n".join(line.rstrip() for line in table.strip("\n").splitlines())


def inspect_network(states: TrainState, dataset: Dataset) -> Inspection:
    """Test the network of a run's first seed and watch it at work.

    Args:
      states: On the host, of each array one for each seed, as `restore_run` returns them.
      dataset: That it was trained on.
    """
    params = jax.tree.map(lambda leaf: leaf[0], states.eval_params)
    predictions, probabilities = predict(states.apply_fn, params, dataset.test_images)
    labels = dataset.test_labels
    confusion = np.zeros((dataset.num_classes,) * 2, int)
    np.add.at(confusion, (labels, predictions), 1)
    wrong = np.flatnonzero(predictions != labels)
    most_confident = wrong[np.argsort(-probabilities[wrong], kind="stable")][:SHOWN_MISTAKES]
    return Inspection(
        image=dataset.test_images[0],
        label=int(labels[0]),
        layers=run_layers(params, dataset.test_images[0]),
        kernels={name: params[name]["kernel"] for name in params if name != "fc"} if layers_of(params) else {},
        confusion=confusion,
        mistakes=[
            Mistake(dataset.test_images[i], int(labels[i]), int(predictions[i]), float(probabilities[i]))
            for i in most_confident
        ],
    )


def predict(apply_fn: Callable, params: dict, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the class that each image is taken for, (M,) int32, and its probability by the softmax, (M,) float32.

    Args:
      apply_fn: The network's `apply`.
      params: Its weights.
      images: (M, height, width, channels), uint8.
    """
    missing = -len(images) % BATCH_SIZE
    batches = np.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
    batches = batches.reshape(-1, BATCH_SIZE, *images.shape[1:])
    predictions, probabilities = jax.device_get(_predict_batches(params, batches, apply_fn=apply_fn))
    return predictions.reshape(-1)[: len(images)], probabilities.reshape(-1)[: len(images)]


@functools.partial(jax.jit, static_argnames="apply_fn")
def _predict_batches(params, batches, *, apply_fn):
    def predict_batch(images):
        logits = apply_fn({"params": params}, scale_pixels(images))
        return logits.argmax(axis=-1).astype("int32"), nn.softmax(logits).max(axis=-1)

    return lax.map(predict_batch, batches)


def run_layers(params: dict, image: np.ndarray) -> list[Layer]:
    """Return what every layer makes of an image (height, width, channels), uint8, with the weights of a `CNN`.

    Of a network of another kind there is nothing to return.
    """
    layers = layers_of(params)
    if layers is None:
        return []

    @jax.jit
    def apply(params, pixels):
        _, kept = layers.apply({"params": params}, pixels, capture_intermediates=True, mutable="intermediates")
        return kept["intermediates"]

    kept = jax.device_get(apply(params, scale_pixels(image)))
    blocks = range(1, len(layers.features) + 1)
    names = [f"{kind}{number}" for number in blocks for kind in ("layer", "relu", "pool")] + ["flatten", "fc"]
    return [
        Layer(name, kept[name]["__call__"][0], sum(leaf.size for leaf in jax.tree.leaves(params.get(name, {}))))
        for name in names
    ]


def draw_pictures(inspection: Inspection, metrics: list[EpochMetrics], folder: Path) -> dict[str, Picture]:
    """Draw an inspection, and the epochs of the run if it has any, to a folder of pictures; return them by name."""
    right, count = int(inspection.confusion.trace()), int(inspection.confusion.sum())
    # What each shows, what draws it and what that is given.
    drawings = {
        "confusion": (
            f"Of {count:,} test images {right:,} are right; the others by their class and what they were taken for.",
            plots.plot_confusion,
            inspection.confusion,
        ),
        "mistakes": (
            "The most confident mistakes: the class of each image, what it was taken for, and with what probability.",
            plots.plot_mistakes,
            inspection.mistakes,
        ),
    }
    if metrics:
        tested_on = metrics[-1].tested_on
        drawings["cost"] = ("The cost of each epoch: the mean loss of its batches.", plots.plot_costs, metrics)
        drawings["accuracy"] = (f"The {tested_on} accuracy after each epoch.", plots.plot_accuracies, metrics)
    outputs = {layer.name: layer.output for layer in inspection.layers}
    for number, (name, kernels) in enumerate(inspection.kernels.items(), start=1):
        height, width, ins, outs = kernels.shape
        drawings[f"kernels{number}"] = (
            f"The {height}x{width} kernels of {name}, from {ins} to {outs} channels.",
            plots.plot_kernels,
            kernels,
            name,
        )
        drawings[f"maps{number}"] = (
            f"The first test image, of class {inspection.label}, on its way through block {number}.",
            plots.plot_feature_maps,
            inspection.image,
            {
                "convolution": outputs[name],
                "ReLU": outputs[f"relu{number}"],
                "pooling": outputs[f"pool{number}"],
            },
        )
    folder.mkdir(exist_ok=True)
    pictures = {}
    for name, (caption, plot, *arguments) in drawings.items():
        pictures[name] = Picture(folder / f"{name}.png", caption)
        plot(*arguments, pictures[name].file)
    return pictures
