"""Measure a denoiser on the way of its training: PSNR on held-out images, warnings of memorising, and pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.psnr import jpeg_psnr, noised, psnr
from purifyloader.results.figures import has_matplotlib, new_figure, save_figure
from purifyloader.train.curves import CURVES_CSV, CURVES_PNG, Curves, write_grid

log = logging.getLogger(__name__)

SAMPLES_PNG = "samples.png"

_CLASSIC_PX = (10.0, 25.0, 50.0)  # noise levels at which the denoising literature reports PSNR
# then held_out_10px, trained_10px, ...
COLUMNS = ("step", "epoch", "seconds", "learning_rate", "loss", "gradient_norm")

# dB. The mean of 200 images moves by less between two checks of a run that learns.
_FALLEN, _APART = 0.1, 0.5


def validation_levels(sigma_range: tuple[float, float]) -> tuple[float, ...]:
    """Return 10, 25 and 50 px where the range (image units) holds two of them, else three levels spread over it."""
    low, high = (255 * s for s in sigma_range)
    classic = tuple(px for px in _CLASSIC_PX if low <= px <= high)
    if len(classic) >= 2:
        return classic
    return tuple(round(low * (high / low) ** share, 2) for share in (0.25, 0.5, 0.75))


def validated(curves: Curves) -> list[dict[str, Any]]:
    """Return the rows with a PSNR on held-out images."""
    return [row for row in curves.rows if any(name.startswith("held_out_") for name in row)]


class Validation:
    """Measure PSNR on held-out clean images and, to see memorising, on as many of those trained on.

    Images are uint8 (N, C, H, W), `levels` of noise in px; `jpeg` is the PSNR of JPEG-10 at each, to compare with.
    """

    def __init__(self, held_out: Tensor, trained: Tensor, sigma_range: tuple[float, float]) -> None:
        # evenly over the whole set, which may be sorted by class
        self.trained = trained[:: max(1, len(trained) // len(held_out))][: len(held_out)]
        self.held_out, self.levels = held_out, validation_levels(sigma_range)
        self.jpeg = {px: jpeg_psnr(held_out, px / 255) for px in self.levels}

    def measure(self, denoiser: NetworkDenoiser) -> dict[str, float]:
        """Return one row: `held_out_10px` and `trained_10px` for each level, in dB."""
        row = {}
        for px in self.levels:
            row[f"held_out_{px:g}px"] = round(psnr(denoiser, self.held_out, px / 255), 4)
            row[f"trained_{px:g}px"] = round(psnr(denoiser, self.trained, px / 255), 4)
        return row

    def means(self, row: dict[str, Any]) -> tuple[float, float]:
        """Return the mean over the levels: on held-out images, and on those trained on."""
        held_out, trained = (
            sum(row[f"{which}_{px:g}px"] for px in self.levels) / len(self.levels) for which in ("held_out", "trained")
        )
        return held_out, trained


def overfitting(means: Sequence[tuple[float, float]]) -> str | None:
    """Return a sentence if training and held-out images part, from (held out, trained) PSNR over the run so far.

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


def write_picture(curves: Curves, validation: Validation, folder: Path) -> None:
    """Write curves.png: the loss, and PSNR over the steps. Without matplotlib (an extra) log a line instead."""
    rows = validated(curves)
    if not has_matplotlib():
        if len(rows) <= 1:  # once
            log.info("no %s: pip install 'purifyloader[plots]' draws it; %s has the numbers", CURVES_PNG, CURVES_CSV)
        return
    figure = new_figure((11, 4), dpi=100, layout="constrained")
    losses, quality = figure.subplots(1, 2)
    logged = [row for row in curves.rows if row.get("loss") is not None]
    losses.plot([r["step"] for r in logged], [r["loss"] for r in logged])
    losses.set(xlabel="step", ylabel="loss (running mean)", yscale="log")
    steps = [row["step"] for row in rows]
    for i, px in enumerate(validation.levels):
        quality.plot(steps, [r[f"held_out_{px:g}px"] for r in rows], f"C{i}.-", label=f"{px:g} px, held out")
        quality.plot(steps, [r[f"trained_{px:g}px"] for r in rows], f"C{i}:", label=f"{px:g} px, trained on")
        quality.axhline(validation.jpeg[px], color=f"C{i}", linewidth=0.8, dashes=(1, 4))
    quality.plot([], [], "k", linewidth=0.8, dashes=(1, 4), label="JPEG-10")
    quality.set(xlabel="step", ylabel="PSNR (dB)")
    figure.legend(*quality.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_figure(figure, folder / CURVES_PNG)


@torch.no_grad()
def write_samples(denoiser: NetworkDenoiser, validation: Validation, folder: Path) -> None:
    """Write samples.png: eight held-out images clean, then noised and denoised at each level, one row each."""
    device = next(denoiser.parameters()).device
    images = validation.held_out[:8]
    rows: list[Tensor] = []
    for px in validation.levels:
        clean, x = noised(images, px / 255)
        level = torch.full((len(clean),), px / 255, dtype=torch.float64)
        if not rows:
            rows.append(clean)
        rows += [x, denoiser(x.to(device), level).cpu()]
    write_grid(torch.cat(rows), len(images), folder / SAMPLES_PNG)
