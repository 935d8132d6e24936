"""Several processes train one run, with the numbers and the checkpoint of one, and none waits forever for another."""

import functools
import json
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from tests.helpers import TRAIN, assert_same_run, flip_a_bit, metrics_of, start_python, wait_for_step

pytestmark = pytest.mark.optax_promotes

EPOCHS = 3
SMALL = ("--features", 4, 8)


@pytest.fixture
def start(program, small_mnist, tmp_path):
    """Start the processes of a run."""
    return functools.partial(start_processes, program, small_mnist, tmp_path)


def free_place():
    """An address of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_processes(program, data, folder, name, *options, processes, epochs=EPOCHS, platform="cpu"):
    """Start the processes of a run, which find each other."""
    place = free_place()
    return [
        program(
            *TRAIN, "--dataset-dir", data, "--checkpoint-dir", folder, "--run-name", name,
            "--epochs", epochs, "--platform", platform, "--coordinator", place,
            "--num-processes", processes, "--process-id", number, *SMALL, *options,
        )
        for number in range(processes)
    ]  # fmt: skip


def finish(processes):
    """Each process's exit code, stdout and stderr."""
    ended = [(process.communicate(timeout=240), process.returncode) for process in processes]
    return [(code, out, err) for (out, err), code in ended]


@pytest.fixture(scope="session")
def alone(trained_run):
    """The folder of the same run by one process."""
    return trained_run(*SMALL, epochs=EPOCHS, reported=False)


@pytest.fixture(scope="module")
def together(small_mnist, tmp_path_factory):
    """The folder of the same run by several processes, and what each of them ended with."""

    @functools.cache
    def run(processes):
        folder = tmp_path_factory.mktemp("together")
        return folder / "run", finish(start_processes(start_python, small_mnist, folder, "run", processes=processes))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])  # 3 do not divide a batch
def test_several_processes_give_the_costs_of_one_and_the_first_alone_prints(together, alone, processes):
    run, ended = together(processes)
    assert [code for code, _, _ in ended] == [0] * processes, ended
    assert ended[0][1].count("[Epoch:") == EPOCHS
    assert f"{processes} x cpu" in ended[0][2]
    assert f"{processes} processes" in ended[0][2]
    assert all((out, err) == ("", "") for _, out, err in ended[1:]), ended
    costs, expected = ([epoch["cost"] for epoch in metrics_of(run)] for run in (run, alone))
    np.testing.assert_allclose(costs, expected, atol=1e-5)


@pytest.mark.slow
def test_after_one_is_killed_the_other_ends_and_both_together_continue_to_the_same_bits(start, together, tmp_path):
    whole, _ = together(2)
    for victim, step in ((1, 6), (0, 16)):
        processes = start("run", "--checkpoint-every-steps", 2, processes=2)
        wait_for_step(tmp_path / "run", step)
        processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, err = processes[1 - victim].communicate(timeout=90)
        assert time.monotonic() - killed < 60
        assert processes[1 - victim].returncode == 7, err
        assert "another process of this run is gone" in err.splitlines()[-1]
        assert "start all of them again to continue" in err.splitlines()[-1]
    ended = finish(start("run", processes=2))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "continuing after step" in ended[0][2]
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.usefixtures("without_report")
def test_a_signal_to_one_process_stops_all_after_one_save_and_one_process_can_continue(start, command, small_mnist,
                                                                                       tmp_path):  # fmt: skip
    options = ("--seeds", 2)
    processes = start("run", *options, "--checkpoint-every-steps", 5, processes=2, epochs=10)
    wait_for_step(tmp_path / "run", 25)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [code for code, _, _ in ended] == [143, 143], ended
    assert "stopped by SIGTERM after step" in ended[0][2].splitlines()[-1]
    code, out, err = command(
        "train", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run", "--epochs", 10,
        *SMALL, *options,
    )  # fmt: skip
    assert (code, out.count("[Epoch:")) == (0, 10), err
    assert "bits may differ" in err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [len(line["seeds"]["cost"]) for line in lines] == [2] * 10


@pytest.mark.slow
def test_what_the_first_process_refuses_all_refuse(start, together, tmp_path):
    shutil.copytree(together(2)[0], tmp_path / "run")
    ended = finish(start("run", "--learning-rate", 0.01, processes=2))
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert "learning_rate was 0.001 and is 0.01" in ended[0][2]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["settings", "data"])
def test_processes_that_do_not_agree_all_refuse(what, program, small_mnist, tmp_path):
    folders = [shutil.copytree(small_mnist, tmp_path / f"data{number}") for number in range(2)]
    if what == "data":
        flip_a_bit(folders[1] / "train-images-idx3-ubyte")
    place = free_place()
    processes = [
        program(
            *TRAIN, "--dataset-dir", folder, "--checkpoint-dir", tmp_path, "--run-name", "run", "--platform", "cpu",
            "--coordinator", place, "--num-processes", 2, "--process-id", number,
            "--batch-size", 50 + 50 * (number if what == "settings" else 0),
        )
        for number, folder in enumerate(folders)
    ]  # fmt: skip
    for code, out, err in finish(processes):
        assert (code, out) == (2, ""), err
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: the processes of this run have different {what}; start the same command")


def test_a_cluster_that_is_not_there_is_reported_in_one_line(program, small_mnist, tmp_path):
    process = program(
        "-c",
        "import sys; from cnn_jax.cli import commands; from cnn_jax.runtime import distributed; "
        "distributed.START_SECONDS = 2; commands.main(sys.argv[1:])",
        "train", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--coordinator", "127.0.0.1:9",
        "--num-processes", 2, "--process-id", 1,
    )  # fmt: skip
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert "the processes of this run do not find each other at 127.0.0.1:9" in err.splitlines()[-1]


def test_a_port_at_which_another_program_listens_is_named(program, small_mnist, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        process = program(
            *TRAIN, "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--coordinator", place,
            "--num-processes", 2, "--process-id", 0,
        )  # fmt: skip
        _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert f"--coordinator {place}: process 0 cannot listen there (Address already in use)" in err.splitlines()[-1]


JOINED = """
import logging, sys, time
logging.basicConfig(level="WARNING", format="%(message)s")
from cnn_jax.runtime.distributed import joined
from cnn_jax.runtime.errors import with_tracebacks
with_tracebacks.set("--debug" in sys.argv)
with joined({!r}, {}, {}):
    logging.warning("logged")
    print("joined", flush=True)
    time.sleep(60)
"""


def test_a_process_that_jax_aborts_ends_in_one_line_too(program):
    place = free_place()
    first, second = (program("-c", JOINED.format(place, 2, number)) for number in range(2))
    assert second.stdout.readline() == "joined\n"
    first.kill()
    _, err = second.communicate(timeout=300)
    assert second.returncode == 7, err
    log, line = err.splitlines()
    assert log == "logged"
    assert line.startswith("error: JAX ended this process, as it does when another process of this run is gone")
    assert line.endswith("; start all of them again, once each, to continue from the newest checkpoint")


WAITING = """
import ctypes, time
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.distributed import all_gather, is_process_0, joined, may_wait, on_process_0
from cnn_jax.runtime.signals import listen_for_stop
with joined({!r}, 2, {}):
    start_devices("cpu")
    with listen_for_stop(may_wait) as stop:
        all_gather(0)
        print("begun", flush=True)
        {}
"""
FOR_EACH_OTHER = "while True: all_gather(0)"
# What waits in C, as a slow disk does: no signal interrupts it, and Python's handler runs later.
FOR_A_DISK = """
        mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        library.pthread_mutex_lock(mutex)
        end = (ctypes.c_long * 2)(int(time.time()) + 4, 0)
        on_process_0(library.pthread_mutex_timedlock, mutex, end)
        all_gather(0)
        print(stop.signal_number, end="")
"""


def started(program, what):
    """Two processes that have found each other and wait."""
    place = free_place()
    processes = [program("-c", WAITING.format(place, number, what)) for number in range(2)]
    assert [process.stdout.readline() for process in processes] == ["begun\n"] * 2
    return processes


@pytest.mark.parametrize(("halted", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_ends_a_process_that_waits_for_one_that_is_halted(halted, number, program):
    processes = started(program, FOR_EACH_OTHER)
    processes[halted].send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    begin = time.monotonic()
    processes[1 - halted].send_signal(number)
    _, err = processes[1 - halted].communicate(timeout=300)
    assert time.monotonic() - begin < 4
    assert (processes[1 - halted].returncode, err) == (
        128 + number,
        f"stopped by {number.name} while it waited for another process of this run; "
        "start all again to continue from the newest checkpoint\n",
    )


def test_a_process_whose_disk_is_slow_is_not_taken_for_one_that_waits_for_another(program):
    first, second = started(program, FOR_A_DISK)
    time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    assert [process.communicate(timeout=300) for process in (first, second)] == [("15", ""), ("None", "")]
    assert (first.returncode, second.returncode) == (0, 0)


def first_to_end(processes):
    """The exit code and stderr of whichever process ends first; the others are killed."""
    deadline = time.monotonic() + 300
    while not (ended := [process for process in processes if process.poll() is not None]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in processes:
        process.kill()
    return ended[0].returncode, ended[0].communicate()[1]


@pytest.mark.parametrize("twice", ["--process-id", "--num-processes"])
def test_processes_with_the_same_number_or_different_counts_end_in_one_line(twice, program):
    place = free_place()
    each = [(3, 0), (3, 1), (3, 1)] if twice == "--process-id" else [(2, 0), (3, 2)]
    code, err = first_to_end([program("-c", JOINED.format(place, *numbers)) for numbers in each])
    assert code == 2, err
    assert err.startswith("error: processes of this run have the same --process-id, or different --num-processes (")
    assert err.endswith("); start the same command once for each --process-id\n")
    assert err.count("\n") == 1


def test_with_debug_what_jax_says_of_an_abort_is_shown(program):
    place = free_place()
    code, err = first_to_end([program("-c", JOINED.format(place, *numbers), "--debug") for numbers in [(2, 0), (3, 2)]])
    assert (code, "client.h" in err) == (2, True), err
