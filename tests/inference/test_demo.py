"""The page answers while you draw, listens on this machine only, and accepts nothing but drawings."""

import base64
import contextlib
import dataclasses
import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.special
from flax import linen as nn

pytest.importorskip("gradio", reason="needs the extra demo")

import gradio as gr

from cnn_jax.data.dataset import scale_pixels
from cnn_jax.inference import demo
from tests.helpers import ROOT


def free_port():
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def port():
    """The port of a page that another process serves, with proxies set at which nothing answers."""
    number = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "cnn_jax", "demo", "--port", str(number)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {name: f"http://127.0.0.1:{free_port()}" for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")},
    )
    try:
        line = process.stderr.readline()
        assert line == f"draw a digit on http://127.0.0.1:{number}; Ctrl-C ends the page\n"
        yield number
    finally:
        process.terminate()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert err.splitlines()[-1] == "the page is closed"


def request(port, method, path, body=None, headers=None):
    """Return the status and the text that the page's server answers with."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode()


def send_drawing(port, drawing):
    """Send a drawing as the page does and return all that its server answers until it is done."""
    _, config = request(port, "GET", "/config")
    (dependency,) = json.loads(config)["dependencies"]
    session = base64.b16encode(os.urandom(6)).decode()
    call = {"data": [drawing], "fn_index": dependency["id"], "session_hash": session}
    status, text = request(
        port, "POST", "/gradio_api/queue/join", json.dumps(call), {"content-type": "application/json"}
    )
    assert status == 200, text
    return request(port, "GET", f"/gradio_api/queue/data?session_hash={session}")[1]


def ink_of_a_one():
    """Return a drawing of a 1."""
    ink = np.zeros((demo.BOARD, demo.BOARD), np.uint8)
    ink[20:120, 65:76] = 255
    return ink


def in_base64(ink):
    """Return a drawing as the board sends it."""
    return base64.b64encode(ink.tobytes()).decode()


def test_a_drawing_that_is_sent_is_answered(port):
    assert "It reads <output>1</output>" in json.dumps(send_drawing(port, in_base64(ink_of_a_one()))).replace("\\", "")


@pytest.mark.parametrize(
    "drawing",
    [
        None,
        17,
        {"path": "/etc/passwd"},
        "",
        "no base64",
        base64.b64encode(b"\x89PNG\r\n").decode(),
        in_base64(np.zeros((demo.BOARD + 1, demo.BOARD), np.uint8)),
        in_base64(np.zeros((demo.BOARD * 6, demo.BOARD), np.uint8)),
    ],
)
def test_anything_but_a_drawing_of_the_boards_size_is_refused_without_a_traceback(drawing, port):
    answer = send_drawing(port, drawing)
    assert "a drawing is 140x140 bytes in base64; load the page again" in answer
    assert not any(word in answer for word in ("Traceback", "demo.py", "root:"))


def test_requests_that_are_too_large_or_do_not_say_how_large_they_are_are_refused_unread(port):
    call = json.dumps({"data": ["a" * demo.MAXIMUM_REQUEST]})
    assert request(port, "POST", "/gradio_api/queue/join", call) == (413, "more than 1,048,576 bytes")
    # Only the size is sent, and none of the bytes.
    assert request(port, "POST", "/gradio_api/upload", headers={"content-length": str(2**40)})[0] == 413
    chunks = (chunk for chunk in [b"{}"])
    assert request(port, "POST", "/gradio_api/queue/join", chunks, {"transfer-encoding": "chunked"})[0] == 411


@pytest.mark.parametrize("path", ["docs", "redoc", "openapi.json", "gradio_api/runs"])
def test_there_is_no_page_about_the_interface(path, port):
    assert request(port, "GET", f"/{path}")[0] == 404
    _, about = request(port, "GET", "/gradio_api/info")
    assert json.loads(about) == {"named_endpoints": {}, "unnamed_endpoints": {}}


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


def test_the_maps_are_those_of_the_plain_layers_and_the_probabilities_the_networks(packaged, real_images):
    digit = real_images[0][0][..., np.newaxis]
    probabilities, maps = demo.run_network(packaged, digit)
    np.testing.assert_allclose(probabilities, scipy.special.softmax(packaged.logits(digit[np.newaxis])[0]), atol=1e-5)
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


def test_a_drawing_comes_back_as_it_was_drawn():
    ink = np.random.default_rng(0).integers(0, 256, (demo.BOARD, demo.BOARD), np.uint8)
    np.testing.assert_array_equal(demo.read_drawing(in_base64(ink)), ink)
    with pytest.raises(gr.Error):
        demo.read_drawing(in_base64(ink)[4:])


@pytest.fixture
def browser(tmp_path, port):
    """A real browser without a window that has loaded the page and logs its requests."""
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,940",
                   f"--user-data-dir={tmp_path}"):  # fmt: skip
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(f"http://127.0.0.1:{port}")
        wait_until(lambda: driver.find_elements("css selector", "#board canvas") and read_answer(driver))
        yield driver
    finally:
        driver.quit()


def wait_until(condition):
    """Wait until a condition holds, at most 30 seconds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.1)


def read_answer(driver):
    """Return what the page says that the drawing is."""
    return "".join(element.text for element in driver.find_elements("css selector", ".answer output"))


def maps(driver):
    """Return the pictures of what the network sees and of both layers."""
    return [image.get_attribute("src") for image in driver.find_elements("css selector", ".answer img")]


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


def release(driver):
    """Release the mouse button."""
    from selenium.webdriver import ActionChains

    ActionChains(driver).release().perform()


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
    assert len(browser.find_elements("css selector", ".answer meter")) == 10
    assert browser.find_element("css selector", ".answer .most").text.split()[0] == "7"
    if picture := os.environ.get("DEMO_PICTURE"):
        browser.save_screenshot(picture)

    browser.find_element("css selector", "#board button").click()
    wait_until(lambda: read_answer(browser) == "nothing yet")
    draw(browser, [(0, 0), *[(0, 10)] * 16], start=(0, -80))
    release(browser)
    wait_until(lambda: read_answer(browser) == "1")

    page = f"http://127.0.0.1:{port}/"
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = [request["request"]["url"] for request in requests if request["documentURL"].startswith(page)]
    assert any("queue/join" in url for url in asked)
    assert [url for url in asked if not url.startswith((page, "data:", "blob:"))] == []
