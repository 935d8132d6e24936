"""A page to draw on that shows the network's answer while you draw; only this file uses Gradio.

The board is our own canvas. Gradio's editors send a drawing only at the end of a stroke, and as a file; this one
sends its pixels at every move, always the same number of them, so that nothing has to be decoded or kept.
"""

import functools
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from cnn_jax.core.model import ConvBlock
from cnn_jax.data.dataset import scale_pixels
from cnn_jax.inference.demo.guard import read_drawing, serve_guarded
from cnn_jax.inference.logits import saliency
from cnn_jax.inference.page import BOARD, CERTAIN, PEN, data_uri, subject_of, templates_in
from cnn_jax.inference.page import FOLDER as PAGE
from cnn_jax.inference.pictures import draw_saliency, encode_png
from cnn_jax.inference.predict import as_text, describe_probability
from cnn_jax.inference.preprocess import SIZE, check_takes_pictures
from cnn_jax.inference.pretrained import Reading, TrainedModel, load_trained
from cnn_jax.runs.settings import Platform
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import UsageError
from cnn_jax.runtime.signals import listen_for_stop

# Gradio reads these when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = f"{tempfile.gettempdir()}/cnn-jax-demo-{secrets.token_hex(8)}"

import fastapi
import gradio as gr

MAPS_PER_ROW, GAP_GREY = 16, 64

FOLDER = Path(__file__).parent
TEMPLATES = templates_in(FOLDER, PAGE)


def serve(
    run: Path | None = None,
    *,
    host: str,
    port: int,
    data_dir: Path | None = None,
    platform: Platform | None = None,
) -> None:
    """Serve the page until the process is ended.

    Raises:
      UsageError: the network takes images of another size, or the address is in use or not this machine's.
      NoCheckpointError: there is no such run.
    """
    try:
        host.encode("idna")  # where this fails, `create_server` would too, and leave a socket open
        listener = socket.create_server((host, port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--host {host} --port {port}: nothing can listen there ({reason}); choose another --port or --host"
        ) from error
    with listener:
        start_devices(platform)
        display = Display()
        trained = load_trained(run, data_dir, display.say)
        check_takes_pictures(trained.image_shape, str(run and run.name), drawn=True)
        page = gr.mount_gradio_app(
            fastapi.FastAPI(),
            build_page(trained),
            path="/",
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            css=(PAGE / "style.css").read_text(encoding="utf-8"),
        )
        shutil.rmtree(os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)  # Gradio makes it, and this page has no files
        with listen_for_stop(at_once="stopped by a second SIGINT") as request, serve_guarded(page, listener, host):
            display.say(f"draw a {subject_of(trained)} on http://{host}:{port}; Ctrl-C ends the page")
            while request.signal_number is None:
                time.sleep(0.1)
    display.say("the page is closed")


def build_page(trained: TrainedModel) -> gr.Blocks:
    """Return the page of a network for 28x28 images, ready to be served."""

    def answer(drawing: str) -> str:
        return render_answer(trained, read_drawing(drawing))

    heading = TEMPLATES.get_template("heading.html").render(
        subject=subject_of(trained), name=trained.name, accuracy=trained.test_accuracy
    )
    parts = [TEMPLATES.get_template(name) for name in ("board.html", "open.html")]
    board_html = "\n".join(part.render(board=BOARD, pen=PEN) for part in parts)
    board_js = "".join(file.read_text(encoding="utf-8") for file in (PAGE / "board.js", FOLDER / "open.js"))
    blank = render_answer(trained, np.zeros((BOARD, BOARD), np.uint8))  # this also compiles the network
    with gr.Blocks(title="cnn-jax", analytics_enabled=False) as page:
        gr.HTML(heading)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                board = gr.HTML(html_template=board_html, js_on_load=board_js, elem_id="board")
            with gr.Column(scale=3):
                answered = gr.HTML(blank)
        board.draw(
            answer,
            board,
            answered,
            # While an answer is awaited, Gradio holds back new drawings, and then sends only the latest.
            trigger_mode="always_last",
            queue=False,  # the queue keeps answers until they are read
            show_progress="hidden",
            api_visibility="private",
        )
    return page


def render_answer(trained: TrainedModel, ink: np.ndarray) -> str:
    """Return the network's answer to a drawing, (BOARD, BOARD), uint8, 0 for no ink, as HTML."""
    # A margin of paper, so that ink at the board's edge counts as part of the digit and not of a frame. The paper of a
    # picture may be grey, or dark.
    paper = 255 - np.pad(ink, BOARD // 10, constant_values=np.uint8(np.median(ink))).astype(np.float32)
    colours = np.repeat(paper[..., np.newaxis], 3, axis=-1)
    # What holds no digit is shown as the network sees all of it.
    lines = (trained.read(colours) or trained.read(colours, one=True)) if ink.any() else []
    readings = [reading for line in lines for reading in line]
    blank = Reading((0, 0, 0, 0), np.zeros((SIZE, SIZE, 1), np.uint8), np.zeros(len(trained.class_names)), None)
    shown = readings or [blank]
    images = np.stack([each.image for each in shown])
    classes = np.array([each.probabilities.argmax() for each in shown])
    maps = saliency(trained.model, trained.variables, images, classes)
    return TEMPLATES.get_template("answer.html").render(
        side=SIZE,
        text=as_text(readings, trained.class_names) if readings else "nothing yet",
        characters=[
            {"picture": data_uri(encode_png(each.image[..., 0])), "name": as_text([each], trained.class_names),
             "saliency": data_uri(encode_png(draw_saliency(each.image, map_))) if each.index is not None else "",
             "probability": describe_probability(float(each.probabilities.max())),
             "certain": each is blank or is_certain(each)}
            for each, map_ in zip(shown, maps, strict=True)
        ],
        prediction=shown[0].index,
        probabilities=[(each, describe_probability(each)) for each in shown[0].probabilities.tolist()],
        class_names=trained.class_names,
        layers=[
            {"height": layer.shape[0], "width": layer.shape[1], "features": layer.shape[2],
             "picture": data_uri(encode_png(_sheet(layer)))}
            for layer in run_network(trained, images[0])
        ],
    )  # fmt: skip


def is_certain(reading: Reading) -> bool:
    """Whether an answer is shown without a doubt."""
    return reading.index is not None and reading.probabilities.max() >= CERTAIN


def run_network(trained: TrainedModel, image: np.ndarray) -> list[np.ndarray]:
    """Return the blocks' outputs, (height, width, features); a network of the user's may have none.

    Args:
      trained: The network.
      image: (28, 28, 1), uint8.
    """
    blocks = jax.device_get(_blocks(trained.variables, image[np.newaxis], model=trained.model))
    return [block["__call__"][0][0] for block in blocks.values() if "__call__" in block]


@functools.partial(jax.jit, static_argnames="model")
def _blocks(variables: dict, images: jax.Array, *, model: nn.Module) -> Mapping[str, Any]:
    def is_block(module: nn.Module, method: str) -> bool:
        return isinstance(module, ConvBlock)

    _, kept = model.apply(variables, scale_pixels(images), capture_intermediates=is_block)
    return dict(kept).get("intermediates", {})


def _sheet(maps: np.ndarray) -> np.ndarray:
    """Lay out feature maps, (height, width, features), side by side in grey, the largest value white: (H, W), uint8."""
    height, width, features = maps.shape
    grey = (255 * maps / max(maps.max(), 1e-6)).astype(np.uint8)
    grey = np.pad(grey, ((0, 1), (0, 1), (0, -features % MAPS_PER_ROW)), constant_values=GAP_GREY)
    rows = grey.reshape(height + 1, width + 1, -1, MAPS_PER_ROW).transpose(2, 0, 3, 1)
    return rows.reshape(-1, MAPS_PER_ROW * (width + 1))[:-1, :-1]
