"""A sample that cannot be read is named: its index, its file, and the dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import ImageFolder

from purifyloader import PurifiedDataset, precompute, recipes
from purifyloader.datasets.named import ImageFiles
from purifyloader.datasets.sources import fetch
from purifyloader.errors import InputError

COUNT, BAD = 9, 5


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "a" / f"{number}.jpg")
    bad = tmp_path / "photos" / "a" / f"{BAD}.jpg"
    bad.write_bytes(bad.read_bytes()[:400])
    return tmp_path / "photos"


class Rows(Dataset[Any]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, index: int) -> Any:
        if index == BAD:
            raise self.error
        return np.full((8, 8, 3), index, np.uint8), index

    def __len__(self) -> int:
        return COUNT


class Batches(Rows):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


SOURCES: dict[str, Callable[[Path], tuple[Dataset[Any], str]]] = {
    "image folder": lambda folder: (ImageFolder(str(folder)), "item 5 of the ImageFolder, a/5.jpg"),
    "part of one": lambda folder: (Subset(ImageFolder(str(folder)), [8, 5]), "item 5 of the ImageFolder, a/5.jpg"),
    "two of them": lambda folder: (ConcatDataset([ImageFolder(str(folder))]), "item 5 of the ConcatDataset"),
    "rows": lambda folder: (Rows(ZeroDivisionError("no such row")), "item 5 of the Rows"),
    "key": lambda folder: (Rows(KeyError("label")), "item 5 of the Rows"),
    "batches": lambda folder: (Batches(ValueError("no such row")), "one of the items .* of the Batches"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_sample_that_cannot_be_read_is_named_and_keeps_its_error(photos: Path, name: str) -> None:
    dataset, words = SOURCES[name](photos)
    with pytest.raises(Exception, match=words) as caught:
        fetch(dataset, range(len(dataset)))  # type: ignore[arg-type]
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("cache", [False, True])
def test_whoever_purifies_is_told_too(photos: Path, name: str, cache: bool) -> None:
    dataset, words = SOURCES[name](photos)
    with pytest.raises(Exception, match=words):
        PurifiedDataset(dataset, recipes.jpeg(50), cache=photos.parent / "cache" if cache else None, progress=False)


def test_a_row_that_is_no_sample_is_named() -> None:
    rows = [(np.zeros((8, 8, 3), np.uint8), 0), None]
    with pytest.raises(InputError, match=r"Item 1 of the dataset: An image is PIL"):
        PurifiedDataset(rows, recipes.jpeg(50))


@pytest.mark.parametrize("out", ["cache", "b/cache", "a/../cache", ".cache"])
def test_a_cache_is_no_class_of_its_images(photos: Path, out: str) -> None:
    (photos / "a" / f"{BAD}.jpg").unlink()
    tree, files = ImageFolder(str(photos)), ImageFiles(photos)
    for dataset in (tree, Subset(tree, [0, 1])):
        with pytest.raises(InputError, match="A cache lies outside"):
            precompute(dataset, recipes.jpeg(50), photos / out, progress=False)
        with pytest.raises(InputError, match="A cache lies outside"):
            PurifiedDataset(dataset, recipes.jpeg(50), cache=photos / out, progress=False)
    assert [path.name for path in photos.iterdir()] == ["a"]
    assert len(precompute(tree, recipes.jpeg(50), photos.parent / "cache", progress=False)) == COUNT - 1
    # a folder without classes reads images alone
    assert len(precompute(files, recipes.jpeg(50), photos / out, progress=False)) == len(ImageFiles(photos))
