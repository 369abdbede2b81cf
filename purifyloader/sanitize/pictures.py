"""Draw what a sanitation found: the evidence for each class, how unlikely images are, and the suspects themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.core.images import quantize, to_engine
from purifyloader.datasets.samples import ImageKey, get_image
from purifyloader.datasets.sources import fetch, take_over
from purifyloader.errors import InputError
from purifyloader.results.figures import new_figure, save_figure
from purifyloader.sanitize.evidence import LIMITS
from purifyloader.sanitize.report import in_words
from purifyloader.sanitize.verdict import Verdict

__all__ = ["picture"]

_TARGET, _OTHER, _GREY = "#d1603d", "#1a3f8f", "#555555"
_COLUMNS, _MOST = 12, 36  # of the contact sheet
_HEAD, _PLOTS, _ROW = 0.7, 3.6, 1.0  # inches


def picture(verdict: Verdict, dataset: Any, path: str | Path, image_key: ImageKey = None) -> Path:
    """Draw a verdict, and the most unlikely suspects of its dataset, as a PNG at `path`; it needs matplotlib.

    >>> import numpy as np
    >>> from purifyloader import sanitize
    >>> rows = [{"class": label, "images": 1, "reference": {"z": 9.0 * (label == 0)}} for label in (0, 1)]
    >>> verdict = sanitize.Verdict(np.array([0, 0, 1]), (0,), np.array([1]), {1: 1}, rows, "reference")
    >>> sanitize.picture(verdict, [(np.zeros((8, 8, 3), np.uint8), 0)] * 3, "found.png").name
    'found.png'
    """
    if len(dataset) != len(verdict.labels):
        raise InputError(f"The verdict is on {len(verdict.labels)} images. Got a dataset of {len(dataset)}.")
    raw = take_over(dataset).raw
    images = [_shown(get_image(fetch(raw, [i])[0], image_key)) for i in _most_unlikely(verdict).tolist()]
    rows = -(-len(images) // _COLUMNS)
    inches = _HEAD + _PLOTS + _ROW * rows
    figure = new_figure((11, inches))
    sentences = list(in_words(verdict))[: max(1, len(verdict.targets))]
    figure.text(0.03, 1 - 0.25 / inches, "\n".join(sentences), fontsize=11, va="top")
    bottom, height = (_ROW * rows + 0.75) / inches, (_PLOTS - 0.95) / inches
    _evidence(figure.add_axes((0.1, bottom, 0.37, height)), verdict)
    _spread(figure.add_axes((0.56, bottom, 0.41, height)), verdict)
    _sheet(figure, verdict, images, inches)
    return save_figure(figure, path)


def _shown(image: Any) -> NDArray[np.uint8]:
    x = quantize(to_engine(image)[0]).permute(1, 2, 0).numpy()
    return x if x.shape[2] == 3 else x.repeat(3, axis=2)


def _most_unlikely(verdict: Verdict) -> NDArray[np.int64]:
    """Return the indices of as many suspects as are shown, the most unlikely first; without scores the first ones."""
    suspects = verdict.suspects
    if verdict.scores is not None:
        suspects = suspects[np.argsort(-verdict.scores[suspects], kind="stable")]
    return suspects[:_MOST]


def _evidence(axis: Any, verdict: Verdict) -> None:
    rows = verdict.highest()
    values = [row[verdict.by]["z"] or 0.0 for row in rows]
    names = [row.get("name") or str(row["class"]) for row in rows]
    colours = [_TARGET if row["class"] in verdict.targets else _OTHER for row in rows]
    axis.barh(range(len(values)), values, color=colours)
    axis.axvline(LIMITS[verdict.by], color=_GREY, ls="--", lw=1.2)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_title(f"evidence for each class ({verdict.by}): z, and the limit", fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _spread(axis: Any, verdict: Verdict) -> None:
    """Show how unlikely images are for their labels or, without a reference, how labels are lost over the rounds."""
    of_target = np.isin(verdict.labels, verdict.targets)
    groups = [("under a target's label", of_target, _TARGET), ("others", ~of_target, _OTHER)]
    for name, mask, colour in groups:
        if not mask.any():
            continue
        if verdict.scores is not None:
            counts, edges = np.histogram(verdict.scores[mask], bins=20, range=(0, 1))
            axis.stairs(100 * counts / mask.sum(), 100 * edges, color=colour, label=name, lw=1.8)
        elif verdict.votes is not None:
            lost = 100 * (verdict.votes[mask] != verdict.labels[mask][:, None]).mean(axis=0)
            axis.plot(range(len(lost)), lost, color=colour, label=name, marker="o")
    if verdict.scores is not None:
        axis.set_title("how unlikely images are for their label", fontsize=9, loc="left")
        axis.set(xlabel="percentile among clean images of the class", ylabel="share of the images (%)")
    else:
        axis.set_title("images that are not called by their label", fontsize=9, loc="left")
        axis.set(xlabel="times purified", ylabel="share of the images (%)")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _sheet(figure: Any, verdict: Verdict, images: Sequence[NDArray[np.uint8]], inches: float) -> None:
    names = {row["class"]: row.get("name") or str(row["class"]) for row in verdict.rows}
    rows = -(-len(images) // _COLUMNS)
    for place, (index, image) in enumerate(zip(_most_unlikely(verdict).tolist(), images, strict=True)):
        row, column = divmod(place, _COLUMNS)
        bottom = (_ROW * (rows - row) - 0.95) / inches
        axis = figure.add_axes((0.03 + 0.079 * column, bottom, 0.074, 0.7 / inches))
        axis.imshow(image, interpolation="nearest")
        axis.axis("off")
        was = names.get(int(verdict.labels[index]), "")
        now = names.get(verdict.corrected.get(index, -1), "?")
        axis.set_title(f"{was[:9]} \N{RIGHTWARDS ARROW} {now[:9]}", fontsize=6.5, pad=2)
