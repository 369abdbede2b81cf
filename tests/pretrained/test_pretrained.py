"""Checkpoints: what is saved comes back, and nothing damaged comes back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from purifyloader import pretrained
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.schedule import CosineSchedule
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.errors import CheckpointError, InputError, PurifyError
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained import checkpoint
from purifyloader.pretrained.registry import is_local

TINY = UNetConfig(
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    attention_levels=(),
    middle_attention=False,
    norm_groups=4,
    learned_variance=False,
)


def make(seed: int = 0, schedule: bool = False) -> NetworkDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(TINY)
        torch.nn.init.normal_(network.conv_out.weight)  # otherwise zero, and the output trivial
    if schedule:
        return NetworkDenoiser(network, "epsilon", (0.01, 0.5), CosineSchedule(4000))
    return NetworkDenoiser(network, "edm", (0.01, 0.5))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pretrained.save(make(), tmp_path / "tiny", name="tiny")
    return tmp_path / "tiny"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def put_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Other tensors under a config whose hash fits, as only a wrong tool would write them."""
    file = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    header = {"format": config["format"], "version": config["version"], "denoiser": config["denoiser"]}
    save_file(weights, file, metadata={"purifyloader": json.dumps(header)})
    edit_config(folder, model_sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def fails(folder: str | Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        pretrained.load(folder)
    message = str(caught.value)
    assert "Got" in message
    for part in parts:
        assert part in message, message


def test_a_shipped_name_comes_before_a_folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("purifyloader.pretrained.registry._SHIPPED", tmp_path)
    assert pretrained.available() == ["tiny"]
    work = tmp_path / "work"
    pretrained.save(make(1), work / "tiny", name="local")
    monkeypatch.chdir(work)
    assert pretrained.load("tiny").name == "tiny"
    assert pretrained.load("./tiny").name == "local"
    fails("tinny", "'tinny'", "shipped name (tiny)", "path to a checkpoint folder")


@pytest.mark.parametrize("model", ["no-such-model", "a/b/c", "/nowhere/at/all"])
def test_unknown_model(model: str) -> None:
    fails(model, "shipped name", "path to a checkpoint folder", model)


def test_not_a_name_at_all() -> None:
    with pytest.raises(InputError, match="Got int"):
        pretrained.load(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("file", ["model.pt", "weights.bin", "x.ckpt", "x.pth"])
def test_pickles_are_not_read(tmp_path: Path, file: str) -> None:
    torch.save({}, tmp_path / file)
    fails(tmp_path / file, "pickle", "purifyloader convert", "model.safetensors", file)
    fails(tmp_path, "pickle", "purifyloader convert", file)


def test_a_file_instead_of_its_folder(saved: Path) -> None:
    fails(saved / "model.safetensors", "Give its folder", "purifyloader convert")


def test_somebody_elses_folder(tmp_path: Path) -> None:
    """What it is and how to convert it, not which of our files it lacks."""
    folder = tmp_path / "a"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    fails(folder, "diffusers", f"purifyloader convert {folder} OUT --format diffusers")
    (folder / "config.json").write_text('{"nf": 128, "patch_size": 1}')
    fails(folder, "energy", "--format puregen-energy")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    fails(folder, "purifyloader-denoiser", "Got None")
    pretrained.save(make(), folder, overwrite=True)
    (folder / "ema.pt").touch()  # beside a checkpoint of ours it does not matter
    pretrained.load(folder)


def test_list_is_available() -> None:
    assert pretrained.list() == pretrained.available() == sorted(pretrained.list())
    assert "cifar10-sparse" in pretrained.list()


def test_a_checkpoint_of_the_first_version_stays_as_it_is(tmp_path: Path) -> None:
    """The one that ships was saved by version 0.1.0: loaded and saved again, its weights are the same bytes."""
    shipped = Path(pretrained.__file__).parent / "cifar10-sparse"
    config = json.loads((shipped / "config.json").read_text())
    denoiser = pretrained.load("cifar10-sparse")
    pretrained.save(denoiser, tmp_path / "a", name="cifar10-sparse", details=config["details"])
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (shipped / file).read_bytes()


def test_a_killed_save_is_not_read_as_whole(saved: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    pretrained.save(make(1), new, name="new")
    # Killed after the weights, over nothing and over an older checkpoint.
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(new / "model.safetensors", half)
    fails(half, "config.json", "stopped")
    shutil.copy(new / "model.safetensors", saved)
    fails(saved, "a save over it was stopped")


def test_config_is_written_last(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), rename(a, b)))
    pretrained.save(make(1), saved, overwrite=True)
    assert order == ["model.safetensors", "README.md", "config.json"]


def test_overwriting_must_be_asked_for(saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"overwrite must be set"):
        pretrained.save(make(1), saved)
    assert (saved / "model.safetensors").read_bytes() == before
    pretrained.save(make(1), saved, overwrite=True)
    assert weights_sha256(pretrained.load(saved)) == weights_sha256(make(1))


def test_a_strangers_readme_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"README\.md"):
        pretrained.save(make(), tmp_path)
    assert os.listdir(tmp_path) == ["README.md"]


def test_bad_arguments_of_save(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"NetworkDenoiser or EnergyNetwork.*Got UNet"):
        pretrained.save(UNet(TINY), tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="file"):
        pretrained.save(make(), tmp_path / "file")
    with pytest.raises(InputError, match="Got int"):
        pretrained.save(make(), tmp_path / "a", name=3)  # type: ignore[arg-type]
    for details in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(InputError, match="details"):
            pretrained.save(make(), tmp_path / "a", details=details)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("at", ["model.safetensors", "README.md", "config.json"])
def test_a_failed_write_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    rename = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match=r"must be written to .*Got: .*No space left on device.*save it again"):
        pretrained.save(make(), tmp_path / "a")
    assert not list((tmp_path / "a").glob("*.tmp"))
    assert not (tmp_path / "a/config.json").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"written to .*file/a\. Got: "):
        pretrained.save(make(), tmp_path / "file/a")


def test_files_that_cannot_be_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        denied = PermissionError(13, "denied")
        patch.setattr("purifyloader.pretrained.checkpoint.opened", lambda _: (_ for _ in ()).throw(denied))
        fails(saved, "model.safetensors", "denied", "rights")
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    fails(saved, "config.json", "can be read")


PLAIN = {"kind": "plain-unet", "widths": [32, 64], "blocks": [1, 2]}
EDITED_NETWORKS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({**PLAIN, "widths": "ab"}, "PlainUNetConfig.widths must be a list of 1 to 16 numbers.* Got 'ab'"),
    "null": ({**PLAIN, "widths": None}, "PlainUNetConfig.widths must be a list of 1 to 16 numbers.* Got None"),
    "kind": ({**PLAIN, "kind": "../x"}, r"The network's kind must be one of .* Got '\.\./x'"),
    "kinds": ({**PLAIN, "kind": ["unet"]}, r"The network's kind must be one of .* Got \['unet'\]"),
    "bool": ({**PLAIN, "widths": [True, 2]}, r"PlainUNetConfig.widths must be an integer .* Got True"),
    "wide": ({**PLAIN, "widths": [65536] * 16, "blocks": [1] * 16}, "it was edited"),
    "other": ({**PLAIN, "unshuffle": 4}, "it was edited"),
}


@pytest.mark.parametrize("kind", EDITED_NETWORKS)
def test_the_first_field_that_was_edited_is_named(saved: Path, kind: str) -> None:
    network, why = EDITED_NETWORKS[kind]
    denoiser = json.loads((saved / "config.json").read_text())["denoiser"]
    edit_config(saved, denoiser={**denoiser, "network": network})
    first = r"first in \(saved → here\) denoiser\.network\.attention_levels: \[\] → absent: it was edited"
    with pytest.raises(CheckpointError, match=f"{first}.*" * (why != "it was edited") + why):
        pretrained.load(saved)
    with pytest.raises(CheckpointError, match=first):
        checkpoint.summary(saved)
    edit_config(saved, denoiser={**denoiser, "network": {**denoiser["network"], "channels": 16}})
    for read in (pretrained.load, checkpoint.summary):
        with pytest.raises(CheckpointError, match=r"denoiser\.network\.channels: 8 → 16: it was edited"):
            read(saved)


def test_a_summary_of_what_is_damaged(saved: Path) -> None:
    def fails(part: str) -> None:
        with pytest.raises(CheckpointError, match=rf"{part}.*Got"):
            checkpoint.summary(saved)

    config, weights = (saved / "config.json").read_bytes(), (saved / "model.safetensors").read_bytes()
    for sigma_range in (None, [0.1], [0.1, "much"], 3):
        edit_config(saved, denoiser={**json.loads(config)["denoiser"], "sigma_range": sigma_range})
        fails("sigma_range")
    (saved / "config.json").write_bytes(config)
    (saved / "model.safetensors").write_bytes(weights[:-1])
    fails("model.safetensors")
    (saved / "model.safetensors").unlink()
    fails("model.safetensors")
    for text in ("{", "[]", '{"format": "other"}', '{"format": ["purifyloader-denoiser"]}'):
        (saved / "config.json").write_text(text)
        fails("config.json")


def test_what_is_local(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stranger's configuration may name without anything being downloaded."""
    monkeypatch.chdir(saved.parent)
    for name in ("cifar10-sparse", "tiny", "./tiny", str(saved), saved):
        assert is_local(name)
    for name in (
        "some/model",
        "some/model@main",
        "tinny",
        "",
        "a\0b",
        Path("some/model"),
        saved / "config.json",
        "x" * 999,
    ):
        assert not is_local(name)
    assert not is_local(3)  # type: ignore[arg-type]
    (saved.parent / "some/model").mkdir(parents=True)
    assert is_local("some/model")


def test_weights_hash_is_of_the_weights_alone() -> None:
    denoiser = make()
    digest = weights_sha256(denoiser)
    # golden: it stands in fingerprints, so it must never change by accident
    layer = torch.nn.Linear(2, 1, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -2.0]]))
        layer.bias.fill_(1.0)
    expected = hashlib.sha256(
        b'["bias","float32",[1]]\n'
        + struct.pack("<f", 1.0)
        + b'["weight","float32",[1,2]]\n'
        + struct.pack("<2f", 0.5, -2)
    ).hexdigest()
    assert weights_sha256(layer) == expected
    assert digest == weights_sha256(make().eval().requires_grad_(False))
    assert digest == weights_sha256(make().to(memory_format=torch.channels_last))
    compiled = make()
    compiled.network = torch.compile(compiled.network)  # type: ignore[assignment]
    assert digest == weights_sha256(compiled)
    assert digest != weights_sha256(make().to(torch.bfloat16))
    assert digest != weights_sha256(make(1))
    changed = make()
    with torch.no_grad():
        changed.network.stem.bias[0] += 1e-6
    assert digest != weights_sha256(changed)


def test_errors_are_of_the_family() -> None:
    with pytest.raises(PurifyError):
        pretrained.load("no-such-model")
