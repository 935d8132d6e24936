"""Streamed images give the same bits as resident ones, whoever reads them and wherever training goes on."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cnn_jax.core import input_pipeline
from cnn_jax.core.input_pipeline import ResidentFeed, StreamFeed
from cnn_jax.core.sharding import epoch_orders, make_mesh, seed_keys
from cnn_jax.data.dataset import Dataset, RecordedImages, hold_out, load_dataset
from tests.runs.test_train import assert_same_run

pytestmark = pytest.mark.optax_promotes


@pytest.fixture(scope="module")
def dataset(real_images):
    images, labels = real_images
    images, labels = images[:730, :, :, np.newaxis], labels[:730].astype(np.int32)
    return Dataset("some", images, labels, images[:10], labels[:10], 10)


def batches_of(feed_, orders, *, first):
    """Every batch from a step on, as a step would take it, on one device: images and labels, per seed."""
    taken = []
    for piece in feed_.pieces(orders, first):
        images, labels, local = np.asarray(piece.images), np.asarray(piece.labels), np.asarray(piece.orders)
        for step in range(max(first, piece.first), piece.stop):
            rows = local[:, step - piece.first]
            assert (rows >= 0).all()
            taken.append((images[rows], labels[rows]))
    return taken


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_stream_brings_the_images_of_the_order_from_any_step_on(dataset, monkeypatch, seeds, first):
    monkeypatch.setattr(input_pipeline, "PIECE_BYTES", 3 * seeds * 100 * 784)  # three steps: the last piece is not full
    mesh = make_mesh(seeds)
    _, order_keys, _ = seed_keys(np.arange(seeds, dtype=np.uint32), mesh)
    orders = epoch_orders(order_keys, 0, num_examples=730, batch_size=100, mesh=mesh)
    resident = batches_of(ResidentFeed(dataset, mesh), orders, first=first)
    streamed = batches_of(StreamFeed(dataset, mesh), orders, first=first)
    assert len(resident) == len(streamed) == 7 - first
    for (images, labels), (streamed_images, streamed_labels) in zip(resident, streamed, strict=True):
        np.testing.assert_array_equal(images, streamed_images)
        np.testing.assert_array_equal(labels, streamed_labels)


@pytest.mark.parametrize("options", [(), ("--seeds", "2"), ("--recipe", "accurate")], ids=["one", "seeds", "accurate"])
def test_a_streamed_run_ends_in_the_bits_of_a_resident_one(command, small_mnist, tmp_path, monkeypatch, options):
    monkeypatch.setattr(input_pipeline, "PIECE_BYTES", 7 * 100 * 784)
    for kind in ("resident", "stream"):
        code, _, err = command(
            "train", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path / kind, "--run-name", "run",
            "--epochs", 2, "--feed", kind, *options,
        )  # fmt: skip
        assert code == 0, err
    assert_same_run(tmp_path / "stream" / "run", tmp_path / "resident" / "run")


def test_a_stopped_stream_goes_on_in_the_middle_of_an_epoch(command, small_mnist, tmp_path):
    arguments = ["train", "--dataset-dir", small_mnist, "--run-name", "run", "--feed", "stream"]
    assert command(*arguments, "--checkpoint-dir", tmp_path / "whole", "--epochs", 2)[0] == 0
    assert command(*arguments, "--checkpoint-dir", tmp_path / "cut", "--epochs", 1.35)[0] == 0
    code, _, err = command(*arguments, "--checkpoint-dir", tmp_path / "cut", "--epochs", 2)
    assert code == 0
    assert "continuing after step 27 of 40" in err
    assert_same_run(tmp_path / "cut" / "run", tmp_path / "whole" / "run")


def test_a_set_larger_than_its_share_of_memory_stays_on_the_disk(tfds_folder):
    whole = load_dataset("mnist", None, tfds_folder)
    recorded = load_dataset("mnist", None, tfds_folder, resident_bytes=10**6)
    assert isinstance(whole.train_images, np.ndarray)
    assert isinstance(recorded.train_images, RecordedImages)
    wanted = np.array([59_999, 0, 7, 7])
    np.testing.assert_array_equal(recorded.train_images[wanted], whole.train_images[wanted])
    np.testing.assert_array_equal(recorded.train_labels, whole.train_labels)
    np.testing.assert_array_equal(recorded.test_images, whole.test_images)
    _, images, labels = hold_out(recorded, 100)
    np.testing.assert_array_equal(images, whole.train_images[-100:])
    np.testing.assert_array_equal(labels, whole.train_labels[-100:])


def test_each_device_gets_its_own_images_and_no_others(dataset):
    mesh = make_mesh(1)
    orders = epoch_orders(seed_keys(np.zeros(1, np.uint32), mesh)[1], 0, num_examples=730, batch_size=100, mesh=mesh)
    (piece,) = StreamFeed(dataset, mesh).pieces(orders, 0)
    assert piece.examples == P(("seeds", "data"))
    assert len(piece.labels) == 700
    assert jax.device_get(piece.orders).max() == 699
