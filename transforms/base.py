"""Hold what our torchvision v2 transforms have in common: which images they take, and how these come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from purifyloader.core.images import check_channels, from_engine, not_transformed, to_engine
from purifyloader.errors import InputError

_EXPLICIT = (Image.Image, tv_tensors.Image, tv_tensors.Video)


def _is_plain_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, tv_tensors.TVTensor)


def _may_be_images(x: Tensor) -> bool:
    return x.ndim >= 3 and (x.dtype == torch.uint8 or x.is_floating_point())


class ImageTransform(v2.Transform):
    """Base: a function of each image of a sample by itself; masks, boxes and labels pass untouched.

    torchvision takes the first plain tensor of a sample without an explicit image for the image, whatever it is, and
    lets a sample without any pass, such as one with a numpy array. Where the first may be wrong, and for the second,
    we raise: an image that nobody touched would be trained on as a clean one.
    """

    _transformed_types = (*_EXPLICIT, _is_plain_tensor)

    def forward(self, *inputs: Any) -> Any:
        with not_transformed(f"The transform {type(self).__name__}"):
            return super().forward(*inputs)

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        if any(isinstance(value, _EXPLICIT) for value in flat_inputs):
            return
        plain = [value for value in flat_inputs if _is_plain_tensor(value)]
        if not plain:
            got = ", ".join(type(value).__name__ for value in flat_inputs) or "an empty sample"
            raise InputError(
                f"{type(self).__name__} takes samples with an image: PIL, or a tensor. Got {got}: put "
                "torchvision.transforms.v2.ToImage() before it, which makes one of a numpy array."
            )
        candidates = [x for x in plain if _may_be_images(x)]
        if plain and (len(candidates) > 1 or not candidates or candidates[0] is not plain[0]):
            got = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in plain)
            raise InputError(
                f"{type(self).__name__} takes one plain tensor of a sample as its image: the first, uint8 or floating "
                f"point, of shape (..., C, H, W), and no other like it. Got {got}: mark the image, "
                "torchvision.tv_tensors.Image(tensor)."
            )

    def _batched(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `function` to all images of a tensor (..., C, H, W) as one batch, in the same shape and tensor type."""
        check_channels(type(self).__name__, x.shape, (1, 3), leading="...")
        plain = x.as_subclass(Tensor)
        out = function(plain.reshape(-1, *x.shape[-3:]))
        out = out.reshape(*x.shape[:-3], *out.shape[1:])
        return tv_tensors.wrap(out, like=x) if isinstance(x, tv_tensors.TVTensor) else out

    def _apply_to(self, image: Any, function: Callable[[Tensor], Tensor], channels: int | None = None) -> Any:
        """Apply `function` of a batch (B, C, H, W) to the images in whatever holds them, and hold them so again.

        `channels` is what it takes of PIL images and numpy arrays, None for any; tensors keep those they have.
        """
        if isinstance(image, Tensor):
            return self._batched(image, function)
        if isinstance(image, Image.Image | np.ndarray):
            x, kind = to_engine(image, channels)
            return from_engine(function(x[None])[0], kind)
        raise InputError(
            f"{type(self).__name__} takes PIL images, numpy arrays and tensors. Got {type(image).__name__}."
        )
