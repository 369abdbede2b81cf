"""Resize images, and cut them into tiles and back: functions of one float image (C, H, W), all differentiable.

Nothing around an image can change its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from purifyloader.core import limits
from purifyloader.core.checks import check_integer
from purifyloader.errors import ConfigError

__all__ = ["Shape", "check_resize", "cut", "join", "resize", "resized_shape"]

Shape = tuple[int, int, int]
"""(C, H, W) of an image."""


def check_resize(size: Any, crop: Any) -> None:
    """Raise `ConfigError` unless the shorter side is an integer from 1 to 4096, and the crop, if any, no larger."""
    check_integer("The size of the shorter side", size, 1, unit="in pixels")
    if size > limits.TILE:
        raise ConfigError(
            f"The size of the shorter side must be at most {limits.TILE} pixels. Got {size}, at which one image may "
            "not fit into memory: give the size that the model was trained for."
        )
    if crop is not None and (type(crop) is not int or not 1 <= crop <= size):
        raise ConfigError(
            f"crop must be an integer from 1 to size={size}, in pixels, or None. Got {crop!r}: "
            "resize to at least what is cropped."
        )


def _scaled(height: int, width: int, size: int) -> tuple[int, int]:
    """Scale the shorter side to `size`, the longer one rounded down, as torchvision does."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def resized_shape(shape: Shape, size: int, crop: int | None = None) -> Shape:
    """Compute the shape (C, H, W) that `resize` gives."""
    channels, height, width = shape
    return (channels, *(_scaled(height, width, size) if crop is None else (crop, crop)))


def resize(image_CHW: Tensor, size: int, crop: int | None = None) -> Tensor:
    """Resize the shorter side to `size`, antialiased bilinear, then take the centre `crop` x `crop` if given.

    An image that has that size already comes back unchanged.
    """
    height, width = image_CHW.shape[-2:]
    out = transforms.resize(image_CHW.contiguous(), list(_scaled(height, width, size)), antialias=True)
    # contiguous: a crop that is a view would keep the whole image alive
    return out if crop is None else transforms.center_crop(out, [crop, crop]).contiguous()


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """Place tiles along a side of `length` >= size; the last one ends where the side ends."""
    last = length - size
    return [*range(0, last, size - overlap), last]


def _padding(length: int, size: int) -> tuple[int, int]:
    """Compute the pixels to add before and after a side to make it as long as a tile."""
    missing = max(size - length, 0)
    return missing // 2, missing - missing // 2


def _pad(image_CHW: Tensor, size: int) -> Tensor:
    """Make each side at least `size` long: mirrored, or its border repeated where it is too short to mirror."""
    height, width = image_CHW.shape[-2:]
    for length, sides in ((width, (*_padding(width, size), 0, 0)), (height, (0, 0, *_padding(height, size)))):
        if any(sides):
            image_CHW = F.pad(image_CHW, sides, mode="reflect" if max(sides) < length else "replicate")
    return image_CHW


def cut(image_CHW: Tensor, size: int, overlap: int) -> list[Tensor]:
    """Cut an image into tiles (C, size, size), row by row from the top left.

    Neighbours share `overlap` pixels, the last of a row or column more, as it ends with the image. A short side is
    padded.
    """
    padded = _pad(image_CHW, size)
    rows, columns = (_starts(length, size, overlap) for length in padded.shape[-2:])
    return [padded[:, top : top + size, left : left + size] for top in rows for left in columns]


def join(tiles: Sequence[Tensor], shape: Sequence[int], size: int, overlap: int) -> Tensor:
    """Join the tiles of `cut` to the image (C, H, W) of `shape`: blended where they overlap, and the padding off."""
    _, height, width = shape
    (top, bottom), (left, right) = _padding(height, size), _padding(width, size)
    rows = _starts(top + height + bottom, size, overlap)
    columns = _starts(left + width + right, size, overlap)
    # rows of tiles into strips, then the strips: a tile's weight is the product of its two ramps, and so is the
    # sum of the weights at a pixel
    strips = [_blend(tiles[i : i + len(columns)], columns, dim=2) for i in range(0, len(tiles), len(columns))]
    whole = _blend(strips, rows, dim=1)
    return whole[:, top : top + height, left : left + width].contiguous()


def _blend(parts: Sequence[Tensor], starts: Sequence[int], dim: int) -> Tensor:
    """Lay parts along `dim`, each from its start, with weights that fall linearly to the part's ends and sum to 1."""
    if len(parts) == 1:
        return parts[0].clone()  # a view would keep the tiles of all images alive
    size = parts[0].shape[dim]
    p = torch.arange(size, device=parts[0].device)
    ramp = torch.minimum(p + 1, size - p).float()
    shape = list(parts[0].shape)
    shape[dim] = starts[-1] + size
    total = ramp.new_zeros(shape[dim])  # whole numbers, so exact, and a pixel covered once gets ramp / ramp = 1
    for start in starts:
        total[start : start + size] += ramp
    out = parts[0].new_zeros(shape)
    for part, start in zip(parts, starts, strict=True):
        weight = ramp / total[start : start + size]
        out.narrow(dim, start, size).add_(part * weight.reshape([-1 if d == dim else 1 for d in range(3)]))
    return out
