"""The commands: `python -m cnn_jax COMMAND`, installed as `cnn-jax`.

Each is a function that imports what it needs when it runs: what is wrong on a command line is said before JAX, whose
import takes a second, is touched.
"""

import dataclasses
import importlib.util
import itertools
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cnn_jax.cli.parser import Command, parse, parse_command
from cnn_jax.data.dataset import check_sizes, count_train_examples
from cnn_jax.runs.settings import (
    AT_LEAST_1,
    POSITIVE,
    RUNS,
    CheckpointDir,
    DataDir,
    DatasetName,
    Must,
    Option,
    PlatformName,
    RecipeName,
    TrainSettings,
    require,
)
from cnn_jax.runtime.errors import UsageError, one_line_failures
from cnn_jax.runtime.signals import end_on_signals

RUN_HELP, PACKAGED = "A run's folder, or its name in --checkpoint-dir.", "the network in the package"
Run = Annotated[str, Option(RUN_HELP, "RUN")]
OptionalRun = Annotated[str | None, Option(RUN_HELP, "[RUN]", PACKAGED)]
OtherDataset = Annotated[Path | None, Option("A folder of four IDX files to use in place of --dataset.", "DIR")]


def train(settings: TrainSettings) -> None:
    """Train the tutorial's network; the same command continues an unfinished run.

    Examples:
      python train.py --epochs 15
      python train.py --recipe fast --seeds 10 --validation 5000
      python train.py --dataset-dir fashion-mnist --run-name fashion
    """
    if settings.tensorboard:
        need("tensorboardX", extra="tensorboard")
    train_examples = count_train_examples(settings.dataset, settings.dataset_dir, settings.data_dir)
    if train_examples is not None:
        check_sizes(settings.batch_size, settings.validation, train_examples)
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")

    from cnn_jax.runs.train import train_run

    train_run(settings)


def evaluate(
    run: Run,
    *,
    unscaled: Annotated[
        bool, Option("Test on pixels in 0..255, as the tutorial does, though it trained on [0, 1].")
    ] = False,
    data_dir: DataDir = None,
    checkpoint_dir: CheckpointDir = RUNS,
    platform: PlatformName = None,
) -> None:
    """Test a run's newest checkpoint on all test images of its data set.

    Examples:
      cnn-jax evaluate mnist-seed777
      cnn-jax evaluate mnist-seed777 --unscaled
    """
    from cnn_jax.runs.restore import evaluate_run

    evaluate_run(folder_of(run, checkpoint_dir), unscaled=unscaled, data_dir=data_dir, platform=platform)


def inspect(
    run: Run, *, data_dir: DataDir = None, checkpoint_dir: CheckpointDir = RUNS, platform: PlatformName = None
) -> None:
    """List the layers of a run's network, and draw what it has learned.

    Examples:
      cnn-jax inspect mnist-seed777
    """
    from cnn_jax.analysis.layers import inspect_run

    inspect_run(folder_of(run, checkpoint_dir), data_dir=data_dir, platform=platform)


def report(
    run: Run,
    *,
    output: Annotated[Path | None, Option("The file to write.", "FILE", "report.html in the run's folder")] = None,
    data_dir: DataDir = None,
    checkpoint_dir: CheckpointDir = RUNS,
    platform: PlatformName = None,
) -> None:
    """Write an HTML page about a run: its results, settings and pictures.

    Examples:
      cnn-jax report mnist-seed777
      cnn-jax report mnist-seed777 --output report.html
    """
    from cnn_jax.analysis.report import report_run

    report_run(folder_of(run, checkpoint_dir), output, data_dir=data_dir, platform=platform)


def predict(
    images: Annotated[
        tuple[str, ...],
        Option("PNG or JPEG files of one digit each, folders of them, or -: standard input.", "IMAGE..."),
    ],
    *,
    run: Annotated[str | None, Option(RUN_HELP, "RUN", PACKAGED)] = None,
    json: Annotated[bool, Option("Write an array of objects with file, digit and probabilities.")] = False,
    data_dir: DataDir = None,
    checkpoint_dir: CheckpointDir = RUNS,
    platform: PlatformName = None,
) -> None:
    """Say which digit each picture shows: stdout gets a line a file.

    Examples:
      cnn-jax predict photo.jpg
      cnn-jax predict scans/ --json
      cat photo.png | cnn-jax predict - --run mnist-seed777
    """
    from cnn_jax.inference.predict import predict

    predict(images, folder_of(run, checkpoint_dir), as_json=json, data_dir=data_dir, platform=platform)


def demo(
    run: OptionalRun = None,
    *,
    port: Annotated[
        int, Option("Where the page is.", "N"), Must(lambda port: 1 <= port <= 65535, "from 1 to 65535")
    ] = 7860,
    host: Annotated[
        str, Option("From where it can be reached: 127.0.0.1 is this machine, 0.0.0.0 everywhere.", "ADDRESS")
    ] = "127.0.0.1",
    data_dir: DataDir = None,
    checkpoint_dir: CheckpointDir = RUNS,
    platform: PlatformName = None,
) -> None:
    """Serve a page to draw digits on, and show what the network makes of them while they are drawn.

    Examples:
      cnn-jax demo
      cnn-jax demo mnist-seed777 --port 8000
    """
    need("gradio", extra="demo")
    from cnn_jax.inference.demo import demo

    demo(folder_of(run, checkpoint_dir), host=host, port=port, data_dir=data_dir, platform=platform)


def export(
    run: OptionalRun = None,
    *,
    to: Annotated[
        Literal["onnx", "stablehlo", "safetensors", "torch"],
        Option("onnx or stablehlo (programs from pixels to logits), safetensors or torch (weights).", "FORMAT"),
    ],
    output: Annotated[Path, Option("The file to write.", "FILE")],
    seed: Annotated[int | None, Option("Of a run of several seeds, whose weights.", "N", "the first")] = None,
    data_dir: DataDir = None,
    checkpoint_dir: CheckpointDir = RUNS,
    platform: PlatformName = None,
) -> None:
    """Write a network to a file for another program; it is kept only if it computes the same there.

    Examples:
      cnn-jax export --to onnx --output mnist.onnx
      cnn-jax export mnist-seed777 --to torch --output model.pt
    """
    if to == "torch":
        need("torch", extra="torch")
    elif to == "onnx":
        need("onnx", "onnxruntime", extra="export")
    elif to == "stablehlo":
        need("flatbuffers", extra="export")
    from cnn_jax.inference.export import export

    export(to, output, folder_of(run, checkpoint_dir), seed=seed, data_dir=data_dir, platform=platform)


def sweep(
    *,
    study: Annotated[
        str, Option("The search's folder in --checkpoint-dir: its trials, SQLite file and plots.", "NAME")
    ] = "sweep",
    trials: Annotated[int, Option("Trials in all, by however many processes and commands.", "N"), AT_LEAST_1] = 30,
    epochs: Annotated[
        float, Option("Passes over the training set in each trial.", "N"), POSITIVE._replace(form="g")
    ] = 2,
    learning_rate: Annotated[
        tuple[float, float],
        Option("The range to search, on a logarithmic scale.", "LOW HIGH"),
        Must(lambda between: 0 < between[0] <= between[1] < math.inf, "two positive numbers in order", "g"),
    ] = (0.0003, 0.03),
    batch_size: Annotated[tuple[int, ...], Option("The batch sizes to choose from.", "IMAGES")] = (50, 100, 200, 400),
    features: Annotated[
        tuple[int, ...],
        Option("The channels of the two blocks to choose from, in pairs.", "N"),
        Must(lambda channels: len(channels) % 2 == 0, "pairs of numbers"),
    ] = (16, 32, 32, 64, 48, 96),
    recipe: Annotated[tuple[RecipeName, ...], Option("The recipes to choose from.", "NAME")] = (
        "tutorial",
        "fast",
        "accurate",
    ),
    validation: Annotated[
        int,
        Option("Training images to hold out, which score a trial; the test set is not used.", "IMAGES"),
    ] = 5000,
    seeds: Annotated[int, Option("Runs of each trial, whose mean is its score.", "N")] = 1,
    seed: Annotated[int, Option("The first seed of each trial.", "N")] = 777,
    dataset: DatasetName = "mnist",
    dataset_dir: OtherDataset = None,
    data_dir: DataDir = None,
    checkpoint_dir: CheckpointDir = RUNS,
    platform: PlatformName = None,
) -> None:
    """Search for the settings with the best validation accuracy; the same command continues, also side by side.

    Examples:
      cnn-jax sweep --trials 30
      cnn-jax sweep --study wide --features 64 128 96 192 --recipe fast
    """
    shared = TrainSettings(
        epochs=epochs,
        validation=validation,
        seeds=seeds,
        seed=seed,
        dataset=dataset,
        dataset_dir=dataset_dir,
        data_dir=data_dir,
        checkpoint_dir=checkpoint_dir / study,
        platform=platform,
    )
    pairs = tuple(zip(features[::2], features[1::2], strict=True))
    for size, channels in itertools.product(batch_size, pairs):
        dataclasses.replace(shared, batch_size=size, features=channels)  # refuses what a trial would refuse
    need("optuna", extra="sweep")
    from cnn_jax.analysis.plots import save_axes
    from cnn_jax.runs.sweep import SearchSpace, draw_study, run_study

    space = SearchSpace(learning_rate=learning_rate, batch_sizes=batch_size, features=pairs, recipes=recipe)
    for name, axes in draw_study(run_study(space, shared, trials)):
        save_axes(axes, shared.checkpoint_dir / name)


def import_torch(
    file: Annotated[Path, Option("A state_dict with the tutorial's names, by torch.save or safetensors.", "FILE")],
    *,
    run_name: Annotated[str | None, Option("The run's folder.", "NAME", "the file's, without its ending")] = None,
    dataset: Annotated[str, Option("The tfds set that the weights are for.", "NAME")] = "mnist",
    dataset_dir: OtherDataset = None,
    data_dir: DataDir = None,
    checkpoint_dir: CheckpointDir = RUNS,
    platform: PlatformName = None,
) -> None:
    """Make a run of weights that PyTorch trained: test it, or train it on with train --run-name.

    Examples:
      cnn-jax import-torch model.pt
      cnn-jax train --run-name model --epochs 1
    """
    settings = TrainSettings(
        run_name=run_name or file.stem,
        dataset=dataset,
        dataset_dir=dataset_dir,
        data_dir=data_dir,
        checkpoint_dir=checkpoint_dir,
        platform=platform,
    )
    need("torch", extra="torch")
    from cnn_jax.pytorch.import_weights import import_weights

    import_weights(file, settings)


def compare(
    *,
    seeds: Annotated[
        int,
        Option("Runs of each framework; at least 2.", "N"),
        Must(lambda seeds: seeds >= 2, "at least 2, for a spread"),
    ] = 5,
    seed: Annotated[int, Option("The first seed; the others follow it.", "N")] = 777,
    epochs: Annotated[int, Option("Passes over the training set.", "N"), AT_LEAST_1] = 15,
    output: Annotated[
        Path, Option("Where the runs and the report go; runs that are there are not run again.", "DIR")
    ] = Path("benchmarks/comparison"),
    data_dir: DataDir = None,
) -> None:
    """Train the tutorial in this program and in PyTorch, and report how they differ.

    Examples:
      cnn-jax compare --seeds 5
    """
    require(0 <= seed <= 2**32 - seeds, "--seed", seed, "from 0 to 4294967295")
    need("torch", extra="torch")
    from cnn_jax.pytorch.compare import compare

    compare(seeds=seeds, seed=seed, epochs=epochs, output=output, data_dir=data_dir)


def benchmark(
    *,
    rounds: Annotated[int, Option("How often each form is measured, all of them in turn.", "N"), AT_LEAST_1] = 20,
    output: Annotated[
        Path, Option("Where the table, the JSON and the plot go, named by machine and date.", "DIR")
    ] = Path("benchmarks/results"),
    data_dir: DataDir = None,
) -> None:
    """Measure a training step in this program and in PyTorch, side by side in one run.

    Examples:
      cnn-jax benchmark --rounds 5
    """
    need("torch", extra="torch")
    from cnn_jax.pytorch.benchmark import benchmark

    benchmark(rounds=rounds, output=output, data_dir=data_dir)


COMMANDS = (train, evaluate, inspect, report, predict, demo, export, sweep, import_torch, compare, benchmark)


def folder_of(run: str | None, checkpoint_dir: Path) -> Path | None:
    """Return the folder of a run, named by that folder or by its name in `checkpoint_dir`; None for no run."""
    if run is None:
        return None
    return Path(run) if Path(run).is_dir() else checkpoint_dir / run


def need(*packages: str, extra: str) -> None:
    """Refuse what needs a package that is not installed.

    Raises:
      UsageError: naming the extra that brings it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"this needs {package}, which is not installed: pip install 'cnn-jax[{extra}]'")


def main(arguments: Sequence[str] | None = None, *, command: Command | None = None) -> None:
    """Run a command by the words after it, by default this process's; without one, the first word names it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with one_line_failures(debug="--debug" in arguments):
        call = parse(command, arguments, prog=Path(sys.argv[0]).name) if command else parse_command(COMMANDS, arguments)
        call()


def program(command: Command | None = None) -> None:
    """Run the command line of a process of its own: `main`, ended by signals in one line."""
    end_on_signals()
    main(command=command)
