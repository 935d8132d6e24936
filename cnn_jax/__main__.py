"""The commands: `python -m cnn_jax COMMAND`, installed as `cnn-jax`."""

from cnn_jax.cli.commands import program

if __name__ == "__main__":
    program()
