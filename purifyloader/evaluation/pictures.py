"""Draw an evaluation as one picture. matplotlib is an extra, imported when a picture is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.core import noise
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.psnr import check_images, estimate
from purifyloader.errors import InputError
from purifyloader.evaluation.evaluating import FORMAT, VERSION
from purifyloader.results.figures import new_figure, save_figure
from purifyloader.results.values import attack_label, check_format

__all__ = ["Examples", "examples", "picture"]

_SHOWN_PX = (10, 25, 50)
_GAIN = 5
_CUT = 256  # of larger images the centre is shown
_DPI = 100
_BLUE = "#1a3f8f"
_POISONS = ("#f2b134", "#d1603d", "#8d6cab", "#4f9d69")
_GREY = "#777777"


class Examples(NamedTuple):
    """Images to be shown: float32 in [0, 1], (N, H, W, C), and (levels, N, H, W, C) for each of `sigma_px`.

    >>> import numpy as np
    >>> from purifyloader.evaluation import Examples
    >>> clean, level = np.zeros((5, 32, 32, 3), np.float32), np.zeros((1, 5, 32, 32, 3), np.float32)
    >>> Examples((25.0,), clean, noised=level, denoised=level).sigma_px
    (25.0,)
    """

    sigma_px: tuple[float, ...]
    clean: NDArray[np.float32]
    noised: NDArray[np.float32]
    denoised: NDArray[np.float32]


def _some(levels_px: Sequence[float], count: int = 3) -> list[int]:
    """Choose which levels are shown where there is no room for all: 10, 25 and 50 px, or evenly spread ones."""
    usual = [i for px in _SHOWN_PX for i, level in enumerate(levels_px) if abs(level / px - 1) < 1e-3]
    if len(usual) == count:
        return usual
    return sorted({int(i) for i in np.linspace(0, len(levels_px) - 1, count).round()})


@torch.no_grad()
def examples(
    denoiser: Denoiser, images_NCHW: Tensor, sigmas: Sequence[float], *, seed: int = 0, count: int = 3
) -> Examples:
    """Choose images to show, with the noise that `evaluate` gives them and as one network call denoises them.

    Args:
        images_NCHW: uint8, clean; `count` of them, evenly spread, are taken, and the centre of large ones.
        sigmas: noise levels in image units, of which three are taken.

    >>> import torch
    >>> from purifyloader.evaluation import examples
    >>> from purifyloader.pretrained import load
    >>> denoiser, images = load("cifar10-sparse"), torch.full((1, 3, 32, 32), 99, dtype=torch.uint8)
    >>> examples(denoiser, images, [25 / 255]).denoised.shape
    (1, 1, 32, 32, 3)
    """
    check_images(images_NCHW, "Examples are")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1 or not len(sigmas):
        raise InputError(f"Expected count of 1 or more and one or more sigmas. Got {count!r} and {list(sigmas)}.")
    chosen = [sorted(sigmas)[i] for i in _some([255 * sigma for sigma in sorted(sigmas)])]
    spread = torch.from_numpy(np.linspace(0, len(images_NCHW) - 1, min(count, len(images_NCHW)))).round().long()
    clean = images_NCHW[spread].float() / 255
    z = noise.normal(noise.image_keys(seed, 0, spread), clean.shape[1:])
    noised = [clean + sigma * z for sigma in chosen]
    denoised = [estimate(denoiser, x, sigma) for x, sigma in zip(noised, chosen, strict=True)]

    def shown(x_BCHW: Tensor) -> NDArray[np.float32]:
        height, width = x_BCHW.shape[-2:]
        top, left = max(0, height - _CUT) // 2, max(0, width - _CUT) // 2
        x = x_BCHW[..., top : top + _CUT, left : left + _CUT].clamp(0, 1).permute(0, 2, 3, 1)
        return (x if x.shape[-1] == 3 else x[..., :1].expand(-1, -1, -1, 3)).numpy()

    return Examples(
        tuple(255 * sigma for sigma in chosen),
        shown(clean),
        np.stack([shown(x) for x in noised]),
        np.stack([shown(x) for x in denoised]),
    )


def picture(results: Mapping[str, Any], path: str | Path, shown: Examples | None = None) -> Path:
    """Draw the results of `evaluate`, or their JSON, and the images `shown` below, as a PNG at `path`.

    It needs matplotlib.

    >>> import torch
    >>> from purifyloader.evaluation import evaluate, picture
    >>> from purifyloader.pretrained import load
    >>> denoiser, images = load("cifar10-sparse"), torch.full((1, 3, 32, 32), 99, dtype=torch.uint8)
    >>> picture(evaluate(denoiser, images, [25 / 255], calibrate=False), "evaluation.png").name
    'evaluation.png'
    """
    check_format(results, [(FORMAT, VERSION)], "evaluate")
    figure = new_figure((17, 4.9 if shown is None else 10.2), dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    figure.suptitle(_title(results), fontsize=13, x=0.01, ha="left")
    if shown is None:
        _panels(figure.subplots(1, 4), results)
    else:
        top, bottom = figure.subfigures(2, 1, height_ratios=(4.6, 5.4))
        _panels(top.subplots(1, 4), results)
        _strip(bottom, shown)
    return save_figure(figure, path)


def _title(results: Mapping[str, Any]) -> str:
    model, images, settings = results["model"], results["images"], results["settings"]
    data = results.get("data", {}).get("description")
    shape = "×".join(str(side) for side in images["shape"][1:])
    calls = "one network call" if settings["steps"] == 1 else f"{settings['steps']} network calls"
    return (
        f"{model['name'] or 'A denoiser'} ({model['parameters']:,} parameters, weights {model['weights_sha256'][:8]}) "
        f"on {images['count']:,} images of {shape} pixels{f' of {data}' if data else ''}; {calls} an image"
    )


def _panels(axes: Any, results: Mapping[str, Any]) -> None:
    levels = results["levels"]
    for draw, axis in zip((_psnr, _claims, _removed, _remaining), axes, strict=True):
        draw(axis, levels)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(11)


def _nothing(axis: Any, title: str, text: str) -> None:
    axis.set(title=title, xticks=[], yticks=[])
    axis.text(0.5, 0.5, text, ha="center", va="center", color=_GREY, transform=axis.transAxes)


def _over_sigma(axis: Any, levels: Sequence[Mapping[str, Any]]) -> list[float]:
    """Draw a logarithmic axis of noise, labelled at what was measured unless labels would touch."""
    px = [level["sigma_px"] for level in levels]
    axis.set_xscale("log")
    ticks: list[float] = []
    for value in px:
        if not ticks or value / ticks[-1] > (px[-1] / px[0]) ** 0.07:
            ticks.append(value)
    axis.set_xticks(ticks, [f"{value:.3g}" for value in ticks])
    axis.minorticks_off()
    axis.set_xlabel("noise (px of 255)")
    axis.grid(alpha=0.25)
    return px


def _curve(
    axis: Any, px: Sequence[float], values: Sequence[Mapping[str, Any]], colour: str, **line: Any
) -> list[float]:
    """Draw means with two standard errors, which is 95 %, and return the means."""
    error = [2 * (value["standard_error"] or 0) for value in values]
    means = [math.nan if value["mean"] is None else value["mean"] for value in values]
    axis.errorbar(px, means, error, color=colour, marker="o", ms=4, capsize=2, **line)
    return means


def _psnr(axis: Any, levels: Sequence[Mapping[str, Any]]) -> None:
    px = _over_sigma(axis, levels)
    for name, label, colour, width in (
        ("denoiser", "this denoiser", _BLUE, 2),
        ("one_call", "one call of it", "#5b8def", 1),
        ("jpeg10", "JPEG-10", "#d1603d", 1),
        ("noised", "as it is", _GREY, 1),
    ):
        if name in levels[0]["psnr_db"]:
            _curve(axis, px, [level["psnr_db"][name] for level in levels], colour, label=label, lw=width)
    axis.set(title="Noised and denoised", ylabel="PSNR (dB)")
    axis.legend(frameon=False, fontsize=9)


def _claims(axis: Any, levels: Sequence[Mapping[str, Any]]) -> None:
    title = "Calibration: 1 is calibrated"
    if levels[0]["calibration"] is None:
        _nothing(axis, title, "not measured")
        return
    px = _over_sigma(axis, levels)
    values = _curve(axis, px, [level["calibration"]["error_over_claimed"] for level in levels], _BLUE, lw=2)
    axis.axhline(1, color=_GREY, lw=0.8)
    finite = [value for value in values if np.isfinite(value)] or [1.0]
    reach = max(0.15, 1.6 * max(abs(np.log(finite))))  # room for the legend
    axis.set_ylim(np.exp(-reach), np.exp(reach))
    _log_scale(axis, (0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.25, 1.5, 2, 5, 10))
    axis.set(title=title, ylabel="error / error claimed")


def _log_scale(axis: Any, ticks: Sequence[float]) -> None:
    """Make the vertical axis logarithmic, with those of the ticks that lie on it unless that is one alone."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    if len(shown) > 1:
        axis.set_yticks(shown, [f"{tick:g}" for tick in shown])
        axis.yaxis.minorticks_off()


def _poisons(levels: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return list(zip(levels[0]["poisoned"], _POISONS * 9, strict=False))


def _removed(axis: Any, levels: Sequence[Mapping[str, Any]]) -> None:
    px = _over_sigma(axis, levels)
    _curve(axis, px, [level["removed_px"] for level in levels], _BLUE, label="from clean images", lw=2)
    for name, colour in _poisons(levels):
        attacks = [level["poisoned"][name] for level in levels]
        removed = [attack["removed_px"] for attack in attacks]
        _curve(axis, px, removed, colour, label=f"from {attack_label(name, 24)} images", lw=1)
        if (size := attacks[0]["perturbation_px"]["mean"]) is not None:
            axis.axhline(size, color=colour, ls=":", lw=1)
    _log_scale(axis, (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100))
    if levels[0]["poisoned"]:
        axis.plot([], [], color=_GREY, ls=":", lw=1, label="size of the poison")
    axis.set(title="What it removes", ylabel="image − washed image (RMS, px of 255)")
    axis.legend(frameon=False, fontsize=9)


def _remaining(axis: Any, levels: Sequence[Mapping[str, Any]]) -> None:
    title = "What is left of a poison"
    if not levels[0]["poisoned"]:
        _nothing(axis, title, "no poisoned images given")
        return
    px = _over_sigma(axis, levels)
    for name, colour in _poisons(levels):
        lines = (("remaining", "of the pattern", {"lw": 1.8}), ("distance", "of any change", {"lw": 1, "ls": "--"}))
        for key, what, style in lines:
            shares = [level["poisoned"][name][key] for level in levels]
            _curve(axis, px, shares, colour, label=f"{attack_label(name, 24)}: {what}", **style)
    axis.set(title=title, ylabel="share of its size", ylim=(min(0, axis.get_ylim()[0]), max(1.05, axis.get_ylim()[1])))
    axis.legend(frameon=False, fontsize=9, loc="lower left")


def _strip(figure: Any, shown: Examples) -> None:
    rows, groups = len(shown.clean), len(shown.sigma_px)
    # a narrow empty column before each noise level
    grid = figure.add_gridspec(rows, 1 + 4 * groups, width_ratios=[1, *([0.12, 1, 1, 1] * groups)])
    filled = [0, *(column for column in range(1, 1 + 4 * groups) if column % 4 != 1)]
    for row in range(rows):
        axes = [figure.add_subplot(grid[row, column]) for column in filled]
        columns = [("clean", shown.clean[row])]
        for group, px in enumerate(shown.sigma_px):
            noised, denoised = shown.noised[group, row], shown.denoised[group, row]
            difference = np.clip(0.5 + _GAIN * (denoised - shown.clean[row]), 0, 1)
            columns += [(f"+ {px:.3g} px noise", noised), ("denoised", denoised), (f"its error ×{_GAIN}", difference)]
        for axis, (title, image) in zip(axes, columns, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(title, fontsize=10)
