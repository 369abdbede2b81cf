"""ECLIPSE's compensation as a transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from purifyloader import corruptions
from purifyloader.errors import InputError
from purifyloader.images import from_engine, quantize, to_engine, to_unit

__all__ = ["Compensate"]


def _is_plain_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, tv_tensors.TVTensor)


class Compensate(v2.Transform):
    """Grayscale with probability p, then Gaussian noise, then clamp (ECLIPSE, Eq. 13).

    Convention: after crop and flip, before normalising. Each image of a batch has its own draw, fresh
    at each call from torch's random generator; a `PurifiedDataset` draws from (seed, epoch, index)
    instead. Works in `torchvision.transforms.Compose` and `v2.Compose`, and on a batch.

    Input: PIL (L, LA, RGB, RGBA), or tensors (..., C, H, W), uint8 or float in [0, 1], plain or
    `tv_tensors.Image`/`Video`. What comes out is of the same type; alpha, masks, boxes and labels pass
    untouched.

    Args:
        p: probability of grayscale, an image.
        sigma: standard deviation of the noise, in image units (0.05 is 12.75 px).

    Raises:
        InputError: normalised or 0-255 floats, integers other than uint8, or fewer than 3 dimensions.
    """

    _transformed_types = (Image.Image, tv_tensors.Image, tv_tensors.Video, _is_plain_tensor)

    def __init__(self, p: float = 0.4, sigma: float = 0.05) -> None:
        super().__init__()
        corruptions.check_compensation(p, sigma)
        self.p, self.sigma = p, sigma

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # torch's own generator, so that the user's seed and the worker's seed decide
        def corrupt(x_BCHW: Tensor) -> Tensor:
            grey_B = torch.rand(len(x_BCHW), device=x_BCHW.device) < self.p
            return corruptions.grey_and_noise(x_BCHW, grey_B, self.sigma * torch.randn_like(x_BCHW))

        return self._on_batch(inpt, corrupt)

    def apply(self, image: Any, keys_B: Tensor) -> Any:
        """The same corruption with its draws given: a pure function of (image, key).

        Args:
            image: as above; numpy (H, W[, C]) too.
            keys_B: int64, one an image.
        """
        return self._on_batch(image, lambda x: corruptions.compensate(x, keys_B.to(x.device), self.p, self.sigma))

    def _on_batch(self, image: Any, corrupt: Callable[[Tensor], Tensor]) -> Any:
        """`corrupt(x_BCHW)` in float32 on whatever holds the pixels, which comes back as it was."""
        if isinstance(image, Image.Image | np.ndarray):
            x, kind = to_engine(image)
            return from_engine(corrupt(x[None])[0], kind)
        if not isinstance(image, Tensor):
            raise InputError(f"Compensate takes PIL images, numpy arrays and tensors. Got {type(image).__name__}.")
        if image.ndim < 3 or image.shape[-3] not in (1, 3):
            raise InputError(
                "Compensate takes image tensors of shape (..., C, H, W) with 1 or 3 channels. "
                f"Got {tuple(image.shape)}."
            )
        x_BCHW = to_unit(image.as_subclass(Tensor)).reshape(-1, *image.shape[-3:])
        out = corrupt(x_BCHW).reshape(image.shape)
        out = quantize(out) if image.dtype == torch.uint8 else out.to(image.dtype)
        return tv_tensors.wrap(out, like=image) if isinstance(image, tv_tensors.TVTensor) else out

    def extra_repr(self) -> str:
        return f"p={self.p}, sigma={self.sigma}"
