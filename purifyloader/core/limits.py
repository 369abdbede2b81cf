"""Say how large a setting may be: far beyond any honest one, and small enough that a stranger's file costs nothing."""

from __future__ import annotations

__all__ = [
    "COMPUTE_BATCH",
    "NETWORK_BLOCKS",
    "NETWORK_BLOCKS_IN_ALL",
    "NETWORK_LEVELS",
    "NETWORK_WIDTH",
    "STEPS",
    "TILE",
    "TIMESTEPS",
]

COMPUTE_BATCH = 16_384
"""Images of one network call."""

STEPS = 1_000_000
"""Steps of a sampler or a walk, and network calls."""

TIMESTEPS = 1_000_000
"""Timesteps of a noise schedule, which has tables of them."""

TILE = 4096
"""Side of a tile, or the shorter side that images are resized to, in pixels: 200 MB of float32 for a square."""

NETWORK_WIDTH = 65_536
"""Channels of a layer, of an image, heads, and groups of a normalisation."""

NETWORK_LEVELS = 16
"""Resolutions of a U-Net: the lowest is 1/32768 of the image."""

NETWORK_BLOCKS, NETWORK_BLOCKS_IN_ALL = 64, 256
"""Residual blocks of a U-Net on the way down, at each resolution and at all of them."""
