"""Defences of a bench that are a file, curves over the level of noise, and the published figures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from purifyloader import recipes
from purifyloader.bench import pictures, published, report
from purifyloader.bench.data import Data
from purifyloader.bench.defences import DEFENCES, Models, find
from purifyloader.bench.run import AttackSpec, Bench
from purifyloader.errors import InputError, PurifyError
from purifyloader.purifiers import Chain, Coin, Jpeg, Repeat
from tests.test_bench_run import CLASSES, TEST, TRAIN
from tests.test_bench_run import pictures as noisy_pictures

# a file of one's own


@pytest.fixture
def chain(tmp_path):
    path = tmp_path / "wash.json"
    path.write_text(Chain(Jpeg(50), Coin(1.0)).to_json())
    return path


@pytest.mark.parametrize(
    ("more", "p", "sigma"), [("", None, None), ("+B", 0.4, 0), ("+C", 0, 0.05), ("+B+C", 0.4, 0.05)]
)
def test_a_file_is_a_defence_with_or_without_compensation(chain, more, p, sigma):
    its, px = find(f"{chain}{more}")
    made = its.ready(Models(), px, True)
    assert its.name == f"wash{more}"
    assert made.purifier.to_json() == chain.read_text()
    assert its.models(Models()) == []
    if p is None:
        assert made.compensate is None
    else:
        assert (made.compensate.p, made.compensate.sigma) == (p, sigma)


def test_the_models_that_a_file_names_are_checked_for_honesty(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(Chain(Repeat(recipes.eclipse("cifar10-sparse", sigma=0.05), 2), Jpeg(75)).to_json())
    its, _ = find(str(path))
    assert its.models(Models()) == ["cifar10-sparse"]
    assert find("eclipse")[0].models(Models()) == ["cifar10-sparse"]
    assert find("puregen-naive")[0].models(Models()) == ["cifar10-energy", "cifar10-puregen-ddpm"]


def test_a_row_of_a_file_has_its_name_and_no_path(chain, tmp_path):
    labels = np.arange(TRAIN) % CLASSES, np.arange(TEST) % CLASSES
    data = Data("imagefolder", noisy_pictures(TRAIN, 1), labels[0], noisy_pictures(TEST, 2), labels[1], CLASSES)
    bench = Bench(data, Models(), "resnet9", "short", tmp_path / "work")
    row = bench.row(AttackSpec("none"), f"{chain}+C", 0)
    assert row["defence"] == "wash+C"
    assert row["settings"]["purifier"] == json.loads(chain.read_text())
    assert row["settings"]["compensate"] == [0.0, 0.05]
    assert str(tmp_path) not in json.dumps(row)
    assert row["distance_px"] > 1


def test_files_that_are_no_purifier(tmp_path):
    with pytest.raises(InputError, match=r"Expected a file of a purifier's JSON\. Got .*nothing"):
        find(str(tmp_path / "nothing.json"))
    for text, message in (("{", "not JSON"), ('{"schema": 1, "purifier": {"kind": "magic"}}', "kind must be one of")):
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(PurifyError, match=message):
            find(str(path))
    path.write_text(recipes.eclipse("cifar10-sparse", sigma=0.05).to_json().replace("cifar10-sparse", "absent-model"))
    with pytest.raises(PurifyError, match="absent-model"):
        find(str(path))


# curves over the level of noise


def row(attack: str, defence: str, accuracy: float, px: float | None, seed: int = 0) -> dict[str, Any]:
    return {
        **{"attack": attack, "defence": defence, "accuracy": accuracy, "sigma_px": px, "seed": seed},
        **{"seconds": {"purify_an_image": 0.0}, "calls": 1, "distance_px": 1.0},
        "settings": {"attack": attack, "purifier": defence, "seed": seed},
    }


ROWS = [
    row("none", "none", 70, None),
    row("lsp", "none", 30, None),
    row("lsp", "eclipse", 66, 12.75),
    row("lsp", "eclipse", 68, 12.75, seed=1),
    row("lsp", "eclipse@50", 60, 50.0),
    row("lsp", "eclipse@2", 40, 2.0),
    row("ar", "eclipse", 65, 12.75),
    row("ar", "A", 65, 12.75),
]


def test_levels_rise_and_one_level_is_no_curve(tmp_path):
    levels = pictures.noise_levels(ROWS)
    assert levels == {"eclipse": {"lsp": [(2.0, [40]), (12.75, [66, 68]), (50.0, [60])]}}
    assert pictures.noise(ROWS, tmp_path / "noise.png")
    with Image.open(tmp_path / "noise.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 22)) > 20
    assert not pictures.noise(ROWS[:4], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_purifier_costs_what_it_takes_where_nothing_else_ran():
    """A and eclipse purify alike; a row that was timed beside other work does not count."""
    same = {"purifier": "one call"}
    timed = [
        {**row("lsp", defence, 60, 12.75), "seconds": {"purify_an_image": seconds}, "settings": same}
        for defence, seconds in (("A", 0.004), ("eclipse", 0.01))
    ]
    other = {**row("lsp", "jpeg-10", 60, None), "seconds": {"purify_an_image": 0.001}}
    found = report.cells([*timed, other])
    assert [found["lsp", d].seconds for d in ("A", "eclipse", "jpeg-10")] == [0.004, 0.004, 0.001]


# published


def test_published_figures_are_those_of_the_papers():
    """The means that the papers print beside their figures."""
    nine = [published.ECLIPSE["eclipse-100"][a] for a in ("em", "tap", "rem", "sep", "efp", "urp", "lsp", "ar", "adp")]
    assert np.mean(nine) == pytest.approx(83.69, abs=0.005)
    assert np.mean(nine[:-1]) == pytest.approx(83.82, abs=0.005)
    for defence, mean in {"A": 60.18, "B": 54.36, "C": 46.87, "A+B": 74.66, "A+C": 78.77, "B+C": 70.48}.items():
        assert np.mean(list(published.ECLIPSE[defence].values())) == pytest.approx(mean, abs=0.01)
    assert published.ECLIPSE["eclipse-100"]["none"] == 90.43
    assert {*published.ECLIPSE, *published.PUREGEN} <= {*DEFENCES}


def test_published_figures_stand_beside_and_never_among():
    assert "83.69" not in report.markdown([{**its, **SETTING} for its in ROWS])
    text = report.markdown([{**its, **SETTING} for its in ROWS])
    ours, _, theirs = text.partition("Published")
    assert "84.58" not in ours
    assert "84.58" in theirs
    assert "| A |" in theirs


SETTING = {
    **{"data": "sample", "images": 4000, "test_images": 1000, "victim": "resnet9", "training": "short"},
    "settings": {"data": {"sha": "0"}, "attack_seed": 0, "fast": True, "device": "cpu", "purifier": None},
}
