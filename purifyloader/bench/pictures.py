"""Draw pictures of a bench. matplotlib is an extra, imported when one is drawn."""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.bench.report import CLEAN, bites, cells, in_order, settings_of
from purifyloader.results.figures import new_figure, save_figure
from purifyloader.results.rows import Row

__all__ = ["accuracies", "costs", "images", "noise", "noise_levels"]

_COLOURS = (
    *("#1a3f8f", "#f2b134", "#d1603d", "#3b8c6e", "#7a5195"),
    *("#8c8c8c", "#2ea3c9", "#b8572e", "#5a6b2e", "#c06c9a"),
)
_MARKS = "osD^"  # of the points of the first colours, and of these again; lines take them in turn
_GREY = "#555555"
_CELL, _LINE, _LETTER, _NAME = 0.42, 0.22, 0.068, 34  # inches of a cell and of a letter, letters of a line
_ANGLE = 60  # of the names above
_NOTE = 0.17  # inches of a line below a picture
_HEIGHT, _PANEL = 5.2, 5.2  # inches of a picture of axes, and of the width of each
_UNDEFENDED = "clean, no defence"
_SLANT = math.cos(math.radians(_ANGLE)), math.sin(math.radians(_ANGLE))
_DARK = 0.6  # of the undefended accuracy: numbers above it are white
_MANY = 0.7  # share of the most defences that a poison must have been measured with to be in a mean
_GAIN = 8  # residuals are drawn that much stronger


def accuracies(rows: Sequence[Row], path: str | Path) -> None:
    """Draw a grid: a line a defence, a column an attack, and in each cell the mean accuracy over the seeds.

    The colour is the accuracy: the darker, the nearer to that of clean data without a defence.
    """
    results = cells(rows)
    attacks, defences = in_order(results)
    levels = np.full((len(defences), len(attacks)), np.nan)
    for (attack, defence), cell in results.items():
        levels[defences.index(defence), attacks.index(attack)] = statistics.fmean(cell.accuracy)
    names = ["\n".join(textwrap.wrap("clean" if attack == CLEAN else attack, _NAME)) for attack in attacks]
    notes = _setting(rows), "accuracy on clean test images in %, by training data and defence; white: not measured"
    lengths = [_LETTER * max(map(len, name.split("\n"))) for name in names]
    left, above = 0.25 + _LETTER * max(map(len, defences)), 0.3 + _SLANT[1] * max(lengths)
    # the names of the last columns lean out to the right
    beyond = max(_SLANT[0] * length - _CELL * i for i, length in enumerate(reversed(lengths)))
    width = max(left + _CELL * len(attacks) + max(0.1, beyond), 0.3 + _LETTER * max(map(len, notes)))
    below = 0.25 + _NOTE * len(notes)
    height = above + _LINE * len(defences) + below
    figure = new_figure((width, height))
    axis = figure.add_axes((left / width, below / height, _CELL * len(attacks) / width, 1 - (above + below) / height))
    top = levels[0, 0] if (CLEAN, CLEAN) in results else np.nanmax(levels)
    axis.imshow(levels, cmap="YlGnBu", vmin=0, vmax=1.15 * top, aspect="auto")
    for (line, column), level in np.ndenumerate(levels):
        if not np.isnan(level):
            colour = "white" if level > _DARK * top else "black"
            axis.text(column, line, f"{level:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(attacks)), names, rotation=_ANGLE, ha="left", rotation_mode="anchor", fontsize=8)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(defences)), defences, fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    _say(figure, *notes)
    save_figure(figure, path)


def costs(rows: Sequence[Row], path: str | Path) -> None:
    """Draw accuracy, a mean over poisons, against the seconds that an image takes.

    The poisons are those that bite, where some do, and that most defences were measured with; the defences are those
    that were measured with all of these: a mean over others would not compare.
    """
    results = cells(rows)
    biting = {a for a, _ in results if bites(results, a)} or {a for a, _ in results if a != CLEAN}
    counts = {a: sum(key[0] == a for key in results) for a in biting or {CLEAN}}
    every = {a for a, count in counts.items() if count >= _MANY * max(counts.values())}
    defences = in_order(results)[1]
    measured: dict[str, tuple[float, float]] = {}
    for defence in defences:
        measured_cells = {a: results[a, defence] for a in every if (a, defence) in results}
        if measured_cells.keys() == every:
            level = statistics.fmean(statistics.fmean(cell.accuracy) for cell in measured_cells.values())
            measured[defence] = max(1e-6, statistics.median(cell.seconds for cell in measured_cells.values())), level
    labels = {defence: f"{defence}, {level:.1f} %" for defence, (_, level) in measured.items()}
    width = 7.2 + _LETTER * max(map(len, labels.values()), default=0)
    figure = new_figure((width, _HEIGHT))
    axis = figure.add_axes((0.8 / width, 0.85 / _HEIGHT, 5.8 / width, 1 - 1.05 / _HEIGHT))
    for defence in sorted(measured, key=lambda name: -measured[name][1]):  # the legend has the best on top
        again, colour = divmod(defences.index(defence), len(_COLOURS))
        seconds, level = measured[defence]
        axis.plot(seconds, level, _MARKS[again % len(_MARKS)], color=_COLOURS[colour], label=labels[defence])
    axis.set_xscale("log")
    axis.set_xlabel("seconds to purify an image (1 microsecond: none)")
    axis.set_ylabel("\n".join(textwrap.wrap(f"accuracy in %, mean over {', '.join(sorted(every))}", 60)))
    _plain(axis)
    figure.legend(loc="center left", bbox_to_anchor=(6.7 / width, 0.55), fontsize=8, frameon=False)
    _say(figure, _setting(rows))
    save_figure(figure, path)


def noise_levels(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, list[float]]]]]:
    """Map defence → attack → (standard deviation of the noise in px, accuracies of all seeds), rising.

    The defences are those that were measured at two levels of noise or more, with `NAME@PX`.
    """
    results: dict[str, dict[str, list[tuple[float, list[float]]]]] = {}
    for (attack, defence), cell in cells(rows).items():
        if cell.sigma_px is not None:
            base = re.sub(r"@[\d.]+", "", defence)
            results.setdefault(base, {}).setdefault(attack, []).append((cell.sigma_px, cell.accuracy))
    curves = {
        base: {attack: sorted(points) for attack, points in by_attack.items() if len(points) > 1}
        for base, by_attack in results.items()
    }
    return {base: by_attack for base, by_attack in curves.items() if by_attack}


def noise(rows: Sequence[Row], path: str | Path) -> bool:
    """Draw accuracy against the level of the noise: a panel a defence, a line an attack. False where there is none."""
    curves = noise_levels(rows)
    if not curves:
        return False
    clean = cells(rows).get((CLEAN, CLEAN))
    attacks = in_order({(attack, CLEAN) for by_attack in curves.values() for attack in by_attack})[0]
    names = ["\n".join(textwrap.wrap("clean" if attack == CLEAN else attack, _NAME)) for attack in attacks]
    left = 0.8 + _PANEL * len(curves)
    lengths = [len(line) for name in (*names, _UNDEFENDED) for line in name.split("\n")]
    width = left + 0.8 + _LETTER * max(lengths)
    figure = new_figure((width, _HEIGHT))
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    lines: dict[str, Any] = {}  # a panel may lack some attacks
    for axis, (defence, by_attack) in zip(panels, curves.items(), strict=True):
        levels = sorted({px for points in by_attack.values() for px, _ in points})
        for i, (attack, name) in enumerate(zip(attacks, names, strict=True)):
            if attack not in by_attack:
                continue
            points = by_attack[attack]
            again, colour = divmod(i, len(_COLOURS))
            style = {"color": _COLOURS[colour], "marker": _MARKS[i % len(_MARKS)], "ls": "--" if again else "-"}
            means = [statistics.fmean(values) for _, values in points]
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
            lines[name] = axis.errorbar([px for px, _ in points], means, spread, ms=5, lw=1.4, label=name, **style)
        if clean is not None:
            lines[_UNDEFENDED] = axis.axhline(statistics.fmean(clean.accuracy), color=_GREY, lw=0.8, ls="--")
        axis.set_xscale("log")
        axis.set_xticks(levels, [f"{px:g}" for px in levels])
        axis.minorticks_off()
        axis.set_xlabel("standard deviation of the noise, px")
        axis.set_title(defence, fontsize=10)
        _plain(axis)
    panels[0].set_ylabel("accuracy on clean test images, %")
    order = [name for name in (*names, _UNDEFENDED) if name in lines]
    legend = {"loc": "center left", "bbox_to_anchor": (left / width, 0.55), "fontsize": 8, "frameon": False}
    figure.legend([lines[name] for name in order], order, **legend)
    figure.subplots_adjust(0.8 / width, 0.85 / _HEIGHT, (left - 0.1) / width, 1 - 0.35 / _HEIGHT, 0.08)
    _say(figure, _setting(rows))
    save_figure(figure, path)
    return True


def images(
    shown: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]], defence: str, path: str | Path
) -> None:
    """Draw some images before and after a defence, with the poison's change and the rest of it.

    `shown` has the same few images (clean, poisoned, purified), uint8 (N, H, W, 3), for each attack.
    """
    figure = new_figure((10.2, 1.95 * len(shown) + 0.4))
    titles = ("clean", "poisoned", f"poison × {_GAIN}", f"after {defence}", f"after - clean, × {_GAIN}")
    top = 1 - 0.3 / (1.95 * len(shown) + 0.4)
    axes = figure.subplots(len(shown), len(titles), squeeze=False)
    figure.subplots_adjust(0.04, 0.01, 0.99, top, 0.05, 0.05)
    for row, (attack, (clean, before, after)) in enumerate(shown.items()):
        panels = (clean, before, _residual(before, clean), after, _residual(after, clean))
        for axis, panel, title in zip(axes[row], panels, titles, strict=True):
            axis.imshow(_mosaic(panel), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(title, fontsize=9)
        axes[row][0].set_ylabel(attack, fontsize=9)
    save_figure(figure, path)


def _residual(images: NDArray[np.uint8], clean: NDArray[np.uint8]) -> NDArray[np.uint8]:
    difference = images.astype(np.int16) - clean
    return np.clip(128 + _GAIN * difference, 0, 255).astype(np.uint8)


def _mosaic(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    side = math.ceil(math.sqrt(len(images)))
    height, width, channels = images.shape[1:]
    out = np.full((side * height, side * width, channels), 255, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, side)
        out[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return out


def _setting(rows: Sequence[Row]) -> str:
    at = settings_of(rows[0])
    return f"{at.data}, {at.images:,} images, {at.victim}, training {at.training}"


def _say(figure: Any, *lines: str) -> None:
    """Write grey lines at the foot of a picture."""
    width, height = figure.get_size_inches()
    figure.text(0.15 / width, 0.12 / height, "\n".join(lines), fontsize=8, color=_GREY, va="bottom")


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
