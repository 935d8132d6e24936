"""How a signal ends the program: at once, or, while it trains, after the segment and a save."""

import atexit
import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from cnn_jax.runtime.streams import write_last_line

# Those with which people, terminals and batch systems end a program: by Ctrl-C, Ctrl-\, a closed terminal, a limit of
# processor time, or, as SLURM does, by whichever was asked for.
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2", "SIGALRM")
# nohup has SIGHUP ignored, for a program to outlive its terminal.
SIGNALS = [number for number in map(signal.Signals.__getitem__, _ENDING) if signal.getsignal(number) != signal.SIG_IGN]
# A signal ends a process that has waited this long for another one, with less than this share of a core used.
PATIENCE_SECONDS, IDLE = 1.5, 0.1
AT_ONCE = "stopped by a second SIGINT; the newest checkpoint is as it was: run the same command again to continue"

PARENT_SECONDS = 0.5  # from one look for the parent to the next
WAITING = "while it waited for another process of this run; start all again to continue from the newest checkpoint"


def end_on_signals() -> None:
    """From now on, let the first of the signals end this process with one line and 128 plus its number.

    Python would raise an exception wherever the program happens to be, perhaps in a library that mistakes it for
    something else and goes on. To end at once is safe, because every file is complete, old or new, at any instant.
    """
    ending = threading.Lock()

    def end(signal_number: int, frame: object = None) -> None:
        if ending.acquire(blocking=False):
            name = signal.Signals(signal_number).name
            _end_at_once(signal_number, f"stopped by {name}; run the same command again")

    for number in SIGNALS:
        signal.signal(number, end)
        # Python removes its handlers a moment before the process is over; finished work must not look interrupted.
        atexit.register(signal.signal, number, signal.SIG_IGN)
    with contextlib.suppress(RuntimeError, OSError):  # the machine's limits allow no thread or no pipe
        signal.set_wakeup_fd(_each_signal_in_a_thread(end))


# The numbers of the processes that this one ends with itself; who ends them keeps the lock.
_children: set[int] = set()
_children_lock = threading.RLock()


@contextlib.contextmanager
def ending_together(child: int) -> Iterator[None]:
    """Within the block, a signal that ends this process ends a child first, at once and without a word."""
    with _children_lock:
        _children.add(child)
    try:
        yield
    finally:
        with _children_lock:  # held where this process is being ended: it must not go on without the child
            _children.discard(child)


def end_with_parent(parent: int) -> None:
    """From now on, let SIGTERM end this process when its parent is gone, as by SIGKILL, which `ending_together` lacks.

    Args:
      parent: Its parent's number, which the parent gives, as it may be gone already.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _end_at_once(signal_number: int, line: str) -> NoReturn:
    _children_lock.acquire()
    for child in _children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)  # macOS has had `waitid` since Python 3.13 alone
    # Imported, perhaps at this very moment, after the first ones, in which there are no files.
    remove = getattr(sys.modules.get("cnn_jax.runtime.files"), "remove_temporary_files", None)
    if remove is not None:
        remove()
    write_last_line(line)
    os._exit(128 + signal_number)


def _each_signal_in_a_thread(react: Callable[[int], None]) -> int:
    """Start a thread that calls a function with the number of each signal that Python handles.

    Python runs a handler only between two of its own instructions, so not while XLA compiles or waits for another
    process, which takes seconds. It writes the signal's number to a pipe at once, and the thread reads it.

    Returns:
      The pipe's descriptor, for `signal.set_wakeup_fd`; the thread ends when it is closed.
    """

    def read_on() -> None:
        with open(reading, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    if number in SIGNALS:
                        react(number)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=read_on, daemon=True).start()
    return writing


class StopRequest:
    """Whether the run was asked to stop.

    Attributes:
      signal_number: The signal that asked first, or None.
    """

    signal_number: int | None = None


@contextlib.contextmanager
def listen_for_stop(may_wait: Callable[[], bool] = lambda: False, *, at_once: str = AT_ONCE) -> Iterator[StopRequest]:
    """Turn the first of the signals into a request; a second SIGINT ends the process at once, with 130.

    Where the process waits for another one, which may be halted for hours, it cannot answer the request: the first
    signal ends it then.

    Only Python's main thread can listen. Elsewhere nothing asks to stop, and signals do what they did before.

    Args:
      may_wait: Returns, in any thread, whether what this process waits for, if it does nothing, is another one.
      at_once: The line that a second SIGINT ends it with.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(signal_number: int, frame: object) -> None:
        if request.signal_number is None:
            request.signal_number = signal_number

    interrupts, ended = itertools.count(1), threading.Event()

    def hear(signal_number: int) -> None:
        if signal_number == signal.SIGINT and next(interrupts) > 1:
            _end_at_once(signal_number, at_once)
        threading.Thread(target=end_if_it_waits, args=(signal_number,), daemon=True).start()

    def end_if_it_waits(signal_number: int) -> None:
        # Until Python has run the handler, the main thread is in a library in C, which computes or waits.
        while request.signal_number is None:
            waits, used = may_wait(), time.process_time()
            if ended.wait(PATIENCE_SECONDS):
                return
            idle = time.process_time() - used < IDLE * PATIENCE_SECONDS
            if idle and waits and may_wait() and request.signal_number is None:
                name = signal.Signals(signal_number).name
                _end_at_once(signal_number, f"stopped by {name} {WAITING}")

    writing = _each_signal_in_a_thread(hear)
    before_pipe = signal.set_wakeup_fd(writing)
    try:
        with _handling(note):
            yield request
    finally:
        ended.set()
        signal.set_wakeup_fd(before_pipe)
        os.close(writing)  # the thread reads the end of the pipe and returns


@contextlib.contextmanager
def _handling(handler: Callable[[int, object], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
