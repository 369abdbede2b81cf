"""Measure PureGen's Figure 2 (Bhat et al. 2024, section 3.4): three distances and energies, by level.

Distances are the l2 norm of the difference of two images in [0, 1], as in the paper, and the same as root mean square
in levels of 255: px = 255 l2 / sqrt(values of an image). Images are those that would be stored, in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from purifyloader.results.values import images_sha256, model_facts, six_digits

__all__ = ["FORMAT", "QUANTILES", "VERSION", "Measured", "Poisoned", "crossing", "dynamics", "in_numbers", "measure"]

FORMAT = "purifyloader-dynamics"
VERSION = 1

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Poisoned:
    """One attack: arrays (levels, images), of the images that it changes.

    Attributes:
        size: l2 norm of each perturbation, (images,).
        largest: difference of a value, in [0, 1].
        to_clean: l2 from the clean image to the poisoned one purified.
        to_poisoned: l2 from the poisoned image to itself purified.
        energy: of the poisoned image purified; None without an energy model.
    """

    size: Floats
    largest: float
    to_clean: Floats
    to_poisoned: Floats
    energy: Floats | None


@dataclass(frozen=True)
class Measured:
    """Distances and energies as arrays (levels, images); the first level is 0, where nothing is purified.

    Attributes:
        levels: 0 and those of the path.
        seconds: an image takes to each level here, the median over batches.
        moved: l2 from the clean image to itself purified.
        energy: of the clean image purified, not divided by a temperature; None without an energy model.
        poisoned: by name.
        values: of an image, C H W.

    Example:
        >>> import torch
        >>> from purifyloader.dynamics import LangevinPath, measure
        >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
        >>> path = LangevinPath(EnergyNetwork(EnergyConfig(channels=8)).eval(), steps=[1, 2], compute_batch=16)
        >>> clean = torch.full((2, 3, 16, 16), 99, dtype=torch.uint8)
        >>> measure(path, clean).levels
        (0, 1, 2)
    """

    levels: tuple[float, ...]
    seconds: tuple[float, ...]
    moved: Floats
    energy: Floats | None
    poisoned: dict[str, Poisoned]
    values: int


@dataclass
class _Kept:
    """Values gathered of one set of images."""

    own: Floats  # to themselves as they came
    other: Floats  # to the clean ones
    energy: Floats | None
    seconds: dict[int, list[float]] = field(default_factory=dict)


def _l2(a: Tensor, b: Tensor) -> Floats:
    """Exact sums of squares of bytes, so that nothing moved is 0."""
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
        path: `LangevinPath` or `DiffusionPath`.
        clean_NCHW: uint8 (N, C, H, W), not trained on.
        poisoned: by name, the same images poisoned, uint8; an image that is not changed is left out.
        energy: also measure energies with it, on its device.
        seed: of the noise.
        progress: called with the network calls made since the last time, and all.

    Raises:
        InputError: images of another type or shape, or poisoned ones that are not the clean ones' versions.

    Example:
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
    for name, images in poisoned.items():
        check_images(images, f"The poisoned images {name} are")
        if images.shape != clean_NCHW.shape:
            raise InputError(
                f"Poisoned images must be the clean ones, poisoned: {tuple(clean_NCHW.shape)}. Got "
                f"{tuple(images.shape)} for {name}."
            )
        if bool((images == clean_NCHW).all()):
            raise InputError(f"Poisoned images must differ from the clean ones. Got {name}, which are the same.")
    keys = noise.image_keys(seed, 0, torch.arange(len(clean_NCHW)))
    changed = {name: (images != clean_NCHW).flatten(1).any(dim=1) for name, images in poisoned.items()}
    total = sum(path.work) * (len(clean_NCHW) + sum(int(rows.sum()) for rows in changed.values()))

    def run(images: Tensor, clean: Tensor, keys_N: Tensor) -> _Kept:
        shape = len(path.levels) + 1, len(images)
        kept = _Kept(np.zeros(shape), np.zeros(shape), energy=None)
        kept.other[0] = _l2(clean, images)
        if energy is not None:
            kept.energy = np.zeros_like(kept.own)
            kept.energy[0] = _energies(energy, images)
        for level, rows, purified, seconds in path.purify(images, keys_N):
            kept.own[level + 1, rows] = _l2(images[rows], purified)
            kept.other[level + 1, rows] = _l2(clean[rows], purified)
            if energy is not None and kept.energy is not None:
                kept.energy[level + 1, rows] = _energies(energy, purified)
            kept.seconds.setdefault(level, []).append(seconds)
            if progress is not None:
                progress(path.work[level] * len(purified), total)
        return kept

    of_clean = run(clean_NCHW, clean_NCHW, keys)
    of_poisoned: dict[str, Poisoned] = {}
    timings = [of_clean.seconds]
    for name, images in poisoned.items():
        rows = changed[name]
        kept = run(images[rows], clean_NCHW[rows], keys[rows])
        timings.append(kept.seconds)
        largest = int((images.to(torch.int16) - clean_NCHW.to(torch.int16)).abs().max()) / 255
        of_poisoned[name] = Poisoned(kept.other[0], largest, kept.other, kept.own, kept.energy)
    seconds = [
        float(np.median([value for timing in timings for value in timing[level]])) for level in range(len(path.levels))
    ]
    return Measured(
        (0, *path.levels), (0.0, *seconds), of_clean.own, of_clean.energy, of_poisoned, clean_NCHW[0].numel()
    )


def _energies(energy: EnergyNetwork, images: Tensor) -> Floats:
    found = image_energies(energy, images.to(energy.readout.weight.device).float() / 255)
    return found.double().cpu().numpy()


def crossing(levels: Sequence[float], to_clean: Sequence[float], to_poisoned: Sequence[float]) -> float | None:
    """Find where the mean poisoned image has come as close to the clean one as it is to where it started.

    The paper's dotted line: the first level at which two curves meet, linear between levels; None where they do not.
    """
    gap = [a - b for a, b in zip(to_poisoned, to_clean, strict=True)]
    for i in range(1, len(levels)):
        if gap[i] >= 0 > gap[i - 1]:
            return float(levels[i - 1] + (levels[i] - levels[i - 1]) * -gap[i - 1] / (gap[i] - gap[i - 1]))
    return None


def _distance(l2: Floats, values: int) -> dict[str, float | None]:
    """Mean over images and its standard error, as l2 norm in [0, 1] and as root mean square in px."""
    mean = float(l2.mean())
    error = float(l2.std(ddof=1)) / math.sqrt(len(l2)) if len(l2) > 1 else None
    scale = 255 / math.sqrt(values)
    return {
        "l2": six_digits(mean),
        "rms_px": six_digits(scale * mean),
        "standard_error_l2": None if error is None else six_digits(error),
    }


def _spread(energy: Floats | None, temperature: float) -> dict[str, Any] | None:
    if energy is None:
        return None
    u = energy / temperature
    return {
        "mean": six_digits(float(u.mean())),
        "quantiles": {f"{q:g}": six_digits(float(np.quantile(u, q))) for q in QUANTILES},
    }


def _summary(measured: Measured, path: Path, temperature: float) -> dict[str, Any]:
    """Means over images: "levels", "poisons" and "purification" of what `dynamics` gives."""
    config = path.config()
    known = [{"level": 0, "calls": 0}, *config.pop("levels")]
    levels = []
    for i, level in enumerate(known):
        levels.append(
            {
                **level,
                "seconds_per_image": six_digits(measured.seconds[i]),
                "clean_to_purified_clean": _distance(measured.moved[i], measured.values),
                "energy": None if measured.energy is None else _spread(measured.energy[i], temperature),
                "poisoned": {
                    name: {
                        "clean_to_purified_poisoned": _distance(found.to_clean[i], measured.values),
                        "poisoned_to_purified_poisoned": _distance(found.to_poisoned[i], measured.values),
                        "closer_to_clean": six_digits(float((found.to_clean[i] < found.to_poisoned[i]).mean())),
                        "energy": None if found.energy is None else _spread(found.energy[i], temperature),
                    }
                    for name, found in measured.poisoned.items()
                },
            }
        )
    poisons = {
        name: {
            "images": len(found.size),
            "size": _distance(found.size, measured.values),
            "largest_px": six_digits(255 * found.largest),
            "crossing": _maybe(
                crossing(measured.levels, found.to_clean.mean(axis=1).tolist(), found.to_poisoned.mean(axis=1).tolist())
            ),
        }
        for name, found in measured.poisoned.items()
    }
    return {"purification": config, "poisons": poisons, "levels": levels}


def _maybe(value: float | None) -> float | None:
    return None if value is None else six_digits(value)


def temperature_of(energy: EnergyNetwork | None) -> float:
    """T of the energies, which nobody divides where there is no energy model."""
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
        What `json.dumps` takes; it depends on the arguments and the device alone, but for the seconds. "levels" has
        for each level, from 0, what it is (level, calls, and sigma_px of diffusion), seconds_per_image on this
        machine, the distances (mean over images as l2 in [0, 1] and rms_px in levels of 255, standard error), the
        share of the poisoned images that are closer to the clean image than to the poisoned one, and the energies
        (mean and quantiles, None without an energy model) after purification to that level: at 0 they are those of
        the images as they came. "poisons" has the size of each attack, and the crossing: see `crossing`.

    Raises:
        InputError: see `measure`.

    Example:
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
    return in_numbers(measured, path, clean_NCHW, poisoned, energy=energy, temperature=temperature, seed=seed)


def in_numbers(
    measured: Measured,
    path: Path,
    clean_NCHW: Tensor,
    poisoned: Mapping[str, Tensor],
    *,
    energy: EnergyNetwork | None,
    temperature: float | None,
    seed: int,
) -> dict[str, Any]:
    """Summarise what `measure` found, as `dynamics` returns it."""
    temperature = temperature_of(energy) if temperature is None else temperature
    return {
        "format": FORMAT,
        "version": VERSION,
        "purifyloader": __version__,
        "torch": torch.__version__,
        "energy": None
        if energy is None
        else {"unit": "U = E / temperature", "temperature": temperature, **model_facts(energy)},
        "images": {
            "count": len(clean_NCHW),
            "shape": list(clean_NCHW.shape[1:]),
            "sha256": images_sha256(clean_NCHW),
            "poisoned_sha256": {name: images_sha256(images) for name, images in poisoned.items()},
        },
        "settings": {"seed": seed},
        **_summary(measured, path, temperature),
    }
