"""`purifyloader train energy`, or on several GPUs `accelerate launch -m purifyloader train energy`.

From a folder of clean images to an energy model with its card.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purifyloader import pretrained
from purifyloader.commands.training import (
    add_card,
    add_data,
    add_run,
    alone,
    clean_set,
    details,
    held_out_images,
    machine,
    prepare,
    processes,
    start_name,
)
from purifyloader.energy.network import EnergyNetwork
from purifyloader.errors import ConfigError, InputError
from purifyloader.train import plan
from purifyloader.train.denoiser.config import check_start_from
from purifyloader.train.denoiser.curves import CURVES_PNG
from purifyloader.train.energy.card import energy_card
from purifyloader.train.energy.config import ENERGY_RECIPES, EnergyTrainConfig, energy_recipe
from purifyloader.train.energy.curves import BANK_PNG, CHAINS_PNG, long_chains
from purifyloader.train.energy.plan import measure_energy
from purifyloader.train.energy.task import energy_started_from, train_energy
from purifyloader.train.state import STATE_FILE, writing

__all__ = ["DESCRIPTION", "add_options", "run", "save"]

_OPTIONS = ("steps", "batch_size", "langevin_steps", "learning_rate", "rejuvenation", "bank_size", "seed", "dtype")
_CHAIN_STEPS = (10, 50, 150, 500, 1500)


DESCRIPTION = (
    "Train an energy model from clean images (PureGen-EBM). Run the same command again after a stop: "
    "it goes on. On several GPUs: accelerate launch -m purifyloader train energy, with the same options."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_data(parser, "follow the energies of")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--recipe",
        choices=sorted(ENERGY_RECIPES),
        default="light",
        help="light: a narrow network and short chains, an hour or two of a CPU core (default); paper: PureGen's "
        "Algorithm 2; published: PureGen's code",
    )
    how.add_argument(
        "--config",
        type=Path,
        help="JSON of fields that replace the recipe's, or a checkpoint's config.json: all of them",
    )
    how.add_argument("--start-from", metavar="MODEL", help="an energy model whose weights to start from")
    how.add_argument("--steps", type=int, help="updates of the weights; the steps at which the rate falls move along")
    how.add_argument("--batch-size", type=int, help="images an update, and as many samples, over all processes")
    how.add_argument("--langevin-steps", type=int, metavar="K", help="of each sample in each update")
    how.add_argument("--learning-rate", type=float)
    how.add_argument("--channels", type=int, help="width of the network (published: 128)")
    how.add_argument("--bank-size", type=int, help="persistent samples (default: one an image)")
    how.add_argument("--rejuvenation", type=float, metavar="P", help="probability that a sample begins anew")
    how.add_argument("--seed", type=int, help="of the weights and of all noise")
    how.add_argument("--dtype", choices=("float32", "bfloat16"))
    how.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile the network that the samples walk with (default: on a GPU)",
    )
    how.add_argument(
        "--chain-steps",
        type=int,
        default=None,
        metavar="N",
        help="length of the long chains at the end (default: 1500; 500 on the CPU; 0 for none)",
    )
    add_run(parser)
    add_card(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command; errors of the user's are raised as `PurifyError`."""
    if options.chain_steps is not None and options.chain_steps < 0:
        raise InputError(f"--chain-steps must be 0 or more. Got {options.chain_steps}.")
    with processes(options.device) as (rank, device):
        quiet = prepare(options, rank)
        with alone(options, rank, (CURVES_PNG, BANK_PNG, CHAINS_PNG)):
            return _train(options, rank, device, quiet)


def _train(options: argparse.Namespace, rank: int, device: torch.device, quiet: bool) -> int:
    clean = clean_set(options, quiet)
    config, start = _configuration(options, clean.images.shape[1], device)
    if options.plan:
        measured = measure_energy(clean.images, config, start=start, device=device)
        if rank == 0:
            print(plan.report(measured, config, machine(device), datetime.datetime.now()))
        return 0
    held_out, held_out_name = held_out_images(options, clean, quiet)
    energy, record = train_energy(
        clean.images,
        options.out,
        config,
        start=start,
        held_out=held_out,
        device=device,
        save_every=options.save_every,
        progress=not quiet,
    )
    if rank > 0:
        return 0
    about = details(options, clean, held_out_name or "images trained on", config, record, machine(device))
    with writing(options.out):
        rows, count, failure = _chains(options, energy, clean.images if held_out is None else held_out, config, device)
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
    return 0


def _fields(path: Path) -> dict[str, Any]:
    """Fields of an `EnergyTrainConfig` from a JSON file: the fields themselves, or a checkpoint's config.json."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config must be a JSON file of training fields. Got {path}: {error}.") from None
    if isinstance(values, dict) and isinstance(values.get("details"), dict):
        values = values["details"].get("train")
    if not isinstance(values, dict):
        raise InputError(
            "--config must be a JSON object of training fields, or the config.json of a trained energy model. "
            f"Got {path}, which is neither."
        )
    return values


def _decay_at(base: EnergyTrainConfig, fields: Mapping[str, Any], steps: int | None) -> tuple[int, ...]:
    """Where the rate falls: as the file says it, else as the recipe does; moved along with another number of steps."""
    length = {name: fields[name] for name in ("steps", "decay_at") if name in fields}
    config = EnergyTrainConfig.from_dict(length, base)
    known = config if "decay_at" in fields else base
    steps = config.steps if steps is None else steps
    return tuple(max(1, step * steps // known.steps) for step in known.decay_at)


def _configuration(
    options: argparse.Namespace, image_channels: int, device: torch.device
) -> tuple[EnergyTrainConfig, EnergyNetwork | None]:
    """What to train, and the energy model to start from."""
    base = energy_recipe(options.recipe, image_channels)
    fields = _fields(options.config) if options.config is not None else {}
    named = fields.pop("start_from", None)
    check_start_from(named)
    name = start_name(options, named)
    start = None if name is None else pretrained.load(name, kind="energy")
    network = fields.get("network", {})
    if not isinstance(network, Mapping):
        raise ConfigError(f"network must be an object of its fields. Got {network!r}.")
    shape = {} if start is None else start.config.to_dict()
    channels = {} if options.channels is None else {"channels": options.channels}
    changes: dict[str, Any] = {n: getattr(options, n) for n in _OPTIONS if getattr(options, n) is not None}
    changes |= {"network": {**shape, **network, **channels}, "decay_at": _decay_at(base, fields, options.steps)}
    if options.compile is not None:
        changes["compile"] = options.compile
    elif "compile" not in fields:
        changes["compile"] = device.type == "cuda"
    # once all of it is known: a bank that is too small for the recipe's batch may fit the one that is asked for
    config = EnergyTrainConfig.from_dict({**fields, **changes}, base)
    return (config, None) if start is None else (energy_started_from(config, start), start)


def _chains(
    options: argparse.Namespace, energy: EnergyNetwork, images: Tensor, config: EnergyTrainConfig, device: torch.device
) -> tuple[list[dict[str, float]], int, str | None]:
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
    """The checkpoint with its card, over whatever a killed save left there."""
    at = ", ".join(f"{row['steps']:,}" for row in about["chains"])
    captions = {
        CURVES_PNG: "Energies of images and samples, their difference, and the slope, over the run.",
        BANK_PNG: "Samples of the bank at the end.",
    }
    if about["chains"]:
        captions[CHAINS_PNG] = f"Images, and chains from them after {at} steps."
    text = energy_card(name, energy, about, {p: c for p, c in captions.items() if (out / p).exists()})
    pretrained.save(energy, out, name=name, card=text, details=about, overwrite=True)
