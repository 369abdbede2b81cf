"""What a run writes down while it goes: curves.csv, curves.png and samples.png, and its warnings."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from purifyloader.core.images import quantize
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.psnr import jpeg_psnr, noised, noised_psnr, psnr
from purifyloader.files.atomic import replacing, write_text
from purifyloader.results.figures import has_matplotlib, new_figure, save_figure

__all__ = [
    "CURVES_CSV",
    "CURVES_PNG",
    "SAMPLES_PNG",
    "Curves",
    "Validation",
    "overfitting",
    "validation_levels",
]

log = logging.getLogger(__name__)

CURVES_CSV, CURVES_PNG, SAMPLES_PNG = "curves.csv", "curves.png", "samples.png"

CLASSIC_PX = (10.0, 25.0, 50.0)
"""The noise levels at which the denoising literature reports PSNR."""

_COLUMNS = (
    "step",
    "epoch",
    "seconds",
    "learning_rate",
    "loss",
    "gradient_norm",
)  # then held_out_10px, trained_10px, ...

# dB. The mean of 200 images moves by less between two checks of a run that learns.
_FALLEN, _APART = 0.1, 0.5


def validation_levels(sigma_range: tuple[float, float]) -> tuple[float, ...]:
    """10, 25 and 50 px where the range holds two of them, else three levels spread over it; in px."""
    low, high = (255 * s for s in sigma_range)
    classic = tuple(px for px in CLASSIC_PX if low <= px <= high)
    if len(classic) >= 2:
        return classic
    return tuple(round(low * (high / low) ** share, 2) for share in (0.25, 0.5, 0.75))


def _by_level(column: str) -> tuple[float, str]:
    which, _, level = column.rpartition("_")
    return float(level.removesuffix("px")), which


class Validation:
    """PSNR on held-out clean images and, to see memorising, on as many of those trained on.

    Args:
        held_out: uint8 (N, C, H, W), not trained on.
        trained: uint8 (M, C, H, W).
        levels: noise, in px.
    """

    def __init__(self, held_out: Tensor, trained: Tensor, levels: Sequence[float]) -> None:
        # evenly over the whole set, which may be sorted by class
        self.trained = trained[:: max(1, len(trained) // len(held_out))][: len(held_out)]
        self.held_out, self.levels = held_out, tuple(levels)
        self.doing_nothing = {px: noised_psnr(held_out, px / 255) for px in self.levels}
        self.jpeg = {px: jpeg_psnr(held_out, px / 255) for px in self.levels}

    def measure(self, denoiser: NetworkDenoiser) -> dict[str, float]:
        """One row: `held_out_10px` and `trained_10px` for each level, in dB."""
        row = {}
        for px in self.levels:
            row[f"held_out_{px:g}px"] = round(psnr(denoiser, self.held_out, px / 255), 4)
            row[f"trained_{px:g}px"] = round(psnr(denoiser, self.trained, px / 255), 4)
        return row

    def means(self, row: dict[str, Any]) -> tuple[float, float]:
        """Held out and trained, the mean over the levels."""
        held_out, trained = (
            sum(row[f"{which}_{px:g}px"] for px in self.levels) / len(self.levels) for which in ("held_out", "trained")
        )
        return held_out, trained


def overfitting(means: Sequence[tuple[float, float]]) -> str | None:
    """A sentence if training and held-out images part, from (held out, trained) PSNR over the run so far.

    The two sets hold different images, so their difference at the first check is the one to compare with.
    """
    if len(means) < 2:
        return None
    held_out, trained = means[-1]
    fallen = max(h for h, _ in means) - held_out
    apart = (trained - held_out) - (means[0][1] - means[0][0])
    if fallen > _FALLEN and trained > max(t for _, t in means) - _FALLEN:
        return f"PSNR on held-out images has fallen by {fallen:.2f} dB from its best, on trained ones it has not"
    if apart > _APART:
        return f"PSNR on trained images has drawn {apart:.2f} dB away from that on held-out ones"
    return None


class Curves:
    """The rows of a run: kept in its state, so that the files never hold more than a resumed run has done."""

    def __init__(self, rows: Sequence[dict[str, Any]] = ()) -> None:
        self.rows: list[dict[str, Any]] = list(rows)

    def add(self, **row: Any) -> None:
        """A row of its step; a second one for the same step is merged into it."""
        if self.rows and self.rows[-1]["step"] == row["step"]:
            self.rows[-1].update(row)
        else:
            self.rows.append(row)

    def validated(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if any(key.startswith("held_out_") for key in row)]

    def write_csv(self, folder: Path) -> None:
        found = {name for row in self.rows for name in row}
        # a resumed run has its rows from JSON, where names are sorted
        names = [name for name in _COLUMNS if name in found] + sorted(found.difference(_COLUMNS), key=_by_level)
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(folder / CURVES_CSV, text.getvalue())

    def write_picture(self, folder: Path, validation: Validation | None) -> None:
        """curves.png; without matplotlib (an extra) a line in the log instead."""
        if not has_matplotlib():
            if len(self.validated()) <= 1:  # once
                log.info(
                    "no %s: pip install 'purifyloader[plots]' draws it; %s has the numbers", CURVES_PNG, CURVES_CSV
                )
            return
        figure = new_figure((11, 4), dpi=100, layout="constrained")
        losses, quality = figure.subplots(1, 2)
        logged = [row for row in self.rows if row.get("loss") is not None]
        losses.plot([r["step"] for r in logged], [r["loss"] for r in logged])
        losses.set(xlabel="step", ylabel="loss (running mean)", yscale="log")
        rows = self.validated()
        if validation is not None and rows:
            steps = [row["step"] for row in rows]
            for i, px in enumerate(validation.levels):
                held_out = [row[f"held_out_{px:g}px"] for row in rows]
                trained = [row[f"trained_{px:g}px"] for row in rows]
                quality.plot(steps, held_out, f"C{i}.-", label=f"{px:g} px, held out")
                quality.plot(steps, trained, f"C{i}:", label=f"{px:g} px, trained on")
                quality.axhline(validation.jpeg[px], color=f"C{i}", linewidth=0.8, dashes=(1, 4))
            quality.plot([], [], "k", linewidth=0.8, dashes=(1, 4), label="JPEG-10")
            quality.set(xlabel="step", ylabel="PSNR (dB)")
            figure.legend(*quality.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
        save_figure(figure, folder / CURVES_PNG)


@torch.no_grad()
def write_samples(denoiser: NetworkDenoiser, images_NCHW: Tensor, levels: Sequence[float], path: Path) -> None:
    """A picture of eight images: clean, then noised and denoised at each level (px), one row each."""
    from PIL import Image

    device = next(denoiser.parameters()).device
    rows: list[Tensor] = []
    for px in levels:
        clean, x = noised(images_NCHW[:8], px / 255)
        level = torch.full((len(clean),), px / 255, dtype=torch.float64)
        if not rows:
            rows.append(clean)
        rows += [x.clamp(0, 1), denoiser(x.to(device), level).clamp(0, 1).cpu()]
    shown = torch.cat(rows)
    scale = max(1, 64 // shown.shape[-1])
    shown = shown.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(shown, nrow=len(images_NCHW[:8]), padding=2, pad_value=1.0)
    with replacing(path) as temporary:
        Image.fromarray(quantize(grid).permute(1, 2, 0).numpy()).save(temporary, format="png")
