"""Light corruptions of image batches as pure functions: what they draw is an argument."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.functional import rgb_to_grayscale
from torchvision.transforms.v2.functional import jpeg as _jpeg

from purifyloader import noise
from purifyloader.errors import InputError
from purifyloader.images import quantize

__all__ = ["check_compensation", "compensate", "jpeg"]

_GRAY, _NOISE = 0, 1


def check_compensation(p: float, sigma: float) -> None:
    """Raise `InputError` unless p is a probability and sigma a noise level in image units."""
    if not 0 <= p <= 1:
        raise InputError(f"p is the probability of grayscale, in [0, 1]. Got {p}.")
    if not 0 <= sigma <= 1:
        raise InputError(f"sigma is the noise's standard deviation in image units, in [0, 1]. Got {sigma}.")


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
    x = x_BCHW.float()
    if x.shape[1] == 3:
        grey = noise.uniform(keys_B, (1,), _GRAY)[:, 0] < p
        x = torch.where(grey[:, None, None, None], rgb_to_grayscale(x, num_output_channels=3), x)
    x = x + sigma * noise.normal(keys_B, x.shape[1:], _NOISE)
    return x.clamp(0, 1).to(x_BCHW.dtype)


def jpeg(x_BCHW: Tensor, quality: int) -> Tensor:
    """Compress and decompress each image as JPEG (ISS-J of Liu et al. 2023 at quality 10)."""
    if not isinstance(quality, int) or not 1 <= quality <= 100:
        raise InputError(f"JPEG quality is an integer from 1 to 100. Got {quality!r}.")
    if len(x_BCHW) == 0:
        return x_BCHW
    out = torch.stack([_jpeg(image, quality) for image in quantize(x_BCHW).cpu()])
    return (out.float() / 255).to(x_BCHW)
