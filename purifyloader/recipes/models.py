"""The models of a recipe: loaded by name, given, or found again for a purifier that was written down."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from purifyloader import pretrained, purifiers
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.energy import EnergyNetwork
from purifyloader.errors import CheckpointError, InputError
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.checkpoint import read_config
from purifyloader.pretrained.registry import FORMATS, find, is_local
from purifyloader.purifiers import Purifier

__all__ = ["EnergyModel", "Model", "as_denoiser", "as_energy", "from_json"]

Model = str | Path | Denoiser
EnergyModel = str | Path | EnergyNetwork

_WORDS = {"denoiser": ("denoiser", "an unnamed denoiser"), "energy": ("energy model", "an unnamed energy model")}


def as_denoiser(model: Model) -> Denoiser:
    """The denoiser itself; what is no denoiser at all is for the purifier to refuse."""
    return pretrained.load(model) if isinstance(model, str | os.PathLike) else model


def as_energy(model: EnergyModel) -> EnergyNetwork:
    """The energy model itself; what is none at all is for the purifier to refuse."""
    return pretrained.load(model, kind="energy") if isinstance(model, str | os.PathLike) else model


class _Found:
    """The models that a purifier's JSON means: of those given the one with its weights, else the one of its name."""

    def __init__(self, given: Sequence[Model | EnergyModel]) -> None:
        self._given = [(_kind(model), model) for model in given]
        self._loaded: dict[tuple[str, object], Denoiser | EnergyNetwork] = {}

    def __call__(self, entry: Mapping[str, object], kind: str = "denoiser") -> Denoiser | EnergyNetwork:
        name, wanted = entry["name"], str(entry["weights_sha256"])
        what, unnamed = _WORDS[kind]
        candidates = [self._load(kind, model) for its_kind, model in self._given if its_kind == kind]
        if not candidates:
            if not isinstance(name, str):
                raise CheckpointError(f"This purifier uses {unnamed}. Give it as model=.")
            if not is_local(name):  # a name in somebody's file must not lead to a download
                raise CheckpointError(
                    f"This purifier uses the {what} {name!r}. Got no model of that name here: give it as model= "
                    f"(--{'model' if kind == 'denoiser' else kind} of precompute), by its folder or, to have it "
                    "downloaded, by its name on the hub."
                )
            candidates = [self._load(kind, name)]
        hashes = [weights_sha256(model) for model in candidates]
        if wanted not in hashes:
            got = " and ".join(sha256[:12] for sha256 in hashes)
            raise CheckpointError(
                f"The {what} {name!r} must have weights {wanted[:12]}. Got {got}: give the right one as model=."
            )
        return candidates[hashes.index(wanted)]

    def _load(self, kind: str, model: Model | EnergyModel) -> Denoiser | EnergyNetwork:
        if not isinstance(model, str | os.PathLike):
            return model
        if (kind, model) not in self._loaded:
            self._loaded[kind, model] = as_denoiser(model) if kind == "denoiser" else as_energy(model)
        return self._loaded[kind, model]


def _kind(model: Model | EnergyModel) -> str:
    if isinstance(model, Denoiser | EnergyNetwork):
        return "denoiser" if isinstance(model, Denoiser) else "energy"
    if isinstance(model, str | os.PathLike):
        found = read_config(find(model), None)["format"]
        return next(kind for kind, its in FORMATS.items() if its == found)
    raise InputError(
        f"A model is a denoiser, an energy model, or the name or folder of one. Got {type(model).__name__}."
    )


def from_json(text: str, model: Model | EnergyModel | Sequence[Model | EnergyModel] | None = None) -> Purifier:
    """The purifier that `Purifier.to_json` described.

    Args:
        text: the JSON.
        model: the denoiser or energy model it uses, or a list of those it uses, where they are not all ones that
            load by their names in the JSON. They are told apart by their weights.

    Raises:
        CheckpointError: the weights are not the ones the JSON was written with, or a model is missing.
        ConfigError: no purifier's JSON.
    """
    given: list[Any] = list(model) if isinstance(model, list | tuple) else [] if model is None else [model]
    return purifiers.from_json(text, _Found(given))
