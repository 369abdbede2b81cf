"""Train an energy model by maximum likelihood with samples from it (PureGen, Algorithm 2).

A step walks a batch of the bank's samples K Langevin steps on, then lowers the energy of images and raises that of
the samples.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.devices import as_device
from purifyloader.energy.network import EnergyNetwork
from purifyloader.energy.walking import walk
from purifyloader.errors import ConfigError, PurifyError
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.binding import remember
from purifyloader.train.curves import Curves
from purifyloader.train.energy.bank import DATA_NOISE, WALK, Bank, image_positions, outside, step_keys
from purifyloader.train.energy.config import EnergyTrainConfig
from purifyloader.train.energy.curves import COLUMNS, FOLLOWED, WATCHED, float32_arithmetic, mean_energy, write_pictures
from purifyloader.train.fields import check_channels, check_memory, check_model
from purifyloader.train.run import Task, seeded, train
from purifyloader.train.state import Groups
from purifyloader.train.watch import SETTLED, Watch
from purifyloader.train.weights import Weights

__all__ = ["build_energy", "energy_learning_rate", "train_energy"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_TINY = 1e-300
_APART = 10.0  # times the spread of the images' own energies (or the smallest difference so far): no way back
_STEEP = 5.0  # times the noise of a Langevin step: its slope overshoots
_OUTSIDE = 0.5  # of the samples' pixels have left [0, 1]: no images any more
_SUSPECT = 0.3  # of any of these: not a state worth keeping


def build_energy(
    config: EnergyTrainConfig, image_channels: int = 3, start: EnergyNetwork | None = None
) -> EnergyNetwork:
    """Build the energy model before training, with weights of `start`, or random ones: a function of `config.seed`."""
    check_channels(config, image_channels)
    with seeded(config.seed, torch.device("cpu")):
        energy = EnergyNetwork(config.network, config.temperature)
    check_model(config, "start_from", start)
    if start is not None:
        if start.config != config.network:
            raise ConfigError(
                f"An energy model starts from one of the same shape. Got {start.config} for {config.network}: "
                "leave network out of the configuration."
            )
        energy.load_state_dict(start.state_dict())
        remember(energy, weights_sha256(start))
    return energy


def energy_learning_rate(config: EnergyTrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    up = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return config.learning_rate * up * 0.1 ** sum(step >= at for at in config.decay_at)


class _EnergyWatch(Watch):
    """Keep running means of four values.

    `difference` (mean energy of images less that of samples) and `spread` (standard deviation over the images), in
    units of the temperature; `drift` of a Langevin step without its noise, root mean square in image units; `outside`,
    share of the samples' pixels outside [0, 1] by more than `config.margin`.
    """

    names, more = WATCHED, ("least",)

    def __init__(self, config: EnergyTrainConfig) -> None:
        super().__init__()
        self._noise, self._margin_px = config.step_size, 255 * config.margin

    def broken(self, step: int) -> str | None:
        if step < SETTLED:
            return None
        self.values["least"] = min(abs(self.values["difference"]), self.values.get("least", math.inf))
        for share, reason in self._dangers():
            if share > 1:
                return f"{reason} (running means),"
        return None

    def suspicion(self) -> str | None:
        share, reason = max(self._dangers()) if self.values else (0.0, "")
        return reason if share > _SUSPECT else None

    def _dangers(self) -> list[tuple[float, str]]:
        """Measure how near each of the ways to go wrong is, 1 being too near, and describe it."""
        means = self.values
        scale = max(means["spread"], means.get("least", math.inf), _TINY)
        return [
            (
                abs(means["difference"]) / (_APART * scale),
                f"The energies of images and samples have run apart, by {means['difference']:.3g} temperatures where "
                f"the images' own spread by {means['spread']:.3g}",
            ),
            (
                means["drift"] / (_STEEP * self._noise),
                f"The energy has become so steep that a Langevin step moves {255 * means['drift']:.3g} px downhill "
                f"beside {255 * self._noise:.3g} px of noise",
            ),
            (
                means["outside"] / _OUTSIDE,
                f"{means['outside']:.0%} of the samples' pixels have left [0, 1] by more than {self._margin_px:.3g} px",
            ),
        ]


class _EnergyTask(Task[EnergyNetwork]):
    config: EnergyTrainConfig
    shown = "difference"
    advice = "Lower the learning rate, take more Langevin steps, or use float32"

    def __init__(
        self,
        config: EnergyTrainConfig,
        images: Tensor,
        device: torch.device,
        start: EnergyNetwork | None,
        held_out: Tensor | None,
    ) -> None:
        super().__init__(images, device, held_out)
        check_memory(config, images, device, self.ranks.world_size)
        self.config = config
        self.clip_norm = math.inf if config.clip_norm is None else config.clip_norm
        energy = build_energy(config, images.shape[1], start).to(device).to(memory_format=torch.channels_last)
        optimizer: Any = torch.optim.Adam if config.optimizer == "adam" else torch.optim.SGD
        self.weights = Weights(energy, lambda ps: optimizer(ps, config.learning_rate), config.ema_decay)
        # one network without gradients of the weights, in the arithmetic of the walk, refreshed after each update
        self.walker = copy.deepcopy(self.weights.average).to(_DTYPES[config.dtype])
        if config.compile:
            self.walker.compile()
        self.shown_images = torch.cat([self.images, self.images.flip(-1)]) if config.flip else self.images
        self.bank = Bank(config, self.shown_images)
        self.walked = self.bank.samples[:0]  # of this process, between `gradients` and `update`
        self.watch, self.curves = _EnergyWatch(config), Curves(COLUMNS)
        self.held_out = None if held_out is None else held_out[:FOLLOWED].to(device)

    def learning_rate(self, step: int) -> float:
        return energy_learning_rate(self.config, step)

    def gradients(self, step: int, own: slice) -> dict[str, float]:
        config, shown = self.config, self.shown_images
        # drawn for the whole batch, of which this process takes its positions
        keys_B = step_keys(config, step, 0, config.batch_size)[own]
        slots_B = self.bank.slots(step)
        origin_B = self.bank.origin[slots_B] if config.paired else image_positions(config, len(shown), step)
        samples = self.bank.take(slots_B[own], keys_B).contiguous(memory_format=torch.channels_last)
        keys_B = keys_B.to(self.device)
        try:
            with _arithmetic(config, self.device):
                self.walked, drift = _walked(self.walker, samples, keys_B, config)
        except PurifyError as error:
            raise PurifyError(f"The samples ran away ({error})") from None
        x = shown[origin_B[own].to(self.device)].to(torch.float32) / 255
        x = x + config.data_noise * noise.normal(keys_B, x.shape[1:], DATA_NOISE)
        with _arithmetic(config, self.device):
            measured = _gradients(self.weights.network, x, self.walked, config)
        return measured | {"drift": drift, "outside": outside(self.walked, config)}

    def update(self, rate: float) -> None:
        self.bank.put(self.bank.slots(self.weights.step), self.ranks.gather(self.walked))
        super().update(rate)
        self._refresh()

    def row(self, measured: dict[str, float], norm: float) -> dict[str, float]:
        row = {name: float(f"{measured[name]:.6g}") for name in ("data", "samples", *self.watch.names)}
        row["gradient_norm"] = float(f"{norm:.5g}")
        if self.held_out is not None:
            trained = self.shown_images[:: max(1, len(self.shown_images) // FOLLOWED)][:FOLLOWED]
            try:
                for name, images in (("trained", trained), ("held_out", self.held_out)):
                    row[name] = mean_energy(self.weights.average, images, self.config.temperature)
            except PurifyError as error:
                raise PurifyError(f"The energies broke ({error})") from None
        return row

    def groups(self) -> Groups:
        return {**super().groups(), "bank": {"samples": self.bank.samples}}

    def restore(self, step: int, groups: Groups) -> None:
        if any(row.get(name) is None for row in self.curves.rows for name in self.watch.names):
            raise ValueError("a row of its curves lacks what is drawn of it")
        super().restore(step, groups)
        self.bank.samples.copy_(groups["bank"]["samples"])
        self._refresh()

    def _refresh(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(self.walker.parameters()), list(self.weights.parameters.values()))

    def draw(self, folder: Path) -> None:
        write_pictures(self.curves, self.bank.samples, self.config.step_size, folder)

    def record(self) -> dict[str, Any]:
        return {"watch": {name: float(f"{value:.5g}") for name, value in self.watch.values.items()}}


def _arithmetic(config: EnergyTrainConfig, device: torch.device) -> AbstractContextManager[None]:
    return float32_arithmetic(device) if config.dtype == "float32" else nullcontext()


def _walked(walker: EnergyNetwork, samples: Tensor, keys_B: Tensor, config: EnergyTrainConfig) -> tuple[Tensor, float]:
    """Walk K steps; return the samples, and how far the last step moved them downhill (RMS, in image units)."""
    shape = samples.shape[1:]
    before, z = samples, samples

    def draw(step: int) -> Tensor:
        nonlocal z
        z = noise.normal(keys_B, shape, WALK + step)
        return z

    options = {"step_size": config.step_size, "temperature": config.temperature}
    with torch.no_grad():
        for x in walk(walker, samples, config.langevin_steps, draw, **options):
            before, samples = samples, x
    moved = samples - before - config.step_size * z
    return samples, float(moved.square().mean().sqrt())


def _gradients(energy: EnergyNetwork, x: Tensor, samples: Tensor, config: EnergyTrainConfig) -> dict[str, float]:
    """Leave the gradient of Algorithm 2's step 3 in the weights; return the energies that it comes from."""
    both = torch.cat([x, samples]).contiguous(memory_format=torch.channels_last)
    with torch.autocast(both.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        energies = energy(both).float() / config.temperature
    data_B, samples_B = energies.chunk(2)
    (data_B.mean() - samples_B.mean()).backward()
    data, negative = float(data_B.detach().mean()), float(samples_B.detach().mean())
    spread = float(data_B.detach().std(correction=0)) if len(data_B) > 1 else 0.0
    return {"data": data, "samples": negative, "difference": data - negative, "spread": spread}


def train_energy(
    images: Tensor,
    out: str | os.PathLike[str],
    config: EnergyTrainConfig,
    *,
    start: EnergyNetwork | None = None,
    held_out: Tensor | None = None,
    device: str | torch.device = "cpu",
    save_every: float = 60.0,
    on_step: Callable[[int, float], None] | None = None,
    progress: bool = True,
) -> tuple[EnergyNetwork, dict[str, Any]]:
    """Train an energy model on clean images, as `purifyloader.train.train_denoiser` trains a denoiser.

    The state in `out` holds the bank too, and `on_step` gets the difference of the energies of images and samples, in
    units of the temperature.

    Args:
        images: uint8, (N, C, H, W).
        held_out: uint8, (V, C, H, W), clean and not among `images`: their energies are followed too.

    Returns:
        The energy model with averaged weights, and a record: steps, seconds, epochs, `watch` (running means of what was
        watched), processes, peak memory in bytes, and `warnings`.

    Raises:
        InputError, ConfigError: images or processes that do not fit.
        TrainingError: the energies ran apart, exploded or became NaN, or the samples left the images; or `out` holds
            the state of another run.
        CheckpointError: the state in `out` is damaged.

    >>> import tempfile, torch
    >>> from purifyloader.train.energy import EnergyTrainConfig, train_energy
    >>> images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    >>> fields = {"network": {"channels": 4}, "steps": 2, "batch_size": 2, "langevin_steps": 2}
    >>> config = EnergyTrainConfig.from_dict(fields)
    >>> energy, record = train_energy(images, tempfile.mkdtemp(), config, progress=False)
    >>> record["steps"], energy(images / 255).shape
    (2, torch.Size([4]))
    """
    task = _EnergyTask(config, images, as_device(device), start, held_out)
    energy, record = train(task, out, save_every=save_every, on_step=on_step, progress=progress)
    return energy.to(memory_format=torch.contiguous_format), record
