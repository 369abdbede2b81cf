"""Read a finished cache, index for index the source dataset."""

from __future__ import annotations

import hashlib
import io
import json
import operator
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray

from purifyloader.cache import format as fmt
from purifyloader.cache import values
from purifyloader.cache.format import Layout, Shard, ShardHeader
from purifyloader.core.checks import as_path
from purifyloader.core.decoding import opened_image
from purifyloader.core.notes import NOTES
from purifyloader.errors import CacheError, InputError
from purifyloader.files.atomic import file_sha256

# How a row is read was measured (2 cores, torch 2.15, 32 x 32 RGB, shuffled): 0.7 us from an array over
# torch.from_file, 3.7 us from np.memmap, 3.5 us by safe_open's get_slice, 2.0 us by preadv. Besides,
# np.memmap keeps a file descriptor a shard, of which a process has 1024 by default; torch.from_file none.
# The pages are the system's, shared between workers and read when first touched.

_HASHING_THREADS = 4


class OpenShard:
    """The images of one shard, each checked when it is first read.

    `checked` has a byte a row, shared between processes: 1 where the row's CRC-32 was right. `in_memory` reads the
    whole file now and checks its SHA-256, instead of mapping it.
    """

    def __init__(self, path: Path, header: ShardHeader, checked: NDArray[np.uint8], in_memory: bool = False) -> None:
        self.path, self.header = path, header
        self._crc32, self._checked = header.crc32, checked
        self._count = header.shard.count
        try:
            data = np.fromfile(path, np.uint8) if in_memory else _mapped(path, header.file_size)
            if len(data) != header.file_size:
                raise OSError(f"{len(data)} bytes")
        except (RuntimeError, OSError) as error:
            raise CacheError(
                f"{path} must stay as it was when the cache was opened, {header.file_size} bytes. Got: {error}. "
                "Precompute into this folder again and open the cache anew."
            ) from None
        if in_memory:
            if hashlib.sha256(data[header.offset :].data).hexdigest() != header.tensor_sha256:
                raise CacheError(
                    f"The images of {path} must have the SHA-256 in its header. Got another: the file is damaged. "
                    "Precompute into this folder again: only this shard is made anew."
                )
            checked[:] = 1
        stored = data[header.offset :]
        self._ends = None if header.sizes is None else np.cumsum(header.sizes).tolist()
        self.rows = stored if header.image_shape is None else stored.reshape(-1, *header.image_shape)

    def row(self, local: int, draw: int) -> NDArray[np.uint8]:
        """Image `local` of the shard, (H, W, C): a view of the file where images are raw, not to be written to."""
        at = draw * self._count + local
        if self._ends is None:
            image = self.rows[at]
            if not self._checked[at]:
                self._check(at, image)
            return image
        data = self.rows[self._ends[at - 1] if at else 0 : self._ends[at]]
        if not self._checked[at]:
            self._check(at, data)
        try:
            return decode_image(data.data)
        except ValueError as error:
            raise CacheError(
                f"{self.path} must hold images that can be read. Got image {self.header.shard.start + local} that "
                f"cannot ({error!s:.200}), and with the checksum of whoever wrote it: precompute the cache anew."
            ) from None

    def _check(self, at: int, data: NDArray[np.uint8]) -> None:
        if zlib.crc32(data.data) != self._crc32[at]:
            raise CacheError(
                f"{self.path} must hold the images that were written. Got image "
                f"{self.header.shard.start + at % self._count} with another checksum: the file is damaged. "
                "Precompute into this folder again: only this shard is made anew."
            )
        self._checked[at] = 1


def decode_image(png: bytes | memoryview) -> NDArray[np.uint8]:
    """Read an image, (H, W, C), from the bytes of a PNG file; `ValueError` for what is none of 8 bits."""
    try:
        with opened_image(io.BytesIO(png), ("PNG",)) as picture:
            image = np.asarray(picture)
    except Exception as error:  # what Pillow's decoders raise on damaged files is not a closed list
        raise ValueError(f"no image ({error!s:.200})") from None
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"an image of {image.dtype} {image.shape}")
    return image if image.ndim == 3 else image[:, :, None]


def _mapped(path: Path, size: int) -> NDArray[np.uint8]:
    """Map a file privately, opened for reading."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # a name that is no UTF-8, which torch does not take
        return np.memmap(path, np.uint8, "c")
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8, device="cpu").numpy()


class Targets(Sequence[Any]):
    """The fields that samples hold beside their image, decoded when they are read."""

    def __init__(self, encoded: Sequence[Any], of: object = "A cache") -> None:
        self._of = of  # for errors
        # Integers, which class labels are, as an array, and others as text: a list of objects would cost a forked
        # worker a copy of each.
        simple = all(type(value) is int and -(2**63) <= value < 2**63 for value in encoded)
        self.integers = np.array(encoded, np.int64) if simple else None
        texts = [] if simple else [json.dumps(value).encode() for value in encoded]
        self._text = b"".join(texts)
        self._ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._length = len(encoded)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self.integers is not None:
            return int(self.integers[index])
        at = range(self._length)[index]  # as a list has it: negative, or an IndexError
        try:
            return values.decode(json.loads(self._text[self._ends[at - 1] if at else 0 : self._ends[at]]))
        except ValueError as error:
            raise CacheError(
                f"{self._of} must hold the targets of its samples. Got those of index {at} that cannot be read: "
                f"{error}. Precompute the cache anew."
            ) from None

    def get(self, positions: Sequence[int]) -> list[Any]:
        """Read those of several samples, in their order."""
        if self.integers is not None:
            return self.integers[list(positions)].tolist()
        return [self[i] for i in positions]

    def replaced(self, changed: Mapping[int, Any]) -> Targets:
        """Copy them with other fields at some positions."""
        return Targets([values.encode(changed.get(i, field)) for i, field in enumerate(self)], self._of)


class CacheReader:
    """The images of a cache, as a map-style dataset of uint8 arrays (H, W, C).

    Opening checks the index, each shard's header and the sizes of the files. Each image is checked against
    its CRC-32 when it is first read; `verify` checks every byte. Pickles as its path and its index, and maps
    each file in each process when it is first read.

    Args:
        folder: a finished cache; `CacheError` where it is missing, unfinished, damaged or of another version.
        config: the configuration that the images must have been made with; None takes any.
        former: gives that configuration as caches of version 2 have it, or raises `ConfigError`; by default `config`.
        in_memory: read all files into memory now, for slow or remote disks. A process started by "spawn"
            reads its own copy; a forked one shares it.

    >>> import torch
    >>> from purifyloader import precompute, recipes
    >>> dataset = [(torch.full((3, 32, 32), 0.5), label) for label in range(4)]
    >>> reader = precompute(dataset, recipes.jpeg(quality=10), "cache", progress=False)
    >>> len(reader), reader[3].shape
    (4, (32, 32, 3))
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        in_memory: bool = False,
        *,
        former: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        self.folder = as_path(folder).absolute()  # the working directory may change before the first read
        try:
            self.index = fmt.read_index(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            raise CacheError(_why_no_index(self.folder)) from None
        if config is not None and former is not None and self.index.version == fmt.FORMER:
            config = fmt.by_former_rule(self.folder, former)
        if config is not None and (
            changed := fmt.differences(self.index.config, fmt.plain("The configuration of a cache", config))
        ):
            raise CacheError(
                f"The cache {self.folder} must have been made with the configuration asked for. "
                f"Got one that differs (there → asked for):\n{changed}\n"
                "Ask for the configuration of the cache, or precompute into another folder."
            )
        # the fingerprint is the SHA-256 of the identity: configuration, source, kind of device
        self.fingerprint, self.identity, self.config = self.index.fingerprint, self.index.identity, self.index.config
        self.plan = self.index.plan  # as it was given to `CacheWriter.finish`
        self.layout: Layout = self.index.layout
        self.image_shape, self.draws = self.index.image_shape, self.layout.draws
        self._in_memory = in_memory
        self._length, self._size = self.layout.length, self.layout.shard_size
        shards = self.layout.shards
        headers = [self._checked_header(s, e) for s, e in zip(shards, self.index.shards, strict=True)]
        targets = [header.targets for header in headers]
        # the other fields of each sample; None if they are not stored
        self.targets = None if None in targets else Targets([v for part in targets for v in part or ()], self.folder)
        self._headers = [replace(header, targets=None) for header in headers]
        self._stats = [_stat(self.folder / shard.file) for shard in shards]
        # Of all draws; in shared memory, so that what one worker has checked no other checks again.
        self._flags = torch.zeros(self.layout.draws * self._length, dtype=torch.uint8, device="cpu").share_memory_()
        self._start()

    @property
    def sample(self) -> dict[str, Any] | None:
        """How samples are put together, None where they differ or were not noted."""
        first = self._headers[0].sample
        return first if all(header.sample == first for header in self._headers) else None

    def image_types(self) -> list[str]:
        """Say how each image was held in the source: "pil/uint8/3" is container, dtype, dimensions."""
        out: list[str] = []
        for header in self._headers:
            types = header.image_types
            out += [types] * header.shard.count if isinstance(types, str) else types
        return out

    def source_hashes(self) -> NDArray[np.uint64] | None:
        """Return 64-bit hashes of each source image and of its targets, (N, 2); None if they were not taken."""
        parts = [header.source for header in self._headers if header.source is not None]
        return np.concatenate(parts) if len(parts) == len(self._headers) else None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> NDArray[np.uint8]:
        """Image `index` of draw 0, a copy, uint8 (H, W, C). Negative indices count from the end.

        Raises `IndexError` outside the dataset, `CacheError` where the image is not the one that was written.
        """
        return self.row(self._position(index)).copy()

    def get(self, indices: Iterable[SupportsIndex], draw: int = 0) -> list[NDArray[np.uint8]]:
        """Return the images of several indices, in their order, each (H, W, C)."""
        self._check_draw(draw)
        return [self.row(self._position(i), draw).copy() for i in indices]

    def batch(self, indices: Iterable[SupportsIndex], draw: int = 0) -> NDArray[np.uint8]:
        """Return the same as one array (B, H, W, C); `InputError` for images of different sizes."""
        self._check_draw(draw)
        positions = self._positions(list(indices))
        NOTES.purified += 1
        if self._whole is not None:
            return self._whole[draw, positions]
        if not len(positions):
            return np.empty((0, *(self.image_shape or (0, 0, 3))), np.uint8)
        rows = self._checked_rows(positions, draw)
        if self.image_shape is None and len({row.shape for row in rows}) > 1:
            raise InputError("batch takes images of one size. Got several: use get, and resize them.")
        # several times as fast as np.stack, which makes a view of each first
        return np.concatenate(rows).reshape(len(rows), *rows[0].shape)

    def row(self, position: int, draw: int = 0) -> NDArray[np.uint8]:
        """Image `position`, from 0, of a draw: where images are raw, a view that must not be written to."""
        NOTES.purified += 1
        if self._whole is not None:
            return self._whole[draw, position]
        number, local = divmod(position, self._size)
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = self._opened(number)
        return shard.row(local, draw)

    def _checked_rows(self, positions: NDArray[np.int64], draw: int) -> list[NDArray[np.uint8]]:
        """Read `row` of each, without asking for each what can be asked for all at once."""
        numbers, locals_ = np.divmod(positions, self._size)
        starts = numbers * self._size
        rows = draw * np.minimum(self._size, self._length - starts) + locals_
        if self.image_shape is None or not self._flags_array[self.layout.draws * starts + rows].all():
            return [self.row(position, draw) for position in positions.tolist()]
        try:
            return [self._arrays[n][r] for n, r in zip(numbers.tolist(), rows.tolist(), strict=True)]
        except KeyError:  # checked by another process, and not yet mapped by this one
            return [self.row(position, draw) for position in positions.tolist()]

    def verify(self) -> None:
        """Read every file and check its hash; `CacheError` names the files that are damaged."""

        def good(entry: fmt.ShardEntry) -> bool:
            path = self.folder / entry.file
            return path.is_file() and file_sha256(path) == entry.sha256

        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            right = list(pool.map(good, self.index.shards))
        bad = [entry.file for entry, fine in zip(self.index.shards, right, strict=True) if not fine]
        if bad:
            raise CacheError(
                f"Every file of {self.folder} must have the SHA-256 that its index names. Got others in "
                f"{', '.join(bad)}. Precompute into this folder again: only these are made anew."
            )

    def _check_draw(self, draw: int) -> None:
        if not 0 <= draw < self.layout.draws:
            raise InputError(f"draw must be from 0 to {self.layout.draws - 1}. Got {draw}.")

    def _position(self, index: SupportsIndex) -> int:
        try:
            i = operator.index(index)
        except TypeError:
            raise InputError(
                f"A cache is indexed by one integer. Got {type(index).__name__}. Use get(indices) for several images."
            ) from None
        if not -self._length <= i < self._length:
            raise IndexError(f"The cache has images 0 to {self._length - 1}. Got index {i}.")
        return i % self._length

    def _positions(self, indices: Sequence[SupportsIndex]) -> NDArray[np.int64]:
        with suppress(TypeError, OverflowError):
            at = np.array([operator.index(i) for i in indices], np.int64)
            if not len(at) or (at.min() >= 0 and at.max() < self._length):
                return at
        return np.array([self._position(i) for i in indices], np.int64)  # of negative ones, or says what is wrong

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_arrays": {}, "_whole": None, "_flags_array": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        """Make what each process has of its own."""
        self._flags_array = self._flags.numpy()
        self._open: dict[int, OpenShard] = {}
        self._arrays: dict[int, NDArray[np.uint8]] = {}  # of the shards that are open and raw
        self._whole: NDArray[np.uint8] | None = None
        if not self._in_memory:
            return
        if self.image_shape is not None:  # one array, for then a batch is one gather
            self._whole = np.empty((self.layout.draws, self._length, *self.image_shape), np.uint8)
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            shards = list(pool.map(self._loaded, range(len(self._headers))))
        self._open = {n: shard for n, shard in enumerate(shards) if shard is not None}

    def _opened(self, number: int) -> OpenShard:
        header = self._headers[number]
        start = self.layout.draws * header.shard.start
        path = self.folder / header.shard.file
        flags = self._flags_array[start : start + self.layout.draws * header.shard.count]
        # what was checked was checked in the file that was there when the cache was opened
        same = path.exists() and _stat(path) == self._stats[number]
        shard = OpenShard(path, header, flags if same else np.zeros_like(flags), self._in_memory)
        if header.image_shape is not None and same:
            self._arrays[number] = shard.rows
        return shard

    def _loaded(self, number: int) -> OpenShard | None:
        shard = self._opened(number)
        if self._whole is None:
            return shard
        part = shard.header.shard
        self._arrays.pop(number, None)
        rows = shard.rows.reshape(self.layout.draws, part.count, *shard.rows.shape[1:])
        self._whole[:, part.start : part.start + part.count] = rows
        return None

    def _checked_header(self, shard: Shard, entry: fmt.ShardEntry) -> ShardHeader:
        path = self.folder / shard.file
        header = fmt.read_shard_header(path)
        same = (header.layout, header.config, header.version) == (self.layout, self.config, self.index.version)
        if not same or (header.shard, header.sha256, header.image_shape) != (shard, entry.header, self.image_shape):
            raise CacheError(
                f"{path} must hold images {shard.start} to {shard.start + shard.count - 1} of the cache "
                f"{self.fingerprint[:12]}, as its index says. Got {header.shard} of shape {header.image_shape}, "
                f"header {header.sha256[:12]} instead of {entry.header[:12]}. Precompute into this folder again: "
                "only this shard is made anew."
            )
        return header


def _stat(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _why_no_index(folder: Path) -> str:
    expected = f"A cache is a folder with {fmt.INDEX_FILE}, written when all shards are there. "
    if not folder.is_dir():
        return f"{expected}Got {folder}, which is no folder. Check the path, or precompute into it."
    done, of, version = 0, None, None
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            header = fmt.read_shard_header(path)
        except CacheError:
            continue
        done, of, version = done + 1, header.layout.shard_count, header.version
    if of is None:
        return f"{expected}Got {folder}, which has neither. Check the path, or precompute into it."
    if version == fmt.FORMER:
        return str(fmt.no_more_of(folder, f"is unfinished ({done} of {of} shards)"))
    return (
        f"{expected}Got {folder}, which is unfinished ({done} of {of} shards). "
        "Precompute into this folder again with the same configuration: these shards are kept."
    )
