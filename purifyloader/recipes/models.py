"""Find the models of a recipe: by name, as given, or again for a purifier that was written down."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from purifyloader.errors import CheckpointError, ConfigError, InputError
from purifyloader.files.json import JsonError, read_text

if TYPE_CHECKING:
    from purifyloader.diffusion.denoiser import Denoiser
    from purifyloader.energy import EnergyNetwork
    from purifyloader.purifiers import Purifier

__all__ = ["EnergyModel", "Model", "as_denoiser", "as_energy", "from_json"]

# the annotation is the kind of model, for whoever reads a recipe's signature
Model: TypeAlias = Annotated["str | Path | Denoiser", "denoiser"]
EnergyModel: TypeAlias = Annotated["str | Path | EnergyNetwork", "energy"]


def as_model(model: Any, kind: str) -> Any:
    """Load a model where it is a name or a folder; the purifier refuses what is none at all."""
    from purifyloader import pretrained

    return pretrained.load(model, kind) if isinstance(model, str | os.PathLike) else model


def as_denoiser(model: Model) -> Denoiser:
    return as_model(model, "denoiser")


def as_energy(model: EnergyModel) -> EnergyNetwork:
    return as_model(model, "energy")


class _Finder:
    """Find the models that a purifier's JSON means: of those given, or else the one that it names.

    A model is meant that has the weights and the function; by schema 1, which had no functions, one with the weights.
    """

    def __init__(self, given: Sequence[Any]) -> None:
        self._given = [(_kind_of(model), model) for model in given]
        self._loaded: dict[tuple[str, object], Any] = {}

    def __call__(self, entry: Mapping[str, object], kind: str = "denoiser") -> Any:
        from purifyloader.cache.format import differences
        from purifyloader.pretrained.kinds import KINDS, identity_of
        from purifyloader.pretrained.registry import is_local

        name, wanted = entry["name"], str(entry["weights_sha256"])
        what = KINDS[kind]
        candidates = [self._load(kind, model) for of_model, model in self._given if of_model == kind]
        if not candidates:
            if not isinstance(name, str):
                raise CheckpointError(f"This purifier uses an unnamed {what.noun}. Give it as model=.")
            if not is_local(name):  # a name in somebody's file must not lead to a download
                raise CheckpointError(
                    f"This purifier uses the {what.noun} {name!r}. Got no model of that name here: give it as model=, "
                    "by its folder or, to have it downloaded, by its name on the hub."
                )
            candidates = [self._load(kind, name)]
        identities = [identity_of(model) for model in candidates]
        right = [i for i, identity in enumerate(identities) if identity["weights_sha256"] == wanted]
        if not right:
            got = " and ".join(identity["weights_sha256"][:12] for identity in identities)
            raise CheckpointError(
                f"The {what.noun} {name!r} must have weights {wanted[:12]}. Got {got}: give the right one as model=."
            )
        if (function := entry.get("function")) is None:
            return candidates[right[0]]
        changed = [differences({"function": function}, {"function": identities[i]["function"]}) for i in right]
        if all(changed):
            raise CheckpointError(
                f"The {what.noun} {name!r} must compute what it did when this purifier was written. Got its weights "
                f"{wanted[:12]} in a model that computes otherwise (written → here):\n{changed[0]}\n"
                "Give the model of before as model=, or write the purifier anew."
            )
        return candidates[right[changed.index("")]]

    def _load(self, kind: str, model: Any) -> Any:
        if not isinstance(model, str | os.PathLike):
            return model
        if (kind, model) not in self._loaded:
            self._loaded[kind, model] = as_model(model, kind)
        return self._loaded[kind, model]


def _kind_of(model: Any) -> str:
    from purifyloader.pretrained.checkpoint import kind_of_folder
    from purifyloader.pretrained.kinds import kind_of
    from purifyloader.pretrained.registry import find

    if isinstance(model, str | os.PathLike):
        return kind_of_folder(find(model)).name
    if (kind := kind_of(model)) is None:
        raise InputError(
            f"A model is a denoiser, an energy model, or the name or folder of one. Got {type(model).__name__}."
        )
    return kind.name


def from_json(text: str, model: Any = None) -> Purifier:
    """Build the purifier that `Purifier.to_json` described.

    Args:
        text: the JSON.
        model: the denoiser or energy model that it uses, by name, folder or loaded, or a list of those it uses, where
            they are not all ones that load by their names in the JSON. They are told apart by their weights and their
            functions; by their weights alone where the JSON is of schema 1.

    Raises:
        CheckpointError: the weights or the function are not those that the JSON was written with (the message says what
            differs), or a model is missing.
        ConfigError: no purifier's JSON.

    >>> from purifyloader import recipes
    >>> recipes.from_json(recipes.jpeg(30).to_json()).config()
    {'kind': 'jpeg', 'quality': 30}
    """
    from purifyloader import purifiers

    given = list(model) if isinstance(model, list | tuple) else [] if model is None else [model]
    return purifiers.from_json(text, _Finder(given))


def from_file(path: Path, model: Any = None) -> Purifier:
    """Build the purifier whose JSON is in the file of the option --recipe; errors name the file."""
    try:
        text = read_text(path)
    except (OSError, JsonError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError | IsADirectoryError) else error
        raise ConfigError(
            f"must be a file with the JSON of a purifier. Got {str(path)!r}: {why}.", argument="recipe"
        ) from None
    try:
        return from_json(text, model)
    except (ConfigError, InputError) as error:
        raise type(error)(f"{path}: {error}") from None
