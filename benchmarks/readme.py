"""The tables of recorded results in README.md and docs/, made from their JSON: `python -m benchmarks.readme`.

It also writes the reports of the recorded benchmarks and of the comparison anew.
"""

import functools
import json
import math
import re
import statistics
from pathlib import Path

from cnn_jax.pytorch import benchmark, compare
from cnn_jax.runs.settings import RECIPE_DEFAULTS
from cnn_jax.runtime.display import describe_seconds, describe_values, markdown_table
from tests.fault_injection.__main__ import trials_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks"
COMPARISON = RESULTS / "comparison" / "report.json"
# On the machine of the comparison, and with every peer.
SAME_MACHINE = RESULTS / "results" / "amd-epyc-2-cores-2026-11-25.json"
ALL_PEERS = RESULTS / "results" / "intel-r-xeon-r-processor-2-cores-2026-11-26.json"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def summary_table() -> str:
    """Return the README's first table: accuracy and time in both frameworks, and where the numbers come from."""
    report, timings = compare.read_report(COMPARISON), benchmark.read_result(SAME_MACHINE).variants
    frameworks = ("cnn-jax", "PyTorch")
    sides = [report.frameworks[framework] for framework in frameworks]
    steps = [timings[name].milliseconds for name in ("cnn-jax, float32", "PyTorch, channels_last, memory kept")]
    rows = [
        ("test accuracy, mean ± standard deviation", *(side.accuracy for side in sides)),
        ("time per training step of 100 images", *(f"{milliseconds:.1f} ms" for milliseconds in steps)),
        (f"training, {report.epochs} epochs", *(describe_seconds(side.seconds["training"]) for side in sides)),
    ]
    source = (
        f"{len(sides[0].runs)} seeds in each framework; {report.machine}; jax {report.versions['jax']}, PyTorch "
        f"{report.versions['torch'].partition('+')[0]} in its fastest float32 variant."
    )
    return f"{markdown_table(('', *frameworks), rows)}\n\n{source}"


def comparison_table() -> str:
    """Return the table of the recorded comparison."""
    return compare.accuracy_table(compare.read_report(COMPARISON))


def benchmark_table() -> str:
    """Return the table of the recorded benchmark that has every peer."""
    return benchmark.speed_table(benchmark.read_result(ALL_PEERS))


def recipe_table() -> str:
    """Return the table of the recorded recipes; the tutorial's row comes from the comparison."""
    report = compare.read_report(COMPARISON)
    runs = report.frameworks["cnn-jax"].runs
    seconds = report.frameworks["cnn-jax"].seconds["training"]
    accuracy = describe_values([run.accuracy for run in runs])
    rows = [("tutorial", "15", len(runs), "", accuracy, describe_seconds(seconds), report.machine)]
    for recipe in ("fast", "accurate"):
        folder = RESULTS / "runs" / recipe
        result = json.loads((folder / "result.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        accuracies = [seed["test_accuracy"] for seed in result["seeds"]]
        validation = lines[-1]["seeds"].get("validation_accuracy")
        seconds = sum(line["seconds"] for line in lines) / len(accuracies)
        epochs = f"{RECIPE_DEFAULTS[recipe].epochs:g}"
        rows.append(
            (
                recipe,
                epochs,
                len(accuracies),
                describe_values(validation) if validation else "",
                describe_values(accuracies),
                describe_seconds(seconds),
                result["machine"] if result["device"].startswith("cpu") else result["device"],
            )
        )
    header = ("recipe", "epochs", "seeds", "validation accuracy", "test accuracy", "training per seed", "trained on")
    return markdown_table(header, rows)


def tried_table(part: str) -> str:
    """Return a table of what was tried for the recipe accurate; the first row is what the others change."""
    tried = json.loads((RESULTS / "runs" / "accurate" / "tried.json").read_text())
    rows = [
        (
            ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in one["variant"].items()) or "nothing",
            of_round["optimizer"],
            of_round["epochs"],
            f"{statistics.mean(one['accuracies']):.4f}",
        )
        for of_round in tried[part]
        for one in of_round["variants"]
    ]
    return markdown_table(("changed", "optimiser", "epochs", "accuracy"), rows)


def h100_table() -> str:
    """Return the table of the steps that were timed on an H100."""
    milliseconds = json.loads((RESULTS / "runs" / "h100" / "steps.json").read_text())["milliseconds"]
    ours = milliseconds["cnn-jax, float32"]
    rows = [(name, f"{value:.3f}", f"{value / ours:.2f}") for name, value in milliseconds.items()]
    return markdown_table(("step of 100 images", "ms", "cnn-jax, float32 = 1"), rows)


def streaming_table() -> str:
    """Return the table of trainings on more images than memory; speeds are compared within each round."""
    recorded = json.loads((RESULTS / "runs" / "feed" / "more_than_memory.json").read_text())
    resident, *_ = recorded["cases"]
    rows = []
    for case in recorded["cases"]:
        pairs = zip(resident["rounds"], case["rounds"], strict=True)
        speed = statistics.median(first["step_milliseconds"] / own["step_milliseconds"] for first, own in pairs)
        memory, anonymous = (max(one[f"{kind}_bytes"] for one in case["rounds"]) for kind in ("resident", "anonymous"))
        loading = statistics.median(one["loading_seconds"] for one in case["rounds"])
        streams = "disk" if case["uncached"] else "disk, through the system's cache"
        rows.append(
            (
                f"{case['images']:,}",
                f"{case['images'] * math.prod(recorded['image_shape']) / 1e9:.1f} GB",
                streams if case["feed"] == "stream" else "memory",
                f"{speed:.0%}".replace("%", " %"),
                f"{memory / 1e9:.2f} GB",
                f"{anonymous / 1e9:.2f} GB",
                describe_seconds(loading),
            )
        )
    header = ("images", "size", "read from", "speed", "memory at most", "without files' pages", "loading")
    return markdown_table(header, rows)


def fault_injection_table() -> str:
    """Return the table of how often each fault was injected, and how often a promise was broken."""
    return trials_table(json.loads((RESULTS / "fault_injection" / "result.json").read_text()))


TABLES = {
    "summary": summary_table,
    "comparison": comparison_table,
    "benchmark": benchmark_table,
    "recipes": recipe_table,
    "tried for accurate": functools.partial(tried_table, "rounds"),
    "tried then": functools.partial(tried_table, "then"),
    "H100": h100_table,
    "fault injection": fault_injection_table,
    "more than memory": streaming_table,
}


def fill_tables(page: str) -> str:
    """Return a page's text with each table between its two markers made anew from its JSON."""
    for name, to_table in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        table = f"{begin}\n{to_table()}\n{end}"
        page = re.sub(f"{begin}.*{end}", lambda _, table=table: table, page, flags=re.S)
    return page


def write_reports() -> None:
    """Write the recorded benchmarks' and the comparison's Markdown and pictures from their JSON."""
    compare.write_report(compare.read_report(COMPARISON), COMPARISON.with_suffix(".md"))
    for file in sorted((RESULTS / "results").glob("*.json")):
        benchmark.write_report(benchmark.read_result(file), file.with_suffix(".md"))


if __name__ == "__main__":
    write_reports()
    for path in PAGES:
        path.write_text(fill_tables(path.read_text()))
