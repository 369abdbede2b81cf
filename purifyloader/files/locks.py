"""Say who works on which file: advisory locks on hidden files beside it.

A lock only saves work. Shards are the same bytes whoever makes them and are renamed into place, so two processes that
both make one, on a file system without locks, do no harm. The system takes the lock away from a process that dies.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from purifyloader.errors import CacheError
from purifyloader.files.atomic import writing

try:
    import fcntl
except ImportError:  # Windows: no locks, and so work done twice where processes meet
    fcntl = None  # type: ignore[assignment]


KEPT = "Make room on the disk or make the folder writable, and run the same again: what is finished is kept."
"""Advice to those who share a folder, for `files.atomic.writing`."""


def lock_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.lock"


class Lock:
    """An exclusive lock by the name of what is worked on; a context manager when it waits.

    Between `acquire` and `release` its file holds a number that others may read: how many images are done.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = lock_path(folder, name)
        self._file: int | None = None
        self.real = fcntl is not None  # False on a file system without locks, where holding one means nothing

    def acquire(self, wait: bool) -> bool:
        """Take the lock, and say whether it is ours; `wait` until another process has released it or died."""
        while True:
            handle = self._opened()
            try:
                if fcntl is not None:
                    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(handle)
                return False
            except OSError:
                self.real = False
            except BaseException:
                os.close(handle)
                raise
            if self._is_there(handle):
                break
            os.close(handle)  # whoever held it has tidied its file away, and another may lock a new one
        with suppress(OSError):
            os.ftruncate(handle, 0)
        self._file = handle
        return True

    def _opened(self) -> int:
        # a link in a folder of somebody else's must not make us empty a file outside of it
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        with writing(self._path, CacheError, KEPT):
            return os.open(self._path, flags, 0o666)

    def _is_there(self, handle: int) -> bool:
        """Say whether the locked file is still the one by that name."""
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path))
        except FileNotFoundError:
            return False

    def note(self, number: int) -> None:
        """Leave a number for `read_note`; on a full disk it is left out."""
        if self._file is not None:
            with suppress(OSError):
                os.pwrite(self._file, b"%-12d" % number, 0)

    def release(self) -> None:
        handle, self._file = self._file, None
        if handle is None:
            return
        try:
            if fcntl is not None:
                # not by closing alone: a worker forked meanwhile has the file open too, and would keep the lock
                fcntl.flock(handle, fcntl.LOCK_UN)
        except OSError:
            pass
        finally:
            os.close(handle)

    def __enter__(self) -> Self:
        self.acquire(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Say whether a living process holds this lock; False on a file system without locks."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(handle, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def read_note(path: Path) -> int:
    """Return the number that a lock's holder has written last; 0 if there is none."""
    try:
        return int(path.read_bytes() or b"0")
    except (OSError, ValueError):
        return 0
