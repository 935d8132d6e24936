"""The variants of a training step that the benchmark times, in PyTorch, TensorFlow, plain Flax and cnn-jax.

The functions that make a variant import its framework: a process that times one framework has not loaded the other.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cnn_jax.data.dataset import Dataset, scale_pixels

if TYPE_CHECKING:
    import optax
    from flax import linen as nn

    from cnn_jax.pytorch.tutorial import StepVariant

BATCH_SIZE = 100
LEARNING_RATE = 0.001

# glibc returns the memory of large arrays to the system after every step, and each page of it faults in the next one.
# PyTorch's tuning guide advises another allocator against that; these two settings have the same effect. With
# channels_last, a step then takes 20 ms instead of 25.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**25)}

# TensorFlow would take all of a GPU's memory at once.
SHARE_GPU = {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}

RunSteps = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute a training step of 100 images.

    Attributes:
      name: Its name, as the table shows it.
      framework: The framework that computes it.
      make: Returns a function that runs a number of steps on a data set and waits for them; each call continues where
        the last one stopped. Raises any exception if the machine lacks something, such as a compiler.
      environment: Environment variables that its process starts with.
      platform: What it is for; None for anything.
      dtype: The type of its convolutions' operands.
      seeds: How many networks each of its steps trains, at once or in turn.
    """

    name: str
    framework: Literal["PyTorch", "TensorFlow", "Flax", "cnn-jax"]
    make: Callable[[Dataset], RunSteps]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    platform: Literal["cpu", "gpu"] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    seeds: int = 1


def make_tutorial_loop(dataset: Dataset) -> RunSteps:
    """Make the tutorial's own loop, a DataLoader in front of each step."""
    from cnn_jax.pytorch.tutorial import make_loop_as_written

    return make_loop_as_written(dataset, BATCH_SIZE)


def make_torch_loop(variant: "StepVariant", dataset: Dataset) -> RunSteps:
    """Make a loop of PyTorch's step in a variant of `tutorial.make_step`."""
    from cnn_jax.pytorch.tutorial import make_loop

    return make_loop(dataset, variant, BATCH_SIZE)


def make_keras_fit(dataset: Dataset) -> RunSteps:
    """Make a loop of Keras's `fit` on TensorFlow, as its users train."""
    from cnn_jax.pytorch.keras import make_fit

    return make_fit(dataset, BATCH_SIZE, LEARNING_RATE)


def make_tensorflow_loop(dataset: Dataset) -> RunSteps:
    """Make a loop of steps in one compiled function of TensorFlow."""
    from cnn_jax.pytorch.keras import make_loop

    return make_loop(dataset, BATCH_SIZE, LEARNING_RATE)


def make_flax_loop(dataset: Dataset) -> RunSteps:
    """Make a loop as one first writes it in Flax: one jitted step after another."""
    import jax
    import optax

    from cnn_jax.core.model import PlainCNN

    model, optimizer = PlainCNN(), optax.adam(LEARNING_RATE)
    images, labels = jax.device_put((dataset.train_images, dataset.train_labels))
    params = jax.jit(model.init)(jax.random.key(0), scale_pixels(images[:1]))["params"]
    opt_state = optimizer.init(params)
    step = make_flax_step(model, optimizer)
    order = np.random.default_rng(0).permutation(len(labels))
    batches = order[: len(order) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    taken = 0

    def run(steps: int) -> None:
        nonlocal params, opt_state, taken
        for _ in range(steps):
            batch = batches[taken % len(batches)]
            taken += 1
            params, opt_state, _ = step(params, opt_state, scale_pixels(images[batch]), labels[batch])
        jax.block_until_ready(params)

    return run


def make_flax_step(model: "nn.Module", optimizer: "optax.GradientTransformation") -> Callable:
    """Return the tutorial's training step for a Flax model and an Optax optimiser.

    It is a jitted function of the weights, the optimiser's state, pixels (N, H, W, C) in [0, 1] and labels (N,), and
    returns the new weights and state, and the batch's mean loss before the step.
    """
    import jax
    import optax

    from cnn_jax.core.model import forward

    @jax.jit
    def step(params, opt_state, pixels, labels):
        def loss_fn(params):
            logits = forward(model, {"params": params}, pixels)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def make_cnn_jax_loop(dtype: Literal["float32", "bfloat16"], seeds: int, dataset: Dataset) -> RunSteps:
    """Make a loop of cnn-jax's steps in one compiled program, as a training runs them.

    Args:
      dtype: The operands' type, `float32` or `bfloat16`.
      seeds: How many seeds the program trains.
      dataset: MNIST.
    """
    import jax
    from jax.sharding import PartitionSpec as P

    from cnn_jax.core.sharding import make_mesh, shard
    from cnn_jax.runs.program import Sizes, make_program, start_states
    from cnn_jax.runs.settings import TrainSettings
    from cnn_jax.runtime.devices import start_devices

    start_devices(None, keep_compiled=False)
    settings, devices = TrainSettings(seed=0, seeds=seeds, precision=dtype), jax.devices()
    seeds_at_once = None if devices[0].platform == "cpu" or seeds == 1 else seeds
    mesh = make_mesh(seeds, devices)
    program = make_program(settings, Sizes.of(dataset, settings), mesh, seeds_at_once=seeds_at_once)
    data = shard((dataset.train_images, dataset.train_labels), mesh, P())
    states, epoch, first = start_states(program), program.epoch(np.int32(0)), 0

    def run(steps: int) -> None:
        nonlocal states, first
        if first + steps > program.steps_per_epoch:
            first = 0
        states, losses = program.run_steps(states, epoch, *data, np.int32(first), np.int32(first + steps))
        first += steps
        losses.block_until_ready()

    return run


def _torch(name: str, variant: "StepVariant", **properties: Any) -> Variant:
    return Variant(name, "PyTorch", functools.partial(make_torch_loop, variant), **properties)


def _tensorflow(
    name: str,
    make: Callable[[Dataset], RunSteps],
    environment: Mapping[str, str] | None = None,
    platform: Literal["cpu"] | None = None,
) -> Variant:
    return Variant(name, "TensorFlow", make, environment={**SHARE_GPU, **(environment or {})}, platform=platform)


def _ours(name: str, dtype: Literal["float32", "bfloat16"], seeds: int) -> Variant:
    return Variant(name, "cnn-jax", functools.partial(make_cnn_jax_loop, dtype, seeds), dtype=dtype, seeds=seeds)


VARIANTS = (
    Variant("the tutorial's loop as written", "PyTorch", make_tutorial_loop),
    _torch("PyTorch, eager", "eager"),
    _torch("PyTorch, channels_last", "channels_last"),
    _torch("PyTorch, channels_last, memory kept", "channels_last", environment=KEEP_MEMORY, platform="cpu"),
    _torch("PyTorch, bfloat16 autocast", "bfloat16", dtype="bfloat16"),
    _torch(
        "PyTorch, bfloat16 autocast, memory kept",
        "bfloat16",
        dtype="bfloat16",
        environment=KEEP_MEMORY,
        platform="cpu",
    ),
    _torch("PyTorch, torch.compile", "compiled"),
    _torch("PyTorch, CUDA graph", "cuda_graph", platform="gpu"),
    _torch("PyTorch, torch.compile, CUDA graph", "compiled_cuda_graph", platform="gpu"),
    _torch("PyTorch, bfloat16, CUDA graph", "bfloat16_cuda_graph", dtype="bfloat16", platform="gpu"),
    _tensorflow("Keras, fit", make_keras_fit),
    _tensorflow("TensorFlow, tf.function", make_tensorflow_loop),
    _tensorflow("TensorFlow, tf.function, memory kept", make_tensorflow_loop, KEEP_MEMORY, platform="cpu"),
    Variant("plain Flax model", "Flax", make_flax_loop),
    _ours("cnn-jax, float32", "float32", seeds=1),
    _ours("cnn-jax, bfloat16", "bfloat16", seeds=1),
    _ours("cnn-jax, one of 8 seeds", "float32", seeds=8),
)
