"""The tutorial's network in Keras, trained by TensorFlow, which the benchmark measures where it is installed."""

import importlib
from typing import Any

import numpy as np

from cnn_jax.data.dataset import Dataset, scale_pixels
from cnn_jax.pytorch.variants import RunSteps


def make_network(keras: Any) -> Any:
    """Return the network as Keras's users write it: (N, 28, 28, 1) float32 -> (N, 10) logits."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def make_fit(dataset: Dataset, batch_size: int, learning_rate: float) -> RunSteps:
    """Return a function that runs a number of steps of Keras's `fit`, at most an epoch at a time."""
    _, keras = _import_both()
    network = make_network(keras)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(optimizer=keras.optimizers.Adam(learning_rate), loss=loss)
    images, labels = scale_pixels(dataset.train_images[:]), dataset.train_labels

    def run(steps: int) -> None:
        while steps > 0:
            part = slice(min(steps * batch_size, len(labels) // batch_size * batch_size))
            network.fit(images[part], labels[part], batch_size=batch_size, verbose=0)
            steps -= part.stop // batch_size

    return run


def make_loop(dataset: Dataset, batch_size: int, learning_rate: float) -> RunSteps:
    """Return a function that runs a number of steps in one `tf.function`, the images on the device."""
    tf, keras = _import_both()
    network, optimizer = make_network(keras), keras.optimizers.Adam(learning_rate)
    optimizer.build(network.trainable_variables)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    images, labels = tf.constant(scale_pixels(dataset.train_images[:])), tf.constant(dataset.train_labels)
    order = np.random.default_rng(0).permutation(len(labels))
    batches = tf.constant(order[: len(order) // batch_size * batch_size].reshape(-1, batch_size))
    taken = 0

    @tf.function
    def take_steps(first: Any, steps: Any) -> Any:
        loss = 0.0
        for number in tf.range(first, first + steps):
            batch = batches[number % len(batches)]
            with tf.GradientTape() as tape:
                loss = loss_fn(tf.gather(labels, batch), network(tf.gather(images, batch), training=True))
            weights = network.trainable_variables
            optimizer.apply(tape.gradient(loss, weights), weights)
        return loss

    def run(steps: int) -> None:
        nonlocal taken
        take_steps(tf.constant(taken), tf.constant(steps)).numpy()
        taken += steps

    return run


def _import_both() -> tuple[Any, Any]:
    # By name, because neither is a dependency: without them, the benchmark leaves their variants out.
    return importlib.import_module("tensorflow"), importlib.import_module("keras")
