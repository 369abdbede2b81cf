"""`Compensate` in the pipelines people have."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

from purifyloader import corruptions, noise
from purifyloader.errors import InputError
from purifyloader.transforms import Compensate, functional
from tests.conftest import random_images


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
