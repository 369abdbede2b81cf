"""Read a purified dataset live, with pixels out of a cache, or wholly out of one, for `PurifiedDataset`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from purifyloader.cache.format import FORMER, INDEX_FILE, SHARD_FILE, version_of
from purifyloader.cache.reader import CacheReader, Targets
from purifyloader.cache.writer import CacheWriter
from purifyloader.core.images import ImageKind, as_stored, from_bytes, from_engine, pil_mode, type_of
from purifyloader.core.notes import NOTES
from purifyloader.datasets.samples import ImageKey, assemble, fields, get_image, is_plain, structure_of
from purifyloader.datasets.sources import REMEDY, fetch, random_state_kept
from purifyloader.errors import CacheError, PurifyError
from purifyloader.files.locks import held_by, is_held
from purifyloader.purified import plans
from purifyloader.purified.filling import choose_layout, class_names, fill, notes_of
from purifyloader.purified.job import Job
from purifyloader.purified.ondemand import Filling, ShardsOnDemand
from purifyloader.purified.reading import SampleReader, check_source, converted
from purifyloader.purified.sanitation import Sanitation
from purifyloader.purifiers import Purifier


class _FromSource:
    def __init__(self, reader: SampleReader, sanitation: Sanitation | None) -> None:
        self._reader, self._sanitation = reader, sanitation

    def _fetched(self, positions: Sequence[int]) -> tuple[list[Any], list[Any]]:
        samples = fetch(self._reader.raw, positions)
        images = self._reader.images(positions, samples)
        if self._sanitation is not None:
            samples = [
                self._sanitation.corrected(i, s, self._reader.image_key)
                for i, s in zip(positions, samples, strict=True)
            ]
        return samples, images


class Live(_FromSource):
    """Purify images as they are read."""

    purifies = True

    def __init__(self, job: Job, sanitation: Sanitation | None) -> None:
        super().__init__(job.reader, sanitation)
        self._job = job

    def samples(self, positions: Sequence[int], draw: int) -> tuple[list[Any], list[Any]]:
        samples, raw = self._fetched(positions)
        stored = converted(positions, raw, self._job.purifier.image_channels, REMEDY)
        purified = self._job.purify(positions, [x for x, _ in stored], draw)
        return samples, [from_engine(x, kind) for x, (_, kind) in zip(purified, stored, strict=True)]


class PixelsFromCache(_FromSource):
    """Read images out of a cache, which may be filled on demand, and everything else from the source."""

    def __init__(self, rows: CacheReader | ShardsOnDemand, reader: SampleReader, sanitation: Sanitation | None) -> None:
        super().__init__(reader, sanitation)
        self._rows = rows

    @property
    def purifies(self) -> bool:
        return not isinstance(self._rows, CacheReader)

    def samples(self, positions: Sequence[int], draw: int) -> tuple[list[Any], list[Any]]:
        samples, raw = self._fetched(positions)
        NOTES.purified += 1
        kinds = [type_of(as_stored(image)[1]) for image in raw]
        return samples, [from_bytes(self._rows.row(p, draw), kind) for p, kind in zip(positions, kinds, strict=True)]


class SamplesFromCache:
    """Read whole samples out of a finished cache that stores its targets."""

    purifies = False

    def __init__(self, reader: CacheReader, sanitation: Sanitation | None, order: tuple[Any, ...] = ()) -> None:
        assert reader.sample is not None
        assert reader.targets is not None
        self.reader, self._structure = reader, reader.sample
        self._order = order  # of the keys of the source's samples; without a source the image comes last
        self.fields: Targets = reader.targets  # of each sample beside its image, labels corrected
        if sanitation is not None:
            with _as_described(reader, "with a corrected label", PurifyError):
                self.fields = sanitation.corrected_fields(self.fields, self._structure)
        types = reader.image_types()
        self._types = types[0] if len(set(types)) == 1 else types
        self.is_pair = self._structure == {"type": "tuple", "image": 0, "fields": 2}
        # mode and size (W, H) of the images, where all are PIL images, alike, in a pair
        self.pil: tuple[str, tuple[int, int]] | None = None
        if self.is_pair and reader.image_shape is not None and str(self._types).startswith("pil/"):
            height, width, channels = reader.image_shape
            self.pil = pil_mode(channels), (width, height)

    def sample(self, position: int, draw: int) -> Any:
        type_ = self._types if isinstance(self._types, str) else self._types[position]
        row, fields = self.reader.row(position, draw), self.fields[position]
        with _as_described(self.reader, position):
            sample = assemble(self._structure, fields, from_bytes(row, type_))
        if self._order and sample.keys() == {*self._order}:
            return {key: sample[key] for key in self._order}
        return sample

    def samples(self, positions: Sequence[int], draw: int) -> tuple[list[Any], list[Any]]:
        samples = [self.sample(position, draw) for position in positions]
        return samples, [get_image(sample, self._structure.get("image")) for sample in samples]

    def batch(self, positions: Sequence[int], draw: int) -> Tensor:
        """Read images of one shape as they are stored, uint8 (B, C, H, W), channels last."""
        return torch.from_numpy(self.reader.batch(positions, draw)).permute(0, 3, 1, 2)


@contextmanager
def _as_described(reader: CacheReader, sample: int | str, passing: type[PurifyError] = CacheError) -> Iterator[None]:
    """Raise `CacheError` where a sample of a cache is not as its headers say, but let errors `passing` pass."""
    try:
        yield
    except passing:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CacheError(
            f"{reader.folder} must hold samples as its headers describe them. Got other fields or another image in "
            f"sample {sample} ({error!s:.200}): it was made by something else. Precompute it anew."
        ) from None


def _gives_such(reader: CacheReader, sample: Any, image_key: ImageKey) -> bool:
    """Tell whether a cache gives samples in the types of the first one of the source that it is used with."""
    if reader.sample is None or reader.targets is None or not is_plain(sample):
        return False
    image_type = type_of(as_stored(get_image(sample, image_key))[1])
    if structure_of(sample, image_key) != reader.sample or image_type != reader.image_types()[0]:
        return False
    return _types(fields(sample, image_key)) == _types(reader.targets[0])


def _types(value: Any) -> Any:
    """Collect the types in a sample's fields."""
    if isinstance(value, dict):
        return dict, {key: _types(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [_types(part) for part in value]
    return Image.Image if isinstance(value, Image.Image) else type(value)


Mode = Live | PixelsFromCache | SamplesFromCache
"""Gives samples with their purified images; `purifies` says whether it needs the purifier for that."""


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
        """Open the cache of a job on the user's `dataset`, after filling it if it is not finished.

        `probed` are shape and kind of some images. `sanitation` is to be used or, where the cache is filled, kept with
        it; None takes that of the cache. Returns how it is read, its purifier with its plan, and its sanitation; raises
        `CacheError` where the folder holds something else, is unfinished, or damaged.
        """
        finished = self._is_finished()
        if not finished:
            class_names(dataset)  # before hours of work
            layout = choose_layout(self.folder, len(job.reader), job.draws, job.purifier, probed)
            writer = CacheWriter(self.folder, job.config(), layout, job.made(), former=job.former_config)
            findings = plans.agreed(job, writer, self.batch_size, sanitation=sanitation, progress=self.progress)
            job = plans.planned(job, findings)
            plan = plans.with_plan(writer, None, findings)
            each: bool | int = self.check_source
            if not isinstance(each, bool):
                each = -(-each // len(layout.shards)) or False
            filling = Filling(job, writer, self.batch_size, each, plan, notes_of(dataset, job.purifier))
            if self.missing == "purify":
                sanitation = None if findings is None else findings.sanitation
                mode = PixelsFromCache(ShardsOnDemand(filling), job.reader, sanitation)
                return mode, job.purifier, sanitation
            fill(filling, progress=self.progress)
        reader = CacheReader(self.folder, job.config(), self.in_memory, former=job.former_config)
        if len(reader) != len(job.reader):
            raise CacheError(
                f"The cache {self.folder} must hold one image for each of the source's {len(job.reader)}. Got "
                f"{len(reader)}: it was made from another dataset. Give that one, or precompute into another folder."
            )
        if finished:
            job = plans.planned(job, plans.of_index(reader.plan))
            self._compare(job, reader)
        sanitation = plans.sanitation_of(reader, sanitation)
        with random_state_kept():
            sample = fetch(job.reader.raw, [0])[0]
        if _gives_such(reader, sample, job.reader.image_key):
            order = tuple(sample) if isinstance(sample, dict) else ()
            return SamplesFromCache(reader, sanitation, order), job.purifier, sanitation
        return PixelsFromCache(reader, job.reader, sanitation), job.purifier, sanitation

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
            if version_of(self.folder) == FORMER:  # which nobody is filling, and nothing fills
                raise
            busy = next((path for path in self.folder.glob(".*.lock") if is_held(path)), None)
            filling = "" if busy is None else f"Another process is filling it now, {held_by(busy)} Wait for it. "
            raise CacheError(
                f"{error} {filling}"
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
