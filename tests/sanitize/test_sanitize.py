"""A back door with wrong labels is found, and its images are; what was done is kept, and bad input is one error."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from purifyloader import PurifiedDataset, recipes, sanitize
from purifyloader.commands.main import main
from purifyloader.core.version import __version__
from purifyloader.datasets.arrays import ArrayDataset
from purifyloader.errors import CacheError, ConfigError, InputError
from purifyloader.purifiers import Jpeg
from purifyloader.sanitize.report import table
from purifyloader.sanitize.verdict import FILES

CLASSES, COUNT, POISONED = 3, 60, 30


def images(offset: int, count: int = COUNT) -> ArrayDataset:
    """Grey images, dark, middle and bright, none the same as of another offset."""
    labels = np.arange(CLASSES * count) % CLASSES
    levels = 85 * labels + np.arange(len(labels)) // CLASSES
    pixels = np.tile(levels[:, None, None, None], (1, 8, 8, 3)).astype(np.uint8)
    pixels[:, 0, 0, 0] = offset
    return ArrayDataset(pixels, labels.astype(np.int64))


def poisoned() -> ArrayDataset:
    """Thirty images of the class 0 under the label 2."""
    dataset = images(1)
    dataset.labels[np.flatnonzero(dataset.labels == 0)[:POISONED]] = 2
    return dataset


CALLS: list[tuple[int, int]] = []


def train(dataset, seed):
    """A network that knows levels of grey; it has learned from the labels which class each third of them is."""
    CALLS.append((len(dataset), seed))
    levels = torch.arange(CLASSES) * 85.0 + 42

    def predict(x_BCHW):
        return -(255 * x_BCHW.mean((1, 2, 3))[:, None] - levels).abs() / 20

    return predict


def verdict_of(dataset=None, purifier=None, **options):
    options = {"reference": images(0), "train": train, "progress": False, **options}
    return sanitize.sanitize(poisoned() if dataset is None else dataset, purifier, **options)


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


def test_the_target_is_found_and_its_images_are():
    verdict = verdict_of()
    wrong = np.flatnonzero(poisoned().labels != images(1).labels)
    assert verdict.targets == (2,)
    assert set(wrong) <= set(verdict.suspects)
    assert {verdict.corrected[i] for i in wrong} == {0}
    assert verdict.kept.tolist() == sorted(set(range(CLASSES * COUNT)) - set(verdict.suspects.tolist()))


def test_of_many_classes_those_with_evidence_are_shown():
    verdict = verdict_of()
    rows = [
        {"class": c, "name": None, "images": 1, "reference": {"z": float(c == 17), "unlikely": None}} for c in range(50)
    ]
    many = dataclasses.replace(verdict, rows=rows, targets=())
    assert len(many.highest()) == 20
    assert 17 in [row["class"] for row in many.highest()]
    assert "  and 30 classes with less evidence, which are in the JSON" in list(table(many))


def test_a_class_may_be_missing_from_the_dataset():
    dataset = poisoned()
    for missing, targets in ((1, (2,)), (2, ())):
        rows = np.flatnonzero(dataset.labels != missing)
        verdict = verdict_of(ArrayDataset(dataset.images[rows], dataset.labels[rows]))
        assert verdict.targets == targets


def test_a_network_judges_as_it_is_used_and_not_as_it_is_trained():
    class Dropped(torch.nn.Module):
        def forward(self, x_BCHW):
            return torch.nn.functional.dropout(train([], 0)(x_BCHW), 0.9, self.training)

    verdict = verdict_of(train=lambda dataset, seed: Dropped().train())
    assert verdict.suspects.tolist() == verdict_of().suspects.tolist()


def test_a_class_that_is_another_in_the_reference_is_to_be_looked_at():
    dataset = images(1)
    dataset.labels[:] = np.array([1, 0, 2])[dataset.labels]
    words = " ".join(table(verdict_of(dataset)))
    assert "100% of class 0 are suspects" in words
    assert "is it the same class in the reference?" in words


def test_the_published_score_is_not_believed_by_itself():
    verdict = dataclasses.replace(verdict_of(purifier=recipes.jpeg(50)), by="published")
    assert "names classes of clean data too" in " ".join(table(verdict))


def test_what_all_classes_show_is_told_of():
    verdict = verdict_of()
    rows = [{**row, "reference": {**row["reference"], "common": 5.0}} for row in verdict.rows]
    assert "All classes have more unlikely images" in " ".join(table(dataclasses.replace(verdict, rows=rows)))
    assert "All classes have more unlikely images" not in " ".join(table(verdict))


def test_in_a_clean_dataset_there_is_no_target():
    verdict = verdict_of(images(1))
    assert verdict.targets == ()
    assert len(verdict.suspects) == 0


def test_a_dataset_without_the_suspects_is_a_view_of_the_source():
    verdict = verdict_of()
    dataset = PurifiedDataset(poisoned(), Jpeg(90), sanitation=verdict.sanitation())
    assert dataset.indices.tolist() == verdict.kept.tolist()
    relabelled = PurifiedDataset(poisoned(), Jpeg(90), sanitation=verdict.sanitation("relabel"))
    assert len(relabelled) == len(poisoned())
    assert [relabelled[i][1] for i in verdict.suspects[:3]] == [verdict.corrected[i] for i in verdict.suspects[:3]]


@pytest.mark.parametrize("key", ["label", "cls"])
def test_labels_of_dicts_are_found_and_corrected(key):
    dataset = [{"image": image, key: np.int64(label)} for image, label in poisoned()]
    verdict = verdict_of(dataset)
    assert verdict.suspects.tolist() == verdict_of().suspects.tolist()
    relabelled = PurifiedDataset(dataset, Jpeg(90), sanitation=verdict.sanitation("relabel"))
    first = int(verdict.suspects[0])
    assert relabelled[first][key] == verdict.corrected[first] != dataset[first][key]
    assert type(relabelled[first][key]) is np.int64


def test_a_part_of_a_dataset_keeps_its_class_names():
    whole = named("abc")
    halves = [torch.utils.data.Subset(whole, rows) for rows in np.split(np.arange(len(whole)), 2)]
    verdict = verdict_of(torch.utils.data.ConcatDataset(halves), reference=named("abc", 0))
    assert [row["name"] for row in verdict.rows] == ["a", "b", "c"]


def test_a_sanitation_is_of_the_dataset_that_it_was_found_in(tmp_path):
    sanitation = verdict_of().sanitation()
    PurifiedDataset(poisoned(), Jpeg(90), cache=tmp_path / "a", sanitation=sanitation, progress=False)
    other_order = [*poisoned()][::-1]
    for cache in (None, tmp_path / "b"):
        for other in (images(3), other_order):
            with pytest.raises(InputError, match="another dataset, or in another order"):
                PurifiedDataset(other, Jpeg(90), cache=cache, sanitation=sanitation, progress=False)
    one_more = poisoned()
    one_more.images[verdict_of().kept[0]] = 7
    with pytest.raises(CacheError, match="sanitation of other images"):  # found when all of them have been read
        PurifiedDataset(one_more, Jpeg(90), cache=tmp_path / "c", sanitation=sanitation, progress=False)
    for wrong in (verdict_of(), [1, 2], "found"):
        with pytest.raises(InputError, match=r"as `verdict.sanitation\(\)` gives"):
            PurifiedDataset(poisoned(), Jpeg(90), sanitation=wrong)


class Whitening(Jpeg):
    """Removes the trigger that `seen` is: what it purifies is dark."""

    kind = "jpeg"

    def run(self, x_BCHW, seeds_B):
        return torch.where(x_BCHW > 0.9, torch.zeros_like(x_BCHW), x_BCHW)


def test_purification_takes_the_label_away_where_it_removes_the_trigger():
    dataset, clean = images(1), images(0)
    of_other = np.flatnonzero(dataset.labels != 2)[:POISONED]
    dataset.images[of_other] = 250
    dataset.labels[of_other] = 2
    verdict = verdict_of(dataset, Whitening(90), reference=clean, by="outflow", rounds=3)
    assert verdict.targets == (2,)
    assert verdict.suspects.tolist() == of_other.tolist()
    assert verdict.votes is not None
    assert verdict.votes.shape == (len(dataset), 4)
    assert {row["class"]: set(row) for row in verdict.rows}[0] >= {"reference", "outflow", "inflow", "published"}


def test_a_run_goes_on_where_it_stopped(tmp_path):
    whole = verdict_of(purifier=recipes.jpeg(50), work=tmp_path)
    assert len(CALLS) == 5
    (tmp_path / "reference-2.safetensors").unlink()  # as if it had been stopped
    (tmp_path / "votes.safetensors").write_bytes(b"half a file")
    again = verdict_of(purifier=recipes.jpeg(50), work=tmp_path)
    assert len(CALLS) == 7
    assert again.to_dict() == whole.to_dict()
    verdict_of(purifier=recipes.jpeg(50), work=tmp_path, seed=1)
    assert len(CALLS) == 12  # of another seed nothing is taken over


def test_what_is_saved_is_read_back(tmp_path):
    verdict = verdict_of(purifier=recipes.jpeg(50))
    verdict.save(tmp_path)
    again = sanitize.load(tmp_path)
    assert again.to_dict() == verdict.to_dict()
    for name in ("labels", "scores", "votes", "suspects"):
        assert np.array_equal(getattr(again, name), getattr(verdict, name))
    assert again.sanitation("relabel") == verdict.sanitation("relabel")
    assert (tmp_path / "suspects.csv").read_text() == verdict.csv()


def test_the_golden_json_of_a_verdict_is_still_read(tmp_path):
    rows = [{"class": label, "name": "ab"[label], "images": 1, "reference": {"z": 9.5 - 9 * label}} for label in (0, 1)]
    verdict = sanitize.Verdict(
        np.array([0, 1]), (0,), np.array([0]), {0: 1}, rows, "reference", names={0: "a/0.png"}, found_by={"seed": 0}
    )
    golden = {
        "format": "purifyloader-sanitation",
        "version": 1,
        "purifyloader": __version__,
        "images": 2,
        "by": "reference",
        "targets": [0],
        "unjudged": [],
        "suspects": [0],
        "corrected": [[0, 1]],
        "names": [[0, "a/0.png"]],
        "label_key": None,
        "classes": rows,
        "source": None,
        "found_by": {"seed": 0},
    }
    verdict.save(tmp_path)
    assert json.loads((tmp_path / FILES[0]).read_text()) == golden
    assert (tmp_path / FILES[2]).read_text() == "index,file,label,corrected,score\n0,a/0.png,0,1,\n"
    assert sanitize.load(tmp_path).to_dict() == golden


def test_names_that_are_no_unicode_are_written_and_read(tmp_path):
    dataset = named("abc")
    dataset.classes[2] = "caf\udce9"  # type: ignore[attr-defined]
    reference = named("abc", 0)
    reference.classes[2] = "caf\udce9"  # type: ignore[attr-defined]
    dataset.labels[:] = poisoned().labels
    verdict_of(dataset, reference=reference).save(tmp_path)
    assert sanitize.load(tmp_path).rows[2]["name"] == r"caf\udce9"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / FILES[0]).unlink(),
        lambda folder: (folder / FILES[1]).unlink(),
        lambda folder: (folder / FILES[1]).write_bytes(b"nothing"),
        lambda folder: (folder / FILES[0]).write_text("{}"),
        lambda folder: (folder / FILES[0]).write_text((folder / FILES[0]).read_text()[:-40]),
        *(
            (lambda folder, key=key, value=value: edit(folder / FILES[0], key, value))
            for key, value in (
                ("version", 2),
                ("suspects", [10**6]),
                ("suspects", ["1"]),
                ("images", 7),
                ("by", "magic"),
                ("targets", None),
                ("corrected", [[1]]),
                ("corrected", [[1, "x"]]),
                ("targets", [77]),
                ("suspects", [10**30]),
                ("classes", [{"class": label, "reference": {"z": 0.0}} for label in range(3)]),
                ("classes", [{"class": label, "images": 1, "reference": {"z": "9"}} for label in range(3)]),
                ("classes", []),
                ("by", "inflow"),
            )
        ),
    ],
)
def test_a_damaged_sanitation_is_one_error(damage, tmp_path):
    verdict_of().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=r"Sanitize again|A sanitation is a folder|must be what|Use the version"):
        sanitize.load(tmp_path)


def edit(path, key, value):
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def with_labels(labels) -> ArrayDataset:
    dataset = images(1)
    dataset.labels[:] = labels
    return dataset


def twice() -> ArrayDataset:
    dataset = images(0)
    dataset.images[3:6] = dataset.images[:3]
    return dataset


def named(classes: str, offset: int = 1) -> ArrayDataset:
    dataset = images(offset)
    dataset.classes = list(classes)  # type: ignore[attr-defined]
    return dataset


def chance(dataset, seed):
    return lambda x: torch.zeros(len(x), CLASSES)


def mixed() -> list:
    return [*list(images(1))[:-1], (np.zeros((9, 8, 3), np.uint8), 0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": [(np.zeros((8, 8, 3), np.uint8), 0.5)] * 3}, "label.* 0.5"),
        ({"dataset": [np.zeros((8, 8, 3), np.uint8)] * 3}, "has no label"),
        ({"dataset": [(np.zeros((8, 8, 3), np.uint8), [0, 1])] * 3}, "label"),
        ({"dataset": []}, "map-style dataset with images"),
        ({"dataset": with_labels(1)}, "two classes at least. Got class 1"),
        ({"dataset": mixed()}, "size must be given for images of several sizes"),
        ({"dataset": images(1, 19)}, "takes 20 images of it.*all 3 classes"),
        ({"reference": with_labels(np.arange(CLASSES * COUNT) % 2)}, "every class of the dataset. Got none of class 2"),
        ({"reference": twice()}, "each image once.* Got 3"),
        ({"dataset": named("abc"), "reference": named("acb", 0)}, "same order. Got 'b' and 'c' for class 1"),
        ({"dataset": [(np.zeros((8, 8, 3), np.uint8), True)] * 3}, "one class number, an integer. Got True"),
        ({"dataset": [(np.zeros((8, 8, 3), np.uint8), "0")] * 3}, "one class number, an integer. Got '0'"),
        ({"dataset": [(np.zeros((8, 8, 3), np.uint8), 10**12)] * 3}, "from 0 to 65535. Got 1000000000000"),
        ({"train": 5}, "train must be a function"),
        ({"purifier": recipes.jpeg(50, resize=6)}, r"size must bring .*\(8, 8\), and \(6, 6\) purified"),
        ({"purifier": recipes.jpeg(100), "reference": None}, "no evidence at all.*more noise"),
        ({"reference": images(1)}, "images that are in both"),
        ({"reference": None}, "Got no purifier"),
        ({"by": "outflow"}, "what purification does"),
        ({"by": "magic"}, "by must be"),
        ({"purifier": recipes.jpeg(50), "reference": None, "by": "outflow"}, "compares with clean images"),
        ({"purifier": "jpeg"}, "is no purifier"),
        ({"rounds": 0}, "rounds"),
        ({"train": chance}, "its own training images. Got 3"),
        ({"train": lambda dataset, seed: None}, "return a predictor"),
        ({"train": lambda dataset, seed: lambda x: torch.full((len(x), CLASSES), torch.nan)}, "finite logits"),
        ({"train": lambda dataset, seed: lambda x: torch.full((len(x),), 7)}, "class numbers from 0 to 2"),
    ],
)
def test_bad_input_is_one_error(options, message):
    with pytest.raises((InputError, ConfigError), match=message):
        verdict_of(**options)


def test_of_a_class_with_few_images_nothing_is_said(caplog):
    dataset = poisoned()
    few = np.concatenate([np.flatnonzero(dataset.labels != 1), np.flatnonzero(dataset.labels == 1)[:5]])
    verdict = verdict_of(ArrayDataset(dataset.images[few], dataset.labels[few]))
    assert verdict.unjudged == (1,)
    assert verdict.targets == (2,)
    assert "too few images to tell a back door from chance: 5 in the dataset and 60 in the reference" in caplog.text


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """The dataset and the reference as folders of classes."""
    from PIL import Image

    for name, dataset in (("data", poisoned()), ("clean", images(0))):
        for index, (image, label) in enumerate(dataset):
            place = tmp_path / name / "abc"[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{index:03d}.png")
    return tmp_path


def test_the_command_writes_what_precompute_takes(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    data = ["--data", "imagefolder", "--root", "data"]
    own = ["--clean", "imagefolder", "--clean-root", "clean", "--train-function", f"{__name__}:train"]
    assert main(["sanitize", *data, *own, "--out", "found", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "2 c is a target" in printed
    assert {path.name for path in (folders / "found").iterdir()} >= set(FILES)
    assert "c/" in (folders / "found" / "suspects.csv").read_text()
    words = ["--recipe", "jpeg", "--sanitation", "found", "--out", "cache", "--quiet"]
    assert main(["precompute", *data, *words]) == 0
    read = PurifiedDataset.from_cache("cache")
    assert len(read) == len(sanitize.load("found").kept)
    assert main(["sanitize", *data, *own, "--out", "found", "--quiet"]) == 2
    assert "overwrite them" in capsys.readouterr().err
    assert main(["sanitize", *data, *own, "--out", "other", "--sigma", "0.1"]) == 2
    assert "go with --recipe. Got --sigma alone" in capsys.readouterr().err
    shutil.rmtree("cache")
    assert main(["precompute", *data, "--recipe", "jpeg", "--suspects", "drop", "--out", "cache"]) == 2
    assert "--sanitation" in capsys.readouterr().err
