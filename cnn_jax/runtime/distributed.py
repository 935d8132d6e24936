"""Several processes, on one host or many, that train one run together.

Process 0 prints and writes. It does so inside `on_process_0`, which passes its result or its failure to the others.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cnn_jax.runtime.errors import CnnJaxError, HostLostError, UsageError, describe_failure, with_tracebacks
from cnn_jax.runtime.streams import separate_libraries, write_last_line

T = TypeVar("T")

# A process that died without closing its connections, as when its host loses power, is noticed after this time.
HEARTBEAT_SECONDS = 20
START_SECONDS = 120
# Process 0 ends this much later than the others, because JAX aborts them when the service that lives in it is gone.
# They need a few milliseconds.
GRACE_SECONDS = 0.5
_leaving = threading.Lock()
_working_alone = threading.Event()  # set while this process works and the others wait for it
_on_abort: Any = None  # kept, because C calls it


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Train together with the other processes of the run, if there are any, until the block ends.

    The arguments name them, or else a TPU pod or a SLURM job does. If they do not find each other within
    `START_SECONDS`, the process ends with 2; JAX itself would abort it. A failure in the block then ends the process at
    once, with its line and its exit code, because a normal exit from Python would wait for the others.

    Args:
      coordinator: Where process 0 is, `HOST:PORT`; None to look for a cluster.
      num_processes: How many processes there are.
      process_id: Which of them this is.
    """
    if coordinator is None and not _in_a_cluster():
        yield
        return
    _join(coordinator, num_processes, process_id)
    try:
        with _lost_hosts_reported():
            yield
    except Exception as error:
        if with_tracebacks.get():
            traceback.print_exc()
        sys.stdout.flush()
        grace = 0
        with contextlib.suppress(RuntimeError):  # there is no device to ask which process this is
            grace = GRACE_SECONDS if is_process_0() else 0
        _leave_at_once(*describe_failure(error), grace)


def _require_free_port(coordinator: str) -> None:
    """Refuse a port at which this process cannot listen: JAX dies of that, or shares it with another run."""
    port = coordinator.rpartition(":")[2]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        return  # JAX refuses it
    try:
        socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = os.strerror(error.errno)
            line = f"--coordinator {coordinator}: process 0 cannot listen there ({reason}); give another port"
            raise UsageError(line) from error
    except ValueError:  # this machine has no addresses of version 6
        pass


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator is not None and process_id == 0:
        _require_free_port(coordinator)
    watchdog = threading.Timer(START_SECONDS, _give_up, args=(coordinator or "the cluster",))
    watchdog.daemon = True
    watchdog.start()
    # If no collective fails first, a JAX thread notices the lost process and aborts this one. No option disables that,
    # and a Python signal handler would run too late. Its log is a page, and says first why.
    global _on_abort
    log, debug = separate_libraries(), with_tracebacks.get()
    _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _report_abort(log, debug))
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=2 * START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (TypeError, ValueError) as error:  # the options, or what a cluster's environment says
        found = f"--coordinator {coordinator}" if coordinator else "the cluster's environment"
        reason = str(error).partition("\n")[0][:120]
        raise UsageError(f"{found} does not name the processes of this run ({reason}); correct it") from error
    finally:
        watchdog.cancel()


def _give_up(place: str) -> None:
    line = (
        f"error: the processes of this run do not find each other at {place}; start the same command once for each "
        "--process-id, with a --coordinator that all of them reach"
    )
    _leave_at_once(line, UsageError.exit_code)


def _report_abort(log: int, debug: bool) -> NoReturn:
    told = ""
    with contextlib.suppress(BlockingIOError):  # nothing
        told = os.read(log, 2**16).decode(errors="replace")
    if debug:
        write_last_line(told)
    status = re.search(r"absl::Status: (\w+): ([^\n]{1,120}?)[.\n]", told) or ["", "", "no reason given"]
    if status[1] in ("ALREADY_EXISTS", "INVALID_ARGUMENT"):
        line = (
            f"error: processes of this run have the same --process-id, or different --num-processes ({status[2]}); "
            "start the same command once for each --process-id"
        )
        _leave_at_once(line, UsageError.exit_code)
    line = (
        "error: JAX ended this process, as it does when another process of this run is gone or was started again "
        f"({status[2]}); start all of them again, once each, to continue from the newest checkpoint"
    )
    _leave_at_once(line, HostLostError.exit_code)


def _leave_at_once(line: str, exit_code: int, seconds: float = 0) -> NoReturn:
    """End the process, `seconds` after its line; another thread that would do so too waits for that."""
    _leaving.acquire()
    write_last_line(line)
    time.sleep(seconds)
    os._exit(exit_code)


def _in_a_cluster() -> bool:
    # A job of several tasks has these in its environment. JAX finds the rest, and waits for the others.
    tasks = os.environ.get("SLURM_NTASKS", "1")
    tpu_hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return ("SLURM_STEP_NODELIST" in os.environ and tasks != "1") or "," in tpu_hosts


def is_process_0() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def may_wait() -> bool:
    """Whether this process, if it does nothing, waits for another one, and not for its own disk."""
    return jax.process_count() > 1 and not _working_alone.is_set()


def on_process_0(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in process 0 alone, and return its result, or raise its failure, in every process."""
    if jax.process_count() == 1:
        return function(*arguments)
    outcome = b""
    if is_process_0():
        _working_alone.set()
        try:
            outcome = pickle.dumps((function(*arguments), None))
        except (CnnJaxError, OSError) as error:
            outcome = pickle.dumps((None, error))
        finally:
            _working_alone.clear()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(outcome))))
    padded = np.frombuffer(outcome.ljust(length, b"\0"), np.uint8)
    result, failure = pickle.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))
    if failure is not None:
        raise failure
    return result


def all_gather(*numbers: int) -> np.ndarray:
    """Return every process's numbers, (processes, len(numbers)), in every process."""
    mine = np.array(numbers, np.int32)
    return mine[np.newaxis] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(mine))


def require_agreement(value: object, what: str) -> None:
    """Refuse, in every process, what is not the same in all of them: they would wait for each other forever.

    Raises:
      UsageError: naming what differs.
    """
    mine = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:4], "big") >> 1  # fits an int32
    if len({*all_gather(mine).ravel().tolist()}) > 1:
        raise UsageError(
            f"the processes of this run have different {what}; start the same command once for each --process-id"
        )


@contextlib.contextmanager
def _lost_hosts_reported() -> Iterator[None]:
    """Report in one line that another process is gone, if waiting for it fails.

    Raises:
      HostLostError: in place of JAX's own exception.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # On a CPU the failure of a collective comes as either.
        if isinstance(error, ValueError) and "Gloo" not in str(error):
            raise
        raise HostLostError(
            f"another process of this run is gone ({str(error).splitlines()[0][:120]}); start all of them again to "
            "continue from the newest checkpoint"
        ) from error
