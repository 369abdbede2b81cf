"""Say in words and numbers what a sanitation found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from purifyloader.results.table import plain
from purifyloader.sanitize.evidence import LIMITS
from purifyloader.sanitize.verdict import Verdict

__all__ = ["in_words", "table"]

_MOST = 0.75  # share of a class under suspicion that wants a look

# of each kind of evidence: its numbers, and the heads of their columns
_COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "reference": (("unlikely", "unlikely %"), ("shows", "seen from %"), ("z", "z")),
    "outflow": (("lost", "lost %"), ("known_lost", "clean lost %"), ("z", "z")),
    "inflow": (("arrive", "arrive %"), ("z", "z")),
    "published": (("z", "published"),),
}


def in_words(verdict: Verdict) -> Iterator[str]:
    """Yield sentences: the targets and how many suspects each has, what was not judged, and what to do."""
    if not verdict.targets:
        yield (
            f"No class is a target, by the evidence {verdict.by!r}. An attack that keeps labels right would not show: "
            "purify all images against it."
        )
    for label in verdict.targets:
        row = next(row for row in verdict.rows if row["class"] == label)
        count = int((verdict.labels[verdict.suspects] == label).sum())
        yield f"{_name(row)} is a target: {count:,} of its {row['images']:,} images are suspects."
    if verdict.targets:
        yield (
            "Drop the suspects: purifyloader precompute --sanitation FOLDER, or "
            "PurifiedDataset(..., sanitation=verdict.sanitation())."
        )
    yield from _doubts(verdict)
    if verdict.unjudged:
        yield f"Too few images for a verdict: class {', '.join(map(str, verdict.unjudged))}."


def _doubts(verdict: Verdict) -> Iterator[str]:
    """Say where the reference does not fit the dataset."""
    common = next((row["reference"].get("common") for row in verdict.rows if "reference" in row), None)
    if common is not None and common > LIMITS["reference"]:
        yield (
            f"All classes have more unlikely images than clean ones have (z {common:.1f} in the middle, left out "
            "above): the reference is of other images than these, or labels are wrong in many classes, which does not "
            "show as a target."
        )
    if verdict.by == "published" and verdict.targets:
        yield (
            "The published score names classes of clean data too. Look at the suspects, or give clean labelled images, "
            "before you drop any."
        )
    if verdict.scores is None:
        return
    for label in verdict.targets:
        of_label = verdict.labels == label
        if (share := float(np.isin(np.flatnonzero(of_label), verdict.suspects).mean())) > _MOST:
            yield (
                f"{share:.0%} of class {label} are suspects. Look at them before they are dropped: is it the same "
                "class in the reference?"
            )


def table(verdict: Verdict) -> Iterator[str]:
    """Yield the lines of a table of the evidence for each class, and the sentences below it.

    >>> import numpy as np
    >>> from purifyloader import sanitize
    >>> rows = [{"class": label, "images": 1, "reference": {"z": 9.0 * (label == 0)}} for label in (0, 1)]
    >>> verdict = sanitize.Verdict(np.array([0, 0, 1]), (0,), np.array([1]), {1: 1}, rows, "reference")
    >>> [line for line in sanitize.table(verdict) if "suspects" in line][0]
    '0 is a target: 1 of its 1 images are suspects.'
    """
    kinds = [kind for kind in _COLUMNS if any(kind in row for row in verdict.rows)]
    head = ["class", "images", *(words for kind in kinds for _, words in _COLUMNS[kind]), "verdict"]
    rows = []
    for row in verdict.highest():
        cells = [_number(row.get(kind, {}), key) for kind in kinds for key, _ in _COLUMNS[kind]]
        rows.append([_name(row), f"{row['images']:,}", *cells, _verdict_on(row, verdict)])
    yield from plain(head, rows, text_last=True)
    if (more := len(verdict.rows) - len(rows)) > 0:
        yield f"  and {more} classes with less evidence, which are in the JSON"
    yield ""
    limits = ", ".join(f"{kind} {LIMITS[kind]:g}" for kind in kinds)
    yield f"z is in standard deviations of chance; a class is a target above: {limits} (decided by {verdict.by})."
    yield from in_words(verdict)


def _verdict_on(row: Mapping[str, Any], verdict: Verdict) -> str:
    if row["class"] in verdict.unjudged:
        return "too few images"
    return "target" if row["class"] in verdict.targets else ""


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['class']} {row['name']}" if row.get("name") else str(row["class"])


def _number(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if value is None:
        return "–"
    return f"{value:.1f}" if key == "z" else f"{100 * value:.0f}"
