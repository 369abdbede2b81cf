"""Read all that others need of a recipe from the recipe itself: its options, its models, its rows in the bench.

A recipe is a function whose keyword arguments are the options of the command line, and which imports torch in its
body alone: a help text or a list of names is then written without it. `Args:` of its docstring is the help. A
recipe of another distribution is found by the entry point `purifyloader.recipes`; `purifyloader/purifiers/README.md`
shows one.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar, cast

from purifyloader.core.checks import plain_number
from purifyloader.errors import ConfigError
from purifyloader.recipes.sizes import Sizes

if TYPE_CHECKING:
    from purifyloader.purifiers import Purifier

__all__ = ["GROUP", "Option", "Recipe", "Recipes", "Row", "describe", "recipe"]

GROUP = "purifyloader.recipes"
"""The entry points of recipes: their names have dashes, as on the command line."""

Make = TypeVar("Make", bound="Callable[..., Purifier]")


@dataclass(frozen=True)
class Row:
    """A row that a recipe has in the bench by default.

    Attributes:
        options: of the recipe, in place of its defaults.
        per_epoch: applied to the images in training, drawn anew in every epoch, instead of purifying beforehand.
        slow: left out of the bench's short lists, for it takes many network calls an image.
    """

    name: str
    description: str
    options: Mapping[str, Any] = field(default_factory=dict)
    per_epoch: bool = False
    slow: bool = False


@dataclass(frozen=True)
class Option:
    """A setting of a recipe that a command line can give: a keyword argument, with underscores.

    Attributes:
        type: int, float, bool or str.
        default: the recipe's own; `inspect.Parameter.empty` where it must be given.
        choices: the values that are allowed, of a `Literal`; empty for any.
    """

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def parse(self, text: str) -> Any:
        """Parse the value of an option that is written `name=TEXT`; refuse what is not of its type."""
        if self.choices and text not in self.choices:
            raise ConfigError(f"must be one of {', '.join(self.choices)}. Got {text!r}.", argument=self.name)
        if self.type is bool:
            if text not in ("true", "false"):
                raise ConfigError(f"must be true or false. Got {text!r}.", argument=self.name)
            return text == "true"
        try:
            # as in Python: t=50 is written to JSON as 50, not as 50.0
            return int(text) if self.type is float and text.isdecimal() else self.type(text)
        except ValueError:
            word = {int: "an integer", float: "a number"}[self.type]
            raise ConfigError(f"must be {word}. Got {text!r}.", argument=self.name) from None


@dataclass(frozen=True)
class Recipe:
    """A recipe and what is read from its signature and docstring.

    Attributes:
        name: with dashes.
        options: by the name of the keyword argument, in the order of the signature.
        models: the kind of model ("denoiser", "energy") by the name of the keyword argument.
        model_defaults: the name of the model that is taken where none is given; no entry where one must be.
    """

    name: str
    make: Callable[..., Purifier]
    summary: str
    options: Mapping[str, Option]
    models: Mapping[str, str]
    model_defaults: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def takes_fast(self) -> bool:
        return "fast" in self.options


def recipe(*rows: Row, options: type[Sizes] = Sizes) -> Callable[[Make], Make]:
    """Mark a function as a recipe: its `**options` become keyword arguments in its signature and in its help.

    Args:
        rows: in the bench. A recipe without any is there only when it is asked for by name.
        options: dataclass of the keyword arguments that `**options` is for; `Args:` of its docstring is their help.
    """

    def mark(make: Make) -> Make:
        @functools.wraps(make)
        def marked(*args: Any, **kwargs: Any) -> Any:
            # sweeps have numbers of numpy's
            plain = {name: plain_number(value) for name, value in kwargs.items()}
            return make(*map(plain_number, args), **plain)

        signature = inspect.signature(make)
        parameters = list(signature.parameters.values())
        if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
            shared = parameters.pop().name
            own_first = [name for each in options.__mro__ for name in inspect.get_annotations(each)]
            known = {each.name: each for each in fields(options)}
            texts: dict[str, str] = {}
            for each in reversed(options.__mro__):
                texts |= _arguments(each.__doc__)
            parameters += [
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=known[name].default, annotation=known[name].type
                )
                for name in own_first
            ]
            lines = "".join(rf"\1{name}: {texts[name]}\n" for name in own_first)
            marked.__doc__ = re.sub(rf"( *){shared}: .*\n", lines + _RAISES, make.__doc__ or "")
        recipe_function: Any = marked
        recipe_function.__signature__ = signature.replace(parameters=parameters)
        recipe_function.rows = rows
        return cast("Make", marked)

    return mark


_RAISES = """
    Raises:
        ConfigError: an option of another type or range, or options that contradict each other.
        InputError, CheckpointError: a value or a model that the purifier does not take, or that cannot be loaded.
"""


def _arguments(doc: str | None) -> dict[str, str]:
    """Read the texts of `Args:` by the name of the argument; `a, b: TEXT` is the text of both."""
    section = re.search(r"\n *Args:\n((?: +.*\n|\n)+?)(?=\S|\n *\w+:\n|\Z)", inspect.cleandoc(doc or "") + "\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in section[1].splitlines() if section is not None else ():
        if head := re.match(r"    ([\w, ]+): (.*)", line):
            names = head[1].split(", ")
            texts |= dict.fromkeys(names, head[2])
        else:
            texts |= {name: f"{texts[name]} {line.strip()}".strip() for name in names}
    return texts


def describe(name: str, make: Callable[..., Purifier]) -> Recipe:
    """Read a recipe's options, models and rows from its signature and docstring.

    An annotation that only a type checker knows, such as that of a `Schedule`, is not an option of a command line.
    """
    doc = inspect.cleandoc(make.__doc__ or "")
    texts = _arguments(doc)
    options, models, defaults = {}, {}, {}
    for parameter in inspect.signature(make).parameters.values():
        annotation = _evaluated(make, parameter.annotation)
        kind, of_model = _kind(annotation)
        if of_model is not None:
            models[parameter.name] = of_model
            if parameter.default is not parameter.empty:
                defaults[parameter.name] = parameter.default
        elif kind is not None:
            text = texts.get(parameter.name, "")
            values = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()
            options[parameter.name] = Option(parameter.name, kind, parameter.default, text, values)
    rows = getattr(make, "rows", ())
    return Recipe(name, make, doc.partition("\n")[0], options, models, defaults, rows)


def _evaluated(make: Callable[..., Purifier], annotation: Any) -> Any:
    """Return the object that an annotation means; None for one that only a type checker knows."""
    try:
        return eval(annotation, inspect.unwrap(make).__globals__) if isinstance(annotation, str) else annotation
    except (NameError, TypeError):
        return None


def _kind(annotation: Any) -> tuple[type | None, str | None]:
    """Return the type of an option, or the kind of a model, that an annotation means; None for neither."""
    if typing.get_origin(annotation) is typing.Literal:
        return str, None
    if isinstance(kind := next(iter(getattr(annotation, "__metadata__", ())), None), str):
        return None, kind
    several = [part for part in typing.get_args(annotation) or (annotation,) if part is not type(None)]
    return (several[0], None) if len(several) == 1 and several[0] in (int, float, bool, str) else (None, None)


def _changed_at(path: str) -> int | None:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return None


class Recipes(Mapping[str, "Callable[..., Purifier]"]):
    """The recipes by name: the library's own, and those that other distributions bring under other names."""

    def __init__(self, own: Mapping[str, Callable[..., Purifier]]) -> None:
        self.own = dict(own)
        self._searched: list[tuple[str, int | None]] | None = None  # folders, and when each was changed
        self._found_plugins: dict[str, EntryPoint] = {}

    def _plugins(self) -> dict[str, EntryPoint]:
        """Return the entry points by name, read anew where packages may have come or gone: reading takes 10 ms."""
        searched = [(path, _changed_at(path)) for path in sys.path]
        if searched != self._searched:
            # where several packages have a name the first in sys.path counts
            self._found_plugins = {plugin.name: plugin for plugin in reversed([*entry_points(group=GROUP)])}
            self._searched = searched
        return self._found_plugins

    def __getitem__(self, name: str) -> Callable[..., Purifier]:
        if name in self.own:
            return self.own[name]
        make: Callable[..., Purifier] = self._plugins()[name].load()
        return make

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.own, *sorted(self._plugins())]))

    def __len__(self) -> int:
        return sum(1 for _ in self)
