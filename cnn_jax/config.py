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


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Train the tutorial's network; the same command continues an unfinished run."""

    epochs: Annotated[int, tyro.conf.arg(metavar="N")] = 15
    """Passes over the training set."""
    batch_size: Annotated[int, tyro.conf.arg(metavar="IMAGES")] = 100
    """Images a step."""
    learning_rate: Annotated[float, tyro.conf.arg(metavar="RATE")] = 0.001
    """Adam's step size."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 777
    """Where every random number comes from: the initial weights and the order of the images."""
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
    fresh: bool = False
    """Move a run of this name aside and start anew; nothing is deleted."""
    checkpoint_every_steps: Annotated[int | None, tyro.conf.arg(metavar="STEPS")] = None
    """Save every so many steps too, not only after each epoch."""
    target_accuracy: Annotated[float | None, tyro.conf.arg(metavar="FRACTION")] = None
    """Exit with 70 when the test accuracy at the end is below this, between 0 and 1."""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; by default an accelerator if there is one, else the CPU."""
    dry_run: bool = False
    """Show what would run and where, then stop; nothing is trained or written."""
    debug: bool = False
    """Show a traceback when something fails."""

    def __post_init__(self) -> None:
        """Refuse values that no data set and no machine could make sense of.

        Raises:
          UsageError: naming the option, its value and what it must be.
        """
        _require(self.epochs >= 1, "--epochs", self.epochs, "at least 1")
        _require(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        _require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            "--learning-rate",
            self.learning_rate,
            "a positive number",
        )
        _require(0 <= self.seed < 2**32, "--seed", self.seed, "from 0 to 4294967295")
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
        parts = [re.sub(r"[^\w.+-]", "-", source), f"seed{self.seed}"]
        if self.batch_size != TrainSettings.batch_size:
            parts.append(f"batch{self.batch_size}")
        if self.learning_rate != TrainSettings.learning_rate:
            parts.append(f"lr{self.learning_rate:g}")
        if self.precision != TrainSettings.precision:
            parts.append(self.precision)
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
    """Write the weights of a run's newest checkpoint to a file that another program reads."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run's folder, or its name in --checkpoint-dir."""
    to: Literal["torch"]
    """The file's format: torch is a state_dict with the tutorial's names."""
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The file to write."""
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
