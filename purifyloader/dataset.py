"""`PurifiedDataset`: any map-style dataset, with its images purified before the user's transform."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from purifyloader import noise
from purifyloader.cache import CacheReader, CacheWriter, SourceHasher
from purifyloader.cache.format import INDEX_FILE
from purifyloader.cache.format import VERSION as FORMAT_VERSION
from purifyloader.devices import as_device
from purifyloader.errors import InputError, PurifyError
from purifyloader.images import ImageKind, from_bytes, from_engine, kind_of, own_channels, quantize, to_engine
from purifyloader.purifiers import SCHEMA, Purifier
from purifyloader.samples import ImageKey, get_image, rest
from purifyloader.sources import REMEDY, check_honest, random_state_kept, take_over

__all__ = ["KeyedCorruption", "PurifiedDataset"]

log = logging.getLogger(__name__)

# Children of an image's key: its purification and its compensation share no noise.
PURIFY, COMPENSATE = 0, 1

COMPENSATE_REMEDY = (
    "Compensation comes before the Normalize of your Compose, or at its end, and needs an image there: leave "
    "compensate= out and put Compensate() into your transform where the image is still in [0, 1]."
)

_INNER_ATTRIBUTES = ("classes", "class_to_idx", "targets")


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

    Args:
        dataset: map-style, of (image, target, ...) tuples, dicts, or bare images: PIL, numpy (H, W[, C])
            or tensors ([C,] H, W), uint8 or float in [0, 1]. A torchvision dataset's `transform` or
            `transforms` is taken over, also inside `Subset`, `random_split` and `ConcatDataset`; the
            object itself is never changed, and a transform that it is given later is not seen. Images
            already normalised or augmented are refused.
        purifier: see `purifyloader.recipes`. Its draws are a function of (seed, index): every epoch and
            a cache see the same purified image.
        compensate: ECLIPSE's other half, `Compensate()`; drawn afresh from (seed, epoch, index).
        cache: folder. Where it is empty the whole dataset is purified into it, with a progress bar (a
            run that was stopped goes on); afterwards it is read. 8 bits a channel, images of one size.
        seed: of all noise.
        batch_size: images read and purified at a time while the cache is filled.
        device: where to purify, by default where the purifier is.
        transform: applied to the image after purification, for a dataset that has none of its own.
        image_key: where the image is in a sample; position 0 of a tuple, "image" of a dict by default.
        progress: show the bar.

    Raises:
        InputError: no map-style dataset, an empty one, one that cannot be purified honestly, or images
            that the purifier does not take.
        CacheError: `cache` holds something else, or is damaged.
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
        transform: Callable[[Any], Any] | None = None,
        image_key: ImageKey = None,
        progress: bool = True,
    ) -> None:
        _check_arguments(dataset, purifier, compensate)
        self.dataset = dataset
        self.compensate = compensate
        self.seed = _as_integer("seed", seed, -(2**63))
        self.batch_size = _as_integer("batch_size", batch_size, 1)
        self.image_key = image_key
        self.purifier = _placed(purifier, device)
        self._source = take_over(dataset, transform)
        check_honest(self._source, purifier.image_channels, image_key)
        if compensate is not None:
            self._check_compensated()
        # Shared memory: a plain attribute set in the main process never reaches a persistent worker.
        # Two numbers: the epoch, and the samples read since it was set.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._warned = False
        self._cache = self._open_cache(Path(cache), progress) if cache is not None else None

    # -- the dataset that a loader sees --------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """A loader's whole batch at once, purified in one go. Explicit: a delegated one would be bypassed."""
        positions = [self._position(i) for i in indices]
        samples = self._source.fetch(positions)
        self._notice_forgotten_epoch(len(positions))
        images = [get_image(sample, self.image_key) for sample in samples]
        if self._cache is None:
            purified = [from_engine(x, kind) for x, kind in self._purify(positions, images)]
        else:
            kinds = [kind_of(image) for image in images]
            purified = [from_bytes(row, kind) for row, kind in zip(self._cache.get(positions), kinds, strict=True)]
        opened = [self._source.before(i, image) for i, image in zip(positions, purified, strict=True)]
        if self.compensate is not None:
            opened = self._compensated(self.compensate, positions, opened)
        return [
            self._source.after(i, sample, image, self.image_key)
            for i, sample, image in zip(positions, samples, opened, strict=True)
        ]

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is read next, so that compensation is drawn afresh; reaches running workers."""
        self._shared[0] = _as_integer("epoch", epoch, 0)
        self._shared[1] = 0

    @property
    def epoch(self) -> int:
        return int(self._shared[0])

    def __getattr__(self, name: str) -> Any:
        if name in _INNER_ATTRIBUTES and "dataset" in self.__dict__:
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("transform", "transforms"):
            raise InputError(f"Expected the {name} before wrapping: give it to the dataset, or as transform=.")
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has an epoch of its own, which its persistent workers must see too."""
        self.__dict__.update(state)
        self._shared = self._shared.clone() if not self._shared.is_shared() else self._shared
        self._shared.share_memory_()

    # -- what happens to an image --------------------------------------------------------------------

    def _position(self, index: int) -> int:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"Index must be in [-{len(self)}, {len(self)}). Got {position}.")
        return position % len(self)

    def _keys(self, epoch: int, positions: Sequence[int], purpose: int) -> Tensor:
        return noise.fold_in(noise.image_keys(self.seed, epoch, list(positions)), purpose)

    def _purify(self, positions: Sequence[int], images: Sequence[Any]) -> list[tuple[Tensor, ImageKind]]:
        """Purified pixels in the engine's form, and what each image was."""
        device = self._device()
        _check_worker(device)
        keys_B = self._keys(0, positions, PURIFY)
        return _in_batches(
            _converted(positions, images, self.purifier.image_channels, REMEDY),
            keys_B,
            lambda x_BCHW, keys: self.purifier(x_BCHW.to(device), keys.to(device)).cpu(),
        )

    def _compensated(self, compensate: KeyedCorruption, positions: Sequence[int], images: Sequence[Any]) -> list[Any]:
        """Whole batches, because drawing noise for one image at a time costs ten times as much."""
        keys_B = self._keys(self.epoch, positions, COMPENSATE)
        converted = _converted(positions, images, None, COMPENSATE_REMEDY)
        return [from_engine(x, kind) for x, kind in _in_batches(converted, keys_B, compensate.apply)]

    def _check_compensated(self) -> None:
        """One image as far as compensation, so that a transform it cannot get into fails here, not in a worker."""
        with random_state_kept():
            image = get_image(self._source.fetch([0])[0], self.image_key)
            _converted([0], [self._source.before(0, image)], None, COMPENSATE_REMEDY)

    def _device(self) -> torch.device:
        parameter = next(self.purifier.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def _notice_forgotten_epoch(self, read: int) -> None:
        if self.compensate is None or self._warned:
            return
        self._shared[1] += read
        if int(self._shared[1]) > 2 * len(self):
            self._warned = True
            log.warning(
                "The dataset has been read more than twice since set_epoch was called: compensation repeats the "
                "draws of epoch %d. Call dataset.set_epoch(epoch) at the start of each epoch.",
                self.epoch,
            )

    # -- the cache -----------------------------------------------------------------------------------

    def _open_cache(self, folder: Path, progress: bool) -> CacheReader:
        config = {
            "purifier": self.purifier.identity(),
            "seed": self.seed,
            "device": self._device().type,
            "schema": SCHEMA,
            "format": FORMAT_VERSION,
            "source": {"length": len(self), "hash": self._source_hash(progress)},
        }
        if (folder / INDEX_FILE).exists():  # finished: nothing to verify shard by shard
            return CacheReader(folder, config)
        writer = CacheWriter(folder, config, len(self))
        shards = writer.pending()
        if shards:
            todo = sum(shard.count for shard in shards)
            with tqdm(
                total=len(self), initial=len(self) - todo, unit="img", desc="purifying", disable=not progress
            ) as bar:
                for shard in shards:
                    writer.write(shard, self._purified_rows(range(shard.start, shard.start + shard.count), bar))
        writer.finish()
        return CacheReader(folder, config)

    def _batches(self, positions: range) -> Iterator[tuple[list[int], list[Any]]]:
        for start in range(0, len(positions), self.batch_size):
            batch = list(positions[start : start + self.batch_size])
            yield batch, self._source.fetch(batch)

    def _purified_rows(self, positions: range, bar: tqdm[Any]) -> NDArray[np.uint8]:
        rows: list[NDArray[np.uint8]] = []
        for batch, samples in self._batches(positions):
            images = [get_image(sample, self.image_key) for sample in samples]
            for position, (x, kind) in zip(batch, self._purify(batch, images), strict=True):
                row = quantize(own_channels(x, kind)).permute(1, 2, 0).numpy()
                if rows and row.shape != rows[0].shape:
                    raise InputError(
                        f"A cache holds images of one size. Got {row.shape} for item {position} after "
                        f"{rows[0].shape}: resize them in the dataset, or leave cache= out."
                    )
                rows.append(row)
            bar.update(len(batch))
        return np.stack(rows)

    def _source_hash(self, progress: bool) -> str:
        """One hash over every image and target: a sample would miss a poison of one image in a hundred."""
        hasher = SourceHasher()
        with tqdm(total=len(self), unit="img", desc="reading", disable=not progress, leave=False) as bar:
            for batch, samples in self._batches(range(len(self))):
                images = [get_image(sample, self.image_key) for sample in samples]
                _converted(batch, images, self.purifier.image_channels, REMEDY)  # before hours of purifying
                targets = [_hashable(rest(sample, self.image_key)) for sample in samples]
                hasher.update([np.asarray(i) if isinstance(i, Image.Image) else i for i in images], targets)
                bar.update(len(batch))
        return hasher.hexdigest()


def _converted(
    positions: Sequence[int], images: Sequence[Any], channels: int | None, remedy: str
) -> list[tuple[Tensor, ImageKind]]:
    """All images in the engine's form; one that cannot be is named."""
    out = []
    for position, image in zip(positions, images, strict=True):
        try:
            out.append(to_engine(image, channels))
        except InputError as error:
            raise InputError(f"Item {position} of the dataset: {error} {remedy}") from None
    return out


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


def _hashable(field: Any) -> Any:
    """A field as the source hash takes it; of objects that have no value of their own, the type."""
    if isinstance(field, Mapping):
        return {str(k): _hashable(v) for k, v in field.items()}
    if isinstance(field, list | tuple):
        return [_hashable(v) for v in field]
    if isinstance(field, Image.Image):
        return np.asarray(field)
    if field is None or isinstance(
        field, bool | int | float | complex | str | bytes | Tensor | np.ndarray | np.generic
    ):
        return field
    return f"{type(field).__module__}.{type(field).__qualname__}"


def _as_integer(name: str, value: Any, low: int) -> int:
    try:
        integer = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be an integer. Got {value!r}.") from None
    if not low <= integer < 2**63:
        raise InputError(f"{name} must be an integer from {low} to 2^63 - 1. Got {value!r}.")
    return integer


def _check_arguments(dataset: Any, purifier: Any, compensate: Any) -> None:
    if not isinstance(purifier, Purifier):
        raise InputError("Expected a purifier, such as `recipes.eclipse(...)`. Got " + type(purifier).__name__ + ".")
    if compensate is not None and not callable(getattr(compensate, "apply", None)):
        raise InputError(
            "Expected compensate to be `purifyloader.transforms.Compensate(...)` or None. "
            f"Got {type(compensate).__name__}."
        )
    if isinstance(dataset, PurifiedDataset) and dataset.compensate is not None:
        raise InputError(
            "Expected compensation after all purification. Got a PurifiedDataset that compensates already: give "
            "compensate= to the outer one only, or chain the purifiers."
        )
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise InputError(
            "Expected a map-style dataset, with __getitem__ and __len__. Got "
            f"{type(dataset).__name__}, which is only iterated."
        )
    if len(dataset) == 0:
        raise InputError(f"Expected a dataset with at least one image. Got an empty {type(dataset).__name__}.")


def _placed(purifier: Purifier, device: str | torch.device | None) -> Purifier:
    """The purifier on `device`; a copy where it has to move, for the user's own stays where it is."""
    if device is None:
        return purifier
    device = as_device(device)
    here = next(purifier.parameters(), None)
    if here is None or here.device == device:
        return purifier
    return copy.deepcopy(purifier).to(device)


def _check_worker(device: torch.device) -> None:
    """CUDA in a forked worker fails deep inside torch, with a message that names neither way out."""
    if device.type == "cuda" and get_worker_info() is not None and torch.cuda._is_in_bad_fork():
        raise PurifyError(
            "Purifying on a GPU does not work in a forked DataLoader worker. Got a purifier on "
            f"{str(device)!r}. Either give PurifiedDataset a cache= folder, so that workers only read, or "
            'start workers with DataLoader(..., multiprocessing_context="spawn").'
        )
