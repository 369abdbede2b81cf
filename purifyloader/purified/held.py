"""Hold a purifier inside a transform, where the training script does not see it as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from purifyloader.core.devices import device_of
from purifyloader.purified.tensors import check_applicable
from purifyloader.purifiers import Purifier

__all__ = ["HoldsPurifier"]


class HoldsPurifier(nn.Module):
    """Mixin for transforms. Its `purifier` is no submodule: neither an optimiser, nor a state_dict, nor `train()` or
    `half()` of whatever holds the transform sees it. Only a move to another device does."""

    _held: tuple[Purifier]

    def _hold(self, purifier: Purifier) -> None:
        check_applicable(purifier)
        self._held = (purifier,)  # torch registers a module, but not a tuple of one

    @property
    def purifier(self) -> Purifier:
        return self._held[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        here = device_of(self.purifier)
        there = fn(torch.empty(0, device=here)).device  # its dtype is not for us
        if here is not None and there != here:
            self.purifier.to(there)
        return super()._apply(fn, *args, **kwargs)
