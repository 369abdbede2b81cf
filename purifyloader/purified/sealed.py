"""Show of a loader what cannot lead past the purifier: numbers, names, labels and samplers, but no images.

Frameworks rebuild loaders from their attributes, to go on in mid-epoch or to share the data out. What they build from a
`PurifiedLoader` reads a `Sealed` dataset, and so ends in an error in place of images that nobody purified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from purifyloader.errors import InputError

_PLAIN = (bool, int, float, complex, str, type(None), torch.device, torch.dtype, torch.Generator)
_FEW = 64  # entries that are all looked at
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


class SealedSampler(Sampler[Any]):
    """A sampler of such a loader: its indices, `set_epoch` and numbers, but not the dataset that it was made of."""

    def __init__(self, sampler: Any) -> None:
        self.__dict__["_sampler"] = sampler

    def __iter__(self) -> Iterator[Any]:
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if "_sampler" not in self.__dict__ or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return shown(self._sampler, name, "sampler inside a PurifiedLoader")

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._sampler, name, value)


def shown(holder: Any, name: str, what: str) -> Any:
    """Return an attribute that holds no images, a dataset or sampler sealed; refuse others with an `AttributeError`.

    A method is given, and refuses with an `InputError` to return what may hold images.
    """
    value = getattr(holder, name)
    if _holds_no_images(value):
        return value
    if isinstance(value, Dataset) or name == "dataset":
        return Sealed(value)
    if isinstance(value, Sampler) or name in ("sampler", "batch_sampler"):
        return SealedSampler(value)
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
    if isinstance(value, list | tuple):  # of long ones, of labels or paths, a few say what they hold
        return all(_holds_no_images(part) for part in value[:: 1 + len(value) // _FEW])
    if isinstance(value, set | frozenset):
        return all(_holds_no_images(part) for part in value)
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim < 2 and value.dtype != np.dtype(object)
    return isinstance(value, (*_PLAIN, np.generic))
