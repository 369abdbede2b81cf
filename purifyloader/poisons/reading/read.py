"""`read`: any published poison file as a dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from purifyloader.errors import InputError
from purifyloader.poisons.arrays import as_arrays
from purifyloader.poisons.poisoned import Bound, Poisoned
from purifyloader.poisons.reading.checks import check
from purifyloader.poisons.reading.content import describe, open_content
from purifyloader.poisons.reading.formats import FORMATS
from purifyloader.poisons.reading.own import WRITTEN_BY
from purifyloader.poisons.reading.request import Request

__all__ = ["read"]


def read(
    path: str | os.PathLike[str],
    *,
    clean: Any = None,
    format: str | None = None,
    bound: Bound | None = None,
    checked: bool = True,
    drop_negative: bool = False,
    target_class: int | None = None,
    count: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Poisoned:
    """A published poison, as a dataset of (PIL image, label) and all that its file says.

    No file runs code: pickles get a fixed list of classes. See purifyloader/poisons/README.md for the formats.

    Args:
        path: the file or folder.
        clean: the clean training set that the poison was made from, in its order: a dataset without its transform, or
            (images uint8 (N, H, W, C), labels). Formats that hold perturbations or some images need it; with it, any
            poison is compared with the clean images and checked.
        format: its name, where its content does not show it.
        bound: how far the attack may move an image, in units of [0, 1] images; the format's own if None, and where
            that has none, whatever it is.
        checked: whether a perturbation that was plainly misread or goes beyond the bound is refused.
        drop_negative: for EM: as its own loader casts, which makes negative numbers 0 and cuts levels off. Else the
            sign is kept and levels are rounded.
        target_class: for Narcissus: the class that the trigger stands for.
        count: for Narcissus: how many of its images get the trigger.
        seed: for Narcissus, which of them; for AR, the start values.
        mean, std: for Bullseye Polytope and Witches' Brew (std alone): one number a channel by which the file's images
            were normalised; those that the authors took for CIFAR-10 if None.

    Returns:
        The poisoned set. `settings` holds "format", "file", "checked" and, with `clean`, "moved": the figures of
        `Moved`. What `write` wrote comes back with all that it was.
        `poisoned` is what the file says, else what differs from the clean images, else all.

    Raises:
        InputError: nothing there, damaged, of no known format or of several, or what it wants is not plain data; a
            clean set that is missing or does not fit; or what `check` refuses.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}. Got {format!r}.")
    arrays = None if clean is None else as_arrays(clean)
    request = Request(path, arrays, bound, checked, drop_negative, target_class, count, seed, mean, std)
    content = open_content(path)
    name = _detected(content, request) if format is None else format
    if drop_negative and not name.startswith("em-"):
        raise InputError(f"drop_negative is a cast of EM's own loader. Got it for {path}, which is {name!r}: leave it.")
    poisoned = FORMATS[name].read(content, request)
    # of a file that `write` made of what was read before, the first reading's
    settings = {"format": name, "file": path.name, **poisoned.settings}
    checked = settings.setdefault("checked", checked) and checked
    if arrays is not None:
        # what `write` made was never cast, and what was dropped was meant to be
        signed = not settings.get("drop_negative", False) and WRITTEN_BY not in settings
        moved = check(poisoned, arrays, signed=signed) if checked else poisoned.moved(arrays[0])
        settings["moved"] = moved._asdict()
    return replace(poisoned, settings=settings)


def _detected(content: Any, request: Request) -> str:
    names = [name for name, known in FORMATS.items() if known.matches(content, request)]
    if len(names) == 1:
        return names[0]
    known = "\n".join(f"  {name:14}{FORMATS[name].what}" for name in names or FORMATS)
    raise InputError(
        f"{request.path} must hold a poison of one known format. Got {describe(content)}, which is "
        f"{'several' if names else 'none'} of them. Name it with format=:\n{known}"
    )
