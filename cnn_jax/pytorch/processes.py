"""Start new processes, and the functions that the benchmark and the comparison run in them.

A process that measures one framework must not have loaded the other, so everything imported at the top here is light.
A process started by `python -m cnn_jax` imports only what unpickling its function needs; one started by the installed
script `cnn-jax` also imports the command line, 0.05 s that are then missing from its measured import.
"""

import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from cnn_jax.data.loading import load_dataset
from cnn_jax.pytorch.variants import BATCH_SIZE, LEARNING_RATE, Variant
from cnn_jax.runtime.errors import StorageError, one_line_failures, with_tracebacks
from cnn_jax.runtime.records import Fraction, NonEmpty, NotNegative, Record, Seed
from cnn_jax.runtime.signals import end_with_parent
from cnn_jax.runtime.streams import guard_standard_streams

# The time that a function gets to return once its pipe is closed: enough for PyTorch's and JAX's threads to end.
SECONDS_TO_END = 2
# The parts of a training whose seconds are recorded.
PARTS = ("starting", "compiling", "training", "testing")


class Worker(NamedTuple):
    """A process that runs a function.

    Attributes:
      name: Its name in messages, such as "the training pytorch-seed777".
      process: The process itself.
      pipe: This end of its pipe; the function has the other.
    """

    name: str
    process: BaseProcess
    pipe: Connection

    def send(self, value: Any) -> None:
        """Send an object to the function.

        Raises:
          StorageError, SystemExit: the process has ended, as `ended_early` tells.
        """
        with self._alive():
            self.pipe.send(value)

    def receive(self) -> Any:
        """Return the next object that the function sends.

        Raises:
          StorageError, SystemExit: the process ended without sending it, as `ended_early` tells.
        """
        with self._alive():
            return self.pipe.recv()

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise ended_early(self.name, self.process.exitcode or 0) from error


def ended_early(name: str, exit_code: int) -> StorageError | SystemExit:
    """Return what ends this process where another ended before its work was done.

    A process that failed has said why in its line, and this one ends with its exit code. Where a signal ended it, of
    which the negative exit code tells, or Python itself, it has not.
    """
    if exit_code < 0:
        by = f"signal {-exit_code} ({signal.strsignal(-exit_code)})"
        return StorageError(f"{name} was ended by {by}; run the same command again")
    if exit_code > 1:
        return SystemExit(exit_code)
    return StorageError(f"{name} ended with exit code {exit_code} before it was done; run the same command again")


@contextlib.contextmanager
def start_worker(
    function: Callable[..., None], *arguments: Any, name: str, environment: Mapping[str, str] | None = None
) -> Iterator[Worker]:
    """Run `function(pipe, *arguments)` in a new process, which is gone when the block has ended.

    Args:
      function: A function at the top level of a module; it and its arguments are pickled.
      arguments: Its arguments after the pipe.
      name: The process's name in messages.
      environment: Environment variables of the process, in addition to this one's.
    """
    context = multiprocessing.get_context("spawn")
    pipe, other_end = context.Pipe()
    assert isinstance(pipe, Connection)  # another class only on Windows
    process = context.Process(target=_run, args=(with_tracebacks.get(), function, other_end, *arguments))
    with _environment(environment or {}):
        process.start()
    other_end.close()  # the process then has the only copy, so that its death closes the pipe
    try:
        yield Worker(name, process, pipe)
        pipe.close()  # ends a function that waits for more
        process.join(SECONDS_TO_END)
    finally:
        process.kill()
        process.join()
        pipe.close()


def _run(debug: bool, function: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    # A terminal's Ctrl-C reaches every process. The parent answers it, and this one ends with the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was started by another"
    assert parent.ident is not None
    end_with_parent(parent.ident)
    # Libraries start processes and make locks as in any other program, not as a spawned process does by default.
    multiprocessing.set_start_method(None, force=True)
    guard_standard_streams()
    # stdout belongs to the command. When the parent is gone, nobody needs to know that the answer was not sent.
    with one_line_failures(debug), contextlib.redirect_stdout(sys.stderr), contextlib.suppress(BrokenPipeError):
        function(pipe, *arguments)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within the block; a process that starts there finds them set from its first moment."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Startup(NamedTuple):
    """How long a variant's process took until the end of its first step, in seconds.

    Attributes:
      import_seconds: Importing PyTorch or TensorFlow alone, or all of cnn-jax.
      load_seconds: Loading the data set.
      first_step_seconds: The first step, compilation included.
    """

    import_seconds: float
    load_seconds: float
    first_step_seconds: float


class StartupFailure(NamedTuple):
    """Why a variant cannot run on this machine."""

    error: str


class Round(NamedTuple):
    """The measurement of a number of steps.

    Attributes:
      milliseconds: The mean time per step and network.
      peak_bytes: The process's peak memory until their end.
    """

    milliseconds: float
    peak_bytes: int


def time_variant(pipe: Connection, variant: Variant, data_dir: Path | None) -> None:
    """Start a variant and send its `Startup`, or its `StartupFailure`; then time steps on request.

    Each number received asks for that many steps and is answered by a `Round`.
    """
    modules = {
        "PyTorch": "torch",
        "TensorFlow": "tensorflow",
        "Flax": "cnn_jax.runs.train",
        "cnn-jax": "cnn_jax.runs.train",
    }
    begin = time.perf_counter()
    try:
        importlib.import_module(modules[variant.framework])
        imported = time.perf_counter()
        dataset = load_dataset("mnist", None, data_dir)
        loaded = time.perf_counter()
        run = variant.make(dataset)
        run(1)
    except Exception as error:
        # TensorFlow is not installed unless somebody wants it, torch.compile needs a C++ compiler and a CUDA graph a
        # driver; the other variants still run without them.
        pipe.send(StartupFailure(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"))
        return
    pipe.send(Startup(imported - begin, loaded - imported, time.perf_counter() - loaded))
    while True:
        try:
            steps = pipe.recv()
        except EOFError:  # the measurement is over
            return
        run(8)  # wakes the threads up and fills the caches
        start = time.perf_counter()
        run(steps)
        pipe.send(Round(1e3 * (time.perf_counter() - start) / steps / variant.seeds, _peak_bytes()))


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its peak includes that of the process which started this one.
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class ComparedRun(Record, frozen=True, kw_only=True):
    """The result of one training in either framework.

    Attributes:
      seed: The seed of its initial weights and its shuffling.
      costs: The mean of the batch losses of each epoch.
      accuracy: The fraction of correct test images, with pixels in [0, 1].
      unscaled_accuracy: The same with pixels in 0..255, as the tutorial tests.
      seconds: The process's time for each of `PARTS`, if it was timed; `starting` is that for imports and data.
    """

    seed: Seed
    costs: NonEmpty[float]
    accuracy: Fraction
    unscaled_accuracy: Fraction
    seconds: dict[str, NotNegative]


def train_in_pytorch(pipe: Connection, seed: int, epochs: int, data_dir: Path | None) -> None:
    """Train one seed in PyTorch and send its `ComparedRun`."""
    begin = time.perf_counter()
    from cnn_jax.pytorch.tutorial import train_torch

    dataset = load_dataset("mnist", None, data_dir)
    starting = time.perf_counter() - begin
    settings = {"seed": seed, "epochs": epochs, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE}
    run = train_torch(dataset, **settings, report=_report)
    seconds = {"starting": starting, **run.seconds}
    numbers = {"costs": run.costs, "accuracy": run.accuracy, "unscaled_accuracy": run.unscaled_accuracy}
    pipe.send(ComparedRun(seed=seed, **numbers, seconds=seconds))


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
