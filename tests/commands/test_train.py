"""`purifyloader train denoiser`: real folders, processes and kills, from clean images to a checkpoint with its card."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from purifyloader import pretrained
from purifyloader.commands import main as cli
from purifyloader.datasets.named import open_dataset
from purifyloader.datasets.select import choose, hold_out, load_images
from purifyloader.diffusion.psnr import jpeg_psnr, psnr
from purifyloader.files.weights import weights_sha256
from purifyloader.train import TrainConfig, recipe, train_denoiser
from purifyloader.train import run as training
from purifyloader.train.denoiser import task as loop
from purifyloader.train.denoiser.card import card as card_of
from purifyloader.train.state import STATE_FILE
from tests import processes
from tests.conftest import random_images, tiny_denoiser
from tests.purified.faults import REPOSITORY, Run
from tests.train.tiny import blowing_up_after, distance, free_port, rows, same, state_of, weights

# What makes a recipe a matter of seconds; all else stays the recipe's.
SMALL = {
    "network": {"channels": 8, "multipliers": [1], "norm_groups": 4},
    "steps": 4,
    "batch_size": 4,
    "warmup": 0,
    "decay_steps": 0,
    "dtype": "float32",
}
LIKE_TINY = {**SMALL, "network": {**SMALL["network"], "multipliers": [1, 2]}}  # the network of `tiny_denoiser`
FILES = ["README.md", "config.json", "curves.csv", "model.safetensors"]
PICTURES = ["curves.png", "samples.png"]


def write_images(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", random_images(30, 12))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


class _Stop(Exception):
    pass


def run(*arguments: Any) -> int:
    """The command, measuring once: pictures take most of the time of a run this short."""
    return cli.main(["train", "denoiser", "--quiet", "--validate-every", "100", *map(str, arguments)])


def details_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())["details"]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- a checkpoint with its card ----------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_the_command_makes_a_checkpoint_with_its_card(folder, small, tmp_path, capsys):
    out = tmp_path / "model"
    arguments = ["--data", folder, "--out", out, "--config", small, "--count", 20, "--choose-seed", 3]
    assert run(*arguments) == 0
    assert names(out) == sorted(FILES + PICTURES)
    denoiser = pretrained.load(out)
    assert denoiser.name == "model"
    details = details_of(out)
    chosen = choose(30, 20, 3)
    assert details["indices"] == chosen
    assert details["record"]["steps"] == details["train"]["steps"] == 4
    assert details["data_length"] == 30
    assert details["image_size"] == [12, 12]
    assert TrainConfig.from_dict(details["train"]) == TrainConfig.from_dict(SMALL, recipe("light", 12))
    # the very weights that the library gives
    images = load_images(open_dataset(str(folder)), range(30))
    again, _ = train_denoiser(
        images[chosen], tmp_path / "library", TrainConfig.from_dict(details["train"]), progress=False
    )
    assert same(weights(denoiser), weights(again))
    # measured on what was not chosen
    held_out = hold_out(30, chosen, 3)[1]
    assert held_out == sorted(set(range(30)) - set(chosen))
    measured = {row["sigma_px"]: row for row in details["psnr"]}
    assert measured[25]["images"] == 10
    assert measured[25]["denoiser"] == pytest.approx(psnr(denoiser, images[held_out], 25 / 255), abs=1e-3)
    assert measured[25]["jpeg10"] == pytest.approx(jpeg_psnr(images[held_out], 25 / 255), abs=1e-3)
    assert measured[50]["noised"] < measured[25]["noised"] < measured[10]["noised"]
    said = capsys.readouterr().out
    assert "4 steps" in said
    assert f"{measured[25]['denoiser']:.2f} dB" in said
    # asked for again it is there, and another training is not written over it
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert run(*arguments) == 0
    assert "finished before" in capsys.readouterr().out
    for change in (("--seed", 5), ("--steps", 5), ("--choose-seed", 9), ("--learning-rate", 0.5)):
        assert run(*arguments, *change) == 2
        assert re.search(
            r"without a checkpoint\. Got .*config\.json, of a training with another ", capsys.readouterr().err
        )
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_the_card_says_what_the_configuration_says_and_no_path(folder, small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "model"
    assert (
        run(
            *("--data", folder, "--out", out, "--config", small, "--count", 20, "--name", "washer-1"),
            *("--augment", "flip", "mixup", "--patch-size", 8, "--seed", 7, "--learning-rate", 2e-4, "--replicate", 2),
            *("--decay-steps", 2, "--batch-size", 6, "--licence", "CC0", "--note", "For testing.", "--steps", 5),
            *("--validation", write_images(tmp_path / "other", random_images(5, 12, seed=2))),
        )
        == 0
    )
    card, text = (out / "README.md").read_text(), (out / "config.json").read_text()
    for path in (tmp_path, folder, REPOSITORY, Path.home(), sys.prefix):
        assert str(path) not in card + text
    details, denoiser = details_of(out), pretrained.load(out)
    train = details["train"]
    facts = dict(re.findall(r"^\| (\w[^|]*) \| (.*) \|$", card, flags=re.MULTILINE))
    assert card.startswith("# washer-1\n")
    assert denoiser.name == "washer-1"
    assert "For testing." in card
    assert facts["Licence"] == details["licence"] == "CC0"
    assert facts["Parameters"] == f"{sum(p.numel() for p in denoiser.parameters()):,}"
    assert facts["Predicts"].startswith("edm")
    assert "0.255 to 76.5 px" in facts["Noise it was trained for"]
    assert facts["Trained on"] == "20 of 30 images of an image folder"
    assert facts["Started from"] == "random weights"
    assert train["augment"] == ["flip", "mixup"]
    for part in ("sigma", "flip, mixup", "M = 2", "patches of 8 px"):
        assert part in facts["Objective"]
    for part in ("5 steps of 6 images", "1.5 epochs", details["machine"]):
        assert part in facts["Length"]
    for part in ("0.0002", "linear decay over the last 2", "norm at most 1"):
        assert part in facts["Optimiser"]
    assert facts["Average"] == "EMA 0.999"
    assert facts["Arithmetic"] == "float32, seed 7"
    assert details["record"]["tf32"] is False
    on_a_gpu = {**details, "record": {**details["record"], "tf32": True}}
    assert "| Arithmetic | float32 with convolutions in TF32, seed 7 |" in card_of("washer-1", denoiser, on_a_gpu, {})
    assert "5 images of an image folder" in card
    for row in details["psnr"]:
        assert re.search(rf"\| {row['sigma_px']:g} px \| {row['denoiser']:.2f} \| {row['jpeg10']:.2f} \|", card)
    assert ", ".join(map(str, details["indices"])) in card
    for picture in PICTURES:
        assert f"]({picture})" in card


def command_of(card: Path) -> list[str]:
    """The one that a card prints to train again."""
    (line,) = re.findall(r"^purifyloader train denoiser .*$", card.read_text(), flags=re.MULTILINE)
    words = shlex.split(line)
    assert words[0] == "purifyloader"
    return words[1:]


def mixed_sizes(folder: Path) -> Path:
    write_images(folder, random_images(24, 16))
    for path in sorted(folder.iterdir())[::3]:
        with Image.open(path) as image:
            wider = image.resize((24, 18))
        wider.save(path)
    return folder


def tars(folder: Path, grey: bool = False) -> Path:
    """24 images, of which every third one is grey if so wished."""
    folder.mkdir()
    with tarfile.open(folder / "clean-0000.tar", "w") as tar:
        for i, image in enumerate(random_images(24, 12)):
            data = io.BytesIO()
            mode = "L" if grey and i % 3 == 1 else "RGB"
            Image.fromarray(image.permute(1, 2, 0).numpy()).convert(mode).save(data, format="png")
            member = tarfile.TarInfo(f"{i:04}.png")
            member.size = data.tell()
            data.seek(0)
            tar.addfile(member, data)
    return folder / "clean-0000.tar"


def again_from_its_card(out: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that the card prints, followed to the letter in the checkpoint's folder, gives its weights."""
    monkeypatch.chdir(out)
    words = [str(data) if word == "DATA" else word for word in command_of(out / "README.md")]
    assert cli.main([*words, "--quiet", "--validate-every", "100"]) == 0
    assert same(weights(pretrained.load(out / "again")), weights(pretrained.load(out)))
    assert details_of(out / "again")["train"] == details_of(out)["train"]
    assert details_of(out / "again")["indices"] == details_of(out)["indices"]


@pytest.mark.parametrize("how", ["all", "count", "unsorted", "resized", "grey", "options", "started"])
def test_the_command_on_the_card_gives_the_same_weights(how, small, tmp_path, monkeypatch):
    out, options = tmp_path / "model", ["--validation", "none"] if how not in ("all", "count") else []
    data = tmp_path / "images"
    if how == "resized":
        mixed_sizes(data)
        options += ["--size", 12]
    elif how == "grey":
        data = tars(data, grey=True)
    else:
        write_images(data, random_images(24, 12))
    if how == "count":
        options += ["--count", 10]
    elif how == "unsorted":
        (tmp_path / "list.json").write_text("[9, 3, 20, 1, 17, 4]")
        options += ["--indices", tmp_path / "list.json"]
    elif how == "options":
        options += ["--augment", "crop", "rotate", "--patch-size", 8, "--batch-size", 3, "--seed", 4, "--steps", 5]
    elif how == "started":
        monkeypatch.chdir(tmp_path)
        small.write_text(json.dumps(LIKE_TINY))
        pretrained.save(tiny_denoiser(), "out-of-sight", name="base")
        options += ["--start-from", "out-of-sight"]
    assert run("--data", data, "--out", out, "--config", small, *options) == 0
    if how == "started":
        # by the name that the card says it started from, wherever the command runs
        shutil.copytree("out-of-sight", out / "base")
    again_from_its_card(out, data, monkeypatch)


# -- the images --------------------------------------------------------------------------------------


def make_dataset() -> list[tuple[Tensor, int]]:
    return [(image, 0) for image in random_images(24, 12)]


def make_others() -> list[tuple[Tensor, int]]:
    return [(image, 0) for image in random_images(24, 12, seed=9)]


def test_tars_functions_and_folders_give_the_same_weights(small, tmp_path):
    sources = {
        "folder": write_images(tmp_path / "images", random_images(24, 12)),
        "tar": tars(tmp_path / "tars"),
        "pattern": str(tmp_path / "tars" / "clean-{0000..0000}.tar"),
        "function": "tests.commands.test_train:make_dataset",
    }
    options = ["--config", small, "--count", 12, "--validation", "none"]
    found = {}
    for name, source in sources.items():
        assert run("--data", source, "--out", tmp_path / name, *options) == 0
        found[name] = weights(pretrained.load(tmp_path / name))
        assert str(tmp_path) not in (tmp_path / name / "config.json").read_text()
    for name, source in (("webdataset", "tars"), ("imagefolder", "classes")):
        if name == "imagefolder":
            shutil.copytree(tmp_path / "images", tmp_path / "classes" / "one")
        assert run("--data", name, "--root", tmp_path / source, "--out", tmp_path / name, *options) == 0
        found[name] = weights(pretrained.load(tmp_path / name))
    assert all(same(found["folder"], other) for other in found.values())
    assert [details_of(tmp_path / name)["data"] for name in ("folder", "tar", "function", "webdataset")] == [
        "an image folder",
        "WebDataset tars",
        "tests.commands.test_train:make_dataset",
        "webdataset",
    ]


@pytest.mark.parametrize(
    ("options", "trained", "held_out"),
    [
        ([], 28, 2),  # a twentieth taken back
        (["--count", "20"], 20, 10),
        (["--count", "20", "--validation-count", "4"], 20, 4),
        (["--count", "20", "--validation", "none"], 20, 0),
        (["--validation", "none"], 30, 0),
        (["--validation", "tests.commands.test_train:make_others"], 30, 24),
        (["--validation", "tests.commands.test_train:make_others", "--validation-count", "6"], 30, 6),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_held_out(options, trained, held_out, folder, small, tmp_path):
    out = tmp_path / "model"
    assert run("--data", folder, "--out", out, "--config", small, "--validate-every", 4, *options) == 0
    details = details_of(out)
    assert len(details["indices"]) == trained
    assert [row["images"] for row in details["psnr"]] == [held_out] * len(details["psnr"])
    assert bool(details["psnr"]) == bool(held_out)
    assert names(out) == sorted(FILES + PICTURES * bool(held_out))
    checks = [row for row in rows(out) if row.get("held_out_25px")]
    assert [row["step"] for row in checks] == ["4"] * bool(held_out)
    assert ("JPEG-10" in (out / "README.md").read_text()) == bool(held_out)
    assert all((out / picture).exists() for picture in re.findall(r"\]\((\S+\.png)\)", (out / "README.md").read_text()))


def test_whatever_is_held_out_for_it_validation_changes_no_weights(folder, small, tmp_path):
    for name, options in {"with": [], "without": ["--validation", "none"]}.items():
        assert run("--data", folder, "--out", tmp_path / name, "--config", small, "--count", 20, *options) == 0
    assert same(weights(pretrained.load(tmp_path / "with")), weights(pretrained.load(tmp_path / "without")))


@pytest.mark.parametrize("name", ["{}", "{}/", "{}/../images", "tests.commands.test_train:make_dataset"])
def test_the_training_images_are_no_validation_by_whatever_name(name, folder, small, tmp_path, capsys):
    validation = name.format(folder)
    assert run("--data", folder, "--validation", validation, "--out", tmp_path / "model", "--config", small) == 2
    assert "that are among them" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_copies_of_training_images_are_not_held_out(folder, small, tmp_path):
    write_images(folder / "again", random_images(30, 12)[:25])  # copies, of which a twentieth would be held out
    out = tmp_path / "model"
    assert run("--data", folder, "--out", out, "--config", small, "--count", 30) == 0
    details = details_of(out)
    assert len(details["indices"]) == 30
    assert all(0 < row["images"] < 25 for row in details["psnr"])


def test_grey_images_among_rgb_ones_whichever_comes_first(small, tmp_path):
    for name, order in {"last": [0, 2, 1], "first": [1, 0, 2]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(order))
        data = tars(tmp_path / name, grey=True)
        out = tmp_path / f"{name}-model"
        assert run("--data", data, "--indices", tmp_path / f"{name}.json", "--out", out, "--config", small) == 0
        assert pretrained.load(out).image_channels == 3
    # all of them grey
    (tmp_path / "grey.json").write_text("[1, 4, 7, 10]")
    out = tmp_path / "grey-model"
    assert (
        run(
            *("--data", data, "--indices", tmp_path / "grey.json", "--out", out, "--validation", "none"),
            *("--config", small, "--steps", 1, "--batch-size", 2),
        )
        == 0
    )
    assert pretrained.load(out).image_channels == 1


# -- each option -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (["--steps", "3"], "steps", 3),
        (["--decay-steps", "2"], "decay_steps", 2),
        (["--batch-size", "5"], "batch_size", 5),
        (["--learning-rate", "0.002"], "learning_rate", 0.002),
        (["--replicate", "0"], "replicate", 0),
        (["--augment", "flip", "rotate"], "augment", ["flip", "rotate"]),
        (["--augment"], "augment", []),
        (["--patch-size", "8"], "patch_size", 8),
        (["--seed", "5"], "seed", 5),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--no-compile"], "compile", False),
        (["--preset", "eclipse", "--batch-size", "2"], "objective", "hybrid"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_decides_its_field_and_no_other(options, field, value, folder, tmp_path, monkeypatch):
    seen: list[TrainConfig] = []

    def instead(images: Tensor, out: Path, config: TrainConfig, **_: Any) -> Any:
        seen.append(config)
        raise _Stop

    monkeypatch.setattr("purifyloader.train.denoiser.task.train_denoiser", instead)
    config = tmp_path / "small.json"
    config.write_text(json.dumps({**SMALL, "network": {**SMALL["network"], "blocks": 1, "attention_levels": []}}))
    with pytest.raises(_Stop):
        run("--data", folder, "--out", tmp_path / "model", "--config", config, "--validation", "none", *options)
    train = seen[0].to_dict()
    assert train[field] == value
    base = TrainConfig.from_dict(json.loads(config.read_text()), recipe("light", 12)).to_dict()
    if field != "objective":
        assert {k for k in train if train[k] != base[k]} <= {field}


@pytest.mark.parametrize("name", ["light", "fast", "eclipse", "puregen"])
def test_fewer_steps_keep_the_shape_of_a_recipes_learning_rate(name, folder, tmp_path, monkeypatch):
    """The warm-up ends before the decay begins, whatever the length."""
    seen: list[TrainConfig] = []

    def instead(images: Tensor, out: Path, config: TrainConfig, **_: Any) -> Any:
        seen.append(config)
        raise _Stop

    monkeypatch.setattr("purifyloader.train.denoiser.task.train_denoiser", instead)
    whole = recipe(name, 12)
    for steps in (4, 100, 1000, whole.steps, 3 * whole.steps):
        with pytest.raises(_Stop):
            run("--data", folder, "--preset", name, "--out", tmp_path / "model", "--steps", steps)
        config = seen[-1]
        assert config.steps == steps
        assert config.decay_steps / steps == pytest.approx(whole.decay_steps / whole.steps, abs=1 / steps)
        assert config.warmup <= min(whole.warmup, steps / 4)
        rates = [loop.learning_rate(config, s) for s in range(steps)][:: max(1, steps // 1000)]
        assert max(rates) > 0.7 * config.learning_rate
    # what is said is taken
    with pytest.raises(_Stop):
        run("--data", folder, "--preset", name, "--out", tmp_path / "m", "--steps", 100, "--decay-steps", 7)
    assert seen[-1].decay_steps == 7


def test_how_a_batch_is_taken_and_how_often_it_is_saved_change_nothing(folder, small, tmp_path):
    common = ["--data", folder, "--config", small, "--count", 20]
    assert run(*common, "--out", tmp_path / "a") == 0
    assert (
        run(
            *(*common, "--out", tmp_path / "b", "--micro-batch", 3, "--save-every", 0, "--validate-every", 2),
            *("--device", "cpu"),
        )
        == 0
    )
    a, b = (weights(pretrained.load(tmp_path / name)) for name in "ab")
    assert distance(a, b) < 1e-5
    assert [row["step"] for row in rows(tmp_path / "b") if row["held_out_10px"]] == ["2", "4"]
    assert details_of(tmp_path / "a")["train"] == details_of(tmp_path / "b")["train"]


def test_what_is_said_of_the_images(folder, small, tmp_path):
    out = tmp_path / "model"
    assert run("--data", folder, "--out", out, "--config", small, "--description", "portraits", "--count", 5) == 0
    assert "5 of 30 images of portraits" in (out / "README.md").read_text()
    assert details_of(out)["licence"] is None
    assert "not stated" in (out / "README.md").read_text()


def test_a_configuration_in_part_and_whole(folder, small, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("--data", folder, "--out", one, "--config", small, "--count", 20, "--seed", 3) == 0
    # a checkpoint's config.json says all of it, whatever the recipe
    config = one / "config.json"
    assert run("--data", folder, "--out", two, "--config", config, "--indices", config, "--preset", "eclipse") == 0
    assert details_of(two)["train"] == details_of(one)["train"]
    assert same(weights(pretrained.load(two)), weights(pretrained.load(one)))
    assert details_of(two)["psnr"] == details_of(one)["psnr"]


# -- from another denoiser ---------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    pretrained.save(tiny_denoiser(), tmp_path / "base", name="base")
    return tmp_path / "base"


def test_a_start_from_another_denoiser_takes_its_weights_and_network(folder, base, tmp_path):
    config = tmp_path / "short.json"
    config.write_text(json.dumps({"steps": 1, "batch_size": 2, "warmup": 0, "decay_steps": 0, "dtype": "float32"}))
    out = tmp_path / "model"
    assert run("--data", folder, "--out", out, "--config", config, "--start-from", base, "--learning-rate", 1e-4) == 0
    got = pretrained.load(out)
    assert got.network.config == tiny_denoiser().network.config
    assert 0 < distance(weights(got), weights(tiny_denoiser())) <= 1.01e-4
    assert details_of(out)["train"]["start_from"]["name"] == "base"
    card = (out / "README.md").read_text()
    assert f"`base` (SHA-256 `{details_of(out)['train']['start_from']['weights_sha256'][:16]}`)" in card
    assert str(tmp_path) not in card


def test_a_learned_variance_is_added_to_the_start(folder, tmp_path):
    """A start that knows neither timesteps nor a variance, under the paper's recipe."""
    pretrained.save(tiny_denoiser(parameterization="v"), tmp_path / "base", name="base")
    out = tmp_path / "model"
    arguments = ["--preset", "eclipse", "--steps", 1, "--batch-size", 2, "--learning-rate", 1e-5, "--count", 20]
    assert run("--data", folder, "--out", out, *arguments, "--start-from", tmp_path / "base") == 0
    got = pretrained.load(out)
    assert got.learned_variance
    assert got.parameterization == "v"
    # one step of 1e-5 away from the start, so its estimates are the start's: of its time input too
    x, sigma = torch.rand(4, 3, 12, 12), torch.full((4,), 0.1)
    x = x + 0.1 * torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(got(x, sigma), tiny_denoiser(parameterization="v")(x, sigma), atol=2e-3, rtol=0)


def test_a_start_that_does_not_fit_is_refused(folder, base, small, tmp_path, capsys):
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps({**SMALL, "network": {"channels": 16}}))
    for options, message in (
        (["--config", wide, "--start-from", base], r"of the same shape.* Got .*: give these"),
        (["--config", small, "--start-from", tmp_path / "nothing"], "Got '.*nothing'"),
    ):
        assert run("--data", folder, "--out", tmp_path / "model", *options) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "model").exists()


def test_other_weights_by_the_name_that_was_started_from_are_refused(
    folder, base, small, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    small.write_text(json.dumps(LIKE_TINY))
    common = ["--data", folder, "--count", 20, "--validation", "none"]
    assert run(*common, "--out", "model", "--config", small, "--start-from", "base") == 0
    assert run(*common, "--out", "again", "--config", "model/config.json") == 0
    assert same(weights(pretrained.load("again")), weights(pretrained.load("model")))
    pretrained.save(tiny_denoiser(seed=1), "base", name="base", overwrite=True)
    assert run(*common, "--out", "third", "--config", "model/config.json") == 2
    assert re.search(r"model/config\.json starts from the weights .* of 'base'\. Got others", capsys.readouterr().err)
    shutil.rmtree("base")
    assert run(*common, "--out", "third", "--config", "model/config.json") == 2
    assert "base" in capsys.readouterr().err
    assert not Path("third").exists()


def test_a_pupil_is_distilled_from_a_denoiser(folder, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = tmp_path / "small.json"
    network = {"widths": [4], "blocks": [1]}
    small.write_text(json.dumps({"steps": 2, "batch_size": 2, "network": network, "dtype": "float32"}))
    common = ["--data", folder, "--count", 20, "--validation", "none"]
    assert run(*common, "--out", "model", "--preset", "fast", "--config", small, "--distil-from", "base") == 0
    teacher = details_of(Path("model"))["train"]["distil_from"]
    assert teacher == {"name": "base", "weights_sha256": weights_sha256(tiny_denoiser())}
    assert (
        f"| Distilled from | the weights of `base` (SHA-256 `{teacher['weights_sha256'][:16]}`) |"
        in Path("model/README.md").read_text()
    )
    assert run(*common, "--out", "again", "--config", "model/config.json") == 0
    assert same(weights(pretrained.load("again")), weights(pretrained.load("model")))
    assert run(*common, "--out", "alone", "--preset", "fast", "--config", small) == 0
    assert not same(weights(pretrained.load("alone")), weights(pretrained.load("model")))
    pretrained.save(tiny_denoiser(seed=1), "base", name="base", overwrite=True)
    capsys.readouterr()
    assert run(*common, "--out", "third", "--config", "model/config.json") == 2
    assert re.search(
        r"is distilled from the weights .* of 'base'\. Got others .* --distil-from", capsys.readouterr().err
    )
    assert run(*common, "--out", "third", "--preset", "eclipse", "--distil-from", "base") == 2
    assert "objective 'sigma'" in capsys.readouterr().err
    assert not Path("third").exists()


@pytest.mark.parametrize("emulates", [True, False])
def test_nobody_waits_for_bfloat16_that_is_emulated_unless_it_is_asked_for(
    emulates, folder, small, tmp_path, monkeypatch
):
    monkeypatch.setattr("purifyloader.core.devices.computes_bfloat16", lambda device: not emulates)
    values = {name: value for name, value in SMALL.items() if name != "dtype"}
    small.write_text(json.dumps(values))
    common = ["--data", folder, "--count", 20, "--steps", 1, "--config", small]
    assert run(*common, "--out", tmp_path / "preset") == 0
    assert details_of(tmp_path / "preset")["train"]["dtype"] == ("float32" if emulates else recipe("light").dtype)
    assert run(*common, "--out", tmp_path / "option", "--dtype", "bfloat16") == 0
    assert details_of(tmp_path / "option")["train"]["dtype"] == "bfloat16"
    small.write_text(json.dumps({**values, "dtype": "bfloat16"}))
    assert run(*common, "--out", tmp_path / "file") == 0
    assert details_of(tmp_path / "file")["train"]["dtype"] == "bfloat16"


# -- what it would cost ------------------------------------------------------------------------------


def test_a_plan_says_what_it_will_cost_and_writes_nothing(folder, small, tmp_path, monkeypatch, capsys):
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    assert run("--data", folder, "--config", small, "--steps", 5000, "--count", 20, "--estimate") == 0
    said = dict(re.findall(r"^([a-z ]+?)  +(.*)$", capsys.readouterr().out, flags=re.MULTILINE))
    assert said["parameters"] == "11,899"
    assert said["files"].startswith("0.0 MB the checkpoint; until it is done 0.4 MB")
    assert said["images"] == "20, each seen 1,000 times"
    assert said["steps"] == "5,000 of 4 images"
    seconds = float(re.search(r"^(\S+) s \(median of 5; the first took \S+ s\) on \d+ CPU thread", said["a step"])[1])
    assert 1e-3 < seconds < 5
    assert 0.1 < float(said["memory"].split()[0]) < 16
    when = r"started now it ends about \d{4}-\d\d-\d\d \d\d:\d\d"
    assert re.search(rf"^(.* (min|h|s)), without validation; {when}$", said["in all"])
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    # a run shorter than what is measured, and --out, which is left alone
    assert run("--data", folder, "--config", small, "--steps", 1, "--estimate", "--out", tmp_path / "model") == 0
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    assert "1 of 4 images" in capsys.readouterr().out


# -- stops -------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    """In a child."""
    return cli.main(["train", "denoiser", "--quiet", *arguments])


def test_a_killed_command_goes_on(folder, small, tmp_path):
    arguments = ["--data", folder, "--config", small, "--count", 20, "--steps", 80, "--save-every", 0]
    arguments = [*map(str, arguments), "--validate-every", "40"]
    state = tmp_path / "killed" / STATE_FILE
    child = Run(command, *arguments, "--out", str(tmp_path / "killed"), outcome=tmp_path / "outcome")
    while child.alive and not state.exists():
        time.sleep(0.005)
    time.sleep(0.1)
    assert child.kill(), "It has ended before it could be killed."
    assert [name for name in names(tmp_path / "killed") if name in FILES[:2]] == []
    for name in ("killed", "whole"):
        child = Run(command, *arguments, "--out", str(tmp_path / name), outcome=tmp_path / f"outcome-{name}")
        outcome = child.join()
        assert outcome.error is None, outcome.traceback
        assert outcome.value == 0
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert rows(killed) == rows(whole)
    assert details_of(killed)["psnr"] == details_of(whole)["psnr"]
    assert not state.exists()


def stuck_in_writing(name: str, out: str, *arguments: str) -> None:
    """In a child: the command, which stops for good when a file has been written and not yet renamed."""
    replace = os.replace

    def never(source: Any, target: Any) -> None:
        if Path(target).name == name:
            Path(out).with_name("stuck").touch()
            time.sleep(600)
        replace(source, target)

    os.replace = never
    training._SAVING_SHARE = float("inf")
    command("--out", out, *arguments)


@pytest.mark.parametrize("name", [STATE_FILE, "curves.csv"])
def test_what_killed_saves_have_left_is_removed(name, folder, small, tmp_path):
    out = tmp_path / "model"
    arguments = ["--data", str(folder), "--config", str(small), "--save-every", "0"]
    for i in range(2):
        child = Run(stuck_in_writing, name, str(out), *arguments, outcome=tmp_path / f"outcome{i}")
        deadline = time.monotonic() + 60
        while child.alive and not (tmp_path / "stuck").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert child.kill(), "It has ended before it could be killed."
        (tmp_path / "stuck").unlink()
        (left,) = (found for found in names(out) if found.endswith(".tmp"))
        assert left.startswith(f".{name}.")
    (out / ".notes.tmp").touch()
    assert run(*arguments, "--out", out) == 0
    assert names(out) == sorted([".notes.tmp", *FILES, *PICTURES])


def test_a_save_that_was_killed_is_finished_and_a_strangers_folder_refused_at_once(folder, small, tmp_path, capsys):
    out = tmp_path / "model"
    arguments = ["--data", folder, "--out", out, "--config", small, "--validation", "none"]
    out.mkdir()
    (out / "README.md").write_text("mine")
    assert run(*arguments) == 2
    assert "with README.md" in capsys.readouterr().err
    assert names(out) == ["README.md"]
    (out / "README.md").unlink()
    images = load_images(open_dataset(str(folder)), range(30))
    train_denoiser(images, out, TrainConfig.from_dict(SMALL, recipe("light", 12)), progress=False)
    (out / "model.safetensors").write_bytes(b"half")  # as a kill between the two files leaves it
    assert run(*arguments) == 0
    assert pretrained.load(out).name == "model"
    assert names(out) == FILES


@pytest.mark.parametrize("how", ["recipe", "config"])
def test_what_a_broken_run_has_kept_becomes_a_checkpoint(how, folder, tmp_path, monkeypatch, capsys):
    """As its message says: by the same command, with --steps."""
    monkeypatch.setattr(training, "_SAVING_SHARE", float("inf"))
    monkeypatch.setattr(loop, "learning_rate", blowing_up_after(7, 1e12))
    out = tmp_path / "model"
    arguments = ["--data", folder, "--out", out, "--save-every", 0, "--batch-size", 2, "--validation", "none"]
    if how == "config":
        config = tmp_path / "short.json"
        config.write_text(json.dumps({**SMALL, "steps": 40, "clip_norm": 1e30}))
        arguments += ["--config", config]
    else:
        arguments += ["--count", 4, "--dtype", "float32"]
        # the recipe, with a network that takes a tenth of the time
        light = loop.TrainConfig.from_dict({"network": SMALL["network"]}, recipe("light", 12))
        monkeypatch.setattr("purifyloader.train.denoiser.config.recipe", lambda *_: light)
    assert run(*arguments, "--steps", 60) == 2
    said = capsys.readouterr().err
    assert re.search(r"loss .*at step \d+\..*last good state is kept in .*training-state\.safetensors", said)
    assert names(out) == ["curves.csv", STATE_FILE]
    from safetensors import safe_open

    with safe_open(out / STATE_FILE, "pt") as file:
        step = json.loads(file.metadata()["purifyloader"])["step"]
    assert 1 <= step <= 7
    assert re.search(rf"\b{step}\b", said), "It says --steps and not which."
    assert run(*arguments, "--steps", step) == 0, capsys.readouterr().err
    assert details_of(out)["record"]["steps"] == step
    assert all(bool(p.isfinite().all()) for p in pretrained.load(out).parameters())


def test_a_run_can_be_made_longer(folder, tmp_path):
    """The length may change until the rate is let down, says the state of a run: for a recipe's too."""
    arguments = ["--data", folder, "--batch-size", 2, "--count", 4, "--validation", "none", "--decay-steps", 0]
    arguments += ["--dtype", "float32"]
    out = tmp_path / "model"
    seen: list[TrainConfig] = []
    # the state as a kill leaves it, by the configuration that the command makes
    original = loop.train_denoiser

    def instead(images: Tensor, out: Path, config: TrainConfig, **options: Any) -> Any:
        seen.append(config)
        if len(seen) == 1:
            original(images, out, dataclasses.replace(config, steps=3), progress=False)
            raise _Stop
        return original(images, out, dataclasses.replace(config, steps=4), progress=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("purifyloader.train.denoiser.task.train_denoiser", instead)
        with pytest.raises(_Stop):
            run(*arguments, "--out", out, "--steps", 40)
        assert state_of(out)[0]["step"] == 3
        assert run(*arguments, "--out", out, "--steps", 80) == 0


def limited(limit: int, *arguments: str) -> Any:
    """In a child: the command where no file may be larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        return command(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_that_leaves_nothing_half(folder, small, tmp_path):
    out = tmp_path / "model"
    arguments = ["--data", str(folder), "--out", str(out), "--config", str(small), "--validation", "none"]
    outcome = Run(limited, 100_000, *arguments, outcome=tmp_path / "outcome").join()
    assert outcome.error is None, outcome.traceback
    assert outcome.value == 2
    assert not out.exists() or names(out) == []
    assert run(*arguments) == 0
    assert names(out) == FILES


# -- several processes -------------------------------------------------------------------------------


def launched(launcher: list[str], *arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            *launcher,
            "-m",
            "purifyloader",
            "train",
            "denoiser",
            "--quiet",
            *map(str, arguments),
        ],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def torchrun(count: int) -> list[str]:
    return ["torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(free_port())]


def accelerate(count: int) -> list[str]:
    # --cpu would start one process only
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1"]
    return [*launch, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]


def as_ranks(*arguments: Any) -> processes.Done:
    """Two processes that learn from their environment who they are, as a launcher tells it; as if they were one."""
    command = ("purifyloader", "train", "denoiser", "--quiet", *arguments)
    joined = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    children = [processes.start(*command, env={**joined, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(2)]
    first, second = (child.wait(200) for child in children)
    return processes.Done(first.returncode or second.returncode, first.stdout + second.stdout, first.stderr)


@pytest.mark.parametrize(
    "launcher",
    [
        as_ranks,
        pytest.param(lambda *a: launched(torchrun(2), *a), marks=pytest.mark.slow, id="torchrun"),
        pytest.param(lambda *a: launched(accelerate(2), *a), marks=pytest.mark.slow, id="accelerate"),
    ],
)
def test_two_launched_processes_give_the_weights_of_one_and_one_card(launcher, folder, small, tmp_path):
    arguments = ["--data", folder, "--config", small, "--count", 20, "--augment", "flip", "mixup", "--device", "cpu"]
    arguments += ["--validation", "none"]
    done = launcher(*arguments, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 steps") == 1
    assert run(*arguments, "--out", tmp_path / "one") == 0
    one, two = (weights(pretrained.load(tmp_path / name)) for name in ("one", "two"))
    assert distance(one, two) < 1e-5
    assert names(tmp_path / "two") == names(tmp_path / "one") == FILES
    first, second = (details_of(tmp_path / name) for name in ("one", "two"))
    assert first["indices"] == second["indices"]
    assert first["train"] == second["train"]
    assert (first["record"]["processes"], second["record"]["processes"]) == (1, 2)
    assert "in 2 processes" in (tmp_path / "two" / "README.md").read_text()
    assert "processes" not in (tmp_path / "one" / "README.md").read_text()


@pytest.mark.slow
def test_launched_processes_that_cannot_share_a_batch_say_so(folder, small, tmp_path):
    arguments = ["--data", folder, "--config", small, "--batch-size", 5, "--device", "cpu"]
    done = launched(torchrun(2), *arguments, "--out", tmp_path / "two")
    assert done.returncode != 0
    assert "batch_size must be a multiple of the number of processes, 2" in done.stderr
    assert not (tmp_path / "two").exists()


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps: must be an integer of 1 or more. Got '0'"),
        (["--batch-size", "0"], "--batch-size: must be an integer of 1 or more. Got '0'"),
        (["--learning-rate", "-1"], "--learning-rate: must be a number above 0. Got '-1'"),
        (["--learning-rate", "inf"], "--learning-rate: must be a number above 0. Got 'inf'"),
        (["--patch-size", "13"], "patch_size must be at most"),
        (["--count", "0"], "an integer of 1 or more"),
        (["--count", "31"], "must be from 1 to 30, all that there are"),
        (["--indices", "missing.json"], "missing.json must be a JSON list"),
        (["--config", "missing.json"], "must be a JSON file"),
        (["--config", "list.json"], "must be a JSON object"),
        (["--config", "wrong.json"], "depth"),
        (["--config", "start.json"], "start_from"),
        (["--config", "start2.json"], "start_from"),
        (["--config", "network.json"], "network"),
        (["--size", "0"], "size"),
        (["--micro-batch", "0"], "--micro-batch: must be an integer of 1 or more. Got '0'"),
        (["--validate-every", "0"], "validate"),
        (["--validate-every", "-1"], "validate"),
        (["--validation-count", "-1"], "validation"),
        (["--validation-count", "0", "--validation", "tests.commands.test_train:make_dataset"], "validation"),
        (["--save-every", "-1"], "save"),
        (["--save-every", "nan"], "save"),
        (["--device", "cuda:99"], "device"),
        (["--validation", "nowhere"], "There is no dataset 'nowhere'"),
        (["--out", "file"], "folder as --out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line_before_anything_is_written(
    options, message, folder, small, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "list": [1],
        "wrong": {"depth": 3},
        "start": {"start_from": "base"},
        "start2": {"start_from": {"weights_sha256": "ab"}},
        "network": {"network": "big"},
    }.items():
        Path(f"{name}.json").write_text(json.dumps(value))
    Path("file").write_text("x")
    before = names(tmp_path)
    common = ["--data", folder, "--steps", 2, "--batch-size", 2, "--out", "model"]
    if "--config" not in options:
        common += ["--config", small]
    assert run(*common, *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("purifyloader: error: ")
    assert re.search(message, said)
    assert names(tmp_path) == before


def test_it_says_what_is_missing(folder, capsys):
    assert run("--data", folder) == 2
    assert re.search(r"Give --out, .*or --estimate", capsys.readouterr().err)
    for arguments in (["--out", "x"], ["--data", folder, "--out", "x", "--count", 3, "--indices", "y"]):
        assert run(*arguments) == 2
