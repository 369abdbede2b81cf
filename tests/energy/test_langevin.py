"""Langevin dynamics: the formula, the distribution it draws from, what it leaves alone, and energies an image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from purifyloader.core import noise
from purifyloader.energy import EnergyConfig, EnergyNetwork, image_energies, langevin, walk
from purifyloader.energy.walking import STEP_SIZE, TEMPERATURE, energy_gradient
from purifyloader.errors import ConfigError, PurifyError


def network(seed: int = 0, **changes: Any) -> EnergyNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EnergyNetwork(EnergyConfig(**{"channels": 4, **changes})).requires_grad_(False)


def images(count: int = 3, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def draws(x: Tensor) -> Any:
    keys = noise.image_keys(0, 0, torch.arange(len(x)))
    return lambda step: noise.normal(keys, x.shape[1:], step).to(x.dtype)


def test_a_step_against_float64_by_hand():
    """The slope by central differences of the energy alone, the rest in numpy."""
    energy, x = network().double(), images(2).double()
    z = draws(x)(0)
    got = langevin(energy, x, 1, lambda step: z, step_size=0.01, temperature=1e-3)
    rng = np.random.default_rng(0)
    for b, c, i, j in zip(*(rng.integers(0, n, 40) for n in x.shape), strict=True):
        h, up, down = 1e-6, x.clone(), x.clone()
        up[b, c, i, j] += h
        down[b, c, i, j] -= h
        slope = float(energy(up)[b] - energy(down)[b]) / (2 * h)
        want = float(x[b, c, i, j]) - 0.01**2 / 2 * slope / 1e-3 + 0.01 * float(z[b, c, i, j])
        assert float(got[b, c, i, j]) == pytest.approx(want, abs=1e-8)


def test_the_published_form_on_minus_one_to_one_is_the_same():
    """x <- x - eps^2 / 2 * grad(E(x) / T) + eps * z with eps = 0.0125 on images in [-1, 1]."""
    energy, x = network().double(), images().double()
    y = (2 * x - 1).requires_grad_(True)
    (gradient,) = torch.autograd.grad((energy((y + 1) / 2) / 1e-4).sum(), y)
    z = draws(x)
    published = y.detach() - 0.0125**2 / 2 * gradient + 0.0125 * z(0)
    got = langevin(energy, x, 1, z)
    torch.testing.assert_close(got, (published + 1) / 2, rtol=0, atol=1e-13)
    assert (STEP_SIZE, TEMPERATURE) == (0.00625, 1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_a_gaussian_energy_draws_its_gaussian(temperature):
    """p(x) ~ exp(-E / T): mean and variance, and no correlation of neighbours."""
    mean, variance = 0.4, 0.02
    chains = torch.full((400, 1, 4, 4), 0.5, dtype=torch.float64)
    size = 0.05

    def energy(x: Tensor) -> Tensor:
        return temperature * (x - mean).square().flatten(1).sum(1) / (2 * variance)

    keys = noise.image_keys(3, 0, torch.arange(len(chains)))
    x = langevin(
        energy,
        chains,
        400,
        lambda step: noise.normal(keys, chains.shape[1:], step).double(),
        step_size=size,
        temperature=temperature,
    )
    count = x.numel()
    # steps of finite size widen the distribution by this much, exactly
    widened = variance / (1 - size**2 / (4 * variance))
    assert float(x.mean()) == pytest.approx(mean, abs=4 * math.sqrt(widened / count))
    assert float(x.var()) == pytest.approx(widened, rel=4 * math.sqrt(2 / count))
    flat = (x - x.mean()).flatten(1)
    assert abs(float((flat[:, 0] * flat[:, 1]).mean()) / widened) < 4 / math.sqrt(len(flat))


def test_without_noise_the_energy_falls_at_each_step():
    energy, x = network().double(), images(5).double()
    steps = walk(energy, x, 50, None, step_size=1e-3, temperature=1e-3)
    energies = [energy(x), *(energy(y) for y in steps)]
    falls = torch.stack(energies).diff(dim=0)
    assert bool((falls < 0).all())


def test_a_walk_gives_every_step_and_langevin_the_last():
    energy, x = network(), images()
    steps = list(walk(energy, x, 4, draws(x)))
    assert len(steps) == 4
    torch.testing.assert_close(langevin(energy, x, 4, draws(x)), steps[-1], rtol=0, atol=0)
    torch.testing.assert_close(langevin(energy, x, 3, draws(x)), steps[2], rtol=0, atol=0)


def test_nothing_is_kept_over_steps_and_the_weights_get_no_gradient():
    energy, x = network().requires_grad_(True), images()
    before = x.clone()
    with torch.no_grad():
        steps = list(walk(energy, x, 3, draws(x)))
    assert not any(y.requires_grad for y in steps)
    assert all(p.grad is None for p in energy.parameters())
    assert torch.equal(x, before)
    assert torch.is_grad_enabled()


def test_in_inference_mode_it_is_the_same_walk():
    energy, x = network(), images()
    expected = langevin(energy, x, 3, draws(x))
    with torch.inference_mode():
        torch.testing.assert_close(langevin(energy, x.clone(), 3, draws(x)), expected, rtol=0, atol=0)


def test_with_gradients_the_whole_walk_is_differentiable():
    class Smooth(nn.Module):
        """ReLU has no second derivative to speak of."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 3, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(3 * (x * self.weight).flatten(1).sum(1))

    x = images(2, 2).double().requires_grad_(True)
    z = draws(x)

    def function(y: Tensor) -> Tensor:
        return langevin(Smooth(), y, 3, z, step_size=0.3, temperature=0.1)

    assert torch.autograd.gradcheck(function, (x,))
    (gradient,) = torch.autograd.grad(
        langevin(network().double(), x.repeat(1, 1, 2, 2), 2, draws(x.repeat(1, 1, 2, 2))).sum(), x
    )
    assert bool(gradient.isfinite().all())


def test_an_empty_batch_stays_one():
    x = images()[:0]
    assert langevin(network(), x, 2, draws(x)).shape == x.shape


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": -1}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1e-4}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"step_size": 0}, "step_size"),
        ({"step_size": "0.1"}, "step_size"),
    ],
)
def test_bad_numbers_are_named(options, word):
    with pytest.raises(ConfigError, match=f"^{word} must be .* Got "):
        langevin(network(), images(), **{"steps": 2, "noise": None, **options})


def test_a_broken_energy_is_an_error():
    broken = network()
    broken.readout.weight.fill_(math.nan)
    with pytest.raises(PurifyError, match="that are NaN after 2"):
        langevin(broken, images(), 2, None)
    with pytest.raises(PurifyError, match=r"^Energies must be finite. Got nan for image 0 of 3"):
        image_energies(broken, images())
    steep = network()
    steep.readout.weight.mul_(1e9)
    with pytest.raises(PurifyError, match="the energy is not one that images were trained"):
        langevin(steep, images(), 2, None)


# -- energies ----------------------------------------------------------------------------------------


def test_an_energy_is_the_same_number_in_any_company():
    energy, x = network(channels=8), images(40)
    whole = image_energies(energy, x, 16)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, energy(x))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(image_energies(energy, x[order], 16), whole[order])
    for row in (0, 17, 39):
        assert torch.equal(image_energies(energy, x[row : row + 1], 16), whole[row : row + 1])
    channels_last = x.to(memory_format=torch.channels_last)
    assert torch.equal(image_energies(energy, channels_last, 16), whole)
    assert image_energies(energy, x[:0]).shape == (0,)


def test_bfloat16_keeps_differences_of_energies():
    """The mean and the readout are in float32, whatever the blocks are in: differences survive a large mean."""
    energy, x = network(channels=8), images(30, 16)
    exact = energy.double()(x.double())
    got = energy.to(torch.bfloat16)(x)
    assert got.dtype == torch.float32
    assert float((got.to(torch.bfloat16).float() != got).double().mean()) > 0.9
    assert np.corrcoef(got.numpy(), exact.numpy())[0, 1] > 0.99


def test_the_gradient_is_of_the_input_only():
    energy, x = network().requires_grad_(True), images()
    gradient = energy_gradient(energy, x)
    assert gradient.shape == x.shape
    assert not gradient.requires_grad
    alone = torch.cat([energy_gradient(energy, x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(gradient, alone)
