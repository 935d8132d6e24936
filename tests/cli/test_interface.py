"""From Python, the package trains and reads as its commands do."""

import concurrent.futures
import contextlib
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import weakref

import jax
import numpy as np
import pytest
from PIL import Image

import cnn_jax
from cnn_jax.cli.interface import Network
from cnn_jax.data.idx import read_idx
from cnn_jax.inference.pictures import read_picture
from cnn_jax.runtime.errors import CnnJaxError, InputFileError, NoCheckpointError, StorageError, UsageError
from tests.helpers import EMBEDDED, ROOT

pytestmark = pytest.mark.optax_promotes


@pytest.fixture(scope="module")
def network():
    return cnn_jax.load()


def test_importing_the_package_imports_neither_jax_nor_numpy_and_takes_milliseconds():
    code = (
        "import sys, time; begin = time.process_time(); import cnn_jax; print(time.process_time() - begin); "
        "print({'jax', 'numpy', 'flax'} & sys.modules.keys())"
    )
    seconds, heavy = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).splitlines()
    assert float(seconds) < 0.5  # of the processor, because the machine may be busy
    assert heavy == "set()"
    with pytest.raises(AttributeError, match="no attribute 'tain'"):
        _ = cnn_jax.tain


def test_files_and_arrays_are_read_as_predict_reads_files(network, command, tmp_path):
    file = ROOT / "docs" / "four.jpg"
    (expected,) = json.loads(command("predict", file, "--json")[1])
    grey = np.asarray(Image.open(file).convert("L"))
    answers = network.predict([file, str(file), grey, np.repeat(grey[..., np.newaxis], 3, axis=-1)])
    assert [(answer.text, answer.symbols[0].class_name) for answer in answers] == [("4", "4")] * 4
    (symbol,) = answers[0].symbols
    assert list(symbol.box) == expected["characters"][0]["box"]
    np.testing.assert_allclose(symbol.probabilities, expected["probabilities"], atol=1e-6)
    assert symbol.probability == symbol.probabilities[4] == max(symbol.probabilities)
    assert network.predict(file)[0].symbols[0].index == network.predict(grey, one=True)[0].symbols[0].index == 4
    assert network.predict([]) == []


def test_images_of_the_data_set_are_used_as_they_are(network):
    images = read_idx(EMBEDDED / "t10k-images-idx3-ubyte.xz", ndim=3)[:50]
    logits = network.logits(images[..., np.newaxis])
    for given in (
        images,
        images[..., np.newaxis],
        list(images),
        jax.numpy.asarray(images),
        tuple(images[..., np.newaxis]),
    ):
        assert [answer.symbols[0].index for answer in network.predict(given)] == logits.argmax(axis=1).tolist()
    for alone in (images[0], images[0][..., np.newaxis]):
        (answer,) = network.predict(alone)
        assert answer.symbols[0].index == logits[0].argmax()
    np.testing.assert_array_equal(network.logits(jax.numpy.asarray(images[..., np.newaxis])), logits)


@pytest.mark.parametrize("array", [np.zeros((28, 28)), np.zeros((3, 4, 5), np.uint8), np.zeros(9, np.uint8),
                                   np.zeros((0, 5), np.uint8), np.broadcast_to(np.uint8(0), (1, 2**28)), np.array(3),
                                   np.broadcast_to(np.uint8(0), (8000, 8000)), np.zeros((40, 40, 1), np.uint8),
                                   np.array(["docs/four.jpg"]), np.zeros((30, 30, 2), np.uint8)])  # fmt: skip
def test_what_is_no_picture_is_refused(array, network):
    for given in ([array], array)[: 1 if array.shape == (3, 4, 5) else 2]:  # which are three pictures of 4x5
        shape = re.escape(f"the shape {array.shape} is no picture: it must be of uint8, with the shape")
        with pytest.raises(UsageError, match=shape):
            network.predict(given)
    (blank,) = network.predict(np.zeros((50, 50), np.uint8))
    assert (blank.text, blank.lines, blank.symbols) == ("?", [], [])
    for file in "no such file", "":
        with pytest.raises(InputFileError, match=f"^'?{file}'? cannot be opened"):
            network.predict(file)


@pytest.mark.parametrize("shape", [(7, 7), (2, 25_000_000), (9, 900, 3)])
def test_an_array_is_as_large_as_a_picture_in_a_file_must_be(shape, network):
    with pytest.raises(UsageError, match="is too small or too narrow; give a picture of a whole digit"):
        network.predict([np.broadcast_to(np.uint8(0), shape)])


def test_of_many_pictures_one_is_in_memory_at_a_time(network, monkeypatch):
    held = []

    def read(file):
        gc.collect()
        assert [array() for array in held] == [None] * len(held)
        picture = read_picture(file)
        held.append(weakref.ref(picture.colours))
        return picture

    monkeypatch.setattr("cnn_jax.cli.interface.read_picture", read)
    assert [answer.text for answer in network.predict([ROOT / "docs" / "four.jpg"] * 3)] == ["4"] * 3


@pytest.mark.parametrize("value", [None, 3, b"x", {1}, np.uint8(3), Image.new("P", (28, 28)), range(2), [[1]]])
def test_what_is_neither_a_file_nor_an_array_is_refused_with_what_there_may_be(value, network):
    for given in (value, [value]):
        with pytest.raises(UsageError, match=r"\) is no picture: give a file's path, an array of uint8"):
            network.predict(given)
    with pytest.raises(UsageError, match=r" has no logits: give an array of uint8 with the shape \(N, 28, 28, 1\)"):
        network.logits(value)


def test_a_picture_in_colours_is_one_picture(network):
    colours = np.asarray(Image.open(ROOT / "docs" / "four.jpg").convert("RGB"))
    assert [answer.text for answer in network.predict(colours)] == ["4"]


def test_images_of_the_networks_shape_need_no_preparation_and_so_no_colours(network):
    shape = (28, 28, 4)
    layer1 = network.trained.params["layer1"] | {"kernel": np.ones((3, 3, 4, 32), np.float32)}
    params = network.trained.params | {"layer1": layer1}
    of_four = Network(dataclasses.replace(network.trained, params=params, image_shape=shape), None, None)
    assert len(of_four.predict([np.zeros(shape, np.uint8)] * 2)) == 2
    with pytest.raises(UsageError, match="have 1 or 3 channels"):
        of_four.predict(ROOT / "docs" / "four.jpg")


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_arrays_of_other_kinds_are_read_as_arrays(network):
    image = np.asarray(Image.open(ROOT / "docs" / "four.jpg").convert("L").resize((28, 28)))
    with pytest.raises(CnnJaxError, match=r"^an array of uint8 with the shape .* is masked: ") as refused:
        network.predict(np.ma.array(image, mask=image > 100))
    assert refused.value.exit_code == 2
    plain, *others = (network.predict(each) for each in (image, np.matrix(image), np.ma.array(image)))
    for other in others:
        np.testing.assert_array_equal(other[0].symbols[0].probabilities, plain[0].symbols[0].probabilities)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 28, 28, 1), float), ((1, 27, 28, 1), np.uint8), ((28, 28, 1), np.uint8)]
)
def test_images_that_are_not_the_networks_have_no_logits(shape, dtype, network):
    with pytest.raises(UsageError, match=r" has no logits: give an array of uint8 with the shape \(N, 28, 28, 1\)"):
        network.logits(np.zeros(shape, dtype))


@pytest.mark.parametrize("run", [3, b"x", "", "a\0b", ["run"]])
def test_what_names_no_run_is_refused_as_that(run):
    with pytest.raises(UsageError, match=r"^load: .* is no run; give a run's folder, or its name in checkpoints"):
        cnn_jax.load(run)


def test_a_name_that_the_system_cannot_write_is_told_as_the_command_tells_it():
    with pytest.raises(cnn_jax.CnnJaxError, match=r"^cannot read or write '.*ud800' in utf-8; "):
        cnn_jax.load("\ud800")


WRONG = [
    3,
    -1,
    2.5,
    10**400,
    b"x",
    "a",
    "x\0y",
    "\ud800",
    [1],
    {},
    {1},
    object(),
    np.zeros(3),
    range(3),
    Ellipsis,
    None,
]
ARGUMENTS = {
    "seed": (lambda network, value: cnn_jax.load(seed=value), (None,)),  # the package's network has but 777
    "data_dir": (lambda network, value: cnn_jax.load(data_dir=value), ("a", "\ud800", None)),
    "one": (lambda network, value: network.predict([], one=value), ()),
    "pictures": (lambda network, value: network.predict(value), ()),
    "images": (lambda network, value: network.logits(value), ()),
    "epochs": (lambda network, value: cnn_jax.train(epochs=value, batch_size=0), ()),
    "dry_run": (lambda network, value: cnn_jax.train(dry_run=value), ()),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_another_type_is_refused_as_every_failure_is(name, network):
    call, right = ARGUMENTS[name]
    for value in WRONG:
        if not any(value is each for each in right):
            with pytest.raises(CnnJaxError) as refused:
                call(network, value)
            assert "\n" not in str(refused.value)


def test_numpys_numbers_are_numbers(network, monkeypatch):
    chosen = []
    monkeypatch.setattr("cnn_jax.cli.commands.train", chosen.append)
    assert [answer.text for answer in network.predict(ROOT / "docs" / "four.jpg", one=np.True_)] == ["4"]
    with contextlib.suppress(AssertionError):  # nothing was trained
        cnn_jax.train(seed=np.int64(3), epochs=np.float32(1.5))
    assert (chosen[0].seed, chosen[0].epochs) == (3, 1.5)


def test_what_the_system_refuses_is_a_documented_failure_too(network, monkeypatch):
    for failure, kind in ((OSError(24, "Too many open files", "a.png"), StorageError), (MemoryError(), UsageError)):

        def fail(file, failure=failure):
            raise failure

        monkeypatch.setattr("cnn_jax.cli.interface.read_picture", fail)
        with pytest.raises(kind):
            network.predict("a.png")


@pytest.mark.usefixtures("without_report")
def test_a_training_writes_the_run_that_the_command_writes(small_mnist, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = cnn_jax.train(epochs=2, seeds=2, dataset_dir=small_mnist, run_name="run", features=(2, 4))
    assert (len(training.accuracies), training.run) == (2, tmp_path.relative_to(tmp_path) / "checkpoints" / "run")
    assert training.metrics == [json.loads(line) for line in (training.run / "metrics.jsonl").read_text().splitlines()]
    again = cnn_jax.train(epochs=2, seeds=2, dataset_dir=small_mnist, run_name="run", features=(2, 4))
    assert again == training
    network = cnn_jax.load("run", seed=778)
    assert network.test().accuracy == training.accuracies[1]
    assert training.network().class_names == tuple("0123456789")
    for wrong in ({"epoch": 3}, {"dry_run": True}, {"run_folder": "a"}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))}: train has no such setting"):
            cnn_jax.train(**wrong)
    mistyped = ({"epochs": "x"}, {"recipe": "slow"}, {"features": (1,)}, {"dataset_dir": 3}, {"seeds": 1.5})
    for wrong in (*mistyped, {"epochs": -1}, {"class_names": "a, a"}):
        with pytest.raises(
            UsageError, match=f"{next(iter(wrong)).replace('_', '.')}.*(it must be|; give another value)"
        ):
            cnn_jax.train(**wrong)
    with pytest.raises(NoCheckpointError):
        cnn_jax.load("none")


@pytest.mark.usefixtures("without_report")
def test_outside_the_main_thread_a_training_is_the_same(small_mnist, tmp_path):
    settings = {"epochs": 1, "dataset_dir": small_mnist, "features": (2, 4), "checkpoint_dir": tmp_path}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        there = pool.submit(cnn_jax.train, run_name="there", **settings).result()
    assert there.accuracies == cnn_jax.train(run_name="here", **settings).accuracies


FORKED = """
import os, warnings
import cnn_jax
warnings.simplefilter("ignore")  # JAX's of the fork
network = cnn_jax.load()
if os.fork() == 0:
    for call in (lambda: network.predict("docs/four.jpg"), cnn_jax.load, lambda: cnn_jax.train(epochs=1)):
        try:
            call()
        except cnn_jax.CnnJaxError as error:
            print(error.exit_code, error, flush=True)
    os._exit(0)
os.wait()
print(network.predict("docs/four.jpg")[0].text)
"""


def test_a_process_that_was_forked_says_so_and_does_not_wait_for_ever(program):
    out, err = program("-c", FORKED).communicate(timeout=120)
    *told, answer = out.splitlines()
    line = (
        "2 this process was forked from one that has used JAX, and cannot use it; start processes by multiprocessing."
    )
    assert [each.startswith(line) for each in told] == [True] * 3, out + err
    assert answer == "4"


PLATFORMS = """
import sys
from pathlib import Path
import cnn_jax
def trained(platform):
    settings = {"features": (2, 4), "dataset_dir": Path(sys.argv[1]), "checkpoint_dir": Path(sys.argv[2])}
    try:
        return cnn_jax.train(epochs=0.1, platform=platform, **settings).run.name
    except cnn_jax.CnnJaxError as error:
        return str(error)
for platform in ("tpu", "cpu", None, "tpu"):
    print(trained(platform))
"""


def test_a_platform_that_is_refused_leaves_the_others_usable(program, small_mnist, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    out, err = program("-c", PLATFORMS, small_mnist, tmp_path, env=environment).communicate(timeout=300)
    lines = [line for line in out.splitlines() if not line.startswith(("[Epoch", "Accuracy"))]
    assert len(lines) == 4, err
    assert lines[0].startswith("--platform tpu: JAX finds no such device here, or cannot start it (")
    assert lines[1] == lines[2]
    assert lines[1].endswith("-seed777-features2x4")
    assert lines[3] == "--platform tpu: this process computes on cpu already; start a new one for it"


def test_the_pages_code_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys, small_mnist):
    page = (ROOT / "docs" / "python.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (printed,) = re.findall(r"```\n\n```\n(.*?)```", page, re.DOTALL)
    scope = {}
    monkeypatch.chdir(ROOT)
    exec(first, scope)
    assert capsys.readouterr().out == printed
    monkeypatch.chdir(tmp_path)
    exec(second.replace("epochs=2", f"epochs=1, features=(4, 8), dataset_dir={str(small_mnist)!r}"), scope)
    assert (tmp_path / "checkpoints" / "from-python" / "report.html").exists()
    assert cnn_jax.CnnJaxError is CnnJaxError
