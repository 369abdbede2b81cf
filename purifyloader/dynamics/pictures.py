"""Draw dynamics as one picture: distances on the left, energies on the right, a row for each attack.

Of a proposal, the levels proposed are marked, and a row on top has what they were chosen by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from purifyloader.dynamics.measuring import FORMAT, VERSION
from purifyloader.dynamics.tuning import FORMAT as TUNE_FORMAT
from purifyloader.dynamics.tuning import VERSION as TUNE_VERSION
from purifyloader.results.figures import new_figure, save_figure
from purifyloader.results.values import attack_label, check_format

__all__ = ["picture"]

_CLEAN, _WASHED, _AWAY, _GREY = "#1f6fb4", "#2e8b57", "#e67e22", "#666666"  # the paper's blue, green and orange
_PROPOSED = "#8e44ad"
_CURVES = ("#b8860b", "#17828c", "#8c510a", "#c51b7d", "#4d4d4d")
_MOST_TICKS = 9


def picture(results: Mapping[str, Any], path: str | Path) -> Path:
    """Draw the results of `dynamics` or `tune`, or their JSON, as a PNG at `path`; it needs matplotlib.

    >>> import torch
    >>> from purifyloader.dynamics import LangevinPath, dynamics, picture
    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
    >>> path = LangevinPath(EnergyNetwork(EnergyConfig(channels=8)).eval(), steps=[1, 2], compute_batch=16)
    >>> clean = torch.full((2, 3, 16, 16), 99, dtype=torch.uint8)
    >>> picture(dynamics(path, clean), "dynamics.png").name
    'dynamics.png'
    """
    kind = check_format(results, [(FORMAT, VERSION), (TUNE_FORMAT, TUNE_VERSION)], "dynamics or tune")
    tuned = results if kind == TUNE_FORMAT else None
    results = results if tuned is None else tuned["curves"]
    names: list[str | None] = sorted(results["poisons"]) or [None]
    columns = 1 if results["energy"] is None else 2
    first = 0 if tuned is None else 1
    rows = first + len(names)
    figure = new_figure((7.2 * columns, 0.6 + 4.5 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    figure.suptitle(_title(results, columns), fontsize=12, x=0.01, ha="left")
    grid = figure.add_gridspec(rows, columns)
    if tuned is not None:
        _shares(figure.add_subplot(grid[0, :]), tuned)
    for row, name in enumerate(names, start=first):
        _distances(figure.add_subplot(grid[row, 0]), results, name)
        if columns == 2:
            _energies(figure.add_subplot(grid[row, 1]), results, name)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        if tuned is not None:
            _mark(axis, tuned)
    return save_figure(figure, path)


def _title(results: Mapping[str, Any], columns: int) -> str:
    purification, data = results["purification"], results.get("data", {}).get("description")
    how = "Langevin steps" if purification["kind"] == "langevin" else "diffusion"
    text = f"Purification by {how} with {purification['model']['name'] or 'a model'}" + ("," if columns == 2 else "\n")
    return f"{text} {results['images']['count']:,} images{f' of {data}' if data else ''}"


def _proposals(tuned: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Find where on the axis each proposed level lies, and its line."""
    at, _ = _positions(tuned["curves"])
    levels = [level["level"] for level in tuned["curves"]["levels"]]
    styles = {"proposal": ("the proposal", "-"), "with_compensation": ("with compensation", "--")}
    return {
        what: (at[levels.index(tuned[key]["level"])], style)
        for key, (what, style) in styles.items()
        if tuned[key] is not None
    }


def _mark(axis: Any, tuned: Mapping[str, Any]) -> None:
    for where, style in _proposals(tuned).values():
        # below the legend, and whole at the last level
        axis.axvline(where, ymax=0.82, color=_PROPOSED, ls=style, lw=1.5, zorder=1, clip_on=False)


def _shares(axis: Any, tuned: Mapping[str, Any]) -> None:
    """Draw what a level is chosen by: the share of the images of each attack that have come closer to clean."""
    results = tuned["curves"]
    at = _over_levels(axis, results)
    for name, colour in zip(sorted(results["poisons"]), cycle(_CURVES), strict=False):
        closer = [100 * level["poisoned"][name]["closer_to_clean"] for level in results["levels"]]
        axis.plot(at, closer, color=colour, lw=2, marker="o", ms=3, label=attack_label(name))
    axis.axhline(100 * tuned["share"], color=_GREY, ls=":", lw=1.5, label=f"asked for: {100 * tuned['share']:g} %")
    for what, (where, style) in _proposals(tuned).items():
        axis.plot([], [], color=_PROPOSED, ls=style, lw=1.5, label=f"{what}: {where:.4g}")
    title = "Images that have come closer to clean than to poisoned"
    axis.set_title(title if tuned["proposal"] is not None else f"{title}: no level proposed", fontsize=10.5, loc="left")
    axis.set_ylabel("share of the images (%)")
    axis.set_ylim(0, 124)  # room for the legend
    axis.set_yticks(range(0, 101, 20))
    axis.legend(frameon=False, fontsize=9, loc="upper left", ncols=3)


def _positions(results: Mapping[str, Any]) -> tuple[list[float], str]:
    """Find where the levels lie on the axis, and its label."""
    purification, levels = results["purification"], results["levels"]
    if purification["unit"] == "noise sigma":
        return [level.get("sigma_px", 0.0) for level in levels], "noise (px of 255)"
    at = [level["level"] for level in levels]
    if purification["kind"] == "langevin":
        return at, "Langevin steps"
    schedule = purification["schedule"]
    return at, f"timestep t, {schedule['kind']} schedule, T = {schedule['timesteps']:g}"


def _over_levels(axis: Any, results: Mapping[str, Any]) -> list[float]:
    """Draw an axis of levels; below each tick the noise of a timestep, and the seconds that an image takes."""
    at, what = _positions(results)
    levels = results["levels"]
    if results["purification"]["unit"] == "timestep t":  # where the noise is known: levels, unless they would touch
        ticks: list[float] = []
        for position in at:
            if not ticks or position - ticks[-1] >= at[-1] / _MOST_TICKS:
                ticks.append(position)
        labels = [f"{t:g}\n{levels[at.index(t)].get('sigma_px', 0):.3g} px" for t in ticks]
        what += "; below, its noise, and seconds an image takes here"
    else:
        step = at[-1] / _MOST_TICKS
        unit = 10.0 ** math.floor(math.log10(step))
        steps = [unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= step * 0.999]
        if results["purification"]["kind"] == "langevin":  # which are counted
            steps = [1.0] if unit < 1 else [step for step in steps if step % 1 == 0]
        step = steps[0]
        ticks = [i * step for i in range(int(at[-1] / step + 1e-6) + 1)]
        labels = [f"{t:g}" for t in ticks]
        what += "; below, seconds an image takes here"
    seconds = [level["seconds_per_image"] for level in levels]
    labels = [f"{label}\n{_interpolated(t, at, seconds):.2g} s" for label, t in zip(labels, ticks, strict=True)]
    axis.set_xticks(ticks, labels, fontsize=9)
    axis.set_xlabel(what)
    axis.set_xlim(0, at[-1])
    return at


def _band(
    axis: Any, at: Sequence[float], middle: Sequence[float], low: Sequence[float], high: Sequence[float], **line: Any
) -> None:
    axis.plot(at, middle, lw=2, marker="o", ms=3, **line)
    axis.fill_between(at, low, high, color=line["color"], alpha=0.2, lw=0)


def _distances(axis: Any, results: Mapping[str, Any], name: str | None) -> None:
    at = _over_levels(axis, results)
    levels = results["levels"]

    def curve(distances: Sequence[Mapping[str, Any]], label: str, colour: str) -> None:
        means = [distance["l2"] for distance in distances]
        errors = [2 * (distance["standard_error_l2"] or 0) for distance in distances]
        low, high = ([mean + sign * e for mean, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        _band(axis, at, means, low, high, label=label, color=colour)

    curve([level["clean_to_purified_clean"] for level in levels], "clean to purified clean", _CLEAN)
    title = "Distance"
    if name is not None:
        attacked = [level["poisoned"][name] for level in levels]
        curve([level["clean_to_purified_poisoned"] for level in attacked], "clean to purified poisoned", _WASHED)
        curve([level["poisoned_to_purified_poisoned"] for level in attacked], "poisoned to purified poisoned", _AWAY)
        poison = results["poisons"][name]
        title += f", {attack_label(name)}: {poison['size']['rms_px']:.3g} px RMS, at most {poison['largest_px']:.3g} px"
        if (cross := poison["crossing"]) is not None:
            where = _interpolated(cross, [level["level"] for level in levels], at)
            axis.axvline(where, ymax=0.82, color="#c0392b", ls=":", lw=1.5)  # below the legend
            left = where > 0.7 * at[-1]
            axis.annotate(
                f"as near to clean\nas to poisoned: {where:.3g}",
                (where, 0.04),
                xycoords=("data", "axes fraction"),
                xytext=(-5 if left else 5, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=8.5,
                color="#c0392b",
            )
    axis.set_title(title, fontsize=10.5, loc="left")
    axis.set_ylabel("l2 of images in [0, 1]")
    high = axis.get_ylim()[1]
    axis.set_ylim(0, 1.22 * high)  # room for the legend
    scale = 255 / math.sqrt(math.prod(results["images"]["shape"]))
    right = axis.secondary_yaxis("right", functions=(lambda l2: scale * l2, lambda px: px / scale))
    right.set_ylabel("root mean square (px of 255)")
    axis.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)


def _interpolated(value: float, known: Sequence[float], at: Sequence[float]) -> float:
    for i in range(1, len(known)):
        if value <= known[i]:
            return at[i - 1] + (at[i] - at[i - 1]) * (value - known[i - 1]) / (known[i] - known[i - 1])
    return at[-1]


def _energies(axis: Any, results: Mapping[str, Any], name: str | None) -> None:
    at = _over_levels(axis, results)
    levels = results["levels"]

    def curve(energies: Sequence[Mapping[str, Any]], what: str, as_it_is: str, purified: str) -> None:
        axis.axhline(energies[0]["mean"], color=as_it_is, ls="--", lw=1.2, label=f"{what}, as it is")
        means = [energy["mean"] for energy in energies]
        low, high = ([energy["quantiles"][q] for energy in energies] for q in ("0.25", "0.75"))
        _band(axis, at, means, low, high, label=f"purified {what}", color=purified)

    curve([level["energy"] for level in levels], "clean", _CLEAN, _CLEAN)
    if name is not None:
        curve([level["poisoned"][name]["energy"] for level in levels], "poisoned", _AWAY, _WASHED)
    model = results["energy"]["name"] or "the energy model"
    axis.set_title(f"Energies by {model}: means, and the middle half of the images", fontsize=10.5, loc="left")
    axis.set_ylabel(f"U = E / {results['energy']['temperature']:g} (no unit)")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}".replace("-", "\N{MINUS SIGN}"))
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.2 * (high - low))
    axis.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
