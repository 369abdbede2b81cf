"""Readers of published poisons: what each format means, what is refused as misread, and that no file runs code."""

from __future__ import annotations

import functools
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader import PurifiedDataset, recipes
from purifyloader.errors import InputError
from purifyloader.poisons import Bound, Poisoned, Target, ar_coefficients, check, make, read, write
from purifyloader.poisons.reading.formats import FORMATS

RNG = np.random.default_rng(0)
N, K, S = 40, 4, 8
IMAGES = RNG.integers(0, 256, (N, S, S, 3), np.uint8)
LABELS = np.arange(N) % K
CLEAN = (IMAGES, LABELS)
LEVELS = RNG.integers(-8, 9, (N, S, S, 3))  # a perturbation of every image, within 8/255
POISONED = np.clip(IMAGES + LEVELS, 0, 255).astype(np.uint8)
DELTA = torch.from_numpy(LEVELS / 255).float().permute(0, 3, 1, 2).contiguous()
EIGHT = Bound("linf", 8 / 255)


def chw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, 3, 1))


def dump(value: Any, path: Path, protocol: int = pickle.HIGHEST_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def save(value: Any, path: Path, **how: Any) -> Path:
    torch.save(value, path, **how)
    return path


def pils(images: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images]


# formats of perturbations


@pytest.mark.parametrize("zipped", [True, False])
def test_em_samplewise(zipped, tmp_path):
    path = save(DELTA, tmp_path / "perturbation.pt", _use_new_zipfile_serialization=zipped)
    got = read(path, clean=CLEAN)
    np.testing.assert_array_equal(got.images, POISONED)
    np.testing.assert_array_equal(got.labels, LABELS)
    assert len(got.poisoned) == N
    assert (got.attack, got.bound) == ("EM, sample-wise", EIGHT)
    assert got.settings["format"] == "em-samplewise"
    assert got.settings["file"] == "perturbation.pt"
    assert got.settings["moved"]["linf"] == 8
    assert got.settings["moved"]["images"] == N


def test_em_classwise(tmp_path):
    path = save(DELTA[:K], tmp_path / "perturbation.pt")
    got = read(path, clean=CLEAN)
    np.testing.assert_array_equal(got.images, np.clip(IMAGES + LEVELS[LABELS], 0, 255))
    assert got.settings["format"] == "em-classwise"


def test_as_many_classes_as_images_need_the_name(tmp_path):
    path = save(DELTA[:K], tmp_path / "perturbation.pt")
    few = (IMAGES[:K], LABELS[:K][::-1])
    with pytest.raises(InputError, match=r"several(.|\n)*em-samplewise(.|\n)*em-classwise"):
        read(path, clean=few)
    by_class = read(path, clean=few, format="em-classwise")
    np.testing.assert_array_equal(by_class.images, np.clip(IMAGES[:K] + LEVELS[:K][::-1], 0, 255))
    by_image = read(path, clean=few, format="em-samplewise")
    np.testing.assert_array_equal(by_image.images, POISONED[:K])


def test_em_as_its_official_loader_casts(tmp_path):
    path = save(DELTA, tmp_path / "perturbation.pt")
    got = read(path, clean=CLEAN, drop_negative=True)
    up = DELTA.mul(255).clamp_(0, 255).permute(0, 2, 3, 1).numpy()
    want = np.clip(IMAGES.astype(np.float32) + up, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(got.images, want)
    assert got.settings["moved"]["down"] == 0
    assert (got.images >= IMAGES).all()


def test_rem(tmp_path):
    path = dump(chw(LEVELS).astype(np.int8), tmp_path / "rem-fin-def-noise.pkl")
    got = read(path, clean=CLEAN)
    np.testing.assert_array_equal(got.images, POISONED)
    assert got.settings["format"] == "rem"
    wide = np.where(LEVELS == 8, 127, LEVELS)  # int8 must not overflow before it is clamped
    got = read(dump(chw(wide).astype(np.int8), path), clean=CLEAN, checked=False)
    np.testing.assert_array_equal(got.images, np.clip(IMAGES + wide, 0, 255))


def test_narcissus(tmp_path):
    signs = RNG.choice([-1, 1], (1, 3, S, S))
    np.save(tmp_path / "trigger.npy", (signs * 32 / 255).astype(np.float32))
    got = read(tmp_path / "trigger.npy", clean=CLEAN, target_class=2, count=4)
    assert len(got.poisoned) == 4
    assert set(LABELS[got.poisoned]) == {2}
    want = IMAGES.astype(int)
    want[got.poisoned] += 16 * np.moveaxis(signs[0], 0, 2)
    np.testing.assert_array_equal(got.images, np.clip(want, 0, 255))
    np.testing.assert_allclose(255 * got.trigger.delta, 16 * np.moveaxis(signs[0], 0, 2), rtol=1e-6)
    assert got.target_class == 2
    with pytest.raises(InputError, match=r"target_class=None and count=3"):
        read(tmp_path / "trigger.npy", clean=CLEAN, count=3)


def test_ar(tmp_path):
    path = save([part.clone() for part in ar_coefficients(K)], tmp_path / "params.pt")
    got = read(path, clean=CLEAN)
    assert got.bound == Bound("l2", 1.0)
    delta = (got.images.astype(float) - IMAGES).reshape(N, -1)
    assert 150 < np.linalg.norm(delta, axis=1).mean() <= 255 + 0.5 * (3 * S * S) ** 0.5
    assert not np.array_equal(got.images, read(path, clean=CLEAN, seed=1).images)


@pytest.mark.parametrize("ids", [list, np.asarray, torch.as_tensor])
def test_witches_brew_is_in_units_of_the_deviation(ids, tmp_path):
    where, std = [7, 3, 30], (0.2470, 0.2435, 0.2616)
    delta = DELTA[where] / torch.tensor(std)[:, None, None]
    got = read(save([delta, ids(where)], tmp_path / "poisons_packed.pth"), clean=CLEAN)
    want = IMAGES.copy()
    want[where] = POISONED[where]
    np.testing.assert_array_equal(got.images, want)
    assert got.poisoned.tolist() == [3, 7, 30]
    assert got.settings["format"] == "witches-brew"
    halved = read(tmp_path / "poisons_packed.pth", clean=CLEAN, std=[s / 2 for s in std])
    assert halved.settings["moved"]["linf"] == 4


# formats of whole sets


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("one_hot", [True, False])
def test_ntga(form, one_hot, tmp_path):
    np.save(tmp_path / "x_train_cifar10_ntga_cnn_best.npy", (POISONED / 255).astype(np.float32))
    np.save(tmp_path / "x_train_cifar10.npy", (IMAGES / 255).astype(np.float32))
    np.save(tmp_path / "y_train_cifar10.npy", np.eye(K)[LABELS] if one_hot else LABELS)
    path = tmp_path if form == "folder" else tmp_path / "x_train_cifar10_ntga_cnn_best.npy"
    for clean in (None, CLEAN):
        got = read(path, clean=clean)
        np.testing.assert_array_equal(got.images, POISONED)
        np.testing.assert_array_equal(got.labels, LABELS)
        assert got.settings["format"] == "ntga"


def test_npz(tmp_path):
    mixed = IMAGES.copy()
    mixed[5:9] = POISONED[5:9]
    np.savez(tmp_path / "p.npz", data=mixed, targets=LABELS)
    got = read(tmp_path / "p.npz", clean=CLEAN)
    np.testing.assert_array_equal(got.images, mixed)
    assert got.poisoned.tolist() == [5, 6, 7, 8]
    alone = read(tmp_path / "p.npz")
    assert len(alone.poisoned) == N
    assert "moved" not in alone.settings


def test_raw_bytes(tmp_path):
    path = dump([(image.tobytes(), int(label)) for image, label in zip(POISONED, LABELS, strict=True)], tmp_path / "p")
    got = read(path)
    np.testing.assert_array_equal(got.images, POISONED)
    np.testing.assert_array_equal(got.labels, LABELS)
    assert len(read(path, clean=CLEAN).poisoned) == N


@pytest.mark.parametrize("inside", ["", "data"])
def test_a_folder_of_pngs_is_in_the_order_of_its_numbers(inside, tmp_path):
    (tmp_path / inside).mkdir(exist_ok=True)
    some = [0, 2, 10, 39]
    for index in some:
        Image.fromarray(POISONED[index]).save(tmp_path / inside / f"{index}.png")
    got = read(tmp_path, clean=CLEAN)
    want = IMAGES.copy()
    want[some] = POISONED[some]
    np.testing.assert_array_equal(got.images, want)
    assert got.poisoned.tolist() == some
    with pytest.raises(InputError, match=r"labels are those of the clean images.*no clean="):
        read(tmp_path)


@pytest.mark.parametrize("names", [["0", "1", "2", "10"], ["bird", "car", "cat", "ship"]])
def test_class_folders_give_the_labels(names, tmp_path):
    for index, label in enumerate(LABELS):
        (tmp_path / names[label]).mkdir(exist_ok=True)
        Image.fromarray(POISONED[index]).save(tmp_path / names[label] / f"{index}.png")
    got = read(tmp_path)
    np.testing.assert_array_equal(got.images, POISONED)
    np.testing.assert_array_equal(got.labels, np.array([0, 1, 2, 10])[LABELS] if names[0] == "0" else LABELS)
    if names[0] != "0":
        assert len(read(tmp_path, clean=CLEAN).poisoned) == N


# formats of targeted attacks


def benchmark(folder: Path, where: Any, target: Any, protocol: int = pickle.HIGHEST_PROTOCOL) -> Path:
    pairs = [(image, 3) for image in pils(POISONED[list(map(int, where))])]
    dump(pairs, folder / "poisons.pickle", protocol)
    dump(where, folder / "base_indices.pickle", protocol)
    dump(target, folder / "target.pickle", protocol)
    return folder


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("indices", [list, np.asarray, torch.as_tensor, lambda w: [np.int64(i) for i in w]])
def test_benchmark(indices, protocol, tmp_path):
    where = [7, 3, 31]
    got = read(benchmark(tmp_path, indices(where), (pils(IMAGES)[0], 1), protocol), clean=CLEAN)
    want = IMAGES.copy()
    want[where] = POISONED[where]
    np.testing.assert_array_equal(got.images, want)
    assert got.poisoned.tolist() == sorted(where)
    assert set(got.labels[where]) == {3}
    np.testing.assert_array_equal(got.target.image, IMAGES[0])
    assert (got.target.label, got.target.true_label) == (3, 1)
    assert (got.bound, got.settings["format"]) == (EIGHT, "benchmark")


@pytest.mark.parametrize("patch", [np.asarray, torch.as_tensor])
def test_a_patched_target_is_as_the_victim_meets_it(patch, tmp_path):
    values = np.zeros((3, 2, 3), np.float32)
    values[0] = 1
    target = (pils(IMAGES)[0], 1, patch(values), [5, 1])
    got = read(benchmark(tmp_path, [3], target), clean=CLEAN)
    want = IMAGES[0].copy()
    want[1:3, 5:8] = (255, 0, 0)
    np.testing.assert_array_equal(got.target.image, want)
    assert got.settings["patch"] == {"xy": [5, 1], "size": [2, 3]}
    with pytest.raises(InputError, match="within the image"):
        read(benchmark(tmp_path, [3], (*target[:3], [6, 1])), clean=CLEAN)


def test_an_image_out_of_a_file_is_an_image_too(tmp_path):
    pils(POISONED)[3].save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        image.load()
        benchmark(tmp_path, [3], (pils(IMAGES)[0], 1))
        dump([(image, 3)], tmp_path / "poisons.pickle")
    np.testing.assert_array_equal(read(tmp_path, clean=CLEAN).images[3], POISONED[3])


def test_bytes_that_the_benchmark_wrote_in_2020(tmp_path):
    """numpy 1 and the Pillow of that time, protocol 4, byte for byte: one grey 2 x 1 image for the place 1."""
    poisons = (
        b"\x80\x04\x95\x38\x00\x00\x00\x00\x00\x00\x00]\x94\x8c\tPIL.Image\x94\x8c\x05Image\x94\x93\x94)\x81\x94"
        b"]\x94(}\x94\x8c\x01L\x94K\x02K\x01\x86\x94NC\x02\x07\xff\x94eb"
        b"K\x01\x86\x94a."
    )
    indices = (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02C\x01bq\x03\x87q\x04R"
        b"q\x05(K\x01K\x01\x85q\x06cnumpy\ndtype\nq\x07X\x02\x00\x00\x00i8q\x08K\x00K\x01\x87q\tRq\n(K\x03X\x01\x00\x00"
        b"\x00<q\x0bNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0cb\x89C\x08\x01\x00\x00\x00\x00\x00\x00\x00q\rtq\x0eb."
    )
    poisons = poisons[:3] + struct.pack("<Q", len(poisons) - 11) + poisons[11:]
    (tmp_path / "poisons.pickle").write_bytes(poisons)
    (tmp_path / "base_indices.pickle").write_bytes(indices)
    clean = np.array([[[[9], [9]]], [[[9], [249]]]], np.uint8)
    got = read(tmp_path, clean=(clean, [0, 1]))
    assert got.images[1].ravel().tolist() == [7, 255]
    assert got.poisoned.tolist() == [1]


@pytest.mark.parametrize("zipped", [True, False])
def test_puregen(zipped, tmp_path):
    where = [7, 3, 31]
    pairs = [(image, 3) for image in pils(POISONED[where])]
    path = save((pairs, np.array(where), 3), tmp_path / "0.pth", _use_new_zipfile_serialization=zipped)
    got = read(path, clean=CLEAN)
    np.testing.assert_array_equal(got.images[where], POISONED[where])
    assert got.poisoned.tolist() == sorted(where)
    assert got.settings["format"] == "puregen"


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        (3, 3),
        (np.int64(3), 3),
        (torch.tensor(3), 3),
        ("bird", "bird"),
        ([3, "bird", {"index": 7}], [3, "bird", {"index": 7}]),
        (None, None),
        (torch.zeros(3), None),  # what is neither plain nor an image is left out
        (float("nan"), None),
        ((), []),
    ],
)
def test_a_plain_target_of_puregen_is_kept(target, kept, tmp_path):
    got = read(puregen(POISONED, tmp_path, target), clean=CLEAN)
    assert got.settings.get("target") == kept
    assert got.target is None
    write(got, tmp_path / "again.npz")
    assert read(tmp_path / "again.npz", clean=CLEAN).settings.get("target") == kept


def test_a_target_image_of_puregen_is_its_target(tmp_path):
    image = pils(IMAGES)[9]
    for value, true in (((image, 2), 2), (image, None), ([image, 2, np.ones((3, 1, 1), np.float32), (0, 0)], 2)):
        got = read(puregen(POISONED, tmp_path, value), clean=CLEAN).target
        assert (got.label, got.true_label) == (LABELS[0], true)  # it is to be called what the poisons are
        np.testing.assert_array_equal(got.image[1:], IMAGES[9][1:])
    for value in ((image, "bird"), (image, 2, 3)):
        assert read(puregen(POISONED, tmp_path, value), clean=CLEAN).target is None


def test_bullseye(tmp_path):
    where, mean, std = [7, 3, 31], (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    normalised = (POISONED[where] / 255 - mean) / std
    pairs = [(torch.from_numpy(chw(one[None])[0]).float(), 3) for one in normalised]
    path = save({"poison": pairs, "idx": where, "coeff_list": []}, tmp_path / "poison_00799.pth")
    got = read(path, clean=CLEAN)
    np.testing.assert_array_equal(got.images[where], POISONED[where])
    assert set(got.labels[where]) == {3}
    with pytest.raises(InputError, match=r"in \[0, 1\]. Got .*mean= and std="):
        read(path, clean=CLEAN, mean=(0, 0, 0), std=(1, 1, 1))


# targets and bounds that are given


def polytope(images: np.ndarray, path: Path) -> Path:
    normalised = (images / 255 - (0.4914, 0.4822, 0.4465)) / (0.2023, 0.1994, 0.2010)
    tensors = torch.from_numpy(chw(normalised)).float()
    pairs = [(one, int(label)) for one, label in zip(tensors, LABELS, strict=True)]
    return save({"poison": pairs, "idx": list(range(N))}, path / "poison_00799.pth")


@pytest.mark.parametrize("kind", ["array", "PIL", "file", "str"])
@pytest.mark.parametrize("form", ["puregen", "bullseye", "witches-brew", "npz", "png", "raw-bytes"])
def test_a_target_is_given_to_a_file_without_one(form, kind, tmp_path):
    (tmp_path / "p").mkdir()
    forms = {"puregen": puregen, "bullseye": polytope, "npz": npz, "png": pngs, "raw-bytes": raw}
    path = brewed(DELTA, tmp_path) if form == "witches-brew" else forms[form](POISONED, tmp_path / "p")
    image = pils(IMAGES)[9]
    image.save(tmp_path / "target.png")
    file = tmp_path / "target.png"
    target = {"array": IMAGES[9], "PIL": image, "file": file, "str": str(file)}[kind]
    got = read(path, clean=CLEAN, target=target, target_class=2)
    assert got.settings["format"] == form
    np.testing.assert_array_equal(got.target.image, IMAGES[9])
    assert (got.target.label, got.target.true_label, got.target_class) == (2, None, None)
    write(got, tmp_path / "again.npz")
    np.testing.assert_array_equal(read(tmp_path / "again.npz").target.image, IMAGES[9])


def test_a_target_of_a_grey_set_and_one_that_knows_its_class(tmp_path):
    np.savez(tmp_path / "grey.npz", data=POISONED[..., :1], targets=LABELS)
    Image.fromarray(IMAGES[9, :, :, 0]).save(tmp_path / "t.png")
    got = read(tmp_path / "grey.npz", target=tmp_path / "t.png", target_class=1)
    np.testing.assert_array_equal(got.target.image, IMAGES[9, :, :, :1])
    got = read(npz(POISONED, tmp_path), target=Target(IMAGES[9], 1, true_label=2, index=7))
    assert (got.target.label, got.target.true_label, got.target.index) == (1, 2, 7)


def test_a_benchmark_without_its_target_may_be_given_one(tmp_path):
    path = benchmark(tmp_path, [7, 3, 31], (pils(IMAGES)[0], 1))
    with pytest.raises(InputError, match=r"has a target: leave target= and target_class= away"):
        read(path, clean=CLEAN, target=IMAGES[9], target_class=3)
    (path / "target.pickle").unlink()
    assert read(path, clean=CLEAN, target=IMAGES[9], target_class=3).target.label == 3


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"target": IMAGES[9]}, "no target_class=: give it"),
        ({"target_class": 2}, "without target= for .* which is 'npz': give target="),
        ({"target": IMAGES[9], "target_class": K}, "a class from 0 to 3. Got 4"),
        ({"target": IMAGES[9, :4], "target_class": 1}, r"uint8 \(8, 8, 3\) .* Got uint8 \(4, 8, 3\)"),
        ({"target": IMAGES[9] / 255, "target_class": 1}, r"Got float64 \(8, 8, 3\)"),
        ({"target": 9, "target_class": 1}, "Got int: convert it"),
        ({"target": pils(IMAGES)[9].convert("RGBA"), "target_class": 1}, "mode RGBA: convert it"),
        ({"target": "nowhere.png", "target_class": 1}, "nowhere.png is no readable image"),
        ({"target": Target(IMAGES[9], 1, true_label=1)}, "another class than the target's own"),
    ],
)
def test_a_target_that_does_not_fit(options, word, tmp_path):
    with pytest.raises(InputError, match=word):
        read(npz(POISONED, tmp_path), clean=CLEAN, **options)


def test_a_target_of_what_aims_at_none(tmp_path):
    given: dict[str, Any] = {"clean": CLEAN, "target": IMAGES[9], "target_class": 1}
    np.save(tmp_path / "trigger.npy", np.full((1, 3, S, S), 0.1, np.float32))
    files = {
        "narcissus": tmp_path / "trigger.npy",
        "em-samplewise": save(DELTA, tmp_path / "em.pt"),
        "rem": dump(chw(LEVELS).astype(np.int8), tmp_path / "rem.pkl"),
        "ar": save([part.clone() for part in ar_coefficients(K)], tmp_path / "ar.pt"),
        "ntga": ntga(POISONED, tmp_path),
    }
    for name, path in files.items():
        with pytest.raises(InputError, match=f"aimed at one test image. Got it for .*'{name}': leave it away"):
            read(path, format=name, count=1, **given)
    door = Poisoned.of(POISONED, LABELS, "made up", trigger=np.full((S, S, 3), 0.1, np.float32), target_class=1)
    write(door, tmp_path / "door.npz")
    with pytest.raises(InputError, match="has a trigger: leave target="):
        read(tmp_path / "door.npz", **given)


@pytest.mark.parametrize(
    ("given", "bound"),
    [
        (8 / 255, EIGHT),
        (np.float32(0.5), Bound("linf", 0.5)),
        (1, Bound("linf", 1.0)),
        ("linf:8/255", EIGHT),
        ("linf:0.5", Bound("linf", 0.5)),
        ("l2:1.0", Bound("l2", 1.0)),
        ("l2:1.5", Bound("l2", 1.5)),
        ("l0:3", Bound("l0", 3)),
        (EIGHT, EIGHT),
        (None, None),
    ],
)
def test_the_forms_of_a_bound(given, bound, tmp_path):
    assert read(npz(POISONED, tmp_path), bound=given).bound == bound


LEVELS_HINT = "divide levels of 0 to 255 by 255, as in 8/255"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bound": 8}, f"Got 8: {LEVELS_HINT}"),
        ({"bound": "linf:8"}, f"Got 'linf:8': {LEVELS_HINT}"),
        ({"bound": Bound("linf", 8)}, LEVELS_HINT),
        ({"bound": 0}, "Got 0: give one of these"),
        ({"bound": -0.1}, "Got -0.1"),
        ({"bound": float("nan")}, "Got nan"),
        ({"bound": True}, "Got True"),
        ({"bound": ("linf", 8 / 255)}, r"Got \('linf'"),
        ({"bound": "8/255"}, "such as \"linf:8/255\".* Got '8/255'"),
        ({"bound": "l3:1"}, "Got 'l3:1'"),
        ({"bound": "linf"}, "Got 'linf'"),
        ({"bound": "linf:8/0"}, "Got 'linf:8/0'"),
        ({"bound": "linf:many"}, "Got 'linf:many'"),
        ({"bound": "l2:inf"}, "Got 'l2:inf'"),
        ({"target_class": "bird"}, "target_class must be an integer from 0. Got 'bird'"),
        ({"target_class": -1}, "Got -1"),
        ({"target_class": True}, "target_class must be"),
        ({"target_class": 1.0}, "target_class must be"),
        ({"count": "4"}, "count must be how many images get the trigger, an integer from 1. Got '4'"),
        ({"count": 0}, "count must be"),
        ({"seed": "0"}, "seed must be an integer. Got '0'"),
        ({"seed": 0.5}, "seed must be"),
        ({"seed": None}, "seed must be"),
        ({"mean": "0.5"}, r"mean must be one finite number a channel, such as .* Got '0.5'"),
        ({"std": 3}, "std must be one finite number a channel, above 0, .* Got 3: give a list"),
        ({"std": ["a", "b", "c"]}, "std must be"),
        ({"std": (0.2, 0.2, 0)}, "std must be"),
        ({"std": (0.2, 0.2, float("nan"))}, "std must be"),
        ({"mean": ()}, "mean must be"),
        ({"mean": [[0.5]]}, "mean must be"),
        ({"checked": "no"}, "checked must be True or False. Got 'no'"),
        ({"checked": 0}, "checked must be"),
        ({"drop_negative": None}, "drop_negative must be"),
        ({"format": ["npz"]}, "format must be one of"),
    ],
)
def test_options_are_checked_before_the_file_is(options, word):
    with pytest.raises(InputError, match=word):
        read("nowhere", **options)


def test_a_path_is_a_path():
    with pytest.raises(InputError, match=r"path must be that of a poison file or folder\. Got 8"):
        read(8)


def test_options_may_be_of_numpy_and_torch(tmp_path):
    np.save(tmp_path / "trigger.npy", np.full((1, 3, S, S), 0.1, np.float32) * RNG.choice([-1, 1], (1, 3, S, S)))
    numbers: dict[str, Any] = {"target_class": np.int64(2), "count": np.int64(4), "seed": np.int64(1)}
    got = read(tmp_path / "trigger.npy", clean=CLEAN, **numbers)
    assert (got.target_class, got.settings["count"], got.settings["seed"]) == (2, 4, 1)
    write(got, tmp_path / "again.npz")  # plain numbers, then
    for kind in (list, tuple, np.asarray, torch.tensor, lambda std: list(map(np.float32, std))):
        got = read(brewed(DELTA, tmp_path), clean=CLEAN, std=kind([0.25, 0.25, 0.25]))
        assert got.settings["std"] == [0.25, 0.25, 0.25]


# what comes out


def test_what_is_read_is_a_dataset_to_purify(tmp_path):
    got = read(save(DELTA, tmp_path / "perturbation.pt"), clean=CLEAN)
    purified = PurifiedDataset(got, recipes.jpeg(50))
    image, label = purified[3]
    assert image.size == (S, S)
    assert label == LABELS[3]
    assert not np.array_equal(np.asarray(image), got.images[3])


@pytest.mark.parametrize("out", ["poison.npz", "flat", "class"])
def test_what_we_wrote_comes_back_whole(out, tmp_path):
    made = Poisoned.of(
        POISONED,
        LABELS,
        "made up",
        [2, 5],
        bound=EIGHT,
        target=Target(IMAGES[0], 1, 2, 7),
        trigger=(LEVELS[0] / 255).astype(np.float32),
        target_class=3,
        settings={"a": 1, "format": "rem", "drop_negative": True},
    )
    write(made, tmp_path / out, *([] if out.endswith("npz") else [out]))
    for clean in (None, CLEAN):
        got = read(tmp_path / out, clean=clean)
        for name in ("images", "labels", "poisoned"):
            np.testing.assert_array_equal(getattr(got, name), getattr(made, name))
        for name in ("attack", "bound", "target_class"):
            assert getattr(got, name) == getattr(made, name)
        np.testing.assert_allclose(got.trigger.delta, made.trigger.delta, rtol=1e-6)
        np.testing.assert_array_equal(got.target.image, made.target.image)
        assert (got.target.label, got.target.true_label, got.target.index) == (1, 2, 7)
        assert {"a": 1, "format": "rem"}.items() <= got.settings.items()


def test_a_set_that_we_wrote_and_that_was_damaged(tmp_path):
    write(Poisoned.of(POISONED, LABELS, "made up"), tmp_path / "flat")
    said = (tmp_path / "flat/poison.json").read_text()
    for text, word in ((said.replace('"format": 2', '"format": 99'), "later purifyloader"), ("{}", "damaged")):
        (tmp_path / "flat/poison.json").write_text(text)
        with pytest.raises(InputError, match=word):
            read(tmp_path / "flat")
    (tmp_path / "flat/labels.csv").write_text("file,label\n00.png,1\n")
    with pytest.raises(InputError, match="columns"):
        read(tmp_path / "flat")


def _named(path: Path) -> Path:
    (path / "0").mkdir()
    Image.fromarray(IMAGES[0]).save(path / f"0/{10**24}.png")
    return path


def _in_class(path: Path) -> Path:
    (path / f"{2**63}").mkdir()
    Image.fromarray(IMAGES[0]).save(path / f"{2**63}/0.png")
    return path


def _in_table(path: Path) -> Path:
    write(Poisoned.of(POISONED[:2], LABELS[:2], "x", np.arange(2)), path / "own")
    table = path / "own/labels.csv"
    table.write_text(table.read_text().replace("0.png,0", f"0.png,{10**29}"))
    return path / "own"


WIDE = {
    "file name": (_named, r"The name of .*000\.png must .* 2\^63 - 1\. Got '1000"),
    "class folder": (_in_class, r"The name of .*808 must .* 2\^63 - 1\. Got '9223372036854775808'"),
    "labels.csv": (_in_table, r"0\.png in .*labels\.csv must .* 2\^63 - 1\. Got '1000"),
    "raw bytes": (lambda p: dump([(bytes(192), 10**30)] * 2, p / "p.pkl"), r"Item 0 of .*p\.pkl must .* Got 1000"),
    "thousands of digits": (lambda p: dump([(bytes(192), 10**5000)], p / "p.pkl"), "Got an integer of 16,610 bits"),
    "below": (lambda p: dump([(bytes(192), -(10**5000))], p / "p.pkl"), "from 0. Got an integer of 16,610 bits"),
    "unsigned": (lambda p: npz(IMAGES, p, np.full(N, 2**63, np.uint64)), r"targets of .*p\.npz must .*808"),
}


@pytest.mark.parametrize("kind", WIDE)
def test_integers_beyond_64_bits_are_named(kind, tmp_path):
    write_to, words = WIDE[kind]
    with pytest.raises(InputError, match=words) as caught:
        read(write_to(tmp_path))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


MADE = Poisoned.of(
    POISONED[:2], LABELS[:2], "x", np.arange(2), bound=EIGHT, target=Target(IMAGES[0], 1, 2, 3), target_class=1
)
EDITED = {
    "format": [True, 1.0, "1", 0, None],
    "layout": ["tree", 1],
    "attack": [{"a": 1}, 5, None],
    "purifyloader": [[], 1, None],
    "images": [8.9, "2", True, 3, 10**40],
    "target_class": ["x", True, -1, 1.0, 2**63],
    "settings": [None, [], "ab"],
    "trigger": [3, [], {"kind": "wave"}, {"kind": "sine", "amplitude": True, "frequency": 6}, {"kind": "blend"}],
    "target": [3, [], {"label": "1"}, {"label": None, "true_label": 2, "index": 3}],
    "bound": [0.1, {"norm": "linf", "epsilon": 1e300}, {"norm": "linf", "epsilon": "1"}, {"norm": "l9", "epsilon": 1}],
}


def test_each_field_of_our_own_record_has_its_type_and_range(tmp_path):
    write(MADE, tmp_path / "own")
    path = tmp_path / "own/poison.json"
    record = json.loads(path.read_text())
    assert record.keys() == EDITED.keys()
    assert read(tmp_path / "own").target.index == 3
    for name, values in EDITED.items():
        for value in values:
            path.write_text(json.dumps(record | {name: value}))
            with pytest.raises(InputError) as caught:
                read(tmp_path / "own")
            assert str(tmp_path) in str(caught.value) or "A bound is" in str(caught.value), (name, value)


# misreadings


def npz(images: np.ndarray, path: Path, labels: np.ndarray = LABELS) -> Path:
    np.savez(path / "p.npz", data=images.astype(np.uint8), targets=labels)
    return path / "p.npz"


RANGE_UP = 2 * POISONED.astype(float) - 255  # of images in [-1, 1], in levels


UP, DOWN = np.clip(IMAGES + np.abs(LEVELS), 0, 255), np.clip(IMAGES - np.abs(LEVELS), 0, 255)


@pytest.mark.parametrize("bound", [EIGHT, None])
@pytest.mark.parametrize(
    ("images", "word"),
    [
        (IMAGES.astype(int) + LEVELS, "wrapped around at 256"),
        (np.clip(IMAGES + 255 * LEVELS, 0, 255), "black or white, .* 255 times too large"),
        (POISONED / 255, "all are black, .* divided by 255"),
        (IMAGES, "Got the clean images"),
        (POISONED[..., ::-1], "channels in the reverse order"),
        (chw(POISONED).reshape(POISONED.shape), "bytes of whole channels"),
        (POISONED.transpose(0, 2, 1, 3), "rows taken for columns"),
        (np.clip(RANGE_UP, 0, 255), r"images in \[-1, 1\] taken for \[0, 1\]"),
        ((POISONED / 255 + 1) / 2 * 255, r"images in \[0, 1\] taken for \[-1, 1\]"),
        (np.roll(POISONED, 4, axis=0), "the order is another"),
    ],
)
def test_images_that_are_plainly_misread(images, word, bound, tmp_path):
    path = npz(images, tmp_path)
    with pytest.raises(InputError, match=word) as it:
        read(path, clean=CLEAN, bound=bound)
    assert bound is not None or "checked=False" in str(it.value)
    got = read(path, clean=CLEAN, bound=bound, checked=False)
    np.testing.assert_array_equal(got.images, images.astype(np.uint8))
    assert not got.settings["checked"]


@pytest.mark.parametrize(
    ("images", "word"),
    [
        (UP, "Got up only: its sign was lost"),
        (DOWN, "Got down only: its sign was lost"),
        (np.clip(IMAGES + 2 * LEVELS, 0, 255), "Got up to 16, .* Give bound="),
    ],
)
def test_what_an_attack_without_a_bound_may_do(images, word, tmp_path):
    path = npz(images, tmp_path)
    with pytest.raises(InputError, match=word):
        read(path, clean=CLEAN, bound=EIGHT)
    assert read(path, clean=CLEAN).settings["moved"]["images"] == N


def smooth(count: int, side: int = 32) -> np.ndarray:
    """Images as photographs are: neighbouring pixels are alike, and so are the channels."""
    values = torch.rand((count, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(values, (side, side), mode="bicubic").permute(0, 2, 3, 1).numpy()
    return np.clip(255 * (0.6 * large[..., :1] + 0.4 * large[..., 1:]), 0, 255).astype(np.uint8)


MANY = 60
KINDS = {
    "smooth": smooth(MANY),
    "dark": smooth(MANY) // 5,
    "pale": 110 + smooth(MANY) // 10,
    "noise": RNG.integers(0, 256, (MANY, 32, 32, 3), np.uint8),
    "all alike": np.full((MANY, 32, 32, 3), 120, np.uint8),
}


def noised(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.clip(images + np.random.default_rng(1).integers(-32, 33, images.shape), 0, 255).astype(np.uint8)


def patched(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    out = images.copy()
    out[:, -9:, -9:] = np.where(np.random.default_rng(1).random((9, 9, 1)) < 0.5, 0, 255)
    return out


def by_name(name: str, **options: Any) -> Any:
    return lambda images, labels: make(name, (images, labels), **options).images


ATTACKS = {
    "noise of 32 levels": noised,
    "a patch": patched,
    "negatives": lambda images, labels: 255 - images,
    "cuda": by_name("cuda"),
    "cuda, another seed": by_name("cuda", seed=1),
    "cuda, centred": by_name("cuda", unit="centre"),
    "ops": by_name("ops"),
}


@functools.cache
def attacked(attack: str, kind: str) -> np.ndarray:
    return ATTACKS[attack](KINDS[kind], np.arange(MANY) % K)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("few", [1, 5, MANY])
def test_no_attack_without_a_bound_is_refused(attack, kind, few):
    clean, labels = KINDS[kind], np.arange(MANY) % K
    images = clean.copy()
    images[-few:] = attacked(attack, kind)[-few:]
    poisoned = Poisoned.of(images, labels, attack, np.arange(MANY - few, MANY))
    assert check(poisoned, (clean, labels)) == poisoned.moved(clean)


@pytest.mark.parametrize("kind", ["smooth", "dark", "pale", "noise"])
@pytest.mark.parametrize("attack", ["noise of 32 levels", "a patch", "cuda", "ops"])
def test_another_order_or_another_set_is_refused_whatever_the_attack(attack, kind):
    clean, labels = KINDS[kind], np.zeros(MANY, np.int64)
    images = attacked(attack, kind)
    with pytest.raises(InputError, match="the order is another"):
        check(Poisoned.of(images[::-1], labels, attack), (clean, labels))
    few = clean.copy()
    few[:20] = images[-20:]  # as poisons that were put where they do not belong
    with pytest.raises(InputError, match="the order is another"):
        check(Poisoned.of(few, labels, attack, np.arange(20)), (clean, labels))


def raw(images: np.ndarray, path: Path) -> Path:
    return dump([(image.tobytes(), int(label)) for image, label in zip(images, LABELS, strict=True)], path / "p.pkl")


def pngs(images: np.ndarray, path: Path) -> Path:
    for index, image in enumerate(images):
        Image.fromarray(image).save(path / f"{index}.png")
    return path


def ntga(images: np.ndarray, path: Path) -> Path:
    np.save(path / "x_train_p.npy", (images / 255).astype(np.float32))
    np.save(path / "y_train.npy", LABELS)
    return path


def puregen(images: np.ndarray, path: Path, target: Any = None) -> Path:
    pairs = [(image, int(label)) for image, label in zip(pils(images), LABELS, strict=True)]
    return save((pairs, np.arange(N), target), path / "0.pth")


@pytest.mark.parametrize("form", [npz, raw, pngs, ntga, puregen])
@pytest.mark.parametrize(
    ("images", "word"),
    [
        (IMAGES, "Got the clean images"),
        (POISONED[(np.arange(N) // K * K)[::-1] + LABELS], "the order is another"),  # each class's in reverse
        (POISONED[..., ::-1], r"BGR.*, or say checked=False"),
        (chw(POISONED).reshape(POISONED.shape), "bytes of whole channels"),
    ],
)
def test_every_format_without_a_bound_is_checked(form, images, word, tmp_path):
    path = form(np.ascontiguousarray(images), tmp_path)
    with pytest.raises(InputError, match=word):
        read(path, clean=CLEAN)
    np.testing.assert_array_equal(read(path, clean=CLEAN, checked=False).images, images)


def brewed(delta: torch.Tensor, path: Path) -> Path:
    where = [7, 3, 30]
    return save([delta[where] / torch.tensor([0.2470, 0.2435, 0.2616])[:, None, None], where], path / "p.pth")


@pytest.mark.parametrize(
    ("delta", "word"),
    [
        (DELTA / 255, "rounded away, as numbers 255 times too small are.*checked=False"),
        (DELTA.abs(), "must go up and down. .*the sign was lost.*checked=False"),
        (-DELTA.abs(), "must go up and down. .*the sign was lost.*checked=False"),
        (255 * DELTA, "255 times too large"),
    ],
)
def test_a_brew_that_is_plainly_misread(delta, word, tmp_path):
    path = brewed(delta, tmp_path)
    with pytest.raises(InputError, match=word):
        read(path, clean=CLEAN)
    assert read(path, clean=CLEAN, checked=False).poisoned.tolist() == [3, 7, 30]


def test_labels_may_be_what_is_poisoned(tmp_path):
    flipped = np.where(np.arange(N) < 5, (LABELS + 1) % K, LABELS)
    path = npz(IMAGES, tmp_path, flipped)
    assert read(path, clean=CLEAN).settings["moved"]["images"] == 0
    with pytest.raises(InputError, match=r"up to 8 levels .*Got the clean images"):
        read(path, clean=CLEAN, bound=EIGHT)


@pytest.mark.parametrize("bound", [EIGHT, None])
def test_a_set_may_say_that_nothing_in_it_is_poisoned(bound, tmp_path):
    nothing = Poisoned.of(IMAGES, LABELS, "none", [], bound=bound)
    assert check(nothing, CLEAN).images == 0
    write(nothing, tmp_path / "none.npz")
    assert read(tmp_path / "none.npz", clean=CLEAN).settings["moved"]["images"] == 0
    with pytest.raises(InputError, match="Got the clean images"):
        check(Poisoned.of(IMAGES, LABELS, "some", [3], bound=bound), CLEAN)


@pytest.mark.parametrize("out", ["poison.npz", "folder"])
def test_an_attack_without_a_bound_comes_back(out, tmp_path):
    clean = (KINDS["smooth"], np.arange(MANY) % K)
    made = make("cuda", clean)
    write(made, tmp_path / out)
    np.testing.assert_array_equal(read(tmp_path / out, clean=clean).images, made.images)


def test_one_level_of_rounding_is_allowed_and_two_are_not(tmp_path):
    for more, fits in ((1, True), (2, False)):
        moved = np.where(np.abs(LEVELS) == 8, np.sign(LEVELS) * (8 + more), LEVELS)
        path = npz(np.clip(IMAGES + moved, 0, 255), tmp_path)
        if fits:
            assert read(path, clean=CLEAN, bound=EIGHT).settings["moved"]["linf"] == 9
        else:
            with pytest.raises(InputError, match="Got up to 10"):
                read(path, clean=CLEAN, bound=EIGHT)


def test_labels_in_another_order_are_refused_without_a_bound(tmp_path):
    with pytest.raises(InputError, match="other labels for 40 of 40"):
        read(npz(np.roll(POISONED, 1, axis=0), tmp_path, np.roll(LABELS, 1)), clean=CLEAN)


def test_check_reports():
    poisoned = Poisoned.of(POISONED, LABELS, "made up", bound=EIGHT)
    moved = check(poisoned, CLEAN)
    assert (moved.images, moved.linf) == (N, 8)
    assert check(Poisoned.of(POISONED, LABELS, "made up"), CLEAN) == moved
    pixel = IMAGES.copy()
    pixel[:, 0, 0] = 255  # one pixel, up only, as OPS
    one = Poisoned.of(pixel, LABELS, "OPS", bound=Bound("l0", 1))
    assert check(one, CLEAN).pixels == 1
    with pytest.raises(InputError, match="within 1 pixels"):
        check(poisoned, CLEAN, bound=Bound("l0", 1))
    with pytest.raises(InputError, match="in the order of the poisoned"):
        check(poisoned, (IMAGES[:5], LABELS[:5]))


@pytest.mark.parametrize(
    ("delta", "word"),
    [
        (255 * DELTA, "Got numbers from -8 to 8, 255 times too large"),
        (DELTA / 255, "255 times too small"),
        (0 * DELTA, "zero everywhere"),
        (DELTA.abs(), "sign was lost"),
        (-DELTA.abs(), "sign was lost"),
        (2 * DELTA, r"up to 16 levels. Give bound=.*\[-1, 1\]"),
        (DELTA / 0, "NaN or infinity"),
        (DELTA[:7], r"one perturbation an image \(40\) or a class \(4\)"),
        (DELTA[..., :4], "of the size of the clean images"),
    ],
)
def test_perturbations_that_are_plainly_misread(delta, word, tmp_path):
    path = save(delta, tmp_path / "perturbation.pt")
    with pytest.raises(InputError, match=word):
        read(path, clean=CLEAN)


def test_another_bound_may_be_given(tmp_path):
    path = save(2 * DELTA, tmp_path / "perturbation.pt")
    got = read(path, clean=CLEAN, bound=Bound("linf", 16 / 255))
    assert got.bound.epsilon == 16 / 255
    with pytest.raises(InputError, match="no clean=: give the clean training set"):
        read(path)


@pytest.mark.parametrize("wrapped", [True, False])
def test_rem_without_its_sign(wrapped, tmp_path):
    levels = chw(LEVELS).astype(np.int8)
    path = dump(levels.view(np.uint8) if wrapped else np.abs(levels), tmp_path / "noise.pkl")
    with pytest.raises(InputError, match="sign was lost" + (r".*\.view\(np.int8\)" if wrapped else "")):
        read(path, clean=CLEAN)


@pytest.mark.parametrize(
    ("images", "word"),
    [
        (POISONED.astype(np.float32), "divide levels of 0 to 255 by 255"),
        (RANGE_UP.astype(np.float32) / 255, r"add 1 to images in \[-1, 1\]"),
        (POISONED.astype(np.float32) / 255**2, "all black: divided by 255 once too often"),
        ((3 * POISONED / 255 - 1.5).astype(np.float32), "undo the normalisation"),
        (np.full(POISONED.shape, np.nan, np.float32), "NaN"),
    ],
)
def test_float_images_that_are_plainly_misread(images, word, tmp_path):
    np.save(tmp_path / "x_train_p.npy", images)
    np.save(tmp_path / "y_train.npy", np.eye(K)[LABELS])
    with pytest.raises(InputError, match=word):
        read(tmp_path)


# no file runs code


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def evil(tmp_path: Path) -> Evil:
    yield (it := Evil(tmp_path / "was-run"))
    assert not it.marker.exists()


WANTED = rf"wants ({os.system.__module__}|os)\.system. It is refused, and nothing in it was run"


def test_the_evil_pickle_is_evil(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "was-run")))
    assert (tmp_path / "was-run").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_nothing(protocol, evil, tmp_path):
    path = dump([(b"\0" * 12, 1), (evil, 1)], tmp_path / "poison.pkl", protocol)
    with pytest.raises(InputError, match=WANTED):
        read(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["poison.pt", "poison.pth", "poison.pkl"])
def test_a_file_of_torch_runs_nothing(name, zipped, evil, tmp_path):
    path = save([DELTA, evil], tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=WANTED):
        read(path, clean=CLEAN)


@pytest.mark.parametrize("name", ["poisons", "base_indices", "target"])
def test_a_benchmark_folder_runs_nothing(name, evil, tmp_path):
    dump([evil], benchmark(tmp_path, [1], (pils(IMAGES)[0], 1)) / f"{name}.pickle")
    with pytest.raises(InputError, match=WANTED):
        read(tmp_path, clean=CLEAN)


def test_a_tensor_in_a_pickle_hides_no_other_pickle(evil, tmp_path):
    """A pickled tensor holds bytes that torch itself would unpickle."""
    inner = tmp_path / "inner"
    torch.save(evil, inner, _use_new_zipfile_serialization=False)
    data = inner.read_bytes()
    text = b"\x80\x02ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(data)) + data + b"\x85R."
    (tmp_path / "poison.pkl").write_bytes(text.replace(b"\x80\x02", b"\x80\x03", 1))
    with pytest.raises(InputError, match=WANTED):
        read(tmp_path / "poison.pkl")


def test_arrays_of_objects_run_nothing(evil, tmp_path):
    objects = np.array([evil, 1], dtype=object)
    np.save(tmp_path / "p.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "p.npz", data=objects, targets=objects)
    dump(objects, tmp_path / "p.pkl")
    for name in ("p.npy", "p.npz", "p.pkl"):
        with pytest.raises(InputError, match=r"Got"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"cbuiltins\neval\n(V1\ntR.", r"wants builtins\.eval"),
        (b"cbuiltins\ngetattr\n.", r"wants builtins\.getattr"),
        (b"cPIL.Image\nopen\n(V/etc/hostname\ntR.", r"wants PIL\.Image\.open"),
        (b"\x80\x04\x8c\x09PIL.Image\x8c\x0aImage.open\x93.", r"wants PIL\.Image\.Image\.open"),
        (b"\x80\x04\x8c\x05numpy\x8c\x06memmap\x93.", r"wants numpy\.memmap"),
        (b"cnumpy\nload\n.", r"wants numpy\.load"),
        (b"ctorch\nload\n.", r"wants torch\.load"),
        (b"(ios\nsystem\n.", r"wants os\.system"),
        (b"ccodecs\nencode\n.", r"wants codecs\.encode"),
        (b"c_codecs\nencode\n(Vx\nVzlib\ntR.", "text in 'zlib'"),
        (b"cnumpy\ndtype\n(VO\ntR.", "only numbers"),
        (b"cnumpy\nndarray\n((I99999999999\ntVf8\ntR.", "without its numbers"),
        (b"cnumpy.core.multiarray\nscalar\n}V__call__\nNsb.", "a state for a function"),  # altering what is called
        (b"cPIL.Image\nImage\n}V__setstate__\nNsb.", "cannot be read"),
        (b"cPIL.Image\nImage\n)\x81]((}VRGB\n(I900000\nI900000\ntNC\x00eb.", "cannot be read"),
        (b"Pos\n.", "persistent"),
        (b"\x82\x01.", "cannot be read"),  # copyreg's extension codes
    ],
)
def test_crafted_pickles_are_refused(text, word, tmp_path):
    (tmp_path / "p.pkl").write_bytes(text)
    with pytest.raises(InputError, match=word):
        read(tmp_path / "p.pkl")


def test_torchscript_is_not_loaded(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.pt", "w") as archive:
        archive.writestr("p/constants.pkl", pickle.dumps(()))
        archive.writestr("p/data.pkl", pickle.dumps([]))
        archive.writestr("p/version", "3")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "p.pt")


# damaged, unknown, and wrong arguments


def whole_files(folder: Path) -> dict[str, Path]:
    np.savez(folder / "p.npz", data=POISONED, targets=LABELS)
    np.save(folder / "t.npy", np.full((1, 3, S, S), 0.1, np.float32))
    return {
        "npz": folder / "p.npz",
        "npy": folder / "t.npy",
        "pkl": dump(chw(LEVELS).astype(np.int8), folder / "n.pkl"),
        "pt": save(DELTA, folder / "d.pt"),
        "legacy": save(DELTA, folder / "old.pt", _use_new_zipfile_serialization=False),
    }


@pytest.mark.parametrize("kind", ["npz", "npy", "pkl", "pt", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_files_that_were_cut_short(kind, share, tmp_path):
    path = whole_files(tmp_path)[kind]
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match="Got"):
        read(path, clean=CLEAN, target_class=1, count=1)


def test_a_flipped_bit_in_an_archive_is_seen(tmp_path):
    files = whole_files(tmp_path)
    for kind in ("npz", "pt"):
        data = bytearray(files[kind].read_bytes())
        data[len(data) // 2] ^= 1
        files[kind].write_bytes(data)
        with pytest.raises(InputError, match=r"another checksum|cannot be read|must be a whole"):
            read(files[kind], clean=CLEAN)


def test_a_broken_png_is_named(tmp_path):
    (tmp_path / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(InputError, match=r"3\.png is no readable image"):
        read(tmp_path, clean=CLEAN)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"a": 1}, "none of them"),
        ([], "none of them"),
        (torch.zeros(3, 3), "none of them"),
        ([(b"\0" * 12, 1), (b"\0" * 13, 1)], "13 bytes in item 1"),
        ([(b"\0" * 13, 1)], "not square need clean="),
        ([(b"\0" * 12, -1)], "an integer from 0"),
        ([(b"\0" * 12, 1), 3], "Got int as item 1"),
        ({"poison": [], "idx": []}, r"must hold a dict with poison"),
        ({"poison": [(DELTA[0], 1)], "idx": [1, 2]}, "Got 1 images, 1 labels and 2 indices"),
        ({"poison": [(DELTA[0], 1)], "idx": [N]}, "distinct images of the 40 of clean=. Got 40 to 40"),
        ({"poison": [(DELTA[0], 1)] * 2, "idx": [1, 1]}, "repeated"),
        ([DELTA[:2], [1]], "one perturbation for each of its ids"),
        ([DELTA[:2], ["a", "b"]], r"ids of .* must be integers"),
    ],
)
def test_content_that_is_no_poison(content, word, tmp_path):
    path = save(content, tmp_path / "p.pt")
    clean = None if isinstance(content, list) and content and isinstance(content[0], tuple) else CLEAN
    with pytest.raises(InputError, match=word):
        read(path, clean=clean)


def test_what_is_unknown_lists_the_formats(tmp_path):
    path = dump({"a": 1}, tmp_path / "p.pkl")
    with pytest.raises(
        InputError, match=r"a dict of 1 \(a: int\), which is none of them\. Name it with format=:"
    ) as it:
        read(path)
    assert all(name in str(it.value) for name in FORMATS)
    with pytest.raises(InputError, match=r"format must be one of benchmark, .*Got 'gtsrb'"):
        read(path, format="gtsrb")


@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_format_is_refused_by_its_reader(name, tmp_path):
    path = dump({"a": 1}, tmp_path / "p.pkl")
    with pytest.raises(InputError, match="Got"):
        read(path, clean=CLEAN, format=name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="Got"):
        read(tmp_path / "empty", clean=CLEAN, format=name)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"", "empty file"),
        (b"no pickle", "cannot be read"),
    ],
)
def test_downloads_that_went_wrong(content, word, tmp_path):
    (tmp_path / "p.pt").write_bytes(content)
    with pytest.raises(InputError, match=word):
        read(tmp_path / "p.pt")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"clean": (IMAGES[:7], LABELS[:7])}, r"\(40, 8, 8, 3\) in the file and \(7, 8, 8, 3\) in clean="),
        ({"clean": (IMAGES / 255, LABELS)}, "uint8"),
        ({"drop_negative": True}, "cast of EM's own loader"),
    ],
)
def test_wrong_arguments(arguments, word, tmp_path):
    with pytest.raises(InputError, match=word):
        read(npz(POISONED, tmp_path), **arguments)
    with pytest.raises(InputError, match="neither"):
        read(tmp_path / "missing.pt")


def test_folders_that_are_not_as_they_should_be(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "cat.png")
    with pytest.raises(InputError, match=r"<index>.png, the place .* Got cat.png"):
        read(tmp_path, clean=CLEAN)
    (tmp_path / "cat.png").rename(tmp_path / f"{N}.png")
    with pytest.raises(InputError, match=r"Got 40\.png"):
        read(tmp_path, clean=CLEAN)
    (tmp_path / f"{N}.png").rename(tmp_path / "1.png")
    Image.fromarray(IMAGES[0, :4]).save(tmp_path / "2.png")
    with pytest.raises(InputError, match=r"2\.png must have the size of the first"):
        read(tmp_path, clean=CLEAN)


def test_npz_of_another_layout(tmp_path):
    for data in (chw(POISONED), POISONED / 255):
        np.savez(tmp_path / "p.npz", data=data, targets=LABELS)
        with pytest.raises(InputError, match=r"uint8 \(N, H, W, C\)"):
            read(tmp_path / "p.npz")
    np.savez(tmp_path / "p.npz", data=POISONED, targets=LABELS[:3])
    with pytest.raises(InputError, match="40 images and 3 labels"):
        read(tmp_path / "p.npz")


def test_ntga_without_its_labels(tmp_path):
    np.save(tmp_path / "x_train_p.npy", (POISONED / 255).astype(np.float32))
    with pytest.raises(InputError, match=r"y_train\*\.npy. Got none"):
        read(tmp_path)
    np.save(tmp_path / "y_train.npy", np.ones((N, K)))
    with pytest.raises(InputError, match="one-hot"):
        read(tmp_path)
