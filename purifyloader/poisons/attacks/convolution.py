"""CUDA, convolution-based unlearnable data (Sadasivan et al. 2023, arXiv:2303.04278). For testing defences.

Every image of a class goes through the class's own random blur. It is no small perturbation, and what purification
adds and removes leaves it there: the paper's attack is the honest hard case for defences of this kind.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from purifyloader.core import noise
from purifyloader.core.checks import check_choice, check_integer, check_number
from purifyloader.errors import InputError
from purifyloader.poisons.attacks.additive import Images, Integers, as_labels, change_images, purpose_keys, size_of
from purifyloader.poisons.attacks.choice import on_chosen_images

__all__ = ["attack", "cuda", "cuda_filters"]

_ATTACK = 0x63756461  # "cuda"
_FILTER = 0  # what a key is for
_SIDE = 3


def cuda_filters(
    *, classes: int = 10, seed: int = 0, blur: float = 0.3, unit: Literal["random", "centre"] = "random"
) -> Tensor:
    """Draw the filters that `cuda` convolves with, float64 (classes, 3, 3); class c's is a function of (seed, c).

    Args:
        blur: p_b of the paper; all weights but one are uniform in [0, blur].
        unit: where the weight of 1 is: "random", drawn for each class, as in the paper's code, which shifts images by
            up to a pixel too; or in the "centre".

    Raises:
        InputError: an argument of another type or range.

    >>> from purifyloader.poisons import cuda_filters
    >>> cuda_filters(classes=2).shape
    torch.Size([2, 3, 3])
    """
    check_integer("classes", classes, 1, error=InputError)
    check_number("blur", blur, above=0, error=InputError)
    check_choice("unit", unit, ("random", "centre"), error=InputError)
    keys = purpose_keys(seed, _ATTACK, _FILTER, torch.arange(classes))
    area = _SIDE * _SIDE
    drawn = noise.uniform(keys, (area + 1,))
    weights = blur * drawn[:, :area]
    place = (area * drawn[:, area]).to(torch.int64) if unit == "random" else torch.full((classes,), area // 2)
    weights[torch.arange(classes), place] = 1.0
    return weights.reshape(classes, _SIDE, _SIDE)


def _filtered(x_BHWC: Tensor, filters_B33: Tensor) -> Tensor:
    """Each image, zeros around it, with its filter slid over each channel, divided by its largest value: float64."""
    height, width = x_BHWC.shape[1:3]
    padded = pad(x_BHWC.to(torch.float64), (0, 0, 1, 1, 1, 1))
    out = torch.zeros_like(x_BHWC, dtype=torch.float64)
    for i in range(_SIDE):
        for j in range(_SIDE):
            out += filters_B33[:, i, j].reshape(-1, 1, 1, 1) * padded[:, i : i + height, j : j + width]
    largest = out.amax(dim=(1, 2, 3), keepdim=True)
    return out / torch.where(largest > 0, largest, 1.0)  # a black image stays black


def cuda(
    images: Images,
    labels: Integers,
    *,
    indices: Integers | None = None,
    classes: int = 10,
    seed: int = 0,
    blur: float = 0.3,
    unit: Literal["random", "centre"] = "random",
) -> Images:
    """Convolve each image, zero-padded, with its class's filter, and rescale it so that its largest value is 255.

    The images are uint8 (N, H, W, 3), and a copy is returned. As in the paper's code, but for rounding to 8 bits, which
    is to the nearest here and downwards there.

    Args:
        labels: integers (N,) in [0, classes).
        indices: which images to poison, all if None.
        others: see `cuda_filters`.

    Raises:
        InputError: images, labels or an argument of another type, shape or range.

    >>> import torch
    >>> from purifyloader.poisons import cuda
    >>> images = torch.full((2, 8, 8, 3), 128, dtype=torch.uint8)
    >>> int(cuda(images, [0, 1]).max())  # rescaled
    255
    """
    size_of(images)
    labels_N = as_labels(labels, classes)
    filters = cuda_filters(classes=classes, seed=seed, blur=blur, unit=unit)
    return change_images(images, labels_N, indices, lambda x, label, _: _filtered(x, filters[label].to(x.device)))


attack = on_chosen_images("cuda", cuda, lambda _: None)
