"""A training step of this network in every form, measured in turn within one run, and what the machine allows."""

import importlib.metadata
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.analysis.plots import plot_benchmark
from cnn_jax.data.dataset import load_dataset
from cnn_jax.pytorch.compare import PACKAGES
from cnn_jax.pytorch.variants import BATCH_SIZE, ENVIRONMENT, FORMS, is_torch
from cnn_jax.runtime.devices import describe_machine
from cnn_jax.runtime.display import Display, describe_seconds
from cnn_jax.runtime.errors import StorageError

STEPS_A_ROUND = 16
STEPS_OF_15_EPOCHS = 9000
# Bytes that a step moves at least, a weight: it is read and written with Adam's two moments, its gradient is both.
BYTES_A_WEIGHT = 4 * 8


def benchmark(*, rounds: int, output: Path, data_dir: Path | None = None) -> None:
    """Measure every form and write the table, the JSON and the plot."""
    display = Display()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is shared by all the processes
    load_dataset("mnist", None, data_dir)  # prepares it: loading is timed as it is ever after
    floor = measure_floor()
    display.say(f"floor: {floor['milliseconds']:.2f} ms a step")
    forms = [form for form in FORMS if "CUDA" not in form or jax.default_backend() == "gpu"]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "device": _device_name(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "rounds": rounds,
        "steps_a_round": STEPS_A_ROUND,
        "floor": floor,
        "forms": _measure_in_turn(forms, rounds, data_dir, display),
    }
    name = re.sub(r"[^\w]+", "-", f"{result['device']}-{result['date']}").strip("-").lower()
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (output / f"{name}.md").write_text(to_markdown(result, plot=f"{name}.png"))
    plot_benchmark(result, output / f"{name}.png")
    display.say(to_markdown(result, plot=f"{name}.png"))
    display.say(f"written to {output / name}.md")


def measure_floor() -> dict[str, float]:
    """Return what this machine needs at the least for a step in float32.

    Returns:
      `flops` and `bytes` of a step, the measured `flops_per_second` of float32 matrix products (the best of three
      shapes) and `bytes_per_second` of a copy, and `milliseconds`, the larger of the two quotients.
    """
    block_1, block_2, fc = (2 * BATCH_SIZE * n for n in (28 * 28 * 9 * 32, 14 * 14 * 288 * 64, 3136 * 10))
    flops = 2 * block_1 + 3 * block_2 + 3 * fc  # block 1 needs no gradient with respect to the images
    moved = BYTES_A_WEIGHT * 50_186 + BATCH_SIZE * 28 * 28
    multiply = jax.jit(lambda left, right: jnp.matmul(left, right, precision="highest"))
    rates = []
    for m, k, n in ((19_600, 288, 64), (19_600, 64, 288), (2048, 2048, 2048)):
        left, right = jnp.ones((m, k), jnp.float32), jnp.ones((k, n), jnp.float32)
        rates.append(2 * m * k * n / _fastest(lambda left=left, right=right: multiply(left, right).block_until_ready()))
    source = jnp.ones(2**26, jnp.float32)
    copy = jax.jit(lambda array: array + 1)
    bandwidth = 2 * source.nbytes / _fastest(lambda: copy(source).block_until_ready())
    return {
        "flops": flops,
        "bytes": moved,
        "flops_per_second": max(rates),
        "bytes_per_second": bandwidth,
        "milliseconds": 1e3 * max(flops / max(rates), moved / bandwidth),
    }


def _fastest(function, repeats=10):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def _measure_in_turn(forms, rounds, data_dir, display):
    processes, measured = {}, {}
    try:
        for form in forms:
            display.say(f"starting: {form}")
            processes[form] = _start(form, data_dir)
            measured[form] = _answer_of(processes[form], form)
            if "error" in measured[form]:
                display.say(f"left out: {form} ({measured[form]['error']})")
                processes.pop(form).wait()
        times = {form: [] for form in processes}
        for number in range(rounds):
            display.say(f"round {number + 1} of {rounds}")
            # In another order each time: no form always follows the same one.
            for form in random.sample(list(processes), len(processes)):
                processes[form].stdin.write(f"{STEPS_A_ROUND}\n")
                processes[form].stdin.flush()
                answer = _answer_of(processes[form], form)
                times[form].append(answer["milliseconds"])
                measured[form]["peak_bytes"] = answer["peak_bytes"]
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    for form, values in times.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        measured[form] |= {"milliseconds": median, "low": low, "high": high, "all": values}
    return measured


def _start(form, data_dir):
    call = f"from cnn_jax.pytorch.variants import serve; serve({form!r}, {data_dir and str(data_dir)!r})"
    # Without JAX's cache: what is measured is the first start of all.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"} | ENVIRONMENT.get(form, {})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", call], **pipes, env=environment)


def _answer_of(process, form):
    line = process.stdout.readline()
    if not line:
        raise StorageError(f"the process of {form} ended with exit code {process.wait()}; its own message is above")
    return json.loads(line)


def _device_name():
    device = jax.devices()[0]
    return describe_machine() if device.platform == "cpu" else device.device_kind


def to_markdown(result: dict, *, plot: str) -> str:
    """Return the benchmark as Markdown; `plot` is the picture's file name."""
    floor = result["floor"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    left_out = [f"Left out: {name} ({form['error']})." for name, form in result["forms"].items() if "error" in form]
    return "\n".join(
        [
            f"# A training step of {BATCH_SIZE} images",
            "",
            speed_table(result),
            "",
            *left_out,
            f"Median and quartiles of {result['rounds']} rounds of {result['steps_a_round']} steps, all forms in turn "
            "within one run, each in a process of its own. Memory kept: glibc's allocator is told not to give memory "
            "back to the system after each step, the best that we found for PyTorch on a CPU. The floor is "
            f"{floor['milliseconds']:.1f} ms: {floor['flops'] / 1e9:.2f} GFLOP at the "
            f"{floor['flops_per_second'] / 1e9:.0f} GFLOP/s that a float32 matrix product reaches here (memory, at "
            f"{floor['bytes_per_second'] / 1e9:.0f} GB/s, is no limit). Import: PyTorch alone, or all of cnn-jax. "
            "First step: in a new process, compiling included, nothing cached. 15 epochs: import, loading, first step "
            "and 8,999 medians. Memory is the process's peak. One of 8 seeds: a step of one where a program trains 8.",
            "",
            f"![milliseconds a step of each form]({plot})",
            "",
            f"{result['device']}; {versions}; {result['date']}.",
            "",
        ]
    )


def speed_table(result: dict) -> str:
    """Return the table of the forms, as Markdown."""
    measured = {form: values for form, values in result["forms"].items() if "error" not in values}
    best = min(values["milliseconds"] for form, values in measured.items() if is_torch(form) and "bfloat16" not in form)
    header = (
        "form",
        "ms a step",
        "images/s",
        "best float32 PyTorch = 1",
        "floor",
        "import",
        "first step",
        "15 epochs",
        "memory",
    )
    rows = [header, ("---",) * len(header)]
    for form, values in measured.items():
        milliseconds = values["milliseconds"]
        start = values["import_seconds"] + values["load_seconds"] + values["first_step_seconds"]
        rows.append(
            (
                form,
                f"{milliseconds:.1f} ({values['low']:.1f} to {values['high']:.1f})",
                f"{1e3 * BATCH_SIZE / milliseconds:,.0f}",
                f"{best / milliseconds:.2f}",
                f"{result['floor']['milliseconds'] / milliseconds:.0%}",
                describe_seconds(values["import_seconds"]),
                describe_seconds(values["first_step_seconds"]),
                describe_seconds(start + (STEPS_OF_15_EPOCHS - 1) * milliseconds / 1e3),
                f"{values['peak_bytes'] / 2**20:,.0f} MiB",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
