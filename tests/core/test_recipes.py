"""A recipe changes what it says: the images by their keys, the labels' weights, the weights that are tested."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax.core.model import CNN
from cnn_jax.core.recipes import (
    Recipe,
    accurate,
    cross_entropy,
    distort,
    fast,
    smoothed,
    tutorial,
)
from cnn_jax.core.training import create_train_state, make_keys, train_step
from cnn_jax.runs.program import make_recipe
from cnn_jax.runs.settings import RECIPE_DEFAULTS, TrainSettings
from tests.helpers import metrics_of

pytestmark = pytest.mark.optax_promotes

STILL = {"pixels": 0.0, "degrees": 0.0, "scale": 0.0, "bend": 0.0, "stroke": 0.0}  # what `distort` changes nothing with


@pytest.fixture(scope="module")
def batch(real_images):
    images, labels = real_images
    return images[:100, :, :, np.newaxis], labels[:100].astype(np.int32)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_the_tutorials_recipe_is_adam_on_the_images_as_they_are():
    recipe = tutorial(0.001)
    assert recipe == Recipe(recipe.optimizer, elementwise=True)
    assert recipe.loss is cross_entropy
    assert (recipe.augment, recipe.ema_decay) == (None, None)


@pytest.mark.parametrize("loss", [cross_entropy, smoothed(0.0)], ids=["by index, as on a CPU", "elsewhere"])
def test_the_cross_entropy_is_minus_the_log_of_the_softmax_at_the_label(loss):
    logits, labels = jax.random.normal(keys(1)[0], (20, 7)), jnp.arange(20, dtype=jnp.int32) % 7
    expected = -jnp.log(jax.nn.softmax(logits))[jnp.arange(20), labels]
    np.testing.assert_allclose(loss(logits, labels), expected, rtol=1e-5)


def test_moves_of_nothing_leave_the_images_as_they_are(batch):
    images = jnp.asarray(batch[0][:5].astype(np.float32) / 255)
    still = distort(keys(5), images, **STILL)
    np.testing.assert_allclose(still, images, atol=1e-5)


def test_a_shift_moves_the_digit_by_at_most_so_many_pixels(batch):
    images = jnp.asarray(batch[0][:50].astype(np.float32) / 255)
    moved = np.asarray(distort(keys(50), images, **STILL | {"pixels": 2.0}))
    rows = np.arange(28, dtype=np.float32)

    def centres(images):
        return (images[..., 0].sum(axis=2) * rows).sum(axis=1) / images.sum(axis=(1, 2, 3))

    distances = np.abs(centres(moved) - centres(np.asarray(images)))
    assert distances.max() <= 2.05
    assert distances.max() > 1
    assert moved.shape == images.shape
    assert moved.min() >= 0
    assert moved.max() <= 1 + 1e-6


def test_bending_displaces_by_so_many_pixels_and_smoothly():
    columns = np.broadcast_to(np.arange(28, dtype=np.float32) / 27, (300, 28, 28))[..., np.newaxis]
    bent = np.asarray(distort(keys(300), jnp.asarray(columns), **STILL | {"bend": 0.5}))
    # In the inner part, a pixel's value tells the column that it comes from.
    displacements = ((bent - columns) * 27)[:, 4:-4, 4:-4, 0]
    assert np.sqrt((displacements**2).mean()) == pytest.approx(0.5, rel=0.05)
    assert np.sqrt((np.diff(displacements, axis=1) ** 2).mean()) < 0.15


def test_strokes_get_thinner_in_some_images_and_thicker_in_others_and_stay_where_they_are(batch):
    images = batch[0][:50].astype(np.float32) / 255
    drawn = np.asarray(distort(keys(50), jnp.asarray(images), **STILL | {"stroke": 0.4}))
    grey = np.where((images > 0.1) & (images < 0.9), images, np.nan)
    exponents = np.nanmedian(np.log(np.maximum(drawn, 1e-6)) / np.log(grey), axis=(1, 2, 3))
    assert np.exp(-0.41) < exponents.min() < 0.8
    assert 1.25 < exponents.max() < np.exp(0.41)
    np.testing.assert_allclose(drawn, images ** exponents[:, np.newaxis, np.newaxis, np.newaxis], atol=1e-3)


def test_each_image_moves_by_its_own_key_and_by_no_other(batch):
    images = jnp.repeat(batch[0][:1].astype(np.float32) / 255, 4, axis=0)
    moved = np.asarray(distort(keys(4), images))
    assert not np.allclose(moved[0], moved[1], atol=0.05)
    np.testing.assert_array_equal(moved, distort(keys(4), images))
    np.testing.assert_allclose(moved[:2], distort(keys(4)[:2], images[:2]), atol=1e-6)


def test_smoothed_labels_give_some_weight_to_every_class():
    logits = jnp.array([[2.0, 0, 0, 0], [0, 0, 0, 5.0]], jnp.float32)
    labels = jnp.array([0, 1], jnp.int32)
    logs = np.log(np.exp(np.asarray(logits)) / np.exp(np.asarray(logits)).sum(axis=1, keepdims=True))
    weights = 0.9 * np.eye(4)[[0, 1]] + 0.1 / 4
    np.testing.assert_allclose(smoothed(0.1)(logits, labels), -(weights * logs).sum(axis=1), rtol=1e-6)
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(smoothed(0.0)(logits, labels), plain, rtol=1e-6)


def test_the_weights_that_are_tested_are_an_average_over_the_steps(batch):
    recipe = Recipe(optax.sgd(0.1), ema_decay=0.5)
    model = CNN()
    state = create_train_state(make_keys(0).init_key, model, (28, 28, 1), recipe)
    expected = state.params["fc"]["bias"]
    for step in range(8):
        state, _ = train_step(state, *batch, model=model, recipe=recipe)
        decay = min(0.5, (2 + step) / (11 + step))
        expected = decay * expected + (1 - decay) * state.params["fc"]["bias"]
    np.testing.assert_allclose(state.eval_variables["params"]["fc"]["bias"], expected, rtol=1e-5)
    assert not np.allclose(state.eval_variables["params"]["fc"]["bias"], state.params["fc"]["bias"])


@pytest.mark.parametrize(("recipe", "last"), [(fast, 0.0), (accurate, 0.002)])
def test_a_schedule_rises_to_the_learning_rate_and_ends_with_the_last_step(recipe, last):
    optimizer = recipe(0.01, 100).optimizer
    weight = jnp.zeros(1)
    state, rates = optimizer.init(weight), []
    for _ in range(100):
        # Under a gradient that stays the same, Adam moves a weight by its learning rate.
        update, state = optimizer.update(jnp.ones(1), state, weight)
        rates.append(-float(update[0]))
    assert max(rates) == pytest.approx(0.01, rel=0.01)
    assert rates[0] < 0.001
    assert rates[-1] == pytest.approx(last, abs=0.0001)


def test_every_recipe_that_can_be_named_can_be_made():
    assert set(RECIPE_DEFAULTS) == {"tutorial", "fast", "accurate"}
    for name in RECIPE_DEFAULTS:
        assert isinstance(make_recipe(TrainSettings.of(recipe=name), 100), Recipe)


@pytest.mark.usefixtures("without_report")
def test_a_recipe_learns_and_a_schedules_run_is_not_made_longer(command, small_mnist, tmp_path):
    arguments = ["train", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--recipe", "accurate"]
    assert command(*arguments, "--epochs", 4, "--batch-size", 50)[0] == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-seed777-accurate-batch50")
    assert metrics_of(folder)[-1]["test_accuracy"] > 0.85
    code, _, err = command(*arguments, "--epochs", 5, "--batch-size", 50)
    assert code == 2
    assert "epochs was 4 and is 5" in err
