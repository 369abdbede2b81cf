"""Pictures of a bench. matplotlib is an extra, imported when one is drawn."""

from __future__ import annotations

import itertools
import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.bench.report import CLEAN, cells, in_order, recovered
from purifyloader.bench.rows import Row
from purifyloader.errors import PurifyError
from purifyloader.files import replacing

__all__ = ["accuracies", "costs", "images", "noise", "noise_levels"]

_DPI = 110
_COLOURS = (
    *("#1a3f8f", "#f2b134", "#d1603d", "#3b8c6e", "#7a5195"),
    *("#8c8c8c", "#2ea3c9", "#b8572e", "#5a6b2e", "#c06c9a"),
)
_GREY = "#555555"
_THIN = {"lw": 0.8}
_ACROSS, _BAR = 4, 0.19  # panels in a line, and inches of a bar
_MANY = 0.7  # share of the most defences that a poison must have been measured with to be in a mean
_GAIN = 8  # residuals are drawn that much stronger


def accuracies(rows: Sequence[Row], path: str | Path) -> None:
    """A panel an attack, a bar a defence; a whisker is the standard deviation over the seeds."""
    found = cells(rows)
    attacks, defences = in_order(found)
    colours = {defence: _COLOURS[i % len(_COLOURS)] for i, defence in enumerate(defences)}
    across = min(_ACROSS, len(attacks))
    shown = {a: [d for d in reversed(defences) if (a, d) in found] for a in attacks}  # the first on top
    lines = [attacks[i : i + across] for i in range(0, len(attacks), across)]
    rows_of = {a: max(len(shown[b]) for b in line) for line in lines for a in line}
    heights = [0.75 + _BAR * rows_of[line[0]] for line in lines]
    figure = _figure((0.4 + 3.5 * across, 0.5 + sum(heights)))
    grid = figure.subplots(len(lines), across, squeeze=False, sharex=True, height_ratios=heights)
    for axis, attack in itertools.zip_longest(grid.flat, attacks):
        if attack is None:
            axis.set_visible(False)
            continue
        accuracy = [found[attack, d].accuracy for d in shown[attack]]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in accuracy]
        means = [statistics.fmean(values) for values in accuracy]
        axis.barh(
            range(len(means)), means, 0.75, xerr=spread, color=[colours[d] for d in shown[attack]], error_kw=_THIN
        )
        axis.set_yticks(range(len(means)), shown[attack], fontsize=8)
        axis.set_ylim(len(means) - rows_of[attack] - 0.4, len(means) - 0.4)  # bars of one width, from the top
        if (CLEAN, CLEAN) in found:
            axis.axvline(statistics.fmean(found[CLEAN, CLEAN].accuracy), color=_GREY, lw=0.8, ls="--")
        axis.set_title("\n".join(textwrap.wrap("clean" if attack == CLEAN else attack, 34)), fontsize=9)
        axis.set_xlim(0, 100)
        axis.tick_params("x", labelbottom=True, labelsize=8)
        _plain(axis, "x")
    figure.supxlabel("accuracy on clean test images, %; dashed: clean data, undefended", fontsize=9)
    figure.tight_layout()
    _save(figure, path)


def costs(rows: Sequence[Row], path: str | Path) -> None:
    """Accuracy, a mean over poisons, against the seconds that an image takes.

    Of the poisons that bite, where some do, those that most defences were measured with, and the defences that were
    measured with all of these: a mean over others would not compare.
    """
    found = cells(rows)
    biting = {a for a, _ in found if recovered(found, a, CLEAN) is not None} or {a for a, _ in found if a != CLEAN}
    counts = {a: sum(key[0] == a for key in found) for a in biting or {CLEAN}}
    every = {a for a, count in counts.items() if count >= _MANY * max(counts.values())}
    figure = _figure((8, 5))
    axis = figure.add_axes((0.1, 0.13, 0.86, 0.8))
    for i, defence in enumerate(in_order(found)[1]):
        its = {a: found[a, defence] for a in every if (a, defence) in found}
        if its.keys() != every:
            continue
        level = statistics.fmean(statistics.fmean(cell.accuracy) for cell in its.values())
        seconds = max(1e-6, statistics.median(cell.seconds for cell in its.values()))
        axis.plot(seconds, level, "o", color=_COLOURS[i % len(_COLOURS)])
        axis.annotate(defence, (seconds, level), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * (high / low) ** 0.14)  # room for the names of the slowest
    axis.set_xlabel("seconds to purify an image (1 microsecond: none)")
    axis.set_ylabel("\n".join(textwrap.wrap(f"accuracy in %, mean over {', '.join(sorted(every))}", 60)))
    _plain(axis)
    _save(figure, path)


def noise_levels(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, list[float]]]]]:
    """defence → attack → (standard deviation of the noise in px, accuracies of all seeds), rising.

    Of the defences that were measured at two levels of noise or more, with `NAME@PX`.
    """
    found: dict[str, dict[str, list[tuple[float, list[float]]]]] = {}
    for (attack, defence), cell in cells(rows).items():
        if cell.sigma_px is not None:
            base = re.sub(r"@[\d.]+", "", defence)
            found.setdefault(base, {}).setdefault(attack, []).append((cell.sigma_px, cell.accuracy))
    curves = {
        base: {attack: sorted(points) for attack, points in its.items() if len(points) > 1}
        for base, its in found.items()
    }
    return {base: its for base, its in curves.items() if its}


def noise(rows: Sequence[Row], path: str | Path) -> bool:
    """Accuracy against the level of the noise: a panel a defence, a line an attack. Says whether there was one."""
    curves = noise_levels(rows)
    if not curves:
        return False
    clean = cells(rows).get((CLEAN, CLEAN))
    attacks = in_order({(attack, CLEAN) for its in curves.values() for attack in its})[0]
    figure = _figure((1.5 + 5.2 * len(curves), 4.6))
    for axis, (defence, its) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        levels = sorted({px for points in its.values() for px, _ in points})
        for attack in (a for a in attacks if a in its):
            points = its[attack]
            again, colour = divmod(attacks.index(attack), len(_COLOURS))
            style = {"color": _COLOURS[colour], "marker": "so"[not again], "ls": "--" if again else "-"}
            means = [statistics.fmean(values) for _, values in points]
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
            name = "clean" if attack == CLEAN else attack
            axis.errorbar([px for px, _ in points], means, spread, ms=4, lw=1.4, label=name, **style)
        if clean is not None:
            axis.axhline(statistics.fmean(clean.accuracy), color=_GREY, lw=0.8, ls="--")
        axis.set_xscale("log")
        axis.set_xticks(levels, [f"{px:g}" for px in levels])
        axis.minorticks_off()
        axis.set_xlabel("standard deviation of the noise, px")
        axis.set_title(defence, fontsize=10)
        _plain(axis)
    figure.axes[0].set_ylabel("accuracy on clean test images, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=math.ceil(len(labels) / 2), fontsize=8, frameon=False)
    figure.subplots_adjust(0.75 / figure.get_figwidth(), 0.24, 0.98, 0.92, 0.15)
    _save(figure, path)
    return True


def images(
    shown: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]], defence: str, path: str | Path
) -> None:
    """Some images before and after, with what the poison added and what is left.

    Args:
        shown: attack → the same few images (clean, poisoned, purified), uint8 (N, H, W, 3).
        defence: what purified them.
    """
    figure = _figure((10.2, 1.95 * len(shown) + 0.4))
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
    _save(figure, path)


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


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PurifyError(
            "A picture needs matplotlib. Got a Python without it: pip install 'purifyloader[plots]'."
        ) from None
    return Figure(figsize=size, dpi=_DPI)


def _plain(axis: Any, values: str = "y") -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(axis=values, color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)


def _save(figure: Any, path: str | Path) -> None:
    path = Path(path)
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    except OSError as error:
        raise PurifyError(f"Expected to write {path}. Got: {error}. Give a path that can be written to.") from error
