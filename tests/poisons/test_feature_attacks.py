"""Poison Frogs and Bullseye Polytope: the formulas by hand, the approach in features, and what a victim makes of it."""

from __future__ import annotations

import inspect
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from purifyloader.errors import ConfigError, InputError
from purifyloader.poisons.attacks import bullseye as bullseye_module
from purifyloader.poisons.attacks import few as few_module
from purifyloader.poisons.attacks import frogs as frogs_module
from purifyloader.poisons.attacks.bullseye import bullseye, off_centre
from purifyloader.poisons.attacks.clean import opened, rounded
from purifyloader.poisons.attacks.few import approach
from purifyloader.poisons.attacks.frogs import backward, collision, poison_frogs
from purifyloader.poisons.attacks.presets import choose
from purifyloader.poisons.attacks.surrogate import train
from purifyloader.poisons.poisoned import Bound, Target
from purifyloader.victims.networks import last_features
from tests.poisons import test_surrogate_attacks
from tests.poisons.test_surrogate_attacks import SMALL, as_batch, small_victims

patterns = partial(test_surrogate_attacks.patterns, size=16)  # where features tell the classes apart
ATTACKS = {"poison-frogs": poison_frogs, "bullseye": bullseye}
MODULES = {"poison-frogs": frogs_module, "bullseye": bullseye_module}
COUNTS = {"poison-frogs": 10, "bullseye": 5}
each_attack = pytest.mark.parametrize("name", ATTACKS)

IMAGES, LABELS = patterns(116)
DATA = IMAGES[:112], LABELS[:112]
TARGET, TRUE, WANTED = IMAGES[113], 1, 0


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def networks():
    """Two surrogates on the clean images."""
    with opened(DATA, "poison-frogs", 0, "cpu", False) as clean:
        settings = choose(frogs_module.PRESETS, "cpu", {**SMALL, "epochs": 10})
        return [train(clean, settings, seed)[0] for seed in (0, 1)]


@pytest.fixture(scope="module")
def made(networks):
    """name -> the set poisoned with those two, each made once."""
    cache = {}

    def get(name):
        if name not in cache:
            given = {"target": TARGET, "target_class": WANTED, "networks": networks, "steps": 80, "step": 0.2}
            cache[name] = ATTACKS[name](DATA, **given, **SMALL)
        return cache[name]

    return get


def quick(name, data=None, seed=0, **options):
    """Of moments: a barely trained network, two steps."""
    brief = {"epochs": 1, "steps": 2, **({"surrogates": 2} if name == "bullseye" else {})}
    data = patterns(32) if data is None else data
    return ATTACKS[name](data, seed, **{"target": TARGET, "target_class": WANTED, **SMALL, **brief, **options})


def linear_network(seed, features=6, values=768):
    """A linear map to features, and one to four logits."""
    draw = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(values, features, bias=False), nn.Linear(features, 4))
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(features, values, generator=draw) / values**0.5)
    return network


def by_hand(gradient, base, start, *, steps, lr, bound, pull=0.0):
    """Forward-backward splitting in numpy: Adam, back to the base, within the bound, within the range of pixels."""

    def within(x):
        delta = x - base
        if bound.norm == "linf":
            delta = np.clip(delta, -bound.epsilon, bound.epsilon)
        else:
            delta = delta * np.minimum(
                1, bound.epsilon / np.maximum(np.linalg.norm(delta, axis=1, keepdims=True), 1e-30)
            )
        return np.clip(base + delta, 0, 1)

    x, first, second = within(start), np.zeros_like(base), np.zeros_like(base)
    for step in range(1, steps + 1):
        g = gradient(x)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        x = x - lr * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-12)
        x = within((x + lr * pull * base) / (1 + lr * pull))
    return x


def rows(images):
    """uint8 (K, H, W, 3) as float64 (K, 3 H W) in [0, 1], in the order that a network flattens them."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1).astype(np.float64) / 255


# The formulas


@pytest.mark.parametrize("bound", [Bound("linf", 0.05), Bound("l2", 0.12)], ids=["linf", "l2"])
def test_forward_and_backward_steps_are_those_of_a_loop_by_hand(bound):
    draw = np.random.default_rng(0)
    base, weights, aim = draw.uniform(size=(5, 12)), draw.normal(size=(12, 7)), draw.normal(size=(1, 7))
    start, pull = 0.3 * draw.uniform(size=(1, 12)) + 0.7 * base, 4.0
    base[0, :6] = 0.0  # where the range of pixels binds
    settings = choose(
        frogs_module.PRESETS, "cpu", {"norm": bound.norm, "epsilon": bound.epsilon, "steps": 9, "step": 0.2}
    )
    lr = 0.2 * bound.epsilon / (1 if bound.norm == "linf" else 12**0.5)
    want = by_hand(lambda x: 2 * (x @ weights - aim) @ weights.T, base, start, steps=9, lr=lr, bound=bound, pull=pull)

    x0, w, t = (torch.from_numpy(a) for a in (base, weights, aim))
    got = approach(
        lambda x_KCHW: [collision(x_KCHW.flatten(1) @ w, t)],
        x0.reshape(5, 3, 2, 2),
        settings,
        SimpleNamespace(update=lambda: None),
        index_K=torch.arange(5),
        seed=0,
        start=torch.from_numpy(start).reshape(5, 3, 2, 2),
        backward=partial(backward, base_KCHW=x0.reshape(5, 3, 2, 2), lr=lr, beta=pull),
    )
    assert got.dtype == torch.float64
    assert np.allclose(base + got.flatten(1).numpy(), want, rtol=0, atol=1e-9)
    assert np.abs(want - base).max() > 0.02  # and it went somewhere
    size = np.abs(want - base).max(1) if bound.norm == "linf" else np.linalg.norm(want - base, axis=1)
    assert (size < bound.epsilon * (1 + 1e-6)).all()


def test_the_backward_step_is_the_proximal_operator():
    draw = torch.Generator().manual_seed(0)
    x_hat, base = (torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=draw) for _ in range(2))

    def cost(x):
        return 0.5 * (x - x_hat).square().sum() + 0.5 * 0.3 * 2.0 * (x - base).square().sum()

    x = backward(x_hat, base, 0.3, 2.0).requires_grad_()
    (slope,) = torch.autograd.grad(cost(x), x)
    assert float(slope.abs().max()) < 1e-12
    assert torch.equal(backward(x_hat, base, 0.3, 0.0), x_hat)


def test_poison_frogs_is_the_formula_on_linear_networks():
    """Two networks, their mean; beta by its scale; a watermark; and three batches of poisons."""
    networks = [linear_network(0, 6), linear_network(1, 9)]
    options = {"beta": 1e5, "watermark": 0.2, "epsilon": 0.06, "steps": 12, "step": 0.1, "batch_size": 4}
    poisoned = poison_frogs(DATA, target=TARGET, target_class=WANTED, networks=networks, **options)
    base, target = rows(DATA[0][poisoned.poisoned]), rows(TARGET[None])
    w = [network[1].weight.detach().double().numpy().T for network in networks]
    gradient, start = lambda x: sum(2 * (x - target) @ each @ each.T for each in w) / 2, 0.2 * target + 0.8 * base
    descent = {"steps": 12, "lr": 0.1 * 0.06, "bound": Bound("linf", 0.06)}
    want = by_hand(gradient, base, start, **descent, pull=1e5 * ((6 / 768) ** 2 + (9 / 768) ** 2) / 2)
    apart = np.abs(rows(poisoned.images[poisoned.poisoned]) - want) * 255
    assert apart.max() < 0.51  # rounding to the nearest level
    assert np.abs(want - by_hand(gradient, base, start, **descent)).max() * 255 > 4  # beta counts here


def test_bullseye_is_the_formula_on_linear_networks():
    networks = [linear_network(0, 6), linear_network(1, 9)]
    with torch.no_grad():
        networks[1][1].weight.mul_(5.0)  # which |f(t)|^2 makes up for
    poisoned = bullseye(DATA, target=TARGET, target_class=WANTED, networks=networks, steps=20)
    base, target = rows(DATA[0][poisoned.poisoned]), rows(TARGET[None])
    w = [network[1].weight.detach().double().numpy().T for network in networks]

    def gradient(x):
        """Of 1/(2m) sum_i |f_i(t) - mean_j f_i(x_j)|^2 / |f_i(t)|^2 in x_j, the same for each j."""
        terms = [(x.mean(0) - target) @ each @ each.T / np.square(target @ each).sum() for each in w]
        return np.repeat(sum(terms) / (2 * len(x)), len(x), axis=0)

    want = by_hand(gradient, base, base, steps=20, lr=0.08 * 0.1, bound=Bound("linf", 0.1))
    apart = np.abs(rows(poisoned.images[poisoned.poisoned]) - want) * 255
    assert apart.max() < 0.51  # rounding to the nearest level, or to 25 from the bound's 25.5
    before, after = poisoned.settings["distance_before"], poisoned.settings["distance_after"]
    for x, measured in ((base, before), (rows(poisoned.images[poisoned.poisoned]), after)):
        true = [np.linalg.norm((x.mean(0) - target) @ each) / np.linalg.norm(target @ each) for each in w]
        assert np.allclose(measured, true, rtol=1e-4)


def test_the_objectives_by_hand():
    feature = torch.tensor([[1.0, 2.0], [3.0, -4.0], [5.0, 8.0]])
    aim = torch.tensor([[3.0, 4.0]])
    # 4 + 4, 0 + 64, 4 + 16; the mean is (3, 2), which is (0, 2) away of 5
    assert float(collision(feature, aim)) == 92.0
    assert float(off_centre(feature, aim)) == pytest.approx(4 / 25)
    assert float(frogs_module.apart(feature, aim)) == pytest.approx((8**0.5 + 8 + 20**0.5) / 15)
    assert float(bullseye_module.apart(feature, aim)) == pytest.approx(0.4)


# What the attacks are for


@pytest.mark.parametrize(("name", "epsilon"), [("poison-frogs", 16 / 255), ("bullseye", 8 / 255)])
def test_poisons_are_near_the_target_in_features(networks, name, epsilon):
    poisoned = ATTACKS[name](
        DATA, target=TARGET, target_class=WANTED, networks=networks, epsilon=epsilon, **SMALL, steps=30
    )
    x = as_batch(np.concatenate([DATA[0][poisoned.poisoned], poisoned.images[poisoned.poisoned], TARGET[None]]))
    for number, network in enumerate(networks):
        with torch.no_grad():
            clean, moved, (aim,) = last_features(network, x).split([COUNTS[name], COUNTS[name], 1])
        if name == "bullseye":
            clean, moved = clean.mean(0, keepdim=True), moved.mean(0, keepdim=True)
        before, after = ((part - aim).norm(dim=1).mean() / aim.norm() for part in (clean, moved))
        assert float(before) > 0.5  # another class
        assert float(after) < 0.25 * float(before)
        assert poisoned.settings["distance_before"][number] == pytest.approx(float(before), rel=1e-4)
        assert poisoned.settings["distance_after"][number] == pytest.approx(float(after), rel=1e-4)
    assert poisoned.settings["target_called"] == [TRUE, TRUE]


def head_of(network, images, labels):
    """A last layer learned anew, to the optimum, on the frozen features: the paper's transfer learning."""
    with torch.no_grad():
        feature = last_features(network, as_batch(images)).double()
    shift, scale = feature.mean(0), feature.std()
    head = torch.zeros(feature.shape[1] + 1, 4, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([head], max_iter=60, line_search_fn="strong_wolfe")

    def logits(part):
        return ((part - shift) / scale) @ head[:-1] + head[-1]

    def loss():
        search.zero_grad()
        value = F.cross_entropy(logits(feature), torch.from_numpy(labels)) + 1e-5 * head.square().sum()
        value.backward()
        return value

    search.step(loss)
    return lambda image: logits(last_features(network, as_batch(image[None])).double()).softmax(1)[0].detach()


@each_attack
def test_a_last_layer_trained_on_the_poisons_takes_the_target_for_their_class(networks, made, name):
    """The same images moved at random by as much, under the same labels, do nothing."""
    poisoned = made(name)
    delta = (poisoned.images.astype(int) - DATA[0])[poisoned.poisoned]
    noisy = DATA[0].copy()
    signs = np.random.default_rng(0).choice([-1, 1], delta.shape)
    noisy[poisoned.poisoned] = (noisy[poisoned.poisoned] + signs * np.abs(delta)).clip(0, 255)
    for network in networks:
        clean, random_, attacked = (head_of(network, images, DATA[1]) for images in (DATA[0], noisy, poisoned.images))
        assert int(clean(TARGET).argmax()) == TRUE
        assert float(clean(TARGET)[WANTED]) < 0.02
        assert float(random_(TARGET)[WANTED]) < 0.02
        assert int(attacked(TARGET).argmax()) == WANTED
        assert float(attacked(TARGET)[WANTED]) > 0.5
        rest = [int(attacked(image).argmax()) == label for image, label in zip(IMAGES[112:], LABELS[112:], strict=True)]
        assert sum(rest) >= 3  # the other images are called as before


@each_attack
def test_surrogates_are_trained_where_none_are_given(name, monkeypatch):
    seeds = []

    def recorded(clean, settings, seed):
        seeds.append(seed)
        return train(clean, settings, seed)

    monkeypatch.setattr(few_module, "train", recorded)
    settings = quick(name, DATA, seed=4, epochs=5, steps=20).settings
    assert seeds == ([4, 5] if name == "bullseye" else [4])
    assert settings["networks"] is None
    assert settings["target_called"] == [TRUE] * len(seeds)
    for before, after in zip(settings["distance_before"], settings["distance_after"], strict=True):
        assert after < 0.5 * before


def test_a_watermark_is_where_poisons_start(networks):
    """Where there is no bound, the target shows through; where there is one, it holds."""
    options = {"target": TARGET, "target_class": WANTED, "networks": networks[:1], "steps": 1, "step": 1e-6}
    whole = poison_frogs(DATA, watermark=0.3, epsilon=1, **options)
    mixed = 0.3 * TARGET + 0.7 * DATA[0][whole.poisoned]
    assert np.abs(whole.images[whole.poisoned] - mixed).max() < 0.51
    held = poison_frogs(DATA, watermark=0.3, **options)
    assert held.moved(DATA[0]).linf == 8
    assert (
        np.abs(
            held.images[held.poisoned] - mixed.clip(DATA[0][held.poisoned] - 8.0, DATA[0][held.poisoned] + 8.0)
        ).max()
        < 0.51
    )


@each_attack
def test_views_are_drawn_for_each_step(networks, name):
    given = {"target": TARGET, "target_class": WANTED, "networks": networks, "pad": 2, "flip": True}
    plain, viewed, again = (
        ATTACKS[name](DATA, **{**SMALL, **given, "steps": 3, "augment": augment}) for augment in (False, True, True)
    )
    assert np.array_equal(viewed.images, again.images)
    assert not np.array_equal(viewed.images, plain.images)


# What both keep to


@each_attack
def test_other_images_stay_and_labels_too(made, name):
    poisoned = made(name)
    assert len(poisoned.poisoned) == COUNTS[name]
    assert (DATA[1][poisoned.poisoned] == WANTED).all()
    rest = np.setdiff1d(np.arange(len(DATA[0])), poisoned.poisoned)
    assert np.array_equal(poisoned.images[rest], DATA[0][rest])
    assert (poisoned.images[poisoned.poisoned] != DATA[0][poisoned.poisoned]).any(axis=(1, 2, 3)).all()
    assert np.array_equal(poisoned.labels, DATA[1])
    assert poisoned.attack == name
    assert poisoned.target_class is None  # which is of a back door
    assert np.array_equal(poisoned.target.image, TARGET)
    assert poisoned.target.label == WANTED


@each_attack
def test_images_of_8_bits_are_within_the_bound(made, name):
    poisoned = made(name)
    level = {"poison-frogs": 8, "bullseye": 25}[name]  # 0.1 is 25.5 levels
    assert poisoned.bound == Bound("linf", {"poison-frogs": 8 / 255, "bullseye": 0.1}[name])
    moved = poisoned.moved(DATA[0])
    assert moved.linf == level
    assert 0.3 < moved.down < 0.7


@each_attack
def test_an_l2_bound(networks, name):
    given = {"target": TARGET, "target_class": WANTED, "networks": networks, "steps": 15, "step": 0.2}
    poisoned = ATTACKS[name](DATA, norm="l2", **given)
    assert poisoned.bound == Bound("l2", 1.0)
    assert poisoned.settings["epsilon"] == 1.0
    assert 0.8 * 255 < poisoned.moved(DATA[0]).l2_max <= 255 * (1 + 1e-6)
    smaller = ATTACKS[name](DATA, norm="l2", epsilon=0.3, **given)
    assert 0.9 * 0.3 * 255 < smaller.moved(DATA[0]).l2_max <= 0.3 * 255 * (1 + 1e-6)


def test_rounding_saturates_whatever_the_perturbation():
    base = torch.tensor([0, 3, 100, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    up, down = (rounded(base, torch.full(base.shape, delta), Bound("linf", 8 / 255)) for delta in (1.0, -7.6 / 255))
    assert up.dtype == torch.uint8
    assert up.flatten().tolist() == [8, 11, 108, 255]
    assert down.flatten().tolist() == [0, 0, 92, 247]


@each_attack
def test_bases_are_drawn_by_the_seed(name):
    networks = [linear_network(0)]
    chosen = [quick(name, DATA, seed, count=3, networks=networks).poisoned.tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


@each_attack
def test_count_and_share(name):
    networks = [linear_network(0)]
    for given, poisons in (
        ({"count": 1}, 1),
        ({"count": 28}, 28),
        ({"share": 0.1}, 11),  # of 112 images
        ({}, COUNTS[name]),
    ):
        poisoned = quick(name, DATA, networks=networks, **given)
        assert len(poisoned.poisoned) == poisons
        assert (poisoned.images != DATA[0]).any(axis=(1, 2, 3)).sum() == poisons
        assert poisoned.settings["share"] == given.get("share")
        assert poisoned.settings["count"] == given.get("count")
    few = patterns(12)
    assert len(quick(name, few, networks=networks).poisoned) == 3  # all that the class has


@each_attack
@pytest.mark.parametrize("fails", [False, True])
def test_given_networks_stay_as_they_are(name, fails, monkeypatch):
    torch.manual_seed(0)  # of some weights no feature of the target is above 0
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(196, 4)
    )
    network.train()[1].eval()  # some modules in the one mode, some in the other
    network[0].weight.requires_grad_(False)
    grads = [parameter.requires_grad for parameter in network.parameters()]
    modes = [module.training for module in network.modules()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    options = {"networks": [network], "steps": 2}
    if fails:
        monkeypatch.setattr(MODULES[name], "add", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            quick(name, DATA, **options)
    else:
        first = quick(name, DATA, **options)
        assert np.array_equal(first.images, quick(name, DATA, **options).images)  # without dropout's draws
        assert first.settings["networks"] == 1
        assert len(first.settings["target_called"]) == 1
    assert [module.training for module in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == grads
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@each_attack
def test_settings_are_json_and_tell_everything(name):
    given = {"epsilon": 4 / 255, "preset": "cpu", "count": 2}
    target = Target(TARGET, WANTED, TRUE, 7)
    poisoned = quick(name, target=target, target_class=None, **given)
    settings = json.loads(json.dumps(poisoned.settings))
    assert settings == poisoned.settings
    assert settings["seed"] == 0
    assert settings["preset"] == "cpu"
    assert settings["epsilon"] == poisoned.bound.epsilon == 4 / 255
    assert settings["target_class"] == WANTED
    assert settings["target"]["index"] == 7
    assert len(settings["target"]["sha256"]) == 64
    assert poisoned.target.true_label == TRUE
    told = list(inspect.signature(ATTACKS[name]).parameters)
    first = ["dataset", "seed", "target", "target_class", "count", "share", "networks", "preset", "device", "progress"]
    assert told[:10] == first
    assert set(told[10:]) <= set(settings)
    surrogates = 2 if name == "bullseye" else 1
    assert all(len(settings[key]) == surrogates for key in ("target_called", "distance_before", "distance_after"))


@each_attack
def test_the_full_preset_trains_a_resnet18(name, monkeypatch):
    victims = small_victims(monkeypatch)
    more = {"surrogates": 1} if name == "bullseye" else {}
    images, labels = patterns(8, size=8)
    poisoned = ATTACKS[name](
        (images, labels),
        target=images[1],
        target_class=WANTED,
        preset="full",
        epochs=1,
        steps=1,
        batch_size=8,
        count=2,
        **more,
    )
    assert victims == [poisoned.settings["network"]] == ["resnet18"]
    assert poisoned.bound.epsilon == {"poison-frogs": 8 / 255, "bullseye": 0.1}[name]


@each_attack
def test_a_file_a_target_and_an_image_are_the_same(name, tmp_path):
    Image.fromarray(TARGET).save(tmp_path / "target.png")
    networks = [linear_network(0)]
    first = quick(name, networks=networks)
    for target in (tmp_path / "target.png", str(tmp_path / "target.png"), Target(TARGET, 2)):
        assert np.array_equal(quick(name, networks=networks, target=target).images, first.images)


def test_grey_images_are_shown_to_the_networks_in_colour():
    images, labels = patterns(32, channels=1)
    poisoned = quick("poison-frogs", (images, labels), target=images[1], networks=[linear_network(0)])
    assert poisoned.images.shape == images.shape
    assert quick("bullseye", (images, labels), target=images[1]).moved(images).images == 5


def test_progress_is_shown_when_asked(capsys):
    quick("bullseye", progress=True)
    assert "bullseye" in capsys.readouterr().err
    quick("bullseye")
    assert capsys.readouterr().err == ""


# What is refused


class Maps(nn.Module):
    """Logits of some other kind, from a last linear layer of some other kind."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(16, 4)

    def forward(self, x_BCHW):
        if self.kind == "tuple":
            return self.linear(x_BCHW[:, 0, 0]), None
        if self.kind == "unused":
            return x_BCHW[:, 0, 0]
        return self.linear(x_BCHW[:, 0]) if self.kind == "rows" else self.linear(x_BCHW[:, 0])[:, 0]


BAD = [
    ({"preset": "huge"}, "preset must be one of cpu, full"),
    ({"colour": 1}, "The options of this attack are norm, .* Got 'colour'"),
    ({"device": "abacus"}, "device of this machine"),
    ({"seed": 1.5}, "seed must be an integer"),
    ({"norm": "l1"}, "norm must be one of 'linf', 'l2'"),
    ({"epsilon": 0.5 / 255}, "epsilon must be 0.003922 to 1"),
    ({"epsilon": 8}, "Got 8: divide levels by 255"),
    ({"steps": 0}, "steps must be a positive integer"),
    ({"step": 0.0}, "step must be"),
    ({"epochs": 0}, "epochs must be"),
    ({"augment": 1}, "augment must be"),
    ({"network": "resnet1000"}, "network must be one of 'resnet9'"),
    ({"target": None}, "target must be the image that the victim is to be wrong on.* Got NoneType"),
    ({"target": TARGET / 255}, r"target must be .* Got float64 \(16, 16, 3\)"),
    ({"target": TARGET[:8]}, r"uint8 \(16, 16, 3\) as the training images are.* Got uint8 \(8, 16, 3\)"),
    ({"target_class": None}, "target_class must be what the victim is to call the target, .* Got None"),
    ({"target_class": 4}, "a class from 0 to 3. Got 4"),
    ({"target_class": "cat"}, "Got 'cat'"),
    ({"target": Target(TARGET, 0, 0), "target_class": None}, "another class than the target's own"),
    ({"count": 0}, "count must be from 1 to the 8 images of class 0. Got 0"),
    ({"count": 9}, "count must be from 1 to the 8 images of class 0. Got 9"),
    ({"share": 0.5}, "share must be of no more than the 8 images of class 0"),
    ({"share": -1}, "share must be above 0"),
    ({"networks": []}, r"networks must be a list of one nn.Module or more, or None .* Got \[\]"),
    ({"networks": linear_network(0)}, "networks must be a list"),
    ({"networks": [linear_network(0), "resnet9"]}, r"networks must be a list .* Got \[Sequential, str\]"),
    ({"networks": [nn.Flatten()]}, r"networks\[0\] must have an nn.Linear"),
    ({"networks": [linear_network(0), linear_network(0, values=100)]}, r"networks\[1\] must map float32 images"),
    ({"networks": [linear_network(0).double()]}, r"networks\[0\] must map float32 images \(B, 3, 16, 16\) on cpu"),
    ({"networks": [Maps("tuple")]}, r"networks\[0\] must map .* to logits"),
    ({"networks": [Maps("unused")]}, r"networks\[0\] must map .* through its last nn.Linear"),
    (
        {"networks": [Maps("rows")]},
        r"networks\[0\] must give logits \(B, classes\).* Got \(1, 16, 4\) and \(1, 16, 16\)",
    ),
]


@each_attack
@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input(name, options, message):
    with pytest.raises(InputError, match=message):
        quick(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("poison-frogs", {"beta": -1}, "beta must be a finite number of 0 or more"),
        ("poison-frogs", {"watermark": 1.5}, "watermark must be a finite number from 0 to 1. Got 1.5"),
        ("bullseye", {"surrogates": 0}, "surrogates must be a positive integer. Got 0"),
    ],
)
def test_bad_options_of_one(name, options, message):
    with pytest.raises(InputError, match=message):
        quick(name, **options)


@each_attack
def test_both_share_and_count_a_class_without_images_and_dead_features_are_refused(name):
    with pytest.raises(ConfigError, match="Give share or count, not both"):
        quick(name, share=0.1, count=2)
    images, labels = patterns(32)
    with pytest.raises(InputError, match=r"that has images\. Got 0"):
        quick(name, (images, np.where(labels == 0, 2, labels)))
    dead = linear_network(0)
    nn.init.zeros_(dead[1].weight)
    with pytest.raises(InputError, match=r"not all zero\. Got 0\.0"):
        quick(name, networks=[dead])
