"""The commands: `python -m cnn_jax COMMAND`, installed as `cnn-jax`.

Each is a function that imports what it needs when it runs, so that a mistake on the command line is reported before JAX
is imported, which takes a second.
"""

import dataclasses
import importlib.util
import itertools
import logging
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cnn_jax.cli.parser import Command, parse, parse_command
from cnn_jax.data.dataset import check_sizes
from cnn_jax.data.loading import count_train_examples
from cnn_jax.runs.folder import RunFolder, check_output, check_output_of_several
from cnn_jax.runs.settings import (
    AT_LEAST_1,
    CLASS_NAMES,
    EACH_AT_LEAST_1,
    FOLDER_NAME,
    OWN_MODEL,
    PLACE,
    RANGE,
    RANGES,
    RATE,
    RECIPE_DEFAULTS,
    RECIPES,
    SHORT,
    Epochs,
    Must,
    Platform,
    TrainSettings,
    numbers_of,
    require,
)
from cnn_jax.runtime.display import Display, describe_seconds
from cnn_jax.runtime.errors import TargetAccuracyError, UsageError, one_line_failures
from cnn_jax.runtime.files import check_output_folder
from cnn_jax.runtime.streams import results_delivered

if TYPE_CHECKING:
    from cnn_jax.runs.summary import Result

Count = Annotated[int, AT_LEAST_1]
Port = Annotated[int, Must(lambda port: 1 <= port <= 65535, "from 1 to 65535")]
# No more than a training of the tutorial's 600 steps per epoch can count.
WholeEpochs = Annotated[int, Must(lambda epochs: 1 <= epochs <= 1_000_000, "from 1 to 1000000")]
SeveralSeeds = Annotated[int, Must(lambda seeds: seeds >= 2, "at least 2, for a spread")]
StudyName = Annotated[str, FOLDER_NAME, SHORT]
Pairs = Annotated[tuple[int, ...], Must(lambda numbers: len(numbers) % 2 == 0, "pairs of numbers")]
SEARCHED_FEATURES = (16, 32, 32, 64, 48, 96)
Range = Annotated[
    tuple[float, float],
    Must(lambda ends: all(map(RATE.holds, ends)) and ends[0] <= ends[1], f"in order and each {RATE.needed}", "g"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The options of every command that reads or writes runs; TrainSettings has the same fields."""

    data_dir: Path | None = None
    checkpoint_dir: Path = TrainSettings.checkpoint_dir
    platform: Platform | None = None

    def run_folder(self, run: str) -> Path:
        """Return the folder of a run, named by that folder or by its name in `checkpoint_dir`."""
        given, named = Path(run), self.checkpoint_dir / run
        for folder in (given, named):
            require(PLACE.holds(folder), "RUN", run, PLACE.needed)
        is_other = not (given / "config.json").exists() and (named / "config.json").exists()
        return given if os.path.isdir(run) and not is_other else named


def train(settings: TrainSettings) -> "Result | None":
    """Train the tutorial's network; the same command continues an unfinished run.

    Examples:
      python train.py --epochs 15
      python train.py --recipe fast --seeds 10 --validation 5000
      python train.py --dataset-dir fashion-mnist --run-name fashion
    """
    if settings.profile is not None:
        check_output_folder(settings.profile, "--profile")
    if settings.dry_run:
        RunFolder(settings.run_folder).check_place()
    if settings.tensorboard:
        need("tensorboardX", extra="tensorboard")
    train_examples = count_train_examples(
        settings.dataset, settings.dataset_dir, settings.data_dir, prepare=not settings.dry_run
    )
    if train_examples is not None:
        check_sizes(settings.batch_size, settings.validation, train_examples)
    elif settings.dry_run:
        Display().say(f"{settings.dataset}: tfds would first prepare it, and download what it needs for that")
        Display().say("dry run: nothing was downloaded, trained or written")
        return None
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")

    from cnn_jax.runs.summary import result_rows, write_result
    from cnn_jax.runs.train import open_run, train_run
    from cnn_jax.runtime.distributed import is_process_0

    with open_run(settings) as run:
        result = train_run(settings, run)
        if result is None:
            return None
        accuracy = statistics.fmean(result.accuracies)
        run.display.accuracy(accuracy)
        try:
            if is_process_0():
                write_result(result, run.folder, run.clock)
                # Its pictures take half a second to import: most starts of a finished run end without them.
                if result.trained_here or not run.folder.report.exists():
                    from cnn_jax.analysis.report import write_report

                    with run.clock.part("reporting"):
                        write_report(run.folder.report, run.folder, result)
        finally:  # also where the report fails, as with a variable that keeps Matplotlib from loading
            rows = result_rows(result)
            rows += [(part, describe_seconds(seconds)) for part, seconds in run.clock.seconds.items()]
            if run.folder.unwritten:
                rows.append(("not written", run.folder.unwritten))
            run.display.table("Result", [*rows, ("written to", str(run.folder.path))])
    target = settings.target_accuracy
    if target is not None and accuracy < target:
        raise TargetAccuracyError(
            f"test accuracy {accuracy:.4f} is below --target-accuracy {target}; train longer or with other settings"
        )
    return result


def evaluate(run: str, common: CommonOptions, *, unscaled: bool = False) -> None:
    """Test a run's newest checkpoint on all test images of its data set.

    Options:
      run (RUN): A run's folder, or its name in --checkpoint-dir.
      unscaled: Test on pixels in 0..255, as the tutorial does although it trains on [0, 1].

    Examples:
      cnn-jax evaluate mnist-seed777
      cnn-jax evaluate mnist-seed777 --unscaled
    """
    from cnn_jax.runs.restore import evaluate_run

    evaluate_run(common.run_folder(run), unscaled=unscaled, data_dir=common.data_dir, platform=common.platform)


def inspect(run: str, common: CommonOptions) -> None:
    """List the layers of a run's network, and draw what it has learned.

    Options:
      run (RUN): A run's folder, or its name in --checkpoint-dir.

    Examples:
      cnn-jax inspect mnist-seed777
    """
    folder = common.run_folder(run)
    RunFolder(folder).check_pictures()
    from cnn_jax.analysis.layers import inspect_run

    inspect_run(folder, data_dir=common.data_dir, platform=common.platform)


def report(run: str, common: CommonOptions, *, output: Path | None = None) -> None:
    """Write an HTML page about a run: its results, settings and pictures.

    Options:
      run (RUN): A run's folder, or its name in --checkpoint-dir.
      output (FILE): The file to write. (default: report.html in the run's folder)

    Examples:
      cnn-jax report mnist-seed777
      cnn-jax report mnist-seed777 --output report.html
    """
    folder = common.run_folder(run)
    RunFolder(folder).check_report(output)
    from cnn_jax.analysis.report import report_run

    report_run(folder, output, data_dir=common.data_dir, platform=common.platform)


def diff(runs: tuple[str, ...], common: CommonOptions, *, output: Path | None = None, json: bool = False) -> None:
    """Say how runs differ, and whether their test accuracies do, each against the first.

    Options:
      runs (RUN...): Runs' folders, or their names in --checkpoint-dir; at least two.
      output (FILE): Where to write an HTML page about it, with the runs' curves. (default: none)
      json: Print a JSON object in place of a sentence for each comparison.

    Examples:
      cnn-jax diff mnist-seed777-seeds5 mnist-seed777-seeds5-fast
      cnn-jax diff mnist-seed1 mnist-seed2 mnist-seed3 --output diff.html
    """
    if output is not None:
        check_output(output)
    folders = {run: common.run_folder(run) for run in runs}
    if len(runs) < 2 or len({*map(os.path.realpath, folders.values())}) < len(runs):
        raise UsageError(f"RUN... {' '.join(runs)}: it must be at least two runs, each of them once")
    from cnn_jax.analysis.diff import diff

    diff(folders, output=output, as_json=json, data_dir=common.data_dir, platform=common.platform)


def predict(
    common: CommonOptions,
    images: tuple[str, ...] = (),
    *,
    run: str | None = None,
    one: bool = False,
    json: bool = False,
    boxes: Path | None = None,
) -> None:
    """Print what each picture shows, one line per file: its digits in reading order, and ? for anything else.

    Options:
      images (IMAGE...): Picture files, folders of them, or - for standard input.
      run (RUN): A run's folder, or its name in --checkpoint-dir. (default: the network in the package)
      one: Read each picture as one character, whatever else is in it.
      json: Print a JSON array of objects with file and characters, each with class, index, probabilities and box.
      boxes (FILE): Write the picture, one alone, with a box around each character and what it is, as a PNG file.

    Examples:
      cnn-jax predict photo.jpg
      cnn-jax predict scans/ --json
      cat photo.png | cnn-jax predict - --run mnist-seed777
    """
    if not images:
        raise UsageError("IMAGE... is missing; it must be at least one picture file, a folder or -")
    if boxes is not None:
        from cnn_jax.inference.pictures import find_images

        read = list(itertools.chain(*map(find_images, images)))
        if len(read) > 1:
            raise UsageError(f"--boxes {boxes}: it is for one picture; give one")
        check_output(boxes, "--boxes", inputs=read)
    folder = None if run is None else common.run_folder(run)
    from cnn_jax.inference.predict import predict

    predict(images, folder, one=one, as_json=json, boxes=boxes, data_dir=common.data_dir, platform=common.platform)


def demo(common: CommonOptions, run: str | None = None, *, port: Port = 7860, host: str = "127.0.0.1") -> None:
    """Serve a page on which you draw digits and watch what the network makes of them.

    Options:
      run ([RUN]): A run's folder, or its name in --checkpoint-dir. (default: the network in the package)
      port (N): The page's port.
      host (ADDRESS): Who can reach the page: with 127.0.0.1 only this machine, with 0.0.0.0 every other, too, by this
        machine's addresses and host name; by another name only if it is given here.

    Examples:
      cnn-jax demo
      cnn-jax demo mnist-seed777 --port 8000
    """
    need("gradio", extra="demo")
    folder = None if run is None else common.run_folder(run)
    from cnn_jax.inference.demo import serve

    serve(folder, host=host, port=port, data_dir=common.data_dir, platform=common.platform)


def export(
    common: CommonOptions,
    run: str | None = None,
    *,
    to: Literal["onnx", "stablehlo", "safetensors", "torch", "html"],
    output: Path,
    input: Literal["uint8", "float"] | None = None,
    layout: Literal["nhwc", "nchw"] | None = None,
    seed: int | None = None,
) -> None:
    """Write a network to a file for another program; the file is kept only if it computes the same there.

    Options:
      run ([RUN]): A run's folder, or its name in --checkpoint-dir. (default: the network in the package)
      to (FORMAT): onnx or stablehlo (programs from pixels to logits), safetensors or torch (weights), html (a page
        that reads drawn and chosen pictures in a browser, without a server). (required)
      output (FILE): The file to write. (required)
      input: The pixels that a program takes: in 0..255, which it scales itself, or floats in [0, 1]. (default: uint8)
      layout: The axes of a program's images: channels last or first. (default: nhwc)
      seed (N): The seed whose weights to write, if the run has several. (default: the first)

    Examples:
      cnn-jax export --to onnx --output mnist.onnx
      cnn-jax export --to onnx --layout nchw --output mnist.onnx
      cnn-jax export mnist-seed777 --to torch --output model.pt
      cnn-jax export --to html --output digits.html
    """
    without_input = {"html": "a page, which takes any picture"}
    without_input |= dict.fromkeys(("safetensors", "torch"), "weights, which take no images")
    for option, value in (("--input", input), ("--layout", layout)):
        if value is not None and to in without_input:
            raise UsageError(f"{option} {value}: --to {to} writes {without_input[to]}; leave out {option}")
    check_output(output)
    if to == "torch":
        need("torch", extra="torch")
    elif to == "onnx":
        need("onnx", "onnxruntime", extra="export")
    elif to == "stablehlo":
        need("flatbuffers", extra="export")
    folder = None if run is None else common.run_folder(run)
    from cnn_jax.inference.export import Input, export

    takes = Input(input or "uint8", layout or "nhwc")
    export(to, output, folder, takes=takes, seed=seed, data_dir=common.data_dir, platform=common.platform)


def sweep(
    common: CommonOptions,
    *,
    study: StudyName = "sweep",
    trials: Count = 30,
    together: Count = 1,
    epochs: Epochs = 2,
    learning_rate: Range = (0.0003, 0.03),
    hyperparameters: Annotated[tuple[str, ...], RANGES] = (),
    batch_size: tuple[int, ...] = (50, 100, 200, 400),
    features: Pairs = SEARCHED_FEATURES,
    recipe: Annotated[tuple[str, ...], RECIPES] = tuple(RECIPE_DEFAULTS),
    validation: Count = 5000,
    seeds: Count = 1,
    seed: int = 777,
    model: Annotated[str | None, OWN_MODEL] = None,
    dataset: str = "mnist",
    dataset_dir: Path | None = None,
) -> None:
    """Search for the settings with the best validation accuracy; the same command continues or shares the search.

    Options:
      study (NAME): The search's folder in --checkpoint-dir: its trials, SQLite file and plots.
      trials (N): Trials in all, counted over every process that shares the search.
      together (N): Trials that differ in the learning rate and hyperparameters alone, trained together: on an
        accelerator at once.
      learning_rate (LOW HIGH): The range to search, on a logarithmic scale.
      hyperparameters (NAME=LOW:HIGH): Ranges of other arguments of the recipe, logarithmic where positive.
      batch_size (IMAGES): The batch sizes to choose from.
      features (N): The channels of both blocks to choose from, in pairs.
      recipe (NAME): The recipes to choose from, among them your own, FILE.py:FUNCTION.
      validation (IMAGES): Training images to hold out and score the trials on; the test set is not used.
      seeds (N): Runs per trial; their mean accuracy is its score.

    Examples:
      cnn-jax sweep --trials 30
      cnn-jax sweep --study wide --features 64 128 96 192 --recipe fast
      cnn-jax sweep --together 10 --recipe fast --hyperparameters smoothing=0:0.1
    """
    require(together <= trials, "--together", together, f"at most --trials {trials}")
    shared = TrainSettings.of(
        epochs=epochs,
        validation=validation,
        seeds=seeds,
        seed=seed,
        model=model,
        dataset=dataset,
        dataset_dir=dataset_dir,
        **vars(dataclasses.replace(common, checkpoint_dir=common.checkpoint_dir / study)),
    )
    pairs = tuple(zip(features[::2], features[1::2], strict=True))
    if model is not None and features == SEARCHED_FEATURES:
        pairs = (TrainSettings.features,)  # a network of the user's has widths of its own
    for size, channels in itertools.product(batch_size, pairs):
        dataclasses.replace(shared, batch_size=size, features=channels)  # refuses what a trial would refuse
    recipes = tuple(dataclasses.replace(shared, recipe=name).recipe for name in recipe)
    train_examples = count_train_examples(dataset, dataset_dir, shared.data_dir)
    if train_examples is not None:
        check_sizes(max(batch_size), validation, train_examples)
    check_output_folder(shared.checkpoint_dir, "--checkpoint-dir or --study")
    need("optuna", extra="sweep")
    from cnn_jax.analysis.plots import save_drawn
    from cnn_jax.analysis.sweep import SearchSpace, draw_study, run_study

    ranges = {name: (low, high) for name, (low, high) in numbers_of(RANGE, hyperparameters).items()}
    space = SearchSpace({"learning_rate": learning_rate, **ranges}, batch_size, pairs, recipes)
    save_drawn(draw_study(run_study(space, shared, trials, together)), shared.checkpoint_dir)


def import_torch(
    file: Path,
    common: CommonOptions,
    *,
    run_name: str | None = None,
    features: Annotated[tuple[int, int], EACH_AT_LEAST_1] = TrainSettings.features,
    dataset: str = "mnist",
    dataset_dir: Path | None = None,
    class_names: Annotated[str | None, CLASS_NAMES] = None,
    transposed: bool = False,
) -> None:
    """Turn weights that PyTorch trained into a run, to test or to train further with train --run-name.

    Options:
      file (FILE): A state_dict with the tutorial's names, saved by torch.save or safetensors.
      run_name (NAME): Name of the run's folder. (default: the file's name without its ending)
      dataset (NAME): The tfds data set that the weights are for.

    Examples:
      cnn-jax import-torch model.pt
      cnn-jax train --run-name model --epochs 1
    """
    settings = TrainSettings.of(
        run_name=file.stem if run_name is None else run_name,
        features=features,
        dataset=dataset,
        dataset_dir=dataset_dir,
        class_names=class_names,
        transposed=transposed,
        **vars(common),
    )
    RunFolder(settings.run_folder).check_place()
    from cnn_jax.pytorch.import_weights import import_weights

    import_weights(file, settings)


def compare(
    *,
    seeds: SeveralSeeds = 5,
    seed: int = 777,
    epochs: WholeEpochs = 15,
    output: Path = Path("benchmarks/comparison"),
    untimed: bool = False,
    data_dir: Path | None = None,
) -> None:
    """Train the tutorial in this program and in PyTorch, and report how they differ.

    Options:
      seeds (N): Runs per framework; at least 2.
      epochs (N): Passes over the training set.
      output (DIR): Where the runs and the report are written; finished runs are not repeated.
      untimed: Do not record how long these runs take, which other programs make longer.

    Examples:
      cnn-jax compare --seeds 5
      cnn-jax compare --seeds 20 --untimed
    """
    TrainSettings(seeds=seeds, seed=seed, epochs=epochs, data_dir=data_dir)  # refuses what a training would refuse
    check_output_of_several(output, "report.json", "report.md", "report.png")
    need("torch", extra="torch")
    from cnn_jax.pytorch.compare import compare

    compare(seeds=seeds, seed=seed, epochs=epochs, output=output, untimed=untimed, data_dir=data_dir)


def benchmark(*, rounds: Count = 20, output: Path = Path("benchmarks/results"), data_dir: Path | None = None) -> None:
    """Time a training step in this program and in PyTorch, side by side in one run.

    Options:
      rounds (N): How often each variant is measured, all of them in turn.
      output (DIR): Where the table, the JSON and the plot are written, named by machine and date.

    Examples:
      cnn-jax benchmark --rounds 5
    """
    check_output_of_several(output)
    need("torch", extra="torch")
    from cnn_jax.pytorch.benchmark import benchmark

    benchmark(rounds=rounds, output=output, data_dir=data_dir)


def plan(target: str, settings: TrainSettings, *, json: bool = False, hlo: Path | None = None) -> None:
    """Compile a training for a GPU or a TPU that need not be here, and tell what it would need and launch there.

    Options:
      target (TARGET): Which, and how many: a100, h100, h200 or b200, such as h100:8; v4, v5e, v5p or v6e with the
        layout of its chips, such as v5e:2x2 or v4:2x2x1.
      json: Print a JSON object with all figures.
      hlo (FILE): Write XLA's optimised program of the training steps.

    Examples:
      cnn-jax plan h100
      cnn-jax plan h100:8 --seeds 64 --recipe fast
      cnn-jax plan v5e:2x2 --seeds 8 --json
    """
    from cnn_jax.analysis.targets import find_target

    wanted = find_target(target)
    need("libtpu" if wanted.platform == "tpu" else "jax_cuda13_plugin", extra="plan")
    if hlo is not None:
        check_output(hlo, "--hlo", inputs=[code.file for code in settings.own_code.values()])
    from cnn_jax.analysis.plan import plan

    plan(wanted, settings, as_json=json, hlo=hlo)


COMMANDS = (
    train,
    evaluate,
    inspect,
    report,
    diff,
    predict,
    demo,
    export,
    sweep,
    import_torch,
    compare,
    benchmark,
    plan,
)


def need(*packages: str, extra: str) -> None:
    """Refuse what needs a package that is not installed.

    Raises:
      UsageError: naming the extra that installs it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"this needs {package}, which is not installed: pip install 'cnn-jax[{extra}]'")


def main(arguments: Sequence[str] | None = None, *, command: Command | None = None) -> None:
    """Run a command with its arguments, by default this process's; without a command, the first argument names it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with one_line_failures(debug="--debug" in arguments), results_delivered():
        call = parse(command, arguments, prog=Path(sys.argv[0]).name) if command else parse_command(COMMANDS, arguments)
        call()
