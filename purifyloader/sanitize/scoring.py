"""Train networks for a sanitation, and let them judge images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.certify.functions import DenoisedSet, Predictor, Train
from purifyloader.certify.training import Training
from purifyloader.core import noise
from purifyloader.core.devices import computes_bfloat16, device_of
from purifyloader.core.images import quantize
from purifyloader.errors import InputError
from purifyloader.purifiers import Purifier

__all__ = ["Bytes", "default_training", "folds_of", "log_probabilities", "purified", "trained"]

Bytes = NDArray[np.uint8]

_AT_ONCE = 256
_SURE = 1e-4  # probability of all other classes, of a predictor that gives class numbers
_CHANCE = 1.5  # times the share of the commonest class: a network that is not above it has learned nothing
_FOLDS, _PURIFY = 0x666F6C64, 0x73616E69  # "fold", "sani": purposes of the keys drawn here


def default_training(device: torch.device) -> Training:
    """The training where the user gives none: a ResNet-9 of width 16, a minute of a core for 2,000 small images."""
    return Training(pool=1, pad=4, epochs=15, bfloat16=computes_bfloat16(device), device=str(device))


def trained(train: Train, images: Bytes, labels: NDArray[np.int64], classes: int, seed: int, what: str) -> Predictor:
    """Train a network, and refuse one that has learned nothing."""
    predictor = train(DenoisedSet(images, labels.tolist(), classes), seed)
    if not callable(predictor):
        raise InputError(f"train must return a predictor, which takes images. Got {type(predictor).__name__}.")
    if isinstance(predictor, torch.nn.Module):
        predictor.eval()
    right = float((log_probabilities(predictor, images, classes).argmax(axis=1) == labels).mean())
    commonest = float(np.bincount(labels).max() / len(labels))
    if right < min(_CHANCE * commonest, (1 + commonest) / 2):
        raise InputError(
            f"A network that learned from {what} must know its own training images. Got {right:.0%} of them right, "
            f"where the commonest class alone has {commonest:.0%}: train longer, or look at the labels."
        )
    return predictor


@torch.no_grad()
def log_probabilities(predictor: Predictor, images: Bytes, classes: int) -> NDArray[np.float64]:
    """Return the logarithm of each class's probability, (N, K), of images uint8 (N, H, W, C)."""
    device = (device_of(predictor) if isinstance(predictor, torch.nn.Module) else None) or torch.device("cpu")
    parts = []
    for start in range(0, len(images), _AT_ONCE):
        x = torch.from_numpy(np.array(images[start : start + _AT_ONCE])).to(device).permute(0, 3, 1, 2).float() / 255
        parts.append(_as_logarithms(predictor(x), len(x), classes))
    return np.concatenate(parts) if parts else np.zeros((0, classes))


def _as_logarithms(answer: Any, count: int, classes: int) -> NDArray[np.float64]:
    try:
        values = torch.as_tensor(answer).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if values.is_floating_point() and values.shape == (count, classes) and bool(values.isfinite().all()):
        return torch.log_softmax(values.double(), 1).numpy()
    whole = not values.is_floating_point() and values.dtype != torch.bool and not values.is_complex()
    if whole and values.shape == (count,) and bool(((values >= 0) & (values < classes)).all()):
        out = np.full((count, classes), np.log(_SURE))
        out[np.arange(count), values.numpy()] = np.log1p(-_SURE)
        return out
    raise InputError(
        f"A predictor must give, for {count} images, class numbers from 0 to {classes - 1}, integers ({count},), or "
        f"finite logits ({count}, {classes}). Got {values.dtype} {tuple(values.shape)}, or values outside of that."
    )


def folds_of(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Share clean images out over folds, each class evenly: int64 (M,)."""
    draws = noise.uniform(noise.fold_in(noise.image_keys(seed, 0, range(len(labels))), _FOLDS), (1,))[:, 0].numpy()
    folds = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        of_label = np.flatnonzero(labels == label)
        folds[of_label[draws[of_label].argsort(kind="stable")]] = np.arange(len(of_label)) % count
    return folds


def purified(purifier: Purifier, images: Bytes, seed: int, number: int) -> Bytes:
    """Purify images uint8 (N, H, W, C) for round `number`, as a function of (seed, round, index)."""
    keys_N = noise.fold_in(noise.image_keys(seed, number, range(len(images))), _PURIFY)
    device = device_of(purifier) or torch.device("cpu")
    out = np.empty_like(images)
    for start in range(0, len(images), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        x = torch.from_numpy(np.array(images[part])).to(device).permute(0, 3, 1, 2).float() / 255
        pixels: Tensor = quantize(purifier(x, keys_N[part].to(device)))
        out[part] = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return out
