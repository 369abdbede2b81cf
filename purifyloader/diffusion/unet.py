"""The improved-diffusion U-Net (Nichol & Dhariwal 2021, arXiv:2102.09672), sized by one configuration.

`UNetConfig()` is the network of the ECLIPSE paper (52,546,438 parameters with six output channels);
`UNetConfig.small()` is the one that a machine without a GPU trains in an hour. Relatives differ in options:

    DDPM      (Ho et al. 2020, arXiv:2006.11239; diffusers' UNet2DModel): the time is added (`scale_shift=False`)
    guided    (Dhariwal & Nichol 2021, arXiv:2105.05233): `resample="block"`, `head_channels=64`
    DDPM++    (Song et al. 2021, arXiv:2011.13456): `resample="block-skip"`, `rescale_sums`, `up_attention="last"`

Shape suffixes: B batch, C channels, H height, W width, E embedding, N = H*W tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from purifyloader.core import limits
from purifyloader.core.checks import check_choice, check_flag, check_integer, check_number
from purifyloader.errors import ConfigError

__all__ = ["RESAMPLE", "UP_ATTENTION", "UNet", "UNetConfig", "timestep_embedding"]

RESAMPLE = ("conv", "conv-right", "plain", "block", "block-skip")
UP_ATTENTION = ("each", "last")

# What the first checkpoints wrote down. A field that came later is written only where it is not its default,
# so that their configurations stay what they were.
_FIRST_FIELDS = {"channels", "multipliers", "blocks", "attention_levels", "middle_attention", "heads", "norm_groups"}
_FIRST_FIELDS |= {"dropout", "image_channels", "learned_variance"}


@dataclass(frozen=True)
class UNetConfig:
    """Everything that fixes the shape of a `UNet`. Each level after the first halves the resolution.

    Levels are at most 16, of at most 64 blocks, and 256 in all; widths, heads and groups are at most 65,536.

    `resample` is how a level is left:
        "conv"        a convolution of stride 2 with one pixel of padding on each side; nearest, then convolution
        "conv-right"  the same, with the padding of the way down at the right and the bottom only
        "plain"       mean of 2 x 2, nearest; nothing to learn
        "block"       a residual block with "plain" inside, in both branches
        "block-skip"  the same with a 1 x 1 convolution in its skip
    """

    channels: int = 128  # width of the first level
    multipliers: tuple[float, ...] = (1, 2, 2, 2)  # width of each level over `channels`, where that gives a whole width
    blocks: int = 3  # residual blocks a level on the way down, one more on the way up
    attention_levels: tuple[int, ...] = (1, 2)  # 0 is full resolution; blocks followed by self-attention
    middle_attention: bool = True  # between the two blocks at the lowest resolution
    heads: int = 4  # of attention, where `head_channels` does not say
    norm_groups: int = 32  # of each group normalisation
    dropout: float = 0.0  # inside the residual blocks, while training
    image_channels: int = 3
    learned_variance: bool = True  # predict the variance fraction in as many further output channels
    scale_shift: bool = True  # the time scales and shifts the second normalisation of a block, or is added before it
    head_channels: int | None = None  # width of a head, for as many heads as fit; None for `heads` of them
    up_attention: str = "each"  # on the way up, after "each" block of its levels or the "last" only
    resample: str = "conv"
    rescale_sums: bool = False  # divide each residual sum by the square root of 2
    norm_eps: float = 1e-5  # what a group normalisation adds to the variance
    norm_group_channels: int | None = None  # at least; narrow layers have fewer groups
    sines_first: bool = False  # the embedding of time holds sines, then cosines
    frequency_shift: float = 0.0  # frequencies from 1 to 10000^-((h - 1) / (h - shift)), h = channels // 2
    stem_channels: int | None = None  # of the first convolution; None for `channels`

    def __post_init__(self) -> None:
        check_integer("UNetConfig.blocks", self.blocks, 1, limits.NETWORK_BLOCKS)
        for name in ("channels", "heads", "norm_groups", "image_channels"):
            check_integer(f"UNetConfig.{name}", getattr(self, name), 1, limits.NETWORK_WIDTH)
        for name in ("head_channels", "norm_group_channels", "stem_channels"):
            check_integer(f"UNetConfig.{name}", getattr(self, name), 1, limits.NETWORK_WIDTH, none=True)
        for name in ("learned_variance", "middle_attention", "scale_shift", "rescale_sums", "sines_first"):
            check_flag(f"UNetConfig.{name}", getattr(self, name))
        check_choice("UNetConfig.resample", self.resample, RESAMPLE)
        check_choice("UNetConfig.up_attention", self.up_attention, UP_ATTENTION)
        check_number("UNetConfig.norm_eps", self.norm_eps, above=0, below=1)
        # of the sines and cosines, which are half of the channels each
        check_number("UNetConfig.frequency_shift", self.frequency_shift, low=0, below=max(1, self.channels // 2))
        check_number("UNetConfig.dropout", self.dropout, low=0, below=1)
        self._check_levels()
        if any(width % self.groups(width) for width in self.widths):
            raise ConfigError(
                f"Each level's width must be a multiple of norm_groups={self.norm_groups}. Got widths {self.widths}."
            )

    def _check_levels(self) -> None:
        for name in ("multipliers", "attention_levels"):
            if not isinstance(getattr(self, name), tuple | list):
                raise ConfigError(f"UNetConfig.{name} must be a list. Got {getattr(self, name)!r:.80}.")
        if not 1 <= len(self.multipliers) <= limits.NETWORK_LEVELS or not all(
            map(self._is_multiplier, self.multipliers)
        ):
            raise ConfigError(
                "UNetConfig.multipliers must be positive, one a level, and give whole widths with "
                f"channels={self.channels}, of at most {limits.NETWORK_WIDTH:,}, for at most {limits.NETWORK_LEVELS} "
                f"levels. Got {self.multipliers!r:.200}."
            )
        levels = len(self.multipliers)
        if levels * self.blocks > limits.NETWORK_BLOCKS_IN_ALL:
            raise ConfigError(
                f"UNetConfig.blocks must be at most {limits.NETWORK_BLOCKS_IN_ALL} over all levels. Got {self.blocks} "
                f"at each of {levels}."
            )
        if any(type(level) is not int or not 0 <= level < len(self.multipliers) for level in self.attention_levels):
            raise ConfigError(
                f"UNetConfig.attention_levels must name levels 0..{len(self.multipliers) - 1}. "
                f"Got {self.attention_levels!r:.200}."
            )

    def _is_multiplier(self, m: Any) -> bool:
        is_number = isinstance(m, int | float) and not isinstance(m, bool) and 0 < m <= limits.NETWORK_WIDTH
        return is_number and self.channels * m <= limits.NETWORK_WIDTH and _whole(self.channels * m)

    @classmethod
    def small(cls, **changes: Any) -> UNetConfig:
        """Network of 1,125,315 parameters, for 32-pixel images and two CPU cores: no attention, one block a level."""
        no_attention: dict[str, Any] = {"attention_levels": (), "middle_attention": False}
        small = cls(channels=32, multipliers=(1, 2, 2), blocks=1, norm_groups=8, learned_variance=False, **no_attention)
        return replace(small, **changes)

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [round(self.channels * m) for m in self.multipliers]

    def groups(self, channels: int) -> int:
        """Number of groups in which a layer of that width is normalised."""
        most = self.norm_groups if self.norm_group_channels is None else channels // self.norm_group_channels
        return max(1, min(self.norm_groups, most))

    @property
    def out_channels(self) -> int:
        return self.image_channels * (2 if self.learned_variance else 1)

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this."""
        return 2 ** (len(self.multipliers) - 1)

    def to_dict(self, every: bool = False) -> dict[str, Any]:
        """Describe it as JSON. A field that the first checkpoints did not have is left out at its default.

        With `every` field, by which networks are told apart, it is not: a default may change, and 1 and 1.0 are one
        number.
        """
        defaults = {f.name: f.default for f in fields(self)}
        values: dict[str, Any] = asdict(self)
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        if every:
            numbers = {name: float(values[name]) for name, default in defaults.items() if isinstance(default, float)}
            return {**values, **numbers, "multipliers": [float(m) for m in self.multipliers]}
        return {name: v for name, v in values.items() if name in _FIRST_FIELDS or getattr(self, name) != defaults[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"Known fields of a UNetConfig: {sorted(known)}. Got {unknown}.")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


def _whole(value: float) -> bool:
    return math.isfinite(value) and abs(value - round(value)) < 1e-6 and round(value) >= 1


def timestep_embedding(t_B: Tensor, width: int, *, sines_first: bool = False, frequency_shift: float = 0.0) -> Tensor:
    """Sinusoidal embedding of a (fractional) time, (B,) → (B, width): cosines, then sines, or the other way."""
    half = width // 2
    spacing = -math.log(10000.0) / (half - frequency_shift)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t_B.device) * spacing)
    angles = t_B.float()[:, None] * frequencies
    halves = [angles.sin(), angles.cos()] if sines_first else [angles.cos(), angles.sin()]
    return F.pad(torch.cat(halves, dim=1), (0, width % 2))


def _zero(module: nn.Conv2d) -> nn.Conv2d:
    """Start a residual branch at zero, so that the block begins as the identity."""
    nn.init.zeros_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module


def _norm(channels: int, config: UNetConfig) -> nn.GroupNorm:
    groups = config.groups(channels)
    if channels % groups:
        raise ConfigError(
            f"A normalised layer's width must be a multiple of its groups. Got {channels} channels for {groups} groups "
            f"(norm_groups={config.norm_groups}, norm_group_channels={config.norm_group_channels})."
        )
    return nn.GroupNorm(groups, channels, eps=config.norm_eps)


def _halve(x_BCHW: Tensor) -> Tensor:
    return F.avg_pool2d(x_BCHW, 2)


def _double(x_BCHW: Tensor) -> Tensor:
    return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


class ResidualBlock(nn.Module):
    """norm-act-conv twice; the time embedding scales and shifts the second normalisation, or is added before it.

    With `to` "half" or "double" it also changes the resolution, of both branches, ahead of their convolutions.
    """

    def __init__(self, c_in: int, c_out: int, config: UNetConfig, to: str | None = None) -> None:
        super().__init__()
        self.scale_shift = config.scale_shift
        self.rescale_sums = config.rescale_sums
        self.to_size = None if to is None else {"half": _halve, "double": _double}[to]
        self.norm1 = _norm(c_in, config)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.embed = nn.Linear(4 * config.channels, (2 if config.scale_shift else 1) * c_out)
        self.norm2 = _norm(c_out, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        mixes = c_in != c_out or (to is not None and config.resample == "block-skip")
        self.skip = nn.Conv2d(c_in, c_out, 1) if mixes else nn.Identity()

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        h = F.silu(self.norm1(x_BCHW))
        if self.to_size is not None:
            h, x_BCHW = self.to_size(h), self.to_size(x_BCHW)
        h = self.conv1(h)
        time = self.embed(F.silu(emb_BE))[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        out = self.skip(x_BCHW) + self.conv2(self.dropout(F.silu(h)))
        return out / math.sqrt(2) if self.rescale_sums else out


class AttentionBlock(nn.Module):
    """Residual multi-head self-attention over the N pixels. The rows of `qkv` are q, k, v of each head in turn."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        if config.head_channels is not None and channels % config.head_channels:
            raise ConfigError(
                f"Attention needs a width that is a multiple of head_channels={config.head_channels}. Got {channels}."
            )
        self.heads = config.heads if config.head_channels is None else channels // config.head_channels
        if channels % self.heads:
            raise ConfigError(f"Attention needs a width that is a multiple of heads={self.heads}. Got {channels}.")
        self.rescale_sums = config.rescale_sums
        self.norm = _norm(channels, config)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        qkv = self.qkv(self.norm(x_BCHW)).reshape(b, self.heads, 3, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h, w)
        out = x_BCHW + self.proj(attended)
        return out / math.sqrt(2) if self.rescale_sums else out


class Stage(nn.ModuleList):
    """Blocks in sequence that all take the time embedding."""

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        for block in self:
            x_BCHW = block(x_BCHW, emb_BE)
        return x_BCHW


class Downsample(nn.Module):
    """To half the resolution: a convolution of stride 2, or the mean of 2 x 2."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.resample = config.resample
        if config.resample != "plain":
            self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if config.resample == "conv" else 0)

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        if self.resample == "plain":
            return _halve(x_BCHW)
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)) if self.resample == "conv-right" else x_BCHW)


class Upsample(nn.Module):
    """To twice the resolution by repeating pixels, then a convolution unless it is to be plain."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.conv = nn.Identity() if config.resample == "plain" else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        return self.conv(_double(x_BCHW))


class UNet(nn.Module):
    """`unet(x_BCHW, time_B) -> (B, out_channels, H, W)`; H and W multiples of `config.size_multiple`."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        self.time_embed = nn.Sequential(nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c))

        def blocks(level: int, c_in: int, c_out: int, attends: bool = True) -> list[nn.Module]:
            made: list[nn.Module] = [ResidualBlock(c_in, c_out, config)]
            if attends and level in config.attention_levels:
                made.append(AttentionBlock(c_out, config))
            return made

        in_blocks = config.resample in ("block", "block-skip")
        widths = config.widths
        last = len(widths) - 1
        stem = config.stem_channels or c
        self.stem = nn.Conv2d(config.image_channels, stem, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [stem]
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(Stage(blocks(level, skips[-1], width)))
                skips.append(width)
            if level < last:
                down = ResidualBlock(width, width, config, "half") if in_blocks else Downsample(width, config)
                self.down.append(Stage([down]))
                skips.append(width)
        middle = blocks(last, widths[-1], widths[-1], attends=False)
        if config.middle_attention:
            middle.append(AttentionBlock(widths[-1], config))
        middle.append(ResidualBlock(widths[-1], widths[-1], config))
        self.middle = Stage(middle)
        self.up = nn.ModuleList()
        width = widths[-1]
        for level in reversed(range(len(widths))):
            for i in range(config.blocks + 1):
                attends = config.up_attention == "each" or i == config.blocks
                stage = blocks(level, width + skips.pop(), widths[level], attends)
                width = widths[level]
                if level > 0 and i == config.blocks:
                    up = ResidualBlock(width, width, config, "double") if in_blocks else Upsample(width, config)
                    stage.append(up)
                self.up.append(Stage(stage))
        self.norm_out = _norm(width, config)
        self.conv_out = _zero(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, x_BCHW: Tensor, time_B: Tensor) -> Tensor:
        config = self.config
        embedding = timestep_embedding(
            time_B, config.channels, sines_first=config.sines_first, frequency_shift=config.frequency_shift
        )
        emb_BE = self.time_embed(embedding.to(self.stem.weight.dtype))
        h = self.stem(x_BCHW)
        skips = [h]
        for stage in self.down:
            h = stage(h, emb_BE)
            skips.append(h)
        h = self.middle(h, emb_BE)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb_BE)
        return self.conv_out(F.silu(self.norm_out(h)))
