"""Datasets by name, folder or tar; their samples, splits and selections."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from purifyloader.datasets.named import ImageFiles, TarDataset, open_dataset, read_image

__all__ = ["ImageFiles", "TarDataset", "open_dataset", "read_image"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # loaded when first used: the names of datasets need no torch
        return getattr(importlib.import_module(f"{__name__}.named"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
