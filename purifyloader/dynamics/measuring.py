"""Measure PureGen's Figure 2 (Bhat et al. 2024, section 3.4): three distances and energies, by level.

Distances are the l2 norm of the difference of two images in [0, 1], as in the paper, and the same as root mean square
in levels of 255: px = 255 l2 / sqrt(values of an image). Images are those that would be stored, in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.version import __version__
from purifyloader.diffusion.psnr import check_images
from purifyloader.dynamics.paths import Path
from purifyloader.energy import EnergyNetwork, image_energies
from purifyloader.energy.walking import TEMPERATURE
from purifyloader.errors import InputError
from purifyloader.evaluation.measures import check_poisoned
from purifyloader.pretrained.kinds import sized_identity
from purifyloader.results.values import images_sha256, six_digits

__all__ = ["FORMAT", "QUANTILES", "VERSION", "Measured", "Poisoned", "crossing", "dynamics", "energies_of", "measure"]

FORMAT = "purifyloader-dynamics"
VERSION = 1

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Poisoned:
    """One attack: arrays (levels, images), of the images that it changes; at level 0 they are not purified."""

    largest: float  # difference of a value, in [0, 1]
    to_clean: Floats  # l2 from the clean image to the poisoned one purified
    to_poisoned: Floats  # l2 from the poisoned image to itself purified
    energy: Floats | None  # of the poisoned image purified; None without an energy model


@dataclass(frozen=True)
class Measured:
    """Distances and energies as arrays (levels, images); the first level is 0, where nothing is purified.

    Attributes:
        seconds: an image takes to each level here, the median over batches.
        moved: l2 from the clean image to itself purified.
        energy: of the clean image purified, not divided by a temperature; None without an energy model.
        poisoned: the same of each attack, by name.
        values: of an image, C H W.

    >>> import numpy as np
    >>> from purifyloader.dynamics import Measured
    >>> Measured((0, 25), (0.0, 0.1), np.zeros((2, 9)), energy=None, poisoned={}, values=3072).moved.shape
    (2, 9)
    """

    levels: tuple[float, ...]
    seconds: tuple[float, ...]
    moved: Floats
    energy: Floats | None
    poisoned: dict[str, Poisoned]
    values: int


def _l2(a: Tensor, b: Tensor) -> Floats:
    """Compute it from exact sums of squares of bytes, so that nothing moved is 0."""
    squares = (a.to(torch.int64) - b.to(torch.int64)).square().flatten(1).sum(dim=1)
    return np.sqrt(squares.numpy().astype(np.float64)) / 255


def measure(
    path: Path,
    clean_NCHW: Tensor,
    poisoned: Mapping[str, Tensor] | None = None,
    *,
    energy: EnergyNetwork | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Purify clean images and their poisoned versions to every level of a path, and measure how far they go.

    The noise of an image is a function of (seed, its position) alone, and the same for all its versions.

    Args:
        clean_NCHW: uint8 (N, C, H, W), not trained on.
        poisoned: by name, the same images poisoned, uint8; an image that is not changed is left out.
        energy: also measure energies with it, on its device.
        progress: called with the network calls made since the last time, and all.

    Raises:
        InputError: images of another type or shape, or poisoned ones that are not the clean ones' versions.

    >>> import torch
    >>> from purifyloader.dynamics import LangevinPath, measure
    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
    >>> path = LangevinPath(EnergyNetwork(EnergyConfig(channels=8)).eval(), steps=[1, 2], compute_batch=16)
    >>> clean = torch.full((2, 3, 16, 16), 99, dtype=torch.uint8)
    >>> measure(path, clean).moved.shape  # levels (0, 1 and 2 steps), images
    (3, 2)
    """
    check_images(clean_NCHW, "Dynamics take")
    if clean_NCHW.shape[1] != path.image_channels:
        raise InputError(
            f"Expected images with {path.image_channels} channels, which the model takes. Got {clean_NCHW.shape[1]}."
        )
    poisoned = dict(poisoned or {})
    check_poisoned(poisoned, clean_NCHW)
    keys = noise.image_keys(seed, 0, torch.arange(len(clean_NCHW)))
    changed = {name: (images != clean_NCHW).flatten(1).any(dim=1) for name, images in poisoned.items()}
    total = sum(path.work) * (len(clean_NCHW) + sum(int(rows.sum()) for rows in changed.values()))
    timings: list[list[float]] = [[] for _ in path.levels]

    def run(images: Tensor, clean: Tensor, keys_N: Tensor) -> Poisoned:
        """Measure how far these versions of clean images go."""
        shape = len(path.levels) + 1, len(images)
        to_clean, to_itself = np.zeros(shape), np.zeros(shape)
        energies = None if energy is None else np.zeros(shape)
        to_clean[0] = _l2(clean, images)
        if energy is not None and energies is not None:
            energies[0] = energies_of(energy, images)
        for level, rows, purified, seconds in path.purify(images, keys_N):
            to_itself[level + 1, rows] = _l2(images[rows], purified)
            to_clean[level + 1, rows] = _l2(clean[rows], purified)
            if energy is not None and energies is not None:
                energies[level + 1, rows] = energies_of(energy, purified)
            timings[level].append(seconds)
            if progress is not None:
                progress(path.work[level] * len(purified), total)
        largest = int((images.to(torch.int16) - clean.to(torch.int16)).abs().max()) / 255
        return Poisoned(largest, to_clean, to_itself, energies)

    of_clean = run(clean_NCHW, clean_NCHW, keys)
    of_poisoned = {name: run(poisoned[name][rows], clean_NCHW[rows], keys[rows]) for name, rows in changed.items()}
    seconds = [float(np.median(values)) for values in timings]
    values = clean_NCHW[0].numel()
    return Measured((0, *path.levels), (0.0, *seconds), of_clean.to_clean, of_clean.energy, of_poisoned, values)


def energies_of(energy: EnergyNetwork, images_NCHW: Tensor) -> Floats:
    """Compute the energy of each image, uint8, not divided by a temperature."""
    energies = image_energies(energy, images_NCHW.to(energy.readout.weight.device).float() / 255)
    return energies.double().cpu().numpy()


def crossing(levels: Sequence[float], to_clean: Sequence[float], to_poisoned: Sequence[float]) -> float | None:
    """Find the first level at which two curves meet, linear between levels, the paper's dotted line; None without."""
    gap = [a - b for a, b in zip(to_poisoned, to_clean, strict=True)]
    for i in range(1, len(levels)):
        if gap[i] >= 0 > gap[i - 1]:
            return float(levels[i - 1] + (levels[i] - levels[i - 1]) * -gap[i - 1] / (gap[i] - gap[i - 1]))
    return None


def _distance(l2: Floats, values: int) -> dict[str, float | None]:
    """Compute the mean over images, as l2 norm in [0, 1] and as root mean square in px, and its standard error."""
    mean = float(l2.mean())
    error = six_digits(float(l2.std(ddof=1)) / math.sqrt(len(l2))) if len(l2) > 1 else None
    return {"l2": six_digits(mean), "rms_px": six_digits(255 / math.sqrt(values) * mean), "standard_error_l2": error}


def _spread(energy: Floats, temperature: float) -> dict[str, Any]:
    u = energy / temperature
    return {
        "mean": six_digits(float(u.mean())),
        "quantiles": {f"{q:g}": six_digits(float(np.quantile(u, q))) for q in QUANTILES},
    }


def _summary(measured: Measured, path: Path, temperature: float) -> dict[str, Any]:
    """Average over images: "levels", "poisons" and "purification" of the result of `dynamics`."""
    config = path.config()
    levels = []
    for i, level in enumerate([{"level": 0, "calls": 0}, *config.pop("levels")]):
        poisoned = {
            name: {
                "clean_to_purified_poisoned": _distance(attack.to_clean[i], measured.values),
                "poisoned_to_purified_poisoned": _distance(attack.to_poisoned[i], measured.values),
                "closer_to_clean": six_digits(float((attack.to_clean[i] < attack.to_poisoned[i]).mean())),
                "energy": None if attack.energy is None else _spread(attack.energy[i], temperature),
            }
            for name, attack in measured.poisoned.items()
        }
        levels.append(
            {
                **level,
                "seconds_per_image": six_digits(measured.seconds[i]),
                "clean_to_purified_clean": _distance(measured.moved[i], measured.values),
                "energy": None if measured.energy is None else _spread(measured.energy[i], temperature),
                "poisoned": poisoned,
            }
        )
    poisons = {}
    for name, attack in measured.poisoned.items():
        means = attack.to_clean.mean(axis=1).tolist(), attack.to_poisoned.mean(axis=1).tolist()
        meet = crossing(measured.levels, *means)
        poisons[name] = {
            "images": attack.to_clean.shape[1],
            "size": _distance(attack.to_clean[0], measured.values),
            "largest_px": six_digits(255 * attack.largest),
            "crossing": None if meet is None else six_digits(meet),
        }
    return {"purification": config, "poisons": poisons, "levels": levels}


def temperature_of(energy: EnergyNetwork | None) -> float:
    """Return T of the energies, of which there are none without an energy model."""
    return TEMPERATURE if energy is None else energy.temperature


def dynamics(
    path: Path,
    clean_NCHW: Tensor,
    poisoned: Mapping[str, Tensor] | None = None,
    *,
    energy: EnergyNetwork | None = None,
    temperature: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure PureGen's Figure 2 as numbers. For the arguments see `measure`.

    Args:
        temperature: T of the energies, which are given as U = E / T; by default the one of the energy model.

    Returns:
        What `json.dumps` takes; it depends on the arguments and the device alone, but for the seconds. "levels" has for
        each level, from 0 (images as they came), level, calls, and sigma_px of diffusion, seconds_per_image on this
        machine, the distances (mean over images as l2 in [0, 1] and rms_px in levels of 255, standard error), the share
        of the poisoned images that are closer to the clean image than to the poisoned one, and the energies (mean and
        quantiles). "poisons" has the size of each attack, and the level at which the mean poisoned image has come as
        close to the clean one as to where it started.

    >>> import torch
    >>> from purifyloader.dynamics import LangevinPath, dynamics
    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
    >>> path = LangevinPath(EnergyNetwork(EnergyConfig(channels=8)).eval(), steps=[1, 2], compute_batch=16)
    >>> clean = torch.full((2, 3, 16, 16), 99, dtype=torch.uint8)
    >>> [level["calls"] for level in dynamics(path, clean, {"brighter": clean + 8})["levels"]]
    [0, 1, 2]
    """
    poisoned = dict(poisoned or {})
    measured = measure(path, clean_NCHW, poisoned, energy=energy, seed=seed, progress=progress)
    temperature = temperature_of(energy) if temperature is None else temperature
    return {
        "format": FORMAT,
        "version": VERSION,
        "purifyloader": __version__,
        "torch": torch.__version__,
        "energy": None
        if energy is None
        else {"unit": "U = E / temperature", "temperature": temperature, **sized_identity(energy)},
        "images": {
            "count": len(clean_NCHW),
            "shape": list(clean_NCHW.shape[1:]),
            "sha256": images_sha256(clean_NCHW),
            "poisoned_sha256": {name: images_sha256(images) for name, images in poisoned.items()},
        },
        "settings": {"seed": seed},
        **_summary(measured, path, temperature),
    }
