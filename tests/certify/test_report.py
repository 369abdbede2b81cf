"""What becomes of votes: figures against a computation of their own, a page, files and pictures."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from purifyloader.certify import certified_accuracy, certify, counts
from purifyloader.certify.output import PAGE_FILE, PICTURE_FILE, RESULTS_FILE, curves, write
from purifyloader.certify.report import SCHEMA, Outcome, markdown, results
from purifyloader.errors import InputError, PurifyError

ROOT = Path(__file__).parents[2]
ALPHA = 0.001
INPUTS, CLASSES = 120, 4
LABELS = np.random.default_rng(0).integers(0, CLASSES, INPUTS)
SETTINGS = {"data": {"name": "sample", "train": 4000, "values": 3072}, "victim": "resnet9"}
PNG = b"\x89PNG\r\n\x1a\n"
REASON = "Which images are used was decided by looking at them."


def votes(models, skill=0.7, seed=1):
    """Test inputs have a probability of their own to be right; of wrong classes some are more likely."""
    rng = np.random.default_rng(seed)
    probability = rng.beta(1.5 * skill, 1.5 * (1 - skill), INPUTS)
    right = rng.random((models, INPUTS)) < probability
    return np.where(right, LABELS, (LABELS + 1 + (rng.random((models, INPUTS)) < 0.2)) % CLASSES)


def outcome(name="sigma 0.25", sigma=0.25, draws=1, plain=False, reasons=(), n=9, m=60, skill=0.7, seed=1, **more):
    every = votes(n + m, skill, seed)
    fields = {"purifier": {"name": "eclipse", "sigma": sigma}, "selection": every[:n], "estimation": every[n:]}
    return Outcome(name=name, sigma=sigma, draws=draws, plain=plain, reasons=tuple(reasons), **{**fields, **more})


def of(*outcomes, alpha=ALPHA, settings=SETTINGS):
    return results(outcomes, LABELS, CLASSES, alpha, settings=settings)


def only(*args, **more):
    return of(outcome(*args, **more))["conditions"][0]


# -- counting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int16, np.uint64])
def test_counts_are_what_a_loop_counts(dtype):
    rng = np.random.default_rng(3)
    cast = rng.integers(0, 7, (11, 300)).astype(dtype)  # more places than uint8 has numbers
    found = counts(cast, 8)
    assert found.dtype == np.int64
    assert found.tolist() == [[sum(int(v) == k for v in cast[:, t]) for k in range(8)] for t in range(300)]
    assert (found.sum(axis=1) == 11).all()
    assert counts([[1]], 2).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "bad",
    [np.zeros((2, 3)), np.zeros((2, 3), bool), np.zeros(3, int), np.zeros((0, 3), int), np.zeros((3, 0), int), []],
)
def test_counts_of_what_are_no_votes(bad):
    with pytest.raises(InputError, match=r"votes must be integers \(M, T\)"):
        counts(bad, 3)


def test_counts_of_other_classes():
    for bad in (-1, 3):
        with pytest.raises(InputError, match="votes must be from 0 to 2"):
            counts([[0, bad]], 3)
    for classes in (1, 2.0, True, None, "3"):
        with pytest.raises(InputError, match="classes must be a whole number"):
            counts([[0]], classes)


# -- figures -----------------------------------------------------------------------------------------


def test_the_figures_are_those_of_another_computation():
    item = outcome(draws=3)
    found = of(item)
    condition = found["conditions"][0]
    assert (found["schema"], found["test_inputs"], found["classes"], found["alpha"]) == (SCHEMA, INPUTS, CLASSES, ALPHA)
    assert found["labels"] == LABELS.tolist()
    assert found["settings"] == SETTINGS
    assert condition["models"] == {"selection": 9, "estimation": 60}

    every = np.concatenate([item.selection, item.estimation]).tolist()
    single = [100 * statistics.fmean(a == b for a, b in zip(row, LABELS, strict=True)) for row in every]
    assert condition["one_model"]["mean"] == pytest.approx(np.mean(single))
    assert condition["one_model"]["std"] == pytest.approx(np.std(single, ddof=1))

    def tally(cast, t):
        return [sum(row[t] == k for row in cast) for k in range(CLASSES)]

    right = predicted = abstained = 0
    for t, label in enumerate(LABELS):
        tallied = tally(every, t)
        first = tallied.index(max(tallied))
        one, two = sorted(tallied)[-1:-3:-1]
        is_told_apart = stats.binomtest(one, one + two, 0.5).pvalue <= ALPHA
        right += first == label
        predicted += is_told_apart and first == label
        abstained += not is_told_apart
    assert 0 < abstained < INPUTS
    assert condition["vote"] == {
        "accuracy": pytest.approx(100 * right / INPUTS),
        "predicted": pytest.approx(100 * predicted / INPUTS),
        "abstained": pytest.approx(100 * abstained / INPUTS),
    }

    sigma = 0.25 / math.sqrt(3)
    certificate = condition["certificate"]
    assert condition["certified_sigma"] == pytest.approx(sigma)
    assert certificate["best_radius"] == pytest.approx(sigma * stats.norm.ppf(ALPHA ** (1 / 60)))
    kept = []
    for t, label in enumerate(LABELS):
        tallied = tally(item.selection.tolist(), t)
        chosen = tallied.index(max(tallied))
        agreeing = tally(item.estimation.tolist(), t)[chosen]
        bound = stats.beta.ppf(ALPHA, agreeing, 61 - agreeing) if agreeing else 0
        radius = sigma * stats.norm.ppf(bound) if bound > 0.5 else 0.0
        assert certificate["predictions"][t] == chosen
        assert certificate["agreeing"][t] == agreeing
        assert certificate["radii"][t] == pytest.approx(radius)
        if chosen == label and radius > 0:
            kept.append(radius)
    assert 0 < len(kept) < INPUTS
    assert certificate["certified"] == pytest.approx(100 * len(kept) / INPUTS)
    assert certificate["median_radius"] == pytest.approx(np.median(kept))


def test_the_curve_is_certified_accuracy_everywhere():
    item = outcome()
    condition = of(item)["conditions"][0]
    curve, best = condition["curve"], condition["certificate"]["best_radius"]
    assert curve["radii"][0] == 0
    assert curve["radii"][-1] == best
    assert curve["accuracy"][0] == condition["certificate"]["certified"] > 0
    assert curve["accuracy"][-1] == 0
    assert (np.diff(curve["radii"]) > 0).all()
    assert (np.diff(curve["accuracy"]) <= 0).all()
    found = certify(counts(item.selection, CLASSES), counts(item.estimation, CLASSES), 0.25, ALPHA)
    assert curve["accuracy"] == pytest.approx(100 * certified_accuracy(found, LABELS, curve["radii"]))
    # between its points it is what it is at the one before: every step is in it
    between = np.linspace(0, best, 977)
    at = np.searchsorted(curve["radii"], between, "right") - 1
    assert np.array(curve["accuracy"])[at] == pytest.approx(100 * certified_accuracy(found, LABELS, between))


def test_where_all_agree_and_where_none_is_right():
    right = np.tile(LABELS, (40, 1))
    found = only(selection=right[:5], estimation=right[5:])
    best = found["certificate"]["best_radius"]
    assert found["certificate"]["radii"] == pytest.approx([best] * INPUTS)
    assert max(found["certificate"]["radii"]) <= best
    assert found["certificate"]["certified"] == found["vote"]["predicted"] == found["one_model"]["mean"] == 100
    assert found["curve"]["accuracy"][-1] == 0
    wrong = (right + 1) % CLASSES
    found = only(selection=wrong[:5], estimation=wrong[5:])
    assert min(found["certificate"]["radii"]) > 0  # a wrong class may stay what it is, too
    assert found["certificate"]["certified"] == found["vote"]["accuracy"] == 0
    assert found["certificate"]["median_radius"] is None
    assert found["curve"] == {"radii": [0.0, best], "accuracy": [0.0, 0.0]}


def test_a_radius_that_is_rounded_above_the_best_is_none(monkeypatch):
    """Another SciPy may round the two ways to compute it apart."""
    from purifyloader.certify import statistics

    def rounded(*args):
        found = certify(*args)
        return dataclasses.replace(found, radii=np.nextafter(found.radii, 9))

    monkeypatch.setattr(statistics, "certify", rounded)
    right = np.tile(LABELS, (40, 1))
    found = only(selection=right[:5], estimation=right[5:])
    best = found["certificate"]["best_radius"]
    assert found["certificate"]["radii"] == [best] * INPUTS
    assert found["curve"] == {"radii": [0.0, best], "accuracy": [100.0, 0.0]}


@pytest.mark.parametrize("draws", [2, 4, 9])
def test_draws_divide_radii_by_their_root(draws):
    one, many = only(), only(draws=draws)
    for name in ("radii", "best_radius", "median_radius"):
        assert many["certificate"][name] == pytest.approx(np.divide(one["certificate"][name], math.sqrt(draws)))
    assert many["curve"]["radii"] == pytest.approx(np.divide(one["curve"]["radii"], math.sqrt(draws)))
    assert many["curve"]["accuracy"] == one["curve"]["accuracy"]
    assert many["vote"] == one["vote"]
    assert (many["sigma"], many["draws"]) == (0.25, draws)


def test_the_same_votes_give_the_same_bytes():
    made = [of(outcome(), outcome("b", plain=True, seed=2), outcome("c", reasons=[REASON])) for _ in range(2)]
    texts = [json.dumps(found, allow_nan=False) for found in made]
    assert texts[0] == texts[1]
    assert json.loads(texts[0]) == made[0]
    # other types of the same numbers, too
    item = outcome()
    other = dataclasses.replace(
        item,
        sigma=np.float64(0.25),
        draws=np.int64(1),
        selection=item.selection.astype(np.uint64),
        estimation=item.estimation.astype(np.int8),
    )
    found = results([other], LABELS.astype(np.uint8), np.int64(CLASSES), np.float64(ALPHA), settings=SETTINGS)
    assert json.dumps(found) == json.dumps(of(item))


def test_settings_and_purifiers_are_copies_of_plain_data():
    given = {"a": (1, 2), "data": {}}
    found = of(outcome(purifier=given), settings=given)
    given["data"]["late"] = 1
    assert found["settings"] == found["conditions"][0]["purifier"] == {"a": [1, 2], "data": {}}


# -- reasons -----------------------------------------------------------------------------------------


def walk(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list):
        for item in value:
            yield from walk(item, path)
    else:
        yield path, value


FIGURES = {
    ("name",),
    ("sigma",),
    ("draws",),
    ("plain",),
    ("purifier", "name"),
    ("purifier", "sigma"),
    ("models", "selection"),
    ("models", "estimation"),
    ("reasons",),
    ("one_model", "mean"),
    ("one_model", "std"),
    ("vote", "accuracy"),
    ("vote", "predicted"),
    ("vote", "abstained"),
}


def check_no_certificate(found):
    """Of everything in it, nothing is a radius, a bound or a curve."""
    assert found["reasons"]
    for path, value in walk(found):
        assert path in FIGURES or value is None, path
    assert found["certificate"] is found["curve"] is found["certified_sigma"] is None


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"reasons": [REASON]}, [REASON]),
        ({"reasons": [REASON, "And this."], "m": 5}, [REASON, "And this."]),
        ({"sigma": None, "reasons": ["There is no noise."]}, ["There is no noise."]),
        ({"m": 9}, ["9 models cannot certify anything at alpha 0.001"]),
        ({"m": 0}, ["There are no models for estimation"]),
        ({"n": 0}, ["There are no models for selection"]),
        ({"n": 1, "m": 0}, ["There are no models for estimation"]),
    ],
)
def test_no_number_where_there_is_a_reason(more, why):
    item = outcome("this one", **more)
    found = of(item)
    check_no_certificate(found["conditions"][0])
    assert len(found["conditions"][0]["reasons"]) == len(why)
    for reason, words in zip(found["conditions"][0]["reasons"], why, strict=True):
        assert reason.startswith(words)
    page = markdown(found)
    for reason in found["conditions"][0]["reasons"]:
        assert f"**this one**, no certificate:\n\n- {found['conditions'][0]['reasons'][0]}" in page
        assert reason in page
    line = next(line for line in page.splitlines() if line.startswith("| this one |"))
    assert [cell.strip() for cell in line.split("|")[-3:-1]] == ["–", "–"]
    assert "What a radius allows" not in page
    assert "within " not in line

    # beside others that have one, a dash for each of their columns and no more
    both = of(outcome(), item)
    check_no_certificate(both["conditions"][1])
    page = markdown(both)
    head = next(line for line in page.splitlines() if line.startswith("| condition |"))
    line = next(line for line in page.splitlines() if line.startswith("| this one |"))
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert {item.strip(" |") for name, item in cells.items() if re.match("certified|within|best", name)} == {"–"}
    assert "What a radius allows" in page


def test_ten_models_are_just_enough():
    assert only(m=10)["certificate"]["best_radius"] > 0
    assert only(m=9)["certificate"] is None


def test_one_model_has_no_spread():
    found = only(n=1, m=0)
    assert found["one_model"]["std"] is None
    assert found["one_model"]["mean"] == found["vote"]["accuracy"]
    assert found["vote"]["abstained"] == 100
    assert "±" not in markdown(of(outcome(n=1, m=0)))


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma must be a finite number above 0"),
        ({"sigma": True}, "sigma must be a finite number above 0"),
        ({"sigma": math.nan, "reasons": (REASON,)}, "sigma must be a finite number above 0"),
        ({"sigma": None}, "Expected a reason where there is no noise of one sigma"),
        ({"draws": 0}, "draws must be a whole number"),
        ({"draws": None, "reasons": (REASON,)}, "draws must be a whole number"),
        ({"plain": 1}, "plain must be True or False"),
        ({"reasons": [REASON]}, "reasons must be a tuple of sentences"),
        ({"reasons": (" ",)}, "reasons must be a tuple of sentences"),
        ({"reasons": REASON}, "reasons must be a tuple of sentences"),
        ({"purifier": {"sigma": math.inf}}, "purifier must be what JSON can hold"),
        ({"purifier": {"path": Path("a")}}, "purifier must be what JSON can hold"),
        ({"purifier": "eclipse"}, "purifier must be a dictionary. Got str"),
        ({"selection": votes(3).astype(float)}, "selection must be votes"),
        ({"selection": votes(3) > 1}, "selection must be votes"),
        ({"selection": LABELS}, "selection must be votes"),
        ({"estimation": votes(30)[:, 1:]}, r"estimation must be votes, integers \(models, 120\)"),
        ({"estimation": votes(30) + 1}, "votes must be from 0 to 3"),
        ({"estimation": votes(30) - 1, "reasons": (REASON,)}, "votes must be from 0 to 3"),
        ({"selection": votes(0), "estimation": votes(0)}, "Expected votes of one or more models"),
    ],
)
def test_an_outcome_that_is_none_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=f"^odd one: .*{message}"):
        of(outcome(), dataclasses.replace(outcome("odd one"), **change))


@pytest.mark.parametrize("cut", [(slice(None), slice(None)), (slice(0, 10), slice(9, None))])
def test_the_models_that_select_may_not_estimate(cut):
    every = votes(60)
    with pytest.raises(InputError, match="of other models than those that selected"):
        of(outcome(selection=every[cut[0]], estimation=every[cut[1]]))


@pytest.mark.parametrize("bad", [[], None, outcome(), [outcome(), "b"], iter([outcome()])])
def test_what_are_no_outcomes(bad):
    with pytest.raises(InputError, match="Expected one or more outcomes"):
        results(bad, LABELS, CLASSES, ALPHA, settings=SETTINGS)


@pytest.mark.parametrize("name", ["", " ", "a\nb", None, 3])
def test_a_name_is_a_line(name):
    with pytest.raises(InputError, match="name must be a line of text"):
        of(outcome(name))


def test_names_differ():
    with pytest.raises(InputError, match="Got 'b' twice"):
        of(outcome("a"), outcome("b"), outcome("b", sigma=0.5))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS.astype(float), "labels must be integers"),
        (LABELS[None], "labels must be integers"),
        (LABELS[:0], "labels must be integers"),
        (LABELS + 1, "labels: votes must be from 0 to 3"),
        (LABELS - 1, "labels: votes must be from 0 to 3"),
        (LABELS[1:], "selection must be votes"),
    ],
)
@pytest.mark.parametrize("reasons", [(), (REASON,)])
def test_labels_that_are_none(labels, message, reasons):
    with pytest.raises(InputError, match=message):
        results([outcome(reasons=reasons)], labels, CLASSES, ALPHA, settings=SETTINGS)


@pytest.mark.parametrize("reasons", [(), (REASON,)])
def test_other_arguments_that_are_none(reasons):
    item = [outcome(reasons=reasons)]
    for alpha in (0, 1, math.nan, True, "0.1"):
        with pytest.raises(InputError, match="alpha must be"):
            results(item, LABELS, CLASSES, alpha, settings=SETTINGS)
    for classes in (1, 4.0, True):
        with pytest.raises(InputError, match="classes must be"):
            results(item, LABELS, classes, ALPHA, settings=SETTINGS)
    for settings in ({"a": math.nan}, {"a": np.zeros(1)}, None, []):
        with pytest.raises(InputError, match="settings must be"):
            results(item, LABELS, CLASSES, ALPHA, settings=settings)


@pytest.mark.parametrize("bad", [None, [], {}, {"schema": SCHEMA}, {"schema": SCHEMA + 1, "alpha_is": ""}])
def test_results_of_something_else(bad, tmp_path):
    for use in (markdown, lambda bad: write(bad, tmp_path / "a"), lambda bad: curves(bad, tmp_path / "a.png")):
        with pytest.raises(InputError, match=f"Expected certificates of schema {SCHEMA}"):
            use(bad)
    assert not list(tmp_path.iterdir())


# -- the page ----------------------------------------------------------------------------------------


def table(page, first):
    lines = page[page.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert {len(row) for row in rows} == {len(rows[0])}
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_the_page_has_the_figures():
    found = of(outcome(), outcome("sigma 1, plain noise", sigma=1.0, plain=True, skill=0.6, seed=4))
    page = markdown(found)
    for item, line in zip(found["conditions"], table(page, "condition"), strict=True):
        assert line["condition"] == item["name"]
        assert line["models"] == "9 + 60"
        assert line["one model"] == f"{item['one_model']['mean']:.1f} ± {item['one_model']['std']:.1f}"
        assert line["vote"] == f"{item['vote']['accuracy']:.1f}"
        assert line["abstained"] == f"{item['vote']['abstained']:.1f}"
        assert line["certified"] == f"{item['certificate']['certified']:.1f}"
        assert line["best radius"] == f"{item['certificate']['best_radius']:.3g}"
        within = {float(name[7:]): cell for name, cell in line.items() if name.startswith("within ")}
        assert list(within) == [0.05, 0.2, 0.3, 1]
        right = np.array(item["certificate"]["predictions"]) == LABELS
        for radius, cell in within.items():
            assert cell == f"{100 * (right & (np.array(item['certificate']['radii']) > radius)).mean():.1f}"
    assert "draws" not in table(page, "condition")[0]
    assert found["alpha_is"] in page
    assert f"ask for alpha / 120 = {ALPHA / 120:.3g}" in page
    for words in ("4,000 training images", "69 models", "120 test inputs of 4 classes", "trigger", "changed labels"):
        assert words in page
    assert "No certificate" not in page
    assert "![" not in page
    assert "](certified.png)" in markdown(found, picture="certified.png")
    assert json.loads(page.split("```json\n")[1].split("```")[0])["settings"] == SETTINGS


def test_a_column_at_a_step_has_what_is_left_after_it():
    """A change of norm R is not below R."""
    found = of(outcome())
    curve = found["conditions"][0]["curve"]
    at = int(np.searchsorted(curve["radii"], 0.2))
    curve["radii"][at] = 0.2
    assert curve["accuracy"][at] < curve["accuracy"][at - 1]
    assert table(markdown(found), "condition")[0]["within 0.2"] == f"{curve['accuracy'][at]:.1f}"


def test_what_a_radius_allows():
    found = of(outcome())
    rows = table(markdown(found), "one image")
    best = found["conditions"][0]["certificate"]["best_radius"]
    assert [row["one image"] for row in rows] == ["0.05", "0.1", "0.2", "0.3", f"{best:.3g}"]
    for row, radius in zip(rows, (0.05, 0.1, 0.2, 0.3, best), strict=True):
        assert row["each of 10 images"] == f"{radius / math.sqrt(10):.3g}"
        assert row["each of 40 images, 1 %"] == f"{radius / math.sqrt(40):.3g}"
        assert row["one image, each value, levels of 255"] == f"{255 * radius / math.sqrt(3072):.3g}"


@pytest.mark.parametrize(
    "settings", [{}, {"data": None}, {"data": {"train": 40, "values": 0}}, {"data": {"train": 1000, "values": True}}]
)
def test_what_a_radius_allows_where_little_is_known(settings):
    assert list(table(markdown(of(outcome(), settings=settings)), "one image")[0]) == ["one image", "each of 10 images"]


@pytest.mark.parametrize("scale", [1e-4, 0.03, 0.25, 1.0, 1.9, 70.0])
@pytest.mark.parametrize("ratio", [1, 2, 40, 1e4])
def test_radii_in_columns_are_few_and_within_reach(scale, ratio):
    found = of(outcome("a", sigma=scale), outcome("b", sigma=scale * ratio))
    line = table(markdown(found), "condition")[0]
    radii = [float(name[7:]) for name in line if name.startswith("within ")]
    best = [item["certificate"]["best_radius"] for item in found["conditions"]]
    assert 3 <= len(radii) <= 4
    assert radii == sorted(set(radii))
    assert radii[0] < min(best) / 4 * 1.01
    assert best[1] / 2.01 < radii[-1] < best[1]


def test_draws_have_a_column_where_there_are_several():
    found = of(outcome("a"), outcome("b", draws=4), outcome("c", sigma=None, reasons=["There is no noise."]))
    assert [row["draws"] for row in table(markdown(found), "condition")] == ["1", "4", "–"]


def test_a_name_does_not_break_a_table():
    name = "a|b_c*`<i>"
    page = markdown(of(outcome(name), outcome("d|e", reasons=[REASON])))
    assert [row["condition"] for row in table(page, "condition")] == [r"a\|b\_c\*\`\<i>", r"d\|e"]


# -- files -------------------------------------------------------------------------------------------


def test_written_files_are_the_results(tmp_path):
    found = of(outcome(), outcome("b", reasons=[REASON]))
    written = write(found, tmp_path / "new" / "out")
    assert written.paths == [tmp_path / "new" / "out" / name for name in (RESULTS_FILE, PAGE_FILE, PICTURE_FILE)]
    assert not written.note
    assert sorted(written.paths) == sorted((tmp_path / "new" / "out").iterdir())
    texts = [path.read_bytes() for path in written.paths]
    assert json.loads(texts[0]) == found
    assert texts[1].decode() == markdown(json.loads(texts[0]), picture=PICTURE_FILE)
    assert texts[2].startswith(PNG)
    write(json.loads(texts[0]), tmp_path / "new" / "out")
    assert [path.read_bytes() for path in written.paths] == texts


def test_without_matplotlib_all_else_is_written_and_no_older_picture_stays(tmp_path, monkeypatch):
    write(of(outcome(seed=5)), tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = write(of(outcome()), str(tmp_path))
    assert [path.name for path in written.paths] == [RESULTS_FILE, PAGE_FILE]
    assert sorted(written.paths) == sorted(tmp_path.iterdir())
    assert "pip install 'purifyloader[plots]'" in written.note
    assert "![" not in (tmp_path / PAGE_FILE).read_text()
    with pytest.raises(PurifyError, match="needs matplotlib"):
        curves(of(outcome()), tmp_path / "a.png")
    with pytest.raises(PurifyError, match="needs matplotlib"):
        curves(of(outcome(reasons=[REASON])), tmp_path / "a.png")


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(PurifyError, match="Could not write"):
        write(of(outcome()), tmp_path / "a")
    with pytest.raises(PurifyError, match="Could not write"):
        curves(of(outcome()), tmp_path / "a" / "b.png")


def test_without_scipy_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "scipy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PurifyError, match=r"pip install 'purifyloader\[certify\]'"):
        of(outcome())


# -- pictures ----------------------------------------------------------------------------------------

SEVERAL = [
    outcome("sigma 0.25"),
    outcome("sigma 0.25, 4 draws", draws=4, seed=3),
    outcome("sigma 1", sigma=1.0, skill=0.5),
    outcome("sigma 0.25, plain noise", plain=True, skill=0.4),
    outcome("no noise", sigma=None, reasons=["There is no noise."]),
]


@pytest.mark.parametrize(
    "shown",
    [
        SEVERAL[:1],
        SEVERAL[3:4],
        SEVERAL[4:],
        SEVERAL,
        [outcome(f"condition {i}", sigma=0.1 + max(0, i - 3), seed=i) for i in range(14)],
        [outcome(selection=(LABELS + np.ones((9, 1), int)) % CLASSES)],
        [outcome("_$\\frac{ of $"), outcome("long " * 30, plain=True), outcome("$\\no $", reasons=[REASON])],
    ],
    ids=["one", "plain", "none", "several", "many", "nothing certified", "odd names"],
)
def test_pictures_are_drawn(shown, tmp_path):
    found = of(*shown)
    before = copy.deepcopy(found)
    curves(found, tmp_path / "a.png")
    assert found == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_the_same_results_are_the_same_picture(tmp_path):
    for name in ("a.png", "b.png"):
        curves(of(*SEVERAL[:2]), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_shows_what_was_found(tmp_path, monkeypatch):
    from purifyloader.certify import output

    drawn = []
    monkeypatch.setattr(output, "save_figure", lambda figure, path: drawn.append(figure))
    found = of(*SEVERAL)
    curves(found, tmp_path / "a.png")
    figure = drawn[0]
    panels = figure.axes
    assert [axis.get_title("left") for axis in panels] == ["noise and denoise", "noise alone"]
    lines = {line.get_label().strip(): line for axis in panels for line in axis.get_lines()}
    shown = {item["name"]: item for item in found["conditions"] if item["certificate"]}
    assert shown.keys() <= lines.keys()
    assert "no noise" not in lines
    for name, item in shown.items():
        x, y = lines[name].get_data()
        assert lines[name].get_drawstyle() == "steps-post"
        assert list(x) == item["curve"]["radii"][: len(x)]
        assert list(y) == item["curve"]["accuracy"][: len(y)]
        assert y[-1] == 0
        assert (lines[name].get_linestyle() == "-") == (name in ("sigma 0.25", "sigma 1"))
    assert lines["sigma 0.25"].get_color() == lines["sigma 0.25, plain noise"].get_color()
    assert lines["sigma 0.25"].get_color() != lines["sigma 1"].get_color()
    dots = [line.get_ydata()[0] for axis in panels for line in axis.get_lines() if line.get_marker() == "o"]
    assert dots == [item["vote"]["accuracy"] for item in found["conditions"] if item["certificate"]]
    low, high = panels[0].get_xlim()
    assert low == 0
    assert max(lines["sigma 1"].get_xdata()) < high < 1.05 * max(lines["sigma 1"].get_xdata())
    assert "No certificate: no noise." in " ".join(text.get_text() for text in figure.texts)
    # nothing is drawn over anything else
    figure.draw_without_rendering()
    apart = [*panels, *(axis.get_legend() for axis in panels), *figure.texts]
    boxes = [item.get_window_extent() for item in apart]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 for box in boxes)
