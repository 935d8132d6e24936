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

# Takes one key per image and images with pixels in [0, 1]; returns as many images, changed.
Augment = Callable[[Keys, Pixels], Pixels]
# Takes logits and labels; returns each example's loss.
Loss = Callable[[Float32[Array, "n k"], Int32[Array, " n"]], Float32[Array, " n"]]


def cross_entropy(logits: Float32[Array, "n k"], labels: Int32[Array, " n"]) -> Float32[Array, " n"]:
    """Return the softmax cross-entropy of each example.

    The gradient of indexing by labels is a scatter-add: on a GPU one launch more, and in no fixed order.
    """
    index = optax.softmax_cross_entropy_with_integer_labels
    return lax.platform_dependent(logits, labels, cpu=index, default=smoothed(0.0))


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


def tutorial(learning_rate: float | Float32[Array, ""]) -> Recipe:
    """Adam with the tutorial's constants, from the first step to the last."""
    return Recipe(optimizer=optax.adam(learning_rate), elementwise=True)


def fast(learning_rate: float | Float32[Array, ""], steps: int) -> Recipe:
    """Adam under a one-cycle schedule (Smith and Topin, arXiv 1708.07120), smoothed labels, averaged weights."""
    schedule = optax.cosine_onecycle_schedule(steps, learning_rate, pct_start=0.15)
    return Recipe(optimizer=optax.adam(schedule, b1=0.85), elementwise=True, loss=smoothed(0.05), ema_decay=0.99)


def accurate(learning_rate: float, steps: int) -> Recipe:
    """AdamW under a cosine schedule on images that are shifted, turned and scaled a little, with averaged weights."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / 25, peak_value=learning_rate, warmup_steps=steps // 20, decay_steps=steps
    )
    return Recipe(
        optimizer=optax.adamw(schedule, weight_decay=0.05),
        elementwise=True,
        loss=smoothed(0.05),
        augment=shift_turn_and_scale,
        ema_decay=0.999,
    )


def smoothed(amount: float) -> Loss:
    """Return the cross-entropy with labels that give `amount` to all classes (Szegedy et al., arXiv 1512.00567)."""

    def loss(logits: Float32[Array, "n k"], labels: Int32[Array, " n"]) -> Float32[Array, " n"]:
        one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, amount))

    return loss


def shift_turn_and_scale(
    keys: Keys,
    images: Pixels,
    *,
    pixels: float = 2.0,
    degrees: float = 12.0,
    scale: float = 0.1,
) -> Pixels:
    """Move, turn and scale each image about its centre by uniform draws, linearly interpolated; pixels outside are 0.

    Args:
      keys: One key per image.
      images: Images with pixels in [0, 1].
      pixels: Largest shift along each axis, either way.
      degrees: Largest turn, either way.
      scale: Largest change of the size, either way, as a fraction.
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, (4,), jnp.float32, minval=-1, maxval=1))(keys)
    height, width = images.shape[1:3]
    rows, columns = jnp.meshgrid(
        jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2,
        jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2,
        indexing="ij",
    )

    def move(image: Float32[Array, "h w c"], draw: Float32[Array, "4"]) -> Float32[Array, "h w c"]:
        angle, size = draw[2] * (degrees * jnp.pi / 180), 1 + draw[3] * scale
        cosine, sine = jnp.cos(angle) / size, jnp.sin(angle) / size
        row = cosine * rows - sine * columns + (height - 1) / 2 + draw[0] * pixels
        column = sine * rows + cosine * columns + (width - 1) / 2 + draw[1] * pixels
        return jax.vmap(lambda plane: map_coordinates(plane, [row, column], order=1), in_axes=-1, out_axes=-1)(image)

    return jax.vmap(move)(images, draws)
