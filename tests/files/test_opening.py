"""What is no file, or is nearly all holes, is refused by name wherever a file of somebody else's is opened."""

from __future__ import annotations

import gzip
import io
import os
import signal
import socket
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader import PurifiedDataset, poisons, precompute, pretrained
from purifyloader.bench.transfer import _read as read_extractor
from purifyloader.cache import CacheReader, inspect
from purifyloader.cache.tars import export_tars, import_tars
from purifyloader.certify.votes import VoteFolder
from purifyloader.commands.training import fields_of
from purifyloader.datasets.named import TarDataset, open_dataset, read_image
from purifyloader.datasets.select import read_indices
from purifyloader.datasets.splits import load_sample
from purifyloader.errors import PurifyError
from purifyloader.files.locks import Lock, is_held, lock_path, read_note
from purifyloader.files.opening import UNPACKED, check_file, opened
from purifyloader.pretrained.checkpoint import summary
from purifyloader.pretrained.convert import convert
from purifyloader.purifiers import Jpeg
from purifyloader.recipes.models import from_file
from purifyloader.results import rows
from purifyloader.train.state import load_state
from tests.conftest import tiny_energy
from tests.fuzz.guard import limits


@contextmanager
def in_time(seconds: float = 10) -> Iterator[None]:
    """Fail where something waits: a named pipe is opened once somebody writes to it."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"it waits for more than {seconds} s")

    former = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def make_socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)  # the name of a socket has at most 100 characters
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


THINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, r"named pipe"),
    "a link to a pipe": (lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe")), r"named pipe"),
    "a socket": (make_socket, r"socket"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), r"device"),
    "a folder": (Path.mkdir, r"directory|folder|Permission|not a whole|no such file|no file"),
}


def put(thing: str, path: Path) -> str:
    """Put something in the place of a file; return what an error must say."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    make, words = THINGS[thing]
    make(path)
    return words


def cached(folder: Path) -> Path:
    precompute([(Image.new("RGB", (6, 6)), i) for i in range(3)], Jpeg(50), folder, shard_size=2, progress=False)
    return folder


def image_folder(at: Path) -> Path:
    (at / "images").mkdir(parents=True)
    Image.new("RGB", (6, 6)).save(at / "images" / "a.png")
    return at / "images"


def exported(at: Path) -> Path:
    export_tars(CacheReader(cached(at / "cache")), at / "tars")
    return at / "tars"


def model_folder(at: Path) -> Path:
    pretrained.save(tiny_energy(), at / "model")
    return at / "model"


def poison_folder(at: Path) -> Path:
    clean = np.full((4, 8, 8, 3), 128, np.uint8), np.array([0, 1, 0, 1])
    poisons.write(poisons.make("urp", clean), at / "poison")
    return at / "poison"


def _vote(at: Path) -> None:
    VoteFolder(at, **VOTES).write(0, np.array([0, 1, 2]))


VOTES: dict[str, Any] = {"settings": {"sigma": 0.1}, "models": 1, "inputs": 3, "classes": 4}


def voted(at: Path) -> Path:
    _vote(at / "votes")
    return at / "votes"


Place = tuple[Callable[[Path], Path], str, Callable[[Path], object]]


def nothing(at: Path) -> Path:
    return at / "x"


PLACES: dict[str, Place] = {
    "image": (nothing, "a.png", lambda at: read_image(at / "a.png")),
    "image of a folder": (image_folder, "b.png", lambda at: [open_dataset(str(at))[i] for i in range(2)]),  # type: ignore[index]
    "tar": (nothing, "a.tar", lambda at: TarDataset([at / "a.tar"])),
    "tar of a folder": (nothing, "a.tar", lambda at: open_dataset("webdataset", at)),
    "batch of CIFAR-10": (nothing, "cifar-10-batches-py/data_batch_1", lambda at: open_dataset("cifar10", at)),
    "shard of a sample": (nothing, "train-000000.tar.gz", lambda at: load_sample(at, "train")),
    "index of a cache": (lambda at: cached(at / "c"), "index.json", CacheReader),
    "shard": (lambda at: cached(at / "c"), "shard-00001.safetensors", CacheReader),
    "shard to verify": (
        lambda at: cached(at / "c"),
        "shard-00001.safetensors",
        lambda at: _raise(inspect.verify(inspect.read_folder(at)).in_words(1.0)),
    ),
    "manifest of an export": (exported, "cache.json", lambda at: import_tars(at, at / "out")),
    "tar of an export": (exported, "000000.tar", lambda at: import_tars(at, at / "out")),
    "model's config": (model_folder, "config.json", lambda at: pretrained.load(at, "energy")),
    "model's weights": (model_folder, "model.safetensors", lambda at: pretrained.load(at, "energy")),
    "weights to describe": (model_folder, "model.safetensors", summary),
    "foreign weights": (nothing, "a.pth", lambda at: convert(at / "a.pth", at / "out", "puregen-energy")),
    "weights of a folder": (model_folder, "model.safetensors", lambda at: convert(at, at / "out", "puregen-energy")),
    "poison": (nothing, "a.pth", lambda at: poisons.read(at / "a.pth")),
    "arrays of a poison": (nothing, "a.npz", lambda at: poisons.read(at / "a.npz")),
    "image of a poison": (poison_folder, "0.png", poisons.read),
    "labels of a poison": (poison_folder, "labels.csv", poisons.read),
    "record of a poison": (poison_folder, "poison.json", poisons.read),
    "trigger": (nothing, "a.npy", lambda at: poisons.read_trigger(at / "a.npy")),
    "coefficients": (nothing, "a.pt", lambda at: poisons.read_ar_coefficients(at / "a.pt")),
    "rows": (nothing, "rows.jsonl", lambda at: rows.read(at / "rows.jsonl")),
    "settings of votes": (voted, "settings.json", lambda at: VoteFolder(at, **VOTES)),
    "training state": (nothing, "s.safetensors", lambda at: load_state(at / "s.safetensors", {"config": {}})),
    "fields of a training": (nothing, "a.json", lambda at: fields_of(at / "a.json")),
    "indices": (nothing, "a.json", lambda at: read_indices(at / "a.json")),
    "purifier": (nothing, "a.json", lambda at: from_file(at / "a.json")),
}


def _raise(text: str) -> None:
    raise PurifyError(text)


CASES = [(name, thing) for name in PLACES for thing in THINGS if name != "weights of a folder"]
CASES.remove(("image of a folder", "a folder"))  # which may have images


@pytest.mark.parametrize(("name", "thing"), CASES)
def test_what_is_no_file_is_refused_by_name(name: str, thing: str, tmp_path: Path) -> None:
    make, file, opens = PLACES[name]
    folder = make(tmp_path)
    words = put(thing, folder / file)
    with in_time(), limits(tmp_path), pytest.raises(PurifyError) as caught:
        opens(folder)
    message = str(caught.value)
    assert Path(file).name in message
    if thing != "a folder":
        assert words in message or "no file" in message or "no such file" in message, message


ROW = {"fingerprint": "a", "data": "d", "attack": "none", "defence": "none", "seed": 0}
WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{
        f"a cache with {name}": (name, cached)
        for name in ("claim.json", "index.json", "shard-00000.safetensors", "plan.json", ".claim.json.lock")
    },
    "a cache with a lock": (".shard-00000.safetensors.lock", cached),
    "a cache filled on demand": (
        "claim.json",
        lambda at: PurifiedDataset([(Image.new("RGB", (6, 6)), 0)], Jpeg(50), cache=at, missing="purify")[0],
    ),
    "an import": ("out/index.json", lambda at: import_tars(exported(at), at / "out")),
    "rows": ("rows.jsonl", lambda at: rows.add(at / "rows.jsonl", ROW)),
    "rows with a lock": (".rows.jsonl.lock", lambda at: rows.add(at / "rows.jsonl", ROW)),
    "a model": ("model.safetensors", lambda at: pretrained.save(tiny_energy(), at)),
    "a model with a lock": (".config.json.lock", lambda at: pretrained.save(tiny_energy(), at)),
    "a lock of votes": (".settings.lock", _vote),
    "an extractor": ("a.safetensors", lambda at: read_extractor(at / "a.safetensors", "small", 4)),
}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", WRITERS)
def test_writing_beside_it_never_waits(name: str, thing: str, tmp_path: Path) -> None:
    """What is damaged may be made again in its place; all else is one error that names it."""
    file, writes = WRITERS[name]
    put(thing, tmp_path / "f" / file)
    message = Path(file).name
    with in_time(), limits(tmp_path):
        try:
            writes(tmp_path / "f")
        except PurifyError as error:
            message = str(error)
    assert Path(file).name in message


@pytest.mark.parametrize("thing", THINGS)
def test_locks_are_files(thing: str, tmp_path: Path) -> None:
    put(thing, path := lock_path(tmp_path, "a"))
    with in_time(), limits(tmp_path):
        assert not is_held(path)
        assert read_note(path) == 0
        with pytest.raises(PurifyError, match=r"\.a\.lock"):
            Lock(tmp_path, "a").acquire(wait=True)


@pytest.mark.parametrize("thing", THINGS)
def test_votes_that_are_no_file_are_made_again(thing: str, tmp_path: Path) -> None:
    put(thing, voted(tmp_path) / "00000.json")
    with in_time(), limits(tmp_path):
        assert not VoteFolder(tmp_path / "votes", **VOTES).has(0)


def sparse(path: Path, size: int, beginning: bytes = b"") -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(beginning)
    os.truncate(path, size)


SIZES = [UNPACKED + 2**28, 2**43]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in PLACES if name != "trigger"])
def test_a_file_of_holes_is_refused_before_it_is_read(name: str, size: int, tmp_path: Path) -> None:
    make, file, opens = PLACES[name]
    folder = make(tmp_path)
    beginning = (folder / file).read_bytes() if (folder / file).exists() else b""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    sparse(folder / file, size, beginning)
    with in_time(), limits(tmp_path), pytest.raises(PurifyError, match=Path(file).stem):
        opens(folder)


def npy(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def tar_member(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def holes_in_a_tar(path: Path, member: str, size: int, others: bytes = b"") -> None:
    sparse(path, 512 + len(others) + -(-size // 512) * 512 + 1024, others + tar_member(member, size))


WHOLE: dict[str, Callable[[Path], object]] = {  # whose lengths are as their headers say
    "an array": lambda at: (
        sparse(at / "a.npy", 128 + 4 * 10**10, npy((10**10,))),
        poisons.read(at / "a.npy"),
    ),
    "a trigger": lambda at: (
        sparse(at / "a.npy", 128 + 4 * 3 * 10**10, npy((3, 10**5, 10**5))),
        poisons.read_trigger(at / "a.npy"),
    ),
    "a tensor of safetensors": lambda at: (
        sparse(at / "a.safetensors", 8 + 64 + 4 * 10**10, _tensor_header(10**10)),
        convert(at / "a.safetensors", at / "out", "puregen-energy"),
    ),
    "a training state": lambda at: (
        sparse(at / "a.safetensors", 8 + 64 + 4 * 10**10, _tensor_header(10**10)),
        load_state(at / "a.safetensors", {"config": {}}),
    ),
    "a picture in a tar": lambda at: (holes_in_a_tar(at / "a.tar", "0.png", 10**10), TarDataset([at / "a.tar"])),
    "a class in a tar": lambda at: (holes_in_a_tar(at / "a.tar", "0.cls", 10**10), TarDataset([at / "a.tar"])),
    "a picture": lambda at: (sparse(at / "a.jpg", 10**12, b"\xff\xd8\xff\xe0"), read_image(at / "a.jpg")),
}


def _tensor_header(numbers: int) -> bytes:
    text = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (numbers, 4 * numbers)
    return (64).to_bytes(8, "little") + text.ljust(64)


@pytest.mark.parametrize("name", WHOLE)
def test_holes_that_the_headers_declare_are_refused(name: str, tmp_path: Path) -> None:
    with in_time(), limits(tmp_path), pytest.raises(PurifyError, match=r"a\.\w+ .*sparse file"):
        WHOLE[name](tmp_path)


@pytest.mark.parametrize("field", ["cls", "json", "txt", "x.cls", "png"])
def test_a_member_larger_than_its_kind_is_refused_before_it_is_read(field: str, tmp_path: Path) -> None:
    """In a tar that is not refused as a whole, for it has enough on the disk."""
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    picture = tar_member("0.png", len(image.getvalue())) + image.getvalue()
    others = b"" if field == "png" else picture + bytes(-len(picture) % 512)
    size = 2**30 + 1 if field == "png" else 2**28 + 1
    more = tar_member("0.bin", 2**26) + os.urandom(2**20) * 64 if field == "png" else b""
    holes_in_a_tar(tmp_path / "a.tar", f"0.{field}", size, others)
    if more:
        sparse(tmp_path / "a.tar", 512 + 2**26 + 512 + 2**30 + 512 + 1024, more + tar_member("0.png", size))
        more = b""
    with in_time(), limits(tmp_path):
        dataset = TarDataset([tmp_path / "a.tar"])
        with pytest.raises(PurifyError, match=rf"a\.tar: 0\.{field} must be of at most"):
            _ = dataset[0]


@pytest.mark.parametrize("size", [0, 1, 4096, UNPACKED, UNPACKED + 1, 2**30])
@pytest.mark.parametrize("filled", [False, True])
def test_files_that_are_there_are_opened(size: int, filled: bool, tmp_path: Path) -> None:
    """Those that are large are half of holes here, as an array of small perturbations may be."""
    path = tmp_path / "a"
    sparse(path, size)
    if filled and size:
        with path.open("r+b") as file:
            for at in range(0, size, max(1, size // 16)):
                file.seek(at)
                file.write(b"x" * min(2**21, size - at))
    if size > UNPACKED and not filled:
        with pytest.raises(OSError, match="sparse file"):
            check_file(path)
    else:
        with opened(path) as file:
            assert file.tell() == 0
            assert len(file.read(100)) == min(100, size)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(FileNotFoundError):
            opened(path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "link")
    (tmp_path / "a").write_text("x")
    with pytest.raises(NotADirectoryError):
        opened(tmp_path / "a" / "b")


def test_what_is_read_is_what_torch_saved(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as file:
        assert torch.load(file, weights_only=True).tolist() == [1, 1, 1]


LABELS = {
    "zeros": bytes(2**20),
    "a field of a megabyte": b"file,label,poisoned\n" + b"x" * 2**20 + b",1,1\n",
    "a quote that is not closed": b'file,label,poisoned\n"' + b"0.png,1,1\n" * 20_000,
    "other bytes": b"file,label,poisoned\n\xff.png,1,1\n",
    "no columns": b"0.png,1,1\n",
    "a row that is short": b"file,label,poisoned\n0.png\n",
    "a long number": b"file,label,poisoned\n0.png," + b"1" * 5000 + b",1\n",
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_no_table_are_named(name: str, tmp_path: Path) -> None:
    (poison_folder(tmp_path) / "labels.csv").write_bytes(LABELS[name])
    with limits(tmp_path), pytest.raises(PurifyError, match=r"labels\.csv"):
        poisons.read(tmp_path / "poison")


@pytest.mark.parametrize("size", [2**19, 2**20, 2**24])
def test_a_sample_that_unpacks_to_much_is_refused(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("purifyloader.datasets.splits.UNPACKED", 2**18)
    (tmp_path / "train-000000.tar.gz").write_bytes(gzip.compress(bytes(size)))
    with limits(tmp_path), pytest.raises(PurifyError, match=r"train-000000\.tar\.gz .*unpacks to more than"):
        load_sample(tmp_path, "train")
