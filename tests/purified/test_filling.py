"""Filling a cache: the same files whoever makes them, in how many processes, after how many stops."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import purifyloader
from purifyloader import PurifiedDataset, pretrained, recipes
from purifyloader.cache import CacheReader, CacheWriter, Layout
from purifyloader.commands import main as cli
from purifyloader.core import noise
from purifyloader.core.devices import kind_of_device
from purifyloader.core.images import quantize
from purifyloader.datasets.named import open_dataset
from purifyloader.datasets.sources import take_over
from purifyloader.errors import CacheError, ConfigError, InputError
from purifyloader.files.locks import is_held
from purifyloader.purified import progress
from purifyloader.purified.filling import place, precompute
from purifyloader.purified.job import Job
from purifyloader.purified.ondemand import Filling
from purifyloader.purifiers import DenoiseOnce, Jpeg, Purifier
from purifyloader.transforms import Compensate
from tests import processes
from tests.conftest import PictureDataset, random_images, slim_denoiser

COUNT = 23
HERE = kind_of_device(torch.device("cpu"))
ROOT = Path(__file__).parents[2]
BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def _settings_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs in several threads at once, and the command, leave settings of the whole process behind."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = [backend.fp32_precision for backend in BACKENDS]
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield
    for backend, value in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = value
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
    torch.set_num_threads(1)


class Items(Dataset):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


def source(count: int = COUNT) -> PictureDataset:
    return PictureDataset(random_images(count, 8))


def mixed(count: int = COUNT, low: int = 9) -> Items:
    """Pictures of many sizes."""
    return Items([(Image.fromarray(picture), i) for i, picture in enumerate(arrays(count, low))])


def arrays(count: int, low: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(low + int(rng.integers(9)), low + int(rng.integers(9)), 3) for _ in range(count)]
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


def filled(folder: Path, dataset: Any = None, purifier: Purifier | None = None, **options: Any) -> CacheReader:
    return precompute(
        dataset or source(), purifier or Jpeg(30), folder, **{"shard_size": 4, "progress": False, **options}
    )


def contents(folder: Path) -> dict[str, bytes]:
    """All of it: a finished run leaves no hidden files."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def some_shards(folder: Path, numbers: list[int], dataset: Any = None, device: str = HERE, size: int = 4) -> None:
    """What an earlier run has made."""
    dataset = dataset or source()
    job = Job(take_over(dataset), Jpeg(30), 0, 1, None)
    writer = CacheWriter(folder, job.config(), Layout(len(dataset), size), {**job.made(), "device": device})
    for number in numbers:
        Filling(job, writer, batch_size=3).make(writer.shards[number])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process makes in one go."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    filled(folder)
    return contents(folder)


# -- the same files ----------------------------------------------------------------------------------


def test_the_pixels_are_those_of_the_algebra(tmp_path: Path) -> None:
    purifier = DenoiseOnce(slim_denoiser(), 0.1, compute_batch=8)
    reader = precompute(source(), purifier, tmp_path, seed=5, draws=2, batch_size=5, shard_size=4, progress=False)
    x = random_images(COUNT, 8).float() / 255
    for k in range(2):
        keys = noise.fold_in(noise.image_keys(5, k, range(COUNT)), 0)
        want = quantize(purifier(x, keys)).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(reader.batch(range(COUNT), k), want)
    assert list(reader.targets or ()) == [i % 2 for i in range(COUNT)]
    assert reader.sample == {"type": "tuple", "image": 0, "fields": 2}
    assert reader.config == {"purifier": purifier.identity(), "schema": 2, "seed": 5, "draws": 2}
    assert reader.index.made[0]["device"] == HERE
    assert torch.__version__.startswith(reader.index.made[0]["torch"])
    notes = reader.index.notes or {}
    assert notes["classes"] == ["even", "odd"]
    assert notes["source_class"].endswith("PictureDataset")
    assert notes["dtype"] == ["float32"]


@pytest.mark.parametrize("batch_size", [1, 7, 256])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_workers_decide_nothing(
    tmp_path: Path, whole: dict[str, bytes], batch_size: int, workers: int
) -> None:
    filled(tmp_path, batch_size=batch_size, workers=workers)
    assert contents(tmp_path) == whole


def test_a_network_with_draws_in_any_batches(tmp_path: Path) -> None:
    purifier = DenoiseOnce(slim_denoiser(), 0.1, compute_batch=4)
    for size in (256, 1, 3):
        filled(tmp_path / str(size), source(6), purifier, draws=2, batch_size=size)
    assert contents(tmp_path / "256") == contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [0, 1, 2], [2, 0, 1], [2, 1, 0]], ids=str)
def test_several_ranks_at_once(tmp_path: Path, whole: dict[str, bytes], order: list[int]) -> None:
    """Each returns when the cache is finished, whatever the others do."""

    def run(rank: int) -> CacheReader:
        return filled(tmp_path, rank=rank, world_size=len(order), batch_size=1 + rank)

    with ThreadPoolExecutor(len(order)) as pool:
        readers = [future.result(60) for future in [pool.submit(run, rank) for rank in order]]
    for reader in readers:
        reader.verify()
    assert contents(tmp_path) == whole


def test_a_rank_whose_partners_never_come_does_all_of_it(tmp_path: Path, whole: dict[str, bytes]) -> None:
    filled(tmp_path, rank=2, world_size=3)
    assert contents(tmp_path) == whole


def test_more_ranks_than_shards(tmp_path: Path, whole: dict[str, bytes]) -> None:
    filled(tmp_path, rank=50, world_size=100)
    assert contents(tmp_path) == whole


RANK = """
import sys
from tests.purified.test_filling import Path, filled
filled(Path(sys.argv[1]))
"""


def test_processes_that_a_launcher_starts(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Three of them, which learn from their environment who they are."""
    running = [
        processes.start(processes.Code(RANK), tmp_path / "cache", env={"RANK": str(rank), "WORLD_SIZE": "3"})
        for rank in (2, 0, 1)
    ]
    for process in running:
        done = process.wait()
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "cache") == whole


def test_a_shard_in_work_elsewhere_is_waited_for(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """And made here when whoever holds it goes without having made it."""
    job = Job(take_over(source()), Jpeg(30), 0, 1, None)
    writer = CacheWriter(tmp_path, job.config(), Layout(COUNT, 4), job.made())
    lock = writer.lock(writer.shards[3])
    assert lock.acquire(wait=False)
    thread = threading.Thread(target=filled, args=(tmp_path,))
    thread.start()
    thread.join(1.5)
    assert thread.is_alive()
    assert sorted(p.name for p in tmp_path.glob("shard-*")) == [s.file for s in writer.shards if s.number != 3]
    lock.release()
    thread.join(30)
    assert not thread.is_alive()
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("values", "environment", "expected"),
    [
        ((None, None), {}, (0, 1)),
        ((None, None), {"RANK": "2", "WORLD_SIZE": "5"}, (2, 5)),
        ((1, 2), {"RANK": "2", "WORLD_SIZE": "5"}, (1, 2)),
        ((0, 1), {}, (0, 1)),
    ],
)
def test_place(monkeypatch: pytest.MonkeyPatch, values: Any, environment: dict[str, str], expected: Any) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place(*values) == expected


@pytest.mark.parametrize(
    ("values", "environment"),
    [
        ((1, None), {}),
        ((None, 2), {}),
        ((2, 2), {}),
        ((-1, 2), {}),
        ((0, 0), {}),
        ((None, None), {"RANK": "1"}),
        ((None, None), {"RANK": "5", "WORLD_SIZE": "5"}),
        ((None, None), {"RANK": "a", "WORLD_SIZE": "5"}),
    ],
)
def test_no_place(monkeypatch: pytest.MonkeyPatch, values: Any, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"(?i)rank|world_size"):
        place(*values)


# -- going on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [[], [0], [5], [1, 3, 4], [0, 1, 2, 3, 4, 5]], ids=str)
def test_going_on(tmp_path: Path, whole: dict[str, bytes], numbers: list[int]) -> None:
    """What is there is kept, and its shard size taken over."""
    some_shards(tmp_path, numbers)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    filled(tmp_path, shard_size=None if numbers else 4)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert contents(tmp_path) == whole


def test_a_finished_cache_is_not_touched(tmp_path: Path) -> None:
    filled(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for options in ({}, {"shard_size": None}, {"rank": 1, "world_size": 2}, {"check_source": False}):
        filled(tmp_path, **options)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_another_shard_size_is_refused_on_going_on(tmp_path: Path) -> None:
    some_shards(tmp_path, [1])
    with pytest.raises(CacheError, match="shard_size: 4 → 5"):
        filled(tmp_path, shard_size=5)


def test_a_damaged_shard_is_made_again(tmp_path: Path, whole: dict[str, bytes]) -> None:
    filled(tmp_path)
    path = tmp_path / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (tmp_path / "shard-00003.safetensors").unlink()
    (tmp_path / ".shard-00003.safetensors.abc.tmp").write_text("left by a killed run")
    (tmp_path / ".shard-00003.safetensors.lock").touch()
    filled(tmp_path)
    assert contents(tmp_path) == whole


def changed(index: int, target: bool = False) -> Items:
    dataset = source()
    items = [dataset[i] for i in range(COUNT)]
    image, label = items[index]
    items[index] = (image, 9) if target else (Image.fromarray(np.asarray(image) ^ 1), label)
    return Items(items)


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("index", [0, 6, 22])
def test_a_source_that_changed_is_refused(tmp_path: Path, index: int, target: bool) -> None:
    some_shards(tmp_path, [0, 1, 5])
    before = contents(tmp_path)
    where = "targets" if target else "image"
    for amount in (True, 16):  # of each shard, which has 4
        with pytest.raises(CacheError, match=rf"first in the {where} of sample {index}\."):
            filled(tmp_path, changed(index, target), check_source=amount)
    shards = {name: data for name, data in contents(tmp_path).items() if name in before and name.startswith("shard")}
    assert shards == {name: data for name, data in before.items() if name.startswith("shard")}
    filled(tmp_path, changed(index, target), check_source=False)


def test_a_change_of_what_was_not_purified_yet_is_none(tmp_path: Path) -> None:
    some_shards(tmp_path, [0, 1, 5])
    filled(tmp_path, changed(12), check_source=True)


@pytest.mark.parametrize("amount", ["all", -1, 1.5, None])
def test_bad_amounts_of_the_source(tmp_path: Path, amount: Any) -> None:
    some_shards(tmp_path, [0])
    with pytest.raises(InputError, match="check_source"):
        filled(tmp_path, check_source=amount)


@pytest.mark.parametrize("kind", ["cuda", "cpu", f"{HERE} AMX", f"{HERE} up to SSE41", "cpu NEON"])
def test_another_kind_of_device(tmp_path: Path, kind: str) -> None:
    some_shards(tmp_path, [0], device=kind)
    with pytest.raises(CacheError, match=rf"one kind of device[\s\S]*made on '{kind}'[\s\S]*allow_mixed_devices"):
        filled(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["claim.json", "shard-00000.safetensors"]
    reader = filled(tmp_path, allow_mixed_devices=True)
    assert reader.identity["devices"] == sorted([HERE, kind])
    assert {m["device"]: m["shards"] for m in reader.index.made} == {HERE: 5, kind: 1}
    filled(tmp_path)  # a finished cache is read wherever it was made


def test_a_plan(tmp_path: Path) -> None:
    plan = {"indices": [1, 2]}
    assert filled(tmp_path, plan=plan).plan == plan
    assert filled(tmp_path).plan == plan
    assert filled(tmp_path, plan={"indices": []}).plan == {"indices": []}


@pytest.mark.parametrize("plan", [[1], {"a": float("nan")}, {"a": {1}}])
def test_a_bad_plan_is_refused_before_the_work(tmp_path: Path, plan: Any) -> None:
    with pytest.raises(ConfigError, match="plan"):
        filled(tmp_path / "new", plan=plan)
    assert not list((tmp_path / "new").glob("shard-*"))


# -- images of many sizes ----------------------------------------------------------------------------


def test_mixed_sizes_are_stored_as_png(tmp_path: Path) -> None:
    reader = filled(tmp_path / "a", mixed())
    assert reader.layout.encoding == "png"
    purifier = Jpeg(30)
    for i, picture in enumerate(arrays(COUNT, 9)):
        key = noise.fold_in(noise.image_keys(0, 0, [i]), 0)
        want = quantize(purifier(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255, key))[0]
        assert np.array_equal(reader[i], want.permute(1, 2, 0).numpy())
    filled(tmp_path / "b", mixed(), batch_size=1, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_mixed_channels_are_stored_as_png(tmp_path: Path) -> None:
    modes = ["L", "RGB", "RGBA", "LA"]
    items = [(image.convert(modes[i % 4]), i) for i, (image, _) in enumerate(source())]
    reader = filled(tmp_path, Items(items))
    assert reader.layout.encoding == "png"
    assert [reader[i].shape[2] for i in range(4)] == [1, 3, 4, 2]
    assert [PurifiedDataset.from_cache(tmp_path)[i][0].mode for i in range(4)] == modes


@pytest.mark.parametrize(
    ("purifier", "encoding", "shape"),
    [
        (lambda: recipes.jpeg(30, resize=8, crop=6), "raw", (6, 6, 3)),
        (lambda: recipes.jpeg(30, resize=8), "png", None),
        (lambda: recipes.jpeg(30, tile=8), "png", None),
        (lambda: recipes.jpeg(30, resize=12, crop=12, tile=8, overlap=4), "raw", (12, 12, 3)),
    ],
    ids=["resize-crop", "resize", "tile", "all"],
)
def test_resized_and_tiled(tmp_path: Path, purifier: Callable[[], Purifier], encoding: str, shape: Any) -> None:
    reader = filled(tmp_path, mixed(), purifier())
    assert reader.layout.encoding == encoding
    assert reader.image_shape == shape
    for i in (0, 5, 22):
        image, target = mixed()[i]
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        want = quantize(purifier()(x, noise.fold_in(noise.image_keys(0, 0, [i]), 0)))[0].permute(1, 2, 0).numpy()
        assert np.array_equal(reader[i], want)
        got, label = PurifiedDataset(mixed(), purifier(), cache=tmp_path, progress=False)[i]
        assert np.array_equal(np.asarray(got), want)
        assert label == target


def test_encoding_that_is_asked_for(tmp_path: Path) -> None:
    raw, png = (filled(tmp_path / e, encoding=e) for e in ("raw", "png"))
    assert [raw.layout.encoding, png.layout.encoding] == ["raw", "png"]
    assert np.array_equal(raw.batch(range(COUNT)), png.batch(range(COUNT)))
    assert raw.fingerprint == png.fingerprint
    assert filled(tmp_path / "png").layout.encoding == "png"  # as the folder has it
    with pytest.raises(CacheError, match='encoding: "png" → "raw"'):
        filled(tmp_path / "png", encoding="raw")
    with pytest.raises(InputError, match="encoding must be one of"):
        filled(tmp_path / "new", encoding="jpeg")
    with pytest.raises(InputError, match=r'one size[\s\S]*encoding="png"'):
        filled(tmp_path / "mixed", mixed(), encoding="raw")


# -- what goes wrong ---------------------------------------------------------------------------------


def running() -> set[Any]:
    return {*threading.enumerate(), *multiprocessing.active_children()}


def assert_nothing_reads(before: set[Any]) -> None:
    """Neither a thread nor a process that a stopped run had; they may take a moment to go."""
    deadline = time.monotonic() + 3
    while running() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running() - before


def late(bad: Any, at: int = 100, count: int = 150) -> Items:
    """An image that is none, beyond those looked at first."""
    return Items([(bad if i == at else Image.new("RGB", (8, 8)), i) for i in range(count)])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_one_error_that_names_it(tmp_path: Path, workers: int) -> None:
    with pytest.raises(InputError) as caught:
        filled(tmp_path, late(Image.new("P", (8, 8))), workers=workers, shard_size=16)
    message = str(caught.value)
    assert message.startswith("Item 100 of the dataset: A PIL image's mode must be one of")
    assert "Traceback" not in message
    assert "worker" not in message
    assert not [path for path in tmp_path.glob(".*.lock") if is_held(path)]
    done = {path.name for path in tmp_path.glob("shard-*")}
    assert "shard-00006.safetensors" not in done
    filled(tmp_path, late(Image.new("RGB", (8, 8))), workers=workers, shard_size=16)  # the rest goes on
    assert len(CacheReader(tmp_path)) == 150


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_dataset_is_handed_on(tmp_path: Path, workers: int) -> None:
    class Broken(Items):
        def __getitem__(self, index: int) -> Any:
            if index == 100:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    before = running()
    with pytest.raises(OSError, match="the disk is gone"):
        filled(tmp_path, Broken(late(None, at=1000).items), workers=workers, shard_size=16)
    assert_nothing_reads(before)
    assert not [path for path in tmp_path.glob(".*.lock") if is_held(path)]


@pytest.mark.parametrize(
    ("error", "workers"), [(KeyboardInterrupt, 0), (MemoryError, 0), (SystemExit, 1), (InputError, 2)]
)
def test_a_purifier_that_is_interrupted(tmp_path: Path, whole: dict[str, bytes], error: type, workers: int) -> None:
    """It leaves no lock behind, nor a thread or process that reads: the same call goes on in the same process."""

    class Interrupted(Jpeg):
        calls = 0

        def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
            Interrupted.calls += 1
            if Interrupted.calls == 4:
                raise error("now")
            return super().run(x_BCHW, seeds_B)

    before = running()
    with pytest.raises(error, match="now"):
        filled(tmp_path, purifier=Interrupted(30), workers=workers)
    assert_nothing_reads(before)
    assert not [path for path in tmp_path.glob(".*.lock") if is_held(path)]
    assert not (tmp_path / "index.json").exists()
    filled(tmp_path, workers=workers)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_the_random_state_is_untouched(tmp_path: Path, workers: int) -> None:
    class Noisy(Items):
        def __getitem__(self, index: int) -> Any:
            torch.rand(1), np.random.rand()
            return super().__getitem__(index)

    for name, dataset in (("quiet", source()), ("noisy", Noisy([source()[i] for i in range(COUNT)]))):
        torch.manual_seed(5)
        np.random.seed(5)
        want = torch.rand(1), np.random.rand()
        torch.manual_seed(5)
        np.random.seed(5)
        for _ in range(2):  # made, then found done and compared
            filled(tmp_path / name, dataset, workers=workers)
        assert (torch.rand(1), np.random.rand()) == want, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1.5}, "seed must be an integer"),
        ({"draws": 0}, "draws must be an integer from 1"),
        ({"batch_size": 0}, "batch_size must be an integer from 1"),
        ({"batch_size": "8"}, "batch_size"),
        ({"workers": -1}, "workers must be an integer from 0"),
        ({"shard_size": 0}, "shard_size must be a positive integer"),
        ({"shard_size": 2.5}, "shard_size must be a positive integer"),
        ({"rank": 1}, "rank and world_size"),
        ({"device": "gpu"}, "Got 'gpu'"),
        ({"image_key": "img"}, "image_key='img'"),
        ({"dataset": Items([])}, "empty"),
        ({"dataset": [1, 2]}, "Got int"),
        ({"dataset": iter([1])}, "map-style"),
        ({"purifier": "jpeg"}, "A str is no purifier"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"dataset": source(), "purifier": Jpeg(), "out": tmp_path / "new", **options}
    with pytest.raises(InputError, match=message):
        precompute(**arguments, progress=False)
    assert not list((tmp_path / "new").glob("shard-*"))


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"nothing else.*thesis\.txt"):
        filled(tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


# -- what is seen of it ------------------------------------------------------------------------------


class Slow(Jpeg):
    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        time.sleep(0.17)
        return super().run(x_BCHW, seeds_B)


def test_progress_without_a_terminal_is_lines_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "purifyloader"):
        filled(tmp_path / "a", purifier=Slow(30), progress=True)
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"{COUNT} of {COUNT} images, ")
        caplog.clear()
        filled(tmp_path / "a", progress=True)  # nothing was done, and so there is nothing to say
        filled(tmp_path / "b", progress=True, rank=1, world_size=2)  # rank 0 says it for all
        filled(tmp_path / "c", progress=False)
        assert not caplog.records
    assert "\r" not in "".join(capfd.readouterr())


def test_progress_in_a_long_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line every so often, of all processes' images, with what is left."""

    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.3)
    with caplog.at_level(logging.INFO, "purifyloader"):
        filled(tmp_path, purifier=Slow(30), batch_size=2, progress=True)
    lines = [record.getMessage() for record in caplog.records]
    counts = [int(line.split()[0]) for line in lines]
    assert len(counts) > 2
    assert counts == sorted(counts)
    assert all("minutes left" in line for line in lines[:-1])
    assert counts[-1] == COUNT


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in files, by class."""
    for i, picture in enumerate(arrays(10, 12)):
        path = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return tmp_path / "pictures"


def command(*arguments: Any) -> int:
    return cli.main(["precompute", *map(str, arguments), "--device", "cpu", "--threads", "1"])


def test_a_folder_of_images_warns_that_its_classes_are_dropped(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert command("--data", folder, "--recipe", "jpeg", "--out", tmp_path / "out") == 0
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning == (
        f"The names of the folders in {folder} (cat, dog) are not kept. If they are classes, give --dataset "
        f"imagefolder --root {folder}."
    )
    caplog.clear()
    assert command("--data", folder / "cat", "--recipe", "jpeg", "--out", tmp_path / "cat") == 0
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def _classes_of(*names: str) -> Any:
    data = PictureDataset(random_images(2, 8))
    data.classes = list(names)
    return data


def _in_latin_1(folder: Path) -> Any:
    os.mkdir(os.path.join(os.fsencode(folder), b"caf\xe9"))
    Image.new("RGB", (8, 8)).save(folder / "caf\udce9" / "0.png")
    return open_dataset("imagefolder", folder)


NO_UNICODE: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "a class folder": (_in_latin_1, {}, r"each class must be Unicode.*Got 'caf.udce9' in .*data: rename it"),
    "a class": (
        lambda folder: _classes_of("cat", "\ud800"),
        {},
        r"each class must be Unicode.*ud800. in memory: rename it",
    ),
    "a plan": (lambda folder: _classes_of("cat"), {"plan": {"a": ["\udfff"]}}, "A plan must be .*half of a surrogate"),
    "a key": (lambda folder: _classes_of("cat"), {"plan": {"\udfff": 1}}, "A plan must be .*half of a surrogate"),
}


@pytest.mark.parametrize("kind", NO_UNICODE)
def test_what_an_index_cannot_hold_is_refused_before_any_work(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, options, words = NO_UNICODE[kind]
    (tmp_path / "data").mkdir()
    data = make(tmp_path / "data")
    monkeypatch.setattr(Jpeg, "run", lambda *_: pytest.fail("it was begun"))
    with pytest.raises((InputError, ConfigError), match=words):
        precompute(data, Jpeg(50), tmp_path / "out", progress=False, **options)
    if not options:
        with pytest.raises(InputError, match=words):
            PurifiedDataset(data, Jpeg(50), cache=tmp_path / "out", missing="precompute")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dataset", "imagefolder", "--root", folder, "--recipe", "jpeg", "--out", tmp_path / "out"]
    assert command(*arguments) == 0
    out = capsys.readouterr().out
    reader = CacheReader(tmp_path / "out")
    assert out.startswith(f"{tmp_path / 'out'}: 10 images, 1 shard, ")
    assert reader.fingerprint[:12] in out
    assert (reader.index.notes or {})["classes"] == ["cat", "dog"]
    assert reader.config["purifier"] == Jpeg(10).identity()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert command(*arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


OPTIONS: dict[str, tuple[list[Any], Callable[[CacheReader], Any], Any]] = {
    "quality": (["--quality", 55], lambda r: r.config["purifier"], Jpeg(55).identity()),
    "resize": (["--resize", 8], lambda r: min(r[0].shape[:2]), 8),
    "crop": (["--resize", 10, "--crop", 8], lambda r: r.image_shape, (8, 8, 3)),
    "tile": (["--tile", 8], lambda r: r.config["purifier"], recipes.jpeg(10, tile=8).identity()),
    "overlap": (
        ["--tile", 8, "--overlap", 4],
        lambda r: r.config["purifier"],
        recipes.jpeg(10, tile=8, overlap=4).identity(),
    ),
    "seed": (["--seed", 7], lambda r: r.config["seed"], 7),
    "draws": (["--draws", 2], lambda r: r.draws, 2),
    "shard-size": (["--shard-size", 4], lambda r: len(r.index.shards), 3),
    "encoding": (["--encoding", "png", "--resize", 8, "--crop", 8], lambda r: r.layout.encoding, "png"),
    "auto": (["--resize", 8, "--crop", 8], lambda r: r.layout.encoding, "raw"),
    "place": (["--rank", 1, "--world-size", 2], len, 10),
    "batch-size": (["--batch-size", 1, "--workers", 2], len, 10),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option(tmp_path: Path, folder: Path, name: str) -> None:
    options, read, expected = OPTIONS[name]
    assert command("--dataset", folder, "--recipe", "jpeg", "--out", tmp_path / "out", "--quiet", *options) == 0
    assert read(CacheReader(tmp_path / "out")) == expected


MODELS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "eclipse": (["--recipe", "eclipse", "--t", 3, "--steps", 2], {"t": 3, "steps": 2}),
    "eclipse by sigma": (["--recipe", "eclipse", "--sigma", 0.1], {"sigma": 0.1}),
    "ddim": (
        ["--recipe", "eclipse", "--sigma", 0.1, "--steps", 2, "--sampler", "ddim"],
        {"sigma": 0.1, "steps": 2, "sampler": "ddim"},
    ),
    "compensate-once": (
        ["--recipe", "eclipse", "--sigma", 0.1, "--compensate-once"],
        {"sigma": 0.1, "compensate_once": True},
    ),
    "bfloat16": (["--recipe", "denoise-once", "--sigma", 0.1, "--dtype", "bfloat16"], {"sigma": 0.1, "fast": True}),
    "compute-batch": (
        ["--recipe", "denoise-once", "--sigma", 0.1, "--compute-batch", 2],
        {"sigma": 0.1, "compute_batch": 2},
    ),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pretrained.save(slim_denoiser(), folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_each_option_of_a_network(tmp_path: Path, tiny: Path, name: str) -> None:
    """By a recipe's own words; the model is a folder."""
    options, values = MODELS[name]
    Image.new("RGB", (8, 8), (9, 99, 199)).save(tmp_path / "one.png")
    arguments = ["--dataset", tmp_path, "--model", tiny, "--out", tmp_path / "out", "--quiet"]
    assert command(*arguments, *options) == 0
    recipe = recipes.eclipse if "eclipse" in options else recipes.denoise_once
    assert CacheReader(tmp_path / "out").config["purifier"] == recipe(slim_denoiser(), **values).identity()


def test_a_recipe_from_a_file(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "recipe.json").write_text(recipes.jpeg(42, resize=8, crop=8).to_json())
    arguments = ["--dataset", folder, "--out", tmp_path / "out", "--quiet", "--recipe", tmp_path / "recipe.json"]
    assert command(*arguments) == 0
    assert CacheReader(tmp_path / "out").config["purifier"] == recipes.jpeg(42, resize=8, crop=8).identity()


def test_a_function_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_filling.py").write_text(
        "from tests.purified.test_filling import Items, source\n"
        "def make():\n"
        "    return Items([{'jpg': image, 'cls': label} for image, label in source()])\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["--dataset", "mine_for_filling:make", "--recipe", "jpeg", "--out", "out", "--quiet"]
    assert command(*arguments) == 2  # the image is not under "image"
    assert command(*arguments, "--image-key", "jpg") == 0
    assert CacheReader("out").sample == {"type": "dict", "image": "jpg"}


def test_the_command_goes_on_and_checks_the_source(tmp_path: Path, folder: Path, capsys: Any) -> None:
    arguments = ["--dataset", folder, "--recipe", "jpeg", "--out", tmp_path / "out", "--shard-size", 4, "--quiet"]
    assert command(*arguments) == 0
    (tmp_path / "out/shard-00001.safetensors").unlink()
    path = sorted(folder.rglob("*.png"))[0]
    Image.fromarray(np.asarray(Image.open(path)) ^ 1).save(path)
    capsys.readouterr()
    for amount in ("all", "16", "4"):
        assert command(*arguments, "--check-source", amount) == 2
        assert "image of sample 0." in capsys.readouterr().err
    assert command(*arguments, "--check-source", "0") == 0


def test_the_command_on_mixed_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    some_shards(tmp_path / "out", [0], device="cuda")
    options = [
        "--dataset",
        "tests.purified.test_filling:source",
        "--recipe",
        "jpeg",
        "--quality",
        30,
        "--out",
        tmp_path / "out",
    ]
    assert command(*options, "--quiet") == 2
    assert "allow_mixed_devices=True" in capsys.readouterr().err
    assert command(*options, "--quiet", "--allow-mixed-devices") == 0
    assert CacheReader(tmp_path / "out").identity["devices"] == [HERE, "cuda"]


def test_quiet(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    with caplog.at_level(logging.INFO, "purifyloader"):
        assert command("--dataset", folder / "cat", "--recipe", "jpeg", "--out", tmp_path / "out", "--quiet") == 0
        assert not caplog.records
        assert command("--dataset", folder / "cat", "--recipe", "jpeg", "--out", tmp_path / "other") == 0
        assert len(caplog.records) == 1
    assert capfd.readouterr().err.count("\r") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "jpeg", "--model", "x"], "has no network. Got --model"),
        (["--recipe", "jpeg", "--dtype", "float32"], "has no network. Got --dtype"),
        (["--recipe", "jpeg", "--sigma", 0.1], "Got --sigma"),
        (["--recipe", "jpeg", "--t", 3, "--steps", 2], "Got --steps, --t"),
        (["--recipe", "jpeg", "--compensate-once"], "Got --compensate-once"),
        (["--recipe", "jpeg", "--quality", 101], "101"),
        (["--recipe", "jpeg", "--crop", 8], "crop needs resize"),
        (["--recipe", "jpeg", "--overlap", 8], "overlap needs tile"),
        (["--recipe", "jpeg", "--resize", 0], "0"),
        (["--recipe", "eclipse"], "needs --model"),
        (["--recipe", "eclipse", "--model", "tiny", "--quality", 5], "Got --quality"),
        (["--recipe", "eclipse", "--model", "tiny", "--t", 3, "--sigma", 0.1], "sigma"),
        (["--recipe", "eclipse", "--model", "tiny", "--t", "nan"], "t"),
        (["--recipe", "eclipse", "--model", "tiny", "--t", "inf"], "t"),
        (["--recipe", "eclipse", "--model", "tiny", "--sigma", "nan"], "sigma"),
        (["--recipe", "eclipse", "--model", "tiny", "--t", 3, "--steps", 0], "steps"),
        (["--recipe", "eclipse", "--model", "nothing"], "nothing"),
        (["--recipe", "denoise-once", "--model", "tiny"], "needs --sigma"),
        (["--recipe", "denoise-once", "--model", "tiny", "--sigma", 0.1, "--steps", 2], "Got --steps"),
        (["--recipe", "nothing"], "neither"),
        (["--recipe", "FILE", "--quality", 5], "Got --quality: edit"),
        (["--recipe", "FILE", "--dtype", "float32"], "Got --dtype: edit"),
        (["--recipe", "jpeg", "--draws", 0], "draws"),
        (["--recipe", "jpeg", "--seed", 2**63], "seed"),
        (["--recipe", "jpeg", "--batch-size", 0], "batch_size"),
        (["--recipe", "jpeg", "--workers", -1], "workers"),
        (["--recipe", "jpeg", "--shard-size", 0], "shard_size"),
        (["--recipe", "jpeg", "--threads", 0], "--threads"),
        (["--recipe", "jpeg", "--device", "gpu"], "Got 'gpu'"),
        (["--recipe", "jpeg", "--rank", 0], "rank"),
        (["--recipe", "jpeg", "--rank", 2, "--world-size", 2], "rank"),
        (["--recipe", "jpeg", "--check-source", "some"], "--check-source"),
        (["--recipe", "jpeg", "--check-source", "-1"], "--check-source"),
        (["--recipe", "jpeg", "--image-key", 1], "image_key=1"),
        (["--recipe", "jpeg", "--dataset", "nowhere"], "nowhere"),
        (["--recipe", "jpeg", "--dataset", "os:nothing"], "nothing"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else "",
)
def test_wrong_options_are_one_error(
    tmp_path: Path, folder: Path, tiny: Path, options: list[Any], message: str, capsys: Any
) -> None:
    (tmp_path / "recipe.json").write_text(Jpeg(30).to_json())
    stands_for = {"FILE": str(tmp_path / "recipe.json"), "tiny": str(tiny)}
    given = [stands_for.get(str(option), str(option)) for option in options]
    arguments = [
        "--dataset",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--quiet",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    assert cli.main(["precompute", *arguments, *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("purifyloader: error: ")
    assert message in error
    assert "Traceback" not in error
    assert not list((tmp_path / "out").glob("shard-*"))


def test_options_that_argparse_refuses(tmp_path: Path, folder: Path, capsys: Any) -> None:
    whole = ["--dataset", str(folder), "--recipe", "jpeg", "--out", str(tmp_path / "out")]
    wrong = [
        [*whole, *o] for o in (["--encoding", "jpeg"], ["--seed", "a"], ["--sampler", "x"], ["--dtype", "x"], ["--x"])
    ]
    for options in (*wrong, whole[2:], whole[:2] + whole[4:], whole[:4]):
        assert cli.main(["precompute", *options]) == 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as caught:
        cli.main(["precompute", "--help"])
    assert caught.value.code == 0
    assert "accelerate launch -m purifyloader.precompute" in " ".join(capsys.readouterr().out.split())


def test_threads(tmp_path: Path, folder: Path) -> None:
    arguments = ["precompute", "--dataset", str(folder), "--recipe", "jpeg", "--out", str(tmp_path / "out"), "--quiet"]
    for threads in (2, 1):
        assert cli.main([*arguments, "--device", "cpu", "--threads", str(threads)]) == 0
        assert torch.get_num_threads() == threads


def test_the_function_is_callable_under_its_name(tmp_path: Path) -> None:
    """Also once the module of that name, which `python -m` and `accelerate launch -m` run, was imported."""
    script = (
        "import sys\n"
        "import purifyloader\n"
        "from tests.purified.test_filling import source, Jpeg\n"
        "assert purifyloader.precompute.__module__ == 'purifyloader.purified.filling'\n"
        "import purifyloader.precompute\n"
        "from purifyloader.precompute import main\n"
        "reader = purifyloader.precompute(source(), Jpeg(30), sys.argv[1], shard_size=4, progress=False)\n"
        "from purifyloader import precompute\n"
        "assert len(precompute(source(), Jpeg(30), sys.argv[1], progress=False)) == len(reader) == 23\n"
    )
    done = processes.run(processes.Code(script), tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert len(purifyloader.precompute(source(), Jpeg(30), tmp_path / "a", progress=False)) == COUNT


def test_as_a_module(tmp_path: Path, folder: Path) -> None:
    """As launchers start it."""
    base = ["--dataset", folder, "--device", "cpu", "--quiet"]
    rank = {"RANK": "0", "WORLD_SIZE": "1"}
    out = tmp_path / "out"
    done = processes.run("purifyloader.precompute", *base, "--recipe", "jpeg", "--out", out, env=rank)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: 10 images")
    done = processes.run("purifyloader.precompute", *base, "--recipe", "x", "--out", "y")
    assert done.returncode == 2
    assert done.stderr.startswith("purifyloader: error: --recipe must be one of")
    assert done.stderr.count("\n") == 1


def test_a_dataset_that_compensates_is_refused(tmp_path: Path) -> None:
    inner = PurifiedDataset(source(), Jpeg(30), Compensate())
    with pytest.raises(InputError, match=r"This PurifiedDataset compensates.*one draw of it for ever"):
        precompute(inner, Jpeg(30), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("locks", [True, False])
def test_shards_are_verified_once_at_the_end(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    """Ranks finish together: one verifies what the others made, and these find the index written.

    Without locks both do all of it, and neither may take the other's temporary files away.
    """
    from purifyloader.cache import writer
    from purifyloader.files import locks as module

    read: list[Path] = []
    reading = writer._read_good

    def counted(path: Path) -> Any:
        time.sleep(0.02)
        read.append(path)
        return reading(path)

    def refused(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(writer, "_read_good", counted)
    if not locks:
        monkeypatch.setattr(module.fcntl, "flock", refused)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(filled, tmp_path / "cache", rank=rank, world_size=2) for rank in range(2)]:
            future.result()
    assert {k: v for k, v in contents(tmp_path / "cache").items() if not k.endswith(".lock")} == whole
    finals = [path for path in read if not path.name.startswith(".")]
    if locks:
        shards = sum(name.startswith("shard-") for name in whole)
        assert len(finals) < shards, "only one of them reads what the other made"


def in_a_terminal(command: list[str], folder: Path) -> str:
    """What a command writes to a terminal of 100 columns."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=folder, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    out = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says so where others give an end of file
            break
        if not part:
            break
        out += part
    os.close(ours)
    assert process.wait() == 0, out.decode()
    return out.decode()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_bar_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Of rank 0 for all, and no lines for log files."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0)
    for rank, bars in ((1, 0), (0, 1)):
        monkeypatch.setattr(sys, "stderr", Terminal())
        filled(tmp_path / str(rank), progress=True, rank=rank, world_size=2)
        assert ("\rpurifying: 100%" in sys.stderr.getvalue()) == bool(bars)
        assert ("img/s]" in sys.stderr.getvalue()) == bool(bars)
    assert "images/s" not in caplog.text


@pytest.mark.slow
def test_one_bar_of_the_command_that_people_are_told(tmp_path: Path, folder: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "purifyloader.precompute"]
    arguments = [
        "--dataset",
        "imagefolder",
        "--root",
        str(folder),
        "--recipe",
        "jpeg",
        "--out",
        str(tmp_path / "cache"),
    ]
    out = in_a_terminal([*launch, *arguments], ROOT)
    assert "\rpurifying: 100%" in out
    assert "img/s]" in out
    assert "images/s," not in out, "lines are for log files"
    CacheReader(tmp_path / "cache").verify()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    """344 MB of images more must not be 50 MB of memory more."""
    script = tmp_path / "peak.py"
    script.write_text(
        "import resource, sys\n"
        "import numpy as np, torch\n"
        "from PIL import Image\n"
        "from purifyloader import precompute, recipes\n"
        "torch.set_num_threads(1)\n"
        "class Grey(torch.utils.data.Dataset):\n"
        "    def __len__(self): return int(sys.argv[1])\n"
        "    def __getitem__(self, i): return Image.fromarray(np.full((64, 64, 3), i % 256, np.uint8)), i % 10\n"
        "precompute(Grey(), recipes.jpeg(), sys.argv[2], shard_size=256, progress=False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )

    def peak(count: int) -> int:
        command = [sys.executable, str(script), str(count), str(tmp_path / str(count))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return int(done.stdout)

    few, many = peak(16_000), peak(44_000)
    assert many - few < 50, f"{few} and {many} MB"


# -- fields that do not pickle -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "field", [torch.tensor([1], dtype=torch.uint16), threading.Lock(), lambda: 0], ids=["a", "b", "c"]
)
def test_fields_that_do_not_pickle_need_no_worker(tmp_path: Path, field: Any) -> None:
    items = Items([(np.full((8, 8, 3), i, np.uint8), field) for i in range(4)])
    assert len(filled(tmp_path / "cache", items)) == 4
    with pytest.raises(InputError, match=r"must pickle.*workers=0"):
        filled(tmp_path / "other", items, workers=1)
