"""Auditing a dataset by energy: against independent computations, and as a command on real images."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from purifyloader import pretrained
from purifyloader.audit import DatasetEnergies, audit_energy, dataset_energies, picture, ranked_csv
from purifyloader.audit.compare import expected_share, halves, percentiles, threshold
from purifyloader.audit.report import in_words, number
from purifyloader.commands import main as cli
from purifyloader.commands.main import execute
from purifyloader.datasets.named import ImageFiles, TarDataset
from purifyloader.energy import EnergyConfig, EnergyNetwork, image_energies
from purifyloader.errors import CheckpointError, InputError, PurifyError
from purifyloader.purifiers import EnergyAbove
from tests import processes
from tests.conftest import random_images, tiny_denoiser, tiny_energy
from tests.evaluation.test_evaluation import Listed, clean_sample, folder_of, sample, sha256_of

ROOT = Path(__file__).parents[2]
CLEAN = "tests.evaluation.test_evaluation:clean_sample"
POISONED = "tests.evaluation.test_evaluation:poisoned_sample"


def main(arguments: list[str]) -> int:
    """The command; errors of the user's are raised."""
    return execute(["audit", "energy", *arguments])


class Brightness(EnergyNetwork):
    """The mean of an image: what it gives is known."""

    def forward(self, x_BCHW):
        return x_BCHW.mean(dim=(1, 2, 3))


def brightness(channels: int = 3) -> EnergyNetwork:
    return Brightness(EnergyConfig(channels=4, image_channels=channels)).eval().requires_grad_(False)


def energies(values, indices=None, labels=None, names=None) -> DatasetEnergies:
    """Such a dataset's, with U = `values`."""
    values = np.asarray(values, np.float64)
    count = len(values)
    return DatasetEnergies(
        list(range(count)) if indices is None else list(indices),
        torch.from_numpy(1e-4 * values).double(),
        [None] * count if labels is None else labels,
        [None] * count if names is None else names,
        {(3, 8, 8): count},
        [str(value).encode() for value in values],
    )


def normal(count: int, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    return mean + np.random.default_rng(seed).standard_normal(count)


# -- reading -----------------------------------------------------------------------------------------


def grey(size: tuple[int, int], level: int) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def test_images_of_many_sizes_keep_their_order_and_their_own_energies():
    network = tiny_energy()
    sizes = [(8, 8), (9, 12), (8, 8), (5, 7), (9, 12), (8, 8), (12, 9)] * 6
    images = [
        Image.fromarray(random_images(1, 16, i)[0].permute(1, 2, 0).numpy()).resize(s) for i, s in enumerate(sizes)
    ]
    found = dataset_energies(network, Listed(images))
    assert found.indices == list(range(42))
    assert found.shapes == {(3, 8, 8): 18, (3, 12, 9): 12, (3, 7, 5): 6, (3, 9, 12): 6}
    for index in (0, 1, 3, 40):
        x = torch.from_numpy(np.array(images[index])).permute(2, 0, 1)[None] / 255
        assert torch.equal(image_energies(network, x), found.energies[index : index + 1])
    # alone, in another order or subset: the same bits
    some = [41, 3, 7, 0]
    assert torch.equal(dataset_energies(network, Listed(images), some).energies, found.energies[some])
    known = dataset_energies(brightness(), Listed([grey((6, 4), 10 * i) for i in range(20)]))
    torch.testing.assert_close(known.energies, torch.arange(20) / 25.5)


def test_little_is_held_whatever_the_sizes(monkeypatch):
    from purifyloader.audit import energies as module

    images = [Image.fromarray(random_images(1, 8 + i % 7, i)[0].permute(1, 2, 0).numpy()) for i in range(30)]
    want = dataset_energies(tiny_energy(), Listed(images))
    monkeypatch.setattr(module, "_HELD", 3 * 14 * 14 * 2)
    got = dataset_energies(tiny_energy(), Listed(images), size=None)
    assert torch.equal(got.energies, want.energies)
    one = dataset_energies(tiny_energy(), Listed(images), size=8)
    assert one.shapes == {(3, 8, 8): 30}


def test_names_are_those_on_the_disk(tmp_path):
    for place in ("a/x/0.png", "a/y.png", "b/2.png"):
        (tmp_path / "images" / place).parent.mkdir(parents=True, exist_ok=True)
        grey((8, 8), 100).save(tmp_path / "images" / place)
    found = dataset_energies(brightness(), ImageFiles(tmp_path / "images"))
    assert (found.names, found.labels) == (["a/x/0.png", "a/y.png", "b/2.png"], [None] * 3)
    classes = ImageFolder(str(tmp_path / "images"))
    found = dataset_energies(brightness(), Subset(classes, [2, 0]))
    assert (found.names, found.labels) == (["b/2.png", "a/y.png"], [1, 0])
    picture_bytes = io.BytesIO()
    grey((8, 8), 3).save(picture_bytes, "png")
    for name in ("one", "two"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for member, content in (("k1.png", picture_bytes.getvalue()), ("k1.cls", b"7")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    found = dataset_energies(brightness(), TarDataset([tmp_path / "one.tar"]))
    assert (found.names, found.labels) == (["k1"], [7])
    found = dataset_energies(brightness(), TarDataset([tmp_path / "one.tar", tmp_path / "two.tar"]))
    assert found.names == ["one.tar:k1", "two.tar:k1"]
    assert dataset_energies(brightness(), clean_sample(), [1, 3]).names == [None, None]


def test_grey_images_and_grey_models():
    images = [Image.new("L", (8, 8), 51 * i) for i in range(4)]
    assert dataset_energies(brightness(1), Listed(images)).shapes == {(1, 8, 8): 4}
    colour = dataset_energies(brightness(3), Listed(images))
    torch.testing.assert_close(colour.energies, torch.arange(4) / 5)
    with pytest.raises(InputError, match=r"the data, index 0: .*1 channel"):
        dataset_energies(brightness(1), Listed([grey((8, 8), 1)]))


def broken(value: float = float("inf")) -> EnergyNetwork:
    class Broken(Brightness):
        def forward(self, x_BCHW):
            found = super().forward(x_BCHW)
            return torch.where(found > 0.9, value, found)

    return Broken(EnergyConfig(channels=4)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("network", "dataset", "indices", "message"),
    [
        (brightness, [], None, "Expected images in the data. Got none"),
        (brightness, [grey((8, 8), 1)], [1], "the data has 1 images. Got the index 1"),
        (tiny_energy, [grey((8, 8), 1), grey((8, 2), 1)], None, r"the data, index 1: .*at least 4"),
        (brightness, [grey((8, 8), 1), "text"], None, "the data, index 1: An image is"),
        (tiny_denoiser, [grey((8, 8), 1)], None, "takes an energy model.*Got NetworkDenoiser"),
        (
            broken,
            [grey((8, 8), 1)] * 5 + [grey((8, 8), 255)],
            None,
            "the data, index 5: Energies must be finite. Got inf",
        ),
    ],
)
def test_what_cannot_be_read_is_named(network, dataset, indices, message):
    with pytest.raises(PurifyError, match=message):
        dataset_energies(network(), Listed(dataset), indices)


# -- numbers -----------------------------------------------------------------------------------------


def test_a_hundredth_of_clean_images_is_above_the_threshold_whatever_the_distribution():
    assert threshold(np.arange(1.0, 100)) == 99
    assert threshold(np.arange(1.0, 200)) == pytest.approx(198)
    assert (expected_share(99), expected_share(1000), expected_share(3)) == (0.01, 0.01, 0.25)
    above = []
    for seed in range(3000):
        values = np.random.default_rng(seed).exponential(size=101) ** 3
        above.append(values[-1] > threshold(values[:-1]))
    assert np.mean(above) == pytest.approx(0.01, abs=0.006)


def test_shares_percentiles_and_auc_are_those_of_scipy():
    data, clean = normal(300, 0.4, 1).round(1), normal(150, 0, 2).round(1)  # with ties
    found = audit_energy(energies(data), energies(clean))["comparison"]
    u = stats.mannwhitneyu(data, clean).statistic
    assert found["auc"] == pytest.approx(u / (300 * 150), rel=1e-5)
    limit = np.quantile(clean, 0.99, method="weibull")
    assert found["threshold"] == pytest.approx(limit)
    count = int((data > limit).sum())
    assert found["above"] == {"count": count, "share": pytest.approx(count / 300, rel=1e-5), "expected": 0.01}
    lowest = np.quantile(clean, 0.01, method="weibull")
    assert found["below"]["count"] == (data < lowest).sum()
    want = [stats.percentileofscore(clean, value, kind="mean") for value in data]
    np.testing.assert_allclose(percentiles(data, clean), want)
    assert found["same_images"] == sum(value in clean for value in data)
    assert audit_energy(energies(data))["comparison"] is None


def test_the_truth_is_counted_among_those_flagged():
    values = normal(500, 0, 3)
    poisoned = sorted(np.random.default_rng(4).choice(500, 60, replace=False).tolist())
    values[poisoned] += 1.5
    found = audit_energy(energies(values), poisoned=poisoned, top=[2, 12, 100])["truth"]
    clean = np.delete(values, poisoned)
    assert found["auc"] == pytest.approx(stats.mannwhitneyu(values[poisoned], clean).statistic / (60 * 440), rel=1e-5)
    order = sorted(range(500), key=lambda i: -values[i])
    for row, count in zip(found["top"], (10, 60, 500), strict=True):
        hits = len(set(order[:count]) & set(poisoned))
        assert (row["flagged"], row["poisoned"]) == (count, hits)
        assert row["of_flagged"] == pytest.approx(hits / count, rel=1e-5)
        assert row["of_poisoned"] == pytest.approx(hits / 60, rel=1e-5)
    # by index of the dataset, not by place among those audited
    some = audit_energy(energies([5.0, 1.0, 2.0], indices=[9, 4, 7]), poisoned=[4, 900], top=[34])["truth"]
    assert (some["poisoned"], some["auc"], some["top"][0]["poisoned"]) == (1, 0.0, 0)
    assert audit_energy(energies([5.0]), poisoned=[0])["truth"]["auc"] is None


def test_halves_of_the_reference_say_how_much_clean_images_vary():
    found = halves(normal(1000), 400)
    assert (found["images"], found["against"]) == (400, 500)
    assert found["share_above"]["mean"] == pytest.approx(0.01, abs=0.003)
    assert found["share_above"]["low"] < 0.01 < found["share_above"]["high"] < 0.04
    assert found["auc"]["low"] < 0.5 < found["auc"]["high"]
    # two standard deviations of Mann and Whitney's U
    spread = np.sqrt((400 + 500 + 1) / (12 * 400 * 500))
    assert found["auc"]["high"] - 0.5 == pytest.approx(2 * spread, rel=0.35)
    assert halves(normal(1000), 400) == found != halves(normal(1000), 400, seed=1)
    assert halves(normal(1000), 9999)["images"] == 500
    assert halves(normal(3), 1) is not None
    assert halves(normal(1), 5) is None


def test_the_histogram_counts_every_image_and_says_which_lie_beyond():
    data = np.concatenate([normal(400), [1e9, -1e9, 1e9]])
    found = audit_energy(energies(data), energies(normal(100, 0, 5)), poisoned=[0, 400])["histogram"]
    assert [sum(found[name]) for name in ("data", "reference", "poisoned")] == [403, 100, 2]
    assert found["beyond"] == {"data": [1, 2], "poisoned": [0, 1], "reference": [0, 0]}
    assert found["edges"][-1] < 100
    same = audit_energy(energies([2.0, 2.0]))["histogram"]
    assert sum(same["data"]) == 2


def test_the_threshold_is_that_of_the_condition():
    """In the network's own unit, and exact enough that it holds for the very images that are counted."""
    network, images = tiny_energy(), random_images(300)
    found = [dataset_energies(network, Listed(part.permute(0, 2, 3, 1).numpy())) for part in images.split([120, 180])]
    comparison = audit_energy(*found, temperature=0.37)["comparison"]
    assert comparison["threshold_energy"] == pytest.approx(0.37 * comparison["threshold"], rel=1e-5)
    holds = EnergyAbove(network, comparison["threshold_energy"]).holds(images[:120] / 255)
    assert int(holds.sum()) == comparison["above"]["count"] > 0


def test_energies_of_other_sizes_do_not_compare():
    data, reference = energies(normal(500, -1, 1)), energies(normal(600, 0, 9))
    larger = dataclasses.replace(data, shapes={(3, 64, 48): 500})
    text = " ".join(in_words(audit_energy(larger, reference)))
    assert "Caution: the data has 48 × 64 px, the reference 8 × 8 px. Energies of different sizes do not" in text
    assert "another kind" not in text
    mixed = dataclasses.replace(data, shapes={(3, 8, 8): 499, (3, 9, 8): 1})
    assert "the data has 2 sizes" in " ".join(in_words(audit_energy(mixed, reference)))
    assert "Caution" not in " ".join(in_words(audit_energy(data, reference)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (normal(500, 0, 1), "cannot be told from the reference, which does not prove it clean"),
        (normal(500, 0.35, 1), "as a whole differs"),
        (np.concatenate([normal(450, 0, 1), normal(50, 6, 2)]), "some of the data is unlike the reference"),
        (normal(500, -1, 1), "another kind than the reference: smoother"),
    ],
)
def test_words_say_what_the_numbers_are(data, words):
    results = audit_energy(energies(data), energies(normal(600, 0, 9)))
    text = " ".join(in_words(results))
    assert words in text
    assert f"{results['comparison']['above']['count']} of 500 images" in text
    assert "No reference" in " ".join(in_words(audit_energy(energies(data))))


def test_the_list_is_ranked_with_names_and_percentiles():
    names = ["a.png", "b,c.png", None, "d\udcff.png"]
    data = energies([1.0, 3.0, 2.0, 3.0], [5, 6, 7, 8], [0, None, 2, 3], names)
    rows = list(csv.DictReader(io.StringIO(ranked_csv(data, energies([0.0, 2.0, 2.5]), poisoned=[8]))))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["index"] for row in rows] == ["6", "8", "7", "5"]
    assert [row["name"] for row in rows] == ["b,c.png", "d\\udcff.png", "", "a.png"]
    assert [row["label"] for row in rows] == ["", "3", "2", "0"]
    assert [float(row["energy"]) for row in rows] == pytest.approx([3, 3, 2, 1])
    assert [float(row["percentile"]) for row in rows] == pytest.approx([100, 100, 50, 33.3333])
    assert [row["poisoned"] for row in rows] == ["0", "1", "0", "0"]
    assert ranked_csv(data).splitlines()[0] == "rank,index,name,label,energy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": energies([])}, "energies of the data, one or more. Got none"),
        ({"reference": energies([])}, "energies of the reference, one or more"),
        ({"data": energies([1, np.nan], [3, 8])}, "must be finite. Got nan at index 8"),
        ({"poisoned": [7]}, "indices of images that were audited"),
        ({"poisoned": []}, "one or more. Got 0"),
        ({"top": [1, 101]}, "at most 100. Got 101"),
        ({"temperature": 0}, "temperature must be a finite number above 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(InputError, match=message):
        audit_energy(**{"data": energies([1.0, 2.0]), "reference": energies([0.0]), **change})


def test_energies_are_shown_as_fine_as_they_spread():
    assert [number(-1234.567, spread) for spread in (1500, 50, 0.5)] == ["-1,235", "-1,234.6", "-1,234.567"]
    assert number(1.5, None) == "1.5000"


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path) -> Path:
    pretrained.save(tiny_energy(), tmp_path / "model", name="tiny", details={"image_hashes": ""})  # learned from none
    return tmp_path / "model"


def run(model: Path, *more: str, data: str = CLEAN) -> int:
    return main(["--data", data, "--energy", str(model), "--device", "cpu", *more])


def read(folder: Path) -> dict:
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))


def test_the_command_as_a_process_on_real_images(model, tmp_path):
    images, _ = sample(30)
    data = folder_of(tmp_path / "images", [*images[:20], np.full((32, 32, 3), 128, np.uint8)])
    reference = folder_of(tmp_path / "clean", images[20:])
    (tmp_path / "poisoned.json").write_text("[20, 3]")
    out = tmp_path / "out"
    options = ["--data", data, "--clean", reference, "--energy", str(model), "--device", "cpu", "--out", str(out)]
    done = processes.run("purifyloader", "audit", "energy", *options, "--truth", str(tmp_path / "poisoned.json"))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["audit.csv", "audit.json", "audit.png"]
    results = read(out)
    assert (results["data"]["count"], results["reference"]["count"]) == (21, 10)
    assert results["data"]["description"] == "an image folder"
    assert str(tmp_path) not in (out / "audit.json").read_text()
    rows = list(csv.DictReader((out / "audit.csv").read_text().splitlines()))
    want = dataset_energies(tiny_energy(), ImageFiles(Path(data)))
    order = sorted(range(21), key=lambda i: -float(want.energies[i]))
    assert [row["name"] for row in rows] == [f"{i:03}.png" for i in order]
    np.testing.assert_allclose([float(r["energy"]) for r in rows], 1e4 * want.energies[order].double(), rtol=1e-6)
    assert {row["index"] for row in rows if row["poisoned"] == "1"} == {"3", "20"}
    truth = results["truth"]
    assert (truth["poisoned"], len(truth["top"])) == (2, 4)
    taken = f"as a threshold of EnergyAbove, which takes E: {results['comparison']['threshold_energy']:.9g}"
    for text in (
        "A high energy says",
        "Energies are U = E / 0.0001",
        "halves of the reference",
        f"{order[0]:03}.png",
        taken,
    ):
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-3])) <= 120
    with Image.open(out / "audit.png") as drawn:
        drawn.load()


def test_files_are_the_same_again_and_not_overwritten_unasked(model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    more = ("--clean", POISONED, "--clean-count", "12", "--count", "9", "--out", str(out))
    assert run(model, *more) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(InputError, match=r"Got .* with audit.json, audit.csv, audit.png: give another one"):
        run(model, *more)
    capsys.readouterr()
    assert run(model, *more, "--overwrite", "--json") == 0
    printed = capsys.readouterr()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert printed.out.encode() == before["audit.json"]
    assert "picture: " in printed.err
    monkeypatch.setattr("purifyloader.results.folder.has_matplotlib", lambda: False)  # it was drawn twice
    assert run(model, "--count", "9", "--out", str(out), "--overwrite", "--quiet") == 0
    assert read(out)["reference"] is read(out)["comparison"] is read(out)["truth"] is None
    assert "No reference was given" in capsys.readouterr().out


def test_without_matplotlib_the_numbers_are_written_all_the_same(model, tmp_path, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(model, "--count", "3", "--out", str(tmp_path / "out")) == 0
    assert "pip install 'purifyloader[plots]'" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["audit.csv", "audit.json"]
    with pytest.raises(PurifyError, match="needs matplotlib"):
        picture(read(tmp_path / "out"), tmp_path / "a.png")


@pytest.mark.parametrize("bad", [{}, {"format": "purifyloader-energy-audit", "version": 2}, [], None])
def test_a_picture_of_something_else_is_refused(bad, tmp_path):
    with pytest.raises(InputError, match="Expected results of audit_energy"):
        picture(bad, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def empty():
    return Listed([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "tests.audit.test_audit:empty"], "^data must have images. Got an empty dataset"),
        (["--clean", "tests.audit.test_audit:empty"], "^clean must have images. Got an empty dataset"),
        (["--count", "41"], "^count must be from 1 to 40"),
        (["--clean", POISONED, "--clean-count", "41"], "^clean_count must be from 1 to 40"),
        (["--truth", "{tmp}/far.json"], "^poisoned must be indices of the 40 images in the data. Got 40"),
        (["--truth", "{tmp}/none.json"], "must be a JSON list of one or more indices"),
        (["--truth", "{tmp}/near.json", "--indices", "{tmp}/other.json"], "indices of images that were audited"),
        (["--top", "0"], "^top must be percentages above 0"),
        (["--size", "0"], "size"),
        (["--size", "99999"], "at most 4096 pixels. Got 99999"),
        (["--overwrite"], "^overwrite is about files in the output folder"),
        (["--device", "abacus"], "Expected a device"),
        (["--data", "nothing at all"], "There is no dataset 'nothing at all'"),
    ],
)
def test_bad_options_are_named_and_write_nothing(options, message, model, tmp_path):
    for name, text in (("far", "[40]"), ("none", "[]"), ("near", "[1]"), ("other", "[2, 3]")):
        (tmp_path / f"{name}.json").write_text(text)
    options = [option.format(tmp=tmp_path) for option in options]
    out = [] if "--overwrite" in options else ["--out", str(tmp_path / "out")]
    with pytest.raises(PurifyError, match=message):
        run(model, *out, *options)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_none_is_named(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="must be a shipped name"):
        run(tmp_path / "nothing")
    pretrained.save(tiny_denoiser(), tmp_path / "denoiser")
    assert cli.main(["audit", "energy", "--data", CLEAN, "--energy", str(tmp_path / "denoiser")]) == 2
    assert "must hold an energy model. Got a denoiser" in capsys.readouterr().err


def trained_on(folder: Path, indices: list[int], dataset) -> Path:
    details = {"indices": indices, "data": CLEAN, "data_length": len(dataset), "resized": None}
    details["images_sha256"] = sha256_of(dataset, indices)
    pretrained.save(tiny_energy(), folder, details=details)
    return folder


def test_images_trained_on_stay_in_the_list_and_out_of_the_reference(tmp_path, capsys):
    model = trained_on(tmp_path / "m", list(range(10, 40)), clean_sample())
    assert run(model, "--clean", CLEAN, "--json") == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert (results["data"]["count"], results["data"]["trained_on"]) == (40, 30)
    assert (results["reference"]["count"], results["reference"]["trained_on_left_out"]) == (10, 30)
    assert results["comparison"]["same_images"] == 10
    assert "left out 30 of the 40 images in the reference" in printed.err
    assert "was trained on 30 of the 40 images in the data" in printed.err
    assert run(model, "--clean", CLEAN) == 0
    assert "10 images of the data are in the reference too" in capsys.readouterr().out
    # copies under another index are left out by content
    images, _ = sample(8)
    data = folder_of(tmp_path / "a", [*images, images[1], images[7]])
    copies = trained_on(tmp_path / "n", [0, 1, 2], ImageFiles(Path(data)))
    assert run(copies, "--clean", data, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["reference"]["count"] == 6
    assert "left out 4 of the 10" in printed.err
    with pytest.raises(InputError, match=r"The reference: .* was trained on all"):
        run(trained_on(tmp_path / "all", list(range(40)), clean_sample()), "--clean", CLEAN)


def test_many_sizes_are_warned_of(model, tmp_path, capsys):
    (tmp_path / "d").mkdir()
    for i in range(9):
        grey((8 + i, 8), 9 * i).save(tmp_path / "d" / f"{i}.png")
    assert run(model, data=str(tmp_path / "d")) == 0
    assert "images of 9 sizes" in capsys.readouterr().err
    assert run(model, "--size", "8", data=str(tmp_path / "d")) == 0
    assert capsys.readouterr().err == ""


def test_other_sizes_than_the_reference_has_are_warned_of(model, tmp_path, capsys):
    images, _ = sample(12)
    data = folder_of(tmp_path / "d", images[:6].repeat(2, 1).repeat(2, 2))
    reference = folder_of(tmp_path / "r", images[6:])
    assert run(model, "--clean", reference, data=data) == 0
    printed = capsys.readouterr()
    assert "in the data have 64 × 64 px, the clean ones 32 × 32 px. Energies of different sizes do not" in printed.err
    assert "give a size" in printed.err
    assert "Caution: the data has 64 × 64 px" in " ".join(printed.out.split())
    assert run(model, "--clean", reference, "--size", "32", data=data) == 0
    printed = capsys.readouterr()
    assert "sizes" not in printed.err + printed.out


# -- what is known to be poisoned --------------------------------------------------------------------


def test_files_known_to_be_poisoned_may_be_named(model, tmp_path, capsys):
    images, _ = sample(6)
    (tmp_path / "d").mkdir()
    folder_of(tmp_path / "d" / "a b", images)
    truth = tmp_path / "truth"
    found = []
    for text in ("[1, 4]", '["a b/004.png", "a b/001.png"]', "a b/001.png\r\n\na b/004.png\n"):
        truth.write_text(text, newline="")
        assert run(model, "--truth", str(truth), "--json", data=str(tmp_path / "d")) == 0
        found.append(json.loads(capsys.readouterr().out)["truth"])
    assert found[0] == found[1] == found[2]
    assert found[0]["poisoned"] == 2
    # the same files by class
    assert run(model, "--truth", str(truth), "--root", str(tmp_path / "d"), "--json", data="imagefolder") == 0
    assert json.loads(capsys.readouterr().out)["truth"] == found[0]


@pytest.mark.parametrize(
    ("text", "data", "message"),
    [
        ("0.png\nb.png\nc.png", None, r"such as '000.png'. Got '0.png', which is none of them, and 2 more\."),
        ('["000.png", "x"]', None, r"Got 'x', which is none of them\."),
        ("000.png\n000.png", None, "each image once. Got '000.png' more than once"),
        ('["000.png"]', CLEAN, "where the data is a folder of images. Got '000.png', .* list of indices"),
        ("[1, 1, 2]", None, "each index once. Got 1 more than once \\(3 entries for 2 indices\\): leave the copies"),
        ("[]", None, "Got an empty list"),
        ('[1, "000.png"]', None, "Got '000.png' in it"),
        ("[2, -3]", None, "Got -3 in it"),
        ("7", None, r"Got 7\."),
        ("[2, 3", None, "Got: Expecting"),
    ],
)
def test_a_bad_truth_says_what_it_is(text, data, message, model, tmp_path):
    folder = folder_of(tmp_path / "d", sample(3)[0])
    (tmp_path / "truth").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        run(model, "--truth", str(tmp_path / "truth"), data=data or folder)
    assert "--replicate" not in str(error.value)
