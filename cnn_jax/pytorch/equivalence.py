"""How closely both frameworks compute the same function, from equal weights and the same order of the images."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import nn

from cnn_jax.core.model import CNN, forward
from cnn_jax.core.recipes import tutorial
from cnn_jax.core.training import batch_indices, create_train_state, make_keys, train_step
from cnn_jax.data.dataset import Dataset, scale_pixels
from cnn_jax.inference.torch_layout import params_to_torch
from cnn_jax.pytorch.tutorial import TutorialCNN, make_step
from cnn_jax.pytorch.variants import BATCH_SIZE, LEARNING_RATE, make_flax_step


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Differences between the two frameworks, in float32 unless stated otherwise.

    Attributes:
      logits: The largest absolute difference in a batch.
      gradients: For each weight, the largest difference relative to the gradient's largest entry.
      costs: At each Adam step, the absolute difference of the losses.
      distances: After each step, the L2 distance between all weights, relative to their distance from the initial ones.
      pytorch_costs: At each Adam step, the absolute difference of the losses between PyTorch and PyTorch in another
        memory format: how far rounding alone separates two runs.
      float64_costs: At each Adam step, the absolute difference of the losses in float64, where rounding is negligible.
    """

    logits: float
    gradients: dict[str, float]
    costs: list[float]
    distances: list[float]
    pytorch_costs: list[float]
    float64_costs: list[float]


def measure_agreement(dataset: Dataset, *, seed: int, steps: int, float64_steps: int) -> Agreement:
    """Run a forward pass, a backward pass and a number of Adam steps in both frameworks, and compare them.

    Args:
      dataset: MNIST.
      seed: Seeds the initial weights and the shuffling, which both frameworks share.
      steps: Adam steps in float32, at most one epoch.
      float64_steps: Adam steps in float64, at most as many.
    """
    keys, model, recipe = make_keys(seed), CNN(), tutorial(LEARNING_RATE)
    image_shape = dataset.train_images.shape[1:]
    state = create_train_state(keys.init_key, model, image_shape, recipe)
    params = jax.tree.map(np.asarray, state.params)
    start = params_to_torch(params, image_shape)
    indices = batch_indices(keys.order_key, 0, num_examples=len(dataset.train_labels), batch_size=BATCH_SIZE)
    batches = [(dataset.train_images[batch], dataset.train_labels[batch]) for batch in np.asarray(indices)[:steps]]
    logits, gradients = _logits_and_gradients(params, make_torch_network(start), *batches[0])

    torch_network = make_torch_network(start)
    torch_step = make_step(torch_network, "eager", torch.device("cpu"), LEARNING_RATE)
    other_step = make_step(make_torch_network(start), "channels_last", torch.device("cpu"), LEARNING_RATE)
    costs, distances, pytorch_costs = [], [], []
    for images, labels in batches:
        state, cost = train_step(state, images, labels, model=model, recipe=recipe)
        torch_batch = to_torch_images(images), torch.from_numpy(labels.astype(np.int64))
        torch_cost = torch_step(*torch_batch).item()
        costs.append(abs(float(cost) - torch_cost))
        distances.append(_distance(params_to_torch(state.params, image_shape), torch_network, start))
        pytorch_costs.append(abs(other_step(*torch_batch).item() - torch_cost))
    return Agreement(
        logits, gradients, costs, distances, pytorch_costs, _float64_costs(params, start, batches[:float64_steps])
    )


def _logits_and_gradients(
    params: dict, model: TutorialCNN, images: np.ndarray, labels: np.ndarray
) -> tuple[float, dict[str, float]]:
    """Return the largest difference of the logits, and of each weight's gradient, as in `Agreement`."""

    @jax.jit
    def forward_and_backward(params: dict, images: jax.Array, labels: jax.Array) -> tuple[dict, jax.Array]:
        def loss_fn(params: dict) -> tuple[jax.Array, jax.Array]:
            logits = forward(CNN(), {"params": params}, scale_pixels(images))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

        return jax.grad(loss_fn, has_aux=True)(params)

    gradients, logits = forward_and_backward(params, images, labels)
    torch_logits = model(to_torch_images(images))
    loss = nn.functional.cross_entropy(torch_logits, torch.from_numpy(labels.astype(np.int64)))
    weights = dict(model.named_parameters())
    of_weights = torch.autograd.grad(loss, list(weights.values()))
    torch_gradients = {name: gradient.numpy() for name, gradient in zip(weights, of_weights, strict=True)}
    return float(np.abs(np.asarray(logits) - torch_logits.detach().numpy()).max()), {
        name: float(np.abs(gradient - torch_gradients[name]).max() / np.abs(torch_gradients[name]).max())
        for name, gradient in params_to_torch(gradients, images.shape[1:]).items()
    }


def _float64_costs(
    params: dict, start: dict[str, np.ndarray], batches: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[float]:
    """Return the differences of the losses in float64, from the same weights in Flax's and in PyTorch's layout."""
    torch_step = make_step(make_torch_network(start).double(), "eager", torch.device("cpu"), LEARNING_RATE)
    optimizer = optax.adam(LEARNING_RATE)
    step = make_flax_step(CNN(dtype=jnp.float64), optimizer)
    differences = []
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        opt_state = optimizer.init(params)
        for images, labels in batches:
            pixels = scale_pixels(images).astype(np.float64)
            params, opt_state, cost = step(params, opt_state, pixels, labels)
            torch_pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
            torch_cost = torch_step(torch_pixels, torch.from_numpy(labels.astype(np.int64)))
            differences.append(abs(float(cost) - torch_cost.item()))
    return differences


def make_torch_network(tensors: dict[str, np.ndarray]) -> TutorialCNN:
    """Return the tutorial's network with a copy of the given weights."""
    model = TutorialCNN()
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in tensors.items()})
    return model


def to_torch_images(images: np.ndarray) -> torch.Tensor:
    """Convert images (N, H, W, C), uint8, to the tutorial's input, (N, C, H, W), float32 in [0, 1]."""
    return torch.from_numpy(scale_pixels(images).transpose(0, 3, 1, 2).copy())


def _distance(ours: dict[str, np.ndarray], model: TutorialCNN, start: dict[str, np.ndarray]) -> float:
    """Return the L2 distance between our weights and the model's, relative to the model's from the initial ones."""
    theirs = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    difference = sum(float(np.sum((ours[name] - theirs[name]) ** 2, dtype=np.float64)) for name in start)
    movement = sum(float(np.sum((start[name] - theirs[name]) ** 2, dtype=np.float64)) for name in start)
    return (difference / movement) ** 0.5
