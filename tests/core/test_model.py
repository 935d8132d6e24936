"""The network is the tutorial's: its shapes, its parameters, and where its weights start from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.core.model import CNN, PlainCNN, _add_products


def initial_params(model=None, image_shape=(28, 28, 1), seed=0):
    model = model or CNN()
    return model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)))["params"]


def test_it_has_the_tutorials_50_186_parameters():
    sizes = jax.tree.map(lambda leaf: leaf.shape, initial_params(), is_leaf=lambda leaf: hasattr(leaf, "shape"))
    assert sizes == {
        "layer1": {"kernel": (3, 3, 1, 32), "bias": (32,)},
        "layer2": {"kernel": (3, 3, 32, 64), "bias": (64,)},
        "fc": {"kernel": (3136, 10), "bias": (10,)},
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(initial_params())) == 320 + 18_496 + 31_370 == 50_186


def test_each_layer_has_the_shape_that_the_tutorial_prints():
    model = CNN()
    images = jnp.zeros((5, 28, 28, 1))
    logits, kept = model.apply({"params": initial_params()}, images, capture_intermediates=True)
    shapes = {name: layer["__call__"][0].shape for name, layer in kept["intermediates"].items() if name != "__call__"}
    assert shapes == {"layer1": (5, 14, 14, 32), "layer2": (5, 7, 7, 64), "fc": (5, 10)}
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_other_sizes_channels_and_classes_shape_the_network(pool):
    model = CNN(features=(4, 6), num_classes=3, pool=pool)
    params = initial_params(model, image_shape=(33, 30, 3))
    assert params["fc"]["kernel"].shape == (8 * 7 * 6, 3)
    assert model.apply({"params": params}, jnp.ones((2, 33, 30, 3))).shape == (2, 3)


@pytest.mark.parametrize(
    ("layer", "weight", "bound"),
    [
        ("layer1", "kernel", 1 / np.sqrt(9)),
        ("layer1", "bias", 1 / np.sqrt(9)),
        ("layer2", "kernel", 1 / np.sqrt(288)),
        ("layer2", "bias", 1 / np.sqrt(288)),
        ("fc", "kernel", np.sqrt(6 / (3136 + 10))),
        ("fc", "bias", 1 / np.sqrt(3136)),
    ],
)
def test_initial_weights_are_uniform_within_the_bounds_that_pytorch_states(layer, weight, bound):
    draws = np.concatenate([np.ravel(initial_params(seed=seed)[layer][weight]) for seed in range(3)])
    assert np.abs(draws).max() <= bound
    # The largest distance between the draws' distribution and the uniform one stays below the value that chance
    # exceeds once in a million (Kolmogorov-Smirnov, asymptotic).
    draws = np.sort(draws)
    uniform = (draws + bound) / (2 * bound)
    steps = np.arange(len(draws) + 1) / len(draws)
    distance = max(np.abs(uniform - steps[1:]).max(), np.abs(uniform - steps[:-1]).max())
    assert distance < np.sqrt(np.log(2e6) / 2 / len(draws))
    # A distribution on a smaller interval would come that close with few draws, but not this close to the bound.
    assert np.abs(draws).max() > bound * (1 - 12 / len(draws))


@pytest.mark.parametrize(("shape", "features"), [((28, 28, 1), (32, 64)), ((9, 13, 3), (5, 12))])
def test_the_fast_network_computes_the_plain_one_and_so_do_its_gradients(shape, features):
    images = jax.random.uniform(jax.random.key(1), (4, *shape))
    plain, fast = PlainCNN(features=features), CNN(features=features)
    params = plain.init(jax.random.key(2), images)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, fast.init(jax.random.key(2), images)["params"])

    def logits_and_gradients(model):
        def total(params):
            logits = model.apply({"params": params}, images)
            return (logits**2).sum(), logits

        return jax.jit(jax.grad(total, has_aux=True))(params)

    for ours, expected in zip(*map(jax.tree.leaves, map(logits_and_gradients, (fast, plain))), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("inputs", [128, 100])
def test_a_gpus_sum_of_products_is_the_dense_layer_and_so_are_its_gradients(inputs):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((5, inputs), (inputs, 10), (10,), (5, 10))
    *arguments, cotangent = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))

    def values_and_gradients(dense):
        values, gradients = jax.vjp(dense, *arguments)
        return values, *gradients(cotangent)

    expected = values_and_gradients(lambda x, kernel, bias: x @ kernel + bias[jnp.newaxis])
    for ours, plain in zip(values_and_gradients(_add_products), expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * np.abs(plain).max())
