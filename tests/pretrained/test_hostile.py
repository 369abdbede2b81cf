"""Models and training states of others that declare what is not so: one error that names the file."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from purifyloader import pretrained
from purifyloader.energy import EnergyConfig, EnergyNetwork
from purifyloader.errors import CheckpointError, PurifyError
from purifyloader.pretrained.convert import convert
from purifyloader.pretrained.convert.energy import NAMES
from purifyloader.train.state import load_state, save_state
from tests.conftest import random_images, slim_denoiser, tiny_energy
from tests.fuzz.guard import limits
from tests.fuzz.mutations import safetensors_parts, safetensors_whole

NETWORKS: dict[str, dict[str, Any]] = {
    "as wide as may be": {"channels": 65_536, "norm_groups": 1},
    "as deep as may be": {"channels": 64, "multipliers": [1] * 16, "blocks": 16, "norm_groups": 1},
    "deeper": {"channels": 64, "multipliers": [1] * 16, "blocks": 17, "norm_groups": 1},
    "20,000 blocks": {"blocks": 20_000},
    "1,000 levels": {"multipliers": [1] * 1000},
    "heads of nothing": {"attention_levels": [0], "heads": 7},
    "channels of text": {"channels": "4"},
    "levels of an object": {"multipliers": {"a": 1}},
    "groups of many digits": {"norm_groups": 10**300},
}


def rewrite(folder: Path, kind: str, change: dict[str, Any]) -> None:
    """Change the description of a model wherever it stands, with the hash that belongs to it."""
    path = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    config[kind]["network"].update(change)
    header, body = safetensors_parts(path.read_bytes())
    told = json.loads(header["__metadata__"]["purifyloader"])
    header["__metadata__"]["purifyloader"] = json.dumps({**told, kind: config[kind]})
    path.write_bytes(safetensors_whole(header, body))
    config["model_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_the_weights_do_not_fit_is_never_made(name: str, tmp_path: Path) -> None:
    pretrained.save(slim_denoiser(), tmp_path)
    rewrite(tmp_path, "denoiser", NETWORKS[name])
    began = time.process_time()
    with pytest.raises(CheckpointError, match=r"config\.json|model\.safetensors"):
        pretrained.load(tmp_path)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("channels", [10**6, 65_536, "8", None, [8]])
def test_an_energy_too(channels: Any, tmp_path: Path) -> None:
    pretrained.save(tiny_energy(), tmp_path)
    rewrite(tmp_path, "energy", {"channels": channels})
    with pytest.raises(CheckpointError, match=r"config\.json|model\.safetensors"):
        pretrained.load(tmp_path, "energy")


def test_it_says_how_many_weights_the_network_has(tmp_path: Path) -> None:
    pretrained.save(slim_denoiser(), tmp_path)
    rewrite(tmp_path, "denoiser", {"channels": 16_384})
    with (
        limits(tmp_path),
        pytest.raises(CheckpointError, match=r"the [\d,]{14,} weights of the network.*Got \d+ tensors of"),
    ):
        pretrained.load(tmp_path)


@pytest.mark.parametrize("channels", [4096, 16_384, 32_768])
def test_weights_of_holes_as_long_as_the_network_wants_are_not_read(channels: int, tmp_path: Path) -> None:
    pretrained.save(tiny_energy(), tmp_path)
    rewrite(tmp_path, "energy", {"channels": channels})
    os.truncate(tmp_path / "model.safetensors", 4 * 9 * 7 * channels**2)
    with limits(tmp_path), pytest.raises(CheckpointError, match=r"model\.safetensors is a sparse file"):
        pretrained.load(tmp_path, "energy")


@pytest.mark.parametrize("size", [2**31, 2**34, 2**40])
def test_weights_of_a_terabyte_are_not_read(size: int, tmp_path: Path) -> None:
    pretrained.save(slim_denoiser(), tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match=r"model\.safetensors must hold the .* weights"):
        pretrained.load(tmp_path)


@pytest.mark.parametrize("config", [3, "x", [1], {"nf": "4"}, {"nf": [4]}, {"patch_size": {}}, {"nf": 10**9}])
def test_what_lies_beside_foreign_weights_is_checked(config: Any, tmp_path: Path) -> None:
    own = EnergyNetwork(EnergyConfig(channels=4)).state_dict()
    save_file({name: own[ours] for name, ours in NAMES.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PurifyError):
        convert(tmp_path, tmp_path / "out", "puregen-energy", images=random_images(4))


STATES: dict[str, dict[str, Any]] = {
    "no identity": {"identity": None},
    "an identity that is a list": {"identity": []},
    "a configuration that is text": {"identity": {"config": "x", "images_sha256": "0", "count": 3}},
    "a count that is missing": {"identity": {"config": {}, "images_sha256": "0"}},
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_is_none_is_named(name: str, tmp_path: Path) -> None:
    expected = {"config": {"steps": 3}, "images_sha256": "0", "count": 3}
    path = tmp_path / "training-state.safetensors"
    save_state(path, {"identity": expected}, {"network": {"w": torch.ones(1)}})
    load_state(path, expected)
    path.unlink()
    save_state(path, STATES[name], {"network": {"w": torch.ones(1)}})
    with pytest.raises(CheckpointError, match="training-state"):
        load_state(path, expected)
    save_file({"without a group": torch.ones(1)}, path, {"purifyloader": json.dumps({"identity": expected})})
    with pytest.raises(CheckpointError, match="training-state"):
        load_state(path, expected)
