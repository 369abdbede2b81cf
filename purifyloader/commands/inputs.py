"""The clean images and their poisoned versions that a command line names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from purifyloader import pretrained
from purifyloader.core.images import quantize
from purifyloader.datasets.named import TORCHVISION, describe, open_dataset
from purifyloader.datasets.select import Loaded, choose_images, load, read_indices
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.energy import EnergyNetwork
from purifyloader.errors import ConfigError, InputError
from purifyloader.evaluation.sets import ATTACKS, poisoned_images
from purifyloader.pretrained.learned import Learned, learned_images

__all__ = ["UNITS", "Images", "Models", "add_poisons", "load_models", "poisoned_by_file", "read_images", "tell_learned"]

UNITS = {"unit": 1.0, "minus-one-to-one": 0.5, "bytes": 1 / 255}
"""What a value of a perturbation is in image units, for each kind of image that it may be made for."""


_FAR_PX = 50  # two images of CIFAR-10 are some 90 apart, and the strongest of published poisons moves by 16


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
    """The options that say which attacks are tried on the images of `of`."""
    parser.add_argument(
        "--poisoned",
        nargs="+",
        metavar="WHAT",
        help=f"lsp, ar, a .npy file of perturbations or poisoned images or of one trigger for all, or the images of "
        f"{of} poisoned, given like it; none for none (default: lsp ar, for colour images)",
    )
    parser.add_argument(
        "--npy-units",
        choices=sorted(UNITS),
        help="what the perturbations of a .npy file are added to: images in [0, 1] (unit), in [-1, 1], or 0-255 "
        "(default: unit; a single trigger needs it said)",
    )


class Images(NamedTuple):
    """Clean images, their poisoned versions by name, and what results say of them."""

    clean: Tensor
    poisoned: dict[str, Tensor]
    data: dict[str, Any]


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
    """The clean images that `options` choose, none that a model was trained on, and their poisoned versions.

    Args:
        spec: of the dataset, as `open_dataset` takes it.
        options: count, indices, choose_seed, size, poisoned, npy_units, seed.
        default: images where --count does not say how many.
        what: the option that names the images.

    Raises:
        InputError: nothing of the kind, images trained on and no others, or an attack that does not fit them.
    """
    dataset = open_dataset(spec, root, train=False)
    length = len(dataset)  # type: ignore[arg-type]
    if not length:
        raise InputError(f"Expected images in {what}. Got an empty dataset.")
    learned = learned_images(models.specs, dataset, spec, models.channels, progress)
    kept, left_out = choose_images(
        dataset,
        options.count,
        options.choose_seed,
        default,
        indices=None if options.indices is None else read_indices(options.indices),
        learned=learned.finder(options.size),
    )
    clean = load(dataset, kept, models.channels, options.size, progress, what)
    tell_learned(learned, kept, left_out, length, what)
    poisoned = _poisoned(options, clean, kept, length, root, what)
    said = {
        # never a path: results travel
        "description": describe(spec) + (" (test split)" if spec in TORCHVISION else ""),
        "length": length,
        "indices": kept,
        "size": options.size,
        "trained_on_left_out": left_out,
    }
    return Images(clean.images, poisoned, said)


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


def _poisoned(
    options: argparse.Namespace,
    clean: Loaded,
    indices: Sequence[int],
    length: int,
    root: str,
    what: str,
) -> dict[str, Tensor]:
    specs = options.poisoned
    if specs is None:
        specs = list(ATTACKS) if clean.images.shape[1] == 3 and min(clean.images.shape[-2:]) >= 4 else []
    elif "none" in specs:
        if len(specs) > 1:
            raise InputError(f"--poisoned none stands alone. Got {' '.join(specs)}.")
        specs = []
    if getattr(options, "npy_units", None) is not None and not any(spec.endswith(".npy") for spec in specs):
        raise InputError(
            f"--npy-units is about a .npy file in --poisoned. Got --npy-units {options.npy_units} without."
        )
    poisoned: dict[str, Tensor] = {}
    for spec in specs:
        try:
            if spec.endswith(".npy"):
                name, images = (
                    Path(spec).name,
                    poisoned_by_file(spec, clean, indices, length, getattr(options, "npy_units", None)),
                )
            else:
                name, images = poisoned_images(spec, clean, indices, length, root, options.size, options.seed)
        except InputError as error:
            raise InputError(str(error).replace("--data", what)) from None
        _check_pairs(clean.images, images, name, what)
        if name in poisoned:
            raise InputError(f"--poisoned must name each set once. Got {name} twice.")
        poisoned[name] = images
    return poisoned


def _check_pairs(clean: Tensor, poisoned: Tensor, name: str, what: str) -> None:
    """Other images than the clean ones look like a poison of a size that nobody would overlook."""
    px = float((clean.float() - poisoned.float()).square().mean(dim=(1, 2, 3)).sqrt().median())
    if px > _FAR_PX:
        raise InputError(
            f"--poisoned must have the very images of {what}, poisoned, in the same order. Got {name}, which differs "
            f"from them by {px:.0f} px (RMS): these are other images, or another order."
        )


def poisoned_by_file(
    path: str | Path, clean: Loaded, indices: Sequence[int], length: int, units: str | None = None
) -> Tensor:
    """The images with what a .npy file holds, uint8 (N, C, H, W).

    Besides what `evaluation.sets.poisoned_images` takes, a perturbation may be one for all images, (1, C, H, W), (1,
    H, W, C) or without the 1, as Narcissus publishes its trigger, and made for images of another range: that trigger
    is for images in [-1, 1], where a value is twice what it is in [0, 1].

    Args:
        clean: the images at `indices` of a dataset of `length`.
        units: a key of `UNITS`; None for "unit", but not of a single trigger, whose range cannot be told from it.

    Raises:
        InputError: no such array, values that the units do not have, or units that must be said.
    """
    path = Path(path)
    channels, height, width = clean.images.shape[1:]
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"Expected an array of perturbations or poisoned images in {path}. Got: {error}.") from None
    array = array[None] if array.ndim == 3 else array
    single = array.ndim == 4 and len(array) == 1 != length
    if not single and units in (None, "unit"):
        return poisoned_images(str(path), clean, indices, length, "", None, 0)[1]
    count = 1 if single else length
    last = array.shape == (count, height, width, channels)
    if not last and array.shape != (count, channels, height, width):
        raise InputError(
            f"{path} must have the shape {(count, channels, height, width)} or {(count, height, width, channels)}. Got "
            f"{array.shape}."
        )
    if array.dtype.kind not in "fi":
        raise InputError(
            f"{path} must hold perturbations, floating point or signed integers. Got {array.dtype}: leave --npy-units "
            "out for poisoned images, one for each of the data."
        )
    rows = np.ascontiguousarray(array if single else array[list(indices)]).astype(np.float32)
    largest = float(np.abs(rows).max())  # NaN where there is one
    if units is None:
        raise InputError(
            f"{path} holds one perturbation for all images, and its values, up to {largest:.4g}, do not tell for which "
            f"range. Got no --npy-units: give minus-one-to-one (as Narcissus; {127.5 * largest:.3g} px), unit "
            f"({255 * largest:.3g} px) or bytes ({largest:.3g} px)."
        )
    if not largest * UNITS[units] <= 1:
        raise InputError(
            f"Perturbations must be finite and at most 255 px. Got values up to {largest:.4g} in {path}, with "
            f"--npy-units {units}: give another one of {', '.join(UNITS)}."
        )
    delta = torch.from_numpy(rows)
    delta = delta.permute(0, 3, 1, 2) if last else delta
    return quantize(clean.images.float() / 255 + UNITS[units] * delta)
