"""Faults, tried for real: kills, full disks, damaged and forged files, several processes in one folder.

In every case the finished cache is, byte for byte, the undisturbed one, or there is one clear error; no wrong
pixel is ever returned, and nothing outside the folder is touched. The quick part runs by default, the long
one (1,000 mutations, more than 100 kills) by `pytest -m slow tests/purified/test_faults.py`, which prints its figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from purifyloader import PurifiedDataset, precompute
from purifyloader.cache import CacheReader
from purifyloader.errors import CacheError, PurifyError
from purifyloader.recipes import jpeg
from tests.purified import faults
from tests.purified.faults import (
    MOMENTS,
    NOBODY,
    QUALITY,
    REPOSITORY,
    Bench,
    Outcome,
    Run,
    Task,
    assert_nothing_half,
    assert_same,
    computed,
    contents,
    edited_index,
    mutated,
    pixels_of,
    put,
    temporaries,
    touched,
    wait_for,
    where,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills, limits and mounts are Linux's")

ROOT = os.name == "posix" and os.geteuid() == 0
slow = pytest.mark.slow


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    # not tmp_path: another user, to whom a read-only folder is one, must get at it
    folder = Path(tempfile.mkdtemp(prefix="purifyloader-faults-"))
    folder.chmod(0o755)
    yield Bench(folder)
    shutil.rmtree(folder)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """A line for the reader of a long run, whatever pytest captures."""

    def write(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}")

    return write


def counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def assert_refused(outcome: Outcome, *parts: str) -> None:
    assert outcome.error is not None, "It has returned."
    assert outcome.purify_error, outcome.traceback
    for part in parts:
        assert part in outcome.message, outcome.message


def refusal(call: Callable[[], object]) -> PurifyError | None:
    """The error by which the library refuses, None if it does not; any other error fails the test."""
    try:
        call()
    except PurifyError as error:
        assert str(error).strip()  # noqa: PT017
        return error
    return None


# -- kills -------------------------------------------------------------------------------------------


def killed_until(bench: Bench, kills: int, seed: int) -> tuple[Counter[str], list[int]]:
    """Kills one process again and again, filling one folder after another.

    Returns:
        where the kills have landed, and how many images each folder's kills have cost.
    """
    rng = random.Random(seed)
    landed: Counter[str] = Counter()
    costs = []
    while landed.total() < kills:
        encoding = rng.choice(["raw", "raw", "png"])
        task = Task(bench.fresh(), delay=0.004, encoding=encoding, log=bench.fresh("log"))
        if rng.random() < 0.3:  # more to write, and less to compute
            task = replace(task, delay=0.0005, size=64)
        expected = bench.reference(task)
        here = 0
        while landed.total() < kills:
            run = bench.start(task)
            wait_for(rng.choices(MOMENTS, (6, 3, 1))[0], task.folder, run, rng, 0.45)
            if not run.kill():
                assert_same(contents(task.folder), expected)
                break
            landed[where(task.folder)] += 1
            here += 1
            assert_nothing_half(task.folder, expected)
        bench.finish(task)
        assert task.log is not None
        cost = computed(task.log).total() - task.count
        # the shard in work and the one just being written
        assert cost <= 2 * task.shard_size * here, f"seed {seed}: {here} kills cost {cost} images"
        assert here or not cost
        costs.append(cost)
    return landed, costs


def test_a_process_is_killed(bench: Bench) -> None:
    landed, _ = killed_until(bench, 4, seed=int(time.time()))
    assert landed.total() == 4


@slow
def test_a_process_is_killed_a_hundred_times(bench: Bench, say: Callable[[str], None]) -> None:
    seed = int(time.time())
    landed, costs = killed_until(bench, 100, seed)
    say(
        f"100 kills of one process in {len(costs)} folders (seed {seed}): {counted(landed)}; every cache "
        f"byte-identical in the end; a kill has cost {sum(costs) / 100:.1f} images of 8 a shard on average"
    )


def one_of_three(bench: Bench, rng: random.Random) -> int:
    """Images that the death of one rank of three has cost."""
    task = Task(bench.fresh(), delay=0.004, log=bench.fresh("log"), world_size=3)
    runs = [bench.start(replace(task, rank=rank)) for rank in range(3)]
    victim = runs.pop(rng.randrange(3))
    wait_for(rng.choice(MOMENTS[:2]), task.folder, victim, rng, 0.25)
    killed = victim.kill()
    for run in runs:
        outcome = run.join()
        assert outcome.error is None, outcome.traceback
    assert_same(contents(task.folder), bench.reference(task))  # by the survivors, without another run
    assert task.log is not None
    cost = computed(task.log).total() - task.count
    assert cost <= 2 * task.shard_size * killed
    return cost


def test_one_rank_of_three_is_killed(bench: Bench) -> None:
    one_of_three(bench, random.Random(time.time()))


@slow
def test_one_rank_of_three_is_killed_often(bench: Bench, say: Callable[[str], None]) -> None:
    seed = int(time.time())
    rng = random.Random(seed)
    costs = [one_of_three(bench, rng) for _ in range(25)]
    say(f"one rank of three killed, {len(costs)} times (seed {seed}): the survivors finished; images lost: {costs}")


def all_of_three(bench: Bench, rng: random.Random, after: int) -> Counter[str]:
    task = Task(bench.fresh(), delay=0.004, log=bench.fresh("log"), world_size=3)
    expected = bench.reference(task)
    runs = [bench.start(replace(task, rank=rank)) for rank in range(3)]
    wait_for(rng.choices(MOMENTS, (6, 3, 1))[0], task.folder, runs[0], rng, 0.25)
    killed = sum([run.kill() for run in runs])
    landed = Counter([where(task.folder)])
    assert_nothing_half(task.folder, expected)
    for run in [bench.start(replace(task, rank=rank, world_size=after)) for rank in range(after)]:
        outcome = run.join()
        assert outcome.error is None, outcome.traceback
    assert_same(contents(task.folder), expected)
    assert task.log is not None
    assert computed(task.log).total() - task.count <= 2 * task.shard_size * killed
    return landed


def test_all_ranks_are_killed(bench: Bench) -> None:
    all_of_three(bench, random.Random(time.time()), after=2)


@slow
def test_all_ranks_are_killed_often(bench: Bench, say: Callable[[str], None]) -> None:
    seed = int(time.time())
    rng = random.Random(seed)
    landed = sum((all_of_three(bench, rng, after=1 + i % 3) for i in range(24)), Counter[str]())
    say(f"all three ranks killed, then 1, 2 or 3 processes (seed {seed}): 24 times, {counted(landed)}; all identical")


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_files_are_made_under_hidden_names_of_their_own(bench: Bench, encoding: str) -> None:
    """Under its own, or what a kill has left could not be told from what another process has in work."""
    task = Task(bench.fresh(), encoding=encoding)
    task.folder.mkdir()
    with faults.watched(task.folder) as events:
        assert bench.start(task).join().error is None
    renamed = {name for made, name in events if not made and not name.startswith(".")}
    assert renamed == {"index.json"}
    hidden = (".shard-0000", ".index.json.", ".claim.json.")
    linked = {name for made, name in events if made and not name.startswith(hidden)}
    assert linked == {*bench.reference(task)} - renamed, "linked into place, whole: a rename would replace another's"


@slow  # torch's workers look every five seconds whether their parent lives
def test_processes_that_read_outlive_the_one_that_is_killed(bench: Bench) -> None:
    """They have its locks open too, and must not keep them."""
    task = Task(bench.fresh(), delay=0.2, workers=2)
    run = bench.start(task)
    while run.alive and not any(task.folder.glob("shard-*")):
        time.sleep(0.01)
    assert run.kill(), "it has ten seconds of work left"
    begun = time.monotonic()
    bench.finish(task)
    assert time.monotonic() - begun < 20


def test_what_a_kill_after_the_index_has_left_is_removed(bench: Bench) -> None:
    task = Task(bench.fresh())
    put(task.folder, bench.reference(task))
    for name in (".index.json.lock", ".index.json.ab12.tmp", ".shard-00001.safetensors.ab12.tmp"):
        (task.folder / name).write_bytes(b"half")
    bench.finish(task)


def command(folder: Path, launcher: tuple[str, ...], delay: float = 0) -> subprocess.Popen[str]:
    options = (
        f"--dataset tests.purified.faults:for_the_command --recipe jpeg --quality {QUALITY} --shard-size 8 "
        "--batch-size 4"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "FAULTS_DELAY": str(delay)}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *options.split(), "--threads", "1", "--device", "cpu", "--out", str(folder)],
        cwd=folder.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def command_killed(bench: Bench, folder: Path, first: tuple[str, ...], then: tuple[str, ...]) -> None:
    expected_at = bench.fresh()
    precompute(faults.for_the_command(), jpeg(quality=QUALITY), expected_at, shard_size=8, progress=False)
    expected = contents(expected_at)
    process = command(folder, first, delay=0.015)
    while process.poll() is None and not any(folder.glob("shard-*")):
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    # with the ranks that a launcher has started, which torchrun gives sessions of their own and which would go on
    for pid in faults.descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert_nothing_half(folder, expected)
    assert "index.json" not in contents(folder)
    process = command(folder, then)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert_same(contents(folder), expected)


CLI = ("purifyloader", "precompute")
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "3", "-m", "purifyloader.precompute")


@slow
@pytest.mark.parametrize(("first", "then"), [(CLI, CLI), (TORCHRUN, CLI), (CLI, TORCHRUN), (TORCHRUN, TORCHRUN)])
def test_the_command_or_its_launcher_is_killed(bench: Bench, first: tuple[str, ...], then: tuple[str, ...]) -> None:
    command_killed(bench, bench.fresh(), first, then)


# -- small disks -------------------------------------------------------------------------------------

MANY = Task(Path(), count=48, shard_size=1)  # an index that is larger than a shard


def test_no_file_may_grow_further(bench: Bench) -> None:
    """A quota on the size of a file, as a disk that fills: at a lock, in a shard's header and tensor, in the index."""
    sizes = {name: len(data) for name, data in bench.reference(MANY).items()}
    index, _ = sizes.pop("index.json"), sizes.pop("claim.json")
    smallest, largest = min(sizes.values()), max(sizes.values())
    assert largest < index
    for limit in (0, 5, 1000, smallest - 1, largest, index - 1):
        task = replace(MANY, folder=bench.fresh(), largest_file=limit)
        assert_refused(bench.start(task).join(), str(task.folder), "Could not write")
        assert temporaries(task.folder) == []
        assert_nothing_half(task.folder, bench.reference(task))
        there = [name for name in contents(task.folder) if name.startswith("shard-")]
        assert len(there) == (task.shards if limit >= largest else 0)
        bench.finish(task)


def full_disk(bench: Bench, task: Task, options: str) -> str:
    first, then = bench.fresh(), bench.fresh()
    task = replace(task, folder=bench.fresh())
    outcome = bench.call(faults.on_small_disk, task, options, first, then).join()
    assert outcome.error is None, outcome.traceback
    full, room = (Outcome(**values) for values in outcome.value)
    assert_same(contents(then), bench.reference(task))
    assert room.error is None, room.traceback
    if full.error is None:
        assert_same(contents(first), bench.reference(task))
        return "had room"
    assert_refused(full, str(task.folder), "Could not write")
    assert temporaries(first) == []
    assert_nothing_half(first, bench.reference(task))
    shards = sum(name.startswith("shard-") for name in contents(first))
    return "failed at the index" if shards == task.shards else "failed at a shard or a lock"


@slow
def test_a_full_disk(bench: Bench, say: Callable[[str], None]) -> None:
    where_to = bench.fresh()
    where_to.mkdir()
    outcomes: Counter[str] = Counter()
    if bench.call(faults.can_mount, where_to).join().value:
        way = "tmpfs"
        for shard_size, encoding in ((8, "raw"), (1, "raw"), (8, "png")):
            task = Task(Path(), count=32, size=24, shard_size=shard_size, encoding=encoding)
            pages = sum(-(-len(data) // 4096) for data in bench.reference(task).values())
            # every page from none to enough, and every number of files
            for free in [*range(1, pages + task.shards + 2, max(1, pages // 25)), pages]:
                outcomes[full_disk(bench, task, f"size={free * 4}k")] += 1
            for files in range(2, task.shards + 8, max(1, task.shards // 10)):
                outcomes[full_disk(bench, task, f"size=16m,nr_inodes={files}")] += 1
        assert outcomes["had room"] < outcomes.total() / 2
    else:  # no right to mount: the limit of the quick part, at more sizes
        way = "RLIMIT_FSIZE"
        for limit in range(0, len(bench.reference(MANY)["index.json"]), 100):
            task = replace(MANY, folder=bench.fresh(), largest_file=limit)
            assert_refused(bench.start(task).join(), str(task.folder), "Could not write")
            assert temporaries(task.folder) == []
            bench.finish(task)
            outcomes["failed"] += 1
    say(f"{outcomes.total()} sizes of a small disk ({way}): {counted(outcomes)}; all identical after making room")


# -- damage ------------------------------------------------------------------------------------------

SMALL = Task(Path(), count=18, shard_size=4)  # the last of the five shards is shorter
Right = tuple[list[NDArray[np.uint8]], list[int]]


def right_of(bench: Bench, task: Task) -> Right:
    return pixels_of(bench.reference(task), bench.fresh())


def each(count: int, read: Callable[[int], bool]) -> str:
    """Reads every image by itself: one that is refused must not hide a wrong one."""
    refused = 0
    for i in range(count):
        try:
            assert read(i), f"a wrong image {i}"
        except PurifyError:
            refused += 1
    return "read right" if not refused else "refused when read"


def read_by_all_ways(folder: Path, right: Right, task: Task = SMALL) -> str:
    """Whatever is read is right, or one of the library's errors is raised; anything else fails the test."""
    pixels, targets = right
    n = len(pixels)

    def rows(reader: CacheReader) -> str:
        assert len(reader) == n
        assert reader.targets is not None
        assert list(reader.targets) == targets
        return each(n, lambda i: np.array_equal(reader.row(i), pixels[i]))

    def batches(in_memory: bool) -> str:
        reader = CacheReader(folder, in_memory=in_memory)
        return each(n, lambda i: np.array_equal(reader.batch([i, n - 1 - i]), np.stack([pixels[i], pixels[n - 1 - i]])))

    def samples(dataset: PurifiedDataset) -> str:
        assert len(dataset) == n

        def is_right(sample: tuple[Any, Any], i: int) -> bool:
            return np.array_equal(np.asarray(sample[0]), pixels[i]) and sample[1] == targets[i]

        one = each(n, lambda i: is_right(dataset[i], i))
        return max(one, each(n, lambda i: is_right(dataset.__getitems__([i])[0], i)))

    ways: list[Callable[[], str]] = [
        lambda: rows(CacheReader(folder)),
        lambda: rows(CacheReader(folder, in_memory=True)),
        lambda: batches(False),
        lambda: batches(True),
        lambda: samples(PurifiedDataset.from_cache(folder)),
        lambda: samples(PurifiedDataset.from_cache(folder, in_memory=True)),
        lambda: samples(PurifiedDataset(task.dataset(), task.purifier(), cache=folder, progress=False)),
    ]
    before = contents(folder)
    outcomes = []
    for way in ways:
        refused = refusal(lambda way=way: outcomes.append(way()))
        if refused is not None:
            outcomes.append("refused when opened")
    assert_same(contents(folder), before)  # readers write nothing
    for outcome in ("refused when read", "refused when opened"):  # by the way that notices it last
        if outcome in outcomes:
            return outcome
    return "read right"


def repaired(folder: Path, task: Task, expected: dict[str, bytes]) -> str:
    """`precompute` on what is there: the undisturbed cache, or one clear error that leaves things as they are."""
    before = contents(folder)
    refused = refusal(replace(task, folder=folder).run)
    if refused is not None:
        assert "must be of version" in str(refused) or "must be a shard of version" in str(refused), refused
        assert "delete the folder" in str(refused), refused
        assert_same(contents(folder), before)
        return "left to the user (another version)"
    assert_same(contents(folder), expected)
    return "repaired"


def mutate(bench: Bench, count: int, seed: int) -> tuple[Counter[str], Counter[str], Counter[str]]:
    rng = random.Random(seed)
    kinds, reads, repairs = Counter[str](), Counter[str](), Counter[str]()
    tasks = [SMALL, replace(SMALL, encoding="png")]
    rights = [right_of(bench, task) for task in tasks]
    folder = bench.fresh()
    hit = set()
    for i in range(count):
        task, right = tasks[i % 2], rights[i % 2]
        files = bench.reference(task)
        name = sorted(files)[i // 2 % len(files)]  # every shard and the index
        kind, damaged = mutated(files[name], rng)
        put(folder, {**files, name: damaged})
        try:
            read = read_by_all_ways(folder, right, task)
            if name == "claim.json":
                assert read == "read right", "a reader needs no claim"
            else:
                reads[read] += 1
            repairs[repaired(folder, task, files)] += 1
        except BaseException:
            print(f"seed {seed}, mutation {i}: {kind} of {name} ({task.encoding})")
            raise
        kinds[kind] += 1
        hit.add((task.encoding, name))
    assert len(hit) == min(count, 2 * len(files))
    return kinds, reads, repairs


def test_mutations(bench: Bench) -> None:
    _, reads, _ = mutate(bench, 24, seed=int(time.time()))
    assert reads["read right"] <= 6  # white space at the end of the index, perhaps


@slow
def test_a_thousand_mutations(bench: Bench, say: Callable[[str], None]) -> None:
    seed = int(time.time())
    kinds, reads, repairs = mutate(bench, 1000, seed)
    say(f"1,000 mutations (seed {seed}; {counted(kinds)}): {counted(reads)}; no wrong pixel; then {counted(repairs)}")


def swapped(files: dict[str, bytes], a: str, b: str) -> dict[str, bytes]:
    return {**files, a: files[b], b: files[a]}


ONE, TWO, LAST = "shard-00001.safetensors", "shard-00002.safetensors", "shard-00004.safetensors"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda f: {k: v for k, v in f.items() if k != ONE}, id="a shard removed"),
        pytest.param(lambda f: {k: v for k, v in f.items() if k != "index.json"}, id="the index removed"),
        pytest.param(lambda f: {"index.json": f["index.json"]}, id="all shards removed"),
        pytest.param(lambda f: swapped(f, ONE, TWO), id="two shards swapped"),
        pytest.param(lambda f: swapped(f, ONE, LAST), id="two shards of different length swapped"),
        pytest.param(lambda f: {**f, ONE: f[TWO]}, id="a shard twice"),
        pytest.param(
            lambda f: {
                **swapped(f, ONE, TWO),
                "index.json": edited_index(f["index.json"], lambda v: swap_entries(v["shards"])),
            },
            id="two shards swapped, and in the index",
        ),
        pytest.param(lambda f: {**f, "index.json": f["index.json"][:-1]}, id="the index without its newline"),
        pytest.param(lambda f: {**f, "index.json": f["index.json"] + b" \n"}, id="the index with white space"),
        pytest.param(lambda f: dict.fromkeys(f, b""), id="all files empty"),
        pytest.param(lambda f: {**f, ONE: re_versioned(f[ONE], b"7")}, id="a bit flipped in a shard's version"),
        pytest.param(lambda f: {**f, ONE: re_versioned(f[ONE], b"2")}, id="which is that before"),
        pytest.param(lambda f: {**f, "index.json": re_versioned(f["index.json"], b"7")}, id="and in the index's"),
        pytest.param(lambda f: {**f, "index.json": re_versioned(f["index.json"], b"2")}, id="which is that before too"),
    ],
)
def test_files_removed_swapped_and_damaged(
    bench: Bench, damage: Callable[[dict[str, bytes]], dict[str, bytes]]
) -> None:
    expected, right = bench.reference(SMALL), right_of(bench, SMALL)
    folder = bench.fresh()
    put(folder, damage(expected))
    read_by_all_ways(folder, right)
    repaired(folder, SMALL, expected)


def swap_entries(entries: list[dict[str, Any]]) -> None:
    for key in ("sha256", "header"):
        entries[1][key], entries[2][key] = entries[2][key], entries[1][key]


def re_versioned(data: bytes, version: bytes) -> bytes:
    for old in (b'"version":3', b'\\"version\\":3'):
        at = data.rfind(old)  # the identity has a version too, which comes first
        if at >= 0:
            return data[:at] + old[:-1] + version + data[at + len(old) :]
    raise AssertionError("The version has another place now.")


def test_a_shard_of_another_run_takes_its_place(bench: Bench) -> None:
    """Right by itself and for the same cache, but not the one that the index names: as made by other versions."""
    expected, right = bench.reference(SMALL), right_of(bench, SMALL)
    folder = bench.fresh()
    put(folder, expected)
    index = edited_index(expected["index.json"], lambda v: v["shards"][1].update(sha256="0" * 64, header="1" * 64))
    (folder / "index.json").write_bytes(index)
    with pytest.raises(CacheError, match=rf"{ONE}.*Precompute into this folder again"):
        CacheReader(folder)
    repaired(folder, SMALL, expected)  # as the message says
    assert read_by_all_ways(folder, right) == "read right"


# -- forged indices ----------------------------------------------------------------------------------


def first_shard(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["shards"][0].update(values)


def layout(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["layout"].update(values)


def top(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index.update(values)


def seeded(index: dict[str, Any]) -> None:
    index["identity"]["config"]["seed"] = 7


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a file outside": first_shard(file="../outside.safetensors"),
    "an absolute file": first_shard(file="{outside}"),
    "a link": first_shard(file="link.safetensors"),
    "another shard's file": first_shard(file=ONE),
    "a dot before the file": first_shard(file="./shard-00000.safetensors"),
    "no file": first_shard(file=None),
    "a count": first_shard(count=5),
    "no count": lambda index: index["shards"][0].pop("count"),
    "the hash of a shard": first_shard(sha256="0" * 64),
    "the hash of a header": first_shard(header="0" * 64),
    "a shard less": lambda index: index["shards"].pop(),
    "a shard more": lambda index: index["shards"].append(index["shards"][0]),
    "shards no list": top(shards={}),
    "shards null": top(shards=None),
    "a shorter length": layout(length=17),
    "a longer length": layout(length=19),
    "a length of one": layout(length=1),
    "a length that is no number": layout(length="18"),
    "a shard size": layout(shard_size=5),
    "more draws": layout(draws=2),
    "another encoding": layout(encoding="png"),
    "no encoding": layout(encoding="bmp"),
    "a layout's new field": layout(extra=1),
    "no layout": top(layout=None),
    "image_shape turned": top(image_shape=[3, 8, 8]),
    "image_shape larger": top(image_shape=[8, 8, 4]),
    "image_shape null": top(image_shape=None),
    "image_shape text": top(image_shape="885"),
    "image_shape short": top(image_shape=[8, 8]),
    "another seed": seeded,
    "another source": lambda index: index["identity"].update(source={"images": "0" * 64, "targets": "0" * 64}),
    "an identity without configuration": lambda index: index["identity"].pop("config"),
    "an identity that is no object": top(identity=[1]),
    "a configuration that is no object": lambda index: index["identity"].update(config=[1]),
    "no identity": lambda index: index.pop("identity"),
    "notes that are no object": top(notes=[1]),
    "notes null": top(notes=None),
    "a plan that is no object": top(plan=[1]),
    "made that is no list": top(made=3),
    "another format": top(format="other"),
    "another version": top(version=3),
    "a version that is no number": top(version=[2]),
}


@pytest.mark.parametrize("edit", [pytest.param(edit, id=name) for name, edit in EDITS.items()])
def test_forged_indices(bench: Bench, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edited by somebody who knows to compute its hash: refused, or harmless. Files outside stay unread."""
    expected, right = bench.reference(SMALL), right_of(bench, SMALL)
    folder = bench.fresh()
    put(folder, expected)
    outside = folder.parent / "outside.safetensors"
    other = bytearray(expected["shard-00000.safetensors"])
    other[-1] ^= 1  # would be read as a wrong pixel
    outside.write_bytes(other)
    index = edited_index(expected["index.json"], edit).replace(b"{outside}", os.fsencode(outside))
    if b"{outside}" in edited_index(expected["index.json"], edit):
        index = edited_index(index, lambda v: None)
    (folder / "index.json").write_bytes(index)
    link = folder / "link.safetensors"
    if link.name.encode() in index:
        link.symlink_to(outside)
    with touched() as paths:
        read_by_all_ways(folder, right)
        link.unlink(missing_ok=True)  # no cache is made beside a stranger's file
        refused = refusal(replace(SMALL, folder=folder).run)
        if refused is not None:
            assert "delete" in str(refused), refused
            (folder / "index.json").unlink()
            replace(SMALL, folder=folder).run()
    reader = CacheReader(folder)
    reader.verify()
    assert all(np.array_equal(reader.row(i), pixels) for i, pixels in enumerate(right[0]))
    assert outside.read_bytes() == other
    assert not [path for path in paths if "outside" in path]
    found = contents(folder)
    then, before = (json.loads(files.pop("index.json")) for files in (found, expected.copy()))
    assert_same(found, {name: data for name, data in expected.items() if name != "index.json"})
    for key in ("identity", "layout", "image_shape", "shards"):  # the rest is for people
        assert then[key] == before[key]


def test_an_index_cannot_say_how_its_images_were_made(bench: Bench) -> None:
    """The shards say it too: a reader that asks for another configuration must not be given these."""
    folder = bench.fresh()
    put(folder, bench.reference(SMALL))
    (folder / "index.json").write_bytes(edited_index((folder / "index.json").read_bytes(), seeded))
    forged = json.loads((folder / "index.json").read_text())["identity"]["config"]
    with pytest.raises(CacheError):
        CacheReader(folder, forged).row(0)


def test_an_index_cannot_ask_for_all_memory(bench: Bench) -> None:
    folder = bench.fresh()
    put(folder, bench.reference(SMALL))
    index = edited_index((folder / "index.json").read_bytes(), layout(length=10**9, shard_size=1))
    (folder / "index.json").write_bytes(index)
    assert_refused(bench.call(opened_in_little_memory, folder).join(30), "index.json")


def opened_in_little_memory(folder: Path) -> int:
    import resource

    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + (1 << 29), here + (1 << 29)))
    return len(CacheReader(folder))


# -- several processes in one folder -----------------------------------------------------------------


def two_at_once(bench: Bench) -> int:
    """Images that were computed twice."""
    for delay in (0.004, 0.02, 0.1):  # on a busy machine one may be done before the other has begun
        log = bench.fresh("log")
        task = Task(bench.fresh(), delay=delay, log=log)
        runs = [bench.start(task) for _ in range(2)]
        for run in runs:
            outcome = run.join()
            assert outcome.error is None, outcome.traceback
        assert_same(contents(task.folder), bench.reference(task))
        if len({line.split()[0] for line in log.read_text().splitlines()}) == 2:
            return computed(log).total() - task.count
    raise AssertionError("only one of two processes had a part in it")


def test_two_at_once(bench: Bench) -> None:
    assert two_at_once(bench) <= Task.shard_size


@slow
def test_two_at_once_often(bench: Bench, say: Callable[[str], None]) -> None:
    twice = [two_at_once(bench) for _ in range(20)]
    assert max(twice) <= Task.shard_size
    say(f"two processes in one folder at once, 20 times: all identical, images computed twice: {sum(twice)} of 1,280")


def read_until_finished(folder: Path, as_dataset: bool, refused: Path) -> list[Any]:
    """In a child: opens again and again; what was said meanwhile, and then the pixels. Says when it was refused."""
    said = Counter[str]()
    task = Task(folder)
    while True:
        try:
            if as_dataset:
                dataset = PurifiedDataset(task.dataset(), task.purifier(), cache=folder, progress=False)
                pixels = [np.asarray(dataset[i][0]).tolist() for i in range(len(dataset))]
            else:
                reader = CacheReader(folder)
                pixels = [reader[i].tolist() for i in range(len(reader))]
            return [said, pixels]
        except CacheError as error:
            said[str(error)] += 1
            if sum(said.values()) == 4:
                refused.touch()


@pytest.mark.parametrize("as_dataset", [False, True])
def test_reading_while_another_process_writes(bench: Bench, as_dataset: bool) -> None:
    task = Task(bench.fresh(), delay=0.005)
    if as_dataset:  # an empty folder it would fill itself
        put(task.folder, {ONE: bench.reference(task)[ONE]})
    refused = bench.fresh("refused")
    reader = bench.call(read_until_finished, task.folder, as_dataset, refused)
    while not refused.exists():  # so that it is there before the writer is, however busy the machine
        assert reader.alive
        time.sleep(0.005)
    writer = bench.start(task)
    assert writer.join().error is None
    outcome = reader.join()
    assert outcome.error is None, outcome.traceback
    said, pixels = outcome.value
    assert sum(said.values()) > 3
    for message in said:
        assert "unfinished" in message or (not as_dataset and "Check the path" in message), repr(message)
    right, _ = right_of(bench, task)
    assert np.array_equal(pixels, np.stack(right))
    assert_same(contents(task.folder), bench.reference(task))


def read_on_demand(task: Task, kill: bool) -> list[Any]:
    """In a child: all samples through a loader whose workers purify what is missing."""
    dataset = PurifiedDataset(task.dataset(), task.purifier(), cache=task.folder, missing="purify", progress=False)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    loader = DataLoader(
        dataset,
        batch_size=4,
        num_workers=2,
        sampler=order,
        collate_fn=list,
        multiprocessing_context="fork",
    )
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches: Any = iter(loader)
        for batch in batches:
            found += [(np.asarray(image).tolist(), target) for image, target in batch]
            if kill:
                os.kill(batches._workers[0].pid, signal.SIGKILL)
    return [order, found]


def test_purified_on_demand_by_two_workers(bench: Bench) -> None:
    task = Task(bench.fresh(), delay=0.005)
    expected = bench.reference(task)
    put(task.folder, {ONE: expected[ONE]})  # which says how large a shard is
    outcome = bench.call(read_on_demand, task, True).join()
    assert outcome.error == "RuntimeError", outcome
    assert "DataLoader worker" in outcome.message
    assert_nothing_half(task.folder, expected)
    outcome = bench.call(read_on_demand, task, False).join()
    assert outcome.error is None, outcome.traceback
    order, found = outcome.value
    pixels, targets = right_of(bench, task)
    assert [target for _, target in found] == [targets[i] for i in order]
    assert np.array_equal([image for image, _ in found], np.stack([pixels[i] for i in order]))
    assert_same(contents(task.folder), expected)


# -- folders -----------------------------------------------------------------------------------------


def read_only_task(bench: Bench, files: dict[str, bytes]) -> tuple[Task, dict[str, Any]]:
    task = Task(bench.fresh(), uid=NOBODY if ROOT else None)
    put(task.folder, files)
    for path in task.folder.iterdir():
        path.chmod(0o444)
    task.folder.chmod(0o555)
    return task, {path.name: path.stat().st_mtime_ns for path in (task.folder, *task.folder.iterdir())}


def read_and_verified(folder: Path) -> int:
    reader = CacheReader(folder)
    reader.verify()
    dataset = PurifiedDataset.from_cache(folder)
    return sum(target for _, target in (dataset[i] for i in range(len(dataset)))) + len(reader)


def test_a_finished_cache_in_a_read_only_folder(bench: Bench) -> None:
    expected = bench.reference(Task(Path()))
    task, before = read_only_task(bench, expected)
    outcome = bench.call(read_and_verified, task.folder, uid=task.uid).join()
    assert outcome.value == task.count // 2 + task.count, outcome.traceback
    outcome = bench.start(task).join()
    assert outcome.error is None, outcome.traceback
    assert {path.name: path.stat().st_mtime_ns for path in (task.folder, *task.folder.iterdir())} == before
    task.folder.chmod(0o755)


@pytest.mark.parametrize("lacking", ["shard-00000.safetensors", ONE, "index.json"])
def test_an_unfinished_cache_in_a_read_only_folder(bench: Bench, lacking: str) -> None:
    expected = bench.reference(Task(Path()))
    task, before = read_only_task(bench, {k: v for k, v in expected.items() if k not in (lacking, "index.json")})
    assert_refused(bench.start(task).join(), str(task.folder), "Could not write", "writable")
    assert {path.name: path.stat().st_mtime_ns for path in (task.folder, *task.folder.iterdir())} == before
    task.folder.chmod(0o755)


def test_a_folder_that_cannot_be_made(bench: Bench) -> None:
    task, _ = read_only_task(bench, {})
    inside = replace(task, folder=task.folder / "cache")
    assert_refused(bench.start(inside).join(), str(inside.folder), "Could not write")
    task.folder.chmod(0o755)


def test_a_path_with_spaces_and_unicode(bench: Bench) -> None:
    task = Task(bench.fresh("a b") / "päth 数据 ✓ [x]* 'q'" / "cache", encoding="png")
    run: Run = bench.start(replace(task, delay=0.004))
    wait_for("shard", task.folder, run, random.Random(0), 0)
    run.kill()
    bench.finish(task)
    assert read_by_all_ways(task.folder, right_of(bench, task), task) == "read right"


def test_a_folder_that_is_a_link(bench: Bench) -> None:
    target, task = bench.fresh("target"), Task(bench.fresh())
    target.mkdir()
    task.folder.symlink_to(target)
    bench.finish(task)
    assert task.folder.is_symlink()
    assert read_by_all_ways(task.folder, right_of(bench, task), task) == "read right"
    assert_same(contents(target), bench.reference(task))


@pytest.mark.parametrize("name", [ONE, "index.json"])
@pytest.mark.parametrize("state", ["right", "damaged", "dangling"])
def test_a_file_that_is_a_link(bench: Bench, name: str, state: str) -> None:
    """One that is right is read; one that is not is replaced, and never written through."""
    expected, right = bench.reference(SMALL), right_of(bench, SMALL)
    folder = bench.fresh()
    put(folder, expected)
    outside = folder.parent / "elsewhere"
    middle = len(expected[name]) // 2
    data = expected[name] if state == "right" else expected[name][:middle] + b"?" + expected[name][middle + 1 :]
    if state != "dangling":
        outside.write_bytes(data)
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    if state == "right":
        assert read_by_all_ways(folder, right) == "read right"
    repaired(folder, SMALL, expected)
    assert (folder / name).is_symlink() == (state == "right")
    assert outside.exists() == (state != "dangling")
    assert state == "dangling" or outside.read_bytes() == data


@pytest.mark.parametrize("name", [f".{ONE}.lock", ".index.json.lock"])
def test_a_lock_that_is_a_link(bench: Bench, name: str) -> None:
    """Somebody else's folder may hold one; locks are emptied and written to."""
    expected = bench.reference(SMALL)
    folder = bench.fresh()
    put(folder, {k: v for k, v in expected.items() if k not in (ONE, "index.json")})
    outside = folder.parent / "precious"
    outside.write_bytes(b"precious")
    (folder / name).symlink_to(outside)
    refused = refusal(replace(SMALL, folder=folder).run)
    if refused is None:
        assert_same(contents(folder), expected)
    else:
        assert name in str(refused)
    assert outside.read_bytes() == b"precious"
