"""Streamed images give the same bits as resident ones, whoever reads them and wherever training goes on."""

import dataclasses
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks import more_than_memory
from cnn_jax.core import input_pipeline
from cnn_jax.core.input_pipeline import resident, streamed
from cnn_jax.core.sharding import make_mesh
from cnn_jax.data.dataset import Dataset, RecordedImages, hold_out
from cnn_jax.data.loading import load_dataset
from cnn_jax.data.published import numbers
from cnn_jax.runs.program import Sizes, make_program
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runtime.errors import InputFileError
from tests.helpers import TRAIN, assert_same_run

pytestmark = [pytest.mark.optax_promotes, pytest.mark.usefixtures("without_report")]


@pytest.fixture(scope="module")
def dataset(real_images):
    images, labels = real_images
    images, labels = images[:730, :, :, np.newaxis], labels[:730].astype(np.int32)
    return Dataset("some", images, labels, images[:10], labels[:10], numbers(10))


def epoch_of(dataset, seeds):
    """A mesh for seeds, and what they decide of an epoch of seven steps."""
    sizes = Sizes(train_examples=len(dataset.train_labels), image_shape=(28, 28, 1), num_classes=10)
    program = make_program(TrainSettings(seed=0, seeds=seeds), sizes, make_mesh(seeds, jax.devices()))
    return program.mesh, program.epoch(0)


def batches_of(feed, epoch, *, first):
    """Every batch from a step on, as a step would take it, on one device: images and labels, per seed."""
    taken = []
    for chunk in feed(epoch, first):
        images, labels, batches = np.asarray(chunk.images), np.asarray(chunk.labels), np.asarray(chunk.epoch.batches)
        for step in range(max(first, chunk.first), chunk.stop):
            rows = batches[:, step - chunk.first]
            assert (rows >= 0).all()
            taken.append((images[rows], labels[rows]))
    return taken


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_stream_brings_the_images_of_the_batches_from_any_step_on(dataset, monkeypatch, seeds, first):
    # Three steps: the last chunk is not full.
    monkeypatch.setattr(input_pipeline, "CHUNK_BYTES", 3 * seeds * 100 * 784)
    mesh, epoch = epoch_of(dataset, seeds)
    expected = batches_of(resident(dataset, mesh), epoch, first=first)
    read = batches_of(streamed(dataset, mesh), epoch, first=first)
    assert len(expected) == len(read) == 7 - first
    for (images, labels), (read_images, read_labels) in zip(expected, read, strict=True):
        np.testing.assert_array_equal(images, read_images)
        np.testing.assert_array_equal(labels, read_labels)


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--seeds", "2"), marks=pytest.mark.slow),
        pytest.param(("--recipe", "accurate"), marks=pytest.mark.slow),
    ],
    ids=["one", "seeds", "accurate"],
)
def test_a_streamed_run_ends_in_the_bits_of_a_resident_one(command, small_mnist, tmp_path, monkeypatch, options):
    monkeypatch.setattr(input_pipeline, "CHUNK_BYTES", 7 * 100 * 784)
    for kind in ("resident", "stream"):
        code, _, err = command(
            "train", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path / kind, "--run-name", "run",
            "--epochs", 2, "--feed", kind, "--features", 4, 8, *options,
        )  # fmt: skip
        assert code == 0, err
    assert_same_run(tmp_path / "stream" / "run", tmp_path / "resident" / "run")


@pytest.mark.slow
def test_a_stopped_stream_goes_on_in_the_middle_of_an_epoch(command, small_mnist, tmp_path):
    arguments = ["train", "--dataset-dir", small_mnist, "--run-name", "run", "--feed", "stream", "--features", 4, 8]
    assert command(*arguments, "--checkpoint-dir", tmp_path / "whole", "--epochs", 2)[0] == 0
    assert command(*arguments, "--checkpoint-dir", tmp_path / "cut", "--epochs", 1.4)[0] == 0
    code, _, err = command(*arguments, "--checkpoint-dir", tmp_path / "cut", "--epochs", 2)
    assert code == 0
    assert "continuing after step 14 of 20" in err
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
    mesh, epoch = epoch_of(dataset, 1)
    (chunk,) = streamed(dataset, mesh)(epoch, 0)
    assert chunk.images.sharding.spec == P(("seeds", "data"))
    assert len(chunk.labels) == 700
    assert jax.device_get(chunk.epoch.batches).max() == 699


def test_images_that_cannot_be_read_ahead_end_the_stream_with_their_own_error(dataset):
    def read(indices):
        raise InputFileError("some file was changed")

    mesh, epoch = epoch_of(dataset, 1)
    lost = dataclasses.replace(dataset, train_images=RecordedImages(read, dataset.train_images.shape))
    with pytest.raises(InputFileError, match="some file was changed"):
        next(streamed(lost, mesh)(epoch, 0))


@pytest.mark.slow(seconds=60)
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_stream_takes_no_more_memory_for_more_images_and_a_killed_one_continues_to_the_same_bits(
    tmp_path, monkeypatch
):
    # The small form of benchmarks/more_than_memory.py: here the larger set has 0.6 GB.
    monkeypatch.setattr(more_than_memory, "PROGRAM", (*TRAIN, "--features", "8", "16"))
    few, many = (more_than_memory.Case(count, "stream") for count in (10_000, 200_000))
    for case in (few, many):
        more_than_memory.make_set(tmp_path / str(case.images), case.images)
    data = tmp_path / str(many.images)
    of_few, of_many = more_than_memory.train_in_turn(
        [
            more_than_memory.Training(tmp_path / str(few.images), tmp_path / "few", few, steps=60),
            more_than_memory.Training(data, tmp_path / "many", many, steps=60),
        ]
    )
    for kind in ("resident_bytes", "anonymous_bytes"):
        assert of_many[kind] - of_few[kind] < 0.2 * many.images * np.prod(more_than_memory.IMAGE_SHAPE), kind
    more_than_memory.kill_and_continue(data, tmp_path / "killed", many, steps=60)
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "many" / "run")
