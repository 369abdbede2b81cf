"""Maximum likelihood training of an energy model by samples from it (PureGen, Algorithm 2), on any number of processes.

A step walks a batch of the bank's samples K Langevin steps on, then lowers the energy of images and raises that of
the samples. Everything random is a function of (seed, step, position in the batch): a stopped run goes on, with its
bank, to the same weights (bit for bit with the same number of threads), and several processes share the very batches
that one would take (the same weights up to the order of a sum).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from tqdm.auto import tqdm

from purifyloader.core import noise
from purifyloader.core.devices import as_device
from purifyloader.energy.network import EnergyNetwork
from purifyloader.energy.walking import walk
from purifyloader.errors import ConfigError, InputError, PurifyError, TrainingError
from purifyloader.files.weights import weights_sha256
from purifyloader.train.denoiser.task import check_images, peak_memory, seeded
from purifyloader.train.energy.bank import DATA_NOISE, WALK, Bank, image_positions, outside, step_keys
from purifyloader.train.energy.config import EnergyTrainConfig
from purifyloader.train.energy.curves import EnergyCurves, float32_arithmetic
from purifyloader.train.state import STATE_FILE, Groups, images_sha256, load_state, save_state, writing

__all__ = ["build_energy", "energy_learning_rate", "energy_started_from", "train_energy"]

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_SMOOTH = 0.02  # of a new value in its running mean
_SETTLED = 100  # steps before a running mean is worth stopping for
_APART = 10.0  # times the spread of the images' own energies (or the smallest difference so far): no way back
_STEEP = 5.0  # times the noise of a Langevin step: its slope overshoots
_OUTSIDE = 0.5  # of the samples' pixels have left [0, 1]: no images any more
_SUSPECT = 0.3  # of any of these: not a state worth keeping
_SAVING_SHARE = 0.05  # of the time, at most, goes into writing states


def energy_started_from(config: EnergyTrainConfig, start: EnergyNetwork) -> EnergyTrainConfig:
    """The configuration that says it starts from the weights of `start`."""
    return dataclasses.replace(config, start_from={"name": start.name, "weights_sha256": weights_sha256(start)})


def build_energy(
    config: EnergyTrainConfig, image_channels: int = 3, start: EnergyNetwork | None = None
) -> EnergyNetwork:
    """The energy model before training. Random weights are a function of `config.seed`, torch's generator left alone.

    Raises:
        ConfigError: the images have other channels, or `start` is missing, another one, or of another shape.
    """
    if config.network.image_channels != image_channels:
        raise ConfigError(
            f"The network takes {config.network.image_channels} channels but the images have {image_channels}. "
            "Set image_channels in its configuration."
        )
    with seeded(config.seed, torch.device("cpu")):
        energy = EnergyNetwork(config.network, config.temperature)
    wanted = config.start_from
    got = None if start is None else weights_sha256(start)
    if (None if wanted is None else wanted["weights_sha256"]) != got:
        raise ConfigError(
            f"The configuration starts from {dict(wanted) if wanted else 'random weights'}. Got "
            f"{'no energy model' if got is None else got}: give start= the model that it names "
            "(energy_started_from says it)."
        )
    if start is not None:
        if start.config != config.network:
            raise ConfigError(
                f"An energy model starts from one of the same shape. Got {start.config} for {config.network}: "
                "leave network out of the configuration."
            )
        energy.load_state_dict(start.state_dict())
    return energy


def energy_learning_rate(config: EnergyTrainConfig, step: int) -> float:
    up = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return config.learning_rate * up * 0.1 ** sum(step >= at for at in config.decay_at)


def _identity(config: EnergyTrainConfig, images: Tensor) -> dict[str, Any]:
    """What must be the same for a stopped run to go on."""
    values = config.to_dict()
    for name in ("steps", "decay_at", "compile"):
        values.pop(name)
    return {"config": values, "images_sha256": images_sha256(images), "count": len(images)}


def _check(images: Tensor, config: EnergyTrainConfig, world_size: int) -> None:
    check_images(images, "Training")
    if config.batch_size % world_size:
        raise ConfigError(
            f"batch_size must be a multiple of the number of processes, {world_size}, which share each batch. "
            f"Got {config.batch_size}."
        )


class _Model:
    """The energy that is trained, its average, its optimiser, and a frozen copy for the samples to walk with."""

    def __init__(self, energy: EnergyNetwork, config: EnergyTrainConfig, device: torch.device) -> None:
        self.step, self._config = 0, config
        self.energy = energy.to(device).to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.energy).eval().requires_grad_(False)
        # one network without gradients of the weights, in the arithmetic of the walk, refreshed after each update
        self.walker = copy.deepcopy(self.average).to(_DTYPES[config.dtype])
        self.parameters = dict(self.energy.named_parameters())
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(self.parameters.values(), config.learning_rate)
            if config.optimizer == "adam"
            else torch.optim.SGD(self.parameters.values(), config.learning_rate)
        )
        if config.compile:
            self.walker.compile()

    def refresh(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(self.walker.parameters()), list(self.parameters.values()))

    def update(self, rate: float) -> None:
        """One step with the gradients there are."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        decay = min(self._config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.parameters.values()), 1 - decay)
        self.step += 1
        self.refresh()

    def groups(self) -> Groups:
        moments = {
            m: {n: self.optimizer.state[p][m] for n, p in self.parameters.items() if self.optimizer.state.get(p)}
            for m in ("exp_avg", "exp_avg_sq")
            if self._config.optimizer == "adam"
        }
        return {"model": self.energy.state_dict(), "average": self.average.state_dict(), **moments}

    def restore(self, step: int, groups: Groups) -> None:
        self.step = step
        self.energy.load_state_dict(groups["model"])
        self.average.load_state_dict(groups["average"])
        for name, parameter in self.parameters.items():
            if name in groups.get("exp_avg", {}):
                moments = {m: torch.empty_like(parameter).copy_(groups[m][name]) for m in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        self.refresh()


class _Watch:
    """Running means of what tells a sound run from a broken one."""

    NAMES = ("difference", "spread", "drift", "outside")

    def __init__(self, config: EnergyTrainConfig, values: dict[str, float] | None = None) -> None:
        self._noise, self._margin_px = config.step_size, 255 * config.margin
        self.values = dict(values or {})

    def see(self, step: int, new: dict[str, float]) -> str | None:
        """Take in what a step has measured; a reason to stop, or None.

        Args:
            new: in units of the temperature, `difference` (mean energy of images less that of samples) and `spread`
                (standard deviation over the images); `drift` of a Langevin step without its noise, root mean square
                in image units; `outside`, share of the samples' pixels outside [0, 1] by more than `config.margin`.
        """
        for name in self.NAMES:
            before = self.values.get(name, new[name])
            self.values[name] = before + _SMOOTH * (new[name] - before)
            if not math.isfinite(self.values[name]):
                return f"The {name} of the energies became {new[name]}"
        if step < _SETTLED:
            return None
        self.values["least"] = min(abs(self.values["difference"]), self.values.get("least", math.inf))
        for share, what in self._measures():
            if share > 1:
                return f"{what} (running means),"
        return None

    def _measures(self) -> list[tuple[float, str]]:
        """How near each of the ways to go wrong is, 1 being too near."""
        its = self.values
        scale = max(its["spread"], its.get("least", math.inf))
        return [
            (
                abs(its["difference"]) / (_APART * scale),
                f"The energies of images and samples have run apart, by {its['difference']:.3g} temperatures where the "
                f"images' own spread by {its['spread']:.3g}",
            ),
            (
                its["drift"] / (_STEEP * self._noise),
                f"The energy has become so steep that a Langevin step moves {255 * its['drift']:.3g} px downhill "
                f"beside {255 * self._noise:.3g} px of noise",
            ),
            (
                its["outside"] / _OUTSIDE,
                f"{its['outside']:.0%} of the samples' pixels have left [0, 1] by more than {self._margin_px:.3g} px",
            ),
        ]

    @property
    def suspicion(self) -> str | None:
        """Why the state is not worth keeping; None where it is."""
        share, what = max(self._measures()) if self.values else (0.0, "")
        return what if share > _SUSPECT else None


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
    """Train an energy model on clean images; call again with the same arguments to go on after a stop.

    Where torch.distributed is initialised, its processes share each batch; the first one writes.

    Args:
        images: uint8, (N, C, H, W).
        out: folder for the state of the run, with its bank, its curves and pictures.
        config: what to train and how.
        start: the energy model that `config.start_from` names.
        held_out: uint8, (V, C, H, W), clean and not among `images`: their energies are followed too.
        device: where.
        save_every: seconds between two states; a killed run loses at most these.
        on_step: called after each step, in each process, with the number of steps done and the difference of the
            energies of images and samples, in units of the temperature.
        progress: show a bar.

    Returns:
        The energy model with averaged weights, and a record: steps, seconds, epochs, the running means of what was
        watched, processes, peak memory, and `warnings`.

    Raises:
        InputError: images, or held-out ones, of another type or shape.
        ConfigError: images or processes that the configuration does not fit.
        TrainingError: the energies ran apart, exploded or became NaN, or the samples left the images; or `out` holds
            the state of another run.
        CheckpointError: the state in `out` is damaged.

    >>> import torch
    >>> from dataclasses import replace
    >>> from purifyloader.energy import EnergyConfig
    >>> from purifyloader.train.energy import energy_recipe, train_energy
    >>> config = replace(energy_recipe("light"), steps=1, batch_size=2, langevin_steps=1)
    >>> config = replace(config, network=EnergyConfig(channels=4))
    >>> images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    >>> energy, record = train_energy(images, "mine", config, progress=False)
    >>> record["steps"]
    1
    """
    spread = distributed.is_available() and distributed.is_initialized()
    rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if spread else (0, 1)
    _check(images, config, world_size)
    if held_out is not None:
        check_images(held_out, "held_out", images.shape[1])
    if not save_every >= 0:
        raise InputError(f"save_every must be at least 0 seconds. Got {save_every}.")
    device = as_device(device)
    folder = Path(out)
    path = folder / STATE_FILE
    own = _identity(config, images.cpu())
    model = _Model(build_energy(config, images.shape[1], start), config, device)
    shown = images.to(device)
    if config.flip:
        shown = torch.cat([shown, shown.flip(-1)])
    bank = Bank(config, shown)
    watch, seconds, warnings = _Watch(config), 0.0, list[str]()
    curves = EnergyCurves(folder, config, held_out)
    plan = {"steps": config.steps, "decay_at": list(config.decay_at)}
    if path.exists():
        header, groups = load_state(path, own)
        if header["step"] > config.steps:
            raise TrainingError(
                f"{path} is of a run that has done {header['step']} steps already. Got {config.steps} as steps: "
                "give at least these, or another output folder."
            )
        watch, seconds, warnings = _Watch(config, header["watch"]), header["seconds"], header["warnings"]
        curves.rows = header["curves"]
        if (planned := header["plan"]) != plan:
            warnings.append(
                f"the length was changed at step {header['step']:,}: planned were {planned['steps']:,} steps with the "
                f"rate let down at {planned['decay_at']}, now {config.steps:,} and {list(config.decay_at)}"
            )
        model.restore(header["step"], groups)
        bank.samples.copy_(groups["bank"]["samples"])
        log.info("going on from step %d of %d in %s", model.step, config.steps, path)

    share = config.batch_size // world_size
    mine = slice(rank * share, (rank + 1) * share)
    between = True  # weights and bank are those of whole steps
    told = False  # that states are not saved
    settled = dict(watch.values)  # of the steps that are done, while one is being taken: a resumed run takes it again
    log_every = max(1, config.steps // 500)

    def save() -> None:
        header = {"identity": own, "plan": plan, "step": model.step, "seconds": seconds, "watch": settled}
        groups = {**model.groups(), "bank": {"samples": bank.samples}}
        save_state(path, {**header, "curves": curves.rows, "warnings": warnings}, groups)
        with writing(folder):
            curves.write(model.average, bank.samples)

    def save_if_sound() -> bool:
        """Whether it was: else the state that stands there is worth more."""
        nonlocal told
        reason = watch.suspicion
        if reason is None:
            save()
            return True
        if not told:
            told = True
            log.warning(
                "step %d is not saved, nor any later one while this looks like a run that breaks: %s (running means). "
                "A state from before, if there is one, is kept.",
                model.step,
                reason,
            )
        return False

    def stop(reason: str, step: int) -> TrainingError:
        bar.close()
        kept = ""
        if path.exists():
            done = load_state(path, own)[0]["step"]
            kept = f" The last good state is kept in {path}: the same command with --steps {done} makes a checkpoint."
        return TrainingError(
            f"{reason} at step {step}.{kept} Lower the learning rate, take more Langevin steps, or use "
            "float32, and start again with another output folder."
        )

    begun = last = saved = time.monotonic()
    saving = 0.0
    bar = tqdm(total=config.steps, initial=model.step, disable=not progress or rank > 0, unit="step", desc="training")
    try:
        while (step := model.step) < config.steps:
            keys_B = step_keys(config, step, 0, config.batch_size)
            slots_B = bank.slots(step)
            origin_B = bank.origin[slots_B] if config.paired else image_positions(config, len(shown), step)
            # positions of this process; the draws are those of the whole batch
            keys, slots = keys_B[mine], slots_B[mine]
            samples = bank.take(slots, keys).contiguous(memory_format=torch.channels_last)
            drawn = keys.to(device)
            failure = None
            try:
                with _arithmetic(config, device):
                    samples, drift = _walked(model.walker, samples, drawn, config)
            except PurifyError as error:  # said below, by all processes at the same place
                failure, drift = f"The samples ran away ({error})", math.nan
            x = shown[origin_B[mine].to(device)].to(torch.float32) / 255
            x = x + config.data_noise * noise.normal(drawn, x.shape[1:], DATA_NOISE)
            with _arithmetic(config, device):
                measured, norm = _gradients(model, x, samples, config, world_size)
            measured |= {"drift": drift, "outside": outside(samples, config), "away": float(failure is not None)}
            if spread:
                measured = _shared(measured, device)
            if measured["away"]:
                raise stop(failure or "The samples of another process ran away", step + 1)
            if not math.isfinite(norm):
                raise stop(f"The gradient has the norm {norm}", step + 1)
            if (reason := watch.see(step, measured)) is not None:
                raise stop(reason, step + 1)
            now = time.monotonic()
            seconds, last = seconds + now - last, now
            if spread:
                parts = [torch.empty_like(samples, memory_format=torch.contiguous_format) for _ in range(world_size)]
                distributed.all_gather(parts, samples.contiguous())
                samples = torch.cat(parts)
            # state and weights that gave these finite energies are what is saved, so that a state is never broken
            due = now - saved >= max(save_every, saving / _SAVING_SHARE) and step > 0
            if rank == 0 and due and save_if_sound():
                saved = time.monotonic()
                saving = saved - now
            rate = energy_learning_rate(config, step)
            between = False
            bank.put(slots_B, samples)
            model.update(rate)
            between, settled = True, dict(watch.values)
            if model.step % log_every == 0 or model.step == config.steps:
                row = {name: float(f"{measured[name]:.6g}") for name in ("data", "samples", *_Watch.NAMES)}
                row |= {"learning_rate": rate, "gradient_norm": float(f"{norm:.5g}")}
                try:
                    curves.add(model.average, shown, step=model.step, seconds=round(seconds, 2), **row)
                except PurifyError as error:  # in all processes alike: they have the same weights
                    raise stop(f"The energies broke ({error})", model.step) from None
            if on_step is not None:
                on_step(model.step, measured["difference"])
            bar.update()
            bar.set_postfix(difference=f"{watch.values['difference']:.1f}", refresh=False)
    except KeyboardInterrupt:
        bar.close()
        if rank == 0 and between and last > begun:
            save_if_sound()
        raise
    bar.close()
    if not all(bool(p.isfinite().all()) for p in model.average.parameters()):
        raise stop("The weights became infinite or NaN", model.step)
    if rank == 0 and (last > begun or not path.exists()):
        save()
    record = {
        "steps": model.step,
        "seconds": round(seconds, 1),
        "epochs": round(model.step * config.batch_size / len(images), 1),
        "watch": {name: float(f"{value:.5g}") for name, value in watch.values.items()},
        "processes": world_size,
        "peak_memory": peak_memory(device),
        "warnings": warnings,
    }
    return model.average.to(memory_format=torch.contiguous_format), record


def _arithmetic(config: EnergyTrainConfig, device: torch.device) -> AbstractContextManager[None]:
    return float32_arithmetic(device) if config.dtype == "float32" else nullcontext()


def _walked(walker: EnergyNetwork, samples: Tensor, keys_B: Tensor, config: EnergyTrainConfig) -> tuple[Tensor, float]:
    """The samples K steps on, and how far the last step moved them downhill (root mean square, image units)."""
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


def _gradients(
    model: _Model, x: Tensor, samples: Tensor, config: EnergyTrainConfig, world_size: int
) -> tuple[dict[str, float], float]:
    """Leave the gradient of Algorithm 2's step 3 in the weights; the energies it came from, and its norm."""
    model.optimizer.zero_grad(set_to_none=True)
    both = torch.cat([x, samples]).contiguous(memory_format=torch.channels_last)
    with torch.autocast(both.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        energies = model.energy(both).float() / config.temperature
    data_B, samples_B = energies.chunk(2)
    (data_B.mean() - samples_B.mean()).backward()
    gradients = [p.grad for p in model.parameters.values() if p.grad is not None]
    if world_size > 1:
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        flat /= world_size
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))
    limit = math.inf if config.clip_norm is None else config.clip_norm
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters.values(), limit))
    data, negative = float(data_B.detach().mean()), float(samples_B.detach().mean())
    return {"data": data, "samples": negative, "difference": data - negative, "spread": _spread(data_B)}, norm


def _spread(energies_B: Tensor) -> float:
    return float(energies_B.detach().std(correction=0)) if len(energies_B) > 1 else 0.0


def _shared(measured: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean over all processes, so that all judge, and stop, alike."""
    values = torch.tensor(list(measured.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(values)
    return dict(zip(measured, (values / distributed.get_world_size()).tolist(), strict=True))
