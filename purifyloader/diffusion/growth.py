"""Let a larger U-Net begin as the function of a smaller one (Net2Net; Chen et al. 2016, arXiv:1511.05641).

Residual blocks and attention end in a convolution of zeros, so that one which is added changes nothing:

    on the way down    a further block of a level repeats its input, which becomes one more skip
    on the way up      a further block meets that skip, and passes on what comes from below
    attention          adds nothing at first
    learned variance   starts halfway between its bounds

A `PlainUNet` begins as one of its own shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import nn

from purifyloader.diffusion.networks import kind_of_network
from purifyloader.diffusion.plain import PlainUNet
from purifyloader.diffusion.unet import AttentionBlock, ResidualBlock, Stage, UNet, UNetConfig
from purifyloader.errors import ConfigError

__all__ = ["take_over"]

_GROW = ("blocks", "attention_levels", "middle_attention", "learned_variance", "dropout")


def _check(new: UNetConfig, old: UNetConfig) -> None:
    a, b = asdict(new), asdict(old)
    attends = bool(old.attention_levels) or old.middle_attention
    free = _GROW if attends else (*_GROW, "heads", "head_channels")
    differing = [name for name in a if name not in free and a[name] != b[name]]
    if new.blocks < old.blocks:
        differing.append("blocks")
    if not set(old.attention_levels) <= set(new.attention_levels):
        differing.append("attention_levels")
    differing += [name for name in ("middle_attention", "learned_variance") if b[name] and not a[name]]
    grows = any(a[name] != b[name] for name in ("blocks", "attention_levels", "middle_attention"))
    if new.rescale_sums and grows:  # adding nothing to a sum that is rescaled is not the identity
        differing.append("blocks")
    if differing:
        got = ", ".join(f"{name}={a[name]!r} for {b[name]!r}" for name in differing)
        raise ConfigError(
            "A network starts from one of the same shape, or from one with fewer blocks, less attention or without "
            f"learned variance. Got {got}: give these as the other has them."
        )


def _stages(network: UNet) -> Iterator[tuple[tuple[str, int, int], Stage]]:
    """Yield each stage by (way, level, number within the level), as `UNet` builds them."""
    levels, blocks = len(network.config.multipliers), network.config.blocks
    down, up = iter(network.down), iter(network.up)
    for level in range(levels):
        for i in range(blocks + (level < levels - 1)):  # the last of a level leaves it
            yield ("leave" if i == blocks else "down", level, i), next(down)  # type: ignore[misc]
    yield ("middle", 0, 0), network.middle
    for level in reversed(range(levels)):
        for i in range(blocks + 1):
            yield ("up", level, i), next(up)  # type: ignore[misc]


def _source(place: tuple[str, int, int], new: UNetConfig, old: UNetConfig) -> tuple[str, int, int] | None:
    """Find the stage of the old network as which a stage of the new one begins; None for one that is added."""
    way, level, i = place
    added = new.blocks - old.blocks
    if way == "leave":
        return way, level, old.blocks
    if way == "down":
        return place if i < old.blocks else None
    if way == "up":
        # the first meets the last block's skip, which an added block has repeated
        return (way, level, 0) if i == 0 else (way, level, i - added) if i > added else None
    return place


def _pass_on(block: nn.Module) -> None:
    """Pass on what comes from below, and not the skip beside it."""
    assert isinstance(block, ResidualBlock)
    skip = block.skip
    assert isinstance(skip, nn.Conv2d)
    assert skip.bias is not None
    nn.init.zeros_(skip.weight)
    nn.init.zeros_(skip.bias)
    width = skip.out_channels
    skip.weight[:, :width, 0, 0] = torch.eye(width)


@torch.no_grad()
def take_over(new: UNet | PlainUNet, old: UNet | PlainUNet) -> None:
    """Give `new`, as it was initialised, the function of `old`.

    `new` has the same shape, or, of a `UNet`, more blocks a level, more attention or a learned variance; otherwise
    `ConfigError`.
    """
    if isinstance(new, PlainUNet) or isinstance(old, PlainUNet):
        if new.config != old.config:
            raise ConfigError(
                f"A {kind_of_network(new.config)} starts from one of its own shape. Got {old.config}: give its "
                "configuration, or start from another denoiser."
            )
        new.load_state_dict(old.state_dict())
        return
    _check(new.config, old.config)
    sources = dict(_stages(old))
    for place, stage in _stages(new):
        source = _source(place, new.config, old.config)
        if source is None:
            if place[0] == "up":
                _pass_on(stage[0])
            continue
        blocks = list(sources[source])
        had_attention = any(isinstance(block, AttentionBlock) for block in blocks)
        for block in stage:
            if not isinstance(block, AttentionBlock) or had_attention:
                block.load_state_dict(blocks.pop(0).state_dict())
    for name in ("time_embed", "stem", "norm_out"):
        getattr(new, name).load_state_dict(getattr(old, name).state_dict())
    for grown, small in zip(new.conv_out.parameters(), old.conv_out.parameters(), strict=True):
        grown[: len(small)].copy_(small)  # rows of a learned variance stay zeros
