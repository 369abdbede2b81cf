"""Share options between recipes: the four for images of any size, which every recipe has, and those of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from purifyloader.errors import ConfigError

if TYPE_CHECKING:
    from purifyloader.purifiers import Purifier

__all__ = ["Network", "NetworkOptions", "SizeOptions", "Sizes"]


class SizeOptions(TypedDict, total=False):
    """The keyword arguments of `Sizes`, as recipes take them: `**sizes: Unpack[SizeOptions]`."""

    resize: int | None
    crop: int | None
    tile: int | None
    overlap: int | None


@dataclass(frozen=True)
class Sizes:
    """Bring images of many or large sizes to what a purifier takes, as the package says; refuse what would be ignored.

    Args:
        resize: bring the shorter side of every image to this many pixels first.
        crop: then cut out the central square of this many pixels.
        tile: purify in square tiles of this many pixels, at full resolution, and blend them.
        overlap: pixels that neighbouring tiles share (default: a quarter of a tile).
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


class NetworkOptions(SizeOptions, total=False):
    """The keyword arguments of `Network`."""

    fast: bool
    compute_batch: int
    compile: bool


class Computing(TypedDict):
    dtype: str
    compute_batch: int
    compile: bool


@dataclass(frozen=True)
class Network(Sizes):
    """How a network is called.

    Args:
        fast: bfloat16 network arithmetic.
        compute_batch: images of every network call; it decides the last bits.
        compile: compile the networks, ten seconds to a minute for each shape of images: for many images of few shapes.
    """

    fast: bool = False
    compute_batch: int = 32
    compile: bool = False

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.fast else "float32"

    @property
    def computing(self) -> Computing:
        """The arguments of a purifier with a network."""
        return {"dtype": self.dtype, "compute_batch": self.compute_batch, "compile": self.compile}
