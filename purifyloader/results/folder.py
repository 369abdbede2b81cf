"""Write the results of a command to a folder: refused early, and no old file stays beside a newer one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from purifyloader.errors import InputError
from purifyloader.files.atomic import write_text, writing
from purifyloader.results.figures import has_matplotlib

__all__ = ["Written", "check_out", "write_files", "writing"]


def check_out(folder: Path | None, files: Sequence[str], overwrite: bool, what: str) -> None:
    """Refuse before minutes of work what could not be written after them.

    Args:
        folder: of the results, None for none.
        files: names of all that will be written there.
        what: the files are, with its article, such as "an audit".

    Raises:
        InputError: the folder holds one of the files and they are not to be replaced, or is none.
        PurifyError: it cannot be looked into, or not be written to.
    """
    if folder is None:
        if overwrite:
            raise InputError("is about files in the output folder. Got none: give the folder.", argument="overwrite")
        return
    with writing(folder):  # or it may not be searched
        if folder.exists() and not folder.is_dir():
            raise InputError(f"must be a folder. Got the file {folder}.", argument="out")
        found = [name for name in files if (folder / name).exists()]
    if found and not overwrite:
        raise InputError(
            f"must be a folder without {what}. Got {folder} with {', '.join(found)}: give another one, or overwrite "
            "them.",
            argument="out",
        )
    with writing(folder):
        _try_writing(folder)


def _try_writing(folder: Path) -> None:
    """Create the folder and a file in it, and leave nothing behind that was not there."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    finally:
        for path in created:
            with suppress(OSError):  # not created, or somebody else's file is in it by now
                path.rmdir()


class Written(NamedTuple):
    """Files that were written.

    Attributes:
        paths: of the files, the picture last.
        note: why there is no picture, where one was wanted; else empty.
    """

    paths: list[Path]
    note: str


def write_files(
    folder: Path, texts: Mapping[str, str], picture_file: str, draw: Callable[[Path], object] | None
) -> Written:
    """Write the files of one result, each whole or not at all; files of these names are replaced.

    Args:
        folder: created where it is not there.
        texts: name and content of each file but the picture.
        draw: writes the picture to a path; None for no picture. It is not called without matplotlib, which the note
            says then.

    Raises:
        PurifyError: a file cannot be written.
    """
    for name in (*texts, picture_file):  # none of an older result may stay beside these
        with writing(folder / name):
            (folder / name).unlink(missing_ok=True)
    for name, text in texts.items():
        with writing(folder / name):
            write_text(folder / name, text)
    paths = [folder / name for name in texts]
    if draw is None:
        return Written(paths, "")
    if not has_matplotlib():
        return Written(paths, "no picture without matplotlib: pip install 'purifyloader[plots]'")
    draw(folder / picture_file)
    return Written([*paths, folder / picture_file], "")
