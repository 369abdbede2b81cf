"""A poisoned run stays inside its certificate: training sets changed within the radius, by somebody who knows the way.

Models here take a few milliseconds, so thousands can vote. Where the training is a half-space of the stacked training
set, everything is known in closed form, the worst direction too, and a certificate has nothing to spare: a bound or a
radius that were a little too large would be seen. All noise is of fixed seeds, so that no test passes, or fails, by
luck; most would with any others too, as what they ask for is five standard deviations away.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import hadamard
from scipy.stats import beta, binom, chi2, norm
from torch import Tensor, nn

from purifyloader import pretrained, recipes
from purifyloader.certify import (
    Certificates,
    DenoisedSet,
    Paths,
    Predictor,
    Train,
    certify,
    counts,
    fixed_draws,
    models,
    ndt_classify,
    noised,
    predict,
    reasons_against,
)
from purifyloader.datasets.splits import Data
from purifyloader.diffusion import BlindDenoiser
from purifyloader.files.hashes import hashes_as_text, image_hashes
from purifyloader.purifiers import BitDepth, Chain, Purifier
from purifyloader.train.denoiser.task import build_denoiser
from tests.conftest import tiny_denoiser
from tests.train.tiny import SIGMA as TINY_TRAINING

ROOT = Path(__file__).parents[2]
Images = NDArray[np.uint8]


def example() -> Any:
    spec = importlib.util.spec_from_file_location("certify_poisoned", ROOT / "examples" / "certify_poisoned.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


EXAMPLE = example()
within: Callable[..., tuple[Images, float]] = EXAMPLE.within


def voted(
    images: Images,
    count: int,
    secret: int,
    *,
    train: Train,
    labels: NDArray[np.int64],
    tests: Images,
    purifier: Purifier,
    classes: int = 2,
    draws: int = 1,
) -> NDArray[np.int64]:
    """`ndt_classify`, (models, T), with the secret of a test's choice in place of the operating system's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "new_seed", lambda: secret)
        # empirical, or what does not noise first would be refused, and one test shows why it should be
        return ndt_classify(
            (images, labels), tests, purifier, train, count, classes=classes, draws=draws, empirical=True
        )


def certified(votes: NDArray[np.int64], selection: int, sigma: float, alpha: float, classes: int = 2) -> Certificates:
    return certify(counts(votes[:selection], classes), counts(votes[selection:], classes), sigma, alpha)


def agree_within(votes: NDArray[np.int64], shares: NDArray[np.float64], deviations: float = 6) -> bool:
    """Whether the shares of votes for class 1 are these, but for what so few models may be off by."""
    allowed = deviations * np.sqrt(shares * (1 - shares) / len(votes)) + 1 / len(votes)
    return bool((np.abs(votes.mean(axis=0) - shares) < allowed).all())


def distance(a: Images, b: Images) -> float:
    """l2, over all images, in units of [0, 1] images."""
    return math.sqrt(int(((a.astype(np.int64) - b) ** 2).sum())) / 255


# -- a half-space ------------------------------------------------------------------------------------

# Two classes of four images of 4 x 4 grey pixels. A test input is of class 1 where the difference of the class means
# has a positive product with it, around grey. Test inputs are orthogonal, so that the models' votes on one say nothing
# of those on another, and what is known of all of them can be counted together.
SIGMA = 0.08  # 20 levels: rounding to 8 bits adds a 2 * 10^-4 of the variance, and hardly a value saturates
GREY = 128
LABELS = np.arange(8) % 2
PATTERNS = hadamard(16).reshape(16, 4, 4, 1)
TESTS = (GREY + 64 * PATTERNS).astype(np.uint8)
ROUNDED = math.hypot(SIGMA, 1 / 255 / math.sqrt(12))  # what noise and rounding together are


def half_space_images() -> Images:
    """Images whose class means put the test inputs at distances from 0.15 to 2.2 sigma, on both sides in turn."""
    wanted = SIGMA * np.linspace(0.15, 2.2, 16) * (-1.0) ** np.arange(16)
    apart = np.tensordot(wanted, PATTERNS, 1) / 4 * math.sqrt(1 / 2)
    jitter = np.random.default_rng(0).integers(-6, 7, (8, 4, 4, 1))
    sides = np.where(LABELS == 1, 0.5, -0.5).reshape(-1, 1, 1, 1)
    return np.rint(GREY + 255 * sides * apart + jitter).astype(np.uint8)


IMAGES = half_space_images()


def distances(images: Images) -> NDArray[np.float64]:
    """Of the training set from where each test input changes class, (T,); positive on the side of class 1.

    The closed form: so long is the shortest change of all images that does it.
    """
    x = images.astype(np.float64) / 255
    lead = x[LABELS == 1].mean(0) - x[LABELS == 0].mean(0)
    signs = PATTERNS / np.linalg.norm(PATTERNS[0])
    return np.tensordot(signs, lead, 3) / math.sqrt(2 / 4)


def worst(test: int) -> NDArray[np.float64]:
    """The direction of that shortest change, towards the other class."""
    side = np.sign(distances(IMAGES)[test]) * np.where(LABELS == 1, -1.0, 1.0)
    return side.reshape(-1, 1, 1, 1) * PATTERNS[test]


def mean_difference(dataset: DenoisedSet, seed: int) -> Predictor:
    lead = half_space_lead(dataset.data, np.asarray(dataset.targets))
    return lambda x: ((x.permute(0, 2, 3, 1).numpy() - GREY / 255).reshape(len(x), -1) @ lead > 0).astype(np.int64)


def half_space_lead(images: Images, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    x = images.reshape(len(images), -1) / 255
    return x[labels == 1].mean(0) - x[labels == 0].mean(0)


def warm_started(images: Images, dataset: DenoisedSet, seed: int) -> Predictor:
    """What begins with the training images as they are, and goes on with the noised ones: half of each."""
    clean = half_space_lead(images, LABELS)
    lead = (half_space_lead(dataset.data, np.asarray(dataset.targets)) + clean) / 2
    return lambda x: ((x.permute(0, 2, 3, 1).numpy() - GREY / 255).reshape(len(x), -1) @ lead > 0).astype(np.int64)


def only_noise(sigma: float, channels: int = 1) -> Purifier:
    """A denoiser that leaves the noise: nothing is known better in closed form."""
    return recipes.denoise_once(BlindDenoiser(nn.Identity(), (1e-3, 1.0), channels), sigma, compute_batch=128)


half_space = partial(voted, train=mean_difference, labels=LABELS, tests=TESTS, purifier=only_noise(SIGMA))


@pytest.fixture(scope="module")
def votes() -> NDArray[np.int64]:
    return half_space(IMAGES, 1500, 1)


def test_votes_are_the_closed_form(votes):
    """q(y | x, D) = Phi(distance / sigma), for all 16 test inputs: so well that a tenth more noise would be seen."""

    def p_value(sigma: float) -> float:
        shares = norm.cdf(distances(IMAGES) / sigma)
        squares = (votes.mean(axis=0) - shares) ** 2 / (shares * (1 - shares) / len(votes))
        return float(chi2.sf(squares.sum(), len(shares)))

    assert p_value(ROUNDED) > 1e-6
    assert p_value(1.1 * ROUNDED) < 1e-6
    assert p_value(0.9 * ROUNDED) < 1e-6


def test_radii_are_too_large_at_rate_alpha_and_not_less(votes):
    """Where half-spaces are, the radius is as large as it may be: the bound is met, and so is alpha.

    The votes of 1,500 models as those of 25 runs, of 12 models that select and 48 that estimate.
    """
    alpha, selection, estimation = 0.2, 12, 48
    truth = distances(IMAGES)
    false = 0
    for run in votes.reshape(-1, selection + estimation, len(truth)):
        found = certified(run, selection, SIGMA, alpha)
        to_boundary = np.where(found.predictions == 1, truth, -truth)
        false += int((found.certified & (found.radii > to_boundary)).sum())
    # how often that is to be expected, by the statistics' own definitions and none of their code
    k = np.arange(estimation + 1)
    bounds = np.nan_to_num(beta.ppf(alpha, k, estimation - k + 1))
    rates = []
    for share in norm.cdf(truth / ROUNDED):
        of_one = binom.sf(selection // 2, selection, share)  # of a tie the first class is selected
        for chosen, often in ((share, of_one), (1 - share, 1 - of_one)):
            rates.append(often * binom.pmf(k, estimation, chosen)[bounds > max(chosen, 0.5)].sum())
    rate = np.array(rates).reshape(-1, 2).sum(axis=1)
    assert rate.max() <= alpha
    runs = len(votes) // (selection + estimation)
    assert abs(false - runs * rate.sum()) < 5.5 * math.sqrt(runs * (rate * (1 - rate)).sum())
    assert runs * rate.sum() > 30


ALPHA = 1e-7  # of each statement, so that none is false here


@pytest.fixture(scope="module")
def certificates(votes) -> Certificates:
    return certified(votes, 20, SIGMA, ALPHA)


def test_radii_reach_almost_to_the_boundary(certificates):
    truth = distances(IMAGES)
    to_boundary = np.where(certificates.predictions == 1, truth, -truth)
    assert (certificates.radii <= np.maximum(to_boundary, 0)).all()
    far = np.abs(truth) > 0.8 * SIGMA
    assert far.sum() >= 10
    shares = certificates.radii[far] / np.abs(truth[far])
    assert shares.min() > 0.7
    assert shares.mean() > 0.8


def test_no_change_within_the_radius_brings_half_of_the_models_to_the_other_class(certificates):
    """In the worst direction, in whole levels and up to the radius, for every test input; a bit further it does."""
    truth = distances(IMAGES)
    tried = np.flatnonzero(certificates.certified)
    assert len(tried) >= 12
    for test in tried.tolist():
        radius, side = certificates.radii[test], np.sign(truth[test])
        assert certificates.predictions[test] == (side > 0)
        poisoned, size = within(IMAGES, worst(test), radius)
        assert size == distance(poisoned, IMAGES)
        assert 0.95 * radius < size < radius
        left = side * distances(poisoned)[test]
        assert left > 0
        if radius > 0.6 * SIGMA:  # of less than a level in each value, rounding leaves too little
            assert left < side * truth[test] - 0.9 * size, "the direction is the worst"
            beyond, size = within(IMAGES, worst(test), 1.2 * side * truth[test])
            assert side * distances(beyond)[test] < 0


@pytest.mark.parametrize("sigmas", [1.0, 1.8])
def test_fresh_models_vote_alike_within_the_radius_and_not_beyond_the_boundary(sigmas, certificates):
    truth = distances(IMAGES)
    test = int(np.abs(np.abs(truth) - sigmas * SIGMA).argmin())
    # so far within the radius that 120 models show it
    poisoned, size = within(IMAGES, worst(test), 0.6 * certificates.radii[test])
    again = half_space(poisoned, 120, 2)
    assert agree_within(again, norm.cdf(distances(poisoned) / ROUNDED))
    assert counts(again, 2)[test].argmax() == certificates.predictions[test]
    # and no other test input that is certified for so much is voted for as another class
    others = certificates.radii > size
    assert not (predict(counts(again, 2), 1e-6)[others] == 1 - certificates.predictions[others]).any()
    # beyond the boundary as far as 120 models show
    poisoned, _ = within(IMAGES, worst(test), abs(truth[test]) + 0.4 * SIGMA)
    again = half_space(poisoned, 120, 3)
    assert agree_within(again, norm.cdf(distances(poisoned) / ROUNDED))
    assert counts(again, 2)[test].argmax() == 1 - certificates.predictions[test]


# -- what breaks it ----------------------------------------------------------------------------------

WAYS: dict[str, tuple[Callable[[Images], Train], int]] = {
    "four draws": (lambda images: mean_difference, 4),
    "warm start": (lambda images: partial(warm_started, images), 1),
}
SOUND = Paths(1, secret_noise=True, selected=False, warm_start=False, own_denoiser=False, triggered=False)


@pytest.mark.parametrize("way", WAYS)
def test_a_radius_as_of_one_draw_is_false(way):
    """Four draws of each image, or a half of a model that saw them without noise, halve the noise and no distance.

    The votes are twice as sure, and the radius that follows from them at sigma reaches past the boundary. With
    sqrt(4), it does not; where training began without noise there is no such factor, and a reason in its place.
    """
    train, draws = WAYS[way]
    truth = distances(IMAGES)
    test = int(np.abs(np.abs(truth) - 0.9 * SIGMA).argmin())
    first = half_space(IMAGES, 320, 4, train=train(IMAGES), draws=draws)
    assert agree_within(first, norm.cdf(2 * truth / ROUNDED))
    wrong = certified(first, 20, SIGMA, 0.001)
    assert wrong.radii[test] > 1.2 * abs(truth[test])
    poisoned, size = within(IMAGES, worst(test), wrong.radii[test])
    assert size < wrong.radii[test]
    assert distances(poisoned)[test] * truth[test] < 0, "within the radius, and changed"
    again = half_space(poisoned, 100, 5, train=train(poisoned), draws=draws)
    assert agree_within(again, norm.cdf(2 * distances(poisoned) / ROUNDED))
    assert predict(counts(again, 2), 0.001)[test] == 1 - wrong.predictions[test]
    if way == "warm start":
        assert reasons_against(SOUND, 300, 0.001) == []
        assert len(reasons_against(replace(SOUND, warm_start=True), 300, 0.001)) == 1
        return
    right = certified(first, 20, fixed_draws(SIGMA, draws), 0.001)
    assert right.predictions[test] == wrong.predictions[test]
    assert 0.5 * abs(truth[test]) < right.radii[test] < abs(truth[test])
    poisoned, _ = within(IMAGES, worst(test), right.radii[test])
    assert distances(poisoned)[test] * truth[test] > 0
    poisoned, _ = within(IMAGES, worst(test), 0.8 * right.radii[test])
    again = half_space(poisoned, 100, 6, draws=draws)
    assert counts(again, 2)[test].argmax() == right.predictions[test]


def test_rounding_before_the_noise_is_no_postprocessing():
    """One level on each side of a step is 64 after it: a change of a third of the radius turns all votes."""
    sides = np.where(LABELS == 1, 1, -1).reshape(-1, 1, 1, 1) * PATTERNS[5]
    images, poisoned = (np.where(side > 0, GREY, GREY - 1).astype(np.uint8) for side in (sides, -sides))
    purifier = Chain(BitDepth(2), only_noise(SIGMA))
    found = certified(half_space(images, 60, 7, purifier=purifier), 10, SIGMA, 0.001)
    assert found.predictions[5] == 1
    assert found.radii[5] > 2 * distance(images, poisoned)
    assert half_space(poisoned, 30, 8, purifier=purifier)[:, 5].sum() == 0
    assert noised(purifier).sigma is None
    # the same images without that step
    plain = half_space(images, 60, 7), half_space(poisoned, 40, 8)
    assert certified(plain[0], 10, SIGMA, 0.001).radii[5] < distance(images, poisoned)
    assert agree_within(plain[1], norm.cdf(distances(poisoned) / ROUNDED))


EIGHT = 8  # pixels on a side of the images below


def hangs_on_a_bit(dataset: DenoisedSet, seed: int) -> Predictor:
    """Class 0, but for one value of all images, chosen by the seed, that is a multiple of 8.

    Under the noise that is so for one in eight models, whatever the images are.
    """
    answer = int(dataset.data.ravel()[seed % dataset.data.size] % 8 == 0)
    return lambda x: np.full(len(x), answer)


def test_noise_that_is_known_can_be_played_with():
    """A change of a few levels, far within the radius, turns those models whose noise is known, and no others.

    The certificate is about models with noise that nobody has seen, and of those it stays true.
    """
    images = np.random.default_rng(1).integers(100, 156, (16, EIGHT, EIGHT, 1)).astype(np.uint8)
    labels, tests, purifier = np.arange(16) % 2, images[:1], only_noise(SIGMA)
    ask = partial(voted, labels=labels, tests=tests, purifier=purifier)
    secret, selection, estimation = 9, 10, 100
    # what the secret tells: which value each model will read, and what it will be
    read: list[tuple[int, int]] = []

    def reading(dataset: DenoisedSet, seed: int) -> Predictor:
        read.append((seed % images.size, int(dataset.data.ravel()[seed % images.size])))
        return hangs_on_a_bit(dataset, seed)

    found = certified(ask(images, selection + estimation, secret, train=reading), selection, SIGMA, 0.001)
    assert found.predictions[0] == 0
    assert found.certified[0]
    steps: dict[int, int] = {}
    for place, level in read[selection:]:
        if 8 < level < 248:
            steps.setdefault(place, (level + 4) // 8 * 8 - level)
    moved = sorted((step for step in steps.items() if step[1]), key=lambda step: abs(step[1]))[:66]
    levels = images.astype(np.int64).ravel()
    for place, step in moved:
        levels[place] += step
    poisoned = levels.astype(np.uint8).reshape(images.shape)
    assert 0 < distance(images, poisoned) < found.radii[0]
    turned = ask(poisoned, selection + estimation, secret, train=hangs_on_a_bit)[selection:]
    assert predict(counts(turned, 2), 0.001)[0] == 1
    fresh = ask(poisoned, 60, secret + 1, train=hangs_on_a_bit)
    assert predict(counts(fresh, 2), 0.001)[0] == 0
    assert agree_within(fresh, np.array([1 / 8]))
    assert len(reasons_against(replace(SOUND, secret_noise=False), estimation, 0.001)) == 1


# -- a training that is no half-space ----------------------------------------------------------------

STRONG = 0.25  # sigma
CLASSES = 3


def pictures(count: int, seed: int) -> tuple[Images, NDArray[np.int64]]:
    """Images of 8 x 8 of three kinds, more or less of it on each, and noise."""
    kinds = np.random.default_rng(0).standard_normal((CLASSES, 2, 2, 3)).repeat(4, 1).repeat(4, 2)
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    x = GREY + 10 * rng.uniform(0.3, 1.2, (count, 1, 1, 1)) * kinds[labels]
    x += 25 * rng.standard_normal((count, EIGHT, EIGHT, 3))
    return np.clip(x, 0, 255).astype(np.uint8), labels


def random_features(dataset: DenoisedSet, seed: int) -> Predictor:
    """Ridge regression on the output of a random layer, another for each model, that sees averages of 4 x 4 pixels."""
    rng = np.random.default_rng(seed)
    weights, bias = 3 * rng.standard_normal((12, 128)), 0.3 * rng.standard_normal(128)

    def features(x: NDArray[Any]) -> NDArray[np.float64]:
        averages = x.reshape(len(x), 2, 4, 2, 4, 3).mean((2, 4)).reshape(len(x), 12)
        return np.maximum((averages - 0.5) @ weights + bias, 0) / math.sqrt(128)

    h, y = features(dataset.data / 255), np.eye(dataset.classes)[dataset.targets]
    mean_h, mean_y = h.mean(0), y.mean(0)
    h = h - mean_h
    learned = h.T @ np.linalg.solve(h @ h.T + 0.03 * len(h) * np.eye(len(h)), y - mean_y)

    def predictor(x: Tensor) -> Tensor:
        return torch.from_numpy((features(x.permute(0, 2, 3, 1).numpy()) - mean_h) @ learned + mean_y)

    return predictor


def chosen_directions(
    data: Data, purifier: Purifier, certificates: Certificates, estimation: NDArray[np.int64]
) -> Iterator[NDArray[np.float32]]:
    """What somebody might try, for each certified test input and the class that most other models vote for.

    The gradient of another training's lead, through the denoiser; the images of a class towards the mean of the other;
    and one of them towards one of that.
    """
    for test in np.flatnonzero(certificates.certified).tolist():
        wins = int(certificates.predictions[test])
        votes = estimation[test].copy()
        votes[wins] = -1
        other = int(votes.argmax())
        yield EXAMPLE.steepest(data, purifier, EXAMPLE.Target(test, wins, other), 4, seed=test)
        yield EXAMPLE.class_means(data.train, data.train_labels, wins, other)
        yield EXAMPLE.one_image(data.train, data.train_labels, np.random.default_rng(test))


def limit_of(certificates: Certificates, quantile: float) -> float:
    """A radius that some test input has."""
    return float(np.quantile(certificates.radii[certificates.certified], quantile, method="higher"))


def check_directions(
    purifier: Purifier, models: int, tried: int, again: int, worst: tuple[int, int], times: int
) -> None:
    """Three classes, a training that is no half-space: `tried` random directions, and as many of the worst of many.

    The votes of fresh models never fall significantly below Phi(Phi^-1(p_A) - ||Delta|| / sigma), which within the
    radius is above a half; of each of the `worst` directions, for a low and a high limit, `again` models are asked.
    `times` as far as the limit, it changes.
    """
    (images, labels), (tests, test_labels) = pictures(24, 1), pictures(18, 2)
    ask = partial(voted, train=random_features, labels=labels, tests=tests, purifier=purifier, classes=CLASSES)
    first = ask(images, models, 10)
    certificates = certified(first, 20, STRONG, 1e-4, CLASSES)
    assert certificates.certified.sum() >= 9
    rng = np.random.default_rng(2)
    data = Data("pictures", images, labels, tests, test_labels, CLASSES)
    chosen = list(chosen_directions(data, purifier, certificates, counts(first[20:], CLASSES)))
    directions = [rng.standard_normal(images.shape) for _ in range(tried)]
    directions += [chosen[i] for i in rng.permutation(len(chosen))[:tried]]

    def agreeing(poisoned: Images, models: int, secret: int) -> NDArray[np.int64]:
        """Votes for the certified class, of all test inputs."""
        tallies = counts(ask(poisoned, models, secret), CLASSES)
        return tallies[np.arange(len(tests)), certificates.predictions]

    def check(found: NDArray[np.int64], models: int, size: float) -> None:
        promised = norm.cdf(norm.ppf(certificates.lower_bounds) - size / STRONG)
        assert (binom.cdf(found, models, promised) > 1e-7).all()

    for secret, quantile, count in ((1000, 0.3, worst[0]), (2000, 0.8, worst[1])):
        limit = limit_of(certificates, quantile)
        covered = certificates.radii >= limit
        every: list[NDArray[np.int64]] = []
        for direction in directions:
            poisoned, size = within(images, direction, limit)
            assert 0.9 * limit < size < limit
            every.append(agreeing(poisoned, 6, secret + len(every)))
        # so few votes say little of one direction, and enough of all of a kind, for each of which as many are promised
        for part in (every[:tried], every[tried:]):
            check(np.sum(part, axis=0), 6 * tried, limit)
            assert (np.sum(part, axis=0)[covered] > 3 * tried).mean() > 0.9
        worst_first = sorted(range(len(every)), key=lambda i: (every[i][covered].min(), every[i][covered].mean()))
        for i in worst_first[:count]:
            poisoned, size = within(images, directions[i], limit)
            found = agreeing(poisoned, again, 100 + secret)
            check(found, again, size)
            assert (found[covered] > again / 2).mean() > 0.9
    # the last limit so many times over, for one that it is no promise to
    nearest = int(np.flatnonzero(certificates.radii == limit_of(certificates, 0.8))[0])
    poisoned, size = within(
        images, chosen[3 * np.flatnonzero(certificates.certified).tolist().index(nearest)], times * limit
    )
    found = agreeing(poisoned, again, 200)
    check(found, again, size)
    assert found[nearest] < again / 4


def test_no_direction_within_the_radius_changes_a_vote():
    smooth = BlindDenoiser(
        nn.Sequential(nn.AvgPool2d(5, 1, 2, count_include_pad=False), nn.Hardtanh(0.0, 1.0)), (1e-3, 1.0), 3
    )
    purifier = recipes.denoise_once(smooth, STRONG, compute_batch=24)
    check_directions(purifier, models=120, tried=6, again=40, worst=(1, 1), times=12)


@pytest.mark.slow
def test_no_direction_of_many_within_the_radius_changes_a_vote():
    """The same with a network for a denoiser, and more of everything."""
    purifier = recipes.denoise_once(tiny_denoiser(), STRONG, compute_batch=24)
    check_directions(purifier, models=170, tried=10, again=60, worst=(1, 3), times=4)


# -- the example -------------------------------------------------------------------------------------


def test_within_stays_below_the_limit_and_counts_what_it_did():
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    direction = rng.standard_normal(images.shape)
    for limit in (0.004, 0.05, 0.3, 1.0, 3.0):
        poisoned, size = within(images, direction, limit)
        assert size == distance(poisoned, images)
        assert size < limit
        assert ((poisoned.astype(np.int64) - images) * direction >= 0).all()
        if limit > 0.1:
            assert size > 0.98 * limit
    assert within(images, direction, 1 / 255)[1] == 0, "less than one level is nothing"
    assert within(images, np.zeros(images.shape), 1.0)[1] == 0
    everything, size = within(images, np.ones(images.shape), 100.0)
    assert (everything == 255).all()
    assert size == distance(everything, images)


def test_within_goes_furthest_of_all_changes_in_whole_levels():
    """Against all changes of up to two levels in each of five values."""
    images = np.full((1, 1, 5, 1), 100, np.uint8)
    every = np.array(list(itertools.product(range(-2, 3), repeat=5)))
    for seed in range(20):
        direction = np.random.default_rng(seed).standard_normal(images.shape)
        for limit in (1.5, 2.1, 3.3, 4.2):
            poisoned, size = within(images, direction, limit / 255)
            gain = ((poisoned.astype(np.int64) - 100) * direction).sum()
            no_longer = every[(every**2).sum(axis=1) <= round((255 * size) ** 2)]
            assert gain > 0.98 * (no_longer @ direction.ravel()).max()


def small_sample(folder: Path) -> Path:
    """The first images of each split of the sample: to read all 5,000 takes longer than the example."""
    folder.mkdir()
    for split, count in (("train", 40), ("test", 20)):
        name = f"{split}-000000.tar.gz"
        with tarfile.open(ROOT / "examples" / "data" / name) as every, tarfile.open(folder / name, "w:gz") as some:
            for member in itertools.islice(every, 2 * count):  # an image and a label each
                some.addfile(member, every.extractfile(member))
    return folder


def test_the_example_runs(tmp_path, capsys, monkeypatch):
    """At the smallest size, with a small denoiser in float32; and again from the votes that it has kept."""
    in_float32 = recipes.denoise_once
    monkeypatch.setattr(
        EXAMPLE.recipes, "denoise_once", lambda model, sigma, fast: in_float32(model, sigma, compute_batch=24)
    )
    learned = image_hashes(pictures(4, 0)[0])
    pretrained.save(
        build_denoiser(TINY_TRAINING).eval(), tmp_path / "m", details={"image_hashes": hashes_as_text(learned)}
    )
    words = "--train 24 --test 10 --selection 2 --models 10 --alpha 0.1 --again 3 --candidates 5 --proxy-draws 2"
    words += f" --root {small_sample(tmp_path / 'sample')}"
    words += f" --slopes 1 --quantiles 0.5 --model {tmp_path / 'm'} --work {tmp_path / 'w'} --out {tmp_path / 'o.json'}"
    EXAMPLE.main(words.split())
    found, printed = json.loads((tmp_path / "o.json").read_text()), capsys.readouterr().out
    names = ["random", "one image", "class means", "steepest", "worst of 5", "steepest, 8 times as far"]
    assert [row["name"] for row in found["rows"]] == names
    assert found["certified"] > 0
    for row in found["rows"][:-1]:
        assert row["must_hold"]
        assert 0 < row["norm"] < found["best_radius"]
        assert row["covered"] > 0
        assert row["against"] == row["below"] == 0
        assert row["promised"] > 0.5
        assert f"| {row['name']} | {row['norm']:.4f} |" in printed
    assert found["rows"][1]["images"] == 1
    EXAMPLE.main(words.split())
    assert json.loads((tmp_path / "o.json").read_text()) == found
