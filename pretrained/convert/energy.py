"""PureGen's energy network: its 21 tensors under the names of `EnergyNetwork`. A pure mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from purifyloader.energy.network import EnergyConfig, EnergyNetwork
from purifyloader.errors import CheckpointError
from purifyloader.pretrained.registry import listed

__all__ = ["NAMES", "convert_energy"]


def _names() -> dict[str, str]:
    names = {"l5.weight": "readout.weight"}
    for block, parts in enumerate([("c1", "c2", "c_sc"), ("c1", "c2", "c_sc"), ("c1", "c2"), ("c1", "c2")]):
        for part in parts:
            ours = {"c1": "conv1", "c2": "conv2", "c_sc": "skip"}[part]
            for kind in ("weight", "bias"):
                names[f"block{block + 1}.{part}.{kind}"] = f"blocks.{block}.{ours}.{kind}"
    return names


NAMES = _names()
"""The published name of each tensor, and ours."""


def convert_energy(weights: Mapping[str, Tensor], what: str, config: Mapping[str, Any] | None = None) -> EnergyNetwork:
    """The network with these weights, in eval mode, frozen, float32.

    Args:
        weights: by their published names.
        what: they are of, for messages.
        config: of the hub folder, `{"nf": width, "patch_size": 1}`; checked against the weights.

    Raises:
        CheckpointError: tensors that are missing, unknown, of other shapes or not finite, all of them named, or
            one of the published variants that is not the network of the paper.
    """
    if any(name.startswith("f.") for name in weights) and "l5.weight" not in weights:
        raise CheckpointError(
            f"{what} must be PureGen's residual energy network, with block1.c1.weight to l5.weight. Got a plain stack "
            f"of convolutions ({listed(sorted(weights), 4)}), PureGen's small variant, which is not supported."
        )
    missing = sorted(set(NAMES) - set(weights))
    unknown = sorted(set(weights) - set(NAMES))
    if missing or unknown:
        parts = [f"without {listed(missing, 21)}"] if missing else []
        parts += [f"with the unknown {listed(unknown, 21)}"] if unknown else []
        raise CheckpointError(
            f"{what} must hold the {len(NAMES)} tensors of PureGen's energy network. Got weights {'; '.join(parts)}. "
            "Give the file of an energy network, or another --format."
        )
    first = weights["block1.c1.weight"]
    width, channels = (first.shape[0], first.shape[1]) if first.ndim == 4 else (1, 1)
    if (patch := dict(config or {}).get("patch_size", 1)) != 1 or channels > 4:
        raise CheckpointError(
            f"{what} must see the image itself. Got a network of {channels} input channels"
            + (f" and patch_size={patch!r}" if patch != 1 else "")
            + ": it rearranges patches of pixels into channels, which is not supported."
        )
    if (claimed := dict(config or {}).get("nf", width)) != width:
        raise CheckpointError(
            f"{what} must be as wide as its config.json says, nf={claimed!r}. Got {width} channels: the files do not "
            "belong together. Download both again."
        )
    with torch.device("meta"):
        network = EnergyNetwork(EnergyConfig(width, channels))
    expected = network.state_dict()
    wrong = [
        f"{theirs} (expected {tuple(expected[ours].shape)}, got {tuple(weights[theirs].shape)})"
        for theirs, ours in NAMES.items()
        if weights[theirs].shape != expected[ours].shape
    ]
    wrong += [f"{name} ({weights[name].dtype})" for name in NAMES if not weights[name].is_floating_point()]
    if wrong:
        raise CheckpointError(
            f"{what} must hold weights of one width, {width} here by block1.c1.weight. Got {listed(wrong, 21)}. "
            "Download it again."
        )
    converted = {ours: weights[theirs].float().contiguous().clone() for theirs, ours in NAMES.items()}
    bad = [theirs for theirs, ours in NAMES.items() if not bool(converted[ours].isfinite().all())]
    if bad:
        raise CheckpointError(f"{what} must hold finite weights. Got NaN or infinity in {listed(bad, 21)}.")
    network.load_state_dict(converted, assign=True)
    return network.eval().requires_grad_(False)
