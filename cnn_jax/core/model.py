"""The tutorial's network, layer by layer and then with fast blocks, and the distributions of its initial weights."""

import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from cnn_jax.core.conv_block import Pool, conv_block


class PlainCNN(nn.Module):
    """Blocks of convolution, ReLU and max-pooling, then one dense layer: one module per layer.

    `CNN` computes the same function of the same weights, and trains many times as fast on a CPU. This one is for
    reading, for looking at the output of each layer, and for comparisons.

    Attributes:
      features: Channels after each block.
      num_classes: The number of classes.
    """

    features: tuple[int, ...] = (32, 64)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Float[Array, "*n h w c"]) -> Float[Array, "*n {self.num_classes}"]:
        """Return the logits of images with pixels in [0, 1].

        The comments give the shapes for the tutorial's images, (N, 28, 28, 1), in the first block.
        """
        for number, features in enumerate(self.features, start=1):
            init = torch_uniform(fan_in=3 * 3 * x.shape[-1])
            conv = nn.Conv(
                features, (3, 3), kernel_init=init, bias_init=init, precision="highest", name=f"layer{number}"
            )
            x = conv(x)  # (N, 28, 28, 32)
            x = ReLU(name=f"relu{number}")(x)  # (N, 28, 28, 32)
            x = MaxPool(name=f"pool{number}")(x)  # (N, 14, 14, 32)
        x = Flatten(name="flatten")(x)  # (N, 3136)
        xavier, uniform = nn.initializers.xavier_uniform(), torch_uniform(fan_in=x.shape[-1])
        fc = nn.Dense(self.num_classes, kernel_init=xavier, bias_init=uniform, precision="highest", name="fc")
        return fc(x)  # (N, 10)


class ReLU(nn.Module):
    def __call__(self, x: Float[Array, "*n h w c"]) -> Float[Array, "*n h w c"]:
        return nn.relu(x)


class MaxPool(nn.Module):
    def __call__(self, x: Float[Array, "*n h w c"]) -> Float[Array, "*n h//2 w//2 c"]:
        return nn.max_pool(x, (2, 2), strides=(2, 2))


class Flatten(nn.Module):
    def __call__(self, x: Float[Array, "*n h w c"]) -> Float[Array, "*n h*w*c"]:
        return x.reshape(*x.shape[:-3], -1)


class CNN(nn.Module):
    """The same network with its blocks as one operation each, `conv_block`.

    Attributes:
      features: Channels after the first and the second block.
      num_classes: The number of classes.
      pool: How the blocks pool: by the maximum or the average.
      dtype: The dtype of the convolutions' operands; everything else is float32.
    """

    features: tuple[int, int] = (32, 64)
    num_classes: int = 10
    pool: Pool = "max"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"]) -> Float[Array, "n {self.num_classes}"]:
        """Return the logits, float32, of images with pixels in [0, 1].

        The comments give the shapes for the tutorial's images, (N, 28, 28, 1).
        """
        first, second = self.features
        x = ConvBlock(features=first, pool=self.pool, dtype=self.dtype, name="layer1")(images)  # (N, 14, 14, 32)
        x = ConvBlock(features=second, pool=self.pool, dtype=self.dtype, name="layer2")(x)  # (N, 7, 7, 64)
        x = x.reshape(x.shape[0], -1)  # (N, 3136)
        return Dense(self.num_classes, name="fc")(x)  # (N, 10)


class ConvBlock(nn.Module):
    """A 3x3 convolution with stride 1 and padding 1, ReLU, and 2x2 pooling with stride 2."""

    features: int
    pool: Pool = "max"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h//2 w//2 {self.features}"]:
        fan_in = 3 * 3 * x.shape[-1]
        kernel = self.param("kernel", torch_uniform(fan_in), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", torch_uniform(fan_in), (self.features,))
        return conv_block(x, kernel, bias, self.pool, self.dtype)


class Dense(nn.Module):
    """A dense layer in full float32 on every platform: a GPU's default would round the operands to TF32."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n {self.features}"]:
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features))
        bias = self.param("bias", torch_uniform(x.shape[-1]), (self.features,))
        product = lambda x, kernel, bias: jnp.matmul(x, kernel, precision="highest") + bias[jnp.newaxis]  # noqa: E731
        return lax.platform_dependent(x, kernel, bias, cuda=_add_products, rocm=_add_products, default=product)


@jax.custom_vjp
def _add_products(x, kernel, bias):
    # To keep a GPU busy with so few columns, XLA cuts the matrix product's sum into parts and copies both matrices:
    # four launches. Plain sums take two, and one for each gradient. In two stages a sum takes 6 us, at once 16.
    parts = x.shape[1] // 64 if x.shape[1] % 64 == 0 else 1
    products = x.reshape(x.shape[0], parts, -1, 1) * kernel.reshape(1, parts, -1, kernel.shape[1])
    return lax.optimization_barrier(products.sum(axis=2)).sum(axis=1) + bias[jnp.newaxis]


def _add_products_backward(residuals, cotangent):
    x, kernel = residuals
    x_and_1 = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1)  # the bias is the weight of an input that is 1
    kernel_cotangent = (x_and_1[:, :, jnp.newaxis] * cotangent[:, jnp.newaxis, :]).sum(axis=0)
    x_cotangent = (cotangent[:, jnp.newaxis, :] * kernel[jnp.newaxis]).sum(axis=2)
    return x_cotangent, kernel_cotangent[:-1], kernel_cotangent[-1]


_add_products.defvjp(lambda *arguments: (_add_products(*arguments), arguments[:2]), _add_products_backward)


def forward(model: nn.Module, variables: PyTree, pixels: Float[Array, "n h w c"]) -> Float[Array, "n k"]:
    """Return a network's logits of images with pixels in [0, 1]; `variables` are its weights and state, as in Flax."""
    return cast(Array, model.apply(variables, pixels))  # Flax returns a tuple only if asked for more


def forward_in_training(
    model: nn.Module, variables: PyTree, pixels: Float[Array, "n h w c"], dropout_key: Key[Array, ""] | None
) -> tuple[Float[Array, "n k"], PyTree]:
    """Return the logits and the network's new state; a `__call__` that takes `train` is told that it is training."""
    flag: dict[str, Any] = {"train": True} if "train" in inspect.signature(type(model).__call__).parameters else {}
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return model.apply(variables, pixels, mutable=sorted({*variables} - {"params"}), rngs=rngs, **flag)


def torch_uniform(fan_in: int) -> Callable[..., jax.Array]:
    """Return an initialiser that draws from U(-b, b) with b = 1 / sqrt(fan_in).

    PyTorch's `nn.Conv2d` and `nn.Linear` draw their weights and biases from it in `reset_parameters`.
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init
