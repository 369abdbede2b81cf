"""Append results to a JSONL file, one row per (attack, defence, seed); safe with concurrent writers."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision

from purifyloader.core.version import __version__
from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json, write_text, writing
from purifyloader.files.locks import Lock

__all__ = ["Row", "add", "fingerprint", "read", "versions"]

Row = dict[str, Any]

SCHEMA = 1


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
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "fingerprint" not in row or row.get("schema") != SCHEMA:
            got = f"schema {row.get('schema')!r}" if isinstance(row, dict) else repr(line[:80])
            raise InputError(
                f"{path} must hold rows of a bench, one a line, of schema {SCHEMA}. Line {number} has {got}. Move the "
                "file away, or give another folder."
            )
        rows.append(row)
    return rows


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
