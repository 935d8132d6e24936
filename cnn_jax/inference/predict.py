"""Which digits are in pictures: from files to a line each."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.special

from cnn_jax.inference.pictures import check_takes_digits, find_images, read_digit
from cnn_jax.inference.pretrained import load_trained
from cnn_jax.runs.settings import Platform
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import InputFileError

TOLD = 3  # classes of each picture, the most probable first


def predict(
    images: Sequence[str],
    run: Path | None = None,
    *,
    as_json: bool = False,
    data_dir: Path | None = None,
    platform: Platform | None = None,
) -> None:
    """Say which digit each picture shows; those that cannot be read are told last, an error a line.

    Raises:
      InputFileError: naming the last file that cannot be read.
      UsageError: the network is not for such images.
      NoCheckpointError: there is no such run.
    """
    files, digits, failures = [], [], []
    for file in find_images(images):
        try:
            digits.append(read_digit(file))
            files.append(file)
        except InputFileError as error:
            failures.append(error)
    if files:
        _tell(files, np.stack(digits), run, as_json, data_dir, platform)
    if failures:
        for error in failures[:-1]:
            Display().say(f"error: {error}")
        raise failures[-1]


def _tell(files, digits, run, as_json, data_dir, platform):
    start_devices(platform)
    display = Display(shown=not as_json)
    network = load_trained(run, data_dir, Display().say)
    check_takes_digits(network.image_shape, f"--run {run and run.name}")
    probabilities = scipy.special.softmax(network.logits(digits).astype(np.float64), axis=1)
    if as_json:
        results = [
            {"file": file, "digit": int(of_file.argmax()), "probabilities": of_file.tolist()}
            for file, of_file in zip(files, probabilities, strict=True)
        ]
        Display().result(json.dumps(results, indent=2))
        return
    for file, digit, of_file in zip(files, digits, probabilities, strict=True):
        name = _printable(file)
        order = of_file.argsort()[::-1][:TOLD]
        display.picture(digit[..., 0])
        display.say(f"{name}: " + ", ".join(f"{place} with {of_file[place]:.1%}" for place in order))
        display.result(f"{name}: {order[0]}")


def _printable(file):
    """Return a file's name with those of its bytes escaped that are no text."""
    return os.fsencode(file).decode(errors="backslashreplace")
