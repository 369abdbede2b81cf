"""`PurifiedDataset`: any map-style dataset, with its images purified before the user's transform."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from purifyloader.cache.reader import CacheReader
from purifyloader.core.checks import as_integer, as_path
from purifyloader.core.notes import noted
from purifyloader.datasets.conversions import Conversion
from purifyloader.datasets.named import check_apart
from purifyloader.datasets.samples import ImageKey, get_image
from purifyloader.datasets.sources import Source, check_honest, random_state_kept, take_over, without_source
from purifyloader.errors import CacheError, InputError
from purifyloader.purified import plans
from purifyloader.purified.already import GivesPurified, transform_that_purifies
from purifyloader.purified.job import Job, check_arguments, placed
from purifyloader.purified.keyed import (
    KeyedCorruption,
    check_compensate,
    check_compensated,
    compensate_batch,
    compensate_images,
)
from purifyloader.purified.modes import Live, Mode, Opening, SamplesFromCache
from purifyloader.purified.sanitation import Sanitation, check_sanitation
from purifyloader.purifiers import Purifier

log = logging.getLogger(__name__)

_INNER_ATTRIBUTES = ("classes", "class_to_idx", "targets")
_OF_SAMPLES = ("data", "labels", "samples", "imgs")  # where datasets keep what their samples are made of
_AS_MADE = ("purifier", "seed", "draws", "sanitation", "image_key", "dataset")
_MISSING = (None, "precompute", "purify")


def _refused(self: Any, *_: Any, **__: Any) -> Any:
    raise InputError(
        "The targets of a PurifiedDataset are those of its samples, and this list is read only. Take a copy, "
        "list(dataset.targets), or correct labels by sanitation=plans.Sanitation(...)."
    )


class ReadOnly(list[Any]):
    """A list that cannot be changed: what stood in it would no longer be what the samples have."""

    __setitem__ = __delitem__ = __iadd__ = __imul__ = append = extend = insert = _refused
    pop = remove = clear = sort = reverse = _refused

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self),)


class PurifiedDataset(GivesPurified, Dataset[Any]):
    """A map-style dataset with its images purified, then transformed as the user's own were.

    Order: purify → the dataset's own transform up to its normalisation → `compensate` → the rest of the
    transform. A transform that is no torchvision `Compose` cannot be opened: compensation then comes
    right after purification. Targets and further fields pass untouched, and index i is the source's i.
    An index may also be a list of indices: that gives the batch that a loader would collate, at once.

    Args:
        dataset: map-style, of (image, target, ...) tuples, dicts, or bare images: PIL, numpy (H, W[, C])
            or tensors ([C,] H, W), uint8 or float in [0, 1]. A torchvision dataset's transforms are taken
            over, also inside `Subset`, `random_split` and `ConcatDataset`; the object itself is never
            changed, and sees no transform that it is given later (this one does: `purified.transform = ...`).
            Images already normalised or augmented are refused.
        purifier: see `purifyloader.recipes`. Draws are a function of (seed, draw, index): every epoch of a draw
            and a cache see the same purified image. One with a condition over the dataset, such as
            `recipes.puregen_filt`, is planned here in one pass, unless a cache has the plan already.
        compensate: ECLIPSE's other half, `Compensate()`; a new draw in every epoch, from (seed, epoch, index).
        cache: folder, read in place of purifying; see `purifyloader.precompute`. A new or empty folder is
            filled now. 8 bits a channel. Targets and further fields are read from it too, where it has them.
        seed: of all noise.
        batch_size: images read and purified at a time while a cache is filled.
        device: where to purify, by default where the purifier is.
        draws: independent purifications of each image; an epoch reads draw `epoch % draws`.
        missing: for a cache that is not finished. None refuses one that is partly filled, for somebody may be
            filling it; "precompute" fills it now, together with other processes that do the same; "purify" fills
            a shard when one of its images is first read, in whichever process reads it (a shuffled epoch
            touches all shards within its first batches); one that another process has made is compared first.
        check_source: how much of `dataset` is compared with what the cache, or a part that another process or run has
            made, was made from: True reads all of it in this process (40 minutes for the JPEGs of ImageNet); a number
            that many, drawn at random; False nothing. With less than all, a dataset in another order may pass.
        in_memory: read the whole cache into memory now, for slow or remote disks.
        transform: applied to the image after purification, for a dataset that has none of its own.
        image_key: where the image is in a sample; position 0 of a tuple, "image" of a dict by default.
        sanitation: suspects and corrected labels (`plans.Sanitation`); by default that of the cache. Where it drops
            suspects, `indices` says which sample of the source each is.
        progress: show bars.

    Raises `InputError` for no map-style dataset, an empty one, one that cannot be purified honestly, or images that the
    purifier does not take; `CacheError` for a `cache` that holds something else, is unfinished, or is damaged.

    >>> import torch
    >>> from purifyloader import PurifiedDataset, recipes
    >>> images = [(torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8), label) for label in range(4)]
    >>> image, label = PurifiedDataset(images, recipes.jpeg(quality=10))[3]
    >>> image.shape, image.dtype, label
    (torch.Size([3, 8, 8]), torch.uint8, 3)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        purifier: Purifier,
        compensate: KeyedCorruption | None = None,
        cache: str | Path | None = None,
        seed: int = 0,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        *,
        draws: int = 1,
        missing: str | None = None,
        check_source: bool | int = True,
        in_memory: bool = False,
        transform: Callable[[Any], Any] | None = None,
        image_key: ImageKey = None,
        sanitation: Sanitation | None = None,
        progress: bool = True,
    ) -> None:
        check_arguments(dataset, purifier)
        check_compensate(compensate)
        if missing not in _MISSING:
            raise InputError(f"missing must be one of {', '.join(map(repr, _MISSING))}. Got {missing!r}.")
        self.dataset: Dataset[Any] | None = dataset
        self.compensate: KeyedCorruption | None = compensate
        self.seed = as_integer("seed", seed, -(2**63))
        self.draws = as_integer("draws", draws, 1)
        if not isinstance(check_source, bool):
            check_source = as_integer("check_source", check_source, 0)
        self.batch_size = as_integer("batch_size", batch_size, 1)
        self.image_key = image_key
        self.purifier: Purifier | None = placed(purifier, device)
        if (already := transform_that_purifies(dataset, transform)) is not None:
            raise InputError(
                f"The images are purified already, by the {already} in their transform. Leave it out of the transform."
            )
        self._source = take_over(dataset, transform)
        check_sanitation(sanitation, self._source, image_key)
        job = Job(self._source, self.purifier, self.seed, self.draws, image_key)
        probed = check_honest(self._source, self.purifier.image_channels, image_key)
        _check_transform(self._source, image_key)
        if compensate is not None:
            with random_state_kept():
                check_compensated(self._source.before(0, get_image(self._source.fetch([0])[0], image_key)))
        if cache is None:
            if plans.is_open(self.purifier):
                job = plans.planned(job, plans.make(job, self.batch_size, progress=progress))
                self.purifier = job.purifier
            self._start(Live(job, sanitation), sanitation)
            return
        check_apart(dataset, as_path(cache))
        opening = Opening(as_path(cache), missing, check_source, in_memory, self.batch_size, progress)
        mode, self.purifier, sanitation = opening.open(job, dataset, probed, sanitation)
        self._start(mode, sanitation)

    @classmethod
    def from_cache(
        cls,
        folder: str | Path,
        compensate: KeyedCorruption | None = None,
        *,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        seed: int | None = None,
        in_memory: bool = False,
        sanitation: Sanitation | None = None,
    ) -> Self:
        """Open a finished cache alone: purified images and their targets, without source and purifier.

        `transform` and `target_transform` are applied to each image and target; `seed` is that of compensation, by
        default the cache's; the rest is as above. Raises `CacheError` for a cache that is missing, unfinished, damaged,
        or holds no targets.
        """
        check_compensate(compensate)
        self = cls.__new__(cls)
        reader = CacheReader(folder, in_memory=in_memory)
        if reader.targets is None or reader.sample is None:
            raise CacheError(
                f"The cache {reader.folder} must hold its targets to be read without its source. Got one whose "
                "targets could not be written as JSON: give the source, PurifiedDataset(dataset, purifier, cache=...)."
            )
        self.dataset = self.purifier = None
        self.compensate = compensate
        self.seed = as_integer("seed", reader.config.get("seed", 0) if seed is None else seed, -(2**63))
        self.draws = reader.draws
        self.batch_size = 256
        self.image_key = reader.sample.get("image")
        self._source = without_source(len(reader), transform, target_transform)
        sanitation = plans.sanitation_of(reader, sanitation)
        self._start(SamplesFromCache(reader, sanitation), sanitation)
        if compensate is not None:
            self._check_compensated()
        return self

    def _start(self, mode: Mode, sanitation: Sanitation | None) -> None:
        # Shared memory: a plain attribute set in the main process never reaches a persistent worker.
        # Two numbers: the epoch, and the samples read since it was set.
        self._shared = torch.zeros(2, dtype=torch.int64, device="cpu").share_memory_()
        self.sanitation = sanitation
        self._mode = mode
        dropped = sanitation is not None and sanitation.drop and len(sanitation.suspects) > 0
        self._kept: NDArray[np.int64] | None = sanitation.kept if sanitation is not None and dropped else None
        self._length = len(self._source) if self._kept is None else len(self._kept)
        self._warned = False
        # The mode again, where it gives pairs one by one without anything that could be done once.
        has_pairs = isinstance(mode, SamplesFromCache) and mode.pil is not None and self.compensate is None
        self._pairs: SamplesFromCache | None = mode if has_pairs else None  # type: ignore[assignment]
        self._target_list: list[Any] | None = None
        self._find_conversion()

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        source = "" if self.dataset is None else f" of {type(self.dataset).__name__}"
        purifier = "" if self.purifier is None else f", {type(self.purifier).__name__}"
        return f"{type(self).__name__}({len(self):,} images{source}{purifier}, seed={self.seed})"

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> Any:
        """Sample `index`, or, of a list of indices, their samples as one collated batch."""
        pairs = self._pairs
        if pairs is not None and type(index) is int and 0 <= index < self._length:
            # The way most images go, and one by one: nothing here that could be done once.
            draw = 0
            if self.draws > 1:
                self._notice_forgotten_epoch(1)
                draw = self._draw()
            if self._kept is not None:
                index = int(self._kept[index])
            image = Image.frombytes(*pairs.pil, pairs.reader.row(index, draw).tobytes())  # type: ignore[misc]
            return self._source.pair(index, image, pairs.fields[index])
        if isinstance(index, list | tuple) or (isinstance(index, Tensor | np.ndarray) and index.ndim == 1):
            return self._batch([self._position(i) for i in index])
        return self.__getitems__([index])[0]  # type: ignore[list-item]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Purify a loader's whole batch in one go. Explicit: a delegated one would be bypassed."""
        return self._samples([self._position(i) for i in indices])

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is read next: it draws its own compensation, and reads its draw. Reaches running workers."""
        self._shared[0] = as_integer("epoch", epoch, 0)
        self._shared[1] = 0

    @property
    def epoch(self) -> int:
        return int(self._shared[0])

    @property
    def indices(self) -> NDArray[np.int64]:
        """Index in the source of each sample, int64 (N,): all of them, unless a sanitation drops some."""
        return np.arange(self._length) if self._kept is None else self._kept.copy()

    def __getattr__(self, name: str) -> Any:
        if name == "transform" and "_source" in self.__dict__:
            return self._source.transform()
        is_inner = name in _INNER_ATTRIBUTES and "_mode" in self.__dict__
        if is_inner and (value := self._inner_attribute(name)) is not None:
            return value
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _inner_attribute(self, name: str) -> Any:
        mode = self._mode
        if name == "targets" and isinstance(mode, SamplesFromCache) and mode.is_pair:  # from where the items have them
            if self._target_list is None:
                fields = mode.fields
                self._target_list = ReadOnly(list(fields) if self._kept is None else fields.get(self._kept.tolist()))
            return self._target_list
        if self.dataset is not None:
            value = getattr(self._source.raw, name)  # which the samples come from, whatever the user's object has now
            if name == "targets" and self.sanitation is not None:
                value = self.sanitation.of_targets(value)
            return value
        assert isinstance(mode, SamplesFromCache)
        classes = (mode.reader.index.notes or {}).get("classes")
        if name == "classes" or classes is None:
            return classes if name == "classes" else None
        return {name: i for i, name in enumerate(classes)} if name == "class_to_idx" else None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "transform":
            self._set_transform(value)
        elif name == "transforms":
            raise InputError("The transforms of a PurifiedDataset are set before wrapping. Give them to the dataset.")
        elif name == "target_transform":
            raise InputError(
                "The target_transform of a PurifiedDataset is set before wrapping: give it to the dataset."
            )
        elif name in (*_INNER_ATTRIBUTES, *_OF_SAMPLES):
            raise InputError(
                f"{name} of a PurifiedDataset are those of its samples. Change them in the dataset before wrapping, or "
                "correct labels by sanitation=plans.Sanitation(...)."
            )
        elif name in _AS_MADE and "_mode" in self.__dict__:
            raise InputError(
                f"{name} of a PurifiedDataset decides its images, and stays what it was when the dataset was made. Got "
                "another: make a new PurifiedDataset."
            )
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned worker: where a finished cache is read, without the model, which would fill a GPU's memory."""
        state = {**self.__dict__, "_conversion": None}
        return state if self._mode.purifies else {**state, "purifier": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has an epoch of its own, which its persistent workers must see too."""
        self.__dict__.update(state)
        self._find_conversion()
        self._shared = self._shared.clone() if not self._shared.is_shared() else self._shared
        self._shared.share_memory_()

    def _position(self, index: Any) -> int:
        """The index in the source."""
        position = operator.index(index)
        length = self._length
        if not -length <= position < length:
            raise IndexError(f"Index must be in [-{length}, {length}). Got {position}.")
        position %= length
        return position if self._kept is None else int(self._kept[position])

    def _draw(self) -> int:
        return self.epoch % self.draws if self.draws > 1 else 0

    def _samples(self, positions: Sequence[int]) -> list[Any]:
        self._notice_forgotten_epoch(len(positions))
        if not positions:
            return []
        if self._conversion is not None:
            fields = self._converting.fields
            images = self._conversion.items(self._converted_batch(self._conversion, positions))
            return list(zip(images, fields.get(positions), strict=True))
        samples, purified = self._mode.samples(positions, self._draw())
        opened = [self._source.before(i, image) for i, image in zip(positions, purified, strict=True)]
        if self.compensate is not None:
            # whole batches, because drawing noise for one image at a time costs ten times as much
            opened = compensate_images(self.compensate, opened, self.seed, self.epoch, positions)
        return [
            self._source.after(i, sample, image, self.image_key)
            for i, sample, image in zip(positions, samples, opened, strict=True)
        ]

    def _batch(self, positions: Sequence[int]) -> Any:
        """Return the samples as a loader would have collated them."""
        if self._conversion is None or not positions:
            return default_collate(self._samples(positions))
        self._notice_forgotten_epoch(len(positions))
        batch = self._converted_batch(self._conversion, positions)
        fields = self._converting.fields
        if fields.integers is not None:
            return [batch, torch.from_numpy(fields.integers[list(positions)])]
        others: Any = tuple(fields.get(positions))
        return [batch, default_collate(others)]

    @property
    def _converting(self) -> SamplesFromCache:
        assert isinstance(self._mode, SamplesFromCache)
        return self._mode

    def _converted_batch(self, conversion: Conversion, positions: Sequence[int]) -> Tensor:
        x_BCHW = self._converting.batch(positions, self._draw())
        for step in conversion.first:
            x_BCHW = step(x_BCHW)
        if self.compensate is not None:
            x_BCHW = compensate_batch(self.compensate, x_BCHW, self.seed, self.epoch, positions)
        for step in conversion.then:
            x_BCHW = step(x_BCHW)
        return x_BCHW

    def _find_conversion(self) -> None:
        """Find the whole transform as one of batches, where it is a mere conversion of images that are all alike."""
        self._conversion: Conversion | None = None
        mode = self._mode
        if not isinstance(mode, SamplesFromCache) or mode.pil is None:
            return
        conversion = self._source.conversion()
        # compensation knows grey and colour, and one by one the alpha plane is set aside for it
        plain = mode.pil[0] in ("L", "RGB")
        if conversion is None or self.compensate is None or (plain and _gives_floats(conversion)):
            self._conversion = conversion

    def _set_transform(self, transform: Callable[[Any], Any] | None) -> None:
        """Some loaders give their dataset its transform, as timm's `create_loader` does."""
        if transform_that_purifies(None, transform) is not None:
            raise InputError("Images are purified once, and this transform purifies too. Leave one out.")
        before = self._source
        self._source = before.with_transform(transform)
        try:
            if not isinstance(self._mode, SamplesFromCache):
                _check_transform(self._source, self.image_key)
            if self.compensate is not None:
                self._check_compensated()
        except InputError:
            self._source = before
            raise
        self._find_conversion()

    def _check_compensated(self) -> None:
        """Try one image as far as compensation: a transform it cannot get into fails here, not in a worker."""
        mode = self._mode
        with random_state_kept():
            sample = mode.sample(0, 0) if isinstance(mode, SamplesFromCache) else self._source.fetch([0])[0]
            check_compensated(self._source.before(0, get_image(sample, self.image_key)))

    def _notice_forgotten_epoch(self, read: int) -> None:
        if (self.compensate is None and self.draws == 1) or self._warned:
            return
        self._shared[1] += read
        if int(self._shared[1]) > 2 * len(self):
            self._warned = True
            log.warning(
                "The dataset has been read more than twice since set_epoch was called: compensation and draws repeat "
                "those of epoch %d. Call dataset.set_epoch(epoch) at the start of each epoch.",
                self.epoch,
            )


def _check_transform(source: Source, image_key: ImageKey) -> None:
    """Refuse a transform that purifies, whatever it is wrapped in: it is tried on one image."""
    with random_state_kept(), noted() as done:
        sample = source.fetch([0])[0]
        with suppress(Exception):  # which reading an item raises, and explains
            source.after(0, sample, source.before(0, get_image(sample, image_key)), image_key)
    if done.purified:
        raise InputError("The images are purified already, by a function in their transform. Leave it out of it.")


def _gives_floats(conversion: Conversion) -> bool:
    """Say whether compensation, which needs float32 in [0, 1], can get at the batch before it is normalised."""
    x = torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device="cpu")
    for step in conversion.first:
        x = step(x)
    return x.dtype == torch.float32
