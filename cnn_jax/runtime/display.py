"""A run's output: the tutorial's own lines on stdout, and everything else on stderr."""

import collections
import contextlib
import os
import re
import shutil
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cnn_jax.runtime.streams import printable

REMIND_SECONDS = 15
# Flax's arguments for a table of layers in plain text and 80 columns.
LAYER_TABLE = {
    "console_kwargs": {"width": 80, "force_terminal": False},
    "table_kwargs": {"box": box.SIMPLE, "padding": (0, 0)},
}


def _size(variable: str, size: int) -> int | None:
    """Return a size of the terminal where Rich would get it wrong: it takes COLUMNS=0 as it is, and fails on `²`."""
    given = os.environ.get(variable, "")
    return size if given.isdigit() and not given.strip("0").isdecimal() else None


class Display:
    """Shows a run: one line per epoch, and on a terminal a progress bar; elsewhere no control characters.

    If several processes train together, only one of them shows it.
    """

    def __init__(self, *, shown: bool = True) -> None:
        self._shown = shown
        # What is shown is text: nothing in it is markup, or the name of an emoji.
        terminal = shutil.get_terminal_size()
        self._console = Console(
            stderr=True, markup=False, emoji=False, highlight=False, quiet=not shown,
            width=_size("COLUMNS", terminal.columns), height=_size("LINES", terminal.lines),
        )  # fmt: skip
        self._progress: Progress | None = None

    def say(self, *lines: str) -> None:
        """Write lines about the run to stderr."""
        with self._bar_hidden():
            for line in lines:
                # Only a terminal needs lines that fit; a program that reads a pipe wants them whole.
                self._console.print(printable(line), soft_wrap=not self._console.is_terminal)

    def result(self, *lines: str) -> None:
        """Write lines to stdout: the tutorial's, or another command's result."""
        if self._shown:
            with self._bar_hidden():
                print(*map(printable, lines), sep="\n", flush=True)

    def epoch_cost(self, epoch: int, cost: float) -> None:
        """Write an epoch's cost to stdout in the tutorial's format; epochs count from 1."""
        self.result(f"[Epoch: {epoch:>4}] cost = {cost:>.9}")

    def accuracy(self, accuracy: float) -> None:
        """Write the test accuracy, in [0, 1], to stdout as the tutorial does."""
        self.result(f"Accuracy: {accuracy:.4f}")

    def picture(self, image: np.ndarray) -> None:
        """Draw an image, (H, W) uint8, on stderr: two rows of pixels per line, pixels of at least 128 as blocks."""
        pixels = np.pad(image, ((0, len(image) % 2), (0, 0))) >= 128
        blocks = np.array(list(" ▄▀█"))
        self.say(*("".join(row).rstrip() for row in blocks[2 * pixels[::2] + pixels[1::2]]))

    @contextlib.contextmanager
    def progress(self, *, total_steps: int, steps_done: int) -> Iterator[None]:
        """Show a progress bar, on a terminal, until the block ends."""
        if not self._console.is_terminal or not self._shown:
            yield
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            # Lines for stdout must go to stdout, even if that is not the terminal.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        try:
            with self._progress:
                self._progress.add_task("", total=total_steps, completed=steps_done, status="compiling")
                yield
        finally:
            self._progress = None

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what takes so long until the block ends: on a terminal by a spinner, elsewhere by a line now and then."""
        if self._console.is_terminal and self._shown:
            with self._console.status(printable(what)):
                yield
            return
        start, done = time.perf_counter(), threading.Event()

        def remind() -> None:
            while not done.wait(REMIND_SECONDS):
                self.say(f"{what}: {describe_seconds(time.perf_counter() - start)} so far")

        reminder = threading.Thread(target=remind, daemon=True)
        reminder.start()
        try:
            yield
        finally:
            done.set()
            reminder.join()

    def advance(self, *, epoch: int, epochs: int, step: int, cost: float, examples_per_second: float) -> None:
        """Move the bar: the step reached, the epoch's mean cost so far and the images trained per second."""
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0],
                completed=step,
                description=f"epoch {epoch}/{epochs}",
                status=f"cost {cost:.4f}  {examples_per_second:,.0f} images/s",
            )

    def epoch_line(
        self,
        *,
        epoch: int,
        epochs: int,
        tested_on: str,
        accuracy: float,
        examples_per_second: float,
        left: float,
    ) -> None:
        """Say where the run is after an epoch."""
        self.say(
            f"epoch {epoch}/{epochs}: {tested_on} accuracy {accuracy:.4f}, {examples_per_second:,.0f} images/s, "
            f"{describe_seconds(left)} left"
        )

    def table(self, title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
        """Show a table of names and values: one value each, or one for each of the header's columns but the first."""
        table = Table(title=printable(title), box=box.SQUARE, show_header=bool(header), title_justify="left")
        for i, name in enumerate(header or ("", "")):
            table.add_column(printable(name), no_wrap=i == 0, overflow="fold")
        for row in rows:
            table.add_row(*map(printable, row))
        with self._bar_hidden():
            self._console.print(table)

    @contextlib.contextmanager
    def _bar_hidden(self) -> Iterator[None]:
        if self._progress is None:
            yield
            return
        self._progress.stop()
        yield
        self._progress.start()


class Stopwatch:
    """Adds up how long each part of a run takes.

    Attributes:
      seconds: The seconds that each named part took, in the order in which the parts began.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    header, *rows = ([escape_markdown(str(cell)) for cell in line] for line in (header, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def escape_markdown(text: str) -> str:
    """Return Markdown that shows a text, in one line."""
    # "_" means something at the edge of a word alone.
    return re.sub(r"[\\`*~\[\]<>|&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(" ".join(text.split())))


def describe_seconds(seconds: float) -> str:
    """Return a duration as a person says it: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def describe_values(values: list[float]) -> str:
    """Return a value, or the mean of several with their standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
