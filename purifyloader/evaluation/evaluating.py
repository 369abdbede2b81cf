"""Measure one denoiser over a list of noise levels; the result is one JSON value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purifyloader.core import corruptions, noise
from purifyloader.core.checks import as_integer, check_choice, check_integer
from purifyloader.core.devices import device_of, exact_arithmetic
from purifyloader.core.version import __version__
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.psnr import batch_size_of, check_images, estimate, psnr_of
from purifyloader.diffusion.samplers import SAMPLERS
from purifyloader.diffusion.schedule import CosineSchedule, spaced_sigmas
from purifyloader.errors import InputError
from purifyloader.evaluation import measures
from purifyloader.pretrained.kinds import sized_identity
from purifyloader.purifiers.networks import check_model
from purifyloader.results.values import auc, images_sha256, six_digits

__all__ = ["FORMAT", "VERSION", "default_sigmas", "evaluate"]

FORMAT = "purifyloader-denoiser-evaluation"
VERSION = 2

_CLASSIC_PX = (6.37, 10.0, 25.0, 50.0)  # ECLIPSE's, and those that papers on denoising give
_SPREAD_PX, _SPREAD = (1.0, 100.0), 5

_PROBE, _SAMPLING = 1, 2  # purposes of the children of an image's key


def default_sigmas(denoiser: Denoiser) -> list[float]:
    """Choose noise levels worth looking at, in image units, as far as the denoiser was trained for them.

    >>> from purifyloader.evaluation import default_sigmas
    >>> from purifyloader.pretrained import load
    >>> [round(255 * sigma, 2) for sigma in default_sigmas(load("cifar10-sparse"))]
    [1.0, 3.0, 6.37, 10.0, 25.0, 50.0, 76.5]
    """
    low, high = (255 * sigma for sigma in denoiser.sigma_range)
    ends = max(low, _SPREAD_PX[0]), min(high, _SPREAD_PX[1])
    if ends[0] >= ends[1]:  # trained for nothing in there
        ends = low, min(high, 100 * low)
    classic = [px for px in _CLASSIC_PX if low <= px <= high]
    spread = np.geomspace(*ends, _SPREAD)
    inner = [float(f"{px:.2g}") for px in spread[1:-1]]
    apart = [
        px
        for px in (float(spread[0]), *inner, float(spread[-1]))
        if low <= px <= high and all(abs(math.log(px / other)) > 0.3 for other in classic)
    ]
    return [px / 255 for px in sorted({*classic, *apart})]


def _figures(value: float) -> float | None:
    return six_digits(value) if math.isfinite(value) else None


def _mean(values_N: Tensor, scale: float = 1.0) -> dict[str, float | None]:
    """Compute the mean over images, and its standard error."""
    values = scale * values_N.double()
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return {"mean": _figures(float(values.mean())), "standard_error": _figures(error)}


def _px(mean_square: float) -> float | None:
    """Compute the root of a mean square, in levels of 255; None for one below 0."""
    return _figures(255 * math.sqrt(mean_square)) if mean_square >= 0 else None


class _Images:
    """A batch of images as every noise level uses it: clean, its noise, its poisoned versions."""

    def __init__(self, images: Tensor, poisoned: Mapping[str, Tensor], seed: int, start: int, end: int) -> None:
        self.clean = images[start:end].float() / 255
        self.poisoned = {name: x[start:end].float() / 255 for name, x in poisoned.items()}
        # the noise of `psnr`, so that its numbers are these
        self.keys = noise.image_keys(seed, 0, torch.arange(start, start + len(self.clean)))
        self.noise = noise.normal(self.keys, self.clean.shape[1:])
        signs = noise.uniform(noise.fold_in(self.keys, _PROBE), self.clean.shape[1:])
        self.signs = torch.where(signs < 0.5, -1.0, 1.0)


class _Rows:
    """Collect one value per image, batch by batch, under a name."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, prefix: str = "", **values: Tensor) -> None:
        for name, value in values.items():
            self.parts.setdefault(f"{prefix}{name}", []).append(value)

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(self.parts[name])


class _Level:
    """Measure one noise level batch by batch, then summarise it; `poisons` are names of the poisoned versions."""

    def __init__(
        self, denoiser: Denoiser, sigma: float, steps: int, sampler: str, calibrate: bool, poisons: Sequence[str]
    ) -> None:
        self.denoiser, self.sigma, self.steps, self.sampler = denoiser, sigma, steps, sampler
        self.levels = _visited(denoiser, sigma, steps)
        self.calibrate, self.poisons = calibrate, poisons
        self.rows = _Rows()

    @property
    def calls(self) -> int:
        """Count the network calls per image."""
        several = self.steps if self.steps > 1 else 0
        return 1 + several + self.steps * len(self.poisons) + self.calibrate

    def _wash(self, image_BCHW: Tensor, batch: _Images) -> Tensor:
        """Noise the images with the batch's noise and denoise them in `steps` calls, as a purifier does."""
        keys, shape = noise.fold_in(batch.keys, _SAMPLING), image_BCHW.shape[1:]
        device = device_of(self.denoiser)
        out = SAMPLERS[self.sampler](
            self.denoiser,
            (image_BCHW + self.sigma * batch.noise).to(device),
            self.levels,
            lambda step: noise.normal(keys, shape, step).to(device),
        )
        return out.float().cpu().clamp(0, 1)

    def measure(self, batch: _Images) -> None:
        clean, rows = batch.clean, self.rows
        noised = clean + self.sigma * batch.noise
        x0 = estimate(self.denoiser, noised, self.sigma)
        washed = x0.clamp(0, 1) if self.steps == 1 else self._wash(clean, batch)
        rows.add(
            denoiser=psnr_of(washed, clean),
            noised=psnr_of(noised.clamp(0, 1), clean),
            jpeg10=psnr_of(corruptions.jpeg(noised.clamp(0, 1), 10), clean),
            removed=(clean - washed).double().square().mean(dim=(1, 2, 3)).sqrt(),
        )
        if self.steps > 1:
            rows.add(one_call=psnr_of(x0.clamp(0, 1), clean))
        for name, poisoned in batch.poisoned.items():
            removed = measures.removed_energy(clean, poisoned, washed, self._wash(poisoned, batch))
            rows.add(f"{name}.", **removed._asdict())
        if self.calibrate:
            errors = measures.calibration(self.denoiser, clean, batch.noise, self.sigma, batch.signs, x0)
            rows.add("calibration.", **errors._asdict())

    def results(self) -> dict[str, Any]:
        names = ["denoiser", *(["one_call"] if self.steps > 1 else []), "noised", "jpeg10"]
        return {
            "sigma_px": _figures(255 * self.sigma),
            "network_levels_px": [_figures(255 * level) for level in self.levels[:-1]],
            "psnr_db": {name: _mean(self.rows[name]) for name in names},
            "calibration": self._calibration() if self.calibrate else None,
            "removed_px": _mean(self.rows["removed"], 255),
            "poisoned": {name: self._poisoned(name) for name in self.poisons},
        }

    def _calibration(self) -> dict[str, Any]:
        errors, claims = (self.rows[f"calibration.{name}"] for name in measures.Calibration._fields)
        error, claimed = float(errors.mean()), float(claims.mean())
        ratio = spread = math.nan
        if claimed > 0:
            ratio = math.sqrt(error / claimed)
            # of a ratio of two means over the same images, to first order
            single = errors / error - claims / claimed if error > 0 else claims * 0
            spread = ratio / 2 * float(single.std()) / math.sqrt(len(single)) if len(single) > 1 else math.nan
        over = {"mean": _figures(ratio), "standard_error": _figures(spread)}
        return {"error_px": _px(error), "claimed_px": _px(claimed), "error_over_claimed": over}

    def _poisoned(self, name: str) -> dict[str, Any]:
        values = {field: self.rows[f"{name}.{field}"] for field in measures.Removed._fields}
        changed = values["perturbation"] > 0
        return {
            "images": int(changed.sum()),
            "perturbation_px": _mean(values["perturbation"][changed], 255),
            "removed_px": _mean(values["poisoned"][changed], 255),
            "remaining": _mean(values["remaining"][changed]),
            "distance": _mean(values["distance"][changed]),
            "auc": _figures(auc(values["clean"], values["poisoned"][changed])),
        }


def _check(denoiser: Denoiser, images: Tensor, poisoned: Mapping[str, Tensor], sampler: str, steps: int) -> None:
    check_model("evaluate", denoiser, "denoiser")
    check_images(images, "evaluate takes")
    if images.shape[1] != denoiser.image_channels:
        raise InputError(
            f"This denoiser takes images of {denoiser.image_channels} channel(s), (N, {denoiser.image_channels}, H, W)."
            f" Got {tuple(images.shape)}."
        )
    measures.check_poisoned(poisoned, images)
    check_choice("sampler", sampler, sorted(SAMPLERS), error=InputError)
    check_integer("steps", steps, 1, unit="network calls an image", error=InputError)


def _check_sigmas(denoiser: Denoiser, sigmas: Sequence[float]) -> list[float]:
    values = [float(sigma) for sigma in sigmas]
    if not values or any(not (math.isfinite(sigma) and sigma > 0) for sigma in values):
        raise InputError(f"sigmas must be one or more finite numbers above 0, in image units. Got {list(sigmas)}.")
    denoiser.check_sigma(torch.tensor(values, dtype=torch.float64))
    return sorted(set(values))


def _visited(denoiser: Denoiser, sigma: float, steps: int) -> list[float]:
    """List the noise levels that `purifyloader.purifiers.Diffuse` visits."""
    if steps == 1:
        return [sigma, 0.0]
    schedule = CosineSchedule(4000)
    levels = [sigma, *spaced_sigmas(schedule, float(schedule.t(sigma)), steps)[1:]]
    denoiser.check_sigma(torch.tensor(levels[:-1], dtype=torch.float64))
    return levels


def evaluate(
    denoiser: Denoiser,
    images_NCHW: Tensor,
    sigmas: Sequence[float] | None = None,
    *,
    poisoned: Mapping[str, Tensor] | None = None,
    steps: int = 1,
    sampler: str = "ancestral",
    calibrate: bool = True,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Judge a denoiser at each noise level, on images that it was not trained on.

    All measures take the same noise, that of `psnr`. Washed images are clamped to [0, 1], as a purifier's are,
    everywhere but in the calibration.

    Args:
        images_NCHW: uint8, clean.
        sigmas: noise levels in image units; `default_sigmas` if None.
        poisoned: by name, the same images poisoned, uint8 in the same order; one that is not changed is left out.
        steps: network calls an image, over levels spaced as `recipes.eclipse` does; calibration is of one.
        calibrate: False leaves the calibration out, which is most of the network calls.
        seed: of all noise. The batch size and the device change only the rounding of the network's arithmetic.
        batch_size: images of a network call; by their size if None, 100 or fewer.
        progress: called with the network calls just done, counted in images, and of how many in all.

    Returns:
        A JSON object without NaN (a number that does not exist is None; six digits). Means over images have their
        standard error beside them. Beside format, version, purifyloader, torch, device, model, images and settings it
        has "levels", a list, rising in sigma_px, each with

        - network_levels_px: what the network is called with;
        - psnr_db: in dB with peak 1, of the denoiser (and, with several steps, of one_call), of the noised image as it
          is, and of JPEG at quality 10;
        - calibration: the root mean squared error_px of one call, unclipped, the claimed_px that its derivative stands
          for, and error_over_claimed: 1 is calibrated, above 1 is too sure of itself;
        - removed_px: root mean square of clean minus washed, the mean over images;
        - poisoned, by name: images (that differ), perturbation_px, removed_px from the poisoned images, remaining and
          distance (see `removed_energy`), and the auc of the removed energy as a detector of poisoned images.

    >>> import torch
    >>> from purifyloader.evaluation import evaluate
    >>> from purifyloader.pretrained import load
    >>> images = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    >>> results = evaluate(load("cifar10-sparse"), images, [25 / 255])
    >>> sorted(results["levels"][0]["psnr_db"])
    ['denoiser', 'jpeg10', 'noised']
    """
    poisoned = dict(poisoned or {})
    _check(denoiser, images_NCHW, poisoned, sampler, steps)
    chosen = default_sigmas(denoiser) if sigmas is None else _check_sigmas(denoiser, sigmas)
    seed = as_integer("seed", seed, -(2**63))
    batch_size = as_integer("batch_size", batch_size_of(images_NCHW) if batch_size is None else batch_size, 1)
    levels = [_Level(denoiser, sigma, steps, sampler, calibrate, list(poisoned)) for sigma in chosen]
    total = len(images_NCHW) * sum(level.calls for level in levels)
    device = device_of(denoiser) or torch.device("cpu")
    training = denoiser.training
    denoiser.eval()
    try:
        with torch.no_grad(), exact_arithmetic(device):
            for start in range(0, len(images_NCHW), batch_size):
                batch = _Images(images_NCHW, poisoned, seed, start, start + batch_size)
                for level in levels:
                    level.measure(batch)
                    if progress is not None:
                        progress(level.calls * len(batch.clean), total)
    finally:
        denoiser.train(training)
    return {
        "format": FORMAT,
        "version": VERSION,
        "purifyloader": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "model": {
            **sized_identity(denoiser),
            "sigma_range_px": [_figures(255 * sigma) for sigma in denoiser.sigma_range],
            "learned_variance": bool(getattr(denoiser, "learned_variance", False)),
        },
        "images": {
            "count": len(images_NCHW),
            "shape": list(images_NCHW.shape[1:]),
            "sha256": images_sha256(images_NCHW),
            "poisoned_sha256": {name: images_sha256(x) for name, x in poisoned.items()},
        },
        "settings": {
            "sigma_px": [_figures(255 * sigma) for sigma in chosen],
            "seed": seed,
            "steps": steps,
            "sampler": sampler,
            "calibrate": bool(calibrate),
            "batch_size": batch_size,
        },
        "levels": [level.results() for level in levels],
    }
