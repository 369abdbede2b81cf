"""Compare energies with those of clean images; the result is one JSON value. Everything here works on numbers alone.

Energies are given as U = E / T, T the temperature that PureGen's Langevin steps divide by. exp(-U) is then the
model's density up to a constant, so that a difference of U means something, and U itself does not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.audit.energies import DatasetEnergies
from purifyloader.core import noise
from purifyloader.core.checks import check_number
from purifyloader.energy.walking import TEMPERATURE
from purifyloader.errors import InputError
from purifyloader.results.values import auc, six_digits

__all__ = ["FORMAT", "VERSION", "audit_energy", "check_top", "halves", "percentiles", "ranking", "threshold"]

FORMAT = "purifyloader-energy-audit"
VERSION = 1

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)

_TAIL = 0.01  # beyond the 99th percentile
_SPLITS = 200  # of the reference into halves
_RANGE = (0.025, 0.975)
_BINS = 60

Floats = NDArray[np.float64]


def threshold(reference: Floats) -> float:
    """Compute what a new draw like the reference's exceeds with probability 0.01, whatever their distribution.

    That is the quantile at p = k / (n + 1) (Weibull's plotting position); the largest, where n is too small for it.
    """
    return float(np.quantile(reference, 1 - _TAIL, method="weibull"))


def expected_share(count: int) -> float:
    """Compute the probability that a new draw exceeds `threshold` of `count`: 0.01, or 1 / (n + 1) for few."""
    return max(_TAIL, 1 / (count + 1))


def percentiles(values: Floats, reference: Floats) -> Floats:
    """Compute the percent of the reference below each value, half of those equal to it counted."""
    ordered = np.sort(reference)
    both = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return 50.0 * both / len(ordered)


def ranking(energies: Floats) -> NDArray[np.int64]:
    """Order rows from the highest energy to the lowest; equal ones in the order they come."""
    return np.argsort(-energies, kind="stable")


def halves(reference: Floats, count: int, seed: int = 0) -> dict[str, Any] | None:
    """Measure how much clean images vary among themselves: half of the reference audited against the other half.

    Args:
        count: images of the audited half, as many as the data has; fewer where half the reference has fewer.

    Returns:
        Over 200 random splits the mean and the range of 95 % of the share above the 99th percentile, and of the AUC.
        None for a reference of fewer than 2.
    """
    half = len(reference) // 2
    if half < 1:
        return None
    audited = min(count, len(reference) - half)
    shares, aucs = [], []
    for order in noise.uniform(noise.image_keys(seed, 0, range(_SPLITS)), (len(reference),)).argsort(dim=1).numpy():
        clean, new = reference[order[:half]], reference[order[half : half + audited]]
        shares.append(float((new > threshold(clean)).mean()))
        aucs.append(auc(clean.tolist(), new.tolist()))
    ranges = {"share_above": _mean_and_range(shares), "auc": _mean_and_range(aucs)}
    return {"images": audited, "against": half, "splits": _SPLITS, **ranges}


def _mean_and_range(values: Sequence[float]) -> dict[str, float]:
    low, high = np.quantile(values, _RANGE)
    return {"mean": six_digits(float(np.mean(values))), "low": six_digits(float(low)), "high": six_digits(float(high))}


def _checked(energies: DatasetEnergies, temperature: float, what: str) -> Floats:
    values = energies.values(temperature)
    if not len(values):
        raise InputError(f"Expected energies of {what}, one or more. Got none.")
    if not np.isfinite(values).all():
        first = int((~np.isfinite(values)).nonzero()[0][0])
        raise InputError(f"Energies of {what} must be finite. Got {values[first]} at index {energies.indices[first]}.")
    return values


def _spread(values: Floats) -> dict[str, Any]:
    return {
        "mean": six_digits(float(values.mean())),
        "standard_deviation": six_digits(float(values.std(ddof=1))) if len(values) > 1 else None,
        "quantiles": {f"{q:g}": six_digits(float(np.quantile(values, q))) for q in QUANTILES},
    }


def _histogram(sets: Mapping[str, Floats]) -> dict[str, Any]:
    """Count over common bins; those far outside the bulk are counted in the first and the last of them."""
    everything = np.concatenate(list(sets.values()))
    low, high = np.quantile(everything, [0.01, 0.99])
    reach = max(high - low, 1e-6 * max(1.0, abs(high)))
    edges = np.linspace(max(everything.min(), low - reach), min(everything.max(), high + reach), _BINS + 1)
    if edges[0] == edges[-1]:
        edges = edges[0] + np.linspace(-0.5, 0.5, _BINS + 1)
    clipped = {name: np.clip(values, edges[0], edges[-1]) for name, values in sets.items()}
    return {
        "edges": [six_digits(float(edge)) for edge in edges],
        **{name: np.histogram(values, edges)[0].tolist() for name, values in clipped.items()},
        "beyond": {
            name: [int((values < edges[0]).sum()), int((values > edges[-1]).sum())] for name, values in sets.items()
        },
    }


def _truth(values: Floats, poisoned: NDArray[np.bool_], top: Sequence[float]) -> dict[str, Any]:
    order = ranking(values)
    count = int(poisoned.sum())
    flagged = []
    for percent in top:
        first = order[: max(1, round(len(values) * percent / 100))]
        hits = int(poisoned[first].sum())
        flagged.append(
            {
                "percent": percent,
                "flagged": len(first),
                "poisoned": hits,
                "of_flagged": six_digits(hits / len(first)),
                "of_poisoned": six_digits(hits / count),
            }
        )
    has_others = count < len(values)
    return {
        "poisoned": count,
        "auc": six_digits(auc(values[~poisoned].tolist(), values[poisoned].tolist())) if has_others else None,
        "top": flagged,
        "energy": _spread(values[poisoned]),
    }


def check_top(top: Sequence[float]) -> None:
    if bad := [percent for percent in top if not 0 < percent <= 100]:
        raise InputError(f"must be percentages above 0, at most 100. Got {bad[0]:g}.", argument="top")


def audit_energy(
    data: DatasetEnergies,
    reference: DatasetEnergies | None = None,
    *,
    poisoned: Collection[int] | None = None,
    top: Sequence[float] = (1, 5, 10, 50),
    temperature: float = TEMPERATURE,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the energies of a dataset with those of clean images.

    Args:
        reference: of images known to be clean, not those that the model was trained on.
        poisoned: indices of the dataset, where it is known which images are poisoned.
        top: percentages of the images, those of highest energy, among which the poisoned are counted.
        temperature: T of U = E / T.
        seed: of the splits of the reference.

    Returns:
        What `json.dumps` takes; U = E / T throughout. "data" and "reference" have their count, their spread and
        shapes. "comparison" (None without a reference) has the threshold, the 99th percentile of the reference;
        threshold_energy, the same as E, which `EnergyAbove` takes; above: count and share of the data beyond it, and
        the share expected of clean images; below: the same for the 1st percentile; auc: P(an image of the data is
        above one of the reference), 0.5 for two sets alike; halves: the same between halves of the reference;
        same_images: of the data, that are in the reference too. "truth" (None without `poisoned`) has the number
        poisoned among the data, the auc of their energies against the others', and for each of `top` the share of the
        flagged that is poisoned and of the poisoned that is flagged.

    >>> import torch
    >>> from purifyloader.audit import DatasetEnergies, audit_energy
    >>> data = DatasetEnergies([0, 1], torch.tensor([0.1, 0.2]), [7, 8], [None] * 2, {(3, 32, 32): 2}, [b"", b""])
    >>> results = audit_energy(data, poisoned=[1], temperature=0.1)
    >>> results["truth"]["auc"]  # the poisoned image has the higher energy
    1.0
    """
    check_number("temperature", temperature, above=0, error=InputError)
    check_top(top)
    values = _checked(data, temperature, "the data")
    sets = {"data": values}
    truth = None
    if poisoned is not None:
        chosen = set(poisoned)
        is_poisoned = np.array([index in chosen for index in data.indices])
        if not is_poisoned.any():
            raise InputError(
                f"poisoned must be indices of images that were audited, one or more. Got {len(chosen)} that were not."
            )
        truth = _truth(values, is_poisoned, top)
        sets["poisoned"] = values[is_poisoned]
    comparison = None
    if reference is not None:
        clean = _checked(reference, temperature, "the reference")
        sets["reference"] = clean
        comparison = _comparison(values, clean, temperature, seed)
        digests = set(reference.sha256)
        comparison["same_images"] = sum(digest in digests for digest in data.sha256)
    return {
        "format": FORMAT,
        "version": VERSION,
        "energy": {
            "unit": "U = E / temperature: no unit and no zero, only differences count",
            "temperature": temperature,
        },
        "data": _described(data, values),
        "reference": None if reference is None else _described(reference, sets["reference"]),
        "comparison": comparison,
        "truth": truth,
        "histogram": _histogram(sets),
    }


def _described(energies: DatasetEnergies, values: Floats) -> dict[str, Any]:
    return {
        "count": len(energies),
        "energy": _spread(values),
        "shapes": {"x".join(map(str, shape)): count for shape, count in sorted(energies.shapes.items())},
    }


def _comparison(values: Floats, clean: Floats, temperature: float, seed: int) -> dict[str, Any]:
    high, low = threshold(clean), -threshold(-clean)
    expected = six_digits(expected_share(len(clean)))

    def beyond(rows: NDArray[np.bool_]) -> dict[str, Any]:
        return {"count": int(rows.sum()), "share": six_digits(float(rows.mean())), "expected": expected}

    return {
        "threshold": six_digits(high),
        "threshold_energy": float(f"{high * temperature:.9g}"),  # of float32, all its digits
        "threshold_below": six_digits(low),
        "above": beyond(values > high),
        "below": beyond(values < low),
        "auc": six_digits(auc(clean.tolist(), values.tolist())),
        "halves": halves(clean, len(values), seed),
    }
