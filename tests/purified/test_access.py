"""A dataset whose items are had by index is taken, whatever else it can do; one that is only iterated is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from purifyloader import PurifiedDataset, precompute, recipes
from purifyloader.errors import InputError

IMAGES = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Both(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(3))

    def __getitem__(self, index: int) -> Any:
        return IMAGES[index], index

    def __len__(self) -> int:
        return 3


class Below(Both):
    """Has all of it from its base."""


class MapAndIterate(Dataset):
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("not asked for")

    def __getitem__(self, index: int) -> Any:
        return IMAGES[index], index

    def __len__(self) -> int:
        return 3


class Plain:
    def __getitem__(self, index: int) -> Any:
        return IMAGES[index], index

    def __len__(self) -> int:
        return 3


def hugging_face() -> Any:
    items = {"image": [image.tolist() for image in IMAGES], "label": [0, 1, 2]}
    return datasets.Dataset.from_dict(items).with_format("torch")


@pytest.mark.parametrize("make", [Both, Below, MapAndIterate, Plain, hugging_face, lambda: list(Plain())])
def test_random_access_counts(make: Any, tmp_path: Path) -> None:
    dataset = PurifiedDataset(make(), recipes.jpeg(50))
    assert len(dataset) == 3
    assert len(precompute(make(), recipes.jpeg(50), tmp_path, progress=False)) == 3


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(IMAGES)


class StreamOfALength(Stream):
    def __len__(self) -> int:
        return 3


class NoLength(Dataset):
    def __getitem__(self, index: int) -> Any:
        return IMAGES[index]


class Nothing(Dataset):
    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("make", [Stream, StreamOfALength, NoLength, Nothing, lambda: iter(IMAGES)])
def test_what_is_only_iterated_is_refused(make: Any) -> None:
    with pytest.raises(InputError, match="__getitem__ and __len__"):
        PurifiedDataset(make(), recipes.jpeg(50))
