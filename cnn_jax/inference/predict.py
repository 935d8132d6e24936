"""The command `predict`: classify pictures of digits, and print one line per file."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import scipy.special

from cnn_jax.core.evaluation import BATCH_SIZE
from cnn_jax.inference.pictures import find_images, read_digit
from cnn_jax.inference.preprocess import check_takes_digits
from cnn_jax.inference.pretrained import load_trained
from cnn_jax.runs.settings import Platform
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import InputFileError

SHOWN_CLASSES = 3  # the most probable ones of each picture


def predict(
    images: Sequence[str],
    run: Path | None = None,
    *,
    as_json: bool = False,
    data_dir: Path | None = None,
    platform: Platform | None = None,
) -> None:
    """Say which digit each picture shows, and then report the files that cannot be read, one line each.

    Raises:
      InputFileError: a file cannot be read; if there are several, it names the last.
      UsageError: the network takes images of another size.
      NoCheckpointError: there is no such run.
    """
    failures, results = [], []
    digits, display, trained = _sound_digits(images, failures), Display(shown=not as_json), None
    while some := list(itertools.islice(digits, BATCH_SIZE)):  # of many pictures, the first are answered soon
        if trained is None:
            start_devices(platform)
            trained = load_trained(run, data_dir, Display().say)
            check_takes_digits(trained.image_shape, f"--run {run and run.name}")
        logits = trained.logits(np.stack([digit for _, digit in some]))
        for (file, digit), classes in zip(some, scipy.special.softmax(logits.astype(np.float64), axis=1), strict=True):
            if as_json:
                results.append({"file": file, "digit": int(classes.argmax()), "probabilities": classes.tolist()})
                continue
            most_probable = classes.argsort()[::-1][:SHOWN_CLASSES]
            display.picture(digit[..., 0])
            display.say(f"{file}: " + ", ".join(f"{i} with {classes[i]:.1%}" for i in most_probable))
            display.result(f"{file}: {most_probable[0]}")
    if results:
        Display().result(*json.dumps(results, indent=2).splitlines())
    if failures:
        for failure in failures[:-1]:
            Display().say(f"error: {failure}")
        raise failures[-1]


def _sound_digits(paths: Sequence[str], failures: list[InputFileError]) -> Iterator[tuple[str, np.ndarray]]:
    """Read the digits of files and of folders' files; keep the failures of those that cannot be read."""
    for path in paths:
        try:
            files = find_images(path)
        except InputFileError as error:
            failures.append(error)
            continue
        for file in files:
            try:
                yield file, read_digit(file)
            except InputFileError as error:
                failures.append(error)
