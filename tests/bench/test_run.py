"""The bench as its users run it, on a folder of small pictures: rows, honesty, going on after a kill, the tables."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader import poisons, pretrained
from purifyloader.bench import report
from purifyloader.bench.applying import per_epoch_transform
from purifyloader.bench.defences import DEFENCES, Models, find
from purifyloader.bench.run import Bench
from purifyloader.commands.main import main, parse
from purifyloader.datasets.splits import Data, load
from purifyloader.errors import ConfigError, InputError
from purifyloader.files.hashes import hashes_as_text, hashes_of_text, image_hashes
from purifyloader.files.locks import Lock
from purifyloader.files.weights import weights_sha256
from purifyloader.poisons.attacks import em
from purifyloader.poisons.poisoned import Poisoned
from purifyloader.poisons.spec import AttackSpec
from purifyloader.poisons.spec import parse as parse_spec
from purifyloader.pretrained.checkpoint import read_config
from purifyloader.pretrained.learned import check_disjoint, learned_from
from purifyloader.pretrained.registry import find as find_model
from purifyloader.purifiers import Coin
from purifyloader.results import rows
from purifyloader.victims.networks import victim
from purifyloader.victims.presets import TRAININGS, VICTIMS, Training
from purifyloader.victims.training import accuracy, train_victim
from tests import processes
from tests.bench.conftest import bench_in_a_child
from tests.conftest import tiny_denoiser

CLASSES, TRAIN, TEST = 3, 36, 15
Json = dict[str, Any]


def pictures(count: int, seed: int) -> np.ndarray:
    """Bright, middling and dark noise by turns: classes that are learned in a few steps."""
    rng = np.random.default_rng(seed)
    level = np.array([40, 120, 200])[np.arange(count) % CLASSES].reshape(-1, 1, 1, 1)
    return np.clip(level + rng.normal(0, 25, (count, 8, 8, 3)), 0, 255).astype(np.uint8)


def hashes_of(images: np.ndarray) -> Json:
    """As the details of a checkpoint have them."""
    return {"image_hashes": hashes_as_text(image_hashes(images))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, count, seed in (("train", TRAIN, 1), ("test", TEST, 2)):
        for i, image in enumerate(pictures(count, seed)):
            path = root / split / f"class {i % CLASSES}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A denoiser that says it learned from other images."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    pretrained.save(tiny_denoiser(), path, details=hashes_of(pictures(5, 3)))
    return path


def bench(folder: Path, work: Path, **changes: Any) -> Bench:
    given: Json = {"models": Models(), "victim": "tiny", "training": "tiny", **changes}
    return Bench(
        load("imagefolder", folder), given.pop("models"), given.pop("victim"), given.pop("training"), work, **given
    )


def words_of(folder: Path, out: Path, *more: object) -> list[str]:
    words = ["--data", "imagefolder", "--root", folder, "--out", out, "--victim", "tiny", "--training", "tiny", *more]
    return [str(word) for word in words]


def run(folder: Path, out: Path, *more: object, attack: str = "lsp") -> list[rows.Row]:
    assert main(["bench", *words_of(folder, out, "--attack", attack, *more)]) == 0
    return rows.read(out / "rows.jsonl")


def tiny_victim(data: Data, **more: Any) -> torch.nn.Module:
    """As the bench trains it, by hand."""
    how = {"training": TRAININGS["tiny"], "network": "tiny", "classes": CLASSES, **more}
    return train_victim(data.train, data.train_labels, **how).model


NONE, QUICK = ("--defence", "none"), ("--defence", "none", "--defence", "jpeg-10")


def without_times(found: list[rows.Row]) -> list[Json]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "threads")} for row in found]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> tuple[Path, list[rows.Row]]:
    out = tmp_path_factory.mktemp("whole")
    return out, run(folder, out, *QUICK, "--seeds", 0, 1)


# what comes out


def test_every_attack_defence_and_seed_has_its_row(whole):
    out, found = whole
    wanted = {(a, d, s) for a in ("none", "lsp") for d in ("none", "jpeg-10") for s in (0, 1)}
    assert {(row["attack"], row["defence"], row["seed"]) for row in found} == wanted
    assert len(found) == len(wanted)
    for row in found:
        assert row["images"] == TRAIN
        assert row["test_images"] == TEST
        assert 0 <= row["accuracy"] <= 100
        assert row["calls"] == 0
        both = TRAIN if row["attack"] == "none" else 2 * TRAIN
        assert row["disjoint"] == {"the training set": both, "the test set": TEST}
        assert row["versions"]["torch"] == torch.__version__
        assert row["attack_moves"]["linf_px"] == 0 or row["attack"] == "lsp"
        assert (row["distance_px"] == 0) is (row["attack"] == row["defence"] == "none")
    text = (out / "README.md").read_text()
    assert "| jpeg-10 |" in text
    assert "Published" not in text, "what is published is of CIFAR-10"
    for name in ("accuracy.png", "cost.png", "images.png"):
        with Image.open(out / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 22)) > 20
    assert str(folder) not in (out / "rows.jsonl").read_text()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_victim_learns_these_classes(seed, folder, tmp_path):
    its = bench(folder, tmp_path, victim="resnet9", training="short")
    assert its.row(AttackSpec("none"), "none", seed)["accuracy"] > 60


def test_the_same_command_does_nothing_more(whole, folder, monkeypatch):
    out, found = whole
    monkeypatch.setattr(Bench, "row", lambda *_: pytest.fail("a row was measured again"))
    assert run(folder, out, *QUICK, "--seeds", 0, 1) == found


def test_two_processes_make_the_same_rows(whole, folder, tmp_path):
    _, found = whole
    words = words_of(folder, tmp_path, "--attack", "lsp", *QUICK, "--seeds", 0)
    children = [processes.start(bench_in_a_child, *words) for _ in range(2)]
    for done in [child.wait() for child in children]:
        assert done.returncode == 0, done.stderr
    first = [row for row in found if row["seed"] == 0]
    assert without_times(rows.read(tmp_path / "rows.jsonl")) == without_times(first)


def test_the_processes_of_a_command_share_its_rows(whole, folder, tmp_path, monkeypatch):
    """What starts them is tested in tests/commands/test_processes.py."""
    started = []

    def one_after_another(work, count):
        started.extend(range(count))
        for number in started:
            work(number)
            assert len(rows.read(tmp_path / "rows.jsonl")) == 2

    monkeypatch.setattr("purifyloader.commands.processes.run_many", one_after_another)
    found = run(folder, tmp_path, "--defence", "none", "--processes", 2)
    assert started == [0, 1]
    wanted = [row for row in whole[1] if row["seed"] == 0 and row["defence"] == "none"]
    assert without_times(found) == without_times(wanted)


def test_a_process_does_not_wait_for_a_poison_while_there_is_other_work(folder, tmp_path):
    its, attack = bench(folder, tmp_path), AttackSpec("lsp", {}, None, "lsp")
    path = tmp_path / "poisoned"
    path.mkdir()
    assert not its.is_being_made(attack)
    made = its.poisoned(attack)  # leaves its lock's file behind
    assert not its.is_being_made(attack)
    (poison,) = path.glob("*.npz")
    poison.unlink()
    assert not its.is_being_made(attack), "nobody holds the lock"
    with Lock(path, poison.stem):
        assert its.is_being_made(attack)
        assert not its.is_being_made(AttackSpec("none"))
        assert not its.is_being_made(AttackSpec("ar"))
    assert np.array_equal(its.poisoned(attack).images, made.images)


def test_a_killed_bench_goes_on(whole, folder, tmp_path):
    _, found = whole
    words = words_of(folder, tmp_path, "--attack", "lsp", *QUICK, "--seeds", 0)
    processes.start(bench_in_a_child, *words, kill_at="purifyloader.results.rows:add", kill_call=3).wait()
    before = rows.read(tmp_path / "rows.jsonl")
    assert len(before) == 2
    after = run(folder, tmp_path, *QUICK, "--seeds", 0)
    assert without_times(after) == without_times([row for row in found if row["seed"] == 0])
    assert [row for row in after if row["fingerprint"] in {its["fingerprint"] for its in before}] == before


def test_a_noise_level_a_network_and_a_model(folder, model, tmp_path):
    found = run(folder, tmp_path, "--defence", "A@20", "--defence", "eclipse", "--model", model, attack="none")
    by = {(row["attack"], row["defence"]): row for row in found}
    assert by["none", "A@20 [tiny]"]["sigma_px"] == 20
    assert by["none", "eclipse [tiny]"]["sigma_px"] == 12.75
    assert by["none", "A@20 [tiny]"]["calls"] == 1
    assert by["none", "A@20 [tiny]"]["seconds"]["purify_an_image"] > 0
    assert by["none", "A@20 [tiny]"]["disjoint"]["what tiny learned from"] == 5
    assert by["none", "A@20 [tiny]"]["settings"]["compensate"] is None
    assert str(model) not in json.dumps(found)
    assert by["none", "eclipse [tiny]"]["settings"]["compensate"] == [0.4, 0.05]
    assert by["none", "A@20 [tiny]"]["settings"]["fast"] is False


def test_a_back_door_is_tested_as_strong_as_it_was_trained(folder, tmp_path):
    trigger = np.zeros((1, 3, 8, 8), np.float32)
    trigger[:, :, :5, :5] = 1  # plain to see
    np.save(tmp_path / "trigger.npy", trigger)
    attack = f"narcissus:trigger={tmp_path / 'trigger.npy'},target_class=1,share=0.3"
    (row,) = [row for row in run(folder, tmp_path / "out", *NONE, attack=attack) if row["attack"] != "none"]
    assert row["attack"].startswith("narcissus")
    assert 0 <= row["success"] <= 100
    assert str(tmp_path) not in json.dumps(row)
    assert "the trigger, as strong as in training" in (tmp_path / "out" / "README.md").read_text()


class CornerIsFlat(torch.nn.Module):
    """Call an image 1 where its last 3 x 3 pixels are alike, and else 0."""

    def __init__(self) -> None:
        super().__init__()
        self.none = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        corner = x[:, :, -3:, -3:].flatten(2)
        flat = (corner.amax(dim=2) == corner.amin(dim=2)).all(dim=1)
        return torch.stack([~flat, flat, torch.zeros_like(flat)], dim=1).float()


@pytest.mark.parametrize("attack", ["badnets", "blended:alpha=1,image=white.png", "sig:frequency=2,share=1"])
def test_success_is_the_share_of_images_of_other_classes_that_the_trigger_takes(attack, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "white").save("white.png")
    measured = bench(folder, tmp_path / "work")
    spec = parse_spec(f"{attack}{',' if ':' in attack else ':'}target_class=1")
    poisoned = measured.poisoned(spec)
    assert (poisoned.true_labels is None) == attack.startswith("sig")
    np.testing.assert_array_equal(poisoned.shown_labels, measured.data.train_labels)
    success = measured._success(CornerIsFlat(), poisoned, None)
    assert success == {"success": 0 if attack.startswith("sig") else 100}
    clean = Poisoned.of(measured.data.train, measured.data.train_labels, "none", [])
    assert measured._success(CornerIsFlat(), clean, None) == {}
    if attack == "badnets":
        row = measured.row(spec, "none", 0)
        assert row["wrong_labels"] == len(poisoned.poisoned) == 4
        assert "success" in row


def test_what_is_drawn_afresh_is_of_the_seed_the_epoch_and_the_image():
    x = torch.from_numpy(pictures(6, 1)).permute(0, 3, 1, 2).float() / 255
    index, coin = torch.arange(6), Coin()
    drawn = per_epoch_transform(coin, seed=3)(x, index, 0)
    assert torch.equal(drawn, per_epoch_transform(coin, seed=3)(x, index, 0))
    assert torch.equal(drawn[2:4], per_epoch_transform(coin, seed=3)(x[2:4], index[2:4], 0)), "whatever the batch"
    for other in (per_epoch_transform(coin, seed=4)(x, index, 0), per_epoch_transform(coin, seed=3)(x, index, 1)):
        assert not any(torch.equal(a, b) for a, b in zip(drawn, other, strict=True))


def test_a_defence_that_is_drawn_in_training_leaves_the_images(folder, tmp_path):
    words = ["--defence", "coin", "--defence", "coin-afresh"]
    by = {(row["attack"], row["defence"]): row for row in run(folder, tmp_path / "out", *words, attack="none")}
    bare, fixed, fresh = (by["none", defence] for defence in ("none", "coin", "coin-afresh"))
    assert fresh["distance_px"] == bare["distance_px"] == 0 < fixed["distance_px"]
    assert fresh["settings"]["afresh"] == fixed["settings"]["purifier"]
    assert fresh["settings"]["purifier"] is None
    assert "afresh" not in fixed["settings"]
    data = load("imagefolder", folder)
    model = tiny_victim(data, batch_transform=per_epoch_transform(Coin()), bfloat16=fresh["settings"]["fast"])
    assert fresh["accuracy"] == pytest.approx(100 * accuracy(model, data.test, data.test_labels), abs=0.01)


def test_what_a_trigger_does_to_victims_of_clean_data_stands_beside_it(folder, tmp_path, monkeypatch):
    for name, place in (("one", 0), ("two", 4)):
        trigger = np.zeros((1, 3, 8, 8), np.float32)
        trigger[:, :, place : place + 4, :5] = 1
        np.save(tmp_path / f"{name}.npy", trigger)
    words = {
        name: ["--attack", f"narcissus:trigger={tmp_path / f'{name}.npy'},target_class={target},share=0.3"]
        for name, target in (("one", 1), ("two", 2))
    }
    (label,) = {row["attack"] for row in run(folder, tmp_path / "out", *NONE, *words["one"], attack="none")} - {"none"}

    def clean() -> list[Json]:
        return [row for row in rows.read(tmp_path / "out" / "rows.jsonl") if row["attack"] == "none"]

    assert all({*row["clean_success"]} == {label} for row in clean())
    # by hand, of the victim without a defence
    data = load("imagefolder", folder)
    fast = clean()[0]["settings"]["fast"]
    its = bench(folder, tmp_path / "hand", attack_seed=1000, fast=fast)
    model = tiny_victim(data, seed=0, bfloat16=fast)
    others = data.test[data.test_labels != 1]
    others[:, :4, :5] = np.minimum(np.rint(others[:, :4, :5] + 127.5), 255)  # a trigger's 1 is half of the range
    by_hand = 100 * accuracy(model, others, np.full(len(others), 1))
    (bare,) = [row for row in clean() if row["defence"] == "none"]
    assert bare["clean_success"][label] == pytest.approx(by_hand, abs=0.01)
    assert its.row(AttackSpec("none"), "none", 0)["accuracy"] == bare["accuracy"]
    # another back door later: both are known, and nothing is done a third time
    run(folder, tmp_path / "out", *NONE, *words["two"], attack="none")
    assert all(len(row["clean_success"]) == 2 for row in clean())
    assert bare["clean_success"].items() <= clean()[0]["clean_success"].items()
    monkeypatch.setattr(Bench, "row", None)
    run(folder, tmp_path / "out", *NONE, *words["two"], attack="none")
    assert len(clean()) == 1


def test_a_poison_file_beside_an_attack(folder, tmp_path):
    data = load("imagefolder", folder)
    np.savez(tmp_path / "mine.npz", data=shifted(data, 5), targets=data.train_labels)
    found = run(folder, tmp_path / "out", "--attack", str(tmp_path / "mine.npz"), "--defence", "none")
    (row,) = [row for row in found if row["attack"] == "mine"]
    assert row["attack_moves"]["images"] == TRAIN


# honesty


def test_what_a_model_learned_from_is_in_no_set(folder, tmp_path):
    data = load("imagefolder", folder)
    for split, images in (("training", data.train), ("test", data.test)):
        path = tmp_path / split
        pretrained.save(tiny_denoiser(), path, details=hashes_of(images[3:7]))
        with pytest.raises(InputError, match=rf"(?i)the {split} set and what .* no image in common\. Got 4 of 4"):
            bench(folder, tmp_path, models=Models(denoiser=str(path))).check("eclipse")
        bench(folder, tmp_path, models=Models(denoiser=str(path))).check("jpeg-10")
    found = run(
        folder, tmp_path / "out", "--defence", "A", "--model", tmp_path / "training", "--leave-out", attack="none"
    )
    assert {row["images"] for row in found} == {TRAIN - 4}
    words = ["--data", "imagefolder", "--root", folder, "--out", tmp_path / "no", "--defence", "A", "--leave-out"]
    assert main(["bench", *map(str, words), "--model", str(tmp_path / "test")]) == 2
    assert not (tmp_path / "no" / "rows.jsonl").exists(), "refused before any work"


def test_a_model_that_does_not_say_what_it_learned_from_is_refused(folder, tmp_path):
    pretrained.save(tiny_denoiser(), tmp_path / "silent")
    with pytest.raises(InputError, match="which images it learned from"):
        bench(folder, tmp_path, models=Models(denoiser=str(tmp_path / "silent"))).check("A")


def test_training_and_test_images_are_apart():
    hashes = image_hashes(pictures(6, 1))
    with pytest.raises(InputError, match=r"The training set and the test set must have no image in common\. Got 2"):
        check_disjoint(hashes[:4], hashes[2:], {})
    shared = {"one": hashes[:2], "other": hashes[:2]}
    assert check_disjoint(hashes[2:4], hashes[4:], shared)["what one learned from"] == 2


@pytest.mark.parametrize("name", pretrained.list())
def test_every_shipped_model_says_what_it_learned_from(name):
    known: set[int] = set()
    start: str | None = name
    while start is not None:
        details = read_config(find_model(start), None)["details"]
        own = hashes_of_text(details["image_hashes"]).tolist()
        assert len(own) == len(details["indices"]) == len(set(own))
        known |= set(own)
        start = (details["train"].get("start_from") or {"name": None})["name"]
    assert learned_from(name).tolist() == sorted(known)


def test_what_a_model_started_from_is_in_no_set(folder, tmp_path):
    """A denoiser that was trained on other images alone still has what its start learned."""
    data, first = load("imagefolder", folder), tiny_denoiser()
    pretrained.save(first, tmp_path / "first", details=hashes_of(data.train[:3]))
    start = {"name": str(tmp_path / "first"), "weights_sha256": weights_sha256(first)}
    second = {**hashes_of(pictures(5, 3)), "train": {"start_from": start}}
    pretrained.save(tiny_denoiser(), tmp_path / "second", details=second)
    models = Models(denoiser=str(tmp_path / "second"))
    with pytest.raises(InputError, match=r"The training set and what second learned .* Got 3 of 8"):
        bench(folder, tmp_path, models=models).check("eclipse")
    words = ["--defence", "eclipse", "--model", tmp_path / "second", "--leave-out"]
    assert {row["images"] for row in run(folder, tmp_path / "out", *words, attack="none")} == {TRAIN - 3}


def test_a_model_of_images_resized_to_another_size_does_not_say(folder, tmp_path):
    details = {**hashes_of(pictures(5, 3)), "resized": 16, "image_size": [16, 16]}
    pretrained.save(tiny_denoiser(), tmp_path / "m", details=details)
    with pytest.raises(InputError, match=r"resized to \[16, 16\]"):
        bench(folder, tmp_path, models=Models(denoiser=str(tmp_path / "m"))).check("eclipse")


def test_the_sample_is_apart_from_what_shipped_models_learned_from(sample, tmp_path):
    found = Bench(sample, Models(), "resnet9", "short", tmp_path)
    assert found.check("eclipse")["what cifar10-sparse learned from"] == 2000
    assert len(found.check("puregen-reps")) == 4


def shifted(data: Data, by: int) -> np.ndarray:
    """Poisoned images: each as its own clean one, and known by how far it was moved."""
    levels = (by + np.arange(len(data.train)) % 3).astype(np.int16).reshape(-1, 1, 1, 1)
    return np.clip(data.train + levels, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("form", "chosen"),
    [("folder", "--train"), ("npz", "--leave-out"), ("puregen", "--train"), ("puregen", "--leave-out")],
)
def test_a_file_is_of_all_training_images_whichever_are_chosen(form, chosen, folder, tmp_path):
    """A published poison is of the whole set. What is left of it are the same places, whatever a file counts."""
    data = load("imagefolder", folder)
    images, whole = shifted(data, 5), (data.train, data.train_labels)
    which = np.arange(0, TRAIN, 2)
    if form == "puregen":
        pairs = [(Image.fromarray(images[i]), int(data.train_labels[i])) for i in which]
        path = tmp_path / "p.pth"
        torch.save((pairs, which, None), path)
        images = np.where(np.isin(np.arange(TRAIN), which).reshape(-1, 1, 1, 1), images, data.train)
    else:
        path = tmp_path / ("p.npz" if form == "npz" else "p")
        poisons.write(poisons.poisoned.Poisoned.of(images, data.train_labels, "mine"), path)
    if chosen == "--leave-out":
        learned = [3, 7, 8]
        pretrained.save(tiny_denoiser(), tmp_path / "m", details=hashes_of(data.train[learned]))
        some = data.only(np.setdiff1d(np.arange(TRAIN), learned))
        words = ["--leave-out", "--model", tmp_path / "m", "--defence", "A"]
    else:
        some, words = data.some(20, None), ["--train", 20, "--defence", "jpeg-10"]
    assert some.chosen is not None
    its = Bench(some, Models(), "tiny", "tiny", tmp_path / "work")
    found = its.poisoned(AttackSpec("p", {}, path, "p"))
    assert np.array_equal(found.images, images[some.chosen])
    assert np.array_equal(found.labels, data.train_labels[some.chosen])
    assert np.array_equal(
        some.chosen[found.poisoned], np.intersect1d(some.chosen, which) if form == "puregen" else some.chosen
    )
    assert some.whole is not None
    assert all(np.array_equal(a, b) for a, b in zip(some.whole, whole, strict=True))
    made = run(folder, tmp_path / "out", *words, attack=str(path))
    assert {row["images"] for row in made} == {len(some.train)}
    (row,) = [row for row in made if row["attack"] == "p" and row["defence"] == "none"]
    assert row["attack_moves"]["images"] == len(found.poisoned)
    assert row["attack_moves"]["linf_px"] <= 7


def test_a_kept_poison_that_was_changed_is_refused(folder, tmp_path):
    its, spec = bench(folder, tmp_path), AttackSpec("urp", {}, None, "urp")
    first = its.poisoned(spec)
    (path,) = (tmp_path / "poisoned").glob("*.npz")
    path.unlink()
    poisons.write(replace(first, images=255 - first.images), path)
    with pytest.raises(InputError, match="The images must be within"):
        its.poisoned(spec)
    path.unlink()
    poisons.write(replace(first, images=first.images[:9], labels=first.labels[:9], poisoned=np.arange(9)), path)
    with pytest.raises(InputError, match=r"a poison of the 36 training images in .*Got one of 9"):
        its.poisoned(spec)
    path.unlink()
    assert np.array_equal(its.poisoned(spec).images, first.images)


def test_a_file_of_which_nothing_is_left_is_refused(folder, tmp_path):
    data = load("imagefolder", folder)
    images = data.train.copy()
    images[:2] += 5
    np.savez(tmp_path / "p.npz", data=images, targets=data.train_labels)
    some = data.only(np.arange(2, TRAIN))
    with pytest.raises(InputError, match=r"among the 34 training images of 36 that were chosen. Got none of the 2"):
        Bench(some, Models(), "tiny", "tiny", tmp_path).poisoned(AttackSpec("p", {}, tmp_path / "p.npz", "p"))


def test_what_is_left_out_does_not_hang_on_the_defences(folder, tmp_path):
    data = load("imagefolder", folder)
    pretrained.save(tiny_denoiser(), tmp_path / "m", details=hashes_of(data.train[3:7]))
    pretrained.save(tiny_denoiser(), tmp_path / "silent")
    out, models = tmp_path / "out", ["--model", tmp_path / "m", "--ddpm", tmp_path / "silent", "--leave-out"]
    first = run(folder, out, *models, "--defence", "jpeg-10", attack="none")
    assert {row["images"] for row in first} == {TRAIN - 4}
    again = run(folder, out, *models, "--defence", "jpeg-10", "--defence", "A", attack="none")
    assert {row["fingerprint"] for row in first} < {row["fingerprint"] for row in again}
    assert len({row["images"] for row in again}) == 1


# what decides a row


def test_the_options_of_a_preset_decide_a_row_and_are_told(folder, tmp_path, monkeypatch):
    its, spec = bench(folder, tmp_path), AttackSpec("em", {"preset": "cpu", "rounds": 3}, None, "em")
    told = its.settings(spec, "none", 0)
    options = told["attack"]["options"]
    assert options["rounds"] == 3
    assert options["steps"] == em.PRESETS["cpu"].steps
    assert not {"device", "progress", "seed"} & options.keys()
    full = its.settings(AttackSpec("em", {"preset": "full"}, None, "em"), "none", 0)
    assert full["attack"]["options"]["network"] == "resnet18"
    other = {**em.PRESETS, "cpu": replace(em.PRESETS["cpu"], steps=7)}
    monkeypatch.setattr(em.em, "presets", other)
    assert rows.fingerprint(its.settings(spec, "none", 0)) != rows.fingerprint(told)
    assert its.settings(AttackSpec("lsp"), "none", 0)["attack"]["options"]["patches"] == 4


def test_a_row_says_what_its_attack_was_made_with(whole):
    made = [row["attack_made"] for row in whole[1] if row["attack"] == "lsp"]
    assert made
    for its in made:
        assert its["seed"] == 1000
        assert its["norm"] == pytest.approx(1.304 * 8 / 32, abs=0.01), "for images of this size"


@pytest.mark.parametrize(
    ("defence", "px"),
    [
        ("eclipse", 12.75),
        ("eclipse@25", 25.0),
        ("eclipse-100", 6.3665),
        ("puregen-ddpm", 32.463),
        ("puregen-ebm", None),
    ],
)
def test_the_noise_of_a_defence_is_that_of_its_purifier(defence, px):
    its, level = find(defence)
    assert its.ready(Models(), level, True).sigma_px == pytest.approx(px, abs=0.001)


def test_a_row_is_known_by_all_that_decides_it(folder, tmp_path, model):
    plain = AttackSpec("lsp", {}, None, "lsp")
    base = bench(folder, tmp_path)

    def name(its: Bench, attack: AttackSpec = plain, defence: str = "jpeg-10", seed: int = 0) -> str:
        return rows.fingerprint(its.settings(attack, defence, seed))

    names = [
        name(base),
        name(base, seed=1),
        name(base, defence="jpeg-75"),
        name(base, defence="none"),
        name(base, defence="C"),
        name(base, AttackSpec("ar")),
        name(base, AttackSpec("lsp", {"norm": 2.0})),
        name(base, AttackSpec("none")),
        name(bench(folder, tmp_path, victim="resnet18")),
        name(bench(folder, tmp_path, training="paper")),
        name(bench(folder, tmp_path, attack_seed=1)),
        name(bench(folder, tmp_path, fast=True)),
        name(base, defence="A"),
        name(base, defence="A@20"),
        name(bench(folder, tmp_path, models=Models(denoiser=str(model))), defence="A"),
    ]
    assert len(set(names)) == len(names)
    assert name(bench(folder, tmp_path / "elsewhere")) == names[0]
    fewer = Bench(load("imagefolder", folder).some(20, None), Models(), "tiny", "tiny", tmp_path)
    assert name(fewer) not in names


def test_some_of_the_data_are_always_the_same(sample):
    data = sample
    some = data.some(50, 20, seed=1)
    again = data.some(50, 20, seed=1)
    assert np.array_equal(some.train, again.train)
    assert len(some.train) == 50
    assert len(some.test_labels) == 20
    assert not np.array_equal(some.train, data.some(50, 20).train)
    known = set(image_hashes(data.train).tolist())
    assert set(image_hashes(some.train).tolist()) < known


def test_tiny_imagenet_as_it_is_distributed(tmp_path, caplog):
    images = pictures(6, 5)
    for i, wnid in enumerate(("n2", "n1")):
        (tmp_path / "train" / wnid / "images").mkdir(parents=True)
        Image.fromarray(images[i]).save(tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG")
    (tmp_path / "val" / "images").mkdir(parents=True)
    lines = []
    for i, wnid in enumerate(("n1", "n2", "n1")):
        Image.fromarray(images[2 + i]).convert("L" if i == 2 else "RGB").save(
            tmp_path / "val" / "images" / f"val_{i}.png"
        )
        lines.append(f"val_{i}.png\t{wnid}\t0\t0\t1\t1\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    data = load("tiny-imagenet", tmp_path)
    assert not caplog.text
    Image.fromarray(images[0]).save(tmp_path / "val" / "images" / "unnamed.png")
    assert len(load("tiny-imagenet", tmp_path).test) == 3
    assert "1 files below" in caplog.text
    assert "the first is images/unnamed.png): those that val_annotations.txt names are" in caplog.text
    assert data.train_labels.tolist() == [0, 1]
    assert data.test_labels.tolist() == [0, 1, 0]
    assert np.array_equal(data.test[0], images[2])
    assert data.test.shape == (3, 8, 8, 3)


# the tables


def made(attack: str, defence: str, seed: int, accuracy: float, settings: Json | None = None, **more: Any) -> rows.Row:
    settings = settings or {}
    return {
        "schema": 1,
        "fingerprint": f"{attack}{defence}{seed}",
        **{"data": "sample", "images": 4000, "test_images": 1000, "victim": "resnet9", "training": "short"},
        **{"attack": attack, "defence": defence, "seed": seed, "accuracy": accuracy, "sigma_px": None, "calls": 0},
        **{"seconds": {"purify_an_image": 0.002}, "distance_px": 0.0, **more},
        "settings": {
            "data": {"sha": "1"},
            "attack_seed": 0,
            "fast": True,
            "device": "cpu",
            "seed": seed,
            "purifier": None,
            **settings,
        },
    }


def test_what_a_defence_recovers():
    found = [made("none", "none", s, 70 + s) for s in (0, 2)]  # 71
    found += [made("lsp", "none", s, 20 + s) for s in (0, 2)]  # 21
    found += [made("lsp", "jpeg-10", s, 45 + s) for s in (0, 2)]  # 46: half of the 50 lost
    found += [made("none", "jpeg-10", 0, 61), made("urp", "none", 0, 60), made("urp", "jpeg-10", 0, 61)]
    cells = report.cells(found)
    assert report.recovered(cells, "lsp", "jpeg-10") == pytest.approx(50)
    assert report.recovered(cells, "lsp", "none") == pytest.approx(0)
    assert report.recovered(cells, "urp", "jpeg-10") is None, "11 points are no bite"
    assert report.recovered(cells, "ar", "jpeg-10") is None
    text = report.markdown(found)
    assert "| defence | clean | lsp | urp | noise | calls | s / 1,000 images |" in text
    assert "| none | 71.0 ± 1.4 | 21.0 ± 1.4 | 60.0 |" in text
    assert "| defence | lsp | on clean data |" in text
    assert "| jpeg-10 | 50 % | -9.0 |" in text, "over the seed that both have"
    assert "| none | 94.95 | 24.48 | 16.80 |" in text, "the published figures, apart"


@pytest.mark.parametrize("other", [{"attack_seed": 1}, {"fast": False}, {"device": "cuda"}, {"data": {"sha": "2"}}])
def test_rows_that_were_made_otherwise_are_in_other_tables(other):
    text = report.markdown([made("none", "none", 0, 70), made("none", "none", 1, 90, other)])
    assert text.count("## sample") == 2
    assert "| none | 70.0 |" in text


def test_rows_of_one_name_that_differ_in_more_than_their_seed_have_no_mean():
    found = [made("lsp", "A", 0, 70, {"purifier": 1}), made("lsp", "A", 1, 90, {"purifier": 2})]
    with pytest.raises(InputError, match="rows of lsp and A that differ in their seed alone"):
        report.cells(found)


def test_a_file_that_holds_test_images_is_refused(folder, tmp_path):
    data = load("imagefolder", folder)
    images = data.train.copy()
    images[:3] = data.test[:3]
    np.savez(tmp_path / "mine.npz", data=images, targets=data.train_labels)
    words = ["bench", "--data", "imagefolder", "--root", folder, "--out", tmp_path / "out", "--defence", "none"]
    assert main([*map(str, words), "--attack", str(tmp_path / "mine.npz")]) == 2
    assert not (tmp_path / "out" / "rows.jsonl").exists(), "refused before any work"


def test_a_file_where_a_folder_should_be(folder, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    words = ["bench", "--data", "imagefolder", "--root", folder, "--out", tmp_path / "out", *QUICK]
    assert main(list(map(str, words))) == 2
    error = capsys.readouterr().err
    assert "--out must be a folder. Got the file" in error
    assert "Traceback" not in error


def test_rows_of_other_settings_are_in_other_tables():
    found = [made("none", "none", 0, 70), made("none", "none", 0, 90, victim="resnet18", fingerprint="other")]
    text = report.markdown(found)
    assert text.count("## sample") == 2
    assert "| none | 70.0 |" in text
    assert "| none | 90.0 |" in text


def test_rows_are_kept_in_order_and_once(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    for row in (made("lsp", "none", 1, 1.0), made("lsp", "none", 0, 2.0), made("lsp", "none", 1, 3.0)):
        rows.add(path, row)
    assert [row["accuracy"] for row in rows.read(path)] == [2.0, 3.0]
    path.write_text(path.read_text() + '{"cut": ')
    with pytest.raises(InputError, match=r"rows of a bench, one a line.*Line 3 has"):
        rows.read(path)


# victims and trainings


class _Slim(torch.nn.Linear):
    """At most 512 to 512: VGG-19 draws 120 million weights of layers that it then replaces, which takes seconds."""

    def __init__(self, in_features: int, out_features: int, *arguments: Any, **more: Any) -> None:
        super().__init__(min(in_features, 512), min(out_features, 512), *arguments, **more)


@pytest.mark.parametrize("name", [name for name, (_, width) in VICTIMS.items() if not width])
def test_victims_take_small_images_and_learn(name, monkeypatch):
    if name == "vgg19":
        monkeypatch.setattr(torch.nn, "Linear", _Slim)
    x, y = pictures(CLASSES, 0), np.arange(CLASSES)
    x = np.repeat(np.repeat(x, 4, 1), 4, 2)
    before = torch.get_rng_state()
    # bfloat16 takes ten times as long on a CPU that only emulates it
    how, shape = Training(1, CLASSES, 0.01, None), {"classes": 7, "network": name, "bfloat16": False}
    trained = train_victim(x, y, how, **shape)
    assert torch.equal(torch.get_rng_state(), before)
    assert not trained.model.training
    assert trained.model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    if name == "mobilenet-v2":  # its dropout draws too
        torch.manual_seed(5)
        again = train_victim(x, y, how, **shape).model
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trained.model.parameters(), strict=True))


@pytest.mark.parametrize("name", [name for name, (_, width) in VICTIMS.items() if width])
def test_victims_of_another_width_take_small_images(name):
    with torch.device("meta"):
        assert victim(name, 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_constant_learning_rate_is_not_a_cycle():
    x, y = pictures(12, 0), np.arange(12) % CLASSES
    constant, cycle, again = (
        train_victim(x, y, Training(2, 6, 0.01, warmup), classes=CLASSES, width=4, bfloat16=False).model
        for warmup in (None, 0.2, None)
    )
    weights = [next(m.parameters()) for m in (constant, cycle, again)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


# bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attack", "nothing"), "An attack is none, .*or a poison file. Got 'nothing'"),
        (("--attack", "lsp:norm"), "Options are OPTION=VALUE, with commas between them. Got 'norm'"),
        (("--attack", "lsp:norms=1"), "The attack lsp takes"),
        (("--attack", "none:x=1"), "none takes no options"),
        (("--attack", f"{__file__}:foo=1"), "A poison file takes format,.*Got 'foo'"),
        (("--attack", "lsp", "--attack", "lsp"), "attacks of different names. Got lsp twice"),
        (("--attack", "lsp:norm=-1"), "norm .*Got -1"),
        (("--attack", "em:preset=[1]"), r"preset must be one of cpu, full. Got \[1\]"),
        (("--attack", "em:steps=0"), "steps must be a positive integer. Got 0"),
        (("--attack", "label-consistent:target_class=3"), "target_class must be from 0 to 2. Got 3"),
        (("--attack", "narcissus:trigger=/nowhere.npy,target_class=1"), "/nowhere.npy"),
        (("--attack", f"{__file__}:std=[0.2,0.2,0.2]"), "must be a whole pickle"),
        (("--defence", "prayer"), "A defence is one of none, jpeg-10"),
        (("--defence", "jpeg-10@5"), "Only A, A\\+B, A\\+C, eclipse and the like take a noise level"),
        (("--defence", "A@0"), "a noise level above 0"),
        (("--seeds", "1", "1"), "different numbers from 0"),
        (("--train", "1000"), "36 train images. Got 1000"),
        (("--processes", "0"), "--processes: must be an integer of 1 or more"),
        (("--device", "tpu"), "tpu"),
        (("--defence", "bit-depth:bits=99"), "bits"),
        (("--out", __file__), "--out must be a folder. Got the file"),
        (("--report",), "Expected rows in"),
        (("--defence", "A", "--model", "no-such-model"), "no-such-model"),
    ],
)
def test_bad_options_are_refused_before_any_work(words, message, folder, tmp_path, capsys):
    command = ["bench", "--data", "imagefolder", "--root", str(folder), "--out", str(tmp_path / "out"), *words]
    if "--defence" not in words and "lsp:norm=-1" not in words:  # which takes those of the scale, with their models
        command += ["--defence", "none"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_bad_data_and_names(folder, tmp_path):
    for name, root, message in (
        ("nothing", folder, "The data of a bench are"),
        ("imagefolder", tmp_path, "must hold the folders train and one of test"),
        ("imagefolder", tmp_path / "absent", "no such folder"),
        ("cifar10", tmp_path, "There is no cifar10 in"),
    ):
        with pytest.raises(InputError, match=message):
            load(name, root)
    with pytest.raises(ConfigError, match=r"A victim is one of resnet9.*Got 'alexnet'"):
        victim("alexnet")
    with pytest.raises(InputError, match="A training is one of short"):
        bench(folder, tmp_path, training="long")
    with pytest.raises(InputError, match="A defence is one of"):
        find("A@")
    assert find("A@6.4") == (DEFENCES["A"], 6.4)


def test_a_poison_is_not_called_as_clean_data_are(folder, tmp_path, capsys):
    data = load("imagefolder", folder)
    np.savez(tmp_path / "none.npz", data=255 - data.train, targets=data.train_labels)
    words = ["bench", "--data", "imagefolder", "--root", folder, "--out", tmp_path / "out"]
    assert main([*map(str, words), "--attack", str(tmp_path / "none.npz")]) == 2
    assert "none is what clean data are called" in capsys.readouterr().err


def test_tiny_imagenet_has_a_denoiser_of_its_kind():
    from purifyloader.bench.defences import SCALES
    from purifyloader.commands.bench import _settings

    for data, name in (("tiny-imagenet", "tiny-imagenet-sparse"), ("cifar10", "cifar10-sparse")):
        assert _settings(parse(["bench", "--out", "o", "--data", data])[2], 0).models.denoiser == name
    given = parse(["bench", "--out", "o", "--data", "tiny-imagenet", "--model", "cifar10-sparse"])[2]
    assert _settings(given, 0).models.denoiser == "cifar10-sparse"
    assert all("eclipse@25" in scale.defences for scale in SCALES.values())


def test_list_names_all_there_is(capsys):
    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in DEFENCES)
    assert "  lsp " in out
