"""The training state, one step of Adam, and the compiled run of many steps."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import lax

from cnn_jax.data import scale_pixels

# On a CPU the gradients of a batch are taken in this many parts, one after the other, and added: what a part leaves
# behind stays in the cache, and a step takes 18 ms where the whole batch at once takes 23.
CPU_PARTS = 4


def make_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """Return the keys that all randomness of a run comes from: `init_key` and `order_key`."""
    # The generator is named, so that a machine's JAX settings do not change a run.
    init_key, order_key = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
    return init_key, order_key


def create_train_state(
    init_key: jax.Array, model: nn.Module, image_shape: tuple[int, int, int], learning_rate: float
) -> TrainState:
    """Draw the initial weights and set up Adam with the tutorial's constants.

    Args:
      init_key: The key of the initial weights.
      model: The network.
      image_shape: (height, width, channels).
      learning_rate: Adam's step size.

    Returns:
      The state before step 0.
    """
    params = model.init(init_key, jnp.zeros((1, *image_shape), jnp.float32))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(learning_rate))
    # An array in place of Flax's Python 0, so that the first state and all later ones have one type.
    return state.replace(step=jnp.zeros((), jnp.int32))


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    """Take one step down the softmax cross-entropy of a batch.

    Args:
      state: The state before the step.
      images: (N, height, width, channels), uint8.
      labels: (N,), int32.

    Returns:
      The state after the step, and the batch's mean loss before it, float32.
    """

    def loss_fn(params, images, labels):
        logits = state.apply_fn({"params": params}, scale_pixels(images))  # (N, num_classes)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    parts = CPU_PARTS if jax.default_backend() == "cpu" and len(labels) % CPU_PARTS == 0 else 1
    loss, gradients = _mean_over_parts(jax.value_and_grad(loss_fn), parts, state.params, images, labels)
    return state.apply_gradients(grads=gradients), loss


def _mean_over_parts(function, parts, params, images, labels):
    """Return the mean of `function(params, images, labels)` over equal parts of a batch."""
    if parts == 1:
        return function(params, images, labels)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(params, *part)), None

    batch = jax.tree.map(lambda array: array.reshape(parts, -1, *array.shape[1:]), (images, labels))
    zero = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, params, images, labels)
    )
    total, _ = lax.scan(add, zero, batch)
    return jax.tree.map(lambda leaf: leaf / parts, total)


@functools.partial(jax.jit, static_argnames=("num_examples", "batch_size"))
def epoch_order(order_key: jax.Array, epoch: jax.Array | int, *, num_examples: int, batch_size: int) -> jax.Array:
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


@functools.partial(jax.jit, donate_argnames=("state", "losses"))
def run_steps(
    state: TrainState,
    losses: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    first: jax.Array | int,
    stop: jax.Array | int,
) -> tuple[TrainState, jax.Array]:
    """Run the steps first..stop-1 of an epoch in one compiled loop.

    The two ends are arguments, not constants: however an epoch is cut into segments, the same machine code runs, so
    the cuts leave no trace in the bits. In a loop a step's temporaries are allocated once: one call a step takes 33 ms
    where the loop takes 20.

    Args:
      state: The state before step `first`; its memory is reused.
      losses: (steps,), float32; entries 0..first-1 are filled; its memory is reused.
      images: (num_examples, height, width, channels), uint8: the whole training set, on the device.
      labels: (num_examples,), int32.
      order: (steps, batch_size), int32, of `epoch_order`.
      first: The first step, from 0 at the epoch's beginning.
      stop: The step before which to stop.

    Returns:
      The state after step `stop - 1`, and the losses with entries first..stop-1 filled in.
    """

    def body(i, carry):
        state, losses = carry
        state, loss = train_step(state, images[order[i]], labels[order[i]])
        return state, losses.at[i].set(loss)

    return lax.fori_loop(first, stop, body, (state, losses))
