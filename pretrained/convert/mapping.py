"""Map foreign names and shapes to a `UNet`'s state dict: the part that the converters of networks share.

A converter reads a `UNetConfig` off the foreign shapes and names the foreign layers in a `Layout`, which says for each
tensor where it comes from (`Piece`). `fill` compares everything before it copies anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.schedule import ContinuousVP, Schedule
from purifyloader.diffusion.unet import AttentionBlock, ResidualBlock, UNet, UNetConfig
from purifyloader.errors import CheckpointError, ConfigError
from purifyloader.pretrained.checkpoint import misfits
from purifyloader.pretrained.registry import listed

__all__ = ["Layout", "Piece", "Place", "check_schedule", "copies", "fill", "make_denoiser", "make_network"]
__all__ += ["multipliers", "places", "qkv_rows", "read_width", "tensors_only", "trained_range", "unprefixed"]

Network = TypeVar("Network", bound=nn.Module)

FIRST_TRAINED = 1e-5  # where the continuous time of score_sde's training begins, as a share of its end


@dataclass(frozen=True)
class Place:
    """A block: its `side` "down", "middle" or "up", its stage there, and its position in the stage."""

    side: str
    stage: int
    position: int
    level: int  # counts resolutions from the full one
    block: int  # stages of that level on that side
    module: nn.Module

    @property
    def ours(self) -> str:
        return f"middle.{self.position}" if self.side == "middle" else f"{self.side}.{self.stage}.{self.position}"


@dataclass(frozen=True)
class Piece:
    """One tensor of ours: `make` of the foreign tensors named `sources`, each of that `shape`."""

    target: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., Tensor]


def places(network: UNet) -> Iterator[Place]:
    """Yield the blocks between stem and output, in the order in which they are computed."""
    per_level, levels = network.config.blocks + 1, len(network.config.multipliers)
    for side, stages in (("down", network.down), ("middle", [network.middle]), ("up", network.up)):
        for index, stage in enumerate(stages):
            assert isinstance(stage, nn.ModuleList)
            level = {"down": index // per_level, "middle": levels - 1, "up": levels - 1 - index // per_level}[side]
            for position, module in enumerate(stage):
                yield Place(side, index, position, level, index % per_level, module)


def copies(ours: str, prefix: str, module: nn.Module) -> list[Piece]:
    """Copy weight and bias of a layer that both have in the same shape. A layer without weights gives nothing."""
    return [
        Piece(f"{ours}.{name}", (f"{prefix}.{name}",), tuple(tensor.shape), lambda tensor: tensor)
        for name, tensor in module.named_parameters()
    ]


# a matrix (out, in): the shape in which a package stores it, and how to read it
_MATRICES: dict[str, tuple[Callable[[int, int], tuple[int, ...]], Callable[[Tensor], Tensor]]] = {
    "linear": (lambda c_out, c_in: (c_out, c_in), lambda matrix: matrix),
    "conv1d": (lambda c_out, c_in: (c_out, c_in, 1), lambda matrix: matrix[..., 0]),
    "transposed": (lambda c_out, c_in: (c_in, c_out), lambda matrix: matrix.T),
}


@dataclass(frozen=True)
class Layout:
    """Foreign names of a network's layers, by the names of `UNet`."""

    residual: Mapping[str, str]  # layers of a residual block
    norm: str  # of an attention block, as qkv and proj
    qkv: tuple[str, ...]  # one layer, or one each for q, k and v
    proj: str
    resample: Mapping[str, str]  # side "down" or "up" → the convolution that changes the resolution
    matrices: str = "linear"  # how they are stored, a key of `_MATRICES`
    leaves: tuple[str, str] = ("weight", "bias")  # what weight and bias of a matrix are called
    stacked: bool = True  # all of q, then k, then v; else q, k, v of each head in turn, as `UNet` has them
    skip: str = ""  # of a residual block, where it is a matrix
    outside: Mapping[str, str] = field(default_factory=dict)  # layers outside the blocks

    def outer_pieces(self, network: UNet) -> list[Piece]:
        """Say where the tensors outside the blocks come from."""
        named = self.outside.items()
        return [piece for ours, prefix in named for piece in copies(ours, prefix, network.get_submodule(ours))]

    def pieces(self, place: Place, prefix: str) -> list[Piece]:
        """Say where the tensors of a block come from, whose foreign name is `prefix`."""
        module, ours = place.module, place.ours
        if isinstance(module, AttentionBlock):
            return [
                *copies(f"{ours}.norm", f"{prefix}.{self.norm}", module.norm),
                *self._matrices(f"{ours}.qkv", prefix, self.qkv, module.qkv, module.heads if self.stacked else 1),
                *self._matrices(f"{ours}.proj", prefix, (self.proj,), module.proj),
            ]
        if not isinstance(module, ResidualBlock):
            conv, name = getattr(module, "conv", None), self.resample[place.side]
            return [] if conv is None else copies(f"{ours}.conv", f"{prefix}.{name}", conv)
        pieces: list[Piece] = []
        for own, foreign in self.residual.items():
            pieces += copies(f"{ours}.{own}", f"{prefix}.{foreign}", module.get_submodule(own))
        if self.skip and isinstance(module.skip, nn.Conv2d):
            pieces += self._matrices(f"{ours}.skip", prefix, (self.skip,), module.skip)
        return pieces

    def _matrices(
        self, ours: str, prefix: str, layers: tuple[str, ...], conv: nn.Conv2d, heads: int = 1
    ) -> list[Piece]:
        """A 1 x 1 convolution of ours from linear layers of theirs, one after another along the output."""
        stored_shape, read = _MATRICES[self.matrices]
        weights, biases = (tuple(f"{prefix}.{layer}.{leaf}" for layer in layers) for leaf in self.leaves)
        c_out = conv.out_channels // len(layers)

        def weight(*parts: Tensor) -> Tensor:
            return qkv_rows(torch.cat([read(part) for part in parts]), heads)[..., None, None]

        return [
            Piece(f"{ours}.weight", weights, stored_shape(c_out, conv.in_channels), weight),
            Piece(f"{ours}.bias", biases, (c_out,), lambda *parts: qkv_rows(torch.cat(parts), heads)),
        ]


def multipliers(widths: Iterable[int], channels: int) -> tuple[float, ...]:
    """Divide the widths of levels by that of the first; whole numbers stay whole."""
    return tuple(width // channels if width % channels == 0 else width / channels for width in widths)


def qkv_rows(stacked: Tensor, heads: int) -> Tensor:
    """Reorder all of q, then k, then v, (3 * heads * c, ...), to q, k, v of each head in turn, as `UNet` has them."""
    if heads == 1:
        return stacked
    return stacked.reshape(3, heads, -1, *stacked.shape[1:]).transpose(0, 1).reshape(stacked.shape)


def tensors_only(state: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """Return a state dict `unprefixed`, or raise `CheckpointError` unless it maps names to tensors."""
    if not isinstance(state, Mapping) or not state:
        got = "an empty one" if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(f"{what} must be a mapping of names to tensors. Got {got}.")
    if other := [f"{name!r} ({type(v).__name__})" for name, v in state.items() if not isinstance(v, Tensor)]:
        raise CheckpointError(
            f"{what} must map names to tensors and nothing else. Got {listed(other, 20)}. "
            "Give the state dict itself, not what it was saved with."
        )
    if not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{what} must have strings for names. Got {listed([repr(name) for name in state], 20)}.")
    return unprefixed(state)


def unprefixed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what DataParallel and torch.compile put before every name, in either order."""
    for prefix in ("module.", "_orig_mod.") * 2:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return dict(weights)


def read_width(state: Mapping[str, Tensor], names: Iterable[str], what: str) -> int:
    """Read the length on which most of the named tensors agree along their first axis.

    More than one is asked, so that a single wrong tensor is found out by the others.
    """
    names = list(names)
    lengths = Counter(state[name].shape[0] for name in names if name in state and state[name].ndim > 0)
    if not lengths:
        raise CheckpointError(
            f"{what} must have one of {listed(names, 20)} to read a width from. Got none of them. "
            "Check that it is whole and in this format."
        )
    return lengths.most_common(1)[0][0]


def make_network(config: Mapping[str, Any], what: str) -> UNet:
    """Build a network without memory for its weights yet, which `fill` gives it; `CheckpointError` if none can be."""
    try:
        with torch.device("meta"):
            return UNet(UNetConfig(**config))
    except ConfigError as error:
        raise CheckpointError(
            f"{what} and the settings must describe a network that can be built. Got: {error} "
            "Correct the settings, or check that the file is whole and in this format."
        ) from None


def fill(network: Network, pieces: Sequence[Piece], state: Mapping[str, Tensor], what: str) -> Network:
    """Give a network its weights as float32, and set it to eval mode, frozen; `CheckpointError` names all `misfits`."""
    targets = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert sorted(piece.target for piece in pieces) == sorted(targets), "a converter must name each tensor once"
    expected = {source: piece.shape for piece in pieces for source in piece.sources}
    if wrong := misfits(expected, state):
        raise CheckpointError(
            f"{what} must hold the {len(expected)} tensors of the network that its shapes and settings describe. Got "
            f"{len(state)}, {wrong}. Check that the file is whole, in this format, and that the settings are its own."
        )
    weights = {}
    for piece in pieces:
        made = piece.make(*(state[source].detach().to("cpu", torch.float32) for source in piece.sources))
        assert tuple(made.shape) == targets[piece.target], piece.target
        weights[piece.target] = made.contiguous().clone()
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def trained_range(schedule: Schedule, max_timestep: float | None = None) -> tuple[float, float]:
    """Compute sigma of the first and the last timestep that a model was trained on, in image units."""
    first = FIRST_TRAINED * schedule.timesteps if isinstance(schedule, ContinuousVP) else 1
    last = schedule.timesteps if max_timestep is None else max_timestep
    return float(schedule.sigma(first)), float(schedule.sigma(last))


def make_denoiser(
    network: UNet, parameterization: str, schedule: Schedule, time: str, max_timestep: float | None
) -> NetworkDenoiser:
    """Wrap a converted network: in eval mode, frozen, its range that of the timesteps it was trained on."""
    denoiser = NetworkDenoiser(network, parameterization, trained_range(schedule, max_timestep), schedule, time)
    return denoiser.eval().requires_grad_(False)


def check_schedule(schedule: Any, max_timestep: Any, *, none: bool = False) -> None:
    """Raise `ConfigError` unless this is a schedule (or None where `none`), and a cap that leaves a range within it."""
    if not isinstance(schedule, Schedule) and not (none and schedule is None):
        raise ConfigError(f"schedule must be a Schedule, such as LinearSchedule(1000). Got {schedule!r}.")
    if max_timestep is None:
        return
    number = isinstance(max_timestep, int | float) and not isinstance(max_timestep, bool)
    high = math.inf if schedule is None else schedule.timesteps
    if not number or not 1 < max_timestep <= high:
        raise ConfigError(
            f"max_timestep must be above 1 and at most the schedule's {high:g}, or None for all of it. "
            f"Got {max_timestep!r}."
        )
