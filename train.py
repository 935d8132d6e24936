"""Train the tutorial's network on MNIST: `python train.py --epochs 15`, or `--help` for the settings."""

import sys

from cnn_jax.cli.commands import train
from cnn_jax.cli.parser import read_settings
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runtime.errors import one_line_failures
from cnn_jax.runtime.signals import end_on_signals

if __name__ == "__main__":
    end_on_signals()
    with one_line_failures(debug="--debug" in sys.argv):
        train(read_settings(TrainSettings, sys.argv[1:], prog="train.py"))
