"""A search over settings, scored on held-out training images; the only file that knows Optuna."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import Connection, event

from cnn_jax.runs.settings import RecipeName, TrainSettings
from cnn_jax.runs.train import open_run, train_run
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import NonFiniteLossError, StopSignalError
from cnn_jax.runtime.files import locked

# The next process to start takes over a trial whose process has been silent for so long, from its checkpoint.
HEARTBEAT_SECONDS, SILENT_SECONDS = 5, 20
SHOWN_TRIALS = 10


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """What a study chooses from: a range of learning rates, on a logarithmic scale, and lists."""

    learning_rate: tuple[float, float]
    batch_sizes: tuple[int, ...]
    features: tuple[tuple[int, int], ...]
    recipes: tuple[RecipeName, ...]


def run_study(space: SearchSpace, shared: TrainSettings, trials: int) -> optuna.Study:
    """Run trials until the study has as many as it is to have, and list the best.

    Args:
      space: Where to search.
      shared: The settings that all trials share; their checkpoint_dir is the study's folder.
      trials: How many are to be there in the end, by however many processes.

    Raises:
      CnnJaxError: a trial failed, but for a loss that is not finite: that one scores nothing.
    """
    display, folder = Display(), shared.checkpoint_dir
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        # What is marked as experimental: heartbeats and what retries their trials, and `constant_liar`.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = open_study(folder)
        while len(_ended(study)) < trials:
            # One a call: between two, other processes may have ended the study.
            study.optimize(lambda trial: _score(trial, space, shared, display), n_trials=1)
    best = sorted(_scored(study), key=lambda scored: -scored[0])[:SHOWN_TRIALS]
    rows = [(f"trial {trial.number}: {score:.4f}", _describe(trial)) for score, trial in best]
    display.table(f"The best of {len(_ended(study))} trials, by validation accuracy", rows)
    if len(best) > 1:
        display.say(f"the study is in {folder / 'study.db'}, its plots beside it")
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


def open_study(folder: Path) -> optuna.Study:
    """Open a folder's study, or begin it; several processes may have it open."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", wait=True):  # where several begin it at once, one makes the tables
        storage = RDBStorage(
            f"sqlite:///{folder.resolve() / 'study.db'}",
            engine_kwargs={"connect_args": {"timeout": 60}},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=SILENT_SECONDS,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )
        event.listen(storage.engine, "begin", _lock_before_reading)
        # A process takes the unfinished trials of the others for bad ones, so that they try different things.
        sampler = optuna.samplers.TPESampler(constant_liar=True)
        return optuna.create_study(
            study_name=folder.name, storage=storage, sampler=sampler, direction="maximize", load_if_exists=True
        )


def _lock_before_reading(connection: Connection) -> None:
    # SQLite would lock at the first write. Two processes that had each read before that a trial waits would both take
    # it: Optuna's protection is SELECT ... FOR UPDATE, which SQLite does not know.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _score(trial: Trial, space: SearchSpace, shared: TrainSettings, display: Display) -> float:
    """Train what a trial suggests, and return its accuracy on the held-out images: the mean over its seeds."""
    features = trial.suggest_categorical("features", ["x".join(map(str, pair)) for pair in space.features])
    origin = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial.study.trials[trial.number])
    settings = dataclasses.replace(
        shared,
        run_name=f"trial-{trial.number if origin is None else origin}",
        recipe=trial.suggest_categorical("recipe", space.recipes),
        learning_rate=trial.suggest_float("learning_rate", *space.learning_rate, log=True),
        batch_size=trial.suggest_categorical("batch_size", space.batch_sizes),
        features=tuple(int(channels) for channels in features.split("x")),
    )
    if not trial.number:
        display.say("trial 0: training")  # each later trial begins when the one before it is reported
    try:
        with open_run(settings, shown=False) as run:
            result = train_run(settings, run)
        assert result is not None, "no trial is a dry run"
        accuracy = float(np.mean(result.run.metrics[-1].accuracy))
    except StopSignalError:
        # The next process goes on with this trial from its checkpoint.
        RetryHeartbeatStaleTrialCallback()(trial.study, trial.study.trials[trial.number])
        raise
    except NonFiniteLossError as error:
        display.say(f"trial {trial.number}: the loss is not finite; {_describe(trial)}")
        raise optuna.TrialPruned(str(error)) from error
    display.say(f"trial {trial.number}: validation accuracy {accuracy:.4f}; {_describe(trial)}")
    return accuracy


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _scored(study: optuna.Study) -> list[tuple[float, FrozenTrial]]:
    return [(trial.value, trial) for trial in _ended(study) if trial.value is not None]


def _describe(trial: Trial | FrozenTrial) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in trial.params.items()
    )
