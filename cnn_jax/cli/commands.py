"""The commands: `python -m cnn_jax COMMAND`, installed as `cnn-jax`."""

import importlib.util
import logging
import sys
from collections.abc import Sequence

from cnn_jax.cli.parser import read_command
from cnn_jax.data.dataset import check_sizes, count_train_examples
from cnn_jax.runs.settings import (
    BenchmarkSettings,
    CompareSettings,
    DemoSettings,
    EvaluateSettings,
    ExportSettings,
    ImportTorchSettings,
    InspectSettings,
    PredictSettings,
    ReportSettings,
    SweepSettings,
    TrainSettings,
)
from cnn_jax.runtime.errors import UsageError, one_line_failures
from cnn_jax.runtime.signals import end_on_signals

COMMANDS = {
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "inspect": InspectSettings,
    "report": ReportSettings,
    "predict": PredictSettings,
    "demo": DemoSettings,
    "export": ExportSettings,
    "sweep": SweepSettings,
    "import-torch": ImportTorchSettings,
    "compare": CompareSettings,
    "benchmark": BenchmarkSettings,
}

# The packages that an exported file takes to be written or tested, and the extra that brings each.
EXPORT_NEEDS = {
    "onnx": {"onnx": "export", "onnxruntime": "export"},
    "stablehlo": {"flatbuffers": "export"},
    "safetensors": {},
    "torch": {"torch": "torch"},
}


def train(settings: TrainSettings) -> None:
    """Train a run; wrong settings are refused before JAX, which takes a second to import, is touched."""
    if settings.run.tensorboard:
        require("tensorboardX", extra="tensorboard")
    train_examples = count_train_examples(settings.dataset, settings.dataset_dir, settings.common.data_dir)
    if train_examples is not None:
        check_sizes(settings.batch_size, settings.validation, train_examples)
    logging.basicConfig(level=settings.run.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")

    from cnn_jax.runs.train import train_run

    train_run(settings)


def require(package: str, *, extra: str) -> None:
    """Refuse what needs a package that is not installed.

    Raises:
      UsageError: naming the extra that brings it.
    """
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"this needs {package}, which is not installed: pip install 'cnn-jax[{extra}]'")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name, by default the program's own."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with one_line_failures(debug="--debug" in arguments):
        run_command(read_command(COMMANDS, arguments, prog="cnn-jax"))


def run_command(settings: object) -> None:
    """Run the command whose settings these are; each imports what it needs."""
    if isinstance(settings, TrainSettings):
        train(settings)
    elif isinstance(settings, EvaluateSettings):
        from cnn_jax.runs.restore import evaluate_run

        evaluate_run(
            settings.common.run_folder(settings.run),
            unscaled=settings.unscaled,
            data_dir=settings.common.data_dir,
            platform=settings.common.platform,
        )
    elif isinstance(settings, InspectSettings):
        from cnn_jax.analysis.layers import inspect_run

        inspect_run(
            settings.common.run_folder(settings.run),
            data_dir=settings.common.data_dir,
            platform=settings.common.platform,
        )
    elif isinstance(settings, ReportSettings):
        from cnn_jax.analysis.report import report_run

        report_run(
            settings.common.run_folder(settings.run),
            settings.output,
            data_dir=settings.common.data_dir,
            platform=settings.common.platform,
        )
    elif isinstance(settings, PredictSettings):
        from cnn_jax.inference.predict import predict

        predict(
            settings.images,
            settings.common.run_folder(settings.run),
            as_json=settings.json,
            data_dir=settings.common.data_dir,
            platform=settings.common.platform,
        )
    elif isinstance(settings, ExportSettings):
        for package, extra in EXPORT_NEEDS[settings.to].items():
            require(package, extra=extra)
        from cnn_jax.inference.export import export

        export(
            settings.to,
            settings.output,
            settings.common.run_folder(settings.run),
            seed=settings.seed,
            data_dir=settings.common.data_dir,
            platform=settings.common.platform,
        )
    elif isinstance(settings, DemoSettings):
        require("gradio", extra="demo")
        from cnn_jax.inference.demo import demo

        demo(
            settings.common.run_folder(settings.run),
            host=settings.host,
            port=settings.port,
            data_dir=settings.common.data_dir,
            platform=settings.common.platform,
        )
    elif isinstance(settings, SweepSettings):
        require("optuna", extra="sweep")
        from cnn_jax.runs.sweep import sweep

        sweep(settings)
    else:
        require("torch", extra="torch")
        if isinstance(settings, ImportTorchSettings):
            from cnn_jax.pytorch.import_weights import import_weights

            import_weights(settings.file, settings.train_settings)
        elif isinstance(settings, CompareSettings):
            from cnn_jax.pytorch.compare import compare

            compare(
                seeds=settings.seeds,
                seed=settings.seed,
                epochs=settings.epochs,
                output=settings.output,
                data_dir=settings.common.data_dir,
            )
        else:
            from cnn_jax.pytorch.benchmark import benchmark

            benchmark(rounds=settings.rounds, output=settings.output, data_dir=settings.common.data_dir)


def program() -> None:
    """Run the command of a process of its own: `main`, ended by signals in one line."""
    end_on_signals()
    main()
