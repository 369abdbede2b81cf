"""List the attacks by name. For testing defences.

Every attack is a function `(dataset, seed=0, *, ...) -> Poisoned` in a module of its own, with whatever options it has:
the same dataset, seed and options give the same images. This table lists them without importing any, so that a help
text needs no torch; `make` takes a name.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from purifyloader.errors import ConfigError

if TYPE_CHECKING:
    from purifyloader.poisons.attacks.presets import AttackSettings
    from purifyloader.poisons.poisoned import Poisoned

__all__ = ["ATTACKS", "FILES", "Attack", "check_options", "find", "make", "resolved"]

Kind = Literal["availability", "backdoor", "targeted"]


@dataclass(frozen=True)
class Attack:
    """An `Attack` is an entry of the table.

    Attributes:
        name: in `make` and on the command line.
        implementation: `(dataset, seed=0, *, options) -> Poisoned`, or "module.function" (if only "module", its
            `attack`) below `purifyloader.poisons.attacks`, which is imported when it is first used.
        description: in a line.
        kind: "availability" makes the set useless to train on, "backdoor" plants a trigger, "targeted" has one test
            image taken for another class.
        paper: authors, year and arXiv number.
        keeps_labels: whether it is clean-label: what an image is called stays right. If not, `true_labels` of the
            poisoned set say what the images show.

    >>> from purifyloader.poisons import ATTACKS
    >>> ATTACKS["lsp"].kind, ATTACKS["lsp"].options["patches"]
    ('availability', 4)
    """

    name: str
    implementation: Callable[..., Poisoned] | str
    description: str
    kind: Kind
    paper: str
    keeps_labels: bool = True

    @property
    def function(self) -> Callable[..., Poisoned]:
        """The attack itself, imported when it is first asked for."""
        if not isinstance(self.implementation, str):
            return self.implementation
        module, _, name = self.implementation.partition(".")
        imported = importlib.import_module(f"purifyloader.poisons.attacks.{module}")
        function: Callable[..., Poisoned] = getattr(imported, name or "attack")
        return function

    @property
    def presets(self) -> Mapping[str, AttackSettings] | None:
        """Named settings of an attack that trains networks; None for one that has none."""
        return getattr(self.function, "presets", None)

    @property
    def options(self) -> dict[str, Any]:
        """The options that the attack takes, with their defaults; those of an attack with presets are of the first.

        `inspect.Parameter.empty` is the default of one that must be given.
        """
        parameters = list(inspect.signature(self.function).parameters.values())[2:]  # after dataset and seed
        return {parameter.name: parameter.default for parameter in parameters}


_listed, _backdoor, _targeted = (partial(Attack, kind=kind) for kind in ("availability", "backdoor", "targeted"))
_relabelling = partial(_backdoor, keeps_labels=False)
_LISTED = (
    _listed("urp", "class_wise", "one random pattern a class, l-infinity 8/255", paper="Huang et al. 2021, 2101.04898"),
    _listed("lsp", "separable", "linearly separable patches, l2 1.304 at 32 x 32", paper="Yu et al. 2022, 2111.00898"),
    _listed("ar", "autoregression", "autoregressive noise, l2 1", paper="Sandoval-Segura et al. 2022, 2206.03693"),
    _listed("ops", "one_pixel", "one pixel a class, searched for", paper="Wu et al. 2023, 2205.12141"),
    _listed("cuda", "convolution", "one random blur a class, unbounded", paper="Sadasivan et al. 2023, 2303.04278"),
    _backdoor("narcissus", "trigger", "a given trigger on one class", paper="Zeng et al. 2022, 2204.05255"),
    _listed("em", "em.em", "error-minimising noise", paper="Huang et al. 2021, 2101.04898"),
    _listed("tap", "tap.tap", "noise towards another class", paper="Fowl et al. 2021, 2106.10807"),
    _listed("sep", "sep.sep", "the same of many checkpoints", paper="Chen et al. 2023, 2211.12005"),
    _listed("rem", "rem.rem", "robust error-minimising noise", paper="Fu et al. 2022, 2203.14533"),
    _listed("efp", "efp.efp", "noise in feature space", paper="Wen et al. 2023, openreview zKvm1ETDOq"),
    _listed("adp", "adp.adp", "error-minimising noise through compensation", paper="Wang et al. 2024, ECLIPSE"),
    _listed("adaptive", "adaptive.adaptive", "TAP through denoiser and compensation", paper="ours"),
    _backdoor(
        "label-consistent",
        "label_consistent.label_consistent",
        "a trigger on hard images",
        paper="Turner et al. 2019, 1912.02771",
    ),
    _backdoor("sig", "backdoors.sig", "a wave on most images of one class", paper="Barni et al. 2019, 1902.11237"),
    _relabelling("badnets", "backdoors.badnets", "a patch in the corner", paper="Gu et al. 2017, 1708.06733"),
    _relabelling("blended", "backdoors.blended", "a picture mixed in", paper="Chen et al. 2017, 1712.05526"),
    _relabelling("wanet", "backdoors.wanet", "a smooth warp", paper="Nguyen & Tran 2021, 2102.10369"),
    _relabelling("ftrojan", "backdoors.ftrojan", "two frequencies of colour", paper="Wang et al. 2022, 2111.10991"),
    _targeted(
        "gradient-matching",
        "gradient_matching.gradient_matching",
        "Witches' Brew",
        paper="Geiping et al. 2021, 2009.02276",
    ),
    _targeted(
        "poison-frogs", "frogs.poison_frogs", "images at a target in features", paper="Shafahi et al. 2018, 1804.00792"
    ),
    _targeted(
        "bullseye", "bullseye.bullseye", "images around a target in features", paper="Aghakhani et al. 2021, 2005.00191"
    ),
)

ATTACKS: Mapping[str, Attack] = MappingProxyType({attack.name: attack for attack in _LISTED})
"""Every attack there is, by name."""


FILES = ("coefficients", "image", "target", "trigger")
"""Options that take a file: what is in it decides, and not where it is."""


def find(name: str) -> Attack:
    """Return the attack of a name; refuse a name that no attack has."""
    if name not in ATTACKS:
        raise ConfigError(f"An attack is one of {', '.join(ATTACKS)}. Got {name!r}.")
    return ATTACKS[name]


def check_options(attack: Attack, given: Mapping[str, Any]) -> None:
    """Refuse options that an attack does not take, or whose values it refuses, before an hour of work."""
    takes = attack.options
    for option in given:
        if option not in takes:
            near = difflib.get_close_matches(option, takes, 1)
            raise ConfigError(
                f"The attack {attack.name} takes {', '.join(takes)}. Got {option!r}"
                + (f": did you mean {near[0]}?" if near else ": leave it out.")
            )
    needed = [name for name, default in takes.items() if default is inspect.Parameter.empty and name not in given]
    if needed:
        raise ConfigError(f"The attack {attack.name} needs {' and '.join(needed)}. Got none: give it.")
    _settings(attack, given)


def _settings(attack: Attack, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an attack with presets that the options given make; none of another."""
    presets = attack.presets
    if presets is None:
        return {}
    from purifyloader.poisons.attacks.presets import choose, field_names

    names = field_names(presets)
    preset = given.get("preset", next(iter(presets)))
    chosen = choose(presets, preset, {name: given[name] for name in names if name in given})
    return {name: getattr(chosen, name) for name in names}


_OF_A_RUN = ("device", "progress", "networks", "target", "model")  # what an attack is given, and not what it is


def resolved(attack: Attack, given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the options of an attack with the values that it takes for those that are not given.

    Without what depends on the run that makes it, unless that is given: the target, networks, models, the device.
    """
    values = {
        name: value
        for name, value in attack.options.items()
        if value is not inspect.Parameter.empty and name not in _OF_A_RUN
    }
    return {**values, **_settings(attack, given), **given}


def make(name: str, dataset: Any, seed: int = 0, **options: Any) -> Poisoned:
    """Poison a dataset by the attack of that name in `ATTACKS`, to test a defence on.

    Args:
        dataset: a map-style dataset of (image, label) without a transform, in colour and of one size, or a pair
            (images uint8 (N, H, W, 3), labels).
        seed: of all that is random.
        options: of the attack: `help(ATTACKS[name].function)`.

    Raises:
        ConfigError: no such attack, or options that it does not take.
        InputError: a dataset or an option of another type, shape or range.

    >>> import numpy as np
    >>> from purifyloader.poisons import make
    >>> clean = np.full((4, 8, 8, 3), 128, np.uint8), [0, 1, 0, 1]
    >>> poisoned = make("lsp", clean, seed=0, norm=1.0, count=2)
    >>> poisoned.attack, len(poisoned.poisoned)
    ('lsp', 2)
    """
    attack = find(name)
    check_options(attack, options)
    return attack.function(dataset, seed, **options)
