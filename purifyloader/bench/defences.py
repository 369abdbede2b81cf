"""The defences of a bench, by name: what purifies, and what compensates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from purifyloader import recipes
from purifyloader.errors import InputError
from purifyloader.purifiers import Purifier
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
        sigma: of the noise it adds to an image, in units of [0, 1] images; None where it adds none, or not at once.
    """

    purifier: Purifier | None
    compensate: Compensate | None
    sigma: float | None


@dataclass(frozen=True)
class Defence:
    """One row of the table below.

    Attributes:
        uses: the fields of `Models` that it takes.
        named: of a file, the models that its JSON names.
        takes_sigma: whether `NAME@PX` means anything for it.
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
    named: tuple[str, ...] = ()

    def models(self, models: Models) -> list[str]:
        """The checkpoints it uses, each once."""
        return list(dict.fromkeys([*(getattr(models, field) for field in self.uses), *self.named]))

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
        return Made(purifier, compensate, sigma)


def _once(models: Models, sigma: float | None, fast: bool) -> Purifier:
    return recipes.eclipse(models.denoiser, sigma=sigma, fast=fast)


def _published(models: Models, sigma: float | None, fast: bool) -> Purifier:
    return recipes.eclipse(models.denoiser, fast=fast)


_ONE_CALL = 0.05  # of one call: 12.75 px, with which sparse-trained denoisers of this library do best

_ALL = (
    Defence("none", "nothing", None),
    Defence("jpeg-10", "JPEG at quality 10 (ISS-J)", lambda m, s, f: recipes.jpeg(10)),
    Defence("jpeg-75", "JPEG at quality 75", lambda m, s, f: recipes.jpeg(75)),
    Defence("grayscale", "grey for every image (ISS-G)", lambda m, s, f: recipes.grayscale()),
    Defence("bit-depth", "2 bits a channel", lambda m, s, f: recipes.bit_depth()),
    Defence("coin", "COIN: pixels moved at random by interpolation", lambda m, s, f: recipes.coin()),
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
        sigma=0.025,
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
        PurifyError: what `recipes.from_json` refuses.
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
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Expected a file of a purifier's JSON. Got {path}: {error}.") from None
    purifier = recipes.from_json(text)
    return Defence(
        path.stem + "+B" * grey + "+C" * noise,
        "a purifier of one's own",
        lambda models, sigma, fast: purifier,
        grey,
        noise,
        named=tuple(_models_in(purifier.config())),
    )


def _models_in(config: Any) -> Iterator[str]:
    """The names of the models in a purifier's configuration."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key in ("denoiser", "energy") and isinstance(value, dict):
                yield str(value["name"])
            else:
                yield from _models_in(value)
    elif isinstance(config, list):
        for value in config:
            yield from _models_in(value)
