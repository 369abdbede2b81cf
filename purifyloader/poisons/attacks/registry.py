"""The attacks by name. For testing defences.

Every attack here is a function `(dataset, seed=0, *, ...) -> Poisoned`, whatever it needs to know of its own: the same
dataset, seed and options give the same images. `ATTACKS` is the closed table of them, and `make` takes a name.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.datasets.arrays import as_arrays
from purifyloader.errors import ConfigError, InputError
from purifyloader.poisons.attacks.adaptive import adaptive
from purifyloader.poisons.attacks.adp import adp
from purifyloader.poisons.attacks.ar import ar_coefficients, autoregressive, read_ar_coefficients
from purifyloader.poisons.attacks.bullseye import bullseye
from purifyloader.poisons.attacks.choice import drawn, how_many, of_class
from purifyloader.poisons.attacks.class_wise import urp as add_class_pattern
from purifyloader.poisons.attacks.cuda import cuda as convolve
from purifyloader.poisons.attacks.efp import efp
from purifyloader.poisons.attacks.em import em
from purifyloader.poisons.attacks.frogs import poison_frogs
from purifyloader.poisons.attacks.gradient_matching import gradient_matching
from purifyloader.poisons.attacks.label_consistent import label_consistent
from purifyloader.poisons.attacks.lsp import lsp as add_patches
from purifyloader.poisons.attacks.ops import ops_pixels, set_pixels
from purifyloader.poisons.attacks.presets import choose, field_names
from purifyloader.poisons.attacks.rem import rem
from purifyloader.poisons.attacks.sep import sep
from purifyloader.poisons.attacks.tap import tap
from purifyloader.poisons.attacks.trigger import backdoor, read_trigger
from purifyloader.poisons.poisoned import Bound, Poisoned

__all__ = ["ATTACKS", "FILES", "Attack", "ar", "cuda", "find", "lsp", "make", "narcissus", "ops", "urp"]

_ATTACK = 0x6174746B  # "attk"

Kind = Literal["availability", "backdoor", "targeted"]


@dataclass(frozen=True)
class Attack:
    """An entry of `ATTACKS`. All of them are clean-label: what an image is called stays right.

    Attributes:
        name: in `make` and on the command line.
        function: `(dataset, seed=0, *, options) -> Poisoned`.
        description: in a line.
        kind: "availability" makes the set useless to train on, "backdoor" plants a trigger, "targeted" has one test
            image taken for another class.
        paper: authors, year and arXiv number.
    """

    name: str
    function: Callable[..., Poisoned]
    description: str
    kind: Kind
    paper: str

    @property
    def options(self) -> dict[str, Any]:
        """The options that the attack takes, with their defaults; those of an attack with presets are of the first.

        `inspect.Parameter.empty` is the default of one that must be given.
        """
        parameters = list(inspect.signature(self.function).parameters.values())[2:]  # after dataset and seed
        return {parameter.name: parameter.default for parameter in parameters}


class _Given(NamedTuple):
    """A dataset to poison, and which of its images."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: int
    indices: NDArray[np.int64]


def _given(dataset: Any, seed: int, share: float | None, count: int | None) -> _Given:
    images, labels = _colour(dataset)
    wanted = how_many(len(images), share, count, f"the {len(images)} images")
    indices = np.arange(len(images))
    if wanted is not None:
        indices = drawn(torch.arange(len(images)), wanted, seed, _ATTACK).numpy()
    return _Given(images, labels, int(labels.max()) + 1, indices)


def _colour(dataset: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images, labels = as_arrays(dataset)
    if images.shape[3] != 3:
        raise InputError(
            f"An attack poisons colour images, (N, H, W, 3). Got {images.shape}: repeat the grey channel, as "
            'image.convert("RGB") does.'
        )
    return images, labels


def _made(
    given: _Given, images: NDArray[np.uint8], attack: str, bound: Bound | None, seed: int, **settings: Any
) -> Poisoned:
    settings = {"seed": operator.index(seed), **settings}
    return Poisoned.of(images, given.labels, attack, given.indices, bound=bound, settings=settings)


def urp(
    dataset: Any,
    seed: int = 0,
    *,
    epsilon: float = 8 / 255,
    distribution: Literal["uniform", "gaussian"] = "uniform",
    share: float | None = None,
    count: int | None = None,
) -> Poisoned:
    """One random pattern a class.

    Args:
        dataset: see `as_arrays`; in colour.
        epsilon, distribution: see `class_patterns`.
        share, count: poison so many of the images, chosen by `seed`; None for all.

    Raises:
        InputError: a dataset or an option of another type, shape or range.
        ConfigError: both share and count.
    """
    given = _given(dataset, seed, share, count)
    images = add_class_pattern(
        given.images,
        given.labels,
        indices=given.indices,
        classes=given.classes,
        seed=seed,
        epsilon=epsilon,
        distribution=distribution,
    )
    settings = {"epsilon": epsilon, "distribution": distribution, "share": share, "count": count}
    return _made(given, images, "urp", Bound("linf", epsilon), seed, **settings)


def lsp(
    dataset: Any,
    seed: int = 0,
    *,
    norm: float | None = None,
    patches: int = 4,
    class_separation: float = 10.0,
    share: float | None = None,
    count: int | None = None,
) -> Poisoned:
    """Linearly separable patches.

    Args:
        dataset: see `as_arrays`; in colour.
        norm, patches, class_separation: see `lsp_perturbation`.
        share, count: as in `urp`.

    Raises:
        InputError: a dataset or an option of another type, shape or range.
        ConfigError: both share and count.
    """
    given = _given(dataset, seed, share, count)
    height, width = given.images.shape[1:3]
    length = 6 / 255 * math.sqrt(3 * height * width) if norm is None else norm
    images = add_patches(
        given.images,
        given.labels,
        indices=given.indices,
        classes=given.classes,
        seed=seed,
        norm=length,
        patches=patches,
        class_separation=class_separation,
    )
    settings = {"norm": length, "patches": patches, "class_separation": class_separation}
    return _made(given, images, "lsp", Bound("l2", length), seed, **settings, share=share, count=count)


def ar(
    dataset: Any,
    seed: int = 0,
    *,
    norm: float = 1.0,
    coefficients: str | os.PathLike[str] | Tensor | Sequence[Tensor] | None = None,
    crop: int = 4,
    share: float | None = None,
    count: int | None = None,
) -> Poisoned:
    """Autoregressive noise.

    Args:
        dataset: see `as_arrays`; in colour.
        norm, crop: see `ar_perturbation`.
        coefficients: a published `.pt` file, or what `autoregressive` takes; None for those of `ar_coefficients`.
        share, count: as in `urp`.

    Raises:
        InputError: a dataset or an option of another type, shape or range.
        ConfigError: both share and count.
    """
    given = _given(dataset, seed, share, count)
    if isinstance(coefficients, str | os.PathLike):
        coefficients = read_ar_coefficients(os.fspath(coefficients))
    settings: dict[str, Any] = {"norm": norm, "crop": crop, "coefficients": None, "share": share, "count": count}
    if coefficients is None:
        used: Tensor | Sequence[Tensor] = ar_coefficients(given.classes, seed)
    else:
        used = coefficients
    images = autoregressive(
        given.images, given.labels, indices=given.indices, seed=seed, norm=norm, coefficients=used, crop=crop
    )
    if coefficients is not None:  # checked by now
        settings["coefficients"] = {"sha256": _sha256(torch.stack(list(used)))}
    return _made(given, images, "ar", Bound("l2", norm), seed, **settings)


def ops(
    dataset: Any,
    seed: int = 0,
    *,
    objective: Literal["paper", "code"] = "paper",
    share: float | None = None,
    count: int | None = None,
) -> Poisoned:
    """One-pixel shortcuts. The settings tell each class's pixel.

    Args:
        dataset: see `as_arrays`; in colour.
        seed: decides which images `share` and `count` take, and nothing else.
        objective: see `ops_pixels`.
        share, count: as in `urp`; the search is over all images.

    Raises:
        InputError: a dataset or an option of another type, shape or range, or more classes than the images' pixels
            can tell apart.
        ConfigError: both share and count.
    """
    given = _given(dataset, seed, share, count)
    pixels = ops_pixels(given.images, given.labels, classes=given.classes, objective=objective)
    images = set_pixels(given.images, given.labels, pixels, given.indices)
    said = [None if pixel is None else pixel._asdict() | {"colour": list(pixel.colour)} for pixel in pixels]
    settings = {"objective": objective, "pixels": said, "share": share, "count": count}
    return _made(given, images, "ops", Bound("l0", 1), seed, **settings)


def cuda(
    dataset: Any,
    seed: int = 0,
    *,
    blur: float = 0.3,
    unit: Literal["random", "centre"] = "random",
    share: float | None = None,
    count: int | None = None,
) -> Poisoned:
    """A random blur a class; without a bound.

    Args:
        dataset: see `as_arrays`; in colour.
        blur, unit: see `cuda_filters`.
        share, count: as in `urp`.

    Raises:
        InputError: a dataset or an option of another type, shape or range.
        ConfigError: both share and count.
    """
    given = _given(dataset, seed, share, count)
    images = convolve(
        given.images,
        given.labels,
        indices=given.indices,
        classes=given.classes,
        seed=seed,
        blur=blur,
        unit=unit,
    )
    return _made(given, images, "cuda", None, seed, blur=blur, unit=unit, share=share, count=count)


def narcissus(
    dataset: Any,
    seed: int = 0,
    *,
    trigger: str | os.PathLike[str] | Tensor | NDArray[np.floating],
    target_class: int,
    share: float | None = None,
    share_of: Literal["set", "class"] = "set",
    count: int | None = None,
) -> Poisoned:
    """A published trigger on some images of the class that it is to stand for.

    Args:
        dataset: see `as_arrays`; in colour.
        trigger: a published `.npy` file, in units of [-1, 1] images (see `read_trigger`), or float (H, W, 3) in units
            of [0, 1] images.
        target_class: whose images get it.
        share: of the "set" or of the "class", as `share_of` says; None for PureGen's 1 % of the set, where there is
            no count either.
        count: so many images of the class, chosen by `seed`.

    Raises:
        InputError: a dataset, a trigger or an option of another type, shape or range, or more images than the class
            has.
        ConfigError: both share and count.
    """
    images, labels = _colour(dataset)
    delta = _trigger(trigger, images.shape[1:])
    share = 0.01 if share is None and count is None else share
    wanted = of_class(labels, target_class, share, count, share_of)
    poisoned, indices = backdoor(images, labels, delta, target_class, wanted, classes=int(labels.max()) + 1, seed=seed)
    settings = {
        "seed": operator.index(seed),
        "trigger": {"sha256": _sha256(delta)},
        "target_class": int(target_class),
        "share": share,
        "share_of": share_of,
        "count": count,
    }
    return Poisoned.of(
        poisoned,
        labels,
        "narcissus",
        indices,
        bound=Bound("linf", float(delta.abs().max())),
        trigger=delta.numpy(),
        target_class=int(target_class),
        settings=settings,
    )


def _trigger(trigger: Any, shape: tuple[int, ...]) -> Tensor:
    """float32 (H, W, 3), checked."""
    if isinstance(trigger, str | os.PathLike):
        delta = read_trigger(trigger)
    elif isinstance(trigger, Tensor | np.ndarray):
        delta = torch.as_tensor(trigger).detach().cpu()
        if not delta.is_floating_point():
            raise InputError(f"trigger must be in floating point, in units of [0, 1] images. Got {delta.dtype}.")
    else:
        raise InputError(f"trigger must be a .npy file, a tensor or an array. Got {type(trigger).__name__}.")
    if tuple(delta.shape) != shape:
        raise InputError(f"trigger must have the shape of the images, {shape}. Got {tuple(delta.shape)}.")
    largest = float(delta.abs().max())
    if not 0 < largest <= 1:
        raise InputError(
            f"trigger must be finite, at most 1 in units of [0, 1] images, and not all zero. Got {largest:g}: divide "
            "numbers on the 0-255 scale by 255."
        )
    return delta.to(torch.float32).contiguous()


def _sha256(tensor: Tensor) -> str:
    """Of the numbers as float32: what a setting says of a file, whose path it must not."""
    return hashlib.sha256(tensor.to(torch.float32).contiguous().numpy().tobytes()).hexdigest()


_LISTED = (
    Attack("urp", urp, "one random pattern a class, l-infinity 8/255", "availability", "Huang et al. 2021, 2101.04898"),
    Attack("lsp", lsp, "linearly separable patches, l2 1.304 at 32 x 32", "availability", "Yu et al. 2022, 2111.00898"),
    Attack("ar", ar, "autoregressive noise, l2 1", "availability", "Sandoval-Segura et al. 2022, 2206.03693"),
    Attack("ops", ops, "one pixel a class, searched for", "availability", "Wu et al. 2023, 2205.12141"),
    Attack("cuda", cuda, "one random blur a class, unbounded", "availability", "Sadasivan et al. 2023, 2303.04278"),
    Attack("narcissus", narcissus, "a given trigger on one class", "backdoor", "Zeng et al. 2022, 2204.05255"),
    Attack("em", em, "error-minimising noise", "availability", "Huang et al. 2021, 2101.04898"),
    Attack("tap", tap, "noise towards another class", "availability", "Fowl et al. 2021, 2106.10807"),
    Attack("sep", sep, "the same of many checkpoints", "availability", "Chen et al. 2023, 2211.12005"),
    Attack("rem", rem, "robust error-minimising noise", "availability", "Fu et al. 2022, 2203.14533"),
    Attack("efp", efp, "noise in feature space", "availability", "Wen et al. 2023, openreview zKvm1ETDOq"),
    Attack("adp", adp, "error-minimising noise through compensation", "availability", "Wang et al. 2024, ECLIPSE"),
    Attack("adaptive", adaptive, "TAP through denoiser and compensation", "availability", "ours"),
    Attack(
        "label-consistent", label_consistent, "a trigger on hard images", "backdoor", "Turner et al. 2019, 1912.02771"
    ),
    Attack("gradient-matching", gradient_matching, "Witches' Brew", "targeted", "Geiping et al. 2021, 2009.02276"),
    Attack(
        "poison-frogs", poison_frogs, "images at a target in features", "targeted", "Shafahi et al. 2018, 1804.00792"
    ),
    Attack("bullseye", bullseye, "images around a target in features", "targeted", "Aghakhani et al. 2021, 2005.00191"),
)

ATTACKS: Mapping[str, Attack] = MappingProxyType({attack.name: attack for attack in _LISTED})
"""Every attack there is, by name."""


FILES = ("coefficients", "target", "trigger")
"""Options that take a file: what is in it decides, and not where it is."""


def find(name: str) -> Attack:
    """
    Raises:
        ConfigError: there is no attack of that name.
    """
    if name not in ATTACKS:
        raise ConfigError(f"An attack is one of {', '.join(ATTACKS)}. Got {name!r}.")
    return ATTACKS[name]


def check_options(attack: Attack, given: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: an option that the attack does not take, or none where it needs one.
        InputError: a value that an attack with presets refuses for its settings.
    """
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
    presets = getattr(attack.function, "presets", None)
    if presets is not None:  # its own checks of values, before an hour of work
        settings = {name: value for name, value in given.items() if name in field_names(presets)}
        choose(presets, given.get("preset", next(iter(presets))), settings)


_OF_A_RUN = ("device", "progress", "networks", "target", "model")  # what an attack is given, and not what it is


def resolved(attack: Attack, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an attack with the values that it takes for those that are not given: of its preset, or its own.

    Without what depends on the run that makes it, unless that is given: the target, networks, models, the device.

    Raises:
        InputError: a value that an attack with presets refuses for its settings.
    """
    values = {
        name: value
        for name, value in attack.options.items()
        if value is not inspect.Parameter.empty and name not in _OF_A_RUN
    }
    presets = getattr(attack.function, "presets", None)
    if presets is not None:
        fields = field_names(presets)
        chosen = choose(presets, given.get("preset", next(iter(presets))), {k: given[k] for k in fields if k in given})
        values |= {name: getattr(chosen, name) for name in fields}
    return {**values, **given}


def make(name: str, dataset: Any, seed: int = 0, **options: Any) -> Poisoned:
    """A dataset poisoned by the attack of that name, to test a defence on.

    Args:
        name: in `ATTACKS`.
        dataset: a map-style dataset of (image, label) without a transform, in colour and of one size, or a pair
            (images uint8 (N, H, W, 3), labels).
        seed: of all that is random.
        options: of the attack; see its function in `purifyloader.poisons.attacks.registry`.

    Raises:
        ConfigError: no such attack, or options that it does not take.
        InputError: a dataset or an option of another type, shape or range.
    """
    attack = find(name)
    check_options(attack, options)
    return attack.function(dataset, seed, **options)
