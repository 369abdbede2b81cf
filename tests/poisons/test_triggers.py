"""Every kind of trigger: a pure function of an image and its index, with a description that brings it back."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from purifyloader.errors import InputError
from purifyloader.poisons import Poisoned, add_trigger, read, read_trigger, triggers, write
from purifyloader.poisons.triggers import KINDS, Additive, Blend, Dct, Patch, Sine, Trigger, Warp

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 8, 12, 3)).astype(np.uint8)
LABELS, TRUE = np.arange(5) % 2, np.arange(5) % 2 ^ 1
PLACES = np.array([7, 0, 3, 3, 100])
DELTA = (RNG.integers(-40, 40, (8, 12, 3)) / 255).astype(np.float32)
PATTERN = RNG.integers(0, 256, (8, 12, 3)).astype(np.uint8)
FLOW = RNG.uniform(-2, 2, (4, 4, 2)).astype(np.float32)

EXAMPLES: dict[str, Trigger] = {
    "additive": Additive(DELTA, strength=1.5),
    "patch": Patch(PATTERN[:3, :2]),
    "patch at a place": Patch(PATTERN[:3, :2], (1, 9)),
    "blend": Blend(PATTERN, alpha=0.3),
    "sine": Sine(amplitude=0.1, frequency=2.5),
    "warp": Warp(FLOW, strength=0.8),
    "warp with noise": Warp(FLOW, strength=0.8, jitter=1.0, seed=4),
    "dct": Dct(magnitude=0.5, block=4, positions=((1, 1), (3, 2))),
}
GOLDEN = {
    "additive": "658fdec15c2c434d",
    "patch": "6a6955e8a998be11",
    "patch at a place": "42bb97d6ff829736",
    "blend": "3389e5a2ad7cec67",
    "sine": "8a08401857c00858",
    "warp": "d6755decb9ba3020",
    "warp with noise": "4acc60af8cc5640c",
    "dct": "6a3e2323c3f6d560",
}

each = pytest.mark.parametrize("name", EXAMPLES)


def test_every_kind_has_an_example():
    assert {trigger.kind for trigger in EXAMPLES.values()} == set(KINDS)
    assert all(KINDS[trigger.kind] is type(trigger) for trigger in EXAMPLES.values())


@each
def test_an_image_gets_the_same_pixels_in_any_batch(name, monkeypatch):
    trigger, given = EXAMPLES[name], IMAGES.copy()
    whole = trigger(given, PLACES)
    np.testing.assert_array_equal(given, IMAGES)
    assert whole.dtype == np.uint8
    assert all((whole[i] != IMAGES[i]).any() for i in range(len(IMAGES)))
    alone = [trigger(IMAGES[i : i + 1], PLACES[i : i + 1])[0] for i in range(len(IMAGES))]
    np.testing.assert_array_equal(alone, whole)
    order = np.array([3, 0, 4])
    monkeypatch.setattr(triggers, "_VALUES", 2 * IMAGES[0].size)
    np.testing.assert_array_equal(trigger(IMAGES[order], PLACES[order].tolist()), whole[order])


@each
def test_golden_pixels(name):
    assert hashlib.sha256(EXAMPLES[name](IMAGES[:1], [7]).tobytes()).hexdigest()[:16] == GOLDEN[name]


@each
def test_json_and_arrays_bring_it_back(name):
    trigger = EXAMPLES[name]
    text = json.dumps(trigger.to_dict(), allow_nan=False)
    for again in (Trigger.from_dict(json.loads(text), trigger.arrays), pickle.loads(pickle.dumps(trigger))):
        assert type(again) is type(trigger)
        assert json.dumps(again.to_dict()) == text
        np.testing.assert_array_equal(again(IMAGES, PLACES), trigger(IMAGES, PLACES))


def test_only_noise_depends_on_the_index():
    for name, trigger in EXAMPLES.items():
        moved = (trigger(IMAGES, PLACES) != trigger(IMAGES, PLACES + 1)).any()
        assert moved == (name == "warp with noise")


def test_arrays_are_copies_that_nobody_changes():
    delta = DELTA.copy()
    trigger = Additive(delta)
    delta[:] = 0
    np.testing.assert_array_equal(trigger.delta, DELTA)
    with pytest.raises(ValueError, match="read-only"):
        trigger.delta[:] = 0
    assert Additive(torch.from_numpy(DELTA.astype(np.float64))).delta.dtype == np.float32  # type: ignore[arg-type]


# Against a few lines of numpy


def by_hand_patch(x: np.ndarray) -> np.ndarray:
    x[:, 5:, 10:] = PATTERN[:3, :2]
    return x


def by_hand_sine(x: np.ndarray) -> np.ndarray:
    for column in range(12):
        x[:, :, column] += 255 * 0.1 * np.sin(2 * np.pi * column * 2.5 / 12)
    return x


def by_hand_dct(x: np.ndarray) -> np.ndarray:
    c = np.array(
        [[np.sqrt((2 if u else 1) / 4) * np.cos(np.pi * u * (2 * i + 1) / 8) for i in range(4)] for u in range(4)]
    )
    luma = x @ [0.299, 0.587, 0.114]
    colours = [0.713 * (x[..., 0] - luma), 0.564 * (x[..., 2] - luma)]
    for plane in colours:
        for row in range(0, 8, 4):
            for column in range(0, 12, 4):
                block = plane[:, row : row + 4, column : column + 4]
                coefficients = c @ block @ c.T
                coefficients[:, [1, 3], [1, 2]] += 255 * 0.5
                block[:] = c.T @ coefficients @ c
    red, blue = luma + colours[0] / 0.713, luma + colours[1] / 0.564
    return np.stack([red, (luma - 0.299 * red - 0.114 * blue) / 0.587, blue], axis=-1)


def cubic(distance: float) -> float:
    t, a = abs(distance), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0


def enlarging(side: int) -> np.ndarray:
    """Weights (side, 4) of four points, corner to corner; those beyond the first and last are these."""
    weights = np.zeros((side, 4))
    for i in range(side):
        place = i * 3 / (side - 1)
        for point in range(int(place) - 1, int(place) + 3):
            weights[i, min(max(point, 0), 3)] += cubic(place - point)
    return weights


def by_hand_warp(x: np.ndarray) -> np.ndarray:
    flow = np.einsum("ik,jl,kla->ija", enlarging(8), enlarging(12), FLOW.astype(float))
    out = np.empty_like(x)
    for i in range(8):
        for j in range(12):
            place = [
                2 * at / (side - 1) - 1 + 0.8 * flow[i, j, axis] / 8
                for axis, (at, side) in enumerate([(i, 8), (j, 12)])
            ]
            row, column = ((np.clip(p, -1, 1) + 1) / 2 * (side - 1) for p, side in zip(place, (8, 12), strict=True))
            top, left = min(int(row), 6), min(int(column), 10)
            a, b = row - top, column - left
            upper = (1 - b) * x[:, top, left] + b * x[:, top, left + 1]
            out[:, i, j] = (1 - a) * upper + a * ((1 - b) * x[:, top + 1, left] + b * x[:, top + 1, left + 1])
    return out


BY_HAND = {
    "additive": lambda x: x + 1.5 * 255 * DELTA,
    "patch": by_hand_patch,
    "blend": lambda x: 0.7 * x + 0.3 * PATTERN,
    "sine": by_hand_sine,
    "dct": by_hand_dct,
    "warp": by_hand_warp,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_pixels_are_those_of_the_formula(name):
    want = np.clip(BY_HAND[name](IMAGES.astype(np.float64)), 0, 255)
    assert np.abs(EXAMPLES[name](IMAGES, PLACES) - want).max() <= 0.5 + 1e-3


def test_noise_moves_pixels_by_less_than_one():
    still = Warp(np.full((2, 2, 2), 1e-6, np.float32), strength=1.0, jitter=1.0)
    ramp = np.broadcast_to(np.arange(12, dtype=np.uint8) * 20, (1, 8, 12))[..., None]
    moved = still(ramp, [0]).astype(int) - ramp
    # half of 11 pixels are an image's 1, and that by 1 / 8
    assert 5 < np.abs(moved).max() <= 20 * 11 / 2 / 8 + 0.5
    assert len(np.unique(still(ramp, [0])[0, :, 5])) > 4


def test_add_trigger_is_the_additive_one():
    want = Additive(DELTA, 0.5)(IMAGES, PLACES)
    np.testing.assert_array_equal(add_trigger(IMAGES, torch.from_numpy(DELTA), 0.5), want)


# Bad values

NAN = np.full((8, 12, 3), np.nan, np.float32)
BAD: dict[str, tuple[Any, str]] = {
    "a trigger of integers": (
        lambda: Additive(PATTERN),
        r"delta .* must be float32 \(H, W, C\). Got uint8 \(8, 12, 3\)",
    ),
    "no array": (lambda: Additive("x"), "Got str"),
    "of a batch": (lambda: Additive(DELTA[None]), r"Got float32 \(1, 8, 12, 3\)"),
    "NaN": (lambda: Additive(NAN), "finite numbers. Got NaN"),
    "strength": (lambda: Additive(DELTA, float("inf")), "strength must be a finite number"),
    "two channels": (lambda: Patch(PATTERN[..., :2]), r"1 or 3 channels, the last axis. Got \(8, 12, 2\)"),
    "no pixels": (lambda: Patch(PATTERN[:0]), r"Got uint8 \(0, 12, 3\)"),
    "float pixels": (lambda: Patch(DELTA), "must be uint8"),
    "int64 pixels": (lambda: Patch(PATTERN.astype(np.int64)), "must be uint8"),
    "corner": (lambda: Patch(PATTERN, "top"), "position must be one of 'upper-left'"),
    "place": (lambda: Patch(PATTERN, (1, -1)), r"position must be \(row, column\), integers from 0. Got \(1, -1\)"),
    "place of floats": (lambda: Patch(PATTERN, (1.0, 2)), "integers from 0"),
    "one number": (lambda: Patch(PATTERN, 3), "integers from 0. Got 3"),
    "alpha 0": (lambda: Blend(PATTERN, 0.0), "alpha must be a finite number above 0 and of 1 or less. Got 0.0"),
    "alpha 1.1": (lambda: Blend(PATTERN, 1.1), "Got 1.1"),
    "alpha true": (lambda: Blend(PATTERN, True), "Got True"),
    "amplitude": (lambda: Sine(20, 6), "amplitude must be .* Got 20"),
    "frequency": (lambda: Sine(0.1, 0), "frequency must be .* Got 0"),
    "flow": (lambda: Warp(FLOW[:3]), r"must be \(k, k, 2\), with k of 2 or more. Got \(3, 4, 2\)"),
    "one point": (lambda: Warp(FLOW[:1, :1]), r"Got \(1, 1, 2\)"),
    "warp's strength": (lambda: Warp(FLOW, -1), "strength must be .* above 0"),
    "jitter": (lambda: Warp(FLOW, jitter=-1), "jitter must be .* from 0 to 1000"),
    "a huge strength": (lambda: Additive(DELTA, 10**400), "strength must be .* from -1000 to 1000"),
    "seed": (lambda: Warp(FLOW, seed=2**64), "seed must be an integer"),
    "magnitude": (lambda: Dct(0, 4, ((1, 1),)), "magnitude must be .* above 0"),
    "block": (lambda: Dct(0.1, 1, ((0, 0),)), "block must be an integer of 2 or more"),
    "beyond the block": (lambda: Dct(0.1, 4, ((1, 4),)), "within a block of 4. Got"),
    "no position": (lambda: Dct(0.1, 4, ()), "within a block of 4. Got"),
    "twice": (lambda: Dct(0.1, 4, ((1, 1), (1, 1))), "different"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_named(name):
    make, words = BAD[name]
    with pytest.raises(InputError, match=words):
        make()


MISFITS: dict[str, tuple[Trigger, tuple[int, ...], str]] = {
    "additive": (Additive(DELTA), (8, 8, 3), r"shape of an image, \(8, 8, 3\). Got \(8, 12, 3\)"),
    "blend": (Blend(PATTERN), (8, 12, 1), r"shape of an image, \(8, 12, 1\)"),
    "high patch": (Patch(PATTERN), (7, 12, 3), r"within an image, \(7, 12, 3\).* Got one of \(8, 12, 3\)"),
    "patch's channels": (Patch(PATTERN[:2, :2]), (8, 8, 1), "have its channels"),
    "patch beyond": (Patch(PATTERN[:2, :2], (7, 0)), (8, 12, 3), r"at \(7, 0\): make it smaller, or move it"),
    "sine": (Sine(0.1, 4), (8, 8, 3), "below half of the image's 8 columns"),
    "warp": (Warp(FLOW), (3, 8, 1), r"no larger than an image, \(3, 8\). Got \(4, 4\)"),
    "dct": (Dct(0.1, 8, ((1, 1),)), (8, 12, 3), "multiples of its block, 8"),
    "grey dct": (Dct(0.1, 4, ((1, 1),)), (8, 12, 1), "colour images"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_images_that_a_trigger_does_not_fit(name):
    trigger, shape, words = MISFITS[name]
    with pytest.raises(InputError, match=words):
        trigger(np.zeros((2, *shape), np.uint8), [0, 1])
    if shape[2] in (1, 3):
        with pytest.raises(InputError, match=words):
            Poisoned.of(np.zeros((2, *shape), np.uint8), [0, 1], "x", trigger=trigger)


@pytest.mark.parametrize(
    ("images", "indices", "words"),
    [
        (IMAGES / 255, PLACES, "images must be uint8"),
        (IMAGES[0], PLACES, r"Got uint8 \(8, 12, 3\)"),
        (IMAGES[:0], [], "at least one"),
        ("x", PLACES, "Got str"),
        (IMAGES, PLACES[:4], r"indices must be 5 integers from 0, one an image. Got int64 \(4,\)"),
        (IMAGES, PLACES - 1, "from 0"),
        (IMAGES, PLACES / 2, "Got float64"),
    ],
)
def test_images_and_indices_are_checked(images, indices, words):
    with pytest.raises(InputError, match=words):
        EXAMPLES["sine"](images, indices)


SINE: dict[str, Any] = {"kind": "sine", "amplitude": 0.1, "frequency": 2}
PATCH: dict[str, Any] = {"kind": "patch", "position": "lower-right"}
UNREADABLE: list[tuple[Any, dict[str, Any], str]] = [
    (None, {}, "A trigger has a kind, one of additive, patch, blend, sine, warp, dct. Got None"),
    ({"kind": "wave"}, {}, "Got {'kind': 'wave'}"),
    ({"kind": ["sine"]}, {}, "has a kind"),
    ({"kind": "sine", "amplitude": 0.1}, {}, "has the values amplitude, frequency. Got amplitude"),
    (SINE | {"phase": 0}, {}, "Got amplitude, frequency, phase"),
    (SINE, {"pixels": PATTERN}, r"has the arrays \(none\). Got pixels"),
    (PATCH, {}, "has the arrays pixels. Got none"),
    (PATCH, {"pattern": PATTERN}, "Got pattern"),
    (SINE | {"frequency": "2"}, {}, "frequency must be a finite number"),
    ({"kind": "dct", "magnitude": 0.1, "block": 4, "positions": 3}, {}, "positions must be"),
    ({"kind": "dct", "magnitude": 0.1, "block": 10**30, "positions": [[1, 10**29]]}, {}, "positions must be"),
]


@pytest.mark.parametrize(("values", "arrays", "words"), UNREADABLE)
def test_descriptions_that_are_none(values, arrays, words):
    with pytest.raises(InputError, match=words):
        Trigger.from_dict(values, arrays)


# In files


@each
@pytest.mark.parametrize("out", ["poison.npz", "class"])
def test_files_keep_the_trigger_and_the_true_labels(name, out, tmp_path):
    trigger = EXAMPLES[name]
    made = Poisoned.of(trigger(IMAGES, PLACES), LABELS, "x", [1, 3], trigger=trigger, true_labels=TRUE, target_class=1)
    write(made, tmp_path / out, *([] if out.endswith("npz") else ["class"]))
    for more in ({}, {"clean": (IMAGES, TRUE), "checked": False}):
        got = read(tmp_path / out, **more)
        np.testing.assert_array_equal(got.labels, LABELS)
        np.testing.assert_array_equal(got.true_labels, TRUE)
        assert got.trigger.to_dict() == trigger.to_dict()
        np.testing.assert_array_equal(got.trigger(IMAGES, PLACES), made.images)
    some = got.only(np.array([3, 0]))
    np.testing.assert_array_equal(some.true_labels, TRUE[[3, 0]])
    assert some.poisoned.tolist() == [0]


def version_1(path: Path) -> Path:
    """Write what version 1 of the format wrote."""
    record = {
        "format": 1,
        "purifyloader": "0.3.0",
        "attack": "narcissus",
        "images": 5,
        "bound": {"norm": "linf", "epsilon": 0.1607843190431595},
        "target_class": 1,
        "target": None,
        "settings": {"seed": 3},
    }
    if path.suffix == ".npz":
        arrays = {"data": IMAGES, "targets": LABELS, "poisoned": np.array([1, 3]), "trigger": DELTA}
        np.savez(path, **arrays, poison=np.array(json.dumps(record)))
        return path
    write(Poisoned.of(IMAGES, LABELS, "narcissus", [1, 3]), path)
    np.save(path / "trigger.npy", 2 * DELTA.transpose(2, 0, 1)[None])
    (path / "poison.json").write_text(json.dumps({**record, "layout": "flat"}))
    assert (path / "labels.csv").read_text().splitlines()[:3] == ["file,label,poisoned", "0.png,0,0", "1.png,1,1"]
    return path


@pytest.mark.parametrize("out", ["poison.npz", "flat"])
def test_version_1_of_the_format_is_still_read(out, tmp_path):
    got = read(version_1(tmp_path / out))
    np.testing.assert_array_equal(got.images, IMAGES)
    assert got.trigger.to_dict() == {"kind": "additive", "strength": 1.0}
    np.testing.assert_array_equal(got.trigger.delta, DELTA)
    assert got.true_labels is None
    assert (got.target_class, got.poisoned.tolist(), got.settings["seed"]) == (1, [1, 3], 3)
    write(replace(got, settings={}), tmp_path / "again")
    np.testing.assert_allclose(read_trigger(tmp_path / "again/trigger.npy"), DELTA)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trigger": None}, "of which the record says nothing"),
        ({"trigger": {"kind": "sine", "amplitude": 0.1, "frequency": 2}}, r"arrays \(none\)"),
        ({"trigger": {"kind": "blend", "alpha": 0.2}}, "pattern of a trigger .* must be uint8"),
        ({"trigger": {"kind": "additive", "strength": "1"}}, "strength must be"),
        ({"trigger": {"kind": "wave"}}, "The trigger in .* none that purifyloader.poisons.write writes: .* has a kind"),
        ({"trigger": 3}, "damaged"),
    ],
)
def test_a_record_that_does_not_fit_its_array(changes, words, tmp_path):
    path = version_1(tmp_path / "poison.npz")
    with np.load(path) as file:
        arrays = dict(file)
    record = json.loads(str(arrays.pop("poison"))) | {"format": 2} | changes
    np.savez(path, **arrays, poison=np.array(json.dumps(record)))
    with pytest.raises(InputError, match=words):
        read(path)


def test_true_labels_are_one_an_image(tmp_path):
    for bad in (TRUE[:4], TRUE - 1, TRUE.astype(np.int32)):
        with pytest.raises(InputError, match=r"true_labels must be int64 \(5,\), from 0: one an image"):
            Poisoned.of(IMAGES, LABELS, "x", true_labels=bad)
    write(Poisoned.of(IMAGES, LABELS, "x", true_labels=TRUE), tmp_path / "flat")
    table = tmp_path / "flat/labels.csv"
    for bad in ("", ",-1", ",x"):
        table.write_text(table.read_text().replace("3.png,1,1,0", "3.png,1,1" + bad))
        with pytest.raises(InputError, match=r"The true label of 3\.png"):
            read(tmp_path / "flat")
        table.write_text(table.read_text().replace("3.png,1,1" + bad, "3.png,1,1,0"))
