"""Several processes of a command: all of them work, an error is said, and none outlives the command."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from purifyloader.commands.processes import exit_status, run_many
from purifyloader.errors import InputError, PurifyError


def leave_number(folder: Path, number: int) -> None:
    (folder / str(number)).write_text(str(os.getpid()))


def fail_once(folder: Path, number: int) -> None:
    if number == 0:
        raise InputError("Expected one thing. Got another.")
    leave_number(folder, number)


def sleep(folder: Path, number: int) -> None:
    leave_number(folder, number)
    time.sleep(120)


def test_each_works_in_a_process_of_its_own(tmp_path):
    run_many(functools.partial(leave_number, tmp_path), 3)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(found) == ["0", "1", "2"]
    assert len({*found.values(), str(os.getpid())}) == 4


def test_an_error_is_said_and_the_others_go_on(tmp_path, capfd):
    with pytest.raises(PurifyError, match="1 of 2 processes stopped"):
        run_many(functools.partial(fail_once, tmp_path), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert "purifyloader: error: Expected one thing. Got another." in capfd.readouterr().err


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # of a process that nobody waits for, only its number is left
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_no_process_outlives_a_command_that_is_killed(tmp_path):
    script = (
        "import functools, pathlib\n"
        "from purifyloader.commands.processes import run_many\n"
        "from tests.commands.test_processes import sleep\n"
        "if __name__ == '__main__':\n"
        f"    run_many(functools.partial(sleep, pathlib.Path({str(tmp_path)!r})), 2)\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = subprocess.Popen([sys.executable, tmp_path / "script.py"], env=environment)
    try:
        there = [tmp_path / "0", tmp_path / "1"]
        waiting = time.monotonic() + 60
        while not all(path.exists() and path.read_text() for path in there):
            assert time.monotonic() < waiting
            time.sleep(0.05)
        pids = [int(path.read_text()) for path in there]
        assert all(map(running, pids))
    finally:
        command.send_signal(signal.SIGKILL)
        command.wait()
    waiting = time.monotonic() + 30
    while any(map(running, pids)):
        assert time.monotonic() < waiting, "its processes go on"
        time.sleep(0.05)


# -- errors of the system ----------------------------------------------------------------------------


def failing(error: Exception, note: str | None = None) -> int:
    if note:
        error.add_note(note)

    def work() -> int:
        raise error

    return exit_status(work)


NO_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("Truncated File Read"), "OSError: Truncated File Read. It is of item 3. Remove or replace"),
        (PermissionError(13, "Permission denied", "a.tar"), "'a.tar'. It is of item 3."),
        (MemoryError(), "Memory ran out"),
        (RuntimeError(NO_MEMORY), "--batch-size"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), "--batch-size"),
    ],
)
def test_an_error_of_the_system_is_one_line(error, words, capsys):
    assert failing(error, "It is of item 3.") == 2
    said = capsys.readouterr().err
    assert said.startswith("purifyloader: error: ")
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), KeyError("a"), TypeError("not callable")])
def test_a_fault_of_a_program_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        failing(error)
