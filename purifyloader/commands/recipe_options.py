"""Options of the recipes: read from the signatures of `purifyloader.recipes.RECIPES`, those of plugins too."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from purifyloader import recipes
from purifyloader.commands.options import DTYPES, given
from purifyloader.core.checks import as_path
from purifyloader.errors import ConfigError
from purifyloader.pretrained.kinds import KINDS
from purifyloader.recipes.models import from_file
from purifyloader.recipes.registry import Option, Recipe, describe

if TYPE_CHECKING:
    from purifyloader.purifiers import Purifier

_METAVARS = {int: "N", float: "X", str: "NAME"}


def _described() -> dict[str, Recipe]:
    return _describe(tuple(recipes.RECIPES.items()))


@functools.lru_cache(maxsize=1)
def _describe(makes: tuple[tuple[str, Callable[..., Purifier]], ...]) -> dict[str, Recipe]:
    return {name: describe(name, make) for name, make in makes}


def add_recipe_options(group: Any, required: bool = True) -> None:
    """Add --recipe, the options and models of all recipes, and --dtype to a parser or a group of one."""
    described = _described()
    names = ", ".join(described)
    group.add_argument("--recipe", required=required, metavar="NAME", help=f"{names}, or a file with a purifier's JSON")
    for argument in dict.fromkeys(argument for recipe in described.values() for argument in recipe.models):
        texts = [
            (name, f"name or folder of {KINDS[each.models[argument]].words}")
            for name, each in described.items()
            if argument in each.models
        ]
        _add(group, argument, _help(texts, len(described)), metavar="MODEL")
    for option, takers in _options(described):
        texts = [(name, each.options[option.name].help) for name, each in takers]
        flag: dict[str, Any] = {"action": "store_true"} if option.type is bool else {"type": option.type}
        if option.choices:
            flag["choices"] = option.choices
        elif option.type is not bool:
            flag["metavar"] = _METAVARS[option.type]
        _add(group, option.name, _help(texts, len(described)), **flag)
    group.add_argument("--dtype", choices=DTYPES, help="arithmetic of networks (default: float32)")


def _add(group: Any, name: str, text: str, **options: Any) -> None:
    try:
        group.add_argument(_flag(name), default=None, help=text.replace("%", "%%"), **options)
    except argparse.ArgumentError:
        raise ConfigError(
            f"A recipe that is installed has the option {_flag(name)}, which the command has already. Rename it there."
        ) from None


def _options(described: dict[str, Recipe]) -> list[tuple[Option, list[tuple[str, Recipe]]]]:
    """List each option once, with the recipes that take it; `fast` is --dtype."""
    options: dict[str, Option] = {}
    for recipe in described.values():
        options |= {name: option for name, option in recipe.options.items() if name not in (*options, "fast")}
    return [
        (option, [(key, each) for key, each in described.items() if name in each.options])
        for name, option in options.items()
    ]


def _help(texts: Sequence[tuple[str, str]], recipes_there: int) -> str:
    """Join the texts of an option, each once, with the recipes that it is of unless all have it."""
    by_text: dict[str, list[str]] = {}
    for name, text in texts:
        by_text.setdefault(text.rstrip("."), []).append(name)
    if len(by_text) == 1 and len(texts) == recipes_there:
        return next(iter(by_text))
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in by_text.items())


def purifier_of(options: argparse.Namespace) -> Purifier:
    """Make the purifier that --recipe and the options of `add_recipe_options` ask for."""
    described = _described()
    values = given(options, (option.name for option, _ in _options(described)))
    models = given(options, dict.fromkeys(name for recipe in described.values() for name in recipe.models))
    recipe = described.get(options.recipe)
    if recipe is None:
        return _from_file(options, values, models, described)
    takes = [name for name in (*recipe.models, *recipe.options) if name != "fast"]
    dtype = given(options, ["dtype"])
    if not recipe.models and (models or dtype):
        raise ConfigError(
            f"The recipe {recipe.name} has no network. Got {_flags([*models, *dtype])}: the options --energy, --model "
            "or --dtype are of those that have one. Leave it out."
        )
    if foreign := sorted({*values, *models} - set(takes)):
        known = _flags([*takes, *(["dtype"] if recipe.takes_fast else [])])
        raise ConfigError(f"The recipe {recipe.name} takes {known}. Got {_flags(foreign)}: leave it out.")
    for name in recipe.models:
        if name not in recipe.model_defaults and name not in models:
            raise ConfigError(
                f"The recipe {recipe.name} needs {_flag(name)}, a name of `purifyloader models` or a folder."
            )
    for option in recipe.options.values():
        if option.required and option.name not in values:
            raise ConfigError(f"The recipe {recipe.name} needs {_flag(option.name)}: {option.help} Got none.")
    if "t" in values and float(values["t"]).is_integer():
        values["t"] = int(values["t"])
    if recipe.takes_fast:
        values["fast"] = options.dtype == "bfloat16"
    return recipe.make(**models, **values)


def optional_purifier_of(options: argparse.Namespace) -> Purifier | None:
    """Make the purifier that the options ask for; None without --recipe, where none of its options is given."""
    if options.recipe is not None:
        return purifier_of(options)
    described = _described()
    names = dict.fromkeys(name for recipe in described.values() for name in (*recipe.models, *recipe.options))
    if extra := given(options, [name for name in (*names, "dtype") if name != "fast"]):
        raise ConfigError(
            f"Options of a purifier go with --recipe. Got {_flags(extra)} alone: give it, or leave them out."
        )
    return None


def _from_file(
    options: argparse.Namespace, values: dict[str, Any], models: dict[str, str], known: Iterable[str]
) -> Purifier:
    path = as_path(options.recipe)
    if not path.is_file():
        raise ConfigError(
            f"--recipe must be one of {', '.join(known)}, or a file with what Purifier.to_json gives. "
            f"Got {options.recipe!r}, which is neither."
        )
    if extra := [*values, *given(options, ["dtype"])]:
        raise ConfigError(f"A recipe from a file says all of itself. Got {_flags(extra)}: edit the file.")
    return from_file(path, list(models.values()))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flags(names: Iterable[str]) -> str:
    return ", ".join(_flag(name) for name in names)
