"""A training that the machine has no memory for ends in one error before anything is allocated."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from purifyloader.commands.main import execute
from purifyloader.core import devices
from purifyloader.diffusion import PlainUNetConfig
from purifyloader.energy import EnergyConfig
from purifyloader.errors import ConfigError
from purifyloader.train import TrainConfig, fields, plan, train_denoiser
from purifyloader.train.denoiser.task import build_denoiser
from purifyloader.train.energy import EnergyTrainConfig, train_energy
from tests.conftest import random_images
from tests.fuzz.guard import limits
from tests.train.tiny import IMAGES, PLAIN, SIGMA, TINY

WIDE: dict[str, dict[str, Any]] = {
    "as wide as may be": {"channels": 65_536},
    "widest at the bottom": {"channels": 16, "multipliers": (1, 4096)},
    "a wide stem": {"stem_channels": 65_536, "channels": 16_384},
    "deep and wide": {"channels": 4096, "multipliers": (1,) * 16, "blocks": 16},
    "a plain one": {"widths": (65_536,), "blocks": (1,)},
    "a plain one, wide below": {"widths": (32, 32_768), "blocks": (1, 2)},
    "a plain one, deep": {"widths": (8192,) * 4, "blocks": (64,) * 4},
    "attention": {"channels": 32_768, "attention_levels": (0,), "heads": 1},
}


def denoiser(**network: Any) -> TrainConfig:
    own = PlainUNetConfig(**network) if "widths" in network else dataclasses.replace(TINY, **network)
    return dataclasses.replace(SIGMA, network=own)


@pytest.mark.parametrize("name", WIDE)
def test_a_network_larger_than_memory_is_never_made(name: str, tmp_path: Path) -> None:
    with limits(tmp_path), pytest.raises(ConfigError, match=r"memory of cpu.*parameters, [\d,]{2,}\.\d GB"):
        train_denoiser(IMAGES, tmp_path, denoiser(**WIDE[name]), progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"network": EnergyConfig(channels=65_536)}, {"bank_size": 2**31}], ids=str)
def test_an_energy_or_its_bank_neither(changes: dict[str, Any], tmp_path: Path) -> None:
    with limits(tmp_path), pytest.raises(ConfigError, match="memory of cpu"):
        train_energy(IMAGES, tmp_path, dataclasses.replace(PLAIN, **changes), progress=False)


SMALL: dict[str, Callable[[Path], object]] = {
    "a batch": lambda at: train_denoiser(IMAGES, at, dataclasses.replace(SIGMA, batch_size=2**20), progress=False),
    "patches": lambda at: train_denoiser(
        random_images(4, 512), at, dataclasses.replace(SIGMA, batch_size=100, patch_size=512), progress=False
    ),
    "copies of images": lambda at: train_denoiser(
        IMAGES, at, dataclasses.replace(SIGMA, replicate=10_000), progress=False
    ),
    "a batch of samples": lambda at: train_energy(
        IMAGES, at, dataclasses.replace(PLAIN, batch_size=2**20, bank_size=2**20), progress=False
    ),
    "an estimate": lambda at: plan.measure(
        build_denoiser, train_denoiser, IMAGES, dataclasses.replace(SIGMA, batch_size=2**20)
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_images_and_samples_count_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "memory_of", lambda device: 1_000_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with limits(tmp_path), pytest.raises(ConfigError, match=r"0\.0 GB\. Got a network .* at least\. Give a"):
        SMALL[name](tmp_path)


@pytest.mark.parametrize("kind", ["denoiser", "energy"])
def test_the_command_refuses_a_strangers_configuration(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "images").mkdir()
    for number, image in enumerate(random_images(4, 8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{number}.png")
    network = {"channels": 16_384} if kind == "denoiser" else {"channels": 65_536}
    (tmp_path / "a.json").write_text(json.dumps({"network": network, "batch_size": 2}))
    options = ["--data", str(tmp_path / "images"), "--config", str(tmp_path / "a.json"), "--validation", "none"]
    for more in (["--out", str(tmp_path / "out")], ["--estimate"]):
        with limits(tmp_path), pytest.raises(ConfigError, match="memory of cpu"):
            execute(["train", kind, *options, "--device", "cpu", *more])


def test_the_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = devices.memory_of(torch.device("cpu"))
    for text, least in {"max": whole, "1000000": 1_000_000, "": whole, str(2**62): whole}.items():
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(devices, "_CONTAINER", (str(tmp_path / "missing"), str(tmp_path / "limit")))
        assert 0 < devices.memory_of(torch.device("cpu")) == min(whole, least)


def test_a_training_that_fits_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "memory_of", lambda device: 10_000_000)
    fields.check_memory(SIGMA, IMAGES, torch.device("cpu"))
    fields.check_memory(PLAIN, IMAGES, torch.device("cpu"))
    many = dataclasses.replace(SIGMA, batch_size=2**20)
    fields.check_memory(many, IMAGES, torch.device("cpu"), world_size=1000)
    with pytest.raises(ConfigError, match="memory of cpu"):
        fields.check_memory(many, IMAGES, torch.device("cpu"), world_size=10)
    before = torch.random.get_rng_state()
    fields.check_memory(EnergyTrainConfig(network=EnergyConfig(channels=8)), IMAGES, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)
