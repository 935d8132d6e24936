"""Train variants of the recipe `fast` on 50,000 of MNIST's training images and test them on the others.

`python -m benchmarks.fast SEEDS` prints a row per variant: what it changes, its accuracy and its standard error.
"""

import functools
import sys

import jax
import numpy as np
import optax
from optax import contrib

from cnn_jax.core.evaluation import evaluate
from cnn_jax.core.model import CNN
from cnn_jax.core.recipes import Recipe, smoothed
from cnn_jax.core.training import create_train_state, train_step
from cnn_jax.data.loading import load_dataset

TRAINED = 50_000
NADAM = {"learning_rate": 0.01, "squares": 0.98, "nesterov": True, "batch_size": 50}
ADAM = {"learning_rate": 0.01, "squares": 0.999, "nesterov": False, "batch_size": 50}
MUON = {"learning_rate": 0.05, "muon": True, "images": 45_000}
VARIANTS = (
    ADAM | {"batch_size": 100, "images": 62_500},
    *(ADAM | {"batch_size": 100, "learning_rate": rate, "images": 45_000} for rate in (0.007, 0.012)),
    ADAM,
    ADAM | {"learning_rate": 0.02, "squares": 0.95, "smoothing": 0.1},
    ADAM | {"squares": 0.98, "momentum": 0.95, "linear": True},
    *(NADAM | {"squares": squares} for squares in (0.999, 0.95)),
    *(NADAM | {"learning_rate": rate} for rate in (0.007, 0.01, 0.014)),
    *(NADAM | {"batch_size": 100, "learning_rate": rate} for rate in (0.01, 0.014)),
    *(NADAM | change for change in ({"momentum": 0.9}, {"smoothing": 0.1}, {"linear": True})),
    *(MUON | {"batch_size": size} for size in (100, 50)),
)


def make_recipe(
    steps: int,
    *,
    learning_rate: float,
    momentum: float = 0.85,
    squares: float = 0.999,
    nesterov: bool = False,
    smoothing: float = 0.05,
    linear: bool = False,
    muon: bool = False,
) -> Recipe:
    """Return a variant of the recipe; Muon's learning rate is that of the convolutions."""
    schedule = functools.partial(optax.cosine_onecycle_schedule, steps, pct_start=0.15)
    if linear:
        schedule = functools.partial(optax.linear_onecycle_schedule, steps, pct_start=0.15, pct_final=0.99)
    if not muon:
        optimizer = optax.adam(schedule(learning_rate), b1=momentum, b2=squares, nesterov=nesterov)
        return Recipe(optimizer, loss=smoothed(smoothing), ema_decay=0.99)
    convolution = {"kernel": contrib.MuonDimensionNumbers((0, 1, 2), 3), "bias": None}
    dimensions = {"layer1": convolution, "layer2": convolution, "fc": {"kernel": None, "bias": None}}
    optimizer = contrib.muon(
        schedule(learning_rate),
        beta=0.9,
        adam_b1=momentum,
        adam_learning_rate=schedule(0.005),
        muon_weight_dimension_numbers=lambda _: dimensions,
    )
    return Recipe(optimizer, loss=smoothed(smoothing), ema_decay=0.99)


def accuracy_of(seed: int, *, batch_size: int, images: int = 44_000, **variant: float) -> float:
    """Train a variant on so many images, and return the share of the held-out ones that it gets right."""
    steps = images // batch_size
    recipe, model = make_recipe(steps, **variant), CNN()
    data = load_dataset("mnist", None, None)
    state = create_train_state(jax.random.key(seed), model, (28, 28, 1), recipe)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(TRAINED) for _ in range(-(-images // TRAINED))])
    for batch in order[: steps * batch_size].reshape(steps, batch_size):
        state, _ = train_step(state, data.train_images[batch], data.train_labels[batch], model=model, recipe=recipe)
    return evaluate(model, state.eval_variables, data.train_images[TRAINED:], data.train_labels[TRAINED:]).accuracy


if __name__ == "__main__":
    for variant in VARIANTS:
        accuracies = [accuracy_of(seed, **variant) for seed in range(int(sys.argv[1]))]
        error = np.std(accuracies, ddof=1) / np.sqrt(len(accuracies))
        print(variant, f"{np.mean(accuracies):.5f} +- {error:.5f}", flush=True)
