"""The commands: `python -m cnn_jax COMMAND`, installed as `cnn-jax`."""

import os
import sys

from cnn_jax.runtime.signals import end_on_signals
from cnn_jax.runtime.streams import guard_standard_streams


def program(command: str | None = None) -> None:
    """Run a command, by default the one that the first argument names, as the whole job of this process.

    A signal, too, ends it in one line.
    """
    end_on_signals()  # first, because the next import takes 0.1 s
    guard_standard_streams()
    os.environ.pop("MPLBACKEND", None)  # pictures go into files; a wrong name would end a training at its report
    from cnn_jax.runtime.errors import one_line_failures, require_environment

    with one_line_failures(debug="--debug" in sys.argv):
        require_environment()
        from cnn_jax.cli import commands

        commands.main(command=getattr(commands, command) if command else None)


if __name__ == "__main__":
    program()
