"""Read JSON that somebody else may have written: what it holds is bounded, whatever the file says.

All that is no such JSON is a `JsonError`, a `ValueError`; whoever reads a file makes it an error of its own, which
names the file. `purifyloader.files.atomic.canonical_json` writes JSON.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

from purifyloader.files.opening import opened

__all__ = ["DEEPEST", "MOST_BYTES", "JsonError", "parse_json", "read_json", "read_text"]

MOST_BYTES = 2**28
"""Of a file of JSON: the hashes of ten million images have room."""

DEEPEST = 100
"""Objects and lists in one another: whoever walks through them by recursion comes to the end."""

_MOST = 2**1023  # a float holds it


class JsonError(ValueError):
    """A text that is not JSON, or not JSON within the bounds."""


def read_json(path: str | os.PathLike[str], most: int = MOST_BYTES) -> Any:
    """Read a file of JSON of at most `most` bytes; `OSError` or `JsonError`, and the caller names the file."""
    return parse_json(read_text(path, most), most)


def read_text(path: str | os.PathLike[str], most: int = MOST_BYTES) -> str:
    """Read a file of UTF-8 of at most `most` bytes; `OSError` or `JsonError`."""
    with opened(path) as file:
        data = file.read(most + 1)  # and not what the file says of its length: it may be sparse
    _check_length(len(data), most)
    return _decoded(data)


def parse_json(text: str | bytes, most: int = MOST_BYTES, *, any_value: bool = False, deepest: int = DEEPEST) -> Any:
    """Parse JSON of at most `most` bytes, in UTF-8, each key of an object once; `JsonError` for other.

    There are at most `deepest` objects and lists in one another.

    Numbers must be finite and integers of at most 1023 bits, and strings must be Unicode. With `any_value`, as in
    samples of a user's, they may also be what Python writes: NaN, infinity, longer integers, lone surrogates.

    >>> from purifyloader.files.json import parse_json
    >>> parse_json('{"a": [1, 2]}')
    {'a': [1, 2]}
    """
    if not isinstance(text, str | bytes | bytearray):
        raise JsonError(f"Text of JSON is a string. Got {type(text).__name__}.")
    _check_length(len(text), most)
    try:
        value = json.loads(text if isinstance(text, str) else _decoded(text), object_pairs_hook=_object)
    except RecursionError:
        raise JsonError(_too_deep(deepest)) from None
    except json.JSONDecodeError as error:
        raise JsonError(str(error)) from None
    except JsonError:
        raise
    except ValueError as error:  # of a number of too many digits
        raise JsonError(f"a number is too long: {error}") from None
    _check(value, any_value, deepest)
    return value


def _too_deep(deepest: int) -> str:
    return f"there are more than {deepest} objects and lists in one another"


def _check_length(length: int, most: int) -> None:
    if length > most:
        raise JsonError(f"it is longer than {most:,} bytes")


def _decoded(data: bytes | bytearray) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"it is not UTF-8: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"the key {twice[:80]!r} is in an object twice")
    return values


def _check(value: Any, any_value: bool, deepest: int) -> None:
    """Go through all values, level by level, with no recursion."""
    level = [value]
    for _ in range(deepest + 1):
        below: list[Any] = []
        for one in level:
            kind = type(one)
            if kind is list:
                below += one
            elif kind is dict:
                below += one.values()
                if not any_value:
                    below += one  # its keys, which are strings
            elif not any_value:
                _check_leaf(one, kind)
        if not below:
            return
        level = below
    raise JsonError(_too_deep(deepest))


def _check_leaf(value: Any, kind: type) -> None:
    if kind is str:
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise JsonError(f"the string {value[:80]!r} has half of a surrogate pair") from None
    elif kind is float:
        if not math.isfinite(value):
            raise JsonError(f"numbers must be finite; there is {value}")
    elif kind is int and not -_MOST < value < _MOST:
        raise JsonError("integers must have at most 1023 bits; there is one of more")
