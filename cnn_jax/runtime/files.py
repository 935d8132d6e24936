"""Files that are whole at any instant: replaced atomically, on the disk when a call returns, locked by one process."""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replace a file so that a reader finds the old content or the new, whenever the power fails.

    Raises:
      OSError: naming the file, if it could not be written.
    """
    new = file.with_name(file.name + ".new")
    try:
        with new.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(file)
        sync(file.parent)
    except OSError as error:
        error.filename = str(file)  # the user does not know the temporary one
        raise


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until a folder and everything in it are on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def first_free(paths: Iterable[Path]) -> Path:
    """Return the first path at which there is nothing."""
    return next(path for path in paths if not path.exists())


class AlreadyLockedError(Exception):
    """Another process holds a lock.

    Attributes:
      holder: The number of that process, or `?`.
    """

    def __init__(self, holder: str):
        super().__init__(holder)
        self.holder = holder


@contextlib.contextmanager
def locked(file: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock a file; the system releases it however the process ends.

    Args:
      file: Made if it is missing; holds the number of the process that holds it.
      wait: Wait for another process to release it.

    Raises:
      AlreadyLockedError: another process holds it, and this one does not wait.
    """
    with file.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            stream.seek(0)
            raise AlreadyLockedError(stream.read().strip() or "?") from error
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield
