"""What `purifyloader train denoiser` makes of a file of fields and its options."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from purifyloader.commands.main import parse
from purifyloader.commands.train_denoiser import _fields_of_card, configuration
from purifyloader.commands.training import fields_of
from purifyloader.diffusion.unet import UNetConfig
from purifyloader.errors import ConfigError, InputError
from purifyloader.train import RECIPES, TrainConfig, recipe
from purifyloader.train.energy import EnergyTrainConfig

STRANGE = [None, True, 3, -1, 0, 2.5, 1e400, "x", [], [1], ["x"], [[1]], {}, {"x": 1}, {"multipliers": 3}, 10**30]


def configured(tmp_path: Path, fields: Any, *arguments: str) -> TrainConfig:
    """What the command makes of a file and options."""
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    options = copy.copy(parsed("--config", str(tmp_path / "fields.json"), *arguments))
    return configuration(options, (3, 32, 32), torch.device("cpu"))[0]


@functools.cache
def parsed(*arguments: str) -> argparse.Namespace:
    options: argparse.Namespace = parse(["train", "denoiser", "--data", "x", "--out", "y", *arguments])[2]
    return options


FIELDS = [*(field.name for field in dataclasses.fields(TrainConfig)), "flip", "nonsense"]
# the fields that an option has to do with
LENGTHS, OBJECTIVE = ["steps", "warmup", "decay_steps"], ["objective", "time", "network", "patch_size"]
TOUCHED = [
    *((name, ["--steps", "5"]) for name in LENGTHS),
    *((name, ["--preset", "eclipse"]) for name in OBJECTIVE),
]


@pytest.mark.parametrize(("name", "arguments"), [*((name, []) for name in FIELDS), *TOUCHED], ids=str)
def test_any_file_is_taken_or_refused(name, arguments, tmp_path):
    for value in STRANGE:
        train = {name: value}
        for fields in (train, {"details": {"train": train}}, {"details": {"train": train}, "denoiser": {}}):
            with contextlib.suppress(ConfigError, InputError):
                configured(tmp_path, fields, *arguments)


def test_an_energy_models_configuration_is_refused_by_its_fields(tmp_path):
    train = EnergyTrainConfig(flip=True).to_dict()
    with pytest.raises(ConfigError, match=r"Known fields of TrainConfig: .*Got bank, .*langevin_steps"):
        configured(tmp_path, {"details": {"train": train}, "energy": {}})


def test_a_card_from_before_the_recipes_says_a_configuration_too():
    path = Path(__file__).parents[2] / "pretrained" / "cifar10-sparse" / "config.json"
    for name in RECIPES:  # whatever it stands over
        config = TrainConfig.from_dict(fields_of(path, _fields_of_card), recipe(name))
        assert (config.objective, config.parameterization, config.time) == ("sigma", "edm", "log-sigma")
        assert (config.augment, config.network, config.steps) == (("flip",), UNetConfig.small(), 10_000)
