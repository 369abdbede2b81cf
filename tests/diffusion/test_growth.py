"""A network that grew computes what the smaller one did, and every part of it can learn."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from purifyloader.diffusion.growth import take_over
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.errors import ConfigError

SMALL = UNetConfig(
    channels=8,
    multipliers=(1, 2, 3),
    blocks=1,
    attention_levels=(),
    middle_attention=False,
    heads=2,
    norm_groups=4,
    learned_variance=False,
)


def network(config: UNetConfig, seed: int = 0, trained: bool = False) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(config)
        if trained:  # so that no branch is zero
            for parameter in unet.parameters():
                torch.nn.init.normal_(parameter, std=0.15)
    return unet.eval()


@torch.no_grad()
def output(unet: UNet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([7.0, -300.0])
    return unet(x, t)


GROWN = {
    "the same": {},
    "blocks": {"blocks": 2},
    "two blocks more": {"blocks": 3},
    "attention": {"attention_levels": (1, 2)},
    "middle": {"middle_attention": True},
    "variance": {"learned_variance": True},
    "all": {"blocks": 3, "attention_levels": (0, 1, 2), "middle_attention": True, "learned_variance": True},
}


@pytest.mark.parametrize("how", GROWN)
@pytest.mark.parametrize(
    "small",
    [
        SMALL,
        dataclasses.replace(SMALL, blocks=2),
        dataclasses.replace(SMALL, blocks=2, attention_levels=(1,), middle_attention=True),
        dataclasses.replace(SMALL, resample="block"),
        dataclasses.replace(SMALL, attention_levels=(1,), up_attention="last"),
    ],
    ids=["one block", "two blocks", "attention", "resampling blocks", "last attention"],
)
def test_it_begins_as_the_same_function(small, how):
    changes = GROWN[how]
    config = dataclasses.replace(
        small,
        **{
            **changes,
            "blocks": max(small.blocks, changes.get("blocks", 1)),
            "attention_levels": tuple(sorted({*small.attention_levels, *changes.get("attention_levels", ())})),
            "middle_attention": small.middle_attention or changes.get("middle_attention", False),
        },
    )
    old, new = network(small, trained=True), network(config, seed=1)
    take_over(new, old)
    want, got = output(old), output(new)
    assert want.abs().mean() > 0.1
    torch.testing.assert_close(got[:, :3], want, atol=1e-5, rtol=1e-5)
    assert torch.equal(got[:, 3:], torch.zeros_like(got[:, 3:]))


def test_every_added_part_can_learn():
    old, new = network(SMALL, trained=True), network(dataclasses.replace(SMALL, **GROWN["all"]), seed=1)
    take_over(new, old)
    optimizer = torch.optim.SGD(new.parameters(), 0.05)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2)
    for _ in range(4):  # what stands before a zero has a gradient once the zero has moved
        loss = (new(x, t) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [name for name, p in new.named_parameters() if not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize(
    ("new", "old", "named"),
    [
        ({"channels": 16}, {}, "channels=16 for 8"),
        ({"multipliers": (1, 2)}, {}, r"multipliers=\(1, 2\)"),
        ({}, {"blocks": 2}, "blocks=1 for 2"),
        ({}, {"attention_levels": (1,)}, "attention_levels"),
        ({}, {"learned_variance": True}, "learned_variance=False for True"),
        ({"scale_shift": False}, {}, "scale_shift"),
        ({"rescale_sums": True, "blocks": 2}, {"rescale_sums": True}, "blocks=2 for 1"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(new, old, named):
    new, old = (network(dataclasses.replace(SMALL, **changes)) for changes in (new, old))
    with pytest.raises(ConfigError, match=f"Got {named}"):
        take_over(new, old)
