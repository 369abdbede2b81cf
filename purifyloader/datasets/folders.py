"""Walk through folders that somebody else may have made, whose links may lead back, or to one folder in many ways."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from purifyloader.core.checks import shown
from purifyloader.errors import InputError

__all__ = ["all_below", "check_links", "files_below", "is_hidden"]

_DEEPEST = 64  # folders in one another
_WAYS = 16  # in which links lead to one folder: of folders with two links each to the next there are 2^n


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder but for hidden ones, those of linked folders under the names of the links.

    A link that leads back is not followed. Raises `InputError` for a folder in too many others, or that links lead to
    in too many ways; `OSError` for one that cannot be read.
    """
    return _Walk(hidden=False, circles=True).below(folder)


def all_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, hidden ones too; `InputError` for what a reader that follows links never ends."""
    return _Walk(hidden=True, circles=False).below(folder)


def check_links(folder: Path) -> None:
    """Raise an error of `all_below`'s before another library reads the folder."""
    for _ in all_below(folder):
        pass


def is_hidden(path: Path, folder: Path) -> bool:
    """Say whether a file, or a folder below `folder` that it lies in, is hidden."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


class _Walk:
    def __init__(self, *, hidden: bool, circles: bool) -> None:
        self._hidden, self._circles = hidden, circles
        self._ways: Counter[tuple[int, int]] = Counter()

    def below(self, folder: Path, above: tuple[tuple[int, int], ...] = (), linked: bool = False) -> Iterator[Path]:
        """Yield the files; `above` are the folders that this one is in, `linked` says that the way led over a link."""
        status = os.stat(folder)
        here = status.st_dev, status.st_ino
        name = shown(str(folder), 300)
        if here in above:
            if self._circles:
                return
            raise InputError(f"The link {name} leads back to a folder that it lies in, without end. Remove it.")
        if len(above) > _DEEPEST:
            raise InputError(f"Folders may lie in at most {_DEEPEST} others. Got {name}. Move its images up.")
        self._ways[here] += linked  # only links lead to a folder twice
        if self._ways[here] > _WAYS:
            raise InputError(
                f"Links may lead to a folder in at most {_WAYS} ways. Got one more, {name}. Remove links in it."
            )
        with os.scandir(folder) as entries:
            shown_entries = sorted((e for e in entries if self._hidden or not e.name.startswith(".")), key=_name)
        for entry in shown_entries:
            if entry.is_dir():
                yield from self.below(Path(entry.path), (*above, here), linked or entry.is_symlink())
            else:
                yield Path(entry.path)


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name
