"""Training of energy models: its steps written out, its bank, its arithmetic, and its guards."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from purifyloader.core import noise
from purifyloader.core.devices import exact_arithmetic
from purifyloader.energy import EnergyConfig, EnergyNetwork, image_energies, langevin
from purifyloader.errors import ConfigError, TrainingError
from purifyloader.train import run as training
from purifyloader.train.energy import EnergyTrainConfig, energy_recipe, task, train_energy
from purifyloader.train.energy.bank import DATA_NOISE, WALK, Bank, image_positions, outside, step_keys
from purifyloader.train.energy.curves import float32_arithmetic, long_chains
from purifyloader.train.energy.task import build_energy, energy_learning_rate
from tests.conftest import random_images
from tests.train.tiny import (
    FROM_NOISE,
    IMAGES,
    PAIRED,
    PLAIN,
    Stop,
    distance,
    smooth_images,
    state_of,
    stopping_after,
    weights,
)

BLACK = random_images(10, 8) // 200 * 255  # black, with some white


def train(folder: Path, config: EnergyTrainConfig, **options: Any) -> tuple[EnergyNetwork, dict[str, Any]]:
    return train_energy(options.pop("images", IMAGES), folder, config, **{"progress": False, **options})


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of a run this short, and are looked at elsewhere."""
    monkeypatch.setattr(task, "write_pictures", lambda *_: None)


@pytest.fixture
def saving_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state at each step, however long writing takes: with save_every=0."""
    monkeypatch.setattr(training, "_SAVING_SHARE", math.inf)


# -- each step --------------------------------------------------------------------------------------


def test_a_step_is_algorithm_2_written_out(tmp_path):
    """Two updates of plain gradient descent with everything drawn here by hand."""
    config = dataclasses.replace(
        PLAIN, steps=2, optimizer="sgd", learning_rate=1e-8, rejuvenation=0.0, langevin_steps=2, paired=True
    )
    got, _ = train(tmp_path, config)
    energy = build_energy(config)
    data = IMAGES.float() / 255
    bank = Bank(config, IMAGES)
    # the bank begins at images plus noise
    noised = data[bank.origin] + config.data_noise * noise.normal(
        noise.image_keys(0, -1, torch.arange(10)), (3, 8, 8), 1
    )
    torch.testing.assert_close(bank.samples, noised)
    samples = bank.samples.clone()
    for step in range(2):
        slots = bank.slots(step)
        keys = step_keys(config, step, 0, 4)
        y = langevin(
            energy, samples[slots], 2, lambda k, keys=keys: noise.normal(keys, (3, 8, 8), WALK + k), temperature=1e-4
        )
        x = data[bank.origin[slots]] + config.data_noise * noise.normal(keys, (3, 8, 8), DATA_NOISE)
        energy.zero_grad()
        ((energy(x).mean() - energy(y).mean()) / 1e-4).backward()
        with torch.no_grad():
            for p in energy.parameters():
                p -= config.learning_rate * p.grad
        samples[slots] = y
    moved = distance(weights(got), weights(build_energy(config)))
    assert distance(weights(got), weights(energy)) < 1e-3 * moved
    torch.testing.assert_close(state_of(tmp_path)[1]["bank"]["samples"], samples, rtol=0, atol=1e-5)


def test_slots_are_drawn_evenly_and_none_twice_in_a_batch():
    config = dataclasses.replace(PLAIN, batch_size=3)
    bank = Bank(config, IMAGES)
    seen = torch.zeros(10)
    for step in range(300):
        slots = bank.slots(step)
        assert len(slots.unique()) == 3
        seen[slots] += 1
    assert float(seen.min()) > 0.8 * float(seen.mean())
    assert sorted(bank.origin.tolist()) == list(range(10))
    positions = torch.stack([image_positions(config, 10, step) for step in range(300)])
    assert positions.unique().tolist() == list(range(10))
    # independent of the slots, where they are not paired
    assert not torch.equal(positions[0], bank.slots(0))
    few = torch.stack([image_positions(config, 2, step) for step in range(50)])
    assert few.unique().tolist() == [0, 1]


@pytest.mark.parametrize("config", [PLAIN, FROM_NOISE], ids=["data", "noise"])
def test_a_share_of_the_samples_begins_anew(config):
    config = dataclasses.replace(config, rejuvenation=0.25, batch_size=100, bank_size=100)
    bank = Bank(config, IMAGES)
    bank.samples.fill_(0.5)
    count = 0
    for step in range(20):
        slots = bank.slots(step)
        x = bank.take(slots, step_keys(config, step, 0, 100))
        fresh = (x != 0.5).flatten(1).any(1)
        count += int(fresh.sum())
        assert bool((bank.samples == 0.5).all())  # until they are put back
        if config.bank == "data":
            near = (x[fresh] - IMAGES[bank.origin[slots[fresh]]].float() / 255).abs()
            assert float(near.max()) < 6 * config.data_noise
        else:
            assert abs(float(x[fresh].mean()) - 0.5) < 0.02
            assert float(x[fresh].std()) == pytest.approx(math.sqrt(1 / 12), rel=0.05)
    assert count == pytest.approx(500, abs=100)


def test_learning_rates():
    config = dataclasses.replace(PLAIN, learning_rate=1.0, warmup=2, decay_at=(4, 6))
    assert [round(energy_learning_rate(config, s), 6) for s in range(8)] == [0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]


def test_the_energy_knows_the_temperature_it_is_trained_for(tmp_path):
    energy, _ = train(tmp_path, dataclasses.replace(PLAIN, steps=1, temperature=2e-4))
    assert energy.temperature == 2e-4


@pytest.mark.slow
def test_training_finds_the_images_likelier_than_noisy_ones(tmp_path):
    """What purification needs: noise raises the energy, and a walk lowers what noise has raised."""
    images = smooth_images(64, 8)
    config = EnergyTrainConfig(
        network=EnergyConfig(channels=8),
        steps=150,
        batch_size=16,
        langevin_steps=8,
        step_size=0.02,
        data_noise=0.02,
        learning_rate=5e-3,
        paired=True,
        ema_decay=0.9,
        clip_norm=1.0,  # without it the network can die in the first steps, which depends on the CPU
    )
    energy, record = train(tmp_path, config, images=images)
    unseen = smooth_images(64, 8, seed=5).float() / 255
    z = torch.randn(unseen.shape, generator=torch.Generator().manual_seed(0))
    clean, noisy = (image_energies(energy, x) for x in (unseen, unseen + 0.04 * z))
    assert float((noisy > clean).double().mean()) > 0.9
    assert record["warnings"] == []


# -- arithmetic -------------------------------------------------------------------------------------


CONVOLUTIONS = torch.backends.cudnn.conv  # of a GPU; any build of torch knows what it would do


def test_float32_on_a_gpu_is_the_arithmetic_of_the_purifier():
    """And on a CPU nothing is touched: threads above all, whose number decides the bits."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    with exact_arithmetic(gpu):
        wanted = CONVOLUTIONS.fp32_precision
    before = CONVOLUTIONS.fp32_precision
    assert (before, wanted) == ("tf32", "ieee")
    for config, device, seen in (
        (PLAIN, gpu, wanted),
        (PLAIN, cpu, before),
        (dataclasses.replace(PLAIN, dtype="bfloat16"), gpu, before),
    ):
        with task._arithmetic(config, device):
            assert CONVOLUTIONS.fp32_precision == seen
        assert CONVOLUTIONS.fp32_precision == before
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with task._arithmetic(PLAIN, cpu), float32_arithmetic(cpu):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_network_call_of_a_step_is_in_that_arithmetic(dtype, tmp_path, monkeypatch):
    """As on a GPU, which is played by the CPU."""
    seen: list[str] = []
    arithmetic, forward = task._arithmetic, EnergyNetwork.forward

    def watched(self: EnergyNetwork, x: Tensor) -> Tensor:
        seen.append(CONVOLUTIONS.fp32_precision)
        return forward(self, x)

    monkeypatch.setattr(task, "_arithmetic", lambda config, _: arithmetic(config, torch.device("cuda")))
    monkeypatch.setattr(EnergyNetwork, "forward", watched)
    train(tmp_path, dataclasses.replace(PLAIN, dtype=dtype, steps=2))
    assert len(seen) == 2 * (PLAIN.langevin_steps + 1)
    assert set(seen) == {"ieee" if dtype == "float32" else "tf32"}


def test_long_chains_are_in_the_arithmetic_of_the_purifier(tmp_path, monkeypatch):
    seen: list[str] = []
    forward = EnergyNetwork.forward

    def watched(self: EnergyNetwork, x: Tensor) -> Tensor:
        seen.append(CONVOLUTIONS.fp32_precision)
        return forward(self, x)

    as_on_a_gpu = float32_arithmetic(torch.device("cuda"))
    monkeypatch.setattr("purifyloader.train.energy.curves.float32_arithmetic", lambda device: as_on_a_gpu)
    monkeypatch.setattr(EnergyNetwork, "forward", watched)
    long_chains(build_energy(PLAIN), IMAGES, PLAIN, [2, 3], tmp_path / "chains.png")
    assert set(seen) == {"ieee"}


@pytest.mark.parametrize("count", [1, 3, 8, 10])
def test_each_chain_has_its_column(count, tmp_path):
    images = smooth_images(count, 8)
    energy = build_energy(PLAIN)
    rows, failure = long_chains(energy, images, PLAIN, [1, 2], tmp_path / "chains.png")
    assert failure is None
    assert [row["steps"] for row in rows] == [1, 2]
    with Image.open(tmp_path / "chains.png") as picture:
        pixels = pil_to_tensor(picture)
    assert pixels.shape == (3, 3 * 66 + 2, min(count, 8) * 66 + 2)
    for i in range(min(count, 8)):  # the images themselves, each at the head of its chain
        assert torch.equal(pixels[:, 2:66:8, 2 + 66 * i : 66 + 66 * i : 8], images[i])


@pytest.mark.gpu
def test_a_gpu_trains_in_float32(tmp_path, monkeypatch):
    seen: list[str] = []
    gradients = task._gradients

    def watched(*arguments: Any) -> Any:
        seen.append(CONVOLUTIONS.fp32_precision)
        return gradients(*arguments)

    monkeypatch.setattr(task, "_gradients", watched)
    train(tmp_path, PLAIN, device="cuda")
    assert set(seen) == {"ieee"}


@pytest.mark.gpu
def test_a_run_stopped_on_a_gpu_goes_on(tmp_path):
    config = dataclasses.replace(PAIRED, dtype="bfloat16")
    whole, _ = train(tmp_path / "whole", config, device="cuda")
    with pytest.raises(Stop):
        train(tmp_path / "part", config, device="cuda", save_every=0, on_step=stopping_after(5))
    again, _ = train(tmp_path / "part", config, device="cuda")
    assert distance(weights(whole), weights(again)) < 1e-3


# -- what stops it ----------------------------------------------------------------------------------


def test_energies_that_run_apart_stop_it_and_a_state_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "SETTLED", 2)
    train(tmp_path, dataclasses.replace(PLAIN, steps=3))
    step = task._gradients

    def apart(*arguments: Any) -> Any:
        return {**step(*arguments), "difference": 1e9 * (1 + len(calls))}

    calls: list[int] = []
    monkeypatch.setattr(task, "_gradients", apart)
    with pytest.raises(TrainingError, match="images and samples have run apart") as error:
        train(tmp_path, PLAIN, on_step=lambda step, _: calls.append(step))
    assert "steps=3 makes a checkpoint" in str(error.value)
    monkeypatch.setattr(task, "_gradients", step)
    assert train(tmp_path, dataclasses.replace(PLAIN, steps=3))[1]["steps"] == 3


@pytest.mark.parametrize("held_out", [None, random_images(3, 8, seed=1)], ids=["", "held out"])
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"learning_rate": 1e6, "optimizer": "sgd"}, "ran away|NaN|nan|inf|apart|steep|left"),
        ({"learning_rate": 1e30, "optimizer": "sgd"}, "ran away|NaN|nan|inf|apart|steep|left"),
        ({"temperature": 1e-9}, "ran away|NaN|nan|inf|apart|steep|left"),
    ],
)
def test_a_run_that_explodes_says_so(changes, word, held_out, tmp_path):
    with pytest.raises(TrainingError, match=word) as error:
        train(tmp_path, dataclasses.replace(PLAIN, **changes), held_out=held_out)
    assert "start again with another output folder" in str(error.value)


@pytest.mark.usefixtures("saving_always")
def test_an_update_that_breaks_the_held_out_energies_leaves_the_state_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "energy_learning_rate", lambda config, step: 1e-9 if step < 4 else 1e30)
    config = dataclasses.replace(PLAIN, optimizer="sgd")
    with pytest.raises(TrainingError, match=r"^The energies broke \(.*\) at step 5\.") as error:
        train(tmp_path, config, held_out=random_images(3, 8, seed=1), save_every=0)
    assert "steps=4 makes a checkpoint" in str(error.value)
    assert state_of(tmp_path)[0]["step"] == 4


@pytest.mark.parametrize(
    "config", [energy_recipe("light"), energy_recipe("published"), energy_recipe("paper"), PLAIN], ids=str
)
def test_noise_alone_takes_no_pixel_of_black_pictures_out(config):
    bank = Bank(dataclasses.replace(config, bank_size=200), BLACK)
    keys = noise.image_keys(1, 2, torch.arange(200))
    walked = langevin(
        lambda x: 0 * x.sum((1, 2, 3)),
        bank.samples,
        config.langevin_steps,
        lambda step: noise.normal(keys, (3, 8, 8), WALK + step),
        step_size=config.step_size,
    )
    for samples in (bank.samples, walked):
        assert outside(samples, config) < 1e-3
    if config.bank == "data":
        assert float(((walked < 0) | (walked > 1)).float().mean()) > 0.4
    assert outside(walked + 0.5, config) > 0.1


@pytest.mark.usefixtures("saving_always")
def test_a_sound_run_on_black_pictures_is_saved_and_not_stopped(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(task, "SETTLED", 10)
    config = dataclasses.replace(PLAIN, steps=24, learning_rate=1e-4)
    with pytest.raises(Stop):
        train(tmp_path, config, images=BLACK, save_every=0, on_step=stopping_after(20))
    assert state_of(tmp_path)[0]["step"] == 19
    train(tmp_path, config, images=BLACK)
    assert not caplog.records


def watch(step: int = 1000, **values: float) -> str | None:
    return watched({}, step, **values)


def watched(before: dict[str, float], step: int = 1000, **values: float) -> str | None:
    seen = task._EnergyWatch(PLAIN)
    seen.restore({"watch": before})
    return seen.see(step, {"difference": 0.0, "spread": 100.0, "drift": 0.002, "outside": 0.01, **values}, 1.0)


def test_what_is_called_broken():
    assert watch() is None
    assert watch(difference=900.0) is None
    assert watch(step=5, difference=-1e6) is None  # a bank of noise begins far away
    assert "run apart" in str(
        watch(difference=-1e9) or watched({"least": 1.0, "difference": -1e9}, difference=-1e9, drift=0.0, outside=0.0)
    )
    assert "steep" in str(watch(drift=0.1))
    assert "have left [0, 1]" in str(watch(outside=0.7))
    assert "became nan" in str(watch(drift=math.nan))
    assert "became inf" in str(watch(difference=math.inf))


# -- what is refused --------------------------------------------------------------------------------


def test_a_bank_smaller_than_a_batch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"for each image of a batch, 16. Got 10"):
        train(tmp_path, dataclasses.replace(PLAIN, batch_size=16))
    with pytest.raises(ConfigError, match="bank_size must be"):
        dataclasses.replace(PLAIN, bank_size=3)


def test_the_published_recipes():
    """systems.md, PureGen: training."""
    paper, published = energy_recipe("paper"), energy_recipe("published")
    assert (paper.network.channels, published.network.channels) == (128, 128)
    assert (2 * paper.step_size, 2 * published.step_size) == (0.01, 0.0125)
    assert (2 * paper.data_noise, 2 * published.data_noise) == (0.02, 0.015)
    assert (paper.temperature, published.temperature) == (1e-4, 1e-4)
    assert (paper.optimizer, paper.learning_rate) == ("sgd", 5e-5)
    assert (published.optimizer, published.learning_rate) == ("adam", 1e-4)
    assert (paper.bank, paper.rejuvenation) == ("noise", 0)
    assert (published.bank, published.rejuvenation) == ("data", 0.05)
    assert (paper.steps, paper.langevin_steps, published.langevin_steps) == (150_000, 100, 100)
    epoch = 50_000 / 128
    assert published.steps == pytest.approx(120 * epoch, abs=epoch)
    assert [round(at / epoch) for at in published.decay_at] == [40, 75, 100]
    assert (paper.paired, published.paired, energy_recipe("light").paired) == (False, False, True)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"langevin_steps": 0}, "steps"),
        ({"step_size": -1.0}, "step_size"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"bank": "zeros"}, "bank"),
        ({"optimizer": "adamw"}, "optimizer"),
        ({"rejuvenation": 1.5}, "rejuvenation"),
        ({"data_noise": -0.1}, "data_noise"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"decay_at": (0,)}, "decay_at"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"dtype": "float16"}, "dtype"),
        ({"paired": True, "bank": "noise"}, "paired"),
        ({"seed": 0.5}, "seed"),
        ({"network": 3}, "network"),
        *(({name: True}, name) for name in ("steps", "batch_size", "warmup", "bank_size", "seed")),
        ({"langevin_steps": True}, "steps"),
        *(({name: True}, name) for name in ("temperature", "step_size", "data_noise", "learning_rate", "clip_norm")),
        ({"decay_at": (True,)}, "decay_at"),
        *(({name: value}, name) for name in ("paired", "flip", "compile") for value in (0, 1, 1.0)),
    ],
)
def test_bad_fields_are_named(changes, word):
    with pytest.raises(ConfigError, match=rf"{word}.*Got "):
        dataclasses.replace(PLAIN, **changes)


def test_unknown_fields_are_named():
    with pytest.raises(ConfigError, match="Got langevin"):
        EnergyTrainConfig.from_dict({"langevin": 3})
    with pytest.raises(ConfigError, match="A preset must be one of light, paper, published"):
        energy_recipe("eclipse")
