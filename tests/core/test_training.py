"""A step is Adam on the cross-entropy, an epoch sees each image at most once, and bits depend on the seed alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax.core.evaluation import evaluate
from cnn_jax.core.model import CNN
from cnn_jax.core.recipes import Recipe, accurate, fast, tutorial
from cnn_jax.core.training import SeedEpoch, batch_indices, create_train_state, loop_steps, make_keys
from cnn_jax.core.training import run_steps as run_any_steps
from cnn_jax.core.training import train_step as take_any_step
from cnn_jax.data.dataset import scale_pixels
from tests.helpers import assert_same_bits

pytestmark = pytest.mark.optax_promotes

MODEL, RECIPE = CNN(), tutorial(0.001)
train_step = functools.partial(take_any_step, model=MODEL, recipe=RECIPE)
run_steps = functools.partial(run_any_steps, model=MODEL, recipe=RECIPE)


@pytest.fixture(scope="module")
def train_set(real_images):
    images, labels = real_images
    return jnp.asarray(images[:1000, :, :, np.newaxis]), jnp.asarray(labels[:1000].astype(np.int32))


def initial_state(seed=777):
    return create_train_state(make_keys(seed).init_key, MODEL, (28, 28, 1), RECIPE)


def order_of(epoch, *, seed=777, num_examples=1000, batch_size=100):
    return batch_indices(make_keys(seed).order_key, epoch, num_examples=num_examples, batch_size=batch_size)


def train_one_epoch(train_set, *, cuts=(), seed=777, platform="cpu"):
    order = order_of(0, seed=seed)
    state, losses = initial_state(seed), np.zeros(len(order), np.float32)
    ends = (*cuts, len(order))
    for first, stop in zip((0, *cuts), ends, strict=True):
        state, some_losses = run_steps((state, SeedEpoch(order)), *train_set, first, stop, platform=platform)
        losses[first:stop] = some_losses[first:stop]
    return state, losses


def test_pixels_are_scaled_to_between_0_and_1():
    pixels = np.array([0, 51, 255], np.uint8)
    np.testing.assert_array_equal(scale_pixels(pixels), np.array([0, 0.2, 1], np.float32))
    np.testing.assert_array_equal(scale_pixels(pixels, np.float32(1)), np.array([0, 51, 255], np.float32))


def test_the_loss_is_the_mean_of_minus_the_log_of_the_softmax_at_the_label(train_set):
    images, labels = train_set[0][:8], train_set[1][:8]
    state = initial_state()
    logits = np.asarray(MODEL.apply({"params": state.params}, scale_pixels(images)), np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(softmax[np.arange(8), np.asarray(labels)]).mean()
    _, loss = train_step(state, images, labels)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_a_network_that_knows_nothing_is_the_log_of_10(train_set):
    state = initial_state()
    state = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
    _, loss = train_step(state, train_set[0][:100], train_set[1][:100])
    assert float(loss) == pytest.approx(np.log(10), rel=1e-6)


def test_the_first_step_of_adam_moves_each_weight_by_the_learning_rate(train_set):
    state = initial_state()
    after, _ = train_step(state, train_set[0][:100], train_set[1][:100])
    assert int(after.step) == 1
    moved = np.abs(np.asarray(after.params["fc"]["bias"] - state.params["fc"]["bias"]))
    # m / (sqrt(v) + eps) is the gradient's sign at the first step, but for eps = 1e-8.
    np.testing.assert_allclose(moved, 0.001, rtol=1e-3)


def test_the_order_of_an_epoch_is_a_permutation_without_its_last_incomplete_batch():
    order = np.asarray(order_of(0, num_examples=1050, batch_size=100))
    assert order.shape == (10, 100)
    assert len(set(order.ravel())) == 1000
    assert order.min() >= 0
    assert order.max() < 1050
    whole = np.asarray(order_of(0, num_examples=1000, batch_size=100))
    np.testing.assert_array_equal(np.sort(whole.ravel()), np.arange(1000))


def test_the_order_differs_by_epoch_and_seed_and_repeats_for_the_same():
    np.testing.assert_array_equal(order_of(3), order_of(3))
    places = [np.asarray(order_of(epoch, seed=seed)).ravel() for seed, epoch in ((777, 0), (777, 1), (1, 0))]
    for i in range(3):
        for j in range(i):
            assert (places[i] == places[j]).mean() < 0.01


def test_steps_take_the_batches_of_the_order(train_set):
    order = order_of(0)
    one_by_one = initial_state()
    expected = []
    for batch in order[:3]:
        one_by_one, loss = train_step(one_by_one, train_set[0][batch], train_set[1][batch])
        expected.append(float(loss))
    _, losses = run_steps((initial_state(), SeedEpoch(order)), *train_set, 0, 3)
    np.testing.assert_allclose(np.asarray(losses), [*expected, *[0] * 7], rtol=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(train_set):
    first = train_one_epoch(train_set)
    assert_same_bits(first, train_one_epoch(train_set))
    other_state, _ = train_one_epoch(train_set, seed=1)
    assert not np.array_equal(first[0].params["fc"]["kernel"], other_state.params["fc"]["kernel"])


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_length_of_the_segments_changes_no_bit(train_set, platform):
    whole = train_one_epoch(train_set, platform=platform)
    assert_same_bits(whole, train_one_epoch(train_set, cuts=(1, 4, 7), platform=platform))
    if platform == "cpu":
        assert_same_bits(whole, train_one_epoch(train_set, cuts=tuple(range(1, 10))))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("name", ["tutorial", "fast", "accurate"])
def test_the_loop_of_an_accelerator_trains_as_a_cpus_does(train_set, name, platform):
    recipe = {"tutorial": lambda rate, _: tutorial(rate), "fast": fast, "accurate": accurate}[name](0.001, 10)
    state = create_train_state(make_keys(7).init_key, MODEL, (28, 28, 1), recipe)
    seed = state, SeedEpoch(order_of(0)[:4], make_keys(7).noise_key)
    run = functools.partial(run_any_steps, seed, *train_set, 1, 4, model=MODEL, recipe=recipe)
    expected, losses = run()
    found, found_losses = run(platform=platform)
    np.testing.assert_allclose(found_losses[1:], losses[1:], rtol=1e-5)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-4)


def test_only_an_optimiser_that_treats_every_weight_alike_gets_them_as_one_vector(train_set):
    def of_each_array(updates, state, params):
        return jax.tree.map(lambda array: jnp.full_like(array, array.ndim), updates), state

    optimizer = optax.GradientTransformation(lambda params: optax.EmptyState(), of_each_array)
    state = create_train_state(make_keys(7).init_key, MODEL, (28, 28, 1), Recipe(optimizer))
    seed = state, SeedEpoch(order_of(0)[:1])
    after, _ = run_any_steps(seed, *train_set, 0, 1, model=MODEL, recipe=Recipe(optimizer), platform="gpu")
    for before, weights in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(weights - before, before.ndim, rtol=1e-6)


def test_the_loops_of_an_accelerator_waste_few_steps():
    assert [loop_steps(steps) for steps in (1, 30, 200, 201, 469, 600)] == [1, 30, 200, 101, 157, 200]


def test_three_epochs_on_a_subset_of_mnist_learn(train_set, real_images):
    state = initial_state()
    for epoch in range(3):
        state, _ = run_steps((state, SeedEpoch(order_of(epoch))), *train_set, 0, 10)
    images, labels = real_images
    test_images, test_labels = images[2000:3000, :, :, np.newaxis], labels[2000:3000].astype(np.int32)
    untrained = initial_state()
    before = evaluate(MODEL, untrained.eval_variables, test_images, test_labels).accuracy
    after = evaluate(MODEL, state.eval_variables, test_images, test_labels).accuracy
    assert before < 0.3
    assert after > 0.75
