"""Hostile files of every kind end in one error of the library's, at no cost; see the package for the command."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.guard import limits
from tests.fuzz.kinds import KINDS, Files, Kind, accepted
from tests.fuzz.mutations import Draw

PIECES = 10
LONG = {"caches": 20_000, "exports": 1_000, "tars": 500, "images": 500}
"""Files of the long run; 500 of the kinds that are not here."""


def write(files: Files, folder: Path) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def opened(kind: Kind, files: Files) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "files"
        folder.mkdir()
        write(files, folder)
        with limits(Path(root)), accepted():
            kind.opened(folder)


def fuzzed(kind: Kind, count: int, start: int) -> None:
    """Open `count` changed files; which they are is decided by `start`."""
    valid = kind.made()

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(min_size=80, max_size=80))
    def one(data: bytes) -> None:
        draw = Draw(data)
        opened(kind, kind.changed(draw.choice(valid), draw))

    one()


@pytest.mark.parametrize("name", KINDS)
def test_valid_files_open(name: str, tmp_path: Path) -> None:
    for number, files in enumerate(KINDS[name].made()):
        folder = tmp_path / str(number)
        write(files, folder)
        with limits(tmp_path):
            KINDS[name].opened(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", KINDS)
def test_a_few_hostile_files(name: str) -> None:
    fuzzed(KINDS[name], 20 if name == "caches" else 8, 0)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
@pytest.mark.parametrize("name", KINDS)
def test_many_hostile_files(name: str, piece: int) -> None:
    fuzzed(KINDS[name], LONG.get(name, 500) // PIECES, 1 + piece)


OUTSIDE: dict[str, Callable[[Path], object]] = {
    "a process": lambda root: __import__("subprocess").run(["true"], check=True),
    "a shell": lambda root: __import__("os").system("true"),
    "a file outside": lambda root: (root.parent / "outside").write_text("x"),
    "a folder outside": lambda root: (root.parent / "outside.d").mkdir(),
    "memory": lambda root: bytearray(2**31),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_limits_hold(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(AssertionError), limits(root):
        OUTSIDE[name](root)
    with limits(root):
        (root / "inside").write_text("x")
