"""Read a purified dataset live, with pixels out of a cache, or wholly out of a finished cache.

Each mode gives samples with their purified images, before the user's transform; `PurifiedDataset` is their face.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from purifyloader.cache.reader import CacheReader, Targets
from purifyloader.core.images import as_stored, from_bytes, from_engine, pil_mode, type_of
from purifyloader.datasets.samples import ImageKey, assemble, get_image
from purifyloader.datasets.sources import REMEDY, fetch
from purifyloader.purified.job import Job
from purifyloader.purified.reading import converted
from purifyloader.purified.sanitation import Sanitation

__all__ = ["Live", "Mode", "PixelsFromCache", "Rows", "SamplesFromCache"]


class Rows(Protocol):
    """The pixels of a cache: a `CacheReader`, or `ShardsOnDemand` of one that is not finished."""

    def row(self, position: int, draw: int = 0) -> NDArray[np.uint8]: ...


class Mode(Protocol):
    """Reads samples and their purified images; `purifies` says whether it needs the purifier for that."""

    @property
    def purifies(self) -> bool: ...

    def samples(self, positions: Sequence[int], draw: int) -> tuple[list[Any], list[Any]]:
        """Return samples, labels corrected, and their purified images of the type that the source's have."""
        ...


class _FromSource:
    def __init__(self, raw: Dataset[Any], image_key: ImageKey, sanitation: Sanitation | None) -> None:
        self._raw, self._image_key, self._sanitation = raw, image_key, sanitation

    def _fetched(self, positions: Sequence[int]) -> tuple[list[Any], list[Any]]:
        samples = fetch(self._raw, positions)
        if self._sanitation is not None:
            samples = [
                self._sanitation.corrected(i, s, self._image_key) for i, s in zip(positions, samples, strict=True)
            ]
        return samples, [get_image(sample, self._image_key) for sample in samples]


class Live(_FromSource):
    """Purify images as they are read."""

    purifies = True

    def __init__(self, job: Job, sanitation: Sanitation | None) -> None:
        super().__init__(job.reader.raw, job.reader.image_key, sanitation)
        self._job = job

    def samples(self, positions: Sequence[int], draw: int) -> tuple[list[Any], list[Any]]:
        samples, raw = self._fetched(positions)
        stored = converted(positions, raw, self._job.purifier.image_channels, REMEDY)
        purified = self._job.purify(positions, [x for x, _ in stored], draw)
        return samples, [from_engine(x, kind) for x, (_, kind) in zip(purified, stored, strict=True)]


class PixelsFromCache(_FromSource):
    """Read images out of a cache, which may be filled on demand, and everything else from the source."""

    def __init__(self, rows: Rows, raw: Dataset[Any], image_key: ImageKey, sanitation: Sanitation | None) -> None:
        super().__init__(raw, image_key, sanitation)
        self._rows = rows

    @property
    def purifies(self) -> bool:
        return not isinstance(self._rows, CacheReader)

    def samples(self, positions: Sequence[int], draw: int) -> tuple[list[Any], list[Any]]:
        samples, raw = self._fetched(positions)
        kinds = [type_of(as_stored(image)[1]) for image in raw]
        return samples, [from_bytes(self._rows.row(p, draw), kind) for p, kind in zip(positions, kinds, strict=True)]


class SamplesFromCache:
    """Read whole samples out of a finished cache that stores its targets."""

    purifies = False

    def __init__(self, reader: CacheReader, sanitation: Sanitation | None) -> None:
        assert reader.sample is not None
        assert reader.targets is not None
        self.reader, self._structure = reader, reader.sample
        self.fields: Targets = reader.targets  # of each sample beside its image, labels corrected
        if sanitation is not None:
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
        return assemble(self._structure, self.fields[position], from_bytes(self.reader.row(position, draw), type_))

    def samples(self, positions: Sequence[int], draw: int) -> tuple[list[Any], list[Any]]:
        samples = [self.sample(position, draw) for position in positions]
        return samples, [get_image(sample, self._structure.get("image")) for sample in samples]

    def batch(self, positions: Sequence[int], draw: int) -> Tensor:
        """Read images of one shape as they are stored, uint8 (B, C, H, W), channels last."""
        return torch.from_numpy(self.reader.batch(positions, draw)).permute(0, 3, 1, 2)
