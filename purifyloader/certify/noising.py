"""Find the noise of a purifier that a certificate can be about, or why there is none.

A certificate is about x + N(0, sigma^2 I): noise on every value of an image, independent, drawn once, and nothing done
to the image before. So only what comes first counts. All that comes after, a network, more noise, JPEG, sees the image
through that noise and is post-processing. Before it nothing is allowed: a step that takes two images further apart than
they were, as each of ours may, leaves less distance to certify than the statistics say. The purifier's models must not
have learned from the images that are certified.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.energy import EnergyNetwork
from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json
from purifyloader.pretrained.kinds import identity_of, kind_of
from purifyloader.pretrained.learned import learned_from
from purifyloader.purifiers import Purifier
from purifyloader.purifiers.base import UNKNOWN_FIRST, conditions_of

__all__ = ["Noised", "models_of", "noised", "says_what_it_does_first", "shared_images"]


@dataclass(frozen=True)
class Noised:
    """Noise that a purifier adds to training images, as far as a certificate is concerned.

    Attributes:
        sigma: of the Gaussian noise that everything else comes after, in units of [0, 1] images; None for none.
        selected: some images are treated otherwise than others because of how they look without noise.
        reasons: why there is no such noise, a sentence each; empty exactly where there is a sigma.

    >>> from purifyloader import recipes
    >>> from purifyloader.certify import noised
    >>> noised(recipes.jpeg(10)).reasons[0].split(" Got ")[1].split(",")[0]
    'Jpeg'
    """

    sigma: float | None
    selected: bool
    reasons: tuple[str, ...]


_EXPECTED = "A certificate needs Gaussian noise on every value of an image before anything else is done to it."

_SHARE = (
    "Where with a share k, whose threshold comes from another look at all images, which no model's noise covers: give "
    "it a threshold."
)


def noised(purifier: Purifier) -> Noised:
    """Find out whether Gaussian noise is the first thing that a purifier does to an image, and of which sigma.

    Each purifier says so of itself (`Purifier.noise_first`). It is about the values that the purifier is given: a grey
    image that is repeated for a purifier of colour has three draws of each of its own values, and an alpha plane goes
    around the purifier, without noise.

    >>> from purifyloader import recipes
    >>> from purifyloader.certify import noised
    >>> noised(recipes.denoise_once("cifar10-sparse", 0.25)).sigma
    0.25
    """
    given: object = purifier
    if not isinstance(given, Purifier):
        raise InputError(
            f"A certificate is about a purifier, as purifyloader.recipes make them. Got {type(given).__name__}: images "
            "that nothing is done to have no noise, and no certificate."
        )
    if any(True for _ in conditions_of(given)):  # at any place: a share is a second look at the same images
        return Noised(None, True, (f"{_EXPECTED} Got {_SHARE}",))
    reasons: dict[str, None] = {}
    selected = False
    for step in _steps(given):
        first = _noise_first(step)
        if isinstance(first, float):
            if not reasons:
                return Noised(first, False, ())
            break
        reasons[f"{_EXPECTED} Got {type(step).__name__}{first}"] = None
        selected = selected or step.selects
    return Noised(None, selected, tuple(reasons))


def _says(purifier: Purifier, method: str) -> bool:
    """A subclass may do anything before what its parent does, so that only what a class says itself counts."""
    return method in vars(type(purifier))


def says_what_it_does_first(kind: type[Purifier]) -> bool:
    """Tell whether a kind of purifier can be decided about, rather than refused as unknown."""
    return not {"noise_first", "in_order"}.isdisjoint(vars(kind))


def _steps(purifier: Purifier) -> Iterator[Purifier]:
    """List the steps that an image goes through, those of compositions too."""
    for step in purifier.in_order() if _says(purifier, "in_order") else (purifier,):
        if step is purifier:
            yield step
        else:
            yield from _steps(step)


def _noise_first(step: Purifier) -> float | str:
    """Return the sigma above 0 that a step begins with; else the rest of a sentence that begins with its class."""
    first = step.noise_first() if _says(step, "noise_first") else UNKNOWN_FIRST
    if isinstance(first, str):
        return f", {first}"
    return float(first) if first > 0 else " with noise of sigma 0: give it a sigma above 0."


def models_of(purifier: Purifier) -> list[Denoiser | EnergyNetwork]:
    """List the denoisers and energy models inside, in the order in which images come to them; those of a `Where` too.

    Each is the purifier's own frozen copy, with the `name` of its checkpoint, None where it is from none. Of copies
    with one name, the same weights (in one dtype) and the same function there is one. A plugin's must be modules of its
    own.

    >>> from purifyloader import recipes
    >>> from purifyloader.certify import models_of
    >>> [model.name for model in models_of(recipes.denoise_once("cifar10-sparse", 0.25))]
    ['cifar10-sparse']
    """
    models: dict[str, Denoiser | EnergyNetwork] = {}
    for part in purifier.modules():
        if kind_of(part) is not None:
            model: Any = part
            models.setdefault(canonical_json(identity_of(part)), model)
    return list(models.values())


def shared_images(model: str | os.PathLike[str], train: NDArray[np.uint64], size: tuple[int, int] | None = None) -> int:
    """Count the training images that a model learned from, or the model that its training started from.

    By the hash of the very pixels: one that was changed since, poisoned or resized, is another image. Where the clean
    images are at hand too, ask for both.

    Args:
        model: name, folder or hub id, of a denoiser or an energy model.
        train: uint64 (N,), of `purifyloader.files.hashes.image_hashes`.
        size: (H, W) of these images. A model that learned from images resized to another size does not say.

    Raises:
        InputError: no such hashes, or a model that does not say which images it learned from.

    >>> import numpy as np
    >>> from purifyloader.certify import shared_images
    >>> from purifyloader.files.hashes import image_hashes
    >>> shared_images("cifar10-sparse", image_hashes(np.zeros((2, 32, 32, 3), np.uint8)))
    0
    """
    hashes: object = train
    if not isinstance(hashes, np.ndarray) or hashes.dtype != np.uint64 or hashes.ndim != 1:
        got = f"{hashes.dtype} {hashes.shape}" if isinstance(hashes, np.ndarray) else type(hashes).__name__
        raise InputError(
            f"train must be the hashes of training images, uint64 (N,). Got {got}. Give it image_hashes(...)."
        )
    return int(np.isin(train, learned_from(model, size)).sum())
