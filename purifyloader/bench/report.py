"""What rows say together: means over seeds, what a defence recovers of what a poison took, and what it costs."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from purifyloader.bench.defences import DEFENCES
from purifyloader.bench.published import ECLIPSE, PUREGEN, PUREGEN_SOURCE, SOURCE
from purifyloader.bench.rows import Row
from purifyloader.errors import InputError
from purifyloader.files import canonical_json

__all__ = ["BITES", "Cell", "Setting", "cells", "in_order", "markdown", "recovered", "settings_of"]

BITES = 15.0
"""Points of accuracy that a poison must take from an undefended victim before it is said what a defence gives back."""

CLEAN = "none"


class Cell(NamedTuple):
    """An attack and a defence over all seeds.

    Attributes:
        accuracy, success, flipped: of each seed, in percent.
        seconds: of purifying one image, the least that was measured of this purifier.
        calls: of networks, an image.
    """

    accuracy: list[float]
    success: list[float]
    flipped: list[float]
    seconds: float
    calls: int
    sigma_px: float | None
    distance_px: float


def cells(rows: Iterable[Row]) -> dict[tuple[str, str], Cell]:
    """(attack, defence) → its cell, of rows of one `Setting`.

    Raises:
        InputError: rows of one name that differ in more than their seed, whose mean would mean nothing.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    fastest: dict[str, float] = {}  # of a purifier: what other work on the machine cannot have made longer
    for row in rows:
        found.setdefault((row["attack"], row["defence"]), []).append(row)
        seconds = row["seconds"]["purify_an_image"]
        fastest[_purifier(row)] = min(seconds, fastest.get(_purifier(row), seconds))
    for (attack, defence), its in found.items():
        if len({canonical_json({**row["settings"], "seed": None}) for row in its}) > 1:
            raise InputError(
                f"Expected rows of {attack} and {defence} that differ in their seed alone. Got others too, such as a "
                "model, a file or a preset under one name: give each an --out of its own."
            )
    return {
        key: Cell(
            [row["accuracy"] for row in its],
            [row["success"] for row in its if "success" in row],
            [row["flipped"] for row in its if "flipped" in row],
            fastest[_purifier(its[0])],
            max(row["calls"] for row in its),
            its[0]["sigma_px"],
            statistics.fmean(row["distance_px"] for row in its),
        )
        for key, its in found.items()
    }


def _purifier(row: Row) -> str:
    return canonical_json(row["settings"]["purifier"])


class Setting(NamedTuple):
    """What two rows must have in common to stand in one table."""

    data: str
    images: int
    test_images: int
    victim: str
    training: str
    sha: str
    attack_seed: int
    fast: bool
    device: str


def settings_of(row: Row) -> Setting:
    its = row["settings"]
    shown = row["data"], row["images"], row["test_images"], row["victim"], row["training"]
    return Setting(*shown, its["data"]["sha"], its["attack_seed"], its["fast"], its["device"])


def recovered(found: Mapping[tuple[str, str], Cell], attack: str, defence: str) -> float | None:
    """Share of the lost accuracy that a defence gives back, in percent; None for a poison that does not bite.

    100 is the undefended victim's accuracy on clean data, 0 its accuracy on the poisoned.
    """
    clean, bare, with_it = (found.get(key) for key in ((CLEAN, CLEAN), (attack, CLEAN), (attack, defence)))
    if clean is None or bare is None or with_it is None:
        return None
    top, bottom = statistics.fmean(clean.accuracy), statistics.fmean(bare.accuracy)
    if top - bottom < BITES:
        return None
    return 100 * (statistics.fmean(with_it.accuracy) - bottom) / (top - bottom)


def markdown(rows: Sequence[Row]) -> str:
    """The tables, one set for each setting that the rows have."""
    groups: dict[Setting, list[Row]] = {}
    for row in rows:
        groups.setdefault(settings_of(row), []).append(row)
    parts = []
    for at, its in groups.items():
        seeds = sorted({row["seed"] for row in its})
        clean = its[0].get("extractor_images")
        start = (
            f" Trained from an extractor that has learned from {clean:,} other images, clean; attacks that work on "
            "given networks know it."
            if clean
            else ""
        )
        parts.append(
            f"## {at.data}: {at.images:,} training images, {at.victim}, training `{at.training}`\n\n"
            f"{at.device}, {'bfloat16' if at.fast else 'float32'}; the attacks' seed is {at.attack_seed}. "
            f"Accuracy in % on {at.test_images:,} clean test images: mean and standard deviation over the seeds of the "
            f"victim ({', '.join(map(str, seeds))}).{start}"
        )
        parts += _tables(its)
    return "\n\n".join(parts) + "\n"


def _tables(rows: Sequence[Row]) -> list[str]:
    found = cells(rows)
    attacks, defences = in_order(found)
    parts = [
        _table(
            ["defence", *(_shown(a) for a in attacks), "noise", "calls", "s / 1,000 images"],
            [
                [
                    defence,
                    *(_mean(found[a, defence].accuracy) if (a, defence) in found else "–" for a in attacks),
                    *_cost(next(found[a, defence] for a in attacks if (a, defence) in found)),
                ]
                for defence in defences
            ],
        )
    ]
    biting = [a for a in attacks if recovered(found, a, CLEAN) is not None]
    if biting:
        lines = []
        for defence in defences:
            shares = [recovered(found, a, defence) for a in biting]
            if defence != CLEAN and any(share is not None for share in shares):
                clean = found.get((CLEAN, defence))
                cost = "–"
                if clean is not None and (CLEAN, CLEAN) in found:
                    bare = statistics.fmean(found[CLEAN, CLEAN].accuracy)
                    cost = f"{statistics.fmean(clean.accuracy) - bare:+.1f}"
                lines.append([defence, *("–" if s is None else f"{s:.0f} %" for s in shares), cost])
        parts.append(
            f"Of what a poison took, a defence gives back (poisons that take {BITES:.0f} points or more), and what it "
            "changes on clean data, in points:"
        )
        parts.append(_table(["defence", *biting, "on clean data"], lines))
    for name, title, shown in (
        (
            "success",
            "Test images of other classes that the trigger, as strong as in training, has called its class",
            _mean,
        ),
        (
            "flipped",
            "Targets that are called what the attacker wants, one a seed (an attack has another for each seed, a file "
            "the same; clean is how often those of the attacks are called so by victims of clean data)",
            _share,
        ),
    ):
        having = [a for a in attacks if any(getattr(found[key], name) for key in found if key[0] == a)]
        if set(having) - {CLEAN}:
            lines = [
                [d, *(shown(getattr(found[a, d], name)) if (a, d) in found else "–" for a in having)]
                for d in defences
                if any((a, d) in found for a in having if a != CLEAN)
            ]
            parts += [f"{title}, in %:", _table(["defence", *(_shown(a) for a in having)], lines)]
    parts += _published(ECLIPSE, SOURCE, attacks, defences)
    parts += _published(PUREGEN, PUREGEN_SOURCE, attacks, defences)
    return parts


def _published(
    table: Mapping[str, Mapping[str, float]], source: str, attacks: Sequence[str], defences: Sequence[str]
) -> list[str]:
    """The published figures of the attacks and defences that were measured, in a table of their own."""
    known = {a for values in table.values() for a in values}
    # without the options of an attack, the level of the noise and the models
    columns = [a for a in dict.fromkeys(attack.partition(" ")[0] for attack in attacks) if a in known]
    if not set(columns) - {CLEAN}:
        return []
    measured = {re.split("[@ ]", defence)[0] for defence in defences}
    # what stands for ECLIPSE here may have one call; what was published has a hundred
    lines = [
        [defence, *(f"{values[a]:.2f}" if a in values else "–" for a in columns)]
        for defence, values in table.items()
        if defence in measured or (defence == "eclipse-100" and "eclipse" in measured)
    ]
    if not lines:
        return []
    return [
        f"Published, on other poison files and another scale ({source}):",
        _table(["published", *(_shown(a) for a in columns)], lines),
    ]


def in_order(found: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The attacks and the defences of some cells: clean data first, defences as `DEFENCES` has them."""
    keys = list(found)
    return _order({attack for attack, _ in keys}, [CLEAN]), _order({defence for _, defence in keys}, list(DEFENCES))


def _order(names: set[str], first: Sequence[str]) -> list[str]:
    place = {name: i for i, name in enumerate(first)}

    def key(name: str) -> tuple[int, str, float]:
        base, px, rest = re.fullmatch(r"([^@ ]*)@?([\d.]*)(.*)", name).groups()  # type: ignore[union-attr]
        return place.get(base, len(place)), base + rest, float(px or 0)

    return sorted(names, key=key)


def _shown(attack: str) -> str:
    return "clean" if attack == CLEAN else attack


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _share(flipped: Sequence[float]) -> str:
    """Of targets, each of which is 0 or 100: their spread says nothing that their number does not say better."""
    won = sum(value > 0 for value in flipped)
    return f"{statistics.fmean(flipped):.1f} ({won} of {len(flipped)})" if flipped else "–"


def _cost(cell: Cell) -> list[str]:
    noise = "–" if cell.sigma_px is None else f"{cell.sigma_px:g} px"
    return [noise, str(cell.calls), f"{1000 * cell.seconds:.3g}" if cell.seconds else "–"]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    aligned = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, aligned, *lines])
