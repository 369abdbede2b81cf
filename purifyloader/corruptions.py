"""Light corruptions of image batches as pure functions: what they draw is an argument."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import rgb_to_grayscale

from purifyloader import noise
from purifyloader.errors import InputError
from purifyloader.images import quantize

__all__ = ["check_compensation", "check_quality", "compensate", "grey_and_noise", "jpeg"]

_GRAY, _NOISE = 0, 1


def check_compensation(p: float, sigma: float) -> None:
    """Raise `InputError` unless p is a probability and sigma a noise level in image units."""
    if not 0 <= p <= 1:
        raise InputError(f"p is the probability of grayscale, in [0, 1]. Got {p}.")
    if not 0 <= sigma <= 1:
        raise InputError(f"sigma is the noise's standard deviation in image units, in [0, 1]. Got {sigma}.")


def check_quality(quality: int) -> None:
    """Raise `InputError` unless this is a JPEG quality."""
    if type(quality) is not int or not 1 <= quality <= 100:
        raise InputError(f"JPEG quality is an integer from 1 to 100. Got {quality!r}.")


def compensate(x_BCHW: Tensor, keys_B: Tensor, p: float = 0.4, sigma: float = 0.05) -> Tensor:
    """ECLIPSE's lightweight corruption, C(x; p, sigma) of Eq. 13: grayscale, then noise, then clamp.

    Args:
        x_BCHW: float images in [0, 1]; C = 3, or 1 (already grey).
        keys_B: int64 keys of `purifyloader.noise`; the draws of an image are a function of its key.
        p: probability of grayscale, an image.
        sigma: standard deviation of the Gaussian noise, in image units (0.05 is 12.75 px).

    Returns:
        Images of the same shape and type in [0, 1].
    """
    check_compensation(p, sigma)
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] not in (1, 3) or not x_BCHW.is_floating_point():
        raise InputError(
            "compensate takes float images of shape (B, 3, H, W) or (B, 1, H, W). "
            f"Got {x_BCHW.dtype} {tuple(x_BCHW.shape)}."
        )
    if keys_B.shape != x_BCHW.shape[:1]:
        raise InputError(f"compensate needs one key an image. Got {tuple(keys_B.shape)} for {len(x_BCHW)} images.")
    grey_B = noise.uniform(keys_B, (1,), _GRAY)[:, 0] < p
    return grey_and_noise(x_BCHW, grey_B, sigma * noise.normal(keys_B, x_BCHW.shape[1:], _NOISE))


def grey_and_noise(x_BCHW: Tensor, grey_B: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Eq. 13 with its draws given: grey where `grey_B`, plus the (scaled) noise, clamped to [0, 1]."""
    x = x_BCHW.float()
    if x.shape[1] == 3:
        x = torch.where(grey_B[:, None, None, None], rgb_to_grayscale(x, num_output_channels=3), x)
    return (x + noise_BCHW).clamp(0, 1).to(x_BCHW.dtype)


def jpeg(x_BCHW: Tensor, quality: int) -> Tensor:
    """Compress and decompress each image as JPEG (ISS-J of Liu et al. 2023 at quality 10)."""
    check_quality(quality)
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] not in (1, 3):
        raise InputError(f"JPEG takes images of shape (B, 3, H, W) or (B, 1, H, W). Got {tuple(x_BCHW.shape)}.")
    out = torch.empty_like(x_BCHW)
    for row, image in zip(out, quantize(x_BCHW).cpu().numpy(), strict=True):
        file = io.BytesIO()
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        decoded = np.atleast_3d(np.asarray(Image.open(file))).transpose(2, 0, 1)
        row.copy_(torch.from_numpy(decoded.copy()).float() / 255)
    return out
