"""Write a finished cache as WebDataset tars, for pipelines that only stream, and read the same cache back.

    000000.tar, 000001.tar, ...   one draw of the images, in the order of the dataset
    cache.json                    written last: where it stands, the tars are whole

A sample's key is its index in the dataset, in at least eight digits. `KEY.png` is the image, lossless. Its
target, where the cache stores it, is `KEY.cls` for an integer, else `KEY.json` as `purifyloader.cache.values`
writes it; a sample that is the image itself has none.

cache.json is canonical JSON that guards itself by its `sha256`: the cache's index, the draw, each tar's name,
count and SHA-256, and what the headers of the shards say beside pixels and targets.

Tars of one cache are the same bytes whoever writes them, by the same version of Pillow where the images are
stored raw; PNGs are taken over as they are. So what `import_tars` gives back never depends on Pillow.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset import TarWriter

from purifyloader.cache import content
from purifyloader.cache import format as fmt
from purifyloader.cache.format import Shard, ShardEntry, ShardHeader, ShardValues
from purifyloader.cache.reader import CacheReader, decode_image
from purifyloader.cache.writer import CacheWriter, encode_image
from purifyloader.core.checks import as_path, check_integer
from purifyloader.errors import CacheError, InputError
from purifyloader.files.atomic import beside, canonical_json, file_sha256, replacing, write_new, write_text, writing
from purifyloader.files.json import parse_json, read_json
from purifyloader.files.locks import KEPT, Lock
from purifyloader.files.opening import opened
from purifyloader.files.tars import TAR_ERRORS, opened_tar

FORMAT = "purifyloader-tars"
VERSION = 1
MANIFEST = "cache.json"

_BEGUN = "unfinished.json"  # says whose the tars are before the manifest does
_TAR = re.compile(r"\d{6,}\.tar")
_HIDDEN = re.compile(r"\.(\d{6,}\.tar|cache\.json|unfinished\.json)\..*\.tmp")
_KEY_DIGITS = 8
_LARGEST = 2**29  # bytes of a member: an image of 12,000 x 12,000 has fewer
_FIELDS = ("png", "cls", "json")
_THREADS = 4  # Pillow and the hashes let go of the interpreter
_AHEAD = 256  # images encoded at a time
# whoever writes them, and when
_OWNER: dict[str, Any] = {"user": "purifyloader", "group": "purifyloader", "mode": 0o644, "mtime": 0}

Seen = Callable[[int], object]


def _beside_to_json(beside: ShardValues) -> dict[str, Any]:
    """Write what a shard's bytes need beside what the tars hold."""
    types, source = beside.image_types, beside.source
    return {
        "image_types": types if isinstance(types, str) else list(types),
        "sample": beside.sample,
        "source": None if source is None else np.ascontiguousarray(source.T, ">u8").tobytes().hex(),
        "made": beside.made,
        "targets": beside.targets is not None,
    }


def _beside_from_json(value: Mapping[str, Any], count: int) -> ShardValues:
    """Read the inverse for a shard of `count` images; targets, if it says that there are any, are an empty list."""
    text = value["source"]
    if text is not None:
        content.text(value, "source")
        text = [text[: len(text) // 2], text[len(text) // 2 :]]
    content.check_sample(value["sample"])
    content.check_made(value["made"])
    types, source = content.image_types(value["image_types"], count), content.source_hashes(text, count)
    return ShardValues(types, value["sample"], [] if value["targets"] else None, source, value["made"])


@dataclass(frozen=True)
class _Tar:
    file: str
    count: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    """The content of cache.json."""

    index: fmt.Index
    draw: int
    tars: tuple[_Tar, ...]
    parts: tuple[ShardValues, ...]


def export_tars(
    reader: CacheReader,
    out: str | Path,
    *,
    images_per_tar: int = 10_000,
    draw: int = 0,
    seen: Seen = lambda count: None,
) -> list[Path]:
    """Write one draw of a cache as WebDataset tars of so many images, and return them; the module says what is in them.

    `out` is new, empty, or an earlier export of the same draw of the same cache, which is replaced. Every image is
    checked against its CRC-32. An export that was stopped is made anew by calling this again; one that another process
    makes is waited for. Only a cache of one draw can be imported again. `seen` is called with how many images more are
    done. Raises `InputError` for no such draw, `CacheError` for an `out` that holds something else, or a damaged cache.
    """
    out = as_path(out).absolute()
    check_integer("images_per_tar", images_per_tar, 1, error=InputError)
    check_integer("draw", draw, 0, reader.draws - 1, unit="one of the cache's draws", error=InputError)
    owner = {"format": FORMAT, "version": VERSION, "fingerprint": reader.fingerprint, "draw": draw}
    _check_free(out, owner, reader.folder)
    parts: list[dict[str, Any]] = []
    tars: list[_Tar] = []
    with writing(out, CacheError, KEPT):
        out.mkdir(parents=True, exist_ok=True)
    with writing(out, CacheError, KEPT), Lock(out, MANIFEST, traceless=True):
        _check_free(out, owner, reader.folder)  # another process may have exported meanwhile
        _clear(out, owner, reader.folder)
        samples = _samples(reader, draw, parts)
        for number, start in enumerate(range(0, len(reader), images_per_tar)):
            count = min(images_per_tar, len(reader) - start)
            path = out / f"{number:06d}.tar"
            with replacing(path) as temporary:
                with open(temporary, "wb") as stream, TarWriter(stream, encoder=False, **_OWNER) as tar:
                    for sample in itertools.islice(samples, count):
                        tar.write(sample)
                        seen(1)
                tars.append(_Tar(path.name, count, file_sha256(temporary)))
        next(samples, None)  # ends the generator, and with it its threads
        values = {
            **owner,
            "index": fmt.index_values(reader.index),
            "tars": [vars(tar) for tar in tars],
            "shards": parts,
        }
        write_text(out / MANIFEST, canonical_json(fmt.guarded(values)) + "\n")
        (out / _BEGUN).unlink()
    return [out / tar.file for tar in tars]


def _check_free(out: Path, owner: Mapping[str, Any], cache: Path) -> None:
    """Refuse a folder that holds anything but an earlier export of the same."""
    if out.resolve().is_relative_to(cache.resolve()):
        raise CacheError(f"Tars lie outside the cache that they are made from. Got {out}: give another folder.")
    if not out.exists():
        return
    if not out.is_dir():
        raise CacheError(f"Tars are exported into a folder. Got the file {out}. Give another path.")
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    if not names:
        return
    there = _owner(out)
    strangers = sorted(name for name in names - {MANIFEST, _BEGUN} if there is None or not _TAR.fullmatch(name))
    if strangers or there is None:
        shown = ", ".join(strangers[:4] or sorted(names)) + (", ..." if len(strangers) > 4 else "")
        raise CacheError(
            f"Tars are exported into a new or empty folder, or over an earlier export of the same cache. Got {out} "
            f"with {shown}. Give another folder, or remove these files."
        )
    if there != owner:
        raise CacheError(
            f"A folder holds one export. Got {out} with draw {there['draw']} of the cache "
            f"{str(there['fingerprint'])[:12]}, to be overwritten with draw {owner['draw']} of "
            f"{str(owner['fingerprint'])[:12]}. Give another folder, or delete this one."
        )


def _owner(out: Path) -> dict[str, Any] | None:
    """Read which cache and draw a folder is an export of, finished or not; None where it does not say."""
    for name in (_BEGUN, MANIFEST):
        try:
            values = read_json(out / name)
            if values["format"] == FORMAT:
                return {key: values[key] for key in ("format", "version", "fingerprint", "draw")}
        except (OSError, ValueError, TypeError, LookupError):
            continue
    return None


def _clear(out: Path, owner: Mapping[str, Any], cache: Path) -> None:
    """Remove an earlier export, in an order in which no moment leaves one that seems whole, or nobody's."""
    if not write_new(out / _BEGUN, canonical_json(owner) + "\n"):
        _check_free(out, owner, cache)  # an export that was stopped, or of another process where there are no locks
    (out / MANIFEST).unlink(missing_ok=True)
    for path in list(out.iterdir()):
        if _TAR.fullmatch(path.name) or _HIDDEN.fullmatch(path.name):
            path.unlink()


def _key(index: int, length: int) -> str:
    """Make keys of one width, whose order is that of the samples. A dot would split them."""
    return f"{index:0{max(_KEY_DIGITS, len(str(length - 1)))}d}"


def _samples(reader: CacheReader, draw: int, parts: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield all samples as `TarWriter` takes them; note in `parts` what they do not hold."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for shard, entry in zip(reader.layout.shards, reader.index.shards, strict=True):
            path = reader.folder / shard.file
            header = fmt.read_shard_header(path)
            if header.sha256 != entry.header:
                raise CacheError(f"{path} must stay as it was when the cache was opened. Got another: open it anew.")
            parts.append(_beside_to_json(header))
            rows = _rows(path, header, draw)
            index = shard.start
            while batch := list(itertools.islice(rows, _AHEAD)):
                for png in pool.map(lambda row, shape=header.image_shape: _as_png(row, shape), batch):
                    yield {"__key__": _key(index, len(reader)), "png": png, **_target(header, index - shard.start)}
                    index += 1


def _rows(path: Path, header: ShardHeader, draw: int) -> Iterator[bytes]:
    """Yield the images of a draw as they stand in the shard, each checked."""
    count = header.shard.count
    first = draw * count
    alike = math.prod(header.image_shape or ())
    sizes = [alike] * (first + count) if header.sizes is None else header.sizes.tolist()
    with opened(path) as file:
        file.seek(header.offset + sum(sizes[:first]))
        for at in range(first, first + count):
            data = file.read(sizes[at])
            if zlib.crc32(data) != header.crc32[at]:
                raise CacheError(
                    f"{path} must hold the images that were written. Got image {header.shard.start + at - first} with "
                    "another checksum: the file is damaged. Precompute into its folder again, then export again."
                )
            yield data


def _as_png(row: bytes, shape: tuple[int, int, int] | None) -> bytes:
    return row if shape is None else encode_image(np.frombuffer(row, np.uint8).reshape(shape))


def _target(header: ShardHeader, local: int) -> dict[str, bytes]:
    """Return the member that holds a sample's target, if there is one."""
    if header.targets is None:
        return {}
    target = header.targets[local]
    if target is None and header.sample == {"type": "image"}:
        return {}
    if type(target) is int:
        return {"cls": b"%d" % target}
    return {"json": canonical_json(target).encode()}


def import_tars(folder: str | Path, out: str | Path, *, seen: Seen = lambda count: None) -> CacheReader:
    """Make the cache that these tars were exported from, byte for byte. After a stop, call it again to go on.

    `out` is new, empty, or an earlier import of the same. Raises `CacheError` for an export that is unfinished,
    damaged, of another version, or of a cache of several draws; for an `out` that holds something else; and where
    another version of safetensors makes other files of the same content.
    """
    folder, out = as_path(folder).absolute(), as_path(out).absolute()
    manifest = _read_manifest(folder)
    index, layout = manifest.index, manifest.index.layout
    if layout.draws != 1:
        raise CacheError(
            f"Only a cache of one draw can be made again from tars, which hold one. Got {folder}, draw "
            f"{manifest.draw} of {layout.draws}. Copy the folder of the cache, or use the tars as they are."
        )
    _check_tars(folder, manifest)
    _check_same(out, index)
    with writing(out, CacheError, KEPT):
        mixed = len(index.identity["devices"]) > 1
        made = manifest.parts[0].made
        writer = CacheWriter(out, index.config, layout, made, allow_mixed_devices=mixed, version=index.version)
        writer.claim()
        samples = _imported(folder, manifest)
        for shard, entry, part in zip(layout.shards, index.shards, manifest.parts, strict=True):
            own = list(itertools.islice(samples, shard.count))
            with writer.lock(shard):  # another process may import the same, or fill it from its source
                path = out / shard.file
                if not path.is_file() or file_sha256(path) != entry.sha256:
                    _restore(writer, shard, entry, index, part, own)
            seen(shard.count)
        next(samples, None)  # ends the generator, and so closes the last tar
        with Lock(out, fmt.INDEX_FILE) as lock:
            _check_same(out, index)
            fmt.write_index(out, index)
            writer.tidy(lock)
    return CacheReader(out)


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / MANIFEST
    try:
        with fmt.reading(path, "manifest", "Export again, or fetch the folder again"):
            values = read_json(path)
            fmt.check_guard(values, path, FORMAT, (VERSION,))
            index = fmt.parse_index(values["index"], path)
            parts = values["shards"]
            if not isinstance(parts, list) or len(parts) != len(index.shards):
                raise ValueError("it does not say of every shard what stood in it")
            for tar in values["tars"]:
                content.text(tar, "file", "sha256")
            content.integers("counts", [tar["count"] for tar in values["tars"]])
            content.integers("draw", [values["draw"]])
            manifest = _Manifest(
                index,
                values["draw"],
                tuple(_Tar(**tar) for tar in values["tars"]),
                tuple(_beside_from_json(part, entry.count) for part, entry in zip(parts, index.shards, strict=True)),
            )
            if sum(tar.count for tar in manifest.tars) != manifest.index.layout.length:
                raise ValueError("its tars have not as many images as the cache")
            for tar in manifest.tars:
                if not _TAR.fullmatch(tar.file):  # no name may point outside the folder
                    raise ValueError(f"it names the tar {tar.file!r}")
    except (FileNotFoundError, NotADirectoryError):
        expected = f"An export of a cache is a folder with {MANIFEST}, written when all its tars are there. "
        if (folder / _BEGUN).is_file():
            raise CacheError(f"{expected}Got {folder}, which is unfinished. Run the export again.") from None
        raise CacheError(
            f"{expected}Got {folder}, which has none. Check the path, or export a cache into it."
        ) from None
    return manifest


def _check_tars(folder: Path, manifest: _Manifest) -> None:
    def wrong(tar: _Tar) -> str | None:
        path = folder / tar.file
        try:
            return None if file_sha256(path) == tar.sha256 else f"{tar.file} (damaged)"
        except FileNotFoundError:
            return f"{tar.file} (missing)"
        except OSError as error:
            return f"{tar.file} ({error})"

    with ThreadPoolExecutor(_THREADS) as pool:
        bad = [text for text in pool.map(wrong, manifest.tars) if text is not None]
    if bad:
        raise CacheError(
            f"Every tar of {folder} must have the SHA-256 that {MANIFEST} names. Got others: {', '.join(bad)}. "
            "Fetch or export these again."
        )


def _check_same(out: Path, index: fmt.Index) -> None:
    """Refuse a folder with a cache of other bytes, though its configuration be the same: it may have cost days."""
    try:
        if (there := fmt.read_index(out)) != index:
            what = f"its fingerprint is {there.fingerprint[:12]}, not {index.fingerprint[:12]}"
            raise CacheError(_other(out, what))
    except (FileNotFoundError, NotADirectoryError):
        pass
    for entry in index.shards:
        _check_same_shard(out, entry)


def _check_same_shard(out: Path, entry: ShardEntry) -> None:
    try:
        header = fmt.read_shard_header(out / entry.file)
    except fmt.OtherVersionError:
        raise
    except CacheError:  # missing, or damaged and made again
        return
    if header.sha256 != entry.header:
        raise CacheError(_other(out, f"its {entry.file} was made otherwise"))


def _other(out: Path, what: str) -> str:
    return (
        f"A cache is imported into a new or empty folder. Got {out}, which holds another: {what}. Give another folder, "
        "or delete this one."
    )


def _imported(folder: Path, manifest: _Manifest) -> Iterator[dict[str, bytes]]:
    """Yield the fields of each sample, in the order of the dataset."""
    length = manifest.index.layout.length
    index = 0
    for tar in manifest.tars:
        path = folder / tar.file
        first = index
        try:
            with opened(path) as stream, opened_tar(stream) as file:
                for key, members in itertools.groupby(file, lambda member: member.name.partition(".")[0]):
                    fields: dict[str, bytes] = {}
                    for member in members:
                        field = member.name.partition(".")[2]
                        data = file.extractfile(member) if member.isreg() else None
                        if data is None or field in fields or member.size > _LARGEST:
                            raise ValueError(
                                f"{member.name}, which is twice in it, no file, or of {member.size:,} bytes"
                            )
                        fields[field] = data.read()
                    if key != _key(index, length) or "png" not in fields or not fields.keys() <= set(_FIELDS):
                        raise ValueError(f"its sample {key} with {', '.join(fields)}, not sample {_key(index, length)}")
                    yield fields
                    index += 1
                if index - first != tar.count:
                    raise ValueError(f"{index - first} samples, not {tar.count}")
        except TAR_ERRORS as error:
            raise CacheError(
                f"{path} must be a tar that an export wrote. Got: {error}. Fetch or export it again."
            ) from None


def _restore(
    writer: CacheWriter,
    shard: Shard,
    entry: ShardEntry,
    index: fmt.Index,
    part: ShardValues,
    samples: Sequence[Mapping[str, bytes]],
) -> None:
    path = writer.folder / shard.file
    rows: NDArray[np.uint8] | list[bytes] = [fields["png"] for fields in samples]
    try:
        if index.image_shape is not None:
            rows = np.stack([_pixels(fields["png"], index.image_shape) for fields in samples])
        targets = None if part.targets is None else [_target_of(fields) for fields in samples]
    except (ValueError, OSError) as error:
        raise CacheError(f"{path} is made again from what an export wrote. Got: {error}. Export again.") from None
    with beside(path) as file:
        values = replace(part, targets=targets)
        fmt.save_shard(file.temporary, shard, index.layout, index.config, rows, values, index.version)
        if (got := file_sha256(file.temporary)) != entry.sha256:
            raise CacheError(
                f"{path} must come out with the SHA-256 that it had, {entry.sha256[:12]}. Got {got[:12]}, from tars "
                "that are whole: another version of safetensors or purifyloader writes it otherwise. Use the versions "
                f"that the cache was made with ({canonical_json(part.made)}), or copy the folder of the cache."
            )
        file.end()
        _check_same_shard(writer.folder, entry)
        writer.put(file, shard, part.source, entry.sha256)


def _pixels(png: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    image = decode_image(png)
    if image.shape != shape:
        raise ValueError(f"an image of {image.dtype} {image.shape}, where all have shape {shape}")
    return image


def _target_of(fields: Mapping[str, bytes]) -> Any:
    """Return a target as it stood in the shard's header."""
    if "cls" in fields:
        return int(fields["cls"])
    if "json" not in fields:
        return None
    target = parse_json(fields["json"], any_value=True)
    canonical_json(target)  # `ValueError` for NaN, which no header has
    return target
