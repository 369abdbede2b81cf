"""Configure the training of an energy model: one configuration decides the weights, and recipes are presets over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from purifyloader.core.checks import check_choice, check_flag, check_integer, check_number
from purifyloader.energy.network import EnergyConfig, EnergyNetwork
from purifyloader.energy.walking import STEP_SIZE, TEMPERATURE, check_dynamics
from purifyloader.errors import ConfigError
from purifyloader.train.fields import TrainingFields

__all__ = ["ENERGY_RECIPES", "EnergyTrainConfig", "energy_recipe"]

_BANK, _DECAYS = 2**31, 10_000


@dataclass(frozen=True)
class EnergyTrainConfig(TrainingFields):
    """An `EnergyTrainConfig` holds everything that decides the weights, beside the images (PureGen, Algorithm 2).

    Args:
        start_from: None for random weights, or `{"name": ..., "weights_sha256": ...}` of an energy model.
        batch_size: images a step, and as many samples, over all processes.
        langevin_steps: K, of each sample in each step.
        step_size: noise a Langevin step adds, in image units (half of the paper's eps, which is for [-1, 1]).
        temperature: T; the loss is of energies divided by it.
        data_noise: standard deviation of the noise on the images that the samples are compared with, image units.
        bank: where the persistent samples begin: "noise" (uniform) or "data" (images plus `data_noise`).
        bank_size: samples in the bank; None for one an image.
        rejuvenation: probability that a sample begins anew, as the bank began, before it walks on.
        paired: compare each sample with the image that it began at, in a bank of "data". Both are still drawn
            uniformly: the gradient has the same mean and far less variance, for most of an energy is the image's own.
        optimizer: "adam" or "sgd".
        learning_rate: divided by ten at each of the steps `decay_at`; reached linearly over `warmup` steps.
        clip_norm: gradients with a larger norm are scaled down to it; None leaves them.
        ema_decay: of the averaged weights, which are the result; (1 + step) / (10 + step) while that is smaller. 0
            for no average.
        flip: train on the mirror image of each image too.
        dtype: of the network's arithmetic, "float32" or "bfloat16"; weights and samples stay float32.
        compile: compile the network that the samples walk with.

    >>> from purifyloader.energy import EnergyConfig
    >>> from purifyloader.train.energy import EnergyTrainConfig
    >>> EnergyTrainConfig(network=EnergyConfig(channels=48), langevin_steps=20).bank
    'data'
    """

    network_type: ClassVar[type[EnergyConfig]] = EnergyConfig
    network_class: ClassVar[type[EnergyNetwork]] = EnergyNetwork
    length_fields: ClassVar[tuple[str, ...]] = ("steps", "decay_at")

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
        self.check_shared_fields()
        check_dynamics(self.langevin_steps, self.step_size, self.temperature)
        check_choice("bank", self.bank, ("noise", "data"))
        check_choice("optimizer", self.optimizer, ("adam", "sgd"))
        check_flag("paired", self.paired)
        check_flag("flip", self.flip)
        check_integer("bank_size", self.bank_size, self.batch_size, _BANK, none=True, unit="at least batch_size")
        if (
            not isinstance(self.decay_at, tuple)
            or len(self.decay_at) > _DECAYS
            or any(type(step) is not int or step < 1 for step in self.decay_at)
        ):
            raise ConfigError(
                f"decay_at must be a tuple of steps from 1, at most {_DECAYS:,}. Got {self.decay_at!r:.200}."
            )
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, above=0)
        check_number("data_noise", self.data_noise, low=0, high=1, unit="a standard deviation in image units")
        check_number("rejuvenation", self.rejuvenation, low=0, high=1)
        if self.paired and self.bank != "data":
            raise ConfigError("paired compares samples with the images they began at. Got bank='noise': use 'data'.")

    @property
    def copies(self) -> int:
        return 6 if self.optimizer == "adam" else 4  # and the network that the samples walk with

    def more_state_bytes(self, images: Tensor) -> int:
        samples = self.bank_size or len(images) * (1 + self.flip)
        return 4 * samples * images[0].numel()

    @property
    def margin(self) -> float:
        """How far outside of [0, 1] a pixel must be to have left it, in image units.

        Four standard deviations of the noise of an image and of one update's walk: a pixel at 0 is below it in half
        of all draws. The noise of earlier updates is the energy's to hold back, and four leave it the time to learn to.
        """
        return 4 * math.sqrt(self.data_noise**2 + self.langevin_steps * self.step_size**2)


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
    """For a CPU core and an hour or two: a narrow network, short chains, each compared with its own image."""
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
"""Name -> configuration: PureGen's paper, PureGen's published code, and one for a CPU."""


def energy_recipe(name: str, image_channels: int = 3) -> EnergyTrainConfig:
    """Return the configuration of `ENERGY_RECIPES` for images of so many channels.

    >>> from purifyloader.train.energy import energy_recipe
    >>> energy_recipe("published").langevin_steps
    100
    """
    if name not in ENERGY_RECIPES:
        raise ConfigError(f"A preset must be one of {', '.join(sorted(ENERGY_RECIPES))}. Got {name!r}.")
    return EnergyTrainConfig.from_dict({"network": {"image_channels": image_channels}}, ENERGY_RECIPES[name]())
