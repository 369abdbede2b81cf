"""Find out whether images are purified already: washing twice costs twice, and takes detail that training needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from purifyloader.purified.tensors import HoldsPurifier
from purifyloader.purifiers import Purifier

# Where loaders, datasets and transforms keep what they are made of.
_INSIDE = ("loader", "dataset", "datasets", "pipeline", "source", "base_dataloader", "transform", "transforms")
_DEPTH = 8


class GivesPurified:
    """Marks a dataset whose images are purified, also where it holds no purifier."""


def purified_by(thing: Any) -> str | None:
    """Name the type of what purifies inside a loader or dataset, or None: a dataset, stage, loader or transform.

    Looks where torch, torchvision, webdataset, accelerate and timm keep their parts, not into the user's functions.
    """
    return next(
        (
            type(part).__name__
            for part in _parts(thing, _DEPTH)
            if isinstance(part, GivesPurified) or isinstance(_own(part, "purifier"), Purifier)
        ),
        None,
    )


def transform_that_purifies(dataset: Any, transform: Any = None) -> str | None:
    """Name the transform of ours in a dataset, or beside it; the dataset itself may well be one of ours."""
    parts = (*_parts(transform, _DEPTH), *_parts(dataset, _DEPTH))
    return next((type(part).__name__ for part in parts if isinstance(part, HoldsPurifier)), None)


def _own(part: Any, name: str) -> Any:
    # not what a wrapper reads through to something else
    value = getattr(part, "__dict__", {}).get(name)
    return getattr(part, name) if value is None and isinstance(getattr(type(part), name, None), property) else value


def _parts(thing: Any, depth: int) -> Iterator[Any]:
    yield thing
    if depth == 0:
        return
    inside = thing if isinstance(thing, list | tuple) else [_own(thing, name) for name in _INSIDE]
    for part in inside:
        if part is not None and not isinstance(part, str | bytes):
            yield from _parts(part, depth - 1)
