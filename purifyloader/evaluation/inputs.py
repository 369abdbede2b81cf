"""Read clean images, none that a model was trained on, and poison them; load the models that will purify them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from purifyloader import pretrained
from purifyloader.datasets.arrays import Part
from purifyloader.datasets.named import ImageFiles, describe, open_dataset
from purifyloader.datasets.select import Loaded, choose_images, load, read_indices
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.energy import EnergyNetwork
from purifyloader.errors import ConfigError, InputError
from purifyloader.poisons.part import poison_part
from purifyloader.poisons.poisoned import Poisoned
from purifyloader.poisons.reading import check
from purifyloader.poisons.spec import CLEAN, is_spec, parse
from purifyloader.pretrained.learned import Learned, learned_images

__all__ = ["Choice", "Images", "Models", "load_models", "read_images", "tell", "tell_learned"]

_USUAL = ("lsp", "ar")  # attacks where none are named


class Models(NamedTuple):
    """An energy model, a denoiser or both, and the names that they were loaded by."""

    energy: EnergyNetwork | None
    denoiser: Denoiser | None
    specs: tuple[str, ...]

    @property
    def channels(self) -> int:
        if self.denoiser is not None:
            return self.denoiser.image_channels
        assert self.energy is not None
        return self.energy.config.image_channels


def load_models(energy: str | None, model: str | None, device: torch.device) -> Models:
    """Load an energy model and a denoiser by their names, or one of them."""
    if energy is None and model is None:
        raise ConfigError(
            "must name an energy model, for Langevin steps, where no denoiser is given, for diffusion. Got neither.",
            argument="energy",
        )
    network = None if energy is None else pretrained.load(energy, kind="energy").to(device)
    denoiser = None if model is None else pretrained.load(model).to(device)
    if network is not None and denoiser is not None and network.config.image_channels != denoiser.image_channels:
        raise ConfigError(
            f"must take the same images as the denoiser. Got {network.config.image_channels} and "
            f"{denoiser.image_channels} channels.",
            argument="energy",
        )
    return Models(network, denoiser, tuple(spec for spec in (energy, model) if spec is not None))


@dataclass(frozen=True)
class Choice:
    """Options that choose images of a dataset and attacks on them; the help of the commands explains them."""

    count: int | None  # None for a default of the caller's
    indices: Path | None
    choose_seed: int
    size: int | None
    poisoned: Sequence[str] | None  # None for the usual attacks on colour images
    seed: int
    device: str | None


class Images(NamedTuple):
    """Clean images, their poisoned versions by name, and a description of them for results."""

    clean: Tensor
    poisoned: dict[str, Tensor]
    data: dict[str, Any]


class _Source(NamedTuple):
    """A dataset, and how its images are read."""

    dataset: Dataset[Any]
    what: str
    channels: int
    size: int | None
    progress: bool

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def load(self, indices: Sequence[int]) -> Loaded:
        return load(self.dataset, indices, self.channels, self.size, self.progress, self.what)

    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        return _arrays(self.load(range(len(self))), range(len(self)))


def read_images(
    models: Models, spec: str, choice: Choice, *, root: str, default: int, what: str, progress: bool = False
) -> Images:
    """Read the images of a dataset that `choice` names, none that a model was trained on, and poison them.

    Args:
        spec: the dataset, as `open_dataset` takes it.
        default: number of images where neither a count nor indices are given.
        what: name of the images in errors.
    """
    source = _Source(open_dataset(spec, root, train=False), what, models.channels, choice.size, progress)
    if not len(source):
        raise InputError(f"Expected images in {what}. Got an empty dataset.")
    learned = learned_images(models.specs, source.dataset, spec, models.channels, progress)
    kept, left_out = choose_images(
        source.dataset,
        choice.count,
        choice.choose_seed,
        default,
        indices=None if choice.indices is None else read_indices(choice.indices),
        learned=learned.finder(choice.size),
    )
    clean = source.load(kept)
    tell_learned(learned, kept, left_out, len(source), what)
    poisoned = _poisoned(choice, source, clean, kept, root)
    data = {"description": describe(spec, "test"), "length": len(source), "indices": kept, "size": choice.size}
    seen = {"trained_on_left_out": left_out, "trained_on_known": learned.is_known}
    return Images(clean.images, poisoned, {**data, **seen})


def tell(text: str) -> None:
    """Write a line for people to standard error."""
    print(f"purifyloader: {text}", file=sys.stderr)


def tell_learned(learned: Learned, chosen: Sequence[int], left_out: int, length: int, what: str) -> None:
    """Tell on standard error how many images were left out, as a model was trained on them, and what is uncertain."""
    if left_out:
        tell(f"left out {left_out:,} of the {length:,} images in {what}: the model was trained on them.")
    if seen := learned.doubtful.intersection(chosen):
        tell(
            f"warning: {what} has as many images as the model's training data, but cannot be told to be the same (an "
            "older card has no hashes, and a JPEG or a resized image may be read otherwise elsewhere). If it is, "
            f"{len(seen)} of the {len(chosen)} images chosen were trained on, and the results are too good. Give other "
            "images."
        )
    elif learned.silent:
        tell(
            f"warning: {' and '.join(learned.silent)} does not say which images it was trained on. If some of the "
            f"{len(chosen)} images chosen from {what} are among them, the results are too good."
        )


def _arrays(loaded: Loaded, indices: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images uint8 (N, H, W, C) and labels; images without a class get one by their place in the dataset."""
    labels = np.asarray(indices) % 10 if loaded.labels is None else loaded.labels.numpy()
    return loaded.images.permute(0, 2, 3, 1).contiguous().numpy(), labels.astype(np.int64)


def _poisoned(choice: Choice, source: _Source, clean: Loaded, indices: Sequence[int], root: str) -> dict[str, Tensor]:
    specs = choice.poisoned
    if specs is None:
        specs = list(_USUAL) if clean.images.shape[1] == 3 and min(clean.images.shape[-2:]) >= 4 else []
    elif CLEAN in specs:
        if len(specs) > 1:
            raise InputError(f"none stands alone. Got {' '.join(specs)}.", argument="poisoned")
        specs = []
    images, labels = _arrays(clean, indices)
    part = Part(images, labels, np.asarray(indices, np.int64), max(int(labels.max()) + 1, 10), len(source))
    poisoned: dict[str, Tensor] = {}
    for spec in specs:
        name, made = _poison(spec, choice, source, part, root)
        if name in poisoned:
            raise InputError(f"must name each set once. Got {name} twice.", argument="poisoned")
        poisoned[name] = torch.from_numpy(made).permute(0, 3, 1, 2).contiguous()
    return poisoned


def _check_names(source: _Source, poisoned: Dataset[Any], spec: str) -> None:
    """Refuse a folder whose files have the names of the clean ones, but for some: images would be taken for others."""
    if not isinstance(source.dataset, ImageFiles) or not isinstance(poisoned, ImageFiles):
        return
    clean, got = source.dataset.names(), poisoned.names()
    missing, more = (sorted({*one} - {*other}) for one, other in ((clean, got), (got, clean)))
    if clean == got or 2 * len(missing) > len(clean):  # named otherwise: told by their number and their pixels
        return
    words = [
        f"{len(names):,} {what}, the first {names[0]}"
        for names, what in ((missing, "missing"), (more, "more"))
        if names
    ]
    raise InputError(
        f"must have the images of {source.what}, by the same names. Got {spec} with "
        f"{' and '.join(words) or 'some twice'}: fetch it again, or leave the others out of {source.what}.",
        argument="poisoned",
    )


def _poison(spec: str, choice: Choice, source: _Source, part: Part, root: str) -> tuple[str, NDArray[np.uint8]]:
    """Return a name for people, and the images of a part as an attack, a file or a dataset has them."""
    if is_spec(spec):
        attack = parse(spec)
        if attack.file is None and part.images.shape[3] != 3:
            raise InputError(f"must be none for images of 1 channel. Got {spec}.", argument="poisoned")
        run = {"device": choice.device, "progress": source.progress}
        made = poison_part(attack, part, source.arrays, choice.seed, **run)
        return (attack.label if attack.file is None else attack.file.name), made.images
    dataset = open_dataset(spec, root, train=False)
    _check_names(source, dataset, spec)
    if (got := len(dataset)) != part.length:  # type: ignore[arg-type]
        raise InputError(
            f"must have the {part.length} images of {source.what} in the same order. Got {got} in {spec}.",
            argument="poisoned",
        )
    chosen = part.positions.tolist()
    images, _ = _arrays(load(dataset, chosen, source.channels, source.size, what="the poisoned images"), chosen)
    if images.shape != part.images.shape:
        raise InputError(
            f"must have the images of {source.what}, {part.images.shape[1:]} (H, W, C). Got {images.shape[1:]} in "
            f"{spec}.",
            argument="poisoned",
        )
    check(Poisoned.of(images, part.labels, spec), part)  # other images, or another order
    return (Path(spec).name if Path(spec).exists() else spec), images
