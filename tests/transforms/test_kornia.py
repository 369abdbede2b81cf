"""The kornia augmentations, alone and inside kornia's containers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import kornia.augmentation as K
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from purifyloader import PurifiedLoader, recipes
from purifyloader.errors import InputError
from purifyloader.transforms import Compensate, Purify, RandomCompensate, RandomPurify, RandomSqueeze, Squeeze
from tests.conftest import random_images, tiny_denoiser, tiny_energy
from tests.counting import Counting, Seeds, numbered, read


def images(count: int = 6, size: int = 8) -> Tensor:
    return random_images(count, size).float() / 255


def purify(**options: Any) -> RandomPurify:
    return RandomPurify(recipes.denoise_once(tiny_denoiser(), sigma=0.1), **options)


AUGMENTATIONS = {
    "purify": purify,
    "half": lambda **options: purify(p=0.5, **options),
    "compensate": RandomCompensate,
    "jpeg": lambda **options: RandomSqueeze("jpeg", quality=10, **options),
    "coin": lambda **options: RandomSqueeze("coin", p=0.5, alpha=1, **options),
}
each_augmentation = pytest.mark.parametrize("make", AUGMENTATIONS.values(), ids=AUGMENTATIONS)


@pytest.mark.parametrize("p", [1.0, 0.5, 0.0])
def test_each_chosen_image_once(p: float) -> None:
    torch.manual_seed(0)
    aug = RandomPurify(Counting(), p=p)
    numbers, times = read(aug(numbered(200).float() / 255))
    assert numbers == list(range(200))
    assert times == (aug._params["batch_prob"] > 0.5).int().tolist()
    assert {1.0: 200, 0.0: 0}.get(p, sum(times)) == sum(times)
    if p == 0.5:
        assert 70 < sum(times) < 130  # 100 +- 4 standard deviations


def test_only_the_chosen_images_go_through_the_network() -> None:
    seen = []

    class Watching(Counting):
        kind = "test-watching"

        def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
            seen.append(len(x_BCHW))
            return super().run(x_BCHW, seeds_B)

    torch.manual_seed(0)
    aug = RandomPurify(Watching(), p=0.25)
    aug(numbered(100).float() / 255)
    assert seen == [int(aug._params["batch_prob"].sum())]
    RandomPurify(Watching(), p=0.0)(numbered(100).float() / 255)
    assert len(seen) == 1


@each_augmentation
def test_replay(make: Any) -> None:
    aug, x = make(), images()
    first = aug(x)
    assert torch.equal(aug(x, params=aug._params), first)
    params = pickle.loads(pickle.dumps(aug._params))
    aug(x)
    assert torch.equal(make()(x, params=params), first)


def test_draws_are_fresh_torchs_and_one_an_image() -> None:
    aug, x = RandomPurify(Seeds()), images(50)
    torch.manual_seed(0)
    first, second = aug(x), aug(x)
    torch.manual_seed(0)
    assert torch.equal(aug(x), first)
    assert not torch.equal(first, second)
    assert len({row.numpy().tobytes() for row in first}) == 50
    same = RandomPurify(Seeds(), same_on_batch=True)(x)
    assert len({row.numpy().tobytes() for row in same}) == 1


def test_compensation_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    aug, x = RandomCompensate(0.4, 0.05), images(400, 8)
    out = aug(x)
    grey, noise = aug._params["grey"], aug._params["noise"]
    assert 110 < int(grey.sum()) < 210  # 160 +- 5 standard deviations
    luma = (torch.tensor([0.2989, 0.587, 0.114])[:, None, None] * x).sum(1, keepdim=True)
    expected = (torch.where(grey[:, None, None, None], luma, x) + 0.05 * noise).clamp(0, 1)
    assert (out - expected).abs().max() < 1e-6
    assert abs(float(noise.std()) - 1) < 0.01
    shared = RandomCompensate(0.0, 0.05, same_on_batch=True)
    difference = shared(torch.full((5, 3, 8, 8), 0.5))
    assert torch.equal(difference, difference[:1].expand_as(difference))


def test_the_same_compensation_as_torchvisions() -> None:
    x = images(64)
    torch.manual_seed(1)
    ours = RandomCompensate(0.4, 0.05)(x)
    torch.manual_seed(1)
    assert torch.equal(Compensate(0.4, 0.05)(x), ours)


@each_augmentation
def test_inside_augmentation_sequential(make: Any) -> None:
    torch.manual_seed(0)
    x, mask = images(), (images() > 0.5).float()
    boxes = torch.tensor([[[1.0, 1, 6, 6]]]).expand(6, 1, 4).clone()
    points, label = torch.rand(6, 2, 2), torch.arange(6)
    seq = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=1.0), make(), data_keys=["input", "mask", "bbox_xyxy", "keypoints", "class"]
    )
    flip = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=1.0), data_keys=["input", "mask", "bbox_xyxy", "keypoints", "class"]
    )
    out, expected = seq(x, mask, boxes, points, label), flip(x, mask, boxes, points, label)
    for ours, plain in zip(out[1:], expected[1:], strict=True):
        assert torch.equal(ours, plain)
    again = seq(x, mask, boxes, points, label, params=seq._params)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    back = seq.inverse(*out)
    assert torch.equal(back[1], mask)
    assert (back[2] - boxes).abs().max() < 1e-4


@pytest.mark.parametrize("p", [1.0, 0.5])
def test_nothing_is_lost_in_containers(p: float) -> None:
    torch.manual_seed(0)
    x = numbered(24, 16).float() / 255
    single = RandomPurify(Counting(), p=p)
    for container in (
        K.ImageSequential(single),
        K.AugmentationSequential(K.ImageSequential(single), data_keys=["input"]),
        nn.Sequential(single),
    ):
        numbers, times = read(container(x))
        assert numbers == list(range(24))
        assert times == (single._params["batch_prob"] > 0.5).int().tolist()
    numbers, times = read(K.ImageSequential(single, RandomPurify(Counting()), random_apply=1)(x))
    assert numbers == list(range(24))
    assert set(times) <= {0, 1}


def test_video() -> None:
    video = numbered(12, 8).reshape(3, 4, 3, 8, 8).permute(0, 2, 1, 3, 4).float() / 255  # (B, C, T, H, W)
    for same in (True, False):
        seq = K.VideoSequential(RandomPurify(Counting()), data_format="BCTHW", same_on_frame=same)
        out = seq(video)
        numbers, times = read(out.permute(0, 2, 1, 3, 4).reshape(12, 3, 8, 8))
        assert (numbers, set(times)) == (list(range(12)), {1})
        draws = K.VideoSequential(RandomPurify(Seeds()), data_format="BCTHW", same_on_frame=same)
        frames = draws(video).permute(0, 2, 1, 3, 4).reshape(12, 3, 8, 8)
        assert len({x.numpy().tobytes() for x in frames}) == (3 if same else 12)
        assert torch.equal(draws(video, params=draws._params), draws(video, params=draws._params))
        for noisy in (RandomCompensate(), purify(p=0.5), RandomSqueeze("coin")):
            seq = K.VideoSequential(noisy, data_format="BCTHW", same_on_frame=same)
            first = seq(video)
            assert first.shape == video.shape
            assert torch.equal(seq(video, params=seq._params), first)


@pytest.mark.parametrize("patchwise", [False, True])
def test_patches(patchwise: bool) -> None:
    x = numbered(4, 16).float() / 255
    parts = [RandomPurify(Counting()) for _ in range(4)]
    seq = K.PatchSequential(*parts, grid_size=(2, 2), patchwise_apply=patchwise, same_on_batch=False)
    assert read(seq(x)) == ([0, 1, 2, 3], [1 if patchwise else 4] * 4)
    noisy = K.PatchSequential(RandomCompensate(), purify(), grid_size=(2, 2), patchwise_apply=False)
    first = noisy(x)
    assert first.shape == x.shape
    assert torch.equal(noisy(x, params=noisy._params), first)


@each_augmentation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_types_and_shapes(make: Any, dtype: torch.dtype) -> None:
    x = images().to(dtype)
    out = make()(x)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert make()(x[0]).shape == (1, 3, 8, 8)
    assert make(keepdim=True)(x[0]).shape == (3, 8, 8)
    assert make()(x[:0]).shape == (0, 3, 8, 8)
    assert make()(x[:, :1]).shape == (6, 1, 8, 8)


@each_augmentation
def test_under_autocast(make: Any) -> None:
    x = images()
    aug = make()
    first = aug(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(aug(x, params=aug._params), first)


def test_the_purifier_is_nobodys_business() -> None:
    purifier = recipes.denoise_once(tiny_denoiser(), sigma=0.1)
    before = copy.deepcopy(purifier.state_dict())
    x = images()
    model = nn.Sequential(K.AugmentationSequential(RandomPurify(purifier), data_keys=["input"]), nn.Conv2d(3, 4, 3))
    aug = model[0][0]
    out = aug(x)
    assert len(list(model.parameters())) == 2  # those of the convolution
    assert sorted(model.state_dict()) == ["1.bias", "1.weight"]
    model.train()
    model.half()
    model.requires_grad_(True)
    model.zero_grad()
    assert not purifier.training
    assert not any(p.requires_grad for p in purifier.parameters())
    for name, value in purifier.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    assert torch.equal(aug(x, params=aug._params), out)
    model.to("meta")
    assert next(purifier.parameters()).device.type == "meta"  # but it moves with what holds it


@each_augmentation
def test_copies_and_pickles(make: Any) -> None:
    aug, x = make(), images()
    out = aug(x)
    for other in (copy.deepcopy(aug), pickle.loads(pickle.dumps(aug))):
        assert torch.equal(other(x, params=aug._params), out)


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (2, 4, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0), (0, 3, 0, 8)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Squeeze("coin"),
        lambda: Purify(recipes.jpeg(10)),
        Compensate,
        lambda: RandomSqueeze("bit_depth"),
        lambda: RandomSqueeze("bit_depth", p=0.0),
        lambda: RandomSqueeze("coin", p=0.5),
        lambda: RandomPurify(recipes.jpeg(10)),
        RandomCompensate,
    ],
)
def test_all_transforms_refuse_the_same_channels_and_no_pixels(make: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="of 1 or 3 channels" if shape[1] != 3 else "at least one pixel"):
        make()(torch.rand(shape))


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="A str is no purifier"):
        RandomPurify("eclipse")
    with pytest.raises(InputError, match="needs a plan"):
        RandomPurify(recipes.puregen_filt(0.5, energy=tiny_energy(), model=tiny_denoiser(), ebm_steps=1, ddpm_steps=0))
    with pytest.raises(InputError, match=r"lies in \[0, 1\]"):
        purify()(images() * 2 - 1)
    for bad, text in (
        (images() * 2 - 1, r"lies in \[0, 1\]"),
        (images() * 255, "divide 0-255"),
        (images() * torch.nan, "NaN"),
        (torch.rand(2, 4, 8, 8), r"1 or 3 channels\. Got \(2, 4, 8, 8\)"),
    ):
        with pytest.raises(InputError, match=text):
            RandomCompensate()(bad)
    with pytest.raises(TypeError):  # kornia's own
        purify()(random_images(2, 8))
    with pytest.raises(InputError, match="probability"):
        RandomCompensate(p=1.4)
    with pytest.raises(InputError, match="one of jpeg, grayscale, bit_depth, coin"):
        RandomSqueeze("blur")
    with pytest.raises(InputError, match=r"options of 'jpeg'.*bits"):
        RandomSqueeze("jpeg", bits=2)
    with pytest.raises(InputError, match="changes the size"):
        RandomPurify(recipes.denoise_once(tiny_denoiser(), sigma=0.1, resize=8, crop=8))(images(2, 16))


@pytest.mark.parametrize("blur", [K.RandomGaussianBlur((3, 3), (0.1, 2.0), p=1.0), v2.GaussianBlur(3, (0.1, 2.0))])
def test_images_that_ordinary_augmentations_let_overshoot(blur) -> None:
    """White stays white but for the last bits of a float: a third of such batches were refused, in mid-training."""
    torch.manual_seed(3)
    overshot = 0
    for _ in range(60):
        x = blur(torch.cat([torch.ones(2, 3, 8, 8), torch.rand(2, 3, 8, 8)]))
        overshot += bool(x.max() > 1)
        for step in (RandomCompensate(0.0, 0.0), RandomPurify(recipes.bit_depth(8)), Compensate(0.0, 0.0)):
            assert torch.allclose(step(x), x.clamp(0, 1), atol=1 / 255)
        loader = PurifiedLoader([(x, torch.zeros(4))], None, compensate=Compensate(0.0, 0.0))
        assert torch.equal(next(iter(loader))[0], x.clamp(0, 1))
    assert overshot > 5


def test_what_they_say() -> None:
    assert "p=0.4" in repr(RandomCompensate(0.4)) or "grayscale_p=0.4" in repr(RandomCompensate(0.4))
    assert "sigma=0.05" in repr(RandomCompensate())
    assert "p=0.5" in repr(purify(p=0.5))
    assert "denoise-once" in repr(purify())
    assert "jpeg" in repr(RandomSqueeze("jpeg", quality=30))
