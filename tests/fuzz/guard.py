"""Run something under limits: of memory and time, with no process, no network and nothing written outside a folder."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEMORY = 2**30  # bytes more than before
SECONDS = 10  # of the CPU
_PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
_PROCESSES += ("pty.spawn", "socket.connect", "socket.bind", "ctypes.dlopen")
_PATHS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")


class BrokenLimit(AssertionError):
    """Something did what the opening of a file never does."""


class _Watch:
    root: Path | None = None
    thread = 0
    seen: list[str] = []
    installed = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    root = _Watch.root
    if root is None:
        return
    if event in _PROCESSES:
        _Watch.seen.append(f"{event} {arguments!r:.200}")
    elif event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes and not isinstance(path, int):
            _check_inside(root, event, path)
    elif event in _PATHS:
        for path in arguments[:2]:
            if isinstance(path, str | bytes | os.PathLike):
                _check_inside(root, event, path)


def _check_inside(root: Path, event: str, path: Any) -> None:
    where = os.path.abspath(os.fsdecode(path))
    if where != os.devnull and not where.startswith((f"{root}{os.sep}", "/dev/shm/torch_", "/torch_")):
        _Watch.seen.append(f"{event} {where}")


def _overrun(number: int, frame: object) -> None:
    raise BrokenLimit(f"more than {SECONDS} s")


@contextlib.contextmanager
def limits(root: Path) -> Iterator[None]:
    """Raise `BrokenLimit` where the block does more than it may; it may write below `root`."""
    if not _Watch.installed:
        sys.addaudithook(_audit)  # for ever, so it asks for `root` first
        _Watch.installed = True
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_main = threading.current_thread() is threading.main_thread()
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    former = signal.signal(signal.SIGPROF, _overrun) if in_main else None
    _Watch.root, _Watch.seen = root.resolve(), []
    began = time.process_time()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_virtual() + MEMORY, hard))
        if in_main:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
        yield
    except MemoryError as error:
        raise BrokenLimit(f"more than {MEMORY:,} bytes") from error
    finally:
        if in_main:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, former)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        _Watch.root, seen = None, _Watch.seen
        sys.dont_write_bytecode = bytecode
    if time.process_time() - began > SECONDS:
        raise BrokenLimit(f"{time.process_time() - began:.1f} s")
    if seen:
        raise BrokenLimit("; ".join(seen[:5]))


def _virtual() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error was made of one of memory, which the limit caused."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or "allocate" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
