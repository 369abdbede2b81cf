"""Count the votes of models on each test input."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from purifyloader.errors import InputError

__all__ = ["counts"]


def counts(votes_MT: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Count how many models vote for each class: what `predict` and `certify` take.

    Args:
        votes_MT: integers (M, T), the class that each of one or more models gives each of one or more test inputs,
            from 0 to K - 1.
        classes: K, at least 2.

    Returns:
        int64 (T, K); each row sums to M.

    Raises:
        InputError: no such votes or number of classes.

    Example:
        >>> from purifyloader.certify import counts
        >>> counts([[0, 1], [0, 2], [1, 2]], classes=3).tolist()  # three models, two test inputs
        [[2, 1, 0], [0, 1, 2]]
    """
    if isinstance(classes, bool) or not isinstance(classes, (int, np.integer)) or classes < 2:
        raise InputError(f"classes must be a whole number, at least 2. Got {classes!r}.")
    votes = np.asarray(votes_MT)
    if votes.dtype.kind not in "iu" or votes.ndim != 2 or 0 in votes.shape:
        raise InputError(
            "votes must be integers (M, T): the class that each of one or more models gives each of one or more test "
            f"inputs. Got {votes.dtype} {votes.shape}."
        )
    if votes.min() < 0 or votes.max() >= classes:
        raise InputError(
            f"votes must be from 0 to {classes - 1}, numbers of {classes} classes. Got {votes.min()} to "
            f"{votes.max()}: where models abstain, count that as a class."
        )
    inputs = votes.shape[1]
    # each test input has K places of its own; in int64, as class numbers of a small type would overflow
    places = votes.astype(np.int64) + int(classes) * np.arange(inputs)
    return np.bincount(places.ravel(), minlength=inputs * int(classes)).reshape(inputs, int(classes)).astype(np.int64)
