"""Models on disk: those that ship with the library, those you trained, and those of the hub.

A model is a folder: config.json, model.safetensors and README.md, its card. `list()` names those that ship,
`load` reads one, `save` writes one; `purifyloader convert` makes one from a checkpoint that others published.
"""

from __future__ import annotations

from purifyloader.pretrained.checkpoint import load, save
from purifyloader.pretrained.registry import available

list = available  # the name in the documentation; `available` is the older one

__all__ = ["available", "list", "load", "save"]
