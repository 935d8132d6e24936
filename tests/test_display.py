"""stdout gets the tutorial's lines alone; a terminal gets a progress bar, and everything else no control characters."""

import os
import pty
import re
import select

import pytest

from cnn_jax.display import describe_seconds


@pytest.fixture
def arguments(small_mnist, tmp_path):
    return ["train.py", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--epochs", 2]


TUTORIALS_LINES = r"\[Epoch:    1\] cost = \d\.\d+\n\[Epoch:    2\] cost = \d\.\d+\nAccuracy: 0\.\d{4}\n"


def test_without_a_terminal_there_is_a_line_an_epoch_and_no_control_character(arguments, program):
    process = program(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert re.fullmatch(TUTORIALS_LINES, out)
    assert len(re.findall(r"^epoch [12]/2: test accuracy 0\.\d{4}, [\d,]+ images/s, .* left$", err, re.MULTILINE)) == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", err)


def test_on_a_terminal_there_is_a_progress_bar_with_cost_speed_and_time_left(arguments, program):
    terminal, program_side = pty.openpty()
    process = program(
        *arguments, stderr=program_side, env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    )
    os.close(program_side)
    seen = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # the program has closed its side
            break
    os.close(terminal)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, seen
    assert re.fullmatch(TUTORIALS_LINES, out)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert re.search(r"epoch 2/2 .*\d+/40 .*cost \d\.\d{4}  [\d,]+ images/s .*\d\d:\d\d", text)
    assert "Accuracy" not in text
    assert "test accuracy" in text


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_are_told_as_people_tell_them(seconds, words):
    assert describe_seconds(seconds) == words
