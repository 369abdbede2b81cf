"""Bind what a checkpoint says of the images that it learned from to the weights that learned from them.

No model may claim to have learned from fewer images than it has. So `details` that name images also have the
`weights_sha256` of the weights that they describe, and a network remembers the weights that it began with, and those of
its teacher: through copies, pickles, casts and further training.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from purifyloader.errors import CheckpointError, InputError
from purifyloader.files.atomic import canonical_json
from purifyloader.files.weights import weights_sha256

__all__ = ["bind", "check_bound", "remember", "remember_teacher"]

log = logging.getLogger("purifyloader")

_CLAIMS = ("image_hashes", "images_sha256", "indices")  # details that name images learned from
_BOUND = "weights_sha256"
_ORIGIN = "_purifyloader_origin"  # of a network: a dict of _BOUND and of its checkpoint's claims, as hashes
_TEACHER = "_purifyloader_teacher"  # of a network: the weights from which it was distilled

_ANCESTORS = {"start_from": "started_from", "distil_from": "distilled_from"}  # of a training, and what names them

_LEAVE_OUT = f"leave {', '.join(_CLAIMS)} and {_BOUND} out of them, and the model says that it is not known"


def remember(network: nn.Module, weights: str, details: Any = None) -> None:
    """Note in a network the weights that it begins with, and what the details of their checkpoint say of them."""
    setattr(network, _ORIGIN, {_BOUND: weights, "claims": _claims(details)})


def remember_teacher(network: nn.Module, weights: str) -> None:
    """Note in a network the weights of the model whose estimates it learns."""
    setattr(network, _TEACHER, weights)


def check_bound(details: Any, weights: str, file: object) -> None:
    """Raise `CheckpointError` where the details in `file` are of other weights; older ones do not say of which."""
    described = details.get(_BOUND, weights) if isinstance(details, Mapping) else weights
    if described != weights:
        raise CheckpointError(
            f"{file} must say which images the weights beside it learned from. Got details of the weights "
            f"{str(described)[:16]} beside {weights[:16]}: they are of another model. Download the checkpoint again, "
            f"or {_LEAVE_OUT}."
        )


def bind(details: Mapping[str, Any], model: nn.Module, network: nn.Module) -> dict[str, Any]:
    """Return details that may be stored with a model, bound to its weights in float32 where they name images.

    Raises:
        InputError: they are of other weights, or name fewer images than `network`, which is the model's, began with.
    """
    origin = getattr(network, _ORIGIN, None)
    if not (_BOUND in details or any(name in details for name in _CLAIMS)):
        if origin is not None and origin["claims"]:
            log.warning(
                "saved without the images that the model's checkpoint names: it no longer says what it learned from. "
                "Give its details to keep them"
            )
        return dict(details)
    weights = weights_sha256(model, torch.float32)
    if (described := details.get(_BOUND, weights)) != weights:
        raise InputError(
            f"details must be of the model that is saved. Got those of the weights {str(described)[:16]} for a model "
            f"of {weights[:16]}. Give what these learned from and the weights that they started from, or {_LEAVE_OUT}."
        )
    claims = _claims(details)
    begun = origin[_BOUND] if origin is not None and weights != origin[_BOUND] else None
    for field, wanted in (("start_from", begun), ("distil_from", getattr(network, _TEACHER, None))):
        if wanted is not None and _ancestor(details, field) != wanted:
            raise InputError(
                "details must say from which weights a training started, and from which it was distilled: what these "
                f"learned from counts too. Got none of the model of the weights {wanted[:16]}. Add train = "
                f'{{"{field}": {{"name": ..., "weights_sha256": ...}}}} (purifyloader.train.{_ANCESTORS[field]} makes '
                f"it), or {_LEAVE_OUT}."
            )
    known = origin["claims"] if origin is not None and begun is None else {}
    if any(claims.get(name) != value for name, value in known.items()):
        raise InputError(
            "details must name the images that the checkpoint of these weights names. Got others for a model that was "
            f"loaded and not changed. Give the details of its config.json, or {_LEAVE_OUT}."
        )
    return {**details, _BOUND: weights}


def _claims(details: Any) -> dict[str, str]:
    """Hash each claim of some details: those of a million images are long."""
    if not isinstance(details, Mapping):
        return {}
    claims = {name: details[name] for name in _CLAIMS if name in details}
    if claims:
        ancestors = {field: _ancestor(details, field) for field in _ANCESTORS}
        claims |= {field: weights for field, weights in ancestors.items() if weights is not None}
    return {name: hashlib.sha256(canonical_json(value).encode()).hexdigest() for name, value in claims.items()}


def _ancestor(details: Mapping[str, Any], field: str) -> Any:
    """Return the hash of the weights that a field of a training names, where details have it."""
    train = details.get("train")
    entry = train.get(field) if isinstance(train, Mapping) else None
    return entry.get(_BOUND) if isinstance(entry, Mapping) else None
