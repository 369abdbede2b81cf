"""Train a denoiser from a few hundred to a few thousand clean images."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.checks import check_integer
from purifyloader.core.devices import as_device
from purifyloader.diffusion.denoiser import Denoiser, NetworkDenoiser
from purifyloader.diffusion.growth import take_over
from purifyloader.diffusion.networks import build_network
from purifyloader.diffusion.objective import hybrid_loss, sigma_loss
from purifyloader.diffusion.plain import PlainUNet
from purifyloader.errors import ConfigError, InputError, PurifyError
from purifyloader.files.atomic import canonical_json
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.binding import remember, remember_teacher
from purifyloader.train.curves import Curves
from purifyloader.train.denoiser.config import TrainConfig
from purifyloader.train.denoiser.curves import COLUMNS, Validation, overfitting, validated, write_picture, write_samples
from purifyloader.train.denoiser.examples import draw_examples
from purifyloader.train.fields import check_channels, check_memory, check_model
from purifyloader.train.run import Task, seeded, train
from purifyloader.train.state import Groups
from purifyloader.train.watch import SETTLED, Watch, numbers_of
from purifyloader.train.weights import Weights

__all__ = ["build_denoiser", "learning_rate", "train_denoiser"]

log = logging.getLogger(__name__)

_DIVERGED = 10.0  # times the lowest running mean of the loss: no way back
_SUSPECT = 2.0  # times the lowest: not a state worth keeping
_BEGUN = 10  # steps before a running mean is worth comparing


def build_denoiser(
    config: TrainConfig, image_channels: int = 3, start: NetworkDenoiser | None = None
) -> NetworkDenoiser:
    """Build the denoiser before training. Random weights are a function of `config.seed`.

    It begins as the function of `start`, the one that `config.start_from` names, which may be smaller.
    """
    check_channels(config, image_channels)
    with seeded(config.seed, torch.device("cpu")):
        network = build_network(config.network)
    if config.objective == "hybrid":
        schedule = config.noise_schedule()
        low, high = (float(schedule.sigma(t)) for t in (1, config.top_timestep))
        timesteps = schedule if config.time == "timestep" else None
        denoiser = NetworkDenoiser(network, config.parameterization, (low, high), timesteps)
    else:
        denoiser = NetworkDenoiser(network, config.parameterization, config.sigma_range)
    check_model(config, "start_from", start)
    if start is not None:
        _check_meaning(denoiser, start)
        take_over(denoiser.network, start.network)
        remember(denoiser.network, weights_sha256(start))
    return denoiser


def _check_meaning(denoiser: NetworkDenoiser, start: NetworkDenoiser) -> None:
    """The weights of `start` must mean the same in `denoiser`: what they predict, and from which time input."""
    if start.parameterization != denoiser.parameterization:
        raise ConfigError(
            f"A denoiser that predicts {denoiser.parameterization!r} cannot start from one that predicts "
            f"{start.parameterization!r}. Set parameterization={start.parameterization!r}."
        )
    if (started := _time_input(start)) != (wanted := _time_input(denoiser)):
        raise ConfigError(
            f"A network that takes {wanted} as its time cannot start from one that takes {started}. Set time= and "
            "objective=: 'log-sigma' goes with both objectives, timesteps go, with their schedule, with 'hybrid' (the "
            "recipes eclipse and puregen)."
        )


def _time_input(denoiser: NetworkDenoiser) -> str:
    """Describe the time input: the same words only for the same one."""
    if denoiser.schedule is None:
        return "the logarithm of sigma"
    time = denoiser.time_input
    if time == "timestep" and denoiser.schedule.timesteps == 1000:
        time = "rescaled"  # to 0..1000, where timesteps of 1000 are already
    return f"{time} timesteps of {canonical_json(denoiser.schedule.config())}"


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    up = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    left = min(1.0, (config.steps - step) / config.decay_steps) if config.decay_steps else 1.0
    down = left if config.decay == "linear" else (1 - math.cos(math.pi * left)) / 2
    return config.learning_rate * up * down


class _LossWatch(Watch):
    names, more = ("loss",), ("lowest_loss",)

    def broken(self, step: int) -> str | None:
        if step >= _BEGUN:
            self.values["lowest_loss"] = min(self.values["loss"], self.values.get("lowest_loss", math.inf))
        mean, lowest = self.values["loss"], self.values.get("lowest_loss", math.inf)
        if step >= SETTLED and mean > _DIVERGED * lowest:
            return f"The loss has run away, to {mean:.4g} from {lowest:.4g} (running means),"
        return None

    def suspicion(self) -> str | None:
        mean, lowest = self.values.get("loss", math.nan), self.values.get("lowest_loss", math.inf)
        return f"the loss is far above its lowest, {mean:.4g} over {lowest:.4g}" if mean > _SUSPECT * lowest else None

    def header(self) -> dict[str, Any]:
        return {"loss": self.values.get("loss"), "lowest_loss": self.values.get("lowest_loss")}

    def restore(self, header: Any) -> None:
        names = (*self.names, *self.more)
        self.values = numbers_of({name: header[name] for name in names if header[name] is not None}, names)


class _DenoiserTask(Task[NetworkDenoiser]):
    config: TrainConfig

    def __init__(
        self,
        config: TrainConfig,
        images: Tensor,
        device: torch.device,
        start: NetworkDenoiser | None,
        validation: Tensor | None,
        validate_every: int | None,
        micro_batch: int | None,
        teacher: Denoiser | None = None,
    ) -> None:
        super().__init__(images, device, validation)
        check_model(config, "distil_from", teacher)
        check_integer("micro_batch", micro_batch, 1, none=True, error=InputError)
        check_integer("validate_every", validate_every, 1, none=True, error=InputError)
        if config.patch_size is not None and config.patch_size > min(images.shape[-2:]):
            side = min(images.shape[-2:])
            raise ConfigError(f"patch_size must be at most the side of the images, {side}. Got {config.patch_size}.")
        check_memory(config, images, device, self.ranks.world_size)
        self.config, self.micro_batch, self.clip_norm = config, micro_batch, config.clip_norm
        gpu = device.type == "cuda"
        denoiser = build_denoiser(config, images.shape[1], start).to(device).train()
        self.teacher = None
        if teacher is not None:
            for sigma in config.sigma_range:
                teacher.check_sigma(sigma)
            self.teacher = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
            remember_teacher(denoiser.network, weights_sha256(teacher))
        if gpu or isinstance(denoiser.network, PlainUNet):
            denoiser.to(memory_format=torch.channels_last)
        options: Any = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": gpu}
        self.weights = Weights(denoiser, functools.partial(torch.optim.AdamW, **options), config.ema_decay, fused=gpu)
        if config.compile:
            denoiser.network.compile()
        self.schedule = config.noise_schedule()
        self.watch, self.curves = _LossWatch(), Curves(COLUMNS)
        self.validate_every = max(1, config.steps // 20) if validate_every is None else validate_every
        self.validation = None
        if validation is not None and self.ranks.rank == 0:
            self.validation = Validation(validation, images.cpu(), denoiser.sigma_range)

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.config, step)

    def gradients(self, step: int, own: slice) -> dict[str, float]:
        x0, level, z = draw_examples(self.config, self.images, step, own)
        count = len(x0)
        value = torch.zeros((), device=self.device)
        for first in range(0, count, self.micro_batch or count):
            part = slice(first, first + (self.micro_batch or count))
            with self._dropout_seed(step, own.start + first):
                loss = self._loss(x0[part], level[part], z[part]) * (len(x0[part]) / count)
                loss.backward()
            value += loss.detach()
        return {"loss": float(value)}

    def _loss(self, x0_BCHW: Tensor, level_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Return the mean loss of the images; `level_B` holds timesteps or sigmas."""
        config, denoiser = self.config, self.weights.network
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            if config.objective == "sigma":
                return sigma_loss(denoiser, x0_BCHW, level_B, noise_BCHW, self.teacher).mean()
            more = (config.gamma, self.schedule, config.top_timestep)
            return hybrid_loss(denoiser, x0_BCHW, level_B, noise_BCHW, *more).mean()

    @contextlib.contextmanager
    def _dropout_seed(self, step: int, first: int) -> Iterator[None]:
        """Make torch's generator a function of (seed, step, first position), where the network draws from it at all."""
        if not self.config.network.dropout:
            yield
            return
        with seeded(int(noise.image_keys(self.config.seed, step, first)[0]), self.device):
            yield

    def row(self, measured: dict[str, float], norm: float) -> dict[str, float]:
        return {
            "epoch": round(self.weights.step * self.config.batch_size / len(self.images), 3),
            "loss": round(self.watch.values["loss"], 6),
            "gradient_norm": round(norm, 5),
        }

    def validate(self, folder: Path, last: bool) -> None:
        step, judge = self.weights.step, self.validation
        if judge is None or any(row["step"] == step for row in validated(self.curves)):
            return
        measured = judge.measure(self.weights.average)
        if not all(map(math.isfinite, measured.values())):
            if last:
                raise PurifyError("The denoised images became infinite or NaN")
            return  # the next loss says it, in all processes
        self.curves.add(step=step, **measured)
        rows = validated(self.curves)
        message = overfitting([judge.means(row) for row in rows])
        warned = any(warning.startswith("step ") for warning in self.warnings)
        if message is not None and (not warned or last):  # once, and how it ended
            self.warnings.append(f"step {step}: {message}")
            best = max(rows, key=lambda row: judge.means(row)[0])["step"]
            advice = "More images, fewer steps or the augmentation flip would help"
            log.warning("step %d: %s. %s; the best so far was at step %d.", step, message, advice, best)
        write_picture(self.curves, judge, folder)
        write_samples(self.weights.average, judge, folder)

    def restore(self, step: int, groups: Groups) -> None:
        super().restore(step, groups)
        if self.validation is not None:
            for row in validated(self.curves):
                self.validation.means(row)  # an error for a row that lacks a level

    def record(self) -> dict[str, Any]:
        return {"loss": self.watch.values["loss"], "tf32": _in_tf32(self.config, self.device)}


def _in_tf32(config: TrainConfig, device: torch.device) -> bool:
    """True where float32 convolutions run in a GPU's TF32, as torch has it unless it is told otherwise."""
    backends: Any = torch.backends
    return device.type == "cuda" and config.dtype == "float32" and backends.cudnn.conv.fp32_precision == "tf32"


def train_denoiser(
    images: Tensor,
    out: str | os.PathLike[str],
    config: TrainConfig,
    *,
    start: NetworkDenoiser | None = None,
    teacher: Denoiser | None = None,
    validation: Tensor | None = None,
    validate_every: int | None = None,
    micro_batch: int | None = None,
    device: str | torch.device = "cpu",
    save_every: float = 60.0,
    on_step: Callable[[int, float], None] | None = None,
    progress: bool = True,
) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """Train a denoiser on clean images; call again with the same arguments to go on after a stop.

    Where torch.distributed is initialised, its processes share each batch; the first one writes.

    Args:
        images: uint8, (N, C, H, W): the sparse clean set.
        out: folder for the state of the run, its curves and its samples.
        config: the network and its training.
        start: the denoiser that `config.start_from` names.
        teacher: the denoiser that `config.distil_from` names.
        validation: uint8, (V, C, H, W), clean and not among `images`: PSNR is measured on them on the way.
        validate_every: steps between two measurements; by default a twentieth of the run.
        micro_batch: images whose activations are in memory at once, in each process; by default all.
        save_every: seconds between two states; a killed run loses at most these.
        on_step: called after each step, in each process, with the number of steps done and the loss.

    Returns:
        The denoiser with averaged weights, and a record: steps, seconds, epochs, running mean of the loss, processes,
        peak memory in bytes, `tf32` (its convolutions ran in TF32), and `warnings`.

    Raises:
        InputError, ConfigError: images, options or processes that do not fit.
        TrainingError: the loss is not finite or has run away; or `out` holds the state of another run.
        CheckpointError: the state in `out` is damaged.

    >>> import tempfile, torch
    >>> from purifyloader.diffusion.unet import UNetConfig
    >>> from purifyloader.train import TrainConfig, recipe, train_denoiser
    >>> images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    >>> tiny = UNetConfig.small(channels=8, multipliers=(1,), norm_groups=4)
    >>> config = TrainConfig.from_dict({"network": tiny.to_dict(), "steps": 2, "batch_size": 2}, recipe("light"))
    >>> denoiser, record = train_denoiser(images, tempfile.mkdtemp(), config, progress=False)
    >>> record["steps"], denoiser(images[:1] / 255, torch.tensor([0.1])).shape
    (2, torch.Size([1, 3, 8, 8]))
    """
    task = _DenoiserTask(config, images, as_device(device), start, validation, validate_every, micro_batch, teacher)
    return train(task, out, save_every=save_every, on_step=on_step, progress=progress)
