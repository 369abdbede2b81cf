"""Defences of a bench that are a file, curves over the level of noise, and the published figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from purifyloader import pretrained, recipes
from purifyloader.bench import pictures, published, report, rows
from purifyloader.bench.data import Data
from purifyloader.bench.defences import DEFENCES, Models, find
from purifyloader.bench.run import AttackSpec, Bench
from purifyloader.cache.source import hashes_as_text, image_hashes
from purifyloader.cli import main
from purifyloader.errors import InputError, PurifyError
from purifyloader.poisons import Poisoned, Target
from purifyloader.purifiers import Chain, Coin, Jpeg, Repeat
from tests.conftest import tiny_denoiser, tiny_energy
from tests.test_bench_run import CLASSES, TEST, TRAIN
from tests.test_bench_run import pictures as noisy_pictures

HELD = noisy_pictures(5, 3)


def make_bench(tmp_path: Path, models: Models) -> Bench:
    labels = np.arange(TRAIN) % CLASSES, np.arange(TEST) % CLASSES
    data = Data("imagefolder", noisy_pictures(TRAIN, 1), labels[0], noisy_pictures(TEST, 2), labels[1], CLASSES)
    return Bench(data, models, "resnet9", "short", tmp_path / "work")


def folder_of(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for split, count, seed in (("train", TRAIN, 1), ("test", TEST, 2)):
        for i, image in enumerate(noisy_pictures(count, seed)):
            path = root / split / f"class {i % CLASSES}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


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
    assert its.ready(Models(), None, True).sigma == 0.05
    assert find("eclipse")[0].models(Models()) == ["cifar10-sparse"]
    assert find("puregen-naive")[0].models(Models()) == ["cifar10-energy", "cifar10-puregen-ddpm"]


def test_a_row_of_a_file_has_its_name_and_no_path(chain, tmp_path):
    bench = make_bench(tmp_path, Models())
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
            find(str(path))[0].ready(Models(), None, True)
    config = json.loads(recipes.eclipse("cifar10-sparse", sigma=0.05).to_json())
    config["purifier"]["denoiser"] = {"name": "absent-model", "weights_sha256": 64 * "0"}
    path.write_text(json.dumps(config))
    with pytest.raises(PurifyError, match="absent-model"):
        find(str(path))[0].models(Models())
    for name in ("none.json", "eclipse.json", "mine@low.json", "a b.json", "jpeg-10.json"):
        (tmp_path / name).write_text(Jpeg(50).to_json())
        with pytest.raises(InputError, match="rename it"):
            find(str(tmp_path / name))


def test_a_file_may_use_a_denoiser_of_ones_own(tmp_path):
    """By the weights, as the folder's name may be anywhere; and the images that it learned from are compared."""
    folder = tmp_path / "tiny"
    pretrained.save(tiny_denoiser(), folder, details={"image_hashes": hashes_as_text(image_hashes(HELD))})
    path = tmp_path / "mine.json"
    path.write_text(recipes.eclipse(pretrained.load(folder), sigma=0.05, fast=True).to_json())
    models = Models(denoiser=str(folder))
    its, _ = find(str(path))
    assert its.models(models) == [str(folder)]
    assert its.ready(models, None, True).purifier.to_json() == path.read_text()
    with pytest.raises(PurifyError):
        its.ready(Models(), None, True)
    assert make_bench(tmp_path, models).check(str(path))["what tiny learned from"] == len(HELD)
    with pytest.raises(InputError, match=r"must compute in float32\. Got bfloat16 in mine"):
        its.ready(models, None, False)


def test_files_of_one_name_are_told_before_any_work(tmp_path, capsys):
    for where in ("one", "two"):
        (tmp_path / where).mkdir()
        (tmp_path / where / "mine.json").write_text(Jpeg(50).to_json())
    given = [word for where in ("one", "two") for word in ("--defence", str(tmp_path / where / "mine.json"))]
    words = ["bench", "--data", "imagefolder", "--root", str(folder_of(tmp_path)), "--out", str(tmp_path / "o")]
    assert main([*words, *given]) != 0
    assert "Got mine twice" in capsys.readouterr().err
    assert not (tmp_path / "o" / "rows.jsonl").exists()


# what rows rest on


def test_two_folders_of_one_name_are_both_compared(tmp_path):
    for where, seed in (("x", 11), ("y", 12)):
        hashes = hashes_as_text(image_hashes(noisy_pictures(4 + seed, seed)))
        pretrained.save(tiny_energy(), tmp_path / where / "m", details={"image_hashes": hashes})
    hashes = hashes_as_text(image_hashes(noisy_pictures(15, 11)))
    pretrained.save(tiny_denoiser(), tmp_path / "z" / "m", details={"image_hashes": hashes})
    models = Models(energy=str(tmp_path / "x" / "m"), ddpm=str(tmp_path / "z" / "m"))
    compared = make_bench(tmp_path, models).check("puregen-naive")
    assert sorted(compared.values()) == sorted([TRAIN, TEST, 15, 15])
    # the second one holds the training set
    leak = hashes_as_text(image_hashes(noisy_pictures(TRAIN, 1)))
    pretrained.save(tiny_denoiser(), tmp_path / "w" / "m", details={"image_hashes": leak})
    with pytest.raises(InputError, match="no image in common"):
        make_bench(tmp_path, Models(energy=models.energy, ddpm=str(tmp_path / "w" / "m"))).check("puregen-naive")


def test_the_adaptive_attack_is_on_the_denoiser_of_the_bench(tmp_path):
    pretrained.save(tiny_denoiser(), tmp_path / "a")
    pretrained.save(tiny_denoiser(seed=1), tmp_path / "b")
    spec = AttackSpec("adaptive", {"steps": 1, "epochs": 1, "width": 4, "batch_size": 16, "shift": 1}, None, "adaptive")
    made = {}
    for name in ("a", "b"):
        bench = make_bench(tmp_path, Models(denoiser=str(tmp_path / name)))
        settings = bench.settings(spec, "none", 0)
        assert str(tmp_path) not in json.dumps(settings)
        made[name] = settings["attack"]["options"]["model"], bench.poisoned(spec).settings["model"]
        assert made[name][0]["weights_sha256"] == made[name][1]["weights_sha256"]
    assert made["a"][0] != made["b"][0]


def test_clean_rows_get_what_they_call_a_target_when_one_is_wanted(tmp_path):
    root, out = folder_of(tmp_path), tmp_path / "out"
    words = ["bench", "--data", "imagefolder", "--root", str(root), "--out", str(out), "--defence", "none"]
    assert main([*words, "--attack", "none"]) == 0
    (old,) = rows.read(out / "rows.jsonl")
    rows.add(out / "rows.jsonl", {key: value for key, value in old.items() if key not in ("flipped", "target")})
    attack = "poison-frogs:steps=1,epochs=1,width=4,batch_size=16,count=2"
    assert main([*words, "--attack", attack]) == 0
    found = {row["attack"].partition(" ")[0]: row for row in rows.read(out / "rows.jsonl")}
    assert found["none"]["flipped"] == old["flipped"]
    assert found["none"]["target"] == found["poison-frogs"]["target"]


def test_a_target_that_is_a_training_image_is_refused(tmp_path):
    bench = make_bench(tmp_path, Models())
    data = bench.data
    poisoned = Poisoned.of(data.train, data.train_labels, "mine", [0], target=Target(data.train[3], 1, 0))
    with pytest.raises(InputError, match="no image in common"):
        bench.check("none", poisoned)
    other = Target(noisy_pictures(1, 77)[0], 1, 0)
    assert bench.check("none", Poisoned.of(data.train, data.train_labels, "mine", [0], target=other))


def test_data_of_one_class_need_no_target(tmp_path):
    data = Data("imagefolder", noisy_pictures(8, 1), np.zeros(8, int), noisy_pictures(4, 2), np.zeros(4, int), 1)
    row = Bench(data, Models(), "resnet9", "short", tmp_path / "work").row(AttackSpec("none"), "none", 0)
    assert "flipped" not in row
    assert row["accuracy"] == 100


def test_values_are_checked_before_any_work_and_wherever_one_is(tmp_path, monkeypatch, capsys):
    words = ["bench", "--data", "imagefolder", "--root", str(folder_of(tmp_path)), "--out", str(tmp_path / "o")]
    assert main([*words, "--attack", "gradient-matching:bases=nearest"]) != 0
    assert "bases must be one of largest, random" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    for name in ("random", "cpu", "linf"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    spec = AttackSpec("gradient-matching", {"bases": "random", "preset": "cpu", "norm": "linf"})
    assert spec.settings()["options"] == {"bases": "random", "preset": "cpu", "norm": "linf"}


def test_no_attacker_starts_as_a_victim_does():
    from purifyloader.bench.command import _parser

    options = _parser().parse_args(["--out", "o"])
    assert options.attack_seed not in options.seeds
    assert options.attack_seed > 100


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


def test_other_models_have_curves_of_their_own():
    found = [row("lsp", f"eclipse{px}{model}", 60, 1.0) for px in ("", "@25") for model in ("", " [m1]", " [m2]")]
    assert set(pictures.noise_levels(found)) == {"eclipse", "eclipse [m1]", "eclipse [m2]"}


def drawn_by(draw, found, tmp_path, monkeypatch):
    """The figure, with its texts all inside of it."""
    kept = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: kept.append(figure))
    draw(found, tmp_path / "a.png")
    (figure,) = kept
    figure.draw_without_rendering()
    (axis,) = figure.axes
    texts = [*figure.texts, *axis.texts, axis.xaxis.label, axis.yaxis.label]
    if axis.get_xscale() != "log":  # whose labels beyond the ends are there and not drawn
        texts += [*axis.get_xticklabels(), *axis.get_yticklabels()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
    assert all(box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)
    return figure, axis


LONG = "narcissus target_class=2 share=0.75 share_of=class"


@pytest.mark.parametrize(
    "more", [[], [row(LONG, "a-chain-of-my-own-with-a-long-name+B+C", 50, None), row(LONG, "none", 20, None)]]
)
def test_the_grid_has_each_mean_in_its_cell(more, tmp_path, monkeypatch):
    found = [*ROWS, *more]
    _, axis = drawn_by(pictures.accuracies, found, tmp_path, monkeypatch)
    columns = [label.get_text().replace("\n", " ") for label in axis.get_xticklabels()]
    lines = [label.get_text() for label in axis.get_yticklabels()]
    shown = {}
    for text in axis.texts:
        x, y = text.get_position()
        shown[columns[x], lines[y]] = text.get_text()
    means = {(a, d): cell.accuracy for (a, d), cell in report.cells(found).items()}
    wanted = {("clean" if a == "none" else a, d): f"{np.mean(values):.0f}" for (a, d), values in means.items()}
    assert shown == wanted
    assert shown["lsp", "eclipse"] == "67"


def test_the_costs_are_of_defences_that_can_be_compared(tmp_path, monkeypatch):
    figure, axis = drawn_by(pictures.costs, ROWS, tmp_path, monkeypatch)
    (legend,) = figure.legends
    best_first = ["eclipse, 67.0 %", "eclipse@50, 60.0 %", "eclipse@2, 40.0 %", "none, 30.0 %"]
    assert [text.get_text() for text in legend.get_texts()] == best_first, "A was measured on AR alone"
    assert [line.get_ydata()[0] for line in axis.get_lines()] == [67, 60, 40, 30]


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


def test_published_figures_are_found_by_the_attack_without_its_options():
    found = [row("none", "none", 70, None), row("narcissus target_class=2 share=0.01", "puregen-ddpm [mine]", 60, None)]
    text = report.markdown([{**its, **SETTING} for its in found])
    assert "| puregen-ddpm | 5.21 |" in text
    assert "16/255" in text


SETTING = {
    **{"data": "sample", "images": 4000, "test_images": 1000, "victim": "resnet9", "training": "short"},
    "settings": {"data": {"sha": "0"}, "attack_seed": 0, "fast": True, "device": "cpu", "purifier": None},
}
