"""Read and write the files of a cache but for the images; README.md describes the format."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.errors import CacheError, ConfigError, InputError
from purifyloader.files.atomic import canonical_json, write_text

__all__ = [
    "ENCODED",
    "FORMAT",
    "INDEX_FILE",
    "METADATA",
    "PLAN_FILE",
    "SHARD_FILE",
    "SHARD_SIZE",
    "TENSOR",
    "VERSION",
    "WHERE",
    "Index",
    "Layout",
    "OtherVersionError",
    "Plan",
    "Shard",
    "ShardEntry",
    "ShardHeader",
    "ShardValues",
    "check_guard",
    "differences",
    "fingerprint",
    "index_values",
    "own_sha256",
    "parse_index",
    "plain",
    "plan_in_words",
    "read_index",
    "read_plan",
    "read_shard_header",
    "reading",
    "shard_hashes",
    "shard_metadata",
    "shards_of",
    "source_sha256",
    "write_index",
    "write_plan",
]

FORMAT = "purifyloader-cache"
VERSION = 2
INDEX_FILE = "index.json"
PLAN_FILE = "plan.json"
WHERE = "where"  # in the plan of an index: which images are purified
SHARD_FILE = re.compile(r"shard-(\d{5,})\.safetensors")
SHARD_SIZE = 1024
TENSOR = "images"
ENCODED = "encoded"
METADATA = "purifyloader"  # one key only: safetensors writes two in random order
ENCODINGS = ("raw", "png")

_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_REINDEX = f"Delete {INDEX_FILE} and precompute into this folder again: shards that verify are kept"
_AGAIN = "Precompute into this folder again: it will be made anew, and the shards that verify are kept"


class OtherVersionError(CacheError):
    """A cache of a version that this library does not read: not damaged, and not to be made again unasked."""


@dataclass(frozen=True)
class Shard:
    """A run of images in one file: `count` of them from index `start` of the dataset.

    >>> from purifyloader.cache import Layout
    >>> Layout(length=2500).shards[2]
    Shard(number=2, start=2048, count=452)
    """

    number: int
    start: int
    count: int

    @property
    def file(self) -> str:
        return f"shard-{self.number:05d}.safetensors"


@dataclass(frozen=True)
class Layout:
    """How a dataset is cut into files; it decides no pixel.

    Attributes:
        length: images of the dataset.
        shard_size: images of a full shard.
        draws: independent purifications of each image.
        encoding: "raw", images of one size as they are, or "png", images of any sizes.

    >>> from purifyloader.cache import Layout
    >>> [shard.count for shard in Layout(length=2500, shard_size=1024).shards]
    [1024, 1024, 452]
    """

    length: int
    shard_size: int = SHARD_SIZE
    draws: int = 1
    encoding: str = "raw"

    def __post_init__(self) -> None:
        for name in ("length", "shard_size", "draws"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a positive integer. Got {value!r}.")
        if self.encoding not in ENCODINGS:
            raise InputError(f"encoding must be one of {', '.join(ENCODINGS)}. Got {self.encoding!r}.")

    @property
    def shards(self) -> tuple[Shard, ...]:
        return shards_of(self.length, self.shard_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class ShardValues:
    """What a shard holds beside its images.

    Attributes:
        image_types: how each image was held: "pil/uint8/3" is container, dtype and dimensions; one an
            image, or one string for all.
        sample: how a sample is put together, see `purifyloader.datasets.samples.structure_of`; None with `targets`.
        targets: the other fields of each sample, as `purifyloader.cache.values` writes them; None where
            they are not stored.
        source: 64-bit hashes of each source image and of its targets, (count, 2); None if not taken.
        made: device kind and versions.
    """

    image_types: str | tuple[str, ...]
    sample: dict[str, Any] | None
    targets: list[Any] | None
    source: NDArray[np.uint64] | None
    made: dict[str, Any]


@dataclass(frozen=True, eq=False)
class ShardHeader(ShardValues):
    """What a shard's file says about itself: the values beside its images, and

    Attributes:
        shard, layout, config: what it is part of.
        image_shape: (H, W, C) of all images, None where they are encoded.
        sizes: bytes of each encoded row.
        crc32: of each row, as stored.
        tensor_sha256: of the tensor's bytes.
        sha256: by which the header guards itself.
        offset: of the tensor's first byte in the file.
    """

    shard: Shard
    layout: Layout
    config: dict[str, Any]
    image_shape: tuple[int, int, int] | None
    sizes: NDArray[np.int64] | None
    crc32: NDArray[np.uint32]
    tensor_sha256: str
    sha256: str
    offset: int

    @property
    def file_size(self) -> int:
        rows = self.layout.draws * self.shard.count
        return self.offset + (
            int(self.sizes.sum()) if self.sizes is not None else rows * math.prod(self.image_shape or ())
        )


@dataclass(frozen=True)
class ShardEntry:
    """What the index says about a shard.

    Attributes:
        sha256: of the whole file.
        header: by which its metadata guards itself, so that opening a cache need not hash the images.
    """

    file: str
    count: int
    sha256: str
    header: str


@dataclass(frozen=True)
class Index:
    """index.json.

    Attributes:
        identity: what the cache is, and what the fingerprint is the SHA-256 of.
        made: how many shards were made with which device kind and versions.
        notes: for people, and decides nothing.
    """

    identity: dict[str, Any]
    layout: Layout
    image_shape: tuple[int, int, int] | None
    shards: tuple[ShardEntry, ...]
    made: tuple[dict[str, Any], ...] = ()
    notes: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        return self.identity["config"]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)


@dataclass(frozen=True)
class Plan:
    """plan.json: which images an unfinished cache purifies, until its index says so.

    Attributes:
        config, length: of the cache that it is part of.
        device: the kind that it was made on.
        found: what `purifyloader.purified.plans` found, with conditions and a sanitation.
    """

    config: dict[str, Any]
    length: int
    device: str
    found: dict[str, Any]


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
    """SHA-256, in hex, of the canonical JSON of a configuration. 1 and 1.0 are different values.

    >>> from purifyloader.cache import fingerprint
    >>> fingerprint({"seed": 0})[:12]
    'bd0488843468'
    """
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


def shard_metadata(
    shard: Shard,
    layout: Layout,
    config: Mapping[str, Any],
    values: ShardValues,
    *,
    crc32: Sequence[int],
    sizes: Sequence[int] | None,
    tensor_sha256: str,
) -> str:
    """The canonical JSON that stands in a shard's header."""
    types, source = values.image_types, values.source
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "shard": shard.number,
        "start": shard.start,
        "count": shard.count,
        "layout": layout.to_dict(),
        "config": config,
        "fingerprint": fingerprint(config),
        "crc32": list(crc32),
        "sizes": None if sizes is None else list(sizes),
        "image_types": types if isinstance(types, str) else list(types),
        "sample": values.sample,
        "targets": values.targets,
        "source": None if source is None else [_hex_words(source[:, 0]), _hex_words(source[:, 1])],
        "made": values.made,
        "tensor_sha256": tensor_sha256,
    }
    return _guarded(metadata)


def _hex_words(words: NDArray[np.uint64]) -> str:
    """64-bit words, big endian, 16 hex digits each."""
    return words.astype(">u8").tobytes().hex()


def _words(text: str, count: int) -> NDArray[np.uint64]:
    data = np.frombuffer(bytes.fromhex(text), dtype=">u8").astype(np.uint64)
    if len(data) != count:
        raise ValueError(f"it has {len(data)} source hashes for {count} images")
    return data


@contextmanager
def reading(path: Path, what: str, again: str) -> Iterator[None]:
    """Turn what goes wrong when a file is read into a `CacheError`; that there is none is the caller's to explain."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error}. Check the disk and its permissions.") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CacheError(f"{path} is damaged or edited, and not a whole {what} ({error!r}). {again}.") from None


def check_guard(values: Any, path: Path, kind: str = FORMAT, version: int = VERSION) -> None:
    """Check the format, version and hash that a header, an index, a plan or a manifest says of itself.

    Raises:
        ValueError: it is of another format, or edited.
        OtherVersionError: it is of another version.
    """
    if values["format"] != kind:
        raise ValueError(f"its format is {values['format']!r}, not {kind!r}")
    if values["version"] != version:
        raise OtherVersionError(
            f"{path} must be of version {version}. Got version {values['version']!r}. "
            "Use the purifyloader that wrote it, or delete the folder and precompute again."
        )
    if values["sha256"] != own_sha256(values):
        raise ValueError("its content does not have its sha256")


def _guarded(values: Mapping[str, Any]) -> str:
    return canonical_json({**values, "sha256": own_sha256(values)})


def read_shard_header(path: Path) -> ShardHeader:
    """A shard's header, checked against itself and against the size of the file. Reads no images.

    Raises:
        CacheError: the file is missing, truncated, not a shard, or of another version.
    """
    try:
        with reading(path, "shard", _AGAIN):
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                text = file.read(size) if size <= _MAX_HEADER else b""
            outer = json.loads(text)
            metadata = json.loads(outer["__metadata__"][METADATA])
            check_guard(metadata, path)
            header = _shard_header(metadata, outer, 8 + size)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(f"A cache holds every shard that its index names. {path} is missing. {_AGAIN}.") from None
    if (size := path.stat().st_size) != header.file_size:
        raise CacheError(f"{path} must have {header.file_size} bytes. Got {size}: it is damaged. {_AGAIN}.")
    return header


def _shard_header(values: dict[str, Any], outer: dict[str, Any], offset: int) -> ShardHeader:
    layout = Layout(**values["layout"])
    shard = Shard(values["shard"], values["start"], values["count"])
    rows = layout.draws * shard.count
    if fingerprint(values["config"]) != values["fingerprint"]:
        raise ValueError("its configuration does not have its fingerprint")
    if len(values["crc32"]) != rows:
        raise ValueError(f"it has {len(values['crc32'])} checksums for {rows} images")
    types = values["image_types"]
    sizes = values["sizes"]
    tensor = outer[TENSOR if sizes is None else ENCODED]
    shape = tensor["shape"]
    expected = 4 if sizes is None else 1
    if tensor["dtype"] != "U8" or len(shape) != expected or shape[0] != (rows if sizes is None else sum(sizes)):
        raise ValueError(f"its tensor is {tensor['dtype']} of shape {shape}")
    if tensor["data_offsets"] != [0, math.prod(shape)]:
        raise ValueError("its tensor is not where it should be")
    source = values["source"]
    return ShardHeader(
        shard=shard,
        layout=layout,
        config=values["config"],
        image_shape=(shape[1], shape[2], shape[3]) if sizes is None else None,
        sizes=None if sizes is None else np.array(sizes, np.int64),
        crc32=np.array(values["crc32"], np.uint32),
        image_types=types if isinstance(types, str) else tuple(types),
        sample=values["sample"],
        targets=values["targets"],
        source=None if source is None else np.stack([_words(words, shard.count) for words in source], axis=1),
        made=values["made"],
        tensor_sha256=values["tensor_sha256"],
        sha256=values["sha256"],
        offset=offset,
    )


def shard_hashes(path: Path, offset: int) -> tuple[str, str]:
    """SHA-256 of a shard's tensor, which starts at byte `offset`, and of its whole file."""
    with open(path, "rb") as file:
        head = file.read(offset)
        tensor, whole = hashlib.sha256(), hashlib.sha256(head)
        while block := file.read(1 << 20):
            tensor.update(block)
            whole.update(block)
    return tensor.hexdigest(), whole.hexdigest()


def source_sha256(hashes: NDArray[np.uint64] | None) -> dict[str, str] | None:
    """The identity of a source: SHA-256 over the 64-bit hashes of all its images, and of all their targets."""
    if hashes is None:
        return None
    images, targets = (hashlib.sha256(hashes[:, i].astype(">u8").tobytes()).hexdigest() for i in (0, 1))
    return {"images": images, "targets": targets}


def own_sha256(values: Mapping[str, Any]) -> str:
    """The hash by which an index, a header or a manifest guards itself: of all but the hash."""
    rest = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def index_values(index: Index) -> dict[str, Any]:
    """index.json as JSON: the inverse of `parse_index`."""
    values = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": index.fingerprint,
        "identity": index.identity,
        "layout": index.layout.to_dict(),
        "image_shape": None if index.image_shape is None else list(index.image_shape),
        "shards": [asdict(entry) for entry in index.shards],
        "made": list(index.made),
        "notes": index.notes,
        "plan": index.plan,
    }
    return {**values, "sha256": own_sha256(values)}


def write_index(folder: Path, index: Index) -> None:
    write_text(folder / INDEX_FILE, canonical_json(index_values(index)) + "\n")


def read_index(folder: Path) -> Index:
    """index.json of a cache, checked against itself.

    Raises:
        FileNotFoundError: there is none; what that means is the caller's to say.
        CacheError: it is damaged, not the index of a cache, or of another version.
    """
    path = folder / INDEX_FILE
    with reading(path, "index", _REINDEX):
        data = path.read_bytes()
        values = json.loads(data)
        index = parse_index(values, path)
        if data != (canonical_json(values) + "\n").encode():
            raise ValueError("its white space is not that of canonical JSON")
    return index


def parse_index(values: Any, path: Path) -> Index:
    """The index that the JSON of an index.json says, checked against itself; `path` names it in errors.

    Raises:
        CacheError: as `read_index`.
    """
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        kind = repr(values.get("format")) if isinstance(values, dict) else type(values).__name__
        raise CacheError(f"{path} is not the index of a cache: its format is {kind}. Give the folder of a cache.")
    with reading(path, "index", _REINDEX):
        check_guard(values, path)
        shape = values["image_shape"]
        index = Index(
            identity=values["identity"],
            layout=Layout(**values["layout"]),
            image_shape=None if shape is None else (shape[0], shape[1], shape[2]),
            shards=tuple(ShardEntry(**entry) for entry in values["shards"]),
            made=tuple(values["made"]),
            notes=values["notes"],
            plan=values["plan"],
        )
        if not isinstance(index.identity, dict) or not isinstance(index.identity.get("config"), dict):
            raise ValueError("its identity has no configuration")
        if not all(value is None or isinstance(value, dict) for value in (index.notes, index.plan)):
            raise ValueError("its notes and its plan are no objects")
        if index.fingerprint != values["fingerprint"]:
            raise ValueError("its identity does not have its fingerprint")
        if len(index.shards) != -(-index.layout.length // index.layout.shard_size):
            raise ValueError(f"it names {len(index.shards)} shards for {index.layout}")
        # names are compared with those that the layout gives, so that none can point outside the folder
        if [(s.file, s.count) for s in index.layout.shards] != [(s.file, s.count) for s in index.shards]:
            raise ValueError(f"its shards are not those of {index.layout}")
    return index


def plan_in_words(condition: Mapping[str, Any]) -> str:
    """A line about the configuration of a condition with its plan: for people."""
    planned = condition["planned"]
    share = f"k {condition['k']:g}: " if "k" in condition else ""
    return (
        f"{share}{planned['purified']:,} of {planned['images']:,} images purified, {condition['kind']} "
        f"{planned['threshold']:.8g}"
    )


def write_plan(folder: Path, plan: Plan) -> None:
    write_text(folder / PLAN_FILE, _guarded({"format": FORMAT, "version": VERSION, **asdict(plan)}) + "\n")


def read_plan(folder: Path) -> Plan:
    """plan.json of an unfinished cache, checked against itself.

    Raises:
        FileNotFoundError: there is none.
        CacheError: it is damaged, no plan of a cache, or of another version.
    """
    path = folder / PLAN_FILE
    with reading(path, "plan", _AGAIN):
        values = json.loads(path.read_bytes())
        check_guard(values, path)
        plan = Plan(values["config"], values["length"], values["device"], values["found"])
        if not isinstance(plan.config, dict) or not isinstance(plan.found["conditions"], list):
            raise ValueError("it has no conditions")
    return plan
