"""Find the image and the label of a sample, and put another in its place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from purifyloader.core.images import is_image
from purifyloader.errors import InputError

log = logging.getLogger(__name__)

ImageKey = str | int | None
_IMAGE_TYPES = ("uint8", "float16", "bfloat16", "float32", "float64")
_PARTS = 8  # of a list in a sample that are looked at


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
    """Return the position or key of the label: `label_key`, else the first field beside the image, or "label"."""
    if place(sample, image_key) is None or (not isinstance(sample, Mapping) and len(sample) < 2):
        raise InputError("The sample is an image alone, and has no label. Give a dataset of (image, label).")
    if label_key is None:
        label_key = "label" if isinstance(sample, Mapping) else int(place(sample, image_key) == 0)
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


def check_one_image(sample: Any, image_key: ImageKey = None, dimensions: int = 3) -> None:
    """Refuse a sample with more images than one: the others would pass as they are.

    Where `image_key` says which one is meant, a warning names the others. An image has colours, `dimensions` axes, or
    the type and shape of the one that is meant, and is no mask; a batch of tensors has one axis more.
    """
    if (key := place(sample, image_key)) is None:
        return
    own = sample[key]
    named = sample.items() if isinstance(sample, Mapping) else enumerate(sample)
    if not (others := [name for name, value in named if name != key and _has_image(value, own, dimensions)]):
        return
    names = ", ".join(repr(name) for name in others)
    if image_key is None:
        raise InputError(
            f"A sample holds one image. Got images in {names} too, beside {key!r}, which would stay as they are: make "
            f"a sample of each, or give image_key={key!r} if they are to stay."
        )
    log.warning("The images in %s of each sample are not purified: image_key=%r names the one that is.", names, key)


def _has_image(value: Any, own: Any, dimensions: int) -> bool:
    if isinstance(value, Mapping | list | tuple):
        parts = value.values() if isinstance(value, Mapping) else value[:_PARTS]
        return any(_has_image(part, own, dimensions) for part in parts)
    if isinstance(value, Image.Image):
        return value.mode in ("RGB", "RGBA") or (isinstance(own, Image.Image) and value.mode == own.mode != "P")
    if isinstance(value, tv_tensors.TVTensor):
        return isinstance(value, tv_tensors.Image | tv_tensors.Video)
    if not isinstance(value, np.ndarray | Tensor) or str(value.dtype).rpartition(".")[2] not in _IMAGE_TYPES:
        return False
    if type(value) is type(own) and (value.dtype, value.shape) == (own.dtype, own.shape):
        return True
    channels = value.ndim - (3 if isinstance(value, Tensor) else 1)
    return value.ndim == dimensions and value.shape[channels] in (3, 4) and min(value.shape[-3:]) > 0


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
