"""The command `predict`: read pictures, and print one line per file."""

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.inference.pictures import Picture, draw_boxes, find_images, read_picture
from cnn_jax.inference.preprocess import Box, check_takes_pictures
from cnn_jax.inference.pretrained import DIGITS, Reading, TrainedModel, load_trained
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.settings import Platform
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import InputFileError
from cnn_jax.runtime.files import output_errors, replaced

SHOWN_CLASSES = 3  # the most probable ones of a picture of one character
SHOWN_PER_ROW = 5  # drawings of characters side by side, at half size, on 80 columns
NO_DIGIT = "?"


def predict(
    images: Sequence[str],
    run: Path | None = None,
    *,
    one: bool = False,
    as_json: bool = False,
    boxes: Path | None = None,
    data_dir: Path | None = None,
    platform: Platform | None = None,
) -> None:
    """Say what each picture shows, and then report the files that cannot be read, one line each.

    Args:
      images: Files, folders, or `-` for standard input.
      run: The run whose network reads; None for the packaged one.
      one: Whether each picture shows one character.
      as_json: Whether to print JSON.
      boxes: Where to write the picture with a box around each character and what it is; there is then one picture.
      data_dir: Where tfds keeps its data sets.
      platform: Where to compute.

    Raises:
      InputFileError: a file cannot be read, or nothing was read in any of them; it names the last.
      UsageError: the network takes images of as many channels as no picture has.
      NoCheckpointError: there is no such run.
    """
    failures, results, answered = [], [], False
    display = Display(shown=not as_json)

    @functools.cache  # nothing is loaded for files that cannot be read
    def network() -> TrainedModel:
        start_devices(platform)
        trained = load_trained(run, data_dir, Display().say)
        check_takes_pictures(trained.image_shape, f"--run {run and run.name}")
        return trained

    for file, picture in _sound_pictures(images, failures):
        Display().say(*picture.notes(file))
        names, lines = network().class_names, network().read(picture.colours, one=one)
        readings = list(itertools.chain(*lines))
        answered |= any(reading.index is not None for reading in readings)
        if boxes is not None:
            with output_errors(boxes, "--boxes"), replaced(boxes) as new:
                labelled = [(reading.box, as_text([reading], names)) for reading in readings]
                new.write_bytes(draw_boxes(picture, labelled))
        if as_json:
            results.append({"file": file} | as_dictionary(picture, readings, names))
        else:
            _show(display, readings)
            if len(readings) == 1 and readings[0].index is not None:
                display.say(f"{file}: {describe_probabilities(readings[0].probabilities, names)}")
            display.result(f"{file}: {as_text(readings, names)}")
    if results:
        Display().result(*json.dumps(results, indent=2).splitlines())
    if not answered and not failures:
        remedy = "give a picture with more contrast"
        # Classes without names are numbers, and are read as digits.
        if run is not None and RunFolder(run).read_settings().dataset_dir and network().reads_digits:
            remedy += f"; if {run.name} has learned no digits, name its classes in a labels.txt beside its data"
        failures.append(InputFileError(f"no digit was found in {', '.join(images)}; {remedy}"))
    for failure in failures[:-1]:
        Display().say(f"error: {failure}")
    if failures:
        raise failures[-1]


def as_text(readings: Sequence[Reading], names: Sequence[str]) -> str:
    """Return the names of the characters' classes, in reading order."""
    return " ".join(NO_DIGIT if reading.index is None else names[reading.index] for reading in readings) or NO_DIGIT


def as_dictionary(picture: Picture, readings: Sequence[Reading], names: Sequence[str]) -> dict[str, Any]:
    """Return what `--json` prints of a picture."""
    characters = []
    for reading in readings:
        named: dict[str, Any] = {"class": None if reading.index is None else names[reading.index]}
        if tuple(names) == DIGITS:
            named["digit"] = reading.index
        box = list(in_file(reading.box, picture))
        characters.append(named | {"index": reading.index, "probabilities": reading.probabilities.tolist(), "box": box})
    whole = {"class": None, "index": None} if not characters else {}
    if len(characters) == 1:
        whole = {key: value for key, value in characters[0].items() if key != "box"}
    return whole | {"characters": characters}


def in_file(box: Box, picture: Picture) -> Box:
    """Return a box in the pixels that the picture has in its file."""
    height, width = picture.colours.shape[:2]
    across, down = picture.size[0] / width, picture.size[1] / height
    left, top, right, bottom = box
    return round(left * across), round(top * down), round(right * across), round(bottom * down)


def describe_probabilities(probabilities: np.ndarray, names: Sequence[str]) -> str:
    """Return the most probable classes with their probabilities, of which none is shown as certain."""
    most_probable = probabilities.argsort()[::-1][:SHOWN_CLASSES]
    return ", ".join(f"{names[i]} with {describe_probability(float(probabilities[i]))}" for i in most_probable)


def describe_probability(probability: float) -> str:
    """Return a probability in per cent, never as 100 % or 0 %."""
    return ">99.9%" if probability > 0.999 else "<0.1%" if probability < 0.001 else f"{probability:.1%}"


def _show(display: Display, readings: Sequence[Reading]) -> None:
    """Draw what the network got: one image as it is, several side by side at half their size."""
    images = [reading.image.mean(axis=-1) for reading in readings]
    if len(images) == 1:
        display.picture(images[0])
        return
    for start in range(0, len(images), SHOWN_PER_ROW):
        display.picture(np.hstack([_halved(image) for image in images[start : start + SHOWN_PER_ROW]]))


def _halved(image: np.ndarray) -> np.ndarray:
    """Return an image, (H, W), at half its size: of each four pixels the one with the most ink, as strokes are thin."""
    even = image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2]
    return even.reshape(len(even) // 2, 2, -1, 2).max(axis=(1, 3))


def _sound_pictures(paths: Sequence[str], failures: list[InputFileError]) -> Iterator[tuple[str, Picture]]:
    """Read the pictures in files and in folders' files; keep the failures of those that cannot be read."""
    for path in paths:
        try:
            files = find_images(path)
        except InputFileError as error:
            failures.append(error)
            continue
        for file in files:
            try:
                yield file, read_picture(file)
            except InputFileError as error:
                failures.append(error)
