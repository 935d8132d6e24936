"""The faults that are injected, and the checks that follow each. Each function returns a `Tally`."""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import lzma
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cnn_jax.data.idx import read_idx
from cnn_jax.data.loading import load_dataset
from cnn_jax.data.mnist.builder import SHA256
from cnn_jax.runs.checkpoint import open_checkpoints
from cnn_jax.runtime.errors import InputFileError, NoCheckpointError
from tests.fault_injection.runs import ROOT, Trainer, run_fingerprint
from tests.fault_injection.save_once import SAVED, STEPS, content
from tests.helpers import EMBEDDED

LOOKING = "no answer"  # of a process whose partner was killed before they had found each other


@dataclasses.dataclass
class Tally:
    """The outcome of one kind of trial.

    Attributes:
      name: The fault.
      trials: How often it was injected.
      failures: Each broken promise, in one line.
      counts: How often each detail occurred.
    """

    name: str
    trials: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def count(self, what: str) -> None:
        """Add one to a count."""
        self.counts[what] = self.counts.get(what, 0) + 1


def random_kills(trainer: Trainer, reference: str, *, kills: int, rng: random.Random) -> Tally:
    """Kill trainings with SIGKILL, half of them at a random time and half during a save; restart each to its end.

    Of a training by several processes one is killed. The others end by themselves.
    """
    of = f" of {trainer.seeds} seeds" * (trainer.seeds > 1) + f" by {trainer.processes} processes" * (
        trainer.processes > 1
    )
    tally = Tally(f"kill -9{of and f' of a training{of}'}, then the same command again")
    while tally.trials < kills and not tally.failures:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            again = 0
            while tally.trials < kills and not tally.failures:
                processes = trainer.start_all(run)
                during_save = rng.random() < 0.5
                if again:  # twice in a row: killed again while it starts
                    time.sleep(rng.uniform(0.2, 2.5))
                elif during_save:
                    _wait_for_a_save(processes[0], run / "run" / "steps", after=rng.randrange(1, 8))
                    time.sleep(rng.uniform(0, 0.06))
                else:
                    time.sleep(rng.uniform(1.5, 5.0 * trainer.processes))
                killed = rng.choice(processes)
                over = killed.poll() is not None
                if _newest_step(run) > 0:
                    tally.count("after a checkpoint")
                killed.kill()
                for process in processes:
                    code, complaint = _end(process)
                    # Where one is lost the others end with 7, unless they had taken the last step.
                    if code not in ((0, 7, LOOKING) if process is not killed else (0,) if over else (-9,)):
                        tally.failures.append(f"ended with {code}: {_last_line(complaint)}")
                if over:
                    break
                tally.trials += 1
                tally.count(
                    "aimed at a save" if during_save and not again else "twice in a row" if again else "any time"
                )
                again = not again and rng.random() < 0.15
                if any((run / "run" / "quarantine").glob("*")):
                    tally.count("checkpoints found damaged")
            _finish_and_compare(trainer, run, reference, tally)
        _report(tally, of=kills)
    return tally


def random_signals(trainer: Trainer, reference: str, *, count: int, rng: random.Random) -> Tally:
    """Stop trainings with SIGTERM or SIGINT at random times, and continue them."""
    tally = Tally("SIGTERM or SIGINT at a random time")
    while tally.trials < count and not tally.failures:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            while tally.trials < count:
                before = _newest_step(run)
                process = trainer.start(run)
                number = rng.choice((signal.SIGTERM, signal.SIGINT))
                _wait_for_handlers(process)
                time.sleep(rng.uniform(0, 4.2))
                trained = _newest_step(run) > before
                process.send_signal(number)
                begin = time.monotonic()
                complaint = process.communicate()[1]
                milliseconds = round(1e3 * (time.monotonic() - begin))
                if process.returncode == 0:  # it had already taken its last step
                    break
                tally.trials += 1
                if process.returncode != 128 + number or "Traceback" in complaint:
                    tally.failures.append(f"{number.name} ended with {process.returncode}: {_last_line(complaint)}")
                if trained and milliseconds > 2000:
                    tally.failures.append(f"{number.name} was answered after {milliseconds} ms")
                tally.count(number.name)
                slowest = "ms at most until the end " + ("while it trained" if trained else "while it started")
                tally.counts[slowest] = max(tally.counts.get(slowest, 0), milliseconds)
            _finish_and_compare(trainer, run, reference, tally)
        _report(tally, of=count)
    return tally


def two_writers(trainer: Trainer, reference: str, *, count: int) -> Tally:
    """Start two trainings of one run at once."""
    tally = Tally("two trainings of one run at once")
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            processes = [trainer.start(run) for _ in range(2)]
            complaints = [process.communicate()[1] for process in processes]
            codes = sorted(process.returncode for process in processes)
            tally.trials += 1
            if codes != [0, 6]:
                tally.failures.append(f"ended with {codes}: {_last_line(complaints[0])}; {_last_line(complaints[1])}")
            _finish_and_compare(trainer, run, reference, tally)
    _report(tally, of=count)
    return tally


def full_disk_runs(trainer: Trainer, reference: str, *, count: int, rng: random.Random) -> Tally:
    """Fill the disk at a random file operation of a training, and continue the training with free space."""
    tally = Tally("disk full at a random time of a training")
    with tempfile.TemporaryDirectory() as folder:
        library = _build_injector(Path(folder))
        for number in range(count):
            run, mark = Path(folder) / str(number), Path(folder) / "mark"
            at = int(10 ** rng.uniform(0, 3.7))
            process = trainer.start(run, environment=_injection(library, run, at, "full", mark))
            complaint = process.communicate()[1]
            if mark.exists():
                tally.trials += 1
                tally.count(f"ended with {process.returncode}")
                if process.returncode != 4 or "Traceback" in complaint:
                    tally.failures.append(f"operation {at}: ended with {process.returncode}: {_last_line(complaint)}")
                mark.unlink()
            _finish_and_compare(trainer, run, reference, tally)
    _report(tally)
    return tally


def damaged_data(*, flips: int, rng: random.Random) -> Tally:
    """Damage each file of the data in each way, and load it: it must be as published, or refused."""
    tally = Tally("a damaged file of the data")
    with tempfile.TemporaryDirectory() as folder:
        prepared, published = Path(folder) / "sound", Path(folder) / "published"
        sound = _digest_mnist(prepared)
        published.mkdir()
        for name in SHA256:
            shutil.copy(EMBEDDED / f"{name}.xz", published)
            content = lzma.decompress((EMBEDDED / f"{name}.xz").read_bytes())
            (published / f"{name}.gz").write_bytes(gzip.compress(content, 1))
        for file in sorted(path.relative_to(prepared) for path in prepared.rglob("*") if path.is_file()):
            for what, damaged in _damages((prepared / file).read_bytes(), flips, rng):
                copy = Path(folder) / "damaged"
                shutil.copytree(prepared, copy)
                _write(copy / file, damaged)
                _load_and_judge(functools.partial(_digest_mnist, copy), sound, f"{file} {what}", tally)
                shutil.rmtree(copy)
        for file in sorted(published.iterdir()):
            ndim = 3 if "idx3" in file.name else 1
            sound = _digest_idx(file, ndim)
            for what, damaged in _damages(file.read_bytes(), flips, rng):
                copy = Path(folder) / file.name
                _write(copy, damaged)
                _load_and_judge(functools.partial(_digest_idx, copy, ndim), sound, f"{file.name} {what}", tally)
                copy.unlink(missing_ok=True)
    _report(tally)
    return tally


def _load_and_judge(load: Callable[[], str], expected: str, what: str, tally: Tally) -> None:
    """Load damaged data; fail if they are neither refused nor as published."""
    tally.trials += 1
    try:
        loaded = load()
    except InputFileError:
        tally.count("refused")
    except Exception as error:
        tally.failures.append(f"{what}: {type(error).__name__}: {error}")
    else:
        tally.count("loaded as published")
        if loaded != expected:
            tally.count("silent changes")
            tally.failures.append(f"{what}: other data were loaded")


def _digest_mnist(data_dir: Path) -> str:
    return load_dataset("mnist", None, data_dir).sha256


def _digest_idx(file: Path, ndim: int) -> str:
    return hashlib.sha256(read_idx(file, ndim=ndim).tobytes()).hexdigest()


def killed_preparations(*, count: int, rng: random.Random) -> Tally:
    """Kill processes at random times while they prepare MNIST, then load it."""
    tally = Tally("kill -9 while MNIST is prepared")
    context = multiprocessing.get_context("spawn")
    sound = None
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            process = context.Process(target=load_dataset, args=("mnist", None, Path(folder)))
            process.start()
            time.sleep(rng.uniform(1.0, 6.0))
            process.kill()
            process.join()
            if any(Path(folder).rglob("*incomplete*")):
                tally.count("half prepared")
            loaded = _digest_mnist(Path(folder))
            sound = sound or loaded
            tally.trials += 1
            if loaded != sound:
                tally.failures.append("other data were loaded")
    _report(tally)
    return tally


def damaged_checkpoints(*, flips: int, rng: random.Random) -> Tally:
    """Damage each file of a checkpoint in each way, and restore: the same bits, or the previous checkpoint."""
    tally = Tally("a damaged file of a checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "sound" / "steps"
        _save_three(sound)
        newest = sound / str(STEPS[-1])
        for file in sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file()):
            for what, damaged in _damages((newest / file).read_bytes(), flips, rng):
                steps = Path(folder) / "damaged" / "steps"
                shutil.copytree(sound, steps)
                target = steps / newest.name / file
                _write(target, damaged)
                _restore_and_judge(steps, f"{file} {what}", (STEPS[-2], STEPS[-1]), tally)
                shutil.rmtree(steps.parent)
    _report(tally)
    return tally


def _write(file: Path, content: bytes | None) -> None:
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)


def _damages(content: bytes, flips: int, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Yield each way to damage a file, in words, and the content that it leaves; None if the file is deleted."""
    yield "deleted", None
    for length in sorted({0, len(content) // 2, max(0, len(content) - 1)}):
        yield f"cut to {length} bytes", content[:length]
    yield "zeroed", bytes(len(content))
    yield "with a byte more", content + b"\0"
    for _ in range(min(flips, 8 * len(content))):
        index, bit = rng.randrange(len(content)), rng.randrange(8)
        flipped = bytearray(content)
        flipped[index] ^= 1 << bit
        yield f"with bit {bit} of byte {index} flipped", bytes(flipped)


def killed_saves(*, every: int) -> Tally:
    """Kill a save at each file operation, or at every `every`th; the deletion of old checkpoints is part of a save."""
    return _at_each_change(Tally("kill -9 at each file operation of a save"), "kill", -9, every)


def full_disk(*, every: int) -> Tally:
    """Fill the disk at each file operation of a save, or at every `every`th."""
    return _at_each_change(Tally("disk full from each file operation of a save on"), "full", 4, every)


def fuzz(*, examples: int) -> Tally:
    """Run `tests/test_fuzz.py` with more examples: command lines, and files of every kind that is read."""
    tally = Tally("fuzzed command lines, and files of data, weights, pictures and runs")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_fuzz.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"FUZZ_EXAMPLES": str(examples)},
    )
    tally.trials = 8 * examples
    tally.failures = [line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if ended.returncode != 0 and not tally.failures:
        tally.failures.append(f"pytest ended with {ended.returncode}: {_last_line(ended.stdout)}")
    _report(tally)
    return tally


def _report(tally: Tally, *, of: int | None = None) -> None:
    """Print how many trials of a kind are done."""
    print(f"{tally.name}: {tally.trials}" + (f" of {of}" if of else ""), file=sys.stderr, flush=True)


def _at_each_change(tally: Tally, how: str, expected: int, every: int) -> Tally:
    with tempfile.TemporaryDirectory() as folder:
        library = _build_injector(Path(folder))
        sound = Path(folder) / "sound" / "steps"
        _save_three(sound)
        for number in itertools.count(1, every):
            steps, mark = Path(folder) / "faulty" / "steps", Path(folder) / "mark"
            shutil.copytree(sound, steps)
            code, complaint = _save_in_another_process(steps, _injection(library, steps, number, how, mark))
            injected = mark.exists()
            mark.unlink(missing_ok=True)
            if injected:
                # A save may succeed on a full disk, if only what follows it fails.
                if code not in (expected, 0) or (code == 0 and how == "kill"):
                    tally.failures.append(f"operation {number}: ended with {code}: {_last_line(complaint)}")
                tally.count(f"ended with {code}")
                _restore_and_judge(steps, f"operation {number}", (SAVED,) if code == 0 else (STEPS[-1], SAVED), tally)
                if any((steps.parent / "quarantine").glob("*")):
                    tally.count("with a checkpoint moved aside")
            elif code != 0:
                tally.failures.append(f"a save without a fault ended with {code}: {_last_line(complaint)}")
            shutil.rmtree(steps.parent)
            if not injected:  # the save has fewer operations
                break
    _report(tally)
    return tally


def _save_in_another_process(steps: Path, environment: dict[str, str]) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.fault_injection.save_once", str(steps)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    return ended.returncode, ended.stderr


def _build_injector(folder: Path) -> Path:
    library = folder / "inject_fault.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("inject_fault.c")], check=True)
    return library


def _injection(library: Path, folder: Path, at: int, how: str, mark: Path) -> dict[str, str]:
    """Return the environment of a process in which `inject_fault.c` injects a fault."""
    fault = {"FAULT_FOLDER": folder, "FAULT_AT": at, "FAULT_HOW": how, "FAULT_MARK": mark}
    return {name: str(value) for name, value in ({"LD_PRELOAD": library} | fault).items()}


def _save_three(steps: Path) -> None:
    with open_checkpoints(steps, writing=True, warn=print) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, *content(step), {})


def _restore_and_judge(steps: Path, what: str, allowed: tuple[int, ...], tally: Tally) -> None:
    """Restore the newest checkpoint as a run does; fail unless it is, bit for bit, one of those allowed."""
    tally.trials += 1
    warnings = []
    try:
        with open_checkpoints(steps, writing=True, warn=warnings.append) as checkpoints:
            restored = checkpoints.restore_latest(lambda meta: content(0)[0])
    except NoCheckpointError as error:
        tally.failures.append(f"{what}: {error}")
        return
    if restored is None:
        tally.failures.append(f"{what}: nothing was restored; {warnings}")
        return
    step = int(restored.state.step)
    if step not in allowed:
        tally.failures.append(f"{what}: step {step} was restored; {warnings}")
        return
    state, losses = content(step)
    same = np.array_equal(restored.state.params["kernel"], state.params["kernel"])
    if not same or not np.array_equal(restored.losses, losses):
        tally.count("silent changes")
        tally.failures.append(f"{what}: the arrays of step {step} are not those that were saved")
    if step != max(allowed) and len(allowed) > 1 and allowed[-1] == STEPS[-1] and not warnings:
        tally.failures.append(f"{what}: step {step} was restored without a warning")
    tally.count(f"step {step} restored")


def _wait_for_handlers(process: subprocess.Popen) -> None:
    """Wait until a process answers SIGTERM itself, or has ended: until Python has started, the system ends it."""
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = re.search(r"SigCgt:\s+(\w+)", status)
        if caught and int(caught[1], 16) & 1 << (signal.SIGTERM - 1):
            return
        time.sleep(0.005)


def _wait_for_a_save(process: subprocess.Popen, steps: Path, *, after: int) -> None:
    """Wait until a process has begun its `after`th save from now, or has ended."""
    begun = set()
    while process.poll() is None:
        try:
            saving = {path.name for path in steps.iterdir() if "tmp" in path.name}
        except FileNotFoundError:
            saving = set()
        begun |= saving
        if len(begun) >= after:
            return
        time.sleep(0.0005)


def _end(process: subprocess.Popen) -> tuple[int | str, str]:
    """Return how a process ended and what it wrote to stderr; kill it if it goes on looking for others."""
    try:
        complaint = process.communicate(timeout=30)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        return LOOKING, process.communicate()[1]
    return process.returncode, complaint


def _finish_and_compare(trainer: Trainer, run: Path, reference: str, tally: Tally) -> None:
    """Continue a run to its end; fail unless it ends in the bits of the uninterrupted run."""
    code, complaint = trainer.finish(run)
    if code != 0:
        tally.failures.append(f"the last command ended with {code}: {_last_line(complaint)}")
    elif run_fingerprint(run) != reference:
        tally.failures.append("the run ended in other bits")
    tally.count("runs compared")


def _newest_step(folder: Path) -> int:
    """Return the newest step of which a run has a complete checkpoint, or -1."""
    return max((int(path.name) for path in (folder / "run" / "steps").glob("*") if path.name.isdigit()), default=-1)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
