"""A run can be stopped, killed and continued and ends in the same bits; what it writes is what it did."""

import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import time
import traceback
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from cnn_jax.analysis import report
from cnn_jax.core import recipes
from cnn_jax.core.input_pipeline import Chunk
from cnn_jax.core.training import SeedEpoch
from cnn_jax.runs import program as program_module
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.program import Progress
from cnn_jax.runs.restore import load_run_data
from cnn_jax.runs.train import train_epoch, train_together
from cnn_jax.runtime.signals import StopRequest
from tests.fault_injection.runs import read_newest
from tests.helpers import TIMES, TRAIN, assert_same_run, damage_newest, metrics_of, wait_for_step

pytestmark = pytest.mark.optax_promotes

EPOCHS, STEPS_PER_EPOCH = 3, 10
# A network that trains in a seventh of the time; tests.fault_injection stops the tutorial's.
SMALL = ("--features", 4, 8)


@pytest.fixture
def train(command, small_mnist, tmp_path, monkeypatch):
    """Train on the small set, by the command, in a folder of the test's own, and draw nothing unless asked to."""

    def run(*options, epochs=EPOCHS, pictures=False):
        if not pictures:
            monkeypatch.setattr(report, "write_report", lambda *arguments: None)
        return command(
            "train", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run",
            "--epochs", epochs, *SMALL, *options,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def uninterrupted(trained_run):
    """The folder of a run that nothing interrupted."""
    return trained_run(*SMALL, epochs=EPOCHS, reported=False)


def test_a_run_prints_the_tutorials_lines_and_writes_its_settings_and_metrics(train, tmp_path):
    code, out, err = train("--features", 32, 64, epochs=2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (code, out) == (
        0,
        f"[Epoch:    1] cost = {lines[0]['cost']:>.9}\n"
        f"[Epoch:    2] cost = {lines[1]['cost']:>.9}\n"
        f"Accuracy: {lines[1]['test_accuracy']:.4f}\n",
    )
    assert [list(line) for line in lines] == [["epoch", "step", "cost", "test_accuracy", "test_loss", *TIMES]] * 2
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 10), (2, 20)]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 2
    for part in ("1,030 training and 260 test images", "50,186 parameters", "loading", "compiling", "written to"):
        assert part in err
    # The cost is the mean of the epoch's batch losses, which the checkpoint at its end still holds.
    losses = read_newest(tmp_path / "run" / "steps")["['losses']"].astype(np.float64)
    assert lines[1]["cost"] == pytest.approx(losses.mean(), rel=1e-6)


def test_what_was_measured_is_shown_also_where_the_report_fails(train, monkeypatch):
    def fail(*arguments):
        raise ImportError("no backend", name="matplotlib")

    monkeypatch.setattr(report, "write_report", fail)
    code, out, err = train(epochs=0.1, pictures=True)
    assert (code, out.count("Accuracy: ")) == (2, 1)
    assert "training" in err
    assert "written to" in err
    assert err.splitlines()[-1].startswith("error: cannot load matplotlib (no backend); ")


def test_a_run_resumed_from_an_epochs_end_equals_an_uninterrupted_run(train, tmp_path, uninterrupted):
    assert train(epochs=1)[0] == 0
    code, out, err = train()
    assert (code, out.count("[Epoch:")) == (0, EPOCHS)
    assert "continuing after step 10 of 30" in err
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_run_resumed_from_an_epochs_middle_equals_an_uninterrupted_run(train, tmp_path, uninterrupted):
    assert train("--checkpoint-every-steps", 7)[0] == 0
    # Going back to an older checkpoint is what a kill does.
    for step in ("28", "30"):
        shutil.rmtree(tmp_path / "run" / "steps" / step)
    code, out, err = train()
    assert (code, out.count("[Epoch:")) == (0, EPOCHS)
    assert "continuing after step 21 of 30" in err
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_killed_run_continues_to_the_same_bits(train, tmp_path, small_mnist, program, uninterrupted):
    process = program(
        "train.py", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run",
        "--epochs", EPOCHS, "--checkpoint-every-steps", 1, *SMALL,
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    code, out, err = train()
    assert (code, out.count("[Epoch:")) == (0, EPOCHS), err
    assert "continuing after step" in err
    assert "metrics.jsonl" not in err
    assert_same_run(tmp_path / "run", uninterrupted)


def test_the_seconds_of_steps_have_the_wait_for_their_images():
    def feed(epoch, first):
        for start in (0, 2):
            time.sleep(0.1)
            yield Chunk(SeedEpoch(np.zeros((1, 2, 1), np.int32)), np.zeros(0), np.zeros(0), start, start + 2)

    program = SimpleNamespace(
        steps_per_epoch=4,
        end_of_epoch=lambda step: 4,
        epoch=lambda number: None,
        platform=jax.devices()[0].platform,  # JAX starts here, not within the first segment
        run_steps=lambda states, *images_and_rows: (states, np.ones((1, 2), np.float32)),
    )
    progress = Progress(0, None, np.zeros((1, 4), np.float32))
    segments = list(train_epoch(program, feed, progress, StopRequest(), None))
    assert [segment.progress.step for segment in segments] == [2, 4]
    assert all(segment.seconds > 0.09 for segment in segments)


def test_a_run_that_is_halted_goes_on_to_the_same_bits(tmp_path, small_mnist, program, uninterrupted):
    process = program(
        *TRAIN, "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run",
        "--epochs", EPOCHS, "--checkpoint-every-steps", 1, *SMALL,
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 13)
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    halted = sorted((tmp_path / "run").rglob("*"))
    time.sleep(0.5)
    assert sorted((tmp_path / "run").rglob("*")) == halted
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out.count("[Epoch:")) == (0, EPOCHS), err
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_run_that_is_moved_while_it_trains_ends_with_4_and_goes_on_where_it_is(
    train, tmp_path, small_mnist, program, uninterrupted
):
    process = program(
        *TRAIN, "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "begun",
        "--epochs", EPOCHS, "--checkpoint-every-steps", 1, *SMALL,
    )  # fmt: skip
    wait_for_step(tmp_path / "begun", 5)
    (tmp_path / "begun").rename(tmp_path / "run")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 4, err
    assert (
        " is gone or another: its folder was moved, removed or replaced while it was in use; " in err.splitlines()[-1]
    )
    assert not (tmp_path / "begun").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for name in ("run", "copy"):
        code, _, err = train("--run-name", name)
        assert (code, "continuing after step" in err) == (0, True), err
        assert_same_run(tmp_path / name, uninterrupted)


@pytest.mark.usefixtures("hangups_heard")
@pytest.mark.parametrize(
    ("number", "exit_code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        pytest.param(signal.SIGXCPU, 152, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_a_run_after_saving(number, exit_code, tmp_path, small_mnist, program):
    process = program(
        "train.py", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run",
        "--epochs", 1000, "--checkpoint-every-steps", 5, *SMALL,
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 10)
    steps = tmp_path / "run" / "steps"
    before = max(int(file.name) for file in steps.iterdir() if file.name.isdigit())
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == exit_code, err
    last = err.splitlines()[-1]
    assert last.startswith(f"stopped by {number.name} after step ")
    assert last.endswith("run the same command again to continue")
    step = int(last.split("after step ")[1].split()[0].replace(",", ""))
    assert step <= before + 100  # of 10,000
    assert (steps / str(step)).is_dir()
    assert len(out.splitlines()) == step // STEPS_PER_EPOCH


def test_two_interrupts_end_a_run_that_can_be_read(tmp_path, small_mnist, program, command):
    process = program(
        "train.py", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run",
        "--epochs", 1000, "--checkpoint-every-steps", 5, *SMALL,
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 10)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)  # two at once would be one
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("stopped by ")
    assert command("evaluate", tmp_path / "run")[0] == 0


def test_a_second_interrupt_counts_where_python_runs_no_handler(program):
    # Like compiling, this releases the interpreter's lock and returns, in an hour, to its next instruction.
    code = """
import hashlib
from cnn_jax.runtime.signals import listen_for_stop
with listen_for_stop():
    print("listening", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    process = program("-c", code)
    assert process.stdout.readline() == "listening\n"
    for _ in range(2):
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.startswith("stopped by a second SIGINT; the newest checkpoint is as it was")


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_to_the_same_bits(train, tmp_path, uninterrupted):
    assert train(epochs=2)[0] == 0
    damage_newest(tmp_path / "run" / "steps")
    code, out, err = train()
    assert (code, out.count("[Epoch:")) == (0, EPOCHS)
    assert "the checkpoint of step 20 is damaged" in err
    assert "continuing after step 10 of 30" in err
    assert (tmp_path / "run" / "quarantine" / "20").is_dir()
    assert_same_run(tmp_path / "run", uninterrupted)


def test_of_runs_that_train_together_damage_is_told_too(trained_run, tmp_path, capsys):
    run = shutil.copytree(trained_run(*SMALL, epochs=2, reported=False), tmp_path / "run")
    damage_newest(run / "steps")
    settings = dataclasses.replace(RunFolder(run).read_settings(), checkpoint_dir=tmp_path)
    ((*epochs,),) = train_together([settings], load_run_data(settings), lambda metrics: metrics)
    assert [each.epoch for each in epochs] == [1, 2]
    _, err = capsys.readouterr()
    assert "the checkpoint of step 20 is damaged" in err
    assert "[Epoch:" not in err


def test_a_run_without_a_sound_checkpoint_ends_with_3_and_says_what_to_do(train, tmp_path):
    assert train(epochs=1)[0] == 0
    damage_newest(tmp_path / "run" / "steps")
    for _ in range(2):
        code, out, err = train(epochs=1)
        assert (code, out) == (3, "")
        assert err.splitlines()[-1].endswith("give another --run-name, or --fresh")
    assert train("--fresh", epochs=1)[0] == 0


def test_a_run_is_not_continued_on_data_that_have_changed(train, tmp_path, small_mnist):
    data = tmp_path / "data"
    shutil.copytree(small_mnist, data)
    assert train("--dataset-dir", data, epochs=1)[0] == 0
    images = data / "train-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    content[5000] ^= 1
    images.write_bytes(content)
    code, _, err = train("--dataset-dir", data)
    assert code == 65
    assert f"the data in {data} are not those that the run" in err.splitlines()[-1]


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_devices_and_says_that_bits_may_differ(train, tmp_path, small_mnist,
                                                                                    program):  # fmt: skip
    assert train(epochs=1)[0] == 0
    process = program(
        *TRAIN, "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run", "--epochs", 2,
        *SMALL, env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out.count("[Epoch:")) == (0, 2), err
    assert "saved with device 1 x cpu and continues with 2 x cpu: bits may differ" in err


def test_the_line_of_an_epoch_that_ends_early_counts_epochs(train):
    assert "\nepoch 1/1: test accuracy " in train(epochs=0.2)[2]


def test_a_finished_run_is_reported_and_not_trained_again(train, tmp_path):
    _, first_out, _ = train(epochs=1)
    before = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    code, out, err = train(epochs=1)
    assert (code, out) == (0, first_out)
    assert "this run is finished" in err
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_that_was_killed_before_its_report_gets_it_at_the_next_start(train, tmp_path):
    _, first_out, _ = train(epochs=1, pictures=True)
    for name in ("result.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    code, out, err = train(epochs=1, pictures=True)
    assert (code, out) == (0, first_out), err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == STEPS_PER_EPOCH
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000


def test_fresh_moves_a_run_aside_and_starts_anew(train, tmp_path):
    train(epochs=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    code, _, err = train("--fresh", epochs=1)
    assert code == 0
    assert "run.old-1" in err
    assert (tmp_path / "run.old-1" / "metrics.jsonl").read_text() == before
    assert len(metrics_of(tmp_path / "run")) == 1


def test_fresh_speaks_of_no_earlier_run_where_there_is_none(train, tmp_path):
    code, _, err = train("--fresh", "--learning-rate", "0.002", epochs=0.1)
    assert code == 0
    assert "earlier" not in err
    assert not list(tmp_path.glob("run.old-*"))


def test_other_settings_are_refused_and_named(train):
    train(epochs=2)
    code, _, err = train("--learning-rate", 0.01, epochs=1)
    assert code == 2
    assert "learning_rate was 0.001 and is 0.01; epochs was 2 and is 1" in err
    assert len(err.splitlines()) == 1


def test_a_run_that_another_process_writes_is_left_alone(train, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for holder, told in (os.getppid(), f"process {os.getppid()}"), (os.getpid(), "another thread"):
            file.truncate(0)
            file.write(f"{holder}\n")
            file.flush()
            code, out, err = train()
            assert (code, out) == (6, "")
            assert f"error: {told} is writing the run" in err


@pytest.mark.slow
def test_different_runs_train_side_by_side(tmp_path, small_mnist, program, uninterrupted):
    processes = [
        program(*TRAIN, "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", name,
                "--epochs", EPOCHS, *SMALL)
        for name in ("one", "other")
    ]  # fmt: skip
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    for name in ("one", "other"):
        assert_same_run(tmp_path / name, uninterrupted)


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing_bad(train, tmp_path):
    code, _, err = train("--learning-rate", 1e30)
    assert code == 5
    assert "the loss of step 3 is" in err or "the loss of step 2 is" in err
    assert list((tmp_path / "run" / "steps").glob("*")) == []


def test_weights_that_the_last_step_of_an_epoch_spoiled_are_not_saved(train, tmp_path):
    code, _, err = train("--learning-rate", 1e30, "--batch-size", 1030, epochs=1)
    assert code == 5
    assert "the loss of the tested images is not finite after step 1" in err
    assert list((tmp_path / "run" / "steps").glob("*")) == []
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_below_its_target_accuracy_ends_with_70(train):
    code, out, err = train("--target-accuracy", 0.999, "--features", 32, 64, epochs=1)
    assert code == 70
    assert "is below --target-accuracy 0.999" in err
    assert "Accuracy:" in out
    assert train("--target-accuracy", 0.5, "--features", 32, 64, epochs=1)[0] == 0


def test_the_result_tells_the_accuracies_the_times_and_what_they_were_measured_on(train, tmp_path):
    assert train("--validation", 300, "--seeds", 2, epochs=2)[0] == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    accuracies = [seed["test_accuracy"] for seed in result["seeds"]]
    assert [seed["seed"] for seed in result["seeds"]] == [777, 778]
    assert result["test_accuracy"] == pytest.approx(sum(accuracies) / 2)
    error = abs(accuracies[0] - accuracies[1]) / 2
    assert result["spread"]["standard_error"] == pytest.approx(error)
    # Student's t for one degree of freedom.
    assert result["spread"]["high"] - result["test_accuracy"] == pytest.approx(12.7062 * error, rel=1e-4)
    assert 0 < result["validation_accuracy"] < 1
    assert set(result["seconds"]) == {"loading", "compiling", "training", "testing", "saving"}
    assert result["versions"]["jax"] == jax.__version__


def test_held_out_images_are_not_trained_on_and_the_test_set_is_looked_at_once(train, tmp_path, monkeypatch):
    tested = []
    evaluate = program_module.evaluate_seeds

    def note(program, states, test_set, **how):
        tested.append(len(test_set.labels))
        return evaluate(program, states, test_set, **how)

    monkeypatch.setattr("cnn_jax.runs.train.evaluate_seeds", note)
    monkeypatch.setattr("cnn_jax.runs.restore.evaluate_seeds", note)
    code, _, err = train("--validation", 300)
    assert code == 0
    assert "3 epochs of 7 steps" in err  # 730 of 1,030 images
    assert tested == [300] * 3 + [260]
    assert [list(epoch)[3] for epoch in metrics_of(tmp_path / "run")] == ["validation_accuracy"] * 3


def test_tensorboard_gets_each_epochs_numbers(train, tmp_path):
    assert train("--tensorboard", "--validation", 300, "--seeds", 2, epochs=2)[0] == 0
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = file.read_bytes()
    for name in (b"cost", b"validation_accuracy", b"step_milliseconds", b"seeds/1/validation_accuracy"):
        assert content.count(name) >= 2


class FullStream(io.RawIOBase):
    def writable(self):
        return True

    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", ["a full disk", "a file"])
def test_a_training_goes_on_without_tensorboards_file_and_says_so_in_its_result(kind, train, tmp_path, monkeypatch):
    from tensorboardX import record_writer

    if kind == "a file":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "tensorboard").touch()
    monkeypatch.setattr(record_writer, "open_file", lambda path: io.BufferedWriter(FullStream()))
    code, _, err = train("--tensorboard", epochs=2)
    assert code == 0, err
    said = json.loads((tmp_path / "run" / "result.json").read_text())["not_shown"]
    assert said.endswith("File exists" if kind == "a file" else "No space left on device")
    assert "not written" in err


def test_other_flags_for_xla_may_change_bits_and_are_told(train, monkeypatch):
    assert train(epochs=1)[0] == 0
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    code, _, err = train(epochs=2)
    assert code == 0
    assert "and continues with --xla_cpu_enable_fast_math=true: bits may differ" in err


def test_a_profile_is_a_trace_of_steps_in_the_middle_of_the_training(train, tmp_path):
    code, _, err = train("--profile", tmp_path / "profile", epochs=2)
    assert code == 0
    assert f"steps is in {tmp_path / 'profile'}" in err
    assert any(path.suffix == ".pb" for path in (tmp_path / "profile").rglob("*"))


def test_a_training_goes_on_where_its_profile_cannot_be_written(train, tmp_path):
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "plugins").write_text("in the way")
    code, _, err = train("--profile", tmp_path / "profile", epochs=2)
    assert code == 0
    assert f"the trace in {tmp_path / 'profile'} could not be written (" in err
    assert "; the training goes on\n" in err


def test_a_training_too_short_for_a_profile_says_so(train, tmp_path):
    code, _, err = train("--profile", tmp_path / "profile", epochs=0.5)
    assert code == 0
    assert "no trace was written: the training was over with its first segment of steps" in err


def test_the_log_level_shows_what_was_decided(program, small_mnist, tmp_path):
    arguments = [*TRAIN, "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--epochs", 1, *SMALL]
    _, err = program(*arguments, "--log-level", "info").communicate(timeout=300)
    assert "INFO cnn_jax.runs.train: mesh {'seeds': 1, 'data': 1}, images resident" in err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--features", 100_000, 100_000), "training needs more than 1,349 GiB of memory and there are"),
        (("--features", 10**200, 10**200), "training needs more than 1,000,000,000 GiB of memory and there are"),
        (
            ("--features", 9_000_000, 1, "--batch-size", 1000),
            "with --seeds 1 and --batch-size 1000: training needs more",
        ),
        (("--seeds", 4 * 10**9, "--seed", 0, "--features", 1, 1), "training needs more than"),
        (
            ("--features", 32, 64, "--seeds", 10**7),
            "--features 32 64 with --seeds 10000000 and --batch-size 100: training needs more than",
        ),
        (("--epochs", 1e308), "--epochs 1e+308: it must be smaller"),
        (
            ("--epochs", 1e9, "--recipe", "fast"),
            "--epochs 1e+09: it must be smaller, for fewer than 2,147,483,648 steps",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_cannot_end_well_ends_before_it_is_compiled(options, line, train, tmp_path):
    code, out, err = train(*options)
    assert (code, out) == (2, "")
    (error,) = err.splitlines()
    assert line in error
    assert not (tmp_path / "run" / "steps").exists()


def test_a_folder_whose_name_is_markup_is_shown_as_it_is(train, tmp_path):
    folder = tmp_path / "y[/i][red]"
    code, _, err = train("--checkpoint-dir", folder, epochs=1)
    assert code == 0
    assert "y[/i][red]" in "".join(line.strip(" │") for line in err.splitlines()[-5:])


def test_a_dry_run_refuses_a_place_that_cannot_be_written(train, tmp_path):
    (tmp_path / "run").write_text("in the way")
    code, out, err = train("--dry-run", "--run-name", "run")
    assert (code, out) == (4, ""), err
    code, out, err = train("--dry-run", "--run-name", "x" * 300)
    assert (code, out) == (2, "")
    assert "it must be at most 255 bytes long" in err


def test_a_dry_run_writes_nothing(train, tmp_path):
    code, out, err = train("--dry-run")
    assert (code, out) == (0, "")
    assert "3 epochs of 10 steps, batch 100, Adam at 0.001, float32, seed 777" in err
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_learns_too(train, tmp_path):
    assert train("--precision", "bfloat16", "--features", 32, 64)[0] == 0
    assert metrics_of(tmp_path / "run")[-1]["test_accuracy"] > 0.7


def test_evaluate_gives_the_accuracy_that_training_gave_and_the_tutorials(train, command, tmp_path):
    _, trained, _ = train(epochs=1)
    code, out, err = command("evaluate", tmp_path / "run")
    assert (code, out) == (0, trained.splitlines()[-1] + "\n")
    assert "of 260 test images" in err
    code, unscaled, err = command("evaluate", "run", "--checkpoint-dir", tmp_path, "--unscaled")
    assert code == 0
    assert unscaled != out
    assert "0..255" in err
    code, _, err = command("evaluate", "no-such-run", "--checkpoint-dir", tmp_path)
    assert code == 3
    assert "no-such-run is not a run (it has no config.json); there are run\n" in err
    code, _, err = command("evaluate", "rum", "--checkpoint-dir", tmp_path)
    assert (code, err.partition("; ")[2]) == (3, "perhaps you meant run\n")


def test_a_disk_error_ends_with_4_and_names_the_place(train, tmp_path):
    train(epochs=1)
    shutil.rmtree(tmp_path / "run" / "steps")
    (tmp_path / "run" / "steps").write_text("in the way")
    code, _, err = train(epochs=2)
    assert code == 4
    assert "steps" in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


def test_the_loss_is_nine_frames_from_the_command(train, monkeypatch):
    """What a reader of a training goes through; JAX's own frames between them are not counted."""
    stacks = []

    def loss(logits, labels):
        frames = [frame.name for frame in traceback.extract_stack() if "/cnn_jax/" in frame.filename]
        stacks.append(frames[frames.index("train") :])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    monkeypatch.setattr(recipes, "tutorial", lambda learning_rate: recipes.Recipe(optax.adam(learning_rate), loss))
    assert train("--learning-rate", 0.0011, epochs=1)[0] == 0  # which no other test has compiled
    below = ["run_seeds", "run_steps", "take_step", "train_step", "add_part", "loss_fn"]
    # It is traced when the program is compiled; `train_epoch` calls the same function.
    assert ["train", "train_run", "compile_program", *below] in stacks
    assert max(map(len, stacks)) <= 9
