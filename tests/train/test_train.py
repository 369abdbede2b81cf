"""Sparse training: to the same weights after any stop, in any number of processes and parts of a batch."""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
import os
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.devices import exact_arithmetic
from purifyloader.diffusion.objective import sigma_loss
from purifyloader.diffusion.psnr import jpeg_psnr, psnr
from purifyloader.diffusion.unet import UNetConfig
from purifyloader.errors import CheckpointError, ConfigError, InputError, PurifyError, TrainingError
from purifyloader.train import TrainConfig, started_from, train_denoiser
from purifyloader.train.denoiser import task as loop
from purifyloader.train.denoiser.curves import (
    CURVES_CSV,
    CURVES_PNG,
    SAMPLES_PNG,
    Curves,
    overfitting,
    validation_levels,
)
from purifyloader.train.denoiser.task import batch_indices, build_denoiser, draw_sigma, learning_rate
from purifyloader.train.state import STATE_FILE, identity, load_state, save_state, tidy
from tests.conftest import random_images, tiny_denoiser
from tests.purified.faults import Run

TINY = UNetConfig.small(channels=8, multipliers=(1, 2), norm_groups=4)
SIGMA = TrainConfig(
    objective="sigma",
    parameterization="edm",
    time="log-sigma",
    network=TINY,
    steps=8,
    batch_size=4,
    learning_rate=1e-3,
    replicate=1,
)
HYBRID = dataclasses.replace(SIGMA, objective="hybrid", parameterization="epsilon", time="timestep", timesteps=100)
LEARNED = dataclasses.replace(HYBRID, network=dataclasses.replace(TINY, learned_variance=True))
ALL = dataclasses.replace(
    LEARNED,
    schedule="linear",
    max_timestep=60,
    warmup=3,
    decay_steps=4,
    decay="cosine",
    weight_decay=0.01,
    augment=("flip", "crop", "rotate", "mixup"),
    patch_size=8,
)
IMAGES = random_images(10, 8)
WIDE = random_images(10, 12)  # patches have somewhere to go


def smooth_images(count: int, size: int = 8, seed: int = 0) -> Tensor:
    """Blurred noise: images with something to learn."""
    coarse = random_images(count, size // 4, seed).float()
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").round().clamp(0, 255).to(torch.uint8)


def weights(denoiser: torch.nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in denoiser.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two weights."""
    assert set(a) == set(b)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def rows(folder: Path) -> list[dict[str, str]]:
    """curves.csv, without what a clock has measured."""
    with open(folder / CURVES_CSV, newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    for row in found:
        row.pop("seconds")
    return found


def header_of(folder: Path, config: TrainConfig, images: Tensor) -> dict[str, Any]:
    return load_state(folder / STATE_FILE, identity(config, images))[0]


class Stop(Exception):
    pass


def stopping_after(step: int) -> Callable[[int, float], None]:
    def on_step(done: int, loss: float) -> None:
        if done == step:
            raise Stop

    return on_step


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of a run this short, and are looked at elsewhere."""
    monkeypatch.setattr(loop.pictures.Curves, "write_picture", lambda *_: None)
    monkeypatch.setattr(loop.pictures, "write_samples", lambda *_: None)


@pytest.fixture
def saving_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state at each step, however long writing takes: with save_every=0."""
    monkeypatch.setattr(loop, "_SAVING_SHARE", math.inf)


# -- a stop ------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[TrainConfig, dict[str, Any]]] = {
    "sigma": (SIGMA, {}),
    "hybrid": (HYBRID, {}),
    "learned variance": (LEARNED, {}),
    "validated": (SIGMA, {"validation": random_images(3, 8, seed=1), "validate_every": 2}),
    "in parts": (HYBRID, {"micro_batch": 3}),
    "augmented": (dataclasses.replace(SIGMA, augment=("flip", "crop", "rotate", "mixup")), {}),
    "all": (ALL, {"validation": random_images(3, 12, seed=1), "validate_every": 3, "micro_batch": 3}),
    "bfloat16": (dataclasses.replace(SIGMA, dtype="bfloat16"), {}),
    "no average": (dataclasses.replace(SIGMA, ema_decay=0.0), {}),
}


@pytest.mark.usefixtures("saving_always", "no_pictures")
@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_ends_with_the_same_weights_and_curves(name, tmp_path):
    config, options = RUNS[name]
    images = WIDE if config.patch_size else IMAGES
    options = {**options, "progress": False}
    whole, record = train_denoiser(images, tmp_path / "whole", config, **options)
    done: list[int] = []
    for step in (3, 6):
        with pytest.raises(Stop):
            train_denoiser(images, tmp_path / "part", config, save_every=0, on_step=stopping_after(step), **options)
        assert header_of(tmp_path / "part", config, images)["step"] == step - 1
    again, record2 = train_denoiser(
        images, tmp_path / "part", config, on_step=lambda step, loss: done.append(step), **options
    )
    assert done == [6, 7, 8]
    assert same(weights(whole), weights(again))
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")
    for record_ in (record, record2):
        record_.pop("seconds"), record_.pop("peak_memory")
    assert record == record2
    assert record["steps"] == 8


@pytest.mark.usefixtures("saving_always")
def test_a_run_with_dropout_goes_on_too(tmp_path):
    config = dataclasses.replace(SIGMA, network=dataclasses.replace(TINY, dropout=0.5))
    whole, _ = train_denoiser(IMAGES, tmp_path / "whole", config, progress=False)
    with pytest.raises(Stop):
        train_denoiser(IMAGES, tmp_path / "part", config, save_every=0, on_step=stopping_after(4), progress=False)
    again, _ = train_denoiser(IMAGES, tmp_path / "part", config, progress=False)
    assert same(weights(whole), weights(again))


def test_a_run_that_is_done_is_not_done_again(tmp_path):
    first, _ = train_denoiser(IMAGES, tmp_path, SIGMA, progress=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again, record = train_denoiser(
        IMAGES, tmp_path, SIGMA, progress=False, on_step=lambda *_: pytest.fail("It takes a step.")
    )
    assert same(weights(first), weights(again))
    assert record["steps"] == 8
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path):
    train_denoiser(IMAGES, tmp_path / "part", dataclasses.replace(SIGMA, steps=5), progress=False)
    longer, _ = train_denoiser(IMAGES, tmp_path / "part", SIGMA, progress=False)
    whole, _ = train_denoiser(IMAGES, tmp_path / "whole", SIGMA, progress=False)
    assert same(weights(longer), weights(whole))


def test_fewer_steps_than_are_done_are_refused_or_said(tmp_path):
    """Not a record that says one length and a configuration that says another."""
    train_denoiser(IMAGES, tmp_path, SIGMA, progress=False)
    try:
        _, record = train_denoiser(IMAGES, tmp_path, dataclasses.replace(SIGMA, steps=5), progress=False)
    except PurifyError as error:
        assert "Got" in str(error)  # noqa: PT017
    else:
        assert record["steps"] == 5


@pytest.mark.usefixtures("no_pictures")
def test_validation_changes_no_weights(tmp_path):
    held_out = random_images(4, 8, seed=1)
    without, _ = train_denoiser(IMAGES, tmp_path / "a", LEARNED, progress=False)
    validated, _ = train_denoiser(
        IMAGES, tmp_path / "b", LEARNED, progress=False, validation=held_out, validate_every=3
    )
    assert same(weights(without), weights(validated))


def test_torchs_own_generator_is_left_alone(tmp_path):
    torch.manual_seed(1)
    want = torch.rand(1)
    torch.manual_seed(1)
    config = dataclasses.replace(ALL, steps=2)
    train_denoiser(WIDE, tmp_path, config, progress=False, validation=WIDE[:2], validate_every=2)
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_other_gpu_is_seeded(dropout, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("It seeds all GPUs."))
    before = torch.random.get_rng_state()
    config = dataclasses.replace(SIGMA, steps=2, network=dataclasses.replace(TINY, dropout=dropout))
    train_denoiser(IMAGES, tmp_path, config, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 5, -5, 2**62, -(2**63), 2**63 - 1])
def test_seeds_draw_what_torch_draws_with_them(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        want = torch.rand(3)
    with loop.seeded(seed, torch.device("cpu")):
        assert torch.equal(torch.rand(3), want)


@pytest.mark.gpu
def test_a_gpus_generator_is_seeded_and_left_where_it_was():
    device = torch.device("cuda", 0)
    torch.cuda.manual_seed(3)
    want = torch.rand(3, device=device)
    before = torch.cuda.get_rng_state(device)
    with loop.seeded(3, device):
        assert torch.equal(torch.rand(3, device=device), want)
    assert torch.equal(torch.cuda.get_rng_state(device), before)


# -- kills -------------------------------------------------------------------------------------------


def in_a_process(folder: Path, config: TrainConfig, options: dict[str, Any], pictures: bool) -> float:
    """In a child: a run that saves a state whenever it can; then its weights beside it."""
    loop._SAVING_SHARE = 0.5
    if not pictures:
        loop.pictures.Curves.write_picture = lambda *_: None  # type: ignore[method-assign]
    denoiser, record = train_denoiser(WIDE, folder, config, save_every=0.0, progress=False, **options)
    torch.save(weights(denoiser), folder / "weights.pt")
    return float(record["loss"])


def saving_for_ever(folder: Path) -> None:
    """In a child: one state after the other, of some megabytes."""
    groups = {"model": {"weight": torch.zeros(5_000_000)}}
    while True:
        save_state(folder / STATE_FILE, {"step": 1}, groups)


def test_what_a_killed_save_leaves_is_known_by_its_name(tmp_path: Path):
    """Wherever in it the kill was; so that the next run removes it."""
    folder = tmp_path / "run"
    for i in range(4):
        child = Run(saving_for_ever, folder, outcome=tmp_path / f"outcome{i}")
        while child.alive and not list(folder.glob(".*")):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        assert child.kill()
    left = {path.name for path in folder.iterdir()}
    assert all(re.fullmatch(rf"(\.{re.escape(STATE_FILE)}\..*\.tmp|{re.escape(STATE_FILE)})", name) for name in left)
    assert left - {STATE_FILE}
    (folder / ".another.tmp").touch()
    tidy(folder, [STATE_FILE])
    assert {path.name for path in folder.iterdir()} == {".another.tmp", *({STATE_FILE} & left)}


def weights_in(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def test_a_killed_process_goes_on(tmp_path: Path):
    config = dataclasses.replace(ALL, steps=24)
    options = {"validation": random_images(2, 12, seed=1), "validate_every": 12, "micro_batch": 3}
    killed_until_done(tmp_path, config, options, 0.2, at_least=2, pictures=False)


@pytest.mark.slow
def test_a_process_is_killed_thirty_times(tmp_path: Path):
    config = dataclasses.replace(ALL, steps=600)
    options = {"validation": random_images(3, 12, seed=1), "validate_every": 50, "micro_batch": 3}
    killed_until_done(tmp_path, config, options, 0.6, at_least=30, pictures=True)


def killed_until_done(
    folder: Path, config: TrainConfig, options: dict[str, Any], seconds: float, at_least: int, pictures: bool
) -> None:
    """Kills a run at random moments after it has saved something new, `at_least` times."""
    rng = random.Random(time.time())

    def run_of(name: str, outcome: str) -> Run:
        return Run(in_a_process, folder / name, config, options, pictures, outcome=folder / outcome)

    state = folder / "killed" / STATE_FILE
    kills = 0
    while kills < at_least:
        before = state.stat().st_ino if state.exists() else None
        run = run_of("killed", f"outcome{kills}")
        while run.alive and (not state.exists() or state.stat().st_ino == before):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, seconds))
        if not run.kill():
            break
        kills += 1
        assert header_of(folder / "killed", config, WIDE)["step"] <= config.steps
    assert kills, "It has ended before it could be killed."
    for name in ("killed", "whole"):
        outcome = run_of(name, f"{name}.outcome").join()
        assert outcome.error is None, outcome.traceback
    assert same(weights_in(folder / "killed"), weights_in(folder / "whole"))
    assert rows(folder / "killed") == rows(folder / "whole")


# -- several processes -------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def as_rank(rank: int, world_size: int, port: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """In a child: `work` as one of several processes, joined by gloo as the command joins them."""
    from purifyloader.commands.training import processes

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with processes("cpu"):
        return work(*arguments)


def start_ranks(folder: Path, world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Run]:
    port = free_port()
    return [
        Run(as_rank, rank, world_size, port, work, *arguments, outcome=folder / f"rank{rank}-{port}")
        for rank in range(world_size)
    ]


def joined(folder: Path, config: TrainConfig, images: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """In a child: a run whose weights each process writes."""
    denoiser, record = train_denoiser(images, folder, config, progress=False, **options)
    torch.save(weights(denoiser), folder.with_name(f"weights-{os.environ['RANK']}.pt"))
    return record


def test_two_processes_give_the_weights_of_one(tmp_path: Path):
    config, images = ALL, WIDE
    options = {"micro_batch": 1, "validation": WIDE[:3], "validate_every": 8}
    whole, record = train_denoiser(images, tmp_path / "one", config, progress=False, **options)
    outcomes = [r.join(100) for r in start_ranks(tmp_path, 2, joined, tmp_path / "two", config, images, options)]
    for outcome in outcomes:
        assert outcome.error is None, outcome.traceback
    first, second = (torch.load(tmp_path / f"weights-{r}.pt", weights_only=True) for r in range(2))
    assert same(first, second)
    assert distance(first, weights(whole)) < 1e-2 * config.learning_rate
    assert [o.value["processes"] for o in outcomes] == [2, 2]
    assert [o.value["loss"] for o in outcomes] == pytest.approx([record["loss"]] * 2, rel=1e-5)
    assert len(rows(tmp_path / "two")) == len(rows(tmp_path / "one"))


def test_the_death_of_one_process_stops_the_other_and_both_go_on(tmp_path: Path):
    config = dataclasses.replace(SIGMA, steps=3000)
    state = tmp_path / "run" / STATE_FILE
    runs = start_ranks(tmp_path, 2, joined, tmp_path / "run", config, IMAGES, {"save_every": 0.0})
    deadline = time.monotonic() + 60
    while not state.exists() and all(run.alive for run in runs) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert runs[1].kill()
    outcome = runs[0].join(60)
    assert outcome.error is not None
    done = header_of(tmp_path / "run", config, IMAGES)["step"]
    assert 0 < done < 3000
    config = dataclasses.replace(config, steps=done + 3)
    for run in start_ranks(tmp_path, 2, joined, tmp_path / "run", config, IMAGES, {}):
        outcome = run.join(100)
        assert outcome.error is None, outcome.traceback
    whole, _ = train_denoiser(IMAGES, tmp_path / "whole", config, progress=False)
    got = torch.load(tmp_path / "weights-0.pt", weights_only=True)
    assert distance(got, weights(whole)) < 0.2 * config.learning_rate


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path: Path):
    config = dataclasses.replace(SIGMA, batch_size=5)
    for run in start_ranks(tmp_path, 2, joined, tmp_path / "run", config, IMAGES, {}):
        outcome = run.join(100)
        assert outcome.purify_error, outcome.traceback
        assert "multiple of the number of processes, 2" in outcome.message
        assert "Got 5" in outcome.message
    assert not (tmp_path / "run").exists()


# -- parts of a batch, arithmetic --------------------------------------------------------------------


@pytest.mark.parametrize("config", [SIGMA, ALL], ids=["sigma", "all"])
@pytest.mark.parametrize("part", [1, 3])
def test_a_batch_in_parts_gives_the_same_weights(config, part, tmp_path):
    images = WIDE if config.patch_size else IMAGES
    whole, record = train_denoiser(images, tmp_path / "a", config, progress=False)
    parts, record2 = train_denoiser(images, tmp_path / "b", config, progress=False, micro_batch=part)
    assert distance(weights(whole), weights(parts)) < 1e-2 * config.learning_rate
    assert record2["loss"] == pytest.approx(record["loss"], rel=1e-5)


def test_parts_of_a_batch_hold_no_more_images_at_once(tmp_path, monkeypatch):
    seen = Counter()
    original = loop.sigma_loss

    def counting(denoiser, x0, *arguments):
        seen[len(x0)] += 1
        return original(denoiser, x0, *arguments)

    monkeypatch.setattr(loop, "sigma_loss", counting)
    config = dataclasses.replace(SIGMA, batch_size=8, steps=2)
    train_denoiser(IMAGES, tmp_path, config, progress=False, micro_batch=3)
    assert seen == {3: 4, 2: 2}


@pytest.mark.parametrize("config", [SIGMA, LEARNED], ids=["sigma", "hybrid"])
def test_bfloat16_is_near_float32_and_keeps_float32_weights(config, tmp_path):
    single, record = train_denoiser(IMAGES, tmp_path / "a", config, progress=False)
    half, record2 = train_denoiser(
        IMAGES, tmp_path / "b", dataclasses.replace(config, dtype="bfloat16"), progress=False
    )
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert not same(weights(single), weights(half))
    assert record2["loss"] == pytest.approx(record["loss"], rel=0.02)
    groups = load_state(tmp_path / "b" / STATE_FILE, identity(dataclasses.replace(config, dtype="bfloat16"), IMAGES))[1]
    assert {v.dtype for group in groups.values() for v in group.values()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_network_is_near_an_eager_one(tmp_path):
    config = dataclasses.replace(SIGMA, steps=4)
    eager, record = train_denoiser(IMAGES, tmp_path / "a", config, progress=False)
    compiled, record2 = train_denoiser(
        IMAGES, tmp_path / "b", dataclasses.replace(config, compile=True), progress=False
    )
    assert set(weights(compiled)) == set(weights(eager))
    assert record2["loss"] == pytest.approx(record["loss"], rel=1e-3)
    assert distance(weights(eager), weights(compiled)) < config.learning_rate
    # and it goes on
    again, _ = train_denoiser(
        IMAGES, tmp_path / "b", dataclasses.replace(config, compile=True, steps=6), progress=False
    )
    assert all(bool(p.isfinite().all()) for p in again.parameters())


# -- the optimiser, against numpy --------------------------------------------------------------------


def test_every_step_is_adamw_with_clipped_gradients(tmp_path):
    """The same run in numpy float64, from the gradients that torch gives: rate, clipping, decay and average."""
    config = dataclasses.replace(
        SIGMA, steps=6, learning_rate=2e-3, warmup=2, decay_steps=3, weight_decay=0.1, clip_norm=0.35, ema_decay=0.25
    )
    losses: list[float] = []
    got, _ = train_denoiser(IMAGES, tmp_path, config, progress=False, on_step=lambda step, loss: losses.append(loss))
    denoiser = build_denoiser(config).train()
    parameters = dict(denoiser.named_parameters())
    w = {n: p.detach().double().numpy().copy() for n, p in parameters.items()}
    average = copy.deepcopy(w)
    m = {n: np.zeros_like(v) for n, v in w.items()}
    v = {n: np.zeros_like(x) for n, x in w.items()}
    norms = []
    for step, scale in enumerate((0.5, 1.0, 1.0, 1.0, 2 / 3, 1 / 3)):
        chosen = batch_indices(config, len(IMAGES), step)
        keys = noise.image_keys(config.seed, step, range(4))
        x0, z = IMAGES[chosen].float() / 255, noise.normal(keys, (3, 8, 8), 1)
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(torch.from_numpy(w[n]))
        loss = sigma_loss(denoiser, x0, draw_sigma(config, keys), z).mean()
        assert losses[step] == pytest.approx(float(loss.detach()), rel=1e-4)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        g = {n: x.double().numpy() for n, x in zip(w, gradients, strict=True)}
        norms.append(math.sqrt(sum(float((x**2).sum()) for x in g.values())))
        rate = scale * config.learning_rate
        decay = min(0.25, (1 + step) / (10 + step))
        for n in w:
            clipped = g[n] * min(1.0, config.clip_norm / norms[-1])
            m[n] = 0.9 * m[n] + 0.1 * clipped
            v[n] = 0.999 * v[n] + 0.001 * clipped**2
            update = (m[n] / (1 - 0.9 ** (step + 1))) / (np.sqrt(v[n] / (1 - 0.999 ** (step + 1))) + 1e-8)
            w[n] = w[n] * (1 - rate * config.weight_decay) - rate * update
            average[n] = decay * average[n] + (1 - decay) * w[n]
    assert min(norms) < config.clip_norm < max(norms)
    found = rows(tmp_path)
    np.testing.assert_allclose([float(r["gradient_norm"]) for r in found], norms, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        [float(r["learning_rate"]) for r in found], 2e-3 * np.array([0.5, 1, 1, 1, 2 / 3, 1 / 3]), rtol=1e-9
    )
    named = weights(got)
    assert max(float(np.abs(named[n].numpy() - average[n]).max()) for n in w) < 1e-2 * config.learning_rate
    assert max(float(np.abs(named[n].numpy() - w[n]).max()) for n in w) > 0.1 * config.learning_rate  # not the last


def test_the_average_against_numpy(tmp_path):
    """From the raw weights after each step, which ema_decay=0 gives."""
    config = dataclasses.replace(SIGMA, ema_decay=0.2, steps=5)
    raw = []
    for n in range(1, 6):
        shorter = dataclasses.replace(config, ema_decay=0.0, steps=n)
        raw.append(weights(train_denoiser(IMAGES, tmp_path / str(n), shorter, progress=False)[0]))
    got, _ = train_denoiser(IMAGES, tmp_path / "average", config, progress=False)
    want = {k: v.double().numpy() for k, v in weights(build_denoiser(config)).items()}
    for n, now in enumerate(raw):
        decay = min(0.2, (1 + n) / (10 + n))
        want = {k: decay * want[k] + (1 - decay) * now[k].double().numpy() for k in want}
    for k, value in weights(got).items():
        np.testing.assert_allclose(value.numpy(), want[k], atol=1e-6)
    groups = load_state(tmp_path / "5" / STATE_FILE, identity(shorter, IMAGES))[1]
    assert same(groups["model"], raw[-1])
    assert not same(weights(got), raw[-1])
    assert not got.training
    assert not any(p.requires_grad for p in got.parameters())


def test_learning_rates():
    config = dataclasses.replace(SIGMA, steps=100, warmup=10, decay_steps=20, learning_rate=1.0)
    rates = [learning_rate(config, s) for s in range(100)]
    np.testing.assert_allclose(rates[:11], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1])
    assert set(rates[9:81]) == {1.0}
    np.testing.assert_allclose(rates[80:], np.arange(20, 0, -1) / 20)
    cosine = dataclasses.replace(config, decay="cosine")
    np.testing.assert_allclose(
        [learning_rate(cosine, s) for s in range(80, 100)], (1 + np.cos(np.pi * np.arange(20) / 20)) / 2, atol=1e-12
    )
    assert all(learning_rate(dataclasses.replace(config, warmup=0, decay_steps=0), s) == 1 for s in (0, 50, 99))
    whole = dataclasses.replace(config, warmup=100, decay_steps=100)
    assert max(learning_rate(whole, s) for s in range(100)) == pytest.approx(0.255, abs=0.001)


# -- what is drawn -----------------------------------------------------------------------------------


def test_epochs_show_every_image_equally_often():
    config = dataclasses.replace(SIGMA, batch_size=4, replicate=1)
    count = 10  # an epoch is 20 images: 5 batches
    seen = Counter(int(i) for step in range(5) for i in batch_indices(config, count, step))
    assert seen == dict.fromkeys(range(count), 2)
    epochs = [[batch_indices(config, count, s).tolist() for s in range(e, e + 5)] for e in (0, 5)]
    assert epochs[0] != epochs[1]
    # a batch larger than an epoch, and one across two
    larger = dataclasses.replace(config, batch_size=64, replicate=0)
    assert Counter(batch_indices(larger, 32, 3).tolist()) == dict.fromkeys(range(32), 2)
    across = dataclasses.replace(config, batch_size=8, replicate=0)
    seen = Counter(int(i) for step in range(5) for i in batch_indices(across, 10, step))
    assert seen == dict.fromkeys(range(10), 4)


def test_noise_levels_follow_their_distribution():
    config = dataclasses.replace(SIGMA, sigma_range=(0.001, 0.3), sigma_center=0.06, sigma_spread=1.1)
    sigma = draw_sigma(config, noise.image_keys(0, 0, range(20000)))
    assert float(sigma.min()) >= 0.001
    assert float(sigma.max()) <= 0.3
    ends = (np.log([0.001, 0.3]) - np.log(0.06)) / 1.1
    assert stats.kstest((sigma.log().numpy() - np.log(0.06)) / 1.1, stats.truncnorm(*ends).cdf).pvalue > 1e-3


@pytest.mark.parametrize("top", [None, 40])
def test_timesteps_are_drawn_evenly_up_to_the_highest(top, tmp_path, monkeypatch):
    """And the variational sum is told their number."""
    config = dataclasses.replace(LEARNED, max_timestep=top, batch_size=500, steps=8)
    drawn: list[int] = []
    numbers: set[int] = set()
    original = loop.hybrid_loss

    def noting(denoiser, x0, t, z, gamma, schedule, timesteps):
        drawn.extend(t.tolist())
        numbers.add(timesteps)
        # a few images are enough for the rest of the step
        return original(denoiser, x0[:2], t[:2], z[:2], gamma, schedule, timesteps)

    monkeypatch.setattr(loop, "hybrid_loss", noting)
    denoiser, _ = train_denoiser(IMAGES, tmp_path, config, progress=False)
    most = top or 100
    assert numbers == {most}
    counts = np.bincount(drawn, minlength=most + 1)
    assert len(counts) == most + 1
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 1e-3
    schedule = config.noise_schedule()
    assert denoiser.sigma_range == pytest.approx([float(schedule.sigma(t)) for t in (1, most)])


def test_the_noise_is_normal_and_new_at_each_step_and_position(tmp_path, monkeypatch):
    seen: list[Tensor] = []
    original = loop.sigma_loss

    def noting(denoiser, x0, sigma, z):
        seen.append(z)
        return original(denoiser, x0, sigma, z)

    monkeypatch.setattr(loop, "sigma_loss", noting)
    train_denoiser(IMAGES, tmp_path, dataclasses.replace(SIGMA, batch_size=16), progress=False)
    z = torch.cat(seen).flatten(1)
    assert stats.kstest(z.flatten().numpy(), stats.norm.cdf).pvalue > 1e-3
    correlation = np.corrcoef(z.numpy()) - np.eye(len(z))
    assert np.abs(correlation).max() < 6 / math.sqrt(z.shape[1])


def test_the_seed_decides_weights_and_noise(tmp_path):
    first, _ = train_denoiser(IMAGES, tmp_path / "a", SIGMA, progress=False)
    again, _ = train_denoiser(IMAGES, tmp_path / "b", SIGMA, progress=False)
    other, _ = train_denoiser(IMAGES, tmp_path / "c", dataclasses.replace(SIGMA, seed=1), progress=False)
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))
    assert not same(weights(build_denoiser(SIGMA)), weights(build_denoiser(dataclasses.replace(SIGMA, seed=1))))


# -- what is learned ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Path]:
    """A run that learns."""
    folder = tmp_path_factory.mktemp("healthy")
    config = dataclasses.replace(SIGMA, steps=120, batch_size=16, learning_rate=3e-3, ema_decay=0.9)
    held_out = smooth_images(24, seed=1)
    denoiser, record = train_denoiser(
        smooth_images(64), folder, config, validation=held_out, validate_every=40, progress=False
    )
    return denoiser, record, folder


def test_training_lowers_the_error_of_unseen_images_without_a_warning(healthy):
    denoiser, record, _ = healthy
    unseen = smooth_images(24, seed=2)
    untrained = build_denoiser(dataclasses.replace(SIGMA)).eval()
    assert psnr(denoiser, unseen, 0.1) > psnr(untrained, unseen, 0.1) + 1.5
    assert record["warnings"] == []
    assert record["steps"] == 120
    assert record["epochs"] == 30.0


def test_the_curves_hold_what_was_measured(healthy):
    denoiser, record, folder = healthy
    found = rows(folder)
    assert [int(r["step"]) for r in found] == list(range(1, 121))
    checks = [r for r in found if r["held_out_10px"]]
    assert [int(r["step"]) for r in checks] == [40, 80, 120]
    held_out, trained = smooth_images(24, seed=1), smooth_images(64)[::2][:24]
    for px in (10, 25, 50):
        assert float(checks[-1][f"held_out_{px}px"]) == pytest.approx(psnr(denoiser, held_out, px / 255), abs=1e-3)
        assert float(checks[-1][f"trained_{px}px"]) == pytest.approx(psnr(denoiser, trained, px / 255), abs=1e-3)
    assert float(checks[-1]["held_out_50px"]) > float(checks[0]["held_out_50px"]) + 1
    assert float(found[-1]["loss"]) == pytest.approx(record["loss"], abs=1e-6)
    assert float(found[-1]["epoch"]) == 30
    with Image.open(folder / CURVES_PNG) as image:
        assert min(image.size) > 300
    with Image.open(folder / SAMPLES_PNG) as image:
        # eight images in seven rows (clean; noised and denoised at three levels), each 8 px drawn eightfold
        assert image.size == (8 * 66 + 2, 7 * 66 + 2)
        top_left = np.asarray(image)[2:66:8, 2:66:8]
    np.testing.assert_array_equal(top_left, held_out[0].permute(1, 2, 0).numpy())


def test_the_running_mean_of_the_loss(tmp_path):
    losses: list[float] = []
    train_denoiser(IMAGES, tmp_path, SIGMA, progress=False, on_step=lambda step, loss: losses.append(loss))
    mean = losses[0]
    for row, loss in zip(rows(tmp_path), losses, strict=True):
        mean += 0.02 * (loss - mean)
        assert float(row["loss"]) == pytest.approx(mean, abs=1e-5)


@pytest.mark.usefixtures("no_pictures")
def test_memorising_a_few_images_is_warned_of(tmp_path, caplog):
    """Four images, a network that can learn them by heart."""
    config = dataclasses.replace(
        SIGMA,
        network=UNetConfig.small(channels=16, multipliers=(1, 2), norm_groups=4),
        steps=160,
        learning_rate=4e-3,
        ema_decay=0.9,
        sigma_center=0.2,
    )
    with caplog.at_level("WARNING"):
        _, record = train_denoiser(
            smooth_images(4), tmp_path, config, validation=smooth_images(4, seed=1), validate_every=40, progress=False
        )
    assert record["warnings"]
    assert any("held-out" in warning and warning.startswith("step ") for warning in record["warnings"])
    assert "held-out" in caplog.text
    assert "the best so far was at step" in caplog.text


@pytest.mark.parametrize(
    ("means", "word"),
    [
        ([(20.0, 20.0)], None),
        ([(20.0, 21.0), (22.0, 23.2), (23.0, 24.3)], None),  # both rise together
        ([(20.0, 21.0), (22.0, 23.0), (21.95, 23.1)], None),  # within what a check moves by
        ([(20.0, 21.0), (22.0, 23.0), (21.5, 22.4)], None),  # both fall: not memorising
        ([(20.0, 21.0), (22.0, 23.0), (21.8, 23.2)], "fallen by 0.20 dB"),
        ([(20.0, 21.0), (22.0, 23.7)], "0.70 dB away"),
        ([], None),
    ],
)
def test_what_is_called_overfitting(means, word):
    message = overfitting(means)
    assert (message is None) if word is None else (word in (message or ""))


def test_levels_of_validation_lie_in_the_range():
    assert validation_levels((0.001, 0.3)) == (10, 25, 50)
    assert validation_levels((0.001, 0.1)) == (10, 25)
    for low, high in ((0.0002, 0.03), (0.5, 2.0), (0.06, 0.11)):
        levels = validation_levels((low, high))
        assert len(levels) >= 2
        assert all(low <= px / 255 <= high for px in levels)


def test_rows_of_one_step_are_merged(tmp_path):
    curves = Curves()
    curves.add(step=1, seconds=0.5, loss=2.0)
    curves.add(step=2, seconds=0.6, loss=1.0)
    curves.add(step=2, held_out_10px=30.0)
    curves.write_csv(tmp_path)
    assert [r["loss"] for r in rows(tmp_path)] == ["2.0", "1.0"]
    assert [r["held_out_10px"] for r in rows(tmp_path)] == ["", "30.0"]
    assert [r["step"] for r in curves.validated()] == [2]


def test_the_columns_of_a_resumed_run_stand_where_they_stood(tmp_path):
    row = {"step": 1, "loss": 2.0, "held_out_10px": 3.0, "trained_10px": 3.0, "held_out_6.37px": 4.0, "seconds": 1.0}
    Curves([row]).write_csv(tmp_path)
    first = (tmp_path / CURVES_CSV).read_text()
    Curves([dict(sorted(row.items()))]).write_csv(tmp_path)
    assert (tmp_path / CURVES_CSV).read_text() == first
    assert first.splitlines()[0] == "step,seconds,loss,held_out_6.37px,held_out_10px,trained_10px"


# -- another denoiser's weights ----------------------------------------------------------------------


def test_training_starts_from_another_denoiser(tmp_path):
    start = tiny_denoiser()
    config = started_from(SIGMA, start)
    begun = build_denoiser(config, start=start)
    assert same(weights(begun), weights(start))
    trained, _ = train_denoiser(IMAGES, tmp_path, dataclasses.replace(config, steps=2), start=start, progress=False)
    assert 0 < distance(weights(trained), weights(start)) < 4 * SIGMA.learning_rate
    assert same(weights(start), weights(tiny_denoiser()))  # left alone


def test_a_learned_variance_is_added_halfway_between_the_bounds():
    start = tiny_denoiser(parameterization="epsilon")
    config = dataclasses.replace(LEARNED, time="log-sigma")
    denoiser = build_denoiser(started_from(config, start), start=start)
    x, sigma = torch.rand(2, 3, 8, 8), torch.tensor([0.05, 0.2])
    x0, fraction = denoiser.predict(x, sigma)
    torch.testing.assert_close(x0, start(x, sigma))
    assert fraction is not None
    torch.testing.assert_close(fraction, torch.full_like(fraction, 0.5))


def test_the_denoiser_to_start_from_must_be_the_one_that_is_named_and_fit():
    start, other = tiny_denoiser(), tiny_denoiser(seed=1)
    config = started_from(SIGMA, start)
    for wanted, given in ((config, None), (config, other), (SIGMA, start)):
        with pytest.raises(ConfigError, match=r"starts from .*Got"):
            build_denoiser(wanted, start=given)
    wider = dataclasses.replace(config, network=dataclasses.replace(TINY, channels=16))
    deeper = dataclasses.replace(config, network=dataclasses.replace(TINY, multipliers=(1, 2, 2)))
    for shape in (wider, deeper):
        with pytest.raises(ConfigError, match=r"of the same shape.* Got .*: give these"):
            build_denoiser(shape, start=start)
    with pytest.raises(ConfigError, match="Set parameterization='edm'"):
        build_denoiser(dataclasses.replace(config, parameterization="v"), start=start)


# -- what goes wrong ---------------------------------------------------------------------------------


def test_another_run_in_the_folder_is_refused(tmp_path):
    train_denoiser(IMAGES, tmp_path, SIGMA, progress=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for change in (
        {"learning_rate": 1e-4},
        {"seed": 1},
        {"augment": ("flip",)},
        {"network": dataclasses.replace(TINY, channels=16)},
    ):
        with pytest.raises(TrainingError, match=f"another {next(iter(change))}.*Got"):
            train_denoiser(IMAGES, tmp_path, dataclasses.replace(SIGMA, **change), progress=False)
    with pytest.raises(TrainingError, match="another set of images"):
        train_denoiser(random_images(10, 8, seed=1), tmp_path, SIGMA, progress=False)
    with pytest.raises(TrainingError, match="another set of images"):
        train_denoiser(IMAGES[:5], tmp_path, SIGMA, progress=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_a_damaged_state_is_named(keep, tmp_path):
    train_denoiser(IMAGES, tmp_path, dataclasses.replace(SIGMA, steps=2), progress=False)
    state = tmp_path / STATE_FILE
    state.write_bytes(state.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"training-state\.safetensors is not a whole"):
        train_denoiser(IMAGES, tmp_path, SIGMA, progress=False)


def blown_up(folder: Path, config: TrainConfig, images: Tensor, match: str) -> tuple[int, dict[str, Any]]:
    """The number of steps that were done, and the header of the state that is kept."""
    done: list[int] = []
    with pytest.raises(TrainingError, match=match) as caught:
        train_denoiser(
            images, folder, config, progress=False, save_every=0, on_step=lambda step, loss: done.append(step)
        )
    message = str(caught.value)
    assert f"at step {len(done) + 1}" in message
    assert "last good state is kept" in message
    assert "another output folder" in message
    header, groups = load_state(folder / STATE_FILE, identity(config, images))
    assert {"model", "average", "exp_avg", "exp_avg_sq"} == set(groups)
    assert all(bool(v.isfinite().all()) for group in groups.values() for v in group.values())
    # what the message promises
    kept, record = train_denoiser(images, folder, dataclasses.replace(config, steps=header["step"]), progress=False)
    assert record["steps"] == header["step"]
    assert same(weights(kept), groups["average"])
    return len(done), header


def blowing_up_after(step: int, rate: float) -> Callable[[TrainConfig, int], float]:
    """A learning rate that no network stands from some step on."""
    return lambda config, now: config.learning_rate if now < step else rate


@pytest.mark.usefixtures("saving_always")
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "learning_rate", blowing_up_after(3, 1e12))
    match = r"The loss became \S+ with a gradient of norm (nan|inf)"
    steps, header = blown_up(tmp_path, dataclasses.replace(SIGMA, clip_norm=1e30), IMAGES, match)
    assert (steps, header["step"]) == (4, 3)


@pytest.mark.usefixtures("saving_always")
def test_a_loss_that_runs_away_stops_and_keeps_a_state_from_before(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_SETTLED", 10)
    monkeypatch.setattr(loop, "learning_rate", blowing_up_after(30, 10.0))
    images = smooth_images(16)
    config = dataclasses.replace(SIGMA, learning_rate=3e-3, steps=60, ema_decay=0.5)
    match = r"The loss has run away, to \S+ from \S+ \(running means\),"
    steps, header = blown_up(tmp_path, config, images, match)
    assert header["step"] == 30
    assert 31 <= steps < 40
    kept, _ = train_denoiser(images, tmp_path, dataclasses.replace(config, steps=30), progress=False)
    assert psnr(kept, images, 0.1) > psnr(build_denoiser(config).eval(), images, 0.1)


@pytest.mark.usefixtures("saving_always")
def test_a_run_that_breaks_early_keeps_a_state_from_before_too(tmp_path, monkeypatch):
    """Weights whose loss is finite, and a thousand times what it was, are no good state."""
    monkeypatch.setattr(loop, "learning_rate", blowing_up_after(20, 10.0))
    config = dataclasses.replace(SIGMA, learning_rate=3e-3, steps=60)
    _, header = blown_up(tmp_path, config, smooth_images(16), "The loss")
    assert header["step"] == 20


@pytest.mark.usefixtures("saving_always")
@pytest.mark.parametrize("save_every", [0, math.inf])
def test_an_interrupt_of_a_run_that_breaks_keeps_the_last_good_state(save_every, tmp_path, monkeypatch, caplog):
    images = smooth_images(16)
    monkeypatch.setattr(loop, "learning_rate", blowing_up_after(20, 10.0))
    config = dataclasses.replace(SIGMA, learning_rate=3e-3, steps=60)
    train_denoiser(images, tmp_path, dataclasses.replace(config, steps=20), progress=False)

    def interrupt(step: int, loss: float) -> None:
        if step == 22:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_denoiser(images, tmp_path, config, progress=False, save_every=save_every, on_step=interrupt)
    assert header_of(tmp_path, config, images)["step"] == 20
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert re.match(r"step 2[12] is not saved", said[0])


@pytest.mark.parametrize(
    ("config", "device", "tf32"),
    [
        (SIGMA, "cpu", False),
        (SIGMA, "cuda", True),
        (dataclasses.replace(SIGMA, dtype="bfloat16"), "cuda", False),
    ],
    ids=str,
)
def test_what_a_gpu_makes_of_float32_is_known(config, device, tf32):
    assert loop._in_tf32(config, torch.device(device)) == tf32
    with exact_arithmetic(torch.device("cuda")):
        assert not loop._in_tf32(config, torch.device(device))


@pytest.mark.usefixtures("saving_always")
def test_a_run_that_breaks_before_a_check_says_so_too(tmp_path, monkeypatch):
    """Weights that are no longer finite, when they are to be measured and drawn."""
    monkeypatch.setattr(loop, "learning_rate", blowing_up_after(3, 1e38))
    with pytest.raises(TrainingError, match=r"at step \d+\. The last good state is kept"):
        train_denoiser(
            IMAGES,
            tmp_path,
            dataclasses.replace(SIGMA, clip_norm=1e30),
            progress=False,
            save_every=0,
            validation=IMAGES[:2],
            validate_every=4,
        )
    assert header_of(tmp_path, dataclasses.replace(SIGMA, clip_norm=1e30), IMAGES)["step"] == 3


def test_where_nothing_was_saved_nothing_is_said_to_be_kept(tmp_path):
    config = dataclasses.replace(SIGMA, learning_rate=1e30, clip_norm=1e30, steps=2)
    with pytest.raises(TrainingError) as caught:
        train_denoiser(IMAGES, tmp_path, config, progress=False)
    assert "is kept" not in str(caught.value)
    assert not (tmp_path / STATE_FILE).exists()


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
        train_denoiser(images, tmp_path, SIGMA, progress=False)
    with pytest.raises(InputError, match=r"uint8 tensor of shape \(N, C, H, W\)"):
        train_denoiser(IMAGES, tmp_path, SIGMA, progress=False, validation=images)
    assert not (tmp_path / STATE_FILE).exists()


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (dataclasses.replace(SIGMA, patch_size=9), {}),
        (SIGMA, {"micro_batch": 0}),
        (SIGMA, {"micro_batch": -1}),
        (SIGMA, {"micro_batch": 1.5}),
        (SIGMA, {"validate_every": 0, "validation": IMAGES}),
        (SIGMA, {"validate_every": -3, "validation": IMAGES}),
        (SIGMA, {"validation": random_images(3, 8, channels=1)}),
        (SIGMA, {"device": "no such device"}),
    ],
    ids=lambda value: "" if isinstance(value, TrainConfig) else "-".join(value) or "patch_size",
)
def test_bad_options_are_refused_before_the_first_step(config, options, tmp_path):
    with pytest.raises(PurifyError, match="Got"):
        train_denoiser(
            IMAGES, tmp_path, config, progress=False, on_step=lambda *_: pytest.fail("It takes a step."), **options
        )


def test_a_network_for_other_channels_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="channels"):
        train_denoiser(random_images(4, 8, channels=1), tmp_path, SIGMA, progress=False)


@pytest.mark.parametrize("options", [{}, {"validation": random_images(3, 8, channels=1), "validate_every": 8}])
def test_grey_images(options, tmp_path):
    config = dataclasses.replace(SIGMA, network=dataclasses.replace(TINY, image_channels=1))
    denoiser, _ = train_denoiser(random_images(4, 8, channels=1), tmp_path, config, progress=False, **options)
    assert denoiser.image_channels == 1
    assert (tmp_path / SAMPLES_PNG).exists() == bool(options)


def test_psnr_against_an_independent_computation():
    images = smooth_images(5, 16)
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


def test_moments_come_back_in_the_memory_format_of_their_parameters():
    """Fused kernels, which a GPU gets, take parameters and moments to lie alike and do not look."""
    wide = dataclasses.replace(SIGMA, network=dataclasses.replace(TINY, learned_variance=False))
    made = [loop._Weights(build_denoiser(wide), wide, torch.device("cpu")) for _ in range(2)]
    for run in made:
        run.denoiser.to(memory_format=torch.channels_last)
    first, again = made
    for parameter in first.parameters.values():
        parameter.grad = torch.full_like(parameter, 0.1)
    first.update(1e-3)
    groups = {name: {k: v.contiguous() for k, v in group.items()} for name, group in first.groups().items()}
    again.restore(1, groups)
    strided = 0
    for name, parameter in again.parameters.items():
        state = again.optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert state[moment].stride() == parameter.stride(), name
            assert torch.equal(state[moment], first.optimizer.state[first.parameters[name]][moment])
        strided += not parameter.is_contiguous()
    assert strided > 0


@pytest.mark.gpu
def test_a_run_stopped_on_a_gpu_goes_on(tmp_path):
    config = dataclasses.replace(SIGMA, steps=8)
    whole, _ = train_denoiser(IMAGES, tmp_path / "whole", config, device="cuda", progress=False)

    def stop(step: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_denoiser(IMAGES, tmp_path / "part", config, device="cuda", progress=False, on_step=stop)
    resumed, _ = train_denoiser(IMAGES, tmp_path / "part", config, device="cuda", progress=False)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, atol=1e-4, rtol=1e-3)


def test_an_interrupt_between_steps_saves_the_step_it_reached(tmp_path):
    config = dataclasses.replace(SIGMA, steps=8)

    def stop(step: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_denoiser(IMAGES, tmp_path / "part", config, progress=False, on_step=stop)
    assert load_state(tmp_path / "part" / STATE_FILE, identity(config, IMAGES))[0]["step"] == 5
    resumed, _ = train_denoiser(IMAGES, tmp_path / "part", config, progress=False)
    whole, _ = train_denoiser(IMAGES, tmp_path / "whole", config, progress=False)
    assert same(weights(whole), weights(resumed))
