"""Attacks that know the defence: views that a gradient goes through, ADP, and the attack through the denoiser."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from purifyloader import pretrained, recipes
from purifyloader.core import corruptions
from purifyloader.core.images import luma
from purifyloader.diffusion.unet import UNetConfig
from purifyloader.errors import InputError
from purifyloader.poisons.attacks.adaptive import adaptive
from purifyloader.poisons.attacks.adp import adp
from purifyloader.poisons.attacks.clean import add, opened
from purifyloader.poisons.attacks.em import PRESETS as EM_PRESETS
from purifyloader.poisons.attacks.em import em, min_min
from purifyloader.poisons.attacks.presets import choose
from purifyloader.poisons.attacks.surrogate import Surrogate
from purifyloader.poisons.attacks.tap import tap
from purifyloader.poisons.attacks.views import compensated, itself, purified
from purifyloader.pretrained.kinds import identity_of
from purifyloader.victims.networks import victim
from tests.conftest import tiny_denoiser
from tests.poisons.test_surrogate_attacks import SMALL, as_batch, patterns, record, small_victims

INDEX = torch.tensor([5, 0, 9, 2])
QUICK = {
    "adp": (adp, {"rounds": 1, "train_steps": 2, "steps": 2, "batch_size": 16, "lr": 0.05, "bfloat16": False}),
    "adaptive": (adaptive, {**SMALL, "epochs": 1, "steps": 2, "sigma": 0.02}),
}
TINY = tiny_denoiser()


def quick(name, data=None, seed=0, **options):
    attack, defaults = QUICK[name]
    given = {"model": TINY} if name == "adaptive" else {}
    return attack(patterns(32) if data is None else data, seed, **{**given, **defaults, **options})


def batch(count=4, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# Views


@pytest.mark.parametrize("name", ["compensated", "purified"])
def test_a_view_is_of_seed_turn_and_index(name):
    def view(seed=0):
        if name == "compensated":
            return compensated(0.4, 0.05, seed)
        return purified(recipes.eclipse(TINY, sigma=0.05), seed)

    x = batch()
    seen = view()(x, INDEX, 3)
    assert torch.equal(seen, view()(x, INDEX, 3))
    assert torch.equal(seen[1:2], view()(x[1:2], INDEX[1:2], 3))  # whatever batch it comes in
    for other in (view()(x, INDEX, 4), view(1)(x, INDEX, 3), view()(x, INDEX + 1, 3)):
        assert float((other - seen).abs().mean()) > 0.01
    assert float(seen.min()) >= 0
    assert float(seen.max()) <= 1


def test_compensation_as_the_defence_has_it():
    x = batch(200, 8)
    seen = compensated(0.4, 0.05, 0)(x, torch.arange(200), 0)
    grey = (seen - seen.mean(dim=1, keepdim=True)).abs().mean(dim=(1, 2, 3)) < 0.1
    assert 0.3 < float(grey.float().mean()) < 0.5
    noiseless = compensated(1.0, 0.0, 0)(x, torch.arange(200), 0)
    assert torch.allclose(noiseless, luma(x).expand(-1, 3, -1, -1), atol=1e-3)
    assert torch.equal(compensated(0.0, 0.0, 0)(x, torch.arange(200), 0), x)
    for p, sigma in ((1.5, 0.05), (0.4, -1)):
        with pytest.raises(InputError):
            compensated(p, sigma, 0)
    with pytest.raises(InputError):
        corruptions.check_compensation(2, 0)


@pytest.mark.parametrize("name", ["compensated", "purified"])
def test_the_gradient_of_a_view_is_that_of_its_values(name):
    """Central differences along a random direction, away from black and white, where nothing is clamped."""
    x = 0.4 + 0.2 * batch(4, 8)
    view = compensated(0.5, 0.02, 0) if name == "compensated" else purified(recipes.eclipse(TINY, sigma=0.02), 0)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def value(x):
        return float((view(x, INDEX, 1).double() * weights).sum())

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((view(leaf, INDEX, 1) * weights).sum(), leaf)
    step = 1e-2
    numeric = (value(x + step * along) - value(x - step * along)) / (2 * step)
    assert float((gradient * along).sum()) == pytest.approx(numeric, rel=2e-2)
    assert abs(numeric) > 1


# Error-minimising noise through a view


def test_without_a_view_it_is_em():
    images, labels = patterns(32)
    options = {**SMALL, "rounds": 2, "train_steps": 2, "steps": 2, "stop_accuracy": 1.0}
    settings = choose(EM_PRESETS, "cpu", options)
    with opened((images, labels), "em", 0, "cpu", False) as clean:
        noise, measured = min_min(clean, settings, 0, "em", itself)
        made = add(clean, noise, settings.bound)
    want = em((images, labels), **options)
    assert np.array_equal(made, want.images)
    assert measured["accuracy"] == want.settings["accuracy"]


def test_adp_is_easy_to_learn_through_compensation(monkeypatch):
    networks = record(monkeypatch, inspect.getmodule(em))
    images, labels = faint = patterns(32, size=16, strength=2)
    options = {"rounds": 6, "train_steps": 10, "steps": 3, "batch_size": 16, "lr": 0.1, "bfloat16": False}
    poisoned = adp(faint, network="resnet9", width=4, **options)
    (network,) = networks
    assert isinstance(network, Surrogate)
    view = compensated(0.4, 0.05, 77)  # draws that the attacker did not see

    def right(x):
        with torch.no_grad():
            seen = view(as_batch(x), torch.arange(len(x)), 0)
            return float((network.eval()(seen).argmax(dim=1).numpy() == labels).mean())

    assert right(poisoned.images) > 0.8
    assert right(images) < right(poisoned.images) - 0.3
    assert poisoned.settings["noise"] == 0.05


def test_adp_learns_with_a_unet():
    poisoned = quick("adp")
    assert poisoned.settings["network"] == "unet"
    assert poisoned.moved(patterns(32)[0]).linf == 8


# Through the denoiser


def test_a_step_goes_the_way_that_survives_the_defence(monkeypatch):
    """Behind a defence that turns the left half of an image negative and the right half grey, by a linear network.

    Of two classes the sign of its gradient is the same everywhere, and one step of 2 epsilon reaches the bound.
    """
    images, labels = patterns(8, classes=2, size=8)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))

    def defended(x_BCHW, index_B, turn):
        return torch.cat([1 - x_BCHW[..., :4], 0.5 + 0 * x_BCHW[..., 4:]], dim=3)

    module = inspect.getmodule(adaptive)
    monkeypatch.setattr(module, "purified", lambda purifier, seed: defended)
    monkeypatch.setattr(module, "train", lambda *_, **options: [network])
    alone = {"steps": 1, "step": 2.0, "grey": 0.0, "noise": 0.0, "shift": 1}
    delta = quick("adaptive", (images, labels), **alone).images.astype(int) - images
    x = as_batch(images).requires_grad_()
    loss = F.cross_entropy(network(defended(x, None, 0)), torch.from_numpy(1 - labels), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    wanted = -8 * gradient.sign().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(delta[:, :, :4], wanted[:, :, :4])
    assert np.abs(delta[:, :, 4:]).mean() < 6  # the random start, which nothing moves


@pytest.mark.slow
def test_more_of_it_survives_the_defence_than_of_tap(monkeypatch):
    """The same bound, network and steps; the judge learned behind the defence, and sees draws that nobody knew."""
    images, labels = patterns(64, size=16)
    networks = record(monkeypatch, inspect.getmodule(adaptive))
    options = {**SMALL, "epochs": 12, "steps": 8, "step": 0.3}
    denoiser = pretrained.load("cifar10-sparse")
    mine = adaptive((images, labels), model=denoiser, sigma=0.1, grey=0.0, noise=0.0, **options)
    (network,) = networks
    plain = tap((images, labels), **options)
    defence = purified(recipes.eclipse(denoiser, sigma=0.1), 99)

    def called(x, labels):
        with torch.no_grad():
            views = [defence(as_batch(x), torch.arange(len(x)), turn) for turn in range(4)]
            return float(np.mean([network(seen).argmax(dim=1).numpy() == labels for seen in views]))

    target = (labels + 3) % 4
    assert called(images, labels) > 0.8
    assert called(mine.images, target) > called(plain.images, target) + 0.2
    # of 64 images, through one draw and a mean of others
    assert mine.settings["called_target_purified"] == pytest.approx(called(mine.images, target), abs=0.2)
    assert mine.moved(images).linf == plain.moved(images).linf == 8


# What every attack keeps to


def test_a_model_is_told_by_what_it_is_and_never_by_path(tmp_path):
    folder = tmp_path / "mine"
    pretrained.save(TINY, folder)
    settings = quick("adaptive", model=str(folder)).settings
    assert settings["model"] == {**identity_of(TINY), "name": None}
    assert str(tmp_path) not in json.dumps(settings)


def test_the_full_presets_take_the_published_networks(monkeypatch):
    victims = small_victims(monkeypatch)
    images, labels = patterns(4, size=8)
    poisoned = adaptive((images, labels), model=TINY, preset="full", epochs=1, steps=1, batch_size=4, sigma=0.02)
    assert poisoned.settings["network"] == "resnet18"
    poisoned = adp((images, labels), preset="full", rounds=1, train_steps=1, steps=1, batch_size=4)
    assert poisoned.settings["network"] == "unet-128"
    assert victims == ["resnet18", "unet-128"]
    with torch.device("meta"):  # without its 53 million weights
        assert victim("unet-128", 4).unet.config == UNetConfig()


def test_class_wise_adp_is_as_class_wise_em():
    images, labels = patterns(32)
    settings = quick("adp", class_wise=True, steps=1).settings
    assert settings["stop_accuracy"] == 0.9
    delta = quick("adp", class_wise=True).images.astype(int) - images
    assert all((delta[labels == label] == delta[label]).all() for label in range(4))


def test_crops_come_between_the_denoiser_and_compensation(monkeypatch):
    """As in training from a cache: what is cropped is what was purified, whose size is the image's."""
    import purifyloader.poisons.attacks.adaptive as module

    seen = []
    crop = module.crop_and_flip

    def spy(x_BCHW, uniform_B3, pad, flip):
        seen.append(x_BCHW.grad_fn is not None)
        return crop(x_BCHW, uniform_B3, pad, flip)

    monkeypatch.setattr(module, "crop_and_flip", spy)
    plain = quick("adaptive", sigma=0.05).images
    assert seen == []
    augmented = quick("adaptive", sigma=0.05, augment=True, pad=2, flip=True).images
    assert len(seen) == 4  # a batch of 16 twice, two steps
    assert all(seen), "the gradient goes through the crop to the denoiser"
    assert not np.array_equal(plain, augmented)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adp", {"grey": 1.5}, "grey must be a finite number from 0 to 1. Got 1.5"),
        ("adp", {"noise": -0.1}, "noise must be a finite number"),
        ("adp", {"sigma": 0.1}, "Got 'sigma'"),
        ("adaptive", {"sigma": 0.0}, "sigma must be"),
        ("adaptive", {"sigma": 10.0}, "trained for sigma"),
        ("adaptive", {"shift": 4}, "shift must turn"),
        ("adaptive", {"noise": True}, "noise must be"),
        ("adaptive", {"model": 3}, "takes a denoiser"),
        ("adaptive", {"model": "no-such-model"}, "no-such-model"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(Exception, match=message) as caught:
        quick(name, **options)
    assert caught.type.__module__ == "purifyloader.errors"


def test_grey_images_need_a_grey_denoiser():
    with pytest.raises(InputError, match=r"The denoiser takes images of 3 channels\. Got 1"):
        quick("adaptive", patterns(32, channels=1))
