"""Checkpoints of a run's training state, each with a digest of itself; the only file that knows Orbax."""

import collections
import contextlib
import errno
import gc
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Float32
from orbax.checkpoint.checkpoint_managers import preservation_policy
from orbax.checkpoint.options import MultiprocessingOptions

from cnn_jax.core.training import TrainState
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runtime.distributed import is_process_0, on_process_0
from cnn_jax.runtime.errors import ALLOW_LARGER, NoCheckpointError, StorageError, UsageError, lacks_access, lacks_memory
from cnn_jax.runtime.files import first_free, identity, require_in_place, sync, sync_tree

KEPT_CHECKPOINTS = 3
SCHEMA_VERSION = 4
# The losses of an epoch, of every seed.
Losses = Float32[np.ndarray, "s steps"]
STATE, META = "state", "meta"  # the two items of a checkpoint


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      state: The training state of every seed, on the host.
      losses: Those of the epoch that it is in, (S, steps per epoch).
      meta: What was saved with them, as it was given to `save`.
    """

    state: TrainState
    losses: Losses
    meta: dict


class Checkpoints:
    """The newest checkpoints in a folder, each a training state and the losses of the epoch it is in.

    Of several processes, all have one and call its methods together; process 0 alone reads and writes.

    Orbax's files carry no checksum, and it mistakes any directory named by a number for a step. So each step holds,
    beside the arrays, a SHA-256 of them and of all that was saved with them, and no step is used that has another: it
    is moved to `quarantine/` beside the steps, and the next older one is used.

    Attributes:
      folder: Where they are, one folder a step.
    """

    def __init__(
        self, folder: Path, manager: ocp.CheckpointManager | None, *, writing: bool, warn: Callable[[str], None]
    ):
        self.folder = folder
        self._orbax = manager
        self._identity = identity(folder)
        self._writing = writing
        self._warn = warn

    @property
    def _manager(self) -> ocp.CheckpointManager:
        assert self._orbax is not None, "process 0 alone reads and writes"
        return self._orbax

    @property
    def quarantine(self) -> Path:
        """Where steps go that cannot be used; nothing is deleted there."""
        return self.folder.with_name("quarantine")

    def latest_step(self) -> int | None:
        """Return the number of steps that the newest checkpoint has behind it, or None without one."""
        return on_process_0(self._latest_step)

    def _latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, losses: Losses, meta: dict) -> None:
        """Write a checkpoint and return when it is on the disk.

        Args:
          step: The number of steps that the state has taken.
          state: The state of every seed, on the host.
          losses: The losses of the epoch in progress.
          meta: What else to record, as JSON's types.

        Raises:
          StorageError: it could not be written, or the folder is no longer there; older checkpoints are still there.
        """
        on_process_0(self._save, step, {"state": state, "losses": losses}, meta)

    def _save(self, step: int, tree: dict, meta: dict) -> None:
        require_in_place(self.folder, self._identity)
        if not (at := self.folder / str(step)).is_dir() and os.path.lexists(at):
            self._leave_out(step, "it is no folder")  # Orbax would open it, and wait for ever if it is a pipe
        meta = {"schema": SCHEMA_VERSION, "step": step, **meta}
        meta["digest"] = digest(tree, meta)
        args = ocp.args.Composite(**{STATE: ocp.args.StandardSave(tree), META: ocp.args.JsonSave(meta)})
        with _quiet_orbax():
            try:
                self._manager.save(step, args=args)
                # Orbax leaves it to the system when its files reach the disk. A power cut before costs this step.
                sync_tree(self.folder / str(step))
                sync(self.folder)
                sync(self.folder.parent)
                return
            except Exception as error:  # a full disk comes as any of several types
                reason = _describe(error)
                remedy = ALLOW_LARGER if os.strerror(errno.EFBIG) in str(error) else "make room there"
                remedy = "allow more memory" if lacks_memory(error) else remedy
            _let_orbax_end()
            _remove_unfinished(self.folder)
        require_in_place(self.folder, self._identity)
        raise StorageError(
            f"cannot write the checkpoint of step {step} in {self.folder} ({reason}); "
            f"{remedy}, then run the same command again to continue from the one before"
        )

    def restore_latest(self, structure: Callable[[dict], TrainState]) -> Restored | None:
        """Read the newest checkpoint that is sound; move those aside that are newer and are not.

        Args:
          structure: Returns a state with the paths that a checkpoint's has, by what it recorded; the arrays' shapes and
            dtypes are those that were saved.

        Returns:
          What was saved, or None where nothing has ever been saved.

        Raises:
          NoCheckpointError: not one is sound.
          UsageError: `structure` raises it.
          StorageError: the machine refuses to read it, which is no damage.
        """
        return on_process_0(self._restore_latest, structure)

    def _restore_latest(self, structure: Callable[[dict], TrainState]) -> Restored | None:
        if not self._writing:  # another process may have saved some, and deleted others, since this was opened
            self._reload()
        damaged = False
        for step in sorted(self._manager.all_steps(), reverse=True):
            with _quiet_orbax():
                try:
                    return self._read(step, structure)
                except UsageError:
                    raise
                except Exception as error:  # Orbax raises ValueError, KeyError, FileNotFoundError and bare Exception
                    if lacks_memory(error):
                        raise
                    reason, refused = _describe(error), lacks_access(error)
                _let_orbax_end()
            if not self._writing and not (self.folder / str(step)).is_dir():  # its writer has newer ones
                return self._restore_latest(structure)
            if refused:
                raise StorageError(
                    f"cannot read the checkpoint of step {step} in {self.folder} ({reason}); "
                    "see to the permissions and limits, then run the same command again"
                )
            damaged = damaged or _holds_files(self.folder / str(step))
            self._leave_out(step, reason)
        quarantined = _holds_files(self.quarantine)
        if damaged or quarantined:
            where = f"what was damaged is in {self.quarantine}; " * quarantined
            raise NoCheckpointError(
                f"no checkpoint of {self.folder} is sound; {where}{RunFolder(self.folder.parent).anew}"
            )
        return None

    def _reload(self):
        with _quiet_orbax():
            self._manager.reload()

    def _read(self, step, structure):
        for path in (self.folder / str(step)).rglob("*"):
            if not path.is_file() and not path.is_dir():  # to open a pipe would wait for ever
                raise ValueError(f"{path.name} is no file")
        meta = self._manager.restore(step, args=ocp.args.Composite(**{META: ocp.args.JsonRestore()}))[META]
        if meta["schema"] not in (*EARLIER_STATES, SCHEMA_VERSION):
            raise ValueError(f"it has version {meta['schema']} of the format, not {SCHEMA_VERSION}")
        template = {"state": structure(meta), "losses": jax.ShapeDtypeStruct((), np.float32)}
        earlier = EARLIER_STATES.get(meta["schema"])
        if earlier is not None:
            template["state"] = earlier(*template["state"][: len(earlier._fields)])
        # Orbax converts another dtype in silence, so each array is asked for as it was saved.
        recorded = self._manager.item_metadata(step)[STATE]
        if recorded is None:
            raise ValueError("it does not say which arrays it holds")
        saved = _abstract(recorded.tree)
        wanted, form = jax.tree_util.tree_flatten_with_path(template)
        if differing := saved.keys() ^ {_name(path) for path, _ in wanted}:
            raise ValueError(f"it holds other arrays: {', '.join(sorted(differing))}")
        template = jax.tree.unflatten(form, [saved[_name(path)] for path, _ in wanted])
        args = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(template)})
        tree = self._manager.restore(step, args=args)[STATE]
        right = meta.pop("digest")
        if meta["step"] != step or digest(tree, meta) != right:
            raise ValueError("its bytes are not those that were saved")
        state = TrainState(*tree["state"])
        state, losses = jax.device_get((state, tree["losses"]))
        return Restored(state, losses, meta)

    def _leave_out(self, step, reason):
        if not self._writing:  # it may be another process's, which is writing or deleting it just now
            self._warn(f"the checkpoint of step {step} is damaged ({reason}); it is left out")
            return
        self.quarantine.mkdir(exist_ok=True)
        names = itertools.chain([str(step)], (f"{step}-{n}" for n in itertools.count(1)))
        aside = first_free(self.quarantine / name for name in names)
        (self.folder / str(step)).rename(aside)
        self._reload()
        self._warn(f"the checkpoint of step {step} is damaged ({reason}); it is now {aside}")


def _holds_files(folder: Path) -> bool:
    return any(path.is_file() for path in folder.rglob("*"))


# The training state as earlier formats named its fields, which the paths in a digest are made of.
EARLIER_STATES = {
    2: collections.namedtuple("TrainState2", "step params opt_state average"),
    3: collections.namedtuple("TrainState3", "step params opt_state ema_params"),
}


@contextlib.contextmanager
def open_checkpoints(folder: Path, *, writing: bool, warn: Callable[[str], None]) -> Iterator[Checkpoints]:
    """Open a folder of checkpoints.

    Args:
      folder: Where they are.
      writing: Make the folder if it is missing, and change what is in it; otherwise nothing in it is touched.
      warn: Called with a line for each damaged checkpoint.

    Raises:
      NoCheckpointError: the folder is missing and not to be made.
    """
    if not is_process_0():
        yield Checkpoints(folder, None, writing=writing, warn=warn)
        return
    if not writing and not folder.is_dir():
        raise NoCheckpointError(f"{folder} holds no checkpoint; train the run first")
    if writing:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
        handlers.add(STATE, args, ocp.StandardCheckpointHandler())
    for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
        handlers.add(META, args, ocp.JsonCheckpointHandler())
    with _quiet_orbax():  # it warns of what `read_only` cannot do, and reads the metadata of every step
        options = ocp.CheckpointManagerOptions(
            create=False,
            read_only=not writing,
            preservation_policy=preservation_policy.LatestN(KEPT_CHECKPOINTS),
            # A blocking save of this network takes about 30 ms: saving in the background would gain nothing.
            enable_async_checkpointing=False,
            # Only process 0 opens the checkpoints: it must not wait for the others.
            multiprocessing_options=MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="cnn-jax")
            if jax.process_count() > 1
            else MultiprocessingOptions(),
        )
        manager = ocp.CheckpointManager(folder.resolve(), options=options, handler_registry=handlers)
    with manager:
        yield Checkpoints(folder, manager, writing=writing, warn=warn)


def digest(tree: object, meta: dict) -> str:
    """Return the SHA-256, in hexadecimal, over the path, dtype, shape and bytes of every leaf, and over `meta`."""
    sha256 = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        sha256.update(f"\n{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        sha256.update(array.tobytes())
    return sha256.hexdigest()


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keep Orbax from telling of each thread that fails with what it reads: the failure itself is raised."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in ("absl", "asyncio")}
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def _remove_unfinished(folder: Path) -> None:
    """Remove what a kill or a full disk left half written; Orbax would, in a thread that may outlive the manager."""
    for begun in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(begun, ignore_errors=True)


def _let_orbax_end() -> None:
    """Wait for what Orbax had begun beside what failed: it complains when it ends, and again when it is collected."""
    time.sleep(0.05)
    gc.collect()


def _describe(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder="...") or type(error).__name__


def _abstract(tree: object) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and dtype of every array of a tree, under its name, to be read to one device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        _name(path): jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype, sharding=sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _name(path: jax.tree_util.KeyPath) -> str:
    """Return an array's path in a tree: `state.params.fc.bias`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
