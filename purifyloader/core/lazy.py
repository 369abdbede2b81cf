"""Import a package's names when they are first used, for torch, torchvision and kornia take seconds to import."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy(package: str, modules: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` of a package (PEP 562) whose names, or modules by their own, are elsewhere.

    `modules` has the names by the module that defines them, full or relative: {".named": ["open_dataset"]}.
    """
    origin = {name: module for module, names in modules.items() for name in names}

    def find(name: str) -> Any:
        if name not in origin:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(origin[name], package)
        return module if module.__name__.endswith(f".{name}") else getattr(module, name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *origin})

    return find, names
