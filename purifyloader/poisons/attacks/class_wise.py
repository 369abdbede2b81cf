"""URP, one random pattern a class (Huang et al. 2021, "Unlearnable Examples", arXiv:2101.04898). For testing defences.

The simplest shortcut: every image of a class carries the same noise, which is easier to learn than what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.checks import check_integer, check_number
from purifyloader.errors import InputError
from purifyloader.poisons.attacks.additive import Images, Integers, as_labels, as_size, poison, purpose_keys, size_of
from purifyloader.poisons.attacks.choice import on_chosen_images
from purifyloader.poisons.poisoned import Bound

__all__ = ["attack", "class_patterns", "urp"]

_ATTACK = 0x757270  # "urp"
_PATTERN = 0  # what a key is for


def class_patterns(
    size: Sequence[int],
    *,
    classes: int = 10,
    seed: int = 0,
    epsilon: float = 8 / 255,
    distribution: Literal["uniform", "gaussian"] = "uniform",
) -> Tensor:
    """Draw the patterns that `urp` adds, float32 (classes, H, W, 3), in units of [0, 1] images.

    Class c's is a function of (seed, c, size) and these arguments alone. Each value is a whole number of levels within
    the bound, so that every image of a class gets exactly the same, and no rounding leads out of the bound.

    Args:
        size: (height, width) of the images.
        epsilon: the largest value, in units of [0, 1] images; at least a level, 1/255.
        distribution: "uniform" in [-epsilon, epsilon], or "gaussian" of standard deviation epsilon, clipped there.

    Raises:
        InputError: an argument of another type or range.

    >>> from purifyloader.poisons import class_patterns
    >>> class_patterns((8, 8), classes=3, epsilon=8 / 255).shape
    torch.Size([3, 8, 8, 3])
    """
    check_integer("classes", classes, 1, error=InputError)
    check_number("epsilon", epsilon, above=0, error=InputError)
    keys = purpose_keys(seed, _ATTACK, _PATTERN, torch.arange(classes))
    levels = math.floor(255 * epsilon + 1e-6)  # 8/255 may be a hair below what it is meant to be
    if not 1 <= levels <= 255:
        raise InputError(f"epsilon must be from 1/255 to 1, in units of [0, 1] images. Got {epsilon!r}.")
    shape = (*as_size(size), 3)
    if distribution == "uniform":
        drawn = 2 * noise.uniform(keys, shape) - 1
    elif distribution == "gaussian":
        drawn = noise.normal(keys, shape).to(torch.float64)
    else:
        raise InputError(f"distribution must be uniform or gaussian. Got {distribution!r}.")
    return ((255 * epsilon * drawn).round().clamp(-levels, levels) / 255).to(torch.float32)


def urp(
    images: Images,
    labels: Integers,
    *,
    indices: Integers | None = None,
    classes: int = 10,
    seed: int = 0,
    epsilon: float = 8 / 255,
    distribution: Literal["uniform", "gaussian"] = "uniform",
) -> Images:
    """Return a copy of the images, uint8 (N, H, W, 3), poisoned with their class's random pattern.

    Args:
        labels: integers (N,) in [0, classes).
        indices: which images to poison, all if None.
        others: see `class_patterns`.

    Raises:
        InputError: images, labels or an argument of another type, shape or range.

    >>> import torch
    >>> from purifyloader.poisons import urp
    >>> images = torch.full((2, 8, 8, 3), 128, dtype=torch.uint8)
    >>> int((urp(images, [0, 1]).int() - 128).abs().max())
    8
    """
    size = size_of(images)
    labels_N = as_labels(labels, classes)
    patterns = class_patterns(size, classes=classes, seed=seed, epsilon=epsilon, distribution=distribution)
    return poison(images, labels_N, indices, lambda label_B, _: patterns[label_B])


attack = on_chosen_images("urp", urp, lambda options: Bound("linf", options["epsilon"]))
