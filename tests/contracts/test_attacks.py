"""What every attack of the table keeps to: a new attack adds a row of tiny options."""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from purifyloader.errors import ConfigError, InputError
from purifyloader.poisons import ATTACKS, Poisoned, check, make, read, write
from purifyloader.poisons.attacks import registry
from tests.conftest import tiny_denoiser

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)
LABELS = np.arange(24) % 3
TARGET = RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)
TRIGGER = (RNG.choice([-1, 1], (8, 8, 3)) * 8 / 255).astype(np.float32)

_NET: dict[str, Any] = {"width": 4, "batch_size": 16}
_ONE: dict[str, Any] = {**_NET, "steps": 3, "epochs": 1}
_AIMED: dict[str, Any] = {**_ONE, "target": TARGET, "target_class": 1}

TINY: dict[str, dict[str, Any]] = {
    "urp": {},
    "lsp": {},
    "ar": {},
    "ops": {},
    "cuda": {},
    "narcissus": {"trigger": TRIGGER, "target_class": 1, "count": 3},
    "em": {**_NET, "steps": 2, "rounds": 2, "train_steps": 2},
    "tap": {**_ONE, "shift": 1},
    "sep": {**_NET, "steps": 3, "epochs": 2, "shift": 1, "checkpoints": 2},
    "rem": {**_NET, "steps": 2, "train_steps": 2, "views": 1},
    "efp": {**_NET, "steps": 2, "epochs": 1},
    "adp": {**_NET, "steps": 1, "rounds": 1, "train_steps": 1},
    "adaptive": {**_NET, "steps": 1, "epochs": 1, "shift": 1, "model": tiny_denoiser()},
    "label-consistent": {**_ONE, "target_class": 1, "attack_steps": 1},
    "gradient-matching": {**_AIMED, "count": 3},
    "poison-frogs": {**_AIMED, "count": 2},
    "bullseye": {**_AIMED, "count": 2},
}

# Of the images that attacks without a network give: integers and exact arithmetic, the same on every machine.
GOLDEN = {
    "urp": "3f6324220f31d0f4",
    "lsp": "84a79fd47409d475",
    "ar": "ec67215ac1bb5072",
    "ops": "1ace33f4689e419f",
    "cuda": "dc2339be13ee0e4f",
    "narcissus": "c4844d44baaf3edb",
}

each = pytest.mark.parametrize("name", ATTACKS)


@pytest.fixture(scope="module")
def made() -> Any:
    """The poisoned set of each attack, made once."""
    kept: dict[str, Poisoned] = {}

    def get(name: str) -> Poisoned:
        if name not in kept:
            kept[name] = make(name, (IMAGES, LABELS), 3, **TINY[name])
        return kept[name]

    return get


def test_every_attack_has_a_row():
    assert list(TINY) == list(ATTACKS)


@each
def test_the_same_seed_gives_the_same_images(name, made):
    again = make(name, (IMAGES.copy(), LABELS.tolist()), 3, **TINY[name])
    np.testing.assert_array_equal(again.images, made(name).images)
    assert dict(again.settings) == dict(made(name).settings)
    if name in GOLDEN:
        assert hashlib.sha256(again.images.tobytes()).hexdigest()[:16] == GOLDEN[name]


@each
def test_labels_stay_and_images_move_within_the_bound(name, made):
    poisoned = made(name)
    assert poisoned.attack == name
    np.testing.assert_array_equal(poisoned.labels, LABELS)
    moved = poisoned.moved(IMAGES)
    if poisoned.bound is not None:  # without one, noise that is moved far looks like other images
        assert check(poisoned, (IMAGES, LABELS), signed=False) == moved
    assert 0 < moved.images <= len(poisoned.poisoned)
    changed = np.flatnonzero((poisoned.images != IMAGES).any(axis=(1, 2, 3)))
    assert set(changed) <= set(poisoned.poisoned)


@each
def test_what_an_attack_aims_at_is_kept(name, made):
    poisoned, kind = made(name), ATTACKS[name].kind
    assert (poisoned.target is not None) == (kind == "targeted")
    assert (poisoned.trigger is not None) == (kind == "backdoor")
    if kind != "availability":
        assert set(LABELS[poisoned.poisoned]) == {1}


@each
def test_settings_are_json_and_a_file_keeps_all_of_it(name, made, tmp_path):
    poisoned = made(name)
    json.dumps(dict(poisoned.settings), allow_nan=False)
    assert poisoned.settings["seed"] == 3
    write(poisoned, tmp_path / "p.npz")
    again = read(tmp_path / "p.npz")
    np.testing.assert_array_equal(again.images, poisoned.images)
    assert (again.attack, again.bound, again.target_class) == (name, poisoned.bound, poisoned.target_class)
    assert poisoned.settings.items() <= again.settings.items()


@each
def test_options_are_told_and_checked(name):
    attack = registry.find(name)
    assert (attack.name, attack.kind in ("availability", "backdoor", "targeted")) == (name, True)
    parameters = list(inspect.signature(attack.function).parameters.values())
    assert [p.name for p in parameters[:2]] == ["dataset", "seed"]
    assert parameters[1].default == 0
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[2:])
    assert TINY[name].keys() <= attack.options.keys()
    registry.check_options(attack, TINY[name])
    with pytest.raises(ConfigError, match=rf"The attack {name} takes .*Got 'colour'"):
        make(name, (IMAGES, LABELS), colour=1)
    assert registry.resolved(attack, TINY[name]).items() >= TINY[name].items()
    assert pickle.loads(pickle.dumps(attack)).function is attack.function
    assert (inspect.getdoc(attack.function) or "").count("Args:") == 1


@pytest.mark.parametrize("name", [name for name, options in TINY.items() if "width" in options])
def test_attacks_with_networks_check_their_settings_before_any_work(name):
    assert set(ATTACKS[name].presets or {}) == {"cpu", "full"}
    for bad, message in (
        ({"preset": "fast"}, "preset must be one of cpu, full"),
        ({"steps": 0}, "steps must be an integer of 1 or more"),
        ({"norm": "l1"}, "norm must be one of linf, l2"),
        ({"epsilon": 8}, "divide levels by 255"),
        ({"network": "vgg"}, "network must be one of"),
    ):
        with pytest.raises(InputError, match=message):
            registry.check_options(ATTACKS[name], {**TINY[name], **bad})


def test_the_table_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from purifyloader.poisons import ATTACKS\n"
        "print(*(f'{a.name} {a.kind} {a.description} {a.paper}' for a in ATTACKS.values()), sep=chr(10))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == len(ATTACKS)
