"""Formats that hold a perturbation or what it is made of, which is added to the clean set, or a row for each image."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.errors import InputError
from purifyloader.poisons.attacks.autoregression import autoregressive
from purifyloader.poisons.attacks.trigger import backdoor, read_trigger
from purifyloader.poisons.poisoned import Bound, Poisoned
from purifyloader.poisons.reading.checks import check_numbers
from purifyloader.poisons.reading.content import as_number_array, describe, integers
from purifyloader.poisons.reading.request import UNITS, Format, Request, add, full, moved
from purifyloader.poisons.triggers import Additive

__all__ = ["FORMATS"]

_EIGHT = Bound("linf", 8 / 255)
_CIFAR10_STD = (0.2470, 0.2435, 0.2616)  # of the training images, which Witches' Brew divides by
_PUBLISHED = 32 / 255  # largest value of Narcissus' trigger, which is for images in [-1, 1]
_HOW = "such as FILE:units=minus-one-to-one on a command line"


def _stack(content: Any, kinds: str) -> NDArray[Any] | None:
    """Return numbers (R, 3, H, W) of a kind of dtype, else None."""
    array = as_number_array(content)
    right = array is not None and array.ndim == 4 and array.shape[1] in (1, 3) and array.dtype.kind in kinds
    return array if right and array is not None and array.size else None


def _last(array: NDArray[Any]) -> NDArray[Any]:
    return np.moveaxis(array, 1, 3)


def _fit(delta: NDArray[Any], images: NDArray[np.uint8], request: Request) -> None:
    if delta.shape[1:] != images.shape[1:]:
        what = f"perturbations of the size of the clean images, {images.shape[1:]}"
        raise request.must_hold(what, str(delta.shape[1:]))


def _is_em_classwise(content: Any, request: Request) -> bool:
    array = _stack(content, "f")
    if array is None or request.clean is None or _is_narcissus(content, request):
        return False
    return len(array) == int(request.clean[1].max()) + 1


def _is_em_samplewise(content: Any, request: Request) -> bool:
    array = _stack(content, "f")
    if array is None or _is_narcissus(content, request):
        return False
    return not _is_em_classwise(content, request) or (request.clean is not None and len(array) == len(request.clean[0]))


def _em(content: Any, request: Request, kind: str) -> Poisoned:
    array = _stack(content, "f")
    if array is None:
        raise request.must_hold("EM perturbations, floating point (N, 3, H, W)", describe(content))
    images, labels = request.need_clean()
    delta = _last(array)
    _fit(delta, images, request)
    classes = int(labels.max()) + 1
    if len(delta) != len(images) if kind == "sample" else len(delta) < classes:
        what = f"one perturbation an image ({len(images):,}) or a class ({classes}) of clean="
        raise request.must_hold(what, f"{len(delta):,}", "give the set that it was made for")
    bound = request.bound_or(_EIGHT)
    if request.checked:
        check_numbers(delta, bound, f"The perturbations of {request.path}", signed=not request.drop_negative)
    rows = np.arange(len(images)) if kind == "sample" else labels
    poisoned = _official_cast(images, delta, rows) if request.drop_negative else add(images, delta, rows)
    settings = {"drop_negative": request.drop_negative}
    return Poisoned.of(poisoned, labels, f"EM, {kind}-wise", bound=bound, settings=settings)


def _official_cast(images: NDArray[np.uint8], delta: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Cast as EM's own loader does: negative numbers become 0, and what is left of a level is cut off, in float32."""

    def move(x: NDArray[np.uint8], part: slice) -> NDArray[Any]:
        up = np.clip(delta[rows[part]].astype(np.float32) * np.float32(255), 0, 255)
        return np.clip(x.astype(np.float32) + up, 0, 255).astype(np.uint8)

    return moved(images, move)


def _is_rem(content: Any, request: Request) -> bool:
    # other integers than int8 too, so that they are told why they are refused
    array = _stack(content, "iu")
    return array is not None and array.dtype != np.int64


def _read_rem(content: Any, request: Request) -> Poisoned:
    array = _stack(content, "iu")
    if array is None:
        raise request.must_hold("REM perturbations, int8 (N, 3, H, W)", describe(content))
    if array.dtype.kind == "u":
        raise request.must_hold(
            "perturbations with a sign, int8 in levels of 255",
            f"{array.dtype}, {array.min()} to {array.max()}",
            "the sign was lost in a cast. Take the file before that, or save it as int8 with .view(np.int8) where "
            "negative numbers wrapped around. (Images are read from .npz: data, uint8 (N, H, W, C), and targets.)",
        )
    images, labels = request.need_clean()
    levels = _last(array)
    _fit(levels, images, request)
    if len(levels) != len(images):
        what = f"one perturbation for each of the {len(images):,} images of clean="
        raise request.must_hold(what, f"{len(levels):,}", "give the set that it was made for")
    bound = request.bound_or(_EIGHT)
    if request.checked:
        check_numbers(levels.astype(np.float32) / 255, bound, f"The perturbations of {request.path}")
    out = moved(images, lambda x, part: np.clip(x.astype(np.int32) + levels[part].astype(np.int32), 0, 255))
    return Poisoned.of(out, labels, "REM", bound=bound)


def _is_narcissus(content: Any, request: Request) -> bool:
    if not isinstance(content, np.ndarray) or content.dtype.kind != "f":
        return False
    return content.ndim in (3, 4) and content.shape[-3] == 3 and (content.ndim == 3 or len(content) == 1)


def _read_narcissus(content: Any, request: Request) -> Poisoned:
    if request.target_class is None or request.count is None:
        raise InputError(
            f"{request.path} holds the trigger of a back door and not where it goes. Got target_class="
            f"{request.target_class!r} and count={request.count!r}: say the class that it stands for and in how many "
            "images of that class it is to be (the published CIFAR-10 one is of class 2, bird)."
        )
    images, labels = request.need_clean("holds a trigger, and is added to clean images")
    trigger = read_trigger(request.path)
    bound = request.bound_or(Bound("linf", 16 / 255))
    if request.checked:
        check_numbers(trigger.numpy()[None], bound, f"The trigger of {request.path}, halved to units of [0, 1],")
    classes = max(int(labels.max()), request.target_class) + 1
    aim, count, seed = request.target_class, request.count, request.seed
    out, chosen = backdoor(images, labels, trigger, aim, count, classes=classes, seed=seed)
    known = {"bound": bound, "trigger": Additive(trigger.numpy()), "target_class": aim}
    return Poisoned.of(out, labels, "Narcissus", chosen, **known, settings={"count": count, "seed": seed})


def _is_ar(content: Any, request: Request) -> bool:
    listed = isinstance(content, list) and len(content) > 0
    return listed and all(isinstance(part, Tensor) and part.shape == (3, 3, 3) for part in content)


def _read_ar(content: Any, request: Request) -> Poisoned:
    images, labels = request.need_clean("holds the coefficients of AR perturbations, which are made for clean images")
    bound = request.bound_or(Bound("l2", 1.0))
    norm = bound.epsilon if bound is not None and bound.norm == "l2" else 1.0
    out = autoregressive(images, labels, coefficients=content, seed=request.seed, norm=norm)
    return Poisoned.of(out, labels, "AR", bound=bound, settings={"seed": request.seed})


def _is_witches_brew(content: Any, request: Request) -> bool:
    if not isinstance(content, list | tuple) or len(content) != 2 or isinstance(content[1], bytes):
        return False
    return _stack(content[0], "f") is not None and isinstance(content[1], Tensor | np.ndarray | list | tuple)


def _read_witches_brew(content: Any, request: Request) -> Poisoned:
    if not _is_witches_brew(content, request):
        what = "a list of perturbations (P, 3, H, W), floating point, and the indices of their images"
        raise request.must_hold(what, describe(content))
    images, labels = request.need_clean()
    delta, indices = _last(np.asarray(as_number_array(content[0]))), integers(content[1], f"The ids of {request.path}")
    _fit(delta, images, request)
    std = _CIFAR10_STD if request.std is None else request.std
    if len(std) != delta.shape[3]:
        raise InputError(f"std= must be one number a channel, {delta.shape[3]}. Got {tuple(std)}.")
    delta = delta * np.asarray(std, np.float32)
    repeated = len(np.unique(indices)) != len(indices)
    if len(indices) != len(delta) or repeated or indices.min() < 0 or indices.max() >= len(images):
        raise request.must_hold(
            f"one perturbation for each of its ids, distinct images of the {len(images):,} of clean=",
            f"{len(delta)} perturbations and {len(indices)} ids{', some twice' if repeated else ''}, up to "
            f"{indices.max() if len(indices) else 'none'}",
        )
    if request.checked:
        check_numbers(delta, request.bound, f"The perturbations of {request.path}, times the deviation {tuple(std)},")
    out = images.copy()
    out[indices] = add(images[indices], delta, np.arange(len(indices)))
    settings = {"std": [float(value) for value in std]}
    return Poisoned.of(out, labels, "Witches' Brew", indices, bound=request.bound, settings=settings)


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
    "witches-brew": Format(
        "a .pth of [perturbations (P, 3, H, W), indices]", _is_witches_brew, _read_witches_brew, may_aim=True
    ),
    "narcissus": Format("an .npy trigger, float (1, 3, H, W)", _is_narcissus, _read_narcissus),
    "em-samplewise": Format("a .pt tensor, float (images, 3, H, W)", _is_em_samplewise, partial(_em, kind="sample")),
    "em-classwise": Format("a .pt tensor, float (classes, 3, H, W)", _is_em_classwise, partial(_em, kind="class")),
    "rem": Format("a .pkl array, int8 (N, 3, H, W)", _is_rem, _read_rem),
    "ar": Format("a .pt list of coefficients (3, 3, 3), one a class", _is_ar, _read_ar),
    "perturbations": Format(
        "an .npy of perturbations (N, H, W, C) or (N, C, H, W), or one for all, with units=",
        _is_perturbations,
        _read_perturbations,
        by_row=True,
    ),
    "images": Format("an .npy of poisoned images, uint8 (N, H, W, C)", _is_images, _read_images, by_row=True),
}
