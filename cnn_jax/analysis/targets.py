"""The accelerators that a program can be compiled for on a machine without them."""

import os
import re
from typing import Any, Literal, NamedTuple

from cnn_jax.runtime.errors import UsageError, suggest

# JAX takes this share of a GPU's memory as it starts, and a program gets no more.
GPU_SHARE = 0.75
GPUS_PER_HOST = 8
# libtpu would look for its machine in the network, write logs and refuse a second process at a time, and XLA would warn
# of each value that it computes anew to save memory.
VARIABLES = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Gpu(NamedTuple):
    """A GPU for data centres, with the numbers that XLA's own descriptions of it have.

    They are in XLA's repository, in xla/backends/gpu/target_config/specs.
    """

    name: str
    compute_capability: int  # its major version
    cores: int
    fpus_per_core: int
    gigahertz: float
    memory: int
    memory_per_second: int
    l2_cache: int
    shared_memory_per_core: int

    def description(self) -> str:
        """Return XLA's `GpuTargetConfigProto` in text form."""
        return f"""
            gpu_device_info {{
              threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared_memory_per_core - 1024}
              shared_memory_per_core: {self.shared_memory_per_core}
              core_count: {self.cores} fpus_per_core: {self.fpus_per_core} clock_rate_ghz: {self.gigahertz}
              device_memory_size: {self.memory} memory_bandwidth: {self.memory_per_second}
              l2_cache_size: {self.l2_cache} cuda_compute_capability {{ major: {self.compute_capability} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.name}"
        """


class Tpu(NamedTuple):
    """A generation of TPUs.

    Attributes:
      axes: Of its network of chips.
      gibibytes: What a program gets of a chip's memory: libtpu says so where it refuses one that needs more.
      options: How libtpu makes one device of each chip.
    """

    axes: int
    gibibytes: float
    options: dict[str, Any]


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85100068864, 2039040000000, 41943040, 167936),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 84942979072, 3352320000000, 52428800, 233472),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", 9, 132, 128, 1.98, 151397597184, 4800000000000, 52428800, 233472),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 1.965, 191514411008, 7672320000000, 132644864, 233472),
}
TPUS = {
    "v4": Tpu(3, 30.75, {"chip_config_name": "megacore"}),
    "v5e": Tpu(2, 15.75, {}),
    "v5p": Tpu(3, 95.74, {}),
    "v6e": Tpu(2, 31.25, {}),
}
# Chips along an axis of the largest layouts, by their axes: v5e's and v6e's are 16x16, v5p's 16x20x28. XLA ends the
# program where it is given more.
LONGEST = {2: 16, 3: 28}


class Target(NamedTuple):
    """Accelerators that need not be here.

    Attributes:
      name: What the user calls them, such as `h100:8` or `v5e:2x2`.
      platform: Which of XLA's compilers makes their code.
      device_bytes: What a program gets of the memory of each.
      topology: Their arrangement, as that compiler names it.
      options: What else it is told of them.
    """

    name: str
    platform: Literal["cuda", "tpu"]
    device_bytes: int
    topology: str
    options: dict[str, Any]


def find_target(name: str) -> Target:
    """Return the accelerators of a name.

    Raises:
      UsageError: there are none, with the names that were perhaps meant.
    """
    kind, _, layout = name.partition(":")
    if kind in GPUS and re.fullmatch(r"|:[1-9]\d{0,3}", name.removeprefix(kind)):
        gpu, count = GPUS[kind], int(layout or 1)
        per_host = max(n for n in range(1, GPUS_PER_HOST + 1) if count % n == 0)
        topology = f"1x{count // per_host}x{per_host}"  # slices, hosts of each, GPUs of each
        options = {"topology": topology, "target_config": gpu.description()}
        return Target(name, "cuda", int(GPU_SHARE * gpu.memory), topology, options)
    if kind in TPUS and re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2})*", layout):
        tpu, shape = TPUS[kind], [int(length) for length in layout.split("x")]
        # A host has chips in two rows of two, or is the only one and has fewer.
        host = [min(length, 2) for length in shape[:2]]
        fits = len(shape) == tpu.axes and max(shape) <= LONGEST[tpu.axes]
        if fits and all(length % chips == 0 for length, chips in zip(shape, host, strict=False)):
            options = {"chips_per_host_bounds": (*host, 1), **tpu.options}
            return Target(name, "tpu", int(tpu.gibibytes * 2**30), name, options)
    raise UsageError(f"TARGET {name}: there is no such accelerator; {_suggestions(kind)}")


def _suggestions(kind: str) -> str:
    """Return the targets that were perhaps meant, or some of every kind."""
    layouts = ("111", "221")
    tpus = {kind: [f"{kind}:{'x'.join(layout[: tpu.axes])}" for layout in layouts] for kind, tpu in TPUS.items()}
    known = {kind: ", ".join(names) for kind, names in ({kind: [kind, f"{kind}:8"] for kind in GPUS} | tpus).items()}
    if kind in known:
        return f"it takes {known[kind]} and the like"
    return suggest(kind, known) or f"there are {', '.join(known.values())} and the like"


def set_up_compilers() -> None:
    """Change the environment for the compilers, which read it once: when JAX's devices are started, they are loaded."""
    os.environ.update(VARIABLES)


def compile_only_devices(target: Target) -> list[Any]:
    """Return devices of which JAX knows all that its compiler needs; nothing can run on them."""
    from jax.experimental import topologies

    set_up_compilers()
    return topologies.get_topology_desc(target.topology, target.platform, **target.options).devices
