"""Each epoch's numbers as TensorBoard's scalars; the only file that knows tensorboardX."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tensorboardX import SummaryWriter

from cnn_jax.runs.folder import EpochMetrics


@contextlib.contextmanager
def open_scalars(folder: Path, *, after_step: int) -> Iterator[Callable[[EpochMetrics], None]]:
    """Return a function that writes an epoch's numbers to a folder, under their names in metrics.jsonl.

    The numbers of several seeds are written one by one, too. TensorBoard forgets what an earlier process wrote there of
    steps after `after_step`.
    """
    with SummaryWriter(str(folder), purge_step=after_step + 1) as writer:

        def write(metrics: EpochMetrics) -> None:
            line = json.loads(metrics.to_json())
            seeds = line.pop("seeds", {})
            line |= {f"seeds/{i}/{name}": value for name, values in seeds.items() for i, value in enumerate(values)}
            for name, value in line.items():
                if name != "step":
                    writer.add_scalar(name, value, metrics.step)
            writer.flush()

        yield write
