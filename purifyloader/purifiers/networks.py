"""Purifiers around a network. All of them call it with a fixed number of images: see `purifyloader.core.batches`."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.batches import in_batches
from purifyloader.core.checks import check_compute_batch, check_number
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.samplers import SAMPLERS
from purifyloader.diffusion.schedule import CosineSchedule, Schedule, schedule_from_config, spaced_sigmas
from purifyloader.energy import EnergyNetwork
from purifyloader.errors import ConfigError, InputError
from purifyloader.files.weights import weights_sha256
from purifyloader.purifiers.base import Purifier, Resolver, pixels

__all__ = ["DTYPES", "DenoiseOnce", "Diffuse", "NetworkPurifier", "check_energy", "entry"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def entry(model: Denoiser | EnergyNetwork) -> dict[str, Any]:
    """What a configuration says of a model: its name, for people, and the hash of its weights as they are now."""
    return {"name": model.name, "weights_sha256": weights_sha256(model)}


def check_energy(taker: str, energy: Any) -> None:
    """Raise `InputError` unless this is an energy model; `taker` is what asks for one."""
    if isinstance(energy, EnergyNetwork):
        return
    hint = ""
    if isinstance(energy, Denoiser):
        hint = " A denoiser goes into Diffuse and DenoiseOnce: recipes.eclipse, denoise_once and puregen_ddpm."
    raise InputError(
        f'{taker} takes an energy model, as `purifyloader.pretrained.load(..., kind="energy")` gives. '
        f"Got {type(energy).__name__}.{hint}"
    )


def _check_denoiser(denoiser: Any) -> None:
    if isinstance(denoiser, Denoiser):
        return
    hint = ""
    if isinstance(denoiser, EnergyNetwork):
        hint = " An energy model goes into Langevin and EnergyAbove: recipes.puregen_ebm and puregen_filt."
    raise InputError(
        f"Expected a denoiser, as `purifyloader.pretrained.load` gives. Got {type(denoiser).__name__}.{hint}"
    )


class NetworkPurifier(Purifier):
    """A purifier around a network, run in chunks of exactly `compute_batch` images.

    Args:
        model: stands under `role` in the configuration; its own copy, in `dtype`, is for the subclass to keep.
        dtype: of the network's arithmetic, "float32" or "bfloat16".
        compute_batch: images of every network call (at least 16 on the CPU); part of the configuration,
            for it decides which kernels run.
    """

    role: str

    def __init__(self, model: Denoiser | EnergyNetwork, dtype: str, compute_batch: int) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {sorted(DTYPES)}. Got {dtype!r}.")
        check_compute_batch(compute_batch)
        self.dtype = dtype
        self.compute_batch = compute_batch
        self._entry = entry(model)  # before any cast

    def network_config(self) -> dict[str, Any]:
        return {self.role: self._entry, "dtype": self.dtype, "compute_batch": self.compute_batch}

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        x_BCHW = x_BCHW.contiguous()  # channels-last memory would choose other kernels, and so other bits
        return in_batches(self.run_chunk, self.compute_batch, x_BCHW, seeds_B) if len(x_BCHW) else x_BCHW

    def run_chunk(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        raise NotImplementedError


class _DenoiserPurifier(NetworkPurifier):
    """Around a denoiser, which is copied and frozen; the original is left alone."""

    role = "denoiser"

    def __init__(self, denoiser: Denoiser, dtype: str, compute_batch: int) -> None:
        _check_denoiser(denoiser)
        super().__init__(denoiser, dtype, compute_batch)
        self.image_channels = denoiser.image_channels
        # in one memory format, for another would choose other kernels, and so other bits
        self.denoiser = copy.deepcopy(denoiser).to(dtype=DTYPES[dtype], memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.denoiser.requires_grad_(False)
        self.eval()


class DenoiseOnce(_DenoiserPurifier):
    """Add noise of exactly sigma and denoise in one network call (Hong et al. 2024; Carlini et al. 2023).

    Args:
        denoiser: see `purifyloader.pretrained.load`.
        sigma: noise level in image units, within `denoiser.sigma_range`.
        dtype, compute_batch: see `Diffuse`.
    """

    kind = "denoise-once"
    calls = 1

    def __init__(self, denoiser: Denoiser, sigma: float, *, dtype: str = "float32", compute_batch: int = 32) -> None:
        super().__init__(denoiser, dtype, compute_batch)
        check_number("sigma", sigma)
        denoiser.check_sigma(sigma)
        self.sigma = float(sigma)

    def config(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "sigma": self.sigma,
            "sigma_px": pixels(self.sigma),
            **self.network_config(),
        }

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        values.pop("sigma_px", None)
        return cls(resolve(values.pop("denoiser")), **values)

    def run_chunk(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        noised = x_BCHW + self.sigma * noise.normal(seeds_B, x_BCHW.shape[1:])
        return self.denoiser(noised, torch.full((len(x_BCHW),), self.sigma, dtype=torch.float64))


class Diffuse(_DenoiserPurifier):
    """Noise to a level, then sample back down to 0 (ECLIPSE, Algorithm 1; DiffPure).

    Give the level as `t`, read through `schedule`, or as `sigma`.

    Args:
        denoiser: see `purifyloader.pretrained.load`.
        t: timestep to noise to.
        sigma: or its noise level, in image units (25 px is 25/255).
        steps: network calls (NFE), evenly spaced in t. Default: every timestep when `t` is given,
            one when `sigma` is.
        schedule: what `t` means; ECLIPSE's cosine one with T = 4000 by default.
        sampler: "ancestral" or "ddim".
        dtype: of the network's arithmetic, "float32" or "bfloat16".
        compute_batch: images of every network call.
    """

    kind = "diffuse"

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        t: float | None = None,
        sigma: float | None = None,
        steps: int | None = None,
        schedule: Schedule | None = None,
        sampler: str = "ancestral",
        dtype: str = "float32",
        compute_batch: int = 32,
    ) -> None:
        super().__init__(denoiser, dtype, compute_batch)
        if (t is None) == (sigma is None):
            raise ConfigError(f"Give the noise level as t or as sigma, one of them. Got t={t!r}, sigma={sigma!r}.")
        check_number("t" if sigma is None else "sigma", t if sigma is None else sigma)
        if sampler not in SAMPLERS:
            raise ConfigError(f"sampler must be one of {sorted(SAMPLERS)}. Got {sampler!r}.")
        self.schedule = CosineSchedule(4000) if schedule is None else schedule
        self.t, self.sigma = t, sigma
        if steps is None:
            if t is not None and t != int(t):
                raise ConfigError(f"A fractional t needs steps, the number of network calls. Got t={t}.")
            steps = 1 if t is None else int(t)
        self.steps = steps
        self.sampler = sampler
        if sigma is not None:
            denoiser.check_sigma(sigma)
            t = float(self.schedule.t(sigma))
        assert t is not None
        levels = spaced_sigmas(self.schedule, t, steps)
        # a sigma asked for is used as it is, not as it comes back from the schedule
        self.sigmas = levels if sigma is None else (float(sigma), *levels[1:])
        denoiser.check_sigma(torch.tensor(self.sigmas[:-1], dtype=torch.float64))

    @property
    def calls(self) -> int:
        return self.steps

    def config(self) -> dict[str, Any]:
        level = {"t": self.t} if self.sigma is None else {"sigma": self.sigma}
        return {
            "kind": self.kind,
            **level,
            "sigma_px": pixels(self.sigmas[0]),
            "steps": self.steps,
            "schedule": self.schedule.config(),
            "sampler": self.sampler,
            **self.network_config(),
        }

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        values.pop("sigma_px", None)
        schedule = schedule_from_config(values.pop("schedule"))
        return cls(resolve(values.pop("denoiser")), schedule=schedule, **values)

    def run_chunk(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        shape = x_BCHW.shape[1:]
        noised = x_BCHW + self.sigmas[0] * noise.normal(seeds_B, shape)
        return SAMPLERS[self.sampler](
            self.denoiser, noised, self.sigmas, lambda step: noise.normal(seeds_B, shape, step + 1)
        )
