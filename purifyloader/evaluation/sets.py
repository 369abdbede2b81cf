"""Which images a denoiser is judged on: never those it was trained on; and the same images poisoned."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from purifyloader.core.images import quantize
from purifyloader.datasets.named import TORCHVISION, open_dataset
from purifyloader.datasets.samples import fields
from purifyloader.datasets.select import choose, load_images
from purifyloader.errors import CheckpointError, InputError, PurifyError
from purifyloader.poisons import ar_perturbation, lsp_perturbation
from purifyloader.pretrained.checkpoint import read_config
from purifyloader.pretrained.registry import find

__all__ = [
    "ATTACKS",
    "Loaded",
    "Overlap",
    "choose_images",
    "label_of",
    "leave_out",
    "load",
    "overlap",
    "poisoned_images",
    "training_details",
]

ATTACKS: dict[str, Callable[..., Tensor]] = {"lsp": lsp_perturbation, "ar": ar_perturbation}
_AT_ONCE = 256  # images held while those trained on are hashed, which may be millions
_CLASSES = 10  # patterns of an attack: enough to judge a denoiser, and cheap for a thousand classes too


def training_details(model: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint, of a denoiser or an energy model, says of its training; {} where it says nothing."""
    try:
        details = read_config(find(model), None).get("details")
    except CheckpointError:  # a model from elsewhere, which `load` has taken all the same
        return {}
    return details if isinstance(details, dict) else {}


class Overlap(NamedTuple):
    """Indices of the data that a model was trained on, and whether that is known or only may be so.

    Where it is known by content, `images` has the SHA-256 of each of these images.
    """

    indices: frozenset[int]
    certain: bool
    images: frozenset[bytes] = frozenset()


def overlap(
    details: Mapping[str, Any], spec: str, dataset: Dataset[Any], channels: int, progress: bool = False
) -> Overlap:
    """Which images of `dataset`, which `spec` names, a model was trained on, as far as its card tells.

    Certain by content: the images at the card's indices, resized as for training, have the card's hash, whatever
    else the dataset holds. Without a hash only a dataset that torchvision names is certain, by name and length. The
    same length alone may be chance, or the same data whose JPEG or resized images come out otherwise here.

    Args:
        details: of the card; see `purifyloader.commands.train_denoiser`.
        channels: of the images trained on.
    """
    length = len(dataset)  # type: ignore[arg-type]
    indices, sha256 = details.get("indices"), details.get("images_sha256")
    if not isinstance(indices, list) or not indices or any(type(i) is not int for i in indices):
        return Overlap(frozenset(), False)
    if sha256 is not None and all(0 <= i < length for i in indices):
        got, images = _hashes(dataset, indices, details.get("resized"), channels, progress)
        if got == sha256:
            return Overlap(frozenset(indices), True, images)
    if details.get("data_length") != length:
        return Overlap(frozenset(), False)
    return Overlap(frozenset(indices), sha256 is None and spec in TORCHVISION and details.get("data") == spec)


def _hashes(
    dataset: Dataset[Any], indices: Sequence[int], size: Any, channels: int, progress: bool
) -> tuple[str | None, frozenset[bytes]]:
    """SHA-256 of the images at `indices` as one tensor, None where training could not have read them, and of each."""
    whole = hashlib.sha256()
    each: set[bytes] = set()
    with tqdm(total=len(indices), desc="looking for images trained on", disable=not progress, leave=False) as bar:
        for start in range(0, len(indices), _AT_ONCE):
            chosen = indices[start : start + _AT_ONCE]
            try:
                images = load_images(dataset, chosen, size=size, channels=channels)
            except PurifyError:
                return None, frozenset()
            whole.update(images.numpy().data)
            each.update(map(_sha256, images))
            bar.update(len(chosen))
    return whole.hexdigest(), frozenset(each)


def _sha256(image_CHW: Tensor) -> bytes:
    return hashlib.sha256(image_CHW.contiguous().numpy().data).digest()


def choose_images(
    length: int, count: int | None, seed: int, indices: Sequence[int] | None, trained: Overlap, default: int
) -> list[int]:
    """Indices, rising where they are chosen; none of those certainly trained on.

    Args:
        count: that many at random; None for `default`, or all where there are fewer.
        indices: these and no others.

    Raises:
        InputError: indices twice, out of range or trained on, or fewer images than asked for.
    """
    if indices is not None:
        if len(set(indices)) != len(indices):
            raise InputError("--indices must name each image once. Got repeated ones.")
        if bad := [i for i in indices if not 0 <= i < length]:
            raise InputError(f"--indices must lie in [0, {length}), the images of --data. Got {bad[0]}.")
        if trained.certain and (seen := sorted(set(indices) & trained.indices)):
            raise InputError(
                f"Expected images that the model was not trained on. Got {len(seen)} that it was, the first at index "
                f"{seen[0]}: leave them out of --indices, or give other images as --data."
            )
        return list(indices)
    allowed = [i for i in range(length) if not (trained.certain and i in trained.indices)]
    if not allowed:
        raise InputError(
            f"Expected images that the model was not trained on. Got {length} in --data, and it was trained on all of "
            "them: give other images."
        )
    if count is not None and not 1 <= count <= len(allowed):
        raise InputError(f"--count must be from 1 to {len(allowed)}, the images not trained on. Got {count}.")
    chosen = choose(len(allowed), min(default, len(allowed)) if count is None else count, seed)
    return [allowed[i] for i in chosen]


class Loaded(NamedTuple):
    """Images uint8 (N, C, H, W) and class labels int64 (N,), None where the dataset has none."""

    images: Tensor
    labels: Tensor | None


class _WithLabels(Dataset[Any]):
    """A dataset that keeps the class labels of the samples it has given."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.labels: list[int | None] = []

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        self.labels.append(label_of(fields(sample)))
        return sample


def load(
    dataset: Dataset[Any],
    indices: Sequence[int],
    channels: int,
    size: int | None = None,
    progress: bool = False,
    what: str = "--data",
) -> Loaded:
    """The samples at `indices`; grey images are repeated for a denoiser of colour.

    Args:
        size: bring the shorter side of each image to this, antialiased, and crop the centre.
        progress: show a bar.

    Raises:
        InputError: an image that cannot be read, of another size than the one before, or of colour for a
            denoiser of grey.
    """
    source = _WithLabels(dataset)
    try:
        images = load_images(source, indices, size=size, channels=channels, progress=progress)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
    known = [label for label in source.labels if label is not None]
    return Loaded(images, torch.tensor(known) if len(known) == len(images) else None)


def leave_out(loaded: Loaded, indices: Sequence[int], trained: Overlap, *, named: bool) -> tuple[Loaded, list[int]]:
    """Without the images whose very pixels the model was trained on, as a copy under another index has them.

    Args:
        indices: of `loaded`.
        named: they were asked for one by one, so that none is left out unasked.

    Raises:
        InputError: one of those `named`, or all.
    """
    if not trained.images:
        return loaded, list(indices)
    keep = [i for i, image in enumerate(loaded.images) if _sha256(image) not in trained.images]
    if len(keep) == len(indices):
        return loaded, list(indices)
    if named or not keep:
        raise InputError(
            f"Expected images that the model was not trained on. Got {len(indices) - len(keep)} that are copies of "
            "such: leave them out of --indices, or give other images as --data."
        )
    labels = None if loaded.labels is None else loaded.labels[keep]
    return Loaded(loaded.images[keep], labels), [indices[i] for i in keep]


def label_of(target: Any) -> int | None:
    """The class that the rest of a sample says, None where it says none."""
    if isinstance(target, Mapping):
        target = target.get("cls", target.get("label"))
    if isinstance(target, Tensor | np.ndarray) and target.ndim == 0:
        target = target.item()
    is_class = isinstance(target, int | np.integer) and not isinstance(target, bool) and int(target) >= 0
    return int(target) if is_class else None


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
