"""Whatever stands for a value, in an option, an argument or the environment: a documented code and at most one line."""

import contextlib
import io
import os
import re

import pytest

from cnn_jax.cli.commands import COMMANDS, benchmark, compare, demo, main, sweep, train
from cnn_jax.cli.parser import parameters_of
from cnn_jax.runtime import errors
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "output-and-exit-codes.md").read_text()
DOCUMENTED = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", PAGE, re.MULTILINE) for code in row.split(", ")}

HOSTILE = [
    "", " ", "-", "--", "..", "/", "/dev/null", "/proc/self/mem", "~", "FOLDER", "FIFO", "x" * 300, "a/" * 3000,
    "nan", "inf", "-inf", "-1", "0", "1e400", "-1e400", "1e308", "5e-324", str(10**30), str(-(10**30)), "9" * 5000,
    "0x10", "1_000", "٣", "None", "😀", "e\u0301", "\x1b[31m", "a\nb", "\r", "\udcff\udcfe", "$HOME", "%s%n", "{}",
    "'\"", "a\tb",
]  # fmt: skip

# What would listen, search or train for as long as it is asked to: tested by what they refuse, not by what they do.
LONG = (demo, sweep, compare, benchmark)


def boundaries():
    """Each command with each of its options and arguments, but those that make it wait for other processes."""
    for command in COMMANDS:
        for parameter in parameters_of(command):
            if parameter.name not in ("coordinator", "num_processes", "process_id"):
                yield pytest.param(command, parameter, id=f"{command.__name__} {parameter.label}")


@pytest.fixture
def hostile(tmp_path):
    """The hostile values, with a folder and a named pipe among them."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    places = {"FOLDER": str(tmp_path / "folder"), "FIFO": str(tmp_path / "pipe")}
    return [places.get(value, value) for value in HOSTILE]


def words_of(command, parameter, value, tmp_path, small_mnist):
    """A command's words with one hostile value, and sound ones for the rest."""
    sound = {"run": str(tmp_path / "no-run"), "file": str(tmp_path / "no-file"), "images": str(tmp_path / "no-image")}
    sound |= {
        "runs": str(tmp_path / "no-run"),
        "to": "safetensors",
        "output": str(tmp_path / "written"),
        "data_dir": str(tmp_path / "data"),
    }
    sound |= {"checkpoint_dir": str(tmp_path / "runs"), "dataset_dir": str(small_mnist)}
    if parameter.name == "dataset":
        del sound["dataset_dir"]
    words = [command.__name__.replace("_", "-")]
    if command is train:
        words.append("--dry-run")
    for each in parameters_of(command):
        text = value if each.name == parameter.name else sound.get(each.name)
        if text is None or (each.kind is bool and each.name != parameter.name):
            continue
        if each.option is None:
            words += [text, str(tmp_path / "another")] if each.name == "runs" else [text]
        else:
            words += [f"{each.option}={text}"] if each.name != "features" else [each.option, text, "1"]
    return words


def run(words):
    """A command's exit code and what it writes to a stderr that is as lenient as a program's own."""
    stderr, code = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True), 0
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(words)
        except SystemExit as end:
            code = end.code or 0
    return code, stderr.buffer.getvalue().decode()


@pytest.mark.parametrize(("command_function", "parameter"), list(boundaries()))
def test_a_hostile_value_ends_in_a_documented_code_and_one_line(
    command_function, parameter, hostile, tmp_path, small_mnist, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if command_function in LONG:
        monkeypatch.setattr("cnn_jax.cli.commands.need", refuse_to_begin)
    for value in hostile:
        words = words_of(command_function, parameter, value, tmp_path, small_mnist)
        code, err = run(words)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        shown = f"{words!r}: {code}\n{err}"[:2000]
        assert code in DOCUMENTED - {8}, shown
        assert len(lines) == (code != 0), shown
        assert "Traceback" not in err, shown


def refuse_to_begin(*packages, extra):
    raise errors.UsageError("it does not begin")
