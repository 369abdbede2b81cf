"""Choose images of a dataset, and load them with their labels as tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from purifyloader.core import noise, sizes
from purifyloader.core.checks import as_path, stored_integer
from purifyloader.core.images import quantize, to_engine
from purifyloader.datasets.samples import fields, get_image
from purifyloader.errors import InputError
from purifyloader.files.json import read_json

# Held-out images where nobody says how many: enough for a mean that moves by 0.1 dB, few enough to be quick.
_HELD_OUT = 200


def choose(length: int, count: int, seed: int) -> list[int]:
    """Draw `count` of `length` indices, rising: the first of a shuffle that `seed` alone decides."""
    if not 1 <= count <= length:
        raise InputError(f"The number of images to choose must be from 1 to {length}, all that there are. Got {count}.")
    return sorted(_shuffled(length, seed)[:count])


def _shuffled(length: int, seed: int) -> list[int]:
    return noise.uniform(noise.image_keys(seed, 0, 0), (length,))[0].argsort().tolist()


class Chosen(NamedTuple):
    """Indices of a dataset, and how many images were passed over for them."""

    indices: list[int]
    left_out: int


def choose_images(
    dataset: Dataset[Any],
    count: int | None,
    seed: int,
    default: int,
    *,
    indices: Sequence[int] | None = None,
    learned: Callable[[Any], bool] | None = None,
) -> Chosen:
    """Choose images that no model was trained on: at random, in rising order, or the ones named by `indices`.

    Images are drawn in the order of `choose`, so that without a model to respect these are the images of `choose`:
    `count` of them, or `default`, or all where there are fewer. `learned` tells of a sample whether a model was trained
    on its image; None reads no image. Raises `InputError` with the `argument` "count" or "indices" for indices twice,
    out of range or trained on, or for fewer images than asked for.
    """
    length = len(dataset)  # type: ignore[arg-type]
    if indices is not None:
        _check_indices(dataset, indices, learned)
        return Chosen(list(indices), 0)
    if count is not None and not 1 <= count <= length:
        raise InputError(f"must be from 1 to {length}, the images there are. Got {count}.", argument="count")
    wanted = min(default, length) if count is None else count
    kept: list[int] = []
    left_out = 0
    for index in _shuffled(length, seed):
        if len(kept) == wanted:
            break
        if learned is not None and learned(dataset[index]):
            left_out += 1
        else:
            kept.append(index)
    if not kept:
        raise InputError(f"The model was trained on all of these {length} images. Give others.")
    if count is not None and len(kept) < count:
        raise InputError(f"must be from 1 to {len(kept)}, the images not trained on. Got {count}.", argument="count")
    return Chosen(sorted(kept), left_out)


def _check_indices(dataset: Dataset[Any], indices: Sequence[int], learned: Callable[[Any], bool] | None) -> None:
    length = len(dataset)  # type: ignore[arg-type]
    if len(set(indices)) != len(indices):
        raise InputError("must name each image once. Got repeated ones.", argument="indices")
    if bad := [i for i in indices if not 0 <= i < length]:
        raise InputError(f"must lie in [0, {length}), the images there are. Got {bad[0]}.", argument="indices")
    if learned is not None and (seen := [i for i in indices if learned(dataset[i])]):
        raise InputError(
            f"must name images that the model was not trained on. Got {len(seen)} that it was, the first at index "
            f"{min(seen)}: leave them out, or give other images.",
            argument="indices",
        )


def hold_out(length: int, chosen: Sequence[int], seed: int, count: int | None = None) -> tuple[list[int], list[int]]:
    """Split `length` images into (trained on, held out), rising indices; `chosen` may be trained on.

    `count` images (200 by default) are held out of what was not chosen; where all were chosen, a twentieth of them
    is taken back.
    """
    count = _HELD_OUT if count is None else count
    if count < 0:
        raise InputError(f"The number of images held out for validation must be 0 or more. Got {count}.")
    taken = set(chosen)
    rest = [i for i in _shuffled(length, seed) if i not in taken][:count]
    if rest:
        return sorted(chosen), sorted(rest)
    order = [chosen[i] for i in _shuffled(len(chosen), seed)]
    back = min(count, -(-len(chosen) // 20)) if len(chosen) > 1 else 0
    return sorted(order[back:]), sorted(order[:back])


def read_indices(path: str | Path) -> list[int]:
    """Read indices from a JSON list, or those that a checkpoint's config.json says it was trained on."""
    try:
        values = read_json(as_path(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a JSON list of indices. Got: {error}.") from None
    if isinstance(values, dict) and isinstance(values.get("details"), dict):
        values = values["details"].get("indices", values)
    if not isinstance(values, list) or not values or any(type(v) is not int or v < 0 for v in values):
        raise InputError(f"{path} must be a JSON list of one or more indices from 0. Got {_instead(values)}.")
    if len(set(values)) < len(values):
        first = next(value for value, count in Counter(values).items() if count > 1)
        raise InputError(
            f"{path} must list each index once. Got {first} more than once ({len(values)} entries for "
            f"{len(set(values))} indices): leave the copies out."
        )
    return sorted(values)


def _instead(values: Any) -> str:
    """Describe what a file has that is no list of indices."""
    if not isinstance(values, list):
        return f"{values!r:.80}"
    wrong = [value for value in values if type(value) is not int or value < 0]
    return f"{wrong[0]!r:.80} in it" if wrong else "an empty list"


def load_images(
    dataset: Dataset[Any],
    indices: Sequence[int],
    *,
    size: int | None = None,
    channels: int | None = None,
    progress: bool = False,
    seen: Callable[[Any], object] = lambda sample: None,
) -> Tensor:
    """Load the images at `indices` as one uint8 tensor (N, C, H, W).

    `size` brings the shorter side of each image to this, antialiased, and crops the centre. `channels=3` makes three of
    a grey image's one; an image with other channels is an error. `seen` is called with each sample. Raises `InputError`
    for an index out of range, an image the engine does not take, or different sizes.
    """
    length = len(dataset)  # type: ignore[arg-type]
    if bad := [i for i in indices if not 0 <= i < length]:
        raise InputError(f"The dataset has {length} images. Got the index {bad[0]}.")
    if size is not None:
        sizes.check_resize(size, size)
    rows: list[Tensor] = []
    for index in tqdm(indices, desc="reading", unit="img", disable=not progress, leave=False):
        sample = dataset[index]
        seen(sample)
        image = to_engine(get_image(sample))[0]
        if size is not None:
            image = sizes.resize(image, size, size)
        row = quantize(image)
        if channels == 3 and len(row) == 1:
            row = row.expand(3, -1, -1)
        if rows and row.shape[1:] != rows[0].shape[1:]:
            raise InputError(
                f"must be given for images of several sizes, to which they are resized and cropped. Got "
                f"{tuple(row.shape)} at index {index} after {tuple(rows[0].shape)}.",
                argument="size",
            )
        rows.append(row)
    if {len(row) for row in rows} == {1, 3}:
        rows = [row.expand(3, -1, -1) for row in rows]
    if not rows:
        raise InputError("There are no images. Give one or more.")
    if {len(row) for row in rows} != {len(rows[0])}:
        raise InputError(
            f"The images have {' and '.join(map(str, sorted({len(r) for r in rows})))} channels. Bring them to one "
            "kind, such as RGB, first."
        )
    images = torch.stack(rows)
    if channels is not None and images.shape[1] != channels:
        raise InputError(f"The images must have {channels} channels. Got {images.shape[1]}.")
    return images


class Loaded(NamedTuple):
    """Images uint8 (N, C, H, W) and class labels int64 (N,), None where the dataset has none."""

    images: Tensor
    labels: Tensor | None


def load(
    dataset: Dataset[Any],
    indices: Sequence[int],
    channels: int,
    size: int | None = None,
    progress: bool = False,
    what: str = "the dataset",
) -> Loaded:
    """Load images as `load_images` does, with their labels; `what` names them in errors."""
    labels: list[int | None] = []
    try:
        images = load_images(
            dataset,
            indices,
            size=size,
            channels=channels,
            progress=progress,
            seen=lambda sample: labels.append(label_of(fields(sample))),
        )
    except InputError as error:
        if error.argument is not None:
            raise
        raise InputError(f"{what}: {error}") from None
    return Loaded(images, None if None in labels else torch.tensor(labels, device="cpu"))


def label_of(target: Any) -> int | None:
    """Return the class that the fields of a sample beside its image name, None where they name none."""
    if isinstance(target, Mapping):
        target = target.get("cls", target.get("label"))
    if isinstance(target, Tensor | np.ndarray) and target.ndim == 0:
        target = target.item()
    is_class = isinstance(target, int | np.integer) and not isinstance(target, bool) and int(target) >= 0
    return stored_integer("The class of an image", target) if is_class else None
