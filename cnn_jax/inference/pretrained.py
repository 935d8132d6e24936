"""A trained network, how it was trained and how it reads pictures, from a run or from the package."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import scipy.special
from flax import linen as nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cnn_jax.core.model import CNN
from cnn_jax.data.dataset import Dataset, hold_out
from cnn_jax.data.published import numbers
from cnn_jax.inference.characters import find_characters
from cnn_jax.inference.logits import fit_temperature, logits, probabilities
from cnn_jax.inference.preprocess import SIZE, Box, Character, background_of, find_character, prepare_picture
from cnn_jax.inference.torch_layout import params_from_torch, params_to_torch
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runtime.devices import versions
from cnn_jax.runtime.errors import InputFileError, UsageError
from cnn_jax.runtime.records import (
    Byte,
    Count,
    Fraction,
    NotNegative,
    Positive,
    Record,
    Seed,
    Size,
    decode,
    encode,
    unreadable,
)

BACKGROUND_IMAGES = 1000  # of the training images, whose edges tell a data set's background
PACKAGED = Path(__file__).parent / "trained" / "mnist.safetensors"
# Tells digits from all else; python -m benchmarks.detector trains it.
DETECTOR = PACKAGED.with_name("detector.safetensors")
DIGITS = numbers(10)
# An image is shown as a digit if that has at least this probability, as it has in 99.2 % of the 20,000 training images
# of MNIST that the detector was not trained on.
LEAST_PROBABILITY, LEAST_BESIDE_DIGITS = 0.2, 0.05
# Of several characters in a picture, one has at least the first, and those of a line have on average the second: the
# search tries so many pieces of the ink that of nearly every scribble some are read as digits with less.
LEAST_OF_SEVERAL, LEAST_OF_LINE = 0.8, 0.55
# The network's probabilities count as this power of themselves beside the detector's: it has seen digits alone, and is
# too sure of all else. Of MNIST's test images both together tell 99.47 %, and the packaged network by itself 99.41 %.
SHARE = 0.25
AT_ONCE = 4  # images that the networks judge together: few are asked about at a time


class Provenance(Record, frozen=True, kw_only=True):
    """How a network was trained: `steps` is the number of steps that were taken, which may be fewer than planned."""

    recipe: str
    epochs: NotNegative
    seed: Seed
    steps: Count


class NetworkRecord(Record, frozen=True, kw_only=True):
    """What a safetensors file records of its weights: a `TrainedModel` without its name and weights."""

    features: tuple[Size, Size]
    num_classes: Size
    class_names: tuple[str, ...] = ()
    background: Byte = 0
    temperature: Positive = 1.0
    image_shape: tuple[Size, Size, Size]
    dataset: str
    test_accuracy: Fraction | None
    training: Provenance
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a network makes of a character, or of a whole picture.

    Attributes:
      box: Its left, top, right and bottom, in the picture's pixels.
      image: What the network got, (height, width, channels), uint8.
      probabilities: Of each class, (num_classes,), float64.
      index: The most probable class; None where there is no digit.
    """

    box: Box
    image: np.ndarray
    probabilities: np.ndarray
    index: int | None


class _Judged(NamedTuple):
    """What the networks make of an image.

    Attributes:
      classes: The probability of each class, (num_classes,), by the network alone, or by both where it asks the other.
      digit: The probability that it is a digit; 1 where the classes are no digits.
      cost: How improbable it is that it is one digit, as both networks tell: a negative logarithm.
    """

    classes: np.ndarray
    digit: float
    cost: float


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The weights of one seed, and how they were trained.

    Attributes:
      name: The name of the run or of the file.
      params: The weights, float32.
      features: Channels after the first and the second block.
      class_names: The name of each class.
      background: The median of the pixels at the edges of the training images, in 0..255.
      temperature: Divides the logits, so that the probabilities are calibrated: fitted on the images held out for
        validation; 1 where there were none.
      image_shape: (height, width, channels) of the images.
      dataset: The data set that the network was trained on.
      test_accuracy: The accuracy on that data set's test images, in [0, 1]; None if it was not measured.
      training: How it was trained.
      own_model: A network of the user's; None for a `CNN`.
      model_state: What that keeps beside its weights.
      asks_detector: Whether a digit in a picture is what it and the detector tell together, as the packaged network's:
        the detector has learned ways to write that MNIST does not have.
    """

    name: str
    params: dict
    features: tuple[int, int]
    class_names: tuple[str, ...]
    background: int
    temperature: float
    image_shape: tuple[int, int, int]
    dataset: str
    test_accuracy: float | None
    training: Provenance
    own_model: nn.Module | None = None
    model_state: dict = dataclasses.field(default_factory=dict)
    asks_detector: bool = False

    @property
    def model(self) -> nn.Module:
        """The network's architecture."""
        return self.own_model or CNN(features=self.features, num_classes=len(self.class_names))

    @property
    def variables(self) -> dict:
        """The weights and what the network keeps beside them, as Flax takes them."""
        return {"params": self.params, **self.model_state}

    @property
    def preparation(self) -> Literal["character", "resize"]:
        """How a picture becomes an image for the network: characters are laid out as MNIST does."""
        characters = all(len(name) == 1 and name.isalnum() for name in self.class_names)
        return "character" if characters and self.image_shape == (SIZE, SIZE, 1) else "resize"

    def read(self, colours: np.ndarray, *, one: bool = False) -> list[list[Reading]]:
        """Read the characters in a picture, line by line, or, where classes are no characters, the whole picture.

        Args:
          colours: (H, W, 3), float32, in 0..255.
          one: Whether the picture shows one character.
        """
        judged: dict[bytes, _Judged] = {}

        def cost(images: np.ndarray) -> np.ndarray:
            found = self._judge(images)
            judged.update((image.tobytes(), each) for image, each in zip(images, found, strict=True))
            return np.array([each.cost for each in found])

        if self.preparation == "resize":
            image = prepare_picture(colours, self.image_shape, self.background)
            whole = (0, 0, colours.shape[1], colours.shape[0])
            lines = [[Character(whole, image)]] if image is not None else []
        elif one:
            character = find_character(colours)
            lines = [[character]] if character is not None else []
        else:
            lines = find_characters(colours, cost if self.reads_digits else None)
        unseen = [each.image for line in lines for each in line if each.image.tobytes() not in judged]
        if unseen:
            cost(np.stack(unseen))
        sure = [judged[character.image.tobytes()].digit >= LEAST_OF_SEVERAL for line in lines for character in line]
        readings = []
        for line in lines:
            of_line = [judged[character.image.tobytes()] for character in line]
            of_digits = any(sure) and np.mean([each.digit for each in of_line]) >= LEAST_OF_LINE
            least = LEAST_PROBABILITY if len(sure) == 1 or of_digits else np.inf
            if any(each.digit >= least for each in of_line):
                least = LEAST_BESIDE_DIGITS
            readings.append(
                [
                    Reading(*character, each.classes, int(each.classes.argmax()) if each.digit >= least else None)
                    for character, each in zip(line, of_line, strict=True)
                ]
            )
        return readings

    @property
    def reads_digits(self) -> bool:
        """Whether its classes are the digits, which can be told from everything else."""
        return self.class_names == DIGITS and self.preparation == "character"

    def _judge(self, images: np.ndarray) -> list["_Judged"]:
        """Judge images, (N, height, width, channels), uint8, so many at once that one size is compiled."""
        if not self.reads_digits:
            return [_Judged(each, 1.0, 0.0) for each in self.probabilities(images)]
        padded = np.pad(images, ((0, -len(images) % AT_ONCE), (0, 0), (0, 0), (0, 0)))
        parts = np.split(padded, len(padded) // AT_ONCE)
        classes, digits = (
            np.concatenate([judge(part) for part in parts])[: len(images)]
            for judge in (self.probabilities, log_probabilities_of_digits)
        )
        both = digits + SHARE * np.log(np.maximum(classes, np.finfo(float).tiny))
        if self.asks_detector:  # a product of experts (Hinton, Neural Computation 14, 2002)
            classes = scipy.special.softmax(both, axis=1)
        return [_Judged(*each) for each in zip(classes, np.exp(digits).sum(axis=1), -both.max(axis=1), strict=True)]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Return the logits, (N, num_classes), float32, of images (N, height, width, channels), uint8."""
        return logits(self.model, self.variables, images)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return the probability of each class, (N, num_classes), float64, of images as for `logits`."""
        return probabilities(self.logits(images), self.temperature)


def log_probabilities_of_digits(images: np.ndarray) -> np.ndarray:
    """Return the logarithm of the probability, (N, 10), that images (N, 28, 28, 1), uint8, are each of the digits."""
    return scipy.special.log_softmax(_load_detector().logits(images).astype(np.float64), axis=1)[:, : len(DIGITS)]


@functools.cache
def _load_detector() -> TrainedModel:
    return read_trained(DETECTOR)


def load_packaged(seed: int | None = None) -> TrainedModel:
    """Load the network in the package, which has one seed.

    Raises:
      UsageError: another was asked for.
    """
    trained = dataclasses.replace(read_trained(PACKAGED), asks_detector=True)
    if seed not in (None, trained.training.seed):
        raise UsageError(
            f"--seed {seed}: the network in the package has seed {trained.training.seed} alone; leave out the seed"
        )
    return trained


def load_trained(run: Path | None, data_dir: Path | None, warn: Callable[[str], None]) -> TrainedModel:
    """Load the network of a run's first seed, or the packaged one if `run` is None.

    The arguments and failures are those of `load_trained_run`.
    """
    return load_packaged() if run is None else load_trained_run(run, data_dir, warn)[0]


def load_trained_run(
    run: Path, data_dir: Path | None, warn: Callable[[str], None], seed: int | None = None
) -> tuple[TrainedModel, Dataset]:
    """Load a run's network and the data set that it was trained on.

    Args:
      run: The run's folder.
      data_dir: Where tfds keeps its data sets; None to look where the run did.
      warn: Called with a line about each damaged checkpoint.
      seed: Which of the run's seeds; None for the first.

    Raises:
      UsageError: the run has no such seed.
      NoCheckpointError: there is no such run, or none of its checkpoints can be used.
    """
    # Orbax takes a second to import, and the packaged network does not need it.
    from cnn_jax.core.sharding import of_seed
    from cnn_jax.runs.restore import restore_run

    folder = RunFolder(run)
    restored = restore_run(folder, data_dir, warn)
    settings, dataset = restored.settings, restored.dataset
    seed = settings.seed if seed is None else seed
    i = seed - settings.seed
    if not 0 <= i < settings.seeds:
        raise UsageError(f"--seed {seed}: the run {folder.path} has {settings.which_seeds}")
    tested = (epoch for epoch in restored.metrics if epoch.tested_on == "test" and epoch.step == restored.step)
    accuracies = [epoch.accuracy[i] for epoch in tested]
    result = folder.read_result()
    if result is not None and result.step == restored.step:  # where images were held out, the only test
        accuracies += [result.test_accuracy] if result.seeds is None else []
        accuracies += [each.test_accuracy for each in result.seeds or () if each.seed == seed]
    variables = jax.tree.map(np.asarray, of_seed(restored.states.eval_variables, i))
    temperature = temperature_of(restored.model, variables, dataset, settings.validation)
    trained = TrainedModel(
        name=folder.path.name,
        params=variables.pop("params"),
        model_state=variables,
        own_model=restored.model if settings.model else None,
        features=settings.features,
        class_names=dataset.class_names,
        background=background_of(dataset.train_images[:BACKGROUND_IMAGES]),
        temperature=temperature,
        image_shape=dataset.train_images.shape[1:],
        dataset=dataset.name,
        test_accuracy=accuracies[-1] if accuracies else None,
        training=Provenance(recipe=settings.recipe, epochs=settings.epochs, seed=seed, steps=restored.step),
    )
    return trained, dataset


def temperature_of(model: nn.Module, variables: dict, dataset: Dataset, validation: int | None) -> float:
    """Return what calibrates a network, fitted on the training images held out for validation; 1 if none were."""
    if validation is None:
        return 1.0
    _, images, labels = hold_out(dataset, validation)
    return fit_temperature(logits(model, variables, images), labels)


def write_trained(trained: TrainedModel, file: Path) -> None:
    """Write a safetensors file: the weights in PyTorch's names and layout, everything else as JSON in its header.

    Raises:
      OSError: it could not be written.
    """
    unrecorded = ("name", "params", "own_model", "model_state", "asks_detector")
    recorded = {name: value for name, value in vars(trained).items() if name not in unrecorded}
    count = len(trained.class_names)
    record = NetworkRecord(**recorded, num_classes=count, versions=versions("cnn-jax", "jax", "jaxlib", "flax"))
    # Everything goes under one key, because safetensors writes several keys in an order that varies.
    content = save(params_to_torch(trained.params, trained.image_shape), metadata={"network": encode(record)})
    file.write_bytes(content)


def read_trained(file: Path) -> TrainedModel:
    """Read a file that `write_trained` wrote; nothing in it is ever executed.

    Raises:
      InputFileError: the file is missing or damaged, or holds something else.
    """
    try:
        with safe_open(file, framework="numpy") as content:
            metadata = content.metadata()["network"]
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise InputFileError(f"{file} is not a network of this program ({error}); export one to safetensors") from error
    record = decode(metadata, NetworkRecord, source=file, remedy="export a network to safetensors again")
    recorded = {name: getattr(record, name) for name in record.__struct_fields__}
    del recorded["versions"], recorded["num_classes"]
    recorded["class_names"] = record.class_names or numbers(record.num_classes)  # earlier files have no names
    if len(recorded["class_names"]) != record.num_classes:
        counts = f"it has {len(recorded['class_names'])} class names for {record.num_classes} classes"
        raise unreadable(file, counts, "export a network to safetensors again")
    trained = TrainedModel(name=file.stem, params={}, **recorded)
    images = jax.ShapeDtypeStruct((1, *trained.image_shape), np.float32)
    init = jax.eval_shape(trained.model.init, jax.random.key(0), images)["params"]
    template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), init)
    params = params_from_torch(tensors, template, trained.image_shape, source=file)
    return dataclasses.replace(trained, params=params)
