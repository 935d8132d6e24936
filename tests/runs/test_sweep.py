"""A sweep tries settings, scores them on held-out images, and goes on where it was stopped."""

import multiprocessing
import os
import re
import signal
import time
from concurrent.futures import ProcessPoolExecutor

import optuna
import pytest
from optuna.trial import TrialState

pytestmark = pytest.mark.optax_promotes


@pytest.fixture
def arguments(small_mnist, tmp_path):
    return ["--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--epochs", 1, "--validation", 300]


def study_of(folder):
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'sweep' / 'study.db'}")


@pytest.mark.slow
def test_a_sweep_scores_trials_on_validation_and_draws_what_came_of_it(command, arguments, tmp_path):
    code, out, err = command("sweep", "--trials", 3, "--features", 4, 8, 8, 16, "--recipe", "tutorial", *arguments)
    assert (code, out) == (0, ""), err
    trials = study_of(tmp_path).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    for trial in trials:
        assert set(trial.params) == {"features", "recipe", "learning_rate", "batch_size"}
        (line,) = (tmp_path / "sweep" / f"trial-{trial.number}" / "metrics.jsonl").read_text().splitlines()
        assert f'"validation_accuracy": {trial.value}' in line
        assert "test_accuracy" not in line
        assert not (tmp_path / "sweep" / f"trial-{trial.number}" / "result.json").exists()
    best = max(trial.value for trial in trials)
    assert re.search(rf"The best of 3 trials.*\n.*\n.*: {best:.4f} ", err)
    for name in ("history.png", "parallel.png", "importances.png"):
        assert (tmp_path / "sweep" / name).stat().st_size > 10_000


def test_a_study_that_is_done_is_reported_and_a_larger_one_goes_on(command, arguments, tmp_path):
    small = ["--features", 4, 8, "--recipe", "tutorial", "--batch-size", 100]
    for trials in (1, 1, 2):
        assert command("sweep", "--trials", trials, *small, *arguments)[0] == 0
        assert len(study_of(tmp_path).trials) == trials


def test_a_trial_whose_loss_is_not_finite_scores_nothing(command, arguments, tmp_path):
    code, _, err = command(
        "sweep", "--trials", 1, "--learning-rate", 1e29, 1e30, "--recipe", "tutorial", "--features", 4, 8, *arguments
    )
    assert code == 0
    assert "the loss is not finite" in err
    assert [trial.state for trial in study_of(tmp_path).trials] == [TrialState.PRUNED]


def begin_and_ask(folder, rounds, barrier):
    """Begin studies when the other process does, and return the number of the trial that each then gives."""
    from cnn_jax.runs.sweep import open_study

    numbers = []
    for number in range(rounds):
        barrier.wait(60)
        study = open_study(folder / str(number))
        if barrier.wait(60) == 0:
            study.enqueue_trial({"waits": 1})
        barrier.wait(60)
        numbers.append(study.ask().number)
    return numbers


@pytest.mark.slow
def test_two_processes_begin_a_study_at_once_and_never_take_the_same_waiting_trial(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(2, mp_context=spawn) as pool:
        barrier = manager.Barrier(2)
        asked = [pool.submit(begin_and_ask, tmp_path, 20, barrier) for _ in range(2)]
        assert [set(numbers) for numbers in zip(*(each.result() for each in asked), strict=True)] == [{0, 1}] * 20


@pytest.mark.slow
def test_several_processes_share_a_study_and_a_stopped_trial_is_taken_up_again(program, arguments, tmp_path):
    arguments = ["-m", "cnn_jax", "sweep", "--trials", 4, "--recipe", "tutorial", "--batch-size", 50, *arguments]
    arguments[arguments.index("--epochs") + 1] = 4
    first = program(*arguments)
    deadline = time.monotonic() + 60
    while not (tmp_path / "sweep" / "trial-0" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    others = [program(*arguments, env=os.environ) for _ in range(2)]
    for process in others:
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
    trials = study_of(tmp_path).trials
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) in (4, 5)
    assert trials[0].state == TrialState.FAIL
    again = [trial for trial in trials if trial.system_attrs.get("failed_trial") == 0]
    assert [trial.params for trial in again] == [trials[0].params]
