"""The measures, as functions of tensors: each gives one value an image, and means are left to the caller.

Images are float32 (B, C, H, W) in image units, nominally in [0, 1], except where uint8 is said. Powers and
squared errors are in squared image units, averaged over pixels and channels: 10 log10(255^2 p) is decibels
over one squared level of the 0-255 scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from purifyloader.core import corruptions, noise
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.objective import posterior_log_variance_bounds
from purifyloader.errors import InputError

__all__ = [
    "BLUR_WIDTHS",
    "Calibration",
    "Removed",
    "VarianceCalibration",
    "auc",
    "batch_size_of",
    "blur_psnr_of",
    "calibration",
    "check_images",
    "cross_spectrum",
    "device_of",
    "estimate",
    "jpeg_psnr",
    "noised",
    "noised_psnr",
    "psnr",
    "psnr_of",
    "rank_correlation",
    "removed_energy",
    "residual_spectrum",
    "ring_frequencies",
    "variance_calibration",
    "wrong_level_errors",
]

BLUR_WIDTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.5)
"""Standard deviations of the Gaussian blurs that a denoiser is compared with, in pixels."""

_MOST_RINGS = 64  # below half a cycle a pixel: finer rings of a large image would only be noisier
_BATCH_VALUES = 100 * 3 * 64 * 64  # bounds the memory of a batch of large images
_PROBE = 0.05  # size of the divergence's step, in units of sigma


def device_of(denoiser: Denoiser) -> torch.device:
    return next((p.device for p in denoiser.parameters()), torch.device("cpu"))


def check_images(images_NCHW: Tensor, what: str = "PSNR takes") -> None:
    """
    Raises:
        InputError: not uint8 (N, C, H, W), or no image.
    """
    if not isinstance(images_NCHW, Tensor):
        raise InputError(f"{what} uint8 images (N, C, H, W), as a tensor. Got {type(images_NCHW).__name__}.")
    if images_NCHW.dtype != torch.uint8 or images_NCHW.ndim != 4 or images_NCHW.numel() == 0:
        raise InputError(
            f"{what} uint8 images (N, C, H, W), at least one. Got {images_NCHW.dtype} {tuple(images_NCHW.shape)}."
        )


# -- PSNR --------------------------------------------------------------------------------------------


def psnr_of(x_BCHW: Tensor, clean_BCHW: Tensor) -> Tensor:
    """PSNR of each image in dB with peak 1, (B,); 120 where there is no error."""
    error = (x_BCHW - clean_BCHW).square().mean(dim=(1, 2, 3)).clamp_min(1e-12)
    return -10 * error.log10()


def batch_size_of(images_NCHW: Tensor) -> int:
    """Images of a batch where nobody says how many: 100, fewer of more than 64 x 64 pixels."""
    return max(1, min(100, _BATCH_VALUES // images_NCHW[0].numel()))


def noised(
    images_NCHW: Tensor, sigma: float, seed: int = 0, start: int = 0, end: int | None = None
) -> tuple[Tensor, Tensor]:
    """Images `start` to `end` of uint8 ones, clean and noised, both float32 and neither clamped.

    The noise of an image is a function of (seed, its position) alone.
    """
    clean = images_NCHW[start:end].float() / 255
    keys = noise.image_keys(seed, 0, torch.arange(start, start + len(clean)))
    return clean, clean + sigma * noise.normal(keys, clean.shape[1:])


@torch.no_grad()
def _mean_psnr(
    images_NCHW: Tensor, sigma: float, seed: int, wash: Callable[[Tensor], Tensor], batch_size: int | None = None
) -> float:
    check_images(images_NCHW)
    size = batch_size_of(images_NCHW) if batch_size is None else batch_size
    values = []
    for start in range(0, len(images_NCHW), size):
        clean, x = noised(images_NCHW, sigma, seed, start, start + size)
        values.append(psnr_of(wash(x), clean))
    return float(torch.cat(values).mean())


def psnr(denoiser: Denoiser, images_NCHW: Tensor, sigma: float, seed: int = 0, batch_size: int | None = None) -> float:
    """Mean over images of the PSNR, in dB with peak 1, of images noised with `sigma` and denoised in one call.

    Args:
        images_NCHW: uint8, clean, not trained on.
        sigma: in image units.
        batch_size: images of a network call; by their size if None, 100 or fewer.

    Raises:
        InputError: images of another type or shape, or a sigma outside the denoiser's range.
    """
    device = device_of(denoiser)

    def wash(x_BCHW: Tensor) -> Tensor:
        level = torch.full((len(x_BCHW),), sigma, dtype=torch.float64)
        return denoiser(x_BCHW.to(device), level).clamp(0, 1).cpu()

    return _mean_psnr(images_NCHW, sigma, seed, wash, batch_size)


def jpeg_psnr(images_NCHW: Tensor, sigma: float, quality: int = 10, seed: int = 0) -> float:
    """The same for JPEG as the denoiser, on the same noise: what doing something cheap gives."""
    return _mean_psnr(images_NCHW, sigma, seed, lambda x: corruptions.jpeg(x.clamp(0, 1), quality))


def noised_psnr(images_NCHW: Tensor, sigma: float, seed: int = 0) -> float:
    """The same for doing nothing, on the same noise: of the noised images, clamped."""
    return _mean_psnr(images_NCHW, sigma, seed, lambda x: x.clamp(0, 1))


def blur_psnr_of(noised_BCHW: Tensor, clean_BCHW: Tensor) -> Tensor:
    """PSNR of each image after each Gaussian blur of `BLUR_WIDTHS`, (B, widths)."""
    side = min(noised_BCHW.shape[-2:])
    x = noised_BCHW.clamp(0, 1)
    values = []
    for width in BLUR_WIDTHS:
        kernel = min(2 * round(4 * width) + 1, 2 * side - 1)  # borders are mirrored, which a tiny image limits
        values.append(psnr_of(gaussian_blur(x, [kernel, kernel], [width, width]), clean_BCHW))
    return torch.stack(values, dim=1)


# -- spectra -----------------------------------------------------------------------------------------


def _ring_numbers(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    rings = min(height, width, 2 * _MOST_RINGS)
    _, index, count = np.unique(np.floor(radius * rings + 0.5).ravel(), return_inverse=True, return_counts=True)
    index = index.reshape(-1)
    return np.bincount(index, radius.ravel()) / count, count, index


def ring_frequencies(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean frequency of each ring of a spectrum, in cycles a pixel, and how many coefficients it has.

    Rings are one cycle per image side wide (per 128 pixels, for larger images), around multiples of that:
    the first is, for a square image, its mean. Those above 0.5 are the corners of the spectrum, diagonal only.
    """
    frequency, count, _ = _ring_numbers(height, width)
    return frequency, count


def residual_spectrum(x_BCHW: Tensor, clean_BCHW: Tensor | None = None) -> Tensor:
    """Radially averaged power spectral density of each image's error, float64 (B, rings).

    White noise of variance s^2 has s^2 in every ring, and Parseval holds: with the counts of
    `ring_frequencies`, sum(count * power) / (H * W) is the mean squared error. The transform takes images as
    periodic, without a window, so what does not meet at opposite borders shows as high frequencies.

    Args:
        x_BCHW: denoised images.
        clean_BCHW: what they should be; None for the spectrum of `x_BCHW` itself.
    """
    error = x_BCHW if clean_BCHW is None else x_BCHW.double() - clean_BCHW.double()
    return cross_spectrum(error, error)


def cross_spectrum(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Real part of the radially averaged cross-spectrum, float64 (B, rings), normalised likewise.

    That of (denoised, clean) over that of (clean, clean) is the share of the image that is kept.
    """
    height, width = a_BCHW.shape[-2:]
    _, count, index = _ring_numbers(height, width)
    a, b = (torch.fft.fft2(x.cpu().double()) for x in (a_BCHW, b_BCHW))
    power = (a * b.conj()).real.mean(dim=1).flatten(1) / (height * width)
    out = torch.zeros(len(power), len(count), dtype=torch.float64)
    return out.index_add_(1, torch.from_numpy(index), power) / torch.from_numpy(count)


# -- calibration -------------------------------------------------------------------------------------


def estimate(denoiser: Denoiser, x_BCHW: Tensor, sigma: float) -> Tensor:
    """x0 of one network call, unclipped, on the CPU."""
    level = torch.full((len(x_BCHW),), sigma, dtype=torch.float64)
    return denoiser(x_BCHW.to(device_of(denoiser)), level).float().cpu()


class Calibration(NamedTuple):
    """Of each image, float64 (B,), in squared image units but for `bias`; see `calibration`."""

    error: Tensor
    claimed: Tensor
    removed: Tensor
    sure: Tensor
    bias: Tensor


@torch.no_grad()
def calibration(
    denoiser: Denoiser,
    clean_BCHW: Tensor,
    noise_BCHW: Tensor,
    sigma: float,
    signs_BCHW: Tensor,
    x0_BCHW: Tensor | None = None,
) -> Calibration:
    """The error a denoiser makes, and the error it claims to make at noise `sigma`.

    Of x = x0 + sigma z the best denoiser D is the posterior mean, and its derivative is the posterior's
    covariance: Cov[x0 | x] = sigma^2 dD/dx (Efron 2011, "Tweedie's formula and selection bias"; Miyasawa
    1961). So any denoiser claims the mean squared error sigma^2 div D / d over d values, without being
    asked, and a calibrated one keeps to it. The divergence takes one random direction of signs b,
    b . (D(x + e b) - D(x)) / e (Hutchinson 1990; Ramani, Blu & Unser 2008), e = sigma / 20.

    Stein's estimate of the error (SURE, Stein 1981), |D(x) - x|^2 / d - sigma^2 + 2 sigma^2 div D / d, is
    unbiased for *every* denoiser: where it is not near the error, the probe is too noisy, not the denoiser
    bad. With it, a calibrated denoiser has removed + error = sigma^2: the noise it predicts, (x - D(x)) /
    sigma, has the variance 1 - error / sigma^2, and not 1, for what cannot be known it does not predict.
    Calibrated is not good: doing nothing claims an error of sigma, and makes it.

    Args:
        denoiser: takes batches of this shape.
        clean_BCHW, noise_BCHW: x0 and z.
        sigma: noise level in image units.
        signs_BCHW: -1 or 1, independent.
        x0_BCHW: D(x), unclipped, where it is known already; else it is computed.

    Returns:
        error |D(x) - x0|^2 / d, claimed sigma^2 div D / d, removed |x - D(x)|^2 / d, sure (all as above;
        claimed and sure can be negative for one image), and bias, the mean of D(x) - x0.
    """
    x = clean_BCHW + sigma * noise_BCHW
    x0 = estimate(denoiser, x, sigma) if x0_BCHW is None else x0_BCHW
    step = _PROBE * sigma
    moved = estimate(denoiser, x + step * signs_BCHW, sigma)

    def mean(value: Tensor) -> Tensor:
        return value.double().mean(dim=(1, 2, 3))

    claimed = sigma**2 * mean(signs_BCHW * (moved - x0)) / step
    removed = mean((x - x0).double().square())
    difference = (x0 - clean_BCHW).double()
    return Calibration(mean(difference.square()), claimed, removed, removed - sigma**2 + 2 * claimed, mean(difference))


@torch.no_grad()
def wrong_level_errors(
    denoiser: Denoiser, clean_BCHW: Tensor, noise_BCHW: Tensor, sigma: float, told: Sequence[float]
) -> Tensor:
    """Mean squared errors at noise `sigma` for a denoiser that is told another level, float64 (B, levels).

    A calibrated one does best when told the truth.
    """
    x = clean_BCHW + sigma * noise_BCHW
    return torch.stack(
        [(estimate(denoiser, x, level) - clean_BCHW).double().square().mean(dim=(1, 2, 3)) for level in told], dim=1
    )


class VarianceCalibration(NamedTuple):
    """Squared error of a step over the variance that it was given, of each image, float64 (B,)."""

    learned: Tensor
    lower: Tensor
    upper: Tensor


@torch.no_grad()
def variance_calibration(
    denoiser: Denoiser, clean_BCHW: Tensor, noise_BCHW: Tensor, sigma: float, sigma_below: float
) -> VarianceCalibration | None:
    """Whether a learned variance is the error that a sampling step really makes.

    The true x' at the level below, given x and x0, is normal with the posterior's variance (the lower
    bound), and the step's own mean misses the true mean by (1 - sigma'^2 / sigma^2) (D(x) - x0), D clipped
    as a sampler does. Their sum is the squared error to be expected; over the variance predicted for that
    pixel (improved-diffusion, Eq. 15) its mean is 1 for a calibrated denoiser, above 1 for one too sure.

    Args:
        sigma, sigma_below: two levels of the denoiser's own schedule, in image units, sigma_below > 0.

    Returns:
        The mean over pixels for the learned variance and, to compare, for either bound in its place; None
        for a denoiser that learned none.
    """
    x = clean_BCHW + sigma * noise_BCHW
    level = torch.full((len(x),), sigma, dtype=torch.float64)
    x0, fraction = denoiser.predict(x.to(device_of(denoiser)), level)
    if fraction is None:
        return None
    lower, upper = (
        float(b) for b in posterior_log_variance_bounds(*torch.tensor([sigma, sigma_below], dtype=torch.float64))
    )
    miss = (1 - (sigma_below / sigma) ** 2) * (x0.cpu().double().clamp(0, 1) - clean_BCHW)
    realised = float(np.exp(lower)) + miss.square()
    v = fraction.cpu().double()
    learned = (realised * (-(v * upper + (1 - v) * lower)).exp()).mean(dim=(1, 2, 3))
    mean = realised.mean(dim=(1, 2, 3))
    return VarianceCalibration(learned, mean * float(np.exp(-lower)), mean * float(np.exp(-upper)))


# -- poisoned images ---------------------------------------------------------------------------------


class Removed(NamedTuple):
    """Of each image, float64 (B,); see `removed_energy`."""

    clean: Tensor
    poisoned: Tensor
    perturbation: Tensor
    remaining: Tensor
    distance: Tensor


def removed_energy(
    clean_BCHW: Tensor, poisoned_BCHW: Tensor, washed_clean_BCHW: Tensor, washed_poisoned_BCHW: Tensor
) -> Removed:
    """What a denoiser takes from images and from the same images poisoned, both noised with the same noise.

    Returns:
        clean, poisoned: root mean square of image minus washed image, in image units;
        perturbation: the same of delta = poisoned - clean;
        remaining: <P - C, delta> / |delta|^2 with P and C the washed images: the share of the perturbation
            that is still there, 0 when it is gone, and NaN where there is none;
        distance: |P - C| / |delta|, all that the perturbation still does to the image; NaN likewise.
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


def _values(values: Tensor | Sequence[float], what: str) -> NDArray[np.float64]:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float64)
    if array.ndim != 1 or not len(array) or np.isnan(array).any():
        raise InputError(f"{what} must be a list of one or more numbers, without NaN. Got shape {array.shape}.")
    return array


def auc(negative: Tensor | Sequence[float], positive: Tensor | Sequence[float]) -> float:
    """P(positive > negative) + P(positive = negative) / 2 over all pairs: the exact area under the ROC curve.

    It is Mann and Whitney's U (1947) over the number of pairs: 0.5 tells nothing apart, 1 everything.

    Raises:
        InputError: either is empty, holds NaN, or is no list of numbers.
    """
    low, high = np.sort(_values(negative, "negative")), _values(positive, "positive")
    # twice the wins, so that sums stay integers and exact
    wins = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(wins.sum(dtype=np.int64) / (2 * len(low) * len(high)))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[index]


def rank_correlation(a: Tensor | Sequence[float], b: Tensor | Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where all of one are the same."""
    ranks: list[NDArray[np.float64]] = [_ranks(_values(x, "values")) for x in (a, b)]
    centred = [r - r.mean() for r in ranks]
    norm = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / norm) if norm > 0 else None
