"""The files of a run beside its checkpoints: its settings, its metrics, and the lock of the process that writes it."""

import contextlib
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runtime.errors import NoCheckpointError, RunLockedError, StorageError, UsageError, suggest
from cnn_jax.runtime.files import AlreadyLockedError, first_free, locked, sync, write_atomically

# What a run's results depend on. Its other settings may change from one start to the next.
DECIDING_FIELDS = (
    "dataset", "dataset_dir", "recipe", "batch_size", "learning_rate", "seed", "seeds", "validation", "features",
    "precision",
)  # fmt: skip

# What this process measured of an epoch, of all seeds together.
MEASURED_FIELDS = ("seconds", "examples_per_second", "step_milliseconds", "compile_seconds")


def deciding_settings(settings: TrainSettings) -> dict:
    """Return the settings that a run's results depend on, as JSON's types."""
    values = {name: getattr(settings, name) for name in DECIDING_FIELDS}
    return {name: _as_json(value) for name, value in values.items()}


def _as_json(value: object) -> object:
    if isinstance(value, Path):
        return str(value.resolve())
    return list(value) if isinstance(value, tuple) else value


def _from_json(value: Any, kind: Any) -> Any:
    """Return what `_as_json` was given, of a field of this type."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if Path in (kind, *get_args(kind)) else value


@dataclasses.dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.jsonl: an epoch of every seed.

    Attributes:
      epoch: From 1.
      step: Steps behind it since the run began.
      cost: Mean of the epoch's batch losses, of each seed.
      accuracy: Fraction of the tested images, on scaled pixels, in [0, 1], of each seed.
      loss: Mean softmax cross-entropy over the tested images, of each seed.
      tested_on: `test`, or `validation` where images were held out for that.
      seconds: Training time of the epoch, or of its part that this process trained; without compiling and testing.
      examples_per_second: Images of all seeds trained a second, over those seconds.
      step_milliseconds: Those seconds per step of all seeds.
      compile_seconds: What this process had spent compiling before the epoch; 0 in its later epochs.
    """

    epoch: int
    step: int
    cost: list[float]
    accuracy: list[float]
    loss: list[float]
    tested_on: str
    seconds: float
    examples_per_second: float
    step_milliseconds: float
    compile_seconds: float

    def to_json(self) -> str:
        """Return the line: the means over the seeds, and of several seeds, each one's numbers under `seeds`."""
        seeds = {"cost": self.cost, f"{self.tested_on}_accuracy": self.accuracy, f"{self.tested_on}_loss": self.loss}
        line = {"epoch": self.epoch, "step": self.step}
        line |= {name: statistics.fmean(values) for name, values in seeds.items()}
        line |= {name: getattr(self, name) for name in MEASURED_FIELDS}
        return json.dumps(line | ({"seeds": seeds} if len(self.cost) > 1 else {}))

    @classmethod
    def from_json(cls, text: str) -> "EpochMetrics":
        """Return what `to_json` wrote down."""
        line = json.loads(text)
        tested_on = "test" if "test_accuracy" in line else "validation"
        seeds = line.pop("seeds", None)
        cost, accuracy, loss = (
            seeds[name] if seeds else [line[name]] for name in ("cost", f"{tested_on}_accuracy", f"{tested_on}_loss")
        )
        names = ("epoch", "step", *MEASURED_FIELDS)
        return cls(cost=cost, accuracy=accuracy, loss=loss, tested_on=tested_on, **{name: line[name] for name in names})


class RunFolder:
    """A run's folder.

    Attributes:
      path: The folder; it need not exist.
      checkpoints: The folder of its checkpoints.
      pictures: The folder of its pictures.
      report: The page about it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "steps"
        self.pictures = path / "pictures"
        self.report = path / "report.html"

    def read_settings(self, data_dir: Path | None = None) -> TrainSettings:
        """Return the settings that the run was last started with.

        Args:
          data_dir: Where tfds keeps its data sets now; None for where it did then.

        Raises:
          NoCheckpointError: there is no run in this folder.
          StorageError: its config.json cannot be understood.
        """
        file = self.path / "config.json"
        if not file.is_file():
            raise NoCheckpointError(f"{self.path} is not a run (it has no config.json); {self._remedy()}")
        try:
            values = json.loads(file.read_text())
            kinds = get_type_hints(TrainSettings)
            # Earlier and later programs may have other settings beside those that the results depend on.
            known = kinds.keys() & values.keys() | {*DECIDING_FIELDS, "epochs"}
            given = {name: _from_json(values[name], kinds[name]) for name in known}
            given["data_dir"] = data_dir or given.get("data_dir")
            return TrainSettings.of(**given)
        except (ValueError, KeyError, TypeError, UsageError) as error:
            raise StorageError(f"{file} cannot be understood ({error}); start anew with --fresh") from error

    def _remedy(self):
        """Name the runs beside this folder, if it is not a run."""
        runs = sorted(file.parent.name for file in self.path.parent.glob("*/config.json"))
        if not runs:
            return "train it first"
        return suggest(self.path.name, runs) or f"there are {', '.join(runs[:5])}{' ...' * (len(runs) > 5)}"

    def write_settings(self, settings: TrainSettings) -> None:
        """Record the settings of this start."""
        values = {name: _as_json(value) for name, value in vars(settings).items()}
        write_atomically(self.path / "config.json", json.dumps(values, indent=2) + "\n")

    def check_settings(self, settings: TrainSettings) -> None:
        """Refuse to continue a run with settings that would have given other results; before step 1 all may change.

        Raises:
          UsageError: naming each difference.
        """
        if not any(step.name not in ("0", "") and step.name.isdigit() for step in self.checkpoints.glob("*")):
            return
        old = self.read_settings()
        differences = []
        for name in DECIDING_FIELDS:
            before, now = getattr(old, name), getattr(settings, name)
            if name == "dataset_dir" and now is not None:
                now = now.resolve()
            if before != now:
                differences.append(f"{name} was {before} and is {now}")
        # The tutorial's steps are the same however many follow; a schedule's are not.
        may_grow = settings.recipe == "tutorial"
        if settings.epochs < old.epochs or (settings.epochs != old.epochs and not may_grow):
            differences.append(f"epochs was {old.epochs:g} and is {settings.epochs:g}")
        if differences:
            raise UsageError(
                f"the run {self.path} has other settings: {'; '.join(differences)}; "
                "give them as they were, another --run-name, or --fresh"
            )

    def read_metrics(self) -> list[EpochMetrics]:
        """Return the metrics of the epochs that are done, in order."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        try:
            return [EpochMetrics.from_json(line) for line in file.read_text().splitlines()]
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(f"{file} cannot be understood ({error}); start anew with --fresh") from error

    def write_metrics(self, metrics: list[EpochMetrics]) -> None:
        """Replace metrics.jsonl: a line for each epoch."""
        write_atomically(self.path / "metrics.jsonl", "".join(epoch.to_json() + "\n" for epoch in metrics))

    def write_result(self, result: dict) -> None:
        """Write result.json: accuracies, in [0, 1], the step, where the last process spent its time, and on what."""
        write_atomically(self.path / "result.json", json.dumps(result, indent=2) + "\n")

    def read_result(self) -> dict:
        """Return what `write_result` wrote, or an empty dict where the run has not ended."""
        file = self.path / "result.json"
        if not file.is_file():
            return {}
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise StorageError(f"{file} cannot be understood ({error}); move it away") from error

    @contextlib.contextmanager
    def open_scalars(self, *, after_step: int) -> Iterator[Callable[[EpochMetrics], None]]:
        """Return a function that writes an epoch's numbers for TensorBoard, under their names in metrics.jsonl.

        The numbers of several seeds are written one by one, too. TensorBoard forgets what an earlier process wrote of
        steps after `after_step`.
        """
        from tensorboardX import SummaryWriter  # an extra

        with SummaryWriter(str(self.path / "tensorboard"), purge_step=after_step + 1) as writer:

            def write(metrics: EpochMetrics) -> None:
                line = json.loads(metrics.to_json())
                seeds = line.pop("seeds", {})
                line |= {f"seeds/{i}/{name}": value for name, values in seeds.items() for i, value in enumerate(values)}
                for name, value in line.items():
                    if name != "step":
                        writer.add_scalar(name, value, metrics.step)
                writer.flush()

            yield write

    def move_aside(self) -> Path | None:
        """Rename the folder to the first free `<name>.old-<n>`, and return that; None if there is no such folder."""
        if not self.path.exists():
            return None
        aside = first_free(self.path.with_name(f"{self.path.name}.old-{n}") for n in itertools.count(1))
        self.path.rename(aside)
        return aside

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder if it is missing and hold it alone; the system lets go when the process ends in any way.

        Raises:
          RunLockedError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        sync(self.path.parent)
        try:
            with locked(self.path / "lock"):
                yield
        except AlreadyLockedError as error:
            raise RunLockedError(
                f"process {error.holder} is writing the run {self.path}; "
                "wait for it, stop it, or give another --run-name"
            ) from error
