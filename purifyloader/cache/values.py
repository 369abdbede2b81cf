"""Write targets as JSON: what a sample holds beside its image, stored with its type and read back the same.

What JSON has is written as it is. Everything else is an object with one key that starts with "$":

    {"$tuple": [...]}                      a tuple
    {"$dict": [[key, value], ...]}         a dict whose keys are not plain strings in order
    {"$float": "nan" | "inf" | "-inf"}     a float that JSON does not have
    {"$bytes": base64}
    {"$tensor": [dtype, shape, base64]}    a tensor; little endian, row-major
    {"$array": [dtype, shape, base64]}     a numpy array
    {"$scalar": [dtype, base64]}           a numpy scalar
    {"$image": [mode, [W, H], base64]}     a PIL image, such as a segmentation mask
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_NUMERIC = "?bBhHiIlLqQefdFD"  # numpy's codes without long double, whose bytes depend on the machine
_MODES = ("1", "L", "LA", "RGB", "RGBA", "I", "F", "I;16")
_INTEGER_BITS = 4096  # Python refuses to write integers of more than 4300 digits


class Unstorable(TypeError):
    """A value that `encode` cannot write so that `decode` gives the same."""


def encode(value: Any) -> Any:
    """Write `value` as JSON.

    Raises `Unstorable` for anything but None, booleans, numbers, strings, bytes, lists, tuples, dicts, dense
    tensors, numpy arrays and PIL images; also for a subclass, such as a named tuple, which would not come back as one.
    """
    kind = type(value)
    if value is None or kind in (bool, str) or (kind is int and value.bit_length() <= _INTEGER_BITS):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is list:
        return [encode(v) for v in value]
    if kind is tuple:
        return {"$tuple": [encode(v) for v in value]}
    if kind is dict:
        keys = list(value)
        # canonical JSON sorts the keys: a dict in another order keeps it as a list of pairs
        if all(type(k) is str and not k.startswith("$") for k in keys) and keys == sorted(keys):
            return {k: encode(v) for k, v in value.items()}
        return {"$dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if kind is bytes:
        return {"$bytes": _text(value)}
    if kind is Tensor and value.layout == torch.strided and not value.requires_grad and not value.is_quantized:
        tensor = value.cpu().resolve_conj().resolve_neg().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()  # numpy has no bfloat16
        return {"$tensor": [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _text(data)]}
    if kind is np.ndarray and value.dtype.char in _NUMERIC:
        return {"$array": [value.dtype.name, list(value.shape), _text(_little(value).tobytes())]}
    if isinstance(value, np.generic) and value.dtype.char in _NUMERIC:
        return {"$scalar": [value.dtype.name, _text(_little(np.asarray(value)).tobytes())]}
    if isinstance(value, Image.Image) and value.mode in _MODES:
        return {"$image": [value.mode, list(value.size), _text(value.tobytes())]}
    raise Unstorable(f"{kind.__module__}.{kind.__qualname__}")


def decode(value: Any) -> Any:
    """Read what `encode` wrote. Arrays and tensors are new and may be written to."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if len(value) != 1 or not tag.startswith("$"):
        return {k: decode(v) for k, v in value.items()}
    content = value[tag]
    match tag:
        case "$tuple":
            return tuple(decode(v) for v in content)
        case "$dict":
            return {decode(k): decode(v) for k, v in content}
        case "$float":
            return float(content)
        case "$bytes":
            return base64.b64decode(content)
        case "$tensor":
            dtype, shape, data = content
            flat = torch.frombuffer(bytearray(base64.b64decode(data)) or bytearray(1), dtype=torch.uint8)
            count = math.prod(shape)
            return flat[: count * getattr(torch, dtype).itemsize].view(getattr(torch, dtype)).reshape(shape)
        case "$array":
            dtype, shape, data = content
            return _from_little(dtype, data).reshape(shape)
        case "$scalar":
            dtype, data = content
            return _from_little(dtype, data)[0]
        case "$image":
            mode, size, data = content
            return Image.frombytes(mode, tuple(size), base64.b64decode(data))
    raise ValueError(f"There is no tag {tag!r} of stored values.")


def _little(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _from_little(dtype: str, data: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(data), dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
