"""Whether a row may stand: no image that is tested on, or poisoned, may be one that a defence learned from.

By the hash of each image, not by indices or names: a set may have been copied, cut or put in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from purifyloader.errors import InputError

__all__ = ["check_disjoint"]

Hashes = NDArray[np.uint64]


def check_disjoint(train: Hashes, test: Hashes, learned: Mapping[str, Hashes]) -> dict[str, int]:
    """
    Args:
        train: hashes of the training images: of the clean ones, and of what a poison made of them.
        test: of the test images.
        learned: model → of the images that it learned from.

    Returns:
        how many images of each were compared, for the row.

    Raises:
        InputError: an image is in two of them; names which, and how many.
    """
    sets: dict[str, frozenset[int]] = {
        "the training set": _distinct(train),
        "the test set": _distinct(test),
        **{f"what {model} learned from": _distinct(hashes) for model, hashes in learned.items()},
    }
    names = list(sets)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if i >= 2:  # two models may well have learned from the same clean images
                continue
            if both := len(sets[first] & sets[second]):
                raise InputError(
                    f"Expected {first} and {second} to have no image in common. Got {both} of "
                    f"{len(sets[second])}: leave them out of one (--leave-out does, of the training set), or take "
                    "another model."
                )
    return {name: len(hashes) for name, hashes in sets.items()}


def _distinct(hashes: Iterable[int]) -> frozenset[int]:
    return frozenset(int(value) for value in hashes)
