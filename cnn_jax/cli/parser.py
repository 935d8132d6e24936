"""How the words of a command line become the call of a command, by argparse and the command's signature."""

import argparse
import difflib
import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from cnn_jax import __version__
from cnn_jax.runs.settings import COMMON, Option, TrainSettings, check_values, choices_of, option_name
from cnn_jax.runtime.errors import UsageError, suggest

# A function whose docstring is its help. What it takes by position is an argument, and what it takes by keyword an
# option: the `Option` in the annotation describes it. One that takes a `TrainSettings` has an option for each field.
Command = Callable[..., None]

ABOUT = "Train, test and look at the convolutional network of a well-known PyTorch tutorial on MNIST."


def parse(command: Command, arguments: Sequence[str], *, prog: str) -> functools.partial[None]:
    """Read the call of a command from the words after the program's name; `--help` and `--version` print and exit.

    Raises:
      UsageError: with what is wrong, and what is near it, in one line.
    """
    parser = CommandParser(prog=prog, **_help(command))
    parser.take_parameters(command)
    # An option may be typed with underscores too, as Python has its name.
    words = [re.sub("^--[^=]+", lambda option: option[0].replace("_", "-"), word) for word in arguments]
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"Unrecognized options: {', '.join(unknown)}{parser.meant(unknown)}")
    given = {name: value for name, value in vars(namespace).items() if value not in (None, [])}
    del given["debug"]  # whoever calls the command heeds it
    if missing := [words for name, words in parser.required.items() if name not in given]:
        parser.error(f"Missing from {prog}: {', '.join(missing)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if _takes_settings(command):
        return functools.partial(command, TrainSettings.of(**given))
    check_values(given, command.__annotations__)
    return functools.partial(command, **given)


def parse_command(
    commands: Sequence[Command], arguments: Sequence[str], prog: str = "cnn-jax"
) -> functools.partial[None]:
    """Read the call of the command that the first word names; `--print-completion SHELL` prints a script and exits.

    Raises:
      UsageError: as `parse` does.
    """
    named = {command.__name__.replace("_", "-"): command for command in commands}
    word = arguments[0] if arguments else ""
    if word in named:
        return parse(named[word], arguments[1:], prog=f"{prog} {word}")
    if word.partition("=")[0] not in ("-h", "--help", "--version", "--print-completion"):
        wrong = f"there is no command {word}" if word else "a command is missing"
        meant = suggest(word, named) or f"the commands are {', '.join(named)}"
        raise UsageError(f"{wrong}; {meant}; {prog} --help explains them")

    import shtab

    examples = [_help(command)["examples"][0] for command in commands]
    parser = CommandParser(prog=prog, description=ABOUT, usage=f"{prog} [-h] COMMAND [OPTIONS]", examples=examples)
    shtab.add_argument_to(parser, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in named.items():
        texts = _help(command)
        subparser = subparsers.add_parser(name, help=texts["description"], **texts)
        subparser.take_parameters(command)
        for action in subparser.paths:
            action.complete = shtab.FILE
    parser.parse_args(arguments)  # exits
    raise AssertionError


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, which raises its errors, names what is near a wrong option, and ends its help with examples.

    Attributes:
      options: The options by their names, each with what stands for its value.
      required: What must be given, by its parameter's name, written in the same way.
      paths: The arguments and options that name a file or a folder.
    """

    def __init__(self, *, examples: Sequence[str], **texts: Any):
        super().__init__(allow_abbrev=False, **texts)
        self.add_argument("--version", action="version", version=f"cnn-jax {__version__}", help=argparse.SUPPRESS)
        self.examples = examples
        self.options: dict[str, str] = {}
        self.required: dict[str, str] = {}
        self.paths: list[argparse.Action] = []

    def take_parameters(self, command: Command) -> None:
        """Add an argument or an option for each parameter of a command, under the headings of the help."""
        groups: dict[str, Any] = {"options": self}
        for parameter in _parameters(command).values():
            option = next(each for each in parameter.annotation.__metadata__ if isinstance(each, Option))
            if option.group not in groups:
                groups[option.group] = self.add_argument_group(option.group)
            self._add(groups[option.group], parameter, option)
        groups[COMMON].add_argument("--debug", action="store_true", help="Show a traceback when something fails.")
        self.options["--debug"] = "--debug"

    def _add(self, group: Any, parameter: inspect.Parameter, option: Option) -> None:
        kind, required = parameter.annotation.__origin__, parameter.default is parameter.empty
        if isinstance(kind, types.UnionType):
            kind, _ = get_args(kind)  # the other one is None
        told: dict[str, Any] = {"help": _help_of(option, parameter).replace("%", "%%")}
        names = [parameter.name]
        if parameter.kind is parameter.KEYWORD_ONLY:
            names = [option_name(parameter.name), *([option.alias] if option.alias else [])]
            self.options |= dict.fromkeys(names, f"{names[0]} {option.metavar or ''}".strip())
        if required:
            self.required[parameter.name] = self.options.get(names[0], option.metavar)
        if kind is bool:
            group.add_argument(*names, action="store_true", default=None, **told)
            return
        told["metavar"] = option.metavar
        if get_origin(kind) is tuple:
            kind, second = get_args(kind)
            told["nargs"] = "+" if second is ... else 2
            told["metavar"] = option.metavar if second is ... else tuple(option.metavar.split())
        if names[0] not in self.options:
            told["nargs"] = "*" if "nargs" in told else "?"  # `parse` says which are missing, all of them at once
        action = group.add_argument(*names, type=self._reader(names[0], kind), choices=choices_of(kind) or None, **told)
        if kind is Path:
            self.paths.append(action)

    def _reader(self, name: str, kind: Any) -> Callable[[str], Any]:
        """Return the function that reads a value of an option."""
        choices = choices_of(kind)

        def read(word: str) -> Any:
            if choices and word not in choices:
                near = suggest(word, choices)
                self.error(
                    f"{name} {word}: it must be one of {', '.join(sorted(choices))}{f'; {near}' if near else ''}"
                )
            try:
                return word if choices else kind(word)
            except ValueError:
                self.error(f"{name} {word}: it must be {'a number' if kind is float else 'a whole number'}")

        return read

    def meant(self, words: Sequence[str]) -> str:
        """Return which options are near to those, as a part of a message."""
        near = [difflib.get_close_matches(word.partition("=")[0], self.options, n=1) for word in words]
        names = [self.options[name] for names in near for name in names]
        return f"; perhaps you meant: {', '.join(names)}" if names else ""

    def error(self, message: str) -> NoReturn:
        """Raise a usage error, in place of printing it."""
        raise UsageError(f"{message}; {self.prog} --help lists what there is")

    def format_help(self) -> str:
        """Return the help, with the examples below it."""
        return super().format_help() + "\nexamples:\n" + "".join(f"  {example}\n" for example in self.examples)


def _help(command: Command) -> dict[str, Any]:
    """Return what a command's docstring says about it, as `CommandParser` takes it."""
    description, _, examples = (inspect.getdoc(command) or "").partition("\n\nExamples:\n")
    arguments = [
        parameter.annotation.__metadata__[0].metavar
        for parameter in _parameters(command).values()
        if parameter.kind is not parameter.KEYWORD_ONLY
    ]
    return {
        "description": " ".join(description.split()),
        "usage": " ".join(["%(prog)s [-h] [OPTIONS]", *arguments]),
        "examples": [line.strip() for line in examples.splitlines()],
    }


def _parameters(command: Command) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(TrainSettings if _takes_settings(command) else command).parameters


def _takes_settings(command: Command) -> bool:
    return TrainSettings in command.__annotations__.values()


def _help_of(option: Option, parameter: inspect.Parameter) -> str:
    """Return an option's help with its default in words."""
    if parameter.default is parameter.empty:
        return option.help + (" (required)" if parameter.kind is parameter.KEYWORD_ONLY else "")
    default = option.default
    if default is None and parameter.default not in (None, False):
        default = " ".join(map(str, parameter.default)) if isinstance(parameter.default, tuple) else parameter.default
    return option.help if default is None else f"{option.help} (default: {default})"


def option_names(command: Command) -> set[str]:
    """Return the names of a command's options."""
    parser = CommandParser(**_help(command))
    parser.take_parameters(command)
    return set(parser.options)
