"""Projected gradient descent on a perturbation within an l-infinity or l2 ball (Madry et al. 2018, 1706.06083, eq. 3).

The libraries for it were looked at. torchattacks pins a requests of 2021, and its losses are built in; foolbox brings
GitPython and ART scikit-learn; none takes a loss over several networks, over random crops or with a noise shared by
the images of a class. What all attacks here need is these few lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from purifyloader.errors import InputError
from purifyloader.poisons.poisoned import Bound

__all__ = ["Loss", "ascend", "direction", "lengths", "pgd", "project", "random_start", "round_within"]

Loss = Callable[[Tensor], Tensor]
"""(x_BCHW in [0, 1]) -> the loss of each image (B,), or their sum."""

_TINY = 1e-30  # a gradient of length 0 gives a step of length 0


def lengths(delta_BCHW: Tensor) -> Tensor:
    """Return the l2 norm of each perturbation, (B, 1, 1, 1)."""
    return delta_BCHW.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)


def direction(gradient_BCHW: Tensor, bound: Bound) -> Tensor:
    """Return the unit step along which a linear loss grows most: the sign for l-infinity, g / |g| for l2."""
    if bound.norm == "linf":
        return gradient_BCHW.sign()
    return gradient_BCHW / lengths(gradient_BCHW).clamp_min(_TINY)


def project(delta_BCHW: Tensor, bound: Bound) -> Tensor:
    """Return the nearest perturbation within the bound, for each image."""
    if bound.norm == "linf":
        return delta_BCHW.clamp(-bound.epsilon, bound.epsilon)
    return delta_BCHW * (bound.epsilon / lengths(delta_BCHW).clamp_min(_TINY)).clamp_max(1.0)


def ascend(loss: Callable[[Tensor], Tensor], delta: Tensor, bound: Bound, step_size: float) -> Tensor:
    """Take one step of `delta` up the loss, which is a function of it, and back within the bound."""
    delta = delta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(delta).sum(), delta)
    with torch.no_grad():
        return project(delta + step_size * direction(gradient, bound), bound)


def pgd(
    loss: Loss,
    x_BCHW: Tensor,
    bound: Bound,
    *,
    steps: int,
    step_size: float,
    minimise: bool = False,
    start: Tensor | None = None,
) -> Tensor:
    """Find the perturbation that makes the loss large within the bound and the range of pixels.

        delta <- clip(P(delta +- step_size * direction(grad loss(x + delta))))

    An error-maximising attack gives the loss of the label; a targeted one minimises that of the target. Each image's
    part of the loss must not depend on the other images. A step's length is in the bound's norm and units of [0, 1]
    images. It starts from perturbations within the bound, zeros if None; the result also leaves x + delta in [0, 1].
    """
    sign = -1.0 if minimise else 1.0
    delta = torch.zeros_like(x_BCHW) if start is None else start
    delta = (x_BCHW + delta).clamp(0, 1) - x_BCHW
    for _ in range(steps):
        delta = ascend(lambda delta: sign * loss(x_BCHW + delta), delta, bound, step_size)
        delta = (x_BCHW + delta).clamp(0, 1) - x_BCHW  # brings each value nearer to 0, and so stays within the bound
    return delta


def random_start(uniform_BCHW: Tensor, bound: Bound) -> Tensor:
    """Turn uniforms in (0, 1) into perturbations: throughout the l-infinity ball, or on the sphere of the l2 ball."""
    cube = 2 * uniform_BCHW - 1
    return bound.epsilon * (cube if bound.norm == "linf" else direction(cube, bound))


def round_within(delta_BCHW: Tensor, bound: Bound) -> Tensor:
    """Round to whole levels of 0 to 255, int16 (B, C, H, W), that are within the bound too.

    Rounded to the nearest; where that would leave the ball, values are clamped (l-infinity) or the image's perturbation
    is made shorter by hundredths until it does not (l2). A bound of less than one level, with nothing but zero within
    it, is refused, and so is what is not finite.
    """
    largest = bound.epsilon * 255 * (1 + 1e-6)  # 8/255 is 8 levels, whatever its last bit
    if largest < 1:
        raise InputError(
            f"The bound must be at least one level of 8 bits, 1/255. Got {bound.norm} {bound.epsilon:g}: raise epsilon."
        )
    levels = delta_BCHW.double() * 255
    if not bool(torch.isfinite(levels).all()):
        raise InputError("A perturbation must be finite. Got NaN or infinity: lower lr, as the surrogate has diverged.")
    if bound.norm == "linf":
        limit = math.floor(largest)
        return levels.round().clamp(-limit, limit).to(torch.int16)
    while True:
        rounded = levels.round()
        too_long = lengths(rounded) > largest
        if not bool(too_long.any()):
            return rounded.to(torch.int16)
        levels = torch.where(too_long, 0.99 * levels, levels)
