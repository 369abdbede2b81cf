"""Transforms for the pipelines that training scripts already have."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from purifyloader.transforms.compensation import Compensate
    from purifyloader.transforms.kornia import RandomCompensate, RandomPurify, RandomSqueeze
    from purifyloader.transforms.purification import Purify, Squeeze

__all__ = ["Compensate", "Purify", "RandomCompensate", "RandomPurify", "RandomSqueeze", "Squeeze"]

# kornia takes a second to import, which a torchvision script need not wait for
_ORIGIN = {
    "Compensate": "compensation",
    "Purify": "purification",
    "RandomCompensate": "kornia",
    "RandomPurify": "kornia",
    "RandomSqueeze": "kornia",
    "Squeeze": "purification",
}


def __getattr__(name: str) -> Any:
    if name in _ORIGIN:
        return getattr(importlib.import_module(f"purifyloader.transforms.{_ORIGIN[name]}"), name)
    raise AttributeError(f"module 'purifyloader.transforms' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
