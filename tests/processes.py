"""Start real processes in a tenth of a second: they are forked from a server that has torch and the library loaded.

    from tests import processes

    done = processes.run("purifyloader", "cache", "info", folder)         # like `purifyloader cache info FOLDER`
    done = processes.run("purifyloader.precompute", "--out", folder)      # like `python -m purifyloader.precompute ...`
    done = processes.run(Path("examples/quickstart.py"), "--images", 8)   # like `python examples/quickstart.py ...`
    done = processes.run(processes.Code("import sys; print(sys.argv[1])"), 1)  # like `python -c CODE 1`
    done = processes.run(function, folder, 3)                  # function(folder, 3), whose result is done.value
    done.returncode, done.stdout, done.stderr                             # as of `subprocess.run(..., text=True)`

`run` waits; `start` returns a `Child` to wait for, to signal or to kill. Both take

    env={...}     variables beside those of the tests' own environment, as they are at the call
    cwd=folder    the working directory; the root of the repository by default
    warnings="error"   filter of warnings, as of `python -W`
    kill_at="module:name"   the child kills itself with SIGKILL when `module.name` is called; `kill_call=3` for the
                  third time. Name it where it is looked up: a module that did `from a import b` has a `b` of its own.

    child = processes.start(function, folder)
    child.wait_for("shard 3")    # until its output holds these words
    child.kill()                 # SIGKILL, and its exit status; child.send_signal(signal.SIGINT) for another
    done = child.wait()

Several ranks are several children with `env={"RANK": "0", ...}` of their own. A function is passed by its name, so it
must stand at the top of a module, and its arguments and result are pickled. A process is not one of a fresh
interpreter in what it has imported: a test of imports starts `sys.executable` itself. The CPU seconds of all children,
their own children included, are in `cpu_seconds()`.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pickle
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings as python_warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
TIMEOUT = 300  # seconds, for a child that hangs

# What takes long to import. Nothing here may start a thread.
PRELOADED = (
    "torch",
    "torch.utils.data",
    "torchvision.datasets",
    "torchvision.transforms.v2",
    "accelerate",
    "safetensors.torch",
    "pytest",
    "purifyloader.pretrained",
    "purifyloader.purified.filling",
    "purifyloader.recipes",
    "tests.conftest",
)


@dataclass(frozen=True)
class Code:
    """A program as text, which runs like `python -c`."""

    text: str


@dataclass(frozen=True)
class Done:
    """What a child left behind; a returncode of -9 means that signal 9 ended it."""

    returncode: int
    stdout: str
    stderr: str
    value: Any = None


@dataclass(frozen=True)
class _Job:
    work: bytes  # target and arguments, which only the child unpickles: their modules are imported there
    folder: str  # where the output and the result are written
    cwd: str
    env: dict[str, str]
    warnings: str | None
    kill_at: str | None
    kill_call: int


def run(target: Any, *arguments: Any, timeout: float = TIMEOUT, **options: Any) -> Done:
    """Run a target (see the module) in a process of its own, and return its output once it has ended."""
    return start(target, *arguments, **options).wait(timeout)


def start(
    target: str | Path | Code | Callable[..., Any],
    *arguments: Any,
    env: Mapping[str, Any] | None = None,
    cwd: str | Path = ROOT,
    warnings: str | None = None,
    kill_at: str | None = None,
    kill_call: int = 1,
) -> Child:
    """Start a target (see the module) in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="purifyloader-child-"))
    (folder / "stdout").touch()
    (folder / "stderr").touch()
    full_env = {**os.environ, **{name: str(value) for name, value in (env or {}).items()}}
    if not callable(target):
        arguments = tuple(map(str, arguments))
    job = _Job(pickle.dumps((target, arguments)), str(folder), str(cwd), full_env, warnings, kill_at, kill_call)
    return Child(_server().start(job), folder)


def cpu_seconds() -> float:
    """Return the CPU seconds of all children that were waited for, without the server's own."""
    return _SERVER.cpu if _SERVER is not None else 0.0


class Child:
    """A process that was started by `start`."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self._folder = pid, folder
        self._done: Done | None = None

    @property
    def stdout(self) -> str:
        """Everything it has printed so far."""
        return self._done.stdout if self._done else self._text("stdout")

    @property
    def stderr(self) -> str:
        """Everything it has written to stderr so far."""
        return self._done.stderr if self._done else self._text("stderr")

    def _text(self, stream: str) -> str:
        return (self._folder / stream).read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        if self._done is None and (status := _server().status(self.pid)) is not None:
            self._finish(status)
        return None if self._done is None else self._done.returncode

    def wait(self, timeout: float = TIMEOUT) -> Done:
        """Wait for its end and return what it left; kill it and fail after `timeout` seconds."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"The child still ran after {timeout} s. It wrote:\n{self.stdout}\n{self.stderr}")
            _server().receive(0.5)
        assert self._done is not None
        return self._done

    def wait_for(self, words: str, timeout: float = TIMEOUT) -> None:
        """Wait until its stdout or stderr holds `words`; fail when it ends before that."""
        end = time.monotonic() + timeout
        while words not in self.stdout + self.stderr:
            ended = self.poll() is not None
            if words in self.stdout + self.stderr:
                return
            if ended or time.monotonic() > end:
                raise AssertionError(f"The child never wrote {words!r}, but:\n{self.stdout}\n{self.stderr}")
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        """Send a signal to a child that still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> Done:
        """Kill it with SIGKILL, if it still runs, and return what it left."""
        self.send_signal(signal.SIGKILL)
        return self.wait()

    def _finish(self, status: int) -> None:
        value = None
        with contextlib.suppress(FileNotFoundError):
            value = pickle.loads((self._folder / "value").read_bytes())
        self._done = Done(status, self._text("stdout"), self._text("stderr"), value)
        shutil.rmtree(self._folder)


class _Server:
    """The tests' end of the server: one process for each process of the tests, started when first needed."""

    def __init__(self, preloaded: Sequence[str] = PRELOADED) -> None:
        ours, theirs = socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": _path()}
        command = [sys.executable, "-W", "ignore", "-m", "tests.processes", str(theirs.fileno()), *preloaded]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, env=environment)
        theirs.close()
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()
        self._ended: dict[int, int] = {}
        self._started: list[int] = []
        self.cpu = 0.0
        atexit.register(self.close)

    def close(self) -> None:
        """End the server, which takes notice of it by itself where no other process holds the connection."""
        self._connection.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def start(self, job: _Job) -> int:
        with self._lock:
            self._connection.send(job)
        while not self._started:
            self.receive(60)
        return self._started.pop()

    def receive(self, seconds: float) -> None:
        """Read what the server says: which process it started, or which one ended."""
        with self._lock:
            if self._connection.poll(seconds):
                pid, status, cpu = self._connection.recv()
                if status is None:
                    self._started.append(pid)
                else:
                    self._ended[pid] = status
                    self.cpu += cpu

    def status(self, pid: int) -> int | None:
        self.receive(0)
        return self._ended.get(pid)


_SERVER: _Server | None = None
_OWNER = 0


def _server() -> _Server:
    global _SERVER, _OWNER
    if _SERVER is None or os.getpid() != _OWNER:  # a child that starts children has a server of its own
        _SERVER, _OWNER = _Server(), os.getpid()
    return _SERVER


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


# -- in the server, and in the children it forks ------------------------------------------------------


def _serve(descriptor: int, preloaded: Sequence[str]) -> None:
    """Fork a child for every job that comes in, and tell of every child that ends; ends with the tests."""
    for name in preloaded:
        importlib.import_module(name)
    os.setsid()  # Ctrl-C at the terminal is the tests' affair
    connection = Connection(descriptor)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([connection, wake], [], [])
        if wake in ready:
            os.read(wake, 1024)
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            connection.send((pid, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime))
        if connection in ready:
            try:
                job = connection.recv()
            except EOFError:
                return
            if pid := os.fork():
                connection.send((pid, None, 0.0))
            else:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for descriptor in (connection.fileno(), wake, waker):
                    os.close(descriptor)
                _work(job)


def _work(job: _Job) -> NoReturn:
    """Be the child: run the job as a process of its own would, and end."""
    global _SERVER
    _SERVER = None
    code = 1
    try:
        _enter(job)
        target, arguments = pickle.loads(job.work)
        if job.kill_at is not None:
            _arm(job.kill_at, job.kill_call)
        value = _execute(target, arguments)
        if value is not None:
            Path(job.folder, "value").write_bytes(pickle.dumps(value))
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does at its end
            atexit._run_exitfuncs()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _enter(job: _Job) -> None:
    """Take over the job's streams, environment, folder and filters of warnings."""
    os.setsid()
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        opened = os.open(Path(job.folder, name), os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, stream.fileno())
        os.close(opened)
        stream.reconfigure(line_buffering=True, encoding="utf-8")  # type: ignore[union-attr]
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.environ.clear()
    os.environ.update(job.env)
    os.chdir(job.cwd)
    python_warnings.resetwarnings()
    if job.warnings is None:
        python_warnings.simplefilter("default")
    else:
        python_warnings.simplefilter(job.warnings)  # type: ignore[arg-type]
    import numpy

    numpy.random.seed()  # every process that is really new has a state of its own


def _execute(target: Any, arguments: tuple[Any, ...]) -> Any:
    if isinstance(target, Code):
        sys.argv = ["-c", *arguments]
        exec(compile(target.text, "<string>", "exec"), {"__name__": "__main__"})
    elif isinstance(target, Path):
        sys.argv = [str(target), *arguments]
        sys.path.insert(0, str(target.resolve().parent))
        runpy.run_path(str(target), run_name="__main__")
    elif isinstance(target, str):
        sys.argv = [target, *arguments]
        sys.modules.pop(target, None)  # runpy warns of a module that is already there
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        return target(*arguments)
    return None


def _arm(place: str, call: int) -> None:
    """Replace `module:name` by a function that kills this process the `call`-th time it is called."""
    module, _, name = place.partition(":")
    holder = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    original, left = getattr(holder, last), call

    def armed(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(holder, last, armed)


if __name__ == "__main__":
    # under the name by which the tests pickle its classes
    importlib.import_module("tests.processes")._serve(int(sys.argv[1]), sys.argv[2:])
