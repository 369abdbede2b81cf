"""PureGen (Bhat et al. 2024, arXiv:2405.18627): an energy model, a diffusion model, and how they go together.

In the paper's names a setting is (T_ebm, T_ddpm, T_reps): Langevin steps, diffusion steps, repetitions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

from purifyloader.errors import ConfigError
from purifyloader.recipes.models import EnergyModel, Model, as_denoiser, as_energy
from purifyloader.recipes.registry import Row, recipe
from purifyloader.recipes.sizes import Network, NetworkOptions

if TYPE_CHECKING:
    from purifyloader.purifiers import Purifier

__all__ = ["puregen_ebm", "puregen_ddpm", "puregen_naive", "puregen_reps", "puregen_filt"]

ENERGY = "cifar10-energy"
MODEL = "cifar10-puregen-ddpm"
STEP_SIZE = 0.00625  # `purifyloader.energy.STEP_SIZE`, without importing torch


class _LangevinOptions(NetworkOptions, total=False):
    energy: EnergyModel
    step_size: float
    temperature: float | None


class _DiffusionOptions(NetworkOptions, total=False):
    model: Model
    calls: int | None


class _Options(_LangevinOptions, _DiffusionOptions, total=False):
    pass


@dataclass(frozen=True)
class _Langevin(Network):
    """The settings of Langevin steps; what contradicts them is found before the model is loaded.

    Args:
        energy: name or folder of an energy model, or one already loaded.
        step_size: the noise that a Langevin step adds, in image units; 1.6 px by default.
        temperature: the number that the energy is divided by; by default the one it was trained for.
    """

    energy: EnergyModel = ENERGY
    step_size: float = STEP_SIZE
    temperature: float | None = None

    def check_dynamics(self, steps: int) -> None:
        from purifyloader.energy.walking import TEMPERATURE, check_dynamics

        check_dynamics(steps, self.step_size, TEMPERATURE if self.temperature is None else self.temperature)

    def langevin(self, steps: int) -> Purifier:
        from purifyloader.purifiers import Langevin

        return Langevin(
            as_energy(self.energy),
            steps,
            step_size=self.step_size,
            temperature=self.temperature,
            **self.computing,
        )


@dataclass(frozen=True)
class _Diffusion(Network):
    """The settings of the diffusion.

    Args:
        model: name or folder of a denoiser, or one already loaded.
        calls: network calls of a diffusion, evenly spaced in t; every timestep by default.
    """

    model: Model = MODEL
    calls: int | None = None

    def check_calls(self, steps: int) -> None:
        if self.calls is not None and (type(self.calls) is not int or not 1 <= self.calls <= steps):
            raise ConfigError(
                f"must be how many of the {steps} steps are taken, an integer from 1. Got {self.calls!r}.",
                argument="calls",
            )

    def diffusion(self, steps: int) -> Purifier:
        from purifyloader.diffusion.schedule import LinearSchedule
        from purifyloader.purifiers import Diffuse

        return Diffuse(
            as_denoiser(self.model),
            t=steps,
            steps=self.calls,
            schedule=LinearSchedule(),
            **self.computing,
        )


@dataclass(frozen=True)
class _Both(_Langevin, _Diffusion):
    def check(self, ebm_steps: Any, ddpm_steps: Any, repeats: Any) -> None:
        """Refuse settings that contradict each other, before a model is loaded."""
        for name, value, low in (("ebm_steps", ebm_steps, 0), ("ddpm_steps", ddpm_steps, 0), ("repeats", repeats, 1)):
            _check_count(name, value, low)
        if ebm_steps == ddpm_steps == 0:
            raise ConfigError("One of ebm_steps and ddpm_steps must be above 0. Got 0 for both, which does nothing.")
        if ddpm_steps:
            self.check_calls(ddpm_steps)
        elif self.calls is not None:
            raise ConfigError(
                f"calls are those of the diffusion model. Got calls={self.calls!r} with ddpm_steps=0: leave it out."
            )
        if ebm_steps:
            self.check_dynamics(ebm_steps)

    def stages(self, ebm_steps: int, ddpm_steps: int, repeats: int = 1) -> Purifier:
        """Energy, then diffusion, several times over; a stage alone and a single time are bare."""
        from purifyloader.purifiers import Chain, Repeat

        self.check(ebm_steps, ddpm_steps, repeats)
        stages = [make(steps) for make, steps in ((self.langevin, ebm_steps), (self.diffusion, ddpm_steps)) if steps]
        once = stages[0] if len(stages) == 1 else Chain(*stages)
        return Repeat(once, repeats) if repeats > 1 else once


@recipe(Row("puregen-ebm", "PureGen, 150 Langevin steps", slow=True), options=_Langevin)
def puregen_ebm(steps: int = 150, **options: Unpack[_LangevinOptions]) -> Purifier:
    """PureGen-EBM: walk downhill in an energy by Langevin steps, from the image itself (Eq. 4).

    The published setting for training from scratch is the default; the paper takes 500 steps before a linear
    probe and 1000 before fine-tuning.

    Args:
        steps: Langevin steps, T_ebm.
        options: see `purifyloader.recipes`.

    >>> from purifyloader import recipes
    >>> recipes.puregen_ebm(steps=150).calls
    150
    """
    settings = _Langevin(**options)
    settings.check_dynamics(steps)
    return settings.around(settings.langevin(steps))


@recipe(Row("puregen-ddpm", "PureGen, 75 diffusion steps", slow=True), options=_Diffusion)
def puregen_ddpm(steps: int = 75, **options: Unpack[_DiffusionOptions]) -> Purifier:
    """PureGen-DDPM: noise to t = `steps` of the linear schedule with T = 1000, then denoise step by step.

    The published setting for training from scratch is the default, 75 steps (32.5 px); the paper takes 125 for
    transfer. The variance of a step is the small fixed one, of the posterior. The published loop noises an image
    one index further than it starts to denoise it from; here both are t.

    Args:
        steps: T_ddpm, the timestep to noise to. The paper's model knows those below 250.
        options: see `purifyloader.recipes`.

    >>> from purifyloader import recipes
    >>> recipes.puregen_ddpm(steps=75, calls=5).calls
    5
    """
    settings = _Diffusion(**options)
    _check_count("steps", steps, 1)
    settings.check_calls(steps)
    return settings.around(settings.diffusion(steps))


@recipe(Row("puregen-naive", "PureGen, 150 Langevin and then 75 diffusion steps", slow=True), options=_Both)
def puregen_naive(ebm_steps: int = 150, ddpm_steps: int = 75, **options: Unpack[_Options]) -> Purifier:
    """PureGen-Naive: first the Langevin steps, then the diffusion, (150, 75, 1).

    Args:
        ebm_steps: Langevin steps, T_ebm; with 0 the stage is left out, and its model not loaded.
        ddpm_steps: diffusion steps, T_ddpm; with 0 the stage is left out, and its model not loaded.
        options: see `purifyloader.recipes`.

    >>> from purifyloader import recipes
    >>> recipes.puregen_naive(ebm_steps=10, ddpm_steps=5).calls
    15
    """
    settings = _Both(**options)
    return settings.around(settings.stages(ebm_steps, ddpm_steps))


@recipe(Row("puregen-reps", "PureGen, both by turns, five times", slow=True), options=_Both)
def puregen_reps(ebm_steps: int = 10, ddpm_steps: int = 50, repeats: int = 5, **options: Unpack[_Options]) -> Purifier:
    """PureGen-Reps: both in turn, again and again, (10, 50, 5) as in the paper's results (its settings say 7).

    Args:
        ebm_steps: Langevin steps of each repetition; with 0 the stage is left out, and its model not loaded.
        ddpm_steps: diffusion steps of each repetition; with 0 the stage is left out, and its model not loaded.
        repeats: how many times both are done in turn, T_reps.
        options: see `purifyloader.recipes`.

    >>> from purifyloader import recipes
    >>> recipes.puregen_reps(ebm_steps=2, ddpm_steps=3, repeats=4).calls
    20
    """
    from purifyloader.purifiers import Repeat

    settings = _Both(**options)
    settings.check(ebm_steps, ddpm_steps, repeats)
    return settings.around(Repeat(settings.stages(ebm_steps, ddpm_steps), repeats))


@recipe(Row("puregen-filt", "PureGen, diffusion of the half with the highest energies", slow=True), options=_Both)
def puregen_filt(
    k: float = 0.5,
    *,
    ebm_steps: int = 0,
    ddpm_steps: int = 125,
    repeats: int = 1,
    **options: Unpack[_Options],
) -> Purifier:
    """PureGen-Filt: purify only the share k of the images with the highest energies, here with (0, 125, 1).

    Which those are is a plan: one pass over the dataset, which `PurifiedDataset` and `precompute` make by themselves
    (`purifyloader.purified.plans`). Whoever chooses images by looking at them has no certificate. The energy is that
    of the whole image after `resize` and `crop`, in float32; `tile` and `overlap` are of the purification alone.

    Args:
        k: share of the images, above 0 and at most 1.
        ebm_steps: Langevin steps of each repetition; with 0 the stage is left out.
        ddpm_steps: diffusion steps of each repetition; with 0 the stage is left out, and its model not loaded.
        repeats: how many times both are done in turn.
        options: see `purifyloader.recipes`.

    >>> from purifyloader import recipes
    >>> recipes.puregen_filt(0.25).config()["condition"]["k"]
    0.25
    """
    from purifyloader.purifiers import EnergyAbove, Where
    from purifyloader.purifiers.energy_above import check_share

    check_share(k)
    settings = _Both(**options)
    settings.check(ebm_steps, ddpm_steps, repeats)
    energy = as_energy(settings.energy)
    settings = replace(settings, energy=energy)
    condition = EnergyAbove(energy, k=k, compute_batch=settings.compute_batch)
    return settings.resized(Where(condition, settings.tiled(settings.stages(ebm_steps, ddpm_steps, repeats))))


def _check_count(name: str, value: Any, low: int) -> None:
    if type(value) is not int or value < low:
        raise ConfigError(f"must be an integer from {low}. Got {value!r}.", argument=name)
