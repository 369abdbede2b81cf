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
_BITS = {"1": (1, 1), "L": (8, 1), "LA": (8, 2), "RGB": (8, 3), "RGBA": (8, 4), "I": (32, 1), "F": (32, 1)}
_BITS["I;16"] = (16, 1)
_MODES = tuple(_BITS)  # each with the bits of a number and the numbers of a pixel
DEEPEST = 60
"""Values in one another that are stored."""

_INTEGER_BITS = 4096  # Python refuses to write integers of more than 4300 digits


class Unstorable(TypeError):
    """A value that `encode` cannot write so that `decode` gives the same."""


def encode(value: Any, level: int = 0) -> Any:
    """Write `value` as JSON; `level` is of values that it is in.

    Raises `Unstorable` for anything but None, booleans, numbers, strings, bytes, lists, tuples, dicts, dense
    tensors, numpy arrays and PIL images; also for a subclass, such as a named tuple, which would not come back as one,
    and for values more than 60 deep in one another.
    """
    kind = type(value)
    if level > DEEPEST:
        raise Unstorable(f"values in one another more than {DEEPEST} deep")
    if value is None or kind in (bool, str) or (kind is int and value.bit_length() <= _INTEGER_BITS):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is list:
        return [encode(v, level + 1) for v in value]
    if kind is tuple:
        return {"$tuple": [encode(v, level + 1) for v in value]}
    if kind is dict:
        keys = list(value)
        # canonical JSON sorts the keys: a dict in another order keeps it as a list of pairs
        if all(type(k) is str and not k.startswith("$") for k in keys) and keys == sorted(keys):
            return {k: encode(v, level + 1) for k, v in value.items()}
        return {"$dict": [[encode(k, level + 1), encode(v, level + 1)] for k, v in value.items()]}
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
    """Read what `encode` wrote. Arrays and tensors are new and may be written to.

    Raises `ValueError` for what `encode` does not write; no value takes more memory than its text.
    """
    try:
        return _decoded(value)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError) as error:
        raise ValueError(f"it is no stored value ({type(error).__name__}: {error!s:.200})") from None


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(v) for v in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if len(value) != 1 or not tag.startswith("$"):
        return {k: _decoded(v) for k, v in value.items()}
    content = value[tag]
    match tag:
        case "$tuple":
            return tuple(_decoded(v) for v in content)
        case "$dict":
            return {_decoded(k): _decoded(v) for k, v in content}
        case "$float":
            return float(content)
        case "$bytes":
            return base64.b64decode(content)
        case "$tensor":
            name, shape, data = content
            dtype = getattr(torch, name)
            raw = base64.b64decode(data)
            _check_size(shape, dtype.itemsize, raw)
            flat = torch.frombuffer(bytearray(raw) or bytearray(1), dtype=torch.uint8)
            return flat[: len(raw)].view(dtype).reshape(shape)
        case "$array":
            name, shape, data = content
            array = _from_little(name, data)
            _check_size(shape, 1, array)
            return array.reshape(shape)
        case "$scalar":
            dtype, data = content
            return _from_little(dtype, data)[0]
        case "$image":
            mode, size, data = content
            width, height = size
            raw = base64.b64decode(data)
            bits, bands = _BITS[mode]
            _check_size([height, -(-width * bits // 8), bands], 1, raw)
            return Image.frombytes(mode, (width, height), raw)
    raise ValueError(f"There is no tag {tag!r} of stored values.")


def _little(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _check_size(shape: Any, itemsize: int, data: Any) -> None:
    if not isinstance(shape, list) or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"its shape is {shape!r:.80}")
    if math.prod(shape) * itemsize != len(data):
        raise ValueError(f"it has {len(data)} bytes or numbers for the shape {shape}")


def _from_little(dtype: str, data: str) -> np.ndarray[Any, Any]:
    if np.dtype(dtype).char not in _NUMERIC:
        raise ValueError(f"its type is {dtype!r:.80}")
    return np.frombuffer(base64.b64decode(data), dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
