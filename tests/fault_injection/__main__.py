"""Run all fault injection: `python -m tests.fault_injection --seed 1 --kills 200`. It prints a table at the end."""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cnn_jax.runtime.devices import versions
from cnn_jax.runtime.display import Display, markdown_table
from tests.fault_injection.runs import Trainer, run_fingerprint
from tests.fault_injection.trial_kinds import all_trials, negative_controls
from tests.helpers import write_small_mnist

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "python")


def main() -> None:
    """Inject faults into the program, and into copies of it with one thing broken.

    The exit code is 0 if the program keeps every promise and each broken copy breaks one, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.fault_injection", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seeds every random choice")
    parser.add_argument(
        "--kills",
        type=int,
        default=200,
        help="how often to kill a training with SIGKILL: one of one seed, of several, by two processes",
    )
    parser.add_argument("--signals", type=int, default=50, help="how often to send SIGTERM or SIGINT to a training")
    parser.add_argument("--full-disks", type=int, default=20, help="how often to fill the disk during a training")
    parser.add_argument("--preparations", type=int, default=20, help="how often to kill the preparation of MNIST")
    parser.add_argument("--races", type=int, default=20, help="how often to start two trainings of one run")
    parser.add_argument(
        "--flips", type=int, default=20, help="bits to flip in each file of a checkpoint and of the data"
    )
    parser.add_argument("--every", type=int, default=1, help="inject a fault at every Nth file operation of a save")
    parser.add_argument("--examples", type=int, default=1250, help="command lines, and files of each kind, to fuzz")
    parser.add_argument("--output", type=Path, help="folder for the result as JSON and Markdown")
    arguments = parser.parse_args()
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_small_mnist(data, train=2030, test=510)
        references = {}
        for trainer in (Trainer(data), Trainer(data, seeds=3), Trainer(data, processes=2)):
            run = Path(folder) / f"{trainer.seeds} seeds, {trainer.processes} processes"
            code, complaint = trainer.finish(run)
            if code != 0:
                sys.exit(f"the uninterrupted run ended with {code}: {complaint}")
            references[trainer] = run_fingerprint(run)
        # As many processes at once as there are cores: a trial mostly waits.
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            tallies = [pool.submit(trial) for trial in all_trials(arguments, references)]
            controls = [pool.submit(trial) for trial in negative_controls(arguments, data, references[Trainer(data)])]
            tallies, controls = [[future.result() for future in futures] for futures in (tallies, controls)]
    result = {
        "seed": arguments.seed,
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round((time.time() - begin) / 60, 1),
        "versions": versions(*PACKAGES),
        "trials": [vars(tally) for tally in tallies],
        "negative_controls": [vars(tally) for tally in controls],
    }
    text = to_markdown(result)
    Display().say(*text.splitlines())
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        (arguments.output / "result.md").write_text(text)
    sys.exit(any(tally.failures for tally in tallies) or not all(control.failures for control in controls))


def to_markdown(result: dict) -> str:
    """Return the result as Markdown."""
    package_versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    details = [
        (*row, ", ".join(f"{count} {detail}" for detail, count in tally["counts"].items()))
        for row, tally in zip(_rows(result["trials"]), result["trials"], strict=True)
    ]
    controls = [
        (*row, (tally["failures"] or ["none"])[0])
        for row, tally in zip(_rows(result["negative_controls"]), result["negative_controls"], strict=True)
    ]
    return "\n".join(
        [
            "# Fault injection",
            "",
            markdown_table(("fault", "trials", "failures", "details"), details),
            "",
            *[f"- {tally['name']}: {failure}" for tally in result["trials"] for failure in tally["failures"]],
            "Negative controls: each is the program with one thing broken, and must fail.",
            "",
            markdown_table(("broken part: fault", "trials", "failures", "first failure"), controls),
            "",
            f"Seed {result['seed']}, {result['minutes']} minutes; {package_versions}; {result['date']}.",
            "",
        ]
    )


def trials_table(result: dict) -> str:
    """Return a Markdown table of how often each fault was injected, and how often a promise was broken."""
    return markdown_table(("fault", "trials", "failures"), _rows(result["trials"]))


def _rows(tallies: list[dict]) -> list[tuple[str, str, int]]:
    return [(tally["name"], f"{tally['trials']:,}", len(tally["failures"])) for tally in tallies]


if __name__ == "__main__":
    main()
