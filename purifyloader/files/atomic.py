"""Write files so that a reader never sees half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from purifyloader.errors import PurifyError
from purifyloader.files.opening import opened


class Beside:
    """A whole file at a temporary path beside `path`, which can be put into its place."""

    def __init__(self, path: Path, temporary: Path) -> None:
        self.path, self.temporary = path, temporary

    def replace(self) -> None:
        """Put it there, over what is there."""
        os.replace(self.temporary, self.path)

    def create(self) -> bool:
        """Put it there unless there is a file of that name, and say whether it was put.

        Of all processes that try this one succeeds, with or without locks.
        """
        try:
            os.link(self.temporary, self.path)
        except FileExistsError:
            return False
        except (OSError, AttributeError, NotImplementedError):  # a file system without hard links
            try:
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError:
                return False
            self.replace()
        return True

    def end(self, *, private: bool = False) -> None:
        """Bring it onto the disk, for all to read unless it is `private`, before it is put into its place."""
        with open(self.temporary, "rb") as file:
            os.fsync(file.fileno())
        if not private:
            _show_to_others(self.temporary, 0o666)  # mkstemp's 0600 would hide a shared cache from others


@contextmanager
def beside(path: Path) -> Iterator[Beside]:
    """Yield an empty file beside `path`, which is removed at the end unless it was put into its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        yield Beside(path, Path(name))
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed onto it when the block ends and removed when it fails."""
    with beside(path) as file:
        yield file.temporary
        file.end()
        file.replace()


@contextmanager
def creating(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Do the same for a new file: `FileExistsError` where there is one of that name by the end, which stays."""
    with beside(path) as file:
        yield file.temporary
        file.end(private=private)
        if not file.create():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _show_to_others(path: Path, mode: int) -> None:
    with suppress(OSError):  # FAT, CIFS and some FUSE file systems know no modes, and hide nothing
        os.chmod(path, mode & ~_umask())


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_new(path: Path, text: str, *, private: bool = False) -> bool:
    """Write a file as `creating` does; say whether it was written, and not there before."""
    try:
        with creating(path, private=private) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except FileExistsError:
        if not os.path.lexists(path):  # a file stands where its folder should
            raise
        return False
    return True


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def canonical_json(value: Any) -> str:
    """Write the same text for the same value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def file_sha256(path: Path) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Do the same with a folder; `OSError` where `folder` holds something by the end."""
    folder = folder.resolve()  # a link stays one
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield temporary
        _show_to_others(temporary, 0o777)  # mkdtemp's 0700 would hide it from others
        if folder.is_dir():
            folder.rmdir()
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(
    path: Path, error: type[PurifyError] = PurifyError, advice: str = "Give a folder that can be written to, with room."
) -> Iterator[None]:
    """Raise an `error` of the library's for what the disk refuses; `advice` says what to do."""
    try:
        yield
    except (SafetensorError, OSError) as caught:
        raise error(f"Could not write {path}. Got: {caught}. {advice}") from caught
