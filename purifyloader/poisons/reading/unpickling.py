"""Pickles of images and numbers, read without running what else they may hold.

A pickle is a program: it names functions and has them called. Here it gets the few of the table below, which make
images, arrays, tensors and containers and nothing else; any other name ends the reading before it is even imported.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.errors import InputError
from purifyloader.files.opening import opened
from purifyloader.files.pickles import check_pickle, check_torch

__all__ = ["Picture", "read_pickle", "read_torch"]

_NUMBER = re.compile(r"[biuf]\d{1,2}|bool")
_CHANNELS = {"L": 1, "RGB": 3}


class Picture:
    """A `Picture` is what a pickled PIL image becomes: its pixels (H, W, 1 or 3), without a line of Pillow's code."""

    __slots__ = ("image",)
    image: NDArray[np.uint8]

    def __setstate__(self, state: Any) -> None:
        # Pillow's state: info, mode, (width, height), palette, bytes, and of some classes the file's name
        if not isinstance(state, list | tuple) or len(state) < 5:
            raise pickle.UnpicklingError("an image without mode, size and pixels")
        mode, size, data = state[1], state[2], state[4]
        if mode not in _CHANNELS:
            raise pickle.UnpicklingError(f"an image of the mode {mode!r}, where only L and RGB are known")
        width, height = (int(side) for side in size)
        if min(width, height) < 1 or not isinstance(data, bytes) or len(data) != width * height * _CHANNELS[mode]:
            raise pickle.UnpicklingError(f"an image of {width} x {height} whose pixels are not so many")
        self.image = np.frombuffer(data, np.uint8).reshape(height, width, _CHANNELS[mode])


class _Function:
    """A function that a pickle may call but not alter, as it may a function's own attributes."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a function")


class _Kind:
    """A numpy dtype of plain numbers. A crafted state could make numpy's own follow pointers out of the file."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any, *_: Any) -> None:
        name = name.decode("ascii", "replace") if isinstance(name, bytes) else name
        if not isinstance(name, str) or not _NUMBER.fullmatch(name):
            raise pickle.UnpicklingError(f"an array of {name!r}, where only numbers are known")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.dtype = self.dtype.newbyteorder("=" if order == "|" else order)


def _as_array(shape: Any, kind: Any, data: Any, fortran: bool) -> NDArray[Any]:
    if not isinstance(kind, _Kind) or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array of objects, where only numbers are known")
    sides = tuple(int(side) for side in shape)
    if any(side < 0 for side in sides) or math.prod(sides) * kind.dtype.itemsize != len(data):
        raise pickle.UnpicklingError(f"an array of {sides} whose numbers are not so many")
    array = np.frombuffer(data, kind.dtype).reshape(sides, order="F" if fortran else "C")
    return array.astype(kind.dtype.newbyteorder("="), order="C")


class _Array(np.ndarray[Any, Any]):
    """An array that takes no state but plain numbers, and that a pickle cannot make with a size of its choice."""

    def __new__(cls, *_: Any) -> _Array:
        raise pickle.UnpicklingError("an array that is made without its numbers")

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        array = _as_array(shape, kind, data, bool(fortran))
        # numpy's own parser takes Python's False alone
        super().__setstate__((1, array.shape, array.dtype, False, array.tobytes()))  # type: ignore[arg-type]


def _empty_array(*_: Any) -> NDArray[Any]:
    return np.ndarray.__new__(_Array, (0,), np.uint8)


def _scalar(kind: Any, data: Any) -> Any:
    return _as_array((), kind, data, False)[()]


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    return _as_array(shape, kind, data, order == "F")


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    # how old protocols write bytes; no other codec is asked for
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return text.encode("latin1")


def _reconstruct(kind: Any, *_: Any) -> Picture:
    if kind is not Picture:
        raise pickle.UnpicklingError("an object that is no image")
    return Picture()


def _storage(data: bytes) -> Any:
    return _load_torch(io.BytesIO(data))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor without a storage")
    # torch warns that the class of storages which it reads here will go
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.tensor([], dtype=storage.dtype).set_(storage.untyped(), offset, size, stride)


_PILLOW = {
    "PIL.Image.Image": Picture,
    **{f"PIL.{kind}ImagePlugin.{kind.capitalize()}ImageFile": Picture for kind in ("Png", "Jpeg", "Bmp", "Ppm")},
}
_NUMPY: dict[str, Any] = {"numpy.ndarray": _Array, "numpy.dtype": _Kind}
for _core in ("numpy.core", "numpy._core"):  # of numpy 1 and 2
    _NUMPY[f"{_core}.multiarray._reconstruct"] = _Function(_empty_array)
    _NUMPY[f"{_core}.multiarray.scalar"] = _Function(_scalar)
    _NUMPY[f"{_core}.numeric._frombuffer"] = _Function(_from_buffer)
_PLAIN: dict[str, Any] = {"_codecs.encode": _Function(_encode), "collections.OrderedDict": dict}
for _module in ("copyreg", "copy_reg"):  # of Python 3 and 2
    _PLAIN[f"{_module}._reconstructor"] = _Function(_reconstruct)
for _module in ("builtins", "__builtin__"):
    _PLAIN |= {f"{_module}.{kind.__name__}": kind for kind in (bytearray, frozenset, set)}
    _PLAIN[f"{_module}.object"] = _Function(lambda: None)
_TORCH: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch.storage._load_from_bytes": _Function(_storage),
}

_ALLOWED: dict[str, Any] = {**_PILLOW, **_NUMPY, **_PLAIN, **_TORCH}


class _Wanted(pickle.UnpicklingError):
    """A name that is not in the list."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in _ALLOWED:
            raise _Wanted(full)
        return _ALLOWED[full]


def read_pickle(path: Path) -> Any:
    """Read a plain pickle: images as `Picture`, arrays, tensors, numbers, text, bytes and containers.

    A class or function that is not in the list is named in an `InputError`, and nothing of it is imported or run.
    """
    try:
        with opened(path) as file:
            check_pickle(file, path.stat().st_size)
            file.seek(0)
            return _Unpickler(file).load()
    except Exception as error:  # pickles that are no pickles raise anything
        raise _refusal(path, error) from None


def read_torch(path: Path) -> Any:
    """Read a file of torch.save, new or old: tensors on the CPU, and what `read_pickle` gives; it refuses as that."""
    try:
        return _load_torch(path)
    except Exception as error:  # see above
        raise _refusal(path, error) from None


def _load_torch(file: Path | io.BytesIO) -> Any:
    # torch's own reader of weights runs nothing; to what it knows are added images and arrays, by name
    check_torch(file)
    added: list[Any] = [(value, name) for name, value in {**_PILLOW, **_NUMPY}.items()]
    with warnings.catch_warnings(), torch.serialization.safe_globals(added):
        warnings.simplefilter("ignore")  # of protocols that it may not know: it says so in an error, too
        return torch.load(file, map_location="cpu", weights_only=True)


_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def _refusal(path: Path, error: Exception) -> InputError:
    text = str(error)
    found = _GLOBAL.search(text)
    wanted = text if isinstance(error, _Wanted) else found[1] if found else None
    if wanted is not None:
        wanted = wanted if "." in wanted else f"builtins.{wanted}"  # torch leaves that away
        return InputError(
            f"A poison file holds images, arrays, tensors and plain values. Got {path}, a pickle that wants {wanted}. "
            "It is refused, and nothing in it was run: pickles run code when they are loaded. Where you trust it, save "
            "what it holds as arrays."
        )
    reason = (text.rsplit("WeightsUnpickler error:")[-1].split() or [type(error).__name__])[:30]
    return InputError(
        f"{path} must be a whole pickle or file of torch.save. Got {path.stat().st_size:,} bytes that cannot be read "
        f"({' '.join(reason)}): damaged, cut short or of another format. Download it again."
    )
