"""Read and write models on disk: those that ship with the library, those you trained, and those of the hub.

A model is a folder: config.json, model.safetensors and README.md, its card. `list()` names those that ship,
`load` reads one, `save` writes one; `purifyloader convert` makes one from a checkpoint that others published.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from purifyloader.pretrained.registry import available

if TYPE_CHECKING:
    from purifyloader.pretrained.checkpoint import load, save

list = available  # the name in the documentation; `available` is the older one

__all__ = ["available", "list", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in ("load", "save"):  # which import torch; names are there without it
        return getattr(importlib.import_module("purifyloader.pretrained.checkpoint"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
