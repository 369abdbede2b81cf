"""Every kind of model keeps the contract of checkpoints: what is saved comes back, and nothing damaged comes back.

A new kind adds a row to `CASES`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from purifyloader import pretrained
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.schedule import CosineSchedule
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.energy import EnergyConfig, EnergyNetwork
from purifyloader.errors import CheckpointError, InputError
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained import checkpoint
from purifyloader.pretrained.kinds import KINDS, ModelKind, kind_of, kind_of_format
from purifyloader.pretrained.plausibility import dead_leaves
from tests.conftest import plain_denoiser

FILES = ("README.md", "config.json", "model.safetensors")


class Case(NamedTuple):
    """A kind of model with tiny networks.

    Attributes:
        make: a model with the weights of a seed.
        golden: what config.json says of it for ever.
        unbuildable: changes of this that no network can be built from.
        card: what the card must hold.
        shape: of a tensor of the network, by its name.
    """

    make: Callable[[int], Any]
    golden: dict[str, Any]
    unbuildable: list[dict[str, Any]]
    card: list[str]
    shape: tuple[str, tuple[int, ...]]


def denoiser(seed: int = 0) -> NetworkDenoiser:
    config = UNetConfig(
        channels=8,
        multipliers=(1, 2),
        blocks=1,
        attention_levels=(),
        middle_attention=False,
        norm_groups=4,
        learned_variance=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(config)
        torch.nn.init.normal_(network.conv_out.weight)  # otherwise zero, and the output trivial
    return NetworkDenoiser(network, "epsilon", (0.01, 0.5), CosineSchedule(4000))


def energy(seed: int = 0) -> EnergyNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EnergyNetwork(EnergyConfig(channels=4))


CASES = {
    "denoiser": Case(
        denoiser,
        {
            "parameterization": "epsilon",
            "sigma_range": [0.01, 0.5],
            "schedule": {"kind": "cosine", "timesteps": 4000},
            "network": {"kind": "unet", **denoiser().network.config.to_dict()},
        },
        [{"parameterization": "magic"}, {"sigma_range": ["a", 1]}, {"network": {"kind": "vit"}}],
        ["epsilon", "2.55 to 128 px", "cosine", "load(path_to_this_folder)`"],
        ("stem.weight", (8, 3, 3, 3)),
    ),
    "denoiser, plain": Case(
        lambda seed: plain_denoiser(seed),
        {
            "parameterization": "edm",
            "sigma_range": [0.001, 0.3],
            "schedule": None,
            "network": {
                "kind": "plain-unet",
                "widths": [8, 16],
                "blocks": [1, 1],
                "unshuffle": 2,
                "image_channels": 3,
            },
        },
        [{"network": {"kind": "plain-unet", "widths": [8]}}, {"network": {"kind": "plain-unet", "channels": 8}}],
        ["edm", "0.255 to 76.5 px", "load(path_to_this_folder)`"],
        ("to_half.0.weight", (16, 8, 2, 2)),
    ),
    "energy": Case(
        energy,
        {"network": {"kind": "resnet", "channels": 4, "image_channels": 3}},
        [{"temperature": 0}, {"network": 3}, {"network": {"kind": "unet"}}, {"network": {"kind": "resnet", "x": 1}}],
        ['kind="energy"', "low on clean images"],
        ("readout.weight", (1, 4)),
    ),
}


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(name: str) -> Case:
    return CASES[name]


@pytest.fixture
def kind(name: str) -> ModelKind:
    return KINDS[name.partition(",")[0]]


@pytest.fixture
def saved(case: Case, tmp_path: Path) -> Path:
    pretrained.save(case.make(0), tmp_path / "tiny", name="tiny", details={"steps": 7})
    return tmp_path / "tiny"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def put_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Other tensors under a config whose hash fits, as only a wrong tool would write them."""
    file = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    kind = kind_of_format(config["format"])
    assert kind is not None
    header = {key: config[key] for key in ("format", "version", kind.name)}
    save_file(weights, file, metadata={"purifyloader": json.dumps(header)})
    edit_config(folder, model_sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def fails(kind: ModelKind, folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        pretrained.load(folder, kind.name)
    for part in ("Got", *parts):
        assert part in str(caught.value), caught.value


def weights_of(kind: ModelKind, model: Any) -> dict[str, torch.Tensor]:
    return dict(kind.network(model).state_dict())


def test_every_kind_has_a_row() -> None:
    assert {name.partition(",")[0] for name in CASES} == set(KINDS)
    assert len({kind.format for kind in KINDS.values()}) == len(KINDS)


# -- what is saved comes back ------------------------------------------------------------------------


def test_a_model_comes_back(case: Case, kind: ModelKind, saved: Path) -> None:
    before = torch.get_rng_state()
    again = pretrained.load(str(saved), kind.name)
    assert torch.equal(torch.get_rng_state(), before), "loading draws no random numbers"
    assert kind_of(again) is kind
    assert type(again) is type(case.make(0))
    assert again.name == "tiny"
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in again.parameters())
    assert weights_sha256(again) == weights_sha256(case.make(0))
    assert sorted(os.listdir(saved)) == list(FILES)


def test_golden_configuration(case: Case, kind: ModelKind, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    digest = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert config == {
        "format": f"purifyloader-{kind.name}",
        "version": 1,
        "name": "tiny",
        kind.name: case.golden,
        "model_sha256": digest,
        "details": {"steps": 7},
    }
    assert kind.config(pretrained.load(saved, kind.name)) == case.golden


def test_files_are_byte_stable(case: Case, kind: ModelKind, saved: Path, tmp_path: Path) -> None:
    for other, model in (("b", case.make(0)), ("c", pretrained.load(saved, kind.name))):
        pretrained.save(model, tmp_path / other, name="tiny", details={"steps": 7})
        for file in FILES:
            assert (saved / file).read_bytes() == (tmp_path / other / file).read_bytes()


def test_weights_lie_in_the_order_of_their_names(case: Case, kind: ModelKind, saved: Path) -> None:
    data = (saved / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    assert list(header.pop("__metadata__")) == ["purifyloader"]
    assert list(header) == sorted(weights_of(kind, case.make(0)))
    assert {entry["dtype"] for entry in header.values()} == {"F32"}


@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"memory_format": torch.channels_last}])
def test_weights_are_stored_as_contiguous_float32(
    case: Case, kind: ModelKind, tmp_path: Path, change: dict[str, Any]
) -> None:
    model = case.make(0).to(**change)
    pretrained.save(model, tmp_path / "a")
    again = weights_of(kind, pretrained.load(tmp_path / "a", kind.name))
    assert pretrained.load(tmp_path / "a", kind.name).name is None
    for name, value in weights_of(kind, model).items():
        assert torch.equal(again[name], value.float())


def test_the_card(case: Case, saved: Path, tmp_path: Path) -> None:
    card = (saved / "README.md").read_text()
    for part in ("# tiny", f"{sum(p.numel() for p in case.make(0).parameters()):,}", *case.card):
        assert part in card
    pretrained.save(case.make(0), tmp_path / "b", card="# My words\n")
    assert (tmp_path / "b/README.md").read_text() == "# My words\n"


def test_shipped_models(kind: ModelKind) -> None:
    names = pretrained.available(kind.name)
    assert names
    assert names == sorted(names)
    assert set(names) <= set(pretrained.available())
    for name in names:
        assert pretrained.load(name, kind.name).name == name


def test_a_summary_needs_no_weights(case: Case, kind: ModelKind, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "read_safetensors", None)
    model = case.make(0)
    summary = checkpoint.summary(saved)
    assert (summary.kind, summary.parameters) == (kind.name, sum(p.numel() for p in model.parameters()))
    assert summary.words == kind.describe(case.golden)
    assert checkpoint.kind_of_folder(saved) is kind


# -- what it is asked for ----------------------------------------------------------------------------


def test_another_kind_is_refused_by_name(kind: ModelKind, saved: Path) -> None:
    for other in KINDS.values():
        if other is not kind:
            fails(other, saved, f"must hold {other.words}. Got {kind.words}", f"kind={kind.name!r}")


def test_unknown_kinds(saved: Path) -> None:
    with pytest.raises(InputError, match=r"kind must be one of denoiser, energy\. Got 'vae'"):
        pretrained.load(saved, "vae")
    with pytest.raises(InputError, match=r"kind must be one of 'denoiser', 'energy'.*Got 'energies'"):
        pretrained.available("energies")
    assert kind_of(torch.nn.Identity()) is None
    assert kind_of_format("other") is None
    assert kind_of_format(["purifyloader-denoiser"]) is None


def test_what_is_no_model_cannot_be_saved(kind: ModelKind, case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"NetworkDenoiser or EnergyNetwork\. Got UNet"):
        pretrained.save(denoiser().network, tmp_path / "a")  # type: ignore[arg-type]


def test_a_converted_model_is_judged(case: Case, kind: ModelKind) -> None:
    model = case.make(0)
    assert kind.image_channels(model) == 3
    judged = kind.judge(model, dead_leaves(2, 16, 3), "images")
    assert json.dumps(judged.to_dict(), allow_nan=False)
    assert judged.images == "2 images"


# -- what is damaged ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_file(kind: ModelKind, saved: Path, file: str) -> None:
    (saved / file).unlink()
    fails(kind, saved, file, str(saved))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "must be JSON"),
        ("\udcff", "must be JSON"),
        ("[]", "Got list"),
        ("{}", "Got None"),
        ('{"format": "purifyloader-KIND", "version": 2}', "Update purifyloader"),
        ('{"format": "purifyloader-KIND", "version": "1"}', "Got '1'"),
        ('{"format": "purifyloader-KIND", "version": 1, "name": 3}', "'name'"),
        ('{"format": "purifyloader-KIND", "version": 1, "name": null}', "'KIND'"),
    ],
)
def test_bad_config_file(kind: ModelKind, saved: Path, text: str, part: str) -> None:
    text, part = text.replace("KIND", kind.name), part.replace("KIND", kind.name)
    (saved / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    fails(kind, saved, part, "config.json")


def test_an_edited_config_is_refused(case: Case, kind: ModelKind, saved: Path) -> None:
    edit_config(saved, **{kind.name: {**case.golden, "more": 1}})
    fails(kind, saved, "edited", "config.json")


def test_a_config_that_cannot_be_built(case: Case, kind: ModelKind, saved: Path) -> None:
    for change in case.unbuildable:
        edit_config(saved, **{kind.name: {**case.golden, **change}})
        put_weights(saved, weights_of(kind, case.make(0)))
        fails(kind, saved, "config.json", kind.words)


def test_weights_that_do_not_fit(case: Case, kind: ModelKind, saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    name, shape = case.shape
    first, second, *_ = (key for key in sorted(weights) if key != name)
    weights["other.weight"] = torch.zeros(1)
    del weights[first]
    weights[second] = weights[second].double()
    weights[name] = torch.zeros(5, 4)
    put_weights(saved, weights)
    fails(
        kind,
        saved,
        f"1 missing: {first}",
        "1 left over: other.weight",
        f"{name} (expected {shape}, got (5, 4))",
        f"{second} (torch.float64)",
        "model.safetensors",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(case: Case, kind: ModelKind, saved: Path, tmp_path: Path, value: float) -> None:
    model, name = case.make(0), case.shape[0]
    with torch.no_grad():
        kind.network(model).get_parameter(name).view(-1)[1] = value
    with pytest.raises(InputError, match=f"NaN or infinity in {name}"):
        pretrained.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    put_weights(saved, weights_of(kind, model))
    fails(kind, saved, f"NaN or infinity: {name}")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(kind: ModelKind, saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(kind, saved, "model.safetensors", "truncated")


@pytest.mark.parametrize("at", [-1, -100])
def test_flipped_byte(kind: ModelKind, saved: Path, at: int) -> None:
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    fails(kind, saved, "model.safetensors", "SHA-256", "damaged")
