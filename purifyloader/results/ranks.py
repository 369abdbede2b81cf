"""Compare two lists of numbers by rank: the area under the ROC curve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.errors import InputError

__all__ = ["auc"]


def _values(values: Tensor | Sequence[float], what: str) -> NDArray[np.float64]:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float64)
    if array.ndim != 1 or not len(array) or np.isnan(array).any():
        raise InputError(f"{what} must be a list of one or more numbers, without NaN. Got shape {array.shape}.")
    return array


def auc(negative: Tensor | Sequence[float], positive: Tensor | Sequence[float]) -> float:
    """Compute P(positive > negative) + P(positive = negative) / 2 over all pairs: the exact area under the ROC curve.

    It is Mann and Whitney's U (1947) over the number of pairs: 0.5 tells nothing apart, 1 everything.

    >>> from purifyloader.evaluation import auc
    >>> auc([1.0, 2.0], [2.0, 3.0])
    0.875
    """
    low, high = np.sort(_values(negative, "negative")), _values(positive, "positive")
    # twice the wins, so that sums stay integers and exact
    wins = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(wins.sum(dtype=np.int64) / (2 * len(low) * len(high)))
