"""Samples of a cache that are not as its headers say are one error, with corrected labels and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader import PurifiedDataset, precompute
from purifyloader.cache import CacheReader
from purifyloader.errors import PurifyError
from purifyloader.purified.sanitation import Sanitation
from purifyloader.purifiers import Jpeg

SAMPLES: dict[str, list[Any]] = {
    "pairs": [(Image.new("RGB", (6, 6)), i) for i in range(3)],
    "lists": [[Image.new("RGB", (6, 6)), i, "x"] for i in range(3)],
    "dicts": [{"image": Image.new("RGB", (6, 6)), "label": i} for i in range(3)],
    "narrow labels": [(Image.new("RGB", (6, 6)), np.uint8(i)) for i in range(3)],
    "tensors": [(Image.new("RGB", (6, 6)), torch.tensor(i, dtype=torch.uint8)) for i in range(3)],
}
STRUCTURES: list[dict[str, Any]] = [
    {"type": "tuple", "image": 0, "fields": 100_000},
    {"type": "tuple", "image": 1, "fields": 3},
    {"type": "list", "image": 0, "fields": 1},
    {"type": "list", "image": 8, "fields": 9},
    {"type": "dict", "image": "image"},
    {"type": "dict", "image": "label"},
    {"type": "dict", "image": 0},
]


@pytest.mark.parametrize("name", SAMPLES)
def test_another_structure_is_one_error_or_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"image_key": "image"} if name == "dicts" else {}
    precompute(SAMPLES[name], Jpeg(50), tmp_path, progress=False, **key)  # type: ignore[arg-type]
    refused = 0
    for structure in [*STRUCTURES, {"type": "image"}]:
        monkeypatch.setattr(CacheReader, "sample", property(lambda reader, structure=structure: structure))
        for sanitation in (None, Sanitation(3, labels={1: 2}), Sanitation(3, suspects=(0,), labels={2: 999})):
            try:
                _ = PurifiedDataset.from_cache(tmp_path, sanitation=sanitation)[1]
            except PurifyError:
                refused += 1
    assert refused


@pytest.mark.parametrize("name", ["narrow labels", "tensors"])
@pytest.mark.parametrize("label", [256, 10**6, 2**62])
def test_a_label_that_the_stored_one_has_no_room_for(name: str, label: int, tmp_path: Path) -> None:
    precompute(SAMPLES[name], Jpeg(50), tmp_path, progress=False)
    with pytest.raises(PurifyError, match="with a corrected label"):
        PurifiedDataset.from_cache(tmp_path, sanitation=Sanitation(3, labels={0: label}))
