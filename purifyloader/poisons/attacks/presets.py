"""Settings of attacks with networks: a named preset, and options in place of some of its values."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from purifyloader.core.checks import check_choice, check_flag, check_integer, check_number
from purifyloader.errors import InputError
from purifyloader.poisons.poisoned import Bound
from purifyloader.victims.presets import VICTIMS

__all__ = ["AdversarialSettings", "AttackSettings", "TrainedSettings", "choose", "field_names", "integer", "number"]

Settings = TypeVar("Settings", bound="AttackSettings")


def number(low: float, high: float | None = None, default: Any = MISSING) -> Any:
    """Declare a setting that is a finite number from `low` to `high`."""
    return field(default=default, metadata={"low": low, "high": high})


def integer(low: int, default: Any = MISSING) -> Any:
    """Declare a setting that is an integer of `low` or more; one without this is of 1 or more."""
    return field(default=default, metadata={"low": low})


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """Settings that all attacks with a surrogate have, each checked by its type.

    Attributes:
        norm: "linf" or "l2".
        epsilon: largest perturbation in that norm, in units of [0, 1] images; None is 8/255, and 1 for l2.
        steps: of projected gradient descent.
        step: length of each, as a share of epsilon.
        network: the surrogate, one of `victims.presets.VICTIMS`.
        width: of a resnet9.
        batch_size: images a step of training, and of descent.
        lr: learning rate of the surrogate; momentum, weight_decay: of its SGD.
        pad: pixels of black border for random crops in training, 0 for none; flip: mirror half of the images.
        bfloat16: autocast the network's arithmetic, twice as fast where the processor has it.
    """

    EPSILON: ClassVar[Mapping[str, float]] = {"linf": 8 / 255, "l2": 1.0}
    """Largest perturbation in each norm, where epsilon is None."""

    norm: Literal["linf", "l2"] = "linf"
    epsilon: float | None = number(1 / 255, default=None)
    steps: int
    step: float = number(1e-6, 100)
    network: str = "resnet9"
    width: int = 16
    batch_size: int = integer(2, default=128)  # batch normalisation needs two images
    lr: float = number(1e-12, default=0.1)
    momentum: float = number(0, 1, default=0.9)
    weight_decay: float = number(0, default=5e-4)
    pad: int = integer(0, default=4)
    flip: bool = True
    bfloat16: bool = True

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for each in fields(self):
            name, value, kind = each.name, getattr(self, each.name), kinds[each.name]
            if kind is bool:
                check_flag(name, value, error=InputError)
            elif kind is int:
                check_integer(name, value, each.metadata.get("low", 1), error=InputError)
            elif kind is float:
                check_number(name, value, **each.metadata, error=InputError)
            elif kind is str or get_origin(kind) is Literal:
                check_choice(name, value, tuple(VICTIMS) if kind is str else get_args(kind), error=InputError)
            elif value is not None:
                self._check_radius(name, value, each.metadata["low"])

    def _check_radius(self, name: str, value: Any, least: float) -> None:
        most = 1 if self.norm == "linf" else math.inf
        if type(value) not in (int, float) or not least * (1 - 1e-6) <= value <= most or math.isinf(value):
            raise InputError(
                f"{name} must be {least:.4g} to {most} in units of [0, 1] images, or None. Got {value!r}: divide "
                "levels by 255."
            )

    @property
    def bound(self) -> Bound:
        return Bound(self.norm, self.EPSILON[self.norm] if self.epsilon is None else self.epsilon)

    @property
    def step_size(self) -> float:
        """In units of [0, 1] images."""
        return self.step * self.bound.epsilon

    def record(self, seed: int, preset: str) -> dict[str, Any]:
        """JSON values that say all an attack was made with."""
        return {"seed": operator.index(seed), "preset": preset, **asdict(self), "epsilon": self.bound.epsilon}


@dataclass(frozen=True, kw_only=True)
class TrainedSettings(AttackSettings):
    """Settings of attacks whose surrogate is trained first, and then descended on.

    Attributes:
        epochs: of training, with a learning rate that rises linearly to `lr` over a fifth of it, and falls to 0.
        augment: descend through a random crop and flip, drawn again for each step (Fowl et al. 2021).
    """

    epochs: int
    augment: bool = False


@dataclass(frozen=True, kw_only=True)
class AdversarialSettings(AttackSettings):
    """Settings of attacks whose surrogate is trained adversarially, on images that are perturbed at worst.

    Attributes:
        attack_epsilon: largest of those perturbations, in the same norm; None is half of epsilon.
        attack_steps: of projected gradient ascent on them.
        attack_step: length of each, as a share of attack_epsilon.
    """

    attack_epsilon: float | None = number(1e-6, default=None)
    attack_steps: int
    attack_step: float = number(1e-6, 100)

    @property
    def attack_bound(self) -> Bound:
        return Bound(self.norm, self.bound.epsilon / 2 if self.attack_epsilon is None else self.attack_epsilon)

    def record(self, seed: int, preset: str) -> dict[str, Any]:
        return {**super().record(seed, preset), "attack_epsilon": self.attack_bound.epsilon}


def field_names(presets: Mapping[str, AttackSettings]) -> list[str]:
    """Return the options that all of these presets are made of."""
    return [each.name for each in fields(next(iter(presets.values())))]


def choose(presets: Mapping[str, Settings], preset: str, options: Mapping[str, Any]) -> Settings:
    """Return a preset with some of its values replaced.

    Raises:
        InputError: no such preset or option, or a value that is none of that option's.
    """
    if not isinstance(preset, str) or preset not in presets:
        raise InputError(f"preset must be one of {', '.join(presets)}. Got {preset!r}.")
    known = field_names(presets)
    if unknown := [name for name in options if name not in known]:
        raise InputError(f"The options of this attack are {', '.join(known)}. Got {unknown[0]!r}.")
    return replace(presets[preset], **options)
