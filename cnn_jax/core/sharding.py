"""Many seeds in one compiled program, over all devices of all hosts: which seeds and images each device works on.

The devices form a mesh with two axes: `seeds`, over which the runs are divided, and `data`, over which each batch is.
One run on one device is the same program as thirty-two runs on eight.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cnn_jax.core.evaluation import Evaluation, pixel_maximum, sum_over_images
from cnn_jax.core.recipes import Recipe
from cnn_jax.core.training import TrainState, batch_indices, create_train_state, make_keys, run_steps
from cnn_jax.runtime.distributed import to_host

SEEDS, DATA = "seeds", "data"
# Of a device's memory, for what the seeds of a group leave behind in a step; the rest is for the data and for XLA.
MEMORY_SHARE = 0.6


def make_mesh(seeds: int) -> Mesh:
    """Lay out all devices: over the seeds as far as they divide evenly, and over the images of a batch beyond that."""
    devices = len(jax.devices())
    over_seeds = math.gcd(seeds, devices)
    return jax.make_mesh((over_seeds, devices // over_seeds), (SEEDS, DATA), axis_types=(AxisType.Auto,) * 2)


def place(tree: object, mesh: Mesh, spec: P) -> object:
    """Put host arrays, the same in every process, on the mesh's devices, each device getting its part by `spec`."""
    sharding = NamedSharding(mesh, spec)

    def put(array):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


def of_seed(tree: object, i: int) -> object:
    """Return what a tree holds of its i-th seed, from 0: of each array one, without the axis of the seeds."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


def seed_keys(seeds: np.ndarray, mesh: Mesh) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the `init_keys`, `order_keys` and `augment_keys` of seeds, (S,) each."""
    return jax.jit(jax.vmap(make_keys), out_shardings=NamedSharding(mesh, P(SEEDS)))(seeds)


def create_states(
    init_keys: jax.Array, model: nn.Module, image_shape: tuple[int, int, int], recipe: Recipe, mesh: Mesh
) -> TrainState:
    """Return the seeds' states before step 0: of each array of a state, S of them, one after the other."""
    create = jax.vmap(lambda key: create_train_state(key, model, image_shape, recipe))
    return jax.jit(create, out_shardings=NamedSharding(mesh, P(SEEDS)))(init_keys)


@functools.partial(jax.jit, static_argnames=("num_examples", "batch_size", "mesh"))
def epoch_orders(
    order_keys: jax.Array, epoch: jax.Array | int, *, num_examples: int, batch_size: int, mesh: Mesh
) -> jax.Array:
    """Return the order of each seed's epoch, (S, steps, N), int32.

    N is `batch_size`, filled up with -1 to a multiple of the devices that a batch is divided over: a mean over the
    batch does not depend on how many they are.
    """
    order_of = functools.partial(batch_indices, num_examples=num_examples, batch_size=batch_size)
    orders = jax.vmap(order_of, in_axes=(0, None))(order_keys, epoch)
    orders = jnp.pad(orders, ((0, 0), (0, 0), (0, -batch_size % mesh.shape[DATA])), constant_values=-1)
    return lax.with_sharding_constraint(orders, NamedSharding(mesh, P(SEEDS, None, DATA)))


@functools.partial(jax.jit, static_argnames=("mesh", "group", "examples"), donate_argnames="states")
def run_steps_of_seeds(
    states: TrainState,
    images: jax.Array,
    labels: jax.Array,
    orders: jax.Array,
    augment_keys: jax.Array,
    first: jax.Array | int,
    stop: jax.Array | int,
    *,
    mesh: Mesh,
    group: int | None,
    examples: P = P(),  # noqa: B008 - immutable
) -> tuple[TrainState, jax.Array]:
    """Run the steps first..stop-1 of each seed's order in one compiled program.

    Args:
      states: Of `create_states`; their memory is reused.
      images: (num_examples, height, width, channels), uint8.
      labels: (num_examples,), int32.
      orders: (S, steps, N), int32, as `epoch_orders` returns them.
      augment_keys: (S,).
      first: The first row of the orders.
      stop: The row before which to stop.
      mesh: Of `make_mesh`.
      group: How many seeds a device trains at once, vectorised; None trains them one after the other.
      examples: How images and labels are divided over the mesh; the orders count within each device's part.

    Returns:
      The states after the last step, and the losses, (S, steps), float32, of which first..stop-1 are filled in.
    """

    def on_a_device(states, images, labels, orders, augment_keys, first, stop):
        def train_seed(seed):
            state, order, augment_key = seed
            return run_steps(state, images, labels, order, augment_key, first, stop, axis=DATA)

        return lax.map(train_seed, (states, orders, augment_keys), batch_size=group)

    return jax.shard_map(
        on_a_device,
        mesh=mesh,
        in_specs=(P(SEEDS), examples, examples, P(SEEDS, None, DATA), P(SEEDS), P(), P()),
        out_specs=(P(SEEDS), P(SEEDS)),
        check_vma=False,  # the block op's own gradients do not say over which axes they vary
    )(states, images, labels, orders, augment_keys, first, stop)


def choose_group(seeds: int, seed_bytes: int, device_bytes: int | None) -> int | None:
    """Return how many of its seeds a device should train at once.

    Args:
      seeds: How many it has.
      seed_bytes: What a step of one seed needs beside the data.
      device_bytes: What the device has; None for a CPU, which is faster on one seed after the other: what a step of one
        leaves behind fits its cache, and one alone keeps all cores busy.
    """
    if seeds == 1 or device_bytes is None:
        return None
    return max(1, min(seeds, int(MEMORY_SHARE * device_bytes / max(1, seed_bytes))))


def place_test_set(images: np.ndarray, labels: np.ndarray, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Divide a test set over the devices that share each seed, filled up with images labelled -1."""
    missing = -len(labels) % mesh.shape[DATA]
    images = np.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
    return place((images, np.pad(labels, (0, missing), constant_values=-1)), mesh, P(DATA))


def evaluate_seeds(
    apply_fn: Callable, params: dict, images: jax.Array, labels: jax.Array, *, mesh: Mesh, unscaled: bool = False
) -> list[Evaluation]:
    """Test every seed's network on all images.

    Args:
      apply_fn: The network's `apply`.
      params: The weights, of each array S.
      images: (M, height, width, channels), uint8, of `place_test_set`.
      labels: (M,), int32; -1 counts for nothing.
      mesh: Of `make_mesh`.
      unscaled: Feed pixels in 0..255, as the PyTorch tutorial does when it tests, in place of [0, 1].
    """
    sums = sums_of_seeds(params, images, labels, pixel_maximum(unscaled=unscaled), apply_fn=apply_fn, mesh=mesh)
    correct, loss_sums, counts = to_host(sums)
    return [
        Evaluation(correct=int(right), count=int(count), loss=float(loss) / int(count))
        for right, loss, count in zip(correct, loss_sums, counts, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("apply_fn", "mesh"))
def sums_of_seeds(
    params: dict, images: jax.Array, labels: jax.Array, maximum: jax.Array, *, apply_fn: Callable, mesh: Mesh
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return each seed's `sum_over_images`: correct images, losses, images counted; (S,) each."""

    def on_a_device(params, images, labels, maximum):
        # One seed after the other: a batch of a test is large enough to keep a device busy.
        sums = lax.map(lambda params: sum_over_images(params, images, labels, maximum, apply_fn=apply_fn), params)
        return lax.psum(sums, DATA)

    return jax.shard_map(
        on_a_device,
        mesh=mesh,
        in_specs=(P(SEEDS), P(DATA), P(DATA), P()),
        out_specs=P(SEEDS),
        check_vma=False,
    )(params, images, labels, maximum)
