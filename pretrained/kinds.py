"""Describe the kinds of models, one entry each: all that saving, loading, converting and messages need of a kind.

A new kind is a class here and its name in `KINDS`; no other module asks of which kind a model is. Classes of models
are imported in the bodies of functions, so that names and formats are there without torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from purifyloader.errors import ConfigError, PurifyError
from purifyloader.files.atomic import canonical_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from purifyloader.pretrained.plausibility import Plausibility

__all__ = ["KINDS", "ModelKind", "identity_of", "kind_of", "kind_of_format", "sized_identity"]


class ModelKind:
    """A kind of model. Classes and functions are named as "module:name"."""

    name: str  # the field of config.json that describes the model, and `kind=` of `pretrained.load`
    noun: str  # for messages, with `article` before it
    article: str = "a"
    used_by: str  # purifiers and recipes that take it, for messages
    base_class: str  # that purifiers take
    saved_class: str  # that can be saved
    builder: str  # builds it back from `config`
    judged_by: str  # what `judge` calls

    @property
    def format(self) -> str:
        """The format that config.json names."""
        return f"purifyloader-{self.name}"

    @property
    def words(self) -> str:
        return f"{self.article} {self.noun}"

    @property
    def load_argument(self) -> str:
        """The argument of `pretrained.load(path, ...)` that reads one, for cards."""
        return f', kind="{self.name}"'

    def base(self) -> type[nn.Module]:
        cls: type[nn.Module] = resolve_name(self.base_class)
        return cls

    def saved(self) -> type[nn.Module]:
        cls: type[nn.Module] = resolve_name(self.saved_class)
        return cls

    def config(self, model: Any, every: bool = False) -> dict[str, Any]:
        """Describe the model as JSON, without its weights; with `every` field, also those that no checkpoint needs."""
        raise NotImplementedError

    def function(self, model: Any) -> dict[str, Any]:
        """Describe as JSON all that decides what the model computes, beside its weights.

        Of the library's own classes it is every field of the configuration: two versions of torch agree on it, as they
        might not on the attributes of layers. These are compared with a network that is built from the configuration
        here and now, and count as `structure` where somebody has changed one. Of other classes they always count.
        """
        from purifyloader.files.weights import described, structure_sha256

        name, structure = type(model).__qualname__, structure_sha256(model)
        try:
            config = described(self.config(model))
            every = described(self.config(model, every=True)) if type(model) is self.saved() else None
        except (NotImplementedError, AttributeError, TypeError):
            config, every = {}, None  # a class or a network of the user's, which may say nothing
        if every is not None and _built_structure(self.name, canonical_json(config)) == structure:
            return {"class": name, **every}
        return {**(every or config), "class": name, "structure_sha256": structure}

    def build(self, config: Mapping[str, Any]) -> Any:
        """Build a model back, with new weights, from what `config` gave."""
        return resolve_name(self.builder)(config)

    def network(self, model: Any) -> nn.Module:
        """The module whose weights are stored."""
        raise NotImplementedError

    def image_channels(self, model: Any) -> int:
        raise NotImplementedError

    def facts(self, model: Any) -> dict[str, str]:
        """List what is special about a model of this kind, as rows of its card."""
        raise NotImplementedError

    def describe(self, config: Mapping[str, Any]) -> str:
        """Describe a model in a few words from what `config` gave; `ConfigError` if it cannot have given this."""
        return self.words

    def judge(self, model: Any, images_NCHW: Tensor, images: str) -> Plausibility:
        """Measure whether a converted model does what it should, on uint8 images that `images` describes."""
        judged: Plausibility = resolve_name(self.judged_by)(model, images_NCHW, images)
        return judged


class DenoiserKind(ModelKind):
    name = noun = "denoiser"
    used_by = "Diffuse and DenoiseOnce: recipes.eclipse, denoise_once and puregen_ddpm"
    load_argument = ""
    base_class = "purifyloader.diffusion.denoiser:Denoiser"
    saved_class = "purifyloader.diffusion.denoiser:NetworkDenoiser"
    builder = "purifyloader.diffusion.denoiser:denoiser_from_config"
    judged_by = "purifyloader.pretrained.plausibility:judge_denoiser"

    def config(self, model: Any, every: bool = False) -> dict[str, Any]:
        return dict(model.config(every) if every else model.config())

    def network(self, model: Any) -> nn.Module:
        network: nn.Module = model.network
        return network

    def image_channels(self, model: Any) -> int:
        return int(model.image_channels)

    def facts(self, model: Any) -> dict[str, str]:
        low, high = model.sigma_range
        schedule = canonical_json(model.schedule.config()) if model.schedule is not None else "none"
        return {
            "Parameterization": model.parameterization,
            "Noise it was trained for": f"{255 * low:.3g} to {255 * high:.3g} px (sigma {low:.4g} to {high:.4g})",
            "Schedule": f"`{schedule}`",
            "Image channels": f"{model.image_channels}",
            "Learned variance": "yes" if model.learned_variance else "no",
        }

    def describe(self, config: Mapping[str, Any]) -> str:
        try:
            low, high = (255 * float(sigma) for sigma in config["sigma_range"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"sigma_range must be [low, high]. Got {config.get('sigma_range')!r}.") from None
        return f"for noise from {low:.2g} to {high:.0f} px"


class EnergyKind(ModelKind):
    name = "energy"
    noun = "energy model"
    article = "an"
    used_by = "Langevin and EnergyAbove: recipes.puregen_ebm and puregen_filt"
    base_class = saved_class = "purifyloader.energy.network:EnergyNetwork"
    builder = "purifyloader.energy.network:energy_from_config"
    judged_by = "purifyloader.pretrained.plausibility:judge_energy"

    def config(self, model: Any, every: bool = False) -> dict[str, Any]:
        return dict(model.describe(every) if every else model.describe())

    def network(self, model: Any) -> nn.Module:
        network: nn.Module = model
        return network

    def image_channels(self, model: Any) -> int:
        return int(model.config.image_channels)

    def facts(self, model: Any) -> dict[str, str]:
        return {
            "Gives": "an energy, low on clean images",
            "Width": f"{model.config.channels}",
            "Image channels": f"{model.config.image_channels}",
        }


KINDS: dict[str, ModelKind] = {kind.name: kind for kind in (DenoiserKind(), EnergyKind())}
"""The kinds of models by name."""


def kind_of(model: Any) -> ModelKind | None:
    """Return the kind of a model in memory; None for what is no model."""
    return next((kind for kind in KINDS.values() if isinstance(model, kind.base())), None)


def kind_of_format(format: Any) -> ModelKind | None:
    """Return the kind whose format config.json names; None for no format of this library."""
    return next((kind for kind in KINDS.values() if kind.format == format), None)


@functools.lru_cache(maxsize=64)
def _built_structure(kind: str, config: str) -> str | None:
    """Hash the structure of a model as its configuration builds it; None where it builds none."""
    import torch

    from purifyloader.files.weights import structure_sha256

    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return structure_sha256(KINDS[kind].build(json.loads(config)))
    except (PurifyError, ArithmeticError, LookupError, TypeError, ValueError):  # somebody has changed the configuration
        return None


def identity_of(model: Any) -> dict[str, Any]:
    """Identify a model: its name, for people, the hash of its weights as they are now, and its function.

    Everybody who tells models apart by what they compute does it by this, without the name. Which images a model has
    learned from is decided by the weights alone (`purifyloader.pretrained.learned`).

    >>> from purifyloader import pretrained
    >>> from purifyloader.pretrained.kinds import identity_of
    >>> identity_of(pretrained.load("cifar10-energy", kind="energy"))["function"]["temperature"]
    0.0001
    """
    from purifyloader.files.weights import structure_sha256, weights_sha256

    kind = kind_of(model)
    if kind is None:
        function = {"class": type(model).__qualname__, "structure_sha256": structure_sha256(model)}
    else:
        function = kind.function(model)
    name = getattr(model, "name", None)
    return {"name": name, "weights_sha256": weights_sha256(model), "function": function}


def sized_identity(model: Any) -> dict[str, Any]:
    """Identify a model, and count its parameters, for results."""
    return {**identity_of(model), "parameters": sum(p.numel() for p in model.parameters())}
