"""Training of energy models: to the same weights and bank after any stop, in any number of processes; and its guard."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from purifyloader import pretrained
from purifyloader.commands import main as cli
from purifyloader.commands import train_energy as command
from purifyloader.core import noise
from purifyloader.core.devices import exact_arithmetic
from purifyloader.energy import EnergyConfig, EnergyNetwork, image_energies, langevin
from purifyloader.errors import CheckpointError, ConfigError, InputError, TrainingError
from purifyloader.files.locks import Lock
from purifyloader.train.energy import ENERGY_RECIPES, EnergyTrainConfig, energy_recipe, train_energy
from purifyloader.train.energy import task as loop
from purifyloader.train.energy.bank import DATA_NOISE, WALK, Bank, image_positions, outside, step_keys
from purifyloader.train.energy.curves import float32_arithmetic, long_chains
from purifyloader.train.energy.task import build_energy, energy_learning_rate, energy_started_from
from purifyloader.train.state import STATE_FILE, load_state
from tests.conftest import random_images, tiny_denoiser
from tests.purified.faults import REPOSITORY, Run
from tests.train.test_train import Stop, distance, free_port, same, smooth_images, start_ranks, stopping_after, weights

TINY = EnergyConfig(channels=4)
PLAIN = EnergyTrainConfig(network=TINY, steps=8, batch_size=4, langevin_steps=3, learning_rate=1e-3)
PAIRED = dataclasses.replace(PLAIN, paired=True, flip=True, ema_decay=0.9, warmup=2, decay_at=(4, 6), clip_norm=1.0)
FROM_NOISE = dataclasses.replace(
    PLAIN, bank="noise", rejuvenation=0.3, optimizer="sgd", learning_rate=1e-9, bank_size=6, step_size=0.005
)
IMAGES = random_images(10, 8)
BLACK = random_images(10, 8) // 200 * 255  # black, with some white


def train(folder: Path, config: EnergyTrainConfig, **options: Any) -> tuple[EnergyNetwork, dict[str, Any]]:
    return train_energy(options.pop("images", IMAGES), folder, config, **{"progress": False, **options})


def state_of(folder: Path, config: EnergyTrainConfig, images: Tensor = IMAGES) -> tuple[dict[str, Any], Any]:
    return load_state(folder / STATE_FILE, loop._identity(config, images))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "curves.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture
def saving_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state at each step, however long writing takes: with save_every=0."""
    monkeypatch.setattr(loop, "_SAVING_SHARE", math.inf)
    monkeypatch.setattr(loop.EnergyCurves, "_draw", lambda *_: None)


# -- a stop ------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[EnergyTrainConfig, dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "paired": (PAIRED, {}),
    "from noise": (FROM_NOISE, {}),
    "held out": (PLAIN, {"held_out": random_images(3, 8, seed=1)}),
    "bfloat16": (dataclasses.replace(PAIRED, dtype="bfloat16"), {}),
}


@pytest.mark.usefixtures("saving_always")
@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_ends_with_the_same_weights_bank_and_curves(name, tmp_path):
    config, options = RUNS[name]
    whole, record = train(tmp_path / "whole", config, **options)
    bank = state_of(tmp_path / "whole", config)[1]["bank"]["samples"]
    for step in (3, 6):
        with pytest.raises(Stop):
            train(tmp_path / "part", config, save_every=0, on_step=stopping_after(step), **options)
        assert state_of(tmp_path / "part", config)[0]["step"] == step - 1
    again, record2 = train(tmp_path / "part", config, **options)
    assert same(weights(whole), weights(again))
    assert torch.equal(state_of(tmp_path / "part", config)[1]["bank"]["samples"], bank)
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")
    for record_ in (record, record2):
        record_.pop("seconds"), record_.pop("peak_memory")
    assert record == record2
    assert record["steps"] == 8


def in_a_process(folder: Path, config: EnergyTrainConfig) -> None:
    """In a child: a run that saves a state whenever it can; then its weights beside it."""
    loop._SAVING_SHARE = 0.5
    loop.EnergyCurves._draw = lambda *_: None  # type: ignore[method-assign]
    energy, _ = train(folder, config, save_every=0.0)
    torch.save(weights(energy), folder / "weights.pt")


def test_a_killed_process_goes_on(tmp_path: Path):
    config = dataclasses.replace(PAIRED, steps=60)
    rng = random.Random(time.time())
    state = tmp_path / "killed" / STATE_FILE
    kills = 0
    while kills < 3:
        before = state.stat().st_ino if state.exists() else None
        run = Run(in_a_process, tmp_path / "killed", config, outcome=tmp_path / f"outcome{kills}")
        while run.alive and (not state.exists() or state.stat().st_ino == before):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        if not run.kill():
            break
        kills += 1
        assert state_of(tmp_path / "killed", config)[0]["step"] <= config.steps
    assert kills, "It has ended before it could be killed."
    for name in ("killed", "whole"):
        outcome = Run(in_a_process, tmp_path / name, config, outcome=tmp_path / f"{name}.outcome").join()
        assert outcome.error is None, outcome.traceback
    first, second = (torch.load(tmp_path / n / "weights.pt", weights_only=True) for n in ("killed", "whole"))
    assert same(first, second)


def test_an_interrupt_saves_the_step_it_reached(tmp_path):
    def interrupt(step: int, difference: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, PLAIN, on_step=interrupt)
    assert state_of(tmp_path, PLAIN)[0]["step"] == 5
    assert same(weights(train(tmp_path, PLAIN)[0]), weights(train(tmp_path / "whole", PLAIN)[0]))


def becoming_steep(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on an energy that is too steep to be saved, and not yet so steep that the run is stopped."""
    walked = loop._walked
    steep = 0.6 * loop._STEEP * PLAIN.step_size
    monkeypatch.setattr(loop, "_SMOOTH", 1.0)
    monkeypatch.setattr(loop, "_walked", lambda *arguments: (walked(*arguments)[0], steep))


@pytest.mark.usefixtures("saving_always")
def test_an_interrupt_of_a_run_that_breaks_keeps_the_last_good_state(tmp_path, monkeypatch, caplog):
    def interrupt(step: int, difference: float) -> None:
        if step == 6:
            raise KeyboardInterrupt

    train(tmp_path, dataclasses.replace(PLAIN, steps=3))
    before = (tmp_path / STATE_FILE).read_bytes()
    becoming_steep(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, PLAIN, save_every=math.inf, on_step=interrupt)
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert "step 6 is not saved" in caplog.text


@pytest.mark.usefixtures("saving_always")
def test_that_states_are_not_saved_is_said_once(tmp_path, monkeypatch, caplog):
    becoming_steep(monkeypatch)
    with pytest.raises(Stop):
        train(tmp_path, PLAIN, save_every=0, on_step=stopping_after(7))
    assert not (tmp_path / STATE_FILE).exists()
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert "step 1 is not saved" in said[0]
    assert "so steep that" in said[0]


def test_a_run_that_is_done_is_not_done_again(tmp_path):
    first, _ = train(tmp_path, PLAIN)
    steps: list[int] = []
    again, _ = train(tmp_path, PLAIN, on_step=lambda step, _: steps.append(step))
    assert steps == []
    assert same(weights(first), weights(again))


def test_a_longer_run_goes_on_from_a_shorter_one_and_says_so(tmp_path):
    train(tmp_path / "part", dataclasses.replace(PLAIN, steps=4))
    longer, record = train(tmp_path / "part", PLAIN)
    whole, _ = train(tmp_path / "whole", PLAIN)
    assert same(weights(longer), weights(whole))
    assert record["warnings"] == [
        "the length was changed at step 4: planned were 4 steps with the rate let down at [], now 8 and []"
    ]
    with pytest.raises(TrainingError, match="has done 8 steps already"):
        train(tmp_path / "part", dataclasses.replace(PLAIN, steps=4))


@pytest.mark.parametrize(
    ("changes", "images", "word"),
    [
        ({"learning_rate": 1e-4}, IMAGES, "learning_rate"),
        ({"langevin_steps": 4}, IMAGES, "langevin_steps"),
        ({}, random_images(10, 8, seed=9), "set of images"),
    ],
)
def test_another_run_in_the_folder_is_refused(changes, images, word, tmp_path):
    train(tmp_path, dataclasses.replace(PLAIN, steps=1))
    with pytest.raises(TrainingError, match=word):
        train(tmp_path, dataclasses.replace(PLAIN, **changes), images=images)


def test_a_damaged_state_is_named(tmp_path):
    train(tmp_path, PLAIN)
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=STATE_FILE):
        train(tmp_path, PLAIN)


# -- several processes -------------------------------------------------------------------------------


def joined(folder: Path, config: EnergyTrainConfig) -> dict[str, Any]:
    """In a child: a run whose weights each process writes."""
    energy, record = train(folder, config)
    torch.save(weights(energy), folder.with_name(f"weights-{os.environ['RANK']}.pt"))
    return record


# plain gradient descent: Adam's first steps turn the rounding of a gradient near 0 into a whole step
@pytest.mark.parametrize(
    "config",
    [dataclasses.replace(PAIRED, optimizer="sgd", learning_rate=1e-8, clip_norm=None), FROM_NOISE],
    ids=["paired", "from noise"],
)
def test_two_processes_give_the_weights_and_the_bank_of_one(config, tmp_path):
    whole, _ = train(tmp_path / "one", config)
    outcomes = [r.join(100) for r in start_ranks(tmp_path, 2, joined, tmp_path / "two", config)]
    for outcome in outcomes:
        assert outcome.error is None, outcome.traceback
    first, second = (torch.load(tmp_path / f"weights-{r}.pt", weights_only=True) for r in range(2))
    assert same(first, second)
    assert distance(first, weights(whole)) < 1e-3 * distance(weights(whole), weights(build_energy(config)))
    one, two = (state_of(tmp_path / name, config)[1]["bank"]["samples"] for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    assert [o.value["processes"] for o in outcomes] == [2, 2]


def broken_rank(folder: Path) -> None:
    """In a child: the samples of one process alone run away."""
    if os.environ["RANK"] == "1":

        def fails(*_: Any) -> Any:
            raise loop.PurifyError("of this process alone")

        loop._walked = fails  # type: ignore[assignment]
    train(folder, PLAIN)


def test_what_breaks_in_one_process_stops_all_and_all_say_what(tmp_path):
    first, second = (r.join(100) for r in start_ranks(tmp_path, 2, broken_rank, tmp_path / "run"))
    for outcome in (first, second):
        assert outcome.error == "TrainingError", outcome.traceback
        assert "at step 1." in outcome.message
    assert first.message.startswith("The samples of another process ran away")
    assert second.message.startswith("The samples ran away (of this process alone)")


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="multiple of the number of processes, 2"):
        loop._check(IMAGES, dataclasses.replace(PLAIN, batch_size=5), 2)


# -- each step ---------------------------------------------------------------------------------------


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
    torch.testing.assert_close(state_of(tmp_path, config)[1]["bank"]["samples"], samples, rtol=0, atol=1e-5)


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


def test_torchs_generators_are_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("It seeds the GPUs."))
    before = torch.random.get_rng_state()
    first, again = build_energy(PLAIN), build_energy(PLAIN)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(build_energy(dataclasses.replace(PLAIN, seed=-1))))


def test_the_energy_knows_the_temperature_it_is_trained_for(tmp_path):
    energy, _ = train(tmp_path, dataclasses.replace(PLAIN, steps=1, temperature=2e-4))
    assert energy.temperature == 2e-4


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
        with loop._arithmetic(config, device):
            assert CONVOLUTIONS.fp32_precision == seen
        assert CONVOLUTIONS.fp32_precision == before
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with loop._arithmetic(PLAIN, cpu), float32_arithmetic(cpu):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_network_call_of_a_step_is_in_that_arithmetic(dtype, tmp_path, monkeypatch):
    """As on a GPU, which is played by the CPU."""
    seen: list[str] = []
    arithmetic, forward = loop._arithmetic, EnergyNetwork.forward

    def watched(self: EnergyNetwork, x: Tensor) -> Tensor:
        seen.append(CONVOLUTIONS.fp32_precision)
        return forward(self, x)

    monkeypatch.setattr(loop, "_arithmetic", lambda config, _: arithmetic(config, torch.device("cuda")))
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


@pytest.mark.gpu
def test_a_gpu_trains_in_float32(tmp_path, monkeypatch):
    seen: list[str] = []
    gradients = loop._gradients

    def watched(*arguments: Any) -> Any:
        seen.append(CONVOLUTIONS.fp32_precision)
        return gradients(*arguments)

    monkeypatch.setattr(loop, "_gradients", watched)
    train(tmp_path, PLAIN, device="cuda")
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
    )
    energy, record = train(tmp_path, config, images=images)
    unseen = smooth_images(64, 8, seed=5).float() / 255
    z = torch.randn(unseen.shape, generator=torch.Generator().manual_seed(0))
    clean, noisy = (image_energies(energy, x) for x in (unseen, unseen + 0.04 * z))
    assert float((noisy > clean).double().mean()) > 0.9
    assert record["warnings"] == []


# -- what stops it -----------------------------------------------------------------------------------


def test_energies_that_run_apart_stop_it_and_a_state_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_SETTLED", 2)
    train(tmp_path, dataclasses.replace(PLAIN, steps=3))
    step = loop._gradients

    def apart(*arguments: Any) -> Any:
        measured, norm = step(*arguments)
        return {**measured, "difference": 1e9 * (1 + len(calls))}, norm

    calls: list[int] = []
    monkeypatch.setattr(loop, "_gradients", apart)
    with pytest.raises(TrainingError, match="images and samples have run apart") as error:
        train(tmp_path, PLAIN, on_step=lambda step, _: calls.append(step))
    assert "--steps 3 makes a checkpoint" in str(error.value)
    monkeypatch.setattr(loop, "_gradients", step)
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
    monkeypatch.setattr(loop, "energy_learning_rate", lambda config, step: 1e-9 if step < 4 else 1e30)
    config = dataclasses.replace(PLAIN, optimizer="sgd")
    with pytest.raises(TrainingError, match=r"^The energies broke \(.*\) at step 5\.") as error:
        train(tmp_path, config, held_out=random_images(3, 8, seed=1), save_every=0)
    assert "--steps 4 makes a checkpoint" in str(error.value)
    assert state_of(tmp_path, config)[0]["step"] == 4


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
    monkeypatch.setattr(loop, "_SETTLED", 10)
    config = dataclasses.replace(PLAIN, steps=40, learning_rate=1e-4)
    with pytest.raises(Stop):
        train(tmp_path, config, images=BLACK, save_every=0, on_step=stopping_after(35))
    assert state_of(tmp_path, config, BLACK)[0]["step"] == 34
    train(tmp_path, config, images=BLACK)
    assert not caplog.records


@pytest.mark.parametrize("channels", [1, 3])
def test_held_out_images_that_do_not_fit_are_refused(channels, tmp_path):
    bad = random_images(3, 8, channels=1) if channels == 1 else random_images(3, 8).float()
    with pytest.raises(InputError, match=r"held_out takes .* Got "):
        train(tmp_path, PLAIN, held_out=bad)
    assert not (tmp_path / STATE_FILE).exists()


def watch(step: int = 1000, **values: float) -> str | None:
    seen = loop._Watch(PLAIN)
    return seen.see(step, {"difference": 0.0, "spread": 100.0, "drift": 0.002, "outside": 0.01, **values})


def test_what_is_called_broken():
    assert watch() is None
    assert watch(difference=900.0) is None
    assert watch(step=5, difference=-1e6) is None  # a bank of noise begins far away
    assert "run apart" in str(
        watch(difference=-1e9)
        or loop._Watch(PLAIN, {"least": 1.0, "difference": -1e9}).see(
            1000, {"difference": -1e9, "spread": 100.0, "drift": 0.0, "outside": 0.0}
        )
    )
    assert "steep" in str(watch(drift=0.1))
    assert "have left [0, 1]" in str(watch(outside=0.7))
    assert "became nan" in str(watch(drift=math.nan))
    assert "became inf" in str(watch(difference=math.inf))


@pytest.mark.parametrize(
    "images",
    [torch.zeros(4, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(0, 3, 8, 8, dtype=torch.uint8)],
)
def test_bad_images(images, tmp_path):
    with pytest.raises(InputError, match=r"uint8 tensor .* Got "):
        train(tmp_path, PLAIN, images=images)


def test_a_bank_smaller_than_a_batch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"for each image of a batch, 16. Got 10"):
        train(tmp_path, dataclasses.replace(PLAIN, batch_size=16))
    with pytest.raises(ConfigError, match="bank_size must be"):
        dataclasses.replace(PLAIN, bank_size=3)


def test_channels_must_fit(tmp_path):
    with pytest.raises(ConfigError, match="takes 3 channels but the images have 1"):
        train(tmp_path, PLAIN, images=IMAGES[:, :1])
    grey = dataclasses.replace(PLAIN, network=EnergyConfig(channels=4, image_channels=1))
    assert train(tmp_path, grey, images=IMAGES[:, :1])[0].config.image_channels == 1


# -- configuration -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ENERGY_RECIPES)
def test_a_configuration_is_whole_as_json(name):
    config = energy_recipe(name)
    again = EnergyTrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert EnergyTrainConfig.from_dict({"seed": 3}, config) == dataclasses.replace(config, seed=3)
    assert EnergyTrainConfig.from_dict({"network": {"channels": 7}}, config).network.channels == 7


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
    with pytest.raises(ConfigError, match="A recipe must be one of light, paper, published"):
        energy_recipe("eclipse")


def test_training_starts_from_another_model(tmp_path):
    first, _ = train(tmp_path / "first", PLAIN)
    config = energy_started_from(dataclasses.replace(PLAIN, learning_rate=1e-30), first)
    again, _ = train(tmp_path / "again", config, start=first)
    assert distance(weights(first), weights(again)) < 1e-6
    with pytest.raises(ConfigError, match="starts from"):
        train(tmp_path / "other", config)
    with pytest.raises(ConfigError, match="same shape"):
        build_energy(energy_started_from(dataclasses.replace(PLAIN, network=EnergyConfig(channels=6)), first), 3, first)


# -- the command -------------------------------------------------------------------------------------

FILES = ["README.md", "bank.png", "chains.png", "config.json", "curves.csv", "curves.png", "model.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "a"
    path.mkdir(parents=True)
    for i, image in enumerate(smooth_images(24, 8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{i:02}.png")
    return path.parent


@pytest.fixture
def small(tmp_path: Path) -> Path:
    fields = {"network": {"channels": 4}, "steps": 6, "batch_size": 4, "langevin_steps": 2, "decay_at": [4]}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(fields))
    return path


def run(*arguments: Any) -> int:
    return cli.main(["train", "energy", "--quiet", "--chain-steps", "4", *map(str, arguments)])


def details_of(path: Path) -> dict[str, Any]:
    details: dict[str, Any] = json.loads((path / "config.json").read_text())["details"]
    return details


def test_from_a_folder_to_a_model_with_its_card(folder, small, tmp_path, capsys):
    out = tmp_path / "energy"
    arguments = ("--data", folder, "--config", small, "--count", 16, "--licence", "mine", "--note", "A note.")
    assert run(*arguments, "--out", out) == 0
    assert sorted(p.name for p in out.iterdir()) == FILES
    energy = pretrained.load(out, kind="energy")
    assert energy.config == EnergyConfig(channels=4)
    assert energy.name == "energy"
    details = details_of(out)
    assert details["train"]["steps"] == 6
    assert details["train"]["decay_at"] == [4]
    assert len(details["indices"]) == 16
    assert [row["steps"] for row in details["chains"]] == [4]
    card = (out / "README.md").read_text()
    for word in ("A note.", "mine", "16 of 24 images", "2 an update", "6 updates of 4 images", "![", "--indices"):
        assert word in card, word
    assert str(tmp_path) not in card + json.dumps(details)
    assert "4 steps on: moved" in capsys.readouterr().out
    # a denoiser's place does not take it, and says what it is
    with pytest.raises(CheckpointError, match=r"must hold a denoiser. Got an energy model"):
        pretrained.load(out)
    # again, from its own card
    assert (
        run(
            "--data",
            folder,
            "--config",
            out / "config.json",
            "--indices",
            out / "config.json",
            "--out",
            tmp_path / "again",
        )
        == 0
    )
    assert same(weights(energy), weights(pretrained.load(tmp_path / "again", kind="energy")))


def test_chains_that_run_away_do_not_cost_the_checkpoint(folder, small, tmp_path, monkeypatch, capsys):
    def steep(*arguments: Any, **options: Any) -> Any:
        energy, record = train_energy(*arguments, **options)
        energy.readout.weight.data.mul_(1e6)
        return energy, record

    monkeypatch.setattr("purifyloader.train.energy.task.train_energy", steep)
    out = tmp_path / "energy"
    assert run("--data", folder, "--config", small, "--out", out) == 0
    assert details_of(out)["chains"] == []
    card = (out / "README.md").read_text()
    assert "long chains run away within 4 Langevin steps" in card
    assert "![Images, and chains" not in card
    assert pretrained.load(out, kind="energy").config == EnergyConfig(channels=4)


def test_options_replace_fields(folder, small, tmp_path):
    arguments = ("--data", folder, "--config", small, "--steps", 3, "--channels", 5, "--langevin-steps", 1)
    assert run(*arguments, "--batch-size", 2, "--rejuvenation", 0, "--out", tmp_path / "energy") == 0
    train_ = details_of(tmp_path / "energy")["train"]
    assert (train_["steps"], train_["network"]["channels"], train_["langevin_steps"]) == (3, 5, 1)
    assert (train_["batch_size"], train_["rejuvenation"], train_["decay_at"]) == (2, 0, [2])
    start = ("--data", folder, "--config", small, "--channels", 5, "--start-from", tmp_path / "energy")
    assert run(*start, "--out", tmp_path / "longer") == 0
    assert "the weights of `energy`" in (tmp_path / "longer/README.md").read_text()


@pytest.mark.parametrize("network", [3, None, True, [], "wide"])
@pytest.mark.parametrize("options", [[], ["--channels", 5], ["--start-from", "cifar10-energy"]], ids=str)
def test_a_network_that_is_none_is_refused(network, options, folder, tmp_path, capsys):
    (tmp_path / "bad.json").write_text(json.dumps({"network": network}))
    assert run("--data", folder, "--config", tmp_path / "bad.json", "--out", tmp_path / "energy", *options) == 2
    assert f"network must be an object of its fields. Got {network!r}" in capsys.readouterr().err
    assert not (tmp_path / "energy").exists()


def configured(tmp_path: Path, fields: Any, *options: str) -> EnergyTrainConfig:
    """What the command makes of a file and options."""
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    arguments = ["--data", "x", "--out", "y", "--config", str(tmp_path / "fields.json"), *options]
    return command.configuration(cli.parse(["train", "energy", *arguments])[2], 3, torch.device("cpu"))[0]


def test_fields_and_options_are_judged_together(tmp_path):
    light = energy_recipe("light")
    got = configured(tmp_path, {"bank_size": 16}, "--batch-size", "4")  # too small for the batch of the recipe
    assert got == dataclasses.replace(light, bank_size=16, batch_size=4)
    with pytest.raises(ConfigError, match=r"bank_size .* 32, .*Got 16"):
        configured(tmp_path, {"bank_size": 16})
    assert configured(tmp_path, {"paired": True}, "--preset", "published").paired


@pytest.mark.parametrize(
    ("fields", "options", "wanted"),
    [
        ({}, [], (3_000, 4_250)),
        ({"steps": 500}, [], (300, 425)),
        ({"steps": 500}, ["--steps", "50"], (30, 42)),
        ({"decay_at": [40]}, [], (40,)),
        ({"decay_at": [40]}, ["--steps", "500"], (4,)),
        ({"decay_at": [40], "steps": 100}, ["--steps", "10"], (4,)),
        ({"decay_at": []}, ["--steps", "10"], ()),
    ],
    ids=str,
)
def test_the_steps_at_which_the_rate_falls_move_along(fields, options, wanted, tmp_path):
    assert configured(tmp_path, fields, *options).decay_at == wanted


STRANGE = [None, True, 3, -1, 0, 2.5, 1e400, "x", [], [1], ["x"], [[1]], {}, {"x": 1}, {"channels": "x"}, 10**30]


@pytest.mark.parametrize("options", [[], ["--channels", "4"], ["--steps", "5"], ["--batch-size", "4"]], ids=str)
@pytest.mark.parametrize("name", [*(field.name for field in dataclasses.fields(EnergyTrainConfig)), "nonsense"])
def test_any_file_is_taken_or_refused(name, options, tmp_path):
    for value in STRANGE:
        for fields in ({name: value}, {"details": {"train": {name: value}}}):
            with contextlib.suppress(ConfigError, InputError):
                configured(tmp_path, fields, *options)


def test_the_plan(folder, small, capsys):
    assert run("--data", folder, "--config", small, "--estimate") == 0
    printed = capsys.readouterr().out
    assert "parameters" in printed
    assert "6 of 4 images" in printed


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--langevin-steps", "0"], "steps is the number of Langevin steps"),
        (["--batch-size", "200"], "bank needs a sample for each image"),
        (["--start-from", "cifar10-sparse"], "an energy model"),
        (["--start-from", "nowhere"], "nowhere"),
        (["--config", "nowhere.json"], "--config must be"),
        (["--chain-steps", "-1"], "--chain-steps"),
        (["--out", "OUT/a-file"], "Got the file"),
    ],
)
def test_what_is_refused_before_the_first_step(options, word, folder, small, tmp_path, capsys):
    (tmp_path / "a-file").touch()
    options = [option.replace("OUT", str(tmp_path)) for option in options]
    given = options if "--config" in options else ["--config", str(small), *options]
    assert run("--data", folder, "--out", tmp_path / "energy", *given) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "energy").exists()


def test_two_runs_in_one_folder_are_refused(folder, small, tmp_path, capsys):
    out = tmp_path / "energy"
    arguments = ["train", "energy", "--data", folder, "--config", small, "--steps", 100_000, "--out", out, "--quiet"]
    first = subprocess.Popen(
        [sys.executable, "-m", "purifyloader", *map(str, arguments)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        lock = out / f".{STATE_FILE}.lock"
        deadline = time.monotonic() + 60
        while not lock.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        assert run("--data", folder, "--config", small, "--out", out) == 2
        assert "another process is training now" in capsys.readouterr().err
    finally:
        first.kill()
        first.wait()
    # a lock that a killed process has left is nobody's
    assert run("--data", folder, "--config", small, "--out", out) in (0, 2)
    assert "another process" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [STATE_FILE, "bank.png"])
def test_what_killed_saves_have_left_is_removed(name, folder, small, tmp_path):
    """Also where the kills were in more than one of them; but nothing that is somebody else's."""
    out = tmp_path / "energy"
    arguments = ["--data", str(folder), "--config", str(small), "--out", str(out), "--save-every", "0"]
    for i in range(2):
        leftovers = set(out.glob(".*.tmp"))
        child = Run(stuck_in_writing, name, arguments, outcome=tmp_path / f"outcome{i}")
        deadline = time.monotonic() + 60
        while child.alive and not (tmp_path / "stuck").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert child.kill(), "It has ended before it could be killed."
        (tmp_path / "stuck").unlink()
        left = set(out.glob(".*.tmp"))
        assert len(left) == 1, "The kill before has left something."
        assert left != leftovers
    (out / ".notes.tmp").touch()
    (out / f"{name}.tmp").touch()
    with Lock(out, STATE_FILE):  # of a run that may be writing
        assert run(*arguments) == 2
    assert set(out.glob(".*.tmp")) == left | {out / ".notes.tmp"}
    assert run(*arguments) == 0
    assert sorted(p.name for p in out.iterdir()) == sorted([".notes.tmp", f"{name}.tmp", *FILES])


def stuck_in_writing(name: str, arguments: list[str]) -> None:
    """In a child: the command, which stops for good when a file has been written and not yet renamed."""
    replace = os.replace

    def never(source: Any, target: Any) -> None:
        if Path(target).name == name:
            (Path(arguments[5]).parent / "stuck").touch()
            time.sleep(600)
        replace(source, target)

    os.replace = never
    loop._SAVING_SHARE = math.inf
    run(*arguments)


def test_two_launched_processes_and_one_card(folder, small, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
         "-m", "purifyloader", "train", "energy", "--quiet", "--chain-steps", "2", "--data", folder, "--config", small,
         "--device", "cpu", "--out", tmp_path / "two"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 updates") == 1
    assert run("--data", folder, "--config", small, "--out", tmp_path / "one") == 0
    one, two = (details_of(tmp_path / name) for name in ("one", "two"))
    assert (one["indices"], one["train"]) == (two["indices"], two["train"])
    assert (one["record"]["processes"], two["record"]["processes"]) == (1, 2)
    assert "in 2 processes" in (tmp_path / "two/README.md").read_text()


@pytest.mark.gpu
def test_a_run_stopped_on_a_gpu_goes_on(tmp_path):
    config = dataclasses.replace(PAIRED, dtype="bfloat16")
    whole, _ = train(tmp_path / "whole", config, device="cuda")
    with pytest.raises(Stop):
        train(tmp_path / "part", config, device="cuda", save_every=0, on_step=stopping_after(5))
    again, _ = train(tmp_path / "part", config, device="cuda")
    assert distance(weights(whole), weights(again)) < 1e-3


def test_a_denoiser_is_no_energy_model(tmp_path):
    pretrained.save(tiny_denoiser(), tmp_path / "denoiser", name="denoiser")
    with pytest.raises(CheckpointError, match=r"must hold an energy model. Got a denoiser"):
        pretrained.load(tmp_path / "denoiser", kind="energy")
