"""The commands: `python -m cnn_jax COMMAND`, installed as `cnn-jax`."""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from cnn_jax.config import EvaluateSettings, TrainSettings, read_settings
from cnn_jax.data import check_batch_size, count_train_examples
from cnn_jax.errors import one_line_failures

Command = (
    Annotated[TrainSettings, tyro.conf.subcommand("train")]
    | Annotated[EvaluateSettings, tyro.conf.subcommand("evaluate")]
)


def train(settings: TrainSettings) -> None:
    """Train a run; wrong settings are refused before JAX, which takes a second to import, is touched."""
    train_examples = count_train_examples(settings.dataset, settings.dataset_dir, settings.data_dir)
    check_batch_size(settings.batch_size, train_examples)

    from cnn_jax.run import train_run

    train_run(settings)


def evaluate(settings: EvaluateSettings) -> None:
    """Test a run's newest checkpoint."""
    from cnn_jax.run import evaluate_run

    evaluate_run(settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name, by default the program's own."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with one_line_failures(debug="--debug" in arguments):
        settings = read_settings(Command, arguments, prog="cnn-jax")
        if isinstance(settings, TrainSettings):
            train(settings)
        else:
            evaluate(settings)


if __name__ == "__main__":
    main()
