"""Compute the energy of every image of a dataset, with its file name and class, by which poisoned ones are listed."""

from __future__ import annotations

import hashlib
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from purifyloader.core import sizes
from purifyloader.core.images import quantize, to_engine
from purifyloader.datasets.named import image_name
from purifyloader.datasets.samples import fields, get_image
from purifyloader.datasets.select import label_of, read_indices
from purifyloader.energy import EnergyNetwork, image_energies
from purifyloader.errors import InputError, PurifyError
from purifyloader.files.json import parse_json, read_text
from purifyloader.purifiers.networks import check_model

__all__ = ["DatasetEnergies", "dataset_energies", "read_poisoned"]

_HELD = 3 * 2**26  # values: images of many sizes wait for others of theirs, in 800 MB at most


@dataclass(frozen=True)
class DatasetEnergies:
    """Energies of the images of a dataset, in the order of their indices.

    Attributes:
        energies: float32 (N,), in the network's own unit: not divided by a temperature.
        labels: the class of each, None where the dataset has none.
        names: the file of each below its folder, or its key in a tar; None where the dataset has no names.
        shapes: number of images of each shape (C, H, W).
        sha256: of the pixels of each as 8 bits.
        learned: number of images that the model was trained on.

    >>> import torch
    >>> from purifyloader.audit import DatasetEnergies
    >>> DatasetEnergies([0], torch.ones(1), [None], ["a.png"], {(3, 32, 32): 1}, [b""]).values(temperature=0.5)
    array([2.])
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

    def values(self, temperature: float) -> NDArray[np.float64]:
        """Compute U = E / T of each image."""
        return self.energies.double().cpu().numpy() / temperature


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
        indices: of the images, all if None.
        size: bring the shorter side of each image to this, antialiased, and crop the centre.
        compute_batch: images of every network call, at least 16 on the CPU.
        learned: tells of a sample whether the model was trained on its image, to count these.
        what: name of the images in errors, each of which names the image.

    >>> import numpy as np
    >>> from purifyloader.audit import dataset_energies
    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
    >>> dataset = [(np.full((32, 32, 3), level, np.uint8), 0) for level in (0, 99, 200)]
    >>> dataset_energies(EnergyNetwork(EnergyConfig(channels=8)).eval(), dataset).shapes
    {(3, 32, 32): 3}
    """
    check_model("dataset_energies", energy, "energy")
    length = len(dataset)  # type: ignore[arg-type]
    chosen = list(range(length)) if indices is None else [operator.index(i) for i in indices]
    if not chosen:
        raise InputError(f"Expected images in {what}. Got none: give others.")
    if bad := [i for i in chosen if not 0 <= i < length]:
        raise InputError(f"{what} has {length} images. Got the index {bad[0]}.")
    if size is not None:
        sizes.check_resize(size, size)
    energies = torch.full((len(chosen),), torch.nan)
    labels: list[int | None] = []
    names: list[str | None] = []
    digests: list[bytes] = []
    shapes: Counter[tuple[int, ...]] = Counter()
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    held = trained_on = 0

    def flush(shape: tuple[int, ...]) -> None:
        nonlocal held
        rows, parts = zip(*waiting.pop(shape), strict=True)
        images = torch.stack(parts).to(energy.readout.weight.device)
        held -= images.numel()
        energies[list(rows)] = _energies(energy, images, [chosen[row] for row in rows], compute_batch, what).cpu()

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
    return DatasetEnergies(chosen, energies, labels, names, dict(shapes), digests, trained_on)


def _image(sample: Any, index: int, channels: int, size: int | None, what: str) -> Tensor:
    """Return an image as it is trained on, uint8 (C, H, W)."""
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


def read_poisoned(path: Path, dataset: Dataset[Any]) -> list[int]:
    """Read rising indices of `dataset`, from a JSON list of indices or of file names, or from a file name a line."""
    length = len(dataset)  # type: ignore[arg-type]
    if (named := _names(path)) is None:
        indices = read_indices(path)
        if indices[-1] >= length:
            raise InputError(
                f"must be indices of the {length:,} images in the data. Got {indices[-1]}.", argument="poisoned"
            )
        return indices
    if image_name(dataset, 0) is None:
        raise InputError(
            f"may name files where the data is a folder of images. Got {named[0]!r:.80}, and images without "
            "file names: give a JSON list of indices from 0.",
            argument="poisoned",
        )
    index_of = {image_name(dataset, index): index for index in range(length)}
    if missing := [name for name in named if name not in index_of]:
        more = f", and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise InputError(
            f"must name images of the data by their paths below its folder, as the ranked list does, such as "
            f"{next(iter(index_of))!r}. Got {missing[0]!r:.80}, which is none of them{more}.",
            argument="poisoned",
        )
    if twice := [name for name, count in Counter(named).items() if count > 1]:
        raise InputError(
            f"must name each image once. Got {twice[0]!r} more than once: leave it out.", argument="poisoned"
        )
    return sorted(index_of[name] for name in named)


def _names(path: Path) -> list[str] | None:
    """Read file names from a JSON list or one a line; None of anything else, which is for `read_indices` to judge."""
    try:
        text = read_text(path)
    except (OSError, ValueError):
        return None
    try:
        values = parse_json(text)
    except ValueError:
        # what begins like JSON was meant to be JSON
        values = [] if text.lstrip().startswith(("[", "{")) else [line for line in text.splitlines() if line.strip()]
    is_named = isinstance(values, list) and values and all(isinstance(value, str) for value in values)
    return values if is_named else None
