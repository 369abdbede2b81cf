"""score_sde's DDPM++ networks of the variance-preserving SDE (arXiv:2011.13456), as DiffPure uses them.

A file is `{model, ema: {shadow_params, ...}, optimizer, step}`. The EMA weights, which are the ones to use, are a list
without names, in the order of the network's parameters. What the network is, is read off their shapes; what these do
not say are `ScoreSDESettings`.

Its output is the noise: the score is minus the output over the noise's standard deviation. Its time is a label of 999 t
with t in (0, 1]. In this library t counts to `timesteps` instead, so that DiffPure's t = 0.1 is 100 of 1000.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.schedule import ContinuousVP, LinearSchedule, Schedule
from purifyloader.diffusion.unet import AttentionBlock, Downsample, ResidualBlock, UNet, Upsample
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
    tensors_only,
)
from purifyloader.pretrained.registry import listed

__all__ = ["PRESETS", "ScoreSDESettings", "denoiser_from_shadow"]

_WHAT = "A score_sde list of shadow_params"


@dataclass(frozen=True, kw_only=True)
class ScoreSDESettings:
    """What a list of score_sde's EMA parameters does not say.

    Args:
        beta_min, beta_max: of the variance-preserving SDE, for t from 0 to 1.
        continuous: trained on continuous t (`training.continuous`); otherwise on `timesteps` discrete ones.
        skip_rescale: residual sums are divided by the square root of 2.
        timesteps: how far t counts here.
        norm_groups: most groups of a normalisation; a group has four channels at least. (The class "ddpm" always has
            32, which is the same from 128 channels on.)
        dropout: of its training; it acts only when training goes on.
        max_timestep: the last timestep it was trained on; None means all.
        source: where these values are published, for people.

    FIR filters (`model.fir`) have no parameters and must be off.

    Raises:
        ConfigError: a value that is none of these.
    """

    beta_min: float
    beta_max: float
    continuous: bool
    skip_rescale: bool
    timesteps: int = 1000
    norm_groups: int = 32
    dropout: float = 0.0
    max_timestep: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("continuous", "skip_rescale"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False. Got {value!r}.")
        for name in ("beta_min", "beta_max"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ConfigError(f"{name} must be a number. Got {value!r}.")
        if not 0 < self.beta_min < self.beta_max:
            raise ConfigError(
                f"The SDE needs 0 < beta_min < beta_max. Got beta_min={self.beta_min}, beta_max={self.beta_max}."
            )
        for name in ("timesteps", "norm_groups"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ConfigError(f"{name} must be a positive integer. Got {value!r}.")
        check_max_timestep(self.max_timestep, self.schedule)

    @property
    def schedule(self) -> Schedule:
        """alpha(t) = exp(-(beta_max - beta_min) t^2/4 - beta_min t/2), or the table of its discrete form."""
        if self.continuous:
            return ContinuousVP(self.timesteps, -(self.beta_max - self.beta_min) / 4, -self.beta_min / 2)
        first, last = self.beta_min / self.timesteps, self.beta_max / self.timesteps
        if (self.timesteps, self.beta_min, self.beta_max) == (1000, 0.1, 20):
            return LinearSchedule(1000)
        return LinearSchedule(self.timesteps, first, last)


_DDPMPP = ScoreSDESettings(
    beta_min=0.1,
    beta_max=20.0,
    continuous=True,
    skip_rescale=True,
    dropout=0.1,
    source="score_sde_pytorch, configs/vp/cifar10_ddpmpp_deep_continuous.py and default_cifar10_configs.py",
)

PRESETS: dict[str, ScoreSDESettings] = {
    "score-sde-ddpmpp-cifar10-deep": _DDPMPP,
    "score-sde-ddpmpp-cifar10": replace(
        _DDPMPP, source="score_sde_pytorch, configs/vp/cifar10_ddpmpp_continuous.py and default_cifar10_configs.py"
    ),
    "score-sde-ddpmpp-cifar10-discrete": replace(
        _DDPMPP,
        continuous=False,
        source="score_sde_pytorch, configs/vp/cifar10_ddpmpp.py and default_cifar10_configs.py",
    ),
}
"""Settings of what was published. DiffPure's CIFAR-10 model is the deep one."""


def denoiser_from_shadow(
    params: Sequence[Tensor], model_state: Mapping[str, Any] | None, settings: ScoreSDESettings
) -> NetworkDenoiser:
    """A denoiser from score_sde's EMA parameters.

    Args:
        params: `file["ema"]["shadow_params"]`, of any floating type.
        model_state: `file["model"]`, whose names and shapes are then compared with the list; its weights, which are
            not averaged, are not used.
        settings: what the shapes do not say; see `PRESETS`.

    Returns:
        in eval mode, frozen, float32, on the CPU, with a copy of the weights.

    Raises:
        CheckpointError: not such a list; a network with Fourier features of the noise, progressive growing or no time
            (NCSN++ and the variance-exploding ones); or tensors that do not fit one another, all of them named.
    """
    if not isinstance(params, list | tuple) or not params or not all(isinstance(p, Tensor) for p in params):
        several = isinstance(params, list | tuple)
        kinds = ", ".join(sorted({type(p).__name__ for p in params})) if several else ""
        got = f"a list of {kinds or 'nothing, an empty one'}" if several else type(params).__name__
        raise CheckpointError(f"{_WHAT} must be a list of tensors, ['ema']['shadow_params'] of the file. Got {got}.")
    config, ddpm_blocks = _read_config([tuple(p.shape) for p in params], settings)
    network = make_network(config, _WHAT)
    pieces, names = _pieces(network, ddpm_blocks)
    left_over = [f"shadow_params[{i}]" for i in range(len(names), len(params))]
    if model_state is not None:
        _compare(params, tensors_only(model_state, "score_sde's model state"))
    network = fill(network, pieces, dict(zip(names + left_over, params, strict=False)), _WHAT)
    time = "continuous" if settings.continuous else "timestep"
    return make_denoiser(network, "epsilon", settings.schedule, time, settings.max_timestep)


def _compare(params: Sequence[Tensor], model_state: Mapping[str, Tensor]) -> None:
    """The model's own parameters must be the list's, shape by shape. `sigmas` is a buffer."""
    model = {name: tuple(tensor.shape) for name, tensor in model_state.items() if name != "sigmas"}
    differ = [
        f"{name} (model {shape}, shadow_params[{i}] {tuple(param.shape)})"
        for i, ((name, shape), param) in enumerate(zip(model.items(), params, strict=False))
        if shape != tuple(param.shape)
    ]
    if differ or len(model) != len(params):
        raise CheckpointError(
            f"{_WHAT} must have the shapes of the model's parameters beside it, in their order. Got {len(params)} for "
            f"{len(model)}, {len(differ)} of another shape: {listed(differ, 20) or 'none'}. The file is damaged, or of "
            "a network that keeps some parameters out of its average (Fourier features)."
        )


Shape = tuple[int, ...]


def _tokens(shapes: Sequence[Shape]) -> list[tuple[str, int, int, int]]:
    """Modules between stem and output as (kind, channels in, channels out, dimensions of the skip's weight).

    A parameter of one axis begins a normalisation: with a 3 x 3 convolution and a dense layer after it, it is a
    residual block, with a square matrix attention. A convolution by itself changes the resolution. The list ends
    where the output begins, or at what is neither.
    """
    tokens = []
    at = 6  # after the time's two layers and the stem
    while at + 2 < len(shapes):
        here, after = shapes[at], shapes[at + 2]
        if len(here) == 4:
            tokens.append(("resample", here[1], here[0], 0))
            at += 2
        elif len(here) == 1 and len(after) == 2:
            tokens.append(("attention", here[0], here[0], 0))
            at += 10
        elif (
            len(here) == 1 and len(after) == 4 and at + 9 < len(shapes) and len(shapes[at + 4]) == 2 and shapes[at + 1]
        ):
            skip = shapes[at + 10] if at + 10 < len(shapes) else ()
            size = len(skip) if len(skip) == 2 or (len(skip) == 4 and skip[-1] == 1) else 0
            # all eight begin with the block's width; what most say, so that one wrong shape is found out by the others
            c_out = Counter(shape[0] for shape in shapes[at + 2 : at + 10] if shape).most_common(1)[0][0]
            c_in = Counter([here[0], shapes[at + 1][0], after[1]]).most_common(1)[0][0]
            tokens.append(("residual", c_in, c_out, size))
            at += 12 if size else 10
        else:
            break
    return tokens


def _read_config(shapes: Sequence[Shape], settings: ScoreSDESettings) -> tuple[dict[str, Any], bool]:
    """The configuration, and whether its blocks are DDPM's (skips are matrices), not BigGAN's (1 x 1 convolutions)."""
    first, stem = shapes[0], shapes[4] if len(shapes) > 4 else ()
    if len(first) == 2 and first[0] == 2 * first[1]:
        raise CheckpointError(
            f"{_WHAT} must be of a network with a sinusoidal embedding of time. Got a first layer of {first}, which "
            "follows Fourier features of the noise (NCSN++): not supported. Give a DDPM++ of the VP SDE."
        )
    if len(first) != 2 or first[0] != 4 * first[1] or len(stem) != 4 or stem[0] != first[1]:
        raise CheckpointError(
            f"{_WHAT} begins with two layers (4C, C), (4C, 4C) with biases and a convolution (C, channels, 3, 3). "
            f"Got {list(shapes[:6])}. Give ['ema']['shadow_params'] of a DDPM++ checkpoint."
        )
    channels, image_channels = first[1], stem[1]
    levels: list[list[tuple[str, int]]] = [[]]
    marks = []
    width = channels
    tokens = _tokens(shapes)
    for kind, c_in, c_out, skip in tokens:
        if kind == "residual" and c_in != width:
            break  # the first block of the way up takes what was kept on the way down besides
        if kind == "resample" or (kind == "residual" and c_in == c_out and skip):
            marks.append(kind)
            levels.append([])
        else:
            levels[-1].append((kind, c_out))
        width = c_out
    kinds = [kind for kind, _ in levels[-1]]
    if kinds[-3:] != ["residual", "attention", "residual"] or not all(
        any(k == "residual" for k, _ in level) for level in levels
    ):
        raise CheckpointError(
            f"{_WHAT} must be of a network whose way down is residual blocks, some with attention, and ends in a "
            f"block, attention and a block. Got {[[k for k, _ in level] for level in levels]} as its levels, of "
            f"{len(shapes)} parameters: progressive networks (NCSN++) are not supported, or the list is not whole."
        )
    levels[-1] = levels[-1][:-3]
    ddpm_blocks = any(size == 2 for *_, size in tokens) or "resample" in marks
    config = {
        "channels": channels,
        "multipliers": multipliers((level[0][1] for level in levels if level), channels),
        "blocks": sum(kind == "residual" for kind, _ in levels[0]),
        "attention_levels": tuple(i for i, level in enumerate(levels) if any(k == "attention" for k, _ in level)),
        "heads": 1,
        "norm_groups": settings.norm_groups,
        "norm_group_channels": 4,
        "norm_eps": 1e-6,
        "dropout": settings.dropout,
        "image_channels": image_channels,
        "learned_variance": False,
        "scale_shift": False,
        "up_attention": "last",
        "resample": "conv-right" if ddpm_blocks else "block-skip",
        "rescale_sums": settings.skip_rescale,
        "sines_first": True,
        "frequency_shift": 1.0,
    }
    return config, ddpm_blocks


def _pieces(network: UNet, ddpm_blocks: bool) -> tuple[list[Piece], list[str]]:
    """Where each tensor comes from, and the names of score_sde's parameters in their order."""
    modules: list[tuple[nn.Module, str]] = [
        (network.time_embed[0], "time_embed.0"),
        (network.time_embed[2], "time_embed.2"),
    ]
    modules += [(network.stem, "stem"), *((place.module, place.ours) for place in places(network))]
    modules += [(network.norm_out, "norm_out"), (network.conv_out, "conv_out")]
    pieces: list[Piece] = []
    names: list[str] = []
    for number, (module, ours) in enumerate(modules):
        theirs = f"all_modules.{number}"
        if isinstance(module, AttentionBlock):
            new = _attention(ours, theirs, module)
            norm = [f"{theirs}.GroupNorm_0.{leaf}" for leaf in ("weight", "bias")]
            names += [*norm, *(f"{theirs}.NIN_{i}.{leaf}" for i in range(4) for leaf in "Wb")]
        else:
            if isinstance(module, ResidualBlock):
                new = _residual(ours, theirs, module, ddpm_blocks)
            elif isinstance(module, Downsample | Upsample):
                new = copies(f"{ours}.conv", f"{theirs}.Conv_0", module.get_submodule("conv"))
            else:
                new = copies(ours, theirs, module)
            names += [source for piece in new for source in piece.sources]
        pieces += new
    return pieces, names


def _residual(ours: str, theirs: str, module: ResidualBlock, ddpm_blocks: bool) -> list[Piece]:
    layers = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "embed": "Dense_0", "norm2": "GroupNorm_1", "conv2": "Conv_1"}
    pieces = []
    for own, foreign in layers.items():
        pieces += copies(f"{ours}.{own}", f"{theirs}.{foreign}", module.get_submodule(own))
    if not ddpm_blocks:
        return pieces + copies(f"{ours}.skip", f"{theirs}.Conv_2", module.skip)
    if isinstance(module.skip, nn.Conv2d):
        c_out, c_in = module.skip.out_channels, module.skip.in_channels
        pieces += [
            Piece(f"{ours}.skip.weight", (f"{theirs}.NIN_0.W",), (c_in, c_out), _convolution),
            Piece(f"{ours}.skip.bias", (f"{theirs}.NIN_0.b",), (c_out,), lambda b: b),
        ]
    return pieces


def _attention(ours: str, theirs: str, module: AttentionBlock) -> list[Piece]:
    """Four matrices (in, out): q, k, v with one head of all channels, and the output."""
    c = module.norm.num_channels
    weights, biases = (tuple(f"{theirs}.NIN_{i}.{leaf}" for i in range(4)) for leaf in "Wb")
    return [
        *copies(f"{ours}.norm", f"{theirs}.GroupNorm_0", module.norm),
        Piece(f"{ours}.qkv.weight", weights[:3], (c, c), lambda *qkv: torch.cat([_convolution(w) for w in qkv])),
        Piece(f"{ours}.qkv.bias", biases[:3], (c,), lambda *qkv: torch.cat(qkv)),
        Piece(f"{ours}.proj.weight", weights[3:], (c, c), _convolution),
        Piece(f"{ours}.proj.bias", biases[3:], (c,), lambda b: b),
    ]


def _convolution(matrix: Tensor) -> Tensor:
    return matrix.T[..., None, None]
