"""Train on images you cannot trust: purification of poisoned training sets inside your dataloader."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from purifyloader.core.version import __version__ as __version__

if TYPE_CHECKING:
    from purifyloader import pretrained, purifiers, recipes, transforms
    from purifyloader.errors import PurifyError
    from purifyloader.purified import plans
    from purifyloader.purified.dataset import PurifiedDataset
    from purifyloader.purified.filling import precompute
    from purifyloader.purified.loader import PurifiedLoader

__all__ = [
    "PurifiedDataset",
    "PurifiedLoader",
    "PurifyError",
    "plans",
    "precompute",
    "pretrained",
    "purifiers",
    "recipes",
    "transforms",
]

# torch and torchvision take seconds to import: each name is loaded when it is first used.
_ORIGIN = {
    "PurifiedDataset": "purifyloader.purified.dataset",
    "PurifiedLoader": "purifyloader.purified.loader",
    "PurifyError": "purifyloader.errors",
    "precompute": "purifyloader.purified.filling",
}


def __getattr__(name: str) -> Any:
    if name in _ORIGIN:
        return getattr(importlib.import_module(_ORIGIN[name]), name)
    if name in __all__:
        return importlib.import_module("purifyloader.purified.plans" if name == "plans" else f"purifyloader.{name}")
    raise AttributeError(f"module 'purifyloader' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
