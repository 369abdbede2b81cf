"""Write down how a training goes: the rows of curves.csv, and small pictures of images."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from purifyloader.core.images import quantize
from purifyloader.files.atomic import replacing, write_text

__all__ = ["CURVES_CSV", "CURVES_PNG", "Curves", "write_grid"]

CURVES_CSV, CURVES_PNG = "curves.csv", "curves.png"

_LARGEST = 1e300
_SIDE = 64  # pixels of an image in a picture, at least


class Curves:
    """The rows of a training, one for each step that is written down, with columns in this order.

    They are kept in its state, so that curves.csv never holds more steps than a resumed run has done. Other columns
    follow by noise level, as in held_out_10px.
    """

    def __init__(self, columns: Sequence[str], rows: Sequence[dict[str, Any]] = ()) -> None:
        self.columns, self.rows = tuple(columns), list(rows)

    def add(self, **row: Any) -> None:
        """Add a row; a second one of the same step is merged into the first."""
        if self.rows and self.rows[-1]["step"] == row["step"]:
            self.rows[-1].update(row)
        else:
            self.rows.append(row)

    def restore(self, rows: Any, step: int) -> None:
        """Take over the rows of a state after `step` steps; an error for others than `add` makes."""
        if not isinstance(rows, list):
            raise ValueError(f"its curves are {rows!r:.80}")
        last = -1
        for row in rows:
            values = [value for value in row.values() if value is not None]
            if type(row["step"]) is not int or not last < row["step"] <= step:
                raise ValueError(f"its curves have the step {row['step']!r:.40} after {last}, where {step} are done")
            if not all(type(value) in (int, float) and abs(value) < _LARGEST for value in values):
                raise ValueError(f"its curves have the row {row!r:.200}")
            for name in row.keys() - {*self.columns}:
                _by_level(name)  # an error for no such column
            last = row["step"]
        self.rows = rows

    def write_csv(self, folder: Path) -> None:
        used = {name for row in self.rows for name in row}
        # a resumed run has its rows from JSON, where names are sorted
        names = [name for name in self.columns if name in used]
        names += sorted(used.difference(self.columns), key=_by_level)
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(folder / CURVES_CSV, text.getvalue())


def _by_level(column: str) -> tuple[float, str]:
    name, _, level = column.rpartition("_")
    return float(level.removesuffix("px")), name


def write_grid(images_NCHW: Tensor, columns: int, path: Path) -> None:
    """Write a PNG of images in [0, 1], which are clamped: rows of `columns`, each enlarged to at least 64 pixels."""
    scale = max(1, _SIDE // images_NCHW.shape[-1])
    shown = images_NCHW.cpu().clamp(0, 1).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(shown, nrow=columns, padding=2, pad_value=1.0)
    with replacing(path) as temporary:
        Image.fromarray(quantize(grid).permute(1, 2, 0).numpy()).save(temporary, format="png")
