"""Every purifier keeps the contract: the pixels of an image are a function of (weights, configuration, seed, image).

A new purifier adds a row to `CASES`.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from purifyloader import recipes
from purifyloader.certify.noising import says_what_it_does_first
from purifyloader.core import noise
from purifyloader.core.images import quantize
from purifyloader.errors import InputError
from purifyloader.files.weights import weights_sha256
from purifyloader.purifiers import (
    BitDepth,
    Chain,
    Coin,
    Compensation,
    DenoiseOnce,
    Diffuse,
    EnergyAbove,
    Grayscale,
    Jpeg,
    Langevin,
    Purifier,
    Repeat,
    Resize,
    Tiles,
    Where,
)
from purifyloader.purifiers.base import KINDS
from purifyloader.recipes.registry import describe
from tests import processes
from tests.conftest import random_images, tiny_denoiser, tiny_energy

COUNT, SIZE, BATCH = 18, 12, 8


class Case(NamedTuple):
    """A purifier of tiny models.

    Attributes:
        golden: what its configuration must be for ever, for cached fingerprints hang on it; with "DENOISER" and
            "ENERGY" in the place of the models. None for a second setting of a kind.
        draws: another seed gives other pixels.
        differentiable: `purify_with_grad` has gradients that are not 0 everywhere.
    """

    make: Callable[[], Purifier]
    golden: dict[str, Any] | None = None
    draws: bool = True
    differentiable: bool = True


def once(dtype: str = "float32", sigma: float = 0.1) -> DenoiseOnce:
    return DenoiseOnce(tiny_denoiser(), sigma, dtype=dtype, compute_batch=BATCH)


def walk(dtype: str = "float32", channels: int = 3, steps: int = 2) -> Langevin:
    return Langevin(tiny_energy(channels), steps, dtype=dtype, compute_batch=BATCH)


def where(purifier: Purifier, threshold: float = 0.005) -> Where:
    return Where(EnergyAbove(tiny_energy(), threshold, compute_batch=BATCH), purifier)


ONCE = {
    "kind": "denoise-once",
    "sigma": 0.1,
    "sigma_px": 25.5,
    "denoiser": "DENOISER",
    "dtype": "float32",
    "compute_batch": BATCH,
}
CASES = {
    "bit-depth": Case(lambda: BitDepth(3), {"kind": "bit-depth", "bits": 3}, False, False),
    "chain": Case(
        lambda: Chain(Jpeg(50), once(), Compensation()),
        {
            "kind": "chain",
            "stages": [
                {"kind": "jpeg", "quality": 50},
                ONCE,
                {"kind": "compensation", "p": 0.4, "sigma": 0.05, "sigma_px": 12.75},
            ],
        },
        differentiable=False,
    ),
    "coin": Case(lambda: Coin(2), {"kind": "coin", "alpha": 2.0}),
    "coin, far": Case(lambda: Coin(40)),
    "compensation": Case(Compensation, {"kind": "compensation", "p": 0.4, "sigma": 0.05, "sigma_px": 12.75}),
    "denoise-once": Case(once, ONCE),
    "denoise-once, bf16": Case(lambda: once("bfloat16")),
    "diffuse": Case(
        lambda: Diffuse(tiny_denoiser(), t=100, steps=4, compute_batch=BATCH),
        {
            "kind": "diffuse",
            "t": 100,
            "sigma_px": 6.3665,
            "steps": 4,
            "schedule": {"kind": "cosine", "timesteps": 4000},
            "sampler": "ancestral",
            "denoiser": "DENOISER",
            "dtype": "float32",
            "compute_batch": BATCH,
        },
    ),
    "diffuse, bf16": Case(lambda: Diffuse(tiny_denoiser(), sigma=0.1, steps=2, dtype="bfloat16", compute_batch=BATCH)),
    "diffuse, ddim": Case(lambda: Diffuse(tiny_denoiser(), t=90, steps=3, sampler="ddim", compute_batch=BATCH)),
    "grayscale": Case(Grayscale, {"kind": "grayscale"}, False),
    "jpeg": Case(lambda: Jpeg(7), {"kind": "jpeg", "quality": 7}, False, False),
    "langevin": Case(
        walk,
        {
            "kind": "langevin",
            "steps": 2,
            "step_size": 0.00625,
            "step_px": 1.5938,
            "temperature": 0.0001,
            "energy": "ENERGY",
            "dtype": "float32",
            "compute_batch": BATCH,
            "compile": False,
        },
    ),
    "langevin, bf16": Case(lambda: walk("bfloat16")),
    "langevin, grey": Case(lambda: walk(channels=1)),
    "repeat": Case(lambda: Repeat(once(), 3), {"kind": "repeat", "purifier": ONCE, "times": 3}),
    "repeat, mixed": Case(lambda: Repeat(Chain(walk(), once("bfloat16")), 2)),
    "resize": Case(lambda: Resize(9, 8), {"kind": "resize", "size": 9, "crop": 8}, False),
    "tiles": Case(lambda: Tiles(once(), 8), {"kind": "tiles", "purifier": ONCE, "size": 8, "overlap": 2}),
    "where": Case(
        lambda: where(Chain(Coin(), once())),
        {
            "kind": "where",
            "condition": {
                "kind": "energy-above",
                "energy": "ENERGY",
                "threshold": 0.005,
                "compute_batch": BATCH,
            },
            "purifier": {"kind": "chain", "stages": [{"kind": "coin", "alpha": 2.0}, ONCE]},
        },
    ),
}


def installed_cases() -> dict[str, Case]:
    """A case for each recipe of another distribution that has no model."""
    plugins = {name: make for name, make in recipes.RECIPES.items() if name not in recipes.RECIPES.own}
    described = {name: describe(name, make) for name, make in plugins.items()}
    rows = {name: any(row.per_epoch for row in each.rows) for name, each in described.items() if not each.models}
    return {name: Case(plugins[name], draws=draws, differentiable=False) for name, draws in rows.items()}


CASES |= installed_cases()
SEEDS = noise.image_keys(3, 1, range(COUNT))


def images(purifier: Purifier, count: int = COUNT) -> Tensor:
    return random_images(count, SIZE, channels=purifier.image_channels or 3).float() / 255


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def purifier(case) -> Purifier:
    return case.make()


def with_models(config: Any) -> Any:
    """The golden configuration with the entries of the tiny models."""
    entries = {
        "DENOISER": {"name": None, "weights_sha256": weights_sha256(tiny_denoiser())},
        "ENERGY": {"name": None, "weights_sha256": weights_sha256(tiny_energy())},
    }
    text = json.dumps(config)
    for name, entry in entries.items():
        text = text.replace(f'"{name}"', json.dumps(entry))
    return json.loads(text)


def test_every_kind_has_a_row_with_a_golden_configuration():
    assert {case.golden["kind"] for case in CASES.values() if case.golden is not None} == set(KINDS)


# -- the same pixels ---------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_batch(purifier):
    x = images(purifier)
    whole = purifier(x, SEEDS)
    assert whole.dtype == torch.float32
    assert whole.is_contiguous()
    for size in (1, BATCH + 1, 16, 17):  # on the CPU 16 images at least are one call
        assert torch.equal(purifier(x[:size], SEEDS[:size]), whole[:size]), f"batch size {size}"
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(purifier(x[order], SEEDS[order]), whole[order])
    assert torch.equal(purifier(x[-1:], SEEDS[-1:]), whole[-1:])
    assert torch.equal(purifier(x.contiguous(memory_format=torch.channels_last), SEEDS), whole)


def test_an_image_does_not_depend_on_the_number_of_threads(purifier):
    """Of three threads two are used."""
    x = images(purifier)
    whole = purifier(x, SEEDS)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        few = slice(COUNT - BATCH - 1, COUNT)
        assert torch.equal(purifier(x[few], SEEDS[few]), whole[few])
    finally:
        torch.set_num_threads(before)


def test_images_of_many_sizes_are_each_what_they_are_alone(purifier):
    x = images(purifier, 5)
    mixed = [x[0], x[1, :, :11, :9], x[2], x[3, :, :, :9], x[4, :, :11, :9]]
    out = purifier.purify_images(mixed, SEEDS[:5])
    for image, seed, got in zip(mixed, SEEDS[:5], out, strict=True):
        assert torch.equal(got, purifier(image[None], seed[None])[0])
        assert got.shape == purifier.output_shape(tuple(image.shape))
    assert purifier.purify_images([], SEEDS[:0]) == []


def test_an_empty_batch_comes_back_empty(purifier):
    empty = images(purifier)[:0]
    shape = purifier.output_shape(tuple(empty.shape[1:]))
    assert purifier(empty, SEEDS[:0]).shape == (0, *shape)


def test_the_seed_decides_what_is_drawn_and_nothing_else_does(case, purifier):
    x = images(purifier)
    torch.manual_seed(1)
    first = purifier(x, SEEDS)
    torch.manual_seed(2)
    assert torch.equal(purifier(x, SEEDS), first)
    assert torch.equal(purifier(x, SEEDS.flip(0)), first) is not case.draws


def test_pixels_change(purifier):
    x = images(purifier)
    assert not torch.equal(purifier(x, SEEDS), x)


@pytest.mark.parametrize("level", [-0.2, 1.2])
def test_values_outside_of_the_range_give_finite_pixels(purifier, level):
    """Between the stages of a chain nothing is clamped."""
    with torch.no_grad():
        out = purifier.run(torch.full((2, purifier.image_channels or 3, 8, 8), level), SEEDS[:2])
    assert out.isfinite().all()
    assert quantize(out).dtype == torch.uint8


# -- configuration -----------------------------------------------------------------------------------


def test_golden_json(case, purifier):
    if case.golden is not None:
        assert json.loads(purifier.to_json()) == {"schema": 1, "purifier": with_models(case.golden)}


def test_json_builds_back_the_same_purifier(purifier):
    again = recipes.from_json(purifier.to_json(), [tiny_denoiser(), tiny_energy(), tiny_energy(1)])
    assert type(again) is type(purifier)
    assert again.to_json() == purifier.to_json()
    assert again.identity() == purifier.identity()
    x = images(purifier)
    assert torch.equal(again(x, SEEDS), purifier(x, SEEDS))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda purifier: pickle.loads(pickle.dumps(purifier))])
def test_a_copy_gives_the_same_pixels(purifier, copied):
    x = images(purifier, 3)
    again = copied(purifier)
    assert again.to_json() == purifier.to_json()
    assert torch.equal(again(x, SEEDS[:3]), purifier(x, SEEDS[:3]))


def test_a_certificate_is_decided_upon(purifier):
    assert says_what_it_does_first(type(purifier))


# -- frozen, and differentiable ----------------------------------------------------------------------


def test_it_is_frozen(purifier):
    holder = nn.Sequential(purifier).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(parameter.requires_grad for parameter in purifier.parameters())
    before = copy.deepcopy(purifier.state_dict())
    x = images(purifier, 2).requires_grad_(True)
    assert not purifier(x, SEEDS[:2]).requires_grad
    assert all(torch.equal(value, before[key]) for key, value in purifier.state_dict().items())


def test_gradients_of_an_image_are_its_own(case, purifier):
    x = images(purifier, 2).requires_grad_(True)
    out = purifier.purify_with_grad(x, SEEDS[:2])
    assert torch.equal(out.detach(), purifier(x.detach(), SEEDS[:2]))
    if not case.differentiable:
        return
    out[0].sum().backward()
    assert x.grad is not None
    assert x.grad[0].abs().sum() > 0
    assert x.grad[1].abs().sum() == 0


# -- bad calls ---------------------------------------------------------------------------------------

SEED = torch.zeros(2, dtype=torch.int64)
BAD_CALLS = {
    "no batch": (lambda c: torch.zeros(c, 8, 8), SEED, r"\(B, C, H, W\)\. Got"),
    "bytes": (lambda c: torch.zeros(2, c, 8, 8, dtype=torch.uint8), SEED, r"Got torch\.uint8"),
    "no pixels": (lambda c: torch.zeros(2, c, 0, 8), SEED, "at least one pixel"),
    "NaN": (lambda c: torch.full((2, c, 8, 8), torch.nan), SEED, "NaN"),
    "below 0": (lambda c: torch.full((2, c, 8, 8), -0.5), SEED, r"lies in \[0, 1\]"),
    "levels to 255": (lambda c: torch.full((2, c, 8, 8), 255.0), SEED, "divide 0-255"),
    "too many seeds": (lambda c: torch.zeros(2, c, 8, 8), torch.zeros(3, dtype=torch.int64), r"shape \(2,\)"),
    "seeds that are floats": (lambda c: torch.zeros(2, c, 8, 8), torch.zeros(2), "int64"),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_calls(purifier, bad):
    make, seeds, message = BAD_CALLS[bad]
    with pytest.raises(InputError, match=message):
        purifier(make(purifier.image_channels or 3), seeds)


def test_other_channels_than_a_network_has_are_refused(purifier):
    if purifier.image_channels is not None:
        with pytest.raises(InputError, match=f"takes images of {purifier.image_channels} channels"):
            purifier(torch.zeros(2, 2, 8, 8), SEED)


# -- other processes ---------------------------------------------------------------------------------


def pixels_of_all(threads: int) -> dict[str, bytes]:
    """What a process makes of three images with every purifier."""
    torch.set_num_threads(threads)
    made = {name: case.make() for name, case in CASES.items()}
    return {name: p(images(p)[3:6], SEEDS[3:6]).numpy().tobytes() for name, p in made.items()}


def test_another_process_gives_the_same_pixels():
    done = processes.run(pixels_of_all, 2)
    assert done.returncode == 0, done.stderr
    assert done.value == pixels_of_all(1)


class EveryPurifier(Dataset):
    """One image with each of them, made where the dataset was."""

    def __init__(self) -> None:
        self.purifiers = [case.make() for case in CASES.values()]

    def __getitem__(self, index: int) -> bytes:
        purifier = self.purifiers[index]
        return purifier(images(purifier)[3:4], SEEDS[3:4]).numpy().tobytes()

    def __len__(self) -> int:
        return len(self.purifiers)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_give_the_same_pixels():
    dataset = EveryPurifier()
    loader = DataLoader(dataset, None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == [dataset[i] for i in range(len(dataset))]


def check_all(case: Case) -> None:
    """Run the contract on a purifier that was installed after the tests were collected."""
    purifier = case.make()
    test_an_image_does_not_depend_on_its_batch(purifier)
    test_images_of_many_sizes_are_each_what_they_are_alone(purifier)
    test_an_empty_batch_comes_back_empty(purifier)
    test_the_seed_decides_what_is_drawn_and_nothing_else_does(case, purifier)
    test_pixels_change(purifier)
    test_json_builds_back_the_same_purifier(purifier)
    test_a_copy_gives_the_same_pixels(purifier, copy.deepcopy)
    test_a_certificate_is_decided_upon(purifier)
    test_it_is_frozen(purifier)
    test_gradients_of_an_image_are_its_own(case, purifier)
    for bad in BAD_CALLS:
        test_bad_calls(purifier, bad)
