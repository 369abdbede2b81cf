"""The state dicts of improved-diffusion (arXiv:2102.09672) and guided-diffusion (arXiv:2105.05233).

Both packages save the bare state dict of one network, whose configuration is read off its shapes. `OpenAISettings` has
the rest, with presets of what was published, ECLIPSE's checkpoint among it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from purifyloader.core.checks import check_choice, check_flag, check_integer
from purifyloader.diffusion.denoiser import PARAMETERIZATIONS, NetworkDenoiser
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule, Schedule
from purifyloader.diffusion.unet import UNet
from purifyloader.errors import CheckpointError, ConfigError
from purifyloader.pretrained.convert import mapping
from purifyloader.pretrained.convert.mapping import Layout, Piece

__all__ = ["PRESETS", "QKV_ORDERS", "OpenAISettings", "denoiser_from_state"]

QKV_ORDERS = ("heads-first", "channels-first")

_WHAT = "An improved-diffusion or guided-diffusion state dict"


@dataclass(frozen=True, kw_only=True)
class OpenAISettings:
    """Settings that a state dict of these packages does not hold; `source` says who published them.

    In the packages' own words: `schedule` is diffusion_steps and noise_schedule, `heads` num_heads, `head_channels`
    num_head_channels, `parameterization` "x0" predict_xstart. `qkv_order` is "heads-first", each head's q, k and v
    together (improved-diffusion, and guided-diffusion by default), or "channels-first", all of q, then k, then v
    (use_new_attention_order). `rescale_timesteps`: the network was given them on the scale 0..1000. `max_timestep`: the
    last one it was trained on, counted from 1; None means all.
    """

    schedule: Schedule
    rescale_timesteps: bool
    qkv_order: str
    heads: int | None = None
    head_channels: int | None = None
    parameterization: str = "epsilon"
    norm_groups: int = 32
    dropout: float = 0.0
    max_timestep: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        mapping.check_schedule(self.schedule, self.max_timestep)
        check_flag("rescale_timesteps", self.rescale_timesteps)
        check_choice("qkv_order", self.qkv_order, QKV_ORDERS)
        if (self.heads is None) == (self.head_channels is None):
            raise ConfigError(
                "Give heads or head_channels, one of them: the weights do not say. "
                f"Got heads={self.heads}, head_channels={self.head_channels}."
            )
        for name in ("heads", "head_channels", "norm_groups"):
            check_integer(name, getattr(self, name), 1, none=name != "norm_groups")
        check_choice("parameterization", self.parameterization, PARAMETERIZATIONS)


_IMPROVED = OpenAISettings(
    schedule=CosineSchedule(4000),
    rescale_timesteps=True,
    qkv_order="heads-first",
    heads=4,
    source="improved-diffusion, README (Models and Hyperparameters) and the defaults of script_util.py",
)
_GUIDED = OpenAISettings(
    schedule=LinearSchedule(1000),
    rescale_timesteps=False,
    qkv_order="heads-first",
    head_channels=64,
    source="guided-diffusion, README (Sampling from pre-trained models) and the defaults of script_util.py",
)

PRESETS: dict[str, OpenAISettings] = {
    "cifar10_uncond_50M": replace(_IMPROVED, dropout=0.3),
    "cifar10_uncond_vlb_50M": replace(_IMPROVED, dropout=0.3),
    "imagenet64_uncond_100M": _IMPROVED,
    "imagenet64_uncond_vlb_100M": _IMPROVED,
    "lsun_uncond_100M": replace(_IMPROVED, schedule=LinearSchedule(1000), rescale_timesteps=False, heads=1),
    "eclipse-cifar10": replace(
        _IMPROVED, source="ECLIPSE (Wang et al. 2024): improved-diffusion's settings, T = 4000 cosine, four heads"
    ),
    "256x256_diffusion_uncond": _GUIDED,
    "lsun_bedroom": replace(_GUIDED, dropout=0.1),
    "lsun_cat": replace(_GUIDED, dropout=0.1),
    "lsun_horse": replace(_GUIDED, dropout=0.1),
    "lsun_horse_nodropout": _GUIDED,
}
"""Settings of what was published, by the name of its file."""


def denoiser_from_state(state: Mapping[str, Tensor], settings: OpenAISettings) -> NetworkDenoiser:
    """Make a denoiser, in eval mode, frozen, float32 on the CPU, from a copy of such a state dict, EMA or not.

    Widths, levels, blocks, attention, resampling, how the time enters and whether it learned the variance are read off
    names and shapes. `CheckpointError` if it is of another network, or conditional, or tensors do not fit.
    """
    state = mapping.tensors_only(state, _WHAT)
    network = mapping.make_network(_read_config(state, settings), _WHAT)
    network = mapping.fill(network, _pieces(network, settings), state, _WHAT)
    time = "rescaled" if settings.rescale_timesteps else "timestep"
    return mapping.make_denoiser(network, settings.parameterization, settings.schedule, time, settings.max_timestep)


def _read_config(state: Mapping[str, Tensor], settings: OpenAISettings) -> dict[str, Any]:
    if "label_emb.weight" in state:
        raise CheckpointError(
            f"{_WHAT} must be of an unconditional network: purification must not look at labels. Got one that is "
            f"conditional on {state['label_emb.weight'].shape[0]} classes (label_emb.weight). "
            "Give the unconditional checkpoint."
        )
    if not any(name.startswith("output_blocks.") for name in state):
        raise CheckpointError(
            f"{_WHAT} has time_embed, input_blocks, middle_block, output_blocks and out. Got no output_blocks among "
            f"{sorted({name.split('.')[0] for name in state})}: a classifier or another format."
        )

    def width(*names: str) -> int:
        return mapping.read_width(state, names, _WHAT)

    def stage(level: int, block: int) -> str:
        return f"input_blocks.{1 + level * (blocks + 1) + block}"

    def block_width(level: int) -> int:
        leaves = ("out_layers.0.weight", "out_layers.0.bias", "in_layers.2.bias")
        return width(*(f"{stage(level, 0)}.0.{leaf}" for leaf in leaves))

    blocks, levels, resample = _read_levels(state)
    widths = [block_width(level) for level in range(levels)]
    channels, rest = divmod(width("time_embed.0.weight", "time_embed.0.bias", "time_embed.2.bias"), 4)
    if rest or not channels:
        raise CheckpointError(f"{_WHAT} has a time embedding of four times its channels. Got {4 * channels + rest}.")
    stem = state.get("input_blocks.0.0.weight")
    if stem is None or stem.ndim != 4:
        got = "none" if stem is None else f"the shape {tuple(stem.shape)}"
        raise CheckpointError(f"{_WHAT} has a convolution input_blocks.0.0.weight, (C, channels, 3, 3). Got {got}.")
    image_channels, out = stem.shape[1], width("out.2.weight", "out.2.bias")
    if out not in (image_channels, 2 * image_channels) or image_channels == 6:
        raise CheckpointError(
            f"{_WHAT} must be of a network that gives as many channels as it takes, or twice as many with a learned "
            f"variance. Got {image_channels} in, {out} out: a network that makes small images larger takes these as "
            "three further channels, and none to denoise with."
        )
    attended = (
        level
        for level in range(levels)
        if any(name.startswith(f"{stage(level, block)}.1.") for block in range(blocks) for name in state)
    )
    embedded = width("input_blocks.1.0.emb_layers.1.weight", "input_blocks.1.0.emb_layers.1.bias")
    return {
        "channels": channels,
        "multipliers": mapping.multipliers(widths, channels),
        "blocks": blocks,
        "attention_levels": tuple(attended),
        "heads": settings.heads or 1,
        "head_channels": settings.head_channels,
        "norm_groups": settings.norm_groups,
        "dropout": settings.dropout,
        "image_channels": image_channels,
        "learned_variance": out != image_channels,
        "scale_shift": embedded == 2 * widths[0],
        "resample": resample,
        "stem_channels": None if stem.shape[0] == channels else stem.shape[0],
    }


def _read_levels(state: Mapping[str, Tensor]) -> tuple[int, int, str]:
    """Read the blocks of a level, the number of levels, and how their resolution changes.

    The way up has levels * (blocks + 1) stages. The last stage of each level but the full resolution's ends in what
    doubles the resolution; where that has no weights, the stages of the way down without weights halve it.
    """
    up_stages = 1 + max(int(m[1]) for name in state if (m := re.match(r"output_blocks\.(\d+)\.", name)))
    ups = {
        int(m[1]): m[2] for name in state if (m := re.match(r"output_blocks\.(\d+)\.[1-9]\.(conv|in_layers)\.", name))
    }
    down_stages = {int(m[1]) for name in state if (m := re.match(r"input_blocks\.(\d+)\.", name))}
    without_weights = set(range(max(down_stages, default=0))) - down_stages
    if ups:
        period, resample = min(ups) + 1, "block" if "in_layers" in ups.values() else "conv"
    elif without_weights:
        period, resample = min(without_weights), "plain"
    else:
        period, resample = up_stages, "conv"
    if period < 2 or up_stages % period or up_stages > len(state):
        raise CheckpointError(
            f"{_WHAT} has as many output_blocks in each level, the last of them raising the resolution. "
            f"Got {up_stages} output_blocks, resolution raised in {sorted(ups)}. Check that the file is whole."
        )
    return period - 1, up_stages // period, resample


_LAYOUT = Layout(
    outside={"stem": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2", "time_embed": "time_embed"},
    residual={
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "embed": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
    norm="norm",
    qkv=("qkv",),
    proj="proj_out",
    resample={"down": "op", "up": "conv"},
    matrices="conv1d",
)


def _pieces(network: UNet, settings: OpenAISettings) -> list[Piece]:
    layout = replace(_LAYOUT, stacked=settings.qkv_order == "channels-first")
    pieces = layout.outer_pieces(network)
    for place in mapping.places(network):
        prefix = {
            "down": f"input_blocks.{place.stage + 1}.{place.position}",
            "middle": f"middle_block.{place.position}",
            "up": f"output_blocks.{place.stage}.{place.position}",
        }[place.side]
        pieces += layout.pieces(place, prefix)
    return pieces
