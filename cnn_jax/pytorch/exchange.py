"""Runs made of PyTorch's weights, and runs' weights given to PyTorch."""

import jax.numpy as jnp

from cnn_jax.checkpoint import open_checkpoints
from cnn_jax.config import ExportSettings, ImportTorchSettings
from cnn_jax.devices import start_devices
from cnn_jax.display import Display
from cnn_jax.errors import UsageError
from cnn_jax.pytorch.weights import params_from_torch, params_to_torch, read_torch_file, write_torch_file
from cnn_jax.run import describe_run, initial_state, load_run_data, restore_run
from cnn_jax.run_folder import RunFolder


def import_torch(settings: ImportTorchSettings) -> None:
    """Make a run of a file of PyTorch's weights: its checkpoint is at step 0, with a new optimiser.

    Raises:
      InputFileError: the file is not what it should be, naming each tensor that is wrong.
      UsageError: the run is there already.
    """
    run = settings.train_settings
    tensors = read_torch_file(settings.file)
    start_devices(None)
    dataset = load_run_data(run)
    state, losses = initial_state(run, dataset)
    params = params_from_torch(tensors, state.params, dataset.train_images.shape[1:], source=settings.file)
    state = state.replace(
        params={layer: {k: jnp.asarray(v) for k, v in weights.items()} for layer, weights in params.items()}
    )
    display, folder = Display(), RunFolder(run.run_folder)
    with folder.locked(), open_checkpoints(folder.checkpoints, writing=True, warn=display.say) as checkpoints:
        if checkpoints.latest_step() is not None:
            raise UsageError(f"the run {folder.path} is there already; give another --run-name")
        folder.write_settings(run)
        checkpoints.save(0, state, losses, describe_run(run, dataset))
    display.say(f"{settings.file} is now the run {folder.path}")


def export(settings: ExportSettings) -> None:
    """Write a run's weights as PyTorch's `state_dict`.

    Raises:
      NoCheckpointError: there is no such run.
      StorageError: the file could not be written.
    """
    start_devices(None)
    display, folder = Display(), RunFolder(settings.run_folder)
    state, dataset = restore_run(folder, settings.data_dir, display.say)
    write_torch_file(settings.output, params_to_torch(state.params, dataset.train_images.shape[1:]))
    display.say(f"{folder.path} after {int(state.step):,} steps is now {settings.output}")
