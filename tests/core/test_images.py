"""Images in and out: what came in goes out, and 8 bits survive exactly."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from purifyloader.core.images import (
    as_stored,
    from_bytes,
    from_engine,
    is_image,
    own_channels,
    pil_mode,
    quantize,
    to_bytes,
    to_engine,
    to_unit,
    type_of,
)
from purifyloader.errors import InputError

LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def pixels(channels: int) -> np.ndarray:
    """(16, 16, channels), every value in every channel, no two channels alike."""
    return np.stack([np.roll(LEVELS.ravel(), 37 * c).reshape(16, 16) for c in range(channels)], axis=-1)


def chw(channels: int) -> Tensor:
    return torch.from_numpy(pixels(channels)).permute(2, 0, 1).contiguous()


PIL_IMAGES = {
    "pil L": lambda: Image.fromarray(LEVELS),
    "pil LA": lambda: Image.fromarray(pixels(2)),
    "pil RGB": lambda: Image.fromarray(pixels(3)),
    "pil RGBA": lambda: Image.fromarray(pixels(4)),
}
ARRAYS = {
    "numpy HW": lambda: LEVELS.copy(),
    **{f"numpy HW{c}": lambda c=c: pixels(c) for c in (1, 2, 3, 4)},
    "numpy backwards": lambda: pixels(3)[::-1, ::-1],
    "numpy Fortran": lambda: np.asfortranarray(pixels(3)),
}
TENSORS = {
    "tensor HW": lambda: torch.from_numpy(LEVELS.copy()),
    **{f"tensor {c}HW": lambda c=c: chw(c) for c in (1, 2, 3, 4)},
    "tensor strided": lambda: torch.from_numpy(pixels(3)).permute(2, 0, 1),
    "tv_tensor 3HW": lambda: tv_tensors.Image(chw(3)),
    "tv_tensor 1HW": lambda: tv_tensors.Image(chw(1)),
    "tv_tensor 4HW": lambda: tv_tensors.Image(chw(4)),
}
BYTES = {**PIL_IMAGES, **ARRAYS, **TENSORS}
FLOATS = {
    **{
        f"{name} {np.dtype(t).name}": lambda make=make, t=t: (make() / 255).astype(t)
        for name, make in ARRAYS.items()
        for t in (np.float16, np.float32, np.float64)
    },
    **{
        f"{name} {t}": lambda make=make, t=t: (make().to(torch.float64) / 255).to(t)
        for name, make in TENSORS.items()
        for t in (torch.float16, torch.float32, torch.float64)
    },
    "tensor bfloat16": lambda: torch.tensor([[0.0, 0.5], [0.25, 1.0]], dtype=torch.bfloat16),
}


def values(image: Any) -> np.ndarray:
    return image.float().numpy() if isinstance(image, Tensor) else np.asarray(image)


def channels_of(image: Any) -> int:
    if isinstance(image, Image.Image):
        return len(image.getbands())
    return 1 if image.ndim == 2 else image.shape[2 if isinstance(image, np.ndarray) else 0]


def assert_same_kind(got: Any, image: Any) -> None:
    assert type(got) is type(image)
    if isinstance(image, Image.Image):
        assert (got.mode, got.size) == (image.mode, image.size)
    else:
        assert got.dtype == image.dtype
        assert got.shape == image.shape


# -- the quantiser ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_byte_survives(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantize(levels.to(dtype) / 255), levels)
    assert torch.equal(quantize(levels.double().div(255).to(dtype)), levels)
    assert torch.equal(quantize(to_unit(levels)), levels)


def test_values_outside_saturate():
    """Without clamping, 257 would wrap to 1 and -1 to 255."""
    x = torch.tensor([257.0, 255.6, 511.0, 1e9, -1.0, -0.6, -256.0, -1e9]) / 255
    assert quantize(x).tolist() == [255, 255, 255, 255, 0, 0, 0, 0]


def test_it_rounds_and_does_not_truncate():
    level = torch.arange(255, dtype=torch.float64)
    assert torch.equal(quantize((level + 0.49) / 255), level.to(torch.uint8))
    assert torch.equal(quantize((level + 0.51) / 255), (level + 1).to(torch.uint8))


def test_quantising_leaves_its_argument_alone():
    x = torch.tensor([0.3, 2.0, -1.0])
    quantize(x)
    assert x.tolist() == torch.tensor([0.3, 2.0, -1.0]).tolist()


@pytest.mark.parametrize(
    "x", [torch.tensor([0.5, float("nan")]), torch.tensor([float("inf")]), torch.arange(3)], ids=str
)
def test_what_cannot_be_quantised(x):
    with pytest.raises(InputError, match="Got"):
        quantize(x)


def test_what_is_clamped_and_what_is_refused():
    inside = torch.linspace(0, 1, 12).reshape(3, 2, 2)
    assert torch.equal(to_unit(inside), inside)
    for low, high in ((-2e-7, 1 + 2e-7), (-9e-5, 1.0), (0.0, 1 + 9e-5)):
        over = inside * (high - low) + low
        assert torch.equal(to_unit(over), over.clamp(0, 1))
    for low, high, far in ((-0.003, 1.0, "0.003"), (0.0, 1.19, "0.19"), (-2.1, 2.6, "2.1"), (0.0, 255.0, "2.5e+02")):
        with pytest.raises(InputError, match=f"from {low:.4g} to .*, up to {re.escape(far)} outside"):
            to_unit(inside * (high - low) + low)
    assert to_unit(torch.tensor([1.0], dtype=torch.bfloat16).nextafter(torch.tensor([2.0], dtype=torch.bfloat16))) == 1
    with pytest.raises(InputError, match="Bicubic resizing"):
        to_unit(inside * 1.19)


def test_to_unit():
    assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == [0.0, pytest.approx(0.2), 1.0]
    assert to_unit(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert to_unit(torch.tensor([0.5], dtype=torch.float64)).dtype == torch.float32
    with pytest.raises(InputError, match="divide 0-255 floats by 255"):
        to_unit(torch.tensor([0.0, 255.0]))


# -- what came in goes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("channels", [None, 3])
def test_bytes_round_trip_exactly(name, channels):
    image = BYTES[name]()
    x, kind = to_engine(image, channels)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert x.shape == (channels or (1 if channels_of(image) < 3 else 3), 16, 16)
    assert 0 <= x.min() <= x.max() <= 1
    got = from_engine(x, kind)
    assert_same_kind(got, image)
    np.testing.assert_array_equal(values(got), values(image))


@pytest.mark.parametrize("name", FLOATS)
def test_floats_come_back_as_they_were(name):
    image = FLOATS[name]()
    x, kind = to_engine(image)
    assert x.dtype == torch.float32
    got = from_engine(x, kind)
    assert_same_kind(got, image)
    np.testing.assert_allclose(values(got), values(image), rtol=1e-7)
    assert np.array_equal(
        np.rint(values(got).astype(np.float64) * 255), np.rint(values(image).astype(np.float64) * 255)
    )


@pytest.mark.parametrize("name", [n for n in FLOATS if "HW " in n or "1HW" in n])
def test_grey_floats_through_a_colour_purifier(name):
    """The luma of three equal channels is the channel: the weights, to four digits, sum to 0.9999."""
    image = FLOATS[name]()
    x, kind = to_engine(image, 3)
    got = from_engine(x, kind)
    assert_same_kind(got, image)
    np.testing.assert_allclose(values(got), values(image), rtol=1.5e-3 if "16" in name else 1.01e-4)
    assert np.array_equal(
        np.rint(values(got).astype(np.float64) * 255), np.rint(values(image).astype(np.float64) * 255)
    )


@pytest.mark.parametrize("name", BYTES)
def test_the_engine_sees_the_colours_in_their_places(name):
    image = BYTES[name]()
    x, _ = to_engine(image)
    array = values(image)
    if isinstance(image, Tensor) and image.ndim == 3:
        array = array.transpose(1, 2, 0)
    array = array[:, :, None] if array.ndim == 2 else array
    colour = array[..., : 1 if array.shape[-1] < 3 else 3]
    np.testing.assert_array_equal(x.numpy(), colour.transpose(2, 0, 1).astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(
    "name", ["pil LA", "pil RGBA", "numpy HW2", "numpy HW4", "tensor 2HW", "tensor 4HW", "tv_tensor 4HW"]
)
@pytest.mark.parametrize("channels", [None, 3])
def test_alpha_is_untouched_when_the_colours_change(name, channels):
    image = BYTES[name]()
    x, kind = to_engine(image, channels)
    got = from_engine(1 - x, kind)
    assert_same_kind(got, image)
    before, after = values(image), values(got)
    if isinstance(image, Tensor):
        before, after = before.transpose(1, 2, 0), after.transpose(1, 2, 0)
    np.testing.assert_array_equal(after[..., -1], before[..., -1])
    np.testing.assert_array_equal(after[..., :-1], 255 - before[..., :-1])


@pytest.mark.parametrize("name", ["numpy HW3", "tensor 3HW", "pil RGB", "tv_tensor 3HW"])
def test_a_changed_result_shares_no_memory(name):
    image = BYTES[name]()
    before = values(image).copy()
    x, kind = to_engine(image)
    x.zero_()
    from_engine(x, kind)
    np.testing.assert_array_equal(values(image), before)


def test_results_saturate_and_round():
    x = torch.tensor([257.0, -1.0, 99.51, 99.49]).reshape(1, 2, 2) / 255
    _, kind = to_engine(np.zeros((2, 2), np.uint8))
    assert from_engine(x, kind).tolist() == [[255, 0], [100, 99]]
    _, kind = to_engine(torch.zeros(1, 2, 2))
    assert from_engine(x, kind).flatten()[:2].tolist() == [1.0, 0.0]


def test_grey_is_pils_luma():
    generator = np.random.default_rng(0)
    colour = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    _, kind = to_engine(Image.fromarray(np.zeros((64, 64), np.uint8)), 3)
    x, _ = to_engine(colour)
    got = np.asarray(from_engine(x, kind)).astype(int)
    expected = np.asarray(Image.fromarray(colour).convert("L")).astype(int)
    assert np.abs(got - expected).max() <= 1
    assert own_channels(x, kind).shape == (1, 64, 64)
    _, of_colour = to_engine(colour)
    assert own_channels(x, of_colour) is x


# -- as a cache holds them -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BYTES, *FLOATS])
@pytest.mark.parametrize("channels", [None, 3])
def test_from_bytes_is_from_engine(name, channels):
    image = {**BYTES, **FLOATS}[name]()
    x, kind = to_engine(image, channels)
    x = (x * 0.9 + 0.03).clamp(0, 1)
    row = to_bytes(x, kind)
    assert row.dtype == np.uint8
    assert row.flags.c_contiguous
    assert row.shape == (*x.shape[1:], channels_of(image))
    got = from_bytes(row, type_of(kind))
    colour = torch.from_numpy(row).permute(2, 0, 1).float()[: 1 if channels_of(image) < 3 else 3] / 255
    expected = from_engine(colour, kind)
    assert_same_kind(got, image)
    if kind.alpha is None or kind.dtype == torch.uint8:
        np.testing.assert_array_equal(values(got), values(expected))
    else:  # an alpha plane of floats is kept to 8 bits
        np.testing.assert_allclose(values(got), values(expected), atol=0.501 / 255)


@pytest.mark.parametrize("name", BYTES)
def test_bytes_go_through_a_cache_exactly(name):
    """Grey, colour and alpha, from and to every container."""
    image = BYTES[name]()
    x, kind = to_engine(image)
    got = from_bytes(to_bytes(x, kind), type_of(kind))
    assert_same_kind(got, image)
    np.testing.assert_array_equal(values(got), values(image))


@pytest.mark.parametrize("name", ["pil RGB", "numpy HW3", "numpy HW", "tensor 3HW", "tensor HW", "tv_tensor 4HW"])
def test_what_from_bytes_gives_is_a_copy(name):
    """A row is a view of a file that must not be written to."""
    x, kind = to_engine(BYTES[name]())
    row = to_bytes(x, kind)
    row.flags.writeable = False
    before = row.copy()
    got = from_bytes(row, type_of(kind))
    if isinstance(got, Image.Image):
        got.putpixel((0, 0), (9, 9, 9))
    else:
        got[:] = 9
    np.testing.assert_array_equal(row, before)


def test_golden_types():
    """These words stand in the files of a cache."""
    types = {name: type_of(to_engine(make())[1]) for name, make in BYTES.items()}
    some = ("pil L", "pil LA", "pil RGB", "numpy HW", "numpy HW1", "tensor 1HW", "tv_tensor 3HW")
    assert {name: types[name] for name in some} == {
        "pil L": "pil/uint8/2",
        "pil LA": "pil/uint8/3",
        "pil RGB": "pil/uint8/3",
        "numpy HW": "numpy/uint8/2",
        "numpy HW1": "numpy/uint8/3",
        "tensor 1HW": "tensor/uint8/3",
        "tv_tensor 3HW": "tv_tensor/uint8/3",
    }
    assert type_of(to_engine(np.zeros((2, 2), np.float64))[1]) == "numpy/float64/2"
    assert type_of(to_engine(torch.zeros(3, 2, 2, dtype=torch.bfloat16))[1]) == "tensor/bfloat16/3"
    assert [pil_mode(c) for c in (1, 2, 3, 4)] == ["L", "LA", "RGB", "RGBA"]


@pytest.mark.parametrize("name", [*BYTES, *FLOATS])
@pytest.mark.parametrize("channels", [None, 3])
def test_as_stored_is_to_engine_without_floats(name, channels):
    image = {**BYTES, **FLOATS}[name]()
    x, kind = as_stored(image, channels)
    want, other = to_engine(image, channels)
    assert x.dtype == (torch.uint8 if name in BYTES else torch.float32)
    assert x.is_contiguous()
    assert torch.equal(x.float() / 255 if x.dtype == torch.uint8 else x, want)
    assert type_of(kind) == type_of(other)
    assert (kind.channels, kind.planar) == (other.channels, other.planar)


@pytest.mark.parametrize("name", ["pil LA", "pil RGBA", "numpy HW4", "tensor 4HW float"])
def test_an_image_with_alpha_keeps_its_size(name):
    image = {**BYTES, "tensor 4HW float": lambda: chw(4) / 255}[name]()
    x, kind = to_engine(image)
    for give_back in (to_bytes, from_engine):
        with pytest.raises(InputError, match=r"Got \(16, 16\), purified to \(8, 8\)"):
            give_back(x[:, :8, :8], kind)


def test_other_sizes_come_back_in_their_own():
    for name in ("pil RGB", "pil L", "numpy HW", "numpy HW3", "tensor 3HW", "tv_tensor 1HW"):
        x, kind = to_engine(BYTES[name]())
        part = x[:, :8, :5]
        got = from_bytes(to_bytes(part, kind), type_of(kind))
        np.testing.assert_array_equal(values(got), values(from_engine(part, kind)))


# -- what is refused -------------------------------------------------------------------------------------


def with_value(value: float, array: bool = False) -> Any:
    x = torch.full((3, 4, 4), 0.5)
    x[1, 2, 3] = value
    return x.permute(1, 2, 0).numpy() if array else x


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("I;16", (4, 4)), r"Got 'I;16'\. Scale its levels to 8 bits"),
        (Image.new("P", (4, 4)), r"mode must be one of L, LA, RGB, RGBA\. Got 'P'"),
        (Image.new("CMYK", (4, 4)), "Got 'CMYK'"),
        (Image.new("1", (4, 4)), "Got '1'"),
        (Image.new("I;16", (4, 4)), "Got 'I;16'"),
        (with_value(float("nan")), "Got NaN or infinity"),
        (with_value(float("inf")), "Got NaN or infinity"),
        (with_value(float("nan"), array=True), "Got NaN or infinity"),
        (with_value(1.001), r"from 0\.5 to 1\.001"),
        (with_value(-0.001), r"from -0\.001 to 0\.5"),
        (with_value(255.0, array=True), "divide 0-255 floats by 255"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), r"Got torch\.int64"),
        (torch.zeros(3, 4, 4, dtype=torch.bool), r"Got torch\.bool"),
        (np.zeros((4, 4, 3), np.int64), "Got int64"),
        (np.zeros((4, 4, 3), np.uint16), "Got uint16"),
        (np.zeros((4, 4), bool), "Got bool"),
        (torch.zeros(8, 8, 3), r"permute it to \(C, H, W\)"),
        (np.zeros((3, 8, 8), np.uint8), r"transpose it to \(H, W, C\)"),
        (torch.zeros(5, 8, 8), r"Got \(5, 8, 8\)"),
        (np.zeros((8, 8, 5), np.uint8), r"Got \(8, 8, 5\)"),
        (torch.zeros(1, 3, 8, 8), r"Got \(1, 3, 8, 8\)"),
        (np.zeros(8, np.uint8), r"Got \(8,\)"),
        (torch.zeros(3, 0, 8), "at least one pixel"),
        (np.zeros((8, 0, 3), np.uint8), "at least one pixel"),
        ("cat.png", "Got str"),
        (None, "Got NoneType"),
        ([[0, 1]], "Got list"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_is_no_image(image, message):
    for take in (to_engine, as_stored):
        with pytest.raises(InputError, match=message):
            take(image)


def test_colour_for_a_grey_purifier():
    assert to_engine(np.zeros((4, 4), np.uint8), 1)[0].shape == (1, 4, 4)
    with pytest.raises(InputError, match="1 channel"):
        to_engine(np.zeros((4, 4, 3), np.uint8), 1)


def test_is_image():
    assert all(is_image(make()) for make in BYTES.values())
    assert not any(is_image(v) for v in (3, "a", None, torch.tensor(3), np.zeros(4), torch.zeros(1, 3, 4, 4)))
