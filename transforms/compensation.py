"""ECLIPSE's compensation as a transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purifyloader.core import corruptions
from purifyloader.core.images import quantize, to_unit
from purifyloader.transforms.base import ImageTransform


class Compensate(ImageTransform):
    """Grayscale with probability p, then Gaussian noise, then clamp (ECLIPSE, Eq. 13).

    Belongs after crop and flip, before normalising. Each image of a batch has its own draw, fresh at each call from
    torch's random generator; a `PurifiedDataset` draws from (seed, epoch, index) instead.

    Takes PIL (L, LA, RGB, RGBA), or tensors (..., C, H, W), uint8 or float in [0, 1], plain or
    `tv_tensors.Image`/`Video`, and gives the same type; alpha, masks, boxes and labels pass untouched. `p` is a
    probability an image, `sigma` the standard deviation of the noise, in image units (0.05 is 12.75 px). Raises
    `InputError` for normalised or 0-255 floats, integers other than uint8, or a sample in which the image may be any of
    several plain tensors.

    >>> import torch
    >>> from purifyloader.transforms import Compensate
    >>> Compensate(p=0.4, sigma=0.05)(torch.rand(3, 32, 32)).shape
    torch.Size([3, 32, 32])
    """

    def __init__(self, p: float = 0.4, sigma: float = 0.05) -> None:
        super().__init__()
        corruptions.check_compensation(p, sigma)
        self.p, self.sigma = p, sigma

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # torch's own generator, so that the user's seed and the worker's seed decide
        def corrupt(x_BCHW: Tensor) -> Tensor:
            grey_B = torch.rand(len(x_BCHW), device=x_BCHW.device) < self.p
            return corruptions.grey_and_noise(x_BCHW, grey_B, torch.randn_like(x_BCHW), self.sigma)

        return self._corrupted(inpt, corrupt)

    def apply(self, image: Any, keys_B: Tensor) -> Any:
        """Corrupt an image, numpy (H, W[, C]) too, with its draws given: int64 keys, one an image."""
        return self._corrupted(image, lambda x: self.run(x, keys_B.to(x.device)))

    def run(self, x_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        """Corrupt float32 images (B, C, H, W) known to be in [0, 1], without a look at their values."""
        return corruptions.compensate(x_BCHW, keys_B, self.p, self.sigma)

    def _corrupted(self, image: Any, corrupt: Callable[[Tensor], Tensor]) -> Any:
        def in_own_type(x_BCHW: Tensor) -> Tensor:
            out = corrupt(to_unit(x_BCHW))
            return quantize(out) if x_BCHW.dtype == torch.uint8 else out.to(x_BCHW.dtype)

        return self._apply_to(image, in_own_type)

    def extra_repr(self) -> str:
        return f"p={self.p}, sigma={self.sigma}"
