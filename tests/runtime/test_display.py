"""stdout gets only the tutorial's lines; a terminal gets a progress bar, and anything else no control characters."""

import os
import pty
import re
import select

import numpy as np
import pytest

from cnn_jax.runtime.display import Display, describe_seconds, escape_markdown, markdown_table
from tests.helpers import TRAIN


@pytest.fixture
def arguments(small_mnist, tmp_path):
    return [*TRAIN, "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--epochs", 2, "--features", 4, 8]


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
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, seen
        return out, seen.decode()

    return run


COLOUR = r"\x1b\[[\d;]*\b(?:3|4|9|10)\d[;m]"


def test_on_a_terminal_there_is_a_progress_bar_with_cost_speed_and_time_left(on_a_terminal):
    out, seen = on_a_terminal(COLUMNS="100")
    assert re.fullmatch(TUTORIALS_LINES, out)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert re.search(r"epoch 2/2 .*\d+/20 .*cost \d\.\d{4}  [\d,]+ images/s .*\d\d:\d\d", text)
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


PLAIN = {
    "y[/i]": "y[/i]",
    "x[red]y": "x[red]y",
    ":smile:": ":smile:",
    "a\x1b[2Jb": "a\\x1b[2Jb",
    "two\nlines": "two\\nlines",
    "\u202e": "\\u202e",
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_shown_is_text_and_not_markup(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    display = Display()
    display.say(name)
    display.table(name, [(name, name)])
    display.result(name)
    out, err = capsys.readouterr()
    assert out == f"{PLAIN[name]}\n"
    assert err.count(PLAIN[name]) == 4
    assert "\x1b" not in err


@pytest.mark.parametrize("columns", ["", "0", "00", "\N{SUPERSCRIPT TWO}", "many", "-5", "80"])
def test_a_width_that_is_none_hides_nothing(columns, capsys, monkeypatch):
    for variable in ("COLUMNS", "LINES"):
        monkeypatch.setenv(variable, columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    display = Display()
    display.say("a line")
    display.table("Result", [("a name", "a value")])
    err = capsys.readouterr().err
    assert all(words in err for words in ("a line", "a name", "a value"))


@pytest.mark.parametrize("columns", [0, 1, 2, 7, 80])
def test_any_width_will_do(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    display = Display()
    with display.progress(total_steps=3, steps_done=0):
        display.advance(epoch=1, epochs=2, step=1, cost=0.5, examples_per_second=1e3)
        display.say("a line")
    display.table("Result", [("a name", "a value")])
    display.picture(np.zeros((3, 3), np.uint8))
    display.result("a result")
    assert "a result\n" in capsys.readouterr().out


def test_a_cell_of_a_table_in_markdown_is_text():
    assert markdown_table(("a|b", "*c*"), [("<d>", "e\n[f]")]) == (
        "| a\\|b | \\*c\\* |\n| --- | --- |\n| \\<d\\> | e \\[f\\] |"
    )
    assert escape_markdown("__init__() _of_ batch_norm ~~here~~") == (r"\_\_init\_\_() \_of\_ batch_norm \~\~here\~\~")
