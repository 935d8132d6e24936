"""Which device a program runs on, and where its compiled code is kept for the next start."""

import contextlib
import functools
import importlib.util
import logging
import os
import platform as system
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Literal

import jax

from cnn_jax import __version__
from cnn_jax.runtime.errors import UsageError

# What each platform's JAX wheels install, and how to get it.
_WHEELS = {
    "gpu": (("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin"), "pip install 'cnn-jax[cuda]'"),
    "tpu": (("libtpu",), "pip install 'cnn-jax[tpu]'"),
}
# XLA's flag for the same bits at each run on a GPU: sums in a fixed order, and no algorithm chosen by its time.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
# Without a GPU to ask, JAX 0.11 and later find no algorithm for a product unless it is cuBLAS's. On a GPU float32 takes
# cuBLAS's anyway, to the same bits; with the flag, cuBLAS refused bfloat16's products on an H200.
CUBLAS = "--xla_gpu_enable_triton_gemm=false"
# JAX's plugins for GPUs; without one of these files they find none.
_GPU_PLUGINS = {"xla_cuda12", "xla_cuda13", "xla_rocm7"}
_GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

# What the program's numbers, or that it runs, depend on, whatever the environment's variables say.
SETTINGS = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_threefry_partitionable": True,
    "jax_no_tracing": False,
    "jax_random_seed_offset": 0,
    "jax_disable_most_optimizations": False,
}
# They log the traceback of a failed callback, which the failure that JAX raises then has, too.
TWICE_TOLD = ("jax._src.callback", "jax._src.debugging")
_processes_of_jax: set[int] = set()  # those in which JAX was started: this one, and what it was forked from
MOST_DEVICES = 1024  # parts that a CPU can be divided into; each takes threads, and many more never start


def start_devices(platform: Literal["cpu", "gpu", "tpu"] | None, *, keep_compiled: bool = True) -> None:
    """Start JAX on a platform.

    Args:
      platform: Where to run; None for an accelerator if there is one, else the CPU.
      keep_compiled: Whether to keep compiled code on the disk, which saves seconds at the next start.

    Raises:
      UsageError: this machine or this installation has no such device, `XLA_FLAGS` cannot be understood, or this
        process computes on another platform already.
    """
    _check_variables()
    require_own_devices()
    # As the user gave them: some are set below.
    variables = _variables("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    wanted = f"--platform {platform}" if platform else variables
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    for name in TWICE_TOLD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if _has_gpu():
        fix_algorithms(attached=True)
    if keep_compiled:
        _keep_compiled_code()
    before = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]  # made by JAX as it runs
    if platform is not None:
        jax.config.update("jax_platforms", platform)
    else:
        leave_out_absent_accelerators()
    try:
        with _quiet_plugins():
            started = jax.devices()[0].platform
        _processes_of_jax.add(os.getpid())
    except Exception as error:  # a plugin lets through whatever it meets
        jax.config.update("jax_platforms", before)  # a later call may ask for another
        reason = re.split(r"\n| \((?:you may need|set JAX)", str(error))[0].strip("; ") or type(error).__name__
        modules, installation = _WHEELS.get(platform or "", ((), ""))
        missing = modules and not any(importlib.util.find_spec(module) for module in modules)
        remedy = f"it needs {installation}" if missing else "choose another platform"
        raise UsageError(f"{wanted}: JAX finds no such device here, or cannot start it ({reason}); {remedy}") from error
    if platform not in (None, started):  # JAX starts once, and then gives what it has started
        jax.config.update("jax_platforms", before)
        raise UsageError(f"--platform {platform}: this process computes on {started} already; start a new one for it")


def require_own_devices() -> None:
    """Refuse to compute in a process that was forked from one in which JAX runs: it would wait for ever.

    Raises:
      UsageError: saying how to start one that can.
    """
    if _processes_of_jax - {os.getpid()}:
        raise UsageError(
            "this process was forked from one that has used JAX, and cannot use it; start processes by "
            "multiprocessing.get_context('spawn')"
        )


def fix_algorithms(*, attached: bool) -> None:
    """Have XLA, which reads it when JAX's devices start, keep a GPU's bits the same, unless the user decides.

    Args:
      attached: Whether the GPU is here, and not only compiled for.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = (DETERMINISTIC,) if attached else (DETERMINISTIC, CUBLAS)
    added = [flag for flag in wanted if flag.partition("=")[0] not in flags]
    os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *added])


def leave_out_absent_accelerators() -> None:
    """Let JAX start the CPU alone, here and in the processes that this one starts, where it would find nothing else."""
    if has_only_cpu():
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")


def has_only_cpu() -> bool:
    """Whether accelerators' wheels are installed and JAX, left to itself, would start them in vain.

    The extra `plan` installs them on any machine.
    """
    # Where there is a TPU, JAX has chosen it when it was imported.
    if jax.config.jax_platforms or _has_gpu():  # pyright: ignore[reportAttributeAccessIssue]  # as below
        return False
    wheels = any(importlib.util.find_spec(module) for modules, _ in _WHEELS.values() for module in modules)
    return wheels and {plugin.name for plugin in entry_points(group="jax_plugins")} <= _GPU_PLUGINS


def _has_gpu() -> bool:
    return any(map(os.path.exists, _GPU_FILES))


@contextlib.contextmanager
def _quiet_plugins() -> Iterator[None]:
    """Keep plugins from reporting at length what they lack where there is no device of theirs."""
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":  # JAX sets it where it finds no TPU; libtpu would ask for these
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    logger = logging.getLogger("jax._src.xla_bridge")
    level = logger.level
    if not _has_gpu():
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.cache
def _check_variables() -> None:
    """Refuse an `XLA_FLAGS` that XLA does not understand: it would end this process, with a page of text.

    Raises:
      UsageError: naming the variable; also where a CPU is to be too many devices.
    """
    divided = re.findall(r"device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if max(jax.config.jax_num_cpu_devices, *map(int, divided), 0) > MOST_DEVICES:  # pyright: ignore[reportAttributeAccessIssue]  # made by JAX as it runs
        named = _variables("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
        raise UsageError(f"{named}: a CPU cannot be so many devices; give at most {MOST_DEVICES:,}")
    if not compiler_flags():
        return
    read_flags = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    with contextlib.suppress(OSError):  # without another process they are not checked
        read = subprocess.run(read_flags, capture_output=True, text=True, errors="replace", check=False)
        if read.returncode != 0:
            complaint = re.search(r"^[EF]\d+ .*?\] (.*)", read.stderr, re.MULTILINE)
            reason = complaint[1] if complaint else f"XLA ends with {read.returncode}"
            raise UsageError(f"{_variables('XLA_FLAGS')}: XLA does not understand it ({reason}); correct or unset it")


def compiler_flags() -> str:
    """Return the flags that the user gives XLA, on which the last bits may depend."""
    return " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in (DETERMINISTIC, CUBLAS))


def _variables(*names: str) -> str:
    """Return those of the environment's variables that are set, with their values, or the first of them."""
    return " ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name)) or names[0]


def describe_devices() -> str:
    """Return all devices in a few words, such as `cpu (2 cores)` or `8 x gpu (NVIDIA H100 80GB HBM3), 2 processes`."""
    device, count = jax.devices()[0], len(jax.devices())
    kind = f"{_cores()} cores" if device.platform == "cpu" else device.device_kind
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{f'{count} x ' if count > 1 else ''}{device.platform} ({kind}){processes}"


def describe_machine() -> str:
    """Return the processor's name and the cores that this process may use."""
    name = system.processor() or system.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = lines[0] if lines else name
    return f"{name}, {_cores()} cores"


def device_name() -> str:
    """Return the first device's name; of a CPU, the machine's."""
    device = jax.devices()[0]
    return describe_machine() if device.platform == "cpu" else device.device_kind


def versions(*packages: str) -> dict[str, str]:
    """Return the version of each package; `cnn-jax` is this program's, and `python` the interpreter's."""
    own = {"cnn-jax": __version__, "python": system.python_version()}
    return {name: own.get(name) or version(name) for name in packages}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_bytes() -> int:
    """Return the bytes of memory of one device; for a CPU, what the machine, the container and the shell allow."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics is not None and "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), resource.getrlimit(resource.RLIMIT_AS)[0]]
    cgroup = Path("/sys/fs/cgroup/memory.max")  # "max" where there is no limit
    if cgroup.is_file() and (limit := cgroup.read_text().strip()).isdigit():
        limits.append(int(limit))
    return min(limit for limit in limits if limit != resource.RLIM_INFINITY)


def _keep_compiled_code() -> None:
    """Let JAX keep compiled code on disk, which saves seconds at the next start, where that can be written."""
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]  # made by JAX as it runs
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cnn-jax" / "xla"
            str(cache).encode()
        except (RuntimeError, UnicodeEncodeError):  # there is no home folder, or JAX cannot take its name
            return
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
