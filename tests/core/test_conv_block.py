"""The block op computes what JAX's own convolution, ReLU and pooling compute, and so do its gradients."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn_jax.core.conv_block import (
    _convolve_pixels,
    _convolve_shifts,
    _convolve_windows,
    _pool,
    _sum_at_once,
    _sum_by_image,
    conv_block,
)
from tests.helpers import ROOT


def reference_block(images, kernel, bias, pool):
    """The same, by the operations that JAX and the field use for it, with the gradients JAX derives."""
    x = lax.conv_general_dilated(
        images,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )
    x = jax.nn.relu(x + bias[jnp.newaxis, jnp.newaxis, jnp.newaxis, :])
    initial, operation = (-jnp.inf, lax.max) if pool == "max" else (0.0, lax.add)
    x = lax.reduce_window(x, np.array(initial, x.dtype)[()], operation, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x if pool == "max" else x / 4


def value_and_gradients(block, operands, cotangent):
    """The block's value and its gradients with respect to images, kernel and bias, in one compiled program."""

    @jax.jit
    def run(operands, cotangent):
        value, vjp = jax.vjp(block, *operands)
        return value, *vjp(cotangent)

    return run(operands, cotangent)


def draw(shape, kernel_shape, dtype, *, integers=False):
    """Images, kernel, bias and a cotangent; of small integers, pooling windows have many ties."""
    random = np.random.default_rng(3)
    n, height, width, _ = shape
    features = kernel_shape[-1]
    if integers:
        operands = (
            random.integers(0, 2, shape),
            random.integers(-1, 2, kernel_shape),
            random.integers(-1, 2, features),
        )
    else:
        operands = (random.normal(size=shape), random.normal(size=kernel_shape), random.normal(size=features))
    cotangent = random.normal(size=(n, height // 2, width // 2, features))
    return [jnp.asarray(array, dtype) for array in (*operands, cotangent)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize(
    ("shape", "kernel_shape"),
    [
        ((2, 28, 28, 1), (3, 3, 1, 32)),
        ((2, 14, 14, 32), (3, 3, 32, 64)),
        ((1, 9, 7, 3), (5, 2, 3, 4)),
        ((2, 6, 5, 12), (4, 3, 12, 3)),
    ],
    ids=["block 1", "block 2", "odd size, even kernel, few channels", "odd width, even kernel"],
)
def test_values_and_gradients_equal_those_of_convolution_relu_and_reduce_window(shape, kernel_shape, pool, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        *operands, cotangent = draw(shape, kernel_shape, dtype)
        ours = value_and_gradients(lambda *args: conv_block(*args, pool, dtype), operands, cotangent)
        theirs = value_and_gradients(lambda *args: reference_block(*args, pool), operands, cotangent)
        for mine, reference in zip(ours, theirs, strict=True):
            assert mine.dtype == reference.dtype == dtype
            tolerance = (1e-5 if dtype == jnp.float32 else 1e-13) * jnp.abs(reference).max()
            np.testing.assert_allclose(mine, reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize("convolve", [_convolve_pixels, _convolve_windows, _convolve_shifts])
@pytest.mark.parametrize(
    ("shape", "kernel_shape"),
    [((2, 9, 7, 3), (5, 2, 3, 4)), ((2, 6, 5, 4), (4, 3, 4, 3)), ((1, 4, 4, 1), (3, 3, 1, 2))],
)
def test_each_convolution_is_right_for_any_size(convolve, shape, kernel_shape):
    with jax.enable_x64(True):
        *operands, cotangent = draw(shape, kernel_shape, jnp.float64)

        def block(images, kernel, bias):
            bias = bias[jnp.newaxis, jnp.newaxis, jnp.newaxis, :]
            return _pool("max", jnp.zeros_like(bias), *convolve(jnp.float64, images, kernel, bias))

        ours = value_and_gradients(block, operands, cotangent)
        theirs = value_and_gradients(lambda *args: reference_block(*args, "max"), operands, cotangent)
        for mine, reference in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-13 * jnp.abs(reference).max())


def test_the_sums_of_accelerators_are_those_of_a_cpu():
    random = np.random.default_rng(0)
    patches, cotangent = random.normal(size=(6 * 20, 9)), random.normal(size=(6 * 20, 4))
    with jax.enable_x64(True):
        for mine, reference in zip(_sum_by_image(6, patches, cotangent), _sum_at_once(patches, cotangent), strict=True):
            np.testing.assert_allclose(mine, reference, rtol=1e-12)


def test_it_can_be_sharded_over_devices():
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from cnn_jax.core.conv_block import conv_block
assert len(jax.devices()) == 4
random = np.random.default_rng(0)
images = random.normal(size=(8, 14, 14, 32)).astype(np.float32)
kernel = random.normal(size=(3, 3, 32, 64)).astype(np.float32)
bias = jnp.zeros(64)
gradient = jax.jit(jax.value_and_grad(lambda *args: conv_block(*args).sum(), argnums=(0, 1, 2)))
expected = gradient(images, kernel, bias)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
sharded = gradient(jax.device_put(images, NamedSharding(mesh, PartitionSpec("data"))), kernel, bias)
assert len(sharded[1][0].sharding.device_set) == 4
for one, other in zip(jax.tree.leaves(sharded), jax.tree.leaves(expected)):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_the_gradient_at_a_tie_goes_to_the_first_maximum_of_the_window():
    *operands, cotangent = draw((3, 8, 8, 8), (3, 3, 8, 16), jnp.float32, integers=True)
    ours = value_and_gradients(conv_block, operands, cotangent)
    theirs = value_and_gradients(lambda *args: reference_block(*args, "max"), operands, cotangent)
    np.testing.assert_array_equal(ours[0], theirs[0])
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-5 * jnp.abs(reference).max())


def test_it_can_be_compiled_mapped_and_scanned():
    images, kernel, bias, _ = draw((6, 8, 8, 2), (3, 3, 2, 4), jnp.float32)

    def total(images, kernel, bias):
        return conv_block(images, kernel, bias).sum()

    gradient = jax.jit(jax.grad(total, argnums=1))
    expected = gradient(images, kernel, bias)
    halves = images.reshape(2, 3, 8, 8, 2)
    mapped = jax.jit(jax.vmap(gradient, in_axes=(0, None, None)))(halves, kernel, bias).sum(axis=0)
    _, scanned = lax.scan(lambda carry, half: (carry, gradient(half, kernel, bias)), None, halves)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(scanned.sum(axis=0), expected, rtol=1e-5, atol=1e-4)


def test_bfloat16_operands_are_summed_in_float32():
    images, kernel, bias, cotangent = draw((2, 8, 8, 32), (3, 3, 32, 8), jnp.float32)
    value, *gradients = value_and_gradients(
        lambda *args: conv_block(*args, "max", jnp.bfloat16), (images, kernel, bias), cotangent
    )

    def rounded(array):
        return array.astype(jnp.bfloat16).astype(jnp.float32)

    expected = reference_block(rounded(images), rounded(kernel), bias, "max")
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-4)
    assert [gradient.dtype for gradient in gradients] == [jnp.float32] * 3
