"""Train on more images than memory holds: `python -m benchmarks.more_than_memory FOLDER`, on Linux, with 7 GB free.

It makes sets of 60,000, 200,000 and 2,000,000 images of 32x32x3; the smaller ones are the first of the largest. In each
round `train` takes the same number of steps on each, in a process of its own whose memory is watched. Then a run on the
largest is killed within its epoch and continued. The result is written to `benchmarks/runs/feed/more_than_memory.json`.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
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


def train(data: Path, folder: Path, case: Case, steps: int) -> dict[str, float]:
    """Train so many steps in a process of its own, and return what that took."""
    process = start_training(data, folder, case, steps)
    *_, peaks = watch(process, data, case)
    epochs = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "run" / "result.json").read_text())
    return {
        "step_milliseconds": 1e3 * sum(epoch["seconds"] for epoch in epochs) / steps,
        "loading_seconds": result["seconds"]["loading"],
        "resident_bytes": peaks["VmHWM"],
        "anonymous_bytes": peaks["RssAnon"],
    }


def kill_and_continue(data: Path, folder: Path, case: Case, steps: int) -> int:
    """Kill a training by SIGKILL once it has saved, and run it to its end; return the step that it continued after."""
    every = "--checkpoint-every-steps", str(steps // 4)
    saved = 0
    for _ in watch(start_training(data, folder, case, steps, *every), data, case):
        if saved := max((int(step.name) for step in (folder / "run" / "steps").glob("*[0-9]")), default=0):
            break
    assert 0 < saved < steps, "the training ended before it was killed: it needs more steps"
    for _ in watch(start_training(data, folder, case, steps, *every), data, case):
        pass
    return saved


def start_training(data: Path, folder: Path, case: Case, steps: int, *options: str) -> subprocess.Popen:
    """Start or continue the run `run` in a folder."""
    epochs = f"{steps * BATCH_SIZE / case.images:.9g}"
    arguments = [
        "--dataset-dir", data, "--checkpoint-dir", folder, "--run-name", "run", "--batch-size", BATCH_SIZE,
        "--epochs", epochs, "--feed", case.feed, *options,
    ]  # fmt: skip
    nowhere = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, *PROGRAM, *map(str, arguments)], cwd=ROOT, stdout=nowhere, stderr=nowhere)


def watch(process: subprocess.Popen, data: Path, case: Case) -> Iterator[dict[str, int]]:
    """Yield the peaks of a process's memory until it ends; it is killed where the caller looks no further.

    Its resident set is `VmHWM`, and what of it is not a file's is `RssAnon`, in bytes. The system's cache of files is
    in neither.
    """
    peaks: dict[str, int] = collections.defaultdict(int)
    try:
        with (data / IMAGES).open("rb") as images:
            while process.poll() is None:
                if case.uncached:
                    os.posix_fadvise(images.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                for name, kibibytes in re.findall(
                    r"(VmHWM|RssAnon):\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()
                ):
                    peaks[name] = max(peaks[name], 1024 * int(kibibytes))
                yield peaks
                time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, f"{process.args} ended with {process.returncode}"


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
        for number, case in enumerate(cases):
            run = args.folder / "runs" / f"{number}-{i}"
            rounds[case].append(train(data[case.images], run, case, args.steps))
            print(case, rounds[case][-1], flush=True)
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
