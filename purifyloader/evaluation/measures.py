"""Measure single images: the error a denoiser makes and claims, and what it takes from poisoned images.

Images are float32 (B, C, H, W) in [0, 1] units. Each measure gives one value per image; means are left to the caller.
Squared errors are averaged over pixels and channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.psnr import check_images, estimate
from purifyloader.errors import InputError

__all__ = ["Calibration", "Removed", "calibration", "check_poisoned", "removed_energy"]

_PROBE = 0.05  # size of the divergence's step, in units of sigma


def check_poisoned(poisoned: Mapping[str, Tensor], clean_NCHW: Tensor) -> None:
    """Refuse poisoned images that are not poisoned versions of the clean ones, in the same order."""
    for name, images in poisoned.items():
        check_images(images, f"Poisoned images ({name}) are")
        if images.shape != clean_NCHW.shape:
            raise InputError(
                f"Poisoned images ({name}) must be the same images in the same order, {tuple(clean_NCHW.shape)}. Got "
                f"{tuple(images.shape)}."
            )
        if torch.equal(images, clean_NCHW):
            raise InputError(
                f"Poisoned images ({name}) must differ from the clean ones. Got the very same: is the clean set "
                "poisoned too, or a wrong file named?"
            )


class Calibration(NamedTuple):
    """Mean squared errors of each image, float64 (B,), in squared image units."""

    error: Tensor  # of the denoiser's estimate
    claimed: Tensor  # what the denoiser's derivative stands for; can be negative for one image


@torch.no_grad()
def calibration(
    denoiser: Denoiser,
    clean_BCHW: Tensor,
    noise_BCHW: Tensor,
    sigma: float,
    signs_BCHW: Tensor,
    x0_BCHW: Tensor | None = None,
) -> Calibration:
    """Measure the error a denoiser makes, |D(x) - x0|^2 / d, and the one it claims, at noise `sigma`, in image units.

    Of x = x0 + sigma z the best denoiser D is the posterior mean, and its derivative is the posterior's covariance:
    Cov[x0 | x] = sigma^2 dD/dx (Efron 2011, "Tweedie's formula and selection bias"; Miyasawa 1961). So any denoiser
    claims the mean squared error sigma^2 div D / d over d values, without being asked, and a calibrated one keeps to
    it. The divergence takes one random direction of signs b, b . (D(x + e b) - D(x)) / e (Hutchinson 1990; Ramani, Blu
    & Unser 2008), e = sigma / 20. Calibrated is not good: doing nothing claims an error of sigma, and makes it.

    Args:
        clean_BCHW, noise_BCHW: x0 and z.
        signs_BCHW: -1 or 1, independent.
        x0_BCHW: D(x), unclipped, where it is known already; else it is computed.

    >>> import torch
    >>> from purifyloader.evaluation import calibration
    >>> from purifyloader.pretrained import load
    >>> clean, noise = torch.full((1, 3, 32, 32), 0.5), torch.randn(1, 3, 32, 32)
    >>> error, claimed = calibration(load("cifar10-sparse"), clean, noise, 0.1, noise.sign())
    >>> error.shape, claimed.shape
    (torch.Size([1]), torch.Size([1]))
    """
    x = clean_BCHW + sigma * noise_BCHW
    x0 = estimate(denoiser, x, sigma) if x0_BCHW is None else x0_BCHW
    step = _PROBE * sigma
    moved = estimate(denoiser, x + step * signs_BCHW, sigma)

    def mean(value: Tensor) -> Tensor:
        return value.double().mean(dim=(1, 2, 3))

    claimed = sigma**2 * mean(signs_BCHW * (moved - x0)) / step
    return Calibration(mean((x0 - clean_BCHW).double().square()), claimed)


class Removed(NamedTuple):
    """Values of each image, float64 (B,); see `removed_energy`."""

    clean: Tensor
    poisoned: Tensor
    perturbation: Tensor
    remaining: Tensor
    distance: Tensor


def removed_energy(
    clean_BCHW: Tensor, poisoned_BCHW: Tensor, washed_clean_BCHW: Tensor, washed_poisoned_BCHW: Tensor
) -> Removed:
    """Measure what a denoiser takes from images and from the same images poisoned, both noised with the same noise.

    Returns:
        clean, poisoned: root mean square of image minus washed image, in image units;
        perturbation: the same of delta = poisoned - clean;
        remaining: <P - C, delta> / |delta|^2 with P and C the washed images: the share of the perturbation
            that is still there, 0 when it is gone, and NaN where there is none;
        distance: |P - C| / |delta|, all that the perturbation still does to the image; NaN likewise.

    >>> import torch
    >>> from purifyloader.evaluation import removed_energy
    >>> clean = torch.full((1, 3, 4, 4), 0.5)
    >>> poisoned = clean + 0.1
    >>> removed_energy(clean, poisoned, clean, clean + 0.05).remaining  # half of the perturbation is left
    tensor([0.5000], dtype=torch.float64)
    """

    def rms(x: Tensor) -> Tensor:
        return x.square().mean(dim=(1, 2, 3)).sqrt()

    clean, poisoned, washed_clean, washed_poisoned = (
        x.cpu().double() for x in (clean_BCHW, poisoned_BCHW, washed_clean_BCHW, washed_poisoned_BCHW)
    )
    delta, left = poisoned - clean, washed_poisoned - washed_clean
    remaining = (left * delta).mean(dim=(1, 2, 3)) / delta.square().mean(dim=(1, 2, 3))
    distance = torch.where(rms(delta) > 0, rms(left) / rms(delta), torch.nan)
    return Removed(rms(clean - washed_clean), rms(poisoned - washed_poisoned), rms(delta), remaining, distance)
