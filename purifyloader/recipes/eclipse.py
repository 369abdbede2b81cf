"""ECLIPSE (Wang et al., ESORICS 2024)."""

from __future__ import annotations

from purifyloader.diffusion.schedule import Schedule
from purifyloader.purifiers import Chain, Compensation, Diffuse, Purifier
from purifyloader.recipes.models import Model, as_denoiser
from purifyloader.recipes.sizes import check_sizes, resized, tiled

__all__ = ["eclipse"]


def eclipse(
    model: Model,
    *,
    t: float | None = None,
    sigma: float | None = None,
    steps: int | None = None,
    schedule: Schedule | None = None,
    sampler: str = "ancestral",
    compensate_once: bool = False,
    fast: bool = False,
    compute_batch: int = 32,
    resize: int | None = None,
    crop: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Purifier:
    """ECLIPSE's purification (Wang et al., ESORICS 2024, Algorithm 1).

    The published setting is the default: t = 100 of the cosine schedule with T = 4000 (6.37 px) and
    100 network calls. The other half of ECLIPSE is the compensation, drawn afresh in every epoch: give
    `compensate=Compensate()` to `PurifiedDataset`.

    Args:
        model: name, folder or denoiser.
        t: timestep to noise to, through `schedule`.
        sigma: or the noise level itself, in image units (25 px is 25/255).
        steps: network calls; every timestep by default when t is given, one when sigma is.
        schedule: what t means; the paper's continuous form (Eq. 11) is `ContinuousVP`.
        sampler: "ancestral" (the paper) or "ddim".
        compensate_once: also apply one fixed draw of the compensation, as Algorithm 1 prints it; to the
            whole image, for a tile alone would turn grey.
        fast: bfloat16 network arithmetic.
        compute_batch: images of every network call.
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the package.

    Raises:
        ConfigError: options that contradict each other.
    """
    check_sizes(resize, crop, tile, overlap)
    if t is None and sigma is None:
        t = 100
    purifier: Purifier = Diffuse(
        as_denoiser(model),
        t=t,
        sigma=sigma,
        steps=steps,
        schedule=schedule,
        sampler=sampler,
        dtype="bfloat16" if fast else "float32",
        compute_batch=compute_batch,
    )
    purifier = tiled(purifier, tile, overlap)
    return resized(Chain(purifier, Compensation()) if compensate_once else purifier, resize, crop)
