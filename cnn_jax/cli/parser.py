"""How the words of a command line become settings, and what is told of them: help, what is wrong, what is near it."""

import contextlib
import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union

import tyro

from cnn_jax import __version__
from cnn_jax.runtime.errors import UsageError, suggest

S = TypeVar("S")


def read_settings(kind: type[S], arguments: Sequence[str], *, prog: str) -> S:
    """Read the settings of one command from a command line.

    Args:
      kind: The settings' dataclass; its docstring heads the help, and the examples in there end it.
      arguments: The words after the program's name.
      prog: The program's name, for its help.

    Returns:
      The settings; `--help` prints the help and exits, `--version` the version.

    Raises:
      UsageError: with what is wrong, and what is near it, in one line.
    """
    return _parse(kind, arguments, prog, _examples(kind))


def read_command(commands: Mapping[str, type], arguments: Sequence[str], *, prog: str) -> Any:
    """Read the settings of one of several commands: the first word says of which.

    Args:
      commands: The settings' dataclass of each command.
      arguments: As for `read_settings`.
      prog: As for `read_settings`.

    Returns:
      The settings; `--help`, `--version` and Tyro's option for shell completion print what they are for and exit.

    Raises:
      UsageError: as `read_settings` does.
    """
    word = arguments[0] if arguments else ""
    if word in commands:
        return read_settings(commands[word], arguments[1:], prog=f"{prog} {word}")
    if not word.startswith(("-h", "--help", "--version", "--tyro-")):
        wrong = f"there is no command {word}" if word else "a command is missing"
        meant = suggest(word, commands) or f"the commands are {', '.join(commands)}"
        raise UsageError(f"{wrong}; {meant}; {prog} --help explains them")
    kinds = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in commands.items())
    examples = [_examples(kind)[0] for kind in commands.values()]
    about = "Train, test and look at the convolutional network of a well-known PyTorch tutorial on MNIST."
    return _parse(Union[kinds], arguments, prog, examples, about)  # noqa: UP007


def _examples(kind):
    """Return the lines below Examples: in a docstring."""
    return inspect.getdoc(kind).partition("Examples:\n")[2].split("\n")


def _parse(kind, arguments, prog, examples, description=None):
    if arguments and arguments[0] == "--version":
        print(f"cnn-jax {__version__}")
        raise SystemExit
    # Into a buffer, Tyro writes plain sections in place of boxes, and no colours.
    printed, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                prog=prog,
                description=description,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
            )
    except SystemExit as end:
        if end.code not in (0, None):
            raise UsageError(f"{_in_one_line(complaint.getvalue())}; {prog} --help lists what there is") from end
        told = printed.getvalue()
        print(_help(told, examples) if told.startswith("usage:") else told, end="")
        raise


def _help(told, examples):
    """Return Tyro's help with plain headings, wrapped where Tyro does not wrap, and with examples."""
    width = shutil.get_terminal_size().columns
    usage, *lines = told.splitlines()
    text = textwrap.wrap(re.sub(r"{.*}", "COMMAND [OPTIONS]", usage), width)
    for line in filter(str.strip, lines):
        if line.startswith("  "):
            text.append(line.rstrip())
        elif not line.startswith(" --"):  # the rule below a heading
            is_heading = line.startswith(" ")
            text.append("")
            text += [f"{line.strip()}:"] if is_heading else textwrap.wrap(line, width)
    return "\n".join([*text, "", "examples:", *(f"  {example.strip()}" for example in examples), ""])


def _in_one_line(complaint):
    """Return what Tyro tells in sections: what is wrong, and the names of the options that are meant or near."""
    sections = [[]]
    for line in complaint.splitlines():
        text = line.removeprefix("  ").rstrip()
        if line.startswith("  ") and text.strip("-"):
            sections[-1].append(text)
        else:
            sections.append([])
    told = []
    for section in sections:
        if section and not section[0].startswith(("Got errors", "Argument helptext", "For full helptext")):
            header = " ".join(line for line in section if not line.startswith(" "))
            names = ", ".join(line.strip() for line in section if re.match(r" {4}\S", line))
            told.append(f"{header} {names}".strip().removesuffix("."))
    return _in_plain_words("; ".join(told))


def _in_plain_words(complaint):
    """Return a complaint about a value with no name of a Python type in it, and with the choice that is near."""
    wrong = re.match(
        r"Error parsing (?P<option>--[\w/-]+): .*(?P<kind>FLOAT|INT|int\(\)|float).*'(?P<value>.*)'", complaint
    )
    if wrong:
        needed = "a number" if wrong["kind"].lower() == "float" else "a whole number"
        return f"{wrong['option']} {wrong['value']}: it must be {needed}"
    wrong = re.match(r"invalid choice '(?P<value>.*)' for argument '(?P<option>.*)'\. Expected one of (.*)", complaint)
    if wrong:
        choices = sorted(set(re.findall(r"'([^']+)'", wrong[3])) - {"None"})
        told = f"{wrong['option']} {wrong['value']}: it must be one of {', '.join(choices)}"
        return "; ".join(filter(None, [told, suggest(wrong["value"], choices)]))
    return complaint.replace("; Perhaps", "; perhaps").replace("; Arguments", "; arguments")
