"""Augmentations of the sparse set: pure functions of each image's key, against independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from purifyloader.core import noise
from purifyloader.train.denoiser.augment import AUGMENTATIONS, geometric, mixup, patches
from tests.conftest import random_images

GEOMETRIC = ("flip", "crop", "rotate")


def keys(count: int, seed: int = 5) -> Tensor:
    return noise.image_keys(seed, 11, range(count))


def pictures(count: int, height: int = 12, width: int = 16) -> Tensor:
    """Random images in [0, 1] with both ends in each."""
    x = random_images(count, max(height, width))[..., :height, :width].float() / 255
    x[:, :, 0, 0], x[:, :, -1, -1] = 0, 1
    return x


def coordinates(count: int, height: int, width: int) -> Tensor:
    """Images whose pixels say where they are: row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns]).float().repeat(count, 1, 1, 1)


def uniform(offsets: np.ndarray, limit: int) -> bool:
    """Whether integers look uniform over 0..limit."""
    counts = np.bincount(offsets, minlength=limit + 1)
    assert len(counts) == limit + 1
    return limit == 0 or stats.chisquare(counts).pvalue > 1e-3


# -- pure functions of the key -----------------------------------------------------------------------


@pytest.mark.parametrize("names", [*[(name,) for name in GEOMETRIC], GEOMETRIC], ids="-".join)
def test_an_image_is_the_same_in_any_batch_and_position(names):
    x, k = pictures(9), keys(9)
    whole = geometric(x, k, names)
    assert not torch.equal(whole, x)
    order = torch.tensor([4, 0, 8, 2, 7])
    assert torch.equal(geometric(x[order], k[order], names), whole[order])
    for i in range(9):
        assert torch.equal(geometric(x[i : i + 1], k[i : i + 1], names), whole[i : i + 1])
    assert not torch.equal(geometric(x, keys(9, seed=6), names), whole)


def test_patches_and_mixup_are_the_same_in_any_batch_and_position():
    x, y, k = pictures(9), pictures(9).flip(0), keys(9)
    cut, mixed = patches(x, k, 8), mixup(x, y, k)
    order = torch.tensor([4, 0, 8, 2, 7])
    assert torch.equal(patches(x[order], k[order], 8), cut[order])
    assert torch.equal(mixup(x[order], y[order], k[order]), mixed[order])


def test_the_order_of_the_names_does_not_matter_and_none_is_the_image():
    x, k = pictures(4), keys(4)
    assert torch.equal(geometric(x, k, ("rotate", "flip", "crop")), geometric(x, k, GEOMETRIC))
    assert torch.equal(geometric(x, k, ()), x)
    assert torch.equal(geometric(x, k, ("mixup",)), x)
    assert set(AUGMENTATIONS) == {*GEOMETRIC, "mixup"}


@pytest.mark.parametrize("shape", [(16, 16), (12, 20), (9, 9)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_stay_in_their_range_and_shape(shape, channels):
    x, k = pictures(200, *shape)[:, :channels], keys(200)
    # black and white, where overshooting would show
    x[::2] = (x[::2] > 0.5).float()
    for out in (geometric(x, k, GEOMETRIC), mixup(x, x.flip(0), k)):
        assert out.shape == x.shape
        assert out.dtype == torch.float32
        assert float(out.min()) >= 0
        assert float(out.max()) <= 1 + 2e-7  # the weights of a bilinear mean sum to 1 but for rounding


# -- each of them ------------------------------------------------------------------------------------


def test_half_of_the_images_are_mirrored():
    x = coordinates(4000, 1, 4)
    out = geometric(x, keys(4000), ("flip",))
    mirrored = (out == x.flip(-1)).flatten(1).all(1)
    assert bool((mirrored | (out == x).flatten(1).all(1)).all())
    assert stats.binomtest(int(mirrored.sum()), 4000).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24)])
def test_crops_are_windows_of_the_reflected_image(height, width):
    x, k = pictures(300, height, width), keys(300)
    # the offset of each image, from one whose pixels are all different
    numbers = np.arange(height * width, dtype=np.float32).reshape(height, width)
    padded_at = np.pad(numbers, [(height // 8,) * 2, (width // 8,) * 2], "reflect")
    moved = geometric(torch.from_numpy(numbers).repeat(300, 1, 1, 1), k, ("crop",))[:, 0].numpy()
    out = geometric(x, k, ("crop",)).numpy()
    pad = [(0, 0), (height // 8,) * 2, (width // 8,) * 2]
    rows, columns = [], []
    for i in range(300):
        found = [
            (r, c)
            for r in range(2 * (height // 8) + 1)
            for c in range(2 * (width // 8) + 1)
            if np.array_equal(padded_at[r : r + height, c : c + width], moved[i])
        ]
        assert len(found) == 1
        ((r, c),) = found
        np.testing.assert_array_equal(out[i], np.pad(x[i].numpy(), pad, "reflect")[:, r : r + height, c : c + width])
        rows.append(r)
        columns.append(c)
    assert uniform(np.array(rows), 2 * (height // 8))
    assert uniform(np.array(columns), 2 * (width // 8))
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.25


def rotation_of(moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(matrix, offset) of the coordinates in the middle of an image, where no border has been reflected."""
    _, height, width = moved.shape
    middle = np.s_[height // 3 : -(height // 3), width // 3 : -(width // 3)]
    rows, columns = np.mgrid[:height, :width]
    at = np.stack([rows[middle].ravel(), columns[middle].ravel(), np.ones(rows[middle].size)], 1)
    solution = np.linalg.lstsq(at, np.stack([m[middle].ravel() for m in moved], 1), rcond=None)[0]
    np.testing.assert_allclose(at @ solution, np.stack([m[middle].ravel() for m in moved], 1), atol=1e-3)
    return solution[:2].T, solution[2]


@pytest.mark.parametrize(("height", "width"), [(24, 24), (18, 30)])
def test_rotation_is_a_rotation_about_the_centre(height, width):
    count = 300
    x, k = pictures(count, height, width), keys(count)
    out = geometric(x, k, ("rotate",))
    moved = geometric(coordinates(count, height, width), k, ("rotate",)).numpy()
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    angles = []
    for i in range(count):
        matrix, offset = rotation_of(moved[i])
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(2), atol=1e-4)
        np.testing.assert_allclose(matrix @ centre + offset, centre, atol=1e-3)
        angles.append(math.degrees(math.atan2(matrix[1, 0], matrix[0, 0])))
        if i < 20:
            # scipy's "reflect" mirrors about the edge of the border's pixels
            for got, image in zip(out[i].numpy(), x[i].double().numpy(), strict=True):
                want = ndimage.affine_transform(image, matrix, offset, order=1, mode="reflect")
                np.testing.assert_allclose(got, want, atol=2e-3)
    assert max(map(abs, angles)) <= 15
    assert stats.kstest(np.array(angles) / 15, stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_rotation_is_torchvisions_inside_the_image():
    """A disc stays inside: no border is reflected."""
    rows, columns = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    disc = (rows.hypot(columns) < 12).float()
    x, k = pictures(8, 32, 32) * disc, keys(8)
    out, moved = geometric(x, k, ("rotate",)), geometric(coordinates(8, 32, 32), k, ("rotate",)).numpy()
    for i in range(8):
        matrix, _ = rotation_of(moved[i])
        angle = math.degrees(math.atan2(matrix[0, 1], matrix[0, 0]))
        want = min(
            (rotate(x[i], sign * angle, InterpolationMode.BILINEAR) for sign in (1, -1)),
            key=lambda w: float((w - out[i]).abs().max()),
        )
        torch.testing.assert_close(out[i], want, atol=2e-3, rtol=0)


def test_mixup_takes_its_share_from_a_beta_distribution():
    one = torch.ones(5000, 1, 1, 1, dtype=torch.float64)
    share = mixup(one, torch.zeros_like(one), keys(5000)).flatten().numpy()
    assert stats.kstest(share, stats.beta(0.2, 0.2).cdf).pvalue > 1e-3
    x, y, k = pictures(6), pictures(6).flip(0), keys(6)
    want = torch.stack([float(s) * a + (1 - float(s)) * b for s, a, b in zip(share, x, y, strict=False)])
    torch.testing.assert_close(mixup(x, y, k), want)


@pytest.mark.parametrize(("height", "width", "size"), [(12, 16, 8), (9, 9, 8), (8, 8, 8), (30, 10, 10)])
def test_patches_lie_inside_the_image_anywhere(height, width, size):
    count = 600
    out = patches(coordinates(count, height, width), keys(count), size)
    assert out.shape == (count, 2, size, size)
    corner = out[:, :, 0, 0]
    assert torch.equal(out, corner[:, :, None, None] + coordinates(count, size, size))
    assert uniform(corner[:, 0].int().numpy(), height - size)
    assert uniform(corner[:, 1].int().numpy(), width - size)


def test_what_is_drawn_for_one_purpose_says_nothing_of_another():
    """Flip, the two offsets of a crop, the angle, the share and the two offsets of a patch, over the same keys."""
    count, k = 2000, keys(2000)
    flipped = (geometric(coordinates(count, 1, 4), k, ("flip",))[:, 1, 0, 0] > 0).numpy()
    crop = geometric(coordinates(count, 32, 32), k, ("crop",))[:, :, 16, 16].numpy()
    turned = geometric(coordinates(count, 24, 24), k, ("rotate",))[:, 0, 12, 18].numpy()
    one = torch.ones(count, 1, 1, 1)
    share = mixup(one, torch.zeros_like(one), k).flatten().numpy()
    patch = patches(coordinates(count, 24, 24), k, 8)[:, :, 0, 0].numpy()
    drawn = np.stack([flipped, crop[:, 0], crop[:, 1], turned, share, patch[:, 0], patch[:, 1]])
    correlations = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 4 / math.sqrt(count)
