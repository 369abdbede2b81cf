"""What the training of an energy model will cost, measured on this machine before it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import Tensor, distributed

from purifyloader.core.devices import as_device
from purifyloader.energy.network import EnergyNetwork
from purifyloader.train.denoiser.task import peak_memory
from purifyloader.train.energy.config import EnergyTrainConfig
from purifyloader.train.energy.task import build_energy, train_energy
from purifyloader.train.plan import PATIENCE, Enough

__all__ = ["measure_energy"]

_WARM, _TIMED = 1, 3


def measure_energy(
    images: Tensor,
    config: EnergyTrainConfig,
    *,
    start: EnergyNetwork | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Train for a few updates of the very configuration; the same fields as `purifyloader.train.plan.measure`."""
    with torch.device("meta"):
        energy = build_energy(dataclasses.replace(config, start_from=None), images.shape[1])
    parameters = sum(p.numel() for p in energy.parameters())
    moments = [time.monotonic()]

    def on_step(step: int, difference: float) -> None:
        moments.append(time.monotonic())
        tired = not distributed.is_initialized() and moments[-1] - moments[0] > PATIENCE
        if step == _WARM + _TIMED or tired:
            raise Enough

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        # long, so that none of the first steps is one of those that are written down
        few = dataclasses.replace(config, steps=max(config.steps, 500 * (_WARM + _TIMED + 1)))
        train_energy(
            images, folder, few, start=start, device=device, save_every=float("inf"), on_step=on_step, progress=False
        )
    taken = [b - a for a, b in itertools.pairwise(moments)]
    timed = taken[_WARM:] or taken[-1:]
    samples = config.bank_size or len(images) * (1 + config.flip)
    return {
        "parameters": parameters,
        "model_bytes": 4 * parameters,
        "state_bytes": 16 * parameters + 4 * samples * images[0].numel(),
        "images": len(images),
        "epochs": round(config.steps * config.batch_size / len(images), 1),
        "first_step_seconds": round(taken[0], 3),
        "timed_steps": len(timed),
        "seconds_per_step": round(statistics.median(timed), 4),
        "seconds": round(statistics.median(timed) * config.steps, 1),
        "peak_memory": peak_memory(as_device(device)),
    }
