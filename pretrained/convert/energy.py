"""PureGen's energy network: its 21 tensors under the names of `EnergyNetwork`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from purifyloader.energy.network import EnergyConfig, EnergyNetwork
from purifyloader.errors import CheckpointError
from purifyloader.pretrained.convert.mapping import copies, fill
from purifyloader.pretrained.registry import listed

__all__ = ["NAMES", "convert_energy"]

_LAYERS = {"readout": "l5"} | {
    f"blocks.{block}.{ours}": f"block{block + 1}.{published}"
    for block in range(4)
    for ours, published in (("conv1", "c1"), ("conv2", "c2"), ("skip", "c_sc"))
    if ours != "skip" or block < 2
}

NAMES = {
    f"{published}.{leaf}": f"{ours}.{leaf}"
    for ours, published in _LAYERS.items()
    for leaf in ("weight", "bias")
    if (ours, leaf) != ("readout", "bias")
}
"""The published name of each tensor, and ours."""


def convert_energy(weights: Mapping[str, Tensor], what: str, config: Mapping[str, Any] | None = None) -> EnergyNetwork:
    """Make the network with these weights, by their published names, in eval mode, frozen, float32.

    `what` names them in messages. `config`, `{"nf": width, "patch_size": 1}` of a hub folder, is checked against them.
    `CheckpointError` if tensors do not fit, or it is one of the published variants that the paper does not have.
    """
    if any(name.startswith("f.") for name in weights) and "l5.weight" not in weights:
        raise CheckpointError(
            f"{what} must be PureGen's residual energy network, with block1.c1.weight to l5.weight. Got a plain stack "
            f"of convolutions ({listed(sorted(weights), 4)}), PureGen's small variant, which is not supported."
        )
    first = weights.get("block1.c1.weight")
    width, channels = (1, 1) if first is None or first.ndim != 4 else (first.shape[0], first.shape[1])
    if (patch := dict(config or {}).get("patch_size", 1)) != 1 or channels > 4:
        raise CheckpointError(
            f"{what} must see the image itself. Got a network of {channels} input channels"
            + (f" and patch_size={patch!r}" if patch != 1 else "")
            + ": it rearranges patches of pixels into channels, which is not supported."
        )
    if first is not None and (claimed := dict(config or {}).get("nf", width)) != width:
        raise CheckpointError(
            f"{what} must be as wide as its config.json says, nf={claimed!r}. Got {width} channels: the files do not "
            "belong together. Download both again."
        )
    with torch.device("meta"):
        network = EnergyNetwork(EnergyConfig(width, channels))
    pieces = [p for ours, published in _LAYERS.items() for p in copies(ours, published, network.get_submodule(ours))]
    return fill(network, pieces, weights, what)
