"""All the fault injection: `python -m tests.fault_injection --seed 1 --kills 200`; it ends with a table."""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cnn_jax.runtime.display import Display
from tests.conftest import write_small_mnist
from tests.fault_injection.mutants import MUTANTS
from tests.fault_injection.runs import Trainer, run_fingerprint
from tests.fault_injection.trial_kinds import KINDS, FaultInjection

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def main() -> None:
    """Inject faults into the program, then into it with one thing broken; end with 1 unless only the latter fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault_injection", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of all that is chosen at random")
    parser.add_argument("--kills", type=int, default=200, help="with SIGKILL, of trainings")
    parser.add_argument("--signals", type=int, default=50, help="SIGTERM and SIGINT, to trainings")
    parser.add_argument("--full-disks", type=int, default=20, help="found by trainings, at random changes of files")
    parser.add_argument("--preparations", type=int, default=20, help="of MNIST, killed with SIGKILL")
    parser.add_argument("--races", type=int, default=20, help="of two trainings of one run")
    parser.add_argument("--flips", type=int, default=20, help="of bits, in each file of a checkpoint and of the data")
    parser.add_argument("--every", type=int, default=1, help="so many changes of a save to its files are struck")
    parser.add_argument("--examples", type=int, default=1000, help="of command lines and of each kind of file")
    parser.add_argument("--output", type=Path, help="where the result goes, as JSON and Markdown")
    arguments = parser.parse_args()
    say = Display().say
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_small_mnist(data)
        trainer = Trainer(data)
        code, complaint = trainer.finish(Path(folder) / "reference")
        if code != 0:
            sys.exit(f"the run that nothing interrupts ended with {code}: {complaint}")
        reference = run_fingerprint(Path(folder) / "reference")
        injection = FaultInjection(arguments, data, reference)
        # In processes of their own, as many at once as there are cores: most of what a trial does is to wait.
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            tallies = [pool.submit(injection.run, kind) for kind in KINDS]
            controls = [pool.submit(injection.run_broken, name) for name in MUTANTS]
            tallies, controls = [[future.result() for future in futures] for futures in (tallies, controls)]
    result = {
        "seed": arguments.seed,
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round((time.time() - begin) / 60, 1),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "trials": [vars(tally) for tally in tallies],
        "negative_controls": [vars(tally) for tally in controls],
    }
    text = to_markdown(result)
    say(text)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        (arguments.output / "result.md").write_text(text)
    sys.exit(any(tally.failures for tally in tallies) or not all(control.failures for control in controls))


def to_markdown(result: dict) -> str:
    """Return the result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    failures = [f"- {tally['name']}: {failure}" for tally in result["trials"] for failure in tally["failures"]]
    lines = [
        "# Fault injection",
        "",
        *[f"{line} {what} |" for line, what in zip(trials_table(result), _details(result), strict=True)],
        "",
        *failures,
        "Broken on purpose, which must fail:",
        "",
        "| what was broken | times | failures | first failure |",
        "| --- | --- | --- | --- |",
    ]
    for tally in result["negative_controls"]:
        first = tally["failures"][0] if tally["failures"] else "none"
        lines.append(f"| {tally['name']} | {tally['trials']} | {len(tally['failures'])} | {first} |")
    lines += ["", f"Seed {result['seed']}, {result['minutes']} minutes; {versions}; {result['date']}.", ""]
    return "\n".join(lines)


def trials_table(result: dict) -> list[str]:
    """Return the lines of a table of how often each thing was done, and how often it went wrong."""
    rows = [f"| {tally['name']} | {tally['trials']:,} | {len(tally['failures'])} |" for tally in result["trials"]]
    return ["| what was done | times | failures |", "| --- | --- | --- |", *rows]


def _details(result):
    yield from ("of these", "---")
    for tally in result["trials"]:
        yield ", ".join(f"{count} {what}" for what, count in tally["counts"].items())


if __name__ == "__main__":
    main()
