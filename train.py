"""Train the tutorial's network on MNIST: `python train.py --epochs 15`, or `--help` for the settings."""

import sys

from cnn_jax.__main__ import train
from cnn_jax.command_line import read_settings
from cnn_jax.config import TrainSettings
from cnn_jax.errors import one_line_failures
from cnn_jax.signals import end_on_signals

if __name__ == "__main__":
    end_on_signals()
    with one_line_failures(debug="--debug" in sys.argv):
        train(read_settings(TrainSettings, sys.argv[1:], prog="train.py"))
