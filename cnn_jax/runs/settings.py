"""The settings of a training: each with its default, its unit, its help and the values that it may have."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin

from cnn_jax.runtime.errors import UsageError

RecipeName = Literal["tutorial", "fast", "accurate"]
Platform = Literal["cpu", "gpu", "tpu"]


class RecipeDefaults(NamedTuple):
    """What a recipe trains with by default; the learning rate is the peak of its schedule."""

    epochs: float
    batch_size: int
    learning_rate: float

    @staticmethod
    def in_words(field: str) -> str:
        """Return every recipe's default of a field, or the one that all of them share."""
        values = {recipe: f"{getattr(defaults, field):g}" for recipe, defaults in RECIPE_DEFAULTS.items()}
        if len(set(values.values())) == 1:
            return values["tutorial"]
        return ", ".join(f"{value} {recipe}" for recipe, value in values.items())


RECIPE_DEFAULTS: dict[RecipeName, RecipeDefaults] = {
    "tutorial": RecipeDefaults(15, 100, 0.001),
    "fast": RecipeDefaults(1.25, 100, 0.01),
    "accurate": RecipeDefaults(30, 100, 0.003),
}


class Option(NamedTuple):
    """How a setting is given on the command line.

    Attributes:
      help: What it means, in its unit.
      metavar: What stands for its value in the help.
      default: Its default in words, where the value does not say it.
      group: The heading of the help that it stands under.
      alias: Another name that people know it by.
    """

    help: str
    metavar: str | None = None
    default: str | None = None
    group: str = "options"
    alias: str | None = None


class Must(NamedTuple):
    """Which values a setting may have; None, where its type allows that, is one of them.

    Attributes:
      holds: Whether a value is one of them.
      needed: The same in words, after "it must be".
      form: How a refused value is written, as `format` knows it.
    """

    holds: Callable[[Any], bool]
    needed: str
    form: str = ""


def option_name(name: str) -> str:
    """Return a setting's name on the command line."""
    return f"--{name.replace('_', '-')}"


def choices_of(kind: Any) -> tuple[str, ...]:
    """Return the words that a setting of this type may be; none where it may be something else."""
    return next((get_args(part) for part in (kind, *get_args(kind)) if get_origin(part) is Literal), ())


def check_values(values: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Check each value by what its annotation says that it must be.

    Raises:
      UsageError: naming the option, its value and what it must be.
    """
    for name, value in values.items():
        if value is None:
            continue
        parts = value if isinstance(value, tuple) else (value,)
        if choices := choices_of(annotations[name].__origin__):
            require(set(parts) <= set(choices), option_name(name), " ".join(parts), f"one of {', '.join(choices)}")
        for must in annotations[name].__metadata__:
            if isinstance(must, Must) and not must.holds(value):
                require(False, option_name(name), " ".join(format(part, must.form) for part in parts), must.needed)


def require(holds: bool, option: str, value: object, needed: str) -> None:
    """Refuse a value that does not hold.

    Raises:
      UsageError: naming the option, its value and what it must be.
    """
    if not holds:
        raise UsageError(f"{option} {value}: it must be {needed}")


AT_LEAST_1 = Must(lambda number: number >= 1, "at least 1")
POSITIVE = Must(lambda number: 0 < number < math.inf, "a positive number")
FRACTION = Must(lambda number: 0 <= number <= 1, "between 0 and 1")
FOLDER_NAME = Must(
    re.compile(r"\w[\w.=+-]*").fullmatch,
    "a folder's name of letters, digits and . _ - = + that does not begin with a sign",
)
ADDRESS = Must(re.compile(r"\S+:\d+").fullmatch, "HOST:PORT, such as 10.0.0.1:1234")

# The headings of a training's options in the help.
RUN, HOST, COMMON = "run options", "host options", "common options"

DataDir = Annotated[Path | None, Option("Where tfds keeps data.", "DIR", "TFDS_DATA_DIR, else tfds's", COMMON)]
CheckpointDir = Annotated[Path, Option("Where runs are, a folder each.", "DIR", group=COMMON)]
PlatformName = Annotated[Platform | None, Option("Where to compute.", "{cpu,gpu,tpu}", "the fastest there is", COMMON)]
DatasetName = Annotated[str, Option("A tfds set that is, or can be, prepared.", "NAME")]
RUNS = Path("checkpoints")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What a training depends on, as the command line gives it and config.json records it.

    Raises:
      UsageError: naming the option, its value and what it must be.
    """

    recipe: Annotated[RecipeName, Option("tutorial, fast (99 % soonest), accurate.", "NAME")] = "tutorial"
    epochs: Annotated[
        float,
        Option("Passes over the training set; 1.5 is one and a half.", "N", RecipeDefaults.in_words("epochs")),
        POSITIVE._replace(form="g"),
    ] = RECIPE_DEFAULTS["tutorial"].epochs
    batch_size: Annotated[int, Option("Images a step.", "N", RecipeDefaults.in_words("batch_size")), AT_LEAST_1] = (
        RECIPE_DEFAULTS["tutorial"].batch_size
    )
    learning_rate: Annotated[
        float,
        Option(
            "Adam's step size, or the peak of its schedule.",
            "RATE",
            RecipeDefaults.in_words("learning_rate"),
            alias="--lr",
        ),
        POSITIVE,
    ] = RECIPE_DEFAULTS["tutorial"].learning_rate
    seed: Annotated[int, Option("Of the initial weights and the images' order.", "N")] = 777
    seeds: Annotated[int, Option("Independent runs at once: of --seed and those after it.", "N"), AT_LEAST_1] = 1
    features: Annotated[
        tuple[int, int],
        Option("Channels after each of the two blocks.", "N N"),
        Must(lambda channels: min(channels) >= 1, "at least 1 each"),
    ] = (32, 64)
    precision: Annotated[
        Literal["float32", "bfloat16"], Option("Of the convolutions: float32 or bfloat16.", "DTYPE")
    ] = "float32"
    dataset: DatasetName = "mnist"
    dataset_dir: Annotated[Path | None, Option("A folder of four IDX files (plain, .gz or .xz) instead.", "DIR")] = None
    validation: Annotated[
        int | None,
        Option(
            "Training images to hold out and test on after each epoch; the test set is then used once, at the end.",
            "N",
            "none",
        ),
        AT_LEAST_1,
    ] = None

    run_name: Annotated[str | None, Option("The run's folder.", "NAME", "from the settings", RUN), FOLDER_NAME] = None
    fresh: Annotated[bool, Option("Move a run of this name aside and start anew.", group=RUN)] = False
    dry_run: Annotated[bool, Option("Show what would run and where; write nothing.", group=RUN)] = False
    checkpoint_every_steps: Annotated[
        int | None, Option("Save every N steps too, not only after each epoch.", "N", group=RUN), AT_LEAST_1
    ] = None
    target_accuracy: Annotated[
        float | None, Option("Exit with 70 below this final test accuracy, in 0..1.", "FRACTION", group=RUN), FRACTION
    ] = None
    feed: Annotated[
        Literal["resident", "stream"] | None,
        Option("Images on the device, or read in time.", "{resident,stream}", "by size", RUN),
    ] = None
    tensorboard: Annotated[bool, Option("Write each epoch's numbers for TensorBoard too.", group=RUN)] = False
    profile: Annotated[
        Path | None, Option("Write a trace of a few steps, for TensorBoard or Perfetto.", "DIR", group=RUN)
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Option("debug, info, warning or error.", "LEVEL", group=RUN)
    ] = "warning"

    coordinator: Annotated[
        str | None,
        Option("The first of several processes; found on TPU pods and SLURM.", "HOST:PORT", group=HOST),
        ADDRESS,
    ] = None
    num_processes: Annotated[int | None, Option("How many processes train together.", "N", group=HOST)] = None
    process_id: Annotated[int | None, Option("Which of them this is, from 0.", "N", group=HOST)] = None

    data_dir: DataDir = None
    checkpoint_dir: CheckpointDir = RUNS
    platform: PlatformName = None

    @classmethod
    def of(cls, recipe: RecipeName = "tutorial", **given: Any) -> Self:
        """Return the settings that are given, and for the rest the recipe's defaults."""
        return cls(recipe=recipe, **RECIPE_DEFAULTS[recipe]._asdict() | given)

    def __post_init__(self) -> None:
        check_values(vars(self), TrainSettings.__annotations__)
        require(0 <= self.seed <= 2**32 - self.seeds, "--seed", self.seed, f"from 0 to {2**32 - self.seeds}")
        hosts = (self.coordinator, self.num_processes, self.process_id)
        together = "given with --num-processes and --process-id, all three or none"
        require(hosts.count(None) in (0, 3), "--coordinator", self.coordinator, together)
        ranked = self.process_id is None or 0 <= self.process_id < self.num_processes
        require(ranked, "--process-id", self.process_id, "from 0 to one less than --num-processes")

    @property
    def run_folder(self) -> Path:
        """Where the run is written."""
        return self.checkpoint_dir / (self.run_name or self._default_run_name())

    def _default_run_name(self) -> str:
        source = self.dataset if self.dataset_dir is None else self.dataset_dir.resolve().name
        defaults = RECIPE_DEFAULTS[self.recipe]
        parts = [re.sub(r"[^\w.+-]", "-", source), f"seed{self.seed}"]
        if self.seeds != TrainSettings.seeds:
            parts.append(f"seeds{self.seeds}")
        if self.recipe != TrainSettings.recipe:
            parts.append(self.recipe)
        if self.batch_size != defaults.batch_size:
            parts.append(f"batch{self.batch_size}")
        if self.learning_rate != defaults.learning_rate:
            parts.append(f"lr{self.learning_rate:g}")
        if self.features != TrainSettings.features:
            parts.append("features" + "x".join(map(str, self.features)))
        if self.precision != TrainSettings.precision:
            parts.append(self.precision)
        if self.validation is not None:
            parts.append(f"validation{self.validation}")
        return "-".join(parts)
