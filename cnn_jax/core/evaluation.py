"""Logits in batches, and accuracy and loss over a whole test set: sums over every image, divided once."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax

from cnn_jax.data.dataset import scale_pixels

# 250 images' patches of block 2 take 56 MB.
BATCH_SIZE = 250


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a network did on a test set.

    Attributes:
      correct: Images whose largest logit is that of their label.
      count: Images tested.
      loss: Mean softmax cross-entropy.
    """

    correct: int
    count: int
    loss: float

    @property
    def accuracy(self) -> float:
        """The fraction of correct images, in [0, 1]."""
        return self.correct / self.count


def evaluate(
    apply_fn: Callable, params: dict, images: jax.Array, labels: jax.Array, *, unscaled: bool = False
) -> Evaluation:
    """Test a network on all images.

    Args:
      apply_fn: The network's `apply`.
      params: Its weights.
      images: (M, height, width, channels), uint8.
      labels: (M,), int32.
      unscaled: Feed pixels in 0..255, as the PyTorch tutorial does when it tests, in place of [0, 1].
    """
    maximum = pixel_maximum(unscaled=unscaled)
    correct, loss_sum, count = sum_over_images(params, images, labels, maximum, apply_fn=apply_fn)
    return Evaluation(correct=int(correct), count=int(count), loss=float(loss_sum) / int(count))


def pixel_maximum(*, unscaled: bool) -> jax.Array:
    """Return the pixel value that becomes 1: an argument of what is compiled, so that both ways share one program."""
    return jnp.float32(1 if unscaled else 255)


@functools.partial(jax.jit, static_argnames=("apply_fn", "batch_size"))
def sum_over_images(
    params: dict,
    images: jax.Array,
    labels: jax.Array,
    maximum: jax.Array,
    *,
    apply_fn: Callable,
    batch_size: int = BATCH_SIZE,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the number of correct images, int32, the sum of the losses, float32, and the number of images, int32.

    Args:
      params: The network's weights.
      images: (M, height, width, channels), uint8.
      labels: (M,), int32; an image labelled -1 counts for nothing.
      maximum: The pixel value that becomes 1, float32.
      apply_fn: The network's `apply`.
      batch_size: Images at a time; M need not be a multiple of it.
    """
    batches = -(-len(labels) // batch_size)
    missing = batches * batch_size - len(labels)
    count = (labels >= 0).sum(dtype=jnp.int32)
    images = jnp.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
    labels = jnp.pad(labels, (0, missing), constant_values=-1)

    def add_batch(sums, batch):
        batch_images, batch_labels = batch
        logits = apply_fn({"params": params}, scale_pixels(batch_images, maximum))
        is_real = batch_labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch_labels, 0))
        correct = (logits.argmax(axis=-1).astype(jnp.int32) == batch_labels) & is_real
        return (sums[0] + correct.sum(dtype=jnp.int32), sums[1] + jnp.where(is_real, losses, 0).sum()), None

    sums = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))
    stacked = (images.reshape(batches, batch_size, *images.shape[1:]), labels.reshape(batches, batch_size))
    return *lax.scan(add_batch, sums, stacked)[0], count


def logits(model: nn.Module, params: dict, images: np.ndarray) -> np.ndarray:
    """Return a network's logits, (M, num_classes), float32, of any number of images, none included.

    The last batch is filled up to a power of two, so that few sizes are ever compiled and a handful of images does not
    cost a whole batch.

    Args:
      model: The network.
      params: Its weights.
      images: (M, height, width, channels), uint8.
    """
    batches = []
    for start in range(0, max(1, len(images)), BATCH_SIZE):
        batch = images[start : start + BATCH_SIZE]
        size = min(BATCH_SIZE, 1 << max(0, len(batch) - 1).bit_length())
        filled = np.pad(batch, ((0, size - len(batch)), *((0, 0),) * (images.ndim - 1)))
        batches.append(_apply(params, filled, model=model))
    return np.concatenate(jax.device_get(batches))[: len(images)]


@functools.partial(jax.jit, static_argnames="model")
def _apply(params: dict, images: jax.Array, *, model: nn.Module) -> jax.Array:
    return model.apply({"params": params}, scale_pixels(images))
