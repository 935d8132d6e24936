"""The training state, one step of training, and the compiled run of many steps: of one seed."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from flax.training import train_state
from jax import lax

from cnn_jax.core.recipes import Recipe
from cnn_jax.data.dataset import scale_pixels

# On a CPU the gradients of a batch are taken in parts of at least this many images, one after the other, and added:
# what a part leaves behind stays in the cache. Of a batch of 100 a step takes 18 ms so, where at once it takes 23.
CPU_PART_IMAGES = 25


class TrainState(train_state.TrainState):
    """Flax's training state, with what a recipe adds to it.

    Attributes:
      recipe: How the network is trained.
      average: The weights averaged over the steps, where the recipe averages them.
    """

    recipe: Recipe = struct.field(pytree_node=False)
    average: dict | None = None

    @property
    def eval_params(self) -> dict:
        """The weights that the network is tested with."""
        return self.params if self.average is None else self.average


def make_keys(seed: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the keys that all randomness of a run comes from: `init_key`, `order_key` and `augment_key`."""
    # The generator is named, so that a machine's JAX settings do not change a run.
    init_key, order_key, augment_key = jax.random.split(jax.random.key(seed, impl="threefry2x32"), 3)
    return init_key, order_key, augment_key


def create_train_state(
    init_key: jax.Array, model: nn.Module, image_shape: tuple[int, int, int], recipe: Recipe
) -> TrainState:
    """Draw the initial weights and set up the recipe's optimiser.

    Args:
      init_key: The key of the initial weights.
      model: The network.
      image_shape: (height, width, channels).
      recipe: How it is to be trained.

    Returns:
      The state before step 0.
    """
    params = model.init(init_key, jnp.zeros((1, *image_shape), jnp.float32))["params"]
    average = params if recipe.ema_decay is not None else None
    state = TrainState.create(apply_fn=model.apply, params=params, tx=recipe.optimizer, recipe=recipe, average=average)
    # An array in place of Flax's Python 0, so that the first state and all later ones have one type.
    return state.replace(step=jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames="axis")
def train_step(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    augment_key: jax.Array | None = None,
    *,
    axis: str | None = None,
) -> tuple[TrainState, jax.Array]:
    """Take one step down the mean loss of a batch.

    Args:
      state: The state before the step.
      images: (N, height, width, channels), uint8.
      labels: (N,), int32; an image labelled -1 fills the batch up and counts for nothing.
      augment_key: The key of the run's augmentation, for a recipe that augments.
      axis: The mesh axis over whose devices the batch is divided, inside `jax.shard_map`; N is one device's share then.

    Returns:
      The state after the step, and the batch's mean loss before it, float32.
    """
    pixels = scale_pixels(images)
    if state.recipe.augment is not None:
        pixels = state.recipe.augment(_image_keys(augment_key, state.step, len(labels), axis), pixels)

    def loss_fn(params, pixels, labels):
        logits = state.apply_fn({"params": params}, pixels)  # (N, num_classes)
        losses = state.recipe.loss(logits, jnp.maximum(labels, 0))
        return jnp.where(labels >= 0, losses, 0).sum()

    loss, gradients = _sum_over_parts(jax.value_and_grad(loss_fn), state.params, pixels, labels)
    # Sums over every part and device, divided once: the mean does not depend on how the batch was divided.
    sums = (loss, gradients, (labels >= 0).sum(dtype=jnp.float32))
    loss, gradients, count = sums if axis is None else lax.psum(sums, axis)
    state = state.apply_gradients(grads=jax.tree.map(lambda leaf: leaf / count, gradients))
    if state.average is not None:
        state = state.replace(average=_average(state))
    return state, loss / count


def _image_keys(augment_key, step, images, axis):
    """Return a key for each image of a step: the same, however many devices the batch is divided over."""
    first = 0 if axis is None else lax.axis_index(axis) * images
    step_key = jax.random.fold_in(augment_key, step)
    return jax.vmap(functools.partial(jax.random.fold_in, step_key))(first + jnp.arange(images))


def _average(state):
    # Young averages forget faster, or the initial weights would stay in them for long: (1 + t) / (10 + t) is the decay
    # of TensorFlow's ExponentialMovingAverage with `num_updates`.
    t = state.step.astype(jnp.float32)
    decay = jnp.minimum(state.recipe.ema_decay, (1 + t) / (10 + t))
    return optax.incremental_update(state.params, state.average, 1 - decay)


def _sum_over_parts(function, params, pixels, labels):
    """Return `function(params, pixels, labels)`, a sum over a batch; on a CPU, added up over equal parts of it."""
    parts = 1
    if jax.default_backend() == "cpu":
        parts = max(parts for parts in range(1, len(labels) + 1) if _divides_well(parts, len(labels)))
    if parts == 1:
        return function(params, pixels, labels)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(params, *part)), None

    batch = jax.tree.map(lambda array: array.reshape(parts, -1, *array.shape[1:]), (pixels, labels))
    zero = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, params, pixels, labels)
    )
    return lax.scan(add, zero, batch)[0]


def _divides_well(parts, images):
    return parts == 1 or (images % parts == 0 and images // parts >= CPU_PART_IMAGES)


@functools.partial(jax.jit, static_argnames=("num_examples", "batch_size"))
def batch_indices(order_key: jax.Array, epoch: jax.Array | int, *, num_examples: int, batch_size: int) -> jax.Array:
    """Return which images make up each batch of an epoch: a function of the seed and the epoch alone.

    Args:
      order_key: The key of all orders of a run.
      epoch: Which epoch, from 0.
      num_examples: Size of the training set.
      batch_size: Images a batch.

    Returns:
      (steps, batch_size), int32: the first rows of a permutation; the last incomplete batch is dropped.
    """
    steps = num_examples // batch_size
    permutation = jax.random.permutation(jax.random.fold_in(order_key, epoch), num_examples)
    return permutation[: steps * batch_size].reshape(steps, batch_size)


@functools.partial(jax.jit, static_argnames="axis")
def run_steps(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    augment_key: jax.Array | None,
    first: jax.Array | int,
    stop: jax.Array | int,
    *,
    axis: str | None = None,
) -> tuple[TrainState, jax.Array]:
    """Run the steps first..stop-1 of an order in one compiled loop.

    The two ends are arguments, not constants: however an epoch is cut into segments, the same machine code runs, so
    the cuts leave no trace in the bits. In a loop a step's temporaries are allocated once: one call a step takes 33 ms
    where the loop takes 20.

    Args:
      state: The state before step `first`.
      images: (num_examples, height, width, channels), uint8, on the device.
      labels: (num_examples,), int32.
      order: (steps, N), int32: which of them make up each batch; -1 for none.
      augment_key: As for `train_step`.
      first: The first row of the order.
      stop: The row before which to stop.
      axis: As for `train_step`.

    Returns:
      The state after the last step, and the steps' losses, (steps,), float32, of which first..stop-1 are filled in.
    """

    def body(i, carry):
        state, losses = carry
        batch_labels = jnp.where(order[i] >= 0, labels[order[i]], -1)
        state, loss = train_step(state, images[order[i]], batch_labels, augment_key, axis=axis)
        return state, losses.at[i].set(loss)

    return lax.fori_loop(first, stop, body, (state, jnp.zeros(len(order), jnp.float32)))
