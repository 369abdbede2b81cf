"""Parse what poisons a dataset: `NAME:OPTION=VALUE,...` of an attack, or `FILE:OPTION=VALUE,...` of a poison file.

The one grammar of all commands. A value is JSON, such as 0.1, true, "a,b" or [1, 2], or else plain text.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from purifyloader.core.checks import as_path
from purifyloader.errors import ConfigError
from purifyloader.files.json import parse_json
from purifyloader.poisons.attacks import registry

__all__ = ["CLEAN", "AttackSpec", "is_spec", "parse", "parse_options"]

CLEAN = "none"
_COMMA = re.compile(r',(?=(?:[^"]*"[^"]*")*[^"]*$)(?![^\[]*\])')  # not in a text in quotes, and not in a list
_TAR = re.compile(r"\.(tar|tar\.\w+|tgz)$")


@dataclass(frozen=True)
class AttackSpec:
    """An attack by name with its options, or a poison file.

    Attributes:
        name: of `poisons.ATTACKS`, "none" for clean data, or of the file, without its suffix.
        options: of the attack, or of `poisons.read`.
        file: of a published poison; None for an attack.
        label: in tables; it has all options but those that hold a file or a model.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None
    label: str = ""


def parse(text: str, preset: str | None = None) -> AttackSpec:
    """Parse "none", an attack or a file, with options after a colon; `preset` is of an attack where none is named.

    >>> from purifyloader.poisons.spec import parse
    >>> parse("lsp:norm=2,patches=8").options
    {'norm': 2, 'patches': 8}
    """
    name = _head(text)
    rest = text[len(name) + 1 :]
    options = parse_options(_COMMA.split(rest), text) if rest else {}
    if name == CLEAN:
        if options:
            raise ConfigError(f"none takes no options. Got {text!r}.")
        return AttackSpec(CLEAN)
    if name in registry.ATTACKS:
        attack = registry.find(name)
        if unknown := [option for option in options if option not in attack.options]:
            registry.check_options(attack, {unknown[0]: None})  # which says what it takes
        shown = {key: value for key, value in options.items() if key not in (*registry.FILES, "model")}
        if preset is not None and "preset" in attack.options:
            options.setdefault("preset", preset)
        return AttackSpec(name, options, None, " ".join([name, *(f"{key}={value}" for key, value in shown.items())]))
    path = as_path(name)
    if not path.exists():
        raise ConfigError(f"An attack is none, {', '.join(registry.ATTACKS)}, or a poison file. Got {text!r}.")
    from purifyloader.poisons.reading import read

    takes = [option for option in inspect.signature(read).parameters if option not in ("path", "clean")]
    if unknown := [option for option in options if option not in takes]:
        raise ConfigError(f"A poison file takes {', '.join(takes)}. Got {unknown[0]!r} in {text!r}.")
    if path.stem == CLEAN:
        raise ConfigError(f"none is what clean data are called. Got the poison {text!r}: rename it.")
    return AttackSpec(path.stem, options, path, path.stem)


def is_spec(text: str) -> bool:
    """Tell whether a text names an attack or a poison file, and not a dataset of poisoned images.

    A folder is a poison where it says so itself: one that `write` made, of the poisoning benchmark, or of NTGA.
    """
    name = _head(text)
    path = as_path(name)
    if name == CLEAN or name in registry.ATTACKS:
        return True
    if path.is_dir():
        names = {item.name for item in path.iterdir()}
        return bool({"poison.json", "poisons.pickle"} & names) or any(item.startswith("x_train") for item in names)
    return path.suffix == ".npy" or (path.is_file() and not _TAR.search(name))


def _head(text: str) -> str:
    """Return the attack or file before the options: a path may have colons of its own."""
    if as_path(text).exists():
        return text
    name = text.partition(":")[0]
    if name == CLEAN or name in registry.ATTACKS:
        return name
    parts = text.split(":")
    heads = [":".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    return next((head for head in heads if as_path(head).exists()), name)


def parse_options(words: Sequence[str], text: str) -> dict[str, Any]:
    """Parse OPTION=VALUE words of a text, each option once."""
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"Options are OPTION=VALUE, with commas between them. Got {word!r} in {text!r}.")
        if name in options:
            raise ConfigError(f"Each option must be given once. Got {name!r} twice in {text!r}.")
        try:
            options[name] = parse_json(value)
        except ValueError:
            options[name] = value
    return options
