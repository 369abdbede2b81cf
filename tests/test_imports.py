"""The rooms of the library form a staircase: every import goes down, and nothing imports in a circle.

The walk reads each file's syntax tree and counts every import: at the top of a file, inside a function, under
`if TYPE_CHECKING:`, and by a string that is the full name of a module (a table for lazy imports). Only circles of
files leave strings out, for a string may also be a group of entry points.
"""

from __future__ import annotations

import ast
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room may import from the rows below its own, and from its row in one direction.
ROWS = (
    ("purifyloader", "__main__", "precompute"),  # the modules at the root: the public face
    ("commands",),
    ("bench", "certify", "sanitize", "audit", "dynamics", "evaluation"),
    ("transforms", "recipes", "purified", "poisons", "train", "victims"),
    ("pretrained", "purifiers"),
    ("diffusion", "energy", "masked"),
    ("datasets", "cache", "results"),
    ("core", "files"),
    ("errors",),
)
LEVEL = {room: len(ROWS) - row for row, rooms in enumerate(ROWS) for room in rooms}

# Violations that are still there. Each test also fails when a line of its set is no longer a violation.
KNOWN: dict[str, set[str]] = {
    "climbs": set(),  # "importing module → imported module"
    "rooms": set(),  # rooms in a circle
    "files": set(),  # modules in a circle
    "options": {
        "purifyloader.pretrained.convert",
        "purifyloader.pretrained.convert.choice",
    },  # modules that name an option of the command line
    "coin": set(),  # modules that name COIN beyond the four
}


@dataclass(frozen=True)
class Arrow:
    """One import: of `names` of the module `to` by the module `source`, in a line of its file."""

    source: str
    to: str
    names: str
    line: int
    by_string: bool = False

    def __str__(self) -> str:
        return f"{self.source} → {self.to} ({self.names}, line {self.line})"


def modules() -> dict[str, Path]:
    """Map the name of every module of the library to its file, through the linked folders too."""
    found = {}
    for folder, subfolders, files in os.walk(ROOT / "purifyloader", followlinks=True):
        subfolders[:] = [name for name in subfolders if name != "__pycache__"]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder) / file
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, tree: ast.AST, names: Set[str]) -> Iterator[Arrow]:
    """Yield every import of one of the modules `names` in the syntax tree of the module `name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in names:
                    yield Arrow(name, alias.name, "the module", node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: import by full names, not relative ones"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in names:
                    yield Arrow(name, full, "the module", node.lineno)
                elif node.module in names:
                    yield Arrow(name, str(node.module), alias.name, node.lineno)
        elif isinstance(node, ast.Constant) and node.value in names and "." in str(node.value):
            yield Arrow(name, node.value, "by a string", node.lineno, by_string=True)


def room(module: str) -> str:
    """The room of a module: the first part of its name below `purifyloader`."""
    return [*module.split("."), ""][1] or "purifyloader"


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected sets of more than one node, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def graph(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    edges = defaultdict(set)
    for source, to in pairs:
        if source != to:
            edges[source].add(to)
    return edges


@pytest.fixture(scope="module")
def arrows() -> list[Arrow]:
    paths = modules()
    found = [
        arrow
        for name, path in sorted(paths.items())
        for arrow in imports(name, ast.parse(path.read_text(encoding="utf-8")), paths.keys())
    ]
    assert len(found) > 500
    assert {room(a.source) for a in found} >= {"transforms", "pretrained"}, "linked folders are walked too"
    return found


def compare(violations: Mapping[str, str], known: set[str]) -> None:
    """Fail on a violation that is not known, with its explanation, and on a known one that is gone."""
    new = sorted({violations[key] for key in violations.keys() - known})
    assert not new, "\n" + "\n".join(new)
    assert not known - violations.keys(), "no longer violations: take them off KNOWN in this file"


def in_circles(arrows: Iterable[Arrow], node: Callable[[str], str]) -> dict[str, str]:
    """Map each node that stands in a circle to the arrows of its circle; `node` says where a module belongs."""
    kept = [arrow for arrow in arrows if node(arrow.source) != node(arrow.to)]
    violations = {}
    for circle in circles(graph((node(arrow.source), node(arrow.to)) for arrow in kept)):
        between = sorted({str(arrow) for arrow in kept if {node(arrow.source), node(arrow.to)} <= {*circle}})
        violations.update(dict.fromkeys(circle, f"{', '.join(circle)} import each other:\n" + "\n".join(between)))
    return violations


def test_every_room_has_its_place_in_the_order():
    assert {room(name) for name in modules()} <= LEVEL.keys()


def test_no_import_climbs(arrows):
    violations: dict[str, str] = defaultdict(str)
    for arrow in arrows:
        if LEVEL[room(arrow.source)] < LEVEL[room(arrow.to)]:
            violations[f"{arrow.source} → {arrow.to}"] += f"{arrow}\n"
    compare(violations, KNOWN["climbs"])


def test_no_circle_of_rooms(arrows):
    compare(in_circles(arrows, room), KNOWN["rooms"])


def test_no_circle_of_folders_inside_a_room(arrows):
    """A folder and the room around it may use each other: the test of the files answers for those."""
    paths = modules()

    def folder(module: str) -> str:
        return module if paths[module].name == "__init__.py" else module.rpartition(".")[0]

    def beside(one: str, other: str) -> bool:
        return not f"{one}.".startswith(f"{other}.") and not f"{other}.".startswith(f"{one}.")

    kept = [a for a in arrows if room(a.source) == room(a.to) and beside(folder(a.source), folder(a.to))]
    compare(in_circles(kept, folder), set())


def test_no_circle_of_files(arrows):
    compare(in_circles([a for a in arrows if not a.by_string], str), KNOWN["files"])


def test_the_walk_sees_every_kind_of_import():
    code = """
from purifyloader.a import x
if TYPE_CHECKING:
    import purifyloader.b
def function():
    from purifyloader import c
table = {"lazy": "purifyloader.d.e"}
from purifyloader import value
import torch
"""
    names = {"purifyloader", "purifyloader.a", "purifyloader.b", "purifyloader.c", "purifyloader.d.e"}
    seen = {(a.to, a.names) for a in imports("purifyloader.z", ast.parse(code), names)}
    assert seen == {
        ("purifyloader.a", "x"),
        ("purifyloader.b", "the module"),
        ("purifyloader.c", "the module"),
        ("purifyloader.d.e", "by a string"),
        ("purifyloader", "value"),
    }


def test_circles_are_found_whole():
    edges = graph([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e"), ("f", "f")])
    assert circles(edges) == [["a", "b", "c"]]


def test_few_rooms_and_few_loose_modules():
    paths = modules()
    rooms = [name for name, path in paths.items() if path.name == "__init__.py" and name != "purifyloader"]
    assert len(rooms) <= 30, sorted(rooms)
    loose = [path.name for path in (ROOT / "purifyloader").glob("*.py")]
    assert len(loose) <= 5, sorted(loose)


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string of a syntax tree but docstrings; what an f-string inserts is `{}`."""
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            parts.add(id(node.body[0].value))
    for node in ast.walk(tree):
        if id(node) in parts:
            continue
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_library_code_knows_no_option_of_the_command_line():
    """An error of the library names its argument; `commands` makes an option of it. Whole command lines may stand."""
    violations: dict[str, str] = defaultdict(str)
    for name, path in modules().items():
        source = path.read_text("utf-8")
        if LEVEL[room(name)] >= LEVEL["commands"] or "--" not in source:
            continue
        for line, text in strings(ast.parse(source)):
            options = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
            if options and not re.search(r"purifyloader [a-z]", text):
                violations[name] += f"{name}, line {line}: {', '.join(options)}\n"
    compare(violations, KNOWN["options"])


def test_one_purifier_is_named_in_four_files():
    """What is true of a purifier stands in its module, its recipe and its registry's entry; COIN stands for all."""
    named = {}
    for name, path in modules().items():
        source = path.read_text("utf-8")
        if "coin" not in source.lower():
            continue
        tree = ast.parse(source)
        passed_on = {
            line
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
            for line in range(node.lineno, node.end_lineno + 1)
        }
        lines = [line for at, line in enumerate(source.splitlines(), 1) if at not in passed_on]
        if re.search(r"(?i)(\b|_)coin(\b|_)", "\n".join(lines)):
            named[name] = name
    beyond = {name: ", ".join(sorted(named)) for name in named}
    compare(beyond if len(named) > 4 else {}, KNOWN["coin"])
