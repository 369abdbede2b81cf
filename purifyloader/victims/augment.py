"""Augment training images: random crops and flips, for victims and for the networks of attackers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from purifyloader.core import noise

__all__ = ["crop_and_flip", "uniforms"]


def uniforms(seed: int, purpose: int, turn: int, index_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw float32 (B, *shape) in [0, 1] on the CPU, a function of (seed, purpose, turn, index) on every device."""
    key = noise.fold_in(noise.fold_in(noise.key_from_seed(seed), purpose), turn)
    return noise.uniform(noise.fold_in(key, index_B.cpu()), shape).float().to(index_B.device)


def crop_and_flip(x_BCHW: Tensor, uniform_B3: Tensor, pad: int, flip: bool = True) -> Tensor:
    """Pad with `pad` pixels of black, cut a window of the old size, mirror half of the images; a gradient goes through.

    Uniforms in [0, 1] decide row, column and flip of each image.
    """
    count, channels, height, width = x_BCHW.shape
    if pad:
        offset_B2 = (uniform_B3[:, :2] * (2 * pad + 1)).long().clamp_max(2 * pad)
        padded = F.pad(x_BCHW, (pad,) * 4)
        rows_BH = offset_B2[:, :1] + torch.arange(height, device=x_BCHW.device)
        columns_BW = offset_B2[:, 1:] + torch.arange(width, device=x_BCHW.device)
        rows = rows_BH.reshape(count, 1, height, 1).expand(-1, channels, -1, width + 2 * pad)
        columns = columns_BW.reshape(count, 1, 1, width).expand(-1, channels, height, -1)
        x_BCHW = padded.gather(2, rows).gather(3, columns)
    if not flip:
        return x_BCHW
    return torch.where(uniform_B3[:, 2].reshape(-1, 1, 1, 1) < 0.5, x_BCHW.flip(3), x_BCHW)
