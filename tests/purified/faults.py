"""What the fault tests break a cache with: processes that can be killed, small disks, mutations, forged indices."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.cache import CacheReader
from purifyloader.errors import PurifyError
from purifyloader.purified.filling import precompute
from purifyloader.purifiers import Jpeg
from tests.conftest import PictureDataset, random_images

REPOSITORY = Path(__file__).parents[2]
QUALITY = 30
NOBODY = 65534

_LIBC = ctypes.CDLL(None, use_errno=True)

# -- what is purified --------------------------------------------------------------------------------


class Numbered(PictureDataset):
    """Pictures whose first pixel says which one they are, so that a purifier can note what it computes."""

    def __init__(self, count: int, size: int = 8, delay: float = 0) -> None:
        images_NCHW = random_images(count, size)
        numbers = torch.arange(count)
        images_NCHW[:, 0, 0, 0], images_NCHW[:, 1, 0, 0] = numbers // 256, numbers % 256
        super().__init__(images_NCHW)
        self.delay = delay

    def __getitem__(self, index: int) -> tuple:
        time.sleep(self.delay)
        return super().__getitem__(index)


def for_the_command() -> Numbered:
    """What the command line is given as `tests.purified.faults:for_the_command`."""
    return Numbered(120, delay=float(os.environ.get("FAULTS_DELAY", 0)))


class SlowJpeg(Jpeg):
    """JPEG that takes its time and notes in a file outside the cache which images it computes."""

    def __init__(self, log: Path | None = None, delay: float = 0) -> None:
        super().__init__(QUALITY)
        self.log, self.delay = log, delay

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        for x_CHW in x_BCHW:
            if self.log is not None:
                high, low = (x_CHW[:2, 0, 0] * 255).round().int().tolist()
                with open(self.log, "ab", buffering=0) as file:  # one write: lines of several processes stay whole
                    file.write(b"%d %d\n" % (os.getpid(), 256 * high + low))
            time.sleep(self.delay)
        return super().run(x_BCHW, seeds_B)


@dataclass(frozen=True)
class Task:
    """One call of `precompute`, and under which conditions."""

    folder: Path
    count: int = 64
    size: int = 8
    shard_size: int = 8
    encoding: str = "raw"
    batch_size: int = 4
    delay: float = 0
    workers: int = 0
    rank: int = 0
    world_size: int = 1
    log: Path | None = None
    largest_file: int | None = None
    uid: int | None = None

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def dataset(self) -> Numbered:
        return Numbered(self.count, self.size)

    def purifier(self) -> SlowJpeg:
        return SlowJpeg(self.log, self.delay)

    def run(self) -> CacheReader:
        return precompute(
            self.dataset(),
            self.purifier(),
            self.folder,
            shard_size=self.shard_size,
            encoding=self.encoding,
            batch_size=self.batch_size,
            workers=self.workers,
            rank=self.rank,
            world_size=self.world_size,
            progress=False,
        )


# -- processes ---------------------------------------------------------------------------------------

_CONTEXT = multiprocessing.get_context("forkserver")


def _serve() -> None:
    """A server that has imported torch once and computed nothing, so that a new process costs milliseconds."""
    _CONTEXT.set_forkserver_preload(["tests.purified.faults", "pytest"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *([before] if before else [])])
    try:
        from multiprocessing.forkserver import ensure_running

        ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


class Run:
    """A function in a process of its own, and how it ended."""

    def __init__(self, work: Callable[..., Any], *arguments: Any, uid: int | None = None, outcome: Path) -> None:
        _serve()
        self._outcome = outcome
        self._process: BaseProcess = _CONTEXT.Process(target=_child, args=(work, arguments, uid, outcome))
        self._process.start()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> bool:
        """SIGKILL; whether it was still running."""
        assert self._process.pid is not None
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
        self._process.join(60)
        # not by its exit status, which the server cannot tell while orphans of the process hold their pipe open
        return not self._outcome.exists() or not self._outcome.read_bytes()

    def join(self, seconds: float = 120) -> Outcome:
        self._process.join(seconds)
        if self._process.is_alive():
            self.kill()
            raise AssertionError(f"It has not returned in {seconds} s.")
        assert self._process.exitcode == 0, f"It ended with {self._process.exitcode}."
        return Outcome(**json.loads(self._outcome.read_text(encoding="utf-8")))


def descendants(pid: int) -> list[int]:
    """A process, its children and theirs: the parents first."""
    found = [pid]
    for at in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{at}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


@dataclass(frozen=True)
class Outcome:
    """What came of a function: its value, or its error and whether that was raised on purpose."""

    value: Any = None
    error: str | None = None
    message: str = ""
    traceback: str = ""
    purify_error: bool = False


def _child(work: Callable[..., Any], arguments: tuple[Any, ...], uid: int | None, outcome: Path) -> None:
    torch.set_num_threads(1)
    # as everywhere else on Linux; a child of the server would start its own children by a server too
    multiprocessing.set_start_method("fork", force=True)
    with open(outcome, "w", encoding="utf-8") as file:  # opened before the process loses its rights or its space
        if uid is not None:
            _import_everything()
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        json.dump(outcome_of(work, *arguments), file)


def _import_everything() -> None:
    """A whole run, for what it imports on the way: the environment may lie where nobody else may read."""
    with tempfile.TemporaryDirectory() as folder:
        Task(Path(folder) / "cache").run()
        CacheReader(Path(folder) / "cache").verify()


def outcome_of(work: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    try:
        return {"value": work(*arguments)}
    except Exception as error:
        return {
            "error": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
            "purify_error": isinstance(error, PurifyError),
        }


def run_task(task: Task) -> None:
    """In a child: `precompute`, under a limit on the size of files where the task has one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if task.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task.largest_file, hard))
    try:
        task.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Bench:
    """Starts tasks, and keeps the undisturbed caches that theirs must be the same bytes as."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        self._references: dict[tuple[Any, ...], dict[str, bytes]] = {}

    def fresh(self, name: str = "cache") -> Path:
        self._number += 1
        folder = self.folder / str(self._number)
        folder.mkdir()
        return folder / name

    def start(self, task: Task) -> Run:
        return self.call(run_task, task, uid=task.uid)

    def call(self, work: Callable[..., Any], *arguments: Any, uid: int | None = None) -> Run:
        return Run(work, *arguments, uid=uid, outcome=self.fresh("outcome"))

    def reference(self, task: Task) -> dict[str, bytes]:
        key = (task.count, task.size, task.shard_size, task.encoding)
        if key not in self._references:
            folder = self.fresh()
            count, size, shard_size, encoding = key
            outcome = self.start(Task(folder, count, size, shard_size, encoding)).join()
            assert outcome.error is None, outcome.traceback
            self._references[key] = contents(folder)
        return self._references[key]

    def finish(self, task: Task) -> None:
        """The task again, undisturbed: the folder must then be as if it had never been disturbed."""
        outcome = self.start(replace(task, largest_file=None)).join()
        assert outcome.error is None, outcome.traceback
        assert_same(contents(task.folder), self.reference(task))


# -- what lies in a folder ---------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        with contextlib.suppress(FileNotFoundError):  # a hidden file of a process still at work
            found[path.name] = path.read_bytes()
    return found


def assert_same(got: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """One line instead of pages of bytes."""
    lacking, more = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    other = [name for name in got if name in expected and got[name] != expected[name]]
    assert lacking == more == other == [], f"missing: {lacking}, too many: {more}, other bytes: {other}"


def assert_nothing_half(folder: Path, expected: dict[str, bytes]) -> None:
    """What has a final name has its final bytes."""
    got = {name: data for name, data in contents(folder).items() if not name.startswith(".")}
    assert_same(got, {name: data for name, data in expected.items() if name in got})


def temporaries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if ".tmp" in name]  # safetensors has names of its own


def put(folder: Path, files: dict[str, bytes]) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def computed(log: Path) -> Counter[int]:
    """How often each image was computed."""
    return Counter(int(line.split()[1]) for line in log.read_text().splitlines())


def pixels_of(files: dict[str, bytes], folder: Path) -> tuple[list[NDArray[np.uint8]], list[int]]:
    put(folder, files)
    reader = CacheReader(folder)
    reader.verify()
    assert reader.targets is not None
    return reader.get(range(len(reader))), list(reader.targets)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[tuple[bool, str]]]:
    """What any process does in a folder, by inotify: whether a file was made there, or renamed, and its name."""
    made, renamed = 0x100, 0x80
    events: list[tuple[bool, str]] = []
    handle = _LIBC.inotify_init1(os.O_NONBLOCK)
    try:
        assert _LIBC.inotify_add_watch(handle, os.fsencode(folder), made | renamed) >= 0
        yield events
        data = os.read(handle, 1 << 20)
    finally:
        os.close(handle)
    while data:
        _, mask, _, length = struct.unpack_from("iIII", data)
        events.append((bool(mask & made), os.fsdecode(data[16 : 16 + length].rstrip(b"\0"))))
        data = data[16 + length :]


# -- moments to kill at ------------------------------------------------------------------------------

MOMENTS = ("time", "shard", "index")


def wait_for(moment: str, folder: Path, run: Run, rng: random.Random, longest: float) -> None:
    """Until a random time has passed, or a shard or the index is just being written."""
    if moment == "time":
        time.sleep(rng.uniform(0, longest))
        return
    skipped = rng.randrange(4) if moment == "shard" else 0
    seen: set[str] = set()
    while run.alive and len(seen) <= skipped:
        names = os.listdir(folder) if folder.is_dir() else []
        if moment == "shard":
            seen.update(name for name in names if name.startswith(".shard-") and name.endswith(".tmp"))
        else:
            seen.update(name for name in names if "index.json" in name)
    time.sleep(rng.choice([0, rng.uniform(0, 0.002), rng.uniform(0, 0.02)]))


def where(folder: Path) -> str:
    """Where a kill has landed, by what it has left."""
    names = os.listdir(folder) if folder.is_dir() else []
    if any(name.startswith(".index.json") for name in names):
        return "writing the index"
    if any(".tmp" in name for name in names):
        return "writing a shard"
    if "index.json" in names:
        return "after the index"
    if any(name.endswith(".lock") for name in names):
        return "purifying"
    return "before the first shard"


# -- small disks -------------------------------------------------------------------------------------

_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_PRIVATE, _RECURSIVE, _REMOUNT = 1 << 18, 1 << 14, 1 << 5


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _own_mounts() -> None:
    """A name space of mounts that ends with this process, whether or not it is killed; needs no root."""
    uid, gid = os.getuid(), os.getgid()
    _checked(_LIBC.unshare(_NEWNS | (_NEWUSER if uid else 0)))
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    _checked(_LIBC.mount(None, b"/", None, _PRIVATE | _RECURSIVE, None))


def can_mount(where: Path) -> bool:
    """In a child: whether a tmpfs can be mounted here."""
    try:
        _own_mounts()
        _checked(_LIBC.mount(b"tmpfs", os.fsencode(where), b"tmpfs", 0, b"size=64k"))
    except OSError:
        return False
    return True


def on_small_disk(task: Task, options: str, first: Path, then: Path) -> list[dict[str, Any]]:
    """In a child: the task on a tmpfs with `options`, copied to `first`; then with room, copied to `then`."""
    _own_mounts()
    disk = os.fsencode(task.folder.parent)
    _checked(_LIBC.mount(b"tmpfs", disk, b"tmpfs", 0, options.encode()))
    outcomes = [outcome_of(run_task, task)]
    copy_files(task.folder, first)
    _checked(_LIBC.mount(b"tmpfs", disk, b"tmpfs", _REMOUNT, b"size=64m,nr_inodes=10000"))
    outcomes.append(outcome_of(run_task, task))
    copy_files(task.folder, then)
    return outcomes


def copy_files(folder: Path, to: Path) -> None:
    put(to, contents(folder))


# -- mutations ---------------------------------------------------------------------------------------


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    # by little as often as by much
    return data[: -min(len(data), int(len(data) ** rng.random()))]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice([rng.randbytes, bytes, lambda n: b" " * n, lambda n: b"\n" * n])(rng.randint(1, 64))


def _range(data: bytes, rng: random.Random) -> slice:
    start = rng.randrange(len(data))
    return slice(start, start + rng.randint(1, 64))


def zero(data: bytes, rng: random.Random) -> bytes:
    part = _range(data, rng)
    return data[: part.start] + bytes(len(data[part])) + data[part.stop :]


def duplicate(data: bytes, rng: random.Random) -> bytes:
    part = _range(data, rng)
    return data[: part.stop] + data[part] + data[part.stop :]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """With another part of the same file: what is there is then well-formed more often."""
    part, onto = _range(data, rng), rng.randrange(len(data))
    return (data[:onto] + data[part] + data[onto + len(data[part]) :])[: len(data)]


def remove_range(data: bytes, rng: random.Random) -> bytes:
    part = _range(data, rng)
    return data[: part.start] + data[part.stop :]


MUTATIONS = (flip_bit, truncate, append, zero, duplicate, overwrite, remove_range)


def mutated(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A random mutation and its name; never the same bytes."""
    mutation = rng.choice(MUTATIONS)
    while (result := mutation(data, rng)) == data:
        pass
    return mutation.__name__, result


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def edited_index(data: bytes, edit: Callable[[dict[str, Any]], object]) -> bytes:
    """An index that somebody has edited who knows how it guards itself."""
    values = json.loads(data)
    edit(values)
    if isinstance(values.get("identity"), dict):
        values["fingerprint"] = hashlib.sha256(canonical(values["identity"]).encode()).hexdigest()
    values.pop("sha256")
    values["sha256"] = hashlib.sha256(canonical(values).encode()).hexdigest()
    return (canonical(values) + "\n").encode()


# -- what is touched ---------------------------------------------------------------------------------

_touched: list[str] | None = None
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _touched is not None and event in ("open", "os.rename", "os.remove", "os.truncate", "os.chmod", "os.link"):
        _touched.extend(os.fsdecode(a) for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike))


@contextlib.contextmanager
def touched() -> Iterator[list[str]]:
    """Paths that this process opens, renames or removes meanwhile."""
    global _touched, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    _touched = found = []
    try:
        yield found
    finally:
        _touched = None
