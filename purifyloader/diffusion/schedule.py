"""Noise schedules: they map timesteps to sigma in image units.

A variance-preserving schedule gives `abar(t)`, the share of the signal's variance left after t steps, for data in
[-1, 1]. Everything else in this library works in `sigma`, the standard deviation of the noise over the signal's scale
for data in [0, 1]; on the 0-255 scale that is `255 * sigma` pixels:

    sigma(t) = sqrt((1 - abar(t)) / abar(t)) / 2

Timesteps count from 1; t = 0 is the clean image. Everything here is float64 numpy: the tables are tiny and the inverse
must not lose digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from purifyloader.core import limits
from purifyloader.core.checks import check_integer, check_number
from purifyloader.errors import ConfigError, InputError

__all__ = ["ContinuousVP", "CosineSchedule", "LinearSchedule", "ScaledLinearSchedule", "Schedule", "spaced_sigmas"]
__all__ += ["schedule_from_config"]

Float64 = NDArray[np.float64]


class Schedule:
    """Maps a timestep t in [0, timesteps] to sigma in image units, and back."""

    kind: ClassVar[str]
    timesteps: int | float

    def sigma(self, t: ArrayLike) -> Float64:
        """Noise level of timestep `t` (fractions allowed), in image units."""
        raise NotImplementedError

    def t(self, sigma: ArrayLike) -> Float64:
        """Timestep of noise level `sigma`: the inverse of `sigma`."""
        raise NotImplementedError

    def config(self, every: bool = False) -> dict[str, Any]:
        """Describe it as JSON: its kind, and the fields that are given, or `every` one."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **{name: value for name, value in values.items() if every or value is not None}}

    def _check(self, name: str, value: ArrayLike, high: float) -> Float64:
        array = np.asarray(value, np.float64)
        if not np.all((array >= 0) & (array <= high)):
            raise InputError(
                f"{name} must lie in [0, {high:.6g}] for the {self.kind} schedule with "
                f"T={self.timesteps:g}. Got {array.tolist()}."
            )
        return array


@dataclass(frozen=True)
class _BetaSchedule(Schedule):
    """A schedule given by `timesteps` betas, a million at most, interpolated between the steps."""

    timesteps: int

    def __post_init__(self) -> None:
        check_integer("timesteps", self.timesteps, 2, limits.TIMESTEPS)

    @cached_property
    def betas(self) -> Float64:
        raise NotImplementedError

    @cached_property
    def abar(self) -> Float64:
        """Cumulative products of 1 - beta, 0-based: timestep t is `abar[t - 1]`."""
        return np.cumprod(1.0 - self.betas, dtype=np.float64)

    @cached_property
    def sigmas(self) -> Float64:
        """sigma of the timesteps 0, 1, ..., T."""
        sigmas: Float64 = np.concatenate([[0.0], np.sqrt((1.0 - self.abar) / self.abar) / 2])
        return sigmas

    def _check_table(self) -> None:
        """Raise `ConfigError` where the noise is too little or too much for a number."""
        with np.errstate(all="ignore"):
            first, last = self.sigmas[1], self.sigmas[-1]
        if not 0 < first <= last < math.inf:
            raise ConfigError(
                f"The noise of the {self.kind} schedule must have numbers at all of its {self.timesteps} timesteps. "
                f"Got sigma from {first} to {last}: give the betas and the timesteps that the model was trained with."
            )

    # Between two timesteps log sigma is linear in t; between t = 0 and 1 sigma itself is.

    def sigma(self, t: ArrayLike) -> Float64:
        t_ = self._check("t", t, self.timesteps)
        steps = np.arange(1, self.timesteps + 1)
        above = np.exp(np.interp(t_, steps, np.log(self.sigmas[1:])))
        exact = self.sigmas[np.minimum(np.rint(t_).astype(np.int64), self.timesteps)]
        return np.where(t_ == np.rint(t_), exact, np.where(t_ < 1, t_ * self.sigmas[1], above))

    def t(self, sigma: ArrayLike) -> Float64:
        sigma_ = self._check("sigma", sigma, float(self.sigmas[-1]))
        steps = np.arange(1, self.timesteps + 1)
        low = self.sigmas[1]
        above = np.interp(np.log(np.maximum(sigma_, low)), np.log(self.sigmas[1:]), steps)
        return np.where(sigma_ < low, sigma_ / low, above)


@dataclass(frozen=True)
class CosineSchedule(_BetaSchedule):
    """abar(t) = cos^2(((t/T + 0.008) / 1.008) * pi/2), betas at most 0.999 (Nichol & Dhariwal, Eq. 17).

    ECLIPSE: `CosineSchedule(4000)`, purifying from t = 100, which is 6.37 px.
    """

    timesteps: int = 4000
    kind: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_table()

    @cached_property
    def betas(self) -> Float64:
        t = np.arange(self.timesteps + 1, dtype=np.float64)
        f = np.cos((t / self.timesteps + 0.008) / 1.008 * (math.pi / 2)) ** 2
        return np.minimum(1.0 - f[1:] / f[:-1], 0.999)


def _check_betas(kind: str, first: float, last: float) -> None:
    numbers = all(isinstance(beta, int | float) and not isinstance(beta, bool) for beta in (first, last))
    if not numbers or not 0 < first <= last < 1:
        raise ConfigError(
            f"The {kind} schedule needs 0 < beta_start <= beta_end < 1. "
            f"Got beta_start={first!r}, beta_end={last!r}. Give both, as the model was trained."
        )


@dataclass(frozen=True)
class LinearSchedule(_BetaSchedule):
    """betas from 1e-4 to 0.02 over T = 1000, scaled by 1000/T (Ho et al. 2020; PureGen, DiffPure, AVATAR).

    With `beta_start` and `beta_end` they run between these, whatever T (diffusers' "linear").
    """

    timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    kind: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_start is not None or self.beta_end is not None:
            _check_betas(self.kind, self.beta_start, self.beta_end)  # type: ignore[arg-type]  # it refuses None
        elif self.timesteps <= 20:
            raise ConfigError(f"The linear schedule needs more than 20 timesteps. Got {self.timesteps}.")
        self._check_table()

    @cached_property
    def betas(self) -> Float64:
        scale = 1000 / self.timesteps
        first = 1e-4 * scale if self.beta_start is None else self.beta_start
        last = 0.02 * scale if self.beta_end is None else self.beta_end
        return np.linspace(first, last, self.timesteps, dtype=np.float64)


@dataclass(frozen=True)
class ScaledLinearSchedule(_BetaSchedule):
    """betas whose square roots are evenly spaced (Rombach et al. 2022; diffusers' "scaled_linear")."""

    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    kind: ClassVar[str] = "scaled-linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_betas(self.kind, self.beta_start, self.beta_end)
        self._check_table()

    @cached_property
    def betas(self) -> Float64:
        roots = np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), self.timesteps, dtype=np.float64)
        squares: Float64 = roots**2
        return squares


@dataclass(frozen=True)
class ContinuousVP(Schedule):
    """alpha(t) = exp(k1 t^2 + k2 t) over t/T in [0, 1], the signal's scale (ECLIPSE, Eq. 11).

    The paper gives no constants; the defaults are the linear VP SDE with beta from 0.1 to 20 (Song et
    al. 2021): k1 = -(20 - 0.1)/4 and k2 = -0.1/2. With T = 4000, t = 100 is 11.9 px.
    """

    timesteps: float = 4000
    k1: float = -4.975
    k2: float = -0.05
    kind: ClassVar[str] = "continuous-vp"

    def __post_init__(self) -> None:
        for name, low in (("k1", -100), ("k2", -100), ("timesteps", None)):  # exp(-2 (k1 + k2)) has a number
            check_number(name, getattr(self, name), low=low, high=limits.TIMESTEPS)
        if not (self.k1 < 0 and self.k2 < 0 and self.timesteps > 0):
            raise ConfigError(
                "ContinuousVP needs k1 < 0, k2 < 0 and timesteps > 0 (Eq. 11). "
                f"Got k1={self.k1}, k2={self.k2}, timesteps={self.timesteps}."
            )

    def sigma(self, t: ArrayLike) -> Float64:
        u = self._check("t", t, self.timesteps) / self.timesteps
        return np.sqrt(np.expm1(-2 * (self.k1 * u**2 + self.k2 * u))) / 2

    def t(self, sigma: ArrayLike) -> Float64:
        sigma_ = self._check("sigma", sigma, float(self.sigma(self.timesteps)))
        log_alpha = -np.log1p(4 * sigma_**2) / 2
        # the positive root of k1 u^2 + k2 u = log_alpha, in the form that does not cancel near 0
        u = -2 * log_alpha / (-self.k2 + np.sqrt(self.k2**2 + 4 * self.k1 * log_alpha))
        return np.minimum(u, 1.0) * self.timesteps


_KINDS: dict[str, type[Schedule]] = {
    c.kind: c for c in (CosineSchedule, LinearSchedule, ScaledLinearSchedule, ContinuousVP)
}


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """Build back the schedule that `Schedule.config` described."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"A schedule's configuration is an object with a kind. Got {config!r:.80}.")
    values = dict(config)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"A schedule's kind must be one of {sorted(_KINDS)}. Got {kind!r}.")
    try:
        return _KINDS[kind](**values)
    except TypeError as error:
        raise ConfigError(f"The {kind} schedule does not take {sorted(values)}: {error}.") from None


def spaced_sigmas(schedule: Schedule, t: float, steps: int) -> tuple[float, ...]:
    """Compute the noise levels of `steps` network calls from timestep `t` down: evenly spaced in t, then 0.

    `steps == t` visits every timestep t, t-1, ..., 1 (Algorithm 1); fewer steps skip over the same range.
    """
    if not 0 < t < math.inf:
        raise InputError(f"t must be a timestep above 0 to start from. Got {t:g}.")
    if not isinstance(steps, int) or steps < 1 or steps > max(1.0, math.ceil(t)):
        raise InputError(f"steps must be an integer from 1 to t={t:g}, one network call each. Got {steps!r}.")
    schedule.sigma(t)  # raises where the schedule ends, before the list is made
    visited = np.asarray([t * (i / steps) if steps != t else i for i in range(steps, 0, -1)], np.float64)
    return (*schedule.sigma(visited).tolist(), 0.0)
