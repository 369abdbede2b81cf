"""Names of somebody else's in messages: they do nothing to a terminal, and look like no line of ours."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from purifyloader import poisons, pretrained
from purifyloader.cache import CacheReader
from purifyloader.commands.processes import exit_status
from purifyloader.datasets.named import TarDataset, open_dataset, read_image
from purifyloader.datasets.select import read_indices
from purifyloader.errors import CacheError, InputError, PurifyError

EVIL = "\x1b]0;owned\x07\x1b[2J\nerror: all fine\r\x7f\x9b\u202egnp\u2028"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J"
SEEN = (SHOWN, SHOWN.replace("\\", "\\\\"))  # a repr has the backslashes twice where it is shown by repr again


def _tar(folder: Path) -> Any:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo(f"{EVIL}.png"), io.BytesIO())
    return TarDataset([folder / "a.tar"])


def _class_folder(folder: Path) -> Any:
    (folder / EVIL).mkdir()
    return open_dataset("imagefolder", folder)


def _image(folder: Path) -> Any:
    (folder / f"{EVIL}.png").touch()
    return read_image(folder / f"{EVIL}.png")


def _table(folder: Path) -> Any:
    poisons.write(poisons.Poisoned.of(np.zeros((1, 4, 4, 3), np.uint8), [0], "x"), folder / "own")
    (folder / "own/labels.csv").write_text(f'file,label,poisoned\n"{EVIL}.png",0,0\n', newline="")
    return poisons.read(folder / "own")


def _json_key(folder: Path) -> Any:
    (folder / "a.json").write_text(json.dumps({EVIL: 1}))
    return read_indices(folder / "a.json")


RAISERS: dict[str, Callable[[Path], Any]] = {
    "a member of a tar": _tar,
    "a class folder": _class_folder,
    "an image": _image,
    "a row of a table": _table,
    "a key of JSON": _json_key,
    "a cache": lambda folder: CacheReader(folder / EVIL),
    "a model": lambda folder: pretrained.load(folder / EVIL),
    "a data set": lambda folder: open_dataset(EVIL),
}


@pytest.mark.parametrize("place", RAISERS)
def test_names_do_nothing_to_a_terminal(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((PurifyError, FileNotFoundError)) as caught:
        RAISERS[place](tmp_path)
    text = str(caught.value)
    assert any(words in text for words in SEEN), text
    (tmp_path / "again").mkdir()
    assert exit_status(lambda: RAISERS[place](tmp_path / "again")) == 2
    for shown in (text, capsys.readouterr().err.removesuffix("\n")):
        assert "".join(shown.split("\n")).isprintable()
        assert "\nerror" not in shown


def test_what_the_library_writes_stays() -> None:
    error = InputError("Got one that differs:\n  a: 1\n  b: é 猫 👩‍🚒\nGive another.")
    assert error.message == "Got one that differs:\n  a: 1\n  b: é 猫 👩‍🚒\n  Give another."
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (InputError, str(error))
    assert str(InputError(error.message)) == error.message
    assert str(CacheError("caf\udce9")) == "caf\\udce9"
