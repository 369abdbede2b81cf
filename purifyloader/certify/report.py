"""Turn votes into results: plain data with every figure, and a page.

Where there is a reason against a certificate, the condition has none, and no figure that could be taken for one.
Everything is in units of [0, 1] images, and every radius is an l2 norm over the stacked training set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from purifyloader.certify import statistics
from purifyloader.certify.guards import Paths, reasons_against
from purifyloader.core.checks import check_flag
from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json
from purifyloader.results import table
from purifyloader.results.rows import versions

__all__ = ["SCHEMA", "Outcome", "check_results", "markdown", "results"]

SCHEMA = 1

_NICE = (1, 2, 3, 5)  # in front of a power of ten: radii that a table has a column for
_COLUMNS = 4
_SEVERAL = 10  # images that share a radius
_NOTHING_ELSE = Paths(1, secret_noise=True, selected=False, warm_start=False, own_denoiser=False, triggered=False)


@dataclass(frozen=True, eq=False)
class Outcome:
    """Votes of one condition, which is a level and a kind of noise."""

    name: str  # such as "sigma 0.25, plain noise"
    sigma: float | None  # of each noise draw, above 0; None where there is no such noise, which is a reason
    draws: int  # fixed ones of each image that a model sees
    plain: bool  # the images were noised and not denoised
    purifier: Mapping[str, Any]  # its configuration
    reasons: tuple[str, ...]  # against a certificate, see `reasons_against`
    selection: NDArray[np.int64]  # class numbers (n, T)
    estimation: NDArray[np.int64]  # class numbers (m, T), of all other models


def results(
    outcomes: Sequence[Outcome], labels: ArrayLike, classes: int, alpha: float, *, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Compute all figures of the votes as plain JSON data: the same votes give the same.

    Args:
        outcomes: one or more, of different names and on the same test inputs.
        labels: integers (T,), the classes of the test inputs, from 0 to K - 1.
        alpha: in (0, 1), how often a statement about one test input may be false.
        settings: what the models were trained with, as JSON. `markdown` shows it, and says more about radii where its
            "data" has "train", the number of training images, and "values", those of an image.

    Returns:
        Facts of all, and "conditions". Each of these has those of its `Outcome`, certified_sigma (of `fixed_draws`) and

        - one_model: "mean" and "std" over all n + m models, % of the test inputs that are right.
        - vote: % of the test inputs. "accuracy": right by the class that most of the n + m models vote for, of
          several that with the smallest number; "predicted": right and no abstention of `predict`; "abstained".
        - certificate: None where there are reasons. "predictions", of the selection votes; "agreeing", how many
          estimation votes are for them; "radii", 0 for none; "best_radius", if all agreed; "certified", % right with
          a radius above 0; "median_radius" of these.
        - curve: None where there are reasons. "accuracy", % right with a larger radius, at each of "radii": 0, all
          where it falls, and the best. Between two of them it is what it is at the smaller one.

        Where no reason is given, too few models for any certificate are a reason here.
    """
    statistics.best_lower_bound(1, alpha)  # refuses what is no alpha
    given: object = outcomes
    if not isinstance(given, Sequence) or not given or not all(isinstance(condition, Outcome) for condition in given):
        raise InputError(f"Expected one or more outcomes. Got {given!r:.80}: give a list of Outcome.")
    names = [condition.name for condition in outcomes]
    for name in names:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InputError(f"An outcome's name must be a line of text. Got {name!r}: name what was done.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"Expected outcomes of different names. Got {twice[0]!r} twice: name what differs.")
    true = _labels(labels, classes)
    conditions = []
    for outcome in outcomes:
        try:
            conditions.append(_condition(outcome, true, classes, alpha))
        except InputError as error:
            raise InputError(f"{outcome.name}: {error}") from error
    return {
        "schema": SCHEMA,
        "settings": _plain_data(settings, "settings"),
        "versions": versions(),
        "test_inputs": len(true),
        "classes": int(classes),
        "alpha": float(alpha),
        "alpha_is": _alpha_in_words(alpha, len(true)),
        "labels": true.tolist(),
        "conditions": conditions,
    }


def _alpha_in_words(alpha: float, inputs: int) -> str:
    return (
        f"alpha is the chance of a false statement about one test input: at most {alpha:g} for each prediction that is "
        "no abstention, and for each radius. All of them rest on the same models and may be false together. To have "
        f"all {inputs:,} predictions, or all {inputs:,} radii, of one condition true with probability 1 - {alpha:g}, "
        f"ask for alpha / {inputs:,} = {alpha / inputs:.3g}; whoever takes the best of several conditions divides by "
        "their number, too."
    )


def _condition(outcome: Outcome, labels: NDArray[np.int64], classes: int, alpha: float) -> dict[str, Any]:
    sigma = _checked_sigma(outcome)
    inputs = len(labels)
    selection = _checked_votes(outcome.selection, "selection", inputs, classes)
    estimation = _checked_votes(outcome.estimation, "estimation", inputs, classes)
    if np.shares_memory(outcome.selection, outcome.estimation):  # `certify` sees only counts, which are new arrays
        raise InputError(
            "Expected estimation votes of other models than those that selected. Got arrays that share models: give "
            "the votes of some for selection and of all others for estimation."
        )
    every = np.concatenate([selection, estimation])
    if not len(every):
        raise InputError("Expected votes of one or more models. Got none: train some.")

    def percent(right: NDArray[np.bool_]) -> float:
        return 100 * int(right.sum()) / inputs

    single = [percent(right) for right in every == labels]
    voted = statistics.counts(every, classes)
    predicted = statistics.predict(voted, alpha)
    reasons = _reasons(outcome, len(selection), len(estimation), alpha)
    certificate, curve, certified_sigma = None, None, None
    if sigma is not None and not reasons:
        certified_sigma = statistics.fixed_draws(sigma, outcome.draws)
        votes = statistics.counts(selection, classes), statistics.counts(estimation, classes)
        certificate, curve = _certified(*votes, labels, certified_sigma, alpha)
    return {
        "name": outcome.name,
        "sigma": sigma,
        "draws": int(outcome.draws),
        "certified_sigma": certified_sigma,
        "plain": outcome.plain,
        "purifier": _plain_data(outcome.purifier, "purifier"),
        "models": {"selection": len(selection), "estimation": len(estimation)},
        "reasons": reasons,
        "one_model": {"mean": fmean(single), "std": stdev(single) if len(single) > 1 else None},
        "vote": {
            "accuracy": percent(voted.argmax(axis=1) == labels),
            "predicted": percent(predicted == labels),
            "abstained": percent(predicted == statistics.ABSTAIN),
        },
        "certificate": certificate,
        "curve": curve,
    }


def _reasons(outcome: Outcome, selecting: int, estimating: int, alpha: float) -> list[str]:
    """List the reasons of an outcome; where there are none, those that lie in the numbers of models."""
    if outcome.reasons:
        return list(outcome.reasons)
    for purpose, models in (("selection", selecting), ("estimation", estimating)):
        if not models:
            return [
                f"There are no models for {purpose}: a certificate takes some that choose the class, and others that "
                "say how sure it is."
            ]
    return reasons_against(_NOTHING_ELSE, estimating, alpha)


def _certified(
    selection: NDArray[np.int64], estimation: NDArray[np.int64], labels: NDArray[np.int64], sigma: float, alpha: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute the certificate and its curve."""
    certificates = statistics.certify(selection, estimation, sigma, alpha)
    predictions, best = certificates.predictions, statistics.best_radius(sigma, certificates.models, alpha)
    # The bound where all agree is computed in two ways, which every SciPy need not round alike. A smaller radius is
    # as true.
    radii = np.minimum(certificates.radii, best)
    right = (predictions == labels) & (radii > 0)
    at = np.unique([0.0, *radii[right], best])
    accuracy = [100 * share for share in statistics.certified_accuracy(certificates, labels, at).tolist()]
    accuracy[-1] = 0.0  # for the same reason
    certificate = {
        "predictions": predictions.tolist(),
        "agreeing": np.take_along_axis(estimation, predictions[:, None], axis=1)[:, 0].tolist(),
        "radii": radii.tolist(),
        "best_radius": best,
        "certified": accuracy[0],
        "median_radius": float(np.median(radii[right])) if right.any() else None,
    }
    return certificate, {"radii": at.tolist(), "accuracy": accuracy}


def markdown(results: Mapping[str, Any], *, picture: str | None = None) -> str:
    """Write the results as a page for somebody who knows nothing of them; `picture` is a file shown below the table."""
    check_results(results)
    conditions = results["conditions"]
    certified = [condition for condition in conditions if condition["certificate"] is not None]
    columns = _nice_radii(certified)
    parts = ["# Certified denoising", _what_was_done(results), results["alpha_is"]]
    parts += [_main_table(conditions, columns), _what_columns_are(conditions, columns)]
    if picture is not None and certified:
        parts.append(f"![Certified accuracy against the radius]({picture})")
    if certified:
        parts += _in_other_words(results, certified, columns)
    parts += [
        "## What is not promised",
        "A certificate is about the pixels of the training images, changed in any way within the radius and at any "
        "number of images. It is not about test inputs that are changed too, as by a back door's trigger, nor about "
        "changed labels, nor about images that are added or taken away: labels and the number of images are as they "
        "were. And it says that a prediction stays as it is, not that it is right: the table and the picture count "
        "those that are right besides.",
    ]
    if without := [condition for condition in conditions if condition["certificate"] is None]:
        parts.append("## No certificate")
        for condition in without:
            reasons = "\n".join(f"- {reason}" for reason in condition["reasons"])
            parts.append(f"**{table.escaped(condition['name'])}**, no certificate:\n\n{reasons}")
    parts += ["## Settings", "```json\n" + json.dumps(_described(results), indent=1, sort_keys=True) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _what_was_done(results: Mapping[str, Any]) -> str:
    train = _of_data(results, "train")
    images = "the training images" if train is None else f"{train:,} training images"
    conditions = results["conditions"]
    models = sorted({sum(condition["models"].values()) for condition in conditions})
    many = f"{models[0]:,}" if len(models) == 1 else f"{models[0]:,} to {models[-1]:,}"
    plain = [condition["plain"] for condition in conditions if condition["certificate"] is not None]
    denoised = "" if all(plain) else ", and denoised unless it says plain noise," if any(plain) else " and denoised"
    noised = (
        f" Where there is a certificate, every image was noised{denoised} for each model anew, before its training "
    )
    noised = f"{noised}began." if plain else ""
    return (
        f"For each condition {many} models were trained on {images}.{noised} The models vote on "
        f"each of {results['test_inputs']:,} test inputs of {results['classes']:,} classes. Some models select the "
        "class that is certified, and all others, the estimation, say how sure it is.\n\n"
        "A certificate of radius R says of one test input: whatever is done to the training images, if the l2 norm of "
        "all changes, stacked into one vector in units of [0, 1] images, is below R, the class that most of endlessly "
        "many such models would vote for stays the same."
    )


def _main_table(conditions: Sequence[Mapping[str, Any]], columns: Sequence[float]) -> str:
    head = ["condition", "sigma", "models", "one model", "vote", "abstained", "certified"]
    head += [f"within {radius:g}" for radius in columns]
    head.append("best radius")
    draws = any(condition["draws"] > 1 for condition in conditions)
    if draws:
        head.insert(2, "draws")
    lines = []
    for condition in conditions:
        one, vote, certificate = condition["one_model"], condition["vote"], condition["certificate"]
        spread = "" if one["std"] is None else f" ± {one['std']:.1f}"
        lines.append(
            [
                table.escaped(condition["name"]),
                "–" if condition["sigma"] is None else f"{condition['sigma']:g}",
                *(["–" if condition["sigma"] is None else str(condition["draws"])] if draws else []),
                f"{condition['models']['selection']:,} + {condition['models']['estimation']:,}",
                f"{one['mean']:.1f}{spread}",
                f"{vote['accuracy']:.1f}",
                f"{vote['abstained']:.1f}",
                *(
                    ["–"] * (len(columns) + 2)
                    if certificate is None
                    else [
                        f"{certificate['certified']:.1f}",
                        *(f"{_at(condition['curve'], radius):.1f}" for radius in columns),
                        f"{certificate['best_radius']:.3g}",
                    ]
                ),
            ]
        )
    return table.markdown(head, lines)


def _what_columns_are(conditions: Sequence[Mapping[str, Any]], columns: Sequence[float]) -> str:
    words = [
        "In % of the test inputs. Sigma: the standard deviation of the noise. Models: selection + estimation. One "
        "model: those that a model of its own gets right, mean and standard deviation over the models. Vote: right by "
        "the class that most models vote for. Abstained: the votes do not tell that class from the second at this "
        "alpha."
    ]
    if any(condition["draws"] > 1 for condition in conditions):
        words.append("Draws: fixed noise draws of each image that a model sees; K of them divide a radius by √K.")
    if columns:
        words.append(
            "Certified: right, with a radius above 0; within r: right, and still so after any change of norm r. Best "
            "radius: what a test input has on which all models of the estimation agree. More models raise it."
        )
    if any(condition["certificate"] is None for condition in conditions):
        words.append("–: no certificate, for the reasons below.")
    return " ".join(words)


def _in_other_words(
    results: Mapping[str, Any], certified: Sequence[Mapping[str, Any]], columns: Sequence[float]
) -> list[str]:
    """Write what radii allow: to one image, to some, to one in a hundred."""
    best = max(certified, key=lambda condition: condition["certificate"]["best_radius"])
    radii = [*columns, best["certificate"]["best_radius"]]
    train, values = _of_data(results, "train"), _of_data(results, "values")
    head, cells = ["one image"], [[f"{radius:.3g}" for radius in radii]]
    shares = {_SEVERAL: f"each of {_SEVERAL} images"}
    if train is not None and (hundredth := round(train / 100)) not in (0, 1, _SEVERAL):
        shares[hundredth] = f"each of {hundredth:,} images, 1 %"
    for images, name in shares.items():
        head.append(name)
        cells.append([f"{radius:.3g}" for radius in statistics.radius_per_image(radii, images).tolist()])
    words = (
        "How large a change may be, of l2 norm, where one image is changed, or where several are changed alike. The "
        f"last line is the largest radius that can be had here, {table.escaped(best['name'])} with all models in "
        "agreement."
    )
    if values is not None:
        head.append("one image, each value, levels of 255")
        cells.append([f"{255 * epsilon:.3g}" for epsilon in statistics.linf_epsilon(radii, 1, values).tolist()])
        words += (
            f" The last column is an l-infinity norm: each of an image's {values:,} values may change by less than so "
            "many levels of 255."
        )
    return ["## What a radius allows", words, table.markdown(head, list(zip(*cells, strict=True)))]


def _nice_radii(certified: Sequence[Mapping[str, Any]]) -> list[float]:
    """Choose a few round numbers, from a quarter of the smallest best radius to below the largest."""
    best = [condition["certificate"]["best_radius"] for condition in certified]
    if not best:
        return []
    powers = range(math.floor(math.log10(min(best) / 4)), math.floor(math.log10(max(best))) + 1)
    nice = [radius for power in powers for digit in _NICE if (radius := float(f"{digit}e{power}")) < max(best)]
    nice = nice[max(0, sum(radius <= min(best) / 4 for radius in nice) - 1) :]
    if len(nice) <= _COLUMNS:
        return nice
    return [nice[round(i * (len(nice) - 1) / (_COLUMNS - 1))] for i in range(_COLUMNS)]


def _at(curve: Mapping[str, Any], radius: float) -> float:
    """Read the curve at any radius: it is a step function."""
    return float(curve["accuracy"][int(np.searchsorted(curve["radii"], radius, "right")) - 1])


def _described(results: Mapping[str, Any]) -> dict[str, Any]:
    purifiers = {condition["name"]: condition["purifier"] for condition in results["conditions"]}
    return {"alpha": results["alpha"], "purifiers": purifiers, **{k: results[k] for k in ("settings", "versions")}}


def _of_data(results: Mapping[str, Any], name: str) -> int | None:
    """Return a number that the settings have of the data, where they do."""
    data = results["settings"].get("data")
    value = data.get(name) if isinstance(data, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def check_results(results: object) -> None:
    """Refuse what `results` has not made, or in another schema, before a key of it is missed."""
    if not isinstance(results, Mapping) or results.get("schema") != SCHEMA or "alpha_is" not in results:
        got = f"schema {results.get('schema')!r}" if isinstance(results, Mapping) else type(results).__name__
        raise InputError(f"Expected certificates of schema {SCHEMA}. Got {got}: give what `results` returns.")


def _labels(labels: ArrayLike, classes: int) -> NDArray[np.int64]:
    true = np.asarray(labels)
    if true.dtype.kind not in "iu" or true.ndim != 1 or not len(true):
        raise InputError(f"labels must be integers (T,): one a test input. Got {true.dtype} {true.shape}.")
    try:
        statistics.counts(true[None], classes)  # refuses what is no class number
    except InputError as error:
        raise InputError(f"labels: {error}") from error
    return true.astype(np.int64)


def _checked_sigma(outcome: Outcome) -> float | None:
    """Check the fields of an outcome; returns its sigma."""
    check_flag("plain", outcome.plain, error=InputError)
    reasons: object = outcome.reasons
    if not isinstance(reasons, tuple) or not all(isinstance(reason, str) and reason.strip() for reason in reasons):
        raise InputError(f"reasons must be a tuple of sentences, empty for a certificate. Got {reasons!r}.")
    if outcome.sigma is None and not reasons:
        raise InputError(
            "Expected a reason where there is no noise of one sigma, for that leaves no certificate. Got none: say why."
        )
    statistics.fixed_draws(
        1.0 if outcome.sigma is None else outcome.sigma, outcome.draws
    )  # refuses what is no sigma or draws
    return None if outcome.sigma is None else float(outcome.sigma)


def _checked_votes(votes: ArrayLike, what: str, inputs: int, classes: int) -> NDArray[np.int64]:
    array = np.asarray(votes)
    if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape[1] != inputs:
        raise InputError(
            f"{what} must be votes, integers (models, {inputs}): one a model and test input, as there are {inputs} "
            f"labels. Got {array.dtype} {array.shape}."
        )
    if len(array):
        statistics.counts(array, classes)  # refuses what is no class number
    return array.astype(np.int64, copy=False)


def _plain_data(value: object, what: str) -> Any:
    """Return a copy as JSON gives it back, so that results do not change when they are read."""
    if not isinstance(value, Mapping):
        raise InputError(f"{what} must be a dictionary. Got {type(value).__name__}.")
    try:
        return json.loads(canonical_json(value))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{what} must be what JSON can hold. Got: {error}. Give text, finite numbers, lists and dictionaries."
        ) from error
