"""Train on more images than memory holds: `python -m benchmarks.more_than_memory FOLDER`, on Linux, with 7 GB free.

It makes sets of 60,000, 200,000 and 2,000,000 images of 32x32x3; the smaller ones are the first of the largest. In each
round `train` takes the same number of steps on each, in processes of their own that run for two seconds each in turn. A
run on the largest is then killed within its epoch and continued. The result is written to
`benchmarks/runs/feed/more_than_memory.json`.
"""

import argparse
import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnn_jax.data.idx import idx_header
from cnn_jax.runtime.devices import describe_machine, leave_out_absent_accelerators, versions
from tests.fault_injection.runs import run_fingerprint

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "runs" / "feed" / "more_than_memory.json"
PROGRAM = ("train.py",)
IMAGES = "train-images-idx4-ubyte"
IMAGE_SHAPE = 32, 32, 3
BATCH_SIZE = 100
TEST_IMAGES = 1_000
WRITTEN_AT_ONCE = 10_000
SAVES = 8  # of a training, between which its steps are timed
TURN_SECONDS = 2


class Case(NamedTuple):
    """A way to train.

    Attributes:
      images: How many there are.
      feed: How they reach the device.
      uncached: Whether the system is told again and again to forget what it has read of them, so that they come from
        the disk, as where there is no memory to spare.
    """

    images: int
    feed: str
    uncached: bool = False


def make_set(folder: Path, count: int) -> None:
    """Write images of noise, brighter class by class, as IDX files; a smaller set is the beginning of a larger one."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, images) in enumerate({"train": count, "t10k": TEST_IMAGES}.items()):
        labels = (np.arange(images) % 10).astype(np.uint8)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx_header(labels.shape) + labels.tobytes())
        with (folder / IMAGES.replace("train", split)).open("wb") as file:
            file.write(idx_header((images, *IMAGE_SHAPE)))
            for start in range(0, images, WRITTEN_AT_ONCE):
                part = labels[start : start + WRITTEN_AT_ONCE, np.newaxis, np.newaxis, np.newaxis]
                noise = np.random.default_rng([seed, start]).integers(0, 64, (len(part), *IMAGE_SHAPE), np.uint8)
                file.write((noise + 16 * part).tobytes())


class Training:
    """A process that starts or continues the run `run` in a folder, and that runs only when it is told to go on.

    Attributes:
      saved: For how many seconds it had run when each of its checkpoints was there, by their steps.
      peaks: Those of its memory, in bytes. Its resident set is `VmHWM`, and what of it is no file's is `RssAnon`; the
        system's cache of files is in neither.
    """

    def __init__(self, data: Path, folder: Path, case: Case, steps: int):
        epochs = f"{steps * BATCH_SIZE / case.images:.9g}"
        arguments = [
            "--dataset-dir", data, "--checkpoint-dir", folder, "--run-name", "run", "--batch-size", BATCH_SIZE,
            "--epochs", epochs, "--feed", case.feed, "--checkpoint-every-steps", max(1, steps // SAVES),
        ]  # fmt: skip
        nowhere = subprocess.DEVNULL
        command = [sys.executable, *PROGRAM, *map(str, arguments)]
        self.saved: dict[int, float] = {}
        self.peaks: dict[str, int] = collections.defaultdict(int)
        self._images, self._uncached, self._run, self._seconds = data / IMAGES, case.uncached, folder / "run", 0.0
        self._earlier = set(self._steps())
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=nowhere, stderr=nowhere)
        self.process.send_signal(signal.SIGSTOP)

    def _steps(self) -> list[int]:
        return [int(step.name) for step in (self._run / "steps").glob("*[0-9]")]

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None

    def go_on(self, is_enough: Callable[[float], bool]) -> None:
        """Let it run until so many seconds from now are enough, or it ends; it is killed where that fails."""
        before, begin = self._seconds, time.perf_counter()
        self.process.send_signal(signal.SIGCONT)
        with contextlib.ExitStack() as failed, self._images.open("rb") as images:
            failed.callback(self.kill)
            while not self.is_over and not is_enough(self._seconds - before):
                if self._uncached:
                    os.posix_fadvise(images.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                status = Path(f"/proc/{self.process.pid}/status").read_text()
                for name, kibibytes in re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", status):
                    self.peaks[name] = max(self.peaks[name], 1024 * int(kibibytes))
                time.sleep(0.02)
                self._seconds = before + time.perf_counter() - begin
                self.saved |= dict.fromkeys(set(self._steps()) - self._earlier - self.saved.keys(), self._seconds)
            failed.pop_all()
        self.process.send_signal(signal.SIGSTOP)
        assert not self.process.returncode, f"{self.process.args} ended with {self.process.returncode}"

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()

    def measured(self) -> dict[str, float]:
        """Return what it took."""
        (first, begin), *_, (last, end) = sorted(self.saved.items())
        result = json.loads((self._run / "result.json").read_text())
        return {
            "step_milliseconds": 1e3 * (end - begin) / (last - first),
            "loading_seconds": result["seconds"]["loading"],
            "resident_bytes": self.peaks["VmHWM"],
            "anonymous_bytes": self.peaks["RssAnon"],
        }


def train_in_turn(trainings: list[Training]) -> list[dict[str, float]]:
    """Let each train a short while in turn: a machine that is faster now, then slower, is so for all of them alike."""
    try:
        for training in trainings:  # they load and compile one after the other
            training.go_on(lambda _, training=training: bool(training.saved))
        while running := [training for training in trainings if not training.is_over]:
            for training in running:
                training.go_on(lambda seconds: seconds > TURN_SECONDS)
    finally:
        for training in trainings:
            training.kill()
    return [training.measured() for training in trainings]


def kill_and_continue(data: Path, folder: Path, case: Case, steps: int) -> int:
    """Kill a training by SIGKILL once it has saved, and run it to its end; return the step that it continued after."""
    killed = Training(data, folder, case, steps)
    killed.go_on(lambda _: bool(killed.saved))
    killed.kill()
    saved = max(killed.saved, default=0)
    assert 0 < saved < steps, "the training ended before it was killed: it needs more steps"
    Training(data, folder, case, steps).go_on(lambda _: False)
    return saved


def main() -> None:
    """Make the sets, train on them in turn, and write down what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the sets and the runs are written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--largest", type=int, default=2_000_000, help="how many images the largest set has")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    leave_out_absent_accelerators()
    largest = Case(args.largest, "stream")
    cases = [Case(60_000, "resident"), Case(200_000, "stream"), largest, largest._replace(uncached=True)]
    data = {case.images: args.folder / str(case.images) for case in cases}
    for images, folder in data.items():
        make_set(folder, images)
    rounds: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for i in range(args.rounds):
        folders = [args.folder / "runs" / f"{number}-{i}" for number in range(len(cases))]
        of_round = [
            Training(data[case.images], run, case, args.steps) for case, run in zip(cases, folders, strict=True)
        ]
        for case, measured in zip(cases, train_in_turn(of_round), strict=True):
            rounds[case].append(measured)
            print(case, measured, flush=True)
    killed, whole = args.folder / "runs" / "killed", args.folder / "runs" / f"{cases.index(largest)}-0"
    result = {
        "machine": describe_machine(),
        "versions": versions("cnn-jax", "jax", "jaxlib", "python"),
        "image_shape": IMAGE_SHAPE,
        "batch_size": BATCH_SIZE,
        "steps": args.steps,
        "cases": [{**case._asdict(), "rounds": rounds[case]} for case in cases],
        "killed_after_step": kill_and_continue(data[largest.images], killed, largest, args.steps),
        "same_bits": run_fingerprint(killed) == run_fingerprint(whole),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
