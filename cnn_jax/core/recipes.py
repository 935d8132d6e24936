"""Ways to train the network: the optimiser, its schedule, the augmentation, the loss, the averaged weights."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float32, Int32, Key

Keys = Key[Array, " n"]
Pixels = Float32[Array, "n h w c"]
Number = float | Float32[Array, ""]

# Takes one key per image and images with pixels in [0, 1]; returns as many images, changed.
Augment = Callable[[Keys, Pixels], Pixels]
# Takes logits and labels; returns each example's loss.
Loss = Callable[[Float32[Array, "n k"], Int32[Array, " n"]], Float32[Array, " n"]]


def cross_entropy(logits: Float32[Array, "n k"], labels: Int32[Array, " n"]) -> Float32[Array, " n"]:
    """Return the softmax cross-entropy of each example.

    The gradient of indexing by labels is a scatter-add: on a GPU one launch more, and in no fixed order.
    """
    indexed = optax.softmax_cross_entropy_with_integer_labels
    return lax.platform_dependent(logits, labels, cpu=indexed, default=smoothed(0.0))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
      optimizer: Turns gradients into updates.
      loss: Returns the loss of each example.
      augment: Changes the images of a batch, each by its own key; None leaves them unchanged.
      ema_decay: Evaluation uses an exponential moving average of the weights, of which each step keeps this share.
        None evaluates the weights themselves.
      elementwise: Whether the optimiser treats each weight alike: a GPU then updates all as one vector, in one launch.
    """

    optimizer: optax.GradientTransformation
    loss: Loss = cross_entropy
    augment: Augment | None = None
    ema_decay: float | None = None
    elementwise: bool = False


def tutorial(learning_rate: Number) -> Recipe:
    """Adam with the tutorial's constants, from the first step to the last."""
    return Recipe(optimizer=optax.adam(learning_rate), elementwise=True)


def fast(learning_rate: Number, steps: int, *, momentum: Number = 0.85, smoothing: Number = 0.05) -> Recipe:
    """NAdam (Dozat 2016) under a one-cycle schedule (arXiv 1708.07120), smoothed labels, averaged weights."""
    schedule = optax.cosine_onecycle_schedule(steps, learning_rate, pct_start=0.15)
    return Recipe(optax.nadam(schedule, momentum, 0.98), elementwise=True, loss=smoothed(smoothing), ema_decay=0.99)


def accurate(learning_rate: Number, steps: int, *, weight_decay: Number = 0.05, smoothing: Number = 0.01) -> Recipe:
    """AdamW on images that are changed a little, a cosine schedule that ends at a fifth, and averaged weights."""
    warmup = steps // 20
    fall = optax.cosine_decay_schedule(learning_rate, steps - warmup, alpha=0.2)
    schedule = optax.join_schedules([optax.linear_schedule(learning_rate / 25, learning_rate, warmup), fall], [warmup])
    optimizer = optax.adamw(schedule, weight_decay=weight_decay)
    return Recipe(optimizer, elementwise=True, loss=smoothed(smoothing), augment=distort, ema_decay=0.9998)


def smoothed(amount: Number) -> Loss:
    """Return the cross-entropy with labels that give `amount` to all classes (Szegedy et al., arXiv 1512.00567)."""

    def loss(logits: Float32[Array, "n k"], labels: Int32[Array, " n"]) -> Float32[Array, " n"]:
        one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, amount))

    return loss


def distort(
    keys: Keys,
    images: Pixels,
    *,
    pixels: float = 1.0,
    degrees: float = 7.0,
    scale: float = 0.06,
    bend: float = 0.35,
    stroke: float = 0.4,
) -> Pixels:
    """Shift, turn, scale, shear and bend each image at random, linearly interpolated, and change its strokes.

    Pixels outside are 0. The bending is the elastic distortion of Simard, Steinkraus and Platt (ICDAR 2003).

    Args:
      keys: One key per image.
      images: Images with pixels in [0, 1].
      pixels: Largest shift along each axis, either way.
      degrees: Largest turn, either way, about the centre.
      scale: Largest change of the size, and largest shear, along each axis, either way, as a fraction.
      bend: Root mean square of the pixels' displacement along each axis by the bending, in pixels.
      stroke: Largest logarithm, either way, of the exponent of the pixels, which makes strokes thinner or thicker.
    """
    size = images.shape[1:3]
    centre = (jnp.array(size, jnp.float32)[:, None, None] - 1) / 2
    rows, columns = map(_smoothing, size)

    def move(key: Key[Array, ""], image: Float32[Array, "h w c"]) -> Float32[Array, "h w c"]:
        draws_key, noise_key = jax.random.split(key)
        draws = jax.random.uniform(draws_key, (8,), jnp.float32, minval=-1, maxval=1)
        angle = draws[0] * (degrees * jnp.pi / 180)
        turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        matrix = turn @ (jnp.eye(2) + scale * draws[3:7].reshape(2, 2))
        noise = jax.random.normal(noise_key, (2, rows.shape[1], columns.shape[1]), jnp.float32)
        source = jnp.tensordot(matrix, jnp.indices(size, jnp.float32) - centre, 1, precision="highest") + centre
        source += pixels * draws[1:3, None, None] + bend * jnp.einsum("yi,aij,xj->ayx", rows, noise, columns)
        moved = jax.vmap(lambda plane: map_coordinates(plane, list(source), order=1), in_axes=-1, out_axes=-1)(image)
        return moved ** jnp.exp(stroke * draws[7])

    return jax.vmap(move)(keys, images)


def _smoothing(size: int) -> Float32[Array, "size noise"]:
    # Noise of variance 1, drawn every 4 pixels, becomes smooth over 4 pixels, and keeps its variance at every pixel.
    distances = jnp.subtract.outer(jnp.arange(size, dtype=jnp.float32), jnp.arange(0, size + 4, 4, dtype=jnp.float32))
    weights = jnp.exp(-((distances / 4) ** 2) / 2)
    return weights / jnp.linalg.norm(weights, axis=1, keepdims=True)
