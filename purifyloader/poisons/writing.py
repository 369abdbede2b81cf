"""Write a poisoned set as files that others read: one `.npz`, or a folder of PNGs; never half a file.

`.npz`, which `np.load` reads without pickle:

| array | |
| --- | --- |
| `data` | uint8 (N, H, W, C), in the order of the clean set |
| `targets` | int64 (N,) |
| `poisoned` | int64 (P,), rising: which images are poisoned |
| `poison` | a string, the JSON of `about` |
| `true_targets` | int64 (N,), what the images show, where some `targets` are wrong |
| `trigger` | the array of a back door's trigger, if it has one; added: float32 (H, W, C) in units of [0, 1] images |
| `target` | of a targeted attack: its test image, uint8 (H, W, C) |

A folder: `<index>.png` in the order of the clean set or, with the layout "class", `<class>/<index>.png`, as
torchvision's `ImageFolder` reads it. Numbers have leading zeros, so that to sort by name is to sort by number. Beside
them `labels.csv` (file, label, 1 for a poisoned one, and where some labels are wrong the true one), `poison.json`
(`about`), `poisoned.json` (names of the poisoned files, which `purifyloader audit energy --poisoned` takes),
`trigger.npy` (of an added trigger in the published form that `read_trigger` reads) and `target.npy`.

Version 1 had no true labels, and an added trigger or none, which its record did not describe.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from purifyloader.core.checks import as_path
from purifyloader.core.version import __version__
from purifyloader.errors import InputError
from purifyloader.files.atomic import creating, replacing_folder, writing
from purifyloader.poisons.poisoned import Poisoned
from purifyloader.poisons.triggers import Additive

__all__ = ["FORMAT", "about", "check_free", "is_npz", "write", "write_images", "write_npz"]

FORMAT = 2
"""Version of what is written here."""

Layout = Literal["flat", "class"]


def about(poisoned: Poisoned) -> dict[str, Any]:
    """Return all that is known of the poison beside its arrays, as JSON values."""
    bound, target = poisoned.bound, poisoned.target
    record = {
        "format": FORMAT,
        "purifyloader": __version__,
        "attack": poisoned.attack,
        "images": len(poisoned),
        "bound": bound and {"norm": bound.norm, "epsilon": bound.epsilon},
        "target_class": poisoned.target_class,
        "trigger": poisoned.trigger and poisoned.trigger.to_dict(),
        "target": target and {"label": target.label, "true_label": target.true_label, "index": target.index},
        "settings": dict(poisoned.settings),
    }
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"The settings of a poison must be JSON values. Got: {error}.") from None
    return record


def is_npz(out: str | os.PathLike[str]) -> bool:
    return Path(out).suffix.lower() == ".npz"


def check_free(out: str | os.PathLike[str]) -> None:
    """Refuse, before any work, a file that exists or a folder that holds something."""
    out = as_path(out)
    with writing(out):
        if is_npz(out):
            if out.exists():
                raise InputError(f"Expected a new file. Got {out}, which exists: give another one, or remove it.")
            return
        if out.exists() and not out.is_dir():
            raise InputError(f"Expected a folder, or a file that ends in .npz. Got the file {out}.")
        if out.is_dir() and (found := next(out.iterdir(), None)) is not None:
            raise InputError(f"Expected an empty folder. Got {out} with {found.name} in it: give another one.")


def write(poisoned: Poisoned, out: str | os.PathLike[str], layout: Layout = "flat") -> None:
    """Write to a file that ends in `.npz`, or to a folder; see `write_npz` and `write_images`.

    >>> import tempfile, numpy as np
    >>> from pathlib import Path
    >>> from purifyloader.poisons import Poisoned, write
    >>> poisoned = Poisoned.of(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], "none", poisoned=[])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(poisoned, f"{folder}/images")
    ...     sorted(path.name for path in Path(folder, "images").iterdir())[:2]
    ['0.png', '1.png']
    """
    if is_npz(out):
        write_npz(poisoned, out)
    else:
        write_images(poisoned, out, layout)


def write_npz(poisoned: Poisoned, path: str | os.PathLike[str]) -> None:
    """Write one file, as this module's docstring describes it. The same set gives the same bytes.

    Raises:
        InputError: the file exists, or its name does not end in .npz.
        PurifyError: it cannot be written.

    >>> import tempfile, numpy as np
    >>> from purifyloader.poisons import Poisoned, write_npz
    >>> poisoned = Poisoned.of(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], "none", poisoned=[])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_npz(poisoned, f"{folder}/p.npz")
    ...     np.load(f"{folder}/p.npz")["data"].shape
    (2, 8, 8, 3)
    """
    path = as_path(path)
    if not is_npz(path):
        raise InputError(f"Expected a file that ends in .npz. Got {path}.")
    check_free(path)
    arrays: dict[str, Any] = {
        "data": poisoned.images,
        "targets": poisoned.labels,
        "poisoned": poisoned.poisoned,
        "poison": np.array(json.dumps(about(poisoned), allow_nan=False)),
    }
    if poisoned.true_labels is not None:
        arrays["true_targets"] = poisoned.true_labels
    if (array := _trigger_array(poisoned)) is not None:
        arrays["trigger"] = array
    if poisoned.target is not None:
        arrays["target"] = poisoned.target.image
    with writing(path):
        try:
            with creating(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **arrays)  # given a name, it would add .npz to the temporary one
        except FileExistsError:
            check_free(path)  # it is there since the look above, by another process
            raise


def write_images(poisoned: Poisoned, folder: str | os.PathLike[str], layout: Layout = "flat") -> None:
    """Write a folder of PNGs, as this module's docstring describes it. It appears whole or not at all.

    Raises:
        InputError: the folder is not empty or is a file, no such layout, or the layout "class" where a class has no
            image, which `ImageFolder` would number otherwise.
        PurifyError: it cannot be written.

    >>> import tempfile, numpy as np
    >>> from pathlib import Path
    >>> from purifyloader.poisons import Poisoned, write_images
    >>> poisoned = Poisoned.of(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], "none", poisoned=[])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_images(poisoned, f"{folder}/images", "class")
    ...     Path(folder, "images", "1", "1.png").exists()
    True
    """
    folder = as_path(folder)
    if layout not in ("flat", "class"):
        raise InputError(f"layout must be flat or class. Got {layout!r}.")
    check_free(folder)
    names = _names(poisoned, layout)
    is_poisoned = np.zeros(len(poisoned), bool)
    is_poisoned[poisoned.poisoned] = True
    record = {**about(poisoned), "layout": layout}
    with writing(folder), replacing_folder(folder) as temporary:
        for place in sorted({(temporary / name).parent for name in names}):
            place.mkdir(exist_ok=True)
        for image, name in zip(poisoned.images, names, strict=True):
            Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(temporary / name)
        if (array := _trigger_array(poisoned)) is not None:
            published = isinstance(poisoned.trigger, Additive)
            np.save(temporary / "trigger.npy", 2 * array.transpose(2, 0, 1)[None] if published else array)
        if poisoned.target is not None:
            np.save(temporary / "target.npy", poisoned.target.image)
        with open(temporary / "labels.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            columns = {"file": names, "label": poisoned.labels.tolist(), "poisoned": is_poisoned.astype(int).tolist()}
            if poisoned.true_labels is not None:
                columns["true_label"] = poisoned.true_labels.tolist()
            table.writerow(columns)
            table.writerows(zip(*columns.values(), strict=True))
        for name, value in (("poisoned", [names[index] for index in poisoned.poisoned]), ("poison", record)):
            text = json.dumps(value, indent=2, allow_nan=False)
            (temporary / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _trigger_array(poisoned: Poisoned) -> NDArray[Any] | None:
    """Return the array of the trigger; no kind of trigger has several."""
    arrays = [] if poisoned.trigger is None else [*poisoned.trigger.arrays.values()]
    assert len(arrays) <= 1
    return arrays[0] if arrays else None


def _names(poisoned: Poisoned, layout: Layout) -> list[str]:
    count, classes = len(poisoned), int(poisoned.labels.max()) + 1
    files = [f"{index:0{len(str(count - 1))}d}.png" for index in range(count)]
    if layout == "flat":
        return files
    if missing := sorted(set(range(classes)) - set(poisoned.labels.tolist())):
        raise InputError(
            f"The layout class needs an image of each class from 0 to {classes - 1}: ImageFolder numbers the folders "
            f"it finds. Got none of class {missing[0]}: write the layout flat, or a .npz file."
        )
    width = len(str(classes - 1))
    return [f"{label:0{width}d}/{file}" for label, file in zip(poisoned.labels.tolist(), files, strict=True)]
