"""The algebra: the same pixels whatever surrounds an image, and configurations that build back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from purifyloader import pretrained, recipes
from purifyloader.core import noise
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.schedule import ContinuousVP, CosineSchedule, LinearSchedule
from purifyloader.errors import CheckpointError, ConfigError, PurifyError
from purifyloader.purifiers import (
    Chain,
    Compensation,
    DenoiseOnce,
    Diffuse,
    EnergyAbove,
    Jpeg,
    Langevin,
    Purifier,
    Repeat,
    Tiles,
    Where,
    from_config,
    from_json,
)
from tests import processes
from tests.conftest import random_images, slim_denoiser, tiny_denoiser, tiny_energy, tiny_network

COUNT = 20


@pytest.fixture(scope="module")
def x() -> Tensor:
    return random_images(COUNT).float() / 255


@pytest.fixture(scope="module")
def seeds() -> Tensor:
    return noise.image_keys(0, 0, range(COUNT))


# -- the same pixels ---------------------------------------------------------------------------------


def test_the_published_size_of_network_too(seeds):
    """Attention and four levels, as in ECLIPSE's network but narrow."""
    from purifyloader.diffusion.unet import UNet, UNetConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(UNetConfig(channels=8, norm_groups=4, heads=2, blocks=1))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    schedule = CosineSchedule(4000)
    denoiser = NetworkDenoiser(network, "epsilon", (float(schedule.sigmas[1]), float(schedule.sigmas[-1])), schedule)
    x = random_images(18, 16).float() / 255
    for dtype, steps in (("float32", 2), ("bfloat16", 1)):
        purifier = Diffuse(denoiser, t=100, steps=steps, compute_batch=4, dtype=dtype)
        whole = purifier(x, seeds[:18])
        for size in (1, 7):
            assert torch.equal(purifier(x[:size], seeds[:size]), whole[:size])


def test_seeds_decide_the_noise(x, seeds):
    purifier = DenoiseOnce(slim_denoiser(), 0.1)
    a = purifier(x[:1].expand(3, -1, -1, -1), seeds[:3])
    assert not torch.equal(a[0], a[1])
    assert torch.equal(purifier(x[:1], seeds[1:2])[0], a[1])


FAST_SETTINGS = [
    'torch.set_float32_matmul_precision("medium")',
    'torch.backends.fp32_precision = "tf32"',
    'torch.backends.cuda.matmul.fp32_precision = "tf32"',
    'torch.backends.cudnn.fp32_precision = "tf32"',
    'torch.backends.mkldnn.matmul.fp32_precision = "bf16"',
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.benchmark = True",
]


def fast_process(setting: str) -> tuple[list[Tensor], bool]:
    """Pixels after `setting` and under autocast, and whether all settings are as they were before."""

    def state() -> list:
        b = torch.backends
        parts = (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv)
        return [part.fp32_precision for part in parts] + [b.cudnn.benchmark, b.cudnn.deterministic]

    exec(setting)
    before = state()
    with torch.autocast("cpu", torch.bfloat16):
        out = pixels_of_both()
    return out, state() == before


def pixels_of_both() -> list[Tensor]:
    made = [DenoiseOnce(slim_denoiser(), 0.1, dtype=dtype, compute_batch=16) for dtype in ("float32", "bfloat16")]
    return [purifier(random_images(4, 8).float() / 255, noise.image_keys(0, 0, range(4))) for purifier in made]


@pytest.fixture(scope="module")
def slow_pixels() -> list[Tensor]:
    return pixels_of_both()


@pytest.mark.parametrize("setting", FAST_SETTINGS)
def test_what_the_training_script_switched_on_does_not_matter(setting, slow_pixels):
    """In a process of its own: torch does not let every one of these be taken back."""
    done = processes.run(fast_process, setting, warnings="error")
    assert done.returncode == 0, done.stderr
    got, kept = done.value
    assert kept
    for out, want in zip(got, slow_pixels, strict=True):
        assert torch.equal(out, want)
        assert out.dtype == torch.float32


# -- composition -------------------------------------------------------------------------------------


def test_stages_and_repetitions_share_no_noise(x, seeds):
    once = DenoiseOnce(slim_denoiser(), 0.1)
    chained = Chain(once, once)(x[:4], seeds[:4])
    assert torch.equal(chained, Repeat(once, 2)(x[:4], seeds[:4]))
    with torch.no_grad():
        step = once.run(once.run(x[:4], noise.fold_in(seeds[:4], 0)), noise.fold_in(seeds[:4], 1))
        same = once.run(once.run(x[:4], seeds[:4]), seeds[:4])
    assert torch.equal(chained, step)
    assert not torch.equal(chained, same)


def test_values_between_stages_are_not_clamped():
    class Shift(Purifier):
        kind = "shift"

        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
            return x_BCHW + self.by

    x = torch.full((1, 3, 4, 4), 0.9)
    got = Chain(Shift(0.5), Shift(-0.5))(x, torch.zeros(1, dtype=torch.int64))
    assert torch.allclose(got, x)


def test_one_step_of_diffusion_is_denoise_once_clipped(x, seeds):
    denoiser = slim_denoiser()
    once = DenoiseOnce(denoiser, 0.1)(x, seeds)
    assert torch.equal(Diffuse(denoiser, sigma=0.1, steps=1)(x, seeds), once.clamp(0, 1))


# -- frozen ------------------------------------------------------------------------------------------


def test_a_purifier_is_frozen_and_leaves_the_denoiser_alone(x, seeds):
    denoiser = slim_denoiser().requires_grad_(True).train()
    before = copy.deepcopy(denoiser.state_dict())
    purifier = DenoiseOnce(denoiser, 0.1, dtype="bfloat16")
    holder = nn.Sequential(purifier).train()
    assert not any(m.training for m in holder[0].modules())
    assert not any(p.requires_grad for p in purifier.parameters())
    out = purifier(x[:2].requires_grad_(True), seeds[:2])
    assert not out.requires_grad
    assert denoiser.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in denoiser.parameters())
    assert all(torch.equal(v, before[k]) for k, v in denoiser.state_dict().items())
    x.requires_grad_(False)


# -- configuration -----------------------------------------------------------------------------------


def test_a_resolver_of_denoisers_alone_needs_no_second_argument():
    """As plugins and scripts have it from the time when there was one kind of model."""
    purifier = Chain(DenoiseOnce(tiny_denoiser(), 0.1), Jpeg())
    assert from_config(purifier.config(), lambda entry: tiny_denoiser()).to_json() == purifier.to_json()
    asked = []

    def resolve(entry, kind="denoiser"):
        asked.append((kind, entry["name"]))
        return {"denoiser": tiny_denoiser, "energy": tiny_energy}[kind]()

    once = DenoiseOnce(tiny_denoiser(), 0.1, compute_batch=16, dtype="bfloat16")
    mixed = Repeat(Chain(Langevin(tiny_energy(), 1, compute_batch=16), once), 2)
    assert from_json(mixed.to_json(), resolve).to_json() == mixed.to_json()
    assert asked == [("energy", None), ("denoiser", None)]


def test_identity_ignores_names_and_not_weights():
    a, b, c = tiny_denoiser(), tiny_denoiser(), tiny_denoiser(seed=1)
    b.name = "renamed"
    first, second, third = (Chain(DenoiseOnce(d, 0.1)).identity() for d in (a, b, c))
    assert first == second
    assert first != third


def test_json_of_other_weights_is_refused(tmp_path):
    text = DenoiseOnce(tiny_denoiser(), 0.1).to_json()
    with pytest.raises(CheckpointError, match=r"must have weights .* Got"):
        recipes.from_json(text, tiny_denoiser(seed=1))
    with pytest.raises(CheckpointError, match="model="):
        recipes.from_json(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not JSON"),
        (None, "JSON text. Got NoneType"),
        ({"schema": 1}, "JSON text. Got dict"),
        ('{"schema": 1, "purifier": {"kind": ["jpeg"]}}', r"kind must be one of .*Got \['jpeg'\]"),
        ("[]", "schema and purifier"),
        ('{"schema": 3, "purifier": {}}', "reads purifier schemas 1 to 2. Got 3"),
        ('{"schema": 0, "purifier": {}}', "reads purifier schemas 1 to 2. Got 0"),
        ('{"schema": true, "purifier": {}}', "reads purifier schemas 1 to 2. Got True"),
        ('{"schema": "2", "purifier": {}}', "reads purifier schemas 1 to 2. Got '2'"),
        ('{"schema": 1, "purifier": {"kind": "os.system"}}', "must be one of"),
        ('{"schema": 1, "purifier": ["jpeg"]}', "Got list"),
        ('{"schema": 1, "purifier": {"kind": "jpeg", "level": 3}}', "does not fit"),
        ('{"schema": 1, "purifier": {"kind": "diffuse", "t": 1}}', "does not fit"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ConfigError, match=message):
        from_json(text, lambda entry: tiny_denoiser())


# -- recipes -----------------------------------------------------------------------------------------


def test_eclipse_is_the_published_setting_by_default(discrete_denoiser):
    purifier = recipes.eclipse(discrete_denoiser)
    schedule = CosineSchedule(4000)
    assert isinstance(purifier, Diffuse)
    assert purifier.steps == 100
    assert purifier.sigmas == (*[float(schedule.sigma(t)) for t in range(100, 0, -1)], 0.0)
    assert round(255 * purifier.sigmas[0], 2) == 6.37


def test_eclipse_by_sigma_is_one_call_of_exactly_that_noise():
    purifier = recipes.eclipse(tiny_denoiser(), sigma=25 / 255)
    assert isinstance(purifier, Diffuse)
    assert purifier.sigmas == (25 / 255, 0.0)


def test_eclipse_options(x, seeds):
    denoiser = tiny_denoiser()
    fast = recipes.eclipse(denoiser, sigma=0.1, fast=True)
    assert json.loads(fast.to_json())["purifier"]["dtype"] == "bfloat16"
    once = recipes.eclipse(denoiser, sigma=0.1, compensate_once=True)
    assert [s["kind"] for s in json.loads(once.to_json())["purifier"]["stages"]] == ["diffuse", "compensation"]
    continuous = recipes.eclipse(denoiser, t=100, steps=5, schedule=ContinuousVP())
    assert round(255 * continuous.sigmas[0], 1) == 11.9
    linear = recipes.eclipse(denoiser, t=75, steps=5, schedule=LinearSchedule())
    assert round(255 * linear.sigmas[0], 1) == 32.5


def test_a_model_by_folder(tmp_path, x, seeds):
    pretrained.save(tiny_denoiser(), tmp_path / "model")
    purifier = recipes.denoise_once(tmp_path / "model", 0.1)
    assert torch.equal(purifier(x[:2], seeds[:2]), DenoiseOnce(tiny_denoiser(), 0.1)(x[:2], seeds[:2]))


# -- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: Diffuse(d), "one of them"),
        (lambda d: Diffuse(d, t=100, sigma=0.1), "one of them"),
        (lambda d: Diffuse(d, t=100, steps=101), "from 1 to t=100"),
        (lambda d: Diffuse(d, t=100, steps=0), "steps"),
        (lambda d: Diffuse(d, t=100.5), "fractional"),
        (lambda d: Diffuse(d, t=float("nan")), "finite number"),
        (lambda d: Diffuse(d, sigma="25"), r"finite number\. Got '25'"),
        (lambda d: Diffuse(d, t=10**9), r"t must lie in \[0, 4000\]"),
        (lambda d: Diffuse(d, t=9000, steps=3), r"t must lie in \[0, 4000\]"),
        (lambda d: Diffuse(d, sigma=0.5), "trained for sigma from 0.001 to 0.3"),
        (lambda d: Diffuse(d, t=100, sampler="heun"), "ancestral"),
        (lambda d: Diffuse(d, t=100, dtype="float16"), "dtype"),
        (lambda d: DenoiseOnce(d, 0.0005), "trained for sigma"),
        (lambda d: DenoiseOnce(d, 0.1, compute_batch=0), "compute_batch"),
        (lambda d: DenoiseOnce(nn.Identity(), 0.1), "takes a denoiser"),
        (lambda d: Jpeg(0), "1 to 100"),
        (lambda d: Compensation(p=1.5), "probability"),
        (lambda d: Chain(), "one or more"),
        (lambda d: Chain(DenoiseOnce(d, 0.1), DenoiseOnce(tiny_denoiser(1), 0.1)), "same channels"),
        (lambda d: Repeat(Jpeg(), 0), "positive number"),
        (lambda d: recipes.eclipse("no-such-model"), "no-such-model"),
    ],
)
def test_bad_configurations(make, message):
    with pytest.raises(PurifyError, match=message):
        make(tiny_denoiser())


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(PurifyError) as caught:
        recipes.eclipse("cifar11")
    for name in pretrained.available():
        assert name in str(caught.value)


def test_calls_are_those_of_the_network():
    counted = []

    class Watched(NetworkDenoiser):
        def predict(self, x_BCHW, sigma_B):
            counted.append(len(x_BCHW))
            return super().predict(x_BCHW, sigma_B)

    watched = Watched(tiny_network(width=4, multipliers=(1,)), "edm", (0.001, 0.3))
    once = DenoiseOnce(watched, 0.1)
    three = Diffuse(watched, sigma=0.1, steps=3)
    x, seeds = random_images(2, 8).float() / 255, noise.image_keys(0, 0, range(2))
    for purifier, calls in ((once, 1), (three, 3), (Chain(three, Jpeg(), once), 4), (Repeat(Chain(once, three), 2), 8)):
        counted.clear()
        purifier(x, seeds)
        assert purifier.calls == len(counted) == calls
    assert Tiles(three, 8).calls == 3
    assert Jpeg().calls == 0
    assert Langevin(tiny_energy(), 7).calls == 7
    assert Where(EnergyAbove(tiny_energy(), 0.0), three).calls == 4


def test_grey_networks(seeds):
    purifier = DenoiseOnce(NetworkDenoiser(tiny_network(1), "edm", (0.001, 0.3)), 0.1)
    x = random_images(2, 8, channels=1).float() / 255
    assert purifier(x, seeds[:2]).shape == (2, 1, 8, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(dtype, x, seeds):
    purifier = Diffuse(tiny_denoiser(), sigma=0.1, steps=2, dtype=dtype, compute_batch=16)
    on_cpu = purifier(x, seeds)
    purifier.cuda()
    whole = purifier(x.cuda(), seeds)
    for size in range(1, COUNT + 1):
        assert torch.equal(purifier(x[:size].cuda(), seeds[:size]), whole[:size])
    torch.cuda.set_sync_debug_mode("error")  # nothing waits for the GPU
    try:
        purifier.run(whole, seeds.cuda(non_blocking=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (whole.cpu() - on_cpu).abs().max() < (1e-4 if dtype == "float32" else 0.05)
