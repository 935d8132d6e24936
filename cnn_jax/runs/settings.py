"""The settings of a training, each with its default, its meaning and the values that it may have."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from cnn_jax.runs.own_code import FORM, OwnCode
from cnn_jax.runtime.errors import UsageError

Platform = Literal["cpu", "gpu", "tpu"]


class RecipeDefaults(NamedTuple):
    """What a recipe trains with by default; the learning rate is the peak of its schedule."""

    epochs: float
    batch_size: int
    learning_rate: float

    @classmethod
    def in_words(cls, field: str) -> str:
        """Return each recipe's default of a field, or the one that all of them share."""
        values = [f"{getattr(defaults, field):g}" for defaults in RECIPE_DEFAULTS.values()]
        if len(set(values)) == 1:
            return values[0]
        return ", ".join(f"{value} {recipe}" for recipe, value in zip(RECIPE_DEFAULTS, values, strict=True))


RECIPE_DEFAULTS: dict[str, RecipeDefaults] = {
    "tutorial": RecipeDefaults(15, 100, 0.001),
    "fast": RecipeDefaults(0.8, 50, 0.01),
    "accurate": RecipeDefaults(45, 100, 0.005),
}


def recipe_defaults(recipe: str) -> RecipeDefaults:
    """Return what a recipe trains with by default; one of the user's with what the tutorial does."""
    return RECIPE_DEFAULTS.get(recipe, RECIPE_DEFAULTS["tutorial"])


NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
# The arguments of a recipe with these names are settings of their own, or not the user's.
ARGUMENT = r"(?!(?:learning_rate|steps|batch_size|features|recipe)=)([^\W\d]\w*)="
HYPERPARAMETER, RANGE = re.compile(ARGUMENT + NUMBER), re.compile(f"{ARGUMENT}{NUMBER}:{NUMBER}")


def numbers_of(form: re.Pattern, words: Sequence[str]) -> dict[str, list[float]]:
    """Return the numbers in each word by the name before them; words of another form are left out."""
    matches = filter(None, map(form.fullmatch, words))
    return {match[1]: [*map(float, match.groups()[1:])] for match in matches}


def _are_numbers(form: re.Pattern, words: Sequence[str]) -> bool:
    """Whether all words have a form, of different names, and numbers in order that float32 can hold."""
    found = numbers_of(form, words)
    return len(found) == len(words) and all(-1e38 < each[0] <= each[-1] < 1e38 for each in found.values())


class Must(NamedTuple):
    """Which values a setting may have, at its type; None, where the type allows it, is always one of them.

    Attributes:
      holds: Whether a value is one of them.
      needed: The same in words, after "it must be".
      form: How a refused value is written, as `format` knows it.
    """

    holds: Callable[[Any], object]
    needed: str
    form: str = ""


AT_LEAST_1 = Must(lambda number: number >= 1, "at least 1")
EACH_AT_LEAST_1 = Must(lambda numbers: min(numbers) >= 1, "at least 1 each")
RATE = Must(lambda rate: 1e-37 < rate < 1e38, "between 1e-37 and 1e38, which float32 can hold")
FRACTION = Must(lambda number: 0 <= number <= 1, "between 0 and 1")
ADDRESS = Must(
    lambda address: (
        re.fullmatch(r"\S+:[0-9]{1,5}", address)
        and address.isprintable()
        and 1 <= int(address.rpartition(":")[2]) <= 65535
    ),
    "HOST:PORT, such as 10.0.0.1:1234",
)
PROCESSES = Must(lambda number: 1 <= number < 2**31, "from 1 to 2147483647")
FOLDER_NAME = Must(
    re.compile(r"\w[\w.=+-]*").fullmatch,
    "a folder's name of letters, digits and . _ - = + that does not begin with a sign",
)
TEXT = Must(lambda path: not re.search("[\ud800-\udfff]", os.path.realpath(path)), "text in UTF-8")
# TensorStore, which writes the checkpoints, takes a backslash for a slash, and writes them elsewhere.
PLACE = Must(lambda path: TEXT.holds(path) and "\\" not in os.path.realpath(path), "text in UTF-8 without a backslash")
OWN_MODEL = Must(FORM.fullmatch, "a class in a Python file, FILE.py:CLASS")
NAMED_OR_OWN = f"one of {', '.join(sorted(RECIPE_DEFAULTS))}, or a function in a Python file, FILE.py:FUNCTION"
RECIPE = Must(lambda recipe: recipe in RECIPE_DEFAULTS or FORM.fullmatch(recipe), NAMED_OR_OWN)
RECIPES = Must(lambda recipes: all(map(RECIPE.holds, recipes)), f"{NAMED_OR_OWN}, each")
HYPERPARAMETERS = Must(
    lambda words: _are_numbers(HYPERPARAMETER, words),
    "NAME=NUMBER, once for each argument without an option of its own, with a number that float32 holds",
)
RANGES = Must(
    lambda words: _are_numbers(RANGE, words),
    "NAME=LOW:HIGH, once for each argument without an option of its own, with numbers that float32 holds",
)
SHORT = Must(lambda name: len(name.encode()) <= 255, "at most 255 bytes long")

CLASS_NAMES = Must(
    lambda names: names.isprintable() and len({*map(str.strip, names.split(","))} - {""}) == names.count(",") + 1,
    "a name of its own for each class, with commas between them",
)

# The settings that may name a file of the user's, which a run keeps a copy of under the setting's name.
OWN_CODE = ("model", "recipe")
HOSTS = ("coordinator", "num_processes", "process_id")

Epochs = Annotated[float, Must(lambda number: 0 < number < math.inf, "a positive number", "g")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What a training is started with: the command line's options, and what config.json records.

    Options:
      recipe (NAME): tutorial, fast, accurate, or your own, FILE.py:FUNCTION, with the tutorial's defaults.
      model (FILE): Your own Flax network, FILE.py:CLASS.
      epochs (N): Passes over the training set; 1.5 is one and a half.
      batch_size (N): Images per step.
      learning_rate (RATE): Adam's step size, or the peak of its schedule.
      hyperparameters (NAME=NUMBER): Other arguments of the recipe.
      seed (N): Seeds the initial weights and the shuffling; with --seeds, the first of them.
      seeds (N): Independent runs at once, with --seed and the seeds after it.
      features (N N): Channels after each block.
      precision (DTYPE): Type of the convolutions' operands: float32 or bfloat16.
      dataset (NAME): A tfds data set that is prepared here, or can be.
      dataset_dir (DIR): A folder of four IDX files (plain, .gz or .xz) to use in place of --dataset.
      class_names (NAMES): Class names: cat,dog. (default: the data set's)
      transposed: Exchange rows and columns of --dataset-dir's images.
      validation (N): Training images to test on after each epoch, and not to train on; the test set is used at the end.

    Run options:
      run_name (NAME): The run's folder. (default: named by the settings)
      fresh: Move an earlier run of this name aside and start anew.
      dry_run: Show what would run and where; write nothing.
      checkpoint_every_steps (N): Save every N steps, too, not only after each epoch.
      target_accuracy (FRACTION): Exit with 70 if the final test accuracy is lower.
      feed ({resident,stream}): Keep the images on the device, or stream them from disk. (default: by size)
      tensorboard: Write each epoch's numbers for TensorBoard, too.
      profile (DIR): Write a trace of a few steps, for TensorBoard or Perfetto.
      log_level (LEVEL): Least severe messages to log: debug, info, warning or error.

    Host options:
      coordinator (HOST:PORT): Address of the first of several processes; detected on TPU pods and SLURM.
      num_processes (N): How many processes train together.
      process_id (N): The number of this one, from 0.

    Common options:
      data_dir (DIR): Where tfds keeps its data. (default: TFDS_DATA_DIR, else tfds's own folder)
      checkpoint_dir (DIR): The folder of all runs.
      platform ({cpu,gpu,tpu}): Where to compute. (default: the fastest device)

    Raises:
      UsageError: naming the option, its value and what it must be.
    """

    recipe: Annotated[str, RECIPE] = "tutorial"
    model: Annotated[str | None, OWN_MODEL] = None
    epochs: Epochs = RECIPE_DEFAULTS["tutorial"].epochs
    batch_size: Annotated[int, AT_LEAST_1] = RECIPE_DEFAULTS["tutorial"].batch_size
    learning_rate: Annotated[float, RATE] = RECIPE_DEFAULTS["tutorial"].learning_rate
    hyperparameters: Annotated[tuple[str, ...], HYPERPARAMETERS] = ()
    seed: int = 777
    seeds: Annotated[int, AT_LEAST_1] = 1
    features: Annotated[tuple[int, int], EACH_AT_LEAST_1] = (32, 64)
    precision: Literal["float32", "bfloat16"] = "float32"
    dataset: str = "mnist"
    dataset_dir: Annotated[Path | None, TEXT] = None
    class_names: Annotated[str | None, CLASS_NAMES] = None
    transposed: bool = False
    validation: Annotated[int | None, AT_LEAST_1] = None
    run_name: Annotated[str | None, FOLDER_NAME, SHORT] = None
    fresh: bool = False
    dry_run: bool = False
    checkpoint_every_steps: Annotated[int | None, AT_LEAST_1] = None
    target_accuracy: Annotated[float | None, FRACTION] = None
    feed: Literal["resident", "stream"] | None = None
    tensorboard: bool = False
    profile: Annotated[Path | None, TEXT] = None
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    coordinator: Annotated[str | None, ADDRESS] = None
    num_processes: Annotated[int | None, PROCESSES] = None
    process_id: int | None = None
    data_dir: Annotated[Path | None, TEXT] = None
    checkpoint_dir: Annotated[Path, PLACE] = Path("checkpoints")
    platform: Platform | None = None

    @classmethod
    def of(cls, recipe: str = "tutorial", **given: Any) -> Self:
        """Return the settings that are given, and for the rest the recipe's defaults.

        Raises:
          UsageError: as the class does, and where two data sets are given; earlier programs recorded runs with both.
        """
        dataset, folder = given.get("dataset", cls.dataset), given.get("dataset_dir")
        if folder is not None:
            require(dataset == cls.dataset, "--dataset", dataset, f"left out, or else --dataset-dir {folder}")
        return cls(recipe=recipe, **recipe_defaults(recipe)._asdict() | given)

    def __post_init__(self) -> None:
        check_values(vars(self), type(self).__annotations__)
        for name in OWN_CODE:
            if getattr(self, name) not in (None, *RECIPE_DEFAULTS):
                try:
                    object.__setattr__(self, name, OwnCode(getattr(self, name)))
                except UsageError as error:
                    raise UsageError(f"{option_name(name)} {error}") from error
        arguments = sorted(numbers_of(HYPERPARAMETER, self.hyperparameters).items())
        object.__setattr__(self, "hyperparameters", tuple(f"{name}={number!r}" for name, (number,) in arguments))
        require(self.seeds <= 2**32, "--seeds", self.seeds, f"at most {2**32:,}")
        require(0 <= self.seed <= 2**32 - self.seeds, "--seed", self.seed, f"from 0 to {2**32 - self.seeds}")
        if self.transposed and self.dataset_dir is None:
            raise UsageError("--transposed: it must be given with --dataset-dir")
        given = [name for name in HOSTS if getattr(self, name) is not None]
        if len(given) in (1, 2):
            together = f"given with {', '.join(map(option_name, HOSTS))}, all three or none"
            require(False, option_name(given[0]), getattr(self, given[0]), together)
        ranked = self.process_id is None or self.num_processes is None or 0 <= self.process_id < self.num_processes
        require(ranked, "--process-id", self.process_id, "from 0 to one less than --num-processes")

    @property
    def recipe_arguments(self) -> dict[str, float]:
        """What the recipe's function is called with, but for the number of steps."""
        given = numbers_of(HYPERPARAMETER, self.hyperparameters)
        return {"learning_rate": self.learning_rate} | {name: number for name, (number,) in given.items()}

    @property
    def own_code(self) -> dict[str, OwnCode]:
        """The user's own code among the settings, by their names."""
        values = {name: getattr(self, name) for name in OWN_CODE}
        return {name: code for name, code in values.items() if isinstance(code, OwnCode)}

    @property
    def which_seeds(self) -> str:
        """Its seeds in words."""
        last = self.seed + self.seeds - 1
        return f"seeds {self.seed} to {last}" if self.seeds > 1 else f"seed {self.seed}"

    @property
    def run_folder(self) -> Path:
        """Where the run is written."""
        return self.checkpoint_dir / (self.run_name or self._default_run_name())

    def _default_run_name(self) -> str:
        source = self.dataset if self.dataset_dir is None else self.dataset_dir.resolve().name
        words = {
            "seeds": f"seeds{self.seeds}",
            "model": getattr(self.model, "name", ""),
            "recipe": getattr(self.recipe, "name", self.recipe),
            "batch_size": f"batch{self.batch_size}",
            "learning_rate": f"lr{self.learning_rate:g}",
            "hyperparameters": "-".join(self.hyperparameters),
            "features": "features" + "x".join(map(str, self.features)),
            "precision": self.precision,
            "validation": f"validation{self.validation}",
        }
        usual = vars(TrainSettings) | recipe_defaults(self.recipe)._asdict()
        unusual = [word for name, word in words.items() if getattr(self, name) != usual[name]]
        return "-".join([re.sub(r"[^\w.+-]", "-", source), f"seed{self.seed}", *unusual])


def check_values(values: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Check each value by the `Must` in its annotation.

    Raises:
      UsageError: naming the option, its value and what it must be.
    """
    for name, value in values.items():
        for must in getattr(annotations[name], "__metadata__", ()) if value is not None else ():
            parts = value if isinstance(value, tuple) else (value,)
            shown = " ".join(format(part, must.form) for part in parts)
            require(must.holds(value), option_name(name), shown, must.needed)


def require(holds: object, option: str, value: object, needed: str) -> None:
    """Refuse an option's value where a condition does not hold.

    Raises:
      UsageError: naming the option, its value and what it must be.
    """
    if not holds:
        raise UsageError(f"{option} {value}: it must be {needed}")


def option_name(name: str) -> str:
    """Return a setting's name on the command line."""
    return f"--{name.replace('_', '-')}"
