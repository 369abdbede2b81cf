"""The card of a trained denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.train import card as common

__all__ = ["card"]


def card(
    name: str, denoiser: NetworkDenoiser, details: Mapping[str, Any], pictures: Mapping[str, str], options: str = ""
) -> str:
    """Return the text of README.md: see `purifyloader.train.card.card`."""
    results = _quality(details["psnr"], details["held_out"]) if details["psnr"] else []
    return common.card(name, ("A denoiser", "denoiser"), _facts(denoiser, details), results, details, pictures, options)


def _noise(train: Mapping[str, Any], low: float, high: float) -> str:
    text = f"sigma {low:.4g} to {high:.4g} in image units ({255 * low:.3g} to {255 * high:.3g} px)"
    if train["objective"] == "sigma":
        return f"{text}, log-normal around {255 * train['sigma_center']:.3g} px"
    top = train["max_timestep"] or train["timesteps"]
    return f"{text}: timesteps 1 to {top:,} of the {train['schedule']} schedule with T = {train['timesteps']:,}"


def _objective(train: Mapping[str, Any], learned_variance: bool) -> str:
    text = train["objective"]
    if text == "hybrid":  # its variational terms train the variance, and are nothing without one
        of_both = f"hybrid (Eq. 8, gamma = {train['gamma']:g})"
        text = of_both if learned_variance else "the error of the noise (Eq. 8 without its second term)"
    text += f"; augmentation: {', '.join(train['augment']) or 'none'}; M = {train['replicate']}"
    return text + (f"; patches of {train['patch_size']} px" if train["patch_size"] else "")


def _rate(train: Mapping[str, Any]) -> str:
    text = common.rate(train, "AdamW")
    if train["decay_steps"]:
        text += f", {train['decay']} decay over the last {train['decay_steps']:,}"
    return f"{text}, weight decay {train['weight_decay']:g}, gradient norm at most {train['clip_norm']:g}"


def _facts(denoiser: NetworkDenoiser, details: Mapping[str, Any]) -> list[common.Fact]:
    train, learned = details["train"], denoiser.learned_variance
    return [
        ("Parameters", f"{sum(p.numel() for p in denoiser.parameters()):,}"),
        ("Predicts", f"{denoiser.parameterization}, {'learned' if learned else 'fixed'} variance"),
        ("Noise it was trained for", _noise(train, *denoiser.sigma_range)),
        *common.origin(details),
        ("Objective", _objective(train, learned)),
        *common.run(details, _rate(train), "steps", "images"),
    ]


def _quality(rows: Sequence[Mapping[str, Any]], held_out: str) -> list[str]:
    text = [f"PSNR in dB, the mean over {rows[0]['images']:,} {held_out}, one network call:", ""]
    text += ["| noise | this denoiser | JPEG-10 | doing nothing |", "|---|---|---|---|"]
    text += [f"| {r['sigma_px']:g} px | {r['denoiser']:.2f} | {r['jpeg10']:.2f} | {r['noised']:.2f} |" for r in rows]
    return [*text, ""]
