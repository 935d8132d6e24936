"""A network's logits of any number of images, which pixels they come from, and how far to trust their probabilities."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float32, Float64, Int, Integer, PyTree, UInt8

from cnn_jax.core.evaluation import BATCH_SIZE
from cnn_jax.core.model import forward
from cnn_jax.data.dataset import scale_pixels

PATH_STEPS = 32  # from black to an image; the packaged network's saliencies then sum to the difference within 0.15


def logits(model: nn.Module, variables: PyTree, images: UInt8[np.ndarray, "m h w c"]) -> Float32[np.ndarray, "m k"]:
    """Return a network's logits of any number of images, none included.

    The last batch is filled up to a power of two, so that few sizes are ever compiled and a handful of images does not
    cost a whole batch.

    Args:
      model: The network.
      variables: Its weights, and its state if it has one.
      images: The images.
    """
    whole, rest = len(images) // BATCH_SIZE, len(images) % BATCH_SIZE
    size = 1 << max(0, rest - 1).bit_length()
    last = np.pad(images[whole * BATCH_SIZE :], ((0, size - rest), *((0, 0),) * (images.ndim - 1)))
    parts = [images[: whole * BATCH_SIZE].reshape(whole, BATCH_SIZE, *images.shape[1:])] if whole else []
    parts += [last[np.newaxis]] if rest or not whole else []
    # In one loop the batches' intermediate values are allocated once: 10,000 images in 40 calls take 1 s longer.
    outputs = jax.device_get([batch_logits(variables, part, model=model) for part in parts])
    return np.concatenate([output.reshape(-1, output.shape[-1]) for output in outputs])[: len(images)]


@functools.partial(jax.jit, static_argnames="model")
def batch_logits(variables: PyTree, batches: UInt8[Array, "b n h w c"], *, model: nn.Module) -> Float32[Array, "b n k"]:
    """Return the logits of batches, one after the other."""
    return lax.map(lambda images: forward(model, variables, scale_pixels(images)), batches)


def saliency(
    model: nn.Module, variables: PyTree, images: UInt8[np.ndarray, "n h w c"], classes: Integer[np.ndarray, " n"]
) -> Float32[np.ndarray, "n h w"]:
    """Return how much each pixel contributes to the logit of its image's class, by integrated gradients.

    A pixel's contribution is its value times the logit's gradient, averaged on the straight way from a black image to
    this one (Sundararajan, Taly and Yan, arXiv 1703.01365). So an image's contributions sum to the difference that it
    makes to the logit, up to the error of an average of `PATH_STEPS` gradients.

    Args:
      model: The network.
      variables: Its weights, and its state if it has one.
      images: The images.
      classes: The class of which each is explained.
    """
    # One by one, so that one size is compiled, and however many images there are they take no more memory.
    maps = [
        image_saliency(variables, *each, model=model) for each in zip(images, classes.astype(np.int32), strict=True)
    ]
    return np.asarray(jax.device_get(maps), np.float32).reshape(images.shape[:-1])


@functools.partial(jax.jit, static_argnames="model")
def image_saliency(
    variables: PyTree, image: UInt8[Array, "h w c"], index: Int[Array, ""], *, model: nn.Module
) -> Float32[Array, "h w"]:
    """Return the same of one image; the points on the way are a batch."""
    pixels = scale_pixels(image)[jnp.newaxis]
    middles = (jnp.arange(PATH_STEPS, dtype=jnp.float32) + 0.5) / PATH_STEPS
    way = middles[:, jnp.newaxis, jnp.newaxis, jnp.newaxis] * pixels
    gradients = jax.grad(lambda way: forward(model, variables, way)[:, index].sum())(way)
    return (pixels[0] * gradients.mean(axis=0)).sum(axis=-1)


def probabilities(logits: Float32[np.ndarray, "m k"], temperature: float) -> Float64[np.ndarray, "m k"]:
    """Return the probability of each class."""
    return scipy.special.softmax(logits.astype(np.float64) / temperature, axis=1)


def fit_temperature(logits: Float32[np.ndarray, "m k"], labels: Integer[np.ndarray, " m"]) -> float:
    """Return the number to divide logits by so that the labels are most probable (Guo et al., arXiv 1706.04599).

    Args:
      logits: Of images that the network was not trained on.
      labels: Their classes.

    Returns:
      A temperature in [1/20, 20].
    """
    from scipy.optimize import minimize_scalar  # takes longer to import than to use, and most networks are not fitted

    def loss(logarithm: float) -> float:
        log_probabilities = scipy.special.log_softmax(logits / np.exp(logarithm), axis=1)
        return -log_probabilities[np.arange(len(labels)), labels].mean()

    found: Any = minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded")
    return float(np.exp(found.x))


class Reliability(NamedTuple):
    """How often a network is right among the images for which it states about the same probability.

    Attributes:
      stated: The mean probability of the predicted class in each bin that has images, (B,), in [0, 1].
      right: The fraction of the bin's images that are classified correctly, (B,), in [0, 1].
      images: The number of the bin's images, (B,).
    """

    stated: np.ndarray
    right: np.ndarray
    images: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al., arXiv 1706.04599): the mean over images of their bins' gaps."""
        return float((np.abs(self.stated - self.right) * self.images).sum() / self.images.sum())


def reliability(
    probabilities: Float64[np.ndarray, "m k"], labels: Integer[np.ndarray, " m"], bins: int = 15
) -> Reliability:
    """Sort images into bins of equal width by the probability of their predicted class."""
    stated, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    number = np.minimum((stated * bins).astype(int), bins - 1)
    images = np.bincount(number, minlength=bins)
    filled = images > 0
    mean_stated, mean_right = (np.bincount(number, values, bins)[filled] / images[filled] for values in (stated, right))
    return Reliability(mean_stated, mean_right, images[filled])
