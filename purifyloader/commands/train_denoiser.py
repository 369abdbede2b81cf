"""Train a denoiser from a folder of clean images to a checkpoint with its card: `purifyloader train denoiser`."""

from __future__ import annotations

import argparse
import dataclasses
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

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from purifyloader.diffusion.denoiser import NetworkDenoiser
    from purifyloader.train.denoiser.config import TrainConfig

DESCRIPTION = (
    "Train a denoiser from a few clean images. Run the same command again after a stop: it goes on. "
    "On several GPUs: accelerate launch -m purifyloader train denoiser, with the same options."
)

_COMPILE_STEPS = 2_000  # on a GPU compilation has paid for itself by then
# Where PSNR is measured for the card, in px: the literature's levels, ECLIPSE's, and the certified sigmas.
_CARD_PX = (6.37, 10, 25, 50, 63.75, 127.5, 255)
_ON_THE_WAY = 200  # of the held-out images, for the measurements during training


def add_options(parser: argparse.ArgumentParser) -> None:
    how, run = add_training_options(
        parser,
        validation="measure PSNR on",
        presets={
            "light": "a small network for the noise that purification uses, an hour of two CPU cores (default)",
            "fast": "a network of a tenth of its arithmetic, for purifying in the loader",
            "eclipse": "the paper's",
            "puregen": "PureGen-DDPM's, t <= 250",
        },
        steps="optimiser steps",
        batch="images a step, over all processes",
    )
    how.add_argument(
        "--distil-from", metavar="MODEL", help="a denoiser whose estimates are learned in the place of clean images"
    )
    how.add_argument("--decay-steps", type=int, help="last steps, over which the learning rate falls to zero")
    how.add_argument("--replicate", type=int, metavar="M", help="further copies of each image in an epoch")
    how.add_argument("--augment", nargs="*", metavar="HOW", help="flip, crop, rotate, mixup; nothing for none")
    how.add_argument("--patch-size", type=positive, metavar="PX", help="train on random squares of this side")
    run.add_argument("--micro-batch", type=positive, help="images in memory at a time, if a batch does not fit")
    run.add_argument("--validate-every", type=positive, metavar="STEPS", help="(default: a twentieth of the run)")


def run(options: argparse.Namespace) -> int:
    from purifyloader.train.curves import CURVES_PNG
    from purifyloader.train.denoiser.card import card
    from purifyloader.train.denoiser.curves import SAMPLES_PNG
    from purifyloader.train.denoiser.task import build_denoiser, train_denoiser

    pictures = (CURVES_PNG, SAMPLES_PNG)
    return run_training(
        options, Kind(configuration, build_denoiser, train_denoiser, _arguments, _judge, card, pictures)
    )


def _arguments(options: argparse.Namespace, held_out: Tensor | None) -> dict[str, Any]:
    shown = None if held_out is None else held_out[:: -(-len(held_out) // _ON_THE_WAY)]
    return {"validation": shown, "validate_every": options.validate_every, "micro_batch": options.micro_batch}


def _judge(options: argparse.Namespace, trained: Trained) -> tuple[list[str], dict[str, str]]:
    """Measure PSNR of the denoiser, of JPEG-10 and of doing nothing, at the levels of the card that it knows."""
    from purifyloader.diffusion.psnr import jpeg_psnr, noised_psnr, psnr
    from purifyloader.train.curves import CURVES_PNG
    from purifyloader.train.denoiser.curves import SAMPLES_PNG, validation_levels

    denoiser, images = trained.model, trained.held_out
    low, high = denoiser.sigma_range
    shown = validation_levels((low, high))
    rows: list[dict[str, float]] = []
    if images is not None:
        known = [px for px in _CARD_PX if low <= px / 255 <= high]
        rows = [
            {
                "sigma_px": px,
                "denoiser": round(psnr(denoiser, images, px / 255), 3),
                "jpeg10": round(jpeg_psnr(images, px / 255), 3),
                "noised": round(noised_psnr(images, px / 255), 3),
                "images": len(images),
            }
            for px in (known if len(known) >= 2 else shown)
        ]
    trained.details["psnr"] = rows
    lines = [
        f"{row['sigma_px']:g} px: {row['denoiser']:.2f} dB "
        f"(JPEG-10 {row['jpeg10']:.2f}, doing nothing {row['noised']:.2f})"
        for row in rows
    ]
    at = ", ".join(f"{px:g}" for px in shown)
    return lines, {
        CURVES_PNG: "Loss and PSNR over the run.",
        SAMPLES_PNG: f"Clean images; then, for {at} px each, noised and denoised in one network call.",
    }


def configuration(
    options: argparse.Namespace, image_shape: Sequence[int], device: torch.device
) -> tuple[TrainConfig, dict[str, NetworkDenoiser | None]]:
    """Build a configuration from a preset, fields of a file over it, and options over both; load the models it names.

    Those are `start` and `teacher`, as `train_denoiser` takes them, or None.
    """
    from purifyloader.train.denoiser.config import TrainConfig, recipe
    from purifyloader.train.fields import distilled_from, started_from

    side = min(image_shape[-2:])
    base = recipe(options.preset, side, image_shape[0])
    if base.patch_size is not None and base.patch_size > side:
        base = dataclasses.replace(base, patch_size=None)
    fields = fields_of_file(options, _fields_of_card)
    start, teacher = (named_model(options, fields, name, "denoiser") for name in ("start_from", "distil_from"))
    if start is not None:
        _follow(start, base, fields)
    if type(fields.get("steps")) is int:
        fields |= _lengths(base, fields["steps"], fields)
    config = TrainConfig.from_dict(fields, base)
    changes = changes_of(options, TrainConfig)
    if "steps" in changes:
        changes |= _lengths(config, options.steps, changes)
    config = TrainConfig.from_dict(changes, config)
    config = fitted(config, {*changes, *fields}, device, config.steps >= _COMPILE_STEPS)
    if start is not None:
        config = started_from(config, start)
    if teacher is not None:
        config = distilled_from(config, teacher)
    return config, {"start": start, "teacher": teacher}


def _fields_of_card(config: Mapping[str, Any]) -> Any:
    from purifyloader.diffusion.networks import network_config, network_to_dict

    values = config["details"].get("train")
    if not isinstance(values, dict):
        return values
    if isinstance(network := values.get("network"), dict):
        # whole: a field that it leaves out is at its default there, whatever the preset has
        values["network"] = network_to_dict(network_config(network), every=True)
    denoiser = config.get("denoiser")  # an energy model's flip is its own
    if "flip" in values and isinstance(denoiser, dict) and {"parameterization", "schedule"} <= denoiser.keys():
        # a card from before the presets
        flip = values.pop("flip")
        values["augment"] = ["flip"] if flip else []
        values["parameterization"] = denoiser["parameterization"]
        values["time"] = "log-sigma" if denoiser["schedule"] is None else "timestep"
    return values


def _follow(start: NetworkDenoiser, base: TrainConfig, fields: dict[str, Any]) -> None:
    """Take over from the denoiser to start from what its weights mean, where `fields` do not say otherwise."""
    from purifyloader.diffusion.networks import network_to_dict
    from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule

    fields.setdefault("parameterization", start.parameterization)
    hybrid = fields.get("objective", base.objective) == "hybrid"
    if hybrid:
        fields.setdefault("time", "log-sigma" if start.schedule is None else "timestep")
        if isinstance(start.schedule, CosineSchedule | LinearSchedule):
            fields.setdefault("schedule", start.schedule.kind)
            fields.setdefault("timesteps", start.schedule.timesteps)
    network = network_to_dict(start.network.config, every=True)
    if "learned_variance" in network:
        network["learned_variance"] = start.learned_variance or (hybrid and base.network.learned_variance)
    fields["network"] = {**network, **fields.get("network", {})}


def _lengths(base: TrainConfig, steps: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """Scale how `base` warms up and lets down to another number of steps, where `known` says nothing else."""
    share = max(0.0, steps / base.steps)
    lengths = {"decay_steps": round(base.decay_steps * share), "warmup": min(base.warmup, max(0, steps // 10))}
    return {name: value for name, value in lengths.items() if name not in known}
