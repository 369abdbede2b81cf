"""Open a dataset for an attack with a network, and end in poisoned images of 8 bits.

`on_all_images` makes an attack that poisons a whole dataset out of what it does to the opened images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from purifyloader.core import noise
from purifyloader.core.devices import as_device, exact_arithmetic
from purifyloader.datasets.arrays import as_arrays
from purifyloader.errors import InputError
from purifyloader.poisons.attacks.pgd import round_within
from purifyloader.poisons.attacks.presets import AttackSettings, Settings, choose, with_signature
from purifyloader.poisons.poisoned import Bound, Poisoned

__all__ = ["Clean", "Made", "add", "add_to", "on_all_images", "opened", "poisoned", "rounded"]

_SMALLEST = 8  # pixels along a side, as the networks halve it three times


@dataclass(frozen=True, eq=False)
class Clean:
    """`Clean` holds the images to poison, on the attack's device, and its progress.

    Attributes:
        x: uint8 (N, C, H, W), on the attack's device; y: int64 (N,) in [0, classes), there too.
        classes: one more than the largest label.
        bar: of progress, a step of a network on a batch the unit.
    """

    x: Tensor
    y: Tensor
    classes: int
    bar: Any

    def __len__(self) -> int:
        return len(self.y)

    def images(self, index_B: Tensor) -> Tensor:
        """float32 (B, C, H, W) in [0, 1]."""
        return self.x[index_B].to(torch.float32) / 255

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the indices of all images in order, in batches."""
        yield from torch.arange(len(self.y), device=self.y.device).split(size)


@contextmanager
def opened(dataset: Any, attack: str, seed: int, device: torch.device | str, progress: bool) -> Iterator[Clean]:
    """Check the images of a dataset and open them, in reproducible arithmetic.

    Raises:
        InputError: what `as_arrays` refuses, images too small for a network, labels of one class, a seed that is no
            integer of 64 bits, no such device.
    """
    noise.key_from_seed(seed)  # torch's own generators say less of what is wrong
    images, labels = as_arrays(dataset)
    height, width = images.shape[1:3]
    if min(height, width) < _SMALLEST:
        raise InputError(
            f"{attack} takes images of {_SMALLEST} x {_SMALLEST} or more, as its network does. Got {height} x {width}."
        )
    if len(np.unique(labels)) < 2:
        raise InputError(f"{attack} needs images of two classes or more. Got the label {labels[0]} alone.")
    where = as_device(device)
    x = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))  # a copy, as torch may not write
    with exact_arithmetic(where), tqdm(unit="step", desc=attack, disable=not progress, leave=False) as bar:
        yield Clean(x.to(where), torch.from_numpy(labels.copy()).to(where), int(labels.max()) + 1, bar)


def add(clean: Clean, delta_NCHW: Tensor, bound: Bound) -> NDArray[np.uint8]:
    """Add delta in 8 bits, uint8 (N, H, W, C); see `rounded`."""
    count, channels, height, width = clean.x.shape
    images = np.empty((count, height, width, channels), np.uint8)
    for index_B in clean.batches(1024):
        x = rounded(clean.x[index_B], delta_NCHW[index_B], bound)
        images[index_B.cpu().numpy()] = x.permute(0, 2, 3, 1).cpu().numpy()
    return images


def add_to(clean: Clean, index_K: Tensor, delta_KCHW: Tensor, bound: Bound) -> NDArray[np.uint8]:
    """Return all images, uint8 (N, H, W, C), those of the index moved as by `add`."""
    x_NCHW = clean.x.clone()
    x_NCHW[index_K] = rounded(clean.x[index_K], delta_KCHW, bound)
    return np.ascontiguousarray(x_NCHW.permute(0, 2, 3, 1).cpu().numpy())


def rounded(x_BCHW: Tensor, delta_BCHW: Tensor, bound: Bound) -> Tensor:
    """Add delta to x in 8 bits: uint8, within the bound, and saturating at black and white."""
    return (x_BCHW.to(torch.int16) + round_within(delta_BCHW, bound)).clamp(0, 255).to(torch.uint8)


def poisoned(
    clean: Clean,
    images: NDArray[np.uint8],
    attack: str,
    settings: AttackSettings,
    seed: int,
    preset: str,
    **measured: Any,
) -> Poisoned:
    """Return the images under their own labels, with all that they were made with.

    Args:
        measured: JSON values to record beside the settings.
    """
    record = settings.record(seed, preset, **measured)
    return Poisoned.of(images, clean.y.cpu().numpy(), attack, bound=settings.bound, settings=record)


_ARGUMENTS = """

On the CPU, with one number of threads, the same arguments give the same pixels.

Args:
    dataset: see `as_arrays`.
    seed: of all that is random.
    preset: "cpu", some minutes on a core for a few thousand 32 x 32 images, or "full", as far as may be as in the
        paper.
    device: where to compute.
    progress: show a bar.
    options: values of the settings in place of the preset's.

Raises:
    InputError: a dataset, preset, device or option that does not fit; TrainingError: the network diverges.
"""

Made = tuple[NDArray[np.uint8], dict[str, Any]]
"""Poisoned images, uint8 (N, H, W, C), and JSON values to record beside the settings."""

Core = Callable[[Clean, Settings, int], Made]
"""(clean, settings, seed) -> what an attack on all images makes of them."""


def on_all_images(
    name: str, presets: Mapping[str, Settings], defaults: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
) -> Callable[[Core[Settings]], Callable[..., Poisoned]]:
    """Make an attack `(dataset, seed=0, *, preset, device, progress, **options)` out of its core. A decorator.

    Args:
        name: of the attack.
        presets: named settings, the first the default.
        defaults: completes the options that are given.
    """

    def decorate(core: Core[Settings]) -> Callable[..., Poisoned]:
        def attack(
            dataset: Any,
            seed: int = 0,
            *,
            preset: str = "cpu",
            device: torch.device | str = "cpu",
            progress: bool = False,
            **options: Any,
        ) -> Poisoned:
            settings = choose(presets, preset, defaults(options))
            with opened(dataset, name, seed, device, progress) as clean:
                images, measured = core(clean, settings, seed)
                return poisoned(clean, images, name, settings, seed, preset, **measured)

        attack.__name__, attack.__qualname__, attack.__module__ = core.__name__, core.__qualname__, core.__module__
        attack.__doc__ = (inspect.getdoc(core) or "") + _ARGUMENTS
        return with_signature(presets)(attack)

    return decorate
