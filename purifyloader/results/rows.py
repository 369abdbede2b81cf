"""Append results to a JSONL file, one row per (attack, defence, seed); safe with concurrent writers."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision

from purifyloader.core.version import __version__
from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json, write_text, writing
from purifyloader.files.json import JsonError, parse_json, read_text
from purifyloader.files.locks import Lock

__all__ = ["Row", "add", "fingerprint", "read", "versions"]

Row = dict[str, Any]

SCHEMA = 1

_Number = int | float

# What the tables read of a row: a type, or an object with these fields
_FIELDS: dict[str, Any] = {
    "fingerprint": str,
    "data": str,
    "attack": str,
    "defence": str,
    "victim": str,
    "training": str,
    "seed": int,
    "images": int,
    "test_images": int,
    "calls": int,
    "accuracy": _Number,
    "sigma_px": _Number | None,
    "seconds": {"purify_an_image": _Number},
    "settings": {"data": {"sha": str}, "attack_seed": int, "fast": bool, "device": str, "purifier": dict | None},
}
_MORE_FIELDS: dict[str, Any] = {  # of some rows
    "success": _Number,
    "flipped": _Number,
    "threads": int,
    "extractor_images": int | None,
    "versions": {"torch": str},
    "attack_moves": {"images": int},
    "wrong_labels": int,
}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Hash all that decides the figures of a row: SHA-256, cut to 16 hex digits."""
    return hashlib.sha256(canonical_json({"schema": SCHEMA, **settings}).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    return {
        "purifyloader": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def read(path: Path) -> list[Row]:
    """Read the rows of a file, in their order; none if there is no such file."""
    if not path.exists():
        return []
    try:
        text = read_text(path)
    except (OSError, JsonError) as error:
        raise _no_rows(path, f"Got: {error}") from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = parse_json(line)
        except JsonError:
            row = None
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            got = f"schema {row.get('schema')!r}" if isinstance(row, dict) else repr(line[:80])
            raise _no_rows(path, f"Line {number} has {got:.200}")
        if wrong := _wrong_fields(row):
            raise _no_rows(path, f"Line {number} has no {wrong} as a bench writes it")
        rows.append(row)
    return rows


def _no_rows(path: Path, got: str) -> InputError:
    return InputError(
        f"{path} must hold rows of a bench, one a line, of schema {SCHEMA}. {got}. Move the file away, or give another "
        "folder."
    )


def _wrong_fields(row: Row) -> str:
    """Name a field of another type, or one that is missing; "" where there is none."""
    clean_success = row.get("clean_success", {})
    if not isinstance(clean_success, dict) or not all(_fits(value, _Number) for value in clean_success.values()):
        return "clean_success"
    some = {name: kind for name, kind in _MORE_FIELDS.items() if name in row}
    return next((name for name, kind in {**_FIELDS, **some}.items() if not _fits(row.get(name, _MISSING), kind)), "")


_MISSING = object()


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(value.get(name, _MISSING), part) for name, part in kind.items())
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def add(path: Path, row: Row) -> None:
    """Put a row among those of the file, in the place of one with its fingerprint; a reader never sees half of it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), Lock(path.parent, path.name):
        rows = {old["fingerprint"]: old for old in read(path)}
        rows[row["fingerprint"]] = row
        write_text(path, "".join(canonical_json(each) + "\n" for each in in_order(rows.values())))


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Sort rows by what was measured, and not by which process was done first."""
    return sorted(rows, key=lambda row: (row["data"], row["attack"], row["defence"], row["seed"], row["fingerprint"]))
