"""Train an energy model from a folder of clean images to a checkpoint with its card: `purifyloader train energy`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from purifyloader.commands.options import given
from purifyloader.commands.training import (
    CleanSet,
    Place,
    add_card,
    add_how,
    add_images,
    add_run,
    details,
    fields_of,
    held_out_images,
    machine,
    print_estimate,
    run_training,
    start_name,
)
from purifyloader.errors import ConfigError, InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from purifyloader.energy.network import EnergyNetwork
    from purifyloader.train.energy.config import EnergyTrainConfig

__all__ = ["DESCRIPTION", "add_options", "configuration", "run", "save"]

DESCRIPTION = (
    "Train an energy model from clean images (PureGen-EBM). Run the same command again after a stop: "
    "it goes on. On several GPUs: accelerate launch -m purifyloader train energy, with the same options."
)

_FIELDS = (
    "steps",
    "batch_size",
    "langevin_steps",
    "learning_rate",
    "rejuvenation",
    "bank_size",
    "seed",
    "dtype",
    "compile",
)
_CHAIN_STEPS = (10, 50, 150, 500, 1500)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_images(parser, "follow the energies of")
    how = add_how(
        parser,
        "light: a narrow network and short chains, an hour or two of a CPU core (default); paper: PureGen's "
        "Algorithm 2; published: PureGen's code",
        "updates of the weights; the steps at which the rate falls move along",
        "images an update, and as many samples, over all processes",
    )
    how.add_argument("--langevin-steps", type=int, metavar="K", help="of each sample in each update")
    how.add_argument("--channels", type=int, help="width of the network (published: 128)")
    how.add_argument("--bank-size", type=int, help="persistent samples (default: one an image)")
    how.add_argument("--rejuvenation", type=float, metavar="P", help="probability that a sample begins anew")
    how.add_argument(
        "--chain-steps",
        type=int,
        metavar="N",
        help="length of the long chains at the end (default: 1500; 500 on the CPU; 0 for none)",
    )
    add_run(parser)
    add_card(parser)


def run(options: argparse.Namespace) -> int:
    """Train, or estimate what it would cost."""
    from purifyloader.train.curves import CURVES_PNG
    from purifyloader.train.energy.curves import BANK_PNG, CHAINS_PNG

    if options.chain_steps is not None and options.chain_steps < 0:
        raise InputError(f"must be 0 or more. Got {options.chain_steps}.", argument="chain_steps")
    pictures = (CURVES_PNG, BANK_PNG, CHAINS_PNG)
    run_training(options, pictures, lambda clean, place: _train(options, clean, place))
    return 0


def _train(options: argparse.Namespace, clean: CleanSet, place: Place) -> None:
    from purifyloader.train import plan
    from purifyloader.train.energy.task import build_energy, train_energy
    from purifyloader.train.state import STATE_FILE, writing

    config, start = configuration(options, clean.images.shape[1], place.device)
    if options.estimate:
        measured = plan.measure(build_energy, train_energy, clean.images, config, start=start, device=place.device)
        print_estimate(measured, config, place)
        return
    held_out, held_out_name = held_out_images(options, clean, place.quiet)
    energy, record = train_energy(
        clean.images,
        options.out,
        config,
        start=start,
        held_out=held_out,
        device=place.device,
        save_every=options.save_every,
        progress=not place.quiet,
    )
    if place.rank > 0:
        return
    about = details(options, clean, held_out_name or "images trained on", config, record, machine(place.device))
    with writing(options.out):
        images = clean.images if held_out is None else held_out
        rows, count, failure = _chains(options, energy, images, config, place.device)
        about |= {"chains": rows, "chain_images": count, "margin_px": round(255 * config.margin, 2)}
        if failure is not None:  # of the chains, and no reason to lose what was trained
            record["warnings"].append(failure)
        save(energy, options.out, options.name or options.out.resolve().name, about)
    (options.out / STATE_FILE).unlink(missing_ok=True)
    print(f"{options.out}: {record['steps']:,} updates, {record['seconds']:.0f} s")
    for row in rows:
        print(
            f"  {row['steps']:,} steps on: moved {row['moved_px']:.1f} px, energy {row['energy']:+.2f}, "
            f"contrast {row['contrast']:.2f}, {row['outside']:.1%} outside by more than {about['margin_px']:.3g} px"
        )


def _decay_at(base: EnergyTrainConfig, fields: Mapping[str, Any], steps: int | None) -> tuple[int, ...]:
    """Return where the rate falls: as the file says, else as the preset does, moved with the number of steps."""
    from purifyloader.train.energy.config import EnergyTrainConfig

    length = {name: fields[name] for name in ("steps", "decay_at") if name in fields}
    config = EnergyTrainConfig.from_dict(length, base)
    known = config if "decay_at" in fields else base
    steps = config.steps if steps is None else steps
    return tuple(max(1, step * steps // known.steps) for step in known.decay_at)


def configuration(
    options: argparse.Namespace, image_channels: int, device: torch.device
) -> tuple[EnergyTrainConfig, EnergyNetwork | None]:
    """Build what to train from a preset, fields of a file over it, and options over both; see `train_denoiser`."""
    from purifyloader import pretrained
    from purifyloader.train.energy.config import EnergyTrainConfig, energy_recipe
    from purifyloader.train.fields import check_start_from, started_from

    base = energy_recipe(options.preset, image_channels)
    fields = fields_of(options.config) if options.config is not None else {}
    named = fields.pop("start_from", None)
    check_start_from(named)
    name = start_name(options, named)
    start = None if name is None else pretrained.load(name, kind="energy")
    network = fields.get("network", {})
    if not isinstance(network, Mapping):
        raise ConfigError(f"network must be an object of its fields. Got {network!r}.")
    shape = {} if start is None else start.config.to_dict()
    channels = {} if options.channels is None else {"channels": options.channels}
    changes = given(options, _FIELDS)
    changes |= {"network": {**shape, **network, **channels}, "decay_at": _decay_at(base, fields, options.steps)}
    if not {"compile"} & {*changes, *fields}:
        changes["compile"] = device.type == "cuda"
    # once all of it is known: a bank that is too small for the preset's batch may fit the one that is asked for
    config = EnergyTrainConfig.from_dict({**fields, **changes}, base)
    return (config, None) if start is None else (started_from(config, start), start)


def _chains(
    options: argparse.Namespace, energy: EnergyNetwork, images: Tensor, config: EnergyTrainConfig, device: torch.device
) -> tuple[list[dict[str, float]], int, str | None]:
    from purifyloader.train.energy.curves import CHAINS_PNG, long_chains

    longest = options.chain_steps
    if longest is None:
        longest = 1500 if device.type == "cuda" else 500
    if longest == 0:
        return [], 0, None
    steps = sorted({step for step in _CHAIN_STEPS if step < longest} | {longest})
    images = images[:64].to(device)
    rows, failure = long_chains(energy, images, config, steps, options.out / CHAINS_PNG)
    return rows, len(images), failure


def save(energy: EnergyNetwork, out: Path, name: str, about: Mapping[str, Any]) -> None:
    """Write the checkpoint with its card, over whatever a killed save left there."""
    from purifyloader import pretrained
    from purifyloader.train.curves import CURVES_PNG
    from purifyloader.train.energy.card import energy_card
    from purifyloader.train.energy.curves import BANK_PNG, CHAINS_PNG

    at = ", ".join(f"{row['steps']:,}" for row in about["chains"])
    captions = {
        CURVES_PNG: "Energies of images and samples, their difference, and the slope, over the run.",
        BANK_PNG: "Samples of the bank at the end.",
    }
    if about["chains"]:
        captions[CHAINS_PNG] = f"Images, and chains from them after {at} steps."
    text = energy_card(name, energy, about, {p: c for p, c in captions.items() if (out / p).exists()})
    pretrained.save(energy, out, name=name, card=text, details=about, overwrite=True)
