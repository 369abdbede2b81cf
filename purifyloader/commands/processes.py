"""A command in several processes of this machine, which end when it does."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable

from purifyloader.commands.exit_status import exit_status
from purifyloader.errors import PurifyError

__all__ = ["run_many"]


def run_many(work: Callable[[int], object], processes: int) -> None:
    """Call `work(0)`, `work(1)`, ... each in a process of its own, and wait for all of them.

    Args:
        work: a function of a module, with its arguments bound (`functools.partial`), for it is pickled. An error of the
            user's that it raises is said on standard error.

    Raises:
        PurifyError: one of them stopped; the others have been waited for.
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


def _one(work: Callable[[int], object], number: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def done() -> int:
        work(number)
        return 0

    sys.exit(exit_status(done))


def _end_with_parent() -> None:
    """A command that is killed cannot stop its processes: they would go on for hours, and nobody would know."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
