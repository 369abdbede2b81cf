"""One grammar of attacks and poison files, and the images that they give some images of a dataset."""

from __future__ import annotations

import re

import numpy as np
import pytest

from purifyloader.datasets.arrays import Part
from purifyloader.errors import ConfigError, InputError, PurifyError
from purifyloader.poisons import ATTACKS, autoregressive, lsp, make, read, write
from purifyloader.poisons.part import poison_part
from purifyloader.poisons.spec import AttackSpec, is_spec, parse

RNG = np.random.default_rng(0)
S, N = 8, 40
IMAGES = RNG.integers(40, 216, (N, S, S, 3)).astype(np.uint8)
LABELS = np.arange(N) % 10
SOME = np.array([3, 8, 17, 18, 20, 31])


def part(positions=SOME) -> Part:
    return Part(IMAGES[positions], LABELS[positions], positions, 10, N)


def whole():
    return IMAGES, LABELS


def poisoned(text: str, positions=SOME, seed: int = 0) -> np.ndarray:
    return poison_part(parse(text), part(positions), whole, seed).images


# -- the grammar -------------------------------------------------------------------------------------


def test_options_are_json_or_text(tmp_path):
    assert parse("lsp") == AttackSpec("lsp", {}, None, "lsp")
    assert parse("lsp:norm=2,patches=8") == AttackSpec("lsp", {"norm": 2, "patches": 8}, None, "lsp norm=2 patches=8")
    assert parse("none") == AttackSpec("none")
    assert parse("em", "full").options == {"preset": "full"}
    assert parse("em:preset=cpu", "full").options == {"preset": "cpu"}
    assert parse("lsp", "full").options == {}
    found = parse("narcissus:trigger=a.npy,target_class=2")
    assert found.options == {"trigger": "a.npy", "target_class": 2}
    assert found.label == "narcissus target_class=2"


def test_files_take_the_options_of_read(tmp_path):
    for name in ("p.npz", "a:b.npz", "c:d=e.npz"):
        path = tmp_path / name
        path.write_bytes(b"")
        assert parse(str(path)) == AttackSpec(path.stem, {}, path, path.stem)
        found = parse(f'{path}:bound=linf:8/255,mean=[0.5, 0.4],target="x,y.png",checked=false')
        assert found.file == path
        assert found.options == {"bound": "linf:8/255", "mean": [0.5, 0.4], "target": "x,y.png", "checked": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "An attack is none, urp, .*, or a poison file. Got 'nothing'"),
        ("none:x=1", "none takes no options"),
        ("lsp:norm", "Options are OPTION=VALUE.* Got 'norm' in 'lsp:norm'"),
        ("lsp:=2", "Got '=2'"),
        ("lsp:norm=1,norm=2", "Got 'norm' twice"),
        ("lsp:nrom=1", "did you mean norm"),
        ("{file}:colour=1", "A poison file takes format, bound.* Got 'colour'"),
        ("{none}", "rename it"),
    ],
)
def test_bad_specs_are_named(text, message, tmp_path):
    for name in ("p.npz", "none.npz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        parse(text.format(file=tmp_path / "p.npz", none=tmp_path / "none.npz"))


def test_datasets_are_told_from_poisons(tmp_path):
    write(make("lsp", (IMAGES, LABELS)), tmp_path / "made")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "x.tar").write_bytes(b"")
    assert all(is_spec(text) for text in ("lsp", "lsp:norm=2", "none", str(tmp_path / "made"), "missing.npy"))
    assert not any(is_spec(text) for text in ("cifar10", "package.module:function", str(tmp_path / "pictures")))
    assert not is_spec(str(tmp_path / "x.tar"))


# -- some images of a dataset ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["urp", "lsp", "ar", "cuda"])
def test_a_part_is_poisoned_as_it_would_be_among_all(name):
    want = make(name, (IMAGES, LABELS), 0).images[SOME]
    np.testing.assert_array_equal(poisoned(name), want)
    np.testing.assert_array_equal(poisoned(name, SOME[::-1]), want[::-1])


def test_functions_on_arrays_take_positions():
    for function, options in ((lsp, {"norm": 2}), (autoregressive, {"norm": 2})):
        want = function(IMAGES, LABELS, **options)[SOME]
        np.testing.assert_array_equal(function(IMAGES[SOME], LABELS[SOME], positions=SOME, **options), want)
    assert (poisoned("lsp:norm=2") != poisoned("lsp")).any()


def test_more_classes_than_ten_repeat_the_patterns():
    many = Part(IMAGES, np.arange(N), np.arange(N), N, N)
    np.testing.assert_array_equal(poison_part(parse("lsp"), many, whole, 0).images, poisoned("lsp", np.arange(N)))


def test_any_file_that_read_takes_is_taken(tmp_path):
    made = make("lsp", (IMAGES, LABELS), count=20)
    write(made, tmp_path / "p.npz")
    write(made, tmp_path / "folder")
    for name in ("p.npz", "folder"):
        found = poison_part(parse(str(tmp_path / name)), part(), whole, 0)
        np.testing.assert_array_equal(found.images, made.images[SOME])
        assert found.poisoned.tolist() == [i for i, place in enumerate(SOME) if place in made.poisoned]
    write(make("lsp", (IMAGES[:9], LABELS[:9])), tmp_path / "short.npz")
    with pytest.raises(InputError, match="clean images must be uint8"):
        poison_part(parse(str(tmp_path / "short.npz")), part(), whole, 0)


# -- arrays with a row for each image ----------------------------------------------------------------


def test_a_trigger_is_the_same_in_any_units(tmp_path):
    trigger = RNG.choice([-16, 16], (3, S, S)).astype(np.float32)
    want = np.clip(IMAGES[SOME].astype(int) + trigger.transpose(1, 2, 0).astype(int), 0, 255)
    every = np.clip(IMAGES.astype(int) + trigger.transpose(1, 2, 0).astype(int), 0, 255).astype(np.uint8)
    for i, (array, units) in enumerate(
        [
            (trigger[None] / 127.5, ":units=minus-one-to-one"),
            (trigger / 127.5, ":units=minus-one-to-one"),
            (trigger[None] / 127.5, ""),  # as Narcissus is published
            (trigger[None].transpose(0, 2, 3, 1) / 255, ":units=unit"),
            (trigger[None].astype(np.int8), ":units=bytes"),
            (np.repeat(trigger[None], N, 0), ":units=bytes"),
            (np.repeat(trigger[None] / 255, N, 0), ""),
            (every, ""),
            (every.transpose(0, 3, 1, 2), ""),
        ]
    ):
        np.save(tmp_path / f"{i}.npy", array)
        np.testing.assert_array_equal(poisoned(f"{tmp_path / f'{i}.npy'}{units}"), want, err_msg=str(i))


def test_rows_go_by_the_index_of_the_dataset(tmp_path):
    delta = RNG.integers(-9, 10, (N, S, S, 3)).astype(np.int16)
    np.save(tmp_path / "rows.npy", delta)
    got = poisoned(f"{tmp_path / 'rows.npy'}:units=bytes", np.array([31, 3, 20, 8, 1, 17]))
    np.testing.assert_array_equal(got, IMAGES[[31, 3, 20, 8, 1, 17]] + delta[[31, 3, 20, 8, 1, 17]])
    same = read(tmp_path / "rows.npy", clean=(IMAGES, LABELS), units="bytes")
    np.testing.assert_array_equal(same.images, IMAGES + delta)
    assert same.settings["units"] == "bytes"


@pytest.mark.parametrize(
    ("array", "units", "message"),
    [
        (np.full((1, S, S, 3), 0.125), "", r"do not tell.*minus-one-to-one \(15.9 px\), unit \(31.9 px\)"),
        (np.full((1, 3, S, S), 0.5), "", r"do not tell for which range"),
        (np.zeros((1, 3, 9, 9)), ":units=unit", r"shape \(1, 8, 8, 3\) or \(1, 3, 8, 8\).* Got \(1, 3, 9, 9\)"),
        (np.zeros((5, 3, S, S)), ":units=bytes", r"\(40, 3, 8, 8\), a row for each.* Got \(5, 3, 8, 8\)"),
        (np.full((1, 3, S, S), 3.0), ":units=minus-one-to-one", "at most 255 px. Got values up to 3"),
        (np.full((1, 3, S, S), np.nan), ":units=unit", "must hold finite"),
        (np.zeros((N, 3, S, S), np.uint8), ":units=bytes", "signed integers. Got uint8"),
        (np.zeros((N, 3, S, S), np.int64), "", "or say its units. Got int64: give units="),
        (np.zeros((N, 3, S), np.uint8), "", "a row for each image"),
        (np.array(0.5), ":units=unit", "shape"),
        (np.array(["a"]), ":units=unit", "signed integers"),
        (np.full((N, 3, S, S), 9.0), "", "divide those of 0-255 by 255"),
        (IMAGES[::-1], "", "so the order is another"),
        (IMAGES, "", "A poison must move images"),
    ],
)
def test_bad_arrays_are_named(array, units, message, tmp_path):
    np.save(tmp_path / "p.npy", array.astype(np.float32) if array.dtype == np.float64 else array)
    with pytest.raises(PurifyError, match=re.compile(message)):
        poisoned(f"{tmp_path / 'p.npy'}{units}")


def test_a_damaged_array_is_named(tmp_path):
    (tmp_path / "p.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match=r"p.npy must be a whole .npy"):
        poisoned(f"{tmp_path / 'p.npy'}:units=bytes")
    with pytest.raises(InputError, match=r"units must be one of unit"):
        read(tmp_path / "p.npy", units="inches")


def test_every_attack_is_listed_without_torch():
    assert all(isinstance(attack.implementation, str) for attack in ATTACKS.values())
