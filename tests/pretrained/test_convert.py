"""`purifyloader convert`: published files become checkpoints that denoise, and bad ones become a sentence."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import shutil
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from purifyloader import pretrained
from purifyloader.commands.main import execute
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.energy import EnergyConfig, EnergyNetwork
from purifyloader.errors import CheckpointError, ConfigError, InputError, PurifyError
from purifyloader.files.atomic import file_sha256
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.convert import FORMATS, convert
from purifyloader.pretrained.convert.energy import NAMES
from purifyloader.pretrained.convert.pickles import read_file, state_dict
from purifyloader.pretrained.plausibility import (
    Plausibility,
    dead_leaves,
    judge_denoiser,
    judge_energy,
    levels,
    measure,
)
from tests import processes

GOLDEN = Path(__file__).parents[1] / "golden/convert"
TRAINED = GOLDEN.parent / "plausibility/trained.safetensors"

# what `trained.safetensors`, in the layout of improved-diffusion, was trained with
RIGHT = {
    "schedule": "cosine",
    "timesteps": 4000,
    "rescale_timesteps": True,
    "qkv_order": "heads-first",
    "heads": 2,
    "norm_groups": 4,
}
SHAPE = UNetConfig(
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    attention_levels=(0, 1),
    heads=2,
    norm_groups=4,
    learned_variance=False,
)

_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embed": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}


def main(arguments: list[str]) -> int:
    """The command; errors of the user's are raised."""
    return execute(["convert", *arguments])


def openai_names(network: UNet) -> dict[str, torch.Tensor]:
    """Our network as improved-diffusion would have saved it: what a converter must undo."""
    weights = {}
    for name, tensor in network.state_dict().items():
        parts = name.split(".")
        if parts[0] in ("down", "middle", "up"):
            at = 3 if parts[0] != "middle" else 2
            stage = {"down": "input_blocks", "middle": "middle_block", "up": "output_blocks"}[parts[0]]
            numbers = [str(int(parts[1]) + 1), parts[2]] if parts[0] == "down" else parts[1:at]
            layer = {**_BLOCK, "conv": "op" if parts[0] == "down" else "conv", "proj": "proj_out"}.get(
                parts[at], parts[at]
            )
            weights[".".join([stage, *numbers, layer, parts[-1]])] = tensor
            if parts[at] in ("qkv", "proj") and parts[-1] == "weight":
                weights[".".join([stage, *numbers, layer, parts[-1]])] = tensor[..., 0]
        else:
            first = {"stem": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2"}
            weights[".".join([first.get(parts[0], parts[0]), *parts[1:]])] = tensor
    return weights


def train(steps: int) -> UNet:
    """A denoiser small enough for a test and trained enough to care how its weights are read (six minutes a core)."""
    torch.manual_seed(0)
    network, schedule = UNet(SHAPE), CosineSchedule(4000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    images = dead_leaves(512, 16, seed=1).float() / 127.5 - 1
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / steps) + 1e-5
        x, t = images[torch.randint(0, 512, (32,))], torch.randint(1, 4001, (32,))
        noise, variance = torch.randn(x.shape), 4 * torch.from_numpy(schedule.sigma(t.numpy())) ** 2
        signal = (1 + variance).rsqrt()
        noised = (
            signal.float()[:, None, None, None] * x + (variance.sqrt() * signal).float()[:, None, None, None] * noise
        )
        loss = (network(noised, (t - 1) / 4) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return network


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return dead_leaves(4, 16, seed=9)


def quick(*arguments: Any, **options: Any) -> Plausibility:
    """`convert` where only what is written matters: tried on one small image."""
    return convert(*arguments, images=dead_leaves(1, 8), **options)


def fails(error: type[PurifyError], *parts: str, **options: Any) -> str:
    out = options["out"]
    before = sorted(os.listdir(out)) if Path(out).is_dir() else None
    with pytest.raises(error) as caught:
        convert(**options)
    message = str(caught.value)
    for part in ("Got", *parts):
        assert part in message, message
    # nothing half-written
    assert (sorted(os.listdir(out)) if Path(out).is_dir() else None) == before
    return message


# -- every format, from a file to pixels -------------------------------------------------------------


def settings_of(format: str) -> dict[str, Any]:
    if format == "improved-diffusion":
        return {**RIGHT, "norm_groups": 2}
    if format == "guided-diffusion":
        return {
            "schedule": "linear",
            "timesteps": 1000,
            "rescale_timesteps": False,
            "qkv_order": "channels-first",
            "head_channels": 2,
            "norm_groups": 2,
        }
    return {"norm_groups": 2} if format == "score-sde" else {}


FILES = {
    "improved-diffusion": "improved.pt",
    "guided-diffusion": "guided.pt",
    "score-sde": "score_sde.pth",
    "diffusers": "diffusers",
}


def put_images(images: torch.Tensor, folder: Path) -> None:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")


def test_the_command_in_a_process_of_its_own(
    tmp_path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line to `load`, and the result is the very network."""
    torch.save(openai_names(trained_network()), tmp_path / "ema.pt")
    put_images(images, tmp_path / "pictures")
    out = tmp_path / "model"
    command = ["purifyloader", "convert", str(tmp_path / "ema.pt"), str(out)]
    command += ["--format", "improved-diffusion", "--schedule", "cosine", "--timesteps", "4000", "--rescale-timesteps"]
    command += ["--qkv-order", "heads-first", "--heads", "2", "--norm-groups", "4"]
    command += ["--licence", "CC0", "--name", "tiny", "--data", "pictures"]
    done = processes.run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "converted from improved-diffusion" in done.stdout
    assert "warning" not in done.stdout
    assert sorted(os.listdir(out)) == ["README.md", "config.json", "model.safetensors"]
    denoiser = pretrained.load(out)
    assert denoiser.name == "tiny"
    assert weights_sha256(denoiser.network) == weights_sha256(trained_network())
    assert denoiser.schedule == CosineSchedule(4000)
    config = json.loads((out / "config.json").read_text())
    converted = config["details"]["converted"]
    assert converted["source"] == {"name": "ema.pt", "files": {"ema.pt": file_sha256(tmp_path / "ema.pt")}}
    assert converted["settings"]["heads"] == 2
    assert converted["settings"]["schedule"] == {"kind": "cosine", "timesteps": 4000}
    assert converted["licence"] == "CC0"
    card = (out / "README.md").read_text()
    for part in (
        "# tiny",
        "`ema.pt`",
        file_sha256(tmp_path / "ema.pt"),
        "improved-diffusion",
        "CC0",
        "4 images of an image folder",
        "heads 2",
    ):
        assert part in card
    assert "doubtful" not in card
    for text in (card, (out / "config.json").read_text()):
        assert str(tmp_path) not in text  # the card travels
    again = processes.run(*command, cwd=tmp_path)
    assert again.returncode == 2
    assert "--overwrite must be set" in again.stderr
    assert again.stderr.count("\n") == 1
    monkeypatch.chdir(tmp_path)
    assert execute([*command[1:], "--overwrite"]) == 0


def test_the_command_says_on_standard_error_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    put_images(dead_leaves(2, 8), tmp_path / "pictures")
    command = ["purifyloader", "convert", str(GOLDEN / "improved.pt")]
    options = ["--format", "eclipse", "--heads", "2", "--norm-groups", "2", "--data", "pictures"]
    done = processes.run(*command, "file/out", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("purifyloader: error: A checkpoint must be written to file/out. Got: ")
    assert done.stderr.count("\n") == 1
    done = processes.run(*command, "out", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("warning: out: ") for line in lines)
    assert "does not denoise" in done.stderr
    assert "warning" not in done.stdout


def trained_network() -> UNet:
    network = UNet(SHAPE)
    wanted = openai_names(network)
    published = {name: tensor.float() for name, tensor in load_file(TRAINED).items()}
    assert sorted(wanted) == sorted(published)
    with torch.no_grad():
        for name, tensor in wanted.items():  # views of the network's own
            tensor.copy_(published[name])
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("format", list(FILES))
def test_published_layouts_become_checkpoints(tmp_path: Path, format: str) -> None:
    source = GOLDEN / FILES[format]
    given = settings_of(format)
    preset = "score-sde-ddpmpp-cifar10" if format == "score-sde" else None
    judged = quick(source, tmp_path / "out", format, preset=preset, settings=given)
    denoiser = pretrained.load(tmp_path / "out")
    expected = load_file(GOLDEN / f"{source.stem}.expected.safetensors")
    out = denoiser.network(expected["x"], expected["time"])
    torch.testing.assert_close(out, expected["output"], rtol=1e-4, atol=1e-5)
    # random weights do not denoise, and that is said in the card
    assert judged.warnings
    assert "doubtful" in (tmp_path / "out/README.md").read_text()
    files = json.loads((tmp_path / "out/config.json").read_text())["details"]["converted"]["source"]["files"]
    named = {"config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"}
    assert set(files) == (named if format == "diffusers" else {source.name})


def test_conversion_is_byte_stable(tmp_path: Path, images: torch.Tensor) -> None:
    for name in ("a", "b"):
        convert(TRAINED, tmp_path / name, "improved-diffusion", settings=RIGHT, images=images, name="same")
    for file in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_energy_network(tmp_path: Path) -> None:
    golden = load_file(GOLDEN.parent / "energy/published-width-4.safetensors")
    weights = {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}
    torch.save({"module." + name: value for name, value in weights.items()}, tmp_path / "ebm_epoch_9.pt")
    quick(tmp_path / "ebm_epoch_9.pt", tmp_path / "a", "puregen-energy", licence="unclear")
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text('{"nf": 4, "patch_size": 1}')
    save_file(weights, folder / "model.safetensors")
    quick(folder, tmp_path / "b", "puregen-energy")
    for name in ("a", "b"):
        network = pretrained.load(tmp_path / name, kind="energy")
        torch.testing.assert_close(network((golden["input"] + 1) / 2), golden["output"], rtol=1e-5, atol=1e-6)
    assert "unclear" in (tmp_path / "a/README.md").read_text()
    assert "not stated" in (tmp_path / "b/README.md").read_text()
    (folder / "config.json").write_text('{"nf": 128}')
    fails(CheckpointError, "nf=128", source=folder, out=tmp_path / "c", format="puregen-energy")
    # what load says of such a folder, and of a diffusers one
    with pytest.raises(CheckpointError, match="--format puregen-energy"):
        pretrained.load(folder)
    with pytest.raises(CheckpointError, match="--format diffusers"):
        pretrained.load(GOLDEN / "diffusers")


# -- folders -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "diffusers", tmp_path / "diffusers"))


def converted_settings(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


def test_a_pipeline(folder: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    (pipeline / "scheduler").mkdir(parents=True)
    shutil.move(folder / "scheduler_config.json", pipeline / "scheduler")
    shutil.move(folder, pipeline / "unet")
    (pipeline / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    (pipeline / "vae").mkdir()
    save_file({"a": torch.zeros(1)}, pipeline / "vae/diffusion_pytorch_model.safetensors")
    quick(pipeline, tmp_path / "a", "diffusers")
    quick(pipeline / "unet", tmp_path / "b", "diffusers")
    quick(pipeline / "unet/diffusion_pytorch_model.safetensors", tmp_path / "c", "diffusers")
    hashes = {weights_sha256(pretrained.load(tmp_path / name)) for name in "abc"}
    assert len(hashes) == 1
    with pytest.raises(CheckpointError, match="--format diffusers"):
        pretrained.load(pipeline)


def test_safetensors_come_before_pickles(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    quick(folder, tmp_path / "a", "diffusers")
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    quick(folder, tmp_path / "b", "diffusers")
    assert weights_sha256(pretrained.load(tmp_path / "a")) == weights_sha256(pretrained.load(tmp_path / "b"))


def test_a_folder_that_is_not_clear(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = folder / "ema.safetensors"
    shutil.move(folder / "diffusion_pytorch_model.safetensors", other)
    shutil.copy(other, folder / "last.safetensors")
    fails(InputError, "ema.safetensors, last.safetensors", "--file", source=folder, out=out, format="diffusers")
    fails(InputError, "'x.pt'", "ema.safetensors", source=folder, out=out, format="diffusers", file="x.pt")
    quick(folder, out, "diffusers", file="last.safetensors")
    fails(InputError, "leave --file out", source=TRAINED, out=tmp_path / "b", format="eclipse", file="x")
    (folder / "config.json").unlink()
    fails(CheckpointError, "config.json", source=folder, out=tmp_path / "b", format="diffusers", file="ema.safetensors")
    (folder / "config.json").write_text("{")
    fails(
        CheckpointError, "must be JSON", source=folder, out=tmp_path / "b", format="diffusers", file="ema.safetensors"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(InputError, "no files", source=empty, out=tmp_path / "b", format="diffusers")
    (empty / "network-snapshot.pkl").write_bytes(b"x")
    fails(CheckpointError, "network-snapshot.pkl", "source code", source=empty, out=tmp_path / "b", format="eclipse")


def test_a_folder_without_a_schedule(folder: Path, tmp_path: Path) -> None:
    (folder / "scheduler_config.json").unlink()
    fails(ConfigError, "scheduler_config.json", "--preset (ddpm-cifar10-32, puregen-ddpm)", "--schedule", "--timesteps",
          source=folder, out=tmp_path / "a", format="diffusers")  # fmt: skip
    quick(folder, tmp_path / "a", "diffusers", preset="puregen-ddpm")
    denoiser = pretrained.load(tmp_path / "a")
    assert denoiser.sigma_range[1] == pytest.approx(float(LinearSchedule(1000).sigma(250)))
    quick(folder, tmp_path / "b", "diffusers", settings={"schedule": "cosine", "timesteps": 500})
    assert pretrained.load(tmp_path / "b").schedule == CosineSchedule(500)


# -- settings ----------------------------------------------------------------------------------------


def test_what_nobody_says_is_asked_for_at_once(tmp_path: Path) -> None:
    message = fails(ConfigError, source=TRAINED, out=tmp_path / "a", format="improved-diffusion")
    for part in ("cifar10_uncond_50M", "--schedule and --timesteps", "--rescale-timesteps", "--qkv-order",
                 "--heads or --head-channels"):  # fmt: skip
        assert part in message
    some = {key: value for key, value in RIGHT.items() if key not in ("heads", "qkv_order")}
    message = fails(ConfigError, source=TRAINED, out=tmp_path / "a", format="improved-diffusion", settings=some)
    assert "--qkv-order, --heads or --head-channels." in message
    assert "--rescale-timesteps" not in message
    message = fails(ConfigError, source=GOLDEN / "score_sde.pth", out=tmp_path / "a", format="score-sde")
    for part in ("--beta-min", "--beta-max", "--continuous", "--skip-rescale", "score-sde-ddpmpp-cifar10"):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"heads": 0}, "positive integer"),
        ({"heads": 3}, "heads"),
        ({"head_channels": 4}, "one of them"),
        ({"qkv_order": "mixed"}, "qkv_order"),
        ({"schedule": "sigmoid"}, "cosine, linear"),
        ({"timesteps": 1}, "timesteps"),
        ({"timesteps": None}, "--timesteps"),
        ({"max_timestep": 5000}, "max_timestep"),
        ({"beta_min": 0.1}, "--beta-min"),
        ({"norm_groups": 3}, "norm_groups"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    settings = {**RIGHT, **changes}
    with pytest.raises(PurifyError, match=part):
        convert(TRAINED, tmp_path / "a", "improved-diffusion", settings=settings)
    assert not (tmp_path / "a").exists()


def test_settings_beside_a_preset_come_first(tmp_path: Path) -> None:
    changes = {"norm_groups": 4, "heads": 2, "max_timestep": 500}
    quick(TRAINED, tmp_path / "a", "eclipse", settings=changes)
    settings = converted_settings(tmp_path / "a")["details"]["converted"]
    assert settings["preset"] == "eclipse-cifar10"
    assert settings["settings"]["schedule"] == {"kind": "cosine", "timesteps": 4000}
    assert settings["settings"]["max_timestep"] == 500
    assert "MIT or Apache" in settings["licence"]
    # the width of a head replaces their number, and a T keeps the kind of schedule
    changes = {"norm_groups": 4, "head_channels": 4, "timesteps": 2000}
    quick(TRAINED, tmp_path / "b", "improved-diffusion", preset="cifar10_uncond_50M", settings=changes)
    denoiser = pretrained.load(tmp_path / "b")
    assert denoiser.schedule == CosineSchedule(2000)
    assert denoiser.network.config.head_channels == 4


def test_formats_and_presets_that_are_not(tmp_path: Path) -> None:
    common: dict[str, Any] = {"source": TRAINED, "out": tmp_path / "a"}
    fails(InputError, "improved-diffusion, guided-diffusion", "'edm'", **common, format="edm")
    fails(InputError, "lsun_bedroom", "'lsun'", **common, format="guided-diffusion", preset="lsun")
    fails(InputError, "none", "'x'", **common, format="puregen-energy", preset="x")
    fails(InputError, "none", "--heads", **common, format="puregen-energy", settings={"heads": 2})
    fails(
        InputError, "no_such_file.pt", "Check the path", source="no_such_file.pt", out=tmp_path / "a", format="eclipse"
    )


def test_an_existing_checkpoint_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    fails(CheckpointError, "README.md", "overwrite must be set", source=TRAINED, out=out, format="eclipse")
    assert (out / "README.md").read_text() == "mine"
    (tmp_path / "file").touch()
    fails(InputError, "the file", source=TRAINED, out=tmp_path / "file", format="eclipse")


def test_list_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    for name, its in FORMATS.items():
        assert f"{name}:" in text
        for preset in its.presets:
            assert f"  {preset}\n" in text
    assert main(["--list", "--format", "eclipse"]) == 0
    assert "guided" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="OUT, --format must be given"):
        main(["x.pt"])


# -- plausibility ------------------------------------------------------------------------------------


def test_the_right_settings_give_no_warning(
    tmp_path: Path, images: torch.Tensor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = convert(TRAINED, tmp_path / "a", "improved-diffusion", settings=RIGHT, images=images)
    assert judged.warnings == []
    assert [round(row.sigma_px) for row in judged.rows] == [10, 25, 50, 100]
    assert all(row.gain > 1.5 for row in judged.rows)
    assert caplog.records == []
    # and none on the synthetic images that are taken where there are no others, of which two show it as well as eight
    synthetic: list[torch.Tensor] = []

    def two(count: int, *arguments: Any) -> torch.Tensor:
        synthetic.append(dead_leaves(count, *arguments)[:2])
        return synthetic[-1]

    monkeypatch.setattr("purifyloader.pretrained.convert.dead_leaves", two)
    assert convert(TRAINED, tmp_path / "b", "improved-diffusion", settings=RIGHT).warnings == []
    assert [each.shape for each in synthetic] == [(2, 3, 32, 32)]


def test_what_does_not_denoise_is_said(
    tmp_path: Path, images: torch.Tensor, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = UNet(SHAPE)
    torch.save(openai_names(network), tmp_path / "untrained.pt")
    arguments = [str(tmp_path / "untrained.pt"), str(tmp_path / "out"), "--format", "eclipse", "--heads", "2"]
    put_images(images, tmp_path / "pictures")
    assert main([*arguments, "--norm-groups", "4", "--data", str(tmp_path / "pictures")]) == 0
    assert "tried on 4 images of an image folder" in capsys.readouterr().out
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "The converted model does not denoise" in text
    assert "untrained" in text


def test_images_of_ones_own(tmp_path: Path, images: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    put_images(images, folder)
    arguments = [str(TRAINED), str(tmp_path / "out"), "--format", "eclipse", "--heads", "2", "--norm-groups", "4"]
    assert main([*arguments, "--data", str(folder)]) == 0
    assert "4 images of an image folder" in capsys.readouterr().out
    assert str(folder) not in (tmp_path / "out/README.md").read_text()
    with pytest.raises(InputError, match="nowhere"):
        main([*arguments, "--data", str(tmp_path / "nowhere"), "--overwrite"])


def test_synthetic_images_are_as_hard_as_natural_ones() -> None:
    """The shipped denoiser of natural images gains on them about what its card says of CIFAR-10."""
    rows = measure(pretrained.load("cifar10-sparse"), dead_leaves(8, 32), [px / 255 for px in (10, 25, 50)])
    for row, natural in zip(rows, (34.5, 29.2, 25.4), strict=True):
        assert row.denoised == pytest.approx(natural, abs=1.0)


def test_synthetic_images() -> None:
    first = dead_leaves(3, 24, seed=5)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 3, 24, 24)
    assert torch.equal(first, dead_leaves(3, 24, seed=5))
    assert torch.equal(first[:2], dead_leaves(2, 24, seed=5))
    assert not torch.equal(first, dead_leaves(3, 24, seed=6))
    grey = dead_leaves(2, 16, channels=1)
    assert grey.shape == (2, 1, 16, 16)


def test_a_network_that_gives_no_numbers_gains_nothing(images: torch.Tensor) -> None:
    class Broken(NetworkDenoiser):
        def predict(self, x_BCHW: torch.Tensor, sigma_B: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x_BCHW * float("nan"), None

    denoiser = Broken(trained_network(), "epsilon", (0.01, 1.0), CosineSchedule(4000))
    judged = judge_denoiser(denoiser, images[:2], "images")
    assert all(row.denoised == 0 for row in judged.rows)
    assert "does not denoise" in judged.warnings[0]
    assert json.dumps(judged.to_dict(), allow_nan=False)


@pytest.mark.parametrize("sigma_range", [(0.001, 0.3), (0.01, 150.0), (0.001, 0.02), (0.5, 2.0)])
def test_levels_lie_in_the_range(sigma_range: tuple[float, float]) -> None:
    found = levels(sigma_range)
    assert len(found) >= 2
    assert all(sigma_range[0] <= sigma <= sigma_range[1] for sigma in found)


def test_an_energy_that_noise_lowers_is_doubtful(images: torch.Tensor) -> None:
    class Roughness(EnergyNetwork):
        sign = 1.0

        def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
            return self.sign * x_BCHW.diff(dim=-1).square().mean(dim=(1, 2, 3))

    network = Roughness(EnergyConfig(4))
    judged = judge_energy(network, images, "images")
    assert (judged.energy, judged.warnings) == (1.0, [])
    network.sign = -1.0
    judged = judge_energy(network, images, "images")
    assert judged.energy == 0.0
    assert "other sign" in judged.warnings[0]
    assert isinstance(judged, Plausibility)


@pytest.mark.slow
def test_training_such_a_denoiser_again(tmp_path: Path, images: torch.Tensor) -> None:
    """`trained.safetensors` is `train(1500)`, in half precision."""
    torch.save(openai_names(train(1500)), tmp_path / "ema.pt")
    judged = convert(tmp_path / "ema.pt", tmp_path / "out", "improved-diffusion", settings=RIGHT, images=images)
    assert judged.warnings == []


# -- files that are not what they should be ----------------------------------------------------------


class Evil:
    """Unpickling it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.mark}",)


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("way", ["zip", "legacy", "protocol 2", "protocol 4", "protocol 0"])
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path: Path, way: str) -> None:
    mark = tmp_path / "mark"
    weights = {"time_embed.0.weight": torch.zeros(2), "harmless": Evil(mark)}
    file = tmp_path / "ema.pt"
    if way == "zip":
        file.write_bytes(saved(weights))
    elif way == "legacy":
        file.write_bytes(saved(weights, _use_new_zipfile_serialization=False))
    else:
        file.write_bytes(pickle.dumps({"a": Evil(mark)}, protocol=int(way[-1])))
    message = fails(CheckpointError, str(file), source=file, out=tmp_path / "out", format="eclipse")
    assert "system" in message
    assert "nothing in it was run" in message
    assert not mark.exists()
    # the file does what it says where it is trusted: the test is of a real one
    if way.startswith("protocol"):
        pickle.loads(file.read_bytes())
        assert mark.exists()


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (np.zeros(3), "multiarray._reconstruct"),
        (np.float64(3), "multiarray.scalar"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (collections.Counter("a"), None),  # torch's reader takes this one: plain values beside weights are listed
    ],
)
def test_what_a_file_wants_is_named(tmp_path: Path, value: Any, wanted: str | None) -> None:
    for legacy in (False, True):
        file = tmp_path / "ema.pt"
        file.write_bytes(saved({"a": torch.zeros(1), "extra": value}, _use_new_zipfile_serialization=not legacy))
        message = fails(CheckpointError, source=file, out=tmp_path / "out", format="eclipse")
        assert (wanted or "extra (Counter)") in message


def test_everything_that_a_file_wants_is_named(tmp_path: Path) -> None:
    value = {"args": argparse.Namespace(a=1), "loss": np.float64(1), "net": torch.nn.Linear(1, 1)}
    (tmp_path / "a.pt").write_bytes(saved(value))
    (tmp_path / "b.pt").write_bytes(pickle.dumps(value, protocol=5))
    for name in ("a.pt", "b.pt"):
        message = fails(CheckpointError, source=tmp_path / name, out=tmp_path / "out", format="eclipse")
        for part in ("argparse.Namespace", "scalar", "torch.nn.modules.linear.Linear"):
            assert part in message
        assert "_rebuild_tensor" not in message  # that is no reason


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_of_edm_holds_source_code(tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("it was run")

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Net:
        def __reduce__(self) -> Any:
            return _reconstruct_persistent_obj, ({"module_src": "import os"},)

    file = tmp_path / "edm-cifar10-32x32-uncond-vp.pkl"
    file.write_bytes(pickle.dumps({"ema": Net()}, protocol=protocol))
    fails(CheckpointError, "EDM", "source code", "torch_utils.persistence._reconstruct_persistent_obj", "nothing in it",
          source=file, out=tmp_path / "out", format="score-sde", preset="score-sde-ddpmpp-cifar10")  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_archives_that_are_not_weights(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pt")
    fails(CheckpointError, "TorchScript", source=tmp_path / "script.pt", out=tmp_path / "out", format="eclipse")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("notes.txt", "hello")
    fails(CheckpointError, "notes.txt", source=tmp_path / "other.pt", out=tmp_path / "out", format="eclipse")


def test_files_that_are_no_files_of_weights(tmp_path: Path) -> None:
    for name, data, part in (
        ("empty.pt", b"", "empty"),
        ("page.pt", b"<!DOCTYPE html><html>", "web page"),
        ("lfs.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "safetensors"),
        ("text.pt", b"hello world, this is no pickle", "cannot read"),
        ("text.safetensors", b"hello world, this is no safetensors", "safetensors"),
        ("empty.safetensors", b"", "empty"),
    ):
        (tmp_path / name).write_bytes(data)
        fails(CheckpointError, name, part, source=tmp_path / name, out=tmp_path / "out", format="eclipse")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0.99, 0.6, 0.1, 100])
def test_a_pickle_cut_short(tmp_path: Path, keep: float, legacy: bool) -> None:
    data = saved({"a": torch.rand(3000)}, _use_new_zipfile_serialization=not legacy)
    file = tmp_path / "ema.pt"
    file.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    fails(
        CheckpointError, "ema.pt", "cut short", "Download it again", source=file, out=tmp_path / "out", format="eclipse"
    )


def test_every_damaged_byte_of_the_weights_is_seen(tmp_path: Path) -> None:
    data = bytearray(saved({"a": torch.rand(3000)}))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        at = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0")).header_offset + 200
    data[at] ^= 1
    (tmp_path / "ema.pt").write_bytes(data)
    assert torch.load(tmp_path / "ema.pt", weights_only=True)["a"].shape == (3000,)  # torch does not look
    fails(CheckpointError, "checksum", "damaged", source=tmp_path / "ema.pt", out=tmp_path / "out", format="eclipse")


@pytest.mark.parametrize("keep", [4, 30, 3000, -1])
def test_safetensors_cut_short(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "ema.safetensors"
    file.write_bytes(TRAINED.read_bytes()[:keep])
    fails(CheckpointError, "ema.safetensors", "cut short", source=file, out=tmp_path / "out", format="eclipse")


def test_safetensors_under_another_suffix(tmp_path: Path) -> None:
    shutil.copy(TRAINED, tmp_path / "ema.bin")
    assert sorted(read_file(tmp_path / "ema.bin")) == sorted(load_file(TRAINED))


# -- state dicts in other dicts ----------------------------------------------------------------------

WEIGHTS = {"a": torch.zeros(1), "b": torch.zeros(2)}


@pytest.mark.parametrize(
    "read",
    [
        WEIGHTS,
        collections.OrderedDict(WEIGHTS),
        {"state_dict": WEIGHTS, "epoch": 3},
        {"model": WEIGHTS, "optimizer": {"state": {}}},
        {"ema": WEIGHTS},
        {"state_dict": {f"module.{name}": value for name, value in WEIGHTS.items()}},
        {f"_orig_mod.module.{name}": value for name, value in WEIGHTS.items()},
        {"model": {"state_dict": WEIGHTS}},
    ],
)
def test_where_weights_lie(read: Any) -> None:
    if "model" in read and "state_dict" in read["model"]:
        assert sorted(state_dict(read, Path("x.pt"), key="model.state_dict")) == ["a", "b"]
    else:
        assert sorted(state_dict(read, Path("x.pt"))) == ["a", "b"]


@pytest.mark.parametrize(
    ("read", "key", "parts"),
    [
        ([1, 2], None, ("list",)),
        ({}, None, ("empty dict",)),
        ({"model": WEIGHTS, "ema": WEIGHTS}, None, ("'model', 'ema'", "--key")),
        ({"weights": WEIGHTS, "step": 3}, None, ("weights (dict of 2)", "step (int)", "--key")),
        ({**WEIGHTS, "step": 3}, None, ("step (int)",)),
        ({"model": WEIGHTS}, "ema", ("'ema'", "model (dict of 2)")),
        ({"model": WEIGHTS}, "model.a.b", ("'model.a.b'", "Tensor")),
        ({"model": 3}, "model", ("int", "'model'")),
    ],
)
def test_where_they_do_not(read: Any, key: str | None, parts: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        state_dict(read, Path("x.pt"), key)
    for part in ("x.pt", "Got", *parts):
        assert part in str(caught.value)


NESTED = {"down.0.weight": torch.zeros(2, 3), "down.0.bias": torch.zeros(2), "out.weight": torch.ones(4)}


def under(*prefixes: str, weights: dict[str, torch.Tensor] = NESTED) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": value for prefix in prefixes for name, value in weights.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "model",
        "module",
        "module.model",
        "model._orig_mod",
        "_orig_mod.module.net",
        "diffusion.model",
        "a.b.c.d",
        "module._orig_mod.ema_model.module",
    ],
)
@pytest.mark.parametrize("wrapped", [None, "state_dict"])
def test_a_prefix_of_any_nesting_is_removed_and_is_a_key(prefix: str, wrapped: str | None) -> None:
    flat = {**under(prefix), "n_averaged": torch.tensor(3)}
    read = flat if wrapped is None else {wrapped: flat, "epoch": 3}
    for key in (None, prefix, *([] if wrapped is None else [f"{wrapped}.{prefix}"])):
        if wrapped is None or key != prefix:
            assert state_dict(read, Path("x.ckpt"), key) == NESTED


def test_names_of_a_network_itself_are_no_prefix() -> None:
    for weights in ({"f.0.weight": torch.zeros(1), "f.2.weight": torch.zeros(1)}, {"f.weight": torch.zeros(1)}, NESTED):
        assert state_dict(weights, Path("x.pt")) == weights


@pytest.mark.parametrize(
    ("read", "names"),
    [
        (under("model", "ema_model"), ("model", "ema_model")),
        (under("net", "net_shadow"), ("net", "net_shadow")),
        ({**under("online", "averaged.module"), "loss.scale": torch.ones(1)}, ("online", "averaged")),
        ({"model": NESTED, "model_ema": NESTED}, ("model", "model_ema")),
        ({"model": NESTED, "anything": under("module"), "optimizer": {}}, ("model", "anything")),
        ({"state_dict": under("model", "teacher"), "epoch": 1}, ("model", "teacher")),
        ({"state_dict": NESTED, "ema_state_dict": NESTED}, ("state_dict", "ema_state_dict")),
    ],
)
def test_averaged_weights_beside_raw_ones_are_asked_for(read: Any, names: tuple[str, str]) -> None:
    with pytest.raises(CheckpointError, match=f"'{names[0]}', '{names[1]}' beside each other.*--key"):
        state_dict(read, Path("x.ckpt"))
    below = "state_dict." * (list(read) == ["state_dict", "epoch"])
    for name in names:
        assert state_dict(read, Path("x.ckpt"), below + name) == NESTED


def test_key_chooses(tmp_path: Path, images: torch.Tensor) -> None:
    good = {name: value.float() for name, value in load_file(TRAINED).items()}
    torch.save({"model": {name: value * 0 for name, value in good.items()}, "ema": good}, tmp_path / "both.pt")
    common: dict[str, Any] = {"source": tmp_path / "both.pt", "format": "improved-diffusion", "settings": RIGHT}
    fails(CheckpointError, "'model', 'ema'", **common, out=tmp_path / "out")
    assert convert(**common, out=tmp_path / "out", key="ema", images=images).warnings == []


def test_all_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    weights = load_file(TRAINED)
    del weights["out.2.bias"], weights["middle_block.1.norm.weight"]
    weights["extra.weight"], weights["other.weight"] = torch.zeros(1), torch.zeros(1)
    weights["middle_block.0.in_layers.2.bias"] = torch.zeros(5)
    save_file(weights, tmp_path / "a.safetensors")
    fails(CheckpointError, "a.safetensors", "out.2.bias", "middle_block.1.norm.weight", "extra.weight", "other.weight",
          "middle_block.0.in_layers.2.bias", source=tmp_path / "a.safetensors", out=tmp_path / "out",
          format="improved-diffusion", settings=RIGHT)  # fmt: skip


def test_the_wrong_format(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fails(
        CheckpointError, "shadow_params", source=TRAINED, out=out, format="score-sde", preset="score-sde-ddpmpp-cifar10"
    )
    fails(CheckpointError, "21 tensors", source=TRAINED, out=out, format="puregen-energy")
    energy = EnergyNetwork(EnergyConfig(4)).state_dict()
    save_file({theirs: energy[ours] for theirs, ours in NAMES.items()}, tmp_path / "energy.safetensors")
    fails(CheckpointError, "energy.safetensors", source=tmp_path / "energy.safetensors", out=out, format="eclipse")
    # the model beside the average has names of score_sde's own
    source = GOLDEN / "score_sde.pth"
    fails(CheckpointError, "score_sde.pth", "output_blocks", source=source, out=out, format="eclipse", key="model")
    fails(CheckpointError, "score_sde.pth", "'ema.shadow_params'", source=source, out=out, format="eclipse")


# -- weights in shards -------------------------------------------------------------------------------

STEM = "diffusion_pytorch_model"


def in_shards(folder: Path, kind: str = "safetensors", index: bool = True, count: int = 2) -> Path:
    """The golden diffusers folder with its weights in several files."""
    shutil.copytree(GOLDEN / "diffusers", folder)
    weights = load_file(folder / f"{STEM}.safetensors")
    (folder / f"{STEM}.safetensors").unlink()
    table: dict[str, str] = {}
    for number in range(count):
        file = f"{STEM}-{number + 1:05d}-of-{count:05d}.{kind}"
        part = {name: weights[name] for name in sorted(weights)[number::count]}
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
        table |= dict.fromkeys(part, file)
    if index:
        (folder / f"{STEM}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_weights_in_shards_are_those_of_one_file(tmp_path: Path, kind: str, count: int) -> None:
    folder = in_shards(tmp_path / "shards", kind, count=count)
    quick(folder, tmp_path / "a", "diffusers")
    quick(GOLDEN / "diffusers", tmp_path / "b", "diffusers")
    assert weights_sha256(pretrained.load(tmp_path / "a")) == weights_sha256(pretrained.load(tmp_path / "b"))
    files = json.loads((tmp_path / "a/config.json").read_text())["details"]["converted"]["source"]["files"]
    assert len(files) == count + 3  # an index, and two configurations


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / f"{STEM}.safetensors.index.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / f"{STEM}.safetensors.index.json").unlink(), "in shards"),
    "a shard is missing": (lambda f: (f / f"{STEM}-00002-of-00002.safetensors").unlink(), "which is no file"),
    "a shard has others": (
        lambda f: shutil.copy(f / f"{STEM}-00001-of-00002.safetensors", f / f"{STEM}-00002-of-00002.safetensors"),
        "other weights in",
    ),
    "no map": (lambda f: edited(f, lambda values: values.pop("weight_map")), "index of shards"),
    "a map of numbers": (lambda f: edited(f, lambda values: values["weight_map"].update(a=3)), "index of shards"),
    "a file elsewhere": (lambda f: edited(f, lambda v: v["weight_map"].update(a="../a.safetensors")), "beside it"),
    "no JSON": (lambda f: (f / f"{STEM}.safetensors.index.json").write_text("{"), "index of shards"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_shards_that_are_not_whole_are_refused(tmp_path: Path, damage: str) -> None:
    folder = in_shards(tmp_path / "shards")
    change, words = DAMAGES[damage]
    change(folder)
    with pytest.raises(PurifyError, match=words):
        convert(folder, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_there_whole_is_taken_whole(tmp_path: Path) -> None:
    folder = in_shards(tmp_path / "shards")
    shutil.copy(GOLDEN / "diffusers" / f"{STEM}.safetensors", folder)
    quick(folder, tmp_path / "out", "diffusers")
    files = json.loads((tmp_path / "out/config.json").read_text())["details"]["converted"]["source"]["files"]
    assert f"{STEM}.safetensors" in files
    assert len(files) == 3
