"""Descend on finished networks, image by image, in logits or in last features: what TAP, SEP and EFP share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F

from purifyloader.errors import InputError
from purifyloader.poisons.attacks.clean import Clean
from purifyloader.poisons.attacks.pgd import Loss, pgd, random_start
from purifyloader.poisons.attacks.presets import AttackSettings, TrainedSettings
from purifyloader.poisons.attacks.surrogate import Surrogate
from purifyloader.poisons.poisoned import Bound
from purifyloader.victims.augment import crop_and_flip, uniforms

__all__ = ["class_features", "descend", "feature_distance", "shifted", "starts"]

_START, _VIEW = 0x73747274, 0x76696577  # "strt", "view": what the keys drawn here are for


def starts(clean: Clean, index_B: Tensor, bound: Bound, seed: int) -> Tensor:
    """Draw a perturbation within the bound for each index, (B, C, H, W): a function of (seed, index) alone."""
    return random_start(uniforms(seed, _START, 0, index_B, tuple(clean.x.shape[1:])), bound)


def shifted(clean: Clean, shift: int) -> Tensor:
    """Return the class (y + shift) mod classes that each image is to be taken for, (N,); never its own."""
    if shift % clean.classes == 0:
        raise InputError(
            f"shift must turn each of the {clean.classes} classes into another. Got {shift}: give one that is no "
            f"multiple of {clean.classes}."
        )
    return (clean.y + shift) % clean.classes


def descend(
    clean: Clean, settings: TrainedSettings, seed: int, loss_of: Callable[[Tensor], Loss], *, minimise: bool = True
) -> Tensor:
    """Descend to a perturbation of each image, (N, C, H, W), from a random start.

    `loss_of` gives the loss of the images of index_B, to be made small, or large.
    """
    delta = torch.empty(clean.x.shape, device=clean.x.device)
    for index_B in clean.batches(settings.batch_size):
        loss = loss_of(index_B)
        delta[index_B] = pgd(
            _of_views(loss, settings, seed, index_B) if settings.augment else loss,
            clean.images(index_B),
            settings.bound,
            steps=settings.steps,
            step_size=settings.step_size,
            minimise=minimise,
            start=starts(clean, index_B, settings.bound, seed),
        )
        clean.bar.update(settings.steps)
    return delta


def _of_views(loss: Loss, settings: AttackSettings, seed: int, index_B: Tensor) -> Loss:
    """Return the loss of the images as a training would crop and flip them, drawn again for each call."""
    calls = count()

    def of_view(x_BCHW: Tensor) -> Tensor:
        drawn = uniforms(seed, _VIEW, next(calls), index_B, (3,))
        return loss(crop_and_flip(x_BCHW, drawn, settings.pad, settings.flip))

    return of_view


def feature_distance(network: Surrogate, feature_BF: Tensor) -> Loss:
    """Return a function that gives the l2 distance of each image's features from these."""
    return lambda x_BCHW: (network.features(x_BCHW) - feature_BF).norm(dim=1)


@torch.no_grad()
def class_features(clean: Clean, network: Surrogate) -> Tensor:
    """Return the mean features (classes, F) of the clean images of each class; refuse one without an image."""
    counts = torch.bincount(clean.y, minlength=clean.classes)
    if not bool(counts.all()):
        absent = int((counts == 0).nonzero()[0, 0])
        raise InputError(
            f"Each class from 0 to {clean.classes - 1} must have an image, for its mean features. Got none of class "
            f"{absent}: number the classes without gaps."
        )
    # a matrix product, as adding up by index has no fixed order on a GPU
    parts = [
        F.one_hot(clean.y[index_B], clean.classes).double().T @ network.features(clean.images(index_B)).double()
        for index_B in clean.batches(500)
    ]
    return (torch.stack(parts).sum(dim=0) / counts[:, None]).float()
