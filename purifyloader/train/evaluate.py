"""How well a denoiser denoises: PSNR on clean images that it was not trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from purifyloader import corruptions, noise
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.errors import InputError

__all__ = ["jpeg_psnr", "psnr"]


def _mean_psnr(x_BCHW: Tensor, clean_BCHW: Tensor) -> Tensor:
    error = (x_BCHW - clean_BCHW).square().mean(dim=(1, 2, 3)).clamp_min(1e-12)
    return -10 * error.log10()


def _noised(images_NCHW: Tensor, sigma: float, seed: int, start: int, end: int) -> tuple[Tensor, Tensor]:
    clean = images_NCHW[start:end].float() / 255
    keys = noise.image_keys(seed, 0, torch.arange(start, start + len(clean)))
    return clean, clean + sigma * noise.normal(keys, clean.shape[1:])


def _check(images_NCHW: Tensor) -> None:
    if images_NCHW.dtype != torch.uint8 or images_NCHW.ndim != 4 or len(images_NCHW) == 0:
        raise InputError(
            f"PSNR takes uint8 images (N, C, H, W), at least one. Got {images_NCHW.dtype} {tuple(images_NCHW.shape)}."
        )


@torch.no_grad()
def psnr(denoiser: Denoiser, images_NCHW: Tensor, sigma: float, seed: int = 0, batch_size: int = 100) -> float:
    """Mean over images of the PSNR, in dB with peak 1, of images noised with `sigma` and denoised in one call.

    Args:
        images_NCHW: uint8, clean, not trained on.
        sigma: in image units.
    """
    _check(images_NCHW)
    device = next(denoiser.parameters()).device
    values = []
    for start in range(0, len(images_NCHW), batch_size):
        clean, noised = _noised(images_NCHW, sigma, seed, start, start + batch_size)
        level = torch.full((len(clean),), sigma, dtype=torch.float64)
        values.append(_mean_psnr(denoiser(noised.to(device), level).clamp(0, 1).cpu(), clean))
    return float(torch.cat(values).mean())


def jpeg_psnr(images_NCHW: Tensor, sigma: float, quality: int = 10, seed: int = 0) -> float:
    """The same for JPEG as the denoiser, on the same noise: what doing something cheap gives."""
    _check(images_NCHW)
    clean, noised = _noised(images_NCHW, sigma, seed, 0, len(images_NCHW))
    return float(_mean_psnr(corruptions.jpeg(noised.clamp(0, 1), quality), clean).mean())
