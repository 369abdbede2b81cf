"""Find the defences of a bench by name: the rows of the recipes, the parts of ECLIPSE, and purifiers in files.

NAME                    a row of a recipe (`purifyloader.recipes.registry.Row`), or a recipe with its defaults
NAME:OPTION=VALUE,...   the same with other options of the recipe
NAME@PX                 the same with noise of another standard deviation, in levels of 0 to 255
FILE.json               a purifier of one's own, as `Purifier.to_json` writes it
FILE.json+B, +C, +B+C   the same with ECLIPSE's random grey, noise or both after it, in every epoch
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from purifyloader import recipes
from purifyloader.core.checks import as_path
from purifyloader.errors import CheckpointError, ConfigError, InputError
from purifyloader.files.json import JsonError, read_text
from purifyloader.pretrained.kinds import KINDS
from purifyloader.recipes.models import as_model
from purifyloader.recipes.registry import Recipe, describe

if TYPE_CHECKING:  # a help text lists defences without importing torch
    from purifyloader.purifiers import Purifier
    from purifyloader.transforms import Compensate

__all__ = ["ATTACK_SEED", "DEFENCES", "DENOISERS", "ROWS_FILE", "SCALES", "TABLE_FILE", "Defence", "Made", "Models"]
__all__ += ["find", "table"]


@dataclass(frozen=True)
class Models:
    """Checkpoints that the defences use: names, folders, or ids of a hub.

    `denoiser` is for recipes that have no model of their own, such as ECLIPSE; `energy` and `ddpm` are PureGen's.
    """

    denoiser: str = field(default="cifar10-sparse", metadata={"kind": "denoiser"})
    energy: str = field(default="cifar10-energy", metadata={"kind": "energy"})
    ddpm: str = field(default="cifar10-puregen-ddpm", metadata={"kind": "denoiser"})

    def of_kind(self, kind: str) -> list[str]:
        return [getattr(self, one.name) for one in fields(self) if one.metadata["kind"] == kind]


class Made(NamedTuple):
    """A defence that is ready."""

    purifier: Purifier | None  # of the training images, beforehand
    compensate: Compensate | None  # drawn anew in every epoch, after the crop and flip
    sigma_px: float | None  # standard deviation of the noise that a network takes off, in levels, if there is just one
    per_epoch: Purifier | None = None  # of images in training, drawn anew in every epoch, after the crop and flip


@dataclass(frozen=True)
class Defence:
    """A recipe with its options, and what follows it in every epoch."""

    name: str
    description: str
    recipe: Recipe | None = None  # None where nothing is purified
    options: Mapping[str, Any] = field(default_factory=dict)
    grayscale: bool = False  # ECLIPSE's compensation, half by half
    noise: bool = False
    per_epoch: bool = False  # the purifier is drawn anew in every epoch, and nothing is purified beforehand
    slow: bool = False  # many network calls an image: left out where nobody asks for it

    @property
    def takes_sigma(self) -> bool:
        """True where `NAME@PX` means anything."""
        return self.recipe is not None and "sigma" in self.recipe.options and "t" not in self.options

    @property
    def uses(self) -> tuple[str, ...]:
        """The fields of `Models` that it takes."""
        return tuple(one for one in self._fields().values() if one is not None)

    def _fields(self) -> dict[str, str | None]:
        """Map arguments of the recipe to the field of `Models`; None for a model that only the recipe names."""
        known = {one.default: one.name for one in reversed(fields(Models))}
        first = {one.metadata["kind"]: one.name for one in reversed(fields(Models))}
        if self.recipe is None:
            return {}
        defaults = self.recipe.model_defaults
        return {
            argument: known.get(defaults[argument]) if argument in defaults else first[kind]
            for argument, kind in self.recipe.models.items()
        }

    def _given(self, models: Models) -> dict[str, str]:
        """Map arguments of the recipe to models."""
        defaults = {} if self.recipe is None else self.recipe.model_defaults
        named = self._fields().items()
        return {argument: defaults[argument] if one is None else getattr(models, one) for argument, one in named}

    def models(self, models: Models) -> list[str]:
        """List the checkpoints it uses, each once."""
        return list(dict.fromkeys(self._given(models).values()))

    def ready(self, models: Models, px: float | None, fast: bool) -> Made:
        """Make the purifier and the compensation.

        Args:
            px: standard deviation of the noise in levels of 0 to 255, in place of the defence's own.
            fast: bfloat16 (`fast=True` of the recipes).
        """
        from purifyloader.transforms import Compensate

        compensate, purifier, noise = None, None, None
        if self.grayscale or self.noise:
            compensate = Compensate(p=0.4 if self.grayscale else 0.0, sigma=0.05 if self.noise else 0.0)
        if self.recipe is not None:
            options = dict(self.options) | ({} if px is None else {"sigma": px / 255})
            if self.recipe.takes_fast:
                options["fast"] = fast
            purifier = self.recipe.make(**self._given(models), **options)
            noise = _noise_of(purifier.config())
        return Made(None, compensate, noise, purifier) if self.per_epoch else Made(purifier, compensate, noise)


def _eclipse_parts() -> Iterator[Defence]:
    """Yield ECLIPSE in its parts: A the purification, B random grey, C noise."""
    eclipse = describe("eclipse", recipes.RECIPES["eclipse"])
    # of one call: 12.75 px, with which the tables of the README were made; @25 is the safer choice
    once: dict[str, Any] = {"recipe": eclipse, "options": {"sigma": 0.05}}
    yield Defence("B", "ECLIPSE's random grey alone", grayscale=True)
    yield Defence("C", "ECLIPSE's noise alone", noise=True)
    yield Defence("B+C", "ECLIPSE's compensation alone", grayscale=True, noise=True)
    yield Defence("A", "ECLIPSE's purification alone, one call", **once)
    yield Defence("A+B", "purification and random grey", **once, grayscale=True)
    yield Defence("A+C", "purification and noise", **once, noise=True)
    yield Defence("eclipse", "ECLIPSE with one network call", **once, grayscale=True, noise=True)
    published = "ECLIPSE as published: 100 calls from t = 100"
    yield Defence("eclipse-100", published, eclipse, {"t": 100}, grayscale=True, noise=True, slow=True)


def _rows(recipe: Recipe) -> Iterator[Defence]:
    for row in recipe.rows:
        yield Defence(row.name, row.description, recipe, row.options, per_epoch=row.per_epoch, slow=row.slow)


def _ordered(described: list[Recipe]) -> Iterator[Defence]:
    """Order defences as in reports: those without a model, the parts of ECLIPSE, those with one."""
    yield Defence("none", "nothing")
    for recipe in described:
        if not recipe.models:
            yield from _rows(recipe)
    yield from _eclipse_parts()
    for recipe in described:
        if recipe.models:
            yield from _rows(recipe)


DEFENCES: dict[str, Defence] = {
    defence.name: defence for defence in _ordered([describe(name, make) for name, make in recipes.RECIPES.own.items()])
}
"""The defences of the library; `slow` ones take many network calls an image and are left out where nobody asks."""


def table() -> dict[str, Defence]:
    """Map names to all defences, those of plugins too."""
    plugins = [describe(name, make) for name, make in recipes.RECIPES.items() if name not in recipes.RECIPES.own]
    return {defence.name: defence for recipe in plugins for defence in _rows(recipe)} | DEFENCES


_SPEC = re.compile(r"(?P<name>[^@:]+)(:(?P<options>[^@]+))?(@(?P<px>\d+(\.\d+)?))?")
_FILE = re.compile(r"(?P<file>.+\.json)(?P<grey>\+B)?(?P<noise>\+C)?")


def find(spec: str) -> tuple[Defence, float | None]:
    """Find a defence by NAME, NAME:OPTION=VALUE,..., NAME@PX or FILE.json, and the PX: see the module.

    Raises:
        InputError: none of that name, an option that it does not have, one whose noise is not one number, or no file.
        ConfigError: a value that is none of the option's type.
    """
    if match := _FILE.fullmatch(spec):
        return _of_file(as_path(match["file"]), bool(match["grey"]), bool(match["noise"])), None
    match, known = _SPEC.fullmatch(spec), table()
    name = match["name"] if match else spec
    if match is None or (name not in known and name not in recipes.RECIPES):
        names = ", ".join([*known, *(name for name in recipes.RECIPES if name not in known)])
        raise InputError(
            f"A defence is one of {names}, with NAME:OPTION=VALUE,... or NAME@PX, or FILE.json. Got {spec!r}."
        )
    recipe = None if name in known else describe(name, recipes.RECIPES[name])
    defence = known[name] if recipe is None else Defence(name, recipe.summary, recipe)
    if match["options"] is not None:
        defence = _with_options(defence, match["options"])
    px = None if match["px"] is None else float(match["px"])
    if px is not None and not (defence.takes_sigma and px > 0):
        able = [one.name for one in known.values() if one.takes_sigma]
        raise InputError(f"Only {', '.join(able)} and the like take a noise level above 0. Got {spec!r}.")
    wanted = [] if defence.recipe is None else [one.name for one in defence.recipe.options.values() if one.required]
    if missing := [one for one in wanted if one not in defence.options and not (one == "sigma" and px)]:
        how = f"{name}@PX" if missing == ["sigma"] else f"{name}:{missing[0]}=VALUE"
        raise InputError(f"The defence {name} needs {', '.join(missing)}. Got {spec!r}. Write {how}.")
    return defence, px


def _with_options(defence: Defence, text: str) -> Defence:
    """Put the options `a=1,b=2` over those of the defence's row."""
    options = {} if defence.recipe is None else {k: v for k, v in defence.recipe.options.items() if k != "fast"}
    parsed: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        key = name.strip().replace("-", "_")
        if not equals or key not in options:
            known = ", ".join(options) or "none"
            raise InputError(f"The options of the defence {defence.name} are: {known}. Got {part!r}.")
        parsed[key] = options[key].parse(value.strip())
    # t and sigma are two names of one level: the one given replaces the row's own
    level = {"t", "sigma"}
    own = {k: v for k, v in defence.options.items() if not (k in level and level & set(parsed))}
    return replace(defence, name=f"{defence.name}:{text}", options={**own, **parsed})


def _of_file(path: Path, grey: bool, noise: bool) -> Defence:
    name = path.stem + "+B" * grey + "+C" * noise
    if name in table() or name in recipes.RECIPES or not re.fullmatch(r"[\w.-]+", path.stem):
        raise InputError(
            "A purifier's file must be named with letters, digits, ., - and _, and not as a defence is. Got "
            f"{path.name}: rename it."
        )
    try:
        text = read_text(path)
    except (OSError, JsonError) as error:
        raise InputError(f"A purifier's file holds its JSON. Got {path}: {error}.") from None
    return _Own(name, "a purifier of one's own", grayscale=grey, noise=noise, text=text)


@dataclass(frozen=True)
class _Own(Defence):
    """A purifier of one's own, by its JSON; its models are those of that name, or else one of `Models`."""

    text: str = ""

    def models(self, models: Models) -> list[str]:
        from purifyloader.files.weights import weights_sha256

        config = self._purifier(models).config()
        names: list[str] = []
        for kind in KINDS:
            of_weights = {weights_sha256(as_model(name, kind)): name for name in models.of_kind(kind)}
            entries: list[dict[str, str]] = [value for value in _values(config, kind) if isinstance(value, dict)]
            names += [of_weights.get(entry["weights_sha256"], entry["name"]) for entry in entries]
        return list(dict.fromkeys(names))

    def ready(self, models: Models, px: float | None, fast: bool) -> Made:
        purifier, compensate = self._purifier(models), super().ready(models, px, fast).compensate
        config = purifier.config()
        if not fast and (dtypes := {*_values(config, "dtype")} - {"float32"}):
            raise InputError(
                f"A bench in float32 takes purifiers in float32. Got {', '.join(sorted(dtypes))} in {self.name}: write "
                "the file anew, or measure in bfloat16."
            )
        return Made(purifier, compensate, _noise_of(config))

    def _purifier(self, models: Models) -> Purifier:
        try:
            return recipes.from_json(self.text)
        except CheckpointError:  # of a name that is not here
            return recipes.from_json(self.text, [getattr(models, one.name) for one in fields(models)])
        except ConfigError as error:
            raise ConfigError(f"{self.name}.json: {error}") from None


def _noise_of(config: Any) -> float | None:
    """Find the one level of noise in a purifier's configuration, in levels of 0 to 255."""
    levels = {*_values(config, "sigma_px")}
    return levels.pop() if len(levels) == 1 else None


def _values(config: Any, key: str) -> Iterator[Any]:
    """Yield the values of a key, anywhere in a configuration."""
    if isinstance(config, dict):
        for name, value in config.items():
            if name == key:
                yield value
            yield from _values(value, key)
    elif isinstance(config, list):
        for value in config:
            yield from _values(value, key)


ROWS_FILE, TABLE_FILE = "rows.jsonl", "README.md"
ATTACK_SEED = 1000
DENOISERS = {"tiny-imagenet": "tiny-imagenet-sparse"}  # of a data set's own kind
_SAFER = "eclipse@25"  # the noise to take where the poison is not known


@dataclass(frozen=True)
class Scale:
    """Settings that a bench takes where nothing else is asked for; `preset` is that of attacks with a surrogate."""

    data: str
    victim: str
    training: str
    preset: str
    defences: tuple[str, ...]


SCALES = {
    "cpu": Scale("sample", "resnet9", "short", "cpu", (*(d.name for d in DEFENCES.values() if not d.slow), _SAFER)),
    "full": Scale("cifar10", "resnet18", "paper", "full", (*DEFENCES, _SAFER)),
}
