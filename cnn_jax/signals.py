"""How a run learns that it should stop: SIGINT (Ctrl-C) and SIGTERM set a flag that it reads between segments."""

import contextlib
import signal
from collections.abc import Iterator


class StopRequest:
    """Whether the run was asked to stop.

    Attributes:
      signal_number: The signal that asked, or None.
    """

    signal_number: int | None = None


@contextlib.contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second SIGINT interrupts at once."""
    request = StopRequest()

    def note(signal_number: int, frame: object) -> None:
        if signal_number == signal.SIGINT and request.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_number = signal_number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
