"""How the words of a command line become settings, and what is told of them: help, what is wrong, what is near it."""

import contextlib
import difflib
import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union

import tyro

from cnn_jax.errors import UsageError

S = TypeVar("S")


def read_settings(kind: type[S], arguments: Sequence[str], *, prog: str) -> S:
    """Read the settings of one command from a command line.

    Args:
      kind: The settings' dataclass; its docstring heads the help, and the examples in there end it.
      arguments: The words after the program's name.
      prog: The program's name, for its help.

    Returns:
      The settings; `--help` prints the help and exits.

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
      The settings; `--help` prints the help and exits, and so does Tyro's option for shell completion.

    Raises:
      UsageError: as `read_settings` does.
    """
    word = arguments[0] if arguments else ""
    if word in commands:
        return read_settings(commands[word], arguments[1:], prog=f"{prog} {word}")
    if not word.startswith(("-h", "--help", "--tyro-")):
        near = difflib.get_close_matches(word, commands, n=1)
        wrong = f"there is no command {word}" if word else "a command is missing"
        meant = f"perhaps you meant {near[0]}" if near else f"the commands are {', '.join(commands)}"
        raise UsageError(f"{wrong}; {meant}; {prog} --help explains them")
    kinds = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in commands.items())
    examples = [_examples(kind)[0] for kind in commands.values()]
    return _parse(Union[kinds], arguments, prog, examples)  # noqa: UP007


def _examples(kind):
    """Return the lines below Examples: in a docstring."""
    return inspect.getdoc(kind).partition("Examples:\n")[2].split("\n")


def _parse(kind, arguments, prog, examples):
    # Into a buffer, Tyro writes plain sections in place of boxes, and no colours.
    printed, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                prog=prog,
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
            text += ["", *([f"{line.strip()}:"] if is_heading else textwrap.wrap(line, width))]
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
    return "; ".join(told)
