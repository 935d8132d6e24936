"""The program from Python, for notebooks and scripts: a trained network, and a training."""

import contextlib
import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from cnn_jax.cli import commands
from cnn_jax.core.evaluation import Evaluation, evaluate
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.loading import load_dataset
from cnn_jax.inference.pictures import MAXIMUM_PIXELS, Picture, picture_of, read_picture, too_narrow
from cnn_jax.inference.predict import as_text, in_file
from cnn_jax.inference.preprocess import Box, check_takes_pictures
from cnn_jax.inference.pretrained import Reading, TrainedModel, load_packaged, load_trained_run
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runtime.devices import require_own_devices, start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import CnnJaxError, StorageError, UsageError, describe_failure, lacks_memory
from cnn_jax.runtime.records import typed_as

T = TypeVar("T")


@contextlib.contextmanager
def _documented_failures() -> Iterator[None]:
    """Raise what the command would end with as a `CnnJaxError`, also where the system refuses a file or memory."""
    try:
        require_own_devices()
        yield
    except CnnJaxError:
        raise
    except (OSError, UnicodeEncodeError, MemoryError, RuntimeError) as error:
        of_files = isinstance(error, OSError | UnicodeEncodeError)
        if not of_files and not lacks_memory(error):
            raise
        line, _ = describe_failure(error)
        raise (StorageError if of_files else UsageError)(line.removeprefix("error: ")) from error


def _typed(kind: type[T], values: dict[str, Any], source: str) -> T:
    """Return arguments as the fields of a dataclass, whose types they must have; NumPy's numbers are Python's.

    Raises:
      UsageError: naming the first that has another.
    """
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in plain.items()}
    return typed_as(kind, plain, source=source)


@dataclasses.dataclass(frozen=True)
class _LoadOptions:
    seed: int | None
    data_dir: Path | None


@dataclasses.dataclass(frozen=True)
class _PredictOptions:
    one: bool


@dataclasses.dataclass(frozen=True)
class Symbol:
    """What a network makes of a character, or of a picture of anything else.

    Attributes:
      class_name: The name of the most probable class; None where there is no digit.
      index: Its number, or None.
      probability: The probability of the most probable class, in [0, 1].
      probabilities: Those of all classes, (K,), float64.
      box: Its left, top, right and bottom, in the pixels of the picture.
    """

    class_name: str | None
    index: int | None
    probability: float
    probabilities: np.ndarray
    box: Box


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a network makes of a picture.

    Attributes:
      text: The names of what it shows, in reading order; `?` for what is no digit, or for nothing.
      lines: Each character of each line.
    """

    text: str
    lines: list[list[Symbol]]

    @property
    def symbols(self) -> list[Symbol]:
        """The characters of all lines."""
        return [symbol for line in self.lines for symbol in line]


class Network:
    """A trained network: `load` returns one.

    Attributes:
      trained: Its weights, and how they were trained.
    """

    def __init__(self, trained: TrainedModel, dataset: Dataset | None, data_dir: Path | None):
        self.trained = trained
        self._dataset = dataset
        self._data_dir = data_dir

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class."""
        return self.trained.class_names

    @_documented_failures()
    def predict(
        self, pictures: str | Path | np.ndarray | Sequence[str | Path | np.ndarray], *, one: bool = False
    ) -> list[Answer]:
        """Return what each picture shows.

        Args:
          pictures: Files, or arrays of uint8, of NumPy or JAX. One of the shape of the network's images, with or
            without its channel, is taken for such an image; another, (H, W) or (H, W, 3), for a picture that is
            prepared like a file.
          one: Whether each picture shows one character.

        Raises:
          InputFileError: a file cannot be read.
          UsageError: an array is not of uint8, or of no such shape, or what is given is neither a file nor an array.
        """
        one = _typed(_PredictOptions, {"one": one}, "predict").one
        given, own = _of_numpy(pictures), self.trained.image_shape
        several = isinstance(given, list | tuple)
        if isinstance(given, np.ndarray):
            coloured = given.ndim == 3 and given.shape[2] <= 4 and given.shape[1:] != own[:2]
            several = given.ndim > 2 and given.shape != own and not coloured
        found = [self._image_or_answer(picture, one) for picture in (given if several else [given])]
        images = [each for each in found if isinstance(each, np.ndarray)]
        classes_of_images = iter(self.trained.probabilities(np.stack(images)) if images else ())
        return [
            self._answer_to_image(each, next(classes_of_images)) if isinstance(each, np.ndarray) else each
            for each in found
        ]

    def _image_or_answer(self, given: Any, one: bool) -> np.ndarray | Answer:
        """Return an array of the network's shape as it is, and the answer to any other picture, which takes memory."""
        given = _of_numpy(given)
        if isinstance(given, str | Path):
            picture = read_picture(str(given))
            Display().say(*picture.notes(str(given)))
            return self._answer_to_picture(picture, one)
        if not isinstance(given, np.ndarray):
            raise UsageError(
                f"{_kind(given)} is no picture: give a file's path, an array of uint8 (of an image of PIL, "
                "np.asarray(image.convert('RGB'))), or a list of them"
            )
        shape = self.trained.image_shape
        if given.dtype == np.uint8 and given.shape in (shape, shape[: 2 if shape[2] == 1 else 3]):
            return given.reshape(shape)
        sound = given.dtype == np.uint8 and given.ndim in (2, 3) and given.shape[2:] in ((), (3,))
        if not sound or not 0 < given.shape[0] * given.shape[1] <= MAXIMUM_PIXELS:
            raise UsageError(
                f"{_kind(given)} is no picture: it must be of uint8, with the shape {shape}, (height, width) or "
                f"(height, width, 3), and have at most {MAXIMUM_PIXELS:,} pixels"
            )
        if too_narrow(given.shape[:2]):
            raise UsageError(f"{_kind(given)} is too small or too narrow; give a picture of a whole digit")
        return self._answer_to_picture(picture_of(given), one)

    def _answer_to_image(self, image: np.ndarray, classes: np.ndarray) -> Answer:
        height, width = image.shape[:2]
        reading = Reading((0, 0, width, height), image, classes, int(classes.argmax()))
        return self._answer([[reading]], lambda box: box)

    def _answer_to_picture(self, picture: Picture, one: bool) -> Answer:
        check_takes_pictures(self.trained.image_shape, self.trained.name)
        return self._answer(self.trained.read(picture.colours, one=one), lambda box: in_file(box, picture))

    def _answer(self, lines: list[list[Reading]], place: Callable[[Box], Box]) -> Answer:
        symbols = [
            [
                Symbol(
                    class_name=None if reading.index is None else self.class_names[reading.index],
                    index=reading.index,
                    probability=float(reading.probabilities.max()),
                    probabilities=reading.probabilities,
                    box=place(reading.box),
                )
                for reading in line
            ]
            for line in lines
        ]
        return Answer(as_text([reading for line in lines for reading in line], self.class_names), symbols)

    @_documented_failures()
    def logits(self, images: np.ndarray) -> np.ndarray:
        """Return the logits, (N, K), float32, of images of the network's shape, (N, height, width, channels), uint8.

        Raises:
          UsageError: they are something else.
        """
        images, shape = _of_numpy(images), self.trained.image_shape
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != shape:
            expected = ", ".join(map(str, ("N", *shape)))
            raise UsageError(f"{_kind(images)} has no logits: give an array of uint8 with the shape ({expected})")
        return self.trained.logits(images)

    @_documented_failures()
    def test(self) -> Evaluation:
        """Return how the network does on its data set's test images."""
        dataset = self._dataset or load_dataset("mnist", None, self._data_dir)
        return evaluate(self.trained.model, self.trained.variables, dataset.test_images, dataset.test_labels)


def _of_numpy(value: Any) -> Any:
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise UsageError(f"{_kind(value)} is masked: give what it is without its mask, filled(0)")
    is_key = isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
    # The keys of JAX are no numbers; NumPy's matrices, an array of another kind, always have two axes.
    return np.asarray(value) if isinstance(value, jax.Array | np.ndarray) and not is_key else value


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} with the shape {value.shape}"
    return f"{textwrap.shorten(repr(value), 60, placeholder='...')} ({type(value).__name__})"


class Training(NamedTuple):
    """A training at its end.

    Attributes:
      run: Its folder, which `load` takes.
      accuracies: Each seed's accuracy on the test images, in [0, 1].
      metrics: A dictionary for each epoch, with the keys of metrics.jsonl.
    """

    run: Path
    accuracies: list[float]
    metrics: list[dict[str, Any]]

    def network(self) -> Network:
        """Load the network of the first seed."""
        return load(self.run)


@_documented_failures()
def load(run: str | Path | None = None, *, seed: int | None = None, data_dir: str | Path | None = None) -> Network:
    """Load a trained network.

    Args:
      run: A run's folder, or its name in `checkpoints`; None for the network in the package.
      seed: Which of the run's seeds; None for the first.
      data_dir: Where tfds keeps its data sets; None to look where the run did.

    Raises:
      CnnJaxError: there is no such run, it has no such seed, or it cannot be read.
    """
    if run is not None and (not isinstance(run, str | Path) or not str(run) or "\0" in str(run)):
        raise UsageError(f"load: {_kind(run)} is no run; give a run's folder, or its name in checkpoints")
    options = _typed(_LoadOptions, {"seed": seed, "data_dir": data_dir}, "load")
    seed, data_dir = options.seed, options.data_dir
    start_devices(None)
    if run is None:
        return Network(load_packaged(seed), None, data_dir)
    folder = commands.CommonOptions().run_folder(str(run))
    return Network(*load_trained_run(folder, data_dir, Display().say, seed), data_dir)


@_documented_failures()
def train(**settings: Any) -> Training:
    """Train a network, or continue a run of the same settings, and write its folder, as the command `train` does.

    Args:
      **settings: The options of `train`, with underscores: `epochs=1.5`, `seeds=3`, `dataset_dir=Path("data")`.

    Raises:
      CnnJaxError: what ends the command with a line, such as StopSignalError after an interruption, which is saved.
    """
    unknown = sorted(settings.keys() - {field.name for field in dataclasses.fields(TrainSettings)})
    if unknown or settings.get("dry_run", False) is not False:
        raise UsageError(
            f"{', '.join(unknown) or 'dry_run'}: train has no such setting in Python; "
            "cnn-jax train --help lists what there is"
        )
    typed = _typed(TrainSettings, settings, "train")
    chosen = TrainSettings.of(**{name: getattr(typed, name) for name in settings})
    result = commands.train(chosen)
    assert result is not None, "only a dry run has no result"
    metrics = [epoch.to_record() for epoch in result.run.metrics]
    return Training(chosen.run_folder, result.accuracies, metrics)
