"""Accuracy and loss over a whole test set: sums over every image, divided once."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float32, Int32, PyTree, UInt8

from cnn_jax.core.model import forward
from cnn_jax.data.dataset import scale_pixels

# Images at a time: 10,000 take 0.61 s on two cores of a Xeon, and 0.81 s in batches of 250; fewer are no faster.
BATCH_SIZE = 125


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a network did on a test set.

    Attributes:
      correct: The number of images whose largest logit is their label's.
      count: The number of images tested.
      loss: The mean softmax cross-entropy.
    """

    correct: int
    count: int
    loss: float

    @classmethod
    def of(cls, correct: Array | np.int32, loss: Array | np.float32, images: Array | np.int32) -> "Evaluation":
        """Return what one network's `Sums` over a test set come to."""
        return cls(correct=int(correct), count=int(images), loss=float(loss) / int(images))

    @property
    def accuracy(self) -> float:
        """The fraction of correct images, in [0, 1]."""
        return self.correct / self.count


class Sums(NamedTuple):
    """What an `Evaluation` is made of: sums over a test set, which are added over devices before they are divided."""

    correct: Int32[Array, "*seeds"]
    loss: Float32[Array, "*seeds"]  # the sum of the cross-entropies
    images: Int32[Array, "*seeds"]


def evaluate(
    model: nn.Module,
    variables: PyTree,
    images: UInt8[Array, "m h w c"] | UInt8[np.ndarray, "m h w c"],
    labels: Int32[Array, " m"] | Int32[np.ndarray, " m"],
    *,
    unscaled: bool = False,
) -> Evaluation:
    """Test a network on all images; `unscaled` feeds pixels in 0..255, as the PyTorch tutorial does when it tests."""
    return Evaluation.of(*sum_over_images(variables, images, labels, pixel_scale(unscaled=unscaled), model=model))


def pixel_scale(*, unscaled: bool) -> np.float32:
    """Return the pixel value that becomes 1: an argument of the compiled program, so that both ways share it."""
    return np.float32(1 if unscaled else 255)


@functools.partial(jax.jit, static_argnames=("model", "batch_size"))
def sum_over_images(
    variables: PyTree,
    images: UInt8[Array, "m h w c"],
    labels: Int32[Array, " m"],
    pixel_scale: Float32[Array, ""],
    *,
    model: nn.Module,
    batch_size: int = BATCH_SIZE,
) -> Sums:
    """Return a network's sums over images.

    Args:
      variables: The network's weights, and its state if it has one.
      images: Their number need not be a multiple of the batch size.
      labels: Their classes; an image labelled -1 counts for nothing.
      pixel_scale: The pixel value that becomes 1.
      model: The network.
      batch_size: Images at a time.
    """
    batches = -(-len(labels) // batch_size)
    missing = batches * batch_size - len(labels)
    images = jnp.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
    labels = jnp.pad(labels, (0, missing), constant_values=-1)

    def add_batch(sums, batch):
        batch_images, batch_labels = batch
        logits = forward(model, variables, scale_pixels(batch_images, pixel_scale))
        is_real = batch_labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch_labels, 0))
        correct = (logits.argmax(axis=-1).astype(jnp.int32) == batch_labels) & is_real
        return (sums[0] + correct.sum(dtype=jnp.int32), sums[1] + jnp.where(is_real, losses, 0).sum()), None

    zeros = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))
    stacked = (images.reshape(batches, batch_size, *images.shape[1:]), labels.reshape(batches, batch_size))
    (correct, loss), _ = lax.scan(add_batch, zeros, stacked)
    return Sums(correct, loss, (labels >= 0).sum(dtype=jnp.int32))
