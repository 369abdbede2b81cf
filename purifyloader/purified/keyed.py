"""Compensate images by keys of (seed, epoch, index), so that the draws depend on neither batch nor worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.images import from_engine, to_engine
from purifyloader.core.notes import NOTES
from purifyloader.errors import InputError
from purifyloader.purified.job import COMPENSATE
from purifyloader.purified.reading import converted
from purifyloader.purifiers.base import by_shape

_REMEDY = (
    "Compensation comes before the Normalize of your Compose, or at its end, and needs an image there: leave "
    "compensate= out and put Compensate() into your transform where the image is still in [0, 1]."
)


class KeyedCorruption(Protocol):
    """A random corruption as a function of images and keys: `purifyloader.transforms.Compensate`, or the like.

    `apply` takes float32 images (B, C, H, W) in [0, 1] and one int64 key an image, and gives such images. A class may
    define `run(x_BCHW, keys_B)` too: the same without a look at the values, for which a GPU would have to be waited.
    """

    def apply(self, image: Any, keys_B: Tensor) -> Any: ...


def check_compensate(compensate: Any) -> None:
    """Refuse what is neither None nor a keyed corruption."""
    if compensate is not None and not callable(getattr(compensate, "apply", None)):
        raise InputError(
            "compensate must be None, `purifyloader.transforms.Compensate(...)`, or an object with apply(image, keys). "
            f"Got {type(compensate).__name__}."
        )


def check_compensated(image: Any) -> None:
    """Refuse an image of the user's transform that compensation does not take."""
    converted([0], [image], None, _REMEDY)


def _keys(seed: int, epoch: int, positions: Sequence[int]) -> Tensor:
    return noise.fold_in(noise.image_keys(seed, epoch, list(positions)), COMPENSATE)


def compensate_batch(
    compensate: KeyedCorruption, x_BCHW: Tensor, seed: int, epoch: int, positions: Sequence[int]
) -> Tensor:
    """Compensate one batch of float32 images (B, C, H, W) in [0, 1]."""
    NOTES.compensated += 1
    return compensate.apply(x_BCHW, _keys(seed, epoch, positions)).clamp(0, 1)


def compensate_images(
    compensate: KeyedCorruption, images: Sequence[Any], seed: int, epoch: int, positions: Sequence[int]
) -> list[Any]:
    """Compensate images of any type and size; each comes back as it came."""
    engine = converted(positions, images, None, _REMEDY, to_engine)
    out = compensate_each(compensate, [x for x, _ in engine], _keys(seed, epoch, positions))
    return [from_engine(x, kind) for x, (_, kind) in zip(out, engine, strict=True)]


def compensate_each(compensate: KeyedCorruption, images: Sequence[Tensor], keys_B: Tensor) -> list[Tensor]:
    """Compensate float32 images (C, H, W) of any sizes in [0, 1].

    Those of one shape go together, because drawing noise for one image at a time costs ten times as much.
    """
    NOTES.compensated += 1
    out = list(images)
    for rows in by_shape(images):
        results = compensate.apply(torch.stack([images[row] for row in rows]), keys_B[rows])
        for row, x in zip(rows, results, strict=True):
            out[row] = x
    return out
