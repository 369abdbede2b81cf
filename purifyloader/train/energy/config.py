"""One configuration that decides the weights of an energy model, and the recipes: presets over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from purifyloader.energy.network import EnergyConfig
from purifyloader.energy.walking import STEP_SIZE, TEMPERATURE, check_dynamics
from purifyloader.errors import ConfigError
from purifyloader.train.denoiser.config import check_start_from

__all__ = ["ENERGY_RECIPES", "EnergyTrainConfig", "energy_recipe"]


@dataclass(frozen=True)
class EnergyTrainConfig:
    """Everything that decides the weights, beside the images (PureGen, Algorithm 2).

    Args:
        network: shape of the energy network.
        start_from: None for random weights, or `{"name": ..., "weights_sha256": ...}` of the energy model that
            training starts from.
        steps: updates of the weights.
        batch_size: images a step, and as many samples, over all processes.
        langevin_steps: K, of each sample in each step.
        step_size: noise a Langevin step adds, in image units (half of the paper's eps, which is for [-1, 1]).
        temperature: T; the loss is of energies divided by it.
        data_noise: standard deviation of the noise on the images that the samples are compared with, image units.
        bank: where the persistent samples begin: "noise" (uniform) or "data" (images plus `data_noise`).
        bank_size: samples in the bank; None for one an image.
        rejuvenation: probability that a sample begins anew, as the bank began, before it walks on.
        paired: compare each sample with the image that it began at. Both are still drawn uniformly, so that the
            gradient has the same mean; its variance is far smaller, because most of an energy is the image's own.
            Only with a bank of "data".
        optimizer: "adam" or "sgd".
        learning_rate: divided by ten at each of the steps `decay_at`; reached linearly over `warmup` steps.
        clip_norm: gradients with a larger norm are scaled down to it; None leaves them.
        ema_decay: of the averaged weights, which are the result; (1 + step) / (10 + step) while that is smaller. 0
            for no average.
        flip: train on the mirror image of each image too.
        dtype: of the network's arithmetic, "float32" or "bfloat16"; weights and samples stay float32.
        compile: compile the network that the samples walk with.
        seed: of the initial weights and of all that is drawn.

    >>> from purifyloader.train.energy import EnergyTrainConfig
    >>> EnergyTrainConfig(steps=100).langevin_steps
    100
    """

    network: EnergyConfig = field(default_factory=EnergyConfig)
    start_from: Mapping[str, str | None] | None = None
    steps: int = 150_000
    batch_size: int = 128
    langevin_steps: int = 100
    step_size: float = STEP_SIZE
    temperature: float = TEMPERATURE
    data_noise: float = 0.0075
    bank: str = "data"
    bank_size: int | None = None
    rejuvenation: float = 0.05
    paired: bool = False
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    warmup: int = 0
    decay_at: tuple[int, ...] = ()
    clip_norm: float | None = None
    ema_decay: float = 0.0
    flip: bool = False
    dtype: str = "float32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.network, EnergyConfig):
            raise ConfigError(f"network must be an EnergyConfig, or its fields. Got {self.network!r}.")
        check_start_from(self.start_from)
        check_dynamics(self.langevin_steps, self.step_size, self.temperature)
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed must be an integer of 64 bits. Got {self.seed!r}.")
        choices: dict[str, tuple[Any, ...]] = {
            "bank": ("noise", "data"),
            "optimizer": ("adam", "sgd"),
            "dtype": ("float32", "bfloat16"),
            "paired": (False, True),
            "flip": (False, True),
            "compile": (False, True),
        }
        for name, allowed in choices.items():
            # 1 is equal to True, and would be written down as a number
            if not isinstance(getattr(self, name), type(allowed[0])) or getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} must be one of {', '.join(map(repr, allowed))}. Got {getattr(self, name)!r}."
                )
        for name, low in {"steps": 1, "batch_size": 1, "warmup": 0}.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < low:
                raise ConfigError(f"{name} must be an integer of at least {low}. Got {getattr(self, name)!r}.")
        if self.bank_size is not None and (type(self.bank_size) is not int or self.bank_size < self.batch_size):
            raise ConfigError(
                f"bank_size must be an integer of at least batch_size, {self.batch_size}, or None for one an image. "
                f"Got {self.bank_size!r}."
            )
        if not isinstance(self.decay_at, tuple) or any(type(step) is not int or step < 1 for step in self.decay_at):
            raise ConfigError(f"decay_at must be a tuple of steps from 1. Got {self.decay_at!r}.")
        self._check("learning_rate", lambda value: 0 < value < math.inf, "a number above 0")
        if self.clip_norm is not None:
            self._check("clip_norm", lambda value: 0 < value < math.inf, "a number above 0, or None")
        self._check("data_noise", lambda value: 0 <= value <= 1, "a standard deviation in [0, 1], in image units")
        self._check("rejuvenation", lambda value: 0 <= value <= 1, "a probability in [0, 1]")
        self._check("ema_decay", lambda value: 0 <= value < 1, "a number in [0, 1)")
        if self.paired and self.bank != "data":
            raise ConfigError("paired compares samples with the images they began at. Got bank='noise': use 'data'.")

    def _check(self, name: str, good: Callable[[float], bool], range_: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
            raise ConfigError(f"{name} must be {range_}. Got {value!r}.")

    @property
    def margin(self) -> float:
        """How far outside of [0, 1] a pixel must be to have left it, in image units.

        Four standard deviations of the noise of an image and of one update's walk: a pixel at 0 is below it in half
        of all draws. The noise of earlier updates is the energy's to hold back, and four leave it the time to learn to.
        """
        return 4 * math.sqrt(self.data_noise**2 + self.langevin_steps * self.step_size**2)

    def to_dict(self) -> dict[str, Any]:
        values = {**asdict(self), "network": self.network.to_dict()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: EnergyTrainConfig | None = None) -> EnergyTrainConfig:
        """A configuration from what `to_dict` gave, or from some of it over `base`.

        Raises:
            ConfigError: an unknown field, or a value that its field does not take.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(
                f"Known fields of an EnergyTrainConfig: {', '.join(sorted(known))}. Got {', '.join(unknown)}."
            )
        start = (base or cls()).to_dict()
        merged = {**start, **values}
        network = merged.pop("network")
        if isinstance(network, Mapping):
            network = EnergyConfig.from_dict({**start["network"], **network})
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()}
        try:
            return cls(network=network, **arguments)
        except TypeError as error:
            raise ConfigError(f"A field of the training configuration has a value of another kind ({error}).") from None


def _paper() -> EnergyTrainConfig:
    """Algorithm 2: samples begin as uniform noise and never anew, plain gradient descent.

    Its step of 0.01 is read as eps on [-1, 1]: read as the time of Eq. 4 it would be 18 px of noise a step.
    """
    return EnergyTrainConfig(
        step_size=0.005, data_noise=0.01, bank="noise", rejuvenation=0.0, optimizer="sgd", learning_rate=5e-5
    )


def _published() -> EnergyTrainConfig:
    """The published code: samples begin at images plus noise, Adam, the rate let down in three steps.

    46,875 steps are its 120 epochs of 50,000 images; on a sparse set they are more epochs.
    """
    steps = 46_875
    return EnergyTrainConfig(steps=steps, decay_at=tuple(steps * epoch // 120 for epoch in (40, 75, 100)))


def _light() -> EnergyTrainConfig:
    """What a CPU core manages in an hour or two: a narrow network, short chains, each compared with its own image."""
    return EnergyTrainConfig(
        network=EnergyConfig(channels=48),
        steps=5_000,
        batch_size=32,
        langevin_steps=20,
        paired=True,
        learning_rate=1e-3,
        warmup=50,
        decay_at=(3_000, 4_250),
        ema_decay=0.99,
        flip=True,
        dtype="bfloat16",
    )


ENERGY_RECIPES: dict[str, Callable[[], EnergyTrainConfig]] = {
    "light": _light,
    "paper": _paper,
    "published": _published,
}
"""Name -> configuration: PureGen's paper, PureGen's published code, and what a CPU manages."""


def energy_recipe(name: str, image_channels: int = 3) -> EnergyTrainConfig:
    """The configuration of a recipe.

    Args:
        name: a key of `ENERGY_RECIPES`.
        image_channels: of the images.

    Raises:
        ConfigError: no such recipe.

    >>> from purifyloader.train.energy import energy_recipe
    >>> energy_recipe("light").bank
    'data'
    """
    if name not in ENERGY_RECIPES:
        raise ConfigError(f"A recipe must be one of {', '.join(sorted(ENERGY_RECIPES))}. Got {name!r}.")
    return EnergyTrainConfig.from_dict({"network": {"image_channels": image_channels}}, ENERGY_RECIPES[name]())
