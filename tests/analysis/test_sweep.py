"""A sweep tries settings, scores them on held-out images, and goes on where it was stopped."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import time
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.restore import restore_run
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runtime.errors import StorageError
from tests.helpers import assert_same_bits, write_idx

pytestmark = pytest.mark.optax_promotes


@pytest.fixture
def arguments(small_mnist, tmp_path):
    return ["--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--epochs", 1, "--validation", 300]


# What `begun` is begun with, and what continues it.
CHOICES = {"features": ["4x8", "8x16"], "recipe": ["tutorial"], "batch_size": [50, 100]}
SAME = ["--trials", 1, "--features", 4, 8, 8, 16, "--recipe", "tutorial", "--batch-size", 50, 100]


@pytest.fixture(scope="session")
def small_data(small_mnist):
    """The SHA-256 of the small set."""
    from cnn_jax.data.loading import load_dataset

    return load_dataset("mnist", small_mnist, None).sha256


@pytest.fixture
def begin(small_mnist, small_data, tmp_path):
    """Begin the study `sweep` of those arguments, or of other settings, and return it."""
    from cnn_jax.analysis.sweep import SearchSpace, open_study

    shared = TrainSettings(epochs=1, validation=300, dataset_dir=small_mnist, checkpoint_dir=tmp_path / "sweep")
    space = SearchSpace({"learning_rate": (0.0003, 0.03)}, (50, 100), ((4, 8), (8, 16)), ("tutorial",))

    def begin(**changes):
        with pytest.warns(optuna.exceptions.ExperimentalWarning):
            return open_study(space, dataclasses.replace(shared, **changes), small_data)

    return begin


BEGUN = {}  # the files of a study that was begun once


@pytest.fixture
def begun(begin, tmp_path):
    """The folder of a study with one trial."""
    if not BEGUN:
        begin().add_trial(trial_of())
        BEGUN.update((file.name, file.read_bytes()) for file in (tmp_path / "sweep").iterdir())
    (tmp_path / "sweep").mkdir(exist_ok=True)
    for name, content in BEGUN.items():
        (tmp_path / "sweep" / name).write_bytes(content)
    return tmp_path / "sweep"


@pytest.fixture
def nothing_starts(monkeypatch):
    """Fail where a command goes on to start the devices and load the data."""
    from cnn_jax.analysis import sweep

    monkeypatch.setattr(sweep, "start_devices", pytest.fail)


@pytest.fixture(autouse=True)
def plots(request, monkeypatch):
    """Draw nothing but where the figures are the claim: they take longer than the trials."""
    if "draws" not in request.node.name:
        monkeypatch.setattr("cnn_jax.analysis.sweep.draw_study", lambda study: iter(()))


def trial_of(score=0.9, **more):
    distributions = {name: CategoricalDistribution(values) for name, values in CHOICES.items()}
    distributions["learning_rate"] = FloatDistribution(0.0003, 0.03, log=True)
    params = {name: values[0] for name, values in CHOICES.items()} | {"learning_rate": 0.001}
    return create_trial(value=score, params=params, distributions=distributions, **more)


def edit(folder, *statements):
    with contextlib.closing(sqlite3.connect(folder / "study.db")) as connection, connection:
        for statement, *values in statements:
            assert connection.execute(statement, values).rowcount


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def assert_one_line(err, *words):
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert str(word) in line


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


@pytest.mark.slow
def test_a_trial_is_compared_with_its_run(command, arguments, tmp_path):
    same = ["--trials", 1, "--features", 4, 8, "--recipe", "tutorial", "--batch-size", 100, *arguments]
    assert command("sweep", *same)[0] == 0
    database = (tmp_path / "sweep" / "study.db").read_bytes()
    for damage, name in ((edited("trial_values", "value", 0.99), "score"), (with_the_rate(0.0005), "learning_rate")):
        damage(tmp_path / "sweep")
        code, _, err = command("sweep", *same)
        assert code == 65
        assert_one_line(err, tmp_path / "sweep" / "study.db", f"trial 0 has the {name}", tmp_path / "sweep" / "trial-0")
        (tmp_path / "sweep" / "study.db").write_bytes(database)
    shutil.rmtree(tmp_path / "sweep" / "trial-0")  # nothing is left to compare with
    assert command("sweep", *same)[0] == 0


@pytest.mark.parametrize("together", [0, -1, 2])
def test_as_many_trials_train_together_as_there_are(command, arguments, nothing_starts, tmp_path, together):
    code, _, err = command("sweep", *SAME, *arguments, "--together", together)
    assert code == 2
    assert_one_line(err, f"--together {together}", "at most --trials 1" if together > 0 else "at least 1")
    assert list(tmp_path.iterdir()) == []


def enqueue(study, *rates):
    for rate in rates:
        study.enqueue_trial({"features": "4x8", "recipe": "tutorial", "batch_size": 50, "learning_rate": rate})


def assert_trained_alone(command, arguments, run, learning_rate):
    """A trial's epochs and weights have the bits of a training with its settings."""
    alone = run.with_name("alone")
    code, _, err = command(
        "train", *arguments, "--features", 4, 8, "--batch-size", 50, "--learning-rate", repr(learning_rate),
        "--checkpoint-dir", alone.parent, "--run-name", "alone", "--fresh",
    )  # fmt: skip
    assert code == 0, err
    of_trial, of_training = RunFolder(run).read_metrics(), RunFolder(alone).read_metrics()
    for name in ("epoch", "step", "cost", "accuracy", "loss", "tested_on"):
        assert [getattr(line, name) for line in of_trial] == [getattr(line, name) for line in of_training]
    assert_same_bits(*(restore_run(RunFolder(folder), None, pytest.fail).states for folder in (run, alone)))


def test_trials_that_train_together_end_as_each_does_alone(command, arguments, begin, tmp_path, without_report):
    enqueue(begin(epochs=2, seeds=2), 0.002, 0.02)
    arguments += ["--epochs", 2, "--seeds", 2]
    code, _, err = command("sweep", *SAME, *arguments, "--trials", 2, "--together", 2)
    assert code == 0, err
    assert "trials 0, 1: training together" in err
    for trial, rate in zip(study_of(tmp_path).trials, (0.002, 0.02), strict=True):
        assert (trial.state, trial.params["learning_rate"]) == (TrialState.COMPLETE, rate)
        assert list(trial.intermediate_values) == [1, 2]
        assert trial.intermediate_values[2] == trial.value
        assert_trained_alone(command, arguments, tmp_path / "sweep" / f"trial-{trial.number}", rate)


def test_a_study_searches_the_recipes_arguments_too(command, arguments, tmp_path, without_report):
    same = ["--features", 4, 8, "--recipe", "accurate", "--batch-size", 100, *arguments, "--trials", 2, "--together", 2]
    ranges = ["--hyperparameters", "weight_decay=0.01:0.5", "smoothing=0:0.1"]
    code, _, err = command("sweep", *same, *ranges)
    assert code == 0, err
    assert "trials 0, 1: training together" in err
    for trial in study_of(tmp_path).trials:
        settings = RunFolder(tmp_path / "sweep" / f"trial-{trial.number}").read_settings()
        found = {name: trial.params[name] for name in ("learning_rate", "weight_decay", "smoothing")}
        assert settings.recipe_arguments == found
        assert 0.01 <= found["weight_decay"] <= 0.5
        assert 0 <= found["smoothing"] <= 0.1
        assert trial.distributions["weight_decay"].log
        assert not trial.distributions["smoothing"].log
    before = files_of(tmp_path / "sweep")
    code, _, err = command("sweep", *same, "--hyperparameters", "weight_decay=0.01:0.5")
    assert code == 2
    assert_one_line(err, "hyperparameters was smoothing weight_decay and is weight_decay")
    assert files_of(tmp_path / "sweep") == before
    assert command("sweep", *same, "--hyperparameters", "weight_decay=0.1:0.2", "smoothing=0:0.1")[0] == 0
    code, _, err = command("sweep", *same, "--hyperparameters", "weight_decay=0.1:0.2", "smoothing=0.01:0.1")
    assert code == 2
    assert_one_line(err, "smoothing: the study has searched it on a linear scale; give a range that begins at 0, or")


def test_arguments_that_a_recipe_does_not_take_are_refused_before_there_is_a_trial(command, arguments, tmp_path):
    code, _, err = command("sweep", *SAME, *arguments, "--recipe", "fast", "--hyperparameters", "weight_decay=0:1")
    assert code == 2
    assert_one_line(err, "--hyperparameters weight_decay: it must be one of momentum, smoothing, which fast takes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_trials_of_other_shapes_do_not_train_together(command, arguments, begin, tmp_path):
    study = begin()
    enqueue(study, 0.001)
    study.enqueue_trial({"features": "8x16", "recipe": "tutorial", "batch_size": 100, "learning_rate": 0.002})
    code, _, err = command("sweep", *SAME, *arguments, "--trials", 3, "--together", 3)
    assert code == 0, err
    assert "trials 0, 2: training together" in err
    trials = study_of(tmp_path).trials
    assert [trial.params["features"] for trial in trials] == ["4x8", "8x16", "4x8"]


def test_what_every_trial_would_refuse_begins_no_study(command, arguments, tmp_path):
    (tmp_path / "idea.py").write_text("Idea = 3")
    for wrong, told in (
        (["--features", 10**6, 10**6], "training needs more than"),
        (["--model", tmp_path / "idea.py:Idea"], "it must be a class that inherits from"),
    ):
        code, _, err = command("sweep", *SAME[:2], *arguments, "--batch-size", 50, *wrong)
        assert code == 2
        assert told in err.splitlines()[-1]
        assert not (tmp_path / "sweep" / "study.db").exists()


@pytest.mark.slow(seconds=10)
def test_a_signal_after_a_trials_last_step_ends_the_sweep_which_goes_on_with_what_was_trained(
    command, arguments, tmp_path, monkeypatch, without_report
):
    from cnn_jax.runs import train

    evaluate = train.evaluate_seeds

    def interrupted(*of):
        monkeypatch.setattr(train, "evaluate_seeds", evaluate)
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*of)

    monkeypatch.setattr(train, "evaluate_seeds", interrupted)
    sweep = ["sweep", *SAME, *arguments, "--trials", 2]
    code, _, err = command(*sweep)
    assert code == 128 + signal.SIGTERM
    assert re.match(r"stopped by SIGTERM after step (\d+) of \1, which is saved", err.splitlines()[-1])
    assert [trial.state for trial in study_of(tmp_path).trials] == [TrialState.FAIL, TrialState.WAITING]
    assert command(*sweep)[0] == 0
    assert [trial.state for trial in study_of(tmp_path).trials][1:] == [TrialState.COMPLETE] * 2


@pytest.mark.slow(seconds=20)
def test_a_killed_sweep_goes_on_with_all_trials_that_trained_together(
    command, program, arguments, begin, tmp_path, without_report
):
    enqueue(begin(epochs=8), 0.002, 0.02)
    arguments += ["--epochs", 8]
    sweep = ["sweep", *SAME, *arguments, "--trials", 2, "--together", 2]
    process = program("-m", "cnn_jax", *sweep)
    deadline = time.monotonic() + 100
    runs = [RunFolder(tmp_path / "sweep" / f"trial-{number}") for number in (0, 1)]
    while len(runs[1].read_metrics()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    begun = [run.read_metrics() for run in runs]
    assert all(2 <= len(epochs) < 8 for epochs in begun)
    edit(tmp_path / "sweep", ["UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-1 hour')"])
    code, _, err = command(*sweep)
    assert code == 0, err
    assert "trials 2, 3: training together" in err
    trials = study_of(tmp_path).trials
    assert [trial.state for trial in trials] == [TrialState.FAIL] * 2 + [TrialState.COMPLETE] * 2
    assert not (tmp_path / "sweep" / "trial-2").exists()
    for run, epochs, rate in zip(runs, begun, (0.002, 0.02), strict=True):
        # With the times that were measured; of the last epoch, perhaps nothing but this line was written.
        assert run.read_metrics()[: len(epochs) - 1] == epochs[:-1]
        assert_trained_alone(command, arguments, run.path, rate)


@pytest.mark.slow(seconds=20)
def test_a_trial_that_will_not_win_ends_early_and_better_ones_do_not(command, arguments, begin, tmp_path):
    enqueue(begin(epochs=2), 0.02, 0.019, 0.00001, 0.018)
    arguments += ["--epochs", 2, "--trials", 4, "--together", 4]
    for _ in range(2):  # what is done is read back as it was told
        code, _, err = command("sweep", *SAME, *arguments)
        assert code == 0, err
        trials = study_of(tmp_path).trials
        states = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
        assert [trial.state for trial in trials] == states
        assert re.search(rf"trial 2: {trials[2].value:.4f} │ ended early; ", err)
    runs = [RunFolder(tmp_path / "sweep" / f"trial-{number}").read_metrics() for number in range(4)]
    assert [len(epochs) for epochs in runs] == [2, 2, 1, 2]
    assert [trial.value for trial in trials] == [epochs[-1].accuracy[0] for epochs in runs]
    edit(tmp_path / "sweep", ["UPDATE trial_values SET value = 0.5 WHERE trial_id = 3"])
    assert_one_line(command("sweep", *SAME, *arguments)[2], "trial 2 has the score 0.5")


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("hopeless", [(0.00001,), (0.00001, 0.00002)], ids=["kept in its place", "compiled anew"])
def test_at_once_as_on_a_gpu_trials_end_as_in_turn(
    command, arguments, begin, trained_run, tmp_path, monkeypatch, hopeless
):
    """The first diverges; the hopeless end early, and leave the program with it once they are half of it."""
    from cnn_jax.runs import train

    compiled, compile_group = [], train._compile_group
    monkeypatch.setattr(train, "trains_at_once", lambda member, sizes: True)
    monkeypatch.setattr(train, "_compile_group", lambda *of: compiled.append(len(of[0])) or compile_group(*of))
    enqueue(begin(epochs=2), 1e30, 0.02, *hopeless, 0.019, 0.018)
    arguments += ["--epochs", 2]
    count = 4 + len(hopeless)
    code, _, err = command("sweep", *SAME, *arguments, "--trials", count, "--together", count)
    assert code == 0, err
    assert compiled == ([5] if count == 5 else [6, 3])
    runs = [RunFolder(tmp_path / "sweep" / f"trial-{number}") for number in range(count)]
    assert [len(run.read_metrics()) for run in runs] == [0, 2, *(1 for _ in hopeless), 2, 2]
    states = [trial.state for trial in study_of(tmp_path).trials]
    assert states == [TrialState.COMPLETE if len(run.read_metrics()) == 2 else TrialState.PRUNED for run in runs]
    monkeypatch.undo()
    for run, rate in ((runs[1], 0.02), (runs[-1], 0.018)):
        as_alone = ("--features", 4, 8, "--batch-size", 50, "--validation", 300, "--learning-rate", rate)
        alone = RunFolder(trained_run(*as_alone, epochs=2, reported=False))
        for line, of_training in zip(run.read_metrics(), alone.read_metrics(), strict=True):
            assert line.cost == pytest.approx(of_training.cost, rel=1e-3)
            assert line.accuracy == pytest.approx(of_training.accuracy, abs=0.02)


def test_a_trial_ends_early_only_where_its_seeds_leave_no_doubt():
    from cnn_jax.analysis.sweep import SeedsPruner, highest

    def study_with(accuracies, *peers, recipe="tutorial", state=TrialState.RUNNING):
        study = optuna.create_study(direction="maximize", pruner=SeedsPruner())
        distributions = {"recipe": CategoricalDistribution(("tutorial", "fast"))}
        for peer in peers:
            values = {"params": {"recipe": recipe}, "distributions": distributions, "intermediate_values": {1: peer}}
            study.add_trial(create_trial(state=state, **values))
        study.enqueue_trial({"recipe": "tutorial"})
        trial = study.ask()
        trial.suggest_categorical("recipe", ["tutorial", "fast"])
        trial.report(float(np.mean(accuracies)), 1)
        trial.set_user_attr("highest", highest(accuracies, 5000))
        return trial.should_prune()

    assert study_with([0.95], 0.97, 0.98, 0.97)
    assert not study_with([0.967], 0.97, 0.98, 0.97)  # of 5,000 images, that is chance
    assert not study_with([0.95], 0.97, 0.98)
    assert not study_with([0.95], 0.97, 0.98, 0.97, recipe="fast")
    assert not study_with([0.95], 0.97, 0.98, 0.97, state=TrialState.FAIL)
    assert study_with([0.959, 0.96, 0.961], 0.97, 0.98, 0.97)
    assert not study_with([0.94, 0.96, 0.98], 0.97, 0.98, 0.97)  # its seeds disagree


def test_a_trial_whose_loss_is_not_finite_leaves_the_others_alone(command, arguments, begin, tmp_path):
    enqueue(begin(epochs=2), 1e30, 0.01)
    code, _, err = command("sweep", *SAME, *arguments, "--epochs", 2, "--trials", 2, "--together", 2)
    assert code == 0, err
    assert "trial 0: the loss is not finite" in err
    assert [trial.state for trial in study_of(tmp_path).trials] == [TrialState.PRUNED, TrialState.COMPLETE]
    assert len(RunFolder(tmp_path / "sweep" / "trial-1").read_metrics()) == 2


def test_a_trial_whose_loss_is_not_finite_scores_nothing(command, arguments, tmp_path):
    code, _, err = command(
        "sweep", "--trials", 1, "--learning-rate", 1e29, 1e30, "--recipe", "tutorial", "--features", 4, 8, *arguments
    )
    assert code == 0
    assert "the loss is not finite" in err
    assert [trial.state for trial in study_of(tmp_path).trials] == [TrialState.PRUNED]


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (["--epochs", 2], "epochs was 1 and is 2"),
        (["--validation", 301], "validation was 300 and is 301"),
        (["--seed", 1], "seed was 777 and is 1"),
        (["--seeds", 2], "seeds was 1 and is 2"),
        (["--features", 4, 8], "features was 4x8 8x16 and is 4x8"),
        (["--batch-size", 50, 100, 200], "batch_size was 50 100 and is 50 100 200"),
        (["--recipe", "fast"], "recipe was tutorial and is fast"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_study_refuses_other_settings_and_names_them(command, arguments, begun, nothing_starts, changed, difference):
    before = files_of(begun)
    code, _, err = command("sweep", *SAME, *arguments, *changed)
    assert code == 2
    assert_one_line(err, begun, difference, "another --study")
    assert files_of(begun) == before


def test_a_study_goes_on_with_the_same_data_in_another_folder_and_refuses_others(
    command, arguments, begun, small_mnist, tmp_path
):
    shutil.copytree(small_mnist, tmp_path / "copy")
    assert command("sweep", *SAME, *arguments, "--dataset-dir", tmp_path / "copy", "--trials", 1)[0] == 0
    write_idx(tmp_path / "copy" / "t10k-labels-idx1-ubyte.xz", np.zeros(260, np.uint8))
    code, _, err = command("sweep", *SAME, *arguments, "--dataset-dir", tmp_path / "copy")
    assert code == 2
    assert_one_line(err, f"dataset_dir was {small_mnist} and is {tmp_path / 'copy'}")


def test_a_study_refuses_data_that_have_changed(command, arguments, begin, small_mnist, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small_mnist, data)
    begin(dataset_dir=data)
    labels = data / "t10k-labels-idx1-ubyte.xz"
    write_idx(labels, np.zeros(260, np.uint8))
    code, _, err = command("sweep", *SAME, *arguments, "--dataset-dir", data)
    assert code == 65
    assert_one_line(err, data, tmp_path / "sweep", "bring them back")
    assert study_of(tmp_path).trials == []


def test_the_learning_rates_may_change_and_a_trial_that_is_taken_up_keeps_its_own(command, arguments, begun, tmp_path):
    params = {"features": "4x8", "recipe": "tutorial", "batch_size": 100, "learning_rate": 0.02}
    study_of(tmp_path).enqueue_trial(params)
    code, _, err = command("sweep", *SAME, *arguments, "--learning-rate", 0.0001, 0.001, "--trials", 2)
    assert code == 0, err
    assert "out of range" not in err
    assert study_of(tmp_path).trials[1].params == params
    assert command("sweep", *SAME, *arguments, "--trials", 2)[0] == 0


@pytest.mark.parametrize("name", ["a?b", "a#b", "50%41", "a b", "a:b", "{x}", "é", "file:x", "q?mode=memory"])
def test_a_study_is_in_its_folder_whatever_the_path(name, begin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(OSError):  # not every system takes every name
        (tmp_path / name).mkdir()
    if not (tmp_path / name).exists():
        pytest.skip("this system has no such names")
    for trials in (0, 1):
        study = begin(checkpoint_dir=tmp_path / name / "sweep")
        assert len(study.trials) == trials
        study.add_trial(trial_of())
    assert {path.name for path in (tmp_path / name / "sweep").iterdir()} == {"lock", "study.db"}
    assert os.listdir(tmp_path) == [name]
    content = (tmp_path / name / "sweep" / "study.db").read_bytes()
    assert content.startswith(b"SQLite format 3")


def test_a_study_whose_beginning_was_killed_is_begun_anew(begin, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "study.db.new").write_bytes(b"SQLite format 3, cut off")
    assert begin().user_attrs["settings"]["epochs"] == 1
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"lock", "study.db"}


def write(content):
    return lambda folder: (folder / "study.db").write_bytes(content)


def cut(folder):
    os.truncate(folder / "study.db", (folder / "study.db").stat().st_size // 2)


def scramble(folder):
    content = bytearray((folder / "study.db").read_bytes())
    content[4096 * 3 : 4096 * 12] = bytes(range(256)) * 144
    (folder / "study.db").write_bytes(content)


def belong_to_another_program(folder):
    (folder / "study.db").unlink()
    with contextlib.closing(sqlite3.connect(folder / "study.db")) as connection, connection:
        connection.execute("CREATE TABLE songs (title TEXT)")


def be_a_folder(folder):
    (folder / "study.db").unlink()
    (folder / "study.db").mkdir()


def be_a_dangling_link(folder):
    (folder / "study.db").rename(folder / "elsewhere")
    (folder / "study.db").symlink_to(folder / "nowhere")


def be_a_link_to_itself(folder):
    (folder / "study.db").unlink()
    (folder / "study.db").symlink_to("study.db")


def hold_no_study(folder):
    edit(folder, ["PRAGMA foreign_keys = OFF"], ["DELETE FROM studies"])


def be_another_folders(folder):
    edit(folder, ["UPDATE studies SET study_name = 'other'"])


def break_an_index(folder):
    page = "(SELECT rootpage FROM sqlite_master WHERE name = 'studies')"
    index = "sqlite_autoindex_trial_heartbeats_1"  # not read before the first trial
    edit(
        folder,
        ["PRAGMA writable_schema = ON"],
        [f"UPDATE sqlite_master SET rootpage = {page} WHERE name = '{index}'"],
    )


def edited(table, column, value):
    return lambda folder: edit(folder, [f"UPDATE {table} SET {column} = ?", value])


def with_the_rate(value):
    return lambda folder: edit(
        folder, ["UPDATE trial_params SET param_value = ? WHERE param_name = 'learning_rate'", value]
    )


def with_a_lost_trial(folder):
    edit(folder, ["UPDATE trials SET state = 'RUNNING'"])
    edit(folder, ["INSERT INTO trial_heartbeats (trial_id, heartbeat) SELECT trial_id, 'now and then' FROM trials"])


def without_the_rate(folder):
    edit(folder, ["DELETE FROM trial_params WHERE param_name = 'learning_rate'"])


@pytest.mark.parametrize(
    ("damage", "code", "word"),
    [
        (write(b""), 65, "no such table"),
        (write(b"not a database" * 1000), 65, "not a database"),
        (cut, 65, "malformed"),
        (scramble, 65, ""),
        (break_an_index, 65, ""),
        (belong_to_another_program, 65, "no such table"),
        (be_another_folders, 65, "holds the study other, not sweep"),
        (hold_no_study, 65, "holds no study; bring"),
        (be_a_folder, 4, "it is a folder"),
        (be_a_link_to_itself, 4, "levels of symbolic links"),
        (be_a_dangling_link, 4, "unable to open"),
        (edited("alembic_version", "version_num", "v99.0.0.a"), 65, "another version of Optuna"),
        (edited("alembic_version", "version_num", "v0.9.0.a"), 65, "another version of Optuna"),
        (edited("study_directions", "direction", "MINIMIZE"), 65, "maximize"),
        (edited("study_directions", "direction", "UPWARDS"), 65, "UPWARDS"),
        (edited("studies", "study_name", b"\xff\xfe"), 65, ""),
        (edited("study_user_attributes", "value_json", "{"), 65, ""),
        (edited("study_user_attributes", "value_json", "[]"), 65, "edited"),
        (edited("trials", "state", "PERHAPS"), 65, "PERHAPS"),
        (edited("trials", "datetime_start", "yesterday"), 65, "yesterday"),
        (edited("trial_values", "value", 7.0), 65, "the score 7.0"),
        (edited("trial_values", "value", "high"), 65, ""),
        (edited("trial_params", "distribution_json", "{}"), 65, ""),
        (edited("trial_params", "param_value", 99), 65, ""),
        (edited("trial_params", "param_name", None), 65, ""),
        (with_the_rate("x"), 65, "the learning_rate x"),
        (with_the_rate(99.0), 65, "the learning_rate 99.0"),
        (without_the_rate, 65, "does not record learning_rate"),
        (with_a_lost_trial, 65, "now and then"),
        (lambda folder: edit(folder, ["DELETE FROM trial_values"]), 65, "trial 0 has no score"),
        (edited("trials", "number", None), 65, "no trial 0"),
        (edited("trials", "number", 7), 65, "no trial 0"),
    ],
)
def test_a_study_that_cannot_be_used_is_named_and_left_as_it_is(command, arguments, begun, damage, code, word):
    damage(begun)
    before = files_of(begun)
    ended, _, err = command("sweep", *SAME, *arguments, "--trials", 2)
    assert_one_line(err, begun / "study.db", word, "another --")
    assert not re.search(r"\w(Error|Exception)\b|index out of range|line 1 column", err)  # Python's words
    assert ended == code
    assert files_of(begun) == before


@pytest.mark.parametrize(
    ("reason", "code", "remedy"),
    [
        ("database or disk is full", sqlite3.SQLITE_FULL, "see to the disk"),
        ("disk I/O error", sqlite3.SQLITE_IOERR_WRITE, "allow larger files (ulimit -f)"),
    ],
)
def test_a_study_that_cannot_be_written_leaves_nothing_of_itself(reason, code, remedy, begin, tmp_path, monkeypatch):
    failure = sqlite3.OperationalError(reason)
    failure.sqlite_errorcode = code
    monkeypatch.setattr(optuna, "create_study", mock.Mock(side_effect=failure))
    monkeypatch.setattr("cnn_jax.analysis.sweep.resource.getrlimit", lambda _: (10_000_000, 10_000_000))
    with pytest.raises(StorageError, match=re.escape(f"({reason}); {remedy}")):
        begin()
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["lock"]


def test_what_is_in_the_way_of_a_trial_is_told_with_what_a_sweep_can_change(command, arguments, begun):
    (begun / "trial-1").write_text("in the way")
    code, _, err = command("sweep", *SAME, *arguments, "--trials", 2)
    assert code == 4
    assert_one_line(err.splitlines()[-1], begun / "trial-1", "give another --checkpoint-dir or --study")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "two"), ("epochs", True), ("epochs", -1), ("epochs", float("nan")), ("seed", 1.5), ("seeds", 0),
        ("validation", None), ("dataset", 5), ("dataset_dir", []), ("precision", "float8"), ("features", "4x8"),
        ("features", ["4"]), ("batch_size", []), ("batch_size", [0]), ("recipe", ["slow!"]), ("recipe", [["fast"]]),
        ("data", "0" * 63), ("seed", 2**32), ("colour", "red"),
    ],
)  # fmt: skip
def test_recorded_settings_that_are_none_are_damage(command, arguments, begun, name, value):
    settings = study_of(begun.parent).user_attrs["settings"] | {name: value}
    edit(begun, ["UPDATE study_user_attributes SET value_json = ?", json.dumps(settings)])
    code, _, err = command("sweep", *SAME, *arguments)
    assert code == 65
    assert_one_line(err, begun / "study.db", "edited")


@pytest.mark.parametrize(
    "trial",
    [
        create_trial(value=0.5, params={"width": 3}, distributions={"width": CategoricalDistribution((3, 4))}),
        trial_of(system_attrs={"failed_trial": "../../elsewhere"}),
        trial_of(system_attrs={"failed_trial": 7}),
    ],
)
def test_a_trial_of_another_program_is_damage(command, arguments, begun, trial):
    study_of(begun.parent).add_trial(trial)
    code, _, err = command("sweep", *SAME, *arguments)
    assert code == 65
    assert_one_line(err, begun / "study.db")


def test_a_study_that_cannot_be_written_is_named_before_anything_starts(
    command, arguments, begun, nothing_starts, tmp_path, monkeypatch
):
    connect = sqlite3.connect
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda name, **how: connect(name.replace("mode=rw", "mode=ro"), **how))
        code, _, err = command("sweep", *SAME, *arguments, "--trials", 2)
    assert code == 4, err
    assert_one_line(err, begun / "study.db", "readonly", "another --checkpoint-dir")
    assert len(study_of(tmp_path).trials) == 1


def test_a_study_that_is_damaged_while_a_trial_runs_is_named(command, arguments, begun, monkeypatch):
    from cnn_jax.analysis import sweep

    def score(*_):
        write(b"overwritten" * 1000)(begun)
        time.sleep(1.5)  # until the next heartbeat
        return 0.5

    monkeypatch.setattr(sweep, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(sweep, "_score", score)
    code, _, err = command("sweep", *SAME, *arguments, "--trials", 2)
    assert code == 65, err
    assert_one_line(err, begun / "study.db")


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/tmp/x", ".hidden", "-x", "a\0b", "a\nb", "x" * 256])
def test_a_study_is_named_as_a_folder(command, arguments, tmp_path, name):
    code, _, err = command("sweep", *SAME, *arguments, f"--study={name}")
    assert code == 2
    assert_one_line(err, "--study", "it must be")
    assert list(tmp_path.iterdir()) == []


def test_a_study_is_not_begun_in_a_runs_folder(command, arguments, tmp_path):
    run = RunFolder(tmp_path / "sweep")
    run.path.mkdir()
    run.write_settings(TrainSettings())
    code, _, err = command("sweep", *SAME, *arguments)
    assert code == 2
    assert_one_line(err, f"{run.path} is a run, not a study")
    assert [path.name for path in run.path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("lost", [False, True])
def test_a_study_does_not_go_on_with_the_runs_of_another_one(command, arguments, begun, lost):
    if lost:
        (begun / "study.db").unlink()
    (begun / "trial-1").mkdir()
    RunFolder(begun / "trial-1").write_settings(TrainSettings())
    before = files_of(begun)
    code, _, err = command("sweep", *SAME, *arguments, "--trials", 2)
    assert code == 2
    assert_one_line(err, begun, "trial-1", "study.db")
    assert files_of(begun) == before


@pytest.mark.parametrize(
    ("changed", "code", "word"),
    [
        (["--validation", 1030], 2, "--validation 1030"),
        (["--validation", 1000], 2, "--batch-size 100"),
        (["--dataset-dir", "nowhere"], 2, "nowhere"),
        (["--dataset-dir", "tiny"], 2, "2x2"),
        (["--dataset-dir", "damaged"], 65, "train-images"),
    ],
)
def test_what_every_trial_would_refuse_is_refused_before_a_study_is_begun(
    command, arguments, small_mnist, tmp_path, monkeypatch, changed, code, word
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_mnist, "damaged")
    os.truncate("damaged/train-images-idx3-ubyte", 500_000)
    shutil.copytree(small_mnist, "tiny")
    write_idx(tmp_path / "tiny" / "train-images-idx3-ubyte", np.zeros((1030, 2, 2), np.uint8))
    write_idx(tmp_path / "tiny" / "t10k-images-idx3-ubyte", np.zeros((260, 2, 2), np.uint8))
    ended, _, err = command("sweep", *SAME, *arguments, *changed)
    assert ended == code
    assert_one_line(err, word)
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def earlier(begun, small_mnist):
    """Make `begun` a study of version 0.1.0, which recorded no settings, with a run of these epochs for each trial."""

    def make(*epochs):
        edit(begun, ["DELETE FROM study_user_attributes"])
        for number, value in enumerate(epochs):
            run = RunFolder(begun / f"trial-{number}")
            run.path.mkdir()
            run.write_settings(TrainSettings(epochs=value, validation=300, dataset_dir=small_mnist))
        for _ in epochs[1:]:
            study_of(begun.parent).add_trial(trial_of())
        return begun

    return make


def test_a_study_of_an_earlier_version_goes_on_and_then_knows_its_settings(command, arguments, earlier, begin):
    folder = earlier(1)
    code, _, err = command("sweep", *SAME, *arguments)
    assert code == 0, err
    assumed = "does not record its settings, as one of version 0.1.0: those of its runs and the present data are taken"
    assert " ".join(err.split()).count(assumed) == 1
    assert (
        study_of(folder.parent).user_attrs["settings"]
        == begin(checkpoint_dir=folder.parent / "new").user_attrs["settings"]
    )


@pytest.mark.parametrize(
    ("epochs", "changed", "code", "word"),
    [
        ([2], [], 2, "epochs was 2 and is 1"),
        ([1], ["--seed", 1], 2, "seed was 777 and is 1"),
        ([1], ["--batch-size", 50], 2, "batch_size was 50 100 and is 50"),
        ([1, 2], [], 65, "different settings"),
        ([], [], 65, "does not record its settings"),
    ],
)
def test_a_study_of_an_earlier_version_refuses_what_its_runs_were_not_trained_with(
    command, arguments, earlier, epochs, changed, code, word
):
    folder = earlier(*epochs)
    before = files_of(folder)
    ended, _, err = command("sweep", *SAME, *arguments, *changed)
    assert ended == code
    assert_one_line(err, folder, word)
    assert files_of(folder) == before


def test_a_run_of_an_earlier_study_that_cannot_be_understood_is_named(command, arguments, earlier):
    config = earlier(1) / "trial-0" / "config.json"
    config.write_text("{")
    code, _, err = command("sweep", *SAME, *arguments)
    assert code == 65
    assert_one_line(err, config, "another --study")


def begin_and_ask(folder, rounds, barrier):
    """Begin studies when the other process does, and return the number of the trial that each then gives."""
    from cnn_jax.analysis.sweep import SearchSpace, open_study

    space = SearchSpace({"learning_rate": (0.001, 0.01)}, (100,), ((4, 8),), ("tutorial",))
    numbers = []
    for number in range(rounds):
        barrier.wait(60)
        study = open_study(space, TrainSettings(validation=300, checkpoint_dir=folder / str(number)), "0" * 64)
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
    arguments = [
        "-m", "cnn_jax", "sweep", "--trials", 3, "--recipe", "tutorial", "--batch-size", 50, "--features", 8, 16,
        "--learning-rate", 0.003, 0.003, *arguments, "--epochs", 8,
    ]  # fmt: skip
    first = program(*arguments)
    deadline = time.monotonic() + 300
    while not (tmp_path / "sweep" / "trial-0" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=300)
    assert first.returncode == 130, err
    others = [program(*arguments, env=os.environ) for _ in range(2)]
    for process in others:
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
    trials = study_of(tmp_path).trials
    assert sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials) == 3
    assert trials[0].state == TrialState.FAIL
    again = [trial for trial in trials if trial.system_attrs.get("failed_trial") == 0]
    assert [trial.params for trial in again] == [trials[0].params]
