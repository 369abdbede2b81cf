"""Start `purifyloader precompute` by `accelerate launch -m purifyloader.precompute`, in each of its processes.

The module is callable: importing it must not hide `purifyloader.precompute`, the function, whose place it takes.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from purifyloader.commands.main import main

__all__ = ["main"]


class _Callable(types.ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from purifyloader.purified.filling import precompute

        return precompute(*arguments, **options)


if __name__ == "__main__":
    sys.exit(main(["precompute", *sys.argv[1:]]))
else:
    sys.modules[__name__].__class__ = _Callable
