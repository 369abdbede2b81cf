"""Run a command in several processes of this machine, which end when it does, and turn how each ends into a status."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable

from purifyloader.commands.logs import warnings_shown
from purifyloader.errors import PurifyError, escaped

_USER_ERROR, _INTERRUPTED = 2, 130


def exit_status(work: Callable[[], int | None], in_words: Callable[[PurifyError], str] = str) -> int:
    """Call `work` and return its status, or 0; after an error of the user's print `in_words(error)` and return 2.

    So are errors of the system's: a file or disk that refuses, and memory that runs out.
    """
    try:
        with warnings_shown():
            return work() or 0
    except PurifyError as error:
        print(f"purifyloader: error: {in_words(error)}", file=sys.stderr)
        return _USER_ERROR
    except (OSError, MemoryError, RuntimeError) as error:
        if not (advice := _advice(error)):
            raise
        notes = " ".join(getattr(error, "__notes__", []))
        words = escaped(f"{type(error).__name__}: {error}. {notes} {advice}")
        print(f"purifyloader: error: {words}", file=sys.stderr)
        return _USER_ERROR
    except KeyboardInterrupt:
        print("purifyloader: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _advice(error: Exception) -> str | None:
    """Say what to do about an error of the system's; None for a fault of a program's."""
    if isinstance(error, OSError):
        return "Remove or replace what cannot be read, or make room, and run the same again: what is done is kept."
    # torch has its own error for a GPU, and none for the CPU
    no_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if no_memory or "can't allocate memory" in str(error):
        return (
            "Memory ran out. Give smaller images (--resize, --tile), a smaller --batch-size or fewer --workers, and "
            "run the same again: what is done is kept."
        )
    return None


def run_many(work: Callable[[int], None], processes: int) -> None:
    """Call `work(0)`, `work(1)`, ... each in a process of its own, and wait for all, also where one of them stopped.

    `work` is pickled: a function of a module, with its arguments bound by `functools.partial`.
    """
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_one, args=(work, number)) for number in range(processes)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    if failed := [worker for worker in workers if worker.exitcode]:
        raise PurifyError(
            f"{len(failed)} of {processes} processes stopped, and said why above. What is done is kept: run the same "
            "again."
        )


def _one(work: Callable[[int], None], number: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(exit_status(functools.partial(work, number)))


def _end_with_parent() -> None:
    """A command that is killed cannot stop its processes: they would go on for hours, and nobody would know."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
