"""Locks: one holder, who says who it is; a wait that notices a release, and names a holder that does not move."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tqdm.auto import tqdm

from purifyloader.commands.processes import exit_status
from purifyloader.errors import CacheError
from purifyloader.files import locks
from purifyloader.files.locks import Holder, Lock, is_held, lock_path, read_note
from purifyloader.files.locks import holder as holder_of
from tests import processes

pytestmark = pytest.mark.skipif(locks.fcntl is None, reason="no locks here")


def held(folder: Path, steps: int = 0) -> None:
    """In a process of its own: hold the lock, with a step of progress every fifth of a second, then stand still."""
    lock = Lock(folder, "work")
    lock.acquire(wait=True)
    print("held", flush=True)
    for step in range(1, 10_000):
        time.sleep(0.2)
        if step <= steps:
            lock.note(step)


@pytest.fixture
def holder(tmp_path: Path) -> processes.Child:
    child = processes.start(held, tmp_path)
    child.wait_for("held")
    yield child
    child.kill()


def waiting(folder: Path, taken: list[float]) -> threading.Thread:
    def wait() -> None:
        with Lock(folder, "work"):
            taken.append(time.monotonic())

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def named(caplog: pytest.LogCaptureFixture, seconds: float = 10) -> list[str]:
    """The warnings, as soon as there is one."""
    until = time.monotonic() + seconds
    while not caplog.messages and time.monotonic() < until:
        time.sleep(0.02)
    return list(caplog.messages)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_holder_that_does_not_move_is_named(
    tmp_path: Path,
    holder: processes.Child,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stopped: bool,
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", (0.3, 1.0))
    if stopped:
        holder.send_signal(signal.SIGSTOP)
    taken: list[float] = []
    thread = waiting(tmp_path, taken)
    (message, *_) = named(caplog)
    assert str(lock_path(tmp_path, "work")) in message
    assert f"process {holder.pid} on {os.uname().nodename}, which is {'stopped' if stopped else 'running'}." in message
    assert (f"kill -CONT {holder.pid}" in message) == stopped
    assert caplog.records[0].levelno == logging.WARNING
    assert not taken
    killed = time.monotonic()
    holder.kill()
    thread.join(5)
    assert taken
    assert taken[0] - killed < 1, "a holder that dies is followed at once"


def test_a_holder_at_work_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", (0.5, 1.0))
    child = processes.start(held, tmp_path, 7)
    child.wait_for("held")
    begun = time.monotonic()
    waiting(tmp_path, [])
    assert named(caplog), "it stands still in the end"
    assert time.monotonic() - begun > 1.5
    child.kill()


def test_it_is_named_again_but_not_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", (0.1, 0.4))
    with Lock(tmp_path, "work"):  # a lock is of an open file, not of a process
        thread = waiting(tmp_path, [])
        time.sleep(1.5)
    thread.join(5)
    assert 2 <= len(caplog.messages) <= 5  # after 0.1, 0.4, 0.8, 1.2 seconds
    assert f"process {os.getpid()} on" in caplog.messages[0]


def test_a_release_is_noticed_at_once_and_a_wait_is_cheap(tmp_path: Path) -> None:
    lock = Lock(tmp_path, "work")
    lock.acquire(wait=True)
    taken: list[float] = []
    before = time.process_time()
    threads = [waiting(tmp_path, taken) for _ in range(2)]
    time.sleep(1)
    assert time.process_time() - before < 0.2
    released = time.monotonic()
    lock.release()
    for thread in threads:
        thread.join(5)
    assert len(taken) == 2
    assert taken[0] - released < 0.2


def test_a_lock_that_is_tidied_away_while_another_waits(tmp_path: Path) -> None:
    lock = Lock(tmp_path, "work")
    lock.acquire(wait=True)
    taken: list[float] = []
    thread = waiting(tmp_path, taken)
    time.sleep(0.05)
    lock_path(tmp_path, "work").unlink()
    lock.release()
    thread.join(5)
    assert taken
    assert lock_path(tmp_path, "work").exists()


@pytest.mark.parametrize("name", ["index.json", "shard-00000.safetensors", "00001", "rows.jsonl"])
def test_a_hard_link_in_the_place_of_a_lock_is_not_written_to(tmp_path: Path, name: str) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    inside.mkdir()
    outside.write_text("precious")
    os.link(outside, lock_path(inside, name))
    for wait in (True, False):
        with pytest.raises(CacheError, match=rf"{name}\.lock is a hard link.*remove this one"):
            Lock(inside, name, traceless=True).acquire(wait)
    assert outside.read_text() == lock_path(inside, name).read_text() == "precious"
    lock_path(inside, name).unlink()
    assert Lock(inside, name).acquire(wait=False)


def test_the_file_says_how_far_it_is_and_who_has_it(tmp_path: Path) -> None:
    path = lock_path(tmp_path, "work")
    with Lock(tmp_path, "work") as lock:
        assert read_note(path) == 0
        lock.note(123)
        assert read_note(path) == 123
        assert holder_of(path) == Holder.here()
        assert is_held(path)
        assert not Lock(tmp_path, "work").acquire(wait=False)
    assert not is_held(path)


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (b"", 0),
        (b"17          ", 17),
        (b"17", 17),
        (b"x", 0),
        (b"\xff\xfe", 0),
        (b"17          \n", 17),
        (b"5\n[1]", 5),
    ],
)
def test_files_of_before_and_damaged_ones(tmp_path: Path, content: bytes, note: int) -> None:
    path = lock_path(tmp_path, "work")
    path.write_bytes(content)
    assert read_note(path) == note
    assert holder_of(path) is None
    assert Lock(tmp_path, "work").acquire(wait=False)


HERE = Holder.here()


@pytest.mark.parametrize(
    ("holder", "words"),
    [
        (replace(HERE, host="elsewhere"), f"process {HERE.pid} on elsewhere. It goes on when"),
        (replace(HERE, started="1"), "which is not seen here"),
        (replace(HERE, pid=2**30), "which is not seen here"),
        (replace(HERE, started=None), f"process {HERE.pid} on {HERE.host}. It goes on when"),
        (HERE, "which is running"),
    ],
    ids=["elsewhere", "of another time", "no process", "without /proc", "here"],
)
def test_holders_in_words(tmp_path: Path, holder: Holder, words: str) -> None:
    lock_path(tmp_path, "work").write_text(f"{0:<12}\n{json.dumps(asdict(holder))}\n")
    found = holder_of(lock_path(tmp_path, "work"))
    assert found == holder
    assert words in found.in_words()


def test_a_command_shows_it_above_its_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", (0.1, 0.4))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of the tests
    lock = Lock(tmp_path, "work")
    lock.acquire(wait=True)
    threading.Timer(0.5, lock.release).start()

    def work() -> None:
        with tqdm(total=3, file=sys.stderr, desc="purifying"), Lock(tmp_path, "work"):
            pass

    assert exit_status(work) == 0
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any(line.startswith(f"Waiting for {lock_path(tmp_path, 'work')}") for line in lines), lines


def computing(folder: Path) -> None:
    """In a process of its own: hold the lock and compute, without a note."""
    with Lock(folder, "work"):
        print("held", flush=True)
        while True:
            sum(range(10_000))


def test_a_holder_that_computes_is_given_more_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", (0.2, 1.0))
    child = processes.start(computing, tmp_path)
    child.wait_for("held")
    begun = time.monotonic()
    waiting(tmp_path, [])
    assert "which is running" in named(caplog)[0]
    assert time.monotonic() - begun > 1
    child.kill()
