"""Compare variants of the recipe `accurate` on held-out training images; `python -m benchmarks.accurate`.

MNIST's training images are cut into six folds. Each variant is trained without one fold and tested on it, for several
folds in turn, and all of it at once: an accelerator trains them in one program, with what varies as arrays. It prints
accuracies; those that decided are recorded in `benchmarks/runs/accurate/tried.json`. The test images are not loaded.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from cnn_jax.core.evaluation import sum_over_images
from cnn_jax.core.model import CNN
from cnn_jax.core.recipes import Recipe, distort, smoothed
from cnn_jax.core.training import batch_indices, create_train_state, make_keys, train_step
from cnn_jax.data.loading import load_dataset

# What a variant changes one or some of; `end` is the last learning rate's share of the highest.
FIRST = {
    "learning_rate": 0.005,
    "weight_decay": 0.02,
    "smoothing": 0.05,
    "ema_decay": 0.9995,
    "end": 0.0,
    "pixels": 1.5,
    "degrees": 9.0,
    "scale": 0.08,
    "bend": 0.5,
    "stroke": 0.0,
}
FOLDS = 6


def recipe_of(values: dict[str, jax.Array], steps: int, sgd: bool) -> Recipe:
    """Return a variant's recipe; its values may be traced."""

    def schedule(count):
        warmed, warming = count / (steps // 20), (count - steps // 20) / (steps - steps // 20)
        falling = values["end"] + (1 - values["end"]) * (1 + jnp.cos(jnp.pi * warming)) / 2
        return values["learning_rate"] * jnp.where(warmed < 1, (1 + 24 * warmed) / 25, falling)

    optimizer = optax.adamw(schedule, weight_decay=values["weight_decay"])
    if sgd:
        momentum = optax.sgd(schedule, momentum=0.9, nesterov=True)
        optimizer = optax.chain(optax.add_decayed_weights(values["weight_decay"]), momentum)
    moves = {name: values[name] for name in ("pixels", "degrees", "scale", "bend", "stroke")}
    return Recipe(optimizer, smoothed(values["smoothing"]), functools.partial(distort, **moves), values["ema_decay"])


def accuracies(
    variants: list[dict[str, float]], *, epochs: int, folds: int, images: int, sgd: bool, batch_size: int = 100
) -> np.ndarray:
    """Train every variant without each of the first folds, and return the accuracies on those, (variants, folds)."""
    dataset, model = load_dataset("mnist", None, None), CNN()
    parts = np.split(np.random.default_rng(0).permutation(images)[: images // FOLDS * FOLDS], FOLDS)
    held_out = jnp.asarray(np.stack(parts[:folds]))
    trained = jnp.asarray([np.concatenate(parts[:fold] + parts[fold + 1 :]) for fold in range(folds)])
    pixels, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    steps = trained.shape[1] // batch_size

    def step(i, state, batches, noise_key, recipe):
        rows = batches[i]
        return train_step.__wrapped__(state, pixels[rows], labels[rows], noise_key, model=model, recipe=recipe)[0]

    @jax.jit
    def of_one(values, fold):
        keys, recipe = make_keys(1000 + fold), recipe_of(values, epochs * steps, sgd)

        def train_epoch(epoch, state):
            batches = batch_indices(keys.order_key, epoch, num_examples=trained.shape[1], batch_size=batch_size)
            take = functools.partial(step, batches=trained[fold][batches], noise_key=keys.noise_key, recipe=recipe)
            return lax.fori_loop(0, steps, take, state)

        state = create_train_state(keys.init_key, model, (28, 28, 1), recipe)
        state = lax.fori_loop(0, epochs, train_epoch, state)
        rows = held_out[fold]
        sums = sum_over_images(state.eval_variables, pixels[rows], labels[rows], jnp.float32(255), model=model)
        return sums.correct / len(rows)

    every = [({**FIRST, **variant}, fold) for variant in variants for fold in range(folds)]
    values = {name: jnp.asarray([one[name] for one, _ in every], jnp.float32) for name in FIRST}
    of_all = jax.vmap(of_one)(values, jnp.asarray([fold for _, fold in every]))
    return np.asarray(of_all).reshape(len(variants), folds)


def main() -> None:
    """Train the variants that the command line gives, as JSON, and print what they come to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", type=json.loads, help="each such as '{\"bend\": 0.35}'")
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--folds", type=int, default=5, choices=range(1, FOLDS + 1))
    parser.add_argument("--images", type=int, default=60_000, help="how many of the training images to use")
    parser.add_argument("--sgd", action="store_true", help="Nesterov's momentum in place of AdamW")
    args = vars(parser.parse_args())
    for variant, found in zip(args["variants"], accuracies(**args), strict=True):
        print(f"{found.mean():.5f}", json.dumps({"variant": variant, "accuracies": np.round(found, 4).tolist()}))


if __name__ == "__main__":
    main()
