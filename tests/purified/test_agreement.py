"""Processes that do not agree: a finished cache is right for each process that returned, or there is none."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from purifyloader import PurifiedDataset
from purifyloader.cache import CacheReader, CacheWriter, Layout
from purifyloader.datasets.sources import take_over
from purifyloader.errors import CacheError, PurifyError
from purifyloader.files import locks
from purifyloader.purified.filling import fill, precompute
from purifyloader.purified.job import Job
from purifyloader.purified.ondemand import Filling
from purifyloader.purifiers import Jpeg
from tests import processes

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="kills and stops are Linux's"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

COUNT, SIZE = 23, 4


class Listed(Dataset):
    def __init__(self, samples: list[Any], delay: float) -> None:
        self.samples, self.delay, self.reads = samples, delay, 0

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.delay)
        self.reads += 1
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class View:
    """A process's view of the dataset, and its settings."""

    order: str = "sorted"  # or "reversed", or the seed of a shuffle
    swapped: tuple[int, int] | None = None
    changed: int | None = None  # an image of which one pixel differs
    relabelled: int | None = None  # a sample with another target
    targets: int = 0  # added to all targets
    count: int = COUNT
    quality: int = 30
    seed: int = 0
    draws: int = 1
    shard_size: int = SIZE
    delay: float = 0
    locks: bool = True  # False as on a file system without

    def dataset(self) -> Listed:
        pixels = np.random.default_rng(0).integers(0, 256, (self.count, 8, 8, 3), np.uint8)
        samples = [(row, i + self.targets) for i, row in enumerate(pixels)]
        if self.order == "reversed":
            samples.reverse()
        elif self.order != "sorted":
            random.Random(self.order).shuffle(samples)
        if self.swapped is not None:
            a, b = self.swapped
            samples[a], samples[b] = samples[b], samples[a]
        if self.changed is not None:
            samples[self.changed][0][0, 0, 0] ^= 1
        if self.relabelled is not None:
            samples[self.relabelled] = (samples[self.relabelled][0], -1)
        return Listed([(Image.fromarray(row), target) for row, target in samples], self.delay)

    @property
    def layout(self) -> Layout:
        return Layout(self.count, self.shard_size, self.draws)

    def fill(self, folder: Path, **options: Any) -> CacheReader:
        own = {"seed": self.seed, "draws": self.draws, "shard_size": self.shard_size, "batch_size": 3}
        return precompute(self.dataset(), Jpeg(self.quality), folder, **{**own, "progress": False, **options})

    def filling(self, folder: Path, **options: Any) -> Filling:
        job = Job(take_over(self.dataset()), Jpeg(self.quality), self.seed, self.draws, None)
        writer = CacheWriter(folder, job.config(), self.layout, job.made())
        return Filling(job, writer, 3, **options)

    def make(self, folder: Path, numbers: list[int]) -> None:
        """Make some shards, as another process or an earlier run."""
        filling = self.filling(folder)
        for number in numbers:
            filling.make(filling.writer.shards[number])


HONEST = View()
OTHERS = {
    "reversed": View(order="reversed"),
    "shuffled": View(order="1"),
    "two swapped": View(swapped=(1, 9)),
    "two swapped within a shard": View(swapped=(4, 6)),
    "one pixel": View(changed=5),
    "one target": View(relabelled=5),
    "all targets": View(targets=1),
}


@cache
def right(view: View) -> tuple[list[NDArray[np.uint8]], list[Any]]:
    """The rows and the targets of a cache that one process has made alone, without any of the commands' checks."""
    dataset = view.dataset()
    job = Job(take_over(dataset), Jpeg(view.quality), view.seed, view.draws, None)
    positions = list(range(view.count))
    rows = [row for draw in range(view.draws) for row in job.rows(positions, job.reader.read(positions), draw)]
    return rows, [target for _, target in dataset.samples]


def is_right(folder: Path, view: View) -> bool:
    """Index for index, pixels and targets, as this view and its settings have them."""
    reader = CacheReader(folder)
    reader.verify()
    rows, targets = right(replace(view, delay=0, locks=True))
    if (len(reader), reader.draws, reader.config["seed"]) != (view.count, view.draws, view.seed):
        return False
    got = [reader.row(i, draw) for draw in range(view.draws) for i in range(view.count)]
    assert reader.targets is not None
    return list(reader.targets) == targets and all(map(np.array_equal, got, rows))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


# -- one after the other -----------------------------------------------------------------------------


WAYS: dict[str, Callable[[Path, View], object]] = {
    "precompute": lambda folder, view: view.fill(folder),
    "two ranks": lambda folder, view: view.fill(folder, rank=1, world_size=2),
    "workers": lambda folder, view: view.fill(folder, workers=1),
    "dataset": lambda folder, view: PurifiedDataset(
        view.dataset(), Jpeg(30), cache=folder, missing="precompute", progress=False
    ),
    "on demand": lambda folder, view: PurifiedDataset(
        view.dataset(), Jpeg(30), cache=folder, missing="purify", progress=False
    )[[5, 9]],
}


@pytest.mark.parametrize("way", [name for name in WAYS if name != "workers"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_shards_of_another_source_are_refused_by_whoever_fills(tmp_path: Path, way: str, other: View) -> None:
    other.make(tmp_path, [1, 2])
    before = shards(tmp_path)
    with pytest.raises(CacheError) as caught:
        WAYS[way](tmp_path, HONEST)
    for part in (
        str(tmp_path),
        "shard-0000",
        "samples compared, first in the ",
        "sort what it lists",
        "another folder",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "index.json").exists()
    assert {name: data for name, data in shards(tmp_path).items() if name in before} == before


@pytest.mark.parametrize("way", ["precompute", "two ranks"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_and_so_is_a_finished_cache(tmp_path: Path, way: str, other: View) -> None:
    other.fill(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CacheError, match=r"shard-0000[\s\S]*samples compared, first in"):
        WAYS[way](tmp_path, HONEST)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_and_by_reading_processes(tmp_path: Path) -> None:
    OTHERS["one pixel"].make(tmp_path, [1, 2])
    with pytest.raises(CacheError, match=r"1 of 4 samples compared, first in the image of sample 5\."):
        WAYS["workers"](tmp_path, HONEST)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("reversed", "4 of 4 samples compared, first in the image and targets of sample 4. They are 4, 5, 6, 7."),
        ("two swapped within a shard", "2 of 4 samples compared, first in the image and targets of sample 4."),
        ("one pixel", "1 of 4 samples compared, first in the image of sample 5."),
        ("one target", "1 of 4 samples compared, first in the targets of sample 5."),
    ],
)
def test_what_differs_is_named(tmp_path: Path, other: str, words: str) -> None:
    OTHERS[other].make(tmp_path, [1])
    with pytest.raises(CacheError) as caught:
        HONEST.fill(tmp_path)
    assert words in str(caught.value)


def test_less_is_compared_where_that_is_asked_for(tmp_path: Path) -> None:
    for amount in (False, 0):
        View(order="reversed").make(tmp_path / str(amount), [1])
        HONEST.fill(tmp_path / str(amount), check_source=amount)
    View(order="reversed").make(tmp_path / "one", [1])
    with pytest.raises(CacheError, match="1 of 1 samples compared"):
        HONEST.fill(tmp_path / "one", check_source=1)


def test_shards_without_hashes_are_refused(tmp_path: Path) -> None:
    """Made by somebody's own writer, they say nothing about their source."""
    filling = HONEST.filling(tmp_path)
    rows = right(HONEST)[0]
    for shard in filling.writer.shards:
        filling.writer.write(shard, rows[shard.start : shard.start + shard.count], image_types="pil/uint8/3")
    filling.writer.finish()
    with pytest.raises(CacheError, match=r"shard-00000[\s\S]*hashes of what it was made from[\s\S]*check_source=False"):
        HONEST.fill(tmp_path)
    HONEST.fill(tmp_path, check_source=False)


def test_a_dataset_that_gives_other_images_each_time(tmp_path: Path) -> None:
    """It is compared with shards that were made a moment ago, and with its own."""
    HONEST.make(tmp_path, [0, 1, 2])
    dataset = HONEST.dataset()
    job = Job(take_over(dataset), Jpeg(30), 0, 1, None)
    writer = CacheWriter(tmp_path, job.config(), HONEST.layout, job.made())
    filling = Filling(job, writer, 3)
    for shard in writer.shards[3:]:
        filling.make(shard)
    dataset.samples.reverse()
    with pytest.raises(CacheError, match=r"shard-00000[\s\S]*4 of 4 samples compared"):
        fill(filling, progress=False)


def test_nothing_is_read_twice(tmp_path: Path) -> None:
    """A shard that was made here is not compared, and one that was found is read once."""
    for numbers in ([], [0, 3], [0, 1, 2, 3, 4, 5]):
        folder = tmp_path / str(len(numbers))
        HONEST.make(folder, numbers)
        filling = HONEST.filling(folder)
        dataset: Any = filling.job.reader.raw
        before = dataset.reads
        fill(filling, progress=False)
        glimpses = 4 * (len(numbers) == 2)  # at the second one, before the first is made
        assert COUNT <= dataset.reads - before <= COUNT + glimpses
        assert is_right(folder, HONEST)


# -- races -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
def test_a_shard_that_another_process_replaces_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """Without locks two may make one shard, and the last rename wins. Then neither has made it."""
    other = View(order="reversed")
    other.fill(tmp_path / "other")
    present = Filling.unsettled
    replaced: list[str] = []

    def unsettled(self: Filling, among: Any = None) -> Any:
        left = present(self, among)
        if not left and not replaced:  # between the last look and the index
            for name in ["shard-00002.safetensors", *(["index.json"] if finished else [])]:
                replaced.append(name)
                os.replace(tmp_path / "other" / name, tmp_path / "own" / name)
        return left

    monkeypatch.setattr(Filling, "unsettled", unsettled)
    with pytest.raises(CacheError, match=r"shard-00002|index says"):
        HONEST.fill(tmp_path / "own")
    assert replaced
    monkeypatch.undo()
    with pytest.raises(CacheError):
        is_right(tmp_path / "own", HONEST)


def test_on_demand_what_another_made_meanwhile_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for its lock, a reader gets what another process has made."""
    HONEST.make(tmp_path, [5])  # which says how large a shard is
    dataset = PurifiedDataset(HONEST.dataset(), Jpeg(30), cache=tmp_path, missing="purify", progress=False)
    made = Filling.make

    def make(self: Filling, shard: Any) -> None:
        monkeypatch.undo()
        View(order="reversed").make(tmp_path, [shard.number])
        made(self, shard)

    monkeypatch.setattr(Filling, "make", make)
    with pytest.raises(CacheError, match=r"4 of 4 samples compared"):
        dataset[3]


def test_on_demand_the_last_one_compares_all_of_it(tmp_path: Path) -> None:
    """And writes the index; where it does not agree there is none."""
    for folder, other in ((tmp_path / "same", HONEST), (tmp_path / "other", View(relabelled=21))):
        HONEST.make(folder, [0])
        dataset = PurifiedDataset(HONEST.dataset(), Jpeg(30), cache=folder, missing="purify", progress=False)
        other.make(folder, [1, 2, 3, 5])
        dataset[0]
        assert not (folder / "index.json").exists()
        if other == HONEST:
            dataset[17]
            assert is_right(folder, HONEST)
        else:
            with pytest.raises(CacheError, match="first in the targets of sample 21"):
                dataset[17]
            assert not (folder / "index.json").exists()


def test_on_demand_an_index_that_a_killed_run_has_not_written(tmp_path: Path) -> None:
    HONEST.make(tmp_path, [0, 1, 2, 3, 4, 5])
    dataset = PurifiedDataset(HONEST.dataset(), Jpeg(30), cache=tmp_path, missing="purify", progress=False)
    for i in range(COUNT):
        dataset[i]
    assert is_right(tmp_path, HONEST)


# -- at once -----------------------------------------------------------------------------------------


def no_flock(*_: object) -> None:
    raise OSError(38, "Function not implemented")


def filled(folder: Path, view: View, number: int, world: int, start: Path | None = None) -> str:
    """In a process of its own: fill a cache; "done", or why not."""
    if start is not None:
        (start.parent / f"ready-{number}").touch()
        while not start.exists():
            time.sleep(0.001)
    if not view.locks:
        locks.fcntl.flock = no_flock
    try:
        view.fill(folder, rank=number, world_size=world)
    except PurifyError as error:
        return str(error)
    return "done"


def at_once(folder: Path, views: list[View]) -> list[str]:
    """Start processes that begin at the same moment, and return what became of each."""
    start = folder.parent / f"{folder.name}-start"
    start.mkdir()
    children = [
        processes.start(filled, folder, view, number, len(views), start / "go") for number, view in enumerate(views)
    ]
    while len(list(start.glob("ready-*"))) < len(views):
        time.sleep(0.005)
    (start / "go").touch()
    ends = [child.wait() for child in children]
    for end in ends:
        assert end.returncode == 0, end.stderr
    return [end.value for end in ends]


GROUPS = {
    "two orders": [HONEST, View(order="reversed")],
    "three of one order and another": [HONEST, HONEST, View(order="7"), HONEST],
    "other settings": [HONEST, View(quality=31), View(seed=1)],
    "another length": [HONEST, View(count=19)],
    "another target": [HONEST, View(relabelled=22)],
}


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
@pytest.mark.parametrize("views", GROUPS.values(), ids=GROUPS)
def test_processes_that_disagree_at_once(tmp_path: Path, views: list[View], locks: bool) -> None:
    views = [replace(view, delay=0.002, locks=locks) for view in views]
    ends = at_once(tmp_path / "cache", views)
    succeeded = [view for view, end in zip(views, ends, strict=True) if end == "done"]
    assert len({*succeeded}) <= 1, "of two that differ one at most is right"
    for end in ends:
        assert end == "done" or "one source" in end or "source that it is used with" in end or "another" in end, end
    if (tmp_path / "cache/index.json").exists():
        assert any(is_right(tmp_path / "cache", view) for view in views)
    for view in succeeded:
        assert is_right(tmp_path / "cache", view)
    if any(view.quality != 30 or view.count != COUNT for view in views):
        assert succeeded, "whoever claims the folder first fills it"


def test_a_stopped_process_is_named_and_its_work_taken_over_when_it_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", (0.3, 1.0))
    child = processes.start(filled, tmp_path, replace(HONEST, delay=0.05), 0, 2)
    until = time.monotonic() + 30
    while not any(b"pid" in path.read_bytes() for path in tmp_path.glob(".shard-*.lock")):
        assert time.monotonic() < until
        time.sleep(0.005)
    child.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(HONEST.fill, tmp_path, rank=1, world_size=2)
        while not done.done() and f"process {child.pid} on" not in caplog.text and time.monotonic() < until:
            time.sleep(0.02)
        child.kill()
        done.result(60)
    assert "which is stopped. Continue it" in caplog.text
    assert ".safetensors.lock" in caplog.text
    assert is_right(tmp_path, HONEST)


class Tally(Counter[str]):
    def in_words(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(self.items()))


def disturbed(folder: Path, views: list[View], rng: random.Random, tally: Tally, kills: int) -> None:
    """Kill and stop processes at random moments and start them again, then let all end; what is there must be right."""

    def start(number: int) -> processes.Child:
        return processes.start(filled, folder, views[number], number, len(views))

    children = {number: start(number) for number in range(len(views))}
    ends: dict[int, str] = {}
    until = time.monotonic() + 60
    while len(ends) < len(children):
        assert time.monotonic() < until, "it hangs"
        time.sleep(rng.uniform(0, 0.25))
        for number, child in children.items():
            if number not in ends and child.poll() is not None:
                ends[number] = child.wait().value
        alive = [number for number in children if number not in ends]
        if not alive or kills <= 0:
            continue
        number = rng.choice(alive)
        if stopped := rng.random() < 0.4:
            children[number].send_signal(signal.SIGSTOP)
            tally["stops"] += 1
            time.sleep(rng.uniform(0, 0.3))
        if stopped and rng.random() < 0.5:
            children[number].send_signal(signal.SIGCONT)
        else:
            children[number].kill()
            kills -= 1
            tally["kills"] += 1
            children[number] = start(number)
    for number, end in ends.items():
        tally["finished" if end == "done" else "refused"] += 1
        if end == "done" and not ((folder / "index.json").exists() and is_right(folder, views[number])):
            tally["wrong"] += 1
    if (folder / "index.json").exists():
        tally["caches"] += 1
        tally["wrong"] += not any(is_right(folder, view) for view in views)
    if len({*views}) == 1:
        tally["unfinished though all agree"] += sum(end != "done" for end in ends.values())


def chosen(rng: random.Random) -> list[View]:
    """Views of two to four processes; in a fifth of the cases they all agree."""
    view = View(delay=0.004, locks=rng.random() < 0.75)
    others = [
        replace(other, delay=view.delay, locks=view.locks)
        for other in [*OTHERS.values(), *GROUPS["other settings"][1:]]
    ]
    others += [replace(view, count=19), replace(view, draws=2), replace(view, shard_size=5)]
    some = [view] if rng.random() < 0.2 else [view, *rng.sample(others, rng.choice([1, 1, 2]))]
    world = rng.randint(max(2, len(some)), 4)
    return rng.sample(some + rng.choices(some, k=world - len(some)), world)


def disturb(folder: Path, seed: int, kills: int) -> Tally:
    rng, tally = random.Random(seed), Tally()
    for attempt in range(10**6):
        if tally["kills"] >= kills:
            break
        tally["folders"] += 1
        here = min(rng.randint(1, 6), kills - tally["kills"])
        disturbed(folder / str(attempt), chosen(rng), rng, tally, here)
    assert tally["wrong"] == tally["unfinished though all agree"] == 0, f"seed {seed}: {tally.in_words()}"
    return tally


def test_a_few_kills_among_processes_that_disagree(tmp_path: Path) -> None:
    assert disturb(tmp_path, int(time.time()), 3)["kills"] == 3


@pytest.mark.slow
def test_two_hundred_kills_among_processes_that_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(time.time())
    tally = disturb(tmp_path, seed, 200)
    with capsys.disabled():
        print(f"\n  seed {seed}: {tally.in_words()}")
    assert tally["finished"] > 10
    assert tally["refused"] > 10
