"""The squeezing baselines: their formulas, by other code, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from purifyloader import recipes
from purifyloader.core import noise
from purifyloader.core.corruptions import bit_depth, coin, grayscale
from purifyloader.core.images import quantize
from purifyloader.errors import InputError, PurifyError
from purifyloader.purifiers import BitDepth, Coin, Grayscale, Jpeg, Purifier, Squeeze, Tiles
from tests.conftest import random_images

COUNT = 12
KEYS = noise.image_keys(3, 1, range(COUNT))
SQUEEZES = {
    "jpeg": Jpeg(10),
    "grayscale": Grayscale(),
    "bit-depth": BitDepth(),
    "bit-depth-8": BitDepth(8),
    "coin": Coin(),
    "coin-far": Coin(40),
}


def x(channels: int = 3, count: int = COUNT, size: int = 9) -> Tensor:
    return random_images(count, size, channels=channels).float() / 255


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.ascontiguousarray(i.permute(1, 2, 0).numpy())) for i in quantize(images)]


# -- their formulas ----------------------------------------------------------------------------------


def test_grayscale_is_what_pil_says():
    out = quantize(grayscale(x())).int()
    assert (out[:, :1] == out).all()
    want = np.stack([np.asarray(picture.convert("L")) for picture in pictures(x())])
    assert np.abs(out[:, 0].numpy() - want).max() <= 1  # PIL computes in integers
    assert torch.equal(grayscale(x(1)), x(1))


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_depth_is_posterize(bits):
    out = quantize(bit_depth(x(), bits))
    for image, picture in zip(out, pictures(x()), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(ImageOps.posterize(picture, bits)))
    assert len(out.unique()) == 2**bits
    assert torch.equal(bit_depth(x(), 8), x())


@pytest.mark.parametrize("alpha", [0.3, 2.0, 40.0])
def test_coin_is_bilinear_at_the_places_drawn(alpha):
    images = x(size=7)
    out = coin(images, KEYS, alpha).double().numpy()
    for i in range(COUNT):
        dy, dx = (alpha * (2 * noise.uniform(KEYS[i : i + 1], (2, 7, 7))[0] - 1)).numpy()
        image = images[i].double().numpy()
        for row in range(7):
            for column in range(7):
                y, z = np.clip(row + dy[row, column], 0, 6), np.clip(column + dx[row, column], 0, 6)
                top, left = min(math.floor(y), 5), min(math.floor(z), 5)
                down, right = y - top, z - left
                want = (1 - down) * ((1 - right) * image[:, top, left] + right * image[:, top, left + 1]) + down * (
                    (1 - right) * image[:, top + 1, left] + right * image[:, top + 1, left + 1]
                )
                np.testing.assert_allclose(out[i, :, row, column], want, atol=1e-6)


def test_coin_moves_pixels_by_up_to_alpha_and_evenly():
    """A ramp shows by how much, as its values are places."""
    ramp = torch.linspace(0, 1, 101).expand(1, 1, 101, 101)
    for image, axis in ((ramp, 1), (ramp.transpose(2, 3), 0)):
        moved = 100 * (coin(image, KEYS[:1], 2.0) - image)[0, 0, 3:-3, 3:-3].double()
        assert moved.abs().max() <= 2 + 1e-4
        assert moved.abs().max() > 1.99
        assert abs(float(moved.mean())) < 4 * 2 / math.sqrt(3 * moved.numel()), axis
        assert abs(float(moved.std()) - 2 / math.sqrt(3)) < 0.02
    # all channels of a pixel move together
    colours = ramp.expand(1, 3, -1, -1)
    out = coin(colours, KEYS[:1], 2.0)
    assert torch.equal(out[:, 0], out[:, 2])


def test_coin_of_one_pixel_and_of_a_line():
    assert torch.equal(coin(x(size=1), KEYS, 2.0), x(size=1))
    line = x()[:, :, :1]
    assert coin(line, KEYS, 2.0).shape == line.shape


# -- as purifiers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SQUEEZES)
def test_an_image_does_not_depend_on_its_batch(name):
    purifier = SQUEEZES[name]
    assert isinstance(purifier, Squeeze)
    for channels in (3, 1):
        images = x(channels)
        whole = purifier(images, KEYS)
        assert whole.shape == images.shape
        assert whole.min() >= 0
        assert whole.max() <= 1
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
        assert torch.equal(purifier(images[order], KEYS[order]), whole[order])
        for i in range(COUNT):
            assert torch.equal(purifier(images[i : i + 1], KEYS[i : i + 1]), whole[i : i + 1])
        assert purifier(images[:0], KEYS[:0]).shape == (0, channels, 9, 9)


@pytest.mark.parametrize("name", SQUEEZES)
@pytest.mark.parametrize("level", [0, 255])
def test_black_stays_black_and_white_white(name, level):
    out = quantize(SQUEEZES[name](torch.full((2, 3, 8, 8), level / 255), KEYS[:2]))
    # as published: bits are cut off, so white is the highest level that is left
    want = 192 if name == "bit-depth" and level else level
    assert (out == want).all()


@pytest.mark.parametrize("name", SQUEEZES)
def test_values_outside_of_the_range_saturate(name):
    """Between stages nothing is clamped; the bits of 300 must not be those of 44."""
    with torch.no_grad():
        far = SQUEEZES[name].run(torch.tensor([-0.2, 1.2]).reshape(2, 1, 1, 1).expand(2, 3, 8, 8), KEYS[:2])
    near = SQUEEZES[name](torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 3, 8, 8), KEYS[:2])
    assert torch.equal(quantize(far), quantize(near))


def test_coin_is_differentiable_in_the_image():
    images = x().requires_grad_(True)
    Coin().purify_with_grad(images, KEYS)[0].sum().backward()
    assert images.grad is not None
    assert images.grad[1:].abs().sum() == 0
    assert float(images.grad[0].sum()) == pytest.approx(3 * 81, rel=1e-5)


# -- recipes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "bare"),
    [(recipes.grayscale, Grayscale()), (recipes.bit_depth, BitDepth(2)), (recipes.coin, Coin(2.0))],
)
def test_recipes(recipe, bare: Purifier):
    assert recipe().to_json() == bare.to_json()
    assert recipe(tile=8, overlap=2).to_json() == Tiles(bare, 8, 2).to_json()
    sized = recipe(resize=8, crop=8, tile=4)
    assert sized(x(), KEYS).shape == (COUNT, 3, 8, 8)
    for options, message in (({"crop": 8}, "crop needs resize"), ({"overlap": 8}, "overlap needs tile")):
        with pytest.raises(PurifyError, match=message):
            recipe(**options)


# -- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 9, 2.0, True, "2", None])
def test_bad_bits(bits):
    for make in (BitDepth, recipes.bit_depth):
        with pytest.raises(InputError, match=r"from 1 to 8\. Got"):
            make(bits)


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf, True, "2", None])
def test_bad_alpha(alpha):
    for make in (Coin, recipes.coin):
        with pytest.raises(InputError, match=r"alpha must be a finite number above 0.*\. Got"):
            make(alpha)


def test_bad_images():
    with pytest.raises(InputError, match=r"grayscale takes images .* Got \(12, 2, 9, 9\)"):
        grayscale(x(2))
    with pytest.raises(InputError, match="coin takes float images"):
        coin(quantize(x()), KEYS, 2.0)
    with pytest.raises(InputError, match=r"one key an image\. Got \(3,\)"):
        coin(x(), KEYS[:3], 2.0)
