"""Training one seed, read downwards: many steps in a compiled loop, one step, its loss; then keys and first states."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float32, Int32, Key, PyTree, UInt8, UInt32

from cnn_jax.core.model import forward_in_training
from cnn_jax.core.recipes import Recipe
from cnn_jax.data.dataset import scale_pixels

LOOP_STEPS = 200  # of an accelerator's compiled loop, at most; after it the bar moves and a signal is answered


class TrainState(NamedTuple):
    """All that training changes, as plain arrays.

    Attributes:
      step: How many steps were taken.
      params: The network's weights.
      opt_state: The optimiser's state.
      ema_params: The weights averaged over the steps, where the recipe averages them.
      model_state: What the network keeps beside its weights, such as batches' statistics; the tutorial's keeps none.
    """

    step: Int32[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema_params: PyTree | None
    model_state: dict[str, PyTree] = {}  # noqa: RUF012 - never changed

    @property
    def eval_variables(self) -> dict[str, PyTree]:
        """What the network is tested with: its weights, or their average where there is one, and its state."""
        return {"params": self.params if self.ema_params is None else self.ema_params, **self.model_state}


class SeedEpoch(NamedTuple):
    """The part of an epoch, or of a few of its steps, that depends on the seed.

    Attributes:
      batches: The indices of the images in each step's batch; -1 is no image.
      noise_key: The key of all augmentation and dropout in the run; None if there is none.
      arguments: The recipe's by name, each seed's own, where runs of several train together.
    """

    batches: Int32[Array, "*seeds steps n"]
    noise_key: Key[Array, "*seeds"] | None = None
    arguments: dict[str, Float32[Array, "*seeds"]] | None = None


@functools.partial(jax.jit, static_argnames=("model", "recipe", "axis", "parts", "platform"))
def run_steps(
    state_and_epoch: tuple[TrainState, SeedEpoch],
    images: UInt8[Array, "m h w c"],
    labels: Int32[Array, " m"],
    first: Int32[Array, ""] | int,
    stop: Int32[Array, ""] | int,
    *,
    model: nn.Module,
    recipe: Recipe,
    axis: str | None = None,
    parts: int = 1,
    platform: str = "cpu",
) -> tuple[TrainState, Float32[Array, " steps"]]:
    """Run the steps first..stop-1 of an epoch in one compiled loop.

    `first` and `stop` are arguments, not constants: however an epoch is cut into segments, the same machine code runs,
    so the cuts leave no trace in the bits. The loop allocates a step's temporaries once: it takes 20 ms per step, and
    one call per step takes 33.

    Args:
      state_and_epoch: The state before step `first`, and the epoch's batches.
      images: The images that the batches' indices refer to, on the device.
      labels: Their labels.
      first: The first row of the batches to train on.
      stop: The row before which to stop.
      model: The network.
      recipe: How it is trained.
      axis: As for `train_step`.
      parts: As for `train_step`.
      platform: What runs it. An accelerator's loop has a constant length, `loop_steps`, or it would ask the host before
        each step whether to go on: from `stop` on, or beyond that length, no step changes anything.

    Returns:
      The state after the last step, and the steps' losses, of which first..stop-1 are filled in.
    """
    state, epoch = state_and_epoch
    losses, unravel = jnp.zeros(len(epoch.batches), jnp.float32), None
    if platform == "gpu" and recipe.elementwise:
        unravel = ravel_pytree(state.params)[1]
        state = map_weights(lambda weights: ravel_pytree(weights)[0], state, state_and_epoch[0])
    step = functools.partial(train_step, model=model, recipe=recipe, axis=axis, parts=parts, unravel=unravel)

    def take_step(i, carry):
        state, losses = carry
        rows = epoch.batches[i]
        state, loss = step(state, images[rows], jnp.where(rows >= 0, labels[rows], -1), epoch.noise_key)
        return state, losses.at[i].set(loss)

    def take_step_until_stop(i, carry):
        # The steps are counted by `i`: a count of their own is one launch more.
        state, losses = carry
        after = take_step(first + i, (state._replace(step=state.step + i), losses))
        after = (after[0]._replace(step=state.step), after[1])
        return jax.tree.map(functools.partial(jnp.where, first + i < stop), after, carry)

    if platform == "cpu":
        return lax.fori_loop(first, stop, take_step, (state, losses))
    state, losses = lax.fori_loop(0, loop_steps(len(losses)), take_step_until_stop, (state, losses))
    state = state._replace(step=state.step + (stop - first))
    return (state if unravel is None else map_weights(unravel, state, state_and_epoch[0])), losses


def map_weights(function: Callable, state: TrainState, tree: TrainState) -> TrainState:
    """Apply a function to what a state has in the places of a tree that hold its weights, or as many other values."""
    weights = jax.tree.structure(tree.params)

    def is_weights(part):
        return jax.tree.structure(part) == weights

    return jax.tree.map(lambda part, own: function(own) if is_weights(part) else own, tree, state, is_leaf=is_weights)


def loop_steps(steps: int) -> int:
    """Return the length of an accelerator's compiled loop for an epoch, or a chunk of it, of so many steps."""
    return -(-steps // -(-steps // LOOP_STEPS))


@functools.partial(jax.jit, static_argnames=("model", "recipe", "axis", "parts", "unravel"))
def train_step(
    state: TrainState,
    images: UInt8[Array, "n h w c"],
    labels: Int32[Array, " n"],
    noise_key: Key[Array, ""] | None = None,
    *,
    model: nn.Module,
    recipe: Recipe,
    axis: str | None = None,
    parts: int = 1,
    unravel: Callable[[Array], PyTree] | None = None,
) -> tuple[TrainState, Float32[Array, ""]]:
    """Take one step down the mean loss of a batch.

    Args:
      state: The state before the step.
      images: The batch; inside `jax.shard_map`, this device's share of it.
      labels: Their labels; an image labelled -1 fills the batch up and counts for nothing.
      noise_key: The key of all augmentation and dropout in the run; None if there is none.
      model: The network.
      recipe: How it is trained.
      axis: Inside `jax.shard_map`, the mesh axis that divides the batch over devices.
      parts: The number of equal parts of the batch. Their gradients are computed one after the other and added: see
        `sharding.count_parts`.
      unravel: Returns the weights that a vector stands for, where the state has vectors of them.

    Returns:
      The state after the step, and the batch's mean loss before it.
    """
    pixels = scale_pixels(images)
    keys = None if noise_key is None else _image_keys(noise_key, state.step, len(labels), axis)
    if recipe.augment is not None:
        assert keys is not None, "a recipe that augments needs a key"
        pixels = recipe.augment(keys, pixels)

    def loss_fn(params, model_state, pixels, labels, keys):
        variables = {"params": params if unravel is None else unravel(params), **model_state}
        dropout_key = None if keys is None else jax.random.fold_in(keys[0], 1)
        logits, model_state = forward_in_training(model, variables, pixels, dropout_key)  # (N, num_classes)
        losses = recipe.loss(logits, jnp.maximum(labels, 0))
        return jnp.where(labels >= 0, losses, 0).sum(), model_state

    def add_part(carry, part):
        (loss, model_state), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params, carry[1], *part)
        return (jax.tree.map(jnp.add, carry[0], (loss, gradients)), model_state), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.params))
    batch = jax.tree.map(lambda array: array.reshape(parts, -1, *array.shape[1:]), (pixels, labels, keys))
    ((loss, gradients), model_state), _ = lax.scan(add_part, (zeros, state.model_state), batch)
    # Sums over all parts and devices, divided once: the mean does not depend on how the batch was divided.
    sums = (loss, gradients, (labels >= 0).sum(dtype=jnp.float32))
    loss, gradients, count = sums if axis is None else lax.psum(sums, axis)
    gradients = jax.tree.map(lambda leaf: leaf / count, gradients)
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = _average(state.ema_params, params, state.step + 1, recipe.ema_decay)
    if axis is not None:  # statistics are averaged; counts are the same on all devices, and stay integers
        model_state = jax.tree.map(
            lambda leaf: (lax.pmean if jnp.issubdtype(leaf.dtype, jnp.inexact) else lax.pmax)(leaf, axis), model_state
        )
    return TrainState(state.step + 1, params, opt_state, ema_params, model_state), loss / count


def _image_keys(noise_key: Key[Array, ""], step: Int32[Array, ""], images: int, axis: str | None) -> Key[Array, " n"]:
    """Return a key for each image of a step: the same, however many devices the batch is divided over."""
    first = 0 if axis is None else lax.axis_index(axis) * images
    step_key = jax.random.fold_in(noise_key, step)
    return jax.vmap(functools.partial(jax.random.fold_in, step_key))(first + jnp.arange(images))


def _average(ema_params: PyTree | None, params: PyTree, step: Int32[Array, ""], most: float | None) -> PyTree | None:
    if ema_params is None or most is None:
        return None
    # As TensorFlow's ExponentialMovingAverage with `num_updates`, or the initial weights would stay in it for long.
    return optax.incremental_update(params, ema_params, 1 - jnp.minimum(most, (1 + step) / (10 + step)))


class SeedKeys(NamedTuple):
    """The keys of all randomness of a seed: of its initial weights, its batches, and its augmentation and dropout."""

    init_key: Key[Array, ""]
    order_key: Key[Array, ""]
    noise_key: Key[Array, ""]


def make_keys(seed: UInt32[Array, ""] | int) -> SeedKeys:
    """Return the keys of a seed."""
    # A named generator, so that a machine's JAX settings cannot change a run.
    return SeedKeys(*jax.random.split(jax.random.key(seed, impl="threefry2x32"), 3))


def create_train_state(
    init_key: Key[Array, ""], model: nn.Module, image_shape: tuple[int, int, int], recipe: Recipe
) -> TrainState:
    """Draw the initial weights, set up the recipe's optimiser, and return the state before step 0.

    Args:
      init_key: The key of the initial weights.
      model: The network.
      image_shape: (height, width, channels).
      recipe: How it will be trained.
    """
    model_state = dict(model.init(init_key, jnp.zeros((1, *image_shape), jnp.float32)))
    params = model_state.pop("params")
    ema_params = params if recipe.ema_decay is not None else None
    return TrainState(jnp.zeros((), jnp.int32), params, recipe.optimizer.init(params), ema_params, model_state)


@functools.partial(jax.jit, static_argnames=("num_examples", "batch_size"))
def batch_indices(
    order_key: Key[Array, ""], epoch: Int32[Array, ""] | int, *, num_examples: int, batch_size: int
) -> Int32[Array, "steps n"]:
    """Return the indices of the images in each batch of an epoch: a function of the seed and the epoch alone.

    They are a permutation, one row per step; the last incomplete batch is dropped.

    Args:
      order_key: The key of all batches of a run.
      epoch: The epoch, from 0.
      num_examples: Size of the training set.
      batch_size: Images per batch.
    """
    steps = num_examples // batch_size
    permutation = jax.random.permutation(jax.random.fold_in(order_key, epoch), num_examples)
    return permutation[: steps * batch_size].reshape(steps, batch_size)
