"""The benchmark's variants do the same work, and its table shows the measurements."""

import contextlib
import functools
import gc
import os
import signal
import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra torch")

from cnn_jax.core.model import CNN, PlainCNN
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.published import numbers
from cnn_jax.pytorch import benchmark as benchmark_module
from cnn_jax.pytorch.benchmark import BenchmarkResult, Floor, Timing, benchmark, measure_floor, read_result, speed_table
from cnn_jax.pytorch.processes import start_worker
from cnn_jax.pytorch.variants import KEEP_MEMORY, VARIANTS
from cnn_jax.runtime.errors import StorageError

pytestmark = pytest.mark.optax_promotes


def test_the_plain_flax_model_computes_what_ours_does():
    images = jax.random.uniform(jax.random.key(0), (3, 28, 28, 1))
    params = CNN().init(jax.random.key(1), images)["params"]
    np.testing.assert_allclose(
        PlainCNN().apply({"params": params}, images), CNN().apply({"params": params}, images), atol=1e-5
    )


@pytest.mark.parametrize(
    "name",
    [
        "the tutorial's loop as written",
        "PyTorch, channels_last",
        pytest.param("plain Flax model", marks=pytest.mark.slow),
        pytest.param("cnn-jax, one of 8 seeds", marks=pytest.mark.slow),
        "Keras, fit",
        "TensorFlow, tf.function",
    ],
)
def test_a_variant_runs_over_the_end_of_an_epoch(name, real_images):
    images, labels = real_images[0][:500, ..., np.newaxis], real_images[1][:500].astype(np.int32)
    small = Dataset("mnist", images, labels, images, labels, numbers(10))
    (variant,) = (variant for variant in VARIANTS if variant.name == name)
    if variant.framework == "TensorFlow":
        pytest.importorskip("tensorflow", reason="needs TensorFlow, which the benchmark measures where it is installed")
    run = variant.make(small)
    for steps in (3, 3, 7):
        run(steps)


def send_environment(pipe, *names):
    pipe.send([os.environ.get(name) for name in names])
    pipe.send(pipe.recv() + 1)


def test_a_measured_process_has_loaded_neither_framework_before_its_clock_starts(program):
    code = "import sys, cnn_jax.pytorch.processes; print(sorted({'jax', 'torch', 'flax'} & sys.modules.keys()))"
    out, err = program("-c", code).communicate(timeout=300)
    assert out == "[]\n", err


def test_a_process_starts_with_its_environment_and_answers_until_the_block_ends():
    names = sorted(KEEP_MEMORY)
    with start_worker(send_environment, *names, name="the process", environment=KEEP_MEMORY) as worker:
        assert worker.receive() == [KEEP_MEMORY[name] for name in names]
        worker.send(1)
        assert worker.receive() == 2
    assert not KEEP_MEMORY.keys() & os.environ.keys()
    assert worker.process.exitcode is not None


def test_a_recorded_step_keeps_the_memory_of_its_weights(monkeypatch):
    import torch

    from cnn_jax.pytorch.tutorial import TutorialCNN, _record_step

    nothing = SimpleNamespace(wait_stream=lambda stream: None)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda: nothing)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    model = TutorialCNN()
    weights = weakref.ref(model)
    replay = _record_step(lambda images, labels, model=model: model(images).sum(), torch.device("cpu"))
    del model
    gc.collect()
    assert weights() is not None
    del replay
    gc.collect()
    assert weights() is None


def test_a_benchmark_that_is_stopped_keeps_the_rounds_that_it_has_measured(monkeypatch, tmp_path):
    floor = Floor(flops=1, bytes=1, flops_per_second=1.0, bytes_per_second=1.0, milliseconds=0.05)
    timing = Timing("PyTorch", "float32", 1.0, 1.0, 2.0, 2**30, 0.1625, 0.16, 0.17, [0.1625])

    def measure_and_stop(*_):
        yield {"PyTorch, eager": timing}, {}
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark_module, "measure_floor", lambda: floor)
    monkeypatch.setattr(benchmark_module, "_measure_in_turn", measure_and_stop)
    with pytest.raises(KeyboardInterrupt):
        benchmark(rounds=2, output=tmp_path)
    (file,) = tmp_path.glob("*.json")
    result = read_result(file)
    assert (result.rounds, result.variants) == (1, {"PyTorch, eager": timing})
    assert "| 0.163 (0.160 to 0.170) |" in file.with_suffix(".md").read_text()


def die(pipe):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_ends_the_command_in_one_line_that_names_it():
    with start_worker(die, name="the process of PyTorch, eager") as worker:
        with pytest.raises(
            StorageError, match=r"^the process of PyTorch, eager was ended by signal 9 \(Killed\); run"
        ) as raised:
            worker.receive()
        assert len(str(raised.value).splitlines()) == 1
        with pytest.raises(StorageError, match="signal 9"):
            worker.send(16)


def test_the_floor_counts_the_products_of_a_step(monkeypatch):
    monkeypatch.setattr(benchmark_module, "_fastest", functools.partial(benchmark_module._fastest, repeats=1))
    floor = measure_floor()
    assert floor.flops == pytest.approx(2.277e9, rel=1e-3)
    assert 0 < floor.milliseconds == pytest.approx(1e3 * floor.flops / floor.flops_per_second)


def test_the_table_compares_each_variant_with_the_best_of_the_peers_and_the_floor():
    def timing(framework, milliseconds, dtype="float32"):
        return Timing(framework, dtype, import_seconds=1.0, load_seconds=1.0, first_step_seconds=2.0, peak_bytes=2**30,
                      milliseconds=milliseconds, low=milliseconds, high=milliseconds, all=[])  # fmt: skip

    floor = Floor(flops=1, bytes=1, flops_per_second=1.0, bytes_per_second=1.0, milliseconds=5.0)
    result = BenchmarkResult("2026-11-25", "a machine", "a device", {}, rounds=1, steps_per_round=16, floor=floor,
        variants={
            "PyTorch, eager": timing("PyTorch", 20.0),
            "PyTorch, channels_last": timing("PyTorch", 15.0),
            "PyTorch, bfloat16 autocast": timing("PyTorch", 12.0, "bfloat16"),
            "TensorFlow, tf.function": timing("TensorFlow", 11.0),
            "cnn-jax, float32": timing("cnn-jax", 10.0),
        },
        left_out={"PyTorch, torch.compile": "no compiler"},
    )  # fmt: skip
    table = speed_table(result)
    assert "torch.compile" not in table
    ours = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert ours == [
        "cnn-jax, float32",
        "10.0 (10.0 to 10.0)",
        "10,000",
        "1.10",
        "50%",
        "1.0 s",
        "2.0 s",
        "1 min 34 s",
        "1,024 MiB",
    ]
