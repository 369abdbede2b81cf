"""Choose which images an attack poisons, and check the test image that a targeted one is aimed at."""

from __future__ import annotations

import inspect
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.checks import as_path
from purifyloader.datasets.arrays import Part, as_arrays
from purifyloader.datasets.named import read_image
from purifyloader.errors import ConfigError, InputError
from purifyloader.poisons.attacks.additive import purpose_keys
from purifyloader.poisons.poisoned import Bound, Poisoned, Target

__all__ = ["Victims", "as_target", "colour", "drawn", "how_many", "is_class", "of_class", "on_chosen_images", "victims"]

_ATTACK = 0x6174746B  # "attk"
_CHOICE = 0  # what the keys drawn here are for, in every attack


class Victims(NamedTuple):
    """A dataset to poison, and which of its images: `indices` (P,), rising.

    Of a part of a dataset, `classes` are the whole's, and `positions` (N,) the place of each image in it.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: int
    indices: NDArray[np.int64]
    positions: NDArray[np.int64]
    seed: int

    def poisoned(self, images: NDArray[np.uint8], attack: str, bound: Bound | None, **settings: Any) -> Poisoned:
        """Return the images as the attack has changed them, with all that it was made with."""
        settings = {"seed": operator.index(self.seed), **settings}
        return Poisoned.of(images, self.labels, attack, self.indices, bound=bound, settings=settings)


def victims(dataset: Any, seed: int, share: float | None, count: int | None) -> Victims:
    """Read a dataset and draw which of its images to poison: a share, a number, or all where both are None."""
    images, labels = colour(dataset)
    wanted = how_many(len(images), share, count, f"the {len(images)} images")
    indices = np.arange(len(images))
    if wanted is not None:
        indices = drawn(torch.arange(len(images)), wanted, seed, _ATTACK).numpy()
    if isinstance(dataset, Part):
        return Victims(images, labels, dataset.classes, indices, dataset.positions, seed)
    return Victims(images, labels, int(labels.max()) + 1, indices, np.arange(len(images)), seed)


def on_chosen_images(
    name: str,
    function: Callable[..., Any],
    bound: Callable[[Mapping[str, Any]], Bound | None],
    recorded: Callable[[Victims, Mapping[str, Any]], Mapping[str, Any]] = lambda _, options: options,
) -> Callable[..., Poisoned]:
    """Make an attack `(dataset, seed=0, *, options, share=None, count=None)` out of a function on arrays.

    Args:
        function: takes images, labels, and by name which of indices, positions, classes and seed it needs, and its own
            options. Gives the images, or a pair of them and of more to record.
        bound: of the perturbations, from what is recorded.
        recorded: puts values in the place of options that are not JSON, or that depend on the images.
    """
    parameters = inspect.signature(function).parameters
    own = [p for key, p in parameters.items() if key not in ("images", "labels", *_GIVEN)]

    def attack(
        dataset: Any, seed: int = 0, *, share: float | None = None, count: int | None = None, **options: Any
    ) -> Poisoned:
        chosen = victims(dataset, seed, share, count)
        settings = {**{p.name: p.default for p in own}, **options}
        made = function(
            chosen.images,
            chosen.labels,
            **{key: getattr(chosen, key) for key in _GIVEN if key in parameters},
            **settings,
        )
        images, more = made if isinstance(made, tuple) else (made, {})
        settings = {**recorded(chosen, settings), **more}
        return chosen.poisoned(images, name, bound(settings), **settings, share=share, count=count)

    signature = inspect.signature(attack)
    first, last = list(signature.parameters.values())[:2], list(signature.parameters.values())[2:4]
    attack.__signature__ = signature.replace(parameters=[*first, *own, *last])  # type: ignore[attr-defined]
    attack.__module__, attack.__qualname__ = function.__module__, "attack"
    attack.__doc__ = _ARGUMENTS.format(name=function.__name__)
    return attack


_GIVEN = ("indices", "positions", "classes", "seed")
_ARGUMENTS = """Poison a dataset as `{name}` poisons arrays.

Args:
    dataset: see `as_arrays`; in colour.
    seed: of all that is random, and of the choice of images.
    share, count: poison so many of the images; None for all.
    options: see `{name}`.

Raises:
    InputError: a dataset or an option of another type, shape or range; ConfigError: both share and count.
"""


def colour(dataset: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read a dataset as `as_arrays` does, and refuse grey images."""
    images, labels = as_arrays(dataset)
    if images.shape[3] != 3:
        raise InputError(
            f"An attack poisons colour images, (N, H, W, 3). Got {images.shape}: repeat the grey channel, as "
            'image.convert("RGB") does.'
        )
    return images, labels


def how_many(images: int, share: float | None, count: int | None, of: str) -> int | None:
    """Return how many of `images` to poison, None for all; `of` says what they are, for an error."""
    if share is None and count is None:
        return None
    if share is not None and count is not None:
        raise ConfigError(f"Give share or count, not both. Got share={share!r} and count={count!r}.")
    if count is not None:
        if type(count) is not int or not 1 <= count <= images:
            raise InputError(f"count must be from 1 to {of}. Got {count!r}.")
        return count
    assert share is not None
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise InputError(f"share must be above 0 and at most 1, which is {of}. Got {share!r}.")
    return max(1, round(share * images))


def of_class(
    labels: NDArray[np.int64],
    target_class: Any,
    share: float | None,
    count: int | None,
    share_of: Literal["set", "class"] = "set",
    default: int | None = None,
) -> int:
    """Return how many images of one class to poison: a count, or a share of the "set" or of the "class".

    With neither it is the default, or all of the class if it has fewer.
    """
    if not is_class(target_class) or not (labels == target_class).any():
        raise InputError(
            f"target_class must be one of the classes 0 to {int(labels.max())} that has images. Got {target_class!r}."
        )
    if share_of not in ("set", "class"):
        raise InputError(f"share_of must be set or class. Got {share_of!r}.")
    members = int((labels == target_class).sum())
    if share is None and count is None:
        assert default is not None
        count = min(default, members)
    what = f"the {members} images of class {target_class}"
    wanted = how_many(len(labels) if share_of == "set" and count is None else members, share, count, what)
    assert wanted is not None
    if wanted > members:
        raise InputError(
            f"share must be of no more than {what}. Got {share!r} of the {len(labels)} images in the set, {wanted}: "
            "poison fewer, or another class."
        )
    return wanted


def drawn_of_class(
    labels: NDArray[np.int64],
    target_class: Any,
    share: float | None,
    count: int | None,
    *,
    default: int,
    seed: int,
    attack: int,
) -> Tensor:
    """Draw rising indices of images of a class, so many as `of_class` says."""
    wanted = of_class(labels, target_class, share, count, default=default)
    return drawn(torch.from_numpy(np.flatnonzero(labels == target_class)), wanted, seed, attack)


def is_class(value: Any) -> bool:
    """Tell whether a value is an integer, of Python or numpy, as labels are."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def drawn(candidates_N: Tensor, count: int, seed: int, attack: int) -> Tensor:
    """Draw `count` of these indices, int64, rising: a function of (seed, attack, the indices) alone."""
    keys = purpose_keys(seed, attack, _CHOICE, candidates_N)
    return candidates_N[noise.uniform(keys, (1,))[:, 0].argsort(stable=True)[:count]].sort().values


def as_target(target: Any, target_class: Any, shape: tuple[int, ...], classes: int) -> Target:
    """Check the test image, uint8 of the shape of the training images or a file, that a targeted attack is aimed at.

    `target_class` is what the victim is to call it, one of the set's classes; None takes the label of a `Target`.
    """
    known = target if isinstance(target, Target) else None
    image = target.image if known is not None else target
    if isinstance(image, str | os.PathLike):
        image = np.asarray(read_image(as_path(image)))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != shape:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(
            f"target must be the image that the victim is to be wrong on, uint8 {shape} as the training images are, a "
            f"file of one, or a poisons.Target. Got {got}."
        )
    label = known.label if known is not None and target_class is None else target_class
    if not is_class(label) or not 0 <= label < classes:
        raise InputError(
            f"target_class must be what the victim is to call the target, a class from 0 to {classes - 1}. Got "
            f"{label!r}."
        )
    true = None if known is None else known.true_label
    if true == label:
        raise InputError(f"target_class must be another class than the target's own. Got {label}, which it shows.")
    return Target(image, int(label), true, None if known is None else known.index)
