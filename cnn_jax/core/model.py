"""The network of the tutorial, and the distributions that its weights start from."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnn_jax.core.conv_block import Pool, conv_block


class CNN(nn.Module):
    """Two blocks of convolution, ReLU and pooling, then one dense layer.

    Attributes:
      features: Channels after the first and the second block.
      num_classes: Classes to tell apart.
      pool: What the blocks pool with.
      dtype: Of the convolutions' operands; everything else is float32.
    """

    features: tuple[int, int] = (32, 64)
    num_classes: int = 10
    pool: Pool = "max"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits, (N, num_classes), float32, of images (N, height, width, channels) with pixels in [0, 1].

        The shapes on the right are those of the tutorial's images, (N, 28, 28, 1).
        """
        first, second = self.features
        x = ConvBlock(features=first, pool=self.pool, dtype=self.dtype, name="layer1")(images)  # (N, 14, 14, 32)
        x = ConvBlock(features=second, pool=self.pool, dtype=self.dtype, name="layer2")(x)  # (N, 7, 7, 64)
        x = x.reshape(x.shape[0], -1)  # (N, 3136)
        xavier, uniform = nn.initializers.xavier_uniform(), torch_uniform(fan_in=x.shape[-1])
        # Full float32 on every platform, as in the blocks: a GPU's default would round the operands to TF32.
        fc = nn.Dense(self.num_classes, kernel_init=xavier, bias_init=uniform, precision="highest", name="fc")
        return fc(x)  # (N, 10)


class ConvBlock(nn.Module):
    """A 3x3 convolution with stride 1 and padding 1, ReLU, and 2x2 pooling with stride 2."""

    features: int
    pool: Pool = "max"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (N, H // 2, W // 2, features), float32, for x (N, H, W, C)."""
        fan_in = 3 * 3 * x.shape[-1]
        kernel = self.param("kernel", torch_uniform(fan_in), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", torch_uniform(fan_in), (self.features,))
        return conv_block(x, kernel, bias, self.pool, self.dtype)


def torch_uniform(fan_in: int) -> Callable[..., jax.Array]:
    """Return an initialiser that draws from U(-b, b) with b = 1 / sqrt(fan_in).

    That is what PyTorch's `reset_parameters` of `nn.Conv2d` and `nn.Linear` draws weights and biases from.
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init
