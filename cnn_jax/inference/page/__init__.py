"""A page that reads pictures in a browser, without a server: one file, which `export --to html` writes.

page.html      the document, into which everything below is written
page.js        what happens on it: drawing, choosing a picture, showing the answer
preprocess.js  makes a picture an image for the network, as preprocess.py does
characters.js  finds the characters in a picture, as characters.py does
network.js     computes what the network makes of it
page.css       how it looks, beside style.css
board.html     the board to draw on, which the page of `demo` has, too
board.js       what happens on the board
style.css      how the board and the answer look on both pages
"""

import base64
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from cnn_jax.inference import characters, preprocess
from cnn_jax.inference.preprocess import check_takes_pictures
from cnn_jax.inference.pretrained import (
    DETECTOR,
    DIGITS,
    LEAST_BESIDE_DIGITS,
    LEAST_OF_LINE,
    LEAST_OF_SEVERAL,
    LEAST_PROBABILITY,
    SHARE,
    TrainedModel,
    read_trained,
)
from cnn_jax.runtime.streams import printable

BOARD = 140  # pixels per side of a drawing
PEN = 11  # pixels wide; three in the digit that the network gets
CERTAIN = 0.9  # less probable answers are marked
FOLDER = Path(__file__).parent
EMBEDDED = re.compile(r'<script type="application/json" id="embedded">(.*?)</script>', re.DOTALL)


def write_page(trained: TrainedModel, file: Path) -> None:
    """Write the page of a network.

    Raises:
      OSError: it could not be written.
      UsageError: the network takes images of as many channels as no picture has.
    """
    check_takes_pictures(trained.image_shape, trained.name)
    templates = templates_in(FOLDER)
    sources = {file.name: file.read_text(encoding="utf-8") for file in (*FOLDER.glob("*.js"), *FOLDER.glob("*.css"))}
    page = templates.get_template("page.html").render(
        embedded=_embed(trained),
        sources=sources,
        name=trained.name,
        accuracy=trained.test_accuracy,
        subject=subject_of(trained),
        board=BOARD,
        pen=PEN,
    )
    file.write_text(page, encoding="utf-8")


def subject_of(trained: TrainedModel) -> str:
    """Return what a network reads, in a word."""
    return "digit" if trained.reads_digits else "character" if trained.preparation == "character" else "picture"


def templates_in(*folders: Path) -> jinja2.Environment:
    """Return the templates in folders, for pages in which every value is text."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else printable(str(value)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def data_uri(png: bytes) -> str:
    """Return a PNG file as the address of a picture that stands in the page itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def read_page(file: Path, trained: TrainedModel) -> TrainedModel:
    """Return a network with the weights that its page has."""
    (embedded,) = EMBEDDED.findall(file.read_text(encoding="utf-8"))
    params = {
        layer: {kind: _from_base64(text).reshape(trained.params[layer][kind].shape) for kind, text in weights.items()}
        for layer, weights in json.loads(embedded)["network"]["params"].items()
    }
    return dataclasses.replace(trained, params=params)


def _embed(trained: TrainedModel) -> dict[str, Any]:
    """Return what the page's scripts take from Python, for JSON."""
    detector = None
    if trained.reads_digits:
        detector = _embed_network(read_trained(DETECTOR)) | {
            "asked": trained.asks_detector,
            "digits": len(DIGITS),
            "least": LEAST_PROBABILITY,
            "least_beside_digits": LEAST_BESIDE_DIGITS,
            "least_of_several": LEAST_OF_SEVERAL,
            "least_of_line": LEAST_OF_LINE,
            "share": SHARE,
        }
    return {
        "constants": {
            name: np.asarray(value).tolist()
            for module in (preprocess, characters)
            for name, value in vars(module).items()
            if name.isupper()
        },
        "network": _embed_network(trained),
        "detector": detector,
        "certain": CERTAIN,
        "preparation": trained.preparation,
        "background": trained.background,
        "class_names": [printable(name) for name in trained.class_names],
    }


def _embed_network(trained: TrainedModel) -> dict[str, Any]:
    params = {
        layer: {kind: _to_base64(array) for kind, array in weights.items()} for layer, weights in trained.params.items()
    }
    return {"image_shape": trained.image_shape, "temperature": trained.temperature, "params": params}


def _to_base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def _from_base64(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")
