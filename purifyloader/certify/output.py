"""Write certificates to a folder: the figures as JSON, a page and a picture.

matplotlib is an extra, imported when the picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import Any

from purifyloader.certify.report import check_results, markdown
from purifyloader.core.checks import as_path
from purifyloader.files.atomic import canonical_json
from purifyloader.results.figures import has_matplotlib, new_figure, save_figure
from purifyloader.results.folder import Written, write_files

__all__ = ["PAGE_FILE", "PICTURE_FILE", "RESULTS_FILE", "curves", "write"]

RESULTS_FILE, PAGE_FILE, PICTURE_FILE = "certificates.json", "README.md", "certified.png"

_COLOURS = ("#1a3f8f", "#d1603d", "#3b8c6e", "#7a5195", "#f2b134", "#2ea3c9", "#8c8c8c", "#5a6b2e", "#c06c9a")
_GREY = "#555555"
_SEVERAL = 10  # images that share the radius of the upper axis
# conditions of one panel and one sigma are told apart by the second and third; a plain one is never a solid line
_LINES: dict[bool, tuple[Any, ...]] = {False: ("-", (0, (8, 1.5)), (0, (8, 1.5, 1, 1.5))), True: ("--", ":", "-.")}
_TITLES = {False: "noise and denoise", True: "noise alone"}
# inches
_PANEL, _TALL = 5.0, 3.3
_LEFT, _RIGHT, _GAP, _TOP, _AXIS, _EDGE = 0.7, 0.25, 0.35, 0.8, 0.55, 0.12
_ENTRY, _LINE = 0.18, 0.17  # of a legend, and of the caption
_LONGEST = 56  # letters of a name below a panel


def write(results: Mapping[str, Any], folder: str | Path) -> Written:
    """Write `purifyloader.certify.report.results`, a page and, with matplotlib, a picture; see `write_files`."""
    page = markdown(results, picture=PICTURE_FILE if has_matplotlib() else None)
    texts = {RESULTS_FILE: canonical_json(results) + "\n", PAGE_FILE: page}
    return write_files(as_path(folder), texts, PICTURE_FILE, lambda path: curves(results, path))


def curves(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw certified accuracy against the radius as a PNG, whole or not at all: Figure 1 of the paper.

    A line a condition, a colour a sigma, and a panel each for noise that is taken off again and for noise that is
    not. A dot at radius 0 is the accuracy of the vote. Conditions without a certificate are named, and not drawn.
    `results` are of `purifyloader.certify.report.results`, or read from their JSON.
    """
    check_results(results)
    certified = [condition for condition in results["conditions"] if condition["certificate"] is not None]
    without = [condition["name"] for condition in results["conditions"] if condition["certificate"] is None]
    colours = dict(zip(sorted({condition["sigma"] for condition in certified}), cycle(_COLOURS), strict=False))
    kinds = [plain for plain in (False, True) if any(condition["plain"] is plain for condition in certified)]
    panels = [[condition for condition in certified if condition["plain"] is plain] for plain in kinds]
    across = max(1, len(panels))
    width = _LEFT + _PANEL * across + _GAP * (across - 1) + _RIGHT
    caption = _caption(without, bool(certified), width)
    if not certified:
        _nothing(caption, width, path)
        return
    below = _AXIS + _ENTRY * max(len(panel) for panel in panels) + _EDGE + _LINE * len(caption) + _EDGE
    height = _TOP + _TALL + below
    figure = new_figure((width, height))
    axes = [
        figure.add_axes(
            ((_LEFT + i * (_PANEL + _GAP)) / width, below / height, _PANEL / width, _TALL / height),
            **({"sharex": figure.axes[0], "sharey": figure.axes[0]} if i else {}),
        )
        for i in range(across)
    ]
    for axis, panel, plain in zip(axes, panels, kinds, strict=True):
        _draw_lines(axis, panel, colours, plain)
        _dress(axis, _TITLES[plain])
    best = max(condition["certificate"]["best_radius"] for condition in certified)
    axes[0].set_xlim(0, 1.04 * (max(map(_end, certified)) or best))  # the best may be far beyond all lines
    top = max(max(condition["vote"]["accuracy"], condition["certificate"]["certified"]) for condition in certified)
    axes[0].set_ylim(0, min(100, 10 * math.ceil((top + 3) / 10)))
    for axis in axes[1:]:
        axis.tick_params("y", labelleft=False)
    axes[0].set_ylabel("test inputs, %")
    _write(figure, caption)
    save_figure(figure, path)


def _draw_lines(axis: Any, conditions: Sequence[Mapping[str, Any]], colours: Mapping[float, str], plain: bool) -> None:
    styles = {sigma: cycle(_LINES[plain]) for sigma in colours}
    for condition in conditions:
        colour, line = colours[condition["sigma"]], next(styles[condition["sigma"]])
        name = condition["name"] if len(condition["name"]) <= _LONGEST else condition["name"][: _LONGEST - 1] + "…"
        radii, accuracy = condition["curve"]["radii"], condition["curve"]["accuracy"]
        drawn = sum(radius <= _end(condition) for radius in radii)  # radii rise
        # Between two radii it is what it is at the smaller one. The space is for a name that begins with an
        # underscore, which a legend leaves out.
        axis.step(radii[:drawn], accuracy[:drawn], where="post", color=colour, ls=line, lw=1.7, label=f" {name}")
        axis.plot([0], [condition["vote"]["accuracy"]], "o", color=colour, ms=5, clip_on=False, zorder=5)
    legend = axis.legend(
        loc="upper left",
        bbox_to_anchor=(0, -_AXIS / _TALL),
        borderaxespad=0,
        borderpad=0,
        frameon=False,
        fontsize=8.5,
        handlelength=3.2,
        labelspacing=0.35,
    )
    for text in legend.get_texts():  # dollars in a name are no formula
        text.set_parse_math(False)


def _end(condition: Mapping[str, Any]) -> float:
    """Return the radius at which nothing is left."""
    curve = condition["curve"]
    return float(curve["radii"][curve["accuracy"].index(0.0)])


def _dress(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=11, pad=10)
    axis.set_xlabel("radius: l2 of all changes together, images in [0, 1]", fontsize=9)
    each = axis.secondary_xaxis(
        "top", functions=(lambda r: r / math.sqrt(_SEVERAL), lambda one: one * math.sqrt(_SEVERAL))
    )
    each.set_xlabel(f"l2 of each of {_SEVERAL} changed images", fontsize=8, color=_GREY)
    each.tick_params(labelsize=8, colors=_GREY)
    each.spines[:].set_color(_GREY)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)


def _caption(without: Sequence[str], certified: bool, width: float) -> list[str]:
    sentences = []
    if certified:
        sentences.append(
            "Lines: right, and still so after any change of the training images of that norm. Dots at 0: right by the "
            "vote, certified or not."
        )
    if without:
        sentences.append(f"No certificate: {', '.join(without)}.")
    return [line for sentence in sentences for line in wrap(sentence, int(15.5 * (width - _LEFT - _RIGHT)))]


def _write(figure: Any, caption: Sequence[str]) -> None:
    width, height = figure.get_size_inches()
    at = _LEFT / width, _EDGE / height
    figure.text(*at, "\n".join(caption), va="bottom", fontsize=8, color=_GREY, linespacing=1.4, parse_math=False)


def _nothing(caption: Sequence[str], width: float, path: str | Path) -> None:
    height = 0.75 + _LINE * len(caption) + 2 * _EDGE
    figure = new_figure((width, height))
    figure.text(_LEFT / width, 1 - 0.35 / height, "Nothing to draw", va="center", fontsize=11)
    _write(figure, caption)
    save_figure(figure, path)
