"""A signal ends the program with its line and code from its first line on, and changes nothing after its last."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT

# A program that says when it has come to its first import that takes long, which is as early as a signal can count.
REPORTING = """
import os, runpy, sys
def report(event, arguments):
    if event == "import" and arguments[0] in ("cnn_jax.cli", "jax"):
        os.write(1, b".")
sys.addaudithook(report)
sys.argv = ["train.py", "--dry-run", "--platform", "cpu"]
runpy.run_path("train.py", run_name="__main__")
"""


def end_of_a_start(number, delay, moments=1):
    """The exit code and stderr of a training that gets a signal so many seconds after a moment of its start."""
    command = [sys.executable, "-c", REPORTING]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for _ in range(moments):
            assert process.stdout.read(1) == b"."
        time.sleep(delay)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
    return process.returncode, err.decode()


def stopped_by(number):
    return 128 + number, f"stopped by {signal.Signals(number).name}; run the same command again\n"


@pytest.mark.usefixtures("hangups_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU])
@pytest.mark.parametrize(("delay", "moments"), [(0, 1), (0.05, 1), (0.1, 1), (0, 2), (0.3, 2)])
def test_a_signal_ends_a_start_in_its_line(number, delay, moments):
    assert end_of_a_start(number, delay, moments) == stopped_by(number)


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM])
def test_signals_that_others_send_end_it_so_too(number):
    assert end_of_a_start(number, 0.1) == stopped_by(number)


@pytest.mark.slow
@pytest.mark.usefixtures("hangups_heard")
def test_a_signal_every_10_ms_of_a_start_ends_it_in_its_line():
    for i in range(60):
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[i % 3]
        assert end_of_a_start(number, i / 100) == stopped_by(number), f"{10 * i} ms"


BLOCKED = """
import ctypes
from cnn_jax.runtime.signals import end_on_signals
end_on_signals()
mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
print("ready", flush=True)
library.pthread_mutex_lock(mutex)
library.pthread_mutex_lock(mutex)
"""


def test_a_signal_ends_what_waits_outside_python():
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        try:
            _, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert (process.returncode, err) == stopped_by(signal.SIGTERM)


PARENT = """
import signal, subprocess, sys
from cnn_jax.runtime.signals import end_on_signals, ending_together
end_on_signals()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the thread that listens gets it, while this one waits
with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child, ending_together(child.pid):
    print(child.pid, flush=True)
    child.wait()
print("it goes on", flush=True)
"""


def test_a_signal_to_a_process_alone_ends_its_child_first():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == stopped_by(signal.SIGINT)
    assert out == ""
    with contextlib.suppress(ProcessLookupError):
        for _ in range(50):  # until the system has noticed that it ended
            os.kill(child, 0)
            time.sleep(0.1)
        raise AssertionError("the child goes on")


CHILD = """
import os, sys, time
from cnn_jax.runtime.signals import end_on_signals, end_with_parent
end_with_parent(int(sys.argv[1]))
end_on_signals()
print(os.getpid(), flush=True)
time.sleep(60)
"""
ABANDONING = f"""
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", {CHILD!r}, str(os.getpid())]).wait()
"""


def test_a_child_ends_with_a_parent_that_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", ABANDONING], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().strip().isdigit()
        begin = time.monotonic()
        process.kill()
        _, err = process.communicate(timeout=300)  # until the child, too, has closed its streams
    assert time.monotonic() - begin < 5
    assert err == stopped_by(signal.SIGTERM)[1]


IMPORTING = """
import os, signal, sys, types
from cnn_jax.runtime.signals import end_on_signals
end_on_signals()
sys.modules["cnn_jax.runtime.files"] = types.ModuleType("cnn_jax.runtime.files")  # as when its import has just begun
os.kill(os.getpid(), signal.SIGINT)
"""


def test_a_signal_in_the_middle_of_an_import_ends_it_in_its_line_too():
    ended = subprocess.run([sys.executable, "-c", IMPORTING], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == stopped_by(signal.SIGINT)


ENDING = """
import atexit, os, signal
atexit.register(lambda: [os.kill(os.getpid(), number) for number in (signal.SIGINT, signal.SIGTERM)])
from cnn_jax.runtime.signals import end_on_signals
end_on_signals()
"""


def test_a_signal_after_the_work_is_finished_changes_nothing():
    ended = subprocess.run([sys.executable, "-c", ENDING], cwd=ROOT, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_under_nohup_a_closed_terminal_changes_nothing():
    code = "import os, signal; from cnn_jax.runtime import signals; signals.end_on_signals(); os.kill(os.getpid(), 1)"
    ended = subprocess.run(["nohup", sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_handlers_come_before_every_import_that_takes_long():
    code = "import sys; before = set(sys.modules); import cnn_jax.__main__; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {name for name in loaded.stdout.split() if name.startswith("cnn_jax")}
    assert names == {
        "cnn_jax",
        "cnn_jax.__main__",
        "cnn_jax.runtime",
        "cnn_jax.runtime.signals",
        "cnn_jax.runtime.streams",
    }
    assert not {"argparse", "numpy", "dataclasses", "inspect"} & set(loaded.stdout.split())
