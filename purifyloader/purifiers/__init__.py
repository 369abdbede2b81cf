"""Wash a poison out of a batch of images: the purifiers, and how to compose them.

A purifier is `purifier(x_BCHW, seeds_B) -> x_BCHW`: frozen, stateless, float32. Images of many sizes go through
`purify_images`; `Resize` and `Tiles` bring them to one. The pixels of an image are a function of (weights,
configuration, seed, image) alone: every network call is padded to a fixed `compute_batch`, since kernels pick their
arithmetic by batch size; noise is a function of the image's seed (`purifyloader.core.noise`); a composition gives each
stage, repetition and tile a child seed. A statement about the whole dataset is made once, by a plan
(`purifyloader.purified.plans`); the purifier that has it is again a function of one image.

`to_json` describes a purifier and `from_json` builds it back through a closed table of names. Plugins add theirs under
the entry point group `purifyloader.purifiers`: the README of this folder shows one.
"""

from __future__ import annotations

from purifyloader.purifiers.base import CONDITIONS, KINDS, SCHEMA, Condition, Purifier, Resolver, from_config, from_json
from purifyloader.purifiers.composition import Chain, Repeat, Resize, Tiles, Where
from purifyloader.purifiers.energy_above import EnergyAbove
from purifyloader.purifiers.langevin import Langevin
from purifyloader.purifiers.networks import DenoiseOnce, Diffuse
from purifyloader.purifiers.squeezing import BitDepth, Coin, Compensation, Grayscale, Jpeg, Squeeze

__all__ = ["BitDepth", "Chain", "Coin", "Compensation", "Condition", "DenoiseOnce", "Diffuse", "EnergyAbove"]
__all__ += ["Grayscale", "Jpeg", "Langevin", "Purifier", "Repeat", "Resize", "Resolver", "SCHEMA", "Squeeze", "Tiles"]
__all__ += ["Where", "from_config", "from_json"]

_classes = [value for value in map(globals().get, __all__) if isinstance(value, type)]
KINDS.update({cls.kind: cls for cls in _classes if issubclass(cls, Purifier) and "kind" in vars(cls)})
CONDITIONS.update({cls.kind: cls for cls in _classes if issubclass(cls, Condition) and "kind" in vars(cls)})
