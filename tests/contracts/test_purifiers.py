"""Every purifier keeps the contract: the pixels of an image are a function of (weights, configuration, seed, image).

A new purifier adds a row to `CASES`.
"""

from __future__ import annotations

import copy
import functools
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from purifyloader import recipes
from purifyloader.certify.noising import says_what_it_does_first
from purifyloader.core import noise
from purifyloader.core.devices import exact_arithmetic
from purifyloader.core.images import quantize
from purifyloader.diffusion.schedule import CosineSchedule
from purifyloader.errors import CheckpointError, ConfigError, InputError
from purifyloader.files.atomic import canonical_json
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.kinds import kind_of
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
from purifyloader.purifiers.base import KINDS, models_in, without_functions
from purifyloader.recipes.registry import describe
from tests import processes
from tests.conftest import plain_denoiser, random_images, slim_denoiser, tiny_denoiser, tiny_energy

COUNT, SIZE, BATCH = 18, 12, 8


class Case(NamedTuple):
    """A purifier of tiny models.

    Attributes:
        golden: what its configuration must be for ever, for cached fingerprints hang on it; with "DENOISER", "SLIM"
            and "ENERGY" in the place of the models. None for a second setting of a kind.
        draws: another seed gives other pixels.
        differentiable: `purify_with_grad` has gradients that are not 0 everywhere.
    """

    make: Callable[[], Purifier]
    golden: dict[str, Any] | None = None
    draws: bool = True
    differentiable: bool = True


def once(dtype: str = "float32", sigma: float = 0.1) -> DenoiseOnce:
    return DenoiseOnce(slim_denoiser(), sigma, dtype=dtype, compute_batch=BATCH)


def walk(dtype: str = "float32", channels: int = 3, steps: int = 2) -> Langevin:
    return Langevin(tiny_energy(channels), steps, dtype=dtype, compute_batch=BATCH)


def where(purifier: Purifier, threshold: float = 0.005) -> Where:
    return Where(EnergyAbove(tiny_energy(), threshold, compute_batch=BATCH), purifier)


ONCE = {
    "kind": "denoise-once",
    "sigma": 0.1,
    "sigma_px": 25.5,
    "denoiser": "SLIM",
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
    "denoise-once": Case(
        lambda: DenoiseOnce(tiny_denoiser(), 0.1, compute_batch=BATCH), {**ONCE, "denoiser": "DENOISER"}
    ),
    "denoise-once, bf16": Case(lambda: once("bfloat16")),
    "denoise-once, plain": Case(lambda: DenoiseOnce(plain_denoiser(), 0.1, compute_batch=BATCH)),
    "denoise-once, plain, bf16": Case(
        lambda: DenoiseOnce(plain_denoiser(), 0.1, dtype="bfloat16", compute_batch=BATCH)
    ),
    "diffuse": Case(
        lambda: Diffuse(slim_denoiser(), t=100, steps=4, compute_batch=BATCH),
        {
            "kind": "diffuse",
            "t": 100,
            "sigma_px": 6.3665,
            "steps": 4,
            "schedule": {"kind": "cosine", "timesteps": 4000},
            "sampler": "ancestral",
            "denoiser": "SLIM",
            "dtype": "float32",
            "compute_batch": BATCH,
        },
    ),
    "diffuse, bf16": Case(lambda: Diffuse(slim_denoiser(), sigma=0.1, steps=2, dtype="bfloat16", compute_batch=BATCH)),
    "diffuse, ddim": Case(lambda: Diffuse(slim_denoiser(), t=90, steps=3, sampler="ddim", compute_batch=BATCH)),
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


def pixels_of(purifier: Purifier) -> Tensor:
    """All images purified in one call, which the tests compare with other calls."""
    torch.manual_seed(1)
    return purifier(images(purifier), SEEDS)


@functools.cache
def made(name: str) -> Purifier:
    return CASES[name].make()


@functools.cache
def purified(name: str) -> Tensor:
    return pixels_of(made(name))


@pytest.fixture(scope="module", params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def case(name) -> Case:
    return CASES[name]


@pytest.fixture(scope="module")
def purifier(name) -> Purifier:
    return made(name)


@pytest.fixture(scope="module")
def whole(name) -> Tensor:
    return purified(name)


COMPILED: dict[str, Callable[..., Purifier]] = {
    "denoise-once": partial(DenoiseOnce, tiny_denoiser(), 0.1),
    "denoise-once, plain": partial(DenoiseOnce, plain_denoiser(), 0.1),
    "diffuse": partial(Diffuse, slim_denoiser(), sigma=0.1, steps=3),
    "langevin": partial(Langevin, tiny_energy(), 2),
}


@pytest.mark.parametrize("name", COMPILED)
def test_to_be_compiled_is_part_of_its_configuration(name):
    eager, compiled = COMPILED[name](), COMPILED[name](compile=True)
    again = recipes.from_json(compiled.to_json(), [tiny_denoiser(), plain_denoiser(), slim_denoiser(), tiny_energy()])
    assert again.to_json() == compiled.to_json()
    assert again.identity() == compiled.identity() != eager.identity()
    x = images(eager, 2).requires_grad_(True)  # with gradients it runs as it is
    assert torch.equal(compiled.purify_with_grad(x, SEEDS[:2]), eager.purify_with_grad(x, SEEDS[:2]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_does_the_same(name, dtype):
    eager, compiled = (COMPILED[name](dtype=dtype, compile=flag) for flag in (False, True))
    near = partial(torch.testing.assert_close, atol=1e-5 if dtype == "float32" else 0.03, rtol=0)
    whole = pixels_of(compiled)
    near(whole, pixels_of(eager))
    x = images(compiled)
    for size in (1, 16, COUNT):
        assert torch.equal(compiled(x[:size], SEEDS[:size]), whole[:size])
    for again in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(again(x[:3], SEEDS[:3]), whole[:3])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["denoise-once, plain", "langevin"])
def test_compiled_it_takes_more_shapes_than_torch_compiles_one_function_for(name):
    eager, compiled = (COMPILED[name](compile=flag) for flag in (False, True))
    whole = pixels_of(compiled)
    sizes = [torch.full((3, 4, size), 0.5) for size in range(4, 14)]
    results = (purifier.purify_images(sizes, SEEDS[:10]) for purifier in (compiled, eager))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert torch.equal(compiled(images(compiled)[:3], SEEDS[:3]), whole[:3]), "none changes another's pixels"


# All that decides what the tiny models compute beside their weights: fingerprints hang on it.
TINY_FUNCTION: dict[str, Any] = {
    "class": "NetworkDenoiser",
    "parameterization": "edm",
    "sigma_range": [0.001, 0.3],
    "schedule": None,
    "time": "rescaled",
    "network": {
        "kind": "unet",
        "channels": 8,
        "multipliers": [1.0, 2.0],
        "blocks": 1,
        "attention_levels": [],
        "middle_attention": False,
        "heads": 4,
        "norm_groups": 4,
        "dropout": 0.0,
        "image_channels": 3,
        "learned_variance": False,
        "scale_shift": True,
        "head_channels": None,
        "up_attention": "each",
        "resample": "conv",
        "rescale_sums": False,
        "norm_eps": 1e-05,
        "norm_group_channels": None,
        "sines_first": False,
        "frequency_shift": 0.0,
        "stem_channels": None,
    },
}
SLIM_NETWORK = {"channels": 4, "multipliers": [1.0], "norm_groups": 2}
ENERGY_FUNCTION = {
    "class": "EnergyNetwork",
    "network": {"kind": "resnet", "channels": 8, "image_channels": 3},
    "temperature": 0.0001,
}


def with_models(config: Any, functions: bool = True) -> Any:
    """The golden configuration with the entries of the tiny models, as schema 1 had them where `functions` is False."""
    entries = {
        "DENOISER": (tiny_denoiser(), TINY_FUNCTION),
        "SLIM": (slim_denoiser(), {**TINY_FUNCTION, "network": {**TINY_FUNCTION["network"], **SLIM_NETWORK}}),
        "ENERGY": (tiny_energy(), ENERGY_FUNCTION),
    }
    text = json.dumps(config)
    for name, (model, function) in entries.items():
        entry = {"name": None, "weights_sha256": weights_sha256(model), **({"function": function} if functions else {})}
        text = text.replace(f'"{name}"', json.dumps(entry))
    return json.loads(text)


def test_every_kind_has_a_row_with_a_golden_configuration():
    assert {case.golden["kind"] for case in CASES.values() if case.golden is not None} == set(KINDS)


# -- the same pixels ---------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_batch(purifier, whole):
    x = images(purifier)
    assert whole.dtype == torch.float32
    assert whole.is_contiguous()
    for size in (BATCH + 1, 16):  # on the CPU 16 images at least are one call
        assert torch.equal(purifier(x[:size], SEEDS[:size]), whole[:size]), f"batch size {size}"
    assert torch.equal(purifier(x[-1:], SEEDS[-1:]), whole[-1:])
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))[:17]
    shuffled = x[order].contiguous(memory_format=torch.channels_last)
    assert torch.equal(purifier(shuffled, SEEDS[order]), whole[order])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 3, 6, 8, 16])
def test_an_image_does_not_depend_on_the_number_of_threads(purifier, whole, count):
    x, few = images(purifier), slice(COUNT - BATCH - 1, COUNT)
    with threads(count):
        assert torch.equal(purifier(x[few], SEEDS[few]), whole[few])


def flushing() -> Iterator[None]:
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


def without(*switches: Callable[[bool], Any]) -> Iterator[None]:
    for switch in switches:
        switch(False)
    yield
    for switch in switches:
        switch(True)


CUDA = torch.backends.cuda  # where torch keeps the switches of attention, of the CPU's too

# What the script around has set, and puts back.
SCRIPTS: dict[str, Callable[[], Any]] = {
    "no oneDNN": contextmanager(lambda: without(torch._C._set_mkldnn_enabled)),
    "no fused attention": contextmanager(lambda: without(CUDA.enable_flash_sdp, CUDA.enable_mem_efficient_sdp)),
    "no plain attention": contextmanager(lambda: without(CUDA.enable_math_sdp)),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64 by default": contextmanager(lambda: default_dtype(torch.float64)),
    "bfloat16 by default": contextmanager(lambda: default_dtype(torch.bfloat16)),
    "denormals are 0": contextmanager(flushing),
    "another default device": lambda: torch.device("meta"),  # as a GPU: what is made without a device goes there
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_image_does_not_depend_on_the_settings_of_the_script(purifier, whole, script):
    x, few = images(purifier), slice(COUNT - BATCH - 1, COUNT)
    with SCRIPTS[script]():
        got = purifier(x[few], SEEDS[few])
    assert torch.equal(got, whole[few])


def test_of_three_threads_two_are_used():
    """Three give other bits, where the images are large enough for all of them."""
    with threads(3), exact_arithmetic(torch.device("cpu")):
        assert torch.get_num_threads() == 2


def test_images_of_many_sizes_are_each_what_they_are_alone(purifier, whole):
    x = images(purifier)
    mixed = [x[0], x[1, :, :11, :9], x[2], x[3, :, :, :9], x[4, :, :11, :9]]
    out = purifier.purify_images(mixed, SEEDS[:5])
    for i, (image, seed, got) in enumerate(zip(mixed, SEEDS[:5], out, strict=True)):
        alone = whole[i] if image.shape == x[0].shape else purifier(image[None], seed[None])[0]
        assert torch.equal(got, alone)
        assert got.shape == purifier.output_shape(tuple(image.shape))
    assert purifier.purify_images([], SEEDS[:0]) == []


def test_an_empty_batch_comes_back_empty(purifier):
    empty = images(purifier)[:0]
    shape = purifier.output_shape(tuple(empty.shape[1:]))
    assert purifier(empty, SEEDS[:0]).shape == (0, *shape)


def test_the_seed_decides_what_is_drawn_and_nothing_else_does(case, purifier, whole):
    x = images(purifier, BATCH)
    torch.manual_seed(2)
    assert torch.equal(purifier(x, SEEDS[:BATCH]), whole[:BATCH])
    assert torch.equal(purifier(x, SEEDS[:BATCH].flip(0)), whole[:BATCH]) is not case.draws


def test_pixels_change(purifier, whole):
    assert not torch.equal(whole, images(purifier))


def test_values_outside_of_the_range_give_finite_pixels(purifier):
    """Between the stages of a chain nothing is clamped."""
    levels = torch.tensor([-0.2, 1.2]).view(2, 1, 1, 1)
    with torch.no_grad():
        out = purifier.run(levels.expand(2, purifier.image_channels or 3, 8, 8), SEEDS[:2])
    assert out.isfinite().all()
    assert quantize(out).dtype == torch.uint8


# -- configuration -----------------------------------------------------------------------------------


def test_golden_json(case, purifier):
    if case.golden is not None:
        assert json.loads(purifier.to_json()) == {"schema": 2, "purifier": with_models(case.golden)}


def test_golden_json_of_schema_1_is_still_read(case, purifier):
    if case.golden is not None:
        old = canonical_json({"schema": 1, "purifier": with_models(case.golden, functions=False)})
        again = recipes.from_json(old, [tiny_denoiser(), slim_denoiser(), tiny_energy()])
        assert again.to_json() == purifier.to_json()


def test_json_builds_back_the_same_purifier(purifier, whole):
    again = recipes.from_json(
        purifier.to_json(), [tiny_denoiser(), slim_denoiser(), plain_denoiser(), tiny_energy(), tiny_energy(1)]
    )
    assert type(again) is type(purifier)
    assert again.to_json() == purifier.to_json()
    assert again.identity() == purifier.identity()
    assert torch.equal(again(images(purifier, BATCH), SEEDS[:BATCH]), whole[:BATCH])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda purifier: pickle.loads(pickle.dumps(purifier))])
def test_a_copy_gives_the_same_pixels(purifier, whole, copied):
    again = copied(purifier)
    assert again.to_json() == purifier.to_json()
    assert torch.equal(again(images(purifier, 3), SEEDS[:3]), whole[:3])


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


def public(purifier: nn.Module) -> list[str]:
    return [name for name in vars(purifier) if name[0] != "_" and name != "training"] + [*purifier._modules]


def test_nothing_is_set_on_it(purifier):
    text = purifier.to_json()
    for part in purifier.modules():
        for name in [*public(part), "run", "forward", "config", "anything"] if hasattr(part, "unchanged") else ():
            with pytest.raises(ConfigError, match=rf"Got a change of {name}: make a new {type(part).__name__}"):
                setattr(part, name, 1)
            with pytest.raises(ConfigError, match=f"Got a change of {name}"):
                delattr(part, name)
    with pytest.raises(ConfigError, match="Got a change of its weights"):
        purifier.load_state_dict(purifier.state_dict())
    assert purifier.to_json() == text


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float64),
    "to a dtype": lambda m: m.to(torch.float16),
    "to a device and a dtype": lambda m: m.to("cpu", torch.float64),
    "like a tensor": lambda m: m.to(torch.zeros(1, dtype=torch.float64)),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
}


def test_it_is_not_converted(purifier, whole):
    before = copy.deepcopy(purifier.state_dict())
    for cast in CASTS.values():
        for held in (purifier, nn.Sequential(purifier)):
            with pytest.raises(ConfigError, match="Got a conversion to another"):
                cast(held)
    after = purifier.state_dict()
    assert all(value.dtype == before[key].dtype and torch.equal(value, before[key]) for key, value in after.items())
    assert torch.equal(purifier.to("cpu").cpu()(images(purifier, 2), SEEDS[:2]), whole[:2])


def test_what_is_changed_inside_is_noticed(case):
    """A setting, behind the back of `__setattr__`; a weight, a layer's setting and a hook of a network."""
    first = case.make()
    settings = [name for name in public(first) if name not in ("planned", "image_channels", *first._modules)]
    changes: list[Callable[[Any], object]] = [functools.partial(put_behind, name) for name in settings]
    changes += CHANGES_OF_A_NETWORK if [*first.parameters()] else []
    x = images(first, 2)
    for change in changes:
        made = case.make()
        for changed in (made, copy.deepcopy(made)):
            change(changed)
            for call in (lambda p: p(x, SEEDS[:2]), lambda p: p.purify_images(list(x), SEEDS[:2])):
                with pytest.raises(ConfigError, match=r"Got one that was changed since \(then → now\):\n  "):
                    call(changed)


def put_behind(name: str, purifier: nn.Module) -> None:
    vars(purifier)[name] = 12345


CHANGES_OF_A_NETWORK: list[Callable[[Any], object]] = [
    lambda made: next(made.parameters()).add_(1),
    lambda made: next(made.parameters()).data.mul_(1.5),
    lambda made: setattr(convolution(made), "padding_mode", "circular"),
    lambda made: convolution(made).register_forward_hook(lambda module, x, y: 2 * y),
]


def convolution(purifier: nn.Module) -> Any:
    return next(module for module in purifier.modules() if isinstance(module, nn.Conv2d))


def test_the_same_weights_with_another_function_are_another_purifier(case, monkeypatch):
    golden = case.make().identity()
    if not any(True for _ in models_in(golden)):
        return
    models = {name: globals()[name] for name in ("tiny_denoiser", "slim_denoiser", "plain_denoiser", "tiny_energy")}

    def changed(make: Callable[..., Any], change: Callable[[Any], Any], *arguments: Any) -> Any:
        return change(make(*arguments))

    for change in (with_another_layer, with_another_setting):
        with monkeypatch.context() as patch:
            for name, make in models.items():
                patch.setitem(globals(), name, functools.partial(changed, make, change))
            other = case.make()
        assert without_functions(other.identity()) == without_functions(golden)
        assert other.identity() != golden
        with pytest.raises(CheckpointError, match="computes otherwise"):
            recipes.from_json(
                other.to_json(), [tiny_denoiser(), slim_denoiser(), plain_denoiser(), tiny_energy(), tiny_energy(1)]
            )


def with_another_layer(model: Any) -> Any:
    convolution(model).padding_mode = "circular"
    return model


def with_another_setting(model: Any) -> Any:
    if kind_of(model).name == "denoiser":
        model.schedule = CosineSchedule(4000)
    else:
        model.blocks[0].first = False
    return model


def test_gradients_of_an_image_are_its_own(case, purifier, whole):
    x = images(purifier, 2).requires_grad_(True)
    out = purifier.purify_with_grad(x, SEEDS[:2])
    assert torch.equal(out.detach(), whole[:2])
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
    "a little above 1": (lambda c: torch.full((2, c, 8, 8), 1.01), SEED, r"up to 0\.01 outside\. Bicubic"),
    "channels last": (lambda c: torch.zeros(2, 8, 8, c), SEED, r"channels\. Got \(2, 8, 8, [13]\)"),
    "levels to 255": (lambda c: torch.full((2, c, 8, 8), 255.0), SEED, "divide 0-255"),
    "too many seeds": (lambda c: torch.zeros(2, c, 8, 8), torch.zeros(3, dtype=torch.int64), r"shape \(2,\)"),
    "seeds that are floats": (lambda c: torch.zeros(2, c, 8, 8), torch.zeros(2), "int64"),
}


def test_an_overshoot_in_the_last_bits_is_clamped(case, purifier):
    """As blurs of floats have it: what comes out is that of the clamped image."""
    x = images(purifier, 2).clone()
    x[:, :, 0, :2] = torch.tensor([1.0, 0.0])
    over = x.clone()
    over[:, :, 0, :2] += torch.tensor([9e-5, -9e-5])
    assert torch.equal(purifier(over, SEEDS[:2]), purifier(x, SEEDS[:2]))
    each = zip(purifier.purify_images(list(over), SEEDS[:2]), purifier.purify_images(list(x), SEEDS[:2]), strict=True)
    assert all(torch.equal(a, b) for a, b in each)
    if case.differentiable:
        assert torch.equal(
            purifier.purify_with_grad(over.requires_grad_(True), SEEDS[:2]).detach(), purifier(x, SEEDS[:2])
        )


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


def pixels_of_all(count: int) -> dict[str, bytes]:
    """What a process of so many threads makes of three images with every purifier."""
    torch.set_num_threads(count)
    purifiers = {name: case.make() for name, case in CASES.items()}
    return {name: p(images(p)[3:6], SEEDS[3:6]).numpy().tobytes() for name, p in purifiers.items()}


def test_another_process_gives_the_same_pixels():
    done = processes.run(pixels_of_all, 2)
    assert done.returncode == 0, done.stderr
    assert done.value == {name: purified(name)[3:6].numpy().tobytes() for name in CASES}


class EveryPurifier(Dataset):
    """One image with each of them, made where the dataset was."""

    def __init__(self) -> None:
        self.purifiers = [made(name) for name in CASES]

    def __getitem__(self, index: int) -> bytes:
        purifier = self.purifiers[index]
        return purifier(images(purifier)[3:4], SEEDS[3:4]).numpy().tobytes()

    def __len__(self) -> int:
        return len(self.purifiers)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_give_the_same_pixels():
    loader = DataLoader(EveryPurifier(), None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == [purified(name)[3:4].numpy().tobytes() for name in CASES]


def check_all(case: Case) -> None:
    """Run the contract on a purifier that was installed after the tests were collected."""
    purifier = case.make()
    whole = pixels_of(purifier)
    test_an_image_does_not_depend_on_its_batch(purifier, whole)
    test_images_of_many_sizes_are_each_what_they_are_alone(purifier, whole)
    test_an_empty_batch_comes_back_empty(purifier)
    test_the_seed_decides_what_is_drawn_and_nothing_else_does(case, purifier, whole)
    test_pixels_change(purifier, whole)
    test_json_builds_back_the_same_purifier(purifier, whole)
    test_a_copy_gives_the_same_pixels(purifier, whole, copy.deepcopy)
    test_a_certificate_is_decided_upon(purifier)
    test_it_is_frozen(purifier)
    test_nothing_is_set_on_it(purifier)
    test_it_is_not_converted(purifier, whole)
    test_what_is_changed_inside_is_noticed(case)
    test_gradients_of_an_image_are_its_own(case, purifier, whole)
    for bad in BAD_CALLS:
        test_bad_calls(purifier, bad)
