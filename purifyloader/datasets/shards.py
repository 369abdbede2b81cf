"""Read the CIFAR-10 sample of `examples/data`, or any folder of WebDataset shards named like it."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from purifyloader.errors import InputError

__all__ = ["load_sample", "shards"]


def shards(folder: str | Path, split: str) -> list[Path]:
    """List the files `<split>-000000.tar` or `.tar.gz` and on of a folder, in order; `InputError` if one is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"The sample must be a folder of .tar or .tar.gz shards. Got {folder}: no such folder.")
    paths = sorted(path for path in folder.glob(f"{split}-*.tar*") if path.name.endswith((".tar", ".tar.gz")))
    if not paths:
        raise InputError(f"{folder} must hold shards named {split}-000000.tar.gz and on. Got none.")
    for number, path in enumerate(paths):
        if path.name.split(".")[0] != f"{split}-{number:06d}":
            raise InputError(f"Shard {split}-{number:06d} must come next in {folder}. Got {path.name}.")
    return paths


def _tar_bytes(path: Path) -> bytes:
    """Return the whole uncompressed tar, complete or an error: a stream reader takes some cut files for whole."""
    try:
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} must be a whole gzip file; fetch it again. Got: {error}") from error
    if not content.endswith(bytes(2 * tarfile.BLOCKSIZE)):
        raise InputError(f"{path} must be a whole tar file; fetch it again. Got {len(content)} bytes, cut off.")
    return content


def _decode(path: Path, sample: dict[str, Any]) -> tuple[str, NDArray[np.uint8], int]:
    key = sample["__key__"]
    try:
        with Image.open(io.BytesIO(sample["png"])) as image:
            return key, np.asarray(image.convert("RGB")), int(sample["cls"])
    except KeyError as error:
        raise InputError(f"{path}: sample {key} must have members .png and .cls. Got no {error}.") from error
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise InputError(f"{path}: sample {key} cannot be read. Got: {error}") from error


def load_sample(folder: str | Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Load images uint8 (N, H, W, 3) and labels int64 (N,) of a split, "train" or "test", sorted by key.

    The folder holds `<split>-000000.tar.gz` and on, with members `<key>.png` and `<key>.cls` (in `examples/data` the
    key is CIFAR-10's row). Raises `InputError` for a folder or shard that is missing, cut short or damaged.
    """
    rows: list[tuple[str, NDArray[np.uint8], int]] = []
    for path in shards(folder, split):
        stream = {"url": str(path), "stream": io.BytesIO(_tar_bytes(path))}
        files = webdataset.tariterators.tar_file_expander([stream])
        try:
            rows += [_decode(path, sample) for sample in webdataset.tariterators.group_by_keys(files)]
        except (tarfile.TarError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} must be a tar file of samples; fetch it again. Got: {error}") from error
    rows.sort(key=lambda row: row[0])
    if not rows or len({row[1].shape for row in rows}) != 1:
        shapes = sorted({row[1].shape for row in rows})
        raise InputError(f"The {split} images in {folder} must be of one size, at least one. Got {shapes}.")
    return np.stack([row[1] for row in rows]), np.asarray([row[2] for row in rows], np.int64)
