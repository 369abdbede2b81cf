"""Open image files that others made: of a few formats, and no larger than a file of that length may be."""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from purifyloader.files.opening import opened

__all__ = ["FORMATS", "opened_image"]

FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
"""Formats of Pillow's that are read, whatever a file is called. Others start programs (EPS) or are seldom looked at."""

# Pixels that a file may have: so many, and so many a byte. (A4 at 600 dpi has 35 million, in a few kB if it is blank.)
# Decoding, converting and copying hold up to 12 bytes a pixel at a time, so a file of 10 MB takes 1 GB at most; of WebP
# they hold 16 (its decoder keeps two canvases), which may have so many pixels the fewer.
_PIXELS, _PIXELS_A_BYTE, _PIXELS_EVER = 1 << 26, 2, 1 << 28
_OF_WEBP = 11 / 16
_SCANS = 256  # of a JPEG; cameras write 1, encoders about 10
_SCANS_OF_LARGEST = 32  # of one with as many pixels as there may be: each scan is as much work as the whole image
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers of a JPEG that no length follows
_END, _SCAN = 0xD9, 0xDA
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323  # tags of a TIFF
_COMPRESSION, _JPEG, _STRIPS, _TILES = 259, 7, (273, 279), (324, 325)  # and where its parts are, and how long
_TAGS = 1 << 16  # of a TIFF at most
_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "B", 8: "H", 9: "I", 16: "Q", 17: "Q"}  # types of a TIFF's integers


@contextmanager
def opened_image(file: Path | BinaryIO, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """Open an image as `PIL.Image.open` does; `ValueError` for one that declares more than its file can hold.

    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from purifyloader.core.decoding import opened_image
    >>> Image.new("RGB", (4, 3)).save("a.png")
    >>> with opened_image(Path("a.png")) as image:
    ...     image.size
    (4, 3)
    """
    with opened(file) if isinstance(file, Path) else nullcontext(file) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        with Image.open(stream, formats=list(formats)) as image:
            most = min(_PIXELS_EVER, _PIXELS + _PIXELS_A_BYTE * size)
            if image.format == "WEBP":
                most = int(most * _OF_WEBP)
            if image.width * image.height > most:
                raise ValueError(
                    f"it declares {image.width:,} x {image.height:,} pixels, more than the {most:,} that are read "
                    f"from a file of {size:,} bytes"
                )
            before = stream.tell()
            if image.format in ("JPEG", "MPO"):
                _check_scans(stream, image.width * image.height, most)
            elif image.format == "TIFF" and image.tile and image.tile[0][0] == "libtiff":
                _check_tiles(stream, image, most)
            stream.seek(before)
            yield image


def _check_scans(stream: BinaryIO, pixels: int, most: int) -> None:
    """Refuse a JPEG whose scans are too many, or too many for its size."""
    stream.seek(0)
    scans = _scans(stream.read())
    fewer = min(_SCANS, _SCANS_OF_LARGEST * most // max(1, pixels))
    if scans > fewer:
        raise ValueError(f"it is a JPEG of {scans:,} scans, where at most {fewer} are read of {pixels:,} pixels")


def _scans(data: bytes) -> int:
    """Count the scans of the first image of a JPEG as its decoder comes by them: what follows its end is not looked at.

    Phones put a video there, or more images.
    """
    count, at = 0, 2
    while (found := _MARKER.search(data, at)) is not None:
        kind, at = found[1][0], found.end()
        if kind == _END:
            break
        count += kind == _SCAN
        if kind not in _ALONE:
            at += int.from_bytes(data[at : at + 2], "big")
    return count


def _check_tiles(stream: BinaryIO, image: Any, most: int) -> None:
    """Refuse a compressed TIFF of many scans, or whose tiles are far larger than its image: they are unpacked whole."""
    sides = _sides(stream, image.tag_v2.offset)
    width, height = max(1, sides[_WIDTH]), max(1, sides[_HEIGHT])
    across, down = max(1, sides.get(_TILE_WIDTH, width)), max(1, sides.get(_TILE_HEIGHT, height))
    covered = math.ceil(width / across) * across * math.ceil(height / down) * down
    # at one time there are a tile of 8 bytes a pixel at most, and the image of 4
    if 2 * across * down + width * height > 3 * most or covered > 2 * most:
        raise ValueError(f"it has {width:,} x {height:,} pixels in tiles of {across:,} x {down:,}, which are too large")
    if image.tag_v2.get(_COMPRESSION) == _JPEG:
        tags = image.tag_v2
        if sum(tag in tags for tag in (*_TILES, *_STRIPS)) > 2:
            raise ValueError("it is a TIFF that has both tiles and strips")
        starts, lengths = (tags.get(_TILES[n], ()) or tags.get(_STRIPS[n], ()) for n in (0, 1))
        places = set(zip(starts, lengths, strict=True))
        size = stream.seek(0, os.SEEK_END)
        if sum(length for _, length in places) > size:
            raise ValueError("it is a TIFF whose parts overlap")
        for start, length in places:
            stream.seek(start)
            if (scans := _scans(stream.read(length))) * covered > _SCANS_OF_LARGEST * most:
                raise ValueError(f"it is a TIFF of {covered:,} pixels, in JPEG of {scans:,} scans, which are too many")


def _sides(stream: BinaryIO, offset: int) -> dict[int, int]:
    """Read the sides of a TIFF's image and tiles as libtiff does, the largest of each: Pillow takes another of two."""
    stream.seek(0)
    head = stream.read(4)
    order = "<" if head[:2] == b"II" else ">"
    (version,) = struct.unpack(f"{order}H", head[2:])
    counting, entry, room = ("Q", "HHQ8s", 8) if version == 43 else ("H", "HHI4s", 4)
    stream.seek(offset)
    (count,) = struct.unpack(order + counting, stream.read(struct.calcsize(order + counting)))
    length = struct.calcsize(order + entry)
    entries = stream.read(min(count, _TAGS) * length)
    sides: dict[int, int] = {}
    seen: set[int] = set()
    for tag, kind, number, value in struct.iter_unpack(order + entry, entries[: len(entries) // length * length]):
        if tag in seen and tag in (_COMPRESSION, *_STRIPS, *_TILES):
            raise ValueError(f"it is a TIFF that has its tag {tag} twice")
        seen.add(tag)
        if tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT):
            form = order + _NUMBERS.get(kind, "100s")
            if number != 1 or struct.calcsize(form) > room:
                raise ValueError(f"its tag {tag} is not one integer")
            sides[tag] = max(sides.get(tag, 0), *struct.unpack_from(form, value))
    if not {_WIDTH, _HEIGHT} <= sides.keys():
        raise ValueError("it is a TIFF without a width and a height")
    return sides
