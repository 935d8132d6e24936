"""Every exported file computes the network's outputs in the program it is meant for, or is not written."""

import dataclasses
import importlib.util
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cnn_jax.data.idx import read_idx
from cnn_jax.inference import export
from cnn_jax.inference.export import Input
from cnn_jax.inference.pretrained import load_trained, read_trained
from cnn_jax.runtime.errors import StorageError
from tests.helpers import EMBEDDED, ROOT, write_idx

FORMATS = ("torch", "safetensors", "onnx", "stablehlo", "html")
INPUTS = [Input(pixels, layout) for pixels in ("uint8", "float") for layout in ("nhwc", "nchw")]


@pytest.fixture(scope="module")
def test_images():
    """MNIST's test images, (10000, 28, 28, 1), uint8."""
    return read_idx(EMBEDDED / "t10k-images-idx3-ubyte.xz", ndim=3)[..., np.newaxis]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder for the exported files."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture
def exported(command, tfds_folder, files):
    """Return the packaged network's file of a format; each is exported once, with a log beside it."""

    def export_once(to):
        file = files / f"network.{to}"
        if not file.exists():
            code, out, err = command("export", "--to", to, "--output", file, "--data-dir", tfds_folder)
            assert (code, out) == (0, "")
            (files / f"{to}.log").write_text(err)
        return file

    return export_once


def need(to):
    """Skip if the program of a format is not installed."""
    for package in {"torch": ("torch",), "onnx": ("onnx", "onnxruntime")}.get(to, ()):
        pytest.importorskip(package, reason=f"needs {package}")


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_is_tested_on_all_test_images_before_it_is_kept(to, exported):
    need(to)
    file = exported(to)
    tested, done = (file.parent / f"{to}.log").read_text().splitlines()[-2:]
    assert tested.startswith(
        f"{to}: read back and tested on 10,000 test images: the same accuracy, 0.9941, and logits within "
    )
    assert float(tested.rpartition(" ")[2]) <= 1e-4
    assert done == f"the packaged network, seed 777, after 11,000 steps is now {file}"
    assert not list(file.parent.glob(".*"))


def test_an_output_whose_path_is_no_text_is_written_too(command, trained_run, tmp_path):
    need("onnx")
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    run = trained_run("--features", 4, 8, epochs=1, reported=False)
    code, _, err = command("export", run, "--to", "onnx", "--output", folder / "model.onnx")
    assert code == 0, err
    assert [file.name for file in folder.iterdir()] == ["model.onnx"]


# Exports to the given formats while no file may exceed 1,000 bytes.
EXPORT_TO_A_FULL_DISK = """
import resource, sys
from cnn_jax.cli.commands import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for to in sys.argv[2:]:
    try:
        main(["export", "--to", to, "--output", sys.argv[1]])
    except SystemExit as end:
        print(to, end.code)
"""


def test_on_a_full_disk_the_output_is_named_and_nothing_is_left_behind(exported, program, tfds_folder, tmp_path):
    exported("safetensors")  # has the data prepared, while there is room
    needed = {"torch": "torch", "onnx": "onnxruntime"}
    formats = [to for to in FORMATS if to not in needed or importlib.util.find_spec(needed[to])]
    environment = os.environ | {"TFDS_DATA_DIR": str(tfds_folder)}
    process = program("-c", EXPORT_TO_A_FULL_DISK, tmp_path / "network", *formats, env=environment)
    out, err = process.communicate(timeout=120)
    assert out.splitlines() == [f"{to} 4" for to in formats], err
    errors = {line for line in err.splitlines() if line.startswith("error: ")}
    remedy = "allow larger files (ulimit -f), or give another --output"
    assert errors == {f"error: cannot write {tmp_path}/network (File too large); {remedy}"}
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory):
    """A folder of images of 23x21 pixels, of four classes."""
    folder = tmp_path_factory.mktemp("odd")
    images = read_idx(EMBEDDED / "train-images-idx3-ubyte.xz", ndim=3)[:2000]
    labels = read_idx(EMBEDDED / "train-labels-idx1-ubyte.xz", ndim=1)[:2000]
    images, labels = images[labels < 4][:, 2:25, 4:25], labels[labels < 4]
    for prefix, part in (("train", slice(600)), ("t10k", slice(600, 700))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images[part])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels[part])
    return folder


@pytest.fixture(scope="module")
def odd_run(trained_run, odd_data):
    """A run of them."""
    return trained_run("--features", 5, 7, epochs=3, data=odd_data, reported=False)


@pytest.fixture
def odd_program(odd_run, command, tmp_path):
    """Export that run as a program that takes its images as the given input says."""

    def export_odd(to, takes):
        options = ("--input", takes.pixels, "--layout", takes.layout)
        code, _, err = command("export", odd_run, "--to", to, "--output", tmp_path / "network", *options)
        assert code == 0, err
        return tmp_path / "network"

    return export_odd


@pytest.fixture(scope="module")
def odd_images(odd_run, odd_data):
    """That run's test images, (100, 23, 21, 1), uint8, and their logits, (100, 4)."""
    images = read_idx(odd_data / "t10k-images-idx3-ubyte", ndim=3)[..., np.newaxis]
    return images, load_trained(odd_run, None, pytest.fail).logits(images)


def as_documented(images, takes):
    """A data set's images in the type, range and layout that the page describes."""
    images = images if takes.pixels == "uint8" else images.astype(np.float32) / 255
    return np.ascontiguousarray(images if takes.layout == "nhwc" else np.moveaxis(images, -1, 1))


@pytest.mark.parametrize("takes", INPUTS, ids="-".join)
def test_onnxruntime_computes_the_same_for_any_number_of_images_and_refuses_another_type(
    takes, odd_program, odd_images
):
    need("onnx")
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    session = onnxruntime.InferenceSession(odd_program("onnx", takes))
    (given,), (logits,) = session.get_inputs(), session.get_outputs()
    shape = [23, 21, 1] if takes.layout == "nhwc" else [1, 23, 21]
    assert (given.name, given.type, given.shape) == ("images", f"tensor({takes.pixels})", ["batch", *shape])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 4])
    images, expected = odd_images
    fed = as_documented(images, takes)
    for count in (1, 3):
        (computed,) = session.run(None, {"images": fed[:count]})
        np.testing.assert_allclose(computed, expected[:count], atol=1e-4)
    with pytest.raises(InvalidArgument, match="Unexpected input data type"):
        session.run(None, {"images": fed.astype(np.float32 if takes.pixels == "uint8" else np.uint8)})


@pytest.mark.parametrize("takes", INPUTS, ids="-".join)
def test_opencv_computes_the_same_for_any_number_of_images(takes, odd_program, odd_images):
    need("onnx")
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    network = cv2.dnn.readNetFromONNX(str(odd_program("onnx", takes)))
    images, expected = odd_images
    for count in (1, 3):
        network.setInput(as_documented(images[:count], takes))
        np.testing.assert_allclose(network.forward(), expected[:count], atol=1e-4)


def test_opencvs_blobs_of_bytes_need_a_file_with_the_channels_first(odd_program, odd_images):
    need("onnx")
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    network = cv2.dnn.readNetFromONNX(str(odd_program("onnx", Input("uint8", "nchw"))))
    images, expected = odd_images
    network.setInput(cv2.dnn.blobFromImage(images[0, :, :, 0], ddepth=cv2.CV_8U))
    np.testing.assert_allclose(network.forward(), expected[:1], atol=1e-4)
    if not cv2.__version__.startswith("4."):
        with pytest.raises(cv2.error, match="incompatible type"):
            network.setInput(cv2.dnn.blobFromImage(images[0, :, :, 0]))


@pytest.mark.parametrize("takes", INPUTS, ids="-".join)
def test_stablehlo_is_one_program_for_cpus_gpus_and_tpus_and_any_number_of_images(takes, odd_program, odd_images):
    program = jax.export.deserialize(bytearray(odd_program("stablehlo", takes).read_bytes()))
    assert program.platforms == ("cpu", "cuda", "rocm", "tpu")
    images, expected = odd_images
    for count in (1, 3):
        np.testing.assert_allclose(program.call(as_documented(images[:count], takes)), expected[:count], atol=1e-4)


def test_unless_told_otherwise_a_program_takes_bytes_with_the_channels_last(exported, packaged, test_images):
    program = jax.export.deserialize(bytearray(exported("stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(test_images[:2]), packaged.logits(test_images[:2]), atol=1e-4)
    need("onnx")
    import onnxruntime

    (computed,) = onnxruntime.InferenceSession(exported("onnx")).run(None, {"images": test_images[:2]})
    np.testing.assert_allclose(computed, packaged.logits(test_images[:2]), atol=1e-4)


@pytest.mark.parametrize("package", ["onnxruntime", "cv2"])
def test_the_python_on_the_page_about_networks_runs_an_exported_one(package, exported, tmp_path, monkeypatch, capsys):
    need("onnx")
    pytest.importorskip(package, reason=f"needs {package}")
    page = (ROOT / "docs" / "using-a-network.md").read_text()
    (code,) = (c for c in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if f"import {package}" in c)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mnist.onnx").symlink_to(exported("onnx"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip("[]\n").isdigit()


@pytest.mark.parametrize(
    ("to", "what"),
    [
        ("torch", "weights, which take no images"),
        ("safetensors", "weights, which take no images"),
        ("html", "a page, which takes any picture"),
    ],
)
@pytest.mark.parametrize("option", ["--input uint8", "--layout nchw"])
def test_weights_and_pages_have_no_input_whose_pixels_or_layout_could_be_chosen(to, what, option, command, tmp_path):
    code, out, err = command("export", "--to", to, "--output", tmp_path / "network", *option.split())
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    name = option.split()[0]
    assert err == f"error: {option}: --to {to} writes {what}; leave out {name}\n"


def test_pytorch_reads_its_file_without_executing_anything_in_it(exported, packaged):
    need("torch")
    import torch

    weights = torch.load(exported("torch"), weights_only=True)
    kernel = packaged.params["layer2"]["kernel"]
    np.testing.assert_array_equal(weights["layer2.0.weight"].numpy(), kernel.transpose(3, 2, 0, 1))


def test_the_safetensors_file_is_the_packaged_one_again(exported, packaged):
    read = read_trained(exported("safetensors"))
    read_alone = dataclasses.replace(packaged, params={}, asks_detector=False)
    assert dataclasses.replace(read, params={}, name="mnist") == read_alone
    np.testing.assert_array_equal(read.params["fc"]["kernel"], packaged.params["fc"]["kernel"])


@pytest.mark.parametrize("to", FORMATS)
def test_a_run_of_other_images_channels_and_classes_is_exported_too(to, odd_run, command, tmp_path):
    need(to)
    code, _, err = command("export", odd_run, "--to", to, "--output", tmp_path / "network")
    assert code == 0, err
    assert f"{to}: read back and tested on 100 test images: the same accuracy, " in err
    assert err.endswith(f"{odd_run}, seed 777, after 18 steps is now {tmp_path}/network\n")
    if to == "safetensors":
        assert read_trained(tmp_path / "network").image_shape == (23, 21, 1)


def test_rounding_may_decide_between_two_equal_logits_and_nothing_else_may(odd_run, monkeypatch):
    network = load_trained(odd_run, None, pytest.fail)
    kernel, bias = network.params["fc"]["kernel"].copy(), network.params["fc"]["bias"].copy()
    kernel[:, 1] = kernel[:, 0]
    bias[:2] = 10  # two classes that are equal, and ahead of all others
    tied = dataclasses.replace(network, params=network.params | {"fc": {"kernel": kernel, "bias": bias}})
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, *network.image_shape), np.uint8)
    dataset = SimpleNamespace(test_images=images, test_labels=rng.integers(0, 2, 100))

    def found(added):
        compute = lambda images: tied.logits(images) + np.eye(1, kernel.shape[1], 1, dtype=np.float32) * added  # noqa: E731
        monkeypatch.setitem(export.FORMATS, "torch", export.FORMATS["torch"]._replace(load=lambda *of: compute))
        return export.check("torch", None, tied, dataset, None, name="a file")

    assert "the same accuracy" in found(0)
    assert " in place of " in found(1e-6)
    with pytest.raises(StorageError, match="differs from the network"):
        found(0.01)


def perturb(network):
    """Change one weight a little."""
    params = jax.tree.map(np.copy, network.params)
    params["layer2"]["kernel"][1, 1, 0, 0] += 0.002
    return dataclasses.replace(network, params=params)


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_that_computes_something_else_is_not_left_behind(to, odd_run, command, tmp_path, monkeypatch):
    need(to)
    sound = export.FORMATS[to]
    broken = sound._replace(write=lambda network, file, takes: sound.write(perturb(network), file, takes))
    monkeypatch.setitem(export.FORMATS, to, broken)
    (tmp_path / "network").write_text("an earlier file")
    code, out, err = command("export", odd_run, "--to", to, "--output", tmp_path / "network")
    assert (code, out) == (4, "")
    assert err.splitlines()[-1].startswith(
        f"error: {tmp_path}/network was not written: the {to} export differs from the network on 100 test "
        "images: its logits by up to "
    )
    assert [file.name for file in tmp_path.iterdir()] == ["network"]
    assert (tmp_path / "network").read_text() == "an earlier file"


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_that_its_program_cannot_read_is_not_left_behind(to, odd_run, command, tmp_path, monkeypatch):
    need(to)
    damaged = export.FORMATS[to]._replace(write=lambda network, file, takes: file.write_bytes(b"damaged"))
    monkeypatch.setitem(export.FORMATS, to, damaged)
    code, _, err = command("export", odd_run, "--to", to, "--output", tmp_path / "network")
    assert code == 4
    assert f"error: {tmp_path}/network was not written: the {to} export cannot be read (" in err
    assert list(tmp_path.iterdir()) == []


def test_an_export_whose_logits_are_nan_is_not_left_behind(odd_run, command, tmp_path, monkeypatch):
    blind = lambda file, network, takes: lambda images: np.full((len(images), 4), np.nan)  # noqa: E731
    monkeypatch.setitem(export.FORMATS, "stablehlo", export.FORMATS["stablehlo"]._replace(load=blind))
    code, _, err = command("export", odd_run, "--to", "stablehlo", "--output", tmp_path / "network")
    assert (code, list(tmp_path.iterdir())) == (4, [])
    assert "its logits by up to nan" in err


@pytest.mark.parametrize("name", ["no/network", "folder"])
def test_a_file_that_cannot_be_written_is_named(name, odd_run, command, tmp_path):
    (tmp_path / "folder").mkdir()
    code, _, err = command("export", odd_run, "--to", "stablehlo", "--output", tmp_path / name)
    assert code == 4
    assert f"error: cannot write {tmp_path / name} (" in err
    assert err.endswith("; give another --output\n")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("to", "package", "extra"),
    [("onnx", "onnx", "export"), ("onnx", "onnxruntime", "export"), ("torch", "torch", "torch")],
)
def test_an_extra_that_is_not_installed_is_named(to, package, extra, command, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    code, out, err = command("export", "--to", to, "--output", tmp_path / "network")
    assert (code, out) == (2, "")
    assert err == f"error: this needs {package}, which is not installed: pip install 'cnn-jax[{extra}]'\n"


def told_by(file):
    """What an ONNX file says about itself."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    model = onnx.load(file)
    told = {each.key: each.value for each in model.metadata_props}
    assert told["input"] == model.graph.input[0].doc_string
    assert told["output"] == model.graph.output[0].doc_string
    return told


def test_an_onnx_file_says_all_that_is_needed_to_feed_it(exported):
    told = told_by(exported("onnx"))
    assert json.loads(told["class_names"]) == [str(digit) for digit in range(10)]
    assert told["input"] == (
        "images: uint8 in 0..255, (N, height, width, channels) = (N, 28, 28, 1) for any N; 0 is paper and 255 is ink"
    )
    assert told["output"].startswith("logits: float32, (N, classes);")
    assert "made 255 for ink and 0 for paper" in told["preparation"]
    assert "until its longer side has 20 pixels, and placed into 28x28 pixels" in told["preparation"]


def test_an_onnx_file_of_other_images_says_how_a_picture_becomes_one(odd_program):
    need("onnx")
    told = told_by(odd_program("onnx", Input("float", "nchw")))
    assert told["input"] == (
        "images: float32 in [0, 1], (N, channels, height, width) = (N, 1, 23, 21) for any N; 0 is black and 1 is white"
    )
    assert told["preparation"] == (
        "a picture is shrunk to 23 rows of 21 pixels of grey, and inverted if that brings its background nearer to 0"
    )
