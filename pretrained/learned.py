"""Tell which images a model learned from: by the hash of every image's pixels, its own and those of its ancestors.

Hashes and not indices or names, because a set may have been copied, cut, renamed or put in another order. A
checkpoint's config.json has them as `image_hashes`.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from purifyloader.core import sizes
from purifyloader.core.images import quantize, to_engine
from purifyloader.datasets.named import TORCHVISION
from purifyloader.datasets.samples import get_image
from purifyloader.datasets.select import load_images
from purifyloader.errors import CheckpointError, InputError, PurifyError
from purifyloader.files.hashes import hashes_of_text, image_hashes
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.checkpoint import load, read_config
from purifyloader.pretrained.kinds import ModelKind, kind_of_format
from purifyloader.pretrained.registry import find

__all__ = ["Learned", "check_disjoint", "learned_from", "learned_images", "weights_of"]

_AT_ONCE = 256  # images held while those of an older card are hashed, which may be millions

Hashes = NDArray[np.uint64]


def weights_of(model: str | os.PathLike[str], kind: str) -> str:
    """Return the hash of the weights of a "denoiser" or an "energy" model, by name or folder."""
    return weights_sha256(load(model, kind))


_WAYS = {"start_from": "started from", "distil_from": "was distilled from"}  # in which a model learned from another


def _lineage(model: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and details of a model, of those that its training started and was distilled from, and so on.

    `InputError` where such a model is not found; `CheckpointError` where the files of one are not of one model, so that
    its details may be of other weights.
    """
    waiting: list[str] = [os.fspath(model)]
    visited: set[str] = set()
    while waiting:
        name = waiting.pop(0)
        if name in visited:
            continue
        folder = find(name)
        config = read_config(folder, None)
        kind = kind_of_format(config["format"])
        assert kind is not None
        if not visited:  # the others are compared before they come here
            weights_of(folder, kind.name)
        visited.add(name)
        details = config.get("details")
        if not isinstance(details, dict):
            details = {}
        yield name, details
        train = details.get("train")
        for field, way in _WAYS.items():
            if isinstance(train, dict) and train.get(field) is not None:
                waiting.append(_before(name, train[field], kind, way))


def _before(name: str, entry: Any, kind: ModelKind, way: str) -> str:
    """Return the name of the model of an entry, once its weights are the ones; `InputError` where they are not."""
    before, weights = (entry.get("name"), entry.get("weights_sha256")) if isinstance(entry, dict) else (None, None)
    try:
        is_found = isinstance(before, str) and weights_of(before, kind.name) == weights
    except CheckpointError:
        is_found = False
    if not is_found:
        raise InputError(
            f"{name!r} does not say all that it learned from: its training {way} the {kind.noun} {before!r}, and no "
            "model of that name has those weights here. Put its folder where that name leads, or take another model."
        )
    assert isinstance(before, str)
    return before


def learned_from(model: str | os.PathLike[str], size: tuple[int, int] | None = None) -> Hashes:
    """Return the hashes of all images that a model and its ancestors learned from: uint64 (N,), each once, rising.

    `InputError` where the model does not say, or an ancestor is not found. With `size`, (H, W) of the images that these
    will be compared with, a model that learned from images resized to another size is refused too: it cannot be told
    whether they are the same.
    """
    parts = []
    for name, details in _lineage(model):
        hashes = _own_hashes(details)
        if hashes is None:
            raise InputError(
                f"{name!r} does not say which images it learned from: there is no image_hashes among the details of "
                "its config.json. Train it again with this version, which notes them, or take another model."
            )
        if size is not None and details.get("resized") is not None and tuple(details.get("image_size") or ()) != size:
            raise InputError(
                f"{name!r} learned from images that were resized to {details.get('image_size')}. Whether these, which "
                f"are {list(size)}, were among them cannot be told. Take another model, or one that learned from "
                "images at their own size."
            )
        parts.append(hashes)
    return np.unique(np.concatenate(parts))


def _own_hashes(details: Mapping[str, Any]) -> Hashes | None:
    text = details.get("image_hashes")
    return hashes_of_text(text) if isinstance(text, str) else None


@dataclass(frozen=True, eq=False)
class Learned:
    """The images that some models learned from, as far as their checkpoints tell."""

    hashes: frozenset[int] = frozenset()  # of the images as they were trained on
    sides: frozenset[int] = frozenset()  # of images resized for training: compared at each of them too
    channels: int = 3  # of the images that the models take; a grey image is compared as they see it
    doubtful: frozenset[int] = frozenset()  # indices that a model may have learned from, as far as numbers go
    silent: tuple[str, ...] = ()  # the models that do not say, or not all

    @property
    def is_known(self) -> bool:
        """Whether every model says what it learned from: else a count of 0 images that it did means nothing."""
        return not self.silent

    def has(self, sample: Any, size: int | None = None) -> bool:
        """Tell whether a model learned from the image of a sample, as it is or as it was resized for training.

        Args:
            size: side that the image is resized to where it is measured; that image is looked for too.
        """
        if not self.hashes:
            return False
        try:
            image = to_engine(get_image(sample))[0]
        except InputError:  # whoever measures it says what is wrong with it
            return False
        if len(image) == 1 and self.channels == 3:
            image = image.expand(3, -1, -1)
        wanted = [None, *self.sides, *(() if size is None else (size,))]
        sized = (image if side is None else sizes.resize(image, side, side) for side in dict.fromkeys(wanted))
        bytes_HWC = (quantize(x).permute(1, 2, 0).contiguous().numpy() for x in sized)
        return any(int(image_hashes(x[None])[0]) in self.hashes for x in bytes_HWC)

    def finder(self, size: int | None = None) -> Callable[[Any], bool] | None:
        """Return `has` for images of a size; None where nothing is known to look for, so that no image need be read."""
        return functools.partial(self.has, size=size) if self.hashes else None


def learned_images(
    models: Sequence[str | os.PathLike[str]], dataset: Dataset[Any], spec: str, channels: int, progress: bool = False
) -> Learned:
    """Find out, as far as can be told, what these models learned from, to compare the images of a dataset with it.

    A checkpoint with `image_hashes` tells all. An older one names indices, and perhaps one hash of all those images
    together. Where `dataset` has that hash at these indices, or is the named torchvision dataset of the checkpoint
    (`spec`) and as long, its images there are hashed. The same length alone may be chance, or the same data with JPEG
    or resized images that come out otherwise here. `channels` are those of the images that the models take.
    """
    hashes: set[int] = set()
    sides: set[int] = set()
    doubtful: set[int] = set()
    silent: list[str] = []
    length = len(dataset)  # type: ignore[arg-type]
    for model in models:
        try:
            for name, details in _lineage(model):
                own = _own_hashes(details)
                if own is None:
                    own = _recovered(details, dataset, spec, channels, progress)
                if own is None:
                    silent.append(name)
                else:
                    hashes.update(own.tolist())
                    side = details.get("resized")
                    sides.update([side] if type(side) is int and side > 0 else [])
                if details.get("data_length") == length:
                    doubtful.update(_indices(details))
        except (InputError, CheckpointError):
            silent.append(os.fspath(model))
    return Learned(frozenset(hashes), frozenset(sides), channels, frozenset(doubtful), tuple(dict.fromkeys(silent)))


def _indices(details: Mapping[str, Any]) -> list[int]:
    indices = details.get("indices")
    return indices if isinstance(indices, list) and all(type(i) is int for i in indices) else []


def _recovered(
    details: Mapping[str, Any], dataset: Dataset[Any], spec: str, channels: int, progress: bool
) -> Hashes | None:
    """Hash the images that an older checkpoint names by their indices, where this dataset certainly has them."""
    indices, sha256 = _indices(details), details.get("images_sha256")
    length = len(dataset)  # type: ignore[arg-type]
    if not indices or not all(0 <= i < length for i in indices):
        return None
    is_named = spec in TORCHVISION and details.get("data") == spec and details.get("data_length") == length
    if sha256 is None and not is_named:
        return None
    whole, each = hashlib.sha256(), []
    with tqdm(total=len(indices), desc="looking for images trained on", disable=not progress, leave=False) as bar:
        for start in range(0, len(indices), _AT_ONCE):
            chosen = indices[start : start + _AT_ONCE]
            try:
                images = load_images(dataset, chosen, size=details.get("resized"), channels=channels)
            except PurifyError:  # training could not have read them
                return None
            whole.update(images.numpy().data)
            each.append(image_hashes(images.permute(0, 2, 3, 1).contiguous().numpy()))
            bar.update(len(chosen))
    return np.concatenate(each) if sha256 in (None, whole.hexdigest()) else None


def check_disjoint(train: Hashes, test: Hashes, learned: Mapping[str, Hashes]) -> dict[str, int]:
    """Return how many images of each set were compared; `InputError` where one is in two, which would be dishonest.

    Args:
        train: hashes of the training images: of the clean ones, and of what a poison made of them.
        test: of the test images.
        learned: model → of the images that it learned from. Two models may have learned from the same.
    """
    hashes = {"the training set": train, "the test set": test}
    hashes |= {f"what {model} learned from": values for model, values in learned.items()}
    sets = {name: frozenset(int(value) for value in values) for name, values in hashes.items()}
    names = list(sets)
    pairs = [(first, second) for i, first in enumerate(names[:2]) for second in names[i + 1 :]]
    for first, second in pairs:
        if both := len(sets[first] & sets[second]):
            raise InputError(
                f"{first[0].upper()}{first[1:]} and {second} must have no image in common. Got {both} of "
                f"{len(sets[second])}. Leave them out of one of the two (the bench's option leave-out does it for the "
                "training set), or take another model."
            )
    return {name: len(values) for name, values in sets.items()}
