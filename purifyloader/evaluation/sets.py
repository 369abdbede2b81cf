"""Poison the images that a denoiser is judged on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from purifyloader.core.images import quantize
from purifyloader.datasets.named import open_dataset
from purifyloader.datasets.select import Loaded, load
from purifyloader.errors import InputError
from purifyloader.poisons import ar_perturbation, lsp_perturbation

__all__ = ["ATTACKS", "poisoned_images"]

ATTACKS: dict[str, Callable[..., Tensor]] = {"lsp": lsp_perturbation, "ar": ar_perturbation}
_CLASSES = 10  # patterns of an attack: enough to judge a denoiser, and cheap for a thousand classes too


def poisoned_images(
    spec: str, clean: Loaded, indices: Sequence[int], length: int, root: str | Path, size: int | None, seed: int
) -> tuple[str, Tensor]:
    """A name for people, and the images poisoned, uint8 like the clean ones.

    Args:
        spec: "lsp" or "ar", a .npy file, or what `open_dataset` takes. The file has an array for each image
            of the data: perturbations, floating point in [-1, 1] image units, or poisoned images, uint8; (N,
            H, W, C) or (N, C, H, W).
        clean: the images at `indices` of a dataset of `length`.
        size: as in `load`; a file has images of that size already.
        seed: of the attacks.

    Raises:
        InputError: nothing of the kind, or not as many images, of the same size, as the data.
    """
    channels, height, width = clean.images.shape[1:]
    if spec in ATTACKS:
        if channels != 3:
            raise InputError(f"{spec} poisons colour images. Got {channels} channel: give --poisoned none.")
        # an attack's classes are only patterns, so images without a class get one by position
        labels = torch.tensor(list(indices)) if clean.labels is None else clean.labels
        try:
            delta = ATTACKS[spec](labels % _CLASSES, (height, width), positions=list(indices), seed=seed)
        except InputError as error:
            raise InputError(f"{spec} does not take these images: {error} Or give --poisoned none.") from None
        return spec, quantize(clean.images.float() / 255 + delta.permute(0, 3, 1, 2))
    if spec.endswith(".npy"):
        return Path(spec).name, _from_array(Path(spec), clean.images, indices, length)
    dataset = open_dataset(spec, root, train=False)
    if (got := len(dataset)) != length:  # type: ignore[arg-type]
        raise InputError(f"--poisoned must have the {length} images of --data in the same order. Got {got} in {spec}.")
    images = load(dataset, indices, channels, size, what="--poisoned").images
    if images.shape != clean.images.shape:
        raise InputError(
            f"--poisoned must have the images of --data, {tuple(clean.images.shape[1:])} (C, H, W). Got "
            f"{tuple(images.shape[1:])} in {spec}."
        )
    return (Path(spec).name if Path(spec).exists() else spec), images


def _from_array(path: Path, clean: Tensor, indices: Sequence[int], length: int) -> Tensor:
    channels, height, width = clean.shape[1:]
    expected = (
        f"{path} must be an array of perturbations (floating point in [-1, 1]) or poisoned images (uint8) of shape "
        f"{(length, height, width, channels)} or {(length, channels, height, width)}"
    )
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{expected}. Got: {error}.") from None
    last = array.shape == (length, height, width, channels)
    if not last and array.shape != (length, channels, height, width):
        raise InputError(f"{expected}. Got the shape {array.shape}.")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise InputError(f"{expected}. Got {array.dtype}.")
    rows = torch.from_numpy(np.ascontiguousarray(array[list(indices)]))
    rows = rows.permute(0, 3, 1, 2).contiguous() if last else rows
    if rows.dtype == torch.uint8:
        return rows
    if not bool(torch.isfinite(rows).all()) or float(rows.abs().max()) > 1:
        raise InputError(f"{expected}. Got values up to {float(rows.abs().max()):g}: divide those of 0-255 by 255.")
    return quantize(clean.float() / 255 + rows.float())
