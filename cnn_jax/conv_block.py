"""Convolution, bias, ReLU and 2x2 pooling as one differentiable operation that is fast inside a compiled loop.

It computes what `lax.conv_general_dilated` with padding "SAME", `jnp.maximum(., 0)` and `lax.reduce_window` compute
in turn. It has a gradient of its own because the one that JAX derives from those is slow on a CPU: there, XLA spends
45 ms a block in the gradient of `reduce_window`, 19 ms in the weight gradient of the second block's convolution, and
over a second in it inside a loop. The milliseconds here are for a batch of 100 on two cores.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Pool = Literal["max", "avg"]

# A matrix product over fewer values than this (kernel height x width x channels) leaves most of each vector register
# empty: for block 1, with 9 values, XLA's convolution is faster; for block 2, with 288, the product of patches is
# (a whole step in 28 ms; with XLA's convolution forwards and for the input's gradient, 37 ms).
SMALLEST_PATCH = 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def conv_block(
    images: jax.Array, kernel: jax.Array, bias: jax.Array, pool: Pool = "max", dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Convolve with stride 1 and padding "SAME", add the bias, apply ReLU, pool 2x2 with stride 2.

    Args:
      images: (N, H, W, C), float32 (float64 where `dtype` is).
      kernel: (h, w, C, F), of the images' dtype; a cross-correlation, as in PyTorch and Flax.
      bias: (F,), of the images' dtype.
      pool: The maximum or the mean of each 2x2 window; a last odd row or column is left out, as in PyTorch.
      dtype: Of the products' operands; they are summed in the images' dtype.

    Returns:
      (N, H // 2, W // 2, F), of the images' dtype. The gradient at a tie goes to the first
      maximum of a window, row by row, as in PyTorch and XLA; that of ReLU at 0 is 0.
    """
    return _forward(images, kernel, bias, pool, dtype)[0]


def _forward(images, kernel, bias, pool, dtype):
    images, kernel = images.astype(dtype), kernel.astype(dtype)
    patches = None
    if kernel.size // kernel.shape[-1] < SMALLEST_PATCH:
        convolved = _convolve(images, kernel)  # (N, H, W, F)
    else:
        # Kept for the backward pass, which needs the same patches for the weight gradient.
        patches = _extract_patches(images, kernel.shape)  # (N, H, W, h * w * C)
        convolved = _matmul(patches, kernel.reshape(-1, kernel.shape[-1]))  # (N, H, W, F)
    # The backward pass keeps what the convolution gave, not what pooling made of it: the windows' maxima are
    # cheaper to find again than to read back.
    residuals = (images, patches, kernel, bias, convolved)
    return _pool(convolved, bias, pool), residuals


def _backward(pool, dtype, residuals, cotangent):
    images, patches, kernel, bias, convolved = residuals
    bias_cotangent, convolved_cotangent = _unpool(convolved, bias, cotangent, pool)
    convolved_cotangent = convolved_cotangent.astype(dtype)
    if patches is None:
        patches = _extract_patches(images, kernel.shape)
    # As a product of two plain matrices: 1 to 3 ms where XLA's convolution takes 19. Left in four dimensions, the
    # same product costs a step 43 ms in place of 28.
    kernel_cotangent = _matmul(
        patches.reshape(-1, patches.shape[-1]).T, convolved_cotangent.reshape(-1, kernel.shape[-1])
    ).reshape(kernel.shape)
    image_cotangent = _scatter_patches(
        _matmul(convolved_cotangent, kernel.reshape(-1, kernel.shape[-1]).T), images.shape, kernel.shape
    )
    return image_cotangent, kernel_cotangent, bias_cotangent


conv_block.defvjp(_forward, _backward)


def _precision(dtype):
    # Full float32 products on every platform: a TPU's default would round the operands to bfloat16, a GPU's to TF32.
    return lax.Precision.HIGHEST if jnp.dtype(dtype) != jnp.bfloat16 else lax.Precision.DEFAULT


def _sum_dtype(dtype):
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def _convolve(images, kernel):
    return lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_precision(images.dtype),
        preferred_element_type=_sum_dtype(images.dtype),
    )


def _matmul(left, right):
    return lax.dot_general(
        left,
        right,
        (((left.ndim - 1,), (0,)), ((), ())),
        precision=_precision(left.dtype),
        preferred_element_type=_sum_dtype(left.dtype),
    )


def _same_padding(size):
    """How many zeros go before and after, so that a window of this size leaves the length as it is."""
    return (size - 1) // 2, size // 2


def _extract_patches(images, kernel_shape):
    """Lay out, for each pixel, the window around it: (N, H, W, C) -> (N, H, W, h * w * C)."""
    n, height, width, channels = images.shape
    rows, columns = kernel_shape[:2]
    padded = jnp.pad(images, ((0, 0), _same_padding(rows), _same_padding(columns), (0, 0)))
    # Nested stacks of slices: 1.8 ms for block 2; one concatenation of the nine slices takes 3 to 13, a gather 4.7.
    patches = jnp.stack(
        [jnp.stack([padded[:, i : i + height, j : j + width] for j in range(columns)], axis=3) for i in range(rows)],
        axis=3,
    )
    return patches.reshape(n, height, width, rows * columns * channels)


def _scatter_patches(patches, images_shape, kernel_shape):
    """Add each window's values to the pixels they came from: the transpose of `_extract_patches`."""
    n, height, width, channels = images_shape
    rows, columns = kernel_shape[:2]
    patches = patches.reshape(n, height, width, rows, columns, channels)
    # The window's value (i, j) belongs to the pixel (i - top, j - left) further on. `lax.pad` crops where the padding
    # is negative, so that each of the summands has the images' size.
    top, left = _same_padding(rows)[0], _same_padding(columns)[0]
    shifted = [
        lax.pad(
            patches[:, :, :, i, j],
            jnp.zeros((), patches.dtype),
            ((0, 0, 0), (i - top, top - i, 0), (j - left, left - j, 0), (0, 0, 0)),
        )
        for i in range(rows)
        for j in range(columns)
    ]
    return functools.reduce(jnp.add, shifted)


def _windows(values):
    """The four corners of each 2x2 window, row by row, each (N, H // 2, W // 2, F)."""
    height, width = (size // 2 * 2 for size in values.shape[1:3])
    return [values[:, i:height:2, j:width:2] for i in range(2) for j in range(2)]


def _pool(convolved, bias, pool):
    corners = _windows(convolved)
    if pool == "max":
        # Adding the bias and ReLU do not change which value is the largest, and after pooling cost a quarter.
        return jnp.maximum(functools.reduce(jnp.maximum, corners) + _broadcast(bias, convolved), 0)
    return sum(jnp.maximum(corner + _broadcast(bias, convolved), 0) for corner in corners) / 4


def _unpool(convolved, bias, cotangent, pool):
    """The cotangents of the bias, (F,), and of the convolution's result, (N, H, W, F)."""
    corners = _windows(convolved)
    bias = _broadcast(bias, convolved)
    if pool == "max":
        # As slices and comparisons: 0.2 to 0.7 ms where the gradient of `reduce_window` takes 45.
        largest = functools.reduce(jnp.maximum, corners)
        cotangent = jnp.where(largest + bias > 0, cotangent, 0)
        bias_cotangent = cotangent.sum(axis=(0, 1, 2))
        parts, taken = [], jnp.zeros(largest.shape, bool)
        for corner in corners:
            is_first_maximum = (corner == largest) & ~taken
            taken = taken | is_first_maximum
            parts.append(jnp.where(is_first_maximum, cotangent, 0))
    else:
        parts = [jnp.where(corner + bias > 0, cotangent / 4, 0) for corner in corners]
        bias_cotangent = sum(parts).sum(axis=(0, 1, 2))
    return bias_cotangent, _interleave(parts, convolved.shape)


def _interleave(corners, shape):
    """Put the four corners of each window back in their places: the transpose of `_windows`."""
    n, height, width, channels = shape
    rows = [jnp.stack(corners[i : i + 2], axis=3) for i in (0, 2)]
    values = jnp.stack(rows, axis=2).reshape(n, height // 2 * 2, width // 2 * 2, channels)
    return jnp.pad(values, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))


def _broadcast(bias, values):
    return bias.astype(values.dtype)[jnp.newaxis, jnp.newaxis, jnp.newaxis, :]
