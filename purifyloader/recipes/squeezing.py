"""The baselines to try first, which need no model (Liu et al. 2023; Wang et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from purifyloader.recipes.registry import Row, recipe
from purifyloader.recipes.sizes import SizeOptions, Sizes

if TYPE_CHECKING:
    from purifyloader.purifiers import Purifier

__all__ = ["jpeg", "grayscale", "bit_depth", "coin"]


@recipe(Row("jpeg-10", "JPEG at quality 10 (ISS-J)"), Row("jpeg-75", "JPEG at quality 75", {"quality": 75}))
def jpeg(quality: int = 10, **options: Unpack[SizeOptions]) -> Purifier:
    """Compress as JPEG at quality 10 (ISS-J; Liu et al. 2023): the cheap baseline.

    Args:
        quality: of the compression, 1 to 100.
        options: see `purifyloader.recipes`.

    >>> from purifyloader import recipes
    >>> recipes.jpeg(quality=30).to_json()
    '{"purifier":{"kind":"jpeg","quality":30},"schema":2}'
    """
    from purifyloader.purifiers import Jpeg

    return Sizes(**options).around(Jpeg(quality))


@recipe(Row("grayscale", "grey for every image (ISS-G)"))
def grayscale(**options: Unpack[SizeOptions]) -> Purifier:
    """Put the brightness of each pixel into all channels (ISS-G; Liu et al. 2023).

    Args:
        options: see `purifyloader.recipes`.

    >>> from purifyloader import recipes
    >>> recipes.grayscale().config()
    {'kind': 'grayscale'}
    """
    from purifyloader.purifiers import Grayscale

    return Sizes(**options).around(Grayscale())


@recipe(Row("bit-depth", "2 bits a channel"))
def bit_depth(bits: int = 2, **options: Unpack[SizeOptions]) -> Purifier:
    """Keep the two highest bits of each channel (ISS-BDR; Liu et al. 2023).

    Args:
        bits: of each channel that are kept, 1 to 8.
        options: see `purifyloader.recipes`.

    >>> from purifyloader import recipes
    >>> recipes.bit_depth().config()
    {'kind': 'bit-depth', 'bits': 2}
    """
    from purifyloader.purifiers import BitDepth

    return Sizes(**options).around(BitDepth(bits))


@recipe(
    Row("coin", "COIN: pixels moved at random by interpolation"),
    Row("coin-afresh", "the same anew in every epoch, as published", per_epoch=True),
)
def coin(alpha: float = 2.0, **options: Unpack[SizeOptions]) -> Purifier:
    """Move every pixel at random by up to 2 pixels along each side (COIN; Wang et al. 2023, arXiv:2311.18403).

    Args:
        alpha: the furthest that a pixel moves along each side, in pixels.
        options: see `purifyloader.recipes`.

    >>> from purifyloader import recipes
    >>> recipes.coin().config()
    {'kind': 'coin', 'alpha': 2.0}
    """
    from purifyloader.purifiers import Coin

    return Sizes(**options).around(Coin(alpha))
