"""Load what a bench trains and tests on: two splits in memory, of a named set or of folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.core import noise
from purifyloader.datasets.arrays import as_arrays
from purifyloader.datasets.named import TORCHVISION, open_dataset, read_image
from purifyloader.datasets.names import DATA
from purifyloader.datasets.shards import load_sample
from purifyloader.errors import InputError

__all__ = ["Data", "load"]

_VALIDATION = ("test", "val", "valid", "validation")
_DRAW = {"train": 0, "test": 1}


@dataclass(frozen=True, eq=False)
class Data:
    """A `Data` is a training and a test split.

    Attributes:
        name: of `DATA`.
        train, test: images uint8 (N, H, W, 3).
        train_labels, test_labels: int64 (N,), in [0, classes).
        classes: how many.
        whole: (images, labels) of all training images that there were before some were chosen, in their order, and
            `chosen` their places, int64 (N,): a poison file is of all of them. None where `train` is whole.
    """

    name: str
    train: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    classes: int
    whole: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None
    chosen: NDArray[np.int64] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every image."""
        return self.train.shape[1], self.train.shape[2]

    def only(self, keep: NDArray[Any]) -> Data:
        """Keep some of the training images: bool (N,), or their places, rising."""
        chosen = np.arange(len(self.train)) if self.chosen is None else self.chosen
        whole = (self.train, self.train_labels) if self.whole is None else self.whole
        few = {"train": self.train[keep], "train_labels": self.train_labels[keep]}
        return replace(self, **few, whole=whole, chosen=chosen[keep])

    def some(self, train: int | None, test: int | None, seed: int = 0) -> Data:
        """Draw that many images of each split by `seed`, in their order; None for all."""
        rows = {}
        for split, count, images in (("train", train, self.train), ("test", test, self.test)):
            every = len(images)
            if count is not None and not 1 <= count <= every:
                raise InputError(f"{self.name} has {every} {split} images. Got {count}: ask for as many or fewer.")
            drawn = noise.uniform(noise.image_keys(seed, _DRAW[split], 0), (every,))[0].argsort(stable=True)
            rows[split] = drawn[:count].sort().values.numpy()
        v = rows["test"]
        found = self if train is None else self.only(rows["train"])
        return replace(found, test=self.test[v], test_labels=self.test_labels[v])


def load(name: str, root: str | Path) -> Data:
    """
    Args:
        name: "sample", the CIFAR-10 sample of this repository (`root` is its `examples/data`); "cifar10", "cifar100"
            in `root`; "tiny-imagenet", the folder as it is distributed; "imagefolder", a folder with `train` and
            `test` (or `val`), and in each one folder a class, all images of one size.

    Raises:
        InputError: nothing of that name, or not what it should be.
    """
    root = Path(root)
    if name == "sample":
        splits = load_sample(root, "train"), load_sample(root, "test")
        classes = 10
    elif name in TORCHVISION:
        found = [open_dataset(name, root, train) for train in (True, False)]
        splits = as_arrays(found[0]), as_arrays(found[1])
        classes = len(found[0].classes)  # type: ignore[attr-defined]
    elif name in ("tiny-imagenet", "imagefolder"):
        splits, classes = _folders(root, name == "tiny-imagenet")
    else:
        raise InputError(f"The data of a bench are {', '.join(DATA)}. Got {name!r}.")
    (train, train_labels), (test, test_labels) = splits
    if train.shape[1:] != test.shape[1:] or train.shape[3] != 3:
        raise InputError(
            f"Expected colour images of one size in both splits of {name}. Got {train.shape[1:]} and {test.shape[1:]}: "
            "resize them first."
        )
    return Data(name, train, train_labels, test, test_labels, classes)


_Split = tuple[NDArray[np.uint8], NDArray[np.int64]]


def _folders(root: Path, tiny: bool) -> tuple[tuple[_Split, _Split], int]:
    test = next((root / name for name in _VALIDATION if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise InputError(
            f"Expected the folders train and one of {', '.join(_VALIDATION)} in {root}. Got "
            f"{sorted(p.name for p in root.iterdir())[:8] if root.is_dir() else 'no such folder'}."
        )
    train: Any = open_dataset("imagefolder", root / "train")
    if tiny and (root / "val" / "val_annotations.txt").is_file():
        return (as_arrays(train), _tiny_validation(root / "val", train.class_to_idx)), len(train.classes)
    other: Any = open_dataset("imagefolder", test)
    if other.classes != train.classes:
        differ = sorted(set(train.classes) ^ set(other.classes))
        raise InputError(f"Expected the same classes in train and {test.name}. Got {differ[:5]} in one of them only.")
    return (as_arrays(train), as_arrays(other)), len(train.classes)


def _tiny_validation(folder: Path, numbers: dict[str, int]) -> _Split:
    """Tiny-ImageNet keeps all validation images in one folder, and their classes in a table."""
    table = folder / "val_annotations.txt"
    images, labels = [], []
    for line in table.read_text(encoding="utf-8").splitlines():
        name, wnid = [*line.split("\t"), ""][:2]
        if wnid not in numbers:
            raise InputError(f"{table} must name an image and a class of train a line. Got {line[:60]!r}.")
        images.append(np.asarray(read_image(folder / "images" / name)))
        labels.append(numbers[wnid])
    if len({image.shape for image in images}) != 1:
        raise InputError(f"Expected images of one size, at least one, in {table}. Got {len(images)} images.")
    return as_arrays((np.stack(images), np.asarray(labels)))
