"""`purifyloader cache`: what it says of caches in every state, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from purifyloader import precompute, recipes
from purifyloader.cache.compare import compare
from purifyloader.cache.format import Layout
from purifyloader.cache.inspect import describe
from purifyloader.cache.reader import CacheReader
from purifyloader.cache.writer import CacheWriter
from purifyloader.commands import main as cli
from purifyloader.core.devices import kind_of_device
from tests import processes
from tests.conftest import PictureDataset, random_images, tiny_denoiser


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "cache"
    precompute(PictureDataset(random_images(10)), recipes.jpeg(10), folder, shard_size=4, progress=False)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "cache")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["cache", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out, out.err


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def by_hand(folder: Path, images: Any, *, draws: int = 1, source: Any = None, config: Any = None) -> CacheReader:
    encoding = "raw" if isinstance(images, np.ndarray) else "png"
    writer = CacheWriter(folder, config or {}, Layout(len(images) // draws, 100, draws, encoding))
    writer.write(writer.shards[0], images, source=source)
    writer.finish()
    return CacheReader(folder)


def levels(*values: int, size: int = 4, channels: int = 3) -> np.ndarray:
    return np.stack([np.full((size, size, channels), value, np.uint8) for value in values])


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


# -- info --------------------------------------------------------------------------------------------


def test_info_says_what_a_cache_is(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "info", made)
    assert status == 0
    for part in (
        "a finished cache",
        "10 images, 16 × 16 px, RGB (raw)",
        "3 of 3",
        "jpeg: quality 10",
        "seed         0",
        "draws        1",
        "tests.conftest.PictureDataset, 10 samples",
        "tuples of 2, image at 0; targets stored",
        "classes      2",
        f"{kind_of_device(torch.device('cpu'))}: ",
        "plan         no",
        CacheReader(made).fingerprint,
    ):
        assert part in text

    values = json.loads(run(capsys, "info", made, "--json")[1])
    assert values == describe(made)
    assert values["state"] == "finished"
    assert values["bytes"] == sum(path.stat().st_size for path in made.iterdir())
    assert (values["images"], values["shards"], values["image_shape"]) == (10, 3, [16, 16, 3])


def test_info_says_every_stage_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    purifier = recipes.eclipse(tiny_denoiser(), sigma=0.1, steps=3, tile=16, resize=16, compensate_once=True)
    dataset = PictureDataset(random_images(3, 17))
    reader = precompute(dataset, purifier, tmp_path, encoding="png", draws=2, seed=5, progress=False)
    weights = reader.config["purifier"]["stages"][1]["stages"][0]["purifier"]["denoiser"]["weights_sha256"]
    text = run(capsys, "info", tmp_path)[1]
    for part in (
        "of any sizes (png)",
        "resize: size 16",
        "tiles: ",
        "diffuse: sigma 25.5 px",
        "steps 3",
        "dtype float32",
        f"weights {weights[:12]}",
        "compensation: sigma 12.75 px",
        "draws        2",
        "seed         5",
    ):
        assert part in text


def test_info_of_an_unfinished_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "index.json").unlink()
    (folder / "shard-00000.safetensors").unlink()
    before = state(folder)
    status, text, _ = run(capsys, "info", folder)
    assert status == 0
    for part in ("an unfinished cache", "6 of 10 images, 16 × 16 px", "2 of 3", "jpeg: quality 10", "targets stored"):
        assert part in text
    values = describe(folder)
    assert (values["state"], values["fingerprint"], values["shards_in_work"]) == ("unfinished", None, 0)
    writer = CacheWriter(folder, values["config"], Layout(10, 4))
    with writer.lock(writer.shards[0]):
        assert describe(folder)["shards_in_work"] == 1
    assert before.items() <= state(folder).items()


def test_info_of_a_damaged_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "shard-00000.safetensors").write_bytes(b"x")
    (folder / "shard-00002.safetensors").unlink()
    text = run(capsys, "info", folder)[1]
    for part in ("a damaged cache", "1 of 3", "shard-00000.safetensors (damaged)", "shard-00002.safetensors (missing)"):
        assert part in text
    (folder / "shard-00001.safetensors").write_bytes(b"x")
    (folder / "index.json").write_text("{")
    status, text, _ = run(capsys, "info", folder)
    assert status == 0
    assert "a damaged cache" in text
    assert "index.json" in text


def test_info_of_a_cache_written_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand(tmp_path, levels(1, 2), config={"what": {"ever": [1]}})
    text = run(capsys, "info", tmp_path)[1]
    assert "what" in text
    assert "targets not stored" in text


# -- verify ------------------------------------------------------------------------------------------


def test_verify_a_whole_cache_writes_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(made)
    status, text, _ = run(capsys, "verify", made)
    assert status == 0
    assert "whole. Checked 3 shards" in text
    assert "10 images" in text
    assert state(made) == before


@pytest.mark.parametrize("at", [3, 100, -1], ids=["size", "header", "image"])
def test_verify_names_every_damaged_shard(folder: Path, capsys: pytest.CaptureFixture[str], at: int) -> None:
    flip(folder / "shard-00000.safetensors", at)
    flip(folder / "shard-00002.safetensors", at)
    status, text, _ = run(capsys, "verify", folder)
    assert status == 1
    assert "shard-00000.safetensors: damaged" in text
    assert "shard-00002.safetensors: damaged" in text
    assert "shard-00001" not in text
    assert "1 of 3 shards are whole" in text


def test_verify_finds_damage_in_every_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand(tmp_path, levels(1, 2, size=1))
    # once, which takes longer than to verify
    parsed = cli.parse(["cache", "verify", str(tmp_path)])
    monkeypatch.setattr(cli, "parse", lambda words: parsed)
    for name in ("shard-00000.safetensors", "index.json"):
        whole = (tmp_path / name).read_bytes()
        for at in range(0, len(whole), 3):
            flip(tmp_path / name, at)
            try:
                status, text, _ = run(capsys, "verify", tmp_path)
            finally:
                (tmp_path / name).write_bytes(whole)
            assert (status, f"{name}: damaged" in text) == (1, True), (name, at)
    assert run(capsys, "verify", tmp_path)[0] == 0


def test_verify_shards_of_another_cache(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precompute(PictureDataset(random_images(10, 16, 1)), recipes.jpeg(10), tmp_path / "b", shard_size=4, progress=False)
    shutil.copy(tmp_path / "b" / "shard-00001.safetensors", folder)
    shutil.copy(tmp_path / "b" / "shard-00001.safetensors", folder / "shard-00007.safetensors")
    status, text, _ = run(capsys, "verify", folder)
    assert status == 1
    assert "shard-00001.safetensors: damaged. It must have the header that the index names" in text
    assert "shard-00007.safetensors: no part of the cache" in text


def test_verify_an_unfinished_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "index.json").unlink()
    status, text, _ = run(capsys, "verify", folder)
    assert status == 1
    assert "unfinished: 3 of 3 shards are whole, and it has no index" in text
    (folder / "shard-00000.safetensors").unlink()
    flip(folder / "shard-00001.safetensors", -1)
    status, text, _ = run(capsys, "verify", folder)
    assert status == 1
    assert "shard-00000.safetensors: missing" in text
    assert "shard-00001.safetensors: damaged" in text
    assert "1 of 3 shards are whole" in text


def test_verify_a_damaged_index(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(folder / "index.json", -10)
    flip(folder / "shard-00001.safetensors", -1)
    status, text, _ = run(capsys, "verify", folder)
    assert status == 1
    assert "index.json: damaged" in text
    assert "shard-00001.safetensors: damaged" in text
    assert "2 of 3 shards are whole, and its index is damaged" in text


def test_verify_in_a_process(folder: Path) -> None:
    command = ("purifyloader", "cache", "verify", folder)
    good = processes.run(*command)
    assert (good.returncode, good.stderr) == (0, "")
    flip(folder / "shard-00001.safetensors", -1)
    bad = processes.run(*command)
    assert (bad.returncode, bad.stderr) == (1, "")
    assert "shard-00001.safetensors: damaged" in bad.stdout


# -- export, import ----------------------------------------------------------------------------------


def test_export_and_import(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "export", made, tmp_path / "t", "--images-per-tar", 4)
    assert status == 0
    assert "10 images in 3 tars and cache.json" in text
    status, text, _ = run(capsys, "import", tmp_path / "t", tmp_path / "b")
    assert status == 0
    assert CacheReader(made).fingerprint[:12] in text
    assert [d for d, _ in state(tmp_path / "b").values()] == [d for d, _ in state(made).values()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "t"]


def test_export_says_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand(tmp_path / "a", levels(1, 2, 3, 4), draws=2)
    text = run(capsys, "export", tmp_path / "a", tmp_path / "t", "--draw", 1)[1]
    assert "2 images, draw 1 of 2 (no import can make the cache of them)" in text
    assert "no targets" in text


# -- compare -----------------------------------------------------------------------------------------


def test_compare_a_cache_with_itself(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = CacheReader(made)
    found = compare(reader, CacheReader(made))
    assert found.same_fingerprint
    assert not found.differences
    assert (found.compared, found.sources_differ, found.targets_differ, found.sizes_differ) == (10, 0, 0, 0)
    assert (found.identical, found.pixels_changed, found.mean_abs, found.max_abs) == (1, 0, 0, 0)
    assert (found.psnr, found.most_different) == (None, None)
    status, text, _ = run(capsys, "compare", made, made)
    assert status == 0
    assert "identical images: 10 of 10" in text
    assert "PSNR: infinite" in text


def test_compare_counts_what_differs(tmp_path: Path) -> None:
    ours, theirs = levels(100, 100, 100, 100), levels(100, 100, 100, 100)
    theirs[1, 0, 0] = (103, 100, 98)  # one pixel of 16
    theirs[3, :, :, 1] = 110
    source = np.arange(8, dtype=np.uint64).reshape(4, 2)
    other = source.copy()
    other[2, 0] = other[3, 0] = other[3, 1] = 99
    a = by_hand(tmp_path / "a", ours, source=source, config={"seed": 1, "k": [1]})
    b = by_hand(tmp_path / "b", theirs, source=other, config={"seed": 2, "k": [1]})
    seen: list[int] = []
    found = compare(a, b, seen=seen.append)
    assert sum(seen) == 4
    assert not found.same_fingerprint
    assert "config.seed: 1 → 2" in found.differences
    assert (found.sources_differ, found.targets_differ) == (2, 1)
    assert (found.identical, found.max_abs, found.most_different) == (0.5, 10, 3)
    assert found.pixels_changed == (1 + 16) / 64
    assert found.mean_abs == (3 + 2 + 160) / 192
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / ((9 + 4 + 1600) / 192)))
    assert found.mean_difference == {"RGB": [3 / 64, 160 / 64, -2 / 64]}
    assert json.loads(json.dumps(found.to_dict())) == {
        **found.to_dict(),
        "samples": [4, 4],
        "differences": list(found.differences),
    }
    back = compare(b, a)
    assert back.mean_difference == {"RGB": [-3 / 64, -160 / 64, 2 / 64]}


def test_compare_survives_the_largest_differences(tmp_path: Path) -> None:
    a, b = by_hand(tmp_path / "a", levels(0, 0)), by_hand(tmp_path / "b", levels(255, 255))
    assert (compare(a, b).max_abs, compare(a, b).psnr, compare(a, b).mean_abs) == (255, 0, 255)


def test_compare_sizes_lengths_and_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = levels(5, channels=1)[0]
    a = by_hand(tmp_path / "a", [*levels(1, 2), grey, levels(9)[0]])
    b = by_hand(tmp_path / "b", [levels(1)[0], levels(2, size=5)[0], grey + 1])
    found = compare(a, b)
    assert (found.samples, found.compared, found.sizes_differ) == ((4, 3), 3, 1)
    assert found.sources_differ is None
    assert found.mean_difference == {"L": [1], "RGB": [0, 0, 0]}
    text = run(capsys, "compare", tmp_path / "a", tmp_path / "b")[1]
    assert "samples: 4 and 3, of which the first 3 compared" in text
    assert "of different sizes, and not compared: 1" in text
    c = by_hand(tmp_path / "c", levels(1, size=9))
    nothing = compare(a, c)
    assert (nothing.identical, nothing.mean_abs, nothing.psnr) == (None, None, None)
    assert run(capsys, "compare", tmp_path / "a", tmp_path / "c")[0] == 0


def test_compare_json(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precompute(PictureDataset(random_images(10)), recipes.jpeg(50), tmp_path / "b", progress=False)
    out = run(capsys, "compare", made, tmp_path / "b", "--json")[1]
    values = json.loads(out)
    assert values["differences"] == ["config.purifier.quality: 10 → 50"]
    assert values["sources_differ"] == 0
    assert values["psnr"] > 0


# -- what users get wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        lambda made, new: ["info", new / "none"],
        lambda made, new: ["info", made / "index.json"],
        lambda made, new: ["info", new],
        lambda made, new: ["verify", new / "none"],
        lambda made, new: ["verify", new],
        lambda made, new: ["export", new, new / "t"],
        lambda made, new: ["export", made, made],
        lambda made, new: ["export", made, new / "t", "--draw", 1],
        lambda made, new: ["export", made, new / "t", "--images-per-tar", 0],
        lambda made, new: ["import", made, new / "b"],
        lambda made, new: ["compare", made, new],
        lambda made, new: ["compare", new, made],
    ],
)
def test_an_error_is_one_line_and_changes_nothing(
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: Callable[[Path, Path], list[Any]],
) -> None:
    before = state(made)
    status, out, err = run(capsys, *arguments(made, tmp_path))
    assert (status, out) == (2, "")
    assert err.startswith("purifyloader: error: ")
    assert re.search(r"Got|There is no folder \S+", err)
    assert err.count("\n") == 1
    assert state(made) == before
    assert not list(tmp_path.iterdir())


def test_other_versions_and_other_files_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = (folder / "index.json").read_text()
    (folder / "index.json").write_text(json.dumps({**json.loads(index), "version": 1}))
    status, text, _ = run(capsys, "verify", folder)
    assert (status, "index.json: damaged" in text) == (1, True)  # for the shards are of this version
    old = {"purifyloader": json.dumps({"format": "purifyloader-cache", "version": 1})}
    for path in folder.glob("*.safetensors"):
        save_file({"images": np.zeros((1, 1, 1, 1), np.uint8)}, path, metadata=old)
    for command in ("info", "verify"):
        status, _, err = run(capsys, command, folder)
        assert status == 2
        assert "Got version 1" in err
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.json").write_text('{"pages": []}')
    assert run(capsys, "verify", site)[0] == 2


@pytest.mark.parametrize(
    "arguments", [[], ["info"], ["export", "a"], ["burn", "a"], ["export", "a", "b", "--draw", "x"]]
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", *arguments]) == 2
    assert re.search("`purifyloader cache.* --help` lists the options", capsys.readouterr().err)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--help"], ["cache"]),
        (["cache", "--help"], ["info", "verify", "export", "import", "compare"]),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words)
