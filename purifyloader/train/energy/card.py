"""The card of a trained energy model: README.md, generated from what its config.json says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from purifyloader.energy.network import EnergyNetwork
from purifyloader.train.denoiser.card import again, start_words

__all__ = ["energy_card"]


def _rate(train: Mapping[str, Any]) -> str:
    text = f"{train['optimizer'].upper() if train['optimizer'] == 'sgd' else 'Adam'} {train['learning_rate']:g}"
    if train["warmup"]:
        text += f", warm-up {train['warmup']:,} steps"
    if train["decay_at"]:
        text += f", a tenth from the steps {', '.join(f'{step:,}' for step in train['decay_at'])} on"
    return text + (f", gradient norm at most {train['clip_norm']:g}" if train["clip_norm"] is not None else "")


def _bank(train: Mapping[str, Any]) -> str:
    begun = "uniform noise" if train["bank"] == "noise" else f"images with {255 * train['data_noise']:.3g} px of noise"
    size = "one for each image" if train["bank_size"] is None else f"{train['bank_size']:,}"
    text = f"{size}, begun at {begun}"
    if train["rejuvenation"]:
        text += f"; {train['rejuvenation']:.0%} begin anew each time"
    return text + ("; each compared with its own image" if train["paired"] else "")


def _facts(energy: EnergyNetwork, details: Mapping[str, Any]) -> list[tuple[str, str]]:
    train, record = details["train"], details["record"]
    processes = f" in {record['processes']} processes" if record["processes"] > 1 else ""
    return [
        ("Parameters", f"{sum(p.numel() for p in energy.parameters()):,} (width {energy.config.channels})"),
        (
            "Trained on",
            f"{len(details['indices']):,} of {details['data_length']:,} images of {details['data']}"
            f"{' and their mirror images' if train['flip'] else ''}, with {255 * train['data_noise']:.3g} px of noise",
        ),
        ("Started from", start_words(train)),
        (
            "Langevin steps",
            f"{train['langevin_steps']} an update, of {255 * train['step_size']:.3g} px of noise, "
            f"at temperature {train['temperature']:g}",
        ),
        ("Bank", _bank(train)),
        (
            "Length",
            f"{record['steps']:,} updates of {train['batch_size']} images and samples, {record['epochs']:,g} epochs, "
            f"{record['seconds'] / 60:,.0f} minutes on {details['machine']}{processes}"
            + (f", {record['peak_memory'] / 1e9:.1f} GB of memory at most" if record["peak_memory"] else ""),
        ),
        ("Optimiser", _rate(train)),
        ("Average", f"EMA {train['ema_decay']}" if train["ema_decay"] else "none"),
        ("Arithmetic", f"{train['dtype']}{', compiled' if train['compile'] else ''}, seed {train['seed']}"),
        ("Licence", details["licence"] or "not stated"),
    ]


def _chains(rows: Sequence[Mapping[str, Any]], images: int, held_out: str, margin_px: float) -> list[str]:
    text = [
        f"Chains of Langevin steps from {images} {held_out}: how far they move (root mean square), how their energy "
        "changes (in standard deviations of the images' own energies), how their contrast does (1 is as it was), and "
        f"how many of their pixels leave [0, 1] by more than {margin_px:.3g} px, further than noise alone takes them:",
        "",
        "| steps | moved | energy | contrast | outside |",
        "|---|---|---|---|---|",
    ]
    text += [
        f"| {r['steps']:,} | {r['moved_px']:.1f} px | {r['energy']:+.2f} | {r['contrast']:.2f} | {r['outside']:.1%} |"
        for r in rows
    ]
    return [*text, ""]


def energy_card(name: str, energy: EnergyNetwork, details: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The text of README.md.

    Args:
        name: of the model.
        energy: the trained one.
        details: what is saved with it; see `purifyloader.commands.train_energy`.
        pictures: names of files beside the card, with what they show.
    """
    text = [f"# {name}", "", "An energy model for `purifyloader`, trained by `purifyloader train energy`.", ""]
    if details["note"]:
        text += [details["note"], ""]
    text += ["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in _facts(energy, details)), ""]
    if details["chains"]:
        text += _chains(details["chains"], details["chain_images"], details["held_out"], details["margin_px"])
    if details["record"]["warnings"]:
        text += ["While it was trained:", "", *(f"- {warning}" for warning in details["record"]["warnings"]), ""]
    for picture, caption in pictures.items():
        text += [f"![{caption}]({picture})", "", f"*{caption}*", ""]
    return "\n".join([*text, *again("energy", details)])
