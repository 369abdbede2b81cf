"""What every recipe does about images of many or large sizes; see the package."""

from __future__ import annotations

from purifyloader.errors import ConfigError
from purifyloader.purifiers import Chain, Purifier, Resize, Tiles

__all__ = ["check_sizes", "resized", "tiled"]


def check_sizes(resize: int | None, crop: int | None, tile: int | None, overlap: int | None) -> None:
    """Before a model is loaded: an option that would be ignored is an error."""
    if crop is not None and resize is None:
        raise ConfigError(f"crop needs resize, the shorter side before the crop. Got crop={crop!r}: give resize= too.")
    if overlap is not None and tile is None:
        raise ConfigError(f"overlap needs tile, the side of a tile. Got overlap={overlap!r}: give tile= too.")


def tiled(purifier: Purifier, tile: int | None, overlap: int | None) -> Purifier:
    return purifier if tile is None else Tiles(purifier, tile, overlap)


def resized(purifier: Purifier, resize: int | None, crop: int | None) -> Purifier:
    return purifier if resize is None else Chain(Resize(resize, crop), purifier)
