"""Augment the sparse set by pure functions of each image's key, which give the same images after a resume.

    flip    mirrored left to right with probability 1/2
    crop    moved by up to an eighth of its side each way, the border reflected
    rotate  turned by up to 15 degrees, bilinear, the border reflected
    mixup   a convex combination with another image of the set, the share from Beta(0.2, 0.2)
            (Zhang et al. 2018; the values for ImageNet and up)

ECLIPSE (Sec. 4, Fig. 3) tries these and finds them worse than none; `examples/denoiser_study.py` asks again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from purifyloader.core import noise

__all__ = ["AUGMENTATIONS", "MIXUP_ALPHA", "geometric", "mixup", "patches"]

MIXUP_ALPHA = 0.2

# The purpose of each number drawn for an image of a step; 0 and 1 are the noise level and the noise.
_FLIP, _CROP, _ROTATE, _MIXUP, _PATCH = 2, 3, 4, 5, 6


def _per_image(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.to(like.device)[:, None, None, None]


def _flip(x_BCHW: Tensor, keys_B: Tensor) -> Tensor:
    mirrored = noise.uniform(keys_B, (1,), _FLIP)[:, 0] < 0.5
    return torch.where(_per_image(mirrored, x_BCHW), x_BCHW.flip(-1), x_BCHW)


def _offsets(keys_B: Tensor, step: int, limits: Sequence[int]) -> list[list[int]]:
    """Draw for each image an integer in [0, limit] for each limit, uniformly."""
    u = noise.uniform(keys_B, (len(limits),), step)
    return (u * (torch.tensor(limits, dtype=torch.float64) + 1)).floor().to(torch.int64).tolist()


def _crop(x_BCHW: Tensor, keys_B: Tensor) -> Tensor:
    h, w = x_BCHW.shape[-2:]
    ph, pw = h // 8, w // 8
    padded = F.pad(x_BCHW, (pw, pw, ph, ph), mode="reflect")
    where = _offsets(keys_B, _CROP, (2 * ph, 2 * pw))
    return torch.stack([p[:, y : y + h, x : x + w] for p, (y, x) in zip(padded, where, strict=True)])


def _rotate(x_BCHW: Tensor, keys_B: Tensor) -> Tensor:
    h, w = x_BCHW.shape[-2:]
    angle_B = (2 * noise.uniform(keys_B, (1,), _ROTATE)[:, 0] - 1) * math.radians(15)
    cos, sin, zero = angle_B.cos(), angle_B.sin(), torch.zeros_like(angle_B)
    # the grid's axes run over [-1, 1] whatever the sides are
    rows = [torch.stack([cos, -sin * h / w, zero], -1), torch.stack([sin * w / h, cos, zero], -1)]
    theta = torch.stack(rows, 1).to(x_BCHW)
    grid = F.affine_grid(theta, list(x_BCHW.shape), align_corners=False)
    return F.grid_sample(x_BCHW, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _beta(keys_B: Tensor) -> Tensor:
    """Draw Beta(a, a) for a < 1 by Johnk's method, which needs nothing but uniforms: (B,) float64.

    Of eight tries an image takes the first that is accepted; none is with probability 4e-11.
    """
    u = noise.uniform(keys_B, (8, 2), _MIXUP) ** (1 / MIXUP_ALPHA)
    total = u.sum(-1)
    first = (total <= 1).to(torch.int64).argmax(1, keepdim=True)
    return (u[..., 0] / total).gather(1, first)[:, 0]


def mixup(x_BCHW: Tensor, other_BCHW: Tensor, keys_B: Tensor) -> Tensor:
    """Combine two images, the share of the first from Beta(0.2, 0.2)."""
    share = _per_image(_beta(keys_B), x_BCHW).to(x_BCHW.dtype)
    return share * x_BCHW + (1 - share) * other_BCHW


_GEOMETRIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"flip": _flip, "crop": _crop, "rotate": _rotate}

AUGMENTATIONS = (*_GEOMETRIC, "mixup")


def geometric(x_BCHW: Tensor, keys_B: Tensor, names: Sequence[str]) -> Tensor:
    """Apply those of flip, crop and rotate that are named, in this order; images in [0, 1] stay there."""
    for name, function in _GEOMETRIC.items():
        if name in names:
            x_BCHW = function(x_BCHW, keys_B)
    return x_BCHW


def patches(x_BCHW: Tensor, keys_B: Tensor, size: int) -> Tensor:
    """Cut a random square of side `size` out of each image, (B, C, size, size)."""
    h, w = x_BCHW.shape[-2:]
    where = _offsets(keys_B, _PATCH, (h - size, w - size))
    return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(x_BCHW, where, strict=True)])
