"""Open files that somebody else may have put there: files indeed, and with what their length says on the disk.

Opening a named pipe waits for ever, a device has no end, and a file of holes has any length in a few kilobytes. Each is
an `UnusableFile`, an `OSError` that names the path; whoever reads a file makes it an error of the library's.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

__all__ = ["UNPACKED", "UNPACKED_A_BYTE", "UnusableFile", "check_file", "check_kind", "opened", "opened_number"]

UNPACKED, UNPACKED_A_BYTE = 1 << 29, 16
"""Bytes that a file may come to as it is read or unpacked: so many, and so many for each of its bytes on the disk."""

_KINDS = {stat.S_IFIFO: "a named pipe (FIFO)", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}
_KINDS |= {stat.S_IFBLK: "a device"}


class UnusableFile(OSError):
    """A path leads to something else than a file, or to one that is nearly all holes; the text names it."""


def opened(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file for reading its bytes.

    >>> from pathlib import Path
    >>> from purifyloader.files.opening import opened
    >>> _ = Path("a.txt").write_text("text")
    >>> with opened("a.txt") as file:
    ...     file.read()
    b'text'
    """
    return open(path, "rb", opener=lambda name, flags: opened_number(name))


def opened_number(path: str | os.PathLike[str]) -> int:
    """Do the same as `os.open`: return the number of the open file, which the caller closes."""
    _check_mode(os.stat(path).st_mode, path)  # before it is opened, which may wait, or set a device going
    flags = [getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY")]
    number = os.open(path, os.O_RDONLY | flags[0] | flags[1] | flags[2])
    try:
        check_kind(number, path)  # another may have been put there meanwhile
        _check_length(number, path)
    except BaseException:
        os.close(number)
        raise
    return number


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise an error of `opened`'s before another library opens the file."""
    os.close(opened_number(path))


def check_kind(number: int, path: str | os.PathLike[str]) -> None:
    """Raise an error where an open file is none: a folder, a pipe, a socket or a device."""
    _check_mode(os.fstat(number).st_mode, path)


def _check_mode(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise UnusableFile(f"{Path(path)} is {kind}, where a file is expected")


def _check_length(number: int, path: str | os.PathLike[str]) -> None:
    """Refuse a file of holes. (A file system that does not know them says that all is there.)"""
    size = os.fstat(number).st_size
    if size <= UNPACKED or not hasattr(os, "SEEK_DATA"):
        return
    there = end = 0
    try:
        while UNPACKED + UNPACKED_A_BYTE * there < size:
            start = os.lseek(number, end, os.SEEK_DATA)
            end = os.lseek(number, start, os.SEEK_HOLE)
            there += end - start
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing more is there
            raise UnusableFile(
                f"{Path(path)} is a sparse file: of its {size:,} bytes {there:,} are on the disk, and the rest is holes"
            ) from None
    finally:
        os.lseek(number, 0, os.SEEK_SET)
