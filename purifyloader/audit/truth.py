"""Read which images are known to be poisoned: indices, or the files that the ranked list names."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from purifyloader.audit.energies import image_name
from purifyloader.datasets.select import read_indices
from purifyloader.errors import InputError

__all__ = ["read_poisoned"]


def read_poisoned(path: Path, dataset: Dataset[Any], what: str = "the data") -> list[int]:
    """Read rising indices of `dataset`, from a JSON list of indices or of file names, or from a file name a line.

    Args:
        what: name of the dataset in errors, such as "the data".

    Raises:
        InputError: no such list, one named twice, or one that is not in the dataset.
    """
    length = len(dataset)  # type: ignore[arg-type]
    named = _names(path)
    if named is None:
        indices = read_indices(path)
        if indices[-1] >= length:
            raise InputError(
                f"must be indices of the {length:,} images in {what}. Got {indices[-1]}.", argument="poisoned"
            )
        return indices
    if image_name(dataset, 0) is None:
        raise InputError(
            f"may name files where {what} is a folder of images. Got {named[0]!r:.80}, and images without "
            "file names: give a JSON list of indices from 0.",
            argument="poisoned",
        )
    known = {image_name(dataset, index): index for index in range(length)}
    if missing := [name for name in named if name not in known]:
        more = f", and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise InputError(
            f"must name images of {what} by their paths below its folder, as the ranked list does, such as "
            f"{next(iter(known))!r}. Got {missing[0]!r:.80}, which is none of them{more}.",
            argument="poisoned",
        )
    if len(set(named)) < len(named):
        first = next(name for name, count in Counter(named).items() if count > 1)
        raise InputError(f"must name each image once. Got {first!r} more than once: leave it out.", argument="poisoned")
    return sorted(known[name] for name in named)


def _names(path: Path) -> list[str] | None:
    """File names from a JSON list or one a line; None of anything else, which is for `read_indices` to judge."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    try:
        values = json.loads(text)
    except ValueError:
        # what begins like JSON was meant to be JSON
        values = [] if text.lstrip().startswith(("[", "{")) else [line for line in text.splitlines() if line.strip()]
    is_named = isinstance(values, list) and values and all(isinstance(value, str) for value in values)
    return values if is_named else None
