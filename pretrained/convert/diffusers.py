"""A diffusers folder with a `UNet2DModel`: `config.json`, a state dict and, beside it, a scheduler's configuration.

Nothing of diffusers is imported. Its configuration says what the network is; what the scheduler's does not say, or what
no file of the folder says (PureGen's networks know t < 250 only), are `DiffusersSettings`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from purifyloader.diffusion.denoiser import PARAMETERIZATIONS, NetworkDenoiser
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule, ScaledLinearSchedule, Schedule
from purifyloader.diffusion.unet import AttentionBlock, ResidualBlock, UNet
from purifyloader.errors import CheckpointError, ConfigError
from purifyloader.pretrained.convert.mapping import (
    Piece,
    check_max_timestep,
    copies,
    fill,
    make_denoiser,
    make_network,
    multipliers,
    places,
    qkv_rows,
    tensors_only,
)
from purifyloader.pretrained.registry import listed

__all__ = ["PRESETS", "DiffusersSettings", "denoiser_from_folder_parts", "schedule_from_scheduler"]

_WHAT = "A diffusers UNet2DModel"


@dataclass(frozen=True, kw_only=True)
class DiffusersSettings:
    """What a folder does not say, or says somewhere else.

    Args:
        schedule: the noise schedule of its training, where there is no scheduler's configuration. Where there is one,
            both must agree.
        parameterization: what it predicts ("epsilon", "v", "x0"), in the same way.
        max_timestep: the last timestep it was trained on, counted from 1; None means all. Noise above it is refused.
        source: where these values are published, for people.

    Raises:
        ConfigError: a value that is none of these.
    """

    schedule: Schedule | None = None
    parameterization: str | None = None
    max_timestep: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise ConfigError(f"schedule must be a Schedule, such as LinearSchedule(1000). Got {self.schedule!r}.")
        if self.parameterization is not None and self.parameterization not in PARAMETERIZATIONS:
            raise ConfigError(
                f"parameterization must be one of {sorted(PARAMETERIZATIONS)}. Got {self.parameterization!r}."
            )
        check_max_timestep(self.max_timestep, self.schedule)


PRESETS: dict[str, DiffusersSettings] = {
    "ddpm-cifar10-32": DiffusersSettings(
        schedule=LinearSchedule(1000),
        parameterization="epsilon",
        source="google/ddpm-cifar10-32, scheduler_config.json; Ho et al. 2020, Sec. 4",
    ),
    "puregen-ddpm": DiffusersSettings(
        schedule=LinearSchedule(1000),
        parameterization="epsilon",
        max_timestep=250,
        source="PureGen (Bhat et al. 2024): linear betas 1e-4..0.02, T = 1000, trained on t < 250 only",
    ),
}
"""Settings of what was published."""

# UNet2DModel's own defaults: what a configuration leaves out
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
}

# what can be left as it is only; None stands for a missing or null value
_ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (None, False),
    "time_embedding_type": (None, "positional"),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (None, 1),
    "downsample_type": (None, "conv"),
    "upsample_type": (None, "conv"),
    "act_fn": (None, "silu", "swish"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}

# what does not change the network
_IGNORED = ("sample_size", "num_train_timesteps")


def denoiser_from_folder_parts(
    config: Mapping[str, Any],
    scheduler_config: Mapping[str, Any] | None,
    state: Mapping[str, Tensor],
    settings: DiffusersSettings | None = None,
) -> NetworkDenoiser:
    """A denoiser from the parts of a diffusers folder.

    Args:
        config: config.json, of a `UNet2DModel`.
        scheduler_config: scheduler_config.json; None where the folder has none, then `settings` must say the schedule.
        state: the weights, of any floating type, with today's names of the attention layers or those before 0.15
            (`query`, `key`, `value`, `proj_attn`).
        settings: see `PRESETS`.

    Returns:
        in eval mode, frozen, float32, on the CPU, with a copy of the weights.

    Raises:
        CheckpointError: another class; a setting that this library's network does not have, named; no schedule, or one
            that contradicts the settings; or tensors that do not fit the configuration, all of them named.
    """
    settings = settings or DiffusersSettings()
    schedule, parameterization = _reconcile(scheduler_config, settings)
    state = _modern_names(tensors_only(state, f"The state dict of {_WHAT[0].lower()}{_WHAT[1:]}"))
    ours = _read_config(config)
    if ours["blocks"] > len(state):
        raise CheckpointError(
            f"{_WHAT} has more tensors than layers in a block. Got layers_per_block={ours['blocks']} and {len(state)} "
            "tensors: the files do not belong together, or are not whole."
        )
    network = make_network(ours, _WHAT)
    network = fill(network, _pieces(network), state, _WHAT)
    try:
        check_max_timestep(settings.max_timestep, schedule)
    except ConfigError as error:
        raise CheckpointError(f"The folder's schedule does not go with the settings. {error}") from None
    return make_denoiser(network, parameterization, schedule, "timestep", settings.max_timestep)


def schedule_from_scheduler(config: Mapping[str, Any]) -> tuple[Schedule, str]:
    """The schedule of a scheduler_config.json, and what its network predicts.

    Raises:
        CheckpointError: a scheduler without a table of betas, one of another form, or a prediction that is unknown.
    """
    if not isinstance(config, Mapping) or not {"beta_schedule", "num_train_timesteps"} <= set(config):
        got = sorted(config) if isinstance(config, Mapping) else type(config).__name__
        raise CheckpointError(
            "A scheduler's configuration has beta_schedule and num_train_timesteps (DDPMScheduler and its relatives). "
            f"Got {got}. A scheduler of continuous noise levels is not supported."
        )
    for name, allowed in {"trained_betas": (None,), "rescale_betas_zero_snr": (None, False)}.items():
        if config.get(name) not in allowed:
            raise CheckpointError(
                f"A scheduler's {name} must be {allowed[-1]!r}: nothing else is supported. Got a value."
            )
    kind, timesteps = config["beta_schedule"], config["num_train_timesteps"]
    first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    schedule: Schedule
    try:
        if kind == "linear":
            published = (timesteps, first, last) == (1000, 1e-4, 0.02)
            schedule = LinearSchedule(1000) if published else LinearSchedule(timesteps, first, last)
        elif kind == "scaled_linear":
            schedule = ScaledLinearSchedule(timesteps, first, last)
        elif kind == "squaredcos_cap_v2":
            schedule = CosineSchedule(timesteps)
        else:
            raise CheckpointError(
                "A scheduler's beta_schedule must be 'linear', 'scaled_linear' or 'squaredcos_cap_v2'. "
                f"Got {kind!r}. Other tables are not supported."
            )
    except ConfigError as error:
        raise CheckpointError(f"A scheduler's configuration must give a schedule. Got: {error}") from None
    prediction = config.get("prediction_type", "epsilon")
    names = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
    if prediction not in names:
        raise CheckpointError(f"A scheduler's prediction_type must be one of {sorted(names)}. Got {prediction!r}.")
    return schedule, names[prediction]


def _reconcile(scheduler_config: Mapping[str, Any] | None, settings: DiffusersSettings) -> tuple[Schedule, str]:
    if scheduler_config is None:
        if settings.schedule is None:
            raise CheckpointError(
                "A network with timesteps needs its schedule. Got neither scheduler_config.json nor a schedule in the "
                f"settings. Give one: a preset ({', '.join(PRESETS)}) or DiffusersSettings(schedule=...)."
            )
        return settings.schedule, settings.parameterization or "epsilon"
    schedule, parameterization = schedule_from_scheduler(scheduler_config)
    differs = [
        f"{name} {said!r} in the settings and {found!r} in scheduler_config.json"
        for name, said, found in (
            ("schedule", settings.schedule, schedule),
            ("parameterization", settings.parameterization, parameterization),
        )
        if said is not None and said != found
    ]
    if differs:
        raise CheckpointError(
            f"The settings must agree with the folder. Got {'; '.join(differs)}. Leave out what the folder says, or "
            "correct the file if it is wrong."
        )
    return schedule, parameterization


def _read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(config, Mapping) or config.get("_class_name") != "UNet2DModel":
        got = repr(config.get("_class_name")) if isinstance(config, Mapping) else type(config).__name__
        raise CheckpointError(
            f"{_WHAT}'s config.json has the _class_name 'UNet2DModel'. Got {got}. Give the folder of the network "
            "itself, which in a pipeline is its unet/; conditional and latent networks are not supported."
        )
    values = {**_DEFAULTS, **{name: config[name] for name in _DEFAULTS if name in config}}
    refused = [
        f"{name}={config[name]!r}" for name, allowed in _ONLY.items() if name in config and config[name] not in allowed
    ]
    known = {*_DEFAULTS, *_ONLY, *_IGNORED, "time_embedding_dim"}
    refused += [
        f"{name}={value!r} (unknown)"
        for name, value in config.items()
        if not name.startswith("_") and name not in known and value is not None
    ]
    widths, downs, ups = (values[name] for name in ("block_out_channels", "down_block_types", "up_block_types"))
    lists = all(isinstance(v, list | tuple) for v in (widths, downs, ups))
    if not lists or not widths or not len(widths) == len(downs) == len(ups):
        raise CheckpointError(
            f"{_WHAT} has as many block_out_channels as down_block_types and up_block_types. "
            f"Got {widths!r}, {downs!r}, {ups!r}."
        )
    integers = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "downsample_padding")
    bad = [f"{name}={values[name]!r}" for name in integers if type(values[name]) is not int or values[name] < 0]
    if any(type(width) is not int or width < 1 for width in widths):
        bad.append(f"block_out_channels={widths!r}")
    if bad:
        raise CheckpointError(
            f"{_WHAT} has whole numbers for {', '.join(integers)} and block_out_channels. Got {', '.join(bad)}."
        )

    attends = [kind == "AttnDownBlock2D" for kind in downs]
    refused += [f"down_block_types with {kind}" for kind in downs if kind not in ("DownBlock2D", "AttnDownBlock2D")]
    refused += [f"up_block_types with {kind}" for kind in ups if kind not in ("UpBlock2D", "AttnUpBlock2D")]
    if not refused and [kind == "AttnUpBlock2D" for kind in reversed(ups)] != attends:
        refused.append(f"up_block_types={list(ups)!r}, which do not mirror down_block_types={list(downs)!r}")
    if config.get("time_embedding_dim") not in (None, 4 * widths[0]):
        refused.append(f"time_embedding_dim={config['time_embedding_dim']!r} (it must be {4 * widths[0]})")
    if values["attn_norm_num_groups"] not in (None, values["norm_num_groups"]):
        refused.append(f"attn_norm_num_groups={values['attn_norm_num_groups']!r} other than norm_num_groups")
    if values["downsample_padding"] not in (0, 1):
        refused.append(f"downsample_padding={values['downsample_padding']!r}")
    if (shift := values["resnet_time_scale_shift"]) not in ("default", "scale_shift"):
        refused.append(f"resnet_time_scale_shift={shift!r}")
    if shift == "scale_shift" and values["add_attention"] and values["attn_norm_num_groups"] is None:
        refused.append(
            "resnet_time_scale_shift='scale_shift' without attn_norm_num_groups (middle attention has no norm)"
        )
    if values["out_channels"] not in (values["in_channels"], 2 * values["in_channels"]):
        refused.append(f"in_channels={values['in_channels']} with out_channels={values['out_channels']}")
    if refused:
        raise CheckpointError(
            f"{_WHAT} can be converted where its settings have their usual values. Got {listed(refused, 20)}: this "
            "library's network does not have these. Give another checkpoint."
        )
    head_channels = values["attention_head_dim"]
    return {
        "channels": widths[0],
        "multipliers": multipliers(widths, widths[0]),
        "blocks": values["layers_per_block"],
        "attention_levels": tuple(level for level, attend in enumerate(attends) if attend),
        "middle_attention": bool(values["add_attention"]),
        "heads": 1,
        "head_channels": head_channels,  # None: one head of all channels
        "norm_groups": values["norm_num_groups"],
        "norm_eps": values["norm_eps"],
        "dropout": values["dropout"],
        "image_channels": values["in_channels"],
        "learned_variance": values["out_channels"] != values["in_channels"],
        "scale_shift": shift == "scale_shift",
        "resample": ("conv-right", "conv")[values["downsample_padding"]],
        "sines_first": not values["flip_sin_to_cos"],
        "frequency_shift": values["freq_shift"],
    }


_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of attention layers before diffusers 0.15 to those after it."""
    pattern = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.")
    return {pattern.sub(lambda m: f"{m[1]}{_RENAMED[m[2]]}.", name): tensor for name, tensor in state.items()}


_RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "embed": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}


def _pieces(network: UNet) -> list[Piece]:
    pieces = copies("stem", "conv_in", network.stem) + copies("norm_out", "conv_norm_out", network.norm_out)
    pieces += copies("conv_out", "conv_out", network.conv_out)
    for index, linear in ((0, "linear_1"), (2, "linear_2")):
        pieces += copies(f"time_embed.{index}", f"time_embedding.{linear}", network.time_embed[index])
    levels = len(network.config.multipliers)
    for place in places(network):
        module, ours = place.module, place.ours
        block, number = {
            "down": (f"down_blocks.{place.level}", place.block),
            "middle": ("mid_block", 1 if ours == f"middle.{len(network.middle) - 1}" else 0),
            "up": (f"up_blocks.{levels - 1 - place.level}", place.block),
        }[place.side]
        if isinstance(module, ResidualBlock):
            for own, foreign in _RESIDUAL.items():
                pieces += copies(f"{ours}.{own}", f"{block}.resnets.{number}.{foreign}", module.get_submodule(own))
        elif isinstance(module, AttentionBlock):
            pieces += _attention(ours, f"{block}.attentions.{number}", module)
        else:
            sampler = "downsamplers" if place.side == "down" else "upsamplers"
            pieces += copies(ours, f"{block}.{sampler}.0", module)
    return pieces


def _attention(ours: str, theirs: str, module: AttentionBlock) -> list[Piece]:
    """Three linear layers instead of one convolution."""

    def stack(*qkv: Tensor) -> Tensor:
        return qkv_rows(torch.cat(qkv), module.heads)

    c = module.norm.num_channels
    kinds = ("to_q", "to_k", "to_v")
    return [
        *copies(f"{ours}.norm", f"{theirs}.group_norm", module.norm),
        Piece(
            f"{ours}.qkv.weight",
            tuple(f"{theirs}.{kind}.weight" for kind in kinds),
            (c, c),
            lambda *qkv: stack(*qkv)[..., None, None],
        ),
        Piece(f"{ours}.qkv.bias", tuple(f"{theirs}.{kind}.bias" for kind in kinds), (c,), stack),
        Piece(f"{ours}.proj.weight", (f"{theirs}.to_out.0.weight",), (c, c), lambda w: w[..., None, None]),
        Piece(f"{ours}.proj.bias", (f"{theirs}.to_out.0.bias",), (c,), lambda b: b),
    ]
