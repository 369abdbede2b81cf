"""All measures of one denoiser over a list of noise levels, as one JSON value."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purifyloader.core import corruptions, noise
from purifyloader.core.devices import exact_arithmetic
from purifyloader.core.version import __version__
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.samplers import SAMPLERS
from purifyloader.diffusion.schedule import CosineSchedule, Schedule, spaced_sigmas
from purifyloader.errors import InputError
from purifyloader.evaluation import measures
from purifyloader.evaluation.measures import BLUR_WIDTHS, auc, batch_size_of, check_images, device_of
from purifyloader.files.atomic import canonical_json
from purifyloader.files.weights import weights_sha256

__all__ = ["FORMAT", "VERSION", "default_sigmas", "evaluate"]

FORMAT = "purifyloader-denoiser-evaluation"
VERSION = 1

_CLASSIC_PX = (6.37, 10.0, 25.0, 50.0)  # ECLIPSE's, and those that papers on denoising give
_SPREAD_PX, _SPREAD = (1.0, 100.0), 5
_TOLD = tuple(2 ** (k / 4) for k in (-4, -2, -1, 1, 2, 4))
"""Levels that a denoiser is told in place of the true one, as factors."""
_TOLD_IMAGES = 100  # all levels see the same noise, so that few images tell them apart

_PROBE, _SAMPLING = 1, 2  # what the children of an image's key are for


def default_sigmas(denoiser: Denoiser) -> list[float]:
    """Noise levels worth looking at, in image units: 6.37, 10, 25 and 50 px and some spread between 1 and
    100 px on a logarithmic scale, as far as the denoiser was trained for them."""
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
    """Six digits: what lies below is rounding of the device."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _mean(values_N: Tensor, scale: float = 1.0) -> dict[str, float | None]:
    """Mean over images, and its standard error."""
    values = scale * values_N.double()
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return {"mean": _figures(float(values.mean())), "standard_error": _figures(error)}


def _px(mean_square: float) -> float | None:
    """Root of a mean square, in levels of 255; None for one below 0."""
    return _figures(255 * math.sqrt(mean_square)) if mean_square >= 0 else None


def _root_mean_px(squares_N: Tensor) -> dict[str, float | None]:
    """Root of the mean of squared errors, in levels of 255, and its standard error to first order."""
    found = _mean(squares_N)
    mean, error = found["mean"], found["standard_error"]
    if mean is None or mean <= 0:
        return {"mean": None, "standard_error": None}
    root = math.sqrt(mean)
    return {"mean": _figures(255 * root), "standard_error": None if error is None else _figures(255 * error / 2 / root)}


def _decibels(power: Tensor) -> list[float | None]:
    return [round(10 * math.log10(p * 255**2), 3) if p > 0 else None for p in power.tolist()]


class _Images:
    """What a batch of images is at every noise level: clean, its noise, its poisoned versions."""

    def __init__(self, images: Tensor, poisoned: Mapping[str, Tensor], seed: int, start: int, end: int) -> None:
        def unit(x: Tensor) -> Tensor:
            return x[start:end].float() / 255

        self.clean = unit(images)
        self.poisoned = {name: unit(x) for name, x in poisoned.items()}
        self.start = start
        # the noise of `psnr`, so that its numbers are these
        self.keys = noise.image_keys(seed, 0, torch.arange(start, start + len(self.clean)))
        self.noise = noise.normal(self.keys, self.clean.shape[1:])
        signs = noise.uniform(noise.fold_in(self.keys, _PROBE), self.clean.shape[1:])
        self.signs = torch.where(signs < 0.5, -1.0, 1.0)


class _Rows:
    """Values of every image, gathered batch by batch under a name."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.parts.setdefault(name, []).append(value)

    def add_all(self, prefix: str, values: Any) -> None:
        self.add(**{f"{prefix}.{name}": value for name, value in values._asdict().items()})

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(self.parts[name])


class _Level:
    """One noise level: what is measured on each batch, and what is said of all of them.

    Args:
        sigma: in image units.
        levels: that the sampler visits, from sigma down to 0.
        calibrate: whether to measure calibration.
        poisons: names of the poisoned versions.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sigma: float,
        levels: Sequence[float],
        sampler: str,
        calibrate: bool,
        poisons: Sequence[str],
    ) -> None:
        self.denoiser, self.sigma, self.levels, self.sampler = denoiser, sigma, levels, sampler
        self.steps, self.calibrate, self.poisons = len(levels) - 1, calibrate, list(poisons)
        low, high = denoiser.sigma_range
        self.told = [factor for factor in _TOLD if low <= factor * sigma <= high] if calibrate else []
        self.variance = _own_levels(denoiser, sigma) if calibrate else None
        self.rows = _Rows()

    def calls(self, images: int) -> int:
        """Of the network, for so many images, counted in images."""
        several = self.steps if self.steps > 1 else 0
        calibration = 1 + (self.variance is not None) if self.calibrate else 0
        each = 1 + several + self.steps * len(self.poisons) + calibration
        return images * each + min(images, _TOLD_IMAGES) * len(self.told)

    def _wash(self, image_BCHW: Tensor, batch: _Images) -> Tensor:
        """The image noised with the batch's noise and denoised in `steps` calls, as a purifier gives it."""
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
        x0 = measures.estimate(self.denoiser, noised, self.sigma)
        washed = x0.clamp(0, 1) if self.steps == 1 else self._wash(clean, batch)
        rows.add(denoiser=measures.psnr_of(washed, clean), noised=measures.psnr_of(noised.clamp(0, 1), clean))
        if self.steps > 1:
            rows.add(one_call=measures.psnr_of(x0.clamp(0, 1), clean))
        rows.add(
            jpeg10=measures.psnr_of(corruptions.jpeg(noised.clamp(0, 1), 10), clean),
            blur=measures.blur_psnr_of(noised, clean),
            error=measures.residual_spectrum(washed, clean),
            kept=measures.cross_spectrum(washed, clean),
        )
        for name, poisoned in batch.poisoned.items():
            rows.add_all(name, measures.removed_energy(clean, poisoned, washed, self._wash(poisoned, batch)))
        rows.add(removed=(clean - washed).double().square().mean(dim=(1, 2, 3)).sqrt())
        if self.calibrate:
            found = measures.calibration(self.denoiser, clean, batch.noise, self.sigma, batch.signs, x0)
            rows.add_all("calibration", found)
            few = max(0, _TOLD_IMAGES - batch.start)
            if few and self.told:
                told = [factor * self.sigma for factor in self.told]
                errors = measures.wrong_level_errors(self.denoiser, clean[:few], batch.noise[:few], self.sigma, told)
                rows.add(told=torch.cat([errors, found.error[:few, None]], dim=1))
        if self.variance is not None:
            variance = measures.variance_calibration(self.denoiser, clean, batch.noise, *self.variance[1:])
            if variance is not None:
                rows.add_all("variance", variance)

    def results(self, clean_power: Tensor) -> dict[str, Any]:
        rows = self.rows
        names = ["denoiser", *(["one_call"] if self.steps > 1 else []), "noised", "jpeg10"]
        best = int(rows["blur"].double().mean(dim=0).argmax())
        kept = rows["kept"].mean(dim=0) / clean_power
        return {
            "sigma_px": _figures(255 * self.sigma),
            "network_levels_px": [_figures(255 * level) for level in self.levels[:-1]],
            "psnr_db": {
                **{name: _mean(rows[name]) for name in names},
                "blur": {**_mean(rows["blur"][:, best]), "width_pixels": BLUR_WIDTHS[best]},
            },
            "spectrum": {
                "error_db": _decibels(rows["error"].mean(dim=0)),
                "kept": [_figures(share) for share in kept.tolist()],
            },
            "calibration": self._calibration() if self.calibrate else None,
            "variance": self._variance(),
            "removed_px": _mean(rows["removed"], 255),
            "poisoned": {name: self._poisoned(name) for name in self.poisons},
        }

    def _calibration(self) -> dict[str, Any]:
        found = {name: self.rows[f"calibration.{name}"] for name in measures.Calibration._fields}
        error, claimed, removed = (float(found[name].mean()) for name in ("error", "claimed", "removed"))
        ratio = spread = math.nan
        if claimed > 0:
            ratio = math.sqrt(error / claimed)
            # of a ratio of two means over the same images, to first order
            single = found["error"] / error - found["claimed"] / claimed if error > 0 else found["claimed"] * 0
            spread = ratio / 2 * float(single.std()) / math.sqrt(len(single)) if len(single) > 1 else math.nan
        return {
            "error_px": _px(error),
            "claimed_px": _px(claimed),
            "error_over_claimed": {"mean": _figures(ratio), "standard_error": _figures(spread)},
            "stein_px": _root_mean_px(found["sure"]),
            "rank_correlation": _maybe(measures.rank_correlation(found["claimed"], found["error"])),
            "predicted_noise": {
                "standard_deviation": _figures(math.sqrt(removed) / self.sigma),
                "expected": _figures(math.sqrt(max(0.0, 1 - error / self.sigma**2))),
            },
            "bias_px": _mean(found["bias"], 255),
            "wrong_level": _best_level(self.told, self.rows["told"]) if self.told else None,
        }

    def _variance(self) -> dict[str, Any] | None:
        if self.variance is None or "variance.learned" not in self.rows:
            return None
        t, sigma, below = self.variance
        return {
            "t": t,
            "sigma_px": _figures(255 * sigma),
            "below_px": _figures(255 * below),
            **{f"error_over_{n}": _mean(self.rows[f"variance.{n}"]) for n in measures.VarianceCalibration._fields},
        }

    def _poisoned(self, name: str) -> dict[str, Any]:
        found = {field: self.rows[f"{name}.{field}"] for field in measures.Removed._fields}
        changed = found["perturbation"] > 0
        return {
            "images": int(changed.sum()),
            "perturbation_px": _mean(found["perturbation"][changed], 255),
            "removed_px": _mean(found["poisoned"][changed], 255),
            "remaining": _mean(found["remaining"][changed]),
            "distance": _mean(found["distance"][changed]),
            "auc": _figures(auc(found["clean"], found["poisoned"][changed])),
        }


def _maybe(value: float | None) -> float | None:
    return None if value is None else _figures(value)


def _own_levels(denoiser: Denoiser, sigma: float) -> tuple[int, float, float] | None:
    """The timestep of a denoiser with learned variance that is nearest to sigma, and the two levels of its step.

    A denoiser that is told log sigma has no schedule, and takes the steps of `purifyloader.purifiers.Diffuse`.
    """
    if not getattr(denoiser, "learned_variance", False):
        return None
    schedule: Schedule = getattr(denoiser, "schedule", None) or CosineSchedule(4000)
    top = float(schedule.sigma(schedule.timesteps))  # which a level of the range may exceed by rounding
    t = min(max(2, round(float(schedule.t(min(sigma, top))))), int(schedule.timesteps))
    levels = float(schedule.sigma(t)), float(schedule.sigma(t - 1))
    low, high = denoiser.sigma_range
    # the tolerance of `check_sigma`
    return (t, *levels) if low * (1 - 1e-6) <= levels[0] <= high * (1 + 1e-6) else None


def _best_level(told: Sequence[float], errors_NL: Tensor) -> dict[str, Any]:
    """Where the error over the level told is smallest: the vertex of the parabola through the lowest and its
    neighbours, both axes logarithmic. At an end of what the denoiser takes there is no telling.

    Args:
        told: factors without 1; the truth is the last column of `errors_NL`.
    """
    pairs = sorted(zip((*told, 1.0), errors_NL.mean(dim=0).tolist(), strict=True))
    factors, values = [factor for factor, _ in pairs], [value for _, value in pairs]
    lowest = min(values)
    at, best = values.index(lowest), None
    if 0 < at < len(values) - 1 and lowest > 0:
        x, y = np.log(factors[at - 1 : at + 2]), np.log(values[at - 1 : at + 2])
        square, slope, _ = np.polyfit(x, y, 2)
        best = _figures(math.exp(-slope / (2 * square)) if square > 0 else factors[at])
    truth = values[factors.index(1.0)]
    return {
        "images": len(errors_NL),
        "told_over_true": [_figures(factor) for factor in factors],
        "error_px": [_px(value) for value in values],
        "best": best,
        "excess": _figures(math.sqrt(truth / lowest) - 1) if lowest > 0 else None,
    }


def _check(denoiser: Denoiser, images: Tensor, poisoned: Mapping[str, Tensor], sampler: str, steps: int) -> None:
    if not isinstance(denoiser, Denoiser):
        raise InputError(
            f"Expected a denoiser, as `purifyloader.pretrained.load` gives. Got {type(denoiser).__name__}."
        )
    check_images(images, "evaluate takes")
    if images.shape[1] != denoiser.image_channels:
        raise InputError(
            f"This denoiser takes images of {denoiser.image_channels} channel(s), (N, {denoiser.image_channels}, H, W)."
            f" Got {tuple(images.shape)}."
        )
    for name, others in poisoned.items():
        check_images(others, f"Poisoned images ({name}) are")
        if others.shape != images.shape:
            raise InputError(
                f"Poisoned images ({name}) must be the same images in the same order, {tuple(images.shape)}. Got "
                f"{tuple(others.shape)}."
            )
        if torch.equal(others, images):
            raise InputError(
                f"Poisoned images ({name}) must differ from the clean ones. Got the very same: is the clean set "
                "poisoned too, or a wrong file named?"
            )
    if sampler not in SAMPLERS:
        raise InputError(f"sampler must be one of {sorted(SAMPLERS)}. Got {sampler!r}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be a positive integer, network calls an image. Got {steps!r}.")


def _check_sigmas(denoiser: Denoiser, sigmas: Sequence[float]) -> list[float]:
    values = [float(sigma) for sigma in sigmas]
    if not values or any(not (math.isfinite(sigma) and sigma > 0) for sigma in values):
        raise InputError(f"sigmas must be one or more finite numbers above 0, in image units. Got {list(sigmas)}.")
    denoiser.check_sigma(torch.tensor(values, dtype=torch.float64))
    return sorted(set(values))


def _visited(denoiser: Denoiser, sigma: float, steps: int) -> list[float]:
    """As `purifyloader.purifiers.Diffuse` visits them."""
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

    The images of all measures are noised with the same noise, which is that of `psnr`. Washed images are
    clamped to [0, 1], as a purifier's are, everywhere but in the calibration.

    Args:
        denoiser: in eval mode for the time of the call; on its own device.
        images_NCHW: uint8, clean.
        sigmas: noise levels in image units; `default_sigmas` if None.
        poisoned: by name, the same images poisoned, uint8 in the same order. Those that do not differ from
            the clean image are left out of its measures.
        steps: network calls an image, over levels spaced as `recipes.eclipse` does; calibration is of one.
        sampler: of several calls, "ancestral" or "ddim".
        calibrate: False leaves the calibration out, which is most of the network calls.
        seed: of all noise. The result is a function of the arguments; the batch size and the device change
            only the rounding of the network's arithmetic.
        batch_size: images of a network call; by their size if None, 100 or fewer.
        progress: called with the network calls just done, counted in images, and of how many in all.

    Returns:
        A JSON object without NaN (a number that does not exist is None; six digits). Means over images have
        their standard error beside them, None for one image.

        format, version, purifyloader, torch, device, model (name, weights_sha256, parameters, sigma_range_px,
        learned_variance), images (count, shape, sha256 of the clean and of the poisoned ones), settings;

        spectrum: frequency (cycles a pixel), count (Fourier coefficients) of each ring and clean_db, the
        images' own power in it. Power is in dB over one squared level of 255; see `residual_spectrum`;

        levels: a list, rising in sigma_px, each with

        - network_levels_px: what the network is called with;
        - psnr_db: in dB with peak 1, of the denoiser (and, with several steps, of one_call), of the noised
          image as it is, of JPEG at quality 10, and of the Gaussian blur that is best on these images;
        - spectrum: error_db, and kept, the share of the images' own amplitude that comes through
          (cross-spectrum of washed and clean over the clean power; 1 all, 0 nothing);
        - calibration (None without): the root mean squared error_px of one call, unclipped, the claimed_px
          that its derivative stands for, error_over_claimed (1 is calibrated, above 1 is too sure of
          itself), stein_px, which must be error_px within its standard error, or the claim is badly known, the
          rank_correlation of both over images, the standard_deviation of the predicted_noise and the one
          expected of a calibrated denoiser, bias_px, and wrong_level: error_px for a denoiser told other
          levels than the true one (on the first 100 images), the best of them over the true one (1 is
          calibrated; None at an end of its range) and the excess of the error when told the truth, 0 where
          none told is better. See `measures.calibration`;
        - variance (None where none was learned): for the step from the nearest timestep t to t - 1 of its own
          schedule, or of the cosine one with T = 4000, its squared error over the variance learned, and over
          either bound. See `variance_calibration`;
        - removed_px: root mean square of clean minus washed, the mean over images;
        - poisoned, by name: images (that differ), perturbation_px, removed_px from the poisoned images, the
          share of the perturbation remaining and the distance that it still makes (see `removed_energy`),
          and the auc of the removed energy as a detector of poisoned images.

    Raises:
        InputError: images, noise levels or an argument of another type, shape or range.
    """
    poisoned = dict(poisoned or {})
    _check(denoiser, images_NCHW, poisoned, sampler, steps)
    chosen = default_sigmas(denoiser) if sigmas is None else _check_sigmas(denoiser, sigmas)
    if batch_size is None:
        batch_size = batch_size_of(images_NCHW)
    try:
        seed, batch_size = operator.index(seed), operator.index(batch_size)
    except TypeError:
        raise InputError(f"seed and batch_size must be integers. Got {seed!r} and {batch_size!r}.") from None
    if batch_size < 1:
        raise InputError(f"batch_size must be 1 or more. Got {batch_size}.")
    levels = [
        _Level(denoiser, sigma, _visited(denoiser, sigma, steps), sampler, calibrate, list(poisoned))
        for sigma in chosen
    ]
    total = sum(level.calls(len(images_NCHW)) for level in levels)
    power = []
    device, training = device_of(denoiser), denoiser.training
    denoiser.eval()
    try:
        with torch.no_grad(), exact_arithmetic(device):
            for start in range(0, len(images_NCHW), batch_size):
                batch = _Images(images_NCHW, poisoned, seed, start, start + batch_size)
                power.append(measures.residual_spectrum(batch.clean))
                for level in levels:
                    level.measure(batch)
                    if progress is not None:
                        progress(level.calls(start + len(batch.clean)) - level.calls(start), total)
    finally:
        denoiser.train(training)
    clean_power = torch.cat(power).mean(dim=0)
    frequency, count = measures.ring_frequencies(images_NCHW.shape[2], images_NCHW.shape[3])
    return {
        "format": FORMAT,
        "version": VERSION,
        "purifyloader": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "model": {
            "name": denoiser.name,
            "weights_sha256": weights_sha256(denoiser),
            "parameters": sum(p.numel() for p in denoiser.parameters()),
            "sigma_range_px": [_figures(255 * sigma) for sigma in denoiser.sigma_range],
            "learned_variance": bool(getattr(denoiser, "learned_variance", False)),
        },
        "images": {
            "count": len(images_NCHW),
            "shape": list(images_NCHW.shape[1:]),
            "sha256": _sha256(images_NCHW),
            "poisoned_sha256": {name: _sha256(x) for name, x in poisoned.items()},
        },
        "settings": {
            "sigma_px": [_figures(255 * sigma) for sigma in chosen],
            "seed": seed,
            "steps": steps,
            "sampler": sampler,
            "calibrate": bool(calibrate),
            "batch_size": batch_size,
        },
        "spectrum": {
            "frequency": [_figures(f) for f in frequency.tolist()],
            "count": count.tolist(),
            "clean_db": _decibels(clean_power),
        },
        "levels": [level.results(clean_power) for level in levels],
    }


def _sha256(images_NCHW: Tensor) -> str:
    """Of the shape and the bytes, as (N, C, H, W)."""
    sha = hashlib.sha256(canonical_json(list(images_NCHW.shape)).encode() + b"\n")
    sha.update(images_NCHW.cpu().contiguous().numpy().data)
    return sha.hexdigest()
