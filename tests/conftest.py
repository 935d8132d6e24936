"""What holds for every test, and the real data that they share."""

import lzma
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cnn_jax.cli.commands import main
from cnn_jax.data.idx import idx_header, read_idx

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "cnn_jax" / "data" / "mnist"

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def strict_dtype_promotion(request):
    """Let no dtype be converted silently, except where the path runs through Optax, whose Adam relies on it."""
    mode = "standard" if request.node.get_closest_marker("optax_promotes") else "strict"
    with jax.numpy_dtype_promotion(mode):
        yield


@pytest.fixture(scope="session", autouse=True)
def compiled_code(tmp_path_factory):
    """Keep what the tests and the programs that they start compile in one place, which goes when they end."""
    folder = tmp_path_factory.mktemp("compiled")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory):
    """A folder for tfds; the first test that loads MNIST from it has it prepared."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="session")
def real_images():
    """MNIST's 60,000 training images, (60000, 28, 28) uint8, and their labels, (60000,) uint8."""
    images = read_idx(EMBEDDED / "train-images-idx3-ubyte.xz", ndim=3)
    return images, read_idx(EMBEDDED / "train-labels-idx1-ubyte.xz", ndim=1)


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory):
    """A folder as `write_small_mnist` fills it."""
    folder = tmp_path_factory.mktemp("small-mnist")
    write_small_mnist(folder)
    return folder


def write_small_mnist(folder):
    """Write four IDX files with 2,030 real training images and 510 real test images."""
    images = read_idx(EMBEDDED / "train-images-idx3-ubyte.xz", ndim=3)
    labels = read_idx(EMBEDDED / "train-labels-idx1-ubyte.xz", ndim=1)
    for prefix, part in (("train", slice(0, 2030)), ("t10k", slice(2030, 2540))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images[part])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.xz", labels[part])


def write_idx(path, array):
    """Write an IDX file, compressed if its name ends in .xz."""
    content = idx_header(array.shape) + np.ascontiguousarray(array).tobytes()
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)


@pytest.fixture
def command(capsys):
    """Run a command in this process and return its exit code, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def program():
    """Start `python ...` in a process of its own, from the repository's root; it is killed when the test ends."""
    started = []

    def start(*arguments, **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | options
        started.append(subprocess.Popen([sys.executable, *map(str, arguments)], **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
