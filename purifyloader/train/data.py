"""The sparse clean set: which images, from where, as one uint8 tensor."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from tqdm.auto import tqdm

from purifyloader import noise
from purifyloader.errors import InputError
from purifyloader.images import quantize, to_engine
from purifyloader.samples import get_image

__all__ = ["ImageFiles", "choose", "load_images", "open_dataset", "read_indices"]

TORCHVISION = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp")


class ImageFiles(Dataset[Image.Image]):
    """Every image file below a folder, in the order of their paths, as RGB."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.files:
            raise InputError(f"Expected image files ({', '.join(SUFFIXES)}) below {folder}. Got none.")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        try:
            return Image.open(self.files[index]).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{self.files[index]} is no readable image ({error}). Remove or replace it.") from None


def open_dataset(spec: str, root: str | Path = "data", train: bool = True) -> Dataset[Any]:
    """A map-style dataset from what a user can say on a command line.

    Args:
        spec: "cifar10" or "cifar100" (found in `root`), a folder of images, or `package.module:function`,
            a function without arguments that returns a map-style dataset.
        root: folder of a torchvision dataset.
        train: its training or its test split.

    Raises:
        InputError: nothing by that name, or what it names is no map-style dataset.
    """
    if spec in TORCHVISION:
        try:
            return TORCHVISION[spec](str(root), train=train, download=False)
        except RuntimeError as error:
            raise InputError(
                f"Expected {spec} in {root}. Got: {error}. Download it once with "
                f"torchvision.datasets.{TORCHVISION[spec].__name__}({str(root)!r}, download=True)."
            ) from None
    if Path(spec).is_dir():
        return ImageFiles(Path(spec))
    module, _, function = spec.partition(":")
    if not module or not function:
        raise InputError(
            f"Expected {', '.join(TORCHVISION)}, a folder of images, or package.module:function. Got {spec!r}."
        )
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"Expected {function!r} of a module {module!r} that Python finds here or installed. Got: {error}."
        ) from None
    dataset = make()
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(f"{spec!r} must return a map-style dataset. Got {type(dataset).__name__}.")
    return dataset


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
