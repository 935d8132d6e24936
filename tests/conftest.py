"""What holds for every test, and the real data that they share."""

import collections
import contextlib
import ctypes
import functools
import gc
import os
import signal
from importlib.metadata import version

# XLA compiles a step in less than half the time so, and a step takes a third longer; a test's run has few. With
# `XLA_FLAGS=` in front, pytest tests what users compile. From JAX 0.12 on, XLA has nothing but its emitters.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=1"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith(("0.10.", "0.11.")),
)

import jax
import jaxtyping
import pytest

from cnn_jax.runtime.devices import fix_algorithms, has_only_cpu

# Every call's shapes and dtypes are held against its signature. What is imported before this line is not checked, so
# these rooms are imported by the fixtures.
jaxtyping.install_import_hook(["cnn_jax.core", "cnn_jax.data"], "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")
fix_algorithms(attached=False)  # as `plan` does; XLA reads its flags once
if has_only_cpu():
    jax.config.update("jax_platforms", "cpu")


def pytest_configure(config):
    """Give each of several workers cores of its own: XLA's threads wait for each other by turning in circles."""
    worker = getattr(config, "workerinput", None)
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        number, count = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
        os.sched_setaffinity(0, cores[number::count] or cores)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, as far as their marks and their number of tests tell: a worker gets a
    file at a time.
    """
    seconds = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("slow")
        seconds[item.path] += mark.kwargs.get("seconds", 10) if mark else 0.2
    items.sort(key=lambda item: -seconds[item.path])


@pytest.fixture(autouse=True)
def strict_dtype_promotion(request):
    """Let no dtype be converted silently, except where the path runs through Optax, whose Adam relies on it."""
    mode = "standard" if request.node.get_closest_marker("optax_promotes") else "strict"
    with jax.numpy_dtype_promotion(mode):
        yield


@pytest.fixture(scope="session", autouse=True)
def compiled_code(request):
    """Keep what the tests and the programs that they start compile, for each other and for the next time."""
    folder = request.config.cache.mkdir("compiled")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session", autouse=True)
def shared_programs():
    """Let runs of the same settings share one program, and so all that it has compiled: that is half of a short run."""
    from cnn_jax.runs import program, restore, train
    from cnn_jax.runs.folder import deciding_settings

    programs = {}

    def make_program(settings, sizes, mesh, **options):
        key = (repr(deciding_settings(settings)), settings.epochs, sizes, mesh, repr(options))
        if key not in programs:
            programs[key] = program.make_program(settings, sizes, mesh, **options)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (restore, train):
            patch.setattr(module, "make_program", make_program)
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Forget what a file's tests have compiled when they end: all of it together takes gigabytes."""
    gc.freeze()  # what earlier files have left, mostly imports, which each collection would look through
    yield
    jax.clear_caches()
    gc.collect()
    gc.unfreeze()
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory):
    """A folder for tfds that all workers share; the first test that loads MNIST from it has it prepared."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tfds"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def real_images():
    """MNIST's 60,000 training images, (60000, 28, 28) uint8, and their labels, (60000,) uint8."""
    from cnn_jax.data.idx import read_idx
    from tests.helpers import EMBEDDED

    images = read_idx(EMBEDDED / "train-images-idx3-ubyte.xz", ndim=3)
    return images, read_idx(EMBEDDED / "train-labels-idx1-ubyte.xz", ndim=1)


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory):
    """A folder of four IDX files: 1,030 real training images, 260 real test images."""
    from tests.helpers import write_small_mnist

    folder = tmp_path_factory.mktemp("small-mnist")
    write_small_mnist(folder)
    return folder


@contextlib.contextmanager
def no_report():
    """End the trainings in this block without their report, which takes half of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnn_jax.analysis.report.write_report", lambda *arguments: None)
        yield


@pytest.fixture
def without_report():
    """For tests whose trainings' reports are not the claim."""
    with no_report():
        yield


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, small_mnist):
    """Train on the small set by the command, once for the same options; tests leave the run's folder as it is."""
    from cnn_jax.cli.commands import main

    @functools.cache
    def train(*options, epochs, data=small_mnist, reported=True):
        folder = tmp_path_factory.mktemp("trained")
        arguments = ["--dataset-dir", data, "--checkpoint-dir", folder, "--run-name", "run", "--epochs", epochs]
        with jax.numpy_dtype_promotion("standard"), contextlib.nullcontext() if reported else no_report():
            main(["train", *map(str, [*arguments, *options])])
        return folder / "run"

    return train


@pytest.fixture
def command(capsys):
    """Run a command in this process and return its exit code, stdout and stderr."""
    from cnn_jax.cli.commands import main

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
def hangups_heard():
    """Let the programs of a test hear of a closed terminal also where pytest itself does not, under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def program():
    """Start `python ...` in a process of its own, from the repository's root; it is killed when the test ends."""
    from tests.helpers import start_python

    started = []

    def start(*arguments, **options):
        started.append(start_python(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
