"""Every setting of a run, with its default, unit and help; the command line is made from them."""

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from cnn_jax.errors import UsageError

S = TypeVar("S")
Recipe = Literal["tutorial", "fast", "accurate"]

# What a recipe trains with unless told otherwise: epochs, batch size, learning rate (the peak of its schedule).
RECIPE_DEFAULTS = {"tutorial": (15, 100, 0.001), "fast": (1.25, 100, 0.01), "accurate": (30, 100, 0.003)}


def _of_recipe(place: int) -> str:
    values = ", ".join(f"{defaults[place]:g} {recipe}" for recipe, defaults in RECIPE_DEFAULTS.items())
    return f"(default: {values})"


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Train the tutorial's network; the same command continues an unfinished run."""

    recipe: Recipe = "tutorial"
    """How to train: as the tutorial does; to 99 % in the least time; or to the best accuracy of this network."""
    epochs: Annotated[float | None, tyro.conf.arg(metavar="N", help_behavior_hint=_of_recipe(0))] = None
    """Passes over the training set; 1.5 is one and a half."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="IMAGES", help_behavior_hint=_of_recipe(1))] = None
    """Images a step."""
    learning_rate: Annotated[float | None, tyro.conf.arg(metavar="RATE", help_behavior_hint=_of_recipe(2))] = None
    """Adam's step size, or the peak of its schedule."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 777
    """Where every random number comes from: the initial weights and the order of the images."""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Independent runs in one program: of --seed and of the N - 1 after it."""
    features: Annotated[tuple[int, int], tyro.conf.arg(metavar="N N")] = (32, 64)
    """Channels after the first and the second block."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the convolutions' operands; weights, sums and optimiser are float32 in either case."""
    dataset: Annotated[str, tyro.conf.arg(metavar="NAME")] = "mnist"
    """A tfds image classification set: mnist is built in, others must be prepared or be preparable by tfds."""
    dataset_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder of four IDX files (plain, .gz or .xz) to use in place of --dataset."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where tfds keeps its data sets; by default TFDS_DATA_DIR, else tfds's own default."""
    checkpoint_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("checkpoints")
    """Where runs are written, a folder each."""
    run_name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The run's folder; by default named after the data set, the seed and what differs from the defaults."""
    validation: Annotated[int | None, tyro.conf.arg(metavar="IMAGES")] = None
    """Training images to hold out and test on after each epoch; the test set is looked at once, at the end."""
    feed: Literal["resident", "stream"] | None = None
    """Keep the training images on the device, or read them as they are needed; by default, by their size."""
    fresh: bool = False
    """Move a run of this name aside and start anew; nothing is deleted."""
    checkpoint_every_steps: Annotated[int | None, tyro.conf.arg(metavar="STEPS")] = None
    """Save every so many steps too, not only after each epoch."""
    target_accuracy: Annotated[float | None, tyro.conf.arg(metavar="FRACTION")] = None
    """Exit with 70 when the test accuracy at the end is below this, between 0 and 1."""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; by default an accelerator if there is one, else the CPU."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Of several processes that train together, where the first one is; TPU pods and SLURM are found without."""
    num_processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many processes train together, with --coordinator."""
    process_id: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Which of them this is, from 0, with --coordinator."""
    profile: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write a trace of a few steps there, for TensorBoard or Perfetto."""
    tensorboard: bool = False
    """Write each epoch's numbers for TensorBoard too, to the run's folder."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Which messages of the libraries, and of this program's decisions, to show."""
    dry_run: bool = False
    """Show what would run and where, then stop; nothing is trained or written."""
    debug: bool = False
    """Show a traceback when something fails."""

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
        hosts = (self.coordinator, self.num_processes, self.process_id)
        _require(
            all(value is None for value in hosts) or None not in hosts,
            "--coordinator",
            self.coordinator,
            "given with --num-processes and --process-id, all three or none",
        )
        _require(
            self.coordinator is None or re.fullmatch(r"\S+:\d+", self.coordinator) is not None,
            "--coordinator",
            self.coordinator,
            "HOST:PORT, such as 10.0.0.1:1234",
        )
        _require(
            self.process_id is None or 0 <= self.process_id < self.num_processes,
            "--process-id",
            self.process_id,
            "from 0 to one less than --num-processes",
        )
        _require(
            self.run_name is None or re.fullmatch(r"\w[\w.=+-]*", self.run_name) is not None,
            "--run-name",
            self.run_name,
            "a folder's name of letters, digits and . _ - = + that does not begin with a sign",
        )
        _require(
            self.checkpoint_every_steps is None or self.checkpoint_every_steps >= 1,
            "--checkpoint-every-steps",
            self.checkpoint_every_steps,
            "at least 1",
        )
        _require(
            self.target_accuracy is None or 0 <= self.target_accuracy <= 1,
            "--target-accuracy",
            self.target_accuracy,
            "between 0 and 1",
        )

    @property
    def run_folder(self) -> Path:
        """Where the run is written."""
        return self.checkpoint_dir / (self.run_name or self._default_run_name())

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
    """Test a run's newest checkpoint on all test images of its data set."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run's folder, or its name in --checkpoint-dir."""
    unscaled: bool = False
    """Test as the PyTorch tutorial does, on pixels in 0..255, though it trained on [0, 1]."""
    checkpoint_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("checkpoints")
    """Where runs are written, a folder each."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where tfds keeps its data sets; by default TFDS_DATA_DIR, else tfds's own default."""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; by default an accelerator if there is one, else the CPU."""
    debug: bool = False
    """Show a traceback when something fails."""

    @property
    def run_folder(self) -> Path:
        """The run's folder."""
        return find_run_folder(self.run, self.checkpoint_dir)


@dataclasses.dataclass(frozen=True)
class InspectSettings:
    """List the layers of a run's network, and draw what it has learned."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run's folder, or its name in --checkpoint-dir."""
    checkpoint_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("checkpoints")
    """Where runs are written, a folder each."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where tfds keeps its data sets; by default TFDS_DATA_DIR, else tfds's own default."""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; by default an accelerator if there is one, else the CPU."""
    debug: bool = False
    """Show a traceback when something fails."""

    @property
    def run_folder(self) -> Path:
        """The run's folder."""
        return find_run_folder(self.run, self.checkpoint_dir)


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """Write an HTML page about a run: its results, settings and pictures."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run's folder, or its name in --checkpoint-dir."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The file to write; by default report.html in the run's folder."""
    checkpoint_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("checkpoints")
    """Where runs are written, a folder each."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where tfds keeps its data sets; by default TFDS_DATA_DIR, else tfds's own default."""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; by default an accelerator if there is one, else the CPU."""
    debug: bool = False
    """Show a traceback when something fails."""

    @property
    def run_folder(self) -> Path:
        """The run's folder."""
        return find_run_folder(self.run, self.checkpoint_dir)


@dataclasses.dataclass(frozen=True)
class ImportTorchSettings:
    """Make a run of weights that PyTorch trained: it can be tested, and trained on with train --run-name."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A state_dict with the tutorial's names, as torch.save writes it, or a .safetensors file."""
    run_name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The run's folder; by default the file's name without its ending."""
    checkpoint_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("checkpoints")
    """Where runs are written, a folder each."""
    dataset: Annotated[str, tyro.conf.arg(metavar="NAME")] = "mnist"
    """The tfds set that the weights are for."""
    dataset_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder of four IDX files to use in place of --dataset."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where tfds keeps its data sets; by default TFDS_DATA_DIR, else tfds's own default."""
    debug: bool = False
    """Show a traceback when something fails."""

    @property
    def train_settings(self) -> TrainSettings:
        """The settings of the run that the weights become."""
        return TrainSettings(
            dataset=self.dataset,
            dataset_dir=self.dataset_dir,
            data_dir=self.data_dir,
            checkpoint_dir=self.checkpoint_dir,
            run_name=self.run_name or self.file.stem,
        )


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Write a network to a file that another program reads; it is kept only if it computes the same there."""

    to: Literal["onnx", "stablehlo", "safetensors", "torch"]
    """The file's format: torch is a state_dict with the tutorial's names, safetensors the same, described; onnx and
    stablehlo are whole programs from float32 pixels in [0, 1], (N, height, width, channels), to logits."""
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The file to write."""
    run: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="RUN")] = None
    """A run's folder, or its name in --checkpoint-dir; by default the network that the package brings."""
    seed: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Of a run of several seeds, whose weights; by default the first's."""
    checkpoint_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("checkpoints")
    """Where runs are written, a folder each."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where tfds keeps its data sets; by default TFDS_DATA_DIR, else tfds's own default."""
    debug: bool = False
    """Show a traceback when something fails."""

    @property
    def run_folder(self) -> Path:
        """The run's folder."""
        return find_run_folder(self.run, self.checkpoint_dir)


@dataclasses.dataclass(frozen=True)
class PredictSettings:
    """Say which digit each picture shows: stdout gets a line a file."""

    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """PNG or JPEG files, one digit each, folders of such, or - for standard input."""
    run: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """A run's folder, or its name in --checkpoint-dir; by default the network that the package brings."""
    json: bool = False
    """Write one array of objects with file, digit and probabilities, and nothing else."""
    checkpoint_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("checkpoints")
    """Where runs are written, a folder each."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where tfds keeps its data sets; by default TFDS_DATA_DIR, else tfds's own default."""
    debug: bool = False
    """Show a traceback when something fails."""

    def __post_init__(self) -> None:
        """Refuse to read nothing.

        Raises:
          UsageError: no image is named.
        """
        _require(len(self.images) >= 1, "IMAGE...", "", "at least one PNG or JPEG file, a folder or -")


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Serve a page to draw digits on, which shows what the network makes of them while they are drawn."""

    run: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="RUN")] = None
    """A run's folder, or its name in --checkpoint-dir; by default the network that the package brings."""
    port: Annotated[int, tyro.conf.arg(metavar="N")] = 7860
    """Where the page is."""
    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
    """From where it can be reached: by default from this machine only; 0.0.0.0 is from everywhere."""
    checkpoint_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("checkpoints")
    """Where runs are written, a folder each."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where tfds keeps its data sets; by default TFDS_DATA_DIR, else tfds's own default."""
    debug: bool = False
    """Show a traceback when something fails."""

    def __post_init__(self) -> None:
        """Refuse what is no port.

        Raises:
          UsageError: naming the option, its value and what it must be.
        """
        _require(1 <= self.port <= 65535, "--port", self.port, "from 1 to 65535")


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """Measure a training step in this program and in PyTorch, side by side in one run."""

    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """How often each form is measured, all of them in turn."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("benchmarks/results")
    """Where the table, the JSON and the plot go, named by machine and date."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where tfds keeps its data sets; by default TFDS_DATA_DIR, else tfds's own default."""
    debug: bool = False
    """Show a traceback when something fails."""

    def __post_init__(self) -> None:
        """Refuse what would measure nothing.

        Raises:
          UsageError: naming the option, its value and what it must be.
        """
        _require(self.rounds >= 1, "--rounds", self.rounds, "at least 1")


@dataclasses.dataclass(frozen=True)
class CompareSettings:
    """Train the tutorial in this program and in PyTorch, and report how they differ."""

    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 5
    """Runs of each framework; at least 2."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 777
    """The first seed; the others follow it."""
    epochs: Annotated[int, tyro.conf.arg(metavar="N")] = 15
    """Passes over the training set."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("benchmarks/comparison")
    """Where the runs and the report go; runs that are there already are not run again."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where tfds keeps its data sets; by default TFDS_DATA_DIR, else tfds's own default."""
    debug: bool = False
    """Show a traceback when something fails."""

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
    """Search for the settings with the best validation accuracy; the same command continues, also side by side."""

    study: Annotated[str, tyro.conf.arg(metavar="NAME")] = "sweep"
    """The search's name: its trials, its SQLite file and its plots are in this folder of --checkpoint-dir."""
    trials: Annotated[int, tyro.conf.arg(metavar="N")] = 30
    """Trials of the study in all, by however many processes and commands."""
    epochs: Annotated[float, tyro.conf.arg(metavar="N")] = 2
    """Passes over the training set in each trial."""
    learning_rate: Annotated[tuple[float, float], tyro.conf.arg(metavar="LOW HIGH")] = (0.0003, 0.03)
    """The range to search, on a logarithmic scale."""
    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="IMAGES")] = (50, 100, 200, 400)
    """The batch sizes to choose from."""
    features: Annotated[tuple[tuple[int, int], ...], tyro.conf.arg(metavar="N N")] = ((16, 32), (32, 64), (48, 96))
    """The channels of the two blocks to choose from, in pairs."""
    recipe: tuple[Recipe, ...] = ("tutorial", "fast", "accurate")
    """The recipes to choose from."""
    validation: Annotated[int, tyro.conf.arg(metavar="IMAGES")] = 5000
    """Training images that are held out and score a trial; the test set is not looked at."""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Runs of each trial, whose mean is its score."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 777
    """The first seed of each trial."""
    dataset: Annotated[str, tyro.conf.arg(metavar="NAME")] = "mnist"
    """A tfds image classification set: mnist is built in, others must be prepared or be preparable by tfds."""
    dataset_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder of four IDX files to use in place of --dataset."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where tfds keeps its data sets; by default TFDS_DATA_DIR, else tfds's own default."""
    checkpoint_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("checkpoints")
    """Where runs are written, a folder each."""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; by default an accelerator if there is one, else the CPU."""
    debug: bool = False
    """Show a traceback when something fails."""

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
        return self.checkpoint_dir / self.study

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
            data_dir=self.data_dir,
            validation=self.validation,
            checkpoint_dir=self.folder,
            run_name=name,
            platform=self.platform,
            debug=self.debug,
        )


def find_run_folder(run: str, checkpoint_dir: Path) -> Path:
    """Return the folder that `run` names: the path itself where that is a folder, else the name in `checkpoint_dir`."""
    return Path(run) if Path(run).is_dir() else checkpoint_dir / run


def read_settings(kind: type[S], arguments: Sequence[str], *, prog: str) -> S:
    """Read settings from a command line.

    Args:
      kind: The settings' dataclass, or a union of them, each then a subcommand.
      arguments: The words after the program's name.
      prog: The program's name, for its help.

    Returns:
      The settings; `--help` prints the help and exits.

    Raises:
      UsageError: with the parser's complaint and its suggestion in one line.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                prog=prog,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        # tyro draws a box around several lines.
        words = re.sub(r"[─│╭╮╰╯|+]|-{3,}", " ", complaint.getvalue()).split()
        raise UsageError(" ".join(words)) from end


def _require(holds: bool, option: str, value: object, needed: str) -> None:
    if not holds:
        raise UsageError(f"{option} {value}: it must be {needed}")
