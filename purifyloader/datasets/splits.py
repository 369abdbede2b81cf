"""Load what a bench trains and tests on: two splits in memory, of a named set or of folders."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import webdataset
from numpy.typing import NDArray

from purifyloader.core import noise
from purifyloader.core.checks import as_path, stored_integer
from purifyloader.core.decoding import opened_image
from purifyloader.datasets import DATA
from purifyloader.datasets.arrays import as_arrays
from purifyloader.datasets.folders import files_below
from purifyloader.datasets.named import META, TORCHVISION, open_dataset, read_image, warn_of_others
from purifyloader.errors import InputError
from purifyloader.files.json import read_text
from purifyloader.files.opening import UNPACKED, UNPACKED_A_BYTE, opened
from purifyloader.files.tars import TAR_ERRORS, opened_tar, split_name

_VALIDATION = ("test", "val", "valid", "validation")
_LONGEST_LABEL = 10_000  # bytes
_DRAW = {"train": 0, "test": 1}
_Split = tuple[NDArray[np.uint8], NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Data:
    """A training and a test split."""

    name: str  # of `DATA`
    train: NDArray[np.uint8]  # (N, H, W, 3)
    train_labels: NDArray[np.int64]  # (N,), in [0, classes)
    test: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    classes: int
    # Images and labels of all training images that there were before some were chosen, for a poison file is of all of
    # them, and the places of the chosen, int64 (N,); None where `train` is whole.
    whole: _Split | None = None
    chosen: NDArray[np.int64] | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.train.shape[1], self.train.shape[2]  # (H, W) of every image

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
        chosen, v = self if train is None else self.only(rows["train"]), rows["test"]
        return replace(chosen, test=self.test[v], test_labels=self.test_labels[v])


def load(name: str, root: str | Path) -> Data:
    """Load the splits of one of `DATA`, or raise `InputError`.

    "sample" is the CIFAR-10 sample of this repository (`root` is its `examples/data`); "tiny-imagenet" the folder as it
    is distributed; "imagefolder" a folder with `train` and `test` (or `val`), in each one folder a class, all images of
    one size.
    """
    root = as_path(root)
    if name == "sample":
        splits, classes = (load_sample(root, "train"), load_sample(root, "test")), 10
    elif name in TORCHVISION:
        training, testing = (open_dataset(name, root, train) for train in (True, False))
        splits, classes = (as_arrays(training), as_arrays(testing)), len(training.classes)  # type: ignore[attr-defined]
    elif name in ("tiny-imagenet", "imagefolder"):
        splits, classes = _folders(root, name == "tiny-imagenet")
    else:
        raise InputError(f"The data of a bench are {', '.join(DATA)}. Got {name!r}.")
    (train, train_labels), (test, test_labels) = splits
    if train.shape[1:] != test.shape[1:] or train.shape[3] != 3:
        raise InputError(
            f"Both splits of {name} must hold colour images of one size. Got {train.shape[1:]} and {test.shape[1:]}. "
            "Resize them first."
        )
    return Data(name, train, train_labels, test, test_labels, classes)


def _folders(root: Path, tiny: bool) -> tuple[tuple[_Split, _Split], int]:
    test = next((root / name for name in _VALIDATION if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise InputError(
            f"{root} must hold the folders train and one of {', '.join(_VALIDATION)}. Got "
            f"{sorted(p.name for p in root.iterdir())[:8] if root.is_dir() else 'no such folder'}."
        )
    train: Any = open_dataset("imagefolder", root / "train")
    if tiny and (root / "val" / "val_annotations.txt").is_file():
        return (as_arrays(train), _tiny_validation(root / "val", train.class_to_idx)), len(train.classes)
    other: Any = open_dataset("imagefolder", test)
    if other.classes != train.classes:
        differ = sorted(set(train.classes) ^ set(other.classes))
        raise InputError(f"train and {test.name} must have the same classes. Got {differ[:5]} in one of them only.")
    return (as_arrays(train), as_arrays(other)), len(train.classes)


def _tiny_validation(folder: Path, numbers: dict[str, int]) -> _Split:
    """Read all validation images from the one folder of Tiny-ImageNet, and their classes from its table."""
    table = folder / "val_annotations.txt"
    images, labels = [], []
    try:
        lines = read_text(table).splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{table} must be a text that can be read. Got: {error}. Fetch it again.") from None
    for line in lines:
        name, wnid = [*line.split("\t"), ""][:2]
        if wnid not in numbers:
            raise InputError(f"{table} must name an image and a class of train a line. Got {line[:60]!r}.")
        images.append(np.asarray(read_image(folder / "images" / name)))
        labels.append(numbers[wnid])
    named = {folder / "images" / line.partition("\t")[0] for line in lines}
    warn_of_others(folder, sorted({*files_below(folder)} - {table, *named}), f"those that {table.name} names are")
    if len({image.shape for image in images}) != 1:
        raise InputError(f"The images of {table} must be of one size, at least one. Got {len(images)} images.")
    return as_arrays((np.stack(images), np.asarray(labels)))


def shards(folder: str | Path, split: str) -> list[Path]:
    """List the files `<split>-000000.tar` or `.tar.gz` and on of a folder, in order; `InputError` if one is missing."""
    folder = as_path(folder)
    if not folder.is_dir():
        raise InputError(
            f"There is no folder {folder}, where the shards of the sample should be. The sample is in examples/data of "
            "the project's repository, and not in the installed package: give that folder as root."
        )
    paths = sorted(path for path in folder.glob(f"{split}-*.tar*") if path.name.endswith((".tar", ".tar.gz")))
    if not paths:
        raise InputError(f"{folder} must hold shards named {split}-000000.tar.gz and on. Got none.")
    for number, path in enumerate(paths):
        if path.name.split(".")[0] != f"{split}-{number:06d}":
            raise InputError(f"Shard {split}-{number:06d} must come next in {folder}. Got {path.name}.")
    return paths


def _unpacked(file: BinaryIO) -> bytes:
    most = UNPACKED // 2 + UNPACKED_A_BYTE * os.fstat(file.fileno()).st_size  # it is held twice for a moment
    content = bytearray()
    with gzip.open(file) as stream:
        while chunk := stream.read(1 << 20):
            content += chunk
            if len(content) > most:
                raise EOFError(f"it unpacks to more than {most:,} bytes")
    return bytes(content)


def _tar_bytes(path: Path) -> bytes:
    """Return the whole uncompressed tar, complete or an error: a stream reader takes some cut files for whole."""
    try:
        with opened(path) as file:
            content = _unpacked(file) if path.name.endswith(".gz") else file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} must be a whole gzip file; fetch it again. Got: {error}") from error
    if not content.endswith(bytes(2 * tarfile.BLOCKSIZE)):
        raise InputError(f"{path} must be a whole tar file; fetch it again. Got {len(content)} bytes, cut off.")
    return content


def _members(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar as WebDataset does, whose own reader would unpack a tar that looks like gzip, too."""
    with opened_tar(io.BytesIO(content)) as tar:
        for member in tar:
            if not member.isreg() or META.match(member.name):
                continue
            if member.name.endswith(".cls") and member.size > _LONGEST_LABEL:
                raise tarfile.ReadError(f"{member.name} of {member.size:,} bytes")
            data = tar.extractfile(member)
            assert data is not None
            yield {"fname": member.name, "data": data.read(), "__url__": str(path)}


def samples_of(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar as WebDataset does, from members that were checked."""
    files = _members(path, content)
    yield from webdataset.tariterators.group_by_keys(files, keys=lambda name: split_name(name) or (None, None))


def _label(path: Path, sample: dict[str, Any]) -> int:
    return stored_integer(f"{path}: {sample['__key__']}.cls", sample["cls"])


def _decode(path: Path, sample: dict[str, Any]) -> tuple[str, NDArray[np.uint8], int]:
    key = sample["__key__"]
    try:
        with opened_image(io.BytesIO(sample["png"])) as image:
            return key, np.asarray(image.convert("RGB")), _label(path, sample)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path}: sample {key} must have members .png and .cls. Got no {error}.") from error
    except Exception as error:  # what Pillow's decoders raise on damaged files is not a closed list
        raise InputError(f"{path}: sample {key} cannot be read. Got: {error}") from error


def load_sample(folder: str | Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Load images uint8 (N, H, W, 3) and labels int64 (N,) of a split, "train" or "test", sorted by key.

    The folder holds `<split>-000000.tar.gz` and on, with members `<key>.png` and `<key>.cls` (in `examples/data` the
    key is CIFAR-10's row). Raises `InputError` for a folder or shard that is missing, cut short or damaged.
    """
    rows: list[tuple[str, NDArray[np.uint8], int]] = []
    for path in shards(folder, split):
        content = _tar_bytes(path)
        try:
            rows += [_decode(path, sample) for sample in samples_of(path, content)]
        except InputError:
            raise
        except TAR_ERRORS as error:
            raise InputError(f"{path} must be a whole tar file of samples; fetch it again. Got: {error}") from error
    rows.sort(key=lambda row: row[0])
    if not rows or len({row[1].shape for row in rows}) != 1:
        shapes = sorted({row[1].shape for row in rows})
        raise InputError(f"The {split} images in {folder} must be of one size, at least one. Got {shapes}.")
    return np.stack([row[1] for row in rows]), np.asarray([row[2] for row in rows], np.int64)
