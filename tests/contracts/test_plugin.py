"""A stranger follows `purifyloader/purifiers/README.md`: the purifier of its code blocks is everywhere at once."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from purifyloader import recipes
from purifyloader.bench.defences import DEFENCES, Models, find, table
from purifyloader.cache.reader import CacheReader
from purifyloader.commands.main import main
from purifyloader.errors import ConfigError, InputError
from purifyloader.recipes.registry import describe
from tests.contracts import test_purifiers as contract
from tests.test_package import ROOT


def instruction() -> str:
    text = (ROOT / "purifyloader/purifiers/README.md").read_text(encoding="utf-8")
    return text.partition("## Add one")[2].partition("\n## ")[0]


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The plugin of the README as an installed distribution."""
    text = instruction()
    purifier, recipe = re.findall(r"```python\n(.*?)```", text, re.S)
    (toml,) = re.findall(r"```toml\n(.*?)```", text, re.S)
    site = tmp_path / "site"
    info = site / "fade-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "fade.py").write_text(purifier)
    (site / "fade_recipe.py").write_text(recipe)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fade\nVersion: 1.0\n")
    groups = tomllib.loads(toml)["project"]["entry-points"]
    lines = [
        line for group, names in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in names.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(site)
    yield site
    for name in ("fade", "fade_recipe"):
        sys.modules.pop(name, None)


def test_the_instruction_is_ten_lines():
    text = instruction()
    assert [int(number) for number in re.findall(r"(?m)^(\d+)\. ", text)] == list(range(1, 11))


def test_a_recipe_by_name(installed):
    assert "fade" in recipes.RECIPES
    described = describe("fade", recipes.RECIPES["fade"])
    assert list(described.options) == ["amount", "resize", "crop", "tile", "overlap"]
    assert described.options["amount"].help == "share of the way, above 0 and at most 1."
    assert recipes.fade is recipes.RECIPES["fade"]
    purifier = recipes.RECIPES["fade"](0.25, tile=8)
    assert purifier.config()["purifier"] == {"kind": "fade", "amount": 0.25}


def test_json_builds_it_back(installed):
    purifier = recipes.RECIPES["fade"](0.25)
    again = recipes.from_json(purifier.to_json())
    assert type(again) is type(purifier)
    assert again.to_json() == purifier.to_json()
    with pytest.raises(ConfigError, match="amount must be a finite number"):
        recipes.from_json(purifier.to_json().replace("0.25", "7"))


def test_it_is_unknown_where_it_is_not_installed():
    assert "fade" not in recipes.RECIPES
    with pytest.raises(AttributeError, match="has no attribute 'fade'"):
        _ = recipes.fade
    with pytest.raises(InputError, match="A defence is one of"):
        find("fade")
    with pytest.raises(ConfigError, match="kind must be one of"):
        recipes.from_json('{"schema": 1, "purifier": {"kind": "fade", "amount": 0.5}}')


def test_one_that_is_installed_while_the_process_runs_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert "later" not in recipes.RECIPES
    (info := tmp_path / "later-1.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: later\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[purifyloader.recipes]\nlater = purifyloader.recipes:jpeg\n")
    assert recipes.RECIPES["later"] is recipes.jpeg
    assert "later" in list(recipes.RECIPES)


def test_the_command_line_fills_a_cache_with_it(installed, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        folder = tmp_path / "data" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    words = [
        "precompute",
        "--dataset",
        "imagefolder",
        "--root",
        tmp_path / "data",
        "--recipe",
        "fade",
        "--amount",
        0.25,
    ]
    assert main([*map(str, words), "--out", str(tmp_path / "cache"), "--quiet"]) == 0
    reader = CacheReader(tmp_path / "cache")
    assert reader.config["purifier"] == {"kind": "fade", "amount": 0.25}
    order = [0, 2, 4, 1, 3, 5]
    want = np.round(255 * (0.75 * pixels[order] / 255 + 0.125))
    assert np.abs(np.stack([reader[i] for i in range(6)]).astype(float) - want).max() <= 1


def test_the_bench_has_its_row_and_its_options(installed, capsys):
    defence, px = find("fade")
    assert px is None
    assert (defence.name, defence.description) == ("fade", "half of the contrast")
    assert defence.ready(Models(), None, True).purifier.config() == {"kind": "fade", "amount": 0.5}
    own, _ = find("fade:amount=0.25")
    assert own.name == "fade:amount=0.25"
    assert own.ready(Models(), None, True).purifier.config() == {"kind": "fade", "amount": 0.25}
    assert "fade" in table()
    assert "fade" not in DEFENCES
    with pytest.raises(InputError, match="options of the defence fade are: amount, resize"):
        find("fade:quality=3")
    assert main(["bench", "--list"]) == 0
    assert re.search(r"^  fade +half of the contrast$", capsys.readouterr().out, re.MULTILINE)


def test_it_keeps_the_contract(installed):
    cases = contract.installed_cases()
    assert list(cases) == ["fade"]
    contract.check_all(cases["fade"])
