"""The README's tables are those of the committed results, made from their JSON and typed by nobody."""

import pytest

from tests.helpers import ROOT

pytest.importorskip("torch", reason="needs the extra torch")


def test_the_readmes_tables_are_made_from_the_committed_results():
    from benchmarks.readme import TABLES, fill_tables

    readme = (ROOT / "README.md").read_text()
    for name in TABLES:
        assert readme.count(f"<!-- {name} -->\n|") == 1
    assert fill_tables(readme) == readme
