"""Sparse training of a denoiser: a few hundred to a few thousand clean images, one process.

Everything random is a function of (seed, step), so a run that was stopped goes on with the step it
would have taken, to the same weights (bit for bit with the same number of threads).
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from purifyloader import noise
from purifyloader.devices import as_device
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.objective import hybrid_loss, sigma_loss
from purifyloader.diffusion.schedule import CosineSchedule
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.errors import CheckpointError, ConfigError, InputError, TrainingError
from purifyloader.files import canonical_json, replacing

__all__ = ["PRESETS", "TrainConfig", "build_denoiser", "train_denoiser"]

log = logging.getLogger(__name__)

STATE_FILE = "training-state.safetensors"

# What each number drawn for an image of a step is for.
_TIME, _NOISE, _FLIP = 0, 1, 2


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights, beside the images.

    Args:
        objective: "hybrid" (ECLIPSE, Eq. 8: cosine schedule, T = 4000, predicted noise) or "sigma"
            (continuous noise level over `sigma_range`, EDM parameterization).
        network: shape of the U-Net.
        steps: optimiser steps.
        batch_size: images a step.
        learning_rate: AdamW's, reached linearly over `warmup` steps and let down linearly to zero
            over the last `decay_steps`.
        ema_decay: of the averaged weights, which are the result; (1 + step) / (10 + step) while that
            is smaller.
        replicate: M, further copies of each image in an epoch (ECLIPSE, Sec. 4). At a fixed number of
            steps it changes only which images meet in a batch.
        flip: mirror each image with probability 1/2.
        gamma: weight of the variational sum of "hybrid".
        sigma_range: lowest and highest noise of "sigma", in image units.
        sigma_center, sigma_spread: "sigma" draws ln(sigma) from a normal distribution with this
            median (image units) and standard deviation, cut off at `sigma_range`.
        dtype: of the network's arithmetic, "float32" or "bfloat16"; weights stay float32.
        seed: of the initial weights and of all that is drawn.
    """

    objective: str = "hybrid"
    network: UNetConfig = field(default_factory=UNetConfig)
    steps: int = 250_000
    batch_size: int = 128
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 0
    decay_steps: int = 0
    ema_decay: float = 0.9999
    clip_norm: float = 1.0
    replicate: int = 4
    flip: bool = False
    gamma: float = 0.001
    sigma_range: tuple[float, float] = (0.001, 0.3)
    sigma_center: float = 0.06
    sigma_spread: float = 1.1
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in ("hybrid", "sigma"):
            raise ConfigError(f"objective must be 'hybrid' or 'sigma'. Got {self.objective!r}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be 'float32' or 'bfloat16'. Got {self.dtype!r}.")
        for name, low in (("learning_rate", 0), ("clip_norm", 0), ("sigma_center", 0), ("sigma_spread", 0)):
            if not getattr(self, name) > low:
                raise ConfigError(f"{name} must be above {low}. Got {getattr(self, name)}.")
        for name in ("weight_decay", "warmup", "decay_steps", "gamma"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0. Got {getattr(self, name)}.")
        if self.steps < 1 or self.batch_size < 1 or self.replicate < 0:
            raise ConfigError(
                "steps and batch_size must be at least 1 and replicate at least 0. "
                f"Got {self.steps}, {self.batch_size}, {self.replicate}."
            )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "network": self.network.to_dict(), "sigma_range": list(self.sigma_range)}


PRESETS: dict[str, TrainConfig] = {
    # the paper, with improved-diffusion's defaults where it is silent
    "eclipse": TrainConfig(),
    # what two CPU cores manage in an hour: only the noise that purification uses, one small network
    "light": TrainConfig(
        objective="sigma",
        network=UNetConfig.small(),
        steps=10_000,
        batch_size=32,
        learning_rate=1e-3,
        warmup=200,
        decay_steps=2_500,
        ema_decay=0.999,
        flip=True,
        dtype="bfloat16",
    ),
}


def build_denoiser(config: TrainConfig, image_channels: int = 3) -> NetworkDenoiser:
    """An untrained denoiser, its weights a function of `config.seed`; torch's own generator is left alone."""
    if config.network.image_channels != image_channels:
        raise ConfigError(
            f"The network takes {config.network.image_channels} channels but the images have {image_channels}. "
            "Set image_channels in its configuration."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = UNet(config.network)
    if config.objective == "hybrid":
        schedule = CosineSchedule(4000)
        low, high = float(schedule.sigmas[1]), float(schedule.sigmas[-1])
        return NetworkDenoiser(network, "epsilon", (low, high), schedule)
    return NetworkDenoiser(network, "edm", config.sigma_range)


def _batch_indices(config: TrainConfig, count: int, step: int) -> Tensor:
    """Images of a step: the replicated set shuffled anew each epoch, batches running on across epochs."""
    length = count * (1 + config.replicate)
    positions = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
    chosen = torch.empty(config.batch_size, dtype=torch.int64)
    for epoch in (positions // length).unique().tolist():
        order = noise.uniform(noise.image_keys(config.seed, epoch, 0), (length,))[0].argsort()
        here = positions // length == epoch
        chosen[here] = order[positions[here] % length] % count
    return chosen


def _draw_sigma(config: TrainConfig, keys_B: Tensor) -> Tensor:
    """Truncated log-normal noise levels by inverting the distribution function, (B,) float64."""
    ends = torch.tensor(config.sigma_range, dtype=torch.float64).log()
    low, high = torch.special.ndtr((ends - math.log(config.sigma_center)) / config.sigma_spread)
    u = low + (high - low) * noise.uniform(keys_B, (1,), _TIME)[:, 0]
    sigma = (math.log(config.sigma_center) + config.sigma_spread * torch.special.ndtri(u)).exp()
    return sigma.clamp(*config.sigma_range)


def _loss(denoiser: NetworkDenoiser, config: TrainConfig, images: Tensor, step: int, device: torch.device) -> Tensor:
    index_B = _batch_indices(config, len(images), step)
    keys_B = noise.image_keys(config.seed, step, torch.arange(config.batch_size))
    x0 = images[index_B].to(device, torch.float32) / 255
    if config.flip:
        mirrored = noise.uniform(keys_B, (1,), _FLIP)[:, 0] < 0.5
        x0 = torch.where(mirrored.to(device)[:, None, None, None], x0.flip(-1), x0)
    z = noise.normal(keys_B.to(device), x0.shape[1:], _NOISE)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        if config.objective == "sigma":
            return sigma_loss(denoiser, x0, _draw_sigma(config, keys_B), z).mean()
        assert denoiser.schedule is not None
        u = noise.uniform(keys_B, (1,), _TIME)[:, 0]
        t_B = (u * denoiser.schedule.timesteps).floor().to(torch.int64) + 1
        return hybrid_loss(denoiser, x0, t_B, z, config.gamma).mean()


def _learning_rate(config: TrainConfig, step: int) -> float:
    up = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    down = min(1.0, (config.steps - step) / config.decay_steps) if config.decay_steps else 1.0
    return config.learning_rate * up * down


def _identity(config: TrainConfig, images: Tensor) -> dict[str, Any]:
    """What must be the same for a stopped run to go on. The length may change until the rate is let down."""
    values = config.to_dict()
    values.pop("steps"), values.pop("decay_steps")
    digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    return {"config": values, "images_sha256": digest, "count": len(images)}


def _save_state(path: Path, header: dict[str, Any], groups: dict[str, dict[str, Tensor]]) -> None:
    tensors = {f"{group}/{k}": v.detach().cpu().contiguous() for group, d in groups.items() for k, v in d.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"purifyloader": canonical_json(header)})


def _load_state(path: Path, identity: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["purifyloader"])
            flat = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (a safe_open handle is no mapping)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole training state ({error}). Delete it to train from the start."
        ) from None
    if (saved := header["identity"]) != identity:
        differing = [k for k in identity["config"] if saved["config"].get(k) != identity["config"][k]]
        differing += [k for k in ("images_sha256", "count") if saved[k] != identity[k]]
        raise TrainingError(
            f"{path} belongs to a run with another {', '.join(differing)}. Got a configuration that cannot "
            "go on from it: give the same one, or another output folder."
        )
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        group, key = name.split("/", 1)
        groups.setdefault(group, {})[key] = tensor
    return header, groups


def train_denoiser(
    images: Tensor,
    out: str | Path,
    config: TrainConfig,
    *,
    device: str | torch.device = "cpu",
    save_every: float = 60.0,
    progress: bool = True,
) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """Train a denoiser on clean images; call again with the same arguments to go on after a stop.

    Args:
        images: uint8, (N, C, H, W): the sparse clean set.
        out: folder for the state of the run.
        config: what to train and how.
        device: where.
        save_every: seconds between two states; a killed run loses at most these.
        progress: show a bar.

    Returns:
        The denoiser with averaged weights, and a record: steps, seconds, epochs, last loss.

    Raises:
        InputError: images of another type or shape, or fewer than one batch.
        TrainingError: the loss is not finite, or `out` holds the state of another run.
        CheckpointError: the state in `out` is damaged.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise InputError(
            "Training takes a uint8 tensor of shape (N, C, H, W) with at least one image. "
            f"Got {images.dtype} {tuple(images.shape)}."
        )
    device = as_device(device)
    denoiser = build_denoiser(config, images.shape[1]).to(device).train()
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    parameters = dict(denoiser.named_parameters())
    optimizer = torch.optim.AdamW(
        parameters.values(), config.learning_rate, weight_decay=config.weight_decay, fused=device.type == "cuda"
    )
    path = Path(out) / STATE_FILE
    identity = _identity(config, images)
    step, seconds, loss_mean = 0, 0.0, math.nan
    if path.exists():
        header, groups = _load_state(path, identity)
        step, seconds, loss_mean = header["step"], header["seconds"], header["loss"]
        denoiser.load_state_dict(groups["model"])
        average.load_state_dict(groups["average"])
        for name, parameter in parameters.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": groups["exp_avg"][name].to(device),
                "exp_avg_sq": groups["exp_avg_sq"][name].to(device),
            }
        log.info("going on from step %d of %d in %s", step, config.steps, path)

    def save() -> None:
        header = {"identity": identity, "step": step, "seconds": seconds, "loss": loss_mean}
        moments = {m: {n: optimizer.state[p][m] for n, p in parameters.items()} for m in ("exp_avg", "exp_avg_sq")}
        _save_state(path, header, {"model": denoiser.state_dict(), "average": average.state_dict(), **moments})

    last = saved = time.monotonic()
    bar = tqdm(total=config.steps, initial=step, disable=not progress, unit="step", desc="training")
    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        loss = _loss(denoiser, config, images, step, device)
        value = float(loss.detach())
        if not math.isfinite(value):
            kept = f" (the last state saved is kept in {path})" if path.exists() else ""
            raise TrainingError(
                f"The loss became {value} at step {step + 1}{kept}. Lower the learning rate, or use float32, and "
                "start again with another output folder."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm)
        optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(parameters.values()), 1 - decay)
        step += 1
        loss_mean = value if math.isnan(loss_mean) else loss_mean + 0.02 * (value - loss_mean)
        now = time.monotonic()
        seconds, last = seconds + now - last, now
        bar.update()
        bar.set_postfix(loss=f"{loss_mean:.4f}", refresh=False)
        if now - saved >= save_every or step == config.steps:
            save()
            saved = time.monotonic()
    bar.close()
    record = {
        "steps": step,
        "seconds": round(seconds, 1),
        "epochs": round(step * config.batch_size / len(images), 1),
        "loss": loss_mean,
    }
    return average, record
