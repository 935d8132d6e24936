"""Train the tutorial's network on MNIST: `python train.py --epochs 15`, or `--help` for the settings.

What happens, in the order in which it is best read:

train.py                    this file
cnn_jax/cli/commands.py     train: the settings are read and checked, before JAX is imported
cnn_jax/runs/train.py       train_run: the run, from its data to its result; train_epoch: an epoch, segment by segment
cnn_jax/core/sharding.py    which device trains which seed, or which part of a batch
cnn_jax/core/training.py    run_steps: many steps in one compiled program; train_step: one of them, down to the loss
"""

from cnn_jax.__main__ import program

if __name__ == "__main__":
    program("train")
