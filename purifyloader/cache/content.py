"""Check what the files of a cache say, value by value, before it is used: each function raises `ValueError`.

A file guards itself by its own hash, which says that it is whole, and not that it was made by this library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "check_identity",
    "check_made",
    "check_notes",
    "check_sample",
    "check_where",
    "image_shape",
    "image_types",
    "integers",
]
__all__ += ["optional_object", "shape_of", "source_hashes", "text"]

_TYPE = re.compile(r"[\w.+-]{1,40}/[\w.+-]{1,40}/[0-9]")
_CHANNELS = 4
_SIDE = 2**31


def text(values: Mapping[str, Any], *names: str) -> None:
    """Check that values of these names are strings."""
    for name in names:
        if not isinstance(values[name], str):
            raise ValueError(f"its {name} is no text, but {values[name]!r:.80}")


def optional_object(values: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if values[name] is not None and not isinstance(values[name], dict):
            raise ValueError(f"its {name} is no object, but {values[name]!r:.80}")


def check_notes(value: Any) -> None:
    """Check the notes of an index, of which samples read from it alone have the names of their classes."""
    optional_object({"notes": value}, "notes")
    classes = (value or {}).get("classes")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError(f"its classes are {classes!r:.80}")


def integers(name: str, values: Any, count: int | None = None, below: int = 2**63) -> list[int]:
    """Return a list of integers from 0, `count` of them."""
    if not isinstance(values, list) or (count is not None and len(values) != count):
        got = f"{len(values)} of them" if isinstance(values, list) else type(values).__name__
        raise ValueError(f"its {name} must be a list{'' if count is None else f' of {count}'}, and there are {got}")
    if any(type(value) is not int or not 0 <= value < below for value in values):
        raise ValueError(f"its {name} has something else than integers from 0 to {below - 1}")
    return values


def shape_of(tensor: Any, name: str) -> list[int]:
    """Return the shape of a tensor by the header of safetensors, whose only one it is, of bytes, from the start."""
    if not isinstance(tensor, dict) or tensor.get("dtype") != "U8":
        raise ValueError(f"its tensor {name!r} is not one of bytes")
    shape = integers("tensor's shape", tensor.get("shape"))
    size = 1
    for side in shape:
        size *= side
    offsets = tensor.get("data_offsets")
    if size >= 2**63 or not isinstance(offsets, list) or offsets != [0, size] or type(offsets[0]) is not int:
        raise ValueError("its tensor is not where it should be")
    return shape


def image_shape(value: Any) -> tuple[int, int, int]:
    height, width, channels = integers("image_shape", value, 3, _SIDE)
    if min(height, width, channels) < 1 or channels > _CHANNELS:
        raise ValueError(f"its images have the shape {value}")
    return height, width, channels


def image_types(value: Any, count: int) -> str | tuple[str, ...]:
    types = [value] if isinstance(value, str) else value
    if not isinstance(types, list) or not all(isinstance(one, str) and _TYPE.fullmatch(one) for one in types):
        raise ValueError(f"its image_types are {value!r:.80}")
    if types is value and len(types) != count:
        raise ValueError(f"it has {len(types)} image_types for {count} images")
    return value if isinstance(value, str) else tuple(types)


def check_sample(value: Any) -> None:
    """Check how a sample is put together, as `samples.structure_of` says it."""
    if value is None:
        return
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "image":
        good = set(value) == {"type"}
    elif kind == "dict":
        good = set(value) == {"type", "image"} and isinstance(value["image"], str | int)
    else:
        good = kind in ("list", "tuple") and set(value) == {"type", "image", "fields"}
        if good:
            at, fields = value["image"], value["fields"]
            good = type(at) is int and type(fields) is int and 0 <= at < fields < 2**31
    if not good:
        raise ValueError(f"its sample is {value!r:.80}")


def source_hashes(value: Any, count: int) -> NDArray[np.uint64] | None:
    """Read the hashes of the source of `count` images, (count, 2), from two texts of hex."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(words, str) for words in value):
        raise ValueError("its source is not two texts")
    parts = [np.frombuffer(bytes.fromhex(words), dtype=">u8").astype(np.uint64) for words in value]
    if any(len(part) != count for part in parts):
        raise ValueError(f"it has {len(parts[0])} source hashes for {count} images")
    return np.stack(parts, axis=1)


def check_made(value: Any, counted: bool = False) -> None:
    if not isinstance(value, dict) or (counted and type(value.get("shards")) is not int):
        raise ValueError(f"it was made with {value!r:.80}")


def check_identity(value: Any) -> None:
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        raise ValueError("its identity has no configuration")
    devices, source = value.get("devices"), value.get("source")
    if not isinstance(devices, list) or not devices or not all(isinstance(device, str) for device in devices):
        raise ValueError(f"its devices are {devices!r:.80}")
    if source is None:
        return
    if not isinstance(source, dict) or not all(isinstance(source.get(part), str) for part in ("images", "targets")):
        raise ValueError(f"its source is {source!r:.80}")


def check_where(found: Any) -> None:
    """Check which images a plan purifies: conditions, each with what it found, and perhaps a sanitation."""
    if not isinstance(found, dict) or not isinstance(found.get("conditions"), list):
        raise ValueError("it has no conditions")
    for condition in found["conditions"]:
        planned = condition.get("planned") if isinstance(condition, dict) else None
        if not isinstance(planned, dict) or not isinstance(condition.get("kind"), str):
            raise ValueError(f"its condition is {condition!r:.80}")
        numbers: Sequence[Any] = [planned.get("threshold"), condition.get("k", 1)]
        counts = [planned.get("purified"), planned.get("images")]
        if not all(map(_is_number, numbers)) or any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"its plan is {planned!r:.80}")
    optional_object({"sanitation": found.get("sanitation")}, "sanitation")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
