"""The page of public reports names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS / "REPORTS.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| report", "| ---"))]


def test_every_report_has_a_number_and_a_test_that_is_there():
    defined: dict[str, set[str]] = {}
    for row in ROWS:
        report, holds, named = (cell.strip() for cell in row.strip("|").split(" | "))
        assert re.match(r"[\w./-]+#\d+", report), row
        assert holds, row
        path, _, name = named.strip("` ").partition("::")
        if path not in defined:
            tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
            defined[path] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in defined[path], f"{path} has no test {name!r}: the row of {report} names it"


def test_the_page_is_short_and_has_every_kind():
    assert len(ROWS) >= 45
    assert len(PAGE.encode()) < 12_000
    assert PAGE.count("\n## ") == 9
