"""Weigh, class by class, whether images carry a label that is not theirs: pure functions of votes and scores.

A back door with wrong labels puts images of many classes under one label, the target. Four kinds of evidence look for
that label; each gives numbers for every class, and says of which classes it is sure.

    reference   networks that learned from clean labelled images alone find the images of the class unlikely
    outflow     purification takes its label away from more images of the class than from clean ones
    inflow      purified clean images of other classes arrive at the class: a trigger that is itself softness
    published   DataElixir's (Zhou et al., AAAI 2024, arXiv:2312.11057): the classes that purified images leave for
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["KINDS", "LIMITS", "at_least", "inflow", "leaves", "majority", "outflow", "published", "reference"]

KINDS = ("reference", "outflow", "inflow", "published")

LIMITS = {"reference": 3.0, "outflow": 4.0, "inflow": 4.0, "published": 2.0}
"""Where a class becomes a target: of "published" its authors', of the others standard deviations of chance. That of
"reference" was chosen on images of CIFAR-10 apart from the sample (`examples/sanitize.py`); those of "outflow" and
"inflow" have not been tried enough."""

_TAIL = 0.05  # share of the known images of a class that are called unlikely for it
_MAD = 1.4826  # times the median absolute deviation: the standard deviation of normal numbers

Labels = NDArray[np.int64]
Floats = NDArray[np.float64]


def majority(votes_NR: Labels, first_N: Labels) -> Labels:
    """Return the class that most rounds vote for, int64 (N,); of several the one of `first`, else the lowest."""
    classes = int(max(votes_NR.max(initial=0), first_N.max(initial=0))) + 1
    counts = (votes_NR[:, :, None] == np.arange(classes)).sum(axis=1) * 2
    counts[np.arange(len(first_N)), first_N] += 1
    return counts.argmax(axis=1).astype(np.int64)


def leaves(labels_N: Labels, votes_NR1: Labels) -> NDArray[np.bool_]:
    """Find the images that a model calls by their label and, purified, by other classes in most rounds: bool (N,).

    Column 0 of the votes is the image as it is.
    """
    rounds = votes_NR1.shape[1] - 1
    kept = (votes_NR1[:, 1:] == labels_N[:, None]).sum(axis=1)
    return (votes_NR1[:, 0] == labels_N) & (2 * kept < rounds)


def at_least(scores_N: Floats, labels_N: Labels, known_M: Floats, known_labels_M: Labels) -> Labels:
    """Count the known images of the same label whose scores are as high or higher, int64 (N,)."""
    out = np.zeros(len(scores_N), np.int64)
    for label in np.unique(labels_N):
        known = np.sort(known_M[known_labels_M == label])
        of_label = labels_N == label
        out[of_label] = len(known) - np.searchsorted(known, scores_N[of_label], side="left")
    return out


def reference(at_least_KN: Labels, labels_N: Labels, counts_KC: Labels) -> list[dict[str, Any]]:
    """Compare the unlikely images of each class with how many would be by chance.

    If an image is as the known ones of its class are, each place among them is as probable: with n known images it is
    one of the m most unlikely with probability m / (n + 1). How far that share strays, for so few known images, is the
    variance of a beta distribution, and a gamma distribution with the same mean and variance gives z.

    Of each class: the share of `unlikely` images, the share `expected`, the smallest share of wrong labels that `shows`
    (if each is the most unlikely of all), `common`, the z that all classes have, and the `z` beyond that.

    Args:
        at_least_KN: for each of K networks, how many clean images of the label, which the network has not seen, are as
            unlikely as the image.
        counts_KC: for each network, how many such images of each class there are.
    """
    classes = counts_KC.shape[1]
    shares, expected, z, shows = (np.full(classes, np.nan) for _ in range(4))
    for label in range(classes):
        of_label, known = labels_N == label, counts_KC[:, label]
        if of_label.any() and known.all():
            places = np.maximum(1, (_TAIL * (known + 1)).astype(np.int64))
            chance = places / (known + 1)
            shares[label] = (at_least_KN[:, of_label] < places[:, None]).mean()
            expected[label] = chance.mean()
            spread = (chance * (1 - chance) / (known + 2)).sum() / len(known) ** 2
            variance = spread + expected[label] * (1 - expected[label]) / of_label.sum()
            z[label] = _z(shares[label], expected[label], variance)
            shows[label] = (_limit(expected[label], variance) - expected[label]) / (1 - expected[label])
    # what all classes show comes from another camera, and from no poison
    common = float(np.nanmedian(z)) if classes >= 4 and not np.isnan(z).all() else 0.0
    return [
        {
            "unlikely": _plain(share),
            "expected": _plain(chance),
            "shows": _plain(min(least, 1.0)),
            "common": _plain(common),
            "z": _plain(one - max(common, 0.0)),
        }
        for share, chance, least, one in zip(shares, expected, shows, z, strict=True)
    ]


def _z(share: float, mean: float, variance: float) -> float:
    """The standard deviations of a normal distribution at which a share of a gamma distribution stands."""
    shape, scale = torch.tensor([mean**2 / variance, variance / mean], dtype=torch.float64, device="cpu")
    larger = torch.special.gammaincc(shape, share / scale).clamp(1e-300, 1 - 1e-15)
    return -float(torch.special.ndtri(larger))


def _limit(mean: float, variance: float) -> float:
    """The share from which a class is a target."""
    low, high = mean, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _z(middle, mean, variance) > LIMITS["reference"] else (middle, high)
    return high


def outflow(
    labels_N: Labels, votes_NR1: Labels, known_labels_M: Labels, known_votes_MR1: Labels, classes: int
) -> list[dict[str, Any]]:
    """Compare the images of each class that lose their label with clean images of the class that lose theirs."""
    left, known_left = leaves(labels_N, votes_NR1), leaves(known_labels_M, known_votes_MR1)
    rows = []
    for label in range(classes):
        own = (labels_N == label) & (votes_NR1[:, 0] == label)
        known = (known_labels_M == label) & (known_votes_MR1[:, 0] == label)
        rows.append(_compared(left[own], known_left[known]))
    return rows


def inflow(known_labels_M: Labels, known_votes_MR1: Labels, classes: int) -> list[dict[str, Any]]:
    """Compare how many purified clean images of other classes arrive at each class with what most classes get.

    An image arrives at a class that is not its own and that the model did not give it before.
    """
    before = known_votes_MR1[:, 0]
    after = majority(known_votes_MR1[:, 1:], before)
    counts = np.array(
        [((after == label) & (known_labels_M != label) & (before != label)).sum() for label in range(classes)]
    )
    others = np.array([((known_labels_M != label) & (before != label)).sum() for label in range(classes)])
    shares = counts / np.maximum(others, 1)
    middle = float(np.median(shares))
    spread = max(_MAD * float(np.median(np.abs(shares - middle))), math.sqrt(max(middle, 1e-3) / max(others.max(), 1)))
    return [{"arrive": _plain(share), "z": _plain((share - middle) / spread)} for share in shares]


def published(labels_N: Labels, votes_NR1: Labels, classes: int) -> list[dict[str, Any]]:
    """DataElixir's score of each class: how far its -ln(share of the label among all votes) is from the median.

    Over the images with that vote for the image itself and any other vote among the rounds (the published code). A
    class without such an image, or without a vote for it, has no score, where that code divides by zero.
    """
    first = votes_NR1[:, 0]
    changed = (votes_NR1 != first[:, None]).any(axis=1)
    divergence = np.full(classes, np.nan)
    for label in range(classes):
        of_label = changed & (labels_N == label)
        share = (votes_NR1[of_label] == label).mean() if of_label.any() else 0.0
        if share > 0:
            divergence[label] = -math.log(share)
    middle = float(np.nanmedian(divergence)) if not np.isnan(divergence).all() else math.nan
    deviation = np.abs(divergence - middle)
    mad = _MAD * (float(np.nanmedian(deviation)) + 1e-6) if not np.isnan(deviation).all() else math.nan
    return [{"kl": _plain(kl), "z": _plain(distance / mad)} for kl, distance in zip(divergence, deviation, strict=True)]


def _compared(left: NDArray[np.bool_], known_left: NDArray[np.bool_]) -> dict[str, Any]:
    """Compare two shares: a z-test with the pooled share."""
    count, known = len(left), len(known_left)
    if not count or not known:
        return {"lost": None, "known_lost": None, "z": None}
    pooled = (left.sum() + known_left.sum()) / (count + known)
    spread = math.sqrt(pooled * (1 - pooled) * (1 / count + 1 / known))
    difference = left.mean() - known_left.mean()
    return {
        "lost": _plain(left.mean()),
        "known_lost": _plain(known_left.mean()),
        "z": _plain(difference / spread if spread else 0.0),
    }


def _plain(value: Any) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)
