"""Which images a denoiser is judged on: never those it was trained on; and the same images poisoned."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from purifyloader import sizes
from purifyloader.datasets import TORCHVISION, describe, open_dataset
from purifyloader.errors import CheckpointError, InputError
from purifyloader.images import quantize, to_engine
from purifyloader.poisons import ar_perturbation, lsp_perturbation
from purifyloader.pretrained.checkpoint import read_config
from purifyloader.pretrained.registry import find
from purifyloader.samples import fields, get_image
from purifyloader.train.data import choose

__all__ = ["ATTACKS", "Loaded", "Overlap", "choose_images", "load", "overlap", "poisoned_images", "training_details"]

ATTACKS: dict[str, Callable[..., Tensor]] = {"lsp": lsp_perturbation, "ar": ar_perturbation}
_CLASSES = 10  # patterns of an attack: enough to judge a denoiser, and cheap for a thousand classes too


def training_details(model: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint says of its training; {} where it says nothing."""
    try:
        details = read_config(find(model)).get("details")
    except CheckpointError:  # a model from elsewhere, which `load` has taken all the same
        return {}
    return details if isinstance(details, dict) else {}


class Overlap(NamedTuple):
    """Indices of the data that a model was trained on, and whether that is known or only may be so."""

    indices: frozenset[int]
    certain: bool


def overlap(details: Mapping[str, Any], spec: str, length: int) -> Overlap:
    """Compare the training data that a card names with `spec`: the same number of images, under the same name.

    The same number alone may be chance, or the same data under a name of the user's.
    """
    indices, data = details.get("indices"), details.get("data")
    trained_on_another_split = spec in TORCHVISION  # here these are the test split, in training never
    if trained_on_another_split or not isinstance(indices, list) or details.get("data_length") != length:
        return Overlap(frozenset(), False)
    return Overlap(frozenset(i for i in indices if isinstance(i, int)), data == describe(spec))


def choose_images(
    length: int, count: int | None, seed: int, indices: Sequence[int] | None, trained: Overlap, default: int
) -> list[int]:
    """Indices, rising where they are chosen; none of those certainly trained on.

    Args:
        count: that many at random; None for `default`, or all where there are fewer.
        indices: these and no others.

    Raises:
        InputError: indices twice, out of range or trained on, or fewer images than asked for.
    """
    if indices is not None:
        if len(set(indices)) != len(indices):
            raise InputError("--indices must name each image once. Got repeated ones.")
        if bad := [i for i in indices if not 0 <= i < length]:
            raise InputError(f"--indices must lie in [0, {length}), the images of --data. Got {bad[0]}.")
        if trained.certain and (seen := sorted(set(indices) & trained.indices)):
            raise InputError(
                f"Expected images that the model was not trained on. Got {len(seen)} that it was, the first at index "
                f"{seen[0]}: leave them out of --indices, or give other images as --data."
            )
        return list(indices)
    allowed = [i for i in range(length) if not (trained.certain and i in trained.indices)]
    if not allowed:
        raise InputError(
            f"Expected images that the model was not trained on. Got {length} in --data, and it was trained on all of "
            "them: give other images."
        )
    if count is not None and not 1 <= count <= len(allowed):
        raise InputError(f"--count must be from 1 to {len(allowed)}, the images not trained on. Got {count}.")
    chosen = choose(len(allowed), min(default, len(allowed)) if count is None else count, seed)
    return [allowed[i] for i in chosen]


class Loaded(NamedTuple):
    """Images uint8 (N, C, H, W) and class labels int64 (N,), None where the dataset has none."""

    images: Tensor
    labels: Tensor | None


def load(
    dataset: Dataset[Any],
    indices: Sequence[int],
    channels: int,
    size: int | None = None,
    seen: Callable[[int], object] | None = None,
    what: str = "--data",
) -> Loaded:
    """The samples at `indices`; grey images are repeated for a denoiser of colour.

    Args:
        size: bring the shorter side of each image to this, antialiased, and crop the centre.

    Raises:
        InputError: an image that cannot be read, of another size than the one before, or of colour for a
            denoiser of grey.
    """
    if size is not None:
        sizes.check_resize(size, size)
    rows: list[Tensor] = []
    labels: list[int | None] = []
    for index in indices:
        sample = dataset[index]
        image = to_engine(get_image(sample), channels)[0]
        row = quantize(image if size is None else sizes.resize(image, size, size))
        if rows and row.shape != rows[0].shape:
            raise InputError(
                f"Images of {what} must be of one size. Got {tuple(row.shape)} at index {index} after "
                f"{tuple(rows[0].shape)}: give --size, to which they are resized and cropped."
            )
        rows.append(row)
        labels.append(_label(fields(sample)))
        if seen is not None:
            seen(1)
    known = [label for label in labels if label is not None]
    return Loaded(torch.stack(rows), torch.tensor(known) if len(known) == len(rows) else None)


def _label(target: Any) -> int | None:
    if isinstance(target, Mapping):
        target = target.get("cls", target.get("label"))
    if isinstance(target, Tensor | np.ndarray) and target.ndim == 0:
        target = target.item()
    is_class = isinstance(target, int | np.integer) and not isinstance(target, bool) and int(target) >= 0
    return int(target) if is_class else None


def poisoned_images(
    spec: str, clean: Loaded, indices: Sequence[int], length: int, root: str | Path, size: int | None, seed: int
) -> tuple[str, Tensor]:
    """A name for people, and the images poisoned, uint8 like the clean ones.

    Args:
        spec: "lsp" or "ar", a .npy file, or what `open_dataset` takes. The file has an array for each image
            of the data: perturbations, floating point in [-1, 1] image units, or poisoned images, uint8; (N,
            H, W, C) or (N, C, H, W).
        clean: the images at `indices` of a dataset of `length`.
        size: as in `load`; a file has images of that size already.
        seed: of the attacks.

    Raises:
        InputError: nothing of the kind, or not as many images, of the same size, as the data.
    """
    channels, height, width = clean.images.shape[1:]
    if spec in ATTACKS:
        if channels != 3:
            raise InputError(f"{spec} poisons colour images. Got {channels} channel: give --poisoned none.")
        # an attack's classes are only patterns, so images without a class get one by position
        labels = torch.tensor(list(indices)) if clean.labels is None else clean.labels
        try:
            delta = ATTACKS[spec](labels % _CLASSES, (height, width), positions=list(indices), seed=seed)
        except InputError as error:
            raise InputError(f"{spec} does not take these images: {error} Or give --poisoned none.") from None
        return spec, quantize(clean.images.float() / 255 + delta.permute(0, 3, 1, 2))
    if spec.endswith(".npy"):
        return Path(spec).name, _from_array(Path(spec), clean.images, indices, length)
    dataset = open_dataset(spec, root, train=False)
    if (got := len(dataset)) != length:  # type: ignore[arg-type]
        raise InputError(f"--poisoned must have the {length} images of --data in the same order. Got {got} in {spec}.")
    images = load(dataset, indices, channels, size, what="--poisoned").images
    if images.shape != clean.images.shape:
        raise InputError(
            f"--poisoned must have the images of --data, {tuple(clean.images.shape[1:])} (C, H, W). Got "
            f"{tuple(images.shape[1:])} in {spec}."
        )
    return (Path(spec).name if Path(spec).exists() else spec), images


def _from_array(path: Path, clean: Tensor, indices: Sequence[int], length: int) -> Tensor:
    channels, height, width = clean.shape[1:]
    expected = (
        f"{path} must be an array of perturbations (floating point in [-1, 1]) or poisoned images (uint8) of shape "
        f"{(length, height, width, channels)} or {(length, channels, height, width)}"
    )
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{expected}. Got: {error}.") from None
    last = array.shape == (length, height, width, channels)
    if not last and array.shape != (length, channels, height, width):
        raise InputError(f"{expected}. Got the shape {array.shape}.")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise InputError(f"{expected}. Got {array.dtype}.")
    rows = torch.from_numpy(np.ascontiguousarray(array[list(indices)]))
    rows = rows.permute(0, 3, 1, 2).contiguous() if last else rows
    if rows.dtype == torch.uint8:
        return rows
    if not bool(torch.isfinite(rows).all()) or float(rows.abs().max()) > 1:
        raise InputError(f"{expected}. Got values up to {float(rows.abs().max()):g}: divide those of 0-255 by 255.")
    return quantize(clean.float() / 255 + rows.float())
