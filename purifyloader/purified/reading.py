"""Read samples from their source: checked, hashed, and by worker processes where wanted."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from purifyloader.core.checks import as_integer
from purifyloader.core.images import ImageKind, as_stored, type_of
from purifyloader.datasets.samples import ImageKey, check_one_image, fields, get_image, structure_of
from purifyloader.datasets.sources import REMEDY, fetch, of_item, random_state_kept
from purifyloader.errors import CacheError, InputError, PurifyError
from purifyloader.files.hashes import is_hashable, source_hashes


@dataclass(frozen=True)
class Read:
    """A sample as it was read from its source."""

    pixels: NDArray[Any]  # uint8, or float32 in [0, 1], (C, H, W), in the channels of the purifier
    kind: ImageKind  # how the image was held
    fields: Any  # the rest of the sample
    structure: dict[str, Any]  # how the sample is put together
    hashes: NDArray[np.uint64]  # of the source image and of its fields, (2,)


class SampleReader:
    """Reads and checks samples: `raw` is the dataset in front of its transforms, `channels` those of the purifier.

    Worker processes get it, and so it holds no purifier and none of the user's transforms, which may not pickle.
    """

    def __init__(self, raw: Dataset[Any], channels: int | None, image_key: ImageKey) -> None:
        self.raw, self.channels, self.image_key = raw, channels, image_key

    def __len__(self) -> int:
        return len(self.raw)  # type: ignore[arg-type]

    def read(self, positions: Sequence[int]) -> list[Read]:
        """Read samples; `InputError` names the position of an image that the purifier does not take."""
        samples = fetch(self.raw, positions)
        images = self.images(positions, samples)
        stored = converted(positions, images, self.channels, REMEDY)
        others = [fields(sample, self.image_key) for sample in samples]
        hashes = source_hashes(
            [np.asarray(i) if isinstance(i, Image.Image) else i for i in images], [_hashable(o) for o in others]
        )
        return [
            Read(x.detach().cpu().numpy(), kind, other, structure_of(sample, self.image_key), row)
            for (x, kind), other, sample, row in zip(stored, others, samples, hashes, strict=True)
        ]

    def images(self, positions: Sequence[int], samples: Sequence[Any]) -> list[Any]:
        """Return the image of each sample; `InputError` names the position of one that has none, or a second one."""
        return [of_item(i, self._image, sample) for i, sample in zip(positions, samples, strict=True)]

    def _image(self, sample: Any) -> Any:
        if self.image_key is None:  # else a warning told of it when the dataset was looked at
            check_one_image(sample)
        return get_image(sample, self.image_key)


class _Batches(Dataset[Any]):
    """Batches of samples by their positions, for a loader's workers."""

    def __init__(self, reader: SampleReader) -> None:
        self.reader = reader

    def __getitem__(self, positions: list[int]) -> bytes:
        # Pickled here by value: torch would hand each small array over as a shared file of its own. An error
        # is handed over as it is, because the loader would wrap it in a traceback.
        try:
            reads = self.reader.read(positions)
        except PurifyError as error:
            return pickle.dumps(error)
        try:
            return pickle.dumps(reads)
        except Exception as error:  # the fields of a sample may hold anything
            return pickle.dumps(_not_handed_over(error))


def _not_handed_over(error: Exception) -> InputError:
    return InputError(
        "The samples of a dataset that worker processes read must pickle. Got one whose fields beside the image do not "
        f"({type(error).__name__}: {error}). Give workers=0, or plain fields."
    )


def read_batches(
    reader: SampleReader, batches: Iterable[list[int]], workers: int
) -> Iterator[list[Read] | PurifyError]:
    """Read the samples of each batch of positions in order, by so many processes (0: in this one).

    An error of the user's is given, not raised, in place of its batch.
    """
    if not workers:
        for positions in batches:
            try:
                yield reader.read(positions)
            except PurifyError as error:
                yield error
        return
    loader = DataLoader(
        _Batches(reader),
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        prefetch_factor=1,  # each batch ahead is a part of a shard locked ahead
        generator=torch.Generator("cpu"),  # or it would draw from the user's
    )
    with torch.device("cpu"):  # torch draws a seed on the device that a script has made the default
        iterator = iter(loader)
    for data in iterator:
        try:
            yield pickle.loads(data)
        except Exception as error:
            yield _not_handed_over(error)


def shard_values(reads: Sequence[Read]) -> dict[str, Any]:
    """Collect what a shard holds beside its images, as `CacheWriter.write` takes it."""
    structures = [read.structure for read in reads]
    alike = all(structure == structures[0] for structure in structures)
    alike = alike and isinstance(structures[0].get("image", 0), str | int)  # any other key is no JSON
    return {
        "image_types": [type_of(read.kind) for read in reads],
        "sample": structures[0] if alike else None,
        "targets": [read.fields for read in reads] if alike else None,
        "source": np.stack([read.hashes for read in reads]),
    }


def class_of(dataset: Any) -> str:
    """Name an object's class with its module, but for a script's, which is named after how it was started."""
    module = type(dataset).__module__
    prefix = "" if module in ("__main__", "__mp_main__") else f"{module}."
    return f"{prefix}{type(dataset).__qualname__}"


def converted(
    positions: Sequence[int],
    images: Sequence[Any],
    channels: int | None,
    remedy: str,
    convert: Callable[[Any, int | None], tuple[Tensor, ImageKind]] = as_stored,
) -> list[tuple[Tensor, ImageKind]]:
    """Convert all images by `as_stored` (or `to_engine`), and name one that cannot be."""
    return [
        of_item(position, convert, image, channels, remedy=remedy)
        for position, image in zip(positions, images, strict=True)
    ]


class Comparison:
    """Compare a source, sample by sample, with the hashes that were taken of its samples from `start` on, (N, 2).

    `amount` is True for all of them, else how many, drawn at random.
    """

    def __init__(self, recorded: NDArray[np.uint64], amount: bool | int, start: int = 0) -> None:
        length = len(recorded)
        self.count = length if amount is True else min(as_integer("check_source", amount, 0), length)
        # from the system's entropy: who tampers with a source must not know where one looks
        drawn = np.random.default_rng().choice(length, self.count, False) if self.count < length else np.arange(length)
        self._positions = [start + i for i in sorted(drawn.tolist())]
        self._recorded, self._start = recorded, start
        self._left = self.count
        self._differing: dict[int, NDArray[np.bool_]] = {}

    def batches(self, size: int) -> list[list[int]]:
        """List the positions of the samples to be compared, in batches."""
        return [self._positions[at : at + size] for at in range(0, self.count, size)]

    def add(self, positions: Sequence[int], reads: Sequence[Read]) -> bool:
        """Compare what was read at some of them; say whether all are compared by now."""
        hashes = np.stack([read.hashes for read in reads])
        wrong = hashes != self._recorded[np.array(positions) - self._start]
        self._differing.update({i: w for i, w in zip(positions, wrong, strict=True) if w.any()})
        self._left -= len(positions)
        return not self._left

    def in_words(self) -> str | None:
        """Say how much differs, and where first; None where all agree."""
        if not self._differing:
            return None
        first, wrong = next(iter(self._differing.items()))
        where = " and ".join(name for name, w in zip(("image", "targets"), wrong, strict=True) if w)
        some = ", ".join(map(str, list(self._differing)[:4])) + (", ..." if len(self._differing) > 4 else "")
        all_of_them = f" They are {some}." if len(self._differing) > 1 else ""
        return (
            f"differs in {len(self._differing)} of {self.count} samples compared, first in the {where} of sample "
            f"{first}.{all_of_them}"
        )


def check_source(
    reader: SampleReader,
    recorded: NDArray[np.uint64],
    amount: bool | int,
    folder: Path,
    *,
    batch_size: int = 256,
    seen: Callable[[int], object] = lambda count: None,
) -> None:
    """Compare a source with the hashes that were taken of its samples, (N, 2), when a cache was made.

    `amount` is as in `Comparison`; `seen` is called after each batch with how many were compared. Raises `CacheError`
    of the cache in `folder`, which names the first sample that differs.
    """
    comparison = Comparison(recorded, amount)
    with random_state_kept():
        for positions in comparison.batches(batch_size):
            comparison.add(positions, reader.read(positions))
            seen(len(positions))
    if (words := comparison.in_words()) is not None:
        raise CacheError(
            f"The cache {folder} must have been made from the source that it is used with. Got one that {words} Give "
            "the dataset that the cache was made from, in the same order (sort what it lists, seed what it shuffles), "
            "or precompute into another folder."
        )


def _hashable(field: Any) -> Any:
    """Return a field as the source hash takes it; of objects that have no value of their own, the type."""
    if isinstance(field, Mapping):
        return {str(k): _hashable(v) for k, v in field.items()}
    if isinstance(field, list | tuple):
        return [_hashable(v) for v in field]
    if isinstance(field, Image.Image):
        return np.asarray(field)
    if isinstance(field, Tensor | np.ndarray | np.generic):
        return field if is_hashable(field) else class_of(field)
    if field is None or isinstance(field, bool | int | float | complex | str | bytes):
        return field
    return class_of(field)
