"""Say in words and numbers what a sanitation found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from purifyloader.results.table import plain
from purifyloader.sanitize.evidence import LIMITS
from purifyloader.sanitize.verdict import Verdict

__all__ = ["in_words", "table"]

# of each kind of evidence: its numbers, and the heads of their columns
_COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "reference": (("unlikely", "unlikely %"), ("z", "z")),
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
    if verdict.unjudged:
        yield f"Too few images for a verdict: class {', '.join(map(str, verdict.unjudged))}."


def table(verdict: Verdict) -> Iterator[str]:
    """Yield the lines of a table of the evidence for each class, and the sentences below it."""
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
