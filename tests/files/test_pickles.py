"""Pickles and archives that ask for more than their length makes plausible are refused before anything reads them."""

from __future__ import annotations

import bz2
import contextlib
import io
import lzma
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader.errors import CheckpointError, InputError
from purifyloader.files.pickles import Implausible, check_archive, check_pickle, check_torch
from purifyloader.poisons import read_ar_coefficients
from purifyloader.poisons.reading.content import open_content
from purifyloader.pretrained.convert.pickles import read_file

P = pickle  # its instructions, by their names


def program(*parts: bytes) -> bytes:
    return P.PROTO + b"\x02" + b"".join(parts) + P.STOP


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def text(value: str) -> bytes:
    data = value.encode()
    return P.BINUNICODE + struct.pack("<I", len(data)) + data


def called(name: bytes, *arguments: bytes) -> bytes:
    return P.GLOBAL + name + b"\n" + P.MARK + b"".join(arguments) + P.TUPLE + P.REDUCE


def put(place: int) -> bytes:
    return P.LONG_BINPUT + struct.pack("<I", place)


def get(place: int) -> bytes:
    return P.LONG_BINGET + struct.pack("<I", place)


def storage(count: int, key: str = "0") -> bytes:
    words = (text("storage"), P.GLOBAL + b"torch\nFloatStorage\n", text(key), text("cpu"), number(count))
    return P.MARK + b"".join(words) + P.TUPLE + P.BINPERSID


def doubled(times: int, begin: bytes, join: bytes) -> bytes:
    """An object that holds the one before it twice, so often."""
    steps = [begin + put(0)]
    steps += [get(n) + get(n) + join + put(n + 1) for n in range(times)]
    return b"".join(steps)


TENSOR = b"torch._utils\n_rebuild_tensor_v2"
FRAMES = (10_000, 2**31 - 1, 2**33, 2**62)
HOSTILE: dict[str, bytes] = {
    "place of the memo": program(P.NONE, put(0xFFFFFFF0)),
    **{f"a frame of {size:,} bytes": program(P.FRAME + struct.pack("<Q", size), P.NONE) for size in FRAMES},
    "bytearray from a number": program(called(b"builtins\nbytearray", number(1 << 32))),
    "bytes from a number": program(called(b"__builtin__\nbytes", number(1 << 33))),
    "shared tuples": program(doubled(60, P.EMPTY_TUPLE, P.TUPLE2)),
    "shared lists": program(P.EMPTY_LIST, put(100), doubled(60, P.EMPTY_TUPLE, P.TUPLE2), P.APPEND),
    "a shared key": program(P.EMPTY_DICT, doubled(12, P.EMPTY_TUPLE, P.TUPLE2), P.NONE, P.SETITEM),
    "colliding integers": program(P.EMPTY_DICT, *(number(k * (2**61 - 1)) + P.NONE + P.SETITEM for k in range(1, 9))),
    "colliding integers in a set": program(P.EMPTY_SET, P.MARK, number(2**62), P.ADDITEMS),
    "many keys that are floats": program(P.EMPTY_DICT, 10_001 * (P.BINFLOAT + bytes(8) + P.NONE + P.SETITEM)),
    "a list in itself": program(P.EMPTY_LIST, put(0), get(0), P.APPEND),
    "a list in a tuple in itself": program(P.EMPTY_LIST, put(0), get(0), P.TUPLE1, P.APPEND),
    "a dict in itself": program(P.EMPTY_DICT, put(0), number(1), get(0), P.SETITEM),
    "depth": program(P.EMPTY_TUPLE, 5_000 * P.TUPLE1),
    "storage": program(storage(1 << 40)),
    "storages together": program(*(storage(150, str(key)) + P.POP for key in range(20)), P.NONE),
    "an expanded tensor": program(
        called(TENSOR, storage(1), number(0), number(1 << 20) + number(1 << 20) + P.TUPLE2, 2 * number(0) + P.TUPLE2)
    ),
    "an instruction of the caller's": program(P.NEXT_BUFFER),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_asks_for_much_is_refused_by_all_who_read_pickles(tmp_path: Path, name: str) -> None:
    data, path = HOSTILE[name], tmp_path / "a.pt"
    with pytest.raises(Implausible):
        check_pickle(io.BytesIO(data), len(data))
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.pt must be .*(it|its) "):
        open_content(path)
    with pytest.raises(CheckpointError, match=r"a\.pt must (be|hold) "):
        read_file(path)
    with pytest.raises(InputError, match=r"a\.pt must be"):
        read_ar_coefficients(path)


def test_a_pickle_of_many_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("purifyloader.files.pickles._INSTRUCTIONS", 1000)
    with pytest.raises(Implausible, match="more than 1,000 instructions"):
        check_pickle(io.BytesIO(program(2000 * P.EMPTY_LIST)), 2000)


HONEST: dict[str, Callable[[], Any]] = {
    "pictures": lambda: [(Image.new("RGB", (4, 4)), label) for label in range(300)],
    "arrays": lambda: {"data": np.zeros((10, 12), np.uint8), b"labels": list(range(10)), 3: (1, 2.5, None, True)},
    "numpy scalars": lambda: [np.float32(0.5), np.int64(3), np.bool_(True)],
    "sets": lambda: [{1, 2}, frozenset("ab"), {(1, 2): "pair", 0.5: 1, -1: 2, -2: 3}, bytearray(b"ab"), b"\x00" * 300],
    "long text": lambda: ["x" * 10_000, "ä" * 300, 2**70],
    "shared": lambda: [[shared := ["a"], shared, {"b": shared}] for _ in range(100)],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", HONEST)
def test_a_pickle_of_what_people_have_is_not(name: str, protocol: int) -> None:
    data = pickle.dumps(HONEST[name](), protocol)
    check_pickle(io.BytesIO(data), len(data))


@pytest.mark.parametrize("new", [True, False])
def test_a_file_of_torch_is_not(tmp_path: Path, new: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model[0](torch.rand(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    shared = torch.rand(10)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "halves": (shared[:5], shared[5:], shared.view(2, 5).t()),
        "ordered": OrderedDict(a=torch.Size([1, 2])),
        "half": torch.rand(3).half(),
        "empty": torch.empty(0),
    }
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    check_torch(tmp_path / "a.pt")
    assert torch.equal(read_file(tmp_path / "a.pt")["halves"][0], shared[:5])


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_pickle_cut_short_or_damaged_is_said_to_be_so(cut: int) -> None:
    data = pickle.dumps(HONEST["arrays"](), 2)
    with pytest.raises(EOFError):
        check_pickle(io.BytesIO(data[:-cut]), len(data))
    for hole in (P.POP_MARK, P.APPEND, P.TUPLE3, P.BINGET + b"\xff", P.SETITEMS, b"\xff"):
        with pytest.raises(ValueError, match="it "):
            check_pickle(io.BytesIO(program(hole)), 10)


# -- archives ----------------------------------------------------------------------------------------


def zipped(path: Path, count: int, size: int, overlapping: bool = False) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(count):
            archive.writestr(f"{number}.npy", bytes(size))
        if overlapping:
            for member in archive.infolist()[1:]:
                member.header_offset = archive.infolist()[0].header_offset


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    zipped(tmp_path / "a.npz", 4, 2000, overlapping=True)
    with pytest.raises(Implausible, match="members overlap"):
        check_archive(tmp_path / "a.npz")
    for read, error in ((open_content, InputError), (read_file, CheckpointError)):
        with pytest.raises(error, match=r"a\.npz must be .*overlap"):
            read(tmp_path / "a.npz")


def test_members_that_unpack_to_much_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("purifyloader.files.pickles.UNPACKED", 100_000)
    zipped(tmp_path / "a.npz", 2, 100_000)
    with pytest.raises(InputError, match=r"unpack to 200,000 bytes"):
        open_content(tmp_path / "a.npz")


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(4, 4, 100000)"])
def test_an_array_that_declares_more_than_it_has_is_refused(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(16)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", data)
    with pytest.raises(InputError, match=r"a\.npz must be .*declares uint8"):
        open_content(tmp_path / "a.npz")


def test_whole_archives_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((100, 8, 8, 3), np.uint8), labels=np.arange(100))
    assert open_content(tmp_path / "a.npz")["images"].shape == (100, 8, 8, 3)


def by_hand(members: list[tuple[str, int, bytes, bytes]], end: str = "") -> bytes:
    """An archive of (name, method, data, what they are said to unpack to), whose end may lie."""
    body, central = b"", b""
    for member, method, data, declared in members:
        known = zlib.crc32(declared), len(data), len(declared), len(member), 0
        central += struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\1\2", 46, 46, 0, method, 0, 33, *known, 0, 0, 0, 0, len(body)
        )
        central += member.encode()
        body += struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 46, 0, method, 0, 33, *known) + member.encode() + data
    shift = {"a list before": -len(central), "a shifted list": 5}.get(end, 0)
    if end == "a list before":  # the one that the end tells of, and another that is found from the end
        body += central.replace(b"data.pkl", b"data.txt")
    large = b""
    if end.startswith("of 64 bits"):
        at = len(body) + len(central) + (7 if end.endswith("elsewhere") else 0)
        large = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(central), len(body))
        large += struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
    numbers = (0xFFFFFFFF, 0xFFFFFFFF) if large else (len(central), len(body) + shift)
    last = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, len(members), len(members), *numbers, 0)
    return body + central + large + last + (b"behind" if end == "something behind" else b"")


def plain(value: object) -> bytes:
    return pickle.dumps(value, 2)


MAGIC = b"".join(plain(v) for v in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}))
MEMBER = "a/data.pkl"
HARMLESS = [(MEMBER, 0, plain([]), plain([]))]
LARGE, LITTLE = bytes(20_000_000), bytes(100)
DEFLATED = zlib.compress(LARGE, 9, -15)


def tar_of_pickles() -> bytes:
    info = tarfile.TarInfo("x")
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:512])
    start = plain(0x1950A86A20F9469CFC6C) + plain(1001)
    header[: len(start)] = start
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


ARCHIVES = {
    "bzip2": by_hand([(MEMBER, 12, bz2.compress(LARGE), LITTLE)]),
    "lzma": by_hand([(MEMBER, 14, b"\t\4\5\0" + lzma.compress(LARGE, lzma.FORMAT_ALONE, preset=0)[:5], LITTLE)]),
    "a name that ends in a zero byte": by_hand([("a/data.pkl\0x", 0, plain([]), plain([]))]),
    "one name twice": by_hand([*HARMLESS, (MEMBER, 0, DEFLATED, DEFLATED)]),
    "a list before": by_hand(HARMLESS, "a list before"),
    "a shifted list": by_hand(HARMLESS, "a shifted list"),
    "of 64 bits elsewhere": by_hand(HARMLESS, "of 64 bits elsewhere"),
    "something behind": by_hand(HARMLESS, "something behind"),
}
BOTH = {
    "an old file and an archive": MAGIC + HOSTILE["bytearray from a number"] + plain([]) + by_hand(HARMLESS),
    "harmless both": MAGIC + plain([]) + plain([]) + by_hand(HARMLESS),
    "a pickle and an archive": HOSTILE["storage"] + by_hand(HARMLESS),
    "a tar": tar_of_pickles(),
}


@pytest.mark.parametrize("name", [*ARCHIVES, *BOTH])
def test_what_two_readers_take_for_two_things_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes({**ARCHIVES, **BOTH}[name])
    with pytest.raises(Implausible):
        check_torch(path)
    if name in ARCHIVES:
        with pytest.raises(Implausible):
            check_archive(path)
    for read, error in ((open_content, InputError), (read_file, CheckpointError), (read_ar_coefficients, InputError)):
        with pytest.raises(error, match=r"a\.pt must be"):
            read(path)


@pytest.mark.parametrize("member", [MEMBER, "a/DATA.PKL", "data.npy"])
def test_a_member_is_read_no_further_than_it_declares(tmp_path: Path, member: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(by_hand([(member, 8, DEFLATED, LITTLE)]))
    for read in (check_torch, open_content, read_file, read_ar_coefficients):
        with contextlib.suppress(ValueError, InputError, CheckpointError):
            read(path)  # what it imports is not counted
        tracemalloc.start()
        with contextlib.suppress(ValueError, InputError, CheckpointError):
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5_000_000, read


@pytest.mark.parametrize("end", ["", "of 64 bits"])
def test_an_archive_with_any_honest_end_is_read(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.npz").write_bytes(by_hand(HARMLESS, end))
    check_archive(tmp_path / "a.npz")
    check_torch(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", X=np.zeros(2), x=np.ones(2))  # two names but for their case
    with zipfile.ZipFile(tmp_path / "b.npz", "a") as archive:
        archive.comment = b"as somebody has named it"
    assert set(open_content(tmp_path / "b.npz")) == {"X", "x"}
