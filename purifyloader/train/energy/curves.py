"""Follow the training of an energy model: mean energies of images, pictures of its bank, and long chains at its end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.devices import exact_arithmetic
from purifyloader.energy.network import EnergyNetwork, image_energies
from purifyloader.energy.walking import FAR, walk
from purifyloader.results.figures import has_matplotlib, new_figure, save_figure
from purifyloader.train.curves import CURVES_PNG, Curves, write_grid
from purifyloader.train.energy.bank import outside
from purifyloader.train.energy.config import EnergyTrainConfig

log = logging.getLogger(__name__)

BANK_PNG, CHAINS_PNG = "bank.png", "chains.png"

WATCHED = ("difference", "spread", "drift", "outside")
_BEFORE = ("step", "seconds", "learning_rate", "gradient_norm", "data", "samples")
COLUMNS = (*_BEFORE, *WATCHED, "trained", "held_out")

FOLLOWED = 200  # images, trained on and held out, whose energies are followed
_SHOWN = 64  # samples of the bank in its picture
_CHAINS = 8  # long chains in their picture
_MEASURED = 64  # long chains


def mean_energy(energy: EnergyNetwork, images: Tensor, temperature: float) -> float:
    """Return the mean energy of uint8 images (N, C, H, W), in units of the temperature, to six digits."""
    energies = image_energies(energy, images.to(torch.float32) / 255)
    return float(f"{float(energies.mean()) / temperature:.6g}")


def write_pictures(curves: Curves, samples: Tensor, step_size: float, folder: Path) -> None:
    """Write bank.png, some samples (float, (M, C, H, W)), and curves.png where matplotlib is installed.

    The slope is compared with `step_size`, the noise of a Langevin step in image units.
    """
    every = max(1, len(samples) // _SHOWN)
    write_grid(samples[::every][:_SHOWN], 16, folder / BANK_PNG)
    if not has_matplotlib():
        log.debug("no %s: pip install 'purifyloader[plots]' draws it", CURVES_PNG)
    elif curves.rows:
        _draw(curves, step_size, folder / CURVES_PNG)


def _draw(curves: Curves, step_size: float, path: Path) -> None:
    rows = curves.rows
    steps = [row["step"] for row in rows]
    figure = new_figure((13, 4), dpi=100, layout="constrained")
    energies, differences, slopes = figure.subplots(1, 3)
    for name, label in (("data", "images (with noise)"), ("samples", "samples"), ("held_out", "held out")):
        values = [row.get(name) for row in rows]
        if any(value is not None for value in values):
            energies.plot(steps, values, label=label, linewidth=1)
    energies.set(xlabel="step", ylabel="mean energy / temperature")
    energies.legend(fontsize="small")
    differences.plot(steps, [row["difference"] for row in rows], linewidth=1, label="images - samples")
    differences.plot(steps, [row["spread"] for row in rows], linewidth=1, label="spread of the images")
    differences.set(xlabel="step", ylabel="energy / temperature", yscale="symlog")
    differences.legend(fontsize="small")
    slopes.plot(steps, [255 * row["drift"] for row in rows], linewidth=1, label="downhill, a Langevin step")
    slopes.axhline(255 * step_size, color="k", linewidth=0.8, dashes=(1, 4), label="noise of a step")
    slopes.set(xlabel="step", ylabel="px (root mean square)", ylim=(0, None))
    slopes.legend(fontsize="small")
    save_figure(figure, path)


def float32_arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """Compute in float32 as the purifier does that will run the model: torch's own is TF32 in a GPU's convolutions.

    On a CPU it is float32 anyway, and exact_arithmetic would only take threads away.
    """
    return exact_arithmetic(device) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def long_chains(
    energy: EnergyNetwork, images: Tensor, config: EnergyTrainConfig, steps: Sequence[int], path: Path
) -> tuple[list[dict[str, float]], str | None]:
    """Walk from images on, far beyond purification, to see whether the model holds or its samples stop being images.

    Args:
        energy: float32, on the device of the uint8 images (N, C, H, W), of which the first 64 are used.
        steps: at which to look, rising.
        path: of the picture: the images above, then their chains at each of `steps`.

    Returns:
        A row for each of `steps`: `moved_px` (root mean square from the start), `energy` (mean change over the standard
        deviation of the images' own energies), `contrast` (mean standard deviation of an image over that at its start),
        and `outside` (share of pixels out of [0, 1] by more than `config.margin`). And a sentence where the chains ran
        away, with the rows before that; else None.
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
    write_grid(torch.cat(shown), len(shown[0]), path)
    return rows, failure
