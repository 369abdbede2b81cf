"""Poisons of which a part is missing: refused or said, never taken for a poison of the whole set in silence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from purifyloader.bench.defences import ROWS_FILE
from purifyloader.bench.report import markdown
from purifyloader.commands.main import main
from purifyloader.errors import InputError
from purifyloader.evaluation.report import few_changed
from purifyloader.poisons import Poisoned, make, read, write
from purifyloader.poisons.spec import parse
from tests.bench.test_defences import row
from tests.conftest import random_images
from tests.poisons.test_reading import (
    CLEAN,
    DELTA,
    IMAGES,
    LABELS,
    LEVELS,
    POISONED,
    N,
    chw,
    dump,
    npz,
    ntga,
    pils,
    raw,
    save,
)

ALL = [*range(N)]
BUT_17 = [i for i in ALL if i != 17]


def flat(path: Path, indices: Sequence[int] = ALL, name: Callable[[int], str] = "{}.png".format) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for index in indices:
        Image.fromarray(POISONED[index]).save(path / name(index))
    return path


def classes(path: Path, indices: Sequence[int] = ALL, names: Sequence[str] = "0123") -> Path:
    for label, name in enumerate(names):
        flat(path / name, [index for index in indices if LABELS[index] == label])
    return path


def written(path: Path, layout: str = "flat") -> Path:
    write(Poisoned.of(POISONED, LABELS, "made up"), path / "p", layout)
    return path / "p"


def gone(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).unlink()
    return path


def touched(path: Path, *names: str) -> Path:
    for name in names:
        Image.fromarray(POISONED[0]).save(path / name)
    return path


def cut_table(path: Path) -> Path:
    lines = (path / "labels.csv").read_text().splitlines()
    (path / "labels.csv").write_text("\n".join(lines[:-1]) + "\n")
    return gone(path, f"{N - 1}.png")


def cut_npz(path: Path) -> Path:
    write(Poisoned.of(POISONED, LABELS, "made up"), path / "p.npz")
    arrays = dict(np.load(path / "p.npz"))
    cut = {"data": POISONED[:-1], "targets": LABELS[:-1], "poisoned": np.arange(N - 1)}
    np.savez(path / "p.npz", **{**arrays, **cut})
    return path / "p.npz"


def broken(path: Path) -> Path:
    path.write_bytes(b"\x89PNG\r\n\x1a\nno")
    return path.parent


def puregen(path: Path, indices: list[int]) -> Path:
    return dump(([(image, 3) for image in pils(POISONED[[1, 2]])], indices, 3), path / "p.pth")


def array(value: np.ndarray, path: Path) -> Path:
    np.save(path / "p.npy", value)
    return path / "p.npy"


WHOLE = "all 40 images of clean=, or say how many it poisons"
WITHOUT_CLASS_2 = [i for i in ALL if LABELS[i] != 2]
BEYOND = "distinct images of the 40 of clean=. Got"

Case = tuple[Callable[[Path], Path], str]

MISSING: dict[str, Case] = {
    "one of <index>.png": (lambda p: flat(p, BUT_17), rf"{WHOLE}. Got 39: 1 are missing, the first 17, .* count=39"),
    "of data/<index>.png": (lambda p: flat(p / "data", BUT_17).parent, f"{WHOLE}. Got 39"),
    "of class folders": (lambda p: classes(p, BUT_17), f"{WHOLE}. Got 39: 1 are missing, the first 17"),
    "most": (lambda p: flat(p, ALL[::3]), r"Got 14: 26 are missing, the first 1, 2, 4, 5, 7,"),
    "cut off by number": (lambda p: flat(p, ALL[:4]), "Got 4: 36 are missing, the first 4, 5"),
    "cut off by name": (lambda p: flat(p, [0, 1, 10, 11]), "Got 4: 36 are missing, the first 2, 3"),
    "a class folder": (lambda p: classes(p, WITHOUT_CLASS_2), "Got 30: 10 are missing, the first 2, 6"),
    "a named class folder": (lambda p: classes(p, WITHOUT_CLASS_2, "abcd"), "none in c: remove"),
    "one of what we wrote": (lambda p: gone(written(p), "17.png"), "of its labels.csv. Got 1 missing, the first 17"),
    "two of what we wrote": (
        lambda p: gone(written(p, "class"), "1/17.png", "0/04.png"),
        "Got 2 missing, the first 0/04.png, 1/17.png: write it anew",
    ),
    "rows of our table": (lambda p: cut_table(written(p)), "39 of 40 images: it is damaged"),
    "rows of our arrays": (cut_npz, "39 of 40 images: it is damaged"),
    "more than we wrote": (
        lambda p: touched(written(p), "99.png"),
        "but those of its labels.csv. Got 1 more, the first 99",
    ),
    "two formats": (lambda p: touched(flat(p), "12.jpg"), r"as .png. Got 1 others, the first 12.jpg beside a .png"),
    "another format": (lambda p: touched(flat(p, BUT_17), "17.bmp"), r"as .png. Got 1 others, the first 17.bmp:"),
    "leading zeros": (lambda p: touched(flat(p), "012.png"), r"Got 012.png and 12.png, two of one number"),
    "one number in two classes": (lambda p: touched(classes(p), "1/0.png"), r"0.png and 0.png, two of one number in 1"),
    "at two depths": (lambda p: flat(classes(p), [0]), "and not both. Got 3/7.png and 0.png"),
    "too deep": (lambda p: flat(p / "a" / "b").parents[1], "a folder with a, which is none of them"),
    "too deep beside others": (lambda p: flat(flat(p) / "a" / "b").parents[1], "and not both. Got 9.png and a/b/9.png"),
    "beyond the data": (lambda p: touched(flat(p), "40.png"), r"Got 40.png"),
    "beyond the data, by class": (lambda p: touched(classes(p), "1/41.png"), f"{BEYOND} 0 to 41"),
    "unreadable": (lambda p: touched(flat(p, BUT_17)) and broken(p / "17.png"), r"17.png is no readable image"),
    "rows of EM": (lambda p: save(DELTA[:-1], p / "p.pt"), "one perturbation an image"),
    "rows of REM": (lambda p: dump(chw(LEVELS[:-1].astype("i1")), p / "p.pkl"), "each of the 40 images .* Got 39"),
    "rows of perturbations": (lambda p: array((LEVELS[:-1] / 255).astype("f4"), p), r"a row for each image"),
    "rows of images": (lambda p: array(POISONED[:-1], p), r"a row for each image"),
    "rows of an npz": (
        lambda p: npz(POISONED[:-1], p, LABELS[:-1]),
        r"\(39, 8, 8, 3\) in the file and \(40, 8, 8, 3\)",
    ),
    "one twice of Witches' Brew": (lambda p: save((DELTA[:2], [3, 3]), p / "p.pth"), "2 ids, some twice"),
    "beyond Witches' Brew": (lambda p: save((DELTA[:2], [3, N]), p / "p.pth"), "up to 40"),
    "one twice of PureGen's": (lambda p: puregen(p, [5, 5]), f"{BEYOND} repeated ones"),
    "beyond PureGen's": (lambda p: puregen(p, [5, 40]), f"{BEYOND} 5 to 40"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_poison_with_images_missing_is_refused(case: str, tmp_path: Path) -> None:
    make_it, message = MISSING[case]
    path = make_it(tmp_path)
    units = {"units": "unit"} if case == "rows of perturbations" else {}
    with pytest.raises(InputError, match=message) as caught:
        read(path, clean=CLEAN, **units)
    assert str(tmp_path) in str(caught.value)


def test_class_folders_with_a_gap_are_refused_without_the_clean_set_too(tmp_path: Path) -> None:
    """Every image behind the gap would be taken for another one."""
    classes(tmp_path, BUT_17)
    with pytest.raises(InputError, match=r"every image from 0.png to 39.png. Got 39: 1 are missing, the first 17"):
        read(tmp_path)


DESIGNED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], int]] = {
    "a few, scattered": (lambda p: flat(p, [2, 5, 10, 39]), {}, 4),
    "as many as count says": (lambda p: flat(p, BUT_17), {"count": 39}, 39),
    "cut off, if count says so": (lambda p: flat(p, ALL[:4]), {"count": 4}, 4),
    "class folders": (lambda p: classes(p, [3, 7, 39]), {}, 3),
    "Narcissus": (
        lambda p: array(np.tile(np.float32([0.1, -0.1]), (1, 3, 8, 4)), p),
        {"target_class": 2, "count": 3},
        3,
    ),
    "Witches' Brew": (lambda p: save((DELTA[[4, 9]], [4, 9]), p / "p.pth"), {"checked": False}, 2),
    "PureGen's": (lambda p: puregen(p, [1, 2]), {}, 2),
    "what we wrote": (lambda p: few_written(p), {}, 5),
    "all of it": (flat, {"count": 40}, 40),
}


def few_written(path: Path) -> Path:
    images = IMAGES.copy()
    images[:5] = POISONED[:5]
    write(Poisoned.of(images, LABELS, "made up", [*range(5)]), path / "p")
    return path / "p"


@pytest.mark.parametrize("case", DESIGNED)
def test_a_share_by_design_needs_nothing_and_is_logged_without_alarm(case, tmp_path, caplog) -> None:
    make_it, options, count = DESIGNED[case]
    path = make_it(tmp_path)
    with caplog.at_level(logging.INFO, logger="purifyloader"):
        found = read(path, clean=CLEAN, **options)
    assert (len(found.poisoned), found.settings["moved"]["images"]) == (count, count)
    said = f"poisons {count} of the 40 images ({100 * count / 40:.3g} %); the others are as in the clean set"
    assert (said in caplog.text) == (count < N)
    alarmed = "scattered" in case or case == "class folders"  # nothing but their number says that it is by design
    assert [record.levelname for record in caplog.records] == ["WARNING" if alarmed else "INFO"] * (count < N)


@pytest.mark.parametrize(
    "make_it",
    [flat, classes, written, lambda p: npz(POISONED, p), lambda p: save(DELTA, p / "p.pt"), lambda p: raw(POISONED, p)],
)
def test_another_count_than_there_is_is_refused(make_it, tmp_path) -> None:
    with pytest.raises(InputError, match=r"must hold 39 poisoned images, as count= says. Got 40: give the right one"):
        read(make_it(tmp_path), clean=CLEAN, count=39)


HALF = IMAGES.copy()
HALF[::2] = POISONED[::2]
ROWS = (LEVELS / 255).astype("f4")
ROWS[[3, 4]] = 0

UNMOVED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "npz": (lambda p: npz(HALF, p), {}, "poisons 20 of the 40 images (50 %)"),
    "raw bytes": (lambda p: raw(HALF, p), {}, "poisons 20 of the 40 images (50 %)"),
    "NTGA": (lambda p: ntga(HALF, p), {}, "poisons 20 of the 40 images (50 %)"),
    "images": (lambda p: array(HALF, p), {}, "poisons 20 of the 40 images (50 %)"),
    "<index>.png": (lambda p: touched(flat(p)) and clean_again(p), {}, "poisons 38 of the 40 images (95 %)"),
    "perturbations": (lambda p: array(ROWS, p), {"units": "unit"}, "moves 38 of the 40 images that it poisons"),
    "EM": (lambda p: save(DELTA * (DELTA.new_tensor(ROWS.any(axis=(1, 2, 3)))[:, None, None, None]), p / "p.pt"), {},
           "moves 38 of the 40 images that it poisons"),
}  # fmt: skip


def clean_again(path: Path) -> Path:
    for index in (3, 4):
        Image.fromarray(IMAGES[index]).save(path / f"{index}.png")
    return path


@pytest.mark.parametrize("case", UNMOVED)
def test_images_left_as_they_are_are_warned_of(case, tmp_path, caplog) -> None:
    make_it, options, words = UNMOVED[case]
    found = read(make_it(tmp_path), clean=CLEAN, **options)
    assert words in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert found.settings["moved"]["images"] < N


def test_other_files_of_a_folder_are_counted(tmp_path, caplog) -> None:
    flat(tmp_path)
    for name in ("README.md", "log.txt", "old.txt", ".DS_Store"):
        (tmp_path / name).touch()
    assert len(read(tmp_path, clean=CLEAN).poisoned) == N
    assert "3 files below" in caplog.text
    assert "(2 .txt, 1 .md; the first is README.md): the images of a poison are, .png" in caplog.text


# -- where people read it ----------------------------------------------------------------------------


def test_the_table_of_a_bench_says_how_many_images_are_changed() -> None:
    def moved(attack: str, images: int, seed: int = 0) -> dict[str, Any]:
        return row(attack, "none", 50.0, seed=seed, attack_moves={"images": images})

    few = moved("few", 9), moved("few", 12, 1)
    text = markdown([moved("none", 0), moved("lsp", 4000), moved("p", 3920) | {"wrong_labels": 40}, *few])
    said = (
        "Not all of the 4,000 training images are changed, and the rest are clean: 9 to 12 by few, 3,920 by p (40 with "
        "a wrong label)."
    )
    assert said in text
    assert "Not all" not in markdown([moved("none", 0), moved("lsp", 4000)])


def test_tables_of_evaluate_dynamics_and_tune_say_how_many_images_are_changed() -> None:
    assert [*few_changed({"all": 6, "p": 5}, 6)] == [
        "p has changed 5 of the 6 images, and these alone are measured as poisoned."
    ]


MEASURING = {
    "evaluate": ["denoiser", "evaluate", "cifar10-sparse", "--sigma-px", "25", "--data", "{clean}"],
    "dynamics": ["dynamics", "--model", "cifar10-sparse", "--sigma-px", "25", "--data", "{clean}"],
    "tune": ["tune", "--model", "cifar10-sparse", "--sigma-px", "25", "--clean", "{clean}"],
}


@pytest.mark.parametrize("command", MEASURING)
def test_commands_refuse_a_part_and_say_what_is_not_changed(command, tmp_path, capsys) -> None:
    images = random_images(6, 16).permute(0, 2, 3, 1).numpy()
    folders = {"clean": images, "poisoned": make("urp", (images, np.arange(6) % 2)).images.copy()}
    folders["poisoned"][2] = images[2]
    for name, values in folders.items():
        (tmp_path / name).mkdir()
        for index, image in enumerate(values):
            Image.fromarray(image).save(tmp_path / name / f"{index}.png")
    words = [word.format(clean=tmp_path / "clean") for word in MEASURING[command]]
    words += ["--poisoned", str(tmp_path / "poisoned"), "--device", "cpu"]
    assert main(words) == 0
    assert "poisoned has changed 5 of the 6 images" in capsys.readouterr().out
    gone(tmp_path / "poisoned", "3.png")
    assert main(words) == 2
    assert "by the same names" in (said := capsys.readouterr().err)
    assert "1 missing, the first 3" in said
    touched(tmp_path / "poisoned", "9.png")  # as many as before
    assert main(words) == 2
    assert "1 missing, the first 3 and 1 more, the first 9" in capsys.readouterr().err


def test_the_bench_refuses_a_part_before_anything_is_trained(tmp_path, capsys) -> None:
    images = random_images(24, 8).permute(0, 2, 3, 1).numpy()
    for split, some in (("train", images[:20]), ("test", images[20:])):
        for index, image in enumerate(some):
            (tmp_path / "set" / split / str(index % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "set" / split / str(index % 2) / f"{index:02}.png")
    train = np.concatenate([images[:20:2], images[1:20:2]])  # as its folders have them
    poisoned = make("urp", (train, np.arange(20) // 10)).images
    (tmp_path / "p").mkdir()
    for index, image in enumerate(poisoned[:-1]):
        Image.fromarray(image).save(tmp_path / "p" / f"{index}.png")
    words = ["bench", "--data", "imagefolder", "--root", str(tmp_path / "set"), "--defence", "jpeg-10"]
    words += ["--attack", str(tmp_path / "p"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(words) == 2
    assert "Got 19: 1 are missing, the first 19, and would stay clean" in capsys.readouterr().err
    assert parse(f"{tmp_path / 'p'}:count=19").options == {"count": 19}  # that it is meant, on a command line
    assert not (tmp_path / "out" / ROWS_FILE).exists()
