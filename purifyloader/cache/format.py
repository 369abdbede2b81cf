"""What stands in the files of a cache (README.md says it in words); shared by writer and reader."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purifyloader.errors import CacheError, ConfigError
from purifyloader.files import canonical_json, write_text

__all__ = [
    "FORMAT",
    "INDEX_FILE",
    "METADATA",
    "SHARD_FILE",
    "SHARD_SIZE",
    "TENSOR",
    "VERSION",
    "Index",
    "Shard",
    "ShardEntry",
    "ShardHeader",
    "differences",
    "fingerprint",
    "plain",
    "read_index",
    "read_shard_header",
    "shard_hashes",
    "shards_of",
    "write_index",
]

FORMAT = "purifyloader-cache"
VERSION = 1
INDEX_FILE = "index.json"
SHARD_FILE = re.compile(r"shard-(\d{5,})\.safetensors")
SHARD_SIZE = 1024
TENSOR = "images"
METADATA = "purifyloader"  # one key only: safetensors writes two in random order

_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_AGAIN = "Precompute into this folder again: it will be made anew, and the shards that verify are kept"


@dataclass(frozen=True)
class Shard:
    """A run of images in one file: `count` of them from index `start` of the dataset."""

    number: int
    start: int
    count: int

    @property
    def file(self) -> str:
        return f"shard-{self.number:05d}.safetensors"


@dataclass(frozen=True)
class ShardHeader:
    """What a shard's file says about itself."""

    shard: Shard
    shard_size: int
    length: int
    fingerprint: str
    config: dict[str, Any]
    sha256: str  # of the tensor's bytes
    image_shape: tuple[int, int, int]
    offset: int  # of the tensor's first byte in the file


@dataclass(frozen=True)
class ShardEntry:
    """What the index says about a shard."""

    file: str
    count: int
    sha256: str  # of the whole file


@dataclass(frozen=True)
class Index:
    """index.json."""

    fingerprint: str
    config: dict[str, Any]
    length: int
    shard_size: int
    image_shape: tuple[int, int, int]
    shards: tuple[ShardEntry, ...]
    plan: dict[str, Any] | None = None


def plain(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as JSON gives it back: tuples are lists, keys are strings.

    Raises:
        ConfigError: it is no JSON object; NaN is not JSON.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a JSON object (a dict). Got {type(value).__name__}.")
    try:
        return json.loads(canonical_json(dict(value)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} must be made of strings, finite numbers, booleans, None, lists and dicts. Got: {error}. "
            "Convert its values first."
        ) from None


def fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of the canonical JSON of a configuration. 1 and 1.0 are different values."""
    return hashlib.sha256(canonical_json(plain("A configuration", config)).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 20) -> str:
    """The keys in which two configurations differ, a line each: `recipe.steps: 4 → 8`."""
    lines: list[str] = []

    def visit(a: Any, b: Any, path: str) -> None:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in sorted({*a, *b}):
                visit(a.get(key, _ABSENT), b.get(key, _ABSENT), f"{path}.{key}" if path else key)
            return
        was, is_now = (str(v) if v is _ABSENT else canonical_json(v) for v in (a, b))
        if was != is_now:
            lines.append(f"  {path}: {_short(was)} → {_short(is_now)}")

    visit(old, new, "")
    if len(lines) > limit:
        lines[limit:] = [f"  and {len(lines) - limit} more"]
    return "\n".join(lines)


class _Absent:
    def __str__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shards_of(length: int, shard_size: int) -> tuple[Shard, ...]:
    """How `length` images are cut up: full shards, the last one shorter."""
    starts = range(0, length, shard_size)
    return tuple(Shard(n, start, min(shard_size, length - start)) for n, start in enumerate(starts))


def read_shard_header(path: Path) -> ShardHeader:
    """A shard's header, checked against itself and against the size of the file. Reads no images.

    Raises:
        CacheError: the file is missing, truncated, not a shard, or of a newer version.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size) if size <= _MAX_HEADER else b""
        header = json.loads(text)
        values = json.loads(header["__metadata__"][METADATA])
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']!r}")
        if values["version"] != VERSION:
            raise CacheError(
                f"{path} must be a shard of version {VERSION}. Got version {values['version']!r}. "
                "Update purifyloader, or delete the folder and precompute again."
            )
        tensor = header[TENSOR]
        shape = tensor["shape"]
        found = ShardHeader(
            shard=Shard(values["shard"], values["start"], values["count"]),
            shard_size=values["shard_size"],
            length=values["length"],
            fingerprint=values["fingerprint"],
            config=values["config"],
            sha256=values["sha256"],
            image_shape=(shape[1], shape[2], shape[3]),
            offset=8 + size,
        )
        if fingerprint(found.config) != found.fingerprint:
            raise ValueError("its configuration does not have its fingerprint")
        if tensor["dtype"] != "U8" or len(shape) != 4 or shape[0] != found.shard.count:
            raise ValueError(f"its tensor is {tensor['dtype']} of shape {shape}")
        if tensor["data_offsets"] != [0, math.prod(shape)]:
            raise ValueError("its tensor is not where it should be")
    except FileNotFoundError:
        raise CacheError(f"A cache holds every shard that its index names. {path} is missing. {_AGAIN}.") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CacheError(f"{path} must be a whole shard. Got a damaged file ({error!r}). {_AGAIN}.") from None
    expected = found.offset + math.prod(shape)
    if (got := path.stat().st_size) != expected:
        raise CacheError(f"{path} must have {expected} bytes. Got {got}: it is damaged. {_AGAIN}.")
    return found


def shard_hashes(path: Path, offset: int) -> tuple[str, str]:
    """SHA-256 of a shard's tensor, which starts at byte `offset`, and of its whole file."""
    with open(path, "rb") as file:
        head = file.read(offset)
        tensor, whole = hashlib.sha256(), hashlib.sha256(head)
        while block := file.read(1 << 20):
            tensor.update(block)
            whole.update(block)
    return tensor.hexdigest(), whole.hexdigest()


def _to_json(index: Index) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": index.fingerprint,
        "config": index.config,
        "length": index.length,
        "shard_size": index.shard_size,
        "image_shape": list(index.image_shape),
        "shards": [{"file": s.file, "count": s.count, "sha256": s.sha256} for s in index.shards],
        "plan": index.plan,
    }


def _sha256(values: Mapping[str, Any]) -> str:
    """The hash by which the index guards itself: of all but the hash."""
    rest = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def write_index(folder: Path, index: Index) -> None:
    values = _to_json(index)
    write_text(folder / INDEX_FILE, canonical_json({**values, "sha256": _sha256(values)}) + "\n")


def read_index(folder: Path) -> Index:
    """index.json of a cache, checked against itself.

    Raises:
        FileNotFoundError: there is none; what that means is the caller's to say.
        CacheError: it is damaged, not the index of a cache, or of a newer version.
    """
    path = folder / INDEX_FILE
    damaged = f"Delete {INDEX_FILE} and precompute into this folder again: shards that verify are kept"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CacheError(f"{path} must be JSON. Got {error}. {damaged}.") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        got = repr(values.get("format")) if isinstance(values, dict) else type(values).__name__
        raise CacheError(
            f"{path} must be the index of a cache, of format {FORMAT!r}. Got {got}. Give the folder of a cache."
        )
    if values.get("version") != VERSION:
        raise CacheError(
            f"{path} must be of version {VERSION}. Got version {values.get('version')!r}. "
            "Update purifyloader, or delete the folder and precompute again."
        )
    try:
        if values["sha256"] != _sha256(values):
            raise ValueError("its content does not have its sha256")
        height, width, channels = values["image_shape"]
        index = Index(
            fingerprint=values["fingerprint"],
            config=values["config"],
            length=values["length"],
            shard_size=values["shard_size"],
            image_shape=(height, width, channels),
            shards=tuple(ShardEntry(s["file"], s["count"], s["sha256"]) for s in values["shards"]),
            plan=values["plan"],
        )
        if fingerprint(index.config) != index.fingerprint:
            raise ValueError("its configuration does not have its fingerprint")
        expected = shards_of(index.length, index.shard_size)
        if [(s.file, s.count) for s in expected] != [(s.file, s.count) for s in index.shards]:
            raise ValueError(f"its shards are not {index.length} images, {index.shard_size} a shard")
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} must be a whole index. Got a damaged or edited one ({error!r}). {damaged}.") from None
    return index
