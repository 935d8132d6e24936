"""The command `plan`: what a training would need and start on devices that need not be here, from shapes alone."""

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cnn_jax.analysis.hlo import Step, count_step
from cnn_jax.analysis.targets import Target, compile_only_devices, set_up_compilers
from cnn_jax.core.input_pipeline import Chunk, chunk_steps
from cnn_jax.core.sharding import DATA, make_mesh
from cnn_jax.data.dataset import DatasetSizes, check_sizes
from cnn_jax.data.loading import read_sizes
from cnn_jax.runs.program import (
    Memory,
    Program,
    Sizes,
    TestSet,
    check_resources,
    compile_program,
    compile_soon,
    make_program,
    memory_of,
)
from cnn_jax.runs.restore import check_image_size, streams
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runtime.devices import fix_algorithms, start_devices
from cnn_jax.runtime.display import Display, describe_seconds
from cnn_jax.runtime.errors import UsageError, lacks_memory
from cnn_jax.runtime.files import write_atomically


class Plan(NamedTuple):
    """What a training would be on a target.

    Attributes:
      target: The accelerators.
      settings: The training's.
      devices: How many accelerators there are.
      seeds_at_once: How many seeds each of them trains at once, vectorised.
      compile_seconds: What compiling took on this machine.
      memory: What the steps need of a device's memory.
      resident: What stays there beside it: the images to test on.
      step: What a step of training does on a device.
      estimate: What XLA estimates of a step, on a TPU: `flops`, `bytes` and `estimated_milliseconds`.
      hlo: The optimised program of the steps.
    """

    target: Target
    settings: TrainSettings
    devices: int
    seeds_at_once: int
    compile_seconds: float
    memory: Memory
    resident: int
    step: Step
    estimate: dict[str, float]
    hlo: str

    @property
    def needed(self) -> int:
        """The bytes that are needed of a device's memory."""
        return sum(self.memory) + self.resident

    @property
    def fits(self) -> bool:
        """Whether a device has them."""
        return self.needed <= self.target.device_bytes

    def record(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "target": self.target.name,
            "devices": self.devices,
            "seeds": self.settings.seeds,
            "seeds_at_once": self.seeds_at_once,
            "precision": self.settings.precision,
            "recipe": self.settings.recipe,
            "compile_seconds": round(self.compile_seconds, 2),
            "memory": {**self.memory._asdict(), "device": self.target.device_bytes, "fits": self.fits},
            "step": {**self.step._asdict(), **self.estimate},
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return what a person is shown."""
        settings, memory, step = self.settings, self.memory, self.step
        started = "kernels and copies" if self.target.platform == "cuda" else "instructions"
        rows = [
            ("recipe", f"{settings.recipe}, {settings.precision}, batch {settings.batch_size}"),
            ("seeds", f"{settings.seeds:,}, of which each device trains {self.seeds_at_once:,} at once"),
            ("compiling", f"{describe_seconds(self.compile_seconds)} on this machine"),
            (
                "memory",
                f"{_size(self.needed)} of {_size(self.target.device_bytes)} per device: "
                f"arguments {_size(memory.arguments)}, temporaries {_size(memory.temporaries)}, "
                f"output {_size(memory.output)}, images to test on {_size(self.resident)}",
            ),
            ("a step starts", f"{step.launches} {started}"),
            (
                "products",
                f"{step.matmuls} of matrices; {step.convolutions} convolutions, {step.grouped_convolutions} grouped",
            ),
            ("transfers", f"{step.collectives} among devices, {step.host_transfers} to or from the host"),
            ("number of steps", "known before the first" if step.known_trip_count else "asked for after each"),
        ]
        if self.estimate:
            milliseconds, gigaflop = self.estimate["estimated_milliseconds"], self.estimate["flops"] / 1e9
            moved = _size(self.estimate["bytes"])
            rows.append(("XLA's estimate", f"{milliseconds:.2f} ms per step; {gigaflop:.2f} GFLOP, {moved} moved"))
        return rows


def plan(target: Target, settings: TrainSettings, *, as_json: bool = False, hlo: Path | None = None) -> None:
    """Show what a training would be on a target.

    Args:
      target: The accelerators.
      settings: The training's.
      as_json: Print it as a JSON object on stdout, too.
      hlo: Where to write the optimised program of the steps.

    Raises:
      UsageError: it does not fit, with what would.
    """
    display = Display()
    sizes = read_sizes(settings.dataset, settings.dataset_dir, settings.data_dir)
    check_sizes(settings.batch_size, settings.validation, sizes.train_examples)
    check_image_size(settings, str(settings.dataset_dir or settings.dataset), sizes.image_shape)
    set_up_compilers()
    fix_algorithms(attached=False)
    jax.config.update("jax_enable_compilation_cache", False)  # JAX cannot read what is for devices that are not here
    start_devices("cpu", keep_compiled=False)
    with display.waiting(f"compiling for {target.name}"):
        planned = make_plan(target, settings, sizes)
    display.table(f"Plan for {target.name}", planned.rows())
    if as_json:
        display.result(json.dumps(planned.record()))
    if hlo is not None:
        write_atomically(hlo, planned.hlo)
    if not planned.fits:
        raise UsageError(
            f"TARGET {target.name}: this needs {_size(planned.needed)} of memory per device and there are "
            f"{_size(target.device_bytes)}; {_what_fits(planned)}"
        )


def make_plan(target: Target, settings: TrainSettings, data: DatasetSizes) -> Plan:
    """Compile a training for a target, as `train_run` would there.

    Raises:
      UsageError: the compiler finds that it does not fit.
    """
    sizes = Sizes(data.train_examples - (settings.validation or 0), data.image_shape, data.num_classes)
    mesh = make_mesh(settings.seeds, compile_only_devices(target))
    check_resources(settings, sizes, mesh, target.device_bytes)
    streaming = streams(settings, data.train_examples * math.prod(data.image_shape), target.device_bytes)
    program = make_program(settings, sizes, mesh, streams=streaming)
    states = jax.eval_shape(program.start)
    chunk = chunk_shapes(program, sizes)
    tested = settings.validation or data.test_examples
    shares = mesh.shape[DATA]
    test_set = TestSet(*_shapes(tested + -tested % shares, data.image_shape))
    begin = time.perf_counter()
    try:
        compile_soon(program, program.start)
        program = compile_program(program, settings, sizes, states, chunk, test_set, target.device_bytes)
    except jax.errors.JaxRuntimeError as error:
        if not lacks_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"TARGET {target.name}: it does not fit ({reason}); lower --seeds, --batch-size or --features"
        ) from error
    compile_seconds = time.perf_counter() - begin
    # JAX has kept what was just compiled.
    steps = program.run_steps.lower(states, *chunk[:3], np.int32(0), np.int32(0)).compile()
    hlo = steps.as_text()
    assert hlo is not None, "a compiler of an accelerator shows its program"
    return Plan(
        target=target,
        settings=settings,
        devices=mesh.size,
        seeds_at_once=program.seeds_at_once or 1,
        compile_seconds=compile_seconds,
        memory=memory_of(steps),
        resident=sum(shape.size * shape.dtype.itemsize for shape in test_set) // shares,
        step=count_step(hlo, host_decides=target.platform == "cuda"),
        estimate=_estimate(steps),
        hlo=hlo,
    )


def chunk_shapes(program: Program, sizes: Sizes) -> Chunk:
    """Return the shapes of the first chunk of an epoch, as `resident` or `streamed` puts it on the devices."""
    epoch = jax.eval_shape(program.epoch, np.int32(0))
    (seeds, steps, batch), examples = epoch.batches.shape, sizes.train_examples
    if program.streams:
        steps = chunk_steps(epoch.batches.shape, sizes.image_shape)
        epoch = epoch._replace(batches=jax.ShapeDtypeStruct((seeds, steps, batch), epoch.batches.dtype))
        examples = seeds * steps * batch
    return Chunk(epoch, *_shapes(examples, sizes.image_shape), first=0, stop=steps)


def _shapes(examples: int, image_shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Return the shapes of so many images and their labels, which stand for arrays."""
    images = jax.ShapeDtypeStruct((examples, *image_shape), np.uint8)
    return images, jax.ShapeDtypeStruct((examples,), np.int32)


def _estimate(steps: jax.stages.Compiled) -> dict[str, float]:
    """Return what XLA estimates of a step: it counts a loop's body once. Its compiler for GPUs estimates nothing."""
    costs = steps.cost_analysis()
    if not costs:
        return {}
    return {
        "flops": costs["flops"],
        "bytes": costs["bytes accessed"],
        "estimated_milliseconds": 1e3 * costs["optimal_seconds"],
    }


def _what_fits(planned: Plan) -> str:
    """Return what would fit: fewer seeds, else a smaller batch."""
    # In proportion to what is needed, and less: near the limit XLA computes values anew, and more would be needed.
    settings, share = planned.settings, 0.85 * planned.target.device_bytes / planned.needed
    seeds = int(settings.seeds * share)
    if seeds >= 1:
        return f"about --seeds {seeds} would fit"
    batch = int(settings.batch_size * share)
    if batch >= 1:
        return f"about --batch-size {batch} would fit"
    return "a network with fewer --features may fit, or --feed stream"


def _size(count: float) -> str:
    """Return a number of bytes as a person says it."""
    power = next((power for power in (3, 2, 1) if count >= 1024**power), 0)
    return f"{count / 1024**power:,.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
