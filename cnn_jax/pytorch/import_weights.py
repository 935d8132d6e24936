"""Make a run from a file of PyTorch weights, after checking the file."""

import contextlib
import dataclasses
import warnings
import zipfile
from pathlib import Path

import jax
import numpy as np

from cnn_jax.core.sharding import make_mesh, of_seed
from cnn_jax.inference.torch_layout import SAVE_FLOAT32, params_from_torch
from cnn_jax.runs.checkpoint import open_checkpoints
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.program import Sizes, make_program, start_states
from cnn_jax.runs.restore import describe_run, load_run_data
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import InputFileError, UsageError, lacks_memory

MAXIMUM_BYTES = 2**30  # of a file, compressed or not; the tutorial's has 0.2 MiB
_SAVE = "save weights with torch.save(model.state_dict(), ...)"


def import_weights(file: Path, run: TrainSettings) -> None:
    """Make a run from a file of PyTorch's weights; its checkpoint is at step 0, with a new optimiser.

    Raises:
      InputFileError: the file does not hold this network's weights, naming each tensor that is wrong.
      UsageError: the run exists already.
    """
    tensors = read_torch_file(file)
    start_devices(run.platform)
    dataset = load_run_data(dataclasses.replace(run, batch_size=1))  # no step is taken, and any set will do
    run = dataclasses.replace(run, batch_size=min(run.batch_size, len(dataset.train_images)))
    program = make_program(run, Sizes.of(dataset, run), make_mesh(1, jax.devices()))
    states = jax.device_get(start_states(program))
    template = of_seed(states.params, 0)
    params = params_from_torch(tensors, template, dataset.train_images.shape[1:], source=file)
    states = states._replace(params=jax.tree.map(lambda leaf: np.asarray(leaf)[np.newaxis], params))
    losses = np.zeros((1, program.steps_per_epoch), np.float32)
    display, folder = Display(), RunFolder(run.run_folder)
    with folder.locked(), open_checkpoints(folder.checkpoints, writing=True, warn=display.say) as checkpoints:
        if checkpoints.latest_step() is not None:
            raise UsageError(f"the run {folder.path} already exists; give another --run-name")
        folder.write_settings(run)
        checkpoints.save(0, states, losses, describe_run(run, dataset))
    display.say(f"{file} is now the run {folder.path}")


def read_torch_file(file: Path) -> dict[str, np.ndarray]:
    """Read a PyTorch `state_dict`, or a safetensors file, whatever its name.

    Raises:
      InputFileError: the file is missing, damaged, too large, or holds something else; nothing in it is ever
        executed.
      UsageError: the extra `torch` is not installed.
    """
    if not file.is_file():
        raise InputFileError(f"{file} is not a file; give a PyTorch state_dict or a .safetensors file")
    try:
        _check_size_and_checksums(file)
        with file.open("rb") as stream:
            begin = stream.read(9)
        if not begin:
            raise InputFileError(f"{file} is empty; copy it again, or {_SAVE}")
        if file.suffix == ".safetensors" or begin[8:] == b"{":  # after the header's length, its JSON
            from safetensors.numpy import load_file

            try:
                return load_file(file)
            except AttributeError as error:  # it looks for NumPy's type of that name
                raise InputFileError(f"{file} holds tensors of {error.name}; {SAVE_FLOAT32}") from error
        import torch

        with warnings.catch_warnings(action="ignore"):  # of tensors that PyTorch no longer recommends
            content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise InputFileError(f"{file} holds no state_dict; {_SAVE}")
        return {name: _to_numpy(file, name, tensor) for name, tensor in content.items()}
    except ImportError as error:
        raise UsageError("PyTorch weights need an extra: pip install 'cnn-jax[torch]'") from error
    except InputFileError:
        raise
    except Exception as error:  # a damaged file raises one of a dozen types
        if lacks_memory(error):
            raise
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputFileError(
            f"{file} cannot be read as PyTorch weights ({type(error).__name__}: {reason}); {_SAVE}"
        ) from error


def _to_numpy(file, name, tensor):
    try:
        with warnings.catch_warnings(action="ignore"):  # of nested tensors
            return tensor.numpy(force=True)
    except (TypeError, RuntimeError) as error:  # what NumPy does not have: bfloat16, sparse, quantised, without data
        nested = ", nested" if tensor.is_nested else ""
        kind = f"{tensor.dtype}, {tensor.layout}{nested}, on {tensor.device}".replace("torch.", "")
        raise InputFileError(f"{file} holds {name} as {kind}; {SAVE_FLOAT32}") from error


def _check_size_and_checksums(file: Path) -> None:
    """Refuse a file that unpacks to too much, or whose parts do not match their checksums."""
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(file)) if zipfile.is_zipfile(file) else None
        size = file.stat().st_size if archive is None else sum(entry.file_size for entry in archive.infolist())
        if size > MAXIMUM_BYTES:
            raise InputFileError(f"{file} unpacks to {size:,} bytes, more than 1 GiB; give the weights of this network")
        # PyTorch writes a CRC-32 of each part of its archives and never checks it.
        if archive is not None and (part := archive.testzip()) is not None:
            raise InputFileError(f"{file} is damaged: its part {part} does not match its CRC-32; copy it again")
