"""The commands: `python -m cnn_jax COMMAND`, installed as `cnn-jax`."""

import importlib.util
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from cnn_jax.config import CompareSettings, EvaluateSettings, TrainSettings, read_settings
from cnn_jax.data import check_batch_size, count_train_examples
from cnn_jax.errors import UsageError, one_line_failures

Command = (
    Annotated[TrainSettings, tyro.conf.subcommand("train")]
    | Annotated[EvaluateSettings, tyro.conf.subcommand("evaluate")]
    | Annotated[CompareSettings, tyro.conf.subcommand("compare")]
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


def compare(settings: CompareSettings) -> None:
    """Train in both frameworks and report how they differ."""
    require_torch()

    from cnn_jax.pytorch.compare import compare

    compare(settings)


def require_torch() -> None:
    """Refuse what needs PyTorch where it is not installed.

    Raises:
      UsageError: naming the extra.
    """
    if importlib.util.find_spec("torch") is None:
        raise UsageError("this command needs PyTorch: pip install 'cnn-jax[torch]'")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name, by default the program's own."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with one_line_failures(debug="--debug" in arguments):
        settings = read_settings(Command, arguments, prog="cnn-jax")
        if isinstance(settings, TrainSettings):
            train(settings)
        elif isinstance(settings, EvaluateSettings):
            evaluate(settings)
        else:
            compare(settings)


if __name__ == "__main__":
    main()
