"""Sparse training: to the same weights after a stop, and to a checkpoint with its card."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader import cli, noise, pretrained
from purifyloader.datasets import open_dataset
from purifyloader.diffusion.unet import UNetConfig
from purifyloader.errors import CheckpointError, ConfigError, InputError, TrainingError
from purifyloader.train import PRESETS, TrainConfig, train_denoiser
from purifyloader.train import denoiser as module
from purifyloader.train.data import choose, load_images
from purifyloader.train.denoiser import STATE_FILE, build_denoiser
from purifyloader.train.evaluate import jpeg_psnr, psnr
from tests.conftest import random_images, tiny_denoiser

TINY = UNetConfig.small(channels=8, multipliers=(1, 2), norm_groups=4)
CONFIG = TrainConfig(objective="sigma", network=TINY, steps=8, batch_size=4, learning_rate=1e-3, replicate=1)
HYBRID = dataclasses.replace(CONFIG, objective="hybrid", network=dataclasses.replace(TINY, learned_variance=True))


def smooth_images(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Blurred noise: images with something to learn."""
    coarse = random_images(count, size // 4, seed).float()
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").round().clamp(0, 255).to(torch.uint8)


def weights(denoiser) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in denoiser.state_dict().items()}


def same(a, b) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a) and set(a) == set(b)


@pytest.mark.parametrize("config", [CONFIG, HYBRID], ids=["sigma", "hybrid"])
def test_a_stopped_run_ends_with_the_same_weights(config, tmp_path, monkeypatch):
    images = random_images(10)
    whole, record = train_denoiser(images, tmp_path / "whole", config, progress=False)
    calls = 0
    original = module._loss

    def stop(*arguments):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(images, tmp_path / "part", config, progress=False, save_every=0)
    monkeypatch.undo()
    again, _ = train_denoiser(images, tmp_path / "part", config, progress=False)
    assert same(weights(whole), weights(again))
    assert record["steps"] == 8


def test_a_killed_process_goes_on(tmp_path: Path):
    script = (
        "import dataclasses, sys\n"
        "from tests.test_train import *\n"
        "torch.set_num_threads(1)\n"
        "config = dataclasses.replace(CONFIG, steps=400)\n"
        "train_denoiser(random_images(10), sys.argv[1], config, progress=False, save_every=0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "run"], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / STATE_FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    header, _ = module._load_state(
        tmp_path / "run" / STATE_FILE, module._identity(dataclasses.replace(CONFIG, steps=400), random_images(10))
    )
    assert 0 < header["step"] < 400
    short = dataclasses.replace(CONFIG, steps=header["step"] + 3)
    resumed, _ = train_denoiser(random_images(10), tmp_path / "run", short, progress=False)
    whole, _ = train_denoiser(random_images(10), tmp_path / "whole", short, progress=False)
    assert same(weights(resumed), weights(whole))


def test_training_lowers_the_error():
    images = smooth_images(64)
    config = dataclasses.replace(CONFIG, steps=150, batch_size=16, learning_rate=3e-3, ema_decay=0.9)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        denoiser, _ = train_denoiser(images, folder, config, progress=False)
    unseen = smooth_images(32, seed=1)
    untrained = build_denoiser(config).eval().requires_grad_(False)
    assert psnr(denoiser, unseen, 0.1) > psnr(untrained, unseen, 0.1) + 1.5


def test_epochs_show_every_image_equally_often():
    config = dataclasses.replace(CONFIG, batch_size=4, replicate=1)
    count = 10  # an epoch is 20 images: 5 batches
    seen = Counter(int(i) for step in range(5) for i in module._batch_indices(config, count, step))
    assert seen == dict.fromkeys(range(count), 2)
    epochs = [[module._batch_indices(config, count, s).tolist() for s in range(e, e + 5)] for e in (0, 5)]
    assert epochs[0] != epochs[1]


def test_noise_levels_follow_their_distribution():
    config = dataclasses.replace(CONFIG, sigma_range=(0.001, 0.3), sigma_center=0.06, sigma_spread=1.1)
    sigma = module._draw_sigma(config, noise.image_keys(0, 0, range(20000)))
    assert float(sigma.min()) >= 0.001
    assert float(sigma.max()) <= 0.3
    from scipy import stats

    ends = (np.log([0.001, 0.3]) - np.log(0.06)) / 1.1
    assert stats.kstest((sigma.log().numpy() - np.log(0.06)) / 1.1, stats.truncnorm(*ends).cdf).pvalue > 0.01


def test_the_learning_rate_rises_and_falls():
    config = dataclasses.replace(CONFIG, steps=100, warmup=10, decay_steps=20, learning_rate=1.0)
    rates = [module._learning_rate(config, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[79] == rates[80] == 1.0
    assert rates[99] == pytest.approx(1 / 20)


def test_presets_are_what_they_say():
    eclipse = PRESETS["eclipse"]
    assert (eclipse.objective, eclipse.steps, eclipse.batch_size) == ("hybrid", 250_000, 128)
    assert (eclipse.learning_rate, eclipse.weight_decay, eclipse.ema_decay) == (1e-4, 0.0, 0.9999)
    assert (eclipse.replicate, eclipse.gamma, eclipse.network) == (4, 0.001, UNetConfig())
    with torch.device("meta"):
        denoiser = build_denoiser(PRESETS["light"])
    assert sum(p.numel() for p in denoiser.parameters()) == 1_125_315


def test_torchs_own_generator_is_left_alone(tmp_path):
    torch.manual_seed(1)
    want = torch.rand(1)
    torch.manual_seed(1)
    train_denoiser(random_images(4), tmp_path, dataclasses.replace(CONFIG, steps=2), progress=False)
    assert torch.equal(torch.rand(1), want)


# -- what goes wrong ---------------------------------------------------------------------------------


def test_another_run_in_the_folder_is_refused(tmp_path):
    train_denoiser(random_images(6), tmp_path, CONFIG, progress=False)
    with pytest.raises(TrainingError, match="another learning_rate"):
        train_denoiser(random_images(6), tmp_path, dataclasses.replace(CONFIG, learning_rate=1e-4), progress=False)
    with pytest.raises(TrainingError, match="another images_sha256"):
        train_denoiser(random_images(6, seed=1), tmp_path, CONFIG, progress=False)


def test_a_damaged_state_is_named(tmp_path):
    train_denoiser(random_images(6), tmp_path, CONFIG, progress=False)
    state = tmp_path / STATE_FILE
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"training-state\.safetensors is not a whole"):
        train_denoiser(random_images(6), tmp_path, CONFIG, progress=False)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path):
    config = dataclasses.replace(CONFIG, learning_rate=1e25, clip_norm=1e30, steps=50)
    with pytest.raises(TrainingError, match=r"step \d+ \(the last state saved is kept in .*another output folder"):
        train_denoiser(random_images(6), tmp_path, config, progress=False, save_every=0)
    header, _ = module._load_state(tmp_path / STATE_FILE, module._identity(config, random_images(6)))
    assert header["step"] >= 1


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(4, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_bad_images(images, tmp_path):
    with pytest.raises(InputError, match=r"uint8 tensor of shape \(N, C, H, W\)"):
        train_denoiser(images, tmp_path, CONFIG, progress=False)


@pytest.mark.parametrize("change", [{"objective": "gan"}, {"dtype": "float16"}, {"steps": 0}, {"replicate": -1}])
def test_bad_configurations(change):
    with pytest.raises(ConfigError, match="Got"):
        dataclasses.replace(CONFIG, **change)
    with pytest.raises(ConfigError, match="channels"):
        build_denoiser(CONFIG, image_channels=1)


# -- data --------------------------------------------------------------------------------------------


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
    with pytest.raises(InputError, match=r"12 images\. Got the index 12"):
        load_images(dataset, [12])


def test_a_damaged_file_is_named(folder):
    (folder / "0" / "000.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"000\.png is no readable image"):
        load_images(open_dataset(str(folder)), [0])


def make_dataset():
    return [(image, 0) for image in random_images(7, 16)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagenet", "package.module:function. Got 'imagenet'"),
        ("no_such_module:f", "No module named"),
        ("tests.test_train:nothing", "no attribute"),
        ("os:getpid", "map-style"),
        ("cifar10", "download=True"),
    ],
)
def test_bad_sources(spec, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_dataset(spec, root=tmp_path)


def test_a_function_names_a_dataset():
    assert load_images(open_dataset("tests.test_train:make_dataset"), range(7)).shape == (7, 3, 16, 16)


def test_the_choice_is_a_function_of_the_seed():
    assert choose(100, 10, 1) == choose(100, 10, 1) != choose(100, 10, 2)
    assert set(choose(100, 10, 1)) < set(choose(100, 20, 1))
    assert choose(50000, 3, 2026) == sorted(choose(50000, 3, 2026))
    with pytest.raises(InputError, match="Got 101"):
        choose(100, 101, 0)


# -- the command -------------------------------------------------------------------------------------


def test_the_command_makes_a_checkpoint_with_its_card(folder, tmp_path, capsys):
    out = tmp_path / "model"
    arguments = [
        *("train", "denoiser", "--data", str(folder), "--out", str(out), "--count", "10", "--choose-seed", "3"),
        *("--steps", "3", "--batch-size", "2", "--validation", "tests.test_train:make_dataset", "--quiet"),
    ]
    assert cli.main(arguments) == 0
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    denoiser = pretrained.load(out)
    assert denoiser.name == "model"
    details = json.loads((out / "config.json").read_text())["details"]
    assert details["indices"] == choose(12, 10, 3)
    assert details["record"]["steps"] == 3
    unseen = load_images(make_dataset(), range(7))
    assert details["psnr"][1]["denoiser"] == pytest.approx(psnr(denoiser, unseen, 25 / 255), abs=1e-3)
    card = (out / "README.md").read_text()
    assert ", ".join(map(str, choose(12, 10, 3))) in card
    assert f"{details['psnr'][1]['denoiser']:.2f}" in card
    assert str(tmp_path) not in card + (out / "config.json").read_text()
    assert cli.main(arguments) == 2
    assert "without a checkpoint" in capsys.readouterr().err


def test_a_save_that_was_killed_is_finished_and_a_strangers_folder_refused_at_once(folder, tmp_path, capsys):
    out = tmp_path / "model"
    arguments = ["train", "denoiser", "--data", str(folder), "--out", str(out), "--steps", "2", "--quiet"]
    out.mkdir()
    (out / "README.md").write_text("mine")
    assert cli.main(arguments) == 2
    assert "with README.md" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["README.md"]
    (out / "README.md").unlink()
    images = load_images(open_dataset(str(folder)), range(12))
    train_denoiser(images, out, dataclasses.replace(PRESETS["light"], steps=2), progress=False)
    (out / "model.safetensors").write_bytes(b"half")  # as a kill between the two files leaves it
    assert cli.main(arguments) == 0
    assert pretrained.load(out).name == "model"
    assert not (out / STATE_FILE).exists()


def test_psnr_against_an_independent_computation():
    images = smooth_images(5)
    denoiser = tiny_denoiser()
    keys = noise.image_keys(4, 0, range(5))
    clean = images.double().numpy() / 255
    noised = images.float() / 255 + 0.1 * noise.normal(keys, (3, 16, 16))
    with torch.no_grad():
        out = denoiser(noised, torch.full((5,), 0.1)).clamp(0, 1).double().numpy()
    want = np.mean([10 * np.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(out, clean, strict=True)])
    assert psnr(denoiser, images, 0.1, seed=4, batch_size=2) == pytest.approx(want, abs=1e-4)
    assert 0 < jpeg_psnr(images, 0.1) < 40
    with pytest.raises(InputError, match="uint8"):
        psnr(denoiser, images.float(), 0.1)
