"""Start real trainings on a few real images as processes, and compare their final states bit for bit."""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EPOCHS = 3
# A checkpoint every second step, so that a kill at a random time often hits a save.
STEPS_PER_CHECKPOINT = 2


@dataclasses.dataclass(frozen=True)
class Trainer:
    """How trainings are started.

    Attributes:
      data: A folder of four IDX files.
      mutant: The part of the program that is broken on purpose, a key of `mutants.MUTANTS`, or None.
      seeds: How many seeds a run trains.
      processes: How many processes train it.
      epochs: How long it trains.
      program: What Python starts, unless it is a mutant.
    """

    data: Path
    mutant: str | None = None
    seeds: int = 1
    processes: int = 1
    epochs: int = EPOCHS
    program: tuple[str, ...] = ("-m", "cnn_jax", "train")

    def start_all(self, folder: Path) -> list[subprocess.Popen]:
        """Start or continue training the run `run` in a folder, in as many processes as it has."""
        if self.processes == 1:
            return [self.start(folder)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            cluster = "--coordinator", f"localhost:{free.getsockname()[1]}", "--num-processes", str(self.processes)
        return [self.start(folder, *cluster, "--process-id", str(i)) for i in range(self.processes)]

    def start(self, folder: Path, *options: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
        """Start one process of the training."""
        mutant = ["-m", "tests.fault_injection.mutants", self.mutant, "train"]
        program = self.program if self.mutant is None else mutant
        arguments = [
            "--dataset-dir", self.data, "--checkpoint-dir", folder, "--run-name", "run", "--epochs", self.epochs,
            "--checkpoint-every-steps", STEPS_PER_CHECKPOINT, "--platform", "cpu", "--seeds", self.seeds,
            *options,
        ]  # fmt: skip
        return subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={"JAX_COMPILATION_CACHE_DIR": str(self.data.parent / "compiled"), **os.environ, **(environment or {})},
        )

    def finish(self, folder: Path) -> tuple[int, str]:
        """Run the same command to its end and return its exit code and what it wrote to stderr."""
        processes = self.start_all(folder)
        complaints = [process.communicate()[1] for process in processes]
        return max(process.returncode for process in processes), complaints[0]


def run_fingerprint(folder: Path) -> str:
    """Return a digest of a finished run's metrics, without their times, and of its newest checkpoint's bits."""
    run = folder / "run"
    sha256 = hashlib.sha256()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        epoch = json.loads(line)
        sha256.update(json.dumps([epoch[k] for k in ("epoch", "step", "cost", "test_accuracy", "test_loss")]).encode())
    for path, array in read_newest(run / "steps").items():
        sha256.update(f"{path} {array.dtype} {array.shape}".encode())
        sha256.update(array.tobytes())
    return sha256.hexdigest()


def read_newest(steps: Path) -> dict:
    """Return every array of the newest checkpoint by its path, read with Orbax alone, without this program's checks."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    newest = max((int(step.name) for step in steps.iterdir() if step.name.isdigit()), default=None)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(steps.resolve() / str(newest) / "state")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
