"""`purifyloader cache`: what a cache is, whether it is whole, how two differ, and to tars and back."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from purifyloader.cache import format as fmt
from purifyloader.cache.format import Index, Layout, ShardHeader
from purifyloader.cache.reader import CacheReader
from purifyloader.errors import CacheError
from purifyloader.files.atomic import canonical_json
from purifyloader.files.locks import is_held, lock_path
from purifyloader.purified.sanitation import Sanitation

__all__ = ["DESCRIPTION", "add_options", "describe", "run"]

_THREADS = 4  # hashing lets go of the interpreter
_CHANNELS = {1: "grey", 2: "grey + alpha", 3: "RGB", 4: "RGBA"}


DESCRIPTION = "Look after purified caches."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="say what a cache is, finished or not; reads no images")
    info.add_argument("folder", type=Path, metavar="FOLDER")
    info.add_argument("--json", action="store_true", help="as JSON")

    verify = commands.add_parser(
        "verify",
        help="check every byte of a cache",
        description="Check every byte of a cache. Exit status 0: it is finished and whole; 1: it is not.",
    )
    verify.add_argument("folder", type=Path, metavar="FOLDER")

    export = commands.add_parser("export", help="write a finished cache as WebDataset tars")
    export.add_argument("folder", type=Path, metavar="FOLDER")
    export.add_argument("out", type=Path, metavar="OUT", help="new, empty, or an earlier export of the same")
    export.add_argument("--images-per-tar", type=int, default=10_000, metavar="N", help="(default: 10000)")
    export.add_argument("--draw", type=int, default=0, metavar="K", help="which of the cache's draws (default: 0)")

    restore = commands.add_parser("import", help="make the cache again from such tars, byte for byte")
    restore.add_argument("tars", type=Path, metavar="TARS", help="folder of an export, of a cache of one draw")
    restore.add_argument("out", type=Path, metavar="OUT", help="folder of the cache, new or empty")

    compare = commands.add_parser("compare", help="say how two finished caches differ")
    compare.add_argument("a", type=Path, metavar="A")
    compare.add_argument("b", type=Path, metavar="B")
    compare.add_argument("--draw", type=int, default=0, metavar="K", help="which draw of both (default: 0)")
    compare.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command; errors of the user's are raised as `PurifyError`.

    Returns:
        0, or 1 for a cache that `verify` finds unfinished or damaged.
    """
    return _COMMANDS[options.command](options)


# -- reading a folder in any state -------------------------------------------------------------------


@dataclass
class _Folder:
    """What stands in the folder of a cache, whole or not. Reads headers, and no images.

    Attributes:
        index: None where there is none, or a damaged one.
        layout: by the index or, without one, by the first shard that reads; None where none does.
        headers: of the shards that read and belong to this cache, without their targets, by number.
        wrong: of each shard or index that is there and not right, what is wrong.
        targets: whether each shard that reads stores its targets.
        strangers: files that are no part of a cache.
    """

    path: Path
    index: Index | None
    layout: Layout | None
    config: dict[str, Any]
    headers: dict[int, ShardHeader]
    wrong: dict[str, str]
    targets: list[bool]
    strangers: list[str]

    @property
    def missing(self) -> list[str]:
        if self.layout is None:
            return []
        shards = self.layout.shards
        return [s.file for s in shards if s.number not in self.headers and s.file not in self.wrong]

    @property
    def state(self) -> str:
        if self.wrong or (self.index is not None and self.missing):
            return "damaged"
        return "unfinished" if self.index is None else "finished"


def _read(path: Path) -> _Folder:
    """
    Raises:
        CacheError: no folder, no cache in it, or one of another version.
    """
    path = path.absolute()
    if not path.is_dir():
        raise CacheError(f"Expected the folder of a cache. Got {path}, which is no folder. Check the path.")
    found = _Folder(path, None, None, {}, {}, {}, [], [])
    other: CacheError | None = None
    names = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
    shards = [name for name in names if fmt.SHARD_FILE.fullmatch(name)]
    try:
        found.index = fmt.read_index(path)
        found.layout, found.config = found.index.layout, found.index.config
    except FileNotFoundError:
        if not shards:
            raise CacheError(
                f"The folder of a cache holds {fmt.INDEX_FILE} and shards. Got {path}, which has neither. "
                "Check the path, or precompute into it."
            ) from None
    except CacheError as error:
        if not shards:
            raise
        found.wrong[fmt.INDEX_FILE] = str(error)
        other = error if isinstance(error, fmt.OtherVersionError) else other
    for name in shards:
        try:
            _read_shard(found, name)
        except CacheError as error:
            found.wrong[name] = str(error)
            other = error if isinstance(error, fmt.OtherVersionError) else other
    if other is not None and found.layout is None:
        raise other  # a cache of that version; among files of ours it is one that is damaged
    expected = {shard.file for shard in found.layout.shards} if found.layout is not None else set(shards)
    found.strangers = [name for name in names if name not in expected and name not in (fmt.INDEX_FILE, fmt.PLAN_FILE)]
    for name in found.strangers:
        found.wrong.pop(name, None)
    return found


def _read_shard(found: _Folder, name: str) -> None:
    header = fmt.read_shard_header(found.path / name)
    if found.layout is None:
        found.layout, found.config = header.layout, header.config
    shard = next((shard for shard in found.layout.shards if shard.file == name), None)
    if shard is None:
        return
    if (header.shard, header.layout, header.config) != (shard, found.layout, found.config):
        found.wrong[name] = f"{found.path / name} must be a shard of this cache. Got one of another."
    elif found.index is not None and header.sha256 != found.index.shards[shard.number].header:
        found.wrong[name] = (
            f"{found.path / name} must have the header that the index names, "
            f"{found.index.shards[shard.number].header[:12]}. Got {header.sha256[:12]}."
        )
    else:
        found.targets.append(header.targets is not None)
        found.headers[shard.number] = replace(header, targets=None)


# -- info --------------------------------------------------------------------------------------------


def describe(folder: Path) -> dict[str, Any]:
    """What stands in a folder of a cache, finished or not, as JSON; see `purifyloader cache info`.

    Raises:
        CacheError: there is no cache, or one of another version.
    """
    found = _read(folder)
    layout, index, headers = found.layout, found.index, list(found.headers.values())
    notes = (index.notes if index is not None else None) or {}
    shapes = {header.image_shape for header in headers}
    shape = index.image_shape if index is not None else shapes.pop() if len(shapes) == 1 else None
    source = index.identity.get("source") if index is not None else None
    made = list(index.made) if index is not None else _counted(headers)
    samples = [header.sample for header in headers]
    where = _where(found)
    return {
        "folder": str(found.path),
        "state": found.state,
        "fingerprint": None if index is None else index.fingerprint,
        "images": None if layout is None else layout.length,
        "images_done": sum(header.shard.count for header in headers),
        "shards": None if layout is None else len(layout.shards),
        "shards_done": len(headers),
        "shards_in_work": sum(is_held(lock_path(found.path, name)) for name in (*found.missing, *found.wrong)),
        "shard_size": None if layout is None else layout.shard_size,
        "bytes": _size(found),
        "encoding": None if layout is None else layout.encoding,
        "image_shape": None if shape is None else list(shape),
        "draws": None if layout is None else layout.draws,
        "seed": found.config.get("seed"),
        # by the notes it has the names that are only for people
        "recipe": notes.get("purifier") or found.config.get("purifier"),
        "config": found.config,
        "source": {"class": notes.get("source_class"), "sha256": source},
        "sample": samples[0] if samples and all(sample == samples[0] for sample in samples) else None,
        "targets": bool(found.targets) and all(found.targets),
        "classes": None if notes.get("classes") is None else len(notes["classes"]),
        "made": made,
        "plan": index is not None and index.plan is not None,
        "where": where["conditions"],
        "sanitation": where.get("sanitation"),
        "wrong": found.wrong,
        "missing": found.missing if index is not None else [],
        "strangers": found.strangers,
    }


def _where(found: _Folder) -> dict[str, Any]:
    """What was planned: by the index or, of an unfinished cache, by the plan that it has so far."""
    if found.index is not None:
        where = (found.index.plan or {}).get(fmt.WHERE)
    else:
        try:
            where = fmt.read_plan(found.path).found
        except (OSError, CacheError):
            where = None
    return where if isinstance(where, dict) and isinstance(where.get("conditions"), list) else {"conditions": []}


def _size(found: _Folder) -> int:
    """Bytes of the files that are part of the cache."""
    names = [path.name for path in found.path.iterdir() if not path.name.startswith(".")]
    return sum((found.path / name).stat().st_size for name in names if name not in found.strangers)


def _bytes(size: int) -> str:
    unit, name = next(((u, n) for u, n in ((10**9, "GB"), (10**6, "MB")) if size >= u), (10**3, "KB"))
    return f"{size / unit:,.1f} {name}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _counted(headers: Sequence[ShardHeader]) -> list[dict[str, Any]]:
    counts = Counter(canonical_json(header.made) for header in headers)
    return [{**json.loads(text), "shards": count} for text, count in sorted(counts.items())]


def _info(options: argparse.Namespace) -> int:
    values = describe(options.folder)
    if options.json:
        print(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))
        return 0
    text = [f"{values['folder']}: {_article(values['state'])} cache"]
    for name, lines in _info_lines(values):
        text += [f"  {'' if number else name:<12} {line}" for number, line in enumerate(lines)]
    print("\n".join(text))
    return 0


def _article(state: str) -> str:
    return f"an {state}" if state[0] in "aeiou" else f"a {state}"


def _info_lines(values: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    done, of = values["shards_done"], values["shards"]
    if of is not None:
        images = f"{values['images']:,} images"
        if done < of:
            images = f"{values['images_done']:,} of {images}"
        yield "images", [f"{images}, {_shape(values)}"]
        work = f", {values['shards_in_work']} in work now" if values["shards_in_work"] else ""
        yield "shards", [f"{done:,} of {of:,} there, of {values['shard_size']:,} images each{work}"]
    yield "on disk", [_bytes(values["bytes"])]
    if of is None:
        yield "damaged", list(values["wrong"])
        return
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
        yield "sanitation", [Sanitation.from_dict(values["sanitation"]).in_words()]
    yield "fingerprint", [values["fingerprint"] or "none before it is finished"]
    if values["wrong"] or values["missing"]:
        bad = [*(f"{name} (damaged)" for name in values["wrong"]), *(f"{name} (missing)" for name in values["missing"])]
        yield "damaged", [*bad, "precompute into the folder again: only these are made anew"]
    elif values["state"] == "unfinished":
        yield "to do", ["precompute into the folder again with the same options: what is there is kept"]
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
    """A purifier in words, a line a stage; what a stage repeats or cuts up is indented below it."""
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
        lines.append(f"  model {name}, weights {str(network.get('weights_sha256'))[:12]}")
    if isinstance(condition, Mapping):
        lines += [f"  {line}" for line in _recipe(condition)]
    if isinstance(inner, Mapping):
        lines += [f"  {line}" for line in _recipe(inner)]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        kind = value.get("kind")
        rest = ", ".join(f"{key} {_value(v)}" for key, v in value.items() if key != "kind")
        return f"{kind} ({rest})" if kind is not None and rest else str(kind or f"({rest})")
    return value if isinstance(value, str) else canonical_json(value)


# -- verify ------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace) -> int:
    begun = time.monotonic()
    found = _read(options.folder)
    layout, wrong = found.layout, dict(found.wrong)
    with _bar(sum(header.file_size for header in found.headers.values()), "B") as seen:

        def damage(header: ShardHeader) -> str | None:
            text = _damage(found, header)
            seen(header.file_size)
            return text

        with ThreadPoolExecutor(_THREADS) as pool:
            for header, text in zip(found.headers.values(), pool.map(damage, found.headers.values()), strict=True):
                if text is not None:
                    wrong[header.shard.file] = text
    for name in found.missing:
        wrong[name] = f"{found.path / name} is missing."
    if not wrong and found.index is not None:
        try:
            CacheReader(found.path)
        except CacheError as error:
            wrong[fmt.INDEX_FILE] = str(error)
    for name in found.strangers:
        print(f"{name}: no part of the cache")
    for name, text in sorted(wrong.items()):
        print(f"{name}: {'missing' if name in found.missing else f'damaged. {_plainly(found.path / name, text)}'}")
    seconds = time.monotonic() - begun
    of = "an unknown number of" if layout is None else f"{len(layout.shards):,}"
    good = len([header for header in found.headers.values() if header.shard.file not in wrong])
    index = "its index is damaged" if fmt.INDEX_FILE in wrong else "it has no index" if found.index is None else ""
    if wrong or found.index is None:
        state = "unfinished" if found.state == "unfinished" and set(wrong) == set(found.missing) else "damaged"
        print(
            f"{found.path}: {state}: {good:,} of {of} shards are whole{', and ' + index if index else ''} "
            f"({seconds:.1f} s). Precompute into this folder again: only what is wrong or missing is made anew."
        )
        return 1
    assert layout is not None
    print(
        f"{found.path}: whole. Checked {_count(len(layout.shards), 'shard')}, {_bytes(_size(found))}, every byte of "
        f"{layout.length * layout.draws:,} images, and the index, in {seconds:.1f} s."
    )
    return 0


def _plainly(path: Path, error: str) -> str:
    """An error without the path, which stands before it, and the advice, which stands below it."""
    return error.replace(f"{path} ", "It ").split(" Precompute into")[0].split(" Delete index.json")[0]


def _damage(found: _Folder, header: ShardHeader) -> str | None:
    """What is wrong with the bytes of a shard whose header is right."""
    path = found.path / header.shard.file
    try:
        tensor, whole = fmt.shard_hashes(path, header.offset)
    except OSError as error:
        return f"It must be a readable file. Got: {error}."
    if tensor != header.tensor_sha256:
        return f"Its images must have the SHA-256 in its header, {header.tensor_sha256[:12]}. Got {tensor[:12]}."
    if found.index is not None and whole != (named := found.index.shards[header.shard.number].sha256):
        return f"It must have the SHA-256 that the index names, {named[:12]}. Got {whole[:12]}."
    return None


# -- the others --------------------------------------------------------------------------------------


def _export(options: argparse.Namespace) -> int:
    from purifyloader.cache.tars import MANIFEST, export_tars

    begun = time.monotonic()
    reader = CacheReader(options.folder)
    with _bar(len(reader), "img") as seen:
        tars = export_tars(reader, options.out, images_per_tar=options.images_per_tar, draw=options.draw, seen=seen)
    size = sum(tar.stat().st_size for tar in tars)
    draws = (
        f", draw {options.draw} of {reader.draws} (no import can make the cache of them)" if reader.draws > 1 else ""
    )
    targets = "" if reader.targets is not None else "; the cache stores no targets, nor do the tars"
    if _sanitation(reader) is not None:
        targets += "; they hold every image and the labels of the source, whatever the cache's sanitation says"
    print(
        f"{options.out}: {len(reader):,} images{draws} in {_count(len(tars), 'tar')} and {MANIFEST}, {_bytes(size)}, "
        f"{time.monotonic() - begun:.0f} s{targets}"
    )
    return 0


def _sanitation(reader: CacheReader) -> Any:
    return ((reader.plan or {}).get(fmt.WHERE) or {}).get("sanitation")


def _import(options: argparse.Namespace) -> int:
    from purifyloader.cache.tars import import_tars

    begun = time.monotonic()
    with _bar(None, "img") as seen:
        reader = import_tars(options.tars, options.out, seen=seen)
    print(
        f"{reader.folder}: {len(reader):,} images, {_count(len(reader.index.shards), 'shard')}, every file with the "
        f"SHA-256 it had, {time.monotonic() - begun:.0f} s, fingerprint {reader.fingerprint[:12]}"
    )
    return 0


def _compare(options: argparse.Namespace) -> int:
    from purifyloader.cache.compare import Comparison, compare

    a, b = CacheReader(options.a), CacheReader(options.b)
    with _bar(min(len(a), len(b)), "img") as seen:
        found: Comparison = compare(a, b, draw=options.draw, seen=seen)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False, allow_nan=False))
        return 0
    text = [f"{name}  {cache.folder}  {cache.fingerprint[:12]}" for name, cache in (("A", a), ("B", b))]
    text += _comparison_lines(found.to_dict())
    print("\n".join(text))
    return 0


def _comparison_lines(found: Mapping[str, Any]) -> Iterator[str]:
    if found["same_fingerprint"]:
        yield "made alike: the fingerprints are the same"
    else:
        yield "made differently (A → B):"
        yield from (f"  {line}" for line in found["differences"])
    a, b = found["samples"]
    yield (
        f"samples: {a:,}" if a == b else f"samples: {a:,} and {b:,}, of which the first {found['compared']:,} compared"
    )
    if found["sources_differ"] is None:
        yield "sources: not known to both caches"
    else:
        yield f"made from other images: {found['sources_differ']:,}; with other targets: {found['targets_differ']:,}"
    if found["plans_differ"]:
        yield "planned or sanitized differently: see purifyloader cache info of each"
    if found["sizes_differ"]:
        yield f"of different sizes, and not compared: {found['sizes_differ']:,}"
    if found["identical"] is None:
        return
    # counted, because 99.999 % would read as all
    alike = found["compared"] - found["sizes_differ"]
    yield f"identical images: {round(found['identical'] * alike):,} of {alike:,}"
    yield f"pixels changed: {100 * found['pixels_changed']:.4g} %"
    yield f"difference (levels of 255): mean {found['mean_abs']:.3f}, largest {found['max_abs']}"
    yield "PSNR: " + ("infinite" if found["psnr"] is None else f"{found['psnr']:.2f} dB")
    for mode, means in found["mean_difference"].items():
        yield f"mean of B - A, {mode}: " + ", ".join(f"{mean:+.3f}" for mean in means)
    if found["most_different"] is not None:
        yield f"most different: image {found['most_different']}"


@contextmanager
def _bar(total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    with tqdm(total=total, unit=unit, unit_scale=unit == "B", disable=not sys.stderr.isatty(), leave=False) as bar:
        yield bar.update


_COMMANDS = {"info": _info, "verify": _verify, "export": _export, "import": _import, "compare": _compare}
