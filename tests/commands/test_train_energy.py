"""`purifyloader train energy`: from a folder of images to an energy model with its card."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from purifyloader import pretrained
from purifyloader.commands import main as cli
from purifyloader.commands import train_energy as command
from purifyloader.energy import EnergyConfig
from purifyloader.errors import CheckpointError, ConfigError, InputError
from purifyloader.files.locks import Lock
from purifyloader.train.energy import EnergyTrainConfig, energy_recipe, train_energy
from purifyloader.train.state import STATE_FILE
from tests import processes
from tests.commands.conftest import undrawn
from tests.conftest import tiny_denoiser
from tests.train.tiny import free_port, same, smooth_images, weights

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


@pytest.mark.usefixtures("drawn")
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
    given = copy.copy(parsed("--config", str(tmp_path / "fields.json"), *options))
    return command.configuration(given, (3, 32, 32), torch.device("cpu"))[0]


@functools.cache
def parsed(*arguments: str) -> argparse.Namespace:
    options: argparse.Namespace = cli.parse(["train", "energy", "--data", "x", "--out", "y", *arguments])[2]
    return options


def test_fields_and_options_are_judged_together(tmp_path):
    light = dataclasses.replace(energy_recipe("light"), dtype="float32")
    # too small for the batch of the recipe
    got = configured(tmp_path, {"bank_size": 16, "dtype": "float32"}, "--batch-size", "4")
    assert got == dataclasses.replace(light, bank_size=16, batch_size=4)
    with pytest.raises(ConfigError, match=r"bank_size .* from 32 to .*Got 16"):
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


FIELDS = [field.name for field in dataclasses.fields(EnergyTrainConfig)]
# the fields that an option has to do with
TOUCHED = [
    *(("network", ["--channels", "4"]), ("steps", ["--steps", "5"]), ("decay_at", ["--steps", "5"])),
    *(("batch_size", ["--batch-size", "4"]), ("bank_size", ["--batch-size", "4"])),
]


@pytest.mark.parametrize(("name", "options"), [*((name, []) for name in [*FIELDS, "nonsense"]), *TOUCHED], ids=str)
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
        (["--langevin-steps", "0"], "--langevin-steps: must be an integer of 1 or more. Got '0'"),
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
    child = processes.start("purifyloader", *arguments)
    lock = out / f".{STATE_FILE}.lock"
    deadline = time.monotonic() + 60
    while not lock.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    assert run("--data", folder, "--config", small, "--out", out) == 2
    assert "another process is training now" in capsys.readouterr().err
    assert child.kill().returncode == -9
    # a lock that a killed process has left is nobody's
    assert run("--data", folder, "--config", small, "--out", out) in (0, 2)
    assert "another process" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [STATE_FILE, "bank.png"])
def test_what_killed_saves_have_left_is_removed(name, folder, small, tmp_path):
    """Also where the kills were in more than one of them; but nothing that is somebody else's."""
    out = tmp_path / "energy"
    (out / f".{name}.1.tmp").mkdir(parents=True)  # a state is written in a folder of its own
    left = {out / f".{name}.1.tmp", out / f".{name}.2.tmp", out / ".notes.tmp"}
    for path in (out / f".{name}.2.tmp", out / ".notes.tmp", out / f"{name}.tmp"):
        path.touch()
    arguments = ["--data", str(folder), "--config", str(small), "--out", str(out)]
    with Lock(out, STATE_FILE):  # of a run that may be writing
        assert run(*arguments) == 2
    assert set(out.glob(".*.tmp")) == left
    assert run(*arguments) == 0
    assert sorted(p.name for p in out.iterdir()) == sorted([".notes.tmp", f"{name}.tmp", *FILES])


def test_two_processes_and_one_card(folder, small, tmp_path):
    joined = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    arguments = ["--quiet", "--chain-steps", "2", "--data", folder, "--config", small, "--device", "cpu"]
    children = [
        processes.start(
            *(undrawn, cli.main, "train", "energy", *arguments, "--out", tmp_path / "two"),
            env={**joined, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in range(2)
    ]
    done = [child.wait(200) for child in children]
    assert [d.value for d in done] == [0, 0], done
    assert [d.stdout.count("6 updates") for d in done] == [1, 0]
    assert run("--data", folder, "--config", small, "--out", tmp_path / "one") == 0
    one, two = (details_of(tmp_path / name) for name in ("one", "two"))
    assert (one["indices"], one["train"]) == (two["indices"], two["train"])
    assert (one["record"]["processes"], two["record"]["processes"]) == (1, 2)
    assert "in 2 processes" in (tmp_path / "two/README.md").read_text()


def test_a_denoiser_is_no_energy_model(tmp_path):
    pretrained.save(tiny_denoiser(), tmp_path / "denoiser", name="denoiser")
    with pytest.raises(CheckpointError, match=r"must hold an energy model. Got a denoiser"):
        pretrained.load(tmp_path / "denoiser", kind="energy")
