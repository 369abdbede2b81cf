"""Light corruptions of image batches as pure functions: their random draws come from keys."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import rgb_to_grayscale

from purifyloader.core import noise
from purifyloader.core.checks import check_integer, check_number
from purifyloader.core.images import check_channels, luma, not_transformed, quantize
from purifyloader.core.notes import NOTES
from purifyloader.errors import InputError

__all__ = ["bit_depth", "check_alpha", "check_bits", "check_compensation", "check_quality", "coin", "compensate"]
__all__ += ["grayscale", "grey_and_noise", "jpeg"]

_GRAY, _NOISE = 0, 1


def check_compensation(p: float, sigma: float) -> None:
    """Raise `InputError` unless p is a probability and sigma a noise level in image units."""
    if not _is_share(p):
        raise InputError(f"p is the probability of grayscale, in [0, 1]. Got {p}.")
    if not _is_share(sigma):
        raise InputError(f"sigma is the noise's standard deviation in image units, in [0, 1]. Got {sigma}.")


def _is_share(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and bool(0 <= value <= 1)
    except (TypeError, ValueError, RuntimeError):  # a text, or several numbers
        return False


def check_quality(quality: int) -> None:
    """Raise `InputError` unless this is a JPEG quality."""
    check_integer("JPEG quality", quality, 1, 100, error=InputError)


def check_bits(bits: int) -> None:
    """Raise `InputError` unless this is a number of bits of an 8-bit channel."""
    check_integer("bits", bits, 1, 8, error=InputError)


def check_alpha(alpha: float) -> None:
    """Raise `InputError` unless this is a distance in pixels."""
    check_number("alpha", alpha, above=0, high=1e4, unit="the furthest that a pixel moves, in pixels", error=InputError)


def _check_drawn(taker: str, x_BCHW: Tensor, keys_B: Tensor) -> None:
    if x_BCHW.ndim != 4 or not x_BCHW.is_floating_point():
        raise InputError(f"{taker} takes float images (B, C, H, W). Got {x_BCHW.dtype} {tuple(x_BCHW.shape)}.")
    if keys_B.shape != x_BCHW.shape[:1]:
        raise InputError(f"{taker} needs one key an image. Got {tuple(keys_B.shape)} for {len(x_BCHW)} images.")


@not_transformed("compensate")
def compensate(x_BCHW: Tensor, keys_B: Tensor, p: float = 0.4, sigma: float = 0.05) -> Tensor:
    """ECLIPSE's lightweight corruption, C(x; p, sigma) of Eq. 13: grayscale, then noise, then clamp to [0, 1].

    An image, of 3 channels or 1 (already grey), becomes grey with probability p; sigma is the standard deviation of the
    noise, in image units (0.05 is 12.75 px). The draws are a function of its int64 key (`purifyloader.core.noise`).

    >>> import torch
    >>> from purifyloader.core.noise import image_keys
    >>> from purifyloader.transforms.functional import compensate
    >>> compensate(torch.rand(2, 3, 32, 32), image_keys(0, 0, [0, 1]), p=0.4, sigma=0.05).shape
    torch.Size([2, 3, 32, 32])
    """
    check_compensation(p, sigma)
    _check_drawn("compensate", x_BCHW, keys_B)
    grey_B = noise.uniform(keys_B, (1,), _GRAY)[:, 0] < p
    return grey_and_noise(x_BCHW, grey_B, noise.normal(keys_B, x_BCHW.shape[1:], _NOISE), sigma)


def grey_and_noise(x_BCHW: Tensor, grey_B: Tensor, noise_BCHW: Tensor, sigma: float) -> Tensor:
    """Apply Eq. 13 with its draws given: grey where `grey_B`, plus sigma times the noise, clamped to [0, 1]."""
    check_channels("Compensation", x_BCHW.shape, (1, 3))
    if not torch.compiler.is_compiling():
        NOTES.compensated += 1
    x = x_BCHW.float()
    if x.shape[1] == 3:
        x = torch.where(grey_B[:, None, None, None], rgb_to_grayscale(x), x)
    return torch.mul(noise_BCHW, sigma).add_(x).clamp_(0, 1).to(x_BCHW.dtype)


@not_transformed("jpeg")
def jpeg(x_BCHW: Tensor, quality: int) -> Tensor:
    """Compress and decompress each image as JPEG (ISS-J of Liu et al. 2023 at quality 10).

    >>> import torch
    >>> from purifyloader.transforms.functional import jpeg
    >>> jpeg(torch.rand(2, 3, 32, 32), quality=10).shape
    torch.Size([2, 3, 32, 32])
    """
    check_quality(quality)
    check_channels("JPEG", x_BCHW.shape, (1, 3))
    out = torch.empty_like(x_BCHW)
    for row, image in zip(out, quantize(x_BCHW).cpu().numpy(), strict=True):
        file = io.BytesIO()
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        decoded = np.atleast_3d(np.asarray(Image.open(file, formats=["JPEG"]))).transpose(2, 0, 1)
        row.copy_(torch.from_numpy(decoded.copy()).float() / 255)
    return out


@not_transformed("grayscale")
def grayscale(x_BCHW: Tensor) -> Tensor:
    """Put the brightness of each pixel into all three channels (ISS-G of Liu et al. 2023).

    ITU-R 601-2 luma, as PIL's `convert("L")`, whose weights sum to 1: white stays white. Grey images pass unchanged.

    >>> import torch
    >>> from purifyloader.transforms.functional import grayscale
    >>> grey = grayscale(torch.rand(1, 3, 4, 4))
    >>> torch.equal(grey[:, 0], grey[:, 1])
    True
    """
    check_channels("grayscale", x_BCHW.shape, (1, 3))
    if x_BCHW.shape[1] == 1:
        return x_BCHW
    return luma(x_BCHW).expand(-1, 3, -1, -1).contiguous()


@not_transformed("bit_depth")
def bit_depth(x_BCHW: Tensor, bits: int) -> Tensor:
    """Keep the `bits` highest bits of each 8-bit level and set the others to 0 (ISS-BDR of Liu et al. 2023 at 2 bits).

    As their code does it, with PIL's posterize: levels are rounded down, not to the nearest of an even spacing as in
    feature squeezing (Xu et al. 2018). Black stays black; white becomes 192 of 255 at 2 bits.

    >>> import torch
    >>> from purifyloader.transforms.functional import bit_depth
    >>> bit_depth(torch.linspace(0, 1, 256).reshape(1, 1, 16, 16), bits=2).unique().numel()
    4
    """
    check_bits(bits)
    levels = quantize(x_BCHW) & (0xFF00 >> bits & 0xFF)
    return (levels.float() / 255).to(x_BCHW.dtype)


@not_transformed("coin")
def coin(x_BCHW: Tensor, keys_B: Tensor, alpha: float) -> Tensor:
    """Read each pixel at a place up to `alpha` pixels away along each side (COIN; Wang et al. 2023 at alpha 2).

    The places are uniform and independent, one for all channels of a pixel, and a function of the image's int64 key;
    between pixels the image is read bilinearly, and beyond its border it is its border. (The published code goes on at
    the opposite border.) So the result is within the range of each image.

    >>> import torch
    >>> from purifyloader.core.noise import image_keys
    >>> from purifyloader.transforms.functional import coin
    >>> coin(torch.rand(2, 3, 32, 32), image_keys(0, 0, [0, 1]), alpha=2.0).shape
    torch.Size([2, 3, 32, 32])
    """
    check_alpha(alpha)
    _check_drawn("coin", x_BCHW, keys_B)
    height, width = x_BCHW.shape[2:]
    offset_B2HW = alpha * (2 * noise.uniform(keys_B, (2, height, width)) - 1)
    rows = torch.arange(height, device=x_BCHW.device)[:, None]
    columns = torch.arange(width, device=x_BCHW.device)
    y_BHW = (rows + offset_B2HW[:, 0]).clamp(0, height - 1)
    x_BHW = (columns + offset_B2HW[:, 1]).clamp(0, width - 1)
    top, left = y_BHW.long(), x_BHW.long()  # rounded down, for they are not negative
    down, right = ((place - whole).float()[:, None] for place, whole in ((y_BHW, top), (x_BHW, left)))
    below, beside = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    flat = x_BCHW.float().flatten(2)

    def at(row_BHW: Tensor, column_BHW: Tensor) -> Tensor:
        place = (row_BHW * width + column_BHW).flatten(1)[:, None].expand(-1, flat.shape[1], -1)
        return flat.gather(2, place).reshape(x_BCHW.shape)

    # a + t (b - a), which is exactly a where both are alike
    upper = at(top, left) + right * (at(top, beside) - at(top, left))
    lower = at(below, left) + right * (at(below, beside) - at(below, left))
    return (upper + down * (lower - upper)).to(x_BCHW.dtype)
