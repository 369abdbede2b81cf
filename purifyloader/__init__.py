"""Train on images you cannot trust: purification of poisoned training sets inside your dataloader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from purifyloader.core.lazy import lazy
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

_MODULES = {
    ".errors": ("PurifyError",),
    ".pretrained": ("pretrained",),
    ".purified.dataset": ("PurifiedDataset",),
    ".purified.filling": ("precompute",),
    ".purified.loader": ("PurifiedLoader",),
    ".purified.plans": ("plans",),
    ".purifiers": ("purifiers",),
    ".recipes": ("recipes",),
    ".transforms": ("transforms",),
}
__getattr__, __dir__ = lazy(__name__, _MODULES)
