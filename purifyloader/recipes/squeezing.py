"""The baselines to try first, which need no model (Liu et al. 2023; Wang et al. 2023)."""

from __future__ import annotations

from purifyloader.purifiers import BitDepth, Coin, Grayscale, Jpeg, Purifier
from purifyloader.recipes.sizes import check_sizes, resized, tiled

__all__ = ["bit_depth", "coin", "grayscale", "jpeg"]


def jpeg(
    quality: int = 10,
    *,
    resize: int | None = None,
    crop: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Purifier:
    """JPEG at quality 10 (ISS-J; Liu et al. 2023): the cheap baseline.

    Args:
        quality: 1 to 100.
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the package.

    Raises:
        InputError: no such quality.
        ConfigError: options that contradict each other.
    """
    check_sizes(resize, crop, tile, overlap)
    return resized(tiled(Jpeg(quality), tile, overlap), resize, crop)


def grayscale(
    *,
    resize: int | None = None,
    crop: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Purifier:
    """The brightness of each pixel in all channels (ISS-G; Liu et al. 2023).

    Args:
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the package.

    Raises:
        ConfigError: options that contradict each other.
    """
    check_sizes(resize, crop, tile, overlap)
    return resized(tiled(Grayscale(), tile, overlap), resize, crop)


def bit_depth(
    bits: int = 2,
    *,
    resize: int | None = None,
    crop: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Purifier:
    """The two highest bits of each channel (ISS-BDR; Liu et al. 2023).

    Args:
        bits: how many, 1 to 8.
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the package.

    Raises:
        InputError: no such number of bits.
        ConfigError: options that contradict each other.
    """
    check_sizes(resize, crop, tile, overlap)
    return resized(tiled(BitDepth(bits), tile, overlap), resize, crop)


def coin(
    alpha: float = 2.0,
    *,
    resize: int | None = None,
    crop: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Purifier:
    """Every pixel moved at random by up to 2 pixels along each side (COIN; Wang et al. 2023, arXiv:2311.18403).

    Args:
        alpha: the furthest that a pixel moves, in pixels.
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the package.

    Raises:
        InputError: no such distance.
        ConfigError: options that contradict each other.
    """
    check_sizes(resize, crop, tile, overlap)
    return resized(tiled(Coin(alpha), tile, overlap), resize, crop)
