"""The algebra: what can be done to an image batch to wash a poison out of it, and how to compose it.

A purifier is `purifier(x_BCHW, seeds_B) -> x_BCHW`: frozen, stateless, float32. Images of many sizes go
through `purify_images`; `Resize` and `Tiles` bring them to one. The pixels of an image are a function of
(weights, configuration, seed, image) alone. Kernels pick their arithmetic by batch size, so every network
call is padded to a fixed `compute_batch`; noise is a function of the image's seed (`purifyloader.core.noise`); a
composition gives each stage, repetition and tile a child seed. What must look at the whole dataset is a plan
(`purifyloader.purified.plans`), made once; the purifier that has it is again a function of one image.

Every purifier says itself as JSON (`to_json`) and is built back from it (`from_json`) through a closed
table of names. Plugins add theirs under the entry point group `purifyloader.purifiers`.
"""

from __future__ import annotations

from purifyloader.purifiers.base import KINDS, SCHEMA, Purifier, Resolver, from_config, from_json
from purifyloader.purifiers.composition import Chain, Repeat
from purifyloader.purifiers.energy_above import Condition, EnergyAbove
from purifyloader.purifiers.langevin import Langevin
from purifyloader.purifiers.networks import DenoiseOnce, Diffuse
from purifyloader.purifiers.shapes import Resize, Tiles
from purifyloader.purifiers.squeezing import BitDepth, Coin, Compensation, Grayscale, Jpeg, Squeeze
from purifyloader.purifiers.where import Where

__all__ = [
    "SCHEMA",
    "BitDepth",
    "Chain",
    "Coin",
    "Compensation",
    "Condition",
    "DenoiseOnce",
    "Diffuse",
    "EnergyAbove",
    "Grayscale",
    "Jpeg",
    "Langevin",
    "Purifier",
    "Repeat",
    "Resize",
    "Resolver",
    "Squeeze",
    "Tiles",
    "Where",
    "from_config",
    "from_json",
]

KINDS.update(
    {
        cls.kind: cls
        for cls in (
            BitDepth,
            Chain,
            Coin,
            Compensation,
            DenoiseOnce,
            Diffuse,
            Grayscale,
            Jpeg,
            Langevin,
            Repeat,
            Resize,
            Tiles,
            Where,
        )
    }
)
