"""Purify images as a training script holds them: tensors come back in the same type and on the same device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from purifyloader.core.devices import check_worker, device_of
from purifyloader.core.images import luma, quantize, to_unit
from purifyloader.errors import InputError
from purifyloader.purified import plans
from purifyloader.purified.job import check_purifier
from purifyloader.purifiers import Purifier


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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "purifier":  # which torch would register as a module, and nobody would call
            raise InputError(
                f"The purifier of a {type(self).__name__} is the one that it was made with. Got another: make a new "
                f"{type(self).__name__}."
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        here = device_of(self.purifier)
        there = fn(torch.empty(0, device=here)).device  # its dtype is not for us
        if here is not None and there != here:
            self.purifier.to(there)
        return super()._apply(fn, *args, **kwargs)


def check_applicable(purifier: Purifier) -> None:
    """Refuse what is no purifier, or one that needs a plan over the whole dataset and has none."""
    check_purifier(purifier)
    if plans.is_open(purifier):
        raise InputError(
            "This purifier needs a plan over the whole dataset. Make it first, `plans.plan(purifier, dataset)`, or use "
            "PurifiedDataset, which does."
        )


# a network has graphs of its own, and looking at values breaks any
@torch.compiler.disable  # type: ignore[untyped-decorator]
def purify_tensor(purifier: Purifier, x_BCHW: Tensor, keys_B: Tensor) -> Tensor:
    """Purify images uint8, or floating point in [0, 1], (B, C, H, W), and return them alike, without a gradient.

    Grey images go through a purifier for colour as three equal channels, and come back as their brightness. `keys_B` is
    int64, one an image; B may be 0. Raises `InputError` for another type, shape or range, NaN, or images on a GPU and
    weights that are not; `PurifyError` for weights on a GPU in a forked worker.
    """
    if not isinstance(x_BCHW, Tensor) or x_BCHW.ndim != 4:
        got = tuple(x_BCHW.shape) if isinstance(x_BCHW, Tensor) else type(x_BCHW).__name__
        raise InputError(f"Images have shape (B, C, H, W). Got {got}.")
    x = to_unit(x_BCHW)
    device = device_of(purifier) or x.device
    check_worker(device)
    if x.device != device and device.type == "cpu":
        raise InputError(
            f"The images are on {x.device} but the purifier is on cpu. Call purifier.to({str(x.device)!r})."
        )
    if not len(x):
        return x_BCHW.new_empty(0, *purifier.output_shape((x.shape[1], x.shape[2], x.shape[3])))
    grey = x.shape[1] == 1 and purifier.image_channels == 3
    out = purifier((x.expand(-1, 3, -1, -1) if grey else x).to(device), keys_B).to(x.device)
    out = luma(out) if grey else out
    return quantize(out) if x_BCHW.dtype == torch.uint8 else out.clamp(0, 1).to(x_BCHW.dtype)
