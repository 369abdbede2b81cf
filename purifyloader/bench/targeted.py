"""Choose targets for targeted attacks: a test image that the victim is to be wrong on, another for each seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from purifyloader.core import noise
from purifyloader.datasets.splits import Data
from purifyloader.errors import ConfigError, InputError
from purifyloader.poisons import Attack, Target
from purifyloader.poisons.attacks import registry as attacks
from purifyloader.poisons.attacks.additive import purpose_keys

__all__ = ["check_options", "seed_of", "target_of"]

_TARGETED = 0x74617267  # "targ"
_IMAGE, _CLASS, _SEED = range(3)  # purposes of the keys drawn here


def check_options(attack: Attack, given: Mapping[str, Any]) -> None:
    """Check the options that a user gives an attack in a bench.

    `ConfigError` for one that the attack does not take, or that the bench itself gives, and where a needed one is
    missing.
    """
    is_targeted = attack.kind == "targeted"
    given_by_bench = ("target", "target_class", "networks") if is_targeted else ("networks",)
    if refused := [name for name in given if name in given_by_bench and name in attack.options]:
        raise ConfigError(
            f"A bench draws the target of {attack.name} for each seed, and knows the networks. Got {refused[0]!r}: "
            "leave it out."
        )
    attacks.check_options(attack, {**({"target": None} if is_targeted else {}), **given})


def target_of(data: Data, attack_seed: int, seed: int) -> Target:
    """Choose the target of a seed: a test image, another for each seed until all have been one, and a wrong class.

    `attack_seed` decides which image belongs to which seed. `InputError` where all training images are of its class.
    """
    # an order of all images and not a draw of one, so that no two seeds meet
    order = noise.uniform(_key(attack_seed, _IMAGE, 0), (len(data.test),))[0].argsort(stable=True)
    index = int(order[seed % len(order)])
    true = int(data.test_labels[index])
    others = np.setdiff1d(data.train_labels, [true])
    if not len(others):
        raise InputError(
            f"A targeted attack has a test image taken for another class. Got training images of class {true} alone, "
            "which is the target's: give data of two classes or more."
        )
    wanted = int(others[int(noise.uniform(_key(attack_seed, _CLASS, seed), (1,)) * len(others))])
    return Target(data.test[index], wanted, true, index)


def seed_of(attack_seed: int, seed: int) -> int:
    """Derive the seed of all else that the attack draws for a row's seed: one for each trial, never the victim's.

    With a seed in common, the attacker's network would start as the victim does and see the same crops.
    """
    return int(_key(attack_seed, _SEED, seed)) & 0x7FFFFFFF


def _key(attack_seed: int, purpose: int, seed: int) -> torch.Tensor:
    return purpose_keys(attack_seed, _TARGETED, purpose, torch.tensor([seed]))
