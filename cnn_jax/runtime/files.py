"""Files that are whole at any instant: replaced atomically, on the disk when a call returns, locked by one process."""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from cnn_jax.runtime.errors import ALLOW_LARGER, InputFileError, StorageError

# The name of a temporary file: never another process's, and as short beside a long name as beside a short one.
TEMPORARY = ".cnn-jax-{}.tmp"
MOST_BYTES = 2**28  # of what is read as a whole: records, tables of results, the user's code
MOST_NEW_FOLDERS = 200  # pathlib calls itself for each
PATH_WITHIN = "/n" * 128  # as long as what libraries write within a folder may be called
_temporary_files: set[Path] = set()  # those of this process


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Let what fails in the block name a file: reading and writing name none, or a temporary one."""
    try:
        yield
    except OSError as error:
        error.filename = str(file)
        raise


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replace a file so that a reader finds the old content or the new, whenever the power fails.

    Raises:
      OSError: naming the file, if it could not be written.
    """
    with _named(file), replaced(file) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def read_file(file: Path) -> bytes:
    """Return what is in a file.

    Raises:
      OSError: naming the file; it cannot be read, or is a folder, a device or a pipe.
      InputFileError: no file that is read here is so large.
    """
    with _named(file):
        target = _target(file)
        if (size := target.stat().st_size) > MOST_BYTES:
            raise InputFileError(f"{file} is damaged: it has {size:,} bytes; put back what it was, or move it away")
        return target.read_bytes()


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Give an empty file to be written, which takes a file's place when the block ends, unless that raises.

    A link stays, and what it leads to is replaced. However the block ends, the new file is gone; where the process was
    killed, the next one that replaces a file in the same folder removes it.

    Raises:
      OSError: it cannot be made or replaced, or is a folder, a device or a pipe.
    """
    target = _target(file)
    stream = _locked_temporary_file(target)
    new = Path(stream.name)
    try:
        with stream:
            _remove_abandoned(target.parent)
            yield new
            os.fsync(stream.fileno())
            new.replace(target)
            sync(target.parent)
    finally:
        new.unlink(missing_ok=True)
        _temporary_files.discard(new)


def _locked_temporary_file(target: Path) -> BinaryIO:
    """Make a temporary file beside another and lock it, so that no other process takes it for abandoned."""
    while True:
        new = target.with_name(TEMPORARY.format(secrets.token_hex(4)))
        stream = new.open("xb")
        _temporary_files.add(new)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        if os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()  # it was removed before it was locked
        _temporary_files.discard(new)


def remove_temporary_files() -> None:
    """Remove this process's temporary files, before it ends at once."""
    for new in tuple(_temporary_files):
        with contextlib.suppress(OSError):
            new.unlink()


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of killed processes: those that nobody has locked."""
    for path in folder.glob(TEMPORARY.format("[0-9a-f]" * 8)):
        with contextlib.suppress(OSError), path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _target(file: Path) -> Path:
    """Return what a path leads to, which need not exist.

    Raises:
      OSError: it is a folder, a device or a pipe.
    """
    target = Path(os.path.realpath(file))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a folder, a device or a pipe, not a file", str(file))
    return target


def check_output_file(file: Path, option: str) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Raises:
      StorageError: naming the file, the reason and the option to change.
    """
    with output_errors(file, option):
        _check_folder(_target(file).parent)
        for stream in (1, 2):
            if file.exists() and os.path.samestat(file.stat(), os.fstat(stream)):
                raise OSError(errno.EINVAL, "the program prints there")


def check_output_folder(folder: Path, option: str) -> None:
    """Refuse a folder that could not be made, or in which nothing could be written, as `check_output_file` does.

    Raises:
      StorageError: likewise.
    """
    path = folder.absolute()
    with output_errors(folder, option):
        present = next(each for each in (path, *path.parents) if os.path.lexists(each))
        missing = path.parts[len(present.parts) :]
        if len(missing) > MOST_NEW_FOLDERS:
            raise OSError(f"{len(missing):,} folders, each in the one before, would have to be made")
        # What is missing is asked for by each name alone and by the whole path, which the system limits both.
        for name in (*missing, os.path.realpath(folder) + PATH_WITHIN):
            with contextlib.suppress(FileNotFoundError):
                os.lstat(present / name)
        _check_folder(present)


def _check_folder(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):  # tells more than permissions do, and has no name
        pass


@contextlib.contextmanager
def output_errors(path: Path, option: str) -> Iterator[None]:
    """Report in a line that what an option names cannot be written.

    Raises:
      StorageError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        limited = f"{ALLOW_LARGER}, or " if error.errno == errno.EFBIG else ""
        raise StorageError(
            f"cannot write {path} ({error.strerror or error}); {limited}give another {option}"
        ) from error


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


def identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file or a folder from any other that may take its name; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def require_in_place(path: Path, before: tuple[int, int] | None) -> None:
    """Refuse to write where a file or a folder is gone or another, which may be another process's.

    Args:
      path: Of something in a run's folder.
      before: Its `identity` when this process began.

    Raises:
      StorageError: naming it.
    """
    if identity(path) != before:
        raise StorageError(
            f"{path} is gone or another: its folder was moved, removed or replaced while it was in use; "
            "run the same command again for where it is now"
        )


def first_free(paths: Iterable[Path]) -> Path:
    """Return the first path at which there is nothing."""
    return next(path for path in paths if not path.exists())


class AlreadyLockedError(Exception):
    """Somebody else holds a lock.

    Attributes:
      holder: Who, such as `process 123`.
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
      AlreadyLockedError: another process or thread holds it, and this one does not wait.
      OSError: it cannot be written, or is a link, a folder, a device or a pipe.
    """
    _target(file)

    def open_itself(path: str, flags: int) -> int:  # a link could lead to a file that is somebody's
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)

    # Unbuffered, so that closing writes nothing, whose failure would have no name.
    with open(file, "a+b", buffering=0, opener=open_itself) as stream:
        try:
            with _named(file):
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            stream.seek(0)
            number = stream.read().decode(errors="replace").strip() or "?"
            itself = number == str(os.getpid())
            raise AlreadyLockedError("another thread" if itself else f"process {number}") from error
        if os.fstat(stream.fileno()).st_nlink == 0:  # who held it until now has removed it
            with locked(file, wait=wait):
                yield
            return
        with _named(file):
            stream.truncate(0)
            stream.write(f"{os.getpid()}\n".encode())
        yield
