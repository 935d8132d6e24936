"""The committed results' tables in the README: `python -m cnn_jax.pytorch.readme` writes them from their JSON."""

import json
import re
from pathlib import Path

from cnn_jax.pytorch.benchmark import speed_table
from cnn_jax.pytorch.compare import accuracy_table

ROOT = Path(__file__).parents[2]
TABLES = {
    "comparison": ("benchmarks/comparison/report.json", accuracy_table),
    "benchmark": ("benchmarks/results/amd-epyc-2-cores-2026-11-24.json", speed_table),
}


def fill_tables(readme: str) -> str:
    """Return a README's text with each table between its two markers made anew from its JSON."""
    for name, (file, to_table) in TABLES.items():
        table = to_table(json.loads((ROOT / file).read_text()))
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        readme = re.sub(
            f"{begin}.*{end}", lambda _, table=table, b=begin, e=end: f"{b}\n{table}\n{e}", readme, flags=re.S
        )
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(fill_tables(path.read_text()))
