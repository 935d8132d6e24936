"""Convolution, bias, ReLU and 2x2 pooling as one differentiable operation that is fast inside a compiled loop.

It computes what `lax.conv_general_dilated` with padding "SAME", `jnp.maximum(., 0)` and `lax.reduce_window` compute
in turn. Its pooling is made of slices and comparisons on every platform, because the gradient of `reduce_window` is
slow. On a CPU its convolution is a matrix product of patches, because XLA spends 19 ms there in the weight gradient of
the second block's convolution, and over a second in it inside a loop; elsewhere it is the platform's own convolution.
The milliseconds in this file are for a batch of 100 on two cores.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Pool = Literal["max", "avg"]

# Below this many values in a kernel's window (height x width x channels) a product of one patch a pixel leaves most of
# each vector register empty, and one patch for each pooling window is faster: block 1, with 9 values, multiplies
# 16 x 128 matrices then, and its four results for a window lie side by side. For block 2, with 288 values, the larger
# patches cost more than they save.
SMALLEST_PIXEL_PATCH = 64


def conv_block(
    images: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw c f"],
    bias: Float[Array, " f"],
    pool: Pool = "max",
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "n h//2 w//2 f"]:
    """Convolve with stride 1 and padding "SAME", add the bias, apply ReLU, pool 2x2 with stride 2.

    The gradient at a tie goes to the first maximum of a window, row by row, as in PyTorch and XLA; that of ReLU at 0
    is 0.

    Args:
      images: float32; float64 where `dtype` is.
      kernel: In the images' dtype; a cross-correlation, as in PyTorch and Flax.
      bias: In the images' dtype.
      pool: The maximum or the mean of each 2x2 window; a last odd row or column is left out, as in PyTorch.
      dtype: The dtype of the products' operands; the sums have the images' dtype.
    """
    patches_of_pixels = kernel.size // kernel.shape[-1] >= SMALLEST_PIXEL_PATCH
    corners = lax.platform_dependent(
        images,
        kernel,
        cpu=functools.partial(_convolve_pixels if patches_of_pixels else _convolve_windows, dtype),
        default=functools.partial(_convolve_natively, dtype),
    )
    return _pool(pool, bias[jnp.newaxis, jnp.newaxis, jnp.newaxis, :], *corners)


# The three convolutions below return the four corners of each pooling window, row by row: four arrays
# (N, H // 2, W // 2, F). Each takes the dtype of its operands first.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve_pixels(dtype, images, kernel):
    return _convolve_pixels_forward(dtype, images, kernel)[0]


def _convolve_pixels_forward(dtype, images, kernel):
    n, height, width, _ = images.shape
    # Without the barrier XLA computes what comes before (a pooling) again for each of the kernel's shifts.
    patches = _pixel_patches(lax.optimization_barrier(images.astype(dtype)), kernel.shape)
    flat_kernel = kernel.astype(dtype).reshape(-1, kernel.shape[-1])
    convolved = _matmul(patches, flat_kernel).reshape(n, height, width, -1)
    # The patches are kept, because the kernel's gradient needs them too.
    return _corners(convolved), (patches, kernel, images)


def _convolve_pixels_backward(dtype, residuals, corner_cotangents):
    patches, kernel, images = residuals
    cotangent = _interleave(corner_cotangents, images.shape).astype(dtype).reshape(-1, kernel.shape[-1])
    flat_kernel = kernel.astype(dtype).reshape(-1, kernel.shape[-1])
    # As products of plain matrices: 1 to 6 ms where XLA's convolution takes 19. Left in four dimensions, the same
    # product makes a step 15 ms slower.
    kernel_cotangent = _matmul(patches.T, cotangent).reshape(kernel.shape)
    image_cotangent = _add_pixel_patches(_matmul(cotangent, flat_kernel.T), images.shape, kernel.shape)
    return image_cotangent, kernel_cotangent


_convolve_pixels.defvjp(_convolve_pixels_forward, _convolve_pixels_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve_windows(dtype, images, kernel):
    return _convolve_windows_forward(dtype, images, kernel)[0]


def _convolve_windows_forward(dtype, images, kernel):
    n, height, width, _ = images.shape
    extract = functools.partial(_window_patches, kernel_shape=kernel.shape)
    patches = extract(_round(images, dtype))
    convolved = _matmul(patches, _window_kernel(_round(kernel, dtype)))  # (N * H // 2 * W // 2, 4 * F)
    corners = jnp.split(convolved.reshape(n, height // 2, width // 2, -1), 4, axis=-1)
    return tuple(corners), (patches, kernel, images)


def _convolve_windows_backward(dtype, residuals, corner_cotangents):
    patches, kernel, images = residuals
    cotangent = _round(jnp.concatenate(corner_cotangents, axis=-1), dtype).reshape(-1, 4 * kernel.shape[-1])
    patch_cotangent = _matmul(cotangent, _window_kernel(_round(kernel, dtype)).T)
    extract = functools.partial(_window_patches, kernel_shape=kernel.shape)
    (image_cotangent,) = jax.linear_transpose(extract, images)(patch_cotangent)
    large = jax.ShapeDtypeStruct(kernel.shape, patch_cotangent.dtype)
    (kernel_cotangent,) = jax.linear_transpose(_window_kernel, large)(_matmul(patches.T, cotangent))
    return image_cotangent, kernel_cotangent


_convolve_windows.defvjp(_convolve_windows_forward, _convolve_windows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve_natively(dtype, images, kernel):
    return _convolve_natively_forward(dtype, images, kernel)[0]


def _convolve_natively_forward(dtype, images, kernel):
    convolved = _convolve(images.astype(dtype), kernel.astype(dtype))
    return _corners(convolved.astype(images.dtype)), (images, kernel)


def _convolve_natively_backward(dtype, residuals, corner_cotangents):
    images, kernel = residuals
    cotangent = _interleave(corner_cotangents, images.shape).astype(dtype)
    # All operands have one dtype here: XLA has no fast convolution for a float32 cotangent and bfloat16 images.
    _, transpose = jax.vjp(_convolve, images.astype(dtype), kernel.astype(dtype))
    return tuple(c.astype(o.dtype) for c, o in zip(transpose(cotangent), residuals, strict=True))


_convolve_natively.defvjp(_convolve_natively_forward, _convolve_natively_backward)


def _convolve(images, kernel):
    return lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_precision(images.dtype),
    )


def _matmul(left, right):
    return lax.dot_general(
        left,
        right,
        (((1,), (0,)), ((), ())),
        precision=_precision(left.dtype),
        preferred_element_type=jnp.float64 if left.dtype == jnp.float64 else jnp.float32,
    )


def _round(values, dtype):
    """Round values to those of another dtype, and leave them in their own."""
    # The sums are the same: a product of two bfloat16 values is exact in float32. Block 1 and its gradient take 1.5 ms
    # so, and 1.9 converted in earnest: XLA's conversions cost more than they save in products of so few values.
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    return values.astype(dtype)


def _precision(dtype):
    # Full float32 products on every platform: a TPU's default would round the operands to bfloat16, a GPU's to TF32.
    return lax.Precision.HIGHEST if dtype != jnp.bfloat16 else lax.Precision.DEFAULT


def _pad(images, kernel_shape):
    """Surround images with the zeros that let a kernel leave their size as it is."""
    (top, bottom), (left, right) = (((size - 1) // 2, size // 2) for size in kernel_shape[:2])
    return jnp.pad(images, ((0, 0), (top, bottom), (left, right), (0, 0)))


def _pixel_patches(images, kernel_shape):
    """Lay out the kernel's window around each pixel: (N, H, W, C) -> (N * H * W, h * w * C)."""
    n, height, width, channels = images.shape
    rows, columns = kernel_shape[:2]
    padded = _pad(images, kernel_shape)
    # Nested stacks of slices: 1.8 ms for block 2; one concatenation of the nine slices takes 3 to 13, a gather 4.7.
    patches = jnp.stack(
        [jnp.stack([padded[:, i : i + height, j : j + width] for j in range(columns)], axis=3) for i in range(rows)],
        axis=3,
    )
    return patches.reshape(n * height * width, rows * columns * channels)


def _add_pixel_patches(patches, images_shape, kernel_shape):
    """Add each window's values to the pixels they came from: the transpose of `_pixel_patches`."""
    n, height, width, channels = images_shape
    rows, columns = kernel_shape[:2]
    patches = patches.reshape(n, height, width, rows, columns, channels)
    # The window's value (i, j) belongs to the pixel (i - top, j - left) further on. `lax.pad` crops where the padding
    # is negative, so that each of the summands has the images' size.
    top, left = (rows - 1) // 2, (columns - 1) // 2
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


def _window_patches(images, kernel_shape):
    """Lay out what each pooling window needs: (N, H, W, C) -> (N * H // 2 * W // 2, (h + 1) * (w + 1) * C)."""
    n, height, width, _ = images.shape
    height, width = height // 2 * 2, width // 2 * 2
    rows, columns = kernel_shape[:2]
    padded = _pad(images, kernel_shape)
    slices = [padded[:, i : i + height : 2, j : j + width : 2] for i in range(rows + 1) for j in range(columns + 1)]
    return jnp.concatenate(slices, axis=3).reshape(n * (height // 2) * (width // 2), -1)


def _window_kernel(kernel):
    """Place the kernel at each corner of a pooling window: (h, w, C, F) -> ((h + 1) * (w + 1) * C, 4 * F)."""
    placed = [
        jnp.pad(kernel, ((row, 1 - row), (column, 1 - column), (0, 0), (0, 0)))
        for row in range(2)
        for column in range(2)
    ]
    return jnp.concatenate(placed, axis=-1).reshape(-1, 4 * kernel.shape[-1])


def _corners(values):
    """The four corners of each 2x2 window, row by row, each (N, H // 2, W // 2, F)."""
    height, width = (size // 2 * 2 for size in values.shape[1:3])
    return tuple(values[:, i:height:2, j:width:2] for i in range(2) for j in range(2))


def _interleave(corners, images_shape):
    """Put the four corners of each window back in their places, with 0 elsewhere: the transpose of `_corners`."""
    n, height, width, _ = images_shape
    rows = [jnp.stack(corners[i : i + 2], axis=3) for i in (0, 2)]
    values = jnp.stack(rows, axis=2).reshape(n, height // 2 * 2, width // 2 * 2, -1)
    return jnp.pad(values, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(pool, bias, *corners):
    """Add the bias, (1, 1, 1, F), apply ReLU and take the maximum or the mean of the four corners."""
    if pool == "max":
        # Adding the bias and ReLU do not change which value is the largest, and after pooling cost a quarter.
        return jnp.maximum(functools.reduce(jnp.maximum, corners) + bias, 0)
    return sum(jnp.maximum(corner + bias, 0) for corner in corners) / 4


def _pool_forward(pool, bias, *corners):
    # The maxima are cheaper to find again than to keep.
    return _pool(pool, bias, *corners), (bias, corners)


def _pool_backward(pool, residuals, cotangent):
    bias, corners = residuals
    if pool == "avg":
        parts = [jnp.where(corner + bias > 0, cotangent / 4, 0) for corner in corners]
        return functools.reduce(jnp.add, parts).sum(axis=(0, 1, 2), keepdims=True), *parts
    # As comparisons: 0.2 to 0.7 ms where the gradient of `reduce_window` takes 45.
    largest = functools.reduce(jnp.maximum, corners)
    cotangent = jnp.where(largest + bias > 0, cotangent, 0)
    parts, taken = [], jnp.zeros(largest.shape, bool)
    for corner in corners:
        is_first_maximum = (corner == largest) & ~taken
        taken = taken | is_first_maximum
        parts.append(jnp.where(is_first_maximum, cotangent, 0))
    return cotangent.sum(axis=(0, 1, 2), keepdims=True), *parts


_pool.defvjp(_pool_forward, _pool_backward)
