"""Convolution, bias, ReLU and 2x2 pooling as one differentiable operation that is fast inside a compiled loop.

It computes what `lax.conv_general_dilated` with padding "SAME", `jnp.maximum(., 0)` and `lax.reduce_window` compute
in turn, from slices, products and comparisons alone, because XLA's own gradients are slow where training needs them:
that of `reduce_window`; on a CPU that of a convolution, which takes over a second in a loop; on a GPU those of many
seeds' convolutions at once, which are grouped. On a TPU float32 convolutions take two minutes to compile.
Milliseconds are for a batch of 100 on two cores; launches are counted in XLA's program of one seed's step on an H100.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Pool = Literal["max", "avg"]

# With fewer values than this in a kernel's window (height x width x channels), a product of one patch per pixel leaves
# most of each vector register empty, and one patch per pooling window is faster: block 1, with 9 values, multiplies
# 16 x 128 matrices then. For block 2, with 288 values, the larger patches cost more than they save.
SMALLEST_PIXEL_PATCH = 64


# Compiled as one operation where it is called outside compiled code too: a learner's first gradient takes 2 s, not 6.
@functools.partial(jax.jit, static_argnames=("pool", "dtype"))
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
    has_large_window = kernel.size // len(bias) >= SMALLEST_PIXEL_PATCH
    on_cpu = functools.partial(_convolve_pixels if has_large_window else _convolve_windows, dtype)
    elsewhere = functools.partial(_convolve_pixels if has_large_window else _convolve_shifts, dtype)
    return lax.platform_dependent(
        *(images, kernel, bias[jnp.newaxis, jnp.newaxis, jnp.newaxis, :]),
        # After the pooling the bias costs a quarter.
        cpu=lambda images, kernel, bias: _pool(pool, bias, *on_cpu(images, kernel, jnp.zeros_like(bias))),
        # Its gradient is added up with the kernel's: on a GPU two launches less for each block.
        default=lambda images, kernel, bias: _pool(pool, jnp.zeros_like(bias), *elsewhere(images, kernel, bias)),
    )


# The convolutions below return the corners of each pooling window, row by row: four arrays (N, H // 2, W // 2, F).


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve_pixels(dtype, images, kernel, bias):
    return _convolve_pixels_forward(dtype, images, kernel, bias)[0]


def _convolve_pixels_forward(dtype, images, kernel, bias):
    n, height, width, _ = images.shape
    # Without the barrier XLA computes what comes before (a pooling) again for each of the kernel's shifts.
    patches = _pixel_patches(lax.optimization_barrier(images.astype(dtype)), kernel.shape)
    flat_kernel = kernel.astype(dtype).reshape(-1, kernel.shape[-1])
    convolved = _matmul(patches, flat_kernel).reshape(n, height, width, -1)
    # The patches are kept, because the kernel's gradient needs them too.
    return tuple(corner + bias for corner in _corners(convolved)), (patches, kernel, images)


def _convolve_pixels_backward(dtype, residuals, corner_cotangents):
    patches, kernel, images = residuals
    cotangent = _interleave(corner_cotangents, images.shape).astype(dtype).reshape(-1, kernel.shape[-1])
    flat_kernel = kernel.astype(dtype).reshape(-1, kernel.shape[-1])
    by_image = functools.partial(_sum_by_image, len(images))
    kernel_cotangent, bias_cotangent = lax.platform_dependent(patches, cotangent, cpu=_sum_at_once, default=by_image)
    image_cotangent = _add_pixel_patches(_matmul(cotangent, flat_kernel.T), images.shape, kernel.shape)
    return image_cotangent, kernel_cotangent.reshape(kernel.shape), bias_cotangent.reshape(1, 1, 1, -1)


_convolve_pixels.defvjp(_convolve_pixels_forward, _convolve_pixels_backward)


def _sum_at_once(patches, cotangent):
    """Return the gradients of a flat kernel and of the bias."""
    # As a product of plain matrices: 1 to 6 ms where XLA's convolution takes 19. Left in four dimensions, the same
    # product makes a step 15 ms slower.
    kernel_cotangent = _matmul(patches.T, cotangent)
    return kernel_cotangent, cotangent.sum(axis=0, dtype=kernel_cotangent.dtype)


def _sum_by_image(n, patches, cotangent):
    """Return the same, summed over the pixels of each of n images, and then over the images."""
    # To keep a GPU busy, XLA cuts one long sum into parts too, and copies both matrices first: two launches more. The
    # barrier keeps it from adding up the bias's gradient for each corner apart: three launches more.
    patches, cotangent = (m.reshape(n, -1, m.shape[-1]) for m in (patches, lax.optimization_barrier(cotangent)))
    kernels = jax.vmap(lambda patches, cotangent: _matmul(patches.T, cotangent))(patches, cotangent)
    biases = cotangent.sum(axis=1, keepdims=True, dtype=kernels.dtype)
    sums = jnp.concatenate([kernels, biases], axis=1).sum(axis=0)
    return sums[:-1], sums[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve_windows(dtype, images, kernel, bias):
    return _convolve_windows_forward(dtype, images, kernel, bias)[0]


def _convolve_windows_forward(dtype, images, kernel, bias):
    n, height, width, _ = images.shape
    extract = functools.partial(_window_patches, kernel_shape=kernel.shape)
    patches = extract(_round(images, dtype))
    convolved = _matmul(patches, _window_kernel(_round(kernel, dtype)))  # (N * H // 2 * W // 2, 4 * F)
    corners = jnp.split(convolved.reshape(n, height // 2, width // 2, -1), 4, axis=-1)
    return tuple(corner + bias for corner in corners), (patches, kernel, images)


def _convolve_windows_backward(dtype, residuals, corner_cotangents):
    patches, kernel, images = residuals
    cotangent = _round(jnp.concatenate(corner_cotangents, axis=-1), dtype).reshape(-1, 4 * kernel.shape[-1])
    patch_cotangent = _matmul(cotangent, _window_kernel(_round(kernel, dtype)).T)
    extract = functools.partial(_window_patches, kernel_shape=kernel.shape)
    (image_cotangent,) = jax.linear_transpose(extract, images)(patch_cotangent)
    large = jax.ShapeDtypeStruct(kernel.shape, patch_cotangent.dtype)
    (kernel_cotangent,) = jax.linear_transpose(_window_kernel, large)(_matmul(patches.T, cotangent))
    return image_cotangent, kernel_cotangent, jnp.stack(corner_cotangents).sum(axis=(0, 1, 2, 3)).reshape(1, 1, 1, -1)


_convolve_windows.defvjp(_convolve_windows_forward, _convolve_windows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve_shifts(dtype, images, kernel, bias):
    return _convolve_shifts_forward(dtype, images, kernel, bias)[0]


def _convolve_shifts_forward(dtype, images, kernel, bias):
    # Value by value: on a GPU one launch, with the pooling. A CPU's compiler would repeat the sums at each use of them.
    return _add_shifts(_round(kernel, dtype), bias, _round(images, dtype)), (images, kernel)


def _convolve_shifts_backward(dtype, residuals, corner_cotangents):
    images, kernel = residuals
    cotangents = tuple(_round(cotangent, dtype) for cotangent in corner_cotangents)
    shifts = _shifts(_round(images, dtype), kernel.shape)
    # The bias is a last value of the kernel, which meets ones. Without the barrier XLA puts a corner's values together
    # again for each feature, in code that takes half a minute to compile. With the kernel's values first a step takes
    # 0.168 ms on an H100, with one image after the other 0.194.
    corners = zip(*shifts, [jnp.ones_like(shift) for shift in shifts[0]], strict=True)
    patches = lax.optimization_barrier(tuple(jnp.stack(corner) for corner in corners))  # (h * w * c + 1, N, H, W, 1)
    # As a plain sum: two launches, and four products of matrices eight.
    products = (p * c[jnp.newaxis] for p, c in zip(patches, cotangents, strict=True))
    sums = functools.reduce(jnp.add, products).sum(axis=(1, 2, 3))
    flat_kernel = _round(kernel, dtype).reshape(-1, kernel.shape[-1])
    cotangent = _interleave(cotangents, images.shape).reshape(-1, kernel.shape[-1])
    image_cotangent = _add_pixel_patches(_matmul(cotangent, flat_kernel.T), images.shape, kernel.shape)
    return image_cotangent, sums[:-1].reshape(kernel.shape), sums[-1].reshape(1, 1, 1, -1)


_convolve_shifts.defvjp(_convolve_shifts_forward, _convolve_shifts_backward)


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


def _add_shifts(kernel, bias, images):
    """Convolve by adding to the bias each value of the kernel times what it meets at each corner."""
    values = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
    corners = zip(*_shifts(images, kernel.shape), strict=True)
    return tuple(sum(map(jnp.multiply, corner, values), start=bias) for corner in corners)


def _shifts(images, kernel_shape):
    """Return what each value of a kernel meets at the four corners of the pooling windows, (N, H // 2, W // 2, 1)."""
    height, width = (size // 2 * 2 for size in images.shape[1:3])
    rows, columns, channels = kernel_shape[:3]
    padded = _pad(images, kernel_shape)
    return [
        [padded[:, y : y + height : 2, x : x + width : 2, c : c + 1] for y in (i, i + 1) for x in (j, j + 1)]
        for i in range(rows)
        for j in range(columns)
        for c in range(channels)
    ]


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
