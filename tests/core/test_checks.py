"""Checkers of single values: what they let through, and errors that name the value and the values allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from purifyloader import purifiers, recipes
from purifyloader.commands.training import _processes
from purifyloader.core.checks import (
    as_integer,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_seed,
    launcher_number,
)
from purifyloader.diffusion.unet import UNetConfig
from purifyloader.errors import ConfigError, InputError, PurifyError
from purifyloader.files.atomic import canonical_json
from purifyloader.purified.filling import place
from tests.conftest import slim_denoiser, tiny_energy

NOT_NUMBERS = [True, "1", None, [1], math.nan, math.inf, -math.inf, np.float32(1), torch.tensor(1.0)]
NOT_INTEGERS = [True, "1", None, 1.0, np.int64(1), torch.tensor(1)]


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=str)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ConfigError, match=r"^rate must be a finite number\. Got "):
        check_number("rate", value)


@pytest.mark.parametrize(
    ("limits", "good", "bad", "allowed"),
    [
        ({}, (-1e300, 10**400), (), ""),
        ({"low": 0}, (0, 0.0, 7), (-1e-9,), " of 0 or more"),
        ({"above": 0}, (1e-9,), (0, -1), " above 0"),
        ({"low": 0, "high": 1}, (0, 1, 0.5), (-0.1, 1.1), " from 0 to 1"),
        ({"low": 0, "below": 1}, (0, 0.999), (1, -1), " of 0 or more and below 1"),
        ({"above": 0, "high": 1}, (1, 0.1), (0, 1.1), " above 0 and of 1 or less"),
    ],
    ids=str,
)
def test_numbers_within_their_limits(limits, good, bad, allowed):
    for value in good:
        check_number("rate", value, **limits)
    for value in bad:
        with pytest.raises(InputError) as caught:
            check_number("rate", value, **limits, unit="in px", error=InputError)
        assert str(caught.value) == f"rate must be a finite number{allowed}, in px. Got {value!r}."


@pytest.mark.parametrize("value", [*NOT_INTEGERS, 0, -1], ids=str)
def test_what_is_no_integer_in_the_range_is_refused(value):
    with pytest.raises(ConfigError, match=r"^compute_batch must be a positive integer\. Got "):
        check_integer("compute_batch", value, 1)


def test_integers_within_their_limits():
    check_integer("steps", 10**30, 1)
    check_integer("steps", None, 1, none=True)
    for low, high, none, allowed in (
        (2, 5, False, "an integer from 2 to 5, in px"),
        (0, None, True, "an integer of 0 or more or None, in px"),
    ):
        for value in (-1, 6 if high else -2):
            with pytest.raises(InputError, match=rf"^side must be {allowed}\. Got {value}"):
                check_integer("side", value, low, high, none=none, unit="in px", error=InputError)


def test_a_choice_is_of_the_type_of_what_is_allowed():
    check_choice("decay", "cosine", ("linear", "cosine"))
    for value in ("none", None, ["linear"], 1):
        with pytest.raises(ConfigError, match=r"decay must be one of 'linear', 'cosine'\. Got "):
            check_choice("decay", value, ("linear", "cosine"))
    check_flag("flip", False)
    for value in (0, 1, 1.0, None, "yes"):
        with pytest.raises(ConfigError, match=r"flip must be True or False\. Got "):
            check_flag("flip", value)
        with pytest.raises(ConfigError, match=r"flip must be one of False, True\. Got "):
            check_choice("flip", value, (False, True))


def test_seeds_have_64_bits():
    for seed in (0, -(2**63), 2**63 - 1):
        check_seed(seed)
    for bad in (2**63, -(2**63) - 1, 0.5, True, None):
        with pytest.raises(ConfigError, match="seed must be an integer of 64 bits"):
            check_seed(bad)


def test_integers_of_other_libraries_become_pythons():
    for value in (3, np.int16(3), torch.tensor(3)):
        assert type(as_integer("draws", value, 1)) is int
        assert as_integer("draws", value, 1) == 3
    for bad in (0, 2**63, 1.0, "3", None):
        with pytest.raises(InputError, match="draws must be an integer"):
            as_integer("draws", bad, 1)


# -- numbers of numpy's ------------------------------------------------------------------------------


SWEEPS: dict[str, Callable[[Callable[[float], Any]], Any]] = {
    "jpeg": lambda n: recipes.jpeg(n(20)),
    "bit depth": lambda n: recipes.bit_depth(bits=n(2)),
    "denoise once": lambda n: recipes.denoise_once(slim_denoiser(), n(0.25)),
    "eclipse": lambda n: recipes.eclipse(slim_denoiser(), sigma=n(0.125), steps=n(2)),
    "energy": lambda n: recipes.puregen_ebm(energy=tiny_energy(), steps=n(2)),
    "coin": lambda n: purifiers.Coin(n(2)),
    "compensation": lambda n: purifiers.Compensation(p=n(0.5)),
    "repeat": lambda n: purifiers.Repeat(purifiers.Jpeg(n(50)), n(3)),
    "resize": lambda n: purifiers.Resize(n(16), crop=n(8)),
    "above": lambda n: purifiers.EnergyAbove(tiny_energy(), k=n(0.5)),
}


def as_python(value: float) -> float:
    return value


def as_numpy(value: float) -> Any:
    return np.int64(value) if isinstance(value, int) else np.float32(value)


def as_array(value: float) -> Any:
    return np.array(value)


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("kind", [as_numpy, as_array])
def test_numbers_of_a_sweep_are_numbers(name: str, kind: Callable[[float], Any]) -> None:
    swept, plain = SWEEPS[name](kind), SWEEPS[name](as_python)
    assert canonical_json(swept.config()) == canonical_json(plain.config())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: UNetConfig(channels=np.int64(32)), r"np.int64\(32\), a number of numpy's: give int\(...\) of it"),
        (lambda: check_number("sigma", np.float32(0.5)), r"give float\(...\) of it"),
        (lambda: check_flag("compile", np.bool_(True)), r"give bool\(...\) of it"),
        (lambda: check_seed(np.int32(3)), r"give int\(...\) of it"),
        (lambda: recipes.jpeg(np.arange(3)), "Got array"),
    ],
)
def test_where_they_are_refused_it_is_said_why(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(PurifyError, match=words):
        call()


# -- numbers of a launcher ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "abc", "-1", "1.0", " 1", "²", "0"])
def test_what_a_launcher_sets_is_a_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(InputError, match=rf"WORLD_SIZE is a whole number, at least 1. Got '{text}'"):
        launcher_number("WORLD_SIZE", 1, 1)
    with pytest.raises(InputError, match="WORLD_SIZE"):
        place(None, None)
    with pytest.raises(InputError, match="WORLD_SIZE"), _processes("cpu"):
        pass


def test_what_it_does_not_set_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert launcher_number("RANK", 3) == 3
    monkeypatch.setenv("RANK", "0")
    assert launcher_number("RANK", 3) == 0
