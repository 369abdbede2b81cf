"""Read back the record that `purifyloader.poisons.write` keeps beside a poison's images."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from purifyloader.core.checks import check_choice, check_integer, check_number, shown, stored_integer, stored_integers
from purifyloader.errors import InputError
from purifyloader.files.json import parse_json, read_text
from purifyloader.poisons.poisoned import Bound, Poisoned, Target
from purifyloader.poisons.reading.content import describe, integers, read_array
from purifyloader.poisons.reading.request import Arrays, Request
from purifyloader.poisons.triggers import KINDS, Additive, Trigger
from purifyloader.poisons.writing import FORMAT, Layout

__all__ = ["BESIDE", "WRITTEN_BY", "Table", "from_arrays", "from_folder", "is_folder", "table_of"]

WRITTEN_BY = "written_by"  # the setting that names the version that wrote the poison
BESIDE = ("labels.csv", "poison.json", "poisoned.json", "trigger.npy", "target.npy")
"""Files of a written folder beside its images."""

_TARGET = ("label", "true_label", "index")
_HIGHEST = 2**63 - 1


class Table(NamedTuple):
    """`Table` is what labels.csv says: labels by file, which files are poisoned, and true labels if it has them."""

    labels: dict[str, int]
    poisoned: list[str]
    true_labels: dict[str, int] | None


def is_folder(names: tuple[str, ...]) -> bool:
    return {"poison.json", "labels.csv"} <= set(names)


def from_arrays(request: Request, arrays: dict[str, Any], images: NDArray[np.uint8], labels: NDArray[Any]) -> Poisoned:
    """Read the rest of an .npz file, whose image and label arrays are checked."""
    record = arrays["poison"]
    if not isinstance(record, np.ndarray) or record.dtype.kind != "U" or record.ndim != 0:
        raise InputError(f"poison in {request.path} must be a text. Got {describe(record)}.")
    where = integers(arrays.get("poisoned"), f"poisoned in {request.path}")
    true = None
    if "true_targets" in arrays:
        true = integers(arrays["true_targets"], f"true_targets in {request.path}")
    return _restored(request, (images, labels), where, str(record), arrays, true)


def table_of(folder: Path) -> Table:
    """Read the labels.csv of a written folder."""
    path = folder / "labels.csv"
    labels: dict[str, int] = {}
    true_labels: dict[str, int] = {}
    poisoned = []
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        says_true = "true_label" in (reader.fieldnames or ())
        for row in reader:
            if row["file"] in labels:
                raise ValueError(f"{row['file']} twice")
            labels[row["file"]] = stored_integer(f"The label of {row['file']} in {path}", row["label"])
            if says_true:
                what = f"The true label of {row['file']} in {path}"
                true_labels[row["file"]] = stored_integer(what, row["true_label"])
            if int(row["poisoned"]):
                poisoned.append(row["file"])
    except InputError:
        raise
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path} must have the columns file, label and poisoned. Got {type(error).__name__}: {error}."
        ) from None
    return Table(labels, poisoned, true_labels if says_true else None)


def from_folder(
    request: Request, folder: Path, images: NDArray[np.uint8], table: Table, places: dict[str, int]
) -> Poisoned:
    """Read the rest of a folder, whose images are decoded in the order of their numbers, `places`."""
    order = sorted(places, key=places.__getitem__)
    labels = stored_integers(f"A label in {folder}", [table.labels[name] for name in order])
    true = None if table.true_labels is None else np.array([table.true_labels[name] for name in order], np.int64)
    poisoned = np.array(sorted(places[name] for name in table.poisoned), np.int64)
    paths = [folder / f"{name}.npy" for name in ("trigger", "target")]
    extra = {path.stem: read_array(path) for path in paths if path.is_file()}
    try:
        record = read_text(folder / "poison.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'poison.json'} must be a text. Got: {error}.") from None
    return _restored(request, (images, labels), poisoned, record, extra, true)


def _restored(
    request: Request,
    arrays: Arrays,
    poisoned: NDArray[np.int64],
    text: str,
    extra: Mapping[str, Any],
    true_labels: NDArray[np.int64] | None,
) -> Poisoned:
    """Complete the set by its JSON record; refuse a record that `write` does not make, or of a later version."""
    expected = f"{request.path} must hold what purifyloader.poisons.write says of a poison"
    try:
        record = parse_json(text)
        version = record["format"]
        check_integer(f"format in {request.path}", version, 1, error=InputError)
        if version > FORMAT:
            raise InputError(
                f"{expected}, up to version {FORMAT}. Got version {version}: install a later purifyloader."
            )
        _check_record(record, arrays[0], f"in {request.path}")
        if (said := record.get("images", len(arrays[0]))) != len(arrays[0]):
            raise ValueError(f"{len(arrays[0]):,} of {said:,} images")
        bound = None if record["bound"] is None else Bound(record["bound"]["norm"], float(record["bound"]["epsilon"]))
        aimed = None
        if record["target"] is not None:
            image = extra.get("target")
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
                raise ValueError(f"a target of {describe(image)}, which is uint8 (H, W, C)")
            aimed = Target(image, **{key: record["target"][key] for key in _TARGET})
        return Poisoned.of(
            arrays[0],
            arrays[1],
            record["attack"],
            poisoned,
            bound=request.bound_or(bound),
            target=aimed,
            trigger=_trigger(record, extra, f"The trigger in {request.path}"),
            target_class=record["target_class"],
            settings={**record["settings"], WRITTEN_BY: f"purifyloader {record['purifyloader']}"},
            true_labels=true_labels,
        )
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{expected}. Got {type(error).__name__}: {error}: it is damaged, or was edited.") from None


def _trigger(record: Mapping[str, Any], extra: Mapping[str, Any], what: str) -> Trigger | None:
    """Build the trigger from the record and its array, `extra["trigger"]`."""
    array = extra.get("trigger")
    values: Any = {"kind": Additive.kind, "strength": 1.0} if array is not None else None
    if record["format"] > 1:
        values = record["trigger"]
    if values is None:
        if array is not None:
            raise ValueError(f"a trigger of {describe(array)}, of which the record says nothing")
        return None
    names = KINDS[values["kind"]].array_names() if values.get("kind") in KINDS else ()
    if "layout" in record and names == Additive.array_names() and isinstance(array, np.ndarray):
        # a folder has it in the published form: (1, C, H, W) in units of [-1, 1] images
        if array.ndim != 4 or len(array) != 1:
            raise ValueError(f"a trigger of {describe(array)}, which is (1, C, H, W)")
        array = np.moveaxis(array[0], 0, 2) / 2
    arrays = {} if array is None else dict.fromkeys(names or ("trigger",), array)
    try:
        return Trigger.from_dict(values, arrays)
    except InputError as error:
        raise InputError(f"{what} is none that purifyloader.poisons.write writes: {error}") from None


def _check_record(record: Mapping[str, Any], images: NDArray[np.uint8], where: str) -> None:
    """Refuse fields of types or sizes that `write` does not make; `where` says whose they are."""
    for name in ("attack", "purifyloader"):
        _check_kind(f"{name} {where}", record[name], str, "a text")
    if "layout" in record:  # of a folder
        check_choice(f"layout {where}", record["layout"], get_args(Layout), error=InputError)
    _check_kind(f"settings {where}", record["settings"], dict, "a JSON object")
    numbers = {"target_class": record["target_class"]}
    if (target := record["target"]) is not None:
        _check_kind(f"target {where}", target, dict, "a JSON object or null")
        check_integer(f"label of the target {where}", target["label"], 0, _HIGHEST, error=InputError)
        numbers |= {f"{name} of the target": target[name] for name in _TARGET[1:]}
    for name, value in numbers.items():
        check_integer(f"{name} {where}", value, 0, _HIGHEST, none=True, error=InputError)
    check_integer(f"images {where}", record.get("images", 0), 0, _HIGHEST, error=InputError)
    if (bound := record["bound"]) is not None:
        _check_kind(f"bound {where}", bound, dict, "a JSON object or null")
        # no norm moves an image further than it has values
        most = math.prod(images.shape[1:])
        check_number(f"epsilon of the bound {where}", bound["epsilon"], above=0, high=most, error=InputError)


def _check_kind(name: str, value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {what}. Got {shown(value)}.")
