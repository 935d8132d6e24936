"""Many seeds in one compiled program: which seeds and images each device of each process works on.

The devices form a mesh with two axes: `seeds` divides the seeds, and `data` divides each batch. One seed on one device
is the same program as thirty-two seeds on eight. Nothing here but `to_host` asks which devices are attached: a mesh may
consist of devices that programs are only compiled for.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32, PyTree, UInt8, UInt32

from cnn_jax.core.evaluation import Sums, sum_over_images
from cnn_jax.core.recipes import Recipe
from cnn_jax.core.training import SeedEpoch, TrainState, batch_indices, create_train_state, make_keys

SEEDS, DATA = "seeds", "data"
# How a `SeedEpoch` is divided over the mesh.
EPOCH = SeedEpoch._make((P(SEEDS, None, DATA), P(SEEDS), P(SEEDS)))
# On a CPU the gradients of a batch are computed in parts of at least this many images, one after the other, and added:
# a part's intermediate values stay in the cache. A step on a batch of 100 takes 18 ms that way, and 23 all at once.
CPU_PART_IMAGES = 25


def make_mesh(seeds: int, devices: Sequence[Any]) -> Mesh:
    """Lay out devices: over the seeds as far as they divide evenly, and over the images of a batch beyond that."""
    over_seeds = math.gcd(seeds, len(devices))
    shape = (over_seeds, len(devices) // over_seeds)
    return Mesh(mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True), (SEEDS, DATA))


def count_parts(mesh: Mesh, batch_size: int) -> int:
    """Return the number of parts of a device's share of a batch: as many as are large enough on a CPU, else one."""
    images = -(-batch_size // mesh.shape[DATA])
    if mesh.devices.flat[0].platform != "cpu":
        return 1
    return max(n for n in range(1, images + 1) if n == 1 or (images % n == 0 and images // n >= CPU_PART_IMAGES))


def shard(tree: PyTree, mesh: Mesh, spec: P) -> PyTree:
    """Put host arrays, the same in every process, on the mesh's devices: each device gets its shard by `spec`."""
    sharding = NamedSharding(mesh, spec)

    def put(array):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


def to_host(tree: PyTree) -> PyTree:
    """Return a tree's arrays on the host, whole in every process, wherever their shards are."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def of_seed(states: PyTree, i: int) -> PyTree:
    """Return the arrays of the i-th seed."""
    return jax.tree.map(lambda leaf: leaf[i], states)


def start_seeds(
    seeds: UInt32[np.ndarray, " s"] | UInt32[Array, " s"],
    *,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    recipe: Recipe,
) -> TrainState:
    """Return the seeds' states before step 0: every array has one more axis in front, for the seeds."""
    return jax.vmap(lambda seed: create_train_state(make_keys(seed).init_key, model, image_shape, recipe))(seeds)


def seeds_epoch(
    seeds: UInt32[np.ndarray, " s"] | UInt32[Array, " s"],
    epoch: Int32[Array, ""] | int,
    *,
    num_examples: int,
    batch_size: int,
    shares: int,
) -> SeedEpoch:
    """Return the seeds' parts of an epoch: batches (S, steps, N), int32, and noise keys (S,).

    N is `batch_size`, filled up with -1 to a multiple of `shares`, the number of devices that share a batch: the mean
    over a batch does not depend on it.
    """

    def of_one(seed):
        keys = make_keys(seed)
        batches = batch_indices(keys.order_key, epoch, num_examples=num_examples, batch_size=batch_size)
        return SeedEpoch(jnp.pad(batches, ((0, 0), (0, -batch_size % shares)), constant_values=-1), keys.noise_key)

    return jax.vmap(of_one)(seeds)


def run_seeds(
    states: TrainState,
    epochs: SeedEpoch,
    images: UInt8[Array, "m h w c"],
    labels: Int32[Array, " m"],
    first: Int32[Array, ""],
    stop: Int32[Array, ""],
    *,
    run: Callable,
    seeds_at_once: int | None,
) -> tuple[TrainState, Float32[Array, "s steps"]]:
    """Run the steps first..stop-1 of every seed that this device has.

    Args:
      states: The states of its seeds.
      epochs: Their parts of the epoch.
      images: The images that the batches' indices refer to.
      labels: Their labels.
      first: The first row of the batches to train on.
      stop: The row before which to stop.
      run: `run_steps` with a run's model and recipe.
      seeds_at_once: The number of seeds to train at once, vectorised. None trains one after the other, which is
        faster on a CPU: one seed's intermediate values fit its cache, and one seed keeps all cores busy.

    Returns:
      The states after the last step, and the losses, of which first..stop-1 are filled in.
    """
    run = functools.partial(run, images=images, labels=labels, first=first, stop=stop)
    return lax.map(run, (states, epochs), batch_size=seeds_at_once)


def sum_seeds(
    variables: PyTree,
    images: UInt8[Array, "m h w c"],
    labels: Int32[Array, " m"],
    pixel_scale: Float32[Array, ""],
    *,
    model: nn.Module,
) -> Sums:
    """Return the `sum_over_images` of every seed that this device has, added over the devices that share the images."""
    # One seed after the other: a batch of a test is large enough to keep a device busy.
    return lax.psum(lax.map(lambda of: sum_over_images(of, images, labels, pixel_scale, model=model), variables), DATA)


def jit_over_mesh(
    function: Callable, mesh: Mesh, in_specs: tuple, out_specs: object, *, donate_argnums: int | None = None
) -> jax.stages.Wrapped:
    """Return a jitted function whose body runs on every device of a mesh, each with its shards of the arguments.

    Args:
      function: The body.
      mesh: A mesh from `make_mesh`.
      in_specs: How each argument is divided.
      out_specs: How the results are divided.
      donate_argnums: The argument whose memory the results reuse.
    """
    # The block op's own gradients do not say over which axes they vary, so JAX cannot check it.
    body = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(body, in_shardings=shardings(mesh, in_specs), donate_argnums=donate_argnums)


def shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """Return the sharding over a mesh that each spec of a tree stands for."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda spec: isinstance(spec, P))
