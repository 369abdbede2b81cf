"""Hash images and targets, 64 bits each: a cache knows its source by them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.errors import InputError

_NUMERIC = "?bBhHiIlLqQefdFD"  # numpy's codes, without long double, whose bytes depend on the machine


def source_hashes(
    images: NDArray[Any] | Tensor | Sequence[NDArray[Any] | Tensor], targets: Any = None
) -> NDArray[np.uint64]:
    """Return 64-bit hashes (BLAKE2b) of source images and of their targets, uint64 (N, 2).

    Each image has its own, so that a change of one is found and named: a sample would miss a poison of 1 %.

    Args:
        images: an array or tensor (N, ...), or N of them of any sizes. The same pixels in another dtype or layout
            are other images.
        targets: N of them, each None, a boolean, a number, a string, bytes, an array, a tensor, or lists, tuples
            and dicts of these; None for none at all. A 0-dimensional array is its number, a list is a tuple:
            how targets were collated does not matter. `InputError` for others, or not as many.

    >>> import numpy as np
    >>> from purifyloader.cache import source_hashes
    >>> images = np.zeros((2, 32, 32, 3), np.uint8)
    >>> images[1, 0, 0, 0] = 1  # one value of one pixel
    >>> first, second = source_hashes(images, targets=[7, 7])
    >>> (first == second).tolist()  # the image, the target
    [False, True]
    """
    if targets is None:
        targets = [None] * len(images)
    if isinstance(targets, str | bytes | Mapping) or not hasattr(targets, "__len__"):
        raise InputError(
            f"targets must be a sequence, array or tensor with one an image. Got {type(targets).__name__}."
        )
    if len(images) != len(targets):
        raise InputError(f"There must be one target an image. Got {len(images)} images and {len(targets)} targets.")
    out = np.empty((len(images), 2), np.uint64)
    for row, (image, target) in enumerate(zip(images, targets, strict=True)):
        out[row] = _short_hash(_image_bytes(image)), _short_hash(_target_bytes(target))
    return out


def image_hashes(images_NHWC: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Hash each image alone, as `source_hashes` does: uint64 (N,)."""
    return np.array([_short_hash(_image_bytes(image)) for image in images_NHWC], np.uint64)


def hashes_as_text(hashes: NDArray[np.uint64]) -> str:
    """Write hashes for a JSON file: base64 of their little-endian bytes."""
    return base64.b64encode(hashes.astype("<u8").tobytes()).decode("ascii")


def hashes_of_text(text: str) -> NDArray[np.uint64]:
    """Read what `hashes_as_text` wrote, or raise `InputError`."""
    try:
        data = base64.b64decode(text, validate=True)
        return np.frombuffer(data, "<u8").astype(np.uint64)
    except (TypeError, ValueError, binascii.Error) as error:
        raise InputError(f"Hashes are base64 of 8 bytes each. Got {str(text)[:20]!r}...: {error}.") from None


def is_hashable(value: Tensor | NDArray[Any] | np.generic) -> bool:
    """Say whether `source_hashes` takes the values of a tensor, an array or a numpy scalar."""
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_quantized
    return value.dtype.char in (_NUMERIC if isinstance(value, np.ndarray) else _NUMERIC + "US")


def _short_hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _image_bytes(image: Any) -> bytes:
    data = _dense_bytes(image)
    if data is None or image.ndim < 2:
        got = f"{tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        raise InputError(
            f"An image must be a dense numeric array or tensor of 2 or more dimensions. Got {got}. "
            "Convert it, a PIL image by numpy.asarray, before hashing it."
        )
    return data


def _tagged(tag: bytes, *parts: bytes) -> bytes:
    """Join parts with their lengths before them, so that no two values give the same bytes."""
    return tag + struct.pack("<Q", len(parts)) + b"".join(struct.pack("<Q", len(p)) + p for p in parts)


def _dense_bytes(array: Any) -> bytes | None:
    """Return dtype, shape and values of a tensor or numpy array, the same for both; None for anything else."""
    if isinstance(array, Tensor) and array.layout == torch.strided:
        tensor = array.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # viewed as bytes, because numpy has no bfloat16
        values = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(tensor.dtype).removeprefix("torch.")
    elif isinstance(array, np.ndarray) and array.dtype.char in _NUMERIC:
        values = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        dtype = array.dtype.name
    else:
        return None
    return _tagged(b"a", dtype.encode(), b"".join(struct.pack("<Q", n) for n in array.shape), values)


def _target_bytes(target: Any) -> bytes:
    if (data := _dense_bytes(target)) is not None:
        return data if target.ndim else _target_bytes(target.item())
    if isinstance(target, np.generic) and target.dtype.char in _NUMERIC + "US":
        return _target_bytes(target.item())
    match target:
        case None:
            return _tagged(b"n")
        case bool():  # before int, which it is too
            return _tagged(b"b", bytes([target]))
        case int():
            return _tagged(b"i", b"%d" % target)
        case float():
            return _tagged(b"f", struct.pack("<d", target))
        case complex():
            return _tagged(b"c", struct.pack("<2d", target.real, target.imag))
        case str():
            return _tagged(b"s", target.encode("utf-8", "surrogatepass"))
        case bytes():
            return _tagged(b"y", target)
        case list() | tuple():
            return _tagged(b"l", *map(_target_bytes, target))
        case dict():
            items = sorted((_target_bytes(k), _target_bytes(v)) for k, v in target.items())
            return _tagged(b"d", *(part for item in items for part in item))
    raise InputError(
        "A target must be None, a boolean, a number, a string, bytes, a dense array or tensor, or lists, "
        f"tuples and dicts of these. Got {type(target).__name__}. "
        "Convert it in your dataset's target_transform."
    )
