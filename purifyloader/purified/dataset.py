"""`PurifiedDataset`: any map-style dataset, with its images purified before the user's transform."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from tqdm.auto import tqdm

from purifyloader import plans
from purifyloader.cache import CacheReader, CacheWriter
from purifyloader.cache.format import INDEX_FILE, SHARD_FILE
from purifyloader.cache.reader import Targets
from purifyloader.core import noise
from purifyloader.core.checks import as_integer
from purifyloader.core.images import ImageKind, as_stored, from_bytes, from_engine, pil_mode, to_engine, type_of
from purifyloader.datasets.conversions import Conversion
from purifyloader.datasets.samples import ImageKey, assemble, get_image, is_plain
from purifyloader.datasets.sources import REMEDY, check_honest, random_state_kept, take_over, without_source
from purifyloader.errors import CacheError, InputError
from purifyloader.files.locks import is_held
from purifyloader.purified.already import transform_that_purifies
from purifyloader.purified.filling import ShardsOnDemand, choose_layout, fill, notes_of
from purifyloader.purified.job import COMPENSATE, Job, check_arguments, check_source, converted, placed
from purifyloader.purifiers import Purifier

__all__ = ["KeyedCorruption", "PurifiedDataset"]

log = logging.getLogger(__name__)

COMPENSATE_REMEDY = (
    "Compensation comes before the Normalize of your Compose, or at its end, and needs an image there: leave "
    "compensate= out and put Compensate() into your transform where the image is still in [0, 1]."
)

_INNER_ATTRIBUTES = ("classes", "class_to_idx", "targets")
_MISSING = (None, "precompute", "purify")


class KeyedCorruption(Protocol):
    """What `compensate=` takes: `purifyloader.transforms.Compensate`, or anything with this method.

    `apply` gets float32 images (B, C, H, W) in [0, 1] and one int64 key an image, and gives such images.
    """

    def apply(self, image: Any, keys_B: Tensor) -> Any: ...


class PurifiedDataset(Dataset[Any]):
    """A map-style dataset whose images are purified, then transformed as the user's own were.

    Order: purify → the dataset's own transform up to its normalisation → `compensate` → the rest of the
    transform. A transform that is no torchvision `Compose` cannot be opened: compensation then comes
    right after purification. Targets and further fields pass untouched, and index i is the source's i.
    An index may also be a list of indices: that gives the batch that a loader would collate, at once.

    Args:
        dataset: map-style, of (image, target, ...) tuples, dicts, or bare images: PIL, numpy (H, W[, C])
            or tensors ([C,] H, W), uint8 or float in [0, 1]. A torchvision dataset's transforms are taken
            over, also inside `Subset`, `random_split` and `ConcatDataset`; the object itself is never
            changed, and a transform that it is given later is not seen. (One that this object is given
            later, `purified.transform = ...`, is.) Images already normalised or augmented are refused.
        purifier: see `purifyloader.recipes`. Its draws are a function of (seed, draw, index): every epoch
            of a draw and a cache see the same purified image. One with a condition over the dataset, such as
            `recipes.puregen_filt`, is planned here: that is one pass over all of it, unless a cache has the plan
            already (`purifyloader.purified.plans`).
        compensate: ECLIPSE's other half, `Compensate()`; drawn afresh from (seed, epoch, index).
        cache: folder, read in place of purifying; see `purifyloader.precompute`. A new or empty folder is
            filled now. 8 bits a channel. Targets and further fields are read from it too, where it has them.
        seed: of all noise.
        batch_size: images read and purified at a time while a cache is filled.
        device: where to purify, by default where the purifier is.
        draws: independent purifications of each image; an epoch reads draw `epoch % draws`.
        missing: what to do about a cache that is not finished. None refuses one that is partly filled, for
            somebody may be filling it; "precompute" fills it now, together with other processes that do the
            same; "purify" fills a shard when one of its images is first read, in whichever process reads it
            (a shuffled epoch touches all shards within its first batches).
        check_source: how much of `dataset` is compared with what the cache was made from: True all of it,
            which reads all of it in this process (40 minutes for the JPEGs of ImageNet); a number that many
            samples, drawn at random; False nothing.
        in_memory: read the whole cache into memory now, for slow or remote disks.
        transform: applied to the image after purification, for a dataset that has none of its own.
        image_key: where the image is in a sample; position 0 of a tuple, "image" of a dict by default.
        progress: show bars.

    Raises:
        InputError: no map-style dataset, an empty one, one that cannot be purified honestly, or images
            that the purifier does not take.
        CacheError: `cache` holds something else, is unfinished, or is damaged.
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
        progress: bool = True,
    ) -> None:
        check_arguments(dataset, purifier)
        _check_compensate(compensate)
        if isinstance(dataset, PurifiedDataset) and dataset.compensate is not None:
            raise InputError(
                "Expected compensation after all purification. Got a PurifiedDataset that compensates already: "
                "give compensate= to the outer one only, or chain the purifiers."
            )
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
                f"Expected images that are not purified yet. Got ones that are purified already, by its {already}: "
                "leave it out of the transform."
            )
        self._source = take_over(dataset, transform)
        self._job: Job | None = Job(self._source, self.purifier, self.seed, self.draws, image_key)
        probed = check_honest(self._source, self.purifier.image_channels, image_key)
        if compensate is not None:
            with random_state_kept():
                sample = self._source.fetch([0])[0]
            self._check_compensated(sample)
        self._start()
        if cache is not None:
            self._open_cache(Path(cache), probed, missing, check_source, in_memory, progress)
        elif plans.is_open(self.purifier):
            self._take_plan(plans.make(self._job, self.batch_size, progress=progress))

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
    ) -> Self:
        """A finished cache alone: purified images and their targets, without source and purifier.

        Args:
            folder: of the cache.
            compensate: as above.
            transform, target_transform: applied to each image and target.
            seed: of compensation; by default the one that the cache was made with.
            in_memory: as above.

        Raises:
            CacheError: the cache is missing, unfinished, damaged, or holds no targets.
        """
        _check_compensate(compensate)
        self = cls.__new__(cls)
        reader = CacheReader(folder, in_memory=in_memory)
        if reader.targets is None or reader.sample is None:
            raise CacheError(
                f"The cache {reader.folder} must hold its targets to be read without its source. Got one whose "
                "targets could not be written as JSON: give the source, PurifiedDataset(dataset, purifier, cache=...)."
            )
        self.dataset = self.purifier = self._job = None
        self.compensate = compensate
        self.seed = as_integer("seed", reader.config.get("seed", 0) if seed is None else seed, -(2**63))
        self.draws = reader.draws
        self.batch_size = 256
        self.image_key = reader.sample.get("image")
        self._source = without_source(len(reader), transform, target_transform)
        self._start()
        self._use(reader, plain=True)
        if compensate is not None:
            self._check_compensated(self._stored_sample(0))
        return self

    def _start(self) -> None:
        # Shared memory: a plain attribute set in the main process never reaches a persistent worker.
        # Two numbers: the epoch, and the samples read since it was set.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._length = len(self._source)
        self._warned = False
        self._cache: CacheReader | ShardsOnDemand | None = None
        self._types: str | list[str] | None = None  # how the images of the cache were held
        self._others: Targets | None = None  # the fields beside them, where the cache has them
        self._structure: dict[str, Any] = {}
        self._is_pair = False
        self._pil: tuple[str, tuple[int, int]] | None = None  # mode and size, where all are alike
        self._conversion: Conversion | None = None
        self._may_convert = False  # pairs of a PIL image, all alike, out of a cache
        self._converts = False
        self._target_list: list[Any] | None = None

    # -- the dataset that a loader sees --------------------------------------------------------------

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> Any:
        """Sample `index`, or, of a list of indices, their samples as one collated batch."""
        if self._pil is not None and type(index) is int and 0 <= index < self._length:
            # The way most images go, and one by one: nothing here that could be done once.
            draw = 0
            if self.draws > 1:
                self._notice_forgotten_epoch(1)
                draw = self._draw()
            row: NDArray[np.uint8] = self._cache.row(index, draw)  # type: ignore[union-attr]
            image = Image.frombytes(*self._pil, row.tobytes())
            return self._source.pair(index, image, self._others[index])  # type: ignore[index]
        if isinstance(index, list | tuple) or (isinstance(index, Tensor | np.ndarray) and index.ndim == 1):
            return self._batch([self._position(i) for i in index])
        return self.__getitems__([index])[0]  # type: ignore[list-item]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """A loader's whole batch at once, purified in one go. Explicit: a delegated one would be bypassed."""
        positions = [self._position(i) for i in indices]
        self._notice_forgotten_epoch(len(positions))
        if not positions:
            return []
        if self._conversion is not None:
            images = self._conversion.items(self._converted_batch(self._conversion, positions))
            assert self._others is not None
            return list(zip(images, self._others.get(positions), strict=True))
        if self._others is not None:
            samples = [self._stored_sample(i) for i in positions]
            purified = [get_image(sample, self.image_key) for sample in samples]
        else:
            samples = self._source.fetch(positions)
            raw = [get_image(sample, self.image_key) for sample in samples]
            purified = self._purified(positions, raw)
        opened = [self._source.before(i, image) for i, image in zip(positions, purified, strict=True)]
        if self.compensate is not None:
            opened = self._compensated(self.compensate, positions, opened)
        return [
            self._source.after(i, sample, image, self.image_key)
            for i, sample, image in zip(positions, samples, opened, strict=True)
        ]

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is read next: compensation is drawn afresh, the next draw read. Reaches running workers."""
        self._shared[0] = as_integer("epoch", epoch, 0)
        self._shared[1] = 0

    @property
    def epoch(self) -> int:
        return int(self._shared[0])

    def __getattr__(self, name: str) -> Any:
        if name == "transform" and "_source" in self.__dict__:
            return self._source.transform()
        if name in _INNER_ATTRIBUTES and "dataset" in self.__dict__:
            if name == "targets" and self._is_pair:  # from where the items have them
                if self._target_list is None:
                    assert self._others is not None
                    self._target_list = list(self._others)
                return self._target_list
            if self.dataset is not None:
                return getattr(self.dataset, name)
            if (value := self._stored_attribute(name)) is not None:
                return value
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "transform":
            self._set_transform(value)
        elif name == "transforms":
            raise InputError("Expected the transforms before wrapping: give them to the dataset, or as transform=.")
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned worker: where a finished cache is read, without the model, which would fill a GPU's memory."""
        state = {**self.__dict__, "_conversion": None}
        if isinstance(self._cache, CacheReader):
            state.update(purifier=None, _job=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has an epoch of its own, which its persistent workers must see too."""
        self.__dict__.update(state)
        if isinstance(self._cache, CacheReader) and self._converts and self._cache.image_shape is not None:
            self._conversion = self._found_conversion(self._cache.image_shape[2])
        self._shared = self._shared.clone() if not self._shared.is_shared() else self._shared
        self._shared.share_memory_()

    # -- what happens to an image --------------------------------------------------------------------

    def _position(self, index: Any) -> int:
        position = operator.index(index)
        length = self._length
        if not -length <= position < length:
            raise IndexError(f"Index must be in [-{length}, {length}). Got {position}.")
        return position % length

    def _draw(self) -> int:
        return self.epoch % self.draws

    def _purified(self, positions: Sequence[int], images: Sequence[Any]) -> list[Any]:
        """Purified images of the kind that came, out of the cache where there is one."""
        draw = self._draw()
        if self._cache is not None:
            kinds = [type_of(as_stored(image)[1]) for image in images]
            return [from_bytes(self._cache.row(p, draw), kind) for p, kind in zip(positions, kinds, strict=True)]
        assert self._job is not None
        stored = converted(positions, images, self._job.purifier.image_channels, REMEDY)
        purified = self._job.purify(positions, [x for x, _ in stored], draw)
        return [from_engine(x, kind) for x, (_, kind) in zip(purified, stored, strict=True)]

    def _stored_sample(self, position: int) -> Any:
        """A sample as the cache alone gives it, with its image before the user's transform."""
        assert self._cache is not None
        assert self._others is not None
        types = self._types
        type_ = types if isinstance(types, str) else types[position]  # type: ignore[index]
        image = from_bytes(self._cache.row(position, self._draw()), type_)
        return assemble(self._structure, self._others[position], image)

    def _batch(self, positions: Sequence[int]) -> Any:
        """What a loader would have collated."""
        if self._conversion is None or not positions:
            return default_collate(self.__getitems__(positions))
        self._notice_forgotten_epoch(len(positions))
        batch = self._converted_batch(self._conversion, positions)
        assert self._others is not None
        integers = self._others.integers
        if integers is not None:
            return [batch, torch.from_numpy(integers[list(positions)])]
        others: Any = tuple(self._others.get(positions))
        return [batch, default_collate(others)]

    def _converted_batch(self, conversion: Conversion, positions: Sequence[int]) -> Tensor:
        assert isinstance(self._cache, CacheReader)
        rows = torch.from_numpy(self._cache.batch(positions, self._draw() if self.draws > 1 else 0))
        x_BCHW = rows.permute(0, 3, 1, 2)
        for step in conversion.first:
            x_BCHW = step(x_BCHW)
        if self.compensate is not None:
            keys_B = self._keys(self.epoch, positions)
            x_BCHW = self.compensate.apply(x_BCHW, keys_B).clamp(0, 1)
        for step in conversion.then:
            x_BCHW = step(x_BCHW)
        return x_BCHW

    def _keys(self, epoch: int, positions: Sequence[int]) -> Tensor:
        return noise.fold_in(noise.image_keys(self.seed, epoch, list(positions)), COMPENSATE)

    def _compensated(self, compensate: KeyedCorruption, positions: Sequence[int], images: Sequence[Any]) -> list[Any]:
        """Whole batches, because drawing noise for one image at a time costs ten times as much."""
        keys_B = self._keys(self.epoch, positions)
        engine = converted(positions, images, None, COMPENSATE_REMEDY, to_engine)
        return [from_engine(x, kind) for x, kind in _in_batches(engine, keys_B, compensate.apply)]

    def _set_transform(self, transform: Callable[[Any], Any] | None) -> None:
        """Some loaders give their dataset its transform, as timm's `create_loader` does."""
        if transform_that_purifies(None, transform) is not None:
            raise InputError("Expected images to be purified once. Got a transform that purifies too: leave one out.")
        before = self._source
        self._source = before.with_transform(transform)
        try:
            if self.compensate is not None:
                with random_state_kept():
                    sample = self._source.fetch([0])[0] if self._others is None else self._stored_sample(0)
                self._check_compensated(sample)
        except InputError:
            self._source = before
            raise
        if isinstance(self._cache, CacheReader) and self._may_convert:
            assert self._cache.image_shape is not None
            self._find_conversion(self._cache.image_shape[2])

    def _check_compensated(self, sample: Any) -> None:
        """One image as far as compensation, so that a transform it cannot get into fails here, not in a worker."""
        with random_state_kept():
            image = get_image(sample, self.image_key)
            converted([0], [self._source.before(0, image)], None, COMPENSATE_REMEDY)

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

    # -- the cache -----------------------------------------------------------------------------------

    def _open_cache(
        self,
        folder: Path,
        probed: Sequence[tuple[tuple[int, int, int], ImageKind]],
        missing: str | None,
        check_source: bool | int,
        in_memory: bool,
        progress: bool,
    ) -> None:
        job = self._job
        assert job is not None
        finished = (folder / INDEX_FILE).exists()
        partly = not finished and folder.is_dir() and any(SHARD_FILE.fullmatch(p.name) for p in folder.iterdir())
        if partly and missing is None:
            if message := _partly(folder):
                raise CacheError(message)
            finished = True  # by another process, since the look above
        if not finished:
            layout = choose_layout(folder, len(self), self.draws, job.purifier, probed)
            writer = CacheWriter(folder, job.config(), layout, job.made())
            found = plans.agreed(job, writer, self.batch_size, progress=progress)
            if found is not None:
                job = self._take_plan(found)
            plan = plans.with_plan(writer.folder, None, found)
            notes = notes_of(self.dataset, job.purifier)
            of_each_shard = check_source
            if not isinstance(check_source, bool):
                of_each_shard = -(-check_source // len(layout.shards)) or False
            if missing == "purify":
                self._cache = ShardsOnDemand(job, writer, self.batch_size, of_each_shard, notes, plan)
                return
            fill(
                job,
                writer,
                batch_size=self.batch_size,
                check_source=of_each_shard,
                plan=plan,
                notes=notes,
                progress=progress,
            )
        reader = CacheReader(folder, job.config(), in_memory)
        if len(reader) != len(self):
            raise CacheError(
                f"The cache {folder} must hold one image for each of the source's {len(self)}. Got {len(reader)}: "
                "it was made from another dataset. Give that one, or precompute into another folder."
            )
        if finished:
            if (found := plans.of_index(reader.plan)) is not None:
                self._take_plan(found)
            self._check_source(reader, check_source, progress)
        with random_state_kept():
            plain = is_plain(self._source.fetch([0])[0])
        self._use(reader, plain)

    def _take_plan(self, found: Mapping[str, Any]) -> Job:
        assert self._job is not None
        self.purifier = plans.applied(self._job.purifier, found)
        self._job = self._job.with_purifier(self.purifier)
        return self._job

    def _use(self, reader: CacheReader, plain: bool) -> None:
        """Read from this cache; its targets too, where it has them and samples are of plain types."""
        self._cache = reader
        types = reader.image_types()
        self._types = types[0] if len(set(types)) == 1 else types
        structure = reader.sample
        if not plain or structure is None or reader.targets is None:
            return
        self._others, self._structure = reader.targets, structure
        self._is_pair = structure == {"type": "tuple", "image": 0, "fields": 2}
        self._may_convert = self._is_pair and reader.image_shape is not None and str(self._types).startswith("pil/")
        if self._may_convert:
            assert reader.image_shape is not None
            if self.compensate is None:
                height, width, channels = reader.image_shape
                self._pil = pil_mode(channels), (width, height)
            self._find_conversion(reader.image_shape[2])

    def _find_conversion(self, channels: int) -> None:
        self._conversion = self._found_conversion(channels)
        self._converts = self._conversion is not None

    def _found_conversion(self, channels: int) -> Conversion | None:
        """The whole transform on batches, where it is a mere conversion."""
        found = self._source.conversion()
        if found is None or self.compensate is None:
            return found
        # compensation knows grey and colour, and one by one the alpha plane is set aside for it
        return found if channels in (1, 3) and _gives_floats(found) else None

    def _stored_attribute(self, name: str) -> Any:
        """`classes` and `class_to_idx` of a cache read without its source."""
        assert isinstance(self._cache, CacheReader)
        classes = (self._cache.index.notes or {}).get("classes")
        if name == "classes" or classes is None:
            return classes
        return {name: i for i, name in enumerate(classes)} if name == "class_to_idx" else None

    def _check_source(self, reader: CacheReader, amount: bool | int, progress: bool) -> None:
        assert self._job is not None
        known = reader.source_hashes()
        if known is None or amount is False:
            return
        total = len(self) if amount is True else min(amount, len(self))
        with tqdm(total=total, unit="img", desc="checking the source", disable=not progress, leave=False) as bar:
            check_source(self._job.reader, known, amount, reader.folder, batch_size=self.batch_size, seen=bar.update)


def _in_batches(
    images: Sequence[tuple[Tensor, ImageKind]], keys_B: Tensor, work: Callable[[Tensor, Tensor], Tensor]
) -> list[tuple[Tensor, ImageKind]]:
    """`work(x_BCHW, keys_B)` on all images, those of one shape together; in the order they came."""
    by_shape: dict[torch.Size, list[int]] = {}
    for row, (x, _) in enumerate(images):
        by_shape.setdefault(x.shape, []).append(row)
    out = list(images)
    for rows in by_shape.values():
        results = work(torch.stack([images[row][0] for row in rows]), keys_B[rows])
        for row, x in zip(rows, results, strict=True):
            out[row] = (x, images[row][1])
    return out


def _gives_floats(found: Conversion) -> bool:
    """Whether compensation, which needs float32 in [0, 1], can get at the batch before it is normalised."""
    x = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    for step in found.first:
        x = step(x)
    return x.dtype == torch.float32


def _partly(folder: Path) -> str:
    """What to say of a cache that is not finished; nothing if it is by now."""
    try:
        CacheReader(folder)
        return ""
    except CacheError as error:
        busy = any(is_held(path) for path in folder.glob(".*.lock"))
        return (
            f"{error} {'Another process is filling it now: wait for it. ' if busy else ''}"
            'Or give missing="precompute" to fill it now, which any number of processes may do together, or '
            'missing="purify" to fill each shard when it is first read.'
        )


def _check_compensate(compensate: Any) -> None:
    if compensate is not None and not callable(getattr(compensate, "apply", None)):
        raise InputError(
            "Expected compensate to be `purifyloader.transforms.Compensate(...)` or None. "
            f"Got {type(compensate).__name__}."
        )
