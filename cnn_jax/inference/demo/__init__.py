"""A page to draw digits on, with what the network makes of them while they are drawn; the only file that knows Gradio.

The board is a canvas of its own. Gradio's editors send a drawing only when a stroke has ended, and as files; this one
sends its pixels at every move, always as many of them, so that nothing has to be decoded or kept.
"""

import base64
import functools
import html
import os
import socket
import time
from pathlib import Path

import jax
import numpy as np
import scipy.special
from flax import linen as nn

from cnn_jax.core.model import ConvBlock
from cnn_jax.data.dataset import scale_pixels
from cnn_jax.inference.pictures import encode_png
from cnn_jax.inference.preprocess import SIZE, check_takes_digits, prepare_digit
from cnn_jax.inference.pretrained import TrainedModel, load_trained
from cnn_jax.runs.settings import Platform
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import UsageError
from cnn_jax.runtime.signals import listen_for_stop

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

BOARD = 140  # pixels a side
PEN = 11  # pixels wide; in the digit that the network gets, three
MAXIMUM_REQUEST = 2**20  # bytes; a drawing has 26 kB
MAPS_A_ROW, BETWEEN_MAPS = 16, 64

BOARD_HTML = f"""
<canvas width="{BOARD}" height="{BOARD}" aria-label="board to draw a digit on"></canvas>
<button type="button">Clear</button>
"""
BOARD_CSS = """
canvas { width: 280px; height: 280px; border: 1px solid #888; background: white; touch-action: none;
  cursor: crosshair; display: block; }
button { margin-top: 8px; padding: 4px 16px; border: 1px solid #888; border-radius: 4px; }
"""
# Gradio holds back what is drawn while an answer is awaited and then sends the newest: "always_last" below.
BOARD_JS = f"""
const board = element.querySelector("canvas");
const pen = board.getContext("2d", {{willReadFrequently: true}});
pen.lineWidth = {PEN};
pen.lineCap = "round";
let last = null;

const send = () => {{
  const colours = pen.getImageData(0, 0, board.width, board.height).data;
  let ink = "";
  for (let i = 3; i < colours.length; i += 4) ink += String.fromCharCode(colours[i]);
  props.value = btoa(ink);
  trigger("draw");
}};
const drawTo = event => {{
  const place = [event.offsetX * board.width / board.clientWidth, event.offsetY * board.height / board.clientHeight];
  pen.beginPath();
  pen.moveTo(...(last ?? place));
  pen.lineTo(...place);
  pen.stroke();
  last = place;
  send();
}};
board.addEventListener("pointerdown", event => {{
  board.setPointerCapture(event.pointerId);
  last = null;
  drawTo(event);
}});
board.addEventListener("pointermove", event => {{ if (event.buttons) drawTo(event); }});
element.querySelector("button").addEventListener("click", () => {{
  pen.clearRect(0, 0, board.width, board.height);
  send();
}});
"""
ANSWER_CSS = """
.answer img { image-rendering: pixelated; background: black; }
.answer h3 { margin: 12px 0 4px; font-weight: 600; }
.answer .top { display: flex; gap: 32px; flex-wrap: wrap; }
.answer .maps { width: 100%; }
.answer .class { display: flex; gap: 8px; align-items: center; height: 19px; font-variant-numeric: tabular-nums; }
.answer .class b { width: 16px; font-weight: inherit; }
.answer .class span { width: 56px; text-align: right; }
.answer meter { width: 220px; height: 16px; }
.answer .most { font-weight: 700; }
"""


def demo(
    run: Path | None = None,
    *,
    host: str,
    port: int,
    data_dir: Path | None = None,
    platform: Platform | None = None,
) -> None:
    """Serve the page until the process is ended.

    Raises:
      UsageError: the network is not for such images, or the address is taken or not of this machine.
      NoCheckpointError: there is no such run.
    """
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UsageError(
            f"--host {host} --port {port}: nothing can listen there ({error.strerror}); choose another --port or --host"
        ) from error
    start_devices(platform)
    display = Display()
    network = load_trained(run, data_dir, display.say)
    check_takes_digits(network.image_shape, str(run and run.name))
    # Gradio asks its own server whether it is there, and would ask a proxy for it. It asks nobody else.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"
    page = build_page(network)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        css=ANSWER_CSS,
        app_kwargs={
            "middleware": [Middleware(LimitRequests)],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
        },
    )
    display.say(f"draw a digit on http://{host}:{port}; Ctrl-C ends the page")
    with listen_for_stop() as request:
        while request.signal_number is None:
            time.sleep(0.1)
    page.close(verbose=False)
    display.say("the page is closed")


def build_page(network: TrainedModel) -> gr.Blocks:
    """Return the page of a network of 28x28 images, ready to be served."""

    def answer(drawing: object) -> str:
        return describe(network, read_drawing(drawing))

    blank = describe(network, np.zeros((BOARD, BOARD), np.uint8))  # compiles the network, too
    accuracy = "" if network.test_accuracy is None else f" reads {network.test_accuracy:.2%} of its test images right"
    with gr.Blocks(title="cnn-jax", analytics_enabled=False) as page:
        gr.HTML(f"<h2>Draw a digit</h2><p>The network {html.escape(network.name)}{accuracy}</p>")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                board = gr.HTML(html_template=BOARD_HTML, css_template=BOARD_CSS, js_on_load=BOARD_JS, elem_id="board")
            with gr.Column(scale=3):
                answered = gr.HTML(blank)
        board.draw(
            answer,
            board,
            answered,
            trigger_mode="always_last",
            concurrency_limit=1,
            show_progress="hidden",
            api_visibility="private",
        )
    return page


def read_drawing(drawing: object) -> np.ndarray:
    """Return the ink on the board, (BOARD, BOARD) uint8, 0 for none.

    Args:
      drawing: What a browser sent; the board's own sends the bytes in base64.

    Raises:
      gr.Error: it is anything else, told in the browser without a traceback.
    """
    try:
        ink = base64.b64decode(drawing, validate=True)
    except (TypeError, ValueError):
        ink = b""
    if len(ink) != BOARD**2:
        raise gr.Error(f"a drawing is {BOARD}x{BOARD} bytes in base64; load the page again", print_exception=False)
    return np.frombuffer(ink, np.uint8).reshape(BOARD, BOARD)


def describe(network: TrainedModel, ink: np.ndarray) -> str:
    """Return, as HTML, what a network makes of a drawing, (BOARD, BOARD) uint8, 0 for no ink."""
    # With paper around it, ink at the board's edge is part of the digit and not of a frame.
    paper = 255 - np.pad(ink, BOARD // 10).astype(np.float32)
    seen = prepare_digit(np.repeat(paper[..., np.newaxis], 3, axis=-1)) if ink.any() else None
    digit = np.zeros((SIZE, SIZE, 1), np.uint8) if seen is None else seen
    probabilities, maps = look(network, digit)
    most = None if seen is None else int(probabilities.argmax())
    classes = "".join(
        f'<div class="class {"most" if place == most else ""}"><b>{place}</b><meter value="{value:.4f}"></meter>'
        f"<span>{value:.1%}</span></div>"
        for place, value in enumerate(probabilities if most is not None else np.zeros_like(probabilities))
    )
    layers = "".join(
        f"<h3>Layer {number}: {each.shape[-1]} maps of {each.shape[0]}x{each.shape[1]}</h3>"
        f'<img class="maps" alt="feature maps of layer {number}" src="{_picture(_grid(each))}">'
        for number, each in enumerate(maps, start=1)
    )
    return (
        f'<div class="answer"><div class="top"><div><h3>The network sees</h3>'
        f'<img width="{SIZE * 7}" alt="what the network sees" src="{_picture(digit[..., 0])}"></div>'
        f"<div><h3>It reads <output>{'nothing yet' if most is None else most}</output></h3>{classes}</div>"
        f"</div>{layers}</div>"
    )


def look(network: TrainedModel, digit: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return what a network computes from a digit, (28, 28, 1) uint8.

    Returns:
      The probability of each class, (num_classes,); what each of the two blocks gives, (height, width, features).
    """
    logits, blocks = jax.device_get(_apply(network.params, digit[np.newaxis], model=network.model))
    maps = [blocks[name]["__call__"][0][0] for name in ("layer1", "layer2")]
    return scipy.special.softmax(logits[0].astype(np.float64)), maps


@functools.partial(jax.jit, static_argnames="model")
def _apply(params, images, *, model):
    def is_block(module: nn.Module, method: str) -> bool:
        return isinstance(module, ConvBlock)

    logits, kept = model.apply({"params": params}, scale_pixels(images), capture_intermediates=is_block)
    return logits, kept["intermediates"]


def _grid(maps):
    """Lay maps (height, width, features) out side by side, the largest value white: (rows, columns) uint8."""
    height, width, features = maps.shape
    grey = (255 * maps / max(maps.max(), 1e-6)).astype(np.uint8)
    grey = np.pad(grey, ((0, 1), (0, 1), (0, -features % MAPS_A_ROW)), constant_values=BETWEEN_MAPS)
    rows = grey.reshape(height + 1, width + 1, -1, MAPS_A_ROW).transpose(2, 0, 3, 1)
    return rows.reshape(-1, MAPS_A_ROW * (width + 1))[:-1, :-1]


def _picture(pixels):
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()


class LimitRequests:
    """Refuses requests larger than `MAXIMUM_REQUEST`, and those that do not tell their size, before they are read."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with 413 or 411, or hand it on."""
        handle = self._app
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            if int(headers.get(b"content-length", 0)) > MAXIMUM_REQUEST:
                handle = PlainTextResponse(f"more than {MAXIMUM_REQUEST:,} bytes", status_code=413)
            elif b"transfer-encoding" in headers:
                handle = PlainTextResponse("the length is missing", status_code=411)
        await handle(scope, receive, send)
