"""PureGen (Bhat et al. 2024, arXiv:2405.18627): an energy model, a diffusion model, and how they go together.

In the paper's names a setting is (T_ebm, T_ddpm, T_reps): Langevin steps, diffusion steps, repetitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from purifyloader.errors import ConfigError
from purifyloader.recipes.models import EnergyModel, Model, as_denoiser, as_energy, dtype_of
from purifyloader.recipes.registry import Row, recipe
from purifyloader.recipes.sizes import SizeOptions, Sizes

if TYPE_CHECKING:
    from purifyloader.purifiers import Purifier

__all__ = ["puregen_ebm", "puregen_ddpm", "puregen_naive", "puregen_reps", "puregen_filt"]

ENERGY = "cifar10-energy"
MODEL = "cifar10-puregen-ddpm"
STEP_SIZE = 0.00625  # `purifyloader.energy.STEP_SIZE`, without importing torch


@recipe(Row("puregen-ebm", "PureGen, 150 Langevin steps", slow=True))
def puregen_ebm(
    steps: int = 150,
    *,
    energy: EnergyModel = ENERGY,
    step_size: float = STEP_SIZE,
    temperature: float | None = None,
    fast: bool = False,
    compile: bool = False,
    compute_batch: int = 32,
    **sizes: Unpack[SizeOptions],
) -> Purifier:
    """PureGen-EBM: walk downhill in an energy by Langevin steps, from the image itself (Eq. 4).

    The published setting for training from scratch is the default; the paper takes 500 steps before a linear
    probe and 1000 before fine-tuning.

    Args:
        steps: Langevin steps, T_ebm.
        energy: name or folder of an energy model, or one already loaded.
        step_size: the noise that a step adds, in image units; 1.6 px by default.
        temperature: the number that the energy is divided by; by default the one it was trained for.
        fast: bfloat16 network arithmetic.
        compile: compile the network (30 s and more a shape): for many images.
        compute_batch: images of every network call; it decides the last bits.
        sizes: see `purifyloader.recipes`.

    Raises:
        ConfigError: no such setting, or options that contradict each other.
        InputError, CheckpointError: no energy model.

    >>> from purifyloader import recipes
    >>> recipes.puregen_ebm(steps=150).calls
    150
    """
    settings = _Settings(energy, None, None, step_size, temperature, fast, compile, compute_batch, Sizes(**sizes))
    settings.check_dynamics(steps)
    return settings.sizes.around(settings.langevin(steps))


@recipe(Row("puregen-ddpm", "PureGen, 75 diffusion steps", slow=True))
def puregen_ddpm(
    steps: int = 75,
    *,
    model: Model = MODEL,
    calls: int | None = None,
    fast: bool = False,
    compute_batch: int = 32,
    **sizes: Unpack[SizeOptions],
) -> Purifier:
    """PureGen-DDPM: noise to t = `steps` of the linear schedule with T = 1000, then denoise step by step.

    The published setting for training from scratch is the default, 75 steps (32.5 px); the paper takes 125 for
    transfer. The variance of a step is the small fixed one, of the posterior. The published loop noises an image
    one index further than it starts to denoise it from; here both are t.

    Args:
        steps: T_ddpm, the timestep to noise to. The paper's model knows those below 250.
        model: name or folder of a denoiser, or one already loaded.
        calls: network calls, evenly spaced in t; every timestep by default.
        fast: bfloat16 network arithmetic.
        compute_batch: images of every network call; it decides the last bits.
        sizes: see `purifyloader.recipes`.

    Raises:
        ConfigError: no such setting, or options that contradict each other.
        InputError, CheckpointError: no denoiser, or none for that much noise.

    >>> from purifyloader import recipes
    >>> recipes.puregen_ddpm(steps=75, calls=5).calls
    5
    """
    settings = _Settings(None, model, calls, STEP_SIZE, None, fast, False, compute_batch, Sizes(**sizes))
    _check_count("steps", steps, 1)
    _check_calls(calls, steps)
    return settings.sizes.around(settings.diffusion(steps))


@recipe(Row("puregen-naive", "PureGen, 150 Langevin and then 75 diffusion steps", slow=True))
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
    **sizes: Unpack[SizeOptions],
) -> Purifier:
    """PureGen-Naive: first the Langevin steps, then the diffusion, (150, 75, 1).

    Args:
        ebm_steps: Langevin steps, T_ebm; with 0 the stage is left out, and its model not loaded.
        ddpm_steps: diffusion steps, T_ddpm; with 0 the stage is left out, and its model not loaded.
        energy: name or folder of an energy model, or one already loaded.
        model: name or folder of a denoiser, or one already loaded.
        calls: network calls of the diffusion, evenly spaced in t; every timestep by default.
        step_size: the noise that a Langevin step adds, in image units; 1.6 px by default.
        temperature: the number that the energy is divided by; by default the one it was trained for.
        fast: bfloat16 network arithmetic.
        compile: compile the energy network (30 s and more a shape): for many images.
        compute_batch: images of every network call; it decides the last bits.
        sizes: see `purifyloader.recipes`.

    Raises:
        ConfigError: no such setting, or options that contradict each other.
        InputError, CheckpointError: not the right kind of model.

    >>> from purifyloader import recipes
    >>> recipes.puregen_naive(ebm_steps=10, ddpm_steps=5).calls
    15
    """
    settings = _Settings(energy, model, calls, step_size, temperature, fast, compile, compute_batch, Sizes(**sizes))
    return settings.sizes.around(settings.stages(ebm_steps, ddpm_steps))


@recipe(Row("puregen-reps", "PureGen, both by turns, five times", slow=True))
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
    **sizes: Unpack[SizeOptions],
) -> Purifier:
    """PureGen-Reps: both in turn, again and again, (10, 50, 5) as in the paper's results (its settings say 7).

    Args:
        ebm_steps: Langevin steps of each repetition; with 0 the stage is left out, and its model not loaded.
        ddpm_steps: diffusion steps of each repetition; with 0 the stage is left out, and its model not loaded.
        repeats: how many times both are done in turn, T_reps.
        energy: name or folder of an energy model, or one already loaded.
        model: name or folder of a denoiser, or one already loaded.
        calls: network calls of each repetition's diffusion, evenly spaced in t; every timestep by default.
        step_size: the noise that a Langevin step adds, in image units; 1.6 px by default.
        temperature: the number that the energy is divided by; by default the one it was trained for.
        fast: bfloat16 network arithmetic.
        compile: compile the energy network (30 s and more a shape): for many images.
        compute_batch: images of every network call; it decides the last bits.
        sizes: see `purifyloader.recipes`.

    Raises:
        ConfigError: no such setting, or options that contradict each other.
        InputError, CheckpointError: not the right kind of model.

    >>> from purifyloader import recipes
    >>> recipes.puregen_reps(ebm_steps=2, ddpm_steps=3, repeats=4).calls
    20
    """
    settings = _Settings(energy, model, calls, step_size, temperature, fast, compile, compute_batch, Sizes(**sizes))
    return settings.sizes.around(settings.repeated(ebm_steps, ddpm_steps, repeats, always=True))


@recipe(Row("puregen-filt", "PureGen, diffusion of the half with the highest energies", slow=True))
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
    **sizes: Unpack[SizeOptions],
) -> Purifier:
    """PureGen-Filt: purify only the share k of the images with the highest energies, here with (0, 125, 1).

    Which those are is a plan: one pass over the dataset, which `PurifiedDataset` and `precompute` make by themselves
    (`purifyloader.purified.plans`). Whoever chooses images by looking at them has no certificate. The energy is that
    of the whole image after `resize` and `crop`; `tile` and `overlap` are of the purification alone.

    Args:
        k: share of the images, above 0 and at most 1.
        ebm_steps: Langevin steps of each repetition; with 0 the stage is left out.
        ddpm_steps: diffusion steps of each repetition; with 0 the stage is left out, and its model not loaded.
        repeats: how many times both are done in turn.
        energy: name or folder of an energy model, or one already loaded; it also makes the choice, in float32.
        model: name or folder of a denoiser, or one already loaded.
        calls: network calls of each repetition's diffusion, evenly spaced in t; every timestep by default.
        step_size: the noise that a Langevin step adds, in image units; 1.6 px by default.
        temperature: the number that the energy is divided by; by default the one it was trained for.
        fast: bfloat16 network arithmetic.
        compile: compile the energy network (30 s and more a shape): for many images.
        compute_batch: images of every network call; it decides the last bits.
        sizes: see `purifyloader.recipes`.

    Raises:
        ConfigError: no such setting, or options that contradict each other.
        InputError, CheckpointError: not the right kind of model.

    >>> from purifyloader import recipes
    >>> recipes.puregen_filt(0.25).config()["condition"]["k"]
    0.25
    """
    from purifyloader.purifiers import EnergyAbove, Where
    from purifyloader.purifiers.energy_above import check_share

    size = Sizes(**sizes)
    check_share(k)
    _check_count("repeats", repeats, 1)
    _check_stages(ebm_steps, ddpm_steps, calls, compile)
    loaded = as_energy(energy)
    settings = _Settings(loaded, model, calls, step_size, temperature, fast, compile, compute_batch, size)
    purifier = settings.repeated(ebm_steps, ddpm_steps, repeats)
    return size.resized(Where(EnergyAbove(loaded, k=k, compute_batch=compute_batch), size.tiled(purifier)))


@dataclass(frozen=True)
class _Settings:
    """The settings that PureGen's recipes share; what contradicts them is found before a model is loaded."""

    energy: EnergyModel | None
    model: Model | None
    calls: int | None
    step_size: float
    temperature: float | None
    fast: bool
    compile: bool
    compute_batch: int
    sizes: Sizes

    def check_dynamics(self, steps: int) -> None:
        from purifyloader.energy.walking import TEMPERATURE, check_dynamics

        check_dynamics(steps, self.step_size, TEMPERATURE if self.temperature is None else self.temperature)

    def langevin(self, steps: int) -> Purifier:
        from purifyloader.purifiers import Langevin

        assert self.energy is not None
        return Langevin(
            as_energy(self.energy),
            steps,
            step_size=self.step_size,
            temperature=self.temperature,
            dtype=dtype_of(self.fast),
            compute_batch=self.compute_batch,
            compile=self.compile,
        )

    def diffusion(self, steps: int) -> Purifier:
        from purifyloader.diffusion.schedule import LinearSchedule
        from purifyloader.purifiers import Diffuse

        assert self.model is not None
        return Diffuse(
            as_denoiser(self.model),
            t=steps,
            steps=self.calls,
            schedule=LinearSchedule(),
            dtype=dtype_of(self.fast),
            compute_batch=self.compute_batch,
        )

    def stages(self, ebm_steps: int, ddpm_steps: int) -> Purifier:
        """Energy, then diffusion; one alone is bare."""
        from purifyloader.purifiers import Chain

        _check_stages(ebm_steps, ddpm_steps, self.calls, self.compile)
        if ebm_steps:
            self.check_dynamics(ebm_steps)
        stages = [make(steps) for make, steps in ((self.langevin, ebm_steps), (self.diffusion, ddpm_steps)) if steps]
        return stages[0] if len(stages) == 1 else Chain(*stages)

    def repeated(self, ebm_steps: int, ddpm_steps: int, repeats: int, always: bool = False) -> Purifier:
        """The stages several times over; once is bare, unless `always`."""
        from purifyloader.purifiers import Repeat

        _check_count("repeats", repeats, 1)
        stages = self.stages(ebm_steps, ddpm_steps)
        return Repeat(stages, repeats) if always or repeats > 1 else stages


def _check_count(name: str, value: Any, low: int) -> None:
    if type(value) is not int or value < low:
        raise ConfigError(f"must be an integer from {low}. Got {value!r}.", argument=name)


def _check_calls(calls: Any, steps: int) -> None:
    if calls is not None and (type(calls) is not int or not 1 <= calls <= steps):
        raise ConfigError(
            f"must be how many of the {steps} steps are taken, an integer from 1. Got {calls!r}.", argument="calls"
        )


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
