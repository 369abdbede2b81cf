"""What a sanitation found: the target classes, the suspects, labels that ought to be others, and the evidence."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from purifyloader.core.checks import as_path, check_choice
from purifyloader.core.version import __version__
from purifyloader.datasets.samples import ImageKey
from purifyloader.errors import InputError, PurifyError
from purifyloader.files.atomic import replacing, write_text, writing
from purifyloader.files.hashes import hashes_as_text
from purifyloader.files.json import read_json
from purifyloader.files.opening import opened
from purifyloader.purified.sanitation import Sanitation
from purifyloader.sanitize import evidence

__all__ = ["ACTIONS", "FILES", "Action", "Verdict", "load"]

Action = Literal["drop", "relabel", "keep"]
ACTIONS = ("drop", "relabel", "keep")

FORMAT, VERSION = "purifyloader-sanitation", 1
FILES = (JSON, ARRAYS, CSV) = ("sanitation.json", "arrays.safetensors", "suspects.csv")


@dataclass(frozen=True, eq=False)
class Verdict:
    """A `Verdict` is what `sanitize` found in a dataset of N images.

    Attributes:
        labels: int64 (N,), as the dataset gives them.
        targets: classes under whose label there are images of other classes.
        suspects: int64 (S,), rising: indices of the images that are probably those.
        corrected: a better label of each suspect, by index.
        rows: of each class, its `images`, its name, and the numbers of each kind of evidence.
        by: kind of evidence that the targets follow from (`purifyloader.sanitize.evidence`).
        unjudged: classes with too few images for a verdict.
        scores: float64 (N,), how unlikely each image is for its label, as a percentile among clean ones; with a
            reference only.
        votes: int64 (N, rounds + 1), what a model trained on the dataset calls each image and its purified versions;
            with a purifier only.
        source: identity of the dataset, which a cache of it has too.
        found_by: how it was found, JSON.
        names: files of the suspects, by index, where the dataset has names.
        label_key: where the label is in a sample; None where it is found by itself.
        hashes: uint64 (S,) of the suspects' images, by which a `Sanitation` sees that a dataset is this one.

    >>> import numpy as np
    >>> from purifyloader.sanitize import Verdict
    >>> verdict = Verdict(np.array([0, 0, 1]), (0,), np.array([1]), {1: 1}, [], "reference")
    >>> verdict
    Verdict(3 images, targets [0], 1 suspects, by 'reference')
    >>> verdict.kept.tolist(), verdict.sanitation("relabel").labels
    ([0, 2], {1: 1})
    """

    labels: NDArray[np.int64]
    targets: tuple[int, ...]
    suspects: NDArray[np.int64]
    corrected: Mapping[int, int]
    rows: Sequence[Mapping[str, Any]]
    by: str
    unjudged: tuple[int, ...] = ()
    scores: NDArray[np.float64] | None = None
    votes: NDArray[np.int64] | None = None
    source: Mapping[str, Any] | None = None
    found_by: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[int, str | None] = field(default_factory=dict)
    label_key: ImageKey = None
    hashes: NDArray[np.uint64] | None = None

    def __repr__(self) -> str:
        found = f"targets {list(self.targets)}, {len(self.suspects):,} suspects" if self.targets else "no target"
        return f"Verdict({len(self.labels):,} images, {found}, by {self.by!r})"

    @property
    def kept(self) -> NDArray[np.int64]:
        """Indices of the images that are no suspects, for `torch.utils.data.Subset`."""
        return np.setdiff1d(np.arange(len(self.labels)), self.suspects)

    def sanitation(self, suspects: Action = "drop") -> Sanitation:
        """Make the plan that `PurifiedDataset` and `precompute` take: "drop", "relabel" or "keep" the suspects.

        "keep" names them and changes nothing.
        """
        check_choice("suspects", suspects, ACTIONS)
        return Sanitation(
            len(self.labels),
            self.suspects.tolist(),
            dict(self.corrected) if suspects == "relabel" else {},
            drop=suspects == "drop",
            label_key=self.label_key,
            source=self.source,
            found_by=self.found_by,
            hashes=None if self.hashes is None else hashes_as_text(self.hashes),
        )

    def highest(self, most: int = 20) -> list[Mapping[str, Any]]:
        """Return so many rows at most, of the classes with the most evidence, in the order of the classes."""
        order = sorted(self.rows, key=lambda row: -(row[self.by]["z"] or 0.0))
        return sorted(order[:most], key=lambda row: int(row["class"]))

    def to_dict(self) -> dict[str, Any]:
        """Return all but the arrays as JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "purifyloader": __version__,
            "images": len(self.labels),
            "by": self.by,
            "targets": list(self.targets),
            "unjudged": list(self.unjudged),
            "suspects": self.suspects.tolist(),
            "corrected": [[index, label] for index, label in sorted(self.corrected.items())],
            "names": [[index, name] for index, name in sorted(self.names.items())],
            "label_key": self.label_key,
            "classes": list(self.rows),
            "source": self.source,
            "found_by": self.found_by,
        }

    def csv(self) -> str:
        """Write the suspects as a table: index, file, label, corrected label, score."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["index", "file", "label", "corrected", "score"])
        for index in self.suspects.tolist():
            score = "" if self.scores is None else f"{self.scores[index]:.4f}"
            table.writerow(
                [index, self.names.get(index) or "", int(self.labels[index]), self.corrected.get(index, ""), score]
            )
        return text.getvalue()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `sanitation.json`, `arrays.safetensors` and `suspects.csv` to a folder, each whole or not at all.

        The JSON is removed first and comes last: without it there is no verdict to load.
        """
        folder = as_path(folder)
        arrays = {"labels": self.labels, "scores": self.scores, "votes": self.votes, "hashes": self.hashes}
        data = safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in arrays.items() if a is not None})
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / JSON).unlink(missing_ok=True)
            with replacing(folder / ARRAYS) as temporary:
                temporary.write_bytes(data)
            write_text(folder / CSV, self.csv())
            write_text(folder / JSON, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")


def load(folder: str | os.PathLike[str]) -> Verdict:
    """Read what `Verdict.save` wrote; `InputError` for another folder, or one that is damaged.

    >>> import tempfile, numpy as np
    >>> from purifyloader import sanitize
    >>> rows = [{"class": label, "images": 1, "reference": {"z": 0.0}} for label in (0, 1)]
    >>> verdict = sanitize.Verdict(np.array([0, 0, 1]), (0,), np.array([1]), {1: 1}, rows, "reference")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     verdict.save(folder)
    ...     sanitize.load(folder).suspects.tolist()
    [1]
    """
    folder = as_path(folder)
    try:
        values = read_json(folder / JSON)
    except (OSError, ValueError) as error:
        raise InputError(f"A sanitation is a folder with {JSON}. Got {folder}: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{folder / JSON} must be what `purifyloader sanitize` wrote. Got something else.")
    if values.get("version") != VERSION:
        raise InputError(
            f"{folder / JSON} has version {values.get('version')!r}, and this purifyloader reads {VERSION}. Use the "
            "version that wrote it."
        )
    try:
        with opened(folder / ARRAYS) as file:
            arrays = safetensors.numpy.load(file.read())
        return _verdict(values, arrays)
    except (OSError, KeyError, TypeError, ValueError, OverflowError, PurifyError, safetensors.SafetensorError) as error:
        raise InputError(f"The sanitation in {folder} is damaged: {error!r}. Sanitize again.") from None


def _verdict(values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Verdict:
    labels, count = arrays["labels"], values["images"]
    suspects, rows, corrected = values["suspects"], values["classes"], dict(values["corrected"])
    shapes = {"labels": (1, "i"), "scores": (1, "f"), "votes": (2, "i"), "hashes": (1, "u")}
    for name, array in arrays.items():
        dimensions, kind = shapes[name]
        length = len(suspects) if name == "hashes" else count
        if array.ndim != dimensions or array.dtype.kind != kind or len(array) != length:
            raise ValueError(f"{name} is {array.dtype} {array.shape} for {length} images")
    classes = [row["class"] for row in rows]
    numbers = [*suspects, *corrected, *corrected.values(), *values["targets"], *values["unjudged"]]
    if not all(type(number) is int for number in numbers) or not all(values["by"] in row for row in rows):
        raise ValueError("an index or a class is no integer, or the evidence that decided is missing")
    named = {*labels.tolist(), *corrected.values(), *values["targets"]}
    if classes != list(range(len(rows))) or not named <= {*classes}:
        raise ValueError(f"its classes are {classes!r:.60}, and a label or a target is none of them")
    if not all(type(row["images"]) is int and isinstance(row[values["by"]]["z"], int | float | None) for row in rows):
        raise ValueError("the numbers of a class are missing, or no numbers")
    if not {*corrected} <= {*suspects}:
        raise ValueError("a corrected label is of no suspect")
    verdict = Verdict(
        labels,
        tuple(values["targets"]),
        np.array(suspects, np.int64),
        corrected,
        rows,
        values["by"],
        tuple(values["unjudged"]),
        arrays.get("scores"),
        arrays.get("votes"),
        values["source"],
        values["found_by"],
        dict(values["names"]),
        values["label_key"],
        arrays.get("hashes"),
    )
    check_choice("by", verdict.by, evidence.KINDS)
    verdict.sanitation("keep")  # which checks the indices
    return verdict
