"""How much two caches differ: in configuration, in what they were made from, and in pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from purifyloader.cache import format as fmt
from purifyloader.cache.reader import CacheReader
from purifyloader.errors import CacheError, InputError
from purifyloader.files.atomic import replacing

__all__ = ["Comparison", "compare", "picture"]

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_ALL = 1_000_000  # lines: more than any configuration has


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Levels are of 0 to 255; the second cache minus the first.

    Attributes:
        same_fingerprint: made by the same configuration from the same source on the same kind of device.
        differences: of what the fingerprints are taken of, a line each: "config.seed: 0 → 1".
        samples: of each cache.
        compared: samples that both have: the first ones, index by index.
        sources_differ: of these, how many were made from different images; None where a cache does not say.
        targets_differ: and how many from different targets.
        sizes_differ: of these, how many have different shapes in the two; all below is of the others.
        identical: share of images that are the same in every pixel; None where no image could be compared,
            here and below.
        pixels_changed: share of pixels that differ in at least one channel.
        mean_abs: mean absolute difference, in levels, over all channels.
        max_abs: largest difference, in levels.
        psnr: over all pixels together, in dB; None also where all are the same.
        mean_difference: mean signed difference of each channel, in levels, by the mode of the images.
        most_different: the index with the largest mean squared difference; None where all are the same.
    """

    same_fingerprint: bool
    differences: tuple[str, ...]
    samples: tuple[int, int]
    compared: int
    sources_differ: int | None
    targets_differ: int | None
    sizes_differ: int
    identical: float | None
    pixels_changed: float | None
    mean_abs: float | None
    max_abs: int | None
    psnr: float | None
    mean_difference: dict[str, list[float]]
    most_different: int | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


class _Sums:
    """Exact integers, over images of equal size."""

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
    """Compare two caches, sample by sample; holds one image of each.

    Args:
        draw: which draw, of both.
        seen: told how many samples more are compared.

    Raises:
        InputError: a cache has no such draw.
        CacheError: an image is damaged.
    """
    _check_draw(a, b, draw)
    compared = min(len(a), len(b))
    sources = targets = None
    hashes = a.source_hashes(), b.source_hashes()
    if hashes[0] is not None and hashes[1] is not None:
        sources, targets = (int(n) for n in (hashes[0][:compared] != hashes[1][:compared]).sum(axis=0))
    sums = _Sums()
    for index in range(compared):
        ours, theirs = a.row(index, draw), b.row(index, draw)
        if ours.shape == theirs.shape:
            sums.add(index, ours, theirs)
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


def _check_draw(a: CacheReader, b: CacheReader, draw: int) -> None:
    draws = min(a.draws, b.draws)
    if not isinstance(draw, int) or isinstance(draw, bool) or not 0 <= draw < draws:
        raise InputError(f"draw must be from 0 to {draws - 1}, which both caches have. Got {draw!r}.")


# -- the picture -------------------------------------------------------------------------------------

_CELL = 96  # pixels that the longer side of an image is shown at, or more
_CUT = 384  # of images larger than this the centre is shown: a residual cannot be shrunk and stay true
_GAP, _MARGIN, _LABEL = 8, 16, 52
_PAPER, _INK, _FAINT = (255, 255, 255), (32, 32, 32), (128, 128, 128)


def picture(
    a: CacheReader,
    b: CacheReader,
    path: str | Path,
    images: int = 8,
    gain: float | None = None,
    *,
    most_different: int | None = None,
    draw: int = 0,
    names: tuple[str, str] = ("A", "B"),
) -> Path:
    """A PNG with example images of two caches, a row each: A, B, and the residual B - A around mid-grey.

    Small images are enlarged without smoothing; of images larger than 384 pixels the centre is shown. Alpha is
    left out.

    Args:
        images: rows, evenly spread over the samples that both have.
        gain: of the residual. None takes a power of two by which nearly all of what is shown fits.
        most_different: index of one row more, see `Comparison`.
        names: over the first two columns.

    Returns:
        `path`.

    Raises:
        InputError: no such number of images, gain, index or draw, or a path inside a cache.
        CacheError: the file cannot be written.
    """
    _check_draw(a, b, draw)
    length = min(len(a), len(b))
    if not isinstance(images, int) or isinstance(images, bool) or images < 1:
        raise InputError(f"images must be a positive integer. Got {images!r}.")
    if gain is not None and not (math.isfinite(gain) and gain > 0):
        raise InputError(f"gain must be a positive number, or None. Got {gain!r}.")
    if most_different is not None and not 0 <= most_different < length:
        raise InputError(f"most_different must be an index from 0 to {length - 1}. Got {most_different!r}.")
    path = Path(path).absolute()
    if any(path.resolve().is_relative_to(cache.folder.resolve()) for cache in (a, b)):
        raise InputError(f"A picture lies outside the caches, which hold nothing else. Got {path}: give another path.")
    spread = np.linspace(0, length - 1, min(images, length)).round().astype(int).tolist()
    if most_different is not None:
        spread = [i for i in spread if i != most_different] + [most_different]
    pairs = [(_colours(a.row(i, draw)), _colours(b.row(i, draw))) for i in spread]
    if gain is None:
        gain = _fitting([y - x for x, y in pairs if x.shape == y.shape])
    rows = [_row(x, y, gain) for x, y in pairs]
    labels = [(f"{i}", "most\ndifferent" if i == most_different else "") for i in spread]
    sheet = _sheet(rows, labels, (_short(names[0]), _short(names[1]), f"(B - A) x {gain:g}"))
    try:
        with replacing(path) as temporary:
            sheet.save(temporary, "PNG")
    except OSError as error:
        raise CacheError(f"Could not write {path}. Got: {error}. Give a path that can be written to.") from error
    return path


def _colours(image_HWC: NDArray[np.uint8]) -> NDArray[np.int16]:
    """RGB of the part of an image that is shown."""
    height, width, channels = image_HWC.shape
    top, left = max(0, height - _CUT) // 2, max(0, width - _CUT) // 2
    shown = image_HWC[top : top + _CUT, left : left + _CUT]
    shown = shown[:, :, :1].repeat(3, axis=2) if channels < 3 else shown[:, :, :3]
    return shown.astype(np.int16)


def _fitting(residuals: Sequence[NDArray[np.int16]]) -> float:
    """The largest power of two, up to 32, by which 99 % of all values stay within mid-grey ± 127."""
    if not residuals:
        return 1
    high = np.percentile(np.concatenate([np.abs(r).ravel() for r in residuals]), 99)
    return 2.0 ** max(0, min(5, math.floor(math.log2(127 / max(float(high), 1)))))


def _row(a: NDArray[np.int16], b: NDArray[np.int16], gain: float) -> list[Image.Image | str]:
    if a.shape == b.shape:
        third: Image.Image | str = _shown(128 + gain * (b - a).astype(np.float32))
    else:
        third = "sizes differ:\n" + "\n".join(f"{x.shape[1]} x {x.shape[0]}" for x in (a, b))
    return [_shown(a), _shown(b), third]


def _shown(image_HWC: NDArray[Any]) -> Image.Image:
    picture = Image.fromarray(image_HWC.round().clip(0, 255).astype(np.uint8))
    scale = math.ceil(_CELL / max(picture.size))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


# In what is drawn only ASCII: Pillow's own font has no minus or multiplication sign.
def _sheet(
    rows: Sequence[Sequence[Image.Image | str]], labels: Sequence[tuple[str, str]], captions: Sequence[str]
) -> Image.Image:
    font = ImageFont.load_default(14)
    small = ImageFont.load_default(11)
    sizes = [[(_CELL, _CELL) if isinstance(cell, str) else cell.size for cell in row] for row in rows]
    widths = [max(_CELL, *(width for width, _ in column)) for column in zip(*sizes, strict=True)]
    heights = [max(_CELL, *(height for _, height in row)) for row in sizes]
    lefts = np.cumsum([_MARGIN + _LABEL, *(width + _GAP for width in widths)]).tolist()
    tops = np.cumsum([_MARGIN + 24, *(height + _GAP for height in heights)]).tolist()
    sheet = Image.new("RGB", (lefts[-1] - _GAP + _MARGIN, tops[-1] - _GAP + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for caption, left, width in zip(captions, lefts, widths, strict=False):
        draw.text((left + width / 2, tops[0] - 8), caption, _INK, font, anchor="ms")
    for row, (label, remark), top, height in zip(rows, labels, tops, heights, strict=False):
        draw.text((lefts[0] - _GAP, top + height / 2), label, _INK, font, anchor="rm")
        if remark:
            draw.multiline_text((lefts[0] - _GAP, top + height / 2 + 10), remark, _FAINT, small, "ra", align="right")
        for cell, left, width in zip(row, lefts, widths, strict=False):
            if isinstance(cell, str):
                middle = (left + width / 2, top + height / 2)
                draw.multiline_text(middle, cell, _FAINT, small, anchor="mm", align="center")
            else:
                sheet.paste(cell, (left + (width - cell.width) // 2, top + (height - cell.height) // 2))
    return sheet


def _short(name: str, limit: int = 14) -> str:
    return name if len(name) <= limit else name[: limit - 2] + ".."
