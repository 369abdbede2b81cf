"""Open the cache of a `PurifiedDataset`: read it, fill it now, or fill it on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm.auto import tqdm

from purifyloader.cache.format import INDEX_FILE, SHARD_FILE
from purifyloader.cache.reader import CacheReader
from purifyloader.cache.writer import CacheWriter
from purifyloader.core.images import ImageKind
from purifyloader.datasets.samples import is_plain
from purifyloader.datasets.sources import fetch, random_state_kept
from purifyloader.errors import CacheError
from purifyloader.files.locks import is_held
from purifyloader.purified import plans
from purifyloader.purified.filling import choose_layout, fill, notes_of
from purifyloader.purified.job import Job
from purifyloader.purified.modes import Mode, PixelsFromCache, SamplesFromCache
from purifyloader.purified.ondemand import Filling, ShardsOnDemand
from purifyloader.purified.reading import check_source
from purifyloader.purified.sanitation import Sanitation
from purifyloader.purifiers import Purifier

__all__ = ["Opening"]


@dataclass(frozen=True)
class Opening:
    """The user's wishes about a cache; see `PurifiedDataset`."""

    folder: Path
    missing: str | None
    check_source: bool | int
    in_memory: bool
    batch_size: int
    progress: bool

    def open(
        self,
        job: Job,
        dataset: Dataset[Any],
        probed: Sequence[tuple[tuple[int, int, int], ImageKind]],
        sanitation: Sanitation | None,
    ) -> tuple[Mode, Purifier, Sanitation | None]:
        """Open the cache of a job, after filling it if it is not finished.

        Args:
            dataset: the user's, for notes.
            probed: shape and kind of some of its images.
            sanitation: to use or, where the cache is filled, to keep with it. None takes that of the cache.

        Returns how it is read, its purifier with its plan, and its sanitation. Raises `CacheError` where the folder
        holds something else, is unfinished, or damaged.
        """
        finished = self._is_finished()
        if not finished:
            layout = choose_layout(self.folder, len(job.reader), job.draws, job.purifier, probed)
            writer = CacheWriter(self.folder, job.config(), layout, job.made())
            findings = plans.agreed(job, writer, self.batch_size, sanitation=sanitation, progress=self.progress)
            job = plans.planned(job, findings)
            plan = plans.with_plan(writer.folder, None, findings)
            each: bool | int = self.check_source
            if not isinstance(each, bool):
                each = -(-each // len(layout.shards)) or False
            filling = Filling(job, writer, self.batch_size, each, plan, notes_of(dataset, job.purifier))
            if self.missing == "purify":
                sanitation = None if findings is None else findings.sanitation
                mode = PixelsFromCache(ShardsOnDemand(filling), job.reader.raw, job.reader.image_key, sanitation)
                return mode, job.purifier, sanitation
            fill(filling, progress=self.progress)
        reader = CacheReader(self.folder, job.config(), self.in_memory)
        if len(reader) != len(job.reader):
            raise CacheError(
                f"The cache {self.folder} must hold one image for each of the source's {len(job.reader)}. Got "
                f"{len(reader)}: it was made from another dataset. Give that one, or precompute into another folder."
            )
        if finished:
            job = plans.planned(job, plans.of_index(reader.plan))
            self._compare(job, reader)
        sanitation = plans.sanitation_of(reader, sanitation)
        return _finished_mode(job, reader, sanitation), job.purifier, sanitation

    def _is_finished(self) -> bool:
        """Raise `CacheError` where it is partly filled, and nobody said what to do about that."""
        if (self.folder / INDEX_FILE).exists():
            return True
        if self.missing is not None or not self.folder.is_dir():
            return False
        if not any(SHARD_FILE.fullmatch(path.name) for path in self.folder.iterdir()):
            return False
        try:
            CacheReader(self.folder)
            return True  # by another process, since the look above
        except CacheError as error:
            busy = any(is_held(path) for path in self.folder.glob(".*.lock"))
            raise CacheError(
                f"{error} {'Another process is filling it now: wait for it. ' if busy else ''}"
                'Or give missing="precompute" to fill it now, which any number of processes may do together, or '
                'missing="purify" to fill each shard when it is first read.'
            ) from None

    def _compare(self, job: Job, reader: CacheReader) -> None:
        hashes = reader.source_hashes()
        if hashes is None or self.check_source is False:
            return
        total = len(reader) if self.check_source is True else min(self.check_source, len(reader))
        with tqdm(total=total, unit="img", desc="checking the source", disable=not self.progress, leave=False) as bar:
            check_source(
                job.reader, hashes, self.check_source, reader.folder, batch_size=self.batch_size, seen=bar.update
            )


def _finished_mode(job: Job, reader: CacheReader, sanitation: Sanitation | None) -> Mode:
    """Take everything from the cache where it has the targets and samples are of plain types."""
    with random_state_kept():
        plain = is_plain(fetch(job.reader.raw, [0])[0])
    if plain and reader.sample is not None and reader.targets is not None:
        return SamplesFromCache(reader, sanitation)
    return PixelsFromCache(reader, job.reader.raw, job.reader.image_key, sanitation)
