"""Make the shards of a cache one by one, and read an unfinished cache whose shards are made when first read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.cache import format as fmt
from purifyloader.cache.format import Shard
from purifyloader.cache.reader import OpenShard
from purifyloader.cache.writer import CacheWriter
from purifyloader.errors import InputError
from purifyloader.files.locks import Lock
from purifyloader.purified.job import Job
from purifyloader.purified.reading import Read, check_source, shard_values

CHECKED = 16  # images of each shard found done that are compared with the source


@dataclass(frozen=True)
class Filling:
    """A cache to fill: what computes its pixels, who writes it, and what its index says beside."""

    job: Job
    writer: CacheWriter
    batch_size: int = 256
    check_source: bool | int = CHECKED  # samples of each shard found done to compare with the source; True for all
    plan: Mapping[str, Any] | None = None
    notes: Mapping[str, Any] | None = None

    def compare(self, shard: Shard) -> None:
        """Compare the source with what a shard that is there was made from."""
        if self.check_source is False:
            return
        folder = self.writer.folder
        hashes = fmt.read_shard_header(folder / shard.file).source
        if hashes is not None:
            check_source(
                self.job.reader, hashes, self.check_source, folder, start=shard.start, batch_size=self.batch_size
            )

    def make(self, shard: Shard) -> None:
        """Make one shard now, in this thread; wait where another process is making it."""
        with self.writer.lock(shard) as lock:
            if self.writer.is_done(shard):
                return
            self.writer.check_may_make(shard)
            self.writer.tidy_shard(shard, lock)
            making = GrowingShard(self.job, shard)
            for positions in shard.batches(self.batch_size):
                making.add(positions, self.job.reader.read(positions))
            making.write(self.writer)

    def finish(self) -> list[Shard]:
        """Verify what others have made and write the index, unless another has; return the shards that are lacking."""
        with Lock(self.writer.folder, fmt.INDEX_FILE) as lock:
            if not self.writer.is_finished(self.plan):
                if lacking := self.writer.pending():
                    return lacking
                self.writer.finish(self.plan, self.notes)
            self.writer.tidy(lock)
        return []


class ShardsOnDemand:
    """An unfinished cache as `CacheReader` gives a finished one: a shard is made when it is first read.

    A lock keeps two workers from making the same shard. Whoever makes the last one writes the index.
    """

    def __init__(self, filling: Filling) -> None:
        self._filling = filling
        self._open: dict[int, OpenShard] = {}

    def row(self, position: int, draw: int = 0) -> NDArray[np.uint8]:
        writer = self._filling.writer
        number, local = divmod(position, writer.layout.shard_size)
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = self._made(writer.shards[number])
        return shard.row(local, draw)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _made(self, shard: Shard) -> OpenShard:
        writer = self._filling.writer
        if writer.is_done(shard):
            self._filling.compare(shard)
        else:
            writer.claim()
            self._filling.make(shard)
            if writer.present() == writer.layout.length:
                self._filling.finish()
        path = writer.folder / shard.file
        return OpenShard(path, fmt.read_shard_header(path), np.zeros(writer.layout.draws * shard.count, np.uint8))


class GrowingShard:
    def __init__(self, job: Job, shard: Shard) -> None:
        self.job, self.shard = job, shard
        self.rows: list[list[NDArray[np.uint8]]] = [[] for _ in range(job.draws)]
        self.reads: list[Read] = []

    def add(self, positions: Sequence[int], reads: Sequence[Read]) -> None:
        for draw in range(self.job.draws):
            self.rows[draw] += self.job.rows(positions, reads, draw)
        # the pixels have done their duty, and a shard of large images would hold them twice
        empty = np.empty(0, np.uint8)
        self.reads += [Read(empty, r.kind, r.fields, r.structure, r.hashes) for r in reads]

    def write(self, writer: CacheWriter) -> None:
        rows = [row for draw in self.rows for row in draw]
        if writer.layout.encoding == "raw":
            for at, row in enumerate(rows):
                if row.shape != rows[0].shape:
                    raise InputError(
                        f"Images of one size are stored raw. Got {row.shape} for item "
                        f"{self.shard.start + at % self.shard.count} after {rows[0].shape}: give the recipe a size "
                        '(resize=, crop=), or precompute with encoding="png".'
                    )
        writer.write(self.shard, rows, **shard_values(self.reads))
