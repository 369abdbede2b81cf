"""Find out whether images are purified already: washing twice costs twice, and takes detail that training needs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from purifyloader.purified.tensors import HoldsPurifier
from purifyloader.purifiers import Purifier

_DEPTH = 8
_MOST = 20_000  # parts after which no deeper ones are looked at
_FEW = 64  # entries of a list that are looked at; a longer one holds data
_DATA = (str, bytes, int, float, complex, type(None), type, ModuleType, Tensor, np.ndarray, np.generic, Path)


class GivesPurified:
    """Marks a dataset whose images are purified, also where it holds no purifier."""


def purified_by(thing: Any) -> str | None:
    """Name the type of what purifies inside a loader or dataset, or None: a dataset, stage, loader or transform.

    Looks at all attributes of all parts, and at what functions refer to.
    """
    return next(
        (
            type(part).__name__
            for part in parts_of(thing)
            if isinstance(part, GivesPurified) or any(isinstance(value, Purifier) for value in _inside(part))
        ),
        None,
    )


def transform_that_purifies(dataset: Any, transform: Any = None) -> str | None:
    """Name the transform of ours in a dataset, or beside it; the dataset itself may well be one of ours."""
    parts = (*parts_of(transform), *parts_of(dataset))
    return next((type(part).__name__ for part in parts if isinstance(part, HoldsPurifier)), None)


def parts_of(thing: Any) -> Iterator[Any]:
    """Yield an object and what it is made of, each once: attributes, entries, and what functions refer to."""
    seen: set[int] = set()
    level = [thing]
    for _ in range(_DEPTH):
        if len(seen) > _MOST:
            return
        below = []
        for part in level:
            if id(part) not in seen and not isinstance(part, _DATA):
                seen.add(id(part))
                yield part
                below += _inside(part)
        level = below


def _inside(part: Any) -> list[Any]:
    """List what an object holds, but not what it reads through to something else."""
    if isinstance(part, list | tuple | set | frozenset):
        return [*part] if len(part) <= _FEW else []
    if isinstance(part, dict):
        return [*part.values()] if len(part) <= _FEW else []
    if isinstance(part, MethodType):
        return [part.__self__, part.__func__]
    if isinstance(part, functools.partial):
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(part, FunctionType):
        cells = [cell.cell_contents for cell in part.__closure__ or () if not _is_empty(cell)]
        return [*cells, *(part.__globals__[name] for name in part.__code__.co_names if name in part.__globals__)]
    held = [*vars(part).values()] if hasattr(part, "__dict__") else []
    return [*held, part.purifier] if isinstance(part, HoldsPurifier) else held


def _is_empty(cell: CellType) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:  # of a variable that is not yet assigned
        return True
