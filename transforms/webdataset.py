"""Purify and compensate in a WebDataset pipeline, for those who never have a map-style dataset."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from purifyloader.core import noise
from purifyloader.core.checks import as_integer
from purifyloader.core.devices import check_worker, device_of
from purifyloader.core.images import ImageKind, from_engine, to_engine
from purifyloader.datasets.samples import get_image, with_image
from purifyloader.errors import InputError, PurifyError
from purifyloader.purified.job import COMPENSATE, PURIFY, check_purifier
from purifyloader.purified.keyed import KeyedCorruption, check_compensate, compensate_each
from purifyloader.purifiers import Purifier
from purifyloader.transforms.compensation import Compensate

__all__ = ["compensated", "purified"]

Sample = Mapping[str, Any]

_WORKERS = 4096  # places for the counts of passes


def purified(
    purifier: Purifier, seed: int = 0, batch_size: int = 256, image_key: str | None = None, epoch: int = 0
) -> Callable[[Iterable[Sample]], Iterator[Sample]]:
    """Make a stage that purifies the image of each sample, and leaves everything else as it is.

    Put it right after `decode`: before any augmentation, and before `to_tuple` and `batched`. The samples
    come out in the order they came, each image of the type it was. What an image becomes is a function of
    (seed, epoch, base name of the shard's file, key) and of the image itself: not of its position, the
    worker, `batch_size`, or the folder that the shard lies in. The stage pickles.

    Args:
        purifier: see `purifyloader.recipes`. On a GPU only without workers, or with spawned ones (else `PurifyError`).
        seed, epoch: of all noise.
        batch_size: samples read, held and purified at a time. Large images want fewer: a worker holds
            them all as float32.
        image_key: the image's field. By default the one that holds a PIL image, or an array (H, W, C) or
            tensor (C, H, W).

    As it runs it raises `InputError` for a sample without `__key__` or without an image that the purifier takes, which
    it names.

    >>> import torch
    >>> from purifyloader import recipes
    >>> from purifyloader.transforms.webdataset import purified
    >>> samples = [{"__key__": str(i), "__url__": "a.tar", "png": torch.rand(3, 32, 32)} for i in range(2)]
    >>> len([*purified(recipes.jpeg(quality=10))(samples)])  # WebDataset(...).decode("pil").compose(purified(...))
    2
    """
    return _Purified(purifier, seed, batch_size, image_key, epoch)


def compensated(
    compensate: KeyedCorruption | None = None, seed: int = 0, batch_size: int = 64, image_key: str | None = None
) -> _Compensated:
    """Make a stage that compensates the image of each sample (ECLIPSE, Eq. 13): see `Compensate`.

        wds.WebDataset(urls).decode("pil").compose(purified(purifier)).map_dict(png=crop_and_flip).compose(compensated())

    Put it after crop and flip, and before what normalises and before `to_tuple`. Every pass draws afresh, from (seed,
    epoch, base name of the shard's file, key): each worker counts its passes as epochs, also where it ends with each of
    them, and `set_epoch` sets the epoch. `compensate` is `Compensate()`, or anything with its `apply`; the rest is as
    in `purified`.

    >>> import torch
    >>> from purifyloader.transforms.webdataset import compensated
    >>> samples = [{"__key__": str(i), "__url__": "a.tar", "png": torch.rand(3, 32, 32)} for i in range(2)]
    >>> len([*compensated(seed=0)(samples)])
    2
    """
    return _Compensated(Compensate() if compensate is None else compensate, seed, batch_size, image_key)


class _Stage:
    """Changes the image of each sample, some samples at a time."""

    channels: int | None = None  # of the images that `_work` takes

    def __init__(self, seed: int, batch_size: int, image_key: str | None) -> None:
        if image_key is not None and not isinstance(image_key, str):
            raise InputError(f"image_key must be the name of a field, such as 'png', or None. Got {image_key!r}.")
        noise.image_keys(seed, 0, 0)  # refuses what is no 64-bit integer
        self.seed, self.image_key = seed, image_key
        self.batch_size = as_integer("batch_size", batch_size, 1)

    def _work(self, images: list[Tensor], keys_B: Tensor, batch: Sequence[Sample]) -> list[Tensor]:
        raise NotImplementedError

    def _samples(self, samples: Iterable[Sample], epoch: int, purpose: int) -> Iterator[Sample]:
        source = iter(samples)
        while batch := list(islice(source, self.batch_size)):
            fields, images = [], []
            for sample in batch:
                name = _name(sample)
                try:
                    field = _image_field(sample) if self.image_key is None else self.image_key
                    images.append(self._converted(get_image(sample, field)))
                except InputError as error:
                    raise InputError(f"{name}: {error}") from None
                fields.append(field)
            indices = torch.tensor([_index(sample) for sample in batch], device="cpu")
            keys_B = noise.fold_in(noise.image_keys(self.seed, epoch, indices), purpose)
            results = self._work([x for x, _ in images], keys_B, batch)
            for sample, field, (_, kind), x in zip(batch, fields, images, results, strict=True):
                yield with_image(sample, from_engine(x, kind), field)

    def _converted(self, image: Any) -> tuple[Tensor, ImageKind]:
        return to_engine(image, self.channels)


class _Purified(_Stage):
    def __init__(self, purifier: Purifier, seed: int, batch_size: int, image_key: str | None, epoch: int) -> None:
        check_purifier(purifier)
        super().__init__(seed, batch_size, image_key)
        noise.image_keys(seed, epoch, 0)
        self.purifier, self.epoch = purifier, epoch
        self.channels = purifier.image_channels

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        check_worker(self._device())
        return self._samples(samples, self.epoch, PURIFY)

    def _device(self) -> torch.device:
        return device_of(self.purifier) or torch.device("cpu")

    def _converted(self, image: Any) -> tuple[Tensor, ImageKind]:
        x, kind = super()._converted(image)
        channels, height, width = x.shape
        if kind.alpha is not None and self.purifier.output_shape((channels, height, width)) != x.shape:
            raise InputError(
                "A purifier that changes the size of images takes them without alpha. Got "
                f"{kind.channels} channels: decode them as RGB."
            )
        return x, kind

    def _work(self, images: list[Tensor], keys_B: Tensor, batch: Sequence[Sample]) -> list[Tensor]:
        images = [x.to(self._device()) for x in images]
        try:
            return self.purifier.purify_images(images, keys_B)
        except PurifyError:
            # one by one, only to name the sample
            for image, key, sample in zip(images, keys_B, batch, strict=True):
                try:
                    self.purifier.purify_images([image], key[None])
                except PurifyError as error:
                    raise type(error)(f"{_name(sample)}: {error}") from None
            raise


class _Compensated(_Stage):
    def __init__(self, compensate: KeyedCorruption, seed: int, batch_size: int, image_key: str | None) -> None:
        check_compensate(compensate)
        super().__init__(seed, batch_size, image_key)
        self.compensate = compensate
        # Shared memory, so that workers which end with each pass know how many there were before them: the epoch, and
        # the passes of each worker since it was set. Each has a place of its own, for two might write at once.
        self._shared = torch.zeros(1 + _WORKERS, dtype=torch.int64, device="cpu").share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is read next. Reaches running workers."""
        self._shared.zero_()
        self._shared[0] = as_integer("epoch", epoch, 0)

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        info = get_worker_info()
        place = 1 + (0 if info is None else info.id % _WORKERS)
        epoch = int(self._shared[0] + self._shared[place])
        self._shared[place] += 1
        return self._samples(samples, epoch, COMPENSATE)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shared = self._shared.clone() if not self._shared.is_shared() else self._shared
        self._shared.share_memory_()

    def _work(self, images: list[Tensor], keys_B: Tensor, batch: Sequence[Sample]) -> list[Tensor]:
        return compensate_each(self.compensate, images, keys_B)


def _shard(sample: Sample) -> str:
    """Return the base name of the shard's file, without what a signed address adds; empty where there is none."""
    url = sample.get("__url__") or ""
    if "://" in url:
        url = re.split(r"[?#]", url)[0]
    return re.split(r"[/\\]", url)[-1]


def _name(sample: Any) -> str:
    """Name the sample for errors; refuses what is no single sample of a pipeline."""
    if not isinstance(sample, Mapping) or not isinstance(sample.get("__key__"), str):
        got = f"a dict with the keys {list(sample)}" if isinstance(sample, Mapping) else f"a {type(sample).__name__}"
        raise InputError(
            "This stage takes single samples of a WebDataset pipeline, dicts with a __key__ that decides their noise. "
            f"Got {got}. Put the stage right after decode, before to_tuple and batched."
        )
    return f"Sample {sample['__key__']!r}" + (f" of {_shard(sample)}" if _shard(sample) else "")


def _index(sample: Sample) -> int:
    """Hash what names the sample to 64 bits, and no pixel: a certificate needs noise that data do not choose."""
    name = f"{_shard(sample)}\0{sample['__key__']}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def _is_image(value: Any) -> bool:
    # 2 dimensions are as likely a feature map or a segmentation
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 3)


def _image_field(sample: Sample) -> str:
    names = [key for key, value in sample.items() if _is_image(value)]
    if not names:
        raise InputError(
            f'There is no image under the keys {list(sample)}: decode it first, .decode("pil"), or name its field as '
            "image_key=."
        )
    if len(names) > 1:
        raise InputError(f"There are several images, {', '.join(names)}. Name the right one as image_key=.")
    return names[0]
