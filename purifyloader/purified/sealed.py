"""Show of a loader what cannot lead past the purifier: numbers, names, labels and samplers, but no images.

Frameworks rebuild loaders from their attributes, to go on in mid-epoch or to share the data out. What they build from a
`PurifiedLoader` reads a `Sealed` dataset, and so ends in an error in place of images that nobody purified.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from purifyloader.errors import InputError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.device, torch.dtype, torch.Generator, Sampler)
_REMEDY = (
    "Do that to the loader first, and wrap what comes out: PurifiedLoader(prepared_loader, purifier). Or purify what "
    "it reads: DataLoader(PurifiedDataset(dataset, purifier))."
)


class Sealed(Dataset[Any]):
    """The dataset of a loader whose batches are purified: its length and labels, and an error in place of a sample."""

    def __init__(self, dataset: Any) -> None:
        self.__dict__["_dataset"] = dataset

    def _refuse(self, *_: object) -> NoReturn:
        raise InputError(
            "The dataset inside a PurifiedLoader gives no samples: they would not be purified. Got a loader that was "
            f"built anew from its attributes. {_REMEDY}"
        )

    __getitem__ = __getitems__ = __iter__ = _refuse

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if "_dataset" not in self.__dict__ or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return shown(self._dataset, name, "dataset inside a PurifiedLoader")


def shown(holder: Any, name: str, what: str) -> Any:
    """Return an attribute that holds no images, a dataset `Sealed`; refuse any other with an `AttributeError`.

    A method is given, and refuses with an `InputError` to return what may hold images.
    """
    value = getattr(holder, name)
    if _holds_no_images(value):
        return value
    if isinstance(value, Dataset) or name == "dataset":
        return Sealed(value)
    if callable(value):
        return _Method(value, name, what)
    raise AttributeError(
        f"The {what} does not show its {name!r}, by which images could come that are not purified. {_REMEDY}"
    )


class _Method:
    def __init__(self, function: Callable[..., Any], name: str, what: str) -> None:
        self.function, self.name, self.what = function, name, what

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        result = self.function(*arguments, **named)
        if _holds_no_images(result):
            return result
        raise InputError(
            f"{self.name}() of the {self.what} returns what could give images that are not purified. Got a "
            f"{type(result).__name__}. {_REMEDY}"
        )


def _holds_no_images(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_holds_no_images(part) for part in (*value, *value.values()))
    if isinstance(value, list | tuple | set | frozenset):  # of long ones the first says what they hold
        return all(_holds_no_images(part) for part in [*value][:3])
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim < 2
    return isinstance(value, (*_PLAIN, np.generic))
