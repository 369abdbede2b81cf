"""`PurifiedLoader`: what a loader gives, purified once, on its device, with draws that can be had again."""

from __future__ import annotations

import functools
import pickle
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from accelerate import Accelerator, skip_first_batches
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    default_collate,
    random_split,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from purifyloader import PurifiedDataset, PurifiedLoader, purifiers, recipes
from purifyloader.core import noise
from purifyloader.errors import InputError, PurifyError
from purifyloader.purified.job import COMPENSATE, PURIFY
from purifyloader.transforms import Compensate, Purify
from purifyloader.transforms.webdataset import purified
from tests import processes
from tests.conftest import random_images, tiny_denoiser, tiny_energy
from tests.counting import Counting, Numbered, Seeds, numbered, read
from tests.purified import ranks
from tests.train.tiny import free_port

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
Pair = namedtuple("Pair", ["image", "label"])


def loader_of(images: Tensor, size: int = 8, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(images, torch.arange(len(images))), size, **options)


def collected(loader: Any, key: Any = 0) -> Tensor:
    return torch.cat([batch[key] for batch in loader])


# -- each image once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [None, 0, 1, 3, 100])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_image_once_with_its_label(ahead: int | None, shuffle: bool) -> None:
    loader = PurifiedLoader(loader_of(numbered(300), 32, shuffle=shuffle), Counting(), ahead=ahead)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    numbers, times = read(images)
    assert numbers == labels.tolist()
    assert sorted(numbers) == list(range(300))
    assert set(times) == {1}
    assert len(loader) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_through_workers_and_a_transform(workers: int) -> None:
    loader = DataLoader(Numbered(40, TO_TENSOR), 16, num_workers=workers)
    numbers, times = read(collected(PurifiedLoader(loader, Counting())))
    assert (numbers, set(times)) == (list(range(40)), {1})


def test_of_a_webdataset(tmp_path) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i, image in enumerate(numbered(20)):
            tar.write({"__key__": f"{i:05}", "png": image.permute(1, 2, 0).numpy(), "cls": i})
    urls = str(tmp_path / "a.tar")
    pipeline = wds.WebDataset(urls, shardshuffle=False).decode("torchrgb").to_tuple("png", "cls").batched(8)
    loader = PurifiedLoader(wds.WebLoader(pipeline, batch_size=None, num_workers=1), Counting())
    numbers, times = read(collected(loader))
    assert (numbers, set(times)) == (list(range(20)), {1})
    with pytest.raises(TypeError):
        len(loader)
    twice = wds.WebDataset(urls, shardshuffle=False).decode("pil").compose(purified(Counting()))
    with pytest.raises(InputError, match="purified already"):
        PurifiedLoader(wds.WebLoader(twice, batch_size=None), Counting())


def test_never_twice() -> None:
    plain = Numbered(20)
    for inner in (
        DataLoader(PurifiedDataset(plain, Counting(), transform=TO_TENSOR), 4),
        DataLoader(torch.utils.data.Subset(PurifiedDataset(plain, Counting()), [1, 2]), 4),
        DataLoader(Numbered(20, v2.Compose([Purify(Counting()), TO_TENSOR])), 4),
        PurifiedLoader(loader_of(numbered(9)), Counting()),
    ):
        with pytest.raises(InputError, match="purified already"):
            PurifiedLoader(inner, Counting())
    # compensation after a purified dataset is what the loader is also for
    loader = PurifiedLoader(
        DataLoader(PurifiedDataset(plain, Counting(), transform=TO_TENSOR), 20), None, compensate=Compensate(0, 0.0)
    )
    assert set(read(collected(loader))[1]) == {1}


class Hiding:
    """A wrapper whose inside is in no dictionary."""

    __slots__ = ("hidden",)

    def __init__(self, inner: Any) -> None:
        self.hidden = inner

    def __getitem__(self, index: int) -> Any:
        return self.hidden[index]

    def __len__(self) -> int:
        return len(self.hidden)


class Holding(Dataset[Any]):
    def __init__(self, inner: Any) -> None:
        self.some_name = [{"deep": inner}]

    def __getitem__(self, index: int) -> Any:
        return self.some_name[0]["deep"][index]

    def __len__(self) -> int:
        return len(self.some_name[0]["deep"])


def test_never_twice_whatever_is_around_it() -> None:
    inner = PurifiedDataset(Numbered(8), Counting(), transform=TO_TENSOR)
    purify = Purify(Counting())
    for loader in (
        DataLoader(Holding(inner), 4),
        DataLoader(Holding(Holding(inner)), 4, num_workers=1),
        DataLoader(Numbered(8, lambda image: purify(TO_TENSOR(image))), 4, num_workers=1),
        DataLoader(
            Numbered(8, TO_TENSOR), 4, collate_fn=lambda samples: default_collate([(purify(x), i) for x, i in samples])
        ),
        DataLoader(Numbered(8, functools.partial(lambda step, image: step(TO_TENSOR(image)), purify)), 4),
        DataLoader(Hiding(inner), 4),
        Again(lambda: (purify(numbered(2)), 0)),
    ):
        with pytest.raises(InputError, match="purified already"):
            list(PurifiedLoader(loader, Counting()))
    compensated = PurifiedDataset(Numbered(8), Counting(), Compensate(0, 0.0), transform=TO_TENSOR)
    with pytest.raises(InputError, match="compensated already"):
        list(PurifiedLoader(DataLoader(compensated, 4), None, compensate=Compensate(0, 0.0)))


class Again:
    """Calls a function for each of its batches."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self):
        return (self.batch() for _ in range(2))


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(8)), lambda d: Holding(Holding(d))])
def test_an_epoch_that_is_set_reaches_the_dataset_inside(wrap) -> None:
    inner = PurifiedDataset(Numbered(8), Seeds(), draws=3, transform=TO_TENSOR)
    loader = PurifiedLoader(DataLoader(wrap(inner), 4), None, compensate=Compensate(0, 0.0))
    for epoch in (2, 1):
        loader.set_epoch(epoch)
        assert inner.epoch == epoch
        inner.set_epoch(epoch)
        assert torch.equal(collected(loader)[0], inner[0][0])


def test_more_images_than_a_pass_has_are_an_empty_batch() -> None:
    class Odd(IterableDataset):
        def __iter__(self):
            yield torch.zeros(0, 3, 8, 8), torch.zeros(0)
            yield numbered(3).float() / 255, torch.arange(3)

    loader = PurifiedLoader(DataLoader(Odd(), batch_size=None), recipes.denoise_once(tiny_denoiser(), sigma=0.1))
    first, second = loader
    assert first[0].shape == (0, 3, 8, 8)
    assert second[0].shape == (3, 3, 8, 8)


# -- what comes out is what came in -------------------------------------------------------------------------


def batches_of(images: Tensor) -> dict[str, tuple[Any, Any, Any]]:
    """A batch in each container: it, where its image is, and the key to name."""
    label = torch.arange(len(images))
    return {
        "tuple": ((images, label), 0, None),
        "list": ([images, label], 0, None),
        "second": ([label, images], 1, 1),
        "dict": ({"image": images, "label": label}, "image", None),
        "other dict": ({"pixel_values": images, "label": label}, "pixel_values", "pixel_values"),
        "named tuple": (Pair(images, label), 0, None),
        "bare": (images, None, None),
    }


@pytest.mark.parametrize("name", list(batches_of(numbered(1))))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_containers_and_types(name: str, dtype: torch.dtype) -> None:
    images = numbered(5)
    images = images if dtype == torch.uint8 else (images.double() / 255).to(dtype)
    batch, where, key = batches_of(images)[name]
    (out,) = PurifiedLoader([batch], Counting(), image_key=key)
    assert type(out) is type(batch)
    held = out if where is None else out[where]
    assert held.dtype == dtype
    if dtype != torch.bfloat16:  # which has no room for 255 levels
        assert read(held) == (list(range(5)), [1] * 5)
    if where is not None:
        others = [k for k in (batch if isinstance(batch, dict) else range(len(batch))) if k != where]
        assert all(out[k] is batch[k] for k in others)
    assert read(images)[1] == [0] * 5 if dtype != torch.bfloat16 else True  # the loader's own are left alone


def test_tensor_types_and_memory_formats() -> None:
    images = numbered(5)
    (out,) = PurifiedLoader([(tv_tensors.Image(images), 1)], Counting())
    assert type(out[0]) is tv_tensors.Image
    assert read(out[0].as_subclass(Tensor)) == (list(range(5)), [1] * 5)
    last = random_images(4, 8).to(memory_format=torch.channels_last)
    (out,) = PurifiedLoader([(last, 1)], Counting())
    assert out[0].is_contiguous(memory_format=torch.channels_last)
    (out,) = PurifiedLoader([(last.contiguous(), 1)], Counting())
    assert out[0].is_contiguous()


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_of_images_of_many_sizes(kind: type) -> None:
    images = [numbered(1, 8)[0], numbered(2, 12)[1], numbered(3, 8)[2]]
    purifier = recipes.denoise_once(tiny_denoiser(), sigma=0.1)
    (out,) = PurifiedLoader([{"image": kind(images), "boxes": "b"}], purifier, seed=3)
    assert type(out["image"]) is kind
    assert out["boxes"] == "b"
    keys = noise.fold_in(noise.image_keys(3, 0, range(3)), PURIFY)
    expected = purifier.purify_images([x.float() / 255 for x in images], keys)
    for x, y in zip(out["image"], expected, strict=True):
        assert torch.equal(x, (y.clamp(0, 1) * 255).round().to(torch.uint8))


def test_grey_images_through_a_purifier_for_colour() -> None:
    grey = random_images(4, 8, channels=1).float() / 255
    (out,) = PurifiedLoader([grey], recipes.denoise_once(tiny_denoiser(), sigma=0.1))
    assert out.shape == grey.shape
    assert not torch.equal(out, grey)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_normalised_batches(dtype: torch.dtype) -> None:
    normalise = v2.Normalize(MEAN, STD)
    images = numbered(200)
    batch = normalise(images.float() / 255).to(dtype)
    (out,) = PurifiedLoader([(batch, 0)], Counting(), normalize=(MEAN, STD))
    assert out[0].dtype == dtype
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert read((out[0].float() * std + mean).clamp(0, 1)) == (list(range(200)), [1] * 200)


def test_what_a_normalised_batch_is_not(caplog) -> None:
    images = random_images(4, 8).float() / 255
    list(PurifiedLoader([(images, 0)], Counting(), normalize=(MEAN, STD)))
    assert "not normalised" in caplog.text
    with pytest.raises(InputError, match=r"Batch 0 of the loader: .*mean and std that the loader normalises with"):
        list(PurifiedLoader([(3 * images - 1.5, 0)], Counting(), normalize=((0.5,) * 3, (0.5,) * 3)))
    with pytest.raises(InputError, match=r"of uint8 are not normalised\. Leave normalize= out"):
        list(PurifiedLoader([(random_images(4, 8), 0)], Counting(), normalize=(MEAN, STD)))
    with pytest.raises(InputError, match="normalize has 2 channels"):
        list(PurifiedLoader([(images, 0)], Counting(), normalize=((0.1, 0.2), (0.1, 0.2))))


# -- draws ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ragged", [False, True])
def test_what_random_erasing_filled_behind_the_normalisation(dtype: torch.dtype, ragged: bool) -> None:
    x = (numbered(6).float() / 255 - 0.5) / 0.25
    x[:, :, 1:5, 2:6] = 2.5 * torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = x.to(dtype)
    batches = [(list(x) if ragged else x, 0)]
    options: Any = {"normalize": ([0.5], [0.25])}
    with pytest.raises(InputError, match=r"random erasing .* keep_outside=True, or .* PurifiedDataset"):
        list(PurifiedLoader(batches, Counting(), **options))
    ((got, _),) = PurifiedLoader(batches, Counting(), keep_outside=True, **options)
    got = torch.stack(got) if ragged else got
    outside = ((x.float() * 0.25).abs() > 0.5 + 4 * torch.finfo(dtype).eps).any(1, keepdim=True).expand_as(x)
    assert 0.05 < outside.float().mean() < 0.25
    assert torch.equal(got[outside], x[outside])
    levels = (got.float() * 0.25 + 0.5) * 255
    purified = ((x.float() * 0.25 + 0.5) * 255).clamp(0, 255)
    purified[:, 0] += 1
    assert torch.allclose(levels[~outside], purified.clamp(0, 255)[~outside], atol=0.1 if dtype.itemsize == 2 else 1e-3)


@pytest.mark.parametrize("spoil", [lambda x: x * 255, lambda x: x.index_fill(0, torch.tensor([1]), float("nan"))])
def test_keeping_what_is_outside_is_no_way_around_a_wrong_normalisation(spoil: Any) -> None:
    with pytest.raises(InputError, match="most of their pixels, or NaN"):
        list(PurifiedLoader([spoil(torch.rand(8, 3, 8, 8))], Counting(), keep_outside=True))


def test_the_pixels_are_those_of_the_purifier_called_by_hand() -> None:
    images = random_images(20, 8)
    purifier = recipes.denoise_once(tiny_denoiser(), sigma=0.1)
    loader = PurifiedLoader(loader_of(images, 8), purifier, compensate=Compensate(), seed=5)
    for epoch in range(2):
        keys = noise.image_keys(5, epoch, range(20))
        by_hand = purifier(images.float() / 255, noise.fold_in(keys, PURIFY)).clamp(0, 1)
        by_hand = Compensate().apply(by_hand, noise.fold_in(keys, COMPENSATE))
        assert torch.equal(collected(loader), (by_hand * 255).round().to(torch.uint8))


def test_epochs_count_up_and_can_be_set() -> None:
    loader = PurifiedLoader(loader_of(random_images(20, 8)), Seeds())
    first, second = collected(loader), collected(loader)
    assert not torch.equal(first, second)
    loader.set_epoch(0)
    assert torch.equal(collected(loader), first)
    assert torch.equal(collected(loader), second)
    assert not torch.equal(collected(PurifiedLoader(loader_of(random_images(20, 8)), Seeds(), seed=1)), first)
    iter(loader)  # a pass that was begun is an epoch
    loader.set_epoch(1)
    assert torch.equal(collected(loader), second)


@pytest.mark.parametrize("batch_size", [1, 7, 20])
def test_by_position_whatever_the_batch(batch_size: int) -> None:
    images = random_images(20, 8)
    expected = collected(PurifiedLoader(loader_of(images, 5), Seeds()))
    assert torch.equal(collected(PurifiedLoader(loader_of(images, batch_size), Seeds(), ahead=2)), expected)


@pytest.mark.parametrize("as_list", [False, True])
def test_by_index_whatever_the_order(as_list: bool) -> None:
    def passes(order: list[int]) -> dict[int, bytes]:
        loader = DataLoader(
            TensorDataset(random_images(20, 8), torch.arange(20)),
            6,
            sampler=order,
            collate_fn=_with_lists if as_list else None,
        )
        found = {}
        for images, indices in PurifiedLoader(loader, Seeds(), index_key=1):
            found.update({int(i): x.numpy().tobytes() for x, i in zip(images, indices, strict=True)})
        return found

    assert passes(list(range(20))) == passes(torch.randperm(20).tolist())


def _with_lists(samples: list[Any]) -> list[Any]:
    return [torch.stack([image for image, _ in samples]), [int(index) for _, index in samples]]


def test_ranks_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    first = collected(PurifiedLoader(loader_of(random_images(20, 8)), Seeds()))
    monkeypatch.setenv("RANK", "1")
    assert not torch.equal(collected(PurifiedLoader(loader_of(random_images(20, 8)), Seeds())), first)


def test_torchs_random_numbers_are_the_scripts_own() -> None:
    def drawn(wrap: bool) -> list[float]:
        torch.manual_seed(0)
        loader: Any = loader_of(random_images(20, 8), shuffle=True)
        purifier = recipes.denoise_once(tiny_denoiser(), sigma=0.1)
        numbers = []
        for images, _ in PurifiedLoader(loader, purifier, compensate=Compensate(), ahead=0) if wrap else loader:
            numbers += [float(torch.rand(())), len(images)]
        return numbers

    assert drawn(True) == drawn(False)


# -- a loader with a state ----------------------------------------------------------------------------------


class Stateful:
    """A loader that can say where it is, as torchdata's StatefulDataLoader does."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.at, self.epochs = batches, 0, []

    def __iter__(self):
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def stateful(ahead: int = 0) -> PurifiedLoader:
    return PurifiedLoader(Stateful(list(random_images(24, 8).split(4))), Seeds(), ahead=ahead)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("seen", [0, 1, 4, 6])
def test_a_run_goes_on_in_mid_epoch(ahead: int, seen: int) -> None:
    whole = stateful()
    expected = [*whole, *whole, *whole]
    loader = stateful(ahead)
    got = list(loader)
    if seen:
        for batch in loader:
            got.append(batch)
            if len(got) == 6 + seen:
                break
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    again = stateful(ahead)
    again.load_state_dict(state)
    while len(got) < 18:
        got += list(again)
    assert len(got) == 18
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's own
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ahead", [0, 2])
def test_torchdatas_loader_goes_on_in_mid_epoch(workers: int, ahead: int) -> None:
    def loader() -> PurifiedLoader:
        data = TensorDataset(numbered(40), torch.arange(40))
        inner = StatefulDataLoader(data, 8, shuffle=True, num_workers=workers, generator=torch.Generator())
        return PurifiedLoader(inner, Seeds(), ahead=ahead, index_key=1)

    def images(batches: Any) -> dict[int, bytes]:
        return {int(i): x.numpy().tobytes() for x, index in batches for x, i in zip(x, index, strict=True)}

    first = loader()
    batches = iter(first)
    before = images([next(batches), next(batches)])
    state = pickle.loads(pickle.dumps(first.state_dict()))
    rest = images(batches)
    again = loader()
    again.load_state_dict(state)
    assert images(again) == rest
    assert sorted([*before, *rest]) == list(range(40))


def test_a_loader_that_accelerate_prepared() -> None:
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(loader_of(numbered(20)))
    loader = PurifiedLoader(prepared, Counting())
    assert not hasattr(loader, "state_dict")  # it has the method, and no state
    numbers, times = read(collected(loader))
    assert (numbers, set(times)) == (list(range(20)), {1})
    with pytest.raises(InputError, match="purified already"):
        PurifiedLoader(accelerator.prepare(DataLoader(PurifiedDataset(Numbered(9), Counting()), 4)), Counting())


def test_the_rest_of_the_loader_shows_through() -> None:
    inner = Stateful([random_images(2, 8)])
    loader = PurifiedLoader(inner, Counting())
    loader.set_epoch(4)
    assert inner.epochs == [4]
    assert loader.state_dict()["epoch"] == 4
    list(loader)
    assert loader.state_dict()["epoch"] == 5
    loader.set_epoch(4)
    assert loader.state_dict()["epoch"] == 4
    inner.epochs.pop()
    assert loader.epochs == [4]
    loader.mixup_enabled = False
    assert inner.mixup_enabled is False
    plain = PurifiedLoader(loader_of(random_images(4, 8)), Counting())
    assert plain.batch_size == 8
    for name in ("state_dict", "load_state_dict", "no_such_thing"):
        assert not hasattr(plain, name)
    with pytest.raises(AttributeError, match="given when it is made"):
        plain.purifier = Counting()
    with pytest.raises(InputError, match=r"but \['at'\]"):
        loader.load_state_dict({"at": 1})
    copy = pickle.loads(pickle.dumps(plain))
    assert torch.equal(collected(copy), collected(plain))


# -- rebuilt from its attributes, and in a job of several processes ------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(image, 0) for image in numbered(9)])


REBUILT = {
    "a loader of torch": lambda it: DataLoader(it.dataset, batch_sampler=it.batch_sampler),
    "with workers": lambda it: DataLoader(it.dataset, it.batch_size, num_workers=1, timeout=it.timeout),
    "with its function that collates": lambda it: DataLoader(it.dataset, collate_fn=it.collate_fn),
    "a loader with a state": lambda it: StatefulDataLoader(it.dataset, batch_sampler=it.batch_sampler),
    "what accelerate goes on with": lambda it: skip_first_batches(it, 1),
    "what accelerate goes on with, prepared": lambda it: skip_first_batches(Accelerator(cpu=True).prepare(it), 1),
    "a part": lambda it: DataLoader(Subset(it.dataset, [0, 1])),
    "the dataset inside a part": lambda it: DataLoader(it.dataset.dataset),
    "split": lambda it: DataLoader(random_split(it.dataset, [4, len(it.dataset) - 4])[0]),
    "joined": lambda it: DataLoader(ConcatDataset([it.dataset, it.dataset])),
    "its tensors": lambda it: DataLoader(TensorDataset(*it.dataset.tensors)),
    "what the sampler was made of": lambda it: DataLoader(it.sampler.data_source),
    "what the sampler of batches was made of": lambda it: DataLoader(it.batch_sampler.sampler.data_source),
    "an iterator of the loader inside": lambda it: it._get_iterator(),
    "by torch's own way": lambda it: type(it.loader)(
        **{n: getattr(it, n) for n in ("dataset", "sampler", "collate_fn")}
    ),
}


@pytest.mark.parametrize(
    "inner", [loader_of(numbered(9), 3), DataLoader(Subset(Numbered(9), range(9)), 3)], ids=["", "part"]
)
@pytest.mark.filterwarnings("ignore:'set_vital'")  # torchdata's
@pytest.mark.parametrize("rebuilt", REBUILT.values(), ids=REBUILT)
def test_what_is_rebuilt_from_it_gives_no_image_that_is_not_purified(rebuilt, inner) -> None:
    loader = PurifiedLoader(inner, Counting())
    assert (len(loader.dataset), loader.batch_size) == (9, 3)
    with pytest.raises((InputError, AttributeError), match=r"PurifiedLoader|has no attribute"):
        list(rebuilt(loader))


def test_a_stream_that_is_rebuilt_gives_none_either(tmp_path) -> None:
    loader = PurifiedLoader(DataLoader(Stream(), 3), Counting())
    with pytest.raises(InputError, match="inside a PurifiedLoader gives no samples"):
        list(DataLoader(loader.dataset, loader.batch_size, sampler=range(3)))
    with pytest.raises(InputError, match="inside a PurifiedLoader gives no samples"):
        list(loader.dataset)
    web = PurifiedLoader(wds.WebLoader(Stream(), batch_size=3), Counting())
    with pytest.raises(AttributeError, match="does not show its 'pipeline'"):
        _ = web.pipeline
    for name, words in {"with_epoch": (3,), "shuffle": (9,), "unbatched": (), "iterator": ()}.items():
        with pytest.raises(InputError, match=rf"{name}\(\) of the PurifiedLoader returns"):
            getattr(web, name)(*words)


class Named(Numbered):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    classes, class_to_idx, targets, split = ("a", "b"), {"a": 0}, torch.arange(9), "train"
    samples = tuple((f"{i}.png", i) for i in range(9))
    arrays = (np.zeros((9, 8, 8, 3)),)
    mixed = ["a", 1, None, 2.0, numbered(2)]
    objects = np.array([numbered(2), None], object)
    encoded = (b"\x89PNG",)


def test_numbers_names_and_labels_of_the_dataset_show() -> None:
    seen = PurifiedLoader(DataLoader(Named(9), 3, sampler=DistributedSampler(Named(9), 3, 0)), Counting())
    assert (seen.dataset.classes, seen.dataset.class_to_idx, seen.dataset.split) == (("a", "b"), {"a": 0}, "train")
    assert seen.dataset.samples == Named.samples
    assert torch.equal(seen.dataset.targets, Named.targets)
    for name in ("arrays", "mixed", "objects", "encoded"):
        assert not hasattr(seen.dataset, name), name
    assert (len(seen.sampler), list(seen.sampler), seen.sampler.num_replicas) == (3, list(seen.loader.sampler), 3)
    assert len(seen.batch_sampler.sampler) == 3
    seen.sampler.set_epoch(3)
    seen.dataset.set_epoch(2)
    assert seen.loader.dataset.epoch == 2
    assert pickle.loads(pickle.dumps(seen)).sampler.epoch == 3


class Prefetching:
    """As timm's: another object around the loader."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


class EachRank(Sampler[int]):
    """Another library's sampler that shares out, of no class of torch's."""

    num_replicas, rank = 2, 0

    def __iter__(self):
        return iter(range(self.rank, 8, self.num_replicas))


@pytest.mark.filterwarnings("ignore:'set_vital'")  # torchdata's
def test_every_process_of_a_job_gets_its_share_or_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Numbered(8, TO_TENSOR)
    alone = PurifiedLoader(DataLoader(data, 4), Counting())
    assert len(collected(alone)) == 8
    monkeypatch.setenv("WORLD_SIZE", "2")
    for plain in (
        DataLoader(data, 4),
        DataLoader(data, 4, shuffle=True, num_workers=1),
        DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, True)),
        StatefulDataLoader(data, 4),
        Prefetching(DataLoader(data, 4)),
        DataLoader(Subset(data, range(0, 8, 2)), 2),
        DataLoader(data, 4, sampler=range(0, 8, 2)),
    ):
        with pytest.raises(
            InputError, match=r"cannot be seen.*shares them out among 2.*accelerator\.prepare\(loader\).*num_replicas"
        ):
            iter(PurifiedLoader(plain, Counting()))
    for shared in (
        DataLoader(data, 4, sampler=DistributedSampler(data, 2, 0)),
        DataLoader(data, batch_sampler=BatchSampler(DistributedSampler(data, 2, 1), 4, False)),
        DataLoader(data, 4, sampler=EachRank()),
    ):
        assert len(collected(PurifiedLoader(shared, Counting()))) == 4
    assert len(collected(PurifiedLoader(DataLoader(data, 4, sampler=DistributedSampler(data, 1, 0)), Counting()))) == 8
    assert len(collected(PurifiedLoader(DataLoader(Stream(), 3), Counting()))) == 9


@pytest.mark.parametrize(
    ("name", "text"), [("WORLD_SIZE", ""), ("WORLD_SIZE", "abc"), ("WORLD_SIZE", "0"), ("RANK", "")]
)
def test_a_size_of_the_job_that_is_no_number(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(InputError, match=f"variable {name} is a whole number, at least [01]. Got '{text}'"):
        next(iter(PurifiedLoader([(numbered(4), 0)], Counting())))


def test_two_processes_of_accelerate_share_the_images_out() -> None:
    joined = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = [
        processes.start(ranks.of_a_rank, env={**joined, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
    ]
    (first, refused), (second, _) = [child.wait().value for child in children]
    assert sorted([*first, *second]) == list(range(12))
    assert "wrap what accelerator.prepare(loader) gives" in refused


# -- what it refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(2, 3, 8, 8) - 0.1, 0), r"Batch 0 of the loader: Images in floating point lie in \[0, 1\]"),
        ((torch.zeros(2, 3, 8, 8) + torch.nan, 0), "or NaN"),
        ((torch.zeros(2, 3, 8, 8, dtype=torch.int64), 0), "torch.int64"),
        ((torch.zeros(2, 4, 8, 8), 0), "takes images of 3 channels"),
        ((torch.zeros(2, 3, 0, 8), 0), "at least one pixel"),
        ((torch.zeros(3, 8, 8), 0), r"are torch.float32 \(3, 8, 8\).*tensor \(B, C, H, W\)"),
        (([torch.zeros(2, 3, 8, 8)], 0), r"list of images holds tensors \(C, H, W\)"),
        ((["a.png", "b.png"], 0), "are list"),
        ({"pixel_values": torch.zeros(2, 3, 8, 8)}, "image_key="),
    ],
)
def test_bad_batches(batch: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(PurifiedLoader([batch], recipes.denoise_once(tiny_denoiser(), sigma=0.1)))


def test_a_batch_of_two_images_a_sample_is_refused(caplog) -> None:
    left, right = numbered(4), numbered(4)
    for batch in ((left, right, 0), {"image": left, "other": right.float() / 255}, [left, [right, 1]]):
        with pytest.raises(InputError, match="Batch 0 of the loader: A sample holds one image"):
            next(iter(PurifiedLoader([batch], Counting())))
    first, second, _ = next(iter(PurifiedLoader([(left, right, 0)], Counting(), image_key=0)))
    assert (read(first)[1], read(second)[1]) == ([1] * 4, [0] * 4)
    assert "The images in 1 of each sample are not purified" in caplog.text
    for beside in (torch.zeros(4, 8, 8), tv_tensors.Mask(left[:, :1]), torch.rand(4, 5), torch.zeros(4, 8, 8, 8)):
        next(iter(PurifiedLoader([(left, beside)], Counting())))


def test_every_batch_is_looked_at_for_a_second_image() -> None:
    left, right = numbered(4), numbered(4) + 1
    for other in (right, torch.stack([left, right], 1), torch.cat([left, right], 1)):
        batches = iter(PurifiedLoader([(left, 0), (left, other)], Counting()))
        next(batches)
        with pytest.raises(InputError, match="Batch 1 of the loader: A sample holds one image"):
            next(batches)
    with pytest.raises(InputError, match="Batch 0 of the loader: A sample holds one image"):
        next(iter(PurifiedLoader([(list(left), list(right))], Counting())))


def test_the_bad_batch_is_named_and_those_before_it_come() -> None:
    good, bad = random_images(2, 8).float() / 255, torch.full((2, 3, 8, 8), 7.0)
    for ahead in (0, 1):
        batches = iter(PurifiedLoader([good, good, bad, good], Counting(), ahead=ahead))
        for _ in range(2 - ahead):  # what is in work ahead of the bad one is lost with it
            assert next(batches).shape == good.shape
        with pytest.raises(InputError, match="Batch 2 of the loader"):
            next(batches)


class Nan(purifiers.Purifier):
    kind = "test-nan"

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return x_BCHW * torch.nan


def test_a_purifier_that_gives_nan() -> None:
    with pytest.raises(PurifyError, match="Batch 0 of the loader: The purifier must give finite images"):
        list(PurifiedLoader([random_images(2, 8)], Nan()))


def test_a_purifier_of_many_calls_is_warned_of(caplog) -> None:
    PurifiedLoader([], recipes.eclipse(tiny_denoiser(), sigma=0.1))
    assert not caplog.text
    PurifiedLoader([], recipes.eclipse(tiny_denoiser(), sigma=0.1, steps=50))
    assert "takes 50 network calls an image: precompute a cache" in caplog.text


def test_bad_arguments() -> None:
    loader = loader_of(random_images(4, 8))
    for make, message in {
        lambda: PurifiedLoader(loader, "eclipse"): "A str is no purifier",
        lambda: PurifiedLoader(loader, None): "without either",
        lambda: PurifiedLoader(7, Counting()): "of type int",
        lambda: PurifiedLoader(iter(loader), Counting()): "used up after one",
        lambda: PurifiedLoader(loader, Counting(), "tpu9"): "device of this machine",
        lambda: PurifiedLoader(loader, Counting(), compensate=0.4): "Compensate",
        lambda: PurifiedLoader(loader, Counting(), normalize=0.5): "normalize must be",
        lambda: PurifiedLoader(loader, Counting(), normalize=(MEAN, (0, 1, 1))): "normalize must be",
        lambda: PurifiedLoader(loader, Counting(), seed=0.5): "seed",
        lambda: PurifiedLoader(loader, Counting(), ahead=-1): "ahead",
    }.items():
        with pytest.raises(InputError, match=message):
            make()
    open_plan = recipes.puregen_filt(0.5, energy=tiny_energy(), model=tiny_denoiser(), ebm_steps=1, ddpm_steps=0)
    with pytest.raises(InputError, match="needs a plan"):
        PurifiedLoader(loader, open_plan)
    with pytest.raises(InputError, match="index_key"):
        list(PurifiedLoader([(random_images(2, 8), torch.rand(2))], Counting(), index_key=1))
