"""The configuration of a denoiser's training, and its recipes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from purifyloader.diffusion.plain import PlainUNetConfig
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.errors import ConfigError
from purifyloader.train import RECIPES, TrainConfig, recipe
from purifyloader.train.denoiser.task import build_denoiser

SIGMA = TrainConfig(
    objective="sigma", time="log-sigma", parameterization="edm", network=UNetConfig.small(), augment=("flip", "crop")
)


SIZES = (28, 32, 48, 64, 100, 128, 224)


# -- the configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        SIGMA,
        dataclasses.replace(SIGMA, start_from={"name": "other", "weights_sha256": "ab" * 32}, patch_size=16),
        *(recipe(name, size) for name in RECIPES for size in (32, 64, 128)),
        dataclasses.replace(SIGMA, network=PlainUNetConfig((8, 4), (0, 3), 1)),
        dataclasses.replace(SIGMA, distil_from={"name": None, "weights_sha256": "ab" * 32}),
    ],
)
def test_a_configuration_survives_json(config):
    values = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    again = TrainConfig.from_dict(values)
    assert again == config
    assert again.to_dict() == config.to_dict()
    later = set() if config.distil_from else {"distil_from"}
    assert values.keys() == {f.name for f in dataclasses.fields(TrainConfig)} - later


def test_some_fields_over_a_base():
    got = TrainConfig.from_dict({"steps": 7, "network": {"channels": 64}}, SIGMA)
    assert got == dataclasses.replace(SIGMA, steps=7, network=dataclasses.replace(SIGMA.network, channels=64))
    assert TrainConfig.from_dict({}, SIGMA) == SIGMA
    assert TrainConfig.from_dict({}) == TrainConfig()
    # a network of another kind takes nothing over
    plain = TrainConfig.from_dict({"network": {"kind": "plain-unet", "blocks": [1, 1]}}, SIGMA)
    assert plain == dataclasses.replace(SIGMA, network=PlainUNetConfig(blocks=(1, 1)))
    wider = TrainConfig.from_dict({"network": {"widths": [8, 8]}}, plain)
    assert wider.network == PlainUNetConfig((8, 8), (1, 1))
    unet = {"kind": "unet", "channels": 64, "learned_variance": False}
    assert TrainConfig.from_dict({"network": unet}, plain).network == UNetConfig(channels=64, learned_variance=False)
    assert TrainConfig.from_dict({"network": {"kind": "unet"}}, SIGMA) == SIGMA


def test_unknown_fields_are_named():
    for values, named in (
        ({"preset": "light", "flip": True, "steps": 3}, "flip, preset"),
        ({"network": {"depth": 3}}, "depth"),
    ):
        with pytest.raises(ConfigError) as caught:
            TrainConfig.from_dict(values)
        for part in (named, "Got", "nown fields"):
            assert part in str(caught.value)


BAD_VALUES = [
    ("objective", "gan"),
    ("parameterization", "score"),
    ("time", "hours"),
    ("schedule", "sigmoid"),
    ("decay", "exponential"),
    ("dtype", "float16"),
    ("compile", "yes"),
    ("compile", None),
    ("steps", 0),
    ("steps", -5),
    ("batch_size", 0),
    ("timesteps", 1),
    ("replicate", -1),
    ("warmup", -1),
    ("decay_steps", -1),
    ("max_timestep", 1),
    ("max_timestep", 4001),
    ("learning_rate", 0.0),
    ("learning_rate", -1e-4),
    ("learning_rate", float("nan")),
    ("clip_norm", 0.0),
    ("weight_decay", -0.1),
    ("gamma", -1.0),
    ("ema_decay", 1.0),
    ("ema_decay", -0.1),
    ("ema_decay", float("nan")),
    ("patch_size", 7),
    ("patch_size", 0),
    ("augment", ("flip", "blur")),
    ("sigma_center", 0.0),
    ("sigma_spread", -1.0),
]


NOT_FINITE = [(name, float("inf")) for name in ("learning_rate", "clip_norm", "weight_decay", "gamma")]


BAD_RANGES = [("sigma_range", value) for value in ((0.3, 0.001), (0.0, 0.3), (0.1, 0.1), (0.1, float("inf")))]


OTHER_TYPES = [
    *((name, "x") for name in ("steps", "batch_size", "timesteps", "replicate", "warmup", "decay_steps", "seed")),
    *((name, 2.5) for name in ("steps", "batch_size", "timesteps", "max_timestep", "patch_size", "seed")),
    *((name, True) for name in ("steps", "batch_size", "timesteps", "replicate", "warmup", "decay_steps", "seed")),
    *((name, True) for name in ("max_timestep", "patch_size", "learning_rate", "clip_norm", "gamma", "sigma_center")),
    *(("compile", value) for value in (0, 1, 1.0)),
    *((name, "x") for name in ("learning_rate", "clip_norm", "weight_decay", "gamma", "ema_decay", "sigma_center")),
    *((name, None) for name in ("learning_rate", "steps", "augment", "network", "sigma_range", "seed")),
    ("max_timestep", "x"),
    ("patch_size", "x"),
    ("augment", "flip"),
    ("augment", 3),
    ("augment", [3, "flip"]),
    ("augment", [["flip"]]),
    ("network", "big"),
    ("network", 3),
    ("sigma_range", 0.3),
    ("sigma_range", [0.001]),
    ("sigma_range", [0.001, 0.1, 0.3]),
    ("sigma_range", ["a", "b"]),
    ("sigma_range", [0.001, True]),
    ("start_from", "cifar10-sparse"),
    ("start_from", {"name": "cifar10-sparse"}),
    ("start_from", ["cifar10-sparse", "ab"]),
    ("objective", ["sigma"]),
    ("objective", None),
]


@pytest.mark.parametrize(
    ("name", "value"), [*BAD_VALUES, *NOT_FINITE, *BAD_RANGES, *OTHER_TYPES], ids=lambda value: str(value)
)
def test_a_bad_value_is_refused_by_its_name(name, value):
    for base in (TrainConfig(), SIGMA):
        with pytest.raises(ConfigError, match=f"(?s){name}.*Got"):
            TrainConfig.from_dict({name: value}, base)


@pytest.mark.parametrize(
    "values",
    [
        {"channels": "x"},
        {"multipliers": 3},
        {"multipliers": []},
        {"multipliers": ["x"]},
        {"attention_levels": [9]},
        {"attention_levels": 1},
        {"dropout": "x"},
        {"dropout": 1.5},
        {"norm_groups": 7},
        {"blocks": 0},
        {"learned_variance": "x"},
    ],
    ids=str,
)
def test_a_bad_network_is_refused(values):
    with pytest.raises(ConfigError, match="Got"):
        TrainConfig.from_dict({"network": values})


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match=r"time must be 'log-sigma'\. Got 'timestep'"):
        TrainConfig(objective="sigma", network=UNetConfig.small())
    with pytest.raises(ConfigError, match="does not train a variance"):
        TrainConfig(objective="sigma", time="log-sigma")
    with pytest.raises(ConfigError, match=r"max_timestep must be an integer from 2 to 1000 .*Got 2000"):
        TrainConfig(timesteps=1000, max_timestep=2000)
    with pytest.raises(ConfigError, match=r"more than 20 timesteps\. Got 10"):
        build_denoiser(TrainConfig(schedule="linear", timesteps=10, network=UNetConfig.small()))


# -- recipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_size_has_the_recipe_of_the_nearest_one(name):
    for size in SIZES:
        for channels in (1, 3):
            nearest = {28: 32, 48: 64, 100: 128, 224: 128}.get(size, size)
            assert recipe(name, size, channels) == recipe(name, nearest, channels)


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (48, 3), (100, 3)])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name, size, channels):
    config = recipe(name, size, channels)
    with torch.device("meta"):
        denoiser = build_denoiser(config, channels)
        x = torch.zeros(2, channels, size, size)
    assert denoiser.image_channels == channels
    low, high = denoiser.sigma_range
    assert low < 2 / 255 < 32 / 255 < high
    # the network takes the size, padded where its levels do not divide it
    multiple = denoiser.network.config.size_multiple
    padded = -(-size // multiple) * multiple
    with torch.device("meta"):
        out = denoiser.network(x.new_zeros(2, channels, padded, padded), x.new_zeros(2))
    assert out.shape == (2, channels * (2 if denoiser.learned_variance else 1), padded, padded)


def test_eclipse_is_the_papers():
    """Sec. 4 and appendix: improved-diffusion's network and L_hybrid, cosine T = 4000, lr 1e-4, batch 128."""
    config = recipe("eclipse")
    assert (config.objective, config.parameterization, config.time) == ("hybrid", "epsilon", "timestep")
    assert (config.steps, config.batch_size, config.learning_rate, config.weight_decay) == (250_000, 128, 1e-4, 0.0)
    assert (config.ema_decay, config.replicate, config.gamma) == (0.9999, 4, 0.001)
    assert (config.max_timestep, config.augment, config.patch_size) == (None, (), None)
    assert config.noise_schedule() == CosineSchedule(4000)
    assert config.network == UNetConfig()
    assert config.network.learned_variance
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(config.network).parameters()) == 52_546_438
    # attention at 16 x 16 and 8 x 8 whatever the size
    for size in (32, 64, 128):
        levels = recipe("eclipse", size).network.attention_levels
        assert [size >> level for level in levels] == [16, 8]


def test_light_is_for_two_cpu_cores():
    config = recipe("light")
    assert (config.objective, config.parameterization, config.sigma_range) == ("sigma", "edm", (0.001, 0.3))
    assert config.network == UNetConfig.small()
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(config.network).parameters()) == 1_125_315
    assert config.patch_size is None
    assert recipe("light", 64).patch_size == 48
    assert recipe("light", 64).network == config.network


@pytest.mark.parametrize("size", [32, 64, 128])
def test_fast_has_a_tenth_of_the_arithmetic_of_light(size):
    fast, light = (operations(build_denoiser(recipe(name, size)).network, 32) for name in ("fast", "light"))
    assert fast < 0.05e9
    assert light > 10 * fast


def operations(network, size):
    """Count the multiplications and additions of the convolutions on one image."""
    counts = []

    def count(module, inputs, out):
        counts.append(2 * out.numel() * module.weight[0].numel())

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size), torch.zeros(1))
    return sum(counts)


def test_puregen_is_the_papers():
    """t <= 250 of the linear schedule with T = 1000."""
    config = recipe("puregen")
    assert config.noise_schedule() == LinearSchedule(1000)
    assert (config.objective, config.parameterization, config.time) == ("hybrid", "epsilon", "timestep")
    assert (config.max_timestep, config.top_timestep) == (250, 250)
    assert not config.network.learned_variance
    # 150 epochs of CIFAR-10
    assert config.steps * config.batch_size == pytest.approx(150 * 50_000, abs=config.batch_size)
    with torch.device("meta"):
        denoiser = build_denoiser(config)
    assert denoiser.sigma_range == pytest.approx([float(LinearSchedule(1000).sigma(t)) for t in (1, 250)])


def test_an_unknown_recipe_is_named():
    with pytest.raises(ConfigError, match=r"one of eclipse, fast, light.*Got 'avatar'"):
        recipe("avatar")
