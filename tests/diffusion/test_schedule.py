"""Schedules: the published settings in pixels, the formulas of the papers, inverses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from purifyloader.diffusion.schedule import (
    ContinuousVP,
    CosineSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    Schedule,
    schedule_from_config,
    spaced_sigmas,
)
from purifyloader.errors import ConfigError, InputError

SCHEDULES: list[Schedule] = [
    CosineSchedule(4000),
    CosineSchedule(1000),
    CosineSchedule(50),
    LinearSchedule(1000),
    LinearSchedule(4000),
    LinearSchedule(20, 1e-3, 0.4),
    ScaledLinearSchedule(1000, 0.00085, 0.012),
    ContinuousVP(),
    ContinuousVP(1000.0, -2.0, -0.5),
]


def label(schedule: Schedule) -> str:
    return f"{schedule.kind}-{schedule.timesteps:g}"


# -- the published settings ------------------------------------------------------------------------------

# schedule, t, pixels as printed in the papers' units, digits printed after the point
TABLE = [
    (CosineSchedule(4000), 50, 3.75, 2),
    (CosineSchedule(4000), 100, 6.37, 2),
    (CosineSchedule(4000), 150, 8.91, 2),
    (CosineSchedule(4000), 200, 11.4, 1),
    (CosineSchedule(1000), 100, 21.6, 1),
    (LinearSchedule(1000), 100, 43.2, 1),
    (LinearSchedule(1000), 75, 32.5, 1),
    (ContinuousVP(4000), 100, 11.9, 1),
    (ContinuousVP(1000), 100, 43.4, 1),
]


@pytest.mark.parametrize(("schedule", "t", "pixels", "digits"), TABLE, ids=lambda v: getattr(v, "kind", str(v)))
def test_the_published_settings(schedule, t, pixels, digits):
    assert round(255 * float(schedule.sigma(t)), digits) == pixels
    half = 0.5 * 10**-digits / 255
    low, high = (float(schedule.t(pixels / 255 + d)) for d in (-half, half))
    assert low < t < high


def test_the_default_is_eclipses():
    assert CosineSchedule() == CosineSchedule(4000)
    assert float(CosineSchedule().sigma(100)) == pytest.approx(0.02498, rel=1e-3)  # 6.37 px
    assert LinearSchedule() == LinearSchedule(1000)


# -- the formulas, in Python floats ----------------------------------------------------------------------


def cosine_betas(T: int) -> list[float]:
    def f(t: int) -> float:
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - f(t) / f(t - 1), 0.999) for t in range(1, T + 1)]


def linear_betas(T: int) -> list[float]:
    first, last = 0.1 / T, 20 / T  # 1e-4 and 0.02 at T = 1000
    return [first + (last - first) * i / (T - 1) for i in range(T)]


def between(first: float, last: float, T: int) -> list[float]:
    return [first + (last - first) * i / (T - 1) for i in range(T)]


def sigmas_of(betas: list[float]) -> list[float]:
    """sqrt((1 - abar)/abar) on [-1, 1] is twice that on [0, 1]; 1 - abar without cancelling."""
    logs = np.cumsum([math.log1p(-b) for b in betas], dtype=np.longdouble)
    return [math.sqrt(math.expm1(-float(log))) / 2 for log in logs]


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        (CosineSchedule(4000), cosine_betas(4000)),
        (CosineSchedule(1000), cosine_betas(1000)),
        (CosineSchedule(10), cosine_betas(10)),
        (LinearSchedule(1000), linear_betas(1000)),
        (LinearSchedule(4000), linear_betas(4000)),
        (LinearSchedule(25), linear_betas(25)),
        (LinearSchedule(1000, 1e-4, 0.02), linear_betas(1000)),
        (LinearSchedule(10, 1e-4, 0.02), between(1e-4, 0.02, 10)),
        (LinearSchedule(1000, 1e-3, 0.02), between(1e-3, 0.02, 1000)),
        (ScaledLinearSchedule(100, 0.01, 0.04), [r**2 for r in between(0.1, 0.2, 100)]),
        (ScaledLinearSchedule(), [r**2 for r in between(0.01, math.sqrt(0.02), 1000)]),
    ],
    ids=str,
)
def test_discrete_schedules_against_the_formulas(schedule, betas):
    steps = range(1, schedule.timesteps + 1)
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(schedule.sigma(np.array(steps)), sigmas_of(betas), rtol=1e-9)
    # timestep t is entry t - 1 of the cumulative product
    abar = np.cumprod([1 - b for b in betas])
    for t in (1, 2, schedule.timesteps // 2, schedule.timesteps):
        assert float(schedule.abar[t - 1]) == pytest.approx(abar[t - 1], rel=1e-9)
        assert float(schedule.sigma(t)) == pytest.approx(math.sqrt((1 - abar[t - 1]) / abar[t - 1]) / 2, rel=1e-9)


def test_the_cosine_schedule_has_its_closed_form_below_the_clip():
    f = [math.cos((t / 4000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(4001)]
    t = np.arange(1, 3900)
    abar = np.array(f)[t] / f[0]
    np.testing.assert_allclose(CosineSchedule(4000).sigma(t), np.sqrt((1 - abar) / abar) / 2, rtol=1e-8)


@pytest.mark.parametrize(("T", "k1", "k2"), [(4000, -4.975, -0.05), (1000, -4.975, -0.05), (7.5, -1.0, -0.3)])
def test_the_continuous_schedule_against_eq_11(T, k1, k2):
    schedule = ContinuousVP(T, k1, k2)
    for t in (0.0, 1e-3, 0.5, T / 3, float(T)):
        alpha = math.exp(k1 * (t / T) ** 2 + k2 * t / T)  # the signal's scale: abar is its square
        expected = math.sqrt((1 - alpha**2) / alpha**2) / 2
        assert float(schedule.sigma(t)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_continuous_default_is_the_vp_sde():
    """The integral of beta(u) = 0.1 + 19.9 u is 0.1 u + 19.9 u^2/2; alpha is exp of minus half of it."""
    u = 0.37
    alpha = math.exp(-0.5 * (0.1 * u + 19.9 * u**2 / 2))
    assert float(ContinuousVP(1.0).sigma(u)) == pytest.approx(math.sqrt(alpha**-2 - 1) / 2, rel=1e-12)


# -- inverses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_t_and_sigma_are_inverses(schedule):
    T = schedule.timesteps
    t = np.unique(np.concatenate([np.linspace(0, T, 5003), np.linspace(0, 2, 301), np.arange(int(T) + 1)]))
    sigma = schedule.sigma(t)
    assert np.all(np.diff(sigma) > 0)
    np.testing.assert_allclose(schedule.t(sigma), t, rtol=1e-9, atol=1e-9)
    levels = np.geomspace(1e-6, float(schedule.sigma(T)), 2001).clip(max=float(schedule.sigma(T)))
    back = schedule.t(levels)
    assert np.all(np.diff(back) > 0)
    np.testing.assert_allclose(schedule.sigma(back), levels, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_the_ends(schedule):
    assert float(schedule.sigma(0)) == 0
    assert float(schedule.t(0)) == 0
    assert float(schedule.t(schedule.sigma(schedule.timesteps))) == pytest.approx(schedule.timesteps, rel=1e-12)
    assert schedule.sigma([[1, 2], [3, 4]]).shape == (2, 2)
    assert schedule.sigma(1.5).dtype == np.float64


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.kind != "continuous-vp"], ids=label)
def test_whole_timesteps_are_the_table_itself(schedule):
    t = np.arange(schedule.timesteps + 1)
    assert np.array_equal(schedule.sigma(t), schedule.sigmas)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_out_of_range(schedule):
    top = float(schedule.sigma(schedule.timesteps))
    for t in (-1e-9, schedule.timesteps * 1.001, math.nan, math.inf, [1, -1]):
        with pytest.raises(InputError, match="t must lie in"):
            schedule.sigma(t)
    for sigma in (-1e-9, top * 1.001, math.nan, math.inf):
        with pytest.raises(InputError, match="sigma must lie in"):
            schedule.t(sigma)


# -- configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_configuration_round_trip(schedule):
    again = schedule_from_config(json.loads(json.dumps(schedule.config())))
    assert again == schedule
    assert type(again) is type(schedule)
    assert float(again.sigma(10)) == float(schedule.sigma(10))


def test_configurations_of_checkpoints_are_what_they_were():
    assert LinearSchedule(1000).config() == {"kind": "linear", "timesteps": 1000}
    assert CosineSchedule(4000).config() == {"kind": "cosine", "timesteps": 4000}
    assert ContinuousVP().config() == {"kind": "continuous-vp", "timesteps": 4000, "k1": -4.975, "k2": -0.05}
    custom = {"kind": "linear", "timesteps": 10, "beta_start": 1e-4, "beta_end": 0.02}
    assert LinearSchedule(10, 1e-4, 0.02).config() == custom


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"kind": "linear", "beta_start": 0.1},
        {"kind": "linear", "beta_end": 0.1},
        {"kind": "linear", "beta_start": 0.2, "beta_end": 0.1},
        {"kind": "linear", "beta_start": 0.0, "beta_end": 0.1},
        {"kind": "linear", "beta_start": "a", "beta_end": 0.1},
        {"kind": "scaled-linear", "beta_end": 1.0},
        {"kind": "scaled-linear", "beta_end": True},
        {"kind": "scaled-linear", "beta_end": math.nan},
        {"kind": "scaled-linear", "timesteps": 1},
        {"timesteps": 10},
        {"kind": "sigmoid"},
        {"kind": "cosine", "timesteps": 10, "beta": 1},
        {"kind": "cosine", "timesteps": 1},
        {"kind": "cosine", "timesteps": 10.0},
        {"kind": "cosine", "timesteps": "10"},
        {"kind": "linear", "timesteps": 20},
        {"kind": "continuous-vp", "k1": 1.0},
        {"kind": "continuous-vp", "k2": 0.0},
        {"kind": "continuous-vp", "timesteps": -1},
        {"kind": "continuous-vp", "timesteps": math.nan},
        {"kind": "continuous-vp", "k1": "a"},
    ],
    ids=str,
)
def test_bad_configurations(config):
    with pytest.raises(ConfigError, match=r"Got|does not take"):
        schedule_from_config(config)


# -- spaced levels ---------------------------------------------------------------------------------------


def test_as_many_steps_as_timesteps_visit_each():
    schedule = CosineSchedule(4000)
    assert spaced_sigmas(schedule, 100, 100) == (*(float(schedule.sigma(t)) for t in range(100, 0, -1)), 0.0)
    assert spaced_sigmas(schedule, 100.0, 100) == spaced_sigmas(schedule, 100, 100)


@pytest.mark.parametrize(
    ("t", "steps", "visited"),
    [
        (100, 4, [100, 75, 50, 25]),
        (100, 1, [100]),
        (100, 3, [100, 200 / 3, 100 / 3]),
        (1, 1, [1]),
        (0.5, 1, [0.5]),
        (2.5, 3, [2.5, 5 / 3, 2.5 / 3]),
        (2.5, 2, [2.5, 1.25]),
    ],
)
def test_fewer_steps_are_evenly_spaced_in_t(t, steps, visited):
    schedule = CosineSchedule(4000)
    sigmas = spaced_sigmas(schedule, t, steps)
    assert sigmas[-1] == 0
    assert isinstance(sigmas[0], float)
    np.testing.assert_allclose(sigmas[:-1], schedule.sigma(visited), rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_levels_fall_strictly(schedule, steps):
    sigmas = spaced_sigmas(schedule, 20, steps)
    assert len(sigmas) == steps + 1
    assert np.all(np.diff(sigmas) < 0)


@pytest.mark.parametrize(
    ("t", "steps"),
    [
        (100, 0),
        (100, -1),
        (100, 101),
        (100, 4.0),
        (100, "4"),
        (4001, 4),
        (-1, 1),
        (0, 1),
        (math.nan, 1),
        (math.inf, 1),
    ],
    ids=str,
)
def test_bad_spacing(t, steps):
    with pytest.raises(InputError, match="Got"):
        spaced_sigmas(CosineSchedule(4000), t, steps)
