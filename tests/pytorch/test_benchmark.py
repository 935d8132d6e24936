"""What the benchmark compares does the same work, and its table says what was measured."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra torch")

from cnn_jax.core.model import CNN
from cnn_jax.data.dataset import Dataset
from cnn_jax.pytorch.benchmark import measure_floor, speed_table
from cnn_jax.pytorch.jax_loops import PlainCNN
from cnn_jax.pytorch.variants import make_form

pytestmark = pytest.mark.optax_promotes


def test_the_plain_flax_model_computes_what_ours_does():
    images = jax.random.uniform(jax.random.key(0), (3, 28, 28, 1))
    params = CNN().init(jax.random.key(1), images)["params"]
    np.testing.assert_allclose(
        PlainCNN().apply({"params": params}, images), CNN().apply({"params": params}, images), atol=1e-5
    )


@pytest.mark.parametrize(
    "name", ["the tutorial's loop as written", "PyTorch, channels_last", "cnn-jax, one of 8 seeds"]
)
def test_a_form_runs_as_many_steps_as_asked_over_the_end_of_an_epoch(name, real_images):
    images, labels = real_images
    small = Dataset("mnist", images[:500, :, :, np.newaxis], labels[:500].astype(np.int32), None, None, 10)
    run = make_form(name, small)
    for steps in (3, 3, 16, 24):
        run(steps)


def test_the_floor_counts_the_products_of_a_step():
    floor = measure_floor()
    assert floor["flops"] == pytest.approx(2.277e9, rel=1e-3)
    assert 0 < floor["milliseconds"] == pytest.approx(1e3 * floor["flops"] / floor["flops_per_second"])


def test_the_table_holds_each_form_against_pytorchs_best_and_the_floor():
    def form(milliseconds):
        return {"milliseconds": milliseconds, "low": milliseconds, "high": milliseconds,
                "import_seconds": 1.0, "load_seconds": 1.0, "first_step_seconds": 2.0, "peak_bytes": 2**30}  # fmt: skip

    table = speed_table(
        {
            "floor": {"milliseconds": 5.0},
            "forms": {
                "PyTorch, eager": form(20.0),
                "PyTorch, channels_last": form(15.0),
                "PyTorch, bfloat16 autocast": form(1.0),
                "PyTorch, torch.compile": {"error": "no compiler"},
                "cnn-jax, float32": form(10.0),
            },
        }
    )
    assert "torch.compile" not in table
    ours = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert ours == [
        "cnn-jax, float32",
        "10.0 (10.0 to 10.0)",
        "10,000",
        "1.50",
        "50%",
        "1.0 s",
        "2.0 s",
        "1 min 34 s",
        "1,024 MiB",
    ]
