"""Poison some images of a dataset as they would be poisoned among all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.datasets.arrays import Part
from purifyloader.errors import InputError
from purifyloader.poisons.attacks import registry
from purifyloader.poisons.poisoned import Poisoned
from purifyloader.poisons.reading import read
from purifyloader.poisons.reading.content import read_array
from purifyloader.poisons.spec import AttackSpec

__all__ = ["poison_part"]

Whole = Callable[[], tuple[NDArray[np.uint8], NDArray[np.int64]]]

_CLASSES = 10  # patterns of an availability attack: enough to judge a purifier by, and cheap for a thousand classes too


def poison_part(spec: AttackSpec, part: Part, whole: Whole, seed: int, **run: Any) -> Poisoned:
    """Poison the images of a part by an attack, whose networks train on the part, or a file of the whole dataset.

    `whole` gives the images and labels of the whole dataset, and is called for a file that needs them all; `run` holds
    options such as device and progress, for an attack that takes them.
    """
    if spec.file is not None:
        return _read_part(spec, part, whole)
    attack = registry.find(spec.name)
    if attack.kind == "availability":  # whose classes are only patterns
        part = replace(part, labels=part.labels % _CLASSES, classes=min(part.classes, _CLASSES))
    options = {name: value for name, value in run.items() if name in attack.options} | dict(spec.options)
    registry.check_options(attack, options)
    try:
        return attack.function(part, seed, **options)
    except InputError as error:
        raise InputError(f"{spec.name} does not take these images: {error}") from None


def _read_part(spec: AttackSpec, part: Part, whole: Whole) -> Poisoned:
    assert spec.file is not None
    options = dict(spec.options)
    if spec.file.suffix == ".npy" and not {"format", "target_class", "count"} & options.keys():
        # an array with a row for each image: only those of the part are read
        is_images = read_array(spec.file).dtype == np.uint8 and "units" not in options
        options["format"] = "images" if is_images else "perturbations"
    if options.get("format") in ("images", "perturbations"):
        return read(spec.file, clean=part, **options)
    clean = whole()
    found = read(spec.file, clean=clean, **options)
    if len(found) != len(clean[0]):
        raise InputError(
            f"{spec.file} must hold a poison of all {len(clean[0])} images of the data. Got one of {len(found)}."
        )
    return found.only(part.positions)
