"""What decides the weights: the configuration, its recipes, and the choice of images."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader.commands.main import parse
from purifyloader.commands.train_denoiser import _fields_of_card, configuration
from purifyloader.commands.training import fields_of
from purifyloader.datasets.named import open_dataset
from purifyloader.datasets.select import choose, hold_out, load_images, read_indices
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.errors import ConfigError, InputError, PurifyError
from purifyloader.train import RECIPES, TrainConfig, recipe
from purifyloader.train.denoiser.task import build_denoiser
from purifyloader.train.energy import EnergyTrainConfig
from tests.conftest import random_images

SIGMA = TrainConfig(
    objective="sigma", time="log-sigma", parameterization="edm", network=UNetConfig.small(), augment=("flip", "crop")
)
SIZES = (28, 32, 48, 64, 100, 128, 224)


# -- the configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        SIGMA,
        dataclasses.replace(SIGMA, start_from={"name": "other", "weights_sha256": "ab" * 32}, patch_size=16),
        *(recipe(name, size) for name in RECIPES for size in (32, 64, 128)),
    ],
)
def test_a_configuration_survives_json(config):
    values = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    again = TrainConfig.from_dict(values)
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert values.keys() == {f.name for f in dataclasses.fields(TrainConfig)}


def test_some_fields_over_a_base():
    got = TrainConfig.from_dict({"steps": 7, "network": {"channels": 64}}, SIGMA)
    assert got == dataclasses.replace(SIGMA, steps=7, network=dataclasses.replace(SIGMA.network, channels=64))
    assert TrainConfig.from_dict({}, SIGMA) == SIGMA
    assert TrainConfig.from_dict({}) == TrainConfig()


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
    with pytest.raises(ConfigError, match=r"max_timestep must lie in 2\.\.1000 \(timesteps\)\. Got 2000"):
        TrainConfig(timesteps=1000, max_timestep=2000)
    with pytest.raises(ConfigError, match=r"more than 20 timesteps\. Got 10"):
        build_denoiser(TrainConfig(schedule="linear", timesteps=10, network=UNetConfig.small()))


STRANGE = [None, True, 3, -1, 0, 2.5, 1e400, "x", [], [1], ["x"], [[1]], {}, {"x": 1}, {"multipliers": 3}, 10**30]


def configured(tmp_path: Path, fields: Any, *arguments: str) -> TrainConfig:
    """What the command makes of a file and options."""
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    given = ["--data", "x", "--out", "y", "--config", str(tmp_path / "fields.json"), *arguments]
    return configuration(parse(["train", "denoiser", *given])[2], (3, 32, 32), torch.device("cpu"))[0]


@pytest.mark.parametrize("arguments", [[], ["--steps", "5"], ["--preset", "eclipse"]], ids=str)
@pytest.mark.parametrize("name", [*(field.name for field in dataclasses.fields(TrainConfig)), "flip", "nonsense"])
def test_any_file_is_taken_or_refused(name, arguments, tmp_path):
    for value in STRANGE:
        train = {name: value}
        for fields in (train, {"details": {"train": train}}, {"details": {"train": train}, "denoiser": {}}):
            with contextlib.suppress(ConfigError, InputError):
                configured(tmp_path, fields, *arguments)


def test_an_energy_models_configuration_is_refused_by_its_fields(tmp_path):
    train = EnergyTrainConfig(flip=True).to_dict()
    with pytest.raises(ConfigError, match=r"Known fields of a TrainConfig: .*Got bank, .*langevin_steps"):
        configured(tmp_path, {"details": {"train": train}, "energy": {}})


# -- recipes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_recipe_builds_for_every_size(name, size, channels):
    config = recipe(name, size, channels)
    assert config == recipe(name, {28: 32, 48: 64, 100: 128, 224: 128}.get(size, size), channels)
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
    assert out.shape == (2, denoiser.network.config.out_channels, padded, padded)


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
    with pytest.raises(ConfigError, match=r"one of eclipse, light.*Got 'avatar'"):
        recipe("avatar")


# -- which images ------------------------------------------------------------------------------------


def test_the_choice_is_a_function_of_the_seed():
    assert choose(100, 10, 1) == choose(100, 10, 1) != choose(100, 10, 2)
    assert set(choose(100, 10, 1)) < set(choose(100, 20, 1))
    assert choose(50000, 3, 2026) == sorted(choose(50000, 3, 2026))
    assert choose(7, 7, 0) == list(range(7))
    for count in (0, -1, 101):
        with pytest.raises(InputError, match=f"Got {count}"):
            choose(100, count, 0)


def test_the_choice_is_even():
    counts = np.bincount([i for seed in range(300) for i in choose(10, 3, seed)], minlength=10)
    assert abs(counts - 90).max() < 45


def test_what_is_held_out_is_not_trained_on():
    chosen = choose(1000, 300, 4)
    trained, held_out = hold_out(1000, chosen, 4)
    assert trained == chosen
    assert len(held_out) == 200
    assert not set(trained) & set(held_out)
    assert held_out == sorted(set(held_out))
    assert hold_out(1000, chosen, 4) == (trained, held_out)
    assert hold_out(1000, list(reversed(chosen)), 4) == (trained, held_out)
    assert hold_out(1000, chosen, 5)[1] != held_out
    # fewer are some of them, and all there are where more are asked for
    assert set(hold_out(1000, chosen, 4, 50)[1]) < set(held_out)
    assert hold_out(1000, chosen, 4, 5000)[1] == sorted(set(range(1000)) - set(chosen))


def test_where_all_were_chosen_a_twentieth_is_taken_back():
    chosen = list(range(100))
    trained, held_out = hold_out(100, chosen, 0)
    assert len(held_out) == 5
    assert sorted(trained + held_out) == chosen
    assert hold_out(100, chosen, 0, 3)[1] != held_out
    assert len(hold_out(100, chosen, 0, 3)[1]) == 3
    assert hold_out(100, chosen, 0, 50) == (trained, held_out)  # no more than a twentieth
    assert [len(part) for part in hold_out(19, list(range(19)), 0)] == [18, 1]  # one at least
    assert hold_out(1, [0], 0) == ([0], [])
    # that is a choice too, and training again from it takes the same
    assert hold_out(100, trained, 0) == (trained, held_out)


@pytest.mark.parametrize("count", [0, -1])
def test_nothing_held_out_leaves_all_to_train_on(count):
    """Never a handful to train on because a number was strange."""
    try:
        trained, held_out = hold_out(100, list(range(100)), 0, count)
    except PurifyError as error:
        assert "Got" in str(error)  # noqa: PT017
        assert count < 0
    else:
        assert (trained, held_out) == (list(range(100)), [])


def test_indices_from_a_list_and_from_a_checkpoint(tmp_path):
    file = tmp_path / "indices.json"
    file.write_text("[4, 0, 2]")
    assert sorted(read_indices(file)) == [0, 2, 4]
    assert read_indices(str(file)) == read_indices(file)
    (tmp_path / "config.json").write_text(json.dumps({"format": "x", "details": {"indices": [1, 5]}}))
    assert read_indices(tmp_path / "config.json") == [1, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2, 1, 1]", "each index once.*Got 1 more than once"),
        ("[]", "one or more indices"),
        ("[-1]", "from 0"),
        ("[1.5]", "Got"),
        ("[true]", "Got"),
        ('["1"]', "Got"),
        ("{}", "Got"),
        ('{"details": {}}', "Got"),
        ("no json", "Got"),
        ("\\ud800", "Got"),
    ],
)
def test_bad_indices(text, message, tmp_path):
    file = tmp_path / "indices.json"
    file.write_text(text)
    with pytest.raises(InputError, match=f"(?s)indices.json must .*{message}"):
        read_indices(file)
    with pytest.raises(InputError, match=r"none\.json must be a JSON list"):
        read_indices(tmp_path / "none.json")


# -- reading them ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, image in enumerate(random_images(12, 16)):
        path = tmp_path / "images" / str(i % 2) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return tmp_path / "images"


def test_a_folder_of_images(folder):
    dataset = open_dataset(str(folder))
    images = load_images(dataset, [0, 1, 11])
    assert torch.equal(images[0], random_images(12, 16)[0])
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.uint8
    for bad in (12, -1):
        with pytest.raises(InputError, match=rf"12 images\. Got the index {bad}"):
            load_images(dataset, [0, bad])


def test_a_damaged_file_is_named(folder):
    (folder / "0" / "000.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"000\.png is no readable image"):
        load_images(open_dataset(str(folder)), [0])


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def test_images_of_other_sizes_need_a_size():
    mixed: Any = [picture(16, 16), picture(20, 16), picture(33, 47)]
    with pytest.raises(InputError, match=r"(?s)one size\. Got .*at index 1 after.*--size"):
        load_images(mixed, range(3))
    images = load_images(mixed, range(3), size=16)
    assert images.shape == (3, 3, 16, 16)
    np.testing.assert_array_equal(images[0], np.asarray(mixed[0]).transpose(2, 0, 1))
    # shorter side to 16, the middle of the longer one: near PIL's own antialiased bilinear filter
    want = np.asarray(mixed[2].resize((22, 16), Image.Resampling.BILINEAR))[:, 3:19].transpose(2, 0, 1)
    assert np.abs(images[2].numpy().astype(int) - want).mean() < 2
    with pytest.raises(ConfigError, match="Got 0"):
        load_images(mixed, range(3), size=0)


def test_grey_images_among_rgb_ones():
    mixed: Any = [picture(16, 16), picture(16, 16, "L"), picture(16, 16)]
    images = load_images(mixed, range(3), channels=3)
    assert images.shape == (3, 3, 16, 16)
    assert torch.equal(images[1, 0], images[1, 1])
    assert torch.equal(images[1, 0], torch.from_numpy(np.array(mixed[1])))
    grey: Any = [picture(16, 16, "L")] * 2
    assert load_images(grey, range(2)).shape == (2, 1, 16, 16)
    with pytest.raises(InputError, match=r"Expected images with 1 channels\. Got 3"):
        load_images(mixed, [0], channels=1)


def make_dataset() -> list[tuple[torch.Tensor, int]]:
    return [(image, 0) for image in random_images(7, 16)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagenet", "package.module:function. Got 'imagenet'"),
        ("no_such_module:f", "No module named"),
        ("tests.train.test_config:nothing", "no attribute"),
        ("os:getpid", "map-style"),
        ("cifar10", "download=True"),
    ],
)
def test_bad_sources(spec, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_dataset(spec, root=tmp_path)


def test_a_function_names_a_dataset():
    assert load_images(open_dataset("tests.train.test_config:make_dataset"), range(7)).shape == (7, 3, 16, 16)


def test_tars_are_a_source(tmp_path):
    with tarfile.open(tmp_path / "train-0000.tar", "w") as tar:
        for i, image in enumerate(random_images(3, 16)):
            data = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, format="png")
            member = tarfile.TarInfo(f"{i:04}.png")
            member.size = data.tell()
            data.seek(0)
            tar.addfile(member, data)
    images = load_images(open_dataset(str(tmp_path / "train-0000.tar")), range(3))
    assert torch.equal(images, random_images(3, 16))


def test_a_card_from_before_the_recipes_says_a_configuration_too():
    path = Path(__file__).parents[2] / "pretrained" / "cifar10-sparse" / "config.json"
    for name in RECIPES:  # whatever it stands over
        config = TrainConfig.from_dict(fields_of(path, _fields_of_card), recipe(name))
        assert (config.objective, config.parameterization, config.time) == ("sigma", "edm", "log-sigma")
        assert (config.augment, config.network, config.steps) == (("flip",), UNetConfig.small(), 10_000)
