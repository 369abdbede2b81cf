"""Purification in a WebDataset pipeline: the same pixels, whatever is around them."""

from __future__ import annotations

import functools
import pickle
import shutil
from collections.abc import Iterable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from torchvision import tv_tensors

from purifyloader.core import noise
from purifyloader.core.images import quantize, to_engine
from purifyloader.errors import InputError, PurifyError
from purifyloader.purified.job import COMPENSATE
from purifyloader.purifiers import Chain, DenoiseOnce, Jpeg, Purifier, Resize
from purifyloader.transforms import Compensate
from purifyloader.transforms.webdataset import _index, compensated, purified
from tests import processes
from tests.conftest import random_images, slim_denoiser

COUNT = 10
SIZES = [(16, 16), (16, 12), (9, 16)]

# webdataset's own
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def picture(index: int) -> Image.Image:
    height, width = SIZES[index % len(SIZES)]
    array = random_images(1, 16, seed=index)[0, :, :height, :width]
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    for shard in range(2):
        with wds.TarWriter(str(folder / f"train-{shard:04}.tar")) as writer:
            for i in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                writer.write({"__key__": f"{i:04}", "png": picture(i), "cls": i, "json": {"row": i}})
    return folder


@pytest.fixture(scope="module")
def purifier() -> DenoiseOnce:
    return DenoiseOnce(slim_denoiser(), 0.1, compute_batch=16)


def pipeline(folder: Path, stage, decode: str = "pil", shards: Iterable[int] = range(2)) -> wds.WebDataset:
    urls = [str(folder / f"train-{shard:04}.tar") for shard in shards]
    return wds.WebDataset(urls, shardshuffle=False).decode(decode).compose(stage)


def pixels(samples: Iterable[dict]) -> dict[str, bytes]:
    return {s["__key__"]: np.asarray(s["png"]).tobytes() for s in samples}


@pytest.fixture(scope="module")
def expected(folder, purifier) -> dict[str, bytes]:
    return pixels(pipeline(folder, purified(purifier)))


def test_every_image_changes_and_nothing_else_does(folder, purifier):
    before = list(pipeline(folder, lambda samples: samples))
    after = list(pipeline(folder, purified(purifier)))
    assert [s["__key__"] for s in after] == [f"{i:04}" for i in range(COUNT)]
    for a, b in zip(after, before, strict=True):
        assert list(a) == list(b)
        assert {k: v for k, v in a.items() if k != "png"} == {k: v for k, v in b.items() if k != "png"}
        assert a["png"].size == b["png"].size
        assert a["png"].mode == "RGB"
        assert np.asarray(a["png"]).tobytes() != np.asarray(b["png"]).tobytes()
    assert np.array_equal(np.asarray(before[0]["png"]), np.asarray(picture(0)))


def test_each_image_is_what_the_purifier_makes_of_it_alone(folder, purifier):
    """And the purifier gets nothing but the pixels and a seed of its own for each image."""
    stage = purified(purifier, seed=3, epoch=2)
    seeds = []
    for sample in pipeline(folder, stage):
        index = int(sample["__key__"])
        seed = noise.fold_in(noise.image_keys(3, 2, [index_of(f"train-{index // 5:04}.tar", sample["__key__"])]), 0)
        x = to_engine(picture(index))[0]
        want = quantize(purifier(x[None], seed)[0]).permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(sample["png"]), want)
        seeds.append(int(seed))
    assert len(set(seeds)) == COUNT


def index_of(shard: str, key: str) -> int:
    """The documented derivation, written again: it must never change."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(f"{shard}\0{key}".encode(), digest_size=8).digest(), "little", signed=True)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_batch_size_changes_nothing(batch_size, folder, purifier, expected):
    assert pixels(pipeline(folder, purified(purifier, batch_size=batch_size))) == expected


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (1, "forkserver")])
def test_workers_change_nothing(workers, start, folder, purifier, expected):
    dataset = pipeline(folder, purified(purifier, batch_size=4))
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=start)
    assert pixels(loader) == expected


def test_order_and_folder_change_nothing(folder, tmp_path, purifier, expected):
    assert pixels(pipeline(folder, purified(purifier), shards=[1, 0])) == expected
    assert pixels(reversed(list(pipeline(folder, purified(purifier, batch_size=1))))) == expected
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert pixels(pipeline(tmp_path / "elsewhere", purified(purifier))) == expected


def sample(url: str | None = "a.tar", key: str = "k", **fields) -> dict:
    return {"__key__": key, **({} if url is None else {"__url__": url}), "png": picture(0), **fields}


def test_noise_depends_on_seed_epoch_shard_and_key_alone(purifier):
    def once(stage, sample):
        return np.asarray(next(stage([sample]))["png"]).tobytes()

    base = once(purified(purifier), sample())
    others = [
        once(purified(purifier, seed=1), sample()),
        once(purified(purifier, epoch=1), sample()),
        once(purified(purifier), sample("b.tar")),
        once(purified(purifier), sample(key="l")),
        once(purified(purifier), sample(None)),
        once(purified(purifier), sample("a.tark", "")),  # the two strings do not run into each other
    ]
    assert len({base, *others}) == 1 + len(others)
    for url in (
        "/x/y/a.tar",
        "file:/x/a.tar",
        "https://h/x/a.tar?sig=1",
        "https://h/a.tar?sig=a/b",
        "pipe:cat x/a.tar",
    ):
        assert once(purified(purifier), sample(url)) == base
    assert once(purified(purifier), sample(cls=3)) == base


def test_noise_does_not_depend_on_the_pixels():
    class Recorded(Jpeg):
        def purify_images(self, images, seeds_B):
            self._seeds = seeds_B
            return super().purify_images(images, seeds_B)

    purifier, seen = Recorded(), []
    for image in (picture(0), picture(1), picture(0).convert("L")):
        list(purified(purifier)([{**sample(), "png": image}]))
        seen.append(int(purifier._seeds))
    assert len(set(seen)) == 1


@pytest.mark.parametrize("decode", ["torchrgb", "torchrgb8", "rgb", "rgb8", "pilrgba"])
def test_the_type_stays(decode, folder, purifier, expected):
    before = list(pipeline(folder, lambda samples: samples, decode))
    after = list(pipeline(folder, purified(purifier), decode))
    for a, b in zip(after, before, strict=True):
        assert type(a["png"]) is type(b["png"])
        x, y = np.asarray(a["png"]), np.asarray(b["png"])
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert not np.array_equal(x, y)
    x = to_engine(after[0]["png"])[0]
    assert quantize(x).permute(1, 2, 0).numpy().tobytes() == expected["0000"]


def test_a_tensor_subclass_and_a_grey_image(purifier):
    image = tv_tensors.Image(random_images(1)[0])
    (out,) = purified(purifier)([{**sample(), "png": image}])
    assert isinstance(out["png"], tv_tensors.Image)
    (out,) = purified(purifier)([{**sample(), "png": picture(0).convert("L")}])
    assert out["png"].mode == "L"


def test_a_purifier_may_change_the_size(folder):
    out = list(pipeline(folder, purified(Chain(Resize(8, crop=8), Jpeg()))))
    assert {s["png"].size for s in out} == {(8, 8)}


def test_the_stage_pickles(folder, purifier, expected):
    stage = pickle.loads(pickle.dumps(purified(purifier)))
    assert pixels(pipeline(folder, stage)) == expected
    assert pixels(pipeline(folder, stage)) == expected  # again: it holds no state


def test_the_users_sample_is_left_alone(purifier):
    mine = sample()
    image = mine["png"]
    (out,) = purified(purifier)([mine])
    assert mine["png"] is image
    assert out is not mine


def test_to_tuple_and_batches_come_after(folder, purifier, expected):
    dataset = pipeline(folder, purified(purifier)).to_tuple("__key__", "png", "cls")
    assert {k: np.asarray(png).tobytes() for k, png, _ in dataset} == expected


def test_one_image_is_chosen_by_name(purifier):
    two = sample(mask=np.zeros((16, 16), np.uint8), features=torch.zeros(4))
    (out,) = purified(purifier)([two])
    assert out["mask"] is two["mask"]
    two["other.png"] = picture(3)
    with pytest.raises(InputError, match=r"Sample 'k' of a\.tar: There are several images, png, other\.png"):
        list(purified(purifier)([two]))
    (out,) = purified(purifier, image_key="png")([two])
    assert out["other.png"] is two["other.png"]
    assert np.asarray(out["png"]).tobytes() != np.asarray(two["png"]).tobytes()


class Stubborn(Jpeg):
    """Refuses images of one width, as a network may."""

    def run(self, x_BCHW, seeds_B):
        if x_BCHW.shape[-1] == 12:
            raise InputError("Expected another width. Got 12.")
        return super().run(x_BCHW, seeds_B)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"png": torch.full((3, 8, 8), 2.0)}, r"Sample 'bad' of a\.tar: .*divide 0-255"),
        ({"png": np.zeros((3, 8, 8), np.uint8)}, r"Sample 'bad' of a\.tar: .*channels-last"),
        ({"png": b"\x89PNG"}, r"Sample 'bad' of a\.tar: .*\['__key__', '__url__', 'png'\]: decode it first"),
        ({"png": picture(1)}, r"Sample 'bad' of a\.tar: Expected another width"),
    ],
)
def test_a_bad_sample_is_named(bad, message):
    samples = [sample(key="good"), {**sample(key="bad"), **bad}, sample(key="fine")]
    with pytest.raises(InputError, match=message):
        list(purified(Stubborn())(samples))


def test_alpha_and_another_size_do_not_go_together():
    image = picture(0).convert("RGBA")
    (out,) = purified(Chain(Resize(16), Jpeg()))([{**sample(), "png": image}])
    assert out["png"].mode == "RGBA"
    with pytest.raises(InputError, match=r"Sample 'k' of a\.tar: .*without alpha"):
        list(purified(Resize(8))([{**sample(), "png": image}]))


def test_the_place_of_the_stage_is_said(folder, purifier):
    for late in (
        wds.WebDataset(str(folder / "train-0000.tar"), shardshuffle=False).decode("pil").to_tuple("png", "cls"),
        wds.WebDataset(str(folder / "train-0000.tar"), shardshuffle=False).decode("pil").listed(2),
        [{"png": picture(0)}],
        [{"__key__": ["a", "b"], "png": torch.zeros(2, 3, 8, 8)}],
    ):
        with pytest.raises(InputError, match="right after decode, before to_tuple"):
            next(purified(purifier)(late))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"purifier": "jpeg"}, "A str is no purifier"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"epoch": 2**70}, "fit in 64 bits"),
        ({"batch_size": 0}, r"batch_size must be an integer from 1 to 2\^63 - 1. Got 0"),
        ({"batch_size": "many"}, "batch_size must be an integer. Got 'many'"),
        ({"image_key": 0}, "image_key must be the name"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        purified(**{"purifier": Jpeg(), **arguments})


def test_a_gpu_in_a_forked_worker_is_refused(monkeypatch):
    from purifyloader.core import devices

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(devices, "get_worker_info", lambda: object())
    with pytest.raises(PurifyError, match="spawn"):
        devices.check_worker(torch.device("cuda:0"))
    devices.check_worker(torch.device("cpu"))


@pytest.mark.gpu
def test_on_a_gpu(folder, purifier):
    on_gpu = DenoiseOnce(slim_denoiser(), 0.1).to("cuda")
    a = pixels(pipeline(folder, purified(on_gpu)))
    assert a == pixels(pipeline(folder, purified(on_gpu, batch_size=3)))
    loader = wds.WebLoader(pipeline(folder, purified(on_gpu)), batch_size=None, num_workers=2)
    with pytest.raises(PurifyError, match="spawn"):
        list(loader)


def test_nothing_of_webdataset_is_imported():
    code = "import sys, purifyloader.transforms.webdataset; print('webdataset' in sys.modules)"
    done = processes.run(processes.Code(code))
    assert done.stdout.split() == ["False"], done.stderr


def test_samples_stream_batch_by_batch():
    """An endless pipeline works, and no more than a batch is read ahead."""
    read = []

    def endless():
        for i in range(10**9):
            read.append(i)
            yield sample(key=str(i))

    stage: Purifier = Jpeg()
    out = purified(stage, batch_size=4)(endless())
    assert [next(out)["__key__"] for _ in range(5)] == ["0", "1", "2", "3", "4"]
    assert len(read) == 8


# -- compensated -------------------------------------------------------------------------------------


def compensate_epochs(folder: Path, passes: int, workers: int = 0, **options) -> list[dict[str, bytes]]:
    """What a loader reads in each of so many passes."""
    stage = compensated(Compensate(), seed=3)
    loader = wds.WebLoader(pipeline(folder, stage), batch_size=None, num_workers=workers, **options)
    return [pixels(loader) for _ in range(passes)]


@functools.cache
def by_hand(epoch: int) -> dict[str, bytes]:
    found = {}
    for i in range(COUNT):
        sample = {"__key__": f"{i:04}", "__url__": f"train-{i // (COUNT // 2):04}.tar"}
        key = noise.fold_in(noise.image_keys(3, epoch, _index(sample)), COMPENSATE)
        found[sample["__key__"]] = np.asarray(Compensate().apply(picture(i), key)).tobytes()
    return found


def test_compensation_is_that_of_the_key_of_each_sample(folder):
    assert compensate_epochs(folder, 2) == [by_hand(0), by_hand(1)]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_count_passes_as_one_process_does(persistent, folder):
    options = {"multiprocessing_context": "fork", "persistent_workers": persistent}
    assert compensate_epochs(folder, 3, workers=2, **options) == [by_hand(0), by_hand(1), by_hand(2)]


def test_spawned_workers_count_passes_together(folder):
    """What such a worker gets, which another worker takes the place of in the next pass, shares the stage's counts."""
    stage = compensated(seed=3)
    for epoch in range(3):
        sent = ForkingPickler.loads(ForkingPickler.dumps(stage))
        assert pixels(pipeline(folder, sent)) == by_hand(epoch)
    assert pixels(pipeline(folder, stage)) == by_hand(3)


def test_set_epoch_and_batches(folder):
    stage = compensated(seed=3, batch_size=3)
    stage.set_epoch(7)
    again = pickle.loads(pickle.dumps(stage))
    for its in (stage, again):
        assert pixels(pipeline(folder, its)) == by_hand(7)
        assert pixels(pipeline(folder, its)) == by_hand(8)
    stage.set_epoch(7)
    assert pixels(pipeline(folder, stage)) == by_hand(7)
    assert pixels(pipeline(folder, again)) == by_hand(9)  # a copy counts for itself


def test_compensation_refuses(folder):
    for arguments, message in (
        ({"compensate": 0.4}, "object with apply"),
        ({"seed": "a"}, "integer"),
        ({"batch_size": 0}, "batch_size"),
        ({"image_key": 1}, "image_key"),
    ):
        with pytest.raises(InputError, match=message):
            compensated(**arguments)
    with pytest.raises(InputError, match="epoch"):
        compensated().set_epoch(-1)
    with pytest.raises(InputError, match=r"Sample '0000' of train-0000\.tar: An image is"):
        list(pipeline(folder, compensated(image_key="cls")))
