"""Which device a program runs on, and where its compiled code is kept for the next start."""

import os
from pathlib import Path
from typing import Literal

import jax

from cnn_jax.errors import UsageError


def start_devices(platform: Literal["cpu", "gpu", "tpu"] | None) -> jax.Device:
    """Start JAX on a platform and return the device that a run uses.

    Args:
      platform: Where to run; None for an accelerator if there is one, else the CPU.

    Raises:
      UsageError: this machine or this installation has no such device.
    """
    _keep_compiled_code()
    if platform is not None:
        jax.config.update("jax_platforms", platform)
    try:
        return jax.devices()[0]
    except RuntimeError as error:
        extra = {
            "gpu": "; on an NVIDIA GPU it needs pip install 'cnn-jax[cuda]'",
            "tpu": "; it needs cnn-jax[tpu]",
        }
        wanted = f"--platform {platform}" if platform else f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        raise UsageError(f"{wanted}: JAX finds no such device here{extra.get(platform, '')}") from error


def describe_device(device: jax.Device) -> str:
    """Return a device's kind in a few words, such as `cpu (2 cores)` or `gpu (NVIDIA H100 80GB HBM3)`."""
    if device.platform == "cpu":
        return f"cpu ({len(os.sched_getaffinity(0))} cores)" if hasattr(os, "sched_getaffinity") else "cpu"
    return f"{device.platform} ({device.device_kind})"


def _keep_compiled_code() -> None:
    """Let JAX keep what it compiles on disk: the next start then takes seconds less."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cnn-jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
