"""Write the results of a command to a folder: refused early, and no old file stays beside a newer one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from purifyloader.errors import InputError
from purifyloader.files.atomic import write_text, writing
from purifyloader.files.locks import Lock
from purifyloader.results.figures import has_matplotlib

__all__ = ["Written", "check_out", "write_files", "writing"]


def check_out(folder: Path | None, files: Sequence[str], overwrite: bool, what: str) -> None:
    """Refuse before minutes of work a folder (None for none) that could not be written to after them.

    It must be writable, and without the `files`, which are `what`, such as "an audit", unless these may be replaced.
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
    """Create the folder and a file in it, and leave nothing behind."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    finally:
        for path in created:
            with suppress(OSError):  # not created, or somebody else's file is in it by now
                path.rmdir()


class Written(NamedTuple):
    """Files that were written, the picture last, and a note where one was wanted and there is none."""

    paths: list[Path]
    note: str


def write_files(
    folder: Path, texts: Mapping[str, str], picture_file: str, draw: Callable[[Path], object] | None
) -> Written:
    """Write the files of one result to a folder, each whole or not at all, over those of these names.

    `texts` are all files but the picture, which `draw` writes to a path; None for no picture. Without matplotlib it is
    not called, and the note says so.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(folder), Lock(folder, picture_file, traceless=True):  # so that all are of one process
        return _write_files(folder, texts, picture_file, draw)


def _write_files(
    folder: Path, texts: Mapping[str, str], picture_file: str, draw: Callable[[Path], object] | None
) -> Written:
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
