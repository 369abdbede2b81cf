"""Summarise rows: means over seeds, what a defence recovers of what a poison took, and what it costs."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from purifyloader.bench import published
from purifyloader.bench.defences import DEFENCES
from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json
from purifyloader.results import table
from purifyloader.results.rows import Row

__all__ = ["BITES", "Cell", "Setting", "bites", "cells", "in_order", "markdown", "recovered", "settings_of"]

BITES = 15.0  # points of accuracy that a poison must take from an undefended victim to be in the table of gains
CLEAN = "none"


class Cell(NamedTuple):
    """Results of an attack and a defence over all seeds, in percent."""

    seeds: list[int]
    accuracy: list[float]
    success: list[float]  # of each seed whose row has it, as flipped
    flipped: list[float]
    clean_success: dict[str, list[float]]  # attack → how often its trigger takes clean victims anyway
    seconds: float  # of purifying one image, the least that was measured of this purifier
    calls: int  # of networks, an image
    sigma_px: float | None


def cells(rows: Iterable[Row]) -> dict[tuple[str, str], Cell]:
    """Group rows of one `Setting`: (attack, defence) → its cell.

    `InputError` for rows of one name that differ in more than their seed, whose mean would mean nothing.
    """
    results: dict[tuple[str, str], list[Row]] = {}
    fastest: dict[str, float] = {}  # of a purifier: what other work on the machine cannot have made longer
    for row in rows:
        results.setdefault((row["attack"], row["defence"]), []).append(row)
        seconds = row["seconds"]["purify_an_image"]
        fastest[_purifier(row)] = min(seconds, fastest.get(_purifier(row), seconds))
    for (attack, defence), group in results.items():
        if len({canonical_json({**row["settings"], "seed": None}) for row in group}) > 1:
            raise InputError(
                f"Expected rows of {attack} and {defence} that differ in their seed alone. Got others too, such as a "
                "model, a file or a preset under one name: give each an output folder of its own."
            )
    return {
        key: Cell(
            seeds=[row["seed"] for row in group],
            accuracy=[row["accuracy"] for row in group],
            success=[row["success"] for row in group if "success" in row],
            flipped=[row["flipped"] for row in group if "flipped" in row],
            clean_success={
                name: [row["clean_success"][name] for row in group if name in row.get("clean_success", {})]
                for name in {name for row in group for name in row.get("clean_success", {})}
            },
            seconds=fastest[_purifier(group[0])],
            calls=max(row["calls"] for row in group),
            sigma_px=group[0]["sigma_px"],
        )
        for key, group in results.items()
    }


def _purifier(row: Row) -> str:
    return canonical_json(row["settings"]["purifier"])


class Setting(NamedTuple):
    """Settings that two rows must have in common to stand in one table."""

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
    settings = row["settings"]
    shown = row["data"], row["images"], row["test_images"], row["victim"], row["training"]
    return Setting(*shown, settings["data"]["sha"], settings["attack_seed"], settings["fast"], settings["device"])


def bites(results: Mapping[tuple[str, str], Cell], attack: str) -> bool:
    """Tell whether an attack takes `BITES` points from undefended victims, by all seeds of either."""
    clean, bare = results.get((CLEAN, CLEAN)), results.get((attack, CLEAN))
    if clean is None or bare is None:
        return False
    return statistics.fmean(clean.accuracy) - statistics.fmean(bare.accuracy) >= BITES


def recovered(results: Mapping[tuple[str, str], Cell], attack: str, defence: str) -> float | None:
    """Compute the share of the lost accuracy that a defence gives back, in percent, over the seeds of all three cells.

    100 is the undefended victim's accuracy on clean data, 0 its accuracy on the poisoned. None for a poison that does
    not bite, and where there is no seed to compare.
    """
    if not bites(results, attack) or (attack, defence) not in results:
        return None
    if (means := _compared(results[CLEAN, CLEAN], results[attack, CLEAN], results[attack, defence])) is None:
        return None
    top, bottom, reached = means
    return 100 * (reached - bottom) / (top - bottom) if top > bottom else None  # of these few seeds it may take nothing


def _compared(*compared: Cell) -> list[float] | None:
    """Average accuracies over the seeds that all have: victims of other seeds differ by a point or two."""
    common = set.intersection(*(set(cell.seeds) for cell in compared))
    if not common:
        return None
    return [
        statistics.fmean(value for seed, value in zip(cell.seeds, cell.accuracy, strict=True) if seed in common)
        for cell in compared
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Write the tables as Markdown, one set for each setting that the rows have."""
    groups: dict[Setting, list[Row]] = {}
    for row in rows:
        groups.setdefault(settings_of(row), []).append(row)
    parts = []
    for at, group in groups.items():
        results = cells(group)
        parts += [_header(at, group, results), *_tables(results)]
        if at.data in published.DATA:
            attacks, defences = in_order(results)
            parts += [text for source in published.tables().values() for text in _published(source, attacks, defences)]
    return "\n\n".join(parts) + "\n"


def _header(at: Setting, rows: Sequence[Row], results: Mapping[tuple[str, str], Cell]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    names = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    victims = (
        f"mean and standard deviation over victims of the {names}; where they are fewer than elsewhere their number is "
        "in brackets, and a figure without ± is of one victim"
        if _most(results) > 1
        else f"of one victim each, of the {names}"
    )
    clean = rows[0].get("extractor_images")
    parts = [
        f"{at.device}, {'bfloat16' if at.fast else 'float32'}; the attacks' seed is {at.attack_seed}.",
        f"Accuracy in % on {at.test_images:,} clean test images: {victims}.",
        "Seconds are of purification alone: compensation (B, C) happens while a victim trains, and is not in them.",
    ]
    if clean:
        parts.append(
            f"Trained from an extractor that has learned from {clean:,} other images, clean; attacks that work on "
            "given networks know it."
        )
    parts += _changed(rows)
    parts += _unlike(
        "Versions of torch", [row["versions"]["torch"].partition("+")[0] for row in rows if "versions" in row]
    )
    parts += _unlike("Numbers of threads", [str(row["threads"]) for row in rows if "threads" in row])
    title = f"## {at.data}: {at.images:,} training images, {at.victim}, training `{at.training}`"
    return f"{title}\n\n{' '.join(parts)}"


def _changed(rows: Sequence[Row]) -> list[str]:
    """Say how many training images each attack changes, where not all: the rest are clean, which flatters a defence."""
    counts: dict[str, set[int]] = {}
    for row in rows:
        if row["attack"] != CLEAN and "attack_moves" in row:
            counts.setdefault(row["attack"], set()).add(row["attack_moves"]["images"])
    images = rows[0]["images"]
    few = {attack: (min(numbers), max(numbers)) for attack, numbers in sorted(counts.items()) if min(numbers) < images}
    if not few:
        return []
    wrong = {row["attack"]: row["wrong_labels"] for row in rows if "wrong_labels" in row}
    labels = {attack: f" ({wrong[attack]:,} with a wrong label)" if attack in wrong else "" for attack in few}
    shown = [
        f"{low:,}{f' to {high:,}' if high > low else ''} by {attack}{labels[attack]}"
        for attack, (low, high) in few.items()
    ]
    return [f"Not all of the {images:,} training images are changed, and the rest are clean: {', '.join(shown)}."]


def _most(results: Mapping[tuple[str, str], Cell]) -> int:
    return max(len(cell.seeds) for cell in results.values())


def _unlike(what: str, values: Sequence[str]) -> list[str]:
    """Say what the rows of a table ought to have in common, where they do not; the commonest first."""
    counts = Counter(values).most_common()
    if len(counts) < 2:
        return []
    (first, count), *others = counts
    return [f"{what}: {first} ({count} rows) and {', '.join(f'{value} ({n})' for value, n in others)}."]


def _tables(results: Mapping[tuple[str, str], Cell]) -> list[str]:
    attacks, defences = in_order(results)
    most = _most(results)
    accuracies = table.markdown(
        ["defence", *(_shown(a) for a in attacks), "noise", "calls", "s / 1,000 images"],
        [
            [
                defence,
                *(_mean(results[a, defence].accuracy, most) if (a, defence) in results else "–" for a in attacks),
                *_cost(next(results[a, defence] for a in attacks if (a, defence) in results)),
            ]
            for defence in defences
        ],
    )
    success = _won(
        results,
        "success",
        "Test images of other classes that the trigger, as strong as in training, has called its class (clean: by "
        "victims of clean data with the same defence, where it was measured)",
        lambda attack, defence: _success(results, attack, defence, most),
    )
    flipped = _won(
        results,
        "flipped",
        "Targets that are called what the attacker wants, one a seed (an attack has another for each seed, a file "
        "the same; clean is how often those of the attacks are called so by victims of clean data)",
        lambda attack, defence: _share(results[attack, defence].flipped),
    )
    return [accuracies, *_given_back(results), *success, *flipped]


def _given_back(results: Mapping[tuple[str, str], Cell]) -> list[str]:
    attacks, defences = in_order(results)
    biting = [a for a in attacks if bites(results, a)]
    lines = []
    for defence in defences:
        shares = [recovered(results, a, defence) for a in biting]
        if defence != CLEAN and any(share is not None for share in shares):
            keys = (CLEAN, defence), (CLEAN, CLEAN)
            means = _compared(*(results[key] for key in keys)) if all(key in results for key in keys) else None
            change = "–" if means is None else f"{means[0] - means[1]:+.1f}"
            lines.append([defence, *("–" if s is None else f"{round(s)} %" for s in shares), change])
    if not lines:
        return []
    title = (
        f"Of what a poison took, a defence gives back (poisons that take {BITES:.0f} points or more), and what it "
        "changes on clean data, in points; each over the seeds that all it compares have:"
    )
    return [title, table.markdown(["defence", *biting, "on clean data"], lines)]


def _won(results: Mapping[tuple[str, str], Cell], name: str, title: str, shown: Callable[[str, str], str]) -> list[str]:
    """Write the table of a field of `Cell` that some attacks have, with clean data where these have it too."""
    attacks, defences = in_order(results)
    having = [a for a in attacks if any(getattr(results[key], name) for key in results if key[0] == a)]
    if not set(having) - {CLEAN}:
        return []
    lines = [
        [d, *(shown(a, d) if (a, d) in results else "–" for a in having)]
        for d in defences
        if any((a, d) in results for a in having if a != CLEAN)
    ]
    return [f"{title}, in %:", table.markdown(["defence", *(_shown(a) for a in having)], lines)]


def _published(source: published.Published, attacks: Sequence[str], defences: Sequence[str]) -> list[str]:
    """Write the published figures of the attacks and defences that were measured, in a table of their own."""
    known = dict.fromkeys(column for values in source.figures.values() for column in values)
    # without the options of an attack, the level of the noise and the models
    bases = dict.fromkeys(attack.partition(" ")[0] for attack in attacks)
    columns = [column for base in bases for column in known if column.partition(" ")[0] == base]
    if not set(columns) - {CLEAN}:
        return []
    measured = {re.split("[@ ]", defence)[0] for defence in defences}
    if "eclipse" in measured:  # it may have one call here; what was published has a hundred
        measured.add("eclipse-100")
    lines = [
        [defence, *(" / ".join(f"{v:.2f}" for v in values[c]) if c in values else "–" for c in columns)]
        for defence, values in source.figures.items()
        if defence in measured and values.keys() & set(columns)
    ]
    if not lines:
        return []
    return [
        f"Published, on other poison files and another scale ({source.caption}):",
        table.markdown(["published", *(_shown(c) for c in columns)], lines),
    ]


def in_order(results: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Order the attacks and the defences of some cells: clean data first, defences as `DEFENCES` has them."""
    keys = list(results)
    return _order({attack for attack, _ in keys}, [CLEAN]), _order({defence for _, defence in keys}, list(DEFENCES))


def _order(names: set[str], first: Sequence[str]) -> list[str]:
    place = {name: i for i, name in enumerate(first)}

    def key(name: str) -> tuple[int, str, float]:
        base, px, rest = re.fullmatch(r"([^@ ]*)@?(\d*(?:\.\d+)?)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
        return place.get(base, len(place)), base + rest, float(px or 0)

    return sorted(names, key=key)


def _shown(attack: str) -> str:
    return "clean" if attack == CLEAN else attack


def _mean(values: Sequence[float], most: int) -> str:
    """Format a mean with the number of values, where that is more than one and fewer than `most`, as elsewhere."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    number = f" ({len(values)})" if 1 < len(values) < most else ""
    return f"{statistics.fmean(values):.1f}{spread}{number}"


def _success(results: Mapping[tuple[str, str], Cell], attack: str, defence: str, most: int) -> str:
    clean = results.get((CLEAN, defence))
    control = clean.clean_success.get(attack) if clean is not None else None
    shown = _mean(results[attack, defence].success, most)
    return f"{shown} (clean {statistics.fmean(control):.1f})" if control else shown


def _share(flipped: Sequence[float]) -> str:
    """Format a share of targets with their number: each is 0 or 100, so that a spread would say nothing more."""
    won = sum(value > 0 for value in flipped)
    return f"{statistics.fmean(flipped):.1f} ({won} of {len(flipped)})" if flipped else "–"


def _cost(cell: Cell) -> list[str]:
    noise = "–" if cell.sigma_px is None else f"{cell.sigma_px:g} px"
    return [noise, str(cell.calls), f"{1000 * cell.seconds:.3g}" if cell.seconds else "–"]
