"""Make attacks with a network out of their cores: open a dataset, and end in poisoned images of 8 bits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

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
from purifyloader.poisons.attacks.presets import AttackSettings, choose
from purifyloader.poisons.poisoned import Bound, Poisoned

__all__ = ["Clean", "Made", "add", "attack_with_networks", "opened", "rounded"]

_SMALLEST = 8  # pixels along a side, as the networks halve it three times


@dataclass(frozen=True, eq=False)
class Clean:
    """`Clean` holds the images to poison, uint8 (N, C, H, W), and labels (N,), on the attack's device.

    A unit of its progress bar is a step of a network on a batch.
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
        yield from torch.arange(len(self.y), device=self.y.device).split(size)


@contextmanager
def opened(dataset: Any, attack: str, seed: int, device: torch.device | str, progress: bool) -> Iterator[Clean]:
    """Check the images of a dataset, the seed and the device, and open them in reproducible arithmetic."""
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


def add(clean: Clean, delta_KCHW: Tensor, bound: Bound, index_K: Tensor | None = None) -> NDArray[np.uint8]:
    """Return all images, uint8 (N, H, W, C), those of the index (all if None) moved by delta as `rounded` says."""
    x_NCHW = clean.x.clone()
    which = torch.arange(len(clean), device=clean.x.device) if index_K is None else index_K
    for index_B, delta_BCHW in zip(which.split(1024), delta_KCHW.split(1024), strict=True):
        x_NCHW[index_B] = rounded(clean.x[index_B], delta_BCHW, bound)
    return np.ascontiguousarray(x_NCHW.permute(0, 2, 3, 1).cpu().numpy())


def rounded(x_BCHW: Tensor, delta_BCHW: Tensor, bound: Bound) -> Tensor:
    """Add delta to x in 8 bits: uint8, within the bound, and saturating at black and white."""
    return (x_BCHW.to(torch.int16) + round_within(delta_BCHW, bound)).clamp(0, 255).to(torch.uint8)


class Made(NamedTuple):
    """`Made` is what an attack makes of a dataset.

    Attributes:
        images: uint8 (N, H, W, C), all of them.
        measured: JSON values to record beside the settings.
        known: fields of `Poisoned` that say more than that all images are poisoned within the settings' bound.
    """

    images: NDArray[np.uint8]
    measured: Mapping[str, Any]
    known: Mapping[str, Any] = {}


def attack_with_networks(
    name: str, presets: Mapping[str, AttackSettings], defaults: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
) -> Callable[[Callable[..., Made]], Callable[..., Poisoned]]:
    """Make an attack `(dataset, seed=0, *, preset, device, progress, **options)` out of its core. A decorator.

    Args:
        name: of the attack.
        presets: named settings, the first the default; its values stand in the signature, in the place of **options.
        defaults: completes the options that are given.

    Returns:
        What takes a core (clean, settings, seed, *, own options) -> `Made`. The attack has the core's own options too.
    """

    def decorate(core: Callable[..., Made]) -> Callable[..., Poisoned]:
        taken = inspect.signature(core, follow_wrapped=False).parameters.values()
        own = [each for each in taken if each.kind is each.KEYWORD_ONLY]

        def attack(
            dataset: Any,
            seed: int = 0,
            *,
            preset: str = "cpu",
            device: torch.device | str = "cpu",
            progress: bool = False,
            **options: Any,
        ) -> Poisoned:
            given = {each.name: options.pop(each.name) for each in own if each.name in options}
            settings = choose(presets, preset, defaults(options))
            with opened(dataset, name, seed, device, progress) as clean:
                images, measured, known = core(clean, settings, seed, **given)
                record = {**settings.record(seed, preset), **measured}
                labels = clean.y.cpu().numpy()
                return Poisoned.of(images, labels, name, **{"bound": settings.bound, **known}, settings=record)

        signature = inspect.signature(attack)
        dataset, seed, *run, _ = signature.parameters.values()
        first = next(iter(presets.values()))
        options = [
            inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=getattr(first, each.name), annotation=each.type
            )
            for each in fields(first)
        ]
        parameters = [dataset, seed, *own, *run, *options]
        names = [each.name for each in parameters] + ["options"]
        arguments = "".join(f"\n    {each}: {text}" for each, text in _ARGUMENTS.items() if each in names)
        functools.update_wrapper(attack, core, ("__name__", "__qualname__", "__module__"))
        attack.__doc__ = _DOC.format(core=inspect.getdoc(core), arguments=arguments)
        attack.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        attack.presets = presets  # type: ignore[attr-defined]
        return attack

    return decorate


_ARGUMENTS = {
    "dataset": "see `as_arrays`.",
    "seed": "of all that is random.",
    "target": "the test image: a `Target`, uint8 (H, W, C) or a file.",
    "target_class": "the class of the poisons, what the victim is to call the target, or the trigger is to stand for;\n"
    "        of a `Target`, None takes its label.",
    "count": "how many images to poison, or `share` of the set; without them as said above, or all of the class if it\n"
    "        has fewer.",
    "networks": "the attacker's, on `device`, images (B, 3, H, W) in [0, 1] to logits, the last nn.Linear reading the\n"
    "        features; they stay as they are. None trains some on the dataset.",
    "model": "the defender's denoiser: name, folder or denoiser.",
    "preset": '"cpu", some minutes on a core for a few thousand 32 x 32 images, or "full", as far as may be as in the\n'
    "        paper.",
    "device": "where to compute.",
    "progress": "show a bar.",
    "options": "values of the settings in place of the preset's.",
}
_DOC = """{core}

On the CPU, with one number of threads, the same arguments give the same pixels.

Args:{arguments}

Raises:
    InputError: an argument that does not fit; ConfigError: both count and share; TrainingError: a network diverges.
"""
