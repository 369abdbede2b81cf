"""Check what a reader is asked, and give all of them what they need: the clean set, labels and 8-bit images."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from purifyloader.core.images import quantize
from purifyloader.datasets.named import read_image
from purifyloader.errors import InputError
from purifyloader.poisons.attacks.choice import is_class
from purifyloader.poisons.poisoned import Bound, Poisoned, Target
from purifyloader.poisons.reading.checks import unmoved

__all__ = [
    "UNITS",
    "Arrays",
    "Request",
    "add",
    "as_bound",
    "as_levels",
    "checked_request",
    "full",
    "indexed",
    "label_of",
]

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]

UNITS = {"unit": 1.0, "minus-one-to-one": 0.5, "bytes": 1 / 255}
"""Value of 1 of a perturbation in units of [0, 1] images, by the range of the images that it is made for."""

_CHUNK = 1024  # images made 8-bit together, which bounds memory


@dataclass(frozen=True)
class Request:
    """A `Request` is a path and the options of `read` for it, checked by `checked_request`.

    Attributes:
        target: a file of one is read.
        units: of perturbations in an .npy file, a key of `UNITS`.
        places: where `clean` is a part of the clean set: the whole set's length, and the place of each image in it.
    """

    path: Path
    clean: Arrays | None
    bound: Bound | None
    checked: bool
    drop_negative: bool
    target: Target | NDArray[Any] | Image.Image | None
    target_class: int | None
    count: int | None
    seed: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    units: str | None = None
    places: tuple[int, NDArray[np.int64]] | None = None

    def need_clean(self, why: str) -> Arrays:
        if self.clean is None:
            raise InputError(
                f"{self.path} {why}. Got no clean=: give the clean training set, a dataset without its transform or "
                "(images uint8 (N, H, W, C), labels), in the order that the poison was made for."
            )
        return self.clean

    def bound_or(self, known: Bound | None) -> Bound | None:
        return known if self.bound is None else self.bound


def checked_request(
    path: Any,
    *,
    bound: Any,
    checked: Any,
    drop_negative: Any,
    target: Any,
    target_class: Any,
    count: Any,
    seed: Any,
    mean: Any,
    std: Any,
    units: Any = None,
) -> Request:
    """Check the options of `read` before anything of the poison is read. The clean set is added later.

    Raises:
        InputError: one of another type or range; a target without what it is to be called.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path must be that of a poison file or folder. Got {path!r:.80}: give a str or a Path.")
    for name, value in (("checked", checked), ("drop_negative", drop_negative)):
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False. Got {value!r:.80}: give one of them.")
    if units is not None and units not in UNITS:
        raise InputError(f"units must be one of {', '.join(UNITS)}. Got {units!r:.80}: give one of them.")
    image = _as_target_image(target)
    label = None if target_class is None else _whole("target_class", target_class, 0, "a class, an integer from 0")
    if image is not None and label is None and not isinstance(image, Target):
        raise InputError(
            "target_class must say what the victim is to call the target. Got target= and no target_class=: give it, "
            "an integer from 0."
        )
    return Request(
        Path(path),
        None,
        as_bound(bound),
        checked,
        drop_negative,
        image,
        label,
        None if count is None else _whole("count", count, 1, "how many images get the trigger, an integer from 1"),
        _whole("seed", seed, None, "an integer"),
        None if mean is None else _channels("mean", mean),
        None if std is None else _channels("std", std, low=0.0),
        units,
    )


def as_bound(value: Any) -> Bound | None:
    """Parse a bound in any of the forms in which `read` takes one.

    Args:
        value: a `Bound`; a number, the l-infinity bound in units of [0, 1] images; a text NORM:EPSILON, in which a
            fraction may be written, such as "linf:8/255", "l2:1" or "l0:1" (in pixels); or None.

    Raises:
        InputError: anything else, or an l-infinity bound above 1, as one in levels of 0 to 255 is.
    """
    if value is None:
        return None
    bound = value
    if isinstance(value, str):
        norm, _, epsilon = value.partition(":")
        bound = _bound(norm, _fraction(epsilon), value)
    elif _is_number(value):
        bound = _bound("linf", float(value), value)
    if not isinstance(bound, Bound):
        raise _no_bound(value, "give one of these")
    if bound.norm == "linf" and bound.epsilon > 1:
        raise _no_bound(value, f"divide levels of 0 to 255 by 255, as in {bound.epsilon:g}/255")
    return bound


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _bound(norm: str, epsilon: float, value: Any) -> Bound:
    if norm not in ("linf", "l2", "l0") or not (math.isfinite(epsilon) and epsilon > 0):
        raise _no_bound(value, "give one of these")
    return Bound(cast(Any, norm), epsilon)


def _fraction(text: str) -> float:
    """Parse a number such as "8/255" or "1.5"; NaN if it is none."""
    above, line, below = text.partition("/")
    try:
        return float(above) / float(below) if line else float(text)
    except (ValueError, ZeroDivisionError):
        return math.nan


def _no_bound(value: Any, remedy: str) -> InputError:
    return InputError(
        "bound must be a poisons.Bound; a number above 0 and at most 1, which is l-infinity in units of [0, 1] images; "
        f'or a text such as "linf:8/255", "l2:1" or "l0:1" (pixels). Got {value!r:.80}: {remedy}.'
    )


def _as_target_image(target: Any) -> Target | NDArray[Any] | Image.Image | None:
    if isinstance(target, str | os.PathLike):
        return read_image(Path(target))
    grey_or_colour = isinstance(target, Image.Image) and target.mode in ("L", "RGB")
    if target is None or grey_or_colour or isinstance(target, Target | np.ndarray):
        return target
    got = f"a PIL image of the mode {target.mode}" if isinstance(target, Image.Image) else type(target).__name__
    raise InputError(
        "target must be the test image that the poison is aimed at: uint8 (H, W, C), a PIL image in RGB or grey, or a "
        f"file of one. Got {got}: convert it."
    )


def _whole(name: str, value: Any, low: int | None, what: str) -> int:
    if not is_class(value) or (low is not None and value < low):
        raise InputError(f"{name} must be {what}. Got {value!r:.80}: give such a number.")
    return int(value)


def _channels(name: str, value: Any, low: float = -math.inf) -> tuple[float, ...]:
    """One finite number above `low` for each channel, from a list, a tuple, an array or a tensor."""
    numbers = value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value
    if (
        not isinstance(numbers, list | tuple)
        or not numbers
        or not all(_is_number(number) and math.isfinite(number) and number > low for number in numbers)
    ):
        above = "" if low < 0 else ", above 0"
        raise InputError(
            f"{name} must be one finite number a channel{above}, such as (0.5, 0.5, 0.5). Got {value!r:.80}: give a "
            "list of them."
        )
    return tuple(float(number) for number in numbers)


def as_levels(images: NDArray[Any], what: str, tolerance: float = 0.01) -> NDArray[np.uint8]:
    """Round floating-point images (N, H, W, C) in [0, 1] to uint8.

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
    """Return a copy of the images, each moved by its row of `delta` (R, H, W, C) in [0, 1] units and rounded."""
    out = images.copy()
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        moved = images[part].astype(np.float32) / 255 + delta[rows[part]].astype(np.float32)
        out[part] = quantize(torch.from_numpy(moved)).numpy()
    return out


def label_of(value: Any, what: str) -> int:
    """Return a label, an integer of any kind such as a tensor of one, as an int.

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
    """Return a whole training set; poisoned is what differs from the clean one, all where there is none.

    Raises:
        InputError: a clean set of another size; or this is the clean set, where that is checked.
    """
    poisoned = None
    if request.clean is not None:
        clean, clean_labels = request.clean
        if clean.shape != images.shape:
            raise InputError(
                f"{request.path} is compared with its clean set, image by image. Got {images.shape} in the file and "
                f"{clean.shape} in clean=: give the clean set that the poison was made from, of the same size."
            )
        poisoned = np.flatnonzero((clean != images).any(axis=(1, 2, 3)))
        # nothing but the comparison says here which are poisoned; without a bound it may be labels
        expects_images = request.bound_or(bound) is not None or bool((labels == clean_labels).all())
        if request.checked and not len(poisoned) and expects_images:
            raise unmoved(request.bound_or(bound))
    return Poisoned.of(images, labels, attack, poisoned, bound=request.bound_or(bound))


def indexed(
    request: Request,
    images: NDArray[np.uint8],
    labels: Sequence[int] | NDArray[np.int64],
    indices: NDArray[np.int64],
    attack: str,
    **known: Any,
) -> Poisoned:
    """Return the clean set with some of its images, at `indices`, replaced."""
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
