"""What a certificate takes for granted of denoising once: the network sees x + sigma N, exactly and once, at its t."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from purifyloader import pretrained, recipes
from purifyloader.core import noise
from purifyloader.diffusion import BlindDenoiser, CosineSchedule, Denoiser, LinearSchedule, NetworkDenoiser
from purifyloader.errors import ConfigError, InputError
from purifyloader.purifiers import DenoiseOnce, Diffuse
from tests.conftest import random_images, tiny_denoiser, tiny_network
from tests.pretrained.test_convert_networks import converted

RANGE = (1e-3, 10.0)
SIGMAS = (0.01, 6.37 / 255, 0.1, 0.25, 0.5, 1.0)
COUNT = 40


class Watching(Denoiser):
    """A denoiser that leaves its input as it is, and keeps every (x, sigma) that it is called with."""

    sigma_range = RANGE

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def predict(self, x_BCHW: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor | None]:
        self.seen.append((x_BCHW.clone(), sigma_B.clone()))
        return x_BCHW, None


class Same(nn.Module):
    """A network that gives back its input, and keeps it. It has a weight, so that it can be cast."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.seen: list[Tensor] = []

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.seen.append(x_BCHW.clone())
        return x_BCHW


class Times(nn.Module):
    """In the place of a network that predicts noise: keeps its input and its time."""

    def __init__(self) -> None:
        super().__init__()
        self.config = tiny_network().config
        self.stem = nn.Conv2d(3, 1, 1)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_BCHW: Tensor, time_B: Tensor) -> Tensor:
        self.seen.append((x_BCHW.clone(), time_B.clone()))
        return torch.zeros_like(x_BCHW)


@pytest.fixture(scope="module")
def x() -> Tensor:
    images = random_images(COUNT).float() / 255
    images[0], images[1] = 0, 1
    return images


@pytest.fixture(scope="module")
def keys() -> Tensor:
    return noise.image_keys(7, 0, range(COUNT))


def noise_of(count: int, level: float, sigma: float, seed: int = 7, size: int = 16) -> Tensor:
    """What one pass adds to `count` images of one level, in units of sigma, float64."""
    x = torch.full((count, 3, size, size), level)
    out = recipes.denoise_once(Watching(), sigma)(x, noise.image_keys(seed, 0, range(count)))
    return (out.double() - level) / sigma


# -- the noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_network_is_given_x_plus_sigma_n_to_the_last_bit(sigma, x, keys):
    """At every sigma: that of no timestep, too, and with images that leave [0, 1] by it."""
    purifier = recipes.denoise_once(Watching(), sigma)
    expected = x + sigma * noise.normal(keys, x.shape[1:])
    out = purifier(x, keys)
    assert torch.equal(out, expected)
    assert out.dtype == torch.float32
    given = torch.cat([seen for seen, _ in purifier.denoiser.seen])
    assert torch.equal(given[:COUNT], expected)
    assert all((level == sigma).all() and level.dtype == torch.float64 for _, level in purifier.denoiser.seen)
    if sigma >= 0.1:
        assert expected.min() < -2 * sigma
        assert expected.max() > 1 + 2 * sigma
    # and none of the trained levels around it would have given these bits
    schedule = CosineSchedule(4000)
    t = float(schedule.t(sigma))
    for rounded in (math.floor(t), math.ceil(t)):
        assert not torch.equal(out, x + float(schedule.sigma(rounded)) * noise.normal(keys, x.shape[1:]))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_trained_network_is_given_the_variance_preserving_image_of_exactly_sigma(sigma, x, keys):
    """sqrt(abar) (2x - 1) + sqrt(1 - abar) z, with the abar of sigma and not of the timestep that it is told."""
    purifier = recipes.denoise_once(NetworkDenoiser(Times(), "epsilon", RANGE, CosineSchedule(4000)), sigma)
    purifier(x[:16], keys[:16])
    ((given, _),) = purifier.denoiser.network.seen
    abar = 1 / (1 + (2 * sigma) ** 2)
    z = noise.normal(keys[:16], x.shape[1:]).double()
    expected = math.sqrt(abar) * (2 * x[:16].double() - 1) + math.sqrt(1 - abar) * z
    got = given[:16].double()
    assert (got - expected).abs().max() < 2e-6
    t = round(float(CosineSchedule(4000).t(sigma)))
    near = 1 / (1 + (2 * float(CosineSchedule(4000).sigma(t))) ** 2)
    of_timestep = math.sqrt(near) * (2 * x[:16].double() - 1) + math.sqrt(1 - near) * z
    assert (got - of_timestep).abs().max() > 1e-5


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [0.1, 0.25, 1.0])
def test_the_noise_is_normal_and_has_exactly_sigma(level, sigma):
    z = noise_of(64, level, sigma).flatten()
    n = len(z)
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    if level != 0.5:  # clamped, black and white would keep half of it, which this would see
        clamped = (level + sigma * z).clamp(0, 1)
        assert abs(float(((clamped - level) / sigma).square().mean()) - 1) > 40 * math.sqrt(2 / n)


def test_no_two_values_share_their_noise():
    """Not those of one image, of two images, or of two draws of an image."""
    one, other = noise_of(64, 0.5, 0.25), noise_of(64, 0.5, 0.25, seed=8)
    values = one.numel()
    allowed = 4 / math.sqrt(values)
    pairs = {
        "neighbours": (one[..., 1:], one[..., :-1]),
        "rows": (one[:, :, 1:], one[:, :, :-1]),
        "channels": (one[:, 1:], one[:, :-1]),
        "images": (one[1:], one[:-1]),
        "draws": (one, other),
    }
    for name, (a, b) in pairs.items():
        assert abs(float((a * b).mean())) < 4 / math.sqrt(a.numel()), name
    assert float((one * one).mean()) > 50 * allowed
    assert len(one.unique()) > 0.99 * values  # some round to the same float32
    epochs = [noise.normal(noise.image_keys(7, epoch, range(64)), (3, 16, 16)) for epoch in (0, 1)]
    assert abs(float((epochs[0] * epochs[1]).mean())) < allowed


def test_the_noise_is_that_of_the_key_whatever_is_around_the_image(x, keys):
    sigma = 0.25
    whole = recipes.denoise_once(Watching(), sigma)(x, keys)
    for compute_batch in (1, 16, 24, 32, 100):
        purifier = recipes.denoise_once(Watching(), sigma, compute_batch=compute_batch)
        for count in (1, 2, 15, 16, 17, COUNT):
            assert torch.equal(purifier(x[:count], keys[:count]), whole[:count])
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(compute_batch))
        assert torch.equal(purifier(x[order], keys[order]), whole[order])
    # nor on its own pixels
    flat = recipes.denoise_once(Watching(), sigma)(torch.zeros_like(x), keys)
    torch.testing.assert_close(whole - x, flat, rtol=0, atol=3e-7)
    # nor on images of other sizes beside it
    small = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    mixed = recipes.denoise_once(Watching(), sigma).purify_images([x[0], small, x[1]], keys[[0, 39, 1]])
    assert torch.equal(torch.stack([mixed[0], mixed[2]]), whole[:2])
    assert torch.equal(mixed[1], small + sigma * noise.normal(keys[39:], small.shape)[0])


@pytest.mark.parametrize("sigma", SIGMAS)
def test_fast_casts_the_network_and_not_the_noise(sigma, x, keys):
    exact = x + sigma * noise.normal(keys, x.shape[1:])
    watching = recipes.denoise_once(Watching(), sigma, fast=True)
    assert torch.equal(watching(x, keys), exact)
    blind = recipes.denoise_once(BlindDenoiser(Same(), RANGE), sigma, fast=True)
    out = blind(x, keys)
    given = torch.cat(blind.denoiser.network.seen)
    assert given.dtype == torch.bfloat16
    assert torch.equal(given[:COUNT], exact.bfloat16())
    assert out.dtype == torch.float32
    assert torch.equal(out, exact.bfloat16().float())
    unet = recipes.denoise_once(NetworkDenoiser(Times(), "epsilon", RANGE, CosineSchedule(4000)), sigma, fast=True)
    unet(x[:16], keys[:16])
    c_in = 1 / math.sqrt(1 + 4 * sigma**2)
    given, _ = unet.denoiser.network.seen[0]
    assert given.dtype == torch.bfloat16
    assert torch.equal(given[:16], (torch.tensor(c_in, dtype=torch.float64).float() * (2 * exact[:16] - 1)).bfloat16())


# -- one call ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "compute_batch"), [(1, 16), (16, 16), (32, 16), (40, 16), (40, 32), (33, 32)])
def test_each_image_goes_through_the_network_once(count, compute_batch, x, keys):
    purifier = recipes.denoise_once(Watching(), 0.25, compute_batch=compute_batch)
    assert purifier.calls == 1
    noised = x[:count] + 0.25 * noise.normal(keys[:count], x.shape[1:])
    purifier(x[:count], keys[:count])
    calls = [seen for seen, _ in purifier.denoiser.seen]
    assert [len(call) for call in calls] == [compute_batch] * math.ceil(count / compute_batch)
    given = torch.cat(calls)
    assert torch.equal(given[:count], noised)
    # what fills up the last call are copies of its last image, and they are thrown away
    assert torch.equal(given[count:], noised[-1:].expand(len(given) - count, *noised.shape[1:]))


# -- GetTimeStep -------------------------------------------------------------------------------------


def abars(name: str) -> np.ndarray:
    """abar of t = 1, ..., T, as the papers define it."""
    if name == "cosine":  # Nichol & Dhariwal 2021, Eq. 17, and their betas of at most 0.999
        f = np.cos((np.arange(4001) / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    else:  # Ho et al. 2020
        betas = np.linspace(1e-4, 0.02, 1000)
    return np.cumprod(1 - betas)


def nearest(name: str, s: float) -> int:
    """The t in 1, ..., T with (1 - abar) / abar nearest to s^2, where one step is worth the same: in log s."""
    abar = abars(name)
    return 1 + int(np.abs(np.log((1 - abar) / abar) / 2 - math.log(s)).argmin())


SCHEDULES = {"cosine": CosineSchedule(4000), "linear": LinearSchedule(1000)}


def times_of(denoiser: NetworkDenoiser, sigmas: np.ndarray) -> list[float]:
    """What its network is told for each sigma."""
    seen: list[Tensor] = []
    denoiser = copy.deepcopy(denoiser)
    denoiser.network.register_forward_pre_hook(lambda _, given: seen.append(given[1].clone()))
    with torch.no_grad():
        denoiser(torch.zeros(len(sigmas), 3, 4, 4), torch.from_numpy(sigmas))
    (times,) = seen
    return times.tolist()


@pytest.mark.parametrize("time", ["rescaled", "timestep"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_timestep_is_the_nearest_to_twice_sigma(name, time):
    """(1 - abar) / abar = (2 sigma)^2, for data in [-1, 1] is twice as wide as the images that sigma is of."""
    schedule = SCHEDULES[name]
    T = schedule.timesteps
    low, high = float(schedule.sigmas[1]), float(schedule.sigmas[-1])
    denoiser = NetworkDenoiser(tiny_network(), "epsilon", (low, high), schedule, time)
    between = np.exp(np.random.default_rng(0).uniform(math.log(low), math.log(high), 300))
    trained = schedule.sigmas[np.arange(1, T + 1, 37)]  # and at a timestep itself
    sigmas = np.concatenate([between, trained, SIGMAS])
    expected = np.array([nearest(name, 2 * sigma) for sigma in sigmas])
    assert expected[300 : 300 + len(trained)].tolist() == list(range(1, T + 1, 37))
    per_step = 1000 / T if time == "rescaled" else 1
    np.testing.assert_allclose(times_of(denoiser, sigmas), (expected - 1) * per_step, rtol=1e-6)
    # the paper omits the 2: below the very end of the schedule it would be another timestep, by far
    inside = (2 * low < sigmas) & (sigmas < 0.5)
    without = np.array([nearest(name, sigma) for sigma in sigmas])
    assert inside.sum() > 100
    assert (without[inside] < expected[inside]).all()
    assert np.median(expected[inside] / without[inside]) > 1.5


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_recipe_tells_the_network_that_timestep(name, sigma, fast, x, keys):
    schedule = SCHEDULES[name]
    purifier = recipes.denoise_once(NetworkDenoiser(Times(), "epsilon", RANGE, schedule), sigma, fast=fast)
    purifier(x, keys)
    expected = (nearest(name, 2 * sigma) - 1) * 1000 / schedule.timesteps
    for _, time in purifier.denoiser.network.seen:
        assert time.dtype == torch.float32
        torch.testing.assert_close(time, torch.full_like(time, expected), rtol=1e-6, atol=0)
        assert abs(float(time[0]) - (nearest(name, sigma) - 1) * 1000 / schedule.timesteps) > 1


@pytest.mark.parametrize(
    ("format", "schedule", "per_step"),
    [("improved", "cosine", 0.25), ("guided", "linear", 1), ("diffusers", "linear", 1)],
)
def test_a_converted_network_is_told_that_timestep(format, schedule, per_step):
    sigmas = np.array(SIGMAS)
    expected = [(nearest(schedule, 2 * sigma) - 1) * per_step for sigma in sigmas]
    np.testing.assert_allclose(times_of(converted(format), sigmas), expected, rtol=1e-6)


def test_a_converted_network_of_continuous_time_is_told_it_unrounded():
    """score_sde: abar(u) = exp(-(19.9 u^2 / 2 + 0.1 u)), labels 999 u."""
    sigmas = np.array(SIGMAS)
    u = np.array(times_of(converted("score_sde"), sigmas)) / 999
    abar = np.exp(-(19.9 * u**2 / 2 + 0.1 * u))
    np.testing.assert_allclose(np.sqrt((1 - abar) / abar), 2 * sigmas, rtol=1e-5)


# -- denoisers of every kind -------------------------------------------------------------------------


class Halving(nn.Module):
    """A network with a weight: x times it."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.factor


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        tiny_denoiser,
        lambda: converted("improved"),
        lambda: BlindDenoiser(Halving(), RANGE),
        lambda: BlindDenoiser(Halving(), RANGE, residual=True),
    ],
    ids=["own", "converted", "blind", "blind-residual"],
)
def test_any_denoiser_denoises_once(make, fast, x, keys):
    """What comes out is what the denoiser makes of x + sigma N."""
    purifier = recipes.denoise_once(make(), 0.1, fast=fast)
    out = purifier(x[:16], keys[:16])
    noised = x[:16] + 0.1 * noise.normal(keys[:16], x.shape[1:])
    denoiser = make().to(torch.bfloat16 if fast else torch.float32).eval()
    with torch.no_grad():
        expected = denoiser(noised, torch.full((16,), 0.1, dtype=torch.float64))
    assert out.dtype == torch.float32
    assert out.shape == x[:16].shape
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-2 if fast else 1e-5)
    assert not torch.allclose(out, noised, atol=5e-2)


def test_a_blind_denoiser_is_its_network():
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
    plain, residual = (BlindDenoiser(Halving(0.25), RANGE, residual=r).requires_grad_(False) for r in (False, True))
    assert torch.equal(plain(x, sigma), 0.25 * x)
    assert torch.equal(residual(x, sigma), x - 0.25 * x)
    assert plain.predict(x, sigma)[1] is None
    assert plain.config() == {
        "network": {"kind": "blind", "class": "Halving"},
        "sigma_range": [0.001, 10.0],
        "image_channels": 3,
        "residual": False,
    }
    # a network without a weight works in whatever the images are in
    without = BlindDenoiser(nn.Identity(), RANGE)
    assert torch.equal(recipes.denoise_once(without, 0.1, fast=True).denoiser(x, sigma), x)
    grey = BlindDenoiser(nn.Conv2d(1, 1, 3, padding=1), (0.1, 0.1), image_channels=1)
    assert recipes.denoise_once(grey, 0.1)(torch.zeros(2, 1, 8, 8), noise.image_keys(0, 0, [0, 1])).shape == (
        2,
        1,
        8,
        8,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_network", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_blind_denoiser_gives_the_type_of_its_images(dtype, of_network):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    denoiser = BlindDenoiser(network, RANGE).eval().to(of_network)
    assert denoiser(torch.zeros(2, 3, 8, 8, dtype=dtype), torch.full((2,), 0.1)).dtype == dtype


def test_a_blind_denoiser_in_steps(x, keys):
    """Diffuse takes it as any other; one step is denoising once, clipped."""
    denoiser = BlindDenoiser(Halving(), RANGE)
    once = DenoiseOnce(denoiser, 0.1)(x, keys)
    assert torch.equal(Diffuse(denoiser, sigma=0.1)(x, keys), once.clamp(0, 1))
    assert Diffuse(denoiser, sigma=0.1, steps=3)(x, keys).shape == x.shape


def test_a_cache_tells_the_readings_of_a_blind_network_apart():
    texts = [
        recipes.denoise_once(BlindDenoiser(Halving(factor), RANGE, residual=residual), 0.1).identity()
        for factor, residual in ((0.5, False), (0.5, True), (0.25, False))
    ]
    assert texts[0] != texts[1] != texts[2] != texts[0]
    again = recipes.denoise_once(BlindDenoiser(Halving(0.5), RANGE), 0.1)
    assert again.identity() == texts[0]
    assert recipes.from_json(again.to_json(), BlindDenoiser(Halving(0.5), RANGE)).to_json() == again.to_json()


def test_a_blind_denoiser_cannot_be_saved(tmp_path):
    with pytest.raises(InputError, match=r"NetworkDenoiser or EnergyNetwork.*Got BlindDenoiser"):
        pretrained.save(BlindDenoiser(Halving(), RANGE), tmp_path / "m")
    assert not (tmp_path / "m").exists()


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, -0.1, 0.0009, 0.31, 25.0])
@pytest.mark.parametrize("make", [tiny_denoiser, lambda: BlindDenoiser(Halving(), (0.001, 0.3))], ids=["own", "blind"])
def test_a_sigma_that_the_denoiser_does_not_know(make, sigma):
    with pytest.raises(InputError, match=r"trained for sigma from 0\.001 to 0\.3 .*Got -?[\d.]+ \("):
        recipes.denoise_once(make(), sigma)


@pytest.mark.parametrize("sigma", [math.nan, math.inf, True, None, "0.1", torch.tensor(0.1)])
def test_a_sigma_that_is_no_number(sigma):
    with pytest.raises(ConfigError, match=r"sigma must be a finite number\. Got"):
        recipes.denoise_once(tiny_denoiser(), sigma)


def test_the_ends_of_the_range_are_in_it(x, keys):
    for sigma in (0.001, 0.3):
        out = recipes.denoise_once(BlindDenoiser(Same(), (0.001, 0.3)), sigma)(x, keys)
        assert torch.equal(out, x + sigma * noise.normal(keys, x.shape[1:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": lambda x: x}, r"torch\.nn\.Module.*Got function: put it"),
        ({"sigma_range": (0.0, 0.1)}, r"sigma_range must be 0 < low <= high.*Got"),
        ({"sigma_range": (0.2, 0.1)}, r"sigma_range must be.*Got"),
        ({"sigma_range": (0.1, math.inf)}, r"sigma_range must be.*Got"),
        ({"sigma_range": (math.nan, 0.1)}, r"sigma_range must be.*Got"),
        ({"image_channels": 0}, r"image_channels must be a positive integer\. Got 0"),
        ({"image_channels": 3.0}, r"image_channels must be a positive integer\. Got 3\.0"),
        ({"residual": 1}, r"residual must be True or False\. Got 1"),
    ],
)
def test_blind_denoisers_that_are_none(options, message):
    with pytest.raises(ConfigError, match=message):
        BlindDenoiser(**{"network": nn.Identity(), "sigma_range": RANGE, **options})


def test_images_that_a_blind_denoiser_does_not_take():
    denoiser = BlindDenoiser(Halving(), (0.001, 0.3))
    one = torch.tensor([0.1, 0.1])
    for shape in ((2, 1, 8, 8), (2, 4, 8, 8), (3, 8, 8), (2, 8, 8, 3)):
        with pytest.raises(InputError, match=r"\(B, 3, H, W\)\. Got"):
            denoiser(torch.zeros(shape), one)
    for sigma in (torch.tensor(0.1), torch.full((1,), 0.1), torch.full((2, 1), 0.1)):
        with pytest.raises(InputError, match="one an image"):
            denoiser(torch.zeros(2, 3, 8, 8), sigma)
    with pytest.raises(InputError, match=r"0\.001 to 0\.3 .*Got"):
        denoiser(torch.zeros(2, 3, 8, 8), torch.tensor([0.1, 0.4]))
    shrinks = BlindDenoiser(nn.Conv2d(3, 3, 3), RANGE)
    with pytest.raises(InputError, match=r"keep the shape.*\(2, 3, 8, 8\)\. Got \(2, 3, 6, 6\): pad"):
        shrinks(torch.zeros(2, 3, 8, 8), one)
