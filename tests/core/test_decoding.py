"""Image files that others made: a few formats, and no more pixels than a file of that length may have."""

from __future__ import annotations

import io
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from purifyloader.core import decoding
from purifyloader.core.decoding import FORMATS, opened_image
from purifyloader.datasets.named import ImageFiles, read_image
from purifyloader.errors import InputError

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def png(width: int, height: int, mode: int = 2) -> bytes:
    """A PNG that declares a size and holds a few rows of black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * width) * 4)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_that_people_have_are_read_whatever_the_file_is_called(tmp_path: Path, kind: str) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8))
    picture.save(tmp_path / "a.png", kind)
    assert read_image(tmp_path / "a.png").size == (6, 8)


def test_a_photograph_of_a_phone_is_read(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), (250, 0, 0))
    picture.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[picture])
    assert read_image(tmp_path / "a.jpg").size == (8, 8)


@pytest.mark.parametrize("name", ["0.png", "0.jpg", "0.tiff"])
def test_a_file_of_postscript_starts_no_program(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    (tmp_path / name).write_bytes(POSTSCRIPT)
    with pytest.raises(InputError, match=rf"{name} is no readable image"):
        ImageFiles(tmp_path)[0]


@pytest.mark.parametrize("kind", ["PDF", "ICO", "PCX", "TGA", "SGI", "JPEG2000"])
def test_formats_that_are_not_of_the_list_are_refused(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", kind)
    with pytest.raises(InputError, match=r"a\.png is no readable image"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(70_000, 1_000), (8_193, 8_193), (2, 40_000_000)])
def test_a_declared_size_is_no_reason_to_take_memory(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(png(*size))
    with pytest.raises(InputError, match=rf"a.png is no readable image .*{size[0]:,} x {size[1]:,} pixels"):
        read_image(tmp_path / "a.png")


def test_a_longer_file_may_have_more_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_PIXELS", 100)
    with pytest.raises(ValueError, match="40 x 30 pixels"), opened_image(io.BytesIO(png(40, 30))):
        pass
    picture = Image.new("RGB", (40, 30))
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * 1000)
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=info)
    with opened_image(file) as image:
        assert np.asarray(image).shape == (30, 40, 3)


def test_a_jpeg_of_many_scans_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data.rindex(b"\xff\xda")
    for count, fine in ((100, True), (1000, False)):
        (tmp_path / "a.jpg").write_bytes(data[:scan] + count * data[scan:-2] + data[-2:])
        if fine:
            assert read_image(tmp_path / "a.jpg").size == (64, 64)
        else:
            with pytest.raises(InputError, match=r"a JPEG of 1,0\d\d scans"):
                read_image(tmp_path / "a.jpg")
