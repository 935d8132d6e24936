"""The failures that a user can cause or meet, their exit codes, and how they are reported."""

import contextlib
import contextvars
import difflib
import errno
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator

from cnn_jax.runtime.streams import printable


class CnnJaxError(Exception):
    """A failure that ends the program with one line, which names the problem and the remedy."""

    exit_code = 8  # that of a failure that no subclass foresees: the program's own

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(CnnJaxError):
    """The command line is wrong, or its settings do not fit the data, the machine or the run."""

    exit_code = 2


class NoCheckpointError(CnnJaxError):
    """There is no checkpoint that could be used."""

    exit_code = 3


class StorageError(CnnJaxError):
    """Reading or writing failed."""

    exit_code = 4


class NonFiniteLossError(CnnJaxError):
    """The loss became infinite or not a number."""

    exit_code = 5


class RunLockedError(CnnJaxError):
    """Another process is writing the run."""

    exit_code = 6


class HostLostError(CnnJaxError):
    """Another process of the same run, on this host or on another, is gone."""

    exit_code = 7


class InputFileError(CnnJaxError):
    """A file that was given as input is missing, damaged or not what it says it is."""

    exit_code = 65


class TargetAccuracyError(CnnJaxError):
    """The run ended below `--target-accuracy`."""

    exit_code = 70


class StopSignalError(CnnJaxError):
    """The run was asked to stop and did so after saving: 128 and the signal's number, such as 143 for SIGTERM."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


ALLOW_LARGER = "allow larger files (ulimit -f)"  # the remedy of EFBIG, which says nothing of the room there is


def suggest(word: str, known: Iterable[str]) -> str:
    """Return which of the known words was perhaps meant, as a part of a failure's line; nothing if none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"perhaps you meant {near[0]}" if near else ""


# Whether a failure shows its traceback.
with_tracebacks = contextvars.ContextVar("with_tracebacks", default=False)


@contextlib.contextmanager
def one_line_failures(debug: bool) -> Iterator[None]:
    """End the program with one line on stderr and the failure's exit code.

    Args:
      debug: Show its traceback first.
    """
    with_tracebacks.set(debug)
    try:
        yield
    except (Exception, KeyboardInterrupt, GeneratorExit) as error:  # the last from code of the user's
        if debug:
            traceback.print_exc()
        line, exit_code = describe_failure(error)
        print(line, file=sys.stderr, flush=True)
        sys.exit(exit_code)


def describe_failure(error: BaseException) -> tuple[str, int]:
    """Return the line that reports a failure, and the exit code that it ends the program with."""
    reason = text_of(error).partition("\n")[0]
    name = type(error).__name__
    exit_code = CnnJaxError.exit_code
    if isinstance(error, StopSignalError):
        line, exit_code = str(error), error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        line, exit_code = "stopped by SIGINT; run the same command again", 128 + signal.SIGINT
    elif isinstance(error, CnnJaxError):
        line, exit_code = f"error: {error}", error.exit_code
    elif isinstance(error, OSError):
        file = f" {error.filename}" if error.filename else ""
        told = f"error: cannot read or write{file}: {error.strerror or error}"
        line, exit_code = f"{told}; {_remedy(error)}", StorageError.exit_code
    elif isinstance(error, UnicodeEncodeError):
        line = f"error: cannot read or write {error.object!a:.200} in {error.encoding}; set PYTHONUTF8=1 or rename it"
        exit_code = StorageError.exit_code
    elif place_and_reason := _failed_callback(error):
        line, exit_code = f"error: a callback failed in {place_and_reason}", UsageError.exit_code
    elif isinstance(error, FloatingPointError):  # with JAX_DEBUG_NANS
        line = f"error: the loss is not finite ({reason}); lower --learning-rate"
        exit_code = NonFiniteLossError.exit_code
    elif forbids_transfers(error):
        line = f"error: JAX_TRANSFER_GUARD forbids what the program does ({reason}); unset it"
        exit_code = UsageError.exit_code
    elif lacks_memory(error):
        remedy = "allow more, or ask for less (in a training, of --batch-size, --features or --seeds)"
        line = f"error: the memory does not suffice ({reason or name}); {remedy}"
        exit_code = UsageError.exit_code
    elif place := _failing_own_code(error):
        line, exit_code = f"error: {place}: {name}: {reason}; correct it", UsageError.exit_code
    elif isinstance(error, ImportError):
        line = f"error: cannot load {error.name or 'a library'} ({reason}); install cnn-jax anew, or allow more memory"
        exit_code = UsageError.exit_code
    elif _jax_is_half_imported() and (variables := _jax_variables()):
        line = f"error: JAX does not start with {variables} ({reason}); unset what is wrong"
        exit_code = UsageError.exit_code
    elif library := _failing_import(error):
        line = f"error: cannot load {library} ({reason}); see to the environment's variables and the folders they name"
        exit_code = UsageError.exit_code
    elif variables := _jax_variables(*PLACES):
        told = f"error: the program fails with {variables} ({name}: {reason})"
        line = f"{told}; unset that, and report what fails without"
        exit_code = UsageError.exit_code
    else:
        told = " ".join(text_of(error).split())
        line = f"error: the program failed, {name}: {told}; please report it with what --debug shows"
    return printable(line), exit_code


# Below these, NumPy, JAX or Python itself ends the process, or fails anywhere, without a word of the limit.
LEAST = {
    "memory (ulimit -v)": (resource.RLIMIT_AS, 2**32),  # bytes; 3.3 GiB do not suffice for a small training
    "data (ulimit -d)": (resource.RLIMIT_DATA, 2**29),
    "open files (ulimit -n)": (resource.RLIMIT_NOFILE, 64),  # a training has up to 30 open
}
MOST_FILES = 4096  # all that the page's connections need, too


def require_environment() -> None:
    """Refuse limits and a mode of Python that the program cannot work with; open files are allowed as far as may be.

    Raises:
      UsageError: naming it, and how much is needed.
    """
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems allow fewer than they say
        if 0 <= files < MOST_FILES:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(MOST_FILES, most % 2**63), most))
    for name, (limit, least) in LEAST.items():
        if 0 <= (now := resource.getrlimit(limit)[0]) < least:
            raise UsageError(f"the limit of {now:,} on {name} does not suffice; allow at least {least:,}")
    if sys.flags.optimize > 1:
        raise UsageError(
            "Python leaves out the docstrings, which are the help; unset PYTHONOPTIMIZE, or do not use -OO"
        )


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _remedy(error: OSError) -> str:
    """Return what to do where the system refused to read or write."""
    if error.filename == "standard output":
        return "the work is done: run the same command again where it can be written"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "make room there"
        case errno.EFBIG:
            return ALLOW_LARGER
        case errno.EMFILE | errno.ENFILE:
            return "allow more open files"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "see to its permissions"
        case errno.ENOLCK | errno.ENOTSUP:
            return "choose a folder on a file system with locks"
        case errno.ENAMETOOLONG:
            return "give a shorter name"
        case errno.ENOENT if error.filename is None and "temporary directory" in str(error):
            return f"set TMPDIR to a folder that can be written, or {ALLOW_LARGER}"  # Python tried to write in each
        case errno.ENOENT if error.filename is None and not _has_current_folder():
            return "the current folder is gone: change to another"
        case errno.ENOENT:
            return "see that it and its folder stay there"
        case errno.EEXIST | errno.EISDIR | errno.ENOTDIR | errno.ELOOP | errno.EINVAL:
            return "move away what is in its place"
    return "see to the disk"


def _failed_callback(error: BaseException) -> str:
    """Return where a Python function that compiled code calls back failed, and why; nothing if none did.

    Only the user's own networks and recipes have such functions. JAX raises their failure as text.
    """
    text = r"CpuCallback error.*\n  File \"([^\n]*)\", line (\d+), in [^\n]*\n([^\n]*)"
    failed = re.search(text, text_of(error), re.DOTALL)
    return "{}, line {}: {}".format(*failed.groups()) if failed else ""


# The names of the modules that the user's own networks and recipes are loaded as begin so.
OWN_MODULE = "cnn_jax_own_code_"


def _failing_own_code(error: BaseException) -> str:
    """Return which line of the user's own network or recipe failed; nothing if none did."""
    own = {module.__file__ for name, module in tuple(sys.modules.items()) if name.startswith(OWN_MODULE)}
    frame = last_frame_in(own, error)
    return f"{frame.filename}, line {frame.lineno}" if frame else ""


def last_frame_in(files: Collection[str | None], error: BaseException) -> traceback.FrameSummary | None:
    """Return where in some files an error was raised, or went through last; None if it did not."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame for frame in reversed(frames) if frame.filename in files), None)


def text_of(error: BaseException) -> str:
    """Return what an exception says of itself; nothing where that fails, as in code of the user's."""
    with contextlib.suppress(Exception):
        return str(error)
    return ""


def lacks_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or XLA did not get the memory, or the thread, that it asked for."""
    told = text_of(error)  # where a compiled function's call fails, XLA's own words stand before these
    says_so = any(words in told for words in ("RESOURCE_EXHAUSTED", "Out of memory", "can't start new thread"))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and says_so)


def forbids_transfers(error: BaseException) -> bool:
    """Whether JAX_TRANSFER_GUARD forbade what the program does."""
    told = text_of(error)
    return "Disallowed" in told and "transfer" in told


def lacks_access(error: BaseException) -> bool:
    """Whether the machine refused what is needed to read a file, which says nothing of what is in it."""
    codes = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)
    return any(os.strerror(code).lower() in str(error).lower() for code in codes)


def _failing_import(error: BaseException) -> str:
    """Return the library whose import raised this, because of what it met in the environment; nothing if none did."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if frame.f_code.co_name == "<module>" and package not in ("__main__", "cnn_jax"):
            return package
    return ""


# Those that decide where JAX computes and keeps what it has compiled, and nothing else.
PLACES = ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


def _jax_is_half_imported() -> bool:
    return "jax" not in sys.modules and "jax._src" in sys.modules


def _jax_variables(*others: str) -> str:
    """Return the variables of the environment that JAX is set up with, but for the others."""
    named = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("JAX_") and name not in others]
    return ", ".join(named)
