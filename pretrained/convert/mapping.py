"""What the converters of networks share: from foreign names and shapes to a `UNet`'s state dict.

A converter reads a `UNetConfig` off the foreign shapes, walks the network that this gives (`places`), says for each of
its tensors where it comes from (`Piece`), and lets `fill` do the rest. `fill` compares everything before it copies
anything, so that one message names all that does not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.schedule import ContinuousVP, Schedule
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.errors import CheckpointError, ConfigError
from purifyloader.pretrained.registry import listed

__all__ = [
    "Piece",
    "Place",
    "check_max_timestep",
    "copies",
    "fill",
    "make_denoiser",
    "make_network",
    "multipliers",
    "places",
    "qkv_rows",
    "read_width",
    "tensors_only",
    "trained_range",
    "unprefixed",
]

FIRST_TRAINED = 1e-5
"""Where the continuous time of score_sde's training begins, as a share of its end."""


@dataclass(frozen=True)
class Place:
    """Where a block stands: `side` "down", "middle" or "up", its stage there, and its position in the stage.

    `level` counts resolutions from the full one, `block` the stages of that level on that side.
    """

    side: str
    stage: int
    position: int
    level: int
    block: int
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
    """The blocks of a network between stem and output, in the order in which they are computed."""
    per_level, levels = network.config.blocks + 1, len(network.config.multipliers)
    for side, stages in (("down", network.down), ("middle", [network.middle]), ("up", network.up)):
        for index, stage in enumerate(stages):
            assert isinstance(stage, nn.ModuleList)
            level = {"down": index // per_level, "middle": levels - 1, "up": levels - 1 - index // per_level}[side]
            for position, module in enumerate(stage):
                yield Place(side, index, position, level, index % per_level, module)


def copies(ours: str, theirs: str, module: nn.Module) -> list[Piece]:
    """Weight and bias of a layer that both have in the same shape. A layer without weights gives nothing."""
    return [
        Piece(f"{ours}.{name}", (f"{theirs}.{name}",), tuple(tensor.shape), lambda tensor: tensor)
        for name, tensor in module.named_parameters()
    ]


def multipliers(widths: Iterable[int], channels: int) -> tuple[float, ...]:
    """Widths of levels over that of the first, whole numbers where they are whole."""
    return tuple(width // channels if width % channels == 0 else width / channels for width in widths)


def qkv_rows(stacked: Tensor, heads: int) -> Tensor:
    """From all of q, then k, then v, (3 * heads * c, ...), to q, k, v of each head in turn, as `UNet` has them."""
    return stacked.reshape(3, heads, -1, *stacked.shape[1:]).transpose(0, 1).reshape(stacked.shape)


def tensors_only(state: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """The state dict, `unprefixed`.

    Raises:
        CheckpointError: not a mapping of names to tensors, or an empty one.
    """
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
    """Without what DataParallel and torch.compile put before every name, in either order."""
    for prefix in ("module.", "_orig_mod.") * 2:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return dict(weights)


def read_width(state: Mapping[str, Tensor], names: Iterable[str], what: str) -> int:
    """The length on which most of the named tensors agree along their first axis.

    More than one is asked, so that a single wrong tensor is found out by the others.

    Raises:
        CheckpointError: none of them is there.
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
    """A network without memory for its weights yet, which `fill` gives it.

    Raises:
        CheckpointError: no network can be built so.
    """
    try:
        with torch.device("meta"):
            return UNet(UNetConfig(**config))
    except ConfigError as error:
        raise CheckpointError(
            f"{what} and the settings must describe a network that can be built. Got: {error} "
            "Correct the settings, or check that the file is whole and in this format."
        ) from None


def fill(network: UNet, pieces: Sequence[Piece], state: Mapping[str, Tensor], what: str) -> UNet:
    """Give a network its weights as float32, and set it to eval mode, frozen.

    Raises:
        CheckpointError: tensors are missing or left over, have another shape, are not floating or not finite. The
            message names all of them.
    """
    targets = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert sorted(piece.target for piece in pieces) == sorted(targets), "a converter must name each tensor once"
    expected = {source: piece.shape for piece in pieces for source in piece.sources}
    there = {name: state[name] for name in expected if name in state}
    complaints = {
        "missing": [f"{name} {expected[name]}" for name in expected if name not in state],
        "left over": [f"{name} {tuple(tensor.shape)}" for name, tensor in state.items() if name not in expected],
        "of another shape": [
            f"{name} (expected {expected[name]}, got {tuple(tensor.shape)})"
            for name, tensor in there.items()
            if tuple(tensor.shape) != expected[name]
        ],
        "not of a floating type": [
            f"{name} ({tensor.dtype})" for name, tensor in there.items() if not tensor.is_floating_point()
        ],
        "with NaN or infinity": [
            name
            for name, tensor in there.items()
            if tensor.is_floating_point() and not bool(tensor.float().isfinite().all())
        ],
    }
    if any(complaints.values()):
        got = "; ".join(f"{len(names)} {kind}: {listed(names, 20)}" for kind, names in complaints.items() if names)
        raise CheckpointError(
            f"{what} must hold the {len(expected)} tensors of the network that its shapes and settings describe. "
            f"Got {len(state)}, {got}. Check that the file is whole, in this format, and that the settings are its own."
        )
    weights = {}
    for piece in pieces:
        made = piece.make(*(there[source].detach().to("cpu", torch.float32) for source in piece.sources))
        assert tuple(made.shape) == targets[piece.target], piece.target
        weights[piece.target] = made.contiguous().clone()
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def trained_range(schedule: Schedule, max_timestep: float | None = None) -> tuple[float, float]:
    """sigma of the first and the last timestep that a model was trained on, in image units."""
    first = FIRST_TRAINED * schedule.timesteps if isinstance(schedule, ContinuousVP) else 1
    last = schedule.timesteps if max_timestep is None else max_timestep
    return float(schedule.sigma(first)), float(schedule.sigma(last))


def make_denoiser(
    network: UNet, parameterization: str, schedule: Schedule, time: str, max_timestep: float | None
) -> NetworkDenoiser:
    """A converted denoiser in eval mode, frozen, its range that of the timesteps it was trained on."""
    denoiser = NetworkDenoiser(network, parameterization, trained_range(schedule, max_timestep), schedule, time)
    return denoiser.eval().requires_grad_(False)


def check_max_timestep(max_timestep: Any, schedule: Schedule | None) -> None:
    """Refuse a cap that leaves no range or lies beyond the schedule."""
    if max_timestep is None:
        return
    number = isinstance(max_timestep, int | float) and not isinstance(max_timestep, bool)
    high = float("inf") if schedule is None else schedule.timesteps
    if not number or not 1 < max_timestep <= high:
        raise ConfigError(
            f"max_timestep must be above 1 and at most the schedule's {high:g}, or None for all of it. "
            f"Got {max_timestep!r}."
        )
