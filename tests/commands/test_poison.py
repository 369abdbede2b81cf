"""`purifyloader poison` and what it writes: read back, refused, and never half there."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from purifyloader.audit.energies import read_poisoned
from purifyloader.commands.main import main
from purifyloader.datasets.named import open_dataset
from purifyloader.errors import InputError, PurifyError
from purifyloader.poisons import make, read_trigger, write, write_images, write_npz
from purifyloader.poisons.poisoned import Bound, Poisoned, Target
from tests import processes

RNG = np.random.default_rng(1)
COUNT = 33
IMAGES = RNG.integers(0, 256, (COUNT, 9, 8, 3), np.uint8)
LABELS = np.sort(np.arange(COUNT) % 3)  # an imagefolder is sorted by class


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An imagefolder."""
    root = tmp_path_factory.mktemp("clean")
    for index, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        (root / f"class{label}").mkdir(exist_ok=True)
        Image.fromarray(image).save(root / f"class{label}" / f"{index:03d}.png")
    return root


@pytest.fixture
def poison(data, capsys):
    """Run the command; its exit status, and what it printed to standard output and error."""

    def run(*arguments: object, given: bool = True) -> tuple[int, str, str]:
        where = ["--data", "imagefolder", "--root", str(data)] if given else []
        status = main(["poison", *where, *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def images_of(dataset) -> np.ndarray:
    return np.stack([np.asarray(item[0] if isinstance(item, tuple) else item) for item in dataset])


# -- what is written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["urp", "lsp", "ar", "ops", "cuda"])
def test_an_npz_is_read_back_without_pickle(poison, tmp_path, name):
    out = tmp_path / "new" / f"{name}.npz"
    status, printed, _ = poison("--attack", name, "--out", out, "--seed", 3)
    assert status == 0
    want = make(name, (IMAGES, LABELS), 3)
    with np.load(out, allow_pickle=False) as file:
        assert set(file) == {"data", "targets", "poisoned", "poison"}
        assert file["data"].dtype == np.uint8
        assert file["targets"].dtype == file["poisoned"].dtype == np.int64
        np.testing.assert_array_equal(file["data"], want.images)
        np.testing.assert_array_equal(file["targets"], LABELS)
        np.testing.assert_array_equal(file["poisoned"], np.arange(COUNT))
        said = json.loads(str(file["poison"]))
    assert said["attack"] == name
    data = {"description": "imagefolder", "size": None}
    assert said["settings"] == {**json.loads(json.dumps(dict(want.settings))), "data": data}
    assert (said["bound"] is None) == (name == "cuda")
    assert str(tmp_path) not in json.dumps(said)
    assert printed.startswith(f"{out}: 33 of 33 images changed by {name}, by at most ")
    assert len(printed.splitlines()) == 1


def test_the_line_says_how_far_images_moved_against_the_bound(poison, tmp_path):
    printed = {}
    for name in ("urp", "lsp", "ops", "cuda"):
        printed[name] = poison("--attack", name, "--out", tmp_path / f"{name}.npz")[1]
    assert "by at most 8/255 in a value" in printed["urp"]
    assert printed["urp"].endswith("bound: 8/255 in a value.\n")
    norm = 6 / 255 * (3 * 9 * 8) ** 0.5
    assert printed["lsp"].endswith(f"bound: l2 {norm:.3f} before rounding to 8 bits.\n")
    assert printed["ops"].endswith("1 pixels; bound: 1 pixel.\n")
    assert printed["cuda"].endswith("72 pixels; no bound.\n")


def test_the_same_command_gives_the_same_bytes(poison, tmp_path):
    for out in ("a.npz", "b.npz"):
        poison("--attack", "lsp:share=0.5", "--out", tmp_path / out)
    digests = {hashlib.sha256((tmp_path / out).read_bytes()).hexdigest() for out in ("a.npz", "b.npz")}
    assert len(digests) == 1


def test_a_flat_folder_is_read_back_in_order(poison, tmp_path):
    out = tmp_path / "folder"
    out.mkdir()  # an empty one is taken
    status, _, _ = poison("--attack", "lsp:count=7", "--out", out)
    assert status == 0
    want = make("lsp", (IMAGES, LABELS), count=7)
    assert everything(out) == sorted(
        [f"{i:02d}.png" for i in range(COUNT)] + ["labels.csv", "poison.json", "poisoned.json"]
    )
    np.testing.assert_array_equal(images_of(open_dataset(str(out))), want.images)
    with open(out / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{i:02d}.png" for i in range(COUNT)]
    assert [int(row["label"]) for row in rows] == LABELS.tolist()
    assert [i for i, row in enumerate(rows) if row["poisoned"] == "1"] == want.poisoned.tolist()
    assert read_poisoned(out / "poisoned.json", open_dataset(str(out))) == want.poisoned.tolist()
    said = json.loads((out / "poison.json").read_text())
    assert (said["attack"], said["layout"], said["settings"]["count"]) == ("lsp", "flat", 7)
    assert os.stat(out).st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_a_folder_by_class_is_an_image_folder(poison, tmp_path):
    out = tmp_path / "folder"
    assert poison("--attack", "cuda:blur=0.1,unit=centre", "--out", out, "--layout", "class")[0] == 0
    want = make("cuda", (IMAGES, LABELS), blur=0.1, unit="centre")
    dataset = open_dataset("imagefolder", out)
    assert isinstance(dataset, ImageFolder)
    np.testing.assert_array_equal(images_of(dataset), want.images)
    assert dataset.targets == LABELS.tolist()
    assert read_poisoned(out / "poisoned.json", dataset) == list(range(COUNT))


def test_ten_classes_and_more_keep_their_numbers(tmp_path):
    images = RNG.integers(0, 256, (24, 4, 4, 3), np.uint8)
    labels = np.arange(24) % 12
    write_images(Poisoned.of(images, labels, "none", []), tmp_path / "out", "class")
    dataset = ImageFolder(tmp_path / "out")
    assert dataset.targets == sorted(labels.tolist())
    order = [int(Path(path).stem) for path, _ in dataset.samples]
    np.testing.assert_array_equal(images_of(dataset), images[order])
    assert json.loads((tmp_path / "out" / "poisoned.json").read_text()) == []


def test_a_trigger_is_kept(poison, tmp_path):
    trigger = (RNG.choice([-1, 1], (1, 3, 9, 8)) * 32 / 255).astype(np.float32)
    np.save(tmp_path / "trigger.npy", trigger)
    words = ("--attack", f"narcissus:trigger={tmp_path / 'trigger.npy'},target_class=1,share=0.1")
    assert poison(*words, "--out", tmp_path / "out.npz")[0] == 0
    assert poison(*words, "--out", tmp_path / "out")[0] == 0
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        np.testing.assert_allclose(2 * file["trigger"], trigger[0].transpose(1, 2, 0), rtol=1e-6)
        said = json.loads(str(file["poison"]))
        assert set(LABELS[file["poisoned"]]) == {1}
        assert len(file["poisoned"]) == 3
        np.testing.assert_array_equal(images_of(open_dataset(str(tmp_path / "out"))), file["data"])
    assert said["target_class"] == 1
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "trigger.npy"), trigger)
    np.testing.assert_allclose(read_trigger(tmp_path / "out" / "trigger.npy"), trigger[0].transpose(1, 2, 0) / 2)


def test_a_target_and_grey_images_are_kept(tmp_path):
    target = Target(IMAGES[5][..., :1], 2, true_label=0, index=5)
    poisoned = Poisoned.of(IMAGES[..., :1], LABELS, "mine", [1, 4], target=target, bound=Bound("linf", 8 / 255))
    write(poisoned, tmp_path / "out.npz")
    write(poisoned, tmp_path / "out")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["target"], target.image)
        np.testing.assert_array_equal(file["data"], IMAGES[..., :1])
        assert json.loads(str(file["poison"]))["target"] == {"label": 2, "true_label": 0, "index": 5}
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "target.npy"), target.image)
    with Image.open(tmp_path / "out" / "04.png") as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), IMAGES[4, :, :, 0])


def test_grey_data_is_poisoned_in_colour_and_resized(poison, tmp_path):
    for label in range(2):
        (tmp_path / "grey" / str(label)).mkdir(parents=True)
        Image.fromarray(IMAGES[label, :, :, 0]).save(tmp_path / "grey" / str(label) / "a.png")
    words = ("--data", "imagefolder", "--root", tmp_path / "grey", "--size", 6, "--out", tmp_path / "out.npz")
    assert poison("--attack", "urp", *words, given=False)[0] == 0
    with np.load(tmp_path / "out.npz") as file:
        assert file["data"].shape == (2, 6, 6, 3)
        assert json.loads(str(file["poison"]))["settings"]["data"]["size"] == 6


# -- what is printed ---------------------------------------------------------------------------------


def test_the_list_and_the_help(poison, capsys):
    status, printed, _ = poison("--list", given=False)
    assert status == 0
    for line in (
        "urp                availability  one random pattern a class, l-infinity 8/255 (Huang et al. 2021, 2101.04898)",
        " " * 19 + "options       trigger (must be given), target_class (must be given), share, share_of=set, count",
    ):
        assert line in printed.splitlines()
    assert "for testing defences" in printed
    with pytest.raises(SystemExit) as caught:
        main(["poison", "--help"])
    assert caught.value.code == 0
    assert "for testing defences" in capsys.readouterr().out


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attack", "lps"], "An attack is one of urp, lsp"),
        (["--attack", "lsp:patch=3"], "did you mean patches"),
        (["--attack", "lsp:patches"], "Options are OPTION=VALUE, with commas between them. Got 'patches'"),
        (["--attack", "lsp:patches=3,patches=4"], "Each option must be given once"),
        (["--attack", "lsp:seed=4"], "Got 'seed'"),
        (["--attack", "lsp:patches=three"], "patches must be an integer from 1 to the image's 8 pixels"),
        (["--attack", "lsp:preset=cpu"], "Got 'preset'"),
        (["--attack", "lsp", "--device", "cpu"], "Got 'device': leave it out"),
        (["--attack", "lsp:share=2"], "share must be above 0"),
        (["--attack", "lsp:count=34"], "count must be from 1 to the 33 images"),
        (["--attack", "narcissus"], "needs trigger and target_class"),
        (["--attack", "lsp", "--layout", "class"], "--layout is of a folder of images"),
        (["--attack", "lsp", "--seed", str(2**64)], "seed must fit in 64 bits"),
    ],
)
def test_bad_options(poison, tmp_path, arguments, message):
    status, printed, error = poison(*arguments, "--out", tmp_path / "new" / "out.npz")
    assert status == 2
    assert printed == ""
    assert message in error
    assert error.count("\n") == 1
    assert everything(tmp_path) == []


def test_data_without_classes_is_refused(poison, data, tmp_path):
    status, _, error = poison("--attack", "lsp", "--data", str(data), "--out", tmp_path / "out.npz", given=False)
    assert status == 2
    assert "An attack needs a class, from 0, for each image in --data" in error
    status, _, error = poison("--attack", "lsp", "--data", "none", "--out", tmp_path / "out.npz", given=False)
    assert status == 2
    assert "Give cifar10, cifar100" in error


def test_required_options_are_named(poison, capsys):
    status, _, error = poison("--attack", "lsp")
    assert (status, error) == (2, "purifyloader: error: --out must be given, or --list.\n")


def test_nothing_that_exists_is_written_over(poison, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out.npz").write_text("mine")
    for out, message in (
        ("out", "Expected an empty folder. Got"),
        ("file", "Expected a folder, or a file that ends in .npz. Got the file"),
        ("out.npz", "Expected a new file. Got"),
    ):
        status, _, error = poison("--attack", "lsp", "--out", tmp_path / out)
        assert status == 2
        assert message in error
    assert everything(tmp_path) == ["file", "out", "out.npz", "out/mine.txt"]
    assert (tmp_path / "out.npz").read_text() == "mine"


def test_bad_calls_of_the_writers(tmp_path):
    poisoned = Poisoned.of(IMAGES, LABELS, "mine")
    with pytest.raises(InputError, match=r"ends in \.npz"):
        write_npz(poisoned, tmp_path / "out.zip")
    with pytest.raises(InputError, match="layout must be flat or class"):
        write_images(poisoned, tmp_path / "out", "tree")
    with pytest.raises(InputError, match="Got none of class 1"):
        write_images(Poisoned.of(IMAGES, 2 * (LABELS > 0), "mine"), tmp_path / "out", "class")
    with pytest.raises(InputError, match="settings of a poison must be JSON"):
        write_npz(Poisoned.of(IMAGES, LABELS, "mine", settings={"x": IMAGES}), tmp_path / "out.npz")
    (tmp_path / "file").write_text("")
    with pytest.raises(PurifyError, match="Could not write"):
        write(poisoned, tmp_path / "file" / "out.npz")
    assert everything(tmp_path) == ["file"]


# -- nothing half there ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("layout", ["flat", "class"])
def test_an_interrupted_folder_is_not_there(tmp_path, monkeypatch, error, layout):
    saved = []

    def save(image, path):
        if len(saved) == 20:
            raise error
        saved.append(path)
        path.write_bytes(b"")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises((KeyboardInterrupt, PurifyError)):
        write_images(Poisoned.of(IMAGES, LABELS, "mine"), tmp_path / "out", layout)
    assert len(saved) == 20
    assert everything(tmp_path) == []


def test_an_interrupted_file_is_not_there(tmp_path, monkeypatch):
    def savez(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(KeyboardInterrupt):
        write_npz(Poisoned.of(IMAGES, LABELS, "mine"), tmp_path / "out.npz")
    assert everything(tmp_path) == []


def test_a_folder_that_somebody_fills_meanwhile_stays_theirs(tmp_path, monkeypatch):
    out = tmp_path / "out"
    save = Image.Image.save

    def filling(image, path):
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("theirs")
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", filling)
    with pytest.raises(PurifyError, match="Could not write"):
        write_images(Poisoned.of(IMAGES, LABELS, "mine"), out)
    assert everything(tmp_path) == ["out", "out/theirs"]


def write_many(out: Path) -> None:
    """In a child."""
    images = np.zeros((100_000, 4, 4, 3), np.uint8)
    write_images(Poisoned.of(images, np.arange(100_000) % 3, "mine"), out)


def test_a_killed_writer_leaves_no_folder_that_looks_whole(tmp_path):
    child = processes.start(write_many, tmp_path / "out")
    deadline = time.monotonic() + 120
    while len(everything(tmp_path)) < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.kill().returncode == -9
    assert not (tmp_path / "out").exists()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".out.")
    write_images(Poisoned.of(IMAGES, LABELS, "mine"), tmp_path / "out")  # and does not stand in the way
    assert len(open_dataset(str(tmp_path / "out"))) == COUNT
