"""The loops in JAX that PyTorch's are measured against: ours, and a network as one first writes it in Flax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from cnn_jax.core.model import CNN, torch_uniform
from cnn_jax.core.recipes import tutorial
from cnn_jax.core.sharding import create_states, epoch_orders, make_mesh, place, run_steps_of_seeds, seed_keys
from cnn_jax.core.training import batch_indices, create_train_state, make_keys, train_step
from cnn_jax.data.dataset import Dataset


class PlainCNN(nn.Module):
    """The network as one writes it in Flax without thinking about speed."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits, (N, 10), of images (N, 28, 28, 1)."""
        for name, features in (("layer1", 32), ("layer2", 64)):
            fan_in = 9 * x.shape[-1]
            initializer = torch_uniform(fan_in)
            x = nn.Conv(features, (3, 3), kernel_init=initializer, bias_init=initializer, name=name)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(10, kernel_init=nn.initializers.xavier_uniform(), name="fc")(x.reshape(x.shape[0], -1))


def make_plain_loop(dataset: Dataset, batch_size: int) -> Callable[[int], None]:
    """Return a function that runs a number of steps of the plain model, one jitted call each."""
    init_key, order_key, _ = make_keys(0)
    state = create_train_state(init_key, PlainCNN(), (28, 28, 1), tutorial(0.001))
    images, labels = jax.device_put((dataset.train_images, dataset.train_labels))
    order = batch_indices(order_key, 0, num_examples=len(labels), batch_size=batch_size)
    taken = 0

    def run(steps):
        nonlocal state, taken
        for _ in range(steps):
            batch = order[taken % len(order)]
            taken += 1
            state, loss = train_step(state, images[batch], labels[batch])
        loss.block_until_ready()

    return run


def make_compiled_loop(dataset: Dataset, dtype: str, batch_size: int, seeds: int = 1) -> Callable[[int], None]:
    """Return a function that runs a number of our steps in one compiled program, as a training does.

    Args:
      dataset: MNIST.
      dtype: `float32` or `bfloat16`, of the operands.
      batch_size: Images a step.
      seeds: How many runs are trained in it; each takes its share of the steps.
    """
    mesh = make_mesh(seeds)
    init_keys, order_keys, augment_keys = seed_keys(np.arange(seeds, dtype=np.uint32), mesh)
    images, labels = place((dataset.train_images, dataset.train_labels), mesh, P())
    orders = epoch_orders(order_keys, 0, num_examples=len(labels), batch_size=batch_size, mesh=mesh)
    states = create_states(init_keys, CNN(dtype=jnp.dtype(dtype)), (28, 28, 1), tutorial(0.001), mesh)
    group = None if jax.default_backend() == "cpu" else seeds
    first = 0

    def run(steps):
        nonlocal states, first
        steps = max(1, steps // seeds)
        if first + steps > orders.shape[1]:
            first = 0
        states, losses = run_steps_of_seeds(
            states, images, labels, orders, augment_keys, first, first + steps, mesh=mesh, group=group
        )
        first += steps
        losses.block_until_ready()

    return run
