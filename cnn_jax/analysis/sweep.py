"""A search over settings, scored on held-out training images; the only file that knows Optuna."""

import contextlib
import dataclasses
import itertools
import math
import os
import resource
import sqlite3
import statistics
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optuna
import scipy  # whose stats, which take half a second to import, come when they are first used
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    check_distribution_compatibility,
)
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import Connection, event
from sqlalchemy.exc import SQLAlchemyError

from cnn_jax.core.sharding import make_mesh
from cnn_jax.data.dataset import Dataset
from cnn_jax.runs.folder import EpochMetrics, RunFolder, deciding_settings, differences, in_words
from cnn_jax.runs.program import Sizes, check_resources, make_program
from cnn_jax.runs.restore import load_run_data
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runs.summary import mean_interval
from cnn_jax.runs.train import train_together
from cnn_jax.runtime.devices import device_bytes, start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import (
    ALLOW_LARGER,
    CnnJaxError,
    InputFileError,
    NonFiniteLossError,
    StopSignalError,
    StorageError,
    UsageError,
)
from cnn_jax.runtime.files import check_output_file, locked, sync
from cnn_jax.runtime.records import NonEmpty, Pair, Positive, RecipeText, Record, Seed, Sha256, Size, Text, convert

# The next process to start takes over a trial whose process has been silent for so long, from its checkpoint.
HEARTBEAT_SECONDS, SILENT_SECONDS = 5, 20
SHOWN_TRIALS = 10
# A trial is compared with at least so many others.
PEERS = 3

# SQLite's codes for a file that is no sound database with the tables of a study; its others are about access.
DAMAGE = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
SHAPING = ("features", "recipe", "batch_size")  # what trials that train together have in common


class StudyRecord(Record, frozen=True, kw_only=True):
    """What a study records of itself: what decides a score and is not searched, the choices, and the data's SHA-256."""

    dataset: Text
    dataset_dir: Text | None
    data: Sha256
    epochs: Positive
    validation: Size
    seed: Seed
    seeds: Size
    precision: Literal["float32", "bfloat16"]
    features: NonEmpty[Pair]
    recipe: NonEmpty[RecipeText]
    model: Text | None = None
    batch_size: NonEmpty[Size]
    hyperparameters: NonEmpty[Text] | None = None


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """What a study chooses from: ranges of the recipe's arguments, the learning rate among them, and lists."""

    arguments: dict[str, tuple[float, float]]
    batch_sizes: tuple[int, ...]
    features: tuple[tuple[int, int], ...]
    recipes: tuple[str, ...]

    def choices(self) -> dict[str, list[Any]]:
        """Return the lists as JSON's types, by the settings' names."""
        features = ["x".join(map(str, pair)) for pair in self.features]
        return {"features": features, "recipe": list(self.named_recipes()), "batch_size": list(self.batch_sizes)}

    def recorded(self) -> dict[str, list[Any]]:
        """Return what a study records of it: the lists, and which hyperparameters it has, but not their ranges."""
        hyperparameters = sorted(self.arguments.keys() - {"learning_rate"})
        return self.choices() | ({"hyperparameters": hyperparameters} if hyperparameters else {})

    def named_recipes(self) -> dict[str, str]:
        """Return the recipes by what a study records of them: of the user's own code the SHA-256, too."""
        return {getattr(recipe, "identity", recipe): recipe for recipe in self.recipes}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return what Optuna records of each trial, by the settings' names."""
        choices = {name: CategoricalDistribution(values) for name, values in self.choices().items()}
        ranges = {name: FloatDistribution(low, high, log=low > 0) for name, (low, high) in self.arguments.items()}
        return {**choices, **ranges}


class SeedsPruner(BasePruner):
    """Ends a trial whose accuracy after an epoch, as good as its seeds allow it to be, is below its peers' median.

    Optuna's MedianPruner takes the one number of a trial for exact, and waits for trials that are complete; its
    WilcoxonPruner does know of seeds, but compares them with the best complete trial's and needs four of them.

    Peers are the trials of the same recipe that have come as far: other schedules rise and fall at other times.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        epoch = trial.last_step
        accuracies = [
            other.intermediate_values[epoch]
            for other in study.get_trials(deepcopy=False)
            if other.state != TrialState.FAIL  # which another trial takes up
            and other.number != trial.number
            and other.params.get("recipe") == trial.params["recipe"]
            and epoch in other.intermediate_values
        ]
        return len(accuracies) >= PEERS and trial.user_attrs["highest"] < statistics.median(accuracies)


def highest(accuracies: Sequence[float], images: int) -> float:
    """Return the upper end of the 95 % interval of an accuracy in [0, 1].

    It is Student's of the mean of several seeds. Of one seed, it is that of a share of the tested images (Wilson,
    Journal of the American Statistical Association 22, 1927).
    """
    if len(accuracies) > 1:
        return mean_interval(accuracies).high
    right = round(accuracies[0] * images)
    return float(scipy.stats.binomtest(right, images).proportion_ci(method="wilson").high)


def run_study(space: SearchSpace, shared: TrainSettings, trials: int, together: int = 1) -> optuna.Study:
    """Run trials until the study has as many as it is to have, and list the best.

    Trials that train together have their features, recipe and batch size in common, as Optuna chose them for the first,
    and other arguments of the recipe, chosen before any of them has a score. So the search learns from scores less
    often, and tries fewer of those choices.

    Args:
      space: Where to search.
      shared: The settings that all trials share; their checkpoint_dir is the study's folder.
      trials: How many are to be there in the end, by however many processes.
      together: How many to train together.

    Raises:
      UsageError: the study has other settings.
      InputFileError: its database is damaged, or the data have changed.
      StorageError: its database cannot be read or written.
      CnnJaxError: a trial failed, but for a loss that is not finite: that one scores nothing.
    """
    display, folder = Display(), shared.checkpoint_dir
    file = folder / "study.db"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings(), _failures_named(file):
        # What is marked as experimental: heartbeats, what retries their trials, `constant_liar`, PartialFixedSampler.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # This sends heartbeats, too, though it is not `Study.optimize`.
        warnings.filterwarnings("ignore", "Heartbeat of storage")
        # A trial that is taken up again keeps its numbers, wherever their ranges now are.
        warnings.filterwarnings("ignore", "Fixed parameter")
        if os.path.lexists(file):
            open_study(space, shared)  # refuses other settings before anything is loaded
        # What every trial would refuse is refused before there is a trial.
        start_devices(shared.platform)
        dataset = load_run_data(dataclasses.replace(shared, batch_size=max(space.batch_sizes)))
        lowest = {name: low for name, (low, _) in space.arguments.items()}
        mesh, tried = make_mesh(shared.seeds, jax.devices()), shared
        for size, features in itertools.product(space.batch_sizes, space.features):
            tried = dataclasses.replace(shared, batch_size=size, features=features)
            check_resources(tried, Sizes.of(dataset, tried), mesh, device_bytes())
        for recipe in space.recipes:
            make_program(_with_arguments(tried, lowest, recipe), Sizes.of(dataset, tried), mesh)
        study = open_study(space, shared, dataset.sha256)
        is_told = False
        while len(_ended(study)) < trials:
            with _asked(study, file, space, trials, together) as asked:
                for group in asked:
                    _score(study, group, space, shared, dataset, display)
            if not asked:
                if not is_told:
                    display.say("the last trials run in other processes; waiting for them")
                is_told = True
                time.sleep(1)
    best, pruned = (
        sorted(of_state, key=lambda scored: -scored[0])[:SHOWN_TRIALS]
        for of_state in (_scored(study), _scored(study, TrialState.PRUNED))
    )
    rows = [(f"trial {trial.number}: {score:.4f}", _describe(trial)) for score, trial in best]
    rows += [(f"trial {trial.number}: {score:.4f}", f"ended early; {_describe(trial)}") for score, trial in pruned]
    display.table(f"The best of {len(_ended(study))} trials, by validation accuracy", rows)
    if len(best) > 1:
        display.say(f"the study is in {file}, its plots beside it")
    return study


def draw_study(study: optuna.Study) -> Iterator[tuple[str, Any]]:
    """Draw how a study with at least two scored trials went: names of files, and Matplotlib's axes for each."""
    if len(_scored(study)) < 2:
        return
    draw = optuna.visualization.matplotlib
    with warnings.catch_warnings():
        # They are marked as experimental, and lay themselves out in a way that Matplotlib warns of, also when saved.
        warnings.simplefilter("ignore")
        yield "history.png", draw.plot_optimization_history(study)
        yield "parallel.png", draw.plot_parallel_coordinate(study)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()  # the default one needs scikit-learn
        yield "importances.png", draw.plot_param_importances(study, evaluator=evaluator)


def open_study(space: SearchSpace, shared: TrainSettings, data: str | None = None) -> optuna.Study:
    """Open the study in a folder and check it, or begin it; several processes may have it open.

    Args:
      space: Where to search.
      shared: The settings that all trials share; their checkpoint_dir is the study's folder.
      data: The data's SHA-256, in hexadecimal; None where the study is there and is only to be checked.

    Raises:
      UsageError: the study has other settings, or the folder holds other runs than the study's.
      InputFileError: the database is damaged or not this study's, or the data have changed.
      StorageError: the database cannot be read or written.
    """
    folder, file = shared.checkpoint_dir, shared.checkpoint_dir / "study.db"
    now = {**_shared_settings(shared), **space.recorded(), "data": data}
    if (folder / "config.json").exists():
        raise UsageError(f"{folder} is a run, not a study; give another --study")
    folder.mkdir(parents=True, exist_ok=True)
    check_output_file(file, "--checkpoint-dir or --study")  # SQLite would not tell what else it is
    # Where several begin it at once, one does.
    with locked(folder / "lock", wait=True), _failures_named(file, reading=True):
        # Listed before the trials: another process makes a trial, then its folder.
        runs = _trial_runs(folder)
        if data is not None and not os.path.lexists(file):
            _check_runs(folder, runs, trials=0)
            _begin_study(file, now)
        study = _read_study(file)
        trials = study.get_trials(deepcopy=False)
        if "settings" in study.user_attrs:
            recorded = study.user_attrs["settings"]
            convert(recorded, StudyRecord, source=file, remedy="bring a sound copy back, or give another --study")
        else:  # version 0.1.0 began it
            recorded = now | _settings_of_trials(file, trials, runs)
        _check_settings(shared, recorded, now)
        _check_trials(trials, space, runs)
        _check_runs(folder, runs, len(trials))
        if data is not None and "settings" not in study.user_attrs:
            Display().say(
                f"{file} does not record its settings, as one of version 0.1.0: those of its runs and the present data "
                "are taken for them, and recorded now"
            )
            study.set_user_attr("settings", now)
        return study


def _begin_study(file: Path, settings: dict) -> None:
    """Write a study without trials; the file is whole or not there, whenever the process ends."""
    new = file.with_name("study.db.new")
    try:
        new.write_bytes(b"")  # to SQLite, an empty database
        storage = _open_storage(new, skip_table_creation=False)
        study = optuna.create_study(study_name=file.parent.name, storage=storage, direction="maximize")
        study.set_user_attr("settings", settings)
        storage.engine.dispose()
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
    sync(file.parent)


def _read_study(file: Path) -> optuna.Study:
    try:
        storage = _open_storage(file, skip_table_creation=True)
    except RuntimeError as error:
        raise InputFileError(
            f"{file} has the tables of another version of Optuna; install that version, or give another --study"
        ) from error
    event.listen(storage.engine, "begin", _lock_before_reading)
    with storage.engine.begin() as connection:
        # Changes nothing, but fails where the file cannot be written.
        connection.exec_driver_sql("DELETE FROM studies WHERE FALSE")
        problem = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
    if problem != "ok":
        raise ValueError(problem)
    name, names = file.parent.name, optuna.get_all_study_names(storage)
    if name not in names:
        raise InputFileError(
            f"{file} holds the study {', '.join(names)}, not {name}; give its folder the study's name, "
            "or give another --study"
            if names
            else f"{file} holds no study; bring a sound copy back, or give another --study"
        )
    # A process takes the unfinished trials of the others for bad ones, so that they try different things.
    sampler = optuna.samplers.TPESampler(constant_liar=True)
    study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=SeedsPruner())
    if study.directions != [StudyDirection.MAXIMIZE]:
        raise ValueError("it does not maximize one score")
    return study


class _Storage(RDBStorage):
    def alive(self) -> set[int]:
        """Return the numbers of the trials of which some process has told that they are alive."""
        with self.engine.begin() as connection:
            return set(connection.exec_driver_sql("SELECT trial_id FROM trial_heartbeats").scalars())

    def record_heartbeat(self, trial_id: int) -> None:
        # In a thread of Optuna's, whose failure nobody would see but as a traceback. The trial's own writes report it.
        with contextlib.suppress(SQLAlchemyError, StorageInternalError):
            super().record_heartbeat(trial_id)


def _open_storage(file: Path, *, skip_table_creation: bool) -> RDBStorage:
    def connect() -> sqlite3.Connection:
        # By its path, in which a URL would give ?, # and % a meaning. `rw` makes no file where there is none.
        uri = f"{file.resolve().as_uri()}?mode=rw"
        return sqlite3.connect(uri, uri=True, timeout=60, check_same_thread=False)

    return _Storage(
        "sqlite:///study.db",
        engine_kwargs={"creator": connect},
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=SILENT_SECONDS,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        skip_table_creation=skip_table_creation,
    )


@contextlib.contextmanager
def _failures_named(file: Path, *, reading: bool = False) -> Iterator[None]:
    """Report the failures of a study's database by its file: damage, or that SQLite cannot access it.

    Where nothing happens but `reading`, every failure is damage: Optuna trusts what it reads, and fails in many ways.
    """
    try:
        yield
    except (CnnJaxError, OSError):
        raise
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        found = next((cause for cause in chain if isinstance(cause, sqlite3.Error)), error if reading else None)
        if found is None:
            raise
        code, reason = getattr(found, "sqlite_errorcode", None), str(found)
        if not reason or not (isinstance(found, sqlite3.Error) or type(found) in (ValueError, LookupError)):
            reason = "what it records is incomplete or makes no sense"  # to Optuna, which fails anywhere in its code
        if code is None or code & 0xFF in DAMAGE:
            raise InputFileError(
                f"{file} is damaged or not this study's ({reason}); bring a sound copy back, or give another --study"
            ) from error
        # SQLite does not tell a file that may not grow from a disk that fails.
        limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
        is_limit = limited and code & 0xFF == sqlite3.SQLITE_IOERR
        remedy = ALLOW_LARGER if is_limit else "see to the disk and its permissions"
        raise StorageError(
            f"{file} cannot be read or written ({reason}); {remedy}, or give another --checkpoint-dir"
        ) from error


def _trial_runs(folder: Path) -> dict[int, RunFolder]:
    """Return the runs in a study's folder by the numbers of their trials."""
    files = folder.glob("trial-*/config.json")
    named = {file.parent.name.removeprefix("trial-"): RunFolder(file.parent) for file in files}
    return {int(number): run for number, run in named.items() if number.isdecimal()}


def _shared_settings(settings: TrainSettings) -> dict:
    """Return what a score depends on and all trials of a study share, as JSON's types."""
    deciding = deciding_settings(settings) | {"epochs": settings.epochs}
    return {
        name: value for name, value in deciding.items() if name not in (*SHAPING, "learning_rate", "hyperparameters")
    }


def _settings_of_trials(file: Path, trials: Sequence[FrozenTrial], runs: dict[int, RunFolder]) -> dict:
    """Return the settings of a study that does not record them, as far as its trials do."""
    shared: dict = {}
    for number, run in sorted(runs.items()):
        try:
            settings = _shared_settings(run.read_settings())
        except CnnJaxError as error:
            raise InputFileError(f"{run.path / 'config.json'} cannot be understood; give another --study") from error
        if shared and settings != shared:
            raise InputFileError(
                f"{file} has trials of different settings, whose scores do not compare: in trial-{number}, "
                f"{'; '.join(differences(shared, settings))}; give another --study"
            )
        shared = settings
    if not shared and any(trial.state == TrialState.COMPLETE for trial in trials):
        raise InputFileError(f"{file} does not record its settings, nor does a run beside it; give another --study")
    choices = {
        name: list(distribution.choices)
        for trial in trials
        for name, distribution in trial.distributions.items()
        if isinstance(distribution, CategoricalDistribution)
    }
    return shared | choices


def _check_settings(shared: TrainSettings, recorded: dict, now: dict) -> None:
    """Refuse settings that are not a study's; raises UsageError, or InputFileError where the data have changed."""
    compared = recorded | {"data": None}
    if now["data"] in (None, recorded["data"]):  # they may have been moved, or are not known yet
        compared["dataset_dir"] = now["dataset_dir"]
    if differing := differences(compared, now | {"data": None}):
        raise UsageError(
            f"the study {shared.checkpoint_dir} has other settings: {'; '.join(differing)}; "
            "give them as they were, or another --study"
        )
    if now["data"] not in (None, recorded["data"]):
        raise InputFileError(
            f"the data in {shared.dataset_dir or shared.dataset} are not those that the study "
            f"{shared.checkpoint_dir} was begun with; bring them back, or give another --study"
        )


def _check_runs(folder: Path, runs: dict[int, RunFolder], trials: int) -> None:
    """Refuse runs that a trial still to come would take for its own; raises UsageError."""
    if strays := sorted(runs.keys() - range(trials)):
        raise UsageError(
            f"{folder} holds trial-{strays[0]}, which is no trial of its study.db; "
            "bring that back, move the trial away, or give another --study"
        )


def _check_trials(trials: Sequence[FrozenTrial], space: SearchSpace, runs: dict[int, RunFolder]) -> None:
    """Refuse trials that this program did not make, or of which a run beside them tells otherwise.

    Raises KeyError, TypeError or ValueError; UsageError where a range begins at 0 that did not, or the other way round.
    """
    choices, distributions = space.choices(), space.distributions()
    for number, trial in enumerate(trials):
        if trial.number != number:
            raise ValueError(f"there is a trial {trial.number} and no trial {number}")
        for name, distribution in trial.distributions.items():
            log = getattr(distribution, "log", None)
            if log is not None and log != getattr(distributions[name], "log", log):
                raise UsageError(
                    f"--hyperparameters {name}: the study has searched it on a {'logarithmic' if log else 'linear'} "
                    f"scale; give a range that begins {'above' if log else 'at'} 0, or another --study"
                )
            check_distribution_compatibility(distribution, distributions[name])
            value = trial.params[name]
            if isinstance(distribution, FloatDistribution):
                is_its_own = isinstance(value, float) and distribution.low <= value <= distribution.high
            else:
                is_its_own = value in choices[name]
            # What somebody has enqueued may lie outside the range.
            if not is_its_own and value != trial.system_attrs.get("fixed_params", {}).get(name):
                raise ValueError(f"trial {number} has the {name} {value}")
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and trial.params.keys() != distributions.keys():
            raise ValueError(f"trial {number} does not record {', '.join(distributions.keys() - trial.params.keys())}")
        origin = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
        if origin is not None and origin not in range(trial.number):
            raise ValueError(f"trial {trial.number} takes up trial {origin}")
        score = trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
        if score is None and trial.state == TrialState.COMPLETE:
            raise ValueError(f"trial {trial.number} has no score")
        if score is not None and not 0 <= score <= 1:
            raise ValueError(f"trial {trial.number} has the score {score}")
        run = runs.get(trial.number if origin is None else origin)
        if score is not None and run is not None:
            _check_against_run(trial, run)


def _check_against_run(trial: FrozenTrial, run: RunFolder) -> None:
    """Refuse a trial of other arguments or another score than its run's; raises ValueError."""
    try:
        arguments = run.read_settings().recipe_arguments
        # One that ended early may have been trained further since.
        metrics = [line for line in run.read_metrics() if trial.last_step in (None, line.epoch)]
    except CnnJaxError:
        return  # a run that was damaged since says nothing of the study
    numbers = {name: (trial.params[name], number) for name, number in arguments.items()}
    if metrics and metrics[-1].tested_on == "validation":
        numbers["score"] = trial.values[0], float(np.mean(metrics[-1].accuracy))
    for name, (recorded, own) in numbers.items():
        if not math.isclose(recorded, own, rel_tol=1e-9):
            raise ValueError(f"trial {trial.number} has the {name} {recorded:g}, and {run.path} has {own:g}")


def _lock_before_reading(connection: Connection) -> None:
    # SQLite would lock at the first write. Two processes that had each read before that a trial waits would both take
    # it: Optuna's protection is SELECT ... FOR UPDATE, which SQLite does not know.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextlib.contextmanager
def _asked(
    study: optuna.Study, file: Path, space: SearchSpace, count: int, together: int
) -> Iterator[list[list[Trial]]]:
    """Ask for trials, in groups that can train together, and tell that they are alive until the block ends.

    There are none if all that are missing of `count` run in other processes.

    What is left of them where the program is stopped, or the disk fails, is queued: the next process goes on with it
    from its checkpoint. Where anything else fails they have failed.
    """
    trials: list[Trial] = []
    ended = threading.Event()

    def tell_alive() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            for trial in list(trials):
                study._storage.record_heartbeat(trial._trial_id)  # pyright: ignore[reportAttributeAccessIssue]

    thread = threading.Thread(target=tell_alive, daemon=True)
    thread.start()
    sampler, groups = study.sampler, {}
    try:
        with locked(file.with_name("lock"), wait=True):  # others count before or after all these are asked for
            for _ in range(min(together, count - len(_ended(study)) - _count_running(study, file))):
                trial = study.ask(space.distributions())
                study._storage.record_heartbeat(trial._trial_id)  # pyright: ignore[reportAttributeAccessIssue]
                trials.append(trial)
                shape = {name: trial.params[name] for name in SHAPING}
                # One that was queued may be of another shape.
                groups.setdefault(tuple(shape.values()), []).append(trial)
                if len(trials) == 1:
                    study.sampler = optuna.samplers.PartialFixedSampler(shape, sampler)
        yield list(groups.values())
    except BaseException as error:
        for trial in study.get_trials(states=(TrialState.RUNNING,)) if trials else ():
            if trial.number in (own.number for own in trials):
                if isinstance(error, StopSignalError | StorageError):
                    RetryHeartbeatStaleTrialCallback()(study, trial)
                study.tell(trial.number, state=TrialState.FAIL)
        raise
    finally:
        study.sampler = sampler
        ended.set()
        thread.join()


def _count_running(study: optuna.Study, file: Path) -> int:
    """Return how many trials some process trains; those of processes that have died are queued anew."""
    with _failures_named(file, reading=True):
        optuna.storages.fail_stale_trials(study)
    alive = study._storage._backend.alive()  # pyright: ignore[reportAttributeAccessIssue]
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    # Of the others, a process was killed between asking for them and telling that they are alive.
    return sum(trial._trial_id in alive for trial in running)


def _score(
    study: optuna.Study,
    trials: Sequence[Trial],
    space: SearchSpace,
    shared: TrainSettings,
    dataset: Dataset,
    display: Display,
) -> None:
    """Train what trials suggest, and tell each one's accuracy on the held-out images: the mean over its seeds."""

    def report(trial: Trial, epochs: Sequence[EpochMetrics]) -> None:
        done = study.trials[trial.number].intermediate_values
        for metrics in epochs:
            if metrics.epoch not in done:
                trial.report(float(np.mean(metrics.accuracy)), metrics.epoch)

    def judge(epochs: dict[int, list[EpochMetrics]]) -> list[int]:
        assert shared.validation is not None, "every study holds images out"
        for place, metrics in epochs.items():
            report(trials[place], metrics)
            trials[place].set_user_attr("highest", highest(metrics[-1].accuracy, shared.validation))
        lost = [place for place in epochs if trials[place].should_prune()]
        for place in lost:
            last = epochs[place][-1]
            display.say(
                f"trial {trials[place].number}: ended after epoch {last.epoch} with validation accuracy "
                f"{np.mean(last.accuracy):.4f}; {_describe(trials[place])}"
            )
            study.tell(trials[place], state=TrialState.PRUNED)
        return [place for place in epochs if place not in lost]

    if len(trials) > 1:
        display.say(f"trials {', '.join(str(trial.number) for trial in trials)}: training together")
    elif not trials[0].number:
        display.say("trial 0: training")  # each later trial begins when the one before it is reported
    results = train_together([_settings_of(trial, space, shared) for trial in trials], dataset, judge)
    for trial, result in zip(trials, results, strict=True):
        if study.trials[trial.number].state != TrialState.RUNNING:
            continue  # ended early
        if isinstance(result, NonFiniteLossError):
            display.say(f"trial {trial.number}: the loss is not finite; {_describe(trial)}")
            study.tell(trial, state=TrialState.PRUNED)
            continue
        report(trial, result)
        accuracy = float(np.mean(result[-1].accuracy))
        study.tell(trial, accuracy)
        display.say(f"trial {trial.number}: validation accuracy {accuracy:.4f}; {_describe(trial)}")


def _settings_of(trial: Trial, space: SearchSpace, shared: TrainSettings) -> TrainSettings:
    origin = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial.study.trials[trial.number])
    settings = dataclasses.replace(
        shared,
        run_name=f"trial-{trial.number if origin is None else origin}",
        batch_size=trial.params["batch_size"],
        features=tuple(int(channels) for channels in trial.params["features"].split("x")),
    )
    arguments = {name: trial.params[name] for name in space.arguments}
    return _with_arguments(settings, arguments, space.named_recipes()[str(trial.params["recipe"])])


def _with_arguments(settings: TrainSettings, arguments: dict[str, float], recipe: str) -> TrainSettings:
    """Return the settings with a recipe and its arguments."""
    others = tuple(f"{name}={number!r}" for name, number in arguments.items() if name != "learning_rate")
    rate = arguments["learning_rate"]
    return dataclasses.replace(settings, recipe=recipe, learning_rate=rate, hyperparameters=others)


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _scored(study: optuna.Study, state: TrialState = TrialState.COMPLETE) -> list[tuple[float, FrozenTrial]]:
    trials = study.get_trials(deepcopy=False, states=(state,))
    return [(trial.value, trial) for trial in trials if trial.value is not None]


def _describe(trial: Trial | FrozenTrial) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {in_words(value)}"
        for name, value in trial.params.items()
    )
