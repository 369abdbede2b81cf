"""Make the shards of a cache one by one, and read an unfinished cache whose shards are made when first read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

__all__ = ["GrowingShard", "ShardsOnDemand", "compare_shard", "make_shard"]


class ShardsOnDemand:
    """An unfinished cache as `CacheReader` gives a finished one: a shard is made when it is first read.

    Any number of workers may read at once: a lock keeps two from making the same shard. Whoever makes the last
    one writes the index.
    """

    def __init__(
        self,
        job: Job,
        writer: CacheWriter,
        batch_size: int,
        check_source: bool | int,
        notes: Mapping[str, Any],
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        self._job, self._writer, self._batch_size, self._notes = job, writer, batch_size, notes
        self._check_source, self._plan = check_source, plan
        self._open: dict[int, OpenShard] = {}

    def row(self, position: int, draw: int = 0) -> NDArray[np.uint8]:
        """As `CacheReader.row`."""
        number, local = divmod(position, self._writer.layout.shard_size)
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = self._made(self._writer.shards[number])
        return shard.row(local, draw)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _made(self, shard: Shard) -> OpenShard:
        writer = self._writer
        if writer.is_done(shard):
            compare_shard(self._job, writer, shard, self._check_source, self._batch_size)
        else:
            writer.check_same_device()
            make_shard(self._job, writer, shard, self._batch_size)
            if writer.present() == writer.layout.length:
                with Lock(writer.folder, fmt.INDEX_FILE) as lock:
                    if not writer.pending():
                        writer.finish(self._plan, self._notes)  # which leaves an index alone that says the same
                        writer.tidy(lock)
        path = writer.folder / shard.file
        return OpenShard(path, fmt.read_shard_header(path), np.zeros(writer.layout.draws * shard.count, np.uint8))


def compare_shard(job: Job, writer: CacheWriter, shard: Shard, amount: bool | int, batch_size: int) -> None:
    """A source now with what a shard that is there was made from: all of it, or `amount` of its samples.

    Raises:
        CacheError: they differ.
    """
    if amount is False:
        return
    known = fmt.read_shard_header(writer.folder / shard.file).source
    if known is not None:
        check_source(job.reader, known, amount, writer.folder, start=shard.start, batch_size=batch_size)


def make_shard(job: Job, writer: CacheWriter, shard: Shard, batch_size: int) -> None:
    """One shard, now, in this thread; waits where another process is making it."""
    with writer.lock(shard) as lock:
        if writer.is_done(shard):
            return
        writer.tidy_shard(shard, lock)
        making = GrowingShard(job, shard)
        for start in range(0, shard.count, batch_size):
            positions = list(range(shard.start, shard.start + shard.count))[start : start + batch_size]
            making.add(positions, job.reader.read(positions))
        making.write(writer)


class GrowingShard:
    """A shard as it grows."""

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
