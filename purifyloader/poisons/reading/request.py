"""Check what a reader is asked, and give all of them what they need: the clean set, labels and 8-bit images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from purifyloader.core import checks
from purifyloader.core.checks import shown, stored_integer
from purifyloader.core.images import quantize
from purifyloader.datasets.named import read_image
from purifyloader.errors import InputError
from purifyloader.poisons.attacks.choice import is_class
from purifyloader.poisons.poisoned import Bound, Poisoned, Target
from purifyloader.poisons.reading.checks import unmoved

__all__ = ["UNITS", "Arrays", "Format", "Request", "add", "as_bound", "as_channels", "as_levels", "as_path"]
__all__ += ["as_target_image", "as_whole", "full", "indexed", "label_of", "moved"]

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]

UNITS = {"unit": 1.0, "minus-one-to-one": 0.5, "bytes": 1 / 255}
"""Value of 1 of a perturbation in units of [0, 1] images, by the range of the images that it is made for."""

_SHARE = 0.1  # of a set at most that an attack poisons by design, where nothing says that it does

_CHUNK = 1024  # images made 8-bit together, which bounds memory


@dataclass(frozen=True, kw_only=True)
class Request:
    """A `Request` is a path and the options of `read` for it, checked.

    Attributes:
        count: of images that get the trigger of Narcissus; of any other poison, that are poisoned.
        units: of perturbations in an .npy file, a key of `UNITS`.
        places: where `clean` is a part of the clean set: the whole set's length, and the place of each image in it.
    """

    path: Path
    bound: Bound | None
    checked: bool
    drop_negative: bool
    target: Target | NDArray[Any] | Image.Image | None
    target_class: int | None
    count: int | None
    seed: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    units: str | None
    clean: Arrays | None
    places: tuple[int, NDArray[np.int64]] | None

    def must_hold(self, what: str, got: str, hint: str = "") -> InputError:
        """Make the error for content that is not `what`."""
        return InputError(f"{self.path} must hold {what}. Got {got}{hint and f': {hint}'}.")

    def need_clean(self, why: str = "holds perturbations, and is added to the clean images") -> Arrays:
        if self.clean is None:
            raise InputError(
                f"{self.path} {why}. Got no clean=: give the clean training set, a dataset without its transform or "
                "(images uint8 (N, H, W, C), labels), in the order that the poison was made for."
            )
        return self.clean

    def check_count(self, poisoned: int) -> None:
        """Refuse a poison of another number of images than `count` says."""
        if self.count not in (None, poisoned):
            raise self.must_hold(
                f"{self.count:,} poisoned images, as count= says", f"{poisoned:,}", "give the right one"
            )

    def check_covers(self, indices: NDArray[np.int64]) -> None:
        """Refuse images whose names are their places if some are plainly missing, for these would stay clean.

        A few, scattered over the set, are an attack on a share of it, and so are as many as `count` says.
        """
        length = len(self.need_clean()[0])
        self.check_count(len(indices))
        if self.count is not None or len(indices) == length:
            return
        # what a copy leaves that was cut off, in the order of the numbers or of the names
        begun = (range(len(indices)), map(int, sorted(map(str, range(length)))[: len(indices)]))
        is_cut_off = any({*indices.tolist()} == {*first} for first in begun)
        if len(indices) > _SHARE * length or is_cut_off:
            missing = np.setdiff1d(np.arange(length), indices)
            raise self.must_hold(
                f"all {length:,} images of clean=, or say how many it poisons",
                f"{len(indices):,}: {len(missing):,} are missing, the first {', '.join(map(str, missing[:5]))}, and "
                "would stay clean",
                f"fetch it again, or give count={len(indices)} if it poisons no others",
            )

    def bound_or(self, known: Bound | None) -> Bound | None:
        return known if self.bound is None else self.bound


class Format(NamedTuple):
    """One way in which poisons are published.

    Attributes:
        what: its content, in a line for messages.
        matches: whether content looks like it.
        read: the poisoned set; it checks all that `matches` did not.
        may_aim: whether it may be of a poison that is aimed at a test image, which `target=` gives.
        by_row: it has a row for each image of the clean set, so that a part of them can be read alone.
    """

    what: str
    matches: Callable[[Any, Request], bool]
    read: Callable[[Any, Request], Poisoned]
    may_aim: bool = False
    by_row: bool = False


# checks of the options of `read`


def as_path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path must be that of a poison file or folder. Got {path!r:.80}: give a str or a Path.")
    return checks.as_path(path)


def as_bound(value: Any) -> Bound | None:
    """Parse a bound in any of the forms in which `read` takes one.

    An l-infinity bound above 1, as one in levels of 0 to 255 is, is refused.
    """
    bound = value
    if isinstance(value, str):
        norm, _, epsilon = value.partition(":")
        bound = _bound(norm, _fraction(epsilon))
    elif _is_number(value):
        bound = _bound("linf", float(value))
    remedy = "give one of these"
    if isinstance(bound, Bound) and bound.norm == "linf" and bound.epsilon > 1:
        remedy = f"divide levels of 0 to 255 by 255, as in {bound.epsilon:g}/255"
    elif isinstance(bound, Bound) or value is None:
        return bound
    raise InputError(
        "bound must be a poisons.Bound; a number above 0 and at most 1, which is l-infinity in units of [0, 1] images; "
        f'or a text such as "linf:8/255", "l2:1" or "l0:1" (pixels). Got {value!r:.80}: {remedy}.'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _bound(norm: Any, epsilon: float) -> Bound | None:
    try:
        return Bound(norm, epsilon)
    except InputError:
        return None


def _fraction(text: str) -> float:
    """Parse a number such as "8/255" or "1.5"; NaN if it is none."""
    above, line, below = text.partition("/")
    try:
        return float(above) / float(below) if line else float(text)
    except (ValueError, ZeroDivisionError):
        return math.nan


def as_target_image(target: Any, label: int | None) -> Target | NDArray[Any] | Image.Image | None:
    """Read the file of a target, and check that it is said what it is to be called."""
    image = read_image(as_path(target)) if isinstance(target, str | os.PathLike) else target
    grey_or_colour = isinstance(image, Image.Image) and image.mode in ("L", "RGB")
    if not (image is None or grey_or_colour or isinstance(image, Target | np.ndarray)):
        got = f"a PIL image of the mode {image.mode}" if isinstance(image, Image.Image) else type(image).__name__
        raise InputError(
            "target must be the test image that the poison is aimed at: uint8 (H, W, C), a PIL image in RGB or grey, "
            f"or a file of one. Got {got}: convert it."
        )
    if image is not None and label is None and not isinstance(image, Target):
        raise InputError(
            "target_class must say what the victim is to call the target. Got target= and no target_class=: give it, "
            "an integer from 0."
        )
    return image


def as_whole(name: str, value: Any, low: float, what: str) -> int:
    if not is_class(value) or value < low:
        raise InputError(f"{name} must be {what}. Got {value!r:.80}: give such a number.")
    return int(value)


def as_channels(name: str, value: Any, low: float = -math.inf) -> tuple[float, ...] | None:
    """One finite number above `low` for each channel, from a list, a tuple, an array or a tensor; None for None."""
    numbers = value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value
    if numbers is None:
        return None
    listed = isinstance(numbers, list | tuple) and len(numbers) > 0
    if not listed or not all(_is_number(each) and math.isfinite(each) and each > low for each in numbers):
        raise InputError(
            f"{name} must be one finite number a channel{'' if low < 0 else ', above 0'}, such as (0.5, 0.5, 0.5). Got "
            f"{value!r:.80}: give a list of them."
        )
    return tuple(float(number) for number in numbers)


# pixels and labels


def as_levels(images: NDArray[Any], what: str, tolerance: float = 0.01) -> NDArray[np.uint8]:
    """Round floating-point images (N, H, W, C) in [0, 1], give or take the tolerance, to uint8; refuse other ranges."""
    if not np.isfinite(images).all():
        raise InputError(f"{what} must hold finite numbers. Got NaN or infinity: the file is damaged.")
    low, high = float(images.min()), float(images.max())
    if low < -tolerance or high > 1 + tolerance:
        hint = "undo the normalisation, by mean= and std= where the format has them"
        if low >= 0 and high > 2:
            hint = "divide levels of 0 to 255 by 255"
        elif low >= -1 - tolerance and high <= 1 + tolerance:
            hint = "add 1 to images in [-1, 1], and halve"
        raise InputError(f"{what} must hold images in [0, 1]. Got {low:.4g} to {high:.4g}: {hint}.")
    if high <= 1.5 / 255:
        raise InputError(
            f"{what} must hold images in [0, 1]. Got {low:.4g} to {high:.4g}, all black: divided by 255 once too often."
        )
    return moved(np.empty(images.shape, np.uint8), lambda _, part: _quantized(images[part]))


def _quantized(images: NDArray[Any]) -> NDArray[np.uint8]:
    return quantize(torch.from_numpy(np.ascontiguousarray(images, np.float32))).numpy()


def moved(images: NDArray[np.uint8], move: Callable[[NDArray[np.uint8], slice], NDArray[Any]]) -> NDArray[np.uint8]:
    """Return a copy of the images, each part of them (and where it lies) put through `move`."""
    out = images.copy()
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = move(images[part], part)
    return out


def add(images: NDArray[np.uint8], delta: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return a copy of the images, each moved by its row of `delta` (R, H, W, C) in [0, 1] units and rounded."""
    return moved(images, lambda x, part: _quantized(x.astype(np.float32) / 255 + delta[rows[part]].astype(np.float32)))


def label_of(value: Any, what: str) -> int:
    """Return a label, an integer of any kind such as a tensor of one, as an int; refuse others, and those below 0."""
    number = value.item() if hasattr(value, "item") and getattr(value, "size", 1) != 0 else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise InputError(f"{what} must be a label, an integer from 0. Got {shown(value, 80)}.")
    return stored_integer(what, number)


# poisoned sets


def full(request: Request, images: NDArray[np.uint8], labels: NDArray[np.int64], attack: str) -> Poisoned:
    """Return a whole training set; poisoned is what differs from the clean one in image or label, else all.

    A clean set of another size is refused, and one that this is, where that is checked.
    """
    poisoned = None
    if request.clean is not None:
        clean, clean_labels = request.clean
        if clean.shape != images.shape:
            raise InputError(
                f"{request.path} is compared with its clean set, image by image. Got {images.shape} in the file and "
                f"{clean.shape} in clean=: give the clean set that the poison was made from, of the same size."
            )
        moved, relabelled = (clean != images).any(axis=(1, 2, 3)), clean_labels != labels
        # nothing but the comparison says here which are poisoned; without a bound it may be labels
        expects_images = request.bound is not None or not relabelled.any()
        if request.checked and not moved.any() and expects_images:
            raise unmoved(request.bound)
        poisoned = np.flatnonzero(moved | relabelled)
    return Poisoned.of(images, labels, attack, poisoned, bound=request.bound)


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
        got = f"{len(images)} images, {len(labels)} labels and {len(indices)} indices"
        raise request.must_hold("one label and one index for each image", got)
    if images.shape[1:] != clean.shape[1:]:
        raise request.must_hold(f"images of the size of the clean ones, {clean.shape[1:]}", str(images.shape[1:]))
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
