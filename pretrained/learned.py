"""Which images a model learned from: by hash, of the model itself and of those that its training started from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.errors import CheckpointError, InputError
from purifyloader.files.hashes import hashes_of_text
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.checkpoint import load, read_config
from purifyloader.pretrained.registry import FORMATS, find

__all__ = ["learned_from", "weights_of"]


def learned_from(model: str | os.PathLike[str], size: tuple[int, int] | None = None) -> NDArray[np.uint64]:
    """The hashes of the images that a model learned from, and of those that the models before it learned from.

    Args:
        model: name, folder or hub id, of a denoiser or an energy model.
        size: (H, W) of the images that these will be compared with. None says nothing of images that were resized.

    Returns:
        uint64 (N,), of `purifyloader.files.hashes.image_hashes`, each once, rising.

    Raises:
        InputError: the model does not say; it learned from images that were resized to another size; or what its
            training started from is not found.
        CheckpointError: no such model.
    """
    return np.unique(np.concatenate(list(_learned(model, size))))


def weights_of(model: str | os.PathLike[str], kind: str) -> str:
    """The hash of the weights of a "denoiser" or an "energy" model, by name or folder."""
    return weights_sha256(load(model) if kind == "denoiser" else load(model, kind="energy"))


def _learned(model: str | os.PathLike[str], size: tuple[int, int] | None) -> Iterator[NDArray[np.uint64]]:
    """The hashes that a model has of the images it learned from, and those of the models before it."""
    config = read_config(find(model), None)
    found = config.get("details")
    details: dict[str, Any] = found if isinstance(found, dict) else {}
    text, name = details.get("image_hashes"), os.fspath(model)
    if not isinstance(text, str):
        raise InputError(
            f"Expected a model that says which images it learned from. Got {name!r}, whose config.json has "
            "no image_hashes among its details: train it again with this version, which notes them, or take another."
        )
    if size is not None and details.get("resized") is not None and tuple(details.get("image_size") or ()) != size:
        raise InputError(
            f"Expected a model that says which images it learned from. Got {name!r}, which learned from images that "
            f"were resized to {details.get('image_size')}, where these are of {list(size)}: whether they are the same "
            "cannot be told. Take another, or one that learned from images at their size."
        )
    yield hashes_of_text(text)
    train = details.get("train")
    if not isinstance(train, dict) or (start := train.get("start_from")) is None:
        return
    before, wanted = (start.get("name"), start.get("weights_sha256")) if isinstance(start, dict) else (None, None)
    kind = next(kind for kind, its in FORMATS.items() if its == config["format"])
    try:
        known = isinstance(before, str) and weights_of(before, kind) == wanted
    except CheckpointError:
        known = False
    if not known:
        raise InputError(
            f"Expected a model that says which images it learned from. Got {name!r}, whose training started from the "
            f"{kind} {before!r}, of which none with its weights is found: give its folder that name here, or take "
            "another model."
        )
    assert isinstance(before, str)
    yield from _learned(before, size)
