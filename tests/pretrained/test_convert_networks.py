"""Published networks, converted: the output of their own implementations, and every way a file can be wrong."""

from __future__ import annotations

import copy
import functools
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from purifyloader.diffusion.denoiser import NetworkDenoiser, denoiser_from_config
from purifyloader.diffusion.schedule import (
    ContinuousVP,
    CosineSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    Schedule,
)
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.errors import CheckpointError, ConfigError
from purifyloader.pretrained import load, save
from purifyloader.pretrained.convert import diffusers, openai, score_sde
from purifyloader.pretrained.convert.diffusers import (
    DiffusersSettings,
    denoiser_from_folder_parts,
    schedule_from_scheduler,
)
from purifyloader.pretrained.convert.mapping import qkv_rows, tensors_only, trained_range
from purifyloader.pretrained.convert.openai import OpenAISettings, denoiser_from_state
from purifyloader.pretrained.convert.score_sde import ScoreSDESettings, denoiser_from_shadow

GOLDEN = Path(__file__).parents[1] / "golden" / "convert"

IMPROVED = OpenAISettings(
    schedule=CosineSchedule(4000), rescale_timesteps=True, qkv_order="heads-first", heads=2, norm_groups=2
)
GUIDED = OpenAISettings(
    schedule=LinearSchedule(1000), rescale_timesteps=False, qkv_order="channels-first", head_channels=2, norm_groups=2
)
DEEP = score_sde.PRESETS["score-sde-ddpmpp-cifar10-deep"]


@functools.cache
def _read_once(name: str) -> dict[str, Any]:
    return torch.load(GOLDEN / name, weights_only=True)


def torch_file(name: str) -> dict[str, Any]:
    return copy.deepcopy(_read_once(name))


def folder() -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    config, scheduler = (
        json.loads((GOLDEN / "diffusers" / f).read_text()) for f in ("config.json", "scheduler_config.json")
    )
    return config, scheduler, load_file(GOLDEN / "diffusers" / "diffusion_pytorch_model.safetensors")


def shadow() -> list[Tensor]:
    return torch_file("score_sde.pth")["ema"]["shadow_params"]


def converted(name: str) -> NetworkDenoiser:
    if name == "improved":
        return denoiser_from_state(torch_file("improved.pt"), IMPROVED)
    if name == "guided":
        return denoiser_from_state(torch_file("guided.pt"), GUIDED)
    if name == "score_sde":
        file = torch_file("score_sde.pth")
        return denoiser_from_shadow(file["ema"]["shadow_params"], file["model"], DEEP)
    return denoiser_from_folder_parts(*folder())


def convert(name: str, state: dict[str, Tensor]) -> NetworkDenoiser:
    if name == "diffusers":
        return denoiser_from_folder_parts(*folder()[:2], state)
    return denoiser_from_state(state, IMPROVED if name == "improved" else GUIDED)


FORMATS = ["improved", "guided", "score_sde", "diffusers"]


# -- the published implementations' own output -----------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_output_of_the_published_implementation(name):
    expected = load_file(GOLDEN / f"{name}.expected.safetensors")
    with torch.no_grad():
        got = converted(name).network(expected["x"], expected["time"])
    assert expected["output"].std() > 0.5
    torch.testing.assert_close(got, expected["output"], rtol=0, atol=1e-5)


# (abar as the papers define it, time the network is given) of some timestep, counted from 1
def vp_of(name: str) -> list[tuple[float, float]]:
    if name == "improved":
        f = [math.cos((t / 4000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(4001)]
        return [(f[t] / f[0], (t - 1) * 0.25) for t in (1, 100, 2000)]
    if name == "score_sde":  # t in (0, 1], beta from 0.1 to 20; labels 999 t
        return [(math.exp(-(19.9 * t**2 / 2 + 0.1 * t)), 999 * t) for t in (0.001, 0.1, 0.12345)]
    abar = np.cumprod([1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(1000)])
    return [(float(abar[t - 1]), float(t - 1)) for t in (1, 100, 700)]


@pytest.mark.parametrize("name", FORMATS)
def test_x0_is_that_of_the_variance_preserving_process(name):
    """x0 = (x_vp - sqrt(1 - abar) eps) / sqrt(abar), with the time that the published network is given."""
    denoiser = converted(name).double()
    generator = torch.Generator().manual_seed(0)
    x0, z = (torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    for abar, time in vp_of(name):
        x_vp = math.sqrt(abar) * (2 * x0 - 1) + math.sqrt(1 - abar) * z
        with torch.no_grad():
            out = denoiser.network(x_vp, torch.full((2,), time, dtype=torch.float64))
        expected = (x_vp - math.sqrt(1 - abar) * out[:, :3]) / math.sqrt(abar)
        sigma = math.sqrt((1 - abar) / abar) / 2
        got, fraction = denoiser.predict(x0 + sigma * z, torch.full((2,), sigma, dtype=torch.float64))
        torch.testing.assert_close(2 * got - 1, expected, rtol=1e-6, atol=1e-6)
        assert (fraction is None) is (name != "improved")
        if fraction is not None:
            torch.testing.assert_close(fraction, (out[:, 3:] + 1) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_a_converted_denoiser_is_saved_and_loaded(name, tmp_path):
    denoiser = converted(name)
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in denoiser.parameters())
    again = denoiser_from_config(json.loads(json.dumps(denoiser.config())))
    assert again.config() == denoiser.config()
    save(denoiser, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert loaded.config() == denoiser.config()
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded(x, torch.tensor([0.1])), denoiser(x, torch.tensor([0.1])))


def test_what_the_shapes_say():
    def read(name: str) -> dict[str, Any]:
        return converted(name).network.config.to_dict()

    improved, guided = read("improved"), read("guided")
    assert (improved["channels"], improved["multipliers"], improved["blocks"]) == (4, [1, 2], 1)
    assert (improved["attention_levels"], improved["heads"], improved["learned_variance"]) == ([1], 2, True)
    assert not {"scale_shift", "resample", "stem_channels"} & set(improved)  # as ECLIPSE's network has them
    assert (guided["scale_shift"], guided["resample"], guided["head_channels"]) == (False, "block", 2)
    assert (guided["attention_levels"], guided["learned_variance"]) == ([0, 1], False)
    sde = read("score_sde")
    assert (sde["resample"], sde["up_attention"], sde["rescale_sums"]) == ("block-skip", "last", True)
    assert (sde["attention_levels"], sde["multipliers"], sde["norm_eps"]) == ([1], [1, 1], 1e-6)
    ddpm = read("diffusers")
    assert (ddpm["resample"], ddpm["sines_first"], ddpm["frequency_shift"]) == ("conv-right", True, 1)


def test_weights_are_copied_whatever_their_type():
    state = {name: tensor.to(torch.float64) for name, tensor in torch_file("improved.pt").items()}
    denoiser = denoiser_from_state(state, IMPROVED)
    before = denoiser.network.stem.weight.clone()
    state["input_blocks.0.0.weight"].zero_()
    assert torch.equal(denoiser.network.stem.weight, before)
    half = denoiser_from_state({k: v.half() for k, v in torch_file("improved.pt").items()}, IMPROVED)
    assert half.network.stem.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["improved", "guided"])
def test_the_two_qkv_orders_are_told_apart_by_the_setting_only(name):
    settings = {"improved": IMPROVED, "guided": GUIDED}[name]
    other = replace(settings, qkv_order=next(o for o in openai.QKV_ORDERS if o != settings.qkv_order))
    expected = load_file(GOLDEN / f"{name}.expected.safetensors")
    with torch.no_grad():
        wrong = denoiser_from_state(torch_file(f"{name}.pt"), other).network(expected["x"], expected["time"])
    assert (wrong - expected["output"]).abs().max() > 1e-2


def test_qkv_rows_are_a_permutation():
    rows = qkv_rows(torch.arange(3 * 2 * 4), heads=2)
    assert rows.tolist() == [*range(4), *range(8, 12), *range(16, 20), *range(4, 8), *range(12, 16), *range(20, 24)]
    one = torch.arange(12)
    assert torch.equal(qkv_rows(one, heads=1), one)


# -- names, made from scratch: any configuration can be read back ----------------------------------------


def openai_names(network: UNet) -> dict[str, Tensor]:
    """The state of one of our networks under OpenAI's names, from the list in the format's description."""
    config = network.config
    state = {}
    residual = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "embed": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    }
    for name, tensor in network.state_dict().items():
        head, *rest = name.split(".")
        flat = tensor.squeeze(-1) if rest[-2:-1] in (["qkv"], ["proj"]) else tensor
        if head in ("down", "up", "middle"):
            block = rest.pop(0) if head != "middle" else ""
            position, leaf = rest[0], rest[1]
            prefix = {
                "down": f"input_blocks.{int(block or 0) + 1}.{position}",
                "up": f"output_blocks.{block}.{position}",
                "middle": f"middle_block.{position}",
            }[head]
            stage = network.get_submodule(".".join(name.split(".")[: 2 if head == "middle" else 3]))
            names = {**residual, "norm": "norm", "qkv": "qkv", "proj": "proj_out"}
            names["conv"] = "op" if head == "down" else "conv"
            state[f"{prefix}.{names[leaf]}.{rest[2]}"] = flat
            assert isinstance(stage, nn.Module)
        else:
            prefix = {
                "stem": "input_blocks.0.0",
                "norm_out": "out.0",
                "conv_out": "out.2",
                "time_embed": "time_embed",
            }[head]
            state[".".join([prefix, *rest])] = flat
    assert len(state) == len(network.state_dict()), config
    return state


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(channels=8, norm_groups=4, blocks=2, dropout=0.0),
        UNetConfig(channels=8, norm_groups=4, blocks=1, multipliers=(1,), attention_levels=()),
        UNetConfig(channels=8, norm_groups=4, blocks=3, multipliers=(1, 1, 1), resample="plain", attention_levels=(2,)),
        UNetConfig(channels=8, norm_groups=4, blocks=1, multipliers=(1, 3), resample="block", attention_levels=(0,)),
        UNetConfig(
            channels=16, norm_groups=4, blocks=2, multipliers=(0.5, 1, 1.5), stem_channels=8, attention_levels=(1,)
        ),
        UNetConfig(channels=8, norm_groups=4, blocks=2, scale_shift=False, head_channels=4, learned_variance=False),
        UNetConfig(channels=8, norm_groups=4, blocks=2, multipliers=(2, 1), image_channels=1, attention_levels=(0, 1)),
    ],
    ids=str,
)
def test_every_option_is_read_off_the_shapes(config):
    network = UNet(config)
    settings = replace(
        IMPROVED, norm_groups=4, heads=None if config.head_channels else 4, head_channels=config.head_channels
    )
    denoiser = denoiser_from_state(openai_names(network), settings)
    expected = config if config.head_channels is None else replace(config, heads=1)
    assert denoiser.network.config == expected
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), denoiser.network.parameters(), strict=True))


@pytest.mark.parametrize(
    ("config", "count", "name"),
    [
        (UNetConfig(), 52_546_438, "cifar10_uncond_50M"),
        (UNetConfig(multipliers=(1, 2, 3, 4), attention_levels=(2, 3)), 121_063_942, "imagenet64_uncond_100M"),
        (
            UNetConfig(
                multipliers=(1, 1, 2, 2, 4, 4),
                blocks=2,
                heads=1,
                scale_shift=False,
                attention_levels=(4,),
            ),
            113_676_678,
            "lsun_uncond_100M",
        ),
        (
            UNetConfig(
                channels=256,
                multipliers=(1, 1, 2, 2, 4, 4),
                blocks=2,
                head_channels=64,
                resample="block",
                attention_levels=(3, 4, 5),
            ),
            552_814_086,
            "256x256_diffusion_uncond",
        ),
    ],
    ids=str,
)
def test_the_published_sizes(config, count, name):
    with torch.device("meta"):
        network = UNet(config)
    assert sum(p.numel() for p in network.parameters()) == count
    preset = openai.PRESETS[name]
    assert (preset.head_channels or preset.heads) == (config.head_channels or config.heads)


def test_the_deep_ddpmpp_of_diffpure_and_the_network_of_puregen():
    deep = UNetConfig(
        multipliers=(1, 2, 2, 2),
        blocks=8,
        attention_levels=(1,),
        learned_variance=False,
        scale_shift=False,
        up_attention="last",
        resample="block-skip",
        rescale_sums=True,
    )
    config = {
        "_class_name": "UNet2DModel",
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
    }
    for ours, count in ((deep, 106_632_579), (UNetConfig(**diffusers._read_config(config)), 113_673_219)):
        with torch.device("meta"):
            assert sum(p.numel() for p in UNet(ours).parameters()) == count


# -- diffusers, live ------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
DDPM: dict[str, Any] = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "attention_head_dim": None,
}
PUREGEN: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}


@pytest.fixture(scope="module")
def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


def live(library: Any, **changes: Any) -> nn.Module:
    """Their network, every layer of it random and none at zero."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        network = library.UNet2DModel(**{**TINY, **changes})
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def config_of(network: Any) -> dict[str, Any]:
    return json.loads(network.to_json_string())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        DDPM,
        PUREGEN,
        {"add_attention": False},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
        {"out_channels": 6},
        {"freq_shift": 1},
        {
            "block_out_channels": (16, 24, 40),
            "layers_per_block": 2,
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
        },
        {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
    ],
    ids=lambda c: ",".join(c) or "tiny",
)
def test_diffusers_own_output(library, changes):
    theirs = live(library, **changes)
    denoiser = denoiser_from_folder_parts(
        config_of(theirs), None, theirs.state_dict(), DiffusersSettings(schedule=LinearSchedule(1000))
    )
    side = max(8, 2 ** len(theirs.config.block_out_channels) // 2)
    x, t = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 31, 999])
    expected = theirs(x, t).sample
    assert expected.std() > 0.3
    torch.testing.assert_close(denoiser.network(x, t.float()), expected, rtol=0, atol=1e-5)


def test_attention_layers_under_their_old_names():
    config, scheduler, state = folder()
    old = {
        name.replace(".to_q.", ".query.")
        .replace(".to_k.", ".key.")
        .replace(".to_v.", ".value.")
        .replace(".to_out.0.", ".proj_attn."): tensor
        for name, tensor in state.items()
    }
    assert set(old) != set(state)
    got, expected = (denoiser_from_folder_parts(config, scheduler, s) for s in (old, state))
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "schedule"),
    [
        ({}, LinearSchedule(1000)),
        ({"beta_start": 1e-3}, LinearSchedule(1000, 1e-3, 0.02)),
        ({"num_train_timesteps": 200}, LinearSchedule(200, 1e-4, 0.02)),
        ({"num_train_timesteps": 10}, LinearSchedule(10, 1e-4, 0.02)),
        ({"beta_schedule": "squaredcos_cap_v2"}, CosineSchedule(1000)),
        ({"beta_schedule": "scaled_linear", "beta_end": 0.012}, ScaledLinearSchedule(1000, 1e-4, 0.012)),
    ],
    ids=str,
)
def test_schedules_against_diffusers(library, changes, schedule):
    scheduler = library.DDPMScheduler(**changes)
    got, parameterization = schedule_from_scheduler(json.loads(scheduler.to_json_string()))
    assert (got, parameterization) == (schedule, "epsilon")
    # theirs are float32
    np.testing.assert_allclose(got.betas, scheduler.betas.numpy(), rtol=1e-4)
    np.testing.assert_allclose(got.abar, scheduler.alphas_cumprod.numpy(), rtol=3e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "ours"), [("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "x0")])
def test_what_a_network_predicts_against_diffusers(library, kind, ours):
    """Its scheduler's estimate of x0, clipped by neither."""
    scheduler = library.DDPMScheduler(prediction_type=kind, clip_sample=False)
    theirs = live(library)
    denoiser = denoiser_from_folder_parts(
        config_of(theirs), json.loads(scheduler.to_json_string()), theirs.state_dict()
    )
    assert denoiser.parameterization == ours
    x0, z = (torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    for t in (0, 99, 500):
        x_t = scheduler.add_noise(2 * x0 - 1, z, torch.tensor([t]))
        expected = scheduler.step(theirs(x_t, t).sample, t, x_t).pred_original_sample
        sigma = torch.from_numpy(LinearSchedule(1000).sigma([t + 1]))
        got = denoiser(x0 + sigma.float()[:, None, None, None] * z, sigma)
        torch.testing.assert_close(2 * got - 1, expected, rtol=2e-5, atol=2e-5)


# -- the time and the range ------------------------------------------------------------------------------


def test_presets():
    for presets in (openai.PRESETS, diffusers.PRESETS, score_sde.PRESETS):
        for name, preset in presets.items():
            assert preset.source, name
            assert isinstance(preset.schedule, Schedule)
    assert openai.PRESETS["eclipse-cifar10"].schedule == CosineSchedule(4000)
    assert openai.PRESETS["256x256_diffusion_uncond"].head_channels == 64
    assert DEEP.schedule == ContinuousVP(1000)
    assert score_sde.PRESETS["score-sde-ddpmpp-cifar10-discrete"].schedule == LinearSchedule(1000)


def test_ranges_are_those_of_the_trained_timesteps():
    cosine = CosineSchedule(4000)
    assert converted("improved").sigma_range == (float(cosine.sigma(1)), float(cosine.sigma(4000)))
    config, scheduler, state = folder()
    capped = denoiser_from_folder_parts(config, scheduler, state, diffusers.PRESETS["puregen-ddpm"])
    assert capped.sigma_range == (float(LinearSchedule().sigma(1)), float(LinearSchedule().sigma(250)))
    low, high = converted("score_sde").sigma_range
    assert low == pytest.approx(math.sqrt(math.expm1(0.1e-5 + 19.9e-10 / 2)) / 2, rel=1e-6)  # t = 1e-5
    assert high == float(ContinuousVP(1000).sigma(1000))
    assert trained_range(LinearSchedule(), 100)[1] * 255 == pytest.approx(43.2, abs=0.05)


def test_times_of_the_formats():
    for name, sigma, expected in (
        ("improved", CosineSchedule(4000).sigma([1, 100]), [0, 24.75]),
        ("guided", LinearSchedule().sigma([1, 100]), [0, 99]),
        ("diffusers", LinearSchedule().sigma([1, 100]), [0, 99]),
        ("score_sde", ContinuousVP(1000).sigma([1, 100, 100.4]), [0.999, 99.9, 100.2996]),
    ):
        np.testing.assert_allclose(converted(name).time(torch.from_numpy(sigma)), expected, rtol=1e-9)
    discrete = denoiser_from_shadow(shadow(), None, replace(DEEP, continuous=False))
    assert discrete.time(torch.from_numpy(LinearSchedule().sigma([100.4]))).tolist() == [99]


# -- what is refused -------------------------------------------------------------------------------------


def everything_wrong(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two missing, two left over, two of another shape, an integer, a NaN. Its last entries are left alone."""
    names = sorted(n for n in state if "norm" not in n and n.endswith("weight") and state[n].ndim == 4)
    state = dict(state)
    for name in names[1:3]:
        del state[name]
    for name in names[3:5]:
        state[name] = torch.cat([state[name], state[name]], dim=1)
    state[names[5]] = torch.zeros(state[names[5]].shape, dtype=torch.int64)
    state[names[6]] = state[names[6]].clone().index_fill_(0, torch.tensor(0), math.nan)
    return {**state, "extra.weight": torch.zeros(3), "sigmas": torch.zeros(2)}


@pytest.mark.parametrize("name", ["improved", "diffusers"])
def test_all_that_does_not_fit_is_named(name):
    state = torch_file("improved.pt") if name == "improved" else folder()[2]
    names = sorted(n for n in state if "norm" not in n and n.endswith("weight") and state[n].ndim == 4)
    with pytest.raises(CheckpointError) as caught:
        convert(name, everything_wrong(state))
    message = str(caught.value)
    for text in ("2 missing", "2 left over", "2 of another shape", "1 not of a floating type", "1 with NaN", "Got"):
        assert text in message
    for key in (*names[1:7], "extra.weight", "sigmas"):
        assert key in message
    assert f"(expected {tuple(state[names[3]].shape)}, got" in message


def test_a_long_list_is_cut():
    state = {**torch_file("improved.pt"), **{f"extra.{i}": torch.zeros(1) for i in range(30)}}
    with pytest.raises(CheckpointError, match=r"30 left over: .* and 10 more"):
        denoiser_from_state(state, IMPROVED)


def test_a_wrong_shape_in_a_list_without_names_is_named_after_its_module():
    params = shadow()
    params[6], params[9], params[-1] = torch.zeros(5), torch.zeros(9), torch.tensor([math.nan, 0, 0])
    with pytest.raises(CheckpointError) as caught:
        denoiser_from_shadow(params, None, DEEP)
    for text in ("2 of another shape", "all_modules.3.GroupNorm_0.weight", "all_modules.3.Conv_0.bias", "1 with NaN"):
        assert text in str(caught.value)


@pytest.mark.parametrize("count", [1, 2, 30])
def test_a_list_cut_short_or_too_long(count):
    with pytest.raises(CheckpointError, match=f"{count} missing: all_modules"):
        denoiser_from_shadow(shadow()[:-count], None, DEEP)
    with pytest.raises(CheckpointError, match=rf"{count} left over: shadow_params\["):
        denoiser_from_shadow([*shadow(), *[torch.zeros(3)] * count], None, DEEP)


def test_a_list_that_is_not_the_models():
    model = torch_file("score_sde.pth")["model"]
    first = next(name for name in model if name.endswith("0.weight"))
    with pytest.raises(CheckpointError, match=r"1 of another shape: all_modules\.0\.weight"):
        denoiser_from_shadow(shadow(), {**model, first: torch.zeros(2, 2)}, DEEP)
    with pytest.raises(CheckpointError, match=r"Got \d+ for \d+, 0 of another shape"):
        denoiser_from_shadow(shadow(), {**model, "module.more": torch.zeros(2)}, DEEP)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ([], "empty"),
        ({}, "dict"),
        ([1, 2], "int"),
        ([torch.zeros(16, 8)], "Fourier"),
        ([torch.zeros(16, 4), torch.zeros(16)], "begins with"),
        ([torch.zeros(3, 3, 3, 3)] * 9, "begins with"),
        ([torch.zeros(()), torch.zeros(())], "begins with"),
    ],
    ids=["empty", "dict", "numbers", "fourier", "short", "convolutions", "scalars"],
)
def test_lists_of_other_networks(params, text):
    with pytest.raises(CheckpointError, match=f"Got.*{text}|{text}.*Got"):
        denoiser_from_shadow(params, None, DEEP)


def test_a_list_of_any_other_shapes_gives_no_other_error():
    generator = np.random.default_rng(0)
    whole = shadow()
    for _ in range(25):
        params = list(whole)
        for _ in range(generator.integers(1, 4)):
            where = int(generator.integers(len(params)))
            if generator.random() < 0.4:
                del params[where]
            else:
                params[where] = torch.zeros(tuple(generator.integers(1, 5, generator.integers(0, 5))))
        with pytest.raises(CheckpointError, match="Got"):
            denoiser_from_shadow(params, None, DEEP)


@pytest.mark.parametrize("name", ["improved", "guided", "diffusers"])
def test_a_state_of_any_other_shapes_gives_no_other_error(name):
    generator = np.random.default_rng(1)
    whole = folder()[2] if name == "diffusers" else torch_file(f"{name}.pt")
    for _ in range(15):
        state = dict(whole)
        for _ in range(generator.integers(1, 4)):
            where = sorted(state)[int(generator.integers(len(state)))]
            if generator.random() < 0.4:
                del state[where]
            else:
                state[where] = torch.zeros(tuple(generator.integers(1, 4, generator.integers(0, 5))))
        if all(k in state and state[k].shape == whole[k].shape for k in whole):
            continue  # drawn as it was
        with pytest.raises(CheckpointError, match="Got"):
            convert(name, state)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: {**s, "label_emb.weight": torch.zeros(10, 16)}, "conditional on 10 classes"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("output_blocks")}, "a classifier"),
        (lambda s: {**s, "input_blocks.0.0.weight": torch.zeros(4, 6, 3, 3)}, "small images larger"),
        (lambda s: {**s, "output_blocks.99999999.0.x": torch.zeros(1)}, "100000000 output_blocks"),
        (lambda s: {}, "an empty one"),
        (lambda s: list(s), "list"),
        (lambda s: {"state_dict": s}, r"'state_dict' \(dict\)"),
        (lambda s: {0: torch.zeros(1)}, "strings for names"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("time_embed")}, "Got none of them"),
        (lambda s: {k: v for k, v in s.items() if k != "input_blocks.0.0.weight"}, "Got none"),
    ],
    ids=["labels", "classifier", "upsampler", "endless", "empty", "list", "nested", "numbers", "no time", "no stem"],
)
def test_states_of_other_networks(change, text):
    with pytest.raises(CheckpointError, match=text):
        denoiser_from_state(change(torch_file("improved.pt")), IMPROVED)


@pytest.mark.parametrize("settings", [{"heads": 3}, {"heads": None, "head_channels": 5}, {"norm_groups": 32}], ids=str)
def test_settings_that_do_not_fit_the_weights(settings):
    with pytest.raises(CheckpointError, match=r"settings must describe.*Got"):
        denoiser_from_state(torch_file("improved.pt"), replace(IMPROVED, **settings))


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": None},
        {"head_channels": 4},
        {"heads": 0},
        {"heads": 2.0},
        {"norm_groups": 0},
        {"qkv_order": "legacy"},
        {"rescale_timesteps": None},
        {"schedule": "cosine"},
        {"parameterization": "score"},
        {"max_timestep": 0},
        {"max_timestep": 4001},
        {"max_timestep": math.nan},
        {"max_timestep": "100"},
    ],
    ids=str,
)
def test_bad_openai_settings(changes):
    with pytest.raises(ConfigError, match="Got"):
        replace(IMPROVED, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_min": 0},
        {"beta_min": 30},
        {"beta_max": "20"},
        {"continuous": 1},
        {"skip_rescale": None},
        {"timesteps": 0},
        {"norm_groups": 1.5},
        {"max_timestep": 1001},
    ],
    ids=str,
)
def test_bad_score_sde_settings(changes):
    with pytest.raises(ConfigError, match="Got"):
        replace(DEEP, **changes)


@pytest.mark.parametrize("changes", [{"schedule": 1000}, {"parameterization": "noise"}, {"max_timestep": -1}], ids=str)
def test_bad_diffusers_settings(changes):
    with pytest.raises(ConfigError, match="Got"):
        DiffusersSettings(**changes)


def test_required_settings_have_no_defaults():
    for settings in (OpenAISettings, ScoreSDESettings):
        with pytest.raises(TypeError, match="required keyword-only"):
            settings()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"center_input_sample": True}, "center_input_sample=True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"mid_block_type": None}, "mid_block_type=None"),
        ({"mid_block_scale_factor": 1.414}, "mid_block_scale_factor=1.414"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"num_class_embeds": 10}, "num_class_embeds=10"),
        ({"downsample_type": "resnet"}, "downsample_type='resnet'"),
        ({"upsample_type": "resnet"}, "upsample_type='resnet'"),
        ({"downsample_padding": 2}, "downsample_padding=2"),
        ({"time_embedding_dim": 64}, "time_embedding_dim=64"),
        ({"attn_norm_num_groups": 1}, "attn_norm_num_groups=1"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "without attn_norm_num_groups"),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "do not mirror"),
        ({"up_block_types": ["UpBlock2D"]}, "as many block_out_channels"),
        ({"block_out_channels": 8}, "as many block_out_channels"),
        ({"block_out_channels": [4, "8"]}, "block_out_channels="),
        ({"layers_per_block": 1.5}, "layers_per_block=1.5"),
        ({"out_channels": 4}, "out_channels=4"),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
        ({"norm_num_groups": 3}, "multiple of norm_groups=3"),
        ({"attention_head_dim": 3}, "head_channels=3"),
        ({"attention_head_dim": "8"}, "head_channels"),
        ({"norm_eps": "1e-6"}, "norm_eps"),
        ({"dropout": "no"}, "dropout"),
        ({"freq_shift": "1"}, "frequency_shift"),
        ({"layers_per_block": 10**9}, "1000000000"),
        ({"new_in_1_0": 3}, r"new_in_1_0=3 \(unknown\)"),
    ],
    ids=str,
)
def test_settings_of_diffusers_that_this_network_does_not_have(changes, named):
    config, scheduler, state = folder()
    with pytest.raises(CheckpointError, match=named) as caught:
        denoiser_from_folder_parts({**config, **changes}, scheduler, state)
    assert "Got" in str(caught.value)


def test_all_settings_are_named_at_once_and_null_ones_are_nothing():
    config, scheduler, state = folder()
    with pytest.raises(CheckpointError, match=r"center_input_sample=True.*act_fn='relu'"):
        denoiser_from_folder_parts({**config, "center_input_sample": True, "act_fn": "relu"}, scheduler, state)
    denoiser_from_folder_parts({**config, "new_in_1_0": None}, scheduler, state)
    with pytest.raises(CheckpointError, match="Got list"):
        denoiser_from_folder_parts([], scheduler, state)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_schedule": "sigmoid"}, "'sigmoid'"),
        ({"prediction_type": "flow"}, "'flow'"),
        ({"num_train_timesteps": "1000"}, "'1000'"),
        ({"beta_start": 0.5}, "beta_start=0.5"),
        ({"beta_end": None}, "beta_end=None"),
    ],
    ids=str,
)
def test_schedulers_that_are_refused(changes, named):
    config, scheduler, state = folder()
    with pytest.raises(CheckpointError, match=named) as caught:
        denoiser_from_folder_parts(config, {**scheduler, **changes}, state)
    assert "Got" in str(caught.value)


def test_a_schedule_must_come_from_somewhere_and_not_twice():
    config, scheduler, state = folder()
    with pytest.raises(CheckpointError, match=r"Got neither.*puregen-ddpm"):
        denoiser_from_folder_parts(config, None, state)
    other = DiffusersSettings(schedule=CosineSchedule(1000), parameterization="v")
    with pytest.raises(CheckpointError, match=r"must agree.*CosineSchedule.*LinearSchedule.*'v'.*'epsilon'"):
        denoiser_from_folder_parts(config, scheduler, state, other)
    with pytest.raises(CheckpointError, match=r"max_timestep.*Got 1001"):
        denoiser_from_folder_parts(config, scheduler, state, DiffusersSettings(max_timestep=1001))
    with pytest.raises(CheckpointError, match="has beta_schedule"):
        denoiser_from_folder_parts(config, {"_class_name": "ScoreSdeVeScheduler"}, state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_what_wrappers_put_before_every_name_is_taken_off(prefix: str) -> None:
    state = {f"{prefix}a.weight": torch.zeros(1), f"{prefix}module.b": torch.zeros(2)}
    assert list(tensors_only(state, "It")) == ["a.weight", "module.b"]
