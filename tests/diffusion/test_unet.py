"""The U-Net: its size against a count by hand, its parts against naive mathematics in float64."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from purifyloader import pretrained
from purifyloader.diffusion.denoiser import denoiser_from_config
from purifyloader.diffusion.unet import (
    RESAMPLE,
    UP_ATTENTION,
    AttentionBlock,
    Downsample,
    ResidualBlock,
    UNet,
    UNetConfig,
    Upsample,
    timestep_embedding,
)
from purifyloader.errors import ConfigError
from purifyloader.files.atomic import canonical_json
from tests.conftest import tiny_network

ODD = UNetConfig(
    channels=12,
    multipliers=(1, 3, 2),
    blocks=2,
    attention_levels=(0, 2),
    middle_attention=False,
    heads=3,
    norm_groups=4,
    image_channels=1,
)
DEEP = UNetConfig(
    channels=8,
    multipliers=(2, 1, 1, 2, 3),
    blocks=1,
    attention_levels=(3,),
    heads=2,
    norm_groups=2,
    learned_variance=False,
)


# every later option away from its default
DDPMPP = UNetConfig(
    channels=8,
    multipliers=(1, 1.5, 2),
    blocks=2,
    attention_levels=(0, 2),
    norm_groups=4,
    learned_variance=False,
    scale_shift=False,
    head_channels=4,
    up_attention="last",
    resample="block-skip",
    rescale_sums=True,
    norm_eps=1e-6,
    norm_group_channels=4,
    sines_first=True,
    frequency_shift=1.0,
    stem_channels=16,
)


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def counted(channels, multipliers, blocks, attention_levels, middle_attention, image_channels, out) -> int:
    """The parameters of improved-diffusion's U-Net, by hand from its description."""

    def conv(a: int, b: int, k: int = 3) -> int:
        return a * b * k * k + b

    def norm(a: int) -> int:
        return 2 * a

    def residual(a: int, b: int) -> int:
        embed = 4 * channels * 2 * b + 2 * b
        return norm(a) + conv(a, b) + embed + norm(b) + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    def attention(a: int) -> int:
        return norm(a) + conv(a, 3 * a, 1) + conv(a, a, 1)

    total = (channels + 1) * 4 * channels + (4 * channels + 1) * 4 * channels
    total += conv(image_channels, channels)
    levels = list(enumerate(channels * m for m in multipliers))
    now, kept = channels, [channels]
    for level, width in levels:
        for _ in range(blocks):
            total += residual(now, width) + (attention(width) if level in attention_levels else 0)
            now = width
            kept.append(now)
        if level != levels[-1][0]:
            total += conv(now, now)
            kept.append(now)
    total += 2 * residual(now, now) + (attention(now) if middle_attention else 0)
    for level, width in reversed(levels):
        for _ in range(blocks + 1):
            total += residual(now + kept.pop(), width) + (attention(width) if level in attention_levels else 0)
            now = width
        if level:
            total += conv(now, now)
    assert not kept
    return total + norm(now) + conv(now, out)


def test_the_network_of_the_paper():
    with torch.device("meta"):
        network = UNet(UNetConfig())
    assert parameters(network) == 52_546_438
    assert counted(128, (1, 2, 2, 2), 3, (1, 2), True, 3, 6) == 52_546_438


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (UNetConfig.small(), counted(32, (1, 2, 2), 1, (), False, 3, 3)),
        (ODD, counted(12, (1, 3, 2), 2, (0, 2), False, 1, 2)),
        (DEEP, counted(8, (2, 1, 1, 2, 3), 1, (3,), True, 3, 3)),
    ],
    ids=["small", "odd", "deep"],
)
def test_parameters_of_other_configurations(config, count):
    assert parameters(UNet(config)) == count


def test_small_is_as_large_as_its_docstring_says():
    assert parameters(UNet(UNetConfig.small())) == 1_125_315
    assert UNetConfig.small(channels=16).channels == 16


# -- shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [UNetConfig.small(), ODD, DEEP, DDPMPP], ids=["small", "odd", "deep", "ddpm++"])
@pytest.mark.parametrize(("batch", "h", "w"), [(2, 16, 16), (1, 32, 16), (0, 16, 16)])
def test_output_shape_and_zero_start(config, batch, h, w):
    network = UNet(config).eval()
    with torch.no_grad():
        out = network(torch.randn(batch, config.image_channels, h, w), torch.full((batch,), 7.0))
    assert out.shape == (batch, config.image_channels * (1 + config.learned_variance), h, w)
    assert out.shape[1] == config.out_channels
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("resample", RESAMPLE)
def test_every_way_to_change_resolution_mirrors(resample):
    config = UNetConfig.small(channels=8, norm_groups=4, resample=resample)
    network = randomise(UNet(config))
    sizes: list[int] = []
    for stage in [*network.down, *network.up]:
        stage.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[-1]))
    out = network(torch.randn(1, 3, 16, 16, dtype=torch.float64), torch.ones(1))
    assert sizes == [16, 8, 8, 4, 4, 4, 8, 8, 16, 16, 16]
    assert out.shape == (1, 3, 16, 16)


def test_the_ways_to_change_resolution_by_hand():
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float64).reshape(2, 3, 4, 6) ** 1.1
    none = torch.zeros(2, 1)

    def config(resample: str) -> UNetConfig:
        return UNetConfig.small(channels=8, norm_groups=4, resample=resample)

    mean = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(Downsample(3, config("plain"))(x, none), mean)
    twice = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.equal(Upsample(3, config("plain"))(x, none), twice)
    assert not list(Downsample(3, config("plain")).parameters()) + list(Upsample(3, config("plain")).parameters())
    # which pixels a corner of the output sees: one beside the border, or none
    for resample, rows in (("conv", range(0, 2)), ("conv-right", range(0, 3))):
        down = randomise(Downsample(3, config(resample)))
        seen = [
            row
            for row in range(4)
            if not torch.equal(
                down(x, none)[..., 0, 1],
                down(x.index_fill(2, torch.tensor(row), 0), none)[..., 0, 1],
            )
        ]
        assert seen == list(rows)
        assert down(x, none).shape == (2, 3, 2, 3)
    up = randomise(Upsample(3, config("conv")))
    torch.testing.assert_close(up(x, none), F.conv2d(twice, up.conv.weight, up.conv.bias, padding=1))


@pytest.mark.parametrize(("to", "skip"), [("half", False), ("half", True), ("double", False), ("double", True)])
def test_a_block_that_changes_resolution(to, skip):
    """Both branches change it, after the first activation and before the first convolution."""
    config = UNetConfig.small(
        channels=4,
        norm_groups=4,
        multipliers=(1,),
        scale_shift=False,
        rescale_sums=True,
        resample="block-skip" if skip else "block",
    )
    block = randomise(ResidualBlock(8, 8, config, to))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, generator=generator)
    emb = torch.randn(2, 16, dtype=torch.float64, generator=generator)
    p = dict(block.named_parameters())
    resize = (lambda v: F.avg_pool2d(v, 2)) if to == "half" else (lambda v: F.interpolate(v, scale_factor=2.0))

    def norm(v: torch.Tensor, name: str) -> torch.Tensor:
        return F.group_norm(v, 4, p[f"{name}.weight"], p[f"{name}.bias"])

    h = F.conv2d(resize(F.silu(norm(x, "norm1"))), p["conv1.weight"], p["conv1.bias"], padding=1)
    time = F.silu(emb) @ p["embed.weight"].T + p["embed.bias"]
    h = F.silu(norm(h + time[:, :, None, None], "norm2"))
    h = F.conv2d(h, p["conv2.weight"], p["conv2.bias"], padding=1)
    shortcut = resize(x)
    assert ("skip.weight" in p) is skip
    if skip:
        shortcut = F.conv2d(shortcut, p["skip.weight"], p["skip.bias"])
    torch.testing.assert_close(block(x, emb), (shortcut + h) / math.sqrt(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("config", "levels"), [(UNetConfig.small(), 3), (ODD, 3), (DEEP, 5)])
def test_the_way_up_mirrors_the_way_down(config, levels):
    network = UNet(config).eval()
    sizes: dict[str, list[int]] = {"down": [], "up": []}
    for side in sizes:
        for block in getattr(network, side):
            block[0].register_forward_hook(lambda _m, _i, out, s=sizes[side]: s.append(out.shape[-1]))
    with torch.no_grad():
        network(torch.randn(1, config.image_channels, 32, 32), torch.ones(1))
    resolutions = [32 >> level for level in range(levels)]
    down = [r for level, r in enumerate(resolutions) for r in [r] * config.blocks + [r // 2] * (level < levels - 1)]
    assert sizes["down"] == down
    assert sizes["up"] == [r for r in reversed(resolutions) for _ in range(config.blocks + 1)]
    assert config.size_multiple == 2 ** (levels - 1)


@pytest.mark.parametrize(
    ("config", "attended"),
    # ECLIPSE's attends at 16 and 8: the blocks of those levels, the middle (4 of a 32-pixel image)
    [
        (UNetConfig(channels=32), [16] * 7 + [8] * 7 + [4]),
        (ODD, [32] * 5 + [8] * 5),
        (DEEP, [4] * 3 + [2]),
        (DDPMPP, [32] * 3 + [8] * 3 + [8]),
    ],
)
def test_attention_stands_where_it_was_asked_for(config, attended):
    network = UNet(config).eval()
    sizes: list[int] = []
    for module in network.modules():
        if isinstance(module, AttentionBlock):
            module.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[-1]))
    with torch.no_grad():
        network(torch.randn(1, config.image_channels, 32, 32), torch.ones(1))
    assert sorted(sizes) == sorted(attended)


def test_an_image_depends_on_its_own_time_only():
    network = tiny_network()
    x, time = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 500.0, 1.0])
    with torch.no_grad():
        out = network(x[:1].expand(3, -1, -1, -1), time)
        other = network(x, time)
    torch.testing.assert_close(out[0], out[2])
    assert (out[0] - out[1]).abs().max() > 1e-3
    torch.testing.assert_close(other[:1], network(x[:1], time[:1]))


@pytest.mark.parametrize("size", [(15, 16), (16, 18)])
def test_other_sizes_do_not_pass_silently(size):
    with pytest.raises(RuntimeError), torch.no_grad():
        UNet(ODD)(torch.randn(1, 1, *size), torch.ones(1))


# -- the parts, from their definitions -------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 8, 9, 128])
def test_time_embedding(width):
    t = [0.0, 0.25, 1.0, 24.75, 999.75, -1500.0]
    got = timestep_embedding(torch.tensor(t), width)
    half = width // 2
    expected = np.zeros((len(t), width))
    for row, value in enumerate(t):
        for i in range(half):
            angle = value * 10000 ** (-i / half)
            expected[row, i], expected[row, half + i] = math.cos(angle), math.sin(angle)
    assert got.shape == (len(t), width)
    turned = timestep_embedding(torch.tensor(t), width, sines_first=True)
    assert torch.equal(turned[:, :half], got[:, half : 2 * half])
    assert torch.equal(turned[:, half : 2 * half], got[:, :half])
    # angles up to 1500 in float32 are exact to 1e-4
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-4)
    np.testing.assert_allclose(got[:4].numpy(), expected[:4], atol=4e-6)


def test_frequencies_end_where_the_shift_says():
    for shift, last in ((0.0, 10000 ** (-7 / 8)), (1.0, 1e-4)):
        got = timestep_embedding(torch.tensor([1.0]), 16, frequency_shift=shift)
        np.testing.assert_allclose(got[0, 15], math.sin(last), rtol=1e-5)
        np.testing.assert_allclose(got[0, 8], math.sin(1.0), rtol=1e-5)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    module = module.double().eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def group_norm(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    b, c, h, w = x.shape
    g = x.reshape(b, groups, -1)
    g = (g - g.mean(-1, keepdims=True)) / np.sqrt(g.var(-1, keepdims=True) + 1e-5)
    return g.reshape(b, c, h, w) * weight[:, None, None] + bias[:, None, None]


def test_attention_against_a_naive_softmax():
    config = UNetConfig.small(channels=12, heads=3, norm_groups=4)
    block = randomise(AttentionBlock(12, config))
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = {name: value.numpy() for name, value in block.named_parameters()}
    h = group_norm(x.numpy(), 4, p["norm.weight"], p["norm.bias"]).reshape(2, 12, 15)
    qkv = np.einsum("oc,bcn->bon", p["qkv.weight"][:, :, 0, 0], h) + p["qkv.bias"][:, None]
    mixed = np.zeros((2, 12, 15))
    for head in range(3):  # improved-diffusion: each head's q, k, v stand together
        q, k, v = (qkv[:, 12 * head + 4 * i : 12 * head + 4 * (i + 1)] for i in range(3))
        weights = np.exp(np.einsum("bcn,bcm->bnm", q, k) / math.sqrt(4))
        weights /= weights.sum(-1, keepdims=True)
        mixed[:, 4 * head : 4 * (head + 1)] = np.einsum("bnm,bcm->bcn", weights, v)
    out = np.einsum("oc,bcn->bon", p["proj.weight"][:, :, 0, 0], mixed) + p["proj.bias"][:, None]
    got = block(x, torch.zeros(2, 1)).numpy()
    np.testing.assert_allclose(got, x.numpy() + out.reshape(2, 12, 3, 5), atol=1e-12)


@pytest.mark.parametrize("c_out", [8, 12])
def test_residual_block_against_its_formula(c_out):
    config = UNetConfig.small(channels=4, norm_groups=4, multipliers=(1,))
    block = randomise(ResidualBlock(8, c_out, config))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, generator=generator)
    emb = torch.randn(2, 16, dtype=torch.float64, generator=generator)
    p = dict(block.named_parameters())

    def silu(v: np.ndarray) -> np.ndarray:
        return v / (1 + np.exp(-v))

    def conv(v: np.ndarray, name: str, padding: int = 1) -> np.ndarray:
        return F.conv2d(torch.from_numpy(v), p[f"{name}.weight"], p[f"{name}.bias"], padding=padding).numpy()

    def norm(v: np.ndarray, name: str) -> np.ndarray:
        return group_norm(v, 4, p[f"{name}.weight"].numpy(), p[f"{name}.bias"].numpy())

    h = conv(silu(norm(x.numpy(), "norm1")), "conv1")
    film = silu(emb.numpy()) @ p["embed.weight"].numpy().T + p["embed.bias"].numpy()
    scale, shift = film[:, :c_out, None, None], film[:, c_out:, None, None]
    h = conv(silu(norm(h, "norm2") * (1 + scale) + shift), "conv2")
    skip = conv(x.numpy(), "skip", 0) if c_out != 8 else x.numpy()
    np.testing.assert_allclose(block(x, emb).numpy(), skip + h, atol=1e-12)


def test_dropout_acts_in_training_only():
    network = tiny_network()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    x, t = torch.randn(1, 3, 8, 8), torch.ones(1)
    with torch.no_grad():
        assert torch.equal(network(x, t), network(x, t))
        network.train()
        assert not torch.equal(network(x, t), network(x, t))
    assert UNet(UNetConfig.small(dropout=0.25)).middle[0].dropout.p == 0.25


# -- configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [UNetConfig(), UNetConfig.small(), ODD, DEEP, DDPMPP])
def test_configuration_round_trip(config):
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


FIRST = {
    "channels",
    "multipliers",
    "blocks",
    "attention_levels",
    "middle_attention",
    "heads",
    "norm_groups",
    "dropout",
    "image_channels",
    "learned_variance",
}


def test_later_fields_are_written_only_where_they_say_something():
    """Else the configurations of checkpoints, and the fingerprints of caches made with them, would change."""
    for config in (UNetConfig(), UNetConfig.small(), ODD, DEEP):
        assert set(config.to_dict()) == FIRST
    assert set(UNetConfig(norm_eps=1e-6).to_dict()) == FIRST | {"norm_eps"}
    later = {f.name for f in fields(UNetConfig)} - FIRST
    assert set(DDPMPP.to_dict()) == FIRST | later


def test_the_first_checkpoint_means_what_it_meant():
    """The shipped denoiser: the same configuration, names of weights and numbers of them."""
    shipped = json.loads((Path(pretrained.__file__).parent / "cifar10-sparse" / "config.json").read_text())["denoiser"]
    denoiser = denoiser_from_config(shipped)
    assert canonical_json(denoiser.config()) == canonical_json(shipped)
    assert parameters(denoiser.network) == 1_125_315
    assert pretrained.load("cifar10-sparse").config() == shipped


def test_fractional_multipliers_are_whole_widths():
    config = UNetConfig(channels=49, multipliers=(1, 3 / 49, 2 / 7), norm_groups=1, attention_levels=())
    assert config.widths == [49, 3, 14]


@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 12, 64, 128, 256])
def test_groups_of_narrow_layers(channels):
    assert UNetConfig(norm_group_channels=4).groups(channels) == max(1, min(32, channels // 4))
    assert UNetConfig().groups(channels) == 32


def test_later_options_do_what_they_say():
    plain = UNetConfig.small(channels=8, norm_groups=4, attention_levels=(1,))
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([500.0])
    outputs = {}
    changes: list[dict] = [
        {},
        {"head_channels": 8},
        {"rescale_sums": True},
        {"norm_eps": 1e-2},
        {"norm_group_channels": 4},
        {"sines_first": True},
        {"frequency_shift": 1.0},
        {"resample": "conv-right"},
    ]
    state = randomise(UNet(plain)).state_dict()
    for change in changes:
        network = UNet(replace(plain, **change)).double().eval().requires_grad_(False)
        network.load_state_dict(state)  # none of these changes the weights
        outputs[str(change)] = network(x, t)
    values = list(outputs.values())
    for i, a in enumerate(values):
        for j, b in enumerate(values[:i]):
            assert (a - b).abs().max() > 1e-3, (changes[i], changes[j])
    assert sorted(UP_ATTENTION) == ["each", "last"]


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {name: value}
            for name in ("channels", "blocks", "heads", "norm_groups", "image_channels")
            for value in (0, 1.5)
        ),
        {"channels": -32},
        {"channels": "32"},
        {"multipliers": ()},
        {"multipliers": (1, 0)},
        {"multipliers": (1, 1.3)},
        {"multipliers": (1, math.nan)},
        {"multipliers": (1, "2")},
        {"scale_shift": 1},
        {"rescale_sums": None},
        {"sines_first": "yes"},
        {"head_channels": 0},
        {"head_channels": 8.0},
        {"norm_group_channels": -4},
        {"stem_channels": True},
        {"up_attention": "first"},
        {"resample": "fir"},
        {"resample": None},
        {"norm_eps": 0.0},
        {"norm_eps": "1e-5"},
        {"frequency_shift": -1},
        {"frequency_shift": 16},
        {"frequency_shift": "1"},
        {"dropout": "0.1"},
        {"attention_levels": (3,)},
        {"attention_levels": (-1,)},
        {"norm_groups": 7},
        {"channels": 12},
    ],
    ids=str,
)
def test_bad_configurations(changes):
    with pytest.raises(ConfigError, match="Got"):
        UNetConfig.small(**changes)


def test_unknown_fields_and_heads_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"\['width'\]"):
        UNetConfig.from_dict({"width": 3})
    with pytest.raises(ConfigError, match=r"heads=3\. Got 64"):
        UNet(UNetConfig.small(attention_levels=(1,), heads=3))
    with pytest.raises(ConfigError, match=r"head_channels=48\. Got 64"):
        UNet(UNetConfig.small(attention_levels=(1,), head_channels=48))
    with pytest.raises(ConfigError, match="Got 144 channels for 32 groups"):
        # each width has its own number of groups, and the two together another that does not divide them
        UNet(UNetConfig(channels=60, multipliers=(1, 1.2), norm_group_channels=4, attention_levels=()))
