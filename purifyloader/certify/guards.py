"""List the reasons against a certificate, however the votes fall.

The guarantee is about models that depend on the training images through D + N(0, sigma^2 I) alone, with noise that
whoever changes the images cannot foresee. What is done afterwards to the noised images, with randomness of its own,
is post-processing and keeps it: denoising, augmentation, compensation of the fixed draw. Whatever looks at the
images before, or again, does not, and votes do not show it.
"""

from __future__ import annotations

from dataclasses import dataclass

from purifyloader.certify.statistics import best_radius, models_needed
from purifyloader.core.checks import check_flag
from purifyloader.errors import InputError

__all__ = ["Paths", "reasons_against"]


@dataclass(frozen=True)
class Paths:
    """Paths by which the training images that are to be certified reach a model.

    No field has a default: each must be known.

    Attributes:
        draws: how many fixed noise draws of each image one model sees, 1 in the paper; more are certified with
            `fixed_draws(sigma, draws)`. None for fresh noise in each epoch.
        secret_noise: the noise's seed is unknown to whoever changes the images, as from the operating system.
        selected: which images are used, or purified, is decided by looking at them un-noised (PureGen's Filt).
        warm_start: training begins on these images without noise. Weights from other images are no such start.
        own_denoiser: the denoiser, or an energy model that is used with it, was fitted to these images.
        triggered: the test inputs may be changed too, as by a back door's trigger.

    >>> from purifyloader.certify import Paths
    >>> Paths(1, secret_noise=True, selected=False, warm_start=False, own_denoiser=False, triggered=False).draws
    1
    """

    draws: int | None
    secret_noise: bool
    selected: bool
    warm_start: bool
    own_denoiser: bool
    triggered: bool

    def __post_init__(self) -> None:
        draws: object = self.draws
        if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
            raise InputError(f"draws must be a whole number, at least 1, or None for fresh noise. Got {draws!r}.")
        for name in ("secret_noise", "selected", "warm_start", "own_denoiser", "triggered"):
            check_flag(name, getattr(self, name), error=InputError)


def reasons_against(paths: Paths, models: int, alpha: float) -> list[str]:
    """List the reasons against a certificate, a sentence each; empty where there may be one.

    Args:
        models: m of estimation, at least 1.
        alpha: in (0, 1), how often a certificate may be false.

    >>> from purifyloader.certify import Paths, reasons_against
    >>> paths = Paths(1, secret_noise=False, selected=False, warm_start=False, own_denoiser=False, triggered=False)
    >>> len(reasons_against(paths, models=100, alpha=0.001))  # the noise can be foreseen
    1
    """
    reasons = []
    if paths.draws is None:
        reasons.append(
            "Fresh noise in each epoch shows a model endlessly many draws of an image, and the radius of K draws is "
            "that of one over sqrt(K): noise and denoise the training set once for each model."
        )
    if not paths.secret_noise:
        reasons.append(
            "Noise that can be foreseen can be taken off again beforehand: take its seed from the operating system, "
            "and do not publish it before the images are fixed."
        )
    if paths.selected:
        reasons.append(
            "Which images are used or purified was decided by looking at them without noise: use or purify all of "
            "them, or decide at random."
        )
    if paths.warm_start:
        reasons.append(
            "Training began on the same images without noise: start at random, or from weights of other images."
        )
    if paths.own_denoiser:
        reasons.append(
            "The denoiser or energy model has learned from the same images without noise: take one trained on others."
        )
    if paths.triggered:
        reasons.append("A trigger changes the test inputs, and the certificate is about changed training images alone.")
    if best_radius(1.0, models, alpha) == 0:
        reasons.append(
            f"{models} models cannot certify anything at alpha {alpha:g}, even where all agree: it takes at least "
            f"{models_needed(1.0, 0.0, alpha)} for estimation."
        )
    return reasons
