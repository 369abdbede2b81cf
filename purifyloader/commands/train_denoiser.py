"""`purifyloader train denoiser`, or on several GPUs `accelerate launch -m purifyloader train denoiser`.

From a folder of clean images to a checkpoint with its card.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purifyloader import pretrained
from purifyloader.commands.train_options import configuration
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
)
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.psnr import jpeg_psnr, noised_psnr, psnr
from purifyloader.train import plan
from purifyloader.train.denoiser.augment import AUGMENTATIONS
from purifyloader.train.denoiser.card import card
from purifyloader.train.denoiser.config import RECIPES
from purifyloader.train.denoiser.curves import CURVES_PNG, SAMPLES_PNG, validation_levels
from purifyloader.train.denoiser.task import train_denoiser
from purifyloader.train.state import STATE_FILE, writing

__all__ = ["DESCRIPTION", "add_options", "run"]

# Where PSNR is measured for the card, in px: the literature's levels, ECLIPSE's, and the certified sigmas.
_CARD_PX = (6.37, 10, 25, 50, 63.75, 127.5, 255)
_ON_THE_WAY = 200  # of the held-out images, for the measurements during training


DESCRIPTION = (
    "Train a denoiser from a few clean images. Run the same command again after a stop: it goes on. "
    "On several GPUs: accelerate launch -m purifyloader train denoiser, with the same options."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_data(parser, "measure PSNR on")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        default="light",
        help="light: a small network for the noise that purification uses, an hour of two CPU cores (default); "
        "eclipse: the paper's; puregen: PureGen-DDPM's, t <= 250",
    )
    how.add_argument(
        "--config",
        type=Path,
        help="JSON of fields that replace the recipe's, or a checkpoint's config.json: all of them",
    )
    how.add_argument("--start-from", metavar="MODEL", help="a denoiser whose weights to start from, with its network")
    how.add_argument("--steps", type=int, help="optimiser steps")
    how.add_argument("--decay-steps", type=int, help="last steps, over which the learning rate falls to zero")
    how.add_argument("--batch-size", type=int, help="images a step, over all processes")
    how.add_argument("--learning-rate", type=float)
    how.add_argument("--replicate", type=int, metavar="M", help="further copies of each image in an epoch")
    how.add_argument("--augment", nargs="*", choices=AUGMENTATIONS, metavar="HOW", help=", ".join(AUGMENTATIONS))
    how.add_argument("--patch-size", type=int, metavar="PX", help="train on random squares of this side")
    how.add_argument("--seed", type=int, help="of the weights and of all noise")
    how.add_argument("--dtype", choices=("float32", "bfloat16"))
    how.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile the network (default: on a GPU, from 2,000 steps on)",
    )

    run = add_run(parser)
    run.add_argument("--micro-batch", type=int, help="images in memory at a time, if a batch does not fit")
    run.add_argument("--validate-every", type=int, metavar="STEPS", help="(default: a twentieth of the run)")
    add_card(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command; errors of the user's are raised as `PurifyError`."""
    with processes(options.device) as (rank, device):
        quiet = prepare(options, rank)
        with alone(options, rank, (CURVES_PNG, SAMPLES_PNG)):
            return _train(options, rank, device, quiet)


def _train(options: argparse.Namespace, rank: int, device: torch.device, quiet: bool) -> int:
    clean = clean_set(options, quiet)
    config, start = configuration(options, clean.images.shape[1:], device)
    if options.plan:
        measured = plan.measure(clean.images, config, start=start, micro_batch=options.micro_batch, device=device)
        if rank == 0:
            print(plan.report(measured, config, machine(device), datetime.datetime.now()))
        return 0
    validation, held_out_name = held_out_images(options, clean, quiet)
    denoiser, record = train_denoiser(
        clean.images,
        options.out,
        config,
        start=start,
        validation=validation[:: -(-len(validation) // _ON_THE_WAY)] if validation is not None else None,
        validate_every=options.validate_every,
        micro_batch=options.micro_batch,
        device=device,
        save_every=options.save_every,
        progress=not quiet,
    )
    if rank > 0:
        return 0
    results = measure(denoiser, validation) if validation is not None else []
    about = details(options, clean, held_out_name, config, record, machine(device)) | {"psnr": results}
    with writing(options.out):
        save(denoiser, options.out, options.name or options.out.resolve().name, about)
    (options.out / STATE_FILE).unlink(missing_ok=True)
    print(f"{options.out}: {record['steps']:,} steps, {record['seconds']:.0f} s")
    for row in results:
        print(
            f"  {row['sigma_px']:g} px: {row['denoiser']:.2f} dB "
            f"(JPEG-10 {row['jpeg10']:.2f}, doing nothing {row['noised']:.2f})"
        )
    return 0


def measure(denoiser: NetworkDenoiser, images: Tensor) -> list[dict[str, float]]:
    """PSNR of the denoiser, of JPEG-10 and of doing nothing, at the levels of the card that it was trained for."""
    low, high = denoiser.sigma_range
    levels = [px for px in _CARD_PX if low <= px / 255 <= high]
    return [
        {
            "sigma_px": px,
            "denoiser": round(psnr(denoiser, images, px / 255), 3),
            "jpeg10": round(jpeg_psnr(images, px / 255), 3),
            "noised": round(noised_psnr(images, px / 255), 3),
            "images": len(images),
        }
        for px in (levels if len(levels) >= 2 else validation_levels((low, high)))
    ]


def save(denoiser: NetworkDenoiser, out: Path, name: str, about: Mapping[str, Any]) -> None:
    """The checkpoint with its card, over whatever a killed save left there."""
    levels = ", ".join(f"{px:g}" for px in validation_levels(denoiser.sigma_range))
    captions = {
        CURVES_PNG: "Loss and PSNR over the run.",
        SAMPLES_PNG: f"Clean images; then, for {levels} px each, noised and denoised in one network call.",
    }
    text = card(name, denoiser, about, {p: c for p, c in captions.items() if (out / p).exists()})
    pretrained.save(denoiser, out, name=name, card=text, details=about, overwrite=True)
