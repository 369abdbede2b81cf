"""See an image as a victim does after its defence, by a function that a gradient goes through: for adaptive attacks.

A view draws what the defence draws at random; another turn has other draws, so that a descent over many turns is one on
their expectation (expectation over transformation; Athalye et al. 2018, arXiv:1707.07397).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from purifyloader.core import corruptions, noise
from purifyloader.purifiers import Purifier

__all__ = ["View", "compensated", "itself", "purified"]

View = Callable[[Tensor, Tensor, int], Tensor]
"""(x_BCHW in [0, 1], index_B, turn) -> x_BCHW in [0, 1]; each image by itself."""

_COMPENSATE, _PURIFY = 0x636F6D70, 0x70757266  # "comp", "purf": what the keys drawn here are for


def itself(x_BCHW: Tensor, index_B: Tensor, turn: int) -> Tensor:
    return x_BCHW


def compensated(p: float, sigma: float, seed: int) -> View:
    """See through ECLIPSE's compensation C(x; p, sigma), Eq. 13."""
    corruptions.check_compensation(p, sigma)

    def view(x_BCHW: Tensor, index_B: Tensor, turn: int) -> Tensor:
        return corruptions.compensate(x_BCHW, _keys(seed, _COMPENSATE, turn, index_B), p, sigma)

    return view


def purified(purifier: Purifier, seed: int) -> View:
    """See through a purifier, with other noise for each turn: the draw in the victim's cache is not known."""

    def view(x_BCHW: Tensor, index_B: Tensor, turn: int) -> Tensor:
        return purifier.purify_with_grad(x_BCHW, _keys(seed, _PURIFY, turn, index_B)).clamp(0, 1)

    return view


def _keys(seed: int, purpose: int, turn: int, index_B: Tensor) -> Tensor:
    key = noise.fold_in(noise.fold_in(noise.key_from_seed(seed), purpose), turn)
    keys: Tensor = noise.fold_in(key, index_B.cpu())
    return keys.to(index_B.device)
