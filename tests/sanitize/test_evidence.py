"""The evidence for each class is what independent computations give, for any votes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from purifyloader.sanitize import evidence

RNG = np.random.default_rng(0)
LABELS, KNOWN = RNG.integers(0, 4, 200), RNG.integers(0, 4, 120)


def votes(labels, share: float, rounds: int = 5):
    """Votes for the label, but for a share of them, which are for any class."""
    other = RNG.random((len(labels), rounds + 1)) < share
    return np.where(other, RNG.integers(0, 4, other.shape), labels[:, None])


VOTES, KNOWN_VOTES = votes(LABELS, 0.4), votes(KNOWN, 0.2)


def test_known_images_that_are_as_unlikely_are_counted():
    known = np.array([1.0, 2.0, 2.0, 4.0, 9.0])
    of = np.array([0, 0, 0, 0, 1])
    got = evidence.at_least(np.array([0.0, 2.0, 5.0, 9.0, 1.0]), np.array([0, 0, 0, 1, 2]), known, of)
    assert got.tolist() == [4, 3, 0, 1, 0]


def test_a_majority_is_the_commonest_class_and_in_doubt_the_first():
    rounds = np.array([[1, 1, 2], [1, 2, 3], [3, 2, 1]])
    assert evidence.majority(rounds, np.array([0, 3, 0])).tolist() == [1, 3, 1]


def test_an_image_leaves_its_label_where_most_rounds_call_it_otherwise():
    rows = np.array([[0, 0, 1, 1], [0, 0, 0, 1], [1, 2, 2, 2], [0, 1, 2, 3]])
    assert evidence.leaves(np.array([0, 0, 0, 0]), rows).tolist() == [True, False, False, True]


def test_outflow_is_the_test_of_two_shares():
    rows = evidence.outflow(LABELS, VOTES, KNOWN, KNOWN_VOTES, 4)
    for label, row in enumerate(rows):
        counts = []
        for labels, called in ((LABELS, VOTES), (KNOWN, KNOWN_VOTES)):
            own = [v for y, v in zip(labels, called, strict=True) if y == label == v[0]]
            counts.append((sum(sum(v[1:] == label) < 2.5 for v in own), len(own)))
        (a, n), (b, m) = counts
        pooled = (a + b) / (n + m)
        z = (a / n - b / m) / math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
        assert row["z"] == pytest.approx(z, abs=1e-3)
        assert row["lost"] == pytest.approx(a / n, abs=1e-3)


def test_published_is_the_formula_of_the_paper():
    rows = evidence.published(LABELS, VOTES, 4)
    divergences = []
    for label in range(4):
        kept = [v for y, v in zip(LABELS, VOTES, strict=True) if y == label and len(set(v)) > 1]
        divergences.append(-math.log(np.mean([v == label for v in kept])))
    middle = np.median(divergences)
    mad = 1.4826 * (np.median(np.abs(divergences - middle)) + 1e-6)
    assert [row["z"] for row in rows] == pytest.approx(list(np.abs(divergences - middle) / mad), abs=1e-3)


def test_published_has_no_score_where_it_would_divide_by_zero():
    labels = np.array([0, 0, 1, 1])
    rows = evidence.published(labels, np.array([[0, 1], [0, 1], [1, 1], [0, 2]]), 3)
    assert [row["kl"] for row in rows] == [pytest.approx(math.log(2), abs=1e-3), None, None]
    assert all(row["z"] is None for row in rows[1:])


def places(labels, unlikely: float, known: int = 50, networks: int = 4):
    """Places among so many known images, of which a share is the most unlikely of all."""
    places = RNG.integers(0, known + 1, (networks, len(labels)))
    return np.where(RNG.random(len(labels)) < unlikely, 0, places)


@pytest.mark.parametrize("known", [5, 20, 50, 400])
def test_by_chance_no_class_is_unlikely(known):
    labels, counts = np.repeat(np.arange(4), 5000), np.full((4, 4), known)
    rows = evidence.reference(places(labels, 0.0, known), labels, counts)
    for row in rows:
        assert row["unlikely"] == pytest.approx(row["expected"], abs=0.01)
        assert row["z"] < 3


@pytest.mark.parametrize("known", [5, 15, 50])
def test_few_known_images_give_no_false_alarm(known):
    """The place of the few most unlikely known images is chance itself: z allows for it."""
    z = []
    for _ in range(100):
        images, labels = RNG.normal(size=200), np.zeros(200, int)
        counts = [(RNG.normal(size=known)[:, None] >= images).sum(axis=0) for _ in range(4)]
        z.append(evidence.reference(np.stack(counts), labels, np.full((4, 1), known))[0]["z"])
    assert abs(np.mean(z)) < 0.4
    assert 0.7 < np.std(z) < 1.3
    assert np.mean(np.array(z) > evidence.LIMITS["reference"]) <= 0.01


def test_the_reference_finds_the_class_with_unlikely_images():
    labels = np.repeat(np.arange(4), 400)
    unlikely = places(labels, 0.0)
    unlikely[:, labels == 2] = places(np.zeros(400), 0.1)
    rows = evidence.reference(unlikely, labels, np.full((4, 4), 50))
    assert [row["z"] > evidence.LIMITS["reference"] for row in rows] == [False, False, True, False]
    assert 0.03 < rows[2]["shows"] < 0.1, "and half as many would not have shown"
    fewer = unlikely.copy()
    fewer[:, labels == 2] = places(np.zeros(400), rows[2]["shows"] / 2)
    assert evidence.reference(fewer, labels, np.full((4, 4), 50))[2]["z"] < evidence.LIMITS["reference"]


def test_what_all_classes_show_is_no_evidence():
    labels = np.repeat(np.arange(4), 400)
    rows = evidence.reference(places(labels, 0.3), labels, np.full((4, 4), 50))
    assert all(row["z"] < evidence.LIMITS["reference"] for row in rows)


def test_of_a_class_without_known_images_there_is_no_evidence():
    rows = evidence.reference(np.zeros((4, 3), int), np.array([0, 1, 1]), np.array([[5, 0]] * 4))
    assert [row["z"] is None for row in rows] == [False, True]


def test_inflow_counts_arrivals_from_other_classes_alone():
    known = np.arange(4).repeat(50)
    called = np.tile(known[:, None], (1, 4))
    called[:40, 1:] = 3  # of class 0, to class 3
    called[150:, 0] = 1  # of class 3, called 1, and then 3: back at their own
    called[150:, 1:] = 3
    rows = evidence.inflow(known, called, 4)
    assert [row["arrive"] > 0 for row in rows] == [False, False, False, True]
    assert rows[3]["z"] > evidence.LIMITS["inflow"]
