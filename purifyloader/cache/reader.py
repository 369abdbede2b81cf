"""Reading a finished cache, index for index the source dataset."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray

from purifyloader.cache import format as fmt
from purifyloader.errors import CacheError, InputError
from purifyloader.files import file_sha256

__all__ = ["CacheReader"]

# How a row is read was measured (2 cores, torch 2.15, 32 x 32 RGB, shuffled): 0.7 us from an array over
# torch.from_file, 3.7 us from np.memmap, 3.5 us by safe_open's get_slice, 2.0 us by preadv. Besides,
# np.memmap keeps a file descriptor a shard, of which a process has 1024 by default; torch.from_file none.
# The pages are the system's, shared between workers and read when first touched.


class CacheReader:
    """The images of a cache, as a map-style dataset of uint8 arrays (H, W, C).

    Opening checks the index, each shard's header and the sizes of the files; `verify` checks every byte.
    Pickles as its path and its index, and maps each file in each process when it is first read.

    Args:
        folder: what `CacheWriter` finished.
        config: the configuration that the images must have been made with; None takes any.

    Raises:
        CacheError: the cache is missing, unfinished, damaged, newer, or of another configuration.
    """

    def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder).absolute()  # the working directory may change before the first read
        try:
            self._index = fmt.read_index(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            raise CacheError(_why_no_index(self.folder)) from None
        if config is not None and fmt.fingerprint(config) != self.fingerprint:
            changed = fmt.differences(self.config, fmt.plain("The configuration of a cache", config))
            raise CacheError(
                f"The cache {self.folder} must have been made with the configuration asked for. "
                f"Got one that differs (there → asked for):\n{changed}\n"
                "Ask for the configuration of the cache, or precompute into another folder."
            )
        self._shards = fmt.shards_of(self._index.length, self._index.shard_size)
        self._offsets = [self._check_shard(shard) for shard in self._shards]
        self._maps: dict[int, NDArray[np.uint8]] = {}

    @property
    def fingerprint(self) -> str:
        return self._index.fingerprint

    @property
    def config(self) -> dict[str, Any]:
        """The configuration whose SHA-256 the fingerprint is."""
        return self._index.config

    @property
    def plan(self) -> dict[str, Any] | None:
        """What was decided over the whole dataset, as it was given to `CacheWriter.finish`."""
        return self._index.plan

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return self._index.image_shape

    def __len__(self) -> int:
        return self._index.length

    def __getitem__(self, index: SupportsIndex) -> NDArray[np.uint8]:
        """Image `index`, a copy, uint8 (H, W, C). Negative indices count from the end.

        Raises:
            IndexError: outside the dataset.
            InputError: not an integer.
        """
        try:
            i = operator.index(index)
        except TypeError:
            raise InputError(
                f"A cache is indexed by one integer. Got {type(index).__name__}. Use get(indices) for several images."
            ) from None
        length = self._index.length
        if not -length <= i < length:
            raise IndexError(f"The cache has images 0 to {length - 1}. Got index {i}.")
        number, row = divmod(i % length, self._index.shard_size)
        images = self._maps.get(number)
        if images is None:
            images = self._maps[number] = self._map(number)
        return images[row].copy()

    def get(self, indices: Iterable[SupportsIndex]) -> list[NDArray[np.uint8]]:
        """The images of several indices, in their order."""
        return [self[i] for i in indices]

    def verify(self) -> None:
        """Read every file and check its hash.

        Raises:
            CacheError: names the files that are damaged.
        """
        bad = []
        for entry in self._index.shards:
            path = self.folder / entry.file
            if not path.is_file() or file_sha256(path) != entry.sha256:
                bad.append(entry.file)
        if bad:
            raise CacheError(
                f"Every file of {self.folder} must have the SHA-256 that its index names. Got others in "
                f"{', '.join(bad)}. Precompute into this folder again: only these are made anew."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def _check_shard(self, shard: fmt.Shard) -> int:
        """Where the shard's images start in its file."""
        path = self.folder / shard.file
        header = fmt.read_shard_header(path)
        got = (header.shard, header.fingerprint, header.image_shape)
        if got != (shard, self.fingerprint, self.image_shape):
            raise CacheError(
                f"{path} must hold images {shard.start} to {shard.start + shard.count - 1} of shape "
                f"{self.image_shape} of the cache {self.fingerprint[:12]}. Got {header.shard} of shape "
                f"{header.image_shape} of {header.fingerprint[:12]}. Delete this file and precompute "
                "into this folder again."
            )
        return header.offset

    def _map(self, number: int) -> NDArray[np.uint8]:
        shard, offset = self._shards[number], self._offsets[number]
        shape = (shard.count, *self.image_shape)
        path = self.folder / shard.file
        try:
            # a private mapping of a file opened for reading
            data = torch.from_file(str(path), shared=False, size=offset + math.prod(shape), dtype=torch.uint8)
        except RuntimeError as error:
            raise CacheError(
                f"{path} must stay as it was when the cache was opened. Got: {error}. "
                "Precompute into this folder again and open the cache anew."
            ) from None
        return data.numpy()[offset:].reshape(shape)


def _why_no_index(folder: Path) -> str:
    """What to say of a folder that has no index."""
    expected = f"A cache is a folder with {fmt.INDEX_FILE}, written when all shards are there. "
    if not folder.is_dir():
        return f"{expected}Got {folder}, which is no folder. Check the path, or precompute into it."
    done, of = 0, None
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            header = fmt.read_shard_header(path)
        except CacheError:
            continue
        done, of = done + 1, len(fmt.shards_of(header.length, header.shard_size))
    if of is None:
        return f"{expected}Got {folder}, which has neither. Check the path, or precompute into it."
    return (
        f"{expected}Got {folder}, which is unfinished ({done} of {of} shards). "
        "Precompute into this folder again with the same configuration: these shards are kept."
    )
