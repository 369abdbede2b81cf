"""Read and write the files of a cache; README.md describes the format."""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from purifyloader.cache import content
from purifyloader.cache import values as values_of_samples
from purifyloader.core.checks import check_choice, check_integer
from purifyloader.errors import CacheError, ConfigError, InputError, PurifyError
from purifyloader.files.atomic import canonical_json, write_text
from purifyloader.files.json import parse_json, read_json, read_text
from purifyloader.files.opening import opened

FORMAT = "purifyloader-cache"
VERSION = 3
FORMER = 2
"""The version before, in whose configurations models had no function: read and verified, and never added to."""

INDEX_FILE = "index.json"
PLAN_FILE = "plan.json"
CLAIM_FILE = "claim.json"
WHERE = "where"  # in the plan of an index: which images are purified
SHARD_FILE = re.compile(r"shard-(\d{5,})\.safetensors")
SHARD_SIZE = 1024
TENSOR = "images"
ENCODED = "encoded"
METADATA = "purifyloader"  # one key only: safetensors writes two in random order
ENCODINGS = ("raw", "png")

_ABSENT = object()
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_MAX_INDEX = 2**29  # bytes
_DEEPEST = 4 * values_of_samples.DEEPEST  # of a shard's header, in JSON
_SHARDS, _IMAGES, _DRAWS = 1_000_000, 2**40, 2**20
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

    def batches(self, size: int) -> list[list[int]]:
        """Cut its positions in the dataset into batches."""
        end = self.start + self.count
        return [list(range(at, min(at + size, end))) for at in range(self.start, end, size)]


@dataclass(frozen=True)
class Layout:
    """A dataset cut into files, at most a million; it decides no pixel.

    Attributes:
        length: images of the dataset.
        shard_size: images of a full shard.
        draws: independent purifications of each image.
        encoding: "raw" for images of one size, or "png" for any.

    >>> from purifyloader.cache import Layout
    >>> [shard.count for shard in Layout(length=2500, shard_size=1024).shards]
    [1024, 1024, 452]
    """

    length: int
    shard_size: int = SHARD_SIZE
    draws: int = 1
    encoding: str = "raw"

    def __post_init__(self) -> None:
        for name, high in (("length", _IMAGES), ("shard_size", _IMAGES), ("draws", _DRAWS)):
            check_integer(name, getattr(self, name), 1, error=InputError)
            check_integer(name, getattr(self, name), 1, high, error=InputError)
        check_choice("encoding", self.encoding, ENCODINGS, error=InputError)
        if self.shard_count > _SHARDS:
            raise InputError(
                f"A cache has at most {_SHARDS:,} shards. Got {self.length:,} images in shards of {self.shard_size:,}: "
                "give a larger shard_size."
            )

    @property
    def shard_count(self) -> int:
        return -(-self.length // self.shard_size)

    def shard(self, number: int) -> Shard:
        start = number * self.shard_size
        return Shard(number, start, min(self.shard_size, self.length - start))

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(map(self.shard, range(self.shard_count)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class ShardValues:
    """A shard holds these beside its images."""

    image_types: str | tuple[str, ...]  # "pil/uint8/3" is container, dtype, dimensions: one an image, or one for all
    sample: dict[str, Any] | None  # how a sample is put together, as `samples.structure_of` says; None with `targets`
    targets: list[Any] | None  # its other fields, as `purifyloader.cache.values` writes them; None if not stored
    source: NDArray[np.uint64] | None  # hashes of each source image and of its targets, (count, 2); None if not taken
    made: dict[str, Any]  # kind of device and versions


@dataclass(frozen=True, eq=False)
class ShardHeader(ShardValues):
    """A shard's file says this about itself."""

    shard: Shard
    layout: Layout
    config: dict[str, Any]
    image_shape: tuple[int, int, int] | None  # (H, W, C) of all images; None where they are encoded
    sizes: NDArray[np.int64] | None  # bytes of each encoded row
    crc32: NDArray[np.uint32]  # of each row, as stored
    tensor_sha256: str
    sha256: str  # by which the header guards itself
    offset: int  # of the tensor's first byte in the file
    version: int = VERSION

    @property
    def file_size(self) -> int:
        rows = self.layout.draws * self.shard.count
        return self.offset + (
            int(self.sizes.sum()) if self.sizes is not None else rows * math.prod(self.image_shape or ())
        )


@dataclass(frozen=True)
class ShardEntry:
    """The index says this about a shard."""

    file: str
    count: int
    sha256: str  # of the whole file
    header: str  # the header's own sha256, so that opening a cache need not hash the images


@dataclass(frozen=True)
class Index:
    """The content of index.json."""

    identity: dict[str, Any]  # the fingerprint is its SHA-256
    layout: Layout
    image_shape: tuple[int, int, int] | None
    shards: tuple[ShardEntry, ...]
    made: tuple[dict[str, Any], ...] = ()  # how many shards were made with which kind of device and versions
    notes: dict[str, Any] | None = None  # for people; they decide nothing
    plan: dict[str, Any] | None = None
    version: int = VERSION

    @property
    def config(self) -> dict[str, Any]:
        return self.identity["config"]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)


@dataclass(frozen=True)
class Plan:
    """The content of plan.json: which images an unfinished cache purifies, until its index says so."""

    config: dict[str, Any]
    length: int
    device: str  # the kind that it was made on
    found: dict[str, Any]  # as `purifyloader.purified.plans` writes it: conditions, and a sanitation
    version: int = VERSION


@dataclass(frozen=True)
class Claim:
    """The content of claim.json: which cache a folder is for, from before its first shard on."""

    config: dict[str, Any]
    layout: Layout
    made: dict[str, Any]  # kind of device and versions of whoever made the first shard, or is about to
    version: int = VERSION


def plain(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return `value` as JSON gives it back: tuples are lists, keys are strings. `ConfigError` for no JSON object."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a JSON object (a dict). Got {type(value).__name__}.")
    try:
        return parse_json(canonical_json(dict(value)))  # as strict as those who read it
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} must be made of Unicode strings, finite numbers, booleans, None, lists and dicts. Got: {error}. "
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
    """List the keys in which two configurations differ, a line each: `recipe.steps: 4 → 8`."""
    lines: list[str] = []

    def visit(a: Any, b: Any, path: str) -> None:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in sorted({*a, *b}):
                visit(a.get(key, _ABSENT), b.get(key, _ABSENT), f"{path}.{key}" if path else key)
            return
        was, is_now = ("absent" if v is _ABSENT else canonical_json(v) for v in (a, b))
        if was != is_now:
            lines.append(f"  {path}: {_short(was)} → {_short(is_now)}")

    visit(old, new, "")
    if len(lines) > limit:
        lines[limit:] = [f"  and {len(lines) - limit} more"]
    return "\n".join(lines)


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def save_shard(
    path: Path,
    shard: Shard,
    layout: Layout,
    config: Mapping[str, Any],
    content: NDArray[np.uint8] | Sequence[bytes],
    beside: ShardValues,
    version: int = VERSION,
) -> None:
    """Write a shard's file straight to `path`: raw images, uint8 (rows, H, W, C), or a PNG file each."""
    if isinstance(content, np.ndarray):
        name, sizes = TENSOR, None
        data = np.ascontiguousarray(content)
        rows: Sequence[Any] = [row.data for row in data]
    else:
        name, sizes = ENCODED, [len(row) for row in content]
        data = np.frombuffer(b"".join(content), np.uint8)
        rows = content
    types, source = beside.image_types, beside.source
    metadata = {
        "format": FORMAT,
        "version": version,
        "shard": shard.number,
        "start": shard.start,
        "count": shard.count,
        "layout": layout.to_dict(),
        "config": config,
        "fingerprint": fingerprint(config),
        "crc32": [zlib.crc32(row) for row in rows],
        "sizes": sizes,
        "image_types": types if isinstance(types, str) else list(types),
        "sample": beside.sample,
        "targets": beside.targets,
        "source": None if source is None else [words.astype(">u8").tobytes().hex() for words in source.T],
        "made": beside.made,
        "tensor_sha256": hashlib.sha256(data.data).hexdigest(),
    }
    # not save_file, whose own temporary file a killed process leaves under a name that is not ours
    path.write_bytes(save({name: data}, {METADATA: canonical_json(guarded(metadata))}))


@contextmanager
def reading(path: Path, what: str, again: str) -> Iterator[None]:
    """Raise `CacheError` for what goes wrong as a file is read; that there is none is the caller's to explain."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error}. Check the disk and its permissions.") from None
    except CacheError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, PurifyError) as error:
        raise CacheError(f"{path} is damaged or edited, and not a whole {what} ({error!r:.500}). {again}.") from None


def check_guard(values: Any, path: Path, kind: str = FORMAT, versions: Sequence[int] = (FORMER, VERSION)) -> None:
    """Check the format, version and hash that a header, an index, a plan or a manifest says of itself.

    Raises `ValueError` for another format or an edit, `OtherVersionError` for another version.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it is no object, but {values!r:.80}")
    if values["format"] != kind:
        raise ValueError(f"its format is {values['format']!r}, not {kind!r}")
    if type(values["version"]) is not int or values["version"] not in versions:
        raise OtherVersionError(
            f"{path} must be of version {' or '.join(map(str, versions))}. Got version {values['version']!r}. "
            "Use the purifyloader that wrote it, or delete the folder and precompute again."
        )
    if values["sha256"] != guarded(values)["sha256"]:
        raise ValueError("its content does not have its sha256")


def counted_makings(headers: Iterable[ShardHeader]) -> tuple[dict[str, Any], ...]:
    """List each different `made`, and how many shards were made so."""
    counts = Counter(canonical_json(header.made) for header in headers)
    return tuple({**json.loads(text), "shards": count} for text, count in sorted(counts.items()))


def guarded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the hash of all the rest, which `check_guard` checks."""
    rest = {key: value for key, value in values.items() if key != "sha256"}
    return {**rest, "sha256": hashlib.sha256(canonical_json(rest).encode()).hexdigest()}


def read_shard_header(path: Path) -> ShardHeader:
    """Read a shard's header, checked against itself and the size of the file; reads no images.

    Raises `CacheError` for a file that is missing, truncated, no shard, or of another version.
    """
    try:
        with reading(path, "shard", _AGAIN):
            with opened(path) as file:
                size = int.from_bytes(file.read(8), "little")
                text = file.read(size) if size <= _MAX_HEADER else b""
            outer = parse_json(text, _MAX_HEADER)
            metadata = parse_json(outer["__metadata__"][METADATA], _MAX_HEADER, any_value=True, deepest=_DEEPEST)
            check_guard(metadata, path)
            header = _shard_header(metadata, outer, 8 + size)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(f"A cache holds every shard that its index names. {path} is missing. {_AGAIN}.") from None
    if (size := path.stat().st_size) != header.file_size:
        raise CacheError(f"{path} must have {header.file_size} bytes. Got {size}: it is damaged. {_AGAIN}.")
    return header


def _shard_header(values: dict[str, Any], outer: dict[str, Any], offset: int) -> ShardHeader:
    layout = Layout(**values["layout"])
    number, start, count = content.integers("place", [values[name] for name in ("shard", "start", "count")])
    shard = Shard(number, start, count)
    if number >= layout.shard_count or shard != layout.shard(number):
        raise ValueError(f"its place, {shard}, is none of {layout}")
    rows = layout.draws * shard.count
    if not isinstance(values["config"], dict) or fingerprint(values["config"]) != values["fingerprint"]:
        raise ValueError("its configuration does not have its fingerprint")
    crc32 = content.integers("checksums", values["crc32"], rows, 2**32)
    sizes = None if values["sizes"] is None else content.integers("sizes", values["sizes"], rows)
    name = TENSOR if sizes is None else ENCODED
    shape = content.shape_of(outer[name], name)
    if len(shape) != (4 if sizes is None else 1) or shape[0] != (rows if sizes is None else sum(sizes)):
        raise ValueError(f"its tensor is of shape {shape!r:.80}")
    content.text(values, "tensor_sha256", "sha256")
    content.check_sample(values["sample"])
    content.check_made(values["made"])
    targets = values["targets"]
    if targets is not None and (not isinstance(targets, list) or len(targets) != count):
        raise ValueError(f"its targets are not those of {count} images")
    return ShardHeader(
        shard=shard,
        layout=layout,
        config=values["config"],
        image_shape=content.image_shape(shape[1:]) if sizes is None else None,
        sizes=None if sizes is None else np.array(sizes, np.int64),
        crc32=np.array(crc32, np.uint32),
        image_types=content.image_types(values["image_types"], count),
        sample=values["sample"],
        targets=targets,
        source=content.source_hashes(values["source"], count),
        made=values["made"],
        tensor_sha256=values["tensor_sha256"],
        sha256=values["sha256"],
        offset=offset,
        version=values["version"],
    )


def shard_hashes(path: Path, offset: int) -> tuple[str, str]:
    """Return the SHA-256 of a shard's tensor, which starts at byte `offset`, and of its whole file."""
    with opened(path) as file:
        head = file.read(offset)
        tensor, whole = hashlib.sha256(), hashlib.sha256(head)
        while block := file.read(1 << 20):
            tensor.update(block)
            whole.update(block)
    return tensor.hexdigest(), whole.hexdigest()


def source_sha256(hashes: NDArray[np.uint64] | None) -> dict[str, str] | None:
    """Identify a source: SHA-256 over the 64-bit hashes of all its images, and of all their targets."""
    if hashes is None:
        return None
    images, targets = (hashlib.sha256(hashes[:, i].astype(">u8").tobytes()).hexdigest() for i in (0, 1))
    return {"images": images, "targets": targets}


def index_values(index: Index) -> dict[str, Any]:
    """Write index.json as JSON: the inverse of `parse_index`."""
    return guarded(
        {
            "format": FORMAT,
            "version": index.version,
            "fingerprint": index.fingerprint,
            "identity": index.identity,
            "layout": index.layout.to_dict(),
            "image_shape": None if index.image_shape is None else list(index.image_shape),
            "shards": [asdict(entry) for entry in index.shards],
            "made": list(index.made),
            "notes": index.notes,
            "plan": index.plan,
        }
    )


def write_index(folder: Path, index: Index) -> None:
    write_text(folder / INDEX_FILE, canonical_json(index_values(index)) + "\n")


def read_index(folder: Path) -> Index:
    """Read index.json of a cache, checked against itself.

    Raises `FileNotFoundError` where there is none, `CacheError` where it is damaged, foreign or of another version.
    """
    path = folder / INDEX_FILE
    with reading(path, "index", _REINDEX):
        data = read_text(path, _MAX_INDEX)
        values = parse_json(data, _MAX_INDEX)
        index = parse_index(values, path)
        if data != canonical_json(values) + "\n":
            raise ValueError("its white space is not that of canonical JSON")
    return index


def parse_index(values: Any, path: Path) -> Index:
    """Make the index that the JSON of an index.json says, checked as in `read_index`; `path` names it in errors."""
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        kind = repr(values.get("format")) if isinstance(values, dict) else type(values).__name__
        raise CacheError(f"{path} is not the index of a cache: its format is {kind}. Give the folder of a cache.")
    with reading(path, "index", _REINDEX):
        check_guard(values, path)
        shape = values["image_shape"]
        content.check_identity(values["identity"])
        content.check_notes(values["notes"])
        content.optional_object(values, "plan")
        layout, shards = Layout(**values["layout"]), values["shards"]
        if not isinstance(shards, list) or len(shards) != layout.shard_count:
            raise ValueError(f"it does not name the shards of {layout}")
        for entry in shards:
            content.text(entry, "file", "sha256", "header")
        for made in values["made"]:
            content.check_made(made, counted=True)
        if values["plan"] is not None and WHERE in values["plan"]:
            content.check_where(values["plan"][WHERE])
        index = Index(
            identity=values["identity"],
            layout=layout,
            image_shape=None if shape is None else content.image_shape(shape),
            shards=tuple(ShardEntry(**entry) for entry in shards),
            made=tuple(values["made"]),
            notes=values["notes"],
            plan=values["plan"],
            version=values["version"],
        )
        if index.fingerprint != values["fingerprint"]:
            raise ValueError("its identity does not have its fingerprint")
        # names are compared with those that the layout gives, so that none can point outside the folder
        if [(s.file, s.count) for s in index.layout.shards] != [(s.file, s.count) for s in index.shards]:
            raise ValueError(f"its shards are not those of {index.layout}")
    return index


def plan_in_words(condition: Mapping[str, Any]) -> str:
    """Describe the configuration of a condition with its plan, in a line for people."""
    planned = condition["planned"]
    share = f"k {condition['k']:g}: " if "k" in condition else ""
    return (
        f"{share}{planned['purified']:,} of {planned['images']:,} images purified, {condition['kind']} "
        f"{planned['threshold']:.8g}"
    )


def version_of(folder: Path) -> int | None:
    """Return the version of the cache in a folder, finished or not; None where nothing there can be read."""
    shards = sorted(folder.glob("shard-*.safetensors"))
    readings: list[tuple[Callable[[Path], Index | ShardHeader | Plan], Path]] = [(read_index, folder)]
    readings += [*((read_shard_header, path) for path in shards), (read_plan, folder)]
    for read, path in readings:
        try:
            return read(path).version
        except (OSError, CacheError):
            continue
    return None


def by_former_rule(folder: Path, former: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the configuration asked for as a cache of version 2 has it, which `former` gives.

    Raises `CacheError` where `former` raises `ConfigError`, because that cache does not say enough of a model.
    """
    try:
        return plain("The configuration of a cache", former())
    except ConfigError as error:
        raise CacheError(
            f"A cache of version {FORMER}, as {folder} is, tells models apart by their weights alone, which is enough "
            f"for those that ship with purifyloader. Got another. {str(error).strip()}\n"
            f"Precompute into another folder, or use the purifyloader that wrote this one."
        ) from None


def no_more_of(folder: Path, lacks: str) -> CacheError:
    """Say why a cache of version 2 is neither finished nor repaired, by whoever finds that it `lacks` something."""
    return CacheError(
        f"A cache of version {FORMER} is read, and not added to, for it does not say all that decides its pixels. Got "
        f"{folder}, which {lacks}. Delete the folder and precompute again, or finish it with the purifyloader that "
        "wrote it."
    )


def write_plan(folder: Path, plan: Plan) -> None:
    values = guarded({"format": FORMAT, **asdict(plan)})
    write_text(folder / PLAN_FILE, canonical_json(values) + "\n")


def read_plan(folder: Path) -> Plan:
    """Read plan.json of an unfinished cache; raises as `read_index` does."""
    path = folder / PLAN_FILE
    with reading(path, "plan", _AGAIN):
        values = read_json(path)
        check_guard(values, path)
        content.check_where(values["found"])
        content.text(values, "device")
        content.integers("length", [values["length"]])
        plan = Plan(values["config"], values["length"], values["device"], values["found"], values["version"])
        if not isinstance(plan.config, dict):
            raise ValueError("it has no configuration")
    return plan


def claim_text(claim: Claim) -> str:
    """Write claim.json: the inverse of `read_claim`."""
    return canonical_json(guarded({"format": FORMAT, **asdict(claim)})) + "\n"


def read_claim(folder: Path) -> Claim:
    """Read claim.json of the folder of a cache, finished or not; raises as `read_index` does."""
    path = folder / CLAIM_FILE
    with reading(path, "claim", _AGAIN):
        data = read_text(path)
        values = parse_json(data)
        check_guard(values, path)
        claim = Claim(values["config"], Layout(**values["layout"]), values["made"], values["version"])
        if not isinstance(claim.config, dict) or not isinstance(claim.made, dict):
            raise ValueError("it has no configuration")
        if data != claim_text(claim):
            raise ValueError("its white space is not that of canonical JSON")
    return claim
