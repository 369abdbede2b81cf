"""Describe the folder of a cache in any state, from its headers alone, and check every byte of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from purifyloader.cache import format as fmt
from purifyloader.cache.format import Index, Layout, Shard, ShardHeader
from purifyloader.cache.reader import CacheReader
from purifyloader.errors import CacheError
from purifyloader.files.atomic import canonical_json
from purifyloader.files.locks import is_held, lock_path

_DIGITS = 18  # of the number of a shard, which has fewer
_THREADS = 4  # hashing lets go of the interpreter
_InWords = Callable[[Mapping[str, Any]], str]
_CHANNELS = {1: "grey", 2: "grey + alpha", 3: "RGB", 4: "RGBA"}


@dataclass
class Folder:
    """The content of the folder of a cache, whole or not."""

    path: Path
    index: Index | None = None  # None where there is none, or a damaged one
    layout: Layout | None = None  # by the index, the first shard that reads, or the claim; None where none does
    config: dict[str, Any] = field(default_factory=dict)
    version: int = fmt.VERSION
    headers: dict[int, ShardHeader] = field(default_factory=dict)  # by number, of this cache's shards, without targets
    wrong: dict[str, str] = field(default_factory=dict)  # what is wrong with a shard or index that is there
    targets: list[bool] = field(default_factory=list)  # True for each shard that reads and stores its targets
    strangers: list[str] = field(default_factory=list)  # files that are no part of a cache

    def shard_of(self, name: str) -> Shard | None:
        """Return the shard of the layout whose file has this name; None where there is none."""
        match = fmt.SHARD_FILE.fullmatch(name)
        number = int(match[1]) if match is not None and len(match[1]) <= _DIGITS else None
        if self.layout is None or number is None or number >= self.layout.shard_count:
            return None
        shard = self.layout.shard(number)
        return shard if shard.file == name else None

    @property
    def in_work(self) -> list[str]:
        """Name the shards that are missing or wrong, and that a process is making now."""
        hidden = (file.name for file in self.path.iterdir() if file.name.startswith("."))
        locked = (name for name in hidden if lock_path(self.path, name[1:].removesuffix(".lock")).name == name)
        names = [name[1:].removesuffix(".lock") for name in locked]
        shards = [(name, self.shard_of(name)) for name in names]
        lacking = [n for n, shard in shards if n in self.wrong or (shard and shard.number not in self.headers)]
        return [name for name in lacking if is_held(lock_path(self.path, name))]

    @property
    def missing(self) -> list[str]:
        shards = () if self.layout is None else self.layout.shards
        return [s.file for s in shards if s.number not in self.headers and s.file not in self.wrong]

    @property
    def state(self) -> str:
        if self.wrong or (self.index is not None and self.missing):
            return "damaged"
        return "unfinished" if self.index is None else "finished"

    @property
    def size(self) -> int:
        return sum((self.path / name).stat().st_size for name in self.names() if name not in self.strangers)

    @property
    def shard_bytes(self) -> int:
        return sum(header.file_size for header in self.headers.values())

    @property
    def where(self) -> dict[str, Any]:
        """The plan: of the index or, of an unfinished cache, the one that it has so far."""
        if self.index is not None:
            where = (self.index.plan or {}).get(fmt.WHERE)
        else:
            try:
                where = fmt.read_plan(self.path).found
            except (OSError, CacheError):
                where = None
        return where if isinstance(where, dict) and isinstance(where.get("conditions"), list) else {"conditions": []}

    def names(self) -> list[str]:
        return sorted(file.name for file in self.path.iterdir() if not file.name.startswith("."))


def read_folder(path: Path) -> Folder:
    """Read the headers of the folder of a cache, finished or not.

    Raises `CacheError` where there is no cache, or one of another version.
    """
    path = path.absolute()
    if not path.is_dir():
        raise CacheError(f"A cache is a folder. Got {path}, which is none. Check the path.")
    folder = Folder(path)
    other: CacheError | None = None
    names = folder.names()
    shards = [name for name in names if fmt.SHARD_FILE.fullmatch(name)]
    try:
        folder.index = fmt.read_index(path)
        folder.layout, folder.config, folder.version = folder.index.layout, folder.index.config, folder.index.version
    except FileNotFoundError:
        if not shards and fmt.CLAIM_FILE not in names:
            raise CacheError(
                f"The folder of a cache holds {fmt.INDEX_FILE} and shards. Got {path}, which has neither. "
                "Check the path, or precompute into it."
            ) from None
    except CacheError as error:
        if not shards:
            raise
        folder.wrong[fmt.INDEX_FILE] = str(error)
        other = error if isinstance(error, fmt.OtherVersionError) else other
    for name in shards:
        try:
            _read_shard(folder, name)
        except CacheError as error:
            folder.wrong[name] = str(error)
            other = error if isinstance(error, fmt.OtherVersionError) else other
    try:
        _read_claim(folder)
    except FileNotFoundError:  # of before
        pass
    except CacheError as error:
        folder.wrong[fmt.CLAIM_FILE] = str(error)
        other = error if isinstance(error, fmt.OtherVersionError) else other
    if other is not None and folder.layout is None:
        raise other  # a cache of that version; among files of ours it is one that is damaged
    own = {fmt.INDEX_FILE, fmt.PLAN_FILE, fmt.CLAIM_FILE, *(shards if folder.layout is None else ())}
    folder.strangers = sorted(name for name in names if name not in own and folder.shard_of(name) is None)
    for name in folder.strangers:
        folder.wrong.pop(name, None)
    return folder


def _read_claim(folder: Folder) -> None:
    claim = fmt.read_claim(folder.path)
    if folder.layout is None and not folder.wrong:  # no shard is there yet
        folder.layout, folder.config, folder.version = claim.layout, claim.config, claim.version
        return
    own = (folder.layout, folder.config, folder.version)
    if folder.layout is not None and (claim.layout, claim.config, claim.version) != own:
        folder.wrong[fmt.CLAIM_FILE] = f"{folder.path / fmt.CLAIM_FILE} must be of this cache. Got one of another."


def _read_shard(folder: Folder, name: str) -> None:
    path = folder.path / name
    header = fmt.read_shard_header(path)
    if folder.layout is None:
        folder.layout, folder.config, folder.version = header.layout, header.config, header.version
    if (shard := folder.shard_of(name)) is None:
        return
    named = header.sha256 if folder.index is None else folder.index.shards[shard.number].header
    own = (shard, folder.layout, folder.config, folder.version)
    if (header.shard, header.layout, header.config, header.version) != own:
        folder.wrong[name] = f"{path} must be a shard of this cache. Got one of another."
    elif header.sha256 != named:
        folder.wrong[name] = (
            f"{path} must have the header that the index names, {named[:12]}. Got {header.sha256[:12]}."
        )
    else:
        folder.targets.append(header.targets is not None)
        folder.headers[shard.number] = replace(header, targets=None)


def describe(path: Path) -> dict[str, Any]:
    """Describe the folder of a cache, finished or not, as JSON (`purifyloader cache info`); raises as `read_folder`."""
    folder = read_folder(path)
    with _legible(path):
        return _described(folder)


@contextmanager
def _legible(path: object) -> Iterator[None]:
    """Raise `CacheError` for a configuration or notes in which a value is of another kind than this library writes."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CacheError(
            f"{path} must say what is in it as purifyloader does. Got values of another kind ({error!r:.200}): it was "
            "edited, or made by something else. Precompute into another folder."
        ) from None


def _described(folder: Folder) -> dict[str, Any]:
    layout, index, headers, where = folder.layout, folder.index, list(folder.headers.values()), folder.where
    notes = (index.notes if index is not None else None) or {}
    shapes = {header.image_shape for header in headers}
    shape = index.image_shape if index is not None else shapes.pop() if len(shapes) == 1 else None
    samples = [header.sample for header in headers]
    return {
        "folder": str(folder.path),
        "state": folder.state,
        "version": None if layout is None else folder.version,
        "fingerprint": None if index is None else index.fingerprint,
        "images": None if layout is None else layout.length,
        "images_done": sum(header.shard.count for header in headers),
        "shards": None if layout is None else layout.shard_count,
        "shards_done": len(headers),
        "shards_in_work": len(folder.in_work),
        "shard_size": None if layout is None else layout.shard_size,
        "bytes": folder.size,
        "encoding": None if layout is None else layout.encoding,
        "image_shape": None if shape is None else list(shape),
        "draws": None if layout is None else layout.draws,
        "seed": folder.config.get("seed"),
        # by the notes it has the names that are only for people
        "recipe": notes.get("purifier") or folder.config.get("purifier"),
        "config": folder.config,
        "source": {
            "class": notes.get("source_class"),
            "sha256": None if index is None else index.identity.get("source"),
        },
        "sample": samples[0] if samples and all(sample == samples[0] for sample in samples) else None,
        "targets": bool(folder.targets) and all(folder.targets),
        "classes": None if notes.get("classes") is None else len(notes["classes"]),
        "made": list(fmt.counted_makings(headers) if index is None else index.made),
        "plan": index is not None and index.plan is not None,
        "where": where["conditions"],
        "sanitation": where.get("sanitation"),
        "wrong": folder.wrong,
        "missing": folder.missing if index is not None else [],
        "strangers": folder.strangers,
    }


@dataclass(frozen=True)
class Verified:
    """The result of a check of every byte; `damaged` says what is wrong with each file that is there and not right."""

    folder: Folder
    damaged: Mapping[str, str]

    @property
    def is_whole(self) -> bool:
        return self.folder.index is not None and not self.damaged and not self.folder.missing

    def in_words(self, seconds: float) -> list[str]:
        """Write the lines of `purifyloader cache verify`, which took so many seconds."""
        folder, layout, missing = self.folder, self.folder.layout, self.folder.missing
        lines = [f"{name}: no part of the cache" for name in folder.strangers]
        lacking = set(missing)
        for name in sorted([*self.damaged, *missing]):
            fault = "missing" if name in lacking else f"damaged. {_plainly(folder.path / name, self.damaged[name])}"
            lines.append(f"{name}: {fault}")
        if self.is_whole:
            assert layout is not None
            checked = f"{count_in_words(layout.shard_count, 'shard')}, {size_in_words(folder.size)}"
            return [
                *lines,
                f"{folder.path}: whole. Checked {checked}, every byte of {layout.length * layout.draws:,} images, and "
                f"the index, in {seconds:.1f} s.",
            ]
        total = "an unknown number of" if layout is None else f"{layout.shard_count:,}"
        good = sum(header.shard.file not in self.damaged for header in folder.headers.values())
        index = ", and its index is damaged" if fmt.INDEX_FILE in self.damaged else ""
        index = index or (", and it has no index" if folder.index is None else "")
        state = "damaged" if self.damaged else folder.state
        remedy = _remedy(
            folder.version, "Precompute into this folder again: only what is wrong or missing is made anew"
        )
        return [
            *lines,
            f"{folder.path}: {state}: {good:,} of {total} shards are whole{index} ({seconds:.1f} s). {remedy}.",
        ]


def _plainly(path: Path, error: str) -> str:
    """Shorten an error by the path, which stands before it, and the advice, which stands below it."""
    return error.replace(f"{path} ", "It ").split(" Precompute into")[0].split(" Delete index.json")[0]


def verify(folder: Folder, seen: Callable[[int], object] = lambda size: None) -> Verified:
    """Check every byte of a cache; `seen` is called with how many more of its `shard_bytes` are checked."""
    damaged = dict(folder.wrong)

    def check(header: ShardHeader) -> str | None:
        text = _damage(folder, header)
        seen(header.file_size)
        return text

    headers = list(folder.headers.values())
    with ThreadPoolExecutor(_THREADS) as pool:
        for header, text in zip(headers, pool.map(check, headers), strict=True):
            if text is not None:
                damaged[header.shard.file] = text
    if not damaged and folder.index is not None and not folder.missing:
        try:
            CacheReader(folder.path)
        except CacheError as error:
            damaged[fmt.INDEX_FILE] = str(error)
    return Verified(folder, damaged)


def _damage(folder: Folder, header: ShardHeader) -> str | None:
    path = folder.path / header.shard.file
    try:
        tensor, whole = fmt.shard_hashes(path, header.offset)
    except OSError as error:
        return f"It must be a readable file. Got: {error}."
    if tensor != header.tensor_sha256:
        return f"Its images must have the SHA-256 in its header, {header.tensor_sha256[:12]}. Got {tensor[:12]}."
    if folder.index is not None and whole != (named := folder.index.shards[header.shard.number].sha256):
        return f"It must have the SHA-256 that the index names, {named[:12]}. Got {whole[:12]}."
    return None


def _remedy(version: int | None, text: str) -> str:
    """Say how a cache is made whole, where this library does that."""
    if version != fmt.FORMER:
        return text
    return (
        f"A cache of version {fmt.FORMER} is not added to: delete the folder and precompute again, or finish it with "
        "the purifyloader that wrote it"
    )


def size_in_words(size: int) -> str:
    unit, name = next(((u, n) for u, n in ((10**9, "GB"), (10**6, "MB")) if size >= u), (10**3, "KB"))
    return f"{size / unit:,.1f} {name}"


def count_in_words(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def in_words(values: Mapping[str, Any], sanitation_in_words: _InWords) -> list[str]:
    """Write what `describe` found, as lines; `sanitation_in_words` writes one about a sanitation's JSON."""
    article = "an" if values["state"][0] in "aeiou" else "a"
    text = [f"{values['folder']}: {article} {values['state']} cache"]
    with _legible(values["folder"]):
        for name, lines in _sections(values, sanitation_in_words):
            text += [f"  {'' if number else name:<12} {line}" for number, line in enumerate(lines)]
    return text


def _sections(values: Mapping[str, Any], sanitation_in_words: _InWords) -> Iterator[tuple[str, list[str]]]:
    done, total = values["shards_done"], values["shards"]
    if total is not None:
        images = f"{values['images']:,} images"
        if done < total:
            images = f"{values['images_done']:,} of {images}"
        yield "images", [f"{images}, {_shape(values)}"]
        work = f", {values['shards_in_work']} in work now" if values["shards_in_work"] else ""
        yield "shards", [f"{done:,} of {total:,} there, of {values['shard_size']:,} images each{work}"]
    yield "on disk", [size_in_words(values["bytes"])]
    if total is None:
        yield "damaged", list(values["wrong"])
        return
    if values["version"] == fmt.FORMER:
        yield "version", [f"{fmt.FORMER}, which is read and not added to"]
    yield "draws", [f"{values['draws']}"]
    if values["recipe"] is None:
        yield "made by", [_value(values["config"])]
    else:
        yield "recipe", _recipe(values["recipe"])
        yield "seed", [f"{values['seed']}"]
    source = values["source"]
    length = f"{values['images']:,} samples"
    lines = [f"{source['class']}, {length}" if source["class"] else length]
    if source["sha256"] is not None:
        lines.append(f"images {source['sha256']['images'][:12]}, targets {source['sha256']['targets'][:12]}")
    yield "source", lines
    yield "samples", [f"{_sample(values['sample'])}; targets {'stored' if values['targets'] else 'not stored'}"]
    if values["classes"] is not None:
        yield "classes", [f"{values['classes']:,}"]
    yield "made with", [_made(made, len(values["made"]) > 1) for made in values["made"]]
    yield "plan", ["yes" if values["plan"] else "no", *(fmt.plan_in_words(where) for where in values["where"])]
    if values["sanitation"] is not None:
        yield "sanitation", [sanitation_in_words(values["sanitation"])]
    yield "fingerprint", [values["fingerprint"] or "none before it is finished"]
    if values["wrong"] or values["missing"]:
        bad = [*(f"{name} (damaged)" for name in values["wrong"]), *(f"{name} (missing)" for name in values["missing"])]
        how = _remedy(values["version"], "precompute into the folder again: only these are made anew")
        yield "damaged", [*bad, how]
    elif values["state"] == "unfinished":
        how = "precompute into the folder again with the same options: what is there is kept"
        yield "to do", [_remedy(values["version"], how)]
    if values["strangers"]:
        yield "not of it", values["strangers"]


def _shape(values: Mapping[str, Any]) -> str:
    if values["image_shape"] is None:
        return "of any sizes (png)" if values["encoding"] == "png" else values["encoding"]
    height, width, channels = values["image_shape"]
    return f"{width} × {height} px, {_CHANNELS[channels]} ({values['encoding']})"


def _sample(sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return "of different structures, or not noted"
    if sample["type"] == "image":
        return "bare images"
    if sample["type"] == "dict":
        return f"dicts, image under {sample['image']!r}"
    return f"{sample['type']}s of {sample['fields']}, image at {sample['image']}"


def _made(made: Mapping[str, Any], several: bool) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in sorted(made.items()) if key not in ("device", "shards"))
    shards = f" ({made['shards']:,} shards)" if several else ""
    return f"{made.get('device', 'unknown device')}: {versions or 'versions not noted'}{shards}"


def _recipe(config: Mapping[str, Any]) -> list[str]:
    """Describe a purifier, a line a stage; what a stage repeats or cuts up is indented below it."""
    values = {key: value for key, value in config.items() if value is not None}
    kind = str(values.pop("kind", "unknown"))
    stages = values.pop("stages", None)
    if kind == "chain" and isinstance(stages, list):
        return [line for stage in stages for line in _recipe(stage)]
    inner = values.pop("purifier", None)
    condition = values.pop("condition", None)
    network = values.pop("denoiser", None) or values.pop("energy", None)
    values.pop("planned", None)  # has a line of its own
    pixels = values.pop("sigma_px", None)
    if pixels is not None:  # the same, for people
        values.pop("sigma", None)
        values = {"sigma": f"{pixels:g} px", **values}
    step = values.pop("step_px", None)
    if step is not None:
        values["step_size"] = f"{step:g} px"
    lines = [f"{kind}: " + ", ".join(f"{key} {_value(value)}" for key, value in values.items()) if values else kind]
    if isinstance(network, Mapping):
        name = network.get("name") or "unnamed or not noted"
        lines.append(f"  model {name}, weights {str(network.get('weights_sha256'))[:12]}{_function(network)}")
    for below in (condition, inner):
        if isinstance(below, Mapping):
            lines += [f"  {line}" for line in _recipe(below)]
    return lines


def _function(network: Mapping[str, Any]) -> str:
    """Name what a model computes, beside its weights, by a hash; a cache of the version before does not know it."""
    function = network.get("function")
    return "" if function is None else f", function {fmt.fingerprint({'function': function})[:12]}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        kind = value.get("kind")
        rest = ", ".join(f"{key} {_value(v)}" for key, v in value.items() if key != "kind")
        return f"{kind} ({rest})" if kind is not None and rest else str(kind or f"({rest})")
    return value if isinstance(value, str) else canonical_json(value)
