"""The published systems, each in a few lines of the algebra of `purifyloader.purifiers`.

A model is a name or folder that `purifyloader.pretrained.load` takes, or a denoiser already loaded.

Images of many or large sizes: every recipe takes `resize`, `crop`, `tile` and `overlap`, in pixels.

    resize, crop    the shorter side at `resize`, then the central crop x crop, before the purifier (`Resize`)
    tile, overlap   the purifier in squares of `tile` that share `overlap`, then blended (`Tiles`)

Both together resize first. A purifier in a chain or in tiles draws from child keys: with any of these
options an image gets other noise than without, whatever its size. With none the purifier is the bare one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purifyloader import pretrained, purifiers
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.schedule import Schedule
from purifyloader.diffusion.weights import weights_sha256
from purifyloader.errors import CheckpointError, ConfigError
from purifyloader.purifiers import Chain, Compensation, DenoiseOnce, Diffuse, Jpeg, Purifier, Resize, Tiles

__all__ = ["denoise_once", "eclipse", "from_json", "jpeg"]

Model = str | Path | Denoiser


def _denoiser(model: Model) -> Denoiser:
    return model if isinstance(model, Denoiser) else pretrained.load(model)


def _check_sizes(resize: int | None, crop: int | None, tile: int | None, overlap: int | None) -> None:
    """Before a model is loaded: an option that would be ignored is an error."""
    if crop is not None and resize is None:
        raise ConfigError(f"crop needs resize, the shorter side before the crop. Got crop={crop!r}: give resize= too.")
    if overlap is not None and tile is None:
        raise ConfigError(f"overlap needs tile, the side of a tile. Got overlap={overlap!r}: give tile= too.")


def _tiled(purifier: Purifier, tile: int | None, overlap: int | None) -> Purifier:
    return purifier if tile is None else Tiles(purifier, tile, overlap)


def _resized(purifier: Purifier, resize: int | None, crop: int | None) -> Purifier:
    return purifier if resize is None else Chain(Resize(resize, crop), purifier)


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
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the module.

    Raises:
        ConfigError: options that contradict each other.
    """
    _check_sizes(resize, crop, tile, overlap)
    if t is None and sigma is None:
        t = 100
    purifier: Purifier = Diffuse(
        _denoiser(model),
        t=t,
        sigma=sigma,
        steps=steps,
        schedule=schedule,
        sampler=sampler,
        dtype="bfloat16" if fast else "float32",
        compute_batch=compute_batch,
    )
    purifier = _tiled(purifier, tile, overlap)
    return _resized(Chain(purifier, Compensation()) if compensate_once else purifier, resize, crop)


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

    Args:
        model: name, folder or denoiser.
        sigma: noise level in image units (25 px is 25/255).
        fast: bfloat16 network arithmetic.
        compute_batch: images of every network call.
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the module.

    Raises:
        ConfigError: options that contradict each other.
    """
    _check_sizes(resize, crop, tile, overlap)
    dtype = "bfloat16" if fast else "float32"
    purifier = DenoiseOnce(_denoiser(model), sigma, dtype=dtype, compute_batch=compute_batch)
    return _resized(_tiled(purifier, tile, overlap), resize, crop)


def jpeg(
    quality: int = 10,
    *,
    resize: int | None = None,
    crop: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Purifier:
    """JPEG at quality 10 (ISS-J; Liu et al. 2023): the cheap baseline.

    Args:
        quality: 1 to 100.
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the module.

    Raises:
        InputError: no such quality.
        ConfigError: options that contradict each other.
    """
    _check_sizes(resize, crop, tile, overlap)
    return _resized(_tiled(Jpeg(quality), tile, overlap), resize, crop)


def from_json(text: str, model: Model | None = None) -> Purifier:
    """The purifier that `Purifier.to_json` described.

    Args:
        text: the JSON.
        model: the denoiser it uses, where that is not one that loads by the name in the JSON.

    Raises:
        CheckpointError: the weights are not the ones the JSON was written with.
    """

    def resolve(entry: Mapping[str, Any]) -> Denoiser:
        name = entry["name"]
        if model is None and name is None:
            raise CheckpointError("This purifier uses an unnamed denoiser. Give it as model=.")
        denoiser = _denoiser(name if model is None else model)
        if (got := weights_sha256(denoiser)) != entry["weights_sha256"]:
            raise CheckpointError(
                f"The denoiser {name!r} must have weights {entry['weights_sha256'][:12]}. Got {got[:12]}: "
                "give the right one as model=."
            )
        return denoiser

    return purifiers.from_json(text, resolve)
