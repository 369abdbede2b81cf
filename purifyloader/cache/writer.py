"""Writing a cache shard by shard. The shards that verify are the state of an interrupted run."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor

from purifyloader.cache import format as fmt
from purifyloader.cache.format import Shard
from purifyloader.errors import CacheError, InputError
from purifyloader.files import canonical_json, replacing

__all__ = ["CacheWriter"]

log = logging.getLogger(__name__)


class CacheWriter:
    """Fills a folder with the purified images of a dataset.

        writer = CacheWriter(folder, config, len(dataset))
        for shard in writer.pending():
            writer.write(shard, purified(range(shard.start, shard.start + shard.count)))
        writer.finish()

    Holds one shard at a time. Processes may share the folder if each writes some of the pending shards;
    whoever finds all of them there finishes.

    Args:
        folder: made where it is missing; nothing but a cache may stand in it.
        config: all that decides the pixels, as JSON; its SHA-256 is the fingerprint.
        length: images of the dataset.
        shard_size: images a file.

    Raises:
        InputError: length or shard_size is no positive integer.
        ConfigError: config is no JSON object.
        CacheError: the folder holds other files, or a cache of another configuration, length or shard size.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Mapping[str, Any],
        length: int,
        shard_size: int = fmt.SHARD_SIZE,
    ) -> None:
        for name, value in (("length", length), ("shard_size", shard_size)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, in images. Got {value!r}.")
        self.folder = Path(folder).absolute()
        self.config = fmt.plain("The configuration of a cache", config)
        self.fingerprint = fmt.fingerprint(self.config)
        self.length = length
        self.shard_size = shard_size
        self.shards = fmt.shards_of(length, shard_size)
        self._image_shape: tuple[int, int, int] | None = None
        self._check_folder()
        self.folder.mkdir(parents=True, exist_ok=True)  # now, not after the first shard was computed

    def pending(self) -> list[Shard]:
        """The shards still to be written: missing ones, and those that do not verify. Reads every file."""
        return [shard for shard in self.shards if self._verify(shard) is None]

    def write(self, shard: Shard, images_NHWC: NDArray[np.uint8] | Tensor) -> None:
        """Write one shard, replacing what is there.

        Args:
            shard: one of `shards`.
            images_NHWC: uint8, (shard.count, H, W, C), of the size of all other shards.

        Raises:
            InputError: the shard is not of this cache, or the images are of another type or shape.
            CacheError: writing failed.
        """
        if shard not in self.shards:
            raise InputError(f"write takes one of the shards that pending() gives. Got {shard}.")
        images = images_NHWC.detach().cpu().numpy() if isinstance(images_NHWC, Tensor) else images_NHWC
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            got = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
            raise InputError(
                f"A cache takes a uint8 array or tensor. Got {got}. "
                "Quantise floats with purifyloader.images before writing them."
            )
        known = self._image_shape
        shape_fits = images.ndim == 4 and len(images) == shard.count and 0 not in images.shape
        if not shape_fits or known not in (None, images.shape[1:]):
            size = "H, W, C" if known is None else ", ".join(map(str, known))
            raise InputError(
                f"{shard.file} takes images of shape ({shard.count}, {size}). Got {images.shape}. "
                "All images of a cache have one size."
            )
        images = np.ascontiguousarray(images)
        self._image_shape = images.shape[1:]
        header = {
            "format": fmt.FORMAT,
            "version": fmt.VERSION,
            "shard": shard.number,
            "start": shard.start,
            "count": shard.count,
            "length": self.length,
            "shard_size": self.shard_size,
            "fingerprint": self.fingerprint,
            "config": self.config,
            "sha256": hashlib.sha256(images.data).hexdigest(),
        }
        # A finished cache of which a shard is made again is not finished: no reader may take it for whole.
        (self.folder / fmt.INDEX_FILE).unlink(missing_ok=True)
        path = self.folder / shard.file
        try:
            with replacing(path) as temporary:
                save_file({fmt.TENSOR: images}, temporary, metadata={fmt.METADATA: canonical_json(header)})
        except SafetensorError as error:
            raise CacheError(f"Could not write {path}: {error}. Is the disk full?") from error

    def finish(self, plan: Mapping[str, Any] | None = None) -> None:
        """Verify every shard and write the index, after which the cache can be read.

        Args:
            plan: a JSON object kept in the index, for what was decided over the whole dataset
                (selected indices, corrected labels). None keeps the plan of a cache already finished.

        Raises:
            CacheError: shards are missing or damaged.
            ConfigError: the plan is no JSON object.
        """
        kept = None if plan is None else fmt.plain("A plan", plan)
        hashes = [(shard, self._verify(shard)) for shard in self.shards]
        entries = [fmt.ShardEntry(shard.file, shard.count, whole) for shard, whole in hashes if whole is not None]
        if len(entries) < len(hashes):
            lacking = [shard.file for shard, whole in hashes if whole is None]
            raise CacheError(
                f"A cache is finished when all its {len(hashes)} shards are there. Got {len(entries)} in "
                f"{self.folder}; missing or damaged: {_some(lacking)}. Write the shards that pending() gives."
            )
        assert self._image_shape is not None  # a shard verified, and length is positive
        index = fmt.Index(
            fingerprint=self.fingerprint,
            config=self.config,
            length=self.length,
            shard_size=self.shard_size,
            image_shape=self._image_shape,
            shards=tuple(entries),
            plan=kept,
        )
        if (old := self._index()) is not None:
            index = replace(index, plan=old.plan) if plan is None else index
            if index == old:  # nothing to say anew, and the folder may be read-only by now
                return
        fmt.write_index(self.folder, index)

    def _index(self) -> fmt.Index | None:
        try:
            return fmt.read_index(self.folder)
        except FileNotFoundError:
            return None

    def _check_folder(self) -> None:
        """Refuse a folder that is not ours to write into. Reads headers only."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise CacheError(f"A cache is a folder. Got the file {self.folder}. Give another path.")
        expected = {shard.file for shard in self.shards}
        strangers = []
        # Hidden files are left alone: temporary files of a killed run, and what file systems put there.
        for name in sorted(path.name for path in self.folder.iterdir() if not path.name.startswith(".")):
            if name == fmt.INDEX_FILE:
                if (index := self._index()) is None:  # another process has just taken it away
                    continue
                self._check_same(name, index.config, index.length, index.shard_size)
            elif fmt.SHARD_FILE.fullmatch(name):
                try:
                    header = fmt.read_shard_header(self.folder / name)
                except CacheError:
                    if name not in expected:
                        strangers.append(name)
                    continue  # a damaged shard is made again
                self._check_same(name, header.config, header.length, header.shard_size)
                if name not in expected:
                    strangers.append(name)
            else:
                strangers.append(name)
        if strangers:
            raise CacheError(
                f"The folder of a cache holds nothing else. Got {self.folder} with {_some(strangers)}. "
                "Give an empty folder, or remove these files."
            )

    def _check_same(self, file: str, config: Mapping[str, Any], length: int, shard_size: int) -> None:
        changed = fmt.differences(
            {"config": config, "length": length, "shard_size": shard_size},
            {"config": self.config, "length": self.length, "shard_size": self.shard_size},
        )
        if changed:
            raise CacheError(
                f"A folder holds one cache. Got {self.folder}, whose {file} was made with another "
                f"configuration (there → now):\n{changed}\nGive another folder, or delete this one."
            )

    def _verify(self, shard: Shard) -> str | None:
        """SHA-256 of the shard's file if it is there and right in every byte, else None."""
        path = self.folder / shard.file
        if not path.exists():
            return None
        try:
            header = fmt.read_shard_header(path)
            tensor, whole = fmt.shard_hashes(path, header.offset)
        except CacheError as error:
            log.warning("%s will be made again: %s", shard.file, error)
            return None
        layout = (header.shard, header.fingerprint, header.length, header.shard_size)
        if layout != (shard, self.fingerprint, self.length, self.shard_size) or tensor != header.sha256:
            log.warning("%s will be made again: it is damaged or of another cache", shard.file)
            return None
        if self._image_shape is None:
            self._image_shape = header.image_shape
        elif self._image_shape != header.image_shape:
            raise CacheError(
                f"All images of a cache have one shape, here {self._image_shape}. "
                f"Got {header.image_shape} in {path}. "
                "Delete the folder and precompute again from images of one size."
            )
        return whole


def _some(files: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(files) - limit} more" if len(files) > limit else ""
    return ", ".join(files[:limit]) + more
