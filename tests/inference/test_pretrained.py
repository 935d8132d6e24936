"""The packaged network is as accurate as it states, and every network's file is read back unchanged or refused."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load, save_file

from cnn_jax.data.idx import read_idx
from cnn_jax.inference.logits import batch_logits
from cnn_jax.inference.pretrained import (
    PACKAGED,
    Provenance,
    load_trained,
    load_trained_run,
    read_trained,
    write_trained,
)
from cnn_jax.runtime.errors import InputFileError
from tests.helpers import EMBEDDED, ROOT


def test_the_packaged_network_has_the_test_accuracy_that_it_states(packaged):
    images = read_idx(EMBEDDED / "t10k-images-idx3-ubyte.xz", ndim=3)
    labels = read_idx(EMBEDDED / "t10k-labels-idx1-ubyte.xz", ndim=1)
    right = packaged.logits(images[..., np.newaxis]).argmax(axis=1) == labels
    assert right.mean() == packaged.test_accuracy
    assert packaged.training == Provenance(recipe="accurate", epochs=20, seed=777, steps=11000)
    assert PACKAGED.stat().st_size < 250_000


@pytest.mark.parametrize("count", [0, 1, 3, 300])
def test_logits_do_not_depend_on_how_many_images_come_at_once(count, packaged, real_images):
    images = real_images[0][:count, ..., np.newaxis]
    one_by_one = [packaged.logits(image[np.newaxis])[0] for image in images]
    logits = packaged.logits(images)
    assert (logits.shape, logits.dtype) == ((count, 10), np.float32)
    np.testing.assert_allclose(logits, np.reshape(one_by_one, (count, 10)), rtol=1e-5, atol=1e-5)


def test_few_sizes_are_compiled_however_many_images_come_at_once(packaged, real_images):
    compiled = batch_logits._cache_size()
    for count in range(1, 17):
        packaged.logits(real_images[0][:count, ..., np.newaxis])
    assert batch_logits._cache_size() <= compiled + 5  # 1, 2, 4, 8 and 16


def test_a_network_comes_back_from_its_file_with_the_same_bits(packaged, tmp_path):
    write_trained(packaged, tmp_path / "mnist.safetensors")
    again = read_trained(tmp_path / "mnist.safetensors")
    assert dataclasses.replace(again, params={}) == dataclasses.replace(packaged, params={}, asks_detector=False)
    for layer, arrays in packaged.params.items():
        for kind, array in arrays.items():
            np.testing.assert_array_equal(again.params[layer][kind], array)
    write_trained(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "mnist.safetensors").read_bytes()


def test_the_packaged_network_needs_neither_orbax_nor_tfds_nor_pytorch():
    program = (
        "import sys; from cnn_jax.inference.pretrained import load_trained; load_trained(None, None, print); "
        "print(sorted({'orbax', 'tensorflow_datasets', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.optax_promotes
@pytest.mark.usefixtures("without_report")
def test_a_run_is_exported_to_safetensors_without_pytorch_and_imported_unchanged(
    command, small_mnist, tmp_path, monkeypatch
):
    where = ("--checkpoint-dir", tmp_path)
    train = ("train", "--dataset-dir", small_mnist, "--run-name", "run", "--epochs", 1, "--seeds", 2, "--seed", 5)
    assert command(*train, *where)[0] == 0
    file = tmp_path / "run.safetensors"
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = command("export", "run", "--to", "safetensors", "--output", file, "--seed", 6, *where)
    assert (code, out) == (0, "")
    assert err.endswith(f"{tmp_path}/run, seed 6, after 10 steps is now {file}\n")
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    network, of_run = read_trained(file), load_trained_run(tmp_path / "run", None, pytest.fail, seed=6)[0]
    assert network.test_accuracy == metrics["seeds"]["test_accuracy"][1]
    assert network.training == Provenance(recipe="tutorial", epochs=1, seed=6, steps=10)
    np.testing.assert_array_equal(network.params["fc"]["kernel"], of_run.params["fc"]["kernel"])
    first = load_trained(tmp_path / "run", None, pytest.fail)
    assert (first.training.seed, first.test_accuracy) == (5, metrics["seeds"]["test_accuracy"][0])
    assert (first.params["fc"]["kernel"] != of_run.params["fc"]["kernel"]).any()
    code, _, err = command("export", "run", "--to", "safetensors", "--output", file, "--seed", 7, *where)
    assert (code, err) == (2, f"error: --seed 7: the run {tmp_path}/run has seeds 5 to 6\n")
    code, _, err = command("export", "run", "--to", "safetensors", "--output", tmp_path / "no" / "file", *where)
    assert code == 4
    assert "give another --output" in err
    monkeypatch.undo()
    pytest.importorskip("torch", reason="import-torch needs the extra torch")
    imported = ("--run-name", "imported", "--dataset-dir", small_mnist)
    assert command("import-torch", file, *imported, *where)[0] == 0
    back = load_trained(tmp_path / "imported", None, pytest.fail)
    np.testing.assert_array_equal(back.params["layer2"]["kernel"], network.params["layer2"]["kernel"])


def without_a_weight(tensors, metadata):
    del tensors["fc.bias"]


def of_another_shape(tensors, metadata):
    tensors["fc.bias"] = np.zeros(11, np.float32)


def not_finite(tensors, metadata):
    tensors["fc.bias"][3] = np.nan


def without_metadata(tensors, metadata):
    metadata.clear()


def with_metadata_of_another_kind(tensors, metadata):
    metadata["network"] = "[1, 2]"


def with_a_class_name_less(tensors, metadata):
    metadata["network"] = json.dumps(json.loads(metadata["network"]) | {"class_names": list("012345678")})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without_a_weight, "does not fit the network: fc.bias is missing"),
        (of_another_shape, "fc.bias has shape (11,), not (10,)"),
        (not_finite, "fc.bias holds values that are not finite"),
        (without_metadata, "is not a network of this program"),
        (with_metadata_of_another_kind, "is damaged or was edited"),
        (with_a_class_name_less, "is damaged or was edited (it has 9 class names for 10 classes)"),
    ],
)
def test_a_file_that_is_no_sound_network_is_refused(change, complaint, tmp_path):
    tensors = {name: array.copy() for name, array in load(PACKAGED.read_bytes()).items()}
    header = PACKAGED.read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    change(tensors, metadata)
    save_file(tensors, tmp_path / "changed.safetensors", metadata=metadata)
    with pytest.raises(InputFileError, match=re.escape(complaint)):
        read_trained(tmp_path / "changed.safetensors")


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x04\x95", PACKAGED.read_bytes()[:-100]])
def test_a_damaged_file_is_refused(content, tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(content)
    with pytest.raises(InputFileError, match="is not a network of this program"):
        read_trained(tmp_path / "damaged.safetensors")
