"""From a noised image to a clean one: one function a sampler, all over a falling list of noise levels.

A sampler takes `x = x0 + sigmas[0] * noise` and `sigmas`, which falls and ends in 0. It calls the
network once a level (NFE = len(sigmas) - 1), clips each estimate of x0 to [0, 1], and asks `noise(step)`
for fresh standard normals. `sigmas = (sigma, 0)` is one call for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.objective import posterior_log_variance_bounds
from purifyloader.errors import InputError

__all__ = ["SAMPLERS", "Sampler", "ancestral", "ddim"]

Sampler = Callable[[Denoiser, Tensor, Sequence[float], Callable[[int], Tensor]], Tensor]


def _check(sigmas: Sequence[float]) -> None:
    if len(sigmas) < 2 or sigmas[-1] != 0 or any(not a > b for a, b in pairwise(sigmas)):
        raise InputError(f"Noise levels must fall strictly and end in 0. Got {list(sigmas)}.")


def _constant(value: float, x_BCHW: Tensor) -> Tensor:
    return torch.full((x_BCHW.shape[0],), value, dtype=torch.float64, device="cpu")


def ancestral(denoiser: Denoiser, x_BCHW: Tensor, sigmas: Sequence[float], noise: Callable[[int], Tensor]) -> Tensor:
    """Ancestral (DDPM) sampling with the learned variance (ECLIPSE, Algorithm 1 and Eqs. 9-12).

    Eq. 10 gives a variance, so its square root scales the noise. Without a learned variance the lower bound, the
    posterior's own, is used. The last step adds no noise. Levels skipped are stepped over by the posterior between the
    two that are visited (Nichol & Dhariwal 2021, Sec. 4).
    """
    _check(sigmas)
    for step, (sigma, below) in enumerate(pairwise(sigmas)):
        x0, fraction = denoiser.predict(x_BCHW, _constant(sigma, x_BCHW))
        x0 = x0.clamp(0, 1)
        if below == 0:
            return x0
        lower, upper = (
            float(b)
            for b in posterior_log_variance_bounds(*torch.tensor([sigma, below], dtype=torch.float64, device="cpu"))
        )
        log_variance = torch.full_like(x0, lower) if fraction is None else fraction * upper + (1 - fraction) * lower
        mean = x0 + (below / sigma) ** 2 * (x_BCHW - x0)
        x_BCHW = mean + (log_variance / 2).exp() * noise(step)
    raise AssertionError("unreachable: the levels end in 0")


def ddim(denoiser: Denoiser, x_BCHW: Tensor, sigmas: Sequence[float], noise: Callable[[int], Tensor]) -> Tensor:
    """Deterministic sampling (Song et al. 2021, DDIM with eta = 0): the noise left is scaled, none is added."""
    _check(sigmas)
    for sigma, below in pairwise(sigmas):
        x0 = denoiser(x_BCHW, _constant(sigma, x_BCHW)).clamp(0, 1)
        x_BCHW = x0 + (below / sigma) * (x_BCHW - x0)
    return x_BCHW


SAMPLERS: dict[str, Sampler] = {"ancestral": ancestral, "ddim": ddim}
