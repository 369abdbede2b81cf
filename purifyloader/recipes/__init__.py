"""The published systems, each in a few lines of the algebra of `purifyloader.purifiers`.

A model is a name or folder that `purifyloader.pretrained.load` takes, or a model already loaded.

Images of many or large sizes: every recipe takes `resize`, `crop`, `tile` and `overlap`, in pixels.

    resize, crop    the shorter side at `resize`, then the central crop x crop, before the purifier (`Resize`)
    tile, overlap   the purifier in squares of `tile` that share `overlap`, then blended (`Tiles`)

Both together resize first. A purifier in a chain or in tiles draws from child keys: with any of these
options an image gets other noise than without, whatever its size. With none the purifier is the bare one.
"""

from __future__ import annotations

from purifyloader.recipes.certified import denoise_once
from purifyloader.recipes.eclipse import eclipse
from purifyloader.recipes.models import from_json
from purifyloader.recipes.puregen import puregen_ddpm, puregen_ebm, puregen_filt, puregen_naive, puregen_reps
from purifyloader.recipes.squeezing import bit_depth, coin, grayscale, jpeg

__all__ = [
    "bit_depth",
    "coin",
    "denoise_once",
    "eclipse",
    "from_json",
    "grayscale",
    "jpeg",
    "puregen_ddpm",
    "puregen_ebm",
    "puregen_filt",
    "puregen_naive",
    "puregen_reps",
]
