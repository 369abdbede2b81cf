"""Denoising with a certificate (Hong, Carlini & Kurakin 2024)."""

from __future__ import annotations

from purifyloader.purifiers import DenoiseOnce, Purifier
from purifyloader.recipes.models import Model, as_denoiser
from purifyloader.recipes.sizes import check_sizes, resized, tiled

__all__ = ["denoise_once"]


def denoise_once(
    model: Model,
    sigma: float,
    *,
    fast: bool = False,
    compute_batch: int = 32,
    resize: int | None = None,
    crop: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Purifier:
    """Noise of exactly sigma (image units), then one network call (Hong, Carlini & Kurakin 2024).

    Only what the network is told of the noise is rounded, where it was trained on timesteps: GetTimeStep(sigma) is the
    t nearest to (1 - abar_t) / abar_t = (2 sigma)^2, with a factor 2 that the paper leaves out, because networks see
    images in [-1, 1]. The noised image is neither clamped nor scaled. It is one draw an image: purify a training set so
    once for each model, and `purifyloader.certify` says what that guarantees. Resized or tiled, it guarantees nothing.

    Args:
        model: name, folder or denoiser: ours, a converted one, or a blind one (`purifyloader.diffusion.BlindDenoiser`).
        sigma: noise level in image units (25 px is 25/255), within the denoiser's range.
        fast: bfloat16 network arithmetic; the noise is added before, in float32.
        compute_batch: images of every network call.
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the package.

    Raises:
        ConfigError: options that contradict each other.
    """
    check_sizes(resize, crop, tile, overlap)
    dtype = "bfloat16" if fast else "float32"
    purifier = DenoiseOnce(as_denoiser(model), sigma, dtype=dtype, compute_batch=compute_batch)
    return resized(tiled(purifier, tile, overlap), resize, crop)
