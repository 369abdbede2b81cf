"""The plain U-Net: its size against a count by hand, its function against the mathematics, and what it never sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from purifyloader.diffusion import NetworkDenoiser, PlainUNet, PlainUNetConfig
from purifyloader.diffusion.growth import take_over
from purifyloader.diffusion.networks import network_config, network_to_dict
from purifyloader.errors import ConfigError
from tests.conftest import plain_network, tiny_network

SHAPES = {
    "default": PlainUNetConfig(),
    "one level": PlainUNetConfig((8,), (3,), unshuffle=4),
    "three levels, grey": PlainUNetConfig((4, 6, 10), (2, 0, 1), unshuffle=1, image_channels=1),
}


def counted(config: PlainUNetConfig) -> int:
    """Count the parameters by hand, from the description."""
    pixels = config.image_channels * config.unshuffle**2
    conv = 9 * (pixels + 1) * config.widths[0] + config.widths[0] + 9 * pixels * config.widths[0] + pixels
    passes = [2] * (len(config.widths) - 1) + [1]
    for width, blocks, times in zip(config.widths, config.blocks, passes, strict=True):
        conv += times * blocks * 2 * (9 * width * width + width)
    for above, below in zip(config.widths, config.widths[1:], strict=False):
        conv += 4 * above * below + below + below * 4 * above + 4 * above
    return conv


@pytest.mark.parametrize("name", SHAPES)
def test_parameters(name: str) -> None:
    assert sum(p.numel() for p in PlainUNet(SHAPES[name]).parameters()) == counted(SHAPES[name])


def shuffled(x_BCHW: Tensor, side: int) -> Tensor:
    """Put a square of channels back into its pixels, by loops."""
    b, c, h, w = x_BCHW.shape
    out = torch.empty(b, c // side**2, h * side, w * side, dtype=x_BCHW.dtype)
    for i in range(side):
        for j in range(side):
            out[:, :, i::side, j::side] = x_BCHW[:, i * side + j :: side**2]
    return out


def by_hand(network: PlainUNet, x_BCHW: Tensor, time_B: Tensor) -> Tensor:
    """Compute a network in float64 from its weights and the description, in dense slices and loops."""
    weights = {name: value.double() for name, value in network.state_dict().items()}
    config, side = network.config, network.config.unshuffle

    def conv(h: Tensor, name: str, **options: Any) -> Tensor:
        return F.conv2d(h, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    def blocks(h: Tensor, name: str, count: int) -> Tensor:
        for i in range(count):
            inside = conv(h, f"{name}.{i}.conv1", padding=1).clamp(min=0)
            h = h + conv(inside, f"{name}.{i}.conv2", padding=1)
        return h

    squares = [
        x_BCHW[:, c : c + 1, i::side, j::side] for c in range(x_BCHW.shape[1]) for i in range(side) for j in range(side)
    ]
    level = torch.ones_like(squares[0]) * (time_B / 1000)[:, None, None, None]
    h = conv(torch.cat([*squares, level], 1).double(), "stem", padding=1)
    skips = []
    lowest = len(config.widths) - 1
    for i in range(lowest):
        h = blocks(h, f"down.{i}", config.blocks[i])
        skips.append(h)
        h = conv(h, f"to_half.{i}", stride=2)
    h = blocks(h, "middle", config.blocks[-1])
    for i in reversed(range(lowest)):
        h = blocks(shuffled(conv(h, f"to_double.{i}"), 2) + skips[i], f"up.{i}", config.blocks[i])
    return shuffled(conv(h, "conv_out", padding=1), side)


@pytest.mark.parametrize("name", SHAPES)
def test_function(name: str) -> None:
    network = plain_network(SHAPES[name])
    x = torch.randn(2, SHAPES[name].image_channels, 16, 8, dtype=torch.float64)
    time = torch.tensor([-700.0, -130.0])
    expected = by_hand(network, x, time)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(network(x.float(), time).double(), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(network(x.float(), time), network(x.float(), time + 100))


def test_nothing_is_seen_from_far() -> None:
    """The inside of a crop is what it is in the whole image, to the last bits that sums have."""
    denoiser = NetworkDenoiser(plain_network(PlainUNetConfig((8, 8), (1, 1))), "edm", (0.01, 0.5))
    x, sigma = torch.rand(1, 3, 96, 96), torch.tensor([0.1])
    whole, part = denoiser(x, sigma), denoiser(x[..., 16:80, 16:80], sigma)
    torch.testing.assert_close(whole[..., 40:56, 40:56], part[..., 24:40, 24:40], rtol=0, atol=1e-5)
    assert not torch.allclose(whole[..., 16:18, 16:18], part[..., :2, :2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (9, 32)])
def test_any_size(size: tuple[int, int]) -> None:
    denoiser = NetworkDenoiser(plain_network(), "edm", (0.01, 0.5))
    assert denoiser(torch.rand(2, 3, *size), torch.tensor([0.1, 0.3])).shape == (2, 3, *size)


def test_it_begins_as_the_best_guess_without_looking() -> None:
    """With an output of zeros the EDM skip is all there is."""
    denoiser = NetworkDenoiser(PlainUNet(PlainUNetConfig()), "edm", (0.01, 0.5))
    x, sigma = torch.rand(2, 3, 8, 8), torch.tensor([0.1, 0.4])
    skip = (0.25 / (0.25 + (2 * sigma) ** 2))[:, None, None, None]
    torch.testing.assert_close(denoiser(x, sigma), (skip * (2 * x - 1) + 1) / 2)


@pytest.mark.parametrize("name", SHAPES)
def test_configuration_comes_back(name: str) -> None:
    config = SHAPES[name]
    assert network_config(network_to_dict(config)) == config
    assert PlainUNetConfig.from_dict(config.to_dict()) == config


BAD: dict[str, Any] = {
    "no level": {"widths": (), "blocks": ()},
    "one number": {"widths": 32},
    "other lengths": {"widths": (32, 64, 64)},
    "width 0": {"widths": (0, 64)},
    "width that is no integer": {"widths": (32.0, 64)},
    "far too wide": {"widths": (32, 10**9)},
    "blocks below 0": {"blocks": (-1, 2)},
    "many blocks": {"blocks": (1, 10**6)},
    "many blocks in all": {"widths": (1,) * 5, "blocks": (64, 64, 64, 64, 1)},
    "as many as there are levels": {"widths": (1,) * 16, "blocks": (17,) * 16},
    "the most at the top": {"widths": (8,) * 16, "blocks": (64,) * 4 + (1,) * 12},
    "many levels": {"widths": (1,) * 100, "blocks": (1,) * 100},
    "no square": {"unshuffle": 0},
    "a wide square": {"unshuffle": 64},
    "no channels": {"image_channels": 0},
    "unknown": {"heads": 4},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configuration(name: str) -> None:
    with pytest.raises(ConfigError, match="Got") as caught:
        PlainUNetConfig.from_dict({**PlainUNetConfig().to_dict(), **BAD[name]})
    assert len(str(caught.value)) < 400


def test_it_starts_from_its_own_shape_alone() -> None:
    small = PlainUNetConfig((8, 8), (1, 1))
    old, new = plain_network(small), PlainUNet(small)
    take_over(new, old)
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), old.parameters(), strict=True))
    for other in (PlainUNet(replace(small, blocks=(2, 1))), tiny_network()):
        with pytest.raises(ConfigError, match="starts from one of its own shape"):
            take_over(new, other)
