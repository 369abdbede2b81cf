"""Read the clean images that a command line names, none that a model was trained on, and poison them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from purifyloader import pretrained
from purifyloader.datasets.arrays import Part
from purifyloader.datasets.named import TORCHVISION, describe, open_dataset
from purifyloader.datasets.select import Loaded, choose_images, load, read_indices
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.energy import EnergyNetwork
from purifyloader.errors import ConfigError, InputError
from purifyloader.poisons.part import poison_part
from purifyloader.poisons.poisoned import Poisoned
from purifyloader.poisons.reading import check
from purifyloader.poisons.spec import CLEAN, is_spec, parse
from purifyloader.pretrained.learned import Learned, learned_images

__all__ = ["Images", "Models", "add_poisons", "load_models", "read_images", "tell_learned"]

_USUAL = ("lsp", "ar")  # attacks where the command line names none


class Models(NamedTuple):
    """What --energy and --model name; the images are those that neither was trained on."""

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
    """
    Raises:
        ConfigError: neither is given, or they take images of other channels.
        CheckpointError: no such model, or one of another kind.
    """
    if energy is None and model is None:
        raise ConfigError(
            "Expected what purifies: --energy with an energy model, for Langevin steps, or --model with a denoiser, "
            "for diffusion. Got neither."
        )
    network = None if energy is None else pretrained.load(energy, kind="energy").to(device)
    denoiser = None if model is None else pretrained.load(model).to(device)
    if network is not None and denoiser is not None and network.config.image_channels != denoiser.image_channels:
        raise ConfigError(
            f"--energy and --model must take the same images. Got {network.config.image_channels} and "
            f"{denoiser.image_channels} channels."
        )
    return Models(network, denoiser, tuple(spec for spec in (energy, model) if spec is not None))


def add_poisons(parser: argparse.ArgumentParser, of: str) -> None:
    """Add the option that says which attacks are tried on the images of the option `of`."""
    parser.add_argument(
        "--poisoned",
        nargs="+",
        metavar="WHAT",
        help=f"attacks, poison files, or the images of {of} poisoned, given like it; none for none. Options of an "
        "attack or a file follow a colon: lsp:norm=2, or FILE.npy:units=bytes (default: lsp ar, for colour images)",
    )


class Images(NamedTuple):
    """Clean images, their poisoned versions by name, and what results say of them."""

    clean: Tensor
    poisoned: dict[str, Tensor]
    data: dict[str, Any]


class _Source(NamedTuple):
    """A dataset by its name on the command line, and how its images are read."""

    dataset: Dataset[Any]
    spec: str
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
    models: Models,
    spec: str,
    options: argparse.Namespace,
    *,
    root: str,
    default: int,
    what: str = "--data",
    progress: bool = False,
) -> Images:
    """Read the clean images that `options` choose, none that a model was trained on, and poison them.

    Args:
        spec: of the dataset, as `open_dataset` takes it.
        options: count, indices, choose_seed, size, poisoned, seed.
        default: images where --count does not say how many.
        what: the option that names the images.

    Raises:
        InputError: nothing of the kind, images trained on and no others, or an attack that does not fit them.
    """
    source = _Source(open_dataset(spec, root, train=False), spec, what, models.channels, options.size, progress)
    if not len(source):
        raise InputError(f"Expected images in {what}. Got an empty dataset.")
    learned = learned_images(models.specs, source.dataset, spec, models.channels, progress)
    kept, left_out = choose_images(
        source.dataset,
        options.count,
        options.choose_seed,
        default,
        indices=None if options.indices is None else read_indices(options.indices),
        learned=learned.finder(options.size),
    )
    clean = source.load(kept)
    tell_learned(learned, kept, left_out, len(source), what)
    poisoned = _poisoned(options, source, clean, kept, root)
    data = {
        # never a path: results travel
        "description": describe(spec) + (" (test split)" if spec in TORCHVISION else ""),
        "length": len(source),
        "indices": kept,
        "size": options.size,
        "trained_on_left_out": left_out,
    }
    return Images(clean.images, poisoned, data)


def tell_learned(learned: Learned, chosen: Sequence[int], left_out: int, length: int, what: str) -> None:
    """Say on standard error which images were left out because a model was trained on them, and what is not certain."""

    def tell(text: str) -> None:
        print(f"purifyloader: {text}", file=sys.stderr)

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
    """Images uint8 (N, H, W, C) and labels; images without a class get one by their place in the dataset."""
    labels = np.asarray(indices) % 10 if loaded.labels is None else loaded.labels.numpy()
    return loaded.images.permute(0, 2, 3, 1).contiguous().numpy(), labels.astype(np.int64)


def _poisoned(
    options: argparse.Namespace, source: _Source, clean: Loaded, indices: Sequence[int], root: str
) -> dict[str, Tensor]:
    specs = options.poisoned
    if specs is None:
        specs = list(_USUAL) if clean.images.shape[1] == 3 and min(clean.images.shape[-2:]) >= 4 else []
    elif CLEAN in specs:
        if len(specs) > 1:
            raise InputError(f"--poisoned none stands alone. Got {' '.join(specs)}.")
        specs = []
    images, labels = _arrays(clean, indices)
    part = Part(images, labels, np.asarray(indices, np.int64), max(int(labels.max()) + 1, 10), len(source))
    poisoned: dict[str, Tensor] = {}
    for spec in specs:
        name, found = _poison(spec, options, source, part, root)
        if name in poisoned:
            raise InputError(f"--poisoned must name each set once. Got {name} twice.")
        poisoned[name] = torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()
    return poisoned


def _poison(
    spec: str, options: argparse.Namespace, source: _Source, part: Part, root: str
) -> tuple[str, NDArray[np.uint8]]:
    """A name for people, and the images of a part as an attack, a file or a dataset has them."""
    if is_spec(spec):
        attack = parse(spec)
        if attack.file is None and part.images.shape[3] != 3:
            raise InputError(f"{spec} poisons colour images. Got 1 channel: give --poisoned none.")
        run = {"device": getattr(options, "device", "cpu"), "progress": source.progress}
        found = poison_part(attack, part, source.arrays, options.seed, **run)
        return (attack.label if attack.file is None else attack.file.name), found.images
    dataset = open_dataset(spec, root, train=False)
    if (got := len(dataset)) != part.length:  # type: ignore[arg-type]
        raise InputError(
            f"--poisoned must have the {part.length} images of {source.what} in the same order. Got {got} in {spec}."
        )
    chosen = part.positions.tolist()
    images, _ = _arrays(load(dataset, chosen, source.channels, source.size, what="--poisoned"), chosen)
    if images.shape != part.images.shape:
        raise InputError(
            f"--poisoned must have the images of {source.what}, {part.images.shape[1:]} (H, W, C). Got "
            f"{images.shape[1:]} in {spec}."
        )
    check(Poisoned.of(images, part.labels, spec), part)  # other images, or another order
    return (Path(spec).name if Path(spec).exists() else spec), images
