"""The sparse clean set: which images, from where, as one uint8 tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from purifyloader import noise
from purifyloader.errors import InputError
from purifyloader.images import quantize, to_engine
from purifyloader.samples import get_image

__all__ = ["choose", "load_images", "read_indices"]


def choose(length: int, count: int, seed: int) -> list[int]:
    """`count` of `length` indices at random, rising: the first of a shuffle that `seed` alone decides."""
    if not 1 <= count <= length:
        raise InputError(f"Expected to choose from 1 to {length} images. Got {count}.")
    order = noise.uniform(noise.image_keys(seed, 0, 0), (length,))[0].argsort()
    return sorted(order[:count].tolist())


def read_indices(path: str | Path) -> list[int]:
    """Indices from a JSON list."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a JSON list of indices. Got: {error}.") from None
    if not isinstance(values, list) or not values or any(type(v) is not int or v < 0 for v in values):
        raise InputError(f"{path} must be a JSON list of one or more indices from 0. Got something else.")
    return values


def load_images(dataset: Dataset[Any], indices: Sequence[int], *, progress: bool = False) -> Tensor:
    """The images at `indices` as one uint8 tensor (N, C, H, W).

    Raises:
        InputError: an index out of range, an image the engine does not take, or different sizes.
    """
    length = len(dataset)  # type: ignore[arg-type]
    if bad := [i for i in indices if not 0 <= i < length]:
        raise InputError(f"The dataset has {length} images. Got the index {bad[0]}.")
    rows: list[Tensor] = []
    for index in tqdm(indices, desc="reading", unit="img", disable=not progress, leave=False):
        row = quantize(to_engine(get_image(dataset[index]))[0])
        if rows and row.shape != rows[0].shape:
            raise InputError(
                f"Training takes images of one size. Got {tuple(row.shape)} at index {index} after "
                f"{tuple(rows[0].shape)}: resize them first."
            )
        rows.append(row)
    return torch.stack(rows)
