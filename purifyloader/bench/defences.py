"""The defences of a bench, by name: what purifies, and what compensates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from purifyloader import recipes
from purifyloader.errors import CheckpointError, InputError
from purifyloader.files.weights import weights_sha256
from purifyloader.purifiers import Purifier
from purifyloader.recipes.models import as_denoiser, as_energy
from purifyloader.transforms import Compensate

__all__ = ["DEFENCES", "Defence", "Made", "Models", "find"]


@dataclass(frozen=True)
class Models:
    """Which checkpoints the defences use: names, folders, or ids of a hub.

    Attributes:
        denoiser: of ECLIPSE.
        energy, ddpm: of PureGen.
    """

    denoiser: str = "cifar10-sparse"
    energy: str = "cifar10-energy"
    ddpm: str = "cifar10-puregen-ddpm"


class Made(NamedTuple):
    """A defence that is ready.

    Attributes:
        sigma_px: standard deviation of the noise that a network takes off, in levels of 0 to 255; None where there is
            none, or not one.
        afresh: what is done to the images in training, drawn anew in every epoch, after the crop and flip.
    """

    purifier: Purifier | None
    compensate: Compensate | None
    sigma_px: float | None
    afresh: Purifier | None = None


@dataclass(frozen=True)
class Defence:
    """One row of the table below.

    Attributes:
        uses: the fields of `Models` that it takes.
        takes_sigma: whether `NAME@PX` means anything for it.
        afresh: whether what it makes is for every epoch anew, and nothing is purified beforehand.
    """

    name: str
    description: str
    make: Callable[[Models, float | None, bool], Purifier] | None
    grayscale: bool = False
    noise: bool = False
    uses: tuple[str, ...] = ()
    takes_sigma: bool = False
    sigma: float | None = None
    slow: bool = False
    afresh: bool = False

    def models(self, models: Models) -> list[str]:
        """The checkpoints it uses, each once."""
        return list(dict.fromkeys(getattr(models, field) for field in self.uses))

    def ready(self, models: Models, px: float | None, fast: bool) -> Made:
        """
        Args:
            px: standard deviation of the noise in levels of 0 to 255, in place of the defence's own.
            fast: bfloat16 (`fast=True` of the recipes).
        """
        sigma = self.sigma if px is None else px / 255
        purifier = None if self.make is None else self.make(models, sigma, fast)
        compensate = None
        if self.grayscale or self.noise:
            compensate = Compensate(p=0.4 if self.grayscale else 0.0, sigma=0.05 if self.noise else 0.0)
        noise = None if purifier is None else _noise_of(purifier.config())
        return Made(None, compensate, noise, purifier) if self.afresh else Made(purifier, compensate, noise)


def _once(models: Models, sigma: float | None, fast: bool) -> Purifier:
    return recipes.eclipse(models.denoiser, sigma=sigma, fast=fast)


def _published(models: Models, sigma: float | None, fast: bool) -> Purifier:
    return recipes.eclipse(models.denoiser, fast=fast)


_ONE_CALL = 0.05  # of one call: 12.75 px, with which the tables of the README were made; @25 is the safer choice

_ALL = (
    Defence("none", "nothing", None),
    Defence("jpeg-10", "JPEG at quality 10 (ISS-J)", lambda m, s, f: recipes.jpeg(10)),
    Defence("jpeg-75", "JPEG at quality 75", lambda m, s, f: recipes.jpeg(75)),
    Defence("grayscale", "grey for every image (ISS-G)", lambda m, s, f: recipes.grayscale()),
    Defence("bit-depth", "2 bits a channel", lambda m, s, f: recipes.bit_depth()),
    Defence("coin", "COIN: pixels moved at random by interpolation", lambda m, s, f: recipes.coin()),
    Defence("coin-afresh", "the same anew in every epoch, as published", lambda m, s, f: recipes.coin(), afresh=True),
    Defence("B", "ECLIPSE's random grey alone", None, grayscale=True),
    Defence("C", "ECLIPSE's noise alone", None, noise=True),
    Defence("B+C", "ECLIPSE's compensation alone", None, True, True),
    Defence("A", "ECLIPSE's purification alone, one call", _once, False, False, ("denoiser",), True, _ONE_CALL),
    Defence("A+B", "purification and random grey", _once, True, False, ("denoiser",), True, _ONE_CALL),
    Defence("A+C", "purification and noise", _once, False, True, ("denoiser",), True, _ONE_CALL),
    Defence("eclipse", "ECLIPSE with one network call", _once, True, True, ("denoiser",), True, _ONE_CALL),
    Defence(
        "eclipse-100",
        "ECLIPSE as published: 100 calls from t = 100",
        _published,
        True,
        True,
        ("denoiser",),
        slow=True,
    ),
    Defence(
        "puregen-ebm",
        "PureGen, 150 Langevin steps",
        lambda m, s, f: recipes.puregen_ebm(150, energy=m.energy, fast=f),
        uses=("energy",),
        slow=True,
    ),
    Defence(
        "puregen-ddpm",
        "PureGen, 75 diffusion steps",
        lambda m, s, f: recipes.puregen_ddpm(75, model=m.ddpm, fast=f),
        uses=("ddpm",),
        slow=True,
    ),
    Defence(
        "puregen-naive",
        "PureGen, 150 Langevin and then 75 diffusion steps",
        lambda m, s, f: recipes.puregen_naive(150, 75, energy=m.energy, model=m.ddpm, fast=f),
        uses=("energy", "ddpm"),
        slow=True,
    ),
    Defence(
        "puregen-reps",
        "PureGen, both by turns, five times",
        lambda m, s, f: recipes.puregen_reps(10, 50, 5, energy=m.energy, model=m.ddpm, fast=f),
        uses=("energy", "ddpm"),
        slow=True,
    ),
    Defence(
        "puregen-filt",
        "PureGen, diffusion of the half with the highest energies",
        lambda m, s, f: recipes.puregen_filt(0.5, energy=m.energy, model=m.ddpm, fast=f),
        uses=("energy", "ddpm"),
        slow=True,
    ),
)

DEFENCES: dict[str, Defence] = {its.name: its for its in _ALL}
"""All of them; `slow` ones take many network calls an image and are left out where nobody asks for them."""

_SPEC = re.compile(r"^(?P<name>[^@]+)(@(?P<px>\d+(\.\d+)?))?$")
_FILE = re.compile(r"^(?P<file>.+\.json)(?P<grey>\+B)?(?P<noise>\+C)?$")


def find(spec: str) -> tuple[Defence, float | None]:
    """A defence by NAME, or by NAME@PX with another standard deviation of its noise, in levels of 0 to 255.

    FILE.json is a purifier of one's own, as `Purifier.to_json` writes it; FILE.json+B, +C or +B+C has ECLIPSE's random
    grey, noise or both after it, in every epoch.

    Raises:
        InputError: none of that name, one whose noise is not one number, or no file.
    """
    if its := _FILE.match(spec):
        return _of_file(Path(its["file"]), bool(its["grey"]), bool(its["noise"])), None
    match = _SPEC.match(spec)
    name = match["name"] if match else spec
    if match is None or name not in DEFENCES:
        raise InputError(f"A defence is one of {', '.join(DEFENCES)}, NAME@PX, or FILE.json. Got {spec!r}.")
    defence, px = DEFENCES[name], None if match["px"] is None else float(match["px"])
    if px is not None and not (defence.takes_sigma and px > 0):
        able = [its.name for its in DEFENCES.values() if its.takes_sigma]
        raise InputError(f"Only {', '.join(able)} take a noise level above 0. Got {spec!r}.")
    return defence, px


def _of_file(path: Path, grey: bool, noise: bool) -> Defence:
    name = path.stem + "+B" * grey + "+C" * noise
    if name in DEFENCES or not re.fullmatch(r"[\w.-]+", path.stem):
        raise InputError(
            "A purifier's file must be named with letters, digits, ., - and _, and not as a defence is. Got "
            f"{path.name}: rename it."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Expected a file of a purifier's JSON. Got {path}: {error}.") from None
    return _Own(name, "a purifier of one's own", None, grey, noise, text=text)


@dataclass(frozen=True)
class _Own(Defence):
    """A purifier of one's own, by its JSON; its models are those of that name, or else one of `Models`."""

    text: str = ""

    def models(self, models: Models) -> list[str]:
        purifier = self._purifier(models)
        found = [self._meant(entry, kind, models) for kind, entry in _entries(purifier.config())]
        return list(dict.fromkeys(found))

    def ready(self, models: Models, px: float | None, fast: bool) -> Made:
        purifier, compensate = self._purifier(models), super().ready(models, px, fast).compensate
        config = purifier.config()
        if not fast and (dtypes := {*_values(config, "dtype")} - {"float32"}):
            raise InputError(
                f"In float32 (--precise) a purifier must compute in float32. Got {', '.join(sorted(dtypes))} in "
                f"{self.name}: write the file anew, or leave --precise out."
            )
        return Made(purifier, compensate, _noise_of(config))

    def _purifier(self, models: Models) -> Purifier:
        try:
            return recipes.from_json(self.text)
        except CheckpointError:  # of a name that is not here
            return recipes.from_json(self.text, [models.denoiser, models.energy, models.ddpm])

    def _meant(self, entry: dict[str, str], kind: str, models: Models) -> str:
        fields = ("energy",) if kind == "energy" else ("denoiser", "ddpm")
        given = [getattr(models, field) for field in fields]
        loaded = [as_energy(model) if kind == "energy" else as_denoiser(model) for model in given]
        of_weights = {weights_sha256(model): name for model, name in zip(loaded, given, strict=True)}
        return of_weights.get(entry["weights_sha256"], entry["name"])


def _noise_of(config: Any) -> float | None:
    """The one level of noise that a purifier's configuration has, in levels of 0 to 255."""
    levels = {*_values(config, "sigma_px")}
    return levels.pop() if len(levels) == 1 else None


def _entries(config: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """The models in a purifier's configuration: (kind, name and weights)."""
    for kind in ("denoiser", "energy"):
        yield from ((kind, value) for value in _values(config, kind) if isinstance(value, dict))


def _values(config: Any, key: str) -> Iterator[Any]:
    """What stands under a key, anywhere in a configuration."""
    if isinstance(config, dict):
        for name, value in config.items():
            if name == key:
                yield value
            yield from _values(value, key)
    elif isinstance(config, list):
        for value in config:
            yield from _values(value, key)
