"""The files of a run beside its checkpoints: its settings, its metrics, and the lock of the process that writes it."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cnn_jax.data.loading import is_of_dataset
from cnn_jax.runs.own_code import FORM, OwnCode
from cnn_jax.runs.settings import OWN_CODE, TrainSettings
from cnn_jax.runtime.errors import NoCheckpointError, RunLockedError, StorageError, UsageError, suggest
from cnn_jax.runtime.files import (
    AlreadyLockedError,
    check_output_file,
    check_output_folder,
    first_free,
    identity,
    locked,
    output_errors,
    read_file,
    require_in_place,
    sync,
    write_atomically,
)
from cnn_jax.runtime.records import Count, Fraction, NotNegative, Record, Seed, convert, decode, encode, unreadable

# What a run's results depend on. Its other settings may change from one start to the next.
DECIDING_FIELDS = (
    "dataset", "dataset_dir", "recipe", "batch_size", "learning_rate", "seed", "seeds", "validation", "features",
    "precision",
)  # fmt: skip

RUN_FILES = ("config.json", "metrics.jsonl", "result.json", "model.py", "recipe.py")
RUN_FOLDERS = ("steps", "quarantine")
# What a run or a study is read back from, and what SQLite writes beside it: no other file may take its place.
STATE_FILES = (
    *RUN_FILES, *RUN_FOLDERS, "lock", "study.db", "study.db-journal", "study.db-wal", "study.db-shm", "study.db.new",
)  # fmt: skip

# What config.json held once and no longer does.
FORMER_FIELDS = {"debug"}

# What this process measured of an epoch, of all seeds together.
MEASURED_FIELDS = ("seconds", "examples_per_second", "step_milliseconds", "compile_seconds")


def deciding_settings(settings: TrainSettings) -> dict:
    """Return the settings that a run's results depend on, as JSON's types."""
    values = {name: getattr(settings, name) for name in DECIDING_FIELDS}
    if settings.model is not None:  # which earlier programs do not record
        values["model"] = settings.model
    if settings.hyperparameters:
        values["hyperparameters"] = settings.hyperparameters
    return {name: value.identity if isinstance(value, OwnCode) else _as_json(value) for name, value in values.items()}


def differences(before: dict, after: dict) -> list[str]:
    """Return in words how settings, as JSON's types, differ."""
    names = [name for name in after | before if before.get(name) != after.get(name)]
    return [f"{name} was {in_words(before.get(name))} and is {in_words(after.get(name))}" for name in names]


def in_words(value: object) -> str:
    """Return a setting, as JSON's types, in words."""
    if value in (None, ""):
        return "none"
    if isinstance(value, list):
        return " ".join(map(in_words, value))
    text = str(value).removesuffix(".0" if isinstance(value, float) else "")
    return re.sub(r"(SHA-256 \w{12})\w{52}", r"\1...", text)


def _as_json(value: object) -> object:
    if isinstance(value, OwnCode):
        return f"{value.file.resolve()}:{value.name}"
    if isinstance(value, Path):
        return str(value.resolve())
    return list(value) if isinstance(value, tuple) else value


_COPY = "run, or a copy of it that can be written"


class SeedsRecord(Record, frozen=True, kw_only=True):
    """The numbers of each seed, as metrics.jsonl has them."""

    cost: list[float]
    test_accuracy: list[Fraction] | None = None
    validation_accuracy: list[Fraction] | None = None
    test_loss: list[float] | None = None
    validation_loss: list[float] | None = None


class EpochRecord(Record, frozen=True, kw_only=True):
    """A line of metrics.jsonl: the means over the seeds, and of several seeds, each one's numbers."""

    epoch: Count
    step: Count
    cost: float
    test_accuracy: Fraction | None = None
    validation_accuracy: Fraction | None = None
    test_loss: float | None = None
    validation_loss: float | None = None
    seconds: NotNegative
    examples_per_second: NotNegative
    step_milliseconds: NotNegative
    compile_seconds: NotNegative
    seeds: SeedsRecord | None = None


class SeedResult(Record, frozen=True, kw_only=True):
    """What a seed came to."""

    seed: Seed
    test_accuracy: Fraction


class ResultRecord(Record, frozen=True, kw_only=True):
    """result.json: what a run came to, where the process that ended it spent its seconds, and on what it ran."""

    validation_accuracy: Fraction | None = None
    test_accuracy: Fraction
    unscaled_test_accuracy: Fraction | None = None
    seeds: list[SeedResult] | None = None
    spread: dict[str, float] | None = None
    step: Count
    seconds: dict[str, NotNegative]
    machine: str
    device: str
    versions: dict[str, str]
    not_shown: str | None = None


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
      seconds: Training time of the epoch, or of its part that this process trained; without compiling and testing. A
        run that trains at once with others has the time of all of them.
      examples_per_second: Images of all the run's seeds per second of that time.
      step_milliseconds: That time per step of all the run's seeds.
      compile_seconds: What this process had spent compiling, for all its runs, before the epoch; 0 in later epochs.
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

    def to_record(self) -> dict[str, Any]:
        """Return a line of metrics.jsonl as JSON's types: an `EpochRecord`."""
        seeds = {"cost": self.cost, f"{self.tested_on}_accuracy": self.accuracy, f"{self.tested_on}_loss": self.loss}
        line: dict[str, Any] = {"epoch": self.epoch, "step": self.step}
        line |= {name: statistics.fmean(values) for name, values in seeds.items()}
        line |= {name: getattr(self, name) for name in MEASURED_FIELDS}
        return line | ({"seeds": seeds} if len(self.cost) > 1 else {})

    @classmethod
    def of_record(cls, line: EpochRecord) -> "EpochMetrics":
        """Return what `to_record` was made of.

        Raises:
          ValueError: keys are missing that belong together, or the seeds' lists have other lengths.
        """
        tested_on = "validation" if line.test_accuracy is None else "test"
        source = line.seeds or line
        numbers = [getattr(source, name) for name in ("cost", f"{tested_on}_accuracy", f"{tested_on}_loss")]
        cost, accuracy, loss = (number if line.seeds else [number] for number in numbers)
        if None in numbers or None in accuracy or not len(cost) == len(accuracy) == len(loss):
            raise ValueError(f"the {tested_on} accuracy or loss of a seed is missing from epoch {line.epoch}")
        measured = {name: getattr(line, name) for name in ("epoch", "step", *MEASURED_FIELDS)}
        return cls(cost=cost, accuracy=accuracy, loss=loss, tested_on=tested_on, **measured)


class RunFolder:
    """A run's folder.

    Attributes:
      path: The folder; it need not exist.
      checkpoints: The folder of its checkpoints.
      pictures: The folder of its pictures.
      report: The page about it.
      unwritten: What this process has written for TensorBoard in vain, and why; None for nothing.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "steps"
        self.pictures = path / "pictures"
        self.report = path / "report.html"
        self.unwritten: str | None = None
        self._lock: tuple[int, int] | None = None  # the identity of the file that this process has locked

    @property
    def name_option(self) -> str:
        """The option that names this folder: of `train`, or of `sweep` where it is a trial's."""
        return "--study" if os.path.lexists(self.path.parent / "study.db") else "--run-name"

    @property
    def anew(self) -> str:
        """How to begin without what is there, as a part of a failure's line."""
        if self.name_option == "--study":
            return f"move {self.path} away, or give another --study"
        return "give another --run-name, or --fresh"

    @property
    def place_options(self) -> str:
        """The options that decide where this folder is."""
        return f"--checkpoint-dir or {self.name_option}"

    def check_place(self) -> None:
        """Refuse a folder that cannot be made or written.

        Raises:
          StorageError: naming it and its options.
        """
        check_output_folder(self.path, self.place_options)

    def read_settings(self, data_dir: Path | None = None) -> TrainSettings:
        """Return the settings that the run was last started with.

        Args:
          data_dir: Where tfds keeps its data sets now; None for where it did then.

        Raises:
          NoCheckpointError: there is no run in this folder.
          InputFileError: its config.json is damaged or was edited.
        """
        file = self.path / "config.json"
        if not os.path.lexists(file):
            raise NoCheckpointError(f"{self.path} is not a run (it has no config.json); {self._remedy()}")
        remedy = f"start the run's training command again, which writes it anew, or {self.anew}"
        values = decode(read_file(file), dict[str, Any], source=file, remedy=remedy)
        names = [field.name for field in dataclasses.fields(TrainSettings)]
        # Earlier programs may have had fewer settings beside those that the results depend on.
        if missing := {*DECIDING_FIELDS, "epochs"} - values.keys():
            raise unreadable(file, f"without {', '.join(sorted(missing))}", remedy)
        if unknown := values.keys() - {*names, *FORMER_FIELDS}:
            raise unreadable(file, f"there is no setting {', '.join(map(repr, sorted(unknown)))}", remedy)
        if data_dir is not None:
            values["data_dir"] = str(data_dir)
        for name in OWN_CODE:
            if code := FORM.fullmatch(str(values.get(name))):
                values[name] = f"{self.path / name}.py:{code[2]}"
        given = {name: values[name] for name in names if name in values}
        try:
            return convert(given, TrainSettings, source=file, remedy=remedy)
        except UsageError as error:
            raise unreadable(file, error, remedy) from error

    def _remedy(self):
        """Name the runs beside this folder, if it is not a run."""
        runs = sorted(file.parent.name for file in self.path.parent.glob("*/config.json"))
        if not runs:
            return "train it first"
        return suggest(self.path.name, runs) or f"there are {', '.join(runs[:5])}{' ...' * (len(runs) > 5)}"

    def write_settings(self, settings: TrainSettings) -> None:
        """Record the settings of this start, and keep the user's own code that they name."""
        for name, code in settings.own_code.items():
            write_atomically(self.path / f"{name}.py", code.source)
        values = {name: _as_json(value) for name, value in vars(settings).items()}
        write_atomically(self.path / "config.json", json.dumps(values, indent=2) + "\n")

    def describe_change(self, settings: TrainSettings) -> str:
        """Return how the user's code differs from the run's copies of it, to be added to a failure's line."""
        changes = ""
        for name, code in settings.own_code.items():
            copy = self.path / f"{name}.py"
            if copy.is_file() and (before := read_file(copy)) != code.source:
                changes += f" ({code.file}: {code.describe_change(before)})"
        return changes

    def read_metrics(self) -> list[EpochMetrics]:
        """Return what metrics.jsonl holds of the epochs that are done, in order.

        Raises:
          InputFileError: it is damaged or was edited.
        """
        file = self.path / "metrics.jsonl"
        remedy = f"put it back, or {self.anew}"
        lines = read_file(file).splitlines() if file.is_file() else []
        try:
            return [
                EpochMetrics.of_record(decode(line, EpochRecord, source=f"line {i} of {file}", remedy=remedy))
                for i, line in enumerate(lines, start=1)
            ]
        except ValueError as error:
            raise unreadable(file, error, remedy) from error

    def holds_metrics(self, metrics: list[EpochMetrics]) -> bool:
        """Whether metrics.jsonl begins with these lines, as `write_metrics` writes them."""
        file = self.path / "metrics.jsonl"
        # Before the first epoch has ended, there is no file.
        return not metrics or (file.is_file() and read_file(file).startswith(_lines(metrics).encode()))

    def _require_in_place(self) -> None:
        if self._lock is not None:
            require_in_place(self.path / "lock", self._lock)

    def write_metrics(self, metrics: list[EpochMetrics]) -> None:
        """Make metrics.jsonl hold a line for each epoch and nothing else."""
        self._require_in_place()
        file, content = self.path / "metrics.jsonl", _lines(metrics).encode()
        if content != (read_file(file) if file.is_file() else b""):
            write_atomically(file, content)

    def write_result(self, result: dict) -> None:
        """Write result.json: accuracies, in [0, 1], the step, where the last process spent its time, and on what."""
        self._require_in_place()
        write_atomically(self.path / "result.json", json.dumps(result, indent=2) + "\n")

    def read_result(self) -> ResultRecord | None:
        """Return what `write_result` wrote, or None where the run has not ended.

        Raises:
          InputFileError: it is damaged or was edited.
        """
        file = self.path / "result.json"
        if not file.is_file():
            return None
        remedy = "delete it and start the run's training command again, which writes it anew"
        return decode(read_file(file), ResultRecord, source=file, remedy=remedy)

    def holds_result(self, numbers: dict) -> bool:
        """Whether result.json is there and has these numbers under these keys."""
        result = self.read_result()
        written = {} if result is None else json.loads(encode(result))
        return written | numbers == written

    @contextlib.contextmanager
    def open_scalars(self, *, after_step: int) -> Iterator[Callable[[EpochMetrics], None]]:
        """Return a function that writes an epoch's numbers for TensorBoard, under their names in metrics.jsonl.

        The numbers of several seeds are written one by one, too. What cannot be written is left out, and `unwritten`
        says so. TensorBoard forgets what an earlier process wrote of steps after `after_step`.
        """
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # made by protobuf as it runs
        from tensorboardX.record_writer import RecordWriter  # an extra; its SummaryWriter fails in a thread
        from tensorboardX.summary import scalar

        place = self.path / "tensorboard"

        def note(failure: OSError) -> None:
            self.unwritten = self.unwritten or f"{place}: {failure.strerror or failure}"

        try:
            place.mkdir(exist_ok=True)
            records = RecordWriter(str(place / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"))
        except OSError as error:
            note(error)
            yield lambda metrics: None
            return

        def add(**event: Any) -> None:
            records.write(Event(wall_time=time.time(), **event).SerializeToString())

        def write(metrics: EpochMetrics) -> None:
            line = metrics.to_record()
            step, seeds = line.pop("step"), line.pop("seeds", {})
            line |= {f"seeds/{i}/{name}": value for name, values in seeds.items() for i, value in enumerate(values)}
            try:
                for name, value in line.items():
                    add(step=step, summary=scalar(name, value))
                records.flush()
            except OSError as error:
                note(error)

        add(file_version="brain.Event:2")  # so far nothing comes to the disk
        add(step=after_step + 1, session_log=SessionLog(status=SessionLog.START))
        try:
            yield write
        finally:
            try:
                records.close()
            except OSError as error:
                note(error)

    def move_aside(self) -> Path | None:
        """Rename the folder to the first free `<name>.old-<n>`, and return that; None if it holds but its lock."""
        if all(file.name == "lock" for file in self.path.glob("*")):
            return None
        aside = first_free(self.path.with_name(f"{self.path.name}.old-{n}") for n in itertools.count(1))
        self.path.rename(aside)
        return aside

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder if it is missing and hold it alone; the system lets go when the process ends in any way.

        Raises:
          RunLockedError: another process holds it.
          StorageError: something in it could not be written.
          UsageError: it is a study's.
        """
        if os.path.lexists(self.path / "study.db"):
            raise UsageError(f"{self.path} is a study, not a run; give another --run-name")
        self.check_place()
        place = self.place_options
        with contextlib.ExitStack() as held:
            is_new = not self.path.exists()
            with output_errors(self.path, place):
                self.path.mkdir(parents=True, exist_ok=True)
                sync(self.path.parent)
            try:
                with output_errors(self.path / "lock", place):
                    held.enter_context(locked(self.path / "lock"))
            except AlreadyLockedError as error:
                raise RunLockedError(
                    f"{error.holder} is writing the run {self.path}; "
                    f"wait for it, stop it, or give another {self.name_option}"
                ) from error
            files, folders = ([self.path / name for name in names] for names in (RUN_FILES, RUN_FOLDERS))
            for path in (*files, *folders, self.report, self.pictures):
                self._check_not_anothers(path)
            for file in files:
                check_output_file(file, place)
            for folder in folders:
                check_output_folder(folder, place)
            self.check_report(option=place)
            self._lock = identity(self.path / "lock")
            try:
                yield
            finally:
                self._lock = None
                if is_new and [*self.path.glob("*")] == [self.path / "lock"]:  # the start was refused
                    (self.path / "lock").unlink()
                    self.path.rmdir()

    def _check_not_anothers(self, path: Path) -> None:
        """Refuse a link from this folder into another run's or a study's.

        Raises:
          StorageError: naming both.
        """
        owner = Path(os.path.realpath(path)).parent
        if owner != Path(os.path.realpath(self.path)) and _is_begun(owner):
            raise StorageError(
                f"cannot write {path} (it is a link into the run or study {owner}); remove it, or give another "
                f"{self.place_options}"
            )

    def check_report(self, file: Path | None = None, *, option: str = _COPY) -> None:
        """Refuse a place for a page about the run that cannot be written: by default its own, with the pictures.

        Raises:
          StorageError: naming it.
        """
        if file is not None:
            check_output(file)
        elif self.path.is_dir():
            check_output_file(self.report, option)
            self.check_pictures(option)

    def check_pictures(self, option: str = _COPY) -> None:
        """Refuse a run whose pictures cannot be written, as `check_report` does."""
        if self.path.is_dir():
            check_output_folder(self.pictures, option)


def check_output(file: Path, option: str = "--output", *, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse a file that cannot be written, or that is an input, a data set's, or read back by a run or a study.

    Args:
      file: The file.
      option: The option that names it.
      inputs: What is read to make it.

    Raises:
      StorageError: naming it.
    """
    check_output_file(file, option)
    target = Path(os.path.realpath(file))
    if is_of_dataset(target):
        raise StorageError(f"cannot write {file} (it is part of a data set); give another {option}")
    if target.exists() and any(os.path.exists(each) and target.samefile(each) for each in inputs):
        raise StorageError(f"cannot write {file} (it is what is read); give another {option}")
    for folder in target.parents:
        own = target.relative_to(folder).parts[0]
        is_compared = own == "runs" and (folder / own / "lock").is_file()
        if is_compared or (own in STATE_FILES and _is_begun(folder)):
            owner = "comparison" if is_compared else "run or study"
            raise StorageError(f"cannot write {file} (the {owner} {folder} needs {own}); give another {option}")


def check_output_of_several(folder: Path, *names: str) -> None:
    """Refuse an --output for several results that cannot be written, or that is a run's or a study's.

    Args:
      folder: The folder.
      names: Files in it that are replaced where they exist.

    Raises:
      StorageError: naming what cannot be written.
    """
    check_output_folder(folder, "--output")
    for file in (folder / name for name in names):
        if os.path.lexists(file):
            check_output_file(file, "--output")
    if _is_begun(folder):
        raise StorageError(f"cannot write {folder} (it is a run or a study); give another --output")


def _is_begun(folder: Path) -> bool:
    """Whether a folder is a run's or a study's."""
    return any((folder / name).is_file() for name in ("config.json", "study.db"))


def _lines(metrics: list[EpochMetrics]) -> str:
    return "".join(json.dumps(epoch.to_record()) + "\n" for epoch in metrics)
