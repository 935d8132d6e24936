"""Runs that earlier versions recorded, with checkpoints of formats 2 and 3, are tested and continued by this one."""

import json
import shutil

import optax
import pytest

from cnn_jax.core.recipes import Recipe, smoothed
from tests.helpers import metrics_of

pytestmark = pytest.mark.optax_promotes

# Two seeds of the recipe `fast`, which averages weights: `train --recipe fast --features 2 4 --seeds 2 --epochs 0.02
# --validation 5000 --checkpoint-every-steps 5`, with its checkpoints of steps 5 and 11, the last one.
OPTIONS = ("--recipe", "fast", "--features", 2, 4, "--seeds", 2, "--epochs", 0.02, "--validation", 5000)
OPTIONS += ("--batch-size", 100, "--learning-rate", 0.01)
TEST_ACCURACY = 0.16245


def fast_as_it_was(learning_rate, steps):
    """The recipe `fast` when the runs were recorded."""
    schedule = optax.cosine_onecycle_schedule(steps, learning_rate, pct_start=0.15)
    return Recipe(optax.adam(schedule, b1=0.85), elementwise=True, loss=smoothed(0.05), ema_decay=0.99)


@pytest.fixture(params=[2, 3])
def recorded(request, tmp_path):
    shutil.unpack_archive(request.path.with_name(f"format_{request.param}_run.zip"), tmp_path)
    return tmp_path / "run"


def test_an_earlier_runs_averaged_weights_are_tested(recorded, command, tfds_folder):
    code, out, err = command("evaluate", recorded, "--data-dir", tfds_folder)
    assert code == 0, err
    # Another processor may sum in another order.
    assert float(out.removeprefix("Accuracy: ")) == pytest.approx(TEST_ACCURACY, abs=1e-3)
    assert "damaged" not in err


def test_an_earlier_run_is_compared(recorded, command, tfds_folder, tmp_path):
    copy = shutil.copytree(recorded, tmp_path / "copy")
    code, out, err = command("diff", recorded, copy, "--data-dir", tfds_folder)
    assert code == 0, err
    assert "without any spread: no difference is shown" in out


def test_an_earlier_run_continues_to_the_numbers_that_it_would_have_had(recorded, command, tfds_folder, monkeypatch):
    monkeypatch.setattr("cnn_jax.core.recipes.fast", fast_as_it_was)
    expected = metrics_of(recorded)
    shutil.rmtree(recorded / "steps" / "11")
    where = ("--checkpoint-dir", recorded.parent, "--run-name", recorded.name, "--data-dir", tfds_folder)
    code, _, err = command("train", *OPTIONS, *where)
    assert code == 0, err
    assert "continuing after step 5 of 11" in err
    ((epoch,), (before,)) = (metrics_of(recorded), expected)
    assert epoch["seeds"]["cost"] == pytest.approx(before["seeds"]["cost"], rel=1e-4)
    assert epoch["seeds"]["validation_loss"] == pytest.approx(before["seeds"]["validation_loss"], rel=1e-4)
    meta = json.loads((recorded / "steps" / "11" / "meta" / "metadata").read_text())
    assert meta["schema"] == 4
