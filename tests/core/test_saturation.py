"""Saturated pixels stay saturated: white and black images through the recipes, with the models that ship.

Published code converts to 8 bits without clamping, where 257 becomes 1 and -1 becomes 255.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from purifyloader import plans, recipes
from purifyloader.core import noise
from purifyloader.core.images import quantize
from purifyloader.datasets.arrays import ArrayDataset
from purifyloader.purifiers import Purifier


def filt() -> Purifier:
    """Planned on the two images themselves, with k = 1: both are purified."""
    images = (255 * white_and_black()).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    labels = torch.zeros(2, dtype=torch.int64).numpy()
    return plans.plan(recipes.puregen_filt(1.0, fast=True), ArrayDataset(images, labels), progress=False)


RECIPES: dict[str, Callable[[], Purifier]] = {
    "eclipse": lambda: recipes.eclipse("cifar10-sparse", t=100, steps=4),
    "denoise-once": lambda: recipes.denoise_once("cifar10-sparse", 25 / 255),
    "jpeg": recipes.jpeg,
    "grayscale": recipes.grayscale,
    "coin": recipes.coin,
    "puregen-ebm, 6 steps": lambda: recipes.puregen_ebm(6, compute_batch=16),
    "puregen-ddpm, 2 calls": lambda: recipes.puregen_ddpm(calls=2, compute_batch=16),
}
SLOW: dict[str, Callable[[], Purifier]] = {
    "eclipse, 100 calls": lambda: recipes.eclipse("cifar10-eclipse"),
    "puregen-ebm": lambda: recipes.puregen_ebm(fast=True),
    "puregen-ddpm": lambda: recipes.puregen_ddpm(fast=True),
    "puregen-naive": lambda: recipes.puregen_naive(fast=True),
    "puregen-reps": lambda: recipes.puregen_reps(fast=True),
    "puregen-filt": filt,
}


def white_and_black(size: int = 32) -> torch.Tensor:
    return torch.stack([torch.ones(3, size, size), torch.zeros(3, size, size)])


def check(make: Callable[[], Purifier], size: int = 32) -> None:
    white, black = quantize(make()(white_and_black(size), noise.image_keys(0, 0, [0, 1]))).float()
    assert float(white.mean()) > 250
    assert float(white.min()) > 170  # the strongest noise here is 54 px; a pixel that wraps around is at 0
    assert float(black.mean()) < 5
    assert float(black.max()) < 85


@pytest.mark.parametrize("name", RECIPES)
def test_white_stays_white_and_black_black(name):
    check(RECIPES[name], size=16)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_white_stays_white_and_black_black_through_many_calls(name):
    check(SLOW[name])
