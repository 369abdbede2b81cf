"""A diffusers folder with a `UNet2DModel`: `config.json`, a state dict and, beside it, a scheduler's configuration.

Nothing of diffusers is imported. Its configuration describes the network; what no file of the folder says (PureGen's
networks know t < 250 only) are `DiffusersSettings`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from purifyloader.core.checks import check_choice
from purifyloader.diffusion.denoiser import PARAMETERIZATIONS, NetworkDenoiser
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule, ScaledLinearSchedule, Schedule
from purifyloader.diffusion.unet import AttentionBlock, ResidualBlock, UNet
from purifyloader.errors import CheckpointError, ConfigError
from purifyloader.pretrained.convert import mapping
from purifyloader.pretrained.convert.mapping import Layout, Piece
from purifyloader.pretrained.registry import listed

__all__ = ["PRESETS", "DiffusersSettings", "denoiser_from_folder_parts", "schedule_from_scheduler"]

_WHAT = "A diffusers UNet2DModel"


@dataclass(frozen=True, kw_only=True)
class DiffusersSettings:
    """Settings that a folder does not hold, or must agree with: schedule and parameterization ("epsilon", "v", "x0").

    `max_timestep`: the last timestep it was trained on, counted from 1; None means all. Noise above it is refused.
    `source` says who published them.
    """

    schedule: Schedule | None = None
    parameterization: str | None = None
    max_timestep: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        mapping.check_schedule(self.schedule, self.max_timestep, none=True)
        if self.parameterization is not None:
            check_choice("parameterization", self.parameterization, PARAMETERIZATIONS)


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

# the only values that this library's network can have; None stands for null
_ONLY: dict[str, tuple[Any, ...]] = {
    "downsample_padding": (0, 1),
    "resnet_time_scale_shift": ("default", "scale_shift"),
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

# attention layers before diffusers 0.15, and after it
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(rf"(\.attentions\.\d+\.)({'|'.join(_RENAMED)})\.")

# what an average of diffusers (EMAModel) writes beside the settings of its network
_OF_AVERAGES = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")

_KNOWN = {*_DEFAULTS, *_ONLY, *_OF_AVERAGES, "time_embedding_dim", "sample_size", "num_train_timesteps"}


def denoiser_from_folder_parts(
    config: Mapping[str, Any],
    scheduler_config: Mapping[str, Any] | None,
    state: Mapping[str, Tensor],
    settings: DiffusersSettings | None = None,
) -> NetworkDenoiser:
    """Make a denoiser, in eval mode, frozen, float32 on the CPU, from a copy of the parts of a diffusers folder.

    `scheduler_config` is None where the folder has none; then `settings` must say the schedule. The attention layers of
    `state` have today's names or those before 0.15 (`query`, `key`, `value`, `proj_attn`). `CheckpointError` if it is
    of another class, has a setting that this library's network does not have, has no schedule or one that contradicts
    the settings, or if tensors do not fit.
    """
    settings = settings or DiffusersSettings()
    schedule, parameterization = _reconcile(scheduler_config, settings)
    state = mapping.tensors_only(state, f"The state dict of {_WHAT[0].lower()}{_WHAT[1:]}")
    state = {_OLD.sub(lambda m: f"{m[1]}{_RENAMED[m[2]]}.", name): tensor for name, tensor in state.items()}
    ours = _read_config(config)
    if ours["blocks"] > len(state):
        raise CheckpointError(
            f"{_WHAT} has more tensors than layers in a block. Got layers_per_block={ours['blocks']} and {len(state)} "
            "tensors: the files do not belong together, or are not whole."
        )
    network = mapping.make_network(ours, _WHAT)
    network = mapping.fill(network, _pieces(network), state, _WHAT)
    try:
        mapping.check_schedule(schedule, settings.max_timestep)
    except ConfigError as error:
        raise CheckpointError(f"The folder's schedule does not go with the settings. {error}") from None
    return mapping.make_denoiser(network, parameterization, schedule, "timestep", settings.max_timestep)


def schedule_from_scheduler(config: Mapping[str, Any]) -> tuple[Schedule, str]:
    """Read the schedule of a scheduler_config.json, and the parameterization of its network."""
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
    own = () if (timesteps, first, last) == (1000, 1e-4, 0.02) else (first, last)  # as it is published
    makers: dict[Any, Callable[[], Schedule]] = {
        "linear": lambda: LinearSchedule(timesteps, *own),
        "scaled_linear": lambda: ScaledLinearSchedule(timesteps, first, last),
        "squaredcos_cap_v2": lambda: CosineSchedule(timesteps),
    }
    if kind not in list(makers):
        raise CheckpointError(f"A scheduler's beta_schedule must be one of {list(makers)}. Got {kind!r}.")
    try:
        schedule = makers[kind]()
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
        f"{name} {wanted!r} in the settings and {of_folder!r} in scheduler_config.json"
        for name, of_folder in (("schedule", schedule), ("parameterization", parameterization))
        if (wanted := getattr(settings, name)) not in (None, of_folder)
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
    _check_types(values)
    if refused := list(_unsupported(config, values)):
        raise CheckpointError(
            f"{_WHAT} can be converted where its settings have their usual values. Got {listed(refused, 20)}: this "
            "library's network does not have these. Give another checkpoint."
        )
    widths = values["block_out_channels"]
    return {
        "channels": widths[0],
        "multipliers": mapping.multipliers(widths, widths[0]),
        "blocks": values["layers_per_block"],
        "attention_levels": tuple(i for i, kind in enumerate(values["down_block_types"]) if kind.startswith("Attn")),
        "middle_attention": bool(values["add_attention"]),
        "heads": 1,
        "head_channels": values["attention_head_dim"],  # None: one head of all channels
        "norm_groups": values["norm_num_groups"],
        "norm_eps": values["norm_eps"],
        "dropout": values["dropout"],
        "image_channels": values["in_channels"],
        "learned_variance": values["out_channels"] != values["in_channels"],
        "scale_shift": values["resnet_time_scale_shift"] == "scale_shift",
        "resample": ("conv-right", "conv")[values["downsample_padding"]],
        "sines_first": not values["flip_sin_to_cos"],
        "frequency_shift": values["freq_shift"],
    }


def _check_types(values: Mapping[str, Any]) -> None:
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


def _unsupported(config: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Name the settings that this library's network does not have."""
    yield from (f"{name}={config[name]!r}" for name in _ONLY if name in config and config[name] not in _ONLY[name])
    unknown = (name for name in config if name not in _KNOWN and not name.startswith("_"))
    yield from (f"{name}={config[name]!r} (unknown)" for name in unknown if config[name] is not None)
    downs, ups = values["down_block_types"], values["up_block_types"]
    others = [
        f"{way.lower()}_block_types with {kind}"
        for way, kinds in (("Down", downs), ("Up", ups))
        for kind in kinds
        if kind not in (f"{way}Block2D", f"Attn{way}Block2D")
    ]
    yield from others
    if not others and [kind.startswith("Attn") for kind in reversed(ups)] != [k.startswith("Attn") for k in downs]:
        yield f"up_block_types={list(ups)!r}, which do not mirror down_block_types={list(downs)!r}"
    embedding = 4 * values["block_out_channels"][0]
    if config.get("time_embedding_dim") not in (None, embedding):
        yield f"time_embedding_dim={config['time_embedding_dim']!r} (it must be {embedding})"
    groups = values["attn_norm_num_groups"]
    if groups not in (None, values["norm_num_groups"]):
        yield f"attn_norm_num_groups={groups!r} other than norm_num_groups"
    if values["resnet_time_scale_shift"] == "scale_shift" and values["add_attention"] and groups is None:
        yield "resnet_time_scale_shift='scale_shift' without attn_norm_num_groups (middle attention has no norm)"
    if values["out_channels"] not in (values["in_channels"], 2 * values["in_channels"]):
        yield f"in_channels={values['in_channels']} with out_channels={values['out_channels']}"


_LAYOUT = Layout(
    outside={
        "stem": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
    },
    residual={
        "norm1": "norm1",
        "conv1": "conv1",
        "embed": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "conv_shortcut",
    },
    norm="group_norm",
    qkv=("to_q", "to_k", "to_v"),
    proj="to_out.0",
    resample={"down": "downsamplers.0.conv", "up": "upsamplers.0.conv"},
)


def _pieces(network: UNet) -> list[Piece]:
    pieces = _LAYOUT.outer_pieces(network)
    levels = len(network.config.multipliers)
    for place in mapping.places(network):
        prefix, number = {
            "down": (f"down_blocks.{place.level}", place.block),
            "middle": ("mid_block", int(place.position == len(network.middle) - 1)),
            "up": (f"up_blocks.{levels - 1 - place.level}", place.block),
        }[place.side]
        if isinstance(place.module, ResidualBlock):
            prefix += f".resnets.{number}"
        elif isinstance(place.module, AttentionBlock):
            prefix += f".attentions.{number}"
        pieces += _LAYOUT.pieces(place, prefix)
    return pieces
