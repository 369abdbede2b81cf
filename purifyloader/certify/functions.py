"""Find training functions of the user's by name, and identify them by the content of their file."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from purifyloader.datasets.named import find_named
from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json

if TYPE_CHECKING:
    from purifyloader.certify.protocols import Train

__all__ = ["named_training", "training_settings"]


def named_training(spec: str) -> Train:
    """Find the user's training function by its name, "package.module:function".

    The working directory is put at the end of `sys.path`: a module of the user's own is found there, and hides none
    that is installed.

    Raises:
        InputError: there is none of that name, or it is no function.
    """
    module, _, name = spec.partition(":")
    if not module or not name or module.startswith("."):  # a path, or relative to nothing
        raise InputError(
            f"Expected a training function as package.module:function. Got {spec!r}: give one of (training set, seed) "
            "that returns a predictor."
        )
    function = find_named(module, name)
    if not callable(function):
        raise InputError(f"Expected {spec!r} to be a function of (training set, seed). Got {type(function).__name__}.")
    train: Train = function
    return train


def training_settings(train: Train) -> dict[str, Any]:
    """Identify a training as JSON: by its own `settings()`, or by its name and the hash of the file that it is in.

    Only that file is looked at: what it imports, or reads, may change unnoticed. A `functools.partial` is its function
    and what it gives it; of an object that can be called, the file is that of its class, and its attributes count. So
    do what a function's arguments are by default and what it has enclosed. Without a file, its byte code stands for it.
    """
    given: Any = train
    if callable(settings := getattr(given, "settings", None)):
        return dict(settings())
    if isinstance(given, functools.partial):
        arguments = (
            [_as_json(value) for value in given.args],
            {key: _as_json(value) for key, value in given.keywords.items()},
        )
        return {**training_settings(given.func), "arguments": list(arguments)}
    name = f"{getattr(given, '__module__', '?')}:{getattr(given, '__qualname__', type(given).__name__)}"
    found = {
        "defaults": [*(getattr(given, "__defaults__", None) or ())],
        "keywords": getattr(given, "__kwdefaults__", None) or {},
        "enclosed": [cell.cell_contents for cell in getattr(given, "__closure__", None) or () if _is_filled(cell)],
        "attributes": {} if hasattr(given, "__qualname__") else getattr(given, "__dict__", {}),
    }
    state = {key: _as_json(value) for key, value in found.items() if value}
    source: bytes | None
    try:
        source = Path(inspect.getfile(given if hasattr(given, "__qualname__") else type(given))).read_bytes()
    except (TypeError, OSError):  # built in, or of an interactive session
        code = getattr(given, "__code__", None)
        source = None if code is None else _code(code).encode()
    return {"function": name, "source_sha256": None if source is None else hashlib.sha256(source).hexdigest(), **state}


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a name that has no value yet
        return False


def _code(code: types.CodeType) -> str:
    """Byte code with its names and constants, without where it was written."""
    constants = [_code(value) if isinstance(value, types.CodeType) else repr(value) for value in code.co_consts]
    return repr((code.co_code, code.co_names, constants))


def _as_json(value: Any) -> Any:
    """Return a value as JSON, or its type; of lists, dicts and functions, that of their parts."""
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _as_json(part) for key, part in value.items()}
    if inspect.isfunction(value):
        return {
            "function": value.__qualname__,
            "code_sha256": hashlib.sha256(_code(value.__code__).encode()).hexdigest(),
        }
    try:
        canonical_json(value)
    except (TypeError, ValueError):
        return {"type": f"{type(value).__module__}:{type(value).__qualname__}"}
    return value
