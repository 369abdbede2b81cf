"""What a command line can name, and tars that are read where they lie."""

from __future__ import annotations

import functools
import gzip
import io
import os
import pickle
import re
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from purifyloader import poisons
from purifyloader.commands import main as cli
from purifyloader.datasets import select
from purifyloader.datasets.arrays import as_arrays
from purifyloader.datasets.named import ImageFiles, TarDataset, open_dataset
from purifyloader.datasets.splits import load_sample
from purifyloader.errors import InputError
from tests import processes
from tests.conftest import random_images

ROOT = Path(__file__).parents[2]
COUNT = 10


def picture(index: int, mode: str = "RGB", size: int = 12) -> Image.Image:
    array = random_images(1, size, seed=index)[0].permute(1, 2, 0).numpy()
    return Image.fromarray(array).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(start: int, count: int) -> list[dict]:
    return [
        {
            "__key__": f"part/{i:04}",
            "png": picture(i),
            "cls": i % 3,
            "json": {"row": i, "name": f"n{i}"},
            "txt": f"größe {i}",
            "extra.bin": bytes([i] * (i + 1)),
        }
        for i in range(start, start + count)
    ]


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(2):
        with wds.TarWriter(str(folder / f"train-{shard:04}.tar")) as writer:
            for sample in samples(shard * COUNT // 2, COUNT // 2):
                writer.write(sample)
    return sorted(folder.iterdir())


def same(a: dict, b: dict) -> bool:
    pixels = np.array_equal(np.asarray(a["image"].convert("RGB")), np.asarray(b["image"].convert("RGB")))
    return pixels and rest(a) == rest(b)


def rest(sample: dict) -> dict:
    return {k: v for k, v in sample.items() if k not in ("image", "__url__", "__local_path__")}


# -- tars --------------------------------------------------------------------------------------------


def streamed(tars: list[Path], field: str = "png") -> list[dict]:
    """What WebDataset itself makes of them."""
    rows = []
    for row in wds.WebDataset([str(t) for t in tars], shardshuffle=False).decode("pil"):
        row["image"] = row.pop(field)
        rows.append(row)
    return rows


WEBDATASET_LEAVES_FILES_OPEN = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@WEBDATASET_LEAVES_FILES_OPEN
def test_samples_equal_webdatasets(tars):
    want, got = streamed(tars), TarDataset(tars)
    assert len(got) == len(want) == COUNT
    assert all(same(got[i], want[i]) for i in range(COUNT))
    assert same(got[-1], want[-1])
    assert [s["__key__"] for s in got] == [f"part/{i:04}" for i in range(COUNT)]
    assert set(got[0]) == {"__key__", "image", "cls", "json", "txt", "extra.bin"}
    with pytest.raises(IndexError, match="Got 10"):
        got[COUNT]


@WEBDATASET_LEAVES_FILES_OPEN
def test_grouping_equals_webdatasets_on_odd_names(tmp_path):
    png = encoded(picture(0))
    long = "d" * 150
    names = ["./a/1.input.PNG", "./a/1.label.cls", "b.c/2.png", "b.c/2.CLS", "__meta__", "__x__/y.png", "README"]
    names += [".hidden", f"{long}/ö.png", f"{long}/ö.cls", "a/1.png", "a/1.cls"]
    members = [(name, b"7\n" if name.lower().endswith("cls") else png) for name in names]
    path = write_tar(tmp_path / "odd.tar", members)
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    got = list(TarDataset([path]))
    want = [
        {"image" if k.endswith("png") else k: v for k, v in row.items()}
        for row in wds.WebDataset(str(path), shardshuffle=False).decode("pil")
    ]
    assert [s["__key__"] for s in got] == ["./a/1", "b.c/2", f"{long}/ö", "a/1"]
    assert len(got) == len(want)
    assert all(same(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("order", "kind"), [("<u2", "PNG"), (">u2", "TIFF")])
def test_grey_images_of_16_bits_keep_their_levels(order, kind, tmp_path):
    """Pillow's own conversion makes white of all but 256 of the levels."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = Image.frombytes("I;16" if order == "<u2" else "I;16B", (256, 256), levels.astype(order).tobytes())
    want = np.round(levels / 257).astype(np.uint8)
    assert (want[0, 0], want[128, 0], want[255, 255]) == (0, 128, 255)
    name = f"0.{kind.lower()}"
    (sample,) = TarDataset([write_tar(tmp_path / "a.tar", [(name, encoded(image, kind))])])
    assert sample["image"].mode == "L"
    np.testing.assert_array_equal(np.asarray(sample["image"]), want)
    if kind == "PNG":
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / name).write_bytes(encoded(image))
        for read in (ImageFiles(tmp_path / "c")[0], open_dataset("imagefolder", tmp_path)[0][0]):
            np.testing.assert_array_equal(np.asarray(read), np.repeat(want[:, :, None], 3, 2))


@pytest.mark.parametrize(("dtype", "message"), [(np.int32, "integers of 32 bits"), (np.float32, "floating point")])
def test_images_whose_white_is_not_known_are_refused(dtype, message, tmp_path):
    image = Image.fromarray(np.full((4, 4), 1000, dtype))
    tars = TarDataset([write_tar(tmp_path / "a.tar", [("0.tif", encoded(image, "TIFF"))])])
    with pytest.raises(InputError, match=rf"a.tar: 0.tif must be an image of 8 or 16 bits.*Got {message}.*save it"):
        tars[0]


@pytest.mark.parametrize(
    ("kind", "white", "values"),
    [(b"P5", 65535, (0, 128, 257, 65535)), (b"P5", 4095, (0, 8, 9, 4095)), (b"P2", 1023, (0, 2, 3, 1023))],
)
def test_a_grey_map_says_what_is_white(kind, white, values, tmp_path):  # Pillow reads it as integers of 32 bits
    pixels = " ".join(map(str, values)).encode() if kind == b"P2" else np.array(values, ">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(b"%s 4 1 %d\n" % (kind, white) + pixels)
    want = [int(value * 255 / white + 0.5) for value in values]
    assert np.asarray(ImageFiles(tmp_path)[0])[0, :, 0].tolist() == want


@pytest.mark.parametrize(("mode", "out"), [("L", "L"), ("LA", "LA"), ("RGBA", "RGBA"), ("P", "RGB"), ("1", "RGB")])
def test_modes_are_kept_where_the_engine_takes_them(mode, out, tmp_path):
    image = picture(0, mode)
    (sample,) = TarDataset([write_tar(tmp_path / "a.tar", [("0.png", encoded(image))])])
    assert sample["image"].mode == out
    assert np.array_equal(np.asarray(sample["image"]), np.asarray(image.convert(out)))


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("webp", "WEBP"), ("ppm", "PPM"), ("tiff", "TIFF")])
def test_image_formats(suffix, kind, tmp_path):
    data = encoded(picture(1), kind)
    (sample,) = TarDataset([write_tar(tmp_path / "a.tar", [(f"0.{suffix}", data)])])
    assert np.array_equal(np.asarray(sample["image"]), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def first(batch):
    return batch[0]


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_workers_read_the_same(start, tars):
    dataset = TarDataset(tars)
    want = [dataset[i] for i in range(COUNT)]  # and so files are open before the fork
    loader = DataLoader(dataset, batch_size=1, collate_fn=first, num_workers=2, multiprocessing_context=start)
    assert all(same(a, b) for a, b in zip(loader, want, strict=True))


def test_a_copy_reads_the_same_and_no_file_is_left_open(tars):
    def still_open() -> int:
        return sum(Path(os.path.realpath(f"/proc/self/fd/{fd}")) in tars for fd in os.listdir("/proc/self/fd"))

    dataset = TarDataset(tars)
    assert still_open() == 0
    want = [dataset[i] for i in range(COUNT)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert still_open() == 2
    assert all(same(copy[i], want[i]) for i in range(COUNT))
    del dataset, copy
    assert still_open() == 0


def test_more_tars_than_files_may_be_open(tmp_path):
    png = encoded(picture(0))
    paths = [write_tar(tmp_path / f"{i:03}.tar", [(f"{i}.png", png), (f"{i}.cls", b"%d" % i)]) for i in range(150)]
    dataset = TarDataset(paths)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(os.listdir("/proc/self/fd")) + 80
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        for _ in range(2):
            assert [s["cls"] for s in dataset] == list(range(150))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_index_is_small(tmp_path):
    """40 bytes a field and its key: the million of ImageNet fits beside anything."""
    count = 5000
    members = [(f"n/{i:08}.{kind}", b"0") for i in range(count) for kind in ("png", "cls")]
    dataset = TarDataset([write_tar(tmp_path / "a.tar", members)])
    assert len(pickle.dumps(dataset)) < 80 * count


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "a.tar holds no samples"),
        ([("README", b"")], "a.tar holds no samples"),
        ([("0.cls", b"1")], r"a\.tar, '0' with the fields cls"),
        ([("0.png", b""), ("0.mask.png", b"")], r"'0' with the fields png, mask\.png"),
        ([(f"scan.{i:03}.png", b"") for i in range(50)], r"'scan'[\s\S]*, \.\.\.\. \(The key ends at the first dot"),
        ([("0.png", b""), ("0.image", b"")], "no other field named image"),
        ([("0.png", b""), ("0.png", b"")], r"a\.tar has 0\.png twice"),
        ([("0.png", b""), ("1.png", b""), ("0.png", b"")], r"a\.tar has the key '0' in two places"),
    ],
)
def test_bad_samples_are_named(members, message, tmp_path):
    with pytest.raises(InputError, match=message):
        TarDataset([write_tar(tmp_path / "a.tar", members)])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.png", b"no image")], r"a\.tar: 0\.png is no readable image"),
        ([("0.png", encoded(picture(0))[:-200])], r"a\.tar: 0\.png is no readable image"),
        ([("0.png", encoded(picture(0))), ("0.cls", b"cat")], r"a\.tar: 0\.cls must be an integer"),
        ([("0.png", encoded(picture(0))), ("0.cls", b"9" * 30)], r"a\.tar: 0\.cls must .* 2\^63 - 1\. Got b'999"),
        ([("0.png", encoded(picture(0))), ("0.cls", b"9" * 9000)], r"a\.tar: 0\.cls must .* Got b'9{58}\.\.\."),
        ([("0.png", encoded(picture(0))), ("0.m.json", b"{")], r"a\.tar: 0\.m\.json must be JSON"),
        ([("0.png", encoded(picture(0))), ("0.txt", b"\xff")], r"a\.tar: 0\.txt must be text"),
    ],
)
def test_bad_fields_are_named(members, message, tmp_path):
    good = ("1.png", encoded(picture(1)))
    dataset = TarDataset([write_tar(tmp_path / "a.tar", [*members, good])])
    with pytest.raises(InputError, match=message):
        dataset[0]
    assert dataset[1]["__key__"] == "1"


def test_classes_beyond_64_bits_are_named(tmp_path):
    image = ("0.png", encoded(picture(0)))
    write_tar(tmp_path / "train-000000.tar", [image, ("0.cls", b"9" * 30)])
    array = np.zeros((1, 8, 8, 3), np.uint8)
    for call, words in (
        (lambda: load_sample(tmp_path, "train"), r"train-000000\.tar: 0\.cls must .*Got b'999"),
        (lambda: select.load([(picture(0), {"label": 2**70})], [0], 3, what="a.tar"), r"a\.tar: The class .*Got 1180"),
        (lambda: select.load([(picture(0), 2**63)], [0], 3), r"The class of an image .*Got 9223372036854775808"),
        (lambda: as_arrays((array, np.array([2**63], np.uint64))), "The label of an image .*Got .*9223372036854775808"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_a_tar_cut_anywhere_is_refused(tars, tmp_path):
    """Between two members too, where tarfile and WebDataset take it for whole."""
    whole = tars[0].read_bytes()
    with tarfile.open(tars[0]) as tar:
        ends = [m.offset for m in tar.getmembers()]
        end = tar.offset
    cuts = sorted({0, 100, 512, end - 600, end - 1, end, end + 100, *ends, *range(0, end, 1777)})
    path = tmp_path / "cut.tar"
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"cut\.tar must be a whole tar file"):
            TarDataset([path])
    path.write_bytes(whole[: end + 512])
    assert len(TarDataset([path])) == COUNT // 2


def test_a_damaged_header_hides_no_sample(tars):
    data = bytearray(tars[0].read_bytes())
    with tarfile.open(tars[0]) as tar:
        third = tar.getmembers()[2].offset
    data[third + 5] ^= 1
    tars[0].write_bytes(data)
    with pytest.raises(InputError, match=r"train-0000\.tar must be a whole tar file.*no end mark"):
        TarDataset(tars)


@pytest.mark.parametrize("size", [-512, -1024, -4096])
def test_a_member_of_negative_size_is_no_endless_loop(size, tmp_path):
    info = tarfile.TarInfo("1.png")
    info.size = size
    path = write_tar(tmp_path / "a.tar", [("0.png", encoded(picture(0)))])
    data = path.read_bytes()
    path.write_bytes(data[:1536] + info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(InputError, match=r"a\.tar must be a whole tar file"):
        TarDataset([path])


def test_a_sparse_member_is_refused(tmp_path):
    """Its bytes do not lie in the tar as they are read."""
    with (tmp_path / "0.bin").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    command = ["tar", "--sparse", "-cf", "a.tar", "0.bin"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(InputError, match=r"a\.tar must be a whole tar file.*0\.bin: a sparse file"):
        TarDataset([tmp_path / "a.tar"])


def test_two_tars_in_one_file_are_refused(tars):
    tars[0].write_bytes(tars[0].read_bytes() + tars[1].read_bytes())
    with pytest.raises(InputError, match="several tars in one file"):
        TarDataset(tars)


def test_other_files_are_refused(tars, tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(tars[0].read_bytes()))
    with pytest.raises(InputError, match=r"a\.tar\.gz is compressed with gzip.*Decompress it"):
        TarDataset([*tars, path])
    (tmp_path / "text.tar").write_text("hello " * 1000)
    with pytest.raises(InputError, match=r"text\.tar must be a whole tar file"):
        TarDataset([tmp_path / "text.tar"])
    with pytest.raises(InputError, match=r"none\.tar cannot be read as a tar file: No such file"):
        TarDataset([tmp_path / "none.tar"])
    with pytest.raises(InputError, match="list of one or more"):
        TarDataset([])
    with pytest.raises(InputError, match="list of one or more"):
        TarDataset("a.tar")


def test_a_tar_that_changes_or_goes_is_noticed(tars):
    dataset = TarDataset(tars)
    with tars[0].open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(InputError, match=r"train-0000\.tar must stay as it is"):
        dataset[0]
    tars[1].unlink()
    with pytest.raises(InputError, match=r"train-0001\.tar cannot be read"):
        dataset[COUNT - 1]


# -- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["", "*.tar", "train-000?.tar", "train-{0000..0001}.tar", "train-{0000,0001}.tar", "train-000{0,1}*.tar"]
)
def test_every_way_to_name_tars(spec, tars):
    name = str(tars[0].parent / spec)
    got = open_dataset("webdataset", name)
    assert [s["__key__"] for s in got] == [f"part/{i:04}" for i in range(COUNT)]
    if spec:
        assert isinstance(open_dataset(name), TarDataset)
        assert len(open_dataset(name)) == COUNT


def test_one_tar_and_tars_in_the_order_of_the_pattern(tars):
    assert len(open_dataset("webdataset", tars[1])) == COUNT // 2
    backwards = open_dataset(str(tars[0].parent / "train-{0001,0000}.tar"))
    assert backwards[0]["__key__"] == f"part/{COUNT // 2:04}"


def test_a_shard_that_is_not_there_is_named(tars, tmp_path):
    with pytest.raises(InputError, match=r"train-0002\.tar cannot be read as a tar file: No such file"):
        open_dataset(str(tars[0].parent / "train-{0000..0003}.tar"))
    with pytest.raises(InputError, match=r"no \.tar files in .*val-\*\.tar\. Check"):
        open_dataset(str(tars[0].parent / "val-*.tar"))
    with pytest.raises(InputError, match=r"\{0000\.\.\.tar' is no pattern"):
        open_dataset(str(tars[0].parent / "train-{0000...tar"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.tar files in .*empty\. Check"):
        open_dataset("webdataset", tmp_path / "empty")


def test_a_compressed_shard_is_no_missing_one(tars):
    packed = tars[1].with_name("train-0002.tar.gz")
    packed.write_bytes(gzip.compress(tars[1].read_bytes()))
    with pytest.raises(InputError, match=r"train-0002\.tar\.gz is compressed"):
        open_dataset("webdataset", tars[0].parent)
    packed.rename(tars[1].with_name("train-0001.tar.gz"))  # beside the tar that it is
    assert len(open_dataset("webdataset", tars[0].parent)) == COUNT


def test_an_image_folder_with_classes(tmp_path):
    for i in range(6):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    dataset = open_dataset("imagefolder", tmp_path / "images")
    assert [target for _, target in dataset] == [0, 0, 0, 1, 1, 1]
    image, _ = dataset[3]
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(picture(1)))
    assert len(pickle.loads(pickle.dumps(dataset))) == 6
    flat = open_dataset(str(tmp_path / "images"))
    assert isinstance(flat, ImageFiles)
    assert len(flat) == 6
    (tmp_path / "images" / "class1" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1\.png is no readable image"):
        dataset[3]


def test_a_folder_that_cannot_be_read_is_one_error(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"nowhere must be a folder that can be read.*No such file"):
        ImageFiles(tmp_path / "nowhere")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"with all below it\. Got: .*Permission denied.*closed"):
        ImageFiles(tmp_path)


def test_an_image_folder_without_images(tmp_path):
    with pytest.raises(InputError, match=r"nowhere must hold one folder of images for each class"):
        open_dataset("imagefolder", tmp_path / "nowhere")
    with pytest.raises(InputError, match="must hold one folder of images for each class"):
        open_dataset("imagefolder", tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="Got: Found no valid file for the classes cat"):
        open_dataset("imagefolder", tmp_path)


def make_broken():
    raise RuntimeError("my own")


def test_what_a_users_function_raises_is_theirs():
    with pytest.raises(RuntimeError, match="my own"):
        open_dataset("tests.datasets.test_datasets:make_broken")


def make_nothing():
    return []


def test_only_a_users_function_is_looked_for_in_the_working_directory(tars, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = [*sys.path]
    (tmp_path / "images").mkdir()
    picture(0).save(tmp_path / "images/0.png")
    open_dataset("images")
    open_dataset(str(tars[0]))
    with pytest.raises(InputError):
        open_dataset("imagenet")
    assert sys.path == before
    for _ in range(2):
        open_dataset("tests.datasets.test_datasets:make_nothing")
        assert sys.path == [*before, str(tmp_path)]


def test_the_installed_command_runs_no_module_that_lies_about(tmp_path):
    """It has no working directory in its path, as `python -m` has. A user's own module is found there all the same."""
    (tmp_path / "images").mkdir()
    for index in range(2):
        picture(index, size=16).save(tmp_path / f"images/{index}.png")
    lying = ("json", "matplotlib", "huggingface_hub")
    for name in lying:
        (tmp_path / f"{name}.py").write_text("open('was-run', 'a').write(__name__)")
    (tmp_path / "mine.py").write_text(
        "import json\nfrom purifyloader.datasets import named\ndef make():\n    return named.open_dataset('images')\n"
    )
    trained = ROOT / "tests/golden/plausibility/trained.safetensors"
    # modules that the process has loaded already are searched for anew, where nothing else holds on to them
    code = processes.Code(
        "import sys\n"
        f"for name in {lying}:\n"
        "    sys.modules.pop(name, None)\n"
        "from purifyloader.commands.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    for data in ("images", "mine:make"):
        options = ["--overwrite", "--format", "eclipse", "--heads", 2, "--norm-groups", 4, "--data", data]
        done = processes.run(code, "convert", trained, "out", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "was-run").exists()


def test_an_unknown_name_lists_what_there_is(tmp_path):
    with pytest.raises(InputError, match="Give cifar10") as caught:
        open_dataset("imagenet", tmp_path)
    listed = ("cifar100", "imagefolder", "webdataset", "a folder", ".tar", "package.module:function", "'imagenet'")
    assert all(word in str(caught.value) for word in listed)


def test_training_takes_tars_and_its_card_no_path(tars, tmp_path):
    out = tmp_path / "model"
    pattern = str(tars[0].parent / "*.tar")
    options = ["--steps", "1", "--batch-size", "2", "--quiet"]
    assert cli.main(["train", "denoiser", "--data", pattern, "--out", str(out), *options]) == 0
    config = (out / "config.json").read_text()
    assert "WebDataset tars" in config
    assert str(tmp_path) not in config + (out / "README.md").read_text()


def test_a_folder_is_read_as_torchvision_reads_it_and_what_is_left_out_is_counted(tmp_path, caplog):
    suffixes = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
    for i, suffix in enumerate((*suffixes, ".TIF")):
        path = tmp_path / ("data/dog" if i % 2 else "elsewhere/cat") / f"{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 25 * i).save(path)
    for name in ("cat", "tom"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "data" / "dog" / "back").symlink_to(tmp_path / "data")  # a circle
    read = open_dataset(str(tmp_path / "data"))
    (tmp_path / "data" / "dog" / "back").unlink()
    assert [str(path) for path in read.files] == [path for path, _ in ImageFolder(tmp_path / "data").samples]
    assert len({read[i].tobytes() for i in range(len(read))}) == 10
    assert len(read) == 15
    assert not caplog.text
    for name in ("notes.txt", "more.txt", "clip.gif", "README", ".hidden.txt"):
        (tmp_path / "elsewhere" / "cat" / name).touch()
    assert len(open_dataset(str(tmp_path / "data"))) == 15
    assert "8 files below" in caplog.text
    assert "(4 .txt, 2 no suffix, 2 .gif; the first is cat/README)" in caplog.text


def _ladder(folder: Path, name: str) -> None:
    """Folders in a row, each with two links to the next: 2^24 ways lead to the last."""
    for i in range(25):
        (folder / f"{name}/{i:02d}").mkdir(parents=True)
    for i in range(24):
        for link in "ab":
            (folder / f"{name}/{i:02d}/{link}").symlink_to(f"../{i + 1:02d}")


def _rounds(folder: Path, name: str, links: str = "xy") -> None:
    (folder / name).mkdir()
    for link in links:
        (folder / name / link).symlink_to(".")


def _tower(folder: Path, name: str) -> None:
    (folder / name / "/".join("a" * 100)).mkdir(parents=True)


TANGLED = {
    "a ladder": (_ladder, r"at most 16 ways\. Got one more, '.*/data/"),
    "two rounds": (_rounds, r"The link '.*/x' leads back"),
    "one round": (functools.partial(_rounds, links="z"), r"The link '.*/z' leads back"),
    "a tower": (_tower, r"at most 64 others\. Got '.*/a/a'"),
}


@pytest.mark.parametrize("kind", TANGLED)
@pytest.mark.parametrize("name", ["cat", ".cat", "0"])
def test_links_of_a_folder_end(kind, name, tmp_path):
    make, words = TANGLED[kind]
    root = tmp_path / "data"
    root.mkdir()
    make(root, name)
    picture(0).save(root / name / "0.png")
    pattern = str(root / "**" / "*.tar")
    with pytest.raises(InputError, match=words):
        open_dataset("imagefolder", root)
    with pytest.raises(InputError, match=words):
        open_dataset(pattern)
    for read in (lambda: len(open_dataset(str(root))), lambda: len(poisons.read(root))):
        if "round" in kind and not name.startswith("."):
            assert read() == 1
        elif not name.startswith("."):
            with pytest.raises(InputError, match=words):
                read()


def in_a_tar(folder: Path) -> str:
    png = encoded(picture(0))
    path = write_tar(folder / "a.tar", [("0.png", png), ("README", b""), ("._0.png", b""), ("__meta__/x.json", b"{}")])
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.LNKTYPE, "1.png"), (tarfile.SYMTYPE, "2.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "0.png"
            tar.addfile(link)
    return str(path)


def beside_tars(folder: Path) -> str:
    write_tar(folder / "0.tar", [("0.png", encoded(picture(0)))])
    for name in ("sizes.json", "0.tar.gz", ".hidden"):
        (folder / name).touch()
    (folder / "more").mkdir()
    return str(folder)


def among_classes(folder: Path) -> str:
    (folder / "cat" / "deep").mkdir(parents=True)
    for name in ("cat/0.png", "cat/deep/1.png", "loose.png"):
        picture(0).save(folder / name)
    for name in ("cat/notes.txt", "cat/2.gif", ".hidden"):
        (folder / name).touch()
    return "imagefolder"


@pytest.mark.parametrize(
    ("made", "length", "said"),
    [
        (in_a_tar, 1, "5 members of .*a.tar are in no sample, the first README"),
        (beside_tars, 1, r"3 files .* \(1 .gz, 1 no suffix, 1 .json; the first is 0.tar.gz\): the tars that lie right"),
        (among_classes, 2, r"3 files .* \(1 .gif, 1 .txt, 1 .png; the first is cat/2.gif\): the images in its class"),
    ],
    ids=["tar", "folder of tars", "class folders"],
)
def test_what_is_not_read_is_counted(made, length, said, tmp_path, caplog):
    spec = made(tmp_path)
    spec = "webdataset" if made is beside_tars else spec
    assert len(open_dataset(spec, tmp_path)) == length
    assert re.search(said, caplog.text)
    assert len(caplog.records) == 1


def test_nothing_is_said_where_all_is_read(tmp_path, caplog):
    png = encoded(picture(0))
    (tmp_path / "cat").mkdir()
    picture(0).save(tmp_path / "cat" / "0.png")
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", [("0.png", png), ("0.cls", b"1")])
    assert [len(open_dataset(spec)) for spec in (str(tmp_path / "cat"), str(tmp_path / "tars" / "0.tar"))] == [1, 1]
    assert len(open_dataset("webdataset", tmp_path / "tars")) == 1
    (tmp_path / "tars" / "0.tar").rename(tmp_path / "0.tar")
    (tmp_path / "tars").rmdir()
    (tmp_path / "0.tar").unlink()
    assert len(open_dataset("imagefolder", tmp_path)) == 1
    assert not caplog.text


def test_threads_share_a_dataset(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    png = encoded(picture(0))
    paths = [write_tar(tmp_path / f"{i:03}.tar", [(f"{i}.png", png), (f"{i}.cls", b"%d" % i)]) for i in range(100)]
    dataset = TarDataset(paths)
    order = torch.randperm(800, generator=torch.Generator().manual_seed(0)) % 100
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: dataset[i]["cls"], order.tolist())) == order.tolist()


def test_a_module_relative_to_nothing_is_no_dataset():
    with pytest.raises(InputError, match=r"no 'train' of a module '\./sets\.py'"):
        open_dataset("./sets.py:train")
