"""Formats of an .npy array with a row for each image of the clean set: perturbations, or the poisoned images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.errors import InputError
from purifyloader.poisons.poisoned import Poisoned
from purifyloader.poisons.reading.checks import check_numbers
from purifyloader.poisons.reading.content import describe
from purifyloader.poisons.reading.request import UNITS, Format, Request, add, full

__all__ = ["FORMATS"]

_PUBLISHED = 32 / 255  # largest value of Narcissus' trigger, which is for images in [-1, 1]
_HOW = "such as FILE:units=minus-one-to-one on a command line"


def _is_perturbations(content: Any, request: Request) -> bool:
    return isinstance(content, np.ndarray) and request.units is not None and request.target_class is None


def _is_images(content: Any, request: Request) -> bool:
    if not isinstance(content, np.ndarray) or content.dtype != np.uint8 or request.clean is None:
        return False
    return content.shape[1:] == request.clean[0].shape[1:]


def _read_images(content: Any, request: Request) -> Poisoned:
    _, labels = request.need_clean("holds images, one for each of the clean ones")
    if not isinstance(content, np.ndarray) or content.dtype != np.uint8:
        raise request.must_hold("poisoned images, uint8", describe(content))
    return full(request, _rows(content, request)[0], labels, "images")


def _read_perturbations(content: Any, request: Request) -> Poisoned:
    images, labels = request.need_clean()
    if not isinstance(content, np.ndarray) or content.dtype.kind not in "fi":
        raise InputError(
            f"{request.path} must hold perturbations, floating point or signed integers. Got {describe(content)}. "
            "Leave units= out for poisoned images, uint8."
        )
    rows, single = _rows(content, request)
    units = request.units or _usual_units(content, rows, single, request)
    delta = rows.astype(np.float32) * np.float32(UNITS[units])
    largest = float(np.abs(delta).max())  # NaN where there is one
    if not largest <= 1:
        raise InputError(
            f"{request.path} must hold finite perturbations of at most 255 px. Got values up to "
            f"{largest / UNITS[units]:.4g} with units={units!r}: give another one of {', '.join(UNITS)}, or divide "
            "those of 0-255 by 255."
        )
    if request.checked and request.bound is not None:
        check_numbers(delta, request.bound, f"The perturbations of {request.path}")
    which = np.zeros(len(images), np.int64) if single else np.arange(len(images))
    settings = {"units": units}
    return Poisoned.of(add(images, delta, which), labels, "perturbations", bound=request.bound, settings=settings)


def _rows(array: NDArray[Any], request: Request) -> tuple[NDArray[Any], bool]:
    """Return rows (R, H, W, C) for the clean images at hand, and whether it is one for all of them."""
    assert request.clean is not None
    images = request.clean[0]
    length, positions = request.places or (len(images), np.arange(len(images)))
    array = array[None] if array.ndim == 3 else array
    height, width, channels = images.shape[1:]
    single = array.dtype != np.uint8 and array.ndim == 4 and len(array) == 1 != length
    count = 1 if single else length
    last = array.shape == (count, height, width, channels)
    if not last and array.shape != (count, channels, height, width):
        raise InputError(
            f"{request.path} must have the shape {(count, height, width, channels)} or "
            f"{(count, channels, height, width)}, a row for each image of the data. Got {array.shape}."
        )
    rows = array if single else array[positions]
    return np.ascontiguousarray(rows if last else rows.transpose(0, 2, 3, 1)), single


def _usual_units(content: NDArray[Any], rows: NDArray[Any], single: bool, request: Request) -> str:
    """Find the units of a file that does not say: one published as Narcissus' trigger is, or of [0, 1] images."""
    largest = float(np.abs(rows).max())
    if not single:
        if content.dtype.kind == "i":
            raise InputError(
                f"{request.path} must hold perturbations of floating point in [-1, 1], or say its units. Got "
                f"{content.dtype}: give units=, {_HOW.replace('minus-one-to-one', 'bytes')}."
            )
        return "unit"
    is_trigger = content.dtype.kind == "f" and content.shape[-3] == rows.shape[3]
    if is_trigger and 0 < largest <= _PUBLISHED + 1e-4:
        return "minus-one-to-one"
    raise InputError(
        f"{request.path} holds one perturbation for all images, and its values, up to {largest:.4g}, do not tell for "
        f"which range. Give units=, {_HOW}: minus-one-to-one ({127.5 * largest:.3g} px), unit ({255 * largest:.3g} px) "
        f"or bytes ({largest:.3g} px)."
    )


FORMATS = {
    "perturbations": Format(
        "an .npy of perturbations (N, H, W, C) or (N, C, H, W), or one for all, with units=",
        _is_perturbations,
        _read_perturbations,
        by_row=True,
    ),
    "images": Format("an .npy of poisoned images, uint8 (N, H, W, C)", _is_images, _read_images, by_row=True),
}
