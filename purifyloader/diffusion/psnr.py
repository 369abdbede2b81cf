"""Measure PSNR: of a denoiser on noised images, and of JPEG or nothing in its place on the same noise.

Images to measure on are uint8 (N, C, H, W); noise levels `sigma` are in units of [0, 1] images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from purifyloader.core import corruptions, noise
from purifyloader.core.devices import device_of
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.errors import InputError

__all__ = ["batch_size_of", "check_images", "estimate", "jpeg_psnr", "noised", "noised_psnr", "psnr", "psnr_of"]

_BATCH_VALUES = 100 * 3 * 64 * 64  # bounds the memory of a batch of large images


def check_images(images_NCHW: Tensor, what: str = "PSNR takes") -> None:
    """Raise `InputError` unless these are images to measure on; `what` begins the message, such as "PSNR takes"."""
    is_tensor = isinstance(images_NCHW, Tensor)
    if not is_tensor or images_NCHW.dtype != torch.uint8 or images_NCHW.ndim != 4 or images_NCHW.numel() == 0:
        got = f"{images_NCHW.dtype} {tuple(images_NCHW.shape)}" if is_tensor else type(images_NCHW).__name__
        raise InputError(f"{what} uint8 images (N, C, H, W), at least one, as a tensor. Got {got}.")


def psnr_of(x_BCHW: Tensor, clean_BCHW: Tensor) -> Tensor:
    """Compute the PSNR of each image in dB with peak 1, (B,); 120 where there is no error."""
    error = (x_BCHW - clean_BCHW).square().mean(dim=(1, 2, 3)).clamp_min(1e-12)
    return -10 * error.log10()


def batch_size_of(images_NCHW: Tensor) -> int:
    """Choose a batch size for images of this size: 100, fewer of more than 64 x 64 pixels."""
    return max(1, min(100, _BATCH_VALUES // images_NCHW[0].numel()))


def noised(
    images_NCHW: Tensor, sigma: float, seed: int = 0, start: int = 0, end: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return images `start` to `end` of uint8 ones, clean and noised, both float32 and neither clamped.

    The noise of an image is a function of (seed, its position) alone.
    """
    clean = images_NCHW[start:end].float() / 255
    keys = noise.image_keys(seed, 0, torch.arange(start, start + len(clean), device="cpu"))
    return clean, clean + sigma * noise.normal(keys, clean.shape[1:])


def estimate(denoiser: Denoiser, x_BCHW: Tensor, sigma: float) -> Tensor:
    """Denoise in one network call on the denoiser's device; returns x0, unclipped, float32 on the CPU."""
    level = torch.full((len(x_BCHW),), sigma, dtype=torch.float64, device="cpu")
    return denoiser(x_BCHW.to(device_of(denoiser)), level).float().cpu()


@torch.no_grad()
def _mean_psnr(
    images_NCHW: Tensor, sigma: float, seed: int, wash: Callable[[Tensor], Tensor], batch_size: int | None = None
) -> float:
    check_images(images_NCHW)
    size = batch_size_of(images_NCHW) if batch_size is None else batch_size
    values = []
    for start in range(0, len(images_NCHW), size):
        clean, x = noised(images_NCHW, sigma, seed, start, start + size)
        values.append(psnr_of(wash(x), clean))
    return float(torch.cat(values).mean())


def psnr(denoiser: Denoiser, images_NCHW: Tensor, sigma: float, seed: int = 0, batch_size: int | None = None) -> float:
    """Measure a denoiser: the mean PSNR, in dB with peak 1, of images noised with `sigma` and denoised in one call.

    The images are uint8 (N, C, H, W), clean and not trained on; sigma is in image units, in the denoiser's range. A
    call has `batch_size` images, by their size if None, 100 or fewer.

    >>> import torch
    >>> from purifyloader.evaluation import psnr
    >>> from purifyloader.pretrained import load
    >>> images = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    >>> psnr(load("cifar10-sparse"), images, sigma=25 / 255) > 30
    True
    """
    return _mean_psnr(images_NCHW, sigma, seed, lambda x: estimate(denoiser, x, sigma).clamp(0, 1), batch_size)


def jpeg_psnr(images_NCHW: Tensor, sigma: float, quality: int = 10, seed: int = 0) -> float:
    """Measure JPEG in a denoiser's place, as a cheap baseline, on the noise of `psnr`.

    >>> import torch
    >>> from purifyloader.evaluation import jpeg_psnr
    >>> jpeg_psnr(torch.full((1, 3, 32, 32), 128, dtype=torch.uint8), sigma=25 / 255) > 20
    True
    """
    return _mean_psnr(images_NCHW, sigma, seed, lambda x: corruptions.jpeg(x.clamp(0, 1), quality))


def noised_psnr(images_NCHW: Tensor, sigma: float, seed: int = 0) -> float:
    """Measure doing nothing, on the noise of `psnr`: the PSNR of the noised images, clamped to [0, 1].

    >>> import torch
    >>> from purifyloader.evaluation import noised_psnr
    >>> round(noised_psnr(torch.full((1, 3, 32, 32), 128, dtype=torch.uint8), sigma=0.1))
    20
    """
    return _mean_psnr(images_NCHW, sigma, seed, lambda x: x.clamp(0, 1))
