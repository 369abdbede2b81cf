"""Build the published systems, each in a few lines of the algebra of `purifyloader.purifiers`.

A model is a name or folder that `purifyloader.pretrained.load` takes, or a model already loaded. `RECIPES` names all
recipes, those of plugins too. Importing this package does not import torch.

Images of many or large sizes: the options of every recipe are `resize`, `crop`, `tile` and `overlap`, in pixels.

    resize, crop    the shorter side at `resize`, then the central crop x crop, before the purifier (`Resize`)
    tile, overlap   the purifier in squares of `tile` that share `overlap`, then blended (`Tiles`)

Both together resize first. A purifier in a chain or in tiles draws from child keys: with any of these
options an image gets other noise than without, whatever its size. With none the purifier is the bare one.
"""

from __future__ import annotations

from typing import Any

from purifyloader.recipes import denoising, puregen, squeezing
from purifyloader.recipes.denoising import *  # noqa: F403
from purifyloader.recipes.models import from_json
from purifyloader.recipes.puregen import *  # noqa: F403
from purifyloader.recipes.registry import Recipes
from purifyloader.recipes.squeezing import *  # noqa: F403

RECIPES = Recipes(
    {
        name.replace("_", "-"): getattr(module, name)
        for module in (denoising, puregen, squeezing)
        for name in module.__all__
    }
)
"""The functions by name, with dashes, in the order in which people read them; `registry.describe` reads one."""


def __getattr__(name: str) -> Any:
    """Find a plugin's recipe as those of this package are found: `recipes.toy_blur` for "toy-blur"."""
    if (recipe := RECIPES.get(name.replace("_", "-"))) is None or name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return recipe


__all__ = ["RECIPES", "from_json"]
__all__ += denoising.__all__
__all__ += puregen.__all__
__all__ += squeezing.__all__
