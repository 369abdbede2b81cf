"""Say who works on which file: advisory locks on hidden files beside it.

A lock only saves work. Shards are the same bytes whoever makes them and are renamed into place, so two processes that
both make one, on a file system without locks, do no harm. The system takes the lock away from a process that dies, but
not from one that is stopped: so the file says who holds the lock, and whoever waits for it names that process.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from purifyloader.errors import CacheError
from purifyloader.files.atomic import writing
from purifyloader.files.json import parse_json
from purifyloader.files.opening import UnusableFile, check_kind, opened, opened_number

try:
    import fcntl
except ImportError:  # Windows: no locks, and so work done twice where processes meet
    fcntl = None  # type: ignore[assignment]


log = logging.getLogger(__name__)

_POLLS = (0.005, 0.1)  # seconds between the first looks at a lock that another has, and at most
_PATIENCE = (10.0, 300.0)  # seconds without progress before the holder is named, and at most before it is named again
_BUSY = 6.0  # times as patient with a holder on this machine that computes: a batch of a slow sampler takes minutes
_NOTE_BYTES, _LONGEST_NOTE = 12, 10_000

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100  # of CPU time, a second

KEPT = "Make room on the disk or make the folder writable, and run the same again: what is finished is kept."
"""Advice to those who share a folder, for `files.atomic.writing`."""


def lock_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.lock"


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as it says itself in the lock's file."""

    host: str
    pid: int
    started: str | None  # by which a process is told from a later one of the same number; None where there is no /proc

    @classmethod
    def here(cls) -> Holder:
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _process(pid)[1])

    def ticks(self) -> int:
        """Return how much CPU time it has taken; 0 where that is not seen."""
        if self.host != socket.gethostname() or self.started is None:
            return 0
        _, started, ticks = _process(self.pid)
        return ticks if started == self.started else 0

    def in_words(self) -> str:
        """Name the process and, on this machine, its state, with what to do about it."""
        name = f"process {self.pid} on {self.host}"
        wait = "It goes on when that process is done: if it hangs, end it."
        if self.host != socket.gethostname() or self.started is None:
            return f"{name}. {wait}"
        state, started, _ = _process(self.pid)
        if state is None or started != self.started:
            return f"{name}, which is not seen here: it runs in a container, or a process that it started outlives it."
        if state in "Tt":
            return f"{name}, which is stopped. Continue it (kill -CONT {self.pid}) or end it (kill -9 {self.pid})."
        return f"{name}, which is running. {wait}"


def _process(pid: int) -> tuple[str | None, str | None, int]:
    """Return of a process of this machine its state, a letter ("T" is stopped), when it was started, and CPU ticks."""
    try:
        # the name, which may hold anything, stands in parentheses before them
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return words[0], words[19], int(words[11]) + int(words[12])
    except (OSError, IndexError, ValueError):
        return None, None, 0


class Lock:
    """An exclusive lock by the name of what is worked on; a context manager when it waits.

    Between `acquire` and `release` its file holds a number that others may read, how many images are done, and who
    holds it. `traceless` removes the file on release, from a folder that is somebody's result.
    """

    def __init__(self, folder: Path, name: str, *, traceless: bool = False) -> None:
        self._path = lock_path(folder, name)
        self._traceless = traceless
        self._file: int | None = None
        self.real = fcntl is not None  # False on a file system without locks, where holding one means nothing

    def acquire(self, wait: bool) -> bool:
        """Take the lock, and say whether it is ours; `wait` until another process has released it or died.

        A holder that shows no progress for some seconds is named in a warning.
        """
        waiting: _Waiting | None = None
        while (handle := self._locked()) is None:
            if not wait:
                return False
            waiting = waiting or _Waiting(self._path)
            waiting.pause()
        with suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, b"%-*d\n%s\n" % (_NOTE_BYTES, 0, json.dumps(asdict(Holder.here())).encode()), 0)
        self._file = handle
        return True

    def held_by(self) -> str:
        """Say in words who holds it, and what to do."""
        return held_by(self._path)

    def _locked(self) -> int | None:
        """Open the file and lock it; None where another process has it."""
        while True:
            handle, ours = self._opened(), False
            try:
                try:
                    if fcntl is not None:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return None
                except OSError:
                    self.real = False
                ours = self._is_there(handle)  # else whoever held it has tidied its file away
                if ours:
                    return handle
            finally:
                if not ours:
                    os.close(handle)

    def _opened(self) -> int:
        # a link in a folder of somebody else's must not make us empty a file outside of it
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        flags |= getattr(os, "O_NONBLOCK", 0)  # which a named pipe would make us wait without
        with writing(self._path, CacheError, KEPT):
            handle = os.open(self._path, flags, 0o666)
            try:
                check_kind(handle, self._path)
                if os.fstat(handle).st_nlink > 1:  # a second name of a file that may lie anywhere
                    raise UnusableFile(
                        f"{self._path} is a hard link, so the file has another name under which it would be emptied, "
                        "too: remove this one"
                    )
            except OSError:
                os.close(handle)
                raise
            return handle

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
                os.pwrite(self._file, b"%-*d" % (_NOTE_BYTES, number), 0)

    def release(self) -> None:
        handle, self._file = self._file, None
        if handle is None:
            return
        if self._traceless:
            with suppress(OSError):
                self._path.unlink()
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
        handle = opened_number(path)
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
    return _read(path)[0]


def holder(path: Path) -> Holder | None:
    """Return who holds the lock of this file, or held it last; None where the file does not say."""
    return _read(path)[1]


def held_by(path: Path) -> str:
    """Say in words who holds the lock of this file, and what to do about it."""
    return _in_words(holder(path))


def _read(path: Path) -> tuple[int, Holder | None]:
    """Read the file of a lock: a number and, on the line below, the holder. Files of before have the number alone."""
    try:
        with opened(path) as file:
            number, _, holder = file.read(_LONGEST_NOTE).partition(b"\n")
        note = int(number or b"0")
    except (OSError, ValueError):
        return 0, None
    try:
        values = parse_json(holder)
        return note, Holder(str(values["host"]), int(values["pid"]), values["started"])
    except (ValueError, KeyError, TypeError):
        return note, None


class _Waiting:
    """A wait for a lock: it looks often, and says so when whoever holds it does not seem to move."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pause = _POLLS[0]
        self._begun = self._looked = time.monotonic()
        self._watch(_read(path))

    def _watch(self, seen: tuple[int, Holder | None]) -> None:
        self._seen, self._still_since = seen, time.monotonic()
        self._ticks = self._ticks_now(seen)
        self._step = self._due = _PATIENCE[0]  # seconds of stillness after which the holder is named (again)

    @staticmethod
    def _ticks_now(seen: tuple[int, Holder | None]) -> int:
        return 0 if seen[1] is None else seen[1].ticks()

    def _is_due(self, seconds: float) -> bool:
        """Say whether the holder is to be named after so many seconds in which its note did not change."""
        if seconds < self._due:
            return False
        computes = (self._ticks_now(self._seen) - self._ticks) / _TICKS > seconds / 10
        return not computes or seconds >= _BUSY * self._due

    def pause(self) -> None:
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, _POLLS[1])
        now = time.monotonic()
        if now - self._looked < _PATIENCE[0] / 10:
            return
        self._looked = now
        if (seen := _read(self._path)) != self._seen:  # it is at work, or another has the lock by now
            self._watch(seen)
        elif self._is_due(now - self._still_since):
            self._step = min(3 * self._step, _PATIENCE[1])
            self._due += self._step
            who = _in_words(seen[1])
            log.warning("Waiting for %s, %.0f s so far. It is held by %s", self._path, now - self._begun, who)


def _in_words(holder: Holder | None) -> str:
    return "a process that does not say who it is. If it hangs, end it." if holder is None else holder.in_words()
