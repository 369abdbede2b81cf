"""A cache as WebDataset tars and back: the same bytes, or an error that names what is wrong."""

from __future__ import annotations

import gc
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import Dataset

from purifyloader import precompute, recipes
from purifyloader.cache.format import Layout
from purifyloader.cache.reader import CacheReader
from purifyloader.cache.tars import export_tars, import_tars
from purifyloader.cache.writer import CacheWriter
from purifyloader.datasets.named import TarDataset
from purifyloader.errors import CacheError, InputError
from tests import processes
from tests.conftest import PictureDataset, random_images


class Samples(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)


def pictures(mode: str = "RGB", sizes: tuple[int, ...] = (16,) * 7) -> list[Image.Image]:
    channels = len(Image.new(mode, (1, 1)).getbands())
    rows = [random_images(1, size, seed, channels)[0].permute(1, 2, 0).numpy() for seed, size in enumerate(sizes)]
    return [Image.fromarray(row[:, :, 0] if channels == 1 else row) for row in rows]


MIXED = (16, 24, 8, 16, 12, 9, 31)
OTHERS: list[Any] = [0, -5, 2**70, None, 1.5, float("nan"), "ä, b"]
KINDS: dict[str, list[Any]] = {
    "ints": [(image, 7 * i) for i, image in enumerate(pictures())],
    "no-targets": pictures(),
    "none": [(image, None) for image in pictures()],
    "others": list(zip(pictures(), OTHERS, strict=True)),
    "true": [(image, i % 2 == 0) for i, image in enumerate(pictures())],
    "dict": [{"label": i, "image": image, "tags": ("x", b"\0")} for i, image in enumerate(pictures())],
    "triple": [(image, i, torch.arange(i)) for i, image in enumerate(pictures())],
    "mask": list(zip(pictures(), pictures("L"), strict=True)),
    "alone": [[image] for image in pictures()],
    "not-stored": [(image, {1, 2}) for image in pictures()],
    "structures": [(image, 1) if i % 2 else {"image": image} for i, image in enumerate(pictures())],
    "grey": [(image, i) for i, image in enumerate(pictures("L"))],
    "grey+alpha": [(image, i) for i, image in enumerate(pictures("LA"))],
    "alpha": [(image, i) for i, image in enumerate(pictures("RGBA"))],
    "arrays": [(np.asarray(image, np.float32) / 255, i) for i, image in enumerate(pictures())],
    "modes": [(pictures(mode)[i], i) for i, mode in enumerate(("RGB", "L", "RGBA", "LA", "RGB", "L", "L"))],
    "sizes": [(image, i) for i, image in enumerate(pictures("RGB", MIXED))],
}


def cache(folder: Path, samples: list[Any], **options: Any) -> CacheReader:
    return precompute(Samples(samples), recipes.jpeg(10), folder, **{"shard_size": 3, "progress": False, **options})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    dataset = PictureDataset(random_images(10))
    return precompute(dataset, recipes.jpeg(10), tmp_path_factory.mktemp("plain"), shard_size=4, progress=False)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def run(code: str, *arguments: object) -> int:
    return processes.run(processes.Code(code), *arguments).returncode


@pytest.mark.parametrize(
    ("encoding", "kind"),
    [
        *(("png", kind) for kind in KINDS),
        *(("raw", kind) for kind in ("ints", "grey", "grey+alpha", "alpha", "arrays")),
    ],
)
def test_a_round_trip_gives_the_same_files(tmp_path: Path, kind: str, encoding: str) -> None:
    reader = cache(tmp_path / "a", KINDS[kind], encoding=encoding)
    export_tars(reader, tmp_path / "tars", images_per_tar=4)
    restored = import_tars(tmp_path / "tars", tmp_path / "b")
    assert content(tmp_path / "b") == content(tmp_path / "a")
    restored.verify()


def test_a_round_trip_keeps_plan_notes_and_shards_made_differently(tmp_path: Path) -> None:
    layout = Layout(5, 2)
    images = random_images(5).permute(0, 2, 3, 1).numpy()
    for number, shard in enumerate(layout.shards):
        writer = CacheWriter(tmp_path / "a", {"recipe": "x"}, layout, {"device": "cpu", "torch": str(number)})
        targets = None if number == 1 else list(range(shard.count))  # of one shard they are not stored
        writer.write(shard, images[shard.start : shard.start + shard.count], targets=targets)
    writer.finish(plan={"selected": [1, 2]}, notes={"ä": 1.0})
    export_tars(CacheReader(tmp_path / "a"), tmp_path / "tars")
    import_tars(tmp_path / "tars", tmp_path / "b")
    assert content(tmp_path / "b") == content(tmp_path / "a")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves them to the collector
def test_webdataset_reads_images_and_classes(plain: CacheReader, tmp_path: Path) -> None:
    tars = export_tars(plain, tmp_path, images_per_tar=4)
    assert [tar.name for tar in tars] == ["000000.tar", "000001.tar", "000002.tar"]
    dataset = wds.WebDataset([str(tar) for tar in tars], shardshuffle=False).decode("pil").to_tuple("png", "cls")
    samples = list(dataset)
    assert len(samples) == len(plain)
    for index, (image, label) in enumerate(samples):
        np.testing.assert_array_equal(np.asarray(image), plain[index])
        assert label == index % 2
    gc.collect()  # while the warnings are ignored


def test_tar_dataset_reads_every_mode_and_target(tmp_path: Path) -> None:
    reader = cache(tmp_path / "a", KINDS["modes"])
    dataset = TarDataset(export_tars(reader, tmp_path / "t", images_per_tar=2))
    assert [dataset[i]["__key__"] for i in range(len(dataset))] == [f"{i:08d}" for i in range(7)]
    for index, (image, label) in enumerate(KINDS["modes"]):
        assert dataset[index]["image"].mode == image.mode
        assert dataset[index]["cls"] == label
        np.testing.assert_array_equal(np.atleast_3d(np.asarray(dataset[index]["image"])), reader[index])


def test_targets_that_are_no_integers_are_json(tmp_path: Path) -> None:
    dataset = TarDataset(export_tars(cache(tmp_path / "a", KINDS["dict"]), tmp_path / "t"))
    assert dataset[3]["json"] == {"label": 3, "tags": {"$tuple": ["x", {"$bytes": "AA=="}]}}
    bare = TarDataset(export_tars(cache(tmp_path / "b", KINDS["no-targets"]), tmp_path / "u"))
    assert set(bare[0]) == {"__key__", "image"}


def test_tars_are_the_same_bytes_whoever_writes_them(plain: CacheReader, tmp_path: Path) -> None:
    first = content(export_tars(plain, tmp_path / "a", images_per_tar=3)[0].parent)
    code = (
        "import os, sys; os.umask(0o077); from purifyloader.commands import main as cli; "
        "sys.exit(cli.main(['cache', 'export', sys.argv[1], sys.argv[2], '--images-per-tar', '3']))"
    )
    assert run(code, plain.folder, tmp_path / "b") == 0
    assert content(tmp_path / "b") == first
    with tarfile.open(tmp_path / "a" / "000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "purifyloader", 0o644)}


def test_each_draw_is_an_export(tmp_path: Path) -> None:
    reader = cache(tmp_path / "a", KINDS["sizes"], draws=2)
    # a jpeg draws nothing: written by hand, to tell the draws apart
    layout, images = Layout(3, 2, draws=2), random_images(6).permute(0, 2, 3, 1).numpy()
    writer = CacheWriter(tmp_path / "b", {}, layout)
    writer.write(layout.shards[0], images[[0, 1, 3, 4]])
    writer.write(layout.shards[1], images[[2, 5]])
    writer.finish()
    several = CacheReader(tmp_path / "b")
    for draw in (0, 1):
        dataset = TarDataset(export_tars(several, tmp_path / f"t{draw}", draw=draw))
        for index in range(3):
            np.testing.assert_array_equal(np.asarray(dataset[index]["image"]), images[3 * draw + index])
    export_tars(reader, tmp_path / "u", draw=1)
    with pytest.raises(CacheError, match=r"one draw.*Got .*draw 1 of 2"):
        import_tars(tmp_path / "u", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(CacheError, match=r"holds one export\. Got .*draw 0 .*with draw 1"):
        export_tars(several, tmp_path / "t0", draw=1)


@pytest.mark.parametrize("draw", [-1, 1, True, 0.0])
def test_no_such_draw(plain: CacheReader, tmp_path: Path, draw: Any) -> None:
    with pytest.raises(InputError, match=r"draw must be an integer from 0 to 0.*Got"):
        export_tars(plain, tmp_path, draw=draw)


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_no_such_number_of_images(plain: CacheReader, tmp_path: Path, count: Any) -> None:
    with pytest.raises(InputError, match=r"images_per_tar must be a positive integer\. Got"):
        export_tars(plain, tmp_path, images_per_tar=count)


def test_a_finished_export_is_replaced(plain: CacheReader, tmp_path: Path) -> None:
    export_tars(plain, tmp_path / "a", images_per_tar=2)
    export_tars(plain, tmp_path / "a", images_per_tar=6)
    export_tars(plain, tmp_path / "b", images_per_tar=6)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_killed_export_is_made_anew(plain: CacheReader, tmp_path: Path) -> None:
    code = (
        "import os, sys; from purifyloader.cache.reader import CacheReader\n"
        "from purifyloader.cache.tars import export_tars\n"
        "done = []\n"
        "def seen(count):\n"
        "    done.append(count)\n"
        "    if len(done) == 5: os._exit(7)\n"
        "export_tars(CacheReader(sys.argv[1]), sys.argv[2], images_per_tar=2, seen=seen)"
    )
    out = tmp_path / "a"
    assert run(code, plain.folder, out) == 7
    assert sorted(content(out)) == ["000000.tar", "000001.tar", "unfinished.json"]
    assert list(out.glob(".*.tmp"))
    with pytest.raises(CacheError, match=r"unfinished\. Run the export again"):
        import_tars(out, tmp_path / "x")
    export_tars(plain, out, images_per_tar=6)
    assert sorted(path.name for path in out.iterdir()) == ["000000.tar", "000001.tar", "cache.json"]
    import_tars(out, tmp_path / "b")
    assert content(tmp_path / "b") == content(plain.folder)


def test_a_killed_import_goes_on(plain: CacheReader, tmp_path: Path) -> None:
    export_tars(plain, tmp_path / "t")
    code = (
        "import os, sys; from purifyloader.cache.tars import import_tars\n"
        "import_tars(sys.argv[1], sys.argv[2], seen=lambda count: os._exit(7))"
    )
    assert run(code, tmp_path / "t", tmp_path / "b") == 7
    assert sorted(content(tmp_path / "b")) == ["claim.json", "shard-00000.safetensors"]
    kept = (tmp_path / "b" / "shard-00000.safetensors").stat().st_ino
    import_tars(tmp_path / "t", tmp_path / "b")
    assert content(tmp_path / "b") == content(plain.folder)
    assert (tmp_path / "b" / "shard-00000.safetensors").stat().st_ino == kept


def test_an_import_mends_a_damaged_one(plain: CacheReader, tmp_path: Path) -> None:
    export_tars(plain, tmp_path / "t")
    import_tars(tmp_path / "t", tmp_path / "b")
    path = tmp_path / "b" / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (tmp_path / "b" / "shard-00002.safetensors").write_bytes(b"no shard")
    import_tars(tmp_path / "t", tmp_path / "b")
    assert content(tmp_path / "b") == content(plain.folder)


def test_a_damaged_cache_is_not_exported(plain: CacheReader, tmp_path: Path) -> None:
    export_tars(plain, tmp_path / "t")
    reader = import_tars(tmp_path / "t", tmp_path / "b")
    path = tmp_path / "b" / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"shard-00001.*Got image 7 with another checksum"):
        export_tars(reader, tmp_path / "u")
    assert not (tmp_path / "u" / "cache.json").exists()


def test_bad_tars_are_named(plain: CacheReader, tmp_path: Path) -> None:
    export_tars(plain, tmp_path / "t", images_per_tar=3)
    path = tmp_path / "t" / "000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    (tmp_path / "t" / "000003.tar").unlink()
    with pytest.raises(CacheError, match=r"Got others: 000001\.tar \(damaged\), 000003\.tar \(missing\)"):
        import_tars(tmp_path / "t", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[:-20], "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: "{}", "damaged"),
        (lambda text: text.replace('"draw":0', '"draw":1'), "does not have its sha256"),
        (lambda text: text.replace('"format":"purifyloader-tars"', '"format":"other"'), "its format is 'other'"),
        (lambda text: text.replace('"tars":[', '"tars":[1,'), "damaged"),
        (lambda text: json.dumps({**json.loads(text), "version": 2}), "must be of version 1. Got version 2"),
    ],
)
def test_a_damaged_manifest_is_refused(plain: CacheReader, tmp_path: Path, edit: Any, message: str) -> None:
    export_tars(plain, tmp_path / "t")
    path = tmp_path / "t" / "cache.json"
    path.write_text(edit(path.read_text()))
    with pytest.raises(CacheError, match=message):
        import_tars(tmp_path / "t", tmp_path / "b")


def test_only_an_export_is_imported(plain: CacheReader, tmp_path: Path) -> None:
    for folder in (tmp_path / "none", plain.folder):
        with pytest.raises(CacheError, match=r"folder with cache\.json.*Got .*has none"):
            import_tars(folder, tmp_path / "b")


def test_nothing_else_is_overwritten(plain: CacheReader, tmp_path: Path) -> None:
    stranger = tmp_path / "data"
    stranger.mkdir()
    (stranger / "000000.tar").write_bytes(b"somebody's")
    with pytest.raises(CacheError, match=r"new or empty folder.*Got .* with 000000\.tar"):
        export_tars(plain, stranger)
    assert content(stranger) == {"000000.tar": b"somebody's"}

    export_tars(plain, tmp_path / "t")
    before = content(tmp_path / "t")
    (tmp_path / "t" / "notes.txt").touch()
    with pytest.raises(CacheError, match=r"Got .* with notes\.txt\."):
        export_tars(plain, tmp_path / "t")
    (tmp_path / "t" / "notes.txt").unlink()
    other = cache(tmp_path / "other", KINDS["ints"])
    with pytest.raises(CacheError, match="A folder holds one export"):
        export_tars(other, tmp_path / "t")
    for inside in (plain.folder, plain.folder / "tars"):
        with pytest.raises(CacheError, match="outside the cache"):
            export_tars(plain, inside)
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="Got the file"):
        export_tars(plain, tmp_path / "file")

    mine = content(other.folder)
    for folder in (other.folder, tmp_path / "t", stranger):
        with pytest.raises(CacheError, match="Got"):
            import_tars(tmp_path / "t", folder)
    assert content(other.folder) == mine
    assert content(tmp_path / "t") == before


def test_an_import_spares_a_cache_of_the_same_configuration(tmp_path: Path) -> None:
    """The same recipe and size, of other images: finished, or in work."""
    a = cache(tmp_path / "a", KINDS["ints"])
    cache(tmp_path / "b", KINDS["ints"][::-1])
    export_tars(a, tmp_path / "t")
    mine = content(tmp_path / "b")
    with pytest.raises(CacheError, match="its fingerprint is"):
        import_tars(tmp_path / "t", tmp_path / "b")
    (tmp_path / "b" / "index.json").unlink()
    with pytest.raises(CacheError, match="was made otherwise"):
        import_tars(tmp_path / "t", tmp_path / "b")
    assert content(tmp_path / "b").items() <= mine.items()
