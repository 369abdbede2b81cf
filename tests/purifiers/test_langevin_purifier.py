"""Langevin as a purifier: the same pixels whatever surrounds an image, its configuration, and what it refuses.

One step against its formula is tested in test_langevin.py.
"""

from __future__ import annotations

import copy
import json
import multiprocessing

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from purifyloader import PurifiedDataset, recipes
from purifyloader.core import noise
from purifyloader.core.images import quantize
from purifyloader.energy import langevin
from purifyloader.errors import ConfigError, InputError, PurifyError
from purifyloader.purifiers import DenoiseOnce, Diffuse, Langevin, Tiles
from tests.conftest import PictureDataset, random_images, tiny_denoiser, tiny_energy

COUNT = 37


@pytest.fixture(scope="module")
def x() -> Tensor:
    return random_images(COUNT).float() / 255


@pytest.fixture(scope="module")
def seeds() -> Tensor:
    return noise.image_keys(0, 0, range(COUNT))


def purifier(**options) -> Langevin:
    return Langevin(tiny_energy(), **{"steps": 3, "compute_batch": 16, **options})


# -- the same pixels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_give_the_same_pixels(context):
    # a worker of the server is there in a tenth of a second, and unpickles the dataset as a spawned one does
    multiprocessing.set_forkserver_preload(["tests.conftest", "purifyloader.purified.dataset"])
    dataset = PurifiedDataset(PictureDataset(random_images(9, 8)), purifier(dtype="bfloat16"))
    expected = dataset.__getitems__(range(9))
    loader = DataLoader(dataset, 2, num_workers=2, multiprocessing_context=context, collate_fn=list)
    got = [item for batch in loader for item in batch]
    assert [image.tobytes() for image, _ in got] == [image.tobytes() for image, _ in expected]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_it_is_the_walk_with_the_noise_of_each_seed(dtype, tolerance, x, seeds):
    got = purifier(dtype=dtype)(x[:4], seeds[:4])
    energy = tiny_energy().requires_grad_(False)
    want = langevin(energy, x[:4], 3, lambda step: noise.normal(seeds[:4], x.shape[1:], step))
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
    assert not torch.equal(got, purifier(dtype=dtype)(x[:4], seeds[4:8]))


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_saturated_pixels_saturate_and_do_not_wrap(level, seeds):
    """Half of the noise falls outside of [0, 1]: cut off there, not taken modulo 256."""
    energy = tiny_energy()
    with torch.no_grad():
        energy.readout.weight.zero_()  # no gradient: the noise alone
    steps = 50
    out = Langevin(energy, steps)(torch.full((4, 3, 16, 16), level), seeds[:4])
    assert out.min() < 0 or out.max() > 1
    levels = quantize(out).int()
    assert ((levels - round(255 * level)).abs() < 6 * 255 * 0.00625 * steps**0.5).all()
    assert 0.4 < float((levels == round(255 * level)).float().mean()) < 0.65


# -- frozen, and differentiable ----------------------------------------------------------------------


def test_the_energy_model_is_left_alone(x, seeds):
    energy = tiny_energy().requires_grad_(True).train()
    before = copy.deepcopy(energy.state_dict())
    washes = Langevin(energy, 2, dtype="bfloat16")
    out = washes(x[:2].clone().requires_grad_(True), seeds[:2])
    assert not out.requires_grad
    assert not any(p.requires_grad or p.grad is not None for p in washes.parameters())
    assert not any(module.training for module in washes.train().modules())
    assert energy.training
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in energy.parameters())
    assert all(torch.equal(value, before[key]) for key, value in energy.state_dict().items())


@pytest.mark.parametrize("compiled", [False, True])
def test_purify_with_grad_differentiates_the_walk(compiled, seeds):
    washes = Langevin(tiny_energy(), 2, temperature=1e-2, compile=compiled)
    images = (random_images(2, 8).float() / 255).requires_grad_(True)
    out = washes.purify_with_grad(images, seeds[:2])
    weights = torch.linspace(-1, 1, out[0].numel()).reshape(out[0].shape)
    (out[0] * weights).sum().backward()
    assert images.grad is not None
    assert images.grad[1].abs().sum() == 0
    assert not compiled or not washes._compiled.compiled
    assert torch.equal(out.detach(), Langevin(tiny_energy(), 2, temperature=1e-2)(images.detach(), seeds[:2]))

    exact = images.detach().double().requires_grad_(True)
    walked = langevin(
        tiny_energy().double().requires_grad_(False),
        exact,
        2,
        lambda step: noise.normal(seeds[:2], (3, 8, 8), step).double(),
        temperature=1e-2,
    )
    (walked[0] * weights).sum().backward()
    torch.testing.assert_close(images.grad.double(), exact.grad, atol=1e-5, rtol=1e-4)
    # the network is piecewise linear: between its kinks the walk moves an image and its neighbours alike
    torch.testing.assert_close(images.grad[0], weights, atol=1e-3, rtol=0)


# -- configuration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16"}, {"compile": True}, {"step_size": 0.01, "temperature": 1}, {"steps": 1}]
)
def test_json_builds_back_the_same_purifier(options, x, seeds):
    washes = purifier(**options)
    again = recipes.from_json(washes.to_json(), tiny_energy())
    assert again.to_json() == washes.to_json()
    if not options.get("compile"):
        assert torch.equal(again(x[:3], seeds[:3]), washes(x[:3], seeds[:3]))


def test_everything_but_the_name_is_identity():
    named = tiny_energy()
    named.name = "somebody's"
    assert Langevin(named, 3, compute_batch=16).identity() == purifier().identity()
    others = [
        purifier(steps=4),
        purifier(step_size=0.01),
        purifier(temperature=1.0),
        purifier(dtype="bfloat16"),
        purifier(compute_batch=17),
        purifier(compile=True),
        Langevin(tiny_energy(seed=1), 3, compute_batch=16),
    ]
    identities = [json.dumps(washes.identity()) for washes in (purifier(), *others)]
    assert len(set(identities)) == len(identities)


# -- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda e, d: Langevin(d), InputError, r"Got NetworkDenoiser\. A denoiser goes into Diffuse and DenoiseOnce"),
        (lambda e, d: Langevin(torch.nn.Identity()), InputError, "energy model.* Got Identity"),
        (lambda e, d: Langevin("cifar10-energy"), InputError, "energy model.* Got str"),
        (lambda e, d: DenoiseOnce(e, 0.1), InputError, r"Got EnergyNetwork\. An energy model goes into Langevin"),
        (lambda e, d: Diffuse(e, sigma=0.1), InputError, "takes a denoiser"),
        (lambda e, d: Langevin(e, 0), ConfigError, "steps.* Got 0"),
        (lambda e, d: Langevin(e, 1.5), ConfigError, r"steps.* Got 1\.5"),
        (lambda e, d: Langevin(e, 1, step_size=0), ConfigError, "step_size.* Got 0"),
        (lambda e, d: Langevin(e, 1, temperature=0), ConfigError, "temperature.* Got 0"),
        (lambda e, d: Langevin(e, 1, temperature=float("nan")), ConfigError, "temperature.* Got nan"),
        (lambda e, d: Langevin(e, 1, dtype="float16"), ConfigError, "dtype.* Got 'float16'"),
        (lambda e, d: Langevin(e, 1, compute_batch=0), ConfigError, "compute_batch.* Got 0"),
        (lambda e, d: Langevin(e, 1, compile="max"), ConfigError, "compile.* Got 'max'"),
    ],
)
def test_bad_configurations(make, error, message):
    with pytest.raises(error, match=message):
        make(tiny_energy(), tiny_denoiser())


def test_bad_images(seeds):
    washes = purifier()
    with pytest.raises(InputError, match=r"3 channels. Got \(1, 1, 8, 8\)"):
        washes(torch.zeros(1, 1, 8, 8), seeds[:1])
    with pytest.raises(InputError, match="at least 4"):
        washes(torch.zeros(1, 3, 3, 8), seeds[:1])
    with pytest.raises(InputError, match="NaN"):
        washes(torch.full((1, 3, 8, 8), torch.nan), seeds[:1])
    assert washes(torch.zeros(0, 3, 8, 8), seeds[:0]).shape == (0, 3, 8, 8)


def test_an_energy_that_drives_images_away_is_an_error(x, seeds):
    with pytest.raises(PurifyError, match=r"Got values .* after 3"):
        Langevin(tiny_energy(), 3, temperature=1e-12)(x[:2], seeds[:2])


def test_what_torch_says_of_gradients_in_a_fork_names_both_ways_out(x, seeds, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing.")

    monkeypatch.setattr("purifyloader.purifiers.langevin.langevin", refuse)
    with pytest.raises(PurifyError, match=r"cache= folder.*spawn"):
        purifier()(x[:1], seeds[:1])


def test_in_tiles(x, seeds):
    whole = Tiles(purifier(), 8)(x[:3], seeds[:3])
    assert torch.equal(Tiles(purifier(), 8)(x[2:3], seeds[2:3]), whole[2:3])


def test_another_energy_with_the_same_shape_is_another_purifier(x, seeds):
    other = Langevin(tiny_energy(seed=1), 3, compute_batch=16)
    assert not torch.equal(other(x[:1], seeds[:1]), purifier()(x[:1], seeds[:1]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(dtype, x, seeds):
    washes = purifier(dtype=dtype)
    on_cpu = washes(x, seeds)
    washes.cuda()
    whole = washes(x.cuda(), seeds)
    for size in range(1, COUNT + 1):
        assert torch.equal(washes(x[:size].cuda(), seeds[:size]), whole[:size])
    assert (whole.cpu() - on_cpu).abs().max() < (1e-4 if dtype == "float32" else 0.05)
