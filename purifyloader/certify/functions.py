"""Training functions of the user's: what they take and return, how they are found by name, and what identifies them."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from purifyloader.datasets.named import find_named
from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json

__all__ = ["DenoisedSet", "Predictor", "Train", "named_training", "training_settings"]

Predictor = Callable[[Tensor], Any]
"""images float32 (B, C, H, W) in [0, 1] -> class numbers, integers (B,), or logits, floats (B, K)."""

Train = Callable[["DenoisedSet", int], Predictor]
"""(training set, seed) -> predictor: the user's own training, or `purifyloader.certify.training.Training`."""


class DenoisedSet(Dataset[Any]):
    """A training set after noising and denoising, in the form of torchvision's CIFAR10.

    Attributes:
        data: uint8 (N, H, W, C).
        targets: list of N class numbers.
        classes: how many there are.
        transform: of a PIL image, for `dataset[i]`; None, and yours to set.

    >>> import numpy as np
    >>> from purifyloader.certify import DenoisedSet
    >>> dataset = DenoisedSet(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], classes=2)
    >>> image, label = dataset[1]
    >>> image.size, label
    ((8, 8), 1)
    """

    def __init__(self, data: NDArray[np.uint8], targets: Sequence[int], classes: int) -> None:
        self.data, self.targets, self.classes = data, list(targets), classes
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return (image, class): a PIL image, or what `transform` makes of it."""
        image = self.data[index]
        picture: Any = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        return (picture if self.transform is None else self.transform(picture)), self.targets[index]


def named_training(spec: str) -> Train:
    """Find the user's training function by its name, "package.module:function".

    `find_named` puts the working directory at the end of `sys.path`: a module of the user's own is found there, and
    hides none that is installed.
    """
    module, _, name = spec.partition(":")
    if not module or not name or module.startswith("."):  # a path, or relative to nothing
        raise InputError(
            f"Expected a training function as package.module:function. Got {spec!r}: give one of (training set, seed) "
            "that returns a predictor."
        )
    train: Train = find_named(module, name)
    if not callable(train):
        raise InputError(f"Expected {spec!r} to be a function of (training set, seed). Got {type(train).__name__}.")
    return train


def training_settings(train: Train) -> dict[str, Any]:
    """Identify a training as JSON: by its own `settings()`, or by its name and the hash of the file that it is in.

    Only that file is looked at: what it imports, or reads, may change unnoticed. A `functools.partial` is its function
    and its arguments; of an object that can be called, the file is that of its class, and its attributes count. So
    do a function's default arguments and what it encloses. Without a file, its byte code stands for it.
    """
    function: Any = train
    if callable(settings := getattr(function, "settings", None)):
        return dict(settings())
    if isinstance(function, functools.partial):
        arguments = [_as_json(function.args), _as_json(function.keywords)]
        return {**training_settings(function.func), "arguments": arguments}
    is_named = hasattr(function, "__qualname__")
    name = function.__qualname__ if is_named else type(function).__name__
    parts = {
        "defaults": [*(getattr(function, "__defaults__", None) or ())],
        "keywords": getattr(function, "__kwdefaults__", None) or {},
        "enclosed": [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)],
        "attributes": {} if is_named else getattr(function, "__dict__", {}),
    }
    source: bytes | None
    try:
        source = Path(inspect.getfile(function if is_named else type(function))).read_bytes()
    except (TypeError, OSError):  # built in, or of an interactive session
        code = getattr(function, "__code__", None)
        source = None if code is None else _code(code).encode()
    return {
        "function": f"{getattr(function, '__module__', '?')}:{name}",
        "source_sha256": None if source is None else hashlib.sha256(source).hexdigest(),
        **{key: _as_json(value) for key, value in parts.items() if value},
    }


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a name that has no value yet
        return False


def _code(code: types.CodeType) -> str:
    """Byte code with its names and constants, without where it was written."""
    constants = [_code(value) if isinstance(value, types.CodeType) else repr(value) for value in code.co_consts]
    return repr((code.co_code, code.co_names, constants))


def _as_json(value: Any) -> Any:
    """Return a value as JSON, or its type; of lists, dicts and functions, that of their parts."""
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _as_json(part) for key, part in value.items()}
    if inspect.isfunction(value):
        code_sha256 = hashlib.sha256(_code(value.__code__).encode()).hexdigest()
        return {"function": value.__qualname__, "code_sha256": code_sha256}
    try:
        canonical_json(value)
    except (TypeError, ValueError):
        return {"type": f"{type(value).__module__}:{type(value).__qualname__}"}
    return value
