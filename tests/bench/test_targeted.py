"""The bench of targeted attacks, and that of transfer learning: what each seed gets, what is made once, what stays."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader import pretrained
from purifyloader.bench import report, targeted, transfer
from purifyloader.bench.defences import Models
from purifyloader.bench.run import Bench
from purifyloader.commands.main import main
from purifyloader.datasets.splits import Data
from purifyloader.errors import ConfigError, InputError
from purifyloader.files.hashes import hashes_as_text, image_hashes
from purifyloader.files.locks import Lock
from purifyloader.poisons import Attack, Poisoned, Target
from purifyloader.poisons.attacks import registry as attacks
from purifyloader.poisons.spec import AttackSpec
from purifyloader.results import rows
from purifyloader.victims.networks import resnet9
from purifyloader.victims.presets import EXTRACTOR, TRAININGS, Training, Transfer
from purifyloader.victims.training import Normalised, train_victim
from tests.conftest import tiny_denoiser

ROOT = Path(__file__).parents[2]
CLASSES, TRAIN, TEST = 3, 60, 15
TUNED = 6  # a tenth of each class
Json = dict[str, Any]


def pictures(count: int, seed: int) -> np.ndarray:
    """Dark, middling and bright by turns, plain enough that every victim gets every image right."""
    rng = np.random.default_rng(seed)
    level = np.array([30, 128, 225])[np.arange(count) % CLASSES].reshape(-1, 1, 1, 1)
    return np.clip(level + rng.normal(0, 6, (count, 16, 16, 3)), 0, 255).astype(np.uint8)


def labels(count: int) -> np.ndarray:
    return np.arange(count) % CLASSES


DATA = Data("imagefolder", pictures(TRAIN, 1), labels(TRAIN), pictures(TEST, 2), labels(TEST), CLASSES)


def bench(work: Path, training: str = "tiny", data: Data = DATA, victim: str = "tiny", **more: Any) -> Bench:
    return Bench(data, more.pop("models", Models()), victim, training, work, **more)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder that tests share, with the extractors and poisons that they make."""
    return tmp_path_factory.mktemp("work")


# attacks whose outcome is plain, in the table beside the real ones


def planted(
    dataset: Any,
    seed: int = 0,
    *,
    target: Target,
    target_class: int | None = None,
    networks: Sequence[torch.nn.Module] | None = None,
    exact: bool = False,
) -> Poisoned:
    """The target's image in the place of all images of the class wanted, and nothing of its own class's."""
    images, its = dataset[0].copy(), dataset[1]
    image = target.image.copy()
    image[0, 0, 0] ^= 0 if exact else 1  # the very bytes of a test image are refused
    images[its == target.label] = image
    images[its == target.true_label] = 255 * (np.arange(16).reshape(16, 1, 1) % 4 // 2)
    return Poisoned.of(images, its, "planted", target=target, settings={"seed": seed, "given": networks is not None})


def idle(dataset: Any, seed: int = 0, *, target: Target, target_class: int | None = None) -> Poisoned:
    return Poisoned.of(dataset[0], dataset[1], "idle", [], target=target)


@pytest.fixture(autouse=True)
def table(monkeypatch) -> None:
    ours = {
        "planted": Attack("planted", planted, "for tests", "targeted", "none"),
        "idle": Attack("idle", idle, "for tests", "targeted", "none"),
    }
    monkeypatch.setattr(attacks, "ATTACKS", MappingProxyType({**attacks.ATTACKS, **ours}))


PLANTED, IDLE = (AttackSpec(name, {}, None, name) for name in ("planted", "idle"))


def without_times(row: rows.Row) -> Json:
    return {name: value for name, value in row.items() if name not in ("seconds", "threads")}


# targets


def test_each_seed_has_a_target_of_its_own():
    found = [targeted.target_of(DATA, 0, seed) for seed in range(TEST)]
    assert sorted(target.index for target in found) == list(range(TEST))
    for target in found:
        assert np.array_equal(target.image, DATA.test[target.index])
        assert target.true_label == DATA.test_labels[target.index]
        assert target.label in set(range(CLASSES)) - {target.true_label}
    assert len({(target.true_label, target.label) for target in found}) == CLASSES * (CLASSES - 1)
    again = targeted.target_of(DATA, 0, 3)
    assert (again.index, again.label) == (found[3].index, found[3].label)
    assert [targeted.target_of(DATA, 1, seed).index for seed in range(TEST)] != [target.index for target in found]


def test_a_target_is_to_be_called_a_class_that_exists():
    gap = replace(DATA, train_labels=np.where(DATA.train_labels == 1, 2, DATA.train_labels))
    assert {targeted.target_of(gap, 0, seed).label for seed in range(TEST)} == {0, 2}
    one = replace(DATA, train_labels=np.ones_like(DATA.train_labels), test_labels=np.ones_like(DATA.test_labels))
    with pytest.raises(InputError, match="Got training images of class 1 alone"):
        targeted.target_of(one, 0, 0)


def test_an_attack_draws_from_no_victims_seed():
    drawn = [targeted.seed_of(a, s) for a in range(3) for s in range(5)]
    assert len(set(drawn)) == len(drawn)
    assert not set(drawn) & set(range(100))


def test_flipped_is_whether_the_target_is_called_what_was_wanted(tmp_path):
    its = bench(tmp_path, "short", victim="resnet9")
    found = {(a.name, s): its.row(a, "none", s) for a in (PLANTED, IDLE) for s in (0, 1)}
    assert [found["planted", s]["flipped"] for s in (0, 1)] == [100, 100]
    assert [found["idle", s]["flipped"] for s in (0, 1)] == [0, 0]
    for (_, seed), row in found.items():
        target = targeted.target_of(DATA, 0, seed)
        assert row["target"] == {"index": target.index, "true": target.true_label, "wanted": target.label}
    text = report.markdown(list(found.values()))
    assert "Targets that are called what the attacker wants" in text
    assert "| defence | idle | planted |\n| --- | ---: | ---: |\n| none | 0.0 (0 of 2) | 100.0 (2 of 2) |" in text


def test_a_table_without_an_attack_that_has_a_target_is_not_there(tmp_path):
    row = bench(tmp_path, "short", victim="resnet9").row(AttackSpec("none"), "none", 0)
    assert row["flipped"] == 0
    assert "Targets" not in report.markdown([row])


def test_a_seeds_poison_is_made_once_and_its_row_is_the_same_again(tmp_path, monkeypatch):
    its = bench(tmp_path)
    first = its.row(PLANTED, "jpeg-10", 1)
    assert len(list((tmp_path / "poisoned").glob("*.npz"))) == 1
    monkeypatch.setattr(attacks, "make", lambda *_, **__: pytest.fail("a poison was made again"))
    assert without_times(its.row(PLANTED, "jpeg-10", 1)) == without_times(first)
    with pytest.raises(pytest.fail.Exception):
        its.poisoned(PLANTED, 2)
    monkeypatch.undo()


def test_seeds_share_the_poison_of_every_other_attack(tmp_path):
    its = bench(tmp_path)
    lsp = AttackSpec("lsp", {}, None, "lsp")
    assert its._poison_path(lsp, 0) == its._poison_path(lsp, 1)
    assert its._poison_path(IDLE, 0) != its._poison_path(IDLE, 1)
    other = its.poisoned(PLANTED, 1)
    assert not np.array_equal(its.poisoned(PLANTED, 0).images, other.images)
    assert other.settings["seed"] == targeted.seed_of(0, 1)
    assert other.settings["given"] is False, "no network is known to an attack on a victim trained from nothing"


def test_a_process_leaves_a_seed_to_another_and_takes_the_next(tmp_path):
    its = bench(tmp_path, "transfer-linear")
    path = its._poison_path(IDLE, 0)
    path.parent.mkdir()
    with Lock(path.parent, path.stem):
        assert its.is_being_made(IDLE, 0)
        assert not its.is_being_made(IDLE, 1)
        assert not its.is_being_made(AttackSpec("none"), 0)
    path = its._extractor_path(0)
    path.parent.mkdir()
    with Lock(path.parent, path.stem):
        assert its.is_being_made(AttackSpec("none"), 0)
        assert not its.is_being_made(AttackSpec("none"), 1)


def test_a_poison_that_is_the_target_byte_for_byte_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"The training set and the test set must have no image in common\. Got 1"):
        bench(tmp_path).row(AttackSpec("planted", {"exact": True}, None, "planted"), "none", 0)


# what was measured before stays what it is


def test_rows_and_poisons_that_are_there_keep_their_names(sample, tmp_path):
    its = Bench(sample, Models(), "resnet9", "short", tmp_path, fast=True)
    lsp = AttackSpec("lsp", {}, None, "lsp")
    assert rows.fingerprint(its.settings(lsp, "none", 0)) == "22e8046da783aa3f"
    assert rows.fingerprint(its.settings(lsp, "jpeg-10", 1)) == "5dc545db62fbe317"
    assert its._poison_path(lsp, 0).name == "351c901b5aec4701.npz"


def test_training_from_nothing_gives_the_weights_that_it_gave(sample):
    images, its = sample.train, sample.train_labels
    model = train_victim(images[:100], its[:100], Training(1, 32, 0.05, 0.2), width=4, bfloat16=False).model
    # measured before there was anything to start from; another seed is off by a tenth, another machine by 1e-5
    assert model.linear.weight[0, :4].tolist() == pytest.approx([0.13962, 0.14496, -0.12348, -0.05248], abs=1e-3)


# the split


@pytest.mark.parametrize(("images", "tuned"), [(600, 50), (500, 50), (499, 49), (19, 1), (2, 1)])
def test_a_tenth_of_each_class_up_to_50_images_is_to_fine_tune_on(images, tuned):
    its = np.repeat([0, 2], [images, 40])
    data = replace(
        DATA, train=np.arange(len(its) * 12, dtype=np.uint32).view(np.uint8).reshape(-1, 4, 4, 3), train_labels=its
    )
    small, rest = transfer.split(data)
    assert np.bincount(small.train_labels).tolist() == [tuned, 0, 4]
    assert np.bincount(rest.train_labels).tolist() == [images - tuned, 0, 36]
    parts = [set(image_hashes(part.train).tolist()) for part in (small, rest)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(image_hashes(data.train).tolist())
    assert np.array_equal(small.train, transfer.split(data)[0].train)
    assert images == 2 or not np.array_equal(small.train[:tuned], data.train[:tuned]), "drawn, and not the first"
    assert small.test is DATA.test


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    data = replace(DATA, train=DATA.train[:4], train_labels=np.array([0, 0, 1, 0]))
    with pytest.raises(InputError, match=r"two training images or more of each class.*Got one of class 1"):
        bench(tmp_path, "transfer-linear", data)


# training from an extractor


@pytest.fixture(scope="module")
def start() -> torch.nn.Module:
    return train_victim(DATA.train, DATA.train_labels, Training(2, 64, 0.2, 0.2), classes=CLASSES, width=4).model


HEAD, ALL = (Transfer(2, 6, 0.05, 0.2, head_only=head_only) for head_only in (True, False))


def states(*models: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    return [{name: value.clone() for name, value in model.state_dict().items()} for model in models]


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_linear_transfer_trains_the_last_layer_and_nothing_else(start):
    before = states(start)[0]
    model = train_victim(DATA.train, DATA.train_labels, HEAD, network=start, classes=CLASSES).model
    assert differing(before, states(start)[0]) == set(), "the extractor is copied"
    assert differing(before, states(model)[0]) == {"linear.weight"}, "nor do the statistics of a batch count"
    assert not model.training


def test_fine_tuning_trains_all(start):
    before = states(start)[0]
    model = train_victim(DATA.train, DATA.train_labels, ALL, network=start, classes=CLASSES).model
    assert differing(before, states(start)[0]) == set()
    assert differing(before, states(model)[0]) == set(before)


def test_the_last_layer_is_new_and_of_the_seed(start):
    how, data = replace(HEAD, lr=1e-12), (DATA.train, DATA.train_labels)
    first, again, other = states(
        *(train_victim(*data, how, network=start, classes=CLASSES, seed=seed).model for seed in (0, 0, 1))
    )
    assert differing(first, states(start)[0]) == {"linear.weight"}
    assert differing(first, again) == set()
    assert differing(first, other) == {"linear.weight"}


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("resnet9", "head_only leaves the features .* Got the name 'resnet9'"),
        (resnet9(4), "an output for each of 3 classes. Got 4 outputs"),
        (torch.nn.Conv2d(3, 3, 1), "Got no linear layer"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(network, message):
    with pytest.raises(InputError, match=message):
        train_victim(DATA.train, DATA.train_labels, HEAD, network=network, classes=CLASSES)


def test_an_attacker_sees_the_network_as_the_victim_is_tested(start):
    from purifyloader.victims.training import accuracy

    x = torch.from_numpy(DATA.test).permute(0, 3, 1, 2) / 255
    right = (Normalised(start)(x).argmax(1).numpy() == DATA.test_labels).mean()
    assert right == accuracy(start, DATA.test, DATA.test_labels)
    x.requires_grad_(True)
    Normalised(start)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


# the bench of it


def counted(monkeypatch) -> list[int]:
    """The seed of every extractor that is trained."""
    seeds: list[int] = []

    def train(*arguments: Any, **options: Any) -> Any:
        seeds.append(options["seed"])
        return train_victim(*arguments, **options)

    monkeypatch.setattr(transfer, "train_victim", train)
    return seeds


def test_an_extractor_is_trained_once_a_seed_and_again_where_it_is_lost(tmp_path, monkeypatch):
    trained = counted(monkeypatch)
    for name in ("transfer-linear", "transfer-fine-tune"):
        monkeypatch.setitem(TRAININGS, name, replace(TRAININGS[name], epochs=2))
    monkeypatch.setattr(transfer, "EXTRACTOR", TRAININGS["tiny"])
    cells = [("transfer-fine-tune", IDLE, "none", 1)]
    cells += [("transfer-linear", attack, defence, 0) for attack, defence in ((PLANTED, "none"), (IDLE, "jpeg-10"))]
    cells += [("transfer-linear", AttackSpec("none"), "none", 1)]
    for training, attack, defence, seed in cells:
        its = bench(tmp_path, training)
        row = its.row(attack, defence, seed)
        assert row["images"] == TUNED
        assert row["extractor_images"] == TRAIN - TUNED
    assert trained == [1, 0], "all attacks, defences and ways to transfer share it"
    path = its._extractor_path(0)
    before = path.read_bytes()
    for broken in (None, before[:-5], b"nonsense" * 9):
        path.unlink()
        if broken is not None:
            path.write_bytes(broken)
        its.extractor(0)
        assert path.read_bytes() == before
    assert trained == [1, 0, 0, 0, 0]
    assert [p.suffix for p in path.parent.iterdir() if not p.name.startswith(".")] == [".safetensors"] * 2
    loaded, again = its.extractor(0), its.extractor(0)
    assert differing(*states(loaded, again)) == set()
    assert not loaded.training


def test_an_extractor_learns_from_the_rest_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        transfer, "train_victim", lambda images, *a, **k: (seen.append(images), train_victim(images, *a, **k))[1]
    )
    its = bench(tmp_path, "transfer-linear")
    its.extractor(0)
    (images,) = seen
    _, rest = transfer.split(DATA)
    assert np.array_equal(images, rest.train)
    assert not set(image_hashes(images).tolist()) & set(image_hashes(its.data.train).tolist())


@pytest.mark.parametrize("training", [name for name, how in TRAININGS.items() if isinstance(how, Transfer)])
def test_a_planted_target_flips_a_transferred_victim(training, work):
    its = bench(work, training, victim="narrow")
    assert its.row(PLANTED, "none", 0)["flipped"] == 100
    row = its.row(IDLE, "none", 0)
    assert row["flipped"] == 0
    assert row["accuracy"] > 90
    assert row["disjoint"] == {"the training set": TRAIN, "the test set": TEST}, "the extractor's images too"


def test_an_attack_that_takes_networks_is_given_the_victims_extractor(work, monkeypatch):
    its = bench(work, "transfer-linear")
    given = []

    def spy(dataset: Any, seed: int = 0, *, target: Target, networks: Any = None) -> Poisoned:
        given.extend(networks)
        return Poisoned.of(*dataset, "planted", [], target=target)

    monkeypatch.setattr(attacks, "ATTACKS", {"spy": Attack("spy", spy, "for tests", "targeted", "none")})
    its.poisoned(AttackSpec("spy"), 1)
    (network,) = given
    assert differing(*states(network.network, its.extractor(1))) == set()
    assert differing(*states(network.network, its.extractor(0)))
    # bfloat16 trains another extractor, and so makes another poison; the attack that takes none has the same
    fast = bench(work, "transfer-linear", fast=True)
    assert its._poison_path(AttackSpec("spy"), 1) != fast._poison_path(AttackSpec("spy"), 1)
    monkeypatch.undo()


def test_the_poison_of_an_attack_that_takes_no_networks_does_not_depend_on_one(tmp_path):
    lsp = AttackSpec("lsp", {}, None, "lsp")
    paths = {
        bench(tmp_path, training, fast=fast)._poison_path(lsp, seed)
        for training in ("transfer-linear", "transfer-fine-tune")
        for fast in (True, False)
        for seed in (0, 1)
    }
    assert len(paths) == 1
    assert bench(tmp_path)._poison_path(lsp, 0) not in paths


@pytest.mark.parametrize("name", ["poison-frogs", "bullseye", "gradient-matching"])
def test_the_real_attacks_against_a_linear_transfer(name, work):
    its = bench(work, "transfer-linear")
    attack = AttackSpec(name, {"count": 1, "steps": 3}, None, name)
    row = its.row(attack, "none", 0)
    assert row["flipped"] in (0, 100)
    assert row["attack_moves"]["images"] == 1
    assert row["target"]["wanted"] == its.poisoned(attack, 0).target.label


def test_rows_of_transfer_are_known_apart(tmp_path):
    lsp = AttackSpec("lsp", {}, None, "lsp")

    def name(its: Bench) -> str:
        return rows.fingerprint(its.settings(lsp, "none", 0))

    linear = bench(tmp_path, "transfer-linear")
    # trained from nothing on the very images that another is fine-tuned on
    alone = bench(tmp_path, data=linear.data)
    other = replace(
        DATA,
        train=np.where(
            np.isin(image_hashes(DATA.train), image_hashes(linear.data.train)).reshape(-1, 1, 1, 1),
            DATA.train,
            255 - DATA.train,
        ),
    )
    its = [
        linear,
        alone,
        bench(tmp_path),
        bench(tmp_path, "transfer-fine-tune"),
        bench(tmp_path, "transfer-linear", other),
    ]
    assert linear.settings(lsp, "none", 0)["data"] == its[4].settings(lsp, "none", 0)["data"], "another rest alone"
    assert len({name(each) for each in its}) == len(its)
    assert "extractor" not in alone.settings(lsp, "none", 0)
    assert linear.settings(lsp, "none", 0)["extractor"]["training"]["epochs"] == EXTRACTOR.epochs


def test_the_extractors_images_are_apart_from_all_that_is_tested_on_or_learned_from(tmp_path):
    rest = bench(tmp_path, "transfer-linear").rest
    assert rest is not None
    pretrained.save(
        tiny_denoiser(), tmp_path / "m", details={"image_hashes": hashes_as_text(image_hashes(rest.train[:2]))}
    )
    with pytest.raises(InputError, match=r"what m learned from must have no image in common\. Got 2 of 2"):
        bench(tmp_path, "transfer-linear", models=Models(denoiser=str(tmp_path / "m"))).check("A")
    tested = replace(DATA, test=np.concatenate([DATA.test[1:], rest.train[:1]]))
    with pytest.raises(InputError, match=r"training set and the test set must have no image in common\. Got 1"):
        bench(tmp_path, "transfer-linear", tested).check("none")


# the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, images in (("train", DATA.train), ("test", DATA.test)):
        for i, image in enumerate(images):
            path = root / split / f"class {i % CLASSES}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


def test_the_command_transfers_and_goes_on(folder, tmp_path, monkeypatch, capsys):
    trained = counted(monkeypatch)
    monkeypatch.setitem(TRAININGS, "transfer-linear", replace(TRAININGS["transfer-linear"], epochs=24))
    words = ["bench", "--data", "imagefolder", "--root", folder, "--out", tmp_path, "--training", "transfer-linear"]
    words += ["--victim", "narrow", "--attack", "planted", "--attack", "lsp", "--defence", "none"]
    assert main([str(word) for word in (*words, "--seeds", 0)]) == 0
    first = rows.read(tmp_path / "rows.jsonl")
    assert {row["attack"] for row in first} == {"none", "planted", "lsp"}
    assert "flipped 100.0 %" in capsys.readouterr().out
    assert main([str(word) for word in (*words, "--seeds", 0, 1)]) == 0
    found = rows.read(tmp_path / "rows.jsonl")
    assert trained == [0, 1]
    assert len(found) == 6
    assert [row for row in found if row["seed"] == 0] == first, "a row that is there is not measured again"
    targets = {row["seed"]: row["target"] for row in found if row["attack"] == "planted"}
    assert targets[0]["index"] != targets[1]["index"]
    assert {"target" in row for row in found if row["attack"] == "lsp"} == {False}
    assert all(row["target"] == targets[row["seed"]] for row in found if row["attack"] == "none"), "to compare with"
    assert {(row["images"], row["training"]) for row in found} == {(TUNED, "transfer-linear")}
    assert len(list((tmp_path / "work" / "poisoned").glob("*.npz"))) == 3, "two targets, and one lsp"
    text = (tmp_path / "README.md").read_text()
    assert f"extractor that has learned from {TRAIN - TUNED} other images, clean" in text
    assert "| defence | clean | planted |\n| --- | ---: | ---: |\n| none | 0.0 (0 of 2) | 100.0 (2 of 2) |" in text
    assert str(folder) not in json.dumps(found)
    monkeypatch.setattr(Bench, "row", lambda *_: pytest.fail("a row was measured again"))
    assert main([str(word) for word in (*words, "--seeds", 0, 1)]) == 0


def test_both_ways_to_transfer_have_tables_of_their_own(work):
    found = [bench(work, t).row(IDLE, "none", 0) for t in ("transfer-linear", "transfer-fine-tune")]
    text = report.markdown(found)
    assert text.count("## imagefolder: 6 training images") == 2


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ("planted:target=x.png", "draws the target of planted for each seed.*Got 'target': leave it out"),
        ("planted:target_class=1", "Got 'target_class': leave it out"),
        ("poison-frogs:networks=[1]", "Got 'networks': leave it out"),
        ("planted:colour=1", "The attack planted takes target, .*Got 'colour'"),
        ("narcissus:target_class=1", "narcissus needs trigger"),
    ],
)
def test_what_the_bench_gives_itself_is_no_option(attack, message, folder, tmp_path, capsys):
    words = ["bench", "--data", "imagefolder", "--root", folder, "--out", tmp_path / "out", "--attack", attack]
    words += ["--defence", "none"]
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_nor_is_it_one_of_a_spec(tmp_path):
    with pytest.raises(ConfigError, match="Got 'target'"):
        bench(tmp_path).poisoned(AttackSpec("planted", {"target": 1}), 0)
