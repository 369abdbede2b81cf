"""Measure whether a converted model does what it should: a wrong setting shows in the pixels.

Without images of the user's it is tried on dead leaves (Matheron 1968; Lee, Mumford & Huang 2001): overlapping discs,
of whose radius r the density falls as r^-3, which gives them the edges, flat parts and power spectrum of photographs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.images import quantize
from purifyloader.diffusion.denoiser import Denoiser, NetworkDenoiser
from purifyloader.diffusion.psnr import noised_psnr, psnr
from purifyloader.energy.network import EnergyNetwork

__all__ = ["Plausibility", "Row", "dead_leaves", "judge_denoiser", "judge_energy", "levels"]

_LEVELS_PX = (10, 25, 50, 100)
_GAIN_DB = 1.0  # at least so much better than the noisy image, at every level
_ENERGY_PX = 25


@dataclass(frozen=True)
class Row:
    """PSNR at one noise level, means over images in dB: of the noisy images and of the denoised ones."""

    sigma_px: float
    noisy: float
    denoised: float

    @property
    def gain(self) -> float:
        return self.denoised - self.noisy


@dataclass(frozen=True)
class Plausibility:
    """Measurements of a converted model."""

    images: str  # describes and counts them
    rows: list[Row] = field(default_factory=list)  # of a denoiser, one a noise level
    energy: float | None = None  # share of images whose energy rises when noise is added
    warnings: list[str] = field(default_factory=list)  # sentences that speak against the conversion

    def to_dict(self) -> dict[str, Any]:
        rows = [{key: round(value, 3) for key, value in asdict(row).items()} for row in self.rows]
        return {"images": self.images, "psnr": rows, "share_with_rising_energy": self.energy, "warnings": self.warnings}


def dead_leaves(count: int, size: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Draw overlapping shaded discs, uint8 (count, channels, size, size), the same for the same arguments."""
    discs = 100
    keys = noise.image_keys(seed, 0, range(count))
    draw = noise.uniform(keys, (discs, 8))  # x, y, radius, brightness, shading, direction, hue, hue
    tone = noise.uniform(keys, (2,), step=1)
    axis = torch.arange(size, dtype=torch.float64) + 0.5
    x, y = axis[None, None, :], axis[None, :, None]
    low, high = max(1.0, size / 16), size
    mean = 0.3 + 0.4 * tone[:, 0, None, None]
    contrast = 0.15 + 0.25 * tone[:, 1, None, None]
    images = mean[:, None].expand(-1, 3, size, size)
    for disc in range(discs):
        u = draw[:, disc, :, None, None].unbind(1)
        # the density of radii falls as r^-3 between the two bounds
        radius = (low**-2 - u[2] * (low**-2 - high**-2)) ** -0.5
        dx, dy = x - u[0] * size, y - u[1] * size
        cover = (radius - (dx**2 + dy**2).sqrt() + 0.5).clamp(0, 1)[:, None]
        angle = 2 * math.pi * u[5]
        shade = (u[4] - 0.5) * 0.6 * (dx * angle.cos() + dy * angle.sin()) / (2 * radius)
        grey = mean + contrast * (2 * u[3] - 1) + shade
        hue = torch.stack([u[6] - 0.5, -(u[6] + u[7] - 1) / 2, u[7] - 0.5], dim=1) * 0.25
        images = images * (1 - cover) + cover * (grey[:, None] + hue)
    images = images.clamp(0, 1)
    return quantize(images if channels == 3 else images.mean(1, keepdim=True).expand(-1, channels, -1, -1))


def levels(sigma_range: tuple[float, float]) -> list[float]:
    """Choose noise levels to try, in image units: the usual ones in the range, or three spread over it."""
    low, high = sigma_range
    usual = [px / 255 for px in _LEVELS_PX if low <= px / 255 <= high]
    if len(usual) >= 2:
        return usual
    return [low ** (1 - u) * high**u for u in (0.25, 0.5, 0.9)]


def measure(denoiser: Denoiser, images_NCHW: Tensor, sigmas: Sequence[float], batch_size: int = 8) -> list[Row]:
    """Measure PSNR, with peak 1, before and after one network call on clean uint8 images, all clamped to [0, 1]."""
    rows = []
    for sigma in sigmas:
        denoised = psnr(denoiser, images_NCHW, sigma, batch_size=batch_size)
        # NaN is no image at all
        rows.append(Row(255 * sigma, noised_psnr(images_NCHW, sigma), 0.0 if math.isnan(denoised) else denoised))
    return rows


def judge_denoiser(denoiser: NetworkDenoiser, images_NCHW: Tensor, images: str) -> Plausibility:
    """Measure whether a denoiser denoises clean uint8 images, which `images` describes."""
    rows = measure(denoiser, images_NCHW, levels(denoiser.sigma_range))
    judged = Plausibility(f"{len(images_NCHW)} {images}", rows)
    if bad := [row for row in rows if not row.gain >= _GAIN_DB]:
        text = ", ".join(f"{row.sigma_px:.3g} px: {row.noisy:.1f} → {row.denoised:.1f} dB" for row in bad)
        judged.warnings.append(
            f"The converted model does not denoise ({text}). Likely causes: another schedule or T, rescaled timesteps "
            "or not, another number of heads or order of qkv than the weights were trained with; weights of an "
            "untrained or other model; or images unlike those it was trained on (give it images of its kind)."
        )
    return judged


@torch.no_grad()
def judge_energy(network: EnergyNetwork, images_NCHW: Tensor, images: str) -> Plausibility:
    """Measure whether noise raises the energy, as it must for Langevin steps to remove any."""
    clean = images_NCHW.float() / 255
    noised = clean + _ENERGY_PX / 255 * noise.normal(noise.image_keys(0, 0, range(len(clean))), clean.shape[1:])
    share = float((network(noised) > network(clean)).float().mean())
    judged = Plausibility(f"{len(images_NCHW)} {images}", energy=share)
    if share < 0.5:
        judged.warnings.append(
            f"Noise of {_ENERGY_PX} px raises the energy of only {100 * share:.0f} % of clean images, so steps down "
            "the energy would not remove it. Likely causes: an energy of the other sign, weights of an untrained or "
            "other model, or images unlike those it was trained on (give it images of its kind)."
        )
    return judged
