"""What the training of an energy model writes down: curves.csv, curves.png, bank.png and, at its end, chains.png."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from purifyloader.core import noise
from purifyloader.core.devices import exact_arithmetic
from purifyloader.core.images import quantize
from purifyloader.energy.energies import image_energies
from purifyloader.energy.network import EnergyNetwork
from purifyloader.energy.walking import FAR, walk
from purifyloader.files.atomic import replacing, write_text
from purifyloader.results.figures import has_matplotlib, new_figure, save_figure
from purifyloader.train.denoiser.curves import CURVES_CSV, CURVES_PNG
from purifyloader.train.energy.bank import outside
from purifyloader.train.energy.config import EnergyTrainConfig

__all__ = ["BANK_PNG", "CHAINS_PNG", "EnergyCurves", "float32_arithmetic", "long_chains"]

log = logging.getLogger(__name__)

BANK_PNG, CHAINS_PNG = "bank.png", "chains.png"

COLUMNS = (
    "step",
    "seconds",
    "learning_rate",
    "gradient_norm",
    "data",
    "samples",
    "difference",
    "spread",
    "drift",
    "outside",
    "trained",
    "held_out",
)

_FOLLOWED = 200  # images, trained on and held out, whose energies are followed
_SHOWN = 64  # samples of the bank in its picture
_CHAINS = 8  # long chains in their picture
_MEASURED = 64  # long chains
_SIDE = 64  # pixels of an image in a picture, at least


class EnergyCurves:
    """The rows of a run: kept in its state, so that the files never hold more than a resumed run has done."""

    def __init__(self, folder: Path, config: EnergyTrainConfig, held_out: Tensor | None) -> None:
        self.folder, self.config = folder, config
        self.held_out = None if held_out is None else held_out[:_FOLLOWED]
        self.rows: list[dict[str, Any]] = []

    def add(self, energy: EnergyNetwork, trained: Tensor, **row: Any) -> None:
        """A row; with the mean energies, in temperatures, of images trained on and held out where there are any."""
        if self.held_out is not None:
            every = max(1, len(trained) // _FOLLOWED)
            row["trained"] = self._mean(energy, trained[::every][:_FOLLOWED])
            row["held_out"] = self._mean(energy, self.held_out.to(trained.device))
        self.rows.append(row)

    def _mean(self, energy: EnergyNetwork, images: Tensor) -> float:
        energies = image_energies(energy, images.to(torch.float32) / 255)
        return float(f"{float(energies.mean()) / self.config.temperature:.6g}")

    def write(self, energy: EnergyNetwork, samples: Tensor) -> None:
        """curves.csv, curves.png and bank.png."""
        names = sorted({name for row in self.rows for name in row}, key=COLUMNS.index)
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.folder / CURVES_CSV, text.getvalue())
        every = max(1, len(samples) // _SHOWN)
        _picture(samples[::every][:_SHOWN], 16, self.folder / BANK_PNG)
        self._draw()

    def _draw(self) -> None:
        if not has_matplotlib():
            log.debug("no %s: pip install 'purifyloader[plots]' draws it", CURVES_PNG)
            return
        if not self.rows:
            return
        steps = [row["step"] for row in self.rows]
        figure = new_figure((13, 4), dpi=100, layout="constrained")
        energies, differences, slopes = figure.subplots(1, 3)
        for name, label in (("data", "images (with noise)"), ("samples", "samples"), ("held_out", "held out")):
            values = [row.get(name) for row in self.rows]
            if any(value is not None for value in values):
                energies.plot(steps, values, label=label, linewidth=1)
        energies.set(xlabel="step", ylabel="mean energy / temperature")
        energies.legend(fontsize="small")
        differences.plot(steps, [row["difference"] for row in self.rows], linewidth=1, label="images - samples")
        differences.plot(steps, [row["spread"] for row in self.rows], linewidth=1, label="spread of the images")
        differences.set(xlabel="step", ylabel="energy / temperature", yscale="symlog")
        differences.legend(fontsize="small")
        slopes.plot(steps, [255 * row["drift"] for row in self.rows], linewidth=1, label="downhill, a Langevin step")
        slopes.axhline(255 * self.config.step_size, color="k", linewidth=0.8, dashes=(1, 4), label="noise of a step")
        slopes.set(xlabel="step", ylabel="px (root mean square)", ylim=(0, None))
        slopes.legend(fontsize="small")
        save_figure(figure, self.folder / CURVES_PNG)


def float32_arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """Float32 as the purifier has it that will run the model: torch's own is TF32 in the convolutions of a GPU.

    On a CPU it is float32 anyway, and exact_arithmetic would only take threads away.
    """
    return exact_arithmetic(device) if device.type == "cuda" else nullcontext()


def _picture(images: Tensor, columns: int, path: Path) -> None:
    from PIL import Image

    scale = max(1, _SIDE // images.shape[-1])
    shown = images.cpu().clamp(0, 1).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(shown, nrow=columns, padding=2, pad_value=1.0)
    with replacing(path) as temporary:
        Image.fromarray(quantize(grid).permute(1, 2, 0).numpy()).save(temporary, format="png")


@torch.no_grad()
def long_chains(
    energy: EnergyNetwork, images: Tensor, config: EnergyTrainConfig, steps: Sequence[int], path: Path
) -> tuple[list[dict[str, float]], str | None]:
    """Walk from images on, far beyond purification: does the model hold, or do its samples stop being images?

    Args:
        energy: on the device of the images, float32.
        images: uint8 (N, C, H, W); the first 64 are used.
        config: step size and temperature of the walk.
        steps: at which to look, rising.
        path: of the picture: the images above, then their chains at each of `steps`.

    Returns:
        A row for each of `steps`: `moved_px` (root mean square from the start), `energy` (mean change, in
        temperatures, over the standard deviation of the images' own energies), `contrast` (mean standard deviation of
        an image over that at its start), and `outside` (share of pixels out of [0, 1] by more than `config.margin`).
        And a sentence where the chains ran away, with the rows before that; else None.
    """
    start = images[:_MEASURED].to(torch.float32) / 255
    keys = noise.image_keys(config.seed, 0, torch.arange(len(start))).to(start.device)
    own = image_energies(energy, start)
    spread = float(own.std(correction=0)) if len(own) > 1 else 1.0
    rows, shown = [], [start[:_CHAINS]]
    chain = walk(
        energy,
        start.contiguous(memory_format=torch.channels_last),
        max(steps),
        lambda step: noise.normal(keys, start.shape[1:], step),
        step_size=config.step_size,
        temperature=config.temperature,
    )
    failure = None
    with float32_arithmetic(start.device):
        for done, x in enumerate(islice(chain, max(steps)), start=1):
            if done not in steps:
                continue
            if not float((x - 0.5).abs().max()) <= FAR:
                failure = f"long chains run away within {done:,} Langevin steps"
                log.warning("%s: use the model for short ones only, or train it longer", failure)
                break
            shown.append(x[:_CHAINS])
            contrast = x.flatten(1).std(1) / start.flatten(1).std(1).clamp(min=1e-6)
            rows.append(
                {
                    "steps": done,
                    "moved_px": round(255 * float((x - start).square().mean().sqrt()), 2),
                    "energy": round(float((image_energies(energy, x) - own).mean()) / max(spread, 1e-12), 3),
                    "contrast": round(float(contrast.mean()), 3),
                    "outside": round(outside(x, config), 4),
                }
            )
    _picture(torch.cat(shown), len(shown[0]), path)
    return rows, failure
