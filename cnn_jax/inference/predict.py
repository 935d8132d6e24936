"""The command `predict`: classify pictures, and print one line per file."""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cnn_jax.core.evaluation import BATCH_SIZE
from cnn_jax.data.published import numbers
from cnn_jax.inference.pictures import find_images, read_picture
from cnn_jax.inference.preprocess import check_takes_pictures
from cnn_jax.inference.pretrained import TrainedModel, load_trained
from cnn_jax.runs.settings import Platform
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import InputFileError

DIGITS = numbers(10)
SHOWN_CLASSES = 3  # the most probable ones of each picture


def predict(
    images: Sequence[str],
    run: Path | None = None,
    *,
    as_json: bool = False,
    data_dir: Path | None = None,
    platform: Platform | None = None,
) -> None:
    """Say what each picture shows, and then report the files that cannot be read, one line each.

    Raises:
      InputFileError: a file cannot be read; if there are several, it names the last.
      UsageError: the network takes images of as many channels as no picture has.
      NoCheckpointError: there is no such run.
    """
    failures, results = [], []
    display = Display(shown=not as_json)

    @functools.cache  # nothing is loaded for files that cannot be read
    def network() -> TrainedModel:
        start_devices(platform)
        trained = load_trained(run, data_dir, Display().say)
        check_takes_pictures(trained.image_shape, f"--run {run and run.name}")
        return trained

    pictures = _sound_pictures(images, failures, lambda colours: network().prepare(colours))
    while some := list(itertools.islice(pictures, BATCH_SIZE)):  # of many pictures, the first are answered soon
        names, probabilities = network().class_names, network().probabilities(np.stack([image for _, image in some]))
        for (file, image), classes in zip(some, probabilities, strict=True):
            answer = int(classes.argmax())
            if as_json:
                digit = {"digit": answer} if names == DIGITS else {}
                found = {"class": names[answer], "index": answer, "probabilities": classes.tolist()}
                results.append({"file": file, **digit, **found})
                continue
            most_probable = classes.argsort()[::-1][:SHOWN_CLASSES]
            display.picture(image.mean(axis=-1))
            display.say(f"{file}: " + ", ".join(f"{names[i]} with {classes[i]:.1%}" for i in most_probable))
            display.result(f"{file}: {names[answer]}")
    if results:
        Display().result(*json.dumps(results, indent=2).splitlines())
    if failures:
        for failure in failures[:-1]:
            Display().say(f"error: {failure}")
        raise failures[-1]


def _sound_pictures(
    paths: Sequence[str], failures: list[InputFileError], prepare: Callable[[np.ndarray], np.ndarray | None]
) -> Iterator[tuple[str, np.ndarray]]:
    """Read the pictures in files and in folders' files; keep the failures of those that cannot be read."""
    for path in paths:
        try:
            files = find_images(path)
        except InputFileError as error:
            failures.append(error)
            continue
        for file in files:
            try:
                yield file, read_picture(file, prepare)
            except InputFileError as error:
                failures.append(error)
