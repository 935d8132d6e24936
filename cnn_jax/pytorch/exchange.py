"""Runs made of PyTorch's weights, and runs' weights given to PyTorch."""

import jax
import numpy as np

from cnn_jax.checkpoint import open_checkpoints
from cnn_jax.config import ExportSettings, ImportTorchSettings
from cnn_jax.devices import start_devices
from cnn_jax.display import Display
from cnn_jax.errors import UsageError
from cnn_jax.parallel import make_mesh
from cnn_jax.pytorch.weights import params_from_torch, params_to_torch, read_torch_file, write_torch_file
from cnn_jax.run import describe_run, initial_states, load_run_data, restore_run
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
    train_examples = len(dataset.train_labels)
    states = jax.device_get(initial_states(run, dataset, train_examples, make_mesh(1)))
    template = jax.tree.map(lambda leaf: leaf[0], states.params)
    params = params_from_torch(tensors, template, dataset.train_images.shape[1:], source=settings.file)
    states = states.replace(params=jax.tree.map(lambda leaf: np.asarray(leaf)[np.newaxis], params))
    losses = np.zeros((1, train_examples // run.batch_size), np.float32)
    display, folder = Display(), RunFolder(run.run_folder)
    with folder.locked(), open_checkpoints(folder.checkpoints, writing=True, warn=display.say) as checkpoints:
        if checkpoints.latest_step() is not None:
            raise UsageError(f"the run {folder.path} is there already; give another --run-name")
        folder.write_settings(run)
        checkpoints.save(0, states, losses, describe_run(run, dataset))
    display.say(f"{settings.file} is now the run {folder.path}")


def export(settings: ExportSettings) -> None:
    """Write a run's weights, the averaged ones if it has such, as PyTorch's `state_dict`.

    Raises:
      UsageError: the run has no such seed.
      NoCheckpointError: there is no such run.
      StorageError: the file could not be written.
    """
    start_devices(None)
    display, folder = Display(), RunFolder(settings.run_folder)
    run, states, dataset = restore_run(folder, settings.data_dir, display.say)
    seed = run.seed if settings.seed is None else settings.seed
    if not run.seed <= seed < run.seed + run.seeds:
        raise UsageError(f"--seed {seed}: the run {folder.path} has the seeds {run.seed} to {run.seed + run.seeds - 1}")
    params = jax.tree.map(lambda leaf: np.asarray(leaf[seed - run.seed]), states.tested_params)
    write_torch_file(settings.output, params_to_torch(params, dataset.train_images.shape[1:]))
    display.say(f"{folder.path}, seed {seed}, after {int(states.step[0]):,} steps is now {settings.output}")
