"""Standard input, output and error: what a terminal would obey is escaped, and no failure to write raises or is lost.

stdout carries results: that they did not get there is reported when the work is done and saved. stderr carries what is
said of the work, which goes on without it.
"""

import codecs
import contextlib
import io
import logging
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO


def printable(text: str) -> str:
    r"""Return a text in one line that changes nothing but itself on a terminal.

    Control characters, those that turn the direction of writing, and others without a shape are escaped as in Python:
    `\x1b`. So are the bytes of a file's name that are not text.
    """
    if text.isprintable():  # such as a picture of megabytes in a page
        return text
    return "".join(each if each.isprintable() else _escape(each) for each in text)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # Python's name for a byte of a file's name that is not text
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


# How what draws tables and pictures is written in an encoding that lacks it.
PLAIN = str.maketrans("─━│┌┐└┘├┤┬┴┼▄▀█", "--|+++++++++.'#") | {ord("±"): "+/-"}


def _write_plainly(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks, for `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("plainly", _write_plainly)


class _Descriptor(io.FileIO):
    """A descriptor whose first failure to write is kept and not raised."""

    failure: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            while (written := super().write(content)) is None:  # somebody made it not block, and it is full
                select.select([], [self], [])
            return written
        except OSError as error:
            self.failure = self.failure or error
            return len(content)  # of bytes


class OutputStream(io.TextIOWrapper):
    """A stream of text to a descriptor; it takes whatever is written.

    What its encoding lacks is drawn otherwise or escaped. What cannot be written is dropped.
    """

    def __init__(self, descriptor: int, encoding: str | None, *, line_buffering: bool = False):
        """Write to a descriptor, in an encoding or else the system's, and at once if `line_buffering` or a terminal."""
        self._descriptor = _Descriptor(descriptor, "w", closefd=False)
        try:
            "a..b─\n".encode(encoding or "utf-8", "plainly")
        except Exception:  # an encoding of something else than text, which raises any type
            encoding = "utf-8"
        super().__init__(
            io.BufferedWriter(self._descriptor),
            encoding,
            errors="plainly",
            line_buffering=line_buffering or self._descriptor.isatty(),
        )

    @property
    def failure(self) -> OSError | None:
        """The first failure to write, if there was one."""
        return self._descriptor.failure


def guard_standard_streams() -> None:
    """Make this process's streams usable, be they closed, full, broken, or of an encoding that lacks characters."""
    if sys.stdin is None:
        sys.stdin = os.fdopen(_stand_in(os.O_WRONLY))
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream: TextIO | None = getattr(sys, name)
        output = _stand_in(os.O_RDONLY) if stream is None else descriptor
        encoding = None if stream is None else stream.encoding
        setattr(sys, name, OutputStream(output, encoding, line_buffering=name == "stderr"))


def _stand_in(flags: int) -> int:
    """Open what fails as a closed stream does: for reading, where it is written to, and the other way round."""
    # It gets the closed stream's number, the lowest that is free, which the next file to be opened would get.
    descriptor = os.open(os.devnull, flags)
    os.set_inheritable(descriptor, True)
    return descriptor


def write_failure(stream: TextIO) -> OSError | None:
    """Return why something that was written to a guarded stream did not get there, or None if everything did."""
    stream.flush()
    return stream.failure if isinstance(stream, OutputStream) else None


@contextlib.contextmanager
def results_delivered() -> Iterator[None]:
    """Report, where the block ends well, what it has written to stdout in vain.

    Raises:
      OSError: naming stdout.
    """
    try:
        yield
    except SystemExit as end:  # --help and --version end so
        if not end.code:
            _require_delivery()
        raise
    _require_delivery()


def _require_delivery() -> None:
    if failure := write_failure(sys.stdout):
        raise OSError(failure.errno, failure.strerror, "standard output")


@contextlib.contextmanager
def stderr_of_libraries_closed() -> Iterator[None]:
    """Send nowhere what a library in C writes to stderr within the block, where Python must not write to it."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


_stderr = 2  # what write_last_line writes to


def separate_libraries() -> int:
    """Leave stdout and stderr to Python: what libraries in C write to stdout is lost, what they write to stderr piped.

    Gloo reports its connections on stdout, and JAX fills pages of stderr before it ends a process.

    Returns:
      The pipe's descriptor, which holds the first 64 KiB and never blocks; the rest is dropped.
    """
    global _stderr
    kept, _stderr, stderr = os.dup(1), os.dup(2), sys.stderr
    sys.stdout.flush()
    sys.stdout = OutputStream(kept, sys.stdout.encoding, line_buffering=True)
    sys.stderr = OutputStream(_stderr, stderr.encoding, line_buffering=True)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is stderr:
            handler.setStream(sys.stderr)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(writing, 2)
    os.close(nowhere)
    os.close(writing)
    return reading


def write_last_line(line: str) -> None:
    """Write a line to stderr in one piece, past Python's streams, in a signal's handler or any thread."""
    with contextlib.suppress(OSError):
        os.write(_stderr, f"{line}\n".encode(errors="backslashreplace"))
