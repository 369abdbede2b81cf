"""Models that vote: one file a model, the same bytes whoever makes it, after any damage, kill or change of order."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import json
import math
import os
import random
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2.functional import pil_to_tensor

from purifyloader.certify import models
from purifyloader.certify.functions import DenoisedSet, named_training, training_settings
from purifyloader.certify.models import Voting, fill, ndt_classify, voting_settings
from purifyloader.certify.training import SmallNetwork, Training, with_classes
from purifyloader.certify.votes import VoteFolder, new_seed
from purifyloader.core import noise
from purifyloader.core.images import quantize
from purifyloader.diffusion.blind import BlindDenoiser
from purifyloader.errors import ConfigError, InputError, PurifyError
from purifyloader.files.atomic import canonical_json
from purifyloader.files.locks import Lock
from purifyloader.files.weights import weights_sha256
from purifyloader.purifiers import Chain, Compensation, DenoiseOnce, Grayscale, Purifier, Resize
from purifyloader.victims.networks import resnet9
from purifyloader.victims.presets import Training as VictimTraining
from purifyloader.victims.training import train_victim
from tests.purified.faults import Run, assert_same, contents

CLASSES, MODELS = 3, 12
SECRET = 0x123456789ABCDEF
Loose = Any  # what no type checker would let through

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def pictures(count: int, seed: int, size: int = 8, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Bright, middling and dark noise by turns, so close that noised sets make models that differ."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    level = np.array([115, 120, 125])[labels].reshape(-1, 1, 1, 1)
    return np.clip(level + rng.normal(0, 15, (count, size, size, channels)), 0, 255).astype(np.uint8), labels


TRAIN, TEST = pictures(24, 1), pictures(30, 2)[0]


def nearest(dataset: DenoisedSet, seed: int) -> Callable[[Tensor], Tensor]:
    """A training of a millisecond: the class whose mean is nearest, of images that the seed draws."""
    data, targets = dataset.data.astype(np.float32) / 255, np.asarray(dataset.targets)
    chosen = np.random.default_rng(seed).permutation(len(data))[: len(data) * 3 // 4]
    some, its = data[chosen], targets[chosen]
    means = np.stack([some[its == k].mean(0) if (its == k).any() else data.mean(0) for k in range(dataset.classes)])
    flat = torch.from_numpy(means).permute(0, 3, 1, 2).flatten(1)
    return lambda x_BCHW: -torch.cdist(x_BCHW.flatten(1), flat)


def furthest(dataset: DenoisedSet, seed: int) -> Callable[[Tensor], Tensor]:
    ask = nearest(dataset, seed)
    return lambda x_BCHW: -ask(x_BCHW)


def plain(sigma: float = 0.1) -> Purifier:
    return Compensation(p=0.0, sigma=sigma)


def voting(train: Loose = nearest, purifier: Purifier | None = None, draws: int = 1) -> Voting:
    return Voting(TRAIN[0], TRAIN[1], TEST, purifier or plain(), train, CLASSES, draws)


def with_secret(folder: Path, seed: int = SECRET) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "secret.json").write_text(canonical_json({"seed": seed}) + "\n")
    return folder


def vote_folder(folder: Path, settings: dict[str, Any] | None = None, **more: int) -> VoteFolder:
    numbers = {"models": MODELS, "inputs": len(TEST), "classes": CLASSES, **more}
    return VoteFolder(folder, {"alpha": 0.001} if settings is None else settings, **numbers)


def untouched(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file but locks, and when it was written."""
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
        if path.suffix != ".lock"
    }


def visible(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not name.endswith(".lock")}


def known(folder: Path, which: int = 0) -> tuple[VoteFolder, Path]:
    """A folder with every model's votes, and one of its files."""
    votes = vote_folder(with_secret(folder))
    fill((votes, voting(), model) for model in range(MODELS))
    return votes, folder / f"{which:05d}.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes in one go."""
    votes, path = known(tmp_path_factory.mktemp("whole") / "votes")
    votes.tidy()
    return contents(path.parent)


# -- the files -----------------------------------------------------------------------------------------

# frozen: votes that were made with an earlier version must be read for ever
SETTINGS_BYTES = b'{"alpha":0.001,"classes":10,"data":"abc","inputs":5,"models":3,"schema":1}\n'
VOTE_SHA = b"7a1e275b46ddc18fc80c686120925a86194ec0821bfd5a7a4c6684c70d9cac43"
VOTE_BYTES = b'{"model":2,"sha256":"%b","votes":"AAkDAwE="}\n' % VOTE_SHA
WIDE_SHA = b"1265c35d9b0d302256f4319e40b1ba661f44d07c6fd7a23dfbfab791ed7793ba"  # more than 256 classes
WIDE_BYTES = b'{"model":0,"sha256":"%b","votes":"AAArAQMAAwABAA=="}\n' % WIDE_SHA


def test_golden_bytes(tmp_path: Path) -> None:
    settings = {"data": "abc", "alpha": 0.001}
    votes = VoteFolder(with_secret(tmp_path / "a"), settings, models=3, inputs=5, classes=10)
    assert votes.seed == SECRET
    votes.write(2, np.array([0, 9, 3, 3, 1]))
    assert (tmp_path / "a" / "settings.json").read_bytes() == SETTINGS_BYTES
    assert (tmp_path / "a" / "00002.json").read_bytes() == VOTE_BYTES
    # and what the checksum is of, said again
    told = canonical_json([{"models": 3, "inputs": 5, "classes": 10, **settings}, SECRET, 2]).encode()
    entry = json.loads(VOTE_BYTES)
    assert hashlib.sha256(told + base64.b64decode(entry["votes"])).hexdigest() == entry["sha256"]

    wide = VoteFolder(with_secret(tmp_path / "b"), settings, models=3, inputs=5, classes=300)
    wide.write(0, np.array([0, 299, 3, 3, 1]))
    assert (tmp_path / "b" / "00000.json").read_bytes() == WIDE_BYTES
    found = wide.read(0)
    assert found is not None
    assert found.tolist() == [0, 299, 3, 3, 1]


def test_golden_seeds() -> None:
    """Of noise and of training: votes that an earlier version made go on with the same models."""
    assert [voting().training_seed(model, SECRET) for model in range(3)] == [534864670, 767792577, 420178564]
    its = voting(draws=2)
    key = noise.fold_in(noise.fold_in(noise.key_from_seed(SECRET), 0x6E6F6973), 7)
    x = torch.from_numpy(TRAIN[0]).permute(0, 3, 1, 2).float() / 255
    want = [quantize(plain()(x, noise.fold_in(noise.fold_in(key, j), torch.arange(24)))) for j in range(2)]
    assert np.array_equal(its.noised(7, SECRET).data, torch.cat(want).permute(0, 2, 3, 1).numpy())


def test_a_file_with_any_bit_flipped_is_not_taken_for_votes(tmp_path: Path) -> None:
    votes, path = known(tmp_path)
    right = path.read_bytes()
    taken = []
    for place in range(len(right)):
        for bit in range(8):
            path.write_bytes(right[:place] + bytes([right[place] ^ 1 << bit]) + right[place + 1 :])
            if votes.has(0):
                taken.append((place, bit))
    assert taken == []
    path.write_bytes(right)
    assert votes.has(0)


def test_a_file_that_is_cut_off_anywhere_is_not_taken_for_votes(tmp_path: Path) -> None:
    votes, path = known(tmp_path)
    right = path.read_bytes()
    for length in range(len(right)):
        path.write_bytes(right[:length])
        assert votes.read(0) is None, length


def of_another_model(folder: Path) -> bytes:
    return (folder / "00001.json").read_bytes()


def renumbered(folder: Path) -> bytes:
    return (folder / "00001.json").read_bytes().replace(b'"model":1', b'"model":0')


def of_another_secret(folder: Path) -> bytes:
    return known_elsewhere(folder, SECRET + 1, {"alpha": 0.001})


def of_other_settings(folder: Path) -> bytes:
    return known_elsewhere(folder, SECRET, {"alpha": 0.01})


def known_elsewhere(folder: Path, seed: int, settings: dict[str, Any]) -> bytes:
    other = vote_folder(with_secret(folder.parent / "other", seed), settings)
    other.write(0, voting().vote(0, SECRET))
    return (folder.parent / "other" / "00000.json").read_bytes()


def other_votes(folder: Path) -> bytes:
    """With a checksum of somebody who knows all but the secret."""
    entry = json.loads((folder / "00000.json").read_text())
    data = bytes(len(TEST))
    told = canonical_json([{"models": MODELS, "inputs": len(TEST), "classes": CLASSES, "alpha": 0.001}, 0, 0]).encode()
    entry |= {"votes": base64.b64encode(data).decode(), "sha256": hashlib.sha256(told + data).hexdigest()}
    return (canonical_json(entry) + "\n").encode()


DAMAGE: dict[str, bytes | Callable[[Path], bytes] | None] = {
    "missing": None,
    "empty": b"",
    "zeros": bytes(100),
    "not UTF-8": b"\xff\xfe\x00{}",
    "no JSON": b"votes",
    "a list": b"[]\n",
    "null": b"null\n",
    "a number for votes": b'{"model":0,"sha256":"","votes":3}\n',
    "no votes": b'{"model":0,"sha256":""}\n',
    "letters that are no base64": '{"model":0,"sha256":"","votes":"ä"}\n'.encode(),
    "another model's": of_another_model,
    "another model's, renumbered": renumbered,
    "of another secret": of_another_secret,
    "of other settings": of_other_settings,
    "forged": other_votes,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_made_good_with_the_same_bytes(tmp_path: Path, damage: str, whole: dict[str, bytes]) -> None:
    votes, path = known(tmp_path / "votes")
    what = DAMAGE[damage]
    made: list[int] = []
    if what is None:
        path.unlink()
    else:
        path.write_bytes(what(path.parent) if callable(what) else what)
    assert votes.read(0) is None
    with pytest.raises(InputError, match=rf"votes of {MODELS} models .* Got {MODELS - 1}: run the same again"):
        votes.all()
    fill(((votes, voting(), model) for model in range(MODELS)), lambda folder, model: made.append(model))
    assert made == [0]
    assert_same(visible(path.parent), whole)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros(29, int),
        np.zeros((30, 1), int),
        np.zeros(30),
        np.zeros(30, bool),
        np.full(30, -1),
        np.full(30, CLASSES),
    ],
    ids=["few", "table", "floats", "booleans", "negative", "large"],
)
def test_votes_that_are_none_are_not_written(tmp_path: Path, bad: np.ndarray) -> None:
    votes = vote_folder(tmp_path)
    with pytest.raises(InputError, match="Expected votes"):
        votes.write(0, bad)
    assert not list(tmp_path.glob("0*"))


@pytest.mark.parametrize("classes", [1, 2**16 + 1])
def test_numbers_of_classes_that_no_file_holds(tmp_path: Path, classes: int) -> None:
    with pytest.raises(InputError, match="classes"):
        vote_folder(tmp_path / "votes", classes=classes)
    assert not (tmp_path / "votes").exists()


# -- the secret ----------------------------------------------------------------------------------------


def test_the_secret_is_the_systems_and_kept(tmp_path: Path) -> None:
    seeds = []
    before = os.umask(0)
    try:
        for name in "ab":
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(0)  # whoever knows these must not know the noise
            seeds.append(vote_folder(tmp_path / name).seed)
    finally:
        os.umask(before)
    assert len({*seeds, new_seed(), new_seed()}) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    for name, seed in zip("ab", seeds, strict=True):
        path = tmp_path / name / "secret.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert json.loads(path.read_text()) == {"seed": seed}
        assert vote_folder(tmp_path / name).seed == seed
        assert str(seed) not in (tmp_path / name / "settings.json").read_text()


def test_it_has_63_bits() -> None:
    seeds = [new_seed() for _ in range(64)]
    assert max(seeds) >= 2**62  # or one of 2^64
    assert len(set(seeds)) == 64


def test_a_lost_secret_is_refused_where_there_are_votes(tmp_path: Path) -> None:
    votes = vote_folder(tmp_path)
    (tmp_path / "secret.json").unlink()
    assert vote_folder(tmp_path).seed != votes.seed  # nothing was made with the first
    vote_folder(tmp_path).write(MODELS - 1, np.zeros(len(TEST), int))
    (tmp_path / "secret.json").unlink()
    before = untouched(tmp_path)
    with pytest.raises(InputError, match=r"Expected the seed that the votes .* were made with"):
        vote_folder(tmp_path)
    assert untouched(tmp_path) == before


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[1]",
        b"\xff",
        b'{"seed": -1}',
        b'{"seed": 1.0}',
        b'{"seed": true}',
        b'{"seed": "1"}',
        b'{"seed": 9223372036854775808}',
    ],
)
def test_a_damaged_secret_is_refused(tmp_path: Path, text: bytes) -> None:
    vote_folder(tmp_path)
    (tmp_path / "secret.json").write_bytes(text)
    before = untouched(tmp_path)
    with pytest.raises(InputError, match="Expected the seed of"):
        vote_folder(tmp_path)
    assert untouched(tmp_path) == before


def test_a_secret_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    vote_folder(tmp_path)
    (tmp_path / "secret.json").unlink()
    (tmp_path / "secret.json").mkdir()
    with pytest.raises(InputError, match="Expected the seed of"):
        vote_folder(tmp_path)


def test_processes_that_begin_at_once_have_one_secret(tmp_path: Path) -> None:
    """Whoever comes second waits until the first has written it, and reads it."""
    seeds: list[int] = []
    with Lock(tmp_path, "settings"):  # as the first has it; a lock is of an open file, not of a process
        second = threading.Thread(target=lambda: seeds.append(vote_folder(tmp_path).seed))
        second.start()
        second.join(0.5)
        assert second.is_alive()
        assert [path.name for path in tmp_path.iterdir()] == [".settings.lock"]
        with_secret(tmp_path)
    second.join(30)
    assert seeds == [SECRET]


# -- other settings ------------------------------------------------------------------------------------


def classified(folder: Path | None, **changes: Any) -> np.ndarray:
    given: dict[str, Any] = {
        "data": TRAIN,
        "test_images": TEST,
        "purifier": plain(),
        "train": nearest,
        "models": 4,
        **changes,
    }
    return ndt_classify(
        *(given.pop(k) for k in ("data", "test_images", "purifier", "train", "models")), folder, **given
    )


def changed(array: np.ndarray, place: Any, value: int) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


TINY = Training(width=2, epochs=1, batch_size=8, bfloat16=False)

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "models": ({"models": 5}, "models was 4 and is 5"),
    "classes": ({"classes": 4}, "classes was 3 and is 4"),
    "draws": ({"draws": 2}, "draws was 1 and is 2"),
    "alpha": ({"settings": {"alpha": 0.01}}, "alpha was 0.001 and is 0.01"),
    "a setting less": ({"settings": {}}, "alpha was 0.001 and is null"),
    "a setting more": ({"settings": {"alpha": 0.001, "x": [1]}}, r"x was null and is \[1\]"),
    "sigma": ({"purifier": plain(0.2)}, r"purifier\.sigma was 0\.1 and is 0\.2"),
    "another purifier": ({"purifier": DenoiseOnce(BlindDenoiser(nn.Identity(), (0.1, 1)), 0.1)}, r"purifier\.kind was"),
    "another function": ({"train": furthest}, r"training\.function was .*nearest\W+and is .*furthest"),
    "the built-in training": ({"train": TINY}, r"training\.built_in was null and is"),
    "a pixel": ({"data": (changed(TRAIN[0], (5, 1, 1, 1), 0), TRAIN[1])}, "data was"),
    "a label": ({"data": (TRAIN[0], changed(TRAIN[1], 0, 1))}, "data was"),
    "an image less": ({"data": (TRAIN[0][1:], TRAIN[1][1:])}, "data was"),
    "a test image": ({"test_images": changed(TEST, (5, 1, 1, 1), 0)}, "data was"),
    "a test image less": ({"test_images": TEST[1:]}, "inputs was 30 and is 29"),
}


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settled") / "votes"
    classified(folder, settings={"alpha": 0.001})
    return folder


@pytest.mark.parametrize("other", OTHERS)
def test_votes_of_other_settings_are_refused(settled: Path, other: str) -> None:
    changes, message = OTHERS[other]
    before = untouched(settled)
    with pytest.raises(ConfigError, match=f"Got others: .*{message}.*or another folder"):
        classified(settled, **{"settings": {"alpha": 0.001}, **changes})
    assert untouched(settled) == before


def test_one_number_of_many_is_named(tmp_path: Path) -> None:
    """All of a training in one line would be cut off before what differs."""
    vote_folder(tmp_path, {"training": TINY.settings()})
    with pytest.raises(ConfigError, match=r"Got others: training\.built_in\.lr was 0\.2 and is 0\.1\. Votes of"):
        vote_folder(tmp_path, {"training": replace(TINY, lr=0.1).settings()})


def test_the_same_settings_go_on(settled: Path) -> None:
    before = untouched(settled)
    votes = classified(settled, settings={"alpha": 0.001})
    assert votes.shape == (4, len(TEST))
    assert votes.dtype == np.int64
    assert untouched(settled) == before
    assert sorted(before) == ["00000.json", "00001.json", "00002.json", "00003.json", "secret.json", "settings.json"]


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b'{"schema": 1}'])
def test_settings_that_were_damaged_are_refused(tmp_path: Path, text: bytes) -> None:
    vote_folder(tmp_path)
    (tmp_path / "settings.json").write_bytes(text)
    with pytest.raises(ConfigError, match="Expected votes of these settings"):
        vote_folder(tmp_path)


@pytest.mark.parametrize("bad", [{"a": float("nan")}, {"a": {1}}, {"a": np.int64(1)}])
def test_settings_that_json_cannot_hold(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="settings that JSON can hold"):
        vote_folder(tmp_path, bad)


@pytest.mark.parametrize("name", ["data", "training", "models", "schema"])
def test_settings_hide_nothing_that_is_looked_at(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"Got '{name}' again"):
        classified(tmp_path, settings={name: 1})


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"data": 3}, "dataset"),
    "float images": ({"data": (TRAIN[0] / 255, TRAIN[1])}, "uint8"),
    "float test images": ({"test_images": TEST / 255}, "test images uint8"),
    "another size": ({"test_images": pictures(3, 2, size=16)[0]}, "test images uint8"),
    "no test images": ({"test_images": TEST[:0]}, "test images uint8"),
    "one test image": ({"test_images": TEST[0]}, "test images uint8"),
    "no purifier": ({"purifier": None}, "Expected a purifier"),
    "a denoiser": ({"purifier": BlindDenoiser(nn.Identity(), (0.1, 1))}, "Expected a purifier"),
    "no models": ({"models": 0}, "models must be"),
    "half a model": ({"models": 1.5}, "models must be"),
    "true models": ({"models": True}, "models must be"),
    "no draws": ({"draws": 0}, "draws must be"),
    "few classes": ({"classes": 2}, "from 3 to"),
    "many classes": ({"classes": 2**16 + 1}, "from 3 to"),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_calls_that_are_refused_before_anything_is_made(tmp_path: Path, bad: str) -> None:
    changes, message = BAD_CALLS[bad]
    with pytest.raises(InputError, match=message):
        classified(tmp_path / "votes", **changes)
    assert not (tmp_path / "votes").exists()


def test_in_memory_nobody_can_foresee_the_noise() -> None:
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = classified(None)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert first.shape == (4, len(TEST))
    assert not np.array_equal(first, classified(None))


def test_a_dataset_is_its_arrays(tmp_path: Path) -> None:
    items = [(Image.fromarray(image), int(label)) for image, label in zip(*TRAIN, strict=True)]
    votes = classified(with_secret(tmp_path), data=items)
    assert np.array_equal(votes, [voting().vote(model, SECRET) for model in range(4)])


# -- the same votes ------------------------------------------------------------------------------------


def test_models_differ_and_the_order_is_none(tmp_path: Path, whole: dict[str, bytes]) -> None:
    votes = vote_folder(with_secret(tmp_path))
    fill((votes, voting(), model) for model in reversed(range(MODELS)))
    votes.tidy()
    assert_same(contents(tmp_path), whole)
    every = votes.all()
    assert every.shape == (MODELS, len(TEST))
    assert len(np.unique(every, axis=0)) == MODELS, "or these tests would not see two models mixed up"
    assert np.array_equal(every, [voting().vote(model, SECRET) for model in range(MODELS)])


@pytest.mark.parametrize("at_once", [1, 7, 23])
def test_how_many_are_purified_at_once_decides_nothing(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    its = voting(purifier=DenoiseOnce(BlindDenoiser(nn.Identity(), (0.1, 1)), 0.1, compute_batch=16), draws=2)
    expected, votes = its.noised(3, SECRET).data, its.vote(3, SECRET)
    monkeypatch.setattr(models, "_AT_ONCE", at_once)
    assert np.array_equal(its.noised(3, SECRET).data, expected)
    assert np.array_equal(its.vote(3, SECRET), votes)


@dataclass(frozen=True)
class Slow:
    """`nearest` that takes its time, and notes outside the folder what it begins and ends."""

    log: Path
    seconds: float = 0.1

    def settings(self) -> dict[str, Any]:
        return {"function": "slow"}

    def __call__(self, dataset: DenoisedSet, seed: int) -> Callable[[Tensor], Tensor]:
        self.note("begin", seed)
        time.sleep(self.seconds)
        self.note("end", seed)
        return nearest(dataset, seed)

    def note(self, what: str, seed: int) -> None:
        with open(self.log, "ab", buffering=0) as file:  # one write: lines of several processes stay whole
            file.write(f"{os.getpid()} {what} {seed}\n".encode())

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []


def fill_slowly(folder: Path, slow: Slow) -> list[int]:
    """In a child."""
    votes, its = vote_folder(folder), voting(slow)
    made: list[int] = []
    fill(((votes, its, model) for model in range(MODELS)), lambda its_folder, model: made.append(model))
    assert all(votes.has(model) for model in range(MODELS))
    return made


def test_kills_lose_nothing_and_double_nothing(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Several at random moments; then two processes at once, of which one is killed, too."""
    rng = random.Random(5)
    folder, told = with_secret(tmp_path / "votes"), tmp_path / "told"
    told.mkdir()
    slow = Slow(tmp_path / "log")

    def start(name: str) -> Run:
        return Run(fill_slowly, folder, slow, outcome=told / name)

    def begun() -> int:
        return sum(what == "begin" for _, what, _ in slow.lines())

    def wait_for(run: Run, count: int) -> None:
        while run.alive and begun() < count:
            time.sleep(0.001)

    kills = 0
    while kills < 6 and len(list(folder.glob("0*.json"))) < MODELS - 4:
        run = start(str(kills))
        wait_for(run, begun() + 1)
        time.sleep(rng.uniform(0, 0.12))
        assert run.kill(), "it was done too early to be killed"
        kills += 1
        for path in folder.glob("0*.json"):
            assert path.read_bytes() == whole[path.name], "half a file was seen"
    assert kills > 1
    runs = [start("first"), start("second")]
    wait_for(runs[0], begun() + 1)
    kills += runs[0].kill()
    runs.append(start("third"))
    made = []
    for run in runs[1:]:
        outcome = run.join()
        assert outcome.error is None, outcome.traceback
        made += outcome.value
    assert len(made) == len(set(made))
    # each kill costs at most the model that was in work
    assert MODELS <= begun() <= MODELS + kills
    ends = Counter(seed for _, what, seed in slow.lines() if what == "end")
    assert {int(seed) for seed in ends} == {voting().training_seed(model, SECRET) for model in range(MODELS)}

    votes = vote_folder(folder)
    assert votes.done() == MODELS
    assert_same(visible(folder), visible(folder) | whole)  # beside what kills have left
    votes.tidy()
    assert_same(contents(folder), whole)
    assert np.array_equal(votes.all(), [voting().vote(model, SECRET) for model in range(MODELS)])


def test_two_processes_share_the_work(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder, told = with_secret(tmp_path / "votes"), tmp_path / "told"
    told.mkdir()
    slow = Slow(tmp_path / "log")
    runs = [Run(fill_slowly, folder, slow, outcome=told / str(i)) for i in range(2)]
    made = [run.join().value for run in runs]
    assert sorted(made[0] + made[1]) == list(range(MODELS))
    assert min(map(len, made)) > 0
    vote_folder(folder).tidy()
    assert_same(contents(folder), whole)


def test_what_another_has_in_work_is_waited_for_and_left_alone(tmp_path: Path) -> None:
    votes = vote_folder(tmp_path)
    (left, work) = (tmp_path / f".0000{n}.json.abc.tmp" for n in (3, 4))
    left.touch(), work.touch()
    (tmp_path / ".00005.lock").touch()
    (tmp_path / ".secret.json.abc.tmp").touch()
    (tmp_path / ".mine").touch()
    (tmp_path / "notes.txt").touch()
    with Lock(tmp_path, "00004"):  # as another process has it
        votes.tidy()
        assert work.exists()
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            ".00004.json.abc.tmp",
            ".00004.lock",
            ".mine",
            "notes.txt",
            "secret.json",
            "settings.json",
        ]
    votes.tidy()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine", "notes.txt", "secret.json", "settings.json"]


def test_an_error_of_a_training_leaves_its_lock_free(tmp_path: Path) -> None:
    def fails(dataset: DenoisedSet, seed: int) -> None:
        raise RuntimeError("no memory")

    votes = vote_folder(tmp_path)
    with pytest.raises(RuntimeError, match="no memory"):
        fill([(votes, voting(fails), 0)])
    assert not votes.has(0)
    assert votes.lock(0).acquire(wait=False)


def test_a_folder_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PurifyError, match="Could not write"):
        vote_folder(tmp_path / "file")


# -- noise ---------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """The identity, which keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.seen.append(x_BCHW.clone())
        return x_BCHW


GREY = np.full((64, 16, 16, 3), 128, np.uint8)


def grey_voting(sigma: float, draws: int = 1) -> Voting:
    # compute_batch divides the images: padding would be seen too
    purifier = DenoiseOnce(BlindDenoiser(Watched(), (0.001, 1)), sigma, compute_batch=16)
    return Voting(GREY, np.arange(64) % 4, GREY[:2], purifier, nearest, 4, draws)


def drawn(its: Voting, model: int, seed: int = SECRET) -> Tensor:
    """The noise that was added, in units of sigma, before anything is rounded."""
    purifier: Any = its.purifier
    watched = purifier.denoiser.network
    watched.seen.clear()
    its.noised(model, seed)
    return (torch.cat(watched.seen) - 128 / 255) / purifier.sigma


@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_the_noise_has_exactly_that_standard_deviation(sigma: float) -> None:
    z = drawn(grey_voting(sigma), 0).double()
    assert abs(float(z.mean())) < 4 / math.sqrt(z.numel())
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / z.numel())
    assert abs(float(z.pow(4).mean()) - 3) < 4 * math.sqrt(96 / z.numel())  # of a normal distribution
    # images are rounded to 8 bits, which adds the twelfth of a level squared
    rounded = grey_voting(sigma).noised(0, SECRET).data.astype(float) - 128
    expected = (255 * sigma) ** 2 + 1 / 12
    assert rounded.var() == pytest.approx(expected, rel=5 * math.sqrt(2 / z.numel()))


def test_no_two_images_draws_models_or_secrets_share_noise() -> None:
    its = grey_voting(0.05, draws=2)
    sets = [drawn(its, 0), drawn(its, 1), drawn(its, 0, SECRET + 1)]
    rows = torch.cat(sets).flatten(1).double()
    assert len(rows) == 3 * 2 * len(GREY)
    correlation = rows @ rows.T / rows.shape[1]
    correlation.fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / math.sqrt(rows.shape[1])


def test_draws_are_stacked() -> None:
    its = voting(draws=3)
    found = its.noised(5, SECRET)
    assert len(found) == 3 * len(TRAIN[0])
    assert found.targets == TRAIN[1].tolist() * 3
    assert found.classes == CLASSES
    first, *others = np.split(found.data, 3)
    assert np.array_equal(first, voting().noised(5, SECRET).data)
    for other in others:
        assert (first != other).mean() > 0.9


def test_seeds_of_training() -> None:
    seeds = [voting().training_seed(model, secret) for model in range(200) for secret in (SECRET, SECRET + 1)]
    assert len(set(seeds)) == len(seeds)
    assert all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
    assert max(seeds) > 2**30


# -- predictors ----------------------------------------------------------------------------------------


class InTraining(nn.Module):
    """Answers otherwise in training mode, and only without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.train()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        right = nn.functional.one_hot(wanted(x_BCHW), CLASSES).float()
        return right * self.weight * (-1 if self.training else 1)


def wanted(x_BCHW: Tensor) -> Tensor:
    """Class numbers by the brightness, all of them somewhere."""
    return (x_BCHW.mean((1, 2, 3)) * 255).long() % CLASSES


def logits(x_BCHW: Tensor) -> Tensor:
    return nn.functional.one_hot(wanted(x_BCHW), CLASSES).float()


GOOD: dict[str, Any] = {
    "class numbers": wanted,
    "int32": lambda x: wanted(x).int(),
    "uint8 of numpy": lambda x: wanted(x).numpy().astype(np.uint8),
    "a list of numbers": lambda x: wanted(x).tolist(),
    "float32": logits,
    "bfloat16": lambda x: logits(x).bfloat16(),
    "float64": lambda x: logits(x).double(),
    "with gradients": lambda x: logits(x) * torch.ones(1, requires_grad=True),
    "float64 of numpy": lambda x: logits(x).double().numpy(),
    "float16 of numpy": lambda x: logits(x).numpy().astype(np.float16),
    "a network in training": InTraining(),
}

BAD: dict[str, tuple[Any, str]] = {
    "NaN": (lambda x: logits(x) * float("nan"), r"float32 \(30, 3\)"),
    "one NaN": (lambda x: logits(x).index_fill(0, torch.tensor([7]), float("nan")), r"float32 \(30, 3\)"),
    "infinity": (lambda x: logits(x) / 0, r"float32 \(30, 3\)"),
    "logits of more classes": (lambda x: torch.zeros(len(x), CLASSES + 1), r"float32 \(30, 4\) from 0"),
    "logits of too few": (lambda x: torch.zeros(len(x), CLASSES - 1), r"float32 \(30, 2\)"),
    "one answer": (lambda x: torch.zeros(CLASSES), r"float32 \(3,\)"),
    "a number": (lambda x: 1, r"int64 \(\)"),
    "too few answers": (lambda x: wanted(x)[1:], r"int64 \(29,\)"),
    "integer logits": (lambda x: logits(x).long(), r"int64 \(30, 3\)"),
    "float class numbers": (lambda x: wanted(x).float(), r"float32 \(30,\)"),
    "float class numbers of numpy": (lambda x: wanted(x).double().numpy(), r"float64 \(30,\)"),
    "booleans": (lambda x: wanted(x) > 0, r"bool \(30,\)"),
    "negative numbers": (lambda x: wanted(x) - 1, r"int64 \(30,\) from -1 to 1"),
    "large numbers": (lambda x: wanted(x) + 1, r"int64 \(30,\) from 1 to 3"),
    "nothing": (lambda x: None, r"object \(\)"),
    "words": (lambda x: ["cat"] * len(x), r"<U3 \(30,\)"),
    "two things": (lambda x: (logits(x), wanted(x)), r"object \(\)"),
    "an empty list": (lambda x: [], r"float64 \(0,\)"),
}


@pytest.mark.parametrize("name", GOOD)
def test_answers_that_are_votes(name: str) -> None:
    votes = voting(lambda dataset, seed: GOOD[name]).vote(0, SECRET)
    expected = wanted(torch.from_numpy(TEST).permute(0, 3, 1, 2).float() / 255)
    assert len(expected.unique()) == CLASSES
    assert votes.dtype == np.int64
    assert votes.tolist() == expected.tolist()


@pytest.mark.parametrize("name", BAD)
def test_answers_that_are_none(name: str) -> None:
    answer, got = BAD[name]
    with pytest.raises(InputError, match=rf"Expected of a predictor, for 30 images, class numbers.* Got {got}"):
        voting(lambda dataset, seed: answer).vote(0, SECRET)


@pytest.mark.parametrize("given", [None, 3, "model"])
def test_a_training_that_returns_no_predictor(given: Any) -> None:
    with pytest.raises(InputError, match=f"Expected a predictor .* Got {type(given).__name__}: return the trained"):
        voting(lambda dataset, seed: given).vote(0, SECRET)


def test_a_predictor_sees_the_test_images_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_AT_ONCE", 7)
    seen: list[Tensor] = []

    def watch(x_BCHW: Tensor) -> Tensor:
        seen.append(x_BCHW)
        return torch.zeros(len(x_BCHW), CLASSES)

    voting(lambda dataset, seed: watch).vote(0, SECRET)
    assert [len(x) for x in seen] == [7, 7, 7, 7, 2]
    assert all(x.dtype == torch.float32 for x in seen)
    assert torch.equal(quantize(torch.cat(seen)).permute(0, 2, 3, 1), torch.from_numpy(TEST))


def state() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def reseeding(dataset: DenoisedSet, seed: int) -> Callable[[Tensor], Tensor]:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return nearest(dataset, seed)


def failing(dataset: DenoisedSet, seed: int) -> None:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    raise RuntimeError("stop")


def test_a_training_does_not_disturb_what_the_caller_draws() -> None:
    torch.rand(7), random.random(), np.random.rand()  # not what another model's seed has left
    before = state()
    voting(reseeding).vote(0, SECRET)
    assert state() == before
    with pytest.raises(RuntimeError, match="stop"):
        voting(failing).vote(0, SECRET)
    assert state() == before
    voting(TINY, draws=1).noised(0, SECRET)
    assert state() == before


def unseeded(dataset: DenoisedSet, seed: int) -> Callable[[Tensor], Tensor]:
    """As many trainings are: a loader's order, dropout and so on, from the global generators."""
    draw = random.random() + np.random.rand() + float(torch.rand(()))
    return lambda x_BCHW: (x_BCHW.mean((1, 2, 3)) * 1e4 * draw).long() % CLASSES


def test_a_training_that_seeds_nothing_still_follows_from_the_secret() -> None:
    """Or a model made after a stop would be another, and all models of one process alike."""
    first = [voting(unseeded).vote(model, SECRET).tolist() for model in range(3)]
    torch.rand(7), random.random(), np.random.rand()
    assert [voting(unseeded).vote(model, SECRET).tolist() for model in (2, 1, 0)] == first[::-1]
    assert first[0] != first[1] != first[2]


# -- the training set ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [None, pil_to_tensor])
def test_a_denoised_set_is_like_torchvisions(transform: Any) -> None:
    ours = DenoisedSet(TRAIN[0], TRAIN[1].tolist(), CLASSES)
    theirs = CIFAR10.__new__(CIFAR10)  # without its files
    theirs.data, theirs.targets, theirs.target_transform = TRAIN[0], TRAIN[1].tolist(), None
    ours.transform = theirs.transform = transform
    assert len(ours) == len(theirs) == 24
    assert ours.targets == theirs.targets
    for index in (0, 5, -1, torch.tensor(3)):
        (image, label), (its_image, its_label) = ours[index], theirs[index]
        assert type(image) is type(its_image)
        assert np.array_equal(image, its_image)
        assert (label, type(label)) == (its_label, int)
    with pytest.raises(IndexError):
        ours[24]
    assert len(list(ours)) == 24


def test_a_loader_over_a_denoised_set() -> None:
    dataset = DenoisedSet(*TRAIN, CLASSES)
    dataset.transform = pil_to_tensor
    batches = list(DataLoader(dataset, batch_size=10))
    assert [len(labels) for _, labels in batches] == [10, 10, 4]
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(TRAIN[0]))
    assert torch.cat([labels for _, labels in batches]).tolist() == TRAIN[1].tolist()


def test_grey_images() -> None:
    images, labels = pictures(6, 3, channels=1)
    dataset = DenoisedSet(images, labels.tolist(), CLASSES)
    picture, _ = dataset[2]
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), images[2, :, :, 0])
    its = Voting(images, labels, images, plain(), nearest, CLASSES)
    assert its.noised(0, SECRET).data.shape == images.shape
    assert its.vote(0, SECRET).shape == (6,)
    with pytest.raises(InputError, match=r"3 channels\. Got 1: give a function of your own"):
        replace(its, train=TINY).vote(0, SECRET)


# -- the built-in training -----------------------------------------------------------------------------

LARGER = DenoisedSet(*pictures(24, 1, size=16), CLASSES)


def trained(training: Training, seed: int = 0) -> str:
    return weights_sha256(training(LARGER, seed))


def test_a_seed_decides_a_network() -> None:
    before = state()
    first = trained(TINY)
    assert trained(TINY) == first
    assert trained(TINY, 1) != first
    assert trained(replace(TINY, lr=0.1)) != first
    assert state() == before
    network = TINY(LARGER, 0)
    assert isinstance(network, SmallNetwork)
    assert not network.training
    assert network(torch.rand(2, 3, 16, 16)).shape == (2, CLASSES)


@pytest.mark.parametrize("pool", [1, 2])
def test_images_are_averaged_in_training_and_after(pool: int) -> None:
    network = replace(TINY, pool=pool)(LARGER, 0)
    x = torch.rand(2, 3, 16, 16)
    blocks = x.unflatten(3, (-1, pool)).unflatten(2, (-1, pool)).mean((3, 5))
    alone = blocks.repeat_interleave(pool, 2).repeat_interleave(pool, 3)
    assert torch.allclose(network(x), network(alone), atol=1e-5)
    assert torch.allclose(network(x), network.network(blocks), atol=1e-5)


def test_a_warm_start_goes_on() -> None:
    images, labels = pictures(20, 5, size=16)
    start = TINY.warm_start(images, labels % 2, 2, seed=3)
    assert start.linear.out_features == 2
    assert weights_sha256(TINY.warm_start(images, labels % 2, 2, seed=3)) == weights_sha256(start)
    empty = TINY.empty(2)
    empty.load_state_dict(start.state_dict())
    assert weights_sha256(empty) == weights_sha256(start)
    grown = with_classes(start, CLASSES, seed=0)
    kept = replace(TINY, start=grown, keep_head=True, lr=1e-9)(LARGER, 1)
    anew = replace(TINY, start=grown, lr=1e-9)(LARGER, 1)
    for network in (kept, anew):
        ours = network.network.network
        assert torch.allclose(ours.features[0][0].weight, grown.features[0][0].weight, atol=1e-6)
    assert torch.allclose(kept.network.network.linear.weight, grown.linear.weight, atol=1e-6)
    assert not torch.allclose(anew.network.network.linear.weight, grown.linear.weight, atol=1e-2)
    with pytest.raises(InputError, match="an output for each of 3 classes"):
        replace(TINY, start=TINY.empty(4), keep_head=True)(LARGER, 0)


def test_other_numbers_of_classes() -> None:
    before = state()
    network = resnet9(4, 2)
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    trunk, head = weights_sha256(network.features), network.linear
    assert with_classes(network, 4, seed=0) is network
    assert network.linear is head
    five, again, other = (with_classes(resnet9(4, 2), 5, seed).linear for seed in (0, 0, 1))
    assert with_classes(network, 5, seed=0) is network
    assert weights_sha256(network.features) == trunk
    assert network.linear.out_features == 5
    assert network.linear.bias is None
    assert torch.equal(network.linear.weight, five.weight)
    assert torch.equal(five.weight, again.weight)
    assert not torch.equal(five.weight, other.weight)
    deep = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    found = with_classes(deep, 7, seed=0)[1][2]
    assert (found.in_features, found.out_features, found.bias is not None) == (6, 7, True)


def test_the_last_layer_is_kept_or_drawn_anew() -> None:
    start = resnet9(CLASSES, 2).eval()
    kept, anew, again = (
        train_victim(
            *TRAIN, VictimTraining(1, 8, 1e-9, 0.2), classes=CLASSES, network=start, pad=0, seed=seed, **more
        ).model
        for seed, more in ((0, {"keep_head": True}), (0, {}), (1, {}))
    )
    before = start.linear.weight
    assert torch.allclose(kept.linear.weight, before, atol=1e-6)
    assert not torch.allclose(anew.linear.weight, before, atol=1e-2)
    assert not torch.allclose(anew.linear.weight, again.linear.weight, atol=1e-2)
    for model in (kept, anew):
        assert torch.allclose(model.features[0][0].weight, start.features[0][0].weight, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network": "resnet10"}, "network must be one of"),
        ({"width": 0}, "width must be"),
        ({"pool": 0}, "pool must be"),
        ({"pool": 1.5}, "pool must be"),
        ({"epochs": True}, "epochs must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"pad": -1}, "pad must be"),
        ({"pad": 0.5}, "pad must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": math.inf}, "lr must be"),
    ],
)
def test_trainings_that_are_none(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Training(**values)


def test_settings_of_the_built_in_training() -> None:
    first = TINY.settings()
    assert json.loads(canonical_json(first)) == first
    start = resnet9(CLASSES, 2)
    others = [replace(TINY, start=start), replace(TINY, start=resnet9(CLASSES, 2)), replace(TINY, keep_head=True)]
    others += [replace(TINY, pool=1), replace(TINY, pad=0), replace(TINY, bfloat16=True), replace(TINY, epochs=2)]
    texts = {canonical_json(training.settings()) for training in (TINY, *others)}
    assert len(texts) == 1 + len(others)
    assert replace(TINY, start=start).settings() == replace(TINY, start=start).settings()
    assert training_settings(TINY) == first


# -- functions of the user's ---------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in the working directory that `named_training` finds."""
    path = tmp_path / "votes_of_mine.py"
    path.write_text(
        "import functools\n"
        "def train(dataset, seed, epochs=1):\n    return lambda x: [0] * len(x)\n"
        "class Own:\n    def __call__(self, dataset, seed):\n        return train(dataset, seed)\n"
        "own = Own()\n"
        "more = functools.partial(train, epochs=3)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    importlib.invalidate_caches()
    yield path
    sys.modules.pop("votes_of_mine", None)


def test_a_function_by_its_name(module: Path) -> None:
    train = named_training("votes_of_mine:train")
    assert voting(train).vote(0, SECRET).tolist() == [0] * len(TEST)
    assert sys.path[-1] == str(module.parent), "behind what is installed"
    first = training_settings(train)
    assert first == {
        "function": "votes_of_mine:train",
        "source_sha256": hashlib.sha256(module.read_bytes()).hexdigest(),
        "defaults": [1],
    }
    module.write_text(module.read_text().replace("number = 3", "number = 4"))
    second = training_settings(train)
    assert second["function"] == first["function"]
    assert second["source_sha256"] == hashlib.sha256(module.read_bytes()).hexdigest() != first["source_sha256"]


def test_a_change_of_the_function_is_refused(module: Path, tmp_path: Path) -> None:
    train = named_training("votes_of_mine:train")
    classified(tmp_path / "votes", train=train)
    module.write_text(module.read_text() + "# better now\n")
    with pytest.raises(ConfigError, match=r"Got others: training\.source_sha256 was"):
        classified(tmp_path / "votes", train=train)


@pytest.mark.parametrize("name", ["own", "more"])
def test_objects_that_can_be_called_are_known_by_their_file(module: Path, name: str) -> None:
    """A module's own partial function, or an object of its own class."""
    train = named_training(f"votes_of_mine:{name}")
    first = training_settings(train)
    assert first["source_sha256"] == hashlib.sha256(module.read_bytes()).hexdigest()
    module.write_text(module.read_text().replace("epochs=3", "epochs=5"))
    assert training_settings(train) != first


def test_what_a_partial_function_is_given_is_told(module: Path) -> None:
    train: Any = named_training("votes_of_mine:train")
    found = [
        canonical_json(training_settings(functools.partial(train, **keywords)))
        for keywords in ({}, {"epochs": 1}, {"epochs": 2}, {"network": nn.Identity()})
    ]
    assert len({*found, canonical_json(training_settings(train))}) == 5
    again = training_settings(functools.partial(train, network=nn.Identity()))  # at another address
    assert canonical_json(again) == found[3]


def test_callables_without_source() -> None:
    assert training_settings(max) == {"function": "builtins:max", "source_sha256": None}

    def typed(text: str) -> dict[str, Any]:
        scope: dict[str, Any] = {"__name__": "typed"}
        exec(text, scope)
        return training_settings(scope["train"])

    first = typed("def train(dataset, seed): return dataset.data[:3]")
    assert (first["function"], len(first["source_sha256"])) == ("typed:train", 64)
    assert typed("\n\ndef train(dataset, seed):\n    return dataset.data[:3]") == first, "the same, typed again"
    assert typed("def train(dataset, seed): return dataset.data[:4]") != first
    assert typed("def train(dataset, seed): return dataset.targets[:3]") != first


class Trains:
    def __init__(self, epochs: int) -> None:
        self.epochs, self.network = epochs, nn.Linear(1, 1)

    def __call__(self, dataset: DenoisedSet, seed: int) -> None: ...


def test_what_a_training_holds_is_known() -> None:
    def enclosing(epochs: int) -> Callable[[DenoisedSet, int], Any]:
        def fit(count: int) -> None: ...

        return lambda dataset, seed: fit(epochs)

    def by_default(epochs: int) -> Callable[[DenoisedSet, int], Any]:
        def train(dataset: DenoisedSet, seed: int, *, epochs: int = epochs) -> None: ...

        return train

    for make in (Trains, enclosing, by_default):
        assert training_settings(make(1)) == training_settings(make(1))
        assert training_settings(make(1)) != training_settings(make(2))
        canonical_json(training_settings(make(1)))


def test_votes_of_what_does_not_noise_first_are_empirical() -> None:
    given = (TRAIN, TEST, Grayscale(), nearest, 2)
    with pytest.raises(InputError, match=r"Got Grayscale.*Or say empirical=True"):
        ndt_classify(*given)
    assert ndt_classify(*given, empirical=True).shape == (2, len(TEST))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("train", r"package\.module:function. Got 'train'"),
        (":train", r"package\.module:function. Got ':train'"),
        ("votes_of_mine:", r"package\.module:function"),
        (".votes_of_mine:train", r"package\.module:function"),
        ("./votes_of_mine.py:train", r"package\.module:function"),
        ("votes_of_mine.py:train", "'train' of a module 'votes_of_mine.py'"),
        ("votes_of_yours:train", "'train' of a module 'votes_of_yours'"),
        ("votes_of_mine:test", "'test' of a module 'votes_of_mine'"),
        ("votes_of_mine:number", "to be a function .* Got int"),
    ],
)
def test_functions_that_are_not_there(module: Path, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        named_training(spec)


def test_settings_of_a_voting_say_nothing_of_paths_or_secrets(tmp_path: Path) -> None:
    text = canonical_json(voting_settings(voting()))
    assert str(Path(__file__).parent) not in text
    votes = vote_folder(tmp_path, voting_settings(voting()))
    assert str(votes.seed) not in text + (tmp_path / "settings.json").read_text()


def test_a_purifier_that_resizes_is_refused() -> None:
    with pytest.raises(InputError, match=r"test images of 8 x 8. Got one that makes 4 x 4"):
        voting(purifier=Chain(plain(), Resize(4)))
