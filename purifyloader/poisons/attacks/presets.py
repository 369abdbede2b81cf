"""Settings of attacks with networks: a named preset, and options in place of some of its values."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from purifyloader.errors import InputError
from purifyloader.poisons.poisoned import Bound, Poisoned
from purifyloader.victims.presets import VICTIMS

__all__ = [
    "AdversarialSettings",
    "AttackSettings",
    "Settings",
    "TrainedSettings",
    "choose",
    "field_names",
    "with_signature",
]

Attack = TypeVar("Attack", bound=Callable[..., Poisoned])
Settings = TypeVar("Settings", bound="AttackSettings")


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """Settings that all attacks with a surrogate have.

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
    epsilon: float | None = None
    steps: int
    step: float
    network: str = "resnet9"
    width: int = 16
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    pad: int = 4
    flip: bool = True
    bfloat16: bool = True

    def __post_init__(self) -> None:
        self.among("norm", tuple(self.EPSILON))
        self.among("network", tuple(VICTIMS))
        self.integers(steps=1, width=1, batch_size=2, pad=0)  # batch normalisation needs two images
        self.numbers(step=(1e-6, 100), lr=(1e-12, math.inf), momentum=(0, 1), weight_decay=(0, math.inf))
        self.radius("epsilon", 1 / 255)
        self.booleans("flip", "bfloat16")

    @property
    def bound(self) -> Bound:
        return Bound(self.norm, self.EPSILON[self.norm] if self.epsilon is None else self.epsilon)

    @property
    def step_size(self) -> float:
        """In units of [0, 1] images."""
        return self.step * self.bound.epsilon

    def integers(self, **least: int) -> None:
        for name, low in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise InputError(f"{name} must be an integer of {low} or more. Got {value!r}.")

    def numbers(self, **ranges: tuple[float, float]) -> None:
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            fits = type(value) in (int, float) and math.isfinite(value) and low * (1 - 1e-6) <= value <= high
            if not fits:
                above = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of {low:g} or more"
                raise InputError(f"{name} must be a finite number {above}. Got {value!r}.")

    def radius(self, name: str, least: float) -> None:
        value, most = getattr(self, name), 1 if self.norm == "linf" else math.inf
        if value is None:
            return
        if type(value) not in (int, float) or not least * (1 - 1e-6) <= value <= most or math.isinf(value):
            raise InputError(
                f"{name} must be {least:.4g} to {most} in units of [0, 1] images, or None. Got {value!r}: divide "
                "levels by 255."
            )

    def booleans(self, *names: str) -> None:
        for name in names:
            if type(getattr(self, name)) is not bool:
                raise InputError(f"{name} must be True or False. Got {getattr(self, name)!r}.")

    def among(self, name: str, values: tuple[str, ...]) -> None:
        if getattr(self, name) not in values:
            raise InputError(f"{name} must be one of {', '.join(values)}. Got {getattr(self, name)!r}.")

    def record(self, seed: int, preset: str, **measured: Any) -> dict[str, Any]:
        """JSON values that say all an attack was made with, and what was measured of it."""
        return {
            "seed": operator.index(seed),
            "preset": preset,
            **asdict(self),
            "epsilon": self.bound.epsilon,
            **measured,
        }


@dataclass(frozen=True, kw_only=True)
class TrainedSettings(AttackSettings):
    """Settings of attacks whose surrogate is trained first, and then descended on.

    Attributes:
        epochs: of training, with a learning rate that rises linearly to `lr` over a fifth of it, and falls to 0.
        augment: descend through a random crop and flip, drawn again for each step (Fowl et al. 2021).
    """

    epochs: int
    augment: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.integers(epochs=1)
        self.booleans("augment")


@dataclass(frozen=True, kw_only=True)
class AdversarialSettings(AttackSettings):
    """Settings of attacks whose surrogate is trained adversarially, on images that are perturbed at worst.

    Attributes:
        attack_epsilon: largest of those perturbations, in the same norm; None is half of epsilon.
        attack_steps: of projected gradient ascent on them.
        attack_step: length of each, as a share of attack_epsilon.
    """

    attack_epsilon: float | None = None
    attack_steps: int
    attack_step: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.integers(attack_steps=1)
        self.numbers(attack_step=(1e-6, 100))
        self.radius("attack_epsilon", 1e-6)

    @property
    def attack_bound(self) -> Bound:
        return Bound(self.norm, self.bound.epsilon / 2 if self.attack_epsilon is None else self.attack_epsilon)

    def record(self, seed: int, preset: str, **measured: Any) -> dict[str, Any]:
        return super().record(seed, preset, attack_epsilon=self.attack_bound.epsilon, **measured)


def with_signature(presets: Mapping[str, AttackSettings]) -> Callable[[Attack], Attack]:
    """Put the options, as the first preset has them, in the place of **options in a signature. A decorator.

    For `help`, and for whoever offers the options of any attack by looking there.
    """

    def decorate(function: Attack) -> Attack:
        first = next(iter(presets.values()))
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        options = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=getattr(first, field.name), annotation=field.type
            )
            for field in fields(first)
        ]
        function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        function.presets = presets  # type: ignore[attr-defined]
        return function

    return decorate


def field_names(presets: Mapping[str, AttackSettings]) -> list[str]:
    """Return the options that all of these presets are made of."""
    return [field.name for field in fields(next(iter(presets.values())))]


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
