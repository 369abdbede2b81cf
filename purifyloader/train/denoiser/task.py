"""Sparse training of a denoiser: a few hundred to a few thousand clean images, on any number of processes.

Everything random is a function of (seed, step, position in the batch), so a run that was stopped goes on with
the step it would have taken, to the same weights (bit for bit with the same number of threads), and several
processes share the very batches that one would take (the same weights up to the order of a sum).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from purifyloader.core import noise
from purifyloader.core.devices import as_device
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.growth import take_over
from purifyloader.diffusion.objective import hybrid_loss, sigma_loss
from purifyloader.diffusion.unet import UNet
from purifyloader.errors import ConfigError, InputError, TrainingError
from purifyloader.files.atomic import canonical_json
from purifyloader.files.weights import weights_sha256
from purifyloader.train.denoiser import curves as pictures
from purifyloader.train.denoiser.augment import geometric, mixup, patches
from purifyloader.train.denoiser.config import TrainConfig
from purifyloader.train.state import STATE_FILE, Groups, identity, load_state, save_state, writing

__all__ = [
    "batch_indices",
    "build_denoiser",
    "check_images",
    "draw_sigma",
    "learning_rate",
    "peak_memory",
    "seeded",
    "started_from",
    "train_denoiser",
]

log = logging.getLogger(__name__)

# What each number drawn for an image of a step is for; augmentations have the ones above.
_TIME, _NOISE = 0, 1

_SMOOTH = 0.02  # of a new loss in its running mean
_DIVERGED = 10.0  # times the lowest running mean: no way back
_SUSPECT = 2.0  # times the lowest: not a state worth keeping
_SETTLED = 100  # steps before a running mean is worth stopping for
_BEGUN = 10  # steps before it is worth comparing at all
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
_SAVING_SHARE = 0.05  # of the time, at most, goes into writing states


def started_from(config: TrainConfig, start: NetworkDenoiser) -> TrainConfig:
    """The configuration that says it starts from the weights of `start`.

    >>> from purifyloader.pretrained import load
    >>> from purifyloader.train import recipe, started_from
    >>> config = started_from(recipe("light"), load("cifar10-sparse"))
    >>> config.network == load("cifar10-sparse").network.config
    True
    """
    return dataclasses.replace(config, start_from={"name": start.name, "weights_sha256": weights_sha256(start)})


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators of the CPU and of `device` at `seed`, and afterwards where they were.

    Not by torch.manual_seed, which seeds those of all other GPUs too.
    """
    gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if gpu else []):
        torch.default_generator.manual_seed(seed)
        if gpu:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


def build_denoiser(
    config: TrainConfig, image_channels: int = 3, start: NetworkDenoiser | None = None
) -> NetworkDenoiser:
    """The denoiser before training. Random weights are a function of `config.seed`; torch's generator is left alone.

    Args:
        config: its `start_from` must be that of `start`.
        image_channels: of the images, which the network must have.
        start: begin as the function of this denoiser. It may be smaller: see `purifyloader.diffusion.growth`.

    Raises:
        ConfigError: the images have other channels, or `start` is missing, another one, or of another shape.
    """
    if config.network.image_channels != image_channels:
        raise ConfigError(
            f"The network takes {config.network.image_channels} channels but the images have {image_channels}. "
            "Set image_channels in its configuration."
        )
    with seeded(config.seed, torch.device("cpu")):
        network = UNet(config.network)
    timesteps = config.time == "timestep"
    if config.objective == "hybrid":
        schedule = config.noise_schedule()
        low, high = (float(schedule.sigma(t)) for t in (1, config.top_timestep))
        denoiser = NetworkDenoiser(network, config.parameterization, (low, high), schedule if timesteps else None)
    else:
        denoiser = NetworkDenoiser(network, config.parameterization, config.sigma_range)
    _start(denoiser, config, start)
    return denoiser


def _told(denoiser: NetworkDenoiser) -> str:
    """The network's time input, in words that are the same only where it is."""
    if denoiser.schedule is None:
        return "the logarithm of sigma"
    time = denoiser.time_input
    if time == "timestep" and denoiser.schedule.timesteps == 1000:
        time = "rescaled"  # which it is
    return f"{time} timesteps of {canonical_json(denoiser.schedule.config())}"


def _start(denoiser: NetworkDenoiser, config: TrainConfig, start: NetworkDenoiser | None) -> None:
    wanted = config.start_from
    got = None if start is None else {"name": start.name, "weights_sha256": weights_sha256(start)}
    if (wanted is None) != (got is None) or (
        wanted is not None and got is not None and wanted["weights_sha256"] != got["weights_sha256"]
    ):
        raise ConfigError(
            f"The configuration starts from {dict(wanted) if wanted else 'random weights'}. "
            f"Got {got or 'no denoiser'}: give start= the denoiser that it names (started_from says it)."
        )
    if start is None:
        return
    if start.parameterization != denoiser.parameterization:
        raise ConfigError(
            f"A denoiser that predicts {denoiser.parameterization!r} cannot start from one that predicts "
            f"{start.parameterization!r}. Set parameterization={start.parameterization!r}."
        )
    if _told(start) != _told(denoiser):
        raise ConfigError(
            f"A network that is told {_told(denoiser)} cannot start from one that is told {_told(start)}. "
            f"Got objective={config.objective!r}, time={config.time!r}: 'log-sigma' goes with both objectives, and "
            "timesteps, with their schedule, with 'hybrid' (the recipes eclipse and puregen)."
        )
    take_over(denoiser.network, start.network)


class _Objective(nn.Module):
    """The loss as a module, so that one wrapper serves however many processes there are."""

    def __init__(self, denoiser: NetworkDenoiser, config: TrainConfig) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.config = config
        self.schedule = config.noise_schedule()

    def forward(self, x0_BCHW: Tensor, level_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Mean loss; `level_B` is a timestep or a sigma."""
        config = self.config
        with torch.autocast(x0_BCHW.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            if config.objective == "sigma":
                return sigma_loss(self.denoiser, x0_BCHW, level_B, noise_BCHW).mean()
            return hybrid_loss(
                self.denoiser, x0_BCHW, level_B, noise_BCHW, config.gamma, self.schedule, config.top_timestep
            ).mean()


@functools.lru_cache(maxsize=2)  # of this epoch and the next: milliseconds, in every step
def _order(seed: int, epoch: int, length: int) -> Tensor:
    return noise.uniform(noise.image_keys(seed, epoch, 0), (length,))[0].argsort()


def batch_indices(config: TrainConfig, count: int, step: int) -> Tensor:
    """Images of a step: the replicated set shuffled anew each epoch, batches running on across epochs."""
    length = count * (1 + config.replicate)
    positions = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
    chosen = torch.empty(config.batch_size, dtype=torch.int64)
    for epoch in (positions // length).unique().tolist():
        order = _order(config.seed, epoch, length)
        here = positions // length == epoch
        chosen[here] = order[positions[here] % length] % count
    return chosen


def draw_sigma(config: TrainConfig, keys_B: Tensor) -> Tensor:
    """Truncated log-normal noise levels by inverting the distribution function, (B,) float64."""
    ends = torch.tensor(config.sigma_range, dtype=torch.float64).log()
    low, high = torch.special.ndtr((ends - math.log(config.sigma_center)) / config.sigma_spread)
    u = low + (high - low) * noise.uniform(keys_B, (1,), _TIME)[:, 0]
    sigma = (math.log(config.sigma_center) + config.sigma_spread * torch.special.ndtri(u)).exp()
    return sigma.clamp(*config.sigma_range)


def _examples(config: TrainConfig, images: Tensor, step: int, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """(clean images in [0, 1], noise levels, noise) of the positions first..last of a step's batch."""
    chosen_B = batch_indices(config, len(images), step)
    device = images.device
    keys_B = noise.image_keys(config.seed, step, torch.arange(first, last))
    x0 = images[chosen_B[first:last].to(device)].to(torch.float32) / 255
    if "mixup" in config.augment:
        # a batch is a random draw, so the image before is as good as any other
        other = chosen_B.roll(1)[first:last].to(device)
        x0 = mixup(x0, images[other].to(torch.float32) / 255, keys_B)
    if config.patch_size is not None:
        x0 = patches(x0, keys_B, config.patch_size)
    x0 = geometric(x0, keys_B, config.augment)
    z = noise.normal(keys_B.to(device), x0.shape[1:], _NOISE)
    if config.objective == "sigma":
        return x0, draw_sigma(config, keys_B), z
    u = noise.uniform(keys_B, (1,), _TIME)[:, 0]
    return x0, (u * config.top_timestep).floor().to(torch.int64) + 1, z


@contextlib.contextmanager
def _dropout_seed(config: TrainConfig, step: int, first: int, device: torch.device) -> Iterator[None]:
    """torch's generator as a function of (seed, step, first position), where the network draws from it at all."""
    if not config.network.dropout:
        yield
        return
    with seeded(int(noise.image_keys(config.seed, step, first)[0]), device):
        yield


def learning_rate(config: TrainConfig, step: int) -> float:
    up = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    left = min(1.0, (config.steps - step) / config.decay_steps) if config.decay_steps else 1.0
    down = left if config.decay == "linear" else (1 - math.cos(math.pi * left)) / 2
    return config.learning_rate * up * down


def check_images(images: Tensor, what: str, channels: int | None = None) -> None:
    """
    Args:
        channels: of the images trained on, where these are others.

    Raises:
        InputError: of another type or shape, or with other channels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise InputError(
            f"{what} takes a uint8 tensor of shape (N, C, H, W) with at least one image. "
            f"Got {images.dtype} {tuple(images.shape)}."
        )
    if channels is not None and images.shape[1] != channels:
        raise InputError(
            f"{what} takes images with the channels of those trained on, {channels}. Got {images.shape[1]}."
        )


def _check(images: Tensor, config: TrainConfig, world_size: int) -> None:
    check_images(images, "Training")
    if config.patch_size is not None and config.patch_size > min(images.shape[-2:]):
        raise ConfigError(
            f"patch_size must be at most the side of the images, {min(images.shape[-2:])}. Got {config.patch_size}."
        )
    if config.batch_size % world_size:
        raise ConfigError(
            f"batch_size must be a multiple of the number of processes, {world_size}, which share each batch. "
            f"Got {config.batch_size}."
        )


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the GPU, else of this process; None where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _in_tf32(config: TrainConfig, device: torch.device) -> bool:
    """Whether its float32 convolutions are a GPU's TF32, as torch has it unless it is told otherwise."""
    backends: Any = torch.backends
    return device.type == "cuda" and config.dtype == "float32" and backends.cudnn.conv.fp32_precision == "tf32"


class _Watch:
    """The running mean of the loss, and what it says of the run."""

    def __init__(self, mean: float = math.nan, lowest: float | None = None) -> None:
        self.mean = mean
        self.lowest = math.inf if lowest is None else lowest

    def see(self, step: int, loss: float, norm: float) -> str | None:
        """Take in the loss of a step and the norm of its gradient; a reason to stop, or None."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"The loss became {loss} with a gradient of norm {norm}"
        self.mean = loss if math.isnan(self.mean) else self.mean + _SMOOTH * (loss - self.mean)
        if step >= _BEGUN:
            self.lowest = min(self.lowest, self.mean)
        if step >= _SETTLED and self.mean > _DIVERGED * self.lowest:
            return f"The loss has run away, to {self.mean:.4g} from {self.lowest:.4g} (running means),"
        return None

    @property
    def suspect(self) -> bool:
        """The weights are not worth keeping."""
        return self.mean > _SUSPECT * self.lowest

    def header(self) -> dict[str, float | None]:
        return {"loss": self.mean, "lowest_loss": self.lowest if math.isfinite(self.lowest) else None}


class _Weights:
    """The denoiser that is trained, its average and its optimiser, after `step` steps."""

    def __init__(self, denoiser: NetworkDenoiser, config: TrainConfig, device: torch.device) -> None:
        self.step = 0
        self.denoiser = denoiser.to(device).train()
        if device.type == "cuda":
            self.denoiser.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.denoiser).eval().requires_grad_(False)
        self.parameters = dict(self.denoiser.named_parameters())
        self._fused = device.type == "cuda"
        self._config = config
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), config.learning_rate, weight_decay=config.weight_decay, fused=self._fused
        )

    def update(self, rate: float) -> None:
        """One step with the gradients there are."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        decay = min(self._config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.parameters.values()), 1 - decay)
        self.step += 1

    def finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.average.parameters())

    def groups(self) -> Groups:
        """Everything, to be saved."""
        state = self.optimizer.state
        moments = {m: {n: state[p][m] for n, p in self.parameters.items() if state.get(p)} for m in _MOMENTS}
        return {"model": self.denoiser.state_dict(), "average": self.average.state_dict(), **moments}

    def restore(self, step: int, groups: Groups) -> None:
        """What `groups` gave after `step` steps."""
        self.step = step
        self.denoiser.load_state_dict(groups["model"])
        self.average.load_state_dict(groups["average"])
        for name, parameter in self.parameters.items():
            if name in groups.get(_MOMENTS[0], {}):
                # in the memory format of the parameter, which fused kernels rely on
                moments = {m: torch.empty_like(parameter).copy_(groups[m][name]) for m in _MOMENTS}
                count = torch.tensor(float(step), device=parameter.device if self._fused else "cpu")
                self.optimizer.state[parameter] = {"step": count, **moments}


def train_denoiser(
    images: Tensor,
    out: str | os.PathLike[str],
    config: TrainConfig,
    *,
    start: NetworkDenoiser | None = None,
    validation: Tensor | None = None,
    validate_every: int | None = None,
    micro_batch: int | None = None,
    device: str | torch.device = "cpu",
    save_every: float = 60.0,
    on_step: Callable[[int, float], None] | None = None,
    progress: bool = True,
) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """Train a denoiser on clean images; call again with the same arguments to go on after a stop.

    Where torch.distributed is initialised, its processes share each batch; the first one writes. Otherwise
    this is one process.

    Args:
        images: uint8, (N, C, H, W): the sparse clean set.
        out: folder for the state of the run, its curves and its samples.
        config: what to train and how.
        start: the denoiser that `config.start_from` names.
        validation: uint8, (V, C, H, W), clean and not among `images`: PSNR is measured on them on the way.
        validate_every: steps between two measurements; by default a twentieth of the run.
        micro_batch: images whose activations are in memory at once, in each process; a batch is taken in
            several parts where it is larger. By default all of them.
        device: where.
        save_every: seconds between two states; a killed run loses at most these.
        on_step: called after each step, in each process, with the number of steps done and the loss.
        progress: show a bar.

    Returns:
        The denoiser with averaged weights, and a record: steps, seconds, epochs, running mean of the loss,
        processes, peak memory, whether its convolutions were in TF32, and `warnings`.

    Raises:
        InputError: images of another type or shape.
        ConfigError: images or processes that the configuration does not fit.
        TrainingError: the loss or its gradient is not finite, or the loss has run away; or `out` holds the
            state of another run.
        CheckpointError: the state in `out` is damaged.

    >>> import torch
    >>> from dataclasses import replace
    >>> from purifyloader.diffusion.unet import UNetConfig
    >>> from purifyloader.train import recipe, train_denoiser
    >>> config = replace(recipe("light"), steps=1, batch_size=2, network=UNetConfig.small(channels=8, multipliers=(1,)))
    >>> images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    >>> denoiser, record = train_denoiser(images, "mine", config, progress=False)
    >>> record["steps"]
    1
    """
    spread = distributed.is_available() and distributed.is_initialized()
    rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if spread else (0, 1)
    _check(images, config, world_size)
    if validation is not None:
        check_images(validation, "Validation", images.shape[1])
    for name, given in (("micro_batch", micro_batch), ("validate_every", validate_every)):
        if given is not None and (type(given) is not int or given < 1):
            raise InputError(f"{name} must be a positive integer. Got {given}.")
    if not save_every >= 0:
        raise InputError(f"save_every must be at least 0 seconds. Got {save_every}.")
    device = as_device(device)
    folder = Path(out)
    path = folder / STATE_FILE
    own = identity(config, images.cpu())
    weights = _Weights(build_denoiser(config, images.shape[1], start), config, device)
    plan = {name: getattr(config, name) for name in ("steps", "warmup", "decay_steps")}
    watch, seconds = _Watch(), 0.0
    curves = pictures.Curves()
    warnings: list[str] = []
    if path.exists():
        header, groups = load_state(path, own)
        watch, seconds = _Watch(header["loss"], header["lowest_loss"]), header["seconds"]
        if header["step"] > config.steps:
            raise TrainingError(
                f"{path} is of a run that has done {header['step']} steps already. Got {config.steps} as steps: "
                "give at least these, or another output folder."
            )
        curves, warnings = pictures.Curves(header["curves"]), header["warnings"]
        if (planned := header["plan"]) != plan:
            warnings.append(
                "the length was changed: planned were {steps:,} steps, warm-up over {warmup:,} and decay over the last "
                "{decay_steps:,}; ".format(**planned)
                + "from step {:,} on {steps:,}, {warmup:,} and {decay_steps:,}".format(header["step"], **plan)
            )
        weights.restore(header["step"], groups)
        log.info("going on from step %d of %d in %s", weights.step, config.steps, path)
    if config.compile:
        weights.denoiser.network.compile()
    objective: nn.Module = _Objective(weights.denoiser, config)
    if spread:
        objective = DistributedDataParallel(objective, [device.index] if device.type == "cuda" else None)

    share = config.batch_size // world_size
    part = share if micro_batch is None else min(share, micro_batch)
    images = images.to(device)
    levels = pictures.validation_levels(weights.denoiser.sigma_range)
    judge = None
    if validation is not None and rank == 0:
        judge = pictures.Validation(validation, images.cpu(), levels)
    every = max(1, config.steps // 20) if validate_every is None else validate_every
    # of the steps that are done, while one is being taken: a resumed run takes that one again
    settled = watch.header()
    between = True  # the weights are those of whole steps
    told = False  # that states are not saved
    log_every = max(1, config.steps // 500)

    def save() -> None:
        header = {"identity": own, "plan": plan, "step": weights.step, "seconds": seconds, **settled}
        save_state(path, {**header, "curves": curves.rows, "warnings": warnings}, weights.groups())
        with writing(folder / pictures.CURVES_CSV):
            curves.write_csv(folder)

    def save_if_sound() -> bool:
        """Whether it was: else the state that stands there is worth more."""
        nonlocal told
        if not watch.suspect:
            save()
            return True
        if not told:
            told = True
            log.warning(
                "step %d is not saved, nor any later one while the loss is this far above its lowest, %.4g over %.4g "
                "(running means). A state from before, if there is one, is kept.",
                weights.step,
                watch.mean,
                watch.lowest,
            )
        return False

    def validate() -> None:
        if judge is None or any(row["step"] == weights.step for row in curves.validated()):
            return
        measured = judge.measure(weights.average)
        if not all(map(math.isfinite, measured.values())):
            if weights.step == config.steps:
                raise stop("The denoised images became infinite or NaN")
            return  # the next loss says it, in all processes
        curves.add(step=weights.step, **measured)
        message = pictures.overfitting([judge.means(row) for row in curves.validated()])
        warned = any(warning.startswith("step ") for warning in warnings)
        if message is not None and (not warned or weights.step == config.steps):  # once, and how it ended
            warnings.append(f"step {weights.step}: {message}")
            log.warning(
                "step %d: %s. More images, fewer steps or --augment flip would help; the best so far was at step %d.",
                weights.step,
                message,
                max(curves.validated(), key=lambda row: judge.means(row)[0])["step"],
            )
        with writing(folder):
            curves.write_picture(folder, judge)
            pictures.write_samples(weights.average, judge.held_out, levels, folder / pictures.SAMPLES_PNG)

    def stop(reason: str) -> TrainingError:
        bar.close()
        kept = ""
        if path.exists():
            done = load_state(path, own)[0]["step"]
            kept = f" The last good state is kept in {path}: the same command with --steps {done} makes a checkpoint."
        return TrainingError(
            f"{reason} at step {weights.step + 1}.{kept} Lower the learning rate, or use float32, and start again with "
            "another output folder."
        )

    begun = last = saved = time.monotonic()
    saving = 0.0
    bar = tqdm(total=config.steps, initial=weights.step, disable=not progress or rank > 0, unit="step", desc="training")
    try:
        while (step := weights.step) < config.steps:
            if step and step % every == 0:
                if not weights.finite():  # in every process alike
                    raise stop("The weights became infinite or NaN")
                validate()
            weights.optimizer.zero_grad(set_to_none=True)
            value = torch.zeros((), device=device)
            x0, level, z = _examples(config, images, step, rank * share, (rank + 1) * share)
            for first in range(0, share, part):
                piece = slice(first, first + part)
                whole = first + part >= share
                quiet = objective.no_sync() if spread and not whole else contextlib.nullcontext()  # type: ignore[operator]
                with quiet, _dropout_seed(config, step, rank * share + first, device):
                    loss = objective(x0[piece], level[piece], z[piece]) * (len(x0[piece]) / share)
                    loss.backward()
                value += loss.detach()
            if spread:  # so that all processes judge, and stop, alike
                distributed.all_reduce(value)
                value /= world_size
            norm = float(torch.nn.utils.clip_grad_norm_(weights.parameters.values(), config.clip_norm))
            if (reason := watch.see(step, float(value), norm)) is not None:
                raise stop(reason)
            now = time.monotonic()
            seconds, last = seconds + now - last, now
            # The weights that gave this finite loss are what is saved, so that a state is never a broken one.
            due = now - saved >= max(save_every, saving / _SAVING_SHARE) and step > 0
            if rank == 0 and due and save_if_sound():
                saved = time.monotonic()
                saving = saved - now
            rate = learning_rate(config, step)
            between = False
            weights.update(rate)
            between, settled = True, watch.header()
            if weights.step % log_every == 0 or weights.step == config.steps:
                curves.add(
                    step=weights.step,
                    epoch=round(weights.step * config.batch_size / len(images), 3),
                    seconds=round(seconds, 2),
                    learning_rate=rate,
                    loss=round(watch.mean, 6),
                    gradient_norm=round(norm, 5),
                )
            if on_step is not None:
                on_step(weights.step, float(value))
            bar.update()
            bar.set_postfix(loss=f"{watch.mean:.4f}", refresh=False)
    except KeyboardInterrupt:
        bar.close()
        if rank == 0 and between and last > begun:
            save_if_sound()
        raise
    bar.close()
    if not weights.finite():
        raise stop("The weights became infinite or NaN")
    if rank == 0:
        validate()
        if last > begun or not path.exists():
            save()
    record = {
        "steps": weights.step,
        "seconds": round(seconds, 1),
        "epochs": round(weights.step * config.batch_size / len(images), 1),
        "loss": watch.mean,
        "processes": world_size,
        "peak_memory": peak_memory(device),
        "tf32": _in_tf32(config, device),
        "warnings": warnings,
    }
    return weights.average, record
