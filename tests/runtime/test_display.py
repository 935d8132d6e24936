"""stdout gets only the tutorial's lines; a terminal gets a progress bar, and anything else no control characters."""

import os
import pty
import re
import select

import pytest

from cnn_jax.runtime.display import describe_seconds


@pytest.fixture
def arguments(small_mnist, tmp_path):
    return ["train.py", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--epochs", 2]


TUTORIALS_LINES = r"\[Epoch:    1\] cost = \d\.\d+\n\[Epoch:    2\] cost = \d\.\d+\nAccuracy: 0\.\d{4}\n"


def test_without_a_terminal_there_is_a_line_per_epoch_and_no_control_character(arguments, program):
    process = program(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert re.fullmatch(TUTORIALS_LINES, out)
    assert len(re.findall(r"^epoch [12]/2: test accuracy 0\.\d{4}, [\d,]+ images/s, .* left$", err, re.MULTILINE)) == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", err)


@pytest.fixture
def on_a_terminal(arguments, program):
    """Run the program with a terminal for stderr, and return what stdout and the terminal got."""

    def run(**environment):
        terminal, program_side = pty.openpty()
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | environment
        process = program(*arguments, stderr=program_side, env=environment | {"TERM": "xterm-256color", "LINES": "30"})
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
        return out, seen.decode()

    return run


COLOUR = r"\x1b\[[\d;]*\b(?:3|4|9|10)\d[;m]"


def test_on_a_terminal_there_is_a_progress_bar_with_cost_speed_and_time_left(on_a_terminal):
    out, seen = on_a_terminal(COLUMNS="100")
    assert re.fullmatch(TUTORIALS_LINES, out)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert re.search(r"epoch 2/2 .*\d+/40 .*cost \d\.\d{4}  [\d,]+ images/s .*\d\d:\d\d", text)
    assert "Accuracy" not in text
    assert "test accuracy" in text
    assert re.search(COLOUR, seen)


@pytest.mark.slow
def test_80_columns_are_enough_and_no_color_switches_the_colours_off(on_a_terminal):
    _, seen = on_a_terminal(COLUMNS="80", NO_COLOR="1")
    assert not re.search(COLOUR, seen)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen))
    assert max(map(len, lines)) <= 80
    assert any(re.search(r"cost \d\.\d{4}  [\d,]+ images/s", line) for line in lines)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_are_given_as_people_say_them(seconds, words):
    assert describe_seconds(seconds) == words
