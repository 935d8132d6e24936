"""Many seeds in one program end as each would alone, and a batch's mean does not depend on the number of devices."""

import json
import os

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cnn_jax.core.evaluation import evaluate
from cnn_jax.core.sharding import count_parts, make_mesh, of_seed, shard, to_host
from cnn_jax.runs.program import (
    Sizes,
    count_seeds_at_once,
    evaluate_seeds,
    make_program,
    shard_test_set,
    start_states,
)
from cnn_jax.runs.settings import TrainSettings

pytestmark = pytest.mark.optax_promotes

SIZES = Sizes(train_examples=1000, image_shape=(28, 28, 1), num_classes=10)


@pytest.fixture(scope="module")
def train_set(real_images):
    images, labels = real_images
    return images[:1000, :, :, np.newaxis], labels[:1000].astype(np.int32)


def program_of(seed, seeds, *, recipe="tutorial", learning_rate=0.001, hyperparameters=(), **options):
    """The program of a run of one epoch of ten steps."""
    settings = TrainSettings(
        seed=seed, seeds=seeds, recipe=recipe, epochs=1, learning_rate=learning_rate, hyperparameters=hyperparameters
    )
    return make_program(settings, SIZES, make_mesh(seeds, jax.devices()), **options)


def train(train_set, program, *, steps=10):
    """The states and losses of a program after so many steps."""
    data = shard(train_set, program.mesh, P())
    states, losses = program.run_steps(start_states(program), program.epoch(0), *data, np.int32(0), np.int32(steps))
    return states, to_host(losses)


@pytest.mark.parametrize("recipe", ["tutorial", pytest.param("accurate", marks=pytest.mark.slow)])
def test_each_seed_ends_as_its_own_single_run(train_set, recipe):
    states, losses = train(train_set, program_of(777, 3, recipe=recipe))
    run_steps = program_of(777, 1, recipe=recipe).run_steps  # compiled once: no seed is part of it
    for i in range(3):
        program = program_of(777 + i, 1, recipe=recipe)._replace(run_steps=run_steps)
        alone, alone_losses = train(train_set, program)
        np.testing.assert_allclose(losses[i], alone_losses[0], rtol=1e-5)
        for one, other in zip(jax.tree.leaves(states.params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(one[i], other[0], atol=1e-4)


OTHER_ARGUMENTS = {
    "tutorial": ({"learning_rate": 0.001}, {"learning_rate": 0.01}),
    "fast": (
        {"learning_rate": 0.001, "momentum": 0.5, "smoothing": 0.2},
        {"learning_rate": 0.01, "momentum": 0.9, "smoothing": 0.0},
    ),
    "accurate": (
        {"learning_rate": 0.005, "weight_decay": 0.0, "smoothing": 0.1},
        {"learning_rate": 0.005, "weight_decay": 10.0, "smoothing": 0.0},
    ),
}


@pytest.mark.parametrize(
    ("recipe", "seeds_at_once"),
    [
        ("tutorial", None),
        pytest.param("tutorial", 4, marks=pytest.mark.slow),
        pytest.param("fast", None, marks=pytest.mark.slow),
        pytest.param("accurate", 4, marks=pytest.mark.slow),
    ],
)
def test_runs_of_other_arguments_in_one_program_end_as_each_does_alone(train_set, recipe, seeds_at_once):
    arguments = OTHER_ARGUMENTS[recipe]
    program = program_of(777, 2, recipe=recipe, seeds_at_once=seeds_at_once, arguments=arguments)
    states, losses = train(train_set, program, steps=5)
    ends = []
    for i, (rate, *others) in enumerate(map(dict.items, arguments)):
        hyperparameters = tuple(f"{name}={number}" for name, number in others)
        program = program_of(777, 2, recipe=recipe, learning_rate=rate[1], hyperparameters=hyperparameters)
        alone, alone_losses = train(train_set, program, steps=5)
        np.testing.assert_allclose(losses[2 * i : 2 * i + 2], alone_losses, rtol=1e-4)
        for one, other in zip(jax.tree.leaves(states.params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(one[2 * i : 2 * i + 2], other, atol=1e-4)
        ends.append(alone.params["fc"]["kernel"])
    assert np.abs(ends[0] - ends[1]).max() > 1e-3  # the arguments matter


@pytest.mark.slow
def test_however_many_seeds_are_trained_at_once_they_end_the_same(train_set):
    _, expected = train(train_set, program_of(1, 3), steps=3)
    for seeds_at_once in (2, 3):
        _, losses = train(train_set, program_of(1, 3, seeds_at_once=seeds_at_once), steps=3)
        np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_seeds_differ_in_their_weights_and_in_their_batches():
    program = program_of(1, 2)
    kernels = np.asarray(start_states(program).params["fc"]["kernel"])
    assert not np.isclose(kernels[0], kernels[1]).any(axis=0).all()
    batches = np.asarray(program.epoch(0).batches)
    assert (batches[0] == batches[1]).mean() < 0.02


def test_the_seeds_trained_at_once_fill_a_devices_memory_and_no_more():
    assert count_seeds_at_once(32, seed_bytes=10**9, device_bytes=80 * 10**9) == 32
    assert count_seeds_at_once(32, seed_bytes=10**9, device_bytes=10 * 10**9) == 6
    assert count_seeds_at_once(32, seed_bytes=10**11, device_bytes=10 * 10**9) == 1


def test_on_a_cpu_a_batch_is_cut_into_parts_that_fit_its_cache():
    mesh = make_mesh(1, jax.devices())
    assert [count_parts(mesh, images) for images in (1, 49, 50, 100, 101, 128)] == [1, 1, 2, 4, 1, 4]


def test_every_seed_is_tested_on_every_image(train_set):
    program = program_of(3, 2)
    states = start_states(program)
    images, labels = train_set[0][:333], train_set[1][:333]
    results = evaluate_seeds(program, states, shard_test_set(images, labels, program.mesh))
    for i, result in enumerate(results):
        alone = evaluate(program.model, of_seed(states.eval_variables, i), images, labels)
        assert (result.count, result.correct) == (333, alone.correct)
        assert result.loss == pytest.approx(alone.loss, rel=1e-6)


@pytest.mark.parametrize("arguments", [None, OTHER_ARGUMENTS["tutorial"]])
def test_a_program_is_lowered_from_shapes_alone(arguments):
    program = program_of(1, 2, arguments=arguments)
    states, epoch = jax.eval_shape(program.start), jax.eval_shape(program.epoch, np.int32(0))
    images, labels = jax.ShapeDtypeStruct((1000, 28, 28, 1), np.uint8), jax.ShapeDtypeStruct((1000,), np.int32)
    for platform in ("cpu", "cuda", "tpu"):  # none of them is asked whether it is here
        traced = program.run_steps.trace(states, epoch, images, labels, np.int32(0), np.int32(10))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.dot_general" in text
        assert "stablehlo.convolution" not in text  # convolutions are products and sums of shifted images


DEVICES = """
import numpy as np
from tests.core.test_sharding import evaluate_seeds, program_of, shard_test_set, train
program = program_of(0, {seeds}, recipe="{recipe}")
assert dict(program.mesh.shape) == {mesh}, program.mesh
images, labels = np.load("{images}"), np.load("{labels}")
states, losses = train((images, labels), program)
tests = evaluate_seeds(program, states, shard_test_set(images[:333], labels[:333], program.mesh))
assert [test.count for test in tests] == [333] * {seeds}
print(losses.tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "seeds", "mesh"),
    [
        ("accurate", 1, {"seeds": 1, "data": 8}),
        ("tutorial", 4, {"seeds": 4, "data": 2}),
    ],
)
def test_one_device_or_eight_give_the_same_costs(train_set, program, tmp_path, recipe, seeds, mesh):
    """100 images do not divide by 8: each batch is filled up, and what fills it counts for nothing."""
    images, labels = tmp_path / "images.npy", tmp_path / "labels.npy"
    np.save(images, train_set[0])
    np.save(labels, train_set[1])
    code = DEVICES.format(recipe=recipe, seeds=seeds, mesh=mesh, images=images, labels=labels)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    process = program("-c", code, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})
    one_device = program_of(0, seeds, recipe=recipe)
    assert dict(one_device.mesh.shape) == {"seeds": 1, "data": 1}
    states, expected = train(train_set, one_device)
    tests = evaluate_seeds(one_device, states, shard_test_set(*(part[:333] for part in train_set), one_device.mesh))
    assert [test.count for test in tests] == [333] * seeds
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    costs = np.array(json.loads(out))
    assert costs.shape == (seeds, 10)
    np.testing.assert_allclose(costs, expected, atol=1e-5)
