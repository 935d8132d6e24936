"""Standard streams may be closed, full, broken or of any encoding: exit codes and files stay as they are."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.runtime.streams import OutputStream, printable
from tests.helpers import ROOT, TRAIN

REFUSED = ["-m", "cnn_jax", "train", "--epochs", "0"]
HELP = ["-m", "cnn_jax", "predict", "--help"]
BROKEN = "a pipe that nobody reads"
# What may be wrong with a stream, for the shell, and why it cannot be written to then.
BAD = {">&-": "Bad file descriptor", ">/dev/full": "No space left on device", BROKEN: "Broken pipe"}


def run(arguments, *, stdin="", stdout="", stderr="", **environment):
    """Run Python with streams that a shell redirects, or broken pipes; return its exit code, stdout and stderr."""
    script, pipes = f'exec "$@" {stdin}', {}
    with contextlib.ExitStack() as held:
        for number, how in enumerate((stdout, stderr), start=1):
            pipes[number] = subprocess.PIPE
            if how == BROKEN:
                reading, pipes[number] = os.pipe()
                os.close(reading)
                held.callback(os.close, pipes[number])
            elif how:
                script += f" {number}{how}"
        command = ["bash", "-c", script, "-", sys.executable, *map(str, arguments)]
        environment = os.environ | environment
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipes[1], stderr=pipes[2])
        out, err = process.communicate(timeout=120)
    return process.returncode, out or b"", err or b""


@pytest.mark.parametrize("bad", BAD)
def test_an_error_that_cannot_be_shown_keeps_its_exit_code_and_is_not_shown_on_stdout(bad):
    assert run(REFUSED, stderr=bad) == (2, b"", b"")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("arguments", [HELP, ["train.py", "--version"], ["-m", "cnn_jax", "--print-completion", "zsh"]])
def test_results_that_do_not_arrive_end_with_4_in_one_line_on_stderr(arguments, bad):
    code, out, err = run(arguments, stdout=bad)
    (line,) = err.decode().splitlines()
    assert (code, out) == (4, b"")
    assert line.startswith(f"error: cannot read or write standard output: {BAD[bad]}; the work is done: ")


@pytest.mark.parametrize("bad", BAD)
def test_an_error_is_told_with_its_own_exit_code_where_there_is_no_stdout(bad):
    code, out, err = run(REFUSED, stdout=bad)
    assert (code, out, err) == (2, b"", b"error: --epochs 0: it must be a positive number\n")


def test_all_three_streams_may_be_closed():
    assert run(REFUSED, stdin="<&-", stdout=">&-", stderr=">&-") == (2, b"", b"")


def test_a_pipe_that_does_not_block_gets_everything():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = subprocess.Popen([sys.executable, "-c", WRITE_MUCH], cwd=ROOT, stdout=writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert len(pipe.read()) == 1_000_001
    assert process.wait(10) == 0


WRITE_MUCH = """
from cnn_jax.runtime.streams import guard_standard_streams, results_delivered
guard_standard_streams()
with results_delivered():
    print("x" * 1_000_000)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("bad", "stream"), [*((bad, "stderr") for bad in BAD), (">/dev/full", "stdout")])
def test_a_training_whose_log_or_result_cannot_be_written_is_saved_all_the_same(bad, stream, small_mnist, tmp_path):
    arguments = [*TRAIN, "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run"]
    code, out, err = run([*arguments, "--epochs", 1, "--features", 4, 8], **{stream: bad})
    assert (tmp_path / "run" / "steps" / "10").is_dir()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    if stream == "stderr":
        assert (code, len(out.splitlines()), result["not_shown"]) == (0, 2, f"standard error: {BAD[bad]}")
    else:
        assert (code, "not_shown" in result) == (4, False)
        told = err.decode().splitlines()[-1]
        assert told.startswith(f"error: cannot read or write standard output: {BAD[bad]}; the work is done: ")


def test_standard_input_that_is_closed_is_a_bad_input_file():
    line = b"error: - cannot be read (Bad file descriptor); give a picture file\n"
    assert run(["-m", "cnn_jax", "predict", "-"], stdin="<&-") == (65, b"", line)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "utf-16", "cp1252"])
def test_any_encoding_will_do(encoding):
    code, _, err = run(["train.py", "--run-name", "Ä\u0142\u202e"], PYTHONIOENCODING=encoding)
    name = encoding.partition(":")[0]
    shown = "--run-name Ä\u0142\\u202e: it must be".encode(name, "backslashreplace").removeprefix(b"\xff\xfe")
    assert (code, shown in err) == (2, True)


@pytest.mark.parametrize("columns", [0, 1, 13])
@pytest.mark.parametrize("arguments", [HELP, ["train.py", "--help"]])
def test_help_is_printed_at_any_width(arguments, columns):
    code, out, err = run(arguments, COLUMNS=str(columns))
    assert (code, err) == (0, b"")
    assert b"\nexamples:\n" in out


HOSTILE = {
    "\x1b[31mred": "\\x1b[31mred",
    "over\rwritten\nand\tmore": "over\\rwritten\\nand\\tmore",
    "\u202egnp.exe": "\\u202egnp.exe",
    "\x9b31m": "\\x9b31m",
    "\udcff.png": "\\xff.png",
    "\ud800": "\\ud800",
    "a  b": "a  b",
    "Ä 数 é €": "Ä 数 é €",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_terminal_would_obey_is_escaped(name):
    assert printable(name) == HOSTILE[name]


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "\ud800"])
def test_an_error_shows_the_name_in_one_line_that_changes_nothing_else(name):
    code, out, err = run(["-m", "cnn_jax", "export", "--to", "safetensors", "--output", f"none/{name}"])
    assert (code, out) == (4, b"")
    line = f"error: cannot write none/{HOSTILE[name]} (No such file or directory); give another --output\n"
    assert err.decode() == line


def test_a_folder_that_orbax_cannot_write_to_is_refused_at_once():
    line = b"error: --checkpoint-dir a\\xff: it must be text in UTF-8 without a backslash\n"
    assert run(["train.py", "--checkpoint-dir", "a\udcff"]) == (2, b"", line)


def test_nor_is_a_run_looked_for_there():
    line = b"error: RUN a\\xff: it must be text in UTF-8 without a backslash\n"
    assert run(["-m", "cnn_jax", "evaluate", "a\udcff"]) == (2, b"", line)


@settings(deadline=None, derandomize=True, database=None)
@given(st.text())
def test_printable_text_is_one_line_and_stays_as_it_is(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert shown.isprintable()
    assert printable(shown) == shown


@pytest.mark.parametrize(
    ("encoding", "written"),
    [("ascii", b"+/- #- \\xc4\n"), ("latin-1", b"\xb1 #- \xc4\n"), ("utf-8", "± █─ Ä\n".encode())],
)
def test_a_stream_draws_or_escapes_what_its_encoding_lacks(encoding, written):
    reading, writing = os.pipe()
    with OutputStream(writing, encoding) as stream:
        print("± █─ Ä", file=stream)
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read() == written
