"""Open image files that others made: of a few formats, and no larger than a file of that length may be."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from purifyloader.files.opening import opened

__all__ = ["FORMATS", "opened_image"]

FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
"""Formats of Pillow's that are read, whatever a file is called. Others start programs (EPS) or are seldom looked at."""

# Pixels that a file may have: so many, and so many a byte. (A4 at 600 dpi has 35 million, in a few kB if it is blank.)
# Decoding, converting and copying hold up to 11 bytes a pixel at a time, so a file of 10 MB takes 1 GB at most.
_PIXELS, _PIXELS_A_BYTE, _PIXELS_EVER = 1 << 26, 2, 1 << 28
_SCANS = 256  # of a JPEG, each of which is as much work as the whole image; cameras write 1, encoders about 10


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
            if image.width * image.height > most:
                raise ValueError(
                    f"it declares {image.width:,} x {image.height:,} pixels, more than the {most:,} that are read "
                    f"from a file of {size:,} bytes"
                )
            if image.format in ("JPEG", "MPO") and (scans := _scans(stream)) > _SCANS:
                raise ValueError(f"it is a JPEG of {scans:,} scans, where at most {_SCANS} are read")
            yield image


def _scans(stream: BinaryIO) -> int:
    """Count what may be scans of a JPEG, and put the stream back."""
    before = stream.tell()
    stream.seek(0)
    count = stream.read().count(b"\xff\xda")
    stream.seek(before)
    return count
