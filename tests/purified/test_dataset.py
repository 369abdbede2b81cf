"""PurifiedDataset: what comes out, from any dataset people have, in any loader they use."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import pickle
from collections import namedtuple
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, default_collate, random_split
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from purifyloader import PurifiedDataset, PurifyError, recipes
from purifyloader.cache import CacheReader, CacheWriter, Layout
from purifyloader.core import noise
from purifyloader.core.images import quantize
from purifyloader.datasets.sources import take_over
from purifyloader.errors import CacheError, InputError
from purifyloader.purified.filling import precompute
from purifyloader.purified.job import Job
from purifyloader.purified.ondemand import Filling
from purifyloader.purifiers import Chain, Compensation, DenoiseOnce, Jpeg, Purifier
from purifyloader.transforms import Compensate, Purify
from tests.conftest import PictureDataset, random_images, slim_denoiser, tiny_denoiser, tiny_energy

COUNT = 20


@pytest.fixture(scope="module")
def purifier() -> Purifier:
    return DenoiseOnce(slim_denoiser(), 0.1, compute_batch=8)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return random_images(COUNT)


@pytest.fixture(scope="module")
def finished(images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the images and `Jpeg(30)`, seed 0, that nobody changes."""
    folder = tmp_path_factory.mktemp("finished") / "cache"
    precompute(PictureDataset(images), Jpeg(30), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def expected(purifier: Purifier, images: Tensor) -> Tensor:
    """The purified images, by the algebra alone: uint8 (N, C, H, W), seed 0."""
    keys = noise.fold_in(noise.image_keys(0, 0, range(COUNT)), 0)
    return quantize(purifier(images.float() / 255, keys))


class Tensors(Dataset):
    """A dataset of plain samples, built by `make` from the index."""

    def __init__(self, make, length: int = COUNT) -> None:
        self.make, self.length = make, length

    def __getitem__(self, index: int):
        return self.make(index)

    def __len__(self) -> int:
        return self.length


def as_tensor(image) -> Tensor:
    return v1.functional.pil_to_tensor(image)


# -- pixels ------------------------------------------------------------------------------------------


def test_images_are_purified_and_come_back_as_pil(purifier, images, expected):
    dataset = PurifiedDataset(PictureDataset(images), purifier)
    assert len(dataset) == COUNT
    for i in range(COUNT):
        image, target = dataset[i]
        assert isinstance(image, Image.Image)
        assert image.mode == "RGB"
        assert torch.equal(as_tensor(image), expected[i])
        assert target == i % 2


def test_the_wrapped_dataset_is_not_changed(purifier, images):
    transform = v1.ToTensor()
    dataset = PictureDataset(images, transform=transform)
    PurifiedDataset(dataset, purifier)
    assert dataset.transform is transform
    assert torch.equal(dataset[3][0], images[3].float() / 255)


def test_any_batch_and_order_gives_the_same_pixels(purifier, images, expected):
    dataset = PurifiedDataset(PictureDataset(images), purifier)
    for indices in ([3], [19, 0, 7], list(range(COUNT)), list(reversed(range(COUNT))), [5, 5, 5]):
        got = dataset.__getitems__(indices)
        for index, (image, _) in zip(indices, got, strict=True):
            assert torch.equal(as_tensor(image), expected[index])


def test_the_seed_decides_the_noise(purifier, images):
    a, b = (PurifiedDataset(PictureDataset(images), purifier, seed=s)[0][0] for s in (0, 1))
    assert not torch.equal(as_tensor(a), as_tensor(b))


def test_negative_and_numpy_indices(purifier, images):
    dataset = PurifiedDataset(PictureDataset(images), purifier)
    assert as_tensor(dataset[-1][0]).equal(as_tensor(dataset[np.int64(COUNT - 1)][0]))
    with pytest.raises(IndexError, match=r"Got 20"):
        dataset[COUNT]


def test_images_of_different_sizes(purifier):
    sizes = [16, 12, 17, 16]
    data = [Image.fromarray(random_images(1, s, seed=s)[0].permute(1, 2, 0).numpy()) for s in sizes]
    dataset = PurifiedDataset(Tensors(lambda i: (data[i], i), 4), purifier)
    together = dataset.__getitems__([0, 1, 2, 3])
    for i, size in enumerate(sizes):
        assert together[i][0].size == (size, size)
        assert as_tensor(together[i][0]).equal(as_tensor(dataset[i][0]))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_pil_modes_come_back(purifier, mode):
    data = [Image.fromarray(i.permute(1, 2, 0).numpy()).convert(mode) for i in random_images(4)]
    if mode in ("LA", "RGBA"):
        for image in data:
            image.putalpha(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)))
    image, _ = PurifiedDataset(Tensors(lambda i: (data[i], 0), 4), purifier)[2]
    assert image.mode == mode
    assert image.convert("RGB") != data[2].convert("RGB")
    if "A" in mode:
        assert np.array_equal(np.asarray(image)[..., -1], np.asarray(data[2])[..., -1])


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x,
        lambda x: x.float() / 255,
        lambda x: x.double() / 255,
        lambda x: tv_tensors.Image(x),
        lambda x: x.permute(1, 2, 0).numpy(),
    ],
    ids=["uint8", "float32", "float64", "tv_tensor", "numpy"],
)
def test_containers_come_back(purifier, images, expected, convert):
    image, _ = PurifiedDataset(Tensors(lambda i: (convert(images[i]), i)), purifier)[4]
    want = convert(expected[4])
    assert type(image) is type(want)
    assert image.dtype == want.dtype
    if isinstance(image, np.ndarray):
        assert np.array_equal(image, want)
    elif image.is_floating_point():
        assert torch.allclose(image, want, atol=0.5 / 255 + 1e-6)
    else:
        assert torch.equal(image, want)


# -- samples -----------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["image", "label", "meta"])


@pytest.mark.parametrize(
    ("make", "key", "read"),
    [
        (lambda x, i: (x, i, "more"), None, lambda s: s[0]),
        (lambda x, i: [x, i], None, lambda s: s[0]),
        (lambda x, i: Pair(x, i, {"id": i}), None, lambda s: s.image),
        (lambda x, i: (i, x), 1, lambda s: s[1]),
        (lambda x, i: {"image": x, "label": i}, None, lambda s: s["image"]),
        (lambda x, i: {"jpg": x, "cls": i}, "jpg", lambda s: s["jpg"]),
        (lambda x, i: x, None, lambda s: s),
    ],
    ids=["tuple", "list", "namedtuple", "second", "dict", "dict-key", "bare"],
)
@pytest.mark.parametrize("cached", [False, True])
def test_sample_kinds(purifier, images, expected, tmp_path, make, key, read, cached):
    raw = Tensors(lambda i: make(images[i], i))
    dataset = PurifiedDataset(
        raw, purifier, image_key=key, cache=tmp_path / "cache" if cached else None, progress=False
    )
    for i in (0, 7):
        sample, before = dataset[i], raw[i]
        assert type(sample) is type(before)
        assert torch.equal(read(sample), expected[i])
        assert torch.equal(read(before), images[i]), "the source's own sample was written to"
        if isinstance(sample, dict):
            assert {k: v for k, v in sample.items() if v is not read(sample)} == {
                k: v for k, v in before.items() if v is not read(before)
            }


def test_targets_pass_untouched(purifier, images):
    marker = object()
    dataset = PurifiedDataset(Tensors(lambda i: (images[i], marker, {"boxes": [i]})), purifier)
    assert dataset[3][1] is marker
    assert dataset[3][2] == {"boxes": [3]}


class Labelled(PictureDataset):
    """With labels that may be changed, as torchvision's have them."""

    def __init__(self, images, transforms=None) -> None:
        super().__init__(images, transforms=transforms)
        self.targets = list(range(len(images)))

    def __getitem__(self, index: int) -> tuple:
        image, _ = super().__getitem__(index)
        return image, self.targets[index]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(10))], ids=["", "part"])
def test_labels_that_change_after_wrapping_change_everywhere_or_nowhere(images, tmp_path, wrap, cached):
    inner = Labelled(images)
    dataset = PurifiedDataset(wrap(inner), Jpeg(30), cache=tmp_path / "c" if cached else None, progress=False)
    inner.targets = [9 - target for target in inner.targets]
    items = [target for _, target in dataset]
    assert not hasattr(dataset, "targets") or list(dataset.targets) == items
    with pytest.raises(CacheError, match="differs") if cached else contextlib.nullcontext():
        again = PurifiedDataset(wrap(inner), Jpeg(30), cache=tmp_path / "c" if cached else None, progress=False)
        assert [target for _, target in again] == inner.targets[: len(again)]


def test_a_transform_of_targets_is_set_before_wrapping(finished):
    with pytest.raises(InputError, match="target_transform of a PurifiedDataset is set before wrapping"):
        PurifiedDataset.from_cache(finished).target_transform = str


CHANGES: dict[str, Callable[[list[Any]], object]] = {
    "item": lambda targets: targets.__setitem__(1, 9),
    "slice": lambda targets: targets.__setitem__(slice(None), [5] * len(targets)),
    "append": lambda targets: targets.append(1),
    "sort": lambda targets: targets.sort(),
    "clear": lambda targets: targets.clear(),
    "in place": lambda targets: targets.__iadd__([1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_targets_out_of_a_cache_cannot_be_changed(finished, change):
    dataset = PurifiedDataset.from_cache(finished)
    with pytest.raises(InputError, match="read only"):
        CHANGES[change](dataset.targets)
    assert dataset.targets == [target for _, target in dataset]
    assert pickle.loads(pickle.dumps(dataset.targets)) == list(dataset.targets)


@pytest.mark.parametrize("name", ["targets", "data", "classes", "class_to_idx", "labels", "samples", "imgs"])
def test_what_samples_are_made_of_is_not_set_on_the_wrapper(images, finished, name):
    for dataset in (PurifiedDataset(Labelled(images), Jpeg(30)), PurifiedDataset.from_cache(finished)):
        with pytest.raises(InputError, match=f"{name} of a PurifiedDataset are those of its samples"):
            setattr(dataset, name, [0] * COUNT)


class Batched(PictureDataset):
    def __getitems__(self, indices: list[int]) -> list[tuple]:
        return [self[index] for index in indices]


class ReadThrough:
    """A wrapper that changes labels, and reads every other attribute through to what is inside."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def __getitem__(self, index: int) -> tuple:
        image, target = self.inner[index]
        return image, target + 100

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str):
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class Relabelled(Batched):
    def __getitem__(self, index: int) -> tuple:
        image, target = super().__getitem__(index)
        return image, target + 100

    def __getitems__(self, indices: list[int]) -> list[tuple]:
        return [PictureDataset.__getitem__(self, index) for index in indices]


class Indexed(Relabelled):
    def __getitem__(self, index: int) -> tuple:
        return *super().__getitem__(index), index


@pytest.mark.parametrize(
    "source",
    [
        lambda images: ReadThrough(Batched(images)),
        lambda images: Subset(ReadThrough(Batched(images)), [3, 1, 2]),
        lambda images: ConcatDataset([ReadThrough(Batched(images)), ReadThrough(Batched(images))]),
        lambda images: ReadThrough(ReadThrough(Subset(Batched(images), [1, 2]))),
        Indexed,
    ],
)
def test_a_wrapper_is_read_by_its_own_items(images, tmp_path, source):
    raw = source(images)
    for dataset in (
        PurifiedDataset(raw, Jpeg(30)),
        PurifiedDataset(raw, Jpeg(30), cache=tmp_path / "c", progress=False),
        PurifiedDataset.from_cache(tmp_path / "c"),
    ):
        assert [dataset[i][1:] for i in range(2)] == [raw[i][1:] for i in range(2)]
        assert dataset[0][1] >= 100


@pytest.mark.parametrize("key", [None, 0])
def test_joint_transforms_keep_the_other_fields(images, tmp_path, key):
    class Numbered(PictureDataset):
        def __getitem__(self, index: int) -> tuple:
            return *super().__getitem__(index), index, "more"

    joint = Numbered(images, transforms=lambda image, target: (as_tensor(image), target + 100))
    for folder in (None, tmp_path / "c"):
        image, *others = PurifiedDataset(joint, Jpeg(30), image_key=key, cache=folder, progress=False)[5]
        assert torch.equal(image, as_tensor(PurifiedDataset(PictureDataset(images), Jpeg(30))[5][0]))
        assert others == [101, 5, "more"]
    alone = type("Alone", (Numbered,), {"__getitem__": lambda self, index: super(Numbered, self).__getitem__(index)[0]})
    with pytest.raises(InputError, match=r"transforms of both, are \(image, target, \.\.\.\)\. Got a Image"):
        PurifiedDataset(alone(images, transforms=lambda image, target: (image, target)), Jpeg(30))[0]


# -- transforms --------------------------------------------------------------------------------------


def test_transform_is_applied_after_purification(purifier, images, expected):
    normalize = v1.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    source = PictureDataset(images, v1.Compose([v1.ToTensor(), normalize]), target_transform=lambda t: t + 10)
    image, target = PurifiedDataset(source, purifier)[5]
    assert torch.equal(image, normalize(expected[5].float() / 255))
    assert target == 11


def test_joint_transforms_are_taken_over(purifier, images, expected):
    def both(image, target):
        return v1.functional.pil_to_tensor(image), target + 100

    image, target = PurifiedDataset(PictureDataset(images, transforms=both), purifier)[5]
    assert torch.equal(image, expected[5])
    assert target == 101


def test_transform_argument_for_a_dataset_without_one(purifier, images, expected):
    dataset = PurifiedDataset(PictureDataset(images), purifier, transform=v1.PILToTensor())
    assert torch.equal(dataset[2][0], expected[2])


def test_two_transforms_are_refused(purifier, images):
    with pytest.raises(InputError, match="has a transform of its own"):
        PurifiedDataset(PictureDataset(images, v1.ToTensor()), purifier, transform=v1.ToTensor())


def test_through_subset_split_and_concat(purifier, images):
    whole = PictureDataset(images, v1.PILToTensor())
    other = PictureDataset(255 - images, v1.Compose([v1.PILToTensor(), v1.ConvertImageDtype(torch.float32)]))
    first, second = random_split(whole, [12, 8], torch.Generator().manual_seed(0))
    nested = ConcatDataset([Subset(first, [3, 1, 2]), other, second])
    dataset = PurifiedDataset(nested, purifier)
    assert len(dataset) == 3 + COUNT + 8
    keys = noise.fold_in(noise.image_keys(0, 0, range(len(dataset))), 0)
    for i in (0, 2, 3, 10, 3 + COUNT - 1, 3 + COUNT, len(dataset) - 1):
        raw = nested[i][0]
        x = raw.float() / 255 if raw.dtype == torch.uint8 else raw
        want = quantize(purifier(x[None], keys[i : i + 1]))[0]
        got = dataset[i][0]
        assert got.dtype == raw.dtype
        assert torch.equal(got if got.dtype == torch.uint8 else quantize(got), want)


def test_a_real_torchvision_class(purifier, images, expected):
    source = CIFAR10.__new__(CIFAR10)
    source.data, source.targets, source.train = images.permute(0, 2, 3, 1).numpy(), list(range(COUNT)), True
    source.root, source.classes = "memory", ["a"]
    source.transform, source.target_transform, source.transforms = v1.PILToTensor(), None, None
    dataset = PurifiedDataset(source, purifier)
    assert torch.equal(dataset[9][0], expected[9])
    assert dataset.classes == ["a"]
    assert dataset.targets[9] == 9


# -- compensation ------------------------------------------------------------------------------------


def compensated(image: Tensor, index: int, epoch: int, compensate: Compensate) -> Tensor:
    keys = noise.fold_in(noise.image_keys(0, epoch, index), 1)
    return compensate.apply(image, keys)


def test_compensation_comes_before_normalisation(purifier, images, expected):
    normalize = v1.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    compensate = Compensate(p=0.5, sigma=0.1)
    steps = [v1.CenterCrop(8), v1.ToTensor(), normalize, v1.RandomErasing(p=0)]
    for compose in (v1.Compose(steps), v2.Compose(steps)):
        dataset = PurifiedDataset(PictureDataset(images, compose), purifier, compensate)
        for i in range(6):
            cropped = expected[i][:, 4:12, 4:12].float() / 255
            assert torch.equal(dataset[i][0], normalize(compensated(cropped, i, 0, compensate)))


def test_compensation_comes_first_where_the_transform_cannot_be_opened(purifier, images, expected):
    compensate = Compensate()

    def transform(image):
        return v1.functional.pil_to_tensor(image)

    dataset = PurifiedDataset(PictureDataset(images, transform), purifier, compensate)
    assert torch.equal(dataset[3][0], compensated(expected[3], 3, 0, compensate))


def test_compensation_of_what_is_no_image_any_more_is_refused(purifier, images):
    for last, got in ((lambda x: 2 * x - 1, "values from -"), (torch.flatten, r"\(768,\)")):
        compose = v1.Compose([v1.ToTensor(), v1.Lambda(last)])
        with pytest.raises(InputError, match=rf"Got {got}[\s\S]*put Compensate\(\) into your transform"):
            PurifiedDataset(PictureDataset(images, compose), purifier, Compensate())


def test_compensation_is_fresh_in_each_epoch_and_purification_is_not(purifier, images, expected):
    compensate = Compensate(p=0, sigma=0.05)
    dataset = PurifiedDataset(PictureDataset(images, v1.PILToTensor()), purifier, compensate)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append(dataset[0][0])
        assert torch.equal(epochs[-1], compensated(expected[0], 0, epoch, compensate))
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


def test_forgetting_set_epoch_is_said_once(purifier, images, caplog):
    dataset = PurifiedDataset(PictureDataset(images), purifier, Compensate())
    with caplog.at_level(logging.WARNING, "purifyloader"):
        for _ in range(2):
            dataset.__getitems__(range(COUNT))
        assert not caplog.records
        for _ in range(3):
            dataset.__getitems__(range(COUNT))
    assert len(caplog.records) == 1
    assert "set_epoch" in caplog.records[0].getMessage()


def test_a_compose_inside_a_compose_is_opened_and_a_subclass_is_not(purifier, images, expected):
    compensate = Compensate(p=0, sigma=0.05)
    normalize = v1.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    nested = v1.Compose([v1.Compose([v1.ToTensor()]), v1.Compose([normalize])])
    got = PurifiedDataset(PictureDataset(images, nested), purifier, compensate)[3][0]
    assert torch.equal(got, normalize(compensated(expected[3].float() / 255, 3, 0, compensate)))

    class Marked(v1.Compose):
        def __call__(self, image):
            return super().__call__(image), "marked"

    assert PurifiedDataset(PictureDataset(images, Marked([v1.ToTensor()])), purifier)[3][0][1] == "marked"


def test_a_subset_with_negative_indices_finds_its_part(purifier, images):
    parts = [PictureDataset(images, lambda image, name=name: name) for name in "AB"]
    dataset = PurifiedDataset(Subset(ConcatDataset(parts), [-1, 0]), purifier)
    assert (dataset[0][0], dataset[1][0]) == ("B", "A")


def test_a_dataset_that_never_asks_whether_it_has_a_transform(purifier, images, expected):
    class Careless(PictureDataset):
        def __getitem__(self, index):
            return self.transform(Image.fromarray(self.data[index])), index

    class CarelessPair(PictureDataset):
        def __getitem__(self, index):
            return self.transforms(Image.fromarray(self.data[index]), index)

    for dataset in (
        Careless(images, v1.PILToTensor()),
        CarelessPair(images, v1.PILToTensor()),
        CarelessPair(images, transforms=lambda image, target: (as_tensor(image), target)),
    ):
        assert torch.equal(PurifiedDataset(dataset, purifier)[4][0], expected[4])


@pytest.mark.parametrize(
    ("wrapped", "cached", "compensate"),
    [(False, False, None), (False, True, Compensate()), (True, False, Compensate()), (True, True, None)],
)
def test_a_transform_set_later_comes_behind_purification(purifier, images, tmp_path, wrapped, cached, compensate):
    """As timm's `create_loader` does it; the same pixels as with that transform from the start."""
    normalize = v1.Compose([v1.ToTensor(), v1.Normalize(0.5, 0.5)])
    cache = tmp_path / "cache" if cached else None

    def purified(transform: Any) -> PurifiedDataset:
        data = PictureDataset(images, transform)
        if wrapped:
            data = Subset(ConcatDataset([data, PictureDataset(images, transform)]), range(len(images)))
        return PurifiedDataset(data, purifier, compensate, cache, progress=False)

    expected = purified(normalize)
    later = purified(v1.Compose([v1.ToTensor()]))
    assert later.transform is not normalize
    later.transform = normalize
    assert later.transform is normalize
    got = DataLoader(later, 5), DataLoader(expected, 5)
    for (x, _), (y, _) in zip(*got, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(later[3][0], expected[3][0])
    later.transform = None
    assert isinstance(later[3][0], Image.Image)


def test_a_transform_set_later_that_does_not_fit_changes_nothing(purifier, images):
    dataset = PurifiedDataset(PictureDataset(images, as_tensor), purifier, Compensate())
    with pytest.raises(InputError, match=r"purified once.*Leave one out"):
        dataset.transform = Purify(purifier)
    with pytest.raises(InputError, match="Compensation comes before"):
        dataset.transform = v1.Compose([lambda image: "no image"])
    with pytest.raises(InputError, match="before wrapping"):
        dataset.transforms = lambda image, target: (image, target)
    assert dataset.transform is as_tensor
    joint = PictureDataset(images, transforms=lambda image, target: (as_tensor(image), target))
    with pytest.raises(InputError, match="take the target too"):
        PurifiedDataset(joint, purifier).transform = as_tensor
    assert not hasattr(PurifiedDataset(joint, purifier), "transform")
    parts = ConcatDataset([PictureDataset(images, as_tensor), PictureDataset(images)])
    assert not hasattr(PurifiedDataset(parts, purifier), "transform")


def test_compensation_inside_a_purified_dataset_is_refused(purifier, images):
    inner = PurifiedDataset(PictureDataset(images), purifier, Compensate())
    with pytest.raises(InputError, match="after all purification"):
        PurifiedDataset(inner, purifier)


class Slots:
    """A wrapper whose inside is in no dictionary."""

    __slots__ = ("hidden",)

    def __init__(self, inner) -> None:
        self.hidden = inner

    def __getitem__(self, index: int):
        return self.hidden[index]

    def __len__(self) -> int:
        return len(self.hidden)


WRAPPERS = {
    "itself": lambda d: d,
    "a part": lambda d: Subset(d, range(8)),
    "joined": lambda d: ConcatDataset([d, d]),
    "a part of joined": lambda d: Subset(ConcatDataset([d, Subset(d, [1, 2])]), range(21)),
    "a wrapper that hides it": Slots,
    "a function": lambda d: Tensors(lambda i: d[i], len(d)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_nothing_is_purified_twice_nor_compensation_frozen(images, finished, tmp_path, wrap):
    inner = PictureDataset(images)
    for purified in (
        PurifiedDataset(inner, Jpeg(30)),
        PurifiedDataset(inner, Jpeg(30), cache=finished, progress=False),
        PurifiedDataset.from_cache(finished),
        CacheReader(finished, in_memory=True),
    ):
        with pytest.raises(InputError, match="purified already, when it is read"):
            PurifiedDataset(wrap(purified), Jpeg(30))
        with pytest.raises(InputError, match="purified already, when it is read"):
            precompute(wrap(purified), Jpeg(30), tmp_path / "c", progress=False)
    compensated = PurifiedDataset(inner, Jpeg(30), Compensate())
    with pytest.raises(InputError, match="compensates already"):
        PurifiedDataset(wrap(compensated), Jpeg(30), cache=tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


TRANSFORMS = {
    "a lambda": lambda purify: lambda image: purify(image),
    "a part of a function": lambda purify: functools.partial(lambda step, image: step(image), purify),
    "torchvision's lambda": lambda purify: v2.Compose([v2.Lambda(lambda image: purify(image)), v2.ToImage()]),
    "a purifier by hand": lambda purify: (
        lambda image: purify.purifier(as_tensor(image)[None] / 255, torch.tensor([1]))[0]
    ),
}


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_that_purifies_is_seen_whatever_is_around_it(images, finished, make):
    transform = make(Purify(Jpeg(30)))
    for wrong in (
        lambda: PurifiedDataset(PictureDataset(images, transform), Jpeg(30)),
        lambda: PurifiedDataset(Subset(PictureDataset(images, transform), [1, 2]), Jpeg(30)),
        lambda: PurifiedDataset(PictureDataset(images), Jpeg(30), transform=transform),
        lambda: setattr(PurifiedDataset(PictureDataset(images), Jpeg(30)), "transform", transform),
    ):
        with pytest.raises(InputError, match=r"purified already|purified once, and this transform purifies too"):
            wrong()


# -- loaders -----------------------------------------------------------------------------------------


def collect(loader) -> Tensor:
    return torch.cat([x for x, _ in loader])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow), "forkserver"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_give_the_same_pixels_and_see_the_epoch(context, cached, purifier, images, expected, tmp_path):
    compensate = Compensate(p=0, sigma=0.05)
    dataset = PurifiedDataset(
        PictureDataset(images, v1.PILToTensor()),
        purifier,
        compensate,
        cache=tmp_path if cached else None,
        progress=False,
    )
    loader = DataLoader(dataset, batch_size=6, num_workers=2, multiprocessing_context=context, persistent_workers=True)
    for epoch in (0, 3):
        dataset.set_epoch(epoch)
        got = collect(loader)
        want = [compensated(expected[i], i, epoch, compensate) for i in range(COUNT)]
        assert torch.equal(got, torch.stack(want))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_copy_has_an_epoch_of_its_own_that_its_workers_see(images):
    original = PurifiedDataset(PictureDataset(images, v1.PILToTensor()), Jpeg(50), Compensate(p=0, sigma=0.05))
    for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        loader = DataLoader(twin, batch_size=10, num_workers=1, multiprocessing_context="fork", persistent_workers=True)
        first = collect(loader)
        twin.set_epoch(1)
        assert not torch.equal(collect(loader), first)
        assert original.epoch == 0


def test_loader_uses_our_batched_getitems(images, purifier, expected):
    class Batched(Tensors):
        def __getitems__(self, indices):
            return [(images[i], i) for i in indices]

    dataset = PurifiedDataset(Batched(lambda i: (images[i], i)), purifier)
    assert torch.equal(collect(DataLoader(dataset, batch_size=8)), expected)


def test_cuda_in_a_forked_worker_names_both_ways_out(monkeypatch, images, purifier):
    from purifyloader.core import devices as module

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(module, "get_worker_info", lambda: object())
    with pytest.raises(PurifyError, match=r"cache=[\s\S]*spawn"):
        module.check_worker(torch.device("cuda:0"))
    module.check_worker(torch.device("cpu"))


# -- cache -------------------------------------------------------------------------------------------


def test_cached_pixels_equal_uncached_ones(purifier, images, expected, tmp_path):
    for _ in range(2):  # made, then read
        dataset = PurifiedDataset(PictureDataset(images), purifier, cache=tmp_path, progress=False, batch_size=7)
        got = dataset.__getitems__(range(COUNT))
        assert all(torch.equal(as_tensor(image), expected[i]) for i, (image, _) in enumerate(got))


def test_a_recipe_that_looks_at_all_images_first(images, tmp_path):
    """The same images are purified with a cache and without, in workers and here."""
    recipe = recipes.puregen_filt(0.3, ebm_steps=2, ddpm_steps=0, energy=tiny_energy(), compute_batch=16)
    source = PictureDataset(images)
    plain = PurifiedDataset(source, recipe, progress=False)
    want = [image.tobytes() for image, _ in plain.__getitems__(range(len(plain)))]
    assert plain[7][0].tobytes() == want[7]
    raw = [image.tobytes() for image, _ in source]
    assert sum(a != b for a, b in zip(want, raw, strict=True)) == round(0.3 * len(images))
    made, on_demand = (
        PurifiedDataset(source, recipe, cache=tmp_path / missing, missing=missing, progress=False)
        for missing in ("precompute", "purify")
    )
    for dataset in (plain, made, on_demand):
        loader = DataLoader(dataset, 7, num_workers=2, collate_fn=list)
        assert [image.tobytes() for batch in loader for image, _ in batch] == want
    assert recipe.condition.planned is None  # the user's own is left as it was


def test_a_finished_cache_is_not_computed_again(purifier, images, tmp_path):
    class Counting(Purifier):
        kind = "counting"
        runs = 0

        def config(self):
            return {"kind": self.kind}

        def run(self, x_BCHW, seeds_B):
            Counting.runs += len(x_BCHW)
            return x_BCHW

    for _ in range(3):
        PurifiedDataset(PictureDataset(images), Counting(), cache=tmp_path, progress=False)[0]
    assert Counting.runs == COUNT


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_cache_keeps_grey_and_alpha(purifier, mode, tmp_path):
    data = [Image.fromarray(i.permute(1, 2, 0).numpy()).convert(mode) for i in random_images(6)]
    source = Tensors(lambda i: (data[i], 0), 6)
    plain = PurifiedDataset(source, purifier)
    cached = PurifiedDataset(source, purifier, cache=tmp_path, progress=False)
    for i in range(6):
        assert cached[i][0].mode == mode
        assert np.array_equal(np.asarray(cached[i][0]), np.asarray(plain[i][0]))


@pytest.mark.parametrize(
    "change",
    [
        lambda images: {"purifier": Jpeg(20)},
        lambda images: {"seed": 1},
        lambda images: {"dataset": PictureDataset(images.index_fill(0, torch.tensor([COUNT - 1]), 7))},
        lambda images: {"dataset": Tensors(lambda i: (PictureDataset(images)[i][0], i % 2 + (i == 7)))},
        lambda images: {"draws": 2},
        lambda images: {"dataset": PictureDataset(images[:-1])},
    ],
    ids=["purifier", "seed", "one-image", "one-target", "draws", "length"],
)
def test_a_cache_of_something_else_is_refused(images, tmp_path, change):
    arguments = {"dataset": PictureDataset(images), "purifier": Jpeg(10), "seed": 0}
    PurifiedDataset(**arguments, cache=tmp_path, progress=False)
    with pytest.raises(CacheError, match=r"differ|one image for each"):
        PurifiedDataset(**{**arguments, **change(images)}, cache=tmp_path, progress=False)
    CacheReader(tmp_path).verify()


def test_moving_the_cache_and_the_transform_do_not_matter(images, tmp_path):
    PurifiedDataset(PictureDataset(images), Jpeg(10), cache=tmp_path / "a", progress=False)
    (tmp_path / "a").rename(tmp_path / "b")
    source = PictureDataset(images, v1.Compose([v1.RandomCrop(8), v1.ToTensor()]))
    image, _ = PurifiedDataset(source, Jpeg(10), cache=tmp_path / "b", progress=False)[0]
    assert image.shape == (3, 8, 8)


def test_the_target_transform_is_applied_after_reading(images, tmp_path):
    """Its change, like that of the transform, does not make another cache; the cache holds the targets as stored."""
    for add in (1, 10):
        source = PictureDataset(images, v1.PILToTensor(), target_transform=lambda t, add=add: t + add)
        dataset = PurifiedDataset(source, Jpeg(10), cache=tmp_path, progress=False)
        assert [dataset[i][1] for i in (0, 1)] == [add, add + 1]
        assert dataset[[0, 1]][1].tolist() == [add, add + 1]
    assert list(CacheReader(tmp_path).targets) == [i % 2 for i in range(COUNT)]


@pytest.mark.parametrize("missing", [None, "precompute"])
def test_a_bad_image_is_named_when_it_is_reached(tmp_path, missing):
    data = [Image.new("P" if i == 151 else "RGB", (8, 8)) for i in range(300)]
    with pytest.raises(InputError, match=r"^Item 151 of the dataset"):
        PurifiedDataset(Tensors(lambda i: (data[i], i), 300), Jpeg(), cache=tmp_path, missing=missing, progress=False)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_a_bad_image_among_those_looked_at_is_named_before_anything_is_written(tmp_path):
    data = [Image.new("P" if i == 3 else "RGB", (8, 8)) for i in range(20)]
    with pytest.raises(InputError, match=r"^Item 3 of the dataset"):
        PurifiedDataset(Tensors(lambda i: (data[i], i), 20), Jpeg(), cache=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_reading_a_cache_reads_no_source(images, tmp_path):
    """Images and targets come out of the cache; what is checked, and the first sample's type, come at the start."""

    class Counting(PictureDataset):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return super().__getitem__(index)

    PurifiedDataset(Counting(images), Jpeg(), cache=tmp_path, progress=False)
    dataset = PurifiedDataset(Counting(images), Jpeg(), Compensate(), cache=tmp_path, progress=False)
    before = Counting.reads
    for i in range(COUNT):
        assert dataset[i][1] == i % 2
    dataset.__getitems__(range(COUNT))
    assert Counting.reads == before


def test_odd_tensors_can_be_cached(tmp_path, images):
    x = images.float() / 255
    for i, convert in enumerate((lambda t: t.requires_grad_(), lambda t: t.bfloat16())):
        dataset = Tensors(lambda j, convert=convert: (convert(x[j].clone()), j))
        PurifiedDataset(dataset, Jpeg(), cache=tmp_path / str(i), seed=np.int64(3), progress=False)[0]


def test_images_of_different_sizes_are_cached_as_png(tmp_path):
    data = [random_images(1, (16, 17, 11)[i % 3], seed=i)[0] for i in range(6)]
    source = Tensors(lambda i: (data[i], i), 6)
    plain = PurifiedDataset(source, Jpeg())
    for _ in range(2):  # made, then read
        cached = PurifiedDataset(source, Jpeg(), cache=tmp_path, progress=False)
        for i in range(6):
            assert_same(cached[i], plain[i])
            assert_same(PurifiedDataset.from_cache(tmp_path)[i], plain[i])
    assert CacheReader(tmp_path).layout.encoding == "png"


def test_another_size_that_comes_late_is_named(tmp_path):
    """Beyond the 64 images looked at: images of one size are stored raw."""
    data = [random_images(1, 9 if i == 100 else 8, seed=i)[0] for i in range(150)]
    with pytest.raises(InputError, match=r'Got \(9, 9, 3\) for item 100 after \(8, 8, 3\)[\s\S]*encoding="png"'):
        PurifiedDataset(Tensors(lambda i: (data[i], i), 150), Jpeg(), cache=tmp_path / "raw", progress=False)
    assert not list((tmp_path / "raw").glob("[!.]*"))
    precompute(Tensors(lambda i: (data[i], i), 150), Jpeg(), tmp_path / "png", encoding="png", progress=False)
    assert np.asarray(CacheReader(tmp_path / "png")[100]).shape == (9, 9, 3)


# -- a cache in any state ----------------------------------------------------------------------------


def partly_filled(folder: Path, source, purifier: Purifier, shards=(0, 2), shard_size: int = 5, draws: int = 1) -> None:
    """Some of the shards of an unfinished cache, as another run would have made them."""
    job = Job(take_over(source), purifier, 0, draws, None)
    writer = CacheWriter(folder, job.config(), Layout(len(source), shard_size, draws), job.made())
    for number in shards:
        Filling(job, writer, batch_size=3).make(writer.shards[number])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_partly_filled_cache_is_refused_by_default(images, purifier, expected, tmp_path):
    source = PictureDataset(images)
    partly_filled(tmp_path, source, purifier)
    before = names(tmp_path)
    with pytest.raises(CacheError, match=r'unfinished \(2 of 4 shards\)[\s\S]*"precompute"[\s\S]*"purify"'):
        PurifiedDataset(source, purifier, cache=tmp_path, progress=False)
    assert names(tmp_path) == before
    kept = (tmp_path / "shard-00002.safetensors").stat().st_mtime_ns
    dataset = PurifiedDataset(source, purifier, cache=tmp_path, missing="precompute", progress=False)
    assert (tmp_path / "shard-00002.safetensors").stat().st_mtime_ns == kept
    assert names(tmp_path) == ["claim.json", "index.json", *(f"shard-0000{n}.safetensors" for n in range(4))]
    assert all(torch.equal(as_tensor(dataset[i][0]), expected[i]) for i in range(COUNT))
    PurifiedDataset(source, purifier, cache=tmp_path, progress=False)


@pytest.mark.parametrize("missing", [None, "precompute", "purify"])
def test_a_new_folder_in_each_mode(images, purifier, expected, tmp_path, missing):
    source = PictureDataset(images)
    for _ in range(2):
        dataset = PurifiedDataset(source, purifier, cache=tmp_path, missing=missing, progress=False)
        assert all(
            torch.equal(as_tensor(image), expected[i])
            for i, (image, _) in enumerate(map(dataset.__getitem__, range(COUNT)))
        )
    CacheReader(tmp_path).verify()
    assert names(tmp_path) == ["claim.json", "index.json", "shard-00000.safetensors"]


def test_a_shard_is_purified_when_it_is_first_read(images, purifier, expected, tmp_path):
    source = PictureDataset(images, v1.PILToTensor())
    partly_filled(tmp_path / "on-demand", source, purifier, shards=[2])
    dataset = PurifiedDataset(source, purifier, cache=tmp_path / "on-demand", missing="purify", progress=False)
    assert names(tmp_path / "on-demand") == ["claim.json", "shard-00002.safetensors"]
    assert torch.equal(dataset[12][0], expected[12])
    assert names(tmp_path / "on-demand") == ["claim.json", "shard-00002.safetensors"]
    assert torch.equal(dataset[-1][0], expected[-1])
    assert names(tmp_path / "on-demand") == ["claim.json", "shard-00002.safetensors", "shard-00003.safetensors"]
    assert torch.equal(collect(DataLoader(dataset, batch_size=6)), expected)
    precompute(source, purifier, tmp_path / "whole", shard_size=5, progress=False)
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "on-demand" / name).read_bytes()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("draws", [1, 2])
def test_workers_purify_on_demand(images, tmp_path, draws):
    source = PictureDataset(images, v1.PILToTensor())
    partly_filled(tmp_path, source, Jpeg(30), shards=[1], draws=draws)
    dataset = PurifiedDataset(source, Jpeg(30), draws=draws, cache=tmp_path, missing="purify", progress=False)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context="fork")
    plain = PurifiedDataset(source, Jpeg(30), draws=draws)
    for epoch in range(draws):
        dataset.set_epoch(epoch), plain.set_epoch(epoch)
        assert torch.equal(collect(loader), collect(DataLoader(plain, batch_size=7)))
    CacheReader(tmp_path).verify()


def changed_at(images: Tensor, index: int) -> PictureDataset:
    other = images.clone()
    other[index] ^= 1
    return PictureDataset(other)


@pytest.mark.parametrize("missing", ["precompute", "purify"])
def test_a_partly_filled_cache_of_another_source(images, tmp_path, missing):
    """Shards that are there are not taken for those of another source, whoever finishes the cache."""
    partly_filled(tmp_path, PictureDataset(images), Jpeg())
    source = changed_at(images, 12)

    def read():
        return PurifiedDataset(source, Jpeg(), cache=tmp_path, missing=missing, progress=False)[12]

    with pytest.raises(CacheError, match=r"image of sample 12\."):
        read()


def test_how_much_of_the_source_is_checked(images, tmp_path):
    PurifiedDataset(PictureDataset(images), Jpeg(), cache=tmp_path, progress=False)

    def opened(source, **options):
        return PurifiedDataset(source, Jpeg(), cache=tmp_path, progress=False, **options)

    for amount in (True, COUNT, 10 * COUNT):
        with pytest.raises(CacheError, match=rf"1 of {COUNT} samples compared, first in the image of sample 13\."):
            opened(changed_at(images, 13), check_source=amount)
    other = Tensors(lambda i: (PictureDataset(images)[i][0], 5 if i in (4, 6) else i % 2))
    with pytest.raises(CacheError, match=rf"2 of {COUNT} samples compared, first in the targets of sample 4\."):
        opened(other)
    both = Tensors(lambda i: (changed_at(images, 4)[i][0], 5 if i == 4 else i % 2))
    with pytest.raises(CacheError, match=r"first in the image and targets of sample 4\."):
        opened(both)
    opened(changed_at(images, 13), check_source=False)[13]
    opened(changed_at(images, 13), check_source=0)[13]
    with pytest.raises(CacheError, match=r"3 of 3 samples compared"):
        opened(PictureDataset(images ^ 1), check_source=3)
    reads = []

    class Counting(PictureDataset):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    found = set()
    for _ in range(30):  # others each time
        reads.clear()
        opened(Counting(images), check_source=2)
        found |= {*reads[2 * COUNT :]}
    assert len(found) > 10


@pytest.mark.parametrize("amount", ["all", -1, 1.5, None])
def test_bad_amounts_of_the_source(images, tmp_path, amount):
    PurifiedDataset(PictureDataset(images), Jpeg(), cache=tmp_path, progress=False)
    with pytest.raises(InputError, match="check_source"):
        PurifiedDataset(PictureDataset(images), Jpeg(), cache=tmp_path, check_source=amount, progress=False)


def test_nothing_of_the_source_is_checked_where_that_is_said(images, tmp_path):
    partly_filled(tmp_path, PictureDataset(images), Jpeg())
    source = changed_at(images, 12)
    PurifiedDataset(source, Jpeg(), cache=tmp_path, missing="precompute", check_source=False, progress=False)


@pytest.mark.parametrize("kind", ["cuda", None])
def test_a_partly_filled_cache_of_another_device_is_refused(images, tmp_path, kind):
    job = Job(take_over(PictureDataset(images)), Jpeg(), 0, 1, None)
    made = {**job.made(), "device": kind} if kind else {}
    writer = CacheWriter(tmp_path, job.config(), Layout(COUNT, 5), made)
    Filling(job, writer, batch_size=5).make(writer.shards[0])
    with pytest.raises(CacheError, match=r"one kind of device"):
        PurifiedDataset(PictureDataset(images), Jpeg(), cache=tmp_path, missing="precompute", progress=False)
    dataset = PurifiedDataset(PictureDataset(images), Jpeg(), cache=tmp_path, missing="purify", progress=False)
    with pytest.raises(CacheError, match=r"one kind of device"):
        dataset[19]


@pytest.mark.parametrize("missing", ["purified", "", True, 0])
def test_bad_missing(images, tmp_path, missing):
    with pytest.raises(InputError, match=r"missing must be one of None, 'precompute', 'purify'\. Got"):
        PurifiedDataset(PictureDataset(images), Jpeg(), cache=tmp_path / "new", missing=missing)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("transform", [None, v1.ToTensor()], ids=["pil", "conversion"])
def test_in_memory(images, tmp_path, transform):
    source = PictureDataset(images, transform)
    plain = PurifiedDataset(source, Jpeg())
    dataset = PurifiedDataset(source, Jpeg(), cache=tmp_path / "cache", in_memory=True, progress=False)
    alone = PurifiedDataset.from_cache(tmp_path / "cache", transform=transform, in_memory=True)
    (tmp_path / "cache").rename(tmp_path / "away")
    for i in range(COUNT):
        assert_same(dataset[i], plain[i])
        assert_same(alone[i], plain[i])
    assert_same(dataset.__getitems__([3, 3, 0]), plain.__getitems__([3, 3, 0]))


def as_given(sample: Any) -> Any:
    """The types of a sample's parts, and the order of its keys."""
    parts = sample.items() if isinstance(sample, dict) else enumerate(sample)
    return type(sample), [(k, Image.Image if isinstance(v, Image.Image) else type(v)) for k, v in parts]


def test_a_cache_does_not_decide_the_types_of_samples(images, tmp_path):
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[:4]]
    sources = {
        "as it was": lambda x, i: (x, i),
        "arrays": lambda x, i: (np.asarray(x), i),
        "tensors": lambda x, i: (as_tensor(x), i),
        "lists": lambda x, i: [x, i],
        "a label that is a tensor": lambda x, i: (x, torch.tensor(i)),
        "a label of numpy": lambda x, i: (x, np.int64(i)),
    }
    for name, make in sources.items():
        source = Tensors(lambda i, make=make: make(pictures[i], i), 4)
        dataset = PurifiedDataset(source, Jpeg(30), cache=tmp_path / "c", check_source=False, progress=False)
        assert as_given(dataset[1]) == as_given(source[1]), name
        assert as_given(dataset.__getitems__([1, 2])[1]) == as_given(source[2]), name
    assert np.array_equal(np.asarray(dataset[1][0]), np.asarray(PurifiedDataset(source, Jpeg(30))[1][0]))


@pytest.mark.parametrize("order", [["image", "label"], ["label", "image", "extra"], ["extra", "image"]])
def test_keys_come_in_the_order_of_the_source(images, tmp_path, order):
    values = {"image": images[0], "label": 3, "extra": [1, (2,)]}
    source = Tensors(lambda i: {key: values[key] for key in order}, 3)
    for folder in (None, tmp_path / "c", tmp_path / "c"):
        sample = PurifiedDataset(source, Jpeg(30), cache=folder, progress=False)[1]
        assert as_given(sample) == as_given(source[1])
        assert {k: v for k, v in sample.items() if k != "image"} == {
            k: v for k, v in values.items() if k in order[:] and k != "image"
        }


# -- a cache without its source ----------------------------------------------------------------------


def assert_same(got, want) -> None:
    """The same type and bits, all the way down."""
    assert type(got) is type(want)
    if isinstance(want, Image.Image):
        assert (got.mode, got.size, got.tobytes()) == (want.mode, want.size, want.tobytes())
    elif isinstance(want, Tensor):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert torch.equal(got, want)
    elif isinstance(want, np.ndarray):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert np.array_equal(got, want)
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    else:
        assert got == want


def pil(x: Tensor, mode: str) -> Image.Image:
    image = Image.fromarray(x.permute(1, 2, 0).numpy()).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(x[0].numpy()))
    return image


HOLD = {
    "pil RGB": lambda x: pil(x, "RGB"),
    "pil L": lambda x: pil(x, "L"),
    "pil LA": lambda x: pil(x, "LA"),
    "pil RGBA": lambda x: pil(x, "RGBA"),
    "numpy HWC": lambda x: x.permute(1, 2, 0).numpy().copy(),
    "numpy HW": lambda x: x[0].numpy().copy(),
    "numpy RGBA": lambda x: np.concatenate([x, x[:1]]).transpose(1, 2, 0).copy(),
    "tensor CHW": lambda x: x,
    "tensor 1HW": lambda x: x[:1],
    "tensor HW": lambda x: x[0],
    "tv_tensor": lambda x: tv_tensors.Image(x),
    "numpy float64": lambda x: x.permute(1, 2, 0).numpy() / 255,
    "tensor float16": lambda x: (x.float() / 255).half(),
    "tensor bfloat16": lambda x: (x.float() / 255).bfloat16(),
    "tv_tensor float32": lambda x: tv_tensors.Image(x.float() / 255),
}
SAMPLES = {
    "pair": (lambda x, i: (x, i), None),
    "triple": (lambda x, i: (x, i, f"{i}.png"), None),
    "list": (lambda x, i: [x, torch.tensor([i])], None),
    "second": (lambda x, i: ({"box": (i, 1.5)}, x), 1),
    "last": (lambda x, i: (i, None, x), -1),
    "dict": (lambda x, i: {"id": i, "image": x, "mask": np.full((2, 2), i)}, None),
    "dict-key": (lambda x, i: {"jpg": x, "cls": i}, "jpg"),
    "bare": (lambda x, i: x, None),
    "tuple of one": (lambda x, i: (x,), None),
}


@pytest.mark.parametrize(
    ("container", "shape"),
    [
        *zip(HOLD, cycle(("pair", "second"))),
        *(("tensor CHW", shape) for shape in SAMPLES if shape != "second"),
    ],
)
def test_from_cache_is_the_wrapped_dataset(images, tmp_path, container, shape):
    make, key = SAMPLES[shape]
    source = Tensors(lambda i: make(HOLD[container](images[i]), i), 6)
    plain = PurifiedDataset(source, Jpeg(30), image_key=key)
    cached = PurifiedDataset(source, Jpeg(30), image_key=key, cache=tmp_path, progress=False)
    alone = PurifiedDataset.from_cache(tmp_path)
    assert len(alone) == 6
    for i in range(6):
        assert_same(alone[i], cached[i])
        if "float" not in container:  # 8 bits a channel
            assert_same(alone[i], plain[i])
    assert_same(alone.__getitems__([5, 0, -1]), cached.__getitems__([5, 0, -1]))
    assert_same(alone[-1], alone[5])
    with pytest.raises(IndexError, match="Got 6"):
        alone[6]


def test_containers_of_several_kinds_in_one_dataset(images, tmp_path):
    kinds = [make for name, make in HOLD.items() if "float" not in name]
    source = Tensors(lambda i: (kinds[i % len(kinds)](images[i]), i))
    plain = PurifiedDataset(source, Jpeg(30))
    PurifiedDataset(source, Jpeg(30), cache=tmp_path, progress=False)
    alone = PurifiedDataset.from_cache(tmp_path)
    for i in range(COUNT):
        assert_same(alone[i], plain[i])


NORMALIZE = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3)}
RANDOM = {
    "crop": lambda: v1.Compose([v1.RandomCrop(8), v1.RandomHorizontalFlip(), v1.ToTensor()]),
    "crop, normalised": lambda: v2.Compose(
        [v2.RandomCrop(8), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(**NORMALIZE)]
    ),
    "function": lambda: lambda image: v1.functional.pil_to_tensor(image),
}
CONVERSIONS = {
    "ToTensor": lambda: v1.ToTensor(),
    "Compose of ToTensor": lambda: v1.Compose([v1.ToTensor()]),
    "PILToTensor": lambda: v1.PILToTensor(),
    "v2 PILToTensor": lambda: v2.Compose([v2.PILToTensor()]),
    "ToTensor, Normalize": lambda: v1.Compose([v1.ToTensor(), v1.Normalize(**NORMALIZE)]),
    "nested": lambda: v1.Compose([v1.Compose([v1.ToTensor()]), v2.Compose([v2.Normalize(**NORMALIZE)])]),
    "PILToTensor, ConvertImageDtype": lambda: v1.Compose([v1.PILToTensor(), v1.ConvertImageDtype(torch.float32)]),
    "all v1": lambda: v1.Compose([v1.PILToTensor(), v1.ConvertImageDtype(torch.float32), v1.Normalize(**NORMALIZE)]),
    "ToImage": lambda: v2.ToImage(),
    "ToImage, ToDtype": lambda: v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
    "ToImage, ToDtype, Normalize": lambda: v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(**NORMALIZE)]
    ),
    "ToImage, ToDtype, Normalize, ToPureTensor": lambda: v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(**NORMALIZE), v2.ToPureTensor()]
    ),
    "ToImage, ToPureTensor, ToDtype": lambda: v2.Compose(
        [v2.ToImage(), v2.ToPureTensor(), v2.ToDtype(torch.float32, scale=True)]
    ),
}
CONVERSIONS_WITHOUT_FLOAT32 = {
    "float64": lambda: v1.Compose([v1.PILToTensor(), v1.ConvertImageDtype(torch.float64), v1.Normalize(**NORMALIZE)]),
    "float16": lambda: v2.Compose([v2.ToImage(), v2.ToDtype(torch.float16, scale=True)]),
    "bfloat16, normalised": lambda: v1.Compose(
        [v1.ToTensor(), v1.Normalize(**NORMALIZE), v1.ConvertImageDtype(torch.bfloat16)]
    ),
}


def compensated_or_not(names, compensated):
    """Parametrize a test by a transform of each name, and by compensation behind some of them."""
    corruption = Compensate(p=0.5, sigma=0.1)
    cases = [pytest.param(name, None, id=name) for name in names]
    cases += [pytest.param(name, corruption, id=f"{name}, compensated") for name in compensated]
    return pytest.mark.parametrize(("name", "compensate"), cases)


# With and without a normalisation behind the compensation, in both versions of torchvision, opened and not.
COMPENSATED = (
    "ToTensor",
    "ToTensor, Normalize",
    "nested",
    "PILToTensor",
    "ToImage, ToDtype, Normalize, ToPureTensor",
    "ToImage, ToPureTensor, ToDtype",
)


@compensated_or_not({**RANDOM, **CONVERSIONS, "none": None}, (*RANDOM, *COMPENSATED, "none"))
def test_from_cache_with_transforms(images, finished, name, compensate):
    """Of the same random state the same crops, of the same seed the same compensation."""
    make = {**RANDOM, **CONVERSIONS}.get(name, lambda: None)
    target_transform = v1.Lambda(lambda t: f"class {t}") if name == "crop" else None
    source = PictureDataset(images, make(), target_transform)
    wrapped = PurifiedDataset(source, Jpeg(30), compensate)
    alone = PurifiedDataset.from_cache(finished, compensate, transform=make(), target_transform=target_transform)
    cached = PurifiedDataset(source, Jpeg(30), compensate, cache=finished, progress=False)
    for dataset in (wrapped, alone, cached):
        dataset.set_epoch(2)
    for i in (0, 19) if compensate is None else (19,):
        results = []
        for dataset in (wrapped, alone, cached):
            torch.manual_seed(i)
            results.append(dataset[i])
        assert_same(results[1], results[0])
        assert_same(results[2], results[0])


@pytest.fixture(scope="module")
def of_a_network(images, purifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of four images that a network purified."""
    folder = tmp_path_factory.mktemp("of a network") / "cache"
    precompute(PictureDataset(images[:4]), purifier, folder, progress=False)
    return folder


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_go_to_spawned_workers(images, purifier, of_a_network, name):
    """Without the model, which would open a GPU in each worker only to read bytes."""
    source = PictureDataset(images[:4], CONVERSIONS[name]())
    dataset = PurifiedDataset(source, purifier, cache=of_a_network, progress=False)
    data = pickle.dumps(dataset)
    assert len(data) < len(pickle.dumps(PurifiedDataset(source, dataset.purifier)))
    again = pickle.loads(data)
    assert again._conversion is not None
    assert again.purifier is None
    assert_same(again[[3, 1]], dataset[[3, 1]])
    assert dataset.purifier is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda: v2.Compose([v2.ToImage(), v1.ConvertImageDtype(torch.float32)]),
        lambda: v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v1.Normalize(**NORMALIZE)]),
    ],
)
def test_steps_that_unwrap(images, tmp_path, make):
    dataset = PurifiedDataset(PictureDataset(images, make()), Jpeg(30), cache=tmp_path, progress=False)
    assert_same(dataset.__getitems__([2, 0]), [dataset[2], dataset[0]])


def test_targets_are_those_of_the_items(images, tmp_path):
    source = PictureDataset(images)
    source.targets = [i % 2 for i in range(COUNT)]
    dataset = PurifiedDataset(source, Jpeg(30), cache=tmp_path, progress=False)
    source.targets[0] = 77
    assert dataset.targets == [dataset[i][1] for i in range(COUNT)]
    assert dataset.targets is dataset.targets, "not a new list for each look"


def test_a_seed_of_compensation(images, tmp_path):
    compensate = Compensate(p=0, sigma=0.1)
    PurifiedDataset(PictureDataset(images), Jpeg(30), seed=3, cache=tmp_path, progress=False)
    a, b, c = (PurifiedDataset.from_cache(tmp_path, compensate, seed=seed)[0][0] for seed in (None, 3, 4))
    assert_same(a, b)
    assert a.tobytes() != c.tobytes()


def test_attributes_of_a_cache_without_its_source(images, tmp_path):
    source = PictureDataset(images)
    PurifiedDataset(source, Jpeg(), cache=tmp_path / "pairs", progress=False)
    alone = PurifiedDataset.from_cache(tmp_path / "pairs")
    assert alone.classes == ["even", "odd"]
    assert alone.class_to_idx == {"even": 0, "odd": 1}
    assert alone.targets == [i % 2 for i in range(COUNT)]
    assert alone.dataset is None
    assert_same(pickle.loads(pickle.dumps(alone))[3], alone[3])
    PurifiedDataset(Tensors(lambda i: images[i]), Jpeg(), cache=tmp_path / "bare", progress=False)
    bare = PurifiedDataset.from_cache(tmp_path / "bare")
    for name in ("classes", "class_to_idx", "targets", "other"):
        with pytest.raises(AttributeError, match=name):
            getattr(bare, name)


def test_from_cache_of_what_is_none(images, tmp_path):
    with pytest.raises(CacheError, match=r"index\.json"):
        PurifiedDataset.from_cache(tmp_path)
    partly_filled(tmp_path, PictureDataset(images), Jpeg())
    with pytest.raises(CacheError, match=r"unfinished \(2 of 4"):
        PurifiedDataset.from_cache(tmp_path)
    with pytest.raises(InputError, match="Got float"):
        PurifiedDataset.from_cache(tmp_path, 0.4)


def test_targets_that_cannot_be_stored(images, tmp_path, caplog):
    marker = object()
    source = Tensors(lambda i: (images[i], marker, i))
    with caplog.at_level(logging.WARNING, "purifyloader"):
        PurifiedDataset(source, Jpeg(), cache=tmp_path, progress=False)
    assert any("builtins.object" in record.getMessage() for record in caplog.records)
    again = PurifiedDataset(source, Jpeg(), cache=tmp_path, progress=False)
    assert again[3][1] is marker
    assert again[3][2] == 3
    assert_same(again[3][0], PurifiedDataset(source, Jpeg())[3][0])
    with pytest.raises(CacheError, match=r"must hold its targets[\s\S]*give the source"):
        PurifiedDataset.from_cache(tmp_path)


@pytest.mark.parametrize(
    "target",
    [np.array(["a", "b"]), np.array([object()]), torch.eye(2).to_sparse()],
    ids=["strings", "objects", "sparse"],
)
def test_targets_without_a_hash(images, tmp_path, target):
    """Neither stored nor hashed by value, but no reason to refuse the images."""
    source = Tensors(lambda i: (images[i], target), 4)
    PurifiedDataset(source, Jpeg(), cache=tmp_path, progress=False)
    assert PurifiedDataset(source, Jpeg(), cache=tmp_path, progress=False)[2][1] is target


def test_a_named_tuple_is_one_again_with_its_source(images, tmp_path):
    source = Tensors(lambda i: Pair(images[i], i, {"id": i}))
    for _ in range(2):
        sample = PurifiedDataset(source, Jpeg(), cache=tmp_path, progress=False)[4]
        assert type(sample) is Pair
        assert (sample.label, sample.meta) == (4, {"id": 4})
    assert type(PurifiedDataset.from_cache(tmp_path)[4]) is tuple


def test_a_target_transform_needs_a_target(images, tmp_path):
    PurifiedDataset(Tensors(lambda i: images[i]), Jpeg(), cache=tmp_path, progress=False)
    with pytest.raises(InputError, match="target_transform"):
        PurifiedDataset.from_cache(tmp_path, target_transform=str)[0]


# -- batches -----------------------------------------------------------------------------------------


def one_by_one(images, make, compensate, epoch: int, indices, mode: str = "RGB") -> list:
    """Item by item, through the transform itself, without a cache."""
    dataset = PurifiedDataset(PictureDataset(images, make(), mode=mode), Jpeg(30), compensate)
    dataset.set_epoch(epoch)
    return [dataset[i] for i in indices]


ORDER = [3, 0, 19, 3, 7]


def test_whole_batches_of_unscaled_floats(images, tmp_path):
    def make():
        return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32), v2.Normalize(**NORMALIZE)])

    dataset = PurifiedDataset(PictureDataset(images, make()), Jpeg(30), cache=tmp_path, progress=False)
    want = one_by_one(images, make, None, 0, ORDER)
    assert_same(dataset.__getitems__(ORDER), want)
    assert_same(dataset[ORDER], default_collate(want))
    with pytest.raises(InputError, match=r"divide 0-255 floats"):
        PurifiedDataset(PictureDataset(images, make()), Jpeg(30), Compensate(), cache=tmp_path, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_batches_follow_the_default_dtype(images, finished, dtype):
    """As ToTensor does."""
    dataset = PurifiedDataset(PictureDataset(images, v1.ToTensor()), Jpeg(30), cache=finished, progress=False)
    torch.set_default_dtype(dtype)
    try:
        want = one_by_one(images, v1.ToTensor, None, 0, ORDER)
        assert want[0][0].dtype == dtype
        assert_same(dataset[ORDER], default_collate(want))
    finally:
        torch.set_default_dtype(torch.float32)


def test_whole_batches_are_converted_at_once(images, finished):
    """Not a word of the bits: without this they would all be the same for another reason."""
    calls = []

    class Watched(v1.Normalize):
        def forward(self, tensor):
            calls.append(tensor.ndim)
            return super().forward(tensor)

    for kind, want in ((Watched, [3] * len(ORDER)), (v1.Normalize, [4])):
        transform = v1.Compose([v1.ToTensor(), kind(**NORMALIZE)])
        dataset = PurifiedDataset(PictureDataset(images, transform), Jpeg(30), cache=finished, progress=False)
        calls.clear()
        step = transform.transforms[-1]
        if kind is v1.Normalize:
            step.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].ndim))
        dataset[ORDER]
        assert calls == want


@compensated_or_not({**CONVERSIONS, **CONVERSIONS_WITHOUT_FLOAT32}, (*COMPENSATED, *CONVERSIONS_WITHOUT_FLOAT32))
def test_whole_batches_have_the_bits_of_single_items(images, finished, name, compensate):
    make = {**CONVERSIONS, **CONVERSIONS_WITHOUT_FLOAT32}[name]
    dataset = PurifiedDataset(PictureDataset(images, make()), Jpeg(30), compensate, cache=finished, progress=False)
    alone = PurifiedDataset.from_cache(finished, compensate, transform=make())
    want = one_by_one(images, make, compensate, 1, ORDER)
    for cached in (dataset, alone):
        cached.set_epoch(1)
        assert_same(cached.__getitems__(ORDER), want)
        assert_same([cached[i] for i in ORDER[:2]], want[:2])
        assert_same(cached[ORDER], default_collate(want))
    for cached in (dataset, alone) if compensate is None else ():  # by the second time all images were checked
        assert_same(cached.__getitems__(ORDER), want)
        assert_same([cached[i] for i in ORDER], want)
        assert_same(cached[tuple(ORDER)], default_collate(want))
        assert_same(cached[torch.tensor(ORDER)], default_collate(want))
        assert_same(cached[[-1]], default_collate([cached[COUNT - 1]]))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA"])
@pytest.mark.parametrize("name", ["Compose of ToTensor", "PILToTensor"])
def test_whole_batches_of_grey_and_alpha(images, tmp_path, name, mode):
    make = CONVERSIONS[name]
    source = PictureDataset(images, make(), mode=mode)
    for compensate in (None, Compensate(p=0.5, sigma=0.1)):
        want = one_by_one(images, make, compensate, 0, ORDER, mode)
        dataset = PurifiedDataset(source, Jpeg(30), compensate, cache=tmp_path, progress=False)
        assert_same(dataset.__getitems__(ORDER), want)
        assert_same(dataset[ORDER], default_collate(want))


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("cached", [False, True])
def test_whole_batches_of_random_crops(images, finished, name, cached):
    dataset = PurifiedDataset(
        PictureDataset(images, RANDOM[name]()), Jpeg(30), cache=finished if cached else None, progress=False
    )
    torch.manual_seed(0)
    want = default_collate([dataset[i] for i in ORDER])
    torch.manual_seed(0)
    assert_same(dataset[ORDER], want)


@pytest.mark.parametrize(
    "target",
    [
        lambda i: float(i),
        lambda i: str(i),
        lambda i: {"a": i, "b": [i, 0.5]},
        lambda i: torch.full((2,), i),
        lambda i: i > 2,
    ],
    ids=["float", "str", "dict", "tensor", "bool"],
)
def test_whole_batches_collate_any_target(images, tmp_path, target):
    source = Tensors(lambda i: (pil(images[i], "RGB"), target(i)))
    dataset = PurifiedDataset(source, Jpeg(30), transform=v1.ToTensor(), cache=tmp_path, progress=False)
    want = [dataset[i] for i in ORDER]
    assert_same(dataset[ORDER], default_collate(want))
    assert_same(dataset.__getitems__(ORDER), want)


@pytest.mark.parametrize("shape", ["triple", "list", "dict", "bare"])
def test_whole_batches_of_any_sample(images, tmp_path, shape):
    make, key = SAMPLES[shape]
    source = Tensors(lambda i: make(images[i], i))
    for cache in (None, tmp_path):
        dataset = PurifiedDataset(source, Jpeg(30), image_key=key, cache=cache, progress=False)
        assert_same(dataset[ORDER], default_collate([dataset[i] for i in ORDER]))


def test_bad_batches_of_indices(images, finished):
    for make in (v1.ToTensor, v1.RandomHorizontalFlip):
        dataset = PurifiedDataset(PictureDataset(images, make()), Jpeg(30), cache=finished, progress=False)
        with pytest.raises(IndexError, match="Got 20"):
            dataset[[0, COUNT]]
        with pytest.raises(TypeError):
            dataset[[0.5]]
        assert dataset.__getitems__([]) == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["ToTensor", "ToImage, ToDtype, Normalize", "PILToTensor"])
def test_a_loader_over_a_cache(images, finished, workers, name):
    compensate = Compensate(p=0.5, sigma=0.1) if "Normalize" in name else None
    make = CONVERSIONS[name]
    dataset = PurifiedDataset(PictureDataset(images, make()), Jpeg(30), compensate, cache=finished, progress=False)
    want = one_by_one(images, make, compensate, 0, range(COUNT))
    loader = DataLoader(dataset, batch_size=6, num_workers=workers, multiprocessing_context="fork" if workers else None)
    for batch, start in zip(loader, range(0, COUNT, 6), strict=True):
        assert_same(batch, default_collate(want[start : start + 6]))


# -- draws -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("where", ["on the fly", "cached", "precomputed", "from cache", "in memory"])
@pytest.mark.parametrize(
    ("make", "workers"),
    [(v1.PILToTensor, 0), (v1.PILToTensor, 2), (lambda: lambda image: as_tensor(image), 0)],
    ids=["batch", "batch in workers", "item"],
)
def test_an_epoch_reads_its_draw(images, tmp_path, workers, where, make):
    draws, purifier = 2, Compensation(p=0.5, sigma=0.1)
    source = PictureDataset(images, make())
    want = [
        quantize(purifier(images.float() / 255, noise.fold_in(noise.image_keys(0, k, range(COUNT)), 0)))
        for k in range(draws)
    ]
    assert not torch.equal(want[0], want[1])
    if where in ("precomputed", "from cache", "in memory"):
        precompute(source, purifier, tmp_path, draws=draws, shard_size=6, progress=False)
    if where == "from cache":
        dataset = PurifiedDataset.from_cache(tmp_path, transform=make())
    else:
        dataset = PurifiedDataset(
            source,
            purifier,
            draws=draws,
            cache=None if where == "on the fly" else tmp_path,
            in_memory=where == "in memory",
            progress=False,
        )
    assert dataset.draws == draws
    context = "fork" if workers else None
    loader = DataLoader(
        dataset, 6, num_workers=workers, multiprocessing_context=context, persistent_workers=workers > 0
    )
    for epoch in (0, 1, 2):
        dataset.set_epoch(epoch)
        assert torch.equal(collect(loader), want[epoch % draws])
        assert torch.equal(dataset[3][0], want[epoch % draws][3])
        assert torch.equal(dataset[[3, 1]][0], want[epoch % draws][[3, 1]])


def test_draws_of_a_cache_and_of_a_call_must_agree(images, tmp_path):
    precompute(PictureDataset(images), Jpeg(), tmp_path, draws=2, progress=False)
    with pytest.raises(CacheError, match="draws: 2 → 1"):
        PurifiedDataset(PictureDataset(images), Jpeg(), cache=tmp_path, progress=False)
    for bad in (0, -1, 1.5, None):
        with pytest.raises(InputError, match="draws"):
            PurifiedDataset(PictureDataset(images), Jpeg(), draws=bad)


@pytest.mark.parametrize("make", [v1.PILToTensor, lambda: None], ids=["batch", "pil"])
@pytest.mark.parametrize("how", ["items", "batches"])
def test_forgetting_set_epoch_is_said_for_draws_too(images, tmp_path, caplog, make, how):
    source = PictureDataset(images, make())
    dataset = PurifiedDataset(source, Jpeg(), draws=2, cache=tmp_path, progress=False)
    with caplog.at_level(logging.WARNING, "purifyloader"):
        for _ in range(5):
            if how == "items":
                for i in range(COUNT):
                    dataset[i]
            else:
                dataset.__getitems__(range(COUNT))
    assert len(caplog.records) == 1


# -- what is refused ---------------------------------------------------------------------------------


def test_normalised_images_are_refused(purifier, images):
    dataset = Tensors(lambda i: (images[i].float() / 127.5 - 1, i))
    with pytest.raises(InputError, match=r"Item 0 .*Got values from -1[\s\S]*transform="):
        PurifiedDataset(dataset, purifier)


def test_augmented_images_are_refused(purifier, images):
    flip = v1.RandomHorizontalFlip()
    with pytest.raises(InputError, match=r"augments[\s\S]*transform="):
        PurifiedDataset(Tensors(lambda i: (flip(images[i]), i)), purifier)


def test_looking_does_not_move_the_random_state(images):
    class Noisy(Tensors):
        def __getitem__(self, index):
            torch.rand(1), np.random.rand()
            return super().__getitem__(index)

    torch.manual_seed(5)
    np.random.seed(5)
    want = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    PurifiedDataset(Noisy(lambda i: (images[i], i)), Jpeg())
    assert (torch.rand(1), np.random.rand()) == want


@pytest.mark.parametrize("how", ["compensated", "made", "opened"])
def test_wrapping_does_not_move_the_random_state(images, tmp_path, how):
    class Noisy(Tensors):
        def __getitem__(self, index):
            torch.rand(1), np.random.rand()
            return super().__getitem__(index)

    source = Noisy(lambda i: (images[i], i))
    options = {"cache": tmp_path, "progress": False}
    if how == "compensated":
        options = {"compensate": Compensate()}
    elif how == "opened":
        PurifiedDataset(source, Jpeg(), **options)
    torch.manual_seed(5)
    np.random.seed(5)
    want = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    PurifiedDataset(source, Jpeg(), **options)
    assert (torch.rand(1), np.random.rand()) == want


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Tensors(lambda i: 0, 0), "empty"),
        (Stream(), "map-style"),
        (Tensors(lambda i: ("no image", i)), r"Got str as field 0"),
        (Tensors(lambda i: {"img": torch.zeros(3, 8, 8), "y": i}), r"\['img', 'y'\]"),
        (Tensors(lambda i: (torch.full((3, 8, 8), torch.nan), i)), "NaN"),
        (Tensors(lambda i: (torch.zeros(3, 8, 8) + 255.0, i)), "divide"),
        (Tensors(lambda i: (torch.zeros(8, 8, 3), i)), r"permute it to \(C, H, W\)"),
        (Tensors(lambda i: (Image.new("P", (8, 8)), i)), r'convert\("RGB"\)'),
        (Tensors(lambda i: (torch.zeros(3, 8, 8, dtype=torch.int64), i)), "int64"),
    ],
    ids=["empty", "iterable", "no-image", "key", "nan", "range", "layout", "palette", "int64"],
)
def test_bad_datasets(dataset, message, purifier):
    with pytest.raises(InputError, match=message):
        PurifiedDataset(dataset, purifier)


RGB, GREY = Image.new("RGB", (8, 8)), Image.new("L", (8, 8))
BYTES, UNIT = np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8)


@pytest.mark.parametrize(
    ("sample", "where"),
    [
        ((RGB, RGB, 0), "1"),
        ((BYTES, BYTES, 0), "1"),
        ((UNIT, 0, UNIT), "2"),
        ((RGB, np.zeros((4, 6, 3)), 0), "1"),
        ((GREY, GREY, 0), "1"),
        ((RGB, [0, RGB]), "1"),
        ((RGB, {"label": 1, "views": (UNIT,)}), "1"),
        ({"image": RGB, "right": Image.new("RGBA", (4, 4)), "label": 0}, "'right'"),
        ((UNIT, tv_tensors.Image(torch.zeros(1, 8, 8)), UNIT, 3), "1, 2"),
    ],
)
def test_a_second_image_does_not_pass_as_it_is(sample, where, tmp_path, caplog):
    jpeg = recipes.jpeg(10)
    for make in (lambda: PurifiedDataset([sample] * 3, jpeg), lambda: precompute([sample] * 3, jpeg, tmp_path / "c")):
        with pytest.raises(InputError, match=f"holds one image. Got images in {where} too"):
            make()
    named = PurifiedDataset([sample] * 3, jpeg, image_key="image" if isinstance(sample, dict) else 0)
    assert len(named) == 3
    assert f"The images in {where} of each sample are not purified" in caplog.text


@pytest.mark.parametrize(
    "beside",
    [
        3,
        GREY,
        Image.new("P", (8, 8)),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 3), np.int64),
        torch.zeros(8, 8),
        torch.zeros(5),
        tv_tensors.Mask(torch.zeros(3, 8, 8, dtype=torch.uint8)),
        torch.zeros(20, 8, 8),
        {"boxes": torch.zeros(3, 4), "names": ["a", "b"]},
    ],
    ids=lambda value: type(value).__name__,
)
def test_masks_maps_and_labels_pass(beside, caplog):
    image, same = PurifiedDataset([(RGB, beside)], recipes.jpeg(10))[0]
    assert isinstance(image, Image.Image)
    assert same is beside
    assert not caplog.text


PIXELS, BLOB = torch.rand(3, 8, 8), torch.ones(21, 8, 8).tril()
LEVELS = (PIXELS * 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("image", "beside"),
    [
        (PIXELS, torch.stack([PIXELS, PIXELS])),
        (PIXELS, torch.cat([PIXELS, PIXELS])),
        (PIXELS, PIXELS[:1]),
        (PIXELS[:1], torch.stack([PIXELS[:1]] * 5)),
        (LEVELS, torch.cat([LEVELS] * 3)),
        (LEVELS, [1, "a", torch.stack([PIXELS, PIXELS])]),
        (RGB, torch.stack([PIXELS, PIXELS])),
        (LEVELS.permute(1, 2, 0).numpy(), torch.stack([LEVELS] * 2).permute(0, 2, 3, 1).numpy()),
    ],
)
def test_views_beside_the_image_do_not_pass(image, beside):
    with pytest.raises(InputError, match="Item 0 of the dataset: A sample holds one image"):
        PurifiedDataset([(image, beside, 0)], recipes.jpeg(10))


@pytest.mark.parametrize(
    "beside",
    [
        BLOB[:1],
        torch.zeros(1, 8, 8),
        BLOB[:3],
        BLOB[:6],
        BLOB[:6] * 255,
        BLOB[:17] * 0.7,
        torch.rand(21, 8, 8).softmax(0),
        torch.rand(1, 8, 8) * 40,
        torch.rand(5, 8),
        torch.rand(8, 8),
        torch.rand(6, 4, 4),
        torch.rand(2, 3, 4, 4),
        LEVELS[:1],
        {"boxes": torch.rand(3, 4), "keypoints": torch.rand(2, 17, 3), "masks": BLOB[:4].to(torch.uint8)},
    ],
)
def test_masks_and_maps_of_the_size_of_the_image_pass(beside):
    assert PurifiedDataset([(PIXELS, beside)], recipes.jpeg(10))[0][1] is beside


def test_every_sample_is_looked_at_for_a_second_image(tmp_path):
    data = [(PIXELS, i) for i in range(200)]
    data[103] = (PIXELS, PIXELS)  # which is none of the 64 that are looked at first
    live, jpeg = PurifiedDataset(data, recipes.jpeg(10)), recipes.jpeg(10)
    assert live[100][1] == 100
    filled = PurifiedDataset(data, jpeg, cache=tmp_path / "b", missing="purify")
    for read in (
        lambda: live[103],
        lambda: live.__getitems__([3, 103]),
        lambda: filled[103],
        lambda: PurifiedDataset(data, jpeg, cache=tmp_path / "a"),
        lambda: precompute(data, jpeg, tmp_path / "c"),
    ):
        with pytest.raises(InputError, match="Item 103 of the dataset: A sample holds one image"):
            read()


def test_bad_arguments(images, purifier):
    source = PictureDataset(images)
    for arguments, message in [
        ({"purifier": "eclipse"}, "A str is no purifier"),
        ({"purifier": purifier, "compensate": 0.4}, "Got float"),
        ({"purifier": purifier, "batch_size": 0}, "batch_size"),
        ({"purifier": purifier, "seed": 1.5}, r"seed must be an integer\. Got 1\.5"),
        ({"purifier": purifier, "device": "gpu"}, "Got 'gpu'"),
        ({"purifier": DenoiseOnce(tiny_denoiser(channels=1), 0.1)}, "colour"),
    ]:
        with pytest.raises(InputError, match=message):
            PurifiedDataset(source, **arguments)


def test_a_device_that_is_not_there(images, purifier):
    with pytest.raises(InputError, match="a device of this machine"):
        PurifiedDataset(PictureDataset(images), purifier, device="cuda:99")


def test_an_image_that_turns_bad_later_is_refused(purifier, images):
    """Beyond the items looked at when wrapping: every image is checked on its way."""
    data = [x.float() / 255 for x in random_images(200, 8)]
    data[100] = data[100] * 3 - 1
    dataset = PurifiedDataset(Tensors(lambda i: (data[i], i), 200), purifier)
    with pytest.raises(InputError, match=r"Item 100 .*lies in \[0, 1\][\s\S]*transform="):
        dataset[100]


def test_compensation_as_a_stage_is_one_fixed_draw(images):
    dataset = PurifiedDataset(PictureDataset(images, v1.PILToTensor()), Chain(Jpeg(50), Compensation()))
    first = dataset[0][0]
    dataset.set_epoch(1)
    assert torch.equal(dataset[0][0], first)
