"""ECLIPSE's compensation as a transform."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from purifyloader import corruptions, noise
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

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        # 63 bits from torch's own generator, so that the user's seed and the worker's seed decide
        return {"key": torch.randint(2**63 - 1, (1,))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, Tensor):
            images = math.prod(inpt.shape[:-3])
            return self.apply(inpt, noise.fold_in(params["key"], torch.arange(images)))
        return self.apply(inpt, params["key"])

    def apply(self, image: Any, keys_B: Tensor) -> Any:
        """The same corruption with its draws given: a pure function of (image, key).

        Args:
            image: as above; numpy (H, W[, C]) too.
            keys_B: int64, one an image.
        """
        if isinstance(image, Tensor):
            return self._apply_tensor(image, keys_B)
        if not isinstance(image, Image.Image | np.ndarray):
            raise InputError(f"Compensate takes PIL images, numpy arrays and tensors. Got {type(image).__name__}.")
        x, kind = to_engine(image)
        return from_engine(corruptions.compensate(x[None], keys_B, self.p, self.sigma)[0], kind)

    def _apply_tensor(self, image: Tensor, keys_B: Tensor) -> Tensor:
        if image.ndim < 3 or image.shape[-3] not in (1, 3):
            raise InputError(
                "Compensate takes image tensors of shape (..., C, H, W) with 1 or 3 channels. "
                f"Got {tuple(image.shape)}."
            )
        x_BCHW = to_unit(image.as_subclass(Tensor)).reshape(-1, *image.shape[-3:])
        keys_B = keys_B.to(x_BCHW.device)
        out = corruptions.compensate(x_BCHW, keys_B, self.p, self.sigma).reshape(image.shape)
        out = quantize(out) if image.dtype == torch.uint8 else out.to(image.dtype)
        return tv_tensors.wrap(out, like=image) if isinstance(image, tv_tensors.TVTensor) else out

    def extra_repr(self) -> str:
        return f"p={self.p}, sigma={self.sigma}"
