"""Draw energies as a histogram. matplotlib is an extra, imported when a picture is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from purifyloader.audit.compare import FORMAT, VERSION
from purifyloader.audit.report import MEANING, in_words
from purifyloader.results.figures import new_figure, save_figure
from purifyloader.results.values import check_format

__all__ = ["picture"]

_WIDTH = 162  # characters of a line below
_COLOURS = {"reference": "#1a3f8f", "data": "#f2b134", "poisoned": "#d1603d"}
_GREY = "#555555"


def picture(results: Mapping[str, Any], path: str | Path) -> Path:
    """Draw the results of `audit_energy`, or their JSON, as a PNG at `path`; it needs matplotlib.

    >>> import torch
    >>> from purifyloader.audit import DatasetEnergies, audit_energy, picture
    >>> data = DatasetEnergies([0, 1], torch.tensor([0.1, 0.2]), [7, 8], [None] * 2, {(3, 32, 32): 2}, [b"", b""])
    >>> picture(audit_energy(data), "audit.png").name
    'audit.png'
    """
    check_format(results, [(FORMAT, VERSION)], "audit_energy")
    figure = new_figure((11, 6.8))
    axis = figure.add_axes((0.065, 0.36, 0.905, 0.57))
    _histogram(axis, results)
    lines = [line for sentence in in_words(results) for line in wrap(sentence, _WIDTH)]
    lines += ["", *wrap(MEANING, _WIDTH)]
    figure.text(0.065, 0.265, "\n".join(lines), va="top", fontsize=8.5, color=_GREY, linespacing=1.4)
    return save_figure(figure, path)


def _histogram(axis: Any, results: Mapping[str, Any]) -> None:
    histogram = results["histogram"]
    edges = np.asarray(histogram["edges"])
    description = results["data"].get("description")
    names = {"data": "your data", "reference": "clean reference", "poisoned": "known to be poisoned"}
    for name, shown in names.items():
        if name in histogram:
            counts = np.asarray(histogram[name])
            style: dict[str, Any] = {"fill": True, "alpha": 0.55} if name == "data" else {"lw": 1.8}
            of = f" ({description})" if name == "data" and description else ""
            label = f"{shown}{of}: {counts.sum():,} images"
            axis.stairs(100 * counts / counts.sum(), edges, color=_COLOURS[name], label=label, **style)
    if (comparison := results["comparison"]) is not None:
        axis.axvline(comparison["threshold"], color=_GREY, ls="--", lw=1.2, label="99th percentile of the reference")
    if beyond := {name: sum(counts) for name, counts in histogram["beyond"].items() if sum(counts)}:
        outside = ", ".join(f"{count:,} of {names[name]}" for name, count in beyond.items())
        axis.set_title(f"beyond the ends: {outside}, counted in the last bars", fontsize=9, color=_GREY, loc="right")
    model = results.get("model", {}).get("name") or "an energy model"
    axis.set_title(f"How unlike clean images: energies by {model}", fontsize=12, loc="left")
    temperature = results["energy"]["temperature"]
    axis.set(
        xlabel=f"energy, U = E / {temperature:g} (no unit; usual images left, unusual ones right)",
        ylabel="share of the images (%)",
    )
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}".replace("-", "\N{MINUS SIGN}"))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
