"""The published systems, each in a few lines of the algebra of `purifyloader.purifiers`.

A model is a name or folder that `purifyloader.pretrained.load` takes, or a denoiser already loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purifyloader import pretrained, purifiers
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.schedule import Schedule
from purifyloader.diffusion.weights import weights_sha256
from purifyloader.errors import CheckpointError
from purifyloader.purifiers import Chain, Compensation, DenoiseOnce, Diffuse, Jpeg, Purifier

__all__ = ["denoise_once", "eclipse", "from_json", "jpeg"]

Model = str | Path | Denoiser


def _denoiser(model: Model) -> Denoiser:
    return model if isinstance(model, Denoiser) else pretrained.load(model)


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
        compensate_once: also apply one fixed draw of the compensation, as Algorithm 1 prints it.
        fast: bfloat16 network arithmetic.
        compute_batch: images of every network call.
    """
    if t is None and sigma is None:
        t = 100
    purifier = Diffuse(
        _denoiser(model),
        t=t,
        sigma=sigma,
        steps=steps,
        schedule=schedule,
        sampler=sampler,
        dtype="bfloat16" if fast else "float32",
        compute_batch=compute_batch,
    )
    return Chain(purifier, Compensation()) if compensate_once else purifier


def denoise_once(model: Model, sigma: float, *, fast: bool = False, compute_batch: int = 32) -> Purifier:
    """Noise of exactly sigma (image units), then one network call (Hong, Carlini & Kurakin 2024)."""
    dtype = "bfloat16" if fast else "float32"
    return DenoiseOnce(_denoiser(model), sigma, dtype=dtype, compute_batch=compute_batch)


def jpeg(quality: int = 10) -> Purifier:
    """JPEG at quality 10 (ISS-J; Liu et al. 2023): the cheap baseline."""
    return Jpeg(quality)


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
