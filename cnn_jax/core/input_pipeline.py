"""How training images reach the device: all of them at once, or a few steps' ahead of the training."""

import dataclasses
import math
from collections.abc import Iterator

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cnn_jax.core.sharding import DATA, SEEDS, place
from cnn_jax.data.dataset import Dataset
from cnn_jax.runtime.distributed import to_host

# Of images, in what is read at once for all seeds: 100 steps of the tutorial.
PIECE_BYTES = 8 * 2**20
PIECES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Piece:
    """The images of a few steps of an epoch, or of all of them, on the devices.

    Attributes:
      images: (num_examples, height, width, channels), uint8.
      labels: (num_examples,), int32.
      orders: (S, steps, N), int32: which of a device's images make up each batch; -1 for none.
      examples: How images and labels are divided over the mesh.
      first: The step of the epoch that row 0 of the orders is.
      stop: The step before which they end.
    """

    images: jax.Array
    labels: jax.Array
    orders: jax.Array
    examples: P
    first: int
    stop: int


class ResidentFeed:
    """All images on every device, from the start: an epoch is one piece."""

    def __init__(self, dataset: Dataset, mesh: Mesh):
        self._examples = place((dataset.train_images, dataset.train_labels), mesh, P())

    def pieces(self, orders: jax.Array, first: int) -> Iterator[Piece]:
        """Return the epoch whose orders, (S, steps, N), these are; `first` is the step at which training goes on."""
        yield Piece(*self._examples, orders, P(), 0, orders.shape[1])


class StreamFeed:
    """Only the images of the steps to come, which Grain reads from the data set while the device trains.

    Each device gets the images of its own seeds and of its own part of each batch, and no others.
    """

    def __init__(self, dataset: Dataset, mesh: Mesh):
        self._dataset = dataset
        self._mesh = mesh

    def pieces(self, orders: jax.Array, first: int) -> Iterator[Piece]:
        """Return an epoch from its step `first` on, in pieces of equal size, the last one filled up."""
        orders = to_host(orders)
        image_bytes = math.prod(self._dataset.train_images.shape[1:])
        steps = max(1, PIECE_BYTES // (orders.shape[0] * orders.shape[2] * image_bytes))
        steps = min(steps, orders.shape[1])
        source = _Pieces(self._dataset, orders[:, first:], steps, self._mesh)
        read = grain.MapDataset.source(source).to_iter_dataset(
            grain.ReadOptions(num_threads=PIECES_AHEAD, prefetch_buffer_size=PIECES_AHEAD)
        )
        for number, (images, labels, local_orders) in enumerate(read):
            start = first + number * steps
            stop = min(start + steps, orders.shape[1])
            yield Piece(images, labels, local_orders, P((SEEDS, DATA)), start, stop)


class _Pieces:
    """What Grain reads: one after the other, the pieces of an epoch, already on their way to the devices."""

    def __init__(self, dataset: Dataset, orders: np.ndarray, steps: int, mesh: Mesh):
        self._dataset = dataset
        self._orders = orders
        self._steps = steps
        self._mesh = mesh

    def __len__(self) -> int:
        return -(-self._orders.shape[1] // self._steps)

    def __getitem__(self, number: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows = self._orders[:, number * self._steps : (number + 1) * self._steps]
        rows = np.pad(rows, ((0, 0), (0, self._steps - rows.shape[1]), (0, 0)), constant_values=-1)
        seeds, steps, batch = rows.shape
        over_seeds, over_data = self._mesh.shape[SEEDS], self._mesh.shape[DATA]
        # Device by device: the images of its seeds, step by step, its part of each batch.
        parts = rows.reshape(over_seeds, seeds // over_seeds, steps, over_data, batch // over_data)
        wanted = parts.transpose(0, 3, 1, 2, 4).ravel()
        own = np.arange(wanted.size // (over_seeds * over_data), dtype=np.int32)
        own = np.tile(own.reshape(seeds // over_seeds, steps, batch // over_data), (over_seeds, 1, over_data))
        images = _Wanted(self._dataset.train_images, wanted)
        labels = _Wanted(self._dataset.train_labels, wanted)
        examples = place((images, labels), self._mesh, P((SEEDS, DATA)))
        return *examples, place(np.where(rows >= 0, own, -1).astype(np.int32), self._mesh, P(SEEDS, None, DATA))


class _Wanted:
    """Rows of a source in a wanted order, read for each device when its part is placed; -1 is a row of zeros."""

    def __init__(self, source: np.ndarray, wanted: np.ndarray):
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
