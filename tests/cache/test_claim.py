"""The claim: a folder is one cache's from before its first shard on, whoever comes, with and without locks."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from purifyloader.cache import CacheReader, CacheWriter, Layout
from purifyloader.cache import format as fmt
from purifyloader.cache.inspect import describe, read_folder, verify
from purifyloader.errors import CacheError
from purifyloader.files import locks

CONFIG: dict[str, Any] = {"purifier": {"kind": "jpeg", "quality": 30}, "seed": 0}
LAYOUT = Layout(7, 3)
MADE = {"device": "cpu", "torch": "2"}
# all that two processes may differ in
OTHERS: dict[str, dict[str, Any]] = {
    "quality": {"config": {"purifier": {"kind": "jpeg", "quality": 31}, "seed": 0}},
    "seed": {"config": {**CONFIG, "seed": 1}},
    "length": {"layout": replace(LAYOUT, length=8)},
    "shard size": {"layout": replace(LAYOUT, shard_size=2)},
    "draws": {"layout": replace(LAYOUT, draws=2)},
    "encoding": {"layout": replace(LAYOUT, encoding="png")},
    "device": {"made": {"device": "cuda"}},
}


def writer_of(folder: Path, config: Any = CONFIG, layout: Layout = LAYOUT, made: Any = MADE) -> CacheWriter:
    return CacheWriter(folder, config, layout, made)


def write(writer: CacheWriter, number: int, value: int = 0, source: Any = None) -> None:
    shard = writer.shards[number]
    images = np.full((writer.layout.draws * shard.count, 4, 4, 3), value, np.uint8)
    writer.write(shard, images, source=None if source is None else np.full((shard.count, 2), source, np.uint64))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refused)


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_two_that_differ_at_once(tmp_path: Path, other: dict[str, Any]) -> None:
    """Both saw an empty folder. One of them writes in the end, and the other one is told what differs."""
    first, second = writer_of(tmp_path), writer_of(tmp_path, **other)
    first.claim()
    before = contents(tmp_path)
    calls: list[Callable[[], object]] = [
        second.claim,
        lambda: write(second, 0),
        lambda: second.write_plan({"conditions": []}),
        lambda: writer_of(tmp_path, **other).claim(),
    ]
    for call in calls:
        with pytest.raises(CacheError, match=r"claim\.json was made (with another|on 'cpu')"):
            call()
    assert contents(tmp_path) == before
    for number in range(3):
        write(first, number)
    first.finish()
    CacheReader(tmp_path).verify()


@pytest.mark.parametrize("without", [[], ["no_locks"], ["no_links"]], ids=str)
def test_many_at_once_with_one_winner(tmp_path: Path, request: pytest.FixtureRequest, without: list[str]) -> None:
    for name in without:
        request.getfixturevalue(name)
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        writers = [writer_of(folder, {"seed": seed}) for seed in range(4) for _ in range(2)]
        start = threading.Barrier(len(writers))

        def claimed(writer: CacheWriter, start: threading.Barrier = start) -> int | None:
            start.wait()
            try:
                writer.claim()
            except CacheError:
                return None
            return writer.config["seed"]

        with ThreadPoolExecutor(len(writers)) as pool:
            won = [seed for seed in pool.map(claimed, writers) if seed is not None]
        assert len(won) == 2
        assert won[0] == won[1] == fmt.read_claim(folder).config["seed"]


def test_a_folder_of_before_is_claimed_by_whoever_has_its_configuration(tmp_path: Path) -> None:
    first = writer_of(tmp_path)
    write(first, 1)
    (tmp_path / "claim.json").unlink()
    made = {**MADE, "torch": "3"}
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors was made with another"):
        writer_of(tmp_path, OTHERS["seed"]["config"])
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors was made on 'cpu'"):
        writer_of(tmp_path, made=OTHERS["device"]["made"]).claim()
    assert not (tmp_path / "claim.json").exists()
    writer_of(tmp_path, made=made).claim()
    assert fmt.read_claim(tmp_path).made == MADE, "which the first shard was made with"


def test_a_finished_cache_of_before_needs_none(tmp_path: Path) -> None:
    first = writer_of(tmp_path)
    for number in range(3):
        write(first, number)
    first.finish()
    (tmp_path / "claim.json").unlink()
    before = contents(tmp_path)
    writer_of(tmp_path).finish()
    assert contents(tmp_path) == before
    CacheReader(tmp_path).verify()
    assert verify(read_folder(tmp_path)).is_whole


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "edited": lambda path: path.write_text(path.read_text().replace('"seed":0', '"seed":1')),
    "no JSON": lambda path: path.write_bytes(b"\xff\xfe"),
    "white space": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "a list": lambda path: path.write_text("[]"),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_claim(
    tmp_path: Path, request: pytest.FixtureRequest, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    """It is made again by whoever has the configuration of the shards, but not where no lock keeps two from it."""
    write(writer_of(tmp_path), 0)
    before = contents(tmp_path)
    damage(tmp_path / "claim.json")
    with pytest.raises(CacheError, match="was made with another"):
        write(writer_of(tmp_path, OTHERS["seed"]["config"]), 1)
    write(writer_of(tmp_path), 0)
    assert contents(tmp_path) == before
    damage(tmp_path / "claim.json")
    request.getfixturevalue("no_locks")
    request.getfixturevalue("monkeypatch").setattr("purifyloader.cache.writer._IN_CREATION", 0.01)
    with pytest.raises(CacheError, match=r"claim\.json says[\s\S]*Delete it while no process"):
        write(writer_of(tmp_path), 1)


def test_a_claim_of_another_version_is_refused(tmp_path: Path) -> None:
    write(writer_of(tmp_path), 0)
    values = {**fmt.guarded({"format": fmt.FORMAT, "version": 99}), "config": {}}
    (tmp_path / "claim.json").write_text(fmt.canonical_json(values))
    before = contents(tmp_path)
    for call in (lambda: writer_of(tmp_path), lambda: read_folder(tmp_path) and writer_of(tmp_path)):
        with pytest.raises(CacheError, match="Got version 99"):
            call()
    assert contents(tmp_path) == before


def test_what_it_tells_people(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    writer.claim()
    values = describe(tmp_path)
    assert (values["state"], values["images"], values["shards_done"]) == ("unfinished", 7, 0)
    assert values["strangers"] == []
    for number in range(3):
        write(writer, number)
    writer.finish()
    assert describe(tmp_path)["state"] == "finished"
    (tmp_path / "claim.json").write_text("{}")
    checked = verify(read_folder(tmp_path))
    assert not checked.is_whole
    assert "claim.json: damaged" in "\n".join(checked.in_words(0))
    other = writer_of(tmp_path.parent / "other", OTHERS["seed"]["config"])
    other.claim()
    (other.folder / "claim.json").rename(tmp_path / "claim.json")
    assert "of another" in "\n".join(verify(read_folder(tmp_path)).in_words(0))
    with pytest.raises(CacheError, match=r"claim\.json was made with another"):
        writer_of(tmp_path)


def test_a_shard_that_appears_meanwhile_is_never_replaced_by_one_of_another_source(tmp_path: Path) -> None:
    first, second = writer_of(tmp_path), writer_of(tmp_path)
    write(first, 0, 1, source=1)
    write(second, 0, 1, source=1)
    before = contents(tmp_path)
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors, which another[\s\S]*sort what it lists"):
        write(second, 0, 2, source=2)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("file", ["index.json", "plan.json"])
def test_an_index_and_a_plan_of_another_cache_are_never_replaced(tmp_path: Path, file: str) -> None:
    other = writer_of(tmp_path / "other", OTHERS["seed"]["config"])
    other.write_plan({"conditions": []})
    for number in range(3):
        write(other, number)
    other.finish()
    writer = writer_of(tmp_path / "own")
    for number in range(3):
        write(writer, number)
    (tmp_path / "other" / file).rename(tmp_path / "own" / file)
    before = contents(tmp_path / "own")
    calls = [lambda: write(writer, 0, 5), writer.finish, lambda: writer.write_plan({"conditions": []})]
    for call in calls[:2] if file == "index.json" else calls[2:]:
        with pytest.raises(CacheError, match=rf"{file[:-5]}\.json was made with another"):
            call()
    assert contents(tmp_path / "own") == before


def test_a_claim_is_given_up_where_nothing_was_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer, other = writer_of(tmp_path), writer_of(tmp_path, OTHERS["seed"]["config"])
    writer.claim()
    other.give_up()
    assert set(contents(tmp_path)) == {"claim.json"}, "it is not this one's"
    with writer.lock(writer.shards[0]):
        writer.give_up()
    assert (tmp_path / "claim.json").exists(), "somebody is at work"
    writer.give_up()
    assert not (tmp_path / "claim.json").exists()
    other.claim()
    with pytest.raises(CacheError, match=r"claim\.json was made with another"):
        write(writer, 0)
    write(other, 0)
    other.give_up()
    assert set(contents(tmp_path)) >= {"claim.json", "shard-00000.safetensors"}
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]
