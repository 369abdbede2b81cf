"""Name what a pass over a dataset found wrong with it: images under suspicion, and labels that ought to be others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from purifyloader.cache import format as fmt
from purifyloader.cache.reader import Targets
from purifyloader.datasets.samples import ImageKey, assemble, fields, get_image, label_place, with_image
from purifyloader.datasets.sources import Source
from purifyloader.errors import ConfigError, InputError
from purifyloader.files.hashes import hashes_of_text, source_hashes

_SCHEMA = 1
_LOOKED_AT = 64  # suspects that are compared with a dataset's images


@dataclass(frozen=True)
class Sanitation:
    """A plan that names suspects and corrects labels, for `PurifiedDataset` and `precompute`.

    A corrected label replaces that of its sample, wherever the sample is read. Suspects are left out of the dataset
    where `drop` says so; otherwise they stay in it, and are only named here. Indices are those of the source. A cache
    holds every image and the labels of the source, and so one finding can take the place of another.

    Args:
        images: number of images of the dataset that was looked at.
        suspects: indices of images under suspicion.
        labels: corrected labels, by index. One of a suspect that is dropped is not used.
        drop: leave the suspects out.
        label_key: where the label is in a sample; by default the first field of a tuple beside the image, or "label"
            of a dict.
        source: identity of the dataset, as `CacheReader.identity["source"]` has it; a cache of another dataset then
            refuses the sanitation.
        found_by: how it was found, such as the method and its settings, as a JSON object.
        hashes: of the suspects' images, as `purifyloader.files.hashes` writes them; a dataset in which some of these
            are others is refused.

    Raises `InputError` for an index outside the dataset, a label that is no integer, or nothing left; `ConfigError`
    where `found_by` or `source` is no JSON object.

    >>> from purifyloader import plans
    >>> finding = plans.Sanitation(4, suspects=[2], labels={0: 7}, found_by={"method": "votes"})
    >>> finding.kept.tolist(), finding == plans.Sanitation.from_dict(finding.to_dict())
    ([0, 1, 3], True)
    """

    images: int
    suspects: Sequence[int] = ()
    labels: Mapping[int, int] = field(default_factory=dict)
    drop: bool = True
    label_key: ImageKey = None
    source: Mapping[str, Any] | None = None
    found_by: Mapping[str, Any] = field(default_factory=dict)
    hashes: str | None = None

    def __post_init__(self) -> None:
        numbers = [self.images, *self.suspects, *self.labels, *self.labels.values()]
        if not all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in numbers):
            raise InputError("The numbers, indices and labels of a sanitation are integers. Convert them by int().")
        suspects = tuple(sorted({int(i) for i in self.suspects}))
        labels = {int(i): int(self.labels[i]) for i in sorted(self.labels)}
        for index in (*suspects, *labels):
            if not 0 <= index < self.images:
                raise InputError(f"A sanitation of {self.images} images has index {index}, which is outside of them.")
        if self.drop and len(suspects) == self.images:
            raise InputError(f"A sanitation drops all {self.images} images. Leave some, or give drop=False.")
        if self.hashes is not None and len(hashes_of_text(self.hashes)) != len(suspects):
            raise InputError(f"A sanitation has a hash for each of {len(suspects)} suspects. Got another number.")
        values = {
            "images": int(self.images),
            "suspects": suspects,
            "labels": labels,
            "source": None if self.source is None else fmt.plain("The source of a sanitation", self.source),
            "found_by": fmt.plain("found_by", self.found_by),
        }
        self.__dict__.update(values)

    @property
    def kept(self) -> NDArray[np.int64]:
        """Indices in the source of the samples that stay, int64 (K,)."""
        keep = np.ones(self.images, bool)
        if self.drop:
            keep[list(self.suspects)] = False
        return np.flatnonzero(keep)

    def to_dict(self) -> dict[str, Any]:
        """Return the sanitation as a JSON object, as the plan of a cache holds it (cache/README.md)."""
        return {
            "schema": _SCHEMA,
            "images": self.images,
            "suspects": list(self.suspects),
            "labels": [[index, label] for index, label in self.labels.items()],
            "drop": self.drop,
            "label_key": self.label_key,
            "source": self.source,
            "found_by": self.found_by,
            **({} if self.hashes is None else {"hashes": self.hashes}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` gives; `ConfigError` where it is damaged, or of a newer schema."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"A sanitation is a JSON object. Got {values!r:.80}. Make it again.")
        if values.get("schema") != _SCHEMA:
            raise ConfigError(
                f"The sanitation has schema {values.get('schema')!r}, and this purifyloader reads {_SCHEMA}. Use the "
                "version that wrote it."
            )
        try:
            rest = {key: value for key, value in values.items() if key not in ("schema", "labels")}
            return cls(**rest, labels=dict(values["labels"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"The sanitation is damaged: {error!r}. Make it again.") from None

    def in_words(self) -> str:
        """Describe it in one line."""
        what = "dropped" if self.drop else "flagged"
        method = self.found_by.get("method")
        by = f", found by {method}" if isinstance(method, str) else ""
        return f"{len(self.suspects):,} of {self.images:,} images {what}, {len(self.labels):,} labels corrected{by}"

    def check_length(self, length: int) -> None:
        """Refuse a dataset of another length."""
        if length != self.images:
            raise InputError(
                f"The sanitation is of {self.images} images and the dataset has {length}. Give the dataset that it was "
                "found in."
            )

    def check_images(self, images: Callable[[Sequence[int]], Sequence[Any]]) -> None:
        """Refuse a dataset in which some of the suspects are other images; `images` reads those at positions."""
        if self.hashes is None or not self.suspects:
            return
        some = np.unique(np.linspace(0, len(self.suspects) - 1, min(_LOOKED_AT, len(self.suspects)), dtype=np.int64))
        positions = [self.suspects[i] for i in some]
        found = source_hashes([np.asarray(i) if isinstance(i, Image.Image) else i for i in images(positions)])[:, 0]
        if not np.array_equal(found, hashes_of_text(self.hashes)[some]):
            first = positions[int((found != hashes_of_text(self.hashes)[some]).argmax())]
            raise InputError(
                "The sanitation was found in another dataset, or in another order of it. Got another image at "
                f"{first}: give the dataset that was sanitized, or sanitize this one."
            )

    def corrected(self, index: int, sample: Any, image_key: ImageKey) -> Any:
        """Correct the label of sample `index` of the source, in the type that the label had."""
        if (label := self.labels.get(index)) is None:
            return sample
        key = label_place(sample, image_key, self.label_key)
        return with_image(sample, _like(sample[key], label), key)

    def corrected_fields(self, stored: Targets, structure: Mapping[str, Any]) -> Targets:
        """Correct the labels in the fields of all samples; `structure` says how a sample is put together."""
        image_key = structure.get("image")
        changed = {
            index: fields(self.corrected(index, assemble(structure, stored[index], None), image_key), image_key)
            for index in self.labels
        }
        return stored.replaced(changed)

    def of_targets(self, targets: Sequence[Any]) -> list[Any]:
        """Make all labels of the source those of the dataset: corrected, and without the images that are dropped."""
        return [_like(targets[i], self.labels[i]) if i in self.labels else targets[i] for i in self.kept.tolist()]


def check_sanitation(sanitation: Any, source: Source, image_key: ImageKey) -> None:
    """Refuse what is no sanitation, or one of another dataset."""
    if sanitation is None:
        return
    if not isinstance(sanitation, Sanitation):
        raise InputError(
            "sanitation must be a `plans.Sanitation`, as `verdict.sanitation()` gives. Got "
            f"{type(sanitation).__name__}."
        )
    sanitation.check_length(len(source))
    sanitation.check_images(lambda positions: [get_image(sample, image_key) for sample in source.fetch(positions)])


def _like(old: Any, label: int) -> Any:
    if isinstance(old, Tensor):
        return torch.full_like(old, label)
    if isinstance(old, np.ndarray):
        return np.full_like(old, label)
    return old.dtype.type(label) if isinstance(old, np.generic) else label
