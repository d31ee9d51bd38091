"""docs/coverage.md is what docs/coverage.py finds: all kinds and families are in it, and its cells are still so."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from compose.kind.registry import kinds

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("coverage_page", DOCS / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tables(tool):
    """Operator -> kind -> family -> what the page says, with numbers read as their reasons."""
    body, reasons = (DOCS / "coverage.md").read_text(encoding="utf-8").split("\n## Reasons\n")
    told = dict(line.split(". ", 1) for line in reasons.splitlines() if ". " in line)
    found = {}
    for section in body.split("\n## ")[1:]:
        label = section.split("`")[1]
        rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
        names = rows[0][1:]
        cells = {(row[0], kind): cell for row in rows[1:] for kind, cell in zip(names, row[1:], strict=True)}
        found[label] = {
            kind: {row[0]: told.get((said := cells[row[0], kind]).strip("[]"), said) for row in rows[1:]}
            for kind in names
        }
    return found


def test_the_page_names_every_kind_operator_and_family(tool):
    page = tables(tool)
    assert set(page) == {*tool.OPERATORS, "lower_to_lora"}
    for rows in page.values():
        assert list(rows) == list(kinds())
        assert all(list(cells) == list(tool.FAMILIES) for cells in rows.values())


@pytest.mark.parametrize(("kind", "family"), [("lora", "deberta-v2"), ("bottleneck", "albert"), ("prefix", "llava")])
def test_cells_are_current(tool, kind, family):
    page = tables(tool)
    assert tool.column(kind, family) == {label: rows[kind][family] for label, rows in page.items()}


@pytest.mark.slow
def test_the_whole_page_is_current(tool):
    assert tool.main(check=True) == 0
