"""Training of denoisers: its steps against numpy, what it draws, measures and learns, and its guards."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
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
from purifyloader.diffusion.objective import hybrid_loss, sigma_loss
from purifyloader.diffusion.plain import PlainUNetConfig
from purifyloader.diffusion.psnr import jpeg_psnr, psnr
from purifyloader.diffusion.unet import UNetConfig
from purifyloader.errors import ConfigError, InputError, PurifyError, TrainingError
from purifyloader.train import TrainConfig, distilled_from, started_from, train_denoiser
from purifyloader.train import run as training
from purifyloader.train.curves import CURVES_CSV, CURVES_PNG, Curves
from purifyloader.train.denoiser import task
from purifyloader.train.denoiser.curves import COLUMNS, SAMPLES_PNG, overfitting, validated, validation_levels
from purifyloader.train.denoiser.examples import batch_indices, draw_examples, draw_sigma
from purifyloader.train.denoiser.task import build_denoiser, learning_rate
from tests.conftest import random_images, tiny_denoiser
from tests.train.tiny import (
    ALL,
    HYBRID,
    IMAGES,
    LEARNED,
    SIGMA,
    TINY,
    WIDE,
    blowing_up_after,
    distance,
    rows,
    same,
    smooth_images,
    state_of,
    weights,
)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of a run this short, and are looked at elsewhere."""
    monkeypatch.setattr(task, "write_picture", lambda *_: None)
    monkeypatch.setattr(task, "write_samples", lambda *_: None)


@pytest.fixture
def saving_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state at each step, however long writing takes: with save_every=0."""
    monkeypatch.setattr(training, "_SAVING_SHARE", math.inf)


def train(folder: Path, config: TrainConfig = SIGMA, **options: Any) -> tuple[Any, dict[str, Any]]:
    images = options.pop("images", WIDE if config.patch_size else IMAGES)
    return train_denoiser(images, folder, config, **{"progress": False, **options})


# -- each step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SIGMA, HYBRID, ALL], ids=["sigma", "hybrid", "all"])
def test_the_weights_are_bit_for_bit_those_of_a_plain_loop(config, tmp_path):
    got, _ = train(tmp_path, config)
    denoiser = build_denoiser(config).train()
    average = copy.deepcopy(denoiser)
    images = WIDE if config.patch_size else IMAGES
    optimizer = torch.optim.AdamW(denoiser.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    for step in range(config.steps):
        x0, level, z = draw_examples(config, images, step, slice(0, 4))
        if config.objective == "sigma":
            loss = sigma_loss(denoiser, x0, level, z).mean()
        else:
            top = config.top_timestep
            loss = hybrid_loss(denoiser, x0, level, z, config.gamma, config.noise_schedule(), top).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), config.clip_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), denoiser.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
    assert same(weights(got), weights(average))


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
    config = dataclasses.replace(SIGMA, ema_decay=0.2, steps=3)
    raw = []
    for n in range(1, 4):
        shorter = dataclasses.replace(config, ema_decay=0.0, steps=n)
        raw.append(weights(train_denoiser(IMAGES, tmp_path / str(n), shorter, progress=False)[0]))
    got, _ = train_denoiser(IMAGES, tmp_path / "average", config, progress=False)
    want = {k: v.double().numpy() for k, v in weights(build_denoiser(config)).items()}
    for n, now in enumerate(raw):
        decay = min(0.2, (1 + n) / (10 + n))
        want = {k: decay * want[k] + (1 - decay) * now[k].double().numpy() for k in want}
    for k, value in weights(got).items():
        np.testing.assert_allclose(value.numpy(), want[k], atol=1e-6)
    groups = state_of(tmp_path / "3")[1]
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


# -- parts of a batch, arithmetic -------------------------------------------------------------------


@pytest.mark.parametrize(("config", "part"), [(SIGMA, 3), (ALL, 1)], ids=["sigma", "all"])
def test_a_batch_in_parts_gives_the_same_weights(config, part, tmp_path):
    images = WIDE if config.patch_size else IMAGES
    whole, record = train_denoiser(images, tmp_path / "a", config, progress=False)
    parts, record2 = train_denoiser(images, tmp_path / "b", config, progress=False, micro_batch=part)
    assert distance(weights(whole), weights(parts)) < 1e-2 * config.learning_rate
    assert record2["loss"] == pytest.approx(record["loss"], rel=1e-5)


def test_parts_of_a_batch_hold_no_more_images_at_once(tmp_path, monkeypatch):
    seen = Counter()
    original = task.sigma_loss

    def counting(denoiser, x0, *arguments):
        seen[len(x0)] += 1
        return original(denoiser, x0, *arguments)

    monkeypatch.setattr(task, "sigma_loss", counting)
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
    groups = state_of(tmp_path / "b")[1]
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
    assert task._in_tf32(config, torch.device(device)) == tf32
    with exact_arithmetic(torch.device("cuda")):
        assert not task._in_tf32(config, torch.device(device))


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


# -- what is drawn ----------------------------------------------------------------------------------


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
    original = task.hybrid_loss

    def noting(denoiser, x0, t, z, gamma, schedule, timesteps):
        drawn.extend(t.tolist())
        numbers.add(timesteps)
        # a few images are enough for the rest of the step
        return original(denoiser, x0[:2], t[:2], z[:2], gamma, schedule, timesteps)

    monkeypatch.setattr(task, "hybrid_loss", noting)
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
    original = task.sigma_loss

    def noting(denoiser, x0, sigma, z, teacher):
        seen.append(z)
        return original(denoiser, x0, sigma, z, teacher)

    monkeypatch.setattr(task, "sigma_loss", noting)
    train_denoiser(IMAGES, tmp_path, dataclasses.replace(SIGMA, batch_size=16), progress=False)
    z = torch.cat(seen).flatten(1)
    assert stats.kstest(z.flatten().numpy(), stats.norm.cdf).pvalue > 1e-3
    correlation = np.corrcoef(z.numpy()) - np.eye(len(z))
    assert np.abs(correlation).max() < 6 / math.sqrt(z.shape[1])


# -- what is learned and measured -------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Path]:
    """A run that learns."""
    folder = tmp_path_factory.mktemp("healthy")
    config = dataclasses.replace(SIGMA, steps=48, batch_size=8, learning_rate=5e-3, ema_decay=0.9)
    held_out = smooth_images(24, seed=1)
    draw = task.write_picture
    with pytest.MonkeyPatch.context() as patch:  # the last picture only, as each replaces the one before
        patch.setattr(task, "write_picture", lambda curves, *to: draw(curves, *to) if len(curves.rows) == 48 else None)
        denoiser, record = train_denoiser(
            smooth_images(64), folder, config, validation=held_out, validate_every=16, progress=False
        )
    return denoiser, record, folder


def test_training_lowers_the_error_of_unseen_images_without_a_warning(healthy):
    denoiser, record, _ = healthy
    unseen = smooth_images(24, seed=2)
    untrained = build_denoiser(dataclasses.replace(SIGMA)).eval()
    assert psnr(denoiser, unseen, 0.1) > psnr(untrained, unseen, 0.1) + 1.5
    assert record["warnings"] == []
    assert record["steps"] == 48
    assert record["epochs"] == 6.0


def test_the_curves_hold_what_was_measured(healthy):
    denoiser, record, folder = healthy
    found = rows(folder)
    assert [int(r["step"]) for r in found] == list(range(1, 49))
    checks = [r for r in found if r["held_out_10px"]]
    assert [int(r["step"]) for r in checks] == [16, 32, 48]
    held_out, trained = smooth_images(24, seed=1), smooth_images(64)[::2][:24]
    for px in (10, 25, 50):
        assert float(checks[-1][f"held_out_{px}px"]) == pytest.approx(psnr(denoiser, held_out, px / 255), abs=1e-3)
        assert float(checks[-1][f"trained_{px}px"]) == pytest.approx(psnr(denoiser, trained, px / 255), abs=1e-3)
    assert float(checks[-1]["held_out_50px"]) > float(checks[0]["held_out_50px"]) + 0.5
    assert float(found[-1]["loss"]) == pytest.approx(record["loss"], abs=1e-6)
    assert float(found[-1]["epoch"]) == 6
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
def test_a_warning_of_memorising_is_logged_once_and_goes_into_the_record(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(task, "overfitting", lambda means: f"{len(means)} checks" if len(means) > 1 else None)
    with caplog.at_level("WARNING"):
        _, record = train(tmp_path, validation=IMAGES[:2], validate_every=2)
    assert record["warnings"] == ["step 4: 2 checks", "step 8: 4 checks"]  # once, and how it ended
    assert caplog.text.count("the best so far was at step") == 2


@pytest.mark.slow
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
    curves = Curves(COLUMNS)
    curves.add(step=1, seconds=0.5, loss=2.0)
    curves.add(step=2, seconds=0.6, loss=1.0)
    curves.add(step=2, held_out_10px=30.0)
    curves.write_csv(tmp_path)
    assert [r["loss"] for r in rows(tmp_path)] == ["2.0", "1.0"]
    assert [r["held_out_10px"] for r in rows(tmp_path)] == ["", "30.0"]
    assert [r["step"] for r in validated(curves)] == [2]


def test_the_columns_of_a_resumed_run_stand_where_they_stood(tmp_path):
    row = {"step": 1, "loss": 2.0, "held_out_10px": 3.0, "trained_10px": 3.0, "held_out_6.37px": 4.0, "seconds": 1.0}
    Curves(COLUMNS, [row]).write_csv(tmp_path)
    first = (tmp_path / CURVES_CSV).read_text()
    Curves(COLUMNS, [dict(sorted(row.items()))]).write_csv(tmp_path)
    assert (tmp_path / CURVES_CSV).read_text() == first
    assert first.splitlines()[0] == "step,seconds,loss,held_out_6.37px,held_out_10px,trained_10px"


@pytest.mark.parametrize("options", [{}, {"validation": random_images(3, 8, channels=1), "validate_every": 8}])
def test_grey_images(options, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "write_picture", lambda *_: None)  # of curves, which know no colours
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


# -- another denoiser's weights ---------------------------------------------------------------------


def test_a_learned_variance_is_added_halfway_between_the_bounds():
    start = tiny_denoiser(parameterization="epsilon")
    network = dataclasses.replace(LEARNED.network, multipliers=(1, 2))
    config = dataclasses.replace(LEARNED, time="log-sigma", network=network)
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


# -- a teacher ---------------------------------------------------------------------------------------

PUPIL = dataclasses.replace(SIGMA, sigma_range=(0.05, 0.2), network=PlainUNetConfig((8,), (1,)))


def test_who_has_the_teachers_function_already_learns_nothing(tmp_path):
    """Its error is none, whatever the clean images are."""
    teacher = tiny_denoiser()
    same_network = dataclasses.replace(SIGMA, sigma_range=(0.05, 0.2), network=teacher.network.config)
    config = distilled_from(started_from(same_network, teacher), teacher)
    seen: list[float] = []
    models = {"start": teacher, "teacher": teacher}
    trained, _ = train_denoiser(
        IMAGES, tmp_path, config, **models, progress=False, on_step=lambda step, loss: seen.append(loss)
    )
    assert seen == [0.0] * config.steps
    assert same(weights(trained), weights(teacher))


def test_a_pupil_comes_near_its_teacher_and_not_the_images(tmp_path):
    teacher, white = tiny_denoiser(), torch.full((16, 3, 8, 8), 255, dtype=torch.uint8)
    config = dataclasses.replace(PUPIL, steps=60, batch_size=16, learning_rate=1e-2, ema_decay=0.5)
    x = 1 + 0.1 * torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((32,), 0.1)

    def distances(config: TrainConfig, folder: str, **options: Any) -> tuple[float, float]:
        trained, _ = train_denoiser(white, tmp_path / folder, config, progress=False, **options)
        out = trained(x, sigma)
        return float((out - teacher(x, sigma)).square().mean()), float((out - 1).square().mean())

    taught = distances(distilled_from(config, teacher), "taught", teacher=teacher)
    alone = distances(config, "alone")
    assert taught[0] < 0.6 * alone[0]
    assert alone[1] < 0.6 * taught[1]
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_teacher_must_be_the_one_that_is_named_and_know_the_noise(tmp_path):
    teacher, other = tiny_denoiser(), tiny_denoiser(seed=1)
    config = distilled_from(PUPIL, teacher)
    for wanted, given in ((config, None), (config, other), (PUPIL, teacher)):
        with pytest.raises(ConfigError, match=r"is distilled from .*Got .*distilled_from\(config, model\)"):
            train_denoiser(IMAGES, tmp_path, wanted, teacher=given, progress=False)
    wide = dataclasses.replace(config, sigma_range=(0.05, 0.5))
    with pytest.raises(InputError, match=r"trained for sigma from 0\.001 to 0\.3 .*Got 0\.5"):
        train_denoiser(IMAGES, tmp_path, wide, teacher=teacher, progress=False)
    with pytest.raises(ConfigError, match=r"learned with the objective 'sigma'\. Got 'hybrid'"):
        distilled_from(HYBRID, teacher)
    for bad in ("cifar10-sparse", {"name": "a"}, 3):
        with pytest.raises(ConfigError, match="distil_from must be None or"):
            dataclasses.replace(PUPIL, distil_from=bad)
    assert not any(tmp_path.iterdir())


# -- what goes wrong --------------------------------------------------------------------------------


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
    assert "steps=" in message
    assert "another output folder" in message
    header, groups = state_of(folder)
    assert {"model", "average", "exp_avg", "exp_avg_sq"} == set(groups)
    assert all(bool(v.isfinite().all()) for group in groups.values() for v in group.values())
    # what the message promises
    kept, record = train_denoiser(images, folder, dataclasses.replace(config, steps=header["step"]), progress=False)
    assert record["steps"] == header["step"]
    assert same(weights(kept), groups["average"])
    return len(done), header


@pytest.mark.usefixtures("saving_always")
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "learning_rate", blowing_up_after(3, 1e12))
    match = r"The loss became \S+ with a gradient of norm (nan|inf)"
    steps, header = blown_up(tmp_path, dataclasses.replace(SIGMA, clip_norm=1e30), IMAGES, match)
    assert (steps, header["step"]) == (4, 3)


@pytest.mark.usefixtures("saving_always")
def test_a_loss_that_runs_away_stops_and_keeps_a_state_from_before(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "SETTLED", 10)
    monkeypatch.setattr(task, "learning_rate", blowing_up_after(16, 10.0))
    images = smooth_images(16)
    config = dataclasses.replace(SIGMA, learning_rate=3e-3, steps=60, ema_decay=0.5)
    match = r"The loss has run away, to \S+ from \S+ \(running means\),"
    steps, header = blown_up(tmp_path, config, images, match)
    assert header["step"] == 16
    assert 17 <= steps < 26
    kept, _ = train_denoiser(images, tmp_path, dataclasses.replace(config, steps=16), progress=False)
    assert psnr(kept, images, 0.1) > psnr(build_denoiser(config).eval(), images, 0.1)


@pytest.mark.usefixtures("saving_always")
def test_a_run_that_breaks_early_keeps_a_state_from_before_too(tmp_path, monkeypatch):
    """Weights whose loss is finite, and a thousand times what it was, are no good state."""
    monkeypatch.setattr(task, "learning_rate", blowing_up_after(12, 30.0))
    config = dataclasses.replace(SIGMA, learning_rate=3e-3, steps=60)
    _, header = blown_up(tmp_path, config, smooth_images(16), "The loss")
    assert header["step"] == 12


@pytest.mark.usefixtures("saving_always")
def test_a_run_that_breaks_before_a_check_says_so_too(tmp_path, monkeypatch):
    """Weights that are no longer finite, when they are to be measured and drawn."""
    monkeypatch.setattr(task, "learning_rate", blowing_up_after(3, 1e38))
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
    assert state_of(tmp_path)[0]["step"] == 3


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
