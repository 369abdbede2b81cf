"""Formats of targeted attacks: a few poisons, where they belong, and what they are aimed at."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from purifyloader.core.images import pil_mode
from purifyloader.errors import InputError
from purifyloader.poisons.attacks.choice import as_target
from purifyloader.poisons.poisoned import Bound, Poisoned, Target
from purifyloader.poisons.reading.content import Folder, as_number_array, describe, integers
from purifyloader.poisons.reading.request import Format, Request, as_levels, indexed, label_of
from purifyloader.poisons.reading.unpickling import Picture, read_pickle

__all__ = ["FORMATS", "with_target"]

# What Bullseye Polytope normalises CIFAR-10 with; the second is not the deviation of its pixels.
_BULLSEYE_MEAN, _BULLSEYE_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def _pairs(value: Any, what: str) -> tuple[NDArray[np.uint8], list[int]]:
    """Read the images and labels of a list of (PIL image, label)."""
    expected = f"{what} must be a list of (PIL image, label)"
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{expected}. Got {describe(value)}.")
    images, labels = [], []
    for place, item in enumerate(value):
        if not isinstance(item, list | tuple) or len(item) < 2 or not isinstance(item[0], Picture):
            raise InputError(f"{expected}. Got {describe(item)} as item {place}.")
        images.append(item[0].image)
        labels.append(label_of(item[1], f"The label of item {place} of {what}"))
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise InputError(f"{what} must hold images of one size. Got {sorted(shapes)[:5]}.")
    return np.stack(images), labels


def _is_benchmark(content: Any, request: Request) -> bool:
    return isinstance(content, Folder) and "poisons.pickle" in content.names


def _read_benchmark(content: Any, request: Request) -> Poisoned:
    if not isinstance(content, Folder) or not {"poisons.pickle", "base_indices.pickle"} <= set(content.names):
        raise InputError(
            f"{request.path} must be a folder with poisons.pickle and base_indices.pickle, and target.pickle where the "
            f"target is wanted. Got {describe(content)}."
        )
    path = content.path
    images, labels = _pairs(read_pickle(path / "poisons.pickle"), str(path / "poisons.pickle"))
    indices = integers(read_pickle(path / "base_indices.pickle"), str(path / "base_indices.pickle"))
    known: dict[str, Any] = {}
    if "target.pickle" in content.names:
        known = _target(read_pickle(path / "target.pickle"), labels[0], str(path / "target.pickle"))
    return indexed(request, images, labels, indices, "poisoning-benchmark", bound=Bound("linf", 8 / 255), **known)


def _target(value: Any, label: int, what: str) -> dict[str, Any]:
    # the benchmark's own example holds the image alone
    parts = [value] if isinstance(value, Picture) else list(value) if isinstance(value, list | tuple) else []
    if len(parts) not in (1, 2, 4) or not isinstance(parts[0], Picture):
        raise InputError(f"{what} must be (PIL image, label), or with a patch and its (x, y). Got {describe(value)}.")
    image = parts[0].image
    true = label_of(parts[1], f"The label of {what}") if len(parts) > 1 else None
    settings: dict[str, Any] = {}
    if len(parts) == 4:
        image, settings["patch"] = _patched(image, parts[2], parts[3], what)
    return {"target": Target(image, label, true), "settings": settings}


def _patched(
    image: NDArray[np.uint8], patch: Any, corner: Any, what: str
) -> tuple[NDArray[np.uint8], dict[str, list[int]]]:
    """Put a patch, float (3, h, w) in [0, 1], in its place on the target, as the victim meets it."""
    values = as_number_array(patch)
    x, y = integers(corner, f"The (x, y) of the patch in {what}").tolist()[:2] if len(corner) == 2 else (-1, -1)
    if values is None or values.ndim != 3 or values.shape[0] != image.shape[2] or values.dtype.kind not in "fu":
        raise InputError(f"The patch in {what} must be ({image.shape[2]}, h, w) in [0, 1]. Got {describe(patch)}.")
    height, width = values.shape[1:]
    if min(x, y) < 0 or y + height > image.shape[0] or x + width > image.shape[1]:
        raise InputError(
            f"The patch in {what} must lie within the image of {image.shape[:2]}. Got {height} x {width} at {corner}."
        )
    pixels = np.moveaxis(values, 0, 2)
    out = image.copy()
    if pixels.dtype != np.uint8:
        pixels = as_levels(pixels[None], f"The patch in {what}")[0]
    out[y : y + height, x : x + width] = pixels
    return out, {"xy": [x, y], "size": [height, width]}


def _is_puregen(content: Any, request: Request) -> bool:
    if not isinstance(content, list | tuple) or len(content) != 3:
        return False
    pairs = content[0]
    first = pairs[0] if isinstance(pairs, list | tuple) and pairs else None
    return isinstance(first, list | tuple) and len(first) > 0 and isinstance(first[0], Picture)


def _read_puregen(content: Any, request: Request) -> Poisoned:
    if not _is_puregen(content, request):
        raise request.must_hold("(list of (PIL image, label), indices, target)", describe(content))
    images, labels = _pairs(content[0], str(request.path))
    indices = integers(content[1], f"The indices of {request.path}")
    return indexed(request, images, labels, indices, "PureGen's poisons", **_packed_target(content[2], labels[0]))


def _packed_target(value: Any, label: int) -> dict[str, Any]:
    """Read a test image as the benchmark has it, or a plain value, such as a class, for the settings; else nothing."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(first, Picture):
        try:
            return _target(value, label, "The target")
        except InputError:
            return {}
    plain = value.item() if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0 else value
    try:
        text = json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return {}
    return {} if plain is None else {"settings": {"target": json.loads(text)}}


def with_target(poisoned: Poisoned, request: Request) -> Poisoned:
    """Return the poison with the target that `read` was given, if it was, unless the file has one of its own."""
    target: Any = request.target
    if target is None:
        return poisoned
    own = "a target" if poisoned.target is not None else "a trigger" if poisoned.target_class is not None else None
    if own is not None:
        raise InputError(
            f"target= is for a poison whose file does not say what it is aimed at. Got it for {request.path}, which "
            f"has {own}: leave target= and target_class= away."
        )
    shape = poisoned.images.shape[1:]
    if isinstance(target, Image.Image):
        target = np.atleast_3d(np.asarray(target.convert(pil_mode(shape[2]))))
    classes = int(poisoned.labels.max()) + 1
    return replace(poisoned, target=as_target(target, request.target_class, shape, classes))


def _is_bullseye(content: Any, request: Request) -> bool:
    return isinstance(content, dict) and {"poison", "idx"} <= set(content)


def _read_bullseye(content: Any, request: Request) -> Poisoned:
    expected = f"{request.path} must hold a dict with poison, a list of (normalised tensor (3, H, W), label), and idx"
    if not _is_bullseye(content, request) or not isinstance(content["poison"], list | tuple) or not content["poison"]:
        raise InputError(f"{expected}. Got {describe(content)}.")
    images, labels = [], []
    for place, item in enumerate(content["poison"]):
        values = as_number_array(item[0]) if isinstance(item, list | tuple) and len(item) == 2 else None
        if values is None or values.dtype.kind != "f" or values.size == 0 or values.shape[-3:-2] != (3,):
            raise InputError(f"{expected}. Got {describe(item)} as item {place}.")
        images.append(values.reshape(values.shape[-3:]) if values.ndim == 3 or len(values) == 1 else values)
        labels.append(label_of(item[1], f"The label of item {place} of {request.path}"))
    if len({image.shape for image in images}) != 1 or images[0].ndim != 3:
        raise InputError(f"{expected}, of one size. Got {sorted({image.shape for image in images})[:5]}.")
    mean = _BULLSEYE_MEAN if request.mean is None else request.mean
    std = _BULLSEYE_STD if request.std is None else request.std
    if len(mean) != 3 or len(std) != 3:
        raise InputError(f"mean= and std= must be one number a channel, 3. Got {tuple(mean)} and {tuple(std)}.")
    pixels = np.stack(images).transpose(0, 2, 3, 1) * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    found = as_levels(pixels, f"{request.path}, times {tuple(std)} plus {tuple(mean)},", tolerance=0.02)
    settings = {"mean": [float(value) for value in mean], "std": [float(value) for value in std]}
    indices = integers(content["idx"], f"The idx of {request.path}")
    return indexed(request, found, labels, indices, "Bullseye Polytope", bound=Bound("linf", 0.1), settings=settings)


FORMATS = {
    "benchmark": Format(
        "a folder of {poisons,base_indices,target}.pickle", _is_benchmark, _read_benchmark, may_aim=True
    ),
    "puregen": Format(
        "a .pth of (list of (PIL image, label), indices, target)", _is_puregen, _read_puregen, may_aim=True
    ),
    "bullseye": Format(
        "a .pth of {'poison': [(normalised tensor, label)], 'idx': indices}", _is_bullseye, _read_bullseye, may_aim=True
    ),
}
