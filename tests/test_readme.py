"""The README tells the truth: its commands, links, code and figures."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands():
    commands = re.findall(r"```bash\npip install (.*)\n```", TEXT)
    assert commands == ['".[plots]" && python examples/quickstart.py', '-e ".[dev]" && pytest']


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) >= 4
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL))
def test_code_compiles_and_its_imports_exist(block):
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("purifyloader"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), name.name


def test_the_tables_are_the_measured_results():
    spec = importlib.util.spec_from_file_location("ablation", ROOT / "examples" / "ablation.py")
    assert spec is not None
    assert spec.loader is not None
    ablation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ablation)
    folder = ROOT / "examples" / "results"
    results, speed = (json.loads((folder / name).read_text()) for name in ("ablation.json", "speed.json"))
    assert ablation.with_tables(TEXT, results, speed) == TEXT
    assert all(len(entry["accuracy"]) == 3 for entry in results.values()), "three seeds in every cell"
