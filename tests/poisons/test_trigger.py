"""A back door by a trigger: the units of the published file, which images get it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from purifyloader.errors import InputError
from purifyloader.poisons import add_trigger, backdoor, read_trigger

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 8, 8, 3), np.uint8)
LABELS = np.arange(40) % 4
PUBLISHED = (RNG.choice([-1, 1], (1, 3, 8, 8)) * 32 / 255).astype(np.float32)  # +-32/255 in [-1, 1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.save(tmp_path / "trigger.npy", PUBLISHED)
    return tmp_path / "trigger.npy"


def test_the_published_units_are_halved(file):
    trigger = read_trigger(file)
    assert trigger.shape == (8, 8, 3)
    assert trigger.dtype == torch.float32
    np.testing.assert_allclose(255 * trigger.numpy(), 127.5 * PUBLISHED[0].transpose(1, 2, 0), rtol=1e-6)
    assert float((255 * trigger).abs().max()) == pytest.approx(16)


def test_a_trigger_is_added_and_saturates(file):
    trigger = read_trigger(file)
    got = add_trigger(IMAGES, trigger, 0.5)
    want = np.clip(IMAGES + np.rint(255 * 0.5 * trigger.numpy()), 0, 255)
    np.testing.assert_array_equal(got, want.astype(np.uint8))
    as_tensor = add_trigger(torch.from_numpy(IMAGES), trigger, 0.5)
    np.testing.assert_array_equal(as_tensor.numpy(), got)


def test_a_back_door_is_in_so_many_images_of_the_class_and_in_no_other(file):
    trigger = read_trigger(file)
    poisoned, chosen = backdoor(IMAGES, LABELS, trigger, target=2, count=4)
    changed = np.flatnonzero((poisoned != IMAGES).any((1, 2, 3)))
    np.testing.assert_array_equal(chosen, changed)
    assert len(chosen) == 4
    assert set(LABELS[chosen]) == {2}
    np.testing.assert_array_equal(poisoned[chosen], add_trigger(IMAGES, trigger)[chosen])
    np.testing.assert_array_equal(backdoor(IMAGES, LABELS, trigger, 2, 4)[1], chosen)
    assert not np.array_equal(backdoor(IMAGES, LABELS, trigger, 2, 4, seed=1)[1], chosen)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), "not all zero"),
        (32 * np.ones((1, 3, 8, 8), np.float32), r"Got 32.0 .*divide numbers"),
        (np.ones((1, 3, 8, 8), np.int64), "floating-point"),
        (np.ones((2, 3, 8, 8), np.float32), "one trigger. Got 2"),
        (np.ones((8, 8, 3), np.float32), "shape"),
        (np.array([{}], dtype=object), "Python objects"),
        (b"no array", "is a .npy file"),
    ],
)
def test_files_that_are_no_trigger(content: Any, word: str, tmp_path):
    path = tmp_path / "trigger.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(InputError, match=word):
        read_trigger(path)
    with pytest.raises(InputError, match="Got"):
        read_trigger(tmp_path / "missing.npy")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"count": 0}, "from 1 to the 10 images"),
        ({"count": 11}, "from 1 to the 10 images"),
        ({"target": 9, "count": 1}, "from 1 to the 0 images of the class 9"),
        ({"labels": LABELS[:5]}, "one label an image"),
        ({"trigger_HWC": torch.zeros(4, 4, 3)}, "shape of the images"),
        ({"images": IMAGES.astype(np.float32)}, "uint8"),
    ],
)
def test_bad_arguments_are_named(changes, word, file):
    arguments = {"images": IMAGES, "labels": LABELS, "trigger_HWC": read_trigger(file), "target": 2, "count": 3}
    with pytest.raises(InputError, match=word):
        backdoor(**{**arguments, **changes})
