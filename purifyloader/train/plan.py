"""Estimate what a training will cost, measured on this machine before it starts."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from purifyloader.core.devices import as_device
from purifyloader.train.fields import TrainingFields
from purifyloader.train.run import peak_memory

__all__ = ["measure", "report"]

_WARM, _TIMED = 2, 5
_PATIENCE = 60.0  # seconds; then the steps there are must do
_LONG = 1000 * (_WARM + _TIMED)  # steps: none of the first ones is one of those that are written down


class _Enough(Exception):
    """Raised by a step: what was to be measured is."""


def measure(
    build: Callable[..., nn.Module],
    train: Callable[..., Any],
    images: Tensor,
    config: TrainingFields,
    *,
    device: str | torch.device = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Train for a few steps of the very configuration, and estimate the cost of all of it.

    Args:
        build, train: such as `build_denoiser` and `train_denoiser`, which takes the `options`.

    Returns:
        parameters; model_bytes and state_bytes, of the files; images; epochs; first_step_seconds (with compilation);
        seconds_per_step (median of `timed_steps`); seconds, of all steps; peak_memory in bytes, of the GPU or of this
        process.
    """
    with torch.device("meta"):
        model = build(config.from_dict({"start_from": None}, config), images.shape[1])
    parameters = sum(p.numel() for p in model.parameters())
    moments = [time.monotonic()]

    def on_step(step: int, value: float) -> None:
        moments.append(time.monotonic())
        # the first step may compile for minutes; and processes that wait for one another must agree on when to stop
        counted = moments[1:] if config.compile else moments
        tired = not distributed.is_initialized() and len(counted) > 1 and counted[-1] - counted[0] > _PATIENCE
        if step == _WARM + _TIMED or tired:
            raise _Enough

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):
        few = config.from_dict({"steps": max(config.steps, _LONG)}, config)
        never = float("inf")
        train(images, folder, few, device=device, save_every=never, on_step=on_step, progress=False, **options)
    taken = [b - a for a, b in itertools.pairwise(moments)]
    timed = taken[_WARM:] or taken[-1:]
    return {
        "parameters": parameters,
        "model_bytes": 4 * parameters,
        "state_bytes": 16 * parameters + config.more_state_bytes(images),
        "images": len(images),
        "epochs": round(config.steps * config.batch_size / len(images), 1),
        "first_step_seconds": round(taken[0], 3),
        "timed_steps": len(timed),
        "seconds_per_step": round(statistics.median(timed), 4),
        "seconds": round(statistics.median(timed) * config.steps, 1),
        "peak_memory": peak_memory(as_device(device)),
    }


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    days, minutes = divmod(minutes, 24 * 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{days} d"] * bool(days) + [f"{hours} h"] * bool(hours) + [f"{minutes} min"] * (not days)
    return " ".join(parts)


def report(plan: dict[str, Any], config: TrainingFields, machine: str, now: datetime.datetime) -> str:
    """Return the result of `measure` as lines for people."""
    end = now + datetime.timedelta(seconds=plan["seconds"])
    checkpoint, state = plan["model_bytes"] / 1e6, 2 * plan["state_bytes"] / 1e6
    step, first = f"{plan['seconds_per_step']:.3g} s", f"{plan['first_step_seconds']:.3g} s"
    rows = {
        "parameters": f"{plan['parameters']:,}",
        "files": f"{checkpoint:,.1f} MB the checkpoint; until it is done {state:,.1f} MB, replaced as a whole",
        "images": f"{plan['images']:,}, each seen {plan['epochs']:,.0f} times",
        "steps": f"{config.steps:,} of {config.batch_size} images",
        "a step": f"{step} (median of {plan['timed_steps']}; the first took {first}) on {machine}",
        "memory": f"{plan['peak_memory'] / 1e9:.2f} GB at most" if plan["peak_memory"] else "not known here",
        "in all": f"{_duration(plan['seconds'])}, without validation; started now it ends about {end:%Y-%m-%d %H:%M}",
    }
    return "\n".join(f"{name:<12}{text}" for name, text in rows.items())
