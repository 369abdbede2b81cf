"""What a reader is asked, and what all of them need: the clean set, labels, and 8-bit images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from purifyloader.errors import InputError
from purifyloader.images import quantize
from purifyloader.poisons.poisoned import Bound, Poisoned

__all__ = ["Arrays", "Request", "add", "as_levels", "full", "indexed", "label_of"]

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]

_CHUNK = 1024  # images made 8-bit together, which bounds memory


@dataclass(frozen=True)
class Request:
    """A path, and what the caller of `read` says of it; see there."""

    path: Path
    clean: Arrays | None = None
    bound: Bound | None = None
    checked: bool = True
    drop_negative: bool = False
    target_class: int | None = None
    count: int | None = None
    seed: int = 0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def need_clean(self, why: str) -> Arrays:
        if self.clean is None:
            raise InputError(
                f"{self.path} {why}. Got no clean=: give the clean training set, a dataset without its transform or "
                "(images uint8 (N, H, W, C), labels), in the order that the poison was made for."
            )
        return self.clean

    def bound_or(self, known: Bound | None) -> Bound | None:
        return known if self.bound is None else self.bound


def as_levels(images: NDArray[Any], what: str, tolerance: float = 0.01) -> NDArray[np.uint8]:
    """Floating-point images (N, H, W, C) in [0, 1] as uint8, rounded.

    Args:
        tolerance: how far outside of [0, 1] a number may lie, to be clamped.

    Raises:
        InputError: NaN, or a range that is another.
    """
    if not np.isfinite(images).all():
        raise InputError(f"{what} must hold finite numbers. Got NaN or infinity: the file is damaged.")
    low, high = float(images.min()), float(images.max())
    if low < -tolerance or high > 1 + tolerance:
        hint = (
            "divide levels of 0 to 255 by 255"
            if low >= 0 and high > 2
            else "add 1 to images in [-1, 1], and halve"
            if low >= -1 - tolerance and high <= 1 + tolerance
            else "undo the normalisation, by mean= and std= where the format has them"
        )
        raise InputError(f"{what} must hold images in [0, 1]. Got {low:.4g} to {high:.4g}: {hint}.")
    if high <= 1.5 / 255:
        raise InputError(
            f"{what} must hold images in [0, 1]. Got {low:.4g} to {high:.4g}, all black: divided by 255 once too often."
        )
    out = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), _CHUNK):
        part = torch.from_numpy(np.ascontiguousarray(images[start : start + _CHUNK], np.float32))
        out[start : start + _CHUNK] = quantize(part).numpy()
    return out


def add(images: NDArray[np.uint8], delta: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """A copy of the images, each moved by its row of `delta` (R, H, W, C) in units of [0, 1] images, rounded."""
    out = images.copy()
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        moved = images[part].astype(np.float32) / 255 + delta[rows[part]].astype(np.float32)
        out[part] = quantize(torch.from_numpy(moved)).numpy()
    return out


def label_of(value: Any, what: str) -> int:
    """An integer of any kind, such as a tensor of one.

    Raises:
        InputError: it is none, or below 0.
    """
    number = value.item() if hasattr(value, "item") and getattr(value, "size", 1) != 0 else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise InputError(f"{what} must be a label, an integer from 0. Got {value!r:.80}.")
    return number


def full(
    request: Request, images: NDArray[np.uint8], labels: NDArray[np.int64], attack: str, bound: Bound | None = None
) -> Poisoned:
    """A whole training set: poisoned is what differs from the clean one, all if that is not given."""
    poisoned = None
    if request.clean is not None:
        clean = request.clean[0]
        if clean.shape != images.shape:
            raise InputError(
                f"{request.path} is compared with its clean set, image by image. Got {images.shape} in the file and "
                f"{clean.shape} in clean=: give the clean set that the poison was made from, of the same size."
            )
        poisoned = np.flatnonzero((clean != images).any(axis=(1, 2, 3)))
    return Poisoned.of(images, labels, attack, poisoned, bound=request.bound_or(bound))


def indexed(
    request: Request,
    images: NDArray[np.uint8],
    labels: Sequence[int] | NDArray[np.int64],
    indices: NDArray[np.int64],
    attack: str,
    **known: Any,
) -> Poisoned:
    """The clean set with some of its images, at `indices`, replaced."""
    clean, clean_labels = request.need_clean("holds some images only, and where they belong")
    if not len(images) == len(labels) == len(indices):
        raise InputError(
            f"{request.path} must hold one label and one index for each image. Got {len(images)} images, "
            f"{len(labels)} labels and {len(indices)} indices."
        )
    if images.shape[1:] != clean.shape[1:]:
        raise InputError(
            f"{request.path} must hold images of the size of the clean ones, {clean.shape[1:]}. Got {images.shape[1:]}."
        )
    repeated = len(np.unique(indices)) != len(indices)
    if len(indices) == 0 or repeated or int(indices.min()) < 0 or int(indices.max()) >= len(clean):
        got = "none" if len(indices) == 0 else "repeated ones" if repeated else f"{indices.min()} to {indices.max()}"
        raise InputError(
            f"{request.path} must name distinct images of the {len(clean):,} of clean=. Got {got}: give the set that "
            "the poison was made from."
        )
    out, out_labels = clean.copy(), clean_labels.copy()
    out[indices], out_labels[indices] = images, np.asarray(labels)
    known["bound"] = request.bound_or(known.get("bound"))
    return Poisoned.of(out, out_labels, attack, indices, **known)
