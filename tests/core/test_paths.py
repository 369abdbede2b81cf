"""`~` in a path is the user's home folder, wherever a path is taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from purifyloader import PurifiedDataset, poisons, precompute, pretrained, recipes
from purifyloader.cache import CacheReader, CacheWriter, Layout
from purifyloader.commands import main as cli
from purifyloader.core.checks import as_path
from purifyloader.datasets import open_dataset, read_image
from purifyloader.errors import InputError
from purifyloader.poisons import Poisoned
from tests.conftest import tiny_denoiser

POISONED = Poisoned.of(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], "none", poisoned=[])
ROWS = [(np.full((8, 8, 3), i, np.uint8), i % 2) for i in range(3)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def write_picture(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


WRITES: dict[str, Callable[[], Any]] = {
    "dataset": lambda: PurifiedDataset(ROWS, recipes.jpeg(50), cache="~/a", progress=False),
    "precompute": lambda: precompute(ROWS, recipes.jpeg(50), "~/a", progress=False),
    "writer": lambda: CacheWriter("~/a", {}, Layout(3)),
    "save": lambda: pretrained.save(tiny_denoiser(), "~/a"),
    "poison": lambda: poisons.write(
        Poisoned.of(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], "none", poisoned=[]), "~/a.npz"
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_is_at_home(home: Path, name: str) -> None:
    WRITES[name]()
    assert [path.name.partition(".")[0] for path in home.iterdir()] == ["a"]
    assert os.listdir(".") == []


def test_what_is_read_is_at_home(home: Path) -> None:
    precompute(ROWS, recipes.jpeg(50), home / "cache", progress=False)
    assert len(CacheReader("~/cache")) == len(PurifiedDataset.from_cache("~/cache")) == 3
    pretrained.save(tiny_denoiser(), home / "model")
    assert recipes.denoise_once(pretrained.load("~/model"), 0.1).to_json()
    assert recipes.denoise_once("~/model", 0.1).calls == 1
    write_picture(home / "photos" / "a.png")
    assert len(open_dataset("~/photos")) == 1  # type: ignore[arg-type]
    assert read_image("~/photos/a.png").size == (8, 8)


def test_the_command_line_takes_what_a_shell_leaves(home: Path) -> None:
    precompute(ROWS, recipes.jpeg(50), home / "cache", progress=False)
    assert cli.main(["cache", "verify", "~/cache"]) == 0
    assert cli.main(["cache", "export", "~/cache", "~/tars"]) == 0
    assert sorted(path.name for path in home.iterdir()) == ["cache", "tars"]


def test_the_home_of_nobody_is_a_name_as_any_other() -> None:
    assert as_path("~nobody-of-that-name/a") == Path("~nobody-of-that-name/a")


@pytest.mark.parametrize("path", [None, 3, ["a"]])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(InputError, match=f"A path is text or a pathlib.Path. Got {type(path).__name__}"):
        as_path(path)
