"""Take images of any size: the four options that every recipe has, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from purifyloader.errors import ConfigError

if TYPE_CHECKING:
    from purifyloader.purifiers import Purifier

__all__ = ["SizeOptions", "Sizes"]


class SizeOptions(TypedDict, total=False):
    """The keyword arguments of `Sizes`, as recipes take them: `**sizes: Unpack[SizeOptions]`."""

    resize: int | None
    crop: int | None
    tile: int | None
    overlap: int | None


@dataclass(frozen=True)
class Sizes:
    """Bring images of many or large sizes to what a purifier takes; with no option the purifier stays bare.

    A purifier in a chain or in tiles draws from child keys: with any of these options an image gets other noise than
    without, whatever its size.

    Args:
        resize: bring the shorter side of every image to this many pixels first.
        crop: then cut out the central square of this many pixels.
        tile: purify in square tiles of this many pixels, at full resolution, and blend them.
        overlap: pixels that neighbouring tiles share (default: a quarter of a tile).

    Raises:
        ConfigError: an option that would be ignored. Other values are checked by `Resize` and `Tiles`.
    """

    resize: int | None = None
    crop: int | None = None
    tile: int | None = None
    overlap: int | None = None

    def __post_init__(self) -> None:
        if self.crop is not None and self.resize is None:
            raise ConfigError(
                f"crop needs resize, the shorter side before the crop. Got crop={self.crop!r}: give resize= too."
            )
        if self.overlap is not None and self.tile is None:
            raise ConfigError(f"overlap needs tile, the side of a tile. Got overlap={self.overlap!r}: give tile= too.")

    def tiled(self, purifier: Purifier) -> Purifier:
        from purifyloader.purifiers import Tiles

        return purifier if self.tile is None else Tiles(purifier, self.tile, self.overlap)

    def resized(self, purifier: Purifier) -> Purifier:
        from purifyloader.purifiers import Chain, Resize

        return purifier if self.resize is None else Chain(Resize(self.resize, self.crop), purifier)

    def around(self, purifier: Purifier) -> Purifier:
        """The purifier in tiles, after the resize."""
        return self.resized(self.tiled(purifier))
