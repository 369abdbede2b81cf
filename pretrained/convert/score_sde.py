"""score_sde's DDPM++ networks of the variance-preserving SDE (arXiv:2011.13456), as DiffPure uses them.

A file is `{model, ema: {shadow_params, ...}, optimizer, step}`. The EMA weights, which are the ones to use, are a list
without names, in the order of the network's parameters, and the configuration is read off their shapes;
`ScoreSDESettings` has the rest.

Its output is the noise: the score is minus the output over the noise's standard deviation. Its time is a label of 999 t
with t in (0, 1]. In this library t counts to `timesteps` instead, so that DiffPure's t = 0.1 is 100 of 1000.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from purifyloader.core.checks import check_flag, check_integer, check_number
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.schedule import ContinuousVP, LinearSchedule, Schedule
from purifyloader.diffusion.unet import AttentionBlock, UNet
from purifyloader.errors import CheckpointError
from purifyloader.pretrained.convert import mapping
from purifyloader.pretrained.convert.mapping import Layout, Piece, Place
from purifyloader.pretrained.registry import listed

__all__ = ["PRESETS", "ScoreSDESettings", "denoiser_from_shadow"]

_WHAT = "A score_sde list of shadow_params"


@dataclass(frozen=True, kw_only=True)
class ScoreSDESettings:
    """Settings that a list of score_sde's EMA parameters does not hold; `source` says who published them.

    `continuous`: trained on continuous t (training.continuous), otherwise on `timesteps` discrete ones, as far as t
    counts here. `norm_groups`: most groups of a normalisation; a group has four channels at least. (The class "ddpm"
    always has 32, which is the same from 128 channels on.) FIR filters (model.fir) have no parameters and must be off.
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
        check_flag("continuous", self.continuous)
        check_flag("skip_rescale", self.skip_rescale)
        check_number("beta_min", self.beta_min, above=0)
        check_number("beta_max", self.beta_max, above=self.beta_min)
        check_integer("timesteps", self.timesteps, 1)
        check_integer("norm_groups", self.norm_groups, 1)
        mapping.check_schedule(self.schedule, self.max_timestep)

    @property
    def schedule(self) -> Schedule:
        """alpha(t) = exp(-(beta_max - beta_min) t^2/4 - beta_min t/2), or the table of its discrete form."""
        if self.continuous:
            return ContinuousVP(self.timesteps, -(self.beta_max - self.beta_min) / 4, -self.beta_min / 2)
        if (self.timesteps, self.beta_min, self.beta_max) == (1000, 0.1, 20):
            return LinearSchedule(1000)
        return LinearSchedule(self.timesteps, self.beta_min / self.timesteps, self.beta_max / self.timesteps)


_COMMON = "default_cifar10_configs.py"
_DDPMPP = ScoreSDESettings(beta_min=0.1, beta_max=20.0, continuous=True, skip_rescale=True, dropout=0.1)

PRESETS: dict[str, ScoreSDESettings] = {
    name: replace(_DDPMPP, continuous=continuous, source=f"score_sde_pytorch, configs/vp/{file}.py and {_COMMON}")
    for name, continuous, file in (
        ("score-sde-ddpmpp-cifar10-deep", True, "cifar10_ddpmpp_deep_continuous"),
        ("score-sde-ddpmpp-cifar10", True, "cifar10_ddpmpp_continuous"),
        ("score-sde-ddpmpp-cifar10-discrete", False, "cifar10_ddpmpp"),
    )
}
"""Settings of what was published. DiffPure's CIFAR-10 model is the deep one."""


def denoiser_from_shadow(
    params: Sequence[Tensor], model_state: Mapping[str, Any] | None, settings: ScoreSDESettings
) -> NetworkDenoiser:
    """Make a denoiser, in eval mode, frozen, float32 on the CPU, from a copy of score_sde's EMA parameters.

    `params` are `file["ema"]["shadow_params"]`, of any floating type. `model_state` is `file["model"]`, whose names and
    shapes are compared with the list; its weights are no averages and are not used. `CheckpointError` if it is no such
    list, a network with Fourier features of the noise, progressive growing or no time (NCSN++ and the
    variance-exploding ones), or tensors do not fit.
    """
    if not isinstance(params, list | tuple) or not params or not all(isinstance(p, Tensor) for p in params):
        several = isinstance(params, list | tuple)
        kinds = ", ".join(sorted({type(p).__name__ for p in params})) if several else ""
        got = f"a list of {kinds or 'nothing, an empty one'}" if several else type(params).__name__
        raise CheckpointError(f"{_WHAT} must be a list of tensors, ['ema']['shadow_params'] of the file. Got {got}.")
    config, ddpm_blocks = _read_config([tuple(p.shape) for p in params], settings)
    network = mapping.make_network(config, _WHAT)
    pieces, names = _pieces(network, _DDPM if ddpm_blocks else _BIGGAN)
    left_over = [f"shadow_params[{i}]" for i in range(len(names), len(params))]
    if model_state is not None:
        _compare(params, mapping.tensors_only(model_state, "score_sde's model state"))
    network = mapping.fill(network, pieces, dict(zip(names + left_over, params, strict=False)), _WHAT)
    time = "continuous" if settings.continuous else "timestep"
    return mapping.make_denoiser(network, "epsilon", settings.schedule, time, settings.max_timestep)


def _compare(params: Sequence[Tensor], model_state: Mapping[str, Tensor]) -> None:
    """Compare the shapes of the model's own parameters with the list. `sigmas` is a buffer."""
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
    """Read the modules between stem and output as (kind, channels in, channels out, dimensions of the skip's weight).

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
    """Read the configuration; True where blocks are DDPM's (skips are matrices), not BigGAN's (1 x 1 convolutions)."""
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
        "multipliers": mapping.multipliers((level[0][1] for level in levels if level), channels),
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


_RESIDUAL = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "embed": "Dense_0", "norm2": "GroupNorm_1", "conv2": "Conv_1"}
_BIGGAN = Layout(
    residual={**_RESIDUAL, "skip": "Conv_2"},
    norm="GroupNorm_0",
    qkv=("NIN_0", "NIN_1", "NIN_2"),  # with one head of all channels
    proj="NIN_3",
    resample={"down": "Conv_0", "up": "Conv_0"},
    matrices="transposed",
    leaves=("W", "b"),
)
_DDPM = replace(_BIGGAN, residual=_RESIDUAL, skip="NIN_0")


def _pieces(network: UNet, layout: Layout) -> tuple[list[Piece], list[str]]:
    """Say where each tensor comes from; also the names of score_sde's parameters in their order."""
    modules: list[str | Place] = [
        "time_embed.0",
        "time_embed.2",
        "stem",
        *mapping.places(network),
        "norm_out",
        "conv_out",
    ]
    pieces: list[Piece] = []
    names: list[str] = []
    for number, module in enumerate(modules):
        prefix = f"all_modules.{number}"
        if isinstance(module, Place):
            new = layout.pieces(module, prefix)
        else:
            new = mapping.copies(module, prefix, network.get_submodule(module))
        sources = [source for piece in new for source in piece.sources]
        if isinstance(module, Place) and isinstance(module.module, AttentionBlock):
            sources.sort(key=lambda name: name.split(".")[2])  # layer by layer, not all weights of q, k, v first
        pieces += new
        names += sources
    return pieces, names
