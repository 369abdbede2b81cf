"""A plan that names suspects and corrects labels, as a sanitizer such as DataElixir will make it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import transforms as v1

from purifyloader import PurifiedDataset, plans, precompute, recipes
from purifyloader.cache import CacheReader
from purifyloader.cache.compare import compare
from purifyloader.cache.inspect import describe
from purifyloader.cache.tars import export_tars, import_tars
from purifyloader.commands.main import main
from purifyloader.errors import CacheError, ConfigError, InputError
from purifyloader.purified.plans import Sanitation
from purifyloader.transforms import Compensate
from tests.conftest import PictureDataset, random_images

COUNT = 10
SUSPECTS, LABELS = (1, 4, 7), {0: 1, 4: 9, 5: 3}
KEPT = [0, 2, 3, 5, 6, 8, 9]
TARGETS = [1, 1, 0, 1, 9, 3, 0, 1, 0, 1]  # of all, corrected: i % 2 but for LABELS


class Labelled(PictureDataset):
    """With the list of targets that torchvision's datasets have."""

    targets = [i % 2 for i in range(COUNT)]


class Odd:
    """A label that no cache can store, for a cache that is read with its source."""

    def __init__(self, value: int) -> None:
        self.value = value


def dataset(transform: Any = None) -> Labelled:
    return Labelled(random_images(COUNT), transform)


def finding(**changes: Any) -> Sanitation:
    how = {"method": "votes", "rounds": 5}
    return Sanitation(**{"images": COUNT, "suspects": SUSPECTS, "labels": LABELS, "found_by": how, **changes})


def wrapped(mode: str, folder: Path, sanitation: Sanitation | None, transform: Any = None) -> PurifiedDataset:
    """The dataset read in each of the ways there are."""
    options: dict[str, Any] = {"transform": None, "progress": False, "sanitation": sanitation}
    purifier = recipes.coin(alpha=8)  # which draws noise for each image
    data = dataset(transform)
    if mode == "live":
        return PurifiedDataset(data, purifier, **options)
    if mode == "on demand":
        return PurifiedDataset(data, purifier, cache=folder, missing="purify", **options)
    if mode == "filled now":
        return PurifiedDataset(data, purifier, cache=folder, **options)
    precompute(data, purifier, folder, shard_size=4, sanitation=sanitation, progress=False)
    if mode == "without source":
        return PurifiedDataset.from_cache(folder, transform=transform)
    return PurifiedDataset(data, purifier, cache=folder, in_memory=mode == "in memory", progress=False)


MODES = ["live", "on demand", "filled now", "finished", "in memory", "without source"]


@pytest.mark.parametrize(
    ("drop", "transform"),
    [(True, None), (True, v1.PILToTensor()), (False, v1.PILToTensor())],
    ids=["pil", "batches", "batches, flagged"],
)
@pytest.mark.parametrize("mode", MODES)
def test_labels_are_corrected_and_suspects_dropped_in_every_mode(
    tmp_path: Path, mode: str, drop: bool, transform: Any
) -> None:
    whole = wrapped("live", tmp_path / "none", None, transform)
    got = wrapped(mode, tmp_path / "cache", finding(drop=drop), transform)
    kept = KEPT if drop else list(range(COUNT))
    assert len(got) == len(kept)
    assert got.indices.tolist() == kept
    assert list(got.targets) == [TARGETS[i] for i in kept]
    assert got.sanitation == finding(drop=drop)
    for at, (image, label) in enumerate(got[i] for i in range(len(kept))):
        # the noise is that of the index in the source, whatever is dropped
        assert np.array_equal(np.asarray(image), np.asarray(whole[kept[at]][0]))
        assert label == TARGETS[kept[at]]
    assert got[-1][1] == TARGETS[kept[-1]]
    if transform is not None:
        batches = list(DataLoader(got, 4))
        assert torch.cat([labels for _, labels in batches]).tolist() == [TARGETS[i] for i in kept]
        assert torch.equal(torch.cat([x for x, _ in batches]), torch.stack([whole[i][0] for i in kept]))
        assert got[[0, 2]][1].tolist() == [TARGETS[kept[0]], TARGETS[kept[2]]]
    again = pickle.loads(pickle.dumps(got))
    assert [label for _, label in again] == [TARGETS[i] for i in kept]
    with pytest.raises(IndexError):
        got[len(kept)]


def test_compensation_is_that_of_the_index_in_the_source(tmp_path: Path) -> None:
    compensate = Compensate(p=0.5, sigma=0.1)
    options: dict[str, Any] = {"compensate": compensate, "progress": False}
    whole, got = (
        PurifiedDataset(dataset(v1.PILToTensor()), recipes.jpeg(50), sanitation=s, **options) for s in (None, finding())
    )
    assert all(torch.equal(got[at][0], whole[i][0]) for at, i in enumerate(KEPT))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("make", "key", "label"),
    [
        (lambda x, i: (x, i % 2, "name"), None, lambda sample: sample[1]),
        (lambda x, i: ["name", x, i % 2], 2, lambda sample: sample[2]),
        (lambda x, i: {"image": x, "label": torch.tensor(i % 2)}, None, lambda sample: sample["label"]),
        (lambda x, i: {"class": np.int32(i % 2), "image": x}, "class", lambda sample: sample["class"]),
    ],
    ids=["triple", "list", "dict", "named field"],
)
def test_the_label_is_found_in_any_sample_and_keeps_its_type(
    tmp_path: Path, make: Any, key: Any, label: Any, cached: bool
) -> None:
    samples = [make(x, i) for i, x in enumerate(random_images(COUNT))]
    got = PurifiedDataset(
        samples,
        recipes.jpeg(50),
        cache=tmp_path if cached else None,
        image_key=1 if isinstance(samples[0], list) else None,
        sanitation=finding(label_key=key),
        progress=False,
    )
    for at, i in enumerate(KEPT):
        assert label(got[at]) == TARGETS[i]
        assert type(label(got[at])) is type(label(samples[i]))
        assert [type(field) for field in got[at]] == [type(field) for field in samples[i]]


def test_labels_that_no_cache_stores_are_corrected_too(tmp_path: Path) -> None:
    samples = [(x, i % 2, Odd(i)) for i, x in enumerate(random_images(COUNT))]
    got = PurifiedDataset(samples, recipes.jpeg(50), cache=tmp_path, sanitation=finding(), progress=False)
    assert CacheReader(tmp_path).targets is None
    assert [(label, odd.value) for _, label, odd in got] == [(TARGETS[i], i) for i in KEPT]


def test_a_bare_image_has_no_label_to_correct() -> None:
    images = [x.numpy().transpose(1, 2, 0) for x in random_images(COUNT)]
    got = PurifiedDataset(images, recipes.jpeg(50), sanitation=finding(labels={}))
    assert len(got) == len(KEPT)
    with pytest.raises(InputError, match="has no label"):
        PurifiedDataset(images, recipes.jpeg(50), sanitation=finding())[0]


# -- in a cache --------------------------------------------------------------------------------------


def test_shards_and_fingerprint_do_not_depend_on_it(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, sanitation in ((a, None), (b, finding())):
        precompute(dataset(), recipes.jpeg(50), folder, shard_size=4, sanitation=sanitation, progress=False)
    assert CacheReader(a).fingerprint == CacheReader(b).fingerprint
    assert all((b / path.name).read_bytes() == path.read_bytes() for path in a.glob("shard-*"))
    indices = [json.loads((folder / "index.json").read_text()) for folder in (a, b)]
    assert indices[0]["plan"] is None
    assert {k for k in indices[0] if indices[0][k] != indices[1][k]} == {"plan", "sha256"}
    # as cache/README.md says it
    assert indices[1]["plan"] == {
        "where": {
            "conditions": [],
            "source": None,
            "sanitation": {
                "schema": 1,
                "images": 10,
                "suspects": [1, 4, 7],
                "labels": [[0, 1], [4, 9], [5, 3]],
                "drop": True,
                "label_key": None,
                "source": None,
                "found_by": {"method": "votes", "rounds": 5},
            },
        }
    }


def test_it_can_be_added_to_a_finished_cache_and_stays(tmp_path: Path) -> None:
    for sanitation in (None, finding(), None):
        precompute(dataset(), recipes.jpeg(50), tmp_path, plan={"by": "me"}, sanitation=sanitation, progress=False)
    assert PurifiedDataset.from_cache(tmp_path).targets == [TARGETS[i] for i in KEPT]
    reader = CacheReader(tmp_path)
    assert reader.plan is not None
    assert reader.plan["by"] == "me"
    assert not list(tmp_path.glob("plan.json"))


def test_a_finished_cache_is_opened_with_a_finding_of_ones_own_and_not_changed(tmp_path: Path) -> None:
    precompute(dataset(), recipes.jpeg(50), tmp_path, progress=False)
    before = (tmp_path / "index.json").read_bytes()
    got = PurifiedDataset(dataset(), recipes.jpeg(50), cache=tmp_path, sanitation=finding(), progress=False)
    alone = PurifiedDataset.from_cache(tmp_path, sanitation=finding())
    assert got.targets == alone.targets == [TARGETS[i] for i in KEPT]
    assert (tmp_path / "index.json").read_bytes() == before


def test_a_run_that_was_stopped_goes_on_with_it(tmp_path: Path) -> None:
    """Here: in a cache that is filled on demand, of which one shard is made by another dataset object without it."""
    first = wrapped("on demand", tmp_path, finding())
    assert len(first) == len(KEPT)
    again = PurifiedDataset(dataset(), recipes.coin(alpha=8), cache=tmp_path, missing="precompute", progress=False)
    assert again.targets == [TARGETS[i] for i in KEPT]
    assert PurifiedDataset.from_cache(tmp_path).sanitation == finding()


def test_beside_a_condition(tmp_path: Path) -> None:
    from purifyloader.purifiers import EnergyAbove, Where
    from tests.conftest import tiny_energy

    purifier = Where(EnergyAbove(tiny_energy(), k=0.5), recipes.jpeg(10))
    precompute(dataset(), purifier, tmp_path, sanitation=finding(), progress=False)
    got = PurifiedDataset(dataset(), purifier, cache=tmp_path, progress=False)
    assert got.targets == [TARGETS[i] for i in KEPT]
    assert not plans.is_open(got.purifier)
    assert describe(tmp_path)["where"][0]["planned"]["images"] == COUNT


@pytest.mark.parametrize(
    "opening",
    [
        lambda folder, other: PurifiedDataset(dataset(), recipes.jpeg(50), cache=folder, sanitation=other),
        lambda folder, other: PurifiedDataset.from_cache(folder, sanitation=other),
        lambda folder, other: precompute(dataset(), recipes.jpeg(50), folder, sanitation=other),
    ],
    ids=["with source", "without", "precompute"],
)
def test_another_finding_than_that_of_the_cache_is_refused(tmp_path: Path, opening: Any) -> None:
    precompute(dataset(), recipes.jpeg(50), tmp_path, sanitation=finding(), progress=False)
    with pytest.raises(CacheError, match=r"drop: true → false"):
        opening(tmp_path, finding(drop=False))


def test_a_finding_of_another_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of 10 images and the dataset has 9"):
        PurifiedDataset(PictureDataset(random_images(9)), recipes.jpeg(50), sanitation=finding())
    precompute(dataset(), recipes.jpeg(50), tmp_path / "a", progress=False)
    source = CacheReader(tmp_path / "a").identity["source"]
    other = finding(source={**source, "images": "0" * 64})
    for given in (finding(source=source), other):
        options: dict[str, Any] = {"sanitation": given, "progress": False}
        if given is other:
            with pytest.raises(CacheError, match="another dataset"):
                PurifiedDataset(dataset(), recipes.jpeg(50), cache=tmp_path / "a", **options)
            with pytest.raises(CacheError, match="of other images or targets"):
                precompute(dataset(), recipes.jpeg(50), tmp_path / "b", **options)
        else:
            PurifiedDataset(dataset(), recipes.jpeg(50), cache=tmp_path / "a", **options)
            precompute(dataset(), recipes.jpeg(50), tmp_path / "c", **options)


def test_the_tools_of_a_cache_know_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, tars = tmp_path / "a", tmp_path / "b", tmp_path / "tars"
    precompute(dataset(), recipes.jpeg(50), a, progress=False)
    precompute(dataset(), recipes.jpeg(50), b, sanitation=finding(), progress=False)
    assert describe(a)["sanitation"] is None
    assert main(["cache", "info", str(b)]) == 0
    assert "3 of 10 images dropped, 3 labels corrected, found by votes" in capsys.readouterr().out
    assert compare(CacheReader(a), CacheReader(b)).plans_differ
    assert not compare(CacheReader(b), CacheReader(b)).plans_differ
    assert main(["cache", "compare", str(a), str(b)]) == 0
    assert "planned or sanitized differently" in capsys.readouterr().out
    assert main(["cache", "export", str(b), str(tmp_path / "shown")]) == 0
    assert "every image and the labels of the source" in capsys.readouterr().out
    export_tars(CacheReader(b), tars)
    assert PurifiedDataset.from_cache(import_tars(tars, tmp_path / "again").folder).sanitation == finding()


# -- the value ---------------------------------------------------------------------------------------


def test_json_gives_it_back() -> None:
    for sanitation in (finding(), Sanitation(3), finding(drop=False, label_key="y", source={"images": "a"})):
        assert Sanitation.from_dict(json.loads(json.dumps(sanitation.to_dict()))) == sanitation
        assert pickle.loads(pickle.dumps(sanitation)) == sanitation
    numpy = Sanitation(np.int64(4), suspects=np.array([2, 0, 2]), labels={np.int64(1): np.int64(5)})
    assert (numpy.suspects, numpy.labels) == ((0, 2), {1: 5})
    json.dumps(numpy.to_dict())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"suspects": [10]}, InputError, "index 10"),
        ({"suspects": [-1]}, InputError, "index -1"),
        ({"labels": {10: 0}}, InputError, "index 10"),
        ({"labels": {0: "cat"}}, InputError, "are integers"),
        ({"labels": {0: 0.5}}, InputError, "are integers"),
        ({"suspects": [True]}, InputError, "are integers"),
        ({"suspects": range(10)}, InputError, "drops all 10"),
        ({"found_by": {"threshold": float("nan")}}, ConfigError, "found_by must be"),
        ({"found_by": 3}, ConfigError, "found_by must be"),
    ],
)
def test_bad_findings(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        finding(**changes)


@pytest.mark.parametrize(
    ("changes", "message"), [({"schema": 2}, "schema 2"), ({"labels": 3}, "damaged"), ({"more": 1}, "damaged")]
)
def test_json_of_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sanitation.from_dict({**finding().to_dict(), **changes})
