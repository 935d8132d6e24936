"""Evaluation counts every image once, whatever the batch size, and leaves training as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.core.evaluation import evaluate, sum_over_images
from cnn_jax.core.model import CNN
from cnn_jax.core.recipes import tutorial
from cnn_jax.core.training import SeedEpoch, batch_indices, create_train_state, make_keys, run_steps
from cnn_jax.data.dataset import scale_pixels
from cnn_jax.data.idx import read_idx
from tests.helpers import EMBEDDED

pytestmark = pytest.mark.optax_promotes

MODEL, RECIPE = CNN(features=(8, 16)), tutorial(0.001)


@pytest.fixture(scope="module")
def test_set():
    images = read_idx(EMBEDDED / "t10k-images-idx3-ubyte.xz", ndim=3)[..., np.newaxis]
    return jnp.asarray(images), jnp.asarray(read_idx(EMBEDDED / "t10k-labels-idx1-ubyte.xz", ndim=1).astype(np.int32))


def initial_state():
    return create_train_state(make_keys(777).init_key, MODEL, (28, 28, 1), RECIPE)


def test_all_10_000_images_count_also_when_they_do_not_divide_into_batches(test_set):
    state = initial_state()
    sums = {
        batch_size: sum_over_images(
            state.eval_variables, *test_set, jnp.float32(255), model=MODEL, batch_size=batch_size
        )
        for batch_size in (250, 999)
    }
    logits = jax.lax.map(
        lambda images: MODEL.apply({"params": state.params}, scale_pixels(images)),
        test_set[0].reshape(20, 500, 28, 28, 1),
    ).reshape(10_000, 10)
    logits, labels = np.asarray(logits, np.float64), np.asarray(test_set[1])
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(10_000), labels]
    for correct, loss_sum, count in sums.values():
        assert int(count) == 10_000
        assert int(correct) == (logits.argmax(axis=1) == labels).sum()
        assert float(loss_sum) == pytest.approx(losses.sum(), rel=1e-5)
    assert evaluate(MODEL, state.eval_variables, *test_set).count == 10_000


def test_unscaled_means_pixels_up_to_255(test_set):
    images, labels = test_set[0][:300], test_set[1][:300]
    state = initial_state()
    logits = MODEL.apply({"params": state.params}, images.astype(jnp.float32))
    result = evaluate(MODEL, state.eval_variables, images, labels, unscaled=True)
    assert result.correct == int((logits.argmax(axis=1) == labels).sum())
    assert result.loss > 10 * evaluate(MODEL, state.eval_variables, images, labels).loss


def test_evaluating_between_steps_never_changes_training(test_set):
    images, labels = test_set[0][:600], test_set[1][:600]
    order = batch_indices(make_keys(777).order_key, 0, num_examples=600, batch_size=100)

    def train(*, evaluating):
        state, losses = initial_state(), []
        for step in range(6):
            state, some_losses = run_steps(
                (state, SeedEpoch(order)), images, labels, step, step + 1, model=MODEL, recipe=RECIPE
            )
            losses.append(some_losses[step])
            if evaluating:
                evaluate(MODEL, state.eval_variables, images, labels)
        return jax.tree.leaves((state, losses))

    for quiet, evaluated in zip(train(evaluating=False), train(evaluating=True), strict=True):
        np.testing.assert_array_equal(quiet, evaluated)
