"""Processes from the server behave as fresh ones: arguments, output, exit status, signals, environment."""

from __future__ import annotations

import os
import signal
import time
import warnings

import pytest

from tests import processes


def multiply(a: int, b: int) -> tuple[int, int, str]:
    print("out", a)
    os.write(2, b"err\n")
    return a * b, os.getpid(), os.environ.get("COLOUR", "")


def fail() -> None:
    raise ValueError("a reason")


def hang() -> None:
    print("begun")
    time.sleep(100)


def warn() -> None:
    warnings.warn("careful", stacklevel=1)


def test_a_function_returns_its_value_and_output():
    done = processes.run(multiply, 6, 7, env={"COLOUR": "red"})
    value, pid, colour = done.value
    assert (value, colour, done.returncode, done.stdout, done.stderr) == (42, "red", 0, "out 6\n", "err\n")
    assert pid != os.getpid()
    assert "COLOUR" not in os.environ


def test_commands_scripts_and_code_have_their_arguments(tmp_path):
    (tmp_path / "script.py").write_text("import sys\nif __name__ == '__main__':\n    sys.exit(int(sys.argv[1]))\n")
    assert processes.run(tmp_path / "script.py", 3).returncode == 3
    assert processes.run(processes.Code("import os, sys; print(sys.argv, os.getcwd())"), 1, cwd=tmp_path).stdout == (
        f"['-c', '1'] {tmp_path}\n"
    )
    done = processes.run("purifyloader", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("purifyloader ")


def test_errors_have_their_status_and_traceback():
    done = processes.run(fail)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: a reason\n")
    assert processes.run(processes.Code("import sys; sys.exit('no')")).stderr == "no\n"
    assert processes.run(warn).returncode == 0
    assert "careful" in processes.run(warn, warnings="error").stderr


def test_a_child_is_killed_when_it_has_said_a_word():
    child = processes.start(hang)
    child.wait_for("begun")
    assert child.poll() is None
    assert child.kill().returncode == -signal.SIGKILL
    interrupted = processes.start(hang)
    interrupted.wait_for("begun")
    interrupted.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in interrupted.wait().stderr
    with pytest.raises(AssertionError, match="never wrote 'finished'"):
        processes.start(multiply, 1, 1).wait_for("finished")
    with pytest.raises(TimeoutError, match="begun"):
        processes.run(hang, timeout=0.5)


def test_a_child_kills_itself_at_a_marked_call():
    code = processes.Code("import json\nfor i in range(5):\n    print(json.dumps(i))")
    done = processes.run(code, kill_at="json:dumps", kill_call=3)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "0\n1\n")


def test_children_run_beside_each_other_and_their_seconds_are_counted(tmp_path):
    before = processes.cpu_seconds()
    code = "import sys, time, pathlib; a, b = map(pathlib.Path, sys.argv[1:]); a.touch()\n"
    code += "while not b.exists(): time.sleep(0.01)\nfor _ in range(10**6): pass"
    pair = (tmp_path / "a", tmp_path / "b")
    children = [processes.start(processes.Code(code), *paths) for paths in (pair, pair[::-1])]
    assert [child.wait(60).returncode for child in children] == [0, 0]
    assert processes.cpu_seconds() > before + 0.01


def test_the_server_ends_with_its_tests():
    server = processes._Server(preloaded=())
    server.close()
    assert server.process.wait(20) == 0
