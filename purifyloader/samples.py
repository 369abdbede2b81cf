"""Where the image is in a sample, and the sample with another image in its place."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

from purifyloader.errors import InputError
from purifyloader.images import is_image

__all__ = ["get_image", "rest", "with_image"]

ImageKey = str | int | None


def _key(sample: Any, image_key: ImageKey) -> Any:
    """The position or key of the image; None for a sample that is the image itself."""
    if isinstance(sample, Mapping):
        key: Any = "image" if image_key is None else image_key
        if key not in sample:
            raise InputError(
                f"Expected the image of a dict sample under {key!r}. Got the keys {list(sample)}: "
                "name the right one as image_key=."
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


def get_image(sample: Any, image_key: ImageKey = None) -> Any:
    """The image of a sample: position 0 of a tuple or list, "image" of a dict, or the sample itself.

    Raises:
        InputError: there is no image there.
    """
    key = _key(sample, image_key)
    image = sample if key is None else sample[key]
    if not is_image(image):
        where = "the sample" if key is None else f"field {key!r} of the sample"
        raise InputError(
            "Expected an image: PIL, a numpy array (H, W[, C]) or a tensor ([C,] H, W). "
            f"Got {type(image).__name__} as {where}: name the image's field as image_key=."
        )
    return image


def with_image(sample: Any, image: Any, image_key: ImageKey = None) -> Any:
    """The sample with `image` in the image's place; every other field is the same object."""
    key = _key(sample, image_key)
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


def rest(sample: Any, image_key: ImageKey = None) -> Any:
    """Every field but the image, in order; None where there is none."""
    key = _key(sample, image_key)
    if key is None:
        return None
    if isinstance(sample, Mapping):
        return {str(k): v for k, v in sample.items() if k != key}
    return [*sample[:key], *sample[key + 1 :]]
