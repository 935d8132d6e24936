"""The page answers while you draw, listens on this machine only, and accepts nothing but its own drawings."""

import base64
import contextlib
import dataclasses
import functools
import http.client
import http.server
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

pytest.importorskip("gradio", reason="needs the extra demo")


from cnn_jax.data.dataset import scale_pixels
from cnn_jax.inference import demo
from cnn_jax.inference.demo import guard
from cnn_jax.inference.logits import saliency
from cnn_jax.inference.pictures import draw_saliency, encode_png
from tests.helpers import ROOT, start_browser, touch


def free_port():
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """The port of a page that another process serves, with proxies set at which nothing answers.

    Whatever the tests do to it, it leaves no file and says nothing on the terminal.
    """
    number = free_port()
    files = tmp_path_factory.mktemp("files")
    process = subprocess.Popen(
        [sys.executable, "-m", "cnn_jax", "demo", "--port", str(number)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {name: f"http://127.0.0.1:{free_port()}" for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")}
        | {"TMPDIR": str(files), "GRADIO_TEMP_DIR": str(files / "gradio")},
    )
    try:
        line = process.stderr.readline()
        assert line == f"draw a digit on http://127.0.0.1:{number}; Ctrl-C ends the page\n"
        yield number
    finally:
        process.terminate()
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (0, "", "the page is closed\n")
    assert list(files.iterdir()) == []


def request(port, method, path, body=None, headers=None):
    """Return the status and the text that the page's server answers with."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode()


def send_drawing(port, drawing, headers=None, **fields):
    """Send a drawing as the page does, and return the status and what its server answers."""
    call = {"data": [drawing], "fn_index": 0, "session_hash": "abc", "event_data": {}, "trigger_id": 4} | fields
    return request(port, "POST", guard.ANSWER, json.dumps(call), {"content-type": "application/json"} | (headers or {}))


def ink_of_a_one():
    """Return a drawing of a 1."""
    ink = np.zeros((demo.BOARD, demo.BOARD), np.uint8)
    ink[20:120, 65:76] = 255
    return ink


def in_base64(ink):
    """Return a drawing as the board sends it."""
    return base64.b64encode(ink.tobytes()).decode()


def test_a_drawing_that_is_sent_is_answered(port):
    status, answer = send_drawing(port, in_base64(ink_of_a_one()))
    assert status == 200
    assert "It reads <output>1</output>" in json.loads(answer)["data"][0]


@pytest.mark.parametrize(
    "drawing",
    [
        None,
        17,
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        "",
        "no base64",
        "\ud800",
        base64.b64encode(b"\x89PNG\r\n").decode(),
        in_base64(np.zeros((demo.BOARD + 1, demo.BOARD), np.uint8)),
        in_base64(np.zeros((demo.BOARD * 2, demo.BOARD), np.uint8)),
    ],
)
def test_anything_but_a_drawing_of_the_boards_size_is_refused_without_a_traceback(drawing, port):
    status, answer = send_drawing(port, drawing)
    assert status == 422
    assert answer.endswith("load the page again")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe{",
        b"[" * 60_000,
        b"9" * 60_000,
        b'{"data": [], "fn_index": 0}',
        b'{"data": ["a", "a"], "fn_index": 0}',
        b'{"data": ["a"], "fn_index": 99}',
        b'{"data": ["a"], "fn_index": "\\ud800"}',
        b'{"data": ["a"]}',
    ],
)
def test_a_body_that_is_no_call_for_an_answer_is_refused(body, port):
    assert request(port, "POST", guard.ANSWER, body) == (422, "this is no drawing; load the page again")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "\xff"])
def test_the_type_that_a_body_is_said_to_have_changes_nothing(kind, port):
    assert send_drawing(port, in_base64(ink_of_a_one()), {"content-type": kind})[0] == 200
    assert request(port, "POST", guard.ANSWER, b"a=b", {"content-type": kind})[0] == 422


@pytest.mark.parametrize("sent", [0, 1, 1000])
def test_a_body_that_ends_too_early_is_dropped_and_the_page_goes_on(sent, port):
    body = json.dumps({"data": [in_base64(ink_of_a_one())], "fn_index": 0})
    head = f"POST {guard.ANSWER} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall((head + body[:sent]).encode())
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""  # no answer, and no wait for the time to be over
    test_a_drawing_that_is_sent_is_answered(port)


@pytest.mark.slow(seconds=15)
def test_a_body_that_comes_byte_by_byte_is_ended_in_time_and_others_are_answered_meanwhile(port):
    beginning = f"POST {guard.ANSWER} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-length: 30000\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)) for _ in range(20)]
        for each in slow:
            each.sendall(beginning)
        start = time.monotonic()
        while slow and time.monotonic() < start + 3 * guard.SECONDS:
            for each in tuple(slow):
                try:
                    each.sendall(b"a")
                except ConnectionError:
                    slow.remove(each)
            test_a_drawing_that_is_sent_is_answered(port)
            time.sleep(0.2)
        assert not slow


def test_bodies_that_are_too_large_or_do_not_say_how_large_they_are_are_refused_unread(port):
    assert send_drawing(port, "a" * guard.MAXIMUM_BODY) == (413, "more than 65,536 bytes")
    # Only the size is sent, and none of the bytes.
    assert request(port, "POST", guard.ANSWER, headers={"content-length": str(2**40)})[0] == 413
    for headers in ({}, {"content-length": "2"}):
        chunks = (chunk for chunk in [b"2\r\n{}\r\n0\r\n\r\n"])
        assert request(port, "POST", guard.ANSWER, chunks, {"transfer-encoding": "chunked"} | headers)[0] == 411


def test_headers_that_are_too_large_are_refused(port):
    with contextlib.suppress(ConnectionError):  # it does not wait until all of them are sent
        assert request(port, "GET", "/", headers={"cookie": "a" * 2**20})[0] == 400


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/queue/join"),
        ("GET", "/gradio_api/queue/data?session_hash=abc"),
        ("GET", "/gradio_api/heartbeat/abc"),
        ("POST", "/gradio_api/run/answer"),
        ("POST", "/gradio_api/component_server"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/config"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/monitoring"),
        ("GET", "/assets/"),
        ("GET", "/assets/" + 5000 * "b"),
        ("GET", "/static/../../routes.py"),
        ("GET", "/static/%2e%2e/%2e%2e/routes.py"),
        ("GET", "//etc/passwd"),
        ("GET", guard.ANSWER),
        ("HEAD", "/none"),
        ("POST", "/"),
        ("PUT", "/theme.css"),
        ("DELETE", guard.ANSWER),
        ("OPTIONS", guard.ANSWER),
    ],
)
def test_what_the_page_does_not_need_is_not_there(method, path, port):
    text = "" if method == "HEAD" else "the page has no such request"
    assert request(port, method, path) == (404, text)


def test_the_page_is_there_for_who_asks_only_for_its_head(port):
    assert request(port, "HEAD", "/") == (200, "")


def test_queries_and_headers_do_not_reach_gradio(port):
    headers = {"x-forwarded-host": "[", "x-forwarded-proto": "https", "range": "bytes=-", "cookie": "a=b"}
    status, html = request(port, "GET", "/?page=none&deep_link=../abc", headers=headers)
    assert status == 200
    assert f"http://127.0.0.1:{port}" in html


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "0.0.0.0:{port}", "localhost.:{port}", ""],
)
def test_a_request_for_another_host_is_refused(host, port):
    status, _ = request(port, "GET", "/", headers={"host": host.format(port=port)})
    assert status == 421


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1", "http://localhost:{port}", "https://127.0.0.1:{port}"]
)
def test_another_sites_request_is_refused(origin, port):
    drawing = in_base64(ink_of_a_one())
    assert send_drawing(port, drawing, {"origin": origin.format(port=port)})[0] == 403
    assert send_drawing(port, drawing, {"origin": f"http://127.0.0.1:{port}"})[0] == 200


def test_no_site_may_frame_the_page_or_hold_its_window(port):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", "/")
        response = connection.getresponse()
    assert response.getheader("x-frame-options") == "DENY"
    assert response.getheader("cross-origin-opener-policy") == "same-origin"
    assert response.getheader("cross-origin-resource-policy") == "same-origin"


@pytest.mark.parametrize(
    ("host", "address", "own", "foreign"),
    [
        ("127.0.0.1", "127.0.0.1", ["127.0.0.1:80", "127.0.0.1", "LocalHost:80"], ["10.0.0.1:80", "{name}:80"]),
        ("lab.example", "10.0.0.1", ["lab.example:80", "10.0.0.1:80"], ["localhost:80", "labXexample:80"]),
        (
            "0.0.0.0",
            "0.0.0.0",
            ["10.0.0.1:80", "localhost:80", "{name}:80", "{name}.local:80"],
            ["evil.example:80", "10.0.0.1.evil.example:80", "10.0.0.1:81", "{name}.evil.example:80"],
        ),
    ],
)
def test_the_hosts_option_decides_by_which_names_the_page_is_reached(host, address, own, foreign):
    pattern = guard.host_pattern(host, address, 80)
    assert [each for each in own + foreign if pattern.fullmatch(each.format(name=socket.gethostname()))] == own
    assert not guard.host_pattern(host, address, 8000).fullmatch(own[0].removesuffix(":80"))


async def answer_at_length(scope, receive, send):
    """An ASGI app that answers everything with 64 MiB."""
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"67108864")]})
        for rest in reversed(range(64)):
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": rest > 0})


@pytest.fixture
def large_page():
    """The port of a guarded server that answers everything with 64 MiB."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, guard.serve_guarded(answer_at_length, listener, "127.0.0.1"):
        yield listener.getsockname()[1]


def connect(port, text=""):
    """Open a connection and send the beginning of a request."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(text.format(port=port).encode())
    return connection


def read_to_the_end(connection):
    """Return how many bytes come until the server ends the connection."""
    size = 0
    with contextlib.suppress(ConnectionResetError):
        while read := len(connection.recv(2**20)):
            size += read
    return size


HEAD = "GET / HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
BODY = f"POST {guard.ANSWER} HTTP/1.1\r\nhost: 127.0.0.1:{{port}}\r\ncontent-length: 9\r\n\r\n1"


@pytest.mark.parametrize("beginning", ["", "G", HEAD, BODY])
def test_a_request_that_is_never_finished_is_ended(beginning, large_page, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 0.3)
    with connect(large_page, beginning) as connection:
        assert read_to_the_end(connection) == 0


def test_a_request_that_comes_byte_by_byte_is_ended(large_page, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 0.3)
    start = time.monotonic()
    with connect(large_page, HEAD) as connection, contextlib.suppress(ConnectionError):
        while time.monotonic() < start + 10:
            connection.sendall(b"a")
            time.sleep(0.1)
    assert time.monotonic() < start + 5


def test_an_answer_that_is_not_read_is_ended(large_page, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 0.3)
    with connect(large_page, HEAD + "\r\n") as connection:
        time.sleep(1)
        assert read_to_the_end(connection) < 2**26


def test_a_second_request_that_is_never_finished_is_ended(large_page, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 1)
    with connect(large_page, HEAD.replace("GET / ", "GET /none ") + "\r\n") as connection:
        answer = b""
        while not answer.endswith(b"no such request"):
            part = connection.recv(2**10)
            assert part, "it was ended before it was answered"
            answer += part
        connection.sendall(b"G")
        connection.settimeout(10)
        assert read_to_the_end(connection) == 0


def test_a_connection_lasts_longer_than_a_request_may(large_page, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 2)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", large_page, timeout=30)) as connection:
        connection.connect()
        connection.auto_open = 0
        for _ in range(4):
            time.sleep(0.7)
            connection.request("GET", "/none")
            assert connection.getresponse().read() == b"the page has no such request"


@pytest.mark.parametrize("limit", ["CONNECTIONS", "CONNECTIONS_PER_CLIENT"])
def test_newer_connections_take_the_place_of_those_that_wait_longest(limit, large_page, monkeypatch):
    monkeypatch.setattr(guard, limit, 4)
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connect(large_page)) for _ in range(12)]
        assert [read_to_the_end(each) for each in waiting[:8]] == [0] * 8
        waiting[8].sendall(HEAD.format(port=large_page).encode() + b"\r\n")
        assert waiting[8].recv(12) == b"HTTP/1.1 200"


def test_the_page_answers_among_many_idle_connections(port):
    with contextlib.ExitStack() as stack:
        for beginning in ("", HEAD, BODY) * 100:
            stack.enter_context(connect(port, beginning))
        test_a_drawing_that_is_sent_is_answered(port)


@pytest.mark.slow(seconds=8)
def test_connections_beyond_the_limit_of_open_files_wait_and_are_not_told_of():
    number = free_port()
    demo_command = f"ulimit -n 64; exec {sys.executable} -m cnn_jax demo --port {number}"
    with (
        subprocess.Popen(["bash", "-c", demo_command], stderr=subprocess.PIPE, text=True, cwd=ROOT) as process,
        contextlib.ExitStack() as stack,
    ):
        process.stderr.readline()
        for _ in range(100):
            stack.enter_context(connect(number, ""))
        time.sleep(2)
        process.terminate()
        assert (process.communicate()[1], process.returncode) == ("the page is closed\n", 0)


def test_the_page_closes_in_time_while_requests_are_open():
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        with guard.serve_guarded(answer_at_length, listener, "127.0.0.1"):
            for beginning in ("", HEAD, BODY, HEAD + "\r\n"):
                connection = stack.enter_context(connect(listener.getsockname()[1], beginning))
            assert connection.recv(4) == b"HTTP"  # the answer has begun
            start = time.monotonic()
        assert time.monotonic() - start < 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")
def test_only_the_address_that_was_asked_for_is_listened_on(port):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_an_address_that_is_taken_or_of_another_machine_is_refused_in_one_line(command):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = ("--host", "127.0.0.1", "--port", listener.getsockname()[1])
        for address in (
            taken,
            ("--host", "203.0.113.9", "--port", free_port()),
            ("--host", "no address", "--port", 7860),
            ("--host", 70 * "ä", "--port", 7860),
        ):
            code, out, err = command("demo", *address)
            assert (code, out) == (2, "")
            assert err.startswith(f"error: {' '.join(map(str, address))}: nothing can listen there (")
            assert err.endswith("); choose another --port or --host\n")
            assert err.count("\n") == 1


def test_a_number_that_is_no_port_is_refused(command):
    code, _, err = command("demo", "--port", 65536)
    assert (code, err) == (2, "error: --port 65536: it must be from 1 to 65535\n")


def test_without_gradio_the_extra_is_named(command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = command("demo")
    assert (code, err) == (2, "error: this needs gradio, which is not installed: pip install 'cnn-jax[demo]'\n")


def test_a_run_of_other_images_than_digits_is_refused(command, packaged, monkeypatch):
    other = dataclasses.replace(packaged, image_shape=(32, 32, 3))
    monkeypatch.setattr("cnn_jax.inference.demo.load_trained", lambda *arguments: other)
    code, _, err = command("demo", "cifar10", "--port", free_port())
    assert code == 2
    assert err == "error: cifar10: its network takes images of 32x32x3, not of 28x28x1; name another run\n"


def test_the_maps_are_those_of_the_plain_layers(packaged, real_images):
    digit = real_images[0][0][..., np.newaxis]
    maps = demo.run_network(packaged, digit)
    x = scale_pixels(digit[np.newaxis])
    for layer, each in zip(("layer1", "layer2"), maps, strict=True):
        features = each.shape[-1]
        convolved = nn.Conv(features, (3, 3), precision="highest").apply({"params": packaged.params[layer]}, x)
        x = nn.max_pool(nn.relu(convolved), (2, 2), strides=(2, 2))
        np.testing.assert_allclose(each, x[0], atol=1e-5)
    assert [each.shape for each in maps] == [(14, 14, 32), (7, 7, 64)]


@pytest.mark.parametrize("size", [0, 2])
def test_an_empty_board_and_a_speck_are_no_digit(size, packaged):
    ink = np.zeros((demo.BOARD, demo.BOARD), np.uint8)
    ink[70 : 70 + size, 70 : 70 + size] = 255
    assert "<output>nothing yet</output>" in demo.render_answer(packaged, ink)


def test_strokes_that_touch_the_edge_of_the_board_are_part_of_the_digit(packaged):
    ink = np.zeros((demo.BOARD, demo.BOARD), np.uint8)
    ink[0:11, 40:110] = 255
    ink[14:120, 99:110] = 255  # alone it is a 1
    assert "<output>7</output>" in demo.render_answer(packaged, ink)


def test_several_digits_are_read_as_they_are_drawn_and_what_is_uncertain_is_said(packaged):
    ink = np.zeros((demo.BOARD, demo.BOARD), np.uint8)
    ink[40:100, 20:26] = ink[40:46, 60:100] = ink[40:100, 94:100] = 255
    html = demo.render_answer(packaged, ink)
    assert "<output>1 7</output>" in html
    assert (html.count("<figure"), html.count("<meter")) == (2, 0)
    ink[:] = 0
    ink[30:110, 40:46] = ink[30:36, 40:100] = ink[67:73, 40:90] = ink[104:110, 40:100] = 255
    html = demo.render_answer(packaged, ink)
    assert "<output>?</output>" in html
    assert "not sure" in html


def test_beside_each_answer_is_where_the_network_looked_for_it_and_beside_none_without_one(packaged):
    ink = np.zeros((demo.BOARD, demo.BOARD), np.uint8)
    assert 'class="saliency"' not in demo.render_answer(packaged, ink)
    ink[40:100, 20:26] = ink[40:46, 60:100] = ink[40:100, 94:100] = 255
    html = demo.render_answer(packaged, ink)
    colours = 255.0 - np.pad(ink, demo.BOARD // 10)[..., np.newaxis].repeat(3, axis=-1).astype(np.float32)
    (line,) = packaged.read(colours)
    assert [reading.index for reading in line] == [1, 7]
    assert html.count('class="saliency"') == 2
    for reading in line:
        images, classes = reading.image[np.newaxis], np.array([reading.index])
        (looked,) = saliency(packaged.model, packaged.variables, images, classes)
        assert base64.b64encode(encode_png(draw_saliency(reading.image, looked))).decode() in html


@pytest.mark.parametrize(("paper", "pen"), [(0, 255), (90, 220), (230, 40), (255, 0)])
def test_a_picture_is_read_whether_its_paper_is_white_grey_or_dark(paper, pen, packaged):
    ink = np.full((demo.BOARD, demo.BOARD), paper, np.uint8)
    ink[40:50, 40:100] = ink[45:120, 90:100] = pen
    assert "<output>7</output>" in demo.render_answer(packaged, ink)


def test_a_drawing_comes_back_as_it_was_drawn():
    ink = np.random.default_rng(0).integers(0, 256, (demo.BOARD, demo.BOARD), np.uint8)
    np.testing.assert_array_equal(demo.read_drawing(in_base64(ink)), ink)
    with pytest.raises(ValueError, match="load the page again"):
        demo.read_drawing(in_base64(ink)[4:])


@pytest.fixture
def browser(tmp_path, port):
    """A real browser without a window that has loaded the page and logs its requests."""
    elsewhere = "--host-resolver-rules=MAP evil.example 127.0.0.1"
    driver = start_browser(tmp_path, "--window-size=1200,940", elsewhere, logs=("performance",))
    try:
        driver.get(f"http://127.0.0.1:{port}")
        wait_until(lambda: driver.find_elements("css selector", "#board canvas") and read_answer(driver))
        yield driver
    finally:
        driver.quit()


def wait_until(condition):
    """Wait until a condition holds, at most two minutes."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.1)


def read_elements(driver, selector, value):
    """Return a value, a JavaScript expression of `e`, of each element, all at once: an answer may replace them."""
    return driver.execute_script(f"return [...document.querySelectorAll(arguments[0])].map(e => {value})", selector)


def read_answer(driver):
    """Return what the page says that the drawing is."""
    return "".join(read_elements(driver, ".answer output", "e.innerText"))


def maps(driver):
    """Return the pictures of what the network sees and of both layers."""
    return read_elements(driver, ".answer img:not(.saliency)", "e.src")


def draw(driver, moves, *, start):
    """Press the mouse button at an offset from the board's middle, and move; the button stays down."""
    from selenium.webdriver import ActionChains

    board = driver.find_element("css selector", "#board canvas")
    actions = ActionChains(driver, duration=1).move_to_element_with_offset(board, *start).click_and_hold()
    for move in moves:
        actions.move_by_offset(*move)
    actions.perform()


def ink_on_board(driver):
    """Return what is drawn on the page's board, as `demo.render_answer` takes it."""
    ink = driver.execute_script(
        "const board = document.querySelector('#board canvas');"
        "const colours = board.getContext('2d').getImageData(0, 0, board.width, board.height).data;"
        "return Array.from(colours).filter((_, i) => i % 4 == 3)"
    )
    return np.array(ink, np.uint8).reshape(demo.BOARD, demo.BOARD)


def save_picture(driver, name):
    """Write the page as it is to NAME.png in the folder that DEMO_PICTURES names, if it names one."""
    if folder := os.environ.get("DEMO_PICTURES"):
        driver.save_screenshot(f"{folder}/{name}.png")


def release(driver):
    """Release the mouse button."""
    from selenium.webdriver import ActionChains

    ActionChains(driver).release().perform()


def test_ink_that_is_no_digit_is_told_so_and_shown_as_the_network_sees_it(packaged):
    ink = np.zeros((demo.BOARD, demo.BOARD), np.uint8)
    ink[20:31, 10:130] = 255  # the first stroke of a 7
    blank, bar = (demo.render_answer(packaged, each) for each in (np.zeros_like(ink), ink))
    assert "<output>?</output>" in bar
    seen = [html.partition('src="')[2].partition('"')[0] for html in (blank, bar)]
    assert seen[0] != seen[1]


@pytest.mark.slow
def test_in_a_browser_the_answer_and_the_maps_change_while_a_digit_is_drawn(browser, port, packaged):
    assert read_answer(browser) == "nothing yet"
    blank = maps(browser)
    assert len(blank) == 3
    stroke_of_seven = [(0, 0), *[(10, 0)] * 12]
    draw(browser, stroke_of_seven, start=(-60, -70))
    wait_until(lambda: read_answer(browser) != "nothing yet")
    half = maps(browser)
    draw(browser, [(-5, 13)] * 11, start=(60, -70))  # the button was never let go
    wait_until(lambda: read_answer(browser) == "7")
    whole = maps(browser)
    for before, between, after in zip(blank, half, whole, strict=True):
        assert len({before, between, after}) == 3
    release(browser)
    # However fast it was drawn, the last answer is of the whole drawing.
    expected = demo.render_answer(packaged, ink_on_board(browser))
    wait_until(lambda: all(picture in expected for picture in maps(browser)))
    (looked,) = read_elements(browser, ".answer .saliency", "e.src")
    assert looked in expected
    assert len(browser.find_elements("css selector", ".answer meter")) == 10
    (most,) = read_elements(browser, ".answer .most", "e.innerText")
    assert most.split()[0] == "7"
    save_picture(browser, "demo")

    browser.find_element("css selector", "#board [name=clear]").click()
    wait_until(lambda: read_answer(browser) == "nothing yet")
    draw(browser, [(0, 0), *[(0, 10)] * 16], start=(0, -80))
    release(browser)
    wait_until(lambda: read_answer(browser) == "1")

    page = f"http://127.0.0.1:{port}/"
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = [request["request"]["url"] for request in requests if request["documentURL"].startswith(page)]
    assert any(url.endswith(guard.ANSWER) for url in asked)
    assert [url for url in asked if not url.startswith((page, "data:", "blob:"))] == []


@pytest.mark.slow
def test_on_a_phone_a_finger_draws_a_digit_and_nothing_is_wider_than_the_screen(browser):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    browser.refresh()
    wait_until(lambda: browser.find_elements("css selector", "#board canvas") and read_answer(browser))

    def touched():
        touch(browser, "#board canvas", [(0.4, 0.5), (0.5, 0.5), (0.6, 0.5)])
        return ink_on_board(browser).any()

    def cleared():
        touch(browser, "#board [name=clear]", [(0.5, 0.5)])
        return not ink_on_board(browser).any()

    wait_until(touched)  # the page is there before its script is
    wait_until(cleared)  # on a busy machine a tap may be lost
    seven = [(0.3 + 0.04 * i, 0.2) for i in range(11)] + [(0.7 - 0.02 * i, 0.2 + 0.06 * i) for i in range(11)]
    touch(browser, "#board canvas", seven)
    wait_until(lambda: read_answer(browser) == "7")
    # The finger drew, and did not scroll; a picture of what the network sees stands beside where it looked.
    assert browser.execute_script("return window.scrollY") == 0
    save_picture(browser, "phone")
    sees, looked = read_elements(browser, ".answer figure img", "e.getBoundingClientRect().y")
    assert sees == looked
    for width in (390, 320):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics | {"width": width})
        wait_until(lambda width=width: browser.execute_script("return document.documentElement.clientWidth") == width)
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        ends = read_elements(browser, "body *", "[e.getBoundingClientRect().right, e.outerHTML.slice(0, 300)]")
        assert [(end, html) for end, html in ends if end > width] == []
    # Several digits are no wider, and beside the board a finger scrolls.
    browser.find_element("css selector", "#board [name=clear]").click()
    wait_until(lambda: read_answer(browser) == "nothing yet")
    for x in (0.1, 0.3, 0.5, 0.7, 0.9):
        touch(browser, "#board canvas", [(x, 0.25 + 0.05 * i) for i in range(11)])
    wait_until(lambda: len(browser.find_elements("css selector", ".answer figure")) == 5)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 320
    touch(browser, ".answer .maps", [(0.5, 0.9 - 0.1 * i) for i in range(9)])
    blocked = read_elements(browser, "body, body *", "getComputedStyle(e).touchAction == 'none' ? e.outerHTML : ''")
    assert list(filter(None, blocked)) == read_elements(browser, "#board canvas", "e.outerHTML")


DROP = """const [selector, content, name, type] = arguments, transfer = new DataTransfer();
transfer.items.add(new File([Uint8Array.from(atob(content), byte => byte.charCodeAt())], name, {type}));
for (const kind of ["dragenter", "dragover", "drop"]) {
  const event = new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true});
  const untouched = document.querySelector(selector).dispatchEvent(event);
  if (kind != "dragenter" && untouched) throw new Error("the browser would open the file");
}"""


def drop(driver, content, name="digit.png", kind="image/png"):
    """Drop a file, of which this is the content, on the board."""
    driver.execute_script(DROP, "#board canvas", base64.b64encode(content).decode(), name, kind)


def as_png(picture):
    """Return a picture as a PNG file."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


@pytest.mark.slow
def test_a_picture_is_read_that_is_dropped_on_the_board_or_chosen(browser, tmp_path, plain, real_images):
    browser.get_log("performance")
    drop(browser, as_png(plain.convert("RGB").resize((600, 900))))
    wait_until(lambda: read_answer(browser) == "2")
    browser.find_element("css selector", "#board [name=clear]").click()
    wait_until(lambda: read_answer(browser) == "nothing yet")
    bright = Image.fromarray(real_images[0][0])  # a 5, bright on dark, of 28x28 pixels
    (tmp_path / "bright.png").write_bytes(as_png(bright))
    browser.find_element("css selector", "#board input").send_keys(str(tmp_path / "bright.png"))
    wait_until(lambda: read_answer(browser) == "5")
    # Nothing of a file that is none reaches the board or the server, and its failure is told.
    drop(browser, b"no picture", "notes.png")
    alert = browser.find_element("css selector", "#board [role=alert]")
    wait_until(lambda: alert.text == "this browser finds no picture in notes.png; choose a PNG or JPEG file")
    assert read_answer(browser) == "5"
    with Image.open(ROOT / "docs" / "numbers.jpg") as numbers:
        drop(browser, as_png(numbers.crop((0, 0, numbers.width, 125))))
    wait_until(lambda: read_answer(browser) == "0 1 8 9 2")
    save_picture(browser, "numbers")
    assert alert.text == ""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [each["params"]["request"] for each in events if each["method"] == "Network.requestWillBeSent"]
    sent = {each["url"] for each in requests if each["method"] != "GET"}
    assert {url.partition("/gradio_api")[1] + url.partition("/gradio_api")[2] for url in sent} == {guard.ANSWER}


@pytest.mark.slow
def test_the_keyboard_reaches_every_control_and_clears_the_board(browser):
    from selenium.webdriver import ActionChains, Keys

    def press(key):
        ActionChains(browser).send_keys(key).perform()

    names, outlines = [], []
    for _ in range(8):
        press(Keys.TAB)
        focused = browser.switch_to.active_element
        names.append(focused.get_attribute("name"))
        outlines.append(browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", focused))
    controls = browser.find_elements("css selector", "button, a[href], input:not([hidden]), select, textarea")
    shown = [control.get_attribute("name") for control in controls if control.is_displayed()]
    assert set(shown) == {"clear", "open"} <= set(names)
    assert {outline for name, outline in zip(names, outlines, strict=True) if name in shown} == {"solid"}
    for key, focused in ((Keys.ESCAPE, None), (Keys.SPACE, "clear"), (Keys.ENTER, "clear")):
        draw(browser, [(0, 0), *[(0, 10)] * 16], start=(0, -80))
        release(browser)
        wait_until(lambda: read_answer(browser) == "1")
        if focused:
            browser.execute_script("document.querySelector(`#board [name=${arguments[0]}]`).focus()", focused)
        press(key)
        wait_until(lambda: read_answer(browser) == "nothing yet")
        assert not ink_on_board(browser).any()
    browser.execute_script(
        "document.querySelector('#board input').click = () => document.title = 'a picture is chosen'"
    )
    browser.execute_script("document.querySelector('#board [name=open]').focus()")
    press(Keys.ENTER)
    wait_until(lambda: browser.title == "a picture is chosen")


FOREIGN_SITE = """<title>busy</title><iframe name="inside"></iframe><form method="post" target="inside"></form>
<script type="module">
const page = "http://127.0.0.1:PORT", answer = page + "/gradio_api/run/predict";
const call = '{"data": ["DRAWING"], "fn_index": 0}', file = new FormData();
file.append("files", new Blob(["text"]), "file.txt");
const read = await Promise.allSettled([
  fetch(page), fetch(answer, {method: "POST", body: call}),
  import(page + "/static/js/iframeResizer.contentWindow.min.js"),
]);
for (const path of ["/gradio_api/run/predict", "/gradio_api/upload", "/gradio_api/queue/join"])
  for (const body of [call, file]) await fetch(page + path, {method: "POST", mode: "no-cors", body});
document.forms[0].action = answer;
document.forms[0].submit();
const socket = new WebSocket(answer.replace("http", "ws"));
const connected = await new Promise(done => { socket.onopen = () => done(true); socket.onerror = () => done(false); });
const opened = window.open(page);
while (!opened.closed) await new Promise(done => setTimeout(done, 100));  // closed for this site, not for the user
document.querySelector("iframe").src = page;
document.querySelector("iframe").onload = () =>
  document.title = JSON.stringify([connected, ...read.map(each => each.status)]);
</script>"""


@pytest.mark.slow
def test_in_a_browser_a_page_in_another_tab_can_do_nothing_to_it(browser, port, tmp_path):
    own_tab = browser.current_window_handle
    browser.switch_to.new_window("tab")
    site = FOREIGN_SITE.replace("PORT", str(port)).replace("DRAWING", in_base64(ink_of_a_one()))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text(site)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            browser.get_log("performance")
            browser.get(f"http://127.0.0.1:{server.server_port}")
            wait_until(lambda: browser.title != "busy")
        finally:
            server.shutdown()
    assert json.loads(browser.title) == [False, "rejected", "rejected", "rejected"]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    responses = [event["params"]["response"] for event in events if event["method"] == "Network.responseReceived"]
    statuses = [each["status"] for each in responses if each["url"].startswith(f"http://127.0.0.1:{port}/gradio_api")]
    assert statuses == [403] * 7
    browser.switch_to.frame("inside")
    assert browser.find_elements("css selector", "#board") == []

    browser.get(f"http://evil.example:{port}")  # its name has this machine's address
    assert "this page has another host" in browser.find_element("css selector", "body").text

    browser.switch_to.window(own_tab)
    draw(browser, [(0, 0), *[(0, 10)] * 16], start=(0, -80))
    release(browser)
    wait_until(lambda: read_answer(browser) == "1")


def test_the_page_shows_the_classes_names(packaged):
    names = ("<b>", "one & only", *"CDEFGHIJ")
    html = demo.render_answer(dataclasses.replace(packaged, class_names=names), ink_of_a_one())
    assert ("&lt;b&gt;" in html, "<b><b>" in html) == (True, False)
    assert html.count("one &amp; only") in (2, 3)  # its row and meter, and the answer where it is that
