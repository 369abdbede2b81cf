"""Take functions and objects apart: what they compute with, as values that can be described or compared."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from purifyloader.files.atomic import canonical_json

T = TypeVar("T")

MOST_LEVELS = 6  # objects and functions inside one another
MOST_VALUES = 1000  # of one attribute, from its first object or function on

_BUILTIN = (types.BuiltinFunctionType, types.MethodWrapperType)
_NAMED = ("purifyloader", "torch", "torchvision", "numpy")  # packages whose functions are known by their names
# These say where something is or keep notes; their class alone counts.
_OPAQUE = (type, types.ModuleType, types.CodeType, os.PathLike, io.IOBase, logging.Logger, logging.Handler)
_ORIGIN = frozenset({"_name_or_path", "name_or_path", "_commit_hash"})  # of Hugging Face's: where a model came from


class Walk:
    """The state of a walk through a value.

    Attributes:
        modules: the ids of modules that have been visited.
        open: the ids of the values that hold the present one.
        levels: how many objects and functions these are.
        left: how many more values are looked at, where levels is not 0.
        entered: whether any object or function was taken apart.
    """

    def __init__(self, modules: set[int] | None = None) -> None:
        self.modules = set() if modules is None else modules
        self.open: set[int] = set()
        self.levels = 0
        self.left = MOST_VALUES
        self.entered = False

    def limited(self, values: Iterable[T]) -> Iterator[T]:
        """Yield the values, inside of objects no more than are left."""
        for value in values:
            if self.levels:
                if self.left <= 0:
                    return
                self.left -= 1
            yield value

    def enter(self) -> bool:
        """Go one object deeper, if that is allowed; `leave` is called in the end."""
        if self.levels == 0:
            self.left = MOST_VALUES
        elif self.levels >= MOST_LEVELS or self.left <= 0:
            return False
        self.levels += 1
        self.entered = True
        return True

    def leave(self) -> None:
        self.levels -= 1


def original(value: Any) -> Any:
    """Return the function that `torch.compile` was given, or the value itself."""
    return vars(value).get("_torchdynamo_orig_callable", value) if isinstance(value, types.FunctionType) else value


def parts(value: Any) -> dict[str, Any]:
    """Return what a function or an object computes with, by name; nothing of classes, C objects and known functions."""
    if isinstance(value, types.FunctionType):
        return {} if _is_known(value) else _function_parts(value)
    if isinstance(value, types.MethodType):
        return {"function": value.__func__, "self": value.__self__}
    if isinstance(value, _BUILTIN):
        owner = value.__self__
        free = owner is None or isinstance(owner, type | types.ModuleType)
        module = getattr(value, "__module__", None)
        return ({"module": module} if module else {}) | ({} if free else {"self": owner})
    if isinstance(value, _OPAQUE):
        return {}
    values = _values(value)
    return {"values": values} if values else {}


def _is_known(function: types.FunctionType) -> bool:
    name = function.__module__
    if not isinstance(name, str) or name.partition(".")[0] not in _NAMED:
        return False
    place: Any = sys.modules.get(name)
    for step in function.__qualname__.split("."):
        place = getattr(place, step, None)
    return place is function


def _function_parts(function: types.FunctionType) -> dict[str, Any]:
    code = function.__code__
    cells = dict(zip(code.co_freevars, map(_content, function.__closure__ or ()), strict=True))
    more = {name: value for name, value in vars(function).items() if name != "__wrapped__"}  # which is in a cell
    found = {
        "defaults": function.__defaults__,
        "keyword_defaults": function.__kwdefaults__,
        "closure": cells,
        "values": more,
    }
    return {"body": code, **{name: value for name, value in found.items() if value}}


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it has none yet
        return None


def _values(value: Any) -> dict[str, Any]:
    cls: Any = type(value)
    hidden = _hidden(cls)
    held = list(getattr(value, "__dict__", {}).items())
    values = {name: part for name, part in held if name not in hidden and not name.startswith("__")}
    if callable(wrapped := dict(held).get("__wrapped__")):  # by functools.lru_cache, for one
        values["__wrapped__"] = wrapped
    for name in _slots(cls):
        if hasattr(value, name):
            values[name] = getattr(value, name)
    return values


@functools.cache
def _hidden(cls: Any) -> frozenset[str]:
    members = {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}
    cached = (name for name, value in members.items() if isinstance(value, functools.cached_property))
    return frozenset({*_ORIGIN, *getattr(cls, "for_people", ()), *cached})


@functools.cache
def _slots(cls: Any) -> tuple[str, ...]:
    bases = [vars(base) for base in cls.__mro__ if "__slots__" in vars(base)]
    names = (name for base in bases for name, value in base.items() if isinstance(value, types.MemberDescriptorType))
    return tuple(sorted({*names} - _hidden(cls)))


def code_sha256(code: types.CodeType) -> str:
    """SHA-256, in hex, of a function's bytecode, constants and names; another version of Python may compile others."""
    takes = [code.co_argcount, code.co_kwonlyargcount, code.co_flags & 0xC]  # 0xC: *args and **kwargs
    text = canonical_json([code.co_code.hex(), _constant(code.co_consts), list(code.co_names), takes])
    return hashlib.sha256(text.encode()).hexdigest()


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return ["code", code_sha256(value)]
    if isinstance(value, tuple):
        return ["tuple", *map(_constant, value)]
    if isinstance(value, frozenset):
        return ["frozenset", *sorted(map(_constant, value), key=canonical_json)]
    return [type(value).__name__, repr(value)]  # of a literal
