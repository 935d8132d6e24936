"""Save one checkpoint, after which the oldest must be deleted: `python -m tests.fault_injection.save_once FOLDER`.

This is the process that is killed, or whose disk is filled, at each of its file operations in turn.
"""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from cnn_jax.core.training import TrainState
from cnn_jax.runs.checkpoint import open_checkpoints
from cnn_jax.runtime.errors import one_line_failures

STEPS = (10, 20, 30)
SAVED = 40


def content(step: int) -> tuple[TrainState, np.ndarray]:
    """Return a state and losses that differ from step to step."""
    generator = np.random.default_rng(step)
    kernel, losses = (generator.normal(size=size).astype(np.float32) for size in ((300, 10), (1, 20)))
    return TrainState(jnp.int32(step), {"kernel": jnp.asarray(kernel)}, opt_state=(), ema_params=None), losses


if __name__ == "__main__":
    with (
        one_line_failures(debug=False),
        open_checkpoints(Path(sys.argv[1]), writing=True, warn=print) as checkpoints,
    ):
        checkpoints.save(SAVED, *content(SAVED), {})
