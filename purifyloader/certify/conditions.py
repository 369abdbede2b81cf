"""Decide which conditions a run has, and whether each may have a certificate, before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from purifyloader import recipes
from purifyloader.certify.guards import Paths, reasons_against
from purifyloader.certify.noising import Noised, models_of, noised, shared_images
from purifyloader.errors import CheckpointError, ConfigError, InputError
from purifyloader.pretrained.learned import weights_of
from purifyloader.purifiers import Compensation, Purifier
from purifyloader.purifiers.base import models_in
from purifyloader.recipes.models import from_file

__all__ = ["Condition", "Knowledge", "conditions", "reasons"]

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Condition:
    """A level and a kind of noise, with its own models and votes; `plain` is noise without denoising."""

    name: str  # in tables, such as "sigma 0.25"
    folder: str  # of its votes
    purifier: Purifier
    noised: Noised
    plain: bool = False


def conditions(
    sigmas: Sequence[float], model: str, *, plain: bool = False, files: Sequence[Path] = (), fast: bool = True
) -> list[Condition]:
    """Make a condition of each sigma of `recipes.denoise_once` and of each file with the JSON of a purifier.

    Args:
        model: the denoiser, by name or folder; also one that the purifiers of `files` may use.
        plain: each sigma also without denoising, clamped to [0, 1] (the paper's comparison).
        fast: bfloat16 in the networks of `denoise_once`; the noise is float32.
    """
    if bad := [sigma for sigma in sigmas if not 0 < sigma < float("inf")]:
        raise ConfigError(
            f"must be above 0, in units of [0, 1] images: 0.25 is 63.75 px. Got {bad[0]}.", argument="sigma"
        )
    if plain and not sigmas:
        raise ConfigError(
            "is the noise of a sigma without denoising. Got no sigma: give one, or leave it out.", argument="plain"
        )
    made = []
    for sigma in sigmas:
        purifier = recipes.denoise_once(model, sigma, fast=fast)
        made.append(Condition(f"sigma {sigma:g}", f"sigma-{sigma:g}", purifier, noised(purifier)))
    for sigma in sigmas if plain else ():
        purifier = Compensation(p=0.0, sigma=sigma)
        name = f"sigma {sigma:g}, plain noise"
        made.append(Condition(name, f"sigma-{sigma:g}-plain", purifier, noised(purifier), plain=True))
    for file in files:
        purifier = from_file(file, [model])
        folder = re.sub(r"[^A-Za-z0-9_.-]+", "-", file.stem).strip(".") or "recipe"
        made.append(Condition(file.stem, f"recipe-{folder}", purifier, noised(purifier), not models_of(purifier)))
    for names in ([condition.folder for condition in made], [condition.name for condition in made]):
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"Expected conditions of different names. Got {twice[0]} twice: leave one out.")
    if not made:
        raise ConfigError("A certificate needs noise: a sigma, or a recipe that begins with noise. Got neither.")
    return made


@dataclass(frozen=True)
class Knowledge:
    """Facts about a run beside its purifiers; draws, warm_start and triggered as in `purifyloader.certify.Paths`.

    Attributes:
        learned_elsewhere: the user says that no model has learned from these images or from earlier versions of them,
            where the model itself does not say from what.
        model: that `conditions` was given: the name that it was saved with need not lead to it, or to another.
        size: (H, W) of the training images.
    """

    draws: int = 1
    warm_start: bool = False
    triggered: bool = False
    learned_elsewhere: bool = False
    model: str | None = None
    size: tuple[int, int] | None = None


def reasons(
    condition: Condition, knowledge: Knowledge, train: Hashes, test: Hashes, models: int, alpha: float
) -> tuple[str, ...]:
    """List why a condition has no certificate; empty where it may have one.

    Args:
        train, test: `image_hashes` of the images that models are trained and tested on.
        models: of estimation.

    Raises:
        InputError: a purifier's model has learned from test images, or does not say what it has learned from.
    """
    own = False
    for kind, entry in models_in(condition.purifier.config()):
        name, weights = entry.get("name"), entry["weights_sha256"]  # which decide what it has learned, and nothing else
        try:
            source = _source(kind, name, weights, knowledge.model)
            if source is None:
                raise InputError(
                    f"Expected to know what the models of {condition.name} have learned from. Got the {kind} {name!r}, "
                    "of which none with its weights is found by that name: load it from a folder with its config.json, "
                    "or say learned_elsewhere if you know it."
                )
            in_test, in_train = (shared_images(source, hashes, knowledge.size) for hashes in (test, train))
        except InputError:
            if knowledge.learned_elsewhere:  # the user's word stands for what is not known, and for nothing else
                continue
            raise
        own = own or in_train > 0
        if in_test:
            raise InputError(
                f"Expected test images that no model has learned from. Got {in_test} of {len(test)} that {source} has: "
                "take others, or another model."
            )
    paths = Paths(
        draws=knowledge.draws,
        secret_noise=True,  # `votes.new_seed`
        selected=condition.noised.selected,
        warm_start=knowledge.warm_start,
        own_denoiser=own,
        triggered=knowledge.triggered,
    )
    return (*condition.noised.reasons, *reasons_against(paths, models, alpha))


def _source(kind: str, name: str | None, weights: str, model: str | None) -> str | None:
    """Find a model with these weights: the one given, or one by its name; None where neither is it."""
    for candidate in (model, name):
        try:
            if candidate is not None and weights_of(candidate, kind) == weights:
                return candidate
        except CheckpointError:
            continue
    return None
