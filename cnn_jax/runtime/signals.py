"""How SIGINT (Ctrl-C) and SIGTERM end the program: at once, or, while it trains, after the segment and a save."""

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from cnn_jax.runtime.files import remove_temporary_files
from cnn_jax.runtime.streams import write_last_line

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AT_ONCE = "stopped by a second SIGINT; the newest checkpoint is as it was: run the same command again to continue"


def end_on_signals() -> None:
    """From now on, let the first SIGINT or SIGTERM end this process with one line and exit code 130 or 143.

    Python would raise an exception wherever the program happens to be, perhaps in a library that mistakes it for
    something else and goes on. To end at once is safe, because every file is complete, old or new, at any instant.
    """

    def end(signal_number: int, frame: object) -> None:
        remove_temporary_files()
        write_last_line(f"stopped by {signal.Signals(signal_number).name}; run the same command again to continue")
        os._exit(128 + signal_number)

    for number in SIGNALS:
        signal.signal(number, end)
        # Python removes its handlers a moment before the process is over; finished work must not look interrupted.
        atexit.register(signal.signal, number, signal.SIG_IGN)


class StopRequest:
    """Whether the run was asked to stop.

    Attributes:
      signal_number: The signal that asked first, or None.
    """

    signal_number: int | None = None


@contextlib.contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second SIGINT ends the process at once, with 130."""
    request = StopRequest()

    def note(signal_number: int, frame: object) -> None:
        if request.signal_number is None:
            request.signal_number = signal_number

    # Python runs a handler only between two of its own instructions, so not while XLA compiles, which takes seconds. It
    # writes the signal's number to this pipe at once, and another thread reads it.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_end_at_the_second_interrupt, args=(reading,), daemon=True).start()
    before_pipe = signal.set_wakeup_fd(writing)
    try:
        with _handling(note):
            yield request
    finally:
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


def _end_at_the_second_interrupt(reading: int) -> None:
    interrupts = 0
    with open(reading, "rb", buffering=0) as pipe:
        while numbers := pipe.read(64):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                remove_temporary_files()
                write_last_line(AT_ONCE)
                os._exit(128 + signal.SIGINT)
