"""Images of different sizes: what an image becomes does not depend on the others, resized or in tiles."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from purifyloader import recipes
from purifyloader.core import noise, sizes
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.errors import ConfigError, InputError, PurifyError
from purifyloader.purifiers import Chain, Compensation, DenoiseOnce, Diffuse, Jpeg, Purifier, Repeat, Resize, Tiles
from tests.conftest import random_images, slim_denoiser, tiny_denoiser, tiny_network

SIZES = [(16, 16), (5, 7), (40, 23), (16, 16), (3, 33), (16, 17), (1, 1), (23, 40), (40, 23), (16, 16)]


FEW = [(16, 16), (5, 7), (20, 13), (3, 17), (1, 1), (16, 16)]  # of those, for networks


def pictures(shapes: Sequence[tuple[int, int]] = SIZES, channels: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (channels, h, w), generator=generator).float() / 255 for h, w in shapes]


def keys(count: int = len(SIZES)) -> Tensor:
    return noise.image_keys(0, 0, range(count))


class Same(Purifier):
    """Gives back its input, and remembers what it was given."""

    kind = "same"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        self.seen.append(x_BCHW)
        return x_BCHW


class Flat(Purifier):
    """Every image one level, drawn from its seed."""

    kind = "flat"

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return noise.uniform(seeds_B, (1, 1, 1)).float().expand_as(x_BCHW)


def once(dtype: str = "float32") -> Purifier:
    return DenoiseOnce(slim_denoiser(), 0.1, dtype=dtype, compute_batch=16)


def two_levels() -> Purifier:
    """Of a network that takes even sizes alone."""
    return DenoiseOnce(tiny_denoiser(), 0.1, compute_batch=16)


def diffuse() -> Purifier:
    return Diffuse(slim_denoiser(), sigma=0.1, steps=2, compute_batch=16)


# Those that resize or cut; tests/contracts/test_purifiers.py has all others.
PURIFIERS: dict[str, Callable[[], Purifier]] = {
    "resize": lambda: Resize(12),
    "resize-crop": lambda: Chain(Resize(12, 10), diffuse()),
    "resize-keeping-aspect": lambda: Chain(Jpeg(50), Resize(12), two_levels(), Compensation()),
    "tiles": lambda: Tiles(diffuse(), 16),
    "tiles-bf16": lambda: Tiles(once("bfloat16"), 16, 8),
    "tiles-odd": lambda: Tiles(Chain(Jpeg(50), two_levels()), 9, 2),
    "tiles-twice": lambda: Repeat(Tiles(once(), 16, 0), 2),
    "tiles-in-tiles": lambda: Tiles(Tiles(once(), 8), 12),
    "resize-tiles": lambda: Chain(Resize(20), Tiles(diffuse(), 16), Compensation()),
}


@functools.cache
def purified(name: str) -> list[Tensor]:
    """The few pictures together, which the tests compare with other calls."""
    return PURIFIERS[name]().purify_images(pictures(FEW), keys(len(FEW)))


# -- the same pixels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PURIFIERS)
def test_an_image_does_not_depend_on_the_others(name):
    purifier, images, seeds = PURIFIERS[name](), pictures(FEW), keys(len(FEW))
    whole = purified(name)
    assert [tuple(x.shape) for x in whole] == [purifier.output_shape(tuple(x.shape)) for x in images]
    before = torch.get_num_threads()
    try:
        for i, image in enumerate(images[:5]):
            assert torch.equal(purifier(image[None], seeds[i : i + 1])[0], whole[i]), f"image {i} alone"
        for threads in (1, 2):
            torch.set_num_threads(threads)
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(threads)).tolist()
            for rows in (order[:4], order[4:5])[:threads]:  # one alone with one thread was above
                got = purifier.purify_images([images[i] for i in rows], seeds[rows])
                assert all(torch.equal(x, whole[i]) for x, i in zip(got, rows, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", PURIFIERS)
def test_a_batch_is_its_images(name):
    purifier, seeds = PURIFIERS[name](), keys(18)
    x = torch.stack(pictures([(14, 17)] * 18))
    whole = purifier(x, seeds)
    assert whole.shape[1:] == purifier.output_shape((3, 14, 17))
    assert all(torch.equal(a, b) for a, b in zip(whole, purifier.purify_images(list(x), seeds), strict=True))
    empty = purifier(x[:0], seeds[:0])
    assert empty.shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_layout_in_memory_does_not_matter(channels):
    """A full compute batch goes to the network as it came: in channels-last memory with other kernels."""
    denoiser = NetworkDenoiser(tiny_network(channels), "edm", (0.001, 0.3))
    x, seeds = random_images(16, channels=channels).float() / 255, keys(16)
    last = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for purifier in (DenoiseOnce(denoiser, 0.1, compute_batch=16), Resize(11, 9), Tiles(Jpeg(), 8)):
        whole = purifier(x, seeds)
        assert torch.equal(purifier(last, seeds), whole)
        assert all(torch.equal(a, b) for a, b in zip(purifier.purify_images(list(last), seeds), whole, strict=True))


def test_grey_images():
    denoiser = NetworkDenoiser(tiny_network(1), "edm", (0.001, 0.3))
    images, seeds = pictures(FEW, 1), keys(len(FEW))
    purifier = Chain(Resize(14), Tiles(DenoiseOnce(denoiser, 0.1, compute_batch=16), 8), Jpeg(50))
    whole = purifier.purify_images(images, seeds)
    assert all(x.shape[0] == 1 for x in whole)
    assert all(torch.equal(purifier(x[None], s[None])[0], y) for x, s, y in zip(images, seeds, whole, strict=True))


def test_purify_images_is_frozen_and_exact():
    purifier = Tiles(DenoiseOnce(tiny_denoiser(), 0.1, compute_batch=16), 16)
    images, seeds = pictures(SIZES[:3]), keys(3)
    whole = purifier.purify_images(images, seeds)
    images[0].requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        again = purifier.purify_images([*images[:2], images[2].double()], seeds)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(again, whole, strict=True))
    assert not any(x.requires_grad for x in again)


def test_no_images():
    for make in PURIFIERS.values():
        assert make().purify_images([], torch.zeros(0, dtype=torch.int64)) == []


# -- resize ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 32, 33])
def test_resize_is_torchvision_and_says_its_shape(size):
    generator = torch.Generator().manual_seed(size)
    shapes = [(size, size), (size, 2 * size + 1), (1, 1), (1, 9), *torch.randint(1, 120, (15, 2), generator=generator)]
    for crop in (None, size, max(size - 3, 1)):
        purifier = Resize(size, crop)
        for h, w in shapes:
            x = torch.rand(1, 3, int(h), int(w), generator=generator)
            want = transforms.resize(x, [size], antialias=True)
            want = want if crop is None else transforms.center_crop(want, [crop, crop])
            got = purifier(x, keys(1))
            assert torch.equal(got, want)
            assert purifier.output_shape((3, int(h), int(w))) == tuple(got.shape[1:])
            assert got.min() >= 0
            assert got.max() <= 1 + 1e-6


def test_every_shape_is_rounded_as_torchvision_rounds_it():
    for height, width in [(h, w) for h in range(1, 700, 29) for w in range(1, 700, 17)]:
        image = torch.empty(3, height, width, device="meta")
        assert sizes.resized_shape((3, height, width), 224)[1:] == transforms.resize(image, [224]).shape[1:]


def test_resize_leaves_its_own_size_alone():
    for x in pictures([(12, 12), (12, 31), (40, 12)]):
        assert torch.equal(Resize(12)(x[None], keys(1))[0], x)


def test_output_shapes_fold():
    once = DenoiseOnce(tiny_denoiser(), 0.1)
    assert once.output_shape((3, 5, 7)) == Tiles(once, 8).output_shape((3, 5, 7)) == (3, 5, 7)
    assert Chain(Resize(20), once, Resize(10, 8)).output_shape((3, 40, 60)) == (3, 8, 8)
    assert Chain(Chain(Resize(20)), Tiles(once, 16)).output_shape((3, 40, 60)) == (3, 20, 30)
    assert Repeat(Resize(20, 10), 2).output_shape((3, 40, 60)) == (3, 10, 10)


# -- tiles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "overlap"), [(8, 0), (8, 1), (8, 2), (8, 4), (7, 3), (16, 8), (2, 1), (1, 0)])
def test_tiles_of_the_identity_are_the_identity(size, overlap):
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, size), (2 * size, 3 * size), *SIZES, *torch.randint(1, 5 * size, (10, 2), generator=generator)]
    for h, w in shapes:
        x = torch.rand(3, int(h), int(w), generator=generator)
        (out,) = Tiles(Same(), size, overlap).purify_images([x], keys(1))
        assert torch.allclose(out, x, rtol=0, atol=1e-6)
        # how many tiles cover each pixel, padding aside: cut an image of pixel numbers
        numbers = torch.arange(x[0].numel(), dtype=torch.float32).reshape(1, int(h), int(w))
        if min(h, w) >= size:
            covered = torch.stack(sizes.cut(numbers, size, overlap)).long().flatten().bincount()
            assert len(covered) == numbers.numel()
            assert covered.min() >= 1
            once = (covered == 1).reshape(numbers.shape[1:])
            assert torch.equal(out[:, once], x[:, once])
            if h % size == w % size == overlap == 0:
                assert once.all()


def test_an_image_of_one_tile_is_purified_as_it_is():
    purifier = Diffuse(tiny_denoiser(), sigma=0.1, steps=2, compute_batch=16)
    x, seeds = torch.stack(pictures([(16, 16)] * 3)), keys(3)
    assert torch.equal(Tiles(purifier, 16)(x, seeds), purifier(x, noise.fold_in(seeds, 0)))
    assert not torch.equal(Tiles(purifier, 16)(x, seeds), purifier(x, seeds))


def test_every_tile_draws_from_its_own_key():
    images, seeds = pictures([(8, 12), (4, 4), (12, 4)]), keys(3)
    for out, seed in zip(Tiles(Flat(), 4, 0).purify_images(images, seeds), seeds, strict=True):
        tiles = out.unfold(1, 4, 4).unfold(2, 4, 4).flatten(1, 2).transpose(0, 1)
        want = [noise.uniform(noise.fold_in(seed, j)[None], (1,)).float().item() for j in range(len(tiles))]
        assert [tile.unique().item() for tile in tiles] == want
        assert len(set(want)) == len(want)


@pytest.mark.parametrize(
    ("width", "overlap", "shared"),
    [(12, 4, 4), (14, 2, 2), (13, 2, 3), (12, 0, 4), (16, 0, 0)],  # in the third and fourth to meet the edge
)
def test_overlaps_are_linear_ramps(width, overlap, shared):
    seed = keys(1)
    a, b = (noise.uniform(noise.fold_in(seed, j), ()).float() for j in (0, 1))
    (out,) = Tiles(Flat(), 8, overlap).purify_images([torch.zeros(3, 8, width)], seed)
    share = ((torch.arange(width) - (7 - shared)) / (shared + 1)).clamp(0, 1)
    assert torch.allclose(out, (a + (b - a) * share).expand(3, 8, width), atol=1e-6)
    (tall,) = Tiles(Flat(), 8, overlap).purify_images([torch.zeros(3, width, 8)], seed)
    assert torch.equal(tall, out.mT)


def test_a_small_image_does_not_keep_the_tiles_of_the_others():
    for x in Tiles(Jpeg(), 8).purify_images(pictures([(8, 8), (40, 40), (5, 5), (5, 11)]), keys(4)):
        assert x.untyped_storage().nbytes() <= 4 * 3 * 11 * 8 + 4 * 3 * 40 * 40 * (x.shape[1] == 40)


def test_no_tile_is_left_out_of_the_blend():
    """Every weight is positive: a change of any tile shows at each of its pixels."""
    x = torch.zeros(1, 21, 18)
    count = len(sizes.cut(x, 8, 4))
    for j in range(count):
        tiles = [torch.full((1, 8, 8), float(i == j)) for i in range(count)]
        assert int((sizes.join(tiles, x.shape, 8, 4) > 0).sum()) == 64


def test_the_default_overlap_is_a_quarter():
    assert Tiles(Jpeg(), 16).config()["overlap"] == 4
    assert Tiles(Jpeg(), 3).config()["overlap"] == 0


def test_all_tiles_of_all_images_are_purified_together():
    inner = Same()
    images = pictures()
    Tiles(inner, 16).purify_images(images, keys())
    assert [x.shape for x in inner.seen] == [(sum(len(sizes.cut(x, 16, 4)) for x in images), 3, 16, 16)]


def test_small_images_are_mirrored_or_their_border_repeated():
    inner = Same()
    mirrored, repeated, mixed = pictures([(6, 12), (1, 2), (9, 1)])
    Tiles(inner, 8, 0).purify_images([mirrored, repeated, mixed], keys(3))
    tiles = inner.seen[0]
    assert torch.equal(tiles[0], F.pad(mirrored[:, :, :8], (0, 0, 1, 1), mode="reflect"))
    assert torch.equal(tiles[2], F.pad(repeated, (3, 3, 3, 4), mode="replicate"))
    assert torch.equal(tiles[3], F.pad(mixed, (3, 4, 0, 0), mode="replicate")[:, :8])


# -- gradients ---------------------------------------------------------------------------------------


def test_gradients_reach_the_images_and_no_others():
    x = torch.stack(pictures([(24, 20)] * 3)).requires_grad_(True)
    for purifier in (Resize(16, 12), Tiles(diffuse(), 16), Chain(Resize(18), Tiles(diffuse(), 16))):
        out = purifier.purify_with_grad(x, keys(3))
        assert torch.equal(out.detach(), purifier(x, keys(3)))
        (grad,) = torch.autograd.grad(out[1].square().sum(), x)
        assert torch.isfinite(grad).all()
        assert grad[1].abs().sum() > 0
        assert grad[0].abs().sum() == grad[2].abs().sum() == 0


def test_the_gradient_of_the_identity_is_one():
    x = torch.stack(pictures([(23, 40)] * 2)).requires_grad_(True)
    weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    out = Tiles(Same(), 9).purify_with_grad(x, keys(2))
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    assert torch.allclose(grad, weight, atol=1e-6)
    small = torch.stack(pictures([(5, 3)])).requires_grad_(True)
    (grad,) = torch.autograd.grad(Tiles(Same(), 9).purify_with_grad(small, keys(1)).sum(), small)
    assert torch.allclose(grad, torch.ones_like(small), atol=1e-6)


# -- configuration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PURIFIERS)
def test_json_builds_back_the_same_purifier(name):
    text = PURIFIERS[name]().to_json()
    again = recipes.from_json(text, [tiny_denoiser(), slim_denoiser()])
    assert again.to_json() == text
    results = again.purify_images(pictures(FEW), keys(len(FEW))), purified(name)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_golden_json():
    purifier = Chain(Resize(256, 224), Tiles(Jpeg(10), 64))
    assert json.loads(purifier.to_json()) == {
        "schema": 2,
        "purifier": {
            "kind": "chain",
            "stages": [
                {"kind": "resize", "size": 256, "crop": 224},
                {"kind": "tiles", "purifier": {"kind": "jpeg", "quality": 10}, "size": 64, "overlap": 16},
            ],
        },
    }
    old = purifier.to_json().replace('"schema":2', '"schema":1')
    assert recipes.from_json(old).to_json() == purifier.to_json()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resize(0), r"positive integer, in pixels\. Got 0"),
        (lambda: Resize(99999), r"at most 4096 pixels\. Got 99999, .*: give the size"),
        (lambda: Resize(True), "Got True"),
        (lambda: Resize(32.0), r"Got 32\.0"),
        (lambda: Resize(32, 33), r"from 1 to size=32.*Got 33: resize to at least"),
        (lambda: Resize(32, 0), "Got 0"),
        (lambda: Resize(32, 8.0), r"Got 8\.0"),
        (lambda: Tiles(Jpeg(), 0), r"size of a tile must be an integer from 1 to 4096, in pixels\. Got 0"),
        (lambda: Tiles(Jpeg(), "64"), "Got '64'"),
        (lambda: Tiles(Jpeg(), 16, 9), r"from 0 to 8, in pixels, half a tile at most\. Got 9"),
        (lambda: Tiles(Jpeg(), 16, -1), "Got -1"),
        (lambda: Tiles(Jpeg(), 16, 2.0), r"Got 2\.0"),
        (lambda: Tiles(torch.nn.Identity(), 16), r"takes a purifier\. Got Identity"),
        (lambda: Tiles(Resize(8), 16), "Got one that resizes: put the Resize before"),
        (lambda: Tiles(Chain(Jpeg(), Repeat(Resize(16), 2)), 16), "Got one that resizes"),
        (lambda: recipes.jpeg(crop=32), "crop needs resize.* Got crop=32: give resize="),
        (lambda: recipes.jpeg(tile=32, resize=64, overlap=17), "half a tile"),
        (lambda: recipes.eclipse("no-such-model", overlap=4), "overlap needs tile.* Got overlap=4: give tile="),
        (lambda: recipes.denoise_once("no-such-model", 0.1, tile=16, crop=4), "crop needs resize"),
        (lambda: recipes.from_json('{"schema": 1, "purifier": {"kind": "tiles", "size": 8}}'), "does not fit"),
        (lambda: recipes.from_json('{"schema": 1, "purifier": {"kind": "resize", "width": 8}}'), "does not fit"),
    ],
)
def test_bad_configurations(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# -- recipes -----------------------------------------------------------------------------------------


def recipe_calls() -> dict:
    denoiser = tiny_denoiser()
    return {
        "eclipse": (lambda **sizes: recipes.eclipse(denoiser, sigma=0.1, **sizes), Diffuse(denoiser, sigma=0.1)),
        "denoise_once": (lambda **sizes: recipes.denoise_once(denoiser, 0.1, **sizes), DenoiseOnce(denoiser, 0.1)),
        "jpeg": (lambda **sizes: recipes.jpeg(20, **sizes), Jpeg(20)),
    }


@pytest.mark.parametrize("name", recipe_calls())
def test_recipes_at_other_sizes(name):
    make, bare = recipe_calls()[name]
    assert make().to_json() == bare.to_json()
    assert make(resize=32).to_json() == Chain(Resize(32), bare).to_json()
    assert make(resize=32, crop=24).to_json() == Chain(Resize(32, 24), bare).to_json()
    assert make(tile=32).to_json() == Tiles(bare, 32).to_json()
    assert make(tile=32, overlap=0).to_json() == Tiles(bare, 32, 0).to_json()
    both = Chain(Resize(64, 48), Tiles(bare, 32, 4))
    assert make(resize=64, crop=48, tile=32, overlap=4).to_json() == both.to_json()


def test_compensation_is_decided_once_an_image():
    denoiser = tiny_denoiser()
    diffuse = Diffuse(denoiser, sigma=0.1)
    tiled = recipes.eclipse(denoiser, sigma=0.1, compensate_once=True, tile=16)
    assert tiled.to_json() == Chain(Tiles(diffuse, 16), Compensation()).to_json()
    both = recipes.eclipse(denoiser, sigma=0.1, compensate_once=True, resize=32, tile=16)
    assert both.to_json() == Chain(Resize(32), Chain(Tiles(diffuse, 16), Compensation())).to_json()


# -- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "seeds", "message"),
    [
        (torch.zeros(2, 3, 8, 8), keys(2), r"list of float tensors.*Got torch.float32 \(2, 3, 8, 8\).*purifier itself"),
        ([torch.zeros(3, 8, 8), torch.zeros(8, 8)], keys(2), r"Got torch.float32 \(8, 8\) as image 1"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], keys(1), r"Got torch.uint8 \(3, 8, 8\) as image 0"),
        ([torch.zeros(3, 8, 8), None], keys(2), "Got NoneType as image 1"),
        ([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)], keys(2), r"3 channels. Got \(1, 8, 8\).*number 1"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 0, 8)], keys(2), r"number 1\) needs at least one pixel"),
        ([torch.zeros(3, 8, 8), torch.full((3, 4, 4), torch.nan)], keys(2), r"number 1\) needs finite"),
        ([torch.zeros(3, 8, 8), torch.full((3, 4, 4), 255.0)], keys(2), r"number 1\).*divide 0-255"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, device="meta")], keys(2), "image 1, meta: move them"),
        ([torch.zeros(3, 8, 8)], keys(2), r"seeds must have shape \(1,\), one an image. Got \(2,\)"),
        ([torch.zeros(3, 8, 8)], torch.zeros(1), r"seeds must be an int64 tensor.*Got torch.float32 \(1,\)"),
        ([], keys(1), r"shape \(0,\)"),
        ([], [], "Got list"),
    ],
)
def test_bad_calls(images, seeds, message):
    with pytest.raises(InputError, match=message):
        DenoiseOnce(tiny_denoiser(), 0.1).purify_images(images, seeds)


def test_a_batch_without_pixels_is_refused():
    for purifier in (Resize(8), Tiles(Jpeg(), 8), DenoiseOnce(tiny_denoiser(), 0.1)):
        with pytest.raises(PurifyError, match=r"at least one pixel and one channel\. Got \(2, 3, 0, 8\)"):
            purifier(torch.zeros(2, 3, 0, 8), keys(2))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PURIFIERS)
def test_on_a_gpu(name):
    purifier, images, seeds = PURIFIERS[name](), pictures(FEW), keys(len(FEW))
    on_cpu = purifier.purify_images(images, seeds)
    purifier.cuda()
    cuda = [x.cuda() for x in images]
    whole = purifier.purify_images(cuda, seeds)
    for i, image in enumerate(cuda):
        assert torch.equal(purifier(image[None], seeds[i : i + 1])[0], whole[i])
    order = list(reversed(range(len(cuda))))
    again = purifier.purify_images([cuda[i] for i in order], seeds[order])
    assert all(torch.equal(x, whole[i]) for x, i in zip(again, order, strict=True))
    if "bf" not in name and "jpeg" not in name and not any(isinstance(m, Jpeg) for m in purifier.modules()):
        assert all((a.cpu() - b).abs().max() < 1e-4 for a, b in zip(whole, on_cpu, strict=True))
