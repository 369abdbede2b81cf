"""Autoregressive perturbations (Sandoval-Segura et al. 2022, arXiv:2206.03693). For testing defences.

A class has a filter for each channel: a pixel is the weighted sum of its eight earlier neighbours in a 3 x 3
window, so a victim can tell the class from any window, whatever random values the field started from.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.checks import as_path, check_integer, check_number
from purifyloader.errors import InputError
from purifyloader.files.pickles import check_torch
from purifyloader.poisons.attacks import additive
from purifyloader.poisons.attacks.additive import Draw, Images, Integers, as_labels, purpose_keys
from purifyloader.poisons.attacks.choice import Victims, on_chosen_images
from purifyloader.poisons.poisoned import Bound

__all__ = ["ar_coefficients", "ar_perturbation", "attack", "autoregressive", "read_ar_coefficients"]

Coefficients = Tensor | Sequence[Tensor] | str | os.PathLike[str]

_ATTACK = 0x6172  # "ar"
_START, _COEFFICIENTS, _TRIAL = 0, 1, 2  # what a key is for

# A filter is kept if, in the last quarter of fields of this side, pixels differ by neither less nor more
# than this (root mean square over some fields; the start values differ by 1.4), and are no larger.
_SIDE, _TRIALS, _CHANGE = 64, 8, (0.1, 10.0)
_CANDIDATES = 32  # drawn together for one filter; one in seventeen is kept
_TRIED = 8  # of them at a time, until one is stable
_CHUNK = 256  # candidates of all filters tried at a time: their fields fit a CPU's cache


def _fields(coefficients: Tensor, start: Tensor) -> Tensor:
    """Run the recurrence of many fields (H, W, ...) at once, in float64.

    The weights (3, 3, ...) are of each pixel of the window, the last unused; of `start` the first two rows and columns
    are read. The trailing dimensions broadcast. The pixels of a diagonal, which do not depend on each other, are
    computed together; each adds up its window in the order of rows and columns.
    """
    height, width = start.shape[:2]
    field = start.contiguous().clone()
    pixels = field.flatten(0, 1)
    window = [(width * (2 - a) + 2 - b, coefficients[a, b]) for a in range(3) for b in range(3)][:-1]
    for diagonal in range(4, height + width - 1):  # pixels of row + column = diagonal lie width - 1 apart
        top, bottom = max(2, diagonal - width + 1), min(height - 1, diagonal - 2)
        first, end = diagonal + top * (width - 1), diagonal + bottom * (width - 1) + 1
        total = torch.zeros_like(pixels[first : end : width - 1])
        for before, weight in window:
            total += weight * pixels[first - before : end - before : width - 1]
        pixels[first : end : width - 1] = total
    return field


def _is_stable(coefficients_K33: Tensor) -> Tensor:
    """Tell which filters neither blow up nor smooth everything away, bool (K,); see `_CHANGE`."""
    trial_keys = purpose_keys(0, _ATTACK, _TRIAL, torch.arange(_TRIALS))
    start = noise.normal(trial_keys, (_SIDE, _SIDE)).to(torch.float64).permute(1, 2, 0)[:, :, None]
    weights = coefficients_K33.to(torch.float64).permute(1, 2, 0)[..., None]
    start = start.expand(-1, -1, len(coefficients_K33), -1)
    late = _fields(weights, start)[_SIDE // 2 :, _SIDE // 2 :]
    across = (late[:, 1:] - late[:, :-1]).square().mean(dim=(0, 1, 3))
    down = (late[1:] - late[:-1]).square().mean(dim=(0, 1, 3))
    change, size = ((across + down) / 2).sqrt(), late.square().mean(dim=(0, 1, 3)).sqrt()
    low, high = _CHANGE
    return (change > low) & (change < high) & (size < high)  # not finite is False


def ar_coefficients(classes: int = 10, seed: int = 0) -> Tensor:
    """Draw stable random filters, float32 (classes, 3, 3, 3): of a class, a channel, and the window's rows and columns.

    Class c's are a function of (seed, c). As in the paper's published ones, the weights of a filter are normal and sum
    to 1 and the last, of the pixel itself, is 0. Filters whose field blows up or goes constant are drawn again.

    >>> from purifyloader.poisons import ar_coefficients
    >>> ar_coefficients(classes=1).shape
    torch.Size([1, 3, 3, 3])
    """
    check_integer("classes", classes, 1, error=InputError)
    return _draw_coefficients(classes, seed).clone()


@functools.lru_cache(maxsize=8)  # seconds of a CPU for ten classes
def _draw_coefficients(classes: int, seed: int) -> Tensor:
    keys = purpose_keys(seed, _ATTACK, _COEFFICIENTS, torch.arange(3 * classes))
    filters = torch.zeros(3 * classes, 3, 3)
    pending = torch.arange(3 * classes)
    step = 0
    while len(pending):
        remaining = pending
        drawn = noise.normal(keys[remaining], (_CANDIDATES, 8), step).to(torch.float64)
        drawn = drawn / drawn.cumsum(dim=2)[:, :, -1:]
        window = torch.cat([drawn, torch.zeros(*drawn.shape[:2], 1, dtype=torch.float64)], dim=2)
        candidates = window.reshape(-1, _CANDIDATES, 3, 3).to(torch.float32)
        for tried in candidates.unflatten(1, (-1, _TRIED)).unbind(1):
            tried = tried[torch.isin(remaining, pending)]
            stable = torch.cat([_is_stable(some) for some in tried.flatten(0, 1).split(_CHUNK)]).reshape(-1, _TRIED)
            done = stable.any(dim=1)
            first = stable.to(torch.int64).argmax(dim=1)  # of equals the first
            filters[pending[done]] = tried[done, first[done]]
            pending = pending[~done]
            if not len(pending):
                break
        step += 1
    return filters.reshape(classes, 3, 3, 3)


def _as_coefficients(coefficients: Coefficients, source: str = "coefficients") -> Tensor:
    """float32 (classes, 3, 3, 3), checked."""
    if isinstance(coefficients, str | os.PathLike):
        return read_ar_coefficients(as_path(coefficients))
    expected = f"{source} must be a list of float tensors (3, 3, 3), one a class: channel, row, column."
    parts = list(coefficients) if isinstance(coefficients, Tensor | list | tuple) else []
    if not parts or not all(
        isinstance(part, Tensor) and part.shape == (3, 3, 3) and part.is_floating_point() for part in parts
    ):
        raise InputError(f"{expected} Got {_describe(coefficients)}.")
    tensor = torch.stack([part.detach().to("cpu", torch.float32) for part in parts])
    last = tensor[:, :, 2, 2]
    if not bool(torch.isfinite(tensor).all()) or bool(last.any()):
        raise InputError(f"{expected} They must be finite, and 0 at [:, 2, 2]. Got {last.tolist()} there.")
    return tensor


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        first = _describe(value[0]) if value else "nothing"
        return f"{type(value).__name__} of {len(value)}, the first {first}"
    return type(value).__name__


def read_ar_coefficients(path: str | Path) -> Tensor:
    """Read a published `.pt` file, a list of (3, 3, 3) tensors, one a class, as float32 (classes, 3, 3, 3).

    Raises:
        InputError: no such file, or not such a list. Nothing in the file is run.

    >>> import tempfile, torch
    >>> from purifyloader.poisons import read_ar_coefficients
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save([torch.zeros(3, 3, 3)] * 10, f"{folder}/coefficients.pt")
    ...     read_ar_coefficients(f"{folder}/coefficients.pt").shape
    torch.Size([10, 3, 3, 3])
    """
    path = as_path(path)
    try:
        check_torch(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} must be a .pt file of AR coefficients. Got: {reason}") from error
    return _as_coefficients(content, str(path))


def _draw(size: tuple[int, int], coefficients_K333: Tensor, seed: int, norm: float, crop: int) -> Draw:
    if isinstance(crop, bool) or not isinstance(crop, int) or crop < 0 or min(size) + crop < 3:
        raise InputError(f"crop must be an integer of 0 or more, and crop + side 3 or more. Got {crop!r}.")
    check_number("norm", norm, above=0, error=InputError)
    height, width = size[0] + crop, size[1] + crop

    def draw(label_B: Tensor, position_B: Tensor) -> Tensor:
        z = noise.normal(purpose_keys(seed, _ATTACK, _START, position_B), (height, width, 3))
        start = z.to(torch.float64).permute(1, 2, 3, 0).contiguous()  # images last, for long inner loops
        weights = coefficients_K333[label_B].to(torch.float64).permute(2, 3, 1, 0).contiguous()
        field = _fields(weights, start)[crop:, crop:]
        return additive.scale_to_norm(field.permute(3, 0, 1, 2), norm)

    return draw


def _coefficients_for(
    labels: Integers, coefficients: Coefficients | None, classes: int, seed: int
) -> tuple[Tensor, Tensor]:
    if coefficients is None:
        return as_labels(labels, classes), ar_coefficients(classes, seed)
    given = _as_coefficients(coefficients)
    return as_labels(labels, len(given), ", the classes of the coefficients"), given


def ar_perturbation(
    labels: Integers,
    size: Sequence[int],
    *,
    positions: Integers | None = None,
    classes: int = 10,
    seed: int = 0,
    norm: float = 1.0,
    coefficients: Coefficients | None = None,
    crop: int = 4,
) -> Tensor:
    """Draw the perturbations that `autoregressive` adds, float32 (N, H, W, 3).

    Args:
        labels: integers (N,) in [0, classes).
        size: (height, width) of the images.
        positions: place of each label's image in the dataset, 0 to N - 1 if None, which decides the start values. An
            image's perturbation is a function of (seed, position, label, size) and these arguments alone.
        classes: how many, where `coefficients` does not say.
        norm: l2 norm of each, in units of [0, 1] images (the paper: 1 for 32 x 32).
        coefficients: (classes, 3, 3, 3), a list of (3, 3, 3) or a published `.pt` file of one; None for
            `ar_coefficients(classes, seed)`.
        crop: first rows and columns of the field that are dropped with the start values.

    Raises:
        InputError: an argument of another type, shape or range, or coefficients that blow up.

    >>> import torch
    >>> from purifyloader.poisons import ar_perturbation
    >>> mean_of_eight = torch.full((2, 3, 3, 3), 1 / 8)
    >>> mean_of_eight[:, :, 2, 2] = 0
    >>> ar_perturbation([0, 1], (8, 8), coefficients=mean_of_eight).flatten(1).norm(dim=1)
    tensor([1., 1.])
    """
    labels_N, coefficients_K333 = _coefficients_for(labels, coefficients, classes, seed)
    draw = _draw(additive.as_size(size), coefficients_K333, seed, norm, crop)
    return additive.draw_all(draw, labels_N, positions)


def autoregressive(
    images: Images,
    labels: Integers,
    *,
    indices: Integers | None = None,
    positions: Integers | None = None,
    classes: int = 10,
    seed: int = 0,
    norm: float = 1.0,
    coefficients: Coefficients | None = None,
    crop: int = 4,
) -> Images:
    """Return a copy of the images, uint8 (N, H, W, 3), poisoned with autoregressive noise.

    Args:
        indices: which images to poison, all if None.
        others: see `ar_perturbation`.

    Raises:
        InputError: images, labels or an argument of another type, shape or range.

    >>> import torch
    >>> from purifyloader.poisons import autoregressive
    >>> mean_of_eight = torch.full((2, 3, 3, 3), 1 / 8)
    >>> mean_of_eight[:, :, 2, 2] = 0
    >>> images = torch.full((2, 8, 8, 3), 128, dtype=torch.uint8)
    >>> autoregressive(images, [0, 1], coefficients=mean_of_eight).shape
    torch.Size([2, 8, 8, 3])
    """
    size = additive.size_of(images)
    labels_N, coefficients_K333 = _coefficients_for(labels, coefficients, classes, seed)
    return additive.poison(images, labels_N, indices, _draw(size, coefficients_K333, seed, norm, crop), positions)


def _recorded(_: Victims, options: Mapping[str, Any]) -> Mapping[str, Any]:
    if options["coefficients"] is None:
        return options
    return {**options, "coefficients": {"sha256": additive.sha256_of(_as_coefficients(options["coefficients"]))}}


attack = on_chosen_images("ar", autoregressive, lambda options: Bound("l2", options["norm"]), _recorded)
