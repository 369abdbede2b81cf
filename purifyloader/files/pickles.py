"""Look through a pickle before anything reads it: what it would make is no larger than its file makes plausible.

A pickle is a program, and even one that calls nothing can ask for memory and time: an index of its memo, a bytearray of
so many bytes, a tensor of one number seen a billion times, tuples of tuples that are hashed for ever. Here each of its
instructions is followed with counts in the place of values, and nothing is made.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from purifyloader.files.opening import UNPACKED, UNPACKED_A_BYTE, check_file, opened

__all__ = ["Implausible", "check_archive", "check_pickle", "check_torch", "is_archive", "read_member"]

_INSTRUCTIONS = 4_000_000  # 50,000 images have 1.5 million; this many are followed in about 8 s
_PARTS = 10_000_000  # values of which a pickle's object consists, shared ones counted wherever they are
_DEPTH = 200
_KEYS = 10_000  # of a dict or a set, that are tuples or floats, whose hashes may be made alike
_HASHED = 1_000  # parts of one such key
_LARGEST_KEY = 2**61 - 1  # Python's hash of an integer is its remainder by this
_BYTES = 1 << 20  # of a bytearray that is made from a number
_LONGEST_NAME = 200
_PICKLES = 5  # in a row in torch's old format
_ARCHIVE = b"PK\3\4"  # the first bytes of what torch takes for an archive
_END, _END_64 = 22, 76  # bytes at the end of an archive, and before these of a large one
_MEMBER_HEADER = 30  # bytes at least before a member's data

_INTEGERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BLOBS = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": "list", "EMPTY_TUPLE": "tuple", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_MARKED = {"LIST": "list", "TUPLE": "tuple", "DICT": "dict", "FROZENSET": "set"}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}

_MARK = object()


class Implausible(ValueError):
    """A file asks for more memory or time than its length makes plausible; the text begins with "it" or "its"."""


class TooShort(Implausible, EOFError):
    """A file holds less than it says."""


class _Blob:
    """Stands for text or bytes that nobody looks at."""


_BLOB = _Blob()


class _Node:
    """Stands for an object that holds others: how many plain values, and which objects."""

    __slots__ = ("atoms", "data", "kind", "parts")

    def __init__(self, kind: str, values: Sequence[Any] = (), data: Any = None) -> None:
        self.kind, self.atoms, self.data = kind, 1, data
        self.parts: list[_Node] | None = None
        self.add(values)

    def add(self, values: Sequence[Any]) -> None:
        for value in values:
            if type(value) is _Node:
                if self.parts is None:
                    self.parts = []
                self.parts.append(value)
            else:
                self.atoms += 1


def check_pickle(stream: BinaryIO, size: int) -> None:
    """Raise `Implausible` for a pickle that asks for more than a file of `size` bytes makes plausible.

    `EOFError` for one that is cut short, `ValueError` for one that is damaged. It reads to the pickle's end, and 4
    million instructions at most.

    >>> import io, pickle
    >>> from purifyloader.files.pickles import check_pickle
    >>> data = pickle.dumps([("a", 1)])
    >>> check_pickle(io.BytesIO(data), len(data))
    """
    try:
        _Follower(size).follow(stream)
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is damaged ({error!r})") from None


def check_torch(file: Path | BinaryIO) -> None:
    """Do the same for the pickles in a file of torch.save: an archive, or five in a row in the old format."""
    if isinstance(file, Path):
        with opened(file) as stream:
            check_torch(stream)
        return
    start = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(start)
    if is_archive(file):
        check_archive(file)
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.filename.lower().endswith(".pkl"):  # torch's reader knows no case
                    check_pickle(io.BytesIO(read_member(archive, member)), size)
    else:
        for _ in range(_PICKLES):
            check_pickle(file, size)
    file.seek(start)


def is_archive(file: Path | BinaryIO) -> bool:
    """Tell as torch does whether a file is an archive: by its first bytes, whatever is at its end.

    `Implausible` for what another reader takes for another format: a pickle with an archive behind it, or in a tar.
    """
    if isinstance(file, Path):
        with opened(file) as stream:
            return is_archive(stream)
    start = file.tell()
    head = file.read(tarfile.BLOCKSIZE)
    try:
        if head.startswith(_ARCHIVE):
            return True
        if _is_tar(head):
            raise Implausible("it is a tar, and may be something else at the same time")
        if _holds_archive(file):
            raise Implausible("it has an archive at its end, and something else before that")
        return False
    finally:
        file.seek(start)


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")  # torch's old reader tries that first
    except (tarfile.TarError, ValueError):
        return False
    return True


def _holds_archive(file: BinaryIO) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return bool(archive.infolist())
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, struct.error):
        return False


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most: int | None = None) -> bytes:
    """Read a member of an archive that was checked, or its first bytes: no more than it declares, whatever is in it."""
    with archive.open(member) as stream:
        return stream.read(member.file_size if most is None else min(most, member.file_size))


def check_archive(file: Path | BinaryIO) -> None:
    """Raise `Implausible` for an archive whose members overlap, or unpack to more than its length makes plausible.

    A file on a disk may unpack to 512 MB and 16 times its size, one inside another to 16 times its size. Members are
    stored or deflated, for others are unpacked to whatever they come to before their length is looked at; and the
    archive is one in whatever way it is read, from its first byte or from its last, by number or by name.
    """
    if isinstance(file, Path):
        check_file(file)
    with zipfile.ZipFile(file) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        assert archive.fp is not None
        size = archive.fp.seek(0, os.SEEK_END)
        _check_directory(archive, size)
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Implausible(f"its member {member.filename} is packed by method {member.compress_type}, not deflated")
        if "\0" in member.orig_filename:
            raise Implausible(f"its member {member.filename} has another name behind a zero byte")
    if len({member.filename for member in members}) != len(members):
        raise Implausible("two of its members have one name")
    most = UNPACKED_A_BYTE * size + (UNPACKED if isinstance(file, Path) or hasattr(file, "name") else 0)
    if (unpacked := sum(member.file_size for member in members)) > most:
        raise Implausible(f"its members unpack to {unpacked:,} bytes, more than the {most:,} that are read of {size:,}")
    ends = [member.header_offset + _MEMBER_HEADER + member.compress_size for member in members]
    starts = [member.header_offset for member in members[1:]]
    if any(end > start for end, start in zip(ends, [*starts, size], strict=True)):
        raise Implausible("its members overlap")


def _check_directory(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive whose list of members is not where its end says: `zipfile` looks for it, and torch does not."""
    assert archive.fp is not None
    end = size - _END - len(archive.comment)
    archive.fp.seek(max(0, end - _END_64))
    tail = archive.fp.read(min(end, _END_64) + _END).rjust(_END_64 + _END, b"\0") if end >= 0 else b""
    last, locator = tail[_END_64:], tail[_END_64 - 20 : _END_64]
    if not last.startswith(b"PK\5\6"):
        raise Implausible("it has something behind its end")
    length, at = struct.unpack("<II", last[12:20])
    if locator.startswith(b"PK\6\7"):
        end -= _END_64
        length, at = struct.unpack("<QQ", tail[40:56])
        if struct.unpack("<Q", locator[8:16])[0] != end or not tail.startswith(b"PK\6\6"):
            raise Implausible("its end is not where it says")
    if at != archive.start_dir or at + length != end:
        raise Implausible("its list of members is not where its end says")


class _Follower:
    """Follow the instructions of one pickle in a file of `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.keys: list[_Node] = []
        self.floats = self.count = self.stored = 0
        self.storages: dict[Any, int] = {}

    def follow(self, stream: BinaryIO) -> None:
        for self.count, (opcode, argument, _) in enumerate(_instructions(stream), 1):
            if self.count > _INSTRUCTIONS:
                raise Implausible(f"it has more than {_INSTRUCTIONS:,} instructions")
            self.step(opcode.name, argument)
        self.weigh(self.stack[-1] if self.stack else None)

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _INTEGERS:
            stack.append(argument)
        elif name in _TEXTS:
            stack.append(argument if len(argument) <= _LONGEST_NAME else _BLOB)
        elif name in _BLOBS:
            stack.append(_BLOB)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("FLOAT", "BINFLOAT"):
            stack.append(float(argument))
        elif name in _PUTS:
            self.put(len(self.memo) if name == "MEMOIZE" else int(argument))
        elif name in _GETS:
            stack.append(self.memo[int(argument)])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _EMPTY:
            stack.append(_Node(_EMPTY[name]))
        elif name in _MARKED:
            self.made(_MARKED[name], self.to_mark())
        elif name in _SHORT_TUPLES:
            self.made("tuple", self.last(_SHORT_TUPLES[name]))
        elif name == "FRAME":
            if argument > self.size:  # room is made for all of it
                raise TooShort(f"it has a frame of {argument:,} bytes in a file of {self.size:,}")
        elif name != "PROTO":
            self.step_of_objects(name, argument)

    def step_of_objects(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("APPEND", "APPENDS"):
            values = self.last(1) if name == "APPEND" else self.to_mark()
            self.top().add(values)
        elif name in ("SETITEM", "SETITEMS"):
            self.fill(self.last(2) if name == "SETITEM" else self.to_mark())
        elif name == "ADDITEMS":
            values = self.to_mark()
            self.check_keys(values)
            self.top().add(values)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            words = self.last(2) if name == "STACK_GLOBAL" else str(argument).split(" ", 1)
            stack.append(_Node("global", data=".".join(map(str, words))))
        elif name in ("REDUCE", "NEWOBJ"):
            self.call(*self.last(2))
        elif name == "NEWOBJ_EX":
            stack.append(_Node("object", self.last(3)))
        elif name in ("INST", "OBJ"):
            stack.append(_Node("object", self.to_mark()))
        elif name == "BUILD":
            (state,) = self.last(1)
            self.top().add([state])
        elif name in ("PERSID", "BINPERSID"):
            self.persistent(argument if name == "PERSID" else self.last(1)[0])
        elif name == "POP":
            self.last(1)
        elif name == "POP_MARK":
            self.to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name != "STOP":
            raise Implausible(f"it has the instruction {name}, which no plain pickle has")

    def put(self, index: int) -> None:
        if not 0 <= index <= self.count:  # pickles number what they keep in order
            raise Implausible(f"it keeps a value in place {index:,}, after {self.count:,} instructions")
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("it keeps a value that is not there")
        self.memo[index] = self.stack[-1]

    def last(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        if len(values) < count or any(value is _MARK for value in values):
            raise ValueError("it takes a value that is not there")
        del self.stack[-count:]
        return values

    def to_mark(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                values = self.stack[at + 1 :]
                del self.stack[at:]
                return values
        raise ValueError("it goes back to a mark that is not there")

    def top(self) -> _Node:
        if not self.stack or type(self.stack[-1]) is not _Node:
            raise ValueError("it adds to what holds nothing")
        node: _Node = self.stack[-1]
        return node

    def made(self, kind: str, values: Sequence[Any]) -> None:
        if kind == "dict":
            self.stack.append(_Node(kind))
            self.fill(values)
            return
        if kind == "set":
            self.check_keys(values)
        # of a short tuple its values are looked at, when it is the arguments of a call
        self.stack.append(_Node(kind, values, tuple(values) if len(values) <= 8 else None))

    def fill(self, values: Sequence[Any]) -> None:
        self.check_keys(values[::2])
        self.top().add(values)

    def check_keys(self, keys: Sequence[Any]) -> None:
        """Refuse keys whose hashes may be alike, or take long: dicts and sets of many of them take hours."""
        for key in keys:
            if type(key) is _Node:
                self.keys.append(key)
            elif type(key) is int and abs(key) >= _LARGEST_KEY:
                raise Implausible(f"it has a key of {key.bit_length()} bits")
            elif type(key) is float:
                self.floats += 1
        if len(self.keys) + self.floats > _KEYS:
            raise Implausible(f"more than {_KEYS:,} of its keys are tuples or floats")

    def call(self, function: Any, arguments: Any) -> None:
        name = function.data if type(function) is _Node and function.kind == "global" else None
        values = arguments.data if type(arguments) is _Node and isinstance(arguments.data, tuple) else ()
        last_name = str(name).rpartition(".")[2]
        if last_name in ("bytearray", "bytes") and any(type(v) is int and v > _BYTES for v in values):
            raise Implausible(
                f"it makes a {last_name} of {max(v for v in values if type(v) is int):,} bytes from a number"
            )
        if last_name in ("set", "frozenset", "dict", "OrderedDict") and any(type(v) is _Node for v in values):
            # of a list it is not known what is in it: as many keys as it has values may be of any kind
            for value in values:
                if type(value) is _Node and value.atoms + len(value.parts or ()) > _KEYS:
                    raise Implausible(f"it makes a {last_name} of more than {_KEYS:,} values")
        if last_name.startswith("_rebuild") and len(values) > 2:
            self.check_tensor(values[0], values[2])
        self.stack.append(_Node("object", [arguments], data=values[0].data if last_name == "Size" and values else None))

    def check_tensor(self, storage: Any, size: Any) -> None:
        """Refuse a tensor that shows more numbers than it has."""
        held = storage.data if type(storage) is _Node and storage.kind == "storage" else None
        sides = size.data if type(size) is _Node else None
        if held is None or not isinstance(sides, tuple):
            return
        count = 1
        for side in sides:
            count *= side if type(side) is int else 1
        if count > held:
            raise Implausible(f"it has a tensor of {count:,} numbers over {held:,} stored ones")

    def persistent(self, named: Any) -> None:
        values = named.data if type(named) is _Node else None
        if not isinstance(values, tuple) or len(values) < 5 or values[0] != "storage":
            self.stack.append(_Node("object", [named]))
            return
        key, held = values[2], values[4]
        if type(held) is not int or not 0 <= held <= self.size:
            raise TooShort(f"it has a storage of {held!r} numbers in a file of {self.size:,} bytes")
        key = key if isinstance(key, str | int) else None
        self.stored += held - self.storages.get(key, 0)
        self.storages[key] = held
        if self.stored > self.size:
            raise TooShort(f"its storages have more numbers than its {self.size:,} bytes")
        self.stack.append(_Node("storage", data=held))

    def weigh(self, root: Any) -> None:
        """Refuse an object that holds itself, is nested deeply, or has too many parts, shared ones counted anew."""
        weights: dict[int, tuple[int, int]] = {}
        for node in [*self.keys, *([root] if type(root) is _Node else [])]:
            for parts, depth in _weighed(node, weights):
                if parts > _PARTS:
                    raise Implausible(f"it holds more than {_PARTS:,} values, shared ones counted wherever they are")
                if depth > _DEPTH:
                    raise Implausible(f"it is nested more than {_DEPTH} deep")
        for key in self.keys:
            if weights[id(key)][0] > _HASHED:
                raise Implausible(f"it has a key of more than {_HASHED:,} parts")


class _Within:
    """A file of which no more is asked than it has: a file's own `read` makes room for all that is asked for."""

    def __init__(self, stream: BinaryIO) -> None:
        self.tell, self.readline, self._read = stream.tell, stream.readline, stream.read
        at = stream.tell()
        self._end = stream.seek(0, os.SEEK_END)
        stream.seek(at)

    def read(self, size: int) -> bytes:
        return self._read(size if size < 2**16 else min(size, self._end - self.tell()))


def _instructions(stream: BinaryIO) -> Iterator[tuple[Any, Any, Any]]:
    try:
        yield from pickletools.genops(_Within(stream))  # type: ignore[arg-type]  # it reads and tells
    except ValueError as error:
        short = any(words in str(error) for words in ("exhausted", "remain", "not enough data", "no newline"))
        raise (EOFError if short else ValueError)(f"it is damaged ({error})") from None


def _weighed(root: _Node, weights: dict[int, tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield (parts, depth) of each object below `root`, those inside first; `Implausible` for one inside itself."""
    open_: set[int] = set()
    todo = [root]
    while todo:
        node = todo[-1]
        if id(node) in weights:
            todo.pop()
            continue
        parts = node.parts or []
        if id(node) not in open_:
            open_.add(id(node))
            for part in parts:
                if id(part) in open_:
                    raise Implausible("it holds itself")
                if id(part) not in weights:
                    todo.append(part)
            continue
        todo.pop()
        open_.discard(id(node))
        inside = [weights[id(part)] for part in parts]
        weight = node.atoms + sum(count for count, _ in inside), 1 + max((depth for _, depth in inside), default=0)
        weights[id(node)] = weight
        yield weight
