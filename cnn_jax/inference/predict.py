"""The command `predict`: classify pictures of digits, and print one line per file."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import scipy.special

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
    files, digits, failures = [], [], []

    @contextlib.contextmanager
    def failures_kept() -> Iterator[None]:
        try:
            yield
        except InputFileError as error:
            failures.append(error)

    for path in images:
        with failures_kept():
            for file in find_images(path):
                with failures_kept():
                    digits.append(read_digit(file))
                    files.append(file)
    if files:
        _classify(files, np.stack(digits), run, as_json=as_json, data_dir=data_dir, platform=platform)
    if failures:
        for failure in failures[:-1]:
            Display().say(f"error: {failure}")
        raise failures[-1]


def _classify(
    files: list[str],
    digits: np.ndarray,
    run: Path | None,
    *,
    as_json: bool,
    data_dir: Path | None,
    platform: Platform | None,
) -> None:
    start_devices(platform)
    display = Display(shown=not as_json)
    trained = load_trained(run, data_dir, Display().say)
    check_takes_digits(trained.image_shape, f"--run {run and run.name}")
    probabilities = scipy.special.softmax(trained.logits(digits).astype(np.float64), axis=1)
    if as_json:
        results = [
            {"file": file, "digit": int(classes.argmax()), "probabilities": classes.tolist()}
            for file, classes in zip(files, probabilities, strict=True)
        ]
        Display().result(*json.dumps(results, indent=2).splitlines())
        return
    for file, digit, classes in zip(files, digits, probabilities, strict=True):
        most_probable = classes.argsort()[::-1][:SHOWN_CLASSES]
        display.picture(digit[..., 0])
        display.say(f"{file}: " + ", ".join(f"{i} with {classes[i]:.1%}" for i in most_probable))
        display.result(f"{file}: {most_probable[0]}")
