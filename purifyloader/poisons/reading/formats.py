"""Read any published poison file as a dataset: find its format by its content, and read and check it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from purifyloader.core.checks import check_flag
from purifyloader.datasets.arrays import Part, as_arrays
from purifyloader.errors import InputError
from purifyloader.poisons.poisoned import Bound, Poisoned, Target
from purifyloader.poisons.reading import perturbations, pictures, targeted
from purifyloader.poisons.reading import request as options
from purifyloader.poisons.reading.checks import check
from purifyloader.poisons.reading.content import describe, open_content
from purifyloader.poisons.reading.own import WRITTEN_BY
from purifyloader.poisons.reading.request import UNITS, Format, Request

__all__ = ["FORMATS", "read"]

log = logging.getLogger("purifyloader")

FORMATS: dict[str, Format] = {**targeted.FORMATS, **perturbations.FORMATS, **pictures.FORMATS}
"""Every format that is read, by name."""


def read(
    path: str | os.PathLike[str],
    *,
    clean: Any = None,
    format: str | None = None,
    bound: Bound | float | str | None = None,
    checked: bool = True,
    drop_negative: bool = False,
    target: Target | NDArray[Any] | Image.Image | str | os.PathLike[str] | None = None,
    target_class: int | None = None,
    count: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    units: str | None = None,
) -> Poisoned:
    """Read a published poison, as a dataset of (PIL image, label) and all that its file says.

    No file runs code: pickles get a fixed list of classes. See purifyloader/poisons/README.md for the formats.

    Args:
        path: the file or folder.
        clean: the clean training set that the poison was made from, in its order: a dataset without its transform, or
            (images uint8 (N, H, W, C), labels). Formats that hold perturbations or some images need it; with it, any
            poison is compared with the clean images and checked.
        format: its name, where its content does not show it.
        bound: how far the attack may move an image, in units of [0, 1] images: a `Bound`; a number, which is
            l-infinity, such as 8/255; or a text NORM:EPSILON, such as "linf:8/255", "l2:1" or "l0:1" (in pixels). The
            format's own if None; where that has none, however far, and `check` refuses what is plainly misread.
        checked: whether a poison that was plainly misread or goes beyond the bound is refused. False reads it as it is.
        drop_negative: for EM: as its own loader casts, which makes negative numbers 0 and cuts levels off. Else the
            sign is kept and levels are rounded.
        target: for a targeted attack whose file does not hold it, the test image that the poison is aimed at: uint8
            (H, W, C), a PIL image, a file of one, or a `Target`. It becomes the `target` of the set.
        target_class: what that test image is to be called (of a `Target`, its own label if None); for Narcissus, the
            class that the trigger stands for.
        count: for Narcissus: how many of its images get the trigger. For any other poison: how many images it poisons,
            which must be so many; it says that a folder without some of the images of `clean` is meant to be.
        seed: for Narcissus, which of them; for AR, the start values.
        mean, std: for Bullseye Polytope and Witches' Brew (std alone): one number a channel by which the file's images
            were normalised; those that the authors took for CIFAR-10 if None.
        units: for perturbations in an .npy array, of what images they are: in [0, 1] ("unit"), in [-1, 1]
            ("minus-one-to-one") or of 0 to 255 ("bytes").

    Returns:
        The poisoned set; what `write` wrote with all that it was. `settings` holds "format", "file", "checked" and,
        with `clean`, "moved". `poisoned` is what the file says, else what differs from the clean set, else all.
        `true_labels` are those of the file, else of `clean`, where some labels are others.

    Raises:
        InputError: an option of another type or range, or one that the format does not have; nothing there, damaged,
            of no known format or of several, or what it wants is not plain data; a clean set that is missing or does
            not fit; or what `check` refuses.

    >>> import tempfile, numpy as np
    >>> from purifyloader import poisons
    >>> clean = np.full((4, 8, 8, 3), 128, np.uint8), np.array([0, 1, 0, 1])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     poisons.write(poisons.make("urp", clean), f"{folder}/urp.npz")
    ...     poisons.read(f"{folder}/urp.npz", clean=clean).settings["moved"]["linf"]
    8
    """
    if format is not None and not (isinstance(format, str) and format in FORMATS):
        raise InputError(f"format must be one of {', '.join(FORMATS)}. Got {format!r}.")
    file = options.as_path(path)
    check_flag("checked", checked, error=InputError)
    check_flag("drop_negative", drop_negative, error=InputError)
    if units is not None and units not in UNITS:
        raise InputError(f"units must be one of {', '.join(UNITS)}. Got {units!r:.80}: give one of them.")
    label = None if target_class is None else options.as_whole("target_class", target_class, 0, "an integer from 0")
    request = Request(
        path=file,
        bound=options.as_bound(bound),
        checked=checked,
        drop_negative=drop_negative,
        target=options.as_target_image(target, label),
        target_class=label,
        count=None
        if count is None
        else options.as_whole("count", count, 1, "how many images get the trigger, an integer from 1"),
        seed=options.as_whole("seed", seed, -math.inf, "an integer"),
        mean=options.as_channels("mean", mean),
        std=options.as_channels("std", std, low=0.0),
        units=units,
        clean=None if clean is None else as_arrays(clean),
        places=(clean.length, clean.positions) if isinstance(clean, Part) else None,
    )
    content = open_content(file)
    name = _detected(content, request) if format is None else format
    _check_fits(name, request)
    poisoned = targeted.with_target(FORMATS[name].read(content, request), request)
    # of a file that `write` made of what was read before, the first reading's
    settings = {"format": name, "file": file.name, **poisoned.settings}
    if name not in _COUNTED or WRITTEN_BY in settings:
        request.check_count(len(poisoned.poisoned))
    checked = settings.setdefault("checked", checked) and checked
    if request.clean is not None:
        # what `write` made was never cast, and what was dropped was meant to be
        signed = not settings.get("drop_negative", False) and WRITTEN_BY not in settings
        moved = check(poisoned, request.clean, signed=signed) if checked else poisoned.moved(request.clean[0])
        settings["moved"] = moved._asdict()
        by_design = request.count is not None or name in _OF_A_SHARE or WRITTEN_BY in settings
        if poisoned.true_labels is None and (poisoned.labels != request.clean[1]).any():
            poisoned = replace(poisoned, true_labels=request.clean[1].copy())
        _tell_share(file, poisoned, moved.images, by_design)
    return replace(poisoned, settings=settings)


_COUNTED = ("narcissus", "png")  # which look at count= themselves
_OF_A_SHARE = ("benchmark", "puregen", "bullseye", "witches-brew", "narcissus")  # whose files say which images


def _tell_share(file: Path, poisoned: Poisoned, moved: int, by_design: bool) -> None:
    """Log how many images a poison leaves as they are, for it makes every defence look better."""
    said, length = len(poisoned.poisoned), len(poisoned)
    if moved < said:
        rest = "are clean" if poisoned.true_labels is None else "are clean, some with a wrong label"
        log.warning("%s moves %s of the %s images that it poisons; the rest %s", file, f"{moved:,}", f"{said:,}", rest)
    elif moved < length:
        level = logging.INFO if by_design else logging.WARNING
        share = f"{moved:,} of the {length:,} images ({100 * moved / length:.3g} %)"
        log.log(level, "%s poisons %s; the others are as in the clean set", file, share)


def _check_fits(name: str, request: Request) -> None:
    """Refuse an option that says what the format cannot hold."""
    where = f"{request.path}, which is {name!r}"
    if request.drop_negative and not name.startswith("em-"):
        raise InputError(f"drop_negative is a cast of EM's own loader. Got it for {where}: leave it.")
    if request.target is not None and not FORMATS[name].may_aim:
        raise InputError(f"target is for a poison that is aimed at one test image. Got it for {where}: leave it away.")
    if request.units is not None and not FORMATS[name].by_row:
        raise InputError(f"units is for perturbations in an .npy array. Got it for {where}: leave it.")
    if request.places is not None and not FORMATS[name].by_row:
        raise InputError(f"clean must be the whole clean set. Got a part of it for {where}.")
    if request.target_class is not None and request.target is None and name != "narcissus":
        raise InputError(
            "target_class says what a target= is to be called, or what the trigger of Narcissus stands for. Got it "
            f"without target= for {where}: give target=, or leave it away."
        )


def _detected(content: Any, request: Request) -> str:
    names = [
        name
        for name, known in FORMATS.items()
        if (known.by_row or request.units is None) and known.matches(content, request)
    ]
    if len(names) == 1:
        return names[0]
    known = "\n".join(f"  {name:14}{FORMATS[name].what}" for name in names or FORMATS)
    raise InputError(
        f"{request.path} must hold a poison of one known format. Got {describe(content)}, which is "
        f"{'several' if names else 'none'} of them. Name it with format=:\n{known}"
    )
