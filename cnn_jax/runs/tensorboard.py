"""Each epoch's numbers as TensorBoard's scalars; the only file that knows tensorboardX."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from tensorboardX import SummaryWriter

from cnn_jax.runs.folder import EpochMetrics


class Scalars:
    """What writes them."""

    def __init__(self, writer: SummaryWriter):
        self._writer = writer

    def write(self, metrics: EpochMetrics) -> None:
        """Write an epoch: each number under its name in metrics.jsonl, those of several seeds one by one as well."""
        line = json.loads(metrics.to_json())
        for seed, values in enumerate(
            zip(metrics.cost, metrics.accuracy, strict=True) if len(metrics.cost) > 1 else ()
        ):
            line |= {f"seeds/{seed}/cost": values[0], f"seeds/{seed}/{metrics.tested_on}_accuracy": values[1]}
        for name, value in line.items():
            if name not in ("step", "seeds"):
                self._writer.add_scalar(name, value, metrics.step)
        self._writer.flush()


@contextlib.contextmanager
def open_scalars(folder: Path, *, after_step: int) -> Iterator[Scalars]:
    """Write to a folder; TensorBoard forgets what an earlier process wrote there of steps after `after_step`."""
    with SummaryWriter(str(folder), purge_step=after_step + 1) as writer:
        yield Scalars(writer)
