"""The cache: index for index, byte for byte, through kills, damage and other people's folders."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import logging
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file
from torch.utils.data import DataLoader

from purifyloader.cache import CacheReader, CacheWriter, Layout, Shard, fingerprint, source_hashes
from purifyloader.cache.format import OtherVersionError, read_shard_header
from purifyloader.cache.reader import Targets
from purifyloader.errors import CacheError, ConfigError, InputError
from purifyloader.files.atomic import replacing_folder
from purifyloader.files.locks import Lock
from tests import processes

CONFIG: dict[str, Any] = {"recipe": {"name": "eclipse", "steps": 4, "sigma": 0.025}, "source": "abc"}
LENGTH, SIZE = 23, 5
LAYOUT = Layout(LENGTH, SIZE)
MADE = {"device": "cpu", "torch": "2"}
TYPE = "pil/uint8/3"


def pixels(length: int = LENGTH, shape: tuple[int, ...] = (4, 6, 3), seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (length, *shape), dtype=np.uint8)


def rows(shard: Shard) -> slice:
    return slice(shard.start, shard.start + shard.count)


def write(writer: CacheWriter, shard: Shard, images: Any = None, **values: Any) -> None:
    """A shard of images (of each draw, a list of them), and its part of what is given for the whole dataset."""
    draws = [pixels()] if images is None else images
    parts = {
        name: value[rows(shard)] if isinstance(value, list | np.ndarray) else value for name, value in values.items()
    }
    arguments: dict[str, Any] = {"image_types": TYPE, "sample": None, "targets": None, "source": None, **parts}
    writer.write(shard, [image for draw in draws for image in draw[rows(shard)]], **arguments)


def fill(
    folder: Path,
    layout: Layout = LAYOUT,
    config: dict[str, Any] = CONFIG,
    images: Any = None,
    plan: Any = None,
    notes: Any = None,
    **values: Any,
) -> CacheWriter:
    writer = CacheWriter(folder, config, layout, MADE)
    for shard in writer.pending():
        write(writer, shard, images, **values)
    writer.finish(plan, notes)
    return writer


def pictures(length: int = LENGTH) -> list[NDArray[np.uint8]]:
    """Of many sizes, of 1 to 4 channels."""
    return [pixels(1, (1 + i % 5, 2 + i % 3, 1 + i % 4), i)[0] for i in range(length)]


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


def canonical(value: Any) -> str:
    """As the format's description says it, without the library."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


# -- what goes in comes out --------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", [1, 5, 23, 1024])
@pytest.mark.parametrize("in_memory", [False, True])
def test_round_trip(tmp_path: Path, shard_size: int, in_memory: bool) -> None:
    fill(tmp_path, Layout(LENGTH, shard_size))
    reader = CacheReader(tmp_path, CONFIG, in_memory)
    reader.verify()
    assert len(reader) == LENGTH
    assert reader.layout == Layout(LENGTH, shard_size, 1, "raw")
    assert reader.image_shape == (4, 6, 3)
    assert reader.config == CONFIG
    assert reader.plan is None
    assert reader.image_types() == [TYPE] * LENGTH
    assert (reader.sample, reader.targets, reader.source_hashes()) == (None, None, None)
    for i, image in enumerate(pixels()):
        assert reader[i].dtype == np.uint8
        assert np.array_equal(reader[i], image)
        assert np.array_equal(reader.row(i), image)
    order = [7, 0, -1, 7]
    assert np.array_equal(np.stack(reader.get(order)), pixels()[order])
    for _ in range(2):  # by the second time every image was checked
        assert np.array_equal(reader.batch(order), pixels()[order])
        assert np.array_equal(reader.batch(range(LENGTH)), pixels())
    assert reader.get([]) == []
    assert reader.batch([]).shape == (0, 4, 6, 3)
    assert len(list(reader)) == LENGTH  # IndexError ends an iteration


def test_default_shard_size(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, CONFIG, Layout(2500))
    assert writer.shards == (Shard(0, 0, 1024), Shard(1, 1024, 1024), Shard(2, 2048, 452))
    assert [s.file for s in writer.shards] == [f"shard-0000{i}.safetensors" for i in range(3)]


def test_indices(cache: Path) -> None:
    for reader in (CacheReader(cache), CacheReader(cache, in_memory=True)):
        assert np.array_equal(reader[-23], pixels()[0])
        assert np.array_equal(reader[torch.tensor(3)], pixels()[3])
        assert np.array_equal(reader[np.int64(3)], pixels()[3])
        for read in (lambda i, r=reader: r[i], lambda i, r=reader: r.get([0, i]), lambda i, r=reader: r.batch([0, i])):
            for i in (23, -24, 10**20):
                with pytest.raises(IndexError, match=f"Got index {i}"):
                    read(i)
            for bad in (1.0, slice(2), "1", None):
                with pytest.raises(InputError, match="one integer"):
                    read(bad)


@pytest.mark.parametrize("in_memory", [False, True])
def test_rows_are_copies(cache: Path, in_memory: bool) -> None:
    reader = CacheReader(cache, in_memory=in_memory)
    before = contents(cache)
    for got in (reader[0], reader.get([0])[0], reader.batch([0])):
        assert got.flags.owndata or got.base is not None
        assert got.flags.writeable
        got[:] = 0
        assert np.array_equal(reader[0], pixels()[0])
    assert contents(cache) == before


def test_an_array_and_a_list_of_strided_views_are_the_same(cache: Path, tmp_path: Path) -> None:
    nchw = np.ascontiguousarray(pixels().transpose(0, 3, 1, 2))
    writer = CacheWriter(tmp_path / "again", CONFIG, LAYOUT, MADE)
    for shard in writer.pending():
        images = nchw[rows(shard)].transpose(0, 2, 3, 1)
        given = images if shard.number % 2 else list(images)
        writer.write(shard, given, image_types=[TYPE] * shard.count, sample=None, targets=None, source=None)
    writer.finish()
    assert contents(tmp_path / "again") == contents(cache)


def test_files_are_byte_stable(cache: Path, tmp_path: Path) -> None:
    fill(tmp_path / "again", config=dict(reversed(CONFIG.items())))
    assert contents(cache) == contents(tmp_path / "again")


def test_a_shard_is_an_ordinary_safetensors_file(cache: Path) -> None:
    assert np.array_equal(load_file(cache / "shard-00001.safetensors")["images"], pixels()[5:10])


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_draws(tmp_path: Path, in_memory: bool, encoding: str) -> None:
    images = [pixels(seed=k) for k in range(3)]
    fill(tmp_path, Layout(LENGTH, SIZE, 3, encoding), images=images)
    reader = CacheReader(tmp_path, CONFIG, in_memory)
    assert reader.draws == 3
    assert len(reader) == LENGTH
    for _ in range(2):
        for k, draw in enumerate(images):
            assert np.array_equal(np.stack([reader.row(i, k) for i in range(LENGTH)]), draw)
            assert np.array_equal(reader.batch(range(LENGTH), k), draw)
            assert np.array_equal(np.stack(reader.get([22, 0], k)), draw[[22, 0]])
    assert np.array_equal(reader[7], images[0][7])
    for bad in (3, 100):
        with pytest.raises(IndexError):
            reader.row(0, bad)
    stored = load_file(tmp_path / "shard-00004.safetensors")
    if encoding == "raw":  # all of one draw, then all of the next
        assert np.array_equal(stored["images"], np.concatenate([draw[20:] for draw in images]))


@pytest.mark.parametrize("in_memory", [False, True])
def test_png_takes_any_sizes_and_channels(tmp_path: Path, in_memory: bool) -> None:
    images = pictures()
    layout = Layout(LENGTH, SIZE, 1, "png")
    fill(tmp_path / "a", layout, images=[images], image_types=[f"numpy/uint8/{2 + i % 2}" for i in range(LENGTH)])
    reader = CacheReader(tmp_path / "a", CONFIG, in_memory)
    assert reader.image_shape is None
    assert reader.image_types() == [f"numpy/uint8/{2 + i % 2}" for i in range(LENGTH)]
    for _ in range(2):
        for got, image in zip(reader.get(range(LENGTH)), images, strict=True):
            assert got.dtype == np.uint8
            assert np.array_equal(got, image)
    assert np.array_equal(reader.batch([3, 3]), np.stack([images[3]] * 2))
    with pytest.raises(InputError, match="one size"):
        reader.batch([0, 1])
    # the files are PNGs that anybody reads, and the same bytes each time
    header = read_shard_header(tmp_path / "a/shard-00000.safetensors")
    assert header.sizes is not None
    data = load_file(tmp_path / "a/shard-00000.safetensors")["encoded"].tobytes()
    ends = [0, *itertools.accumulate(header.sizes.tolist())]
    assert ends[-1] == len(data)
    for image, (a, b) in zip(images, itertools.pairwise(ends), strict=False):
        png = Image.open(io.BytesIO(data[a:b]))
        assert png.format == "PNG"
        assert np.array_equal(np.atleast_3d(np.asarray(png)), image)
    fill(tmp_path / "b", layout, images=[images], image_types=[f"numpy/uint8/{2 + i % 2}" for i in range(LENGTH)])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# -- the format, byte for byte -----------------------------------------------------------------------


def safetensors_bytes(metadata: dict[str, Any], name: str, shape: list[int], data: bytes) -> bytes:
    """A shard as README.md describes it, made without the library."""
    metadata = {**metadata, "sha256": sha256(canonical(metadata))}
    header = (
        '{"__metadata__":{"purifyloader":' + json.dumps(canonical(metadata)) + "},"
        f'"{name}":{{"dtype":"U8","shape":{json.dumps(shape, separators=(",", ":"))},"data_offsets":[0,{len(data)}]}}}}'
    )
    padded = header + " " * (-len(header) % 8)
    return len(padded).to_bytes(8, "little") + padded.encode() + data


def test_golden_bytes_of_a_shard(tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(4, 1, 2, 3)
    hashes = np.array([[1, 2**64 - 1], [0xAB, 3]], np.uint64)
    writer = CacheWriter(tmp_path, {"a": 1}, Layout(2, draws=2), {"device": "cpu"})
    writer.write(
        writer.shards[0],
        images,
        image_types=["pil/uint8/3", "tensor/uint8/3"],
        sample={"type": "tuple", "image": 0, "fields": 2},
        targets=[7, (1, float("nan"))],
        source=hashes,
    )
    metadata = {
        "config": {"a": 1},
        "count": 2,
        "crc32": [zlib.crc32(bytes(range(k, k + 6))) for k in (0, 6, 12, 18)],
        "fingerprint": "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862",
        "format": "purifyloader-cache",
        "image_types": ["pil/uint8/3", "tensor/uint8/3"],
        "layout": {"draws": 2, "encoding": "raw", "length": 2, "shard_size": 1024},
        "made": {"device": "cpu"},
        "sample": {"fields": 2, "image": 0, "type": "tuple"},
        "shard": 0,
        "sizes": None,
        "source": ["000000000000000100000000000000ab", "ffffffffffffffff0000000000000003"],
        "start": 0,
        "targets": [7, {"$tuple": [1, {"$float": "nan"}]}],
        "tensor_sha256": sha256(bytes(range(24))),
        "version": 3,
    }
    expected = safetensors_bytes(metadata, "images", [4, 1, 2, 3], bytes(range(24)))
    assert (tmp_path / "shard-00000.safetensors").read_bytes() == expected


def test_golden_bytes_of_an_encoded_shard(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, {"a": 1}, Layout(3, 2, 1, "png"))
    image = np.zeros((2, 3, 1), np.uint8)
    writer.write(writer.shards[1], [image], image_types="pil/uint8/2", sample=None, targets=None, source=None)

    file = io.BytesIO()
    Image.new("L", (3, 2)).save(file, "PNG", compress_level=1)
    png = file.getvalue()
    metadata = {
        "config": {"a": 1},
        "count": 1,
        "crc32": [zlib.crc32(png)],
        "fingerprint": sha256('{"a":1}'),
        "format": "purifyloader-cache",
        "image_types": "pil/uint8/2",
        "layout": {"draws": 1, "encoding": "png", "length": 3, "shard_size": 2},
        "made": {},
        "sample": None,
        "shard": 1,
        "sizes": [len(png)],
        "source": None,
        "start": 2,
        "targets": None,
        "tensor_sha256": sha256(png),
        "version": 3,
    }
    expected = safetensors_bytes(metadata, "encoded", [len(png)], png)
    assert (tmp_path / "shard-00001.safetensors").read_bytes() == expected


def test_golden_index(tmp_path: Path) -> None:
    hashes = np.array([[1, 2], [3, 4], [5, 6]], np.uint64)
    for shard, device in zip(Layout(3, 2).shards, ("cuda", "cpu"), strict=True):
        writer = CacheWriter(tmp_path, {"a": 1}, Layout(3, 2), {"device": device}, allow_mixed_devices=True)
        write(writer, shard, [np.zeros((3, 1, 1, 3), np.uint8)], source=hashes)
    writer.finish({"indices": (0,)}, {"classes": ["é"]})
    text = (tmp_path / "index.json").read_text()
    files = [tmp_path / f"shard-0000{n}.safetensors" for n in (0, 1)]
    headers = [
        json.loads(json.loads(f.read_bytes()[8:].split(b"\0", 1)[0])["__metadata__"]["purifyloader"]) for f in files
    ]
    identity = {
        "format": "purifyloader-cache",
        "version": 3,
        "config": {"a": 1},
        "length": 3,
        "source": {
            "images": sha256(struct.pack(">3Q", 1, 3, 5)),
            "targets": sha256(struct.pack(">3Q", 2, 4, 6)),
        },
        "devices": ["cpu", "cuda"],
    }
    values = {
        "format": "purifyloader-cache",
        "version": 3,
        "identity": identity,
        "fingerprint": sha256(canonical(identity)),
        "layout": {"length": 3, "shard_size": 2, "draws": 1, "encoding": "raw"},
        "image_shape": [1, 1, 3],
        "shards": [
            {"file": f.name, "count": n, "sha256": sha256(f.read_bytes()), "header": header["sha256"]}
            for f, n, header in zip(files, (2, 1), headers, strict=True)
        ],
        "made": [{"device": "cpu", "shards": 1}, {"device": "cuda", "shards": 1}],
        "notes": {"classes": ["é"]},
        "plan": {"indices": [0]},
    }
    assert text == canonical({**values, "sha256": sha256(canonical(values))}) + "\n"
    reader = CacheReader(tmp_path)
    assert reader.fingerprint == fingerprint(identity)
    assert reader.identity == identity


def test_fingerprint() -> None:
    assert fingerprint({"a": 1}) == sha256('{"a":1}')
    assert fingerprint({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert fingerprint({"b": (1, 2), "a": "é"}) == sha256('{"a":"\\u00e9","b":[1,2]}')
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.0})
    for bad in ({"a": float("nan")}, {"a": object()}, {"a": torch.zeros(1)}, [1]):
        with pytest.raises(ConfigError, match="Got"):
            fingerprint(bad)  # type: ignore[arg-type]


def test_the_fingerprint_is_of_what_decides_the_pixels(tmp_path: Path) -> None:
    """Layout, versions, notes and plan do not count; configuration, source and kind of device do."""
    hashes = source_hashes(pixels(), list(range(LENGTH)))
    changed = hashes.copy()
    changed[22, 1] ^= np.uint64(1)

    def of(name: str, **values: Any) -> str:
        fill(tmp_path / name, **{"source": hashes, **values})
        return CacheReader(tmp_path / name).fingerprint

    same = of("a")
    assert of("b", layout=Layout(LENGTH, 7), notes={"a": 1}, plan={"b": 2}) == same
    assert of("c", layout=Layout(LENGTH, 7, 1, "png")) == same
    others = [of("d", source=changed), of("e", config=OTHER), of("f", source=None)]
    writer = CacheWriter(tmp_path / "g", CONFIG, LAYOUT, {**MADE, "device": "cuda"})
    for shard in writer.shards:
        write(writer, shard, source=hashes)
    writer.finish()
    others.append(CacheReader(tmp_path / "g").fingerprint)
    writer = CacheWriter(tmp_path / "h", CONFIG, LAYOUT, {**MADE, "torch": "3"})
    for shard in writer.shards:
        write(writer, shard, source=hashes)
    writer.finish()
    assert CacheReader(tmp_path / "h").fingerprint == same
    assert len({same, *others}) == 5


# -- what a cache holds beside its images ------------------------------------------------------------

KINDS: list[Any] = [
    None,
    3,
    2**70,
    True,
    0.5,
    float("inf"),
    "text",
    b"bytes",
    (1, "a"),
    [1, [2]],
    {"z": 1, "a": (2,)},
    {3: "c"},
    np.int64(4),
    np.float32(0.1),
    torch.tensor([[1.0, float("nan")]]),
    torch.tensor(3, dtype=torch.bfloat16),
    torch.zeros(0, 4),
    np.arange(6, dtype=">i2").reshape(2, 3),
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
]


def same(a: Any, b: Any) -> bool:
    """The same type and value: what pickles alike, and arrays by their numbers."""
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return type(a) is type(b) and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("in_memory", [False, True])
def test_targets_come_back(tmp_path: Path, in_memory: bool) -> None:
    sample = {"type": "tuple", "image": 0, "fields": 2}
    layout = Layout(len(KINDS), 4)
    hashes = source_hashes(pixels(len(KINDS)), [None] * len(KINDS))
    fill(tmp_path, layout, images=[pixels(len(KINDS))], targets=KINDS, sample=sample, source=hashes)
    reader = CacheReader(tmp_path, in_memory=in_memory)
    for again in (reader, pickle.loads(pickle.dumps(reader))):
        assert again.sample == sample
        assert again.targets is not None
        assert len(again.targets) == len(KINDS)
        assert again.targets.integers is None
        for i, kind in enumerate(KINDS):
            assert same(again.targets[i], kind), kind
        assert same(again.targets.get([3, 0]), [True, None])
        assert same(again.targets[1:4], KINDS[1:4])
        assert np.array_equal(again.source_hashes(), hashes)


def test_class_labels_are_kept_as_an_array(tmp_path: Path) -> None:
    labels = [(7 * i) % 10 - 2 for i in range(LENGTH)]
    fill(tmp_path, targets=labels, sample={"type": "tuple", "image": 0, "fields": 2})
    targets = CacheReader(tmp_path).targets
    assert targets is not None
    assert targets.integers is not None
    assert targets.integers.dtype == np.int64
    assert targets.integers.tolist() == list(targets) == labels
    assert {type(t) for t in (*targets, *targets.get([0, 1]), *targets[2:9])} == {int}
    assert targets[-1] == labels[-1]
    assert targets[3:15:4] == labels[3:15:4]
    assert targets.get([5, 0, 5]) == [labels[5], labels[0], labels[5]]
    with pytest.raises(IndexError):
        targets[LENGTH]


@pytest.mark.parametrize("values", [[0, 1, True], [1, 2.0], [1, 2**63], [1, None], ["1"]])
def test_what_is_no_array_of_integers(values: list[Any]) -> None:
    targets = Targets(values)
    assert targets.integers is None
    assert same(list(targets), values)
    assert same(targets.get([len(values) - 1]), values[-1:])
    assert Targets([-(2**63), 2**63 - 1]).integers is not None


@pytest.mark.parametrize("bad", [object(), {1, 2}, torch.ones(1, requires_grad=True)])
def test_targets_that_cannot_be_stored(tmp_path: Path, bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One of them is enough, and the images are kept all the same."""
    targets = [*range(7), bad, *range(8, LENGTH)]
    with caplog.at_level(logging.WARNING, "purifyloader"):
        fill(tmp_path, targets=targets)
    (record,) = caplog.records
    assert type(bad).__qualname__ in record.getMessage()
    reader = CacheReader(tmp_path)
    assert reader.targets is None
    assert np.array_equal(reader.batch(range(LENGTH)), pixels())


def test_samples_that_differ_between_shards(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, CONFIG, LAYOUT)
    for shard in writer.shards:
        write(writer, shard, sample={"type": "image"} if shard.number else {"type": "dict", "image": "image"})
    writer.finish()
    assert CacheReader(tmp_path).sample is None


def test_a_plan_and_notes_are_kept(cache: Path) -> None:
    plan, notes = {"labels": {"3": 7}, "indices": [1, 2]}, {"classes": ["a"]}
    fill(cache, plan=plan, notes=notes)
    assert CacheReader(cache).plan == plan
    assert CacheReader(cache).index.notes == notes
    fill(cache)  # as every later start does
    assert CacheReader(cache).plan == plan
    assert CacheReader(cache).index.notes == notes
    fill(cache, plan={})
    assert CacheReader(cache).plan == {}
    for bad in ([1], {"a": float("nan")}, {"a": {1}}):
        with pytest.raises(ConfigError, match="plan"):
            fill(cache, plan=bad)
        with pytest.raises(ConfigError, match=r"[Nn]otes"):
            fill(cache, notes=bad)
    assert CacheReader(cache).plan == {}


def test_what_it_was_made_with(tmp_path: Path) -> None:
    for number in range(5):
        writer = CacheWriter(tmp_path, CONFIG, LAYOUT, {"device": "cpu", "torch": "1" if number == 3 else "2"})
        write(writer, writer.shards[number])
    writer.finish()
    index = CacheReader(tmp_path).index
    assert list(index.made) == [
        {"device": "cpu", "torch": "1", "shards": 1},
        {"device": "cpu", "torch": "2", "shards": 4},
    ]
    assert index.identity["devices"] == ["cpu"]
    with pytest.raises(ConfigError, match="made with"):
        CacheWriter(tmp_path, CONFIG, LAYOUT, {"device": torch.device("cpu")})


def test_finishing_a_finished_cache_writes_nothing(cache: Path) -> None:
    before = (cache / "index.json").stat()
    fill(cache)
    after = (cache / "index.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


# -- interruption ------------------------------------------------------------------------------------


def fill_of_this_process(folder: Path) -> None:
    fill(folder)


def test_kill_and_resume(cache: Path, tmp_path: Path) -> None:
    """SIGKILL while the third shard stands beside its place, written but not linked into it."""
    folder = tmp_path / "killed"
    result = processes.run(fill_of_this_process, folder, kill_at="os:link", kill_call=4)
    assert result.returncode == -signal.SIGKILL
    names = sorted(os.listdir(folder))
    shards = ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert [n for n in names if not n.startswith(".")] == ["claim.json", *shards]
    assert len(names) == 4
    with pytest.raises(CacheError, match=r"unfinished \(2 of 5 shards\)"):
        CacheReader(folder)
    kept = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    writer = CacheWriter(folder, CONFIG, LAYOUT)
    assert [s.number for s in writer.pending()] == [2, 3, 4]
    fill(folder)
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert {k: v for k, v in contents(folder).items() if not k.startswith(".")} == contents(cache)


def test_two_writers_share_a_folder(tmp_path: Path) -> None:
    ranks = [CacheWriter(tmp_path, CONFIG, LAYOUT) for _ in range(2)]
    for rank, writer in enumerate(ranks):
        for shard in writer.shards[rank::2]:
            write(writer, shard)
        if rank == 0:
            with pytest.raises(CacheError, match=r"Got 3 in .*shard-00001.safetensors, shard-00003"):
                writer.finish()
    for writer in ranks:
        assert writer.pending() == []
        writer.finish()
    assert np.array_equal(np.stack(CacheReader(tmp_path).get(range(LENGTH))), pixels())


@pytest.mark.parametrize("claimed", [False, True])
def test_a_failed_write_leaves_nothing(tmp_path: Path, claimed: bool) -> None:
    """What a full disk does, by a limit on the size of files."""
    writer = CacheWriter(tmp_path, CONFIG, LAYOUT)
    if claimed:
        writer.claim()
    before, file = contents(tmp_path), "shard-00000" if claimed else "claim.json"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(CacheError, match=rf"Could not write .*{file}.*Got: [\s\S]*what is finished is kept"):
            write(writer, writer.shards[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {k: v for k, v in contents(tmp_path).items() if k != ".claim.json.lock"} == before
    write(writer, writer.shards[0])
    assert writer.is_done(writer.shards[0])


def test_what_is_done_and_present(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, CONFIG, LAYOUT)
    assert writer.present() == 0
    assert not writer.is_done(writer.shards[4])
    for number, images in ((4, 3), (0, 8), (2, 13)):
        write(writer, writer.shards[number])
        assert writer.is_done(writer.shards[number])
        assert writer.present() == images
    assert writer.present([]) == 0
    assert writer.present(["shard-00001.safetensors", "index.json"]) == 5
    assert not writer.is_finished()
    other = CacheWriter(tmp_path, CONFIG, LAYOUT)
    flip(tmp_path / "shard-00000.safetensors", -1)
    assert other.present() == 13  # by the names alone
    assert not other.is_done(other.shards[0])
    for shard in other.pending():
        write(other, shard)
    other.finish()
    assert writer.is_finished()
    assert writer.present() == LENGTH


def test_a_file_that_is_verified_is_read_once_while_it_does_not_change(cache: Path) -> None:
    """A start of a finished cache reads every byte once, not once for each question."""
    writer = CacheWriter(cache, CONFIG, LAYOUT)
    path = cache / "shard-00001.safetensors"
    assert writer.pending() == []
    stat = path.stat()
    flip(path, -1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # damage that no stat shows is found by a new start
    assert writer.is_done(writer.shards[1])
    assert not CacheWriter(cache, CONFIG, LAYOUT).is_done(writer.shards[1])
    os.utime(path)
    assert [s.number for s in writer.pending()] == [1]


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_tidy_removes_what_killed_runs_left_and_nothing_else(cache: Path) -> None:
    before = contents(cache)
    mine = [".DS_Store", ".nfs0001", ".shard-1.safetensors.x.tmp", ".shard-00001.safetensors", ".notes.tmp"]
    in_work = [".shard-00002.safetensors.lock", ".shard-00002.safetensors.a1.tmp"]
    left = [
        ".shard-00001.safetensors.x.tmp",
        ".shard-00001.safetensors.lock",
        ".shard-00003.safetensors.lock",
        ".shard-00004.safetensors.y.tmp",
        ".shard-00004.safetensors.z.tmp",
        ".index.json.x.tmp",
        ".index.json.lock",
    ]
    for name in (*mine, *in_work, *left):
        (cache / name).write_text(name)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(cache / in_work[0])], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        writer = CacheWriter(cache, CONFIG, LAYOUT)
        with Lock(cache, "index.json") as lock:
            writer.tidy(lock)
        assert set(contents(cache)) == {*before, *mine, *in_work}
    finally:
        holder.kill()
        holder.communicate()
    with Lock(cache, "index.json") as lock:
        writer.tidy(lock)
    assert set(contents(cache)) == {*before, *mine}
    assert {k: v for k, v in contents(cache).items() if k not in mine} == before


def test_tidy_of_one_shard(cache: Path) -> None:
    names = [".shard-00001.safetensors.x.tmp", ".shard-00002.safetensors.x.tmp", ".shard-00001.safetensors.lock"]
    for name in names:
        (cache / name).touch()
    writer = CacheWriter(cache, CONFIG, LAYOUT)
    with writer.lock(writer.shards[1]) as lock:
        lock.real = False  # as on a file system without locks, where another may be writing it all the same
        writer.tidy_shard(writer.shards[1], lock)
        assert all((cache / name).exists() for name in names)
        lock.real = True
        writer.tidy_shard(writer.shards[1], lock)
    assert [name for name in names if (cache / name).exists()] == names[1:]


def test_devices_that_meet_in_an_empty_folder(tmp_path: Path) -> None:
    """The second one is refused. Where the first allowed it, as before folders were claimed, only the whole tells."""
    writers = [CacheWriter(tmp_path, CONFIG, LAYOUT, {"device": device}) for device in ("cpu", "cuda")]
    write(writers[0], LAYOUT.shards[0])
    with pytest.raises(CacheError, match=r"Got 'cuda' for .*, whose claim\.json was made on 'cpu'"):
        write(writers[1], LAYOUT.shards[1])
    mixed = CacheWriter(tmp_path, CONFIG, LAYOUT, {"device": "cuda"}, allow_mixed_devices=True)
    for shard in mixed.pending():
        write(mixed, shard)
    with pytest.raises(CacheError, match=r"one kind of device.*Got cpu and cuda.*allow_mixed_devices=True"):
        writers[0].finish()
    assert not (tmp_path / "index.json").exists()
    CacheWriter(tmp_path, CONFIG, LAYOUT, {"device": "cpu"}, allow_mixed_devices=True).finish()
    assert CacheReader(tmp_path).identity["devices"] == ["cpu", "cuda"]


def test_targets_too_large_for_a_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Masks, which a reader would hold all at once: the cache is read with its source."""
    masks = [np.zeros((1500, 2000), np.uint8)] * 10
    writer = CacheWriter(tmp_path, CONFIG, Layout(10, 5), MADE)
    with caplog.at_level(logging.WARNING, "purifyloader"):
        for shard in writer.pending():
            write(writer, shard, targets=masks)
    assert [r.message for r in caplog.records if "20 MB a shard" in r.message] == [r.message for r in caplog.records]
    assert len(caplog.records) == 1, "said once, not for every shard"
    writer.finish()
    assert CacheReader(tmp_path).targets is None


def test_a_file_that_is_replaced_is_checked_again(cache: Path) -> None:
    """What was found right was found so in the file that was there; a later worker maps another."""
    reader = CacheReader(cache)
    assert len(reader.get(range(LENGTH))) == LENGTH
    path = cache / "shard-00001.safetensors"
    os.utime(path, ns=(1, 1))
    flip(path, -1)
    later = pickle.loads(pickle.dumps(reader))
    later.get([0, 4, 5, 22])
    with pytest.raises(CacheError, match="image 9 with another checksum"):
        later.batch([0, 9])
    assert np.array_equal(reader[22], later[22])


def test_one_kind_of_device(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    CacheWriter(tmp_path, CONFIG, LAYOUT, {"device": "cuda", "torch": "2"}).check_same_device()  # nothing there yet
    first = CacheWriter(tmp_path, CONFIG, LAYOUT, {"device": "cuda", "torch": "2"})
    write(first, first.shards[1])
    for file in ("claim.json", "shard-00001.safetensors"):
        with pytest.raises(CacheError) as caught:
            CacheWriter(tmp_path, CONFIG, LAYOUT, MADE).check_same_device()
        for part in ("'cpu'", f"{file} was made on 'cuda'", "device='cuda'", "allow_mixed_devices=True"):
            assert part in str(caught.value)
        (tmp_path / "claim.json").unlink(missing_ok=True)  # as in folders of before
    with caplog.at_level(logging.WARNING, "purifyloader"):
        first.check_same_device()
        assert not caplog.records
        CacheWriter(tmp_path, CONFIG, LAYOUT, {"device": "cuda", "torch": "3"}).check_same_device()
    (record,) = caplog.records
    assert 'torch: "2" → "3"' in record.getMessage()
    (tmp_path / "shard-00000.safetensors").write_bytes(b"damaged")  # is made again, and says nothing
    CacheWriter(tmp_path, CONFIG, LAYOUT, {"device": "cuda", "torch": "2"}).check_same_device()


# -- damage ------------------------------------------------------------------------------------------


def damaged_image(folder: Path, image: int, draw: int = 0) -> Path:
    """One byte of one image's row is flipped."""
    number, local = divmod(image, SIZE)
    path = folder / f"shard-{number:05d}.safetensors"
    header = read_shard_header(path)
    at = draw * header.shard.count + local
    size = header.sizes[at] if header.sizes is not None else int(np.prod(header.image_shape))
    start = header.sizes[:at].sum() if header.sizes is not None else at * size
    flip(path, int(header.offset + start + size // 2))
    return path


READS: dict[str, Callable[[CacheReader, int, int], Any]] = {
    "item": lambda reader, i, draw: reader[i] if draw == 0 else reader.get([i], draw),
    "row": lambda reader, i, draw: reader.row(i, draw),
    "get": lambda reader, i, draw: reader.get([i], draw),
    "batch": lambda reader, i, draw: reader.batch([i], draw),
    "batch of two": lambda reader, i, draw: reader.batch([i, i], draw),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("damaged", [(0, 0), (7, 1), (22, 1), (19, 0)])
def test_one_damaged_image(tmp_path: Path, read: str, encoding: str, damaged: tuple[int, int]) -> None:
    """It is an error that names it, never a picture; every other image is read as before."""
    images = [pixels(seed=k) for k in range(2)]
    fill(tmp_path, Layout(LENGTH, SIZE, 2, encoding), images=images)
    path = damaged_image(tmp_path, *damaged)
    reader = CacheReader(tmp_path)  # opening does not hash
    for _ in range(2):
        for draw in range(2):
            for i in range(LENGTH):
                if (i, draw) == damaged:
                    with pytest.raises(CacheError, match=rf"{path.name}.*Got image {i} with another checksum"):
                        READS[read](reader, i, draw)
                else:
                    assert np.array_equal(
                        np.asarray(READS[read](reader, i, draw)).reshape(-1, 4, 6, 3)[0], images[draw][i]
                    )
    with pytest.raises(CacheError, match=rf"{path.name}"):
        reader.batch(range(LENGTH), damaged[1])
    with pytest.raises(CacheError, match=rf"{path.name}.*damaged"):
        CacheReader(tmp_path, in_memory=True)


@pytest.mark.parametrize("at", [-1, -200])
def test_flipped_pixel(cache: Path, at: int) -> None:
    before = contents(cache)
    flip(cache / "shard-00001.safetensors", at)
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors"):
        CacheReader(cache).verify()
    assert [s.number for s in CacheWriter(cache, CONFIG, LAYOUT).pending()] == [1]
    fill(cache)
    reader = CacheReader(cache)
    reader.verify()
    assert np.array_equal(reader[6], pixels()[6])
    assert contents(cache) == before


def test_flipped_header(cache: Path) -> None:
    """Wherever it is: the reader refuses it, and the writer makes the shard again, also where it now says version 2.
    Only a shard that says a version which is not read is left alone."""
    path = cache / "shard-00001.safetensors"
    before, good = contents(cache), path.read_bytes()
    offset = read_shard_header(path).offset
    version = good.index(b'version\\":3') + len(b'version\\":')
    for at in [*range(0, offset, 29), offset - 1, version]:
        path.write_bytes(good)
        flip(path, at)
        with pytest.raises(CacheError, match=r"shard-00001\.safetensors"):
            CacheReader(cache)
        fill(cache)
        assert contents(cache) == before, at
    path.write_bytes(good[:version] + b"7" + good[version + 1 :])
    with pytest.raises(OtherVersionError, match=r"of version 2 or 3\. Got version 7"):
        CacheWriter(cache, CONFIG, LAYOUT)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(cache: Path, keep: int) -> None:
    path = cache / "shard-00004.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheError, match=r"shard-00004\.safetensors.*damaged"):
        CacheReader(cache)
    before = CacheWriter(cache, CONFIG, LAYOUT).pending()
    assert [s.number for s in before] == [4]
    fill(cache)
    CacheReader(cache).verify()


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_shard_that_shrinks_after_opening(cache: Path, in_memory: bool) -> None:
    reader = CacheReader(cache, in_memory=in_memory)
    path = cache / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    if in_memory:
        assert np.array_equal(reader.batch(range(LENGTH)), pixels())
        return
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors"):
        reader[0]


def test_in_memory_needs_no_files(cache: Path, tmp_path: Path) -> None:
    reader = CacheReader(cache, in_memory=True)
    cache.rename(tmp_path / "away")
    assert np.array_equal(reader.batch(range(LENGTH)), pixels())
    with pytest.raises(CacheError, match=r"shard-0000"):
        pickle.loads(pickle.dumps(reader))  # another process reads its own copy


def test_missing_and_swapped_shards(cache: Path) -> None:
    data = (cache / "shard-00001.safetensors").read_bytes()
    (cache / "shard-00001.safetensors").write_bytes((cache / "shard-00002.safetensors").read_bytes())
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors must hold images 5 to 9"):
        CacheReader(cache)
    assert [s.number for s in CacheWriter(cache, CONFIG, LAYOUT).pending()] == [1]
    (cache / "shard-00001.safetensors").unlink()
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors is missing"):
        CacheReader(cache)
    (cache / "shard-00001.safetensors").write_bytes(data)
    CacheReader(cache).verify()


def test_remaking_a_shard_unfinishes_the_cache_unless_it_is_the_same(cache: Path) -> None:
    before = contents(cache)
    writer = CacheWriter(cache, CONFIG, LAYOUT, MADE)
    write(writer, writer.shards[0])
    assert contents(cache) == before
    write(writer, writer.shards[0], [pixels(seed=1)])
    with pytest.raises(CacheError, match=r"unfinished \(5 of 5 shards\)"):
        CacheReader(cache)
    writer.finish()
    CacheReader(cache).verify()
    write(writer, writer.shards[1], targets=[0] * LENGTH)  # the same pixels and other targets
    assert not (cache / "index.json").exists()


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('"length":23', '"length":22', "whole index"),
        ('"abc"', '"abd"', "whole index"),
        ('"plan":null', '"plan":{"labels":{"0":1}}', "whole index"),
        ('"shards":[{', '"shards":[{"a":1},{', "whole index"),
        ("shard-00000", "../hard-000", "whole index"),
        ('"format":"purifyloader-cache","identity', '"format":"other","identity', "its format is 'other'"),
        ("{", "", "whole index"),
        ('"fingerprint"', '"fingerprinT"', "whole index"),
    ],
)
def test_a_damaged_index_is_made_again(cache: Path, old: str, new: str, part: str, caplog: Any) -> None:
    path = cache / "index.json"
    good = path.read_text()
    assert old in good
    path.write_text(good.replace(old, new, 1))
    with pytest.raises(CacheError, match=rf"index\.json.*{part}"):
        CacheReader(cache)
    times = {p: p.stat().st_mtime_ns for p in cache.glob("shard-*")}
    with caplog.at_level(logging.WARNING, "purifyloader"):
        fill(cache)
    assert any("index.json will be made again" in record.getMessage() for record in caplog.records)
    assert path.read_text() == good
    assert times == {p: p.stat().st_mtime_ns for p in cache.glob("shard-*")}  # out of the shards that are there


def test_flipped_index(cache: Path) -> None:
    """Wherever it is: the reader refuses it and the writer makes it again, also where it now says version 2."""
    path = cache / "index.json"
    good = path.read_bytes()
    version = good.rindex(b'"version":3') + len(b'"version":')
    for at in [*range(0, len(good), 29), len(good) - 1, version]:
        path.write_bytes(good)
        flip(path, at)
        with pytest.raises(CacheError, match=r"index\.json"):
            CacheReader(cache)
        fill(cache)
        assert path.read_bytes() == good, at


@pytest.mark.parametrize("version", [1, 4, "3", None])
@pytest.mark.parametrize("shards", [True, False])
def test_an_index_of_another_version_is_left_alone(cache: Path, version: Any, shards: bool) -> None:
    path = cache / "index.json"
    if shards:
        path.write_text(path.read_text().replace('"version":3}', f'"version":{json.dumps(version)}}}'))
        values = json.loads(path.read_text())
    else:
        for shard in cache.glob("shard-*"):
            shard.unlink()
        values = {**json.loads(path.read_text())}
    path.write_text(canonical({**values, "version": version}))
    before = contents(cache)
    for opening in (lambda: CacheReader(cache), lambda: CacheWriter(cache, CONFIG, LAYOUT)):
        with pytest.raises(
            OtherVersionError, match=r"index\.json must be of version 2 or 3\. Got version[\s\S]*that wrote it"
        ):
            opening()
    assert contents(cache) == before


def test_shards_of_another_version_are_left_alone(cache: Path) -> None:
    """An unfinished cache of version 1, whose shards have other fields."""
    metadata = {"config": {"a": 1}, "count": 5, "format": "purifyloader-cache", "length": 23, "shard": 1, "version": 1}
    path = cache / "shard-00001.safetensors"
    path.write_bytes(safetensors_bytes(metadata, "images", [5, 4, 6, 3], bytes(360)))
    (cache / "index.json").unlink()
    before = contents(cache)
    with pytest.raises(OtherVersionError, match=r"shard-00001\.safetensors.*Got version 1[\s\S]*precompute again"):
        CacheWriter(cache, CONFIG, LAYOUT)
    assert contents(cache) == before


def test_an_index_of_something_else_is_not_ours(tmp_path: Path) -> None:
    for text in ('{"format":"other"}', "[]", "{", "null"):
        (tmp_path / "index.json").write_text(text)
        for opening in (lambda: CacheReader(tmp_path), lambda: CacheWriter(tmp_path, CONFIG, LAYOUT)):
            with pytest.raises(CacheError, match=r"index\.json is (not the index of a cache|damaged)"):
                opening()
        assert contents(tmp_path) == {"index.json": text.encode()}


def test_no_cache_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(CacheError, match=r"index\.json.*Got .*precompute"):
            CacheReader(path)


# -- other configurations and other people's folders -------------------------------------------------

OTHER: dict[str, Any] = {"recipe": {"name": "eclipse", "steps": 8, "sigma": 0.025}, "seed": 1}


def test_another_configuration_is_refused(cache: Path) -> None:
    for opening in (lambda: CacheReader(cache, OTHER), lambda: CacheWriter(cache, OTHER, LAYOUT)):
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
        CacheWriter(cache, OTHER, LAYOUT)
    assert contents(cache) == before


def test_a_foreign_shard_that_comes_later_is_refused_and_never_overwritten(cache: Path, tmp_path: Path) -> None:
    fill(tmp_path / "other", config=OTHER)
    writer = CacheWriter(cache, CONFIG, LAYOUT, MADE)
    (tmp_path / "other/shard-00002.safetensors").rename(cache / "shard-00002.safetensors")
    before = contents(cache)
    shard = writer.shards[2]
    for call in (writer.pending, writer.finish, lambda: writer.is_done(shard), lambda: write(writer, shard)):
        with pytest.raises(CacheError, match=r"whose shard-00002\.safetensors was made with another configuration"):
            call()
    assert contents(cache) == before
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
    ("layout", "part"),
    [
        (Layout(LENGTH, 4), r"shard_size: 5 → 4"),
        (Layout(24, SIZE), r"length: 23 → 24"),
        (Layout(5, SIZE), r"length: 23 → 5"),
        (Layout(LENGTH, SIZE, 2), r"draws: 1 → 2"),
        (Layout(LENGTH, SIZE, 1, "png"), r'encoding: "raw" → "png"'),
    ],
)
def test_one_folder_has_one_layout(cache: Path, layout: Layout, part: str) -> None:
    for _ in range(2):  # finished, then unfinished
        with pytest.raises(CacheError, match=part):
            CacheWriter(cache, CONFIG, layout)
        (cache / "index.json").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["notes.txt", "shard-1.safetensors", "shard-00099.safetensors", "sub"])
def test_unrelated_files(cache: Path, name: str) -> None:
    (cache / name).mkdir() if name == "sub" else (cache / name).write_text("mine")
    with pytest.raises(CacheError, match=rf"nothing else.*{name}"):
        CacheWriter(cache, CONFIG, LAYOUT)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="Got the file"):
        CacheWriter(tmp_path / "file", CONFIG, LAYOUT)


@pytest.mark.parametrize(
    "values",
    [
        {"length": 0},
        {"length": -1},
        {"length": 2.0},
        {"length": True},
        {"length": 5, "shard_size": 0},
        {"length": 5, "shard_size": "5"},
        {"length": 5, "draws": 0},
        {"length": 5, "draws": None},
    ],
)
def test_bad_layouts(values: dict[str, Any]) -> None:
    name = list(values)[-1]
    with pytest.raises(InputError, match=rf"{name} must be a positive integer\. Got"):
        Layout(**values)


def test_a_bad_encoding() -> None:
    with pytest.raises(InputError, match=r"encoding must be one of 'raw', 'png'\. Got 'jpeg'"):
        Layout(5, encoding="jpeg")


def test_bad_images(tmp_path: Path) -> None:
    images = pixels()[:5]
    bad: list[tuple[Any, str]] = [
        (images.astype(np.float32), "Got float32"),
        (torch.from_numpy(images), "Got Tensor"),
        (images.tolist(), "Got list"),
        (images[:4], r"takes 5 images\. Got 4"),
        (list(images) * 2, r"takes 5 images\. Got 10"),
        (images[0], "Got"),
        (images[..., 0], "Got"),
        (images[:, :0], "Got"),
        (pixels(5, (4, 6, 5)), r"Got uint8 \(5, 4, 6, 5\)"),
        ([*images[:4], images[4].astype(np.int64)], "Got int64"),
        ([*images[:4], images[4][None]], "Got uint8"),
        ([*images[:4], None], "Got NoneType"),
    ]
    rest: dict[str, Any] = {"image_types": TYPE, "sample": None, "targets": None, "source": None}
    for encoding in ("raw", "png"):
        folder = tmp_path / encoding
        writer = CacheWriter(folder, CONFIG, Layout(LENGTH, SIZE, 1, encoding))
        first = writer.shards[0]
        for value, part in bad:
            with pytest.raises(InputError, match=part):
                writer.write(first, value, **rest)
        with pytest.raises(InputError, match="pending"):
            writer.write(Shard(0, 0, 4), images[:4], **rest)
        assert list(folder.iterdir()) == []
    writer = CacheWriter(tmp_path / "raw", CONFIG, LAYOUT)
    writer.write(first, images, **rest)
    with pytest.raises(InputError, match=r'\(4, 6, 3\). Got \(6, 4, 3\)[\s\S]*encoding="png"'):
        writer.write(writer.shards[1], images.reshape(5, 6, 4, 3), **rest)
    assert set(contents(tmp_path / "raw")) == {"claim.json", first.file}


def test_images_of_different_sizes_in_a_raw_shard(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, CONFIG, Layout(2))
    images = [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]
    with pytest.raises(InputError, match="one size"):
        writer.write(writer.shards[0], images, image_types=TYPE, sample=None, targets=None, source=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "values",
    [
        {"image_types": [TYPE, "pil/uint8/2"]},
        {"image_types": []},
        {"targets": [1, 2, 3, 4]},
        {"targets": [1, 2, 3, 4, 5, 6]},
        {"source": np.zeros((4, 2), np.uint64)},
        {"source": np.zeros((6, 2), np.uint64)},
    ],
    ids=lambda v: str({k: len(x) for k, x in v.items()}),
)
def test_as_many_of_everything_as_images(tmp_path: Path, values: dict[str, Any]) -> None:
    """One more or less would give every later image the target of another."""
    writer = CacheWriter(tmp_path, CONFIG, LAYOUT)
    rest: dict[str, Any] = {"image_types": TYPE, "sample": None, "targets": None, "source": None, **values}
    with pytest.raises((InputError, CacheError)):
        writer.write(writer.shards[0], pixels()[:5], **rest)
    assert list(tmp_path.iterdir()) == []


def test_shards_of_different_sizes_do_not_finish(tmp_path: Path) -> None:
    one, two = (CacheWriter(tmp_path, CONFIG, Layout(4, 2)) for _ in range(2))
    write(one, one.shards[0], [np.zeros((4, 4, 4, 3), np.uint8)])
    write(two, two.shards[1], [np.zeros((4, 4, 5, 3), np.uint8)])
    with pytest.raises(CacheError, match=r"one shape.*\(4, 5, 3\)|one shape.*\(4, 4, 3\)"):
        one.finish()


# -- processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool, encoding: str) -> None:
    images = pixels(shape=(32, 32, 3))
    layout = Layout(LENGTH, SIZE, 1, encoding)
    fill(tmp_path / "cache", layout, images=[images], targets=list(range(LENGTH)), plan={"a": 1})
    monkeypatch.chdir(tmp_path)
    reader = CacheReader("cache", in_memory=in_memory)
    assert np.array_equal(reader[0], images[0])
    data = pickle.dumps(reader)
    assert len(data) < images.nbytes / 4  # no images, no handles
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    assert np.array_equal(again[22], images[22])
    assert np.array_equal(again.batch(range(LENGTH)), images)
    assert again.config == CONFIG
    assert again.plan == {"a": 1}
    assert list(again.targets) == list(range(LENGTH))


def test_a_copy_still_checks(cache: Path) -> None:
    reader = CacheReader(cache)
    reader[0]
    data = pickle.dumps(reader)
    damaged_image(cache, 8)
    with pytest.raises(CacheError, match="Got image 8 "):
        pickle.loads(data)[8]


def test_reading_keeps_no_file_open(tmp_path: Path) -> None:
    """A process may have 1024 files open, and a cache more shards."""
    fill(tmp_path, Layout(LENGTH, 1))
    before = len(os.listdir("/proc/self/fd"))
    reader = CacheReader(tmp_path)
    reader.get(range(LENGTH))
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # which images were checked, shared between processes


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_workers(cache: Path, method: str, in_memory: bool) -> None:
    reader = CacheReader(cache, CONFIG, in_memory)
    reader[0]  # a mapping that the workers inherit, or must not
    loader = DataLoader(reader, batch_size=4, num_workers=2, multiprocessing_context=method)  # type: ignore[arg-type]
    assert torch.equal(torch.cat(list(loader)), torch.from_numpy(pixels()))


# -- the identity of a source ------------------------------------------------------------------------


def digest(images: Any, targets: Any, batch: int = 100) -> bytes:
    parts = [
        source_hashes(images[i : i + batch], None if targets is None else targets[i : i + batch])
        for i in range(0, len(images), batch)
    ]
    return np.concatenate(parts).tobytes()


def test_batching_does_not_matter() -> None:
    images, targets = pixels(), list(range(LENGTH))
    expected = digest(images, targets)
    for batch in (1, 2, 7, 23):
        assert digest(images, targets, batch) == expected
    for other in (list(images), torch.from_numpy(images), list(torch.from_numpy(images))):
        assert digest(other, targets, 5) == expected
    for same_targets in (torch.arange(LENGTH), np.arange(LENGTH), np.arange(LENGTH, dtype=np.int16), tuple(targets)):
        assert digest(images, same_targets, 5) == expected
    assert digest(np.asfortranarray(images), targets) == expected


def by_hand(tag: bytes, *parts: bytes) -> bytes:
    return tag + struct.pack("<Q", len(parts)) + b"".join(struct.pack("<Q", len(p)) + p for p in parts)


def short(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def test_golden_source() -> None:
    """As README.md says it: the bytes that a reader of another language would hash."""
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    got = source_hashes(images, [3, ("a", None)])
    assert got.dtype == np.uint64
    shape = struct.pack("<3Q", 2, 2, 3)
    expected = [
        [short(by_hand(b"a", b"uint8", shape, bytes(range(12)))), short(by_hand(b"i", b"3"))],
        [
            short(by_hand(b"a", b"uint8", shape, bytes(range(12, 24)))),
            short(by_hand(b"l", by_hand(b"s", b"a"), by_hand(b"n"))),
        ],
    ]
    assert got.tolist() == expected
    assert source_hashes([], []).shape == (0, 2)


def test_each_image_and_each_target_has_its_own() -> None:
    """So a change is found and named."""
    images, targets = pixels(), list(range(LENGTH))
    before = source_hashes(images, targets)
    changed = images.copy()
    changed[7, 3, 5, 2] ^= 1
    assert np.argwhere(source_hashes(changed, targets) != before).tolist() == [[7, 0]]
    assert np.argwhere(source_hashes(images, [*targets[:9], "9", *targets[10:]]) != before).tolist() == [[9, 1]]


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
    name = "object" if isinstance(bad, dict) else type(bad).__name__
    with pytest.raises(InputError, match=f"Got {name}"):
        source_hashes(pixels(2), [1, bad])


def test_bad_batches() -> None:
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
            source_hashes(images, targets)  # type: ignore[arg-type]


def test_a_file_system_without_modes_holds_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    writer = CacheWriter(tmp_path / "cache", CONFIG, LAYOUT, MADE)
    for shard in LAYOUT.shards:
        write(writer, shard)
    writer.finish()
    assert len(CacheReader(tmp_path / "cache")) == LENGTH
    with replacing_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("b")
    assert (tmp_path / "folder" / "a").read_text() == "b"
