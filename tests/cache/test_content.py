"""What the files of a cache say is checked value by value: a hash that is right says only that a file is whole."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader import precompute, recipes
from purifyloader.cache import CacheReader, Layout, format, inspect, values
from purifyloader.cache.reader import OpenShard
from purifyloader.cache.tars import export_tars, import_tars
from purifyloader.errors import CacheError, InputError
from purifyloader.files.atomic import canonical_json
from tests.fuzz.mutations import deep, safetensors_parts, safetensors_whole, text_of


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    dataset = [(torch.full((3, 6, 6), 0.5), i) for i in range(4)]
    precompute(dataset, recipes.jpeg(50), tmp_path / "cache", shard_size=2, progress=False)
    return tmp_path / "cache"


def guarded(content: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return {**rest, "sha256": hashlib.sha256(text_of(rest).encode()).hexdigest()}


def put(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Copy JSON with another value at a path such as "layout.draws"."""
    key, _, rest = path.partition(".")
    return {**content, key: put(content[key], rest, value) if rest else value}


def rewrite_shard(folder: Path, change: dict[str, Any], outer: dict[str, Any] | None = None) -> None:
    """Change the header of the first shard, its guard and all that the index says of it."""
    path = folder / "shard-00000.safetensors"
    header, body = safetensors_parts(path.read_bytes())
    content = json.loads(header["__metadata__"]["purifyloader"])
    for at, value in change.items():
        content = put(content, at, value)
    content = guarded(content)
    header["__metadata__"]["purifyloader"] = text_of(content)
    header["images"].update(outer or {})
    path.write_bytes(safetensors_whole(header, body))
    index = json.loads((folder / "index.json").read_text())
    entry = {"header": content["sha256"], "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    index["shards"][0].update(entry)
    (folder / "index.json").write_text(text_of(guarded(index)) + "\n")


HUGE = 10**12
HEADERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a dataset of 10^12 images": ({"layout.length": HUGE}, {}),
    "shards of one image, 10^12 of them": ({"layout.length": HUGE, "layout.shard_size": 1}, {}),
    "10^12 draws": ({"layout.draws": HUGE}, {}),
    "a count of 10^12": ({"count": HUGE}, {}),
    "a negative start": ({"start": -2}, {}),
    "a shard of another number": ({"shard": 5}, {}),
    "a count that is true": ({"count": True}, {}),
    "checksums of text": ({"crc32": ["0", "1"]}, {}),
    "checksums of 2^64": ({"crc32": [2**64, 1]}, {}),
    "checksums of fractions": ({"crc32": [0.5, 1]}, {}),
    "sizes of 10^12": ({"sizes": [HUGE, HUGE]}, {}),
    "sizes below 0": ({"sizes": [-1, 1]}, {}),
    "types that are a number": ({"image_types": 3}, {}),
    "types of too many": ({"image_types": ["pil/uint8/3"] * 3}, {}),
    "types without form": ({"image_types": "pil"}, {}),
    "a sample that is a list": ({"sample": []}, {}),
    "a sample without its image": ({"sample": {"type": "tuple", "fields": 2}}, {}),
    "an image beyond the sample": ({"sample": {"type": "tuple", "fields": 2, "image": 7}}, {}),
    "targets of text": ({"targets": "01"}, {}),
    "targets of one": ({"targets": [0]}, {}),
    "targets in one another": ({"targets": [deep(900), 1]}, {}),
    "a source that is no hex": ({"source": ["zz", "zz"]}, {}),
    "a source of one text": ({"source": ["00" * 16]}, {}),
    "made with nothing": ({"made": None}, {}),
    "a hash that is a number": ({"tensor_sha256": 5}, {}),
    "a version that is a list": ({"version": [3]}, {}),
    "a shape without end": ({}, {"shape": [2, 2**40, 2**40, 3]}),
    "a shape of nothing, and huge": ({}, {"shape": [2, HUGE, 0, 3], "data_offsets": [0, 0]}),
    "a shape of five channels": ({}, {"shape": [2, 6, 3, 6]}),
    "a shape of text": ({}, {"shape": ["2", "6", "6", "3"]}),
    "a place of text": ({}, {"data_offsets": "[0, 216]"}),
    "a place below 0": ({}, {"data_offsets": [-1, 215]}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_says_what_may_be(name: str, cache: Path) -> None:
    rewrite_shard(cache, *HEADERS[name])
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors"):
        CacheReader(cache)
    assert "shard-00000.safetensors" in inspect.describe(cache)["wrong"]


INDICES: dict[str, dict[str, Any]] = {
    "10^12 images": {"layout.length": HUGE},
    "10^12 images in shards of one": {"layout.length": HUGE, "layout.shard_size": 1},
    "a shape of text": {"image_shape": "666"},
    "a shape of two": {"image_shape": [6, 6]},
    "shards that are numbers": {"shards": [1, 2]},
    "shards without a hash": {"shards": [{"file": "shard-00000.safetensors", "count": 2}] * 2},
    "no devices": {"identity.devices": []},
    "a source that is text": {"identity.source": "x"},
    "notes that are a list": {"notes": []},
    "classes that are a number": {"notes.classes": 5},
    "classes that are text": {"notes.classes": "ab"},
    "classes that are no text": {"notes.classes": ["a", ["b"]]},
    "classes by name": {"notes.classes": {"a": 0}},
    "made that is text": {"made": "x"},
    "made without counts": {"made": [{"device": "cpu"}]},
    "a plan without conditions": {"plan": {"where": {}}},
    "a plan of text": {"plan": {"where": {"conditions": [{"kind": "x", "planned": {"threshold": "1"}}]}}},
    "one field more": {"layout.more": 1},
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_says_what_may_be(name: str, cache: Path) -> None:
    index = json.loads((cache / "index.json").read_text())
    for at, value in INDICES[name].items():
        index = put(index, at, value)
    index["fingerprint"] = hashlib.sha256(canonical_json(index["identity"]).encode()).hexdigest()
    (cache / "index.json").write_text(canonical_json(guarded(index)) + "\n")
    with pytest.raises(CacheError, match=r"index\.json"):
        CacheReader(cache)
    assert "index.json" in inspect.describe(cache)["wrong"]


def test_a_claim_of_a_million_shards_costs_no_list(tmp_path: Path) -> None:
    claim = format.Claim({"a": 1}, Layout(10**6, 1), {"device": "cpu"})
    (tmp_path / "claim.json").write_text(format.claim_text(claim))
    assert inspect.describe(tmp_path)["shards"] == 10**6
    for layout in ({"length": 10**12, "shard_size": 1}, {"length": 2**50}, {"length": 5, "draws": 2**40}):
        with pytest.raises(InputError, match=r"at most 1,000,000|an integer from 1"):
            Layout(**layout)


STORED: list[Any] = [
    {"$tensor": ["float32", [10**9], ""]},
    {"$tensor": ["float32", [-1], "AAAAAA=="]},
    {"$tensor": ["nn", [1], "AAAAAA=="]},
    {"$tensor": ["float32"]},
    {"$array": ["O", [1], "AAAAAAAAAAA="]},
    {"$array": ["V1000000000", [1], ""]},
    {"$array": ["float32", "x", "AAAAAA=="]},
    {"$scalar": ["float32", ""]},
    {"$image": ["RGB", [10**6, 10**6], ""]},
    {"$image": ["P", [1, 1], "AA=="]},
    {"$image": ["L", 3, "AA=="]},
    {"$tuple": 3},
    {"$dict": [[{"$tuple": [[]]}, 1]]},
    {"$dict": 5},
    {"$float": "x"},
    {"$bytes": "é"},
    {"$unknown": 1},
]


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_target_that_was_not_stored_is_one_error(stored: Any, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"."):
        values.decode(stored)
    rewrite_shard(cache, {"targets": [stored, 1]})
    reader = CacheReader(cache)
    assert reader.targets is not None
    with pytest.raises(CacheError, match="index 0"):
        _ = reader.targets[0]
    assert reader.targets[1] == 1


def test_values_are_stored_60_deep_and_no_deeper() -> None:
    for made in (deep, lambda levels: (deep(levels - 1),), lambda levels: {1: deep(levels - 2)}):
        assert repr(values.decode(json.loads(canonical_json(values.encode(made(60)))))) == repr(made(60))
    for inside in (deep(61), {"a": deep(70)}, (deep(100),)):
        with pytest.raises(values.Unstorable, match="60"):
            values.encode(inside)


def members_of(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def header(name: str, kind: bytes = b"0", size: int = 0, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf(tarfile.GNU_FORMAT)


EXPORTS: dict[str, bytes] = {
    "a member twice": header("00000000.png", size=1) + b"x".ljust(512, b"\0"),
    "a link": header("00000000.png", b"2", link="/etc/passwd"),
    "a hard link": header("00000000.json", b"1", link="00000001.png"),
    "a device": header("00000000.png", b"3"),
    "a path upwards": header("../../00000000.png"),
    "an absolute path": header("/tmp/00000000.png"),
    "a sparse file of 6 GB": header("00000000.png", b"S", 6 * 10**9),
    "a file of 6 GB": header("00000000.png", size=6 * 10**9),
    "a long name of 8 GB": header("@", b"L", 2**33 - 1),
    "PAX of 4 GB": header("@", b"x", 2**32),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_a_hostile_export_is_refused_by_name(name: str, cache: Path, tmp_path: Path) -> None:
    (path,) = export_tars(CacheReader(cache), tmp_path / "tars")
    path.write_bytes(EXPORTS[name] + path.read_bytes())
    manifest = json.loads((tmp_path / "tars" / "cache.json").read_text())
    manifest["tars"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "tars" / "cache.json").write_text(canonical_json(guarded(manifest)) + "\n")
    with pytest.raises(CacheError, match=r"000000\.tar"):
        import_tars(tmp_path / "tars", tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_row_that_is_no_image_is_named(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("I;16", (4, 4)).save(stream, "PNG")
    for data in (b"", b"x" * 100, stream.getvalue()):
        writer_layout = Layout(length=1, encoding="png")
        shard = writer_layout.shards[0]
        beside = format.ShardValues("pil/uint8/3", {"type": "image"}, [None], None, {"device": "cpu"})
        format.save_shard(tmp_path / shard.file, shard, writer_layout, {"a": 1}, [data], beside)
        written = format.read_shard_header(tmp_path / shard.file)
        checked = np.zeros(1, np.uint8)
        with pytest.raises(CacheError, match="image 0"):
            OpenShard(tmp_path / shard.file, written, checked).row(0, 0)
