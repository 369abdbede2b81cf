"""Transforms for the pipelines that training scripts already have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from purifyloader.core.lazy import lazy

if TYPE_CHECKING:
    from purifyloader.transforms.compensation import Compensate
    from purifyloader.transforms.kornia import RandomCompensate, RandomPurify, RandomSqueeze
    from purifyloader.transforms.purification import Purify, Squeeze

__all__ = ["Compensate", "Purify", "RandomCompensate", "RandomPurify", "RandomSqueeze", "Squeeze"]

# kornia takes a second to import, which a torchvision script need not wait for
_MODULES = {
    ".compensation": ("Compensate",),
    ".kornia": ("RandomCompensate", "RandomPurify", "RandomSqueeze"),
    ".purification": ("Purify", "Squeeze"),
}
__getattr__, __dir__ = lazy(__name__, _MODULES)
