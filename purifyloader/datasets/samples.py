"""Find the image and the label of a sample, and put another in its place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from purifyloader.core.images import is_image
from purifyloader.errors import InputError

log = logging.getLogger(__name__)

ImageKey = str | int | None
_IMAGE_TYPES = ("uint8", "float16", "bfloat16", "float32", "float64")
_PARTS = 1024  # of a list in a sample that are looked at
_PLAIN = {bool, int, float, str, bytes, type(None), np.int64, np.float32, np.float64}  # types of no image
_SUM = 0.01  # how far from 1 a sum of soft labels may be, in 16 bits


def place(sample: Any, image_key: ImageKey = None) -> Any:
    """Return the position or key of the image in a sample, None for a bare image; `InputError` for no such field."""
    if isinstance(sample, Mapping):
        key: Any = "image" if image_key is None else image_key
        if key not in sample:
            raise InputError(
                f"A dict sample has no image under {key!r}, but the keys {list(sample)}. Name the right one as "
                "image_key=."
            )
        return key
    if isinstance(sample, tuple | list):
        key = 0 if image_key is None else image_key
        if not isinstance(key, int) or not -len(sample) <= key < len(sample):
            raise InputError(f"image_key={key!r} is no position of a sample of {len(sample)} fields.")
        return key % len(sample)
    if image_key is not None:
        raise InputError(f"image_key={image_key!r} needs dict or tuple samples. Got {type(sample).__name__}.")
    return None


def label_place(sample: Any, image_key: ImageKey = None, label_key: ImageKey = None) -> Any:
    """Return the position or key of the label: `label_key`, else the first field beside the image, "label" or "cls"."""
    if place(sample, image_key) is None or (not isinstance(sample, Mapping) and len(sample) < 2):
        raise InputError("The sample is an image alone, and has no label. Give a dataset of (image, label).")
    if label_key is None and isinstance(sample, Mapping):
        label_key = "cls" if "cls" in sample and "label" not in sample else "label"  # as WebDataset names it
    elif label_key is None:
        label_key = int(place(sample, image_key) == 0)
    if isinstance(sample, Mapping) and label_key not in sample:
        raise InputError(f"The sample has no label under {label_key!r}, but {list(sample)}. Name it as label_key=.")
    return place(sample, label_key)


def get_image(sample: Any, image_key: ImageKey = None) -> Any:
    """Return the image of a sample, or raise `InputError` where there is none at its `place`."""
    key = place(sample, image_key)
    image = sample if key is None else sample[key]
    if not is_image(image):
        where = "the sample" if key is None else f"field {key!r} of the sample"
        raise InputError(
            f"An image is PIL, a numpy array (H, W[, C]) or a tensor ([C,] H, W). Got {type(image).__name__} as "
            f"{where}. Name the image's field as image_key=."
        )
    return image


def check_one_image(sample: Any, image_key: ImageKey = None, dimensions: int = 3) -> bool:
    """Refuse a sample with more images than one: the others would pass as they are. Return True if it has one.

    Where `image_key` says which one is meant, a warning names the others, and the result is False. An image has
    colours, `dimensions` axes, or the type and shape of the one that is meant; a batch of tensors has one axis more. So
    are stacks of views, and tensors of the type, height and width of the one that is meant, in one channel of floats in
    [0, 1] or a multiple of its channels. Masks, which have two values, and soft labels, which sum to 1, are none.
    """
    usual = image_key is None and type(sample) is tuple and len(sample) > 0  # `place` takes half of the time
    if (key := 0 if usual else place(sample, image_key)) is None:
        return True
    own = sample[key]
    if dimensions == 4 and isinstance(own, list | tuple) and own:  # a batch of images of many sizes
        own, dimensions = own[0], 3
    named = sample.items() if isinstance(sample, Mapping) else enumerate(sample)
    others = [
        name
        for name, value in named
        if name != key and type(value) not in _PLAIN and _has_image(value, own, dimensions)
    ]
    if not others:
        return True
    names = ", ".join(repr(name) for name in others)
    if image_key is None:
        raise InputError(
            f"A sample holds one image. Got images in {names} too, beside {key!r}, which would stay as they are: make "
            f"a sample of each, or give image_key={key!r} if they are to stay."
        )
    log.warning("The images in %s of each sample are not purified: image_key=%r names the one that is.", names, key)
    return False


def _has_image(value: Any, own: Any, dimensions: int) -> bool:
    if isinstance(value, Mapping | list | tuple):
        parts = [*value.values()] if isinstance(value, Mapping) else value[:_PARTS]
        return not {*map(type, parts)} <= _PLAIN and any(_has_image(part, own, dimensions) for part in parts)
    if isinstance(value, Image.Image):
        return value.mode in ("RGB", "RGBA") or (isinstance(own, Image.Image) and value.mode == own.mode != "P")
    if isinstance(value, tv_tensors.TVTensor):
        return isinstance(value, tv_tensors.Image | tv_tensors.Video)
    if not isinstance(value, np.ndarray | Tensor) or str(value.dtype).rpartition(".")[2] not in _IMAGE_TYPES:
        return False
    if 0 in value.shape:
        return False
    same_type = isinstance(own, Tensor if isinstance(value, Tensor) else np.ndarray) and own.dtype == value.dtype
    if same_type and value.shape == own.shape:
        return not _is_map(value, own)
    if value.ndim not in (dimensions, dimensions + 1):
        return False
    channels = _channels(value)
    if value.ndim > dimensions:  # a stack of views
        alike = channels in (3, 4) or (same_type and own.ndim == dimensions and channels == _channels(own))
        return alike and _size(value) == _size(own) and not _is_map(value, own)
    if channels in (3, 4):
        return _size(value) != _size(own) or not _is_map(value, own)
    if not same_type or own.ndim != dimensions or _size(value) != _size(own):
        return False
    if channels == 1:
        return value.dtype not in (np.uint8, torch.uint8) and _is_grey(value)
    return _channels(own) in (3, 4) and channels % _channels(own) == 0 and not _is_map(value, own, constant=True)


def _channels(image: NDArray[Any] | Tensor) -> int:
    return image.shape[-3 if isinstance(image, Tensor) else -1]


def _size(image: Any) -> tuple[int, ...]:
    if isinstance(image, Image.Image):
        return image.size[::-1]
    if isinstance(image, np.ndarray) and image.ndim > 2:
        return tuple(image.shape[-3:-1])
    return tuple(image.shape[-2:]) if isinstance(image, np.ndarray | Tensor) else ()


def _is_map(value: NDArray[Any] | Tensor, own: Any, constant: bool = False) -> bool:
    """Tell masks (two values, where the image has more) and soft labels (a sum of 1) from pixels."""
    value = _thinned(value)
    if _has_two_values(value):
        several = bool(value.min() < value.max())
        return constant or (several and not _has_two_values(own if isinstance(own, Tensor) else np.asarray(own)))
    sums = value.sum(-3 if isinstance(value, Tensor) else -1) if value.ndim > 2 else value
    return bool(abs(sums - 1).max() < _SUM)


def _thinned(image: Any) -> Any:
    """Take every n-th row and column, about 64 of each: enough to tell a mask, and as quick at any size."""
    rows, columns = (slice(None, None, max(length // 64, 1)) for length in _size(image))
    last = () if isinstance(image, Tensor) or image.ndim < 3 else (slice(None),)
    return image[(..., rows, columns, *last)]


def _has_two_values(value: NDArray[Any] | Tensor) -> bool:
    low, high = value.min(), value.max()
    return bool(((value == low) | (value == high)).all())


def _is_grey(value: NDArray[Any] | Tensor) -> bool:
    """Tell one channel of pixels, floats in [0, 1], from a mask or a map of other numbers."""
    value = _thinned(value)
    return bool(value.min() >= 0) and bool(value.max() <= 1) and not _has_two_values(value)


def with_image(sample: Any, image: Any, image_key: ImageKey = None) -> Any:
    """Copy the sample with `image` in the image's place; every other field is the same object."""
    key = place(sample, image_key)
    if key is None:
        return image
    if isinstance(sample, Mapping):
        if isinstance(sample, MutableMapping):
            changed = copy.copy(sample)
            changed[key] = image
            return changed
        return {**sample, key: image}
    fields = [*sample[:key], image, *sample[key + 1 :]]
    if hasattr(sample, "_make"):  # a named tuple
        return type(sample)._make(fields)
    return type(sample)(fields)


def fields(sample: Any, image_key: ImageKey = None) -> Any:
    """Return what a sample holds beside its image: None of a bare image, one field of a pair, else a list or dict."""
    key = place(sample, image_key)
    if key is None:
        return None
    if isinstance(sample, Mapping):
        return {k: v for k, v in sample.items() if k != key}
    others = [*sample[:key], *sample[key + 1 :]]
    return others[0] if len(others) == 1 else others


def structure_of(sample: Any, image_key: ImageKey = None) -> dict[str, Any]:
    """Describe for `assemble`, as JSON, how a sample is put together. A named tuple is a tuple, any mapping a dict."""
    key = place(sample, image_key)
    if key is None:
        return {"type": "image"}
    if isinstance(sample, Mapping):
        return {"type": "dict", "image": key}
    return {"type": "list" if isinstance(sample, list) else "tuple", "image": key, "fields": len(sample)}


def is_plain(sample: Any) -> bool:
    """Say whether `assemble` gives the very type back."""
    return type(sample) in (tuple, list, dict) or is_image(sample)


def assemble(structure: Mapping[str, Any], others: Any, image: Any) -> Any:
    """Put a sample together from its `structure_of` and `fields` and another image."""
    kind = structure["type"]
    if kind == "image":
        return image
    key = structure["image"]
    if kind == "dict":
        # the image comes last where it stood elsewhere: a dict is not read by position
        return {**others, key: image}
    values = [others] if structure["fields"] == 2 else others
    values = [*values[:key], image, *values[key:]]
    return values if kind == "list" else tuple(values)
