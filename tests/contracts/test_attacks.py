"""What every attack of the table keeps to: a new attack adds a row of tiny options."""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from purifyloader.errors import ConfigError, InputError
from purifyloader.poisons import ATTACKS, Bound, Poisoned, check, make, read, write
from purifyloader.poisons.attacks import registry
from purifyloader.poisons.attacks.presets import choose, field_names
from tests.conftest import tiny_denoiser

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)
LABELS = np.arange(24) % 3
TARGET = RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)
TRIGGER = (RNG.choice([-1, 1], (8, 8, 3)) * 8 / 255).astype(np.float32)

_NET: dict[str, Any] = {"width": 4, "batch_size": 16, "bfloat16": False}
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
    "tap": {**_ONE, "shift": 1, "bfloat16": True},
    "sep": {**_NET, "steps": 3, "epochs": 2, "shift": 1, "checkpoints": 2},
    "rem": {**_NET, "steps": 2, "train_steps": 2, "views": 1},
    "efp": {**_NET, "steps": 2, "epochs": 1},
    "adp": {**_NET, "steps": 1, "rounds": 1, "train_steps": 1},
    "adaptive": {**_NET, "steps": 1, "epochs": 1, "shift": 1, "model": tiny_denoiser()},
    "label-consistent": {**_ONE, "target_class": 1, "attack_steps": 1},
    "sig": {"target_class": 1, "count": 3, "frequency": 2},
    "badnets": {"target_class": 1, "count": 3},
    "blended": {"target_class": 1, "count": 3},
    "wanet": {"target_class": 1, "count": 3},
    "ftrojan": {"target_class": 1, "count": 3},
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
    "sig": "ed62d685531897cb",
    "badnets": "bf91fadea16c752a",
    "blended": "ea4dcc287e99b0b1",
    "wanet": "3f918ed6065b1490",
    "ftrojan": "68fa0f79b731eb96",
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
def test_the_same_seed_gives_the_same_images_and_nobody_elses_generators_move(name, made):
    want = made(name)
    torch.manual_seed(6)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), torch.get_num_threads()
    again = make(name, (IMAGES.copy(), LABELS.tolist()), 3, **TINY[name])
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate(), torch.get_num_threads()
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2:] == after[2:]
    np.testing.assert_array_equal(again.images, want.images)
    assert dict(again.settings) == dict(want.settings)
    if name in GOLDEN:
        assert hashlib.sha256(again.images.tobytes()).hexdigest()[:16] == GOLDEN[name]


@each
def test_another_seed_gives_other_images(name, made):
    other = make(name, (IMAGES, LABELS), 4, **TINY[name])
    assert np.array_equal(other.images, made(name).images) == (name == "ops")  # whose search draws nothing


@each
def test_labels_stay_and_images_move_within_the_bound(name, made):
    poisoned = made(name)
    assert poisoned.attack == name
    np.testing.assert_array_equal(poisoned.shown_labels, LABELS)
    assert (poisoned.true_labels is None) == ATTACKS[name].keeps_labels
    relabelled = np.flatnonzero(poisoned.labels != LABELS)
    assert (len(relabelled) == 0) == ATTACKS[name].keeps_labels
    assert set(relabelled) <= set(poisoned.poisoned)
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
        changed = poisoned.poisoned if ATTACKS[name].keeps_labels else poisoned.labels != LABELS
        assert set(poisoned.labels[changed]) == {1}


@each
def test_settings_are_json_and_a_file_keeps_all_of_it(name, made, tmp_path):
    poisoned = made(name)
    json.dumps(dict(poisoned.settings), allow_nan=False)
    assert poisoned.settings["seed"] == 3
    write(poisoned, tmp_path / "p.npz")
    again = read(tmp_path / "p.npz")
    np.testing.assert_array_equal(again.images, poisoned.images)
    assert (again.attack, again.bound, again.target_class) == (name, poisoned.bound, poisoned.target_class)
    np.testing.assert_array_equal(again.labels, poisoned.labels)
    np.testing.assert_array_equal(again.shown_labels, LABELS)
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


with_network = pytest.mark.parametrize("name", [name for name, options in TINY.items() if "width" in options])


@with_network
def test_attacks_with_networks_check_their_settings_before_any_work(name):
    for bad, message in (
        ({"preset": "fast"}, "preset must be one of cpu, full"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"norm": "l1"}, "norm must be one of 'linf', 'l2'"),
        ({"epsilon": 8}, "divide levels by 255"),
        ({"network": "vgg"}, "network must be one of"),
    ):
        with pytest.raises(InputError, match=message):
            registry.check_options(ATTACKS[name], {**TINY[name], **bad})


@with_network
def test_settings_tell_every_option(name, made):
    attack, settings = ATTACKS[name], made(name).settings
    assert attack.options.keys() - {"device", "progress"} <= settings.keys()
    told = {option: settings[option] for option in TINY[name] if option not in ("target", "model")}
    assert told == {option: TINY[name][option] for option in told}
    assert settings["preset"] == "cpu"
    presets = attack.presets
    assert presets is not None
    assert set(presets) == {"cpu", "full"}
    defaults = {name: attack.options[name] for name in field_names(presets)}
    assert choose(presets, "cpu", defaults) == presets["cpu"]


@with_network
def test_a_bound_that_is_not_given_is_the_papers(name):
    presets = ATTACKS[name].presets
    assert presets is not None
    linf = {"bullseye": 0.1, "gradient-matching": 16 / 255, "label-consistent": 16 / 255}
    l2 = {"label-consistent": 600 / 255}
    for norm, epsilon in (("linf", linf.get(name, 8 / 255)), ("l2", l2.get(name, 1.0))):
        assert choose(presets, "cpu", {"norm": norm}).bound == Bound(norm, epsilon)
        assert choose(presets, "cpu", {"norm": norm, "epsilon": 0.5}).bound == Bound(norm, 0.5)


@with_network
def test_an_l2_bound_is_kept_and_black_and_white_saturate(name):
    images = IMAGES.copy()
    images[:, :4], images[:, 4:] = 0, 255
    options = {**TINY[name], **({"amplitude": 1 / 255} if name == "label-consistent" else {})}
    poisoned = make(name, (images, LABELS), 3, norm="l2", epsilon=0.5, **options)
    assert poisoned.settings["epsilon"] == 0.5
    delta = (poisoned.images.astype(int) - images)[poisoned.poisoned]
    trigger = 1.1 * len(delta[0].ravel()) ** 0.5 if name == "label-consistent" else 0
    assert 0 < poisoned.moved(images).l2_max <= 0.5 * 255 * (1 + 1e-6) + trigger
    assert delta[:, :4].min() == 0
    assert delta[:, 4:].max() == 0


def test_the_table_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from purifyloader.poisons import ATTACKS\n"
        "print(*(f'{a.name} {a.kind} {a.description} {a.paper}' for a in ATTACKS.values()), sep=chr(10))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == len(ATTACKS)
