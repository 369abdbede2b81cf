"""PurifiedDataset: what comes out, from any dataset people have, in any loader they use."""

from __future__ import annotations

import copy
import logging
import pickle
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, random_split
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from purifyloader import PurifiedDataset, PurifyError, noise
from purifyloader.cache import CacheReader
from purifyloader.errors import CacheError, InputError
from purifyloader.images import quantize
from purifyloader.purifiers import Chain, Compensation, DenoiseOnce, Jpeg, Purifier
from purifyloader.transforms import Compensate
from tests.conftest import PictureDataset, random_images, tiny_denoiser

COUNT = 20


@pytest.fixture(scope="module")
def purifier() -> Purifier:
    return DenoiseOnce(tiny_denoiser(), 0.1, compute_batch=8)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return random_images(COUNT)


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
    with pytest.raises(InputError, match="one transform"):
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


def test_a_transform_set_later_is_refused(purifier, images):
    with pytest.raises(InputError, match="before wrapping"):
        PurifiedDataset(PictureDataset(images), purifier).transform = v1.ToTensor()


def test_compensation_inside_a_purified_dataset_is_refused(purifier, images):
    inner = PurifiedDataset(PictureDataset(images), purifier, Compensate())
    with pytest.raises(InputError, match="after all purification"):
        PurifiedDataset(inner, purifier)
    PurifiedDataset(PurifiedDataset(PictureDataset(images), purifier), purifier)[0]


# -- loaders -----------------------------------------------------------------------------------------


def collect(loader) -> Tensor:
    return torch.cat([x for x, _ in loader])


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
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
    from purifyloader import dataset as module

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(module, "get_worker_info", lambda: object())
    with pytest.raises(PurifyError, match=r"cache=[\s\S]*spawn"):
        module._check_worker(torch.device("cuda:0"))
    module._check_worker(torch.device("cpu"))


# -- cache -------------------------------------------------------------------------------------------


def test_cached_pixels_equal_uncached_ones(purifier, images, expected, tmp_path):
    for _ in range(2):  # made, then read
        dataset = PurifiedDataset(PictureDataset(images), purifier, cache=tmp_path, progress=False, batch_size=7)
        got = dataset.__getitems__(range(COUNT))
        assert all(torch.equal(as_tensor(image), expected[i]) for i, (image, _) in enumerate(got))


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
        lambda images: {"dataset": PictureDataset(images, target_transform=lambda t: t + 1)},
    ],
    ids=["purifier", "seed", "one-image", "targets"],
)
def test_a_cache_of_something_else_is_refused(images, tmp_path, change):
    arguments = {"dataset": PictureDataset(images), "purifier": Jpeg(10), "seed": 0}
    PurifiedDataset(**arguments, cache=tmp_path, progress=False)
    with pytest.raises(CacheError, match="differ"):
        PurifiedDataset(**{**arguments, **change(images)}, cache=tmp_path, progress=False)
    CacheReader(tmp_path).verify()


def test_moving_the_cache_and_the_transform_do_not_matter(images, tmp_path):
    PurifiedDataset(PictureDataset(images), Jpeg(10), cache=tmp_path / "a", progress=False)
    (tmp_path / "a").rename(tmp_path / "b")
    source = PictureDataset(images, v1.Compose([v1.RandomCrop(8), v1.ToTensor()]))
    image, _ = PurifiedDataset(source, Jpeg(10), cache=tmp_path / "b", progress=False)[0]
    assert image.shape == (3, 8, 8)


def test_a_bad_image_is_named_before_anything_is_purified(tmp_path):
    data = [Image.new("P" if i == 151 else "RGB", (8, 8)) for i in range(300)]
    with pytest.raises(InputError, match="Item 151 of the dataset"):
        PurifiedDataset(Tensors(lambda i: (data[i], i), 300), Jpeg(), cache=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_odd_tensors_can_be_cached(tmp_path, images):
    x = images.float() / 255
    for i, convert in enumerate((lambda t: t.requires_grad_(), lambda t: t.bfloat16())):
        dataset = Tensors(lambda j, convert=convert: (convert(x[j].clone()), j))
        PurifiedDataset(dataset, Jpeg(), cache=tmp_path / str(i), seed=np.int64(3), progress=False)[0]


def test_images_of_two_sizes_cannot_be_cached(tmp_path):
    data = [random_images(1, s)[0] for s in (16, 17)]
    with pytest.raises(InputError, match=r"one size\. Got .*item 1"):
        PurifiedDataset(Tensors(lambda i: (data[i], i), 2), Jpeg(), cache=tmp_path, progress=False)
    assert not (tmp_path / "index.json").exists()


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


def test_bad_arguments(images, purifier):
    source = PictureDataset(images)
    for arguments, message in [
        ({"purifier": "eclipse"}, "Got str"),
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


def test_kill_while_caching_then_go_on(images, tmp_path: Path):
    """A real process, really killed; the cache made afterwards is the one made in one go."""
    import os
    import signal
    import subprocess
    import sys
    import time

    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "from tests.conftest import PictureDataset, random_images\n"
        "from purifyloader import PurifiedDataset\n"
        "from purifyloader.purifiers import Jpeg\n"
        "class Slow(Jpeg):\n"
        "    def run(self, x, seeds):\n"
        "        time.sleep(float(sys.argv[2]))\n"
        "        return super().run(x, seeds)\n"
        "PurifiedDataset(PictureDataset(random_images(3000, 8)), Slow(10), cache=sys.argv[1], progress=False)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}

    def start(folder: Path, pause: float) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, script, folder, str(pause)], env=environment)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed, 0.4)
    deadline = time.monotonic() + 60
    while not list(killed.glob("shard-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(killed.glob("shard-*.safetensors"))
    assert not (killed / "index.json").exists()
    for folder in (killed, whole):
        assert start(folder, 0).wait() == 0
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (killed / path.name).read_bytes()
