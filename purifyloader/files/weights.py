"""Identify a network's weights, whatever file they came from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict on the CPU, contiguous, sorted by name, without the `_orig_mod.` of `torch.compile`."""
    named = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"Weights must be tensors. Got {type(value).__name__} for {name!r}. "
                "Keep other state out of the state dict (get_extra_state)."
            )
        named[name.replace("_orig_mod.", "")] = value.detach().cpu().contiguous()
    return dict(sorted(named.items()))


def weights_sha256(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256, in hex, of each weight's name, dtype, shape and values: what fingerprints call the weights.

    It depends on no file, device, memory format or compilation; a cast changes it: with `dtype` it is that of the
    weights cast to it. (The hash of a checkpoint's file, which guards against damage, is another number.)
    """
    sha = hashlib.sha256()
    for name, tensor in named_weights(module).items():
        tensor = tensor if dtype is None else tensor.to(dtype)
        # The line says how many bytes follow, so that no two states give the same stream.
        head = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        sha.update(canonical_json(head).encode() + b"\n")
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
