"""The committed results' tables in the README: `python -m benchmarks.readme` writes them from their JSON."""

import json
import re
import statistics
from pathlib import Path

from cnn_jax.pytorch.benchmark import speed_table
from cnn_jax.pytorch.compare import accuracy_table
from cnn_jax.runtime.display import describe_seconds, describe_values
from tests.fault_injection.__main__ import trials_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks"


def recipe_table() -> str:
    """Return a table of the recorded recipes; the tutorial's row is that of the comparison."""
    runs = json.loads((RESULTS / "comparison" / "report.json").read_text())["frameworks"]["cnn-jax"]["runs"]
    tutorial = [run["accuracy"] for run in runs]
    seconds = statistics.median(run["seconds"]["training"] for run in runs)
    rows = [("tutorial", "15", len(runs), "", describe_values(tutorial), seconds)]
    for recipe in ("fast", "accurate"):
        folder = RESULTS / "runs" / recipe
        result = json.loads((folder / "result.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        accuracies = [seed["test_accuracy"] for seed in result["seeds"]]
        validation = describe_values(lines[-1]["seeds"]["validation_accuracy"])
        seconds = sum(line["seconds"] for line in lines) / len(accuracies)
        epochs = f"{lines[-1]['step'] / lines[0]['step']:.3g}"
        rows.append((recipe, epochs, len(accuracies), validation, describe_values(accuracies), seconds))
    table = ["| recipe | epochs | seeds | validation accuracy | test accuracy | training, a seed |", "|" + " --- |" * 6]
    table += [f"| {' | '.join(map(str, row[:-1]))} | {describe_seconds(row[-1])} |" for row in rows]
    return "\n".join(table)


def fault_injection_table() -> str:
    """Return a table of how often each thing was done to the program, and how often it went wrong."""
    return trials_table(json.loads((RESULTS / "fault_injection" / "result.json").read_text()))


TABLES = {
    "comparison": lambda: accuracy_table(json.loads((RESULTS / "comparison" / "report.json").read_text())),
    "benchmark": lambda: speed_table(
        json.loads((RESULTS / "results" / "amd-epyc-2-cores-2026-11-25.json").read_text())
    ),
    "recipes": recipe_table,
    "fault injection": fault_injection_table,
}


def fill_tables(readme: str) -> str:
    """Return a README's text with each table between its two markers made anew from its JSON."""
    for name, to_table in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        table = f"{begin}\n{to_table()}\n{end}"
        readme = re.sub(f"{begin}.*{end}", lambda _, table=table: table, readme, flags=re.S)
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(fill_tables(path.read_text()))
