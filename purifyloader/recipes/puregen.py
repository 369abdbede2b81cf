"""PureGen (Bhat et al. 2024, arXiv:2405.18627): an energy model, a diffusion model, and how they go together.

In the paper's names a setting is (T_ebm, T_ddpm, T_reps): Langevin steps, diffusion steps, repetitions.
"""

from __future__ import annotations

from typing import Any

from purifyloader.diffusion.schedule import LinearSchedule
from purifyloader.energy.langevin import STEP_SIZE, TEMPERATURE, check_dynamics
from purifyloader.errors import ConfigError
from purifyloader.purifiers import Chain, Diffuse, EnergyAbove, Langevin, Purifier, Repeat, Where
from purifyloader.purifiers.energy_above import check_share
from purifyloader.recipes.models import EnergyModel, Model, as_denoiser, as_energy
from purifyloader.recipes.sizes import check_sizes, resized, tiled

__all__ = ["puregen_ddpm", "puregen_ebm", "puregen_filt", "puregen_naive", "puregen_reps"]

ENERGY = "cifar10-energy"
MODEL = "cifar10-puregen-ddpm"


def puregen_ebm(
    steps: int = 150,
    *,
    energy: EnergyModel = ENERGY,
    step_size: float = STEP_SIZE,
    temperature: float | None = None,
    fast: bool = False,
    compile: bool = False,
    compute_batch: int = 32,
    resize: int | None = None,
    crop: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Purifier:
    """PureGen-EBM: Langevin steps downhill in an energy, from the image itself (Eq. 4).

    The published setting for training from scratch is the default; the paper takes 500 steps before a linear
    probe and 1000 before fine-tuning.

    Args:
        steps: Langevin steps, T_ebm.
        energy: name, folder or energy model.
        step_size: the noise that a step adds, in image units; 1.6 px by default.
        temperature: what the energy is divided by; by default the one it was trained for.
        fast: bfloat16 network arithmetic.
        compile: compile the network (30 s and more a shape): for many images.
        compute_batch: images of every network call.
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the package.

    Raises:
        ConfigError: no such setting, or options that contradict each other.
        InputError, CheckpointError: no energy model.
    """
    check_sizes(resize, crop, tile, overlap)
    _check_dynamics(steps, step_size, temperature)
    purifier = Langevin(
        as_energy(energy),
        steps,
        step_size=step_size,
        temperature=temperature,
        dtype=_dtype(fast),
        compute_batch=compute_batch,
        compile=compile,
    )
    return resized(tiled(purifier, tile, overlap), resize, crop)


def puregen_ddpm(
    steps: int = 75,
    *,
    model: Model = MODEL,
    calls: int | None = None,
    fast: bool = False,
    compute_batch: int = 32,
    resize: int | None = None,
    crop: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Purifier:
    """PureGen-DDPM: noise to t = `steps` of the linear schedule with T = 1000, then denoise step by step.

    The published setting for training from scratch is the default, 75 steps (32.5 px); the paper takes 125 for
    transfer. The variance of a step is the small fixed one, of the posterior. The published loop noises an image
    one index further than it starts to denoise it from; here both are t.

    Args:
        steps: T_ddpm, the timestep to noise to. The paper's model knows those below 250.
        model: name, folder or denoiser.
        calls: network calls, evenly spaced in t; every timestep by default.
        fast: bfloat16 network arithmetic.
        compute_batch: images of every network call.
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the package.

    Raises:
        ConfigError: no such setting, or options that contradict each other.
        InputError, CheckpointError: no denoiser, or none for that much noise.
    """
    check_sizes(resize, crop, tile, overlap)
    _check_count("steps", steps, 1)
    _check_calls(calls, steps)
    purifier = _ddpm(steps, model, calls, fast, compute_batch)
    return resized(tiled(purifier, tile, overlap), resize, crop)


def puregen_naive(
    ebm_steps: int = 150,
    ddpm_steps: int = 75,
    *,
    energy: EnergyModel = ENERGY,
    model: Model = MODEL,
    calls: int | None = None,
    step_size: float = STEP_SIZE,
    temperature: float | None = None,
    fast: bool = False,
    compile: bool = False,
    compute_batch: int = 32,
    resize: int | None = None,
    crop: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Purifier:
    """PureGen-Naive: first the one, then the other, (150, 75, 1).

    Args:
        ebm_steps, ddpm_steps: T_ebm and T_ddpm; a stage of 0 steps is left out, and its model not loaded.
        energy, model: name, folder or model.
        calls: see `puregen_ddpm`.
        step_size, temperature, fast, compile, compute_batch: see `puregen_ebm`.
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the package.

    Raises:
        ConfigError: no such setting, or options that contradict each other.
        InputError, CheckpointError: not the right kind of model.
    """
    check_sizes(resize, crop, tile, overlap)
    purifier = _stages(
        ebm_steps, ddpm_steps, energy, model, calls, step_size, temperature, fast, compile, compute_batch
    )
    return resized(tiled(purifier, tile, overlap), resize, crop)


def puregen_reps(
    ebm_steps: int = 10,
    ddpm_steps: int = 50,
    repeats: int = 5,
    *,
    energy: EnergyModel = ENERGY,
    model: Model = MODEL,
    calls: int | None = None,
    step_size: float = STEP_SIZE,
    temperature: float | None = None,
    fast: bool = False,
    compile: bool = False,
    compute_batch: int = 32,
    resize: int | None = None,
    crop: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Purifier:
    """PureGen-Reps: both in turn, again and again, (10, 50, 5) as in the paper's results (its settings say 7).

    Args:
        ebm_steps, ddpm_steps: of each repetition; a stage of 0 steps is left out, and its model not loaded.
        repeats: T_reps.
        energy, model: name, folder or model.
        calls: of each repetition; see `puregen_ddpm`.
        step_size, temperature, fast, compile, compute_batch: see `puregen_ebm`.
        resize, crop, tile, overlap: for images of many sizes, in pixels; see the package.

    Raises:
        ConfigError: no such setting, or options that contradict each other.
        InputError, CheckpointError: not the right kind of model.
    """
    check_sizes(resize, crop, tile, overlap)
    _check_count("repeats", repeats, 1)
    stages = _stages(ebm_steps, ddpm_steps, energy, model, calls, step_size, temperature, fast, compile, compute_batch)
    return resized(tiled(Repeat(stages, repeats), tile, overlap), resize, crop)


def puregen_filt(
    k: float = 0.5,
    *,
    ebm_steps: int = 0,
    ddpm_steps: int = 125,
    repeats: int = 1,
    energy: EnergyModel = ENERGY,
    model: Model = MODEL,
    calls: int | None = None,
    step_size: float = STEP_SIZE,
    temperature: float | None = None,
    fast: bool = False,
    compile: bool = False,
    compute_batch: int = 32,
    resize: int | None = None,
    crop: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Purifier:
    """PureGen-Filt: purify only the share k of the images with the highest energies, here with (0, 125, 1).

    Which those are is a plan: one pass over the dataset, which `PurifiedDataset` and `precompute` make by themselves
    (`purifyloader.purified.plans`). Whoever chooses images by looking at them has no certificate.

    Args:
        k: share of the images, above 0 and at most 1.
        ebm_steps, ddpm_steps, repeats: what is done to them, as in `puregen_reps`.
        energy: name, folder or energy model, also of the choice, which is made in float32.
        model: name, folder or denoiser.
        calls: of each repetition; see `puregen_ddpm`.
        step_size, temperature, fast, compile, compute_batch: see `puregen_ebm`.
        resize, crop: before the energy is taken.
        tile, overlap: of the purification alone; the energy is the whole image's.

    Raises:
        ConfigError: no such setting, or options that contradict each other.
        InputError, CheckpointError: not the right kind of model.
    """
    check_sizes(resize, crop, tile, overlap)
    check_share(k)
    _check_count("repeats", repeats, 1)
    _check_stages(ebm_steps, ddpm_steps, calls, compile)
    loaded = as_energy(energy)
    purifier = _stages(
        ebm_steps, ddpm_steps, loaded, model, calls, step_size, temperature, fast, compile, compute_batch
    )
    if repeats > 1:
        purifier = Repeat(purifier, repeats)
    condition = EnergyAbove(loaded, k=k, compute_batch=compute_batch)
    return resized(Where(condition, tiled(purifier, tile, overlap)), resize, crop)


def _dtype(fast: bool) -> str:
    return "bfloat16" if fast else "float32"


def _check_dynamics(steps: int, step_size: float, temperature: float | None) -> None:
    """Before a model is loaded."""
    check_dynamics(steps, step_size, TEMPERATURE if temperature is None else temperature)


def _check_count(name: str, value: Any, low: int) -> None:
    if type(value) is not int or value < low:
        raise ConfigError(f"{name} must be an integer from {low}. Got {value!r}.")


def _check_calls(calls: Any, steps: int) -> None:
    if calls is not None and (type(calls) is not int or not 1 <= calls <= steps):
        raise ConfigError(f"calls is how many of the {steps} steps are taken, an integer from 1. Got {calls!r}.")


def _check_stages(ebm_steps: Any, ddpm_steps: Any, calls: Any, compile: bool) -> None:
    """Before a model is loaded."""
    _check_count("ebm_steps", ebm_steps, 0)
    _check_count("ddpm_steps", ddpm_steps, 0)
    if ebm_steps == ddpm_steps == 0:
        raise ConfigError("One of ebm_steps and ddpm_steps must be above 0. Got 0 for both, which does nothing.")
    if ddpm_steps:
        _check_calls(calls, ddpm_steps)
    elif calls is not None:
        raise ConfigError(
            f"calls are those of the diffusion model. Got calls={calls!r} with ddpm_steps=0: leave it out."
        )
    if compile and not ebm_steps:
        raise ConfigError(
            "compile compiles the energy network for its Langevin steps. Got compile=True with ebm_steps=0: "
            "leave it out."
        )


def _ddpm(steps: int, model: Model, calls: int | None, fast: bool, compute_batch: int) -> Diffuse:
    return Diffuse(
        as_denoiser(model),
        t=steps,
        steps=calls,
        schedule=LinearSchedule(),
        dtype=_dtype(fast),
        compute_batch=compute_batch,
    )


def _stages(
    ebm_steps: int,
    ddpm_steps: int,
    energy: EnergyModel,
    model: Model,
    calls: int | None,
    step_size: float,
    temperature: float | None,
    fast: bool,
    compile: bool,
    compute_batch: int,
) -> Purifier:
    """Energy, then diffusion; one alone is bare."""
    _check_stages(ebm_steps, ddpm_steps, calls, compile)
    stages: list[Purifier] = []
    if ebm_steps:
        _check_dynamics(ebm_steps, step_size, temperature)
        stages.append(
            Langevin(
                as_energy(energy),
                ebm_steps,
                step_size=step_size,
                temperature=temperature,
                dtype=_dtype(fast),
                compute_batch=compute_batch,
                compile=compile,
            )
        )
    if ddpm_steps:
        stages.append(_ddpm(ddpm_steps, model, calls, fast, compute_batch))
    return stages[0] if len(stages) == 1 else Chain(*stages)
