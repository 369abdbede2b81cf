"""Trainings that take a tenth of a second, and what tests read from the folders that they leave."""

from __future__ import annotations

import csv
import dataclasses
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from purifyloader.diffusion.unet import UNetConfig
from purifyloader.energy import EnergyConfig
from purifyloader.train import TrainConfig
from purifyloader.train.curves import CURVES_CSV
from purifyloader.train.energy import EnergyTrainConfig
from purifyloader.train.state import STATE_FILE, Groups
from tests.conftest import random_images

TINY = UNetConfig.small(channels=8, multipliers=(1,), norm_groups=4)
SIGMA = TrainConfig(
    objective="sigma",
    parameterization="edm",
    time="log-sigma",
    network=TINY,
    steps=8,
    batch_size=4,
    learning_rate=1e-3,
    replicate=1,
)
HYBRID = dataclasses.replace(SIGMA, objective="hybrid", parameterization="epsilon", time="timestep", timesteps=100)
LEARNED = dataclasses.replace(HYBRID, network=dataclasses.replace(TINY, learned_variance=True))
ALL = dataclasses.replace(
    LEARNED,
    schedule="linear",
    max_timestep=60,
    warmup=3,
    decay_steps=4,
    decay="cosine",
    weight_decay=0.01,
    augment=("flip", "crop", "rotate", "mixup"),
    patch_size=8,
)

PLAIN = EnergyTrainConfig(network=EnergyConfig(channels=4), steps=8, batch_size=4, langevin_steps=3, learning_rate=1e-3)
PAIRED = dataclasses.replace(PLAIN, paired=True, flip=True, ema_decay=0.9, warmup=2, decay_at=(4, 6), clip_norm=1.0)
FROM_NOISE = dataclasses.replace(
    PLAIN, bank="noise", rejuvenation=0.3, optimizer="sgd", learning_rate=1e-9, bank_size=6, step_size=0.005
)

IMAGES = random_images(10, 8)
WIDE = random_images(10, 12)  # patches of 8 px have somewhere to go


def smooth_images(count: int, size: int = 8, seed: int = 0) -> Tensor:
    """Blurred noise: images with something to learn."""
    coarse = random_images(count, size // 4, seed).float()
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").round().clamp(0, 255).to(torch.uint8)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two weights."""
    assert set(a) == set(b)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of curves.csv, without what a clock has measured."""
    with open(folder / CURVES_CSV, newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def state_of(folder: Path) -> tuple[dict[str, Any], Groups]:
    """The header and the tensors of a state file, whatever run it is of."""
    groups: Groups = {}
    with safe_open(folder / STATE_FILE, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
            group, key = name.split("/", 1)
            groups.setdefault(group, {})[key] = file.get_tensor(name)
        return json.loads(file.metadata()["purifyloader"]), groups


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop(Exception):
    """Ends a training from its `on_step`, as a kill would."""


def stopping_after(step: int, error: type[BaseException] = Stop) -> Callable[[int, float], None]:
    def on_step(done: int, value: float) -> None:
        if done == step:
            raise error

    return on_step


def blowing_up_after(step: int, rate: float) -> Callable[[Any, int], float]:
    """A learning rate that no network stands from some step on."""
    return lambda config, now: config.learning_rate if now < step else rate


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
