"""Compute the losses that a denoiser is trained to minimise, one value an image.

`hybrid_loss` is ECLIPSE's Eq. 8 (improved-diffusion, Sec. 3.1): discrete timesteps, predicted noise, learned variance.
`sigma_loss` is the same regression over continuous sigma, for a network without timesteps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from purifyloader.diffusion.denoiser import PARAMETERIZATIONS, Denoiser, NetworkDenoiser
from purifyloader.diffusion.schedule import Schedule
from purifyloader.errors import ConfigError, InputError

__all__ = ["hybrid_loss", "posterior_log_variance_bounds", "sigma_loss", "vlb_terms"]


def posterior_log_variance_bounds(sigma: Tensor, sigma_below: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of the log variance of x(t-1) given x(t), in image units, float64.

    In this library's scaling (x = x0 + sigma * noise) the lower bound, the posterior's variance, is sigma'^2 (sigma^2 -
    sigma'^2) / sigma^2 with sigma' the level below; the upper bound is improved-diffusion's beta. Both are those of the
    variance-preserving form divided by abar(t-1).
    """
    sigma, below = sigma.to(torch.float64), sigma_below.to(torch.float64)
    drop = (sigma**2 - below**2).log()
    lower = 2 * below.log() + drop - 2 * sigma.log()
    upper = torch.log1p(4 * below**2) + drop - torch.log1p(4 * sigma**2)
    return lower, upper


def _log_cdf_difference(low: Tensor, high: Tensor) -> Tensor:
    """log(Phi(high) - Phi(low)) for low < high, without cancelling in either tail."""
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    # log(e^a - e^b) = a + log(1 - e^(b - a)); where both bounds are so near that the difference
    # vanishes the smallest normal number stands for it
    gap = (-torch.expm1(log_low - log_high)).clamp_min(torch.finfo(low.dtype).tiny)
    return log_high + gap.log()


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of an 8-bit value x under N(mean, e^(2 log_scale)) integrated over its bin, image units."""
    inverse = (-log_scale).exp()
    half_bin = 0.5 / 255
    low = torch.where(x < 0.5 / 255, -math.inf, (x - mean - half_bin) * inverse)
    high = torch.where(x > 1 - 0.5 / 255, math.inf, (x - mean + half_bin) * inverse)
    low, high = low.clamp(-1e4, 1e4), high.clamp(-1e4, 1e4)
    return _log_cdf_difference(low, high)


def vlb_terms(
    x0_BCHW: Tensor, noise_BCHW: Tensor, x0_hat_BCHW: Tensor, fraction_BCHW: Tensor, t_B: Tensor, schedule: Schedule
) -> Tensor:
    """Compute the variational term L_t of each image, in bits a dimension, (B,).

    t = 1 is the decoder's likelihood of the 8-bit image, t > 1 the KL divergence between the true and the predicted
    step. Gradients reach the variance fraction and not the mean (improved-diffusion, Sec. 3.1): pass `x0_hat` detached.
    """
    t = t_B.detach().cpu().numpy()
    device = x0_BCHW.device

    def column(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")[:, None, None, None].to(device)

    sigma, below = column(schedule.sigma(t)), column(schedule.sigma(t - 1))
    # at t = 1 the posterior is a point; as published, its log variance is read at t = 2
    two, one = (column(schedule.sigma(t.clip(min=2) - k)) for k in (0, 1))
    lower, _ = posterior_log_variance_bounds(two, one)
    _, upper = posterior_log_variance_bounds(sigma, below)
    dtype = x0_BCHW.dtype
    log_variance = (fraction_BCHW * upper + (1 - fraction_BCHW) * lower).to(dtype)
    ratio = (below / sigma) ** 2
    x_t = x0_BCHW + sigma.to(dtype) * noise_BCHW
    true_mean, mean = (x0 + ratio.to(dtype) * (x_t - x0) for x0 in (x0_BCHW, x0_hat_BCHW))
    # KL(N(true_mean, e^lower) || N(mean, e^log_variance)), elementwise, in nats
    low = lower.to(dtype)
    distance = (true_mean - mean) ** 2 * (-log_variance).exp()
    kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + distance)
    decoder = -_discretized_log_likelihood(x0_BCHW, mean, log_variance / 2)
    nats = torch.where((t_B == 1)[:, None, None, None].to(device), decoder, kl)
    return nats.mean(dim=(1, 2, 3)) / math.log(2.0)


def hybrid_loss(
    denoiser: NetworkDenoiser,
    x0_BCHW: Tensor,
    t_B: Tensor,
    noise_BCHW: Tensor,
    gamma: float = 0.001,
    schedule: Schedule | None = None,
    timesteps: int | None = None,
) -> Tensor:
    """L_simple + gamma * sum over t of L_t, estimated from one timestep an image, (B,) (ECLIPSE, Eq. 8).

    L_simple is the squared error of the noise, whatever the network predicts; a network without learned variance has no
    other term. Eq. 8 sums over all timesteps, so the term of the one drawn, in 1..`timesteps`, is multiplied by their
    number. schedule and timesteps are the denoiser's if None.
    """
    schedule = denoiser.schedule if schedule is None else schedule
    if schedule is None:
        raise ConfigError("hybrid_loss needs a schedule, the denoiser's or its own. Got neither: give schedule=.")
    timesteps = int(schedule.timesteps) if timesteps is None else timesteps
    if not bool(((t_B >= 1) & (t_B <= timesteps)).all()):
        raise InputError(f"Timesteps count from 1 to {timesteps}. Got {t_B.min()} to {t_B.max()}.")
    sigma_B = torch.from_numpy(schedule.sigma(t_B.detach().cpu().numpy()))
    sigma = sigma_B.to(x0_BCHW.device, x0_BCHW.dtype)[:, None, None, None]
    x0_hat, fraction = denoiser.apply_network(x0_BCHW + sigma * noise_BCHW, sigma_B, denoiser.time(sigma_B))
    # for a network that predicts the noise x0_hat = x - sigma * prediction, so this is its error
    simple = (((x0_hat - x0_BCHW) / sigma) ** 2).mean(dim=(1, 2, 3))
    if fraction is None:
        return simple
    vlb = vlb_terms(x0_BCHW, noise_BCHW, x0_hat.detach(), fraction, t_B, schedule)
    return simple + gamma * timesteps * vlb


def sigma_loss(
    denoiser: NetworkDenoiser,
    x0_BCHW: Tensor,
    sigma_B: Tensor,
    noise_BCHW: Tensor,
    teacher: Denoiser | None = None,
) -> Tensor:
    """Squared error of the denoised image in [-1, 1], over c_out^2, (B,).

    The weight makes the network's own target unit variance at every sigma (Karras et al. 2022, Sec. 5). With a teacher
    its estimate from the same noised image takes the place of the clean image (distillation; Hinton et al. 2015,
    arXiv:1503.02531): with a perfect teacher both have one minimum, and this one less noise in its gradients.
    """
    sigma = sigma_B.to(x0_BCHW)[:, None, None, None]
    noised = x0_BCHW + sigma * noise_BCHW
    if teacher is not None:
        with torch.no_grad():
            x0_BCHW = teacher(noised, sigma_B)
    x0_hat = denoiser(noised, sigma_B)
    c_out = PARAMETERIZATIONS[denoiser.parameterization](2 * sigma)[1]
    return ((2 * (x0_hat - x0_BCHW) / c_out) ** 2).mean(dim=(1, 2, 3))
