"""Transfer learning: split the training images, and train the extractor on the larger part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from purifyloader.core import noise
from purifyloader.datasets.splits import Data
from purifyloader.errors import InputError
from purifyloader.files.atomic import replacing, writing
from purifyloader.files.locks import Lock
from purifyloader.files.opening import UnusableFile, check_file
from purifyloader.victims.networks import victim
from purifyloader.victims.presets import EXTRACTOR
from purifyloader.victims.training import train_victim

__all__ = ["extractor", "split"]

_SPLIT = 0x73706C74  # "splt": purpose of the keys drawn here
_MOST, _PART = 50, 10  # images of a class to fine-tune on: so many, or a tenth where that is fewer


def split(data: Data) -> tuple[Data, Data]:
    """Split the training images into some to fine-tune on, which are poisoned, and the rest, which stay clean.

    50 images of each class are to fine-tune on, or a tenth where that is fewer, at least one; always the same of the
    same data. `InputError` for a class with one image, which cannot be in both.
    """
    drawn = noise.uniform(noise.image_keys(0, _SPLIT, 0), (len(data.train),))[0].numpy()
    tuned = np.zeros(len(data.train), bool)
    for label in np.unique(data.train_labels):
        members = np.flatnonzero(data.train_labels == label)
        if len(members) < 2:
            raise InputError(
                f"Transfer learning needs two training images or more of each class: one for the extractor, one to "
                f"fine-tune on. Got one of class {label}: give more images."
            )
        count = min(_MOST, max(1, len(members) // _PART))
        tuned[members[drawn[members].argsort(kind="stable")[:count]]] = True
    return data.only(tuned), data.only(~tuned)


def extractor(path: Path, data: Data, network: str, *, seed: int, device: str, bfloat16: bool) -> nn.Module:
    """Return a network that has learned from clean images, in evaluation mode: trained once and kept in a file.

    `path` is that .safetensors file, named after all that decides the weights.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with Lock(path.parent, path.stem):  # another process waits for it, and then reads it
        model = _read(path, network, data.classes)
        if model is None:
            model = train_victim(
                data.train,
                data.train_labels,
                EXTRACTOR,
                classes=data.classes,
                network=network,
                seed=seed,
                device=device,
                bfloat16=bfloat16,
            ).model
            weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
            with writing(path), replacing(path) as temporary:
                temporary.write_bytes(save(weights))
    return model.to(device)


def _read(path: Path, network: str, classes: int) -> nn.Module | None:
    """Read the network; None where there is no such file, or not a whole one: it can be made again."""
    try:
        check_file(path)
        weights = load_file(path)
    except (FileNotFoundError, IsADirectoryError, UnusableFile, SafetensorError):
        return None
    with torch.random.fork_rng(devices=[]):  # a new network draws its weights
        model = victim(network, classes)
    model.load_state_dict(weights)
    return model.eval()
