"""The cache: index for index, byte for byte, through kills, damage and other people's folders."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch.utils.data import DataLoader

from purifyloader.cache import CacheReader, CacheWriter, Shard, SourceHasher, fingerprint
from purifyloader.errors import CacheError, ConfigError, InputError

CONFIG: dict[str, Any] = {"recipe": {"name": "eclipse", "steps": 4, "sigma": 0.025}, "source": "abc"}
LENGTH, SIZE = 23, 5


def pixels(length: int = LENGTH, shape: tuple[int, ...] = (4, 6, 3)) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (length, *shape), dtype=np.uint8)


def rows(shard: Shard) -> slice:
    return slice(shard.start, shard.start + shard.count)


def fill(folder: Path, shard_size: int = SIZE, config: dict[str, Any] = CONFIG, **finish: Any) -> CacheWriter:
    writer = CacheWriter(folder, config, LENGTH, shard_size)
    for shard in writer.pending():
        writer.write(shard, pixels()[rows(shard)])
    writer.finish(**finish)
    return writer


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    fill(tmp_path / "cache")
    return tmp_path / "cache"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- what goes in comes out --------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", [1, 5, 23, 1024])
def test_round_trip(tmp_path: Path, shard_size: int) -> None:
    fill(tmp_path, shard_size)
    reader = CacheReader(tmp_path, CONFIG)
    reader.verify()
    assert len(reader) == LENGTH
    assert reader.image_shape == (4, 6, 3)
    assert reader.config == CONFIG
    assert reader.fingerprint == fingerprint(CONFIG)
    assert reader.plan is None
    for i, image in enumerate(pixels()):
        assert reader[i].dtype == np.uint8
        assert np.array_equal(reader[i], image)
    for got, i in zip(reader.get([7, 0, -1, 7]), [7, 0, 22, 7], strict=True):
        assert np.array_equal(got, pixels()[i])
    assert reader.get([]) == []
    assert len(list(reader)) == LENGTH  # IndexError ends an iteration


def test_default_shard_size(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, CONFIG, 2500)
    assert writer.shards == (Shard(0, 0, 1024), Shard(1, 1024, 1024), Shard(2, 2048, 452))
    assert [s.file for s in writer.shards] == [f"shard-0000{i}.safetensors" for i in range(3)]


def test_indices(cache: Path) -> None:
    reader = CacheReader(cache)
    assert np.array_equal(reader[-23], pixels()[0])
    assert np.array_equal(reader[torch.tensor(3)], pixels()[3])
    assert np.array_equal(reader[np.int64(3)], pixels()[3])
    for i in (23, -24, 10**20):
        with pytest.raises(IndexError, match=f"Got index {i}"):
            reader[i]
    for bad in (1.0, slice(2), "1", None):
        with pytest.raises(InputError, match="one integer"):
            reader[bad]  # type: ignore[index]


def test_rows_are_copies(cache: Path) -> None:
    reader = CacheReader(cache)
    before = contents(cache)
    row = reader[0]
    assert row.flags.owndata
    assert row.flags.writeable
    row[:] = 0
    assert np.array_equal(reader[0], pixels()[0])
    assert contents(cache) == before


def test_tensors_and_strided_arrays_are_written(tmp_path: Path) -> None:
    nchw = torch.from_numpy(pixels()).permute(0, 3, 1, 2).contiguous()
    writer = CacheWriter(tmp_path, CONFIG, LENGTH, SIZE)
    for shard in writer.pending():
        images = nchw[rows(shard)].permute(0, 2, 3, 1)
        writer.write(shard, images if shard.number % 2 else images.numpy())
    writer.finish()
    assert np.array_equal(np.stack(CacheReader(tmp_path).get(range(LENGTH))), pixels())


def test_files_are_byte_stable(cache: Path, tmp_path: Path) -> None:
    fill(tmp_path / "again", config=dict(reversed(CONFIG.items())))
    assert contents(cache) == contents(tmp_path / "again")


def test_a_shard_is_an_ordinary_safetensors_file(cache: Path) -> None:
    assert np.array_equal(load_file(cache / "shard-00001.safetensors")["images"], pixels()[5:10])


def test_golden_bytes_of_a_shard(tmp_path: Path) -> None:
    images = np.arange(12, dtype=np.uint8).reshape(2, 1, 2, 3)
    writer = CacheWriter(tmp_path, {"a": 1}, 2)
    writer.write(writer.shards[0], images)
    metadata = (
        '{"config":{"a":1},"count":2,'
        '"fingerprint":"015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862",'
        '"format":"purifyloader-cache","length":2,'
        f'"sha256":"{hashlib.sha256(bytes(range(12))).hexdigest()}",'
        '"shard":0,"shard_size":1024,"start":0,"version":1}'
    )
    header = (
        '{"__metadata__":{"purifyloader":' + json.dumps(metadata) + "},"
        '"images":{"dtype":"U8","shape":[2,1,2,3],"data_offsets":[0,12]}}'
    )
    padded = header + " " * (-len(header) % 8)
    expected = len(padded).to_bytes(8, "little") + padded.encode() + bytes(range(12))
    assert (tmp_path / "shard-00000.safetensors").read_bytes() == expected


def test_golden_index(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, {"a": 1}, 1)
    writer.write(writer.shards[0], np.zeros((1, 1, 1, 3), np.uint8))
    writer.finish({"indices": (0,)})
    values = json.loads((tmp_path / "index.json").read_text())
    own = values.pop("sha256")
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert own == hashlib.sha256(text.encode()).hexdigest()
    shard = (tmp_path / "shard-00000.safetensors").read_bytes()
    assert values == {
        "format": "purifyloader-cache",
        "version": 1,
        "config": {"a": 1},
        "fingerprint": fingerprint({"a": 1}),
        "length": 1,
        "shard_size": 1024,
        "image_shape": [1, 1, 3],
        "shards": [{"file": "shard-00000.safetensors", "count": 1, "sha256": hashlib.sha256(shard).hexdigest()}],
        "plan": {"indices": [0]},
    }


def test_fingerprint() -> None:
    assert fingerprint({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    assert fingerprint({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert fingerprint({"b": (1, 2), "a": "é"}) == hashlib.sha256(b'{"a":"\\u00e9","b":[1,2]}').hexdigest()
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.0})
    for bad in ({"a": float("nan")}, {"a": object()}, {"a": torch.zeros(1)}, [1]):
        with pytest.raises(ConfigError, match="Got"):
            fingerprint(bad)  # type: ignore[arg-type]


def test_a_plan_is_kept(cache: Path) -> None:
    plan = {"labels": {"3": 7}, "indices": [1, 2]}
    fill(cache, plan=plan)
    assert CacheReader(cache).plan == plan
    fill(cache)  # as every later start does
    assert CacheReader(cache).plan == plan
    with pytest.raises(ConfigError, match="plan"):
        fill(cache, plan=[1])


def test_finishing_a_finished_cache_writes_nothing(cache: Path) -> None:
    before = (cache / "index.json").stat()
    fill(cache)
    after = (cache / "index.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


# -- interruption ------------------------------------------------------------------------------------


def test_kill_and_resume(cache: Path, tmp_path: Path) -> None:
    """SIGKILL while the third shard stands beside its place, written but not renamed."""
    folder = tmp_path / "killed"
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_cache import CONFIG, LENGTH, SIZE, Path, fill
        rename, seen = os.replace, []
        def replace(a, b):
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(b)
            rename(a, b)
        os.replace = replace
        fill(Path({str(folder)!r}))
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, timeout=120)
    assert result.returncode == -signal.SIGKILL
    names = sorted(os.listdir(folder))
    assert [n for n in names if not n.startswith(".")] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert len(names) == 3
    with pytest.raises(CacheError, match=r"unfinished \(2 of 5 shards\)"):
        CacheReader(folder)
    kept = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    writer = CacheWriter(folder, CONFIG, LENGTH, SIZE)
    assert [s.number for s in writer.pending()] == [2, 3, 4]
    fill(folder)
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert {k: v for k, v in contents(folder).items() if not k.startswith(".")} == contents(cache)


def test_two_writers_share_a_folder(tmp_path: Path) -> None:
    ranks = [CacheWriter(tmp_path, CONFIG, LENGTH, SIZE) for _ in range(2)]
    for rank, writer in enumerate(ranks):
        for shard in writer.shards[rank::2]:
            writer.write(shard, pixels()[rows(shard)])
        if rank == 0:
            with pytest.raises(CacheError, match=r"Got 3 in .*shard-00001.safetensors, shard-00003"):
                writer.finish()
    for writer in ranks:
        assert writer.pending() == []
        writer.finish()
    assert np.array_equal(np.stack(CacheReader(tmp_path).get(range(LENGTH))), pixels())


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CacheWriter(tmp_path, CONFIG, LENGTH, SIZE)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("purifyloader.cache.writer.save_file", full)
    with pytest.raises(OSError, match="No space"):
        writer.write(writer.shards[0], pixels()[:5])
    assert list(tmp_path.iterdir()) == []


# -- damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [-1, -200])
def test_flipped_pixel(cache: Path, at: int) -> None:
    flip(cache / "shard-00001.safetensors", at)
    reader = CacheReader(cache)  # opening does not hash
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors"):
        reader.verify()
    assert [s.number for s in CacheWriter(cache, CONFIG, LENGTH, SIZE).pending()] == [1]
    fill(cache)
    reader = CacheReader(cache)
    reader.verify()
    assert np.array_equal(reader[6], pixels()[6])


@pytest.mark.parametrize("at", [0, 8, 20, 60, 100, 250, 400])
def test_flipped_header(cache: Path, at: int) -> None:
    before = contents(cache)
    flip(cache / "shard-00001.safetensors", at)
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors"):
        CacheReader(cache).verify()
    fill(cache)
    assert contents(cache) == before


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(cache: Path, keep: int) -> None:
    path = cache / "shard-00004.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheError, match=r"shard-00004\.safetensors.*Got"):
        CacheReader(cache)
    before = CacheWriter(cache, CONFIG, LENGTH, SIZE).pending()
    assert [s.number for s in before] == [4]
    fill(cache)
    CacheReader(cache).verify()


def test_a_shard_that_shrinks_after_opening(cache: Path) -> None:
    reader = CacheReader(cache)
    path = cache / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors"):
        reader[0]


def test_missing_and_swapped_shards(cache: Path) -> None:
    data = (cache / "shard-00001.safetensors").read_bytes()
    (cache / "shard-00001.safetensors").write_bytes((cache / "shard-00002.safetensors").read_bytes())
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors must hold images 5 to 9"):
        CacheReader(cache)
    assert [s.number for s in CacheWriter(cache, CONFIG, LENGTH, SIZE).pending()] == [1]
    (cache / "shard-00001.safetensors").unlink()
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors is missing"):
        CacheReader(cache)
    (cache / "shard-00001.safetensors").write_bytes(data)
    CacheReader(cache).verify()


def test_remaking_a_shard_unfinishes_the_cache(cache: Path) -> None:
    writer = CacheWriter(cache, CONFIG, LENGTH, SIZE)
    writer.write(writer.shards[0], pixels()[:5])
    with pytest.raises(CacheError, match=r"unfinished \(5 of 5 shards\)"):
        CacheReader(cache)
    writer.finish()
    CacheReader(cache).verify()


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('"length":23', '"length":22', "whole index"),
        ('"abc"', '"abd"', "whole index"),
        ('"plan":null', '"plan":{"labels":{"0":1}}', "whole index"),
        ('"version":1', '"version":2', "Update purifyloader"),
        ("purifyloader-cache", "other", "Got 'other'"),
        ("{", "", "must be JSON"),
    ],
)
def test_bad_index(cache: Path, old: str, new: str, part: str) -> None:
    path = cache / "index.json"
    path.write_text(path.read_text().replace(old, new, 1))
    for opening in (lambda: CacheReader(cache), lambda: CacheWriter(cache, CONFIG, LENGTH, SIZE)):
        with pytest.raises(CacheError, match=rf"index\.json.*{part}"):
            opening()
    path.unlink()  # what the message says
    fill(cache)
    CacheReader(cache).verify()


def test_no_cache_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(CacheError, match=r"index\.json.*Got .*precompute"):
            CacheReader(path)


# -- other configurations and other people's folders -------------------------------------------------

OTHER: dict[str, Any] = {"recipe": {"name": "eclipse", "steps": 8, "sigma": 0.025}, "seed": 1}


def test_another_configuration_is_refused(cache: Path) -> None:
    for opening in (lambda: CacheReader(cache, OTHER), lambda: CacheWriter(cache, OTHER, LENGTH, SIZE)):
        with pytest.raises(CacheError) as caught:
            opening()
        message = str(caught.value)
        for part in ("recipe.steps: 4 → 8", "seed: absent → 1", 'source: "abc" → absent'):
            assert part in message
        assert "sigma" not in message
        assert "eclipse" not in message


def test_another_configuration_of_an_unfinished_cache_is_refused(cache: Path) -> None:
    (cache / "index.json").unlink()
    before = contents(cache)
    with pytest.raises(CacheError, match=r"recipe\.steps: 4 → 8"):
        CacheWriter(cache, OTHER, LENGTH, SIZE)
    assert contents(cache) == before


def test_a_foreign_shard_that_comes_later_is_not_done(cache: Path, tmp_path: Path) -> None:
    fill(tmp_path / "other", config=OTHER)
    writer = CacheWriter(cache, CONFIG, LENGTH, SIZE)
    (tmp_path / "other/shard-00002.safetensors").rename(cache / "shard-00002.safetensors")
    assert [s.number for s in writer.pending()] == [2]
    with pytest.raises(CacheError, match=r"shard-00002\.safetensors"):
        writer.finish()
    with pytest.raises(CacheError, match=r"shard-00002\.safetensors"):
        CacheReader(cache)


def test_one_and_one_point_zero_differ_visibly(cache: Path) -> None:
    config = {**CONFIG, "recipe": {**CONFIG["recipe"], "steps": 4.0}}
    with pytest.raises(CacheError, match=r"recipe\.steps: 4 → 4\.0"):
        CacheReader(cache, config)


def test_long_differences_are_shortened(tmp_path: Path) -> None:
    fill(tmp_path, config={"text": "x" * 1000, **{f"k{i}": i for i in range(50)}})
    with pytest.raises(CacheError) as caught:
        CacheReader(tmp_path, {})
    assert "and 31 more" in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("length", "size", "part"),
    [(LENGTH, 4, r"shard_size: 5 → 4"), (24, SIZE, r"length: 23 → 24"), (5, SIZE, r"length: 23 → 5")],
)
def test_one_folder_has_one_layout(cache: Path, length: int, size: int, part: str) -> None:
    for _ in range(2):  # finished, then unfinished
        with pytest.raises(CacheError, match=part):
            CacheWriter(cache, CONFIG, length, size)
        (cache / "index.json").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["notes.txt", "shard-1.safetensors", "shard-00099.safetensors", "sub"])
def test_unrelated_files(cache: Path, name: str) -> None:
    (cache / name).mkdir() if name == "sub" else (cache / name).write_text("mine")
    with pytest.raises(CacheError, match=rf"nothing else.*{name}"):
        CacheWriter(cache, CONFIG, LENGTH, SIZE)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="Got the file"):
        CacheWriter(tmp_path / "file", CONFIG, LENGTH)


@pytest.mark.parametrize(("length", "size"), [(0, 5), (-1, 5), (2.0, 5), (5, 0), (5, "5")])
def test_bad_sizes(tmp_path: Path, length: Any, size: Any) -> None:
    with pytest.raises(InputError, match="positive integer"):
        CacheWriter(tmp_path / "new", CONFIG, length, size)
    assert not (tmp_path / "new").exists()


def test_bad_images(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, CONFIG, LENGTH, SIZE)
    first = writer.shards[0]
    images = pixels()[:5]
    bad: list[tuple[Any, str]] = [
        (images.astype(np.float32), "Got float32"),
        (torch.from_numpy(images).float(), "Got float32"),
        (images.tolist(), "Got list"),
        (images[:4], r"\(5, H, W, C\). Got \(4, 4, 6, 3\)"),
        (images[0], "Got"),
        (images[..., 0], "Got"),
        (images[:, :0], "Got"),
    ]
    for value, part in bad:
        with pytest.raises(InputError, match=part):
            writer.write(first, value)
    with pytest.raises(InputError, match="pending"):
        writer.write(Shard(0, 0, 4), images[:4])
    assert list(tmp_path.iterdir()) == []
    writer.write(first, images)
    with pytest.raises(InputError, match=r"\(5, 4, 6, 3\). Got \(5, 6, 4, 3\)"):
        writer.write(writer.shards[1], images.reshape(5, 6, 4, 3))


def test_shards_of_different_sizes_do_not_finish(tmp_path: Path) -> None:
    one, two = (CacheWriter(tmp_path, CONFIG, 4, 2) for _ in range(2))
    one.write(one.shards[0], np.zeros((2, 4, 4, 3), np.uint8))
    two.write(two.shards[1], np.zeros((2, 4, 5, 3), np.uint8))
    with pytest.raises(CacheError, match=r"one shape.*\(4, 5, 3\)|one shape.*\(4, 4, 3\)"):
        one.finish()


# -- processes ---------------------------------------------------------------------------------------


def test_pickle(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reader = CacheReader("cache")
    assert np.array_equal(reader[0], pixels()[0])
    data = pickle.dumps(reader)
    assert len(data) < 5000  # no images, no handles
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    assert np.array_equal(again[22], pixels()[22])
    assert again.config == CONFIG


def test_reading_keeps_no_file_open(tmp_path: Path) -> None:
    """A process may have 1024 files open, and a cache more shards."""
    fill(tmp_path, 1)
    before = len(os.listdir("/proc/self/fd"))
    reader = CacheReader(tmp_path)
    reader.get(range(LENGTH))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(cache: Path, method: str) -> None:
    reader = CacheReader(cache, CONFIG)
    reader[0]  # a mapping that the workers inherit, or must not
    loader = DataLoader(reader, batch_size=4, num_workers=2, multiprocessing_context=method)  # type: ignore[arg-type]
    assert torch.equal(torch.cat(list(loader)), torch.from_numpy(pixels()))


# -- the identity of a source ------------------------------------------------------------------------


def digest(images: Any, targets: Any, batch: int = 100) -> str:
    hasher = SourceHasher()
    for i in range(0, len(images), batch):
        hasher.update(images[i : i + batch], None if targets is None else targets[i : i + batch])
    return hasher.hexdigest()


def test_batching_does_not_matter() -> None:
    images, targets = pixels(), list(range(LENGTH))
    expected = digest(images, targets)
    for batch in (1, 2, 7, 23):
        assert digest(images, targets, batch) == expected
    for other in (list(images), torch.from_numpy(images), list(torch.from_numpy(images))):
        assert digest(other, targets, 5) == expected
    for same in (torch.arange(LENGTH), np.arange(LENGTH), np.arange(LENGTH, dtype=np.int16), tuple(targets)):
        assert digest(images, same, 5) == expected
    assert digest(np.asfortranarray(images), targets) == expected


def test_golden_source() -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    assert digest(images, [3, "a"]) == "779484b40afa955fa48e39e4b82708376f88dc153cec87324b80c56b5b379476"
    assert SourceHasher().hexdigest() == "4d7161a62103f0c6ced24bf374312e348bdb70ededb6fb1ff0d0fc1027994532"


def test_everything_counts() -> None:
    images, targets = pixels(), list(range(LENGTH))
    seen = {digest(images, targets), digest(images, None)}
    for i in (0, 22):
        changed = images.copy()
        changed[i, 3, 5, 2] ^= 1
        seen.add(digest(changed, targets))
        seen.add(digest(images, [*targets[:i], 99, *targets[i + 1 :]]))
    seen.add(digest(images[::-1], targets))
    seen.add(digest(images.reshape(LENGTH, 6, 4, 3), targets))
    seen.add(digest(images[:-1], targets[:-1]))
    seen.add(digest(images.astype(np.float32), targets))
    assert len(seen) == 10


def test_targets_of_different_kinds_differ() -> None:
    image = pixels(1)
    kinds: list[Any] = [
        None,
        0,
        1,
        -1,
        True,
        1.0,
        "1",
        b"1",
        1j,
        2**80,
        [],
        [1],
        [[1]],
        [1, 1],
        ["a", "bc"],
        ["ab", "c"],
        {},
        {"a": 1},
        {"a": 2},
        {1: "a"},
        torch.tensor([1]),
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([[1]]),
        torch.tensor([1.0]),
        torch.tensor([1.0], dtype=torch.bfloat16),
        torch.zeros(0),
    ]
    assert len({digest(image, [kind]) for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ((1, "a"), [1, "a"]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1}, OrderedDict(a=1)),
        (torch.tensor(3), 3),
        (np.float32(0.5), 0.5),
        (np.array(3), np.uint8(3)),
        (np.array([1, 2], dtype=">i4"), torch.tensor([1, 2], dtype=torch.int32)),
        (torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous()),
        (np.str_("x"), "x"),
        (torch.ones(2, requires_grad=True), np.ones(2, np.float32)),
    ],
)
def test_targets_that_are_the_same(one: Any, two: Any) -> None:
    assert digest(pixels(1), [one]) == digest(pixels(1), [two])


@pytest.mark.parametrize(
    "bad", [object(), {1, 2}, np.array([object()]), np.longdouble(1), {"a": [object()]}, lambda: 0]
)
def test_targets_of_unknown_kinds(bad: Any) -> None:
    hasher = SourceHasher()
    before = hasher.hexdigest()
    name = "object" if isinstance(bad, dict) else type(bad).__name__
    with pytest.raises(InputError, match=f"Got {name}"):
        hasher.update(pixels(2), [1, bad])
    assert hasher.hexdigest() == before  # nothing of a refused batch was taken
    assert hasher.count == 0


def test_bad_batches() -> None:
    hasher = SourceHasher()
    for images, targets in (
        (pixels(3), [1, 2]),
        (pixels(3), 1),
        (pixels(3), "abc"),
        (pixels(3), {0: 1, 1: 2, 2: 3}),
        ([object()], [1]),
        ([np.zeros(3, np.uint8)], [1]),
        ([1], [1]),
    ):
        with pytest.raises(InputError, match="Got"):
            hasher.update(images, targets)  # type: ignore[arg-type]
    assert hasher.count == 0
