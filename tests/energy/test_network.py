"""PureGen's energy network: the published shape and numbers, and a checkpoint that keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from purifyloader import pretrained, recipes
from purifyloader.energy import EnergyConfig, EnergyNetwork
from purifyloader.energy.network import energy_from_config
from purifyloader.errors import CheckpointError, ConfigError, InputError
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.convert.energy import NAMES, convert_energy
from tests.conftest import tiny_denoiser

GOLDEN = Path(__file__).parents[1] / "golden/energy/published-width-4.safetensors"


def tiny(seed: int = 0, **changes: Any) -> EnergyNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EnergyNetwork(EnergyConfig(**{"channels": 4, **changes}))


def test_the_published_size() -> None:
    network = EnergyNetwork()
    assert sum(p.numel() for p in network.parameters()) == 1_053_824
    assert len(network.state_dict()) == 21
    assert sorted(NAMES.values()) == sorted(network.state_dict())


def test_the_published_numbers() -> None:
    """What PureGen's own code gives for these weights, on values in [-1, 1] and beyond, at 12 x 10 pixels."""
    golden = load_file(GOLDEN)
    weights = {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}
    network = convert_energy(weights, "the golden file")
    assert network.config == EnergyConfig(channels=4)
    energy = network((golden["input"] + 1) / 2)
    torch.testing.assert_close(energy, golden["output"], rtol=1e-5, atol=1e-6)
    with safe_open(GOLDEN, "pt") as file:
        assert "EBMSNGAN32" in file.metadata()["made_with"]


def test_one_number_an_image_that_depends_on_no_other() -> None:
    network = tiny()
    x = torch.rand(5, 3, 16, 16)
    energy = network(x)
    assert energy.shape == (5,)
    assert energy.dtype == torch.float32
    torch.testing.assert_close(energy[[3, 1]], network(x[[3, 1]]))
    torch.testing.assert_close(network.train()(x), network.eval()(x), rtol=0, atol=0)
    assert network(x[:0]).shape == (0,)


def test_the_same_picture_twice_has_the_same_energy() -> None:
    """The mean over pixels, not the sum: away from the border the size of an image does not matter."""
    network = tiny()
    flat = torch.full((1, 3, 64, 64), 0.3)
    small, large = network(flat[..., :32, :32]).item(), network(flat).item()
    assert large == pytest.approx(small, rel=0.2)


def test_gradients_reach_the_image() -> None:
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    tiny()(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any())


def test_bfloat16_keeps_the_type_of_the_image() -> None:
    network, x = tiny(), torch.rand(2, 3, 8, 8)
    half = tiny().to(torch.bfloat16)(x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, network(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 3, 8), (1, 3, 8, 3), (1, 3, 8)])
def test_bad_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(B, 3, H, W\).*Got"):
        tiny()(torch.zeros(shape))


def test_bytes_are_refused() -> None:
    with pytest.raises(InputError, match=r"Got torch.uint8.*255"):
        tiny()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("changes", [{"channels": 0}, {"channels": 4.0}, {"channels": True}, {"image_channels": -1}])
def test_bad_configurations(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="an integer from 1 to"):
        EnergyConfig(**changes)


@pytest.mark.parametrize(
    "config", [{}, {"network": 3}, {"network": {"kind": "unet"}}, {"network": {"kind": "resnet", "x": 1}}]
)
def test_configurations_that_cannot_be_built(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Got"):
        energy_from_config(config)


# -- as a checkpoint ---------------------------------------------------------------------------------


def test_a_recipe_that_wants_a_denoiser_says_what_it_got(tmp_path: Path) -> None:
    pretrained.save(tiny(), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"must hold a denoiser\. Got an energy model .*kind='energy'"):
        recipes.eclipse(str(tmp_path / "a"))
    pretrained.save(tiny_denoiser(), tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"must hold an energy model\. Got a denoiser .*kind='denoiser'"):
        pretrained.load(tmp_path / "b", kind="energy")
    with pytest.raises(InputError, match=r"denoiser, energy\. Got 'vae'"):
        pretrained.load(tmp_path / "a", kind="vae")  # type: ignore[call-overload]


# -- the published layout ----------------------------------------------------------------------------


def published(seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    weights = tiny(seed, **changes).state_dict()
    return {theirs: weights[ours].clone() for theirs, ours in NAMES.items()}


def test_all_that_is_wrong_is_listed() -> None:
    weights = published()
    del weights["block3.c1.bias"], weights["l5.weight"]
    weights["block3.c_sc.weight"] = weights["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        convert_energy(weights, "x.pt")
    for part in ("x.pt", "21 tensors", "2 missing: l5.weight", "block3.c1.bias", "2 left over: block3.c_sc", "extra"):
        assert part in str(caught.value)
    weights = published()
    weights["block2.c2.weight"] = torch.zeros(4, 5, 3, 3)
    weights["block4.c1.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        convert_energy(weights, "x.pt")
    for part in (
        "block2.c2.weight (expected (4, 4, 3, 3), got (4, 5, 3, 3))",
        "block4.c1.bias (expected (4,), got (7,))",
    ):
        assert part in str(caught.value)


def test_variants_of_the_published_code_are_refused() -> None:
    with pytest.raises(CheckpointError, match="plain stack of convolutions"):
        convert_energy({"f.0.weight": torch.zeros(1)}, "x.pt")
    with pytest.raises(CheckpointError, match="12 input channels"):
        convert_energy(published(image_channels=12), "x.pt")
    with pytest.raises(CheckpointError, match="patch_size=2"):
        convert_energy(published(), "x.pt", {"nf": 4, "patch_size": 2})
    with pytest.raises(CheckpointError, match=r"nf=128.*Got 4"):
        convert_energy(published(), "x.pt", {"nf": 128, "patch_size": 1})
    weights = published()
    weights["block1.c1.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match=r"NaN or infinity: block1\.c1\.bias"):
        convert_energy(weights, "x.pt")


def test_half_precision_and_memory_format_do_not_matter() -> None:
    half = {name: value.half() for name, value in published().items()}
    network = convert_energy(half, "x.pt")
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    turned = {
        name: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
        for name, value in published().items()
    }
    assert weights_sha256(convert_energy(turned, "x.pt")) == weights_sha256(tiny())
