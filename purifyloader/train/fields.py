"""Fields that the configuration of every training has: their checks, and their form as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, get_args

import torch
from torch import Tensor, nn

from purifyloader.core.checks import check_choice, check_flag, check_integer, check_number, check_seed
from purifyloader.core.devices import memory_of
from purifyloader.errors import ConfigError, PurifyError
from purifyloader.files.atomic import canonical_json
from purifyloader.files.weights import weights_sha256

__all__ = ["ANCESTORS", "STEPS", "TrainingFields", "check_channels", "check_memory", "check_model"]
__all__ += ["check_model_entry", "distilled_from", "started_from"]


STEPS, _BATCH = 10**9, 2**20
"""Steps of a training, at most."""


class TrainingFields:
    """Base of the frozen dataclasses that decide, with the images, the weights of a training.

    Steps are at most 1e9, and a batch has at most 1,048,576 images.

    A subclass has at least the fields annotated here; a stopped run may go on with other values of its `length_fields`.
    """

    network_type: ClassVar[Any]
    network_class: ClassVar[Callable[[Any], nn.Module]]  # makes the network of a `network_type`
    length_fields: ClassVar[tuple[str, ...]] = ("steps",)
    later_fields: ClassVar[tuple[str, ...]] = ()  # left out of JSON at None, as configurations of before have none

    network: Any
    start_from: Mapping[str, str | None] | None
    steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    ema_decay: float
    dtype: str
    compile: bool
    seed: int

    def check_shared_fields(self) -> None:
        """Raise `ConfigError` for a bad value in one of the fields that every training has."""
        if not isinstance(self.network, self.network_type):
            kind = " | ".join(cls.__name__ for cls in get_args(self.network_type) or (self.network_type,))
            raise ConfigError(f"network must be of type {kind}, or an object of its fields. Got {self.network!r}.")
        check_model_entry("start_from", self.start_from)
        check_seed(self.seed)
        for name, low, high in (("steps", 1, STEPS), ("batch_size", 1, _BATCH), ("warmup", 0, STEPS)):
            check_integer(name, getattr(self, name), low, high)
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("ema_decay", self.ema_decay, low=0, below=1)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_flag("compile", self.compile)

    def length(self) -> dict[str, Any]:
        """Return the values that say how long the training is, as JSON has them."""
        values = self.to_dict()
        return {name: values[name] for name in self.length_fields}

    def identity(self) -> dict[str, Any]:
        """Return the values that must be the same for a stopped run to go on, as JSON has them."""
        return {k: v for k, v in self.to_dict().items() if k not in (*self.length_fields, "compile")}

    def more_state_bytes(self, images: Tensor) -> int:
        """Return the size of a state file beside the weights."""
        return 0

    @property
    def copies(self) -> int:
        """How many times memory holds the weights: network, average, gradients and two moments."""
        return 5

    def more_memory(self, images: Tensor, batch_size: int) -> int:
        """Return the bytes that a process, which takes so many images of a batch, needs at least, beside weights."""
        return self.more_state_bytes(images) + 2 * 4 * batch_size * images[0].numel()

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain data, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        values = {k: v for k, v in values.items() if v is not None or k not in self.later_fields}
        values["network"] = self.network_fields()
        plain = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    def network_fields(self) -> dict[str, Any]:
        """Return the network's configuration as plain data, which `read_network` reads."""
        fields: dict[str, Any] = self.network.to_dict()
        return fields

    @classmethod
    def read_network(cls, values: Mapping[str, Any], base: Mapping[str, Any]) -> Any:
        """Read the network's configuration from fields over those of `base`."""
        return cls.network_type.from_dict({**base, **values})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: Self | None = None) -> Self:
        """Build a configuration from the result of `to_dict`, or from some of its fields over `base`."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"A configuration is an object of fields. Got {values!r:.80}.")
        known = sorted(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
        if unknown := sorted(map(str, set(values) - set(known))):
            raise ConfigError(f"Known fields of {cls.__name__}: {', '.join(known)}. Got {', '.join(unknown)}.")
        start = (base or cls()).to_dict()
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in {**start, **values}.items()}
        network = arguments["network"]
        try:
            if isinstance(network, Mapping):
                arguments["network"] = cls.read_network(network, start["network"])
            return cls(**arguments)
        except PurifyError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"A field has a value of another kind ({error}). Got {dict(values)!r:.500}.") from None


Config = TypeVar("Config", bound=TrainingFields)


class _Ancestor(NamedTuple):
    verb: str
    none: str
    filled_by: str


ANCESTORS = {
    "start_from": _Ancestor("starts from", "random weights", "started_from"),
    "distil_from": _Ancestor("is distilled from", "no model", "distilled_from"),
}
"""The fields that name a model which a training takes something from, and their words."""


def check_model_entry(name: str, value: Any) -> None:
    """Raise `ConfigError` unless the field `name` is None or names a model and the hash of its weights."""
    if value is not None and (
        not isinstance(value, Mapping)
        or set(value) != {"name", "weights_sha256"}
        or not isinstance(value["name"], str | None)
        or not isinstance(value["weights_sha256"], str)
    ):
        raise ConfigError(
            f'{name} must be None or {{"name": ..., "weights_sha256": ...}}. Got {value!r}. '
            f"{ANCESTORS[name].filled_by}(config, model) fills it in."
        )


def started_from(config: Config, start: nn.Module) -> Config:
    """Return `config` with `start_from` set to the name of the model `start` and the hash of its weights.

    >>> import torch
    >>> from purifyloader.train import recipe, started_from
    >>> started_from(recipe("light"), torch.nn.Linear(2, 1)).start_from["name"] is None
    True
    """
    return dataclasses.replace(config, start_from=_entry(start))  # type: ignore[type-var]


def distilled_from(config: Config, teacher: nn.Module) -> Config:
    """Return `config` with `distil_from` set to the name of the denoiser `teacher` and the hash of its weights.

    >>> import torch
    >>> from purifyloader.train import distilled_from, recipe
    >>> distilled_from(recipe("fast"), torch.nn.Linear(2, 1)).distil_from["name"] is None
    True
    """
    return dataclasses.replace(config, distil_from=_entry(teacher))  # type: ignore[type-var]


def check_model(config: TrainingFields, name: str, model: nn.Module | None) -> None:
    """Raise `ConfigError` unless `model` is the one that the field `name` names, "start_from" or "distil_from".

    Its weights say which it is. Of a start, the function is that of the new configuration; where these weights would
    mean something else in it, whoever builds the model refuses it.
    """
    wanted, got, words = getattr(config, name), None if model is None else _entry(model), ANCESTORS[name]
    if (wanted and wanted["weights_sha256"]) != (got and got["weights_sha256"]):
        raise ConfigError(
            f"The configuration {words.verb} {dict(wanted) if wanted else words.none}. Got {got or 'no model'}: give "
            f"the model that the configuration names, or set it by {words.filled_by}(config, model)."
        )


def check_channels(config: TrainingFields, image_channels: int) -> None:
    """Raise `ConfigError` unless the network takes images with this number of channels."""
    if config.network.image_channels != image_channels:
        raise ConfigError(
            f"The network takes {config.network.image_channels} channels but the images have {image_channels}. "
            "Set image_channels in its configuration."
        )


def check_memory(config: TrainingFields, images: Tensor, device: torch.device, world_size: int = 1) -> None:
    """Raise `ConfigError`, before anything is allocated, for a training that the device has no memory for.

    Of several processes each takes its share of a batch. Activations are not counted: what passes may still run out.
    """
    kind: Any = type(config)
    parameters = _parameters(kind, canonical_json(config.network_fields()))
    more = config.more_memory(images, config.batch_size // world_size)
    weights, there = 4 * config.copies * parameters, memory_of(device)
    if weights + more > there:
        raise ConfigError(
            f"The training must fit into the memory of {device}, {there / 1e9:,.1f} GB. Got a network of "
            f"{parameters:,} parameters, {4 * parameters / 1e9:,.1f} GB, of which {config.copies} copies are kept "
            f"({weights / 1e9:,.1f} GB), and {more / 1e9:,.1f} GB of images and samples at least. Give a smaller "
            "network (channels, multipliers or widths, blocks), batch_size, bank_size or replicate."
        )


@functools.lru_cache(maxsize=64)
def _parameters(kind: Any, network: str) -> int:
    """Count the parameters of a network, whose configuration is JSON, without memory for them."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        made = kind.network_class(kind.read_network(json.loads(network), {}))
    return sum(math.prod(p.shape) for p in made.parameters())


def _entry(model: nn.Module) -> dict[str, Any]:
    return {"name": getattr(model, "name", None), "weights_sha256": weights_sha256(model)}
