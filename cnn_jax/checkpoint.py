"""Checkpoints of a run's training state; the only file that knows Orbax."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from orbax.checkpoint.checkpoint_managers import preservation_policy

from cnn_jax.errors import NoCheckpointError, StorageError

KEPT_CHECKPOINTS = 3
ITEM = "default"  # Orbax's own name for what a step holds, where it holds one thing


class Checkpoints:
    """The newest checkpoints in a folder, each a training state and the losses of the epoch it is in.

    Attributes:
      folder: Where they are, one folder a step.
    """

    def __init__(self, folder: Path, manager: ocp.CheckpointManager):
        self.folder = folder
        self._manager = manager

    def latest_step(self) -> int | None:
        """Return the number of steps that the newest checkpoint has behind it, or None without one."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, losses: jax.Array) -> None:
        """Write a checkpoint and return when it is on the disk.

        Raises:
          StorageError: it could not be written; older checkpoints are still there.
        """
        try:
            self._manager.save(step, args=ocp.args.StandardSave({"state": state, "losses": losses}))
        except Exception as error:  # a full disk comes as any of several types
            raise StorageError(
                f"cannot write the checkpoint of step {step} in {self.folder} ({error}); "
                "make room there, then run the same command again to continue from the one before"
            ) from error

    def restore_latest(self, state: TrainState, losses: jax.Array) -> tuple[TrainState, jax.Array]:
        """Read the newest checkpoint.

        Args:
          state: A state of the types, shapes and devices that are wanted: arrays or `jax.ShapeDtypeStruct`s.
          losses: Likewise.

        Returns:
          The state and the losses that were saved.

        Raises:
          NoCheckpointError: there is none, or it cannot be read or has other shapes.
        """
        step = self.latest_step()
        if step is None:
            raise NoCheckpointError(f"{self.folder} holds no checkpoint; train the run first")
        template = jax.tree.map(_abstract, {"state": state, "losses": losses})
        try:
            # Compared first: Orbax notices another shape while it reads several arrays at once, and converts
            # another dtype in silence.
            differing = _shapes(template).items() ^ _shapes(self._manager.item_metadata(step).tree).items()
            if differing:
                raise ValueError(f"it holds other arrays: {', '.join(sorted({name for name, _ in differing}))}")
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(template))
        except Exception as error:  # Orbax raises ValueError, KeyError, FileNotFoundError and bare Exception
            raise NoCheckpointError(
                f"the checkpoint of step {step} in {self.folder} cannot be read ({error}); "
                f"move {self.folder / str(step)} away to use the one before, or start anew with --fresh"
            ) from error
        return restored["state"], restored["losses"]


@contextlib.contextmanager
def open_checkpoints(folder: Path, *, create: bool) -> Iterator[Checkpoints]:
    """Open a folder of checkpoints.

    Args:
      folder: Where they are.
      create: Make the folder if it is missing; otherwise it must be there.

    Raises:
      NoCheckpointError: the folder is missing and not to be made.
    """
    if not create and not folder.is_dir():
        raise NoCheckpointError(f"{folder} holds no checkpoint; train the run first")
    options = ocp.CheckpointManagerOptions(
        create=create,
        preservation_policy=preservation_policy.LatestN(KEPT_CHECKPOINTS),
        # A blocking save of this network takes about 30 ms: saving in the background would gain nothing.
        enable_async_checkpointing=False,
    )
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
        handlers.add(ITEM, args, ocp.StandardCheckpointHandler())
    with ocp.CheckpointManager(folder.resolve(), options=options, handler_registry=handlers) as manager:
        yield Checkpoints(folder, manager)


def _abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shapes(tree: object) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and dtype of every array of a tree, under its path: `state.params.fc.bias`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
