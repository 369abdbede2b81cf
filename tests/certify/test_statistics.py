"""Votes to certificates: against SciPy, closed forms, and classifiers of which everything is known."""

from __future__ import annotations

import builtins
import dataclasses
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from purifyloader.certify import (
    ABSTAIN,
    Certificates,
    Paths,
    best_lower_bound,
    best_radius,
    certified_accuracy,
    certify,
    fixed_draws,
    linf_epsilon,
    linf_images,
    models_needed,
    predict,
    radius_per_image,
    reasons_against,
    voted_accuracy,
)
from purifyloader.errors import InputError, PurifyError

ROOT = Path(__file__).parents[2]


def of_first(agreeing, models, classes=2):
    """Votes for class 0, the others all for class 1."""
    agreeing = np.asarray(agreeing)
    votes = np.zeros((len(agreeing), classes), np.int64)
    votes[:, 0], votes[:, 1] = agreeing, models - agreeing
    return votes


def chosen_first(rows, classes=2):
    """Selection votes that choose class 0."""
    return of_first(np.full(rows, 3), 3, classes)


def random_votes(rows, classes, models, seed):
    rng = np.random.default_rng(seed)
    return rng.multinomial(models, rng.dirichlet(np.full(classes, 0.3), rows))


# -- predict -----------------------------------------------------------------------------------------


def test_predict_is_scipys_two_sided_binomial_test():
    pairs = [(a, b) for a in range(1, 31) for b in range(a + 1)]
    for a, b in pairs:
        p_value = stats.binomtest(a, a + b, 0.5).pvalue
        for alpha in (0.3, 0.05, 0.001):
            # a third class, smaller, does not take part in the test
            assert predict([[b, b // 2, a]], alpha)[0] == (2 if p_value <= alpha else ABSTAIN), (a, b, alpha)


def test_predict_at_its_boundary():
    """n votes out of n have the p-value 2^(1 - n), exactly."""
    for n in range(2, 60):
        for votes in ([[0, n]], [[n, 0, 0]]):
            alpha = 2.0 ** (1 - n)
            assert predict(votes, alpha)[0] == np.argmax(votes)
            assert predict(votes, math.nextafter(alpha, 0))[0] == ABSTAIN


def test_predict_abstains_at_ties_and_on_few_models():
    assert predict([[50, 50, 0], [50, 0, 50]], 0.999).tolist() == [ABSTAIN, ABSTAIN]
    assert predict([[1, 0]], 0.999).tolist() == [ABSTAIN]
    assert predict([[9, 1]], 0.01).tolist() == [ABSTAIN]
    assert predict([[10, 0]], 0.01).tolist() == [0]


def test_a_tie_behind_the_first_decides_nothing():
    for row in ([[80, 10, 10]], [[10, 80, 10]], [[10, 10, 80]]):
        assert predict(row, 0.001)[0] == np.argmax(row)


def test_predict_is_wrong_at_most_at_rate_alpha():
    """Hung & Fithian 2019: at its hardest, where another class has almost the same probability."""
    alpha, trials = 0.05, 40_000
    for q in ([0.501, 0.499], [0.34, 0.33, 0.33], [0.1001, *[0.8999 / 9] * 9]):
        said = predict(np.random.default_rng(0).multinomial(60, q, trials), alpha)
        wrong = ((said != 0) & (said != ABSTAIN)).sum()
        assert wrong <= trials * alpha + 4 * math.sqrt(trials * alpha)
    # and the plain majority is wrong far more often
    majority = np.random.default_rng(0).multinomial(60, [0.501, 0.499], trials).argmax(axis=1)
    assert (majority != 0).sum() > 5 * trials * alpha


# -- certify -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [1, 2, 7, 30, 100])
def test_the_bound_is_scipys_clopper_pearson(models):
    agreeing = np.arange(models + 1)
    for alpha in (0.3, 0.05, 0.001, 1e-6):
        found = certify(chosen_first(models + 1), of_first(agreeing, models), 0.25, alpha)
        expected = [
            stats.binomtest(int(k), models, alternative="greater").proportion_ci(1 - alpha, method="exact").low
            for k in agreeing
        ]
        np.testing.assert_allclose(found.lower_bounds, expected, rtol=1e-9, atol=1e-11)  # it searches to 2e-12
        some = agreeing[1:]
        exact = [0, *stats.beta.ppf(alpha, some, models - some + 1)]
        np.testing.assert_allclose(found.lower_bounds, exact, rtol=1e-13, atol=0)
        above = np.array(expected) > 0.5
        np.testing.assert_allclose(found.radii[above], 0.25 * stats.norm.ppf(np.array(expected)[above]), rtol=1e-9)
        assert (found.radii[~above] == 0).all()
        assert (found.certified == above).all()


@pytest.mark.parametrize("models", [1000, 100_000, 10_000_000])
def test_the_bound_of_many_models(models):
    """By its definition: as many votes or more have the probability alpha."""
    agreeing = np.unique(np.linspace(models // 2, models, 50).astype(int))
    bounds = certify(chosen_first(len(agreeing)), of_first(agreeing, models), 1.0, 0.001).lower_bounds
    np.testing.assert_allclose(stats.binom.sf(agreeing - 1, models, bounds), 0.001, rtol=1e-5)
    assert (bounds < agreeing / models).all()


def test_the_papers_example():
    """m = 1000, alpha = 0.001, sigma = 1, all agree."""
    found = certify(chosen_first(1), of_first([1000], 1000), 1.0, 0.001)
    assert found.lower_bounds[0] == 0.001 ** (1 / 1000) == best_lower_bound(1000, 0.001)
    assert found.radii[0] == best_radius(1.0, 1000, 0.001)
    assert round(float(radius_per_image(found.radii, 1)[0]), 2) == 2.46
    assert round(float(radius_per_image(found.radii, 500)[0]), 2) == 0.11
    assert (found.models, found.classes, found.sigma, found.alpha) == (1000, 2, 1.0, 0.001)
    assert found.lower_bounds.dtype == found.radii.dtype == np.float64
    assert found.predictions.dtype == np.int64


def test_a_plan_and_a_certificate_agree_to_the_last_bit():
    for models in (1, 2, 3, 10, 99, 100, 1000):
        for alpha in (0.3, 0.05, 0.001):
            found = certify(chosen_first(1), of_first([models], models), 0.1, alpha)
            assert found.radii[0] == best_radius(0.1, models, alpha)


def test_the_radius_grows_with_votes_and_with_sigma():
    agreeing = np.arange(501)
    found = [certify(chosen_first(501), of_first(agreeing, 500), sigma, 0.001) for sigma in (0.1, 0.25, 0.5, 1.0)]
    for its in found:
        assert (np.diff(its.lower_bounds) > 0).all()
        assert (np.diff(its.radii) >= 0).all()
        assert (np.diff(its.radii[its.certified]) > 0).all()
        assert 0 < its.certified.sum() < 250
        np.testing.assert_allclose(its.radii, its.sigma * found[-1].radii, rtol=1e-14)
    for less, more in itertools.pairwise(found):
        assert (less.radii < more.radii)[more.certified].all()
    sure = [certify(chosen_first(1), of_first([480], 500), 1.0, alpha).radii[0] for alpha in (0.1, 0.01, 0.001)]
    assert sure == sorted(sure, reverse=True)


def test_estimation_votes_do_not_select():
    selection = random_votes(300, 10, 20, seed=0)
    found = [certify(selection, random_votes(300, 10, 100, seed), 0.5, 0.01) for seed in (1, 2, 3)]
    for its in found:
        assert (its.predictions == selection.argmax(axis=1)).all()
    # all of them against it: the class stays, and has no certificate
    against = certify([[3, 0]], [[0, 1000]], 0.5, 0.01)
    assert (against.predictions[0], against.lower_bounds[0], against.radii[0]) == (0, 0, 0)


def test_a_tied_selection_takes_the_first_class():
    found = certify([[2, 5, 5]], [[0, 0, 100]], 0.5, 0.01)
    assert found.predictions.tolist() == [1]
    assert not found.certified.any()
    assert certify([[2, 5, 5]], [[0, 100, 0]], 0.5, 0.01).certified.all()


def test_no_certificate_where_half_cannot_be_excluded():
    """9 of 9 votes exclude p = 1/2 only at levels above 2^-9."""
    votes = of_first([9], 9)
    assert not certify(chosen_first(1), votes, 1.0, 0.001).certified.any()
    assert certify(chosen_first(1), votes, 1.0, 0.002).certified.all()
    assert certify(chosen_first(1), of_first([10], 10), 1.0, 0.001).certified.all()


def test_no_radius_is_infinite():
    alpha = math.nextafter(1, 0)
    found = certify(chosen_first(2), of_first([10**9, 10**9 - 1], 10**9), 1.0, alpha)
    assert np.isfinite(found.radii).all()
    assert math.isfinite(best_radius(1.0, 10**9, alpha))


def violations(bound, alpha=0.05, models=150, trials=20_000):
    """How often `bound` of the votes on known classifiers is above the true radius, for each probability.

    A model that looks at the sign of a linear function of its training set, w . (D + noise) + b, votes its class
    with q = Phi((w . D + b) / (sigma |w|)), and the smallest Delta that turns the majority has exactly the norm
    sigma Phi^-1(q).
    """
    rng = np.random.default_rng(0)
    sigma, out = 0.25, []
    for q in (0.45, 0.5, 0.6, 0.75, 0.9, 0.97, 0.995):
        votes = of_first(rng.binomial(models, q, trials), models)
        true = sigma * max(stats.norm.ppf(q), 0.0)
        out.append((bound(votes, sigma, alpha) > true).mean())
    return np.array(out)


def test_certificates_are_false_at_most_at_rate_alpha():
    alpha, trials = 0.05, 20_000
    by_bound = violations(lambda votes, sigma, a: certify(chosen_first(len(votes)), votes, sigma, a).radii)
    allowed = alpha + 4 * math.sqrt(alpha / trials)
    assert (by_bound <= allowed).all()
    assert (by_bound[1:5] > alpha / 2).all()  # it is not so careful that this would show nothing

    # the share of votes in place of the bound
    share = violations(lambda votes, sigma, _: sigma * stats.norm.ppf(np.clip(votes[:, 0] / votes.sum(1), 0.5, 1)))
    assert (share[1:] > 6 * allowed).all()


def test_votes_that_select_and_estimate_are_false_more_often():
    """Between two equal classes any certificate is false. Here both parts see the same votes."""
    alpha, models, trials = 0.05, 10_001, 40_000
    rng = np.random.default_rng(0)
    votes, others = (of_first(rng.binomial(models, 0.5, trials), models) for _ in range(2))
    allowed = alpha + 4 * math.sqrt(alpha / trials)
    assert certify(others, votes, 1.0, alpha).certified.mean() <= allowed
    assert certify(votes.copy(), votes, 1.0, alpha).certified.mean() > 1.5 * allowed
    with pytest.raises(InputError, match="other models"):
        certify(votes, votes[:], 1.0, alpha)


# -- accuracy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_never_rises(seed):
    labels = np.random.default_rng(seed).integers(0, 4, 200)
    found = certify(random_votes(200, 4, 9, seed), random_votes(200, 4, 60, seed), 0.5, 0.01)
    radii = np.concatenate([[0], np.sort(found.radii), np.linspace(0, 3, 50)])
    radii.sort()
    curve = certified_accuracy(found, labels, radii)
    assert (np.diff(curve) <= 0).all()
    assert 0 < curve[0] <= voted_accuracy(found, labels)
    assert curve[-1] == 0
    right = found.predictions == labels
    assert voted_accuracy(found, labels) == right.mean()
    assert curve.tolist() == [(right & (found.radii > r)).mean() for r in radii]


def test_the_curve_is_open_at_the_radius():
    found = Certificates(np.array([0, 1, 1]), np.full(3, 0.9), np.array([0.5, 1.0, 0.0]), 1.0, 0.1, 50, 2)
    assert certified_accuracy(found, [0, 1, 1], [0.5, 0.0, 0.49, 1.0]).tolist() == [1 / 3, 2 / 3, 2 / 3, 0]
    assert certified_accuracy(found, [1, 1, 1], [0.0]).tolist() == [1 / 3]
    assert certified_accuracy(found, [0, 1, 1], []).tolist() == []
    assert voted_accuracy(found, [0, 1, 1]) == 1
    assert voted_accuracy(found, [1, 0, 1]) == pytest.approx(1 / 3)


# -- radii in other words ----------------------------------------------------------------------------


def test_images_and_epsilon():
    """Appendix B: 16/255 in each of 3 * 32 * 32 values is 3.48."""
    d = 3 * 32 * 32
    assert round(16 / 255 * math.sqrt(d), 2) == 3.48
    assert linf_images([3.47, 3.49, 34.78, 0.0, 34.77], 16 / 255, d).tolist() == [0, 1, 100, 0, 99]
    radius = np.linspace(0.01, 40, 500)
    images = linf_images(radius, 8 / 255, d)
    of_one = 8 / 255 * math.sqrt(d)
    assert (of_one * np.sqrt(images[images > 0]) < radius[images > 0]).all()
    assert (of_one * np.sqrt(images + 1) >= radius).all()
    assert linf_images(radius.reshape(50, 10), 8 / 255, d).shape == (50, 10)


def test_at_equality_one_image_fewer():
    for r in range(1, 60):
        radius = np.array([r, math.nextafter(r, 0), math.nextafter(r, math.inf)])
        assert linf_images(radius, 0.25, 16).tolist() == [r * r - 1, r * r - 1, r * r]  # one image is 1.0
    assert linf_images(1.0, 1e-12, 1) == 2**63 - 1  # more than there are
    assert linf_images(0.0, 1.0, 1) == 0


def test_epsilon_of_so_many_images():
    for r in (1, 7, 500):
        for radius in (0.11, 2.46, 13.0):
            epsilon = float(linf_epsilon(radius, r, 3072))
            assert linf_images(radius, epsilon * (1 - 1e-12), 3072) == r
            assert linf_images(radius, epsilon * (1 + 1e-12), 3072) == r - 1
            assert epsilon * math.sqrt(3072 * r) == pytest.approx(radius, rel=1e-14)
            assert radius_per_image(radius, r) == pytest.approx(epsilon * math.sqrt(3072), rel=1e-14)
    assert radius_per_image([[1.0, 2.0]], 4).tolist() == [[0.5, 1.0]]


# -- what a certificate takes ------------------------------------------------------------------------


def test_the_best_bound():
    for m in (1, 10, 1000):
        assert best_lower_bound(m, 0.001) ** m == pytest.approx(0.001, rel=1e-12)
    assert best_radius(0.25, 100, 0.001) == pytest.approx(0.25 * stats.norm.ppf(0.001**0.01), rel=1e-12)
    assert best_radius(1.0, 9, 0.001) == 0
    assert best_radius(1.0, 10, 0.001) > 0


def test_models_needed_is_the_inverse():
    for alpha in (0.1, 0.001, 1e-6):
        for m in [*range(1, 200), 1000, 12_345, 1_000_000]:
            radius = best_radius(0.25, m, alpha)
            if radius == 0:
                continue
            assert models_needed(0.25, radius, alpha) == m
            assert models_needed(0.25, math.nextafter(radius, 0), alpha) == m
            assert models_needed(0.25, math.nextafter(radius, math.inf), alpha) == m + 1
    assert models_needed(1.0, 0, 0.001) == 10
    assert models_needed(1.0, 0, 0.6) == 1
    assert models_needed(0.5, 1.0, 0.001) == math.ceil(math.log(0.001) / stats.norm.logcdf(2.0))
    with pytest.raises(InputError, match=r"within reach of 1,000,000,000 models: .* below 5\.6.* Got 6: raise sigma"):
        models_needed(1.0, 6.0, 0.001)


def test_fixed_draws():
    """K noisy sights of a number are as good as their mean, whose noise is sigma / sqrt(K)."""
    assert fixed_draws(0.5, 1) == 0.5
    assert fixed_draws(0.5, 4) == 0.25
    noise = np.random.default_rng(0).normal(0, 0.5, (20_000, 9)).mean(axis=1)
    assert noise.std() == pytest.approx(fixed_draws(0.5, 9), rel=0.03)


# -- guards ------------------------------------------------------------------------------------------

SOUND = Paths(draws=1, secret_noise=True, selected=False, warm_start=False, own_denoiser=False, triggered=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"draws": None}, "^Fresh noise in each epoch"),
        ({"secret_noise": False}, "^Noise that can be foreseen"),
        ({"selected": True}, "looking at them without noise"),
        ({"warm_start": True}, "^Training began on the same images"),
        ({"own_denoiser": True}, "has learned from the same images"),
        ({"triggered": True}, "^A trigger changes the test inputs"),
    ],
)
def test_each_reason_against_a_certificate(change, reason):
    assert reasons_against(SOUND, 100, 0.001) == []
    (found,) = reasons_against(dataclasses.replace(SOUND, **change), 100, 0.001)
    assert re.search(reason, found)


def test_reasons_add_up():
    assert reasons_against(dataclasses.replace(SOUND, draws=20), 10, 0.001) == []
    (few,) = reasons_against(SOUND, 9, 0.001)
    assert few.startswith("9 models cannot certify anything at alpha 0.001, even where all agree: it takes at least 10")
    nothing = Paths(draws=None, secret_noise=False, selected=True, warm_start=True, own_denoiser=True, triggered=True)
    assert len(set(reasons_against(nothing, 9, 0.001))) == 7


def test_nothing_is_assumed_of_the_paths():
    with pytest.raises(TypeError):
        Paths(draws=1)
    for bad in ({"draws": 0}, {"draws": True}, {"draws": 1.0}, {"selected": 0}, {"secret_noise": "yes"}):
        with pytest.raises(InputError, match=f"^{next(iter(bad))} must be .* Got"):
            dataclasses.replace(SOUND, **bad)
    with pytest.raises(InputError, match="models"):
        reasons_against(SOUND, 0, 0.001)
    with pytest.raises(InputError, match="alpha"):
        reasons_against(SOUND, 10, 0)


# -- what is refused ---------------------------------------------------------------------------------

BAD_VOTES = {
    "negative": ([[3, -1], [1, 1]], r"counts, from 0\. Got -1"),
    "floats": ([[3.0, 1.0]], r"integers \(T, K\).*Got float64 \(1, 2\)"),
    "NaN": ([[3.0, math.nan]], r"integers \(T, K\)"),
    "booleans": ([[True, False]], r"integers \(T, K\).*Got bool"),
    "a list": ([3, 1], r"integers \(T, K\).*\(2,\)"),
    "three dimensions": ([[[3, 1]]], r"integers \(T, K\).*\(1, 1, 2\)"),
    "one class": ([[3], [3]], r"two or more classes.*\(2, 1\)"),
    "no test input": (np.zeros((0, 2), int), r"one or more test inputs.*\(0, 2\)"),
    "no vote": ([[0, 0]], r"Got from 0 to 0 votes"),
    "a row without": ([[3, 1], [0, 0]], r"Got from 0 to 4 votes"),
    "a vote lost": ([[3, 1], [3, 0]], r"Got from 3 to 4 votes.*lost, or counted twice"),
}


@pytest.mark.parametrize("kind", BAD_VOTES)
def test_bad_votes(kind):
    votes, message = BAD_VOTES[kind]
    good = np.full((max(len(votes), 1), 2), 2)
    with pytest.raises(InputError, match=f"^votes .*{message}"):
        predict(votes, 0.1)
    with pytest.raises(InputError, match=f"^selection_votes .*{message}"):
        certify(votes, good, 1.0, 0.1)
    with pytest.raises(InputError, match=f"^estimation_votes .*{message}"):
        certify(good, votes, 1.0, 0.1)


@pytest.mark.parametrize("other", [[[1, 2, 3]], [[1, 2], [2, 1]]])
def test_votes_that_do_not_fit(other):
    with pytest.raises(InputError, match=r"same test inputs and classes\. Got \(1, 2\) and"):
        certify([[2, 1]], other, 1.0, 0.1)


@pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0, -0.1, 1.5, math.nan, True, "0.1", None])
def test_bad_alpha(alpha):
    calls = [
        lambda: predict([[3, 1]], alpha),
        lambda: certify([[3, 1]], [[3, 1]], 1.0, alpha),
        lambda: best_lower_bound(10, alpha),
        lambda: best_radius(1.0, 10, alpha),
        lambda: models_needed(1.0, 1.0, alpha),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"alpha must be a number above 0 and below 1.*Got"):
            call()


@pytest.mark.parametrize("value", [0, 0.0, -0.25, math.nan, math.inf, True, "1", None])
def test_bad_sigma_and_epsilon(value):
    calls = {
        "sigma": [
            lambda: certify([[3, 1]], [[3, 1]], value, 0.1),
            lambda: best_radius(value, 10, 0.1),
            lambda: models_needed(value, 1.0, 0.1),
            lambda: fixed_draws(value, 2),
        ],
        "epsilon": [lambda: linf_images(1.0, value, 3072)],
    }
    for name, its in calls.items():
        for call in its:
            with pytest.raises(InputError, match=rf"{name} must be a finite number above 0.*Got"):
                call()


@pytest.mark.parametrize("value", [0, -1, 1.0, math.nan, True, "1", None])
def test_bad_numbers_of_things(value):
    calls = {
        "models": [lambda: best_lower_bound(value, 0.1), lambda: best_radius(1.0, value, 0.1)],
        "images": [lambda: radius_per_image(1.0, value), lambda: linf_epsilon(1.0, value, 3072)],
        "values": [lambda: linf_images(1.0, 0.1, value), lambda: linf_epsilon(1.0, 1, value)],
        "draws": [lambda: fixed_draws(1.0, value)],
    }
    for name, its in calls.items():
        for call in its:
            with pytest.raises(InputError, match=f"{name} must be a whole number, at least 1. Got"):
                call()


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True, "1", None, [1.0, math.nan], [0.5, -1.0]])
def test_bad_radii(value):
    found = certify([[3, 1]], [[3, 1]], 1.0, 0.1)
    calls = [
        lambda: radius_per_image(value, 1),
        lambda: linf_images(value, 0.1, 1),
        lambda: linf_epsilon(value, 1, 1),
        lambda: models_needed(1.0, value, 0.1),
        lambda: certified_accuracy(found, [0], value),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"(radius|radii) must be .* Got"):
            call()


def test_radii_of_another_shape():
    found = certify([[3, 1]], [[3, 1]], 1.0, 0.1)
    for radii in (1.0, [[1.0]]):
        with pytest.raises(InputError, match="radii must be a list of numbers"):
            certified_accuracy(found, [0], radii)
    with pytest.raises(InputError, match="radius must be a number"):
        models_needed(1.0, [1.0], 0.1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2], r"from 0 to 1, as the votes have 2 classes\. Got 0 to 2"),
        ([-1, 0], r"from 0 to 1.*Got -1 to 0"),
        ([0], r"integers \(2,\).*\(1,\)"),
        ([[0, 1]], r"integers \(2,\).*\(1, 2\)"),
        ([0.0, 1.0], r"integers \(2,\).*float64"),
        ([False, True], r"integers \(2,\).*bool"),
    ],
)
def test_bad_labels(labels, message):
    found = certify([[3, 1], [1, 3]], [[3, 1], [1, 3]], 1.0, 0.1)
    for call in (lambda: voted_accuracy(found, labels), lambda: certified_accuracy(found, labels, [0.0])):
        with pytest.raises(InputError, match=f"labels must be {message}"):
            call()


def test_numbers_of_numpy_are_numbers():
    votes = np.array([[30, 1]], np.uint16)
    plain = certify([[30, 1]], [[30, 1]], 0.5, 0.25)
    found = certify(votes, votes.copy(), np.float32(0.5), np.float32(0.25))
    assert found.radii.tolist() == plain.radii.tolist()
    assert best_radius(np.float64(1), np.int32(10), np.float64(0.25)) == best_radius(1, 10, 0.25)
    assert linf_images(np.float32(1), np.float32(0.25), np.int64(4)) == linf_images(1.0, 0.25, 4) == 3


def test_without_scipy_it_is_said_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "scipy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: predict([[3, 1]], 0.1), lambda: best_radius(1.0, 10, 0.1)):
        with pytest.raises(PurifyError, match=r"needs SciPy.*pip install 'purifyloader\[certify\]'"):
            call()


def test_importing_it_is_cheap():
    code = "import sys, purifyloader.certify; print([m for m in ('torch', 'scipy', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
