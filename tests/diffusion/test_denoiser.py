"""The denoiser contract: whatever the network predicts, x0 comes out, in image units."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from purifyloader.diffusion.denoiser import PARAMETERIZATIONS, TIMES, NetworkDenoiser, denoiser_from_config
from purifyloader.diffusion.schedule import ContinuousVP, CosineSchedule, LinearSchedule
from purifyloader.diffusion.unet import UNetConfig
from purifyloader.errors import ConfigError, InputError
from tests.conftest import tiny_denoiser, tiny_network

F64 = torch.float64
WIDE = (1e-4, 100.0)


class Oracle(nn.Module):
    """In a network's place: notes what it is given, answers with `answer`."""

    def __init__(self, answer: Tensor, learned_variance: bool = False, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.config = UNetConfig.small(learned_variance=learned_variance)
        self.stem = nn.Conv2d(3, 1, 1, dtype=dtype)
        self.answer = answer
        self.x, self.time = torch.empty(0), torch.empty(0)

    def forward(self, x_BCHW: Tensor, time_B: Tensor) -> Tensor:
        self.x, self.time = x_BCHW, time_B
        return self.answer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand((count, 3, 8, 8), dtype=F64, generator=torch.Generator().manual_seed(seed))


LEVELS = torch.tensor([1e-3, 0.02498, 0.1, 0.25, 1.0, 40.0], dtype=F64)


def what_it_predicts(name: str, y0: Tensor, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The network's true target and its input, for data y0 in [-1, 1] and noise z, as the papers define them.

    alpha and spread are the variance-preserving scales: x_vp = alpha y0 + spread z, spread / alpha = s.
    """
    alpha, spread = 1 / torch.sqrt(1 + s * s), s / torch.sqrt(1 + s * s)
    x_vp = alpha * y0 + spread * z
    if name == "epsilon":
        return z, x_vp
    if name == "v":
        return alpha * z - spread * y0, x_vp
    if name == "x0":
        return y0, x_vp
    # Karras et al. 2022, Table 1, sigma_data = 0.5; the network's target is Eq. 8
    data = 0.5
    x = y0 + s * z
    c_skip = data**2 / (s**2 + data**2)
    c_out = s * data / torch.sqrt(s**2 + data**2)
    return (y0 - c_skip * x) / c_out, x / torch.sqrt(s**2 + data**2)


@pytest.mark.parametrize("name", ["epsilon", "v", "x0", "edm"])
def test_the_true_target_gives_the_clean_image(name):
    x0, z = images(6), random(6, 3, 8, 8)
    target, fed = what_it_predicts(name, 2 * x0 - 1, z, 2 * LEVELS[:, None, None, None])
    oracle = Oracle(target)
    denoiser = NetworkDenoiser(oracle, name, WIDE)
    got = denoiser(x0 + LEVELS[:, None, None, None] * z, LEVELS)
    torch.testing.assert_close(got, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(oracle.x, fed, rtol=1e-12, atol=1e-12)


def test_these_are_all_parameterizations():
    assert sorted(PARAMETERIZATIONS) == ["edm", "epsilon", "v", "x0"]


def test_the_edm_target_and_input_have_unit_variance():
    y0, z = 0.5 * random(6, 3, 64, 64, seed=1), random(6, 3, 64, 64, seed=2)
    for tensor in what_it_predicts("edm", y0, z, 2 * LEVELS[:, None, None, None]):
        np.testing.assert_allclose(tensor.std(dim=(1, 2, 3)), 1, atol=0.04)


@pytest.mark.parametrize("schedule", [CosineSchedule(4000), CosineSchedule(1000), LinearSchedule(1000)], ids=str)
def test_a_variance_preserving_call_is_the_same_call(schedule):
    network = tiny_network(learned_variance=True).double()
    denoiser = NetworkDenoiser(network, "epsilon", WIDE, schedule)
    x0, z = images(4), random(4, 3, 8, 8)
    for t in (1, 2, 100, 250, 900):
        abar = np.cumprod(1 - schedule.betas)[t - 1]
        x_t = math.sqrt(abar) * (2 * x0 - 1) + math.sqrt(1 - abar) * z
        out = network(x_t, torch.full((4,), (t - 1) * 1000 / schedule.timesteps))
        eps, v = out[:, :3], (out[:, 3:] + 1) / 2
        expected = (x_t - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        sigma = torch.full((4,), math.sqrt((1 - abar) / abar) / 2, dtype=F64)
        got, fraction = denoiser.predict(x0 + sigma[:, None, None, None] * z, sigma)
        torch.testing.assert_close(2 * got - 1, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fraction, v, rtol=1e-9, atol=1e-9)


def test_learned_variance_is_the_second_half_from_minus_one_to_one():
    answer = torch.cat(
        [torch.zeros(3, 3, 8, 8), torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 3, 8, 8)], 1
    )
    denoiser = NetworkDenoiser(Oracle(answer.double(), learned_variance=True), "x0", WIDE)
    x0, fraction = denoiser.predict(images(3), torch.full((3,), 0.1))
    assert fraction.shape == (3, 3, 8, 8)
    assert fraction[:, 0, 0, 0].tolist() == [0.0, 0.5, 1.0]
    assert torch.equal(x0, torch.full_like(x0, 0.5))  # 0 in [-1, 1]
    assert tiny_denoiser().predict(images(1).float(), torch.tensor([0.1]))[1] is None


# -- the network's time input ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [CosineSchedule(4000), LinearSchedule(1000), CosineSchedule(1000)], ids=str)
def test_time_of_a_discrete_schedule(schedule):
    T = schedule.timesteps
    denoiser = NetworkDenoiser(tiny_network(), "epsilon", WIDE, schedule)
    t = np.array([1, 2, 3, 99, 100, 101, T // 2, T - 1, T])
    expected = (t - 1) * 1000 / T
    for dtype in (torch.float32, F64):
        got = denoiser.time(torch.from_numpy(schedule.sigma(t)).to(dtype))
        assert got.dtype == F64
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    if T == 4000:
        assert expected[4] == 24.75  # ECLIPSE's t = 100
    # between trained timesteps the nearest, and never below the first
    np.testing.assert_allclose(
        denoiser.time(torch.from_numpy(schedule.sigma(t[1:-1] + 0.4))), expected[1:-1], rtol=1e-12
    )
    np.testing.assert_allclose(denoiser.time(torch.from_numpy(schedule.sigma(t[1:] - 0.4))), expected[1:], rtol=1e-12)
    assert denoiser.time(torch.from_numpy(schedule.sigma([0.01]))).tolist() == [0.0]


def test_time_reaches_the_network_and_noise_is_not_rounded():
    schedule = CosineSchedule(4000)
    oracle = Oracle(torch.zeros(1, 3, 8, 8, dtype=F64))
    denoiser = NetworkDenoiser(oracle, "epsilon", WIDE, schedule)
    sigma = float(schedule.sigma(100.3))
    x = images(1)
    denoiser(x, torch.tensor([sigma], dtype=F64))
    assert oracle.time.tolist() == [24.75]
    torch.testing.assert_close(oracle.x, (2 * x - 1) / math.sqrt(1 + 4 * sigma**2), rtol=1e-12, atol=0)


def test_time_without_a_schedule():
    denoiser = NetworkDenoiser(tiny_network(), "edm", WIDE)
    sigma = [0.001, 0.02498, 0.5, 3.0]
    np.testing.assert_allclose(denoiser.time(torch.tensor(sigma, dtype=F64)), [250 * math.log(2 * s) for s in sigma])


def test_time_of_a_continuous_schedule():
    schedule = ContinuousVP(4000)
    denoiser = NetworkDenoiser(tiny_network(), "epsilon", (1e-3, 1.0), schedule)
    np.testing.assert_allclose(denoiser.time(torch.from_numpy(schedule.sigma([1, 100]))), [0.0, 24.75])


@pytest.mark.parametrize("schedule", [CosineSchedule(4000), LinearSchedule(250)], ids=str)
def test_a_network_told_plain_timesteps(schedule):
    T = schedule.timesteps
    denoiser = NetworkDenoiser(tiny_network(), "epsilon", WIDE, schedule, time="timestep")
    t = np.array([1, 2, 99, T // 2, T - 1, T])
    assert denoiser.time(torch.from_numpy(schedule.sigma(t))).tolist() == (t - 1).tolist()
    assert denoiser.time(torch.from_numpy(schedule.sigma(t[1:-1] + 0.4))).tolist() == (t[1:-1] - 1).tolist()
    assert denoiser.time(torch.from_numpy(schedule.sigma([0.01]))).tolist() == [0.0]


def test_a_network_told_continuous_time():
    """Labels 999 u with u from 0 to 1, and alpha(u) of the SDE with beta from 0.1 to 20."""
    denoiser = NetworkDenoiser(tiny_network(), "epsilon", WIDE, ContinuousVP(1000), time="continuous")
    u = np.array([1e-5, 1e-3, 0.1, 0.12345, 0.9, 1.0])
    alpha = np.exp(-(0.1 * u + 19.9 * u**2 / 2) / 2)
    sigma = np.sqrt(1 - alpha**2) / alpha / 2
    np.testing.assert_allclose(denoiser.time(torch.from_numpy(sigma)), 999 * u, rtol=1e-6)
    # however T counts it
    other = NetworkDenoiser(tiny_network(), "epsilon", WIDE, ContinuousVP(4000), time="continuous")
    np.testing.assert_allclose(other.time(torch.from_numpy(sigma)), 999 * u, rtol=1e-6)


@pytest.mark.parametrize(("time", "schedule"), [("t", CosineSchedule()), (None, CosineSchedule()), ("timestep", None)])
def test_times_that_are_refused(time, schedule):
    with pytest.raises(ConfigError, match=r"time.*Got"):
        NetworkDenoiser(tiny_network(), "epsilon", WIDE, schedule, time=time)


def test_the_time_is_configured_where_it_is_not_the_first_one():
    for time in TIMES:
        denoiser = NetworkDenoiser(tiny_network(), "epsilon", WIDE, CosineSchedule(4000), time=time)
        config = denoiser.config()
        assert set(config) - {"time"} == {"parameterization", "sigma_range", "schedule", "network"}
        assert config.get("time", "rescaled") == time
        assert ("time" in config) is (time != "rescaled")
        again = denoiser_from_config(json.loads(json.dumps(config)))
        assert (again.time_input, again.config()) == (time, config)


@pytest.mark.parametrize("schedule", [CosineSchedule(4000), LinearSchedule(1000), ContinuousVP()], ids=str)
def test_the_last_level_of_a_schedule_in_float32(schedule):
    """float32 rounds each of these up, out of the schedule's table by half a part in ten million."""
    top = float(schedule.sigma(schedule.timesteps))
    denoiser = NetworkDenoiser(tiny_network(), "epsilon", (0.001, top), schedule)
    assert float(torch.tensor(top)) > top
    assert denoiser(images(1).float(), torch.tensor([top])).isfinite().all()
    last = (schedule.timesteps - 1) * 1000 / schedule.timesteps
    assert denoiser.time(torch.tensor([top])).tolist() == [pytest.approx(last)]


# -- batches and sizes -----------------------------------------------------------------------------------


def test_mixed_levels_in_one_batch_are_separate_calls(discrete_denoiser):
    x = images(5).float()
    sigma = torch.tensor([0.005, 0.2, 0.02498, 1.0, 0.2], dtype=F64)
    x0, fraction = discrete_denoiser.predict(x, sigma)
    for i in range(5):
        alone, v = discrete_denoiser.predict(x[i : i + 1], sigma[i : i + 1])
        torch.testing.assert_close(x0[i : i + 1], alone, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(fraction[i : i + 1], v, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("h", "w"), [(30, 27), (27, 30), (1, 1), (9, 8), (16, 16)])
@pytest.mark.parametrize("learned", [False, True])
def test_any_size(h, w, learned):
    denoiser = NetworkDenoiser(tiny_network(learned_variance=learned), "v", WIDE)
    x = torch.rand((2, 3, h, w), generator=torch.Generator().manual_seed(0))
    x0, fraction = denoiser.predict(x, torch.full((2,), 0.1))
    assert x0.shape == x.shape
    assert (fraction is None) is (not learned)
    assert fraction is None or fraction.shape == x.shape
    # the same as repeating the last row and column by hand
    rows, columns = (torch.arange(n + n % 2).clamp(max=n - 1) for n in (h, w))
    padded = denoiser(x[:, :, rows][..., columns], torch.full((2,), 0.1))
    torch.testing.assert_close(x0, padded[..., :h, :w], rtol=0, atol=0)


def test_an_empty_batch():
    assert tiny_denoiser()(torch.empty(0, 3, 8, 8), torch.empty(0)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("of_network", [torch.float32, torch.bfloat16, F64], ids=str)
def test_what_comes_out_has_the_images_type(dtype, of_network):
    denoiser = NetworkDenoiser(tiny_network().to(of_network), "edm", WIDE)
    assert denoiser(images(1).to(dtype), torch.tensor([0.1])).dtype == dtype


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 0.0009, 0.31, -0.1, math.nan, math.inf])
def test_levels_it_was_not_trained_for(denoiser, sigma):
    with pytest.raises(InputError, match=r"0.001 to 0.3 .*px.*Got"):
        denoiser(images(2).float(), torch.tensor([0.1, sigma]))
    with pytest.raises(InputError):
        denoiser.check_sigma(sigma)


def test_the_ends_of_the_range_in_float32(denoiser):
    for sigma in (0.001, 0.3):
        assert denoiser(images(1).float(), torch.tensor([sigma])).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 4, 8, 8), (3, 8, 8), (2, 8, 8, 3)])
def test_shapes_of_images(denoiser, shape):
    with pytest.raises(InputError, match=r"\(B, 3, H, W\)"):
        denoiser(torch.zeros(shape), torch.full((2,), 0.1))


@pytest.mark.parametrize("sigma", [torch.tensor(0.1), torch.full((1,), 0.1), torch.full((2, 1), 0.1)])
def test_one_level_an_image(denoiser, sigma):
    with pytest.raises(InputError, match="one an image"):
        denoiser(torch.zeros(2, 3, 8, 8), sigma)


# -- configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [None, CosineSchedule(4000), LinearSchedule(1000), ContinuousVP()], ids=str)
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_configuration_round_trip(name, schedule):
    config = NetworkDenoiser(tiny_network(learned_variance=True), name, (0.004, 0.2), schedule).config()
    again = denoiser_from_config(json.loads(json.dumps(config)))
    assert again.config() == config
    assert again.sigma_range == (0.004, 0.2)
    assert again.schedule == schedule
    assert again.image_channels == 3


def change(**changes: object) -> dict:
    return {**tiny_denoiser().config(), **changes}


@pytest.mark.parametrize(
    "config",
    [
        {},
        None,
        change(parameterization="score"),
        change(sigma_range=[0.1, 0.1]),
        change(sigma_range=[0.0, 0.1]),
        change(sigma_range=[0.1, math.inf]),
        change(sigma_range=[math.nan, 0.1]),
        change(sigma_range=[0.1]),
        change(sigma_range=0.1),
        change(schedule={"kind": "sigmoid"}),
        change(time="timestep"),
        change(time=3),
        change(network={"kind": "transformer"}),
        change(network={"kind": "unet", "width": 3}),
    ],
    ids=str,
)
def test_bad_configurations(config):
    with pytest.raises(ConfigError, match=r"Got|no field"):
        denoiser_from_config(config)
