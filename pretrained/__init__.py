"""Read and write models on disk: those that ship with the library, those you trained, and those of the hub.

A model is a folder: config.json, model.safetensors and README.md, its card. `list()` names those that ship,
`load` reads one, `save` writes one; `purifyloader convert` makes one from a checkpoint that others published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from purifyloader.core.lazy import lazy
from purifyloader.pretrained.registry import available

if TYPE_CHECKING:
    from purifyloader.pretrained.checkpoint import load, save

list = available  # the name in the documentation; `available` is the older one

__all__ = ["available", "list", "load", "save"]


__getattr__, __dir__ = lazy(__name__, {".checkpoint": ("load", "save")})  # names are there without torch
