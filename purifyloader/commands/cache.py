"""Look after caches: `purifyloader cache`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from purifyloader.core.checks import as_path

DESCRIPTION = "Look after purified caches."


def add_options(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="say what a cache is, finished or not; reads no images")
    info.add_argument("folder", type=as_path, metavar="FOLDER")
    info.add_argument("--json", action="store_true", help="as JSON")

    verify = commands.add_parser(
        "verify",
        help="check every byte of a cache",
        description="Check every byte of a cache. Exit status 0: it is finished and whole; 1: it is not.",
    )
    verify.add_argument("folder", type=as_path, metavar="FOLDER")

    export = commands.add_parser("export", help="write a finished cache as WebDataset tars")
    export.add_argument("folder", type=as_path, metavar="FOLDER")
    export.add_argument("out", type=as_path, metavar="OUT", help="new, empty, or an earlier export of the same")
    export.add_argument("--images-per-tar", type=int, default=10_000, metavar="N", help="(default: 10000)")
    export.add_argument("--draw", type=int, default=0, metavar="K", help="which of the cache's draws (default: 0)")

    restore = commands.add_parser("import", help="make the cache again from such tars, byte for byte")
    restore.add_argument("tars", type=as_path, metavar="TARS", help="folder of an export, of a cache of one draw")
    restore.add_argument("out", type=as_path, metavar="OUT", help="folder of the cache, new or empty")

    compare = commands.add_parser("compare", help="say how two finished caches differ")
    compare.add_argument("a", type=as_path, metavar="A")
    compare.add_argument("b", type=as_path, metavar="B")
    compare.add_argument("--draw", type=int, default=0, metavar="K", help="which draw of both (default: 0)")
    compare.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    return _COMMANDS[options.command](options)


def _info(options: argparse.Namespace) -> int:
    from purifyloader.cache.inspect import describe, in_words
    from purifyloader.purified.sanitation import Sanitation

    values = describe(options.folder)
    if options.json:
        return _print_json(values)
    print("\n".join(in_words(values, lambda sanitation: Sanitation.from_dict(sanitation).in_words())))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from purifyloader.cache.inspect import read_folder, verify

    begun = time.monotonic()
    folder = read_folder(options.folder)
    with _bar(folder.shard_bytes, "B") as seen:
        verified = verify(folder, seen)
    print("\n".join(verified.in_words(time.monotonic() - begun)))
    return 0 if verified.is_whole else 1


def _export(options: argparse.Namespace) -> int:
    from purifyloader.cache.format import WHERE
    from purifyloader.cache.inspect import count_in_words, size_in_words
    from purifyloader.cache.reader import CacheReader
    from purifyloader.cache.tars import MANIFEST, export_tars

    begun = time.monotonic()
    reader = CacheReader(options.folder)
    with _bar(len(reader), "img") as seen:
        tars = export_tars(reader, options.out, images_per_tar=options.images_per_tar, draw=options.draw, seen=seen)
    size = size_in_words(sum(tar.stat().st_size for tar in tars))
    draws = (
        f", draw {options.draw} of {reader.draws} (no import can make the cache of them)" if reader.draws > 1 else ""
    )
    notes = "" if reader.targets is not None else "; the cache stores no targets, nor do the tars"
    if ((reader.plan or {}).get(WHERE) or {}).get("sanitation") is not None:
        notes += "; they hold every image and the labels of the source, whatever the cache's sanitation says"
    print(
        f"{options.out}: {len(reader):,} images{draws} in {count_in_words(len(tars), 'tar')} and {MANIFEST}, {size}, "
        f"{time.monotonic() - begun:.0f} s{notes}"
    )
    return 0


def _import(options: argparse.Namespace) -> int:
    from purifyloader.cache.inspect import count_in_words
    from purifyloader.cache.tars import import_tars

    begun = time.monotonic()
    with _bar(None, "img") as seen:
        reader = import_tars(options.tars, options.out, seen=seen)
    shards = count_in_words(len(reader.index.shards), "shard")
    print(
        f"{reader.folder}: {len(reader):,} images, {shards}, every file with the SHA-256 it had, "
        f"{time.monotonic() - begun:.0f} s, fingerprint {reader.fingerprint[:12]}"
    )
    return 0


def _compare(options: argparse.Namespace) -> int:
    from purifyloader.cache.compare import compare
    from purifyloader.cache.reader import CacheReader

    a, b = CacheReader(options.a), CacheReader(options.b)
    with _bar(min(len(a), len(b)), "img") as seen:
        comparison = compare(a, b, draw=options.draw, seen=seen)
    if options.json:
        return _print_json(comparison.to_dict())
    heads = [f"{name}  {cache.folder}  {cache.fingerprint[:12]}" for name, cache in (("A", a), ("B", b))]
    print("\n".join([*heads, *comparison.in_words()]))
    return 0


def _print_json(values: dict[str, Any]) -> int:
    print(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))
    return 0


@contextmanager
def _bar(total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, unit_scale=unit == "B", disable=not sys.stderr.isatty(), leave=False) as bar:
        yield bar.update


_COMMANDS = {"info": _info, "verify": _verify, "export": _export, "import": _import, "compare": _compare}
