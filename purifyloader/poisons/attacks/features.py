"""Losses in a network's last features, and what those are of a class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from purifyloader.errors import InputError
from purifyloader.poisons.attacks.clean import Clean
from purifyloader.poisons.attacks.pgd import Loss
from purifyloader.poisons.attacks.surrogate import Surrogate

__all__ = ["class_features", "feature_distance"]


def feature_distance(network: Surrogate, feature_BF: Tensor) -> Loss:
    """Return a function that gives the l2 distance of each image's features from these."""
    return lambda x_BCHW: (network.features(x_BCHW) - feature_BF).norm(dim=1)


@torch.no_grad()
def class_features(clean: Clean, network: Surrogate) -> Tensor:
    """Return the mean features (classes, F) of the clean images of each class.

    Raises:
        InputError: a class has no image.
    """
    counts = torch.bincount(clean.y, minlength=clean.classes)
    if not bool(counts.all()):
        absent = int((counts == 0).nonzero()[0, 0])
        raise InputError(
            f"Each class from 0 to {clean.classes - 1} must have an image, for its mean features. Got none of class "
            f"{absent}: number the classes without gaps."
        )
    # a matrix product, as adding up by index has no fixed order on a GPU
    parts = [
        F.one_hot(clean.y[index_B], clean.classes).double().T @ network.features(clean.images(index_B)).double()
        for index_B in clean.batches(500)
    ]
    return (torch.stack(parts).sum(dim=0) / counts[:, None]).float()
