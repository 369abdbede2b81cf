"""The torchvision transforms in the pipelines people have."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.datasets import FakeData, ImageFolder, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from purifyloader import PurifiedDataset, recipes
from purifyloader.core import corruptions, noise
from purifyloader.errors import InputError, PurifyError
from purifyloader.transforms import Compensate, Purify, Squeeze, functional
from tests.conftest import PictureDataset, random_images, tiny_denoiser, tiny_energy
from tests.counting import Counting, Numbered, Seeds, numbered, read


@pytest.fixture
def batch() -> torch.Tensor:
    return random_images(64, 8).float() / 255


def is_grey(x: torch.Tensor) -> torch.Tensor:
    return ((x - x.mean(1, keepdim=True)).abs() < 1e-5).all(-1).all(-1).all(-1)


def test_each_image_of_a_batch_has_its_own_draw(batch):
    torch.manual_seed(0)
    grey = is_grey(Compensate(p=0.4, sigma=0)(batch))
    assert 10 < int(grey.sum()) < 42  # 64 draws of 0.4: 25.6 +- 4 standard deviations
    same = batch[:1].expand(64, -1, -1, -1)
    out = Compensate(p=0, sigma=0.05)(same)
    assert len({row.numpy().tobytes() for row in out}) == 64


def test_fresh_at_each_call_and_reproducible_by_torchs_seed(batch):
    transform = Compensate()
    torch.manual_seed(3)
    first, second = transform(batch), transform(batch)
    torch.manual_seed(3)
    assert torch.equal(transform(batch), first)
    assert not torch.equal(first, second)


def test_apply_is_a_function_of_image_and_key(batch):
    keys = noise.image_keys(0, 5, range(64))
    out = Compensate(0.4, 0.05).apply(batch, keys)
    assert torch.equal(out, corruptions.compensate(batch, keys, 0.4, 0.05))
    assert torch.equal(out, functional.compensate(batch, keys))
    assert torch.equal(Compensate().apply(batch[7], keys[7:8]), out[7])
    assert torch.equal(Compensate().apply(batch.reshape(4, 16, 3, 8, 8), keys).reshape(64, 3, 8, 8), out)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_pil(mode):
    image = Image.fromarray(random_images(1, 8)[0].permute(1, 2, 0).numpy()).convert(mode)
    out = Compensate(p=1)(image)
    assert isinstance(out, Image.Image)
    assert out.mode == mode
    assert out.size == image.size
    if mode in ("LA", "RGBA"):
        assert np.array_equal(np.asarray(out)[..., -1], np.asarray(image)[..., -1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8), (2, 4, 3, 8, 8), (0, 3, 8, 8), (1, 8, 8)])
def test_tensors_keep_type_and_shape(dtype, shape):
    x = torch.zeros(shape).to(dtype)
    out = Compensate()(x)
    assert out.dtype == dtype
    assert out.shape == shape
    assert type(out) is torch.Tensor


def test_tv_tensors_and_targets():
    image = tv_tensors.Image(random_images(1, 8)[0])
    video = tv_tensors.Video(random_images(5, 8))
    mask = tv_tensors.Mask(torch.ones(8, 8))
    boxes = tv_tensors.BoundingBoxes(torch.tensor([[0, 0, 4, 4]]), format="XYXY", canvas_size=(8, 8))
    sample = {"image": image, "video": video, "mask": mask, "boxes": boxes, "label": torch.tensor(3), "name": "x"}
    out = Compensate()(sample)
    assert type(out["image"]) is tv_tensors.Image
    assert not torch.equal(out["image"], image)
    assert type(out["video"]) is tv_tensors.Video
    for key in ("mask", "boxes", "label", "name"):
        assert out[key] is sample[key]


@pytest.mark.parametrize("compose", [v1.Compose, v2.Compose])
def test_in_a_pipeline(compose):
    pipeline = compose(
        [v1.RandomCrop(8, padding=1), v1.ToTensor(), Compensate(p=1, sigma=0), v1.Normalize([0.5] * 3, [0.5] * 3)]
    )
    image = Image.fromarray(random_images(1, 8)[0].permute(1, 2, 0).numpy())
    assert bool(is_grey(pipeline(image)[None]))


def test_pickles():
    transform = pickle.loads(pickle.dumps(Compensate(0.3, 0.02)))
    assert (transform.p, transform.sigma) == (0.3, 0.02)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3, 8, 8) - 1, r"lies in \[0, 1\]"),
        (torch.zeros(3, 8, 8) + 255, "divide 0-255"),
        (torch.full((3, 8, 8), torch.inf), "finite"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "int64"),
        (torch.zeros(8, 8), r"\(\.\.\., C, H, W\)"),
        (torch.zeros(8, 8, 3), r"\(\.\.\., C, H, W\)"),
        (Image.new("CMYK", (8, 8)), "CMYK"),
    ],
)
def test_bad_images(value, message):
    with pytest.raises(InputError, match=message):
        Compensate()(value)


def test_bad_arguments():
    with pytest.raises(InputError, match="probability"):
        Compensate(p=-0.1)
    with pytest.raises(InputError, match="standard deviation"):
        Compensate(sigma=12.75)
    with pytest.raises(InputError, match="Got str"):
        Compensate().apply("image", noise.image_keys(0, 0, 0))


# -- Purify and Squeeze ------------------------------------------------------------------------------


def once(**options) -> Purify:
    return Purify(recipes.denoise_once(tiny_denoiser(), sigma=0.1, **options))


SAMPLES = {
    "pil": lambda x: Image.fromarray(x.permute(1, 2, 0).numpy()),
    "uint8": lambda x: x,
    "float": lambda x: x.float() / 255,
    "half": lambda x: (x.float() / 255).half(),
    "image": tv_tensors.Image,
    "float image": lambda x: tv_tensors.Image(x.float() / 255),
    "video": lambda x: tv_tensors.Video(x.expand(4, -1, -1, -1)),
    "batch": lambda x: x.expand(5, -1, -1, -1),
    "batch of videos": lambda x: tv_tensors.Video(x.expand(2, 4, -1, -1, -1)),
    "no images": lambda x: x.expand(0, -1, -1, -1),
}
TRANSFORMS = {
    "purify": once,
    "compensate": Compensate,
    "jpeg": lambda: Squeeze("jpeg", quality=20),
    "coin": lambda: Squeeze("coin"),
}


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("held", SAMPLES.values(), ids=SAMPLES)
def test_the_type_stays(make, held):
    sample = held(random_images(1, 8)[0])
    out = make()(sample)
    assert type(out) is type(sample)
    if isinstance(sample, torch.Tensor):
        assert (out.dtype, out.shape) == (sample.dtype, sample.shape)
        assert not sample.numel() or not torch.equal(out.as_subclass(torch.Tensor), sample.as_subclass(torch.Tensor))
    else:
        assert (out.mode, out.size) == (sample.mode, sample.size)
        assert out.tobytes() != sample.tobytes()


@pytest.mark.parametrize("container", [v1.Compose, v2.Compose])
def test_each_image_once_through_every_container(container):
    transform = container([Purify(Counting()), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(Numbered(30, transform), 8, num_workers=workers)
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert read(images) == (labels.tolist(), [1] * 30)
        assert labels.tolist() == list(range(30))
    batch = numbered(30)
    for sample in (batch, batch.float() / 255, tv_tensors.Image(batch), tv_tensors.Video(batch[None])):
        out = Purify(Counting())(sample).as_subclass(torch.Tensor).reshape(batch.shape)
        assert read(out) == (list(range(30)), [1] * 30)
    assert read(Purify(Counting())(batch[7])[None]) == ([7], [1])


def test_draws_are_torchs_and_one_an_image():
    x = random_images(40, 8)
    torch.manual_seed(0)
    first, second = Purify(Seeds())(x), Purify(Seeds())(x)
    torch.manual_seed(0)
    assert torch.equal(Purify(Seeds())(x), first)
    assert not torch.equal(first, second)
    assert len({row.numpy().tobytes() for row in first}) == 40
    video = Purify(Seeds())(tv_tensors.Video(x))
    assert len({row.numpy().tobytes() for row in video}) == 40


def test_what_is_no_image_is_left_alone():
    image = tv_tensors.Image(random_images(1, 8)[0])
    sample = {
        "image": image,
        "mask": tv_tensors.Mask(torch.ones(8, 8, dtype=torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes(torch.tensor([[0, 0, 4, 4]]), format="XYXY", canvas_size=(8, 8)),
        "label": 3,
        "other": torch.rand(3, 8, 8),
        "text": "a cat",
    }
    for make in TRANSFORMS.values():
        out = make()(sample)
        assert all(out[key] is sample[key] for key in sample if key != "image")
        assert type(out["image"]) is tv_tensors.Image
    resized = Purify(recipes.denoise_once(tiny_denoiser(), sigma=0.1, resize=4, crop=4))
    assert resized(image).shape == (3, 4, 4)
    assert resized(Image.new("RGB", (9, 8))).size == (4, 4)
    with pytest.raises(InputError, match=r"without masks, boxes and keypoints\. Got Mask"):
        resized(sample)


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(
    "sample",
    [
        {"label": torch.tensor(3), "image": torch.rand(3, 8, 8)},
        {"label": torch.rand(10), "image": torch.rand(3, 8, 8)},
        (torch.rand(3, 8, 8), torch.rand(1, 8, 8)),
        (torch.rand(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8)),
    ],
)
def test_what_may_be_the_image_is_not_guessed(make, sample):
    with pytest.raises(InputError, match=r"takes one plain tensor.*tv_tensors\.Image\(tensor\)"):
        make()(sample)


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(
    ("sample", "got"),
    [
        ((np.zeros((8, 8, 3), np.uint8), 3), "Got ndarray, int"),
        ({"image": np.zeros((8, 8, 3), np.float32)}, "Got ndarray"),
        ((3, "text"), "Got int, str"),
        ({}, "Got an empty sample"),
    ],
)
def test_no_image_passes_untouched(make, sample, got):
    with pytest.raises(InputError, match=rf"takes samples with an image.*{got}: put torchvision"):
        make()(sample)


def test_a_plain_tensor_that_can_only_be_the_image():
    image, label = torch.rand(3, 8, 8), torch.tensor(3)
    out = once()(image, label, torch.rand(5))
    assert out[1] is label
    assert not torch.equal(out[0], image)
    assert once()({"image": image, "label": label})["label"] is label


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_modes_and_grey_tensors(mode):
    image = Image.fromarray(random_images(1, 8)[0].permute(1, 2, 0).numpy()).convert(mode)
    out = once()(image)
    assert (out.mode, out.size) == (mode, image.size)
    if "A" in mode:
        assert out.getchannel("A").tobytes() == image.getchannel("A").tobytes()
    grey = random_images(4, 8, channels=1)
    assert once()(grey).shape == grey.shape


def test_the_purifier_is_nobodys_business():
    transform = once()
    before = {name: value.clone() for name, value in transform.purifier.state_dict().items()}
    assert list(transform.parameters()) == []
    assert transform.state_dict() == {}
    transform.train().half()
    assert not transform.purifier.training
    for name, value in transform.purifier.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    x = random_images(4, 8)
    for other in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        torch.manual_seed(0)
        expected = transform(x)
        torch.manual_seed(0)
        assert torch.equal(other(x), expected)
    assert "denoise-once" in repr(transform)
    assert repr(Squeeze("jpeg", quality=30)) == "Squeeze('jpeg', quality=30)"


def test_as_the_transform_of_torchvisions_datasets(tmp_path):
    data = FakeData(12, (3, 8, 8), transform=v2.Compose([once(), v2.ToImage()]))
    assert data[0][0].shape == (3, 8, 8)
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.fromarray(random_images(1, 8, seed=i)[0].permute(1, 2, 0).numpy()).save(tmp_path / f"a/{i}.png")
    raw = ImageFolder(tmp_path)
    wrapped = wrap_dataset_for_transforms_v2(
        ImageFolder(tmp_path, transform=v2.Compose([Squeeze("bit_depth", bits=1)]))
    )
    for (image, label), (before, same) in zip(wrapped, raw, strict=True):
        assert set(np.unique(np.asarray(image))) <= {0, 128}
        assert label == same
        assert image.size == before.size


def test_a_network_for_single_images_is_warned_of_once(caplog):
    transform = once()
    transform(random_images(2, 8))
    Squeeze("jpeg")(random_images(1, 8)[0])
    assert not caplog.text
    for _ in range(2):
        transform(random_images(1, 8)[0])
    assert caplog.text.count("as much as for a whole batch") == 1


def test_never_twice_in_a_dataset():
    transform = v2.Compose([Purify(Counting()), v2.ToImage()])
    for dataset in (
        PictureDataset(numbered(4), transform),
        torch.utils.data.Subset(PictureDataset(numbered(4), transform), [1]),
    ):
        with pytest.raises(InputError, match="purified already, by the Purify"):
            PurifiedDataset(dataset, Counting())
    with pytest.raises(InputError, match="purified already, by the Purify"):
        PurifiedDataset(PictureDataset(numbered(4)), Counting(), transform=Purify(Counting()))


def test_what_purify_refuses():
    no_plan = recipes.puregen_filt(0.5, energy=tiny_energy(), model=tiny_denoiser(), ebm_steps=1, ddpm_steps=0)
    for make, message in {
        lambda: Purify("eclipse"): "A str is no purifier",
        lambda: Purify(no_plan): "needs a plan",
        lambda: Squeeze("blur"): "one of jpeg, grayscale, bit_depth, coin. Got 'blur'",
        lambda: Squeeze("jpeg", bits=1): "options of 'jpeg'",
        lambda: Squeeze("jpeg", quality=0): "quality",
    }.items():
        with pytest.raises(PurifyError, match=message):
            make()
    for value, message in (
        (torch.zeros(3, 8, 8) - 1, r"lies in \[0, 1\]"),
        (torch.full((3, 8, 8), torch.nan), "finite"),
        (torch.zeros(4, 8, 8), r"\(\.\.\., C, H, W\)"),
        (Image.new("CMYK", (8, 8)), "CMYK"),
    ):
        with pytest.raises(InputError, match=message):
            once()(value)
