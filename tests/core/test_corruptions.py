"""Corruptions as pure functions: Eq. 13 recomputed, distributions, JPEG."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.corruptions import compensate, jpeg
from purifyloader.errors import InputError
from tests.conftest import random_images

COUNT = 12
KEYS = noise.image_keys(3, 1, range(COUNT))


def x(channels: int = 3, count: int = COUNT, size: int = 8) -> Tensor:
    return random_images(count, size, channels=channels).float() / 255


# -- ECLIPSE's compensation -------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "sigma"), [(0.4, 0.05), (0.0, 0.05), (1.0, 0.05), (0.5, 0.0), (0.4, 1.0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_compensate_is_eq_13(p, sigma, channels):
    """C(x; p, sigma): grayscale with probability p, then noise, then clamp."""
    images = x(channels)
    got = compensate(images, KEYS, p, sigma)
    grey = 0
    for i in range(COUNT):
        image = images[i].double().numpy()
        if channels == 3 and float(noise.uniform(KEYS[i : i + 1], (1,), step=0)) < p:
            red, green, blue = image
            image = np.broadcast_to(0.2989 * red + 0.587 * green + 0.114 * blue, (3, 8, 8))
            grey += 1
        z = noise.normal(KEYS[i : i + 1], (channels, 8, 8), step=1)[0].double().numpy()
        np.testing.assert_allclose(got[i].numpy(), (image + sigma * z).clip(0, 1), atol=1e-6)
    assert channels == 1 or {0.0: 0, 1.0: COUNT}.get(p, 1) <= grey <= {0.0: 0, 1.0: COUNT}.get(p, COUNT - 1)


def test_the_defaults_are_the_papers():
    assert torch.equal(compensate(x(), KEYS), compensate(x(), KEYS, p=0.4, sigma=0.05))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4, 0.9, 1.0])
def test_the_share_of_grey_images(p):
    count = 20_000
    images = torch.tensor([0.2, 0.5, 0.8]).reshape(1, 3, 1, 1).expand(count, 3, 1, 1)
    out = compensate(images, noise.image_keys(0, 0, range(count)), p, 0.0)[:, :, 0, 0]
    grey = int((out[:, 0] == out[:, 2]).sum())
    assert abs(grey - p * count) <= 4 * math.sqrt(count * p * (1 - p))
    np.testing.assert_allclose(out[out[:, 0] != out[:, 2]], np.tile([0.2, 0.5, 0.8], (count - grey, 1)), rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_noise_has_its_standard_deviation(sigma, p):
    """Independent in each channel also where the image is grey; at 0.5 nothing reaches the clamp."""
    added = compensate(torch.full((COUNT, 3, 64, 64), 0.5), KEYS, p, sigma).double() - 0.5
    n = added.numel()
    assert abs(float(added.mean())) < 4 * sigma / math.sqrt(n) + 1e-4 * p  # torchvision's luma sums to 0.9999
    assert abs(float(added.std()) / sigma - 1) < 4 / math.sqrt(2 * n)
    channels = np.corrcoef(added.transpose(0, 1).reshape(3, -1).numpy())
    assert np.abs(channels - np.eye(3)).max() < 4 / math.sqrt(n / 3)


def test_the_result_is_clamped():
    out = compensate(torch.cat([torch.zeros(6, 3, 16, 16), torch.ones(6, 3, 16, 16)]), KEYS, 0.4, 0.5)
    assert out.min() == 0
    assert out.max() == 1
    # half of the noise falls outside
    assert 0.4 < float((out[:6] == 0).float().mean()) < 0.6


def test_an_image_does_not_depend_on_its_batch():
    images = x()
    whole = compensate(images, KEYS)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(compensate(images[order], KEYS[order]), whole[order])
    for i in range(COUNT):
        assert torch.equal(compensate(images[i : i + 1], KEYS[i : i + 1]), whole[i : i + 1])
    assert compensate(images[:0], KEYS[:0]).shape == (0, 3, 8, 8)
    assert not torch.equal(compensate(images, noise.image_keys(3, 2, range(COUNT))), whole)


def test_the_argument_is_left_alone_and_types_are_kept():
    images = x()
    before = images.clone()
    compensate(images, KEYS, 1.0, 0.0)
    assert torch.equal(images, before)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert compensate(images.to(dtype), KEYS).dtype == dtype


@pytest.mark.parametrize(
    ("images", "keys", "p", "sigma"),
    [
        (x(), KEYS, -0.1, 0.05),
        (x(), KEYS, 1.1, 0.05),
        (x(), KEYS, math.nan, 0.05),
        (x(), KEYS, 0.4, -0.05),
        (x(), KEYS, 0.4, 12.75),
        (x(), KEYS, 0.4, math.nan),
        (x()[0], KEYS[:3], 0.4, 0.05),
        (x(4), KEYS, 0.4, 0.05),
        ((x() * 255).to(torch.uint8), KEYS, 0.4, 0.05),
        (x(), KEYS[:5], 0.4, 0.05),
        (x(), KEYS[0], 0.4, 0.05),
        (x(), KEYS.float(), 0.4, 0.05),
    ],
    ids=lambda v: str(tuple(v.shape)) if isinstance(v, Tensor) else str(v),
)
def test_what_compensate_refuses(images, keys, p, sigma):
    with pytest.raises(InputError, match="Got"):
        compensate(images, keys, p, sigma)


# -- JPEG --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [1, 10, 75, 100])
def test_jpeg_is_pils(channels, quality):
    images = x(channels, size=16)
    out = jpeg(images, quality)
    for image, got in zip((images * 255).round().to(torch.uint8), out, strict=True):
        file = io.BytesIO()
        Image.fromarray(np.squeeze(image.permute(1, 2, 0).numpy())).save(file, format="JPEG", quality=quality)
        expected = np.asarray(Image.open(io.BytesIO(file.getvalue()))).reshape(16, 16, channels)
        np.testing.assert_array_equal((got * 255).round().permute(1, 2, 0).numpy(), expected)
    assert out.shape == images.shape
    assert not torch.equal(out, images)
    assert 0 <= out.min() <= out.max() <= 1


def test_lower_quality_changes_more():
    ramp = torch.linspace(0, 1, 32).expand(4, 3, 32, 32) * 0.8 + 0.1 * x(count=4, size=32)
    error = [float((jpeg(ramp, q) - ramp).abs().mean()) for q in (95, 50, 10, 1)]
    assert error == sorted(error)
    assert error[0] < 0.03 < error[3]


def test_jpeg_of_one_image_does_not_depend_on_its_batch():
    images = x()
    whole = jpeg(images, 10)
    assert torch.equal(jpeg(images.flip(0), 10).flip(0), whole)
    assert torch.equal(jpeg(images[4:5], 10), whole[4:5])
    assert jpeg(images[:0], 10).shape == (0, 3, 8, 8)


def test_jpeg_keeps_its_argument_and_the_type():
    images = x()
    before = images.clone()
    assert jpeg(images.double(), 50).dtype == torch.float64
    jpeg(images, 50)
    assert torch.equal(images, before)


@pytest.mark.parametrize("quality", [0, 101, -1, 10.0, "10", None])
def test_qualities(quality):
    with pytest.raises(InputError, match="1 to 100"):
        jpeg(x(), quality)


@pytest.mark.parametrize(
    "images", [x()[0], x(4), x(2), (x() * 255).to(torch.uint8), x() / 0], ids=lambda v: str(v.shape)
)
def test_what_jpeg_refuses(images):
    with pytest.raises(InputError, match="Got"):
        jpeg(images, 10)
