"""Check, draw and add perturbations in 8 bits: what attacks without a network share.

An additive attack is a `Draw`: a pure function of an image's label and its position in the dataset; any other is a
`Change`, which is given the image too. Both work in float64 with elementwise operations alone, in a fixed order, so
that the result does not depend on how many images are drawn together, as it would with a matrix product or a
reduction of the library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.checks import check_integer
from purifyloader.core.images import quantize
from purifyloader.errors import InputError

__all__ = ["Change", "Draw", "Images", "Integers", "as_labels", "as_size", "change_images", "draw_all", "poison"]
__all__ += ["purpose_keys", "scale_to_norm", "sha256_of", "size_of"]

Draw = Callable[[Tensor, Tensor], Tensor]
"""(label_B int64, position_B int64) -> float32 (B, H, W, 3), in units of [0, 1] images."""

Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images_BHWC float32 in [0, 1], label_B int64, position_B int64) -> floating point (B, H, W, 3), which is clamped."""

Integers = Tensor | NDArray[np.integer] | Sequence[int]
Images = TypeVar("Images", NDArray[np.uint8], Tensor)

_CHUNK = 1024  # images drawn together, which bounds memory


def purpose_keys(seed: int, attack: int, purpose: int, index: Tensor) -> Tensor:
    """Return int64 keys (B,): a function of (seed, attack, purpose, index), apart from those of other modules."""
    root = noise.fold_in(noise.fold_in(noise.key_from_seed(seed), attack), purpose)
    return noise.fold_in(root, index)


def _as_integers(name: str, values: Integers, low: int, high: int, hint: str) -> Tensor:
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be integers (N,). Got {type(values).__name__}: {error}") from None
    if array.shape == (0,):
        return torch.empty(0, dtype=torch.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"{name} must be integers (N,). Got {array.dtype} {array.shape}.")
    smallest, largest = int(array.min()), int(array.max())
    if smallest < low or largest >= high:
        raise InputError(f"{name} must lie in [{low}, {high}){hint}. Got {smallest} to {largest}.")
    return torch.from_numpy(array.astype(np.int64))  # a copy, as torch warns of arrays it must not write


def as_labels(labels: Integers, classes: int, hint: str = ", or classes= must be given") -> Tensor:
    check_integer("classes", classes, 1, error=InputError)
    labels_N = _as_integers("labels", labels, 0, classes, hint)
    if len(labels_N) == 0:
        raise InputError("labels must hold at least one label. Got none.")
    return labels_N


def _as_positions(positions: Integers | None, count: int) -> Tensor:
    """Return the positions in the dataset of `count` labels: 0, 1, ... where none are given."""
    if positions is None:
        return torch.arange(count)
    positions_N = _as_integers("positions", positions, 0, 2**63 - 1, "")
    if len(positions_N) != count:
        raise InputError(f"positions must be one for each label. Got {len(positions_N)} for {count} labels.")
    return positions_N


def as_size(size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(f"size must be the (height, width) of the images. Got {size!r}.")
    return size[0], size[1]


def size_of(images: NDArray[np.uint8] | Tensor) -> tuple[int, int]:
    """Check images, uint8 (N, H, W, 3), and return their height and width."""
    if not isinstance(images, np.ndarray | Tensor):
        raise InputError(f"images must be a numpy array or a tensor. Got {type(images).__name__}.")
    if images.dtype not in (np.uint8, torch.uint8) or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(f"images must be uint8 (N, H, W, 3). Got {images.dtype} {tuple(images.shape)}.")
    if 0 in images.shape:
        raise InputError(f"images must hold at least one image and pixel. Got {tuple(images.shape)}.")
    return int(images.shape[1]), int(images.shape[2])


def scale_to_norm(delta_BHWC: Tensor, norm: float) -> Tensor:
    """Scale each image's perturbation, float64, to the l2 norm `norm`, and round it to float32."""
    squares = delta_BHWC.flatten(1).square()
    while squares.shape[1] > 1:  # a sum by halves
        half = squares.shape[1] // 2
        odd = squares[:, 2 * half :]
        squares = torch.cat([squares[:, :half] + squares[:, half : 2 * half], odd], dim=1)
    length = squares.sqrt().reshape(-1, 1, 1, 1)
    usable = torch.isfinite(length) & (length > 0)
    if not bool(usable.all()):
        raise InputError(
            "A perturbation must be finite and not zero everywhere to be scaled to its norm. Got one of length "
            f"{float(length[~usable][0])}: change the coefficients."
        )
    return (delta_BHWC / length * norm).to(torch.float32)


def draw_all(draw: Draw, labels_N: Tensor, positions: Integers | None) -> Tensor:
    parts = zip(labels_N.split(_CHUNK), _as_positions(positions, len(labels_N)).split(_CHUNK), strict=True)
    return torch.cat([draw(label_B, position_B) for label_B, position_B in parts])


def poison(
    images: Images, labels_N: Tensor, indices: Integers | None, draw: Draw, positions: Integers | None = None
) -> Images:
    """Return a copy of the images with x + delta, clamped to [0, 1] and rounded to 8 bits; see `change_images`."""
    positions_N = _as_positions(positions, len(labels_N))

    def change(x: Tensor, label: Tensor, index: Tensor) -> Tensor:
        return x + draw(label, positions_N[index]).to(x.device)

    return change_images(images, labels_N, indices, change)


def change_images(images: Images, labels_N: Tensor, indices: Integers | None, change: Change) -> Images:
    """Return a copy of the images, those at `indices` (all if None) changed, clamped to [0, 1] and in 8 bits."""
    count = len(images)
    if len(labels_N) != count:
        raise InputError(f"There must be one label an image. Got {count} images and {len(labels_N)} labels.")
    chosen = torch.arange(count)
    if indices is not None:
        chosen = _as_integers("indices", indices, 0, count, "")
        if len(chosen.unique()) != len(chosen):
            raise InputError("indices must name each image once. Got repeated ones.")
    out = images.clone() if isinstance(images, Tensor) else images.copy()
    view = out if isinstance(out, Tensor) else torch.from_numpy(out)
    for index_B in chosen.split(_CHUNK):
        index = index_B.to(view.device)
        view[index] = quantize(change(view[index].to(torch.float32) / 255, labels_N[index_B], index_B))
    return out


def sha256_of(tensor: Tensor) -> str:
    """Hash the numbers of a tensor as float32: what a setting says of a file, whose path it must not hold."""
    return hashlib.sha256(tensor.to(torch.float32).contiguous().numpy().tobytes()).hexdigest()
