"""Processes that meet in one folder with other results: each folder and file holds those of one of them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed

from purifyloader import precompute, pretrained, recipes
from purifyloader.cache.tars import export_tars, import_tars
from purifyloader.certify.votes import VoteFolder
from purifyloader.energy import EnergyConfig, EnergyNetwork
from purifyloader.errors import CacheError, CheckpointError, ConfigError, InputError, PurifyError, TrainingError
from purifyloader.files import locks
from purifyloader.files.atomic import creating, write_new
from purifyloader.files.locks import Lock
from purifyloader.poisons import Poisoned, write_npz
from purifyloader.poisons.writing import write_images
from purifyloader.results.folder import write_files
from purifyloader.train.ranks import Ranks
from purifyloader.train.state import load_state, save_state
from tests import processes
from tests.conftest import PictureDataset, random_images


@pytest.fixture(params=["locks", "no locks", "no hard links", "neither"])
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """File systems of all kinds."""

    def refused(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    if request.param in ("no locks", "neither"):
        monkeypatch.setattr(locks.fcntl, "flock", refused)
    if request.param in ("no hard links", "neither"):
        monkeypatch.setattr(os, "link", refused)
    return str(request.param)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Call all at the same moment; what each returned, or its error of the library's."""
    start = threading.Barrier(len(calls))

    def one(call: Callable[[], Any]) -> Any:
        start.wait()
        try:
            return call()
        except PurifyError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def test_one_of_many_creates_a_file(tmp_path: Path, sharing: str) -> None:
    for attempt in range(20):
        path = tmp_path / str(attempt)
        won = together(*(lambda n=n, path=path: write_new(path, f"{n}" * 1000) for n in range(4)))
        assert won.count(True) == 1
        assert path.read_text() == f"{won.index(True)}" * 1000
    assert len(list(tmp_path.iterdir())) == 20
    with pytest.raises(FileExistsError), creating(path) as temporary:
        temporary.write_text("other")
    with creating(tmp_path / "private", private=True) as temporary:
        temporary.write_text("secret")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match="no"), creating(tmp_path / "failed"):
        raise ValueError("no")
    assert not (tmp_path / "failed").exists()


def test_votes_of_other_settings_that_begin_at_once(tmp_path: Path, sharing: str) -> None:
    """One of them has the folder and its secret, and the other one is refused."""
    for attempt in range(10):
        folder = tmp_path / str(attempt)

        def votes(sigma: float, folder: Path = folder) -> VoteFolder:
            return VoteFolder(folder, {"sigma": sigma}, models=2, inputs=3, classes=4)

        found = together(*(lambda sigma=sigma, votes=votes: votes(sigma) for sigma in (0.25, 0.25, 0.5, 0.5)))
        good = [each for each in found if isinstance(each, VoteFolder)]
        # without locks and links a reader may come while the file is there and empty, and is refused
        assert 1 <= len(good) <= 2 if sharing == "neither" else len(good) == 2
        assert len({(each.settings["sigma"], each.seed) for each in good}) == 1
        for error in (each for each in found if not isinstance(each, VoteFolder)):
            assert isinstance(error, ConfigError | InputError)
        good[0].write(0, np.zeros(3, np.int64))
        assert all(each.has(0) for each in good)


def test_exports_of_other_caches_into_one_folder(tmp_path: Path) -> None:
    """The second waits, looks again, and is refused; the same export is made once more."""
    readers = [
        precompute(PictureDataset(random_images(5, 8, seed)), recipes.jpeg(10), tmp_path / str(seed), progress=False)
        for seed in range(2)
    ]
    out = tmp_path / "tars"
    found = together(*(lambda reader=reader: export_tars(reader, out, images_per_tar=2) for reader in readers))
    (error,) = (each for each in found if isinstance(each, CacheError))
    winner = readers[1 - found.index(error)]
    assert "one export" in str(error)
    assert import_tars(out, tmp_path / "again").fingerprint == winner.fingerprint
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    together(*(lambda: export_tars(winner, out, images_per_tar=2),) * 2)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("begun", [False, True])
def test_an_export_that_another_has_begun_since(tmp_path: Path, begun: bool) -> None:
    """Without locks, the file that says whose the tars are is what keeps another one out."""
    reader = precompute(PictureDataset(random_images(5, 8)), recipes.jpeg(10), tmp_path / "a", progress=False)
    other = precompute(PictureDataset(random_images(5, 8, 1)), recipes.jpeg(10), tmp_path / "b", progress=False)
    out = tmp_path / "tars"

    def stopped(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_tars(reader, out, seen=stopped)
    assert (out / "unfinished.json").exists()
    if begun:
        with pytest.raises(CacheError, match="one export"):
            export_tars(other, out)
    export_tars(reader, out)
    import_tars(out, tmp_path / "again").verify()


def model(seed: int) -> EnergyNetwork:
    torch.manual_seed(seed)
    return EnergyNetwork(EnergyConfig(channels=4))


def test_models_that_are_saved_into_one_folder(tmp_path: Path, sharing: str) -> None:
    """What loads is one of them, whole, under its own name."""
    with torch.random.fork_rng():
        models = [model(seed) for seed in range(2)]
    kept = [next(iter(each.state_dict().values())).clone() for each in models]
    for attempt in range(6):
        folder = tmp_path / str(attempt)

        def save(n: int, folder: Path = folder) -> None:
            pretrained.save(models[n], folder, name=str(n), overwrite=True)

        together(*(lambda n=n, save=save: save(n) for n in range(2)))
        try:
            loaded = pretrained.load(folder, kind="energy")
        except CheckpointError as error:
            if sharing in ("no locks", "neither") and "a save over it was stopped" in str(error):
                continue
            raise
        assert torch.equal(next(iter(loaded.state_dict().values())), kept[int(loaded.name)])
        assert len(list(folder.iterdir())) == 3


def test_a_model_that_must_not_be_overwritten_and_comes_meanwhile(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        found = together(*(lambda n=n: pretrained.save(model(n), tmp_path / "m", name=str(n)) for n in range(3)))
    assert len([each for each in found if isinstance(each, CheckpointError)]) == 2
    assert pretrained.load(tmp_path / "m", kind="energy").name == str(found.index(None))


def poisoned(label: int) -> Poisoned:
    return Poisoned.of(np.zeros((4, 8, 8, 3), np.uint8), [label, 0, 1, 2], "none", poisoned=[])


@pytest.mark.parametrize("name", ["p.npz", "folder"])
def test_poisons_that_are_written_to_one_place(tmp_path: Path, sharing: str, name: str) -> None:
    out = tmp_path / name
    write = write_npz if name == "p.npz" else write_images
    found = together(*(lambda n=n: write(poisoned(n), out) for n in range(3)))
    assert found.count(None) == 1
    assert all(isinstance(each, PurifyError) for each in found if each is not None)
    if name == "p.npz":
        assert np.load(out)["targets"][0] == found.index(None)
    else:
        assert (out / "labels.csv").read_text().splitlines()[1].split(",")[1] == str(found.index(None))


def test_results_of_one_folder_are_of_one_process(tmp_path: Path) -> None:
    def write(n: int) -> None:
        texts = {f"{name}.txt": str(n) for name in "abcdef"}
        write_files(tmp_path, texts, "picture.png", lambda path: path.write_text(str(n)))

    for _ in range(10):
        assert together(*(lambda n=n: write(n) for n in range(3))) == [None] * 3
        assert len({path.read_text() for path in tmp_path.iterdir()}) == 1
        assert len(list(tmp_path.iterdir())) == 7


def test_a_training_state_of_another_run_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    groups = {"weights": {"a": torch.zeros(2)}}
    own, other = ({"identity": {"config": {"lr": lr}, "images_sha256": "x", "count": 1}} for lr in (1, 2))
    save_state(path, {**own, "step": 1}, groups)
    save_state(path, {**own, "step": 2}, groups)
    with pytest.raises(TrainingError, match=r"by a run with another configuration[\s\S]*another output folder"):
        save_state(path, {**other, "step": 3}, groups)
    assert load_state(path, own["identity"])[0]["step"] == 2
    path.write_bytes(b"damaged")
    save_state(path, {**other, "step": 3}, groups)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def rank_of_two(rank: int, port: int, values: dict[str, Any]) -> str:
    """In a process of its own: join, and compare."""
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        Ranks.here().check_same(values, torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    finally:
        distributed.destroy_process_group()
    return "same"


@pytest.mark.parametrize(("other", "named"), [({}, None), ({"images": "b"}, "images"), ({"lr": 2.0}, "lr")])
def test_ranks_that_do_not_agree(monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], named: str | None) -> None:
    own = {"images": "a", "lr": 1.0}
    ends = []
    for mine, theirs in ((own, {**own, **other}), ({**own, **other}, own)):

        def gather(self: Ranks, rows: Tensor, theirs: dict[str, Any] = theirs) -> Tensor:
            if self.rank:
                return rows
            monkeypatch.setattr(Ranks, "gather", lambda self, own: torch.cat([rows, own]))
            Ranks(1, 2).check_same(theirs, torch.device("cpu"))
            return rows

        monkeypatch.setattr(Ranks, "gather", gather)
        try:
            Ranks(0, 2).check_same(mine, torch.device("cpu"))
            ends.append(None)
        except ConfigError as error:
            ends.append(str(error))
    for end in ends:
        assert (end is None) == (named is None)
        assert end is None or f"Got another {named} in one of 2 processes" in end


def test_two_real_ranks_with_the_images_in_another_order() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [processes.start(rank_of_two, rank, port, {"lr": 1, "images": str(rank)}) for rank in range(2)]
    for child in children:
        done = child.wait()
        assert done.returncode == 0, done.stderr
        assert "Got another images in one of 2 processes" in done.value
        assert "sort what lists the images" in done.value


def test_a_lock_without_a_trace(tmp_path: Path) -> None:
    with Lock(tmp_path, "x", traceless=True):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
