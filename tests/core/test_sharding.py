"""Many seeds in one program end as each would alone, and a batch's mean does not depend on the number of devices."""

import json
import os

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cnn_jax.core.evaluation import evaluate
from cnn_jax.core.model import CNN
from cnn_jax.core.recipes import accurate, tutorial
from cnn_jax.core.sharding import (
    choose_group,
    create_states,
    epoch_orders,
    evaluate_seeds,
    make_mesh,
    place,
    place_test_set,
    run_steps_of_seeds,
    seed_keys,
)
from cnn_jax.runtime.distributed import to_host

pytestmark = pytest.mark.optax_promotes


@pytest.fixture(scope="module")
def train_set(real_images):
    images, labels = real_images
    return images[:1000, :, :, np.newaxis], labels[:1000].astype(np.int32)


def train(train_set, seeds, *, group=None, recipe=None, steps=10):
    """The states and losses of seeds after an epoch of ten steps."""
    mesh = make_mesh(len(seeds))
    init_keys, order_keys, augment_keys = seed_keys(np.array(seeds, np.uint32), mesh)
    states = create_states(init_keys, CNN(), (28, 28, 1), recipe or tutorial(0.001), mesh)
    orders = epoch_orders(order_keys, 0, num_examples=1000, batch_size=100, mesh=mesh)
    examples = place(train_set, mesh, P())
    states, losses = run_steps_of_seeds(states, *examples, orders, augment_keys, 0, steps, mesh=mesh, group=group)
    return states, to_host(losses)


@pytest.mark.parametrize("recipe", [tutorial(0.001), accurate(0.003, 10)], ids=["tutorial", "accurate"])
def test_each_seed_ends_as_its_own_single_run(train_set, recipe):
    seeds = (777, 778, 779)
    states, losses = train(train_set, seeds, recipe=recipe)
    for place_of, seed in enumerate(seeds):
        alone, alone_losses = train(train_set, (seed,), recipe=recipe)
        np.testing.assert_allclose(losses[place_of], alone_losses[0], rtol=1e-5)
        for one, other in zip(jax.tree.leaves(states.params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(one[place_of], other[0], atol=1e-4)


def test_however_many_seeds_are_trained_at_once_they_end_the_same(train_set):
    seeds = (1, 2, 3, 4, 5)
    _, expected = train(train_set, seeds, steps=3)
    for group in (2, 5):
        _, losses = train(train_set, seeds, group=group, steps=3)
        np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_seeds_differ_in_their_weights_and_in_their_order(train_set):
    mesh = make_mesh(2)
    init_keys, order_keys, _ = seed_keys(np.array([1, 2], np.uint32), mesh)
    states = create_states(init_keys, CNN(), (28, 28, 1), tutorial(0.001), mesh)
    kernels = np.asarray(states.params["fc"]["kernel"])
    assert not np.isclose(kernels[0], kernels[1]).any(axis=0).all()
    orders = np.asarray(epoch_orders(order_keys, 0, num_examples=1000, batch_size=100, mesh=mesh))
    assert (orders[0] == orders[1]).mean() < 0.02


def test_groups_fill_a_devices_memory_and_no_more():
    assert choose_group(32, seed_bytes=10**9, device_bytes=80 * 10**9) == 32
    assert choose_group(32, seed_bytes=10**9, device_bytes=10 * 10**9) == 6
    assert choose_group(32, seed_bytes=10**11, device_bytes=10 * 10**9) == 1
    assert choose_group(1, seed_bytes=10**9, device_bytes=10 * 10**9) is None
    assert choose_group(32, seed_bytes=10**9, device_bytes=None) is None


def test_every_seed_is_tested_on_every_image(train_set):
    mesh = make_mesh(2)
    init_keys, _, _ = seed_keys(np.array([3, 4], np.uint32), mesh)
    states = create_states(init_keys, CNN(), (28, 28, 1), tutorial(0.001), mesh)
    images, labels = train_set[0][:333], train_set[1][:333]
    results = evaluate_seeds(states.apply_fn, states.params, *place_test_set(images, labels, mesh), mesh=mesh)
    for place_of, result in enumerate(results):
        params = jax.tree.map(lambda leaf, place_of=place_of: leaf[place_of], states.params)
        alone = evaluate(states.apply_fn, params, images, labels)
        assert (result.count, result.correct) == (333, alone.correct)
        assert result.loss == pytest.approx(alone.loss, rel=1e-6)


DEVICES = """
import jax, numpy as np
from cnn_jax.core.sharding import *
from cnn_jax.core.model import CNN
from cnn_jax.core.recipes import {recipe}
from cnn_jax.runtime.distributed import to_host
from jax.sharding import PartitionSpec as P
seeds, batch_size = {seeds}, 100
mesh = make_mesh(seeds)
assert dict(mesh.shape) == {mesh}, mesh
generator = np.random.default_rng(0)
images, labels = np.load("{images}"), np.load("{labels}")
init_keys, order_keys, augment_keys = seed_keys(np.arange(seeds, dtype=np.uint32), mesh)
states = create_states(init_keys, CNN(), (28, 28, 1), {recipe}(*{arguments}), mesh)
orders = epoch_orders(order_keys, 0, num_examples=len(labels), batch_size=batch_size, mesh=mesh)
examples = place((images, labels), mesh, P())
states, losses = run_steps_of_seeds(states, *examples, orders, augment_keys, 0, 10, mesh=mesh, group=None)
tested = evaluate_seeds(states.apply_fn, states.params, *place_test_set(images[:333], labels[:333], mesh), mesh=mesh)
assert all(result.count == 333 for result in tested)
print(repr(to_host(losses).tolist()))
"""


@pytest.mark.parametrize(
    ("recipe", "arguments", "seeds", "mesh"),
    [
        ("tutorial", (0.001,), 1, {"seeds": 1, "data": 8}),
        ("accurate", (0.003, 10), 1, {"seeds": 1, "data": 8}),
        ("tutorial", (0.001,), 4, {"seeds": 4, "data": 2}),
    ],
)
def test_one_device_or_eight_give_the_same_costs(train_set, program, tmp_path, recipe, arguments, seeds, mesh):
    """100 images do not divide by 8: each batch is filled up, and what fills it counts for nothing."""
    images, labels = tmp_path / "images.npy", tmp_path / "labels.npy"
    np.save(images, train_set[0])
    np.save(labels, train_set[1])
    costs = []
    for devices, shape in ((8, mesh), (1, {"seeds": 1, "data": 1})):
        code = DEVICES.format(recipe=recipe, arguments=arguments, seeds=seeds, mesh=shape, images=images, labels=labels)
        flags = f"--xla_force_host_platform_device_count={devices}"
        process = program("-c", code, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        costs.append(np.array(json.loads(out)))
    assert costs[0].shape == (seeds, 10)
    np.testing.assert_allclose(costs[0], costs[1], atol=1e-5)
