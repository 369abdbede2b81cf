"""Datasets by name, folder or tar; their samples, splits and selections. Needs no torch, for help texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from purifyloader.core.lazy import lazy

if TYPE_CHECKING:
    from purifyloader.datasets.named import ImageFiles, TarDataset, open_dataset, read_image

__all__ = ["ImageFiles", "TarDataset", "open_dataset", "read_image"]

DATA = ("sample", "cifar10", "cifar100", "tiny-imagenet", "imagefolder")  # with two splits, for bench and certify

__getattr__, __dir__ = lazy(__name__, {".named": ("ImageFiles", "TarDataset", "open_dataset", "read_image")})
