"""What several test files do with runs, their files and real data."""

import json
import lzma
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from cnn_jax.data.idx import idx_header, read_idx
from cnn_jax.inference.pictures import read_picture
from cnn_jax.inference.preprocess import find_character
from tests.fault_injection.runs import read_newest

ROOT = Path(__file__).parents[1]
# What starts a training in a process of its own that ends without a report.
TRAIN = ("-m", "tests.train_without_report")
EMBEDDED = ROOT / "cnn_jax" / "data" / "mnist"
TIMES = ("seconds", "examples_per_second", "step_milliseconds", "compile_seconds")


def start_python(*arguments, **options):
    """Start `python ...` in a process of its own, from the repository's root."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | options
    return subprocess.Popen([sys.executable, *map(str, arguments)], **options)


def start_browser(folder, *options, logs):
    """Start a real browser without a window, or skip the test where there is none.

    Args:
      folder: Where it keeps what it remembers.
      options: More of its options.
      logs: What it logs: `performance`, which has its requests, or `browser`, the page's messages.
    """
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    wanted = selenium.ChromeOptions()
    wanted.binary_location = shutil.which("chromium")
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={folder}", *options):
        wanted.add_argument(option)
    wanted.set_capability("goog:loggingPrefs", dict.fromkeys(logs, "ALL"))
    return selenium.Chrome(wanted, selenium.ChromeService(shutil.which("chromedriver")))


def touch(driver, selector, points):
    """Put a finger at a place in an element, given in fractions of its size, move it to the others, and lift it."""
    left, top, width, height = driver.execute_script(
        "const {left, top, width, height} = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [left, top, width, height]",
        selector,
    )
    at = [[{"x": left + width * x, "y": top + height * y}] for x, y in points]
    kinds = ["touchStart", *["touchMove"] * (len(at) - 1), "touchEnd"]
    for kind, fingers in zip(kinds, [*at, []], strict=True):
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})


def read_digit(file):
    """Return the digit in a picture as an image for the network, (28, 28, 1), uint8, 0 for no ink."""
    character = find_character(read_picture(str(file)).colours)
    assert character is not None
    return character.image


def write_small_mnist(folder, *, train=1030, test=260):
    """Write four IDX files with some of MNIST's training images, the first to train on and the next to test on."""
    images = read_idx(EMBEDDED / "train-images-idx3-ubyte.xz", ndim=3)
    labels = read_idx(EMBEDDED / "train-labels-idx1-ubyte.xz", ndim=1)
    for prefix, part in (("train", slice(train)), ("t10k", slice(train, train + test))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images[part])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.xz", labels[part])


def write_idx(path, array):
    """Write an IDX file, compressed if its name ends in .xz."""
    content = idx_header(array.shape) + np.ascontiguousarray(array).tobytes()
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)


def wait_for_step(run, step):
    """Wait until a run has a checkpoint of this step or a later one."""
    deadline = time.monotonic() + 180
    while not any(int(f.name) >= step for f in (run / "steps").glob("*") if f.name.isdigit()):
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.02)


def metrics_of(run):
    """The run's metrics without its times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same_run(run, reference):
    """Two runs have the same metrics, and the same bits in their newest checkpoints."""
    assert metrics_of(run) == metrics_of(reference)
    assert_same_bits(read_newest(run / "steps"), read_newest(reference / "steps"))


def assert_same_bits(tree, expected):
    """Two trees of arrays have the same arrays at the same paths, with the same dtypes and values."""
    leaves, others = jax.tree.leaves_with_path(tree), jax.tree.leaves_with_path(expected)
    assert [path for path, _ in leaves] == [path for path, _ in others]
    for (path, array), (_, other) in zip(leaves, others, strict=True):
        assert array.dtype == other.dtype, jax.tree_util.keystr(path)
        np.testing.assert_array_equal(array, other, err_msg=jax.tree_util.keystr(path))


def damage_newest(steps):
    """Flip a bit in the newest checkpoint's weights."""
    newest = max(steps.iterdir(), key=lambda step: int(step.name))
    # The largest file of the arrays; nothing that Orbax checks is in its middle.
    files = [path for path in (newest / "state").rglob("*") if path.is_file()]
    flip_a_bit(max(files, key=lambda path: path.stat().st_size))


def flip_a_bit(file):
    """Flip the lowest bit of the byte in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
