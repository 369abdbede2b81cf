"""Samplers against the variance-preserving ones of the papers, written here in numpy and float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.diffusion.denoiser import Denoiser, NetworkDenoiser
from purifyloader.diffusion.samplers import SAMPLERS, ancestral, ddim
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule, spaced_sigmas
from purifyloader.diffusion.unet import UNet
from purifyloader.errors import InputError
from tests.conftest import random_images, tiny_network

COUNT, SIZE = 3, 8
KEYS = noise.image_keys(0, 0, range(COUNT))


def z(step: int) -> Tensor:
    return noise.normal(KEYS, (3, SIZE, SIZE), step)


def x0() -> Tensor:
    return random_images(COUNT, SIZE).float() / 255


# -- the papers' sampler: Ho et al. 2020, Nichol & Dhariwal 2021; timesteps count from 1 -------------------


def cosine_betas(T: int) -> np.ndarray:
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    return np.array([min(1 - f[t] / f[t - 1], 0.999) for t in range(1, T + 1)])


def linear_betas(T: int) -> np.ndarray:
    return np.linspace(1e-4, 0.02, T)


class VariancePreserving:
    """The chain over the timesteps `used` of T, with its betas computed anew (Sec. 4)."""

    def __init__(self, betas: np.ndarray, used: list[int], network: UNet) -> None:
        abar = np.cumprod(1 - betas)[np.array(used) - 1]
        self.used, self.T, self.network = used, len(betas), network
        self.abar, self.abar_below = abar, np.concatenate([[1.0], abar[:-1]])
        self.beta = 1 - self.abar / self.abar_below
        self.beta_tilde = (1 - self.abar_below) / (1 - self.abar) * self.beta
        if len(used) > 1:
            self.beta_tilde[0] = self.beta_tilde[1]

    def start(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        return math.sqrt(self.abar[-1]) * (2 * x - 1) + math.sqrt(1 - self.abar[-1]) * z

    def estimate(self, x: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        time = torch.full((len(x),), (self.used[i] - 1) * 1000 / self.T)
        out = self.network(torch.from_numpy(x), time).numpy()
        eps, v = (out, None) if out.shape[1] == 3 else (out[:, :3], (out[:, 3:] + 1) / 2)
        x0 = (x - math.sqrt(1 - self.abar[i]) * eps) / math.sqrt(self.abar[i])
        return x0.clip(-1, 1), v

    def ancestral(self, x: np.ndarray, draws: Callable[[int], Tensor]) -> np.ndarray:
        for step, i in enumerate(reversed(range(len(self.used)))):
            x0, v = self.estimate(x, i)
            of_x0 = math.sqrt(self.abar_below[i]) * self.beta[i] / (1 - self.abar[i])
            of_x = math.sqrt(1 - self.beta[i]) * (1 - self.abar_below[i]) / (1 - self.abar[i])
            low, high = math.log(self.beta_tilde[i]), math.log(self.beta[i])
            variance = np.exp(low if v is None else v * high + (1 - v) * low)
            x = of_x0 * x0 + of_x * x
            if i > 0:
                x = x + np.sqrt(variance) * draws(step).numpy().astype(np.float64)
        return (x + 1) / 2

    def ddim(self, x: np.ndarray) -> np.ndarray:
        for i in reversed(range(len(self.used))):
            x0, _ = self.estimate(x, i)
            eps = (x - math.sqrt(self.abar[i]) * x0) / math.sqrt(1 - self.abar[i])
            x = math.sqrt(self.abar_below[i]) * x0 + math.sqrt(1 - self.abar_below[i]) * eps
        return (x + 1) / 2


CASES = {
    "cosine 4000, each of 12": (CosineSchedule(4000), cosine_betas(4000), list(range(1, 13))),
    "cosine 4000, 10 of 100": (CosineSchedule(4000), cosine_betas(4000), list(range(10, 101, 10))),
    "cosine 4000, 2 of 200": (CosineSchedule(4000), cosine_betas(4000), [100, 200]),
    "linear 1000, each of 10": (LinearSchedule(1000), linear_betas(1000), list(range(1, 11))),
}
# in [0, 1]. Measured: 9e-13 and 9e-7 over 100 steps, 1e-7 over 2. An index off by one gives 2e-4.
BOUNDS = {torch.float64: 1e-11, torch.float32: 3e-6}


@pytest.mark.parametrize(
    ("learned", "dtype"),
    [(True, torch.float64), (False, torch.float64), (True, torch.float32)],
    ids=["learned-float64", "fixed-float64", "learned-float32"],
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
@torch.no_grad()
def test_parity_with_the_variance_preserving_form(sampler, case, learned, dtype):
    schedule, betas, used = CASES[case]
    reference = VariancePreserving(betas, used, tiny_network(learned_variance=learned).double())
    start = reference.start(x0().double().numpy(), z(1000).double().numpy())
    expected = reference.ancestral(start, z) if sampler == "ancestral" else reference.ddim(start)

    denoiser = NetworkDenoiser(tiny_network(learned_variance=learned).to(dtype), "epsilon", (1e-4, 10.0), schedule)
    sigmas = spaced_sigmas(schedule, used[-1], len(used))
    noised = x0().to(dtype) + sigmas[0] * z(1000).to(dtype)
    got = SAMPLERS[sampler](denoiser, noised, sigmas, z)

    error = np.abs(got.double().numpy() - expected).max()
    print(f"{sampler}, {case}, learned={learned}, {dtype}: {error:.1e}")
    assert error < BOUNDS[dtype]
    assert np.abs(expected - x0().numpy()).max() > 0.01  # there is something to agree on


def test_leaving_out_the_learned_variance_would_show():
    """The parity above can see v: it moves the image by a thousand times the bound."""
    schedule, _, used = CASES["cosine 4000, 10 of 100"]
    sigmas = spaced_sigmas(schedule, used[-1], len(used))
    denoiser = NetworkDenoiser(tiny_network(learned_variance=True), "epsilon", (1e-4, 10.0), schedule)
    noised = x0() + sigmas[0] * z(1000)
    with torch.no_grad():
        with_v = ancestral(denoiser, noised, sigmas, z)
        predict = denoiser.predict
        denoiser.predict = lambda x, sigma: (predict(x, sigma)[0], None)
        assert (ancestral(denoiser, noised, sigmas, z) - with_v).abs().max() > 1e-4


# -- what a sampler does to a denoiser --------------------------------------------------------------------


class Scripted(Denoiser):
    """Answers with a fixed image and a fixed variance fraction; notes what it was asked."""

    sigma_range = (0.0, 10.0)

    def __init__(self, answer: Tensor, fraction: Tensor | None = None) -> None:
        super().__init__()
        self.answer, self.fraction = answer, fraction
        self.asked: list[tuple[Tensor, Tensor]] = []

    def predict(self, x_BCHW: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor | None]:
        self.asked.append((x_BCHW, sigma_B))
        return self.answer, self.fraction


@pytest.mark.parametrize("sampler", [ancestral, ddim])
def test_one_call_is_the_clipped_denoiser(sampler, denoiser):
    noised = 4 * x0() - 1.5 + 0.3 * z(0)
    answer = denoiser(noised, torch.full((COUNT,), 0.3, dtype=torch.float64))
    assert answer.min() < 0
    assert answer.max() > 1

    def never(step: int) -> Tensor:
        raise AssertionError(f"noise({step}) was asked for")

    torch.testing.assert_close(sampler(denoiser, noised, (0.3, 0.0), never), answer.clamp(0, 1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("sampler", [ancestral, ddim])
def test_each_level_is_visited_once(sampler):
    scripted = Scripted(torch.full((COUNT, 3, SIZE, SIZE), 0.4))
    steps: list[int] = []
    out = sampler(scripted, x0(), (0.3, 0.2, 0.05, 0.0), lambda step: (steps.append(step), z(step))[1])
    assert [sigma.tolist() for _, sigma in scripted.asked] == [[level] * COUNT for level in (0.3, 0.2, 0.05)]
    torch.testing.assert_close(out, scripted.answer)
    assert steps == ([0, 1] if sampler is ancestral else [])


@pytest.mark.parametrize("sampler", [ancestral, ddim])
def test_every_estimate_is_clipped(sampler):
    wild = torch.full((COUNT, 3, SIZE, SIZE), 7.0)
    tame = Scripted(wild.clamp(0, 1))
    sigmas = (0.3, 0.2, 0.0)
    scripted = Scripted(wild)
    assert torch.equal(sampler(scripted, x0(), sigmas, z), sampler(tame, x0(), sigmas, z))
    assert torch.equal(scripted.asked[1][0], tame.asked[1][0])


@pytest.mark.parametrize("fraction", [None, 0.0, 0.3, 1.0])
def test_one_ancestral_step_is_the_posterior(fraction):
    """Mean and variance of x' given x and x0 by Gaussian conditioning, in image units."""
    sigma, below = 0.3, 0.2
    v = None if fraction is None else torch.full((COUNT, 3, SIZE, SIZE), fraction)
    scripted = Scripted(x0(), v)
    x = x0() + sigma * z(5)
    ancestral(scripted, x, (sigma, below, 0.0), z)
    # x' = x0 + below a and x = x' + sqrt(sigma^2 - below^2) b: precisions add
    precision = 1 / below**2 + 1 / (sigma**2 - below**2)
    mean = (x0() / below**2 + x / (sigma**2 - below**2)) / precision
    lowest = 1 / precision
    # beta / abar(below), with beta = 1 - abar/abar(below) and abar = 1/(1 + (2 sigma)^2), over 2^2
    highest = (1 - (1 + 4 * below**2) / (1 + 4 * sigma**2)) * (1 + 4 * below**2) / 4
    variance = highest ** (fraction or 0.0) * lowest ** (1 - (fraction or 0.0))
    torch.testing.assert_close(scripted.asked[1][0], mean + math.sqrt(variance) * z(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", [ancestral, ddim])
@pytest.mark.parametrize(
    "sigmas", [(), (0.0,), (0.1,), (0.1, 0.05), (0.1, 0.1, 0.0), (0.1, 0.2, 0.0), (0.1, 0.0, 0.0), (0.1, math.nan, 0.0)]
)
def test_levels_fall_and_end_in_zero(sampler, sigmas, denoiser):
    with pytest.raises(InputError, match="fall strictly and end in 0"):
        sampler(denoiser, x0(), sigmas, z)


def test_the_registry():
    assert {"ancestral": ancestral, "ddim": ddim} == SAMPLERS
