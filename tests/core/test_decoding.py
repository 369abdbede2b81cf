"""Image files that others made: a few formats, and no more pixels than a file of that length may have."""

from __future__ import annotations

import contextlib
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


def progressive(side: int, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, "JPEG", progressive=True)
    return file.getvalue()


def many_scans(data: bytes, count: int) -> bytes:
    """A JPEG with its last scan so often."""
    scan = data.rindex(b"\xff\xda")
    return data[:scan] + count * data[scan:-2] + data[-2:]


def test_a_jpeg_of_many_scans_is_refused(tmp_path: Path) -> None:
    data = progressive(64)
    for count, fine in ((100, True), (1000, False)):
        (tmp_path / "a.jpg").write_bytes(many_scans(data, count))
        if fine:
            assert read_image(tmp_path / "a.jpg").size == (64, 64)
        else:
            with pytest.raises(InputError, match=r"a JPEG of 1,0\d\d scans"):
                read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("side", "scans", "fine"), [(64, 80, True), (256, 100, False), (256, 18, True), (300, 60, False)]
)
def test_a_large_jpeg_has_fewer_scans(side: int, scans: int, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_PIXELS", 90_000)
    data = many_scans(progressive(side), scans)
    for file in (data, tiff(side, side, data, compression=7)):
        monkeypatch.setattr(decoding, "_PIXELS_A_BYTE", 0)
        with contextlib.nullcontext() if fine else pytest.raises(ValueError, match=r"\d scans"), opening(file) as image:
            assert np.asarray(image).shape == (side, side)


@pytest.mark.parametrize(
    "behind",
    [b"\xff\xda" * 300, b"\0" * 1000 + many_scans(progressive(8), 300), progressive(8), b"\xff\xd9\xff\xda" * 300],
)
@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_what_follows_the_end_of_a_jpeg_is_not_counted(behind: bytes, kind: str) -> None:
    picture, file = Image.new("RGB", (8, 8), (250, 0, 0)), io.BytesIO()
    picture.save(file, kind, **({"save_all": True, "append_images": [picture]} if kind == "MPO" else {}))
    with opening(file.getvalue() + behind) as image:
        assert np.asarray(image).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "inside",
    [
        b"\xff\xfe\0\4\xff\xd9",
        b"\xff\xff\xfe\0\4\xff\xd9",
        b"\xff\xec\0\6\xff\xd8\xff\xd9",
        b"\xff\0\xff\xfe\0\4\xff\xd9",
    ],
)
def test_an_end_inside_a_segment_is_none(inside: bytes) -> None:
    data = many_scans(progressive(8), 300)
    first = data.index(b"\xff\xda")
    with pytest.raises(ValueError, match=r"a JPEG of 3\d\d scans"), opening(data[:first] + inside + data[first:]):
        pass


def opening(data: bytes) -> contextlib.AbstractContextManager[Image.Image]:
    return opened_image(io.BytesIO(data))


def tiff(
    width: int, height: int, data: bytes, *more: tuple[int, int], compression: int = 8, big: bool = False
) -> bytes:
    """A grey TIFF of one part, with more tags, each an integer of 32 bits."""
    first = 16 if big else 8
    tags = [(256, width), (257, height), (258, 8), (259, compression), (262, 1), (277, 1), *more]
    if 322 in dict(more):
        tags += [(324, first), (325, len(data))]
    else:
        tags += [(273, first), (278, height), (279, len(data))]
    layout, counting = ("<HHQQ", "<Q") if big else ("<HHII", "<H")
    entries = b"".join(struct.pack(layout, tag, 4, 1, value) for tag, value in sorted(tags, key=lambda tag: tag[0]))
    at = first + len(data)
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, at) if big else struct.pack("<2sHI", b"II", 42, at)
    return head + data + struct.pack(counting, len(tags)) + entries + bytes(8)


GREY = zlib.compress(bytes(64 * 64))


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    "tags",
    [
        [(322, 25_008), (323, 25_008)],
        [(322, 2**24), (323, 16)],
        [(322, 16), (323, 2**28)],
        [(322, 2**20), (323, 2**20)],
        [(322, 25_008), (322, 64), (323, 25_008), (323, 64)],
        [(322, 64), (322, 25_008), (323, 64), (323, 25_008)],
        [(256, 2**30)],
    ],
)
def test_a_tile_far_larger_than_its_image_is_refused(tags: list[tuple[int, int]], big: bool) -> None:
    with pytest.raises(ValueError, match=r"tiles of|pixels"), opening(tiff(16, 16, GREY, *tags, big=big)):
        pass


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (64, 64), (1, 60)])
def test_a_tile_somewhat_larger_is_read(size: tuple[int, int], big: bool) -> None:
    with opening(tiff(*size, GREY, (322, 64), (323, 64), big=big)) as image:
        assert np.asarray(image).shape == size[::-1]


@pytest.mark.parametrize(("side", "fine"), [(82, True), (83, False), (100, False)])
@pytest.mark.parametrize("lossless", [True, False])
def test_webp_takes_more_memory_and_has_fewer_pixels(
    side: int, fine: bool, lossless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_PIXELS", 10_000)
    monkeypatch.setattr(decoding, "_PIXELS_A_BYTE", 0)
    for kind, read in (("WEBP", fine), ("PNG", True)):
        file = io.BytesIO()
        Image.new("RGB", (side, side)).save(file, kind, **({"lossless": lossless} if kind == "WEBP" else {}))
        with (
            contextlib.nullcontext() if read else pytest.raises(ValueError, match="6,875 that are read"),
            opening(file.getvalue()),
        ):
            pass
