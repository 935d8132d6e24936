"""Every exported file computes the network's outputs in the program it is meant for, or is not written."""

import dataclasses
import importlib.util
import json
import os
import re

import jax
import numpy as np
import pytest

from cnn_jax.data.dataset import scale_pixels
from cnn_jax.data.idx import read_idx
from cnn_jax.inference import export
from cnn_jax.inference.pretrained import read_trained
from tests.helpers import EMBEDDED, ROOT, write_idx

FORMATS = ("torch", "safetensors", "onnx", "stablehlo")


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
        f"{to}: read back and tested on 10,000 test images: the same accuracy, 0.9881, and logits within "
    )
    assert float(tested.rpartition(" ")[2]) <= 1e-4
    assert done == f"the packaged network, seed 777, after 9,000 steps is now {file}"
    assert not list(file.parent.glob(".*"))


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
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: cannot write {tmp_path}/network (File too large); give another --output"] * len(formats)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 3])
def test_onnxruntime_computes_the_same_for_any_number_of_images(count, exported, packaged, test_images):
    need("onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(exported("onnx"))
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["batch", 28, 28, 1])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    (computed,) = session.run(None, {"images": scale_pixels(test_images[:count])})
    np.testing.assert_allclose(computed, packaged.logits(test_images[:count]), atol=1e-4)


def test_the_python_on_the_page_about_networks_runs_an_exported_one(exported, tmp_path, monkeypatch, capsys):
    need("onnx")
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "using-a-network.md").read_text(), re.M | re.S)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mnist.onnx").symlink_to(exported("onnx"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip("[]\n").isdigit()


@pytest.mark.parametrize("count", [1, 3])
def test_stablehlo_is_one_program_for_cpus_gpus_and_tpus_and_any_number_of_images(
    count, exported, packaged, test_images
):
    program = jax.export.deserialize(bytearray(exported("stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    computed = program.call(scale_pixels(test_images[:count]))
    np.testing.assert_allclose(computed, packaged.logits(test_images[:count]), atol=1e-4)


def test_pytorch_reads_its_file_without_executing_anything_in_it(exported, packaged):
    need("torch")
    import torch

    weights = torch.load(exported("torch"), weights_only=True)
    kernel = packaged.params["layer2"]["kernel"]
    np.testing.assert_array_equal(weights["layer2.0.weight"].numpy(), kernel.transpose(3, 2, 0, 1))


def test_the_safetensors_file_is_the_packaged_one_again(exported, packaged):
    read = read_trained(exported("safetensors"))
    assert dataclasses.replace(read, params={}, name="mnist") == dataclasses.replace(packaged, params={})
    np.testing.assert_array_equal(read.params["fc"]["kernel"], packaged.params["fc"]["kernel"])


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """A run of images of 23x21 pixels, of four classes."""
    from cnn_jax.cli.commands import main

    folder = tmp_path_factory.mktemp("odd")
    images = read_idx(EMBEDDED / "train-images-idx3-ubyte.xz", ndim=3)[:2000]
    labels = read_idx(EMBEDDED / "train-labels-idx1-ubyte.xz", ndim=1)[:2000]
    images, labels = images[labels < 4][:, 2:25, 4:25], labels[labels < 4]
    for prefix, part in (("train", slice(600)), ("t10k", slice(600, 700))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images[part])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels[part])
    where = ["--dataset-dir", str(folder), "--checkpoint-dir", str(folder)]
    with jax.numpy_dtype_promotion("standard"):
        main(["train", *where, "--run-name", "run", "--epochs", "3", "--features", "5", "7"])
    return folder / "run"


@pytest.mark.parametrize("to", FORMATS)
def test_a_run_of_other_images_channels_and_classes_is_exported_too(to, odd_run, command, tmp_path):
    need(to)
    code, _, err = command("export", odd_run, "--to", to, "--output", tmp_path / "network")
    assert code == 0, err
    assert f"{to}: read back and tested on 100 test images: the same accuracy, " in err
    assert err.endswith(f"{odd_run}, seed 777, after 18 steps is now {tmp_path}/network\n")
    if to == "safetensors":
        assert read_trained(tmp_path / "network").image_shape == (23, 21, 1)


def perturb(network):
    """Change one weight a little."""
    params = jax.tree.map(np.copy, network.params)
    params["layer2"]["kernel"][1, 1, 0, 0] += 0.002
    return dataclasses.replace(network, params=params)


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_that_computes_something_else_is_not_left_behind(to, odd_run, command, tmp_path, monkeypatch):
    need(to)
    sound = export.FORMATS[to]
    broken = sound._replace(write=lambda network, file: sound.write(perturb(network), file))
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
    damaged = export.FORMATS[to]._replace(write=lambda network, file: file.write_bytes(b"damaged"))
    monkeypatch.setitem(export.FORMATS, to, damaged)
    code, _, err = command("export", odd_run, "--to", to, "--output", tmp_path / "network")
    assert code == 4
    assert f"error: {tmp_path}/network was not written: the {to} export cannot be read (" in err
    assert list(tmp_path.iterdir()) == []


def test_an_export_whose_logits_are_nan_is_not_left_behind(odd_run, command, tmp_path, monkeypatch):
    blind = lambda file, network: lambda images: np.full((len(images), 4), np.nan)  # noqa: E731
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


def test_an_onnx_file_says_what_its_classes_and_images_are(exported):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    properties = {each.key: each.value for each in onnx.load(exported("onnx")).metadata_props}
    assert json.loads(properties["class_names"]) == [str(digit) for digit in range(10)]
    assert properties["preparation"] == "character"
    assert "0 for paper" in properties["input"]
