"""Look inside a trained network: its layers' outputs, its confusion matrix and mistakes, and pictures of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import summary

from cnn_jax.analysis import plots
from cnn_jax.core.model import CNN, PlainCNN
from cnn_jax.core.sharding import of_seed
from cnn_jax.data.dataset import Dataset, scale_pixels
from cnn_jax.inference.logits import Reliability, logits, reliability, saliency
from cnn_jax.inference.logits import probabilities as probabilities_of
from cnn_jax.inference.pretrained import temperature_of
from cnn_jax.runs.folder import EpochMetrics, RunFolder
from cnn_jax.runs.restore import restore_run
from cnn_jax.runs.settings import Platform
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import LAYER_TABLE, Display

SHOWN_MISTAKES = 12
NAMED_CONFUSIONS = 3  # the most frequent ones, in words


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer and its output for one image.

    Attributes:
      name: Its name in `PlainCNN`.
      output: (height, width, channels) or (channels,), float32.
      parameters: The number of its trained parameters.
    """

    name: str
    output: np.ndarray
    parameters: int


class Mistake(NamedTuple):
    """A test image that the network puts into the wrong class.

    Attributes:
      image: (height, width, channels), uint8.
      label: Its class's name.
      prediction: The name of the class of the largest logit.
      probability: The network's probability for the predicted class, in [0, 1].
      saliency: How much each pixel contributes to the predicted class's logit, (height, width), float32.
    """

    image: np.ndarray
    label: str
    prediction: str
    probability: float
    saliency: np.ndarray


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The results of a trained network on the test images.

    Attributes:
      image: The first test image, (height, width, channels), uint8; `layers` shows its way through the network.
      label: Its class's name.
      class_names: The name of each class.
      layers: Each with its output, in order; empty if the network's layers are not those of `PlainCNN`.
      kernels: The kernels of each convolution, (3, 3, channels in, channels out), by the layer's name.
      confusion: (K, K), int: the number of test images by class (row) and predicted class (column).
      mistakes: The most confident ones, the most confident first; at most `SHOWN_MISTAKES`.
      temperature: What calibrates the network.
      reliability: By the logits as they are, and divided by the temperature.
    """

    image: np.ndarray
    label: str
    class_names: Sequence[str]
    layers: list[Layer]
    kernels: dict[str, np.ndarray]
    confusion: np.ndarray
    mistakes: list[Mistake]
    temperature: float = 1.0
    reliability: tuple[Reliability, ...] = ()


class Picture(NamedTuple):
    """A PNG file, and a sentence that says what it shows."""

    file: Path
    caption: str


def inspect_run(run: Path, *, data_dir: Path | None = None, platform: Platform | None = None) -> None:
    """Print each layer's output shape and number of parameters for a run's network, and draw what it has learned.

    Raises:
      NoCheckpointError: there is no such run, or none of its checkpoints can be used.
    """
    display, folder = Display(), RunFolder(run)
    start_devices(platform)
    trained = restore_run(folder, data_dir, display.say)
    variables = of_seed(trained.states.eval_variables, 0)
    plain = plain_network(trained.model, variables["params"])
    display.result(*tabulate(plain or trained.model, trained.dataset).splitlines())
    inspection = inspect_network(trained.model, variables, trained.dataset, trained.settings.validation)
    pictures = draw_pictures(inspection, trained.metrics, folder.pictures)
    which_seed = f", of seed {trained.settings.seed}" if trained.settings.seeds > 1 else ""
    display.say(f"{len(pictures)} pictures{which_seed} after {trained.step:,} steps are in {folder.pictures}")


def plain_network(model: nn.Module, params: dict) -> PlainCNN | None:
    """Return the layer-by-layer network that computes what a `CNN` does, whatever its number of blocks, or None."""
    blocks = [f"layer{number}" for number in range(1, len(params))]
    if not isinstance(model, CNN) or set(params) != {*blocks, "fc"}:
        return None
    features = tuple(params[name]["kernel"].shape[-1] for name in blocks)
    return PlainCNN(features=features, num_classes=params["fc"]["kernel"].shape[-1])


def tabulate(model: nn.Module, dataset: Dataset) -> str:
    """Return a table of a network's layers: input, output and parameters of each.

    The shapes are those of one image. The table of the tutorial's network is 80 columns wide.
    """
    console, style = LAYER_TABLE["console_kwargs"], LAYER_TABLE["table_kwargs"]
    tabulate_for = summary.tabulate(model, jax.random.key(0), console_kwargs=console, table_kwargs=style)
    # The user's own networks take batches, and may do something else with one image that is none.
    images = dataset.test_images[0] if isinstance(model, PlainCNN) else dataset.test_images[:1]
    table = tabulate_for(scale_pixels(jnp.asarray(images)))
    return "\n".join(line.rstrip() for line in table.strip("\n").splitlines())


def inspect_network(model: nn.Module, variables: dict, dataset: Dataset, validation: int | None = None) -> Inspection:
    """Run a network on all test images, and on the first one layer by layer.

    Args:
      model: The network.
      variables: Its weights, and its state if it has one, on the host.
      dataset: The data set that it was trained on.
      validation: How many of the training images were held out; they calibrate the network.
    """
    params, outputs = variables["params"], logits(model, variables, dataset.test_images)
    plain, temperature = plain_network(model, params), temperature_of(model, variables, dataset, validation)
    of_each = [probabilities_of(outputs, each) for each in (1.0, temperature)]
    probabilities = of_each[-1]
    labels, predictions, confidences = dataset.test_labels, probabilities.argmax(axis=1), probabilities.max(axis=1)
    names, confusion = dataset.class_names, np.zeros((dataset.num_classes,) * 2, int)
    np.add.at(confusion, (labels, predictions), 1)
    wrong = np.flatnonzero(predictions != labels)
    most_confident = wrong[np.argsort(-confidences[wrong], kind="stable")][:SHOWN_MISTAKES]
    saliencies = saliency(model, variables, dataset.test_images[most_confident], predictions[most_confident])
    return Inspection(
        image=dataset.test_images[0],
        label=names[labels[0]],
        class_names=names,
        layers=run_layers(plain, params, dataset.test_images[0]) if plain else [],
        kernels={name: params[name]["kernel"] for name in params if name != "fc"} if plain else {},
        confusion=confusion,
        mistakes=[
            Mistake(dataset.test_images[i], names[labels[i]], names[predictions[i]], float(confidences[i]), map_)
            for i, map_ in zip(most_confident, saliencies, strict=True)
        ],
        temperature=temperature,
        reliability=tuple(reliability(each, dataset.test_labels) for each in of_each[: 1 if validation is None else 2]),
    )


def run_layers(model: PlainCNN, params: dict, image: np.ndarray) -> list[Layer]:
    """Return every layer's output for an image (height, width, channels), uint8."""

    @jax.jit
    def outputs_by_name(params: dict, pixels: jax.Array) -> Mapping[str, Any]:
        _, kept = model.apply({"params": params}, pixels, capture_intermediates=True, mutable="intermediates")
        return kept["intermediates"]

    outputs = jax.device_get(outputs_by_name(params, scale_pixels(image)))
    blocks = range(1, len(model.features) + 1)
    names = [f"{kind}{number}" for number in blocks for kind in ("layer", "relu", "pool")] + ["flatten", "fc"]
    return [
        Layer(name, outputs[name]["__call__"][0], sum(leaf.size for leaf in jax.tree.leaves(params.get(name, {}))))
        for name in names
    ]


def describe_reliability(inspection: Inspection) -> str:
    """Return the expected calibration error, before and after the network is calibrated, as a sentence."""
    errors = [f"{each.error:.4f}" for each in inspection.reliability]
    if len(errors) == 1:
        return (
            "How often the network is right where it states a probability; the expected calibration error is "
            f"{errors[0]}. Nothing was held out (--validation) to calibrate it on."
        )
    return (
        "How often the network is right where it states a probability; the expected calibration error is "
        f"{errors[0]}, and {errors[1]} with the temperature {inspection.temperature:.2f}."
    )


def describe_confusion(inspection: Inspection) -> str:
    """Return how many test images are classified correctly, and which classes are most often confused, in words."""
    confusion, names = inspection.confusion, inspection.class_names
    correct, count = int(confusion.trace()), int(confusion.sum())
    text = f"{correct:,} of {count:,} test images are classified correctly"
    wrong = np.where(np.eye(len(confusion), dtype=bool), 0, confusion)
    most_frequent = np.argsort(-wrong, axis=None, kind="stable")[:NAMED_CONFUSIONS]
    pairs = [np.unravel_index(i, wrong.shape) for i in most_frequent if wrong.flat[i]]
    named = [f"{names[label]} as {names[prediction]} ({wrong[label, prediction]:,})" for label, prediction in pairs]
    if not named:
        return f"{text}."
    return f"{text}; the most frequent mistakes, class and predicted class: {', '.join(named)}."


def draw_pictures(inspection: Inspection, metrics: list[EpochMetrics], folder: Path) -> dict[str, Picture]:
    """Draw an inspection, and the run's epochs if it has any, to a folder; return the pictures by name."""
    drawings: dict[str, tuple[str, Callable[[Path], None]]] = {
        "confusion": (
            describe_confusion(inspection),
            functools.partial(plots.plot_confusion, inspection.confusion, inspection.class_names),
        ),
        "mistakes": (
            "The most confident mistakes: each image's class, the predicted class, and its probability. Beside each "
            "image, the pixels that speak for the predicted class are red, and those that speak against it blue.",
            functools.partial(plots.plot_mistakes, inspection.mistakes),
        ),
    }
    if inspection.reliability:
        drawings["reliability"] = (
            describe_reliability(inspection),
            functools.partial(plots.plot_reliability, inspection.reliability),
        )
    if metrics:
        drawings["cost"] = (
            "The cost of each epoch: the mean loss of its batches.",
            functools.partial(plots.plot_costs, metrics),
        )
        drawings["accuracy"] = (
            f"The {metrics[-1].tested_on} accuracy after each epoch.",
            functools.partial(plots.plot_accuracies, metrics),
        )
    outputs = {layer.name: layer.output for layer in inspection.layers}
    for number, (name, kernels) in enumerate(inspection.kernels.items(), start=1):
        height, width, ins, outs = kernels.shape
        drawings[f"kernels{number}"] = (
            f"The {height}x{width} kernels of {name}, from {ins} to {outs} channels.",
            functools.partial(plots.plot_kernels, kernels, name),
        )
        maps = {"convolution": outputs[name], "ReLU": outputs[f"relu{number}"], "pooling": outputs[f"pool{number}"]}
        drawings[f"maps{number}"] = (
            f"The first test image, of class {inspection.label}, on its way through block {number}.",
            functools.partial(plots.plot_feature_maps, inspection.image, maps),
        )
    folder.mkdir(exist_ok=True)
    pictures = {}
    for name, (caption, draw) in drawings.items():
        pictures[name] = Picture(folder / f"{name}.png", caption)
        draw(pictures[name].file)
    return pictures
