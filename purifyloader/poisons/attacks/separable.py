"""Linearly separable perturbations (Yu et al. 2022, "Availability attacks create shortcuts", 2111.00898).

One Gaussian cluster a class in k*k*3 dimensions, as scikit-learn's `make_classification` draws them without
label flips; each sample becomes k x k patches of constant colour over the image. For testing defences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.checks import check_number
from purifyloader.errors import InputError
from purifyloader.poisons.attacks import additive
from purifyloader.poisons.attacks.additive import Draw, Images, Integers, as_labels, purpose_keys
from purifyloader.poisons.attacks.choice import Victims, on_chosen_images
from purifyloader.poisons.poisoned import Bound

__all__ = ["attack", "lsp", "lsp_perturbation"]

_ATTACK = 0x6C7370  # "lsp"
_SAMPLE, _CENTRE, _MAP = 0, 1, 2  # what a key is for


def _centres(seed: int, classes: int, dimensions: int) -> Tensor:
    """Signs (classes, dimensions) of distinct random vertices; class c's depends on the classes before it."""
    if classes > 2**dimensions:
        raise InputError(
            f"patches must be larger for {classes} classes: there are {2**dimensions} vertices. Got a cube of "
            f"{dimensions} dimensions."
        )
    keys = purpose_keys(seed, _ATTACK, _CENTRE, torch.arange(classes))
    rows: dict[tuple[float, ...], None] = {}
    for number, key in enumerate(keys, start=1):
        steps = itertools.count()
        while len(rows) < number:  # a vertex that another has is drawn again
            drawn = noise.uniform(key.reshape(1), (dimensions,), next(steps))[0]
            rows[tuple(torch.where(drawn < 0.5, -1.0, 1.0).tolist())] = None
    return torch.tensor(list(rows), dtype=torch.float64)


def _draw(
    size: tuple[int, int], classes: int, seed: int, norm: float | None, patches: int, class_separation: float
) -> Draw:
    height, width = size
    if isinstance(patches, bool) or not isinstance(patches, int) or not 1 <= patches <= min(size):
        raise InputError(f"patches must be an integer from 1 to the image's {min(size)} pixels. Got {patches!r}.")
    check_number("class_separation", class_separation, above=0, error=InputError)
    length = _usual_norm(height, width) if norm is None else norm
    check_number("norm", length, above=0, error=InputError)
    dimensions = patches * patches * 3
    centres = class_separation * _centres(seed, classes, dimensions)
    map_keys = purpose_keys(seed, _ATTACK, _MAP, torch.arange(classes))
    maps = 2 * noise.uniform(map_keys, (dimensions, dimensions)) - 1
    rows, columns = (torch.arange(side) * patches // side for side in size)  # the patch of each

    def draw(label_B: Tensor, position_B: Tensor) -> Tensor:
        z = noise.normal(purpose_keys(seed, _ATTACK, _SAMPLE, position_B), (dimensions,)).to(torch.float64)
        features = centres[label_B]
        for i in range(dimensions):
            features = features + z[:, i : i + 1] * maps[label_B, i]
        blocks = features.reshape(-1, patches, patches, 3)
        return additive.scale_to_norm(blocks[:, rows][:, :, columns], length)

    return draw


def lsp_perturbation(
    labels: Integers,
    size: Sequence[int],
    *,
    positions: Integers | None = None,
    classes: int = 10,
    seed: int = 0,
    norm: float | None = None,
    patches: int = 4,
    class_separation: float = 10.0,
) -> Tensor:
    """Draw the perturbations that `lsp` adds, float32 (N, H, W, 3).

    Args:
        labels: integers (N,) in [0, classes).
        size: (height, width) of the images, each at least `patches`.
        positions: place of each label's image in the dataset, 0 to N - 1 if None. An image's perturbation is a
            function of (seed, position, label, size) and these arguments alone.
        norm: l2 norm of each, in units of [0, 1] images; None for 6/255 * sqrt(3 * height * width), 1.304 for CIFAR-10.
        patches: k, patches along each side; where it does not divide a side they differ by a pixel.
        class_separation: half the side of the hypercube whose vertices are the clusters' centres.

    Raises:
        InputError: an argument of another type, shape or range.

    >>> from purifyloader.poisons import lsp_perturbation
    >>> lsp_perturbation([0, 1, 0], (8, 8), norm=1.0).shape
    torch.Size([3, 8, 8, 3])
    """
    labels_N = as_labels(labels, classes)
    draw = _draw(additive.as_size(size), classes, seed, norm, patches, class_separation)
    return additive.draw_all(draw, labels_N, positions)


def lsp(
    images: Images,
    labels: Integers,
    *,
    indices: Integers | None = None,
    positions: Integers | None = None,
    classes: int = 10,
    seed: int = 0,
    norm: float | None = None,
    patches: int = 4,
    class_separation: float = 10.0,
) -> Images:
    """Return a copy of the images, uint8 (N, H, W, 3), poisoned with linearly separable patches.

    Args:
        indices: which images to poison, all if None.
        others: see `lsp_perturbation`.

    Raises:
        InputError: images, labels or an argument of another type, shape or range.

    >>> import torch
    >>> from purifyloader.poisons import lsp
    >>> images = torch.full((2, 8, 8, 3), 128, dtype=torch.uint8)
    >>> lsp(images, [0, 1], norm=1.0).dtype
    torch.uint8
    """
    size = additive.size_of(images)
    labels_N = as_labels(labels, classes)
    draw = _draw(size, classes, seed, norm, patches, class_separation)
    return additive.poison(images, labels_N, indices, draw, positions)


def _recorded(chosen: Victims, options: Mapping[str, Any]) -> Mapping[str, Any]:
    height, width = chosen.images.shape[1:3]
    return {**options, "norm": _usual_norm(height, width) if options["norm"] is None else options["norm"]}


def _usual_norm(height: int, width: int) -> float:
    return 6 / 255 * math.sqrt(3 * height * width)


attack = on_chosen_images("lsp", lsp, lambda options: Bound("l2", options["norm"]), _recorded)
