"""Back doors without a network: which images get the trigger, what they are called, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from purifyloader.datasets.arrays import Part
from purifyloader.errors import ConfigError, InputError
from purifyloader.poisons import ATTACKS, Poisoned, check, make, read
from purifyloader.poisons.attacks.backdoors import PATCHES

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
LABELS = np.arange(40) % 4
CLEAN = IMAGES, LABELS
WRONG = [name for name, attack in ATTACKS.items() if not attack.keeps_labels]
EVERY = [*WRONG, "sig"]

wrong = pytest.mark.parametrize("name", WRONG)
every = pytest.mark.parametrize("name", EVERY)


def triggered(poisoned: Poisoned) -> np.ndarray:
    """The places of the images that have the trigger itself."""
    return (
        poisoned.poisoned if poisoned.true_labels is None else np.flatnonzero(poisoned.labels != poisoned.true_labels)
    )


@wrong
def test_a_tenth_of_the_set_is_called_the_target_class(name):
    poisoned = make(name, CLEAN, target_class=2)
    which = triggered(poisoned)
    assert len(which) == 4
    assert 2 not in LABELS[which]
    assert set(poisoned.labels[which]) == {2}
    np.testing.assert_array_equal(poisoned.true_labels, LABELS)
    assert not np.shares_memory(poisoned.true_labels, LABELS)
    assert poisoned.settings["share"] == 0.1
    assert (poisoned.target_class, poisoned.trigger is not None) == (2, True)


@wrong
def test_the_same_images_are_drawn_for_each_attack(name):
    for given in ({"count": 7}, {"share": 0.25}):
        want = triggered(make("badnets", CLEAN, 5, target_class=0, **given))
        np.testing.assert_array_equal(triggered(make(name, CLEAN, 5, target_class=0, **given)), want)


@every
def test_the_trigger_of_the_result_makes_its_images(name):
    poisoned = make(name, CLEAN, target_class=1, count=5)
    which = triggered(poisoned)
    np.testing.assert_array_equal(poisoned.trigger(IMAGES[which], which), poisoned.images[which])


def test_a_wave_is_in_four_fifths_of_the_class_and_no_label_changes():
    poisoned = make("sig", CLEAN, target_class=3)
    assert len(poisoned.poisoned) == 8
    assert set(LABELS[poisoned.poisoned]) == {3}
    assert poisoned.true_labels is None
    assert poisoned.bound.epsilon == 20 / 255
    assert len(make("sig", CLEAN, target_class=3, share=0.5).poisoned) == 5


def test_images_warped_with_noise_keep_their_labels():
    poisoned = make("wanet", CLEAN, target_class=1, count=5)
    noisy = np.setdiff1d(poisoned.poisoned, triggered(poisoned))
    assert len(noisy) == 10
    np.testing.assert_array_equal(poisoned.labels[noisy], LABELS[noisy])
    assert (poisoned.images[noisy] != IMAGES[noisy]).any(axis=(1, 2, 3)).all()
    assert (poisoned.images[noisy] != poisoned.trigger(IMAGES[noisy], noisy)).any(axis=(1, 2, 3)).all()
    none = make("wanet", CLEAN, target_class=1, count=5, cross_ratio=0)
    np.testing.assert_array_equal(none.poisoned, triggered(poisoned))
    assert np.abs(none.trigger.flow).mean() == pytest.approx(1, rel=1e-6)


def test_a_patch_has_its_colours():
    assert PATCHES["white"].shape == (3, 3, 3)
    assert PATCHES["white"].min() == 255
    got = make("badnets", CLEAN, target_class=1, count=1, pattern="dataelixir")
    patch = got.images[got.poisoned[0], -4:, -4:]
    assert patch[::3, ::3].tolist() == [[[255, 255, 0], [255, 0, 255]], [[0, 255, 255], [122, 122, 122]]]
    np.testing.assert_array_equal(patch[:2, :2], np.broadcast_to(patch[0, 0], (2, 2, 3)))


def test_a_picture_is_given_or_drawn(tmp_path):
    picture = IMAGES[0]
    Image.fromarray(picture).save(tmp_path / "picture.png")
    one, two = (make("blended", CLEAN, target_class=1, image=given) for given in (picture, tmp_path / "picture.png"))
    np.testing.assert_array_equal(one.trigger.pattern, picture)
    np.testing.assert_array_equal(one.images, two.images)
    assert one.settings == two.settings
    drawn = [make("blended", CLEAN, seed, target_class=1).trigger.pattern for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).mean() > 0.9


@every
def test_a_part_of_a_dataset_has_the_classes_and_places_of_the_whole(name):
    keep = np.flatnonzero(LABELS < 3)[:20]
    part = Part(IMAGES[keep], LABELS[keep], keep, 4, 40)
    poisoned = make(name, part, target_class=0 if name == "sig" else 3, count=4)
    which = triggered(poisoned)
    np.testing.assert_array_equal(poisoned.trigger(IMAGES[keep[which]], keep[which]), poisoned.images[which])


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no class": ("badnets", {"target_class": 4}, "target_class must be a class from 0 to 3. Got 4"),
    "a name": ("wanet", {"target_class": "cat"}, "Got 'cat'"),
    "below": ("blended", {"target_class": -1}, "Got -1"),
    "a clean-label class": ("sig", {"target_class": True}, "Got True"),
    "more than there are": (
        "ftrojan",
        {"share": 0.9},
        "no more than the 30 images of other classes. Got 0.9 of the 40",
    ),
    "count": ("badnets", {"count": 31}, "from 1 to the 30 images of other classes. Got 31"),
    "none": ("badnets", {"share": 0}, "share must be above 0 and at most 1, which is the 40 images. Got 0"),
    "of a class": ("sig", {"count": 11}, "from 1 to the 10 images of class 1. Got 11"),
    "cross": (
        "wanet",
        {"share": 0.5},
        "cross_ratio must be of no more than the 20 images that are left. Got 2.0, which is 40",
    ),
    "negative cross": ("wanet", {"cross_ratio": -1}, "cross_ratio must be a finite number from 0 to 1000"),
    "grid": ("wanet", {"grid": 17}, "grid must be an integer from 2 to 16.* Got 17"),
    "strength": ("wanet", {"strength": 0}, "strength must be .* above 0 and .* Got 0"),
    "pattern": ("badnets", {"pattern": "black"}, "pattern must be one of 'white', 'dataelixir'. Got 'black'"),
    "alpha": ("blended", {"alpha": 0}, "alpha must be .* above 0 and of 1 or less. Got 0"),
    "another size": ("blended", {"image": IMAGES[0, :8]}, r"shape of an image, \(16, 16, 3\). Got \(8, 16, 3\)"),
    "no image": ("blended", {"image": 3}, "pattern of a trigger .* Got int"),
    "amplitude": ("sig", {"amplitude": 20}, "amplitude must be .* Got 20"),
    "frequency": ("sig", {"frequency": 8}, "below half of the image's 16 columns"),
    "block": ("ftrojan", {"block": 5}, "multiples of its block, 5"),
    "no block": ("ftrojan", {"block": 4.0}, "block must be an integer of 2 or more. Got 4.0"),
    "magnitude": ("ftrojan", {"magnitude": -1}, "magnitude must be .* above 0 and .* Got -1"),
    "seed": ("badnets", {"seed": 2**64}, "seed must fit in 64 bits"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named(case):
    name, options, words = BAD[case]
    with pytest.raises(InputError, match=words):
        make(name, CLEAN, **{"target_class": 1, **options})


@every
def test_share_and_count_are_not_both_given(name):
    with pytest.raises(ConfigError, match="share or count, not both"):
        make(name, CLEAN, target_class=1, share=0.1, count=3)


def test_small_images():
    tiny = np.zeros((4, 2, 2, 3), np.uint8), np.arange(4) % 2
    with pytest.raises(InputError, match=r"within an image, \(2, 2, 3\)"):
        make("badnets", tiny, target_class=0)
    assert make("ftrojan", tiny, target_class=0, magnitude=1.0).settings["block"] == 2


# Files of others


@pytest.mark.parametrize("moved", [True, False])
def test_the_clean_set_gives_the_true_labels_of_a_file(moved, tmp_path):
    made = make("blended", CLEAN, target_class=1, count=6)
    np.savez(tmp_path / "p.npz", data=made.images if moved else IMAGES, targets=made.labels)
    got = read(tmp_path / "p.npz", clean=CLEAN)
    np.testing.assert_array_equal(got.labels, made.labels)
    np.testing.assert_array_equal(got.true_labels, LABELS)
    np.testing.assert_array_equal(got.poisoned, made.poisoned)
    assert read(tmp_path / "p.npz").true_labels is None
    np.savez(tmp_path / "right.npz", data=made.images, targets=LABELS)
    assert read(tmp_path / "right.npz", clean=CLEAN).true_labels is None


def test_class_folders_give_wrong_labels_too(tmp_path):
    made = make("badnets", CLEAN, target_class=1, count=6)
    for index, label in enumerate(made.labels):
        (tmp_path / "p" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(made.images[index]).save(tmp_path / "p" / str(label) / f"{index}.png")
    got = read(tmp_path / "p", clean=CLEAN)
    np.testing.assert_array_equal(got.labels, made.labels)
    np.testing.assert_array_equal(got.true_labels, LABELS)


def test_a_set_whose_labels_are_mostly_wrong_says_what_they_were():
    made = make("blended", CLEAN, target_class=1, share=0.7)
    assert check(made, CLEAN).images == 28
    silent = Poisoned.of(made.images, made.labels, "x", made.poisoned)
    with pytest.raises(InputError, match="other labels for 28 of 40 images"):
        check(silent, CLEAN)
    only_labels = Poisoned.of(IMAGES, made.labels, "x", made.poisoned, true_labels=LABELS)
    assert check(only_labels, CLEAN).images == 0
