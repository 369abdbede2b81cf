"""What a purifier means for a certificate: of which sigma, or why of none.

A certificate is about x + N(0, sigma^2 I): noise on every value of an image, independent, drawn once, and nothing done
to the image before. So only what comes first counts. All that comes after, a network, more noise, JPEG, sees the image
through that noise and is post-processing. Before it nothing is allowed: a step that takes two images further apart than
they were, as each of ours may, leaves less distance to certify than the statistics say.

With it comes what the purifier's models learned from, which must not be the images that are certified.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.energy import EnergyNetwork
from purifyloader.errors import InputError
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.learned import learned_from
from purifyloader.purifiers import (
    BitDepth,
    Chain,
    Coin,
    Compensation,
    DenoiseOnce,
    Diffuse,
    Grayscale,
    Jpeg,
    Langevin,
    Purifier,
    Repeat,
    Resize,
    Tiles,
    Where,
)
from purifyloader.purifiers.energy_above import conditions_of

__all__ = ["DECIDED", "Noised", "models_of", "noised", "shared_images"]


@dataclass(frozen=True)
class Noised:
    """What a purifier does to training images, as far as a certificate is concerned.

    Attributes:
        sigma: standard deviation, in units of [0, 1] images, of the Gaussian noise that everything else comes after;
            None where there is none.
        selected: some images are treated otherwise than others because of how they look without noise.
        reasons: why there is no such noise, a sentence each; empty exactly where there is a sigma.
    """

    sigma: float | None
    selected: bool
    reasons: tuple[str, ...]


# -- the rule ----------------------------------------------------------------------------------------

_EXPECTED = "Expected Gaussian noise on every value of an image before anything else is done to it."
_FIRST = "put DenoiseOnce, or another that begins with noise, before it"

# What a kind does to an image, in a sentence's middle, and the way out.
_BEFORE: dict[type[Purifier], str] = {
    BitDepth: f"BitDepth, which cuts levels apart that were next to each other: {_FIRST}.",
    Coin: f"Coin, which adds no noise and may read one pixel several times: {_FIRST}.",
    Grayscale: f"Grayscale, which changes how far images are apart: {_FIRST}.",
    Jpeg: f"Jpeg, whose rounding takes images apart that were almost alike: {_FIRST}.",
    Langevin: f"Langevin, whose first step follows the energy of the image as it is, before it adds noise: {_FIRST}.",
    Resize: (
        "Resize, which changes how far images are apart: resize the data set beforehand, and certify what comes of it."
    ),
    Tiles: (
        "Tiles, which draw noise for each tile, so that a pixel in several of them, or mirrored at the border of a "
        "small image, has several draws: purify whole images, of the size that the model was trained for."
    ),
    Where: (
        "Where, which chooses images by how they look without noise: purify all of them, or choose after the noise."
    ),
}

_SHARE = (
    "Where with a share k, whose threshold comes from another look at all images, which no model's noise covers: give "
    "it a threshold."
)

DECIDED: frozenset[type[Purifier]] = frozenset({*_BEFORE, Chain, Compensation, DenoiseOnce, Diffuse, Repeat})
"""The kinds whose first step is known here. A subclass of one is another kind: it may do anything."""


def noised(purifier: Purifier) -> Noised:
    """Whether Gaussian noise is the first thing that a purifier does to an image, and of which sigma.

    DenoiseOnce and Diffuse begin so, and Compensation that makes nothing grey; a chain and a repetition as their first
    stage does. It is about the values that the purifier is given: a grey image that is repeated for a purifier of
    colour has three draws of each of its own values, and an alpha plane goes around the purifier, without noise.

    Raises:
        InputError: no purifier.
    """
    given: Any = purifier
    if not isinstance(given, Purifier):
        raise InputError(
            f"Expected a purifier, as purifyloader.recipes make them. Got {type(given).__name__}: images that nothing "
            "is done to have no noise, and no certificate."
        )
    if any(True for _ in conditions_of(given)):  # at any place: what it finds is a second look at the same images
        return Noised(None, True, (f"{_EXPECTED} Got {_SHARE}",))
    steps = list(_steps(given))
    before = list(itertools.takewhile(lambda step: _sigma(step) is None, steps))
    if not before:
        return Noised(_sigma(steps[0]), False, ())
    reasons = dict.fromkeys(f"{_EXPECTED} Got {_got(step)}" for step in before)
    return Noised(None, any(isinstance(step, Where) for step in before), tuple(reasons))


def _steps(purifier: Purifier) -> Iterator[Purifier]:
    """What is done to an image, in order. A repetition counts once: what the first has not done, no other does."""
    if type(purifier) is Chain:
        for stage in purifier.stages:
            assert isinstance(stage, Purifier)
            yield from _steps(stage)
    elif type(purifier) is Repeat:
        yield from _steps(purifier.purifier)
    else:
        yield purifier
        if type(purifier) is Tiles or type(purifier) is Where:
            yield from _steps(purifier.purifier)


def _sigma(step: Purifier) -> float | None:
    """Of the noise that a step begins with; None where it does not."""
    sigma = 0.0
    if type(step) is DenoiseOnce:
        sigma = step.sigma
    elif type(step) is Diffuse:  # its samplers see the noised image alone, and draw other noise
        sigma = step.sigmas[0]
    elif type(step) is Compensation and step.p == 0:  # x + sigma z, and clamped after that
        sigma = step.sigma
    return float(sigma) if sigma > 0 else None


def _got(step: Purifier) -> str:
    if type(step) is Compensation and step.p != 0:
        return f"Compensation, which makes images grey (p={step.p:g}) before it adds noise: give it p=0, or {_FIRST}."
    name = type(step).__name__
    if type(step) in DECIDED:
        return _BEFORE.get(type(step), f"{name} with noise of sigma 0: give it a sigma above 0.")
    return f"{name}, of which it is not known here what it does first: {_FIRST}."


# -- the models --------------------------------------------------------------------------------------


def models_of(purifier: Purifier) -> list[Denoiser | EnergyNetwork]:
    """The denoisers and energy models inside, in the order in which images come to them; those of a `Where` too.

    Each is the purifier's own frozen copy, with the `name` of the checkpoint it was loaded from, None where it is from
    none. Of copies with one name and the same weights there is one, but for a copy in bfloat16 beside one in float32.
    What a plugin keeps in another way than as a module of its own is not seen.
    """
    found: dict[tuple[str, str | None, str], Denoiser | EnergyNetwork] = {}
    for part in purifier.modules():
        if isinstance(part, Denoiser | EnergyNetwork):
            found.setdefault((type(part).__name__, part.name, weights_sha256(part)), part)
    return list(found.values())


def shared_images(model: str | os.PathLike[str], train: NDArray[np.uint64], size: tuple[int, int] | None = None) -> int:
    """How many of these training images a model learned from, or the model that its training started from.

    By the hash of the very pixels: one that was changed since, poisoned or resized, is another image. Where the clean
    images are at hand too, ask for both.

    Args:
        model: name, folder or hub id, of a denoiser or an energy model.
        train: uint64 (N,), of `purifyloader.files.hashes.image_hashes`: of the images as uint8 (H, W, C).
        size: (H, W) of these images. A model that learned from images resized to another size does not say.

    Returns:
        from 0 to N.

    Raises:
        InputError: no such hashes, or a model that does not say which images it learned from.
        CheckpointError: no such model.
    """
    given: Any = train
    if not isinstance(given, np.ndarray) or given.dtype != np.uint64 or given.ndim != 1:
        got = f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__
        raise InputError(f"Expected the hashes of training images, uint64 (N,). Got {got}: give it image_hashes(...).")
    return int(np.isin(train, learned_from(model, size)).sum())
