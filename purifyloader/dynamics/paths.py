"""Purify to one level after another: along one Langevin walk, or by one diffusion for each level.

What comes out is the image as it would be stored, in 8 bits. As everywhere, an image's is a function of (weights,
configuration, key, image), whatever images come with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.devices import device_of, exact_arithmetic, in_batches
from purifyloader.core.images import quantize
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule, Schedule
from purifyloader.energy import EnergyNetwork, walk
from purifyloader.energy.walking import STEP_SIZE, check_dynamics
from purifyloader.errors import ConfigError, PurifyError
from purifyloader.pretrained.kinds import sized_identity
from purifyloader.purifiers import Diffuse, Langevin

__all__ = ["SCHEDULES", "DiffusionPath", "LangevinPath", "Path", "Piece"]

SCHEDULES: dict[str, Schedule] = {"cosine": CosineSchedule(4000), "linear": LinearSchedule(1000)}
"""ECLIPSE's and PureGen's."""


class Piece(NamedTuple):
    """Some images at one level."""

    level: int  # its position among the levels
    rows: slice  # of the images
    images: Tensor  # purified, uint8 (B, C, H, W), on the CPU
    seconds: float  # that an image took from the start, in a full batch


class Path(Protocol):
    """Purification to rising levels above 0: `LangevinPath`, `DiffusionPath`, or your own.

    >>> from purifyloader.dynamics import DiffusionPath, Path
    >>> from purifyloader.pretrained import load
    >>> path: Path = DiffusionPath(load("cifar10-sparse"), sigmas=[25 / 255])
    >>> path.work
    (1,)
    """

    @property
    def levels(self) -> tuple[float, ...]: ...

    @property
    def work(self) -> tuple[int, ...]:
        """Count the network calls that each level takes beyond what the one before it left behind."""

    @property
    def image_channels(self) -> int: ...

    def config(self) -> dict[str, Any]:
        """Describe the path as plain data: `unit` says what a level is, `levels` has what is known of each."""

    def only(self, level: int) -> Path:
        """Return the same path with one of the levels alone, by its position; images come out of it the same."""

    def purify(self, images_NCHW: Tensor, keys_N: Tensor) -> Iterator[Piece]:
        """Purify every image, uint8, to every level, in any order, with an int64 key for each."""


def _check_levels(levels: Sequence[float], what: str) -> None:
    if not levels or not all(b > a for a, b in zip((0, *levels), levels, strict=False)):
        raise ConfigError(f"Expected {what}, rising, above 0 and at least one. Got {list(levels)}.")


def _finish(device: torch.device) -> float:
    """Wait for the device, and return the time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class LangevinPath:
    """One Langevin walk (PureGen-EBM), looked at after some of its steps, rising; it is as long as the last.

    An image after n steps is, bit for bit, that of `purifyloader.purifiers.Langevin` with n steps, which explains and
    checks the other arguments.

    >>> from purifyloader.dynamics import LangevinPath
    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
    >>> LangevinPath(EnergyNetwork(EnergyConfig(channels=8)), steps=[5, 10, 20]).levels
    (5, 10, 20)
    """

    def __init__(
        self,
        energy: EnergyNetwork,
        steps: Sequence[int],
        *,
        step_size: float = STEP_SIZE,
        temperature: float | None = None,
        compute_batch: int = 32,
    ) -> None:
        _check_levels(steps, "numbers of Langevin steps")
        for count in steps:
            check_dynamics(count, step_size)
        self.purifier = Langevin(
            energy, steps[-1], step_size=step_size, temperature=temperature, compute_batch=compute_batch
        )
        self.energy, self.image_channels = energy, energy.config.image_channels
        self.levels, self.work = tuple(steps), tuple(b - a for a, b in zip((0, *steps), steps, strict=False))

    def config(self) -> dict[str, Any]:
        return {
            "kind": "langevin",
            "unit": "Langevin steps",
            "model": sized_identity(self.energy),
            "step_size_px": float(f"{255 * self.purifier.step_size:.6g}"),
            "temperature": self.purifier.temperature,
            "compute_batch": self.purifier.compute_batch,
            "levels": [{"level": count, "calls": count} for count in self.levels],
        }

    def only(self, level: int) -> LangevinPath:
        path = copy(self)
        path.levels = path.work = self.levels[level : level + 1]
        return path

    def purify(self, images_NCHW: Tensor, keys_N: Tensor) -> Iterator[Piece]:
        device, size = self.energy.readout.weight.device, self.purifier.compute_batch
        for start in range(0, len(images_NCHW), size):
            rows = slice(start, min(start + size, len(images_NCHW)))
            seconds: list[float] = []
            with torch.no_grad(), exact_arithmetic(device):
                x = images_NCHW[rows].to(device).float() / 255
                walked = partial(self._walked, seconds=seconds)
                seen_BL = in_batches(walked, size, x, keys_N[rows].to(device)).cpu()
            for level, images in enumerate(seen_BL.unbind(dim=1)):
                yield Piece(level, rows, images, seconds[level])

    def _walked(self, x_BCHW: Tensor, keys_B: Tensor, seconds: list[float]) -> Tensor:
        """Return uint8 (B, levels, C, H, W); put the seconds that an image took to each level into `seconds`."""
        purifier, shape = self.purifier, x_BCHW.shape[1:]
        begun = _finish(x_BCHW.device)
        steps = walk(
            purifier.energy,
            x_BCHW.contiguous(memory_format=torch.channels_last),
            self.levels[-1],
            lambda step: noise.normal(keys_B, shape, step).contiguous(memory_format=torch.channels_last),
            step_size=purifier.step_size,
            temperature=purifier.temperature,
        )
        seen = []
        for step, x in enumerate(steps, start=1):
            if step in self.levels:
                seconds.append((_finish(x.device) - begun) / len(x))
                # what is not finite waits for the end of the walk, which says what that means
                seen.append(quantize(x.nan_to_num(0, 0, 0)))
        return torch.stack(seen, dim=1)


class DiffusionPath:
    """Noise and denoise (`purifyloader.purifiers.Diffuse`), once for each level: each is a purification by itself.

    Args:
        t: timesteps to noise to, rising, read through `schedule`.
        sigmas: or noise levels, rising, in image units (25 px is 25/255).
        calls: network calls of a level at most, evenly spaced. Default: every timestep for `t`, one for `sigmas`.
        schedule, sampler, compute_batch: see `Diffuse`.

    >>> from purifyloader.dynamics import DiffusionPath
    >>> from purifyloader.pretrained import load
    >>> len(DiffusionPath(load("cifar10-sparse"), sigmas=[10 / 255, 25 / 255]).levels)
    2
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        t: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        schedule: Schedule | None = None,
        calls: int | None = None,
        sampler: str = "ancestral",
        compute_batch: int = 32,
    ) -> None:
        if (t is None) == (sigmas is None):
            raise ConfigError(f"Give the noise levels as t or as sigmas, one of them. Got t={t!r}, sigmas={sigmas!r}.")
        if calls is not None and (type(calls) is not int or calls < 1):
            raise ConfigError(f"calls is the number of network calls of a level, at least 1. Got {calls!r}.")
        self.denoiser, self.sampler, self.compute_batch = denoiser, sampler, compute_batch
        self.schedule, self.by_t = schedule, t is not None
        self.levels: tuple[float, ...] = tuple(t if t is not None else sigmas or ())
        _check_levels(self.levels, "timesteps t" if self.by_t else "noise levels sigma")
        if self.by_t:
            self.work = tuple(min(int(level), calls or int(level)) for level in self.levels)
        else:
            self.work = (1 if calls is None else calls,) * len(self.levels)
        # before hours of work; one at a time, for each holds a copy of the network
        self._sigmas = tuple(self._purifier(level).sigmas[0] for level in range(len(self.levels)))
        self.image_channels = denoiser.image_channels

    def _purifier(self, level: int) -> Diffuse:
        value = self.levels[level]
        return Diffuse(
            self.denoiser,
            t=value if self.by_t else None,
            sigma=None if self.by_t else value,
            steps=self.work[level],
            schedule=self.schedule,
            sampler=self.sampler,
            compute_batch=self.compute_batch,
        )

    def config(self) -> dict[str, Any]:
        first = self._purifier(0)
        levels = zip(self.levels, self._sigmas, self.work, strict=True)
        return {
            "kind": "diffusion",
            "unit": "timestep t" if self.by_t else "noise sigma",
            "model": sized_identity(self.denoiser),
            "schedule": first.schedule.config(),
            "sampler": self.sampler,
            "compute_batch": self.compute_batch,
            "levels": [
                {"level": level, "sigma_px": float(f"{255 * sigma:.5g}"), "calls": calls}
                for level, sigma, calls in levels
            ],
        }

    def only(self, level: int) -> DiffusionPath:
        path, one = copy(self), slice(level, level + 1)
        path.levels, path.work, path._sigmas = self.levels[one], self.work[one], self._sigmas[one]
        return path

    def purify(self, images_NCHW: Tensor, keys_N: Tensor) -> Iterator[Piece]:
        device = device_of(self.denoiser) or torch.device("cpu")
        for level in range(len(self.levels)):
            purifier = self._purifier(level)
            for start in range(0, len(images_NCHW), self.compute_batch):
                rows = slice(start, min(start + self.compute_batch, len(images_NCHW)))
                x = images_NCHW[rows].to(device).float() / 255
                begun = _finish(device)
                out = purifier(x, keys_N[rows].to(device))
                seconds = (_finish(device) - begun) / max(len(x), self.compute_batch)
                if not bool(out.isfinite().all()):
                    raise PurifyError(
                        f"Purified images must be finite. Got NaN or infinity at level {self.levels[level]:g}: the "
                        f"denoiser {self.denoiser.name or '(unnamed)'} is broken. Give another one."
                    )
                yield Piece(level, rows, quantize(out).cpu(), seconds)
