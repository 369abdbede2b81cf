"""Denoisers on disk: the models that ship with the library and the ones you trained."""

from __future__ import annotations

from purifyloader.pretrained.checkpoint import load, save
from purifyloader.pretrained.registry import available

__all__ = ["available", "load", "save"]
