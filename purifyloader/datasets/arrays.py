"""Hold datasets as arrays, and read others into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from purifyloader.core.checks import stored_integers
from purifyloader.core.images import as_stored
from purifyloader.errors import InputError


class InMemory(Dataset[Any]):
    """A dataset held as arrays, which `as_arrays` takes as they are."""

    images: NDArray[np.uint8]  # (N, H, W, C)
    labels: NDArray[np.int64]  # (N,)


class ArrayDataset(InMemory):
    """Images uint8 (N, H, W, C) and labels (N,) as a map-style dataset of (array, label)."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[index], int(self.labels[index])


@dataclass(frozen=True, eq=False)
class Part(InMemory):
    """Some images of a dataset, and where they belong in it: an attack poisons them as it would among all."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]  # (N,), of each image in the dataset
    classes: int  # of the dataset, also where no image here is of the last one
    length: int  # of the dataset


def as_arrays(dataset: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images uint8 (N, H, W, C) and labels int64 (N,), the caller's to keep but not to write into.

    They are read from a pair of such, an `InMemory` dataset, or a map-style dataset of (image, label) without a
    transform. Raises `InputError` for images of several sizes or in floating point, or labels that are no integers.
    """
    if isinstance(dataset, InMemory):
        return dataset.images, dataset.labels
    if isinstance(dataset, tuple) and len(dataset) == 2:
        images, labels = np.asarray(dataset[0]), np.asarray(dataset[1])
    else:
        images, labels = _read(dataset)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise InputError(f"Images are uint8 (N, H, W, 1 or 3), at least one. Got {images.dtype} {images.shape}.")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or int(labels.min()) < 0:
        raise InputError(f"Each of {len(images)} images has one label, from 0. Got {labels.dtype} {labels.shape}.")
    return images, stored_integers("The label of an image", labels)


def _read(dataset: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(f"A {type(dataset).__name__} is no map-style dataset. Give one, or (images, labels).")
    images, labels = [], []
    for index in range(len(dataset)):
        sample = dataset[index]
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise InputError(f"Item {index} of the dataset must be (image, label). Got {type(sample).__name__}.")
        x, kind = as_stored(sample[0])
        if kind.dtype.is_floating_point:
            raise InputError(
                f"Item {index} of the dataset is in floating point, and images are stored in 8 bits. Give the dataset "
                "without its transform."
            )
        images.append(np.ascontiguousarray(x.permute(1, 2, 0).numpy()))
        labels.append(sample[1])
    if len({image.shape for image in images}) != 1:
        raise InputError(
            f"Images must be of one size, at least one. Got {sorted({image.shape for image in images})[:5]}. Resize "
            "them first."
        )
    return np.stack(images), np.asarray(labels)
