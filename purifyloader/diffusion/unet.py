"""The improved-diffusion U-Net (Nichol & Dhariwal 2021, arXiv:2102.09672), sized by one configuration.

Shape suffixes: B batch, C channels, H height, W width, E embedding, N = H*W tokens.
`UNetConfig()` is the network of the ECLIPSE paper (52,546,438 parameters with six output channels);
`UNetConfig.small()` is the one that a machine without a GPU trains in an hour.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from purifyloader.errors import ConfigError

__all__ = ["UNet", "UNetConfig", "timestep_embedding"]


@dataclass(frozen=True)
class UNetConfig:
    """Everything that fixes the shape of a `UNet`.

    Args:
        channels: width of the first level.
        multipliers: width of each level over `channels`; each further level halves the resolution.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention_levels: levels (0 is full resolution) whose blocks are followed by self-attention.
        middle_attention: self-attention between the two blocks at the lowest resolution.
        heads: attention heads.
        norm_groups: groups of each group normalisation.
        dropout: probability inside the residual blocks, while training.
        image_channels: channels of the image, 3 for RGB.
        learned_variance: predict the variance fraction in as many further output channels.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 3
    attention_levels: tuple[int, ...] = (1, 2)
    middle_attention: bool = True
    heads: int = 4
    norm_groups: int = 32
    dropout: float = 0.0
    image_channels: int = 3
    learned_variance: bool = True

    def __post_init__(self) -> None:
        for name in ("channels", "blocks", "heads", "norm_groups", "image_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"UNetConfig.{name} must be a positive integer. Got {value!r}.")
        if not self.multipliers or any(not isinstance(m, int) or m < 1 for m in self.multipliers):
            raise ConfigError(
                f"UNetConfig.multipliers must be positive integers, one a level. Got {self.multipliers!r}."
            )
        if any(type(level) is not int or not 0 <= level < len(self.multipliers) for level in self.attention_levels):
            raise ConfigError(
                f"UNetConfig.attention_levels must name levels 0..{len(self.multipliers) - 1}. "
                f"Got {self.attention_levels!r}."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"UNetConfig.dropout must be a probability in [0, 1). Got {self.dropout!r}.")
        if any(self.channels * m % self.norm_groups for m in self.multipliers):
            raise ConfigError(
                f"Each level's width must be a multiple of norm_groups={self.norm_groups}. "
                f"Got widths {[self.channels * m for m in self.multipliers]}."
            )

    @classmethod
    def small(cls, **changes: Any) -> UNetConfig:
        """1,125,315 parameters, for 32-pixel images and two CPU cores: no attention, one block a level."""
        small = cls(
            channels=32,
            multipliers=(1, 2, 2),
            blocks=1,
            attention_levels=(),
            middle_attention=False,
            norm_groups=8,
            learned_variance=False,
        )
        return replace(small, **changes)

    @property
    def out_channels(self) -> int:
        return self.image_channels * (2 if self.learned_variance else 1)

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this."""
        return 2 ** (len(self.multipliers) - 1)

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"UNetConfig has no field {unknown}. Known fields: {sorted(known)}.")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


def timestep_embedding(t_B: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of a (fractional) time, (B,) → (B, width): cosines, then sines."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t_B.device) * (-math.log(max_period) / half))
    angles = t_B.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


def _zero(module: nn.Conv2d) -> nn.Conv2d:
    """Start a residual branch at zero, so that the block begins as the identity."""
    nn.init.zeros_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module


class ResidualBlock(nn.Module):
    """norm-act-conv twice; the time embedding scales and shifts the second normalisation."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.embed = nn.Linear(4 * config.channels, 2 * c_out)
        self.norm2 = nn.GroupNorm(config.norm_groups, c_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BCHW)))
        scale, shift = self.embed(F.silu(emb_BE))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x_BCHW) + self.conv2(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Residual multi-head self-attention over the N pixels."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        if channels % config.heads:
            raise ConfigError(f"Attention needs a width that is a multiple of heads={config.heads}. Got {channels}.")
        self.heads = config.heads
        self.norm = nn.GroupNorm(config.norm_groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        qkv = self.qkv(self.norm(x_BCHW)).reshape(b, self.heads, 3, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h, w)
        return x_BCHW + self.proj(out)


class Stage(nn.ModuleList):
    """Blocks in sequence that all take the time embedding."""

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        for block in self:
            x_BCHW = block(x_BCHW, emb_BE)
        return x_BCHW


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        return self.conv(x_BCHW)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """`unet(x_BCHW, time_B) -> (B, out_channels, H, W)`; H and W multiples of `config.size_multiple`."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        self.time_embed = nn.Sequential(nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c))

        def stage(level: int, c_in: int, c_out: int) -> Stage:
            blocks: list[nn.Module] = [ResidualBlock(c_in, c_out, config)]
            if level in config.attention_levels:
                blocks.append(AttentionBlock(c_out, config))
            return Stage(blocks)

        widths = [c * m for m in config.multipliers]
        last = len(widths) - 1
        self.stem = nn.Conv2d(config.image_channels, c, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [c]
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(stage(level, skips[-1], width))
                skips.append(width)
            if level < last:
                self.down.append(Stage([Downsample(width)]))
                skips.append(width)
        middle: list[nn.Module] = [ResidualBlock(widths[-1], widths[-1], config)]
        if config.middle_attention:
            middle.append(AttentionBlock(widths[-1], config))
        middle.append(ResidualBlock(widths[-1], widths[-1], config))
        self.middle = Stage(middle)
        self.up = nn.ModuleList()
        width = widths[-1]
        for level in reversed(range(len(widths))):
            for i in range(config.blocks + 1):
                blocks = stage(level, width + skips.pop(), widths[level])
                width = widths[level]
                if level > 0 and i == config.blocks:
                    blocks.append(Upsample(width))
                self.up.append(blocks)
        self.norm_out = nn.GroupNorm(config.norm_groups, width)
        self.conv_out = _zero(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, x_BCHW: Tensor, time_B: Tensor) -> Tensor:
        embedding = timestep_embedding(time_B, self.config.channels).to(self.stem.weight.dtype)
        emb_BE = self.time_embed(embedding)
        h = self.stem(x_BCHW)
        skips = [h]
        for stage in self.down:
            h = stage(h, emb_BE)
            skips.append(h)
        h = self.middle(h, emb_BE)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb_BE)
        return self.conv_out(F.silu(self.norm_out(h)))
