"""Apply a defence to arrays in memory: purify once, and compensate in every epoch of a training."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from purifyloader.core import noise
from purifyloader.datasets.arrays import ArrayDataset
from purifyloader.purified.dataset import PurifiedDataset
from purifyloader.purified.job import COMPENSATE
from purifyloader.purifiers import Purifier
from purifyloader.transforms import Compensate
from purifyloader.victims.training import BatchTransform

__all__ = ["Purified", "compensation", "per_epoch_transform", "purify_array"]

_AT_ONCE = 256  # images
_AFRESH = 0x61667273  # "afrs": purpose of the keys drawn here


class Purified(NamedTuple):
    images: NDArray[np.uint8]
    seconds: float


def purify_array(
    images: NDArray[np.uint8], labels: NDArray[np.int64], purifier: Purifier, *, progress: str | None = None
) -> Purified:
    """Purify uint8 images (N, H, W, C) through a `PurifiedDataset`; `progress` is the text of a bar, None for none."""
    dataset = PurifiedDataset(ArrayDataset(images, labels), purifier, seed=0)
    rows: list[Any] = []
    start = time.perf_counter()
    with tqdm(total=len(images), desc=progress, unit="img", disable=progress is None, leave=False) as bar:
        for first in range(0, len(images), _AT_ONCE):
            batch = dataset.__getitems__(range(first, min(first + _AT_ONCE, len(images))))
            rows += [image for image, _ in batch]
            bar.update(len(batch))
    return Purified(np.stack(rows), time.perf_counter() - start)


def per_epoch_transform(purifier: Purifier, seed: int = 0) -> BatchTransform:
    """Make a purifier a batch transform of `train_victim`, drawn anew from (seed, epoch, index)."""

    def transform(x_BCHW: Tensor, index_B: Tensor, epoch: int) -> Tensor:
        keys = noise.fold_in(noise.image_keys(seed, epoch, index_B), _AFRESH)
        with torch.no_grad():
            return torch.as_tensor(purifier(x_BCHW, keys.to(x_BCHW.device)))

    return transform


def compensation(compensate: Compensate, seed: int = 0) -> BatchTransform:
    """Make `compensate` a batch transform, drawn from (seed, epoch, index) as `PurifiedDataset` draws it."""

    def transform(x_BCHW: Tensor, index_B: Tensor, epoch: int) -> Tensor:
        keys = noise.fold_in(noise.image_keys(seed, epoch, index_B), COMPENSATE)
        return torch.as_tensor(compensate.apply(x_BCHW, keys))

    return transform
