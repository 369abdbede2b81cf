"""Gradient matching and the label-consistent back door: the mathematics, the bound, and what each is for."""

from __future__ import annotations

import copy
import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from purifyloader.errors import ConfigError, InputError, TrainingError
from purifyloader.poisons.attacks import few as few_module
from purifyloader.poisons.attacks import surrogate as surrogate_module
from purifyloader.poisons.attacks.clean import opened
from purifyloader.poisons.attacks.gradient_matching import gradient_matching, loss_gradient, mismatch
from purifyloader.poisons.attacks.label_consistent import corner_trigger, label_consistent
from purifyloader.poisons.attacks.presets import choose
from purifyloader.poisons.attacks.surrogate import train
from purifyloader.poisons.attacks.trigger import add_trigger
from purifyloader.poisons.poisoned import Bound, Target
from tests.poisons.test_surrogate_attacks import SMALL, as_batch, patterns, record, small_victims

gm_module, lc_module = inspect.getmodule(gradient_matching), inspect.getmodule(label_consistent)

IMAGES, LABELS = patterns(124)
DATA = IMAGES[:120], LABELS[:120]
LARGE = patterns(120, size=16)  # which an adversarial training learns too
TARGET = IMAGES[120]  # of class 0, among no training images
AIM = 3
QUICK = {
    "gradient-matching": (
        gradient_matching,
        {"target": TARGET, "target_class": AIM, "count": 6, "epochs": 1, "steps": 3, "augment": True, "pad": 2},
    ),
    "label-consistent": (
        label_consistent,
        {"target_class": AIM, "count": 6, "epochs": 1, "steps": 3, "attack_steps": 1, "step": 0.5},
    ),
}
BOTH = pytest.mark.parametrize("name", QUICK)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quick(name, data=None, seed=0, **options):
    attack, defaults = QUICK[name]
    return attack(patterns(48) if data is None else data, seed, **{**SMALL, **defaults, **options})


def brew(networks, data=DATA, **options):
    """Poisons of known networks."""
    options = {"target": TARGET, "target_class": AIM, "count": 12, "steps": 10, "augment": False, **SMALL, **options}
    return gradient_matching(data, networks=networks, **options)


def learned(data, seed=0, **options):
    """A network trained on a set."""
    with opened(data, "test", seed, "cpu", False) as clean:
        settings = choose(gm_module.PRESETS, "cpu", {**SMALL, "epochs": 8, **options})
        return train(clean, settings, seed)[0]


@pytest.fixture(scope="module")
def network():
    return learned(DATA)


@pytest.fixture(scope="module")
def other():
    return learned(DATA, 1, epochs=4)


@pytest.fixture(scope="module")
def brewed(network):
    return brew([network])


@pytest.fixture(scope="module")
def made_with():
    """The back door's set, and the surrogate that it was made with."""
    with pytest.MonkeyPatch.context() as patch:
        networks = record(patch, lc_module)
        poisoned = label_consistent(LARGE, target_class=1, count=12, epochs=6, steps=10, step=0.2, **SMALL)
    return poisoned, networks[0]


@pytest.fixture(scope="module")
def consistent(made_with):
    return made_with[0]


def flat_gradient(network, images, labels):
    """By backward, on a copy that learns."""
    network = copy.deepcopy(network).eval().requires_grad_(True)
    F.cross_entropy(network(as_batch(images)), torch.as_tensor(labels)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).double()


def b_of(network, images, labels, target=TARGET, aim=AIM):
    reached, wanted = flat_gradient(network, images, labels), flat_gradient(network, target[None], [aim])
    return 1 - float(reached @ wanted / reached.norm() / wanted.norm())


# Gradient matching: B


class Linear(nn.Module):
    def __init__(self, weights_DK, bias_K):
        super().__init__()
        self.linear = nn.Linear(*weights_DK.shape).double()
        self.linear.weight.data, self.linear.bias.data = torch.from_numpy(weights_DK.T.copy()), torch.from_numpy(bias_K)

    def forward(self, x_BCHW):
        return self.linear(x_BCHW.flatten(1))


def test_b_is_the_formula_on_a_linear_model():
    draw = np.random.default_rng(0)
    weights, bias = draw.normal(size=(12, 4)), draw.normal(size=4)
    x, target = draw.uniform(size=(5, 12)), draw.uniform(size=(1, 12))

    def gradient_by_hand(x_BD, labels):
        total_w, total_b = np.zeros_like(weights), np.zeros_like(bias)
        for image, label in zip(x_BD, labels, strict=True):
            logits = image @ weights + bias
            shares = np.exp(logits) / np.exp(logits).sum()
            shares[label] -= 1
            total_w += np.outer(image, shares) / len(x_BD)
            total_b += shares / len(x_BD)
        return np.concatenate([total_w.ravel(), total_b])

    a, b = gradient_by_hand(x, [2] * 5), gradient_by_hand(target, [2])
    wanted = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    model = Linear(weights, bias)
    reached, asked = (
        loss_gradient(model, torch.from_numpy(part).reshape(-1, 3, 2, 2), torch.full((len(part),), 2))
        for part in (x, target)
    )
    assert float(mismatch(reached, asked)) == pytest.approx(wanted, abs=1e-12)
    assert 0.1 < wanted < 1.9
    assert float(mismatch(asked, asked)) == pytest.approx(0, abs=1e-12)
    assert float(mismatch(tuple(-part for part in asked), asked)) == pytest.approx(2, abs=1e-12)


def test_b_has_the_right_gradient_in_the_images():
    torch_draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch_draw, dtype=torch.float64)
    model.requires_grad_(False)
    x = torch.rand(3, 3, 2, 2, generator=torch_draw, dtype=torch.float64).requires_grad_()
    asked = loss_gradient(model, torch.rand(1, 3, 2, 2, generator=torch_draw, dtype=torch.float64), torch.tensor([1]))
    labels = torch.tensor([1, 1, 1])
    assert torch.autograd.gradcheck(lambda x: mismatch(loss_gradient(model, x, labels, again=True), asked), x)


def test_a_gradient_of_zero_matches_nothing():
    some, none = (torch.ones(2, 2), torch.ones(2)), (torch.zeros(2, 2), torch.zeros(2))
    assert float(mismatch(none, some)) == 1.0
    assert float(mismatch(none, none)) == 1.0


def test_a_parameter_that_is_not_used_has_no_part():
    model = Linear(np.ones((12, 3)), np.zeros(3))
    model.more = nn.Linear(2, 2).double()
    gradient = loss_gradient(model, torch.rand(1, 3, 2, 2, dtype=torch.float64), torch.tensor([0]))
    assert len(gradient) == 4
    assert not gradient[2].any()


# Gradient matching: the attack


def test_b_falls_and_is_what_the_settings_tell(network, brewed):
    chosen = brewed.poisoned
    before, after = (b_of(network, images[chosen], [AIM] * 12) for images in (DATA[0], brewed.images))
    assert brewed.settings["b_before"] == pytest.approx([before], abs=1e-4)
    assert brewed.settings["b_after"] == pytest.approx([after], abs=1e-4)
    assert after < 0.6 * before
    assert brewed.settings["target_called"] == [0]


def test_a_step_on_the_poisons_teaches_the_target(network, brewed):
    def loss_after_a_step(images):
        learner = copy.deepcopy(network).requires_grad_(True)
        step = flat_gradient(network, images[brewed.poisoned], [AIM] * 12)
        step = (0.05 * step / step.norm()).float()
        with torch.no_grad():
            for parameter in learner.parameters():
                part, step = step[: parameter.numel()], step[parameter.numel() :]
                parameter -= part.reshape(parameter.shape)
            return float(F.cross_entropy(learner(as_batch(TARGET[None])), torch.tensor([AIM])))

    with torch.no_grad():
        at_first = float(F.cross_entropy(network(as_batch(TARGET[None])), torch.tensor([AIM])))
    poisons, bases = loss_after_a_step(brewed.images), loss_after_a_step(DATA[0])
    assert poisons < at_first - 0.01
    assert poisons < bases - 0.01


def test_the_best_restart_is_kept(network, brewed):
    restarted = brew([network], restarts=3, steps=4)
    scores = restarted.settings["b_of_restart"]
    assert len(set(scores)) == 3
    assert scores[0] == brew([network], steps=4).settings["b_of_restart"][0]
    assert restarted.settings["b_after"] == pytest.approx([min(scores)], abs=0.01)
    assert max(scores) - min(scores) > 1e-4


def test_the_mean_b_of_several_networks_falls(network, other, brewed):
    poisoned = brew([network, other], bases="random")
    for number, surrogate in enumerate((network, other)):
        wanted = b_of(surrogate, poisoned.images[poisoned.poisoned], [AIM] * 12)
        assert poisoned.settings["b_after"][number] == pytest.approx(wanted, abs=1e-4)
    assert poisoned.settings["b_of_restart"] == pytest.approx([np.mean(poisoned.settings["b_after"])], abs=0.01)
    assert poisoned.settings["networks"] == 2
    alone = b_of(other, brewed.images[brewed.poisoned], [AIM] * 12)
    assert poisoned.settings["b_after"][1] < alone


def test_more_than_a_batch_is_matched_batch_by_batch(network):
    poisoned = brew([network], batch_size=5, steps=6)
    parts = [poisoned.poisoned[start : start + 5] for start in (0, 5, 10)]
    each = [b_of(network, poisoned.images[part], [AIM] * len(part)) for part in parts]
    assert poisoned.settings["b_after"] == pytest.approx([np.mean(each)], abs=1e-4)
    for part, after in zip(parts, each, strict=True):
        assert after < b_of(network, DATA[0][part], [AIM] * len(part))


def test_steps_are_signed_and_become_shorter(network, monkeypatch):
    monkeypatch.setattr(gm_module, "random_start", lambda uniform, bound: torch.zeros_like(uniform))
    one = brew([network], steps=1, step=0.25)
    delta = (one.images.astype(int) - DATA[0])[one.poisoned]
    assert set(np.unique(delta)) <= {-4, 0, 4}
    assert (delta != 0).mean() > 0.9
    # three whole steps, two of a tenth, two of a hundredth and one of a thousandth: 3.221 * 0.1 of 16 levels
    assert brew([network], steps=8, step=0.1).moved(DATA[0]).linf == 5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_descent_is_the_formula(network, monkeypatch, norm):
    monkeypatch.setattr(gm_module, "random_start", lambda uniform, bound: torch.zeros_like(uniform))
    epsilon, step = {"linf": (16 / 255, 0.3), "l2": (4.0, 0.1)}[norm]
    poisoned = brew([network], steps=4, step=step, norm=norm, epsilon=epsilon)
    learner = copy.deepcopy(network).requires_grad_(True)
    base = as_batch(DATA[0][poisoned.poisoned])
    rate = step * epsilon / (1 if norm == "linf" else base[0].numel() ** 0.5)
    asked = flat_gradient(network, TARGET[None], [AIM]).float()
    x, m, v = base.clone(), 0, 0
    for turn, shorter in enumerate((1, 1, 0.1, 0.01), 1):
        x.requires_grad_()
        loss = F.cross_entropy(learner(x), torch.full((12,), AIM))
        reached = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(learner.parameters()), create_graph=True)]
        )
        (gradient,) = torch.autograd.grad(-(reached @ asked) / reached.norm(), x)
        if norm == "linf":
            gradient = gradient.sign()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x = x.detach() - shorter * rate * m / (1 - 0.9**turn) / ((v / (1 - 0.999**turn)).sqrt() + 1e-20)
        delta = x - base
        if norm == "linf":
            delta = delta.clamp(-epsilon, epsilon)
        else:
            delta = delta * (epsilon / delta.flatten(1).norm(dim=1)).clamp_max(1).reshape(-1, 1, 1, 1)
        x = (base + delta).clamp(0, 1)
    wanted = (x * 255).round().permute(0, 2, 3, 1).numpy()
    apart = np.abs(poisoned.images[poisoned.poisoned] - wanted)
    assert np.abs(wanted - DATA[0][poisoned.poisoned]).mean() > 2
    assert (apart <= 1e-6).mean() > 0.99


def test_an_l2_step_is_as_long_as_told(network, monkeypatch):
    monkeypatch.setattr(gm_module, "random_start", lambda uniform, bound: torch.zeros_like(uniform))
    moved = brew([network], steps=1, step=0.3, norm="l2", epsilon=5.0).moved(DATA[0])
    assert moved.l2_max == pytest.approx(0.3 * 5 * 255, rel=0.05)


def test_bases_are_those_of_the_largest_gradient(network, brewed):
    members = np.flatnonzero(DATA[1] == AIM)
    lengths = {index: float(flat_gradient(network, DATA[0][[index]], [AIM]).norm()) for index in members}
    chosen = set(brewed.poisoned.tolist())
    assert min(lengths[index] for index in chosen) >= max(lengths[index] for index in lengths if index not in chosen)
    drawn = brew([network], bases="random", steps=1)
    assert (DATA[1][drawn.poisoned] == AIM).all()
    assert not np.array_equal(drawn.poisoned, brewed.poisoned)
    assert not np.array_equal(brew([network], bases="random", steps=1, seed=1).poisoned, drawn.poisoned)


def test_crops_are_drawn_for_each_step_and_flips_kept_out_where_not_wanted(network, monkeypatch):
    seen = []
    crop_and_flip = gm_module.crop_and_flip

    def recorded(x, uniform, pad, flip):
        seen.append((uniform, pad, flip))
        return crop_and_flip(x, uniform, pad, flip)

    monkeypatch.setattr(gm_module, "crop_and_flip", recorded)
    brew([network], steps=2, restarts=2)
    assert seen == []
    brew([network], steps=2, restarts=2, augment=True, pad=2)
    assert len(seen) == 4
    assert len({tuple(uniform.flatten().tolist()) for uniform, _, _ in seen}) == 4
    assert {(pad, flip) for _, pad, flip in seen} == {(2, False)}


def test_b_falls_through_crops(network):
    settings = brew([network], augment=True, pad=2, flip=True, steps=60).settings
    assert settings["b_after"][0] < 0.85 * settings["b_before"][0]


def test_b_falls_in_bfloat16(network):
    rough = copy.deepcopy(network)
    rough.in_bfloat16 = True
    poisoned = brew([rough])
    before, after = (b_of(network, images[poisoned.poisoned], [AIM] * 12) for images in (DATA[0], poisoned.images))
    assert after < 0.7 * before  # in float32
    assert poisoned.settings["b_after"] != [pytest.approx(after, abs=1e-6)]


def test_what_is_trained_in_bfloat16_is_matched_in_float32(monkeypatch):
    networks = record(monkeypatch, few_module)
    rough, exact = (quick("gradient-matching", bfloat16=each).settings for each in (True, False))
    assert [network.in_bfloat16 for network in networks] == [False, False]
    assert rough["bfloat16"]
    assert rough["b_before"] != exact["b_before"]


def test_surrogates_are_trained_from_seeds_of_their_own():
    settings = quick("gradient-matching", surrogates=2).settings
    assert len(settings["target_called"]) == len(settings["b_after"]) == 2
    assert settings["b_before"][0] != settings["b_before"][1]
    assert settings["networks"] is None
    assert quick("gradient-matching", seed=1, bases="random").settings["b_before"] != settings["b_before"][:1]


@pytest.mark.parametrize("training", [False, True])
def test_given_networks_stay_as_they_are(network, training):
    mine = copy.deepcopy(network).train(training)
    mine.network.features[0].train(not training)
    for number, parameter in enumerate(mine.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = copy.deepcopy(mine)
    poisoned = brew([mine], steps=2)
    assert poisoned.settings["b_before"] == brew([network], steps=2).settings["b_before"]  # in evaluation mode
    for now, then in zip(mine.modules(), before.modules(), strict=True):
        assert now.training == then.training
    for now, then in zip(mine.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(now, then)
    for now, then in zip(mine.parameters(), before.parameters(), strict=True):
        assert now.requires_grad == then.requires_grad
        assert now.grad is None


def test_networks_are_given_back_their_mode_after_an_error(network, monkeypatch):
    mine = copy.deepcopy(network).train()
    monkeypatch.setattr(gm_module, "mismatch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        brew([mine])
    assert mine.training


def test_what_a_target_may_be(network, tmp_path):
    Image.fromarray(TARGET).save(tmp_path / "target.png")
    poisoned = [
        brew([network], steps=1, bases="random", target=target, target_class=label)
        for target, label in (
            (TARGET, AIM),
            (tmp_path / "target.png", AIM),
            (Target(TARGET, AIM, 0, 7), None),
        )
    ]
    assert all(np.array_equal(poisoned[0].images, each.images) for each in poisoned)
    assert np.array_equal(poisoned[0].target.image, TARGET)
    assert poisoned[0].target.label == poisoned[0].settings["target_class"] == AIM
    assert (poisoned[2].target.true_label, poisoned[2].target.index) == (0, 7)
    assert str(tmp_path) not in json.dumps(poisoned[1].settings)


def test_grey_images_are_matched():
    images, labels = patterns(32, channels=1)
    poisoned = quick("gradient-matching", (images, labels), target=images[0])
    assert poisoned.images.shape == images.shape
    assert poisoned.settings["b_after"][0] != poisoned.settings["b_before"][0]


# The label-consistent back door


def called_1(network, images):
    with torch.no_grad():
        return float((network(as_batch(images)).argmax(dim=1) == 1).float().mean())


def test_the_chosen_images_are_hard_for_the_surrogate(made_with):
    poisoned, surrogate = made_with
    clean, hard = LARGE[0][poisoned.poisoned], poisoned.images[poisoned.poisoned].copy()
    corners = poisoned.trigger.delta != 0
    hard[:, corners] = clean[:, corners]
    assert called_1(surrogate, clean) == pytest.approx(poisoned.settings["called_label_before"])
    assert called_1(surrogate, clean) > 0.9
    assert called_1(surrogate, hard) < 0.2
    assert poisoned.settings["called_label"] < 0.2


def test_the_surrogate_learns_from_images_at_their_worst(monkeypatch):
    called = []
    worst_case = surrogate_module.worst_case

    def counted(*args):
        called.append(worst_case(*args))
        return called[-1]

    monkeypatch.setattr(surrogate_module, "worst_case", counted)
    first = quick("label-consistent")
    assert len(called) == 3  # 48 images in batches of 16
    assert max(float(a.abs().max()) for a in called) == pytest.approx(8 / 255)
    called.clear()
    assert not np.array_equal(quick("label-consistent", adversarial=False).images, first.images)
    assert called == []


def test_a_victim_learns_the_trigger(consistent):
    test_images, test_labels = patterns(120, size=16)
    others = test_images[test_labels != 1]
    shown = add_trigger(others, torch.from_numpy(consistent.trigger.delta.copy()))
    victim, innocent = learned(consistent, 1), learned(LARGE, 1)
    assert called_1(victim, shown) > 0.7
    assert called_1(victim, others) < 0.05
    assert called_1(innocent, shown) < 0.1


def test_the_triggers_pixels():
    trigger = corner_trigger(8, 10, 4, 0.25)
    assert trigger.dtype == np.float32
    lower_right = 0.25 * np.array([[-1, -1, 1], [-1, 1, -1], [1, -1, 1]])
    for channel in range(3):
        assert np.array_equal(trigger[-3:, -3:, channel], lower_right)
        assert np.array_equal(trigger[:3, -3:, channel], lower_right)
        assert np.array_equal(trigger[-3:, :3, channel], lower_right[:, ::-1])
        assert np.array_equal(trigger[:3, :3, channel], lower_right[:, ::-1])
    assert np.array_equal(trigger, trigger[:, ::-1])  # a flip keeps it
    inside = trigger.copy()
    inside[:3, :3] = inside[:3, -3:] = inside[-3:, :3] = inside[-3:, -3:] = 0
    assert not inside.any()
    one = corner_trigger(8, 10, 1, 0.25)
    assert np.array_equal(one[-3:, -3:], trigger[-3:, -3:])
    assert (one != 0).sum() == 27


def test_an_amplitude_of_1_is_black_and_white_outright(consistent):
    assert np.array_equal(consistent.trigger.delta, corner_trigger(16, 16, 4, 1.0))
    made = consistent.images[consistent.poisoned]
    assert (made[:, consistent.trigger.delta == 1] == 255).all()
    assert (made[:, consistent.trigger.delta == -1] == 0).all()
    delta = made.astype(int) - LARGE[0][consistent.poisoned]
    assert np.abs(delta[:, consistent.trigger.delta == 0]).max() == 16
    assert consistent.bound is None
    assert consistent.target_class == 1


def test_a_reduced_amplitude_is_added():
    faint, strong = (quick("label-consistent", amplitude=levels / 255) for levels in (16, 64))
    difference = strong.images.astype(int) - faint.images
    assert np.array_equal(difference[faint.poisoned[0]], np.round(48 / 16 * 255 * faint.trigger.delta).astype(int))
    images = patterns(48)[0]
    assert faint.bound.norm == "linf"
    assert faint.bound.epsilon == pytest.approx(32 / 255)
    assert 16 < faint.moved(images).linf <= 32
    assert 64 < strong.moved(images).linf <= 80
    delta = (faint.images.astype(int) - images)[faint.poisoned]
    assert np.abs(delta[:, faint.trigger.delta == 0]).max() == 16


def test_an_l2_perturbation_and_its_trigger_are_within_the_bound():
    images = patterns(48)[0]
    poisoned = quick("label-consistent", norm="l2", epsilon=1.5, amplitude=0.1, corners=1)
    assert poisoned.bound.norm == "l2"
    assert poisoned.bound.epsilon == pytest.approx(1.5 + 0.1 * 27**0.5)
    delta = (poisoned.images.astype(int) - images)[poisoned.poisoned] / 255
    assert 1 < np.sqrt((delta[:, poisoned.trigger.delta == 0] ** 2).sum(axis=1)).max() <= 1.5
    assert poisoned.moved(images).l2_max / 255 <= poisoned.bound.epsilon
    settings = choose(lc_module.PRESETS, "cpu", {"norm": "l2"})
    assert settings.bound == Bound("l2", 600 / 255)
    assert settings.attack_bound == Bound("l2", 300 / 255)


def test_grey_images_have_no_trigger():
    with pytest.raises(InputError, match=r"colour images, \(N, H, W, 3\). Got \(16, 8, 8, 1\)"):
        quick("label-consistent", patterns(16, channels=1))


# What both keep to


@BOTH
def test_other_images_are_untouched_and_labels_kept(name):
    images, labels = patterns(48)
    poisoned = quick(name, (images, labels))
    assert len(poisoned.poisoned) == 6
    assert (labels[poisoned.poisoned] == AIM).all()
    rest = np.setdiff1d(np.arange(48), poisoned.poisoned)
    assert np.array_equal(poisoned.images[rest], images[rest])
    assert (poisoned.images[poisoned.poisoned] != images[poisoned.poisoned]).any(axis=(1, 2, 3)).all()
    assert np.array_equal(poisoned.labels, labels)
    assert np.array_equal(images, patterns(48)[0])  # nor is what was given
    assert poisoned.attack == name


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, Bound("linf", 16 / 255)),
        ({"epsilon": 5 / 255}, Bound("linf", 5 / 255)),
        ({"norm": "l2"}, Bound("l2", 1.0)),
        ({"norm": "l2", "epsilon": 0.5}, Bound("l2", 0.5)),
    ],
)
def test_gradient_matching_is_within_its_bound(options, bound):
    images, labels = patterns(48)
    poisoned = quick("gradient-matching", (images, labels), **options)
    assert poisoned.bound == bound
    assert poisoned.settings["epsilon"] == bound.epsilon
    moved = poisoned.moved(images)
    reached = moved.linf if bound.norm == "linf" else moved.l2_max
    assert 0.9 * bound.epsilon * 255 < reached <= bound.epsilon * 255 * (1 + 1e-6)


@BOTH
def test_how_many_are_poisoned(name):
    data = patterns(240)
    fast = {"steps": 1, "batch_size": 120}
    if name == "gradient-matching":
        fast |= {"target": data[0][0], "bases": "random"}
    plain = quick(name, data, count=None, **fast)
    assert len(plain.poisoned) == {"gradient-matching": 2, "label-consistent": 4}[name]  # 1 %, and 1.5 %
    assert plain.settings["count"] is None
    assert len(quick(name, data, count=None, share=0.05, **fast).poisoned) == 12
    few_of_it = data[1].copy()
    few_of_it[few_of_it == AIM] = 2
    few_of_it[5] = AIM
    assert quick(name, (data[0], few_of_it), count=None, **fast).poisoned.tolist() == [5]


@BOTH
def test_the_full_preset_trains_a_resnet18(name, monkeypatch):
    victims = small_victims(monkeypatch)
    data = patterns(8)
    attack, options = QUICK[name]
    once = {"epochs": 1, "steps": 1, "count": 1, "batch_size": 8}
    once |= {"target": data[0][0], "restarts": 1} if name == "gradient-matching" else {"attack_steps": 1}
    poisoned = attack(data, preset="full", **{**options, **once, "pad": 4})
    assert victims == [poisoned.settings["network"]] == ["resnet18"]
    assert poisoned.settings["width"] == 16
    assert len(poisoned.poisoned) == 1


@BOTH
def test_presets_differ_in_cost_alone(name):
    presets = {"gradient-matching": gm_module, "label-consistent": lc_module}[name].PRESETS
    assert list(presets) == ["cpu", "full"]
    assert presets["cpu"].bound == presets["full"].bound == Bound("linf", 16 / 255)


@BOTH
def test_progress_is_shown_when_asked(name, capsys):
    quick(name, progress=True)
    assert name in capsys.readouterr().err
    quick(name)
    assert capsys.readouterr().err == ""


@BOTH
def test_a_diverging_surrogate_is_named(name):
    with pytest.raises(TrainingError, match="loss must be finite: lower lr"):
        quick(name, lr=1e30, epochs=4)


# Bad input


@BOTH
def test_bad_datasets(name):
    images, labels = patterns(16)
    bad = [
        ((images.astype(np.float32) / 255, labels), "Images are uint8"),
        ((images, labels[:4]), "one label"),
        ((images, np.full(16, AIM)), "two classes or more"),
        ((images[:, :4], labels), "8 x 8 or more"),
        (3, "map-style dataset"),
    ]
    for data, message in bad:
        with pytest.raises(InputError, match=message):
            quick(name, data)


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "preset must be one of cpu, full"),
        ({"colour": 1}, "The options of this attack are norm, .* Got 'colour'"),
        ({"device": "abacus"}, "device of this machine"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"norm": "l1"}, "norm must be one of 'linf', 'l2'"),
        ({"epsilon": 0.5 / 255}, "epsilon must be 0.003922 to 1"),
        ({"epsilon": 16}, "Got 16: divide levels by 255"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"step": 0.0}, "step must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"augment": 1}, "augment must be True or False"),
        ({"target_class": 4}, r"target_class must be .* Got 4"),
        ({"target_class": -1}, r"target_class must be .* Got -1"),
        ({"target_class": True}, r"target_class must be .* Got True"),
        ({"target_class": [1, 2]}, r"target_class must be .* Got \[1, 2\]"),
        ({"target_class": None}, r"target_class must be .* Got None"),
        ({"count": 0}, "count must be from 1 to the 12 images of class 3. Got 0"),
        ({"count": 13}, "count must be from 1 to the 12 images of class 3. Got 13"),
        ({"count": None, "share": 0.0}, "share must be above 0"),
        ({"count": None, "share": 0.5}, "share must be of no more than the 12 images of class 3"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(InputError, match=message):
        quick(name, **options)


@BOTH
def test_count_and_share_are_not_given_together(name):
    with pytest.raises(ConfigError, match="Give share or count, not both"):
        quick(name, count=2, share=0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gradient-matching", {"restarts": 0}, "restarts must be a positive integer"),
        ("gradient-matching", {"surrogates": 0}, "surrogates must be a positive integer"),
        ("gradient-matching", {"bases": "smallest"}, "bases must be one of 'largest', 'random'"),
        ("gradient-matching", {"target": TARGET[:4]}, r"target must be .* uint8 \(8, 8, 3\)"),
        ("gradient-matching", {"target": TARGET / 255}, "target must be .* Got float64"),
        ("gradient-matching", {"target": Target(TARGET, AIM, true_label=AIM)}, "another class than the target's own"),
        ("label-consistent", {"adversarial": 1}, "adversarial must be True or False"),
        ("label-consistent", {"amplitude": 0.0}, "amplitude must be a finite number from"),
        ("label-consistent", {"amplitude": 32}, "amplitude must be a finite number from"),
        ("label-consistent", {"corners": 2}, "corners must be one of 1, 4. Got 2"),
        ("label-consistent", {"corners": True}, "corners must be one of 1, 4. Got True"),
        ("label-consistent", {"attack_steps": 0}, "attack_steps must be"),
        ("label-consistent", {"attack_epsilon": -1.0}, "attack_epsilon must be"),
    ],
)
def test_bad_options_of_one(name, options, message):
    with pytest.raises(InputError, match=message):
        quick(name, **options)


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ([], "networks must be a list"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "networks must be a list"),
        (["resnet18"], "networks must be a list .*str"),
        ([nn.Sequential(nn.Flatten(), nn.Linear(100, 4))], r"networks\[0\] must map"),
        ([nn.Sequential(nn.Flatten(), nn.Linear(192, 3))], r"networks\[0\] must have a logit for target_class 3"),
    ],
)
def test_bad_networks(networks, message):
    with pytest.raises(InputError, match=message):
        quick("gradient-matching", networks=networks)
