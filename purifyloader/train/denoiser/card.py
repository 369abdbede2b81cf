"""The card of a trained denoiser: README.md, generated from what its config.json says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from purifyloader.diffusion.denoiser import NetworkDenoiser

__all__ = ["again", "card", "start_words"]


def _noise(train: Mapping[str, Any], low: float, high: float) -> str:
    text = f"sigma {low:.4g} to {high:.4g} in image units ({255 * low:.3g} to {255 * high:.3g} px)"
    if train["objective"] == "sigma":
        return f"{text}, log-normal around {255 * train['sigma_center']:.3g} px"
    top = train["max_timestep"] or train["timesteps"]
    return f"{text}: timesteps 1 to {top:,} of the {train['schedule']} schedule with T = {train['timesteps']:,}"


def start_words(train: Mapping[str, Any]) -> str:
    """What a training started from."""
    start = train["start_from"]
    if start is None:
        return "random weights"
    return f"the weights of `{start['name'] or 'an unnamed model'}` (SHA-256 `{start['weights_sha256'][:16]}`)"


def _rate(train: Mapping[str, Any]) -> str:
    text = f"AdamW {train['learning_rate']:g}"
    if train["warmup"]:
        text += f", warm-up {train['warmup']:,} steps"
    if train["decay_steps"]:
        text += f", {train['decay']} decay over the last {train['decay_steps']:,}"
    return f"{text}, weight decay {train['weight_decay']:g}, gradient norm at most {train['clip_norm']:g}"


def _facts(denoiser: NetworkDenoiser, details: Mapping[str, Any]) -> list[tuple[str, str]]:
    train, record = details["train"], details["record"]
    low, high = denoiser.sigma_range
    parameters = sum(p.numel() for p in denoiser.parameters())
    objective = train["objective"]
    if objective == "hybrid":  # whose variational terms train the variance, and are nothing without one
        of_both = f"hybrid (Eq. 8, gamma = {train['gamma']:g})"
        objective = of_both if denoiser.learned_variance else "the error of the noise (Eq. 8 without its second term)"
    processes = f" in {record['processes']} processes" if record["processes"] > 1 else ""
    return [
        ("Parameters", f"{parameters:,}"),
        ("Predicts", f"{denoiser.parameterization}, {'learned' if denoiser.learned_variance else 'fixed'} variance"),
        ("Noise it was trained for", _noise(train, low, high)),
        ("Trained on", f"{len(details['indices']):,} of {details['data_length']:,} images of {details['data']}"),
        ("Started from", start_words(train)),
        (
            "Objective",
            f"{objective}; augmentation: {', '.join(train['augment']) or 'none'}; M = {train['replicate']}"
            + (f"; patches of {train['patch_size']} px" if train["patch_size"] else ""),
        ),
        (
            "Length",
            f"{record['steps']:,} steps of {train['batch_size']} images, {record['epochs']:,g} epochs, "
            f"{record['seconds'] / 60:,.0f} minutes on {details['machine']}{processes}"
            + (f", {record['peak_memory'] / 1e9:.1f} GB of memory at most" if record["peak_memory"] else ""),
        ),
        ("Optimiser", _rate(train)),
        ("Average", f"EMA {train['ema_decay']}" if train["ema_decay"] else "none"),
        (
            "Arithmetic",
            f"{train['dtype']}{' with convolutions in TF32' if record['tf32'] else ''}"
            f"{', compiled' if train['compile'] else ''}, seed {train['seed']}",
        ),
        ("Licence", details["licence"] or "not stated"),
    ]


def _quality(rows: Sequence[Mapping[str, Any]], held_out: str) -> list[str]:
    text = [f"PSNR in dB, the mean over {rows[0]['images']:,} {held_out}, one network call:", ""]
    text += ["| noise | this denoiser | JPEG-10 | doing nothing |", "|---|---|---|---|"]
    text += [f"| {r['sigma_px']:g} px | {r['denoiser']:.2f} | {r['jpeg10']:.2f} | {r['noised']:.2f} |" for r in rows]
    return [*text, ""]


def card(name: str, denoiser: NetworkDenoiser, details: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The text of README.md.

    Args:
        name: of the model.
        denoiser: the trained one.
        details: what is saved with it; see `purifyloader.commands.train_denoiser`.
        pictures: names of files beside the card, with what they show.
    """
    text = [f"# {name}", "", "A denoiser for `purifyloader`, trained by `purifyloader train denoiser`.", ""]
    if details["note"]:
        text += [details["note"], ""]
    text += ["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in _facts(denoiser, details)), ""]
    if details["psnr"]:
        text += _quality(details["psnr"], details["held_out"])
    if details["record"]["warnings"]:
        text += ["While it was trained:", "", *(f"- {warning}" for warning in details["record"]["warnings"]), ""]
    for picture, caption in pictures.items():
        text += [f"![{caption}]({picture})", "", f"*{caption}*", ""]
    return "\n".join([*text, *again("denoiser", details)])


def again(what: str, details: Mapping[str, Any]) -> list[str]:
    """The end of a card: how to train `purifyloader train WHAT` again, and on which images."""
    size = f" --size {details['resized']}" if details.get("resized") else ""
    return [
        "To train it again, `config.json` of this folder says the rest:",
        "",
        "```bash",
        f"purifyloader train {what} --data DATA --config config.json --indices config.json{size} --out again",
        "```",
        "",
        "<details><summary>Indices of the training images</summary>",
        "",
        ", ".join(map(str, details["indices"])),
        "",
        "</details>",
        "",
    ]
