"""The card of a trained energy model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from purifyloader.energy.network import EnergyNetwork
from purifyloader.train import card as common

__all__ = ["energy_card"]


def energy_card(
    name: str, energy: EnergyNetwork, details: Mapping[str, Any], pictures: Mapping[str, str], options: str = ""
) -> str:
    """Return the text of README.md: see `purifyloader.train.card.card`."""
    results = []
    if details["chains"]:
        results = _chains(details["chains"], details["chain_images"], details["held_out"], details["margin_px"])
    return common.card(
        name, ("An energy model", "energy"), _facts(energy, details), results, details, pictures, options
    )


def _rate(train: Mapping[str, Any]) -> str:
    text = common.rate(train, {"sgd": "SGD", "adam": "Adam"}[train["optimizer"]])
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


def _facts(energy: EnergyNetwork, details: Mapping[str, Any]) -> list[common.Fact]:
    train = details["train"]
    mirrored = " and their mirror images" if train["flip"] else ""
    walk = (
        f"{train['langevin_steps']} an update, of {255 * train['step_size']:.3g} px of noise, at temperature "
        f"{train['temperature']:g}"
    )
    return [
        ("Parameters", f"{sum(p.numel() for p in energy.parameters()):,} (width {energy.config.channels})"),
        *common.origin(details, f"{mirrored}, with {255 * train['data_noise']:.3g} px of noise"),
        ("Langevin steps", walk),
        ("Bank", _bank(train)),
        *common.run(details, _rate(train), "updates", "images and samples"),
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
