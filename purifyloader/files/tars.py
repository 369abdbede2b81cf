"""Open tars that somebody else may have written: what a header declares is bounded before it is believed."""

from __future__ import annotations

import re
import tarfile
from typing import BinaryIO, Self

__all__ = ["LONGEST_NAME", "TAR_ERRORS", "opened_tar", "split_name"]

LONGEST_NAME = 4096
"""Characters of the name of a member: what Linux takes for a path."""

TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, IndexError, KeyError)
"""What tarfile raises on a tar that is damaged or hostile."""

_MOST_BEFORE = 2**20  # bytes that a member's own header may have before it: a long name, or PAX records
_MOST_FOR_ALL, _RECORDS_FOR_ALL = 10_000, 100  # bytes of a PAX header for all members, and records of all such headers
_BEFORE = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_MANY_DIGITS = re.compile(rb"\d{21}")  # no length has so many, and tarfile takes quadratic time for them
_TYPE, _SIZE = slice(156, 157), slice(124, 136)


class _Member(tarfile.TarInfo):
    """A member whose extended headers are short, and which is not sparse."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        file = tar.fileobj
        assert file is not None
        start = file.tell()
        block = file.read(tarfile.BLOCKSIZE)
        if block[_TYPE] in (*_BEFORE, *_PAX):
            size = tarfile.nti(block[_SIZE])  # type: ignore[attr-defined]
            # what is said of all is gone through again for each
            if not 0 <= size <= (_MOST_FOR_ALL if block[_TYPE] == tarfile.XGLTYPE else _MOST_BEFORE):
                raise tarfile.ReadError(f"a long name or PAX header of {size:,} bytes, at byte {start}")
            if block[_TYPE] in _PAX and _MANY_DIGITS.search(file.read(size)):
                raise tarfile.ReadError(f"a PAX header with a number of more than 20 digits, at byte {start}")
        file.seek(start)
        member = super().fromtarfile(tar)
        if len(tar.pax_headers) > _RECORDS_FOR_ALL:
            raise tarfile.ReadError(f"{len(tar.pax_headers):,} PAX records for all members, at byte {start}")
        if len(member.name) > LONGEST_NAME:
            raise tarfile.ReadError(f"a name of {len(member.name):,} characters, at byte {start}")
        if member.size < 0 or member.issparse():
            raise tarfile.ReadError(f"{member.name}: a sparse file, or one of negative size")
        return member


def opened_tar(file: BinaryIO) -> tarfile.TarFile:
    """Open a tar, not compressed, for reading; raises one of `TAR_ERRORS`, here and as its members are read.

    A long name, or what PAX says of a member, is at most 1 MB, what it says of all members 10 kB and 100 records; a
    name is at most 4096 characters; no file is sparse.
    """
    return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", tarinfo=_Member)


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name as WebDataset does: path up to the first dot of the base name, and the rest.

    None for a name without an extension. In linear time, which the published pattern does not take.
    """
    head, slash, base = name.rpartition("/")
    first, dot, rest = base.partition(".")
    if not dot:
        return None
    if first:
        return f"{head}{slash}{first}", rest
    return (f"{head}{slash}", rest) if slash and "." not in head.rpartition("/")[2] else None
