"""A run's weights as a file for other programs."""

from cnn_jax.config import ExportSettings
from cnn_jax.devices import start_devices
from cnn_jax.display import Display
from cnn_jax.network import load_network, write_network
from cnn_jax.pytorch.weights import params_to_torch, write_torch_file


def export(settings: ExportSettings) -> None:
    """Write a run's weights, the averaged ones if it has such, in the format that is wanted.

    Raises:
      UsageError: the run has no such seed.
      NoCheckpointError: there is no such run.
      StorageError: the file could not be written.
    """
    start_devices(None)
    display = Display()
    network = load_network(settings.run, settings.checkpoint_dir, settings.data_dir, display.say, settings.seed)
    if settings.to == "torch":
        write_torch_file(settings.output, params_to_torch(network.params, network.image_shape))
    else:
        write_network(network, settings.output)
    seed, steps = network.training["seed"], network.training["steps"]
    display.say(f"{settings.run_folder}, seed {seed}, after {steps:,} steps is now {settings.output}")
