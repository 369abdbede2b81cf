"""Make things that several processes ask for, each once: claim one, make it, write it whole, go on to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from purifyloader.files.locks import Lock

__all__ = ["make_missing"]

Item = TypeVar("Item")


def make_missing(
    items: Iterable[Item],
    *,
    is_done: Callable[[Item], bool],
    lock: Callable[[Item], Lock],
    make: Callable[[Item], object],
    is_busy: Callable[[Item], bool] = lambda item: False,
) -> None:
    """Make every item that is missing, in this order; returns when all are there, made here or by another process.

    Items that another process is making, or would at once wait for (`is_busy`), are put off to a second round. There
    this process waits for each, and makes it where the other one died. `make` writes an item whole, and `lock` only
    saves work: two processes that make one item must do no harm.
    """
    left, wait = list(items), False
    while left:
        put_off = []
        for item in left:
            if is_done(item):
                continue
            claim = lock(item)
            if (not wait and is_busy(item)) or not claim.acquire(wait):
                put_off.append(item)
                continue
            try:
                if not is_done(item):  # another process may have made it before this one had the lock
                    make(item)
            finally:
                claim.release()
        left, wait = put_off, True
