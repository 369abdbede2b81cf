"""Compare two caches: their configurations, their sources, and their pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.cache import format as fmt
from purifyloader.cache.reader import CacheReader
from purifyloader.core.checks import check_integer
from purifyloader.errors import InputError

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_ALL = 1_000_000  # lines: more than any configuration has


@dataclass(frozen=True)
class Comparison:
    """The differences of two caches. Levels are of 0 to 255, the second cache minus the first.

    Figures of pixels are over samples of equal size, and None where there are none of these.
    """

    same_fingerprint: bool  # made by one configuration from one source on one kind of device
    differences: tuple[str, ...]  # of what the fingerprints are taken of, a line each: "config.seed: 0 → 1"
    samples: tuple[int, int]  # of each cache
    compared: int  # samples that both have: the first ones, index by index
    sources_differ: int | None  # of these, made from different images; None where a cache does not say
    targets_differ: int | None  # and from different targets
    plans_differ: bool  # planned otherwise, or with other suspects or corrected labels
    sizes_differ: int  # of those compared, how many have different shapes in the two
    identical: float | None  # share of images that are the same in every pixel
    pixels_changed: float | None  # share of pixels that differ in at least one channel
    mean_abs: float | None  # mean absolute difference, in levels, over all channels
    max_abs: int | None  # largest difference, in levels
    psnr: float | None  # over all pixels together, in dB; None also where all are the same
    mean_difference: dict[str, list[float]]  # signed, of each channel, in levels, by the mode of the images
    most_different: int | None  # index with the largest mean squared difference; None where all are the same

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def in_words(self) -> Iterator[str]:
        """Yield the lines of `purifyloader cache compare`."""
        if self.same_fingerprint:
            yield "made alike: the fingerprints are the same"
        else:
            yield "made differently (A → B):"
            yield from (f"  {line}" for line in self.differences)
        a, b = self.samples
        rest = "" if a == b else f" and {b:,}, of which the first {self.compared:,} compared"
        yield f"samples: {a:,}{rest}"
        if self.sources_differ is None:
            yield "sources: not known to both caches"
        else:
            yield f"made from other images: {self.sources_differ:,}; with other targets: {self.targets_differ:,}"
        if self.plans_differ:
            yield "planned or sanitized differently: see purifyloader cache info of each"
        if self.sizes_differ:
            yield f"of different sizes, and not compared: {self.sizes_differ:,}"
        if self.identical is None:
            return
        # counted, because 99.999 % would read as all
        alike = self.compared - self.sizes_differ
        yield f"identical images: {round(self.identical * alike):,} of {alike:,}"
        assert self.pixels_changed is not None
        yield f"pixels changed: {100 * self.pixels_changed:.4g} %"
        yield f"difference (levels of 255): mean {self.mean_abs:.3f}, largest {self.max_abs}"
        yield "PSNR: " + ("infinite" if self.psnr is None else f"{self.psnr:.2f} dB")
        for mode, means in self.mean_difference.items():
            yield f"mean of B - A, {mode}: " + ", ".join(f"{mean:+.3f}" for mean in means)
        if self.most_different is not None:
            yield f"most different: image {self.most_different}"


class _Sums:
    def __init__(self) -> None:
        self.images = self.identical = self.pixels = self.changed = 0
        self.values = self.absolute = self.squared = self.largest = 0
        self.signed: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self.worst: tuple[float, int] | None = None

    def add(self, index: int, a_HWC: NDArray[np.uint8], b_HWC: NDArray[np.uint8]) -> None:
        height, width, channels = a_HWC.shape
        self.images += 1
        self.pixels += height * width
        self.values += a_HWC.size
        count, signed = self.signed.get(channels, (0, np.zeros(channels, np.int64)))
        if np.array_equal(a_HWC, b_HWC):
            self.identical += 1
        else:
            difference = b_HWC.astype(np.int32) - a_HWC
            squared = int((difference * difference).sum(dtype=np.int64))
            self.changed += int(np.count_nonzero(difference.any(axis=2)))
            self.absolute += int(np.abs(difference).sum(dtype=np.int64))
            self.squared += squared
            self.largest = max(self.largest, int(difference.max()), -int(difference.min()))
            signed = signed + difference.sum(axis=(0, 1), dtype=np.int64)
            if self.worst is None or squared / a_HWC.size > self.worst[0]:
                self.worst = squared / a_HWC.size, index
        self.signed[channels] = count + height * width, signed


def compare(
    a: CacheReader, b: CacheReader, *, draw: int = 0, seen: Callable[[int], object] = lambda count: None
) -> Comparison:
    """Compare a draw of two caches, sample by sample; holds one image of each.

    `seen` is called with how many samples more are compared. Raises `InputError` where a cache has no such draw,
    `CacheError` where an image is damaged.
    """
    draws = min(a.draws, b.draws)
    check_integer("draw", draw, 0, draws - 1, unit="which both caches have", error=InputError)
    compared = min(len(a), len(b))
    sources = targets = None
    hashes = a.source_hashes(), b.source_hashes()
    if hashes[0] is not None and hashes[1] is not None:
        sources, targets = (int(n) for n in (hashes[0][:compared] != hashes[1][:compared]).sum(axis=0))
    sums = _Sums()
    for index in range(compared):
        row_a, row_b = a.row(index, draw), b.row(index, draw)
        if row_a.shape == row_b.shape:
            sums.add(index, row_a, row_b)
        seen(1)
    some = sums.images > 0
    lines = fmt.differences(a.identity, b.identity, limit=_ALL)
    return Comparison(
        same_fingerprint=a.fingerprint == b.fingerprint,
        differences=tuple(line.strip() for line in lines.splitlines()),
        samples=(len(a), len(b)),
        compared=compared,
        sources_differ=sources,
        targets_differ=targets,
        plans_differ=(a.plan or {}).get(fmt.WHERE) != (b.plan or {}).get(fmt.WHERE),
        sizes_differ=compared - sums.images,
        identical=sums.identical / sums.images if some else None,
        pixels_changed=sums.changed / sums.pixels if some else None,
        mean_abs=sums.absolute / sums.values if some else None,
        max_abs=sums.largest if some else None,
        psnr=10 * math.log10(255**2 * sums.values / sums.squared) if sums.squared else None,
        mean_difference={
            _MODES[channels]: (signed / count).tolist() for channels, (count, signed) in sorted(sums.signed.items())
        },
        most_different=None if sums.worst is None else sums.worst[1],
    )
