"""Every setting of every command, with its default, unit and help; the command line is made from them."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cnn_jax.runtime.errors import UsageError

Recipe = Literal["tutorial", "fast", "accurate"]
Platform = Literal["cpu", "gpu", "tpu"]

# What a recipe trains with unless told otherwise: epochs, batch size, learning rate (the peak of its schedule).
RECIPE_DEFAULTS = {"tutorial": (15, 100, 0.001), "fast": (1.25, 100, 0.01), "accurate": (30, 100, 0.003)}


def _option(metavar: str, default: str | None = None, *aliases: str) -> Any:
    """Describe an option: its value and, in words, its default in the help; and other names that people know it by."""
    hint = None if default is None else f"(default: {default})" if default else ""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint, aliases=aliases)


def _of_recipe(place: int) -> str:
    values = {recipe: f"{defaults[place]:g}" for recipe, defaults in RECIPE_DEFAULTS.items()}
    if len(set(values.values())) == 1:
        return values["tutorial"]
    return ", ".join(f"{value} {recipe}" for recipe, value in values.items())


Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
PACKAGED = "the network in the package"
Run = Annotated[tyro.conf.Positional[str], _option("RUN")]
OptionalRun = Annotated[tyro.conf.Positional[str | None], _option("[RUN]", PACKAGED)]
DatasetName = Annotated[str, _option("NAME")]
DatasetDir = Annotated[Path | None, _option("DIR", "")]


# What several commands take, and the groups of a training's options: each is a heading of the help, which would repeat
# a docstring below it.


@dataclasses.dataclass(frozen=True)
class CommonOptions:
    data_dir: Annotated[Path | None, _option("DIR", "TFDS_DATA_DIR, else tfds's")] = None
    """Where tfds keeps data."""
    debug: Flag = False
    """Show a traceback when something fails."""


@dataclasses.dataclass(frozen=True)
class CommonRunOptions(CommonOptions):
    checkpoint_dir: Annotated[Path, _option("DIR")] = Path("checkpoints")
    """Where runs are, a folder each."""
    platform: Annotated[Platform | None, _option("{cpu,gpu,tpu}", "the fastest there is")] = None
    """Where to compute."""

    def run_folder(self, run: str | None) -> Path | None:
        """Return the folder of a run, named by that folder or by its name in `checkpoint_dir`; None for no run."""
        if run is None:
            return None
        return Path(run) if Path(run).is_dir() else self.checkpoint_dir / run


@dataclasses.dataclass(frozen=True)
class RunOptions:
    run_name: Annotated[str | None, _option("NAME", "from the settings")] = None
    """The run's folder."""
    fresh: Flag = False
    """Move a run of this name aside and start anew."""
    dry_run: Flag = False
    """Show what would run and where; write nothing."""
    checkpoint_every_steps: Annotated[int | None, _option("N", "")] = None
    """Save every N steps too, not only after each epoch."""
    target_accuracy: Annotated[float | None, _option("FRACTION", "")] = None
    """Exit with 70 below this final test accuracy, in 0..1."""
    feed: Annotated[Literal["resident", "stream"] | None, _option("{resident,stream}", "by size")] = None
    """Images on the device, or read in time."""
    tensorboard: Flag = False
    """Write each epoch's numbers for TensorBoard too."""
    profile: Annotated[Path | None, _option("DIR", "")] = None
    """Write a trace of a few steps, for TensorBoard or Perfetto."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _option("LEVEL")] = "warning"
    """debug, info, warning or error."""


@dataclasses.dataclass(frozen=True)
class HostOptions:
    coordinator: Annotated[str | None, _option("HOST:PORT", "")] = None
    """The first of several processes; found on TPU pods and SLURM."""
    num_processes: Annotated[int | None, _option("N", "")] = None
    """How many processes train together."""
    process_id: Annotated[int | None, _option("N", "")] = None
    """Which of them this is, from 0."""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Train the tutorial's network; the same command continues an unfinished run.

    Examples:
      python train.py --epochs 15
      python train.py --recipe fast --seeds 10 --validation 5000
      python train.py --dataset-dir fashion-mnist --run-name fashion
    """

    recipe: Annotated[Recipe, _option("NAME")] = "tutorial"
    """tutorial, fast (99 % soonest), accurate."""
    epochs: Annotated[float | None, _option("N", _of_recipe(0))] = None
    """Passes over the training set; 1.5 is one and a half."""
    batch_size: Annotated[int | None, _option("N", _of_recipe(1))] = None
    """Images a step."""
    learning_rate: Annotated[float | None, _option("RATE", _of_recipe(2), "--lr")] = None
    """Adam's step size, or the peak of its schedule."""
    seed: Annotated[int, _option("N")] = 777
    """Of the initial weights and the images' order."""
    seeds: Annotated[int, _option("N")] = 1
    """Independent runs at once: of --seed and those after it."""
    features: Annotated[tuple[int, int], _option("N N")] = (32, 64)
    """Channels after each of the two blocks."""
    precision: Annotated[Literal["float32", "bfloat16"], _option("DTYPE")] = "float32"
    """Of the convolutions: float32 or bfloat16."""
    dataset: DatasetName = "mnist"
    """A tfds set that is, or can be, prepared."""
    dataset_dir: DatasetDir = None
    """A folder of four IDX files (plain, .gz or .xz) instead."""
    validation: Annotated[int | None, _option("N", "none")] = None
    """Training images to hold out and test on after each epoch; the test set is then used once, at the end."""
    run: RunOptions = RunOptions()
    host: HostOptions = HostOptions()
    common: CommonRunOptions = CommonRunOptions()

    def __post_init__(self) -> None:
        """Refuse values that no data set and no machine could make sense of.

        Raises:
          UsageError: naming the option, its value and what it must be.
        """
        for name, default in zip(("epochs", "batch_size", "learning_rate"), RECIPE_DEFAULTS[self.recipe], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        _require(math.isfinite(self.epochs) and self.epochs > 0, "--epochs", f"{self.epochs:g}", "a positive number")
        _require(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        _require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            "--learning-rate",
            self.learning_rate,
            "a positive number",
        )
        _require(min(self.features) >= 1, "--features", " ".join(map(str, self.features)), "at least 1 each")
        _require(self.seeds >= 1, "--seeds", self.seeds, "at least 1")
        _require(0 <= self.seed <= 2**32 - self.seeds, "--seed", self.seed, f"from 0 to {2**32 - self.seeds}")
        _require(self.validation is None or self.validation >= 1, "--validation", self.validation, "at least 1")
        hosts = (self.host.coordinator, self.host.num_processes, self.host.process_id)
        _require(
            all(value is None for value in hosts) or None not in hosts,
            "--coordinator",
            self.host.coordinator,
            "given with --num-processes and --process-id, all three or none",
        )
        _require(
            self.host.coordinator is None or re.fullmatch(r"\S+:\d+", self.host.coordinator) is not None,
            "--coordinator",
            self.host.coordinator,
            "HOST:PORT, such as 10.0.0.1:1234",
        )
        _require(
            self.host.process_id is None or 0 <= self.host.process_id < self.host.num_processes,
            "--process-id",
            self.host.process_id,
            "from 0 to one less than --num-processes",
        )
        _require(
            self.run.run_name is None or re.fullmatch(r"\w[\w.=+-]*", self.run.run_name) is not None,
            "--run-name",
            self.run.run_name,
            "a folder's name of letters, digits and . _ - = + that does not begin with a sign",
        )
        _require(
            self.run.checkpoint_every_steps is None or self.run.checkpoint_every_steps >= 1,
            "--checkpoint-every-steps",
            self.run.checkpoint_every_steps,
            "at least 1",
        )
        _require(
            self.run.target_accuracy is None or 0 <= self.run.target_accuracy <= 1,
            "--target-accuracy",
            self.run.target_accuracy,
            "between 0 and 1",
        )

    @property
    def run_folder(self) -> Path:
        """Where the run is written."""
        return self.common.checkpoint_dir / (self.run.run_name or self._default_run_name())

    def _default_run_name(self) -> str:
        source = self.dataset if self.dataset_dir is None else self.dataset_dir.resolve().name
        _, batch_size, learning_rate = RECIPE_DEFAULTS[self.recipe]
        parts = [re.sub(r"[^\w.+-]", "-", source), f"seed{self.seed}"]
        if self.seeds != TrainSettings.seeds:
            parts.append(f"seeds{self.seeds}")
        if self.recipe != TrainSettings.recipe:
            parts.append(self.recipe)
        if self.batch_size != batch_size:
            parts.append(f"batch{self.batch_size}")
        if self.learning_rate != learning_rate:
            parts.append(f"lr{self.learning_rate:g}")
        if self.features != TrainSettings.features:
            parts.append("features" + "x".join(map(str, self.features)))
        if self.precision != TrainSettings.precision:
            parts.append(self.precision)
        if self.validation is not None:
            parts.append(f"validation{self.validation}")
        return "-".join(parts)


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """Test a run's newest checkpoint on all test images of its data set.

    Examples:
      cnn-jax evaluate mnist-seed777
      cnn-jax evaluate mnist-seed777 --unscaled
    """

    run: Run
    """A run's folder, or its name in --checkpoint-dir."""
    unscaled: Flag = False
    """Test on pixels in 0..255, as the tutorial does, though it trained on [0, 1]."""
    common: CommonRunOptions = CommonRunOptions()


@dataclasses.dataclass(frozen=True)
class InspectSettings:
    """List the layers of a run's network, and draw what it has learned.

    Examples:
      cnn-jax inspect mnist-seed777
    """

    run: Run
    """A run's folder, or its name in --checkpoint-dir."""
    common: CommonRunOptions = CommonRunOptions()


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """Write an HTML page about a run: its results, settings and pictures.

    Examples:
      cnn-jax report mnist-seed777
      cnn-jax report mnist-seed777 --output report.html
    """

    run: Run
    """A run's folder, or its name in --checkpoint-dir."""
    output: Annotated[Path | None, _option("FILE", "report.html in the run's folder")] = None
    """The file to write."""
    common: CommonRunOptions = CommonRunOptions()


@dataclasses.dataclass(frozen=True)
class ImportTorchSettings:
    """Make a run of weights that PyTorch trained: test it, or train it on with train --run-name.

    Examples:
      cnn-jax import-torch model.pt
      cnn-jax train --run-name model --epochs 1
    """

    file: Annotated[tyro.conf.Positional[Path], _option("FILE")]
    """A state_dict with the tutorial's names, by torch.save or safetensors."""
    run_name: Annotated[str | None, _option("NAME", "the file's, without its ending")] = None
    """The run's folder."""
    dataset: DatasetName = "mnist"
    """The tfds set that the weights are for."""
    dataset_dir: DatasetDir = None
    """A folder of four IDX files to use in place of --dataset."""
    common: CommonRunOptions = CommonRunOptions()

    @property
    def train_settings(self) -> TrainSettings:
        """The settings of the run that the weights become."""
        return TrainSettings(
            dataset=self.dataset,
            dataset_dir=self.dataset_dir,
            run=RunOptions(run_name=self.run_name or self.file.stem),
            common=self.common,
        )


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Write a network to a file for another program; it is kept only if it computes the same there.

    Examples:
      cnn-jax export --to onnx --output mnist.onnx
      cnn-jax export mnist-seed777 --to torch --output model.pt
    """

    to: Annotated[Literal["onnx", "stablehlo", "safetensors", "torch"], _option("FORMAT")]
    """onnx or stablehlo (programs from pixels to logits), safetensors or torch (weights)."""
    output: Annotated[Path, _option("FILE")]
    """The file to write."""
    run: OptionalRun = None
    """A run's folder, or its name in --checkpoint-dir."""
    seed: Annotated[int | None, _option("N", "the first")] = None
    """Of a run of several seeds, whose weights."""
    common: CommonRunOptions = CommonRunOptions()


@dataclasses.dataclass(frozen=True)
class PredictSettings:
    """Say which digit each picture shows: stdout gets a line a file.

    Examples:
      cnn-jax predict photo.jpg
      cnn-jax predict scans/ --json
      cat photo.png | cnn-jax predict - --run mnist-seed777
    """

    images: Annotated[tyro.conf.Positional[tuple[str, ...]], _option("IMAGE...", "")]
    """PNG or JPEG files of one digit each, folders of them, or -: standard input."""
    run: Annotated[str | None, _option("RUN", PACKAGED)] = None
    """A run's folder, or its name in --checkpoint-dir."""
    json: Flag = False
    """Write an array of objects with file, digit and probabilities."""
    common: CommonRunOptions = CommonRunOptions()

    def __post_init__(self) -> None:
        """Refuse to read nothing.

        Raises:
          UsageError: no image is named.
        """
        _require(len(self.images) >= 1, "IMAGE...", "", "at least one PNG or JPEG file, a folder or -")


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Serve a page to draw digits on, and show what the network makes of them while they are drawn.

    Examples:
      cnn-jax demo
      cnn-jax demo mnist-seed777 --port 8000
    """

    run: OptionalRun = None
    """A run's folder, or its name in --checkpoint-dir."""
    port: Annotated[int, _option("N")] = 7860
    """Where the page is."""
    host: Annotated[str, _option("ADDRESS")] = "127.0.0.1"
    """From where it can be reached: 127.0.0.1 is this machine, 0.0.0.0 everywhere."""
    common: CommonRunOptions = CommonRunOptions()

    def __post_init__(self) -> None:
        """Refuse what is no port.

        Raises:
          UsageError: naming the option, its value and what it must be.
        """
        _require(1 <= self.port <= 65535, "--port", self.port, "from 1 to 65535")


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """Measure a training step in this program and in PyTorch, side by side in one run.

    Examples:
      cnn-jax benchmark --rounds 5
    """

    rounds: Annotated[int, _option("N")] = 20
    """How often each form is measured, all of them in turn."""
    output: Annotated[Path, _option("DIR")] = Path("benchmarks/results")
    """Where the table, the JSON and the plot go, named by machine and date."""
    common: CommonOptions = CommonOptions()

    def __post_init__(self) -> None:
        """Refuse what would measure nothing.

        Raises:
          UsageError: naming the option, its value and what it must be.
        """
        _require(self.rounds >= 1, "--rounds", self.rounds, "at least 1")


@dataclasses.dataclass(frozen=True)
class CompareSettings:
    """Train the tutorial in this program and in PyTorch, and report how they differ.

    Examples:
      cnn-jax compare --seeds 5
    """

    seeds: Annotated[int, _option("N")] = 5
    """Runs of each framework; at least 2."""
    seed: Annotated[int, _option("N")] = 777
    """The first seed; the others follow it."""
    epochs: Annotated[int, _option("N")] = 15
    """Passes over the training set."""
    output: Annotated[Path, _option("DIR")] = Path("benchmarks/comparison")
    """Where the runs and the report go; runs that are there are not run again."""
    common: CommonOptions = CommonOptions()

    def __post_init__(self) -> None:
        """Refuse values that could not be compared.

        Raises:
          UsageError: naming the option, its value and what it must be.
        """
        _require(self.seeds >= 2, "--seeds", self.seeds, "at least 2, for a spread")
        _require(0 <= self.seed <= 2**32 - self.seeds, "--seed", self.seed, "from 0 to 4294967295")
        _require(self.epochs >= 1, "--epochs", self.epochs, "at least 1")


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """Search for the settings with the best validation accuracy; the same command continues, also side by side.

    Examples:
      cnn-jax sweep --trials 30
      cnn-jax sweep --study wide --features 64 128 96 192 --recipe fast
    """

    study: Annotated[str, _option("NAME")] = "sweep"
    """The search's folder in --checkpoint-dir: its trials, SQLite file and plots."""
    trials: Annotated[int, _option("N")] = 30
    """Trials in all, by however many processes and commands."""
    epochs: Annotated[float, _option("N")] = 2
    """Passes over the training set in each trial."""
    learning_rate: Annotated[tuple[float, float], _option("LOW HIGH")] = (0.0003, 0.03)
    """The range to search, on a logarithmic scale."""
    batch_size: Annotated[tuple[int, ...], _option("IMAGES")] = (50, 100, 200, 400)
    """The batch sizes to choose from."""
    features: Annotated[tuple[tuple[int, int], ...], _option("N N")] = ((16, 32), (32, 64), (48, 96))
    """The channels of the two blocks to choose from, in pairs."""
    recipe: Annotated[tuple[Recipe, ...], _option("NAME")] = ("tutorial", "fast", "accurate")
    """The recipes to choose from."""
    validation: Annotated[int, _option("IMAGES")] = 5000
    """Training images to hold out, which score a trial; the test set is not used."""
    seeds: Annotated[int, _option("N")] = 1
    """Runs of each trial, whose mean is its score."""
    seed: Annotated[int, _option("N")] = 777
    """The first seed of each trial."""
    dataset: DatasetName = "mnist"
    """A tfds set that is, or can be, prepared."""
    dataset_dir: DatasetDir = None
    """A folder of four IDX files to use in place of --dataset."""
    common: CommonRunOptions = CommonRunOptions()

    def __post_init__(self) -> None:
        """Refuse what could not be searched.

        Raises:
          UsageError: naming the option, its value and what it must be.
        """
        _require(self.trials >= 1, "--trials", self.trials, "at least 1")
        low, high = self.learning_rate
        _require(0 < low <= high < math.inf, "--learning-rate", f"{low:g} {high:g}", "two positive numbers in order")
        for name in ("batch_size", "features", "recipe"):
            _require(len(getattr(self, name)) >= 1, f"--{name.replace('_', '-')}", "", "at least one value")
        for batch_size in self.batch_size:
            for features in self.features:
                self.trial("trial", "tutorial", high, batch_size, features)  # refuses what a run would refuse

    @property
    def folder(self) -> Path:
        """Where the study is."""
        return self.common.checkpoint_dir / self.study

    def trial(
        self, name: str, recipe: Recipe, learning_rate: float, batch_size: int, features: tuple[int, int]
    ) -> TrainSettings:
        """Return the settings of the run that is a trial."""
        return TrainSettings(
            recipe=recipe,
            epochs=self.epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=self.seed,
            seeds=self.seeds,
            features=features,
            dataset=self.dataset,
            dataset_dir=self.dataset_dir,
            validation=self.validation,
            run=RunOptions(run_name=name),
            common=dataclasses.replace(self.common, checkpoint_dir=self.folder),
        )


def option_values(settings: TrainSettings) -> dict[str, Any]:
    """Return a run's settings as the command line has them: by name, in no groups."""
    values = {}
    for name, value in vars(settings).items():
        values |= vars(value) if dataclasses.is_dataclass(value) else {name: value}
    return values


def from_option_values(values: Mapping[str, Any]) -> TrainSettings:
    """Return the settings that `option_values` returned the values of.

    Raises:
      KeyError: one is missing.
      UsageError: one is not as it must be.
    """

    def read(kind, **groups):
        names = [field.name for field in dataclasses.fields(kind) if field.name not in groups]
        return kind(**{name: values[name] for name in names}, **groups)

    return read(TrainSettings, run=read(RunOptions), host=read(HostOptions), common=read(CommonRunOptions))


def _require(holds: bool, option: str, value: object, needed: str) -> None:
    if not holds:
        raise UsageError(f"{option} {value}: it must be {needed}")
