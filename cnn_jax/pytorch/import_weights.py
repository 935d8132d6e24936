"""Runs made of PyTorch's weights."""

from pathlib import Path

import jax
import numpy as np

from cnn_jax.core.sharding import make_mesh, of_seed
from cnn_jax.inference.torch_layout import params_from_torch, read_torch_file
from cnn_jax.runs.checkpoint import open_checkpoints
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.program import Sizes, make_program
from cnn_jax.runs.restore import describe_run, load_run_data
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import UsageError


def import_weights(file: Path, run: TrainSettings) -> None:
    """Make a run of a file of PyTorch's weights: its checkpoint is at step 0, with a new optimiser.

    Raises:
      InputFileError: the file is not what it should be, naming each tensor that is wrong.
      UsageError: the run is there already.
    """
    tensors = read_torch_file(file)
    start_devices(run.platform)
    dataset = load_run_data(run)
    program = make_program(run, Sizes.of(dataset, run), make_mesh(1, jax.devices()))
    states = jax.device_get(program.start())
    template = of_seed(states.params, 0)
    params = params_from_torch(tensors, template, dataset.train_images.shape[1:], source=file)
    states = states._replace(params=jax.tree.map(lambda leaf: np.asarray(leaf)[np.newaxis], params))
    losses = np.zeros((1, program.steps_per_epoch), np.float32)
    display, folder = Display(), RunFolder(run.run_folder)
    with folder.locked(), open_checkpoints(folder.checkpoints, writing=True, warn=display.say) as checkpoints:
        if checkpoints.latest_step() is not None:
            raise UsageError(f"the run {folder.path} is there already; give another --run-name")
        folder.write_settings(run)
        checkpoints.save(0, states, losses, describe_run(run, dataset))
    display.say(f"{file} is now the run {folder.path}")
