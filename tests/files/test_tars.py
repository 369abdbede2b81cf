"""Tars of others: what a header declares costs nothing, and names are split as WebDataset splits them."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import time
import zlib
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from purifyloader.datasets.named import TarDataset
from purifyloader.datasets.splits import load_sample, samples_of
from purifyloader.errors import InputError
from purifyloader.files.tars import split_name
from tests.fuzz.guard import limits

PUBLISHED = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # WebDataset's


@settings(max_examples=300, derandomize=True, database=None)
@given(st.text("a./_", max_size=12))
def test_names_are_split_as_webdataset_does(name: str) -> None:
    match = PUBLISHED.match(name)
    assert split_name(name) == (None if match is None else (match[1], match[2]))


def block(kind: bytes, size: int, name: str = "a.png") -> bytes:
    info = tarfile.TarInfo(name)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    header[156:157] = kind
    header[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


GOOD = block(b"0", len(picture())) + padded(picture())
END = bytes(1024)


def records(count: int, value: bytes = b"1") -> bytes:
    """PAX records of many names."""
    lines = (b" %06x=%s\n" % (number, value) for number in range(count))
    return b"".join(b"%d%s" % (length, line) for line in lines for length in [len(line) + len(str(len(line) + 2))])


def for_all(count: int, value: bytes = b"1") -> bytes:
    return block(b"g", len(said := records(count, value)), "@") + padded(said)


PAX = b"13 path=a.png\n"
HOSTILE = {
    "a long name of 8 GB": block(b"L", 2**33 - 1, "@") + GOOD + END,
    "a long link of 1 GB": block(b"K", 2**30, "@") + GOOD + END,
    "PAX of 6 GB": block(b"x", 6 * 10**9, "@") + padded(PAX) + GOOD + END,
    "PAX for all of 10^18 bytes": block(b"g", 10**18, "@") + padded(PAX) + GOOD + END,
    "PAX of many digits": block(b"x", 10**6, "@") + padded(b"9" * 10**6) + GOOD + END,
    "PAX of many digits for all": block(b"g", 500_000, "@") + padded(b"1" * 500_000) + GOOD + END,
    "80,000 PAX records for all": for_all(80_000) + 5 * GOOD + END,
    "a long PAX value for all": for_all(1, b"1." * 40_000) + GOOD + END,
    "many PAX headers for all": b"".join(
        block(b"g", 13, "@") + padded(b"13 %04d=1234\n" % number) for number in range(101)
    )
    + GOOD
    + END,
    "a name of 200,000 slashes": block(b"L", 200_001, "@") + padded(b"/" * 200_000 + b"\0") + GOOD + END,
    "a name of a million letters": block(b"L", 10**6, "@") + padded(b"a" * 10**6) + GOOD + END,
    "a sparse file of 6 GB": block(b"S", 6 * 10**9) + padded(picture()) + END,
    "a file of 10^18 bytes": block(b"0", 10**18) + padded(picture()) + END,
    "a size of -1 by PAX": block(b"x", 11, "@") + padded(b"11 size=-1\n") + GOOD + END,
    "50,000 long names of long names": block(b"L", 5, "@") * 0
    + (block(b"L", 5, "@") + padded(b"a.png")) * 50_000
    + END,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.tar"
    path.write_bytes(HOSTILE[name])
    began = time.process_time()
    with pytest.raises(InputError, match=r"hostile\.tar.*" + ("PAX" if name.endswith("for all") else "")):
        TarDataset([path])
    assert time.process_time() - began < 5


@pytest.mark.parametrize("count", [1, 50, 100])
def test_what_pax_says_of_all_members_may_be_said(tmp_path: Path, count: int) -> None:
    (tmp_path / "a.tar").write_bytes(for_all(count) + GOOD + END)
    assert len(TarDataset([tmp_path / "a.tar"])) == 1


LABEL = block(b"0", 1, "a.cls") + padded(b"3")
SAMPLES = {name: data[: -len(END)] + LABEL + END for name, data in HOSTILE.items()} | {
    "a label of a megabyte": GOOD + block(b"0", 10**6, "a.cls") + padded(bytes(10**6)) + END,
    "a label of 5,000 digits": GOOD + block(b"0", 5000, "a.cls") + padded(b"1" * 5000) + END,
    "a picture of text": block(b"0", 5000, "a.png") + padded(b"1" * 5000) + LABEL + END,
    "no label": GOOD + END,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_shard_of_a_sample_too(name: str, tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(SAMPLES[name])
    with limits(tmp_path), pytest.raises(InputError, match=r"train-000000\.tar"):
        load_sample(tmp_path, "train")


GZIP = b"\x1f\x8b\x08\x18\1\1\1\1\1\1"  # a name and a comment follow
STARTS = {
    "gzip": (GZIP, zlib.compress(bytes(1000), wbits=-15)),
    "bzip2": (b"BZh91AY&SY", b""),
    "xz": (b"\xfd7zXZ", b""),
    "lzma": (b"]\x01\x01\x80", b""),
}


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_shard_is_read_as_the_tar_that_was_checked(tmp_path: Path, name: str, suffix: str) -> None:
    start, behind = STARTS[name]
    first = bytearray(block(b"0", len(behind), "x" * 50))
    first[: len(start)] = start
    first[148:156] = b" " * 8
    first[148:156] = b"%06o\0 " % sum(first)
    shard = bytes(first) + padded(behind) + GOOD + LABEL + END
    (tmp_path / f"train-000000.tar{suffix}").write_bytes(gzip.compress(shard) if suffix else shard)
    images, labels = load_sample(tmp_path, "train")
    assert images.shape == (1, 4, 4, 3)
    assert labels.tolist() == [3]


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    names = [
        "__meta__",
        "__meta__/a.png",
        "b.PNG",
        "b.cls",
        "noname",
        "d/e.cls",
        "d/e.png",
        ".hidden",
        "f/.g",
        "h.x.png",
    ]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    content = (tmp_path / "a.tar").read_bytes()
    source = {"url": str(tmp_path), "stream": io.BytesIO(content)}
    theirs = webdataset.tariterators.group_by_keys(webdataset.tariterators.tar_file_expander([source]))
    assert list(samples_of(tmp_path, content)) == list(theirs)


def test_members_that_are_no_files_are_left_out(tmp_path: Path) -> None:
    others = block(b"1", 0, "b.png") + block(b"2", 0, "c.png") + block(b"3", 0, "d.png") + block(b"5", 0, "e.png")
    (tmp_path / "a.tar").write_bytes(others + block(b"6", 0, "f.png") + GOOD + END)
    assert len(TarDataset([tmp_path / "a.tar"])) == 1


def test_many_slashes_take_no_time(tmp_path: Path) -> None:
    names = ["/" * 4000 + "x", "a/" * 2000 + ".png", "/" * 4000 + ".png", "." * 4000]
    began = time.process_time()
    for name in names * 1000:
        split_name(name)
    assert time.process_time() - began < 1
