"""Configure the training of a denoiser: one configuration decides the weights, and recipes are presets over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from purifyloader.core import limits
from purifyloader.core.checks import check_choice, check_integer, check_number
from purifyloader.diffusion.denoiser import PARAMETERIZATIONS
from purifyloader.diffusion.networks import NetworkConfig, build_network, network_config, network_to_dict
from purifyloader.diffusion.plain import PlainUNetConfig
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule, Schedule
from purifyloader.diffusion.unet import UNetConfig
from purifyloader.errors import ConfigError
from purifyloader.train.denoiser.augment import AUGMENTATIONS
from purifyloader.train.fields import STEPS, TrainingFields, check_model_entry

__all__ = ["RECIPES", "TrainConfig", "recipe"]

_COPIES = 10_000

_SCHEDULES: dict[str, Callable[[int], Schedule]] = {"cosine": CosineSchedule, "linear": LinearSchedule}


@dataclass(frozen=True)
class TrainConfig(TrainingFields):
    """A `TrainConfig` holds everything that decides the weights of a denoiser, beside the images.

    Args:
        objective: "hybrid" (ECLIPSE, Eq. 8: timesteps of a schedule, the noise's error, and the variational terms where
            the network learns its variance) or "sigma" (continuous noise level over `sigma_range`, EDM weights).
        parameterization: the network predicts "epsilon" (noise), "v", "x0" or "edm".
        time: the network's time input: "timestep" (rescaled to 0..1000) or, for "sigma" the only one, "log-sigma".
        schedule, timesteps, max_timestep: of "hybrid": "cosine" or "linear", its T, and the last timestep to train on
            (PureGen: 250 of 1000).
        sigma_range, sigma_center, sigma_spread: "sigma" draws ln(sigma) from a normal distribution with this median and
            standard deviation, cut off at the range, in image units.
        gamma: weight of the variational sum of "hybrid".
        start_from: None for random weights, or `{"name": ..., "weights_sha256": ...}` of a denoiser.
        distil_from: None, or the same of a teacher, whose estimates are learned in the place of the clean images; only
            with "sigma".
        batch_size: images a step, over all processes.
        learning_rate: AdamW's, reached linearly over `warmup` steps and let down to zero over the last
            `decay_steps`, as `decay` says ("linear" or "cosine").
        ema_decay: of the averaged weights, which are the result; (1 + step) / (10 + step) while that is smaller. 0
            for no average.
        clip_norm: gradients with a larger norm are scaled down to it.
        replicate: M, further copies of each image in an epoch, at most 10,000 (ECLIPSE, Sec. 4). At a fixed number of
            steps it changes only which images meet in a batch.
        augment: any of "flip", "crop", "rotate", "mixup"; see `purifyloader.train.denoiser.augment`.
        patch_size: train on random squares of this side, in pixels; None trains on whole images.
        dtype: of the network's arithmetic, "float32" or "bfloat16"; weights stay float32.
        compile: compile the network (pays on a GPU after a few thousand steps; never on two CPU cores).

    >>> from purifyloader.train import TrainConfig
    >>> TrainConfig(steps=1000, decay_steps=250).top_timestep
    4000
    """

    network_type: ClassVar[Any] = NetworkConfig
    network_class: ClassVar[Callable[[Any], nn.Module]] = staticmethod(build_network)
    length_fields: ClassVar[tuple[str, ...]] = ("steps", "warmup", "decay_steps")
    later_fields: ClassVar[tuple[str, ...]] = ("distil_from",)

    objective: str = "hybrid"
    parameterization: str = "epsilon"
    time: str = "timestep"
    schedule: str = "cosine"
    timesteps: int = 4000
    max_timestep: int | None = None
    sigma_range: tuple[float, float] = (0.001, 0.3)
    sigma_center: float = 0.06
    sigma_spread: float = 1.1
    gamma: float = 0.001
    network: NetworkConfig = field(default_factory=UNetConfig)
    start_from: Mapping[str, str | None] | None = None
    distil_from: Mapping[str, str | None] | None = None
    steps: int = 250_000
    batch_size: int = 128
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 0
    decay_steps: int = 0
    decay: str = "linear"
    ema_decay: float = 0.9999
    clip_norm: float = 1.0
    replicate: int = 4
    augment: tuple[str, ...] = ()
    patch_size: int | None = None
    dtype: str = "float32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_shared_fields()
        check_model_entry("distil_from", self.distil_from)
        if not isinstance(self.augment, tuple) or not all(isinstance(name, str) for name in self.augment):
            raise ConfigError(f"augment must be a tuple of names. Got {self.augment!r}.")
        if unknown := sorted(set(self.augment) - set(AUGMENTATIONS)):
            raise ConfigError(f"augment takes any of {', '.join(AUGMENTATIONS)}. Got {', '.join(unknown)}.")
        if (
            not isinstance(self.sigma_range, tuple)
            or len(self.sigma_range) != 2
            or not all(isinstance(s, int | float) and not isinstance(s, bool) for s in self.sigma_range)
            or not 0 < self.sigma_range[0] < self.sigma_range[1] < math.inf
        ):
            raise ConfigError(f"sigma_range must be 0 < low < high, in image units. Got {self.sigma_range!r}.")
        check_choice("objective", self.objective, ("hybrid", "sigma"))
        check_choice("parameterization", self.parameterization, tuple(PARAMETERIZATIONS))
        check_choice("time", self.time, ("timestep", "log-sigma"))
        check_choice("schedule", self.schedule, tuple(_SCHEDULES))
        check_choice("decay", self.decay, ("linear", "cosine"))
        check_integer("timesteps", self.timesteps, 2, limits.TIMESTEPS)
        check_integer("replicate", self.replicate, 0, _COPIES)
        check_integer("decay_steps", self.decay_steps, 0, STEPS)
        check_integer("max_timestep", self.max_timestep, 2, self.timesteps, none=True, unit="a timestep")
        check_integer("patch_size", self.patch_size, 8, limits.TILE, none=True, unit="in pixels")
        for name in ("clip_norm", "sigma_center", "sigma_spread"):
            check_number(name, getattr(self, name), above=0)
        for name in ("weight_decay", "gamma"):
            check_number(name, getattr(self, name), low=0)
        if self.objective == "sigma" and self.time != "log-sigma":
            raise ConfigError(
                f"The objective 'sigma' has no timesteps: time must be 'log-sigma'. Got {self.time!r}: set it too."
            )
        if self.objective != "sigma" and self.distil_from is not None:
            raise ConfigError(
                f"A teacher's estimates are learned with the objective 'sigma'. Got {self.objective!r}: leave "
                "distil_from out, or set objective and time."
            )
        if self.objective == "sigma" and self.network.learned_variance:
            raise ConfigError(
                "The objective 'sigma' does not train a variance. Got a network with learned_variance: "
                "use the objective 'hybrid', or a network without."
            )

    def more_memory(self, images: Tensor, batch_size: int) -> int:
        order = 16 * len(images) * (1 + self.replicate)  # of an epoch: what is drawn, and where it comes
        side = self.patch_size
        shape = images.shape[1:] if side is None else (images.shape[1], side, side)
        return order + 2 * 4 * batch_size * math.prod(shape)

    def network_fields(self) -> dict[str, Any]:
        """Return the network's configuration as plain data; a U-Net's has no kind, as configurations of before."""
        return self.network.to_dict() if isinstance(self.network, UNetConfig) else network_to_dict(self.network)

    @classmethod
    def read_network(cls, values: Mapping[str, Any], base: Mapping[str, Any]) -> NetworkConfig:
        """Read the network's configuration: fields over those of `base`, unless they are of another kind of network."""
        kind = base.get("kind", "unet")
        return network_config({**base, **values} if values.get("kind", kind) == kind else values)

    @property
    def top_timestep(self) -> int:
        """The highest timestep that is trained."""
        return self.timesteps if self.max_timestep is None else self.max_timestep

    def noise_schedule(self) -> Schedule:
        return _SCHEDULES[self.schedule](self.timesteps)


def _eclipse(size: int) -> TrainConfig:
    """ECLIPSE (Sec. 4), with improved-diffusion's defaults where the paper is silent.

    Levels and attention (at 16 x 16 and 8 x 8) follow improved-diffusion's rule for the image size.
    """
    shapes: dict[int, dict[str, Any]] = {
        32: {"multipliers": (1, 2, 2, 2), "attention_levels": (1, 2)},
        64: {"multipliers": (1, 2, 3, 4), "attention_levels": (2, 3)},
        128: {"multipliers": (1, 1, 2, 3, 4), "attention_levels": (3, 4)},
    }
    return TrainConfig(network=UNetConfig(**shapes[size]))


def _light(size: int) -> TrainConfig:
    """Only the noise that purification uses, one small network: what two CPU cores manage in an hour.

    Without attention the network is convolutional, so that larger images are trained on by patches.
    """
    return TrainConfig(
        objective="sigma",
        parameterization="edm",
        time="log-sigma",
        network=UNetConfig.small(),
        steps=10_000,
        batch_size=32,
        learning_rate=1e-3,
        warmup=200,
        decay_steps=2_500,
        ema_decay=0.999,
        augment=("flip",),
        patch_size=None if size == 32 else 48,
        dtype="bfloat16",
    )


def _fast(size: int) -> TrainConfig:
    """A network of a tenth of the arithmetic, for every size: purifying costs about what JPEG does.

    It has no normalisation, and learns only the noise that purification uses: a narrower task, for fewer weights.
    """
    return TrainConfig(
        objective="sigma",
        parameterization="edm",
        time="log-sigma",
        sigma_range=(0.005, 0.3),
        sigma_center=0.08,
        sigma_spread=0.7,
        network=PlainUNetConfig(),
        steps=50_000,
        batch_size=32,
        learning_rate=2e-3,
        warmup=200,
        decay_steps=35_000,
        ema_decay=0.999,
        augment=("flip",),
        patch_size=None if size == 32 else 48,
    )


def _puregen(size: int) -> TrainConfig:
    """PureGen-DDPM: only t <= 250 of the linear schedule, diffusers' network, no average.

    One network for every size, its attention at the fifth of six levels: 2 x 2 for 32 pixels. 29,297 steps are the
    published 150 epochs of 50,000 images. The weight decay is torch's default; the published settings do not name it.
    """
    return TrainConfig(
        schedule="linear",
        timesteps=1000,
        max_timestep=250,
        network=UNetConfig(
            multipliers=(1, 1, 2, 2, 4, 4),
            blocks=2,
            attention_levels=(4,),
            head_channels=8,
            scale_shift=False,
            learned_variance=False,
        ),
        steps=29_297,
        batch_size=256,
        weight_decay=0.01,
        warmup=500,
        decay_steps=29_297,
        decay="cosine",
        ema_decay=0.0,
        replicate=0,
    )


RECIPES: dict[str, Callable[[int], TrainConfig]] = {
    "eclipse": _eclipse,
    "fast": _fast,
    "light": _light,
    "puregen": _puregen,
}
"""Name -> the configuration for images of 32, 64 or 128 pixels."""


def recipe(name: str, image_size: int = 32, image_channels: int = 3) -> TrainConfig:
    """Return the configuration of `RECIPES` for the side in pixels, 32, 64 or 128, that is nearest by ratio.

    >>> from purifyloader.train import recipe
    >>> recipe("light", image_size=64).patch_size
    48
    """
    if name not in RECIPES:
        raise ConfigError(f"A preset must be one of {', '.join(sorted(RECIPES))}. Got {name!r}.")
    nearest = min((32, 64, 128), key=lambda size: max(size / image_size, image_size / size))
    return TrainConfig.from_dict({"network": {"image_channels": image_channels}}, RECIPES[name](nearest))
