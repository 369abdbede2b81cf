"""Who works on which shard: advisory locks on hidden files in the cache's folder.

A lock only saves work. Shards are the same bytes whoever makes them and are renamed into place, so two
processes that both make one, on a file system without locks, do no harm. The system takes a lock away
from a process that dies.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from purifyloader.errors import CacheError

try:
    import fcntl
except ImportError:  # Windows: no locks, and so work done twice where processes meet
    fcntl = None  # type: ignore[assignment]

__all__ = ["Lock", "is_held", "lock_path", "read_note"]


def lock_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.lock"


class Lock:
    """An exclusive lock by the name of what is worked on; a context manager when it waits.

    Between `acquire` and `release` its file holds a number that other processes may read: how many
    images of the shard are done.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = lock_path(folder, name)
        self._file: int | None = None
        self.real = fcntl is not None
        """Whether the file system knows locks, so that holding this one means something."""

    def acquire(self, wait: bool) -> bool:
        """Whether the lock is ours now; `wait` until another process has released it or died.

        Raises:
            CacheError: its file cannot be made.
        """
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
        try:
            return os.open(self._path, flags, 0o666)
        except OSError as error:
            raise CacheError(
                f"Could not write {self._path}. Got: {error}. Make room on the disk or make the folder writable, "
                "and run the same again: what is finished is kept."
            ) from None

    def _is_there(self, handle: int) -> bool:
        """Whether the file that is locked is still the one by that name."""
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether a living process holds this lock; False on a file system without locks."""
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
    """The number a lock's holder has written last; 0 if there is none."""
    try:
        return int(path.read_bytes() or b"0")
    except (OSError, ValueError):
        return 0
