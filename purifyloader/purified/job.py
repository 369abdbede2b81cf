"""Compute purified pixels. A `Job` is (source, purifier, seed, draws)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from purifyloader.core import noise
from purifyloader.core.devices import as_device, check_worker, device_of, exact_arithmetic, kind_of_device
from purifyloader.core.images import quantize, to_bytes
from purifyloader.core.version import __version__
from purifyloader.datasets.samples import ImageKey
from purifyloader.datasets.sources import Source
from purifyloader.errors import ConfigError, InputError
from purifyloader.pretrained.checkpoint import why_not_shipped
from purifyloader.purified.reading import Read, SampleReader
from purifyloader.purifiers import SCHEMA, Condition, Purifier
from purifyloader.purifiers.base import models_in, without_functions

# Children of an image's key: its purification and its compensation share no noise.
PURIFY, COMPENSATE = 0, 1


class Job:
    """Source, purifier, seed and draws: which pixels image i has in draw k, and how to compute them.

    Draw k of image i takes its noise from (seed, k, i); nothing else decides the pixels but the weights,
    the configuration and the image.
    """

    def __init__(self, source: Source, purifier: Purifier, seed: int, draws: int, image_key: ImageKey) -> None:
        self.purifier, self.seed, self.draws = purifier, seed, draws
        self.reader = SampleReader(source.raw, purifier.image_channels, image_key)

    def with_purifier(self, purifier: Purifier) -> Job:
        """Copy the job with another purifier of the same channels, such as one with its plan."""
        job = copy.copy(self)
        job.purifier = purifier
        return job

    @property
    def device(self) -> torch.device:
        return device_of(self.purifier) or torch.device("cpu")

    def config(self) -> dict[str, Any]:
        """Return all that decides the pixels beside the source and the kind of device."""
        return {"purifier": self.purifier.identity(), "schema": SCHEMA, "seed": self.seed, "draws": self.draws}

    def former_config(self) -> dict[str, Any]:
        """Return what `config` was when models were told apart by their weights alone, for a cache of that time.

        `ConfigError` for a purifier with a model of which those weights do not tell the function. They do of the models
        that ship with this library, which never had another.
        """
        purifier = self.purifier.identity()
        for kind, entry in models_in(self.purifier.config()):
            if (why := why_not_shipped(kind, entry)) is not None:
                raise ConfigError(why)
        return {**self.config(), "purifier": without_functions(purifier), "schema": 1}

    def made(self) -> dict[str, str]:
        """Return the kind of device and the versions, on which the last bit of a pixel may depend."""
        return {
            "device": kind_of_device(self.device),
            "purifyloader": __version__,
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "pillow": PIL.__version__,
            "numpy": np.__version__,
        }

    def purify(self, positions: Sequence[int], images: Sequence[Tensor], draw: int) -> list[Tensor]:
        """Purify images as `as_stored` gives them: float32 (C, H, W), on the purifier's device."""
        device = self.device
        check_worker(device)
        keys_B = self._keys(positions, draw).to(device)
        if _alike(images):  # one copy to the device instead of one an image
            return list(self.purifier(_floats(torch.stack(list(images)).to(device)), keys_B))
        return self.purifier.purify_images([_floats(image.to(device)) for image in images], keys_B)

    def to_plan(self, positions: Sequence[int], images: Sequence[Tensor]) -> tuple[Condition, list[Tensor]] | None:
        """Return the first condition without a plan, and such images as `purify` of draw 0 would bring them to it."""
        device = self.device
        with self.purifier.unchanged(), torch.no_grad(), exact_arithmetic(device):
            floats = [_floats(image.to(device)) for image in images]
            return self.purifier.to_plan(floats, self._keys(positions, 0).to(device))

    def _keys(self, positions: Sequence[int], draw: int) -> Tensor:
        return noise.fold_in(noise.image_keys(self.seed, draw, list(positions)), PURIFY)

    def rows(self, positions: Sequence[int], reads: Sequence[Read], draw: int) -> list[NDArray[np.uint8]]:
        """Purify images as a cache holds them, uint8 (H, W, C)."""
        purified = self.purify(positions, [torch.from_numpy(r.pixels) for r in reads], draw)
        kinds = [read.kind for read in reads]
        if _alike(purified) and all(kind.channels == len(x) for kind, x in zip(kinds, purified, strict=True)):
            batch = quantize(torch.stack(purified)).permute(0, 2, 3, 1).contiguous().cpu().numpy()
            return list(batch)
        out = []
        for position, x, kind in zip(positions, purified, kinds, strict=True):
            try:
                out.append(to_bytes(x, kind))
            except InputError as error:
                raise InputError(f"Item {position} of the dataset: {error}") from None
        return out


def _alike(images: Sequence[Tensor]) -> bool:
    return len({(image.shape, image.dtype) for image in images}) == 1


def _floats(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


def has_random_access(dataset: Any) -> bool:
    """Tell whether items are had by their index: also of a dataset that can be iterated, too.

    torch gives every dataset a `__getitem__`, which only raises.
    """
    own = getattr(type(dataset), "__getitem__", None)
    return own is not None and own is not Dataset.__getitem__ and hasattr(dataset, "__len__")


def check_arguments(dataset: Any, purifier: Any) -> None:
    """Refuse what is no purifier, or no map-style dataset with images."""
    check_purifier(purifier)
    if not has_random_access(dataset):
        raise InputError(
            f"A {type(dataset).__name__} is only iterated. Give a map-style dataset, with __getitem__ and __len__."
        )
    if len(dataset) == 0:
        raise InputError(f"The {type(dataset).__name__} is empty. Give a dataset with at least one image.")


def check_purifier(purifier: Any) -> None:
    if not isinstance(purifier, Purifier):
        raise InputError(f"A {type(purifier).__name__} is no purifier. Give one, such as `recipes.eclipse(...)`.")


def placed(purifier: Purifier, device: str | torch.device | None) -> Purifier:
    """Return the purifier on `device`; a copy where it has to move, for the user's own stays where it is."""
    if device is None:
        return purifier
    device = as_device(device)
    if device_of(purifier) in (None, device):
        return purifier
    return copy.deepcopy(purifier).to(device)
