"""The configuration that a command line asks for: a recipe, fields of a file over it, options over both."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from purifyloader import pretrained
from purifyloader.commands.training import start_name
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule
from purifyloader.diffusion.unet import UNetConfig
from purifyloader.errors import ConfigError, InputError
from purifyloader.train.denoiser.config import TrainConfig, check_start_from, recipe
from purifyloader.train.denoiser.task import started_from

__all__ = ["configuration"]

_OPTIONS = ("steps", "decay_steps", "batch_size", "learning_rate", "replicate", "patch_size", "seed", "dtype")
_COMPILE_STEPS = 2_000  # on a GPU compilation has paid for itself by then


def _fields(path: Path) -> dict[str, Any]:
    """Fields of a `TrainConfig` from a JSON file: the fields themselves, or a checkpoint's config.json."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config must be a JSON file of training fields. Got {path}: {error}.") from None
    if isinstance(values, dict) and isinstance(values.get("details"), dict):
        values = _of_checkpoint(values)
    if not isinstance(values, dict):
        raise InputError(
            "--config must be a JSON object of training fields, or the config.json of a trained checkpoint. "
            f"Got {path}, which is neither."
        )
    return values


def _of_checkpoint(config: Mapping[str, Any]) -> Any:
    values = config["details"].get("train")
    if not isinstance(values, dict):
        return values
    if isinstance(network := values.get("network"), dict):
        # whole: what it leaves out is at its default there, whatever the recipe has
        values["network"] = {**dataclasses.asdict(UNetConfig()), **network}
    denoiser = config.get("denoiser")  # an energy model's flip is its own
    if "flip" in values and isinstance(denoiser, dict) and {"parameterization", "schedule"} <= denoiser.keys():
        # a card from before the recipes
        flip = values.pop("flip")
        values["augment"] = ["flip"] if flip else []
        values["parameterization"] = denoiser["parameterization"]
        values["time"] = "log-sigma" if denoiser["schedule"] is None else "timestep"
    return values


def _follow(start: NetworkDenoiser, base: TrainConfig, fields: dict[str, Any]) -> None:
    """Take over from the denoiser to start from what its weights mean, where `fields` do not say otherwise."""
    fields.setdefault("parameterization", start.parameterization)
    hybrid = fields.get("objective", base.objective) == "hybrid"
    if hybrid:
        fields.setdefault("time", "log-sigma" if start.schedule is None else "timestep")
        if isinstance(start.schedule, CosineSchedule | LinearSchedule):
            fields.setdefault("schedule", start.schedule.kind)
            fields.setdefault("timesteps", start.schedule.timesteps)
    network = fields.get("network", {})
    if not isinstance(network, Mapping):
        raise ConfigError(f"network must be an object of its fields. Got {network!r}.")
    learned = start.learned_variance or (hybrid and base.network.learned_variance)
    fields["network"] = {**dataclasses.asdict(start.network.config), "learned_variance": learned, **network}


def _lengths(base: TrainConfig, steps: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """How `base` warms up and lets down over another number of steps: in proportion, where nothing else is given."""
    share = max(0.0, steps / base.steps)
    lengths = {"decay_steps": round(base.decay_steps * share), "warmup": min(base.warmup, max(0, steps // 10))}
    return {name: value for name, value in lengths.items() if name not in given}


def configuration(
    options: argparse.Namespace, image_shape: Sequence[int], device: torch.device
) -> tuple[TrainConfig, NetworkDenoiser | None]:
    """What to train, and the denoiser to start from.

    Args:
        options: as `purifyloader train denoiser` parses them.
        image_shape: (C, H, W) of the images.
        device: where the training will be.

    Raises:
        InputError: --config is no such file.
        ConfigError: fields that are unknown or contradict each other, or a start that is not here.
    """
    side = min(image_shape[-2:])
    base = recipe(options.recipe, side, image_shape[0])
    if base.patch_size is not None and base.patch_size > side:
        base = dataclasses.replace(base, patch_size=None)
    fields = _fields(options.config) if options.config is not None else {}
    named = fields.pop("start_from", None)
    check_start_from(named)
    name = start_name(options, named)
    start = None if name is None else pretrained.load(name)
    if start is not None:
        _follow(start, base, fields)
    if type(fields.get("steps")) is int:
        fields |= _lengths(base, fields["steps"], fields)
    config = TrainConfig.from_dict(fields, base)
    changes: dict[str, Any] = {n: getattr(options, n) for n in _OPTIONS if getattr(options, n) is not None}
    if options.steps is not None:
        changes |= _lengths(config, options.steps, changes)
    if options.augment is not None:
        changes["augment"] = tuple(options.augment)
    if options.compile is not None:
        changes["compile"] = options.compile
    elif "compile" not in fields:
        changes["compile"] = device.type == "cuda" and changes.get("steps", config.steps) >= _COMPILE_STEPS
    config = dataclasses.replace(config, **changes)
    if start is None:
        return config, None
    config = started_from(config, start)
    if named is not None and options.start_from is None and config.start_from != named:
        raise ConfigError(
            f"{options.config} starts from weights {named['weights_sha256'][:16]} of {named['name']!r}. Got others "
            "by that name: give the right folder as --start-from."
        )
    return config, start
