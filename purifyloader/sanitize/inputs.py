"""Read a dataset and its clean reference for a sanitation, and refuse those between which nothing can be told."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

from purifyloader.core import limits, sizes
from purifyloader.core.images import quantize
from purifyloader.datasets.named import image_name
from purifyloader.datasets.samples import ImageKey, assemble, label_place
from purifyloader.datasets.sources import check_honest, fetch, of_item, take_over
from purifyloader.errors import InputError
from purifyloader.purified.job import has_random_access
from purifyloader.purified.reading import SampleReader

__all__ = ["LEAST", "Images", "check_labels", "file_name", "read", "unjudged"]

log = logging.getLogger(__name__)

LEAST = 20  # images of a class, below which nothing is said of it

_AT_ONCE = 256


class Images(NamedTuple):
    pixels: NDArray[np.uint8]  # (N, H, W, C)
    labels: NDArray[np.int64]
    hashes: NDArray[np.uint64]  # (N, 2), of images and of the rest of samples
    names: list[str] | None  # of the classes


def read(dataset: Any, size: int | None, image_key: ImageKey, label_key: ImageKey, what: str) -> Images:
    """Read all images as they are in front of the dataset's transform, their labels, and the hashes of both."""
    if not has_random_access(dataset) or not len(dataset):
        raise InputError(f"{what.capitalize()} must be a map-style dataset with images. Got {type(dataset).__name__}.")
    source = take_over(dataset)
    try:
        check_honest(source, None, image_key)
        return _read(SampleReader(source.raw, None, image_key), size, label_key, _class_names(dataset))
    except InputError as error:
        if error.argument is not None:
            raise
        raise InputError(f"{what.capitalize()}: {error}") from None


def _read(reader: SampleReader, size: int | None, label_key: ImageKey, names: list[str] | None) -> Images:
    pixels: list[NDArray[np.uint8]] = []
    labels, hashes = [], []
    for start in range(0, len(reader), _AT_ONCE):
        positions = range(start, min(start + _AT_ONCE, len(reader)))
        for position, one in zip(positions, reader.read(positions), strict=True):
            sample = assemble(one.structure, one.fields, None)
            labels.append(of_item(position, _label, sample, reader.image_key, label_key))
            pixels.append(_pixels(one.pixels, size))
            hashes.append(one.hashes)
            if pixels[-1].shape != pixels[0].shape:
                raise InputError(
                    f"must be given for images of several sizes, to which they are resized. Got {pixels[0].shape[:2]} "
                    f"and, for image {position}, {pixels[-1].shape[:2]}.",
                    argument="size",
                )
    return Images(np.stack(pixels), np.array(labels, np.int64), np.stack(hashes), names)


def _class_names(dataset: Any) -> list[str] | None:
    """Return the names of a dataset's classes, also of a part of one; None where it has none, or several."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, ConcatDataset):
        found = [_class_names(part) for part in dataset.datasets]
        return found[0] if all(names == found[0] for names in found) else None
    names = getattr(dataset, "classes", None)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return None
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]


def file_name(dataset: Any, index: int) -> str | None:
    """Name an image as its owner finds it: a file below a folder, or the key of a sample in a tar."""
    name = image_name(dataset, index)
    if name is None:  # only a sample of a tar knows its own
        name = image_name(dataset, index, fetch(take_over(dataset).raw, [index])[0])
    # names in an encoding of former days are no Unicode, and no file takes them
    return None if name is None else name.encode("utf-8", "backslashreplace").decode()


def _label(sample: Any, image_key: ImageKey, label_key: ImageKey) -> int:
    label = sample[label_place(sample, image_key, label_key)]
    value = label.item() if isinstance(label, torch.Tensor | np.ndarray) and label.ndim == 0 else label
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise InputError(f"A label must be one class number, an integer. Got {value!r:.60} ({type(label).__name__}).")
    if not 0 <= value < limits.NETWORK_WIDTH:
        raise InputError(f"A label must be from 0 to {limits.NETWORK_WIDTH - 1}. Got {value}: number the classes.")
    return int(value)


def _pixels(pixels_CHW: NDArray[Any], size: int | None) -> NDArray[np.uint8]:
    x = torch.from_numpy(pixels_CHW)
    if size is not None:
        x = sizes.resize(x.float() / 255 if x.dtype == torch.uint8 else x, size, size)
    if len(x) == 1:
        x = x.expand(3, -1, -1)
    pixels: NDArray[np.uint8] = np.ascontiguousarray(
        (x if x.dtype == torch.uint8 else quantize(x)).permute(1, 2, 0).numpy()
    )
    return pixels


def check_labels(data: Images, known: Images | None) -> int:
    """Refuse labels of which nothing can be said; returns the number of classes."""
    present = np.unique(data.labels)
    if len(present) < 2:
        raise InputError(f"The dataset must have two classes at least. Got class {present[0]} alone.")
    if known is not None:
        _check_reference(data, known, present.tolist())
    few = unjudged(data, known)
    if len(few) == len(present):
        raise InputError(
            f"A verdict on a class takes {LEAST} images of it{' in the reference too' if known is not None else ''}. "
            f"Got fewer of all {len(present)} classes: give more."
        )
    for label in few:
        counts = [f"{int((images.labels == label).sum())} in {what}" for images, what in _sets(data, known)]
        log.warning("class %d has too few images to tell a back door from chance: %s", label, " and ".join(counts))
    return int(max(images.labels.max() for images, _ in _sets(data, known))) + 1


def _sets(data: Images, known: Images | None) -> list[tuple[Images, str]]:
    return [(data, "the dataset"), *([] if known is None else [(known, "the reference")])]


def _check_reference(data: Images, known: Images, present: list[int]) -> None:
    if data.names is not None and known.names is not None and data.names != known.names:
        pairs = [
            (i, *(names[i] if i < len(names) else None for names in (data.names, known.names)))
            for i in range(max(len(data.names), len(known.names)))
        ]
        number, here, there = next(pair for pair in pairs if pair[1] != pair[2])
        raise InputError(
            f"The reference must have the dataset's classes, in the same order. Got {here!r} and {there!r} for class "
            f"{number}: name the folders alike."
        )
    if missing := sorted(set(present) - set(known.labels.tolist())):
        raise InputError(
            f"The reference must have images of every class of the dataset. Got none of class {missing[0]}: give "
            "clean images of it."
        )
    if twice := len(known.hashes) - len(np.unique(known.hashes[:, 0])):
        raise InputError(
            f"The reference must have each image once, for copies tell nothing. Got {twice} that are there before: "
            "leave them out."
        )
    if len(same := np.intersect1d(data.hashes[:, 0], known.hashes[:, 0])):
        raise InputError(
            f"The reference must be apart from the dataset, whose labels are in doubt. Got {len(same)} images that "
            "are in both: leave them out of one."
        )
    if data.pixels.shape[1:] != known.pixels.shape[1:]:
        raise InputError(
            f"must be given where the reference has images of another size, to which both are resized. Got "
            f"{known.pixels.shape[1:3]} and {data.pixels.shape[1:3]}.",
            argument="size",
        )


def unjudged(data: Images, known: Images | None) -> tuple[int, ...]:
    """List the classes of the dataset with too few images for a verdict."""
    classes = int(max(images.labels.max() for images, _ in _sets(data, known))) + 1
    counts = np.stack([np.bincount(images.labels, minlength=classes) for images, _ in _sets(data, known)])
    return tuple(np.flatnonzero((counts[0] > 0) & (counts.min(axis=0) < LEAST)).tolist())
