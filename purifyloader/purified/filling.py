"""Fill a cache: read, purify, write, by any number of processes that share nothing but its folder.

Shards are static: which images a shard holds depends on the layout alone, and its bytes on (weights,
configuration, seed, source, kind of device). So it does not matter who makes it, in what order, or after
how many interruptions. Each process starts with every `world_size`-th shard, then helps with what is left;
a lock on the shard's name keeps two from making the same one, and the system takes the lock away from a
process that dies. No process ever waits for another, except at the very end for the shards still in work.

Nor does any process trust another one. The first claims the folder for its configuration, and others are refused. A
shard that was made elsewhere counts once its source hashes are those of one's own source: each process reads, beside
what it purifies, what the others have purified, and only then writes the index or returns. So processes that see the
dataset in another order end with an error, and never with a cache.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from purifyloader.cache import format as fmt
from purifyloader.cache.format import Layout, Shard, ShardHeader
from purifyloader.cache.reader import CacheReader
from purifyloader.cache.writer import CacheWriter
from purifyloader.core.checks import as_integer, as_path, launcher_number
from purifyloader.core.images import ImageKind
from purifyloader.datasets.named import check_apart
from purifyloader.datasets.samples import ImageKey
from purifyloader.datasets.sources import check_honest, random_state_kept, take_over
from purifyloader.errors import CacheError, InputError, PurifyError
from purifyloader.files.locks import Lock
from purifyloader.purified import plans
from purifyloader.purified.job import Job, check_arguments, placed
from purifyloader.purified.ondemand import Filling, GrowingShard
from purifyloader.purified.progress import Progress
from purifyloader.purified.reading import Comparison, class_of, read_batches
from purifyloader.purified.sanitation import Sanitation, check_sanitation
from purifyloader.purifiers import Purifier

log = logging.getLogger(__name__)

_AHEAD = 2  # batches read before they are needed
_GLIMPSE = 4  # samples of a shard that has just appeared, which are compared at once: another order is seen early


def precompute(
    dataset: Dataset[Any],
    purifier: Purifier,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    draws: int = 1,
    batch_size: int = 256,
    shard_size: int | None = None,
    encoding: str = "auto",
    device: Any = None,
    workers: int = 0,
    check_source: bool | int = True,
    image_key: ImageKey = None,
    rank: int | None = None,
    world_size: int | None = None,
    allow_mixed_devices: bool = False,
    plan: Mapping[str, Any] | None = None,
    sanitation: Sanitation | None = None,
    progress: bool = True,
) -> CacheReader:
    """Purify a dataset into a cache. Call it again after a stop, and it goes on.

    Any number of processes may do this at once, started by `accelerate launch`, `torchrun` or by hand, on one machine
    or on several that share the folder: the files are the same bytes. Each returns when the cache is finished.

    Args:
        dataset, purifier, seed, image_key: as in `PurifiedDataset`.
        out: folder of the cache, new, empty, unfinished or finished.
        draws: independent purifications of each image; an epoch reads draw `epoch % draws`. K draws cost
            a certificate a factor sqrt(K) of its radius.
        batch_size: images read and purified at a time; decides no pixel.
        shard_size: images a file; 1024, or what the folder has.
        encoding: "raw" for images of one size, "png" (lossless) for any, "auto" decides by 64 of the images.
        device: where to purify; by default where the purifier is.
        workers: processes that read the dataset; 0 reads in a thread.
        check_source: of each shard that another process or an earlier run has made, how many images and targets are
            compared with the source, which reads it once more. A number of them, drawn at random, or False, none,
            takes the word of whoever made it: where that one saw the dataset in another order, images are missing
            from the cache and others are in it twice.
        rank, world_size: which of how many processes this is; by default from the launcher's environment
            variables RANK and WORLD_SIZE, else 0 of 1.
        allow_mixed_devices: go on with shards that another kind of device made.
        plan: a JSON object kept with the cache. A purifier with a condition over the dataset adds its own, made
            first, in one pass over the dataset.
        sanitation: suspects and corrected labels, kept with the cache for all who read it. The cache holds every
            image and the labels of the source all the same, and may be finished already.
        progress: show a bar (rank 0, for all), or lines in the log where there is no terminal.

    Raises `InputError` for a dataset that cannot be purified honestly, or images that the purifier does not take;
    `CacheError` for a folder that holds something else, or a part made from another source, or cannot be written to.

    >>> import torch
    >>> from purifyloader import precompute, recipes
    >>> dataset = [(torch.zeros(3, 8, 8, dtype=torch.uint8), label) for label in range(3)]
    >>> precompute(dataset, recipes.jpeg(10), "cache", progress=False)[0].shape
    (8, 8, 3)
    """
    check_arguments(dataset, purifier)
    if getattr(dataset, "compensate", None) is not None:
        raise InputError(
            f"This {type(dataset).__name__} compensates, and a cache would hold one draw of it for ever. Give the "
            "dataset inside it, and compensate= when the cache is read."
        )
    if not isinstance(check_source, bool):
        check_source = as_integer("check_source", check_source, 0)
    seed, draws = as_integer("seed", seed, -(2**63)), as_integer("draws", draws, 1)
    batch_size, workers = as_integer("batch_size", batch_size, 1), as_integer("workers", workers, 0)
    if plan is not None:
        fmt.plain("A plan", plan)  # before hours of work
    rank, world_size = place(rank, world_size)
    check_apart(dataset, as_path(out))
    class_names(dataset)
    source = take_over(dataset)
    check_sanitation(sanitation, source, image_key)
    moved = placed(purifier, device)
    probed = check_honest(source, moved.image_channels, image_key)
    job = Job(source, moved, seed, draws, image_key)
    layout = choose_layout(out, len(source), draws, moved, probed, shard_size, encoding)
    writer = CacheWriter(out, job.config(), layout, job.made(), allow_mixed_devices, former=job.former_config)
    findings = plans.agreed(job, writer, batch_size, sanitation=sanitation, workers=workers, progress=progress)
    job = plans.planned(job, findings)
    plan = plans.with_plan(writer, plan, findings)
    filling = Filling(job, writer, batch_size, check_source, plan, notes_of(dataset, job.purifier))
    fill(filling, rank=rank, world_size=world_size, workers=workers, progress=progress)
    return CacheReader(out, job.config(), former=job.former_config)


def place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return which of how many processes this is. No process group: nothing is ever sent between them."""
    if (rank is None) != (world_size is None):
        raise InputError(f"Give rank and world_size, or neither. Got rank={rank}, world_size={world_size}.")
    if rank is None or world_size is None:
        rank, world_size = launcher_number("RANK", 0), launcher_number("WORLD_SIZE", 1, 1)
    rank, world_size = as_integer("rank", rank, 0), as_integer("world_size", world_size, 1)
    if not rank < world_size:
        raise InputError(f"rank must be from 0 to world_size - 1. Got rank={rank}, world_size={world_size}.")
    return rank, world_size


def choose_layout(
    folder: str | os.PathLike[str],
    length: int,
    draws: int,
    purifier: Purifier,
    probed: Sequence[tuple[tuple[int, int, int], ImageKind]],
    shard_size: int | None = None,
    encoding: str = "auto",
) -> Layout:
    """Cut the dataset up as asked for, else as the folder has it, else by default; every process probes the same."""
    there = _layout_of(as_path(folder))
    if shard_size is None:
        shard_size = fmt.SHARD_SIZE if there is None else there.shard_size
    if encoding == "auto":
        shapes = {(purifier.output_shape(shape)[1:], kind.channels) for shape, kind in probed}
        encoding = there.encoding if there is not None else "raw" if len(shapes) == 1 else "png"
    return Layout(length, shard_size, draws, encoding)


def _layout_of(folder: Path) -> Layout | None:
    """Read the layout of the cache in a folder, finished or not; None where there is none to be read."""
    try:
        return fmt.read_index(folder).layout
    except (OSError, PurifyError):
        pass
    try:
        return fmt.read_claim(folder).layout
    except (OSError, PurifyError):
        pass
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            return fmt.read_shard_header(path).layout
        except PurifyError:
            continue
    return None


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of a dataset's classes, if it has any; `InputError` for one that an index cannot hold."""
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        return None
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:  # a folder's, in an encoding of former days
            where = f" in {dataset.root}" if isinstance(getattr(dataset, "root", None), str | os.PathLike) else ""
            raise InputError(
                f"The name of each class must be Unicode, which a cache keeps it as. Got {name!r}{where}: rename it."
            ) from None
    return list(classes)


def notes_of(dataset: Any, purifier: Purifier) -> dict[str, Any]:
    """Collect what an index tells people beside what decides the pixels."""
    return {
        "source_class": class_of(dataset),
        "classes": class_names(dataset),
        "purifier": purifier.config(),
        "sigma_px": _all("sigma_px", purifier.config()),
        "dtype": _all("dtype", purifier.config()),
    }


def _all(key: str, config: Any) -> list[Any]:
    """List every value that stands under a key of a configuration, in the order of its stages."""
    if isinstance(config, Mapping):
        return [v for k, value in config.items() for v in ([value] if k == key else _all(key, value))]
    return [v for value in config for v in _all(key, value)] if isinstance(config, list) else []


def fill(filling: Filling, *, rank: int = 0, world_size: int = 1, workers: int = 0, progress: bool = True) -> None:
    """Make what is missing of a cache, and write its index; returns when it is finished."""
    writer = filling.writer
    others = [shard for shard in reversed(writer.shards) if shard.number % world_size != rank]
    crew = _Crew(filling, workers)
    try:
        with random_state_kept(), Progress(writer, progress and rank == 0, lambda: crew.compared):
            crew.work(writer.shards[rank::world_size])
            # what another process has not begun, or what it has left when it died; the rest is its to verify
            crew.work([shard for shard in others if not (writer.folder / shard.file).exists()])
            _finish(crew, filling)
    except BaseException:
        writer.give_up()
        raise


def _finish(crew: _Crew, filling: Filling) -> None:
    writer = filling.writer
    while True:
        left = filling.unsettled()
        while left:
            crew.compare(left)
            crew.work([shard for shard in left if writer.header(shard) is None])
            if left := filling.unsettled(left):
                with writer.lock(left[0]):  # in work elsewhere, unless that process has died
                    pass
        if writer.is_finished(filling.plan) and not filling.unsettled():
            if writer.has_litter():  # of this run, or of one that was killed before it could tidy up
                with suppress(CacheError), Lock(writer.folder, fmt.INDEX_FILE) as lock:  # it may be read-only by now
                    writer.tidy(lock)
            return
        if not (lacking := filling.finish()):
            return
        crew.work(lacking)
        for shard in lacking:
            with writer.lock(shard):
                pass


@dataclass(frozen=True)
class _Work:
    """A shard to be made, holding its lock, or to be compared with the source."""

    shard: Shard
    header: ShardHeader | None = None  # of a shard to be compared
    comparison: Comparison | None = None
    whole: bool = True  # False for a glimpse at a few samples

    def batches(self, size: int) -> list[list[int]]:
        return self.shard.batches(size) if self.comparison is None else self.comparison.batches(size)


class _Crew:
    """Reads ahead in a thread (or in worker processes), purifies in this one, writes behind in another."""

    def __init__(self, filling: Filling, workers: int) -> None:
        self.filling, self.job, self.writer = filling, filling.job, filling.writer
        self.workers = workers
        self.compared = 0  # images
        self._glimpsed: set[int] = set()

    def work(self, shards: Sequence[Shard]) -> None:
        """Make those of `shards` that are not there and that nobody else is making."""
        stop, locks = threading.Event(), dict[int, Lock]()
        self._run(self._claims(shards, locks, stop), locks, stop)

    def compare(self, shards: Sequence[Shard]) -> None:
        """Compare the source with what those of `shards` that are there were made from."""
        self._run(self._comparisons(shards), {}, threading.Event())

    def _run(self, claims: Iterator[_Work], locks: dict[int, Lock], stop: threading.Event) -> None:
        first = next(claims, None)
        if first is None:
            return
        ready: queue.Queue[Any] = queue.Queue(_AHEAD)
        reading = threading.Thread(target=self._read, args=(chain([first], claims), ready, stop), daemon=True)
        try:
            with ThreadPoolExecutor(1) as writing:
                try:
                    reading.start()
                    self._purify(ready, writing, locks)
                finally:
                    stop.set()
        finally:
            while reading.is_alive():
                _drain(ready)
                reading.join(0.05)
            for lock in list(locks.values()):
                lock.release()

    def _claims(self, shards: Sequence[Shard], locks: dict[int, Lock], stop: threading.Event) -> Iterator[_Work]:
        for shard in shards:
            if stop.is_set():
                return
            if self.writer.is_done(shard):
                yield from self._comparisons([shard])
                continue
            self.writer.check_may_make(shard)
            self.writer.claim()
            yield from self._glimpses()
            lock = self.writer.lock(shard)
            if not lock.acquire(wait=False):
                continue
            if self.writer.is_done(shard):  # made between the look and the lock
                lock.release()
                yield from self._comparisons([shard])
                continue
            locks[shard.number] = lock
            self.writer.tidy_shard(shard, lock)
            yield _Work(shard)

    def _comparisons(self, shards: Sequence[Shard]) -> Iterator[_Work]:
        for shard in shards:
            header = self.writer.header(shard)
            if header is not None and not self.filling.agrees(header):
                self._glimpsed.add(shard.number)
                yield _Work(shard, header, self.filling.comparison(header))

    def _glimpses(self) -> Iterator[_Work]:
        """Look at one shard that others have made since, before hours are spent on a folder that cannot be finished."""
        there = set(os.listdir(self.writer.folder))
        for shard in self.writer.shards:
            if shard.file not in there or shard.number in self._glimpsed:
                continue
            self._glimpsed.add(shard.number)
            header = self.writer.header(shard)
            if header is not None and not self.filling.agrees(header):
                yield _Work(shard, header, self.filling.comparison(header, _GLIMPSE), whole=False)
                return

    def _read(self, claims: Iterator[_Work], ready: queue.Queue[Any], stop: threading.Event) -> None:
        order: deque[tuple[_Work, list[int]]] = deque()

        def batches() -> Iterator[list[int]]:
            for work in claims:
                for positions in work.batches(self.filling.batch_size):
                    order.append((work, positions))
                    yield positions

        def put(item: Any) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        try:
            for reads in read_batches(self.job.reader, batches(), self.workers):
                put(reads if isinstance(reads, PurifyError) else (*order.popleft(), reads))
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # whatever it is, the main thread must hear of it
            # a worker's own traceback stands in the message, and this one would keep the workers alive
            put(error.with_traceback(None) if self.workers else error)

    def _purify(self, ready: queue.Queue[Any], writing: ThreadPoolExecutor, locks: dict[int, Lock]) -> None:
        making: GrowingShard | None = None
        written: Future[None] | None = None
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                try:
                    raise item
                finally:
                    del item  # its traceback leads back here, and would keep the loader's processes alive
            work, positions, reads = item
            shard = work.shard
            if work.comparison is not None:
                self.compared += len(positions)
                if work.comparison.add(positions, reads):
                    self.filling.settle(work.header, work.comparison, whole=work.whole)
                continue
            if making is None:
                making = GrowingShard(self.job, shard)
            making.add(positions, reads)
            locks[shard.number].note(len(making.reads))
            if len(making.reads) == shard.count:
                if written is not None:
                    written.result()  # one shard in work and one being written, never more
                written = writing.submit(_written, making, self.filling, locks.pop(shard.number))
                making = None
        if written is not None:
            written.result()


def _written(making: GrowingShard, filling: Filling, lock: Lock) -> None:
    try:
        filling.write(making)
    finally:
        lock.release()


def _drain(ready: queue.Queue[Any]) -> None:
    with suppress(queue.Empty):
        while True:
            ready.get_nowait()
