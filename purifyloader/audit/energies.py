"""Compute the energy of every image of a dataset, with its file name and class."""

from __future__ import annotations

import hashlib
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets as tv
from tqdm.auto import tqdm

from purifyloader.core import sizes
from purifyloader.core.images import quantize, to_engine
from purifyloader.datasets.named import ImageFiles, TarDataset
from purifyloader.datasets.samples import fields, get_image
from purifyloader.datasets.select import label_of
from purifyloader.energy import EnergyNetwork, image_energies
from purifyloader.errors import InputError, PurifyError

__all__ = ["DatasetEnergies", "dataset_energies", "image_name"]

_HELD = 3 * 2**26  # values: images of many sizes wait for others of theirs, in 800 MB at most


@dataclass(frozen=True)
class DatasetEnergies:
    """Energies of the images of a dataset, in the order of their indices.

    Attributes:
        indices: of the images in the dataset.
        energies: float32 (N,), in the network's own unit: not divided by a temperature.
        labels: the class of each, None where the dataset has none.
        names: the file of each below its folder, or its key in a tar; None where the dataset has no names.
        shapes: number of images of each shape (C, H, W).
        sha256: of the pixels of each as 8 bits.
        learned: number of images that the model was trained on, as far as that was asked.

    Example:
        >>> import torch
        >>> from purifyloader.audit import DatasetEnergies
        >>> len(DatasetEnergies([0, 1], torch.zeros(2), [None] * 2, [None] * 2, {(3, 32, 32): 2}, [b"", b""]))
        2
    """

    indices: list[int]
    energies: Tensor
    labels: list[int | None]
    names: list[str | None]
    shapes: dict[tuple[int, ...], int]
    sha256: list[bytes]
    learned: int = 0

    def __len__(self) -> int:
        return len(self.indices)


def image_name(dataset: Dataset[Any], index: int, sample: Any = None) -> str | None:
    """Name an image as a user finds it: its path below the dataset's folder, or its key in a tar. Never a whole path.

    Args:
        sample: at `index`, for the key of a WebDataset sample; it is not read for this.
    """
    if isinstance(dataset, Subset):
        return image_name(dataset.dataset, dataset.indices[index], sample)
    if isinstance(dataset, ImageFiles):
        return dataset.files[index].relative_to(dataset.folder).as_posix()
    if isinstance(dataset, tv.DatasetFolder):
        return Path(dataset.samples[index][0]).relative_to(dataset.root).as_posix()
    key = sample.get("__key__") if isinstance(sample, Mapping) else None
    if not isinstance(key, str):
        return None
    if isinstance(dataset, TarDataset) and len(dataset.tars) > 1:  # a key is unique in its tar only
        return f"{dataset.tar_of(index).name}:{key}"
    return key


def dataset_energies(
    energy: EnergyNetwork,
    dataset: Dataset[Any],
    indices: Sequence[int] | None = None,
    *,
    size: int | None = None,
    compute_batch: int = 32,
    learned: Callable[[Any], bool] | None = None,
    what: str = "the data",
    progress: bool = False,
) -> DatasetEnergies:
    """Compute the energy of each image of a dataset, as 8 bits: the same number whatever images come with it.

    Every image is read once. Images of one shape go through the network together, in batches of exactly
    `compute_batch`; up to 200 million values of images of rare shapes wait for others of theirs.

    Args:
        energy: on the device to work on.
        dataset: map-style; grey images are repeated for a model of colour.
        indices: which, all if None.
        size: bring the shorter side of each image to this, antialiased, and crop the centre.
        compute_batch: images of every network call, at least 16 on the CPU.
        learned: tells of a sample whether the model was trained on its image, to count these.
        what: name of the images in errors, such as "the data".
        progress: show a bar.

    Raises:
        InputError: no image, one that cannot be read or that the model does not take, or an index out of range.
        PurifyError: an energy that is not finite. The message names the image.

    Example:
        >>> import numpy as np
        >>> from purifyloader.audit import dataset_energies
        >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
        >>> dataset = [(np.full((32, 32, 3), level, np.uint8), 0) for level in (0, 99, 200)]
        >>> energies = dataset_energies(EnergyNetwork(EnergyConfig(channels=8)).eval(), dataset)
        >>> len(energies), energies.shapes
        (3, {(3, 32, 32): 3})
    """
    if not isinstance(energy, EnergyNetwork):
        raise InputError(
            "Expected an energy model, as `purifyloader.pretrained.load(..., kind='energy')` gives. Got "
            f"{type(energy).__name__}."
        )
    length = len(dataset)  # type: ignore[arg-type]
    chosen = list(range(length)) if indices is None else [operator.index(i) for i in indices]
    if not chosen:
        raise InputError(f"Expected images in {what}. Got none: give others.")
    if bad := [i for i in chosen if not 0 <= i < length]:
        raise InputError(f"{what} has {length} images. Got the index {bad[0]}.")
    if size is not None:
        sizes.check_resize(size, size)
    found = torch.full((len(chosen),), torch.nan)
    labels: list[int | None] = []
    names: list[str | None] = []
    digests: list[bytes] = []
    shapes: Counter[tuple[int, ...]] = Counter()
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    held = trained_on = 0
    device = energy.readout.weight.device

    def flush(shape: tuple[int, ...]) -> None:
        nonlocal held
        rows = waiting.pop(shape)
        images = torch.stack([image for _, image in rows]).to(device)
        held -= images.numel()
        places = [chosen[row] for row, _ in rows]
        found[[row for row, _ in rows]] = _energies(energy, images, places, compute_batch, what).cpu()

    with tqdm(total=len(chosen), desc=f"energies of {what}", unit="img", disable=not progress, leave=False) as bar:
        for row, index in enumerate(chosen):
            sample = dataset[index]
            image = _image(sample, index, energy.config.image_channels, size, what)
            labels.append(label_of(fields(sample)))
            names.append(image_name(dataset, index, sample))
            trained_on += learned is not None and learned(sample)
            digests.append(hashlib.sha256(image.numpy().data).digest())
            shape = tuple(image.shape)
            shapes[shape] += 1
            waiting.setdefault(shape, []).append((row, image))
            held += image.numel()
            if len(waiting[shape]) == compute_batch:
                flush(shape)
            while held > _HELD:
                flush(max(waiting, key=lambda shape: len(waiting[shape]) * math.prod(shape)))
            bar.update()
        for shape in list(waiting):
            flush(shape)
    return DatasetEnergies(chosen, found, labels, names, dict(shapes), digests, trained_on)


def _image(sample: Any, index: int, channels: int, size: int | None, what: str) -> Tensor:
    """uint8 (C, H, W), as it is trained on."""
    try:
        image = to_engine(get_image(sample), channels)[0]
        if size is not None:
            image = sizes.resize(image, size, size)
        return quantize(image).contiguous()
    except InputError as error:
        raise InputError(f"{what}, index {index}: {error}") from None


def _energies(energy: EnergyNetwork, images: Tensor, places: Sequence[int], compute_batch: int, what: str) -> Tensor:
    try:
        return image_energies(energy, images.float() / 255, compute_batch)
    except PurifyError:
        for place, image in zip(places, images, strict=True):  # which one it was
            try:
                image_energies(energy, image[None].float() / 255, compute_batch)
            except PurifyError as error:
                raise type(error)(f"{what}, index {place}: {error}") from None
        raise
