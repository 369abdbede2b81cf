"""Make the shards of a cache one by one, and read an unfinished cache whose shards are made when first read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.cache import format as fmt
from purifyloader.cache.format import Shard, ShardHeader
from purifyloader.cache.reader import OpenShard
from purifyloader.cache.writer import CacheWriter
from purifyloader.datasets.sources import random_state_kept
from purifyloader.errors import CacheError, InputError
from purifyloader.files.locks import Lock
from purifyloader.purified.job import Job
from purifyloader.purified.reading import Comparison, Read, shard_values


@dataclass(frozen=True)
class Filling:
    """A cache to fill: what computes its pixels, who writes it, and what its index says beside.

    A shard counts only once its source hashes are those of this process's own source: because it was made here, or
    because they were compared.
    """

    job: Job
    writer: CacheWriter
    batch_size: int = 256
    check_source: bool | int = True  # samples of each shard made elsewhere to compare with the source; True for all
    plan: Mapping[str, Any] | None = None
    notes: Mapping[str, Any] | None = None
    _own: dict[int, bytes] = field(default_factory=dict)  # by shard, a digest of the source hashes that agree

    def agrees(self, header: ShardHeader) -> bool:
        """Say whether a shard is known to be made from this process's source."""
        number = header.shard.number
        if not self.check_source and number not in self._own:
            return True
        return header.source is not None and self._own.get(number) == _digest(header.source)

    @property
    def has_compared_all(self) -> bool:
        return not self.check_source or len(self._own) == len(self.writer.shards)

    def unsettled(self, among: Sequence[Shard] | None = None) -> list[Shard]:
        """List the shards that are missing, or not known to be made from this process's source."""
        headers = [(shard, self.writer.header(shard)) for shard in (self.writer.shards if among is None else among)]
        return [shard for shard, header in headers if header is None or not self.agrees(header)]

    def comparison(self, header: ShardHeader, at_most: int | None = None) -> Comparison:
        """Begin to compare the source with what a shard was made from."""
        if header.source is None:
            raise CacheError(
                f"{self.writer.folder / header.shard.file} must hold the hashes of what it was made from. Got none, so "
                "it cannot be compared with this dataset. Delete it, and it is made again, or give "
                "check_source=False."
            )
        amount = self.check_source
        if at_most is not None:
            amount = at_most if amount is True else min(amount, at_most)
        elif header.shard.number in self._own:  # it was made here, and replaced by another
            amount = True
        return Comparison(header.source, amount, header.shard.start)

    def settle(self, header: ShardHeader, comparison: Comparison, *, whole: bool = True) -> None:
        """End a comparison: take note that the shard agrees, or raise `CacheError`. Without `whole` it was a part."""
        path, number = self.writer.folder / header.shard.file, header.shard.number
        remedy = (
            "Give all runs and processes the same dataset (sort what it lists, seed what it shuffles), or precompute "
            "into another folder."
        )
        if (words := comparison.in_words()) is not None:
            raise CacheError(
                f"{path} must have been made from the source that it is used with. Got one that {words} The dataset "
                f"gives other images, or another order, than where or when the shard was made. {remedy}"
            )
        assert header.source is not None
        if not whole:
            return
        digest = _digest(header.source)
        if self._own.setdefault(number, digest) != digest:
            raise CacheError(
                f"A dataset gives the same samples whenever it is read. Got others than before for {path}. {remedy}"
            )

    def compare(self, header: ShardHeader) -> None:
        """Compare the source with what a shard was made from, now and in this thread."""
        if self.agrees(header):
            return
        comparison = self.comparison(header)
        with random_state_kept():
            for positions in comparison.batches(self.batch_size):
                comparison.add(positions, self.job.reader.read(positions))
        self.settle(header, comparison)

    def write(self, making: GrowingShard) -> None:
        """Write a shard that was made here."""
        hashes = making.write(self.writer)
        self._own[making.shard.number] = _digest(hashes)

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
            self.write(making)

    def finish(self) -> list[Shard]:
        """Verify what others have made and write the index, unless another has.

        Returns the shards that are lacking, or not known to be made from this process's source; none when it is done.
        """
        with Lock(self.writer.folder, fmt.INDEX_FILE) as lock:
            is_finished = self.writer.is_finished(self.plan)
            if not is_finished and (lacking := self.writer.pending(seen=lock.note)):
                return lacking
            if unsettled := self.unsettled():
                return unsettled
            if not is_finished:
                self.writer.finish(self.plan, self.notes)
            self.writer.tidy(lock)
        return []


class ShardsOnDemand:
    """An unfinished cache as `CacheReader` gives a finished one: a shard is made when it is first read.

    A lock keeps two workers from making the same shard; one that another has made is compared with the source. Whoever
    makes the last one compares all of them, and writes the index.
    """

    def __init__(self, filling: Filling) -> None:
        self._filling = filling
        self._open: dict[int, OpenShard] = {}
        self._ended = False

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
        filling, writer = self._filling, self._filling.writer
        made_here = False
        while True:
            if not writer.is_done(shard):
                writer.claim()
                filling.make(shard)
                made_here = True
            header = writer.header(shard)  # of this process or, where it waited, of another
            if header is None:
                continue
            filling.compare(header)
            path = writer.folder / shard.file
            opened = OpenShard(path, header, np.zeros(writer.layout.draws * shard.count, np.uint8))
            now = writer.header(shard) if writer.is_done(shard) else None
            if now is not None and now.sha256 == header.sha256:
                break  # else another process has replaced it since
        self._end(made_here)
        return opened

    def _end(self, made_here: bool) -> None:
        """Write the index where all shards are there; what was not compared yet is, by the one that made the last."""
        filling = self._filling
        if self._ended or filling.writer.present() < filling.writer.layout.length:
            return
        if made_here:
            for shard in filling.unsettled():
                if (header := filling.writer.header(shard)) is not None:
                    filling.compare(header)
        if made_here or filling.has_compared_all:
            self._ended = not filling.finish()


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

    def write(self, writer: CacheWriter) -> NDArray[np.uint64]:
        """Write it, and return the hashes of its source, (count, 2)."""
        rows = [row for draw in self.rows for row in draw]
        if writer.layout.encoding == "raw":
            for at, row in enumerate(rows):
                if row.shape != rows[0].shape:
                    raise InputError(
                        f"Images of one size are stored raw. Got {row.shape} for item "
                        f"{self.shard.start + at % self.shard.count} after {rows[0].shape}: give the recipe a size "
                        '(resize=, crop=), or precompute with encoding="png".'
                    )
        values = shard_values(self.reads)
        writer.write(self.shard, rows, **values)
        return values["source"]


def _digest(hashes: NDArray[np.uint64]) -> bytes:
    return hashlib.blake2b(hashes.astype(">u8").tobytes(), digest_size=16).digest()
