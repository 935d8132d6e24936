"""Every setting is checked before JAX is imported, and a wrong one ends in one line and exit code 2."""

import dataclasses
import inspect
import json
import re
import resource
import shlex
import subprocess
import sys
from importlib.metadata import version

import pytest

from cnn_jax.cli.commands import COMMANDS, CommonOptions, main, predict, train
from cnn_jax.cli.parser import parse, parse_command
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.settings import RECIPE_DEFAULTS, TrainSettings
from cnn_jax.runtime.errors import InputFileError, UsageError
from tests.helpers import ROOT


def read(*arguments):
    return parse(train, arguments, prog="train.py").keywords["settings"]


def test_the_defaults_are_the_tutorials():
    settings = read()
    assert settings == TrainSettings()
    assert (settings.epochs, settings.batch_size, settings.learning_rate, settings.seed) == (15, 100, 0.001, 777)
    assert str(settings.run_folder) == "checkpoints/mnist-seed777"


def test_a_recipe_brings_defaults_of_its_own():
    for recipe, (epochs, batch_size, learning_rate) in RECIPE_DEFAULTS.items():
        settings = read("--recipe", recipe)
        assert (settings.epochs, settings.batch_size, settings.learning_rate) == (epochs, batch_size, learning_rate)
        assert settings.run_folder.name == "mnist-seed777" + ("" if recipe == "tutorial" else f"-{recipe}")
    assert read("--recipe", "fast", "--epochs", "3").epochs == 3


def test_a_run_is_found_by_its_folder_or_its_name_whatever_other_folder_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("fashion", "checkpoints/fashion", "here", "checkpoints/here"):
        (tmp_path / folder).mkdir(parents=True)
    for run in ("checkpoints/fashion", "here", "checkpoints/here"):
        (tmp_path / run / "config.json").touch()
    found = {name: str(CommonOptions().run_folder(name)) for name in ("fashion", "here", "checkpoints/here", "none")}
    assert found == {
        "fashion": "checkpoints/fashion",
        "here": "here",
        "checkpoints/here": "checkpoints/here",
        "none": "checkpoints/none",
    }


def test_a_run_is_named_after_what_differs_from_the_defaults():
    settings = read("--seed", "1", "--batch-size", "200", "--learning-rate", "1e-2", "--precision", "bfloat16")
    assert settings.run_folder.name == "mnist-seed1-batch200-lr0.01-bfloat16"
    many = read("--recipe", "fast", "--seeds", "32", "--features", "16", "32", "--validation", "5000")
    assert many.run_folder.name == "mnist-seed777-seeds32-fast-features16x32-validation5000"
    assert read("--dataset", "emnist/letters").run_folder.name == "emnist-letters-seed777"
    assert read("--dataset-dir", "some/kmnist").run_folder.name == "kmnist-seed777"
    assert str(read("--checkpoint-dir", "a", "--run-name", "b").run_folder) == "a/b"
    decayed = read("--recipe", "accurate", "--hyperparameters", "weight_decay=.10", "smoothing=1e-1")
    assert decayed.run_folder.name == "mnist-seed777-accurate-smoothing=0.1-weight_decay=0.1"
    assert decayed == read("--recipe", "accurate", "--hyperparameters", "smoothing=0.1", "weight_decay=0.1")
    assert decayed.recipe_arguments == {"learning_rate": 0.005, "smoothing": 0.1, "weight_decay": 0.1}


WRONG = {
    "--epochs 0": "--epochs 0: it must be a positive number",
    "--epochs nan": "--epochs nan: it must be a positive number",
    "--epochs -3": "--epochs -3: it must be a positive number",
    "--epochs many": "--epochs many: it must be a number",
    "--seed 1.5": "--seed 1.5: it must be a whole number",
    "--epochs": "argument --epochs: expected one argument; train.py --help lists what there is",
    "--features 3": "argument --features: expected 2 arguments; train.py",
    "--fresh=3": "argument --fresh: ignored explicit argument '3'; train.py",
    "--batch-size 0": "--batch-size 0: it must be at least 1",
    "--learning-rate 0": "--learning-rate 0.0: it must be between 1e-37 and 1e38",
    "--learning-rate -0.1": "--learning-rate -0.1: it must be between 1e-37 and 1e38",
    "--learning-rate nan": "--learning-rate nan: it must be between 1e-37 and 1e38",
    "--learning-rate inf": "--learning-rate inf: it must be between 1e-37 and 1e38",
    "--hyperparameters decay": "--hyperparameters decay: it must be NAME=NUMBER, once for each argument",
    "--hyperparameters decay=": "--hyperparameters decay=: it must be NAME=NUMBER",
    "--hyperparameters decay=nan": "--hyperparameters decay=nan: it must be NAME=NUMBER",
    "--hyperparameters decay=1e38": "--hyperparameters decay=1e38: it must be NAME=NUMBER",
    "--hyperparameters a=1 b=2 a=3": "--hyperparameters a=1 b=2 a=3: it must be NAME=NUMBER, once for each argument",
    "--hyperparameters learning_rate=1": "--hyperparameters learning_rate=1: it must be NAME=NUMBER",
    "--seed -1": "--seed -1: it must be from 0 to 4294967295",
    "--target-accuracy 98": "--target-accuracy 98.0: it must be between 0 and 1",
    "--checkpoint-every-steps 0": "--checkpoint-every-steps 0: it must be at least 1",
    "--run-name ../x": "--run-name ../x: it must be a folder's name",
    "--seeds 0": "--seeds 0: it must be at least 1",
    "--seeds 2 --seed 4294967295": "--seed 4294967295: it must be from 0 to 4294967294",
    "--validation 0": "--validation 0: it must be at least 1",
    "--features 0 64": "--features 0 64: it must be at least 1 each",
    "--recipe slow": "--recipe slow: it must be one of accurate, fast, tutorial",
    "--coordinator host:1": "--coordinator host:1: it must be given with --coordinator, --num-processes, --process-id",
    "--num-processes 2": "--num-processes 2: it must be given with --coordinator, --num-processes, --process-id",
    "--coordinator host:0 --num-processes 2 --process-id 0": "--coordinator host:0: it must be HOST:PORT",
    "--coordinator host:65536 --num-processes 2 --process-id 0": "--coordinator host:65536: it must be HOST:PORT",
    "--dataset-dir=": "--dataset-dir '': it must be DIR",
    "--dataset-dir a\udcff": r"--dataset-dir a\\xff: it must be text in UTF-8",
    "--checkpoint-dir a\\b": r"--checkpoint-dir a\\b: it must be text in UTF-8 without a backslash",
    "--model a\udcff.py:A": r"--model a\\xff[.]py:A: it must be text in UTF-8",
    "--data-dir gs://bucket/data": "--data-dir gs://bucket/data: it must be a file or folder of this machine",
    "--checkpoint-dir s3://bucket": "--checkpoint-dir s3://bucket: it must be a file or folder of this machine",
    "--run-name=": "--run-name '': it must be NAME",
    "--coordinator host --num-processes 2 --process-id 0": "--coordinator host: it must be HOST:PORT",
    "--coordinator host\udcff:1 --num-processes 2 --process-id 0": r"--coordinator host\\xff:1: it must be HOST:PORT",
    "--coordinator host:٣ --num-processes 2 --process-id 0": "--coordinator host:٣: it must be HOST:PORT",
    "--coordinator host:1 --num-processes 0 --process-id 0": "--num-processes 0: it must be from 1 to 2147483647",
    "--coordinator host:1 --num-processes 9999999999 --process-id 0": "--num-processes 9999999999: it must be from 1",
    "--dataset fashion_mnist --dataset-dir a": "--dataset fashion_mnist: it must be left out, or else --dataset-dir a",
    "--coordinator host:1 --num-processes 2 --process-id 2": "--process-id 2: it must be from 0 to one less than",
    "--precision float16": "--precision float16: it must be one of bfloat16, float32; perhaps you meant ",
    "--platform abacus": "--platform abacus: it must be one of cpu, gpu, tpu; train",
    "--epochs 3 more": "Unrecognized options: more; train.py --help lists what there is",
    "--epoch 3": "Unrecognized options: --epoch, 3; perhaps you meant: --epochs N;",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_value_is_refused_and_named(arguments):
    with pytest.raises(UsageError, match=WRONG[arguments]):
        read(*arguments.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["compare", "--seeds", 2, "--seed", 2**32 - 1], "--seed 4294967295: it must be from 0 to 4294967294"),
        (["compare", "--epochs", 3_579_140], "--epochs 3579140: it must be from 1 to 1000000"),
        (["compare", "--seeds", 2**32 + 1], "--seeds 4294967297: it must be at most 4,294,967,296"),
        (
            ["sweep", "--dataset", "a", "--dataset-dir", "b"],
            "--dataset a: it must be left out, or else --dataset-dir b",
        ),
        (
            ["sweep", "--hyperparameters", "decay=1"],
            "--hyperparameters decay=1: it must be NAME=LOW:HIGH, once for each",
        ),
        (["sweep", "--hyperparameters", "decay=2:1"], "--hyperparameters decay=2:1: it must be NAME=LOW:HIGH"),
        (["import-torch", "c", "--dataset", "a", "--dataset-dir", "b"], "--dataset a: it must be left out, or else"),
    ],
)
def test_other_commands_refuse_what_a_training_would_refuse(arguments, complaint, command):
    code, out, err = command(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {complaint}")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--epochs 0", "--epochs 0: it must be a positive number"),
        ("--batch-size 60001", "--batch-size 60001: it must be at most 60000, the size of the training set"),
        ("--validation 60000", "--validation 60000: it must be less than 60000, all training images"),
        ("--dataset MNIST", "--dataset MNIST: perhaps you meant mnist"),
        ("--dataset no_such_set", "--dataset no_such_set: tfds does not know it"),
        ("--dataset-dir no/such/folder", "--dataset-dir no/such/folder: there is no such folder"),
    ],
)
def test_it_ends_the_program_in_one_line_with_exit_code_2_before_jax_is_imported(arguments, complaint):
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('jax' in sys.modules)); "
        "runpy.run_path('train.py', run_name='__main__')"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == "False\n"
    assert ended.stderr.startswith(f"error: {complaint}")
    assert len(ended.stderr.splitlines()) == 1
    # It takes 0.2 to 0.8 s, and half as fast a machine 1.6: counted on the processor, because it may be busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.5


@pytest.fixture
def printed(capsys, monkeypatch):
    """Return what an option such as --help prints."""

    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit, match=r"^(None|0|)$"):
            main(arguments)
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


def test_the_version_is_printed(printed):
    assert printed("--version") == printed("train", "--version") == f"cnn-jax {version('cnn-jax')}\n"


NAMED = {command.__name__.replace("_", "-"): command for command in COMMANDS}


@pytest.mark.parametrize("command", ["", *NAMED])
def test_help_fits_80_columns_and_ends_with_examples(command, printed):
    text = printed(*command.split(), "--help")
    assert max(map(len, text.splitlines())) <= 80
    examples = text.partition("\nexamples:\n  ")[2].splitlines()
    assert len(examples) >= (1 if command else len(COMMANDS))
    if command:
        description = " ".join(text.split("\n\n")[1].split())
        assert NAMED[command].__doc__.startswith(f"{description}\n")


def test_each_example_in_the_help_is_a_command_line_of_its_command():
    for name, command in NAMED.items():
        for example in inspect.getdoc(command).partition("Examples:\n")[2].splitlines():
            words = shlex.split(example.rpartition("|")[2])
            if words[:2] == ["python", "train.py"]:
                words[:2] = ["cnn-jax", "train"]
            assert words[0] == "cnn-jax"
            assert parse_command(COMMANDS, words[1:]).func is NAMED[words[1]]
            assert words[1] == name or "train --run-name" in example


def test_help_groups_the_settings_and_gives_each_ones_default_and_meaning(printed):
    text = printed("train", "--help")
    groups = dict(re.findall(r"^([\w -]+):\n((?:  .*\n)+)", text, flags=re.MULTILINE))
    assert list(groups) == ["options", "run options", "host options", "common options", "examples"]
    for option, group in {"--epochs": "options", "--fresh": "run options", "--platform": "common options"}.items():
        assert option in groups[group]
    for name in [field.name for field in dataclasses.fields(TrainSettings)] + ["debug"]:
        assert len(re.findall(rf"^  --{name.replace('_', '-')}\b(?!-)", text, flags=re.MULTILINE)) == 1
    assert re.search(r"^  --learning-rate RATE, --lr RATE$|^  --learning-rate, --lr RATE$", text, flags=re.MULTILINE)
    assert len(text.splitlines()) < 72
    words = " ".join(text.split())
    assert "Passes over the training set; 1.5 is one and a half. (default: 15 tutorial, 0.8 fast, 45" in words
    assert "--batch-size N Images per step. (default: 100 tutorial, 50 fast, 100 accurate)" in words
    assert "Write a trace of a few steps" in words
    assert "None" not in text


MISTYPED = {
    "": "a command is missing; the commands are train, .*benchmark, plan; cnn-jax --help explains them",
    "evalaute run": "there is no command evalaute; perhaps you meant evaluate;",
    "abacus": "there is no command abacus; the commands are train, ",
    "--debug train": "there is no command --debug; ",
    "train --lerning-rate 3": "--lerning-rate, 3; .*--learning-rate RATE; cnn-jax train --help lists",
    "predict --jason a.png": "Unrecognized options: --jason; perhaps you meant: --json; cnn-jax predict --help",
    "export --to onnx --output new/": "--output new/: it must be a file, not a folder",
    "export --to onnx --output gs://a/b": "--output gs://a/b: it must be a file or folder of this machine",
    "export mnist": "Missing from cnn-jax export: --to FORMAT, --output FILE; ",
    "evaluate": "Missing from cnn-jax evaluate: RUN; ",
}


@pytest.mark.parametrize("arguments", MISTYPED)
def test_what_is_mistyped_or_missing_is_reported_with_what_was_perhaps_meant(arguments):
    with pytest.raises(UsageError, match=MISTYPED[arguments]) as refused:
        parse_command(COMMANDS, arguments.split())
    assert "\n" not in str(refused.value)


def test_an_option_may_be_typed_with_equals_underscores_or_its_other_name():
    assert read("--batch_size", "7", "--learning_rate=0.5") == read("--batch-size=7", "--lr", "0.5")
    assert read("--run_name=a_b").run_name == "a_b"
    assert parse(predict, ["--", "--a_b.png"], prog="predict").keywords["images"] == ("--a_b.png",)


def test_settings_cannot_be_changed_and_are_checked_wherever_they_are_made():
    settings = TrainSettings.of("fast", seeds=2)
    assert (settings.epochs, settings.seeds) == (RECIPE_DEFAULTS["fast"].epochs, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.epochs = 3
    with pytest.raises(UsageError, match="--batch-size 0: it must be at least 1"):
        dataclasses.replace(settings, batch_size=0)


# What config.json held before `debug` was dropped.
EARLIER = """{
  "recipe": "fast", "epochs": 3.0, "batch_size": 100, "learning_rate": 0.01, "seed": 777, "seeds": 1,
  "features": [1, 2], "precision": "float32", "dataset": "mnist", "dataset_dir": null, "validation": null,
  "run_name": "a", "fresh": false, "dry_run": false, "checkpoint_every_steps": null, "target_accuracy": null,
  "feed": null, "tensorboard": false, "profile": null, "log_level": "warning", "coordinator": null,
  "num_processes": null, "process_id": null, "data_dir": "/b", "debug": true, "checkpoint_dir": "/c", "platform": "cpu"
}"""


def test_a_runs_settings_are_read_as_they_were_written_also_by_an_earlier_program(tmp_path):
    folder, file = RunFolder(tmp_path), tmp_path / "config.json"
    settings = read(
        *("--recipe", "fast", "--epochs", "3", "--batch-size", "100", "--lr", "0.01", "--features", "1", "2"),
        *("--run-name", "a", "--platform", "cpu"),
        *("--data-dir", "/b", "--checkpoint-dir", "/c", "--debug"),
    )
    folder.write_settings(settings)
    assert folder.read_settings() == settings
    values = json.loads(file.read_text())
    later = {"class_names": None, "transposed": False, "model": None, "hyperparameters": []}
    assert values == {name: value for name, value in json.loads(EARLIER).items() if name != "debug"} | later

    file.write_text(EARLIER)
    assert folder.read_settings() == settings
    assert folder.read_settings(tmp_path).data_dir == tmp_path
    del values["tensorboard"]  # an option of later years, to a run of earlier ones
    file.write_text(json.dumps(values))
    assert folder.read_settings() == settings
    for wrong in ({"seed": -1}, {"epochs": "many"}, {"recipe": "slow"}):
        file.write_text(json.dumps(values | wrong))
        with pytest.raises(InputFileError, match=r"config.json is damaged or was edited \(.*\); start the run's"):
            folder.read_settings()
    del values["batch_size"]  # its results depend on that
    file.write_text(json.dumps(values))
    with pytest.raises(InputFileError, match="batch_size"):
        folder.read_settings()


def test_the_shell_completes_commands_and_their_options(tmp_path, printed):
    script = tmp_path / "cnn-jax.bash"
    script.write_text(printed("--print-completion", "bash"))

    def complete(*words):
        line = f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_cnn_jax; "
        line += "echo ${COMPREPLY[@]}"
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()

    assert complete("cnn-jax", "ev") == ["evaluate"]
    assert "--epochs" in complete("cnn-jax", "train", "--e")
    assert complete("cnn-jax", "train", "--recipe", "f") == ["fast"]
    assert str(script) in complete("cnn-jax", "export", "--output", f"{tmp_path}/")
    with pytest.raises(UsageError, match="argument --print-completion: invalid choice: 'cmd'"):
        parse_command(COMMANDS, ["--print-completion", "cmd"])
