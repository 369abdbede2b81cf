"""Which images are poisoned, and what a target is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader.errors import ConfigError, InputError
from purifyloader.poisons.attacks.choice import as_target, drawn, how_many, is_class, of_class
from purifyloader.poisons.poisoned import Target

LABELS = np.arange(40) % 4
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def test_how_many():
    assert how_many(40, None, None, "them") is None
    assert how_many(40, 0.25, None, "them") == 10
    assert how_many(40, 0.001, None, "them") == 1
    assert how_many(40, None, 40, "them") == 40
    with pytest.raises(ConfigError, match="not both"):
        how_many(40, 0.5, 3, "them")
    for share, count in ((0, None), (1.1, None), (True, None), (None, 41), (None, 0), (None, 2.0)):
        with pytest.raises(InputError, match="them"):
            how_many(40, share, count, "them")


def test_of_a_class():
    assert of_class(LABELS, 1, 0.1, None) == 4  # of the set
    assert of_class(LABELS, 1, 0.5, None, "class") == 5
    assert of_class(LABELS, np.int64(1), None, 3) == 3
    assert of_class(LABELS, 1, None, None, default=7) == 7
    assert of_class(LABELS, 1, None, None, default=70) == 10, "all that there are"
    for bad in (4, -1, True, 1.0, "1", None):
        with pytest.raises(InputError, match=r"one of the classes 0 to 3 that has images\. Got"):
            of_class(LABELS, bad, None, 3)
    with pytest.raises(InputError, match="no more than the 10 images of class 1"):
        of_class(LABELS, 1, 0.5, None)
    with pytest.raises(InputError, match="share_of must be set or class"):
        of_class(LABELS, 1, 0.5, None, "all")  # type: ignore[arg-type]


def test_draws_are_nested_and_of_the_seed():
    candidates = torch.arange(100, 200)
    few, more = (drawn(candidates, count, 5, 77).tolist() for count in (10, 30))
    assert few == sorted(few)
    assert set(few) < set(more) < set(candidates.tolist())
    assert drawn(candidates, 10, 6, 77).tolist() != few
    assert drawn(candidates, 10, 5, 78).tolist() != few


def test_a_target_as_an_array_a_file_or_a_target(tmp_path):
    path = tmp_path / "target.png"
    Image.fromarray(PICTURE).save(path)
    for given in (PICTURE, path, str(path), Target(PICTURE, 3)):
        found = as_target(given, 1, (8, 8, 3), 4)
        assert np.array_equal(found.image, PICTURE)
        assert found.label == 1
    whole = as_target(Target(PICTURE, 3, 2, 17), None, (8, 8, 3), 4)
    assert (whole.label, whole.true_label, whole.index) == (3, 2, 17)
    label = as_target(PICTURE, np.int64(2), (8, 8, 3), 4).label
    assert type(label) is int  # JSON


def test_what_is_no_target(tmp_path):
    for bad in (PICTURE[:4], PICTURE.astype(np.float32), None, [1, 2], torch.zeros(8, 8, 3)):
        with pytest.raises(InputError, match=r"target must be the image that the victim is to be wrong on"):
            as_target(bad, 1, (8, 8, 3), 4)
    for bad in (4, -1, None, True, 0.5):
        with pytest.raises(InputError, match="a class from 0 to 3"):
            as_target(PICTURE, bad, (8, 8, 3), 4)
    with pytest.raises(InputError, match=r"another class than the target's own\. Got 2"):
        as_target(Target(PICTURE, 2, 2), None, (8, 8, 3), 4)
    with pytest.raises(InputError, match="readable image"):
        as_target(tmp_path / "none.png", 1, (8, 8, 3), 4)


def test_classes_are_integers_of_python_or_numpy():
    assert all(is_class(value) for value in (0, 3, np.int64(1), np.uint8(2)))
    assert not any(is_class(value) for value in (True, np.bool_(True), 1.0, "1", None))
