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

from purifyloader.purifiers import composition, energy_above, langevin, networks, squeezing
from purifyloader.purifiers.base import (
    CONDITIONS,
    KINDS,
    SCHEMA,
    Condition,
    Purifier,
    Resolver,
    from_config,
    from_json,
)
from purifyloader.purifiers.composition import *  # noqa: F403
from purifyloader.purifiers.energy_above import *  # noqa: F403
from purifyloader.purifiers.langevin import *  # noqa: F403
from purifyloader.purifiers.networks import *  # noqa: F403
from purifyloader.purifiers.squeezing import *  # noqa: F403

__all__ = ["SCHEMA", "Condition", "Purifier", "Resolver", "from_config", "from_json"]
__all__ += composition.__all__
__all__ += energy_above.__all__
__all__ += langevin.__all__
__all__ += networks.__all__
__all__ += squeezing.__all__

_classes = [value for value in map(globals().get, __all__) if isinstance(value, type)]
KINDS.update({cls.kind: cls for cls in _classes if issubclass(cls, Purifier) and "kind" in vars(cls)})
CONDITIONS.update({cls.kind: cls for cls in _classes if issubclass(cls, Condition) and "kind" in vars(cls)})
