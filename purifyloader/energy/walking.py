"""Walk downhill in energy, with noise: Langevin dynamics (PureGen, Eq. 4; Bhat et al. 2024, arXiv:2405.18627).

One step on images in [0, 1], with s the `step_size` and T the `temperature`:

    x <- x - s^2 / 2 * grad E(x) / T + s * z,        z standard normal

so `step_size` is the noise that a step adds, in image units. The paper writes Eq. 4 with a step of time dt =
s^2 / 2; the published code writes it on images in [-1, 1], where its eps is 2 s and the formula is the same. Nothing
is clamped on the way. The walk draws from p(x) proportional to exp(-E(x) / T), in the limit of small steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from purifyloader.core import limits
from purifyloader.core.checks import check_integer, check_number
from purifyloader.errors import PurifyError

__all__ = ["FAR", "STEP_SIZE", "TEMPERATURE", "Energy", "check_dynamics", "energy_gradient", "langevin", "walk"]

STEP_SIZE = 0.00625  # PureGen's: eps = 0.0125 on images in [-1, 1]; 1.6 px of noise a step
TEMPERATURE = 1e-4  # PureGen's: the number that an energy is divided by
FAR = 10.0  # image units from the middle grey: no image is out there, and a walk that gets there has run away
_STEP_MOST, _SCALE = 100, 1e30  # beyond these a step has no number

Energy = Callable[[Tensor], Tensor]
"""`energy(x_BCHW) -> energy_B`, differentiable; `purifyloader.energy.EnergyNetwork` is one."""


def check_dynamics(steps: int = 1, step_size: float = STEP_SIZE, temperature: float = TEMPERATURE) -> None:
    """Raise `ConfigError` unless these are a number of steps, a step size and a temperature."""
    check_integer("steps", steps, 1, limits.STEPS, unit="the number of Langevin steps")
    check_number("step_size", step_size, above=0, high=_STEP_MOST, unit="the noise that a step adds, in image units")
    check_number("temperature", temperature, low=1 / _SCALE, high=_SCALE, unit="which divides the energy")


def energy_gradient(energy: Energy, x_BCHW: Tensor, create_graph: bool = False) -> Tensor:
    """Compute the gradient of each image's energy, (B, C, H, W); of the weights none is computed.

    Args:
        create_graph: make it differentiable in `x_BCHW`, which must then require a gradient.
    """
    # a caller's inference_mode would record nothing, and its tensors would take no gradient
    with torch.inference_mode(False), torch.enable_grad():
        x = x_BCHW if create_graph else x_BCHW.detach().clone().requires_grad_(True)
        # images share no energy, so the gradient of the sum is each image's own
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=create_graph)
    return gradient


def walk(
    energy: Energy,
    x_BCHW: Tensor,
    steps: int,
    noise: Callable[[int], Tensor] | None,
    *,
    step_size: float = STEP_SIZE,
    temperature: float = TEMPERATURE,
) -> Iterator[Tensor]:
    """Yield the images after each of `steps` Langevin steps; `PurifyError` where they become NaN or run away.

    Nothing of a step is kept for the next but the images, unless gradients of them are wanted: where torch records
    them and the images require one, the whole walk is differentiable, and its memory grows with its length.

    Args:
        x_BCHW: float images in [0, 1], or from an earlier walk.
        noise: `noise(step)` gives standard normals like `x_BCHW` for the steps 0, 1, ...; None walks downhill without.
        step_size: s, in image units.
        temperature: T.

    >>> import torch
    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork, walk
    >>> images = torch.full((1, 3, 8, 8), 0.5)
    >>> [x.shape[0] for x in walk(EnergyNetwork(EnergyConfig(channels=4)), images, 3, noise=None)]
    [1, 1, 1]
    """
    check_dynamics(steps, step_size, temperature)
    slope = step_size**2 / 2 / temperature
    x = x_BCHW
    for step in range(steps):
        differentiable = torch.is_grad_enabled() and x.requires_grad
        x = x - slope * energy_gradient(energy, x, differentiable)
        if noise is not None:
            x = x + step_size * noise(step)
        yield x
    if not bool((x.detach() - 0.5).abs().max() <= FAR if x.numel() else True):
        values = f"from {float(x.min()):.3g} to {float(x.max()):.3g}" if not bool(x.isnan().any()) else "that are NaN"
        raise PurifyError(
            f"Langevin steps must leave images about [0, 1]. Got values {values} after {steps} of "
            f"{255 * step_size:.3g} px at temperature {temperature:g}: the energy is not one that images were trained "
            "into. Give another energy model, smaller steps or a higher temperature."
        )


def langevin(
    energy: Energy, x_BCHW: Tensor, steps: int, noise: Callable[[int], Tensor] | None, **dynamics: float
) -> Tensor:
    """Return the images at the end of a `walk`, which has the same arguments.

    >>> import torch
    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork, langevin
    >>> images = torch.full((1, 3, 8, 8), 0.5)
    >>> langevin(EnergyNetwork(EnergyConfig(channels=4)), images, 2, lambda step: torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 3, 8, 8])
    """
    for x in walk(energy, x_BCHW, steps, noise, **dynamics):
        x_BCHW = x
    return x_BCHW
