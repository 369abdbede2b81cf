"""Build purifiers and conditions back from JSON, through closed tables of kinds and the entry points of plugins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from purifyloader.errors import ConfigError
from purifyloader.purifiers.base import SCHEMA, Condition, Purifier, Resolver

__all__ = ["CONDITIONS", "KINDS", "condition_from_config", "from_config", "from_json"]

Named = TypeVar("Named", Purifier, Condition)

KINDS: dict[str, type[Purifier]] = {}
"""The purifiers of the library by kind, filled in `purifyloader.purifiers`."""

CONDITIONS: dict[str, type[Condition]] = {}
"""The conditions of the library by kind, filled there too."""


def _build(config: Any, resolve: Resolver, table: Mapping[str, type[Named]], what: str) -> Named:
    """Build the purifier or condition of a configuration, of a kind in the table or of a plugin's, by no import path."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"A {what}'s configuration is an object with a kind. Got {type(config).__name__}.")
    values = dict(config)
    kind = values.pop("kind", None)
    cls = table.get(kind) if isinstance(kind, str) else None
    if cls is None:
        plugins: dict[str, EntryPoint] = {entry.name: entry for entry in entry_points(group=f"purifyloader.{what}s")}
        if not isinstance(kind, str) or kind not in plugins:
            raise ConfigError(f"A {what}'s kind must be one of {sorted({*table, *plugins})}. Got {kind!r}.")
        cls = plugins[kind].load()
    try:
        return cls.build(values, resolve)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"The configuration of {kind!r} does not fit it: {error}. Got {sorted(values)}.") from None


def from_config(config: Mapping[str, Any], resolve: Resolver) -> Purifier:
    """Build the purifier that `Purifier.config` described; `ConfigError` for no such kind, or values that do not fit.

    Args:
        config: plain data with a `kind`.
        resolve: finds the model meant by an entry `{"name", "weights_sha256"}` and its kind
            (`purifyloader.recipes.from_json` loads it by name and checks the hash).

    >>> from purifyloader import purifiers
    >>> purifiers.from_config({"kind": "jpeg", "quality": 30}, resolve=lambda entry, kind: None).config()
    {'kind': 'jpeg', 'quality': 30}
    """
    return _build(config, resolve, KINDS, "purifier")


def condition_from_config(config: Any, resolve: Resolver) -> Condition:
    """Build the condition that `Condition.config` described."""
    return _build(config, resolve, CONDITIONS, "condition")


def from_json(text: str, resolve: Resolver) -> Purifier:
    """Build the purifier that `Purifier.to_json` described; `ConfigError` for other text, or a newer schema.

    `resolve` is that of `from_config`; `purifyloader.recipes.from_json` finds models by name.

    >>> from purifyloader import purifiers
    >>> purifiers.from_json(purifiers.Jpeg(30).to_json(), resolve=lambda entry, kind: None).config()
    {'kind': 'jpeg', 'quality': 30}
    """
    try:
        values = json.loads(text)
    except TypeError:
        raise ConfigError(f"A purifier is read from JSON text. Got {type(text).__name__}.") from None
    except ValueError as error:
        raise ConfigError(f"A purifier is read from JSON. Got text that is not JSON ({error}).") from None
    if not isinstance(values, dict) or not {"schema", "purifier"} <= set(values):
        raise ConfigError(f"A purifier's JSON is an object with schema and purifier. Got {text[:80]!r}.")
    if values["schema"] != SCHEMA:
        raise ConfigError(
            f"This version of purifyloader reads purifier schema {SCHEMA}. Got {values['schema']!r}: "
            "use the version that wrote it, or a newer one."
        )
    return from_config(values["purifier"], resolve)
