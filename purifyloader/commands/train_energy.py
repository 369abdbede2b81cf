"""Train an energy model from a folder of clean images to a checkpoint with its card: `purifyloader train energy`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from purifyloader.commands.options import positive
from purifyloader.commands.training import (
    Kind,
    Trained,
    add_training_options,
    changes_of,
    fields_of_file,
    fitted,
    named_model,
    run_training,
)
from purifyloader.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from purifyloader.energy.network import EnergyNetwork
    from purifyloader.train.energy.config import EnergyTrainConfig

DESCRIPTION = (
    "Train an energy model from clean images (PureGen-EBM). Run the same command again after a stop: "
    "it goes on. On several GPUs: accelerate launch -m purifyloader train energy, with the same options."
)

_CHAIN_STEPS = (10, 50, 150, 500, 1500)


def add_options(parser: argparse.ArgumentParser) -> None:
    how, _ = add_training_options(
        parser,
        validation="follow the energies of",
        presets={
            "light": "a narrow network and short chains, an hour or two of a CPU core (default)",
            "paper": "PureGen's Algorithm 2",
            "published": "PureGen's code",
        },
        steps="updates of the weights; the steps at which the rate falls move along",
        batch="images an update, and as many samples, over all processes",
    )
    how.add_argument("--langevin-steps", type=positive, metavar="K", help="of each sample in each update")
    how.add_argument("--channels", type=positive, help="width of the network (published: 128)")
    how.add_argument("--bank-size", type=positive, help="persistent samples (default: one an image)")
    how.add_argument("--rejuvenation", type=float, metavar="P", help="probability that a sample begins anew")
    words = "length of the long chains at the end (default: 1500; 500 on the CPU; 0 for none)"
    how.add_argument("--chain-steps", type=int, metavar="N", help=words)


def run(options: argparse.Namespace) -> int:
    from purifyloader.train.curves import CURVES_PNG
    from purifyloader.train.energy.card import energy_card
    from purifyloader.train.energy.curves import BANK_PNG, CHAINS_PNG
    from purifyloader.train.energy.task import build_energy, train_energy

    if options.chain_steps is not None and options.chain_steps < 0:
        raise InputError(f"must be 0 or more. Got {options.chain_steps}.", argument="chain_steps")
    pictures = (CURVES_PNG, BANK_PNG, CHAINS_PNG)
    kind = Kind(configuration, build_energy, train_energy, _arguments, _judge, energy_card, pictures, "updates")
    return run_training(options, kind)


def _arguments(options: argparse.Namespace, held_out: Tensor | None) -> dict[str, Any]:
    return {"held_out": held_out}


def _judge(options: argparse.Namespace, trained: Trained) -> tuple[list[str], dict[str, str]]:
    """Walk long chains from held-out images, or without them from those trained on."""
    from purifyloader.train.curves import CURVES_PNG
    from purifyloader.train.energy.curves import BANK_PNG, CHAINS_PNG, long_chains

    config, about = trained.config, trained.details
    about["held_out"] = about["held_out"] or "images trained on"
    images = (trained.images if trained.held_out is None else trained.held_out)[:64].to(trained.device)
    longest = options.chain_steps
    if longest is None:
        longest = 1500 if trained.device.type == "cuda" else 500
    about |= {"chains": [], "chain_images": 0, "margin_px": round(255 * config.margin, 2)}
    if longest:
        steps = sorted({step for step in _CHAIN_STEPS if step < longest} | {longest})
        rows, failure = long_chains(trained.model, images, config, steps, options.out / CHAINS_PNG)
        about |= {"chains": rows, "chain_images": len(images)}
        if failure is not None:  # of the chains, and no reason to lose what was trained
            about["record"]["warnings"].append(failure)
    captions = {
        CURVES_PNG: "Energies of images and samples, their difference, and the slope, over the run.",
        BANK_PNG: "Samples of the bank at the end.",
    }
    if about["chains"]:
        at = ", ".join(f"{row['steps']:,}" for row in about["chains"])
        captions[CHAINS_PNG] = f"Images, and chains from them after {at} steps."
    return [
        f"{row['steps']:,} steps on: moved {row['moved_px']:.1f} px, energy {row['energy']:+.2f}, "
        f"contrast {row['contrast']:.2f}, {row['outside']:.1%} outside by more than {about['margin_px']:.3g} px"
        for row in about["chains"]
    ], captions


def configuration(
    options: argparse.Namespace, image_shape: Sequence[int], device: torch.device
) -> tuple[EnergyTrainConfig, dict[str, EnergyNetwork | None]]:
    """Build a configuration from a preset, fields of a file over it, and options over both; load its start or None."""
    from purifyloader.train.energy.config import EnergyTrainConfig, energy_recipe
    from purifyloader.train.fields import started_from

    base = energy_recipe(options.preset, image_shape[0])
    fields = fields_of_file(options)
    start = named_model(options, fields, "start_from", "energy")
    network = {} if start is None else start.config.to_dict()
    network |= fields.get("network", {})
    if options.channels is not None:
        network["channels"] = options.channels
    changes = changes_of(options, EnergyTrainConfig)
    changes |= {"network": network, "decay_at": _decay_at(base, fields, options.steps)}
    # once all of it is known: a bank that is too small for the preset's batch may fit the one that is asked for
    config = EnergyTrainConfig.from_dict({**fields, **changes}, base)
    config = fitted(config, {*changes, *fields}, device, True)
    return (config if start is None else started_from(config, start)), {"start": start}


def _decay_at(base: EnergyTrainConfig, fields: Mapping[str, Any], steps: int | None) -> tuple[int, ...]:
    """Return where the rate falls: as the file says, else as the preset does, moved with the number of steps."""
    from purifyloader.train.energy.config import EnergyTrainConfig

    length = {name: fields[name] for name in ("steps", "decay_at") if name in fields}
    config = EnergyTrainConfig.from_dict(length, base)
    known = config if "decay_at" in fields else base
    steps = config.steps if steps is None else steps
    return tuple(max(1, step * steps // known.steps) for step in known.decay_at)
