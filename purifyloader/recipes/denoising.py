"""A denoiser alone: ECLIPSE (Wang et al., ESORICS 2024), and one call with a certificate (Hong et al. 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack

from purifyloader.recipes.models import Model, as_denoiser
from purifyloader.recipes.registry import recipe
from purifyloader.recipes.sizes import Network, NetworkOptions

if TYPE_CHECKING:
    from purifyloader.diffusion.schedule import Schedule
    from purifyloader.purifiers import Purifier

__all__ = ["eclipse", "denoise_once"]


@recipe(options=Network)  # the bench has rows of its own for the parts of ECLIPSE: `purifyloader.bench.defences`
def eclipse(
    model: Model,
    *,
    t: float | None = None,
    sigma: float | None = None,
    steps: int | None = None,
    schedule: Schedule | None = None,
    sampler: Literal["ancestral", "ddim"] = "ancestral",
    compensate_once: bool = False,
    **options: Unpack[NetworkOptions],
) -> Purifier:
    """Purify as ECLIPSE does (Wang et al., ESORICS 2024, Algorithm 1): add noise, and take it off step by step.

    The published setting is the default: t = 100 of the cosine schedule with T = 4000 (6.37 px) and
    100 network calls. The other half of ECLIPSE is the compensation, drawn anew in every epoch: give
    `compensate=Compensate()` to `PurifiedDataset`.

    Args:
        model: name or folder of a denoiser, or one already loaded.
        t: timestep to noise to, through `schedule` (default: 100).
        sigma: or the noise level itself, in image units: 25 px is 25/255.
        steps: network calls; every timestep by default when t is given, one when sigma is.
        schedule: the meaning of t; the paper's continuous form (Eq. 11) is `ContinuousVP`.
        sampler: "ancestral" (the paper) or "ddim".
        compensate_once: also apply one fixed draw of the compensation, as Algorithm 1 prints it; to the
            whole image, for a tile alone would turn grey.
        options: see `purifyloader.recipes`.

    >>> from purifyloader import recipes
    >>> purify = recipes.eclipse("cifar10-sparse", sigma=25 / 255)
    >>> purify.calls, purify.config()["sigma_px"]
    (1, 25.0)
    """
    from purifyloader.purifiers import Chain, Compensation, Diffuse

    shared = Network(**options)
    purifier = shared.tiled(
        Diffuse(
            as_denoiser(model),
            t=100 if t is None and sigma is None else t,
            sigma=sigma,
            steps=steps,
            schedule=schedule,
            sampler=sampler,
            **shared.computing,
        )
    )
    return shared.resized(Chain(purifier, Compensation()) if compensate_once else purifier)


@recipe(options=Network)
def denoise_once(model: Model, sigma: float, **options: Unpack[NetworkOptions]) -> Purifier:
    """Add noise of exactly sigma (image units), then call the network once (Hong, Carlini & Kurakin 2024).

    Only what the network is told of the noise is rounded, where it was trained on timesteps: GetTimeStep(sigma) is the
    t nearest to (1 - abar_t) / abar_t = (2 sigma)^2, with a factor 2 that the paper leaves out, because networks see
    images in [-1, 1]. The noised image is neither clamped nor scaled. It is one draw an image: purify a training set so
    once for each model, and `purifyloader.certify` says what that guarantees. Resized or tiled, it guarantees nothing.

    Args:
        model: name or folder of a denoiser, or one already loaded: ours, a converted one, or a blind one
            (`purifyloader.diffusion.BlindDenoiser`).
        sigma: noise level in image units (25 px is 25/255), within the denoiser's range; added in float32.
        options: see `purifyloader.recipes`.

    >>> from purifyloader import recipes
    >>> recipes.denoise_once("cifar10-sparse", sigma=0.1).calls
    1
    """
    from purifyloader.purifiers import DenoiseOnce

    shared = Network(**options)
    denoiser = as_denoiser(model)
    return shared.around(DenoiseOnce(denoiser, sigma, **shared.computing))
