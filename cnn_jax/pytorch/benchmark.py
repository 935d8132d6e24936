"""A training step of this network in every form, measured in turn within one run, and what the machine allows."""

import contextlib
import importlib.metadata
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn

from cnn_jax.config import BenchmarkSettings
from cnn_jax.data import Dataset, load_dataset
from cnn_jax.display import Display, describe_seconds
from cnn_jax.model import CNN, torch_uniform
from cnn_jax.plots import plot_benchmark
from cnn_jax.pytorch.compare import PACKAGES, describe_machine
from cnn_jax.pytorch.tutorial import TutorialCNN, TutorialImages, default_device, make_step, synchronize
from cnn_jax.training import create_train_state, epoch_order, make_keys, run_steps, train_step

BATCH_SIZE = 100
STEPS_A_ROUND = 8
STEPS_OF_15_EPOCHS = 9000
# Bytes that a step moves at least, a weight: it is read and written with Adam's two moments, its gradient is both.
BYTES_A_WEIGHT = 4 * 8

Run = Callable[[int], None]


class PlainCNN(nn.Module):
    """The network as one writes it in Flax without thinking about speed."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits, (N, 10), of images (N, 28, 28, 1)."""
        for name, features in (("layer1", 32), ("layer2", 64)):
            fan_in = 9 * x.shape[-1]
            initializer = torch_uniform(fan_in)
            x = nn.Conv(features, (3, 3), kernel_init=initializer, bias_init=initializer, name=name)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(10, kernel_init=nn.initializers.xavier_uniform(), name="fc")(x.reshape(x.shape[0], -1))


def benchmark(settings: BenchmarkSettings) -> None:
    """Measure every form and write the table, the JSON and the plot."""
    display = Display()
    dataset = load_dataset("mnist", None, settings.data_dir)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "device": _device_name(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "rounds": settings.rounds,
        "steps_a_round": STEPS_A_ROUND,
    }
    result["floor"] = measure_floor()
    display.say(f"floor: {result['floor']['milliseconds']:.2f} ms a step")
    result["import_seconds"] = {"PyTorch": _measure_import("torch"), "cnn-jax": _measure_import("cnn_jax.run")}
    result["forms"] = _measure_in_turn(dataset, settings.rounds, display)
    for name, form in result["forms"].items():
        if "error" not in form:
            display.say(f"starting anew: {name}")
            form |= _measure_start_in_process(name, settings.data_dir)
    name = re.sub(r"[^\w]+", "-", f"{result['device']}-{result['date']}").strip("-").lower()
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (settings.output / f"{name}.md").write_text(to_markdown(result, plot=f"{name}.png"))
    plot_benchmark(result, settings.output / f"{name}.png")
    display.say(to_markdown(result, plot=f"{name}.png"))
    display.say(f"written to {settings.output / name}.md")


def forms() -> dict[str, Callable[[Dataset], Run]]:
    """Return, under each form's name, what makes of a data set a function that runs a number of steps to their end."""
    torch_forms = {
        "PyTorch, eager": "eager",
        "PyTorch, channels_last": "channels_last",
        "PyTorch, bfloat16 autocast": "bfloat16",
        "PyTorch, torch.compile": "compiled",
    }
    if torch.cuda.is_available():
        torch_forms["PyTorch, CUDA graph"] = "cuda_graph"
    return {
        "the tutorial's loop as written": _make_tutorial,
        **{name: lambda dataset, form=form: _make_torch(dataset, form) for name, form in torch_forms.items()},
        "plain Flax model": _make_plain,
        "cnn-jax, float32": lambda dataset: _make_ours(dataset, jnp.float32),
        "cnn-jax, bfloat16": lambda dataset: _make_ours(dataset, jnp.bfloat16),
    }


def _make_tutorial(dataset):
    device = default_device()
    torch.manual_seed(0)
    step = make_step(TutorialCNN().to(device), "eager", device)
    images = TutorialImages(dataset.train_images, dataset.train_labels)
    loader = torch.utils.data.DataLoader(images, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    batches = _endlessly(lambda: loader)

    def run(steps):
        for _ in range(steps):
            x, y = next(batches)
            step(x.to(device), y.to(device))
        synchronize(device)

    return run


def _make_torch(dataset, form):
    device = default_device()
    torch.manual_seed(0)
    step = make_step(TutorialCNN().to(device), form, device)
    memory_format = torch.contiguous_format if form == "eager" else torch.channels_last
    # Scaled beforehand and kept in memory: no loader stands between PyTorch and its fastest.
    images = torch.from_numpy(dataset.train_images.copy()).permute(0, 3, 1, 2).to(device, torch.float32) / 255
    labels = torch.from_numpy(dataset.train_labels.astype(np.int64)).to(device)
    batches = _endlessly(lambda: torch.randperm(len(labels), device=device).split(BATCH_SIZE))

    def run(steps):
        for _ in range(steps):
            batch = next(batches)
            step(images[batch].contiguous(memory_format=memory_format), labels[batch])
        synchronize(device)

    return run


def _endlessly(make_epoch):
    while True:
        yield from make_epoch()


def _make_plain(dataset):
    init_key, order_key = make_keys(0)
    state = create_train_state(init_key, PlainCNN(), (28, 28, 1), 0.001)
    images, labels = jax.device_put((dataset.train_images, dataset.train_labels))
    order = epoch_order(order_key, 0, num_examples=len(labels), batch_size=BATCH_SIZE)
    batches = _endlessly(lambda: order)

    def run(steps):
        nonlocal state
        for _ in range(steps):
            batch = next(batches)
            state, loss = train_step(state, images[batch], labels[batch])
        loss.block_until_ready()

    return run


def _make_ours(dataset, dtype):
    init_key, order_key = make_keys(0)
    images, labels = jax.device_put((dataset.train_images, dataset.train_labels))
    order = epoch_order(order_key, 0, num_examples=len(labels), batch_size=BATCH_SIZE)
    state = create_train_state(init_key, CNN(dtype=dtype), (28, 28, 1), 0.001)
    losses, first = jnp.zeros(len(order), jnp.float32), 0

    def run(steps):
        nonlocal state, losses, first
        if first + steps > len(order):
            first = 0
        state, losses = run_steps(state, losses, images, labels, order, first, first + steps)
        first += steps
        losses.block_until_ready()

    return run


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


def _measure_in_turn(dataset, rounds, display):
    runs, measured = {}, {}
    for name, make in forms().items():
        try:
            runs[name] = make(dataset)
            runs[name](2)
        except Exception as error:  # torch.compile needs a C++ compiler, a CUDA graph its driver: others still count
            measured[name] = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
            display.say(f"left out: {name} ({measured[name]['error']})")
            runs.pop(name, None)
    times = {name: [] for name in runs}
    for number in range(rounds):
        display.say(f"round {number + 1} of {rounds}")
        # In another order each time: no form always follows the same one.
        for name in random.sample(list(runs), len(runs)):
            runs[name](1)
            start = time.perf_counter()
            runs[name](STEPS_A_ROUND)
            times[name].append(1e3 * (time.perf_counter() - start) / STEPS_A_ROUND)
    for name, values in times.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        measured[name] = {"milliseconds": median, "low": low, "high": high, "all": values}
    return {name: measured[name] for name in forms()}


def _measure_start_in_process(name, data_dir):
    call = (
        f"from cnn_jax.pytorch.benchmark import measure_start; measure_start({name!r}, {data_dir and str(data_dir)!r})"
    )
    # Without JAX's cache: what is measured is the first start of all.
    ended = subprocess.run(
        [sys.executable, "-c", call],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    return json.loads(ended.stdout.splitlines()[-1])


def _measure_import(modules):
    """The median of three new processes that import these modules, less that of three that import none."""
    times = {code: [] for code in ("pass", f"import {modules}")}
    for _ in range(3):
        for code, seconds in times.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds.append(time.perf_counter() - start)
    nothing, something = (float(np.median(seconds)) for seconds in times.values())
    return something - nothing


def measure_start(name: str, data_dir: str | None) -> None:
    """Print, as JSON, how long this new process took to its first step, and its memory: what `benchmark` starts."""
    begin = time.perf_counter()
    dataset = load_dataset("mnist", None, data_dir and Path(data_dir))
    loaded = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        run = forms()[name](dataset)
        run(1)
    stepped = time.perf_counter()
    run(20)
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        json.dumps(
            {
                "load_seconds": loaded - begin,
                "first_step_seconds": stepped - loaded,
                "peak_bytes": peak,
            }
        )
    )


def _device_name():
    device = jax.devices()[0]
    return describe_machine() if device.platform == "cpu" else device.device_kind


def to_markdown(result: dict, *, plot: str) -> str:
    """Return the benchmark as Markdown; `plot` is the picture's file name."""
    floor, imports = result["floor"], result["import_seconds"]
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
            f"within one run. The floor is {floor['milliseconds']:.1f} ms: {floor['flops'] / 1e9:.2f} GFLOP at the "
            f"{floor['flops_per_second'] / 1e9:.0f} GFLOP/s that a float32 matrix product reaches here (memory, at "
            f"{floor['bytes_per_second'] / 1e9:.0f} GB/s, is no limit). First step: in a new process, compiling "
            "included, nothing cached. 15 epochs: import and loading, first step and 8,999 medians; importing takes "
            f"{imports['PyTorch']:.1f} s for PyTorch and {imports['cnn-jax']:.1f} s for cnn-jax. Memory is the peak of "
            "the whole process, which holds the data and imports both frameworks.",
            "",
            f"![milliseconds a step of each form]({plot})",
            "",
            f"{result['device']}; {versions}; {result['date']}.",
            "",
        ]
    )


def _is_torch(name):
    return name.startswith(("PyTorch", "the tutorial"))


def speed_table(result: dict) -> str:
    """Return the table of the forms, as Markdown."""
    best = min(
        form["milliseconds"]
        for name, form in result["forms"].items()
        if name.startswith("PyTorch") and "bfloat16" not in name and "error" not in form
    )
    rows = [
        (
            "form",
            "ms a step",
            "images/s",
            "PyTorch's best float32 = 1",
            "of the floor",
            "first step",
            "15 epochs",
            "memory",
        ),
        ("---",) * 8,
    ]
    for name, form in result["forms"].items():
        if "error" in form:
            continue
        milliseconds = form["milliseconds"]
        framework = "PyTorch" if _is_torch(name) else "cnn-jax"
        start = result["import_seconds"][framework] + form["load_seconds"] + form["first_step_seconds"]
        rows.append(
            (
                name,
                f"{milliseconds:.1f} ({form['low']:.1f} to {form['high']:.1f})",
                f"{1e3 * BATCH_SIZE / milliseconds:,.0f}",
                f"{best / milliseconds:.2f}",
                f"{result['floor']['milliseconds'] / milliseconds:.0%}",
                describe_seconds(form["first_step_seconds"]),
                describe_seconds(start + (STEPS_OF_15_EPOCHS - 1) * milliseconds / 1e3),
                f"{form['peak_bytes'] / 2**20:,.0f} MiB",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
