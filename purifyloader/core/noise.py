"""Counter-based Gaussian noise: the same numbers for the same (seed, epoch, index, stage, step), always.

Random bits come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
a keyed bijection of a 128-bit counter, so that any number can be computed without the ones before it.
An image carries a 64-bit *key*; a stage or repetition of a composition derives a child key with
`fold_in`; a step of a sampler is a word of the counter. There is no state, and so nothing to save.

Keys are int64 tensors whose 64 bits are read as unsigned.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from purifyloader.errors import InputError

__all__ = ["fold_in", "image_keys", "key_from_seed", "normal", "philox4x32", "uniform"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_FEW = 16  # words that Python computes in less time than torch takes to call its operators

# The last counter word says what a number is for, so that a derived key never equals a noise word.
_FOLD, _NORMAL, _UNIFORM = 0x666F6C64, 0x6E6F726D, 0x756E6966  # "fold", "norm", "unif"


def philox4x32(counter: Sequence[Tensor | int], key: Sequence[Tensor | int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four counter words and two key words in [0, 2^32), int64 tensors or ints, which broadcast."""
    if len(counter) != 4 or len(key) != 2:
        raise InputError(f"philox4x32 takes four counter words and two key words. Got {len(counter)} and {len(key)}.")
    words = (*counter, *key)
    tensors = [word for word in words if isinstance(word, Tensor)]
    if not torch.compiler.is_compiling() and all(word.device.type == "cpu" for word in tensors):
        shape = np.broadcast_shapes(*(word.shape for word in tensors))
        if math.prod(shape) <= _FEW:
            return _rounds_of_few(words, shape)
    return _rounds(words)


def _rounds_of_few(words: Sequence[Tensor | int], shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Compute the rounds number by number in Python, ten times as fast for an image's key as torch's operators."""
    columns = [np.broadcast_to(word, shape).ravel().tolist() for word in words]
    results = []
    for c0, c1, c2, c3, k0, k1 in zip(*columns, strict=True):
        for _ in range(_ROUNDS):
            p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
            c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
            k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
        results.append((c0, c1, c2, c3))
    return torch.tensor(results, dtype=torch.int64, device="cpu").reshape(*shape, 4).unbind(-1)


def _rounds(words: Sequence[Tensor | int]) -> tuple[Tensor, ...]:
    device = next((word.device for word in words if isinstance(word, Tensor)), torch.device("cpu"))
    # `full`, for a copy of a number from the CPU would wait for a GPU
    tensors = [w if isinstance(w, Tensor) else torch.full((), w, dtype=torch.int64, device=device) for w in words]
    shape = torch.broadcast_shapes(*(word.shape for word in tensors))
    c0, c1, c2, c3 = (word.broadcast_to(shape).clone(memory_format=torch.contiguous_format) for word in tensors[:4])
    turns = torch.arange(_ROUNDS, device=device)
    keys = [(word.unsqueeze(-1) + turns * weyl).unbind(-1) for word, weyl in zip(tensors[4:], _WEYL, strict=True)]
    # In place, for most of the time would go into memory for the results. Words are kept in the low 32 bits, whatever
    # is above them, and cut off before a product, whose 64 bits wrap around and are right.
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    for k0, k1 in zip(*keys, strict=True):
        torch.mul(c0.bitwise_and_(_MASK), _MULTIPLIERS[0], out=p0)
        torch.mul(c2.bitwise_and_(_MASK), _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, p1 = p1, c1
        c3, p0 = p0, c3
    return tuple(word.bitwise_and_(_MASK) for word in (c0, c1, c2, c3))


def _split(key: Tensor) -> tuple[Tensor, Tensor]:
    return key & _MASK, (key >> 32) & _MASK


def _as_keys(key: Tensor) -> Tensor:
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        got = f"{key.dtype} tensor" if isinstance(key, Tensor) else type(key).__name__
        raise InputError(f"Keys must be an int64 tensor, as `image_keys` makes them. Got {got}.")
    return key


def _as_int(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be an integer. Got {value!r}.") from None


def _as_words(name: str, value: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise InputError(f"{name} must be integers. Got a {value.dtype} tensor.")
        return _split(value.to(torch.int64))
    value = _as_int(name, value)
    if not -(2**63) <= value < 2**64:
        raise InputError(f"{name} must fit in 64 bits. Got {value}.")
    return value & _MASK, (value >> 32) & _MASK


def fold_in(key: Tensor, data: Tensor | int) -> Tensor:
    """Derive a child key of each key for the 64-bit integer `data`; children of different data are independent."""
    low, high = _as_words("data", data)
    r0, r1, _, _ = philox4x32((low, high, 0, _FOLD), _split(_as_keys(key)))
    return r0 | (r1 << 32)


def key_from_seed(seed: int) -> Tensor:
    """Return the root key, a 0-dimensional int64 tensor, of a 64-bit seed."""
    low, high = _as_words("seed", seed)
    return torch.tensor(
        (int(low) | (int(high) << 32)) - (2**64 if int(high) >> 31 else 0), dtype=torch.int64, device="cpu"
    )


def image_keys(seed: int, epoch: int, index: Tensor | Sequence[int] | int) -> Tensor:
    """Compute the key of each image, int64 (B,): a pure function of (seed, epoch, index), integers of 64 bits."""
    if not isinstance(index, Tensor):
        index = [_as_int("index", i) for i in (index if isinstance(index, Iterable) else (index,))]
        if any(not -(2**63) <= i < 2**63 for i in index):
            raise InputError(f"index must fit in a signed 64-bit integer. Got {index}.")
        index = torch.tensor(index, dtype=torch.int64, device="cpu")
    elif index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise InputError(f"index must be integers. Got a {index.dtype} tensor.")
    index_B = index.to(torch.int64).reshape(-1)
    return fold_in(fold_in(key_from_seed(seed), epoch).to(index_B.device), index_B)


def _words(keys_B: Tensor, count: int, step: int, purpose: int) -> tuple[Tensor, ...]:
    step = _as_int("step", step)
    if not 0 <= step <= _MASK:
        raise InputError(f"step must be in [0, 2^32). Got {step}.")
    k0, k1 = _split(_as_keys(keys_B).reshape(-1, 1))
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=keys_B.device)
    return philox4x32((block, step, 0, purpose), (k0, k1))


def _count(shape: Sequence[int]) -> int:
    if any(size < 0 for size in shape):
        raise InputError(f"shape must not be negative. Got {tuple(shape)}.")
    return math.prod(shape)


def _unit(word: Tensor) -> Tensor:
    """Map a word to a float64 in (0, 1): the middle of its 2^-32 interval, so that the logarithm is finite."""
    return word.to(torch.float64).add_(0.5).mul_(2.0**-32)


def uniform(keys_B: Tensor, shape: Sequence[int], step: int = 0) -> Tensor:
    """Draw float64 uniforms in (0, 1), (B, *shape), as a pure function of (key, step)."""
    count = _count(shape)
    words = torch.stack(_words(keys_B, count, step, _UNIFORM), dim=-1)
    return _unit(words.flatten(1)[:, :count]).reshape(keys_B.numel(), *shape)


def normal(keys_B: Tensor, shape: Sequence[int], step: int = 0) -> Tensor:
    """Draw standard normal noise, float32, (B, *shape), as a pure function of (key, step).

    Box-Muller in float64, rounded to float32: the last bit does not depend on how a compiler fuses the arithmetic. The
    largest magnitude possible is 6.77.
    """
    count = _count(shape)
    words = _words(keys_B, count, step, _NORMAL)
    z = torch.empty(*words[0].shape, 4, dtype=torch.float32, device=keys_B.device)
    for pair in (0, 2):  # in place, as the words
        radius = _unit(words[pair]).log_().mul_(-2.0).sqrt_()
        angle = _unit(words[pair + 1]).mul_(2.0 * math.pi)
        z[..., pair] = angle.cos().mul_(radius)
        z[..., pair + 1] = angle.sin_().mul_(radius)
    return z.flatten(1)[:, :count].contiguous().reshape(keys_B.numel(), *shape)
