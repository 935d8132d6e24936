"""Time a training step in every variant, all in turn within one run, and measure the machine's limit."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.analysis.plots import plot_benchmark
from cnn_jax.core.training import loop_steps
from cnn_jax.data.loading import load_dataset
from cnn_jax.pytorch.compare import PACKAGES
from cnn_jax.pytorch.processes import Round, Startup, StartupFailure, start_worker, time_variant
from cnn_jax.pytorch.variants import BATCH_SIZE, VARIANTS, Variant
from cnn_jax.runtime.devices import describe_machine, device_name, start_devices, versions
from cnn_jax.runtime.display import Display, describe_seconds, escape_markdown, markdown_table
from cnn_jax.runtime.files import first_free, read_file, write_atomically
from cnn_jax.runtime.records import decode

# What brings TensorFlow, under either name, where somebody has installed it.
TENSORFLOW_PACKAGES = ("tensorflow", "tensorflow-cpu", "keras")
# On an accelerator as many as its compiled loop has for an epoch of MNIST, which takes as long for fewer.
STEPS_PER_ROUND = {"cpu": 16, "gpu": loop_steps(600), "tpu": loop_steps(600)}
STEPS_OF_15_EPOCHS = 9000
# The fewest bytes that a step moves per weight: it reads and writes the weight and Adam's two moments, and writes and
# reads the gradient.
BYTES_PER_WEIGHT = 4 * 8


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least time that a step in float32 takes on this machine.

    Attributes:
      flops: Floating-point operations of a step's matrix products.
      bytes: The fewest bytes that a step moves.
      flops_per_second: Measured on float32 matrix products, the best of four shapes, alone and in a fusion.
      bytes_per_second: Measured on a copy.
      milliseconds: The larger of the two quotients.
    """

    flops: int
    bytes: int
    flops_per_second: float
    bytes_per_second: float
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """The measurements of one variant.

    Attributes:
      framework: As in `Variant`.
      dtype: The operands' type.
      import_seconds: As in `Startup`, like the next two.
      load_seconds: Loading the data set.
      first_step_seconds: The first step, compilation included.
      peak_bytes: The process's peak memory.
      milliseconds: Per step, the median of the rounds.
      low: Their first quartile.
      high: Their third quartile.
      all: The milliseconds per step of each round.
    """

    framework: str
    dtype: str
    import_seconds: float
    load_seconds: float
    first_step_seconds: float
    peak_bytes: int
    milliseconds: float
    low: float
    high: float
    all: list[float]


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """A whole benchmark, as its JSON file holds it.

    Attributes:
      date: The day, such as 2026-11-25.
      machine: The processor and its cores.
      device: What the steps ran on.
      versions: The version of each package.
      rounds: How often each variant was measured.
      steps_per_round: Steps per measurement.
      floor: The machine's limit.
      variants: The measurements of each variant by its name.
      left_out: Why a variant could not run here, by its name.
    """

    date: str
    machine: str
    device: str
    versions: dict[str, str]
    rounds: int
    steps_per_round: int
    floor: Floor
    variants: dict[str, Timing]
    left_out: dict[str, str]


def benchmark(*, rounds: int, output: Path, data_dir: Path | None = None) -> None:
    """Measure every variant and write the table, the JSON and the plot."""
    display = Display()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share a GPU's memory
    start_devices(None, keep_compiled=False)
    load_dataset("mnist", None, data_dir)  # prepares it, so that each process only loads it
    floor = measure_floor()
    display.say(f"floor: {floor.milliseconds:.2f} ms per step")
    platform = jax.default_backend()
    steps = STEPS_PER_ROUND[platform]
    variants = [variant for variant in VARIANTS if variant.platform in (None, platform)]
    machine, versions_here = describe_machine(), versions(*PACKAGES, *filter(_is_installed, TENSORFLOW_PACKAGES))
    output.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w]+", "-", f"{device_name()}-{time.strftime('%Y-%m-%d')}").strip("-").lower()
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    file = first_free(output / f"{each}.json" for each in names)  # an earlier result of the day is kept
    text = ""
    for number, (timings, left_out) in enumerate(_measure_in_turn(variants, rounds, steps, data_dir, display), start=1):
        result = BenchmarkResult(
            date=time.strftime("%Y-%m-%d"),
            machine=machine,
            device=device_name(),
            versions=versions_here,
            rounds=number,
            steps_per_round=steps,
            floor=floor,
            variants=timings,
            left_out=left_out,
        )
        # After each round: a benchmark that is stopped keeps those that it has measured.
        write_atomically(file, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
        text = write_report(result, file.with_suffix(".md"))
    display.say(*text.splitlines())
    display.say(f"written to {file.with_suffix('.md')}")


def read_result(file: Path) -> BenchmarkResult:
    """Read the JSON file of a benchmark."""
    return decode(read_file(file), BenchmarkResult, source=file, remedy="run the benchmark again")


def measure_floor() -> Floor:
    """Measure the least time that this machine needs for a step in float32."""
    block_1, block_2, fc = (2 * BATCH_SIZE * n for n in (28 * 28 * 9 * 32, 14 * 14 * 288 * 64, 3136 * 10))
    flops = 2 * block_1 + 3 * block_2 + 3 * fc  # block 1 needs no gradient with respect to the images
    moved = BYTES_PER_WEIGHT * 50_186 + BATCH_SIZE * 28 * 28
    # XLA multiplies a product alone and one with a sum behind it by different libraries.
    alone = jax.jit(lambda left, right: jnp.matmul(left, right, precision="highest"))
    fused = jax.jit(lambda left, right: jnp.matmul(left, right, precision="highest") + 1)
    rates = []
    for m, k, n in ((19_600, 288, 64), (19_600, 64, 288), (288, 19_600, 64), (2048, 2048, 2048)):
        left, right = jnp.ones((m, k), jnp.float32), jnp.ones((k, n), jnp.float32)
        rates += [2 * m * k * n / _fastest(multiply, left, right) for multiply in (alone, fused)]
    source = jnp.ones(2**26, jnp.float32)
    bandwidth = 2 * source.nbytes / _fastest(jax.jit(lambda array: array + 1), source)
    return Floor(
        flops=flops,
        bytes=moved,
        flops_per_second=max(rates),
        bytes_per_second=bandwidth,
        milliseconds=1e3 * max(flops / max(rates), moved / bandwidth),
    )


def _fastest(function: Callable[..., jax.Array], *arguments: jax.Array, repeats: int = 10) -> float:
    """Return the seconds of the fastest call; the first one, which compiles, does not count."""
    function(*arguments).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*arguments).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


def _measure_in_turn(
    variants: Sequence[Variant], rounds: int, steps: int, data_dir: Path | None, display: Display
) -> Iterator[tuple[dict[str, Timing], dict[str, str]]]:
    """Yield after each round every variant's timing by its name, and likewise why a variant cannot run here."""
    started, left_out = [], {}
    with contextlib.ExitStack() as stack:
        for variant in variants:
            display.say(f"starting: {variant.name}")
            # JAX's cache is off, so that the first step includes compiling, as it does on a new machine.
            environment = {"JAX_ENABLE_COMPILATION_CACHE": "false", **variant.environment}
            name = f"the process of {variant.name}"
            worker = stack.enter_context(
                start_worker(time_variant, variant, data_dir, name=name, environment=environment)
            )
            startup = worker.receive()
            if isinstance(startup, StartupFailure):
                left_out[variant.name] = startup.error
                display.say(f"left out: {variant.name} ({startup.error})")
            else:
                started.append((variant, worker, startup, []))
        for number in range(rounds):
            display.say(f"round {number + 1} of {rounds}")
            # In a new order each time, so that no variant always follows the same one.
            for _, worker, _, measured in random.sample(started, len(started)):
                worker.send(steps)
                measured.append(worker.receive())
            yield {each.name: _timing(each, startup, measured) for each, _, startup, measured in started}, left_out


def _timing(variant: Variant, startup: Startup, measured: Sequence[Round]) -> Timing:
    milliseconds = [each.milliseconds for each in measured]
    low, median, high = np.quantile(milliseconds, (0.25, 0.5, 0.75)).tolist()
    return Timing(
        framework=variant.framework,
        dtype=variant.dtype,
        **startup._asdict(),
        peak_bytes=measured[-1].peak_bytes,
        milliseconds=median,
        low=low,
        high=high,
        all=milliseconds,
    )


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def write_report(result: BenchmarkResult, file: Path) -> str:
    """Write the benchmark as Markdown, which is returned, and its plot under the same name."""
    plot = file.with_suffix(".png")
    text = to_markdown(result, plot=plot.name)
    write_atomically(file, text)
    timings = [(name, each.framework, each.low, each.milliseconds, each.high) for name, each in result.variants.items()]
    plot_benchmark(timings, plot, floor=result.floor.milliseconds, title=result.device)
    return text


def to_markdown(result: BenchmarkResult, *, plot: str) -> str:
    """Return the benchmark as Markdown; `plot` is the picture's file name."""
    floor = result.floor
    package_versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return "\n".join(
        [
            f"# Time of a training step of {BATCH_SIZE} images",
            "",
            speed_table(result),
            "",
            *[f"Left out: {name} ({escape_markdown(error)})." for name, error in result.left_out.items()],
            f"Median and quartiles of {result.rounds} rounds of {result.steps_per_round} steps. Each variant runs in "
            "its own process, and all are measured in turn within one run. *One of 8 seeds* is the time per seed in a "
            "program that trains 8."
            + " *Memory kept* means that two environment variables keep glibc's allocator from returning memory to the "
            "system after each step, the fastest setting that we found for PyTorch on a CPU."
            * any(name.endswith("memory kept") for name in result.variants)
            + " `fit` is called for the steps of each round, which costs it about a tenth."
            * ("Keras, fit" in result.variants)
            + " On a GPU PyTorch computes convolutions in TF32 unless told otherwise; cnn-jax computes them in float32."
            * any(name.endswith("CUDA graph") for name in result.variants),
            "",
            f"The floor, {_milliseconds(floor.milliseconds)} ms, is the time that the step's matrix products alone "
            f"would take: {floor.flops / 1e9:.2f} GFLOP at {floor.flops_per_second / 1e9:.0f} GFLOP/s, the speed "
            f"measured here for float32 matrix products. Memory, at {floor.bytes_per_second / 1e9:.0f} GB/s, is not "
            "the limit.",
            "",
            "Import is that of PyTorch or TensorFlow alone, or of all of cnn-jax. The first step is that of a new "
            "process, with compilation and without a cache. 15 epochs are import, loading, the first step and 8,999 "
            "median steps. Memory is the process's peak.",
            "",
            f"![milliseconds per step of each variant]({plot})",
            "",
            f"{escape_markdown(result.device)}; {package_versions}; {result.date}.",
            "",
        ]
    )


def speed_table(result: BenchmarkResult) -> str:
    """Return the table of the variants, as Markdown."""
    peers = [timing.milliseconds for timing in result.variants.values() if timing.framework != "cnn-jax"]
    header = (
        "variant",
        "ms per step",
        "images/s",
        "best of the peers = 1",
        "floor",
        "import",
        "first step",
        "15 epochs",
        "memory",
    )
    rows = []
    for name, timing in result.variants.items():
        start = timing.import_seconds + timing.load_seconds + timing.first_step_seconds
        rows.append(
            (
                name,
                f"{_milliseconds(timing.milliseconds)} ({_milliseconds(timing.low)} to {_milliseconds(timing.high)})",
                f"{1e3 * BATCH_SIZE / timing.milliseconds:,.0f}",
                f"{min(peers) / timing.milliseconds:.2f}",
                f"{result.floor.milliseconds / timing.milliseconds:.0%}",
                describe_seconds(timing.import_seconds),
                describe_seconds(timing.first_step_seconds),
                describe_seconds(start + (STEPS_OF_15_EPOCHS - 1) * timing.milliseconds / 1e3),
                f"{timing.peak_bytes / 2**20:,.0f} MiB",
            )
        )
    return markdown_table(header, rows)


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value >= 5 else f"{value:.3f}"
