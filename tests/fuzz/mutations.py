"""Change bytes, JSON, and the containers around them, by what a `Draw` says."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


class Draw:
    """Choices out of random bytes, of which hypothesis makes fewer and smaller ones where a test fails."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, below: int) -> int:
        """Draw from 0 to below - 1; 0 once the bytes are used up."""
        data = self._data[self._at : self._at + 4]
        self._at += 4
        return int.from_bytes(data, "little") % below if below > 1 else 0

    def choice(self, items: Sequence[Item]) -> Item:
        return items[self.number(len(items))]


def deep(levels: int, inside: Any = 0) -> Any:
    for _ in range(levels):
        inside = [inside]
    return inside


HOSTILE: list[Any] = [
    *(0, -1, 1, 2, 3, 255, 2**31, 2**32, 2**63, 2**64, 10**12, -(2**63), 10**300, 10**400, 10**5),
    *(0.0, 0.5, -1.0, 1.5, 1e308, -1e308, 5e-324, float("nan"), float("inf"), True, False, None),
    *(
        "",
        "0",
        "-1",
        "1e9",
        "\ud800",
        "\0",
        "é",
        "../../../../tmp/outside",
        "/etc/passwd",
        ".",
        "x" * 10_000,
        "ff" * 50,
    ),
    *(
        [],
        {},
        [0],
        [[]],
        [None],
        ["0"],
        [-1],
        [10**12],
        {"": 0},
        {"kind": "jpeg"},
        [1, 2, 3, 4, 5],
        deep(60),
        deep(400),
    ),
    *([0] * 10_000, {str(i): i for i in range(200)}, deep(30, {"a": deep(30)})),
    *({"$tensor": ["float32", [10**9], ""]}, {"$tuple": 3}, {"$image": ["RGB", [10**6, 10**6], ""]}),
    *({"$array": ["O", [1], "AAAA"]}, {"$dict": [[{"$dict": []}, 1]]}, {"$float": "x"}, {"$unknown": 1}),
]


def json_changed(value: Any, draw: Draw, levels: int = 6) -> Any:
    """Copy JSON with one change, somewhere inside."""
    if isinstance(value, dict | list) and value and draw.number(levels):
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy = value.copy()
        match draw.number(12):
            case 0:
                del copy[key]
            case 1:
                copy[key] = value[draw.choice(list(value) if isinstance(value, dict) else range(len(value)))]
            case 2 if isinstance(copy, list):
                copy[key:key] = copy[: draw.number(len(copy)) + 1]
            case 2 | 3 if isinstance(copy, dict):
                copy[draw.choice(["", "x", "kind", "$tuple", "\ud800", key.upper()])] = copy.pop(key)
            case 3 | 4:
                copy[key] = draw.choice(HOSTILE)
            case _:
                copy[key] = json_changed(value[key], draw, levels)
        return copy
    if isinstance(value, int | float) and not isinstance(value, bool) and draw.number(4) == 0:
        return value + draw.choice([1, -1, 10**6, 0.5, 10**12])
    if isinstance(value, str) and value and draw.number(3) == 0:
        at = draw.number(len(value))
        return value[:at] + draw.choice(["", "0", "z", value]) + value[at + 1 :]
    return draw.choice(HOSTILE)


def text_of(value: Any) -> str:
    """Write canonical JSON of anything, NaN too."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def bytes_changed(data: bytes, draw: Draw) -> bytes:
    if not data:
        return draw.choice([b"\0", b"{}", b"[" * 1000])
    at = draw.number(len(data)) if draw.number(2) else draw.number(min(len(data), 200))
    size = draw.choice([1, 2, 4, 8, 16, 100, 1000])
    block = data[at : at + size]
    match draw.number(9):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << draw.number(8)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + block * draw.choice([2, 3, 1000]) + data[at + size :]
        case 3:
            return data[:at] + data[at + size :]
        case 4:
            return data[:at] + bytes(len(block)) + data[at + size :]
        case 5:
            number = draw.choice([0, 1, 0x7FFF, 2**31 - 1, 2**32 - 1])
            return data[:at] + struct.pack(draw.choice(["<I", ">I"]), number) + data[at + 4 :]
        case 6:
            number = draw.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
            return data[:at] + struct.pack(draw.choice(["<Q", ">Q"]), number) + data[at + 8 :]
        case 7:
            return data[:at] + bytes([draw.number(256)]) + data[at + 1 :]
        case _:
            return data + data[at:] * draw.choice([1, 10])


def json_text_changed(data: bytes, draw: Draw) -> bytes:
    return text_of(json_changed(json.loads(data), draw)).encode()


def safetensors_parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def safetensors_whole(header: Any, body: bytes) -> bytes:
    text = text_of(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def safetensors_changed(data: bytes, draw: Draw) -> bytes:
    header, body = safetensors_parts(data)
    return safetensors_whole(json_changed(header, draw), body)


def zip_changed(data: bytes, draw: Draw, last: str = "") -> bytes:
    """Change a member, whose name ends in `last` and whose checksum is computed anew."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(sorted(name for name in members if name.endswith(last)))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for each, content in members.items():
            archive.writestr(each, bytes_changed(content, draw) if each == name else content)
    return out.getvalue()


_FIELDS = {"name": (0, 100), "size": (124, 12), "mtime": (136, 12), "type": (156, 1), "link": (157, 100)}
_FIELDS |= {"magic": (257, 8), "prefix": (345, 155), "mode": (100, 8)}
_TAR_VALUES = [b"", b"../../../tmp/outside", b"/tmp/outside", b"/" * 100, b"7" * 12, b"77777777777", b"\xff" * 12]
_TAR_VALUES += [
    b"\x80" + b"\0" * 3 + b"\x7f" * 8,
    b"-1",
    b"00000000000",
    b"00000001000",
    b"L",
    b"K",
    b"x",
    b"g",
    b"S",
    b"1",
]
_TAR_VALUES += [b"2", b"3", b"5", b"6", b"V", b"D", b".png", b"00000000.png", b"0.json", b"\xff\xfe.png", b"a\0b"]


def tar_changed(data: bytes, draw: Draw) -> bytes:
    """Change a header, whose checksum is computed anew, or put a member of another kind in front of one."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = draw.choice([member.offset for member in tar.getmembers()])
    header = bytearray(data[at : at + 512])
    if draw.number(4) == 0:
        kind = draw.choice([b"L", b"K", b"x", b"g", b"S"])
        text = draw.choice(
            [b"/" * 200_000, b"a" * 5000 + b"\0", b"30 size=999999999999999999\n", b"12 path=../x\n", b"9" * 50]
        )
        extra = bytearray(tarfile.TarInfo("@").tobuf(tarfile.GNU_FORMAT)[:512])
        extra[156:157] = kind
        extra[124:136] = b"%011o\0" % draw.choice([len(text), len(text), 0, 2**33 - 1, 2**30])
        return data[:at] + _summed(extra) + text + bytes(-len(text) % 512) + data[at:]
    start, size = _FIELDS[draw.choice(sorted(_FIELDS))]
    header[start : start + size] = draw.choice(_TAR_VALUES)[:size].ljust(size, b"\0")
    return data[:at] + _summed(header) + data[at + 512 :]


def _summed(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def png_changed(data: bytes, draw: Draw) -> bytes:
    """Change a chunk, whose checksum is computed anew."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    number = draw.number(len(chunks))
    name, content = chunks[number]
    if name == b"IHDR" and draw.number(2):
        sides = [draw.choice([0, 1, 2**15, 2**31 - 1, 2**32 - 1]).to_bytes(4, "big") for _ in range(2)]
        content = sides[0] + sides[1] + content[8:]
    elif draw.number(3):
        content = bytes_changed(content, draw)
    else:
        name = draw.choice([b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"IEND", b"eXIf"])
    chunks[number] = name, content
    body = b"".join(
        len(text).to_bytes(4, "big") + name + text + zlib.crc32(name + text).to_bytes(4, "big") for name, text in chunks
    )
    return data[:8] + body
