"""Turns a command line into the call of a command, by argparse and the command's signature and docstring."""

import argparse
import dataclasses
import difflib
import functools
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

from cnn_jax import __version__
from cnn_jax.runs.settings import RECIPE_DEFAULTS, RecipeDefaults, TrainSettings, check_values, option_name
from cnn_jax.runtime.errors import UsageError, suggest

# A command's positional parameters are its arguments, and its keyword-only ones its options; a dataclass stands for one
# option per field. The docstring is the help: a summary, `name (METAVAR): meaning` under each heading, and examples.
# TrainSettings' docstring describes the options that a command's own leaves out.
Command = Callable[..., Any]

ABOUT = "Train, test and look at the convolutional network of a well-known PyTorch tutorial on MNIST."
ALIASES = {"learning_rate": ("--lr",)}
NARROWEST = 11  # columns of text in the help; argparse needs as many
REQUIRED = inspect.Parameter.empty


class Parameter(NamedTuple):
    """An argument or option: its names in Python and on the command line, type, default, and place in the help."""

    name: str
    option: str | None
    kind: Any
    default: Any
    heading: str
    metavar: str
    help: str

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.option or ''} {self.metavar}".strip()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists what there is")


def parse(command: Command, arguments: Sequence[str], *, prog: str) -> functools.partial[None]:
    """Read the call of a command from the words after the program's name; `--help` and `--version` print and exit.

    Raises:
      UsageError: naming the mistake, and what was perhaps meant, in one line.
    """
    parser, parameters = _Parser(prog=prog, **_help_of(command)), parameters_of(command)
    _add(parser, parameters)
    # An option may be typed with underscores, too, like its name in Python; after "--" come no more options.
    end = [*arguments, "--"].index("--")
    words = [re.sub("^--[^=]+", lambda option: option[0].replace("_", "-"), word) for word in arguments[:end]]
    namespace, unknown = parser.parse_known_args([*words, *arguments[end:]])
    if unknown:
        labels = {parameter.option: parameter.label for parameter in parameters if parameter.option}
        near = [difflib.get_close_matches(word.partition("=")[0], labels, n=1) for word in unknown]
        meant = ", ".join(labels[option] for options in near for option in options)
        parser.error(f"Unrecognized options: {', '.join(unknown)}{meant and f'; perhaps you meant: {meant}'}")
    for each in parameters:
        if each.option and vars(namespace).get(each.name) == []:  # what argparse makes of --option=--
            parser.error(f"{each.option} --: it must be {each.metavar or 'a value'}")
    typed = vars(namespace).items()
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in typed if name != "debug"}
    if missing := [each.label for each in parameters if each.default is REQUIRED and each.name not in values]:
        parser.error(f"Missing from {prog}: {', '.join(missing)}")
    for name, kind in command.__annotations__.items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            make: Callable[..., Any] = TrainSettings.of if kind is TrainSettings else kind
            fields = [field.name for field in dataclasses.fields(kind) if field.name in values]
            values[name] = make(**{field: values.pop(field) for field in fields})
    check_values(values, command.__annotations__)
    return functools.partial(command, **values)


def parse_command(commands: Sequence[Command], arguments: Sequence[str]) -> functools.partial[None]:
    """Read the call of the command that the first word names; `--print-completion SHELL` prints a script and exits.

    Raises:
      UsageError: as `parse` does.
    """
    named = {command.__name__.replace("_", "-"): command for command in commands}
    word = arguments[0] if arguments else ""
    if word in named:
        return parse(named[word], arguments[1:], prog=f"cnn-jax {word}")
    if word.partition("=")[0] not in ("-h", "--help", "--version", "--print-completion"):
        wrong = f"there is no command {word}" if word else "a command is missing"
        meant = suggest(word, named) or f"the commands are {', '.join(named)}"
        raise UsageError(f"{wrong}; {meant}; cnn-jax --help explains them")

    import shtab  # its import takes longer than everything else here

    examples = [_sections(command)[-1].splitlines()[0] for command in commands]
    parser = _Parser(prog="cnn-jax", **_help(ABOUT, ["COMMAND [OPTIONS]"], examples))
    _add(parser, [])
    shtab.add_argument_to(parser, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in named.items():
        subparser = subparsers.add_parser(name, help=_sections(command)[0], **_help_of(command))
        for action in _add(subparser, parameters_of(command)):
            if action.dest == "recipe":
                action.choices = [*RECIPE_DEFAULTS]
            if action.metavar in ("FILE", "DIR"):
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]  # only shtab knows it
    parser.parse_args(arguments)
    raise AssertionError("each of those options exits")


def parameters_of(command: Command) -> list[Parameter]:
    """Return the arguments and options of a command, fields of dataclasses among them."""
    described = _described(TrainSettings) | _described(command)
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind, default = parameter.annotation, parameter.default
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            parameters += parameters_of(kind)
            continue
        if hasattr(kind, "__metadata__"):
            kind = kind.__origin__
        if type(None) in get_args(kind):
            kind, _ = get_args(kind)
        heading, metavar, text = described[name]
        if command is TrainSettings and name in RecipeDefaults._fields:
            text += f" (default: {RecipeDefaults.in_words(name)})"
        elif default not in (None, False, (), REQUIRED):
            text += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
        option = option_name(name) if parameter.kind is parameter.KEYWORD_ONLY else None
        parameters.append(Parameter(name, option, kind, default, heading, metavar, text))
    return parameters


def _add(parser: argparse.ArgumentParser, parameters: Sequence[Parameter]) -> list[argparse.Action]:
    """Add arguments and options to a parser, under their headings."""
    parser.add_argument("--version", action="version", version=f"cnn-jax {__version__}", help=argparse.SUPPRESS)
    groups: dict[str, Any] = {"options": parser}
    actions = []
    for parameter in parameters:
        if parameter.heading not in groups:
            groups[parameter.heading] = parser.add_argument_group(parameter.heading)
        names = [parameter.option or parameter.name, *ALIASES.get(parameter.name, ())]
        value = {"help": parameter.help.replace("%", "%%"), **_value(parser, parameter)}
        actions.append(groups[parameter.heading].add_argument(*names, **value))
    if parameters:
        common = groups["common options"]
        common.add_argument("--debug", action="store_true", help="Show a traceback when something fails.")
    return actions


def _value(parser: argparse.ArgumentParser, parameter: Parameter) -> dict[str, Any]:
    """Return how argparse reads a parameter's value, or its values."""
    kind, metavar, nargs = parameter.kind, parameter.metavar, None
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is tuple:
        kind, other = get_args(kind)
        metavar, nargs = (metavar, "+") if other is ... else (tuple(metavar.split()), 2)
    if parameter.option is None:  # `parse` says which are missing, all of them at once
        nargs = "*" if nargs else "?"
    choices = get_args(kind) if get_origin(kind) is Literal else None

    def read(word: str) -> Any:
        wrong = f"{parameter.option} {word}: it must be"
        if not word:  # a path would be the folder that the program is in
            parser.error(f"{parameter.option or ''} '': it must be {parameter.metavar}".strip())
        if parameter.metavar == "FILE" and word.endswith("/"):
            parser.error(f"{parameter.option or ''} {word}: it must be a file, not a folder".strip())
        # As a path, gs://bucket would be a folder gs: in this one.
        if parameter.metavar in ("FILE", "DIR") and re.match("[a-z][a-z0-9+.-]*://", word):
            parser.error(f"{parameter.option or ''} {word}: it must be a file or folder of this machine".strip())
        if choices is None:
            try:
                return kind(word)
            except ValueError:
                parser.error(f"{wrong} {'a number' if kind is float else 'a whole number'}")
        if word not in choices:
            meant = suggest(word, choices)
            parser.error(f"{wrong} one of {', '.join(sorted(choices))}{meant and f'; {meant}'}")
        return word

    return {"metavar": metavar, "nargs": nargs, "choices": choices, "type": read}


def _help_of(command: Command) -> dict[str, Any]:
    """Return the help of a command beside its options, as argparse takes it."""
    summary, *_, examples = _sections(command)
    arguments = [parameter.metavar for parameter in parameters_of(command) if parameter.option is None]
    return _help(summary, ["[OPTIONS]", *arguments], examples.splitlines())


def _help(description: str, usage: Sequence[str], examples: Sequence[str]) -> dict[str, Any]:
    width = max(shutil.get_terminal_size().columns - 2, NARROWEST)
    return {
        "description": textwrap.fill(" ".join(description.split()), width),
        "usage": " ".join(["%(prog)s [-h]", *usage]),
        "epilog": "\n".join(["examples:", *examples]),
        # Keeps the lines of the examples.
        "formatter_class": functools.partial(argparse.RawDescriptionHelpFormatter, width=width),
        "allow_abbrev": False,
        "argument_default": argparse.SUPPRESS,  # what is not typed is not given
    }


def _described(subject: Callable) -> dict[str, tuple[str, str, str]]:
    """Return the heading, metavar and meaning that a docstring gives for each name."""
    _, *sections = _sections(subject)
    return {
        name: (heading.lower(), metavar, " ".join(text.split()))
        for heading, body in zip(sections[::2], sections[1::2], strict=True)
        for name, metavar, text in re.findall(r"^  (\w+)(?: \((.+?)\))?: (.+(?:\n    .+)*)", body, flags=re.MULTILINE)
    }


def _sections(subject: Callable) -> list[str]:
    """Return a docstring's summary, then each section's heading and its body."""
    return re.split(r"^(\w[\w ]*):\n", inspect.getdoc(subject) or "", flags=re.MULTILINE)
