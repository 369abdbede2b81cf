"""Values as results hold them: rounded numbers, hashes, areas under a curve, and the format of a whole result."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json

__all__ = ["attack_label", "auc", "check_format", "images_sha256", "six_digits", "to_json"]


def six_digits(value: float) -> float:
    """Round to six significant digits: what lies below is rounding of the device."""
    return float(f"{value:.6g}")


def images_sha256(images_NCHW: Tensor) -> str:
    """Hash the shape and the bytes of images, as (N, C, H, W)."""
    sha = hashlib.sha256(canonical_json(list(images_NCHW.shape)).encode() + b"\n")
    sha.update(images_NCHW.cpu().contiguous().numpy().data)
    return sha.hexdigest()


def attack_label(name: str, longest: int = 32) -> str:
    """Name an attack in a picture: abbreviations in capitals, and at most so many letters."""
    return name.upper() if name in ("lsp", "ar") else name[:longest]


def check_format(results: Any, formats: Sequence[tuple[str, int]], what: str) -> str:
    """Return the format of results of `what`, such as "evaluate", and refuse all but these (format, version)."""
    got = {k: results.get(k) for k in ("format", "version")} if isinstance(results, Mapping) else type(results)
    for name, version in formats:
        if got == {"format": name, "version": version}:
            return name
    wanted = " or ".join(f"{name!r} of version {version}" for name, version in formats)
    raise InputError(f"Expected results of {what}, {wanted}. Got {got}.")


def to_json(results: Mapping[str, Any]) -> str:
    """Write results as JSON, the same text for the same results: sorted keys, and a list of numbers in one line."""
    text = json.dumps(results, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=True)
    return re.sub(r"\[[^][{}]*\]", lambda numbers: re.sub(r"\s*\n\s*", " ", numbers[0]), text) + "\n"


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
