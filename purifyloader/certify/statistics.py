"""Turn votes into certificates: the statistics of certified denoising, as functions of counts.

Certified Robustness to Clean-Label Poisoning Using Diffusion Denoising (Hong, Carlini & Kurakin), Algorithm 2 and
Corollary 3.4, after Cohen, Rosenfeld & Kolter 2019 and Weber et al. 2023. D is the training set, all its images
stacked into one vector, x a test input, and q(y | x, D) the probability that a model votes y for x when it is
trained on D + N(0, sigma^2 I), denoised. Predictions and certificates are about argmax_y q(y | x, D), what the vote
of endlessly many such models would be, with x as it is: a trigger on the test input is another x.

- **The radius.** Where q(y_A | x, D) >= p_A > 1/2, that class is y_A for every D + Delta with

      ||Delta||_2 < R = sigma Phi^-1(p_A),      ||Delta||_2 = sqrt(sum_i ||delta_i||_2^2),

  which is Corollary 3.4, R = sigma / 2 (Phi^-1(p_A) - Phi^-1(p_B)), with all that is left given to one other
  class, p_B = 1 - p_A. The inequality is strict everywhere below, too.
- **Certify** (Algorithm 2, lines 8 to 14): y_A is what the *selection* votes say, and p_A a lower confidence bound
  from the *estimation* votes of m other models, k of them for y_A. Clopper and Pearson's (1934) one-sided bound is
  the p at which k or more of m votes have the probability alpha,

      p_A = B(alpha; k, m - k + 1),     0 for k = 0,     alpha^(1/m) for k = m,

  B a quantile of the beta distribution. It is too high with probability alpha at most, whatever q is; not so if
  the votes that it is computed from had also chosen the class.
- **Predict** (lines 1 to 6): the class with most votes, unless a two-sided binomial test of the two largest counts,
  n_A of n_A + n_B at p = 1/2, has a p-value above alpha: 2 P(X <= n_B), X ~ Binomial(n_A + n_B, 1/2). Hung &
  Fithian (2019) show that what is not an abstention is wrong with probability alpha at most.
- **Poisoned images.** Of r images changed by ||delta||_2 each, ||Delta||_2 = sqrt(r) ||delta||_2, and where every
  one of an image's d values may change by eps, ||delta||_2 <= eps sqrt(d) (Appendix B). After Corollary 3.4 the
  paper also prints sigma / sqrt(m), m the number of models: a slip, and not what its numbers come from.
- **K fixed draws** of each image in one training set are D stacked K times: sqrt(K) ||Delta||_2. See `fixed_draws`.

Everything is in units of [0, 1] images; a radius is an l2 norm over the stacked training set, a number or an array of
any shape. alpha is the chance of a false statement about *one* test input. As statements rest on the same models they
may be false together; to have all of T true with probability 1 - alpha, ask for alpha / T each.

Every function raises `InputError` for arguments of other types, shapes or ranges than it says, and `PurifyError`
where it needs SciPy and there is none.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from purifyloader.errors import InputError, PurifyError

__all__ = [
    "ABSTAIN",
    "Certificates",
    "best_lower_bound",
    "best_radius",
    "certified_accuracy",
    "certify",
    "counts",
    "fixed_draws",
    "linf_epsilon",
    "linf_images",
    "models_needed",
    "predict",
    "radius_per_image",
    "voted_accuracy",
]

ABSTAIN = -1
"""What `predict` says where the votes do not tell the first class from the second."""

_BELOW_ONE = math.nextafter(1.0, 0.0)  # a bound may be lowered, and one rounded to 1 would certify everything
_NUMBERS = (int, float, np.integer, np.floating)
_MOST_MODELS = 10**9
_MOST_IMAGES = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Certificates:
    """Certificates of T test inputs, as `certify` returns them.

    Attributes:
        predictions: int64 (T,), the class that the selection votes chose, certified or not.
        lower_bounds: float64 (T,) in [0, 1): p_A, the share of all models that would at least vote for it.
        radii: float64 (T,): no change of the stacked training set with a smaller l2 norm changes the prediction. 0 is
            no certificate: the paper abstains.
        models: m of estimation.

    >>> from purifyloader.certify import certify
    >>> certify([[9, 1], [2, 8]], [[95, 5], [50, 50]], sigma=0.25, alpha=0.001).certified.tolist()
    [True, False]
    """

    predictions: NDArray[np.int64]
    lower_bounds: NDArray[np.float64]
    radii: NDArray[np.float64]
    sigma: float
    alpha: float
    models: int
    classes: int

    @property
    def certified(self) -> NDArray[np.bool_]:
        """Bool (T,): which test inputs have a certificate."""
        return self.radii > 0


def counts(votes_MT: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Count how many models vote for each class, int64 (T, K), from the class that each gives each test input, (M, T).

    >>> from purifyloader.certify import counts
    >>> counts([[0, 1], [0, 2], [1, 2]], classes=3).tolist()  # three models, two test inputs
    [[2, 1, 0], [0, 1, 2]]
    """
    if isinstance(classes, bool) or not isinstance(classes, (int, np.integer)) or classes < 2:
        raise InputError(f"classes must be a whole number, at least 2. Got {classes!r}.")
    votes = np.asarray(votes_MT)
    if votes.dtype.kind not in "iu" or votes.ndim != 2 or 0 in votes.shape:
        raise InputError(
            "votes must be integers (M, T): the class that each of one or more models gives each of one or more test "
            f"inputs. Got {votes.dtype} {votes.shape}."
        )
    if votes.min() < 0 or votes.max() >= classes:
        raise InputError(
            f"votes must be from 0 to {classes - 1}, numbers of {classes} classes. Got {votes.min()} to "
            f"{votes.max()}: where models abstain, count that as a class."
        )
    inputs, classes = votes.shape[1], int(classes)
    # each test input has K places of its own; in int64, as class numbers of a small type would overflow
    places = votes.astype(np.int64) + classes * np.arange(inputs)
    return np.bincount(places.ravel(), minlength=inputs * classes).reshape(inputs, classes).astype(np.int64)


def predict(votes: ArrayLike, alpha: float) -> NDArray[np.int64]:
    """Find the class that most models would vote for, int64 (T,), or `ABSTAIN` (Algorithm 2, Predict).

    Two classes that share the most votes are never told apart, so no order among the classes decides anything.

    Args:
        votes: integers (T, K), of `counts`.
        alpha: in (0, 1), how often a prediction may be wrong.

    >>> from purifyloader.certify import ABSTAIN, predict
    >>> predict([[98, 2], [51, 49]], alpha=0.001).tolist() == [0, ABSTAIN]
    True
    """
    votes_TK, _ = _checked_counts(votes, "votes")
    _check_alpha(alpha)
    second, first = np.partition(votes_TK, -2, axis=1)[:, -2:].T
    p_value = 2 * special_functions().bdtr(second, first + second, 0.5)
    return np.where(p_value <= alpha, votes_TK.argmax(axis=1), ABSTAIN)


def certify(selection_votes: ArrayLike, estimation_votes: ArrayLike, sigma: float, alpha: float) -> Certificates:
    """Compute within which distance of this training set every other one gives the same class (Algorithm 2, Certify).

    The class comes from the selection votes alone: that with most of them, of several the one with the smallest
    number. The estimation votes only say how sure it is. They must be those of other models, which counts cannot
    show; few models select well enough, and the rest are better spent on estimation.

    Args:
        selection_votes, estimation_votes: integers (T, K), of `counts`, of n and of m models.
        sigma: of the noise of every training image, above 0; with K fixed draws of each, `fixed_draws(sigma, K)`.
        alpha: in (0, 1), how often a certificate may be false.

    >>> from purifyloader.certify import certify
    >>> certificates = certify([[9, 1], [2, 8]], [[95, 5], [50, 50]], sigma=0.25, alpha=0.001)
    >>> certificates.predictions.tolist(), certificates.radii.round(3).tolist()
    ([0, 1], [0.253, 0.0])
    """
    selection, _ = _checked_counts(selection_votes, "selection_votes")
    estimation, models = _checked_counts(estimation_votes, "estimation_votes")
    if selection.shape != estimation.shape:
        raise InputError(
            "Expected selection and estimation votes on the same test inputs and classes. "
            f"Got {selection.shape} and {estimation.shape}."
        )
    if np.shares_memory(selection, estimation):
        raise InputError(
            "Expected estimation votes of other models than those that selected. Got one array for both: count the "
            "votes of some models for selection and of all others for estimation."
        )
    _check_above_zero(sigma, "sigma")
    _check_alpha(alpha)
    predictions = selection.argmax(axis=1)
    agreeing = np.take_along_axis(estimation, predictions[:, None], axis=1)[:, 0]
    lower = _lower_bounds(agreeing, models, alpha)
    return Certificates(
        predictions, lower, _radii(lower, sigma), float(sigma), float(alpha), models, selection.shape[1]
    )


def _lower_bounds(agreeing: NDArray[np.int64], models: int, alpha: float) -> NDArray[np.float64]:
    some = np.maximum(agreeing, 1)
    bounds = np.minimum(special_functions().betaincinv(some, models - some + 1, alpha), _BELOW_ONE)
    return np.where(agreeing == 0, 0.0, bounds)


def _radii(lower_bounds: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    return sigma * special_functions().ndtri(np.maximum(lower_bounds, 0.5))  # Phi^-1(1/2) is 0


def voted_accuracy(certificates: Certificates, labels: ArrayLike) -> float:
    """Compute the share of test inputs for which the selected class is that of `labels` (T,), certified or not.

    >>> from purifyloader.certify import certify, voted_accuracy
    >>> certificates = certify([[9, 1], [2, 8]], [[95, 5], [50, 50]], sigma=0.25, alpha=0.001)
    >>> voted_accuracy(certificates, labels=[0, 0])
    0.5
    """
    return float((certificates.predictions == _labels(labels, certificates)).mean())


def certified_accuracy(certificates: Certificates, labels: ArrayLike, radii: ArrayLike) -> NDArray[np.float64]:
    """Compute the share of test inputs that are right and stay so, (R,), at each of `radii` (R,): the paper's Figure 1.

    At radius r, whatever change with ||Delta||_2 <= r is made: where R > r. At 0, those that are right and have a
    certificate at all. It never rises.

    >>> from purifyloader.certify import certified_accuracy, certify
    >>> certificates = certify([[9, 1], [2, 8]], [[95, 5], [50, 50]], sigma=0.25, alpha=0.001)
    >>> certified_accuracy(certificates, labels=[0, 1], radii=[0.0, 0.25, 0.5]).tolist()
    [0.5, 0.5, 0.0]
    """
    right = certificates.predictions == _labels(labels, certificates)
    at = _reals(radii, "radii")
    if at.ndim != 1:
        raise InputError(f"radii must be a list of numbers. Got shape {at.shape}.")
    reached = np.sort(np.where(right, certificates.radii, 0.0))
    return (len(reached) - np.searchsorted(reached, at, "right")) / len(reached)


def radius_per_image(radius: ArrayLike, images: int) -> NDArray[np.float64]:
    """Compute R / sqrt(r): what l2 norm each perturbation must stay below where `images` (r) images are poisoned.

    >>> from purifyloader.certify import radius_per_image
    >>> radius_per_image([1.0, 2.0], images=4).tolist()
    [0.5, 1.0]
    """
    _check_whole(images, "images")
    return _reals(radius, "radius") / math.sqrt(images)


def linf_images(radius: ArrayLike, epsilon: float, values: int) -> NDArray[np.int64]:
    """Compute how many images may be poisoned where each of their values may change by `epsilon` (Appendix B).

    The largest r with epsilon sqrt(d) sqrt(r) < R, in exact arithmetic on the numbers given: at equality it is one
    image fewer, and 0 where one image is too many.

    Args:
        radius: R, of any shape, from 0.
        epsilon: above 0, such as 8/255.
        values: d of an image, 3 * 32 * 32 for CIFAR-10.

    >>> from purifyloader.certify import linf_images
    >>> linf_images(2.0, epsilon=0.5, values=4).tolist()  # at equality it is one image fewer
    3
    """
    _check_above_zero(epsilon, "epsilon")
    _check_whole(values, "values")
    limit = _reals(radius, "radius")
    of_one = Fraction(float(epsilon)) ** 2 * int(values)  # ||delta||_2^2 of one image

    most = [max(math.ceil(Fraction(r) ** 2 / of_one) - 1, 0) for r in limit.ravel().tolist()]
    return np.array([min(images, _MOST_IMAGES) for images in most], dtype=np.int64).reshape(limit.shape)


def linf_epsilon(radius: ArrayLike, images: int, values: int) -> NDArray[np.float64]:
    """Compute R / sqrt(r d): below what epsilon every value of `images` (r) images of `values` (d) values may change.

    >>> from purifyloader.certify import linf_epsilon
    >>> linf_epsilon(2.0, images=4, values=4).tolist()
    0.5
    """
    _check_whole(values, "values")
    return radius_per_image(radius, images) / math.sqrt(values)


def best_lower_bound(models: int, alpha: float) -> float:
    """Compute alpha^(1/m): the bound p_A when all of m `models` agree, the highest that m models can give.

    >>> from purifyloader.certify import best_lower_bound
    >>> round(best_lower_bound(100, alpha=0.001), 3)
    0.933
    """
    _check_whole(models, "models")
    _check_alpha(alpha)
    return min(float(alpha) ** (1 / int(models)), _BELOW_ONE)


def best_radius(sigma: float, models: int, alpha: float) -> float:
    """Compute sigma Phi^-1(alpha^(1/m)): the radius when all of m `models` agree; 0 where even that certifies nothing.

    >>> from purifyloader.certify import best_radius
    >>> round(best_radius(1.0, models=1000, alpha=0.001), 2)
    2.46
    """
    _check_above_zero(sigma, "sigma")
    return float(_radii(np.array(best_lower_bound(models, alpha)), sigma))


def models_needed(sigma: float, radius: float, alpha: float) -> int:
    """Find the fewest models whose `best_radius` is `radius` or more: fewer cannot certify it, however they vote.

    A radius of 0 asks for any certificate at all. One that a billion models would not reach is an error.

    >>> from purifyloader.certify import models_needed
    >>> models_needed(sigma=0.25, radius=0, alpha=0.001)  # for any certificate at all
    10
    """
    wanted = float(_reals(radius, "radius", a_number=True))

    def enough(models: int) -> bool:
        reached = best_radius(sigma, models, alpha)
        return reached >= wanted and reached > 0

    if not enough(_MOST_MODELS):
        raise InputError(
            f"Expected a radius within reach of {_MOST_MODELS:,} models: at sigma {sigma:g} and alpha {alpha:g} below "
            f"{best_radius(sigma, _MOST_MODELS, alpha):.4g}. Got {wanted:g}: raise sigma, or ask for less."
        )
    return 1 + bisect_left(range(1, _MOST_MODELS), True, key=enough)


def fixed_draws(sigma: float, draws: int) -> float:
    """Compute sigma / sqrt(K): the sigma to certify with where a model sees K fixed draws of each training image.

    The K noised copies of the training set are one vector K times as long, and a change Delta of the images is a
    change of it of sqrt(K) ||Delta||_2. Draws without number, as fresh noise in each epoch, leave nothing.

    >>> from purifyloader.certify import fixed_draws
    >>> fixed_draws(0.5, draws=4)
    0.25
    """
    _check_above_zero(sigma, "sigma")
    _check_whole(draws, "draws")
    return float(sigma) / math.sqrt(draws)


def special_functions() -> Any:
    """Import SciPy's functions, or raise a `PurifyError` that says how to install them."""
    try:
        from scipy import special
    except ImportError:
        raise PurifyError(
            "A certificate needs SciPy. Got a Python without it: pip install 'purifyloader[certify]'."
        ) from None
    return special


def _checked_counts(votes: ArrayLike, what: str) -> tuple[NDArray[np.int64], int]:
    """Check counts; returns them as int64 (T, K), and the number of models."""
    array = np.asarray(votes)
    if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
        raise InputError(
            f"{what} must be integers (T, K): for each of one or more test inputs, how many models vote for each of "
            f"two or more classes. Got {array.dtype} {array.shape}."
        )
    if array.min() < 0:
        raise InputError(f"{what} are counts, from 0. Got {array.min()}.")
    votes_TK = array.astype(np.int64, copy=False)
    totals = votes_TK.sum(axis=1)
    if totals.min() < 1 or totals.min() != totals.max():
        raise InputError(
            f"{what} must be one vote of each model on each test input. Got from {totals.min()} to {totals.max()} "
            "votes on a test input: were some lost, or counted twice? Where models abstain, count that as a class."
        )
    return votes_TK, int(totals[0])


def _labels(labels: ArrayLike, certificates: Certificates) -> NDArray[Any]:
    array, length, classes = np.asarray(labels), len(certificates.predictions), certificates.classes
    if array.dtype.kind not in "iu" or array.shape != (length,):
        raise InputError(f"labels must be integers ({length},): one a test input. Got {array.dtype} {array.shape}.")
    if array.min() < 0 or array.max() >= classes:
        raise InputError(
            f"labels must be from 0 to {classes - 1}, as the votes have {classes} classes. "
            f"Got {array.min()} to {array.max()}."
        )
    return array


def _reals(numbers: ArrayLike, what: str, a_number: bool = False) -> NDArray[np.float64]:
    array = np.asarray(numbers)
    if array.dtype.kind not in "iuf" or (a_number and array.ndim):
        expected = "a number" if a_number else "a number or an array of numbers"
        raise InputError(f"{what} must be {expected}. Got {array.dtype} {array.shape}.")
    array = array.astype(np.float64)
    bad = array[~(np.isfinite(array) & (array >= 0))]
    if bad.size:
        raise InputError(f"{what} must be finite and from 0. Got {bad[0]}.")
    return array


def _check_alpha(alpha: Any) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, _NUMBERS) or not 0 < alpha < 1:
        raise InputError(
            "alpha must be a number above 0 and below 1: how often what is said may be wrong, such as 0.001. "
            f"Got {alpha!r}."
        )


def _check_above_zero(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS) or not (math.isfinite(value) and value > 0):
        raise InputError(f"{what} must be a finite number above 0, in units of [0, 1] images. Got {value!r}.")


def _check_whole(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{what} must be a whole number, at least 1. Got {value!r}.")
