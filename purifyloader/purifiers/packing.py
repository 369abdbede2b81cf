"""Send weights to another process, all in one piece of shared memory.

torch hands each tensor to a worker as an open file of its own, and a process that is forked by a server
(`multiprocessing_context="forkserver"`, the default from Python 3.14) takes 250 of them: fewer than a U-Net has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextvars import ContextVar
from itertools import chain
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["reduced"]

_packing: ContextVar[bool] = ContextVar("packing", default=False)

# What is handed over is shared memory, which must last until the other process has it. All of them share it.
_kept: WeakKeyDictionary[nn.Module, tuple[Any, dict[torch.dtype, Tensor], list[_Place]]] = WeakKeyDictionary()

_ALIGNED = 64  # bytes, as torch aligns a tensor of its own


class _Place(NamedTuple):
    """Where a tensor is in the piece of its dtype, in elements."""

    names: list[str]  # a tensor that is shared has several
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_parameter: bool


def reduced(module: nn.Module) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """Return the result of `__reduce_ex__` for a module that is sent to a new process; None where nothing is packed."""
    if get_spawning_popen() is None or _packing.get():
        return None
    shared: dict[int, tuple[list[str], Tensor]] = {}
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    for name, tensor in chain(parameters, buffers):
        channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        if tensor.device.type == "cpu" and tensor.numel() and (tensor.is_contiguous() or channels_last):
            shared.setdefault(id(tensor), ([], tensor))[0].append(name)
    if not shared:
        return None
    tensors = [tensor for _, tensor in shared.values()]
    as_they_are = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    known = _kept.get(module)
    if known is None or known[0] != as_they_are:
        known = _kept[module] = (as_they_are, *_packed(list(shared.values())))
    return _unpacked, (_skeleton(module, tensors), *known[1:])


def _packed(shared: list[tuple[list[str], Tensor]]) -> tuple[dict[torch.dtype, Tensor], list[_Place]]:
    places, sizes = [], dict[torch.dtype, int]()
    for names, tensor in shared:
        offset = sizes.get(tensor.dtype, 0)
        shape, stride = tuple(tensor.shape), tensor.stride()
        places.append(_Place(names, tensor.dtype, shape, stride, offset, isinstance(tensor, nn.Parameter)))
        unit = max(1, _ALIGNED // tensor.element_size())
        sizes[tensor.dtype] = offset + unit * math.ceil(tensor.numel() / unit)
    pieces = {dtype: torch.zeros(size, dtype=dtype, device="cpu") for dtype, size in sizes.items()}
    for place, (_, tensor) in zip(places, shared, strict=True):
        _view(pieces, place).copy_(tensor.detach())
    return pieces, places


def _view(pieces: dict[torch.dtype, Tensor], place: _Place) -> Tensor:
    return pieces[place.dtype].as_strided(place.shape, place.stride, place.offset)


def _skeleton(module: nn.Module, packed: list[Tensor]) -> nn.Module:
    """A copy with nothing where these tensors are."""
    memo: dict[int, Any] = {id(tensor): None for tensor in packed}
    for tensor in packed:
        empty = torch.empty(0, device="cpu")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    token = _packing.set(True)
    try:
        return copy.deepcopy(module, memo)
    finally:
        _packing.reset(token)


def _unpacked(module: nn.Module, pieces: dict[torch.dtype, Tensor], places: list[_Place]) -> nn.Module:
    for place in places:
        tensor = _view(pieces, place)
        parameter = nn.Parameter(tensor, requires_grad=False) if place.is_parameter else None
        for name in place.names:
            parent, _, leaf = name.rpartition(".")
            holder = module.get_submodule(parent)
            if parameter is None:
                holder._buffers[leaf] = tensor
            else:
                holder._parameters[leaf] = parameter
    return module
