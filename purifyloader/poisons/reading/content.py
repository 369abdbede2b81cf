"""Open what a path holds, whatever attack it is of: its first bytes tell the container, and never its name."""

from __future__ import annotations

import math
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.core.checks import stored_integers
from purifyloader.errors import InputError
from purifyloader.files.opening import check_file, opened
from purifyloader.files.pickles import check_archive
from purifyloader.poisons.reading.unpickling import read_pickle, read_torch

__all__ = ["Folder", "as_number_array", "describe", "integers", "open_content", "read_array"]

_TORCH_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # what torch.save wrote first before 1.6
_AGAIN = "Download it again."


@dataclass(frozen=True)
class Folder:
    """A folder, and the names of what lies in it."""

    path: Path
    names: tuple[str, ...]


def open_content(path: Path) -> Any:
    """Read a path as a `Folder`, an array, a dict of arrays, or what a pickle or a file of torch.save holds.

    What is damaged or cut short, or might run code, is refused.
    """
    if path.is_dir():
        return Folder(path, tuple(sorted(item.name for item in path.iterdir() if not item.name.startswith("."))))
    if not path.exists():
        raise InputError(f"Expected a poison file or folder. Got {path}, which is neither. Check the path.")
    try:
        with opened(path) as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"{path} must be a poison file that can be read. Got: {error}.") from None
    if not head:
        raise InputError(f"{path} must be a poison file. Got an empty file. {_AGAIN}")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path} must be a poison file. Got the note that git keeps in place of a large file: fetch the file "
            "itself with `git lfs pull`, or download it."
        )
    if head.lstrip()[:1] == b"<":
        raise InputError(f"{path} must be a poison file. Got a web page. {_AGAIN}")
    if head.startswith(b"\x93NUMPY"):
        return read_array(path)
    if head.startswith(b"PK\x03\x04"):
        return _read_archive(path)
    return read_torch(path) if head.startswith(_TORCH_LEGACY) else read_pickle(path)


def read_array(path: Path) -> NDArray[Any]:
    """Read the array of an .npy file, of numbers; its rows are read from the disk when they are looked at."""
    try:
        check_file(path)
        array = np.load(path, mmap_mode="c", allow_pickle=False)  # read where it is looked at, and never written
    except Exception as error:  # its header is read as Python source, and what that raises is not a closed list
        raise InputError(f"{path} must be a whole .npy file of numbers. Got: {error}. {_AGAIN}") from None
    return np.asarray(array)


def _read_archive(path: Path) -> Any:
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            damaged = archive.testzip()  # torch does not look at the checksums
        if damaged is not None:
            raise InputError(f"{path} must be a whole file. Got {damaged} in it with another checksum. {_AGAIN}")
        if any(name.endswith("data.pkl") for name in names):
            return read_torch(path)
        if names and all(name.endswith(".npy") for name in names):
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    with archive.open(member) as stream:
                        _check_header(stream, member.file_size)
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except InputError:
        raise
    except Exception as error:  # what zipfile and numpy raise on damaged files is not a closed list
        raise InputError(f"{path} must be a whole .npz file or file of torch.save. Got: {error}. {_AGAIN}") from None
    raise InputError(
        f"{path} must be a poison file. Got an archive with {', '.join(names[:5]) or 'nothing'}: unpack it, and give "
        "what is in it."
    )


def _check_header(stream: Any, size: int) -> None:
    """Raise `ValueError` for an array that declares more numbers than its file has."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"it declares {dtype} {shape}, in {size:,} bytes")


def as_number_array(value: Any) -> NDArray[Any] | None:
    """Return a tensor or an array as an array, anything else as None."""
    if isinstance(value, Tensor):
        return value.detach().cpu().float().numpy() if value.is_floating_point() else value.cpu().numpy()
    return np.asarray(value) if isinstance(value, np.ndarray) else None


def integers(value: Any, what: str) -> NDArray[np.int64]:
    """Return a list, array or tensor of integers as int64 (N,); refuse others, `what` by name."""
    if isinstance(value, list | tuple):
        parts = [as_number_array(part) if isinstance(part, Tensor | np.ndarray) else part for part in value]
        array = np.array([], np.int64) if not parts else _stacked(parts)
    else:
        array = as_number_array(value)
    if array is None or array.dtype.kind not in "iu" or array.ndim != 1:
        raise InputError(f"{what} must be integers (N,). Got {describe(value)}.")
    return stored_integers(what, array, low=-(2**63))


def _stacked(parts: list[Any]) -> NDArray[Any] | None:
    try:
        return np.array([part.item() if isinstance(part, np.ndarray) else part for part in parts])
    except ValueError:  # of several lengths
        return None


def describe(value: Any, depth: int = 2) -> str:
    """Describe a value in a few words for a message."""
    if isinstance(value, Folder):
        return f"a folder with {', '.join(value.names[:5]) or 'nothing'}{' ...' if len(value.names) > 5 else ''}"
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, dict):
        inner = ", ".join(f"{key}: {describe(part, depth - 1)}" for key, part in list(value.items())[:5])
        return f"a dict of {len(value)}" + (f" ({inner})" if depth and value else "")
    if isinstance(value, list | tuple):
        inner = ", ".join(describe(part, depth - 1) for part in value[:3])
        items = f" ({inner}{', ...' if len(value) > 3 else ''})" if depth and value else ""
        return f"a {type(value).__name__} of {len(value)}{items}"
    return type(value).__name__
