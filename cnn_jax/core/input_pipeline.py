"""How training images reach the devices: all of them at once, or those of a few steps ahead of the training."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32, UInt8

from cnn_jax.core.sharding import DATA, SEEDS, shard, to_host
from cnn_jax.core.training import SeedEpoch
from cnn_jax.data.dataset import Dataset, RecordedImages

# Bytes of images that are read at once for all seeds: 100 steps of the tutorial.
CHUNK_BYTES = 8 * 2**20
PREFETCH = 2  # chunks

# How images and labels are divided over the mesh: every device has all of them, or only its own.
RESIDENT, STREAMED = P(), P((SEEDS, DATA))


class Chunk(NamedTuple):
    """The images of a few steps of an epoch, or of all of them, on the devices.

    Attributes:
      epoch: The seeds' batches of these steps, (S, steps, N), which count in a device's images.
      images: The images, divided over the mesh by `RESIDENT` or `STREAMED`.
      labels: Their labels.
      first: The step of the epoch that row 0 of the batches belongs to.
      stop: The step after the last one.
    """

    epoch: SeedEpoch
    images: UInt8[Array, "m h w c"]
    labels: Int32[Array, " m"]
    first: int
    stop: int


# Returns the chunks of an epoch, beginning at one of its steps.
Feed = Callable[[SeedEpoch, int], Iterator[Chunk]]


def resident(dataset: Dataset, mesh: Mesh) -> Feed:
    """Put all training images on every device, from the start: an epoch is one chunk."""
    images, labels = shard((dataset.train_images, dataset.train_labels), mesh, RESIDENT)

    def chunks(epoch: SeedEpoch, first: int) -> Iterator[Chunk]:
        yield Chunk(epoch, images, labels, 0, epoch.batches.shape[1])

    return chunks


def streamed(dataset: Dataset, mesh: Mesh) -> Feed:
    """Read the images of the steps to come with Grain while the devices train.

    Each device gets the images of its own seeds and of its own share of each batch, and no others. Chunks have equal
    sizes; the last one is filled up.
    """
    import grain  # which most runs can start without

    def chunks(epoch: SeedEpoch, first: int) -> Iterator[Chunk]:
        batches = to_host(epoch.batches)
        steps = chunk_steps(batches.shape, dataset.train_images.shape[1:])
        source = _Chunks(dataset, batches[:, first:], steps, mesh)
        read = grain.MapDataset.source(source).to_iter_dataset(
            grain.ReadOptions(num_threads=PREFETCH, prefetch_buffer_size=PREFETCH)
        )
        for i, (images, labels, local) in enumerate(read):
            start = first + i * steps
            yield Chunk(epoch._replace(batches=local), images, labels, start, min(start + steps, batches.shape[1]))

    return chunks


def chunk_steps(batches: tuple[int, ...], image_shape: tuple[int, ...]) -> int:
    """Return how many steps a streamed chunk has, of an epoch's batches, (seeds, steps, batch size)."""
    return min(batches[1], max(1, CHUNK_BYTES // (batches[0] * batches[2] * math.prod(image_shape))))


class _Chunks:
    """What Grain reads: one after the other, the chunks of an epoch, already on their way to the devices."""

    def __init__(self, dataset: Dataset, batches: Int32[np.ndarray, "s steps n"], steps: int, mesh: Mesh):
        self._dataset = dataset
        self._batches = batches
        self._steps = steps
        self._mesh = mesh

    def __len__(self) -> int:
        return -(-self._batches.shape[1] // self._steps)

    def __getitem__(self, index: int) -> tuple[UInt8[Array, "m h w c"], Int32[Array, " m"], Int32[Array, "s steps n"]]:
        rows = self._batches[:, index * self._steps : (index + 1) * self._steps]
        rows = np.pad(rows, ((0, 0), (0, self._steps - rows.shape[1]), (0, 0)), constant_values=-1)
        seeds, steps, batch = rows.shape
        over_seeds, over_data = self._mesh.shape[SEEDS], self._mesh.shape[DATA]
        # Device by device: the images of its seeds, step by step, its share of each batch.
        shares = rows.reshape(over_seeds, seeds // over_seeds, steps, over_data, batch // over_data)
        wanted = shares.transpose(0, 3, 1, 2, 4).ravel()
        own = np.arange(wanted.size // (over_seeds * over_data), dtype=np.int32)
        own = np.tile(own.reshape(seeds // over_seeds, steps, batch // over_data), (over_seeds, 1, over_data))
        images = _Rows(self._dataset.train_images, wanted)
        labels = _Rows(self._dataset.train_labels, wanted)
        local_batches = np.where(rows >= 0, own, -1).astype(np.int32)
        return *shard((images, labels), self._mesh, STREAMED), shard(local_batches, self._mesh, P(SEEDS, None, DATA))


class _Rows:
    """Wanted rows of a source, read for each device when its shard is placed; -1 is a row of zeros."""

    def __init__(self, source: np.ndarray | RecordedImages, wanted: Int32[np.ndarray, " m"]):
        self._source = source
        self._wanted = wanted
        self.shape = (len(wanted), *source.shape[1:])

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        wanted = self._wanted[index[0]]
        is_there = wanted >= 0
        if is_there.all():
            return self._source[wanted]
        rows = np.zeros((len(wanted), *self._source.shape[1:]), self._source.dtype)
        rows[is_there] = self._source[wanted[is_there]]
        return rows
