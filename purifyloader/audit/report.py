"""Report an audit in words and as a table, for people who know nothing of energy models."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from textwrap import wrap
from typing import Any

from purifyloader.audit.compare import percentiles, ranking
from purifyloader.audit.energies import DatasetEnergies
from purifyloader.energy.walking import TEMPERATURE
from purifyloader.results.table import plain

__all__ = ["MEANING", "in_words", "number", "ranked_csv", "sizes_in_words", "table"]

_WIDTH = 118

MEANING = (
    "A high energy says that the model finds an image unlike the clean ones it was trained on: unusual, noisy, full of "
    "fine detail, saturated, or poisoned. It is a reason to look, not a proof. A low energy is no proof either: a "
    "smooth or small poison may hardly raise it, and flat, blurred or strongly compressed images have low ones anyway."
)
"""Measured with a small energy model on CIFAR-10: noise of 4 px moves the median image to where a tenth of the clean
ones are, JPEG at quality 10 and blur lower it, and flat images lie below all others."""


def ranked_csv(
    data: DatasetEnergies,
    reference: DatasetEnergies | None = None,
    *,
    poisoned: Collection[int] | None = None,
    temperature: float = TEMPERATURE,
) -> str:
    """List all images as CSV, from the highest energy to the lowest, a line each.

    The columns are rank (from 1), index in the dataset, name and label (empty where there is none), energy (U =
    E / T) and, with a reference, percentile: percent of the reference's energies below it; with `poisoned`, 1 for
    those poisoned and 0 for the others.

    >>> import torch
    >>> from purifyloader.audit import DatasetEnergies, ranked_csv
    >>> data = DatasetEnergies([0, 1], torch.tensor([0.1, 0.2]), [7, 8], [None] * 2, {(3, 32, 32): 2}, [b"", b""])
    >>> print(ranked_csv(data, temperature=0.1), end="")
    rank,index,name,label,energy
    1,1,,8,2
    2,0,,7,1
    """
    values = data.values(temperature)
    columns: dict[str, Any] = {}
    if reference is not None:
        columns["percentile"] = percentiles(values, reference.values(temperature))
    if poisoned is not None:
        chosen = set(poisoned)
        columns["poisoned"] = [int(index in chosen) for index in data.indices]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["rank", "index", "name", "label", "energy", *columns])
    for rank, row in enumerate(ranking(values), start=1):
        name, label = data.names[row], data.labels[row]
        writer.writerow(
            [
                rank,
                data.indices[row],
                # a file name of bytes that are no text
                "" if name is None else name.encode("utf-8", "backslashreplace").decode(),
                "" if label is None else label,
                f"{values[row]:.8g}",
                *(f"{column[row]:.6g}" for column in columns.values()),
            ]
        )
    return out.getvalue()


def in_words(results: Mapping[str, Any]) -> Iterator[str]:
    """Write the comparison with the reference in sentences."""
    comparison = results["comparison"]
    if comparison is None:
        yield "No reference was given: the list is ranked, but nothing says what is usual among clean images."
        return
    above, halves = comparison["above"], comparison["halves"]
    yield (
        f"{above['count']:,} of {results['data']['count']:,} images ({_percent(above['share'])}) are above the "
        f"reference's 99th percentile, where {_percent(above['expected'])} of clean images are expected."
    )
    shapes = [_shapes(results[name]) for name in ("data", "reference")]
    if halves is not None:
        yield from _against_halves(above["share"], comparison["auc"], halves)
        if shapes[0] == shapes[1]:
            yield _verdict(above["share"], comparison["auc"], halves)
    if shapes[0] != shapes[1]:
        yield (
            f"Caution: the data has {sizes_in_words(shapes[0])}, the reference {sizes_in_words(shapes[1])}. Energies "
            "of different sizes do not compare, and this may be all that is unusual: give a size to bring all to."
        )
    if not all(results[name].get("trained_on_known", True) for name in ("data", "reference")):
        yield "Caution: it is not known whether the model was trained on some of these images, which lowers energies."
    if same := comparison["same_images"]:
        yield f"Caution: {same:,} images of the data are in the reference too, which makes the two look alike."


def _against_halves(share: float, data_auc: float, halves: Mapping[str, Any]) -> Iterator[str]:
    """Compare the data with clean images among themselves."""
    tail, whole = halves["share_above"], halves["auc"]
    judged = "more" if share > tail["high"] else "less" if share < tail["low"] else "no more"
    yield (
        f"That is {judged} than clean images vary among themselves: of a half of the reference ({halves['images']:,} "
        f"images, against the other {halves['against']:,}), {_percent(tail['low'])} to {_percent(tail['high'])} are."
    )
    side = "neither higher nor lower"
    if not whole["low"] <= data_auc <= whole["high"]:
        side = "higher" if data_auc > whole["high"] else "lower"
    yield (
        f"As a whole its energies are {side}: an image of the data is above one of the reference in "
        f"{_percent(data_auc)} of pairs (of two halves of the reference: {_percent(whole['low'])} to "
        f"{_percent(whole['high'])})."
    )


def _verdict(share: float, data_auc: float, halves: Mapping[str, Any]) -> str:
    if share > halves["share_above"]["high"]:
        return (
            "So some of the data is unlike the reference: poison, or images of another kind. Look at the top of the "
            "list."
        )
    if data_auc > halves["auc"]["high"]:
        return (
            "So the data as a whole differs from the reference: images of another kind, or a poison in many of them "
            "that moves each a little. Look at the top of the list first."
        )
    if data_auc < halves["auc"]["low"]:
        return "So the data is of another kind than the reference: smoother, more compressed, or trained on."
    return "By this measure the data cannot be told from the reference, which does not prove it clean."


def _shapes(described: Mapping[str, Any]) -> set[tuple[int, ...]]:
    return {tuple(map(int, shape.split("x"))) for shape in described["shapes"]}


def sizes_in_words(shapes: Iterable[tuple[int, ...]]) -> str:
    """Name the sizes of images of these shapes (C, H, W)."""
    sizes = sorted({(width, height) for _, height, width in shapes})
    return f"{sizes[0][0]} × {sizes[0][1]} px" if len(sizes) == 1 else f"{len(sizes)} sizes"


def number(value: float, spread: float | None) -> str:
    """Format an energy, to a thousandth of how much energies spread."""
    digits = 2 - math.floor(math.log10(spread)) if spread else 4
    return f"{value:,.{min(max(0, digits), 9)}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(results: Mapping[str, Any], data: DatasetEnergies, reference: DatasetEnergies | None) -> Iterator[str]:
    """List the lines that the command prints."""
    temperature = results["energy"]["temperature"]
    yield (
        f"{results['model']['name'] or 'An energy model'}, weights {results['model']['weights_sha256'][:12]}: "
        f"{results['data']['count']:,} images of {results['data']['description']}"
    )
    yield f"Energies are U = E / {temperature:g}: no unit and no zero, only differences count."
    yield ""
    spread = (results["reference"] or results["data"])["energy"]["standard_deviation"]
    quantiles = {"0.01": "1 %", "0.25": "25 %", "0.5": "median", "0.75": "75 %", "0.99": "99 %"}
    shown = [("data", results["data"]), ("reference", results["reference"]), ("poisoned", results["truth"])]
    rows = []
    for name, part in shown:
        if part is not None:
            count = part["poisoned"] if name == "poisoned" else part["count"]
            values = part["energy"]["quantiles"]
            rows.append([name, f"{count:,}", *(number(values[q], spread) for q in ("0", *quantiles, "1"))])
    yield from plain(["energy", "images", "lowest", *quantiles.values(), "highest"], rows)
    yield ""
    for sentence in in_words(results):
        yield from wrap(sentence, _WIDTH)
    if (comparison := results["comparison"]) is not None:
        yield (
            f"That 99th percentile as a threshold of EnergyAbove, which takes E: {comparison['threshold_energy']:.9g}"
        )
    if (truth := results["truth"]) is not None:
        yield ""
        measured_auc = "-" if truth["auc"] is None else f"{truth['auc']:.3f}"
        yield (
            f"Of the {truth['poisoned']:,} images known to be poisoned (AUC of the energy as a detector: "
            f"{measured_auc}):"
        )
        rows = []
        for top in truth["top"]:
            counts = [f"top {top['percent']:g} %", f"{top['flagged']:,}", f"{top['poisoned']:,}"]
            rows.append([*counts, _percent(top["of_flagged"]), _percent(top["of_poisoned"])])
        yield from plain(["flagged", "images", "poisoned", "of flagged", "of poisoned"], rows)
    yield ""
    yield from _highest(data, reference, temperature, spread)
    yield ""
    yield from wrap(MEANING, _WIDTH)


def _highest(
    data: DatasetEnergies,
    reference: DatasetEnergies | None,
    temperature: float,
    spread: float | None,
    count: int = 10,
) -> Iterator[str]:
    values = data.values(temperature)
    order = ranking(values)[:count]
    columns = {
        "rank": [str(rank + 1) for rank in range(len(order))],
        "index": [str(data.indices[row]) for row in order],
        "energy": [number(values[row], spread) for row in order],
    }
    if reference is not None:
        below = percentiles(values[order], reference.values(temperature))
        columns["percentile"] = [f"{percent:.1f}" for percent in below]
    if any(data.labels[row] is not None for row in order):
        columns["label"] = [str("-" if data.labels[row] is None else data.labels[row]) for row in order]
    if any(data.names[row] is not None for row in order):
        columns["name"] = [data.names[row] or "-" for row in order]
    yield "Highest energies" + (", and the percent of the reference below" if reference is not None else "")
    rows = [list(cells) for cells in zip(*columns.values(), strict=True)]
    yield from plain(list(columns), rows, text_last="name" in columns)
