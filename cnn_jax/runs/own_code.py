"""A network or a recipe in a Python file of the user's, `FILE.py:NAME`: read once, and known by its SHA-256."""

import contextlib
import difflib
import hashlib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from cnn_jax.runtime.errors import (
    OWN_MODULE,
    CnnJaxError,
    UsageError,
    forbids_transfers,
    lacks_memory,
    last_frame_in,
    suggest,
    text_of,
)
from cnn_jax.runtime.files import read_file

FORM = re.compile(r"(.+\.py):([^\W\d]\w*)", re.DOTALL)


class OwnCode(str):
    """`FILE.py:NAME`, with the file's content as it was when this was made.

    Attributes:
      file: The file.
      name: What is meant of what the file defines.
      source: The file's content.
    """

    file: Path
    name: str
    source: bytes

    def __new__(cls, word: str) -> Self:
        """Read the file that a word names.

        Raises:
          UsageError: the word has another form, or there is no such file.
        """
        if isinstance(word, cls):
            return word
        code, parts = super().__new__(cls, word), FORM.fullmatch(word)
        if parts is None:
            raise UsageError(f"{word}: it must be FILE.py:NAME")
        code.file, code.name = Path(parts[1]), parts[2]
        if re.search("[\ud800-\udfff]", str(code.file.resolve())):  # which a run's JSON cannot hold
            raise UsageError(f"{word}: it must be text in UTF-8")
        try:
            code.source = read_file(code.file)
        except (OSError, ValueError) as error:
            raise UsageError(f"{word}: the file cannot be read ({error})") from error
        return code

    @property
    def identity(self) -> str:
        """Its name and its file's SHA-256, wherever the file is."""
        return f"{self.name}, SHA-256 {hashlib.sha256(self.source).hexdigest()}"

    def load(self, option: str) -> Any:
        """Run the file, once per process, and return what is meant of it.

        Args:
          option: Which option names it, for messages.

        Raises:
          UsageError: it fails, or defines nothing of that name.
        """
        import jax  # refusals of settings do without it

        from cnn_jax.runtime.devices import SETTINGS

        kept = (*SETTINGS, "jax_disable_jit")  # without jit nothing can be compiled before it runs
        place = f"{OWN_MODULE}{hashlib.sha256(self.source).hexdigest()}"
        module = sys.modules.get(place)
        if module is None:
            # Dataclasses, as Flax's modules are, look their module up while they are made.
            module = sys.modules[place] = types.ModuleType(place)
            module.__file__ = str(self.file)
            before = {name: jax.config.values[name] for name in kept}
            try:
                with self.failures_named(option):
                    exec(compile(self.source, str(self.file), "exec"), vars(module))
                if changed := [name for name in kept if jax.config.values[name] != before[name]]:
                    raise UsageError(f"{option} {self}: it changes JAX's setting {changed[0]}; leave that as it is")
            except BaseException:
                del sys.modules[place]
                raise
        if self.name not in vars(module):
            meant = suggest(self.name, vars(module))
            raise UsageError(f"{option} {self}: the file defines no {self.name}{meant and f'; {meant}'}")
        return vars(module)[self.name]

    @contextlib.contextmanager
    def failures_named(self, option: str) -> Iterator[None]:
        """Report what the user's code raises with the line of the file that raised it.

        Raises:
          UsageError: naming both.
        """
        try:
            yield
        except (CnnJaxError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raising = error if isinstance(error, SyntaxError) else last_frame_in([str(self.file)], error)
            # One that is not the user's ends this generator.
            ends_generator = isinstance(error, GeneratorExit) and raising is None
            if ends_generator or lacks_memory(error) or forbids_transfers(error):
                raise
            where = f"line {raising.lineno}: " if raising and raising.lineno else ""
            lines = [*filter(None, map(str.strip, text_of(error).splitlines())), ""]
            reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0] or "it says nothing of why"
            needs = isinstance(error, ModuleNotFoundError)
            remedy = "; install it, or name the folder that it is in in PYTHONPATH" if needs else ""
            raise UsageError(f"{option} {self}: {where}{type(error).__name__}: {reason}{remedy}") from error

    def describe_change(self, before: bytes) -> str:
        """Return in a few words how the file differs from what it was before: the first lines that do."""
        old, new = (content.decode(errors="replace").splitlines() for content in (before, self.source))
        changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        for kind, i, i_end, j, j_end in changes:
            if kind != "equal":
                was, now = ("".join(lines[:1]).strip() for lines in (old[i:i_end], new[j:j_end]))
                return f"line {j + 1} was {was!r} and is {now!r}" if was or now else f"line {j + 1} is another"
        return "only in how its lines end"
